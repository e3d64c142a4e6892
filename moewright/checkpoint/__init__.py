"""Bytes on disk, ours and foreign: the only room that opens weight or state files.

Read in this order: ``files`` (durable and hashed files), ``ahead`` (hashes beside other work), ``lock`` (a folder for
one process at a time), ``tree`` (the hash of weights), ``tensorfile`` (the safetensors format), ``check`` (whether
files are what was written), ``read`` (a model folder), ``vocabulary`` (how many tokens it has), ``write`` (a new model
folder) and ``into`` (moving it into an old one), ``state`` (training state). Nothing is imported here, since hashing
needs no torch.
"""

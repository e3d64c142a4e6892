"""Bytes on disk, ours and others': the only room that opens weight or state files.

Read in this order: ``disk`` (the operating system), ``tree`` (the hash of weights), ``files`` (durable and hashed
files), ``untrusted`` (JSON and names of others), ``ahead`` (hashes beside other work), ``tensorfile`` (the safetensors
format), ``check`` (files compared with their records), ``lock``, ``into`` and ``commit`` (putting a folder in place),
``read`` (a model folder), ``vocabulary`` (its number of tokens), ``write`` (a new model folder), ``shards``
(tensors in several files), ``state`` (training state). Nothing is imported here, since hashing needs no torch.
"""

"""Bytes on disk, ours and foreign: the only room that opens weight or state files.

Read in this order: ``files`` (durable and hashed files), ``lock`` (a folder for one process at a time), ``tensorfile``
(the safetensors format), ``read`` (a model folder), ``vocabulary`` (how many tokens it has), ``write`` (a new model
folder), ``state`` (training state).
"""

from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.state import load_state, newest_state, save_state
from moewright.checkpoint.tensorfile import LazyTensor, TensorInfo
from moewright.checkpoint.write import FolderWriter

__all__ = ["FolderWriter", "LazyTensor", "ModelFolder", "TensorInfo", "load_state", "newest_state", "save_state"]

"""Folders from live models.

In memory a model is always a transformers model, some of whose feed-forward blocks are MoELayers, whatever format its
folder has. `moewright.json` remembers what the format cannot say: which family it was, and whether its embeddings were
tied.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_configs
from moewright.backbone.formats.base import Format
from moewright.backbone.formats.choose import choose_format
from moewright.backbone.slots import Bring, here, stored_dtype
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import SHARD_BYTES, FolderWriter


def format_of(model: PreTrainedModel, wanted: str | None = None) -> Format:
    """The format that a model is written in, or the one that is wanted; `ModelError` if that does not compute it."""
    return choose_format(model.config, moe_configs(model), wanted=wanted)


def save_model(
    model: PreTrainedModel,
    out: str | Path,
    *,
    companions: Path | None = None,
    format: str | None = None,  # noqa: A002  # as the command line calls it
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    bring: Bring = here,
) -> Path:
    """Write a live model as a folder; atomic. Plain transformers loads it unless the format is our own, `moewright`.

    `companions` is the folder that tokenizer and generation files are carried over from; `record` joins
    `moewright.json`; `bring` gets parts of the model that are elsewhere. Without `format` a sparse model is written as
    the first architecture of transformers that computes it, or as our own type. Raises `ModelError` if the format does
    not represent the model or `out` exists, `ResourceError` if it does not fit.
    """
    chosen = format_of(model, format)
    with FolderWriter(out, overwrite=overwrite, sources=[] if companions is None else [companions]) as writer:
        write_model(writer, model, chosen, companions=companions, bring=bring)
        return writer.commit({**(record or {}), **chosen.record(model)})


def write_model(
    writer: FolderWriter,
    model: PreTrainedModel,
    format: Format,  # noqa: A002
    *,
    companions: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    bring: Bring = here,
) -> None:
    """Config, weights and companions of a live model, to be committed by the caller with the format's record."""
    writer.write_json("config.json", format.fields(model))
    tensors = {}
    for slot in format.slots(model):
        dtype = slot.dtype or stored_dtype(model)
        tensors[slot.name] = LazyTensor(slot.shape, dtype, partial(slot.stored, model, dtype, bring))
    writer.write_tensors(tensors, max_shard_bytes=max_shard_bytes)
    if companions is not None:
        writer.copy_companions(companions)

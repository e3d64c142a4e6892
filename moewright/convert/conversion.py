"""The protocol of a conversion: a model that becomes another one, a tensor at a time."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.formats.base import Format
from moewright.backbone.slots import Slot, TensorSource
from moewright.checkpoint.read import ModelFolder
from moewright.evaluate.compare import Comparison


class TensorMaker(TensorSource, Protocol):
    """Makes the tensors of a folder when they are asked for, in any order; an implementer provides `read` and
    `memory_needed`."""

    def pieces(self, slot: Slot) -> Iterator[Tensor]:
        """A slot's tensor as pieces that, one after the other, fill its memory; a large one is never there whole."""
        yield self.read(slot)

    def keys(self, slot: Slot) -> tuple[Hashable, ...]:
        """For each leaf of the file's hash in it (`checkpoint/tree.py`), a key: leaves of equal keys hold equal bytes,
        and None says nothing. No keys: nothing is known of any."""
        return ()

    def memory_needed(self) -> int:
        """Bytes held at a time while the folder is written; a comparison loads both models besides."""
        ...


class Conversion(Protocol):
    """A source folder and the model that it becomes, of which no tensor is made yet.

    An implementer provides the attributes and `facts`; the rest has a default. `make.py` does everything that
    conversions have in common.
    """

    name: str
    """The verb: the key of its record in `moewright.json`."""
    folder: ModelFolder
    """The source."""
    model: PreTrainedModel
    """The model that is made, with its parameters on meta."""
    format: Format
    """The format that it is written in."""
    dtype: torch.dtype
    """The dtype of its tensors, where their slots name no other."""
    tensors: TensorMaker
    """The values of its tensors."""
    summary: dict[str, Any]
    """The model that is made, in plain types: for a dry run, and for the report."""
    settings: dict[str, Any]
    """Its settings, with every default in place and without names of files, in plain types."""
    exact_by: str | None
    """The setting that promises the logits of the source, if one does: `scale=exact`."""
    granularity: int
    """Experts that share a row of the router at the start (1: none do)."""

    def facts(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """Its own part of the report and of `moewright.json`, in plain types; the same for the same conversion."""
        ...

    def source_facts(self) -> dict[str, Any]:
        """The entries of `moewright.json` for the source besides its type and hash."""
        return {}

    def comparison_facts(self, comparison: Comparison) -> dict[str, Any]:
        """A comparison of the new model with its source, in the words of this conversion."""
        return comparison.as_dict()

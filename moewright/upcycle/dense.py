"""The dense model that is upcycled, or the siblings that are mixed, read a tensor at a time."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.formats.choose import is_sparse
from moewright.backbone.load import open_skeleton
from moewright.backbone.skeleton import has_tied_head
from moewright.backbone.slots import Slices
from moewright.checkpoint.read import ModelFolder
from moewright.errors import ModelError
from moewright.family.row import Family
from moewright.family.table import family_of
from moewright.upcycle.siblings import average, check_siblings, sibling_of


class DenseSource:
    """Folders of one or several dense models, opened and checked; `model` is the first, with its parameters on meta.

    Several must be siblings: experts are cut from one each, everything else is their mean. `granularity` is that of the
    virtual groups, which come from one sibling each. Raises `ModelError`.
    """

    folders: list[ModelFolder]
    model: PreTrainedModel

    def __init__(self, folders: Sequence[ModelFolder], *, granularity: int) -> None:
        self.folders = list(folders)
        self.model = dense_model(folders)
        self.backbone: PreTrainedConfig = self.model.config
        self.family: Family = family_of(self.backbone)
        self._granularity = granularity
        self._block: dict[tuple[int, str], Tensor] = {}  # the tensors of the current layer
        self._layer = -1

    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds the weights of all of them."""
        return reduce(torch.promote_types, (folder.dtype() for folder in self.folders))

    def tensor(self, parameter: str, *, dtype: torch.dtype, index: Slices | None = None) -> Tensor:
        """A parameter of the model, or the part `index` of it, rounded once."""
        name = self.family.on_disk(parameter)
        if len(self.folders) == 1:
            return self.folders[0].read(name, index).to(dtype)
        return average((folder.read(name, index) for folder in self.folders), name=name, dtype=dtype)

    def part(self, part: str, *, layer: int, expert: int, dtype: torch.dtype) -> Tensor:
        """A part of a layer's dense block: as stored, of the model that the expert comes from; or the mean of all.

        `expert` is -1 for a shared expert, to which the mean belongs, in `dtype`, or float32 where that is wider.
        Tensors stay in memory until another layer is asked for.
        """
        name, rows = self.family.projection(self.backbone, part, layer)
        if layer != self._layer:
            self._block.clear()
            self._layer = layer
        if expert >= 0 or len(self.folders) == 1:
            return self._read(self.owner(expert), name)[rows]
        wide = torch.promote_types(dtype, torch.float32)
        return average((self._read(owner, name)[rows] for owner in range(len(self.folders))), name=name, dtype=wide)

    def owner(self, expert: int) -> int:
        """The number of the model that an expert comes from."""
        return sibling_of(max(expert, 0), granularity=self._granularity, siblings=len(self.folders))

    def _read(self, owner: int, name: str) -> Tensor:
        if (owner, name) not in self._block:
            self._block[owner, name] = self.folders[owner].read(name)
        return self._block[owner, name]


def dense_model(folders: Sequence[ModelFolder]) -> PreTrainedModel:
    """The dense model of the first folder, with its parameters on meta; the others are its siblings."""
    models = []
    for folder in folders:
        if is_sparse(folder.config):
            raise ModelError(
                f"{folder.path} is already a mixture of experts ({folder.config['model_type']}); give a dense model"
            )
        models.append(open_skeleton(folder)[0])
    check_siblings(folders)
    for folder, model in zip(folders, models, strict=True):
        if has_tied_head(model) != has_tied_head(models[0]):
            raise ModelError(
                f"{folder.path} is no sibling of {folders[0].path}: only one of them has tied embeddings; mix models "
                "fine-tuned from one model"
            )
    return models[0]

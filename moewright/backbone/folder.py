"""Live models from folders, and folders from live models.

In memory a model is always a dense transformers model, some of whose feed-forward blocks are
MoELayers, whatever layout its folder has. `moewright.json` remembers what the layout cannot say:
which dense family it was, and whether its embeddings were tied.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright import __version__
from moewright.backbone.family import backbone_config, empty_model, materialise
from moewright.backbone.graft import graft, moe_layers
from moewright.backbone.layout import EMBEDDING, HEAD, Slot, slots
from moewright.backbone.twins import Twin, choose_twin, dense_fields, is_sparse, split_config, twin_fields
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import FolderWriter
from moewright.errors import ModelError


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a dense or a sparse folder on CPU, in evaluation mode, in its own dtype or the given one.

    Tensors are read one at a time into place. Raises `ModelError` before anything is allocated if
    names or shapes disagree with the config.
    """
    folder = ModelFolder(path)
    model, twin = empty_model_of(folder, dtype=dtype)
    fill(model, twin, lambda slot: folder.read(slot.name))
    return model


def empty_model_of(folder: ModelFolder, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Twin | None]:
    """The model that a folder holds with its parameters on meta, and the twin that its layout is; names are checked."""
    dtype = dtype or folder.dtype()
    twin: Twin | None = None
    if is_sparse(folder.config):
        record = folder.record or {}
        tied = bool(record.get("tie_word_embeddings", False)) and _embeddings_equal(folder)
        twin, config, layers = split_config(folder.config, backbone=record.get("backbone"), tied=tied)
        model = empty_model(config, dtype=dtype)
        graft(model, layers)
    else:
        model = empty_model(backbone_config(folder.config), dtype=dtype)
    found = slots(model, twin)
    # Rotary frequencies that old versions stored are computed now, and a tied head may be stored too.
    unused = [name for name in folder.tensors if name.endswith("rotary_emb.inv_freq")]
    unused += [HEAD] if twin is None and model.config.tie_word_embeddings else []
    folder.check({slot.name: slot.shape for slot in found}, optional=unused)
    return model, twin


def fill(model: PreTrainedModel, twin: Twin | None, make: Callable[[Slot], Tensor]) -> None:
    """Give a model on meta its memory, and each slot of its layout the tensor that `make` returns for it.

    Raises `ModelError` if a tensor that must be constant is not: dropping it would change the model.
    """
    materialise(model)
    with torch.no_grad():
        for slot in slots(model, twin):
            if slot.part == "constant":
                _require_constant(slot, make)
            elif slot.part != "tied":
                slot.view(model).copy_(make(slot))


def save_model(
    model: PreTrainedModel,
    out: str | Path,
    *,
    companions: Path,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write a live model as a folder that plain transformers loads; atomic.

    `companions` is the folder that tokenizer and generation files are carried over from; `record` joins
    what `moewright.json` says. Raises `ModelError` if no architecture represents the model or `out`
    exists, `ResourceError` if it does not fit.
    """
    twin = twin_of(model)
    with FolderWriter(out, overwrite=overwrite, sources=[companions]) as writer:
        writer.write_json("config.json", config_fields(model, twin))
        writer.write_tensors({slot.name: _lazy(model, slot) for slot in slots(model, twin)})
        writer.copy_companions(companions)
        return writer.commit({**(record or {}), **model_record(model)})


def twin_of(model: PreTrainedModel) -> Twin | None:
    """The architecture that a model is written as; None for a dense model, which is written as itself."""
    layers = {layer: moe.config for layer, moe in moe_layers(model).items()}
    return choose_twin(model.config, layers) if layers else None


def config_fields(model: PreTrainedModel, twin: Twin | None) -> dict[str, Any]:
    """The fields of config.json for a model."""
    if twin is None:
        return dense_fields(model.config, dtype=model.dtype) | {"architectures": [type(model).__name__]}
    layers = {layer: moe.config for layer, moe in moe_layers(model).items()}
    return twin_fields(twin, model.config, layers, dtype=model.dtype)


def model_record(model: PreTrainedModel) -> dict[str, Any]:
    """What `moewright.json` must say for `load_model` to give this model back."""
    return {
        "backbone": model.config.model_type,
        "moewright": __version__,
        "tie_word_embeddings": bool(model.config.tie_word_embeddings),
    }


def constant(slot: Slot, dtype: torch.dtype) -> Tensor:
    """The tensor of a slot that no parameter holds."""
    return torch.full(slot.shape, slot.fill, dtype=dtype)


def _lazy(model: PreTrainedModel, slot: Slot) -> LazyTensor:
    dtype: torch.dtype = model.dtype

    def make() -> Tensor:
        return constant(slot, dtype) if slot.part == "constant" else slot.view(model).detach()

    return LazyTensor(slot.shape, dtype, make)


def _require_constant(slot: Slot, make: Callable[[Slot], Tensor]) -> None:
    if slot.must_match and not bool((make(slot) == slot.fill).all()):
        raise ModelError(
            f"{slot.name} is not {slot.fill:g} everywhere, as moewright.json implies: others changed it; "
            f"delete moewright.json to load it as what config.json says"
        )


def _embeddings_equal(folder: ModelFolder) -> bool:
    """Whether the output embedding still equals the input embedding; a warning when it does not."""
    if HEAD not in folder.tensors or EMBEDDING not in folder.tensors:
        return False  # the check of names says which is missing
    equal = torch.equal(folder.read(HEAD), folder.read(EMBEDDING))
    if not equal:
        warnings.warn(
            f"{folder.path}: moewright.json says that input and output embeddings are tied, but they differ; "
            f"they are loaded untied",
            stacklevel=2,
        )
    return equal

"""Live models from folders, and folders from live models.

In memory a model is always a dense transformers model, some of whose feed-forward blocks are
MoELayers, whatever layout its folder has. `moewright.json` remembers what the layout cannot say:
which dense family it was, and whether its embeddings were tied.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moewright import __version__
from moewright.backbone.family import backbone_config, empty_model, materialise
from moewright.backbone.graft import graft, moe_layers
from moewright.backbone.layout import EMBEDDING, HEAD, Slot, slots
from moewright.backbone.twins import Twin, choose_twin, dense_fields, is_sparse, split_config, twin_fields
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import FolderWriter
from moewright.errors import ModelError

GENERATION: Final = "generation_config.json"


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a dense or a sparse folder on CPU, in evaluation mode, in its own dtype or the given one.

    Tensors are read one at a time into place. Raises `ModelError` before anything is allocated if
    names or shapes disagree with the config.
    """
    folder = ModelFolder(path)
    model, twin = empty_model_of(folder, dtype=dtype)
    fill(model, twin, lambda slot: folder.read(slot.name))
    if (folder.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder.path), local_files_only=True)
    return model


def empty_model_of(folder: ModelFolder, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Twin | None]:
    """The model that a folder holds with its parameters on meta, and the twin that its layout is.

    Names, shapes and what must be constant are checked. Raises `ModelError`.
    """
    dtype = dtype or folder.dtype()
    twin: Twin | None = None
    if is_sparse(folder.config):
        record = folder.record or {}
        tied = _are_tied(
            folder, said=record.get("tie_word_embeddings", folder.config.get("tie_word_embeddings", False))
        )
        twin, config, layers = split_config(folder.config, backbone=record.get("backbone"), tied=tied)
        _require_plausible(folder, config)
        model = empty_model(config, dtype=dtype)
        graft(model, layers)
    else:
        config = backbone_config(folder.config)
        config.tie_word_embeddings = _are_tied(folder, said=config.tie_word_embeddings)
        _require_plausible(folder, config)
        model = empty_model(config, dtype=dtype)
    found = slots(model, twin)
    # Rotary frequencies that old versions stored are computed now; a tied head may be stored or not.
    unused = [name for name in folder.tensors if name.endswith("rotary_emb.inv_freq")]
    unused += [HEAD] if config.tie_word_embeddings else []
    folder.check({slot.name: slot.shape for slot in found}, optional=unused)
    for slot in found:
        if slot.must_match and not bool((folder.read(slot.name) == slot.fill).all()):
            raise ModelError(f"{folder.path}: {slot.name} is not {slot.fill:g} everywhere; {_why_constant(folder)}")
    return model, twin


def fill(model: PreTrainedModel, twin: Twin | None, make: Callable[[Slot], Tensor]) -> None:
    """Give a model on meta its memory, and each slot of its layout the tensor that `make` returns for it."""
    materialise(model)
    with torch.no_grad():
        for slot in slots(model, twin):
            if slot.part not in ("constant", "tied"):
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


def _are_tied(folder: ModelFolder, *, said: bool) -> bool:
    """Whether to tie input and output embeddings, given what the folder says of it.

    A stored output embedding that differs from the input embedding counts more than what is said; a warning says so.
    """
    if not said or HEAD not in folder.tensors or EMBEDDING not in folder.tensors:
        return bool(said)
    equal = torch.equal(folder.read(HEAD), folder.read(EMBEDDING))
    if not equal:
        warnings.warn(
            f"{folder.path} says that input and output embeddings are tied, but holds two that differ; "
            f"they are loaded untied",
            stacklevel=3,
        )
    return equal


def _require_plausible(folder: ModelFolder, config: PreTrainedConfig) -> None:
    """Compare the sizes that make a model large with what the files hold, before the model's skeleton is built."""
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    last = config.num_hidden_layers - 1
    expected = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        f"model.layers.{last}.self_attn.q_proj.weight": (heads, config.hidden_size),
    }
    for name, shape in expected.items():
        found = folder.tensors[name].shape if name in folder.tensors else None
        if found != shape:
            what = "is missing" if found is None else f"has the shape {list(found)}"
            raise ModelError(f"{folder.path}: {name} {what}, where config.json calls for {list(shape)}")


def _why_constant(folder: ModelFolder) -> str:
    if folder.record is None:
        return "attention biases or shared experts like these are not supported yet"
    return (
        "moewright.json says it should be, so others changed it; delete moewright.json to load it by config.json alone"
    )

"""`save_pretrained` and `load_state_dict` of a model with MoELayers, which transformers and others call.

In memory the model has names of its own, on disk those of the format it is written in. `Trainer` saves by the one and
resumes by the other.
"""

import copy
import os
import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.hub import convert_file_size_to_int

from moewright.backbone.blocks import moe_configs, put_in
from moewright.backbone.formats.choose import TWINS, formats_of
from moewright.backbone.save import format_of, write_model
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.backbone.slots import Slot
from moewright.checkpoint.write import SHARD_BYTES, FolderWriter
from moewright.errors import ModelError, UsageError, listed
from moewright.family.table import family_of

RECOMPUTED: Final = (r"rotary_emb\.inv_freq$", r"embed_positions\.weights$")
"""Tensors that old versions stored, and that are computed from the config."""

TAKEN: Final[dict[str, tuple[Any, ...]]] = {
    "safe_serialization": (True, None),
    "save_original_format": (True, None),
    "save_peft_format": (True, False, None),  # adapters' names, of which there are none here
    "push_to_hub": (False, None),
    "distributed_checkpoint": (False, None),
    "variant": (None,),
}
"""Arguments of `save_pretrained` that we know, and the values under which they ask for what we do anyway."""


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    max_shard_size: int | str = SHARD_BYTES,
    token: object = None,
    **others: Any,
) -> None:
    """`save_model` under the name and with the arguments of transformers: the first twin that computes the model.

    A folder that exists is written into: a model that it holds is replaced, everything else stays. With `state_dict`,
    these values, by the names in memory, are written in place of the model's own; nothing where `is_main_process` is
    false. The model itself is not changed. `token` is for the hub, which nothing is sent to.

    Raises `UsageError` for what we do not do (`push_to_hub`, ...), `ModelError` for weights that are not here whole
    (sharded, offloaded) or are others than the model's (adapters), and what `save_model` raises.
    """
    for name, value in others.items():
        if name not in TAKEN or not any(value is allowed for allowed in TAKEN[name]):
            hint = "; model.push_to_hub(...) saves and uploads" if name == "push_to_hub" else ""
            raise UsageError(f"save_pretrained: {name}={value!r} is not supported with MoE layers{hint}")
    shard_bytes = _bytes_of(max_shard_size)
    if not is_main_process:
        return
    held = _holding(model, state_dict if state_dict is not None else model.state_dict())
    written_as = format_of(held)
    with FolderWriter(Path(save_directory), into=True) as writer:
        if model.can_generate():
            model.generation_config.save_pretrained(writer.path)  # first, since it refuses senseless settings
        write_model(writer, held, written_as, max_shard_bytes=shard_bytes)
        writer.commit(written_as.record(held))


def take_names_on_disk(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Pre-hook of `load_state_dict`, which lets it take the tensors of a folder by their names on disk, in any format
    that holds the model.

    They are put into the model here; names in memory and unknown names are left to torch. Tensors that old versions
    stored and that follow from the config are dropped. The state may be partial (one shard). Raises `ModelError`
    where some of it is this model's, but feed-forward weights in it are those of a dense model, or of a format that
    does not compute this one.
    """
    assert isinstance(model, PreTrainedModel)
    for name in [name for name in state_dict if any(re.search(pattern, name) for pattern in RECOMPUTED)]:
        del state_dict[name]
    given = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    held = _names_in_memory(model)
    unknown = given - held
    if not unknown:
        return
    slots = _slots_with(model, unknown)
    _require_no_half(model, given, strange=unknown - {slot.name for slot in slots})
    partly: dict[str, list[str]] = {}
    taken: set[str] = set()
    for slot in slots:
        if slot.tied or slot.name in held:
            continue
        if slot.fill is not None:
            stored = state_dict.pop(prefix + slot.name, None)
            if stored is not None and slot.contradicts(stored):
                error_msgs.append(f"{slot.name} is not {slot.fill:g} everywhere, as this model has it.")
            continue
        name, _ = slot.place(model)
        if slot.name not in given:
            partly.setdefault(name, []).append(prefix + slot.name)
            continue
        stored, live = state_dict.pop(prefix + slot.name), slot.view(model).detach()
        if live.is_meta or isinstance(live, DTensor):
            raise ModelError(f"{name} is not here as a whole, so {slot.name} cannot be put into it; use load_model")
        if stored.shape != slot.shape:
            shapes = f"{list(stored.shape)}, the model's is {list(slot.shape)}"
            error_msgs.append(f"size mismatch for {slot.name}: {shapes}.")
        else:
            live.copy_(slot.from_disk(stored))
        taken.add(name)
    for name in taken:
        state_dict[prefix + name] = attrgetter(name)(
            model
        ).detach()  # which torch copies onto itself, and counts as loaded
        missing_keys.extend(partly.get(name, ()))


def _holding(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model like this one whose parameters are the tensors of `state`, without a copy."""
    held = empty_model(copy.deepcopy(model.config), dtype=model.dtype)
    if has_tied_head(held) and not has_tied_head(model):
        untie_head(held)
    put_in(held, moe_configs(model))
    odd = [name for name, tensor in state.items() if isinstance(tensor, DTensor) or tensor.is_meta]
    if odd:
        raise ModelError(f"save_pretrained: {listed(odd)} are sharded or offloaded; gather them, and pass state_dict=")
    unknown = set(state) - _names_in_memory(held)
    if on_disk := sorted(unknown & {slot.name for slot in _slots_with(held, unknown)}):
        raise ModelError(
            f"save_pretrained: {listed(on_disk)} are names on disk; state_dict takes the names in memory, those of "
            "model.state_dict()"
        )
    try:
        result = held.load_state_dict(dict(state), strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"save_pretrained: {' '.join(str(error).split())}") from error
    held.tie_weights()
    if result.unexpected_keys:
        raise ModelError(
            f"save_pretrained: {listed(result.unexpected_keys)} are no weights of a {model.config.model_type} model "
            "with these MoE layers; merge or take out what was added to it (adapters: merge_and_unload)"
        )
    if missing := [name for name, parameter in held.named_parameters() if parameter.is_meta]:
        raise ModelError(f"save_pretrained: state_dict lacks {listed(missing)}; pass the state of the whole model")
    return held


def _names_in_memory(model: PreTrainedModel) -> set[str]:
    """The keys of its state; not by `state_dict`, which may gather shards."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names | {name for name, _ in model.named_buffers(remove_duplicate=False)}


def _slots_with(model: PreTrainedModel, names: set[str]) -> list[Slot]:
    """The tensors of the format that has most of these names, of those that hold this model; the first of equals."""
    candidates = [written_as.slots(model) for written_as in formats_of(model.config, moe_configs(model))]
    return max(candidates, key=lambda slots: sum(slot.name in names for slot in slots))


def _require_no_half(model: PreTrainedModel, given: set[str], *, strange: set[str]) -> None:
    """`ModelError` if part of a state is this model's, and `strange` has what stands elsewhere for its experts."""
    if given == strange:
        return
    family = family_of(model.config)
    form = family.form_of(model.config)
    inside = [template.removeprefix("{layer}.") for twin in TWINS for template in twin.parts.values()]
    inside = [re.escape(name).replace(re.escape("{expert}"), r"\d+") for name in inside]
    for layer, place in enumerate(family.places(model.config)):
        dense = [place.path(name).removeprefix(f"{place.layer}.") for name in (form.gate, form.up, form.down) if name]
        pattern = "|".join([*inside, *(rf"{re.escape(name)}\.(weight|bias)" for name in dense)])
        if misplaced := sorted(
            name for name in strange if re.fullmatch(rf"{re.escape(place.layer)}\.({pattern})", name)
        ):
            raise ModelError(
                f"load_state_dict: layer {layer} has {listed(misplaced)}, and no place for it: these are weights of "
                "another model, or of a format that does not compute this one; load their folder with load_model"
            )


def _bytes_of(size: int | str) -> int:
    """A number of bytes, or one with a unit as in 5GB or 5GiB."""
    try:
        count: int = convert_file_size_to_int(size)
    except ValueError:
        count = 0
    if count <= 0:
        raise UsageError(f"max_shard_size={size!r}: give a number of bytes, or a whole number with a unit as in 5GB")
    return count

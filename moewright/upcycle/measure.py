"""The measurements of an upcycling on the dense model, which is loaded once if any setting asks for it, and let go.

Letters: T tokens, D model width, W width of the block, E experts, M virtual groups.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.load import load_model
from moewright.data.tokenizer import load_tokenizer, tokenise
from moewright.errors import UsageError
from moewright.upcycle.observe import Observed, Wanted, observe, prompt_states, read_prompts
from moewright.upcycle.plan import UpcyclePlan
from moewright.upcycle.routers import centroid_rows, prompt_rows, start_router, with_logit_std
from moewright.upcycle.scale import expected_weight_sum, mean_weight_sum


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Measurements of a dense model by layer; empty where no setting asks for them."""

    router_rows: Mapping[int, Tensor] = field(default_factory=dict)
    """(M, D) float32: the rows of a router that starts from `centroids` of the text or from `prompts`."""
    weight_sums: Mapping[int, float] = field(default_factory=dict)
    """Mean over tokens of the sum of a token's combine weights, for the scale `calibrated`."""
    importance: Mapping[int, Tensor] = field(default_factory=dict)
    """(W,) float64: how much each neuron matters to the loss (`observe.Observed`)."""
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    """(T, W) bfloat16: activations by which neurons are clustered."""
    model_was_loaded: bool = False


def measure(plan: UpcyclePlan, *, texts: Sequence[Tensor] | None = None) -> Measurements:
    """Measure what a plan's settings ask for, on its first folder; `texts`, token ids, replace the calibration text.

    Raises `UsageError` for a setting that needs a text where there is none, `DataError` for a text or prompts that
    cannot be read or hold too little, `ModelError` for a tokenizer that does not load.
    """
    config = plan.config
    texts = _calibration_texts(plan, texts)
    loads = texts is not None or config.router_start == "prompts"
    model = load_model(plan.folder.path, dtype=torch.float32) if loads else None
    rows = _rows_from_prompts(plan, model) if model is not None and config.router_start == "prompts" else {}
    calibrates, centroids = config.scale == "calibrated", config.router_start == "centroids"
    routers = _routers(plan, rows) if calibrates and not centroids else {}
    wanted = Wanted(
        routers=routers,
        top_k=config.top_k,
        inputs=centroids,
        hidden=config.neurons == "clustered",
        importance=config.needs_importance,
        seed=config.seed,
    )
    observed = Observed()
    if model is not None and texts is not None:
        observed = observe(model, plan.layers, texts, wanted=wanted)
    sums = observed.weight_sums
    if centroids:
        rows = {layer: _rows_from_inputs(plan, layer, x_TD) for layer, x_TD in observed.inputs.items()}
        if calibrates:  # on the tokens that made the rows
            sums = {
                layer: mean_weight_sum(observed.inputs[layer], router_ED, top_k=config.top_k)
                for layer, router_ED in _routers(plan, rows).items()
            }
    elif calibrates and texts is None:
        sums = expected_weight_sums(plan, routers)
    return Measurements(
        router_rows=rows,
        weight_sums=sums,
        importance=observed.importance,
        hidden=observed.hidden,
        model_was_loaded=loads,
    )


def expected_weight_sums(plan: UpcyclePlan, routers: Mapping[int, Tensor]) -> dict[int, float]:
    """The weight sums of routers, (E, D) by layer, where there is no text: those for Gaussian inputs.

    Their spread is that of the norm before the block. Raises `UsageError` for blocks that read no norm.
    """
    folder, backbone, family = plan.folder, plan.source.backbone, plan.source.family
    places = family.places(backbone)
    sums = {}
    for layer, router_ED in routers.items():
        place = places[layer]
        if place.stack.norm is None:
            raise UsageError(
                f"scale=calibrated of a {backbone.model_type} model: its blocks read no norm, so their inputs must be "
                "measured; give a calibration_text"
            )
        norm = f"{place.layer}.{place.stack.norm}"
        scale_D = folder.read(f"{norm}.weight") + family.norm_offset
        shift_D = folder.read(f"{norm}.bias") if f"{norm}.bias" in folder.tensors else None
        sums[layer] = expected_weight_sum(router_ED, scale_D, shift_D=shift_D, top_k=plan.config.top_k, seed=layer)
    return sums


def _calibration_texts(plan: UpcyclePlan, texts: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """The text to read, as token ids; None if there is none, or no setting that it changes anything for."""
    config = plan.config
    if texts is None and config.calibration_text is not None:
        texts = tokenise(plan.folder.path, [config.calibration_text], vocabulary=plan.source.backbone.vocab_size)
    if texts is None and (setting := config.needs_text()):
        raise UsageError(
            f"{setting} is measured on text: give a calibration_text like the text that the model will see"
        )
    if texts is not None and not config.uses_text():
        warnings.warn(
            f"calibration_text is ignored: scale={config.scale} with neurons={config.neurons} needs none",
            stacklevel=3,
        )
        return None
    return texts


def _routers(plan: UpcyclePlan, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The routers, (E, D) by layer, in the dtype written."""
    return {
        layer: start_router(plan.config, rows.get(layer), hidden_size=moe.hidden_size, layer=layer, dtype=plan.dtype)
        for layer, moe in plan.layers.items()
    }


def _rows_from_inputs(plan: UpcyclePlan, layer: int, x_TD: Tensor) -> Tensor:
    config = plan.config
    assert config.router_logit_std is not None, "a resolved config"
    rows_MD = centroid_rows(x_TD, groups=config.groups, seed=config.seed, layer=layer)
    return with_logit_std(rows_MD, x_TD, std=config.router_logit_std)


def _rows_from_prompts(plan: UpcyclePlan, model: PreTrainedModel) -> dict[int, Tensor]:
    config = plan.config
    assert config.prompts is not None, "UpcycleConfig asks for them"
    assert config.router_logit_std is not None, "a resolved config"
    tokenizer = load_tokenizer(plan.folder.path, vocabulary=model.config.vocab_size)
    prompts = [
        [torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64) for text in group]
        for group in read_prompts(Path(config.prompts), groups=config.groups)
    ]
    rows = {}
    for layer, states in prompt_states(model, plan.layers, prompts).items():
        all_TD = torch.cat([state_TD for group in states for state_TD in group])
        rows[layer] = with_logit_std(prompt_rows(states), all_TD, std=config.router_logit_std)
    return rows

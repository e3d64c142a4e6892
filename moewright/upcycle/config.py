"""The settings of an upcycling; importing this imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from moewright.errors import UsageError
from moewright.moe.config import ROUTER_ORDERS, RouterOrder, SharedMode

Scale = Literal["exact", "full", "uniform", "calibrated", "none"]
Neurons = Literal["contiguous", "shuffled", "round-robin", "clustered", "important"]
IndexSets = Literal["shared", "separate"]
RouterStart = Literal["normal", "zeros", "orthogonal", "centroids", "prompts"]
SharedNeurons = Literal["first", "important", "new"]

_NAMES: Final = {
    "router_order": (None, *ROUTER_ORDERS),
    "scale": (None, *get_args(Scale)),
    "redraw_sets": get_args(IndexSets),
    "neurons": get_args(Neurons),
    "router_start": get_args(RouterStart),
    "shared_mode": get_args(SharedMode),
    "shared_neurons": get_args(SharedNeurons),
}
"""The fields with a list of allowed values."""

FROM_DATA: Final = ("centroids", "prompts")
"""The router starts that come from hidden states."""

PATHS: Final = ("siblings", "prompts", "calibration_text")
"""The fields that name files; the record of a model holds digests of their content instead."""


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model becomes sparse; the letters are those of arXiv 2410.07524.

    A setting that makes no sense raises `UsageError` when the config is made; what depends on the
    source model (widths, number of layers) is checked by `moewright.upcycle.plan`. docs/upcycling.md has the formula
    and the source of each method, and when to use it.
    """

    experts: int
    """N, the number of routed experts of a layer."""

    top_k: int
    """T, the number of experts that each token is sent to: a multiple of the granularity, but for a split."""

    granularity: int = 1
    """G: one expert has 1/G of the dense feed-forward width, so a layer grows N/G times."""

    split: bool = False
    """Cut the block into N experts and copy none: a token gets T of the N parts, and the layer does not grow."""

    router_order: RouterOrder | None = None
    """`topk-softmax` or `softmax-topk`; by default the first, and the second for top_k = 1."""

    scale: Scale | None = None
    """How expert weights are scaled: `exact`, `full` (the same, where the method changes what experts compute),
    `calibrated`, `uniform` or `none`; by default `calibrated` for `softmax-topk`, else `exact` where it can be."""

    layers: str = "all"
    """Which layers become sparse: `all`, `every:n` (the n-th, 2n-th, ... of each stack), or a list such as `0,2,5` or
    `encoder.3,decoder.3`."""

    seed: int = 0
    """Seed of all that is drawn."""

    neurons: Neurons = "contiguous"
    """Which neurons of the block an expert holds: `contiguous` runs, `shuffled`, dealt `round-robin`, `clustered` (by
    activations on the calibration text, without one by weights), or `important` (MoEBERT's split, on the text)."""

    common_neurons: int = 0
    """With `neurons = important`: how many of the most important neurons every expert holds."""

    permute: bool = False
    """Put each expert's neurons in an order of its own."""

    noise: float = 0.0
    """Deviation of Gaussian noise on each matrix of an expert, relative to that of its own elements."""

    redraw: float = 0.0
    """r of Drop-Upcycling: the fraction of each expert's neurons that is drawn anew."""

    redraw_sets: IndexSets = "shared"
    """Whether gate, up and down lose the same neurons, as the paper says, or `separate` ones, as its code does."""

    router_start: RouterStart = "normal"
    """The initial rows of the router: `normal`, `zeros`, `orthogonal`, `centroids` of hidden states on the calibration
    text, or the mean hidden states of `prompts`."""

    router_std: float | None = None
    """Standard deviation of `normal` and `orthogonal` rows; by default 0.02, and 0.05/sqrt(D) for `softmax-topk`."""

    router_logit_std: float | None = None
    """Deviation of the logits that rows from data start with; by default that of normal rows: 0.02 sqrt(D), and 0.05
    for `softmax-topk`."""

    prompts: str | None = None
    """For `router_start = prompts`: a JSON file, a list with a list of texts for each of the N/G virtual groups."""

    shared_size: int = 0
    """Width of a shared expert, which every token goes through; 0: there is none."""

    shared_mode: SharedMode = "added"
    """How it joins the routed experts: `added`, `gated` by a sigmoid, or `residual` (a softmax of two)."""

    shared_neurons: SharedNeurons = "first"
    """Its neurons: the `first` of the block or the most `important`, which the routed experts then lack, or `new` ones
    beside the block, whose output starts at zero."""

    siblings: tuple[str, ...] = ()
    """Folders of further models fine-tuned from the same one: each gives experts, all else is the mean
    (branch-train-mix)."""

    calibration_text: str | None = None
    """A text file on which scale, importance, clusters and centroids are measured."""

    def __post_init__(self) -> None:
        if self.split and self.granularity == 1:
            object.__setattr__(self, "granularity", self.experts)
        for problem in self._problems():
            raise UsageError(problem)

    def _problems(self) -> Iterator[str]:
        """Why this configuration is refused, the plainest reason first."""
        for name in ("experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: it must be at least 1"
        for name in ("shared_size", "common_neurons"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)}: it must be 0 or more"
        for name, allowed in _NAMES.items():
            if (value := getattr(self, name)) not in allowed:
                yield f"{name}={value!r}: choose one of {', '.join(str(name) for name in allowed if name is not None)}"
        if not 0.0 <= self.noise < float("inf"):
            yield f"noise={self.noise}: it must be a finite number, 0 or more"
        if not 0.0 <= self.redraw <= 1.0:
            yield f"redraw={self.redraw}: it must be a fraction from 0 to 1"
        for name in ("router_std", "router_logit_std"):
            if (value := getattr(self, name)) is not None and not 0.0 < value < float("inf"):
                yield f"{name}={value}: it must be a finite number above 0"
        yield from self._number_problems()
        yield from self._router_problems()
        yield from self._scale_problems()

    def _number_problems(self) -> Iterator[str]:
        N, T, G = self.experts, self.top_k, self.granularity
        if T > N:
            yield f"top_k={T} > experts={N}: a token cannot choose more experts than there are"
        if self.split:
            if G != N:
                yield f"granularity={G} with split: the block is cut into experts={N} parts; leave the granularity out"
            if T == N:
                yield f"top_k={T} with split: every token would get all parts; use fewer, or granularity={N} alone"
        elif N % G:
            yield f"experts={N} is not a multiple of granularity={G}: every shard needs as many copies"
        elif T % G:
            allowed = ", ".join(str(m * G) for m in range(1, min(N // G, 4) + 1))
            yield (
                f"top_k={T} is not a multiple of granularity={G}: a token would get part of the dense block; "
                f"use {allowed}{', ...' if N // G > 4 else ''}"
            )
        if self.neurons == "important" and not self.split:
            yield (
                "neurons=important without split: parts of unequal importance cannot form virtual groups; "
                "set split, or use shuffled or clustered"
            )
        owners = 1 + len(self.siblings)
        if owners > 1 and N % (G * owners):
            yield (
                f"experts={N} with granularity={G} and {owners} siblings: each owns equally many virtual groups, so "
                f"use a multiple of {G * owners} experts"
            )

    def _router_problems(self) -> Iterator[str]:
        start = self.router_start
        if start == "zeros" and self.granularity > 1:
            yield (
                f"router_start=zeros with granularity={self.granularity}: all experts tie, so a token's choice need "
                "not be whole virtual groups; use normal or orthogonal rows, with a small std"
            )
        if start in FROM_DATA and self.groups < 2:
            yield (
                f"router_start={start} with {self.groups} virtual group of experts: a token has nothing to choose "
                "between; use more experts, a smaller granularity, or normal rows"
            )
        if start == "prompts" and self.prompts is None:
            yield f"router_start=prompts without prompts: name a JSON file with {self.groups} lists of texts"

    def _scale_problems(self) -> Iterator[str]:
        order, scale = self.resolved_order(), self.resolved_scale()
        if scale in ("exact", "full") and order == "softmax-topk":
            yield (
                f"scale={scale} with router_order=softmax-topk: a token's weights have no constant sum, none is exact; "
                "use scale=calibrated or router_order=topk-softmax"
            )
        if scale == "calibrated" and order == "topk-softmax":
            yield (
                "scale=calibrated with router_order=topk-softmax: its weights sum to 1 and need no calibration; "
                f"use scale={'full' if self.departs else 'exact'}"
            )
        if scale == "exact" and self.departs:
            yield (
                f"scale=exact with {self.departs}, so the sparse model is not the dense one at step 0; use scale=full, "
                "which scales alike and promises nothing"
            )
        if scale == "uniform" and self.split:
            yield "scale=uniform with split: the published scale is of whole virtual groups; use full or calibrated"

    @property
    def departs(self) -> str | None:
        """Why no scale makes the sparse model equal to its source at step 0, whatever the router order."""
        if self.split:
            return f"split: a token gets {self.top_k} of {self.experts} parts"
        if self.siblings:
            return "siblings: experts are of several models, and the rest is their mean"
        if self.noise or self.redraw:
            name = "noise" if self.noise else "redraw"
            return f"{name}={getattr(self, name)}: experts compute something else than the block"
        return None

    @property
    def tied(self) -> int:
        """How many experts share a router row: those of a virtual group; in a split each has its own."""
        return 1 if self.split else self.granularity

    @property
    def groups(self) -> int:
        """How many different rows the router has."""
        return self.experts // self.tied

    @property
    def carved(self) -> int:
        """How many neurons of the block the shared expert takes from the routed ones."""
        return 0 if self.shared_neurons == "new" else self.shared_size

    @property
    def common(self) -> int:
        """How many neurons every expert holds."""
        return self.common_neurons if self.neurons == "important" else 0

    @property
    def needs_importance(self) -> bool:
        return self.neurons == "important" or bool(self.shared_size and self.shared_neurons == "important")

    def needs_text(self) -> str | None:
        """The setting that cannot be without a calibration text, if there is one."""
        if self.neurons == "important":
            return "neurons=important"
        if self.needs_importance:
            return "shared_neurons=important"
        return "router_start=centroids" if self.router_start == "centroids" else None

    def uses_text(self) -> bool:
        """Whether a calibration text changes anything."""
        return bool(self.needs_text()) or self.neurons == "clustered" or self.resolved_scale() == "calibrated"

    def ignored(self) -> list[str]:
        """Settings without effect, in words."""
        from_data, start = self.router_start in FROM_DATA, self.router_start
        settings = [
            ("redraw_sets", "redraw is 0", self.redraw_sets != "shared" and not self.redraw),
            ("common_neurons", f"neurons is {self.neurons}", bool(self.common_neurons) and self.neurons != "important"),
            ("router_std", f"router_start is {start}", self.router_std is not None and (from_data or start == "zeros")),
            ("router_logit_std", f"router_start is {start}", self.router_logit_std is not None and not from_data),
            ("prompts", f"router_start is {start}", self.prompts is not None and start != "prompts"),
            ("shared_mode", "shared_size is 0", self.shared_mode != "added" and not self.shared_size),
            ("shared_neurons", "shared_size is 0", self.shared_neurons != "first" and not self.shared_size),
        ]
        return [f"{name}={getattr(self, name)} is ignored: {why}" for name, why, is_ignored in settings if is_ignored]

    def resolved_order(self) -> RouterOrder:
        """The router order, with its default in place.

        With one expert a token `topk-softmax` gives the weight 1 whatever the logits, and so the
        router no gradient from the model's loss.
        """
        return self.router_order or ("softmax-topk" if self.top_k == 1 else "topk-softmax")

    def resolved_scale(self) -> Scale:
        """The scale, with its default in place."""
        if self.scale is not None:
            return self.scale
        if self.resolved_order() == "softmax-topk":
            return "calibrated"
        return "full" if self.departs else "exact"

    def resolved(self, *, hidden_size: int) -> "UpcycleConfig":
        """The same config with every default in place, for a model of width D."""
        order = self.resolved_order()
        std = 0.05 / hidden_size**0.5 if order == "softmax-topk" else 0.02
        return replace(
            self,
            router_order=order,
            scale=self.resolved_scale(),
            router_std=self.router_std or std,
            router_logit_std=self.router_logit_std or std * hidden_size**0.5,
        )

    def settings(self) -> dict[str, Any]:
        """The settings in the record of a model: all but the names of files."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in PATHS}

"""The settings that define one mixture-of-experts layer, and the combinations of them that are refused."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal, get_args

from moewright.errors import UsageError

Choice = Literal["token", "expert"]
Score = Literal["softmax", "sigmoid"]
RouterOrder = Literal["softmax-topk", "topk-softmax"]
GroupScore = Literal["max", "top2"]
Noise = Literal["normal", "gumbel"]
DropPolicy = Literal["position", "probability", "random"]
BalanceScope = Literal["micro-batch", "sequence", "global"]
SharedMode = Literal["added", "gated", "residual"]

ROUTER_ORDERS: Final = get_args(RouterOrder)
DROP_POLICIES: Final = get_args(DropPolicy)
BALANCE_SCOPES: Final = get_args(BalanceScope)

_NAMES: Final = {
    "choice": get_args(Choice),
    "score": get_args(Score),
    "router_order": (None, *ROUTER_ORDERS),
    "group_score": get_args(GroupScore),
    "noise": get_args(Noise),
    "drop_policy": DROP_POLICIES,
    "balance_scope": BALANCE_SCOPES,
    "shared_mode": get_args(SharedMode),
}
"""The fields with a list of allowed values."""

_AT_LEAST_ONE: Final = ("hidden_size", "expert_size", "num_experts", "num_groups", "top_groups")
_NOT_NEGATIVE: Final = (
    *("top_k", "expert_choice", "routed_scale", "bias_update_rate", "input_jitter", "logit_noise", "logit_norm"),
    *("capacity_factor", "eval_capacity_factor", "min_capacity", "balance_loss", "balance_adaptation"),
    *("max_balance_loss", "z_loss", "shared_size", "output_masking"),
)

TRAINING_FIELDS: Final = frozenset(
    {
        *("causal", "input_jitter", "logit_noise", "noise", "capacity_factor", "min_capacity", "drop_policy"),
        *("first_choices_first", "bias_update_rate", "balance_loss", "balance_scope", "balance_adaptation"),
        *("max_balance_loss", "z_loss", "kernel"),
    }
)
"""The fields that do not change what a dropless layer computes in evaluation."""

TRAINING_BUFFERS: Final = ("balance_coefficient", "previous_counts")
"""The buffers of a layer that only its training reads; it has them in its state where these fields ask for them."""


@dataclass(frozen=True, kw_only=True)
class MoESettings:
    """How the layers of a model are trained: the `[moe]` table of a run file, and the part of a layer's config that may
    change from run to run."""

    balance_loss: float = 0.01
    """Coefficient of the load-balancing loss of Switch Transformers, in each layer."""

    balance_scope: BalanceScope = "micro-batch"
    """Over what its load is counted: `micro-batch`, each `sequence`, or `global`, on all ranks for a whole step."""

    balance_adaptation: float = 0.0
    """If not 0, the coefficient follows this times the dropped share, from `balance_loss` on (Skywork-MoE: 0.2)."""

    max_balance_loss: float = 0.01
    """The most that the adapted coefficient follows."""

    z_loss: float = 0.0
    """Coefficient of the router z-loss of ST-MoE, in each layer."""

    input_jitter: float = 0.0
    """The routers' inputs are multiplied with uniform noise from 1 - this to 1 + this."""

    logit_noise: float = 0.0
    """Noise of this scale is added to the routers' logits for the choice alone."""

    noise: Noise = "normal"
    """The distribution of `logit_noise`: `normal` or `gumbel`."""

    capacity_factor: float = 0.0
    """An expert takes at most this times its even share of a micro-batch's assignments; 0: no limit (dropless)."""

    min_capacity: int = 4
    """With a capacity factor, an expert takes at least this many."""

    drop_policy: DropPolicy = "position"
    """Which assignments an expert over its capacity drops: by `position`, by `probability`, or at `random`."""

    first_choices_first: bool = False
    """Whether every token's first choice goes before any token's second choice."""

    kernel: str = "auto"
    """Which kernel computes the experts, by its name in `moewright.moe.kernels`; `auto`: the device's fastest."""

    def __post_init__(self) -> None:
        # All that can be wrong with these settings alone; a layer has the rest of its options from the model.
        MoEConfig(hidden_size=1, expert_size=1, num_experts=2, top_k=2, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class MoEConfig(MoESettings):
    """Everything that defines one layer; a combination that makes no sense raises `UsageError`.

    `docs/moe-layer.md` has the formula and the source of each option, and when to use it.
    """

    hidden_size: int
    """D, the width of the model."""

    expert_size: int
    """F, the width of one expert."""

    num_experts: int
    """E, the number of routed experts (N of the upcycling papers)."""

    top_k: int = 0
    """K, the number of experts that each token chooses (T of the upcycling papers)."""

    # -- who chooses whom --

    choice: Choice = "token"
    """Whether tokens choose their experts, or experts their tokens (encoders only)."""

    expert_choice: float = 0.0
    """With `choice="expert"`: experts per token on average; each expert takes this times tokens / E of them."""

    causal: bool = True
    """Whether the model reads from left to right; then experts may not choose, as they would by later tokens."""

    score: Score = "softmax"
    """How logits become scores: by a softmax over the experts, or by a sigmoid of each."""

    router_order: RouterOrder | None = None
    """Softmax before the choice, over all experts, or after it, over the chosen; None takes `topk-softmax` where
    tokens choose several by softmax, else `softmax-topk`. Sigmoid scores have no order."""

    renormalize: bool = False
    """Whether a token's combine weights are divided by their sum over the experts that it kept."""

    routed_scale: float = 1.0
    """Factor of the combine weights, applied last."""

    num_groups: int = 1
    """Number of groups of neighbouring experts."""

    top_groups: int = 1
    """Number of groups from which a token may choose its experts."""

    group_score: GroupScore = "max"
    """Rank of a group: by its best score, or by the sum of its best two."""

    router_bias: bool = False
    """Whether the router's logits have a trained bias, one for each expert."""

    selection_bias: bool = False
    """Whether a bias for each expert is added to the scores for the choice alone, not to the combine weights."""

    bias_update_rate: float = 0.0
    """Size of the move that a step makes with each selection bias, towards an even load."""

    logit_norm: float = 0.0
    """If not 0, logits are first brought to mean 0 and this standard deviation over the experts."""

    eval_capacity_factor: float = 0.0
    """The capacity factor in evaluation."""

    balance_loss: float = 0.0
    """As above, but off by default: a layer by itself has no loss."""

    # -- what an expert is --

    activation: str = "silu"
    """The activation of the experts, by its name in `moewright.moe.activations`."""

    gated: bool = True
    """Whether an expert computes `down(act(gate(x)) * up(x))` or `down(act(up(x)))`."""

    expert_bias: bool = False
    """Whether the experts' products have biases."""

    shared_size: int = 0
    """Width of the expert that every token goes through; 0: there is none."""

    shared_mode: SharedMode = "added"
    """The shared expert's output is added, or added times a sigmoid gate, or both outputs are weighted by a softmax
    of two (residual MoE)."""

    output_masking: float = 0.0
    """In training, the share of expert outputs that are masked; in evaluation all are multiplied with the rest."""

    def __post_init__(self) -> None:
        if self.router_order is None and self.score == "softmax":
            # After the choice of one expert a softmax is 1, and the router would learn nothing.
            before = self.choice == "expert" or self.top_k == 1
            order: RouterOrder = "softmax-topk" if before else "topk-softmax"
            object.__setattr__(self, "router_order", order)
        for problem in self._problems():
            raise UsageError(problem)

    def _problems(self) -> Iterator[str]:
        """Why this configuration is refused, the plainest reason first."""
        for name, allowed in _NAMES.items():
            if (value := getattr(self, name)) not in allowed:
                yield f"{name}={value!r}: choose one of {', '.join(str(name) for name in allowed if name is not None)}"
        for name in _AT_LEAST_ONE:
            if (value := getattr(self, name)) < 1:
                yield f"{name}={value}: it must be at least 1"
        for name in _NOT_NEGATIVE:
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                yield f"{name}={value}: it must be a finite number, 0 or more"
        for name in ("input_jitter", "output_masking"):
            if (value := getattr(self, name)) >= 1:
                yield f"{name}={value}: it is a share, and must be below 1"
        if self.routed_scale == 0:
            yield "routed_scale=0: the experts would add nothing; 1 leaves the combine weights as they are"
        yield from self._choice_problems()
        yield from self._group_problems()
        yield from self._capacity_problems()
        yield from self._balance_problems()
        if self.activation == "swiglu_oai" and not self.gated:
            yield "activation=swiglu_oai with gated=False: it is a function of gate and up; set gated=True"
        if self.shared_mode != "added" and not self.shared_size:
            yield f"shared_mode={self.shared_mode} with shared_size=0: there is no shared expert; give its width"

    def _choice_problems(self) -> Iterator[str]:
        if self.score == "sigmoid" and self.router_order is not None:
            yield f"score=sigmoid with router_order={self.router_order}: sigmoid scores have no softmax to order"
        if self.choice == "token":
            if self.expert_choice:
                yield f"expert_choice={self.expert_choice} with choice=token: tokens choose top_k; leave it out"
            if self.top_k < 1:
                yield f"top_k={self.top_k}: it must be at least 1"
            if self.top_k > self.num_experts:
                yield f"top_k={self.top_k} > num_experts={self.num_experts}: a token cannot choose more than there are"
        else:
            yield from self._expert_choice_problems()
        if self.renormalize and self.top_k == 1:
            yield "renormalize with top_k=1: the one weight would always be 1, and the router would learn nothing"
        if self.renormalize and self.router_order == "topk-softmax" and not self.has_capacity:
            yield "renormalize with router_order=topk-softmax: without capacity the weights sum to 1 already"
        if self.noise != "normal" and not self.logit_noise:
            yield f"noise={self.noise} with logit_noise=0: there is no noise; give its scale"
        if self.logit_norm and self.num_experts == 1:
            yield f"logit_norm={self.logit_norm} with num_experts=1: one logit has no deviation"
        if self.logit_norm and self.z_loss:
            yield f"z_loss={self.z_loss} with logit_norm={self.logit_norm}: normalised logits cannot grow; use one"

    def _expert_choice_problems(self) -> Iterator[str]:
        if self.causal:
            yield "choice=expert with causal=True: experts would choose by later tokens; encoders set causal=False"
        if self.top_k:
            yield f"choice=expert with top_k={self.top_k}: experts choose; give expert_choice, the mean number"
        if not 0 < self.expert_choice <= self.num_experts:
            yield (
                f"choice=expert with expert_choice={self.expert_choice}: it must be above 0 and at most "
                f"num_experts={self.num_experts}"
            )
        if self.router_order == "topk-softmax":
            yield "choice=expert with router_order=topk-softmax: a token has no set of chosen experts; use softmax-topk"
        if self.has_capacity:
            yield "choice=expert with a capacity factor: each expert takes as many tokens as expert_choice says"
        if self.selection_bias or self.balance_loss:
            yield "choice=expert with selection_bias or balance_loss: the load is even by construction"
        if self.logit_noise:
            yield f"choice=expert with logit_noise={self.logit_noise}: it is noise on the choice of tokens"
        if self.num_groups > 1:
            yield f"choice=expert with num_groups={self.num_groups}: tokens do not choose"

    def _group_problems(self) -> Iterator[str]:
        E, K, groups = self.num_experts, self.top_k, self.num_groups
        if groups == 1:
            if self.top_groups != 1 or self.group_score != "max":
                given = f"top_groups={self.top_groups}, group_score={self.group_score}"
                yield f"{given} with num_groups=1: there are no groups"
            return
        if E % groups:
            yield f"num_groups={groups} with num_experts={E}: it must divide their number"
        if self.top_groups >= groups:
            yield f"top_groups={self.top_groups} of num_groups={groups}: choosing all limits nothing; leave both out"
        if self.top_groups * (E // groups) < K:
            yield f"top_k={K} with {self.top_groups} groups of {E // groups} experts: too few to choose from"
        if self.group_score == "top2" and E // groups < 2:
            yield f"group_score=top2 with groups of {E // groups} expert: each group needs two"

    def _capacity_problems(self) -> Iterator[str]:
        if self.drop_policy == "random" and not self.capacity_factor:
            yield "drop_policy=random without capacity_factor: it acts in training alone, where nothing is dropped"
        if not self.has_capacity and (self.drop_policy != "position" or self.first_choices_first):
            given = "first_choices_first" if self.first_choices_first else f"drop_policy={self.drop_policy}"
            yield f"{given} without capacity_factor or eval_capacity_factor: nothing is dropped"
        if not self.has_capacity and self.min_capacity != 4:
            yield f"min_capacity={self.min_capacity} without a capacity factor: nothing is dropped; leave it out"
        if self.first_choices_first and self.top_k == 1:
            yield "first_choices_first with top_k=1: there are only first choices"

    def _balance_problems(self) -> Iterator[str]:
        if self.bias_update_rate and not self.selection_bias:
            yield f"bias_update_rate={self.bias_update_rate} without selection_bias: there is no bias; set both"
        if self.balance_scope != "micro-batch" and not self.balance_loss:
            yield f"balance_scope={self.balance_scope} with balance_loss=0: there is no such loss; give its coefficient"
        if self.balance_adaptation and not (self.capacity_factor and self.balance_loss):
            yield "balance_adaptation without capacity_factor and balance_loss: it follows the dropped share from there"
        if self.max_balance_loss != 0.01 and not self.balance_adaptation:
            yield f"max_balance_loss={self.max_balance_loss} without balance_adaptation: it has no effect; leave it out"
        if self.z_loss and self.score == "sigmoid":
            yield f"z_loss={self.z_loss} with score=sigmoid: it bounds the softmax's normaliser, and there is none"

    @property
    def has_capacity(self) -> bool:
        """Whether an expert's tokens are limited, in training or evaluation."""
        return self.capacity_factor > 0 or self.eval_capacity_factor > 0

"""The rows that a router starts with.

Letters: T tokens, D model width, E experts, G granularity, M = E / G virtual groups, P prompts.

Each function makes one row for each virtual group, (M, D) in float32; `repeated` gives each of a group's experts its
row. Hidden states are the inputs of the router: those of the feed-forward block, behind the norm.

**How large rows should be.** Behind an RMS norm of weight 1 a token has length sqrt(D), so rows from N(0, std^2)
give logits of deviation std * sqrt(D). With N(0, 1), as mergekit's `random` gates are, that is 64 at D = 4096: the
softmax gives one expert all the weight, whatever K, and there its gradient vanishes, so that the router does not learn
out of it. 0.02 gives 1.3 there; 0.05 / sqrt(D) gives 0.05 whatever D. Rows that come from data are brought to such a
deviation with `with_logit_std`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moewright.errors import DataError, UsageError
from moewright.upcycle.cluster import balanced_clusters, unit_rows
from moewright.upcycle.config import FROM_DATA, UpcycleConfig
from moewright.upcycle.seeds import generator

SAME = 1e-4
"""Rows nearer to each other than this times their length are one row to bfloat16, and to us."""


def start_router(
    config: UpcycleConfig, rows_MD: Tensor | None, *, hidden_size: int, layer: int, dtype: torch.dtype
) -> Tensor:
    """A layer's router at the start for a resolved config, (E, D) in `dtype`: of the rows measured, or else drawn.

    Each group's row is repeated for each of its experts, so that their logits tie.
    """
    if rows_MD is None:
        rows_MD = drawn_rows(config, hidden_size=hidden_size, layer=layer)
    return repeated(rows_MD, granularity=config.tied, dtype=dtype)


def drawn_rows(config: UpcycleConfig, *, hidden_size: int, layer: int) -> Tensor:
    """The rows that a resolved config draws for a layer, (M, D): `normal`, `orthogonal`, or `zeros`."""
    assert config.router_start not in FROM_DATA, "rows from data are measured before the router is made"
    assert config.router_std is not None, "a resolved config"
    groups, seed, std = config.groups, config.seed, config.router_std
    if config.router_start == "zeros":
        return zero_rows(groups, hidden_size=hidden_size)
    if config.router_start == "orthogonal":
        return orthogonal_rows(groups, hidden_size=hidden_size, std=std, seed=seed, layer=layer)
    return normal_rows(groups, hidden_size=hidden_size, std=std, seed=seed, layer=layer)


def repeated(rows_MD: Tensor, *, granularity: int, dtype: torch.dtype) -> Tensor:
    """Each row G times, (M G, D) in `dtype`."""
    return rows_MD.to(dtype).repeat_interleave(granularity, dim=0)


def normal_rows(groups: int, *, hidden_size: int, std: float, seed: int, layer: int) -> Tensor:
    """Rows from N(0, std^2)."""
    return torch.randn(groups, hidden_size, generator=generator(seed, layer=layer)) * std


def zero_rows(groups: int, *, hidden_size: int) -> Tensor:
    """Zeros, for G = 1 alone (`UpcycleConfig` refuses them else).

    All logits of all tokens tie then, and `torch.topk` takes the same K experts for each token: which ones is an
    accident of its implementation (of eight, on our CPUs: 6, 5, 4, 7, not the first four), and the others get no token
    until a balance loss or a selection bias has moved rows apart. The output at step 0 is right, since with G = 1 all
    experts are equal. With G > 1 it is so only where those K happen to hold each shard equally often.
    """
    return torch.zeros(groups, hidden_size)


def orthogonal_rows(groups: int, *, hidden_size: int, std: float, seed: int, layer: int) -> Tensor:
    """Rows at right angles, each as long as one from N(0, std^2) is on average: std * sqrt(D).

    For Gaussian inputs logits are then independent, and of equal spread. `UsageError` for more groups than D.
    """
    if groups > hidden_size:
        raise UsageError(
            f"router_start=orthogonal with {groups} virtual groups of experts: at most {hidden_size} rows are at right "
            "angles in that width; use fewer groups, or normal rows"
        )
    rows_MD = torch.empty(groups, hidden_size)
    return nn.init.orthogonal_(rows_MD, gain=std * hidden_size**0.5, generator=generator(seed, layer=layer))


def centroid_rows(x_TD: Tensor, *, groups: int, seed: int, layer: int) -> Tensor:
    """Rows of length 1 towards the centroids of M balanced clusters of hidden states; not yet scaled.

    Clusters are of directions from the mean token. The last T mod M tokens are left out, so that clusters are equal.
    Raises `DataError` for fewer tokens than groups or tokens that do not differ.
    """
    assert groups > 1, "UpcycleConfig refuses a router without a choice"
    x_TD = x_TD[: len(x_TD) // groups * groups]
    if not len(x_TD):
        raise DataError(f"too few tokens to find {groups} clusters of them: give more text")
    mean_D = x_TD.float().mean(dim=0)
    directions_TD = unit_rows(x_TD.float() - mean_D)
    members = balanced_clusters(
        directions_TD, clusters=groups, generator=generator(seed, layer=layer, stream="centroids")
    )
    return contrasted(directions_TD[members].mean(dim=1), mean_D)


def prompt_rows(states: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rows of length 1 from prompts that say what each group is for; not yet scaled.

    `states[m]` has for each prompt of group m its hidden states, (T, D). A prompt counts as the mean of its tokens, a
    group as the mean of its prompts. This is the idea of mergekit-moe's `hidden_avg` gates (`hidden` takes the last
    token), which read the residual stream before the layer, and leave all that the groups have in common in.

    Raises `DataError` for a group without tokens and for groups whose prompts cannot be told apart.
    """
    for group, prompts in enumerate(states):
        if not prompts or not all(len(state_TD) for state_TD in prompts):
            raise DataError(f"no prompt, or an empty one, for router group {group}: each group needs some text")
    means_MD = torch.stack(
        [torch.stack([state_TD.float().mean(dim=0) for state_TD in prompts]).mean(dim=0) for prompts in states]
    )
    return contrasted(means_MD, means_MD.mean(dim=0))


def contrasted(means_MD: Tensor, mean_D: Tensor) -> Tensor:
    """The share of each mean that the others have not, as rows of length 1, at right angles to the mean token.

    Hidden states share a large part. As part of the rows it would add the same to all logits of a token, and as soon as
    rows get equal lengths, not even the same; and a row with a share along `mean_D` is liked, or not, by all tokens
    alike. Without both, each logit has the mean 0 over tokens of that mean, and no group starts as the favourite.

    Raises `DataError` where rows vanish or agree: their experts would tie, or be chosen at random.
    """
    rows_MD = means_MD - means_MD.mean(dim=0)
    axis_D = mean_D / mean_D.norm() if mean_D.norm() > 0 else mean_D
    rows_MD = rows_MD - (rows_MD @ axis_D)[:, None] * axis_D
    vanished_M = rows_MD.norm(dim=1) <= SAME * means_MD.norm(dim=1).max()
    if vanished_M.any():
        raise DataError(
            f"router group {int(vanished_M.int().argmax())} is no different from the mean of all groups: give the "
            "groups prompts, or text, that differ more"
        )
    rows_MD = unit_rows(rows_MD)
    alike_MM = (torch.cdist(rows_MD, rows_MD) <= SAME).triu(diagonal=1)
    if alike_MM.any():
        a, b = alike_MM.nonzero()[0].tolist()
        raise DataError(
            f"router groups {a} and {b} are the same: give them prompts, or text, that differ; experts that are meant "
            "to share a row belong to one group"
        )
    return rows_MD


def with_logit_std(rows_MD: Tensor, x_TD: Tensor, *, std: float) -> Tensor:
    """Rows times the one number that gives the logits of these hidden states the deviation `std` over groups.

    It is the root of the mean over tokens of the variance over the M groups (over M - 1), as the softmax sees it. Rows
    from N(0, s^2) have s * sqrt(D) for tokens of length sqrt(D). Computed in float32, or float64 for such rows.

    Raises `DataError` if no logits differ.
    """
    logits_TM = x_TD.to(rows_MD.dtype) @ rows_MD.t()
    std_now = float(logits_TM.var(dim=1, correction=1).mean().sqrt())
    if not 0.0 < std_now < float("inf"):
        raise DataError(f"router logits on the text given have a deviation of {std_now}: give text like that of use")
    return rows_MD * (std / std_now)

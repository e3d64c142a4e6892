"""Balanced k-means: clusters of equal size.

Letters: N points, A features, C clusters, F points a cluster (N = C * F).
"""

import torch
from torch import Tensor

ITERATIONS = 30
SWEEPS = 20


def balanced_clusters(x_NA: Tensor, *, clusters: int, generator: torch.Generator) -> Tensor:
    """Points put into clusters of equal size, near to each other: int64 (C, F), each row ascending.

    k-means (Lloyd) from k-means++ seeds, with the assignment under equal sizes: no exchange of points between two
    clusters makes the sum of squared distances to the centroids smaller (the best assignment for two clusters; for
    more, an exchange around three or more might). Arithmetic in float32, or in float64 for such points; the same points
    and generator give the same clusters. An iteration costs O(N A C) and C sorts of N numbers.
    """
    C = clusters
    assert len(x_NA) % C == 0, "points that cannot be dealt out evenly"
    x_NA = x_NA.to(torch.promote_types(x_NA.dtype, torch.float32))
    centroids_CA = _seeds(x_NA, C, generator)
    # Points in the order of their nearest centroid, cut evenly: wrong at the cuts, which the exchanges mend.
    nearest_N = _costs(x_NA, centroids_CA).argmin(dim=1)
    members_CF = _exchanged(nearest_N.argsort(stable=True).view(C, -1), _costs(x_NA, centroids_CA))
    for _ in range(ITERATIONS):
        before_CF = members_CF
        members_CF = _exchanged(before_CF, _costs(x_NA, x_NA[before_CF].mean(dim=1)))
        if torch.equal(members_CF, before_CF):
            break
    return members_CF


def unit_rows(x_NA: Tensor) -> Tensor:
    """Rows of length 1, float32 or wider; a row of zeros stays one. Distances then compare directions alone."""
    x_NA = x_NA.to(torch.promote_types(x_NA.dtype, torch.float32))
    length_N1 = x_NA.norm(dim=1, keepdim=True)
    return x_NA / torch.where(length_N1 > 0, length_N1, 1)


def activation_features(hidden_TN: Tensor) -> Tensor:
    """Features for clustering neurons, from their activations on T tokens: (N, T), near for those active together.

    `hidden_TN` are the inputs of the down projection. Their sign does not tell when a neuron is active (a column of
    down may as well have the other), so their magnitude counts; its scale does not, since rows get length 1.
    """
    return unit_rows(hidden_TN.abs().t())


def _seeds(x_NA: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next seed with probability of its squared distance."""
    chosen = [int(torch.randint(len(x_NA), (1,), generator=generator))]
    distance_N = torch.full((len(x_NA),), torch.inf, dtype=torch.float64)
    for _ in range(clusters - 1):
        distance_N = distance_N.minimum((x_NA - x_NA[chosen[-1]]).square().sum(dim=1, dtype=torch.float64))
        # Fewer different points than clusters: any will do.
        weights_N = distance_N if distance_N.sum() > 0 else torch.ones_like(distance_N)
        chosen.append(int(torch.multinomial(weights_N, 1, generator=generator)))
    return x_NA[chosen]


def _costs(x_NA: Tensor, centroids_CA: Tensor) -> Tensor:
    """Squared distances (N, C), but for a number for each point that is the same for all clusters."""
    return centroids_CA.square().sum(dim=1) - 2 * x_NA @ centroids_CA.t()


def _exchanged(members_CF: Tensor, costs_NC: Tensor) -> Tensor:
    """Members after exchanges between all pairs of clusters, until none gains or for at most 20 rounds."""
    for _ in range(SWEEPS):
        before_CF = members_CF
        for left_P, right_P in _rounds(len(members_CF)):
            pool_PM = torch.cat((members_CF[left_P], members_CF[right_P]), dim=1)
            # Points that gain most by being left go left. Equal gains stay where they are, as the sort is stable.
            gain_PM = costs_NC[pool_PM, left_P[:, None]] - costs_NC[pool_PM, right_P[:, None]]
            sorted_PM = pool_PM.gather(1, gain_PM.argsort(dim=1, stable=True))
            members_CF = members_CF.clone()
            members_CF[left_P], members_CF[right_P] = sorted_PM.chunk(2, dim=1)
        members_CF = members_CF.sort(dim=1).values
        if torch.equal(members_CF, before_CF):
            break
    return members_CF


def _rounds(clusters: int) -> list[tuple[Tensor, Tensor]]:
    """All pairs of clusters, in rounds in which each cluster stands in one pair at most (a round-robin tournament)."""
    players = [*range(clusters), *([-1] if clusters % 2 else [])]
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [pair for pair in zip(players[:half], reversed(players[half:]), strict=True) if -1 not in pair]
        if pairs:
            rounds.append((torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds

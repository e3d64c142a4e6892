"""Which neurons each expert holds: complete, drawn for the layer alone, and as the papers deal them out."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moewright.errors import UsageError
from moewright.upcycle import neurons
from moewright.upcycle.cluster import activation_features, balanced_clusters, unit_rows
from moewright.upcycle.methods import take
from moewright.upcycle.observe import first_order
from tests.upcycling import complete


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def partition(kind: str, width: int, parts: int, seed: int = 0, layer: int = 0):
    if kind == "contiguous":
        return neurons.contiguous(width, parts=parts)
    if kind == "round-robin":
        return neurons.round_robin(width, parts=parts)
    if kind == "shuffled":
        return neurons.shuffled(width, parts=parts, seed=seed, layer=layer)
    features = torch.randn(width, 5, generator=draws(width))
    return neurons.clustered(features, parts=parts, seed=seed, layer=layer)


KINDS = ("contiguous", "round-robin", "shuffled", "clustered")


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    parts=st.integers(1, 7),
    size=st.integers(1, 9),
    copies=st.integers(1, 3),
    shared=st.integers(0, 5),
)
def test_every_virtual_group_holds_every_neuron_once(kind, parts, size, copies, shared):
    width = parts * size + shared
    shared_S, left_R = neurons.carve(width, size=shared) if shared else (None, torch.arange(width))
    table = neurons.virtual_groups(left_R[partition(kind, len(left_R), parts)], experts=parts * copies)
    assert table.dtype == torch.int64
    assert table.shape == (parts * copies, size)
    for group in range(copies):
        held = [] if shared_S is None else shared_S.tolist()
        for expert in range(group * parts, (group + 1) * parts):
            held += table[expert].tolist()
        assert sorted(held) == list(range(width))
    assert complete(table, granularity=parts, width=width, shared_S=shared_S)
    order = neurons.permuted(table, seed=1, layer=2)
    assert torch.equal(order.sort(dim=1).values, table.sort(dim=1).values)
    assert complete(order, granularity=parts, width=width, shared_S=shared_S)


def test_incomplete_tables_are_seen():
    table = neurons.virtual_groups(neurons.contiguous(12, parts=3), experts=6)
    twice, elsewhere = table.clone(), table.clone()
    twice[0, 0] = 1
    elsewhere[[0, 4]] = table[[4, 0]]  # each neuron as often as before, but not in each group
    for wrong in (twice, elsewhere, table[:, :3]):
        assert not complete(wrong, granularity=3, width=12)
    assert not complete(table, granularity=3, width=13)
    assert not complete(table, granularity=3, width=12, shared_S=torch.tensor([3]))


def test_contiguous_is_the_index_rule_of_virtual_groups():
    # Expert j holds shard j mod G: what upcycling has always done, to the byte and without a copy.
    gate, down = torch.randn(12, 5), torch.randn(5, 12)
    table = neurons.virtual_groups(neurons.contiguous(12, parts=3), experts=9)
    for j in range(9):
        assert table[j].tolist() == list(range(4 * (j % 3), 4 * (j % 3) + 4))
        for dense, part in ((gate, "gate"), (down, "down")):
            piece, due = take(dense, part, neurons_F=table[j]), dense.narrow(int(part == "down"), 4 * (j % 3), 4)
            assert torch.equal(piece, due)
            assert (piece.data_ptr(), piece.stride()) == (due.data_ptr(), due.stride())


def test_round_robin_deals_one_by_one():
    hands = [[] for _ in range(4)]
    for neuron in range(20):
        hands[neuron % 4].append(neuron)
    assert neurons.round_robin(20, parts=4).tolist() == hands


@pytest.mark.parametrize("kind", ["shuffled", "clustered", "permuted"])
def test_draws_depend_on_seed_and_layer_alone(kind):
    def table(seed, layer):
        torch.manual_seed(torch.initial_seed() + 1)  # the global generator plays no part
        if kind == "permuted":
            return neurons.permuted(neurons.contiguous(64, parts=4), seed=seed, layer=layer)
        return partition(kind, 64, 4, seed, layer)

    assert torch.equal(table(3, 5), table(3, 5))
    assert len({tuple(table(seed, layer).flatten().tolist()) for seed in range(3) for layer in range(3)}) == 9


def test_permuted_experts_have_orders_of_their_own():
    order = neurons.permuted(neurons.contiguous(64, parts=1).repeat(4, 1), seed=0, layer=0)
    assert len({tuple(row.tolist()) for row in order}) == 4


def test_carved_are_the_most_important_and_of_equals_the_first():
    importance = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 0.0])
    ranked = sorted(range(6), key=lambda j: (-importance[j].item(), j))
    for size in range(1, 6):
        shared_S, left_R = neurons.carve(6, size=size, importance_W=importance)
        assert shared_S.tolist() == sorted(ranked[:size])
        assert left_R.tolist() == sorted(ranked[size:])
    assert [part.tolist() for part in neurons.carve(6, size=2)] == [[0, 1], [2, 3, 4, 5]]


@settings(max_examples=60)
@given(data=st.data())
def test_split_by_importance_deals_as_moebert(data):
    experts = data.draw(st.integers(1, 5), label="experts")
    size = data.draw(st.integers(1, 8), label="size")
    shared = data.draw(st.integers(0, size), label="shared")
    width = experts * size
    importance = torch.tensor(data.draw(st.permutations(range(width)), label="importance"), dtype=torch.float32)
    ranked = sorted(range(width), key=lambda j: -importance[j].item())
    hands = [ranked[:shared] for _ in range(experts)]
    for place, neuron in enumerate(ranked[shared:]):
        hands[place % experts] = [*hands[place % experts], neuron]
    found = neurons.important(importance, experts=experts, shared=shared)
    assert found.tolist() == [hand[:size] for hand in hands]


def test_split_of_the_same_size_drops_the_least_important():
    importance = torch.randperm(48, generator=draws()).float()
    table = neurons.important(importance, experts=4, shared=5)
    assert table.shape == (4, 12)
    dropped = set(range(48)) - set(table.flatten().tolist())
    assert dropped == set(importance.argsort()[: 5 * 3].tolist())
    with pytest.raises(UsageError, match="common_neurons=13: an expert of width 12 holds 0 to 12"):
        neurons.important(importance, experts=4, shared=13)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (4, 4), (6, 3)])
@pytest.mark.parametrize("kind", ["groups", "split", "important", "shared by all"])
def test_neuron_factors_let_each_neuron_count_once(experts, top_k, kind):
    """Over all choices of K experts, each of weight 1/K, as far as K experts can."""
    width = 12
    table = {
        "groups": lambda: neurons.virtual_groups(neurons.contiguous(width, parts=2), experts=experts),
        "split": lambda: neurons.round_robin(width, parts=experts),
        "important": lambda: neurons.important(torch.arange(12.0), experts=experts, shared=1),
        "shared by all": lambda: torch.arange(width).repeat(experts, 1),
    }[kind]()
    factors = neurons.neuron_factors(table, width=width, top_k=top_k)
    choices = list(itertools.combinations(range(experts), top_k))
    for neuron in set(table.flatten().tolist()):
        holders = {e: f for e in range(experts) for f in range(table.shape[1]) if table[e, f] == neuron}
        counted = [sum(factors[e, holders[e]].item() / top_k for e in chosen if e in holders) for chosen in choices]
        if experts / len(holders) <= top_k:
            assert sum(counted) / len(choices) == pytest.approx(1.0)
        else:  # too few experts are chosen: in full where one holder is
            assert {round(c, 12) for c in counted if c} >= {1.0}
            assert all(factors[e, f] == top_k for e, f in holders.items())
    if kind == "groups" and top_k % 2 == 0:
        assert torch.equal(factors, torch.full_like(factors, 2.0))  # the exact scale S = G


# -- clusters --


def total(x, members) -> float:
    """Sum of squared distances to centroids, slowly."""
    cost = 0.0
    for row in members.tolist():
        centroid = sum(x[i] for i in row) / len(row)
        cost += sum(((x[i] - centroid) ** 2).sum().item() for i in row)
    return cost


def points(count, features=3, seed=0):
    return torch.randn(count, features, generator=draws(seed), dtype=torch.float64)


@settings(max_examples=40)
@given(clusters=st.integers(1, 7), size=st.integers(1, 8), seed=st.integers(0, 99))
def test_no_exchange_of_two_points_makes_balanced_clusters_better(clusters, size, seed):
    x = points(clusters * size, seed=seed)
    members = balanced_clusters(x, clusters=clusters, generator=draws(seed))
    assert members.shape == (clusters, size)
    assert sorted(members.flatten().tolist()) == list(range(clusters * size))
    assert torch.equal(members, members.sort(dim=1).values)
    centroids = torch.stack([x[row].mean(dim=0) for row in members])
    distance = ((x[:, None] - centroids) ** 2).sum(dim=2)
    for a, b in itertools.combinations(range(clusters), 2):
        for i, j in itertools.product(members[a].tolist(), members[b].tolist()):
            assert distance[i, b] + distance[j, a] >= distance[i, a] + distance[j, b] - 1e-12


@settings(max_examples=30)
@given(seed=st.integers(0, 999))
def test_two_clusters_are_the_best_for_their_centroids(seed):
    x = points(8, seed=seed)
    members = balanced_clusters(x, clusters=2, generator=draws(seed))
    centroids = [x[row].mean(dim=0) for row in members]

    def cost(left):
        return sum(((x[i] - centroids[0 if i in left else 1]) ** 2).sum().item() for i in range(8))

    best = min(cost(set(left)) for left in itertools.combinations(range(8), 4))
    assert cost(set(members[0].tolist())) <= best + 1e-12


def test_clusters_that_are_there_are_found():
    centres = 20 * points(6, features=12, seed=4)
    labels = torch.arange(6).repeat(10)[torch.randperm(60, generator=draws(5))]
    x = centres[labels] + points(60, features=12, seed=6)
    for seed in range(5):
        members = balanced_clusters(x, clusters=6, generator=draws(seed))
        assert all(len(set(labels[row].tolist())) == 1 for row in members)


def test_clusters_beat_chance():
    x = points(40, features=2)
    found = total(x, balanced_clusters(x, clusters=5, generator=draws()))
    chance = [total(x, torch.randperm(40, generator=draws(seed)).view(5, 8)) for seed in range(100)]
    assert found < 0.5 * min(chance)


def test_clusters_of_points_that_are_all_the_same():
    members = balanced_clusters(torch.ones(12, 3), clusters=4, generator=draws())
    assert sorted(members.flatten().tolist()) == list(range(12))


def test_activation_features_see_when_a_neuron_is_active_and_not_how_much():
    hidden = torch.randn(30, 4, generator=draws()).to(torch.bfloat16)
    hidden[:, 3] = 0
    features = activation_features(hidden)
    assert features.dtype == torch.float32
    for j in range(3):
        length = sum(h**2 for h in hidden[:, j].tolist()) ** 0.5
        assert features[j].tolist() == pytest.approx([abs(h) / length for h in hidden[:, j].tolist()], rel=1e-6)
    assert features[3].abs().max() == 0
    torch.testing.assert_close(activation_features(hidden * torch.tensor([-1, 2, -4, 1])), features)


def test_neurons_that_fire_together_share_an_expert():
    # Three topics of 20 tokens each wake 8 neurons each, with any sign and strength.
    topic = torch.arange(24)[torch.randperm(24, generator=draws(1))] % 3
    hidden = 0.05 * torch.randn(60, 24, generator=draws(2))
    for t in range(60):
        awake = topic == t // 20
        hidden[t, awake] = torch.randn(int(awake.sum()), generator=draws(100 + t)).sign() * (1 + topic[awake])
    found = neurons.clustered(activation_features(hidden), parts=3, seed=0, layer=0)
    assert all(len(set(topic[row].tolist())) == 1 for row in found)
    # By weights: the direction of a row counts, not its length.
    rows = torch.eye(3)[topic] * torch.rand(24, 1, generator=draws(3)) + 0.01
    found = neurons.clustered(unit_rows(rows), parts=3, seed=0, layer=0)
    assert all(len(set(topic[row].tolist())) == 1 for row in found)


# -- importance --


def batch_importance(weights, gradients):
    """|sum of weight times gradient| over all weights of a neuron, for one batch."""
    parts = [first_order(part, weight, gradients[part]) for part, weight in weights.items() if part != "down_bias"]
    return torch.stack(parts).sum(dim=0).abs()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_importance_is_that_of_each_batch(gated, bias):
    D, W = 3, 5
    shapes = {"up": (W, D), "down": (D, W)} | ({"gate": (W, D)} if gated else {})
    if bias:
        shapes |= {"up_bias": (W,), "down_bias": (D,)} | ({"gate_bias": (W,)} if gated else {})
    draw = draws(7)
    p = {k: torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for k, s in shapes.items()}
    zeros = dict.fromkeys(("gate_bias", "up_bias", "down_bias"), torch.zeros(()))
    batches = [torch.randn(4, D, generator=draw, dtype=torch.float64) for _ in range(3)]

    def loss(batch, mask):
        b = zeros | p
        hidden = batch @ p["up"].T + b["up_bias"]
        hidden = torch.nn.functional.silu(batch @ p["gate"].T + b["gate_bias"]) * hidden if gated else hidden.relu()
        return ((hidden * mask) @ p["down"].T + b["down_bias"]).tanh().sum()

    found = torch.zeros(W, dtype=torch.float64)
    for batch in batches:
        gradients = dict(zip(p, torch.autograd.grad(loss(batch, torch.ones(W)), list(p.values())), strict=True))
        found += batch_importance(p, gradients)
    # Slowly: the derivative along each neuron's own weights, all of them grown together.
    for j in range(W):
        due = 0.0
        for batch in batches:
            gradients = dict(zip(p, torch.autograd.grad(loss(batch, torch.ones(W)), list(p.values())), strict=True))
            score = 0.0
            for part, weight in p.items():
                if part != "down_bias":
                    row = (weight[:, j], gradients[part][:, j]) if part == "down" else (weight[j], gradients[part][j])
                    score += (row[0] * row[1]).sum().item()
            due += abs(score)
        assert found[j].item() == pytest.approx(due, rel=1e-12)
    # The share of down is the derivative by a mask on the neuron: what pruning calls its first-order importance.
    mask = torch.ones(W, dtype=torch.float64, requires_grad=True)
    (by_mask,) = torch.autograd.grad(loss(batches[0], mask), mask)
    (by_down,) = torch.autograd.grad(loss(batches[0], torch.ones(W)), p["down"])
    torch.testing.assert_close(batch_importance({"down": p["down"]}, {"down": by_down}), by_mask.abs())


def test_importance_of_16_bit_weights_is_added_up_in_more():
    weight, gradient = (torch.randn(2, 4096, generator=draws(i)).to(torch.bfloat16) for i in (1, 2))
    due = (weight.double() * gradient.double()).sum(dim=1).abs()
    torch.testing.assert_close(batch_importance({"up": weight}, {"up": gradient}), due, rtol=1e-6, atol=1e-6)
    tiny = {"up": torch.full((2, 4), 1e-5, dtype=torch.float16)}
    assert batch_importance(tiny, tiny).min() > 0  # 1e-10 is nothing in float16

"""What a step computes and sends, and an estimate of its time.

Letters: S tokens of a row, D model width, K experts a token, V vocabulary, n ranks of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moewright.parallel.config import Degrees
from moewright.plan.devices import Devices, Workload
from moewright.plan.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A step."""

    flops: float
    """Of all devices: of products, and of attention over what comes before each token."""
    sent: Mapping[str, float]
    """Bytes that a rank sends, by axis."""
    seconds: Mapping[str, float]
    """By what the time goes to."""

    @property
    def total(self) -> float:
        """Seconds of a step: what is said in docs/planner.md to overlap counts once."""
        return max(self.seconds["compute"], self.seconds["data"]) + sum(
            value for name, value in self.seconds.items() if name not in ("compute", "data")
        )


def flops(sizes: Sizes, work: Workload) -> float:
    """Of a step: twice for each parameter and token forward, four times backward, and what is computed again."""
    products = 2.0 * sizes.multiplied
    # Half of the row comes before a token, in the mean; scores and values are two products.
    attention = 2.0 * work.sequence_length * sizes.attention * sizes.layers
    chosen = sum(2.0 * _chosen(sizes, number) for number in range(len(sizes.sparse)))
    again = {"none": 0.0, "experts": chosen, "block": products + attention}[work.recompute]
    return work.tokens * (3 * (products + attention) + again)


def _chosen(sizes: Sizes, number: int) -> float:
    """Parameters of the experts that a token chooses in a sparse layer."""
    layer = sizes.sparse[number]
    return layer.top_k * layer.expert_size * layer.hidden_size * (3 if layer.gated else 2)


def sent(sizes: Sizes, degrees: Degrees, work: Workload) -> dict[str, float]:
    """Bytes that a rank sends in a step, by axis, with the algorithms that send least."""
    rows, count = work.share(degrees.ranks // degrees.tp)
    tokens, b, w = rows * work.sequence_length, work.dtype.itemsize, work.param_dtype.itemsize
    passes = 6 if work.recompute == "block" else 4  # there and back, forward and backward
    journeys = sum((layer.top_k or layer.expert_choice) * layer.hidden_size for layer in sizes.sparse)
    travel = degrees.ep * degrees.etp
    ep = passes * tokens / degrees.tp * degrees.etp * journeys * b * _others(travel) if travel > 1 else 0.0
    tp = 0.0
    if degrees.tp > 1:
        sums = 2 * (passes // 2) * sizes.layers * 2 * _others(degrees.tp)  # two a block and pass
        tp = tokens * b * (sums * sizes.hidden + sizes.vocabulary * _others(degrees.tp))
    data = _data(sizes.dense / degrees.tp * w, degrees.fsdp, degrees.dp_replicate, degrees.zero, count)
    data += _data(sizes.experts / travel * w, degrees.expert_fsdp, degrees.expert_replicate, degrees.zero, count)
    return {"ep": ep * count, "tp": tp * count, "data": data}


def _others(ranks: int) -> float:
    """The share that goes to other ranks."""
    return (ranks - 1) / ranks


def _data(size: float, shards: int, copies: int, zero: int, count: int) -> float:
    """Of parameters of `size` bytes on each rank before ZeRO: gathering them, and adding up their gradients."""
    gathers = {0: 0, 1: count, 2: count, 3: 2 * count}[zero]
    sums = count if zero >= 2 else 1
    shard = size / shards if zero else size
    return size * _others(shards) * (gathers + sums) * bool(zero) + 2 * shard * _others(copies) * sums


def speed(
    sizes: Sizes,
    degrees: Degrees,
    work: Workload,
    devices: Devices,
    *,
    outside: float,
    traffic: Mapping[str, float] | None = None,
) -> Speed:
    """The time of a step. `outside` are the bytes of a rank that lie in the host's memory or on its disk, `traffic`
    what a simulation counted in place of the formula."""
    total, by_axis = flops(sizes, work), dict(traffic or sent(sizes, degrees, work))
    travel = degrees.ep * degrees.etp
    slow = devices.disk_bandwidth if work.offload_to == "disk" else devices.host_bandwidth
    rows, count = work.share(degrees.ranks // degrees.tp)
    busiest = total * rows * count / work.rows / degrees.tp
    seconds = {
        "compute": busiest / (devices.flops * devices.efficiency),
        "data": by_axis["data"] / devices.bandwidth(degrees.ranks, neighbours=False),
        "ep": by_axis["ep"] / devices.bandwidth(travel, neighbours=True),
        "tp": by_axis["tp"] / devices.bandwidth(degrees.tp, neighbours=True),
        # Each byte outside is read and written once by the update; gradients go there, and weights come back.
        "offload": 2 * outside * devices.on_host / slow + _link(sizes, degrees, work) / devices.host_link,
    }
    return Speed(flops=total, sent=by_axis, seconds=seconds)


def _link(sizes: Sizes, degrees: Degrees, work: Workload) -> float:
    """Bytes between device and host in a step."""
    if work.offload == "none":
        return 0.0
    shards, expert_shards = (degrees.fsdp, degrees.expert_fsdp) if degrees.zero else (1, 1)
    dense = sizes.dense / degrees.tp / shards
    experts = sizes.experts / (degrees.ep * degrees.etp) / expert_shards
    held = experts if work.offload == "experts" else dense + experts
    count = work.share(degrees.ranks // degrees.tp)[1]
    times = 2 if work.offload == "optimizer" else 1 + 2 * count
    return held * work.param_dtype.itemsize * times

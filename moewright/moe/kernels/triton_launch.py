"""Sizes of tiles, and the launches of the Triton code.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, D model width, E experts, F expert
width, H width of the first product (2F when gated, else F), G tiles.

The sizes are measured: the first call with a new kind of problem times each candidate and keeps the fastest, in
this process only. Candidates may differ in the last bits of a result; with `torch.use_deterministic_algorithms(True)`,
and while a CUDA graph is captured, the first candidate that the device can hold is taken without measuring.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from moewright.moe.kernels import triton_code as code

INTERPRETED: Final = bool(code.INTERPRETED.value)
"""Whether the kernels run in Triton's interpreter."""

GROUP: Final = 8
"""Row tiles that go through the same columns of the weights before the next columns are read."""


class Tiles(NamedTuple):
    """How one product is cut into programs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False

    def constants(self) -> dict[str, Any]:
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "GROUP": GROUP}
        how = {"DESCRIPTORS": self.descriptors, "PRECISION": "ieee"}
        return sizes | how | {"num_warps": self.warps, "num_stages": self.stages}


# (rows, columns, depth, warps, stages), for products of 16-bit numbers. Beside the widest tile for 8 warps stands
# one of half its size for 4 warps, of which two fit on a multiprocessor, so that one writes while the other multiplies.
WIDE: Final = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4))
HIDDEN: Final = (Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3))
MIDDLE: Final = (Tiles(64, 128, 64, 4, 4), Tiles(64, 256, 64, 8, 3))
NARROW: Final = (Tiles(16, 128, 64, 4, 4), Tiles(16, 64, 128, 4, 4))
FULL_PRECISION: Final = (Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 16, 4, 3))
SMALL: Final = (Tiles(32, 32, 32, 4, 1), Tiles(32, 32, 32, 4, 1, descriptors=True))


def candidates(kind: str, dtype: torch.dtype, *, rows_per_expert: int, descriptors: bool) -> Sequence[Tiles]:
    """The sizes to try, the first one for use without measuring; columns are those of both halves of a gated product.

    `descriptors` says that the weights can be read through tensor descriptors.
    """
    if INTERPRETED:
        return SMALL if descriptors and kind != "outer" else SMALL[:1]
    if dtype == torch.float32:
        return FULL_PRECISION
    if kind == "outer":
        return WIDE
    if rows_per_expert >= 96:
        sizes: Sequence[Tiles] = HIDDEN if kind == "hidden" else WIDE
    else:
        sizes = MIDDLE if rows_per_expert >= 24 else NARROW
    return [*sizes, *(tiles._replace(descriptors=True) for tiles in sizes if descriptors)]


_fastest: dict[tuple[Any, ...], Tiles] = {}


def _run(launch: Callable[[Tiles], None], kind: str, sizes: tuple[int, ...], like: Tensor, weight: Tensor) -> None:
    """Launch with the fastest candidate for this kind of problem; `sizes` begins with the rows per expert."""
    bucket = 1 << max(sizes[0], 1).bit_length()
    key = (kind, like.dtype, like.device, bucket, *sizes[1:], weight.stride(), weight.data_ptr() % 16)
    if key not in _fastest:
        tried = candidates(kind, like.dtype, rows_per_expert=sizes[0], descriptors=_describable(weight))
        exact = torch.are_deterministic_algorithms_enabled()
        if INTERPRETED or exact or torch.cuda.is_current_stream_capturing():
            _first_that_fits(launch, tried)
            return
        times = {tiles: time for tiles in tried if (time := _milliseconds(launch, tiles)) is not None}
        _fastest[key] = min(times, key=times.__getitem__)
    launch(_fastest[key])


def _first_that_fits(launch: Callable[[Tiles], None], tried: Sequence[Tiles]) -> None:
    for tiles in tried[:-1]:
        try:
            return launch(tiles)
        except OutOfResources:
            continue
    return launch(tried[-1])


def _milliseconds(launch: Callable[[Tiles], None], tiles: Tiles) -> float | None:
    """The shortest of ten launches, or None where the device has not the shared memory or registers."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    try:
        launch(tiles)
    except OutOfResources:
        return None
    for event in events[:-1]:
        event.record()
        launch(tiles)
    events[-1].record()
    torch.cuda.synchronize()
    times: list[float] = [first.elapsed_time(second) for first, second in pairwise(events)]
    return min(times)


def _describable(weight: Tensor) -> bool:
    """Whether a tensor descriptor can read it: rows without gaps that begin at multiples of 16 bytes."""
    size = weight.element_size()
    aligned = weight.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in weight.stride()[:2])
    if INTERPRETED:
        return aligned and weight.stride(2) == 1
    hopper = weight.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(weight.device)[0] >= 9
    return hopper and aligned and weight.stride(2) == 1


def _read(weight: Tensor, tiles: Tiles, *, depth_last: bool, columns: int) -> Tensor | TensorDescriptor:
    """The weights as a kernel takes them."""
    if not tiles.descriptors:
        return weight
    block = [1, columns, tiles.depth] if depth_last else [1, tiles.depth, columns]
    return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), block)


class Routed:
    """Rows sorted by expert, and the launches over them. Results are allocated here, contiguous unless said so."""

    def __init__(self, token_N: Tensor, order_N: Tensor, position_N: Tensor, ends_E: Tensor, *, partial: bool) -> None:
        self.token_N, self.order_N, self.position_N, self.ends_E = token_N, order_N, position_N, ends_E
        self.partial = partial
        self._tiles: dict[int, Tensor] = {}

    @property
    def rows_per_expert(self) -> int:
        return len(self.order_N) // len(self.ends_E)

    def tiles(self, rows: int) -> Tensor:
        """(3, G): see `map_tiles`. No expert has more than one tile that is not full, so G is bounded by shapes."""
        if rows not in self._tiles:
            E = len(self.ends_E)
            G = len(self.order_N) // rows + E
            tiles_3G = self.ends_E.new_empty(3, G)
            experts, block = triton.next_power_of_2(E), 16
            code.map_tiles[(triton.cdiv(G, block),)](self.ends_E, tiles_3G, E, G, rows, experts, block)
            self._tiles[rows] = tiles_3G
        return self._tiles[rows]

    def first(
        self, x_TD: Tensor, weight_EHD: Tensor, bias_EH: Tensor | None, activation: str, *, gated: bool, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """The hidden states before (N, H; no rows unless `keep`) and after the activation (N, F)."""
        N, (_, H, D) = len(self.order_N), weight_EHD.shape
        F = H // 2 if gated else H
        h_NH, a_NF = x_TD.new_empty(N if keep else 0, H), x_TD.new_empty(N, F)

        def launch(tiles: Tiles) -> None:
            if gated and not INTERPRETED:
                tiles = tiles._replace(columns=tiles.columns // 2)
            tiles_3G = self.tiles(tiles.rows)
            G = tiles_3G.shape[1]
            code.first_product[(G * triton.cdiv(F, tiles.columns),)](
                x_TD, _read(weight_EHD, tiles, depth_last=True, columns=tiles.columns), bias_EH, self.token_N,
                tiles_3G, h_NH, a_NF, G, *weight_EHD.stride(),
                D=D, F=F, ACTIVATION=activation, GATED=gated, BIAS=bias_EH is not None, KEEP=keep,
                **tiles.constants(),
            )  # fmt: skip

        _run(launch, "first", (self.rows_per_expert, D, H, int(gated), int(keep)), x_TD, weight_EHD)
        return h_NH, a_NF

    def second(self, rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, weights_N: Tensor | None) -> Tensor:
        """`weight @ rows + bias`, times the slots' weights if given, in slot order: (N, O)."""
        return self._into_slots(rows_NI, weight_EOI, bias_EO, weights_N, depth_last=True)

    def transposed(self, rows_NI: Tensor, weight_EIO: Tensor) -> Tensor:
        """`weight.T @ rows` in slot order: (N, O)."""
        return self._into_slots(rows_NI, weight_EIO, None, None, depth_last=False)

    def _into_slots(
        self, rows_NI: Tensor, weight: Tensor, bias_EO: Tensor | None, weights_N: Tensor | None, *, depth_last: bool
    ) -> Tensor:
        out, depth = (1, 2) if depth_last else (2, 1)
        inner, outer = weight.shape[depth], weight.shape[out]
        slots_NO = rows_NI.new_empty(len(self.order_N), outer)

        def launch(tiles: Tiles) -> None:
            tiles_3G = self.tiles(tiles.rows)
            G = tiles_3G.shape[1]
            code.slot_product[(G * triton.cdiv(outer, tiles.columns),)](
                rows_NI, _read(weight, tiles, depth_last=depth_last, columns=tiles.columns), bias_EO, weights_N,
                self.order_N, tiles_3G, slots_NO, G, weight.stride(0), weight.stride(out), weight.stride(depth),
                INNER=inner, OUTER=outer, WEIGHTED=weights_N is not None, BIAS=bias_EO is not None,
                DEPTH_LAST=depth_last, **tiles.constants(),
            )  # fmt: skip

        _run(launch, "slots", (self.rows_per_expert, inner, outer, int(depth_last)), rows_NI, weight)
        return slots_NO

    def sum_choices(self, slots_ND: Tensor, tokens: int) -> Tensor:
        """Each token's sum over its slots, in float32 and in a fixed order: (T, D)."""
        N, D = slots_ND.shape
        y_TD = slots_ND.new_empty(tokens, D)
        columns = min(triton.next_power_of_2(D), 512)
        grid = (triton.cdiv(tokens, 4), triton.cdiv(D, columns))
        code.sum_choices[grid](
            slots_ND, self.position_N, self.ends_E, y_TD, tokens, D, len(self.ends_E),
            K=N // tokens, PARTIAL=self.partial, TOKENS=4, COLUMNS=columns,
        )  # fmt: skip
        return y_TD

    def hidden_gradient(
        self,
        dy_TD: Tensor,
        weight_EDF: Tensor,
        bias_ED: Tensor | None,
        h_NH: Tensor,
        weights_N: Tensor,
        activation: str,
        *,
        gated: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the hidden states (N, H), weighted activations (N, F), gradient of the slots' weights (N)."""
        N, (_, D, F) = len(self.order_N), weight_EDF.shape
        dh_NH, aw_NF, dots_NB = torch.empty_like(h_NH), h_NH.new_empty(N, F), weights_N

        def launch(tiles: Tiles) -> None:
            nonlocal dots_NB
            tiles_3G = self.tiles(tiles.rows)
            G, blocks = tiles_3G.shape[1], triton.cdiv(F, tiles.columns)
            # Slots of no expert are never written.
            dots_NB = (weights_N.new_zeros if self.partial else weights_N.new_empty)(N, blocks)
            code.hidden_gradient[(G * blocks,)](
                dy_TD, _read(weight_EDF, tiles, depth_last=False, columns=tiles.columns), bias_ED, h_NH, weights_N,
                self.token_N, self.order_N, tiles_3G, dh_NH, aw_NF, dots_NB, G, *weight_EDF.stride(),
                D=D, F=F, ACTIVATION=activation, GATED=gated, BIAS=bias_ED is not None,
                **tiles.constants(),
            )  # fmt: skip

        _run(launch, "hidden", (self.rows_per_expert, D, F, int(gated)), dy_TD, weight_EDF)
        return dh_NH, aw_NF, dots_NB.sum(dim=1)

    def outer(
        self,
        a: Tensor,
        b: Tensor,
        like_EPQ: Tensor,
        bias_like_EP: Tensor | None,
        weights_N: Tensor | None = None,
        *,
        gathered: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Per expert `a.T @ b` over its rows, strided as `like_EPQ`, and the (weighted) sum of a's rows (E, P).

        `gathered` is "a" or "b": the one that has a row for each token rather than for each assignment.
        """
        E, P, Q = like_EPQ.shape
        outer_EPQ = torch.empty_like(like_EPQ)
        bias_EP = None if bias_like_EP is None else bias_like_EP.new_empty(E, P)

        def launch(tiles: Tiles) -> None:
            constants = tiles.constants()
            del constants["DESCRIPTORS"]
            code.outer_product[(E * triton.cdiv(P, tiles.rows) * triton.cdiv(Q, tiles.columns),)](
                a, b, self.token_N, self.order_N, weights_N, self.ends_E, outer_EPQ, bias_EP, *outer_EPQ.stride(),
                P=P, Q=Q, GATHER_A=gathered == "a", GATHER_B=gathered == "b", BIAS=bias_EP is not None,
                WEIGHTED=weights_N is not None, **constants,
            )  # fmt: skip

        _run(launch, "outer", (self.rows_per_expert, P, Q, int(gathered == "a")), a, outer_EPQ)
        return outer_EPQ, bias_EP

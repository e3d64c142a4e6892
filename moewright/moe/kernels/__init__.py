"""Expert kernels by name; `loop` is the plainest, and the oracle of all others."""

import logging
from functools import lru_cache
from typing import Final

import torch

from moewright.errors import UsageError
from moewright.moe.experts import Kernel
from moewright.moe.kernels import build
from moewright.moe.kernels.grouped import grouped
from moewright.moe.kernels.loop import loop
from moewright.moe.kernels.native import native
from moewright.moe.kernels.triton import require_triton, triton

_log = logging.getLogger("moewright")

KERNELS: Final[dict[str, Kernel]] = {
    "grouped": grouped,
    "loop": loop,
    "native": native,
    "triton": triton,
}


def kernel_named(name: str) -> Kernel:
    """The kernel of that name; `UsageError` lists the names there are, or the package that must be installed."""
    if name not in KERNELS:
        raise UsageError(f"kernel={name!r}: choose one of {', '.join(sorted(KERNELS))}")
    if name == "triton":
        require_triton()
    return KERNELS[name]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def default_kernel(device: torch.device) -> str:
    """The kernel that `auto` stands for on a device.

    On a CPU the fastest of `benchmarks/moe_layer.py`, if it can be compiled; elsewhere torch's grouped product, since
    the others have not been measured there.
    """
    if device.type == "cpu":
        return "grouped" if _native_problem() else "native"
    return "grouped"


@lru_cache
def _native_problem() -> str | None:
    reason = build.problem()
    if reason is not None:
        _log.warning("the CPU kernel 'native' cannot be compiled (%s): 'grouped' is used, which is slower", reason)
    return reason

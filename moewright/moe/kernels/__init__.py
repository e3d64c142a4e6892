"""Expert products by name.

A kernel multiplies each expert's rows with that expert's matrix:
`product(x_NI, weight_EOI, ends_E) -> y_NO`, where rows `ends_E[e-1]:ends_E[e]` of `x_NI` belong to
expert e and `y[n] = weight[e] @ x[n]`. `loop` says it in the plainest way and is the oracle of all others.
"""

from collections.abc import Callable
from typing import Final

from torch import Tensor

from moewright.errors import UsageError
from moewright.moe.kernels.grouped import grouped_product
from moewright.moe.kernels.loop import loop_product

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNELS: Final[dict[str, Kernel]] = {"grouped": grouped_product, "loop": loop_product}


def kernel_named(name: str) -> Kernel:
    """The kernel of that name; `UsageError` lists the names there are."""
    if name not in KERNELS:
        raise UsageError(f"kernel={name!r}: choose one of {', '.join(sorted(KERNELS))}")
    return KERNELS[name]

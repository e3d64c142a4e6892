"""Compile the Triton kernels for Hopper, which needs no GPU: `python -m tests.compile_triton [--all]`.

Prints one JSON object for each kernel and each size of tiles: registers a thread, bytes a thread spills to local
memory, shared memory, whether the product is Hopper's own (wgmma), and how operands arrive. Must run in a process where
TRITON_INTERPRET is not set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moewright.moe.kernels import triton_code as code
from moewright.moe.kernels.triton_launch import Tiles, candidates

HOPPER = GPUTarget("cuda", 90, 32)
D, F = 512, 1408

Case = tuple[str, Any, Tiles, dict[str, str], dict[str, Any]]
"""Name, kernel, tiles, types of the arguments ("" for all others), constants."""


def cases(
    rows_per_expert: int,
    *,
    gated: bool = True,
    bias: bool = False,
    activation: str = "silu",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Case]:
    """All kernels that a layer runs, at each size it may choose."""
    H = 2 * F if gated else F
    kind = {"ACTIVATION": activation, "GATED": gated, "BIAS": bias, "D": D, "F": F}
    routing = {"token_N": "*i64", "order_N": "*i64", "weights_N": "*fp32", "tiles_3G": "*i32", "ends_E": "*i32"}
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {
        "": element,
        "G": "i32",
        "T": "i32",
        "D": "i32",
        "E": "i32",
        "dots_NB": "*fp32",
        "position_N": "*i64",
    } | routing

    def sizes(which: str) -> Iterator[Tiles]:
        yield from candidates(which, dtype, rows_per_expert=rows_per_expert, descriptors=True)

    for tiles in sizes("first"):
        if gated:
            tiles = tiles._replace(columns=tiles.columns // 2)
        weight = described("w_EHD", tiles, depth_last=True)
        yield "first_product", code.first_product, tiles, types | weight, kind | {"KEEP": True, "stride_d": 1}
    for tiles in sizes("slots"):
        slot = {"INNER": F, "OUTER": D, "WEIGHTED": True, "BIAS": bias, "DEPTH_LAST": True, "stride_i": 1}
        yield "slot_product", code.slot_product, tiles, types | described("w_EOI", tiles, depth_last=True), slot
        slot = {"INNER": H, "OUTER": D, "WEIGHTED": False, "BIAS": False, "DEPTH_LAST": False, "stride_o": 1}
        weight = described("w_EOI", tiles, depth_last=False)
        yield "slot_product.T", code.slot_product, tiles, types | weight, slot
    for tiles in sizes("hidden"):
        weight = described("w_EDF", tiles, depth_last=False)
        yield "hidden_gradient", code.hidden_gradient, tiles, types | weight, kind | {"stride_f": 1}
    for tiles in sizes("outer"):
        outer = {"GATHER_A": False, "GATHER_B": True, "BIAS": bias, "WEIGHTED": False, "P": H, "Q": D, "stride_q": 1}
        yield "outer_product.first", code.outer_product, tiles, types, outer
        outer |= {"GATHER_A": True, "GATHER_B": False, "WEIGHTED": bias, "P": D, "Q": F}
        yield "outer_product.down", code.outer_product, tiles, types, outer
    memory_bound = Tiles(128, 512, 0, 4, 3)
    choices = {"K": 8, "PARTIAL": True, "TOKENS": 4, "COLUMNS": 512}
    yield "sum_choices", code.sum_choices, memory_bound, types, choices
    yield "map_tiles", code.map_tiles, memory_bound, types, {"EXPERTS": 512, "BLOCK": 16}


def described(name: str, tiles: Tiles, *, depth_last: bool) -> dict[str, str]:
    """The type of a weight that is read through a tensor descriptor."""
    block = (1, tiles.columns, tiles.depth) if depth_last else (1, tiles.depth, tiles.columns)
    return {name: f"tensordesc<bf16[{', '.join(map(str, block))}]>"} if tiles.descriptors else {}


def compiled(kernel: Any, tiles: Tiles, types: dict[str, str], constants: dict[str, Any]) -> Any:
    """Compile as for a call whose pointers and strides are multiples of 16, like those of any usual width."""
    fixed = {name: value for name, value in (tiles.constants() | constants).items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = "i32" if name.startswith("stride") else types.get(name, types[""])
        signature[name] = "constexpr" if name in fixed else kind
        if name not in fixed and (kind.startswith("*") or name.startswith("stride")):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=HOPPER, options={"num_warps": tiles.warps, "num_stages": tiles.stages})


def usage(binary: Any) -> dict[str, Any]:
    """What a compiled kernel takes of a multiprocessor, as the assembler's own tool reads it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    figures = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert figures, text
    ptx = binary.asm["ptx"]
    return {
        "registers": int(figures[1]),
        "spilled_bytes": int(figures[2]),
        "shared_bytes": binary.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "copies": [name for name in ("cp.async.cg", "cp.async.bulk.tensor") if name in ptx],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every size for every load and dtype, not one size")
    everything = parser.parse_args().all
    seen = set()
    problems: list[dict[str, Any]] = [{"rows_per_expert": 1024}]
    if everything:
        problems += [{"rows_per_expert": 64}, {"rows_per_expert": 8}]
        problems += [{"rows_per_expert": 1024, "gated": False, "bias": True, "activation": "gelu"}]
        problems += [{"rows_per_expert": 1024, "bias": True, "activation": "swiglu_oai"}]
        problems += [{"rows_per_expert": 1024, "dtype": torch.float32}]
    for problem in problems:
        for name, kernel, tiles, types, constants in cases(**problem):
            if not everything and name in seen:
                continue
            seen.add(name)
            result = usage(compiled(kernel, tiles, types, constants))
            about = {key: str(value) for key, value in problem.items()}
            sys.stdout.write(json.dumps({"kernel": name, **about, **tiles._asdict(), **result}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

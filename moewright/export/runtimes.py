"""The table of runtimes of one model: whether each computes a written folder as we do, and why not.

transformers is run by `verify`, and by our tests for each format; what vLLM, SGLang and llama.cpp do was read in their
source, and each format's own file says it.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.base import Format
from moewright.backbone.formats.own import OWN_TYPE
from moewright.backbone.formats.runtimes import LLAMA_CPP, SGLANG, VLLM

SOURCE_READ: Final = "its source was read, it was not run"


@dataclass(frozen=True)
class Runtime:
    """Whether one runtime computes a folder as we do."""

    runtime: str
    loads: str
    """yes, no, or unknown."""
    why: str
    evidence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def runtimes(written_as: Format, model: PreTrainedModel) -> list[Runtime]:
    """The rows for a sparse model in a format, but for transformers, which is run."""
    moe = next(iter(moe_layers(model).values())).config
    rows = []
    for runtime in (VLLM, SGLANG, LLAMA_CPP):
        verdict = written_as.runtimes[runtime](model.config, moe)
        evidence = "none" if verdict.loads == "unknown" else SOURCE_READ
        rows.append(Runtime(runtime, verdict.loads, verdict.why, evidence))
    return rows


def expected_runtimes(written_as: Format, model: PreTrainedModel) -> list[Runtime]:
    """The rows for a model that is not written yet, transformers' first."""
    tested = "each layout is tested; export tests this model"
    if written_as.faulty:
        first = Runtime("transformers 5", "no", "its code mixes experts up", tested)
    else:
        why = "after import moewright.auto" if written_as is OWN_TYPE else ""
        first = Runtime("transformers 5", "yes", why, tested)
    return [first, *runtimes(written_as, model)]

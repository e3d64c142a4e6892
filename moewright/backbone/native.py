"""Our own model type, `moewright`, in transformers' automatic classes.

    import moewright.auto
    model = AutoModelForCausalLM.from_pretrained(folder)  # or AutoModelForSeq2SeqLM

What comes back is what `load_model` gives: the transformers class of the backbone, with MoELayers grafted in. The
folder is read by us, so nothing in it is run or trusted more than elsewhere.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from moewright.backbone.folder import dtype_named, load_model
from moewright.backbone.formats import OWN, read_sparse
from moewright.backbone.graft import graft, moe_layers
from moewright.backbone.skeleton import empty_model, materialise
from moewright.errors import UsageError
from moewright.moe.layer import MoELayer

PASSED_ON: Final = ("_from_auto", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision",
                    "subfolder", "code_revision", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors",
                    "_commit_hash", "trust_remote_code")  # fmt: skip
"""Arguments that the automatic classes hand on, and that say nothing where the folder is on disk and safetensors."""


class MoewrightConfig(PreTrainedConfig):
    """`config.json` of our own type: `backbone`, the fields of a dense config, and `sparse_layers`."""

    model_type = OWN

    def __init__(self, backbone: Any = None, sparse_layers: Any = None, **rest: Any) -> None:
        self.backbone, self.sparse_layers = backbone, sparse_layers
        super().__init__(**rest)


class MoewrightForCausalLM(PreTrainedModel):
    """What the automatic classes call; it has no instances."""

    config_class = MoewrightConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """`load_model`, with `dtype` (or `torch_dtype`), `device_map` as one device, and `attn_implementation`.

        Raises `UsageError` for what is not a folder on disk, and for other arguments.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; a model of type {OWN} is loaded from disk, download it first")
        config = kwargs.pop("config", None)
        dtype, device = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)), kwargs.pop("device_map", None)
        attention = kwargs.pop("attn_implementation", getattr(config, "_attn_implementation_internal", None))
        unknown = sorted(name for name, value in kwargs.items() if name not in PASSED_ON and value is not None)
        if args or unknown:
            raise UsageError(f"a model of type {OWN} is loaded without {', '.join(unknown) or 'positional arguments'}")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else dtype_named(dtype.removeprefix("torch."))
        model = load_model(path, dtype=dtype)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model if device is None else nn.Module.to(model, _one_device(device))

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model of this config with random weights."""
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.float32
        _, backbone, layers = read_sparse(config.to_dict(), record={}, tied=False)
        model = empty_model(backbone, dtype=dtype)
        graft(model, layers)
        materialise(model)
        model.apply(model._init_weights)
        for moe in moe_layers(model).values():  # which transformers knows nothing of
            moe.load_state_dict(MoELayer(moe.config, dtype=dtype).state_dict())
        return model


class MoewrightForConditionalGeneration(MoewrightForCausalLM):
    """The same for an encoder-decoder."""


def _one_device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device_map, str | int | torch.device):
        raise UsageError(f"device_map={device_map!r}: a model of type {OWN} is put on one device; name it, or auto")
    return torch.device(device_map)


def register() -> None:
    """Teach transformers' automatic classes our type."""
    AutoConfig.register(OWN, MoewrightConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoewrightConfig, MoewrightForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MoewrightConfig, MoewrightForConditionalGeneration, exist_ok=True)

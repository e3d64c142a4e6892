"""Our own model type, `moewright`, in transformers' automatic classes.

    import moewright.auto
    model = AutoModelForCausalLM.from_pretrained(folder)  # or AutoModelForSeq2SeqLM, AutoModel

The result is that of `load_model`: the transformers class of the backbone, with MoELayers grafted in. The
folder is read by us, so nothing in it is run or trusted more than elsewhere.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.backbone.formats.own import OWN_TYPE
from moewright.backbone.graft import graft
from moewright.backbone.load import dtype_named, load_model
from moewright.errors import UsageError
from moewright.family.table import FAMILIES

MODEL_TYPE: Final = OWN_TYPE.name
PASSED_ON: Final = ("_from_auto", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision",
                    "subfolder", "code_revision", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors",
                    "_commit_hash", "trust_remote_code", "weights_only")  # fmt: skip
"""Arguments that the automatic classes hand on, and that have no meaning for safetensors in a folder on disk."""

OF_THE_FILE: Final = ("architectures", "dtype", "is_encoder_decoder", "model_type", "transformers_version",
                      "_name_or_path")  # fmt: skip
"""Fields of our config that are not settings of the model, or may differ."""
NAMED_BY_BOTH: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""Settings of generation that belong in a model's config, too."""


class MoewrightConfig(PreTrainedConfig):
    """`config.json` of our own type: `backbone`, the fields of a dense config, and `sparse_layers`."""

    model_type = MODEL_TYPE

    def __init__(self, backbone: Any = None, sparse_layers: Any = None, **rest: Any) -> None:
        super().__init__(**rest)
        # Only now: before, transformers would find the backbone's fields here, and make them our own.
        self.backbone, self.sparse_layers = backbone, sparse_layers

    def __getattr__(self, name: str) -> Any:
        """A field of `backbone` that has no place here, by the names that the backbone's own config knows."""
        backbone: Any = self.__dict__.get("backbone")
        model_type = backbone.get("model_type") if isinstance(backbone, dict) else None
        if isinstance(model_type, str) and model_type in FAMILIES and not name.startswith("_"):
            config_class = CONFIG_MAPPING[model_type]
            known = config_class.attribute_map.get(name, name)
            # Nothing else that a file may have there, and nothing for which transformers would refuse to save us.
            generates = hasattr(GenerationConfig(), known) and known not in NAMED_BY_BOTH
            if known in backbone and known in config_class().to_dict() and not generates:
                return backbone[known]
        raise AttributeError(f"a {type(self).__name__} has no {name}, and neither has its backbone")


class MoewrightForCausalLM(PreTrainedModel):
    """The class that the automatic classes call; it has no instances."""

    config_class = MoewrightConfig
    seq2seq: bool | None = False
    """Whether its models have an encoder and a decoder; None where any will do."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """`load_model`, with `dtype` (or `torch_dtype`), `device_map` as one device, and `attn_implementation`.

        Raises `UsageError` for what is not a folder on disk, for other arguments and other changes of its `config`, and
        for a model of the other kind (causal, encoder-decoder).
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; a {MODEL_TYPE} model is loaded from disk, download it first")
        if args:
            raise UsageError(f"a {MODEL_TYPE} model is loaded without positional arguments")
        plain = MoewrightConfig.from_pretrained(path)
        config = kwargs.pop("config", None) or plain
        if not isinstance(config, MoewrightConfig):
            raise UsageError(f"config is a {type(config).__name__}; a {MODEL_TYPE} folder takes a MoewrightConfig")
        device = kwargs.pop("device_map", None)
        attention = kwargs.pop("attn_implementation", config._attn_implementation_internal)
        dtype = _dtype_of(config, kwargs)
        _refuse_kind(config, seq2seq=cls.seq2seq)
        _refuse_changes(config, plain, kwargs)
        model = load_model(path, dtype=dtype)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model if device is None else nn.Module.to(model, _one_device(device))

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model of this config with random weights."""
        attention = kwargs.pop("attn_implementation", config._attn_implementation_internal)
        dtype = _dtype_of(config, kwargs) or torch.float32
        _refuse_kind(config, seq2seq=cls.seq2seq)
        plain = MoewrightConfig(backbone=config.backbone, sparse_layers=config.sparse_layers)
        _refuse_changes(config, plain, kwargs)
        backbone, layers = OWN_TYPE.read(config.to_dict(), record={}, tied=False)
        auto: Any = AutoModelForSeq2SeqLM if FAMILIES[backbone.model_type].seq2seq else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(backbone, dtype=dtype)
        graft(model, layers)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model


class MoewrightForConditionalGeneration(MoewrightForCausalLM):
    """The same for an encoder-decoder."""

    seq2seq = True


class MoewrightModel(MoewrightForCausalLM):
    """The same without a head: returns the whole model's `base_model`, which cannot save itself."""

    seq2seq = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        return _headless(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _headless(super()._from_config(config, **kwargs))


def _headless(model: PreTrainedModel) -> PreTrainedModel:
    base = model.base_model
    if base is model:
        raise UsageError(
            f"AutoModel: a {model.config.model_type} model has no part that is all but its head; "
            "use AutoModelForSeq2SeqLM, and its get_encoder()"
        )
    assert isinstance(base, PreTrainedModel)
    return base


def _refuse_kind(config: MoewrightConfig, *, seq2seq: bool | None) -> None:
    """`UsageError` where a causal language model is asked for and an encoder-decoder is there, or the other way."""
    model_type = config.backbone.get("model_type") if isinstance(config.backbone, dict) else None
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None  # an unknown type is refused on reading
    if family is not None and seq2seq is not None and family.seq2seq != seq2seq:
        auto = "AutoModelForSeq2SeqLM" if family.seq2seq else "AutoModelForCausalLM"
        raise UsageError(f"this {MODEL_TYPE} model is on {model_type}: load it with {auto}")


def _dtype_of(config: MoewrightConfig, arguments: dict[str, Any]) -> torch.dtype | None:
    """The dtype that the arguments, or else the config, ask for; None for the folder's own."""
    dtype = arguments.pop("dtype", arguments.pop("torch_dtype", None)) or config.dtype
    if isinstance(dtype, str):
        return None if dtype == "auto" else dtype_named(dtype.removeprefix("torch."))
    return dtype


def _refuse_changes(config: MoewrightConfig, plain: MoewrightConfig, arguments: dict[str, Any]) -> None:
    """`UsageError` for other arguments, and for what differs between `config` and `plain`."""
    said, before = config.to_dict(), plain.to_dict()
    changes = [name for name in said if name not in OF_THE_FILE and said[name] != before.get(name, ...)]
    changes += ["experts_implementation"] if config._experts_implementation_internal is not None else []
    # None, or a switch of transformers that is off, changes nothing.
    asked = {name for name, value in arguments.items() if value is not None and name not in PASSED_ON}
    changes += sorted(name for name in asked if arguments[name] is not False or hasattr(config, name))
    if changes:
        raise UsageError(
            f"{', '.join(changes)}: of a {MODEL_TYPE} folder only dtype, device_map and attn_implementation can be "
            "chosen when it is loaded; change its config.json, or the loaded model"
        )


def _one_device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device_map, str | int | torch.device):
        raise UsageError(f"device_map={device_map!r}: a {MODEL_TYPE} model is put on one device; name it, or auto")
    return torch.device(device_map)


def register() -> None:
    """Teach transformers' automatic classes our type."""
    AutoConfig.register(MODEL_TYPE, MoewrightConfig, exist_ok=True)
    AutoModel.register(MoewrightConfig, MoewrightModel, exist_ok=True)
    AutoModelForCausalLM.register(MoewrightConfig, MoewrightForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MoewrightConfig, MoewrightForConditionalGeneration, exist_ok=True)

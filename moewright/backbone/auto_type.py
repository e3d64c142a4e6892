"""Our own model type, `moewright`, in transformers' automatic classes.

    import moewright.auto
    model = AutoModelForCausalLM.from_pretrained(folder)  # or AutoModelForSeq2SeqLM, AutoModel

What comes back is what `load_model` gives: the transformers class of the backbone, with MoELayers grafted in. The
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

from moewright.backbone.folder import dtype_named, load_model
from moewright.backbone.formats import OWN, read_sparse
from moewright.backbone.graft import graft, moe_layers
from moewright.backbone.skeleton import empty_model, materialise
from moewright.checkpoint.read import ModelFolder
from moewright.errors import ModelError, UsageError
from moewright.family.table import FAMILIES, Family, backbone_config
from moewright.moe.layer import MoELayer

PASSED_ON: Final = ("_from_auto", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision",
                    "subfolder", "code_revision", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors",
                    "_commit_hash", "trust_remote_code", "weights_only")  # fmt: skip
"""Arguments that the automatic classes hand on, and that say nothing where the folder is on disk and safetensors."""

NOT_OURS: Final = ("distributed_config", "device_mesh", "from_flax", "from_tf", "generation_config", "gguf_file",
                   "ignore_mismatched_sizes", "kernel_config", "key_mapping", "load_in_4bit", "load_in_8bit",
                   "max_memory", "offload_buffers", "offload_folder", "offload_state_dict", "output_loading_info",
                   "quantization_config", "state_dict", "tp_plan", "tp_size", "use_kernels", "variant")  # fmt: skip
"""Arguments of transformers' `from_pretrained` that ask for what we do not do."""


OF_THE_FOLDER: Final = ("backbone", "sparse_layers", "architectures", "dtype", "is_encoder_decoder", "model_type",
                        "transformers_version", "_name_or_path")  # fmt: skip
"""Fields of our config that are not one of the backbone's said beside it."""
NAMED_BY_BOTH: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""Settings of generation that belong in a model's config, too."""


class MoewrightConfig(PreTrainedConfig):
    """`config.json` of our own type: `backbone`, the fields of a dense config, and `sparse_layers`."""

    model_type = OWN

    def __init__(self, backbone: Any = None, sparse_layers: Any = None, **rest: Any) -> None:
        super().__init__(**rest)
        # Only now: before, transformers would find the backbone's fields here, and make them our own.
        self.backbone, self.sparse_layers = backbone, sparse_layers

    def __getattr__(self, name: str) -> Any:
        """A field of `backbone` that has no place here, by the names that the backbone's own config answers to."""
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
    """What the automatic classes call; it has no instances."""

    config_class = MoewrightConfig
    seq2seq: bool | None = False
    """Whether its models have an encoder and a decoder; None where any will do."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """`load_model`, with `dtype` (or `torch_dtype`), `device_map` as one device, and `attn_implementation`.

        Fields of the backbone's config may be given as arguments, as `use_cache=False`, and a `config` may be changed:
        in its `backbone`, in its `sparse_layers`, or by attributes of the backbone's names. What the weights cannot
        follow, or nothing hears, is refused by name.

        Raises `UsageError` for what is not a folder on disk, for such changes, for other arguments, and for a model of
        the other kind (causal, encoder-decoder).
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; a model of type {OWN} is loaded from disk, download it first")
        if args:
            raise UsageError(f"a model of type {OWN} is loaded without positional arguments")
        plain = MoewrightConfig.from_pretrained(path)
        config = kwargs.pop("config", None) or plain
        if not isinstance(config, MoewrightConfig):
            raise UsageError(f"config is a {type(config).__name__}; a folder of type {OWN} takes a MoewrightConfig")
        _refuse_kind(config, seq2seq=cls.seq2seq)
        dtype, device = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)), kwargs.pop("device_map", None)
        attention = kwargs.pop("attn_implementation", config._attn_implementation_internal)
        _refuse_experts(config)
        wanted = {name: value for name, value in kwargs.items() if name not in PASSED_ON and value is not None}
        for name in wanted.keys() & set(NOT_OURS):
            if wanted.pop(name) is not False:  # which is what it is without being given
                raise UsageError(f"from_pretrained: {name} is not supported for a folder of type {OWN}; leave it out")
        if dtype is None and config.dtype != plain.dtype:
            dtype = config.dtype
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else dtype_named(dtype.removeprefix("torch."))
        model = _load_changed(path, config, plain, wanted, dtype=dtype)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model if device is None else nn.Module.to(model, _one_device(device))

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model of this config with random weights."""
        _refuse_kind(config, seq2seq=cls.seq2seq)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or config.dtype or torch.float32
        if isinstance(dtype, str):
            dtype = dtype_named(dtype.removeprefix("torch."))
        attention = kwargs.pop("attn_implementation", config._attn_implementation_internal)
        _refuse_experts(config)
        plain = MoewrightConfig(backbone=config.backbone, sparse_layers=config.sparse_layers)
        fields, _ = _with_changes(config, plain, kwargs, fields=config.to_dict())
        _, backbone, layers = read_sparse(fields, record={}, tied=False)
        model = empty_model(backbone, dtype=dtype)
        graft(model, layers)
        materialise(model)
        model.apply(model._init_weights)
        for moe in moe_layers(model).values():  # which transformers knows nothing of
            moe.load_state_dict(MoELayer(moe.config, dtype=dtype).state_dict())
        if attention is not None:
            model.set_attn_implementation(attention)
        return model


class MoewrightForConditionalGeneration(MoewrightForCausalLM):
    """The same for an encoder-decoder."""

    seq2seq = True


class MoewrightModel(MoewrightForCausalLM):
    """The same without a head: what comes back is the whole model's `base_model`, which does not save itself."""

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
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None  # what is none is refused when read
    if family is not None and seq2seq is not None and family.seq2seq != seq2seq:
        auto = "AutoModelForSeq2SeqLM" if family.seq2seq else "AutoModelForCausalLM"
        raise UsageError(f"this {OWN} model is on {model_type}: load it with {auto}")


def _refuse_experts(config: MoewrightConfig) -> None:
    if config._experts_implementation_internal is not None:
        raise UsageError(f"a model of type {OWN} has no experts_implementation; its layers' configs name the kernel")


def _load_changed(
    path: Path, config: MoewrightConfig, plain: MoewrightConfig, wanted: dict[str, Any], *, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The folder's model with what differs between `config` and `plain`, which was read from it, and with `wanted`."""
    fields, changed = _with_changes(config, plain, wanted, fields=ModelFolder(path).config)
    if not changed:
        return load_model(path, dtype=dtype)
    try:
        model = load_model(path, dtype=dtype, fields=fields)
    except ModelError as error:
        raise UsageError(
            f"{', '.join(changed)}: the weights do not follow this change of the config: {error}"
        ) from error
    taken, asked = model.config.to_dict(), backbone_config(fields["backbone"]).to_dict()
    if lost := [name for name in changed if taken.get(name) != asked.get(name)]:
        raise UsageError(f"{', '.join(lost)}: the weights do not follow this change of the config; leave it out")
    return model


def _with_changes(
    config: MoewrightConfig, plain: MoewrightConfig, wanted: dict[str, Any], *, fields: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """`fields` of a config.json with what differs between two configs, and with `wanted`; and the names that differ.

    Raises `UsageError` for what the backbone's config, or the experts, do not hear, and for what makes no config.
    """
    said, before = config.to_dict(), plain.to_dict()
    inner: dict[str, Any] = {k: v for k, v in said["backbone"].items() if before["backbone"].get(k, ...) != v}
    beside = {k: v for k, v in said.items() if k not in OF_THE_FOLDER and before.get(k, ...) != v}
    old = {k: v for k, v in fields["backbone"].items() if k in said["backbone"]}
    built = backbone_config(old).to_dict()
    changes = {k: v for k, v in (inner | beside | wanted).items() if built.get(k, ...) != v}
    _refuse_what_experts_say(changes, FAMILIES[old["model_type"]])
    new = old | changes
    heard = _changed_config(new, changes).to_dict()
    for name in changes:
        without = {k: v for k, v in new.items() if k != name} | {k: v for k, v in old.items() if k == name}
        if _changed_config(without, changes).to_dict() == heard:
            raise UsageError(
                f"{name}={changes[name]!r}: a {OWN} model on {new['model_type']} does not hear this setting"
            )
    sparse = ["sparse_layers"] if said["sparse_layers"] != before["sparse_layers"] else []
    return {**fields, "backbone": new, "sparse_layers": said["sparse_layers"]}, [*changes, *sparse]


def _refuse_what_experts_say(changes: dict[str, Any], family: Family) -> None:
    """`UsageError` for what the backbone's config says of dense blocks: the experts' own settings say it of them."""
    instead = dict.fromkeys((stack.size for stack in family.stacks), "expert_size")
    instead |= {family.activation: "activation"}
    if isinstance(family.bias, str):
        instead[family.bias] = "expert_bias"
    if family.model_type in ("t5", "mt5"):
        instead |= {"feed_forward_proj": "activation", "is_gated_act": "gated"}  # the one says the others
    for name in changes.keys() & instead.keys():
        raise UsageError(
            f"{name}={changes[name]!r}: the experts do not hear this setting of the backbone; "
            f"change {instead[name]} in sparse_layers"
        )


def _changed_config(fields: dict[str, Any], changes: dict[str, Any]) -> PreTrainedConfig:
    try:
        return backbone_config(fields)
    except ModelError as error:
        why = " ".join(str(error.__cause__ or error).split())[:300]
        raise UsageError(f"{', '.join(changes)}: no {fields['model_type']} config can be changed so: {why}") from error


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
    AutoModel.register(MoewrightConfig, MoewrightModel, exist_ok=True)
    AutoModelForCausalLM.register(MoewrightConfig, MoewrightForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MoewrightConfig, MoewrightForConditionalGeneration, exist_ok=True)

"""Branch-train-mix: fine-tuned siblings of one model become the experts of a mixture (arXiv 2403.07816).

Expert weights come from one sibling each, everything else is the mean over siblings.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.untrusted import file_inside, read_json
from moewright.errors import ModelError
from moewright.family.config import backbone_config
from moewright.family.table import family_of

TOKENIZER: Final = "tokenizer.json"

HARMLESS: Final = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "return_dict", "output_attentions"),
        *("output_hidden_states", "id2label", "label2id", "problem_type"),
    }
)
"""Config fields without influence on the model's function: origin and storage of weights, defaults of calls, and tokens
of the dialogue, which fine-tuning may move."""


def sibling_of(expert: int, *, granularity: int, siblings: int) -> int:
    """The sibling that an expert's weights come from: virtual group e is cut from sibling e mod n.

    So a token that chooses a group gets the whole block of one sibling. Where it gets halves of two instead, the start
    collapses (the paper's split experts, top-2 of 8: 28.0 where whole ones have 34.7).
    """
    return expert // granularity % siblings


def average(tensors: Iterable[Tensor], *, name: str, dtype: torch.dtype) -> Tensor:
    """The mean of the siblings' tensors of one name, rounded once to `dtype`.

    They are taken one at a time, so a generator holds one and the sum, and added up in the order given: in float64, or
    in float32 as long as all have 16 bits. Equal tensors have themselves as the mean, to the bit. Raises `ModelError`
    if shapes differ.
    """
    total: Tensor | None = None
    count = 0
    for tensor in tensors:
        assert tensor.is_floating_point(), f"{name}: integers have no mean"
        wide = torch.float32 if tensor.dtype.itemsize < 4 else torch.float64
        if total is None:
            total = tensor.to(wide, copy=True)
        elif tensor.shape != total.shape:
            raise ModelError(
                f"{name} is {list(tensor.shape)} in sibling {count}, {list(total.shape)} in those before; mix models "
                "fine-tuned from one model"
            )
        else:
            total = total.to(torch.promote_types(total.dtype, wide)).add_(tensor)
        count += 1
    assert total is not None, f"{name}: a mean of nothing"
    return total.div_(count).to(dtype)


def check_siblings(folders: Sequence[ModelFolder]) -> None:
    """Whether the folders hold models of one shape, that read text the same way; headers and JSON are read, no weights.

    Compared with the first: config fields, with the family's defaults in place (but for the `HARMLESS` ones), names and
    shapes of tensors, and the vocabulary of tokenizer.json where both have one.
    Raises `ModelError` naming the first difference.
    """
    first = folders[0]
    for other in folders[1:]:
        for difference in (_config_difference, _tensor_difference, _vocabulary_difference):
            if (reason := difference(first, other)) is not None:
                raise ModelError(
                    f"{other.path} is no sibling of {first.path}: {reason}; mix models fine-tuned from one model"
                )


def _config_difference(first: ModelFolder, other: ModelFolder) -> str | None:
    a, b = (_meaning(folder) for folder in (first, other))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            return f"{key} is {b.get(key)!r}, not {a.get(key)!r}"
    return None


def _meaning(folder: ModelFolder) -> dict[str, Any]:
    """The config as transformers reads it: versions of it write the same setting in several ways, or leave it out."""
    fields: dict[str, Any] = backbone_config(folder.config).to_dict()
    return {key: value for key, value in fields.items() if key not in HARMLESS}


def _tensor_difference(first: ModelFolder, other: ModelFolder) -> str | None:
    a, b = (_weights(folder) for folder in (first, other))
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b or name not in a:
            return f"it {'lacks' if name not in b else 'has one tensor more,'} {name}"
        if a[name] != b[name]:
            return f"{name} is {list(b[name])}, not {list(a[name])}"
    return None


def _weights(folder: ModelFolder) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without tensors that a folder may lack: a tied output embedding, rotary frequencies."""
    config = backbone_config(folder.config)
    family = family_of(config)
    head = family.on_disk(family.head)
    return {
        name: info.shape
        for name, info in folder.tensors.items()
        if not (name == head and config.tie_word_embeddings) and not name.endswith("rotary_emb.inv_freq")
    }


def _vocabulary_difference(first: ModelFolder, other: ModelFolder) -> str | None:
    a, b = (_vocabulary(folder) for folder in (first, other))
    # Merges and settings may be written in several ways; a token with another id makes the mean embedding nonsense.
    return f"{TOKENIZER} has another vocabulary" if a is not None and b is not None and a != b else None


def _vocabulary(folder: ModelFolder) -> Any:
    if not (folder.path / TOKENIZER).exists():
        return None
    model = read_json(file_inside(folder.path, TOKENIZER)).get("model")
    return model.get("vocab") if isinstance(model, dict) else None

"""The tokenizer that a model folder carries."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moewright.errors import ModelError


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, from its files alone; `ModelError` if there is none that loads."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: no tokenizer that loads ({why}); copy the model's tokenizer files there"
        ) from error
    return tokenizer

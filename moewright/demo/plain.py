"""A script, not a module: a folder loaded by plain transformers, in a process without moewright.

    python plain.py FOLDER PROMPT NEW_TOKENS TEXT...

Prints one JSON object: the continuation of the prompt, the mean negative log-likelihood of the texts
in nats a token, and the logits at the last position of each text.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(folder: str, prompt: str, new_tokens: str, *texts: str) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    encoded = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(
        **encoded, max_new_tokens=int(new_tokens), do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    total, tokens = 0.0, 0
    last: list[list[float]] = []
    for text in tqdm(texts, desc="scoring", disable=None):  # None: only on a terminal
        ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").double().item()
        tokens += ids.shape[1] - 1
        last.append(logits[-1].tolist())
    return {
        "architecture": type(model).__name__,
        "continuation": tokenizer.decode(generated[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True),
        "last_logits": last,
        "moewright_imported": any(name.split(".")[0] == "moewright" for name in sys.modules),
        "nll": total / tokens,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))

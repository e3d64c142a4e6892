"""A written folder against the model it was written from, in a process that knows nothing of us."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.skeleton import longest_text
from moewright.errors import ModelError
from moewright.export.long import LongText
from moewright.moe.router import Router, Routing, selection_values

TOLERANCE: Final = 1e-5
"""Largest difference of logits in float32, relative to the largest logit."""
TIE: Final = 1e-6
"""Experts whose scores are nearer than this times the largest may be chosen one for the other."""
LENGTHS: Final = (1, 7, 48)
LONG: Final = "long"
"""The case of the long text."""
NEW_TOKENS: Final = 16  # as in plain.py


@dataclass(frozen=True)
class Proof:
    """Comparison of a folder in plain transformers with our model."""

    loaded_as: str
    """The class, and the version of transformers."""
    relative_logit_difference: float
    """Over all cases: lengths, padding on the left and on the right."""
    other_experts: int
    """Pairs of token and layer whose chosen experts differ, but for ties."""
    greedy_tokens_agree: bool
    """Of 16 tokens generated with a cache."""
    expert_faults: tuple[str, ...]
    """Experts that, made louder, change other tokens than those that chose them."""
    deaf_settings: tuple[str, ...]
    """Settings without effect on the runtime."""
    keys: tuple[str, ...]
    """Tensors that were missing or left over."""
    longest_text: int = max(LENGTHS)
    """Tokens of the longest text whose logits were compared."""
    not_compared: tuple[str, ...] = ()
    """Properties that need longer texts."""

    @property
    def problems(self) -> list[str]:
        """Why the folder must not be trusted; empty if nothing was found."""
        problems = [f"tensors {', '.join(self.keys)} do not fit"] if self.keys else []
        if not self.relative_logit_difference <= TOLERANCE:
            problems.append(f"logits differ by {self.relative_logit_difference:.1e} ({TOLERANCE:g} is allowed)")
        if self.other_experts:
            problems.append(f"{self.other_experts} choices of experts differ")
        if not self.greedy_tokens_agree:
            problems.append("generated tokens differ")
        if self.expert_faults:
            problems.append(f"experts change the wrong tokens ({self.expert_faults[0]})")
        if self.deaf_settings:
            problems.append(f"it ignores {', '.join(self.deaf_settings)}")
        return problems

    @property
    def runtime_is_at_fault(self) -> bool:
        """Whether the runtime itself mixes experts up, whatever the weights: see `expert_faults`."""
        return bool(self.expert_faults) and not self.keys and not self.deaf_settings

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Choice(NamedTuple):
    """The tokens' choices in one layer."""

    values_TE: Tensor
    """Values by which experts are chosen, the largest first: logits, or scores with a bias and within groups."""
    experts_TK: Tensor


@dataclass(frozen=True)
class Reference:
    """Our model's outputs for the cases."""

    cases: dict[str, Tensor]
    logits: dict[str, Tensor]
    choices: dict[str, list[Choice]]
    """By case, for each sparse layer."""
    greedy: Tensor
    long: LongText

    @classmethod
    def of(cls, model: PreTrainedModel, *, seed: int = 0) -> "Reference":
        """Ask a float32 model on random tokens."""
        assert model.dtype == torch.float32, "roundings in between would differ for other reasons"
        long = LongText.of(model, short=max(LENGTHS))
        cases = _cases(model, long, seed=seed)
        logits, choices = {}, {}
        with torch.no_grad():
            for name in _names(cases):
                with _choices(model) as chosen:
                    logits[name] = _forward(
                        model, cases[f"ids/{name}"], cases[f"mask/{name}"], cases.get(f"keep/{name}")
                    )
                choices[name] = chosen
            short = [name for name in _names(cases) if name != LONG]
            longest = max(short, key=lambda name: int(cases[f"mask/{name}"].sum()))
            ids = cases[f"ids/{longest}"][:1]
            settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            greedy: Any = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings
            )
        return cls(cases, logits, choices, greedy, long)


def prove(folder: Path, reference: Reference, *, ours: bool) -> Proof:
    """Load the folder with plain transformers in a new process, without a network, and compare.

    A folder of our own type (`ours`) is loaded after `import moewright.auto`. Raises `ModelError` if it does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cases, out = Path(scratch) / "cases.npz", Path(scratch) / "out.npz"
        np.savez(cases, allow_pickle=False, **{name: tensor.numpy() for name, tensor in reference.cases.items()})
        arguments = [str(folder), str(cases), str(out), *(["moewright.auto"] if ours else [])]
        facts = _run(arguments, cwd=None if ours else scratch)
        with np.load(out) as file:
            answers = {name: torch.from_numpy(file[name]) for name in file}
    if facts["moewright_imported"] != ours:
        raise ModelError(f"{folder}: moewright was imported by transformers; run it where nothing imports it at start")
    names = _names(reference.cases)
    choices = {name: (0, None) if ours else _other_choices(answers, reference, name) for name in names}
    ends, unseen = {name: reference.cases[f"ids/{name}"].shape[1] for name in names}, reference.long.unseen
    if LONG in names and (broken := choices[LONG][1]) is not None:
        ends[LONG] = broken
        unseen += (f"what follows token {broken} of the long text: a tie of experts was broken the other way there",)
    # Not max(), which loses a NaN.
    differences = [
        _difference(answers[f"logits/{name}"], reference, name, end=end) for name, end in ends.items() if end
    ]
    keys = tuple(f"{kind.removesuffix('_keys')} {key}" for kind, names in facts["keys"].items() for key in names)
    return Proof(
        loaded_as=f"{facts['class']}, transformers {facts['transformers']}",
        relative_logit_difference=float(torch.tensor(differences).amax()),
        other_experts=sum(count for count, _ in choices.values()),
        greedy_tokens_agree=torch.equal(answers["greedy"], reference.greedy),
        expert_faults=tuple(facts["expert_faults"]),
        deaf_settings=tuple(facts["deaf_settings"]),
        keys=keys,
        longest_text=max(ends.values()),
        not_compared=unseen,
    )


def _run(arguments: list[str], *, cwd: str | None) -> dict[str, Any]:
    script = Path(__file__).with_name("plain.py")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | offline,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{arguments[0]}: transformers does not load what was written: {last}")
    facts: dict[str, Any] = json.loads(run.stdout)
    return facts


def _cases(model: PreTrainedModel, long: LongText, *, seed: int) -> dict[str, Tensor]:
    """Random tokens, alone and padded on either side; not the ids that have a meaning to the config."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    special: set[Any] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = getattr(config, name, None)
        special.update(ids if isinstance(ids, list) else [ids])
    plain = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special])
    cases: dict[str, Tensor] = {}
    for length in LENGTHS:
        length = max(1, min(length, longest_text(model) - NEW_TOKENS))
        ids = plain[torch.randint(len(plain), (2, length), generator=generator)]
        cases |= {f"ids/{length}": ids, f"mask/{length}": torch.ones_like(ids)}
    for side in ("left", "right"):
        ids = plain[torch.randint(len(plain), (2, 12), generator=generator)]
        mask = torch.ones_like(ids)
        mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
        cases |= {f"ids/{side}": ids, f"mask/{side}": mask}
    if long.length is not None:
        ids = plain[torch.randint(len(plain), (1, long.length), generator=generator)]
        cases |= {f"ids/{LONG}": ids, f"mask/{LONG}": torch.ones_like(ids), f"keep/{LONG}": long.positions()}
    return cases


def _names(cases: dict[str, Tensor]) -> list[str]:
    return sorted(name.removeprefix("ids/") for name in cases if name.startswith("ids/"))


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
    again = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if model.config.is_encoder_decoder else {}
    again |= {} if keep is None else {"logits_to_keep": keep}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **again).logits
    return logits.float()


@contextmanager
def _choices(model: PreTrainedModel) -> Iterator[list[Choice]]:
    choices: list[Choice] = []

    def collect(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        assert isinstance(router, Router)
        values_TE = selection_values(routing.logits_TE, routing.scores_TE, args[1], bias_E=router.bias)
        choices.append(Choice(values_TE, routing.experts_TK))

    handles = [moe.router.register_forward_hook(collect) for moe in moe_layers(model).values()]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


def _difference(found: Tensor, reference: Reference, name: str, *, end: int) -> float:
    """Largest difference of logits before `end`, relative to the largest logit; output at padding is not compared."""
    mask, wanted = reference.cases[f"mask/{name}"].bool(), reference.logits[name]
    keep = reference.cases.get(f"keep/{name}", torch.arange(mask.shape[1]))
    real = mask[:, keep] & (keep < end)
    return float((found - wanted)[real].abs().max() / wanted[real].abs().max())


def _other_choices(found: dict[str, Tensor], reference: Reference, name: str) -> tuple[int, int | None]:
    """How often other experts were chosen, but for ties; and the first token with a tie that was broken differently."""
    real = reference.cases[f"mask/{name}"].flatten().bool()
    wrong, broken = torch.zeros_like(real, dtype=torch.int64), torch.zeros_like(real)
    for number, (values_TE, experts_TK) in enumerate(reference.choices[name]):
        theirs_TE = found[f"chosen/{name}/{number}"]
        ours_TE = torch.zeros_like(theirs_TE).scatter(1, experts_TK, True)
        # The worst of what is chosen against the best that is not: nearer than a tie, either may be taken.
        worst_T = values_TE.masked_fill(~ours_TE, torch.inf).amin(dim=1)
        best_T = values_TE.masked_fill(ours_TE, -torch.inf).amax(dim=1)
        tied_T = worst_T - best_T <= TIE * values_TE[values_TE.isfinite()].abs().amax()
        differ_T = (ours_TE != theirs_TE).any(dim=1) & real
        wrong += differ_T & ~tied_T
        broken |= differ_T & tied_T
    first = int(broken.nonzero()[0]) if broken.any() else None
    if name == LONG and first is not None:  # what comes after it may differ for its sake
        wrong = wrong[:first]
    return int(wrong.sum()), first

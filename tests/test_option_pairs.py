"""Every pair of options: what is legal computes the definition, with and without padding; what is not says why."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moewright.errors import UsageError
from moewright.moe.config import MoEConfig
from tests import reference
from tests.options import OPTIONS, Changes, assert_equal, batch, distance, filled, layer_of, run, wanted

# Pair: words of the refusal, one for either option.
ILLEGAL = {
    ("softmax-topk", "sigmoid"): ("router_order=softmax-topk", "score=sigmoid"),
    ("topk-softmax", "sigmoid"): ("router_order=topk-softmax", "score=sigmoid"),
    ("topk-softmax", "renormalize"): ("router_order=topk-softmax", "renormalize"),
    ("topk-softmax", "expert choice"): ("router_order=topk-softmax", "choice=expert"),
    ("sigmoid", "z_loss"): ("score=sigmoid", "z_loss=0.125"),
    ("one expert", "renormalize"): ("top_k=1", "renormalize"),
    ("one expert", "expert choice"): ("top_k=1", "choice=expert"),
    ("one expert", "first choices first"): ("top_k=1", "first_choices_first"),
    ("all experts", "groups"): ("top_k=6", "2 groups"),
    ("all experts", "groups by two"): ("top_k=6", "2 groups"),
    ("all experts", "expert choice"): ("top_k=6", "choice=expert"),
    ("groups", "expert choice"): ("num_groups=3", "choice=expert"),
    ("groups by two", "expert choice"): ("num_groups=3", "choice=expert"),
    ("selection_bias", "expert choice"): ("selection_bias", "choice=expert"),
    ("normal noise", "expert choice"): ("logit_noise=0.5", "choice=expert"),
    ("gumbel noise", "expert choice"): ("logit_noise=1.0", "choice=expert"),
    ("logit_norm", "z_loss"): ("logit_norm=1.5", "z_loss=0.125"),
    ("no gate", "clamped SwiGLU"): ("gated=False", "activation=swiglu_oai"),
    ("expert choice", "capacity"): ("choice=expert", "capacity factor"),
    ("expert choice", "evaluation capacity"): ("choice=expert", "capacity factor"),
    ("expert choice", "drop by probability"): ("choice=expert", "capacity factor"),
    ("expert choice", "drop at random"): ("choice=expert", "capacity factor"),
    ("expert choice", "first choices first"): ("choice=expert", "capacity factor"),
    ("expert choice", "balance"): ("choice=expert", "balance_loss"),
    ("expert choice", "balance of sequences"): ("choice=expert", "balance_loss"),
    ("expert choice", "balance of the step"): ("choice=expert", "balance_loss"),
    ("expert choice", "adapted balance"): ("choice=expert", "capacity factor"),
}

# Refused alone, for want of what they act on: the words for the option and for what is missing.
LACKING = [
    ({"choice": "expert", "expert_choice": 1.0}, ("choice=expert", "causal")),
    ({"choice": "expert", "causal": False}, ("choice=expert", "expert_choice=0")),
    (
        {"choice": "expert", "causal": False, "expert_choice": 7.0},
        ("choice=expert", "expert_choice=7.0", "num_experts=6"),
    ),
    ({"expert_choice": 1.0}, ("expert_choice=1.0", "choice=token")),
    ({"drop_policy": "probability"}, ("drop_policy=probability", "capacity_factor")),
    ({"drop_policy": "random"}, ("drop_policy=random", "capacity_factor")),
    ({"drop_policy": "random", "eval_capacity_factor": 1.0}, ("drop_policy=random", "capacity_factor")),
    ({"first_choices_first": True}, ("first_choices_first", "capacity_factor")),
    ({"bias_update_rate": 0.1}, ("bias_update_rate=0.1", "selection_bias")),
    ({"noise": "gumbel"}, ("noise=gumbel", "logit_noise=0")),
    ({"balance_scope": "global"}, ("balance_scope=global", "balance_loss=0")),
    ({"balance_adaptation": 0.2, "balance_loss": 0.1}, ("balance_adaptation", "capacity_factor")),
    ({"balance_adaptation": 0.2, "capacity_factor": 1.0}, ("balance_adaptation", "balance_loss")),
    ({"shared_mode": "gated"}, ("shared_mode=gated", "shared_size=0")),
    ({"shared_mode": "residual"}, ("shared_mode=residual", "shared_size=0")),
    ({"top_groups": 2}, ("top_groups=2", "num_groups=1")),
    ({"group_score": "top2"}, ("group_score=top2", "num_groups=1")),
    ({"num_groups": 4}, ("num_groups=4", "num_experts=6")),
    ({"num_groups": 3, "top_groups": 3}, ("top_groups=3", "num_groups=3")),
    ({"num_groups": 6, "top_groups": 2, "group_score": "top2"}, ("group_score=top2", "groups of 1")),
    ({"num_experts": 1, "top_k": 1, "logit_norm": 1.0}, ("logit_norm=1.0", "num_experts=1")),
    ({"top_k": 7}, ("top_k=7", "num_experts=6")),
]


def pairs() -> list[tuple[str, str]]:
    """Those of two options that do not set the same field otherwise, and of which neither includes the other."""
    allowed = []
    for a, b in combinations(OPTIONS, 2):
        one, other = OPTIONS[a], OPTIONS[b]
        if any(one[key] != other[key] for key in one.keys() & other.keys()):
            continue
        if filled(one | other) not in (filled(one), filled(other)):
            allowed.append((a, b))
    return allowed


LEGAL = [pair for pair in pairs() if pair not in ILLEGAL]


def test_the_list_of_illegal_pairs_holds_pairs_of_the_sweep():
    assert set(ILLEGAL) <= set(pairs())
    assert len(LEGAL) > 350
    assert {name for pair in LEGAL for name in pair} == set(OPTIONS)


@pytest.mark.parametrize("pair", ILLEGAL, ids=" + ".join)
def test_an_illegal_pair_is_refused_by_both_names(pair):
    refused(OPTIONS[pair[0]] | OPTIONS[pair[1]], ILLEGAL[pair])


@pytest.mark.parametrize(("changes", "words"), LACKING, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_an_option_without_what_it_acts_on_is_refused(changes, words):
    refused(changes, words)


def refused(changes: Changes, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as raised:
        MoEConfig(**filled(changes))
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("pair", LEGAL, ids=" + ".join)
def test_a_legal_pair_computes_the_definition_with_and_without_padding(pair):
    computes_the_definition(OPTIONS[pair[0]] | OPTIONS[pair[1]])


@settings(max_examples=60)
@given(names=st.lists(st.sampled_from(sorted(OPTIONS)), min_size=3, max_size=9, unique=True))
def test_any_legal_set_of_options_computes_the_definition(names):
    changes: Changes = {}
    taken: list[str] = []
    for name in names:
        more = changes | OPTIONS[name]
        overwrites = any(more[key] != value for key, value in changes.items())
        # Of a random choice to drop and one to mask, only the two together are seen in the combine weights.
        unseen = more.get("drop_policy") == "random" and "output_masking" in more and "renormalize" in more
        if not (overwrites or unseen or any({(name, other), (other, name)} & ILLEGAL.keys() for other in taken)):
            changes, taken = more, [*taken, name]
    computes_the_definition(changes)


def computes_the_definition(changes: Changes) -> None:
    """In training with and without padding, in evaluation with it."""
    outcomes, right = [], None
    for padded in (False, True):
        layer = layer_of(changes)
        given = batch(layer, padded=padded)
        outcomes.append(run(layer, given))
        draws = any(drawn is not None for drawn in outcomes[-1].draws)
        if right is None or draws:
            right = wanted(layer, given, outcomes[-1].draws)
        assert_equal(layer, outcomes[-1], right)
    if not draws:
        assert distance(outcomes[1].output_TD, outcomes[0].output_TD) < 1e-13
    layer.eval()
    assert_equal(layer, run(layer, given), wanted(layer, given, reference.NOTHING_DRAWN))

"""How errors name the settings that they speak of."""

import warnings

import pytest

from moewright.errors import ModelError, UsageError, settings_written


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("top_k=9 > experts=4: too many", "--top-k 9 > --experts 4: too many"),
        ("router_top_k=9 and my.top_k=3 are others", "router_top_k=9 and my.top_k=3 are others"),
        ("top_k='=' twice, top_k=1", "--top-k '=' twice, --top-k 1"),
        ("with top_k of experts, leave top_k out.", "with --top-k of experts, leave --top-k out."),
        ("set `experts`, or `top_k=2`, but not `seed`", "set --experts, or `--top-k 2`, but not `seed`"),
        ("top_k-softmax and the_top_k are others", "top_k-softmax and the_top_k are others"),
        ("runs/top_k=4/model lacks top_k=4", "runs/top_k=4/model lacks --top-k 4"),
        ("/data/top_k/a.txt is empty", "/data/top_k/a.txt is empty"),
        ("`/data/top_k/a.txt` is empty: set `top_k`", "`/data/top_k/a.txt` is empty: set --top-k"),
        ("top_k/model and model/top_k are folders", "top_k/model and model/top_k are folders"),
    ],
)
def test_settings_are_named_as_they_were_written(message, expected):
    with (
        pytest.raises(UsageError) as caught,
        settings_written(["top_k", "experts"], write=lambda name: f"--{name.replace('_', '-')} "),
    ):
        raise UsageError(message)
    assert str(caught.value) == expected


def test_what_stands_in_a_file_keeps_its_name():
    with pytest.raises(ModelError, match=r"^top_k=9 in config.json$"), settings_written(["top_k"], write=str.upper):
        raise ModelError("top_k=9 in config.json")


def test_warnings_speak_the_same_dialect():
    with (
        pytest.warns(UserWarning, match=r"^upcycle.top_k = 1: set upcycle.top_k higher$"),
        settings_written(["top_k"], write=lambda name: f"upcycle.{name} = "),
    ):
        warnings.warn("top_k=1: set top_k higher", stacklevel=1)

"""How errors name the settings that they speak of."""

import pytest

from moewright.errors import ModelError, UsageError, settings_written


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("top_k=9 > experts=4: too many", "--top-k 9 > --experts 4: too many"),
        ("router_top_k=9 and my.top_k=3 are others", "router_top_k=9 and my.top_k=3 are others"),
        ("top_k='=' twice, top_k=1", "--top-k '=' twice, --top-k 1"),
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

"""The learning rate of each step."""

import math

import pytest

from moewright.optim.schedule import Schedule, learning_rate


def rates(schedule: Schedule, *, steps: int, warmup: int = 0, decay: int = 0, ratio: float = 0.1) -> list[float]:
    return [
        learning_rate(
            step,
            peak=2.0,
            schedule=schedule,
            steps=steps,
            warmup_steps=warmup,
            decay_steps=decay,
            min_ratio=ratio,
        )
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_the_warm_up_is_a_line_to_the_peak(schedule: Schedule) -> None:
    found = rates(schedule, steps=10, warmup=4, decay=3 if schedule == "wsd" else 0)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_constant_stays() -> None:
    assert rates("constant", steps=5) == [2.0] * 5


def test_cosine_goes_down_half_a_cosine_to_its_minimum() -> None:
    found = rates("cosine", steps=12, warmup=2)
    expected = [0.2 + 1.8 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)]
    assert found[1:] == pytest.approx(expected)
    assert found[-1] == pytest.approx(0.2)
    assert sorted(found[1:], reverse=True) == found[1:]


def test_wsd_is_flat_and_then_a_line_to_its_minimum() -> None:
    found = rates("wsd", steps=10, warmup=2, decay=4, ratio=0.0)
    assert found == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])


def test_a_run_may_be_all_warm_up() -> None:
    assert rates("cosine", steps=4, warmup=4) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates("wsd", steps=4, warmup=1, decay=3, ratio=0.5) == pytest.approx([2.0, 5 / 3, 4 / 3, 1.0])

"""What a step tells of itself, and the warning of a leak, on metrics made by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_reward.lacot.metrics import clear_fall, leak_warning, mean_metrics, step_metrics


def made(rewards, log_q, kept):
    return [
        {"log_reward": r, "log_q/reference": q, "kept_frac": k} for r, q, k in zip(rewards, log_q, kept, strict=True)
    ]


def ramp(start, end, steps=30):
    return [start + (end - start) * k / (steps - 1) for k in range(steps)]


LEAK = made(ramp(-2.5, -30), ramp(-0.8, -4), ramp(0.7, 0.1))


def test_a_leak_is_told_with_its_numbers_and_a_remedy():
    told = leak_warning(LEAK)
    assert told and "\n" not in told and "set filter to 'none'" in told and "within 30 steps" in told
    first, last = LEAK[:5], LEAK[-10:]
    for name in ("log_reward", "log_q/reference", "kept_frac"):
        a, b = (sum(m[name] for m in some) / len(some) for some in (first, last))
        assert f"{name} {a:.3g} -> {b:.3g}" in told


@pytest.mark.parametrize(
    "steps",
    [
        LEAK[:14],  # too early to tell
        made(ramp(-2.5, -2.0), ramp(-0.8, -4), ramp(0.7, 0.1)),  # better rationales than the references were found
        made(ramp(-2.5, -30), ramp(-0.8, -0.3), ramp(0.7, 0.1)),  # hard questions
        made(ramp(-2.5, -30), ramp(-0.8, -4), ramp(0.7, 0.6)),  # what is drawn is trained on, and will be corrected
        made(ramp(-2.5, -3.4), ramp(-0.8, -4), ramp(0.7, 0.1)),  # less than a nat
        made(ramp(-2.5, -30), ramp(-0.8, -1.6), ramp(0.7, 0.1)),
        made([-300 + 250 * (-1) ** k - k for k in range(30)], ramp(-0.8, -4), ramp(0.7, 0.1)),  # noise of the questions
        [{"log_reward": m["log_reward"], "kept_frac": 1.0} for m in LEAK],  # no references
        [{"kept_frac": 0.0}] * 30,
        [],
    ],
)
def test_what_is_no_leak(steps):
    assert leak_warning(steps) is None


def test_steps_that_lack_a_metric_are_left_out():
    "No question of a step may have had a reference."
    holes = [m if k % 3 else {"kept_frac": m["kept_frac"]} for k, m in enumerate(LEAK)]
    assert leak_warning(holes)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10), st.floats(0, 100))
def test_a_fall_is_clear_beyond_a_nat_and_the_noise(values, drop):
    lower = [value - drop for value in values]
    mean, n = sum(values) / len(values), len(values)
    error = math.sqrt(2 * sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    if not math.isclose(drop, max(1, 3 * error), rel_tol=1e-6):
        assert clear_fall(values, lower) == (drop > max(1, 3 * error))
    assert not clear_fall(lower, values)


def told(loss, **more):
    line = {"log_reward": -2.0, "kept": loss is not None, "n_tokens": 3, "finished": True}
    return {"lines": [line], "reference": None, "reference_log_q": None, "too_long": False, "loss": loss} | more


def test_what_trained_nothing_is_not_balanced():
    found = step_metrics([told(9.0), told(None), told(1.0), told(None)])
    assert (found["loss"], found["residual"], found["trained_frac"]) == (5.0, math.sqrt(5), 0.5)
    nothing = step_metrics([told(None)])
    assert nothing["trained_frac"] == 0 and not {"loss", "residual"} & nothing.keys()
    assert step_metrics([told(0.0)])["residual"] == 0  # a perfect balance is one


def test_a_mean_over_steps_is_over_those_that_know():
    assert mean_metrics([]) == {}
    found = mean_metrics([step_metrics([told(4.0)]), step_metrics([told(None)])])
    assert found["loss"] == 4.0 and found["trained_frac"] == 0.5 and "log_reward/reference" not in found

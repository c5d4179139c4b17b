"""What a step tells of itself, and the warnings of a leak, a collapse and silence, on metrics made by hand or measured."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_reward.core.runs import Run
from vlm_reward.lacot.metrics import (
    clear_fall,
    leak_warning,
    mean_metrics,
    reference_note,
    step_metrics,
    steps_before,
    told_of,
)
from vlm_reward.lacot.settings import RGFNSettings
from vlm_reward.lacot.step import Outcome, Question
from vlm_reward.train.trainer import Recorder


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
        made(ramp(-2.5, -6), ramp(-0.8, -4), ramp(0.7, 0.6)),  # what is drawn is trained on, and will be corrected
        made(ramp(-2.5, -6), ramp(-0.8, -4), [1.0] * 30),  # a dip
        made(ramp(-150, -158), ramp(-90, -95), [1.0] * 30),  # long rationales: a few nats are a few percent
        made(ramp(-2.5, -3.4), ramp(-0.8, -4), ramp(0.7, 0.1)),  # less than a nat
        made(ramp(-2.5, -30), ramp(-0.8, -1.6), ramp(0.7, 0.1)),
        made([-300 + 250 * (-1) ** k - k for k in range(30)], ramp(-0.8, -4), ramp(0.7, 0.1)),  # noise of the questions
        [{"log_reward": -2.5 - 0.1 * k, "kept_frac": 1.0} for k in range(30)],  # no references
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


def until_told(steps):
    "The number of steps after which something is told, and what."
    return next(((k, told) for k in range(len(steps) + 1) if (told := leak_warning(steps[:k]))), None)


def measured(texts):
    return [[float(number) for number in text.split()] for text in texts]


# The pocket on 64 questions of scenes/relation, without a filter; log_reward and log_q/reference of each step.
DIPS = {
    "lr 1e-4": (
        "-3.1 -2.5 -2.3 -2.1 -2.4 -1.9 -1.5 -2.4 -2.3 -2.2 -2.0 -2.2 -2.6 -1.9 -2.7 -2.0 -2.4 -3.4 -2.8 -2.5 "
        "-2.1 -1.6 -2.5 -1.7 -2.0 -1.7 -2.3 -1.9 -2.2 -1.9 -3.1 -2.5 -2.4 -2.0 -1.7 -1.8 -1.7 -1.7 -2.2 -2.8 "
        "-1.7 -2.0 -2.1 -1.7 -3.7 -1.6 -1.8 -1.8 -2.1 -1.7 -2.3 -1.7 -1.8 -2.5 -2.8 -2.8 -2.3 -1.9 -2.6 -2.3 ",
        "-0.8 -0.8 -0.8 -0.8 -0.9 -0.8 -0.9 -0.9 -0.9 -1.0 -0.9 -1.0 -1.0 -0.9 -1.0 -1.1 -1.1 -1.1 -1.2 -1.2 "
        "-1.2 -1.2 -1.3 -1.4 -1.2 -1.3 -1.5 -1.4 -1.4 -1.4 -1.8 -1.6 -1.6 -1.4 -1.5 -1.5 -1.5 -1.6 -1.5 -1.7 "
        "-1.7 -1.7 -1.6 -1.5 -1.7 -1.8 -1.9 -2.0 -2.0 -2.3 -2.8 -2.8 -2.8 -2.6 -2.6 -2.9 -2.9 -2.6 -3.2 -2.4 ",
    ),
    "lr 5e-4": (
        "-3.1 -2.5 -2.3 -1.8 -1.8 -1.9 -4.7 -2.7 -2.4 -4.4 -4.4 -2.2 -4.3 -4.4 -5.6 -8.6 -5.5 -8.4 -5.4 -5.0 "
        "-3.9 -4.3 -6.7 -3.9 -6.3 -6.8 -4.2 -4.2 -3.2 -6.9 -2.8 -2.5 -1.8 -2.0 -2.8 -2.2 -2.2 -2.2 -2.7 -3.3 "
        "-1.8 -3.0 -2.5 -2.7 -3.0 -3.2 -2.2 -2.3 -2.4 -2.1 -2.9 -2.1 -1.8 -3.6 -2.8 -2.8 -1.7 -2.9 -2.8 -2.8 ",
        "-0.8 -0.8 -0.8 -0.9 -1.1 -1.2 -1.5 -1.6 -1.7 -2.9 -1.9 -1.1 -1.8 -1.0 -1.7 -1.5 -1.5 -1.9 -1.8 -1.3 "
        "-2.5 -0.9 -1.4 -1.6 -3.1 -2.0 -3.3 -3.3 -3.9 -2.0 -3.1 -3.7 -2.9 -4.0 -2.8 -3.1 -3.4 -4.7 -4.3 -3.5 "
        "-4.7 -4.4 -5.5 -4.6 -4.1 -4.7 -5.7 -5.7 -4.8 -3.7 -3.5 -4.0 -3.8 -5.2 -3.5 -3.1 -2.6 -2.8 -2.9 -2.9 ",
    ),
}
COLLAPSES = {
    "lr 2e-3": (
        "-3.1 -2.5 -12.3 -8.7 -8.7 -19.9 -22.7 -31.9 -62.8 -62.8 -143.1 -217.7 -193.4 -208.7 -216.3 -208.1 "
        "-131.5 -117.0 -70.5 -76.5 -63.5 -126.8 -58.7 -50.0 -55.2 ",
        "-0.8 -0.8 -1.0 -0.7 -1.7 -2.9 -7.4 -3.4 -8.7 -18.2 -43.0 -67.7 -59.0 -60.4 -58.0 -66.1 -57.8 -51.6 "
        "-48.1 -45.6 -47.8 -41.8 -45.5 -43.7 -47.0 ",
    ),
    "empty off, lr 1e-4": (
        "-3.1 -2.5 -2.3 -2.1 -2.4 -1.9 -2.6 -2.3 -2.2 -2.2 -5.1 -5.5 -5.3 -7.5 -12.5 -22.6 -10.8 -13.1 -12.1 "
        "-15.9 -10.3 -7.2 -7.4 -6.4 -8.0 ",
        "-0.8 -0.8 -0.8 -0.7 -0.8 -0.7 -0.7 -0.7 -0.8 -0.8 -0.9 -1.0 -1.2 -1.3 -1.6 -1.9 -2.0 -2.2 -2.1 -2.5 "
        "-2.4 -2.5 -3.4 -3.3 -3.3 ",
    ),
}


@pytest.mark.parametrize("name", DIPS)
def test_a_dip_that_passes_is_not_told_at_any_moment(name):
    rewards, log_q = measured(DIPS[name])
    assert until_told(made(rewards, log_q, [1.0] * len(rewards))) is None


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_told_although_nothing_is_filtered(name):
    "A warning that wants most draws to be left out is blind here."
    rewards, log_q = measured(COLLAPSES[name])
    step, told = until_told(made(rewards, log_q, [1.0] * len(rewards)))
    assert step <= 25 and told.startswith("the sampler collapses (log_reward ") and "\n" not in told
    assert "log_q/reference" in told and "lr" in told and "filter" not in told
    step, told = until_told([{"log_reward": r, "kept_frac": 1.0} for r in rewards])  # no row has a reference
    assert step <= 25 and told.startswith("the sampler collapses (log_reward ") and "log_q/reference" not in told


def test_a_collapse_is_told_without_any_reference():
    told = leak_warning([{"log_reward": m["log_reward"], "kept_frac": 1.0} for m in LEAK])
    assert told and told.startswith("the sampler collapses (log_reward -4.4 -> -25.7 within 30 steps)")


@pytest.mark.parametrize("prior", [0.0, -4.0])
def test_points_over_a_falling_temperature_are_no_collapse_and_no_leak(prior):
    "With a rubric `log_reward` is points over the reward temperature, beside the prior: it falls when that is annealed."
    taus = [max(0.3, 1 - 0.7 * k / 20) for k in range(30)]

    def steps(points):
        return [
            {"log_reward": prior + p / tau, "reward": p, "reward_temperature": tau, "kept_frac": 1.0}
            for p, tau in zip(points, taus, strict=True)
        ]

    constant = steps([-3.0] * 30)
    assert until_told(constant) is None
    strict = [m | {"log_q/reference": q, "kept_frac": 0.1} for m, q in zip(constant, ramp(-1, -4), strict=True)]
    assert until_told(strict) is None
    nan = [
        {name: m.get(name, math.nan) for name in (*m, "log_q/reference")} for m in constant
    ]  # as a run's table has it
    assert until_told(nan) is None
    told = leak_warning(steps(ramp(-3, -40)))
    assert told and told.startswith(f"the sampler collapses (log_reward {prior - 5.55:.3g} -> {prior - 34.3:.3g} ")


def test_a_likelihood_that_falls_while_its_temperature_does_is_a_collapse():
    "It is not divided by the temperature, so nothing is to be undone."
    steps = [m | {"reward_temperature": tau} for m, tau in zip(LEAK, ramp(1, 0.3), strict=True)]
    assert leak_warning(steps) == leak_warning(LEAK)
    assert leak_warning([m | {"reward": math.nan} for m in steps]) == leak_warning(LEAK)


def test_a_collapse_is_told_while_the_filter_keeps_most():
    told = leak_warning(made(ramp(-2.5, -30), ramp(-0.8, -4), ramp(0.9, 0.6)))
    assert told and "collapses" in told


def test_silence_is_told_although_it_pays():
    "The rewards recover as soon as nothing is said any more."
    empty = [min(0.85, 0.03 * k) for k in range(40)]
    steps = [{"log_reward": -2.5 + 0.03 * k, "log_q/reference": -0.8, "empty_frac": e} for k, e in enumerate(empty)]
    step, told = until_told(steps)
    assert 15 <= step <= 30 and "learns to say nothing (empty_frac " in told and "set empty to 'turn'" in told
    for level in (0.0, 0.4, 0.9):  # it is so from the start, or seldom
        assert leak_warning([m | {"empty_frac": level} for m in steps]) is None


def test_the_first_steps_are_those_of_the_run_and_not_of_its_resume(tmp_path):
    run = Run.open(tmp_path, "run", {}, "0")
    for k, m in enumerate(LEAK[:20]):
        run.log(k + 1, m if k != 3 else {"kept_frac": m["kept_frac"]})  # no reference in this step
    assert leak_warning(LEAK[20:]) is None  # a ruined sampler, measured by itself
    before = steps_before(run.metrics(), 18)
    assert len(before) == 18 and "step" not in before[0] and math.isnan(before[3]["log_reward"])
    told = leak_warning([*before, *LEAK[18:]])
    assert told and "within 30 steps" in told
    assert steps_before(Run.open(tmp_path, "new", {}, "0").metrics(), 5) == []


def test_nan_is_what_is_not_known():
    "A table of metrics has it where a step lacks one."
    nan = [m | {"log_q/reference": math.nan} if k % 2 else m for k, m in enumerate(LEAK)]
    assert leak_warning(nan) == leak_warning([{n: v for n, v in m.items() if v == v} for m in nan])


def test_settings_that_do_nothing_without_references_are_told():
    bare, known = Question({}, [1], None, False), Question({}, [1], [2], False)
    told = reference_note([bare, bare], RGFNSettings())
    assert told and "\n" not in told and "none of the 2 rows" in told
    assert all(f"{name}" in told for name in ("filter 'sum'", "tolerance", "reference true", "`rationale`"))
    assert reference_note([bare, known], RGFNSettings()) is None
    assert "filter 'mean'" in reference_note([bare], RGFNSettings(filter="mean", reference=False))
    assert "tolerance" not in reference_note([bare], RGFNSettings(filter="none"))
    assert reference_note([bare], RGFNSettings(filter="none", reference=False)) is None
    assert reference_note([Question({}, [1], None, True)], RGFNSettings())  # too long, all of them


def test_the_share_of_empty_rationales():
    empty = told(1.0)
    empty["lines"] = [line | {"n_tokens": n} for n in (0, 0, 3) for line in empty["lines"]]
    assert step_metrics([empty, told(1.0)])["empty_frac"] == 0.5


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
    return {
        "lines": [line],
        "reference": None,
        "reference_log_q": None,
        "unusable": False,
        "loss": loss,
        "paired": False,
    } | more


def test_what_trained_nothing_is_not_balanced():
    found = step_metrics([told(9.0), told(None), told(1.0), told(None)])
    assert (found["loss"], found["residual"], found["trained_frac"]) == (5.0, math.sqrt(5), 0.5)
    nothing = step_metrics([told(None)])
    assert nothing["trained_frac"] == 0 and not {"loss", "residual"} & nothing.keys()
    assert step_metrics([told(0.0)])["residual"] == 0  # a perfect balance is one


@pytest.mark.parametrize("pair", [True, False])
def test_the_share_of_questions_with_a_pair(pair):
    line = {"log_q": -2.5, "completion": "z", "log_reward": -2.0}
    outcome = Outcome(torch.tensor(1.0), True, pair, [line], None, None)
    assert told_of(Question({}, [1], None, False), outcome, Recorder())["paired"] == pair
    assert step_metrics([told(1.0, paired=pair), told(1.0)])["paired_frac"] == pair / 2


def test_a_mean_over_steps_is_over_those_that_know():
    assert mean_metrics([]) == {}
    found = mean_metrics([step_metrics([told(4.0)]), step_metrics([told(None)])])
    assert found["loss"] == 4.0 and found["trained_frac"] == 0.5 and "log_reward/reference" not in found

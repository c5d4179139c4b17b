"""The reference-guided filter, exploration, and rubrics as log reward."""

import math
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm_reward.lacot.guide as guide
from vlm_reward.lacot.guide import (
    RubricReward,
    draw_temperatures,
    keep_rationales,
    rationale_logprobs,
    rubric_points,
    threshold,
)
from vlm_reward.lacot.settings import RGFNSettings
from vlm_reward.lacot.subtb import group_loss
from vlm_reward.lacot.turns import encode_questions, follow, rationale_ids, turns_of
from vlm_reward.policy.specimens import specimen
from vlm_reward.rewards.accuracy import accuracy_reward
from vlm_reward.rewards.rubric import Rubric

steady = settings(deadline=None, max_examples=100)
nats = st.floats(-500, -(2**-10), width=32)
drawn = st.lists(st.tuples(nats, st.integers(1, 300)), min_size=1, max_size=8)


@steady
@given(drawn, nats, st.integers(1, 300), st.floats(0, 3, width=32))
def test_the_filter_is_the_papers_rule_and_the_codes(found, reference, size, tolerance):
    rewards, tokens = torch.tensor([r for r, _ in found]), torch.tensor([n for _, n in found])
    total = keep_rationales(rewards, reference, tolerance=tolerance).tolist()
    mean = keep_rationales(
        rewards, reference, mode="mean", tolerance=tolerance, tokens=tokens, reference_tokens=size
    ).tolist()
    for (r, n), by_sum, by_mean in zip(found, total, mean, strict=True):
        if not math.isclose(r, tolerance * reference, rel_tol=1e-5):
            assert by_sum == (r > tolerance * reference)
        if not math.isclose(r / n, tolerance * reference / size, rel_tol=1e-5):
            assert by_mean == (r / n >= tolerance * reference / size)


@steady
@given(drawn, st.floats(-500, 500, width=32), st.floats(1, 3), st.floats(1, 3))
def test_a_greater_tolerance_keeps_no_less(found, reference, one, other):
    "Also where log rewards are positive, as those of a rubric may be."
    rewards = torch.tensor([r for r, _ in found])
    small, large = (keep_rationales(rewards, reference, tolerance=t) for t in sorted((one, other)))
    assert (large | ~small).all() and threshold(reference, max(one, other)) <= reference


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_copy_of_the_reference(mode):
    "At tolerance 1, `mean` keeps it (>=) and `sum` does not (>): the two rules of the sources, to the letter."
    how = {"mode": mode, "tokens": torch.tensor([7]), "reference_tokens": 7}
    assert keep_rationales(torch.tensor([-14.0]), -14.0, **how).tolist() == [mode == "mean"]
    assert keep_rationales(torch.tensor([-14.0]), -14.0, tolerance=1.01, **how).tolist() == [True]


def test_length_matters_for_the_sum_alone():
    rewards, tokens = torch.tensor([-10.0, -20.0, -40.0]), torch.tensor([5, 10, 20])  # -2 nats per token each
    assert keep_rationales(rewards, -20.0, tolerance=1.5).tolist() == [True, True, False]
    mean = {"mode": "mean", "tokens": tokens, "reference_tokens": 10}
    assert keep_rationales(rewards, -20.0, tolerance=1.5, **mean).tolist() == [True] * 3


def test_what_has_no_reward_is_never_kept():
    rewards = torch.tensor([math.nan, -math.inf, math.inf, -1.0])
    for how in ({"reference": None}, {"reference": -9.0}, {"reference": math.nan}, {"reference": -9.0, "mode": "none"}):
        assert keep_rationales(rewards, **how).tolist() == [False, False, False, True]


def test_temperatures():
    noise = torch.Generator().manual_seed(3)
    found = torch.tensor(draw_temperatures(20_000, 0.25, 0.5, noise))
    other = found[found < 1]
    assert abs(len(other) / 20_000 - 0.25) < 0.01
    assert other.min() >= 0.5 and abs(other.mean() - 0.75) < 0.005 and abs(other.std() - 0.5 / 12**0.5) < 0.005
    torch.manual_seed(5)
    one = draw_temperatures(9, 0.5)
    torch.manual_seed(5)
    assert draw_temperatures(9, 0.5) == one
    assert draw_temperatures(9, 0.0) == [1.0] * 9 and draw_temperatures(0) == []


@pytest.fixture(scope="module")
def judge():
    "A policy, its processor and turns, and a row with its inputs."
    model, processor = specimen("llava", hidden=32, heads=2, vision_layers=1)
    turns = turns_of(processor, "section")
    return model, processor, turns


def asked(processor, tiny_rows):
    row = tiny_rows[0] | {"sections": []}
    return row, encode_questions(processor, [row])


def test_points_are_those_of_the_rubric(tiny_rows):
    seen = {}

    def length(completion):
        return len(completion) / 10

    def known(completion, solution, id, prompt=None):
        seen.update(solution=solution, id=id, prompt=prompt)
        return None if "?" in completion else 1.0

    rubric = Rubric({"length": (length, 2.0), "known": (known, 0.5), "idle": (lambda completion: None, 1.0)})
    texts = ["<think>red</think><answer>red</answer>", "<think>?</think><answer></answer>"]
    points = rubric_points(rubric, tiny_rows[0], texts, [[1, 2], [3]])
    want = [rubric.score(text, **tiny_rows[0])["total"] for text in texts]
    assert points.tolist() == pytest.approx(want) and want[1] == pytest.approx(2 * len(texts[1]) / 10)
    assert seen["id"] == tiny_rows[0]["id"] and seen["prompt"] == tiny_rows[0]["prompt"]
    silent = rubric_points(Rubric({"idle": lambda completion: None}), tiny_rows[0], texts, [[1], [2]])
    assert silent.isnan().all()


def test_ids_that_a_rubric_sees_are_those_of_the_texts(judge, tiny_rows):
    model, processor, turns = judge
    row, inputs = asked(processor, tiny_rows)
    seen = {}

    class Watching:
        reward_weights = (1.0,)

        @staticmethod
        def watch(completions, completion_ids, prompts, **columns):
            seen.update(texts=[c[0]["content"] for c in completions], ids=completion_ids, prompts=prompts)
            return [1.0] * len(completions)

        reward_funcs = (watch,)

    ids = [rationale_ids(processor, text, turns) for text in ("red", "")]
    judged = RubricReward(Watching, answer_tokens=3).judge(model, processor, turns, row, inputs, ids)
    assert seen["texts"] == judged.texts and seen["prompts"] == [row["prompt"]] * 2
    assert judged.texts[0].startswith("<think>red</think><answer>") and judged.texts[1].startswith("<think></think>")
    assert all(own[: len(z)] == z for own, z in zip(seen["ids"], ids, strict=True))


def test_prior_and_temperature(judge, tiny_rows):
    "R = log pi(Z T | X) + r / tau, the prior by a forward of its own for each rationale."
    model, processor, turns = judge
    row, inputs = asked(processor, tiny_rows)
    ids = [rationale_ids(processor, text, turns) for text in ("red", "a blue one", "")]
    rubric = Rubric({"length": lambda completion: len(completion) / 7})
    both = [
        RubricReward(rubric, prior, 4, 0.0).judge(model, processor, turns, row, inputs, ids, tau)
        for prior, tau in ((True, 0.5), (False, 0.5), (False, 1.0))
    ]
    torch.testing.assert_close(both[1].log_rewards, 2 * both[2].log_rewards)
    prior = []
    for z in ids:
        whole = follow(model, inputs, [[*turns.opening, *z, turns.stop]])
        with torch.no_grad():
            logits = model(**whole).logits[0, -len(z) - 2 : -1].log_softmax(-1)
        prior.append(logits.gather(-1, torch.tensor([*z, turns.stop])[:, None]).sum())
    torch.testing.assert_close(rationale_logprobs(model, turns, inputs, ids), torch.stack(prior), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[0].log_rewards - both[1].log_rewards, torch.stack(prior), atol=1e-3, rtol=1e-3)


def trained_by_balance(prior, tau, points, steps=1500, copies=8):
    "A table of rationales, drawn evenly and paid anew in each step, that a squared balance has trained."
    logits = torch.zeros(len(prior), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    fade = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    z = torch.arange(len(prior)).repeat(copies)
    for _ in range(steps):
        optimizer.zero_grad()
        group_loss((prior.log()[z] + points(z) / tau), logits.log_softmax(0)[z]).backward()
        optimizer.step()
        fade.step()
    return logits.softmax(0).detach()


@pytest.mark.parametrize("answers", ["greedy", "sampled"])
def test_which_target_a_stochastic_answerer_leads_to(answers):
    "exp(E r / tau), not E exp(r / tau); with greedy answers, points are a function of Z and both are one."
    prior, right, tau = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.3, 0.1, 0.0]), 0.3
    noise = torch.Generator().manual_seed(1)
    greedy = torch.tensor([1.0, 0.0, 0.0])
    if answers == "greedy":
        found, chance = trained_by_balance(prior, tau, lambda z: greedy[z]), greedy
    else:
        found, chance = trained_by_balance(prior, tau, lambda z: torch.bernoulli(right[z], generator=noise)), right
    mean_inside = (prior.log() + chance / tau).softmax(0)
    mean_outside = prior * (1 - chance + chance * math.exp(1 / tau))
    mean_outside = mean_outside / mean_outside.sum()
    apart = [(found - target).abs().sum().item() / 2 for target in (mean_inside, mean_outside)]
    assert apart[0] < 0.02
    assert apart[1] < 0.02 if answers == "greedy" else apart[1] > 0.1


def test_answers_are_greedy_unless_told_otherwise(judge, tiny_rows, monkeypatch):
    "So that points are a function of the rationale: asking twice gives the same, and equal rationales are paid alike."
    model, processor, turns = judge
    row, inputs = asked(processor, tiny_rows)
    rubric = Rubric({"length": lambda completion: len(completion) / 7})
    ids = [rationale_ids(processor, text, turns) for text in ("red", "a blue one", "red")]
    one, two = (RubricReward(rubric).judge(model, processor, turns, row, inputs, ids) for _ in range(2))
    assert one.texts == two.texts and one.texts[0] == one.texts[2] and torch.equal(one.log_rewards, two.log_rewards)
    assert RGFNSettings().answer_temperature == RubricReward(rubric).answer_temperature == 0
    seen, write = [], guide.write_answers
    monkeypatch.setattr(guide, "write_answers", lambda *a, **o: seen.append(o["temperature"]) or write(*a, **o))
    RubricReward(rubric, answer_temperature=0.7).judge(model, processor, turns, row, inputs, ids)
    assert seen == [0.7]


def test_sections_are_those_of_the_text_that_is_read(judge, tiny_rows):
    "A row whose whole completion is the answer must not have the thought read as part of it."
    row = tiny_rows[0] | {"sections": []}
    text = f"<think>it is {row['solution']}</think><answer>{row['solution']}</answer>"
    rubric = Rubric({"accuracy": accuracy_reward})
    assert rubric_points(rubric, row, [text], [[1]]).tolist() == [1.0]


def test_a_judge_is_asked_from_any_thread(judge, tiny_rows):
    model, processor, turns = judge
    row, inputs = asked(processor, tiny_rows)
    reward, found = RubricReward(Rubric({"accuracy": accuracy_reward}), answer_tokens=3, answer_temperature=0.0), []
    ids = [rationale_ids(processor, "red", turns)]
    ask = lambda: found.append(reward.judge(model, processor, turns, row, inputs, ids).log_rewards.item())  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    ask()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mode": "median"}, "filter 'median'"),
        ({"tolerance": -0.5}, "tolerance -0.5"),
        ({"tolerance": math.nan}, "tolerance nan"),
        ({"mode": "mean"}, "wants the scored tokens"),
        ({"mode": "mean", "tokens": torch.tensor([3]), "reference_tokens": 0}, "got tensor.* and 0 of the reference"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        keep_rationales(torch.tensor([-1.0]), -2.0, **wrong)
    assert "\n" not in str(error.value)


def test_the_guide_and_the_settings_do_without_trl():
    "Which takes seconds to load, and is for GRPO alone."
    code = "import vlm_reward.lacot.guide, vlm_reward.lacot.settings, sys; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""A step of reference-guided training: every setting reaches what it is meant for."""

import itertools
import math

import pytest
import torch
from test_lacot_rgfn import toy, toy_rows, toy_settings
from transformers import modeling_utils

import vlm_reward.lacot.rgfn as rgfn
import vlm_reward.lacot.step as step
from vlm_reward.core.runs import Run
from vlm_reward.lacot.drawing import Rationale, never_drawn
from vlm_reward.lacot.pair import add_lora
from vlm_reward.lacot.rgfn import train_rgfn
from vlm_reward.lacot.settings import RGFNSettings, pace_of
from vlm_reward.lacot.step import (
    Paid,
    Work,
    balance_loss,
    balance_questions,
    choose,
    distinct,
    draw_step,
    pay_likelihood,
    prepare_question,
    without_dropout,
)
from vlm_reward.lacot.subtb import Bounds, sampler_scores
from vlm_reward.lacot.token_reward import token_rewards
from vlm_reward.lacot.turns import encode_questions, turns_of

TEXTS = [[14, 15, 14, 14], [15], [], [14, 15, 15]]


@pytest.fixture(scope="module")
def asked():
    "A policy, its turns, a question with a reference, and its inputs."
    model, processor = toy()
    turns, rows = turns_of(processor, "section"), toy_rows(rationale="a b")
    return model, processor, turns, prepare_question(processor, turns, rows[0], 5), encode_questions(processor, rows)


def test_temperatures_reach_the_draws(asked, monkeypatch):
    "Each row is drawn once, at the temperature that is its own, and gets what was drawn for it."
    _, processor, turns, *_ = asked
    heat, calls, rows = [0.6, 1.0, 0.6, 0.8], [], toy_rows(4)

    def note(model, processor, turns, rows, *, temperature, **limits):
        calls.append(([row["id"] for row in rows], temperature, limits))
        return [[Rationale([temperature], True, row["id"])] for row in rows]

    monkeypatch.setattr(step, "draw_temperatures", lambda *_: heat)
    monkeypatch.setattr(step, "draw_rationales", note)
    settings = toy_settings(rationales=3, min_tokens=1, max_tokens=2)
    drawn = draw_step(None, processor, turns, rows, settings)
    limits = {"n": 3, "min_tokens": 1, "max_tokens": 2}
    assert sorted(calls, key=str) == sorted(
        [(["toy-0", "toy-2"], 0.6, limits), (["toy-1"], 1.0, limits), (["toy-3"], 0.8, limits)], key=str
    )
    assert [(one.text, one.token_ids[0]) for (one,) in drawn] == [(f"toy-{i}", heat[i]) for i in range(4)]


def test_exploration_settings_reach_the_temperatures(asked, monkeypatch):
    _, processor, turns, *_ = asked
    seen = []
    monkeypatch.setattr(step, "draw_temperatures", lambda *how: seen.append(how) or [1.0] * how[0])
    monkeypatch.setattr(step, "draw_rationales", lambda model, processor, turns, rows, **_: [[]] * len(rows))
    draw_step(None, processor, turns, toy_rows(3), toy_settings(explore=0.4, explore_low=0.7))
    assert seen == [(3, 0.4, 0.7)]


def test_with_a_least_length_no_line_starts_before_it(asked):
    "What the sampler is paid does not depend on the worth of no rationale, also where log rewards lie on lines."
    model, _, turns, question, inputs = asked
    paid = [
        pay_likelihood(model, turns, question, inputs, TEXTS, toy_settings(interval=3, min_tokens=2, empty=empty), 1.0)
        for empty in ("turn", "off")
    ]
    for one, two in zip(*(some.states for some in paid), strict=True):
        assert torch.equal(one[2:], two[2:])


@pytest.mark.parametrize("sizes", [(4, 2, 3), (2, 2), (3,)])
def test_with_a_least_length_states_that_can_end_and_rationales_are_balanced(sizes):
    "The naive loops: pairs of states with two tokens or more, and pairs of whole rationales."
    generator, least = torch.Generator().manual_seed(1), 2
    states = [torch.randn(n + 1, generator=generator) for n in sizes]
    tokens = [torch.randn(n, generator=generator).requires_grad_() for n in sizes]
    ends = [
        torch.cat([torch.full((least,), -torch.inf), torch.randn(n + 1 - least, generator=generator)]) for n in sizes
    ]
    c = [torch.cat([z.new_zeros(1), z.cumsum(0)]) + e - r for r, z, e in zip(states, tokens, ends, strict=True)]
    within = [[(a - b).square() for a, b in itertools.combinations(some[least:], 2)] for some in c]
    between = [(a - b).square() for a, b in itertools.combinations([some[-1] for some in c], 2)]
    want = sum(torch.stack(pairs).mean() if pairs else torch.zeros(()) for pairs in within) / len(sizes)
    want = want + (torch.stack(between).mean() if between else 0.0)
    loss = balance_loss(states, tokens, ends, RGFNSettings(min_tokens=least))
    torch.testing.assert_close(loss, want)
    ours, theirs = (torch.autograd.grad(one, tokens, retain_graph=True) for one in (loss, want))
    for some, others in zip(ours, theirs, strict=True):
        torch.testing.assert_close(some, others)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_gamma_weighs_pairs_by_their_distance(gamma):
    "The naive loop: pairs k states apart weigh gamma^(k - 1)."
    noise = torch.Generator().manual_seed(0)
    sizes = (1, 3, 6)
    states, stops = ([torch.randn(n + 1, generator=noise) for n in sizes] for _ in range(2))
    logprobs, losses = [torch.randn(n, generator=noise) for n in sizes], []
    for reward, own, stop in zip(states, logprobs, stops, strict=True):
        total = weight = 0.0
        for i in range(len(reward)):
            for j in range(i + 1, len(reward)):
                apart = reward[i] + own[i:j].sum() + stop[j] - reward[j] - stop[i]
                total, weight = total + gamma ** (j - i - 1) * apart.item() ** 2, weight + gamma ** (j - i - 1)
        losses.append(total / weight)
    found = balance_loss(states, logprobs, stops, toy_settings(gamma=gamma))
    assert found.item() == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_interval_and_empty_reach_the_rewards(asked):
    model, _, turns, question, inputs = asked
    exact, differ = token_rewards(model, turns, inputs, TEXTS, question.answer, empty="turn"), []
    for interval, empty in ((3, "turn"), (1, "off"), (3, "off")):
        settings = toy_settings(interval=interval, empty=empty)
        paid = pay_likelihood(model, turns, question, inputs, TEXTS, settings, 1.0)
        want = token_rewards(model, turns, inputs, TEXTS, question.answer, interval=interval, empty=empty)
        for one, two in zip(paid.states, want, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
        differ.append(max((a - b).abs().max().item() for a, b in zip(want, exact, strict=True)))
    assert min(differ) > 0.01  # the settings do change something here


@pytest.mark.parametrize("empty", ["off", "turn"])
def test_the_temperature_divides_the_states_and_nothing_else(asked, empty):
    model, _, turns, question, inputs = asked
    plain, hot = (pay_likelihood(model, turns, question, inputs, TEXTS, toy_settings(empty=empty), t) for t in (1, 0.4))
    for one, two in zip(plain.states, hot.states, strict=True):
        torch.testing.assert_close(two, one / 0.4)
    assert torch.equal(plain.log_rewards, hot.log_rewards)
    assert torch.equal(plain.log_rewards, torch.stack([state[-1] for state in plain.states]))
    sizes = [len(z) + 1 + len(question.answer) - (empty == "off" and not z) for z in TEXTS]
    assert hot.tokens.tolist() == plain.tokens.tolist() == sizes


def test_the_filter_is_the_one_that_was_asked_for():
    "A long rationale whose sum is poor and whose mean is good, and a short one of which the reverse holds."
    drawn = [Rationale([14] * 8, True, ""), Rationale([14], True, "")]
    paid = Paid([], torch.tensor([-30.0, -15.0, -20.0]), torch.tensor([20, 4, 8]))
    work = Work({}, drawn, [[14] * 8, [14], [15]], paid)
    found = {name: choose(work, RGFNSettings(filter=name, reference=False), 1.0) for name in ("sum", "mean", "none")}
    assert found == {"sum": ([1], [False, True]), "mean": ([0], [True, False]), "none": ([0, 1], [True, True])}
    assert choose(work, RGFNSettings(filter="sum"), 1.6) == ([0, 1, 2], [True, True])  # lenient, and the reference


def test_the_pace_of_a_step_is_used_and_told(monkeypatch):
    "Tolerance and reward temperature of step k at step k, in each of its micro-batches."
    used, log, pay, balance = [], [], rgfn.pay_likelihood, rgfn.balance_questions
    monkeypatch.setattr(rgfn, "pay_likelihood", lambda *a: used.append(("tau", a[-1])) or pay(*a))
    monkeypatch.setattr(rgfn, "balance_questions", lambda *a: used.append(("delta", a[-2])) or balance(*a))
    how = {"steps": 4, "anneal_steps": 3, "tolerance": 2.5, "reward_temperature": 2.0, "questions_per_step": 2}
    settings = toy_settings(**how, accumulate=2, reward_temperature_end=0.5)
    train_rgfn(*toy(), toy_rows(2, rationale="a"), settings, progress=lambda _, m: log.append(m))
    want = [pace_of(settings, k) for k in range(4)]
    assert want[0] == (2.5, 2.0) and want[1] != want[2] != want[3] == (1.0, 0.5)
    assert used == [(name, value) for d, t in want for _ in range(2) for name, value in (("tau", t), ("delta", d))]
    assert [(m["tolerance"], m["reward_temperature"]) for m in log] == want


def test_a_rubric_gets_the_temperature_of_its_step(monkeypatch):
    used, pay = [], rgfn.pay_points

    class Flat:
        reward_weights = (1.0,)
        reward_funcs = (lambda completions, **columns: [1.0] * len(completions),)

    monkeypatch.setattr(rgfn, "pay_points", lambda *a: used.append(a[-1]) or pay(*a))
    how = {"steps": 3, "anneal_steps": 2, "reward_temperature": 2.0, "reward_temperature_end": 0.5}
    train_rgfn(*toy(), toy_rows(), toy_settings(**how, balance="group"), rubric=Flat)
    assert used == [2.0, 1.25, 0.5]


def test_distinct():
    assert distinct([]) == ([], [])
    assert distinct([[1], (2, 3), torch.tensor([1])]) == ([[1], [2, 3]], [0, 1, 0])


REPEATED = [[14, 15], [15], [14, 15], [], [14, 15], []]


def work_of(model, turns, question, inputs, texts, settings):
    drawn = [Rationale(z, True, "") for z in texts]
    return Work(question.row, drawn, texts, pay_likelihood(model, turns, question, inputs, texts, settings, 1.0))


@pytest.mark.parametrize("balance", ["subtb", "group"])
def test_equal_draws_are_scored_once_and_weigh_as_many(asked, monkeypatch, balance):
    "Rewards, loss and gradient are those of scoring each draw by itself."
    model, _, turns, question, inputs = asked
    settings = toy_settings(balance=balance)
    plain = token_rewards(model, turns, inputs, REPEATED, question.answer, empty="turn")
    logprobs, stops = sampler_scores(model, turns, inputs, REPEATED)
    want = balance_loss(plain, logprobs, stops, settings)
    gradient = torch.autograd.grad(want, model.lm_head.weight)[0]
    read, score, reward = [], step.sampler_scores, step.token_rewards
    monkeypatch.setattr(step, "sampler_scores", lambda *a, **o: read.append(a[3]) or score(*a, **o))
    monkeypatch.setattr(step, "token_rewards", lambda *a, **o: read.append(a[3]) or reward(*a, **o))
    work = work_of(model, turns, question, inputs, REPEATED, settings)
    for one, two in zip(work.paid.states, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    (found,) = balance_questions(model, turns, inputs, [work], settings, 1.0)
    assert read == [[[14, 15], [15], []]] * 2
    torch.testing.assert_close(found.loss, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found.loss, model.lm_head.weight)[0], gradient, atol=1e-3, rtol=1e-3)
    assert len(found.lines) == 6 and len({line["log_q"] for line in found.lines}) == 3


def test_the_same_text_of_two_questions_is_two_texts(asked):
    model, processor, turns, question, _ = asked
    rows = toy_rows(2)
    both = [encode_questions(processor, [row]) for row in rows]
    works = [work_of(model, turns, question, one, [[14], [14]], toy_settings()) for one in both]
    found = balance_questions(model, turns, encode_questions(processor, rows), works, toy_settings(), 1.0)
    alone = [
        balance_questions(model, turns, one, [w], toy_settings(), 1.0)[0] for one, w in zip(both, works, strict=True)
    ]
    assert [f.loss.item() for f in found] == pytest.approx([f.loss.item() for f in alone], rel=1e-3)
    assert alone[0].lines[0]["log_q"] != alone[1].lines[0]["log_q"]


@pytest.mark.parametrize("balance", ["subtb", "group"])
def test_what_has_no_pair_trains_nothing(asked, balance):
    model, _, turns, question, inputs = asked
    settings = toy_settings(balance=balance, filter="sum")
    cases = {(): False, ((14,),): balance == "subtb", ((), (14,)): True, ((), ()): False}
    for texts, trained in cases.items():
        work = work_of(model, turns, question, inputs, [list(z) for z in texts or [(14,)]], settings)
        if not texts:  # there is something, and it is not known what it is worth
            work = work._replace(paid=work.paid._replace(log_rewards=torch.tensor([math.nan])))
        (found,) = balance_questions(model, turns, inputs, [work], settings, 1.0)
        assert found.trained == trained and found.loss.requires_grad
        assert trained or found.loss.item() == 0


@pytest.mark.parametrize(
    ("drawn", "reference", "strict", "pair"),
    [
        ([[14], [15]], None, False, True),
        ([[14], [14]], [15], False, True),  # a drawn rationale, and the reference
        ([[14], [14]], [14], False, False),  # the reference, drawn twice
        ([[14], [14]], None, False, False),
        ([[14], [15]], [14, 15], True, False),  # the filter leaves the reference alone
        ([[]], [], False, False),
    ],
)
def test_two_texts_that_differ_are_a_pair(asked, drawn, reference, strict, pair):
    "What precedes a least length is learned there alone."
    model, _, turns, question, inputs = asked
    texts = drawn if reference is None else [*drawn, reference]
    settings = toy_settings(filter="sum" if strict else "none")
    paid = pay_likelihood(model, turns, question, inputs, texts, settings, 1.0)
    work = Work({"id": "a"}, [Rationale(z, True, "") for z in drawn], texts, paid)
    (found,) = balance_questions(model, turns, inputs, [work], settings, 0.0)
    assert found.paired == pair and sum(line["kept"] for line in found.lines) == (0 if strict else len(drawn))


def shaky(rank):
    "A policy with dropout in its attention, and in its adapters, if it has any."
    model, processor = toy(layers=2)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    torch.manual_seed(0)
    return (add_lora(model, rank, dropout=0.5) if rank else model), processor


@pytest.mark.parametrize("rank", [0, 2])
def test_the_sampler_is_scored_without_dropout(rank, tmp_path, monkeypatch):
    model, processor = shaky(rank)
    inputs, turns = encode_questions(processor, toy_rows()), turns_of(processor, "section")

    def score(text):
        return sampler_scores(model, turns, inputs, [text])[0][0].sum().item()

    model.train()
    assert len({score([14, 15]) for _ in range(3)}) == 3  # there is noise to be kept out
    without_dropout(model)
    assert len({score([14, 15]) for _ in range(3)}) == 1
    assert sampler_scores(model, turns, inputs, [[14, 15]])[0][0].requires_grad
    run, seen, draw = Run.open(tmp_path, "run", {}, "0"), [], step.draw_rationales
    monkeypatch.setattr(step, "draw_rationales", lambda *a, **o: seen.extend(draw(*a, **o)) or seen[-1:])
    train_rgfn(model.eval(), processor, toy_rows(), toy_settings(steps=1, rationales=8), run=run)
    with torch.no_grad():  # before the first step, the sampler is the policy as it came, without any noise
        texts, bounds = [z.token_ids for z in seen[0]], Bounds(0, 3, tuple(never_drawn(model, processor, turns.stop)))
        logprobs, stops = sampler_scores(toy(layers=2)[0], turns, inputs, texts, bounds=bounds)
    want = [(z.sum() + end[-1]).item() for z, end in zip(logprobs, stops, strict=True)]
    assert run.rollouts().log_q.tolist() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_goes_on_without_dropout(monkeypatch, rank):
    "Layers are still read twice to save memory, and nothing else changes."
    results, calls = [], []
    original = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **o: calls.append(1) or original(*a, **o))
    for more in ({}, {"gradient_checkpointing": True}):
        model, processor = shaky(0)
        assert not calls
        results.append(train_rgfn(model, processor, toy_rows(), toy_settings(trainer=more, lora_rank=rank)))
    assert calls
    for one, two in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)

"Forecast: weights by naive loops, targets by enumeration, scores by the other way of scoring pairs."

import math
import runpy
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.lacot.decoding import pair_scores
from vlm_reward.lacot.drawing import draw_rationales
from vlm_reward.lacot.forecast import (
    effective_size,
    forecast,
    forecast_table,
    importance_weights,
    plot_forecast,
    posterior_log_weights,
    posterior_mean,
    question_means,
    score_drawings,
    value_columns,
)
from vlm_reward.lacot.pair import add_lora, frozen_copy
from vlm_reward.lacot.posterior import all_strings, make_problem, string_logprobs
from vlm_reward.lacot.turns import answer_ids, encode_questions, rationale_ids, turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.worlds.scenes import scene_rows

drawings = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-900, 900), st.floats(-5, 5)), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def pocket():
    model, processor = load_policy("pocket")
    return model, processor, turns_of(processor, "section")


def by_question(lines):
    "Log weights and values of each question, in the order in which questions appear."
    found = {}
    for question, log_weight, value in lines:
        found.setdefault(question, []).append((log_weight, value))
    return list(found.values())


def softmax(logs):
    "By Python's own numbers."
    top = max(logs)
    parts = [math.exp(log - top) for log in logs]
    return [part / math.fsum(parts) for part in parts]


@settings(deadline=None, max_examples=100)
@given(drawings, st.floats(-1e4, 1e4))
def test_weights_are_a_softmax_within_each_question(lines, shift):
    questions, logs, _ = zip(*lines, strict=True)
    weights = importance_weights(logs, questions)
    for question in set(questions):
        own = [i for i, name in enumerate(questions) if name == question]
        assert weights[own] == pytest.approx(softmax([logs[i] for i in own]), abs=1e-12)
    moved = [log + shift * (name == "a") for name, log in zip(questions, logs, strict=True)]
    assert importance_weights(moved, questions) == pytest.approx(weights, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(drawings, st.floats(1e-3, 1e3))
def test_effective_size_is_kishs(lines, scale):
    questions, logs, _ = zip(*lines, strict=True)
    weights = importance_weights(logs, questions)
    sizes = effective_size(weights * scale, questions)
    want = [1 / math.fsum(w**2 for w in softmax([log for log, _ in own])) for own in by_question(lines)]
    assert sizes == pytest.approx(want)
    assert ((sizes >= 1 - 1e-9) & (sizes <= [len(own) + 1e-9 for own in by_question(lines)])).all()


@settings(deadline=None, max_examples=50)
@given(drawings, st.randoms(use_true_random=False))
def test_a_posterior_mean_is_a_mean_of_ratios(lines, rng):
    questions, logs, values = zip(*lines, strict=True)
    want = []
    for own in by_question(lines):
        shares = softmax([log for log, _ in own])
        want.append(math.fsum(share * value for share, (_, value) in zip(shares, own, strict=True)))
    assert question_means(values, logs, questions) == pytest.approx(want, abs=1e-9)
    found = posterior_mean(values, logs, questions, n=50)
    assert found.estimate == pytest.approx(np.mean(want), abs=1e-9)
    assert min(want) - 1e-9 <= found.low <= found.high <= max(want) + 1e-9
    other = list(lines)
    rng.shuffle(other)
    names, again, numbers = zip(*other, strict=True)
    assert posterior_mean(numbers, again, names, n=50).estimate == pytest.approx(found.estimate, abs=1e-9)


def test_the_interval_draws_questions_not_drawings():
    once = posterior_mean([0, 1, 0, 1], [0, 0, 0, 0], list("abcd"), n=400)
    often = posterior_mean(np.repeat([0, 1, 0, 1], 50), np.zeros(200), np.repeat(list("abcd"), 50), n=400)
    assert tuple(often) == pytest.approx(tuple(once))


def test_series_with_any_index_and_any_labels_are_read_by_place():
    table = pd.DataFrame({"q": ["b", "a", "b"], "w": [0.0, 0.0, math.log(3)], "f": [1.0, 5.0, 2.0]}, index=[7, 3, 7])
    assert question_means(table["f"], table["w"], table["q"]) == pytest.approx([1.75, 5.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_log_weight_is_refused(bad):
    with pytest.raises(ValueError, match="no logarithm of a weight"):
        importance_weights([0.0, bad])


def test_errors_name_the_question():
    with pytest.raises(ValueError, match="question 'row 7' has a weight"):
        importance_weights([0.0, -math.inf], ["row 3", "row 7"])
    with pytest.raises(ValueError, match="no weight at all"):
        effective_size([0.0])
    with pytest.raises(ValueError, match="finite numbers"):
        effective_size([math.nan])
    with pytest.raises(ValueError, match="at least one number"):
        posterior_mean([], [], [])


def cut_short(problem, answer, longest):
    "All drawings that are cut off after `longest` letters, their chances, and what they are made of."
    table, pi, lines = problem.prior, string_logprobs(problem.prior).exp(), []
    for number, text in enumerate(problem.strings):
        if len(text) > longest:
            continue
        letters = [("abc".index(letter), problem.strings.index(text[:i])) for i, letter in enumerate(text)]
        prior = sum(table[state, letter].item() for letter, state in letters)
        begins = [other.startswith(text) for other in problem.strings]
        full = len(text) == longest
        chance = pi[torch.tensor(begins)].sum().item() if full else pi[number].item()
        worth = problem.answer_logprobs[problem.answers.index(answer), number].item()
        line = {"prior": prior, "end": table[number, -1].item(), "answer": worth, "full": full}
        lines.append(line | {"chance": chance, "letters": len(text)})
    return pd.DataFrame(lines)


@pytest.mark.parametrize("longest", [1, 2, 3, 4])
@pytest.mark.parametrize("tau", [1.0, 0.7, 2.0])
def test_weights_lead_from_what_is_drawn_to_the_target_also_where_drawings_are_cut_off(longest, tau):
    problem = make_problem({"bcb": ("yes", 0.05), "bb": ("yes", 0.03), "a": ("no", 0.08), "cac": ("yes", 0.1)})
    lines = cut_short(problem, "yes", longest)
    assert lines["chance"].sum() == pytest.approx(1, abs=1e-5)
    assert len(lines) == len(all_strings("abc", longest))
    led = lines["chance"] * np.exp(posterior_log_weights(lines, reward_temperature=tau))
    target = np.exp((lines["prior"] + lines["end"] + lines["answer"]) / tau)
    assert (led / led.sum()).to_numpy() == pytest.approx((target / target.sum()).to_numpy(), abs=1e-5)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_reward_temperature_is_above_0(tau):
    lines = pd.DataFrame({"prior": [-1.0], "end": [-1.0], "answer": [-1.0], "full": [False]})
    with pytest.raises(ValueError, match="above 0"):
        posterior_log_weights(lines, reward_temperature=tau)


def test_scores_are_those_of_pairs(pocket):
    model, processor, turns = pocket
    rows = scene_rows("relation", 3, seed=5)
    drawn = score_drawings(model, processor, turns, rows, frozen=model, n=5, max_tokens=40, seed=3)
    same = draw_rationales(model, processor, turns, rows, n=5, max_tokens=40, seed=3)
    assert drawn["text"].tolist() == [z.text for some in same for z in some]
    assert drawn["tokens"].tolist() == [len(z.token_ids) for some in same for z in some]
    for number, (row, some) in enumerate(zip(rows, same, strict=True)):
        gold = answer_ids(turns, processor, row["solution"])
        inputs = encode_questions(processor, [row])
        thoughts, matrix = pair_scores(model, turns, inputs, [z.token_ids for z in some], [gold])
        own = drawn[drawn["question"] == number]
        assert (own["prior"] + own["end"]).to_numpy() == pytest.approx(thoughts.numpy(), abs=1e-4)
        assert own["answer"].to_numpy() == pytest.approx(matrix[0].numpy(), abs=1e-4)


def test_the_answerer_scores_what_the_sampler_draws(pocket):
    model, processor, turns = pocket
    rows, how = scene_rows("relation", 2, seed=6), {"n": 4, "max_tokens": 40, "seed": 0}
    sampler = add_lora(frozen_copy(model), 4)
    with torch.no_grad():
        for name, parameter in sampler.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    off = score_drawings(sampler, processor, turns, rows, **how)
    apart = score_drawings(sampler, processor, turns, rows, frozen=model, **how)
    alone = score_drawings(sampler, processor, turns, rows, frozen=sampler, **how)
    assert off["text"].tolist() == apart["text"].tolist() == alone["text"].tolist()
    parts = ["prior", "end", "answer"]
    assert off[parts].to_numpy() == pytest.approx(apart[parts].to_numpy(), abs=1e-4)
    assert np.abs(off[parts].to_numpy() - alone[parts].to_numpy()).max() > 0.1


def test_without_an_answerer_nothing_is_scored(pocket):
    model, processor, turns = pocket
    with pytest.raises(ValueError, match="no adapters to switch off"):
        score_drawings(model, processor, turns, scene_rows("relation", 1, seed=6), n=1)


def test_drawings_that_are_all_cut_off_have_weights(pocket):
    model, processor, turns = pocket
    rows = scene_rows("relation", 2, seed=6)
    drawn = score_drawings(model, processor, turns, rows, frozen=model, n=6, max_tokens=2)
    assert drawn["full"].all() and (drawn["tokens"] == 2).all()
    logs = posterior_log_weights(drawn)
    assert logs == pytest.approx((drawn["end"] + drawn["answer"]).to_numpy())
    assert np.isfinite(question_means(drawn["tokens"], logs, drawn["question"])).all()


def test_a_forecast_is_made_of_its_parts(pocket):
    model, processor, turns = pocket
    rows, values = scene_rows("relation", 4, seed=7), {"words": lambda row, text: len(text.split())}
    table = forecast(model, processor, turns, rows, values, n=6, max_tokens=40, reward_temperature=0.7)
    drawn = score_drawings(model, processor, turns, rows, frozen=model, n=6, max_tokens=40)
    logs = posterior_log_weights(drawn, reward_temperature=0.7)
    pd.testing.assert_frame_equal(table, forecast_table(value_columns(drawn, rows, values), logs, drawn["question"]))
    sizes = effective_size(importance_weights(logs, drawn["question"]), drawn["question"])
    assert table["effective size"].tolist() == pytest.approx([sizes.mean()] * 3)
    for line in table.to_dict("records"):
        assert line["difference"].estimate == pytest.approx(line["posterior"].estimate - line["sampler"].estimate)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-20, 0)), min_size=1, max_size=12))
def test_the_answer_never_becomes_less_likely_at_temperature_1(lines):
    questions, answer = zip(*lines, strict=True)
    chance = np.exp(answer)
    own, target = (question_means(chance, logs, questions) for logs in (np.zeros(len(lines)), answer))
    assert (target >= own - 1e-12).all()
    for number, name in enumerate(dict.fromkeys(questions)):
        w = chance[[question == name for question in questions]]
        assert target[number] == pytest.approx(np.mean(w**2) / np.mean(w))


def test_values_see_their_row_and_cannot_hide_others(pocket):
    drawn = pd.DataFrame({"question": [1, 0], "text": ["x", "y"], "tokens": [1, 1], "answer": [0.0, -1.0]})
    rows = [{"id": "first"}, {"id": "second"}]
    table = value_columns(drawn, rows, {"seen": lambda row, text: (row["id"], text) == ("second", "x")})
    assert table["seen"].tolist() == [1.0, 0.0]
    assert table["answer probability"].tolist() == pytest.approx([1.0, math.exp(-1)])
    with pytest.raises(ValueError, match="'tokens', which is there already"):
        value_columns(drawn, rows, {"tokens": lambda row, text: 0.0})


def test_the_picture_holds_both_and_their_intervals():
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    values = pd.DataFrame({"one": [0.0, 1.0, 0.0, 0.0], "other": [1.0, 0.0, 1.0, 1.0]})
    table = forecast_table(values, [0.0, 2.0, 0.0, 0.0], list("aabb"))
    ax = plot_forecast(Figure().subplots(), table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "other"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["sampler", "posterior"]
    drawn = [line.get_xdata().tolist() for line in ax.lines if len(line.get_xdata()) == 2]
    assert [interval.estimate for interval in table["sampler"]] in [pytest.approx(xs) for xs in drawn]


def test_a_forecast_of_a_statement_is_that_of_the_reference(pocket):
    "A rationale that is forced on the sampler has the same log weight wherever its line stands."
    model, processor, turns = pocket
    (row,) = scene_rows("relation", 1, seed=8)
    ids = rationale_ids(processor, "it looks like it", turns)
    thoughts, matrix = pair_scores(
        model, turns, encode_questions(processor, [row]), [ids], [answer_ids(turns, processor, row["solution"])]
    )
    drawn = score_drawings(model, processor, turns, [row], frozen=model, n=32, max_tokens=40)
    own = drawn[drawn["text"] == "it looks like it"]
    assert len(own) and np.ptp(posterior_log_weights(own)) == 0
    want = thoughts.item() * (1 / 0.7 - 1) + matrix.item() / 0.7
    assert posterior_log_weights(own, reward_temperature=0.7)[0] == pytest.approx(want, abs=1e-3)


def test_the_benchmark_calls_unplaced_what_does_not_place_both_objects():
    "A guess of the chapter, which places nothing, is one kind of it; the benchmark's column has another name."
    place = Path(__file__).resolve().parent.parent / "benchmarks/forecast.py"
    if not place.is_file():
        pytest.skip("no benchmarks beside the tests")
    unplaced = runpy.run_path(str(place), run_name="benchmark")["unplaced"]
    (row,) = scene_rows("relation", 1, seed=8)
    asked = [f"{o['colour']} {o['shape']}" for o in row["objects"][:2]]
    assert unplaced(row, "It looks like it.")
    assert unplaced(row, f"The {asked[0]} is at a 2.")
    assert not unplaced(row, row["rationale"])

"Honesty: leaks by naive search, gaps by plain forwards, correlations by numpy, and what they must not depend on."

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_reward.core.rows import make_row
from vlm_reward.core.stats import wilson
from vlm_reward.lacot.honesty import (
    answer_logprobs,
    leak_place,
    leak_share,
    mean_parts,
    plot_parts,
    swap_gaps,
    within_correlation,
)
from vlm_reward.lacot.token_reward import token_rewards
from vlm_reward.lacot.turns import answer_ids, encode_questions, follow, rationale_ids, turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.policy.specimens import specimen
from vlm_reward.worlds.scenes import scene_rows

words = st.lists(st.sampled_from(["left", "red", "cup", "of", "a"]), max_size=12)


@settings(deadline=None, max_examples=200)
@given(words, words.filter(lambda some: 1 <= len(some) <= 3))
def test_leak_place_is_the_first_place(rationale, answer):
    places = [i for i in range(len(rationale)) if rationale[i : i + len(answer)] == answer]
    want = places[0] / len(rationale) if places else None
    assert leak_place(" ".join(rationale), " ".join(answer)) == want
    assert leak_place("  ".join(rationale).upper() + " .", " ".join(answer) + ".") == pytest.approx(
        want if want is None else places[0] / (len(rationale) + 1)
    )


@pytest.mark.parametrize(
    "rationale, answer, place",
    [
        ("(left)", "left", 0),
        ("it's **left**, I say", "Left", 1 / 4),
        ("leftover", "left", None),
        ("3.5", "3", None),
        ("not 3.5, but -3!", "-3", 3 / 4),
        ("x = ( + )", "+", 3 / 5),
    ],
)
def test_words_are_whole_and_without_signs_around_them(rationale, answer, place):
    assert leak_place(rationale, answer) == place


def test_a_share_of_leaks_is_wilsons_or_drawn_by_question():
    texts, gold = ["left it is", "so it is left", "nothing"] * 4, ["left"] * 12
    assert leak_share(texts, gold) == wilson(4, 12)
    drawn = leak_share(texts, gold, questions=[0, 1, 2] * 4)
    assert drawn.estimate == 4 / 12 and (drawn.low, drawn.high) == (0, 1)  # three questions, all alike within
    assert leak_share(texts, gold, before=1).estimate == 8 / 12
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=str(wrong)):
            leak_share(texts, gold, before=wrong)
    with pytest.raises(ValueError, match="at least one"):
        leak_share([], [])
    with pytest.raises(ValueError, match="no words"):
        leak_share(["a"], [""])


def plain_logprob(model, processor, turns, row, z, answer):
    "One forward over the whole sequence, the answer's tokens picked by hand."
    gold = answer_ids(turns, processor, answer)
    ids = [*turns.opening, *z, turns.stop, *turns.bridge, *gold]
    inputs = follow(model, encode_questions(processor, [row]), [ids])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -len(gold) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(gold)[:, None]).sum().item()


@pytest.mark.parametrize("layout", ["turn", "section"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_answers_and_gaps_are_those_of_plain_forwards(family, layout):
    model, processor = specimen(family)
    turns = turns_of(processor, layout)
    sizes = [(40, 32), (64, 30), (32, 32)]
    rows = [
        make_row(
            id=str(i), task="t", question="?" * (i + 1), images=[Image.new("RGB", size, (90 * i, 9, 99))], solution=s
        )
        for i, (size, s) in enumerate(zip(sizes, ("left", "up", "b"), strict=True))
    ]
    zs = [rationale_ids(processor, text, turns) for text in ("far away", "", "near the edge")]
    plain = lambda i, j: plain_logprob(model, processor, turns, rows[i], zs[j], rows[i]["solution"])  # noqa: E731
    found = answer_logprobs(model, processor, turns, rows[0], zs, "left")
    assert found == pytest.approx([plain(0, j) for j in range(3)], abs=1e-4)
    assert swap_gaps(model, processor, turns, rows, zs) == pytest.approx(
        [plain(i, i) - plain(i, (i + 1) % 3) for i in range(3)], abs=2e-4
    )
    assert swap_gaps(model, processor, turns, rows, zs, other=[2, 0, 1])[0] == pytest.approx(
        plain(0, 0) - plain(0, 2), abs=2e-4
    )


@pytest.fixture(scope="module")
def pocket():
    return load_policy("pocket")


def test_swapping_what_is_the_same_changes_nothing(pocket):
    model, processor = pocket
    turns, rows = turns_of(processor, "section"), scene_rows("relation", 3, seed=2)
    zs = [rationale_ids(processor, "it looks like it", turns)] * 3
    assert swap_gaps(model, processor, turns, rows, zs) == pytest.approx([0] * 3, abs=1e-4)


def test_swaps_that_cannot_be(pocket):
    model, processor = pocket
    turns, rows = turns_of(processor, "section"), scene_rows("relation", 2, seed=2)
    with pytest.raises(ValueError, match="two rows or more"):
        swap_gaps(model, processor, turns, rows[:1], [[5]])
    with pytest.raises(ValueError, match="none with itself"):
        swap_gaps(model, processor, turns, rows, [[5], [6]], other=[1, 1])
    with pytest.raises(ValueError, match="no tokens"):
        swap_gaps(model, processor, turns, [{**row, "solution": " "} for row in rows], [[5], [6]])


def test_parts_add_up_to_the_log_reward(pocket):
    model, processor = pocket
    turns, rows = turns_of(processor, "section"), scene_rows("relation", 3, seed=2)
    ways = [{"guess": "it looks like it", "states": row["solution"], "empty": ""} for row in rows]
    table = mean_parts(model, processor, turns, rows, ways)
    assert list(table["rationale"]) == ["guess", "states", "empty"]
    for name, total in zip(table["rationale"], table["total"], strict=True):
        rewards = []
        for row, own in zip(rows, ways, strict=True):
            z, y = rationale_ids(processor, own[name], turns), answer_ids(turns, processor, row["solution"])
            states = token_rewards(model, turns, encode_questions(processor, [row]), [z], y, empty="turn")[0]
            rewards.append(states[-1].item())
        assert total == pytest.approx(np.mean(rewards), abs=1e-3)
    assert table["prior"][2] == 0
    with pytest.raises(ValueError, match="same names"):
        mean_parts(model, processor, turns, rows, ways[:2])


def test_bars_are_the_parts():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = pd.DataFrame({"rationale": ["a", "b"], "prior": [-1.0, -2.0], "end": [-0.5, 0.0], "answer": [-0.25, -1.0]})
    ax = plot_parts(plt.subplots()[1], table)
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == pytest.approx([-1, -2, -1.5, -2, -1.75, -3])
    assert ax.get_xlabel().endswith("(nats)")
    plt.close(ax.figure)


groups = st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5), st.sampled_from([0, 1])), min_size=2, max_size=20)


@settings(deadline=None, max_examples=100)
@given(groups)
def test_correlation_is_numpys_of_centred_values(lines):
    table = pd.DataFrame(lines, columns=["q", "x", "y"]).astype({"x": float, "y": float})
    apart = table[["x", "y"]] - table.groupby("q")[["x", "y"]].transform("mean")
    found = within_correlation(table["x"], table["y"], table["q"], n=50)
    if (apart.abs() < 1e-9).all().any():
        assert found is None
    else:
        want = (apart["x"] @ apart["y"]) / math.sqrt((apart["x"] @ apart["x"]) * (apart["y"] @ apart["y"]))
        assert found.estimate == pytest.approx(want) and -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9


def test_correlation_does_not_see_differences_between_questions():
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(40), 6)
    x, y = rng.normal(size=240), rng.normal(size=240)
    plain = within_correlation(x, y, questions)
    moved = within_correlation(x + 9 * questions, y - 5 * questions, [f"row {q}" for q in questions])
    assert moved.estimate == pytest.approx(plain.estimate) and moved.low == pytest.approx(plain.low)
    assert plain.low < 0 < plain.high
    assert within_correlation(x, 2 * x + 1, questions).estimate == pytest.approx(1)


def test_correlation_of_what_does_not_vary_or_is_missing():
    assert within_correlation([], [], []) is None
    assert within_correlation([1, 2, 3], [1, 1, 1], ["a"] * 3) is None
    assert within_correlation([1, 2, 3], [0, 1, 0], ["a", "b", "c"]) is None
    assert within_correlation([0.1] * 3, [0, 1, 0], ["a"] * 3) is None
    for x, y, questions in (([math.nan, 1], [0, 1], [0, 0]), ([1, 2], [0, 1], [0])):
        with pytest.raises(ValueError, match="two finite numbers"):
            within_correlation(x, y, questions)

"Diversity of rationales: every measure against a naive one, and what none of them may depend on."

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.lacot.diversity import (
    MEASURES,
    distinct_n,
    diversity,
    edit_distance,
    embedding_spread,
    mean_edit_distance,
    relative_distance,
    self_bleu,
)

words = st.lists(st.sampled_from("abcd"), max_size=9)
groups = st.lists(words, min_size=2, max_size=5)
quick = settings(deadline=None, max_examples=100)


def table_distance(a, b):
    "The textbook's table."
    cells = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = cells[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            cells[i, j] = min(cells[i - 1, j] + 1, cells[i, j - 1] + 1, replaced)
    return cells[len(a), len(b)]


@quick
@given(words, words)
def test_edit_distance_is_the_textbooks(a, b):
    assert edit_distance(a, b) == table_distance(a, b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert 0 <= relative_distance(a, b) <= 1


@quick
@given(words, words, words)
def test_edit_distance_keeps_the_triangle(a, b, c):
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_edit_distance_of_long_texts_with_many_words():
    rng = np.random.default_rng(0)
    for size, vocabulary in [(130, 5), (64, 200), (65, 3)]:  # around the length of a machine word, too
        a, b = rng.integers(0, vocabulary, size).tolist(), rng.integers(0, vocabulary, size + 7).tolist()
        assert edit_distance(a, b) == table_distance(a, b)


def naive_bleu(own, others, n, smoothing):
    "Papineni's formula with lists and loops."
    logs = []
    for k in range(1, n + 1):
        mine = [tuple(own[i : i + k]) for i in range(len(own) - k + 1)]
        if not mine:
            continue
        clipped = 0
        for run in set(mine):
            there = [sum(tuple(o[i : i + k]) == run for i in range(len(o) - k + 1)) for o in others]
            clipped += min(mine.count(run), max(there))
        share = (clipped or smoothing) / len(mine)
        logs.append(math.log(share) if share else -math.inf)
    closest = sorted((abs(len(o) - len(own)), len(o)) for o in others)[0][1]
    penalty = 1.0 if len(own) >= closest else math.exp(1 - closest / len(own))
    return penalty * math.exp(sum(logs) / len(logs))


@quick
@given(st.lists(words.filter(len), min_size=2, max_size=4), st.integers(1, 4), st.sampled_from([0.0, 0.1, 1.0]))
def test_self_bleu_is_the_naive_one(texts, n, smoothing):
    expected = [naive_bleu(own, texts[:i] + texts[i + 1 :], n, smoothing) for i, own in enumerate(texts)]
    assert self_bleu(texts, n, smoothing) == pytest.approx(sum(expected) / len(expected))


@quick
@given(groups, st.integers(1, 3))
def test_distinct_n_counts_sets(texts, n):
    every = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    assert distinct_n(texts, n) == (len(set(every)) / len(every) if every else None)


@quick
@given(groups, st.randoms(use_true_random=False))
def test_no_measure_depends_on_the_order_of_rationales_or_on_names_of_words(texts, rng):
    order = rng.sample(texts, len(texts))
    renamed = [[{"a": 9, "b": 7, "c": 8, "d": 1}[word] for word in text] for text in texts]
    for measure in MEASURES.values():
        value = measure(texts)
        assert (value is None) or 0 <= value <= 1
        assert measure(order) == pytest.approx(value) and measure(renamed) == pytest.approx(value)


@quick
@given(words.filter(len), st.integers(2, 5))
def test_copies_are_not_diverse(text, n):
    assert self_bleu([text] * n) == pytest.approx(1)
    assert mean_edit_distance([text] * n) == 0
    assert MEASURES["distinct texts"]([text] * n) == 1 / n


def test_runs_do_not_cross_from_one_rationale_to_the_next():
    assert distinct_n(["a b", "c a", "b c"]) == 1.0
    assert distinct_n(["a b c a b c"]) == 3 / 5


def test_texts_are_cut_into_words_and_sequences_are_not():
    assert edit_distance("The cup", "the  CUP") == 0
    assert edit_distance([1, 2, 3], (1, 3)) == 1


def test_mean_over_pairs():
    texts = ["a b", "a c", "d e f g"]
    expected = [relative_distance(a, b) for a, b in combinations(texts, 2)]
    assert mean_edit_distance(texts) == pytest.approx(sum(expected) / 3)


def test_embeddings_by_hand():
    points = {"x": [1.0, 0.0], "y": [0.0, 2.0], "minus x": [-3.0, 0.0], "nothing": [0.0, 0.0]}
    spread = lambda *texts: embedding_spread(texts, lambda some: [points[t] for t in some])  # noqa: E731
    assert spread("x", "y") == pytest.approx(1)
    assert spread("x", "minus x") == pytest.approx(2)
    assert spread("x", "x", "y") == pytest.approx(2 / 3)
    assert spread("x", "nothing") == pytest.approx(1)
    assert spread("x") is None
    for wrong in ([[1.0, 2.0]], [[math.nan, 0.0], [0.0, 1.0]], [1.0, 2.0]):
        with pytest.raises(ValueError, match="one finite vector"):
            embedding_spread(["x", "y"], lambda _, wrong=wrong: np.array(wrong))


def test_questions_are_averaged_and_those_without_a_value_left_out():
    result = diversity([["a b", "a b"], ["a b", "c d"], ["a", "b"]])
    assert result["distinct-2"].estimate == pytest.approx((0.5 + 1.0) / 2)
    assert result["distinct texts"].estimate == pytest.approx((0.5 + 1 + 1) / 3)
    assert result["self-BLEU"].low <= result["self-BLEU"].estimate <= result["self-BLEU"].high
    assert diversity([]) == dict.fromkeys(MEASURES)
    with pytest.raises(ValueError, match="as many for each"):
        diversity([["a", "b"], ["a"]])


@pytest.mark.parametrize("wrong", [0, -1])
def test_lengths_of_runs_that_do_not_exist(wrong):
    with pytest.raises(ValueError, match=str(wrong)):
        distinct_n(["a"], wrong)
    with pytest.raises(ValueError, match=str(wrong)):
        self_bleu(["a", "b"], wrong)

"""The accuracy reward: every dress of every choice, pairs of them, real rows, and what policies try."""

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.rewards.accuracy import (
    accuracy_reward,
    fold,
    option_texts,
    read_choice,
    same_boolean,
    same_choice,
    same_text,
    score_answer,
)

QUICK = settings(deadline=None, max_examples=100)  # the machine may be busy
FEW = settings(deadline=None, max_examples=15)
WORDS = (
    st.text(alphabet="abcdefg xyz", min_size=2, max_size=8)
    .map(lambda x: " ".join(x.split()))
    .filter(lambda x: len(x) > 1)
)
CHOICES = st.lists(WORDS, min_size=2, max_size=5, unique_by=lambda x: fold(x))
LETTERS = "ABCDEFGH"
ALGOPUZZLE = Path(__file__).parents[2] / "shared" / "data" / "algopuzzle"

LETTER_DRESSES = (
    "{0}",
    "{0}.",
    "{0})",
    "({0})",
    "{0}:",
    "({0}).",
    "**{0}**",
    "[{0}]",
    "\\boxed{{{0}}}",
    "${0}$",
    '"{0}"',
    "Option {0}",
    "choice ({0})",
    "The answer is {0}.",
    "Answer: {0}",
    "the correct option is ({0})",
)
BOTH_DRESSES = (
    "{0}. {1}",
    "{0}) {1}",
    "({0}) {1}",
    "{0}: {1}",
    "**{0}. {1}**",
    "The answer is {0}. {1}.",
    "({0}). {1}",
)
TEXT_DRESSES = (
    "{1}",
    "{1}.",
    "  {1}\n",
    "**{1}**",
    "({1})",
    "The answer is {1}.",
    "answer: {1}",
    '"{1}."',
    "\\text{{{1}}}",
)


def in_section(answer):
    return f"<think>so</think><answer>{answer}</answer>"


@FEW
@given(CHOICES, st.data())
def test_every_dress_names_its_choice_and_no_other(choices, data):
    index, other = data.draw(st.permutations(range(len(choices))))[:2]
    letter, text = LETTERS[index], choices[index]
    for dress in (*LETTER_DRESSES, *BOTH_DRESSES, *TEXT_DRESSES):
        for answer in (dress.format(letter, text), dress.format(letter.lower(), text.upper())):
            for gold in (letter, f"({letter})", text):
                assert score_answer(answer, gold, "choice", choices) == 1.0, answer
            for gold in (LETTERS[other], choices[other]):
                assert score_answer(answer, gold, "choice", choices) == 0.0, answer


@QUICK
@given(CHOICES, st.data())
def test_two_at_once_are_none(choices, data):
    i, j = data.draw(st.permutations(range(len(choices))))[:2]
    a, b = choices[i], choices[j]
    for joint in (" or ", ", ", " and ", "/", " / ", "; ", "\n", " | ", " or maybe "):
        for said in (
            f"{LETTERS[i]}{joint}{LETTERS[j]}",
            f"({LETTERS[i]}){joint}({LETTERS[j]})",
            f"{LETTERS[i]}.{joint}{LETTERS[j]}.",
        ):
            assert read_choice(said, choices) is None, said
        for said in (f"{a}{joint}{b}", f"The answer is {a}{joint}{b}", f"{LETTERS[i]}. {a}{joint}{LETTERS[j]}. {b}"):
            if " ".join(said.split()) not in choices:
                assert read_choice(said, choices) is None, said
    assert read_choice(f"{LETTERS[i]}. {b}", choices) is None
    assert read_choice(f"({LETTERS[i]}) {b}", choices) is None
    assert same_text(f"{a} or {b}", a) is False


@QUICK
@given(st.text(max_size=30), CHOICES)
def test_whatever_is_written_names_at_most_one_choice(answer, choices):
    assert read_choice(answer, choices) in (None, *option_texts(choices))
    assert score_answer(answer, choices[0], "choice", choices) in (0.0, 1.0)
    assert sum(score_answer(answer, gold, "choice", choices) for gold in choices) <= 1


@QUICK
@given(st.lists(st.sampled_from(list("ABCDE")), min_size=2, max_size=5), st.data())
def test_the_gold_always_earns_its_point_even_when_choices_are_letters_or_repeat(choices, data):
    for gold in (data.draw(st.sampled_from(choices)), LETTERS[data.draw(st.integers(0, len(choices) - 1))]):
        assert score_answer(gold, gold, "choice", choices) == 1.0
        assert score_answer(f"({gold.lower()})", gold, "choice", choices) == 1.0


def test_choices_that_say_the_same_are_the_same():
    assert score_answer("B", "A", "choice", ["3", "3", "5"]) == 1.0
    assert score_answer("3", "A", "choice", ["3", "3", "5"]) == 1.0
    assert score_answer("C", "A", "choice", ["3", "3", "5"]) == 0.0


def test_choices_that_look_like_labels_numbers_and_times():
    assert read_choice("1:14", ["1:14", "8:09"]) == "1:14"
    assert read_choice("B", ["1:14", "8:09"]) == "8:09"
    assert read_choice("C", ["5 C", "6 C"]) is None
    assert read_choice("0", ["0", "5", "4", "3"]) == "0"
    assert read_choice("e.g. this", ["a", "b", "c", "d", "this"]) is None
    assert read_choice("a cat", ["a dog", "a cat"]) == "a cat"
    assert read_choice("a", ["a dog", "a cat"]) == "a dog"
    assert read_choice("option b", ["option a", "option b"]) == "option b"
    assert read_choice("10\u00b2", ["102", "10\u00b2"]) == "10\u00b2"


def test_labels_of_their_own_need_to_be_in_order_to_be_labels():
    assert option_texts(["A: 5 N", "B: 6 N"]) == ["5 N", "6 N"]
    assert option_texts(["(a) 5 N", "(b) 6 N"]) == ["5 N", "6 N"]
    assert option_texts(["B: 5 N", "A: 6 N"]) == ["B: 5 N", "A: 6 N"]
    assert option_texts(["A: 5 N", "6 N"]) == ["A: 5 N", "6 N"]


@pytest.mark.parametrize("answer", ["true", "True", "TRUE.", " yes ", "Yes.", "**Yes**", "(true)"])
def test_yes(answer):
    assert [same_boolean(answer, gold) for gold in ("true", "Yes", "false", "No", "?")] == [
        True,
        True,
        False,
        False,
        None,
    ]
    assert accuracy_reward(in_section(answer), "true", "boolean", ["true", "false"]) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "true or false",
        "true/false",
        "yes, no",
        "yes no",
        "true false",
        "not true",
        "untrue",
        "yesno",
        "truefalse",
        "",
        "1",
        "maybe",
        "true\nfalse",
        "yes and no",
        "no? yes",
    ],
)
def test_both_truth_values_or_none_earn_nothing(answer):
    for gold in ("true", "false", "yes", "no"):
        assert accuracy_reward(in_section(answer), gold, "boolean") == 0.0
        assert accuracy_reward(in_section(answer), gold) == 0.0


@QUICK
@given(st.text(alphabet="abc .()*'\"$\n\t", max_size=30))
def test_fold_is_settled_after_one_go_or_the_dress_is_no_usual_one(text):
    once = fold(text)
    assert once == once.casefold()
    if len(text) < 8:
        assert fold(once) == once
    assert fold(text.upper()) == once and fold(f"  {text}\n") == once


def test_fold_keeps_what_is_inside():
    for text in ("a.b", "3.5", "(a) and (b", "f(x)", "$5", "**", "()", "", ".", "it's", "a . b"):
        assert fold(text) in (
            text,
            text.strip("."),
        ) or text in ("(a) and (b",)
    assert fold("cafe\u0301") == fold("CAF\u00c9")


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        ("<think>hm <answer>left</answer></think><answer>right</answer>", 0.0),
        ("<think>hm <answer>right</answer></think><answer>left</answer>", 1.0),
        ("<think>hm <answer>left</answer>", 0.0),
        ("<answer>left</answer><think>hm</think>", 0.0),
        ("<answer>right</answer><answer>left</answer>", 1.0),
        ("<answer>left</answer> and then some", 1.0),
        ("left", 0.0),
        ("<answer>left", 0.0),
        ("<answer></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_which_answer_counts(completion, points):
    assert accuracy_reward(completion, "left") == points


@pytest.mark.parametrize("gold", [None, "", " \n"])
@pytest.mark.parametrize("kind", [None, "choice", "boolean", "text"])
def test_no_gold_is_none_for_every_completion(gold, kind):
    for text in ("", "left", in_section("left")):
        assert accuracy_reward(text, gold, kind, ["left", "right"]) is None


def test_a_gold_that_the_row_does_not_offer_is_none():
    assert accuracy_reward(in_section("left"), "up", "choice", ["left", "right"]) is None
    assert accuracy_reward(in_section("left"), "E", "choice", ["left", "right"]) is None
    assert accuracy_reward(in_section("yes"), "left", "boolean") is None


@pytest.mark.parametrize("kind", ["number", "Choice", "choices", "expression"])
def test_types_that_are_not_compared_are_an_error(kind):
    with pytest.raises(ValueError, match=f"answer_type '{kind}' is not compared"):
        accuracy_reward(in_section("4"), "4", kind)


def test_letters_without_choices():
    for answer in ("B", "(b)", "b.", "Answer: B", "option b"):
        assert same_choice(answer, "B") and same_choice(answer, "(B)") and not same_choice(answer, "C")
    for answer in ("B or C", "B. C", "blue", "", "BC"):
        assert not same_choice(answer, "B")
    assert same_choice("blue", "Blue.") and not same_choice("B", "blue")


def test_choices_as_any_sequence():
    import numpy as np

    for choices in (["left", "right"], ("left", "right"), np.array(["left", "right"], dtype=object)):
        assert accuracy_reward(in_section("A"), "left", None, choices) == 1.0
    assert accuracy_reward(in_section("left"), "left", None, np.array([])) == 1.0


@pytest.mark.parametrize("unit", ["<answer>", "(", "**", ".", "a ", "A. ", "the answer is ", "\\boxed{", "left or "])
def test_long_answers_are_read_in_no_time(unit):
    text = unit * (300_000 // len(unit))
    begin = time.process_time()
    for kind in ("choice", "text", "boolean"):
        assert accuracy_reward(in_section(text), "yes", kind, ["yes", "no"]) == 0.0
    assert time.process_time() - begin < 2


def algopuzzle_rows():
    for path in sorted(ALGOPUZZLE.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield path.stem, json.loads(line)


@pytest.mark.skipif(not ALGOPUZZLE.is_dir(), reason="the real rows of AlgoPuzzleVQA do not lie beside this checkout")
def test_real_rows_gold_pays_and_nothing_else_does():
    "Each row sees three dresses of each choice and one pair of choices; over the rows all of them come up."
    rows = list(algopuzzle_rows())
    for k, (category, row) in enumerate(rows):
        choices, index = row["options"], row["options"].index(row["answer"])
        dresses = [kind[k % len(kind)] for kind in (LETTER_DRESSES, BOTH_DRESSES, TEXT_DRESSES)]
        pairs = list(itertools.permutations(range(len(choices)), 2))
        a, b = pairs[k % len(pairs)]
        joint = (f"{LETTERS[a]} or {LETTERS[b]}", f"{choices[a]} or {choices[b]}", f"{LETTERS[a]}. {choices[b]}")
        for gold in (row["answer"], LETTERS[index]):
            for i, choice in enumerate(choices):
                for answer in (dress.format(LETTERS[i], choice) for dress in dresses):
                    points = accuracy_reward(in_section(answer), gold, "choice", choices)
                    assert points == float(i == index), (category, k, answer, choices)
            for answer in joint:
                assert accuracy_reward(in_section(answer), gold, "choice", choices) == 0.0, (category, k, answer)
    assert len(rows) == 360

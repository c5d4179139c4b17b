"""The format reward against a plain pattern, exhaustively, and against what policies try."""

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.rewards.format import check_sections, format_reward, graded_format_reward, has_text

TOKENS = ("<think>", "</think>", "<answer>", "</answer>", "a", " ")
STRICT = re.compile(r"\s*<think>[a ]*a[a ]*</think>\s*<answer>[a ]*a[a ]*</answer>\s*")
HONEST = "<think>red circle a 2</think><answer>left</answer>"
QUICK = settings(deadline=None, max_examples=100)


def test_every_text_of_up_to_six_tokens():
    "All 55,987 of them: strict is the pattern, graded is 1 exactly there and within range elsewhere."
    paid = 0
    for n in range(7):
        for tokens in itertools.product(TOKENS, repeat=n):
            text = "".join(tokens)
            points = format_reward(text)
            assert points == float(STRICT.fullmatch(text) is not None), text
            paid += points
            if n < 6 or points:
                graded = graded_format_reward(text)
                assert 0 <= graded <= 1 and (graded == 1) == (points == 1), text
    assert paid == 1  # the one order of the six tokens


@QUICK
@given(st.text(alphabet="ab .,?<>/\n", max_size=40), st.text(alphabet="ab .,\n", max_size=20))
def test_honest_bodies_are_paid_and_anything_around_them_is_not(thought, around):
    text = f"<think>x{thought}</think>\n<answer>y</answer>"
    if "<" not in thought:
        assert format_reward(text) == graded_format_reward(text) == 1.0
    for spoiled in (around + text, text + around, text.replace("</think>\n", "</think>" + around)):
        assert format_reward(spoiled) == float(not around.strip() and "<" not in thought) or "<" in thought


@pytest.mark.parametrize("section", ["think", "answer"])
@pytest.mark.parametrize(
    "blank", ["", " ", "\n\t", "\u200b", "\u00a0", "\u2800", "\u3164", "\ufeff\u2060", "\u00ad", "\x00"]
)
def test_blanks_are_no_text(section, blank):
    body = {"think": "a", "answer": "b"} | {section: blank}
    text = f"<think>{body['think']}</think><answer>{body['answer']}</answer>"
    assert not has_text(blank)
    assert format_reward(text) == 0.0
    assert graded_format_reward(text) == 0.5


@pytest.mark.parametrize(
    "text",
    [
        HONEST + HONEST,
        HONEST + "<answer>right</answer>",
        "<think>a</think>" + HONEST,
        HONEST[:-1],
        HONEST.replace("</think>", ""),
        HONEST.replace("<answer>", "<answer><answer>"),
        "<think><answer>left</answer></think>",
        "<answer><think>a</think>left</answer>",
        HONEST + ".",
        "assistant: " + HONEST,
        HONEST + "</answer>",
        "```" + HONEST + "```",
        HONEST.replace("answer", "Antwort"),
        "<rethink>a</rethink>" + HONEST,
        "&lt;think&gt;a&lt;/think&gt;" + HONEST,
    ],
)
def test_what_is_not_exactly_the_form_earns_nothing(text):
    assert format_reward(text) == 0.0
    assert graded_format_reward(text) < 1.0


@QUICK
@given(st.permutations(["think", "answer", "image description"]), st.integers(1, 3))
def test_order_matters_for_any_choice_of_sections(order, n):
    order = order[:n]
    for written in itertools.permutations(order):
        text = "\n".join(f"<{name}>text</{name}>" for name in written)
        assert format_reward(text, sections=order) == float(list(written) == list(order))


def test_graded_counts_sections_and_what_is_beside_them():
    sections = ("image description", "think", "answer")
    parts = {name: f"<{name}>text</{name}>" for name in sections}
    for n in range(4):
        for kept in itertools.combinations(sections, n):
            text = "".join(parts[name] for name in kept)
            assert graded_format_reward(text, sections=sections) == pytest.approx(n / 3)
            assert graded_format_reward(text + " so", sections=sections) == pytest.approx(n / 4)
            assert graded_format_reward("</think>" + text, sections=sections) <= n / 3


def test_spellings_of_a_name():
    text = "<image_description>a</image_description><ANSWER>b</Answer>"
    assert check_sections(["Image_Description", "answer"]) == ("image description", "answer")
    assert format_reward(text, sections=["image_description", "answer"]) == 1.0


@pytest.mark.parametrize("sections", ["think", "", (), ("think", "Think"), ("image description", "image_description")])
def test_what_is_no_format_is_refused(sections):
    for reward in (format_reward, graded_format_reward):
        with pytest.raises(ValueError, match="is not a format"):
            reward(HONEST, sections=sections)


@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<think></think>", "<think><answer>", "<", "<think>a</think><answer>b</answer>", "< think"],
)
def test_long_repetitions_are_read_in_no_time(unit):
    text = unit * (200_000 // len(unit))
    begin = time.process_time()
    assert format_reward(text) == 0.0
    assert graded_format_reward(text) < 1.0
    assert time.process_time() - begin < 2


def test_trl_pays_for_empty_thoughts_and_this_does_not():
    "Why this chapter exists; when TRL mends it, the sentence in the chapter has to go."
    trl_rewards = pytest.importorskip("trl.rewards.format_rewards")
    empty = "<think></think>"
    assert trl_rewards.think_format_reward([[{"content": empty}]]) == [1.0]
    assert format_reward(empty, sections=("think",)) == 0.0

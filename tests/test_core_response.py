"""The parser against a naive reading of the same rules, on texts made of tags and their ruins."""

import pickle
import re
import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_reward.core.response import PROBLEMS, REASONING, SECTIONS, cut, parse_response, section_name

BLANKS = " \t\n\r\f\v"
TAGS = [f"<{slash}{name}>" for name in SECTIONS for slash in ("", "/")]
RUINS = [
    "<",
    ">",
    "/",
    "</",
    "<think",
    "think>",
    "< think >",
    "</ THINK\n>",
    "<image_description>",
    "</Image  Description>",
]
RUINS += ["<thinking>", "<answer/>", "<thin\u212a>", "<b>", "a", " ", "\n", "\u200b", "ſ", "<//think>", "<im age>"]
texts = st.lists(st.sampled_from(TAGS * 2 + RUINS), max_size=24).map("".join)
bodies = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12)


# The naive reading: one character after the other, lists instead of a stack, every question asked anew.


def naive_tag(text, start):
    """Name, slash and end of the tag that begins at `start`, or None."""
    i = start + 1

    def skip(i):
        while i < len(text) and text[i] in BLANKS:
            i += 1
        return i

    i = skip(i)
    closing = i < len(text) and text[i] == "/"
    i = skip(i + closing)
    end = text.find(">", i)
    if end < 0:
        return None
    inner = text[i:end].rstrip(BLANKS)
    words = inner.replace("_", " ")
    for blank in BLANKS:
        words = words.replace(blank, " ")
    name = " ".join(word for word in words.split(" ") if word)
    if not inner.isascii() or name.lower() not in SECTIONS or inner[:1] in "_" or inner[-1:] == "_":
        return None
    return name.lower(), closing, end + 1


def naive_parse(text):
    """Sections as (name, start, end, body, closed, parent), stray tags as (name, start, end)."""
    found, strays, start = [], [], 0
    while start < len(text):
        tag = naive_tag(text, start) if text[start] == "<" else None
        if tag is None:
            start += 1
            continue
        name, closing, end = tag
        unfinished = [section for section in found if section["end"] is None]
        if not closing:
            parent = unfinished[-1]["name"] if unfinished else None
            found.append({"name": name, "start": start, "body": end, "end": None, "closed": False, "parent": parent})
        elif name in [section["name"] for section in unfinished]:
            while True:
                section = unfinished.pop()
                own = section["name"] == name
                section |= {"end": end if own else start, "text": text[section["body"] : start], "closed": own}
                if own:
                    break
        else:
            strays.append((name, start, end))
        start = end
    for section in found:
        if section["end"] is None:
            section |= {"end": len(text), "text": text[section["body"] :]}
    return found, strays


def naive_answer(text):
    """Try every answer, the last one first."""
    found, strays = naive_parse(text)
    reasoning = [section for section in found if section["name"] in REASONING]
    for section in reversed(found):
        before_first = [
            tag
            for tag in strays
            if tag[0] in REASONING and all(r["start"] > tag[1] for r in reasoning if r["name"] == tag[0])
        ]
        fits = section["name"] == "answer" and section["closed"] and section["parent"] is None
        after = all(r["closed"] and r["end"] <= section["start"] for r in reasoning)
        if fits and after and all(tag[2] <= section["start"] for tag in before_first):
            return section["text"].strip()
    return None


@given(texts)
@settings(max_examples=600, deadline=None)
@example("<think>a<visual>b</think>c</visual><answer>d</answer>")
@example("<answer>a</answer></think><answer>b</answer></rethink>")
@example("<think></think></think><answer>a</answer>")
@example("<< think><answer>")
@example("<image _ description>a</image__description>")
def test_agrees_with_a_naive_reading(text):
    response, (found, strays) = parse_response(text), naive_parse(text)
    ours = [(s.name, s.start, s.end, s.text, s.closed, s.parent) for s in response.sections]
    assert ours == [tuple(s[key] for key in ("name", "start", "end", "text", "closed", "parent")) for s in found]
    assert [(name, start, end) for name, _, start, end in response.strays] == strays
    assert response.answer == naive_answer(text)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_pieces_tile_the_text(text):
    response = parse_response(text)
    pieces = list(cut(len(text), response.sections, response.strays))
    assert "".join(text[start:end] for _, start, end in pieces) == text
    assert all(start < end for _, start, end in pieces)
    outside = [text[start:end].strip() for kind, start, end in pieces if kind == "text"]
    assert response.outside == "\n".join(filter(None, outside))
    assert ("text outside" in response.problems) == any(outside)
    assert response.order == tuple(kind for kind, *_ in pieces if kind not in ("text", "stray"))


@given(texts)
@settings(max_examples=300, deadline=None)
def test_what_get_gives_never_overlaps(text):
    response = parse_response(text)
    for name in SECTIONS:
        found = response.get(name)
        assert all(a.end <= b.start for a, b in pairwise(found))
        assert sum(len(s.text) for s in found) <= len(text)
        everywhere = [s for s in response.sections if s.name == name]
        inside = [any(o.start < s.start and s.end <= o.end for o in everywhere) for s in everywhere]
        assert list(found) == [s for s, within in zip(everywhere, inside, strict=True) if not within]


@given(texts)
@settings(max_examples=300, deadline=None)
def test_a_closed_section_alone_reads_the_same(text):
    for section in parse_response(text).sections:
        if section.closed:
            alone = parse_response(text[section.start : section.end])
            assert alone.sections[0].text == section.text
            assert alone.sections[0].closed and len(alone.order) == 1


@given(texts)
@settings(max_examples=300, deadline=None)
def test_opened_by_the_prompt_is_as_if_written(text):
    begins_so = re.match(r"\s*<\s*think\s*>", text, re.IGNORECASE | re.ASCII)
    inside, written = parse_response(text, opened="think"), parse_response(text if begins_so else "<think>" + text)
    shift = 0 if begins_so else len("<think>")
    assert inside.answer == written.answer
    assert (inside.order, inside.problems, inside.outside) == (written.order, written.problems, written.outside)
    assert [(s.text, s.end + shift) for s in inside.sections] == [(s.text, s.end) for s in written.sections]


@given(bodies, bodies, st.sampled_from(["", " ", "\n\n", "\t"]))
def test_a_plain_response_has_no_problem(thought, answer, gap):
    response = parse_response(f"{gap}<think>{thought}</think>{gap}<answer>{answer}</answer>{gap}")
    assert (response.answer, response.body("think")) == (answer.strip(), thought.strip())
    empty = [f"empty:{name}" for name, body in (("think", thought), ("answer", answer)) if not body.strip()]
    assert list(response.problems) == empty


@given(
    st.lists(st.sampled_from([t for t in TAGS if "think>" not in t] + ["a", " ", "<", "\n"]), max_size=12).map("".join)
)
@settings(max_examples=300, deadline=None)
def test_nothing_in_the_thinking_is_the_answer(inside):
    assert parse_response(f"<think>{inside}</think>").answer is None
    assert parse_response(f"<think>{inside}").answer is None
    assert parse_response(f"<think>{inside}</think><answer>outer</answer>").answer == "outer"
    assert parse_response(f"{inside}</think>").answer is None
    assert parse_response(f"{inside}</think>", opened="think").answer is None
    assert parse_response(f"{inside}</think><answer>outer</answer>", opened="think").answer == "outer"


@given(texts, bodies)
@settings(max_examples=200, deadline=None)
def test_text_after_the_last_tag_changes_no_answer(text, more):
    assert parse_response(text + " " + more).answer == parse_response(text + " ").answer


@given(texts)
@settings(max_examples=200, deadline=None)
def test_thinking_that_stays_open_has_no_answer(text):
    assert parse_response(text + "<think>").answer is None


@given(texts)
@settings(max_examples=200, deadline=None)
def test_problems_are_words_of_the_vocabulary(text):
    problems = parse_response(text).problems
    assert len(set(problems)) == len(problems)
    assert [PROBLEMS.index(p.split(":")[0]) for p in problems] == sorted(
        PROBLEMS.index(p.split(":")[0]) for p in problems
    )
    found, strays = naive_parse(text)
    assert any(p.startswith("unclosed") for p in problems) == any(not s["closed"] for s in found)
    assert any(p.startswith("stray") for p in problems) == bool(strays)
    top = [s["name"] for s in found if s["parent"] is None]
    assert {p for p in problems if p.startswith("duplicate")} == {f"duplicate:{n}" for n in top if top.count(n) > 1}
    assert any(p.startswith("empty") for p in problems) == any(s["closed"] and not s["text"].strip() for s in found)


@pytest.mark.parametrize(
    ("text", "answer", "problems"),
    [
        ("<THINK>a</Think><Answer>b</ANSWER>", "b", ()),
        ("<think>a</think><answer>b</answer> c", "b", ("text outside",)),
        ("c <think>a</think><answer>b</answer>", "b", ("text outside",)),
        ("<think>a</think><answer>b</answer></answer>", "b", ("stray:</answer>",)),
        ("<think>a</think><answer>b</answer></think>", "b", ("stray:</think>",)),
        ("<answer>b</answer><think>a</think>", None, ()),
        ("<think>a</think><answer><answer>b</answer>", None, ("unclosed:answer", "nested:answer in answer")),
        ("<think><answer>b</think></answer>", None, ("unclosed:answer", "nested:answer in think", "stray:</answer>")),
        ("<answer><think>a</think>b</answer>", None, ("nested:think in answer",)),
        ("<answer>b<think></answer>", None, ("unclosed:think", "nested:think in answer")),
        (
            "<think>a</think><answer>b</answer><think>c</think><answer>d</answer>",
            "d",
            ("duplicate:think", "duplicate:answer"),
        ),
        ("<visual>a</visual><answer>b</answer>", "b", ("misplaced:visual",)),
        ("<rethink><visual>a</visual></rethink><answer>b</answer>", "b", ()),
        ("<answer><visual>a</visual></answer>", "<visual>a</visual>", ("nested:visual in answer",)),
    ],
)
def test_cases_by_hand(text, answer, problems):
    response = parse_response(text)
    assert (response.answer, response.problems) == (answer, problems)


HARD = {
    "open": "<think>",
    "close": "</think>",
    "open and close": "<think></think>",
    "close and open": "</think><think>",
    "brackets": "<",
    "brackets and blanks": "< ",
    "blanks": " ",
    "cut off": "<think",
    "two words": "<image description",
    "nested": "<think><visual></visual>",
    "crossing": "<think><visual></think>",
    "empty": "<visual> </visual>\n",
}


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD)
def test_a_quarter_of_a_megabyte_takes_no_time(unit):
    text = unit * (2**18 // len(unit))
    for hard in (text, f"<think>{text}</think><answer>b</answer>", "<" + " " * len(text)):
        start = time.process_time()
        response = parse_response(hard)
        _ = (
            response.answer,
            response.order,
            [s.text for name in SECTIONS for s in response.get(name)],
            repr(response.first("think")),
        )
        assert time.process_time() - start < 2  # a quadratic reader needs minutes


def test_deep_nesting_needs_no_deep_stack():
    n = 50_000
    response = parse_response("<visual>" * n + "</visual>" * n)
    assert len(response.sections) == n and all(s.closed for s in response.sections)
    assert [s.start for s in response.get("visual")] == [0]


def test_names_of_ones_own():
    text = "<box>1</box><think>a</think><final_answer>b</final_answer>"
    assert parse_response(text, names=("box", "Final Answer")).order == ("box", "think", "final answer")
    assert parse_response(text, names=["box"]).outside == "<final_answer>b</final_answer>"
    assert parse_response("<think><answer>a</answer></think>", names=("answer",)).answer is None


@pytest.mark.parametrize("name", ["", " ", "<think>", "thínk", "a|b", "a.*", "a\\"])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match="cannot name a section"):
        parse_response("", names=(name,))


def test_one_text_is_not_several_names():
    with pytest.raises(ValueError, match="want several"):
        parse_response("", names="think")


@pytest.mark.parametrize("value", [None, 3, b"<think>", [{"role": "assistant", "content": "a"}]])
def test_only_texts_are_read(value):
    with pytest.raises(ValueError, match="is no text"):
        parse_response(value)


def test_travels_between_processes():
    response = parse_response("<think>a</think><answer>b</answer>")
    assert pickle.loads(pickle.dumps(response)) == response
    assert response.answer == pickle.loads(pickle.dumps(response)).answer
    assert section_name("Image_Description") == response.sections[0].name.replace("think", "image description")

"A question of one's own: who answers, which draw is chosen, what is refused."

import json
from dataclasses import replace

import pytest
import torch

from vlm_reward import cli
from vlm_reward.core.config import ConfigError
from vlm_reward.core.rows import question_of
from vlm_reward.data.hub import load_rows
from vlm_reward.lacot.bin import select
from vlm_reward.lacot.decoding import think
from vlm_reward.lacot.drawing import write_answers
from vlm_reward.lacot.pair import Reasoning, add_lora, write_reasoning
from vlm_reward.lacot.turns import turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.studies import answer
from vlm_reward.studies.answer import AnswerConfig, ask, draw, load_pair, question_row, record_of, told


@pytest.fixture(scope="module")
def row():
    return load_rows("scenes/relation", n=1, seed=3, split="test")[0]


@pytest.fixture(scope="module")
def asked_of(row, tmp_path_factory):
    "A config for the picture and the question of a held-out row."
    photo = tmp_path_factory.mktemp("photo") / "photo.png"
    row["images"][0].save(photo)
    return AnswerConfig(
        image=photo, question=question_of(row["prompt"]), choices=tuple(row["choices"]), n=5, max_tokens=40
    )


def test_the_choice_is_that_of_the_rule_on_the_same_draws(asked_of):
    candidates = draw(asked_of, question_row(asked_of))
    for name, rule in {"bin": "bin-marginal", "bin-paper": "bin-paper", "majority": "majority"}.items():
        found = ask(replace(asked_of, select=name))
        assert found.answer == select(candidates, rule).answer
        assert found.draws["rationale"].tolist() == [z.text for z in candidates.rationales]
        assert found.answers["draws"].sum() == 5
        assert found.answers["score"].is_monotonic_decreasing


@pytest.mark.parametrize("rule", ["bin", "majority", "greedy"])
def test_a_program_gets_each_answer_after_each_rationale(asked_of, rule):
    "One line for each answer in the order of their scores, one number for each draw in the order of the drawings."
    cfg = replace(asked_of, select=rule, seed=2)
    candidates, record = draw(cfg, question_row(cfg)), record_of(ask(cfg), cfg)
    matrix = dict(zip(candidates.answers, candidates.answer_logprobs.tolist(), strict=True))
    assert record["answer_logprobs"] == [matrix[line["answer"]] for line in record["answers"]]
    assert len(record["answer_logprobs"][0]) == len(record["draws"])
    assert rule == "greedy" or len(matrix) > 1
    json.dumps(record, allow_nan=False)


def test_one_draw_is_plain_decoding_whatever_the_rule(asked_of, row):
    model, processor = load_policy("pocket")
    limits = {"max_tokens": 40, "answer_tokens": 32, "seed": 0}
    ((_, plain),) = think(model, processor, turns_of(processor, "section"), [row], frozen=model, **limits)[0]
    for rule in ("best-of-n", "majority", "bin", "bin-paper", "bin-code"):
        assert ask(replace(asked_of, n=1, select=rule)).answer == plain.text


def test_greedy_draws_once_and_takes_no_chances(asked_of):
    first, second = (ask(replace(asked_of, select="greedy", seed=seed)) for seed in (0, 1))
    assert len(first.draws) == 1
    assert first.draws.equals(second.draws)


def test_without_reasoning_the_answer_comes_straight_away(asked_of, row):
    model, processor = load_policy("pocket")
    (straight,) = write_answers(
        model, processor, turns_of(processor, "section"), [row], [None], temperature=0.0, max_tokens=32
    )
    found = ask(replace(asked_of, reasoning=False))
    assert (found.answer, len(found.draws), len(found.answers)) == (straight.text, 0, 0)
    assert told(found, "bin") == f"answer: {straight.text}"


def test_a_folder_says_who_answers_and_in_which_layout(asked_of, tmp_path):
    model, processor = load_policy("pocket")
    for name in ("thinks", "answers"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    write_reasoning(tmp_path / "thinks", Reasoning("turn", "Thinker", "../answers"))
    sampler, frozen, _, turns = load_pair(replace(asked_of, policy=str(tmp_path / "thinks")))
    assert (turns.layout, turns.role) == ("turn", "Thinker")
    assert frozen is not None and frozen is not sampler
    _, _, _, other = load_pair(replace(asked_of, policy=str(tmp_path / "thinks"), layout="section"))
    assert other.layout == "section"


@pytest.mark.parametrize(
    ("taught", "change", "line"),
    [
        (("turn", "Thinker"), {"layout": "section"}, "layout 'section' is asked for, {path} says 'turn': "),
        (("section", "Analyzer"), {"layout": "turn"}, "layout 'turn' is asked for, {path} says 'section': "),
        (("section", "Analyzer"), {"layout": "turn", "role": "Critic"}, "layout 'turn' is asked for, {path} says"),
        (("turn", "Thinker"), {"role": "Critic"}, "role 'Critic' is asked for, {path} says 'Thinker': "),
        (("turn", "Thinker"), {"layout": "turn", "role": "Critic"}, "role 'Critic' is asked for, {path} says 'Th"),
        (("turn", "Thinker"), {"layout": "turn"}, None),
        (("turn", "Thinker"), {"role": "Thinker"}, None),
        (("section", "Analyzer"), {"role": "Critic"}, None),
        (None, {"layout": "turn", "role": "Critic"}, None),
    ],
)
def test_another_way_than_the_one_that_was_taught_is_told(asked_of, tmp_path, caplog, taught, change, line):
    model, processor = load_policy("pocket")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if taught:
        write_reasoning(tmp_path, Reasoning(*taught))
    _, _, _, turns = load_pair(replace(asked_of, policy=str(tmp_path), **change))
    assert turns.layout == change.get("layout", taught[0] if taught else "section")
    assert turns.role == change.get("role", taught[1] if taught else "Analyzer")
    assert [said.count("\n") for said in caplog.messages] == ([0] if line else [])
    assert all(said.startswith(line.format(path=tmp_path / "reasoning.json")) for said in caplog.messages)


def test_adapters_think_and_what_is_under_them_answers(asked_of, tmp_path):
    model, processor = load_policy("pocket")
    torch.manual_seed(0)
    adapted = add_lora(model, 4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    adapted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_reasoning(tmp_path, Reasoning())
    sampler, frozen, _, _ = load_pair(replace(asked_of, policy=str(tmp_path)))
    assert frozen is None and hasattr(sampler, "disable_adapter")
    plain, noisy = ask(asked_of), ask(replace(asked_of, policy=str(tmp_path)))
    assert plain.draws["rationale"].tolist() != noisy.draws["rationale"].tolist()


def test_the_least_length_is_that_of_the_folder_or_what_is_asked_for(asked_of, tmp_path):
    model, processor = load_policy("pocket")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_reasoning(tmp_path, Reasoning(min_tokens=20))
    taught = replace(asked_of, policy=str(tmp_path), n=3)
    for rule in ("bin", "greedy"):
        assert ask(replace(taught, select=rule)).draws["tokens"].min() > 20  # T counts
        assert ask(replace(taught, select=rule, min_tokens=0)).draws["tokens"].min() <= 20
    with pytest.raises(ValueError, match="min_tokens <= max_tokens"):
        ask(replace(taught, max_tokens=10))


def test_a_pocket_alone_thinks_and_answers(asked_of):
    sampler, frozen, _, turns = load_pair(asked_of)
    assert frozen is sampler and turns.layout == "section"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "  "}, "question: '  ' asks nothing"),
        ({"image": "none.png"}, "image: 'none.png' is no file"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked_of, change, words):
    with pytest.raises(ConfigError, match=words):
        replace(asked_of, **change)


def test_a_file_that_is_no_picture_is_refused(asked_of, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="not an image"):
        ask(replace(asked_of, image=tmp_path / "text.png"))


def test_the_command_prints_reasons_and_writes_them(asked_of, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["answer", "pocket", str(asked_of.image), asked_of.question, "--select", "majority", "--n", "3"]
    assert cli.main([*words, "--json", "out.json"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert printed.rstrip().endswith(f"answer: {record['answer']}")
    assert len(record["draws"]) == 3 and all(draw["rationale"] in printed for draw in record["draws"])
    assert record == json.loads(
        json.dumps(
            record_of(
                ask(replace(asked_of, choices=(), n=3, select="majority", max_tokens=256)),
                replace(asked_of, select="majority"),
            )
        )
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--n", "0"], "n: want at least 1, got 0"),
        (["--select", "binn"], "did you mean bin?"),
        (["--layout", "turns"], "did you mean turn?"),
    ],
)
def test_bad_words_end_in_one_line(asked_of, capsys, change, line):
    assert cli.main(["answer", "pocket", str(asked_of.image), "left?", *change]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_word_may_look_like_yaml(asked_of, monkeypatch):
    seen = []
    monkeypatch.setattr(answer, "ask", lambda cfg: seen.append(cfg) or answer.Asked("", None, ()))
    for question in ("yes: or {no}?", "3", "null", "[a, b]", "x = y"):
        cli.main(["answer", "pocket", str(asked_of.image), question])
    assert [cfg.question for cfg in seen] == ["yes: or {no}?", "3", "null", "[a, b]", "x = y"]

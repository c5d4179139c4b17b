"Choosing among answers: the tables against a naive count, speech in two turns, and the lessons that teach it."

import io
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_reward.core.config import ConfigError, from_dict
from vlm_reward.core.response import parse_response
from vlm_reward.core.runs import Run
from vlm_reward.data.behaviours import classify
from vlm_reward.lacot.bin import RULES, Candidates, candidates_of, pair_scores
from vlm_reward.lacot.drawing import Answer, Rationale
from vlm_reward.lacot.pair import add_lora
from vlm_reward.lacot.settings import RGFNSettings
from vlm_reward.lacot.turns import answer_ids, encode_questions, rationale_ids
from vlm_reward.policy.families import load_policy
from vlm_reward.policy.sampling import sample
from vlm_reward.policy.specimens import specimen
from vlm_reward.rewards.presets import get_rubric
from vlm_reward.studies import pairs
from vlm_reward.studies.design import Ground, StudyConfig, grpo_settings, load_study, plan, rgfn_settings
from vlm_reward.studies.evaluate import evaluate
from vlm_reward.studies.pairs import train_pair
from vlm_reward.studies.reasoning import (
    RATIONALES,
    ReasoningConfig,
    SelectConfig,
    check_demonstrations,
    drawn_examples,
    lessons_for,
    speaker,
    too_short,
)
from vlm_reward.studies.rehearsal import rehearsal
from vlm_reward.studies.selection import (
    choose,
    early_share,
    equal_answers,
    gold_and_wrong,
    rationale_line,
    seconds_table,
    tokens_scored,
)
from vlm_reward.train.grpo import GRPOSettings
from vlm_reward.worlds.scenes import scene_rows

CONFIGS = Path(__file__).parents[1] / "configs" / "lacot"
ROWS = scene_rows("relation", 6, seed=31)
ASKED = SelectConfig(n=(1, 2, 5))


@pytest.fixture(scope="module")
def pocket():
    return load_policy("pocket")


@pytest.fixture(scope="module")
def speak(pocket):
    model, processor = pocket
    return speaker(ReasoningConfig("section", max_tokens=40, answer_tokens=8), processor, frozen=model)


@pytest.fixture(scope="module")
def tables(pocket, speak):
    return choose(*pocket, ROWS, speak, ASKED, seed=4)


@pytest.fixture(scope="module")
def draws(pocket, speak):
    "The drawings that the tables were made of."
    return speak.think(*pocket, ROWS, n=5, temperature=1.0, seed=4, batch_size=64)


def of(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.to_dict("records")


# --- the tables


def test_there_is_one_line_for_each_question_rule_and_n(tables):
    counts = Counter((line["row_id"], line["rule"], line["n"]) for line in tables["selection"].to_dict("records"))
    wanted = {(row["id"], "greedy", 1) for row in ROWS}
    wanted |= {(row["id"], rule, n) for row in ROWS for rule in RULES for n in ASKED.n}
    assert set(counts) == wanted and set(counts.values()) == {1}


def test_the_majority_is_the_most_frequent_answer_of_the_first_n(tables, draws):
    for row, own in zip(ROWS, draws, strict=True):
        for n in ASKED.n:
            said = [answer.text.strip().lower() for _, answer in own[:n]]
            most = max(Counter(said).values())
            wanted = next(text for text in said if said.count(text) == most)
            (line,) = of(tables["selection"], row_id=row["id"], rule="majority", n=n)
            assert line["answer"].strip().lower() == wanted
            assert line["correct"] == float(wanted == row["solution"])


def test_one_answer_leaves_no_choice(tables, draws):
    for row, own in zip(ROWS, draws, strict=True):
        for rule in RULES:
            (line,) = of(tables["selection"], row_id=row["id"], rule=rule, n=1)
            assert line["answer"] == own[0][1].text


def test_the_marginal_is_the_answer_with_the_largest_mean_probability(tables, draws, pocket, speak):
    "Scored here one question at a time, spelling by spelling, without the module's matrices."
    model, processor = pocket
    for row, own in zip(ROWS[:3], draws, strict=False):
        texts = list(dict.fromkeys(answer.text for _, answer in own))
        spelt = [answer_ids(speak.turns, processor, text) for text in texts]
        inputs = encode_questions(processor, [row])
        _, matrix = pair_scores(model, speak.turns, inputs, [z.token_ids for z, _ in own], spelt)
        best = texts[int(matrix.exp().mean(1).argmax())]
        (line,) = of(tables["selection"], row_id=row["id"], rule="bin-marginal", n=5)
        assert equal_answers(row, line["answer"], best)


def test_every_choice_among_all_draws_can_be_made_again_from_the_stored_matrix(tables, draws, tmp_path):
    "From the file, by the formulas, in numpy."
    run = Run.open(tmp_path, "kept", {}, "matrix")
    run.save_table("candidates", tables["candidates"])
    stored = {line["row_id"]: line for line in run.table("candidates").to_dict("records")}
    assert list(stored) == [row["id"] for row in ROWS]
    for row, own in zip(ROWS, draws, strict=True):
        kept = stored[row["id"]]
        assert list(kept["rationales"]) == [z.text for z, _ in own]
        said = [kept["answers"][k] for k in kept["own"]]
        assert all(equal_answers(row, a, answer.text) for a, (_, answer) in zip(said, own, strict=True))
        matrix, z = np.stack(kept["answer_logprobs"]), np.array(kept["rationale_logprobs"])
        assert matrix.shape == (len(kept["answers"]), 5) and (matrix <= 1e-5).all()
        joint = (matrix + z) / (kept["rationale_tokens"] + kept["answer_tokens"][:, None])
        alone = kept["own_logprobs"] / kept["own_tokens"]
        scores = {
            "best-of-n": [max(alone[kept["own"] == k]) for k in range(len(matrix))],
            "majority": np.bincount(kept["own"], minlength=len(matrix)),
            "bin-code": joint.mean(1),
            "bin-paper": np.exp(joint).mean(1),
            "bin-marginal": np.exp(matrix).mean(1),
        }
        assert set(scores) == set(RULES)
        for rule, values in scores.items():
            (line,) = of(tables["selection"], row_id=row["id"], rule=rule, n=5)
            assert line["answer"] == kept["answers"][int(np.argmax(values))]


def test_tokens_are_those_of_the_drawings(tables, draws):
    for row, own in zip(ROWS, draws, strict=True):
        for n in ASKED.n:
            closed = [len(answer.token_ids) + (0 if answer.finished else 2) for _, answer in own[:n]]
            thought = [len(z.token_ids) + 1 for z, _ in own[:n]]
            lines = {line["rule"]: line for line in of(tables["selection"], row_id=row["id"], n=n)}
            spellings = {tuple(answer.token_ids) for _, answer in own[:n] if answer.finished}
            if all(answer.finished for _, answer in own[:n]):
                pairs = n * sum(map(len, spellings))
                assert lines["bin-marginal"]["scored"] == pairs
                assert lines["bin-code"]["scored"] == lines["bin-paper"]["scored"] == pairs + sum(thought)
            assert lines["best-of-n"]["scored"] == sum(closed)
            assert lines["majority"]["scored"] == 0
            assert {line["written"] for rule, line in lines.items() if rule != "greedy"} == {sum(thought) + sum(closed)}


def test_the_greedy_line_is_the_greedy_completion_of_the_evaluation(tables, pocket, speak):
    table = evaluate(*pocket, ROWS, samples=0, seed=99, speak=speak)
    for line in table.to_dict("records"):
        (own,) = of(tables["selection"], row_id=line["row_id"], rule="greedy")
        assert (own["answer"].strip() or None, own["correct"]) == (line["answer"], line["correct"])


def test_what_rationales_are_like_is_counted_among_the_drawings(tables, draws):
    for row, own in zip(ROWS, draws, strict=True):
        (line,) = of(tables["rationales"], row_id=row["id"])
        texts = [z.text for z, _ in own]
        assert line["tokens"] == pytest.approx(np.mean([len(z.token_ids) for z, _ in own]))
        assert line["cut off"] == pytest.approx(np.mean([not z.finished for z, _ in own]))
        assert line["distinct texts"] == pytest.approx(len(set(texts)) / 5)
        said = [answer.text.lower() in z.text.lower().replace(",", " ").split() for z, answer in own]
        assert line["states answer"] == pytest.approx(np.mean(said))
        halves = [z.text.lower().replace(",", " ").split() for z, _ in own]
        halves = [words[: -(-len(words) // 2)] for words in halves]
        (wrong,) = set(row["choices"]) - {row["solution"]}
        assert line["states gold early"] == pytest.approx(np.mean([row["solution"] in words for words in halves]))
        assert line["states wrong early"] == pytest.approx(np.mean([wrong in words for words in halves]))
        assert line["gold over wrong"] == pytest.approx(line["states gold early"] - line["states wrong early"])
        assert np.isnan(line["correlation"]) or -1.001 <= line["correlation"] <= 1.001
    assert tables["rationales"]["swap gap"].notna().all()


SPOKEN = {  # rationale -> share that states the gold early, and the same for a wrong choice
    "left or right? the car is at x=7, the cup at x=2": (1, 1),
    "left, as the car is at x=7 and the cup at x=2": (1, 0),
    "right, as the car is at x=7 and the cup at x=2": (0, 1),
    "the car is at x=2, the cup at x=7, so left": (0, 0),
}


@pytest.mark.parametrize("text", SPOKEN)
@pytest.mark.parametrize("said", ["left", "right", ""])
@pytest.mark.parametrize("gold", ["left", "(A)"])
def test_leaks_are_told_of_the_gold_beside_a_wrong_choice_whatever_answer_followed(text, said, gold):
    "A rationale that repeats the question names the gold early, and tells no more than one that does not."
    row = {**ROWS[0], "choices": ["left", "right"], "answer_type": "choice", "solution": gold}
    one, none = torch.ones(1), torch.zeros(1, dtype=torch.long)
    spoken = ([Rationale([5], True, text)], [Answer(said, [5], True)], [said])
    found = rationale_line(row, Candidates(*spoken, none, -one, one, none, -one[None], one))
    early, control = SPOKEN[text]
    assert (found["states gold early"], found["states wrong early"]) == (early, control)
    assert found["gold over wrong"] == early - control
    assert found["states answer"] == (said != "" and said in text)


def test_there_is_no_control_without_choices_and_no_leak_without_a_gold():
    assert gold_and_wrong({"solution": "7", "choices": None}) == (["7"], [])
    assert gold_and_wrong({"solution": None, "choices": ["left", "right"]}) == ([], [])
    assert early_share(["7 it is"], ["7"]) == 1 and np.isnan(early_share(["7 it is"], []))
    four = {"solution": "red", "choices": ["A: red", "B: blue", "C: green", "D: dark red"], "answer_type": "choice"}
    assert gold_and_wrong(four) == (["red"], ["blue", "green", "dark red"])
    assert early_share(["blue, I think, as it is cold"], gold_and_wrong(four)[1]) == pytest.approx(1 / 3)


def test_equal_seeds_give_equal_tables_and_others_do_not(tables, pocket, speak):
    torch.manual_seed(123)
    again, other = (choose(*pocket, ROWS, speak, ASKED, seed=seed) for seed in (4, 5))
    for name in ("selection", "rationales", "candidates"):
        assert again[name].equals(tables[name])
    assert not other["selection"].equals(tables["selection"])
    assert (
        list(tables) == ["selection", "selection_seconds", "rationales", "candidates"]
        and "seconds" not in tables["selection"]
    )


def test_progress_counts_answers(pocket, speak):
    told = []
    choose(*pocket, ROWS, speak, SelectConfig(n=(2,), rules=("majority",)), batch_size=4, progress=told.append)
    assert told == [4, 8, 12]
    with pytest.raises(ValueError, match="no rows to choose"):
        choose(*pocket, [], speak, ASKED)


def test_seconds_add_up_to_what_was_spent(tables):
    table = tables["selection"]
    everything = int(sum(line["scored"] for line in of(table, rule="bin-paper", n=5)))
    found = seconds_table(table, 5, everything, {"draw": 12.0, "score": 6.0, "greedy": 3.0})
    clock = found.set_index(["rule", "n"])["seconds"] * len(ROWS)
    assert clock["greedy", 1] == pytest.approx(3) and clock["bin-paper", 5] == pytest.approx(18)
    assert clock["majority", 5] == pytest.approx(12) and clock["majority", 1] == pytest.approx(12 / 5)
    assert len(found) == 1 + 5 * 3


# --- equal answers


WORDS = [
    "left",
    "Left.",
    "right",
    " LEFT ",
    "(A)",
    "A",
    "B",
    "left or right",
    "",
    "7",
    "7.0",
    "1e9",
    "\\frac{1}{2}",
    "0.5",
]
KINDS = [
    {"choices": ["left", "right"], "answer_type": None},
    {"choices": ["left", "right"], "answer_type": "choice"},
    {"answer_type": "number", "unit": "m"},
    {"answer_type": "text"},
    {},
]


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.sampled_from(WORDS) | st.text(max_size=12), st.sampled_from(WORDS))
def test_equality_is_symmetric_reflexive_and_blind_to_the_gold(row, a, b):
    assert equal_answers(row, a, a) and equal_answers(row, b, b)
    assert equal_answers(row, a, b) == equal_answers(row, b, a)
    for gold in ("left", "7", None):
        assert equal_answers({**row, "solution": gold}, a, b) == equal_answers(row, a, b)


def test_answers_are_merged_by_the_rule_that_marks_them(pocket, speak):
    row = {**ROWS[0], "choices": ["left", "right"], "answer_type": "choice"}
    (own,) = speak.think(*pocket, ROWS[:1], n=3, temperature=1.0, seed=1, batch_size=8)
    texts = ["left", "A", "right"]
    ids = [answer_ids(speak.turns, pocket[1], text) for text in texts]
    told = [(z, answer._replace(text=t, token_ids=i)) for (z, answer), t, i in zip(own, texts, ids, strict=True)]
    found = candidates_of(*pocket, speak.turns, row, told, same=partial(equal_answers, row))
    assert found.answers == ["left", "right"] and found.own.tolist() == [0, 0, 1]
    assert tokens_scored(found, "bin-marginal") == 3 * sum(map(len, ids))


# --- speech in two turns


def test_rows_keep_their_order_whatever_they_ask_for(pocket, speak):
    mixed = [ROWS[0], *scene_rows("where", 2, seed=31), ROWS[1], *scene_rows("what", 1, seed=31)]
    found = speak(*pocket, mixed, n=3, seed=2, batch_size=6)
    assert [len(group) for group in found] == [3] * 5
    for row, group in zip(mixed, found, strict=True):
        for said in group:
            assert (parse_response(said.text).answer is not None) == bool(row["sections"])
    right = [
        said.text == row["solution"]
        for row, group in zip(mixed, found, strict=True)
        for said in group
        if not row["sections"]
    ]
    assert np.mean(right) > 0.7


@pytest.mark.parametrize("least", [0, 25])
def test_no_rationale_is_shorter_than_the_least_length(pocket, least):
    "Sampled, greedy and drawn to choose from; the pocket's own are about 12 tokens long."
    model, processor = pocket
    reasoning = ReasoningConfig("section", min_tokens=least, max_tokens=30, answer_tokens=8)
    speak = speaker(reasoning, processor, frozen=model)
    lengths = []
    for temperature in (0.0, 1.0):
        draws = speak.think(*pocket, ROWS, n=2, temperature=temperature, seed=1, batch_size=64)
        lengths += [len(z.token_ids) for own in draws for z, _ in own]
    assert len(lengths) == 24 and (min(lengths) >= least) and (min(lengths) < 25 or least == 25)
    drawn = choose(*pocket, ROWS[:2], speak, SelectConfig(n=(2,), rules=("greedy", "majority")), seed=4)
    assert drawn["rationales"]["tokens"].min() >= least


@pytest.mark.parametrize("said", [{}, {"answer_temperature": 0.7}])
def test_both_ways_of_training_hear_answers_of_one_temperature(pocket, said, monkeypatch):
    "Greedy by default: the same reward pays a rationale the same in GRPO and in RGFN."
    arms = {"g": {"reward": "accuracy"}, "r": {"reward": "accuracy", "algorithm": "rgfn"}}
    study = {"name": "heat", "reasoning": {"layout": "section", **said}, "arms": arms}
    cfg, heard = from_dict(StudyConfig, study), []
    monkeypatch.setattr(
        pairs, "train_answered", lambda model, _, rows, rubric, *etc, **how: heard.append(rubric.writing)
    )
    asked = (cfg.reasoning, load_policy("pocket")[0], pocket[1], ROWS, get_rubric("accuracy"))
    pairs.train_pair(*asked, grpo_settings(cfg, "g", 0), cfg.rgfn, {})
    wanted = said.get("answer_temperature", 0.0)
    assert heard[0]["temperature"] == wanted == rgfn_settings(cfg, "r", 0).answer_temperature
    assert heard[0]["max_tokens"] == cfg.reasoning.answer_tokens == rgfn_settings(cfg, "r", 0).answer_tokens


@pytest.mark.parametrize("place", ["study", "arm"])
def test_the_temperature_of_answers_is_not_said_a_second_time(place):
    own = {"answer_temperature": 0.7}
    arm = {"algorithm": "rgfn", "rgfn": own if place == "arm" else {}}
    study = {"name": "heat", "reasoning": {}, "arms": {"r": arm}, "rgfn": own if place == "study" else {}}
    with pytest.raises(
        ConfigError, match=r"rgfn.answer_temperature: 0.7 is not used; set reasoning.answer_temperature"
    ):
        from_dict(StudyConfig, study)


@pytest.mark.parametrize("layout", ["section", "turn"])
def test_grpo_leaves_the_ends_of_a_policy_as_they_were(pocket, layout):
    "A saved policy that ends its turns at </think> could not write an answer."
    model, processor = load_policy("pocket")
    before = model.generation_config.to_dict(), model.config.get_text_config().to_dict()
    reasoning = ReasoningConfig(layout, min_tokens=2, max_tokens=8, answer_tokens=4)
    settings = GRPOSettings(steps=1, prompts_per_step=2, group_size=2, max_new_tokens=9, warmup=0)
    how = (reasoning, model, processor, ROWS, get_rubric("accuracy"), settings, RGFNSettings(), {})
    pair = train_pair(*how)
    for one in pair:
        told = one.generation_config.to_dict(), one.config.get_text_config().to_dict()
        differing = {k for a, b in zip(told, before, strict=True) for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        assert differing <= {"use_cache"}
    rows = scene_rows("where", 4, seed=31)
    wanted, found = (sample(one, processor, rows, temperature=0.0) for one in (pocket[0], pair.frozen))
    assert wanted == found


def test_the_answerer_reads_the_question_without_adapters():
    "The sampler is spoiled by its adapters; answers after a rationale, and plain ones, are as good as before."
    model, processor = load_policy("pocket")
    whole = speaker(ReasoningConfig("section", answer_tokens=8), processor, frozen=model)
    where = scene_rows("where", 6, seed=31)
    before = whole(model, processor, where, n=1, temperature=0.0)
    adapted = add_lora(model, 2)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=2.0)
    speak = speaker(ReasoningConfig("section", answer_tokens=8), processor, None)
    after = speak(adapted, processor, where, n=1, temperature=0.0)
    assert after == before
    spoiled = speak(adapted, processor, ROWS, n=2)
    assert any(parse_response(s.text).body("think") for group in spoiled for s in group)
    objects = {row["id"]: row for row in ROWS}
    kinds = [
        classify(s.text, objects[row["id"]]["objects"], row["choices"])
        for row, group in zip(ROWS, spoiled, strict=True)
        for s in group
    ]
    assert "grounded" not in kinds


# --- lessons


def test_the_mixture_has_its_shares_and_only_what_a_rationale_decides():
    rows = scene_rows("relation", 300, seed=8)
    kinds = Counter(classify(text, row["objects"], row["choices"]) for row, text in drawn_examples(rows))
    total = sum(RATIONALES.values())
    assert set(kinds) == set(RATIONALES)
    for name, weight in RATIONALES.items():
        assert kinds[name] / sum(kinds.values()) == pytest.approx(weight / total, abs=0.05)
    for row, text in drawn_examples(rows[:40]):
        if classify(text, row["objects"], row["choices"]) != "bypass":
            assert parse_response(text).answer == row["solution"]


def test_lessons_are_the_same_for_the_same_seed():
    rows = scene_rows("relation", 12, seed=8)
    how = ReasoningConfig(demonstrations="mixture", without=0.3)

    def told(seed):
        return [(z, y) for _, z, y in lessons_for(how, rows, str, seed)]

    assert told(1) == told(1) != told(2)
    assert {z is None for z, _ in told(1)} == {True, False}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("mixture", {"objects": None}, "write gold"),
        ("mixture", {"choices": None}, "write gold"),
        ("mixture", {"sections": []}, "write gold"),
        ("gold", {"rationale": None}, "none of the 1 has one"),
    ],
)
def test_rows_that_cannot_teach_are_refused_in_one_line(kind, row, words):
    with pytest.raises(ConfigError) as caught:
        check_demonstrations(ReasoningConfig(demonstrations=kind), [{**ROWS[0], **row}])
    assert words in str(caught.value) and "\n" not in str(caught.value)


LONG = {"min_tokens": 100, "max_tokens": 120}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, True),
        ({"reasoning": {"min_tokens": 8}}, False),
        ({"rgfn": {"reference": False}}, False),
        ({"arms": {"a": {"reward": "accuracy"}}, "grpo": {"prompts_per_step": 2}}, False),
        ({"arms": {"a": {}}, "sft": {"steps": 1}}, True),
        ({"arms": {"a": {}}, "sft": {"steps": 1}, "reasoning": {**LONG, "demonstrations": "mixture"}}, False),
    ],
)
def test_a_least_length_that_no_rationale_has_is_told_by_the_plan(change, told, caplog):
    "Where rationales are learned from: by a supervised stage, or as references of rgfn."
    rows = scene_rows("relation", 9, seed=8)
    longest = max(len(row["rationale"].encode()) for row in rows[:6])
    cfg = from_dict(StudyConfig, {"name": "short", "reasoning": LONG, "arms": {"a": {"algorithm": "rgfn"}}, **change})
    plan(cfg, Ground(rows[:6], [], [{**row, "task": "scenes/relation"} for row in rows[6:]], "weights"))
    assert len(caplog.messages) == told
    assert not told or f"100 tokens, but the longest of the 6 to learn from has {longest} bytes" in caplog.text


def test_no_rationale_has_more_tokens_than_bytes():
    "So that the plan needs no tokenizer: the line is told only where all tokenizers agree."
    rows = [{**row, "rationale": row["rationale"] + "é 数 😀"} for row in scene_rows("relation", 4, seed=8)]
    for processor in (specimen(name)[1] for name in ("llava", "qwen2_5_vl")):
        counts = [len(rationale_ids(processor, row["rationale"])) for row in rows]
        for least in range(max(counts) + 1):
            assert too_short(ReasoningConfig(min_tokens=least, max_tokens=999), rows) is None


# --- configs


def test_rules_are_those_that_exist():
    assert SelectConfig().rules == ("greedy", *RULES)
    for rule in RULES:
        assert from_dict(SelectConfig, {"rules": [rule]}).rules == (rule,)


def test_the_pocket_study_is_what_it_says():
    cfg = load_study(CONFIGS / "pocket.yaml")
    assert cfg.seeds == (0, 1, 2) and cfg.select.n == (1, 5, 10) and set(cfg.select.rules) == {"greedy", *RULES}
    assert [(arm.reward, arm.algorithm) for arm in cfg.arms.values()][:3] == [
        ("none", "grpo"),
        ("accuracy", "grpo"),
        ("none", "rgfn"),
    ]
    assert cfg.reasoning.layout == "turn" and cfg.reasoning.role == "Analyzer"


STAGED = "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>two and {}</REASONING><CONCLUSION>{}</CONCLUSION>"


@pytest.fixture(scope="module")
def rationale_set(tmp_path_factory):
    "A folder in the published schema of LLaVA-CoT-100k."
    folder = tmp_path_factory.mktemp("llava_cot")
    lines = []
    for i in range(24):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (9 * i, 5 * i, 90)).save(file, "PNG")
        said = [("human", "<image>\nHow many?"), ("gpt", STAGED.format(i, i))]
        talk = [{"from": who, "value": text} for who, text in said]
        lines.append({"image": {"bytes": file.getvalue(), "path": None}, "conversations": talk})
    pd.DataFrame(lines).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen2.5-vl-3b"])
def test_the_studies_at_full_size_are_planned_without_weights(name, rationale_set, tmp_path):
    few = [f"data.local={rationale_set}", "data.n=8", "eval.tasks={llava_cot: 4}"]
    cfg = load_study(CONFIGS / f"{name}.yaml", few)
    told = rehearsal(cfg, tmp_path)
    assert told.count("# to be run: ") == 3 and "rgfn-seed0" in told
    settings = rgfn_settings(cfg, "rgfn", 0)
    assert (settings.rationales, settings.min_tokens, settings.max_tokens, settings.interval) == (6, 64, 700, 1)
    assert (settings.lora_rank, settings.lora_alpha, settings.lr, settings.decay) == (64, 128, 1e-5, "cosine")
    assert (settings.tolerance, settings.tolerance_end, settings.reward_temperature_end) == (1.5, 1.0, 0.7)
    assert (settings.explore, settings.explore_low, settings.anneal_steps) == (0.25, 0.5, 50)
    assert settings.steps * settings.questions_per_step == 3000 and settings.trainer["bf16"]
    for told in (settings.trainer, cfg.sft.trainer, grpo_settings(cfg, "grpo", 0).trl):
        assert told["bf16"] and told["gradient_checkpointing"]
    assert cfg.sft.batch_size * cfg.sft.trainer["gradient_accumulation_steps"] == 8
    assert settings.empty == "off" and (cfg.reasoning.min_tokens, cfg.reasoning.max_tokens) == (64, 700)
    assert grpo_settings(cfg, "grpo", 0).max_new_tokens == 701  # and the token that ends
    assert grpo_settings(cfg, "grpo", 0).group_size == 6 and cfg.dtype == "bfloat16"
    assert load_study(CONFIGS / f"{name}.yaml").data.n == 3000

"The doctor of a sampler of rationales: what it must find, for both ways of training, and that nothing stays behind."

import json
import math
import os
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from vlm_reward import cli
from vlm_reward.core.config import load_config
from vlm_reward.core.terminal import Notice
from vlm_reward.lacot import rgfn, step
from vlm_reward.lacot.pair import add_lora, has_adapters
from vlm_reward.lacot.settings import RGFNSettings
from vlm_reward.lacot.turns import rationale_ids, turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.policy.specimens import SPECIMENS, specimen
from vlm_reward.studies.checks import check_room
from vlm_reward.studies.design import StudyConfig
from vlm_reward.studies.doctor import CHECKS, checks_of, examine, record_of, trial_of
from vlm_reward.studies.pair_trial import (
    PairTrial,
    as_it_was,
    check_answers,
    check_guide,
    check_pair_gold,
    filler,
    in_grpos_words,
    in_trls_words,
)
from vlm_reward.studies.reasoning import ReasoningConfig
from vlm_reward.studies.trial import Steps, check_groups, check_length, check_memory
from vlm_reward.train.grpo import GRPOSettings
from vlm_reward.worlds.scenes import scene_rows

REASONING = ReasoningConfig(layout="section", max_tokens=30, answer_tokens=4)
STAGE = GRPOSettings(steps=5, prompts_per_step=2, group_size=3, max_new_tokens=31)
RGFN = RGFNSettings(layout="section", steps=5, questions_per_step=2, rationales=3, max_tokens=30, answer_tokens=4)


@pytest.fixture(scope="module")
def pocket():
    return load_policy("pocket")


@pytest.fixture
def pair(pocket):
    "A trial by algorithm and reward; more fields of `PairTrial`, and of the settings of rgfn."

    def make(algorithm, reward="accuracy", rows=None, rgfn=None, **more):
        likely = algorithm == "rgfn"
        paid = {"balance": "group"} if likely and reward != "none" else {}
        told = replace(RGFN, **paid, **(rgfn or {}))
        rows = scene_rows("relation", 6, seed=3) if rows is None else rows
        fields = {"steps": 2, "reasoning": REASONING, "rgfn": told, "likely": likely} | more
        return PairTrial(*pocket, rows, reward, STAGE, **fields)

    return make


def found_by(check, trial, *parts, state="fail"):
    "Assert that a check found something, said in one line."
    finding = check(trial)
    assert finding.state == state, finding
    assert "\n" not in finding.why and all(part in finding.why for part in parts), finding.why
    json.dumps(record_of([finding]), allow_nan=False)
    return finding


KINDS = {
    "grpo": {"algorithm": "grpo"},
    "grpo, adapters": {"algorithm": "grpo", "rgfn": {"lora_rank": 2}},
    "rgfn": {"algorithm": "rgfn", "reward": "none"},
    "rgfn, adapters": {"algorithm": "rgfn", "reward": "none", "rgfn": {"lora_rank": 2, "save_every": 1}},
    "rgfn, reward": {"algorithm": "rgfn"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_start_goes_and_nothing_stays(pair, pocket, kind):
    trial = pair(**KINDS[kind])
    before = {name: p.clone() for name, p in trial.model.named_parameters()}
    findings = examine(trial, checks_of(trial))
    states = {f.name: f.state for f in findings}
    assert "fail" not in states.values(), findings
    assert [states[name] for name in ("room", "gold", "memory", "length", "answers", "time")] == ["pass"] * 6, findings
    extra = {"answers", "guide"} if trial.likely else {"answers"}
    assert set(states) == set(CHECKS) - ({"ban"} if trial.likely else set()) | extra
    assert not has_adapters(trial.model) and not hasattr(trial.model, "peft_config") and not trial.model.training
    after = dict(trial.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert all(p.requires_grad for p in after.values())


def test_a_pair_of_another_family_in_turns_of_its_own():
    model, processor = specimen("qwen2_5_vl", hidden=32)
    turns = replace(REASONING, layout="turn")
    for likely in (False, True):
        rows, rgfn = scene_rows("relation", 4, seed=3), replace(RGFN, layout="turn")
        trial = PairTrial(model, processor, rows, "accuracy", STAGE, steps=2, reasoning=turns, rgfn=rgfn)
        trial = replace(trial, likely=likely, reward="none" if likely else "accuracy", made={})
        states = {f.name: f.state for f in examine(trial, checks_of(trial))}
        assert [states[name] for name in ("pictures", "room", "packing", "memory", "time")] == ["pass"] * 5, states
        assert (states["length"], states["answers"]) == ("warn", "warn")  # untrained: nothing ends by itself


@pytest.mark.parametrize("algorithm", ["grpo", "rgfn"])
def test_rationales_that_are_cut_off(pair, algorithm):
    few = replace(REASONING, max_tokens=3)
    trial = pair(algorithm, reasoning=few, rgfn={"max_tokens": 3})
    trial.settings = replace(trial.settings, max_new_tokens=4)
    with warnings.catch_warnings(action="ignore"):  # references that are too long
        found = found_by(
            check_length, trial, "rationales are cut off at 3 tokens", "reasoning.max_tokens", state="warn"
        )
    assert found.numbers["cut"] == 1


@pytest.mark.parametrize("algorithm", ["grpo", "rgfn"])
def test_the_largest_batch_has_rationales_of_full_length(pair, algorithm):
    trial = pair(algorithm)
    finding = check_memory(trial)
    steps = trial.try_steps("largest")
    assert finding.state == "pass" and "6 rationales of 30" in finding.why
    assert [round(m["completions/mean_length"]) for m in steps.metrics] == [30 + (algorithm == "grpo")] * 2
    if algorithm == "grpo":  # rgfn has room for the token that ends behind the last
        assert [m["completions/clipped_ratio"] for m in steps.metrics] == [1, 1]


@pytest.fixture
def scored(monkeypatch):
    "Tokens of the texts of each question that are balanced, as the steps go on."
    seen, balance = [], rgfn.balance_questions

    def note(model, turns, inputs, works, settings, tolerance, never):
        for work in works:
            chosen, _ = step.choose(work, settings, tolerance)
            seen.append([len(work.texts[i]) for i in chosen])
        return balance(model, turns, inputs, works, settings, tolerance, never)

    monkeypatch.setattr(rgfn, "balance_questions", note)
    return seen


@pytest.mark.parametrize("reward", ["none", "accuracy"])
def test_the_largest_batch_has_a_reference_of_full_length(pair, scored, reward):
    assert pair("rgfn", reward).try_steps("largest")
    assert scored == [[30] * 4] * 4  # 3 that are drawn and the reference, of 2 questions in 2 steps


def test_the_largest_batch_has_references_as_the_run_has(pair, scored):
    rows = scene_rows("relation", 4, seed=3)
    bare = [{**row, "rationale": None} for row in rows]
    assert pair("rgfn", "none", rows=bare).try_steps("largest")
    assert pair("rgfn", "none", rgfn={"reference": False}).try_steps("largest")
    assert scored == [[30] * 3] * 8
    scored.clear()
    assert pair("rgfn", "none", rows=[*bare[:3], rows[3]]).try_steps("largest")
    assert scored == [[30] * 4] * 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("rgfn")])
def test_a_sound_study_gives_no_notice(pair, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        trial = pair(**KINDS[kind])
        findings = {f.name: f for f in examine(trial, checks_of(trial))}
    assert findings["memory"].state == findings["time"].state == "pass", findings


def test_what_is_noticed_is_told_once(pair):
    rows = [{**row, "rationale": None} for row in scene_rows("relation", 4, seed=3)]
    trial = pair("rgfn", "none", rows=rows)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        examine(trial, checks_of(trial))
    told = [str(one.message) for one in seen if issubclass(one.category, Notice)]
    assert len(told) == 1 and told[0].startswith("none of the 4 rows has a reference")


@pytest.mark.parametrize("family", ["pocket", *SPECIMENS])
def test_a_filler_has_as_many_tokens_as_are_asked_for(pocket, family):
    processor = pocket[1] if family == "pocket" else specimen(family, hidden=32)[1]
    for layout in ("turn", "section"):
        turns = turns_of(processor, layout)
        for n in (1, 2, 3, 30, 47, 256):
            text = filler(processor, turns, n)
            assert text is not None and len(rationale_ids(processor, text, turns)) == n


@pytest.mark.parametrize("algorithm", ["grpo", "rgfn"])
def test_rewards_that_teach_nothing(pair, algorithm, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def same(completion): return 1.0\n"
        "def mute(completion): return None\n"
        "def size(completion): return float(len(completion))\n"
    )
    mute = pair(algorithm, f"{tmp_path / 'mine.py'}:mute")
    found_by(check_groups, mute, "could not score any completion")
    if algorithm == "rgfn":
        found_by(check_groups, pair(algorithm, f"{tmp_path / 'mine.py'}:same"), "rgfn.prior", state="warn")
    same = pair(algorithm, f"{tmp_path / 'mine.py'}:same", rgfn={"prior": False})
    assert found_by(check_groups, same, "nothing can be learnt").numbers["dead"] == 1
    waits = pair(algorithm, f"{tmp_path / 'mine.py'}:same", stands_in=True)
    found_by(check_groups, waits, "look again when the supervised stage is done", state="warn")
    assert check_groups(pair(algorithm, f"{tmp_path / 'mine.py'}:size")).numbers["dead"] < 1


@pytest.fixture
def alike(monkeypatch):
    "All rationales of a question are one."
    draw = step.draw_rationales
    monkeypatch.setattr(
        step, "draw_rationales", lambda *a, n, **how: [each * n for each in draw(*a, **{**how, "n": 1})]
    )


def test_rationales_that_are_one_teach_by_their_prefixes(pair, alike):
    excused = ("100% of 16 groups", "by its prefixes", "rgfn.rationales")
    found_by(check_groups, pair("rgfn", "none", steps=8), *excused, state="warn")
    found_by(check_groups, pair("rgfn", "none", steps=8, stands_in=True), "supervised stage", state="warn")
    between = pair("rgfn", "none", rgfn={"balance": "group"}, steps=8)
    found_by(check_groups, between, "nothing can be learnt")


def test_rationales_that_are_one_and_have_no_prefixes(pair, alike):
    whole = {"min_tokens": 3, "max_tokens": 3, "reference": False, "filter": "none"}
    trial = pair("rgfn", "none", rgfn=whole, reasoning=replace(REASONING, min_tokens=3, max_tokens=3), steps=8)
    with warnings.catch_warnings(action="ignore"):  # references that are too long
        found_by(check_groups, trial, "100% of 16 groups", "nothing can be learnt")


def test_some_groups_that_are_dead(pair):
    some = {"frac_reward_zero_std": 0.75, "reward": 0.5, "reward_std": 0.1, "trained_frac": 1.0}
    for kind, remedy in [
        (("grpo",), "middle difficulty, or raise grpo.group_size"),
        (("rgfn",), "rgfn.prior; take rows of middle difficulty"),
        (("rgfn", "none"), "prefixes"),
    ]:
        trial = pair(*kind)
        trial.made = {"usual": Steps(1.0, [some], 1.0, 9.0)}
        found_by(check_groups, trial, "75% of 4 groups", remedy, state="warn")


def test_answers_that_cannot_be_written(pair):
    rows = [{**row, "solution": "left of the other object"} for row in scene_rows("relation", 4, seed=3)]
    found_by(check_answers, pair("grpo", rows=rows), "4 of 4 gold answers have more than 4 tokens", "answer_tokens")
    some = rows[:1] + scene_rows("relation", 3, seed=4)
    assert found_by(check_answers, pair("rgfn", rows=some), "1 of 4", state="warn").numbers["too_long"] == 1


def test_rows_that_ask_for_the_answer_alone(pair):
    rows = scene_rows("relation", 4, seed=3)
    bare = [{**row, "sections": []} for row in rows]
    (found,) = examine(pair("grpo", rows=bare), {"answers": check_answers})
    assert (found.state, found.numbers) == ("warn", {"replies": 0}) and "stopped" not in found.why
    assert "all 4 rows: they ask for the answer alone" in found.why and "rows with sections" in found.why
    assert check_answers(pair("grpo", rows=[*bare, rows[0]])).numbers["replies"] == 2


def test_answers_that_are_cut_off(pair):
    trial = pair("grpo", reasoning=replace(REASONING, answer_tokens=1, max_tokens=1))
    trial.model = add_noise(trial.model)
    found = found_by(
        check_answers, trial, "answers are cut off at 1 tokens", "raise reasoning.answer_tokens", state="warn"
    )
    assert found.numbers["cut"] > 0.5 and found.numbers["replies"] == 12
    trial.stands_in = True
    found_by(check_answers, trial, "look again when the supervised stage is done", state="warn")


def add_noise(model):
    "A policy that knows nothing any more."
    import copy

    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def test_a_guide_that_keeps_nothing(pair):
    alone = {"tolerance": 0.0, "tolerance_end": 0.0, "reference": False}  # R > 0 is impossible
    finding = found_by(
        check_guide, pair("rgfn", "none", rgfn=alone), "0% of rationales are kept", "nothing can be learnt"
    )
    assert finding.numbers["kept_frac"] == finding.numbers["trained_frac"] == 0
    found_by(check_guide, pair("rgfn", "none", rgfn=alone, stands_in=True), "nothing can be learnt", state="warn")
    copied = pair("rgfn", "none", rgfn=alone | {"reference": True})
    found_by(check_guide, copied, "100% of questions teach", "raise rgfn.tolerance", state="warn")


def test_references_that_are_missing_or_too_long(pair):
    rows = [{**row, "rationale": None} for row in scene_rows("relation", 4, seed=3)]
    found_by(check_guide, pair("rgfn", "none", rows=rows), "no row has a reference", state="warn")
    assert check_guide(pair("rgfn", "none", rows=rows, rgfn={"filter": "none"})).state == "pass"
    short = pair("rgfn", "none", rgfn={"max_tokens": 3}, reasoning=replace(REASONING, max_tokens=3))
    with pytest.warns(UserWarning, match="are left out"):
        found_by(
            check_guide,
            short,
            "references left out: 6 of 6 with more than 3 tokens",
            "raise reasoning.max",
            state="warn",
        )
    found = check_guide(short)
    assert "fewer" not in found.why and "min_tokens" not in found.why


def told_of_lengths(pair, least, most, rows=None):
    "What is told of the references of a pair with such lengths; most of the pocket's have 12 tokens or 9."
    bounds = {"min_tokens": least, "max_tokens": most}
    trial = pair("rgfn", "none", rows=rows, rgfn=bounds, reasoning=replace(REASONING, **bounds))
    with warnings.catch_warnings(action="ignore"):  # of the trainer
        return trial, check_guide(trial)


def test_references_that_are_too_short(pair):
    trial, finding = told_of_lengths(pair, 0, 24)
    sizes = trial.references
    assert min(sizes) < 20 and "left out" not in finding.why
    least = max(sizes) + 1
    _, finding = told_of_lengths(pair, least, 24)
    assert finding.state == "warn" and f"references left out: 6 of 6 with fewer than {least} tokens" in finding.why
    assert "lower reasoning.min_tokens" in finding.why and "max_tokens" not in finding.why


def test_references_that_are_too_short_and_others_too_long(pair):
    texts = ["left", "left of the other one", " left" * 40, None]
    rows = [{**row, "rationale": text} for row, text in zip(scene_rows("relation", 4, seed=3), texts, strict=True)]
    trial, finding = told_of_lengths(pair, 3, 24, rows)
    short, long = (sum(map(test, trial.references)) for test in (lambda n: n < 3, lambda n: n > 24))
    assert (len(trial.references), short, long) == (3, 1, 1)
    told = "1 of 3 with more than 24 tokens, 1 of 3 with fewer than 3 tokens"
    assert told in finding.why and "raise reasoning.max_tokens, lower reasoning.min_tokens" in finding.why


def test_few_questions_do_not_prove_that_none_teaches(pair):
    alone = {"kept_frac": 0.5, "trained_frac": 0.0, "reference_frac": 1.0, "log_reward": -3.0}
    for kept, steps, state in [(0.5, 2, "warn"), (0.5, 8, "fail"), (0.0, 2, "fail")]:
        trial = pair("rgfn", steps=steps)
        trial.made = {"usual": Steps(1.0, [alone | {"kept_frac": kept}], 1.0, 9.0)}
        said = "nothing was learnt from so few questions" if state == "warn" else "nothing can be learnt"
        found_by(check_guide, trial, said, "rgfn.tolerance", state=state)


def test_prompts_leave_room_for_rationale_and_answer(pair, monkeypatch):
    trial = pair("grpo")
    longest, turns = max(p.length for p in trial.prompts), trial.turns
    new = 30 + 1 + len(turns.bridge) + 4 + len(turns.closing)
    text = trial.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", longest + new)
    assert check_room(trial).state == "pass"
    monkeypatch.setattr(text, "max_position_embeddings", longest + new - 1)
    assert check_room(trial).state == "fail"


def test_a_reward_that_reads_what_the_answerer_finds_likely(pair):
    found_by(check_pair_gold, pair("grpo", "lacot"), "token_log_reward", "vlm-reward validate", state="warn")
    assert check_pair_gold(pair("rgfn", "none")).state == "pass"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, 0.0, 1.0, 2.0])), min_size=1, max_size=12))
@how(deadline=None, max_examples=100)
def test_names_of_trl_for_what_rgfn_tells(lines):
    drawn = [{"row_id": row, "reward": points} for row, points in lines]
    found = in_trls_words({"stop_rate": 0.25, "rationale_tokens": 7.0}, drawn, "reward")
    assert (found["completions/clipped_ratio"], found["completions/mean_length"]) == (0.75, 7.0)
    groups = [[p for id, p in lines if id == row and p is not None] for row in dict.fromkeys(id for id, _ in lines)]
    if not any(groups):
        assert "reward" not in found and "frac_reward_zero_std" not in found
        return
    dead = [len(set(points)) < 2 for points in groups]
    assert math.isclose(found["frac_reward_zero_std"], sum(dead) / len(dead))
    means = [sum(points) / len(points) for points in groups if points]
    assert math.isclose(found["reward"], sum(means) / len(means)) and (found["reward_std"] > 0) == (not all(dead))


def test_sizes_of_a_step():
    words = in_grpos_words(replace(RGFN, accumulate=2, seed=5))
    assert (words.prompts_per_step, words.group_size, words.accumulate, words.seed, words.steps) == (2, 3, 2, 5, 5)
    assert words.max_new_tokens == 31  # and the token that ends


def test_adapters_come_off_after_an_error_too(pocket):
    model = pocket[0]
    model.lm_head.weight.requires_grad_(False)
    try:
        with pytest.raises(KeyError), as_it_was(model):
            add_lora(model, 2)
            raise KeyError("x")
        assert not has_adapters(model)
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
            name for name, p in model.named_parameters() if p is model.lm_head.weight
        ]
        own = add_lora(model, 2)
        with as_it_was(own):
            pass
        assert has_adapters(own)  # they were there before
    finally:
        with as_it_was(model):
            pass
        for name, module in list(model.named_modules()):
            if hasattr(module, "get_base_layer"):
                model.set_submodule(name, module.get_base_layer())
        vars(model).pop("peft_config", None)
        model.requires_grad_(True)


STUDY = {
    "name": "tiny",
    "arms": {"paid": {"reward": "accuracy"}, "likely": {"algorithm": "rgfn"}, "none": {}},
    "seeds": [0],
    "data": {"n": 6},
    "eval": {"tasks": {"scenes/relation": 4}, "samples": 1},
    "reasoning": {"layout": "section", "max_tokens": 24},
    "grpo": {"steps": 1, "prompts_per_step": 2, "group_size": 2},
    "rgfn": {"steps": 1, "questions_per_step": 2, "rationales": 2, "lora_rank": 2},
    "workers": 1,
}


@pytest.mark.parametrize("arm", ["paid", "likely"])
def test_the_command_looks_at_studies_with_rationales(tmp_path, monkeypatch, capsys, arm):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    code = cli.main(["doctor", "tiny.yaml", "--arm", arm, "--steps", "2", "--json", "found.json"])
    out, record = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    names = [line["name"] for line in record["checks"]]
    assert names == [line.split()[1] for line in out.strip().splitlines()[1 : 1 + len(names)]]
    assert ("guide" in names, "ban" in names, "answers" in names) == (arm == "likely", arm == "paid", True)
    assert code == int(not record["go"]) and not (tmp_path / "runs").exists()
    assert all("stopped" not in line["why"] for line in record["checks"])


def test_the_trial_has_the_settings_of_the_run(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    cfg = load_config(StudyConfig, tmp_path / "tiny.yaml")
    paid, likely = (trial_of(cfg, arm, 5, tmp_path / "runs") for arm in ("paid", "likely"))
    assert (paid.likely, paid.settings.max_new_tokens, paid.settings.seed, paid.rgfn) == (False, 25, 5, cfg.rgfn)
    assert (likely.likely, likely.rgfn.seed, likely.rgfn.layout, likely.rgfn.max_tokens) == (True, 5, "section", 24)
    with pytest.raises(ValueError, match="only evaluated; choose one that is trained"):
        trial_of(cfg, "none", 0, tmp_path / "runs")

"Every check of the doctor, with a fault that it must find; and no fault hides another."

import copy
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_reward import cli
from vlm_reward.core.config import ConfigError, load_config
from vlm_reward.core.rows import make_row
from vlm_reward.core.settings import plain
from vlm_reward.policy.families import image_token_ids, load_policy
from vlm_reward.policy.specimens import SPECIMENS, specimen
from vlm_reward.studies import checks, trial
from vlm_reward.studies.checks import (
    Finding,
    Start,
    check_ban,
    check_gold,
    check_packing,
    check_pictures,
    check_room,
    feature_count,
)
from vlm_reward.studies.design import StudyConfig, load_ground, study_folder
from vlm_reward.studies.doctor import CHECKS, examine, examine_run, line_of, record_of, stage_before, trial_of, verdict
from vlm_reward.studies.job import save_policy, stage_place, stage_run
from vlm_reward.studies.trial import Steps, Trial, check_groups, check_length, check_memory, check_time, duration
from vlm_reward.train.grpo import GRPOSettings
from vlm_reward.worlds.scenes import scene_rows

SMALL = GRPOSettings(steps=5, prompts_per_step=2, group_size=2, max_new_tokens=6)


@pytest.fixture(scope="session")
def pocket():
    return load_policy("pocket")


@pytest.fixture
def start(pocket):
    return Trial(*pocket, scene_rows("relation", 6), "accuracy", SMALL, steps=2)


@pytest.fixture(scope="session")
def specimens():
    made = {}
    return lambda family: made.get(family) or made.setdefault(family, specimen(family, hidden=32))


def make_rows(*counts, question="what ?"):
    "Rows with so many pictures each."
    generator = np.random.default_rng(0)
    sizes = [(40, 60), (70, 30), (33, 64)]
    return [
        make_row(
            id=f"row-{i}",
            task="t",
            question=question * (1 + i % 3),
            images=[
                Image.fromarray(generator.integers(0, 255, (*sizes[(i + k) % 3], 3), dtype=np.uint8)) for k in range(n)
            ],
            solution="yes",
        )
        for i, n in enumerate(counts)
    ]


def failing(finding, *parts, state="fail"):
    "Assert that a check found something, said in one line."
    assert finding.state == state, finding
    assert "\n" not in finding.why and len(finding.why) < 500
    for part in parts:
        assert str(part) in finding.why, finding.why
    json.dumps(record_of([finding]), allow_nan=False)


# --- a sound start ---


@pytest.mark.parametrize("family", SPECIMENS)
def test_a_sound_start_of_every_family(specimens, family):
    model, processor = specimens(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sound = Trial(model, processor, make_rows(1, 2, 0, 1), "format", SMALL, steps=2)
    findings = examine(sound)
    states = {f.name: f.state for f in findings}
    assert list(states) == list(CHECKS)
    for name in ("pictures", "room", "ban", "gold", "packing", "memory", "time"):
        assert states[name] == "pass", findings
    assert [p.tokens > 0 for p in sound.prompts] == [True, True, False, True]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.training


def test_a_sound_start_goes(start):
    findings = examine(dataclasses.replace(start, settings=dataclasses.replace(SMALL, max_new_tokens=24, group_size=4)))
    record = record_of(findings)
    assert verdict(findings).startswith("go") and record["go"]
    assert [c["name"] for c in record["checks"]] == list(CHECKS)


# --- pictures ---


class Cutting:
    "A processor that cuts prompts."

    def __init__(self, processor, most):
        self.processor, self.most = processor, most

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **given):
        batch = self.processor(**given)
        fields = ("input_ids", "attention_mask", "mm_token_type_ids")
        return {name: value[:, : self.most] if name in fields else value for name, value in batch.items()}


@pytest.mark.parametrize("family", SPECIMENS)
def test_a_processor_that_cuts_prompts(specimens, family):
    model, processor = specimens(family)
    rows = make_rows(0, 1, 2)
    whole = [p.tokens for p in Start(model, processor, rows, "format", SMALL).prompts]
    cut = Start(model, Cutting(processor, 12), rows, "format", SMALL)
    assert [p.features for p in cut.prompts] == whole
    found = check_pictures(cut)
    assert found.numbers["unequal"] == 2
    failing(found, "'row-1'", f"for {whole[1]}", "truncation")


def test_a_question_with_a_placeholder_in_it(specimens):
    model, processor = specimens("llava")
    rows = make_rows(1, 1, question="what does <|image_pad|> mean ?")
    failing(check_pictures(Start(model, processor, rows, "format", SMALL)), "all 2 rows: 2", "'row-0'")


def test_a_row_that_cannot_be_read(specimens):
    model, processor = specimens("qwen2_5_vl")
    rows = make_rows(1, 1, 1)
    rows[1] = {**rows[1], "images": [Image.new("RGB", (1, 900))]}
    start = Start(model, processor, rows, "format", SMALL)
    failing(check_pictures(start), "1 cannot be read", "'row-1'", "aspect ratio")
    assert check_room(start).state == "pass"
    failing(check_room(dataclasses.replace(start, rows=rows[1:2])), "no prompt can be read")


@pytest.mark.parametrize("family", SPECIMENS)
def test_features_are_counted_from_the_tower(specimens, family):
    model, processor = specimens(family)
    start = Start(model, processor, make_rows(2, 0, 1), "format", SMALL)
    assert [p.features for p in start.prompts] == [p.tokens for p in start.prompts]
    assert feature_count(model, {"input_ids": torch.ones(1, 3)}) == 0


# --- room ---


def test_prompts_that_leave_no_room(specimens):
    model, processor = copy.deepcopy(specimens("smolvlm")[0]), specimens("smolvlm")[1]
    start = Start(model, processor, make_rows(0, 2), "format", SMALL)
    longest = max(p.length for p in start.prompts)
    model.config.get_text_config().max_position_embeddings = longest + 6
    assert check_room(start).state == "pass"
    model.config.get_text_config().max_position_embeddings = longest + 5
    failing(check_room(start), "1 too long, first 'row-1'", longest, longest + 5)


# --- the ban ---


@pytest.mark.parametrize("given", [{"suppress_tokens": [7]}, {"suppress_tokens": None}])
def test_settings_that_lift_the_ban(start, given):
    lifted = dataclasses.replace(SMALL, trl={"generation_kwargs": given})
    failing(check_ban(dataclasses.replace(start, settings=lifted)), image_token_ids(start.model)[0], "suppress_tokens")
    kept = dataclasses.replace(SMALL, trl={"generation_kwargs": {"top_k": 3}})
    assert check_ban(dataclasses.replace(start, settings=kept)).state == "pass"
    assert not start.model.lm_head._forward_hooks


def test_a_model_without_a_placeholder(start, monkeypatch):
    monkeypatch.setattr(checks, "image_token_ids", lambda model: [])
    failing(check_ban(start), "names no placeholder", state="warn")


# --- gold ---


@pytest.fixture
def own(tmp_path):
    "Rewards of a file: what is always the same, and what can never be scored."
    (tmp_path / "own.py").write_text(
        "def constant(completion):\n    return 1.0\n\n\ndef silent(completion):\n    return None\n\n\n"
        "def breaks(completion):\n    raise RuntimeError('no judge')\n\n\n"
        "def picky(completion, id):\n    return float(not id.endswith('/3'))\n"
    )
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


def test_gold_that_does_not_pay(start, own):
    found = check_gold(dataclasses.replace(start, reward=own("picky")))
    failing(found, start.rows[3]["id"], "1 of 6 rows")
    assert found.numbers["unpaid"] == 1


def test_gold_of_rewards_that_cannot_tell(start, own):
    failing(check_gold(dataclasses.replace(start, reward=own("silent"))), "silent")
    failing(check_gold(dataclasses.replace(start, reward="asm")), "image_attention", state="warn")
    (found,) = examine(dataclasses.replace(start, reward="no-such-reward"), {"gold": check_gold})
    failing(found, "the check stopped", "no-such-reward")


# --- packing ---


def test_models_that_cannot_be_packed(start, monkeypatch):
    monkeypatch.setattr(checks, "packing_problem", lambda model: "mamba2 passes a state from token to token")
    failing(check_packing(start), "mamba2", "once per completion", state="warn")


def test_packing_that_gives_other_numbers(start, monkeypatch):
    gap = checks.packing_gap

    def turned(model, inputs, ids, mask, member):
        return gap(model, inputs, ids, mask, member.flip(0).clamp(max=0)) + 0.01

    monkeypatch.setattr(checks, "packing_gap", turned)
    failing(check_packing(start), "differ by 1.0e-02", "load it with another attention", state="warn")
    monkeypatch.setattr(checks, "packing_gap", lambda *a: float("nan"))
    failing(check_packing(start), "NaN")


def test_packing_that_stops(start, monkeypatch):
    def stops(*a):
        raise RuntimeError("sizes\nmust match")

    monkeypatch.setattr(checks, "packing_gap", stops)
    failing(check_packing(start), "RuntimeError: sizes must match", "once per completion", state="warn")

    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checks, "packing_gap", full)
    with pytest.raises(torch.OutOfMemoryError):
        check_packing(start)


def test_the_trainer_and_the_check_allow_the_same(start, monkeypatch):
    for gap, state in ((2e-5, "pass"), (2e-4, "warn")):
        monkeypatch.setattr(checks, "packing_gap", lambda *a, gap=gap: gap)
        monkeypatch.setattr(checks, "allowed_gap", lambda model: 1e-4)
        assert check_packing(start).state == state


def test_weights_that_are_nan(start):
    model = copy.deepcopy(start.model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    findings = examine(dataclasses.replace(start, model=model, made={}))
    assert [f.name for f in findings] == list(CHECKS)
    states = {f.name: f.state for f in findings}
    assert states["pictures"] == states["room"] == states["gold"] == "pass"
    for found in findings:
        if found.name in ("packing", "memory", "groups"):
            failing(found)
            assert "nan" in found.why.lower() or "see above" in found.why


# --- steps ---


def test_the_largest_batch_is_the_largest(pocket, monkeypatch):
    rows = scene_rows("relation", 7)
    for i in (2, 5):
        rows[i]["prompt"][0]["content"][-1]["text"] += " really ?" * 9
    seen, whole = [], trial.train_grpo

    def note(model, processor, rows, rubric, still, **more):
        seen.append(([row["id"] for row in rows], still))
        return whole(model, processor, rows, rubric, still, **more)

    monkeypatch.setattr(trial, "train_grpo", note)
    start = Trial(*pocket, rows, "accuracy", dataclasses.replace(SMALL, updates=2))
    steps = start.try_steps("largest")
    assert start.try_steps("largest") is steps and len(seen) == 1
    assert set(seen[0][0]) == {rows[2]["id"], rows[5]["id"]}
    assert seen[0][1].lr == 0 and seen[0][1].steps == 4
    assert all(m["completions/min_length"] == 6 for m in steps.metrics if "completions/min_length" in m)
    assert 0.05 < steps.peak < steps.memory and steps.seconds > 0


def test_settings_of_generation_are_kept(pocket, monkeypatch):
    given = {"generation_kwargs": {"top_k": 4}, "max_grad_norm": 0.5}
    seen = []
    monkeypatch.setattr(
        trial, "train_grpo", lambda *a, **k: (seen.append(a[4]), k["progress"](1, {}), k["progress"](2, {}))
    )
    start = Trial(*pocket, scene_rows("relation", 4), "accuracy", dataclasses.replace(SMALL, trl=given))
    trial.make_steps(start, start.rows, 2, 6)
    longer = {"generation_kwargs": {"top_k": 4, "min_new_tokens": 6}}
    assert seen[0].trl == given | trial.STILL | longer
    trial.make_steps(start, start.rows, 2)
    assert seen[1].trl == given | trial.STILL
    remote = dataclasses.replace(start, settings=dataclasses.replace(SMALL, trl=given | {"use_vllm": True}))
    trial.make_steps(remote, start.rows, 2, 6)
    assert seen[2].trl["generation_kwargs"] == {"top_k": 4, "min_tokens": 6}


def test_a_trial_leaves_nothing(pocket, tmp_path):
    kept = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 1}
    given = kept | {"logging_steps": 10, "learning_rate": 0.1}
    before = {name: p.clone() for name, p in pocket[0].named_parameters()}
    start = Trial(*pocket, scene_rows("relation", 4), "accuracy", dataclasses.replace(SMALL, trl=given), steps=2)
    assert len(start.try_steps("usual").metrics) == 2
    assert all(torch.equal(p, before[name]) for name, p in pocket[0].named_parameters())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_the_seconds_of_an_update_hold_its_share_of_the_sampling(pocket, monkeypatch, updates):
    "Every sampling takes 12 seconds, the first 100; an update takes 1."
    clock = [0.0]

    def train(*a, progress, **k):
        for step in range(a[4].steps):
            sampling = (12 if step else 100) if step % updates == 0 else 0
            clock[0] += sampling + 1
            progress(step, {})

    monkeypatch.setattr(trial, "train_grpo", train)
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    start = Trial(*pocket, scene_rows("relation", 4), "accuracy", dataclasses.replace(SMALL, updates=updates))
    assert trial.make_steps(start, start.rows, 3).seconds == pytest.approx(1 + 12 / updates)


def test_memory_of_a_gpu(monkeypatch):
    said = {"mem_get_info": (60e9, 80e9), "memory_reserved": 5e9, "max_memory_reserved": 30e9}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    cleared = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: cleared.append("peak"))
    with trial.peak_memory(torch.device("cuda")) as found:
        pass
    assert found == {"peak": 30, "memory": 65} and cleared == ["cache", "peak"]


def made(start, kind, *, seconds=1.0, peak=1.0, memory=10.0, **metrics):
    "A start whose steps are known."
    usual = {"frac_reward_zero_std": 0.0, "reward": 0.5, "completions/clipped_ratio": 0.0, "completions/mean_length": 3}
    steps = Steps(seconds, [usual | {name.replace("__", "/"): v for name, v in metrics.items()}], peak, memory)
    return dataclasses.replace(start, made={**start.made, kind: steps})


def test_a_batch_that_does_not_fit(start, monkeypatch):
    def full(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(trial, "train_grpo", full)
    failing(check_memory(start), "does not fit", "accumulate", "4 completions of 6")
    full_gpu = made(start, "largest", peak=9.5)
    failing(check_memory(full_gpu), "9.5 of 10.0 GB", state="warn")
    fits = check_memory(made(start, "largest", peak=8))
    assert fits.state == "pass" and "longest of all 6 rows" in fits.why
    assert "this process has taken up to 8.0 of 10.0 GB" in fits.why


@pytest.mark.parametrize("metrics", [{"grad_norm": float("nan")}, {"loss": float("inf")}])
def test_steps_whose_numbers_are_none(start, metrics):
    failing(check_memory(made(start, "largest", **metrics)), "no number", "bfloat16")


def test_a_constant_reward_has_dead_groups_alone(start, own):
    constant = dataclasses.replace(start, reward=own("constant"), made={})
    found = check_groups(constant)
    failing(found, "100% of 4 groups", "nothing can be learnt")
    assert found.numbers["reward"] == 1


def test_few_dead_groups_prove_little(start):
    few = made(start, "usual", frac_reward_zero_std=1.0, reward_std=0.5)
    failing(check_groups(few), "100% of 4 groups", state="warn")
    many = dataclasses.replace(few, settings=dataclasses.replace(SMALL, prompts_per_step=8))
    failing(check_groups(many), "100% of 16 groups")


def test_dead_groups_before_a_supervised_stage_are_no_reason_to_stop(start):
    dead = made(start, "usual", frac_reward_zero_std=1.0, reward_std=0.0)
    failing(check_groups(dead), "nothing can be learnt", "95% interval 51% to 100%")
    failing(check_groups(dataclasses.replace(dead, stands_in=True)), "100% of 4", "supervised stage", state="warn")


def test_groups_that_are_often_dead(start):
    failing(
        check_groups(made(start, "usual", frac_reward_zero_std=0.75)), "75% of 4 groups", "group_size", state="warn"
    )
    assert check_groups(made(start, "usual", frac_reward_zero_std=0.5)).state == "pass"


def test_dead_groups_that_are_not_counted(start):
    failing(check_groups(made(start, "usual", frac_reward_zero_std=None)), "frac_reward_zero_std", state="warn")


def test_completions_that_cannot_be_scored(start, own):
    silent = dataclasses.replace(start, reward=own("silent"), made={})
    failing(check_groups(silent), "could not score any")


def test_completions_that_are_cut(start):
    failing(check_length(made(start, "usual", completions__clipped_ratio=0.8)), "80%", "max_new_tokens", state="warn")
    assert check_length(made(start, "usual", completions__clipped_ratio=0.2)).state == "pass"


def test_time(start):
    found = check_time(made(made(start, "usual", seconds=120), "largest", seconds=1200))
    assert found.state == "pass" and "10.0 minutes, 100.0 minutes if all" in found.why
    assert found.numbers == {"seconds_per_step": 120, "minutes": 10, "minutes_at_most": 100}
    assert "if all" not in check_time(made(start, "usual")).why
    slower = check_time(made(made(start, "usual", seconds=120), "largest", seconds=60))
    assert "if all" not in slower.why and slower.numbers["minutes_at_most"] == 10
    assert "supervised" not in found.why and "the evaluation comes on top" in found.why
    assert "supervised" in check_time(dataclasses.replace(made(start, "usual"), stands_in=True)).why


@given(st.floats(0, 1e7))
def test_durations_are_short(seconds):
    number, unit = duration(seconds).split()
    size = {"seconds": 1, "minutes": 60, "hours": 3600}[unit]
    assert float(number) * size == pytest.approx(seconds, rel=0.05, abs=0.51)


def test_a_step_that_stops_is_told_once_and_tried_once(start, own, monkeypatch):
    calls, whole = [], trial.train_grpo
    monkeypatch.setattr(trial, "train_grpo", lambda *a, **k: (calls.append(1), whole(*a, **k)))
    findings = examine(dataclasses.replace(start, reward=own("breaks"), made={}))
    assert [f.name for f in findings] == list(CHECKS) and len(calls) == 1
    for found in findings:
        if found.name in ("gold", "memory"):
            failing(found, "no judge")
        elif found.name in ("groups", "length", "time"):
            failing(found, "no steps could be made, see above")
        else:
            assert found.state == "pass"
    assert verdict(findings) == "no-go: gold, memory, groups, length, time failed"


def test_usual_steps_are_tried_where_the_largest_do_not_fit(start, monkeypatch):
    def full(trial):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "largest_steps", full)
    states = {f.name: f.state for f in examine(start, {n: CHECKS[n] for n in ("memory", "length", "time")})}
    assert states["memory"] == "fail" and states["time"] == "pass"


def test_usual_steps_that_stop_leave_the_largest(start, monkeypatch):
    def stops(trial):
        raise ValueError("stopped")

    monkeypatch.setattr(trial, "usual_steps", stops)
    found = {f.name: f for f in examine(start, {n: CHECKS[n] for n in ("memory", "groups", "length", "time")})}
    assert found["memory"].state == "pass" and "stopped" in found["groups"].why
    assert all("see above" in found[name].why for name in ("length", "time"))


# --- the whole ---


@given(st.lists(st.sampled_from(["pass", "warn", "fail"]), min_size=1, max_size=5))
@settings(max_examples=60)
def test_go_or_no_go(states):
    findings = [Finding(f"check-{i}", state, "why", {"x": float("nan"), "y": 1}) for i, state in enumerate(states)]
    said, record = verdict(findings), record_of(findings)
    assert said.startswith("no-go") == ("fail" in states) == (not record["go"])
    assert said == "go" or all(f.name in said for f in findings if f.state == ("fail" if "fail" in states else "warn"))
    assert record["checks"][0]["numbers"] == {"x": None, "y": 1} and json.dumps(record, allow_nan=False)
    assert all("\n" not in line_of(f) for f in findings)


def test_checks_do_not_hide_each_other():
    def breaks(start):
        raise KeyError("x\ny")

    told = []
    findings = examine(
        Trial(None, None, [], "", SMALL, notes=[Finding("stage", "warn", "not done")]),
        {"a": breaks, "b": lambda start: Finding("b", "pass", "fine"), "c": breaks},
        told.append,
    )
    assert [(f.name, f.state) for f in findings] == [("stage", "warn"), ("a", "fail"), ("b", "pass"), ("c", "fail")]
    assert told == findings and findings[1].why == "the check stopped: KeyError: 'x\\ny'"

    def stopped(start):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(Trial(None, None, [], "", SMALL), {"a": stopped})


@given(n=st.integers(1, 60), most=st.integers(1, 60), seed=st.integers(0, 5))
def test_the_share_of_rows(n, most, seed):
    rows = [{"id": str(i)} for i in range(n)]
    start = Start(None, None, rows, "accuracy", dataclasses.replace(SMALL, seed=seed), most=most)
    ids = [int(row["id"]) for row in start.share]
    assert len(ids) == min(n, most) == len(set(ids)) and ids == sorted(ids)
    assert start.share == dataclasses.replace(start).share
    assert start.seen.startswith("all") == (most >= n)


TINY = {
    "name": "tiny",
    "arms": {"sft": {}, "accuracy": {"reward": "accuracy"}, "plain": {"reward": "accuracy", "base": "policy"}},
    "seeds": [0],
    "data": {"n": 6},
    "eval": {"tasks": {"scenes/relation": 4}, "samples": 1},
    "grpo": {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6},
    "workers": 1,
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path / "tiny.yaml"


def test_a_supervised_stage_that_is_not_done(study, tmp_path):
    cfg = load_config(StudyConfig, study, ["sft.steps=2", "sft.batch_size=2"])
    waits = trial_of(cfg, "accuracy", 0, tmp_path / "runs")
    assert [(f.name, f.state) for f in waits.notes] == [("stage", "warn")] and waits.stands_in
    other = trial_of(cfg, "plain", 0, tmp_path / "runs")
    assert not other.notes and not other.stands_in
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="only evaluated; choose one that is trained"):
        trial_of(cfg, "sft", 0, tmp_path / "runs")
    for wrong in ({"most": 0}, {"steps": 1}):
        with pytest.raises(ConfigError, match="at least 1 row and 2 steps"):
            trial_of(cfg, "accuracy", 0, tmp_path / "runs", **wrong)


def test_a_supervised_stage_that_is_done(study, tmp_path, pocket):
    cfg = load_config(StudyConfig, study, ["sft.steps=2", "sft.batch_size=2"])
    folder = study_folder(cfg, tmp_path / "runs")
    path, config, name = stage_place(cfg, folder, load_ground(cfg))
    run = stage_run(cfg, folder, load_ground(cfg))
    assert (run.path, run.config) == (path, plain(config)) and path.name.endswith(name)
    assert stage_before(cfg, "accuracy", tmp_path / "runs", load_ground(cfg)) == (None, True)
    model = copy.deepcopy(pocket[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save_policy(model, pocket[1], run.checkpoints / "final")
    run.finish({"minutes": 0})
    after = trial_of(cfg, "accuracy", 0, tmp_path / "runs")
    assert not after.notes and not after.stands_in
    assert torch.equal(after.model.lm_head.weight, model.lm_head.weight)
    assert torch.equal(trial_of(cfg, "plain", 0, tmp_path / "runs").model.lm_head.weight, pocket[0].lm_head.weight)


def test_a_step_needs_its_rows(study, tmp_path):
    cfg = load_config(StudyConfig, study, ["grpo.prompts_per_step=4"])
    few = trial_of(cfg, "accuracy", 0, tmp_path / "runs", most=1)
    assert len(few.share) == 4
    assert len(trial_of(cfg, "accuracy", 0, tmp_path / "runs", most=5).share) == 5


def test_replayed_examples_belong_to_the_steps(study, tmp_path):
    cfg = load_config(StudyConfig, study, ["replay={scenes/describe: 3}", "grpo.replay=0.1", "grpo.replay_batch=2"])
    findings = examine_run(cfg, "accuracy", 0, tmp_path / "runs", steps=2)
    assert all(f.state != "fail" for f in findings if f.name in ("memory", "time"))


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_goes(study, capsys, tmp_path):
    code, out, err = run(
        capsys, "doctor", study, "--arm", "accuracy", "--steps", "2", "--rows", "4", "--json", tmp_path / "found.json"
    )
    lines, record = out.strip().splitlines(), json.loads((tmp_path / "found.json").read_text())
    assert lines[0] == "pocket on scenes/relation, arm accuracy, seed 0"
    assert [line.split()[1] for line in lines[1:10]] == list(CHECKS) == [c["name"] for c in record["checks"]]
    assert "4 rows chosen out of 6" in out
    assert code == int(not record["go"]) and (lines[-1].startswith("go") or "no-go" in err)
    assert not (tmp_path / "runs").exists()


def test_the_command_does_not_go(study, capsys, tmp_path, own):
    words = ("doctor", study, "--reward", own("constant"), "--steps", "2", "--json", tmp_path / "found.json")
    code, out, err = run(capsys, *words)
    assert code == 1 and err.strip() == "vlm-reward: error: no-go: groups failed"
    assert "fail  groups" in out and not json.loads((tmp_path / "found.json").read_text())["go"]


@pytest.mark.parametrize(
    "words, parts",
    [
        (("--arm", "acuracy"), ["'acuracy'", "did you mean accuracy"]),
        (("--arm", "sft"), ["'sft'", "only evaluated"]),
        (("--arm", "accuracy", "--rows", "0"), ["at least 1 row"]),
        (("--arm", "accuracy", "--grpo.group_size", "1"), ["group_size"]),
        (("--arm", "accuracy", "--policy", "no-such-policy"), ["no-such-policy"]),
    ],
)
def test_bad_words_are_one_line(study, capsys, words, parts):
    code, _, err = run(capsys, "doctor", study, *words)
    assert code == 2 and len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


def test_the_command_rehearses_as_train_does(study, capsys):
    doctor, train = (run(capsys, name, study, "--arm", "accuracy", "--dry-run") for name in ("doctor", "train"))
    assert doctor == train and doctor[0] == 0


def test_a_reward_that_needs_observables(pocket):
    settings = dataclasses.replace(SMALL, max_new_tokens=24, group_size=4)
    start = Trial(*pocket, scene_rows("relation", 6), "format+accuracy+asm", settings, steps=2)
    states = {f.name: f.state for f in examine(start)}
    assert states["gold"] == "warn" and "fail" not in states.values()

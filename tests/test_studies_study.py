"Studies: digests against what may change a result, equal metrics in any process, failure, interruption and resumption."

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_reward.core.config import ConfigError, from_dict, to_dict, to_yaml
from vlm_reward.core.runs import Run, RunError
from vlm_reward.core.store import locked
from vlm_reward.data.stored import tell_once
from vlm_reward.policy.families import load_policy
from vlm_reward.studies import study as chapter
from vlm_reward.studies.design import StudyConfig, load_ground, load_study, plan, study_folder
from vlm_reward.studies.job import run_job, run_stage, stage_run, target_completion
from vlm_reward.studies.study import (
    StudyError,
    arrange,
    do_jobs,
    open_jobs,
    open_study,
    run_one,
)

REWARDS = """
def vowels(completion):
    "A reward that a policy of random weights can earn in part, so that its gradients are not zero."
    return sum(c in "aeiouAEIOU0123456789" for c in completion) / (len(completion) + 1)

def length(completion):
    return len(completion) / 50

def broken(completion):
    raise KeyError("boxes")

def interrupt(completion):
    raise KeyboardInterrupt

def slow(completion):
    import time
    time.sleep(0.02)
    return len(completion) / 50
"""


@pytest.fixture(scope="session")
def tiny_policy(tiny_vlm, tmp_path_factory):
    "A folder with a policy of random weights."
    folder = tmp_path_factory.mktemp("policy")
    for part in tiny_vlm:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rewards(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    return file


@pytest.fixture
def make(tiny_policy, rewards):
    "A config, from the changes to a tiny one."

    def make(arms=("vowels",), **changes):
        named = {arm: {"reward": f"{rewards}:{arm}"} for arm in arms}
        tiny = {
            "name": "tiny",
            "policy": tiny_policy,
            "arms": {"sft": {}, **named},
            "seeds": [0],
            "data": {"n": 8},
            "eval": {"tasks": {"scenes/relation": 4}, "samples": 2, "max_new_tokens": 8},
            "grpo": {"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "lr": 1e-2},
            "workers": 1,
        }
        return from_dict(StudyConfig, {**tiny, **changes})

    return make


def do(cfg, root):
    "All jobs, without a report."
    ground = load_ground(cfg)
    folder, jobs = open_study(cfg, root, ground)
    arrange(folder, jobs)
    do_jobs(cfg, jobs, folder, ground, io.StringIO())
    return folder


def results(path):
    "Everything in a run folder that must be equal in equal runs."
    run = Run(path)
    tables = [run.metrics(), run.rollouts(), run.table("evaluation")]
    return repr([table.to_dict("records") for table in tables])


def stamps(folder):
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("arms/*/finished.json")}


# --- digests


@pytest.fixture(scope="session")
def ground(tiny_policy):
    cfg = from_dict(
        StudyConfig, {"name": "g", "policy": tiny_policy, "data": {"n": 4}, "eval": {"tasks": {"scenes/relation": 2}}}
    )
    return load_ground(cfg)


RESULT_CHANGES = [
    {"threads": 3},
    {"dtype": "bfloat16"},
    {"device": "cuda"},
    {"revision": "abc"},
    {"data": {"seed": 9}},
    {"eval": {"samples": 3}},
    {"eval": {"seed": 8}},
    {"eval": {"max_new_tokens": 9}},
    {"eval": {"batch_size": 9}},
    {"eval": {"greedy": False}},
    {"grpo": {"lr": 0.5}},
    {"grpo": {"trl": {"epsilon": 0.1}}},
    {"prompt": "Think."},
    {"sft": {"steps": 3}},
]
OTHER_CHANGES = [
    {"name": "another"},
    {"workers": 9},
    {"save_checkpoints": True},
    {"rollout_images": True},
    {"data": {"local": "/somewhere"}},
    {"seeds": [0, 1, 2]},
    {"arms": {"accuracy": {"reward": "accuracy"}, "format": {"reward": "format"}}},
]


def merged(base, change):
    return {
        k: {**base[k], **v} if k in base and isinstance(v, dict) and k != "arms" else v
        for k, v in {**base, **change}.items()
    }


def job_of(ground, *changes):
    cfg = {"name": "d", "seeds": [0], "arms": {"accuracy": {"reward": "accuracy"}}, "grpo": {"prompts_per_step": 2}}
    for change in changes:
        cfg = merged(cfg, change)
    cfg = from_dict(StudyConfig, cfg)
    (job,) = [job for job in plan(cfg, ground) if (job.arm, job.seed) == ("accuracy", 0)]
    return job


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.sampled_from(range(len(RESULT_CHANGES)))), st.sets(st.sampled_from(range(len(OTHER_CHANGES)))))
def test_a_digest_changes_with_the_result_and_with_nothing_else(ground, important, idle):
    changes = [RESULT_CHANGES[i] for i in important]
    alone = job_of(ground, *changes)
    assert job_of(ground, *changes, *[OTHER_CHANGES[i] for i in idle]).digest == alone.digest
    assert (alone.digest == job_of(ground).digest) == (not important)


def test_rows_and_weights_are_part_of_the_digest(ground):
    base = job_of(ground)
    for name in ("training", "held_out"):
        fewer = ground._replace(**{name: getattr(ground, name)[1:]})
        assert job_of(fewer).digest != base.digest
    assert job_of(ground._replace(weights="others")).digest != base.digest


def test_the_place_of_rows_and_of_reward_files_does_not_matter(make, tmp_path, ground):
    first = plan(make(), ground)
    moved = tmp_path / "elsewhere" / "rewards.py"
    moved.parent.mkdir()
    moved.write_text(REWARDS)
    cfg = make()
    arms = {**cfg.arms, "vowels": replace(cfg.arms["vowels"], reward=f"{moved}:vowels")}
    assert [j.digest for j in plan(replace(cfg, arms=arms), ground)] == [j.digest for j in first]
    moved.write_text(REWARDS + "\n# changed")
    assert [a.digest == b.digest for a, b in zip(plan(replace(cfg, arms=arms), ground), first, strict=True)] == [
        True,
        False,
    ]


def test_a_copied_policy_is_the_same_policy_and_a_trained_one_is_not(make, tiny_policy, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_policy, tmp_path / "copy")
    weights = [load_ground(make(policy=str(p))).weights for p in (tiny_policy, copy)]
    assert weights[0] == weights[1]
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert load_ground(make(policy=str(copy))).weights != weights[0]


def test_a_row_cannot_be_trained_on_and_held_out(make, monkeypatch):
    from vlm_reward.worlds.scenes import scene_rows

    monkeypatch.setattr("vlm_reward.studies.design.load_rows", lambda name, *, n, **_: scene_rows("relation", n))
    with pytest.raises(ConfigError, match=r"scenes/relation/0/0.*is held out and stands in the training rows"):
        load_ground(make())


# --- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpro": {}}, ["gpro", "grpo"]),
        ({"grpo": {"stps": 3}}, ["grpo.stps", "steps"]),
        ({"grpo": {"steps": "many"}}, ["grpo.steps", "many"]),
        ({"workers": 0}, ["workers", "0"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [0, 0]}, ["seeds", "twice"]),
        ({"arms": {}}, ["arms"]),
        ({"arms": {"../up": {}}}, ["../up", "folder"]),
        ({"arms": {"a": {"reward": "acuracy"}}}, ["acuracy", "accuracy"]),
        ({"arms": {"a": {"reward": "none/here.py:f"}}}, ["none/here.py"]),
        ({"arms": {"a": {"reward": "accuracy", "grpo": {"seed": 4}}}}, ["arms.a.grpo.seed", "seeds"]),
        ({"arms": {"a": {"reward": "accuracy", "base": "stf"}}}, ["arms.a.base", "stf", "sft"]),
        ({"eval": {"tasks": {"scenes/where": 3}}}, ["scenes/relation", "not measured"]),
        ({"eval": {"tasks": {"scenes/relation": 0}}}, ["scenes/relation", "at least 1"]),
        ({"name": "a/b"}, ["a/b", "folder"]),
        ({"data": {"n": 0}}, ["data.n", "0"]),
        ({"arms": {"a": {"algorithm": "rgfn"}}}, ["arms.a.algorithm", "'rgfn'", "add reasoning"]),
        ({"arms": {"a": {"algorithm": "rgnf"}}}, ["arms.a.algorithm", "rgnf", "rgfn"]),
        ({"select": {}}, ["select.n", "[1, 5, 10]", "add reasoning"]),
        ({"reasoning": {}, "select": {"n": [0]}}, ["select.n", "at least 1", "0"]),
        ({"reasoning": {}, "select": {"n": [5, 5]}}, ["select.n", "none twice", "[5, 5]"]),
        ({"reasoning": {}, "select": {"rules": []}}, ["select.rules", "at least one"]),
        ({"reasoning": {}, "select": {"rules": ["majorty"]}}, ["select.rules.0", "majorty", "majority"]),
        ({"reasoning": {"layout": "tern"}}, ["reasoning.layout", "tern", "turn"]),
        ({"reasoning": {"without": 1.0}}, ["reasoning.without", "0.9", "1.0"]),
        ({"reasoning": {}, "rgfn": {"role": "Thinker"}}, ["rgfn.role", "Thinker", "reasoning.role"]),
        ({"reasoning": {}, "rgfn": {"min_tokens": 4}}, ["rgfn.min_tokens", "4", "reasoning.min_tokens"]),
        ({"reasoning": {}, "rgfn": {"max_tokens": 4}}, ["rgfn.max_tokens", "4", "reasoning.max_tokens"]),
        ({"reasoning": {}, "grpo": {"max_new_tokens": 4}}, ["grpo.max_new_tokens", "4", "reasoning.max_tokens"]),
        (
            {"reasoning": {}, "arms": {"a": {"reward": "accuracy", "grpo": {"max_new_tokens": 4}}}},
            ["arms.a.grpo.max_new_tokens", "4", "reasoning.max_tokens"],
        ),
        ({"reasoning": {"min_tokens": 9, "max_tokens": 8}}, ["reasoning.min_tokens", "9", "8", "no rationale can end"]),
        ({"reasoning": {}, "grpo": {"replay": 0.1}}, ["grpo.replay", "0.1", "set it to 0"]),
        (
            {"reasoning": {}, "arms": {"a": {"reward": "accuracy", "rgfn": {"lr": 1.0}}}},
            ["arms.a.rgfn", "lr", "algorithm"],
        ),
        ({"reasoning": {}, "arms": {"a": {"algorithm": "rgfn", "rgfn": {"stps": 1}}}}, ["arms.a.rgfn.stps", "steps"]),
        ({"reasoning": {}, "arms": {"a": {"algorithm": "rgfn", "rgfn": {"seed": 1}}}}, ["arms.a.rgfn.seed", "seeds"]),
    ],
)
def test_bad_settings_are_one_line(tmp_path, change, words):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"name": "bad", "arms": {"accuracy": {"reward": "accuracy"}}, **change}))
    with pytest.raises(ValueError) as caught:
        load_study(file)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"name": "scenes/relatoin"}, "eval": {"tasks": {"scenes/relatoin": 2}}}, ["scenes/relatoin"]),
        ({"eval": {"tasks": {"scenes/relation": 2, "scenes/were": 2}}}, ["scenes/were"]),
        (
            {"data": {"name": "algopuzzle", "n": 4, "local": "/no/such/folder"}, "eval": {"tasks": {"algopuzzle": 2}}},
            ["/no/such/folder"],
        ),
    ],
)
def test_rows_that_cannot_be_loaded_are_one_line(make, change, words):
    with pytest.raises(ValueError) as caught:
        plan(make(**change))
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_a_folder_that_cannot_be_written_is_one_line(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="file"):
        open_study(make(), tmp_path / "file")


# --- doing


def test_metrics_are_equal_after_any_other_job(make, tmp_path):
    "That they are equal in another process, too, is checked where Ctrl-C is."
    cfg = make(("vowels", "length"), grpo={**to_dict(make().grpo), "steps": 3})
    both = do(cfg, tmp_path / "both")
    alone = do(replace(cfg, arms={"length": cfg.arms["length"]}), tmp_path / "alone")
    (run,) = (alone / "arms").iterdir()
    assert results(run) == results(both / "arms" / run.name)
    # the job did learn something, so the comparison is not of zeros
    metrics = Run(run).metrics()
    assert metrics["grad_norm"].max() > 0 and metrics["reward"].nunique() > 1


def test_the_second_time_nothing_is_done_and_one_more_arm_is_one_more_job(make, tmp_path, monkeypatch):
    first = do(make(), tmp_path)
    before = stamps(first)
    assert len(before) == 2
    monkeypatch.setattr(chapter, "run_tasks", lambda *a, **k: pytest.fail("a finished job was done again"))
    assert do(make(), tmp_path) == first
    monkeypatch.undo()
    do(make(("vowels", "length"), seeds=[0]), tmp_path)
    after = stamps(first)
    assert len(after) == 3 and before.items() <= after.items()
    # an arm that is no longer asked for is put aside, and comes back as it was
    do(make(("length",)), tmp_path)
    assert {n.split("-")[0] for n in stamps(first)} == {"sft", "length"}
    do(make(("vowels",)), tmp_path)
    assert {n.split("-")[0] for n in stamps(first)} == {"sft", "vowels"} and before == stamps(first)


def test_a_broken_reward_stops_its_arm_only(make, tmp_path):
    cfg = make(("broken", "length"), seeds=[0, 1])
    with pytest.raises(StudyError) as caught:
        do(cfg, tmp_path)
    text = str(caught.value)
    assert "\n" not in text and "2 of 6 runs failed" in text and "broken-seed0" in text and "boxes" in text
    folder = study_folder(cfg, tmp_path)
    assert {n.split("-")[0] for n in stamps(folder)} == {"sft", "length"} and len(stamps(folder)) == 4
    assert 'raise KeyError("boxes")' in (folder / "logs" / "broken-seed1.txt").read_text()
    left = open_jobs(cfg, plan(cfg), folder)
    assert {job.arm for job in left} == {"broken"}


def test_an_interrupted_job_begins_anew_and_leaves_nothing_behind(make, tmp_path, rewards):
    cfg = make(("length", "interrupt"))
    with pytest.raises(KeyboardInterrupt):
        do(cfg, tmp_path)
    folder = study_folder(cfg, tmp_path)
    (half,) = folder.glob("arms/interrupt-*")
    assert not (half / "finished.json").exists()
    (half / "metrics.jsonl").write_text('{"step": 1, "reward": 99.0}\n')
    (half / "rollouts").mkdir(exist_ok=True)
    (half / "rollouts" / "step_00077.parquet").write_bytes(b"half")
    before = stamps(folder)
    with pytest.raises(KeyboardInterrupt):
        do(cfg, tmp_path)
    assert before.items() <= stamps(folder).items()
    assert not (half / "rollouts" / "step_00077.parquet").exists()
    assert "99.0" not in ((half / "metrics.jsonl").read_text() if (half / "metrics.jsonl").exists() else "")


def test_a_study_is_worked_on_once_at_a_time(make, tmp_path):
    cfg = make()
    with locked(study_folder(cfg, tmp_path)), pytest.raises(RunError, match="another process"):
        run_one(cfg, "sft", 0, tmp_path, progress=False)


def test_a_run_alone_leaves_other_runs_where_they_are(make, tmp_path):
    "`train --reward A`, then `train --reward B`: one folder, and the place of the first is still true."
    first = run_one(make(("vowels",)), "vowels", 0, tmp_path, progress=False)
    before = results(first.path)
    second = run_one(make(("length",)), "length", 0, tmp_path, progress=False)
    assert second.path.parent == first.path.parent and results(first.path) == before
    assert not list((tmp_path / first.path.parents[1].name / "shelf").iterdir())
    # a study puts away what it does not ask for, and a run alone brings back its own only
    folder = do(make(("vowels",)), tmp_path)
    assert [p.name for p in (folder / "shelf").iterdir()] == [second.path.name]
    do(make(()), tmp_path)
    stamp = (folder / "shelf" / first.path.name / "finished.json").stat().st_mtime_ns
    run_one(make(("vowels",)), "vowels", 0, tmp_path, progress=False)
    assert (first.path / "finished.json").stat().st_mtime_ns == stamp
    assert [p.name for p in (folder / "shelf").iterdir()] == [second.path.name]


def test_checkpoints_that_are_asked_for_later(make, tmp_path):
    folder = do(make(), tmp_path)
    before = {path.name: results(path) for path in (folder / "arms").iterdir()}
    do(make(save_checkpoints=True), tmp_path)
    assert {path.name: results(path) for path in (folder / "arms").iterdir()} == before
    paths = {p.parents[1].name.split("-")[0]: p for p in folder.glob("arms/*/checkpoints/final")}
    assert set(paths) == {"sft", "vowels"}
    (sft, _), (trained, _) = (load_policy(str(paths[arm])) for arm in ("sft", "vowels"))
    moved = [(a - b).abs().max().item() for a, b in zip(sft.parameters(), trained.parameters(), strict=True)]
    assert max(moved) > 0


def test_the_supervised_stage_is_done_once_and_shared(make, tmp_path):
    cfg = make(sft={"steps": 2, "batch_size": 2, "lr": 1e-2})
    arms = {**cfg.arms, "raw": replace(cfg.arms["sft"], base="policy")}
    cfg = replace(cfg, arms=arms)
    folder = do(cfg, tmp_path)
    (stage,) = (folder / "stage").iterdir()
    finished = (stage / "finished.json").stat().st_mtime_ns
    tables = {p.name.split("-")[0]: Run(p).table("evaluation") for p in (folder / "arms").iterdir()}
    assert list(tables["sft"]["completion"]) != list(tables["raw"]["completion"])
    do(replace(cfg, seeds=(0, 1)), tmp_path)
    assert (stage / "finished.json").stat().st_mtime_ns == finished
    # the arm that does not start from the stage does not care about it
    other = replace(cfg, sft=replace(cfg.sft, steps=3))
    same = {a.arm: a.digest == b.digest for a, b in zip(plan(cfg), plan(other), strict=True)}
    assert same == {"sft": False, "vowels": False, "raw": True}
    assert stage_run(other, folder, load_ground(other)).path != stage


def test_a_stage_of_small_steps_moves_weights_of_16_bits(make, tmp_path):
    "It is trained in float32, and kept in the study's number format."
    small = {"steps": 4, "batch_size": 2, "lr": 1e-6, "warmup": 0, "decay": "constant"}
    with pytest.raises(ConfigError, match="are rounded away in weights of bfloat16; set sft"):
        make(sft=small, dtype="bfloat16")
    cfg = make(sft={**small, "lr": 3e-5, "trainer": {"bf16": True}}, dtype="bfloat16")
    run = stage_run(cfg, tmp_path, load_ground(cfg))
    run_stage(cfg, cfg.sft, run, lambda n: None)
    (first, _), (trained, _) = (
        load_policy(place, dtype="bfloat16") for place in (cfg.policy, str(run.checkpoints / "final"))
    )
    pairs = list(zip(first.parameters(), trained.parameters(), strict=True))
    assert json.loads((run.checkpoints / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum((a != b).sum().item() for a, b in pairs) > 0.05 * sum(a.numel() for a, _ in pairs)


def test_settings_of_the_stage_that_are_not_used_leave_digests_as_they_were(ground):
    (plain,) = {job_of(ground, {"sft": sft}).digest for sft in ({"steps": 3}, {"steps": 3, "trainer": {}})}
    assert job_of(ground, {"sft": {"steps": 3, "trainer": {"bf16": True}}}).digest != plain
    assert "trainer" not in job_of(ground, {"sft": {"steps": 3}}).config["sft"]


def test_targets_of_the_supervised_stage_earn_the_reward():
    from vlm_reward.studies.evaluate import judge
    from vlm_reward.worlds.scenes import KINDS, scene_rows

    for kind in KINDS:
        for row in scene_rows(kind, 10, seed=3):
            verdict = judge(target_completion(row), row)
            assert verdict.correct == 1 and verdict.behaviour in (None, "grounded")


def test_rows_are_stored_whole(make, tmp_path):
    cfg = make(eval={"tasks": {"scenes/relation": 3, "scenes/describe": 2}}, rollout_images=True)
    ground = load_ground(cfg)
    folder, _ = open_study(cfg, tmp_path, ground)
    stored = pd.read_parquet(folder / "rows.parquet")
    from PIL import Image

    for row, line in zip(ground.held_out, stored.to_dict("records"), strict=True):
        image = Image.open(io.BytesIO(line["image"]))
        assert image.tobytes() == row["images"][0].tobytes()
        assert (line["row_id"], line["task"], line["solution"]) == (row["id"], row["task"], row["solution"])
        assert line["chance"] == 0.5 if row["task"] == "scenes/relation" else line["chance"] != line["chance"]
    assert list(pd.read_parquet(folder / "training.parquet")["row_id"]) == [row["id"] for row in ground.training]
    assert yaml.safe_load((folder / "study.yaml").read_text())["data"]["name"] == "scenes/relation"
    assert load_study(folder / "study.yaml") == cfg


# --- rationales


THINKS = {
    "name": "thinks",
    "arms": {"sft": {}, "grpo": {"reward": "accuracy"}, "rgfn": {"algorithm": "rgfn"}},
    "seeds": [0],
    "data": {"n": 8},
    "eval": {"tasks": {"scenes/relation": 4}, "samples": 2, "max_new_tokens": 8},
    "reasoning": {"min_tokens": 3, "max_tokens": 10, "answer_tokens": 3, "demonstrations": "mixture"},
    "sft": {"steps": 3, "batch_size": 4, "lr": 1e-3, "warmup": 0},
    "grpo": {"steps": 2, "prompts_per_step": 2, "group_size": 3, "lr": 1e-2, "warmup": 0},
    "rgfn": {"steps": 2, "questions_per_step": 2, "rationales": 2, "lr": 1e-3, "warmup": 0},
    "select": {"n": [1, 2], "rows": 3},
    "save_checkpoints": True,
    "workers": 1,
}


def policies(folder, cfg):
    "The saved policies of a study's arms, and of its supervised stage."
    paths = {p.parents[1].name.split("-seed")[0]: p for p in folder.glob("arms/*/checkpoints/final")}
    return {"stage": next(folder.glob("stage/*/checkpoints/final"))} | paths, load_policy


def test_a_study_with_rationales_from_lessons_to_report(tmp_path, rewards):
    from vlm_reward.lacot.pair import read_reasoning
    from vlm_reward.report.page import report

    arms = {**THINKS["arms"], "grpo": {"reward": f"{rewards}:length"}}  # has a spread whatever is answered
    cfg = from_dict(StudyConfig, THINKS | {"arms": arms})
    folder = do(cfg, tmp_path)
    runs = {p.name.split("-")[0]: Run(p) for p in (folder / "arms").iterdir()}
    for run in runs.values():
        chosen, thoughts = run.table("selection"), run.table("rationales")
        assert len(chosen) == 3 * (1 + 5 * 2) and len(thoughts) == 3 and len(run.table("evaluation")) == 4 * 3
        assert set(run.table("selection_seconds")["rule"]) == set(cfg.select.rules)
    for run in (runs["grpo"], runs["rgfn"]):  # the least length and the greatest; GRPO counts T, if it was reached
        assert run.rollouts()["n_tokens"].between(3, 11).all()
    assert {"residual", "kept_frac", "log_reward"} <= set(runs["rgfn"].metrics())
    assert {"rewards/length/mean", "behaviour/bypass"} <= set(runs["grpo"].metrics())
    # all arms start from one checkpoint, and whoever was trained answers by it
    places, load = policies(folder, cfg)
    weights = {name: list(load(str(place))[0].parameters()) for name, place in places.items()}
    moved = {
        name: max((a - b).abs().max().item() for a, b in zip(own, weights["stage"], strict=True)) > 0
        for name, own in weights.items()
    }
    assert moved == {"stage": False, "sft": False, "grpo": True, "rgfn": True}
    answerers = {name: read_reasoning(place).answerer for name, place in places.items()}
    stage = f"../../../../stage/{places['stage'].parents[1].name}/checkpoints/final"  # goes with a study that is moved
    assert (places["rgfn"] / stage).resolve() == places["stage"].resolve()
    assert answerers == {"stage": None, "sft": None, "grpo": stage, "rgfn": stage}
    text = report(folder).with_suffix(".md").read_text()
    assert all(heading in text for heading in ("## Selection", "## Rationales", "## Cost of training"))
    # an arm done alone, elsewhere, is the same arm
    alone = do(replace(cfg, arms={"rgfn": cfg.arms["rgfn"]}), tmp_path / "alone")
    (again,) = (alone / "arms").iterdir()
    assert results(again) == results(folder / "arms" / again.name)
    assert Run(again).table("selection").equals(runs["rgfn"].table("selection"))


WATCHING = """
def watching(completion, image_attention):
    return 0.0

def at_will(completion, token_log_reward=None):
    return 0.0
"""


def test_what_cannot_be_trained_is_refused_by_the_plan(tmp_path):
    (tmp_path / "mine.py").write_text(WATCHING)
    likely = {"algorithm": "rgfn", "reward": "accuracy"}
    refused = {
        "arms.grpo.grpo: prompts_per_step: 9 prompts need as many rows, got 8": {"grpo": {"prompts_per_step": 9}},
        "arms.grpo.grpo: accumulate: 4 does not divide the 6": {"grpo": {**THINKS["grpo"], "accumulate": 4}},
        "arms.grpo.grpo: trl.foo: GRPOConfig has no such": {"grpo": {**THINKS["grpo"], "trl": {"foo": 1}}},
        "arms.rgfn.rgfn: questions_per_step: 9 questions need as many rows, got 8": {"rgfn": {"questions_per_step": 9}},
        "arms.rgfn.rgfn: questions_per_step: 2 questions cannot": {"rgfn": {"questions_per_step": 2, "accumulate": 3}},
        "arms.rgfn.rgfn: trainer.foo: TrainingArguments has no such field": {"rgfn": {"trainer": {"foo": 1}}},
        "sft: trainer.seed: 4 belongs to": {"sft": {"steps": 3, "trainer": {"seed": 4}}},
        "arms.a.rgfn: balance: a rubric pays whole": {"arms": {"a": likely | {"rgfn": {"balance": "subtb"}}}},
        "arms.a.rgfn: the reward needs 'token_log_reward'.*leave the reward out.*grpo": {
            "arms": {"a": {"algorithm": "rgfn", "reward": "lacot"}}
        },
        "arms.a.rgfn: the reward needs 'image_attention', which rgfn does not observe": {
            "arms": {"a": {"algorithm": "rgfn", "reward": f"{tmp_path / 'mine.py'}:watching"}}
        },
    }
    for message, change in refused.items():
        with pytest.raises(ConfigError, match=message) as error:
            plan(from_dict(StudyConfig, THINKS | change))
        assert "\n" not in str(error.value)
    fine = {"a": likely, "b": {"reward": "lacot"}, "c": likely | {"reward": f"{tmp_path / 'mine.py'}:at_will"}}
    for change in ({}, {"rgfn": {**THINKS["rgfn"], "save_every": 1}}, {"arms": fine}):
        assert plan(from_dict(StudyConfig, THINKS | change))


def test_adapters_serve_both_ways_of_training(tmp_path):
    "No copy is kept beside a policy with adapters, and its folder names the checkpoint under them."
    from vlm_reward.lacot.pair import has_adapters, read_reasoning

    arms = {**THINKS["arms"], "rgfn": {"algorithm": "rgfn", "reward": "accuracy"}}
    changes = {"arms": arms, "select": None, "rgfn": {**THINKS["rgfn"], "lora_rank": 2}}
    cfg = from_dict(StudyConfig, THINKS | changes)
    folder = do(cfg, tmp_path)
    places, load = policies(folder, cfg)
    for name in ("grpo", "rgfn"):
        assert has_adapters(load(str(places[name]))[0]) and read_reasoning(places[name]).answerer is None
        table = Run(next(folder.glob(f"arms/{name}-*"))).table("evaluation")
        assert len(table) == 4 * 3 and "selection" not in Run(next(folder.glob(f"arms/{name}-*"))).tables()
    assert "reward" in Run(next(folder.glob("arms/rgfn-*"))).metrics()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_of_rgfn_that_broke_off_goes_on_and_ends_as_one_that_did_not(tmp_path, rank):
    likely = {**THINKS["rgfn"], "steps": 5, "save_every": 2, "lora_rank": rank}
    changes = {"arms": {"rgfn": {"algorithm": "rgfn"}}, "rgfn": likely, "sft": None, "select": None}
    layout = {**THINKS["reasoning"], "layout": "section", "min_tokens": 0}
    cfg = from_dict(StudyConfig, THINKS | changes | {"reasoning": layout})
    (job,) = plan(cfg)
    whole = run_job(cfg, job, tmp_path / "whole", None, lambda n: None)
    ticks = []

    def breaking(n):
        ticks.append(n)
        if n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(cfg, job, tmp_path / "broken", None, breaking)
    (half,) = (tmp_path / "broken" / "arms").iterdir()
    assert Run(half).rollout_steps() == [1, 2, 3] and not Run(half).finished
    first = (half / "rollouts" / "step_00001.parquet").stat().st_mtime_ns
    ticks.clear()
    again = run_job(cfg, job, tmp_path / "broken", None, ticks.append)
    assert ticks[:3] == [3, 4, 5]  # two steps were not done again
    assert (half / "rollouts" / "step_00001.parquet").stat().st_mtime_ns == first
    assert (again.path / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()
    assert results(again.path) == results(whole.path)
    kinds = "*.safetensors"
    weights = [next((run.checkpoints / "final").glob(kinds)).read_bytes() for run in (whole, again)]
    assert weights[0] == weights[1]
    for run in (whole, again):
        assert [path.name for path in run.checkpoints.iterdir()] == ["final"]
        assert run.summary()["training_minutes"] * 60 >= run.timings()["seconds"].iloc[:2].sum()
    # a finished run that is asked for again begins anew
    ticks.clear()
    run_job(cfg, job, tmp_path / "broken", None, ticks.append)
    assert ticks[0] == 1 and results(again.path) == results(whole.path)


def test_what_a_study_with_rationales_depends_on():
    base = from_dict(StudyConfig, THINKS | {"policy": "pocket"})
    ground = load_ground(base)

    def digests(**changes):
        cfg = from_dict(StudyConfig, THINKS | changes)
        return {job.arm: job.digest for job in plan(cfg, ground)}, study_folder(cfg, Path("r"))

    first, place = digests()
    for changes, arms in [
        ({"rgfn": {**THINKS["rgfn"], "gamma": 0.9}}, {"rgfn"}),
        ({"grpo": {**THINKS["grpo"], "lr": 0.1}}, {"grpo"}),
        ({"rgfn": {**THINKS["rgfn"], "lora_rank": 2}}, {"grpo", "rgfn"}),
        ({"select": {"n": [1, 3], "rows": 3}}, {"sft", "grpo", "rgfn"}),
        ({"reasoning": {**THINKS["reasoning"], "max_tokens": 11}}, {"sft", "grpo", "rgfn"}),
        ({"reasoning": {**THINKS["reasoning"], "min_tokens": 2}}, {"sft", "grpo", "rgfn"}),
        ({"reasoning": {**THINKS["reasoning"], "without": 0.2}}, {"sft", "grpo", "rgfn"}),
    ]:
        other, elsewhere = digests(**changes)
        assert {arm for arm in first if first[arm] != other[arm]} == arms and elsewhere != place
    gold = {key: value for key, value in THINKS.items() if key not in ("reasoning", "rgfn", "select")}
    gold["arms"] = {"sft": {}}
    plain = study_folder(from_dict(StudyConfig, gold), Path("r"))
    assert study_folder(from_dict(StudyConfig, gold | {"rgfn": {"lr": 1.0}}), Path("r")) == plain


def test_digests_from_before_there_were_rationales(ground):
    "A finished study is not done again because the config has grown."
    job = job_of(ground)
    assert not {"reasoning", "select", "rgfn", "adapters"} & set(job.config)


REAL = Path(__file__).parents[2] / "shared" / "data" / "algopuzzle"


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the AlgoPuzzleVQA folder ../shared/data/algopuzzle is not beside this checkout"
)
def test_real_pictures_and_questions(make, tmp_path, caplog):
    tell_once.cache_clear()  # another test of this process may have been told
    cfg = make(
        policy="pocket",
        data={"name": "algopuzzle/clock", "n": 4, "local": str(REAL)},
        eval={"tasks": {"algopuzzle/clock": None}, "samples": 2, "max_new_tokens": 8},
        sft={"steps": 1, "batch_size": 2},
    )
    folder = do(cfg, tmp_path)
    told = [record for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 1, "rows without pictures are told once, whatever is loaded how often"
    rows = pd.read_parquet(folder / "rows.parquet")
    assert set(rows["task"]) == {"algopuzzle/clock"} and set(rows["chance"]) == {0.25} and len(rows) == 3
    trained = set(Run(next(folder.glob("arms/vowels-*"))).rollouts()["row_id"])
    assert trained and not trained & set(rows["row_id"])
    for run in (folder / "arms").iterdir():
        table = Run(run).table("evaluation")
        assert len(table) == 9 and table["behaviour"].isna().all() and set(table["correct"]) <= {0.0, 1.0}


SCRIPT = """
import sys
from pathlib import Path
if __name__ == "__main__":
    sys.path.insert(0, {tests!r})
    from test_studies_study import do
    from vlm_reward.studies.design import load_study
    do(load_study(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_ctrl_c_leaves_a_study_that_goes_on(make, tmp_path):
    "As a terminal sends it, to the whole process group, while two workers train."
    cfg = make(("slow", "vowels"), workers=2)
    steps = {"slow": 300, "vowels": 3}
    arms = {name: replace(arm, grpo={"steps": steps[name]} if name in steps else {}) for name, arm in cfg.arms.items()}
    cfg = replace(cfg, arms=arms)
    (tmp_path / "study.yaml").write_text(to_yaml(cfg))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    words = [sys.executable, str(script), str(tmp_path / "study.yaml"), str(tmp_path / "runs")]
    parent = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder, end = study_folder(cfg, tmp_path / "runs"), time.monotonic() + 300
    while parent.poll() is None and time.monotonic() < end:
        if len(stamps(folder)) == 2 and list(folder.glob("arms/slow-*/metrics.jsonl")):
            break
        time.sleep(0.1)
    os.killpg(parent.pid, signal.SIGINT)
    _, error = parent.communicate(timeout=60)
    assert parent.returncode != 0, error
    assert {n.split("-")[0] for n in stamps(folder)} == {"sft", "vowels"}, error
    assert [job.arm for job in open_jobs(cfg, plan(cfg), folder)] == ["slow"]
    with locked(folder):  # nobody holds it any more
        pass
    # what two workers made is what this process makes
    here = do(replace(cfg, workers=1, arms={n: a for n, a in arms.items() if n != "slow"}), tmp_path / "here")
    for run in (here / "arms").iterdir():
        assert results(run) == results(folder / "arms" / run.name)

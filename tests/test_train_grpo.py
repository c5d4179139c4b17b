"""The GRPO step written out, TRL's trainer and our subclass of it: the same numbers, and nothing lost on the way."""

import copy
import dataclasses
import inspect
import json
import math
import warnings

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from vlm_reward.core.runs import Run
from vlm_reward.rewards import rubric as named
from vlm_reward.train.grpo import GRPOSettings, checked, cpu_threads, grpo_step, silence, train_grpo, trl_config
from vlm_reward.train.trainer import RewardTrainer, quiet, step_seed

SMALL = GRPOSettings(steps=2, prompts_per_step=2, group_size=4, max_new_tokens=6, warmup=0, lr=1e-3)


def vowels(completions, **columns):
    "Points for vowels."
    return [sum(map(text_of(c).count, "aeiou")) / 2 + len(text_of(c).encode()) / 50 for c in completions]


def capitals(completions, **columns):
    "Points for capitals; no opinion on empty completions."
    return [sum(x.isupper() for x in text_of(c)) if text_of(c) else None for c in completions]


def text_of(completion):
    return completion[0]["content"]


class Rubric:
    def __init__(self, **parts):
        self.reward_funcs, self.reward_weights = [f for f, _ in parts.values()], [w for _, w in parts.values()]


TWO = Rubric(vowels=(vowels, 1.0), capitals=(capitals, 0.5))


def train(vlm, rows, settings=SMALL, rubric=TWO, **kw):
    log = []
    model = train_grpo(*vlm, rows, rubric, settings, progress=lambda step, metrics: log.append(metrics), **kw)
    return model, log


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# the same numbers


@pytest.mark.parametrize(
    "loss_type, scale", [("grpo", "group"), ("dr_grpo", "none"), ("dapo", "batch"), ("bnpo", "group")]
)
def test_step_written_out_is_trls_step(fresh_vlm, tiny_vlm, tiny_rows, loss_type, scale):
    settings = dataclasses.replace(
        SMALL, steps=1, temperature=0.8, loss_type=loss_type, scale_rewards=scale, trl={"shuffle_dataset": False}
    )
    model, log = train(fresh_vlm, tiny_rows[:2], settings)
    mine = copy.deepcopy(tiny_vlm[0]).train()
    before = weights(mine)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, weight_decay=0.0)
    told = grpo_step(mine, tiny_vlm[1], tiny_rows[:2], TWO, optimizer, settings)
    assert told["reward"] == pytest.approx(log[0]["reward"], abs=1e-6)
    assert told["loss"] == pytest.approx(log[0]["loss"], abs=1e-6)
    assert told["grad_norm"] == pytest.approx(log[0]["grad_norm"], rel=1e-4) and told["grad_norm"] > 0.01
    moved, theirs = weights(mine) - before, weights(model) - before
    assert (moved - theirs).norm() < 0.02 * theirs.norm()


def plain_trl(vlm, rows, settings, folder):
    "TRL's own trainer, with the data set that TRL asks for."
    data = Dataset.from_list([{"prompt": r["prompt"], "images": r["images"], "id": r["id"]} for r in rows])
    args = trl_config(settings, str(folder), weights=TWO.reward_weights)
    with quiet():
        trainer = GRPOTrainer(vlm[0], TWO.reward_funcs, args, train_dataset=data, processing_class=vlm[1])
        trainer.train()
    return trainer


class Seeded(RewardTrainer):
    "Ours without the seeds per step, to compare with TRL over several steps."

    def add_callback(self, callback):
        if type(callback).__name__ != "StepSeed":
            super().add_callback(callback)


@pytest.mark.parametrize("changed", [{}, {"updates": 2}, {"accumulate": 2}], ids=str)
def test_our_subclass_does_not_change_trls_numbers(fresh_vlm, tiny_vlm, tiny_rows, tmp_path, changed):
    settings = dataclasses.replace(SMALL, steps=3, **changed)
    theirs = plain_trl(fresh_vlm, tiny_rows, settings, tmp_path)
    args = trl_config(settings, str(tmp_path), weights=TWO.reward_weights)
    model = copy.deepcopy(tiny_vlm[0])
    ours = Seeded(model, TWO.reward_funcs, args, rows=tiny_rows, processing_class=tiny_vlm[1], share_prompts=False)
    with quiet():
        ours.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history) == 4
    # micro-batches of whole groups add up in another order, and AdamW makes steps of rounding errors
    rounding = 1e-4 if "accumulate" in changed else 1e-6
    for mine, trls in zip(ours.state.log_history[:3], theirs.state.log_history, strict=False):
        for name in trls:
            if name not in ("step_time", "train_runtime"):
                assert mine[name] == pytest.approx(trls[name], rel=rounding, abs=1e-6, nan_ok=True), name
    torch.testing.assert_close(weights(model), weights(fresh_vlm[0]), rtol=1.3 * rounding, atol=10 * rounding)


def test_reference_is_the_policy_as_it_came_in(fresh_vlm, tiny_rows, tmp_path):
    "TRL would load it from the folder in which the model was born."
    model, _processor = fresh_vlm
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    _, log = train(fresh_vlm, tiny_rows, dataclasses.replace(SMALL, beta=0.1))
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] > 1e-5
    assert model.config._name_or_path == str(tmp_path)


def test_same_twice_and_other_seed(tiny_vlm, tiny_rows, tmp_path):
    lines = []
    for i, seed in enumerate((0, 0, 1)):
        run = Run.open(tmp_path / str(i), "run", {"seed": seed}, "0")
        vlm = copy.deepcopy(tiny_vlm[0]), tiny_vlm[1]
        train(
            vlm, tiny_rows, dataclasses.replace(SMALL, seed=seed), run=run, classify=lambda completion: completion[:1]
        )
        lines.append((run.path / "metrics.jsonl").read_bytes())
    assert lines[0] == lines[1] != lines[2]


def test_steps_have_different_noise():
    assert len({step_seed(seed, step) for seed in range(20) for step in range(1, 200)}) == 20 * 199


# what is written down


def test_run_folder(fresh_vlm, tiny_rows, tmp_path):
    run = Run.open(tmp_path, "run", {"seed": 0}, "0")
    settings = dataclasses.replace(SMALL, steps=4, rollouts_every=2)
    rubric = Rubric(vowels=(vowels, 1.0), capitals=(capitals, 0.5), measured=(lengths, 0.0))
    train(fresh_vlm, tiny_rows, settings, rubric, run=run, classify=first_letter, behaviours=("never",))
    metrics, rollouts = run.metrics(), run.rollouts()
    assert metrics.step.tolist() == [1, 2, 3, 4] == run.timings().step.tolist()
    assert run.rollout_steps() == [1, 3]
    for step in (1, 3):
        lines, logged = rollouts[rollouts.step == step], metrics[metrics.step == step].iloc[0]
        assert len(lines) == 8 and lines.groupby("row_id")["sample"].apply(list).tolist() == [[0, 1, 2, 3]] * 2
        assert lines.reward.mean() == pytest.approx(logged.reward, abs=1e-6)
        assert lines.reward.tolist() == pytest.approx(
            (lines["rewards/vowels"] + 0.5 * lines["rewards/capitals"]).tolist(), abs=1e-6
        )
        for name in ("vowels", "capitals", "lengths"):
            assert lines[f"rewards/{name}"].mean() == pytest.approx(logged[f"rewards/{name}/mean"], abs=1e-6)
        for name, share in lines.behaviour.value_counts(normalize=True).items():
            assert logged[f"behaviour/{name}"] == pytest.approx(share)
        assert lines.groupby("row_id").advantage.sum().abs().max() < 1e-4
        assert lines.n_tokens.mean() == pytest.approx(logged["completions/mean_length"])
        assert [first_letter(c) for c in lines.completion] == lines.behaviour.tolist()
    assert metrics["behaviour/never"].tolist() == [0.0] * 4
    json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)  # no NaN


def lengths(completions, **columns):
    return [float(len(text_of(c))) for c in completions]


def first_letter(completion, id=""):
    return "letter" if completion[:1].isalpha() else "other"


def test_what_nobody_paid_could_score_is_not_worth_nothing(fresh_vlm, tiny_rows, tmp_path):
    def half(completions, **columns):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    run = Run.open(tmp_path, "run", {}, "0")
    train(fresh_vlm, tiny_rows, SMALL, Rubric(half=(half, 1.0), lengths=(lengths, 0.0)), run=run)
    rollouts, metrics = run.rollouts(1), run.metrics().iloc[0]
    assert metrics["rewards/half/none_frac"] == 0.5 and metrics["rewards/lengths/none_frac"] == 0
    assert rollouts.reward.isna().tolist() == [False, True] * 4
    assert (rollouts.advantage[rollouts.reward.isna()] == 0).all()
    assert metrics.reward == pytest.approx(3.0)  # the mean of 0, 2, 4, 6, and not of the eight


# what the policy may say, and what stays of it


def test_placeholders_are_never_sampled(fresh_vlm, tiny_rows):
    "A policy that wants nothing but placeholders gets none, of either kind."
    model, processor = fresh_vlm
    image, film = model.config.image_token_id, processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    model.config.video_token_id = film
    seen = []

    def push(module, inputs, logits):
        logits[..., [image, film]] += 50
        return logits

    def watch(completions, completion_ids, **columns):
        seen.extend(t for ids in completion_ids for t in ids)
        return [0.0] * len(completions)

    model.lm_head.register_forward_hook(push)
    with torch.no_grad():
        ids = torch.tensor([[7, 8, 9]])
        assert model(ids).logits[0, -1].argmax() in (image, film), "the policy does not want placeholders"
    for kwargs in ({}, {"generation_kwargs": {"top_k": 50}}):
        seen.clear()
        train(fresh_vlm, tiny_rows, dataclasses.replace(SMALL, steps=1, trl=kwargs), Rubric(watch=(watch, 1.0)))
        assert seen and not {image, film} & set(seen)


def test_nothing_of_trl_stays_on_the_model(fresh_vlm, tiny_rows):
    threads = torch.get_num_threads()
    model, _ = train(fresh_vlm, tiny_rows, dataclasses.replace(SMALL, threads=2))
    assert model is fresh_vlm[0] and not model.training
    assert "forward" not in vars(model) and torch.get_num_threads() == threads
    train(fresh_vlm, tiny_rows)  # and it can be trained again


def test_also_after_an_interrupt(fresh_vlm, tiny_rows):
    def stop(step, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_grpo(*fresh_vlm, tiny_rows, TWO, SMALL, progress=stop)
    assert "forward" not in vars(fresh_vlm[0])


def test_frozen_tower_and_replay(fresh_vlm, tiny_vlm, tiny_rows):
    settings = dataclasses.replace(SMALL, steps=3, freeze_vision=True, replay=1.0, replay_batch=4)
    model, log = train(fresh_vlm, tiny_rows, settings, replay=[(row, "yes") for row in tiny_rows])
    for (name, new), old in zip(model.named_parameters(), tiny_vlm[0].parameters(), strict=True):
        assert torch.equal(new, old) == ("vision_tower" in name), name
    assert log[2]["replay_loss"] < log[0]["replay_loss"]


def test_peft(fresh_vlm, tiny_rows):
    from peft import LoraConfig

    model, log = train(
        fresh_vlm,
        tiny_rows,
        dataclasses.replace(SMALL, beta=0.1),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[1]["kl"] > 0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)


def test_own_optimizer_and_callbacks(fresh_vlm, tiny_rows):
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kw):
            self.steps += 1

    sgd, count = torch.optim.SGD(fresh_vlm[0].parameters(), lr=0.0), Count()
    before = weights(fresh_vlm[0]).clone()
    train(fresh_vlm, tiny_rows, callbacks=[count], optimizers=(sgd, None))
    assert count.steps == 2 and torch.equal(weights(fresh_vlm[0]), before)


# bad input


def message(function, *args, **kw):
    with pytest.raises(ValueError) as error:
        function(*args, **kw)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"group_size": 1}, ["group_size", "1"]),
        ({"prompts_per_step": 13}, ["prompts_per_step", "13", "12"]),
        ({"prompts_per_step": 0}, ["prompts_per_step", "0"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"accumulate": 3}, ["accumulate", "3", "8"]),
        ({"replay": 0.5}, ["replay", "0.5"]),
        ({"trl": {"num_iteration": 2}}, ["num_iteration", "did you mean num_iterations"]),
        ({"trl": {"zzz": 2}}, ["trl.zzz: GRPOConfig has no such field; TRL's documentation lists them"]),
    ],
    ids=str,
)
def test_settings_that_cannot_work(tiny_vlm, tiny_rows, changed, words):
    text = message(train_grpo, *tiny_vlm, tiny_rows, TWO, dataclasses.replace(SMALL, **changed))
    assert all(word in text for word in words), text


def test_empty_data_set(tiny_vlm):
    assert "empty" in message(train_grpo, *tiny_vlm, [], TWO, SMALL)


@pytest.mark.parametrize("points", [math.nan, math.inf, -math.inf])
def test_reward_that_is_no_number(fresh_vlm, tiny_rows, points):
    def broken(completions, **columns):
        return [1.0] * (len(completions) - 1) + [points]

    text = message(train_grpo, *fresh_vlm, tiny_rows, Rubric(broken=(broken, 1.0)), SMALL)
    assert "broken" in text and str(points) in text and "tiny-" in text


def told_of(**how):
    "What `train` warns of rewards that score nothing."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train(**how)
    return [str(warning.message) for warning in heard if "could score none" in str(warning.message)]


def test_a_reward_that_scores_nothing_is_told_once(fresh_vlm, tiny_rows):
    def mute(completions, **columns):
        return [None] * len(completions)

    def late(completions, trainer_state, **columns):
        return [1.0 if trainer_state.global_step > 1 else None for _ in completions]

    rows = [{**row, "solution": None} for row in tiny_rows]
    settings = dataclasses.replace(SMALL, steps=9)
    rubric = Rubric(mute=(mute, 1.0), measured=(mute, 0.0), vowels=(vowels, 1.0), late=(late, 1.0))
    (line,) = told_of(vlm=fresh_vlm, rows=rows, settings=settings, rubric=rubric)
    assert line.startswith("reward 'mute' could score none of the first 32 completions, and trains nothing: ")
    assert "its judge" in line and "vlm-reward validate" in line and "\n" not in line
    matching = named.Rubric({"matching": lambda completion, solution, boxes=None: None if solution is None else 1.0})
    (line,) = told_of(vlm=fresh_vlm, rows=rows, settings=settings, rubric=matching)
    assert "reward 'matching'" in line and "its rows say nothing in 'solution';" in line


def test_columns_that_a_silent_reward_may_lack():
    def points_of(**columns):
        (function,) = named.Rubric({"r": lambda completion, objects, boxes=None, frame=None: None}).reward_funcs
        return silence(function, {"completions": ["", ""], **columns}, 32)

    assert "nothing in 'objects';" in points_of(objects=[None, None], boxes=[None, None])
    assert "nothing in 'boxes' and 'frame';" in points_of(objects=[None, 1], boxes=[None, None])
    assert "nothing in 'frame';" in points_of(boxes=[None, 1])  # objects come from elsewhere
    assert "its judge" in points_of(objects=[1, 1], boxes=[1, None], frame=[1, 1])


def test_rewards_that_are_left_alone():
    async def slow(completions, **columns):
        return [0.0]

    class Judge(torch.nn.Module):
        pass

    judge = Judge()
    assert checked(slow) is slow and checked(judge) is judge and checked("org/judge") == "org/judge"


def test_a_failing_reward_is_not_a_zero(fresh_vlm, tiny_rows):
    def fails(completions, **columns):
        raise KeyError("boxes")

    with pytest.raises(KeyError):
        train(fresh_vlm, tiny_rows, rubric=Rubric(fails=(fails, 1.0)))


def test_classify_that_asks_for_a_column_that_is_not_there(fresh_vlm, tiny_rows):
    text = message(train, fresh_vlm, tiny_rows, classify=lambda completion, boxes: "")
    assert "'boxes'" in text and "tiny-" in text


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), cpu_threads(before + 1):
        raise RuntimeError
    assert torch.get_num_threads() == before


# the contract with TRL: what we build on, and the names that our run folders carry

SIGNATURES = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "log": ["self", "logs", "start_time"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
}
PROMPT_FIELDS = [  # which shared prompts bring themselves
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
]
METRICS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
    "rewards/vowels/mean",
    "rewards/vowels/std",
    "rewards/capitals/mean",
    "rewards/capitals/std",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "step",
    "step_time",
]
BATCH = [
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
    "ref_per_token_logps",
    "pixel_values",
    "num_images",
]


def test_trl_has_not_changed_under_us(fresh_vlm, tiny_rows, tmp_path, monkeypatch):
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, name
    scored = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert scored[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert set(scored[6:]) == {"compute_entropy", "compute_aux_loss", *PROMPT_FIELDS}
    made = []
    score = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions", lambda self, x: made.append(score(self, x)) or made[-1]
    )
    fresh_vlm[0].save_pretrained(tmp_path / "policy")
    fresh_vlm[0].config._name_or_path = str(tmp_path / "policy")
    trainer = plain_trl(fresh_vlm, tiny_rows, dataclasses.replace(SMALL, steps=1, beta=0.1), tmp_path)
    assert sorted(trainer.state.log_history[0]) == sorted(METRICS)
    assert sorted(made[0]) == sorted(BATCH)
    logs = trainer._logs
    assert trainer.reward_func_names == ["vowels", "capitals"] == list(logs["rewards"])
    assert trainer.reward_weights.tolist() == [1.0, 0.5]
    assert [len(logs[name]) for name in ("completion", "advantages")] == [8, 8]
    assert [len(points) for points in logs["rewards"].values()] == [8, 8]
    assert trainer.current_gradient_accumulation_steps == 1 and trainer.num_generations == 4 and trainer._step == 1
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer.generation_config.suppress_tokens == [trainer.model.config.image_token_id]
    assert "forward" in vars(trainer.model), "TRL no longer patches the model: `release` can go"


def test_every_setting_reaches_trl(tmp_path):
    "A setting that is changed must change TRL's config, unless it is ours alone."
    ours = {"prompts_per_step", "replay", "replay_batch", "freeze_vision", "rollouts_every", "threads", "share_prompts"}
    ours |= {"observing"}
    new = dict(
        steps=7, group_size=6, lr=0.5, warmup=3, decay="cosine", temperature=0.5, max_new_tokens=9, loss_type="grpo",
        scale_rewards="batch", ratio_level="sequence", epsilon=0.1, epsilon_high=0.4, updates=3, beta=0.2,
        max_grad_norm=0.3, weight_decay=0.1, accumulate=2, seed=5, trl={"top_k": 3}, prompts_per_step=4,
    )  # fmt: skip
    assert set(new) | ours == {f.name for f in dataclasses.fields(GRPOSettings)}
    plain = vars(trl_config(GRPOSettings(), str(tmp_path)))
    for name, value in new.items():
        changed = vars(trl_config(dataclasses.replace(GRPOSettings(), **{name: value}), str(tmp_path)))
        assert any(changed[k] != plain[k] for k in GRPOConfig.__dataclass_fields__), name

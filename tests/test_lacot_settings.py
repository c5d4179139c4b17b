"""What a stage owns cannot be said a second time, in transformers' words."""

from dataclasses import fields

import pytest
from test_studies_study import THINKS
from transformers import TrainingArguments

import vlm_reward.lacot.settings as settings_module
from vlm_reward.core.config import ConfigError, from_dict
from vlm_reward.core.settings import describe_fields
from vlm_reward.lacot.settings import (
    ALIASES,
    USELESS,
    RGFNSettings,
    check_request,
    owned_fields,
    training_arguments,
)
from vlm_reward.studies.design import StudyConfig, plan

FREE = {"report_to": "tensorboard", "disable_tqdm": False}  # defaults of ours that a designer may change


def refusal(**trainer):
    try:
        check_request(RGFNSettings(trainer=trainer), [{}] * 8)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize(
    ("name", "value", "owner"),
    [
        ("output_dir", "elsewhere", "the run folder"),
        ("max_steps", 7, "steps"),
        ("num_train_epochs", 3, "steps"),
        ("per_device_train_batch_size", 9, "questions_per_step and accumulate"),
        ("auto_find_batch_size", True, "questions_per_step and accumulate"),
        ("gradient_accumulation_steps", 2, "accumulate"),
        ("learning_rate", 0.1, "lr"),
        ("warmup_steps", 3, "warmup"),
        ("lr_scheduler_type", "cosine", "decay"),
        ("max_grad_norm", 9.0, "max_grad_norm"),
        ("weight_decay", 0.5, "weight_decay"),
        ("seed", 0, "seed"),  # also where it is the same: it would not be in the next run of the study
        ("data_seed", 5, "seed"),
        ("save_strategy", "steps", "save_every"),
        ("save_steps", 3, "save_every"),
        ("save_total_limit", 1, "save_every"),
        ("save_only_model", True, "save_every"),
        ("resume_from_checkpoint", "there", "save_every"),
        ("ignore_data_skip", True, "save_every"),
        ("logging_strategy", "epoch", "the trainer itself"),
        ("logging_steps", 10, "the trainer itself"),
    ],
)
def test_a_field_that_a_setting_owns_is_refused(name, value, owner):
    assert refusal(**{name: value}) == f"trainer.{name}: {value!r} belongs to {owner}; take it out of trainer"


def test_whatever_is_handed_to_transformers_is_owned(monkeypatch):
    "The table cannot drift from the arguments: it is what they are made of."
    handed = {}
    monkeypatch.setattr(settings_module, "TrainingArguments", lambda **words: handed.update(words))
    training_arguments(RGFNSettings(), "unused")
    monkeypatch.undo()
    assert set(handed) - set(FREE) == set(owned_fields(RGFNSettings())) and set(FREE) < set(handed)
    assert all(f"trainer.{name}: 1 belongs to" in refusal(**{name: 1}) for name in set(handed) - set(FREE))


def test_aliases_and_owners_exist():
    known, ours = {f.name for f in fields(TrainingArguments)}, owned_fields(RGFNSettings())
    assert set(ALIASES) <= known and set(ALIASES.values()) <= set(ours) <= known and not set(ALIASES) & set(ours)
    names = {f.name for f in fields(RGFNSettings)}
    for owner, _ in ours.values():
        assert owner.startswith("the ") or set(owner.split(" and ")) <= names


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("eval_strategy", "steps", "no rows are evaluated while it trains"),
        ("load_best_model_at_end", True, "no rows are evaluated while it trains, so no checkpoint is the best"),
        ("label_smoothing_factor", 0.1, "the loss is balance, which knows no labels"),
        ("neftune_noise_alpha", 5.0, "rationales are scored as they are drawn, without noise"),
    ],
)
def test_what_is_of_no_use_is_refused_with_the_reason(name, value, why):
    "transformers would stop the first with an error of several sentences, and run the others without effect."
    assert refusal(**{name: value}) == f"trainer.{name}: {value!r} is of no use: {why}; take it out of trainer"
    assert not set(USELESS) & (set(ALIASES) | set(owned_fields(RGFNSettings())))
    assert set(USELESS) <= {f.name for f in fields(TrainingArguments)}


def test_what_precedes_a_least_length_needs_two_rationales():
    "With one, nothing balances the tokens before it: of min_tokens 8 and max_tokens 8 the loss would be 0, silently."
    alone = {"rationales": 1, "reference": False}
    for most in (8, 20):
        with pytest.raises(ValueError, match=r"min_tokens: what precedes token 8 is learned by comparing .* got 1$"):
            check_request(RGFNSettings(min_tokens=8, max_tokens=most, **alone), [{}] * 8)
    with pytest.raises(ValueError, match=r"balance: 'group' compares rationales of a question, .* got 1$"):
        check_request(RGFNSettings(balance="group", min_tokens=8, **alone), [{}] * 8)
    for enough in (alone, {"min_tokens": 8, "rationales": 1}, {"min_tokens": 8, "rationales": 2, "reference": False}):
        check_request(RGFNSettings(**enough), [{}] * 8)


def test_what_nobody_owns_reaches_transformers():
    free = FREE | {"adam_beta2": 0.95, "optim": "sgd", "gradient_checkpointing": True, "bf16": False}
    assert refusal(**free) is None
    found = training_arguments(RGFNSettings(lr=0.5, trainer=free), "unused")
    assert (found.adam_beta2, found.disable_tqdm, found.report_to) == (0.95, False, ["tensorboard"])
    assert (found.learning_rate, found.logging_steps) == (0.5, 1)


def test_a_study_is_refused_before_anything_runs():
    "By the plan, which `--dry-run` shows and every run begins with."
    change = {"rgfn": {**THINKS["rgfn"], "trainer": {"learning_rate": 0.1}}}
    with pytest.raises(ConfigError, match=r"rgfn: trainer\.learning_rate: 0\.1 belongs to lr; take it out") as error:
        plan(from_dict(StudyConfig, THINKS | change))
    assert "\n" not in str(error.value)


def test_help_does_not_promise_what_a_least_length_cannot():
    "States before `min_tokens` are no ends, so `empty` has no effect there, and a least length is no remedy for it."
    told = {info.name: info.help for info in describe_fields(RGFNSettings)}
    assert "no effect with min_tokens above 0" in told["empty"] and "wants min_tokens" not in told["empty"]
    assert "no ends" in told["min_tokens"] and "certain" in told["max_tokens"]

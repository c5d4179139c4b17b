"""Advantages: TRL's own code on the same rewards, and properties that hold for all of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

from vlm_reward.train.advantage import group_advantage, nan_spread, total_reward

PROMPTS, GROUP, PARTS = 2, 4, 2
POINTS = st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(-5, 5, width=32))
TABLES = st.lists(st.lists(POINTS, min_size=PARTS, max_size=PARTS), min_size=PROMPTS * GROUP, max_size=PROMPTS * GROUP)


@pytest.fixture(scope="module", params=["group", "batch", "none"])
def trl_trainer(request, tmp_path_factory, tiny_vlm, tiny_rows):
    "TRL's trainer, whose rewards are put in by hand and whose completions are one token long."
    import copy

    from datasets import Dataset

    model, processor = tiny_vlm
    args = GRPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=1,
        scale_rewards=request.param,
        reward_weights=[1.0, 0.5],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=None,
        report_to="none",
    )

    def one(completions, **columns):
        return [0.0] * len(completions)

    def two(completions, **columns):
        return [0.0] * len(completions)

    trainer = GRPOTrainer(
        copy.deepcopy(model),
        [one, two],
        args,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * PROMPTS}),
        processing_class=processor,
    )
    trainer.model.train()
    trainer.rows = [row for row in tiny_rows[:PROMPTS] for _ in range(GROUP)]
    return trainer


@settings(max_examples=12, deadline=None)
@given(table=TABLES)
def test_same_as_trl(trl_trainer, table):
    points = torch.tensor([[math.nan if p is None else p for p in line] for line in table])
    trl_trainer._calculate_rewards = lambda *_: points.clone()
    theirs = trl_trainer._generate_and_score_completions([dict(r) for r in trl_trainer.rows])["advantages"]
    rewards = total_reward(points, torch.tensor([1.0, 0.5]))
    ours = group_advantage(rewards.view(PROMPTS, GROUP), trl_trainer.scale_rewards).flatten()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


REWARDS = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=5, max_size=5), min_size=1, max_size=3)


@given(rewards=REWARDS, shift=st.floats(-3, 3, width=32), scale=st.sampled_from(["group", "none"]))
def test_a_constant_added_to_a_group_changes_nothing(rewards, shift, scale):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(group_advantage(rewards + shift, scale), group_advantage(rewards, scale))


@given(rewards=REWARDS, order=st.permutations(range(5)), scale=st.sampled_from(["group", "batch", "none"]))
def test_order_in_a_group_does_not_matter(rewards, order, scale):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(group_advantage(rewards[:, order], scale), group_advantage(rewards, scale)[:, order])


@given(rewards=REWARDS)
def test_stated_range_and_order(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantage(rewards)
    assert advantages.abs().max() <= 4 / math.sqrt(5)
    assert advantages.sum(1).abs().max() < 1e-6
    for r, a in zip(rewards, advantages, strict=True):
        assert (a[r.argsort(stable=True)].diff() >= 0).all()


@given(values=st.lists(st.one_of(st.just(math.nan), st.floats(-5, 5)), min_size=1, max_size=8))
def test_spread_is_that_of_the_values_that_are_there(values):
    there = [v for v in values if v == v]
    spread = nan_spread(torch.tensor(values, dtype=torch.float64), 0).item()
    if len(there) < 2:
        assert math.isnan(spread)
    else:
        assert spread == pytest.approx(torch.tensor(there, dtype=torch.float64).std().item(), abs=1e-9)


@pytest.mark.parametrize("rewards", [torch.ones(4), torch.ones(4, 1), torch.ones(2, 2, 2)])
def test_no_groups(rewards):
    with pytest.raises(ValueError, match="want \\(prompts, group of 2 or more\\)"):
        group_advantage(rewards)


def test_measured_parts_do_not_pay():
    points = torch.tensor([[0.7, math.nan], [0.7, 1.0]])
    assert total_reward(points, torch.tensor([0.0, 1.0])).tolist()[1] == 1.0
    assert total_reward(points, torch.tensor([0.0, 1.0]))[0].isnan()

"""The loss written out, against TRL's on a batch that TRL's trainer made."""

import copy
from itertools import product

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from vlm_reward.train.loss import aggregate, grpo_loss, kl_k3, token_logprobs

LIMIT = 6  # tokens
KL = [(0.0, True), (0.1, True), (0.1, False)]
CASES = list(product(["grpo", "dr_grpo", "dapo", "bnpo"], KL, ["token", "sequence"]))


def uneven(completions, **columns):
    "Points that differ within a group and do not depend on the text."
    return [((7 * i) % 5) / 2 for i in range(len(completions))]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_vlm, tiny_rows):
    "TRL's trainer with a reference policy, loaded as TRL loads it."
    model, processor = copy.deepcopy(tiny_vlm[0]), tiny_vlm[1]
    folder = tmp_path_factory.mktemp("trl")
    model.save_pretrained(folder / "policy")
    model.config._name_or_path = str(folder / "policy")
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=LIMIT,
        temperature=0.7,
        beta=0.1,
        epsilon_high=0.3,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=None,
        report_to="none",
    )
    data = Dataset.from_dict({"prompt": ["x"] * 2})
    trainer = GRPOTrainer(model, uneven, args, train_dataset=data, processing_class=processor)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def batch(trainer, tiny_rows):
    "Two groups of four; afterwards the policy moves away, so that ratios differ from 1 and some are clipped."
    torch.manual_seed(3)
    rows = [dict(row) for row in tiny_rows[:2] for _ in range(4)]
    inputs = trainer._generate_and_score_completions(rows)
    lengths = torch.tensor([6, 5, 4, 3, 2, 1, 6, 6])
    inputs["completion_mask"] = (torch.arange(LIMIT)[None] < lengths[:, None]).long()
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    inputs["old_per_token_logps"] = logprobs(trainer, inputs).detach()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return inputs


def logprobs(trainer, inputs):
    "From the plain logits of the model, not from TRL's fused head."
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    out = trainer.model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])
    return token_logprobs(out.logits[:, -LIMIT - 1 : -1], inputs["completion_ids"], temperature=0.7)


def gradient(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_type, kl, level", CASES)
def test_same_loss_and_gradient_as_trl(trainer, batch, loss_type, kl, level):
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.beta, trainer.args.use_bias_correction_kl = kl
    theirs = trainer.compute_loss(trainer.model, batch)
    now = logprobs(trainer, batch)
    ours = grpo_loss(
        now,
        batch["old_per_token_logps"],
        batch["advantages"],
        batch["completion_mask"],
        ref_logprobs=batch["ref_per_token_logps"],
        beta=kl[0],
        kl_ratio=kl[1],
        epsilon=0.2,
        epsilon_high=0.3,
        level=level,
        loss_type=loss_type,
        max_completion_length=LIMIT,
    )
    assert abs(ours.item() - theirs.item()) < 1e-6
    ratios = (now - batch["old_per_token_logps"]).exp()
    assert ratios.max() > 1.3 and ratios.min() < 0.8, "the case must exercise the clip"
    mine, trls = gradient(ours, trainer.model), gradient(theirs, trainer.model)
    assert trls.norm() > 0.01 and (mine - trls).norm() < 1e-5 * trls.norm()


def test_micro_batches_of_dapo_add_up_as_in_trl(trainer, batch):
    trainer.loss_type, trainer.beta, trainer.importance_sampling_level = "dapo", 0.0, "token"
    halves = [{name: part(value, i) for name, value in batch.items()} for i in (0, 4)]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
    theirs = [trainer.compute_loss(trainer.model, half).item() for half in halves]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    for half, loss in zip(halves, theirs, strict=True):
        ours = grpo_loss(
            logprobs(trainer, half),
            half["old_per_token_logps"],
            half["advantages"],
            half["completion_mask"],
            epsilon_high=0.3,
            tokens_in_step=batch["num_items_in_batch"].item(),
        )
        assert abs(ours.item() - loss) < 1e-6


def part(value, start):
    "Four completions of the batch; totals stay as they are."
    return value if isinstance(value, torch.Tensor) and not value.ndim else value[start : start + 4]


def test_kl_is_unbiased_over_a_vocabulary():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
        exact = (policy.exp() * (policy - reference)).sum()
        torch.testing.assert_close((policy.exp() * kl_k3(policy, reference)).sum(), exact)
        assert (kl_k3(policy, reference) >= 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_naive_average(loss_type):
    "Token by token in plain Python."
    generator = torch.Generator().manual_seed(1)
    losses, lengths = torch.randn(5, 7, generator=generator), [7, 1, 3, 5, 2]
    mask = torch.tensor([[t < n for t in range(7)] for n in lengths]).long()
    sums = [sum(losses[i, t].item() for t in range(n)) for i, n in enumerate(lengths)]
    naive = {
        "grpo": sum(s / n for s, n in zip(sums, lengths, strict=True)) / 5,
        "bnpo": sum(sums) / sum(lengths),
        "dapo": sum(sums) / sum(lengths),
        "dr_grpo": sum(sums) / (5 * 9),
    }
    assert aggregate(losses, mask, loss_type, max_completion_length=9).item() == pytest.approx(
        naive[loss_type], abs=1e-6
    )


def test_a_completion_without_tokens_does_not_divide_by_zero():
    mask = torch.tensor([[1, 1], [0, 0]])
    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
        assert aggregate(torch.ones(2, 2), 0 * mask, loss_type, max_completion_length=2).item() == 0
        assert aggregate(torch.ones(2, 2), mask, loss_type, max_completion_length=2).isfinite()

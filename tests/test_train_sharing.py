"""Reading the prompt of a group once gives the numbers of reading it for every completion."""

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trl.trainer.utils import add_fused_lm_head

from vlm_reward.core.rows import make_row
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.train import sharing
from vlm_reward.train.grpo import GRPOSettings, train_grpo
from vlm_reward.train.sharing import OncePerGroup, repeat_parts, shared_forward, sharing_generate, sharing_problem

SMALL = GRPOSettings(steps=3, prompts_per_step=2, group_size=4, max_new_tokens=6, warmup=0, lr=1e-3)


def letters(completions, **columns):
    return [float(len(set(c[0]["content"]))) for c in completions]


class Rubric:
    reward_funcs, reward_weights = (letters,), (1.0,)


def make_rows(n, pictures):
    colours = ["red", "green", "blue", "white"]
    images = [Image.new("RGB", (64, 64), colours[i % 4]) for i in range(n * pictures)]
    texts = ["?" * (1 + 5 * (i % 3)) for i in range(n)]  # prompts of several lengths, some of them equal
    groups = [images[i * pictures : (i + 1) * pictures] for i in range(n)]
    return [
        make_row(id=str(i), task="t", question=text, images=group, solution="")
        for i, (text, group) in enumerate(zip(texts, groups, strict=True))
    ]


@pytest.fixture(scope="module")
def patched(tiny_vlm):
    model = copy.deepcopy(tiny_vlm[0])
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model, tiny_vlm[1]


def batch_of(processor, sizes, pictures, seed):
    "A shuffled batch with groups of several sizes and completions of several lengths."
    noise = torch.Generator().manual_seed(seed)
    rows = [row for row, n in zip(make_rows(len(sizes), pictures), sizes, strict=True) for _ in range(n)]
    prompts = encode_prompts(processor, rows)
    n = len(rows)
    order = torch.randperm(n, generator=noise)
    batch = {
        "prompt_ids": prompts["input_ids"][order],
        "prompt_mask": prompts["attention_mask"][order],
        "completion_ids": torch.randint(10, 200, (n, 5), generator=noise),
        "completion_mask": (torch.arange(5) < torch.randint(1, 6, (n, 1), generator=noise)).long(),
        "prompt": torch.tensor([7 * i for i, size in enumerate(sizes) for _ in range(size)])[order],
    }
    if pictures:
        batch["pixel_values"] = prompts["pixel_values"].unflatten(0, (n, pictures))[order].flatten(0, 1)
    return batch


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), pictures=st.integers(0, 2), seed=st.integers(0, 99))
def test_log_probabilities_and_gradients(patched, sizes, pictures, seed):
    model, processor = patched
    batch = batch_of(processor, sizes, pictures, seed)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    seen = {"pixel_values": batch["pixel_values"]} if pictures else {}
    labels = ids.masked_fill(mask == 0, -100)
    weight = torch.rand(len(ids), 5, generator=torch.Generator().manual_seed(seed)) * batch["completion_mask"]
    found = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            out = shared_forward(model, ids, mask, 5, batch["prompt"], seen.get("pixel_values"))
            logprobs, entropy = out.log_probs, out.entropy
            assert logprobs.shape == (len(ids), 5)
        else:
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **seen)
            logprobs, entropy = out.log_probs[:, -5:], out.entropy[:, -5:]
        (weight * (logprobs + 0.3 * logprobs**2)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach(), entropy.detach(), gradient))
    (a, h, g), (b, k, d) = found
    assert (a - b).abs().max() < 1e-4 and (h - k).abs().max() < 1e-4
    assert (g - d).norm() < 1e-4 * g.norm()
    assert sharing_problem(model, batch) is None


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_processor(tiny_vlm, pictures):
    processor = tiny_vlm[1]
    rows = [row for row in make_rows(5, pictures) for _ in range(3)]
    once = OncePerGroup(processor, 3)
    plain, shared = encode_prompts(processor, rows), encode_prompts(once, rows)
    assert plain.keys() == shared.keys() and all(torch.equal(plain[k], shared[k]) for k in plain)
    talks = [[{"role": "user", "content": filled(row)}] for row in rows]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    plain, shared = processor.apply_chat_template(talks, **options), once.apply_chat_template(talks, **options)
    assert plain.keys() == shared.keys()
    for name in plain:
        assert [torch.as_tensor(x).tolist() for x in plain[name]] == [torch.as_tensor(x).tolist() for x in shared[name]]
    assert once.tokenizer is processor.tokenizer


def filled(row):
    pictures = iter(row["images"])
    return [
        {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
        for part in row["prompt"][0]["content"]
    ]


def test_processor_that_packs_patches_is_asked_for_every_prompt():
    class Packs:
        def __call__(self, images, text, **options):
            return {"input_ids": torch.zeros(len(text), 2), "pixel_values": torch.zeros(7 * len(text), 3)}

    batch = OncePerGroup(Packs(), 2)(images=[["a"]] * 4, text=["x"] * 4)
    assert [len(v) for v in batch.values()] == [4, 28]


def test_repeat_parts():
    values = torch.arange(6)
    assert repeat_parts(values, 3, 2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    assert repeat_parts(values.tolist(), 6, 1) == values.tolist()


def test_sampled_words(patched):
    model, processor = patched
    rows = [row for row in make_rows(3, 1) for _ in range(4)]
    prompts = encode_prompts(processor, rows)
    found = []
    for size in (1, 4):
        torch.manual_seed(5)
        with sharing_generate(model, size):
            found.append(model.generate(**prompts, max_new_tokens=8, do_sample=True, top_k=0))
    assert torch.equal(*found)


def run(vlm, rows, **changed):
    log, model = [], copy.deepcopy(vlm[0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train_grpo(
            model,
            vlm[1],
            rows,
            Rubric,
            dataclasses.replace(SMALL, **changed),
            progress=lambda step, metrics: log.append(metrics),
        )
    return model, log, [str(w.message) for w in told if "read once per completion" in str(w.message)]


@pytest.mark.parametrize(
    "pictures, changed", [(1, {"beta": 0.1}), (1, {"accumulate": 2, "temperature": 0.6}), (0, {}), (2, {"updates": 2})]
)
def test_training(tiny_vlm, pictures, changed):
    rows = make_rows(6, pictures)
    shared, log, told = run(tiny_vlm, rows, **changed)
    plain, expected, _ = run(tiny_vlm, rows, share_prompts=False, **changed)
    assert not told
    for mine, trls in zip(log, expected, strict=True):
        assert mine == pytest.approx(trls, rel=1e-3, abs=1e-4)
    before, mine, trls = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (tiny_vlm[0], shared, plain)
    )
    assert (mine - trls).norm() < 0.02 * (trls - before).norm()  # AdamW makes steps of rounding errors too


def test_sharing_is_used(tiny_vlm, monkeypatch):
    calls = []
    forward = sharing.shared_forward
    monkeypatch.setattr(sharing, "shared_forward", lambda *a, **k: calls.append(len(a[1])) or forward(*a, **k))
    run(tiny_vlm, make_rows(6, 1))
    assert calls == [8] * 4  # one trial, three steps


@pytest.mark.parametrize("fault", ["wrong numbers", "an error", "other words"])
def test_a_model_that_cannot_share_is_trained_the_plain_way(tiny_vlm, monkeypatch, fault):
    rows = make_rows(6, 1)
    _, expected, _ = run(tiny_vlm, rows, share_prompts=False)
    forward = sharing.shared_forward

    def wrong(*args):
        if fault == "an error":
            raise ValueError("position_ids\nare three-dimensional")
        out = forward(*args)
        out.log_probs = out.log_probs + 0.01
        return out

    if fault == "other words":
        monkeypatch.setattr(sharing, "same_words", lambda model, inputs: False)
    else:
        monkeypatch.setattr(sharing, "shared_forward", wrong)
    _, log, told = run(tiny_vlm, rows)
    assert log == expected
    assert len(told) == 1 and "\n" not in told[0]
    assert {"wrong numbers": "1e-02", "an error": "three-dimensional", "other words": "words"}[fault] in told[0]

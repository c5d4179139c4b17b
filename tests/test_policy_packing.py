"Packed rows give what one row per completion gives: scores, entropies and gradients, for every family."

import copy
import math
import os
from functools import cache
from itertools import pairwise
from types import MethodType

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import add_fused_lm_head

from vlm_reward.core.rows import make_row
from vlm_reward.policy import branches
from vlm_reward.policy.branches import (
    Branch,
    Segment,
    branch_positions,
    pack,
    place_branches,
    predictors,
    tree_mask,
)
from vlm_reward.policy.families import image_token_ids, vision_tower
from vlm_reward.policy.packing import (
    best_row,
    branch_logprobs,
    group_logprobs,
    packing_gap,
    plain_logprobs,
    split_groups,
)
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.policy.scoring import install_scoring
from vlm_reward.policy.specimens import SPECIMENS, specimen

SMALL = {"hidden": 32, "heads": 2, "vision_hidden": 16, "tiles": 2}
WORDS = range(10, 200)  # ids of tokens that are no placeholders


@cache
def small(family):
    "(model, processor) of a family, shared by all tests: not to be changed."
    return specimen(family, **SMALL)


def fresh(family):
    "The same, of this test alone."
    model, processor = small(family)
    return copy.deepcopy(model), processor


def make_rows(sizes, seed=0):
    "Rows with some pictures of odd sizes and some words each; `sizes` holds (pictures, words)."
    rng = np.random.default_rng(seed)
    rows = []
    for i, (pictures, words) in enumerate(sizes):
        shapes = [(*rng.integers(17, 60, 2).tolist(), 3) for _ in range(pictures)]
        images = [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]
        rows.append(make_row(id=str(i), task="t", question="so " * words, images=images, solution="x"))
    return rows


def make_texts(lengths, seed=0):
    "Random tokens: a list per prompt of completions."
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(WORDS[0], WORDS[-1], (n,), generator=generator) for n in some] for some in lengths]


def alone(model, processor, row, prefix, tokens):
    "Log-probabilities and entropies of `tokens` after `prefix` in a row of its own, by the model's own forward."
    inputs = encode_prompts(processor, [row])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], prefix[None], tokens[None]], 1)
    added = len(prefix) + len(tokens)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, added))
    logprobs = model(**inputs).logits[0, -len(tokens) - 1 : -1][: len(tokens)].log_softmax(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def gradients(model, loss):
    "Gradients of all parameters by name; those that take no part are left out."
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours, theirs):
    "Within 1e-4 of each parameter's gradient; one that is nothing but rounding is compared with the others' size."
    assert ours.keys() == theirs.keys()
    noise = 1e-2 * torch.stack([g.norm() / g.numel() ** 0.5 for g in theirs.values()]).median()
    for name, gradient in theirs.items():
        floor = noise * gradient.numel() ** 0.5
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp(min=floor), name


GROUPS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 6), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("family", SPECIMENS)
@settings(max_examples=12, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 99))
def test_every_family_scores_as_alone(family, groups, seed):
    model, processor = small(family)
    rows = make_rows([group[:2] for group in groups], seed)
    texts = make_texts([group[2] for group in groups], seed)
    scores = branch_logprobs(
        model, encode_prompts(processor, rows), [[Branch(t) for t in some] for some in texts], entropy=True
    )
    plain = [alone(model, processor, row, t[:0], t) for row, some in zip(rows, texts, strict=True) for t in some]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*plain, strict=True))
    ours = torch.cat([score.logprobs for some in scores for score in some])
    ours_entropies = torch.cat([score.entropy for some in scores for score in some])
    torch.testing.assert_close(ours, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours_entropies, entropies, atol=1e-5, rtol=0)
    if not len(ours):
        return
    weights = torch.linspace(-1, 2, len(ours))
    one = gradients(model, ours @ weights + ours_entropies.sum())
    other = gradients(model, logprobs @ weights + entropies.sum())
    assert_same_gradients(one, other)


def naive_tree(prompt, branches):
    "For every token of a row its ancestors and itself, and its depth, by walking from child to parent."
    parents = list(range(-1, prompt - 1))
    starts = []
    for tokens, parent, keep in branches:
        first = 0 if parent < 0 else starts[parent]
        size = prompt if parent < 0 else len(branches[parent].tokens)
        keep = size if keep is None else keep
        while not keep:  # nothing of this parent: what comes before it is seen
            tokens_before = branches[parent]
            parent = tokens_before.parent
            size = prompt if parent < 0 else len(branches[parent].tokens)
            first = 0 if parent < 0 else starts[parent]
            keep = size if tokens_before.keep is None else tokens_before.keep
        starts.append(len(parents))
        for i in range(len(tokens)):
            parents.append(first + keep - 1 if not i else len(parents) - 1)
    seen = np.zeros((len(parents), len(parents)), dtype=bool)
    for token, parent in enumerate(parents):
        seen[token] = seen[parent] if parent >= 0 else False
        seen[token, token] = True
    return seen, parents


@st.composite
def trees(draw):
    "A prompt's length and branches that hang off prefixes of the prompt and of each other."
    prompt, branches = draw(st.integers(1, 5)), []
    for i in range(draw(st.integers(0, 6))):
        parent = draw(st.integers(-1, i - 1))
        size = prompt if parent < 0 else len(branches[parent].tokens)
        keep = draw(st.none() | st.integers(parent < 0, size))
        branches.append(Branch(torch.full((draw(st.integers(0, 4)),), i), parent, keep))
    return prompt, branches


@settings(max_examples=200, deadline=None)
@given(tree=trees())
def test_tree_is_ancestry(tree):
    prompt, branches = tree
    placed = place_branches(branches, list(range(prompt)), prompt)
    rows = [Segment(0, prompt, 0, []), *placed]
    seen, parents = naive_tree(prompt, branches)
    mask = tree_mask([rows], range(len(seen)), len(seen), torch.empty(0))[0, 0]
    assert ((mask == 0).numpy() == seen).all()
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo().min}
    assert predictors(placed).tolist() == parents[prompt:]
    assert (
        branch_positions(placed, torch.zeros(1, 1, dtype=torch.long))[:, 0].tolist()
        == (seen.sum(1) - 1).tolist()[prompt:]
    )


@pytest.mark.parametrize("family", SPECIMENS)
def test_branches_off_any_prefix(family):
    model, processor = small(family)
    row = make_rows([(1, 2)])
    a, b, gold = make_texts([(6, 3, 4)])[0]
    inputs = encode_prompts(processor, row)
    length = int(inputs["attention_mask"].sum())
    tree = [
        Branch(a),
        Branch(b),
        Branch(gold, 0, 3),
        Branch(gold, 1),
        Branch(gold, 0, 0),
        Branch(gold, -1, length - 2),
    ]
    with torch.no_grad():
        scores = [score.logprobs for score in branch_logprobs(model, inputs, [tree])[0]]
        for prefix, found in [(a[:3], scores[2]), (b, scores[3]), (a[:0], scores[4])]:
            torch.testing.assert_close(found, alone(model, processor, row[0], prefix, gold)[0], atol=1e-5, rtol=0)
        cut = {
            name: value[:, :-2] if value.shape[:2] == inputs["input_ids"].shape else value
            for name, value in inputs.items()
        }
        shorter = branch_logprobs(model, cut, [[Branch(gold)]])[0][0].logprobs
    torch.testing.assert_close(scores[5], shorter, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SPECIMENS)
def test_scores_do_not_depend_on_the_others(family):
    model, processor = small(family)
    rows, texts = make_rows([(1, 2), (2, 5), (0, 1)]), make_texts([(5, 9), (3, 20, 1), (7,)])
    with torch.no_grad():
        together = branch_logprobs(
            model, encode_prompts(processor, rows), [[Branch(t) for t in some] for some in texts]
        )
        for row, some, scores in zip(rows, texts, together, strict=True):
            for text, score in zip(some, scores, strict=True):
                single = branch_logprobs(model, encode_prompts(processor, [row]), [[Branch(text)]])[0][0]
                torch.testing.assert_close(score.logprobs, single.logprobs, atol=1e-5, rtol=0)


def batch(family, sizes=((1, 2), (2, 4), (0, 1)), lengths=((5, 0), (9, 2, 30), (3,))):
    "Inputs, and completions as trainers hold them, out of order."
    _, processor = small(family)
    texts = make_texts(lengths)
    pairs = [(text, p) for p, some in enumerate(texts) for text in some][::-1]
    ids = pad_sequence([text for text, _ in pairs], batch_first=True, padding_value=7)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text, _ in pairs])).long()
    return encode_prompts(processor, make_rows(sizes)), ids, mask, torch.tensor([p for _, p in pairs])


@pytest.mark.parametrize("family", SPECIMENS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_group_is_one_row_per_completion(family, temperature):
    model, _ = small(family)
    group = batch(family)
    with torch.no_grad():
        logprobs, entropies = group_logprobs(model, *group, temperature=temperature, entropy=True)
        plain = plain_logprobs(model, *group, temperature=temperature)
    assert logprobs.shape == entropies.shape == group[1].shape
    assert not logprobs[group[2] == 0].any() and not entropies[group[2] == 0].any()
    torch.testing.assert_close(logprobs, plain, atol=3e-5, rtol=0)  # the plain way counts positions from the padding
    assert packing_gap(model, *group) < 3e-5


def test_group_without_completions_and_without_tokens():
    model, processor = small("llava")
    inputs = encode_prompts(processor, make_rows([(1, 2), (1, 0)]))
    text = make_texts([(4,)])[0][0]
    both, _ = group_logprobs(model, inputs, text[None], torch.ones(1, 4), torch.tensor([1]))
    assert both.shape == (1, 4)
    for width in (3, 0):  # completions that are masked, or not there
        ids = torch.full((2, width), 20)
        empty, entropies = group_logprobs(model, inputs, ids, 0 * ids, torch.tensor([0, 1]), entropy=True)
        found = gradients(model, empty.sum() + entropies.sum())
        assert empty.shape == ids.shape and found and not any(g.any() for g in found.values())
        assert packing_gap(model, inputs, ids, 0 * ids, torch.tensor([0, 1])) == 0


def test_attention_kernels_agree():
    model, _ = fresh("qwen2_5_vl")
    group = batch("qwen2_5_vl")
    with torch.no_grad():
        fast, _ = group_logprobs(model, *group)
        model.set_attn_implementation("eager")
        eager, _ = group_logprobs(model, *group)
    torch.testing.assert_close(fast, eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SPECIMENS)
def test_gradient_checkpointing(family):
    model, _ = fresh(family)
    group = batch(family)
    weights = torch.linspace(-1, 2, group[1].numel()).view(group[1].shape)
    plain = gradients(model, (group_logprobs(model, *group)[0] * weights).sum())
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_gradients(gradients(model, (group_logprobs(model, *group)[0] * weights).sum()), plain)


@pytest.mark.parametrize("family", SPECIMENS)
def test_bfloat16(family):
    model, _ = fresh(family)
    group = batch(family)
    with torch.no_grad():
        exact = group_logprobs(model, *group)[0]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = group_logprobs(model, *group)[0]
        model.to(torch.bfloat16)
        half, plain = group_logprobs(model, *group)[0], plain_logprobs(model, *group)
    rounding = (plain - exact).abs()
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 1.5 * rounding.mean() + 1e-3
    assert (mixed - exact).abs().mean() < 1.5 * rounding.mean() + 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("first", ["scoring", "adapter"])
def test_adapters(family, first):
    model, _ = fresh(family)
    if first == "scoring":
        install_scoring(model)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=r".*(q_proj|v_proj|qkv|down_proj)", init_lora_weights=False)
    )
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    tower = ("visual", "vision_tower", "vision_model")
    assert {any(part in name for part in tower) for name in names} == {True, False}  # tower and language
    group = batch(family)
    weights = torch.linspace(-1, 2, group[1].numel()).view(group[1].shape)
    ours = gradients(adapted, (group_logprobs(adapted, *group)[0] * weights).sum())
    theirs = gradients(adapted, (plain_logprobs(adapted, *group) * weights).sum())
    assert set(ours) == set(names)
    assert_same_gradients(ours, theirs)
    with torch.no_grad(), adapted.disable_adapter():
        base = group_logprobs(adapted, *group)[0]
        torch.testing.assert_close(base, plain_logprobs(small(family)[0], *group), atol=3e-5, rtol=0)


@pytest.mark.parametrize("first", ["ours", "trl"])
def test_beside_the_head_of_trl(first):
    model, _ = fresh("qwen2_5_vl")
    group = batch("qwen2_5_vl", ((1, 2),), ((6,),))
    inputs, ids, _, _ = group
    if first == "ours":
        install_scoring(model)
    add_fused_lm_head(model, temperature=0.7)
    with torch.no_grad():
        ours, _ = group_logprobs(model, *group, temperature=0.7)
        whole = torch.cat([inputs["input_ids"], ids], 1)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1]))
        full = inputs | {"input_ids": whole, "attention_mask": torch.ones_like(whole), "mm_token_type_ids": kinds}
        theirs = model(**full, labels=whole, fused_lm_head=True).log_probs[:, -ids.shape[1] :]
        words = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert words.equal(small("qwen2_5_vl")[0].generate(**inputs, max_new_tokens=3, do_sample=False))


def test_prepared_by_accelerate():
    "Mixed precision wraps the forward once more, and turns what it gives into float32."
    model, _ = fresh("qwen2_5_vl")
    group = batch("qwen2_5_vl")
    with torch.no_grad():
        exact, _ = group_logprobs(model, *group)
    mixed = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)  # as `Accelerator.prepare` does
    model.forward = MethodType(convert_outputs_to_fp32(mixed), model)
    logprobs, entropies = group_logprobs(model, *group, entropy=True)
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert (logprobs - exact).abs().mean() < 0.05
    assert gradients(model, logprobs.sum() + entropies.sum())


def share(rank, port, results):
    "One of two processes: gradients of its half of the completions, averaged by DDP."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, _ = fresh("llava")
    inputs, ids, mask, member = batch("llava", ((1, 2), (1, 0)), ((5, 2), (3, 7)))
    mine = (member == rank).nonzero()[:, 0]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # the tower's last norm takes no part
    logprobs, _ = group_logprobs(wrapped, inputs, ids[mine], mask[mine], member[mine])
    found = gradients(wrapped, logprobs.sum())
    if not rank:
        torch.save({name.removeprefix("module."): g for name, g in found.items()}, results)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then wait for each other when they are taken down


def test_two_processes(in_two_processes, tmp_path):
    results = tmp_path / "gradients.pt"
    in_two_processes(share, results)
    model, _ = fresh("llava")
    logprobs, _ = group_logprobs(model, *batch("llava", ((1, 2), (1, 0)), ((5, 2), (3, 7))))
    shared = torch.load(results)
    alone = gradients(model, logprobs.sum() / 2)
    assert_same_gradients({name: shared[name] for name in alone}, alone)


def test_nan_comes_out():
    model, _ = fresh("llava")
    inputs, ids, mask, member = batch("llava")
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("nan")
        logprobs, entropies = group_logprobs(model, inputs, ids, mask, member, entropy=True)
    assert logprobs[mask == 1].isnan().all() and entropies[mask == 1].isnan().all()
    assert not logprobs[mask == 0].any()
    assert math.isnan(packing_gap(model, inputs, ids, mask, member))


def test_gap_sees_a_difference(monkeypatch):
    model, _ = small("llava")
    right = branches.prompt_positions
    monkeypatch.setattr(branches, "prompt_positions", lambda *args: 2 * right(*args))
    assert packing_gap(model, *batch("llava")) > 1e-3


def refusal(message, function, *args, **options):
    "The one line with which something is refused."
    with pytest.raises(ValueError, match=message) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)


def test_what_is_refused():
    model, _ = small("llava")
    inputs, ids, mask, member = group = batch("llava")
    text = torch.tensor([20, 21])
    placeholder = image_token_ids(model)[0]
    bad = ids.clone()
    bad[1, 8] = placeholder
    refusal(
        f"completion 1 holds the placeholder {placeholder} at token 8", group_logprobs, model, inputs, bad, mask, member
    )
    bad[1, 8], bad[0, 4] = 20, placeholder  # behind the mask: nobody reads it
    assert group_logprobs(model, inputs, bad, mask, member)[0].isfinite().all()
    refusal(
        "branch 1 of prompt 2 holds the placeholder",
        pack,
        model,
        inputs,
        [[], [], [Branch(text), Branch(text * 0 + placeholder)]],
    )
    gap = mask.clone()
    gap[1, 3] = 0
    refusal("completion 1 has a gap in its mask", group_logprobs, model, inputs, ids, gap, member)
    refusal("completion 0 belongs to prompt 3, but there are 3", group_logprobs, model, inputs, ids, mask, member + 1)
    refusal("completion 4 belongs to prompt -1", group_logprobs, model, inputs, ids, mask, member - 1)
    refusal("want a temperature above 0, got 0", group_logprobs, model, *group, temperature=0)
    refusal("3 prompts and branches of 1", pack, model, inputs, [[]])
    refusal("branch 0 of prompt 1 names parent 0", pack, model, inputs, [[], [Branch(text, 0)], []])
    refusal(
        "branch 1 of prompt 0 keeps 3 of the 2 tokens",
        pack,
        model,
        inputs,
        [[Branch(text), Branch(text, 0, 3)], [], []],
    )
    refusal("branch 0 of prompt 0 keeps 0 of the", pack, model, inputs, [[Branch(text, -1, 0)], [], []])


def test_long_prompts_are_refused():
    model, processor = fresh("llava")
    inputs = encode_prompts(processor, make_rows([(1, 1), (1, 40)]))
    model.config.text_config.max_position_embeddings = 100
    refusal("prompt 1 has 1.. tokens, the model reads 100", pack, model, inputs, [[], []])


def test_models_that_cannot_be_packed_are_refused():
    model, processor = fresh("llava")
    model.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    inputs = encode_prompts(processor, make_rows([(1, 1)]))
    refusal("cannot pack: qwen2 has layers of kind sliding_attention", pack, model, inputs, [[]])


@pytest.mark.parametrize("family", SPECIMENS)
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_shorter_rows_score_the_same(family, max_tokens):
    model, _ = small(family)
    group = batch(family)
    with torch.no_grad():
        whole, _ = group_logprobs(model, *group)
        split, _ = group_logprobs(model, *group, max_tokens=max_tokens, images_per_prompt=[1, 2, 0])
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)


def test_shorter_rows_need_to_know_the_pictures():
    refusal("images_per_prompt", group_logprobs, small("llava")[0], *batch("llava"), max_tokens=60)


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=4),
    prompt=st.integers(1, 9),
    most=st.integers(1, 30),
)
def test_rows_hold_what_fits(groups, prompt, most):
    lengths = [n for group in groups for n in group]
    numbers = iter(range(len(lengths)))
    members = [[next(numbers) for _ in group] for group in groups]
    rows = split_groups(members, lengths, [prompt] * len(groups), most)
    assert {p for p, _ in rows} == set(range(len(groups)))
    for p, group in enumerate(members):
        assert [n for q, row in rows if q == p for n in row] == group
    for (p, row), (q, after) in pairwise(rows):
        size = prompt + sum(lengths[n] for n in row)
        assert size <= most or len(row) <= 1
        assert p != q or size + lengths[after[0]] > most  # no row more than needed


@pytest.mark.parametrize("family", SPECIMENS)
@pytest.mark.parametrize("pictures", [0, 1])
def test_best_row_is_where_a_token_costs_least(family, pictures):
    model, processor = small(family)
    inputs = encode_prompts(processor, make_rows([(pictures, 9)]))
    prompt = inputs["input_ids"].shape[1]
    names = ("language_model.layers.", "text_model.layers.")
    weights = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in names))
    seen = sum(p.numel() for p in vision_tower(model).parameters())
    temporal = 2 if family.startswith("qwen") else 1
    patches = inputs["pixel_values"].numel() / (3 * 8 * 8 * temporal) if pictures else 0
    pairs = 4 * model.config.get_text_config().hidden_size * model.config.get_text_config().num_hidden_layers

    def cost(b):  # floating-point operations per token of a branch
        return (2 * weights * (prompt + b) + 2 * seen * patches + pairs * (prompt + b) ** 2) / b

    least = min(range(1, 5000), key=cost)
    assert abs(best_row(model, inputs) - prompt - least) <= 1


@pytest.mark.parametrize("family", SPECIMENS)
def test_rows_of_best_length_score_the_same(family):
    model, _ = small(family)
    group = batch(family, lengths=((5, 0), (90, 200, 30), (3,)))
    assert best_row(model, group[0]) < 320  # so that the second group is split
    with torch.no_grad():
        whole, _ = group_logprobs(model, *group)
        best, _ = group_logprobs(model, *group, images_per_prompt=[1, 2, 0])
    torch.testing.assert_close(best, whole, atol=1e-5, rtol=0)

"Branches over a trunk that was read once score as they do in a row of their own."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_policy_packing import SPECIMENS, alone, fresh, make_rows, make_texts, refusal, small

from vlm_reward.policy.branches import Branch
from vlm_reward.policy.families import image_token_ids
from vlm_reward.policy.packing import branch_logprobs
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.policy.tree import bunches, extend_trunk, pick, read_trunk, trunk_logprobs


def batch(family, sizes=((1, 2), (2, 5), (0, 1))):
    "Inputs of a few prompts, and random trees that hang off them."
    _, processor = small(family)
    inputs = encode_prompts(processor, make_rows(sizes))
    texts = make_texts([(5, 2, 4), (3, 0, 9), (7, 1, 1)])
    lengths = inputs["attention_mask"].sum(1).tolist()
    trees = [
        [Branch(a), Branch(b, 0, 2), Branch(c, -1, n - 2), Branch(a, 2), Branch(b)]
        for (a, b, c), n in zip(texts, lengths, strict=True)
    ]
    return inputs, trees


def flat(scores, field="logprobs"):
    "All scores in one tensor."
    return torch.cat([getattr(score, field) for some in scores for score in some])


@pytest.mark.parametrize("family", SPECIMENS)
@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_trunk_is_packing(family, chunk):
    model, _ = small(family)
    inputs, trees = batch(family)
    trunk = read_trunk(model, inputs)
    columns = trunk.cache.get_seq_length()
    scores = trunk_logprobs(model, trunk, trees, chunk=chunk, temperature=0.8, entropy=True)
    again = trunk_logprobs(model, trunk, [trees[0], [], []], chunk=chunk, temperature=0.8)
    assert {layer.get_seq_length() for layer in trunk.cache.layers} == {columns}
    with torch.no_grad():
        packed = branch_logprobs(model, inputs, trees, temperature=0.8, entropy=True)
    torch.testing.assert_close(flat(scores), flat(packed), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat(scores, "entropy"), flat(packed, "entropy"), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat(again), flat(packed[:1]), atol=1e-5, rtol=0)
    assert not flat(scores).requires_grad


@pytest.mark.parametrize("family", SPECIMENS)
def test_every_prefix_of_a_rationale(family):
    "The reward of LaCoT at every state, against one forward per state."
    model, processor = small(family)
    rows = make_rows([(1, 2)])
    rationale, gold = make_texts([(12, 3)])[0]
    inputs = encode_prompts(processor, rows)
    size = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], rationale[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(rationale)))
    trunk = read_trunk(model, inputs)
    scores = trunk_logprobs(model, trunk, [[Branch(gold, keep=size + t) for t in range(13)]], chunk=5)[0]
    with torch.no_grad():
        for t, score in enumerate(scores):
            plain = alone(model, processor, rows[0], rationale[:t], gold)[0]
            torch.testing.assert_close(score.logprobs, plain, atol=1e-5, rtol=0)


def test_a_model_in_training_reads_without_dropout_and_goes_on_training():
    model, _ = fresh("llava")
    inputs, trees = batch("llava")
    plain = flat(trunk_logprobs(model, read_trunk(model, inputs), trees))
    model.gradient_checkpointing_enable()  # which switches caches off while training
    model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = flat(trunk_logprobs(model, read_trunk(model, inputs), trees))
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)
    assert model.training


def longer(inputs, text):
    "Inputs of one prompt with a text behind it, joined by hand."
    inputs = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], text[None]], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(text)))
    return inputs


@pytest.mark.parametrize("family", SPECIMENS)
def test_reading_on_is_reading_from_nothing(family):
    "Rationales of one question: scores, states and all that hangs off them, against each read alone with its prompt."
    model, processor = small(family)
    rows = make_rows([(2, 3)])
    inputs = encode_prompts(processor, rows)
    size = inputs["input_ids"].shape[1]
    texts = make_texts([(5, 0, 12, 1)])[0]
    gold, other = make_texts([(4, 2)], seed=1)[0]
    grown, logprobs = extend_trunk(model, read_trunk(model, inputs), texts, temperature=0.8)
    assert grown.cache.get_seq_length() == size + 12 == grown.states.shape[1]
    trees = [
        [Branch(gold, keep=size + t) for t in range(len(text) + 1)] + [Branch(other, parent=0, keep=2), Branch(gold)]
        for text in texts
    ]
    hung = trunk_logprobs(model, grown, trees, chunk=3, entropy=True)
    for r, text in enumerate(texts):
        whole = read_trunk(model, longer(inputs, text))
        assert grown.reaches[r] == whole.reaches[0] and grown.axes == whole.axes
        torch.testing.assert_close(grown.states[r, : size + len(text)], whole.states[0], atol=1e-5, rtol=0)
        plain = branch_logprobs(model, inputs, [[Branch(text)]], temperature=0.8)[0][0].logprobs
        torch.testing.assert_close(logprobs[r], plain.detach(), atol=1e-5, rtol=0)
        for field in ("logprobs", "entropy"):
            ours, theirs = (
                flat(hung[r : r + 1], field),
                flat(trunk_logprobs(model, whole, [trees[r]], entropy=True), field),
            )
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        with torch.no_grad():
            score = alone(model, processor, rows[0], text, gold)[0]
        torch.testing.assert_close(hung[r][-1].logprobs, score, atol=1e-5, rtol=0)
    assert not any(some.requires_grad for some in logprobs)


def test_a_row_does_not_depend_on_the_others():
    model, processor = small("qwen2_5_vl")
    inputs, texts = encode_prompts(processor, make_rows([(1, 2)])), make_texts([(9, 2, 30)])[0]
    _, together = extend_trunk(model, read_trunk(model, inputs), texts)
    for text, ours in zip(texts, together, strict=True):
        _, (one,) = extend_trunk(model, read_trunk(model, inputs), [text])
        torch.testing.assert_close(ours, one, atol=1e-5, rtol=0)


def test_reading_on_without_tokens():
    model, processor = small("llava")
    inputs, gold = encode_prompts(processor, make_rows([(1, 2)])), torch.tensor([20, 21])
    grown, logprobs = extend_trunk(model, read_trunk(model, inputs), [gold[:0]] * 2)
    assert [len(some) for some in logprobs] == [0, 0] and len(grown.reaches) == 2
    scored = trunk_logprobs(model, grown, [[Branch(gold)], [Branch(gold)]])
    plain = branch_logprobs(model, inputs, [[Branch(gold)]])[0][0].logprobs
    for some in scored:
        torch.testing.assert_close(some[0].logprobs, plain.detach(), atol=1e-5, rtol=0)


def test_a_rationale_that_is_read_on_twice():
    "A trunk of one row can grow again: prompt, opening, rationale."
    model, processor = small("smolvlm")
    inputs, (first, second) = encode_prompts(processor, make_rows([(1, 2)])), make_texts([(4, 7)])[0]
    whole, (once,) = extend_trunk(model, read_trunk(model, inputs), [torch.cat([first, second])])
    part, (head,) = extend_trunk(model, read_trunk(model, inputs), [first])
    grown, (tail,) = extend_trunk(model, part, [second])
    torch.testing.assert_close(torch.cat([head, tail]), once, atol=1e-5, rtol=0)
    torch.testing.assert_close(grown.states, whole.states, atol=1e-5, rtol=0)
    assert grown.reaches == whole.reaches


def test_reading_on_in_training_and_with_adapters():
    model, processor = fresh("qwen2_5_vl")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*(q_proj|v_proj)", init_lora_weights=False))
    inputs, texts = encode_prompts(processor, make_rows([(1, 2)])), make_texts([(9, 2)])[0]
    with torch.no_grad():
        plain = branch_logprobs(adapted, inputs, [[Branch(text) for text in texts]])[0]
    model.gradient_checkpointing_enable()
    adapted.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    _, found = extend_trunk(adapted, read_trunk(adapted, inputs), texts)
    for ours, score in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, score.logprobs, atol=1e-5, rtol=0)
    assert adapted.training


def test_what_cannot_be_read_on():
    model, processor = small("llava")
    inputs, text = encode_prompts(processor, make_rows([(1, 2)])), torch.tensor([20, 21])
    placeholder = image_token_ids(model)[0]
    trunk = read_trunk(model, inputs)
    refusal("at least one text and a temperature above 0, got 1 prompts, 0 texts", extend_trunk, model, trunk, [])
    refusal("got 1 prompts, 1 texts and temperature 0", extend_trunk, model, trunk, [text], temperature=0)
    refusal(f"branch 0 of prompt 1 holds the placeholder {placeholder} at token 0", extend_trunk, model, trunk,
            [text, torch.tensor([placeholder])])  # fmt: skip
    refusal("prompt 0 has .* tokens, the model reads 8192", extend_trunk, model, trunk, [text.repeat(5000)])
    several = read_trunk(model, encode_prompts(processor, make_rows([(1, 2), (0, 1)])))
    refusal("want a trunk of one prompt.*got 2 prompts", extend_trunk, model, several, [text])
    extend_trunk(model, trunk, [text])  # what was refused has not touched it


def test_adapters():
    model, _ = fresh("qwen2_5_vl")
    targets = r".*(q_proj|v_proj|qkv|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    inputs, trees = batch("qwen2_5_vl")
    with torch.no_grad():
        packed = branch_logprobs(adapted, inputs, trees)
    torch.testing.assert_close(
        flat(trunk_logprobs(adapted, read_trunk(adapted, inputs), trees)), flat(packed), atol=1e-5, rtol=0
    )


def test_half_precision():
    model, _ = fresh("smolvlm")
    inputs, trees = batch("smolvlm")
    exact = flat(trunk_logprobs(model, read_trunk(model, inputs), trees))
    model.to(torch.bfloat16)
    half = flat(trunk_logprobs(model, read_trunk(model, inputs), trees))
    assert half.dtype == torch.float32 and (half - exact).abs().mean() < 0.2


def test_the_trunk_stays_whole_when_a_forward_fails():
    model, _ = fresh("llava")
    inputs, trees = batch("llava")
    trunk = read_trunk(model, inputs)
    plain = flat(trunk_logprobs(model, trunk, trees))

    def stop(*_):
        raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        trunk_logprobs(model, trunk, trees)
    hook.remove()
    torch.testing.assert_close(flat(trunk_logprobs(model, trunk, trees)), plain, atol=0, rtol=0)


def test_what_is_refused():
    model, _ = small("llava")
    inputs, _ = batch("llava")
    trunk, text = read_trunk(model, inputs), torch.tensor([20, 21])
    placeholder = image_token_ids(model)[0]
    bad = [[], [Branch(text), Branch(text * 0 + placeholder)], []]
    refusal(f"branch 1 of prompt 1 holds the placeholder {placeholder} at token 0", trunk_logprobs, model, trunk, bad)
    refusal("3 prompts and branches of 1", trunk_logprobs, model, trunk, [[]])
    refusal(
        "branch 1 of prompt 2 names parent 1", trunk_logprobs, model, trunk, [[], [], [Branch(text), Branch(text, 1)]]
    )
    refusal("branch 0 of prompt 2 keeps 0", trunk_logprobs, model, trunk, [[], [], [Branch(text, keep=0)]])
    refusal("want a chunk of at least 1", trunk_logprobs, model, trunk, [[], [], []], chunk=0)
    refusal("temperature above 0", trunk_logprobs, model, trunk, [[], [], []], temperature=0)


@settings(max_examples=200, deadline=None)
@given(parents=st.lists(st.integers(-1, 20), max_size=15), most=st.integers(1, 6))
def test_bunches_keep_subtrees_whole(parents, most):
    parents = [min(parent, i - 1) for i, parent in enumerate(parents)]
    branches = [Branch(torch.tensor([i]), parent) for i, parent in enumerate(parents)]
    cut = bunches(branches, most)
    assert sorted(i for members in cut for i in members) == list(range(len(branches)))
    for members in cut:
        assert all(parents[i] < 0 or parents[i] in members[: members.index(i)] for i in members)
        roots = [i for i in members if parents[i] < 0]
        assert len(members) <= most or len(roots) == 1
        for i, branch in zip(members, pick(branches, members), strict=True):
            assert int(branch.tokens) == i
            assert parents[i] == (members[branch.parent] if branch.parent >= 0 else -1)

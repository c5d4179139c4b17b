"The reward of every prefix is what a forward of its own would find, and none of the known faults of such rewards is in it."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_policy_packing import SPECIMENS, fresh, make_rows, make_texts, refusal, small

from vlm_reward.lacot import token_reward
from vlm_reward.lacot.token_reward import (
    Parts,
    anneal,
    join_parts,
    reward_parts,
    scored_tokens,
    state_tail,
    token_rewards,
)
from vlm_reward.lacot.turns import answer_ids, encode_questions, turns_of
from vlm_reward.policy.families import image_token_ids, lora_targets, take_prompts, vision_tower
from vlm_reward.rewards.likelihood import anchors, interpolate

ROWS = [(1, 3)]


def asked(family, lengths=(6, 0, 3), layout=None, seed=0):
    "A model, its turns, a question, rationales of some lengths, and an answer."
    model, processor = small(family)
    layout = layout or ("section" if family in ("smolvlm", "idefics3") else "turn")
    turns, inputs = turns_of(processor, layout), encode_questions(processor, make_rows(ROWS))
    texts = [z.tolist() for z in make_texts([lengths], seed)[0]]
    return model, turns, inputs, texts, answer_ids(turns, processor, "left")


def logprobs_alone(model, inputs, ids):
    "Log-probabilities of ids behind a question, by the model's own forward."
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    grown = dict(inputs) | {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if "mm_token_type_ids" in inputs:
        grown["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids)))
    logits = model(**grown).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
def one_forward_per_prefix(model, turns, inputs, z, answer, empty="off"):
    "log P(z_1..t T Y | X) at every t: each prefix in a row of its own, with the picture."
    rewards = []
    for t in range(len(z) + 1):
        if not t and empty == "off":
            rewards.append(logprobs_alone(model, inputs, [*turns.skip, *answer])[len(turns.skip) :].sum())
            continue
        ids = [*turns.opening, *z[:t], turns.stop, *turns.bridge, *answer]
        logprobs = logprobs_alone(model, inputs, ids)
        first = len(turns.opening)
        rewards.append(logprobs[first : first + t + 1].sum() + logprobs[-len(answer) :].sum())
    return torch.stack(rewards)


@torch.no_grad()
def level(family):
    "A model that finds every token of its vocabulary equally likely."
    model, _ = fresh(family)
    model.get_output_embeddings().weight.zero_()
    return model, math.log(model.config.get_text_config().vocab_size)


# ---- what it is


@pytest.mark.parametrize("empty", ["off", "turn"])
@pytest.mark.parametrize("family", SPECIMENS)
def test_exact_rewards_are_one_forward_per_prefix(family, empty):
    model, turns, inputs, texts, answer = asked(family)
    rewards = token_rewards(model, turns, inputs, texts, answer, empty=empty)
    assert [len(own) for own in rewards] == [7, 1, 4]
    for z, own in zip(texts, rewards, strict=True):
        plain = one_forward_per_prefix(model, turns, inputs, z, answer, empty)
        assert own.dtype == torch.float32 and not own.requires_grad
        torch.testing.assert_close(own, plain, atol=1e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    answer=st.integers(1, 4),
    chunk=st.integers(1, 12),
    at_once=st.none() | st.integers(1, 5),
    seed=st.integers(0, 99),
    layout=st.sampled_from(["turn", "section"]),
)
def test_any_lengths_and_chunks(lengths, answer, chunk, at_once, seed, layout):
    model, turns, inputs, texts, _ = asked("qwen2_5_vl", lengths, layout, seed)
    gold = make_texts([[answer]], seed + 1)[0][0].tolist()
    for z, own in zip(
        texts, token_rewards(model, turns, inputs, texts, gold, chunk=chunk, rows_at_once=at_once), strict=True
    ):
        torch.testing.assert_close(own, one_forward_per_prefix(model, turns, inputs, z, gold), atol=1e-4, rtol=0)


def test_the_parts_add_up():
    model, turns, inputs, texts, answer = asked("llava")
    parts = reward_parts(model, turns, inputs, texts, answer)
    for own, total, z in zip(parts, token_rewards(model, turns, inputs, texts, answer), texts, strict=True):
        torch.testing.assert_close((own.prior + own.stop + own.answer).float(), total)
        ids = [*turns.opening, *z, turns.stop, *turns.bridge, *answer]
        with torch.no_grad():
            logprobs = logprobs_alone(model, inputs, ids).double()[len(turns.opening) :]
        torch.testing.assert_close(own.prior[-1], logprobs[: len(z)].sum(), atol=1e-4, rtol=0)
        assert own.prior[0] == 0 and own.stop[0] == 0  # state 0: reasoning off
        if z:
            torch.testing.assert_close(own.stop[-1], logprobs[len(z)], atol=1e-4, rtol=0)
            torch.testing.assert_close(own.answer[-1], logprobs[-len(answer) :].sum(), atol=1e-4, rtol=0)


# ---- faults that such rewards have had


def test_changing_only_the_answer_changes_the_reward_at_every_state():
    "A reward that is conditioned on the rationale twice never sees Y."
    model, turns, inputs, texts, answer = asked("qwen2_5_vl")
    other = [answer[0] + 1, *answer[1:]]
    for empty in ("off", "turn"):
        one = token_rewards(model, turns, inputs, texts, answer, empty=empty)
        two = token_rewards(model, turns, inputs, texts, other, empty=empty)
        assert all(((a - b).abs() > 1e-4).all() for a, b in zip(one, two, strict=True))


def test_the_rationale_is_read_once():
    "Its tokens are there a single time in what is read: the prior is their own, not that of a repetition."
    model, turns, inputs, (z, *_), answer = asked("llava")
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    token_rewards(model, turns, inputs, [z], answer, chunk=100)
    hook.remove()
    ends = len(z) * (len(turns.bridge) + len(answer)) + len(turns.skip) + len(answer) - 1
    assert seen == [inputs["input_ids"].shape[1], len(turns.opening) + len(z), ends]


def test_changing_the_reference_rationale_changes_no_other_reward():
    model, turns, inputs, texts, answer = asked("smolvlm")
    reference, longer = ([z.tolist() for z in some] for some in make_texts([(5,), (11,)], 3))
    one = token_rewards(model, turns, inputs, [*texts, *reference], answer)
    two = token_rewards(model, turns, inputs, [*texts, *longer], answer)
    for a, b in zip(one[:-1], two[:-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert (one[-1][1:6] - two[-1][1:6]).abs().min() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "smolvlm"])
def test_a_reward_does_not_depend_on_its_batch(family):
    "Not on the rationales beside it, not on padding, not on what is read at a time."
    model, turns, inputs, texts, answer = asked(family)
    _, processor = small(family)
    both = encode_questions(processor, [*make_rows(ROWS), *make_rows([(1, 30)])])
    padded = take_prompts(model, both, torch.tensor([0]), images_per_prompt=[1, 1])
    assert padded["input_ids"].shape[1] > inputs["input_ids"].shape[1]
    alone = [token_rewards(model, turns, inputs, [z], answer)[0] for z in texts]
    for how in (
        token_rewards(model, turns, inputs, texts, answer),
        token_rewards(model, turns, inputs, texts[::-1], answer)[::-1],
        token_rewards(model, turns, padded, texts, answer),
        token_rewards(model, turns, inputs, texts, answer, chunk=1),
        token_rewards(model, turns, inputs, texts, answer, chunk=4, rows_at_once=2),
        token_rewards(model, turns, inputs, texts, answer, rows_at_once=1),
    ):
        for a, b in zip(alone, how, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_last_state_counts_the_answer_and_the_tokens_that_close_it():
    model, turns, inputs, (z, *_), answer = asked("llava", layout="section")
    assert len(turns.closing) == 2 and tuple(answer[-2:]) == turns.closing
    whole, open_ended = (token_rewards(model, turns, inputs, [z], y)[0] for y in (answer, answer[:-2]))
    with torch.no_grad():
        ids = [*turns.opening, *z, turns.stop, *turns.bridge, *answer]
        closing = logprobs_alone(model, inputs, ids)[-2:].sum()
    torch.testing.assert_close(whole[-1] - open_ended[-1], closing, atol=1e-4, rtol=0)
    (parts,) = reward_parts(model, turns, inputs, [z], answer)
    assert parts.answer[-1] < -0.1 and parts.at[-1] == len(z)


@pytest.mark.parametrize("interval", [2, 4, 8, 100])
def test_no_state_after_the_last_anchor_keeps_a_reward_of_zero(interval):
    model, turns, inputs, texts, answer = asked("qwen2_5_vl", (11, 6, 1, 0))
    exact = token_rewards(model, turns, inputs, texts, answer)
    lines = token_rewards(model, turns, inputs, texts, answer, interval=interval)
    for a, b in zip(exact, lines, strict=True):
        assert (b < -0.1).all()
        torch.testing.assert_close(b[-1], a[-1], atol=1e-4, rtol=0)  # the last state is an anchor


def test_header_and_bridge_tokens_are_never_scored():
    "Where every token costs the same, a reward counts its tokens: those of Z, T, and Y; whatever the layout writes."
    model, nats = level("qwen2_5_vl")
    for layout in ("turn", "section"):
        _, turns, inputs, texts, answer = asked("qwen2_5_vl", layout=layout)
        assert len(turns.opening) > 1 and len(turns.bridge) > 0 and len(turns.skip) > 1
        for empty in ("off", "turn"):
            for z, own in zip(texts, token_rewards(model, turns, inputs, texts, answer, empty=empty), strict=True):
                counts = scored_tokens(len(z), len(answer), empty)
                torch.testing.assert_close(own, -nats * counts, atol=1e-3, rtol=0)


def test_no_floor_lies_above_real_rewards():
    "A rationale of 60 tokens is at hundreds of nats below zero, and every one of its states is told apart."
    model, _ = level("llava")
    _, turns, inputs, texts, answer = asked("llava", (60,))
    (own,) = token_rewards(model, turns, inputs, texts, answer)
    assert own[-1] < -300 and (own[1:-1] > own[2:]).all()
    model, turns, inputs, texts, answer = asked("llava", (60,))
    (own,) = token_rewards(model, turns, inputs, texts, answer)
    torch.testing.assert_close(own, one_forward_per_prefix(model, turns, inputs, texts[0], answer), atol=1e-3, rtol=0)
    assert own[-1] < -99 and len(own.unique()) == 61


def test_rows_of_different_length_end_where_they_end():
    "No end mask is needed that could fail to fire: each rationale has its own states and no others."
    model, turns, inputs, texts, answer = asked("llava_next", (9, 0, 2, 5))
    together = token_rewards(model, turns, inputs, texts, answer)
    assert [len(own) for own in together] == [10, 1, 3, 6]
    for z, own in zip(texts, together, strict=True):
        assert (own < 0).all()
        torch.testing.assert_close(own, token_rewards(model, turns, inputs, [z], answer)[0], atol=1e-4, rtol=0)


def test_the_first_token_of_a_rationale_counts():
    model, turns, inputs, (z, *_), answer = asked("llava")
    one, two = token_rewards(model, turns, inputs, [z, [z[0] + 1, *z[1:]]], answer)
    assert ((one - two).abs()[1:] > 1e-4).all() and one[0] == pytest.approx(two[0].item(), abs=1e-4)
    with torch.no_grad():
        first = logprobs_alone(model, inputs, [*turns.opening, z[0]])[-1]
    torch.testing.assert_close(
        reward_parts(model, turns, inputs, [z], answer)[0].prior[1].float(), first, atol=1e-4, rtol=0
    )


def test_the_picture_is_read_once():
    model, turns, inputs, texts, answer = asked("qwen2_5_vl")
    seen = []
    hook = vision_tower(model).register_forward_pre_hook(lambda *_: seen.append(1))
    token_rewards(model, turns, inputs, texts, answer, chunk=2, rows_at_once=1)
    hook.remove()
    assert len(seen) == 1


# ---- lines


def test_lines_are_exact_for_a_linear_reward():
    "Where every token costs the same, the reward falls along a straight line."
    model, _ = level("qwen2_5_vl")
    _, turns, inputs, texts, answer = asked("qwen2_5_vl", (13, 4))
    exact = token_rewards(model, turns, inputs, texts, answer, empty="turn")
    for interval in (2, 5, 8, 50):
        lines = token_rewards(model, turns, inputs, texts, answer, empty="turn", interval=interval)
        for a, b in zip(exact, lines, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 40), interval=st.integers(1, 50), start=st.floats(-50, 0), slope=st.floats(-20, 0))
def test_parts_on_a_line_give_the_line(size, interval, start, slope):
    at = anchors(size + 1, interval)
    line = start + slope * torch.arange(size + 1, dtype=torch.float64)
    parts = Parts(at, line[at] / 2, line[at] / 4, line[at] / 4)
    torch.testing.assert_close(join_parts(parts, interval), line.float(), atol=1e-3, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 12), interval=st.integers(2, 14), empty=st.sampled_from(["off", "turn"]))
def test_lines_are_those_between_exact_values(length, interval, empty):
    model, turns, inputs, texts, answer = asked("llava", (length,))
    (exact,) = token_rewards(model, turns, inputs, texts, answer, empty=empty)
    (lines,) = token_rewards(model, turns, inputs, texts, answer, empty=empty, interval=interval)
    torch.testing.assert_close(lines, torch.from_numpy(interpolate(exact, interval)).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("interval", [1, 2, 8, 100])
def test_no_line_starts_at_a_state_that_is_no_end(interval):
    "With a least length of 3 tokens, what `empty` says has no effect on the states where a rationale can end."
    model, turns, inputs, texts, answer = asked("llava", (11, 6, 4, 3))
    exact = token_rewards(model, turns, inputs, texts, answer)
    off, turn = (
        token_rewards(model, turns, inputs, texts, answer, interval=interval, empty=empty, first=3)
        for empty in ("off", "turn")
    )
    for z, whole, one, two in zip(texts, exact, off, turn, strict=True):
        assert torch.equal(one, two) and len(one) == len(z) + 1
        lines = interpolate(whole[3:], interval)
        torch.testing.assert_close(one[3:], torch.from_numpy(lines).float(), atol=1e-4, rtol=0)
        assert one.isfinite().all() and (one[:3] == one[3]).all()  # a loss may mask them, gradients and all
    if interval == 8:  # without a first state, lines between anchors carry R_0 up to the eighth
        off, turn = (token_rewards(model, turns, inputs, texts, answer, interval=8, empty=e) for e in ("off", "turn"))
        assert (off[0][3:8] - turn[0][3:8]).abs().min() > 0.1


def test_states_before_the_first_cost_nothing():
    model, turns, inputs, (z, *_), answer = asked("llava", (11,))
    (parts,) = reward_parts(model, turns, inputs, [z], answer, interval=4, first=2)
    whole = reward_parts(model, turns, inputs, [z], answer)[0]
    assert parts.at.tolist() == [2, 6, 10, 11]
    for one, other in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(one, other[parts.at], atol=1e-4, rtol=0)
    shorter = reward_parts(model, turns, inputs, [z[:2], []], answer, first=5)
    assert [own.at.tolist() for own in shorter] == [[2], [0]]
    two, none = token_rewards(model, turns, inputs, [z[:2], []], answer, first=5)
    torch.testing.assert_close(two, two[-1:].expand(3))
    torch.testing.assert_close(none, token_rewards(model, turns, inputs, [[]], answer)[0], atol=1e-4, rtol=0)


def test_only_anchors_are_looked_at():
    model, turns, inputs, (z, *_), answer = asked("llava", (11,))
    met = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: met.append(args[0].shape[:2].numel()))
    (parts,) = reward_parts(model, turns, inputs, [z], answer, interval=4, chunk=100)
    hook.remove()
    assert parts.at.tolist() == [0, 4, 8, 11]
    scored = len(turns.opening) + len(z) + 3 * (1 + len(answer)) + len(answer)
    assert sum(met) == scored


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    chunk=st.integers(1, 40),
    at_once=st.none() | st.integers(1, 8),
)
def test_a_chunk_counts_answers_and_not_those_of_each_rationale(lengths, chunk, at_once):
    "Seven rationales with 32 answers each at a time are 224, and as much memory."
    model, turns, inputs, texts, answer = asked("llava", lengths)
    seen = []
    original = token_reward.score_tails

    def watched(model, trunk, tails, *, chunk):
        seen.append((sum(min(chunk, len(some)) for some in tails), len(tails)))
        return original(model, trunk, tails, chunk=chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_reward, "score_tails", watched)
        found = token_rewards(model, turns, inputs, texts, answer, chunk=chunk, rows_at_once=at_once)
    assert max(answers for answers, _ in seen) <= chunk
    assert max(rows for _, rows in seen) <= min(at_once or 8, chunk) and sum(rows for _, rows in seen) == len(texts)
    for one, other in zip(found, token_rewards(model, turns, inputs, texts, answer, chunk=1000), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# ---- models


def test_adapters_on_and_off():
    model, turns, inputs, texts, answer = asked("qwen2_5_vl")
    adapted = get_peft_model(
        fresh("qwen2_5_vl")[0], LoraConfig(r=4, target_modules=lora_targets(model), init_lora_weights=False)
    )
    on = token_rewards(adapted, turns, inputs, texts, answer)
    for z, own in zip(texts, on, strict=True):
        plain = one_forward_per_prefix(adapted, turns, inputs, z, answer)
        torch.testing.assert_close(own, plain, atol=1e-4, rtol=0)
    with adapted.disable_adapter():
        off = token_rewards(adapted, turns, inputs, texts, answer)
    for a, b, c in zip(token_rewards(model, turns, inputs, texts, answer), off, on, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        assert (a - c).abs().max() > 1e-3


def test_a_model_in_training_scores_without_dropout_and_goes_on_training():
    model, turns, inputs, texts, answer = asked("llava")
    plain = token_rewards(model, turns, inputs, texts, answer)
    model = fresh("llava")[0]
    model.gradient_checkpointing_enable()
    model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    for a, b in zip(plain, token_rewards(model, turns, inputs, texts, answer), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_gives_single_precision():
    model = fresh("smolvlm")[0]
    _, turns, inputs, texts, answer = asked("smolvlm")
    exact = token_rewards(model, turns, inputs, texts, answer)
    model.to(torch.bfloat16)
    half = token_rewards(model, turns, inputs, texts, answer)
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == torch.float32 and ((a - b).abs() < 0.05 * a.abs()).all()


@pytest.mark.parametrize("empty", ["off", "turn"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_model_that_cannot_be_packed_reads_one_prefix_per_forward(family, empty, monkeypatch):
    model, turns, inputs, texts, answer = asked(family)
    packed = token_rewards(model, turns, inputs, texts, answer, empty=empty)
    monkeypatch.setattr(token_reward, "packing_problem", lambda _: "its attention takes no mask")
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    plain = token_rewards(model, turns, inputs, texts, answer, empty=empty)
    lines = token_rewards(model, turns, inputs, texts, answer, empty=empty, interval=4)
    hook.remove()
    states = sum(len(z) + 1 for z in texts)
    assert len(seen) == 3 + states + 3 + sum(len(anchors(len(z) + 1, 4)) for z in texts)
    for a, b, c, z in zip(packed, plain, lines, texts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        at = anchors(len(z) + 1, 4)
        torch.testing.assert_close(c[at], a[at], atol=1e-4, rtol=0)


def test_a_window_is_a_model_that_cannot_be_packed():
    whole, turns, inputs, texts, answer = asked("llava")
    model = fresh("llava")[0]
    model.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    model.config.text_config.sliding_window, model.model.language_model.has_sliding_layers = 4096, True
    for a, b in zip(
        token_rewards(model, turns, inputs, texts, answer),
        token_rewards(whole, turns, inputs, texts, answer),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# ---- small things


def test_tails_of_states():
    _, turns, _, _, answer = asked("llava")
    tail = state_tail(turns, answer, 50, 7)
    assert tail.keep == 50 + len(turns.opening) + 7
    assert [tail.tokens[number] for number in tail.scored] == [turns.stop, *answer]
    off, turn = (state_tail(turns, answer, 50, 0, empty) for empty in ("off", "turn"))
    assert off.keep == 50 and [off.tokens[number] for number in off.scored] == answer
    assert turn.keep == 50 + len(turns.opening) and turn.tokens == tail.tokens


def test_tokens_as_tensors():
    model, turns, inputs, texts, answer = asked("llava")
    plain = token_rewards(model, turns, inputs, texts, answer)
    tensors = token_rewards(
        model, turns, inputs, [torch.tensor(z, dtype=torch.long) for z in texts], torch.tensor(answer)
    )
    assert all(a.equal(b) for a, b in zip(plain, tensors, strict=True))


def test_nan_in_nan_out():
    model, turns, inputs, texts, answer = asked("llava")
    model = fresh("llava")[0]
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert all(own.isnan().all() for own in token_rewards(model, turns, inputs, texts, answer))
    with pytest.raises(ValueError, match="not finite at an anchor"):
        token_rewards(model, turns, inputs, texts, answer, interval=4)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 30), answer=st.integers(1, 9))
def test_counts_of_tokens(size, answer):
    assert scored_tokens(size, answer, "turn").tolist() == [t + 1 + answer for t in range(size + 1)]
    assert scored_tokens(size, answer).tolist() == [answer, *(t + 1 + answer for t in range(1, size + 1))]


@settings(max_examples=100, deadline=None)
@given(step=st.integers(-3, 200), start=st.floats(-5, 5), end=st.floats(-5, 5), over=st.integers(0, 100))
def test_annealing_is_a_line_and_then_level(step, start, end, over):
    value = anneal(step, start, end, over)
    assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
    expected = np.interp(step, [0, over], [start, end]) if over else end
    assert value == pytest.approx(expected, abs=1e-9)


def test_what_is_refused():
    model, turns, inputs, texts, answer = asked("llava")
    _, processor = small("llava")
    call = (token_rewards, model, turns)
    refusal("the answer has no tokens", *call, inputs, texts, [])
    refusal("got 2 questions: want one", *call, encode_questions(processor, make_rows([(1, 1)] * 2)), texts, answer)
    refusal("unknown kind of empty rationale 'of'", *call, inputs, texts, answer, empty="of")
    refusal("want chunk and rows_at_once of at least 1, got 0", *call, inputs, texts, answer, chunk=0)
    refusal(
        "want chunk and rows_at_once of at least 1, got 8 and 0", *call, inputs, texts, answer, chunk=8, rows_at_once=0
    )
    refusal("first -1 is no state", *call, inputs, texts, answer, first=-1)
    refusal("interval 0 is no distance", *call, inputs, texts, answer, interval=0)
    placeholder = image_token_ids(model)[0]
    refusal(f"holds the placeholder {placeholder}", *call, inputs, [[20, placeholder]], answer)
    refusal(f"holds the placeholder {placeholder}", *call, inputs, texts, [placeholder])
    size = model.get_input_embeddings().num_embeddings
    wrapped = get_peft_model(fresh("llava")[0], LoraConfig(r=2, target_modules=lora_targets(model)))
    for policy in (model, wrapped):
        call = (token_rewards, policy, turns)
        refusal(
            f"rationale 1 holds {size} at token 2, and the policy has {size}",
            *call,
            inputs,
            [[9], [9, 9, size]],
            answer,
        )
        refusal("rationale 0 holds -1 at token 0", *call, inputs, [[-1], [9]], answer)
        refusal(f"the answer holds {size + 7} at token 1", *call, inputs, texts, [9, size + 7])
    call = (token_rewards, model, turns)
    most = model.config.text_config.max_position_embeddings
    refusal(f"the model reads {most}", *call, inputs, [[20] * most], answer, interval=most)
    assert token_rewards(model, turns, inputs, [], answer) == []

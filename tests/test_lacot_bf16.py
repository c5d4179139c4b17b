"In bfloat16, and in autocast, the engine of latent rationales draws, answers and scores nearly as in float32."

import pytest
import torch

from vlm_reward.lacot.decoding import pair_scores, think
from vlm_reward.lacot.drawing import draw_rationales, write_answers
from vlm_reward.lacot.pair import add_lora, answering, frozen_copy
from vlm_reward.lacot.subtb import sampler_scores
from vlm_reward.lacot.token_reward import token_rewards
from vlm_reward.lacot.turns import answer_ids, encode_questions, rationale_ids, turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.worlds.scenes import scene_rows

LAYOUTS = pytest.mark.parametrize("layout", ["turn", "section"])
ROWS = scene_rows("relation", 4, seed=2)
NEAR = {"rtol": 0.02, "atol": 0.2}  # nats: bfloat16 has 8 bits, and a rationale 15 tokens


@pytest.fixture(scope="module")
def processor():
    return load_policy("pocket")[1]


@pytest.fixture(scope="module")
def full():
    return load_policy("pocket")[0]


@pytest.fixture
def half():
    return load_policy("pocket")[0].to(torch.bfloat16)


def drawn(model, processor, turns, **options):
    return think(model, processor, turns, ROWS, frozen=model, max_tokens=24, **options)


def test_it_is_another_dtype(full, half):
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_greedy_draws_are_those_of_float32(full, half, processor):
    turns, greedy = turns_of(processor, "section"), {"temperature": 0, "answer_temperature": 0}
    wanted = drawn(full, processor, turns, **greedy)
    with torch.autocast("cpu", torch.bfloat16):
        assert drawn(full, processor, turns, **greedy) == wanted
    assert drawn(half, processor, turns, **greedy) == wanted


@LAYOUTS
def test_sampled_draws_run_and_repeat(half, processor, layout):
    turns = turns_of(processor, layout)
    first = drawn(half, processor, turns, n=3, seed=1)
    assert drawn(half, processor, turns, n=3, seed=1) == first
    off = write_answers(half, processor, turns, ROWS, [None] * len(ROWS), max_tokens=4, seed=1)
    assert all(len(answer.token_ids) <= 4 + len(turns.closing) for answer in off)


@LAYOUTS
def test_token_rewards_are_near(full, half, processor, layout):
    turns = turns_of(processor, layout)
    for row in ROWS:
        inputs, gold = encode_questions(processor, [row]), answer_ids(turns, processor, row["solution"])
        texts = [rationale_ids(processor, row["rationale"]), [], rationale_ids(processor, "it looks like it")]
        wanted = token_rewards(full, turns, inputs, texts, gold)
        with torch.autocast("cpu", torch.bfloat16):
            cast = token_rewards(full, turns, inputs, texts, gold)
        for found in (token_rewards(half, turns, inputs, texts, gold), cast):
            for own, expected in zip(found, wanted, strict=True):
                assert own.dtype == torch.float32
                torch.testing.assert_close(own, expected, **NEAR)


@LAYOUTS
def test_scores_of_pairs_and_of_the_sampler_are_near(full, half, processor, layout):
    turns, row = turns_of(processor, layout), ROWS[0]
    inputs, texts = encode_questions(processor, [row]), [rationale_ids(processor, row["rationale"]), []]
    answers = [answer_ids(turns, processor, word) for word in ("above", "below")]
    for found, wanted in zip(*(pair_scores(m, turns, inputs, texts, answers) for m in (half, full)), strict=True):
        torch.testing.assert_close(found, wanted, **NEAR)
    for some, others in zip(*(sampler_scores(m, turns, inputs, texts) for m in (half, full)), strict=True):
        for found, wanted in zip(some, others, strict=True):
            torch.testing.assert_close(found.float(), wanted.float(), **NEAR)


def test_a_pair_of_adapters_and_a_frozen_copy(half, processor):
    turns, greedy = turns_of(processor, "section"), {"temperature": 0, "max_tokens": 6}
    before = write_answers(half, processor, turns, ROWS, [[40], [], None, [50]], **greedy)
    copied = frozen_copy(half)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    adapted = add_lora(half, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert draw_rationales(adapted, processor, turns, ROWS, **greedy) != draw_rationales(
        copied, processor, turns, ROWS, **greedy
    )
    for frozen in (None, copied):
        with answering(adapted, frozen) as pi:
            assert write_answers(pi, processor, turns, ROWS, [[40], [], None, [50]], **greedy) == before
    logprobs, stops = sampler_scores(adapted, turns, encode_questions(processor, ROWS[:1]), [[40, 50]])
    (logprobs[0].sum() + stops[0].sum()).backward()
    slopes = [p.grad for name, p in adapted.named_parameters() if "lora" in name]
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)

"Rationales and answers are drawn as `generate` would draw them behind the joined ids, and end in one way."

import math
from contextlib import contextmanager

import pytest
import torch
from test_policy_families import Wrapped
from test_policy_packing import SPECIMENS, fresh, make_rows, refusal, small
from transformers import GenerationConfig

from vlm_reward.lacot import drawing as module
from vlm_reward.lacot.drawing import Answer, draw_rationales, write_answers
from vlm_reward.lacot.pair import add_lora, answering
from vlm_reward.lacot.turns import answer_ids, before_answer, encode_questions, follow, turns_of
from vlm_reward.policy import sampling
from vlm_reward.policy.families import image_token_ids, load_policy, vision_tower
from vlm_reward.policy.sampling import seeded
from vlm_reward.worlds.scenes import scene_rows

EACH = pytest.mark.parametrize("family", SPECIMENS)
LAYOUTS = pytest.mark.parametrize("layout", ["turn", "section"])
ROWS = make_rows([(1, 2), (2, 7), (0, 1)])


@pytest.fixture(scope="module")
def pocket():
    model, processor = load_policy("pocket")
    return model, processor, turns_of(processor, "section"), scene_rows("relation", 3, seed=2)


@contextmanager
def pushed(model, points):
    "Logits with `points` added, by token."

    def push(head, inputs, logits):
        logits = logits.clone()
        for token, value in points.items():
            logits[..., token] += value
        return logits

    hook = model.get_output_embeddings().register_forward_hook(push)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def without_chance():
    "Draws that take the token in the middle of the distribution, in each row for itself."
    before = torch.multinomial

    def middle(chances, num_samples, **_):
        return (chances.cumsum(-1) < 0.5).sum(-1, keepdim=True).clamp(max=chances.shape[-1] - 1)

    torch.multinomial = middle
    try:
        yield
    finally:
        torch.multinomial = before


def plain_ids(model, processor, row, pieces, stop, most):
    "What `generate` writes behind ids that are joined by hand, one row alone, greedily, without what is forbidden."
    inputs = encode_questions(processor, [row])
    tail = torch.tensor([pieces])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail)], 1)
    forbidden = {*image_token_ids(model), processor.tokenizer.eos_token_id} - {stop}
    options = {"do_sample": False, "max_new_tokens": most + 1, "eos_token_id": stop, "pad_token_id": 0}
    config = GenerationConfig(**options, suppress_tokens=sorted(forbidden))
    with torch.no_grad():
        return model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :].tolist()


@EACH
@LAYOUTS
def test_greedy_answers_are_those_of_generate(family, layout):
    model, processor = small(family)
    turns = turns_of(processor, layout)
    rows = [ROWS[0], ROWS[1], ROWS[2], ROWS[1], ROWS[0]]
    thoughts = [[40, 50, 60], [], None, [70] * 9, None]
    for points in ({}, {turns.closing[0]: 6.0}):
        with pushed(model, points):
            written = write_answers(model, processor, turns, rows, thoughts, temperature=0, max_tokens=6, batch_size=3)
            for row, ids, answer in zip(rows, thoughts, written, strict=True):
                stop = turns.closing[0]
                plain = plain_ids(model, processor, row, before_answer(turns, ids), stop, 6)
                finished = stop in plain
                plain = plain[: plain.index(stop)] if finished else plain[:6]
                assert answer.finished == finished
                assert answer.token_ids == plain + [*turns.closing] * finished
                assert answer.text == processor.tokenizer.decode(plain, skip_special_tokens=True)


@EACH
@LAYOUTS
def test_greedy_rationales_are_those_of_generate(family, layout):
    model, processor = small(family)
    turns = turns_of(processor, layout)
    drawn = draw_rationales(model, processor, turns, ROWS, n=2, temperature=0, max_tokens=7)
    for row, some in zip(ROWS, drawn, strict=True):
        plain = plain_ids(model, processor, row, turns.opening, turns.stop, 7)
        finished = turns.stop in plain
        plain = plain[: plain.index(turns.stop)] if finished else plain[:7]
        assert [(r.token_ids, r.finished) for r in some] == [(plain, finished)] * 2


def test_the_pocket_answers_as_it_would_have_gone_on(pocket):
    "In its own layout a trained policy needs nothing forbidden: rationale and answer are one completion, cut."
    model, processor, turns, rows = pocket
    whole = sampling.sample(model, processor, rows, temperature=0, max_new_tokens=60)
    drawn = draw_rationales(model, processor, turns, rows, temperature=0)
    ids = [some[0].token_ids for some in drawn]
    written = write_answers(model, processor, turns, rows, ids, temperature=0)
    tags = processor.tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>"])
    for (sample,), (thought,), answer in zip(whole, drawn, written, strict=True):
        assert thought.finished and answer.finished
        pieces = [tags[0], *thought.token_ids, tags[1], tags[2], *answer.token_ids]
        assert sample.token_ids == pieces
        assert answer.token_ids == answer_ids(turns, processor, answer.text)


@LAYOUTS
def test_batch_mates_change_nothing_but_the_noise(layout):
    "A cheat of randomness: with the noise taken away, a row draws the same alone and among others."
    model, processor = small("qwen2_5_vl")
    turns = turns_of(processor, layout)
    with without_chance():
        together = draw_rationales(model, processor, turns, ROWS, n=2, max_tokens=8, temperature=0.9)
        alone = [draw_rationales(model, processor, turns, [row], max_tokens=8, temperature=0.9) for row in ROWS]
        thoughts = [some[0][0].token_ids for some in alone]
        options = {"temperature": 0.9, "max_tokens": 5}
        written = write_answers(model, processor, turns, ROWS, thoughts, **options)
        one_by_one = [
            write_answers(model, processor, turns, [row], [ids], **options)[0]
            for row, ids in zip(ROWS, thoughts, strict=True)
        ]
    assert together == [some[0] * 2 for some in alone]
    assert written == one_by_one


def test_seeds(pocket):
    model, processor, turns, rows = pocket
    options = {"n": 4, "batch_size": 5, "max_tokens": 20, "temperature": 1.5}
    state = torch.get_rng_state()
    first = draw_rationales(model, processor, turns, rows, seed=3, **options)
    assert torch.get_rng_state().equal(state)
    assert draw_rationales(model, processor, turns, rows, seed=3, **options) == first
    assert draw_rationales(model, processor, turns, rows, seed=4, **options) != first
    assert len({tuple(r.token_ids) for r in first[0]}) > 1
    with seeded(3):  # no seed: the state as it is
        assert draw_rationales(model, processor, turns, rows, **options) == first
        assert draw_rationales(model, processor, turns, rows, **options) != first
    written = [
        write_answers(model, processor, turns, rows, [None] * 3, seed=s, temperature=2.0, batch_size=2)
        for s in (0, 0, 1)
    ]
    assert written[0] == written[1] != written[2]


@LAYOUTS
@EACH
def test_neither_placeholders_nor_other_ends_are_drawn(family, layout):
    "Tokens that the model would prefer above all: one stands for a picture, the others end a turn."
    model, processor = small(family)
    turns = turns_of(processor, layout)
    banned = {*image_token_ids(model), processor.tokenizer.eos_token_id} - {turns.stop}
    with pushed(model, dict.fromkeys(banned, 100.0)):
        drawn = draw_rationales(model, processor, turns, ROWS, n=3, max_tokens=6, seed=0)
        assert not banned & {token for some in drawn for r in some for token in r.token_ids}
        written = write_answers(model, processor, turns, ROWS, [None, [40], []], max_tokens=6, seed=0)
        placeholders = {*image_token_ids(model)}
        assert not placeholders & {token for answer in written for token in answer.token_ids}


@LAYOUTS
@pytest.mark.parametrize("least", [0, 1, 4])
def test_the_end_has_no_chance_before_the_minimum(layout, least):
    "Also: tokens of the header are not counted as tokens of the rationale."
    model, processor = small("llava")
    turns = turns_of(processor, layout)
    with pushed(model, {turns.stop: 100.0}):
        drawn = draw_rationales(model, processor, turns, ROWS, n=2, min_tokens=least, max_tokens=4, seed=0)
    for r in [r for some in drawn for r in some]:
        assert len(r.token_ids) == least and r.finished and turns.stop not in r.token_ids
        assert r.text == processor.tokenizer.decode(r.token_ids, skip_special_tokens=True)


def test_cut_off_at_the_maximum():
    model, processor = small("llava")
    turns = turns_of(processor)
    with pushed(model, {turns.stop: -100.0}):
        drawn = draw_rationales(model, processor, turns, ROWS, n=2, max_tokens=4, seed=0)
        written = write_answers(model, processor, turns, ROWS, [None] * 3, max_tokens=3, seed=0)
    assert all(len(r.token_ids) == 4 and not r.finished for some in drawn for r in some)
    assert all(len(answer.token_ids) == 3 and not answer.finished for answer in written)


@LAYOUTS
def test_an_answer_that_ends_at_once(layout):
    model, processor = small("llava")
    turns = turns_of(processor, layout)
    with pushed(model, {turns.closing[0]: 100.0}):
        written = write_answers(model, processor, turns, ROWS, [None, [], [50]], max_tokens=3)
    assert written == [Answer("", [*turns.closing], True)] * 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_model(temperature):
    "The mean log-probability of what is drawn is minus the entropy, if what is drawn has the probability it says."
    model, processor = small("smolvlm")
    turns = turns_of(processor)
    inputs = follow(model, encode_questions(processor, ROWS[:1]), [turns.opening])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].double()
    logits[image_token_ids(model)] = -math.inf
    logprobs = (logits / temperature).log_softmax(-1)
    drawn = draw_rationales(
        model, processor, turns, ROWS[:1], n=3000, max_tokens=1, temperature=temperature, seed=0, batch_size=3000
    )
    first = [(r.token_ids or [turns.stop])[0] for r in drawn[0]]
    known = logprobs[logprobs > -math.inf]
    mean, square = (known.exp() * known).sum(), (known.exp() * known**2).sum()
    error = ((square - mean**2) / len(first)).sqrt()
    assert abs(logprobs[first].mean() - mean) < 4 * error


def test_pictures_are_read_once_for_all_rationales_of_a_question():
    model, processor = small("llava")
    seen = []

    def count(tower, args, options):
        seen.append(len(options.get("pixel_values", args[0] if args else None)))

    hook = vision_tower(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        draw_rationales(model, processor, turns_of(processor), ROWS, n=5, max_tokens=4)
    finally:
        hook.remove()
    assert sum(seen) == 3  # pictures in three rows


@contextmanager
def watched(model):
    "What passes a model inside: shapes of the ids of each forward, and pictures."
    shapes, pictures = [], []

    def count(tower, args, options):
        pictures.append(len(options.get("pixel_values", args[0] if args else None)))

    hooks = [
        vision_tower(model).register_forward_pre_hook(count, with_kwargs=True),
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape))),
    ]
    try:
        yield shapes, pictures
    finally:
        for hook in hooks:
            hook.remove()


THOUGHTS = [[40, 50, 60], [], None, [70] * 9, None, [80, 90]]
ASKED = [ROWS[1], ROWS[0], ROWS[1], ROWS[2], ROWS[1], ROWS[0]]


@EACH
@LAYOUTS
def test_released_fault_decoding_without_a_kv_cache(family, layout):
    "Questions are read once, then all rationales, and then every forward reads one token per row."
    model, processor = small(family)
    turns = turns_of(processor, layout)
    with pushed(model, {turns.closing[0]: -100.0}), watched(model) as (shapes, pictures):
        write_answers(model, processor, turns, ASKED, THOUGHTS, max_tokens=5, seed=0)
    longest = max(len(before_answer(turns, ids)) for ids in THOUGHTS)
    assert [rows for rows, _ in shapes] == [3] + [6] * 6
    assert [tokens for _, tokens in shapes[1:]] == [longest] + [1] * 5
    if family == "llava":  # other towers are given patches, or tiles
        assert sum(pictures) == sum(len(row["images"]) for row in ROWS)
    with pushed(model, {turns.stop: -100.0}), watched(model) as (shapes, _):
        draw_rationales(model, processor, turns, ROWS, n=2, max_tokens=5, seed=0)
    assert [rows for rows, _ in shapes] == [3] + [6] * 5
    assert [tokens for _, tokens in shapes[1:]] == [1] * 5


@EACH
@LAYOUTS
def test_a_model_that_cannot_be_packed_writes_the_same(family, layout, monkeypatch):
    model, processor = small(family)
    turns = turns_of(processor, layout)
    options = {"temperature": 0, "max_tokens": 5, "batch_size": 4}
    packed = write_answers(model, processor, turns, ASKED, THOUGHTS, **options)
    prepared = []
    encode = lambda p, some: prepared.append(len(some)) or encode_questions(p, some)  # noqa: E731
    monkeypatch.setattr(module, "encode_questions", encode)
    monkeypatch.setattr(module, "packing_problem", lambda _: "it has a state")
    with watched(model) as (shapes, _):
        assert write_answers(model, processor, turns, ASKED, THOUGHTS, **options) == packed
    assert prepared == [3, 2] and shapes[0][0] == 4  # a row of its own for each


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answers_follow_the_model(temperature):
    "How often each token comes first behind a rationale, beside one that is longer, is its probability."
    model, processor = small("qwen2_5_vl")
    turns = turns_of(processor)
    behind = [before_answer(turns, ids) for ids in ([40, 50], [60] * 7)]
    inputs = follow(model, encode_questions(processor, [ROWS[1], ROWS[0]]), behind)
    points = {token: 8.0 for token in (70, 80, 90, turns.closing[0])}
    with pushed(model, points), torch.no_grad():
        logits = model(**inputs).logits[:, -1].double()
        logits[:, image_token_ids(model)] = -math.inf
        chances = (logits / temperature).softmax(-1)
        rows, thoughts = [ROWS[1], ROWS[0]] * 1500, [[40, 50], [60] * 7] * 1500
        options = {"max_tokens": 1, "temperature": temperature, "seed": 0, "batch_size": 3000}
        written = write_answers(model, processor, turns, rows, thoughts, **options)
    for which, expected in enumerate(chances):
        first = [answer.token_ids[0] for answer in written[which::2]]
        counts = torch.bincount(torch.tensor(first), minlength=len(expected))
        error = (expected * (1 - expected) / len(first)).sqrt()
        assert ((counts / len(first) - expected).abs() < 5 * error + 2 / len(first)).all()
    assert chances.amax() < 0.9  # there is something to draw


def test_scores_that_are_nan_are_refused():
    model, processor = small("llava")
    with pushed(model, {40: math.nan}):
        refusal("look for NaN", write_answers, model, processor, turns_of(processor), ROWS, [None] * 3)


def test_a_model_that_cannot_share_its_reading(monkeypatch):
    model, processor = small("llava")
    turns = turns_of(processor)
    options = {"n": 2, "temperature": 0, "max_tokens": 5, "batch_size": 4}
    shared = draw_rationales(model, processor, turns, ROWS, **options)
    for place in (module, sampling):
        monkeypatch.setattr(place, "prefill_problem", lambda *_, **__: "it has state-space layers")
    assert draw_rationales(model, processor, turns, ROWS, **options) == shared


def test_a_model_in_training_draws_without_dropout_and_goes_on_training():
    model, processor = fresh("llava")
    turns = turns_of(processor)
    plain = draw_rationales(model, processor, turns, ROWS, temperature=0, max_tokens=5)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.gradient_checkpointing_enable()
    model.train()
    assert draw_rationales(model, processor, turns, ROWS, temperature=0, max_tokens=5) == plain
    assert model.training


def test_sampler_and_answerer_are_two():
    "With its adapters on the model draws one thing, with its adapters off what it wrote before it had any."
    model, processor = fresh("qwen2_5_vl")
    turns = turns_of(processor)
    greedy = {"temperature": 0, "max_tokens": 6}
    before = write_answers(model, processor, turns, ROWS, [[40], [], None], **greedy)
    adapted = add_lora(model, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with answering(adapted) as pi:
        assert write_answers(pi, processor, turns, ROWS, [[40], [], None], **greedy) == before
    assert write_answers(adapted, processor, turns, ROWS, [[40], [], None], **greedy) != before
    assert draw_rationales(adapted, processor, turns, ROWS, **greedy)


def test_wrapped_models_draw_as_they_do_inside():
    model, processor = fresh("llava")
    turns, greedy = turns_of(processor), {"temperature": 0, "max_tokens": 6}
    adapted = add_lora(model, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    for draw, more in ((draw_rationales, ()), (write_answers, ([[40], [], None],))):
        wrapped = draw(Wrapped(adapted), processor, turns, ROWS, *more, **greedy)
        assert wrapped == draw(adapted, processor, turns, ROWS, *more, **greedy)
        with answering(adapted) as pi:
            assert wrapped != draw(pi, processor, turns, ROWS, *more, **greedy)


def test_the_models_own_penalties_are_not_taken_over():
    model, processor = fresh("llava")
    turns = turns_of(processor)
    plain = draw_rationales(model, processor, turns, ROWS, temperature=0, max_tokens=8)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert draw_rationales(model, processor, turns, ROWS, temperature=0, max_tokens=8) == plain


def test_what_is_refused():
    model, processor = small("llava")
    turns = turns_of(processor)
    for bounds in ({"min_tokens": 5, "max_tokens": 4}, {"min_tokens": -1}, {"max_tokens": 0}, {"temperature": -1.0}):
        refusal("want 0 <= min_tokens <= max_tokens", draw_rationales, model, processor, turns, ROWS, **bounds)
    refusal("got 5, 4 and", draw_rationales, model, processor, turns, ROWS, min_tokens=5, max_tokens=4)
    refusal("and nan", draw_rationales, model, processor, turns, ROWS, temperature=math.nan)
    refusal("want n and batch_size of at least 1, got 0 and 64", draw_rationales, model, processor, turns, ROWS, n=0)
    refusal("3 rows, 1 rationales", write_answers, model, processor, turns, ROWS, [None])
    refusal("batch_size of at least 1", write_answers, model, processor, turns, ROWS, [None] * 3, batch_size=0)
    refusal("row '0': a prompt of", draw_rationales, model, processor, turns, ROWS, max_tokens=8192)
    refusal("row '1': a prompt of", write_answers, model, processor, turns, ROWS, [None, [40] * 8192, None])
    placeholder = image_token_ids(model)[0]
    refusal("holds the placeholder", write_answers, model, processor, turns, ROWS, [None, [placeholder], None])
    assert draw_rationales(model, processor, turns, []) == [] == write_answers(model, processor, turns, [], [])

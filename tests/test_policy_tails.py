"Tails score what branches do, where they are asked, and leave the trunk as it was."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_policy_packing import SPECIMENS, fresh, make_rows, make_texts, refusal, small

from vlm_reward.policy.branches import Branch
from vlm_reward.policy.families import image_token_ids
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.policy.tails import Tail, first_columns, score_tails
from vlm_reward.policy.tree import extend_trunk, read_trunk, trunk_logprobs

SIZES = ((1, 2), (2, 5), (0, 1))


def batch(family, sizes=SIZES):
    "A trunk of a few prompts, and tails that hang off them."
    model, processor = small(family)
    trunk = read_trunk(model, encode_prompts(processor, make_rows(sizes)))
    texts = make_texts([(5, 2, 1)] * len(sizes))
    tails = [
        [
            Tail(a.tolist(), (0, 2, 4), len(reach)),
            Tail(b.tolist(), [1], len(reach) - 2),
            Tail(a.tolist(), range(5), 1),
            Tail(c.tolist(), [0], len(reach) - 1),
            Tail(a.tolist(), (3, 0), len(reach) - 1),
        ]
        for (a, b, c), reach in zip(texts, trunk.reaches, strict=True)
    ]
    return model, trunk, tails


def as_branches(model, trunk, tails):
    "The same scores from branches, which score everything."
    branches = [[Branch(torch.tensor(tail.tokens), keep=tail.keep) for tail in some] for some in tails]
    scores = trunk_logprobs(model, trunk, branches)
    return torch.cat(
        [
            score.logprobs[list(tail.scored)]
            for a, b in zip(scores, tails, strict=True)
            for score, tail in zip(a, b, strict=True)
        ]
    )


def flat(scores):
    "All scores in one tensor."
    return torch.cat([score for some in scores for score in some])


@pytest.mark.parametrize("family", SPECIMENS)
@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_tails_are_branches(family, chunk):
    model, trunk, tails = batch(family)
    before = [layer.keys.clone() for layer in trunk.cache.layers]
    scores = score_tails(model, trunk, tails, chunk=chunk)
    assert all(layer.keys.equal(keys) for layer, keys in zip(trunk.cache.layers, before, strict=True))
    torch.testing.assert_close(flat(scores), as_branches(model, trunk, tails), atol=1e-5, rtol=0)
    assert not flat(scores).requires_grad


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    chunk=st.integers(1, 7),
    data=st.data(),
)
def test_any_tails_off_texts_of_different_length(lengths, sizes, chunk, data):
    model, processor = small("qwen2_5_vl")
    trunk = read_trunk(model, encode_prompts(processor, make_rows([(1, 2)])))
    trunk, _ = extend_trunk(model, trunk, make_texts([lengths])[0])
    tails = []
    for reach in trunk.reaches:
        some = make_texts([data.draw(st.lists(st.sampled_from(sizes), max_size=5))])[0]
        keeps = [data.draw(st.integers(1, len(reach))) for _ in some]
        asked = [data.draw(st.lists(st.integers(0, len(text) - 1), max_size=4)) for text in some]
        tails.append([Tail(*line) for line in zip([text.tolist() for text in some], asked, keeps, strict=True)])
    if not any(tail.scored for some in tails for tail in some):
        return
    scores = flat(score_tails(model, trunk, tails, chunk=chunk))
    torch.testing.assert_close(scores, as_branches(model, trunk, tails), atol=1e-5, rtol=0)


def test_no_tail_no_forward():
    model, trunk, _ = batch("llava")
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    assert score_tails(model, trunk, [[], [], []]) == [[], [], []] and not seen
    hook.remove()


def test_long_prefixes_come_first_and_the_last_token_is_not_read():
    model, trunk, _ = batch("llava", sizes=((1, 9),))
    size, seen = len(trunk.reaches[0]), []
    tails = [[Tail([20, 21, 22], [2], keep) for keep in (3, size, 5, size - 1)]]

    def watch(module, args, given):
        seen.append((given["inputs_embeds"].shape[1], given["past_key_values"].get_seq_length()))

    hook = model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    score_tails(model, trunk, tails, chunk=2)
    hook.remove()
    assert seen == [(4, size), (4, 5)]  # two tokens of each of two tails; over as much of the trunk as they see


def test_only_what_counts_meets_the_head():
    model, trunk, _ = batch("llava", sizes=((1, 9),))
    met = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: met.append(args[0].shape[:2].numel()))
    score_tails(model, trunk, [[Tail(range(20, 30), (0, 8, 9), 4), Tail(range(20, 30), (9,), 4)]])
    hook.remove()
    assert met == [4]


def test_the_trunk_stays_whole_when_a_forward_fails():
    model, _ = fresh("llava")
    _, processor = small("llava")
    trunk = read_trunk(model, encode_prompts(processor, make_rows([(1, 2)])))
    tails = [[Tail([20, 21], (0, 1), 4)]]
    plain = flat(score_tails(model, trunk, tails))

    def stop(*_):
        raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_tails(model, trunk, tails)
    hook.remove()
    assert flat(score_tails(model, trunk, tails)).equal(plain)


def test_views_of_a_cache():
    _, trunk, _ = batch("llava")
    whole = trunk.cache.get_seq_length()
    view = first_columns(trunk.cache, 3)
    assert view.layers[0].keys.data_ptr() == trunk.cache.layers[0].keys.data_ptr()  # not copied
    extra = torch.zeros_like(view.layers[0].keys[:, :, :2])
    view.layers[0].update(extra, extra)
    assert (view.layers[0].get_seq_length(), trunk.cache.get_seq_length()) == (5, whole)
    assert first_columns(trunk.cache, whole).get_seq_length() == whole


def test_a_model_in_training_reads_without_dropout_and_goes_on_training():
    model, _ = fresh("llava")
    _, processor = small("llava")
    inputs = encode_prompts(processor, make_rows([(1, 2)]))
    tails = [[Tail([20, 21, 22], (0, 2), 9), Tail([20, 21, 22], (0, 2), 4)]]
    plain = flat(score_tails(model, read_trunk(model, inputs), tails))
    model.gradient_checkpointing_enable()
    model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = flat(score_tails(model, read_trunk(model, inputs), tails))
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)
    assert model.training


def test_adapters():
    model, processor = fresh("qwen2_5_vl")
    targets = r".*(q_proj|v_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    trunk = read_trunk(adapted, encode_prompts(processor, make_rows([(1, 2)])))
    tails = [[Tail([20, 21, 22], (0, 1, 2), 9), Tail([20, 21, 22], (0, 2), 4)]]
    ours = flat(score_tails(adapted, trunk, tails))
    torch.testing.assert_close(ours, as_branches(adapted, trunk, tails), atol=1e-5, rtol=0)
    with adapted.disable_adapter():
        trunk = read_trunk(adapted, encode_prompts(processor, make_rows([(1, 2)])))
        assert (flat(score_tails(adapted, trunk, tails)) - ours).abs().max() > 1e-3


def test_what_is_refused():
    model, trunk, tails = batch("llava")
    placeholder = image_token_ids(model)[0]
    refusal("want a chunk of at least 1", score_tails, model, trunk, tails, chunk=0)
    bad = [[], [Tail([20, placeholder], [1], 3)], []]
    refusal(f"holds the placeholder {placeholder} at token 1", score_tails, model, trunk, bad)
    for keep in (0, len(trunk.reaches[0]) + 1):
        bad = [[Tail([20], [0], keep)], [], []]
        refusal(f"a tail of row 0 follows {keep} of the", score_tails, model, trunk, bad)

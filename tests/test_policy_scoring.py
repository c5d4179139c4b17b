"Scores of chosen tokens are those of the model's own logits, and the logits are never there all at once."

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_policy_packing import SPECIMENS, fresh, gradients, small
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from vlm_reward.policy.scoring import Query, install_scoring, own_logits, score_states

TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
GATED = TINY | {"intermediate_size": 32, "num_key_value_heads": 2}


def habits():
    "Models that do something to their logits."
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=0.05))  # bends
    cohere = CohereForCausalLM(CohereConfig(**GATED, logit_scale=0.3))  # multiplies
    granite = GraniteForCausalLM(GraniteConfig(**GATED, logits_scaling=8.0))  # divides
    gptj = GPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))  # adds
    torch.nn.init.normal_(gptj.lm_head.bias)
    return {"gemma2": gemma, "cohere": cohere, "granite": granite, "gptj": gptj}


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "gptj"])
def test_the_head_is_the_models_own(name):
    model, ids = habits()[name].eval(), torch.arange(5, 12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0]
        states = model.base_model(input_ids=ids).last_hidden_state[0]
        assert own_logits(model, states).equal(plain)
        bare = states @ model.get_output_embeddings().weight.T
    assert not torch.allclose(plain, bare, atol=1e-3)  # the habit shows


@pytest.mark.parametrize("family", SPECIMENS)
def test_every_family_has_its_own_head(family):
    model, _ = small(family)
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state[0]
        assert own_logits(model, states).equal(model(input_ids=ids).logits[0])


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 12),
    chunk=st.none() | st.integers(1, 13),
    temperature=st.floats(0.2, 3),
    weights=st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])),
)
def test_chunks_change_nothing(size, chunk, temperature, weights):
    model, _ = small("llava")
    generator = torch.Generator().manual_seed(size)
    states = torch.randn(size, 32, generator=generator, requires_grad=True)
    tokens = torch.randint(0, 200, (size,), generator=generator)
    query = Query(tokens, tokens, temperature, entropy=True, chunk=chunk)
    chosen, entropy = score_states(model, states, query)
    whole = (own_logits(model, states) / temperature).log_softmax(-1)
    expected = whole.gather(-1, tokens[:, None])[:, 0], -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close((chosen, entropy), expected, atol=2e-5, rtol=0)
    push = torch.linspace(-1, 2, size)
    ours = gradients(model, (chosen * push * weights[0] + entropy * weights[1]).sum())
    theirs = gradients(model, (expected[0] * push * weights[0] + expected[1] * weights[1]).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * (1 + gradient.abs().max().item()), rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 12),
    several=st.integers(0, 3),
    chunk=st.none() | st.integers(1, 13),
    temperature=st.floats(0.2, 3),
)
def test_a_state_may_be_asked_for_several_tokens(size, several, chunk, temperature):
    model, _ = small("llava")
    generator = torch.Generator().manual_seed(size)
    states = torch.randn(size, 32, generator=generator, requires_grad=True)
    tokens = torch.randint(0, 200, (size, several), generator=generator)
    chosen, entropy = score_states(model, states, Query(tokens[:, 0:0], tokens, temperature, entropy=True, chunk=chunk))
    whole = (own_logits(model, states) / temperature).log_softmax(-1)
    assert chosen.shape == tokens.shape and entropy.shape == (size,)
    torch.testing.assert_close(chosen, whole.gather(-1, tokens), atol=2e-5, rtol=0)
    push = torch.linspace(-1, 2, size * several).view(size, several)
    ours = gradients(model, (chosen * push).sum())
    theirs = gradients(model, (whole.gather(-1, tokens) * push).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * (1 + gradient.abs().max().item()), rtol=0)


def test_tokens_that_are_left_out_leave_the_others_their_shape():
    "Also where the one left out has all but everything: what the rest share cannot be got by subtraction."
    model, _ = small("llava")
    states = (60 * torch.randn(6, 32, generator=torch.Generator().manual_seed(3))).requires_grad_()
    whole = own_logits(model, states)
    best, second = whole.topk(2).indices.T
    forbidden = torch.zeros_like(whole, dtype=torch.bool).scatter(1, best[:, None], True)
    forbidden[3] = False  # nothing is left out there
    without = best[:, None].clone()
    without[3] = -1
    query = Query(second, torch.stack([second, best], 1), chunk=4, without=without, entropy=True)
    (chosen, entropy), law = (
        score_states(model, states, query),
        whole.masked_fill(forbidden, -torch.inf).log_softmax(-1),
    )
    torch.testing.assert_close(chosen, law.gather(-1, query.tokens), atol=2e-5, rtol=1e-6)
    assert chosen[:, 1].isneginf().tolist() == [True] * 3 + [False] + [True] * 2
    torch.testing.assert_close(entropy, torch.special.entr(law.exp()).sum(-1), atol=2e-5, rtol=0)
    ours, theirs = (torch.autograd.grad(scores.sum(), states)[0] for scores in (chosen[:, 0], law[range(6), second]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_one_token_in_a_column_is_one_token():
    model, _ = fresh("llava")
    install_scoring(model)
    met = []
    model.lm_head.register_forward_hook(lambda module, args, out: met.append(args[0].shape[:2].numel()))
    ids, index = torch.arange(20, 30)[None], torch.arange(9)
    with torch.no_grad():
        flat = model(input_ids=ids, score=Query(index, ids[0, 1:])).logprobs
        column = model(input_ids=ids, score=Query(index, ids[0, 1:, None])).logprobs
        twice = model(input_ids=ids, score=Query(index, ids[0, 1:, None].expand(-1, 2))).logprobs
    assert column.equal(flat[:, None]) and twice.equal(flat[:, None].expand(-1, 2))
    assert met == [9, 9, 9]  # the head runs once per state, however many tokens are asked of it


def test_logits_are_never_there_all_at_once():
    model, _ = fresh("llava")
    seen = []

    class Count(torch.autograd.Function):
        "Counts the rows of logits that are alive."

        @staticmethod
        def forward(ctx, logits):
            seen.append(len(logits[0]))
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    model.lm_head.register_forward_hook(lambda module, args, out: Count.apply(out))
    states, tokens = torch.randn(20, 32, requires_grad=True), torch.arange(20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        chosen, entropy = score_states(model, states, Query(tokens, tokens, entropy=True, chunk=6))
    assert seen == [6, 6, 6, 2]
    vocabulary = model.config.text_config.vocab_size
    assert all(shape.numel() < vocabulary for shape in kept)
    (chosen.sum() + entropy.sum()).backward()
    assert seen == [6, 6, 6, 2, 2, 6, 6, 6]  # made again, from the last chunk to the first


def test_only_scored_states_meet_the_head():
    model, _ = fresh("qwen2_5_vl")
    install_scoring(model)
    met = []
    model.lm_head.register_forward_hook(lambda module, args, out: met.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        model(input_ids=torch.arange(20, 50)[None], score=Query(torch.tensor([3, 8]), torch.tensor([24, 29])))
    assert met == [2]


def test_known_states_stand_behind_those_of_the_forward():
    model, _ = fresh("llava")
    install_scoring(model)
    ids, known = torch.arange(20, 24)[None], torch.randn(3, 32)
    with torch.no_grad():
        out = model(input_ids=ids, score=Query(torch.tensor([5, 1]), torch.tensor([30, 31]), known=known, states=True))
        logprobs = own_logits(model, torch.stack([known[1], out.states[0, 1]])).log_softmax(-1)
    torch.testing.assert_close(out.logprobs, logprobs[[0, 1], [30, 31]], atol=1e-6, rtol=0)


def test_a_head_with_adapters_scores_with_them():
    model, _ = fresh("qwen2_5_vl")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    install_scoring(adapted)
    ids, index = torch.arange(20, 30)[None], torch.arange(9)
    out = adapted(input_ids=ids, score=Query(index, ids[0, 1:]))
    plain = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(out.logprobs, plain, atol=1e-5, rtol=0)
    ours, theirs = gradients(adapted, out.logprobs.sum()), gradients(adapted, plain.sum())
    assert ours and ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)


def test_installed_once_and_copied_whole():
    model, _ = fresh("llava")
    install_scoring(model)
    first = model.forward
    install_scoring(model)
    assert model.forward == first
    assert "score" not in inspect.signature(model.forward).parameters  # `generate` looks there
    add_fused_lm_head(model)
    install_scoring(model)
    twin = copy.deepcopy(model)
    ids = torch.arange(20, 30)[None]
    query = Query(torch.arange(9), ids[0, 1:])
    with torch.no_grad():
        before = model(input_ids=ids, score=query).logprobs
        for parameter in twin.parameters():
            parameter.zero_()
        after = model(input_ids=ids, score=query).logprobs
    assert after.equal(before)


def test_nothing_is_asked_of_a_model_without_a_head():
    model, _ = small("llava")
    with pytest.raises(ValueError, match="holds no model of transformers"):
        install_scoring(model.lm_head)

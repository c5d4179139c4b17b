"Sub-trajectory balance is what the formula says, zero for the posterior alone, and fed with the sampler's own scores."

import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_policy_packing import (
    SPECIMENS,
    assert_same_gradients,
    fresh,
    gradients,
    make_rows,
    make_texts,
    refusal,
    small,
)

from vlm_reward.lacot import subtb
from vlm_reward.lacot.subtb import Bounds, group_loss, mean_pair_loss, sampler_scores, subtb_loss, weighted_pair_loss
from vlm_reward.lacot.turns import encode_questions, follow, turns_of
from vlm_reward.policy.families import image_token_ids, lora_targets, packing_problem

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def rationales(lengths, seed, dtype=torch.float64):
    "Log rewards, token and stop log-probabilities of rationales of some lengths, and their mask; junk where padded."
    generator = torch.Generator().manual_seed(seed)
    n = max(lengths)
    shapes = [(len(lengths), n + 1), (len(lengths), n), (len(lengths), n + 1)]
    parts = [-5 * torch.rand(shape, generator=generator, dtype=dtype) for shape in shapes]
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    states = torch.cat([mask.new_ones(len(lengths), 1), mask], 1)
    junk = [torch.where(real, part, math.nan) for part, real in zip(parts, (states, mask, states), strict=True)]
    return [part.requires_grad_() for part in junk], mask


def residuals(log_rewards, logprobs, stops):
    "r_ij of one rationale, by its definition."
    found = {}
    for i, j in combinations(range(len(log_rewards)), 2):
        path = sum(logprobs[k - 1] for k in range(i + 1, j + 1))
        found[i, j] = log_rewards[i].detach() + path + stops[j] - log_rewards[j].detach() - stops[i]
    return found


def naive_loss(parts, mask, gamma):
    "The weighted mean of squared residuals, by a double loop."
    losses = []
    for row, size in enumerate(mask.sum(1).tolist()):
        own = residuals(*(part[row, : size + extra] for part, extra in zip(parts, (1, 0, 1), strict=True)))
        weights = {(i, j): gamma ** (j - i) for i, j in own}
        total = sum(weights[pair] * own[pair] ** 2 for pair in own) if own else parts[2][row, 0] * 0
        losses.append(total / max(sum(weights.values()), 1e-300))
    return torch.stack(losses)


def pushed(loss, parts):
    "Gradients with respect to the sampler's log-probabilities; 0 where none comes."
    found = torch.autograd.grad(loss.sum(), parts[1:], allow_unused=True)
    return [torch.zeros_like(part) if g is None else g for g, part in zip(found, parts[1:], strict=True)]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_the_closed_form_is_the_double_loop(lengths, seed):
    parts, mask = rationales(lengths, seed)
    ours, theirs = subtb_loss(*parts, mask), naive_loss(parts, mask, 1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    for one, other in zip(pushed(ours, parts), pushed(theirs, parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), gamma=st.floats(0.05, 0.999))
def test_the_loop_over_distances_is_the_double_loop(lengths, seed, gamma):
    parts, mask = rationales(lengths, seed)
    ours, theirs = subtb_loss(*parts, mask, gamma), naive_loss(parts, mask, gamma)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)
    for one, other in zip(pushed(ours, parts), pushed(theirs, parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_both_forms_are_equal_at_gamma_one(lengths, seed):
    values = torch.randn(len(lengths), max(lengths) + 1, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths) + 1) <= torch.tensor(lengths)[:, None]
    torch.testing.assert_close(
        mean_pair_loss(values, mask), weighted_pair_loss(values, mask, 1.0), atol=1e-5, rtol=1e-5
    )


def test_gamma_zero_is_detailed_balance():
    parts, mask = rationales([6], 0)
    own = residuals(*(part[0] for part in parts))
    neighbours = torch.stack([r for (i, j), r in own.items() if j == i + 1]).square().mean()
    torch.testing.assert_close(subtb_loss(*parts, mask, 0.0)[0], neighbours)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), level=st.floats(-8000, 0), states=st.integers(2, 700))
def test_thousands_of_nats_below_zero_nothing_cancels(seed, level, states):
    "The difference of two large sums would be off by more than the loss."
    noise = torch.randn(1, states, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    single = (noise + level).float()
    exact = 2 * single.double().var(dim=1)
    torch.testing.assert_close(
        mean_pair_loss(single, torch.ones(1, states)).double(), exact, rtol=1e-3, atol=1e-4 + 1e-6 * abs(level)
    )


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_an_end_mask_works_for_rows_of_different_length(gamma):
    "Each row of a batch has the loss and gradient that it has alone."
    lengths = [5, 0, 7, 3, 1]
    parts, mask = rationales(lengths, 1)
    together = subtb_loss(*parts, mask, gamma)
    push = pushed(together, parts)
    for row, size in enumerate(lengths):
        own = [part[row : row + 1, : size + extra] for part, extra in zip(parts, (1, 0, 1), strict=True)]
        own = [part.detach().clone().requires_grad_() for part in own]
        alone = subtb_loss(*own, torch.ones(1, size), gamma)
        torch.testing.assert_close(alone[0], together[row])
        for part, mine in zip(push, pushed(alone, own), strict=True):
            torch.testing.assert_close(part[row, : mine.shape[1]], mine[0])
            assert not part[row, mine.shape[1] :].any()  # what stands behind the end is pushed nowhere


def test_what_stands_behind_the_end_is_not_looked_at():
    parts, mask = rationales([3, 5], 2)
    filled = [torch.where(part.isnan(), -7.0, part).detach() for part in parts]
    torch.testing.assert_close(subtb_loss(*parts, mask), subtb_loss(*filled, mask))


def test_a_rationale_of_no_token_has_loss_zero_and_a_gradient():
    parts, mask = rationales([0, 0], 3)
    for gamma in (1.0, 0.5):
        loss = subtb_loss(*parts, mask, gamma)
        assert loss.tolist() == [0.0, 0.0]
        assert not any(push.any() for push in pushed(loss, parts))


def test_the_last_state_of_a_rationale_that_was_cut_off_counts():
    parts, mask = rationales([4], 4)
    changed = [part.detach().clone() for part in parts]
    changed[0][0, 4] -= 3.0
    assert abs(subtb_loss(*changed, mask) - subtb_loss(*parts, mask)) > 0.1


def test_no_gradient_reaches_the_reward():
    parts, mask = rationales([4, 2], 5)
    (subtb_loss(*parts, mask) + subtb_loss(*parts, mask, 0.5)).sum().backward()
    assert parts[0].grad is None and parts[1].grad[mask].all() and parts[2].grad[:, :3].all()
    reward, log_q = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    group_loss(reward, log_q).backward()
    assert reward.grad is None and log_q.grad.all()


def test_a_shape_without_the_empty_rationale_is_refused():
    "States are counted by tokens, from none to all: one more than tokens."
    ones = torch.ones
    fine = [ones(2, 4), ones(2, 3), ones(2, 4), ones(2, 3)]
    subtb_loss(*fine)
    for place, shape in ((0, (2, 3)), (2, (2, 3)), (3, (2, 4)), (0, (1, 4))):
        bad = [ones(shape) if i == place else part for i, part in enumerate(fine)]
        refusal("one state more than tokens", subtb_loss, *bad)
    gap = [*fine[:3], torch.tensor([[1, 1, 1], [1, 0, 1]])]
    refusal("rationale 1 has a gap in its mask", subtb_loss, *gap)
    for gamma in (-0.1, 1.5, math.nan):
        refusal("is no weight", subtb_loss, *fine, gamma)
    refusal("want one per rationale", group_loss, ones(3), ones(2))
    refusal("want one per rationale", group_loss, ones(1, 3), ones(1, 3))


# ---- a tree that can be enumerated


def tree(letters, depth):
    "All texts of at most `depth` letters, short ones first."
    return [word for size in range(depth + 1) for word in product(range(letters), repeat=size)]


def posterior(log_rewards, letters, depth):
    "The sampler that ends at each text in proportion to its reward: chances of letters and of the end."
    flow = {}
    for word in reversed(tree(letters, depth)):
        below = [flow[(*word, a)] for a in range(letters)] if len(word) < depth else []
        flow[word] = math.exp(log_rewards[word]) + sum(below)
    return {
        word: [*(flow[(*word, a)] / flow[word] for a in range(letters)), math.exp(log_rewards[word]) / flow[word]]
        if len(word) < depth
        else [0.0] * letters + [1.0]
        for word in flow
    }


def ends(sampler, letters, depth):
    "How often the sampler ends at each text."
    found = {}
    for word in tree(letters, depth):
        path = math.prod(sampler[word[:k]][word[k]] for k in range(len(word)))
        found[word] = path * sampler[word][-1]
    return found


def tree_losses(log_rewards, sampler, letters, depth, gamma=1.0):
    "The loss of every longest path."
    paths = list(product(range(letters), repeat=depth))
    rewards = torch.tensor([[log_rewards[path[:t]] for t in range(depth + 1)] for path in paths], dtype=torch.float64)
    steps = torch.tensor([[sampler[path[:t]][path[t]] for t in range(depth)] for path in paths], dtype=torch.float64)
    stops = torch.tensor([[sampler[path[:t]][-1] for t in range(depth + 1)] for path in paths], dtype=torch.float64)
    return subtb_loss(rewards, steps.log(), stops.log(), torch.ones(len(paths), depth), gamma)


TREES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))


def grown(letters, depth, seed, spread=3.0):
    "Random log rewards, and a random sampler."
    generator = torch.Generator().manual_seed(seed)
    words = tree(letters, depth)
    log_rewards = {word: (spread * torch.randn(1, generator=generator)).item() - 20 for word in words}
    other = {word: torch.randn(letters + 1, generator=generator).softmax(0).tolist() for word in words}
    other |= {word: [0.0] * letters + [1.0] for word in words if len(word) == depth}
    return log_rewards, other


@settings(max_examples=100, deadline=None)
@given(shape=TREES, gamma=st.sampled_from([1.0, 0.5, 0.0]))
def test_the_loss_is_zero_at_the_posterior(shape, gamma):
    log_rewards, _ = grown(*shape)
    sampler = posterior(log_rewards, *shape[:2])
    total = sum(math.exp(value) for value in log_rewards.values())
    for word, chance in ends(sampler, *shape[:2]).items():
        assert chance == pytest.approx(math.exp(log_rewards[word]) / total)
    assert tree_losses(log_rewards, sampler, *shape[:2], gamma).max() < 1e-18


@settings(max_examples=100, deadline=None)
@given(shape=TREES, mix=st.floats(1e-3, 1.0), gamma=st.sampled_from([1.0, 0.5, 0.0]))
def test_the_loss_is_zero_nowhere_else(shape, mix, gamma):
    "A sampler whose loss is small is near the posterior; one that is mixed with another has a loss."
    letters, depth, _ = shape
    log_rewards, other = grown(*shape, spread=1.0)
    best = posterior(log_rewards, letters, depth)
    sampler = {word: [(1 - mix) * a + mix * b for a, b in zip(best[word], other[word], strict=True)] for word in best}
    wanted, found = ends(best, letters, depth), ends(sampler, letters, depth)
    apart = sum(abs(wanted[word] - found[word]) for word in wanted) / 2
    losses = tree_losses(log_rewards, sampler, letters, depth, gamma)
    # neighbours off by r cost at least r^2 over the pairs of their path, so c moves little from the root to a text
    assert losses.max() > 0 and apart <= math.expm1(2 * math.sqrt(losses.max() * depth * (depth + 1) ** 2 / 2)) + 1e-9


def test_descent_finds_the_posterior():
    "From a sampler that tosses coins to total variation below 1e-3."
    letters, depth = 2, 3
    log_rewards, _ = grown(letters, depth, 7)
    words = tree(letters, depth - 1)
    logits = torch.zeros(len(words), letters + 1, dtype=torch.float64, requires_grad=True)
    paths = list(product(range(letters), repeat=depth))
    rewards = torch.tensor([[log_rewards[path[:t]] for t in range(depth + 1)] for path in paths], dtype=torch.float64)
    nodes = torch.tensor([[words.index(path[:t]) for t in range(depth)] for path in paths])
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        logprobs = logits.log_softmax(-1)[nodes]
        steps = logprobs.gather(-1, torch.tensor(paths)[..., None])[..., 0]
        stops = torch.cat([logprobs[..., -1], logprobs.new_zeros(len(paths), 1)], 1)
        loss = subtb_loss(rewards, steps, stops, torch.ones(len(paths), depth)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampler = dict(zip(words, logits.softmax(-1).tolist(), strict=True)) | {
        path: [0.0] * letters + [1.0] for path in paths
    }
    wanted, found = ends(posterior(log_rewards, letters, depth), letters, depth), ends(sampler, letters, depth)
    assert sum(abs(wanted[word] - found[word]) for word in wanted) / 2 < 1e-3


# ---- rewards at the end alone


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 8), seed=st.integers(0, 999), level=st.floats(-4000, 0))
def test_the_group_loss_is_the_mean_over_pairs(size, seed, level):
    generator = torch.Generator().manual_seed(seed)
    reward, log_q = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    log_q = (log_q + level).requires_grad_()
    c = log_q - reward
    pairs = [(c[j] - c[i]) ** 2 for i, j in combinations(range(size), 2)]
    naive = torch.stack(pairs).mean() if pairs else 0 * c.sum()
    ours = group_loss(reward, log_q)
    torch.testing.assert_close(ours, naive, atol=1e-9, rtol=1e-6)
    push, pull = (torch.autograd.grad(loss, log_q)[0] for loss in (ours, naive))
    torch.testing.assert_close(push, pull, atol=1e-9, rtol=1e-6)
    centred = (c - c.mean()).detach()
    torch.testing.assert_close(push, 4 / max(size - 1, 1) * centred, atol=1e-9, rtol=1e-6)


def test_the_group_loss_is_zero_where_q_is_proportional_to_the_reward():
    reward = torch.randn(5, dtype=torch.float64)
    assert group_loss(reward, reward - 1234.5) < 1e-18
    assert group_loss(reward, reward * 0.9) > 1e-4


# ---- the sampler's side


def plain_scores(model, turns, inputs, z):
    "log q of tokens and of T at every state, from the logits of the model's own forward in a row of its own."
    ids = torch.cat([inputs["input_ids"], torch.tensor([[*turns.opening, *z]])], 1)
    grown_inputs = dict(inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        extra = ids.shape[1] - inputs["input_ids"].shape[1]
        grown_inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
    logprobs = model(**grown_inputs).logits[0, -len(z) - 1 :].log_softmax(-1)
    return logprobs[range(len(z)), z], logprobs[:, turns.stop]


def joined(scores):
    "All scores in one tensor: tokens and stops of each rationale."
    return torch.cat([part for pair in zip(*scores, strict=True) for part in pair])


def asked(family, lengths=(5, 0, 3), seed=0):
    "A model, its turns, a question, and rationales of some lengths."
    model, processor = small(family)
    layout = "section" if family in ("smolvlm", "idefics3") else "turn"
    inputs = encode_questions(processor, make_rows([(1, 3)]))
    texts = [z.tolist() for z in make_texts([lengths], seed)[0]]
    return model, turns_of(processor, layout), inputs, texts


@pytest.mark.parametrize("family", SPECIMENS)
def test_scores_are_those_of_a_plain_forward(family):
    model, turns, inputs, texts = asked(family)
    scores = sampler_scores(model, turns, inputs, texts)
    assert [len(z) for z in scores[0]] == [5, 0, 3] and [len(t) for t in scores[1]] == [6, 1, 4]
    plain = joined(zip(*(plain_scores(model, turns, inputs, z) for z in texts), strict=True))
    torch.testing.assert_close(joined(scores), plain, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, len(plain))
    assert_same_gradients(gradients(model, joined(scores) @ weights), gradients(model, plain @ weights))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("least", "most"), [(0, 5), (3, 5), (4, 9)])
def test_scores_are_the_law_of_the_drawing(family, least, most):
    "The softmax over what may be drawn: with the end forbidden, never drawn tokens, and a certain end."
    model, turns, inputs, texts = asked(family, (5, 3, 4))
    never = tuple(token for token in range(30, 60) if not any(token in z for z in texts))[:2]
    scores = sampler_scores(model, turns, inputs, texts, bounds=Bounds(least, most, never))
    wanted = []
    for z in texts:
        grown = follow(model, inputs, [[*turns.opening, *z]])
        logits = model(**grown).logits[0, -len(z) - 1 :]
        forbidden = torch.zeros_like(logits, dtype=torch.bool)
        forbidden[:, list(never)] = True
        forbidden[:least, turns.stop] = True
        law = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        end = torch.cat([law[:-1, turns.stop], law.new_zeros(1)]) if len(z) == most else law[:, turns.stop]
        wanted.append((law[range(len(z)), z], end))
    plain, ours = joined(zip(*wanted, strict=True)), joined(scores)
    assert (plain.exp() == 0).sum() == sum(min(least, len(z) + 1) for z in texts)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    real = ~plain.isneginf()
    assert_same_gradients(gradients(model, ours[real].sum()), gradients(model, plain[real].sum()))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 8), min_size=0, max_size=5),
    seed=st.integers(0, 99),
    most=st.none() | st.integers(1, 120),
    data=st.data(),
)
def test_rationales_of_several_questions(lengths, seed, most, data):
    model, processor = small("qwen2_5_vl")
    turns = turns_of(processor, "section")
    rows = make_rows([(1, 2), (2, 4), (0, 1)], seed)
    texts = [z.tolist() for z in make_texts([lengths], seed)[0]]
    member = [data.draw(st.integers(0, 2)) for _ in texts]
    inputs = encode_questions(processor, rows)
    with torch.no_grad():
        scores = sampler_scores(model, turns, inputs, texts, member=member, row_tokens=most)
        for z, m, tokens, stops in zip(texts, member, *scores, strict=True):
            plain = plain_scores(model, turns, encode_questions(processor, [rows[m]]), z)
            torch.testing.assert_close((tokens, stops), plain, atol=1e-5, rtol=0)


def test_header_tokens_are_no_actions():
    "The loss is the same whatever the model thinks of the header that opens a rationale: it has no score."
    model, turns, inputs, texts = asked("llava", (4,))
    tokens, stops = sampler_scores(model, turns, inputs, texts)
    assert len(tokens[0]) == len(texts[0]) and len(stops[0]) == len(texts[0]) + 1
    with torch.no_grad():
        whole = follow(model, inputs, [[*turns.opening, *texts[0]]])
        logits = model(**whole).logits[0].log_softmax(-1)
    first = logits.shape[0] - len(texts[0]) - 1  # the last token of the header: state 0
    torch.testing.assert_close(tokens[0][0], logits[first, texts[0][0]], atol=1e-5, rtol=0)
    torch.testing.assert_close(stops[0][0], logits[first, turns.stop], atol=1e-5, rtol=0)


def test_adapters():
    model = fresh("qwen2_5_vl")[0]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=lora_targets(model), init_lora_weights=False))
    _, turns, inputs, texts = asked("qwen2_5_vl")
    scores = sampler_scores(adapted, turns, inputs, texts)
    plain = joined(zip(*(plain_scores(adapted, turns, inputs, z) for z in texts), strict=True))
    torch.testing.assert_close(joined(scores), plain, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, len(plain))
    ours, theirs = gradients(adapted, joined(scores) @ weights), gradients(adapted, plain @ weights)
    assert ours and all("lora" in name for name in ours)
    assert_same_gradients(ours, theirs)
    with adapted.disable_adapter():
        assert (joined(sampler_scores(adapted, turns, inputs, texts)) - joined(scores)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_model_that_cannot_be_packed_reads_one_rationale_per_forward(family, monkeypatch):
    model, turns, _, texts = asked(family)
    _, processor = small(family)
    two = encode_questions(processor, make_rows([(1, 2), (1, 5)]))
    member = [1, 0, 1]
    packed = joined(sampler_scores(model, turns, two, texts, member=member))
    monkeypatch.setattr(subtb, "packing_problem", lambda _: "its attention takes no mask")
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    plain = joined(sampler_scores(model, turns, two, texts, member=member))
    hook.remove()
    assert len(seen) == len(texts)
    torch.testing.assert_close(plain, packed, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, len(plain))
    assert_same_gradients(gradients(model, plain @ weights), gradients(model, packed @ weights))


def test_a_window_is_a_model_that_cannot_be_packed():
    model = fresh("llava")[0]
    model.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    model.config.text_config.sliding_window, model.model.language_model.has_sliding_layers = 4096, True
    assert packing_problem(model)
    whole, turns, inputs, texts = asked("llava")
    torch.testing.assert_close(
        joined(sampler_scores(model, turns, inputs, texts)), joined(sampler_scores(whole, turns, inputs, texts)),
        atol=1e-5, rtol=0,
    )  # fmt: skip


def test_no_rationales():
    model, turns, inputs, _ = asked("llava")
    assert sampler_scores(model, turns, inputs, []) == ([], [])


def test_what_is_refused():
    model, turns, inputs, texts = asked("llava")
    placeholder = image_token_ids(model)[0]
    refusal(
        f"holds the placeholder {placeholder} at token 1", sampler_scores, model, turns, inputs, [[20, placeholder]]
    )
    refusal("belongs to prompt 1", sampler_scores, model, turns, inputs, texts, member=[0, 1, 0])

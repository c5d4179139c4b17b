"On rationales that can be enumerated, balance finds the posterior and GRPO one of its modes."

import math
from functools import cache, partial
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.lacot.guide import keep_rationales
from vlm_reward.lacot.posterior import (
    Problem,
    action_logprobs,
    against,
    all_strings,
    climb_loss,
    draw_strings,
    entropy,
    learn,
    log_rewards,
    make_problem,
    modes,
    modes_found,
    posterior,
    read_ways,
    string_balance_loss,
    string_logprobs,
    table_logprobs,
    table_of,
    total_variation,
)
from vlm_reward.lacot.subtb import group_loss

REASONS = {"bcb": ("yes", 0.05), "caac": ("yes", 0.04), "bb": ("yes", 0.03), "acca": ("yes", 0.02), "a": ("no", 0.08)}
SEEDS = pytest.mark.parametrize("seed", [1, 2, 3])


@cache
def problem():
    "The problem of the chapter."
    return make_problem(REASONS)


def random_problem(seed, letters="ab", longest=4, answers=3):
    "A problem of random tables."
    noise = torch.Generator().manual_seed(seed)
    strings = all_strings(letters, longest)
    prior = table_logprobs(torch.randn(len(strings), len(letters) + 1, generator=noise))
    likely = (2 * torch.randn(answers, len(strings), generator=noise)).log_softmax(0)
    return Problem(strings, [str(k) for k in range(answers)], prior, likely, {})


def nothing(q):
    "Watch nothing."
    return {}


def trained(loss, start, seed, **options):
    "Chances of all strings after training in two runs."
    return learn(start, loss, nothing, runs=2, seed=seed, every=10**6, **options)[0]


# strings and tables


@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_the_chance_of_a_string_is_the_product_along_its_way(letters, longest, seed):
    strings = all_strings("abc"[:letters], longest)
    assert strings == sorted(set(strings), key=lambda text: (len(text), text))
    logits = torch.randn(len(strings), letters + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = table_logprobs(logits)
    naive = []
    for text in strings:
        ways = [strings.index(text[:t]) for t in range(len(text) + 1)]
        steps = [table[s, "abc".index(letter)] for s, letter in zip(ways, text, strict=False)]
        naive.append(sum(steps) + table[ways[-1], -1])
    torch.testing.assert_close(string_logprobs(table), torch.stack(naive))
    assert math.isclose(string_logprobs(table).exp().sum().item(), 1, rel_tol=1e-9)
    back = table_of(string_logprobs(table).exp(), letters)
    torch.testing.assert_close(back, table)


def test_the_longest_string_can_only_end():
    table = table_logprobs(torch.randn(121, 4))
    assert (table[40:, -1] == 0).all() and (table[40:, :-1] == -math.inf).all()
    assert table[:40].isfinite().all()


@pytest.mark.parametrize(
    ("reasons", "options", "message"),
    [
        ({"abcab": ("x", 0.1)}, {}, "no string of at most 4"),
        ({"d": ("x", 0.1)}, {}, "no string of at most 4 of the letters 'abc'"),
        ({"a": ("x", 1.0)}, {}, "0 is left"),
        ({"a": ("x", 0.1)}, {"faith": 1.0}, "faith 1"),
        ({"a": ("x", 0.1)}, {"guess": 0.5}, "guess 0.5"),
        ({"a": ("x", 0.1)}, {"letters": "aab"}, "each once"),
    ],
)
def test_problems_that_cannot_be(reasons, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_problem(reasons, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", ["yes", "no", "?"])
def test_the_posterior_is_bayes_rule(answer):
    toy = problem()
    pi, likely = string_logprobs(toy.prior).exp(), toy.answer_logprobs[toy.answers.index(answer)].exp()
    torch.testing.assert_close(posterior(toy, answer), pi * likely / (pi * likely).sum())
    torch.testing.assert_close(log_rewards(toy, answer).exp(), pi * likely)


def test_only_the_answer_changes_and_so_does_the_reward():
    "The released reward saw the rationale twice and never the answer."
    toy = problem()
    assert (log_rewards(toy, "yes") - log_rewards(toy, "no")).abs().max() > 1


def test_modes_are_reasons_of_their_answer():
    toy = problem()
    assert [toy.strings[s] for s in modes(toy, "yes")] == ["bcb", "caac", "bb", "acca"]
    assert modes(toy, "?") == []


# distances


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_total_variation_is_the_largest_difference_of_an_event(seed):
    p, q = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    events = [(p[torch.tensor(bits)] - q[torch.tensor(bits)]).sum() for bits in all_events(8)]
    assert math.isclose(total_variation(p, q).item(), max(events).item(), abs_tol=1e-12)
    assert 0 <= entropy(p) <= math.log(8)


def all_events(size):
    "All non-empty sets of numbers."
    return [[i for i in range(size) if bits >> i & 1] for bits in range(1, 2**size)]


# draws


def test_draws_are_as_frequent_as_they_are_likely():
    toy, noise = random_problem(0), torch.Generator().manual_seed(0)
    ends = read_ways(toy.prior[None], draw_strings(toy.prior[None], torch.ones(1, 40_000), noise)).ends
    share = torch.bincount(ends[0], minlength=len(toy.strings)) / 40_000
    torch.testing.assert_close(share, string_logprobs(toy.prior).exp(), atol=0.01, rtol=0)


def test_ways_lead_through_every_prefix_and_their_scores_multiply():
    toy, noise = random_problem(1), torch.Generator().manual_seed(0)
    states = draw_strings(toy.prior[None], torch.ones(1, 200), noise)
    ways = read_ways(toy.prior[None], states)
    for way, end, p, m in zip(states[0], ways.ends[0], *(some[0] for some in action_logprobs(ways)), strict=True):
        real = [toy.strings[s] for s in way.tolist() if s >= 0]
        assert real == [real[-1][:t] for t in range(len(real))] and real[-1] == toy.strings[end]
        assert math.isclose((p * m).sum().item(), string_logprobs(toy.prior)[end].item(), abs_tol=1e-5)
        assert m.sum() == len(real)  # its letters and T


def test_a_low_temperature_draws_what_is_likely():
    toy, noise = random_problem(2), torch.Generator().manual_seed(0)
    cold = read_ways(toy.prior[None], draw_strings(toy.prior[None], torch.full((1, 50), 0.01), noise)).ends
    assert len(cold.unique()) <= 2


# losses


@SEEDS
def test_balance_is_zero_at_the_posterior_alone(seed):
    toy, noise = random_problem(seed), torch.Generator().manual_seed(seed)
    rewards, exact = log_rewards(toy, "1"), posterior(toy, "1")
    states = draw_strings(toy.prior[None], torch.ones(1, 200), noise)
    assert string_balance_loss(table_of(exact, 2)[None], states, rewards).item() < 1e-9
    assert string_balance_loss(toy.prior[None], states, rewards).item() > 0.1


def test_balance_of_all_pairs_by_the_naive_loop():
    toy, noise = random_problem(5), torch.Generator().manual_seed(0)
    rewards, states = log_rewards(toy, "0"), draw_strings(toy.prior[None], torch.ones(1, 30), noise)
    table, found = toy.prior, []
    for way in states[0].tolist():
        way = [s for s in way if s >= 0]
        letters = [table[a, (b - 1) % 2] for a, b in pairwise(way)]
        pairs = [
            (rewards[way[i]] + sum(letters[i:j]) + table[way[j], -1] - rewards[way[j]] - table[way[i], -1]) ** 2
            for i in range(len(way))
            for j in range(i + 1, len(way))
        ]
        found.append(sum(pairs) / max(1, len(pairs)))
    expected = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in found]).mean()
    torch.testing.assert_close(string_balance_loss(table[None], states, rewards)[0], expected)


def test_what_is_not_kept_does_not_teach():
    toy, noise = problem(), torch.Generator().manual_seed(0)
    states, rewards = draw_strings(toy.prior[None], torch.ones(1, 50), noise), log_rewards(toy, "yes")
    ends = read_ways(toy.prior[None], states).ends
    some = string_balance_loss(toy.prior[None], states, rewards, keep=lambda ends: rewards[ends] > -6)
    alone = states[:, (rewards[ends] > -6)[0]]
    torch.testing.assert_close(some, string_balance_loss(toy.prior[None], alone, rewards))
    assert string_balance_loss(toy.prior[None], states, rewards, keep=lambda ends: ends < 0).item() == 0


# training


def learn_yes(seed, name):
    "Chances of all strings after training on the answer yes."
    toy = problem()
    rewards = log_rewards(toy, "yes")
    if name == "balance":
        return trained(lambda t, s, _: string_balance_loss(t, s, rewards), toy.prior, seed, explore=0.25, steps=300)
    points = rewards if name == "log reward" else rewards.exp()
    return trained(lambda t, s, _: climb_loss(t, s, points), toy.prior, seed, steps=300)


@SEEDS
def test_balance_reaches_the_posterior_with_all_its_modes(seed):
    toy = problem()
    exact, peaks, q = posterior(toy, "yes"), modes(toy, "yes"), learn_yes(seed, "balance")
    assert (total_variation(q, exact) < 0.05).all()
    assert (modes_found(q, exact, peaks) == 4).all()
    assert ((entropy(q) - entropy(exact)).abs() < 0.2).all()


@SEEDS
@pytest.mark.parametrize("name", ["log reward", "probability"])
def test_grpo_keeps_one_mode_of_the_same_reward(seed, name):
    toy = problem()
    exact, q = posterior(toy, "yes"), learn_yes(seed, name)
    assert (modes_found(q, exact, modes(toy, "yes")) <= 1).all()
    assert (total_variation(q, exact) > 0.5).all()
    assert (entropy(q) < 0.5).all()


@SEEDS
def test_balance_reaches_the_posterior_of_random_tables(seed):
    toy = random_problem(seed)
    rewards = log_rewards(toy, "2")
    q = trained(lambda t, s, _: string_balance_loss(t, s, rewards), toy.prior, seed, explore=0.25, steps=600)
    assert total_variation(string_logprobs(toy.prior).exp(), posterior(toy, "2")) > 0.2
    assert (total_variation(q, posterior(toy, "2")) < 0.05).all()


def test_balance_between_strings_and_grpo_with_the_whole_log_ratio_arrive_too():
    "It is the missing entropy that loses the modes, not the group."
    toy = problem()
    rewards, exact = log_rewards(toy, "yes"), posterior(toy, "yes")

    def between(table, states, step):
        ends = read_ways(table, states).ends
        pairs = zip(rewards[ends], string_logprobs(table).gather(1, ends), strict=True)
        return torch.stack([group_loss(*pair) for pair in pairs])

    def with_ratio(table, states, step):
        return climb_loss(table, states, rewards - string_logprobs(table.detach()), scale="none")

    for loss in (between, with_ratio):
        assert (total_variation(trained(loss, toy.prior, 1, steps=300), exact) < 0.05).all()


def test_a_reward_temperature_below_one_sharpens_the_target():
    toy = problem()
    rewards = log_rewards(toy, "yes") / 0.7
    q = trained(lambda t, s, _: string_balance_loss(t, s, rewards), toy.prior, 1, explore=0.25, steps=600)
    assert (total_variation(q, rewards.softmax(0)) < 0.05).all()
    assert (total_variation(q, posterior(toy, "yes")) > 0.07).all()
    assert (entropy(q) < entropy(posterior(toy, "yes")) - 0.2).all()


def test_the_filter_moves_the_sampler_away_from_the_posterior():
    toy = problem()
    rewards, exact = log_rewards(toy, "yes"), posterior(toy, "yes")
    best = rewards[toy.strings.index("bcb")].item()

    def keep(ends, tolerance=1.0):
        return keep_rationales(rewards[ends], best, tolerance=tolerance)

    found = []
    for tolerance in (math.inf, 1.5):
        kept = None if tolerance == math.inf else partial(keep, tolerance=tolerance)
        q = trained(
            lambda t, s, _, k=kept: string_balance_loss(t, s, rewards, keep=k), toy.prior, 1, explore=0.25, steps=300
        )
        found.append(total_variation(q, exact).mean().item())
    assert found[0] < 0.02 and found[1] > 0.05


def test_training_can_be_repeated_and_seeds_differ():
    toy = problem()
    loss = lambda t, s, _: string_balance_loss(t, s, log_rewards(toy, "yes"))  # noqa: E731
    first, again, other = (trained(loss, toy.prior, seed, steps=20) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # runs have noise of their own


def test_what_is_watched_is_kept():
    toy = problem()
    watch = against(posterior(toy, "yes"), modes(toy, "yes"))
    loss = lambda t, s, _: string_balance_loss(t, s, log_rewards(toy, "yes"))  # noqa: E731
    _, seen = learn(toy.prior, loss, watch, runs=3, steps=40, every=20)
    assert len(seen) == 9 and sorted(seen["step"].unique()) == [0, 20, 40]
    start = total_variation(string_logprobs(toy.prior).exp(), posterior(toy, "yes")).item()
    assert all(math.isclose(value, start, abs_tol=1e-5) for value in seen[seen["step"] == 0]["total variation"])
    assert (seen[seen["step"] == 40]["total variation"] < start).all()


def test_sharpening_moves_mass_from_many_wordings_to_one_short_text():
    "One letter, and a reason that is nearly thrice as likely in all but has 27 wordings: P^(1/0.7) prefers the letter."
    wordings = {"b" + "".join(rest): ("yes", 0.02) for rest in product("abc", repeat=3)}
    wordy = make_problem({"a": ("yes", 0.2)} | wordings)
    short, length = wordy.strings.index("a"), torch.tensor([float(len(text)) for text in wordy.strings])
    plain, sharp = ((log_rewards(wordy, "yes") / tau).softmax(0) for tau in (1.0, 0.7))
    one, many = 0.2 + 0.26 / 4**2, 0.02 + 0.26 / 4**4  # what pi gives to the letter, and to each wording
    for target, power in ((plain, 1.0), (sharp, 1 / 0.7)):
        assert target[short] / target[modes(wordy, "yes")].sum() == pytest.approx(
            one**power / (one**power + 27 * many**power), rel=1e-4
        )
    assert plain[short] < 0.3 < 0.45 < sharp[short] and (sharp * length).sum() < (plain * length).sum() - 0.5

"Selection among answers: rules against naive sums, estimators against enumeration, packed scores against plain forwards."

import copy
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy_packing import SPECIMENS, make_rows, make_texts, refusal, small

from vlm_reward.lacot import bin as module
from vlm_reward.lacot import decoding
from vlm_reward.lacot.bin import (
    RULES,
    Candidates,
    candidates_of,
    draw_candidates,
    first,
    merge,
    plot_scores,
    select,
)
from vlm_reward.lacot.decoding import pair_scores, pairs_plain, think
from vlm_reward.lacot.drawing import Answer, Rationale, draw_rationales, write_answers
from vlm_reward.lacot.pair import add_lora, frozen_copy
from vlm_reward.lacot.posterior import make_problem, string_logprobs
from vlm_reward.lacot.turns import before_answer, encode_questions, follow, turns_of
from vlm_reward.policy.families import image_token_ids, load_policy
from vlm_reward.policy.sampling import seeded
from vlm_reward.worlds.scenes import scene_rows

EACH = pytest.mark.parametrize("family", SPECIMENS)
LAYOUTS = pytest.mark.parametrize("layout", ["turn", "section"])
TEXTS = ("left", "Left.", "right", "(right)", "above", "")  # six spellings of four answers


@pytest.fixture(scope="module")
def pocket():
    model, processor = load_policy("pocket")
    return model, processor, turns_of(processor, "section"), scene_rows("relation", 6, seed=4)


# candidates without a model


class FakeTurns(SimpleNamespace):
    "As much of a layout as candidates need."

    closing = (7, 8)


def fake_draw(thought, text, finished=True):
    "A draw: the number of its rationale, the number of its text."
    ids = [100 + text] * (1 + text) if TEXTS[text] else []
    answer = Answer(TEXTS[text], [*ids, *(FakeTurns.closing if finished else ())], finished)
    return Rationale([50 + thought] * thought, True, "z" * thought), answer


def fake_scores(hole=()):
    "log pi of a rationale and of an answer after it, by their ids; -inf for pairs in `hole`."

    def thought(ids):
        return -0.7 * len(ids) - 0.4 - (sum(ids) % 7) / 3

    def pair(answer, ids):
        if (len(ids), len(answer)) in hole:
            return -math.inf
        return -0.3 - ((3 * len(answer) + 5 * len(ids) + sum(answer)) % 11) / 4

    def scores(model, turns, inputs, rationales, answers, chunk):
        known = torch.tensor([thought(ids) for ids in rationales], dtype=torch.float64)
        return known, torch.tensor([[pair(a, z) for z in rationales] for a in answers], dtype=torch.float64)

    return thought, pair, scores


def fake_candidates(draws, hole=(), same=None):
    "Candidates of such draws, by the module's own `candidates_of`."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pair_scores", fake_scores(hole)[2])
        patch.setattr(module, "encode_questions", lambda processor, rows: {})
        patch.setattr(module, "bare_model", lambda model: SimpleNamespace(device="cpu"))
        return candidates_of(None, None, FakeTurns(), {}, draws, same=same)


def log_mean(values):
    "log of the mean of exponentials, by hand."
    total = sum(math.exp(value) for value in values) / len(values)
    return math.log(total) if total else -math.inf


def naive(draws, rule, hole=()):
    "Scores by the folded text of an answer, from the formulas."
    thought, pair, _ = fake_scores(hole)
    fold = {"left": "left", "Left.": "left", "right": "right", "(right)": "right", "above": "above", "": ""}
    groups = {}
    for z, y in draws:
        groups.setdefault(fold[y.text], []).append((z.token_ids, y.token_ids))
    found = {}
    for name, own in groups.items():
        spellings = {tuple(y) for _, y in own}
        sums = [log_mean([pair(y, z.token_ids) for y in spellings]) + math.log(len(spellings)) for z, _ in draws]
        size = min(map(len, spellings))
        joint = [
            (thought(z.token_ids) + value) / (len(z.token_ids) + 1 + size)
            for (z, _), value in zip(draws, sums, strict=True)
        ]
        found[name] = {
            "best-of-n": max(pair(y, z) / len(y) for z, y in own),
            "majority": len(own) / len(draws),
            "bin-code": sum(joint) / len(joint),
            "bin-paper": log_mean(joint),
            "bin-marginal": log_mean(sums),
        }[rule]
    return found


def by_answer(candidates, rule):
    "Scores by the folded text of an answer."
    return {
        text.strip("().").lower(): score
        for text, score in zip(candidates.answers, scores_of(candidates, rule), strict=True)
    }


def scores_of(candidates, rule):
    return select(candidates, rule).scores.tolist()


DRAWS = st.lists(st.builds(fake_draw, st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=8)
HOLES = st.sets(st.tuples(st.integers(0, 4), st.integers(2, 8)), max_size=6)


@given(DRAWS, HOLES, st.sampled_from(RULES))
@settings(deadline=None, max_examples=300)
def test_rules_are_their_formulas_also_where_an_answer_is_impossible(draws, hole, rule):
    found, expected = by_answer(fake_candidates(draws, hole), rule), naive(draws, rule, hole)
    assert found.keys() == expected.keys()
    for name, score in found.items():
        assert score == expected[name] or math.isclose(score, expected[name], rel_tol=1e-9, abs_tol=1e-9)


@given(DRAWS, HOLES, st.randoms())
@settings(deadline=None, max_examples=100)
def test_the_order_of_draws_does_not_matter_beyond_ties(draws, hole, dice):
    other = dice.sample(draws, len(draws))
    for rule in RULES:
        one, two = by_answer(fake_candidates(draws, hole), rule), by_answer(fake_candidates(other, hole), rule)
        assert one.keys() == two.keys()
        assert all(one[k] == two[k] or math.isclose(one[k], two[k], rel_tol=1e-9) for k in one)
        best = max(one.values())
        tied = [k for k in one if one[k] == best or math.isclose(one[k], best, rel_tol=1e-9)]
        if len(tied) == 1:
            chosen = {select(fake_candidates(some, hole), rule).answer.strip("().").lower() for some in (draws, other)}
            assert chosen == set(tied)


@given(DRAWS, HOLES, st.data())
@settings(deadline=None, max_examples=100)
def test_the_first_n_draws_are_as_though_no_more_had_been_drawn(draws, hole, data):
    n = data.draw(st.integers(1, len(draws)))
    part, alone = first(fake_candidates(draws, hole), n), fake_candidates(draws[:n], hole)
    for name in (*Candidates._fields, "answer_logprobs", "answer_tokens", "own_logprobs", "own_tokens"):
        one, two = getattr(part, name), getattr(alone, name)
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two, name


@given(DRAWS)
@settings(deadline=None, max_examples=50)
def test_scores_have_their_ranges(draws):
    some = fake_candidates(draws)
    assert math.isclose(sum(scores_of(some, "majority")), 1, abs_tol=1e-6)
    assert all(max(scores_of(some, rule)) <= math.log(6) for rule in RULES[2:])
    assert len(some.answers) <= len(some.spelling_tokens) <= len(draws)
    assert some.answer_logprobs.shape == (len(some.answers), len(draws))


@pytest.mark.parametrize("rule", RULES)
def test_one_draw_gives_its_own_answer(rule):
    for text in range(6):
        assert select(fake_candidates([fake_draw(2, text)]), rule).answer == TEXTS[text]


@pytest.mark.parametrize("rule", RULES)
def test_draws_that_agree_have_one_answer(rule):
    some = fake_candidates([fake_draw(thought, 4) for thought in (0, 3, 3, 1)])
    assert select(some, rule).answer == "above" and len(scores_of(some, rule)) == 1


def test_ties_go_to_the_first_draw():
    for order in ([0, 2, 4], [4, 2, 0], [2, 0, 4]):
        some = fake_candidates([fake_draw(1, text) for text in order])
        assert select(some, "majority").answer == TEXTS[order[0]]
    hopeless = {(z, y) for z in range(5) for y in range(9)}
    some = fake_candidates([fake_draw(1, 2), fake_draw(0, 0), fake_draw(2, 0)], hopeless)
    for rule in RULES:
        assert select(some, rule).answer == ("left" if rule == "majority" else "right")


def test_equal_answers_are_merged_and_their_probabilities_added():
    draws = [fake_draw(1, 0), fake_draw(2, 1), fake_draw(2, 2), fake_draw(3, 0)]
    some, pair = fake_candidates(draws), fake_scores()[1]
    assert some.answers == ["left", "right"] and some.own.tolist() == [0, 0, 1, 0]
    assert some.spelling.tolist() == [0, 1, 2, 0] and some.answer_of_spelling.tolist() == [0, 0, 1]
    for j, (z, _) in enumerate(draws):
        both = sum(math.exp(pair(y.token_ids, z.token_ids)) for _, y in draws[:2])
        assert math.isclose(some.answer_logprobs[0, j].exp().item(), both)
    own = [pair(y.token_ids, z.token_ids) for z, y in draws]
    assert some.own_logprobs.tolist() == pytest.approx(own)
    assert some.own_tokens.tolist() == [3, 4, 5, 3] and some.answer_tokens.tolist() == [3, 5]


def test_what_is_the_same_is_for_the_caller_to_say():
    draws = [fake_draw(1, text) for text in (0, 2, 4, 5)]
    assert len(fake_candidates(draws, same=lambda a, b: False).answers) == 4
    assert fake_candidates(draws, same=lambda a, b: True).answers == ["left"]
    assert fake_candidates([*draws, draws[0]], same=lambda a, b: False).own.tolist() == [0, 1, 2, 3, 0]
    assert merge([]) == ([], [])


def test_text_that_looks_like_code_is_text():
    "The released code called eval on generated text."
    traps = ["__import__('os').abort()", "exit()", "[1, 2]", "1/0"]
    assert merge(traps) == (traps, [0, 1, 2, 3])
    for part in (module, decoding):
        assert "eval(" not in inspect.getsource(part) and "exec(" not in inspect.getsource(part)


def test_bin_code_is_vetoed_by_one_rationale_and_the_others_are_not():
    draws = [fake_draw(1, 0), fake_draw(2, 0), fake_draw(3, 0), fake_draw(4, 4)]
    some = fake_candidates(draws, hole={(4, 3)})  # the answer left after the last rationale
    assert scores_of(some, "bin-code")[0] == -math.inf
    assert all(math.isfinite(scores_of(some, rule)[0]) for rule in ("bin-paper", "bin-marginal", "best-of-n"))


def test_what_cannot_be_chosen_from():
    some = fake_candidates([fake_draw(1, 0)])
    refusal("unknown rule 'bin'", select, some, "bin")
    refusal("cannot take the first 0 of 1", first, some, 0)
    refusal("cannot take the first 2 of 1", first, some, 2)
    none = some._replace(rationales=[], written=[], answers=[], own=some.own[:0])
    refusal("no draws to choose from", select, none, "majority")
    refusal("are NaN", select, some._replace(spelling_logprobs=some.spelling_logprobs * math.nan), "bin-paper")


# estimators against enumeration


def tables(seed):
    "log pi(Z T), log pi(Y | Z), tokens of Z and T, of a random small problem."
    problem = make_problem({"a": ("no", 0.2), "bcb": ("yes", 0.2), "cc": ("yes", 0.1)})
    noise = torch.Generator().manual_seed(seed)
    likely = (problem.answer_logprobs.double() + torch.randn(3, 121, generator=noise)).log_softmax(0)
    return string_logprobs(problem.prior).double(), likely, torch.tensor([len(text) + 1 for text in problem.strings])


def drawn_candidates(seed, sampler, n, sizes=(1, 1, 1)):
    "Candidates whose rationales come from `sampler` (121,), with one spelling per answer."
    pi, likely, tokens = tables(seed)
    noise = torch.Generator().manual_seed(seed)
    ends = torch.multinomial(sampler, n, replacement=True, generator=noise)
    written = torch.multinomial(likely[:, ends].T.exp(), 1, generator=noise)[:, 0].tolist()
    names, own = merge([str(k) for k in written])
    rows, of = [int(name) for name in names], torch.tensor(own)
    one = [Rationale([], True, "")] * n, [Answer(str(k), [k], True) for k in written]
    return Candidates(*one, names, of, pi[ends], tokens[ends], of, likely[rows][:, ends], torch.tensor(sizes)[rows])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_marginal_converges_to_the_probability_of_the_answer(seed):
    pi, likely, _ = tables(seed)
    some = drawn_candidates(seed, pi.exp(), 30_000)
    for name, score in zip(some.answers, scores_of(some, "bin-marginal"), strict=True):
        assert math.exp(score) == pytest.approx((pi + likely[int(name)]).exp().sum().item(), abs=0.01)


def test_the_marginal_is_unbiased_at_any_n():
    pi, likely, _ = tables(0)
    noise = torch.Generator().manual_seed(0)
    ends = torch.multinomial(pi.exp(), 60_000, replacement=True, generator=noise).view(-1, 3)
    means = likely.exp()[:, ends].mean(-1)  # of three rationales each
    torch.testing.assert_close(means.mean(1), (pi + likely).exp().sum(1), atol=0.005, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2)])
def test_code_and_paper_converge_to_something_else(seed, sizes):
    "They count pi(Z) although Z was drawn, and divide by a length."
    pi, likely, tokens = tables(seed)
    some, joint = (
        drawn_candidates(seed, pi.exp(), 30_000, sizes),
        (pi + likely) / (tokens + torch.tensor(sizes)[:, None]),
    )
    limits = {"bin-paper": (pi.exp() * joint.exp()).sum(1).log(), "bin-code": (pi.exp() * joint).sum(1)}
    exact = (pi + likely).exp().sum(1).log()
    for rule, limit in limits.items():
        for name, score in zip(some.answers, scores_of(some, rule), strict=True):
            assert score == pytest.approx(limit[int(name)].item(), abs=0.02)
            assert abs(limit[int(name)] - exact[int(name)]) > 0.02


def test_a_longer_answer_of_the_same_probability_gains_from_its_length():
    "Nothing but the number of tokens changes; bin-marginal does not see it."
    pi, _, _ = tables(0)
    short, long = (drawn_candidates(0, pi.exp(), 500, (size, 1, 1)) for size in (1, 6))
    k = short.answers.index("0")
    assert scores_of(short, "bin-marginal") == scores_of(long, "bin-marginal")
    for rule in ("bin-code", "bin-paper", "best-of-n"):
        assert scores_of(long, rule)[k] > scores_of(short, rule)[k] + 0.1


def test_between_answers_of_one_length_the_rationale_cancels_in_bin_code():
    pi, _, _ = tables(1)
    some = drawn_candidates(1, pi.exp(), 200)
    other = some._replace(rationale_logprobs=some.rationale_logprobs * 3 - 1)
    gaps = [torch.tensor(scores_of(c, "bin-code")).diff() for c in (some, other)]
    torch.testing.assert_close(*gaps, atol=1e-5, rtol=0)


def test_the_marginal_follows_the_sampler():
    "Under another sampler than pi it estimates that sampler's mixture."
    _, likely, _ = tables(2)
    sampler = torch.zeros(121).index_fill(0, torch.tensor([5, 40]), 0.5)
    some = drawn_candidates(2, sampler, 20_000)
    for name, score in zip(some.answers, scores_of(some, "bin-marginal"), strict=True):
        assert math.exp(score) == pytest.approx(likely[int(name), [5, 40]].exp().mean().item(), abs=0.01)


# scores of all pairs


def alone(model, inputs, before, text):
    "log pi of a text behind what stands before it, from the logits of one forward of the whole."
    grown = follow(model, inputs, [[*before, *text]])
    with torch.no_grad():
        logits = model(**grown, use_cache=False).logits[0, -len(text) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum().item()


def question(family, layout="turn"):
    "A model, its layout, a question, rationales and answers of different length."
    model, processor = small(family)
    turns, rows = turns_of(processor, layout), make_rows([(1, 3)])
    texts = [text.tolist() for text in make_texts([(5, 0, 9, 1, 3, 1, 2)])[0]]
    answers = [[*text, *turns.closing] for text in (*texts[4:], [])]
    return model, turns, encode_questions(processor, rows), texts[:4], answers


@EACH
@LAYOUTS
def test_packed_scores_are_one_forward_per_pair(family, layout):
    model, turns, inputs, rationales, answers = question(family, layout)
    for chunk in (1, 64):
        thoughts, matrix = pair_scores(model, turns, inputs, rationales, answers, chunk=chunk)
        for j, ids in enumerate(rationales):
            expected = alone(model, inputs, turns.opening, [*ids, turns.stop])
            assert thoughts[j].item() == pytest.approx(expected, abs=1e-4)
            for k, answer in enumerate(answers):
                expected = alone(model, inputs, before_answer(turns, ids), answer)
                assert matrix[k, j].item() == pytest.approx(expected, abs=1e-4)


@EACH
def test_a_model_that_cannot_be_packed_has_a_forward_per_pair(family, monkeypatch):
    model, turns, inputs, rationales, answers = question(family)
    packed = pair_scores(model, turns, inputs, rationales, answers)
    monkeypatch.setattr(decoding, "packing_problem", lambda model: "it cannot")
    monkeypatch.setattr(decoding, "pairs_packed", None)
    for one, other in zip(packed, pair_scores(model, turns, inputs, rationales, answers), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_the_question_is_read_once(monkeypatch):
    model, turns, inputs, rationales, answers = question("llava")
    seen, tokens, read = [], [], decoding.read_trunk
    monkeypatch.setattr(decoding, "read_trunk", lambda *args: seen.append(1) or read(*args))
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, options: tokens.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    pair_scores(model, turns, inputs, rationales, answers)
    hook.remove()
    assert len(seen) == 1
    branches = sum(len(z) + 1 + len(turns.bridge) + sum(map(len, answers)) for z in rationales)
    assert sum(tokens) == inputs["input_ids"].shape[1] + len(turns.opening) + branches


def test_bin_counts_the_first_token_of_the_rationale():
    "The released code skipped it."
    model, turns, inputs, rationales, _ = question("llava")
    z = rationales[0]
    whole = pair_scores(model, turns, inputs, [z], [turns.closing])[0].item()
    rest = alone(model, inputs, [*turns.opening, z[0]], [*z[1:], turns.stop])
    assert whole == pytest.approx(alone(model, inputs, turns.opening, z[:1]) + rest, abs=1e-4)
    assert rest - whole > 1


def test_headers_are_given_and_not_scored():
    "The released code counted header tokens as actions."
    model, turns, inputs, rationales, answers = question("llava")
    thoughts, matrix = pair_scores(model, turns, inputs, rationales[:1], answers[:1])
    text = [*turns.opening, *rationales[0], turns.stop, *turns.bridge, *answers[0]]
    headers = alone(model, inputs, [], text) - thoughts.item() - matrix.item()
    between = alone(model, inputs, [*turns.opening, *rationales[0], turns.stop], turns.bridge)
    assert headers == pytest.approx(alone(model, inputs, [], turns.opening) + between, abs=1e-3)
    assert headers < -1


def test_scores_have_no_floor():
    "The released code set -99 where real scores are lower."
    model, turns, inputs, _, answers = question("llava")
    long = make_texts([(80,)])[0][0].tolist()
    thoughts = pair_scores(model, turns, inputs, [long], answers)[0]
    assert thoughts.item() < -150
    assert thoughts.item() == pytest.approx(alone(model, inputs, turns.opening, [*long, turns.stop]), abs=1e-3)


def test_a_rationale_that_came_twice_is_scored_once(monkeypatch):
    model, turns, inputs, rationales, answers = question("llava")
    twice = [rationales[0], rationales[2], rationales[0]]
    thoughts, matrix = pair_scores(model, turns, inputs, twice, answers)
    assert torch.equal(thoughts[0], thoughts[2]) and torch.equal(matrix[:, 0], matrix[:, 2])
    scored, packed = [], decoding.pairs_packed
    monkeypatch.setattr(decoding, "pairs_packed", lambda *args: scored.append(len(args[3])) or packed(*args))
    pair_scores(model, turns, inputs, twice, answers)
    assert scored == [2]


def test_what_cannot_be_scored():
    model, turns, inputs, rationales, answers = question("llava")
    _, processor = small("llava")
    two = encode_questions(processor, make_rows([(1, 2), (1, 3)]))
    refusal("got 2 questions", pair_scores, model, turns, two, rationales, answers)
    picture = image_token_ids(model)[0]
    refusal("placeholder", pair_scores, model, turns, inputs, [[20, picture]], answers)
    refusal("want at least one rationale and one answer, got 0 and", pair_scores, model, turns, inputs, [], answers)
    refusal("one answer, got 2 and 0", pair_scores, model, turns, inputs, [[20], []], [])
    row = {"id": "scenes/relation/7"}
    refusal("row 'scenes/relation/7' has no draws: draw at least one", candidates_of, model, None, turns, row, [])
    refusal("chunk of at least 1", pair_scores, model, turns, inputs, rationales, answers, chunk=0)


# best of N and padding


def test_best_of_n_ignores_padding(pocket):
    "The released code summed log-probabilities over the padding of shorter answers."
    model, processor, turns, rows = pocket
    thought = Rationale(processor.tokenizer("red square a 1")["input_ids"], True, "")
    texts = ("left", "left or right", "above or below or left")
    ids = [[*processor.tokenizer(text)["input_ids"], *turns.closing] for text in texts]
    draws = [(thought, Answer(text, some, True)) for text, some in zip(texts, ids, strict=True)]
    together = candidates_of(model, processor, turns, rows[0], draws)
    assert len({*together.own_tokens.tolist()}) == 3
    inputs = encode_questions(processor, rows[:1])
    before = before_answer(turns, thought.token_ids)
    for k, draw in enumerate(draws):
        single = candidates_of(model, processor, turns, rows[0], [draw])
        expected = alone(model, inputs, before, ids[k]) / len(ids[k])
        assert scores_of(single, "best-of-n")[0] == pytest.approx(expected, abs=1e-4)
        assert scores_of(together, "best-of-n")[k] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pad", ["<|im_start|>", "<|im_end|>", "left"])
def test_the_padding_token_is_of_no_account(pocket, pad):
    model, processor, turns, rows = pocket
    rows = rows[:2]
    draws = think(model, processor, turns, rows, n=4, frozen=model, seed=2)
    plain = [candidates_of(model, processor, turns, *pair) for pair in zip(rows, draws, strict=True)]
    other = copy.deepcopy(processor)
    other.tokenizer.pad_token = pad
    again = [candidates_of(model, other, turns, *pair) for pair in zip(rows, draws, strict=True)]
    for one, two in zip(plain, again, strict=True):
        assert torch.equal(one.spelling_logprobs, two.spelling_logprobs)
        assert torch.equal(one.rationale_logprobs, two.rationale_logprobs)
        assert all(select(one, rule).answer == select(two, rule).answer for rule in RULES)


# with a policy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_draw_is_plain_decoding_for_every_rule(pocket, temperature):
    model, processor, turns, rows = pocket
    heat = {"temperature": temperature, "answer_temperature": temperature}
    with seeded(5):
        drawn = draw_rationales(model, processor, turns, rows, temperature=temperature)
        ids = [some[0].token_ids for some in drawn]
        plain = write_answers(model, processor, turns, rows, ids, temperature=temperature)
    found = draw_candidates(model, processor, turns, rows, n=1, frozen=model, seed=5, **heat)
    assert [some.written[0] for some in found] == plain
    assert [some.rationales[0] for some in found] == [some[0] for some in drawn]
    for rule in RULES:
        assert [select(some, rule).answer for some in found] == [answer.text for answer in plain]


def test_seeds_repeat_and_leave_the_callers_noise_alone(pocket):
    model, processor, turns, rows = pocket
    state = torch.random.get_rng_state()
    one, two, other = (think(model, processor, turns, rows, n=3, frozen=model, seed=seed) for seed in (1, 1, 2))
    assert one == two and one != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_thoughts_and_answers_have_noise_of_their_own(pocket, monkeypatch):
    "From one seed for both, the first tokens of thought and answer would come from the same noise."
    model, processor, turns, rows = pocket
    states, draw, write = [], decoding.draw_rationales, decoding.write_answers
    note = lambda function: lambda *a, **k: states.append(torch.random.get_rng_state()) or function(*a, **k)  # noqa: E731
    monkeypatch.setattr(decoding, "draw_rationales", note(draw))
    monkeypatch.setattr(decoding, "write_answers", note(write))
    think(model, processor, turns, rows[:1], n=2, frozen=model, seed=1)
    assert not torch.equal(*states)


def test_a_questions_scores_do_not_depend_on_its_batch(pocket):
    model, processor, turns, rows = pocket
    found = draw_candidates(model, processor, turns, rows, n=3, frozen=model, seed=1)
    for row, some in zip(rows, found, strict=True):
        draws = list(zip(some.rationales, some.written, strict=True))
        single = candidates_of(model, processor, turns, row, draws)
        assert torch.equal(single.spelling_logprobs, some.spelling_logprobs)
        assert torch.equal(single.rationale_logprobs, some.rationale_logprobs)


@pytest.mark.parametrize("layout", ["turn", "section"])
def test_the_answerer_scores_with_its_adapters_off(layout):
    model, processor = small("llava")
    turns, rows = turns_of(processor, layout), make_rows([(1, 3), (1, 1)])
    sampler = add_lora(copy.deepcopy(model), 4)
    for name, parameter in sampler.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    limits = {"n": 3, "max_tokens": 6, "answer_tokens": 3, "seed": 0}
    off = draw_candidates(sampler, processor, turns, rows, **limits)
    apart = draw_candidates(sampler, processor, turns, rows, frozen=frozen_copy(model), **limits)
    for row, one, two in zip(rows, off, apart, strict=True):
        assert one.rationales == two.rationales and one.written == two.written
        torch.testing.assert_close(one.spelling_logprobs, two.spelling_logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.rationale_logprobs, two.rationale_logprobs, atol=1e-4, rtol=0)
        on = candidates_of(sampler, processor, turns, row, list(zip(one.rationales, one.written, strict=True)))
        assert (on.rationale_logprobs - one.rationale_logprobs).abs().max() > 0.1


@EACH
def test_texts_that_were_cut_off_are_scored_as_though_they_had_ended(family):
    model, processor = small(family)
    turns, rows = turns_of(processor), make_rows([(1, 3)])
    some = draw_candidates(
        model, processor, turns, rows, n=3, frozen=model, max_tokens=4, min_tokens=4, answer_tokens=2, seed=0
    )[0]
    inputs = encode_questions(processor, rows)
    for j, (z, y) in enumerate(zip(some.rationales, some.written, strict=True)):
        assert some.rationale_tokens[j] == len(z.token_ids) + 1
        closed = y.token_ids if y.finished else [*y.token_ids, *turns.closing]
        assert some.own_tokens[j] == len(closed)
        expected = alone(model, inputs, before_answer(turns, z.token_ids), closed)
        assert some.own_logprobs[j].item() == pytest.approx(expected, abs=1e-4)
    assert not all(y.finished for y in some.written) and not all(z.finished for z in some.rationales)
    assert all(select(some, rule).scores.isfinite().all() for rule in RULES)


def test_a_cut_answer_and_a_finished_one_of_the_same_tokens_are_one_spelling():
    some = fake_candidates([fake_draw(1, 0, finished=False), fake_draw(2, 0)])
    assert some.spelling.tolist() == [0, 0] and some.spelling_tokens.tolist() == [3]


def test_empty_answers_and_empty_rationales_have_scores(pocket):
    model, processor, turns, rows = pocket
    draws = [
        (Rationale([], True, ""), Answer("", [*turns.closing], True)),
        (Rationale([], False, ""), Answer("", [], False)),
    ]
    some = candidates_of(model, processor, turns, rows[0], draws)
    assert some.answers == [""] and some.rationale_tokens.tolist() == [1, 1]
    assert some.spelling_tokens.tolist() == [len(turns.closing)]
    for rule in RULES:
        assert select(some, rule).answer == "" and select(some, rule).scores.isfinite().all()


def test_what_cannot_be_drawn(pocket):
    model, processor, turns, rows = pocket
    refusal("want n", draw_candidates, model, processor, turns, rows, n=0, frozen=model)
    refusal("no adapters to switch off", draw_candidates, model, processor, turns, rows, n=1)
    assert draw_candidates(model, processor, turns, [], n=2, frozen=model) == []


def test_the_picture_shows_the_matrix_and_what_was_written():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    some = fake_candidates([fake_draw(1, 0), fake_draw(2, 1), fake_draw(2, 4), fake_draw(3, 5)])
    ax = plot_scores(some, plt.subplots()[1])
    assert ax.images[0].get_array().shape == (3, 4)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["left", "above", "(empty)"]
    assert ax.collections[0].get_offsets().data.tolist() == [[0, 0], [1, 0], [2, 1], [3, 2]]
    plt.close(ax.figure)


def test_plain_pairs_give_every_pair(pocket):
    model, processor, turns, rows = pocket
    thoughts, matrix = pairs_plain(
        model, turns, encode_questions(processor, rows[:1]), [[30], [31, 32]], [turns.closing], 1
    )
    assert thoughts.shape == (2,) and matrix.shape == (1, 2)

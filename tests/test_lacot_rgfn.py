"""Reference-guided training: where it leads, what it leaves alone, and what it refuses."""

import copy
import itertools
import json
import math
import os
import shutil
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import vlm_reward.lacot.rgfn as rgfn
import vlm_reward.lacot.step as step
import vlm_reward.lacot.subtb as subtb
import vlm_reward.lacot.token_reward as token_reward
from vlm_reward.core.rows import make_row
from vlm_reward.core.runs import Run
from vlm_reward.core.terminal import Notice
from vlm_reward.lacot.drawing import Rationale, draw_rationales, never_drawn
from vlm_reward.lacot.pair import add_lora, frozen_copy
from vlm_reward.lacot.rgfn import train_rgfn
from vlm_reward.lacot.settings import RGFNSettings, question_order, sharding_found, training_arguments
from vlm_reward.lacot.subtb import FREE, Bounds, sampler_scores
from vlm_reward.lacot.token_reward import token_rewards
from vlm_reward.lacot.turns import answer_ids, encode_questions, follow, split_text, turns_of
from vlm_reward.policy.families import image_token_ids
from vlm_reward.policy.pocket import CHAT_TEMPLATE, SECTION_TOKENS, SPECIAL_TOKENS, make_model, make_processor
from vlm_reward.policy.specimens import specimen
from vlm_reward.rewards.rubric import Rubric

WORDS = ("<unk>", "user", "assistant", "seen", "a", "b")


def toy(seed=1, layers=1, scale=15.0):
    "A pocket-shaped policy of 16 tokens, with weights so large that its answers depend on what was thought."
    names = [*SPECIAL_TOKENS, *SECTION_TOKENS, *WORDS]
    level = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    marks |= {"extra_special_tokens": list(SPECIAL_TOKENS[1:]), "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, **marks)
    tokenizer.add_tokens(list(SECTION_TOKENS))
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = make_model(tokenizer, hidden=32, layers=layers, vision_hidden=16, vision_layers=1, heads=2).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model, make_processor(tokenizer)


def toy_rows(n=1, **columns):
    colours = ["red", "green", "blue", "yellow"]
    told = {"task": "toy", "question": "a b", "solution": "b"}
    return [
        make_row(id=f"toy-{i}", images=[Image.new("RGB", (64, 64), colours[i % 4])], **told | columns) for i in range(n)
    ]


TOY = {"layout": "section", "warmup": 0, "max_tokens": 3, "answer_tokens": 2, "freeze_vision": False, "rationales": 4}
TOY |= {
    "steps": 2,
    "questions_per_step": 1,
    "lr": 1e-3,
    "empty": "turn",
    "filter": "none",
    "reward_temperature_end": 1.0,
}


def toy_settings(**changed):
    return RGFNSettings(**TOY | changed)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(before, model):
    "Names of the weights that have changed."
    return [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]


def all_texts(model, processor, turns, most, least=0):
    "Every rationale of `least` to `most` tokens that can be drawn."
    banned = {turns.stop, processor.tokenizer.eos_token_id, *image_token_ids(model)}
    actions = [i for i in range(len(processor.tokenizer)) if i not in banned]
    return [list(z) for n in range(least, most + 1) for z in itertools.product(actions, repeat=n)]


@torch.no_grad()
def drawn_law(model, processor, turns, inputs, texts, most, least=0):
    "The chance of each text to be drawn, from the logits of plain forwards, one for each text."
    never = [processor.tokenizer.eos_token_id, *image_token_ids(model)]
    chances = []
    for z in texts:
        whole = follow(model, inputs, [[*turns.opening, *z]])
        logits = model(**whole).logits[0, -len(z) - 1 :]
        logits[:, [i for i in never if i != turns.stop]] = -torch.inf
        logits[:least, turns.stop] = -torch.inf
        law = logits.softmax(-1)
        end = 1.0 if len(z) == most else law[-1, turns.stop].item()
        chances.append(law[range(len(z)), z].prod().item() * end)
    return torch.tensor(chances)


@torch.no_grad()
def whole_logprobs(model, turns, inputs, texts, bounds=FREE):
    logprobs, stops = sampler_scores(model, turns, inputs, texts, bounds=bounds)
    return torch.stack([z.sum() + end[-1] for z, end in zip(logprobs, stops, strict=True)])


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize(("least", "empty", "steps"), [(0, "turn", 150), (1, "off", 100)])
def test_the_sampler_draws_the_exact_posterior(least, empty, steps):
    "P(Z | X, Y) over all 183 rationales of up to two tokens, on a real vision-language model; what is drawn is compared."
    model, processor = toy()
    turns, rows = turns_of(processor, "section"), toy_rows()
    inputs, texts = encode_questions(processor, rows), all_texts(model, processor, turns, 2, least)
    answer = answer_ids(turns, processor, "b")
    joint = torch.stack([r[-1] for r in token_rewards(model, turns, inputs, texts, answer, empty="turn")])
    bounds = (model, processor, turns, inputs, texts, 2, least)
    posterior, prior = joint.softmax(0), drawn_law(*bounds)
    assert len(texts) == 183 - least and prior.sum() == pytest.approx(1, abs=1e-4)
    assert total_variation(prior, posterior) > 0.7  # there is something to learn
    more = {"decay": "linear", "reference": False, "empty": empty, "min_tokens": least}
    log, settings = [], toy_settings(steps=steps, rationales=48, max_tokens=2, lr=3e-3, **more)
    train_rgfn(model, processor, rows, settings, progress=lambda _, metrics: log.append(metrics))
    sampler = drawn_law(*bounds)
    assert sampler.sum() == pytest.approx(1, abs=1e-4) and total_variation(sampler, posterior) < 0.05
    likely = posterior > 0.02
    assert likely.sum() > 5 and (sampler[likely] / posterior[likely]).log().abs().max() < 0.6  # all modes
    assert log[-1]["residual"] < 0.3 * log[0]["residual"]
    drawn = draw_rationales(model, processor, turns, rows, n=2000, min_tokens=least, max_tokens=2, seed=0)[0]
    counts = Counter(tuple(z.token_ids) for z in drawn)
    shares = torch.tensor([counts[tuple(z)] / 2000 for z in texts])
    assert shares.sum() == pytest.approx(1) and total_variation(shares[likely], sampler[likely]) < 0.04


def test_no_rationale_at_all_is_worth_nothing_where_there_is_a_minimum():
    "`empty` changes nothing then: the state before any token is no end."
    trained = []
    for empty in ("turn", "off"):
        model, processor = toy()
        train_rgfn(model, processor, toy_rows(2), toy_settings(empty=empty, min_tokens=1))
        trained.append(weights(model))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def words_paid(text):
    "A point for each `b` and each `user` in a rationale."
    thought = text.partition("</think>")[0]
    return float(thought.count("b") + thought.count("user"))


class Paid:
    "A rubric written by hand."

    reward_weights = (1.0,)
    reward_funcs = (lambda completions, **columns: [words_paid(c[0]["content"]) for c in completions],)


def test_a_rubric_leads_to_prior_times_exponential_reward():
    "q(Z) proportional to pi(Z) exp(r / tau), for the same rubric object as GRPO's."
    model, processor = toy(scale=5.0)
    turns, rows = turns_of(processor, "section"), toy_rows()
    inputs, texts = encode_questions(processor, rows), all_texts(model, processor, turns, 1)
    said = [processor.tokenizer.decode(z, skip_special_tokens=True) for z in texts]
    points, prior = torch.tensor([words_paid(text) for text in said]), whole_logprobs(model, turns, inputs, texts)
    target, tau = (prior + points / 0.4).softmax(0), {"reward_temperature": 0.4, "reward_temperature_end": 0.4}
    bounds = (model, processor, turns, inputs, texts, 1)
    assert total_variation(drawn_law(*bounds), target) > 0.25
    settings = toy_settings(steps=40, rationales=32, max_tokens=1, lr=3e-3, decay="linear", balance="group", **tau)
    train_rgfn(model, processor, rows, settings, rubric=Paid)
    assert total_variation(drawn_law(*bounds), target) < 0.05


def test_adapters_learn_and_the_base_stays_bit_by_bit():
    model, processor = toy(layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log = []
    rows = toy_rows(2, rationale="a")
    settings = toy_settings(steps=3, questions_per_step=2, lora_rank=2, freeze_vision=True)
    adapted = train_rgfn(model, processor, rows, settings, progress=lambda _, metrics: log.append(metrics))
    assert not adapted.training and "forward" not in vars(adapted.get_base_model())
    base = {name.replace(".base_layer", ""): v for name, v in adapted.get_base_model().state_dict().items()}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
    assert len({m["log_reward/reference"] for m in log}) == 1  # of both rows at every step: the answerer is frozen
    with adapted.disable_adapter():
        turns = turns_of(processor, "section")
        inputs = encode_questions(processor, rows[:1])
        plain, _ = toy(layers=2)
        texts = [[14], [14, 15]]
        one, two = whole_logprobs(adapted, turns, inputs, texts), whole_logprobs(plain, turns, inputs, texts)
        assert torch.equal(one, two)


def test_the_answerer_of_full_training_is_a_copy_of_the_beginning():
    model, processor = toy()
    log, rows = [], toy_rows(rationale="a b")
    before = weights(model)
    train_rgfn(
        model, processor, rows, toy_settings(steps=3), progress=lambda _, m: log.append(m["log_reward/reference"])
    )
    assert len(set(log)) == 1 and moved(before, model)
    given, _ = toy(seed=2)  # another answerer pays otherwise, and is left alone
    kept, model = weights(given), toy()[0]
    train_rgfn(
        model,
        processor,
        rows,
        toy_settings(),
        frozen=given.eval(),
        progress=lambda _, m: log.append(m["log_reward/reference"]),
    )
    assert log[-1] != log[0] and not moved(kept, given) and "forward" not in vars(given)


def test_the_vision_tower_stays():
    model, processor = toy()
    before = weights(model)
    train_rgfn(model, processor, toy_rows(), toy_settings(freeze_vision=True))
    assert not [name for name in moved(before, model) if "vision_tower" in name]
    assert [name for name in moved(before, model) if "projector" in name]


def test_flag_without_effect_is_refused():
    "A fault of the released code: what was said to be frozen was not, or the other way round."
    model, processor = toy()
    model.model.language_model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen and should be trainable"):
        train_rgfn(model, processor, toy_rows(), toy_settings())
    adapted = add_lora(toy()[0], 2)
    adapted.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trainable and should be frozen"):
        train_rgfn(adapted, processor, toy_rows(), toy_settings())


def test_adapters_that_are_there_go_on_learning():
    model, processor = toy()
    adapted = add_lora(model, 2)
    before = weights(adapted)
    assert train_rgfn(adapted, processor, toy_rows(), toy_settings()) is adapted
    assert moved(before, adapted) and all("lora_" in name for name in moved(before, adapted))
    with pytest.raises(ValueError, match="lora_rank: 4, but the policy has adapters already"):
        train_rgfn(adapted, processor, toy_rows(), toy_settings(lora_rank=4))


def test_nothing_kept_moves_nothing():
    model, processor = toy()
    before, log = weights(model), []
    nothing = {"filter": "sum", "tolerance": 0.0, "tolerance_end": 0.0, "reference": False}
    rows = toy_rows(rationale="a")
    train_rgfn(model, processor, rows, toy_settings(**nothing), progress=lambda _, m: log.append(m))
    assert not moved(before, model)
    assert [(m["kept_frac"], m["loss"], m["grad_norm"], m["trained_frac"]) for m in log] == [(0.0, 0.0, 0.0, 0.0)] * 2
    assert not [m for m in log if "residual" in m]
    train_rgfn(model, processor, rows, toy_settings(**nothing, weight_decay=0.1))
    assert moved(before, model)


def test_the_reference_alone_is_learnt_from():
    "With the replay on, a step that keeps nothing still has a loss."
    model, processor = toy()
    before, log = weights(model), []
    settings = toy_settings(filter="sum", tolerance=0.0, tolerance_end=0.0)
    train_rgfn(model, processor, toy_rows(rationale="a b"), settings, progress=lambda _, m: log.append(m))
    assert log[0]["kept_frac"] == 0 and log[0]["loss"] > 0 and moved(before, model)


def test_the_tolerance_is_annealed():
    model, processor = toy()
    log = []
    how = {"steps": 5, "filter": "mean", "anneal_steps": 4, "tolerance": 3.0, "reward_temperature_end": 0.6}
    train_rgfn(model, processor, toy_rows(rationale="a"), toy_settings(**how), progress=lambda _, m: log.append(m))
    assert [m["tolerance"] for m in log] == [3.0, 2.5, 2.0, 1.5, 1.0]
    assert [round(m["reward_temperature"], 9) for m in log] == [1.0, 0.9, 0.8, 0.7, 0.6]


def test_a_reference_that_is_too_long_is_left_out_and_told_once():
    model, processor = toy()
    log, rows = [], [*toy_rows(2, rationale="a b a b"), *(row | {"id": "short"} for row in toy_rows(1, rationale="a"))]
    settings = toy_settings(questions_per_step=3, filter="sum")
    with pytest.warns(
        UserWarning, match="2 of 3 reference rationales have more than 3 tokens, 'toy-0' for one"
    ) as told:
        train_rgfn(model, processor, rows, settings, progress=lambda _, m: log.append(m))
    assert len([w for w in told if "reference" in str(w.message)]) == 1
    assert [round(m["reference_unusable"], 6) for m in log] == [0.666667] * 2
    assert [round(m["reference_frac"], 6) for m in log] == [0.333333] * 2


@pytest.mark.parametrize("absent", [{}, {"rationale": ""}, {"rationale": None}])
def test_without_a_reference_all_is_kept_and_told_once(absent):
    model, processor = toy()
    log, settings = [], toy_settings(filter="mean")
    with pytest.warns(Notice, match="none of the 1 rows has a reference.*no effect of filter 'mean'") as told:
        train_rgfn(model, processor, toy_rows(**absent), settings, progress=lambda _, m: log.append(m))
    assert len([w for w in told if w.category is Notice]) == 1
    assert [(m["kept_frac"], m["reference_frac"], "log_reward/reference" in m) for m in log] == [(1.0, 0.0, False)] * 2


def test_empty_rationales_and_least_lengths(tmp_path):
    model, processor = toy()
    run = Run.open(tmp_path, "short", {}, "0")
    train_rgfn(model, processor, toy_rows(), toy_settings(max_tokens=1, rationales=32, balance="group"), run=run)
    found = run.rollouts()
    assert set(found.n_tokens) == {0, 1} and "<think></think>" in set(found.completion)
    assert found.log_reward.notna().all() and run.metrics().loss.notna().all()
    train_rgfn(model, processor, toy_rows(), toy_settings(min_tokens=2, max_tokens=2, rationales=16), run=run)
    assert set(run.rollouts().n_tokens) == {2}


def test_what_a_run_holds(tmp_path):
    model, processor = toy()
    run = Run.open(tmp_path, "run", {}, "0")
    settings = toy_settings(questions_per_step=2, rollouts_every=2, filter="sum", tolerance=1.0)
    shown = {"classify": lambda completion, solution: "a" if "a" in completion else "none", "behaviours": ("none", "b")}
    train_rgfn(model, processor, toy_rows(2, rationale="a"), settings, run=run, **shown)
    metrics = run.metrics()
    names = {"loss", "kept_frac", "log_reward", "log_reward/reference", "residual", "rationale_tokens", "stop_rate"}
    assert names | {"tolerance", "reward_temperature", "behaviour/none", "behaviour/b"} <= {*metrics.columns}
    assert {"sample/seconds", "reward/seconds", "score/seconds", "seconds"} <= {*run.timings().columns}
    assert not [name for name in metrics if "seconds" in name] and (run.timings()["score/seconds"] > 0).all()
    assert run.rollout_steps() == [1] and len(found := run.rollouts()) == 8
    assert {*found.row_id} == {"toy-0", "toy-1"} and {*found["sample"]} == {0, 1, 2, 3}
    assert found.log_q.notna().tolist() == found.kept.tolist() and found.kept.nunique() == 2
    assert metrics.kept_frac[0] == found.kept.mean()
    assert math.isclose(metrics.log_reward[0], found.log_reward.mean(), rel_tol=1e-6)
    assert [split_text(text)[1] for text in found.completion] == [None] * 8


def test_log_rewards_and_log_q_are_those_of_the_ids_that_were_drawn(tmp_path, monkeypatch):
    "At step 1 the sampler is the answerer: what is stored can be made again from the drawn ids, without their text."
    model, processor = toy()
    run, seen, original = Run.open(tmp_path, "run", {}, "0"), [], step.draw_rationales
    monkeypatch.setattr(step, "draw_rationales", lambda *a, **o: seen.extend(original(*a, **o)) or seen[-1:])
    same, rows = copy.deepcopy(model), toy_rows()
    train_rgfn(model, processor, rows, toy_settings(steps=1, rationales=8), run=run)
    turns, texts = turns_of(processor, "section"), [z.token_ids for z in seen[0]]
    inputs, found = encode_questions(processor, rows), run.rollouts()
    again = token_rewards(same, turns, inputs, texts, answer_ids(turns, processor, "b"), empty="turn")
    torch.testing.assert_close(torch.tensor(found.log_reward), torch.stack([r[-1] for r in again]).double())
    bounds = Bounds(max_tokens=3, never=tuple(never_drawn(same, processor, turns.stop)))
    want = whole_logprobs(same, turns, inputs, texts, bounds)
    torch.testing.assert_close(torch.tensor(found.log_q), want.double(), atol=1e-4, rtol=1e-4)


def test_with_a_rubric_a_run_holds_answers_and_points(tmp_path):
    model, processor = toy()
    run = Run.open(tmp_path, "run", {}, "0")
    rubric = Rubric(
        {"some": lambda completion, solution: float(len(completion) % 2), "idle": (lambda completion: None, 0.0)}
    )
    train_rgfn(model, processor, toy_rows(), toy_settings(balance="group"), rubric=rubric, run=run)
    found = run.rollouts()
    assert found.completion.str.contains("<answer>").all()
    assert found.reward.tolist() == [float(len(text) % 2) for text in found.completion]
    assert math.isclose(run.metrics().reward.mean(), found.reward.mean(), rel_tol=1e-6)


def test_a_rubric_that_cannot_score_keeps_nothing_and_a_broken_one_stops():
    model, processor = toy()
    before, log = weights(model), []

    class Silent:
        reward_weights = (1.0,)
        reward_funcs = (lambda completions, **columns: [None] * len(completions),)

    class Broken:
        reward_weights = (1.0,)
        reward_funcs = (lambda completions, **columns: [math.nan] * len(completions),)

    settings = toy_settings(balance="group")
    train_rgfn(model, processor, toy_rows(), settings, rubric=Silent, progress=lambda _, m: log.append(m))
    assert not moved(before, model) and [m["kept_frac"] for m in log] == [0.0, 0.0] and "reward" not in log[0]
    with pytest.raises(ValueError, match="nan for row 'toy-0'"):
        train_rgfn(model, processor, toy_rows(), settings, rubric=Broken)


def test_a_rubric_that_cannot_score_is_told_once():
    rubric = Rubric({"mute": lambda completion, boxes: None, "sound": lambda completion: float(len(completion) % 2)})
    rows = [{**row, "boxes": None} for row in toy_rows()]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train_rgfn(*toy(), rows, toy_settings(balance="group", steps=9), rubric=rubric)
    (line,) = [str(one.message) for one in heard if "could score none" in str(one.message)]
    assert line.startswith("reward 'mute' ") and "nothing in 'boxes'; vlm-reward validate" in line


def test_a_step_may_be_split():
    "Two questions in one micro-batch, or one in each of two: the same drawn texts, metrics and weights."
    models, logs = [], []
    for accumulate in (1, 2):
        model, processor = toy()
        log = []
        settings = toy_settings(questions_per_step=2, accumulate=accumulate, explore=0.5, steps=3)
        train_rgfn(model, processor, toy_rows(4, rationale="a"), settings, progress=lambda _, m, log=log: log.append(m))
        models.append(model)
        logs.append(log)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        assert all(math.isclose(one[name], two[name], rel_tol=1e-3, abs_tol=1e-4) for name in one)
        assert one["rationale_tokens"] == two["rationale_tokens"]


def test_the_same_seed_gives_the_same_run():
    def log(seed):
        model, processor = toy()
        told = []
        train_rgfn(
            model, processor, toy_rows(4), toy_settings(seed=seed, lora_rank=2), progress=lambda _, m: told.append(m)
        )
        return told

    assert log(0) == log(0) != log(1)


class StopAfter(TrainerCallback):
    "Break off, as a job that is killed does."

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **_):
        if state.global_step > self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", [{}, {"lora_rank": 2}, {"accumulate": 2, "decay": "linear"}], ids=str)
def test_six_steps_are_three_and_three(tmp_path, how):
    settings = toy_settings(steps=6, questions_per_step=2, save_every=3, explore=0.5, warmup=2, **how)
    rows, whole = toy_rows(5, rationale="a"), Run.open(tmp_path, "whole", {}, "0")
    straight = train_rgfn(toy()[0], toy()[1], rows, settings, run=whole)
    broken = Run.open(tmp_path, "broken", {}, "0")
    with pytest.raises(KeyboardInterrupt):
        train_rgfn(toy()[0], toy()[1], rows, settings, run=broken, callbacks=[StopAfter(4)])
    shutil.copytree(broken.checkpoints / "checkpoint-3", broken.checkpoints / "checkpoint-5")
    (broken.checkpoints / "checkpoint-5" / "trainer_state.json").unlink()  # one that was not written to its end
    resumed = train_rgfn(toy()[0], toy()[1], rows, settings, run=broken, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    a, b = whole.metrics(), broken.metrics()
    assert a.step.tolist() == b.step.tolist() == [1, 2, 3, 4, 5, 6] and a.equals(b[a.columns])
    assert whole.rollouts().equals(broken.rollouts()[whole.rollouts().columns])


def test_a_leak_is_looked_for_in_the_steps_before_a_resume_too(tmp_path, monkeypatch):
    heard, run = [], Run.open(tmp_path, "run", {}, "0")
    settings, rows = toy_settings(steps=5, save_every=3), toy_rows(rationale="a")
    with pytest.raises(KeyboardInterrupt):
        train_rgfn(*toy(), rows, settings, run=run, callbacks=[StopAfter(4)])
    before = run.metrics().loss.tolist()
    monkeypatch.setattr(rgfn, "leak_warning", lambda steps: heard.append([m["loss"] for m in steps]))
    train_rgfn(*toy(), rows, settings, run=run, resume=True)
    assert [len(losses) for losses in heard] == [4, 5]
    assert heard[0][:3] == pytest.approx(before[:3]) and run.metrics().step.tolist() == [1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint_begins(tmp_path):
    run = Run.open(tmp_path, "run", {}, "0")
    train_rgfn(*toy(), toy_rows(), toy_settings(), run=run, resume=True)
    assert run.metrics().step.tolist() == [1, 2]


def test_a_longer_run_sees_the_same_questions():
    assert question_order(5, 12, 3) == question_order(5, 20, 3)[:12]
    assert [sorted(question_order(5, 15, 3)[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert question_order(5, 5, 3) != question_order(5, 5, 4)


REFUSED = {
    "the data set is empty": {"rows": []},
    "questions_per_step: 3 questions need as many rows, got 2": {"questions_per_step": 3},
    "2 questions cannot be split into 3 micro-batches": {"questions_per_step": 2, "accumulate": 3},
    "min_tokens: 4 is more than max_tokens, 3": {"min_tokens": 4},
    "balance: a rubric pays whole rationales, so want 'group', got 'subtb'": {"rubric": Paid},
    "balance: 'group' compares rationales": {"balance": "group", "rationales": 1, "reference": False},
    "save_every: 1, but there is no run folder": {"save_every": 1},
    "resume: True, but there is no run folder": {"resume": True},
    "trainer.warmup_step: TrainingArguments has no such field; did you mean warmup_steps": {
        "trainer": {"warmup_step": 1}
    },
    "trainer.foo: TrainingArguments has no such field; transformers' documentation lists them$": {
        "trainer": {"foo": 1}
    },
    "rationales: want at least 1, got 0": {"rationales": 0},
    "explore: want at most 1, got 2": {"explore": 2.0},
    "gamma: want at most 1, got 1.5": {"gamma": 1.5},
    "filter: want one of sum, mean, none, got 'summ'": {"filter": "summ"},
    "unknown layout|layout: want one of": {"layout": "turns"},
    "row 'toy-0': the answer .* has no tokens": {"rows": toy_rows(1, solution=None)},
    "row 'toy-0': .*</think>": {"rows": toy_rows(1, rationale="a </think> b")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    changed = dict(REFUSED[message])
    more = {name: changed.pop(name) for name in ("rubric", "resume") if name in changed}
    model, processor = toy()
    before = weights(model)
    with pytest.raises(ValueError, match=message) as error:
        train_rgfn(model, processor, changed.pop("rows", toy_rows(2)), toy_settings(**changed), **more)
    assert "\n" not in str(error.value) and not moved(before, model)


def test_the_sampler_cannot_be_its_own_frozen_answerer():
    model, processor = toy()
    with pytest.raises(ValueError, match="frozen copy is the sampler itself"):
        train_rgfn(model, processor, toy_rows(), toy_settings(), frozen=model)
    assert "forward" not in vars(model)


def test_further_fields_reach_transformers():
    settings = toy_settings(trainer={"adam_beta2": 0.5})
    assert training_arguments(settings, "unused").adam_beta2 == 0.5
    trained = []
    for some in (settings, toy_settings()):
        model, processor = toy()
        train_rgfn(model, processor, toy_rows(), some)
        trained.append(weights(model))
    assert any(not torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "smolvlm"])
@pytest.mark.parametrize("rank", [0, 2])
def test_every_family_is_trained(family, rank):
    model, processor = specimen(family)
    log, rows = [], toy_rows(2, rationale="see")
    before, settings = weights(model), toy_settings(layout="turn", lora_rank=rank, questions_per_step=2, steps=1)
    text_only = make_row(id="text", task="toy", question="no picture ?", images=[], solution="b")
    trained = train_rgfn(model, processor, [*rows, text_only], settings, progress=lambda _, m: log.append(m))
    assert math.isfinite(log[0]["loss"]) and log[0]["loss"] > 0 and log[0]["grad_norm"] > 0
    assert moved(before, model) if not rank else any(p.any() for n, p in trained.named_parameters() if "lora_B" in n)


def test_training_leaves_a_policy_that_can_be_copied():
    model, processor = toy()
    train_rgfn(model, processor, toy_rows(), toy_settings())
    assert not model.training and model.config.use_cache is not False
    same = frozen_copy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    inputs = encode_questions(processor, toy_rows())
    assert same(**inputs).logits.abs().max() > 0


SHARED = {"questions_per_step": 4, "filter": "sum", "tolerance": 1.0, "trainer": {"optim": "sgd"}}


def told_texts(model, processor, turns, rows, settings):
    "The same two or three rationales for a row, whoever asks."
    two = [[Rationale([14], True, "a"), Rationale([15, 14 + int(row["id"][-1]) % 2], True, "b")] for row in rows]
    return [some + [Rationale([15], True, "b")] * (row["id"] == "toy-3") for some, row in zip(two, rows, strict=True)]


def cannot_be_packed(model):
    return "a reason"


def half(rank, port, folder, packed):
    "One of two processes that train together."
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    rgfn.draw_step = told_texts
    if not packed:
        subtb.packing_problem = token_reward.packing_problem = cannot_be_packed
    model, processor = toy()
    run = Run.open(folder, "both", {}, "0") if not rank else None
    settings = toy_settings(**SHARED | {"filter": "sum" if packed else "none"})
    train_rgfn(model, processor, toy_rows(4, rationale="a"), settings, run=run)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then wait for each other when they are taken down


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one text per forward"])
def test_two_processes(in_two_processes, tmp_path, monkeypatch, packed):
    """They draw and score two questions each, and arrive where one process arrives that has all four.

    A model that cannot be packed reads one text per forward, and one process may have more texts than the other.
    """
    in_two_processes(half, tmp_path, packed)
    monkeypatch.setattr(rgfn, "draw_step", told_texts)
    model, processor = toy()
    run = Run.open(tmp_path, "alone", {}, "0")
    settings = toy_settings(**SHARED | {"filter": "sum" if packed else "none"})
    train_rgfn(model, processor, toy_rows(4, rationale="a"), settings, run=run)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, atol=1e-4, rtol=1e-3)
    together = Run(tmp_path / "both-0")
    assert sorted(together.rollouts(1).row_id) == sorted(run.rollouts(1).row_id)
    for name in ("loss", "log_reward", "kept_frac", "residual"):
        torch.testing.assert_close(
            torch.tensor(together.metrics()[name]), torch.tensor(run.metrics()[name]), rtol=1e-3, atol=1e-4
        )


def test_weights_of_16_bits_are_refused():
    "They round the steps of a small learning rate away: hardly any weight moves, and nothing tells."
    model, processor = toy()
    fine, coarse = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64).to(torch.bfloat16)
    for layer in (fine, coarse):
        before, optimizer = layer.weight.detach().clone(), torch.optim.AdamW(layer.parameters(), lr=1e-5)
        layer(torch.ones(1, 64, dtype=layer.weight.dtype)).sum().backward()
        optimizer.step()
        still = (layer.weight == before).float().mean()
        assert still < 0.01 if layer is fine else still > 0.95
    with pytest.raises(ValueError, match=r"trained in torch\.bfloat16, which rounds steps of 0\.001 away") as error:
        train_rgfn(model.to(torch.bfloat16), processor, toy_rows(), toy_settings())
    assert "\n" not in str(error.value) and "forward" not in vars(model)


@pytest.mark.parametrize("trainer", [{}, {"bf16": True}], ids=str)
def test_adapters_on_a_base_of_16_bits_learn_in_32(trainer):
    model, processor = toy(scale=5.0)
    log = []
    settings = toy_settings(steps=3, lora_rank=2, lr=1e-5, trainer=trainer)
    trained = train_rgfn(model.to(torch.bfloat16), processor, toy_rows(), settings, progress=lambda _, m: log.append(m))
    learnt = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    assert learnt and {p.dtype for p in learnt.values()} == {torch.float32}
    assert trained.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert all(p.any() for n, p in learnt.items() if "lora_B" in n) and all(math.isfinite(m["loss"]) for m in log)


def test_float32_weights_are_trained_in_bfloat16():
    "The remedy: the steps are small, and every layer takes them."
    model, processor = toy(scale=5.0)
    before, log = weights(model), []
    settings = toy_settings(lr=1e-5, trainer={"bf16": True})
    train_rgfn(model, processor, toy_rows(), settings, progress=lambda _, m: log.append(m))
    assert [n for n in moved(before, model) if "q_proj" in n] and math.isfinite(log[-1]["loss"])


STAGE3, STAGE2 = ({"zero_optimization": {"stage": stage}} for stage in (3, 2))


@pytest.mark.parametrize("trainer", [{"fsdp": True}, {"fsdp": "full_shard"}, {"deepspeed": STAGE3}, "file"], ids=str)
def test_split_weights_are_refused_by_their_settings(trainer, tmp_path):
    if trainer == "file":
        (tmp_path / "zero3.json").write_text(json.dumps(STAGE3))
        trainer = {"deepspeed": str(tmp_path / "zero3.json")}
    model, processor = toy()
    with pytest.raises(ValueError, match=r"(DeepSpeed ZeRO-3|FSDP) splits the weights.*use DDP") as error:
        train_rgfn(model, processor, toy_rows(), toy_settings(trainer=trainer))
    assert "\n" not in str(error.value)


def test_split_weights_are_refused_if_the_launcher_splits_them(monkeypatch):
    "As accelerate's state tells, whoever set it up; the first two stages of ZeRO split none."
    states = {
        "DeepSpeed ZeRO-3": SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=STAGE3)),
        "FSDP": SimpleNamespace(fsdp_plugin=object()),
        None: SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=STAGE2), fsdp_plugin=None),
    }
    assert {name: sharding_found(state) for name, state in states.items()} == {name: name for name in states}
    assert sharding_found(AcceleratorState()) is None
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", SimpleNamespace(activation_checkpointing=False), raising=False)
    model, processor = toy()
    with pytest.raises(ValueError, match="FSDP splits the weights"):
        train_rgfn(model, processor, toy_rows(), toy_settings())
    assert "forward" not in vars(model)


def leaky(**changed):
    "The pocket, for some steps; what is warned of, and the metrics."
    from vlm_reward.data.hub import load_rows
    from vlm_reward.policy.families import load_policy

    how = {"layout": "section", "max_tokens": 24, "lr": 1e-4, "steps": 22} | changed
    log = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = load_rows("scenes/relation", n=64)
        train_rgfn(*load_policy("pocket"), rows, RGFNSettings(**how), progress=lambda _, m: log.append(m))
    return [str(w.message) for w in told if "leaks" in str(w.message)], log


def test_a_leak_is_told_once():
    "With the paper's R_0, no least length and the filter on, the loss falls and the sampler is ruined."
    told, log = leaky(empty="off")
    assert len(told) == 1 and "\n" not in told[0] and "set filter to 'none'" in told[0]
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["log_reward"] < log[0]["log_reward"] - 3


def test_the_defaults_do_not_leak():
    told, log = leaky()
    assert not told and log[-1]["log_q/reference"] > log[0]["log_q/reference"]

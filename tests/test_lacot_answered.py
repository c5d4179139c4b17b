"GRPO on rationales through TRL: prompts by ids, one answer per rationale, rewards by hand, and nothing left behind."

import copy
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image

from vlm_reward.core.rows import make_row
from vlm_reward.core.runs import Run
from vlm_reward.data.behaviours import classify
from vlm_reward.lacot import answered as module
from vlm_reward.lacot.answered import (
    AnsweredRubric,
    ending_at,
    only_stop,
    rationale_processor,
    train_answered,
)
from vlm_reward.lacot.drawing import write_answers
from vlm_reward.lacot.pair import add_lora, frozen_copy
from vlm_reward.lacot.token_reward import reward_parts, token_rewards
from vlm_reward.lacot.turns import answer_ids, encode_questions, follow, scored_text, split_text, turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.policy.specimens import SPECIMENS, specimen
from vlm_reward.rewards.accuracy import accuracy_reward
from vlm_reward.rewards.format import format_reward
from vlm_reward.rewards.length import overlong_reward
from vlm_reward.rewards.presets import PRESETS
from vlm_reward.rewards.rubric import Rubric
from vlm_reward.train.grpo import GRPOSettings
from vlm_reward.worlds.scenes import scene_rows

RUBRIC = Rubric(
    {
        "accuracy": accuracy_reward,
        "format": (format_reward, 0.5),
        "long": (
            lambda completion, completion_ids: overlong_reward(completion, completion_ids, max_length=9, cache=8),
            1,
        ),
    }
)


@pytest.fixture
def pocket():
    return load_policy("pocket")


@pytest.mark.parametrize("layout", ["turn", "section"])
@pytest.mark.parametrize("family", SPECIMENS)
def test_prompts_are_question_and_opening_by_ids(family, layout):
    model, processor = specimen(family)
    turns = turns_of(processor, layout)
    opened = rationale_processor(processor, turns)
    pictures = [Image.new("RGB", (40, 32)), Image.new("RGB", (64, 30))]
    rows = [make_row(id=str(i), task="t", question="?" * i, images=[p], solution="a") for i, p in enumerate(pictures)]
    found, want = encode_prompts(opened, rows), follow(model, encode_questions(processor, rows), [turns.opening] * 2)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in found)
    assert opened.tokenizer.eos_token_id == turns.stop
    assert processor.tokenizer.eos_token == "<|im_end|>" and turns_of(processor, layout) == turns


def test_several_templates_are_refused(pocket):
    processor = copy.copy(pocket[1])
    processor.chat_template = {"default": processor.chat_template, "tools": "x"}
    with pytest.raises(ValueError, match="want one text"):
        rationale_processor(processor, turns_of(pocket[1]))


def test_templates_that_cannot_be_opened_are_refused(pocket):
    processor = copy.copy(pocket[1])
    processor.chat_template = processor.chat_template + "{% set asked = false %}"
    with pytest.raises(ValueError, match="opens a rationale as"):
        rationale_processor(processor, turns_of(pocket[1]))


class Told(AnsweredRubric):
    "Remembers what was answered."

    def answers(self, rows, rationales):
        found = super().answers(rows, rationales)
        self.log = [*getattr(self, "log", []), (rows, [list(z) for z in rationales], found)]
        return found


@pytest.mark.parametrize("layout", ["turn", "section"])
def test_real_steps_are_paid_as_the_whole_text_is_paid_by_hand(pocket, tmp_path, layout):
    "Three steps; in the layout `turn` the pocket was taught nothing, which is mechanics enough."
    model, processor = pocket
    turns, pi = turns_of(processor, layout), frozen_copy(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    told = Told(RUBRIC, pi, processor, turns, max_tokens=6)
    rows, by_id = (some := scene_rows("relation", 4, seed=3)), {row["id"]: row for row in some}
    stage = GRPOSettings(steps=3, prompts_per_step=2, group_size=4, lr=1e-3, warmup=0, max_new_tokens=12)
    run, log = Run.open(tmp_path, "answered", {}, "0"), []
    trained = train_answered(
        model, processor, rows, told, stage, run=run, classify=classify, progress=lambda _, m: log.append(m)
    )
    assert len(told.log) == 3  # once per batch, for three rewards
    table = pd.concat([run.rollouts(step) for step in run.rollout_steps()]).to_dict("records")
    asked = [(row, z, y) for batch in told.log for row, z, y in zip(*batch, strict=True)]
    assert len(table) == len(asked) == 24
    for line, (asked_row, z, y) in zip(table, asked, strict=True):
        row = by_id[line["row_id"]]
        assert asked_row["id"] == row["id"] and asked_row["images"][0].tobytes() == row["images"][0].tobytes()
        assert line["completion"] == scored_text(processor.tokenizer.decode(z, skip_special_tokens=True), y.text)
        assert line["n_tokens"] in (len(z), len(z) + 1)  # cut off, or with T
        scores = RUBRIC.score(line["completion"], **row, completion_ids=[0] * line["n_tokens"])
        assert {name: line[f"rewards/{name}"] for name in ("accuracy", "format", "long")} == pytest.approx(
            {name: points for name, points in scores.items() if name != "total"}
        )
        assert line["reward"] == pytest.approx(scores["total"])
        assert line["behaviour"] == classify(line["completion"], row["objects"], row["choices"], row["relation"])
    means = pd.DataFrame(table)["reward"].groupby(lambda i: i // 8).mean()
    assert len(log) == 3 and log[0]["reward"] == pytest.approx(means[0], abs=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in pi.state_dict().items())
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    fresh = load_policy("pocket")[0]
    assert trained.generation_config.eos_token_id == fresh.generation_config.eos_token_id
    assert trained.config.text_config.eos_token_id == fresh.config.text_config.eos_token_id
    assert run.timings().columns.str.contains("answer/seconds").any()


def test_adapters_are_switched_off_while_answers_are_written(pocket):
    "The answers of a policy whose adapters do much are those of the policy under them."
    model, processor = pocket
    turns, rows = turns_of(processor, "section"), scene_rows("relation", 6, seed=4)
    thoughts = [processor.tokenizer("it looks like it")["input_ids"]] * 6
    plain = [a.text for a in write_answers(model, processor, turns, rows, thoughts, temperature=0)]
    adapted = add_lora(model, 4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    loud = [a.text for a in write_answers(adapted, processor, turns, rows, thoughts, temperature=0)]
    told = AnsweredRubric(RUBRIC, adapted, processor, turns, temperature=0)
    assert [a.text for a in told.answers(rows, thoughts)] == plain != loud


def test_adapters_alone_are_trained(pocket):
    model, processor = pocket
    adapted = add_lora(model, 4)
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    told = Told(RUBRIC, adapted, processor, turns_of(processor, "section"))
    stage = GRPOSettings(steps=2, prompts_per_step=2, group_size=4, lr=1e-2, warmup=0, max_new_tokens=12)
    train_answered(adapted, processor, scene_rows("relation", 4, seed=3), told, stage)
    moved = {name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name for name in moved)


def batch_of(row, ids, completions=None, **more):
    n = len(ids)
    columns = {name: [value] * n for name, value in row.items() if name not in ("prompt", "answer_type")}
    said = [[{"role": "assistant", "content": "?"}] for _ in ids] if completions is None else completions
    return columns | {"prompts": [row["prompt"]] * n, "completions": said, "completion_ids": ids} | more


def test_every_function_of_a_batch_reads_the_same_answers_and_the_next_batch_new_ones(pocket):
    "Also if the next batch is the same, and if ids come in new lists."
    model, processor = pocket
    turns = turns_of(processor, "section")
    told = Told(RUBRIC, frozen_copy(model), processor, turns)
    row, z = scene_rows("relation", 1, seed=5)[0], processor.tokenizer("it looks like it")["input_ids"]
    texts = []
    for _ in range(2):
        for function in told.reward_funcs:
            batch = batch_of(row, [[*z, turns.stop] for _ in range(8)])
            function(**batch)
            texts.append([message[0]["content"] for message in batch["completions"]])
    assert len(told.log) == 2
    assert texts[0] == texts[1] == texts[2] and texts[3] == texts[4] == texts[5]
    assert texts[0] != texts[3]  # sixteen guesses at temperature 1


def test_texts_are_rewritten_like_messages_and_sections_are_there(pocket):
    "A row that wants the plain answer is judged by the answerer's."
    model, processor = pocket
    turns = turns_of(processor, "section")
    told = AnsweredRubric(RUBRIC, frozen_copy(model), processor, turns, temperature=0)
    row = scene_rows("relation", 1, seed=5)[0] | {"sections": []}
    ids = [processor.tokenizer("it looks like it")["input_ids"]]
    batch = batch_of(row, ids, completions=["raw"])
    points = told.reward_funcs[0](**batch)
    answer = split_text(batch["completions"][0])[1]
    assert answer in ("left", "right", "above", "below") and points == [float(answer == row["solution"])]


@pytest.mark.parametrize("layout", ["turn", "section"])
def test_likelihoods_are_those_of_the_answerer_row_by_row(pocket, layout):
    "What a rationale is paid does not depend on what else is in the batch; a row without a gold answer is not paid."
    model, processor = pocket
    turns, rows = turns_of(processor, layout), scene_rows("relation", 3, seed=5)
    rows[2] = {**rows[2], "solution": None}
    asked = []

    def likely(completion, token_log_reward, answer_logprob, answer_tokens):
        asked.append((token_log_reward, answer_logprob, answer_tokens))
        return None if token_log_reward is None else token_log_reward[-1]

    told = AnsweredRubric(Rubric({"likely": likely, "again": likely}), frozen_copy(model), processor, turns)
    assert told.columns == ()
    thoughts = ["it looks like it", "red circle a 2", "it looks like it", ""]
    zs, which = [processor.tokenizer(text)["input_ids"] for text in thoughts], [0, 1, 2, 0]
    batch = {
        "prompts": [rows[i]["prompt"] for i in which],
        "completions": [[{"role": "assistant", "content": "?"}] for _ in which],
        "completion_ids": [[*z, turns.stop] for z in zs],
        **{name: [rows[i][name] for i in which] for name in ("id", "images", "solution")},
    }
    points = [function(**batch) for function in told.reward_funcs]
    assert points[0] == points[1] and points[0][2] is None and asked[2] == (None, None, None)
    for i in (0, 1, 3):
        row, (states, answer, size) = rows[which[i]], asked[i]
        gold = answer_ids(turns, processor, row["solution"])
        want = token_rewards(model, turns, encode_questions(processor, [row]), [zs[i]], gold, empty="turn")[0]
        assert states == pytest.approx(want.tolist(), abs=1e-3) and size == len(gold)
        assert points[0][i] == pytest.approx(want[-1].item(), abs=1e-3)
        assert want[-1].item() < answer < 0


@pytest.mark.parametrize("asked", [("answer_logprob",), ("answer_tokens", "answer_logprob"), ("token_log_reward",)])
def test_states_are_scored_if_they_are_asked_for(pocket, asked, monkeypatch):
    "A rubric that asks for the answer alone has the last state of each rationale scored, and gets the same values."
    model, processor = pocket
    turns, rows = turns_of(processor, "section"), scene_rows("relation", 2, seed=5)
    both = SimpleNamespace(columns=module.LIKELIHOODS, reward_funcs=[], reward_weights=[])
    some = SimpleNamespace(columns=asked, reward_funcs=[], reward_weights=[])
    zs, rows = [[9, 10, 11], [], [12]], [rows[0], rows[0], rows[1]]
    frozen, states, chunks = frozen_copy(model), [], set()
    whole = AnsweredRubric(both, frozen, processor, turns).likelihoods(rows, zs)

    def watched(*args, chunk, **options):
        chunks.add(chunk)
        parts = reward_parts(*args, chunk=chunk, **options)
        states.extend(len(part.at) for part in parts)
        return parts

    monkeypatch.setattr(module, "reward_parts", watched)
    found = AnsweredRubric(some, frozen, processor, turns, chunk=5).likelihoods(rows, zs)
    assert found.keys() == set(asked) and chunks == {5}
    for name in asked:
        for value, expected in zip(found[name], whole[name], strict=True):
            assert value == pytest.approx(expected, abs=1e-4)
    every = "token_log_reward" in asked  # state 0 belongs to the anchors of any interval
    assert states == [len(z) + 1 if every else min(2, len(z) + 1) for z in zs]


def test_a_step_on_the_log_reward(pocket):
    "GRPO paid by what the reference-guided trainer samples by."
    model, processor = pocket
    told = AnsweredRubric(PRESETS["lacot"].rubric, frozen_copy(model), processor, turns_of(processor, "section"))
    stage, log = GRPOSettings(steps=1, prompts_per_step=2, group_size=4, warmup=0, max_new_tokens=30), []
    train_answered(
        model, processor, scene_rows("relation", 2, seed=3), told, stage, progress=lambda _, m: log.append(m)
    )
    assert log[0]["rewards/log reward/mean"] == pytest.approx(log[0]["reward"]) and log[0]["reward"] < 0


def test_a_reward_that_scores_nothing_is_told_with_its_column(pocket):
    model, processor = pocket
    rubric = Rubric({"mute": lambda completion, boxes: None})
    told = AnsweredRubric(rubric, frozen_copy(model), processor, turns_of(processor, "section"))
    rows = [{**row, "boxes": None} for row in scene_rows("relation", 2, seed=3)]
    stage = GRPOSettings(steps=3, prompts_per_step=2, group_size=8, warmup=0, max_new_tokens=4)
    with pytest.warns(UserWarning, match="reward 'mute' could score none of .* its rows say nothing in 'boxes'"):
        train_answered(model, processor, rows, told, stage)


def test_padding_and_other_ends_do_not_belong_to_the_rationale(pocket):
    model, processor = pocket
    turns = turns_of(processor, "section")
    told = AnsweredRubric(RUBRIC, frozen_copy(model), processor, turns)
    end, pad = turns.closing[-1], processor.tokenizer.pad_token_id
    assert told.rationale([7, 8, turns.stop, pad, pad]) == [7, 8]
    assert told.rationale([7, 8, end, pad]) == [7, 8]
    assert told.rationale([7, 8]) == [7, 8] and told.rationale([]) == told.rationale([turns.stop]) == []
    said = only_stop(model, processor, turns)["generation_kwargs"]
    assert said["eos_token_id"] == turns.stop and {end, model.config.image_token_id} <= {*said["suppress_tokens"]}


def test_configurations_are_put_back_after_an_error(pocket):
    model, _ = pocket
    before = model.generation_config.eos_token_id, model.config.text_config.eos_token_id
    with pytest.raises(KeyError), ending_at(model, 9):
        assert model.config.text_config.eos_token_id == 9 and 9 in model.generation_config.eos_token_id
        raise KeyError
    assert (model.generation_config.eos_token_id, model.config.text_config.eos_token_id) == before


def test_an_answerer_that_learns_is_refused(pocket):
    with pytest.raises(ValueError, match="neither frozen nor has adapters"):
        AnsweredRubric(RUBRIC, pocket[0], pocket[1], turns_of(pocket[1]))


def test_observables_of_an_answer_that_the_policy_does_not_write_are_not_asked_for(pocket):
    def likes(completion, answer_logprob, plain_answer_logprob, image_attention, answer_type):
        return 0.0

    frozen = frozen_copy(pocket[0])
    told = AnsweredRubric(Rubric({"likes": likes}), frozen, pocket[1], turns_of(pocket[1]))
    assert told.columns == ("answer_type", "image_attention")
    assert module.SECTIONS == ("think", "answer")

"Lessons: labels by hand, the loss by hand, both kinds in one batch, and reasoning that can be switched off."

import copy
import pickle
from functools import partial

import pytest
import torch
from PIL import Image

from vlm_reward.core.rows import make_row
from vlm_reward.data.behaviours import demonstrate
from vlm_reward.lacot.lessons import Lesson, Lessons, encode_lessons, lesson_of
from vlm_reward.lacot.turns import encode_questions, follow, split_text, turns_of, whole_text
from vlm_reward.policy.families import load_policy
from vlm_reward.policy.sampling import sampling_config
from vlm_reward.policy.specimens import specimen
from vlm_reward.train.sft import IGNORED, SFTSettings, encode_examples, train_sft
from vlm_reward.worlds.scenes import scene_rng, scene_rows

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "smolvlm")


def row(n=0, size=(40, 32)):
    picture = Image.new("RGB", size, (40 * n, 90, 120))
    return make_row(id=str(n), task="t", question="Where?" * (n + 1), images=[picture], solution="left")


def three():
    "Reasoning, none, and an empty one; of different length."
    return [
        Lesson(row(0), "it is far left", "left"),
        Lesson(row(1, (64, 30)), None, "right"),
        Lesson(row(2), "", "up"),
    ]


def by_hand(processor, lesson, layout):
    "The sequence of one lesson and its labels, spelt out."
    say = partial(processor.tokenizer, add_special_tokens=False)
    tag = processor.tokenizer.convert_tokens_to_ids
    question = encode_questions(processor, [lesson.row])["input_ids"][0].tolist()
    header, end = say("<|im_start|>assistant\n")["input_ids"], tag("<|im_end|>")
    think, answer = say(lesson.rationale or "")["input_ids"], say(lesson.answer)["input_ids"]
    if layout == "turn":
        opening = say("<|im_start|>Analyzer\n")["input_ids"]
        parts = [(opening, False), ([*think, end], True), ([*say("\n")["input_ids"], *header], False)]
        skip, answer = header, [*answer, end]
    else:
        parts = [([*header, tag("<think>")], False), ([*think, tag("</think>")], True), ([tag("<answer>")], False)]
        skip, answer = [*header, tag("<answer>")], [*answer, tag("</answer>"), end]
    parts = [(skip, False)] if lesson.rationale is None else parts
    ids, labels = list(question), [IGNORED] * len(question)
    for piece, learned in [*parts, (answer, True)]:
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    return ids, labels


@pytest.mark.parametrize("layout", ["turn", "section"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_by_hand(family, layout):
    "Rationale, T, answer and closing; no header, no placeholder, no padding."
    _, processor = specimen(family)
    batch = encode_lessons(processor, turns_of(processor, layout), three())
    for n, lesson in enumerate(three()):
        real = batch["attention_mask"][n].bool()
        ids, labels = by_hand(processor, lesson, layout)
        assert batch["input_ids"][n][real].tolist() == ids
        assert batch["labels"][n][real].tolist() == labels
        assert (batch["labels"][n][~real] == IGNORED).all()


@pytest.mark.parametrize("layout", ["turn", "section"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_by_hand(family, layout):
    "Each lesson alone, its logits picked at the labelled places, against the loss of the batch."
    model, processor = specimen(family)
    turns, total, count = turns_of(processor, layout), 0.0, 0
    with torch.no_grad():
        for lesson in three():
            _, labels = by_hand(processor, lesson, layout)
            alone = encode_lessons(processor, turns, [lesson])
            logits = model(**{name: value for name, value in alone.items() if name != "labels"}).logits[0]
            for place, label in enumerate(labels):
                if label != IGNORED:
                    total, count = total - logits[place - 1].log_softmax(-1)[label].item(), count + 1
        together = model(**encode_lessons(processor, turns, three()))
    assert abs(together.loss.item() - total / count) < 1e-4


def test_the_header_is_not_learned():
    "Fault: header tokens counted as actions."
    _, processor = specimen("llava")
    turns = turns_of(processor)
    batch = encode_lessons(processor, turns, three())
    learned = [processor.tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]
    assert learned == ["it is far left<|im_end|>left<|im_end|>", "right<|im_end|>", "<|im_end|>up<|im_end|>"]


def test_without_reasoning_a_lesson_is_a_plain_example():
    _, processor = specimen("qwen2_5_vl")
    batch = encode_lessons(processor, turns_of(processor), [three()[1]])
    plain = encode_examples(processor, [(three()[1].row, "right")])
    assert batch.keys() == plain.keys() and all(torch.equal(batch[name], plain[name]) for name in plain)


def test_the_rationale_changes_the_loss_of_the_answer_alone_when_it_is_there():
    "What is learned after the bridge is conditioned on the rationale."
    model, processor = specimen("llava")
    turns = turns_of(processor)
    losses = []
    for rationale in ("it is far left", "it is far down"):
        batch = encode_lessons(processor, turns, [Lesson(row(), rationale, "left")])
        batch["labels"][:, : -len("left") - 1] = IGNORED  # bytes are tokens here
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("layout", ["turn", "section"])
def test_what_a_lesson_may_not_hold(layout):
    _, processor = specimen("llava")
    turns = turns_of(processor, layout)
    for rationale, answer, words in [
        ("a", "", "no tokens"),
        ("a<|im_end|>", "b", "special token"),
        ("a", "b<|image_pad|>", "special token"),
    ]:
        with pytest.raises(ValueError, match=words):
            encode_lessons(processor, turns, [Lesson(row(), rationale, answer)])
    if layout == "section":
        with pytest.raises(ValueError, match="which ends it"):
            encode_lessons(processor, turns, [Lesson(row(), "a</think>", "b")])
    with pytest.raises(ValueError, match="no lessons"):
        encode_lessons(processor, turns, [])


def test_completions_and_lessons_are_the_same_text():
    for rationale in ("because", None):
        assert lesson_of(row(), whole_text(rationale, "left")) == Lesson(row(), rationale, "left")
        assert split_text(whole_text(rationale, "left")) == (rationale, "left")
    for behaviour in ("grounded", "hedge", "malformed"):
        scene = scene_rows("relation", 1, seed=3)[0]
        lesson = lesson_of(scene, demonstrate(behaviour, scene, scene_rng(0)))
        assert (lesson.rationale is None) == (behaviour == "malformed") and lesson.answer


def test_a_share_is_taught_without_reasoning():
    pairs = [(row(), whole_text("because", "left"))] * 1000
    mixed = Lessons(pairs, without=0.3, seed=1)
    off = [lesson.rationale is None for lesson in mixed]
    assert len(off) == 1000 and abs(sum(off) / 1000 - 0.3) < 0.06
    assert off == [mixed[i].rationale is None for i in range(1000)]
    assert off[-1] == (mixed[-1].rationale is None)
    assert off != [lesson.rationale is None for lesson in Lessons(pairs, without=0.3, seed=2)]
    assert sum(lesson.rationale is None for lesson in pickle.loads(pickle.dumps(mixed))) == sum(off)


@pytest.fixture(scope="module")
def taught():
    "A pocket that was shown turns on four scenes, half of the time with reasoning off."
    model, processor = load_policy("pocket")
    model, turns = copy.deepcopy(model), turns_of(processor)
    rows = scene_rows("relation", 4, seed=21)
    pairs = [(r, demonstrate("grounded", r, scene_rng(n))) for n, r in enumerate(rows)]
    lessons = Lessons(pairs * 25, without=0.5)
    settings = SFTSettings(steps=150, batch_size=8, lr=1e-3, warmup=10, freeze_vision=True)
    train_sft(model, processor, lessons, settings, encode=partial(encode_lessons, processor, turns))
    return model, processor, turns, pairs


def test_the_policy_reasons_when_asked_to_and_answers_straight_away_when_not(taught):
    model, processor, turns, pairs = taught
    config = sampling_config(model, processor, temperature=0, max_new_tokens=40)

    def write(row, given):
        inputs = follow(model, encode_questions(processor, [row]), [given])
        out = model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :].tolist()
        assert out[-1] == turns.stop and out.count(turns.stop) == 1
        return out

    for row, completion in pairs:
        thought = write(row, turns.opening)
        answer = write(row, [*turns.opening, *thought, *turns.bridge])
        straight = write(row, turns.skip)
        texts = [processor.tokenizer.decode(ids[:-1]) for ids in (thought, answer, straight)]
        assert whole_text(*texts[:2]) == completion
        assert texts[2] == row["solution"]

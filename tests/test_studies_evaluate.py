"Evaluation: marks against the known world of scenes, estimates against enumeration, sampling on a real model."

import itertools
import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.core.layouts import from_dataset, to_dataset
from vlm_reward.core.rows import make_row
from vlm_reward.data.behaviours import MIXTURE, demonstrate
from vlm_reward.policy.sampling import Sample
from vlm_reward.studies.evaluate import accuracy, behaviour_shares, evaluate, judge, pass_at, summarise
from vlm_reward.worlds.scenes import KINDS, scene_rows

RIGHT = {"grounded": 1, "boxes": 1, "verbose": 1, "malformed": 1, "contradiction": 0, "hedge": 0}


@pytest.mark.parametrize("kind", ["relation", "statement"])
@pytest.mark.parametrize("behaviour", list(MIXTURE))
def test_demonstrations_are_marked_as_what_they_are(kind, behaviour):
    rng, verdicts = random.Random(0), []
    for row in scene_rows(kind, 60, seed=31):
        verdicts.append(judge(demonstrate(behaviour, row, rng), row))
    assert {v.behaviour for v in verdicts} == {behaviour}
    assert all(v.parsed for v in verdicts)
    right = {v.correct for v in verdicts}
    assert right == ({RIGHT[behaviour]} if behaviour in RIGHT else {0, 1})


@pytest.mark.parametrize("kind", ["describe", "where", "what"])
def test_skills_are_marked_by_the_whole_completion(kind):
    rows = scene_rows(kind, 40, seed=32)
    for row, other in itertools.pairwise(rows):
        assert judge(row["solution"], row).correct == 1
        assert judge(f"  {row['solution']}\n", row).correct == 1
        assert judge(other["solution"], row).correct == float(other["solution"] == row["solution"])
        assert judge(f"<answer>{row['solution']}</answer>", row).correct == 0
        assert judge(f"{row['solution']}, {row['solution']}", row).correct == 0
        assert judge("", row) == (None, 0.0, False, None)


def test_a_wrapped_solution_cannot_be_smuggled_past_the_whole_answer():
    "The completion is put between answer tags to be marked; tags inside it must not end them early."
    row = scene_rows("where", 1, seed=33)[0]
    for junk in ("x</answer><answer>", "</answer><answer>", "<answer>", "<think>x</think><answer>"):
        assert judge(junk + row["solution"], row).correct == 0


def test_rows_without_gold_are_not_scored():
    row = {**scene_rows("relation", 1, seed=34)[0], "solution": None}
    assert judge("<think>x</think><answer>left</answer>", row).correct is None


def test_rows_that_came_through_a_dataset_are_marked_alike():
    rows = [row for kind in KINDS for row in scene_rows(kind, 3, seed=35)]
    for before, after in zip(rows, from_dataset(to_dataset(rows)), strict=True):
        texts = [before["solution"], f"<think>it looks like it</think><answer>{before['solution']}</answer>"]
        for text in texts:
            assert judge(text, before) == judge(text, after)


marks = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=8)


def as_table(rows):
    lines = [
        {"row_id": i, "sample": j, "correct": c, "behaviour": None} for i, r in enumerate(rows) for j, c in enumerate(r)
    ]
    return pd.DataFrame(lines)


@settings(max_examples=40, deadline=None)
@given(marks, st.integers(1, 4))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(rows, k):
    naive = np.mean([np.mean([max(pick) for pick in itertools.combinations(row, k)]) for row in rows])
    assert pass_at(as_table(rows), k) == pytest.approx(naive)


@settings(max_examples=20, deadline=None)
@given(marks)
def test_accuracy_is_the_mean_and_lies_in_its_interval(rows):
    found = accuracy(as_table(rows))
    assert found.estimate == pytest.approx(np.mean(rows))
    assert found.low - 1e-9 <= found.estimate <= found.high + 1e-9


def test_agreeing_samples_widen_the_interval():
    agree, differ = as_table([[1.0] * 4, [0.0] * 4] * 15), as_table([[1.0, 0.0] * 2] * 30)
    width = {name: (i := accuracy(t)).high - i.low for name, t in [("agree", agree), ("differ", differ)]}
    assert width["agree"] > width["differ"] + 0.2


def scripted(texts):
    "A policy that says what is written, mode by mode."

    def sample(model, processor, rows, *, n, temperature, seed, max_new_tokens, batch_size, progress):
        replies = [[Sample(texts[(temperature > 0, row["id"], i)], [0] * 5, True) for i in range(n)] for row in rows]
        if progress:
            progress(n * len(rows))
        return replies

    return sample


def test_the_table_pairs_every_completion_with_its_row():
    rng = random.Random(1)
    rows = scene_rows("relation", 6, seed=36) + scene_rows("where", 4, seed=36)
    texts = {}
    for row in rows:
        for i in range(3):
            texts[(True, row["id"], i)] = (
                demonstrate(rng.choice(list(MIXTURE)), row, rng)
                if row["sections"]
                else rng.choice([row["solution"], "z 9"])
            )
        texts[(False, row["id"], 0)] = row["solution"]
    done = []
    table = evaluate(None, None, rows, samples=3, progress=done.append, speak=scripted(texts))
    assert done == [30, 40]
    assert len(table) == 40 and not table.duplicated(["row_id", "mode", "sample"]).any()
    known = {row["id"]: row for row in rows}
    for line in table.to_dict("records"):
        assert line["completion"] == texts[(line["mode"] == "sampled", line["row_id"], line["sample"])]
        verdict = judge(line["completion"], known[line["row_id"]])
        told = [line[name] if isinstance(line[name], str) else None for name in ("answer", "behaviour")]
        assert (told[0], line["correct"], line["parsed"], told[1]) == verdict
        assert line["task"] == known[line["row_id"]]["task"]
    summary = summarise(table).set_index("task")
    sampled = table[(table["mode"] == "sampled") & (table["task"] == "scenes/relation")]
    assert summary.loc["scenes/relation", "sampled"] == pytest.approx(sampled["correct"].mean())
    assert summary.loc["scenes/relation", "parse failures"] == pytest.approx(1 - sampled["parsed"].mean())
    assert summary.loc["scenes/relation", "bypass"] == pytest.approx((sampled["behaviour"] == "bypass").mean())
    # greedy completions of relations are bare words here: nothing parses, nothing is right
    assert summary.loc["scenes/relation", "greedy"] == 0 and summary.loc["scenes/where", "greedy"] == 1
    assert sum(behaviour_shares(sampled).values()) == pytest.approx(1)


def test_a_real_model_is_left_as_it_was(tiny_vlm, tiny_rows):
    model, processor = tiny_vlm
    model.train()
    torch.manual_seed(5)
    before, state = torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, processor, tiny_rows[:3], samples=2, max_new_tokens=4)
    assert model.training and torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()


def test_seeds_and_batches_on_a_real_model(tiny_vlm, tiny_rows):
    run = lambda **kw: evaluate(*tiny_vlm, tiny_rows, **{"samples": 2, "max_new_tokens": 6, "seed": 3, **kw})  # noqa: E731
    first = run()
    pd.testing.assert_frame_equal(first, run())
    texts = lambda t, mode: list(t[t["mode"] == mode]["completion"])  # noqa: E731
    other = run(seed=4)
    assert texts(first, "sampled") != texts(other, "sampled")
    assert texts(first, "greedy") == texts(other, "greedy")
    # padding must not change what a row answers; rounding may, very rarely
    small = run(batch_size=5, samples=0)
    same = np.mean([a == b for a, b in zip(texts(first, "greedy"), texts(small, "greedy"), strict=True)])
    assert same >= 0.9
    assert set(first["n_tokens"]) <= set(range(1, 7))
    assert first.loc[first["n_tokens"] < 6, "finished"].all()


def test_progress_counts_every_completion_once(tiny_vlm, tiny_rows):
    done = []
    evaluate(*tiny_vlm, tiny_rows, samples=2, max_new_tokens=2, batch_size=7, progress=done.append)
    assert done == sorted(set(done)) and done[-1] == len(tiny_rows) * 3


def test_real_rows_need_an_answer_section():
    row = make_row(
        id="clock/0",
        task="clock",
        question="What time is it?",
        images=scene_rows("where", 1, seed=1)[0]["images"],
        solution="B",
        choices=["1:14", "4:23"],
        answer_type="choice",
    )
    assert judge("<answer>B</answer>", row) == ("B", 1.0, True, None)
    assert judge("<answer>4:23</answer>", row).correct == 1
    assert judge("<answer>A or B</answer>", row).correct == 0
    assert judge("B", row) == (None, 0.0, False, None)

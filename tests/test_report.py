"""The report of a study: its numbers against a naive count, its page against hostile text and missing runs."""

import itertools
import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.core.config import read_yaml, to_yaml
from vlm_reward.core.runs import Run, find_runs
from vlm_reward.core.stats import Interval, paired_difference
from vlm_reward.core.store import RunError
from vlm_reward.report.choice_specimen import write_choices
from vlm_reward.report.figures import common_limits, label_spots, push_apart
from vlm_reward.report.findings import direction, findings, notes_of, points_interval
from vlm_reward.report.page import page_of, plain_line, render_html, report, summary_table
from vlm_reward.report.paper import BEHAVIOUR_COLOURS, ink_on, pens
from vlm_reward.report.records import read_study
from vlm_reward.report.selection import GAIN, MEASURES, arm_words, cost_cell, mean_of, selection_tables, selection_texts
from vlm_reward.report.specimen import scene_config, write_puzzles, write_specimen
from vlm_reward.report.tables import all_tables, estimate
from vlm_reward.worlds.scenes import scene_rows

TARGET, SKILL = "scenes/relation", "scenes/where"


def pair_config(name):
    "One seed of sft and accuracy."
    config = scene_config([0])
    return {**config, "name": name, "arms": {arm: config["arms"][arm] for arm in ("sft", "accuracy")}}


def small_study(root, **changes):
    rows = [*scene_rows("relation", 8, seed=3), *scene_rows("where", 4, seed=3)]
    return write_specimen(Path(root), rows=rows, **{"config": scene_config([0, 1]), "steps": 6, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_study(tmp_path_factory.mktemp("study"), left_off=[("format", 1)], absent=[("format+accuracy", 0)])


@pytest.fixture(scope="module")
def study(folder):
    return read_study(folder)


@pytest.fixture(scope="module")
def tables(study):
    return all_tables(study)


@pytest.fixture(scope="module")
def page(folder):
    return report(folder)


@pytest.fixture(scope="module")
def lines(folder):
    "Every evaluated completion of the finished runs, read without the package."
    found = []
    for path in sorted((folder / "arms").iterdir()):
        if (path / "finished.json").exists():
            config = read_yaml((path / "config.yaml").read_text())
            table = pd.read_parquet(path / "tables" / "evaluation.parquet")
            found += [{**line, "arm": config["arm"], "seed": config["seed"]} for line in table.to_dict("records")]
    return found


def of(lines, **wanted):
    return [line for line in lines if all(line[k] == v for k, v in wanted.items())]


def test_accuracy_is_the_plain_count(tables, lines):
    table = tables["accuracy"]
    assert len(table) == 4 * 2 * 2
    for line in table.to_dict("records"):
        own = of(lines, arm=line["arm"], task=line["task"], mode=line["mode"])
        assert line["completions"] == len(own)
        assert line["accuracy"] == pytest.approx(sum(x["correct"] for x in own) / len(own))
        assert line["no answer"] == pytest.approx(sum(not x["parsed"] for x in own) / len(own))
        assert line["low"] <= line["accuracy"] <= line["high"]
        assert line["seeds"] == len({x["seed"] for x in own})


def test_unfinished_and_missing_runs_do_not_count(tables):
    seeds = tables["accuracy"].groupby("arm")["seeds"].first().to_dict()
    assert seeds == {"sft": 2, "format": 1, "accuracy": 2, "format+accuracy": 1}


def test_pass_at_k_is_the_share_of_subsets_with_a_hit(tables, lines):
    for line in tables["pass_at_k"].to_dict("records"):
        chances = []
        groups = {}
        for x in of(lines, arm=line["arm"], task=TARGET, mode="sampled"):
            groups.setdefault((x["row_id"], x["seed"]), []).append(x["correct"])
        for group in groups.values():
            subsets = list(itertools.combinations(group, line["k"]))
            chances.append(sum(any(s) for s in subsets) / len(subsets))
        assert line["pass@k"] == pytest.approx(np.mean(chances))


def test_difference_pairs_rows_and_seeds(tables, lines):
    for line in tables["difference"].to_dict("records"):
        own = of(lines, arm=line["arm"], task=line["task"], mode=line["mode"])
        base = of(lines, arm="sft", task=line["task"], mode=line["mode"])
        gaps, rows = [], []
        for row, seed in dict.fromkeys((x["row_id"], x["seed"]) for x in own):
            after = np.mean([x["correct"] for x in of(own, row_id=row, seed=seed)])
            before = np.mean([x["correct"] for x in of(base, row_id=row, seed=seed)])
            gaps.append(after - before)
            rows.append(row)
        assert line["difference"] == pytest.approx(np.mean(gaps))
        assert line["after"] - line["before"] == pytest.approx(line["difference"])
        # the interval of the library, on pairs that were matched here, up to the order in which rows are drawn
        again = paired_difference(gaps, np.zeros(len(gaps)), clusters=rows, n=20000)
        assert (line["low"], line["high"]) == pytest.approx(again[1:], abs=0.03)
        assert line["rewarded"] == (line["task"] == TARGET)


def test_one_seed_has_no_interval_over_seeds(tables):
    one = tables["difference"]["seeds"] == 1
    assert one.any() and (~one).any()
    assert tables["difference"].loc[one, ["seeds low", "seeds high"]].isna().all(axis=None)
    assert tables["difference"].loc[~one, ["seeds low", "seeds high"]].notna().all(axis=None)


def test_behaviour_shares_are_the_plain_count(tables, lines):
    for line in tables["behaviours"].to_dict("records"):
        own = of(lines, arm=line["arm"], task=TARGET, mode="sampled")
        assert line["share"] == pytest.approx(np.mean([x["behaviour"] == line["behaviour"] for x in own]))
    assert tables["behaviours"].groupby("arm")["share"].sum().to_numpy() == pytest.approx(np.ones(4))
    changed = tables["behaviours"].dropna(subset="change")
    assert changed.groupby("arm")["change"].sum().to_numpy() == pytest.approx(np.zeros(3), abs=1e-12)


def test_traces_are_means_of_the_logged_lines(tables, folder):
    logs = {}
    for run in find_runs(folder / "arms"):
        if run.finished and (run.path / "metrics.jsonl").exists():
            text = (run.path / "metrics.jsonl").read_text()
            logs[run.config["arm"], run.config["seed"]] = [json.loads(line) for line in text.splitlines()]
    over = tables["behaviours_over_training"].set_index(["arm", "step"])
    for (arm, step), line in over.iterrows():
        steps = [log[step - 1] for (name, _), log in logs.items() if name == arm]
        for behaviour, share in line.items():
            assert share == pytest.approx(np.mean([x.get(f"behaviour/{behaviour}") or 0 for x in steps]))
    rewards = tables["training"].query("metric == 'reward' and arm == 'accuracy'").set_index("step")
    assert rewards.loc[4, "low"] == pytest.approx(min(logs["accuracy", seed][3]["reward"] for seed in (0, 1)))


def test_payoff_is_the_mean_of_the_rollouts(tables, folder):
    rollouts = pd.concat(Run(p).rollouts() for p in (folder / "arms").iterdir() if p.name.startswith("accuracy-"))
    for line in tables["payoff"].query("arm == 'accuracy'").to_dict("records"):
        own = rollouts[rollouts["behaviour"] == line["behaviour"]]
        assert line["completions"] == len(own)
        assert line["points"] == pytest.approx(own["reward"].mean())
        assert line["advantage"] == pytest.approx(own["advantage"].mean())


def test_the_summary_is_in_the_text(folder, page):
    text = page.with_suffix(".md").read_text()
    for line in summary_table(folder).to_dict("records"):
        assert all(cell in text.replace("\\", "") for cell in line.values())


def test_missing_runs_are_named_in_both_files(page):
    for text in (page.read_text(), page.with_suffix(".md").read_text().replace("\\", "")):
        assert "2 of 8 runs are not in the numbers" in text
        assert "format, seed 1: unfinished, stopped after step 3" in text
        assert "format+accuracy, seed 0: missing" in text
        assert "One seed only (format, format+accuracy)" in text


def test_the_tables_are_written_with_all_digits(page, tables):
    folder = page.parent
    assert {p.stem for p in (folder / "tables").glob("*.csv")} == set(tables)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(
            pd.read_csv(folder / "tables" / f"{name}.csv"),
            table.reset_index(drop=True),
            check_dtype=False,
            check_exact=True,
        )


def test_equal_folders_give_equal_pages(page, folder):
    study = read_study(folder)
    assert render_html(page_of(study, all_tables(study))) == page.read_text()


class Page(HTMLParser):
    "Collects what a browser would act on."

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.setdefault(self.inside[-1] if self.inside else "", []).append(data)


def check_page(page):
    "Nothing runs, nothing is fetched, every picture has words."
    html = Page(page.read_text())
    ids = {attrs["id"] for _, attrs in html.tags if "id" in attrs}
    for tag, attrs in html.tags:
        assert tag not in ("script", "iframe", "link", "object", "embed", "base", "form")
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("src", "data:image/").startswith("data:image/")
        href = attrs.get("href", "")
        assert href[1:] in ids if href.startswith("#") else not href or (page.parent / href).exists()
        assert tag != "img" or attrs["alt"].strip()
    assert "undefined" not in page.read_text() and ">nan" not in page.read_text()
    return html


def test_the_page_is_self_contained(page):
    html = check_page(page)
    assert sum(tag == "img" for tag, _ in html.tags) > 30


HOSTILE = '<script>document.title="run"</script>"><img src=x onerror=alert(1)>\n```\n| a | b |\n</pre></body>'


def test_hostile_text_stays_text(tmp_path):
    "Completions, questions, answers, names of arms and behaviours."
    folder = small_study(tmp_path, config=pair_config("hostile"), steps=2)
    for run in find_runs(folder / "arms"):
        if run.config["arm"] == "accuracy":
            (run.path / "config.yaml").write_text(to_yaml({**run.config, "arm": "<u>|$x$"}))
        table = run.table("evaluation").replace({"behaviour": {"hedge": "<s>new</s>"}})
        run.save_table("evaluation", table.assign(completion=HOSTILE, answer=HOSTILE))
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.assign(question="<b>bold</b> | {{ 7 * 7 }}", solution="<i>").to_parquet(folder / "rows.parquet")
    page = report(folder)
    html = check_page(page)
    assert not {"u", "s", "b", "i"} & {tag for tag, _ in html.tags}
    assert HOSTILE in html.text["pre"] and "<u>|$x$" in html.text["th"]
    assert any("{{ 7 * 7 }}" in text for text in html.text["p"])
    blocks = [line for line in page.with_suffix(".md").read_text().splitlines() if "<script>" in line]
    assert blocks and all(line.startswith("    ") for line in blocks)


def test_puzzles_have_no_behaviours(tmp_path):
    folder = write_puzzles(tmp_path, n=6, steps=2)
    page = report(folder)
    html = check_page(page)
    assert "behaviours" not in {attrs.get("id") for _, attrs in html.tags}
    assert {"right", "wrong", "no answer"} <= {t.strip() for t in html.text["h3"]}
    assert "is not clearly above chance (25" in page.read_text()
    assert "(chance)" in summary_table(folder)["arm"].tolist()


def test_an_evaluation_without_training_has_a_report(tmp_path):
    config = {**scene_config([0]), "arms": {"sft": {"reward": "none"}}}
    folder = small_study(tmp_path, config=config)
    assert "training" not in {attrs.get("id") for _, attrs in check_page(report(folder)).tags}
    assert summary_table(folder)["arm"].tolist() == ["sft", "(chance)"]


def test_a_study_without_baseline_has_no_differences(tmp_path):
    folder = small_study(tmp_path, config=pair_config("alone"), steps=2, absent=[("sft", 0)])
    study = read_study(folder)
    tables = all_tables(study)
    assert tables["difference"].empty and tables["behaviours"]["change"].isna().all()
    assert any("nothing to compare" in note for note in notes_of(study, tables))
    assert findings(study, tables)[0].text.startswith("accuracy ")
    assert "nothing to compare" in render_html(page_of(study, tables))


def test_holes_in_the_data(tmp_path):
    "No picture, no gold answer, no behaviour, one sample, a metric that is missing for a while."
    folder = small_study(tmp_path, config=pair_config("holes"), steps=4)
    for run in find_runs(folder / "arms"):
        table = run.table("evaluation").query("sample == 0")
        row = table["row_id"].iloc[0]
        holes = {"correct": table["correct"].astype(float).where(table["row_id"] != row), "answer": None}
        run.save_table("evaluation", table.assign(**holes))
        if (run.path / "metrics.jsonl").exists():
            steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
            steps[1]["entropy"] = None
            steps[2]["kl"] = 0.02
            (run.path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.assign(image=None, choices=None, chance=float("nan")).to_parquet(folder / "rows.parquet")
    study = read_study(folder)
    tables = all_tables(study)
    assert set(tables["pass_at_k"]["k"]) == {1}
    assert tables["accuracy"]["not scored"].sum() == 4
    assert any("4 completions could not be scored" in note for note in notes_of(study, tables))
    assert "(chance)" not in summary_table(folder)["arm"].tolist()
    check_page(report(folder))


def test_folders_that_cannot_be_reported(tmp_path):
    with pytest.raises(RunError, match=r"no study\.yaml there; give the folder"):
        report(tmp_path)
    folder = small_study(tmp_path, config=pair_config("begun"), steps=2)
    for run in find_runs(folder / "arms"):
        (run.path / "finished.json").unlink()
    with pytest.raises(RunError, match="none of its 2 runs is finished"):
        report(folder)
    assert not (folder / "report.html").exists()


def test_a_template_that_asks_for_what_is_not_there_fails():
    with pytest.raises(Exception, match="study"):
        render_html({})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.booleans(), min_size=2, max_size=40), st.integers(1, 5))
def test_an_interval_holds_its_share_and_agreement_is_not_certainty(values, per_row):
    numbers = pd.Series(values, dtype=float)
    found = estimate(numbers, pd.Series([i // per_row for i in range(len(values))]))
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.estimate == pytest.approx(numbers.mean())
    if len(set(values)) == 1:
        assert found.high > found.low


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_direction_is_named_only_outside_zero(middle, below, above):
    interval = Interval(middle, middle - below, middle + above)
    assert (direction(interval) == 0) == (interval.low <= 0 <= interval.high)
    assert direction(Interval(-middle, -interval.high, -interval.low)) == -direction(interval)
    assert points_interval(interval)[0] in "+-"


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 2))
def test_labels_do_not_overlap_and_keep_their_order(wanted, gap):
    places = np.array(push_apart(wanted, gap))
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(places[order]) >= gap - 1e-9).all()
    assert places.mean() == pytest.approx(np.mean(wanted), abs=1e-6)
    if (np.diff(np.sort(wanted)) >= gap).all():
        assert places == pytest.approx(wanted)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(2, 30))
def test_labels_stand_inside_their_areas(seed, areas, n):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(areas, 0.5), size=n)
    tops = shares.cumsum(axis=1)
    for spot in label_spots(np.arange(n, dtype=float), shares, [str(k) for k in range(areas)]):
        k, t = int(spot.name), int(spot.x)
        assert tops[t, k] - shares[t, k] <= spot.y <= tops[t, k]


@given(st.text(max_size=40))
def test_a_line_of_markdown_stays_a_line(text):
    line = plain_line(text)
    assert "\n" not in line
    assert not [i for i, c in enumerate(line) if c in "|<>`" and line[i - 1] != "\\"]


def test_colours_can_be_read_and_told_apart():
    for colour in BEHAVIOUR_COLOURS.values():
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        contrast = 1.05 / (luminance + 0.05) if ink_on(colour) == "#ffffff" else (luminance + 0.05) / 0.05
        assert contrast >= 4.5
    assert len(set(BEHAVIOUR_COLOURS.values())) == len(BEHAVIOUR_COLOURS)
    assert len(set(pens([str(i) for i in range(20)]).values())) == 20


def test_panels_hold_all_intervals(tables):
    low, high = common_limits(tables["difference"])
    assert low < 100 * tables["difference"]["low"].min() and high > 100 * tables["difference"]["high"].max()


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    "A study in which rules chose among answers."
    return write_choices(small_study(tmp_path_factory.mktemp("chosen"), steps=2))


def test_choices_are_counted_row_by_row(chosen):
    study = read_study(chosen)
    table = selection_tables(study)["selection"]
    raw = []
    for path in sorted((chosen / "arms").iterdir()):
        config = read_yaml((path / "config.yaml").read_text())
        found = pd.read_parquet(path / "tables" / "selection.parquet").to_dict("records")
        raw += [{**line, "arm": config["arm"], "seed": config["seed"]} for line in found]
    assert len(table) == 4 * (1 + 3 * 3)
    for line in table.to_dict("records"):
        own = of(raw, arm=line["arm"], rule=line["rule"], n=line["n"])
        right = {(x["row_id"], x["seed"]): x["correct"] for x in own}
        assert line["accuracy"] == pytest.approx(np.mean(list(right.values())))
        assert line["written"] == pytest.approx(np.mean([x["written"] for x in own]))
        for name, other in (
            ("against greedy", of(raw, arm=line["arm"], rule="greedy")),
            ("against baseline", of(raw, arm="sft", rule=line["rule"], n=line["n"])),
        ):
            before = {(x["row_id"], x["seed"]): x["correct"] for x in other}
            gap = np.mean([right[key] - before[key] for key in right])
            assert np.isnan(line[name]) or line[name] == pytest.approx(gap)
        assert np.isnan(line["against greedy"]) == (line["rule"] == "greedy")
        assert np.isnan(line["against baseline"]) == (line["arm"] == "sft")


def test_bayesian_choices_are_compared_with_others_of_the_same_draws(chosen):
    study = read_study(chosen)
    found, text = selection_tables(study)["bayes"], selection_texts(selection_tables(study))["selection bayes"]
    raw = study.stored("selection").to_dict("records")
    assert len(found) == 4 * 3 and set(found["n"]) == {10}
    assert list(text) == ["rule", "against", *study.arms] and len(text) == 3
    for line in found.to_dict("records"):
        n = 1 if line["against"] == "greedy" else 10
        sides = [
            {(x["row_id"], x["seed"]): x["correct"] for x in of(raw, arm=line["arm"], rule=rule, n=m)}
            for rule, m in (("bin-marginal", 10), (line["against"], n))
        ]
        gaps = {key: sides[0][key] - sides[1][key] for key in sides[0]}
        assert line["difference"] == pytest.approx(np.mean(list(gaps.values())))
        clusters = [row for row, _ in gaps]
        wanted = paired_difference(*(list(side.values()) for side in sides), clusters=clusters)
        assert (line["low"], line["high"]) == pytest.approx((wanted.low, wanted.high), abs=0.02)
        cell = text.set_index(["rule", "against"]).loc[("bin-marginal", line["against"]), line["arm"]]
        assert cell == points_interval(Interval(line["difference"], line["low"], line["high"]))


def test_the_page_shows_every_table_of_the_choices(chosen):
    "What the Markdown file tells, the page tells too; every N and rule stands in one table, with intervals."
    page, text = report(chosen), selection_texts(selection_tables(read_study(chosen)))
    html = page.read_text()
    for name, table in text.items():
        cells = [cell for cell in table.to_numpy().ravel() if cell]
        assert len(table) and all(escape(cell) in html for cell in cells), name
    lines = text["selection"].set_index(["rule", "n"])
    rules = ("majority", "best-of-n", "bin-marginal")
    assert set(lines.index) == {("greedy", "1"), *((rule, str(n)) for rule in rules for n in (1, 5, 10))}
    assert all(" to " in cell and "%" in cell for cell in lines.to_numpy().ravel())
    assert max(len(cell) for name in text for cell in text[name].iloc[:, 2:].to_numpy().ravel()) <= 24
    assert html.count('class="long"') == sum(len(title) > 32 for title in text["rationales"]["measure"])


def test_a_difference_of_nothing_is_no_share_of_nothing():
    rows = pd.Series(range(16))
    for name in ("gold over wrong", "swap gap", "correlation"):
        assert mean_of(pd.Series(np.zeros(16)), rows, name) == Interval(0, 0, 0)
        assert mean_of(pd.Series(np.ones(16)), rows, name) == Interval(1, 1, 1)
    for name in ("states wrong early", "cut off"):
        assert mean_of(pd.Series(np.zeros(16)), rows, name).high > 0.15
    assert np.isnan(mean_of(pd.Series([], dtype=float), rows[:0], "swap gap").low)


def test_rules_that_are_equally_right_are_named_together():
    accuracy = {"majority": 0.5, "bin-code": 1.0, "bin-paper": 1.0, "best-of-n": 0.5, "bin-marginal": np.nan}
    lines = [{"arm": "a", "rule": rule, "n": 5, "accuracy": value} for rule, value in accuracy.items()]
    table = pd.DataFrame(lines).assign(**{name: 0.0 for name in GAIN})
    said = arm_words(table, 5)
    assert "choices in 50.0 % (majority, best-of-n) to 100.0 % (bin-code, bin-paper)," in said


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.03, "0.03 s, 68 + 9 tokens"),
        (0.2984, "0.3 s, 68 + 9 tokens"),
        (123.4, "123 s, 68 + 9 tokens"),
        (np.nan, "68 + 9 tokens"),
    ],
)
def test_what_a_question_takes_is_short(seconds, told):
    assert cost_cell({"seconds": seconds, "written": 68.0, "scored": 9.0}) == told


def test_choices_are_told_in_both_files_and_only_where_there_are_any(chosen, folder, page):
    told = report(chosen)
    html, text = check_page(told), told.with_suffix(".md").read_text()
    assert {"selection", "rationales"} <= {attrs.get("id") for _, attrs in html.tags}
    assert any(attrs.get("alt", "").startswith("Accuracy by arm, rule") for _, attrs in html.tags)
    for heading in ("## Selection", "## Rationales", "## Cost of a question", "## Cost of training"):
        assert heading in text and heading not in page.with_suffix(".md").read_text()
    assert "choosing among 10 answers" in text
    assert {p.stem for p in (chosen / "tables").glob("*.csv")} - {
        p.stem for p in (folder / "tables").glob("*.csv")
    } == {
        "selection",
        "bayes",
        "rationales",
        "cost",
    }
    assert 'id="selection"' not in page.read_text() and "choosing among" not in page.read_text()


def test_choices_without_greedy_answer_baseline_or_clock(tmp_path):
    "Nothing to compare with, one N, answers that could not be scored, a measure that no question has."
    folder = write_choices(small_study(tmp_path, config=pair_config("lean"), steps=2, absent=[("sft", 0)]))
    for run in find_runs(folder / "arms"):
        table = run.table("selection").query("rule == 'majority' and n == 5")
        first = table["row_id"] == table["row_id"].iloc[0]
        run.save_table("selection", table.assign(correct=table["correct"].where(~first)))
        run.save_table("rationales", run.table("rationales").assign(correlation=np.nan, new=0.5))
        (run.path / "tables" / "selection_seconds.parquet").unlink()
    page = report(folder)
    check_page(page)
    assert "choosing among" not in page.read_text()
    texts = selection_texts(selection_tables(read_study(folder)))
    assert len(texts["selection"]) == 1 and texts["selection gains"].empty and texts["selection training"].empty
    assert set(texts["rationales"].query("measure == 'new'")["accuracy"]) == {"0.50 (0.50 to 0.50)"}
    assert not texts["rationales"]["measure"].str.contains("correlation").any()  # no question has it


def test_the_leak_stands_beside_its_control_and_older_runs_can_be_read(tmp_path):
    "Runs of an earlier version have one share, of the answer that followed; what a run lacks is an empty cell."
    folder = write_choices(small_study(tmp_path, steps=2))
    titles = [MEASURES[name].title for name in ("states gold early", "states wrong early", "gold over wrong")]
    new = selection_texts(selection_tables(read_study(folder)))["rationales"].set_index("measure")
    assert list(new.index[list(new.index).index(titles[0]) :])[:3] == titles and (new.loc[titles] != "").all().all()
    assert MEASURES["states early"].title not in new.index
    arms = list(read_study(folder).arms)
    for keep in (arms[:1], []):
        for run in find_runs(folder / "arms"):
            table = run.table("rationales")
            if run.config["arm"] not in keep and "states gold early" in table:
                old = table.drop(columns=["states gold early", "states wrong early", "gold over wrong"])
                run.save_table("rationales", old.assign(**{"states early": 0.25}))
        check_page(report(folder))
        text = selection_texts(selection_tables(read_study(folder)))["rationales"].set_index("measure")
        assert text.loc[MEASURES["states early"].title, arms[-1]] == "0.25 (0.25 to 0.25)"
        if keep:
            assert (text.loc[titles, arms[0]] != "").all() and (text.loc[titles, arms[-1]] == "").all()
        else:
            assert not set(titles) & set(text.index)


def test_an_arm_without_reward_that_is_trained_is_no_baseline(tmp_path):
    config = pair_config("likely")
    config["arms"]["accuracy"] = {"algorithm": "rgfn"}
    folder = small_study(tmp_path, config=config, steps=2)
    study = read_study(folder)
    assert study.baseline == "sft" and study.compared == ["accuracy"]
    assert set(all_tables(study)["runs"]["reward"].dropna()) == {"likelihood"}

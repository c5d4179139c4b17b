"""Statistics against scipy, against enumeration and against naive versions; coverage by simulation."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from vlm_reward.core.stats import (
    Interval,
    bootstrap,
    format_interval,
    markdown_table,
    mcnemar,
    over_seeds,
    paired_difference,
    pass_at_k,
    resample,
    wilson,
)

COUNTS = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
QUICK = settings(deadline=None, max_examples=40)  # the machine may be busy
LEVELS = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


@QUICK
@given(COUNTS, LEVELS)
def test_wilson_is_scipys(counts, level):
    c, n = counts
    theirs = scipy_stats.binomtest(c, n).proportion_ci(level, method="wilson")
    ours = wilson(c, n, level)
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1
    assert ours.high > ours.low


@QUICK
@given(COUNTS)
def test_wilson_bounds_solve_the_score_equation(counts):
    c, n = counts
    interval, z = wilson(c, n), scipy_stats.norm.ppf(0.975)
    for bound in interval[1:]:
        if 0 < bound < 1:
            assert abs(c / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


@pytest.mark.parametrize("n", [10, 40, 200])
def test_wilson_covers_by_enumeration(n):
    shares = np.linspace(0.05, 0.95, 91)
    intervals = np.array([wilson(c, n)[1:] for c in range(n + 1)])
    chances = scipy_stats.binom.pmf(np.arange(n + 1), n, shares[:, None])
    held = (intervals[:, 0] <= shares[:, None]) & (shares[:, None] <= intervals[:, 1])
    coverage = (chances * held).sum(1)
    assert coverage.mean() == pytest.approx(0.95, abs=0.012)
    assert coverage.min() > 0.83


@pytest.mark.parametrize("bad", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(bad):
    with pytest.raises(ValueError, match=f"{bad[0]} of {bad[1]}"):
        wilson(*bad)


def naive_bootstrap(values, clusters, n, seed, statistic, level=0.95):
    "Draw lists of clusters and join their values, one drawing at a time."
    names = list(dict.fromkeys(clusters))
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in names]
    drawn = []
    for counts in np.concatenate(list(resample(len(names), n, seed))):
        drawn.append(statistic(np.array([v for g, k in zip(groups, counts, strict=True) for _ in range(k) for v in g])))
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])


@QUICK
@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcd")), min_size=1, max_size=12), st.integers(0, 5))
def test_bootstrap_is_the_naive_one(pairs, seed):
    values, clusters = map(list, zip(*pairs, strict=True))
    for statistic, ours in ((np.mean, np.mean), (np.median, np.median), (np.mean, lambda x: np.mean(x))):
        low, high = naive_bootstrap(values, clusters, 30, seed, statistic)
        interval = bootstrap(values, ours, clusters=clusters, n=30, seed=seed)
        assert interval[1:] == pytest.approx((low, high), abs=1e-9)
        assert interval.estimate == pytest.approx(statistic(values), abs=1e-9)


def test_bootstrap_draws_each_cluster_alike():
    "Enumerate every drawing of three values: the bootstrap's distribution of the mean is theirs."
    values = [0.0, 1.0, 5.0]
    exact = np.array([np.mean(d) for d in itertools.product(values, repeat=3)])
    counts = np.concatenate(list(resample(3, 20_000, seed=1)))
    means = counts @ np.array(values) / 3
    for m in np.unique(np.round(exact, 9)):
        assert np.isclose(means, m).mean() == pytest.approx(np.isclose(exact, m).mean(), abs=0.012)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).gamma(2, size=80)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", random_state=0)
    ours = bootstrap(values, n=5000)
    assert ours[1:] == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


def test_clusters_of_one_and_any_labels_change_nothing():
    values = np.random.default_rng(0).random(40)
    plain = bootstrap(values)
    assert plain == bootstrap(values, clusters=[f"row {i}" for i in range(40)])
    assert plain == bootstrap(pd.Series(values, index=range(100, 140)), clusters=pd.Series(range(40)))


def test_doubling_every_row_changes_nothing_when_rows_are_drawn():
    "Copies of a sample are no information: the interval by row stays, the one by sample shrinks."
    values = (np.random.default_rng(1).random(60) < 0.6).astype(float)
    by_row = bootstrap(np.tile(values, 4), clusters=np.tile(np.arange(60), 4))
    once = bootstrap(values)
    assert by_row == pytest.approx(once, abs=1e-12)
    by_sample = bootstrap(np.tile(values, 4))
    assert by_sample.high - by_sample.low < 0.7 * (once.high - once.low)


def test_clustered_bootstrap_covers():
    rng = np.random.default_rng(5)
    rows, held, worlds = np.repeat(np.arange(50), 6), 0, 300
    for _ in range(worlds):
        values = rng.random(300) < rng.beta(0.6, 0.4, 50)[rows]
        interval = bootstrap(values, clusters=rows, n=300)
        held += interval.low <= 0.6 <= interval.high
    assert 0.90 <= held / worlds <= 0.98


def test_bootstrap_refuses():
    for values, clusters, words in (
        ([], None, "shape"),
        ([[1.0]], None, "shape"),
        ([1.0, math.nan], None, "1 missing"),
        ([1.0, 2.0], ["a", None], "1 cluster labels are missing"),
        ([1.0, 2.0], ["a"], "1 cluster labels for 2"),
    ):
        with pytest.raises(ValueError, match=words):
            bootstrap(values, clusters=clusters)
    with pytest.raises(ValueError, match=r"write 0\.95"):
        bootstrap([1.0], level=95)


@QUICK
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(0, 3))
def test_paired_difference_is_a_mirror(pairs, seed):
    a, b = (np.array(x, float) for x in zip(*pairs, strict=True))
    forth, back = paired_difference(a, b, n=100, seed=seed), paired_difference(b, a, n=100, seed=seed)
    assert forth == pytest.approx((-back.estimate, -back.high, -back.low), abs=1e-12)


def test_paired_difference_is_narrower_than_unpaired_and_covers():
    rng = np.random.default_rng(2)
    rows, held = np.tile(np.arange(100), 4), 0
    widths = []
    for _ in range(150):
        chance = rng.beta(0.4, 0.3, 100) * 0.9
        a, b = (rng.random(400) < (chance + gain)[rows] for gain in (0.08, 0.0))
        interval = paired_difference(a, b, clusters=rows, n=200)
        unpaired = math.hypot(*(np.ptp(bootstrap(x, clusters=rows, n=200)[1:]) for x in (a, b)))
        widths.append((interval.high - interval.low) / unpaired)
        held += interval.low <= 0.08 <= interval.high
    assert np.mean(widths) < 0.8
    assert 0.89 <= held / 150 <= 0.99


@QUICK
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_scipys_binomial(pairs):
    a, b = zip(*pairs, strict=True)
    result = mcnemar(a, b)
    assert result.b01 == sum(not x and y for x, y in pairs)
    assert result.b10 == sum(x and not y for x, y in pairs)
    n = result.b01 + result.b10
    theirs = scipy_stats.binomtest(result.b01, n).pvalue if n else 1.0
    assert result.p == pytest.approx(theirs, rel=1e-12)
    assert mcnemar(b, a).p == result.p


def test_mcnemar_keeps_its_level():
    "Under the null the exact test rejects at most at its level, for every number of changed rows."
    for n in range(1, 30):
        chances = scipy_stats.binom.pmf(np.arange(n + 1), n, 0.5)
        p = np.array([mcnemar([0] * k + [1] * (n - k), [1] * k + [0] * (n - k)).p for k in range(n + 1)])
        assert chances[p <= 0.05].sum() <= 0.05


@QUICK
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=10), LEVELS)
def test_over_seeds_is_scipys(values, level):
    ours = over_seeds(values, level)
    spread = scipy_stats.sem(values)
    low, high = scipy_stats.t.interval(level, len(values) - 1, np.mean(values), spread) if spread else (values[0],) * 2
    assert ours[1:] == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_over_seeds_covers(k):
    draws = np.random.default_rng(k).normal(0.7, 0.05, (4000, k))
    intervals = np.array([over_seeds(d)[1:] for d in draws])
    assert ((intervals[:, 0] <= 0.7) & (intervals[:, 1] >= 0.7)).mean() == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@QUICK
@given(st.integers(1, 12), st.fractions(0, 1, max_denominator=20))
def test_pass_at_k_is_unbiased_exactly(n, p):
    for k in range(1, n + 1):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(w * (1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c, w in enumerate(weights))
        assert mean == 1 - (1 - p) ** k
        assert float(mean) == pytest.approx(
            sum(float(w) * pass_at_k(n, c, k) for c, w in enumerate(weights)), abs=1e-12
        )


def test_pass_at_k_survives_large_numbers():
    assert pass_at_k(20_000, 1, 10_000) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [(8, 2, 0), (8, 2, 9), (8, 9, 1), (8, -1, 1), (0, 0, 1)])
def test_pass_at_k_refuses(bad):
    with pytest.raises(ValueError, match=f"pass@{bad[2]}"):
        pass_at_k(*bad)


def test_format_interval():
    assert format_interval(Interval(-0.0001, -0.2, 0.1), 2) == "-0.00 [-0.20, 0.10]"
    assert format_interval(Interval(math.nan, math.nan, math.nan)) == "n/a"
    assert "one seed" in format_interval(over_seeds([0.5]))


@pytest.mark.parametrize("dialect", ["gfm-emoji-autolink_bare_uris", "markdown-smart"])
def test_markdown_table_shows_each_text_as_it_is(dialect):
    "Pandoc reads every cell back as plain text, white space folded and invisible signs spelled out."
    pypandoc = pytest.importorskip("pypandoc")
    rng = np.random.default_rng(0)
    signs = list("ab1 _*<>|\\`$~&;#[](){}!@^:-+='\"/\n\t.\u200b\u00e9")
    rows = [["".join(rng.choice(signs, rng.integers(0, 14))) for _ in range(2)] for _ in range(300)]
    rows += [["<think>a|b</think>", "**x** $y$ `z` ~~w~~ &lt; \\"], ["[a](b)", "# c"], ["_x_ a_b __y__", "@fig-x [^1]"]]
    document = pypandoc.convert_text(
        markdown_table(pd.DataFrame(rows, columns=["left", "right"])), "json", format=dialect
    )
    (table,) = json.loads(document)["blocks"]
    body = table["c"][4][0][3]
    assert table["t"] == "Table" and len(body) == len(rows)
    for line, row in zip(body, rows, strict=True):
        for cell, text in zip(line[1], row, strict=True):
            inlines = [x for block in cell[4] for x in block["c"]]
            assert {x["t"] for x in inlines} <= {"Str", "Space", "SoftBreak"}, (text, inlines)
            shown = "".join(x["c"] if x["t"] == "Str" else " " for x in inlines)
            wanted = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in " ".join(text.split()))
            assert " ".join(shown.split()) == " ".join(wanted.split())


def test_markdown_table_leaves_missing_values_empty():
    table = pd.DataFrame({"a": [1.5, math.nan], "b": [None, "x"], "c": [1, 2], "d": [pd.NA, Interval(0.5, 0.4, 0.6)]})
    assert markdown_table(table, digits=1).splitlines() == [
        "| a | b | c | d |",
        "| ---: | --- | ---: | --- |",
        "| 1.5 |  | 1 |  |",
        "|  | x | 2 | 0.5 [0.4, 0.6] |",
    ]


def test_tables_without_rows():
    assert markdown_table(pd.DataFrame({"a": []})).splitlines()[0] == "| a |"

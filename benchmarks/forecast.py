"""What a study's samplers say on held-out rows, beside what the posterior of their supervised checkpoint would say.

Run: python benchmarks/forecast.py [STUDY_RUN_FOLDER] [--rows 60] [--n 48] [--seed 1] [--reward-temperature 1.0]

The folder is that of a finished study with `reasoning:` and `save_checkpoints: true` in its settings; without one, a small
study is run first: one seed of the likelihood's arm of configs/lacot/pocket.yaml, forty steps. On the first held-out rows
of the rewarded task, `n` rationales are drawn at temperature 1 for each row: by the supervised checkpoint, which is what
the arms start from, and by each arm and seed that differs from it. A gold answer's probability is that of the answerer of
each pair, after each rationale. The posterior is estimated from the drawings of the supervised checkpoint by weights
(`vlm_reward.lacot.forecast`): it is what an arm that matches its target at this reward temperature would say, and was known
before any arm was trained. Arms of GRPO and those whose reward is a rubric have other targets.

* answer probability: mean of P(Y | X, Z) over rationales;
* unplaced: share of rationales that do not place both objects asked about, which are those that place nothing (the
  chapter's guesses) and those that place other objects; for rows about scenes only;
* tokens: of a rationale, its end aside;
* distinct: different texts per row, a count, which has no posterior.

Intervals are 95 %, of means over rows, drawing rows. Estimates rest on the effective size, and a posterior at an
effective size of a few drawings is one of these drawings. Ten seconds of one core for each checkpoint of the pocket; the
small study before it takes 1 min 45 s on 2 cores that are busy with other work. The last line is JSON; `ok` says that
every line has its numbers and that the posterior rests on 10 drawings or more.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlm_reward.core.rows import Row
from vlm_reward.core.stats import Interval, bootstrap, markdown_table
from vlm_reward.data.behaviours import read_claims
from vlm_reward.lacot.forecast import (
    effective_size,
    importance_weights,
    posterior_log_weights,
    posterior_mean,
    score_drawings,
    value_columns,
)
from vlm_reward.lacot.pair import load_answerer
from vlm_reward.lacot.turns import turns_of
from vlm_reward.policy.families import load_policy
from vlm_reward.report.records import is_rewarded
from vlm_reward.studies.design import StudyConfig, held_out_rows, instruct, instructions, load_study
from vlm_reward.studies.evaluate import is_all_answer

ENOUGH = 10  # drawings that a posterior should rest on


def unplaced(row: Row, text: str) -> bool:
    """Whether a rationale does not place both objects asked about."""
    named = {name for name, *_ in read_claims(text)}
    return not {f"{o['colour']} {o['shape']}" for o in row["objects"][:2]} <= named


@dataclass(frozen=True)
class Request:
    """What to draw."""

    cfg: StudyConfig
    rows: Sequence[Row]
    n: int
    seed: int
    batch_size: int


def asked_rows(cfg: StudyConfig, most: int) -> list[Row]:
    """Held-out rows of the rewarded task that ask for reasoning."""
    rows = [row for row in held_out_rows(cfg) if is_rewarded(row["task"], cfg.data.name) and not is_all_answer(row)]
    if not rows or most < 1:
        raise SystemExit(
            f"no held-out row of {cfg.data.name} to ask: want --rows of at least 1 and rows with reasoning"
        )
    return rows[:most]


def drawings(request: Request, place: Mapping[str, Any], text: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drawings of a checkpoint, scored by its answerer; and what is averaged over them."""
    cfg, rows = request.cfg, instruct(request.rows, text)
    load = {"dtype": cfg.dtype, "device": cfg.device}
    model, processor = load_policy(**place, **load)
    frozen = load_answerer(place["name"], model, **load)
    turns = turns_of(processor, cfg.reasoning.layout, cfg.reasoning.role)
    how = {"n": request.n, "max_tokens": cfg.reasoning.max_tokens, "batch_size": request.batch_size}
    drawn = score_drawings(model, processor, turns, rows, frozen=frozen, seed=request.seed, **how)
    values = {"unplaced": unplaced} if all(row.get("objects") for row in rows) else {}
    return drawn, value_columns(drawn, rows, values)


def line_of(name: str, drawn: pd.DataFrame, values: pd.DataFrame, logs: Any = None) -> dict[str, Any]:
    """Means over rows of a sampler, or, with log weights, of its posterior."""
    weights = np.zeros(len(drawn)) if logs is None else logs
    found = {column: posterior_mean(values[column], weights, drawn["question"]) for column in values}
    if logs is None:
        return {"who": name, **found, "distinct": bootstrap(drawn.groupby("question")["text"].nunique())}
    size = effective_size(importance_weights(logs, drawn["question"]), drawn["question"]).mean()
    return {"who": name, **found, "effective size": float(size)}


def only(found: Sequence[Path], what: str) -> Path:
    """The one there is."""
    if len(found) != 1:
        raise SystemExit(f"{len(found)} folders {what}: want one, of a finished study with save_checkpoints: true")
    return found[0]


def start_of(cfg: StudyConfig, folder: Path) -> dict[str, Any]:
    """The policy that the arms start from: the supervised checkpoint, or the study's policy if there is no such stage."""
    if cfg.sft is None:
        return {"name": cfg.policy, "revision": cfg.revision}
    return {"name": str(only(list(folder.glob("stage/*/checkpoints/final")), f"{folder}/stage/*/checkpoints/final"))}


def lines(request: Request, folder: Path, tau: float) -> Iterator[dict[str, Any]]:
    """The supervised checkpoint, its posterior, then every arm and seed."""
    cfg = request.cfg
    text = None if cfg.prompt in ("none", "preset") else cfg.prompt
    drawn, values = drawings(request, start_of(cfg, folder), text)
    yield line_of("supervised", drawn, values)
    yield line_of(f"its posterior, tau {tau:g}", drawn, values, posterior_log_weights(drawn, reward_temperature=tau))
    for arm in cfg.arms:
        same = not cfg.arms[arm].trained and (cfg.sft is None or cfg.arms[arm].base == "sft")  # that was the first line
        for seed in () if same else cfg.seeds:
            name = f"{arm}-seed{seed}"
            place = only(list(folder.glob(f"arms/{name}-*/checkpoints/final")), f"{folder}/arms/{name}-*")
            yield line_of(name, *drawings(request, {"name": str(place)}, instructions(cfg, arm)))


def check(folder: Path) -> StudyConfig:
    """Read the study's settings, and refuse one that has nothing to compare."""
    if not (folder / "study.yaml").is_file():
        raise SystemExit(f"{folder} has no study.yaml: give the folder of a finished study")
    cfg = load_study(folder / "study.yaml")
    if cfg.reasoning is None or not cfg.save_checkpoints:
        raise SystemExit(f"{folder}: want a study with reasoning and save_checkpoints: true")
    if cfg.reasoning.min_tokens:
        said = f"reasoning.min_tokens {cfg.reasoning.min_tokens} forbids short rationales"
        raise SystemExit(f"{folder}: {said}, and weights are those of free drawings; want a study with 0")
    return cfg


def small_study(root: Path) -> Path:
    """Run one arm of the pocket's study with one seed; the folder of the study."""
    pocket = Path(__file__).resolve().parent.parent / "configs/lacot/pocket.yaml"
    flags = {"seeds": "[0]", "arms": "{sft: {}, rgfn: {algorithm: rgfn}}", "rgfn.steps": "40", "select": "null"}
    flags |= {"eval.tasks": "{scenes/relation: 60}", "eval.samples": "1", "save_checkpoints": "true", "workers": "1"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", "import sys; from vlm_reward.cli import main; sys.exit(main())", "study"]
    subprocess.run([*command, str(pocket), "--root", str(root), *words], check=True, stdout=subprocess.DEVNULL)
    return only([path.parent for path in root.glob("*/study.yaml")], str(root))


def main() -> None:
    """Print a table as it fills; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished study; without it a small one is run")
    parser.add_argument("--rows", type=int, default=60, help="held-out rows")
    parser.add_argument("--n", type=int, default=48, help="rationales of each")
    parser.add_argument("--seed", type=int, default=1, help="of the drawings")
    parser.add_argument("--reward-temperature", type=float, default=1.0, help="tau of the posterior")
    parser.add_argument("--batch-size", type=int, default=64, help="rationales at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        compare(options.folder or small_study(Path(made)), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Measure the checkpoints of a study, line by line."""
    cfg = check(folder)
    torch.set_num_threads(cfg.threads)
    rows, found = asked_rows(cfg, options.rows), []
    request = Request(cfg, rows, options.n, options.seed, options.batch_size)
    for line in lines(request, folder, options.reward_temperature):
        found.append(line)
        head, rule, *rest = markdown_table(pd.DataFrame(found).drop(columns="effective size", errors="ignore")).split(
            "\n"
        )
        print("\n".join([head, rule, rest[-1]] if len(found) == 1 else [rest[-1]]), flush=True)
    size = found[1]["effective size"]
    print(f"effective size of the posterior: {size:.1f} of {options.n} drawings a row")
    told = [number for line in found for value in line.values() if isinstance(value, Interval) for number in value]
    figures = {"rows": len(rows), "n": options.n, "seed": options.seed, "tau": options.reward_temperature}
    ok = all(math.isfinite(number) for number in told) and size >= ENOUGH
    print(json.dumps({"ok": ok, **figures, "effective_size": size, "lines": found}))


if __name__ == "__main__":
    main()

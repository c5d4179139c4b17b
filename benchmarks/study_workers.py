"""How a study of the pocket policy fills two cores: threads in one process, or processes of one thread each.

Run: python benchmarks/study_workers.py [--steps 10] [--arms 4]

The same jobs (arms of GRPO that differ in nothing but their name and seed) are done three times, and every time in
fresh processes, so that all pay for loading alike. Wall-clock seconds, so nothing else should run on the machine. The
last line is JSON; `ok` says that two workers of one thread took less time than one worker of two threads, and that the
metrics were equal for any number of workers.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from vlm_reward.core.stats import markdown_table

WAYS = {"1 worker, 1 thread": (1, 1), "1 worker, 2 threads": (1, 2), "2 workers, 1 thread": (2, 1)}


def do(steps: int, arms: int, workers: int, threads: int, root: str) -> None:
    """Do the jobs of a study, without a report."""
    from vlm_reward.core.config import from_dict
    from vlm_reward.studies.design import StudyConfig, load_ground
    from vlm_reward.studies.study import arrange, do_jobs, open_study

    study = {
        "name": "workers",
        "data": {"n": 256},
        "eval": {"tasks": {"scenes/relation": 64}, "samples": 1},
        "arms": {"accuracy": {"reward": "accuracy"}},
        "seeds": list(range(arms)),
        "grpo": {"steps": steps},
        "workers": workers,
        "threads": threads,
    }
    cfg = from_dict(StudyConfig, study)
    ground = load_ground(cfg)
    folder, jobs = open_study(cfg, Path(root), ground)
    arrange(folder, jobs)
    do_jobs(cfg, jobs, folder, ground, io.StringIO())


def metrics_of(root: str) -> str:
    """A name for all metrics below a folder."""
    files = sorted(Path(root).rglob("metrics.jsonl"), key=lambda path: path.parent.name.rpartition("-")[0])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def main() -> None:
    """Measure the three ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="training steps of an arm")
    parser.add_argument("--arms", type=int, default=4, help="arms")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return do(args.steps, args.arms, int(args.one[0]), int(args.one[1]), args.one[2])
    lines = []
    for name, (workers, threads) in WAYS.items():
        with tempfile.TemporaryDirectory() as root:
            start = time.perf_counter()
            how = ["--steps", str(args.steps), "--arms", str(args.arms), "--one", str(workers), str(threads), root]
            subprocess.run([sys.executable, __file__, *how], check=True, stderr=subprocess.DEVNULL)
            lines.append({"way": name, "seconds": time.perf_counter() - start, "metrics": metrics_of(root)})
    table = pd.DataFrame(lines).assign(speedup=lambda t: t["seconds"][0] / t["seconds"])
    print(markdown_table(table, 2))
    one, two, both = table["seconds"]
    equal = table["metrics"][0] == table["metrics"][2]
    figures = {"seconds": [round(t, 2) for t in (one, two, both)], "workers_over_threads": round(two / both, 3)}
    print(json.dumps({**figures, "equal_metrics": equal, "ok": bool(both < two and equal)}))


if __name__ == "__main__":
    main()

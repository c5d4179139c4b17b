"""Run every benchmark, one after the other, and gather the JSON of their last lines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def measure(
    path: Path,  # a benchmark; it prints a table and, as its last line, JSON with "ok"
) -> dict[str, Any]:  # that JSON
    """Run one benchmark and pass its output on."""
    print(f"---- {path.stem}", flush=True)
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    try:
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        return {**figures, "ok": bool(figures["ok"]) and not done.returncode}
    except (IndexError, KeyError, TypeError, json.JSONDecodeError) as error:
        return {"ok": False, "error": f"exit code {done.returncode}, last line is no JSON with 'ok': {error}"}


def main() -> int:
    """Print the figures of all benchmarks; the exit code is 1 when one is not ok."""
    results = {path.stem: measure(path) for path in sorted((ROOT / "benchmarks").glob("*.py"))}
    print("---- figures")
    for name, figures in results.items():
        print(json.dumps({"benchmark": name, **figures}))
    return not all(figures["ok"] for figures in results.values())


if __name__ == "__main__":
    sys.exit(main())

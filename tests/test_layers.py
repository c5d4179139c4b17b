"""The house: who may import whom, what the package may import at all, and what the sidebar lists."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlm_reward"
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))
BELOW = {  # room -> rooms that it may use beside itself
    "core": set(),
    "puzzles": {"core"},
    "physics": {"core"},
    "worlds": {"core", "puzzles", "physics"},
    "data": {"core", "puzzles", "physics", "worlds"},
    "rewards": {"core"},
    "policy": {"core"},
    "train": {"core", "policy"},
    "lacot": {"core", "policy", "rewards", "train"},
    "probes": {"core", "policy"},
    "audit": {"core", "puzzles", "physics", "data", "rewards"},
    "report": {"core", "worlds", "data"},
    "studies": {
        "core",
        "puzzles",
        "physics",
        "worlds",
        "data",
        "rewards",
        "policy",
        "train",
        "lacot",
        "probes",
        "audit",
        "report",
    },
}
BELOW["explore"] = BELOW["cli"] = set(BELOW)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
HEAVY = ("torch", "transformers", "trl", "datasets")


def dotted(path: Path) -> list[str]:
    """Name a module: ["core", "rows"]."""
    return list(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path, source: str | None = None) -> Iterator[str]:
    """Name every module that a file imports, anywhere in it, relative imports resolved."""
    tree = ast.parse(source if source is not None else path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ["vlm_reward", *dotted(path)][: -node.level] if node.level else []
            base = ".".join([*home, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms_of(names: Iterator[str]) -> set[str]:
    """Keep the rooms among imported names."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "vlm_reward" and len(part) > 1 and part[1] in BELOW}


def test_the_resolver_sees_every_kind_of_import():
    source = "from ..core.rows import Row\nfrom vlm_reward import studies\ndef f():\n    import vlm_reward.cli as c\n"
    assert rooms_of(imported(PACKAGE / "train" / "x.py", source)) == {"core", "studies", "cli"}
    assert rooms_of(imported(PACKAGE / "cli.py", "from .data import hub")) == {"data"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(dotted(path)))
def test_a_module_imports_only_what_its_room_stands_on(path):
    room = dotted(path)[0]
    assert room in BELOW, f"the room {room!r} is not in the map of the house: add it here and to the index"
    assert rooms_of(imported(path)) <= BELOW[room] | {room}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(dotted(path)))
def test_no_module_needs_the_development_tools(path):
    tops = {name.partition(".")[0] for name in imported(path)}
    assert not tops & {"nbdev", "fastcore", "execnb", "pytest", "hypothesis", "jupytext", "nbformat", "IPython"}


def test_the_command_line_starts_without_heavy_libraries():
    script = f"import sys, vlm_reward.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_itself_imports_nothing():
    assert list(imported(PACKAGE / "__init__.py")) == []


def leaves(contents: list) -> Iterator[str]:
    """Walk through the sidebar."""
    for item in contents:
        if isinstance(item, dict):
            yield from leaves(item["contents"])
        else:
            yield item


def test_the_sidebar_lists_every_notebook_once():
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    listed = list(leaves(sidebar["contents"]))
    assert sorted(listed) == sorted(path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_a_notebook_exports_the_module_of_its_name(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    named = [line for cell in cells for line in cell["source"] if line.startswith("#| default_exp ")]
    room = path.relative_to(ROOT / "nbs").parts[:-1]
    expected = ".".join([*room, path.stem.lstrip("0123456789_")])
    assert [line.split()[-1] for line in named] == ([] if path.stem == "index" else [expected])


def test_every_module_has_a_notebook():
    chapters = {(*path.relative_to(ROOT / "nbs").parts[:-1], path.stem.lstrip("0123456789_")) for path in NOTEBOOKS}
    assert {tuple(dotted(path)) for path in MODULES} <= chapters

"""What a stranger installs: metadata, pinned versions, the files that travel, the commands that are promised."""

import re
import shlex
import subprocess
import tomllib
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlm_reward

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict[str, str]:
    """Read settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def asked(extra: str = "") -> list[Requirement]:
    """List what the package asks for; with "dev", what its developers ask for too."""
    names = ("requirements", "dev_requirements") if extra else ("requirements",)
    return [Requirement(text) for name in names for text in shlex.split(settings()[name])]


def pinned() -> dict[str, Requirement]:
    """Read constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def closure(wanted: list[Requirement]) -> set[tuple[str, str]]:
    """Follow requirements to the end: (name, extra) pairs of everything that they install here."""
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        for extra in requirement.extras or {""}:
            pair = (canonicalize_name(requirement.name), extra)
            if pair not in seen:
                seen.add(pair)
                inside = map(Requirement, distribution(pair[0]).requires or ())
                wanted += [r for r in inside if r.marker is None or r.marker.evaluate({"extra": extra})]
    return seen


def test_every_package_that_is_installed_for_us_is_pinned():
    lacking = {name for name, _ in closure(asked("dev"))} - set(pinned())
    assert lacking == set()


def test_every_pin_is_one_exact_version_within_what_we_ask_for():
    pins = pinned()
    for pin in pins.values():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is not exact"
    for requirement in asked("dev"):
        version = str(pins[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} forbids {version}"


def test_the_run_time_needs_no_development_tool():
    names = {name for name, _ in closure(asked())}
    assert not names & {"nbdev", "fastcore", "execnb", "ghapi", "jupytext", "jupyterlab", "pytest", "ruff", "pyright"}


def test_the_versions_agree():
    assert vlm_reward.__version__ == settings()["version"]
    assert distribution("vlm_reward").version == settings()["version"]


def test_pyproject_holds_tool_tables_only():
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))) == {"tool"}


def test_the_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text and settings()["license"] == "apache2"


@pytest.mark.parametrize("target", ["demo", "test", "venv", "lab", "site", "bench"])
def test_make_knows_the_promised_targets(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_demo_is_the_quickstart_in_the_pinned_environment():
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo", "VENV=/nowhere/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert "/nowhere/venv/bin/vlm-reward study configs/quickstart.yaml" in lines[-1]
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs)
    assert not any("[dev]" in line for line in installs), "the demo needs no development tool"


def test_the_tests_end_with_pytest():
    """Whoever reads the last lines of CI reads pytest's own closing line."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = re.search(r"for step in ([^;]+);", makefile)
    assert steps and steps[1].split()[-1] == "unit"
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().endswith("make test")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_workflows_call_the_same_commands():
    folder = ROOT / ".github/workflows"
    jobs = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"] for path in folder.glob("*.yml")}
    steps = {name: [step for job in jobs[name].values() for step in job["steps"]] for name in jobs}
    assert any(step.get("run") == ".ci/run" for step in steps["test"])
    assert any(step.get("uses", "").startswith("quarto-dev/quarto-actions/setup@") for step in steps["publish"])


def tracked() -> list[Path]:
    """List the files of the repository; without git, all text files that are not built."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: the list of its files is unknown")
    return [ROOT / name for name in done.stdout.splitlines()]


def test_no_file_knows_the_machine_it_was_written_on():
    pattern = re.compile(r"/(work|root|home|opt)/\w+")
    texts = [p for p in tracked() if p.suffix in (".py", ".md", ".yml", ".yaml", ".ipynb", ".ini", ".toml", ".txt", "")]
    here = Path(__file__).resolve()
    found = [p for p in texts if p.is_file() and p != here and pattern.search(p.read_text(encoding="utf-8"))]
    assert found == []


def test_nothing_large_is_in_the_repository():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked() if p.is_file() and p.stat().st_size > 6e6}
    assert large == {}

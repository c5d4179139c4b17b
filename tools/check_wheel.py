"""Build sdist and wheel, install the wheel into a clean environment, and use it there.

The clean environment sees the packages that the wheel asks for, and what those ask for, by links into this one: pip
itself resolves them again and refuses a gap or a clash. It sees nothing else, the development tools least of all.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROOF = Path(__file__).with_name("wheel_proof.py")


def run(
    *command: str | Path,  # what to run
    cwd: Path = ROOT,  # where
) -> str:  # its output
    """Run a command; its output is shown only when it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def requirements(
    wheel: Path,  # the built wheel
) -> list[Requirement]:  # what it needs at run time
    """Read what the wheel itself says, not what settings.ini says."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=False).requires_dist or []


def needed(
    wanted: list[Requirement],  # of the wheel
) -> Iterator[Distribution]:  # each distribution once
    """Follow requirements to the end."""
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        wanted += map(Requirement, found.requires or ())
        yield found


def link(
    found: Distribution,  # installed here
    target: Path,  # site-packages of the clean environment
) -> None:
    """Show an installed distribution to the clean environment."""
    for top in {Path(str(file)).parts[0] for file in found.files or ()}:
        source = Path(str(found.locate_file(top)))
        if top not in ("..", "__pycache__") and source.exists() and not (target / top).exists():
            (target / top).symlink_to(source)


def clean_environment(
    folder: Path,  # where to make it
    wheel: Path,  # the built wheel
) -> Path:  # its Python
    """Make an environment with the wheel and what it needs."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    for found in needed(requirements(wheel)):
        link(found, packages)
    run(python, "-m", "pip", "install", "--no-index", wheel, cwd=folder)
    return python


def main() -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory(prefix="wheel") as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)  # the wheel is built from the sdist
        wheel = next((folder / "dist").glob("*.whl"))
        print(*(f"{path.stat().st_size / 1e6:6.2f} MB  {path.name}" for path in (folder / "dist").iterdir()), sep="\n")
        python = clean_environment(folder / "clean", wheel)
        print(run(python, "-I", PROOF, cwd=folder), end="")


if __name__ == "__main__":
    main()

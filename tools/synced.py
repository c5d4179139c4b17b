"""Is the package what the chapters export, and are the chapters clean? Works on a copy, so the tree stays as it is."""

import difflib
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORT = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"


def package_of(
    root: Path,  # folder that holds settings.ini
) -> str:  # name of the package
    """Read the package's name from settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]["lib_name"]


def export_copy(
    root: Path,  # a checkout
    copy: Path,  # an empty folder
) -> None:
    """Copy the chapters, then export and clean the copy, starting from no module at all."""
    package = copy / package_of(root)
    package.mkdir()
    shutil.copy(root / "settings.ini", copy)
    shutil.copy(root / package.name / "__init__.py", package)
    shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns("_*", ".*"))
    done = subprocess.run([sys.executable, "-c", EXPORT], cwd=copy, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the export stopped:\n{done.stdout}{done.stderr}")


def listed(
    root: Path,  # a checkout or its exported copy
) -> dict[str, Path]:  # path below root -> path
    """List modules and chapters."""
    found = itertools.chain((root / package_of(root)).rglob("*.py"), (root / "nbs").rglob("*.ipynb"))
    paths = {path.relative_to(root): path for path in found}
    return {str(short): path for short, path in sorted(paths.items()) if not any(p[0] == "." for p in short.parts)}


def differences(
    root: Path,  # a checkout
    copy: Path,  # its exported copy
) -> Iterator[str]:  # one text for each file that differs
    """Compare the tree with what the chapters give."""
    here, there = listed(root), listed(copy)
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            yield f"{name}: no chapter exports it"
        elif name not in here:
            yield f"{name}: missing, a chapter exports it"
        elif here[name].read_bytes() != there[name].read_bytes():
            old, new = (path.read_text(encoding="utf-8").splitlines() for path in (here[name], there[name]))
            diff = itertools.islice(difflib.unified_diff(old, new, "stored", "exported", n=0, lineterm=""), 12)
            yield "\n  ".join([f"{name}: differs", *diff])


def main() -> int:
    """Print what is out of step; the exit code is 1 when anything is."""
    with tempfile.TemporaryDirectory(prefix="synced") as folder:
        export_copy(ROOT, Path(folder))
        problems = list(differences(ROOT, Path(folder)))
    print(*problems, sep="\n")
    print(f"{len(problems)} of {len(listed(ROOT))} files out of step{': run `make export`' if problems else ''}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

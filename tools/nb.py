"""Chapters as text: show, apply, export, run and check notebooks.

nb show X.ipynb            print a chapter as percent-format text
nb apply X.py X.ipynb      write the text into the chapter (ids and outputs stay) and export its module
nb export [X.ipynb ...]    export modules; without a name everything, its index too, and clean
nb run [paths]             run in fresh kernels and store the outputs
nb check [paths]           run in fresh kernels and compare with the stored outputs
"""

import argparse
import sys
from pathlib import Path

import jupytext
from fresh import check_chapter, run_all, run_chapter
from habits import chapter_lapses
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.export import nb_export

KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def show(
    notebook: str,  # path of a notebook
) -> None:
    """Print a chapter as percent-format text."""
    print(jupytext.writes(jupytext.read(notebook), fmt="py:percent"))


def apply(
    text: str,  # path of a percent-format text
    notebook: str,  # path of the notebook, made when it does not exist
) -> None:
    """Write the text into the notebook, keep ids and outputs of unchanged cells, and export its module."""
    new = jupytext.read(text, fmt="py:percent")
    if Path(notebook).exists():
        new = jupytext.combine.combine_inputs_with_outputs(new, jupytext.read(notebook), fmt="py:percent")
    new.metadata = KERNEL
    Path(notebook).parent.mkdir(parents=True, exist_ok=True)
    jupytext.write(new, notebook, fmt="ipynb")
    nbdev_clean(notebook)
    nb_export(notebook)
    for lapse in chapter_lapses(Path(notebook)):
        print(lapse, file=sys.stderr)


def export(
    notebooks: list[str],  # paths; none means all
) -> None:
    """Write modules from their chapters."""
    for notebook in notebooks:
        nb_export(notebook)
    if not notebooks:
        nbdev_export()
        nbdev_clean()


def parse(
    arguments: list[str] | None = None,  # the command line without its first word
) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("show").add_argument("notebook")
    apply_parser = verbs.add_parser("apply")
    apply_parser.add_argument("text")
    apply_parser.add_argument("notebook")
    verbs.add_parser("export").add_argument("notebook", nargs="*")
    for verb in ("run", "check"):
        fresh_parser = verbs.add_parser(verb)
        fresh_parser.add_argument("paths", nargs="*", default=["nbs"], help="notebooks or folders (default: nbs)")
        fresh_parser.add_argument("-j", "--jobs", type=int, default=1, help="kernels at a time (default: 1)")
        fresh_parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell (default: 600)")
    return parser.parse_args(arguments)


def main() -> int:
    """Do what the command line asks; the exit code is 1 when a chapter fails or is stale."""
    args = parse()
    if args.verb == "show":
        show(args.notebook)
    elif args.verb == "apply":
        apply(args.text, args.notebook)
    elif args.verb == "export":
        export(args.notebook)
    else:
        problems = run_all({"run": run_chapter, "check": check_chapter}[args.verb], args.paths, args.jobs, args.timeout)
        print(*problems, sep="\n", end="\n" if problems else "")
        return bool(problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())

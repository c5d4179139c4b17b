"Chapters as text: `nb show X.ipynb`, `nb apply X.py X.ipynb`, `nb export X.ipynb ...`."
import argparse
from pathlib import Path

import jupytext
from nbdev.export import nb_export


def show(notebook):
    print(jupytext.writes(jupytext.read(notebook), fmt="py:percent"))


def apply(text, notebook):
    new = jupytext.read(text, fmt="py:percent")
    if Path(notebook).exists():
        new = jupytext.combine.combine_inputs_with_outputs(new, jupytext.read(notebook), fmt="py:percent")
    new.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    Path(notebook).parent.mkdir(parents=True, exist_ok=True)
    jupytext.write(new, notebook, fmt="ipynb")
    nb_export(notebook)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("show").add_argument("notebook")
    a = verbs.add_parser("apply")
    a.add_argument("text")
    a.add_argument("notebook")
    verbs.add_parser("export").add_argument("notebook", nargs="+")
    args = parser.parse_args()
    if args.verb == "show":
        show(args.notebook)
    elif args.verb == "apply":
        apply(args.text, args.notebook)
    else:
        for n in args.notebook:
            nb_export(n)


if __name__ == "__main__":
    main()

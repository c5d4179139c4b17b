"""README.md from nbs/index.ipynb: the same cells, with links that work in the repository."""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from fresh import directives
from nbformat import NotebookNode
from pages import plain

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- Generated from nbs/index.ipynb by tools/readme.py: edit there. -->"


def relocate(
    text: str,  # markdown of the index
) -> str:  # the same, as seen from the folder above
    """Turn links to notebooks and pictures into links from the repository's root; drop comments and attributes."""
    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.S)
    text = re.sub(r'!\[[^\]]*\]\(([^)\s]+)\)\{[^}\n]*fig-alt="([^"]*)"[^}\n]*\}', r"![\2](\1)", text)
    text = re.sub(r"\]\((?!https?://|#|/)([^)\s]+)\)", r"](nbs/\1)", text)
    return re.sub(r"(\]\([^)\s]+\))\{[^}\n]*\}", r"\1", text)


def output_text(
    output: NotebookNode,  # of a code cell
) -> str:  # markdown
    """Show an output: markdown as it is, everything else as text."""
    if output.output_type == "stream":
        return f"```text\n{plain(output.text).rstrip()}\n```"
    if "text/markdown" in output.data:
        return relocate(plain(output.data["text/markdown"]))
    if any(mime.startswith("image/") for mime in output.data):
        raise SystemExit("README.md cannot hold a picture that a cell draws: store it in nbs/images and link it")
    return f"```text\n{plain(output.data['text/plain'])}\n```"


def cell_text(
    cell: NotebookNode,  # a cell of the index
) -> str:  # markdown, empty for hidden cells
    """Show a cell."""
    if cell.cell_type == "markdown":
        return relocate(cell.source)
    if cell.cell_type != "code" or {"hide", "export", "default_exp"} & directives(cell.source):
        return ""
    code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
    return "\n\n".join([f"```python\n{code}\n```", *map(output_text, cell.outputs)])


def readme(
    index: Path,  # the notebook
) -> str:  # the whole text
    """Write README.md."""
    texts = map(cell_text, nbformat.read(index, 4).cells)
    return "\n\n".join([MARK, *(text.strip() for text in texts if text.strip())]) + "\n"


def main() -> int:
    """Write README.md, or compare it; the exit code is 1 when it is out of step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    text, path = readme(ROOT / "nbs/index.ipynb"), ROOT / "README.md"
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    stale = not path.exists() or path.read_text(encoding="utf-8") != text
    print("README.md is out of step with nbs/index.ipynb: run `make export`" if stale else "README.md is in step")
    return stale


if __name__ == "__main__":
    sys.exit(main())

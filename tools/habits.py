"""What a chapter must keep to, beyond running: told when it is written, tested for the whole book."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from fresh import directives
from nbformat import NotebookNode

EXPORTED = {"export", "exports", "exporti"}


def mixes_imports(
    source: str,  # a code cell
) -> bool:  # true when it imports and also does something else
    """Tell whether a cell would be run by the site's build, which runs every cell that imports."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    nodes = list(ast.walk(ast.parse("\n".join(lines))))
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
    return imports and any(isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign) for node in nodes)


def lapses(
    cell: NotebookNode,  # a code cell
) -> Iterator[str]:
    """Name what is wrong with one cell."""
    flags = directives(cell.source)
    names = {flag.partition(":")[0] for flag in flags}
    if not flags & {*EXPORTED, "eval:false"} and mixes_imports(cell.source):
        yield "imports and other code in one cell: the site's build would run it; give the imports a cell of their own"
    pictures = [o for o in cell.get("outputs", []) if {"image/png", "image/svg+xml"} & set(o.get("data", {}))]
    if pictures and not {"hide", "fig-alt"} & names and "output:false" not in flags:
        yield "a picture without `#| fig-alt: ...`, the text for people who do not see it"
    texts = ["".join(o.get("data", {}).get("text/plain", "")) for o in cell.get("outputs", [])]
    if "hide" not in names and any(re.match(r"<Figure size|<Axes[:(]|Text\(", text) for text in texts) and not pictures:
        yield "a figure that only shows as its name: end the cell with the figure, made by pyplot, or display it"
    if any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in cell.get("outputs", [])):
        yield "a widget: a page shows it as a dead picture"


def chapter_lapses(
    path: Path,  # a notebook
) -> list[str]:  # one line for each lapse
    """Name what is wrong with a chapter."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" and cell.source.strip()]
    return [f"{path}, cell {cell.id}: {lapse}\n    {cell.source[:100]!r}" for cell in cells for lapse in lapses(cell)]

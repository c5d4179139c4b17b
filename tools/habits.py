"""What a chapter must keep to, beyond running: told when it is written, tested for the whole book."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import yaml
from fresh import directives
from nbformat import NotebookNode

SET = re.compile(r"""\{(?:'[^'\n]*'|"[^"\n]*")(?:, (?:'[^'\n]*'|"[^"\n]*"))+\}""")  # of two texts or more


def lapses(
    cell: NotebookNode,  # a code cell
) -> Iterator[str]:
    """Name what is wrong with one cell."""
    flags = directives(cell.source)
    names = {flag.partition(":")[0] for flag in flags}
    pictures = [o for o in cell.get("outputs", []) if {"image/png", "image/svg+xml"} & set(o.get("data", {}))]
    if pictures and not {"hide", "fig-alt"} & names and "output:false" not in flags:
        yield "a picture without `#| fig-alt: ...`, the text for people who do not see it"
    texts = ["".join(o.get("data", {}).get("text/plain", "")) for o in cell.get("outputs", [])]
    if "hide" not in names and any(re.match(r"<Figure size|<Axes[:(]|Text\(", text) for text in texts) and not pictures:
        yield "a figure that only shows as its name: end the cell with the figure, made by pyplot, or display it"
    for line in re.findall(r"^#\| ([a-z-]+: .*)$", cell.source, re.MULTILINE):
        if not is_option(line):
            yield f"`#| {line[:60]}...` is no YAML: put the text into quotes"
    kinds = {mime for o in cell.get("outputs", []) for mime in o.get("data", {}) if "text/markdown" not in o["data"]}
    if "application/vnd.jupyter.widget-view+json" in kinds:
        yield "a widget: a page shows it as a dead picture; run the chapter again with `tools/nb.py run`"
    printed = [o.get("text", "") for o in cell.get("outputs", []) if o.output_type == "stream"]
    if any(SET.search(text) for text in texts + printed):
        yield "a set is shown, its order changes from run to run: show sorted(...)"
    if "text/html" in kinds and "hide" not in names:
        yield "an HTML output: its page would ask other hosts for scripts; show Markdown(markdown_table(table))"


def is_option(
    line: str,  # such as `fig-alt: a circle`
) -> bool:
    """Tell whether a cell option can be read: a text with a colon in it needs quotes."""
    try:
        return isinstance(yaml.safe_load(line), dict)
    except yaml.YAMLError:
        return False


def chapter_lapses(
    path: Path,  # a notebook
) -> list[str]:  # one line for each lapse
    """Name what is wrong with a chapter."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" and cell.source.strip()]
    return [f"{path}, cell {cell.id}: {lapse}\n    {cell.source[:100]!r}" for cell in cells for lapse in lapses(cell)]

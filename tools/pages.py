"""A processed notebook as one markdown text: cells, outputs and their options, the subset of Quarto that we use.

What is outside the subset is refused, so a page that renders here looks the same when Quarto renders it.
"""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

OPTIONS = {
    "echo",
    "eval",
    "output",
    "include",
    "warning",
    "label",
    "fig-cap",
    "fig-alt",
    "tbl-cap",
    "code-fold",
    "code-summary",
}
PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


class Unsupported(ValueError):
    """Something in a notebook that this renderer would show in another way than Quarto."""


@dataclass(frozen=True)
class Page:
    """One processed notebook and where its page goes."""

    source: Path  # below nbs, such as core/00_rows.ipynb
    notebook: NotebookNode  # processed by nbdev
    meta: dict[str, Any]  # its front matter: title, description, output-file

    @classmethod
    def read(
        cls,
        folder: Path,  # the folder of processed notebooks
        source: Path,  # the notebook, below that folder
    ) -> "Page":
        """Read a processed notebook."""
        notebook = nbformat.read(folder / source, 4)
        first = notebook.cells[0]
        found = re.match(r"\s*---\n(.*?)\n---", first.source, re.S) if first.cell_type == "raw" else None
        return cls(source, notebook, yaml.safe_load(found[1]) if found else {})

    @property
    def address(self) -> Path:
        """Where the page goes, below the site's folder: core/rows.html."""
        return self.source.parent / self.meta.get("output-file", self.source.with_suffix(".html").name)

    @property
    def title(self) -> str:
        """The heading of the page."""
        return self.meta.get("title", self.source.stem)

    @property
    def description(self) -> str:
        """The one sentence under the heading."""
        return self.meta.get("description", "")

    @property
    def lead(self) -> str:
        """That sentence as HTML."""
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(self.description))


def plain(
    content: str | list[str],  # text as the notebook format stores it
) -> str:
    """Join the lines of a stored text."""
    return content if isinstance(content, str) else "".join(content)


def fenced(
    text: str,  # any text
    attributes: str,  # such as `.python .cell-code`
) -> str:
    """Put a text into a code fence that is longer than any fence inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{{{attributes}}}\n{text}\n{fence}\n"


def read_options(
    source: str,  # a code cell
) -> tuple[dict[str, Any], str]:  # the options at its head, and the code below them
    """Split a cell into options and code."""
    lines = source.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    options = yaml.safe_load("\n".join(line[2:].strip() for line in lines[:count])) or {}
    if not isinstance(options, dict) or set(options) - OPTIONS:
        unknown = sorted(set(options) - OPTIONS) if isinstance(options, dict) else options
        raise Unsupported(f"cell option {unknown} is not one of {sorted(OPTIONS)}")
    return options, "\n".join(lines[count:]).strip()


def picture(
    data: dict[str, Any],  # mime type -> content, one of them a picture
    options: dict[str, Any],  # of its cell
    target: Path,  # where the picture goes, without its ending
) -> str:  # markdown
    """Store a picture and show it as a figure."""
    mime = next(mime for mime in PICTURES if mime in data)
    if not options.get("fig-alt"):
        raise Unsupported("a picture without `#| fig-alt: ...`, the text for people who do not see it")
    path = target.with_suffix(f".{PICTURES[mime]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = plain(data[mime])
    path.write_bytes(content.encode() if mime == "image/svg+xml" else base64.b64decode(content))
    label = f"#{options['label']} " if str(options.get("label", "")).startswith("fig-") else ""
    alt = html.escape(options["fig-alt"], quote=True)
    address = f"{path.parent.name}/{path.name}"
    return f'\n![{options.get("fig-cap", "")}]({address}){{{label}.img-fluid alt="{alt}"}}\n'


def table(
    text: str,  # markdown
    options: dict[str, Any],  # of its cell
) -> str:  # markdown
    """Show markdown; with `tbl-cap` it is a numbered table."""
    if "tbl-cap" not in options:
        return f"\n{text}\n"
    label = f" {{#{options['label']}}}" if str(options.get("label", "")).startswith("tbl-") else ""
    return f"\n{text.rstrip()}\n\n: {options['tbl-cap']}{label}\n"


def display(
    data: dict[str, Any],  # mime type -> content
    options: dict[str, Any],  # of its cell
    target: Path,  # where a picture would go, without its ending
) -> str:  # markdown
    """Show one value in its richest supported form."""
    if "text/markdown" in data:
        return table(plain(data["text/markdown"]), options)
    if PICTURES.keys() & data.keys():
        return picture(data, options, target)
    if "text/latex" in data:
        return f"\n{plain(data['text/latex'])}\n"
    rich = [mime for mime in data if mime != "text/plain"]
    if rich:
        raise Unsupported(f"an output as {rich[0]}: such pages need scripts from elsewhere; show markdown or text")
    return f"\n::: {{.cell-output .cell-output-display}}\n{fenced(plain(data['text/plain']), '.text')}:::\n"


def output(
    stored: NotebookNode,  # one output of a cell
    options: dict[str, Any],  # of the cell
    target: Path,  # where a picture would go, without its ending
) -> str:  # markdown
    """Show one output."""
    if stored.output_type == "error":
        raise Unsupported(f"a stored error: {stored.ename}: {stored.evalue}")
    if stored.output_type != "stream":
        return display(stored.data, options, target)
    if stored.name == "stderr" and options.get("warning") is False:
        return ""
    text = fenced(plain(stored.text).rstrip(), ".text")
    return f"\n::: {{.cell-output .cell-output-{stored.name}}}\n{text}:::\n"


def code(
    source: str,  # code without its options
    options: dict[str, Any],  # of its cell
) -> str:  # markdown
    """Show the code of a cell, folded when it asks for that."""
    shown = fenced(source, ".python .cell-code")
    if "code-fold" not in options:
        return shown
    state = " open" if options["code-fold"] == "show" else ""
    summary = html.escape(str(options.get("code-summary", "Code")))
    opening = f'<details{state} class="code-fold"><summary>{summary}</summary>'
    return f"```{{=html}}\n{opening}\n```\n\n{shown}\n```{{=html}}\n</details>\n```\n"


def cell_markdown(
    cell: NotebookNode,  # a processed cell
    target: Path,  # where its pictures go, without number and ending
) -> str:  # markdown
    """Show one cell."""
    if cell.cell_type == "markdown":
        return cell.source
    if cell.cell_type != "code":
        return ""
    options, source = read_options(cell.source)
    if options.get("include") is False:
        return ""
    body = code(source, options) if source and options.get("echo", True) is not False else ""
    if options.get("output", True) is not False:
        for number, stored in enumerate(cell.get("outputs", []), 1):
            body += output(stored, options, target.with_name(f"{target.name}-{number}"))
    return body if options.get("output") == "asis" or not body else f"::: {{.cell}}\n{body}\n:::\n"


def page_markdown(
    page: Page,  # a processed notebook
    site: Path,  # folder of the site; pictures go beside the page
) -> str:  # markdown
    """Show all cells of a page."""
    folder = site / page.address.parent / f"{page.address.stem}_files"
    texts = []
    for number, cell in enumerate(page.notebook.cells):
        try:
            texts.append(cell_markdown(cell, folder / f"figure-{number}"))
        except Unsupported as error:
            raise Unsupported(f"{page.source}, cell {cell.get('id', number)}: {error}") from error
    return "\n\n".join(texts)

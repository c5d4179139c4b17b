"""How the site shows a chapter: each exported function with its signature, its table of parameters and its source."""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import nbdev.serve
import nbdev.showdoc
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_fold, mv_exports

WIDTH = 92  # of a signature, in characters
EMPTY = inspect.Parameter.empty
EXPORTED = {"export", "exports", "exporti"}
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def type_text(
    annotation: Any,  # as `inspect.signature` gives it
) -> str:  # such as `Path | None`; empty when there is none
    """Write a type as it stands in the code, without the modules of its names."""
    if annotation is EMPTY:
        return ""
    return re.sub(r"(?<![\w'\"/])(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", inspect.formatannotation(annotation).strip("'"))


def default_text(
    default: Any,  # a default value
) -> str:  # empty when there is none
    """Write a default value in a few characters."""
    if default is EMPTY:
        return ""
    text = getattr(default, "__name__", None) or repr(default)
    if " object at 0x" in text:
        return "…"
    return text if len(text) <= 40 else f"{text[:37]}…"


def parameter_text(
    parameter: inspect.Parameter,
) -> str:  # such as `n: int = 1`
    """Write one parameter of a signature."""
    kind, default = type_text(parameter.annotation), default_text(parameter.default)
    text = STARS.get(parameter.kind, "") + parameter.name + (f": {kind}" if kind else "")
    return text + (f" = {default}" if default and kind else f"={default}" if default else "")


def parameter_texts(
    signature: inspect.Signature,
) -> Iterator[str]:  # with the star that parts the designer's settings
    """Write all parameters of a signature, `self` left out."""
    starred = False
    for parameter in signature.parameters.values():
        starred |= parameter.kind is inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        if parameter.name not in ("self", "cls"):
            yield parameter_text(parameter)


def signature_text(
    symbol: Any,  # a function or class
    name: str,  # how to call it
) -> str:  # Python code, one line or one line for each parameter
    """Write a signature without comments."""
    kind = "class" if inspect.isclass(symbol) else "async def" if inspect.iscoroutinefunction(symbol) else "def"
    try:
        signature = inspect.signature(symbol)
    except (ValueError, TypeError):
        return f"{kind} {name}"
    parameters = list(parameter_texts(signature))
    result = "" if inspect.isclass(symbol) else type_text(signature.return_annotation)
    end = f") -> {result}" if result else ")"
    line = f"{kind} {name}({', '.join(parameters)}{end}"
    return line if len(line) <= WIDTH else f"{kind} {name}(\n    " + ",\n    ".join(parameters) + f",\n{end}"


def cell_text(
    text: str,  # of a table cell
) -> str:
    """Put a text into one cell of a markdown table; a bar in code stays as it is."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", " ".join(text.split()))


def code_cell(
    text: str,  # code
) -> str:
    """Put code into one cell of a markdown table."""
    return f"`{' '.join(text.split())}`" if text else ""


def table_text(
    rows: list[tuple[str, ...]],  # cells; empty columns are dropped
    head: tuple[str, ...],  # names of the columns
) -> str:  # markdown
    """Write a table."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def helps(
    symbol: Any,  # a function or class
) -> dict[str, str]:  # field -> its help, for dataclasses that carry it
    """Read the help that settings carry in their metadata."""
    fields = dataclasses.fields(symbol) if inspect.isclass(symbol) and dataclasses.is_dataclass(symbol) else ()
    return {field.name: field.metadata["help"] for field in fields if "help" in field.metadata}


def parameter_table(
    symbol: Any,  # a function or class
) -> str:  # markdown, empty when nothing is said of any parameter
    """Write what the comments behind the parameters say."""
    notes, told = docments(symbol, full=True, returns=not inspect.isclass(symbol)), helps(symbol)
    rows = []
    for name, note in notes.items():
        said = "" if note["docment"] in (EMPTY, None) else str(note["docment"])
        label = "*returns*" if name == "return" else f"`{name}`"
        default = "" if name == "return" else default_text(note.get("default", EMPTY))
        meaning = cell_text(said or told.get(name, ""))
        if name not in ("self", "cls") and (meaning or note["anno"] is not None):
            rows.append((label, code_cell(type_text(note["anno"])), code_cell(default), meaning))
    if not any(row[3] for row in rows):
        return ""
    return table_text(rows, ("Parameter", "Type", "Default", "Meaning"))


def method_table(
    symbol: Any,  # a class
) -> str:  # markdown, empty when there is nothing to list
    """List the public methods and properties of a class with the first line of their docstrings."""
    rows = []
    for name, member in vars(symbol).items():
        plain = getattr(member, "__func__", getattr(member, "fget", member))
        if name.startswith("_") or not inspect.isfunction(plain) or not plain.__doc__:
            continue
        called = name if isinstance(member, property) else f"{name}({', '.join(call_names(plain))})"
        anchor = f"{symbol.__qualname__}.{name}".lower()  # where links to `Class.method` lead
        rows.append(
            (f"[{code_cell(called)}]{{#{anchor}}}", cell_text(inspect.cleandoc(plain.__doc__).partition("\n")[0]))
        )
    return table_text(rows, ("Member", "Meaning")) if rows else ""


def call_names(
    function: Any,  # a function of a class
) -> list[str]:  # names of its parameters
    """Name the parameters of a method."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


class Renderer:
    """What `show_doc` writes into a page."""

    def __init__(
        self,
        sym: Any,  # a function or class
        name: str | None = None,  # how to call it, if not by its own name
        title_level: int = 3,  # of the heading
    ):
        self.sym, self.nm, self.title_level = sym, name or sym.__qualname__, title_level

    def _repr_markdown_(self) -> str:
        """Heading with a link to the source, signature, docstring, parameters, members."""
        link = NbdevLookup().code(self.nm)
        heading = f"{'#' * self.title_level} {self.nm} {{.api}}"
        source = f"::: {{.source-link}}\n[source]({link})\n:::" if link else ""
        parts = [
            heading,
            source,
            f"```python\n{signature_text(self.sym, self.nm)}\n```",
            inspect.getdoc(self.sym) or "",
        ]
        parts += [parameter_table(self.sym), method_table(self.sym) if inspect.isclass(self.sym) else ""]
        return "\n\n".join(filter(None, parts))


def only_imports(
    source: str,  # a code cell
) -> bool:
    """Tell whether a cell does nothing but import."""
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


class ShowSource(Processor):
    """Keep the code of exported cells in the page, unless they only import; run these cells and no others."""

    def begin(self) -> None:
        """Turn `export` into `exports`, nbdev's word for an exported cell whose code is shown."""
        for cell in self.nb.cells:
            if cell.cell_type != "code" or "show_doc(" in cell.source:
                continue
            if not EXPORTED & cell.directives_.keys():
                cell.directives_["eval:"] = ["false"]
            elif "export" in cell.directives_ and not only_imports(cell.source):
                cell.directives_["exports"] = cell.directives_.pop("export")


def fold_source(cell: Any) -> None:
    """Fold exported code that stands below its documentation; constants stay open."""
    if cell.cell_type == "code" and "exports" in cell.directives_:
        tree = ast.parse(cell.source)
        documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if any(isinstance(node, documented) and not node.name.startswith("_") for node in tree.body):
            cell.source = f"#| code-fold: true\n#| code-summary: Source\n{cell.source}"


@functools.cache
def chapter_addresses() -> dict[str, str]:
    """Map names of modules to the addresses of their chapters, from the root of the site."""
    root = get_config().nbs_path
    paths = [path.relative_to(root) for path in root.rglob("[!_.]*.ipynb")]
    return {".".join([*path.parts[:-1], path.stem.lstrip("0123456789_")]): f"/{path.as_posix()}" for path in paths}


def link_chapters(cell: Any) -> None:
    """Turn a module's name in the prose, such as `core.rows`, into a link to its chapter."""

    def link(found: re.Match) -> str:
        address = chapter_addresses().get(found[1]) if "." in found[1] else None
        return f"[{found[0]}]({address})" if address else found[0]

    if cell.cell_type == "markdown":
        pieces = re.split(r"(^```.*?^```)", cell.source, flags=re.M | re.S)
        named = r"(?<!\[)`(?:vlm_reward\.)?([a-z_]+\.[a-z_]+)`"
        cell.source = "".join(p if p.startswith("```") else re.sub(named, link, p) for p in pieces)


class Arrange(Processor):
    """Put what documents a cell in front of its code, in the order of the code."""

    def begin(self) -> None:
        """Rearrange the cells."""
        cells, arranged = self.nb.cells, []
        for leader in [cell for cell in cells if not getattr(cell, "has_sd", False)]:
            place = cells.index(leader) + 1
            documents = list(itertools.takewhile(lambda cell: getattr(cell, "has_sd", False), cells[place:]))
            shown = "exports" in getattr(leader, "directives_", {})
            arranged += [*documents[::-1], leader] if shown else [leader, *documents[::-1]]
        cells[:] = arranged


class BookFilter(FilterDefaults):
    """The processors of nbdev, two of them replaced by ours, and our renderer."""

    def __init__(self):
        nbdev.showdoc.BasicMarkdownRenderer = Renderer

    def base_procs(self) -> list:
        """List the processors in their order."""
        ours = {add_fold: fold_source, mv_exports: Arrange}
        return [ShowSource, *(ours.get(processor, processor) for processor in super().base_procs()), link_chapters]


def process() -> None:
    """Process every chapter into `_proc`."""
    nbdev.serve.FilterDefaults = BookFilter
    nbdev.serve.proc_nbs(force=True, n_workers=2)

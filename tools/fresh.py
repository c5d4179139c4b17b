"""Run chapters, a fresh kernel each, and tell whether the outputs they store are still true."""

import base64
import io
import itertools
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbformat import NotebookNode
from PIL import Image

HELD = ("slow", "gpu", "notest", "eval:false")
KERNEL_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
NOISE = (
    (r"\x1b\[[0-9;]*m", ""),
    (r"( at)? 0x[0-9a-f]{6,}", ""),
    (r"\d+(\.\d+)? ?(min|s|ms|µs|us|it/s|s/it)\b", "T"),
    (r"(?<![\w.])/\S*/(?=\w)", "…/"),
)
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
BAR = re.compile(r"\d+%\|.*\||\d+(it|step|B) \[\d")
WIDGET = "application/vnd.jupyter.widget-view+json"


def chapters(
    paths: Iterable[str | Path],  # notebooks and folders of notebooks
) -> list[Path]:  # every notebook, sorted; names that start with . or _ are left out
    """List the notebooks that `paths` name."""
    found = []
    for path in map(Path, paths):
        inside = [path] if path.is_file() else sorted(path.rglob("*.ipynb"))
        found += [p for p in inside if not any(part[0] in "._" for part in p.relative_to(path).parts)]
    if not found:
        raise SystemExit(f"no notebook in {', '.join(map(str, paths))}")
    return found


def directives(
    source: str,  # text of a code cell
) -> set[str]:  # such as {"slow", "eval:false"}, spaces removed
    """Read the `#|` lines at the head of a cell."""
    head = itertools.takewhile(lambda line: line.startswith("#|") or not line.strip(), source.splitlines())
    return {line[2:].replace(" ", "") for line in head if line.strip()}


def is_held(
    cell: NotebookNode,  # any cell
) -> bool:  # true for cells that are not run here and keep the outputs they have
    """Tell whether a cell is flagged slow, gpu or notest, or not to be evaluated."""
    return cell.cell_type == "code" and bool(directives(cell.source) & set(HELD))


def without_progress(
    outputs: list[NotebookNode],  # of a cell
) -> list[NotebookNode]:
    """Drop progress bars: widgets, which a page cannot show, and the lines that bars leave on stderr."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr":
            lines = re.split(r"(?<=[\r\n])", output.text)
            output.text = "".join(line for line in lines if line.strip() and not BAR.search(line))
        if WIDGET not in output.get("data", {}) and output.get("text") != "":
            kept.append(output)
    return kept


def execute(
    path: Path,  # the notebook; its folder is the working directory, as in JupyterLab
    timeout: int,  # seconds for one cell
) -> NotebookNode:  # the notebook with new outputs
    """Run a notebook from the top in a kernel of its own."""
    notebook = nbformat.read(path, 4)
    metadata = {key: value for key, value in notebook.metadata.items() if key != "widgets"}
    held = [(cell, cell.source) for cell in notebook.cells if is_held(cell)]
    for cell, _ in held:
        cell.source = ""
    where = {"metadata": {"path": str(path.resolve().parent)}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where, coalesce_streams=True)
    client.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
    client.execute()
    for cell, source in held:
        cell.source = source
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = without_progress(cell.outputs)
    notebook.metadata = nbformat.from_dict(metadata)
    return notebook


def normal(
    text: str | list[str],  # text of an output, as the notebook format stores it
) -> str:  # the same without colours, addresses, timings and folders
    """Take out of a text what may change between honest runs."""
    text = text if isinstance(text, str) else "".join(text)
    for pattern, stand_in in NOISE:
        text = re.sub(pattern, stand_in, text)
    return text.strip()


def close(
    old: str,  # a decimal number as printed
    new: str,  # its counterpart
) -> bool:  # equal to one unit of the last printed digit, or to 1e-4 of the value
    """Compare two printed decimals as two processors may print them."""
    a, b = float(old), float(new)
    mantissa, _, exponent = old.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(1.01 * unit, 1e-4 * abs(a))


def same_text(old: str | list[str], new: str | list[str]) -> bool:
    """Compare two output texts: words and whole numbers exactly, decimals with `close`."""
    old, new = normal(old), normal(new)
    if DECIMAL.sub("#", old) != DECIMAL.sub("#", new):
        return False
    return all(map(close, DECIMAL.findall(old), DECIMAL.findall(new)))


def thumbnail(
    png: str,  # base64
) -> np.ndarray:  # (64, 64), grey levels 0 to 255
    """Shrink a picture until fonts and anti-aliasing no longer count."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("L").resize((64, 64))
    return np.asarray(picture, dtype=float)


def data_difference(
    old: dict,  # mime type -> stored content
    new: dict,  # mime type -> content of this run
    grey: float,  # mean grey levels by which pictures may differ
) -> str | None:  # what differs, None when nothing does
    """Compare the data of one display output with its counterpart."""
    if set(old) != set(new):
        return f"{sorted(old)} became {sorted(new)}"
    for mime in old:
        if mime == "image/png":
            away = float(np.abs(thumbnail(old[mime]) - thumbnail(new[mime])).mean()) if old[mime] != new[mime] else 0.0
            if away > grey or (grey == 0 and old[mime] != new[mime]):
                return f"the picture differs by {away:.1f} of 255 grey levels"
        elif mime.startswith("text/") and "image/png" not in old and not same_text(old[mime], new[mime]):
            return f"{normal(old[mime])[:300]!r} became {normal(new[mime])[:300]!r}"
    return None


def difference(
    old: list,  # stored outputs of a cell
    new: list,  # outputs of this run
    grey: float = 2.0,  # mean grey levels by which pictures may differ; 0 also compares stderr
) -> str | None:  # what differs, None when nothing does
    """Compare the outputs of one cell."""
    if grey:
        old, new = ([o for o in without_progress(outputs) if o.get("name") != "stderr"] for outputs in (old, new))
    kinds_old, kinds_new = ([(o.output_type, o.get("name")) for o in outputs] for outputs in (old, new))
    if kinds_old != kinds_new:
        return f"{len(kinds_old)} outputs became {len(kinds_new)}: {kinds_old} and {kinds_new}"
    for a, b in zip(old, new, strict=True):
        if a.output_type == "stream" and not same_text(a.text, b.text):
            return f"{normal(a.text)[:300]!r} became {normal(b.text)[:300]!r}"
        found = data_difference(a.get("data", {}), b.get("data", {}), grey)
        if found:
            return found
    return None


def run_chapter(path: Path, timeout: int) -> list[str]:
    """Run one notebook and store its outputs; those that only differ by noise stay as they are."""
    notebook, changed = execute(path, timeout), False
    for old, cell in zip(nbformat.read(path, 4).cells, notebook.cells, strict=True):
        if cell.cell_type != "code":
            continue
        if difference(old.get("outputs", []), cell.outputs, grey=0):
            changed = True
        else:
            cell.outputs = old.get("outputs", [])
    if changed:
        nbformat.write(notebook, path)
        nbdev_clean(str(path))
    return []


def check_chapter(path: Path, timeout: int) -> list[str]:
    """Run one notebook and list the cells whose stored outputs are stale; `#| volatile` cells are not compared."""
    stale = []
    for old, cell in zip(nbformat.read(path, 4).cells, execute(path, timeout).cells, strict=True):
        if cell.cell_type == "code" and "volatile" not in directives(cell.source):
            found = difference(old.get("outputs", []), cell.outputs)
            stale += [f"{path}, cell {cell.id}: {found}"] if found else []
    return stale


def run_all(
    work,  # run_chapter or check_chapter
    paths: Iterable[str | Path],  # notebooks and folders
    jobs: int,  # kernels at a time
    timeout: int,  # seconds for one cell
) -> list[str]:  # one entry for each problem
    """Work through chapters, several at a time, print the seconds of each and gather the problems."""
    os.environ.update({k: os.environ.get(k, v) for k, v in KERNEL_ENVIRONMENT.items()})

    def one(path: Path) -> list[str]:
        start = time.perf_counter()
        try:
            problems = work(path, timeout)
        except Exception as error:
            problems = [f"{path}: {type(error).__name__}: {error}"]
        print(f"{time.perf_counter() - start:6.1f} s  {path}{'  FAILED' if problems else ''}", flush=True)
        return problems

    with ThreadPoolExecutor(jobs) as pool:
        return list(itertools.chain.from_iterable(pool.map(one, chapters(paths))))

"""Build the site into _docs: nbdev processes the notebooks, pandoc renders them.

It reads the same _quarto.yml as Quarto, gives the same page addresses, and refuses what it does not know.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pypandoc
import yaml
from bs4 import BeautifulSoup
from pages import Page, Unsupported, page_markdown

ROOT = Path(__file__).resolve().parent.parent
PROCESSED, DOCS = ROOT / "_proc", ROOT / "_docs"
PARTS = Path(__file__).with_name("site")
DIALECT = "markdown+tex_math_single_backslash"
COPIED = (".svg", ".png", ".jpg", ".webp", ".gif", ".css")


def process() -> None:
    """Let nbdev process the notebooks: hide, execute imports and exported cells, document, link."""
    paths = [str(PARTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    environment = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "import book; book.process()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = dict.fromkeys(line for line in done.stderr.splitlines() if not line.startswith("  "))
        raise SystemExit("\n".join(["nbdev stopped:", *lines]))


def leaves(
    contents: list,  # of the sidebar in _quarto.yml: paths and sections
) -> Iterator[Path]:  # notebooks, in the order of the sidebar
    """Walk through the sidebar."""
    for item in contents:
        if isinstance(item, dict):
            yield from leaves(item["contents"])
        else:
            yield Path(item)


def read_pages(
    contents: list,  # of the sidebar in _quarto.yml
    partial: bool,  # whether sidebar and chapters may differ
) -> dict[Path, Page]:  # source -> page, in the order of the sidebar
    """Read the processed notebooks and make sure that the sidebar lists each of them."""
    order = list(leaves(contents))
    present = {path.relative_to(PROCESSED) for path in PROCESSED.rglob("*.ipynb")}
    missing, unlisted = set(order) - present, present - set(order)
    if (unlisted or missing) and not partial:
        raise SystemExit(f"sidebar: not listed {sorted(map(str, unlisted))}, absent {sorted(map(str, missing))}")
    return {source: Page.read(PROCESSED, source) for source in order if source in present}


def pandoc(
    text: str,  # the input
    *arguments: str,  # of pandoc
) -> str:  # the output
    """Run pandoc; a warning is an error."""
    command = [pypandoc.get_pandoc_path(), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode or done.stderr.strip():
        raise Unsupported(done.stderr.strip())
    return done.stdout


def render(
    page: Page,  # a processed notebook
) -> tuple[str, str]:  # table of contents and body, as HTML
    """Turn a page into HTML."""
    template, rules = PARTS / "parts.html", PARTS / "quartolite.lua"
    arguments = [
        "--mathml",
        "--section-divs",
        "--toc",
        "--toc-depth=3",
        f"--template={template}",
        f"--lua-filter={rules}",
    ]
    try:
        toc, body = pandoc(page_markdown(page, DOCS), "-f", DIALECT, "-t", "html5", *arguments).split("<!--PARTS-->")
    except Unsupported as error:
        raise SystemExit(f"{page.source}: {error}") from error
    return toc, body


def relative(
    target: Path,  # below the site's folder
    page: Page,  # where the link stands
) -> str:
    """Address `target` as seen from `page`."""
    return Path(os.path.relpath(target, page.address.parent)).as_posix()


class Links:
    """Rewrites the links of a page: to notebooks, and to the site's own address, become links between pages."""

    def __init__(
        self,
        pages: dict[Path, Page],  # source -> page
        base: str,  # address of the published site, ends with a slash
    ):
        self.pages, self.base, self.dead = pages, base, []

    def target(
        self,
        page: Page,  # where the link stands
        address: str,  # as written
    ) -> str:  # as it works from this page
        """Find where a link leads."""
        file, hash_sign, anchor = address.partition("#")
        if file.startswith(self.base):
            file = relative(Path(file[len(self.base) :] or "index.html"), page)
        elif file.endswith(".ipynb") and "://" not in file:
            source = Path(file[1:] if file.startswith("/") else os.path.normpath(page.source.parent / file))
            if source in self.pages:
                file = relative(self.pages[source].address, page)
            else:
                self.dead.append(f"{page.source}: link to {address}, which does not exist")
        return file + hash_sign + anchor

    def rewrite(
        self,
        page: Page,  # where the links stand
        body: str,  # its HTML
    ) -> str:
        """Rewrite every link of a page."""

        def one(found: re.Match) -> str:
            return f'href="{html.escape(self.target(page, html.unescape(found[1])), quote=True)}"'

        return re.sub(r'href="([^"]*)"', one, body)


def sidebar(
    contents: list,  # of the sidebar in _quarto.yml
    page: Page,  # the page on which it stands
    pages: dict[Path, Page],  # source -> page
) -> list[dict[str, Any]]:  # what the template shows
    """Prepare the sidebar of one page."""
    items = []
    for item in contents:
        if isinstance(item, dict):
            inside = sidebar(item["contents"], page, pages)
            items += [{"section": item["section"], "contents": inside}] if inside else []
        elif Path(item) in pages:
            target = pages[Path(item)]
            items.append({"href": relative(target.address, page), "title": target.title, "active": target is page})
    return items


def search_entries(
    page: Page,
    body: str,  # its HTML
) -> list[dict[str, str]]:  # one entry for each section
    """Cut a page into what the search finds."""
    soup = BeautifulSoup(body, "html.parser")
    for annotation in soup.find_all("annotation"):
        annotation.decompose()
    entries = []
    for section in reversed(soup.find_all("section")):
        section.extract()
        heading = section.find(re.compile(r"^h\d$"))
        name = heading.extract().get_text(" ", strip=True) if heading else ""
        entries.append((f"{page.address.as_posix()}#{section.get('id', '')}", name, section))
    entries.append((page.address.as_posix(), "", soup))
    texts = [(href, name, " ".join(part.get_text(" ").split())) for href, name, part in reversed(entries)]
    return [{"href": href, "title": page.title, "heading": name, "text": text} for href, name, text in texts]


def copy_assets() -> None:
    """Copy style sheets, scripts and the pictures that stand beside the notebooks."""
    shutil.rmtree(DOCS, ignore_errors=True)
    (DOCS / "site_libs").mkdir(parents=True)
    for name in ("site.css", "site.js"):
        shutil.copy(PARTS / name, DOCS / "site_libs")
    for path in PROCESSED.rglob("*"):
        if path.suffix in COPIED:
            target = DOCS / path.relative_to(PROCESSED)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def neighbours(
    page: Page,
    order: list[Page],  # as in the sidebar
) -> dict[str, dict[str, str]]:  # "previous" and "next", where there is one
    """Find the pages before and after a page."""
    at = order.index(page)
    near = {"previous": order[at - 1] if at else None, "next": order[at + 1] if at + 1 < len(order) else None}
    return {side: {"href": relative(p.address, page), "title": p.title} for side, p in near.items() if p}


def write_page(
    page: Page,
    parts: dict[str, str],  # toc and body, as HTML
    site: dict[str, Any],  # what _quarto.yml says of the website
    pages: dict[Path, Page],  # source -> page, in the order of the sidebar
) -> None:
    """Put a page into its frame."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PARTS), autoescape=True)
    frame = {
        "page": page,
        "site": site,
        "root": "../" * len(page.address.parent.parts),
        "sidebar": sidebar(site["sidebar"]["contents"], page, pages),
        **neighbours(page, list(pages.values())),
    }
    target = DOCS / page.address
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(environment.get_template("page.html").render(**frame, **parts), encoding="utf-8")


def build(
    partial: bool,  # whether sidebar and chapters may differ
) -> int:  # number of pages
    """Render every page, the links between them and the search index."""
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    pages = read_pages(site["sidebar"]["contents"], partial)
    links, search = Links(pages, site["site-url"].rstrip("/") + "/"), []
    copy_assets()
    with ThreadPoolExecutor(2) as pool:
        rendered = list(pool.map(render, pages.values()))
    for page, (toc, body) in zip(pages.values(), rendered, strict=True):
        body = links.rewrite(page, body)
        write_page(page, {"toc": toc, "body": body}, site, pages)
        search += search_entries(page, body)
    if links.dead and not partial:
        raise SystemExit("\n".join(links.dead))
    (DOCS / "search.json").write_text(json.dumps(search), encoding="utf-8")
    return len(pages)


def main() -> None:
    """Build the site."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partial", action="store_true", help="build although sidebar and chapters differ")
    parser.add_argument("--process-only", action="store_true", help="stop after nbdev, for Quarto to go on in _proc")
    parser.add_argument("--no-process", action="store_true", help="render _proc as it is")
    args = parser.parse_args()
    if not args.no_process:
        process()
    if not args.process_only:
        print(f"{build(args.partial)} pages in {DOCS}")


if __name__ == "__main__":
    main()

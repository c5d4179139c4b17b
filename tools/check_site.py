"""Open every page of _docs in a headless browser, wide, narrow and dark, and list what a reader would find broken."""

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Page, Request, Response, sync_playwright

DOCS = Path(__file__).resolve().parent.parent / "_docs"
PROBE = (Path(__file__).with_name("site") / "probe.js").read_text(encoding="utf-8")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWS = {  # name -> width and height in pixels, colour scheme
    "wide": (1440, 900, "light"),
    "narrow": (390, 844, "light"),
    "dark": (1440, 900, "dark"),
}


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_) -> None:
        """Say nothing."""


@contextmanager
def served(
    folder: Path,  # the site
) -> Iterator[str]:  # its address, ends with a slash
    """Serve a folder on a free local port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def browser_path() -> str:
    """Find a Chromium: the variable CHROME, or one of the usual names."""
    path = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        raise SystemExit(f"no browser: set CHROME, or install one of {', '.join(BROWSERS)}")
    return path


class Inspector:
    """Visits pages and gathers problems, anchors and links."""

    def __init__(
        self,
        base: str,  # address of the site
        shots: Path | None,  # where to put pictures of the pages
    ):
        self.base, self.shots = base, shots
        self.at = ""
        self.problems: dict[str, None] = {}  # ordered, each once
        self.anchors: dict[str, set[str]] = {}
        self.links: set[tuple[str, str]] = set()  # page, address; below the site without the site's own

    def say(self, text: str) -> None:
        """Note a problem of the current page."""
        self.problems[f"{self.at}: {text}"] = None

    def on_console(self, message: ConsoleMessage) -> None:
        """Note what the browser complains about."""
        if message.type in ("error", "warning"):
            self.say(f"console {message.type}: {message.text}")

    def on_request(self, request: Request) -> None:
        """Note a request that leaves the site."""
        if not request.url.startswith((self.base, "data:")):
            self.say(f"asks another host: {request.url}")

    def on_response(self, response: Response) -> None:
        """Note a request that fails."""
        if response.status >= 400:
            self.say(f"{response.status} {response.url}")

    def watch(self, tab: Page) -> None:
        """Listen to everything that can go wrong in a tab."""
        tab.on("console", self.on_console)
        tab.on("pageerror", lambda error: self.say(f"script error: {error}"))
        tab.on("request", self.on_request)
        tab.on("requestfailed", lambda request: self.say(f"request failed: {request.url}"))
        tab.on("response", self.on_response)

    def visit(
        self,
        tab: Page,
        page: str,  # path below the site
        view: str,  # one of VIEWS
    ) -> None:
        """Open a page and probe it."""
        self.at = page
        tab.goto(self.base + page, wait_until="load")
        seen = tab.evaluate(PROBE)
        for name, found in seen["problems"].items():
            for item in found:
                self.say(f"{name} ({view}): {item}")
        self.anchors[page] = set(seen["ids"])
        self.links |= {(page, link.removeprefix(self.base)) for link in seen["links"]}
        if self.shots:
            tab.screenshot(path=self.shots / f"{page.replace('/', '_')}.{view}.png", full_page=True)

    def follow(
        self,
        folder: Path,  # the site
    ) -> None:
        """Check that every link inside the site leads somewhere."""
        for page, link in sorted(self.links):
            if "://" in link:
                continue
            self.at = page
            file, _, anchor = link.partition("#")
            file = file or "index.html"
            if not (folder / file).is_file():
                self.say(f"dead link: {file}")
            elif anchor and anchor not in self.anchors.get(file, {anchor}):
                self.say(f"dead anchor: {file}#{anchor}")

    def search(
        self,
        tab: Page,
        page: str,  # where to search
        word: str,  # what to search for
    ) -> None:
        """Type into the search field and follow the first hit."""
        self.at = f"search for {word!r}"
        self.watch(tab)
        tab.goto(self.base + page)
        tab.fill("#search", word)
        tab.wait_for_selector("#hits a", timeout=5000)
        with tab.expect_navigation():
            tab.press("#search", "Enter")
        if word not in tab.inner_text("main").lower():
            self.say(f"the first hit does not hold the word: {tab.url}")


def visited(
    folder: Path,  # the site
    pages: list[str],  # paths below it
    word: str | None,  # what to search for; None leaves the search out
    shots: Path | None,  # where to put pictures of the pages
) -> tuple[dict[str, None], dict[str, set[str]], set[tuple[str, str]]]:  # problems, anchors, links
    """Visit some pages in every view, in a browser of their own."""
    with served(folder) as base, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=SWITCHES)
        inspector = Inspector(base, shots)
        for view, (width, height, scheme) in VIEWS.items():
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            inspector.watch(tab)
            for page in pages:
                inspector.visit(tab, page, view)
            tab.close()
        if word:
            inspector.search(browser.new_page(), pages[0], word)
        browser.close()
    return inspector.problems, inspector.anchors, inspector.links


def inspect(
    folder: Path,  # the site
    word: str | None,  # what to search for; None leaves the search out
    shots: Path | None = None,  # where to put pictures of the pages
    jobs: int = 1,  # browsers at the same time
) -> Inspector:  # with what was found
    """Visit every page in every view and search, then follow links."""
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    parts = [some for some in (pages[i::jobs] for i in range(jobs)) if some]
    words = [word, *[None] * len(parts)]
    whole = Inspector("", shots)
    with ProcessPoolExecutor(len(parts), mp_context=get_context("spawn")) as pool:
        asked = [pool.submit(visited, folder, some, word, shots) for some, word in zip(parts, words, strict=False)]
        for one in asked:
            problems, anchors, links = one.result()
            whole.problems |= problems
            whole.anchors |= anchors
            whole.links |= links
    whole.follow(folder)
    return whole


def main() -> int:
    """Print the problems; the exit code is 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=Path, help="folder for a picture of each page in each view")
    parser.add_argument("--jobs", type=int, default=2, help="browsers at the same time (default 2)")
    args = parser.parse_args()
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    if not (DOCS / "index.html").exists():
        raise SystemExit(f"no site in {DOCS}: build it first")
    found = inspect(DOCS, "reward", args.shots, args.jobs)
    print(*found.problems, sep="\n")
    print(f"{len(found.anchors)} pages, {len(VIEWS)} views, {len(found.links)} links, {len(found.problems)} problems")
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())

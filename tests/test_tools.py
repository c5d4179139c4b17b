"""The tool chain: stored outputs are honest, pages show what notebooks hold, and what is unsupported is refused."""

import base64
import contextlib
import io
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import book
import check_site
import fresh
import habits
import nb
import nbformat
import pages
import pytest
import readme
import synced
from build_site import DIALECT, PARTS, Links, pandoc, search_entries
from hypothesis import given
from hypothesis import strategies as st
from nbdev.config import get_config
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))


def png(grey: int = 200, spot: int = 200) -> str:
    """Draw a grey picture with a spot."""
    picture = Image.new("L", (80, 80), grey)
    picture.paste(spot, (20, 20, 60, 60))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


# ---- stored outputs


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<object at 0x7f3c63a22e10>", "<object at 0x7f0000000010>"),
        ("took 1.25 s", "took 0.98 s"),
        ("120.3 it/s", "99 it/s"),
        ("wrote /tmp/abc/x.csv", "wrote /tmp/zzz/x.csv"),
        ("accuracy 0.731", "accuracy 0.732"),
        ("loss 0.7312345678", "loss 0.7312345699"),
        ("\x1b[31mred\x1b[0m", "red"),
    ],
)
def test_noise_is_not_a_difference(old, new):
    assert fresh.same_text(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("left", "right"),
        ("3 rows", "4 rows"),
        ("accuracy 0.731", "accuracy 0.741"),
        ("0.5 0.5", "0.5"),
        ("wrote /tmp/abc/x.csv", "wrote /tmp/abc/y.csv"),
        ("1e-05", "1e-06"),
    ],
)
def test_a_difference_is_seen(old, new):
    assert not fresh.same_text(old, new)


@given(st.floats(-1e6, 1e6).map(lambda value: f"{value:.3f}"), st.integers(-5, 5))
def test_decimals_may_move_by_one_unit_or_a_ten_thousandth(text, units):
    moved = f"{float(text) + units / 1000:.3f}"
    small = abs(units) <= 1 or abs(units) / 1000 <= 1e-4 * abs(float(text))
    assert fresh.close(text, moved) == small


def test_pictures_are_compared_as_small_grey_ones():
    old = [new_output("display_data", {"image/png": png(), "text/plain": "<Figure>"})]
    near = [new_output("display_data", {"image/png": png(201, 201), "text/plain": "<Figure 2>"})]
    far = [new_output("display_data", {"image/png": png(200, 90), "text/plain": "<Figure>"})]
    assert fresh.difference(old, near) is None
    assert fresh.difference(old, near, grey=0), "running again stores the new picture"
    assert "grey levels" in fresh.difference(old, far)


def test_progress_bars_are_no_results():
    bar = "Loading weights: 100%|██████████| 57/57 [00:00<00:00, 3304.66it/s]\r"
    outputs = [
        new_output("stream", name="stderr", text=bar),
        new_output("stream", name="stderr", text=bar + "\na warning\n"),
        new_output("display_data", {fresh.WIDGET: {}, "text/plain": "Loading"}),
        new_output("stream", name="stdout", text="100%|x|"),
    ]
    assert [output.text for output in fresh.without_progress(outputs)] == ["a warning\n", "100%|x|"]


def write(path: Path, *cells: Any) -> Path:
    """Store a notebook."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(cells=list(cells))
    notebook.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)
    return path


def test_a_fresh_kernel_stores_outputs_and_finds_stale_ones(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    old = [new_output("execute_result", {"text/plain": "kept"})]
    path = write(
        tmp_path / "nbs" / "a.ipynb",
        new_code_cell("x = 20 + 1\nx * 2"),
        new_code_cell("#| slow\nx = 0", outputs=old),
        new_code_cell("#| eval: false\nx = 0", outputs=old),
        new_code_cell("#| volatile\nimport os\nos.getpid()"),
        new_code_cell("from pathlib import Path\nprint(Path.cwd().name, x)"),
    )
    assert fresh.run_all(fresh.run_chapter, [path], 1, 60) == []
    cells = nbformat.read(path, 4).cells
    assert cells[0].outputs[0].data["text/plain"] == "42"
    assert cells[1].outputs == cells[2].outputs == old, "held cells keep what they have"
    assert cells[4].outputs[0].text == "nbs 21\n", "held cells are not run"
    stored = path.read_text()
    path.write_text(stored.replace('"42"', '"43"'))
    (problem,) = fresh.run_all(fresh.check_chapter, [path], 1, 60)
    assert "'43' became '42'" in problem and path.read_text() != stored, "checking changes nothing"


def test_a_failing_cell_is_reported_and_nothing_is_stored(tmp_path):
    path = write(tmp_path / "a.ipynb", new_code_cell("1"), new_code_cell("raise ValueError('so it is')"))
    before = path.read_bytes()
    (problem,) = fresh.run_all(fresh.run_chapter, [path], 1, 60)
    assert "so it is" in problem and path.read_bytes() == before


def test_a_folder_without_notebooks_is_no_success(tmp_path):
    with pytest.raises(SystemExit, match="no notebook"):
        fresh.chapters([tmp_path])


CHAPTER = """# %%
#| default_exp core.twice

# %% [markdown]
# # Twice
#
# > Two of a kind.

# %%
#| export
def twice(
    x: int,  # a number
) -> int:  # two of it
    "Double."
    return 2 * x

# %%
twice(4)
"""


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a project; nbdev remembers the settings of the first one it sees."""
    get_config.cache_clear()
    with contextlib.chdir(folder):
        yield
    get_config.cache_clear()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Make a project of one chapter from its text."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "vlm_reward").mkdir()
    shutil.copy(ROOT / "vlm_reward/__init__.py", folder / "vlm_reward")
    (folder / "twice.py").write_text(CHAPTER)
    with inside(folder):
        nb.apply("twice.py", "nbs/core/00_twice.ipynb")
        nb.export([])
    return folder


def test_applying_text_keeps_ids_and_outputs(project, capsys):
    path = project / "nbs/core/00_twice.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[3].outputs = [new_output("execute_result", {"text/plain": "8"})]
    nbformat.write(notebook, path)
    before = [cell.id for cell in notebook.cells]
    (project / "twice.py").write_text(CHAPTER.replace("Two of a kind", "The same again"))
    with inside(project):
        nb.apply("twice.py", "nbs/core/00_twice.ipynb")
        nb.show("nbs/core/00_twice.ipynb")
    after = nbformat.read(path, 4)
    assert [cell.id for cell in after.cells if cell.cell_type == "code"] == [before[0], before[2], before[3]]
    assert after.cells[3].outputs[0].data["text/plain"] == "8"
    assert '"""The same again."""' in (project / "vlm_reward/core/twice.py").read_text()
    assert "# > The same again." in capsys.readouterr().out


def test_applying_text_names_lapses(project, tmp_path, capsys):
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "nbs/core/00_twice.ipynb"
    path.write_text(path.read_text().replace('"text/plain"', '"text/html": "<b>", "text/plain"'))
    with inside(tmp_path):
        nb.apply("twice.py", "nbs/core/00_twice.ipynb")
    assert "an HTML output" in capsys.readouterr().err


@pytest.fixture
def exported(project, tmp_path) -> tuple[Path, Path]:
    """Copy a project that is in step, and export the copy once more."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(project, here)
    with inside(here):
        nb.export([])
    there.mkdir()
    synced.export_copy(here, there)
    return here, there


def test_a_tree_in_step_has_no_differences_and_stays_as_it_is(exported, tmp_path):
    here, _ = exported
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    copy = tmp_path / "copy"
    copy.mkdir()
    synced.export_copy(here, copy)
    assert list(synced.differences(here, copy)) == []
    assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_what_is_out_of_step_is_named(exported):
    here, there = exported
    module = here / "vlm_reward/core/twice.py"
    module.write_text(module.read_text().replace("2 * x", "3 * x"))
    (here / "vlm_reward/core/orphan.py").write_text("")
    (here / "vlm_reward/_modidx.py").unlink()
    found = sorted(problem.partition("\n")[0] for problem in synced.differences(here, there))
    assert found == [
        "vlm_reward/_modidx.py: missing, a chapter exports it",
        "vlm_reward/core/orphan.py: no chapter exports it",
        "vlm_reward/core/twice.py: differs",
    ]


# ---- habits of the book


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_every_chapter_keeps_its_habits(path):
    assert habits.chapter_lapses(path) == []


@pytest.mark.parametrize(
    ("source", "outputs", "lapse"),
    [
        ("bar()", [new_output("display_data", {fresh.WIDGET: {}})], "widget"),
        ("table", [new_output("execute_result", {"text/html": "<table>", "text/plain": "a"})], "HTML"),
        ("plot()", [new_output("display_data", {"image/png": "x"})], "fig-alt"),
        ("plot()", [new_output("execute_result", {"text/plain": "<Figure size 640x480 with 1 Axes>"})], "its name"),
        ("#| fig-cap: Two curves: one rises\nplot()", [], "quotes"),
        ("print(names)", [new_output("stream", text="{'b', 'a'}\n")], "order"),
        ("names", [new_output("execute_result", {"text/plain": "frozenset({'b', 'a'})"})], "order"),
    ],
)
def test_lapses_are_named(source, outputs, lapse):
    (found,) = habits.lapses(new_code_cell(source, outputs=outputs))
    assert lapse in found


def test_good_cells_have_no_lapse():
    drawn = [new_output("display_data", {"image/png": "x", "text/plain": "<Figure size 1x1 with 1 Axes>"})]
    cells = [
        new_code_cell("#| fig-alt: a line\nplot()", outputs=drawn),
        new_code_cell("#| hide\nplot()", outputs=drawn),
        new_code_cell('#| fig-alt: "Two curves: one rises"\nplot()', outputs=drawn),
        new_code_cell("print(one, table)", outputs=[new_output("stream", text="{'a'} {'b': 'a', 'a': 'b'}\n")]),
    ]
    assert [lapse for cell in cells for lapse in habits.lapses(cell)] == []


# ---- pages


def html(markdown: str) -> str:
    """Render markdown as a page's body."""
    template, rules = PARTS / "parts.html", PARTS / "quartolite.lua"
    rendered = pandoc(
        markdown, "-f", DIALECT, "-t", "html5", "--mathml", f"--template={template}", f"--lua-filter={rules}"
    )
    return rendered.split("<!--PARTS-->")[1]


def cell_html(tmp_path: Path, source: str, *outputs: Any) -> str:
    """Render one code cell."""
    return html(pages.cell_markdown(new_code_cell(source, outputs=list(outputs)), tmp_path / "figure"))


def test_a_cell_shows_code_and_output(tmp_path):
    shown = cell_html(tmp_path, "print('a ``` b')", new_output("stream", name="stdout", text="a ``` <b>\n"))
    assert "a ``` &lt;b&gt;" in shown and shown.count("<pre") == 2


def test_options_hide_parts_of_a_cell(tmp_path):
    said = new_output("stream", name="stdout", text="said")
    assert "ask()" not in cell_html(tmp_path, "#| echo: false\nask()", said)
    assert "said" not in cell_html(tmp_path, "#| output: false\nask()", said)
    assert cell_html(tmp_path, "#| include: false\nask()", said).strip() == ""
    assert "<details" in cell_html(tmp_path, "#| code-fold: true\nask()")
    warning = new_output("stream", name="stderr", text="careful")
    assert "careful" not in cell_html(tmp_path, "#| warning: false\nask()", warning)


def test_figures_and_tables_are_numbered_and_referred_to(tmp_path):
    figure = new_code_cell(
        "#| label: fig-one\n#| fig-cap: A spot.\n#| fig-alt: a 'dark' \"spot\" <\ndraw()",
        outputs=[new_output("display_data", {"image/png": png(), "text/plain": "<Figure>"})],
    )
    rows = new_code_cell(
        "#| label: tbl-one\n#| tbl-cap: Some rows.\nrows()",
        outputs=[new_output("display_data", {"text/markdown": "| a | b |\n|---|--:|\n| x | 1 |\n"})],
    )
    text = "See @fig-one, @tbl-one and @eq-one.\n\n$$ x = \\frac{1}{2} $$ {#eq-one}\n\n"
    shown = html(text + "\n\n".join(pages.cell_markdown(cell, tmp_path / "f") for cell in (figure, rows)))
    assert "Figure 1: A spot." in shown and "Table 1: Some rows." in shown
    for target in ("fig-one", "tbl-one", "eq-one"):
        assert f'href="#{target}"' in shown and shown.count(f'id="{target}"') == 1
    assert "a 'dark' \"spot\" <" in unescape(shown) and "<math" in shown
    assert (tmp_path / "f-1.png").is_file()


def test_callouts_have_titles():
    shown = html("::: {.callout-warning}\n## Careful\n\ntext\n:::\n\n::: {.callout-note}\nother\n:::\n")
    assert "Careful" in shown and ">Note<" in shown.replace("\n", "") and "<h2" not in shown


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("#| column: margin\nx", None),
        ("#| misspelt\nx", None),
        ("x", new_output("error", ename="ValueError", evalue="so it is", traceback=[])),
        ("x", new_output("display_data", {"text/html": "<b>", "text/plain": "b"})),
        ("x", new_output("display_data", {fresh.WIDGET: {}, "text/plain": "b"})),
        ("x", new_output("display_data", {"image/png": png(), "text/plain": "<Figure>"})),
    ],
)
def test_cells_outside_the_subset_are_refused(tmp_path, source, output):
    with pytest.raises(pages.Unsupported):
        cell_html(tmp_path, source, *filter(None, [output]))


@pytest.mark.parametrize(
    "markdown",
    [
        "See @fig-absent.",
        "{{< video x.mp4 >}}",
        "```mermaid\ngraph\n```",
        "::: {.panel-tabset}\n## A\n:::",
        "<script>alert(1)</script>",
        "# A {#same}\n\n# B {#same}",
        "::: {.callout-note}\nnever closed",
    ],
)
def test_markdown_outside_the_subset_is_refused(markdown):
    with pytest.raises(pages.Unsupported):
        html(markdown)


def page(source: str, output_file: str = "") -> pages.Page:
    """Make a page without content."""
    return pages.Page(Path(source), new_notebook(), {"output-file": output_file} if output_file else {})


def test_links_lead_from_page_to_page():
    here, there = page("rewards/00_rubric.ipynb", "rubric.html"), page("core/00_rows.ipynb", "rows.html")
    links = Links({p.source: p for p in (here, there)}, "https://x.org/book/")
    for address, target in {
        "../core/00_rows.ipynb": "../core/rows.html",
        "../core/00_rows.ipynb#row": "../core/rows.html#row",
        "/core/00_rows.ipynb": "../core/rows.html",
        "https://x.org/book/core/rows.html#row": "../core/rows.html#row",
        "https://y.org/a.ipynb": "https://y.org/a.ipynb",
        "#here": "#here",
    }.items():
        assert links.target(here, address) == target
    assert links.dead == []
    links.rewrite(here, '<a href="09_absent.ipynb#a&amp;b">x</a>')
    assert len(links.dead) == 1 and "09_absent.ipynb" in links.dead[0]


def test_the_search_finds_sections():
    body = '<p>top</p><section id="a"><h2>One</h2><p>first</p><section id="b"><h3>Two</h3>second</section></section>'
    found = search_entries(page("a.ipynb"), body)
    assert [(entry["href"], entry["heading"], entry["text"]) for entry in found] == [
        ("a.html", "", "top"),
        ("a.html#a", "One", "first"),
        ("a.html#b", "Two", "second"),
    ]


# ---- documentation of functions


def example(
    completion: str,  # what the policy said
    boxes: list[Path] | None = None,  # where | it looked
    *,
    limit: float = 0.5,  # in [0, 1]
) -> float:  # points
    """Pay for looking."""
    return limit


class Example:
    """Something with members."""

    def rest(self, hours: int) -> None:
        """Do nothing."""

    @property
    def name(self) -> str:
        """What it is called."""
        return "example"


def test_a_signature_is_written_as_code():
    short = "def pay(completion: str, boxes: list[Path] | None = None, *, limit: float = 0.5) -> float"
    assert book.signature_text(example, "pay") == short
    assert book.signature_text(Example.rest, "Example.rest") == "def Example.rest(hours: int) -> None"


def test_a_long_signature_has_a_line_for_each_parameter():
    name = "a_name_that_is_rather_long_for_a_function_but_then"
    assert book.signature_text(example, name).splitlines()[1:4] == [
        "    completion: str,",
        "    boxes: list[Path] | None = None,",
        "    *,",
    ]


def test_the_comments_of_parameters_become_a_table():
    shown = html(book.parameter_table(example))
    assert shown.count("<tr>") == 5 and "where | it looked" in shown and "<code>list[Path] | None</code>" in shown
    assert book.parameter_table(len) == ""


def test_a_class_lists_its_members():
    shown = html(book.method_table(Example))
    assert "<code>rest(hours)</code>" in shown and "Do nothing." in shown and "<code>name</code>" in shown


# ---- README


def test_readme_links_work_from_the_root():
    text = "<!-- note\n -->\nsee [rows](core/00_rows.ipynb#a), [web](https://x.org), [top](#top) and `f](x)`"
    assert readme.relocate(text).startswith("see [rows](nbs/core/00_rows.ipynb#a), [web](https://x.org), [top](#top)")
    drawn = '![caption](images/house.svg){.themed fig-alt="a house"}'
    assert readme.relocate(drawn) == "![a house](nbs/images/house.svg)"


def test_the_readme_begins_with_what_it_is_and_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head = text[: text.index("\n## ")]
    assert head.index("# vlm_reward") < head.index("make demo") < head.index("make test")
    for target in readme.re.findall(r"\]\((nbs/[^)#]+)", text):
        assert (ROOT / target).is_file(), f"README.md links to {target}, which does not exist"


# ---- the browser


GOOD = """<!doctype html><html lang="en"><head><title>t</title><link rel="icon" href="data:,"></head>
<body><main><h1 id="top">t</h1><p>text <a href="#top">up</a></p></main></body></html>"""
BAD = """<!doctype html><html lang="en"><head><title>t</title><link rel="icon" href="data:,"></head><body><main>
<h1>one</h1><h1 id="twice">two</h1><p id="twice">see @fig-x</p><p style="color:#ddd">faint words</p>
<img src="absent.png" alt=""><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" alt="">
<pre>#| echo: false</pre><div style="width:3000px">wide</div><a href="absent.html">a</a><a href="good.html#no">b</a>
<script>console.error("so it is"); fetch("http://127.0.0.1:9/x").catch(() => {})</script></main></body></html>"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> list[str]:
    """Check a good page and a bad one."""
    try:
        check_site.browser_path()
    except SystemExit as lacking:
        pytest.skip(str(lacking))
    folder = tmp_path_factory.mktemp("site")
    (folder / "good.html").write_text(GOOD)
    (folder / "bad.html").write_text(BAD)
    return list(check_site.inspect(folder, None, jobs=2).problems)


def test_a_good_page_has_no_problem(problems):
    assert [problem for problem in problems if problem.startswith("good")] == []


@pytest.mark.parametrize(
    "problem",
    [
        "headings of the first level other than one (wide): 2",
        "anchor twice (wide): twice",
        "raw markup in the text (wide): see @fig-x",
        "text too faint (wide): p.: faint words",
        "broken picture (wide)",
        "picture without alternative text (wide)",
        "cell directive in the code (wide)",
        "wider than the window (narrow)",
        "console error: so it is",
        "asks another host: http://127.0.0.1:9/x",
        "dead link: absent.html",
        "dead anchor: good.html#no",
    ],
)
def test_a_broken_page_is_told(problems, problem):
    assert any(found.startswith(f"bad.html: {problem}") for found in problems), problems


def test_a_page_without_a_heading_or_markdown_cell_is_still_a_page(tmp_path):
    path = write(tmp_path / "a.ipynb", new_markdown_cell("text"), new_code_cell("x = 1"))
    shown = pages.page_markdown(pages.Page.read(tmp_path, Path(path.name)), tmp_path)
    assert "text" in shown and "x = 1" in shown

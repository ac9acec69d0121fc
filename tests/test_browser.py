"""The notebooks as their readers see them, in a real Chromium.

Executed in `jupyter notebook`, and the committed files as HTML.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import product
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from notebooks import JAPANESE, NOTEBOOKS, READ, ROOT, turn_down

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
)
mathjax = pytest.importorskip(
    "jupyter_server_mathjax",
    reason="jupyter-server-mathjax is not installed: pip install -e '.[test]'",
)

pytestmark = pytest.mark.slow
each = pytest.mark.parametrize("path", READ, ids=lambda p: p.stem)

MATHJAX = "https://cdnjs.cloudflare.com/ajax/libs/mathjax/2.7.9/"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FONTS = {
    "HTML-CSS": {
        "availableFonts": [],
        "imageFont": None,
        "preferredFont": None,
        "webFont": "STIX-Web",
    }
}  # those that the package has
PARTS = {  # of nbconvert's default template, and of the one that passes on the alt text
    "lab": {
        "cell": ".jp-Cell",
        "markdown": ".jp-RenderedMarkdown",
        "figure": ".jp-OutputArea-output img",
    },
    "classic": {"cell": ".cell", "markdown": ".text_cell_render", "figure": ".output_subarea img"},
}
BADGE_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20">'
    '<rect width="117" height="20" fill="grey"/></svg>'
)


def wait_for(condition, seconds, what, pause=time.sleep):
    """Ask every second until `condition()` is true; fails with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        pause(1)


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, or else the one that `playwright install chromium` fetched."""
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        found = found or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


def open_page(browser):
    """A tab 1,200 px wide that reaches this machine only.

    MathJax comes from its Python package, and a grey box stands for Colab's badge. `page.problems`
    lists the exceptions that scripts of the page raised, and scripts of MathJax that are not in the
    package.
    """
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.add_init_script(f"if (location.protocol == 'file:') window.MathJax = {json.dumps(FONTS)}")

    def answer(route):
        address = route.request.url
        headers = {"Access-Control-Allow-Origin": "*"}
        if address == BADGE:
            route.fulfill(body=BADGE_SVG, content_type="image/svg+xml", headers=headers)
        elif address.startswith(MATHJAX):
            file = (
                Path(mathjax.__file__).parent
                / "static"
                / address.removeprefix(MATHJAX).split("?")[0]
            )
            if file.exists():
                route.fulfill(path=file, headers=headers)
            else:
                if file.suffix == ".js":
                    page.problems.append(address)
                route.abort()
        else:
            route.abort()

    page.route(re.compile(r"https?://(?!127\.0\.0\.1:)"), answer)
    return page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`jupyter notebook` on a copy of the notebooks without outputs, with nobody's settings.

    Their counts are turned down, their sliders on. Yields f(path): the address of `path`.
    """
    home = tmp_path_factory.mktemp("server")
    shutil.copytree(ROOT / "sde_utils", home / "root" / "sde_utils")
    for path in READ:
        notebook = turn_down(nbformat.read(path, as_version=4))
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source = cell.source.replace("INTERACTIVE = False", "INTERACTIVE = True")
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, home / "root" / path.name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def address(path):
        return f"http://127.0.0.1:{port}/{path}?token=reader"

    def answers():
        assert process.poll() is None, (home / "log").read_text()
        try:
            urllib.request.urlopen(address("api/status"), timeout=5).close()
        except OSError:
            return False
        return True

    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    directories = {
        f"{name}_DIR": str(home / name)
        for name in ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_WORKSPACES")
    }
    options += ["--IdentityProvider.token=reader", f"--ServerApp.root_dir={home / 'root'}"]
    command = [sys.executable, "-m", "notebook", *options]
    environment = os.environ | directories | {"IPYTHONDIR": str(home / "ipython")}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=home / "root", env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(answers, 60, "the server answers")
            yield address
        finally:
            process.terminate()  # ends its kernels too
            process.wait(30)


def one_moves(page, figures):
    """One figure is an animated PNG, and screenshots of it differ.

    Those of another figure do not: it is not the page that moves.
    """
    animated = [f for f in figures if f.evaluate("i => atob(i.src.split(',')[1]).includes('acTL')")]
    return (
        len(animated) == 1
        and shows_two_pictures(page, animated[0])
        and not shows_two_pictures(page, figures[0])
    )


def shows_two_pictures(page, image):
    """Whether screenshots of one image, 0.4 s apart for 2 s, differ.

    2 s is longer than the last frame is held.
    """
    image.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    shots = set()
    for _ in range(6):
        shots.add(image.screenshot())
        page.wait_for_timeout(400)
    return len(shots) > 1


@each
def test_run_all_in_jupyter_notebook(path, server, browser, tmp_path):
    """From the menu: every cell runs, none raises or warns, and the kernel ends idle.

    There are as many figures as in the committed file, one moves, and one obeys its widgets.
    """
    committed = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    page = open_page(browser)
    page.goto(server(f"notebooks/{path.name}"), timeout=60_000)

    def kernel():
        with urllib.request.urlopen(server("api/sessions")) as reply:
            return [
                s["kernel"]["execution_state"] for s in json.load(reply) if s["name"] == path.name
            ]

    def prompts():
        return page.eval_on_selector_all(
            ".jp-CodeCell .jp-InputPrompt", "prompts => prompts.map(p => p.textContent)"
        )

    def pause(seconds):  # and let the browser's requests through meanwhile
        page.wait_for_timeout(1000 * seconds)

    wait_for(lambda: kernel() == ["idle"], 60, "a kernel starts", pause)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    wait_for(lambda: "[*]:" in prompts(), 20, "Run All begins", pause)
    wait_for(
        lambda: "[*]:" not in prompts() and kernel() == ["idle"],
        900,
        "all cells run and the kernel is idle",
        pause,
    )
    pause(2)
    assert kernel() == ["idle"]
    assert prompts() == [f"[{i + 1}]:" for i in range(len(committed))]
    assert not page.query_selector_all(
        '[data-mime-type="application/vnd.jupyter.error"], '
        '[data-mime-type="application/vnd.jupyter.stderr"]'
    )

    figures = page.query_selector_all(".jp-OutputArea-output img:not(.widget-interact img)")
    for i, figure in enumerate(figures):
        figure.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / f"figure-{i:02}.png")
    assert len(figures) == sum(
        "image/png" in output.get("data", {}) for cell in committed for output in cell.outputs
    )
    assert all(figure.evaluate("i => i.complete && i.naturalWidth > 100") for figure in figures)
    assert one_moves(page, figures)
    assert len(page.query_selector_all(".widget-interact .widget-slider")) == 2

    def drawn():
        picture = page.query_selector(".widget-interact img")
        return picture and picture.get_attribute("src")

    before = drawn()
    assert before
    page.select_option(".widget-interact select", "DPS")
    wait_for(lambda: drawn() not in (None, before), 60, "a picture follows the choice", pause)
    page.close()


def formulas(notebook):
    """TeX of every formula in the markdown cells and in rendered tables, outside code."""
    texts = []
    for cell in notebook.cells:
        tables = [o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])]
        texts += [cell.source] if cell.cell_type == "markdown" else tables
    text = "\n\n".join(texts)
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [
        display or inline
        for display, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", text, flags=re.DOTALL)
    ]


@pytest.fixture(
    scope="module",
    params=[*product(NOTEBOOKS, PARTS), *product(JAPANESE, ["lab"])],
    ids=lambda p: f"{p[0].relative_to(ROOT)}-{p[1]}",
)
def html(browser, tmp_path_factory, request):
    """The committed file through nbconvert, open in a tab, its formulas typeset.

    `page.parts` are selectors, `page.notebook` is the source.
    """
    path, template = request.param
    page = open_page(browser)
    page.parts, page.notebook = PARTS[template], nbformat.read(path, as_version=4)
    exporter = HTMLExporter(
        template_name=template,
        mathjax_url=MATHJAX + "MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe",
    )
    folder = tmp_path_factory.mktemp(f"{path.stem}-{template}")
    (folder / "page.html").write_text(
        exporter.from_notebook_node(page.notebook)[0], encoding="utf-8"
    )
    page.goto((folder / "page.html").as_uri(), wait_until="load")
    page.wait_for_function("window.MathJax && MathJax.isReady")
    page.evaluate("new Promise(done => MathJax.Hub.Queue(done))")
    page.screenshot(path=folder / "page.png", full_page=True)
    yield page
    page.close()


def test_html_typesets_every_formula(html):
    """The formulas on the page are those of the source, and no TeX is left as plain text.

    Each is visible and without MathJax's error boxes.
    """
    source = [tex.strip() for tex in formulas(html.notebook)]
    typeset = html.evaluate(
        """MathJax.Hub.getAllJax().map(jax => {
             const box = document.getElementById(jax.inputID + '-Frame').getBoundingClientRect();
             return {tex: jax.originalText.trim(), visible: box.width > 0 && box.height > 0};
           })"""
    )
    assert len(source) > 100
    assert [formula["tex"] for formula in typeset] == source
    assert all(formula["visible"] for formula in typeset)
    assert not html.problems
    assert not html.query_selector_all(".MathJax_Error, .merror, .MJXc-error, mjx-merror")
    assert not [tex for tex in source if re.search(r"\\\\[a-zA-Z]", tex)], (
        "an escaped backslash: a line break in place of a command"
    )
    left = html.eval_on_selector_all(
        html.parts["markdown"],
        """cells => cells.map(cell => {
             const copy = cell.cloneNode(true);
             copy.querySelectorAll('.MathJax, .MathJax_Display, .MathJax_Preview, script, code')"""
        """.forEach(e => e.remove());
             return copy.textContent;
           })""",
    )
    assert len(left) > 20
    assert not [text for text in left if re.search(r"\$|\\[a-zA-Z]|\*\*", text)]


def test_html_images_load_and_are_described(html):
    """Every image has pixels, the animation moves, and figures have their metadata's alt text.

    The alt text is there in the template that passes it on.
    """
    outputs = [o for c in html.notebook.cells if c.cell_type == "code" for o in c.outputs]
    described = [
        o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})
    ]
    figures = html.query_selector_all(html.parts["figure"])
    assert len(figures) == len(described)
    if html.parts is PARTS["classic"]:
        assert [figure.get_attribute("alt") for figure in figures] == described
    images = html.evaluate(
        "[...document.images].map(i => ({alt: i.alt, loaded: i.complete && i.naturalWidth > 0}))"
    )
    assert len(images) > len(figures)  # the badge
    assert all(image["alt"] and image["loaded"] for image in images), images
    assert one_moves(html, figures)


def test_html_fits_1200_pixels(html):
    """The page does not scroll sideways, and no box on it does or cuts off its content.

    No figure, table or formula ends right of its cell.
    """
    assert (
        html.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        <= 0
    )
    narrow = html.eval_on_selector_all(
        f"{html.parts['cell']} *",
        """elements => elements.filter(e =>
             e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible' """
        """&& !e.closest('.MathJax, .MathJax_Display')
           ).map(e => """
        """[e.className, e.scrollWidth, e.clientWidth, e.textContent.trim().slice(0, 100)])""",
    )
    assert not narrow, narrow
    outside = html.eval_on_selector_all(
        html.parts["cell"],
        """cells => cells.flatMap(cell => """
        """[...cell.querySelectorAll('img, table, .MathJax')].filter(e =>
             e.getBoundingClientRect().right > cell.getBoundingClientRect().right + 1)"""
        """.map(e => e.outerHTML.slice(0, 200)))""",
    )
    assert not outside, outside

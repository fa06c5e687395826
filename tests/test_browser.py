"""JupyterLab and TensorBoard in a real browser, started by `make lab` and `make tensorboard` on a
copy of the suite: does it run, and does it fit on the screen?"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest

import vit_helpers

try:
    from playwright.sync_api import Error as PlaywrightError
except ImportError:                                 # then chromium's tests are skipped, too
    PlaywrightError = Exception

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SIZE = {"width": 1440, "height": 900}                   # of the window: a common laptop's
MEASURE = (Path(__file__).parent / "screen.js").read_text()
NAMES = sorted(path.stem for path in vit_helpers.NOTEBOOKS.glob("*.ipynb"))


# ---- the servers and the browser

@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A copy of what a clone holds, so that nothing here is changed. stored/ has the notebooks as
    they are; those in notebooks/ are run, 06 with few epochs."""
    copy = tmp_path_factory.mktemp("browser") / "suite"
    copy.mkdir()
    for name in ("vit_helpers.py", "Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy2(vit_helpers.ROOT / name, copy)
    for name in ("notebooks", "runs/published", "saved_models/published", "scripts"):
        shutil.copytree(vit_helpers.ROOT / name, copy / name)
    shutil.copytree(vit_helpers.NOTEBOOKS, copy / "stored")
    (copy / ".venv").symlink_to(vit_helpers.ROOT / ".venv")
    path = copy / "notebooks" / "06_run.ipynb"
    whole = path.read_text()
    few = whole.replace('"epochs = None', '"epochs = 2')
    assert few != whole
    path.write_text(few)
    return copy


def jupyter_settings(suite):
    """JupyterLab as it is when new, whatever its settings are here, and without its question about
    news; returns the folder."""
    folder = suite / "jupyter"
    extension = folder / "lab/user-settings/@jupyterlab/apputils-extension"
    path = extension / "notification.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    return folder


def serve(suite, target, options, pattern):
    """`make <target>`; returns the process and the address that it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VIT_")}
    clean["JUPYTER_CONFIG_DIR"] = str(jupyter_settings(suite))
    log = suite / f"{target}.log"
    command = ["make", "--old-file", ".venv/done", target, options]     # .venv is used as it is
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=suite, stdout=file, stderr=subprocess.STDOUT,
                                   env=clean, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (found := re.search(pattern, log.read_text())) or not listening(process):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return process, found.group(0)


def listening(process):
    """The addresses that a process and its children listen on."""
    parent = psutil.Process(process.pid)
    found = set()
    for one in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):     # make's own children come and go
            found |= {each.laddr.ip for each in one.net_connections("inet")
                      if each.status == psutil.CONN_LISTEN}
    return found


@pytest.fixture(scope="module")
def lab(suite):
    options = "LAB_OPTIONS=--no-browser --allow-root --ServerApp.port=0"
    process, address = serve(suite, "lab", options,
                             r"http://(localhost|127\.0\.0\.1):\d+/lab\S*token=\w+")
    yield process, address
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    """Chromium as people see it: scroll bars take their place."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS,
                                             ignore_default_args=["--hide-scrollbars"],
                                             timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    """One for all pages, so that JupyterLab's scripts are loaded once; as patient as two busy cores
    ask for."""
    context = browser.new_context(viewport=SIZE)
    context.set_default_timeout(120_000)
    yield context
    context.close()


@pytest.fixture
def page(context):
    page = context.new_page()
    yield page
    page.close()


def code_cells(path):
    """The code cells of a notebook that hold code."""
    cells = nbformat.read(path, 4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source]


def open_lab(page, address, path):
    """Open a file or folder of the suite, `notebooks/01_models.ipynb`, in a JupyterLab as it is
    when new."""
    base, token = re.match(r"(.*)/lab.*token=(\w+)", address).groups()
    page.goto(f"{base}/lab/tree/{path}?token={token}&reset")
    page.locator(".jp-DirListing-item").first.wait_for()    # the list of files takes its place


def open_notebook(page, address, path):
    """The same of a notebook, until its first cells are there."""
    open_lab(page, address, path)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()


def screenshot(page, name):
    """Into the folder $VIT_SCREENSHOTS, if somebody wants to look."""
    if "VIT_SCREENSHOTS" in os.environ:
        page.screenshot(path=os.path.join(os.environ["VIT_SCREENSHOTS"], f"{name}.png"))


def test_servers_are_for_this_machine_and_the_token_alone(lab):
    process, address = lab
    assert listening(process) <= {"127.0.0.1", "::1"}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(re.sub(r"/lab.*", "/api/contents", address))
    urllib.request.urlopen(re.sub(r"/lab.*\?", "/api/contents?", address))


# ---- the screen: everything is as wide as its place at most

def without_kernel(page):
    """Leave JupyterLab's wish for a kernel unanswered: stored outputs need none."""
    def answer(route):
        if route.request.method != "POST":
            route.continue_()
    page.route(re.compile("/api/sessions"), answer)


def look(page, path):
    """Measure every cell of the notebook that is open, of which path is the file; returns what is
    too wide."""
    cells = nbformat.read(path, 4).cells
    measured = {each["index"]: each for each in page.evaluate(MEASURE, len(cells))}
    assert sorted(measured) == list(range(len(cells)))
    wide, shrunk = [], []
    for index, cell in enumerate(cells):
        found = measured[index]
        assert bool(found["outputs"]) >= bool(cell.get("outputs")), f"cell {index}: not drawn"
        title = f"{path.stem}, cell {index}, {cell.source[:40]!r}"
        wide += [f"{title}: {what}" for what in found["wide"]]
        shrunk += [f"{title}: {what}" for what in found["shrunk"]]
    code = sum(cell.cell_type == "code" for cell in cells)
    outputs = sum(each["outputs"] for each in measured.values())
    print(f"{path.stem}: {code} code cells, {outputs} outputs, {len(wide)} too wide")
    for line in dict.fromkeys(shrunk):
        print(line)
    return wide


@pytest.fixture(scope="module")
def reader(lab, context):
    """A page with the folder stored/, for one notebook after the other: JupyterLab takes as long to
    start as a notebook to be read."""
    page = context.new_page()
    without_kernel(page)
    open_lab(page, lab[1], "stored")
    yield page
    page.close()


def read_stored(page, name):
    """Open a notebook from the list of files, in place of the one before it."""
    panel = page.locator(".jp-NotebookPanel")
    if panel.count():
        page.locator(".lm-TabBar-tab.jp-mod-current .lm-TabBar-tabCloseIcon").click()
        panel.wait_for(state="detached")
    page.locator(".jp-DirListing-item", has_text=f"{name}.ipynb").dblclick()
    panel.locator(".jp-Cell").first.wait_for()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_the_screen(reader, suite, name):
    page, path = reader, suite / "stored" / f"{name}.ipynb"
    assert any(cell.outputs for cell in code_cells(path)), f"no outputs: make notebooks ONLY={name}"
    read_stored(page, name)
    wide = look(page, path)
    if "VIT_SCREENSHOTS" in os.environ:
        screenshots_of_screens(page, name, 4 if name == "04_training" else 1)
        screenshot_of_table(page, name)
    assert wide == []


def screenshots_of_screens(page, name, number):
    """The first screens of the notebook that is open."""
    panel = page.locator(".jp-WindowedPanel-outer").first
    for index in range(number):
        panel.evaluate("(panel, index) => { panel.scrollTop = index * panel.clientHeight }", index)
        page.wait_for_timeout(500)
        screenshot(page, f"{name}_screen{index + 1}")


def screenshot_of_table(page, name):
    """The first table among the outputs of the notebook that is open, if it has one."""
    table = page.locator(".jp-OutputArea-output table")
    if table.count():
        table.first.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        screenshot(page, f"{name}_table")


def html_table(columns):
    """A table of one row."""
    cells = "".join(f"<td>column{index}</td>" for index in range(columns))
    return f"<table><tr>{cells}</tr></table>"


def shown(kind, text):
    """A cell with an output of that kind."""
    if kind == "text/plain":
        output = nbformat.v4.new_output("stream", text=text)
    else:
        output = nbformat.v4.new_output("display_data", {kind: text})
    return nbformat.v4.new_code_cell("show()", outputs=[output])


def test_what_is_too_wide_is_seen(lab, page, suite):
    """One cell of each kind that fits, and one that does not."""
    new_code, new_markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    pairs = [
        [new_code(f'x = "{"a" * size}"') for size in (94, 150)],
        [new_markdown(f"```\n{'code ' * size}\n```") for size in (20, 40)],
        [new_markdown("|" + "column|" * size + "\n|" + "-|" * size) for size in (8, 30)],
        [shown("text/plain", f"short\n{'word ' * size}\n") for size in (20, 40)],
        [shown("text/plain", f"{'a' * size}\n" * 2) for size in (100, 150)],
        [shown("text/html", html_table(size)) for size in (8, 30)],
        [shown("text/markdown", f"$${'x + ' * size} x$$") for size in (10, 80)],
    ]
    path = suite / "stored" / "faults.ipynb"
    notebook = nbformat.read(suite / "stored" / "01_models.ipynb", 4)
    notebook.cells = [cell for pair in pairs for cell in pair]
    nbformat.write(notebook, path)
    without_kernel(page)
    open_notebook(page, lab[1], "stored/faults.ipynb")
    found = [re.search(r"cell (\d+),.*: (\w+) of", each).groups() for each in look(page, path)]
    assert found == [("1", "code"), ("3", "line"), ("5", "text"), ("7", "line"), ("9", "line"),
                     ("11", "output"), ("13", "output")]


# ---- Run All Cells

def click_run_all(page):
    """Choose Run All Cells in the menu Run."""
    run_all_cells = page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$"))
    while not run_all_cells.is_visible():           # the menu fills up while JupyterLab starts
        page.keyboard.press("Escape")
        page.wait_for_timeout(500)
        with contextlib.suppress(PlaywrightError):  # a dialog is in the way: Escape closes it
            page.get_by_role("menuitem", name="Run", exact=True).click(timeout=3000)
        page.wait_for_timeout(300)
    run_all_cells.click()


def errors(cells):
    """What the cells raised."""
    return [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def run_all(page, path):
    """Run All Cells of the notebook that is open; returns its code cells as JupyterLab saved them,
    once all have run or one has failed."""
    click_run_all(page)
    deadline, reloaded = time.monotonic() + 240, False
    while time.monotonic() < deadline:
        page.wait_for_timeout(500)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        try:
            cells = code_cells(path)
        except nbformat.reader.NotJSONError:        # JupyterLab is still writing it
            continue
        done = [cell for cell in cells if cell.execution_count]
        if len(done) == len(cells) or errors(cells):
            return cells
        if not done and not reloaded and time.monotonic() > deadline - 160:
            page.reload()                           # a kernel that did not start, a dialog, …
            page.locator(".jp-Notebook .jp-Cell").first.wait_for()
            reloaded = True
        waiting = page.locator(".jp-InputPrompt", has_text="[*]").count()
        if not done and not waiting:                # clicked before JupyterLab was listening
            click_run_all(page)
    pytest.fail(f"{path.stem}: {len(done)} of {len(cells)} cells ran")


def clear_outputs(path):
    """As if the notebook had never been run."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


@pytest.mark.parametrize("name", ["06_run", "08_inside"])
def test_run_all_cells(lab, page, suite, name):
    path = suite / "notebooks" / f"{name}.ipynb"
    clear_outputs(path)
    started = time.monotonic()
    open_notebook(page, lab[1], f"notebooks/{name}.ipynb")
    titles = watch_title(page)
    cells = run_all(page, path)
    assert not errors(cells)
    print(f"{name}: {len(cells)} cells in {time.monotonic() - started:.0f} s")
    screenshot(page, name)
    assert look(page, path) == []                   # now with sliders and progress bars
    if name == "06_run":                            # its training cell is out of sight
        shown = titles()
        print("titles:", shown)
        assert re.fullmatch(r"\d/2 · \d+\.\d%", shown[0]) and shown[-1].startswith("2/2")
        assert "javascript" not in path.read_text()
    if name == "08_inside":
        slider_moves_the_figure(page)


WATCH = """() => {
    window.titles = [];
    new MutationObserver(() => window.titles.push(document.title))
        .observe(document.querySelector("title"), {childList: true});
}"""


def watch_title(page):
    """Note the titles that the page gets; returns a function that gives those of a training."""
    page.evaluate(WATCH)
    return lambda: [title for title in page.evaluate("window.titles") if "%" in title]


def slider_moves_the_figure(page):
    """The arrow key on a slider's handle draws another attention map."""
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.scroll_into_view_if_needed()
    figure = page.locator(".widget-image").first
    before = figure.get_attribute("src")
    handle.press("ArrowRight")
    deadline = time.monotonic() + 60
    while figure.get_attribute("src") == before:
        assert time.monotonic() < deadline, "the figure stayed as it was"
        page.wait_for_timeout(20)
    page.wait_for_timeout(500)
    screenshot(page, "08_slider")


# ---- TensorBoard

def rightmost(page, text):
    """The largest x at which a text is seen; the lists at the left are below 280."""
    boxes = [place.bounding_box() for place in page.get_by_text(text, exact=True).all()]
    return max(box["x"] for box in boxes if box)


COLUMNS = ["learning_rate", "model", "recipe", "settings", "accuracy/val", "accuracy/test"]


def test_tensorboard_shows_ones_own_runs_as_they_begin(suite, page, settings, running):
    """The published ones are left out; a run that begins while it is open is there, and the
    columns of HPARAMS are few, in their order."""
    process, address = serve(suite, "tensorboard", "TENSORBOARD_OPTIONS=--port 0",
                             r"http://localhost:\d+")
    try:
        assert listening(process) <= {"127.0.0.1", "::1"}
        mine = suite / "runs/mine"
        mine.mkdir()
        shutil.copy(suite / "runs/published/digits-seed0-vit/config.json", mine)
        with contextlib.closing(running.open_writer(mine, settings(drop_path=0.1))) as writer:
            for tag in COLUMNS[-2:]:
                writer.add_scalar(tag, 0.5, 1)
        deadline, runs = time.monotonic() + 60, []
        while "mine" not in runs:
            assert time.monotonic() < deadline, "the new run is not found"
            time.sleep(0.5)
            runs = json.loads(urllib.request.urlopen(f"{address}/data/runs").read())
        assert not [run for run in runs if run.startswith("published")]
        page.goto(f"{address}/#timeseries")
        page.get_by_text("accuracy/val").first.wait_for(timeout=60_000)
        screenshot(page, "tensorboard")
        page.goto(f"{address}/#hparams")
        page.reload()
        page.get_by_text("accuracy/test").first.wait_for(timeout=60_000)
        page.get_by_text("drop_path 0.1,").first.wait_for(timeout=60_000)
        screenshot(page, "tensorboard_hparams")
        places = [rightmost(page, name) for name in COLUMNS]
        print(dict(zip(COLUMNS, places, strict=True)))
        assert places == sorted(places) and 280 < places[0] and places[-1] < SIZE["width"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)      # so that it removes its folder of links
        process.wait(30)

"""JupyterLab and TensorBoard in a real browser, started by `make lab` and `make tensorboard` on a copy of the suite."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request

import nbformat
import psutil
import pytest
import vit_helpers

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A copy of what a clone holds, so that nothing here is changed."""
    copy = tmp_path_factory.mktemp("browser") / "suite"
    copy.mkdir()
    for name in ("vit_helpers.py", "Makefile", "requirements.txt"):
        shutil.copy2(vit_helpers.ROOT / name, copy)
    for name in ("notebooks", "runs/published", "saved_models/published"):
        shutil.copytree(vit_helpers.ROOT / name, copy / name)
    (copy / ".venv").symlink_to(vit_helpers.ROOT / ".venv")
    path = copy / "notebooks" / "06_run.ipynb"
    path.write_text(path.read_text().replace('"epochs = 0 ', '"epochs = 4 '))
    return copy


def serve(suite, target, options, pattern):
    """`make <target>`; returns the process and the address that it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VIT_")}
    log = open(suite / f"{target}.log", "w+")
    process = subprocess.Popen(["make", target, options], cwd=suite, stdout=log, stderr=subprocess.STDOUT, env=clean, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (found := re.search(pattern, (suite / f"{target}.log").read_text())) or not listening(process):
        assert process.poll() is None and time.monotonic() < deadline, (suite / f"{target}.log").read_text()
        time.sleep(0.2)
    return process, found.group(0)


def listening(process):
    """The addresses that a process and its children listen on."""
    found = set()
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):                 # make's own children come and go
            found |= {each.laddr.ip for each in one.net_connections("inet") if each.status == psutil.CONN_LISTEN}
    return found


@pytest.fixture(scope="module")
def lab(suite):
    process, address = serve(suite, "lab", "LAB_OPTIONS=--no-browser --allow-root --ServerApp.port=0 --LabApp.news_url=",
                             r"http://(localhost|127\.0\.0\.1):\d+/lab\S*token=\w+")
    yield process, address
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


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


def click_run_all(page):
    """Choose Run All Cells in the menu Run."""
    run_all_cells = page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$"))
    while not run_all_cells.is_visible():                               # the menu fills up while JupyterLab starts
        page.keyboard.press("Escape")
        page.wait_for_timeout(500)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.wait_for_timeout(300)
    run_all_cells.click()


def run_all(page, address, path):
    """Open a notebook and Run All Cells; returns its code cells as JupyterLab saved them, once all have run or one has failed."""
    base, token = re.match(r"(.*)/lab.*token=(\w+)", address).groups()
    page.goto(f"{base}/lab/tree/notebooks/{path.name}?token={token}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    click_run_all(page)
    deadline, again = time.monotonic() + 240, time.monotonic() + 45
    while True:
        page.wait_for_timeout(1000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" and cell.source]
        if all(cell.execution_count for cell in cells) or errors(cells):
            return cells
        if time.monotonic() > again and not any(cell.execution_count for cell in cells):       # clicked before JupyterLab was listening
            click_run_all(page)
            again += 45
        assert time.monotonic() < deadline, f"{path.name}: {sum(bool(cell.execution_count) for cell in cells)} of {len(cells)} cells have run"


def errors(cells):
    """What the cells raised."""
    return [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", ["01_models", "06_run", "07_comparison", "08_inside"])
def test_run_all_cells(lab, page, suite, name):
    path = suite / "notebooks" / f"{name}.ipynb"
    before = nbformat.read(path, 4)
    for cell in before.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(before, path)
    started = time.monotonic()
    cells = run_all(page, lab[1], path)
    assert not errors(cells)
    print(f"{name}: {len(cells)} cells in {time.monotonic() - started:.0f} s")
    screenshot(page, name)
    if name == "08_inside":
        slider_moves_the_picture(page)


def slider_moves_the_picture(page):
    """The arrow key on a slider's handle draws another attention map."""
    handle = page.locator(".widget-slider .noUi-handle").first
    page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => { panel.scrollTop = panel.scrollHeight * 0.75 }")
    for _ in range(40):                                                 # cells out of sight are not drawn: scroll until it is there
        if handle.count() and handle.is_visible():
            break
        page.mouse.wheel(0, -600)
        page.wait_for_timeout(150)
    handle.scroll_into_view_if_needed()
    picture = page.locator(".widget-image").first
    before = picture.get_attribute("src")
    handle.press("ArrowRight")
    deadline = time.monotonic() + 10
    while picture.get_attribute("src") == before:
        assert time.monotonic() < deadline, "the picture stayed as it was"
        page.wait_for_timeout(20)
    page.wait_for_timeout(500)
    screenshot(page, "08_slider")


def test_tensorboard_shows_the_published_scalars(suite, page):
    process, address = serve(suite, "tensorboard", "TENSORBOARD_OPTIONS=--port 0", r"http://localhost:\d+")
    try:
        assert listening(process) <= {"127.0.0.1", "::1"}
        page.goto(f"{address}/#timeseries")
        page.get_by_text("accuracy/val").first.wait_for(timeout=60_000)
        page.get_by_text("published/digits-seed0-vit").first.wait_for(timeout=60_000)
        page.wait_for_timeout(2000)
        screenshot(page, "tensorboard")
    finally:
        os.killpg(process.pid, signal.SIGKILL)

"""The explorers in a real browser: ``make test-lab`` opens them in JupyterLab and uses their controls.

These tests need a browser, so they are not part of the default ones. Screenshots are written into ``.build/lab``. If
LAB_PICTURE is in the environment, the picture of explore_depth is also written to that file, as PNG.
"""

import contextlib
import io
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib import paths
from lib.cifar import checkpoints
from lib.cifar.config import CifarConfig
from lib.cifar.network import INITIALISATIONS, ConvResNet
from lib.explore import trained

SCREENSHOTS = paths.BUILD / "lab"
PATIENCE = 120_000  # ms: a busy machine takes long to start a kernel
HOW_TO_GET_A_BROWSER = (
    "`make test-lab` needs Playwright and Chromium, and did not find {}: install them with "
    "`pip install playwright` and `playwright install chromium`, or set CHROMIUM to the path of a Chromium or Chrome "
    "that is installed."
)


def find_browser() -> str | None:
    """The browser to use: CHROMIUM, else one on the PATH, else None for Playwright's own."""
    named = os.environ.get("CHROMIUM")
    if named and not Path(named).is_file():
        pytest.exit(f"CHROMIUM is {named}, where there is no file.", returncode=2)
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.exit(HOW_TO_GET_A_BROWSER.format("the package playwright"), returncode=2)
    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        except Error as error:
            if "Executable doesn't exist" not in str(error):
                raise
            pytest.exit(HOW_TO_GET_A_BROWSER.format("a browser"), returncode=2)
        yield launched
        launched.close()


def write_networks(folder: Path) -> None:
    """Write two small networks that explore_weights shows if ``checkpoints/`` holds none yet."""
    for initialisation in INITIALISATIONS:
        config = CifarConfig(depth=16, channels=4, initialisation=initialisation, epochs=1)
        network = ConvResNet(config.network)
        with torch.no_grad():
            network.residual_layers.bn2_weight.fill_(1.0)
            for name in ("conv1.weight", "conv2.weight"):
                drift = torch.rand(network.residual_layers.stacked(name).shape[1:])
                network.residual_layers.stacked(name).add_(torch.linspace(0, 1, 16).view(-1, 1, 1, 1, 1) ** 2 * drift)
        checkpoint = checkpoints.Checkpoint(config, network, {}, {})
        checkpoints.save(folder / "checkpoints" / f"{config.name}.safetensors", checkpoint)
    notebook = folder / "notebooks" / "explore_weights.ipynb"
    where = f"__import__('pathlib').Path('{folder / 'checkpoints'}')"
    text = notebook.read_text(encoding="utf-8")
    for call in ("trained.find_checkpoints(", "explore_weights("):
        text = text.replace(call, f"{call}{where}, ")
    text = text.replace(", )", ")")
    notebook.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address and token of a JupyterLab that runs on copies of the notebooks and ends with the tests."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(paths.NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    if not trained.find_checkpoints():
        write_networks(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "PYTHONPATH")}
    environment |= {
        "PYTHONPATH": str(paths.ROOT),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "FIGURES_OUTPUT": str(folder / "figures"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    options = [
        "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder / 'notebooks'}",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True", f"--LabApp.app_settings_dir={paths.ROOT / '.lab'}",
    ]  # fmt: skip
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api?token={token}", server, folder / "log")
        yield address, token
    finally:
        with contextlib.suppress(ProcessLookupError):  # it did not start, and the reason is in the error
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, f"JupyterLab did not start:\n{log.read_text()}"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer at {address}:\n{log.read_text()}")


class Notebook:
    """A notebook in a browser's page, all cells run."""

    def __init__(self, browser, lab, name: str) -> None:
        address, token = lab
        self.name, self.exceptions = name, []
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.exceptions.append(str(error)))
        self.page.on("console", self._listen)
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?reset&token={token}")
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.run("application:toggle-left-area")
        self.page.wait_for_function(
            "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        self.run("notebook:run-all-cells")
        try:
            self.picture.wait_for()
        except Exception:
            self.check()  # an error in a cell says more than a missing picture
            raise
        self.picture.scroll_into_view_if_needed()
        # Note the times at which pictures arrive, in ms.
        self.page.evaluate(
            """() => { window.arrived = [];
            const seen = changes => { for (const _ of changes) window.arrived.push(performance.now()) };
            for (const image of document.querySelectorAll('.explorer-picture'))
                new MutationObserver(seen).observe(image, {attributes: true, attributeFilter: ['src']}) }"""
        )

    def _listen(self, message) -> None:
        # JupyterLab reports on its own network and extensions too; widgets are ours.
        if message.type == "error" and re.search("widget|comm", message.text, re.IGNORECASE):
            self.exceptions.append(message.text)

    def run(self, command: str) -> None:
        self.page.evaluate("command => void window.jupyterapp.commands.execute(command)", command)

    @property
    def picture(self):
        return self.page.locator(".explorer-picture").first

    @property
    def pictures(self) -> int:
        return self.page.evaluate("window.arrived.length")

    def measure_seconds_to_picture(self, act) -> float:
        """The seconds from an action on an explorer at rest to the first picture after it."""
        count = self.pictures
        self.page.evaluate("window.asked = performance.now()")
        act()
        self.wait(lambda: self.pictures > count, what="a new picture")
        return self.page.evaluate("count => (window.arrived[count] - window.asked) / 1000", count)

    def button(self, text: str):
        return self.page.locator(f".widget-button:text-is('{text}')").first

    def slider(self, label: str):
        """The handle of the slider whose label contains the text."""
        return self.page.locator(f".widget-hslider:has(label:has-text('{label}')) .noUi-handle").first

    def menu(self, label: str):
        """The drop-down menu with that label."""
        return self.page.locator(f".widget-dropdown:has(label:text-is('{label}')) select").first

    def text(self, css: str) -> str:
        return self.page.locator(css).first.inner_text()

    @property
    def iteration(self) -> int:
        return int(re.search(r"iteration ([\d,]+)", self.text(".explorer-status"))[1].replace(",", ""))

    def wait(self, condition, seconds: float = 60, what: str = "") -> float:
        """Wait until the condition holds, and return the seconds that it took."""
        started = time.perf_counter()
        while not condition():
            assert time.perf_counter() - started < seconds, f"{self.name}: {what} not within {seconds} s"
            self.page.wait_for_timeout(20)
        return time.perf_counter() - started

    def stands_still(self) -> bool:
        """Whether no picture arrives and no iteration passes for 1.5 seconds."""
        before = self.iteration, self.pictures
        self.page.wait_for_timeout(1500)
        return (self.iteration, self.pictures) == before

    @property
    def parameters(self) -> str:
        return self.page.locator(".explorer-parameters textarea").input_value()

    def save_picture(self, path: Path) -> None:
        """Save the explorer without the notebook around it, in 200 colours, so that the file is small."""
        self.page.set_viewport_size({"width": 1500, "height": 1300})
        self.page.locator(".jp-OutputArea-output:has(.explorer-picture)").first.scroll_into_view_if_needed()
        self.page.wait_for_timeout(2000)
        whole = self.page.locator(".jp-OutputArea-output:has(.explorer-picture)").first.bounding_box()
        end = self.page.locator(".widget-button:text-is('Save this figure')").first.bounding_box()
        clip = {
            "x": whole["x"] - 12,
            "y": whole["y"] - 8,
            "width": whole["width"] + 20,
            "height": end["y"] - whole["y"],
        }
        shot = Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB")
        shot.quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size // 1024} KiB")

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{self.name}_{name.replace(' ', '_')}.png"
        self.page.screenshot(path=path)
        return path

    def check(self) -> None:
        """Check that there is no error in an output and no exception in the console."""
        errors = self.page.locator(".jp-OutputArea-output[data-mime-type*=error], [data-mime-type*=stderr]")
        assert errors.all_inner_texts() == []
        assert self.exceptions == []


def test_explore_depth(browser, lab):
    notebook = Notebook(browser, lab, "explore_depth")
    notebook.screenshot("first")
    pictures = notebook.pictures
    notebook.button("Start").click()
    seconds = notebook.wait(lambda: notebook.iteration == 500, 200, "the end of the run")
    print(f"\nThe default run ends {seconds:.1f} s after Start, ", end="")
    print(f"{(notebook.pictures - pictures) / seconds:.1f} pictures a second on the way")
    notebook.screenshot("finished")
    notebook.button("Reset").click()
    notebook.wait(lambda: notebook.iteration == 0, what="Reset")
    notebook.page.wait_for_timeout(1000)
    seconds = notebook.measure_seconds_to_picture(lambda: notebook.slider("width").press("ArrowLeft"))
    print(f"A moved slider shows its first picture after {seconds:.2f} s")
    notebook.page.wait_for_timeout(1000)  # the larger one
    notebook.slider("width").press("ArrowRight")
    notebook.button("Start").click()
    # A slider that moves during training starts it again.
    notebook.wait(lambda: notebook.iteration > 20, what="iteration 20")
    notebook.screenshot("running")
    notebook.slider("width").press("ArrowLeft")
    notebook.wait(lambda: notebook.iteration < 20, what="a restart")
    pictures = notebook.pictures
    notebook.wait(lambda: notebook.pictures > pictures + 3 and notebook.iteration > 3, what="training after a restart")
    notebook.button("Stop").click()
    print(f"Stop answered after {notebook.wait(lambda: notebook.button('Stop').is_disabled(), 5, 'Stop'):.2f} s")
    notebook.wait(notebook.stands_still, what="standstill after the last picture, a large one")
    assert notebook.iteration < 500  # it was stopped before its end
    notebook.button("Reset").click()
    notebook.wait(lambda: notebook.iteration == 0, 5, "Reset")
    notebook.slider("width").press("ArrowRight")
    # A story.
    notebook.button("weight-tied or i.i.d. layers").click()
    picture = os.environ.get("LAB_PICTURE")
    notebook.wait(lambda: notebook.iteration > (300 if picture else 50), 200, what="the story")
    notebook.button("Stop").click()
    if picture:
        notebook.save_picture(paths.ROOT / picture)
    notebook.button("Save this figure").click()
    notebook.wait(lambda: "Wrote explore_depth.pdf" in notebook.text(".explorer-saved"), what="a saved figure")
    assert "make figure_1_left" in notebook.parameters
    notebook.check()


def test_explore_weights(browser, lab):
    notebook = Notebook(browser, lab, "explore_weights")
    notebook.wait(lambda: "from the smoothest" in notebook.text(".explorer-status"), what="the first entry")
    notebook.page.wait_for_timeout(3000)  # for the images, if they are here
    notebook.screenshot("first")
    for choice in ("roughest", "smoothest", "index"):
        pictures, status = notebook.pictures, notebook.text(".explorer-status")
        notebook.menu("entry").select_option(choice)
        if choice != "index":  # its entry may have the rank of the one before, unlike the other two
            notebook.wait(lambda status=status: notebook.text(".explorer-status") != status, what=f"the {choice} entry")
        notebook.wait(lambda pictures=pictures: notebook.pictures > pictures, what=f"the picture of the {choice} entry")
    pictures = notebook.pictures
    notebook.slider("out channel").press("ArrowRight")
    notebook.wait(lambda: notebook.pictures > pictures, what="another entry")
    notebook.menu("beside it").select_option("none")
    notebook.wait(lambda: notebook.text(".explorer-status").count("from the smoothest") == 1, what="one network")
    notebook.screenshot("one network")
    assert "make figure_3" in notebook.parameters
    notebook.check()


def test_explore_blocks(browser, lab):
    notebook = Notebook(browser, lab, "explore_blocks")
    notebook.button("Start").click()
    notebook.wait(lambda: notebook.iteration == 100, 200, "the end of the run")
    notebook.wait(lambda: not notebook.button("Start").is_disabled(), what="Start")
    notebook.page.wait_for_timeout(1000)
    notebook.screenshot("finished")
    # The cell of the block is edited and run: the explorer begins anew with it.
    notebook.page.evaluate(
        """() => { const notebook = window.jupyterapp.shell.currentWidget.content;
        const cells = notebook.model.sharedModel.cells;
        const place = cells.findIndex(cell => cell.source.includes('class MyBlock'));
        cells[place].source = cells[place].source.replaceAll('torch.sin', 'torch.tanh');
        notebook.activeCellIndex = place; notebook.deselectAll() }"""
    )
    notebook.run("notebook:run-cell")
    notebook.wait(lambda: notebook.iteration == 0, what="the edited block's beginning")
    pictures = notebook.pictures
    notebook.menu("block").select_option("transformer")
    notebook.wait(lambda: notebook.pictures > pictures, what="the picture of another block")
    notebook.picture.scroll_into_view_if_needed()
    notebook.screenshot("transformer")
    notebook.check()


def test_the_start_page(browser, lab):
    address, token = lab
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{address}/lab/tree/start.ipynb?reset&token={token}")
    page.wait_for_selector(".jp-OutputArea-output img", timeout=PATIENCE)
    page.locator("a:text-is('explore_depth')").click()
    page.wait_for_selector(".jp-mod-current .lm-TabBar-tabLabel:text-is('explore_depth.ipynb')", timeout=PATIENCE)


def test_the_explorer_of_a_figure(browser, lab):
    notebook = Notebook(browser, lab, "figure_2")
    pictures = notebook.pictures
    notebook.menu("activation").select_option("tanh")
    notebook.wait(lambda: notebook.pictures > pictures + 3, what="pictures of the new training")
    notebook.screenshot("running")
    notebook.wait(lambda: not notebook.button("Start").is_disabled(), what="the end of the training")
    assert "activation: tanh" in notebook.parameters
    notebook.button("Reset").click()
    notebook.wait(lambda: "activation: gelu" in notebook.parameters, what="Reset")
    notebook.check()

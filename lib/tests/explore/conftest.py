"""Settings of the explorers' tests: small pictures, and a folder for each test's files."""

import pytest
import torch
from playing import IID, SMALL, sketch

from lib.cifar import checkpoints
from lib.cifar.checkpoints import Checkpoint
from lib.cifar.config import CifarConfig
from lib.cifar.network import INITIALISATIONS, ConvResNet
from lib.explore import explorer as module
from lib.explore import frames, live
from lib.explore.depth import explore_depth
from lib.figures import style

PIXELS, CANVAS = frames.Frames.pixels, style.FigureCanvasAgg


class Unseen(CANVAS):
    """A canvas that draws nothing: the tick labels of a layout would take most of a test's time."""

    def draw(self) -> None:
        pass


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """The folder that figures are saved to. Pictures are replaced by `sketch`, unless a test takes `real_pictures`."""
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setattr(module, "STILL", (40, "png"))
    monkeypatch.setattr(module, "LIVE", (30, "jpeg"))
    monkeypatch.setattr(module, "FRAME", 1.0)
    monkeypatch.setattr(frames.Frames, "pixels", sketch)
    monkeypatch.setattr(style, "FigureCanvasAgg", Unseen)
    return tmp_path / "output"


@pytest.fixture
def real_pictures(output, monkeypatch):
    monkeypatch.setattr(frames.Frames, "pixels", PIXELS)
    monkeypatch.setattr(style, "FigureCanvasAgg", CANVAS)


@pytest.fixture
def single_steps(monkeypatch):
    """The loop takes one step at a time, so that a small network is not trained before a button is pressed."""
    monkeypatch.setattr(live, "SLICE", 0.0)


@pytest.fixture
def explorer():
    return explore_depth(SMALL, IID, row=1, column=2)


@pytest.fixture
def folder(tmp_path):
    """A folder with a weight-tied network, whose weights change smoothly over the layers, and an i.i.d. one."""
    for initialisation in INITIALISATIONS:
        config = CifarConfig(depth=12, channels=4, initialisation=initialisation, epochs=1)
        network = ConvResNet(config.network)
        layers = network.residual_layers
        with torch.no_grad():
            layers.bn2_weight.fill_(1.0)
            if initialisation == "weight-tied":
                s = torch.linspace(0, 1, 12)[:, None, None, None, None]
                generator = torch.Generator().manual_seed(1)
                layers.conv1_weight += s**2 * torch.rand(4, 4, 3, 3, generator=generator)
                layers.conv1_weight[:, 2, 1, 0, 2] += 0.1 * (-1.0) ** torch.arange(12)  # one rough entry
        checkpoints.save(tmp_path / f"{config.name}.safetensors", Checkpoint(config, network, {}, {}))
    return tmp_path

"""Settings of every test, and a fixture of several files: no window opens, and one thread computes."""

import math

import matplotlib
import pytest
import shipped
import torch
from finished_runs import finish

from lib import paths
from lib.cifar import monitor, records
from lib.cifar.choice import NetworkChoice
from lib.cifar.config import CifarConfig
from lib.cifar.course import RATIOS
from lib.cifar.network import INITIALISATIONS, ConvResNet

matplotlib.use("agg")
torch.set_num_threads(1)
paths.CHECKPOINTS, paths.FIGURES = (shipped.ROOT / folder for folder in shipped.FOLDERS)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs with known weights: a sine of the depth in the weight-tied ones, noise in the i.i.d. ones."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    depth = 64
    s = torch.arange(depth) / depth
    for initialisation in INITIALISATIONS:
        for seed, epochs, test in ((0, 30, 50.0), (1, 30, 52.0), (2, 30, 60.0), (0, 180, 80.0)):
            if epochs == 180 and initialisation == "iid":
                continue
            config = CifarConfig(depth=depth, initialisation=initialisation, seed=seed, epochs=epochs)
            network = ConvResNet(config.network)
            with torch.no_grad():
                for name in records.CONVOLUTIONS:
                    weight = network.residual_layers.stacked(f"{name}.weight")
                    if initialisation == "weight-tied":
                        weight.copy_(0.1 * torch.sin(2 * math.pi * s)[:, None, None, None, None].expand_as(weight))
            measured = monitor.measure(network)
            ratios = {name: measured[name] for name in RATIOS}
            finish(tmp_path, config, network, test_accuracy=test, train_accuracy=test + 1, **ratios)
    records.gather()
    return NetworkChoice(depth=depth)

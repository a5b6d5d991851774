"""The first picture of the README: a smooth network, a rough one, and both with fewer layers."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.choice import run_name
from lib.cifar.config import CifarConfig
from lib.cifar.records import CONVOLUTIONS
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import BLUE, TEXT_WIDTH, VERMILION, make_panels, set_layers_axis, styled, write_across

COLORS = {"smooth": BLUE, "rough": VERMILION}
ENTRIES = CifarConfig.channels**2 * 3**2  # of a convolution: out channels, in channels, and a kernel of 3 x 3


@dataclass(frozen=True)
class Config:
    """Two trained networks, in the words of `run_name`. ``entries`` entries of a ``convolution`` are drawn by the
    seed."""

    smooth: str = "gelu weight-tied 30"
    rough: str = "gelu weight-tied 180"
    convolution: str = "conv1"
    entries: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_fields(self, seed=0)
        checks.positive_int("entries", self.entries, most=ENTRIES)
        run_name(self.smooth)
        run_name(self.rough)
        checks.choice("convolution", self.convolution, CONVOLUTIONS)


def compute(config: Config, progress: Progress = silent) -> Data:
    """Two tables: ``overview_weights`` has columns network, entry, layer, value; ``overview`` has columns network,
    layers, accuracy, the test accuracy in % with that number of layers kept (also with all layers)."""
    runs = {run.config.name: run for run in records.read_runs()}
    found = {"smooth": runs.get(run_name(config.smooth)), "rough": runs.get(run_name(config.rough))}
    measured, weights, kept = records.read_measured("resampling"), [], []
    for network, run in progress(found.items(), len(found)):
        if run is None or not run.has_weights:
            continue
        layers = run.load().network.residual_layers.stacked(f"{config.convolution}.weight").detach().flatten(1)
        chosen = np.random.default_rng(config.seed).choice(layers.shape[1], config.entries, replace=False)
        for entry in chosen.tolist():
            values = layers[:, entry].tolist()
            weights += [{"network": network, "entry": entry, "layer": k, "value": v} for k, v in enumerate(values, 1)]
        kept_rows = tables.rows(tables.select(measured, run=run.config.name, **records.KEPT))
        accuracies = {int(row["layers"]): row["accuracy"] for row in kept_rows}
        accuracies[len(layers)] = run.values["test_accuracy"]
        kept += [{"network": network, "layers": n, "accuracy": accuracies[n]} for n in sorted(accuracies)]
    return {
        "overview": tables.from_rows(kept, ("network", "layers", "accuracy")),
        "overview_weights": tables.from_rows(weights, ("network", "entry", "layer", "value")),
    }


@styled
def draw(data: Data, config: Config) -> Figure:
    """Entries of the weights across the layers of both networks, and test accuracies against the number of layers."""
    figure, axes = make_panels(3, height=2.3, width=TEXT_WIDTH * 1.15)
    names = {"smooth": config.smooth, "rough": config.rough}
    for panel, (network, words) in zip(axes, names.items(), strict=False):
        rows = tables.select(data["overview_weights"], network=network)
        for place, line in enumerate(tables.group(rows, "entry").values()):
            panel.plot(line["layer"], line["value"], color=COLORS[network], linewidth=0.8, alpha=1 - 0.13 * (place % 6))
        if not len(rows["entry"]):
            write_across(panel, "not here")
        panel.set(xlabel="layer", title=f"{network}: {_write_title(words)}")
    axes[0].set_ylabel(f"entries of {config.convolution}")
    for network in names:
        rows = tables.select(data["overview"], network=network)
        if len(rows["layers"]):
            axes[2].plot(rows["layers"], rows["accuracy"], "o-", color=COLORS[network], label=network)
    if len(data["overview"]["layers"]):
        set_layers_axis(axes[2], data["overview"]["layers"])
        axes[2].legend(loc="upper left")
    axes[2].set(xlabel="layers kept, nothing retrained", ylabel="test accuracy (%)", ylim=(0, 100))
    axes[2].set_title("with fewer of the layers")
    return figure


def _write_title(words: str) -> str:
    activation, initialisation, epochs = words.split()
    return f"{tables.word(activation)}, {tables.word(initialisation)}, {epochs} epochs"

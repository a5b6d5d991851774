"""Figure 3: one entry of the trained weights across the layers (Section 5.2)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice, by_schedule
from lib.cifar.network import ResidualLayers
from lib.cifar.records import CONVOLUTIONS, Run
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import INITIALISATION_COLORS, panels, styled, write_across
from lib.measures import PARTS, layer_noise, ratios_along_depth, von_neumann_ratio

Key = tuple[int, str]  # of a network: epochs, initialisation


@dataclass(frozen=True)
class Config:
    """Which networks (``choice``, of one ``seed``), and the seed that draws the entries shown."""

    choice: NetworkChoice
    seed: int = 0
    entry_seed: int = 0

    def __post_init__(self) -> None:
        checks.positive_int("seed", self.seed, least=0)
        checks.positive_int("entry_seed", self.entry_seed, least=0)

    @property
    def entries(self) -> dict[str, tuple[int, int, int, int]]:
        """The entry (out, in, row, column) of "conv1" and of "conv2"."""
        return draw_entries(self.entry_seed)


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `entries_across_layers` and `describe`, of the networks whose weights are here."""
    networks = networks_by_schedule(records.read_runs(), config.choice, config.seed)
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    return {
        "figure_3": entries_across_layers(layers, config.entries),
        "figure_3_networks": describe(networks, layers),
    }


def describe(networks: Mapping[Key, Run], layers: Mapping[Key, ResidualLayers]) -> dict[str, list]:
    """A row a network and convolution: epochs, initialisation, convolution, test_accuracy (%), von_neumann, noise from
    layer to layer, spread (the mean standard deviation of an entry), and the ratio in each eighth, part_1 to part_8."""
    columns = ["epochs", "initialisation", "convolution", "test_accuracy", "von_neumann", "noise", "spread"]
    columns += [f"part_{part}" for part in range(1, PARTS + 1)]
    rows = []
    for key, run in networks.items():
        for name in CONVOLUTIONS:
            weights = layers[key].stacked(f"{name}.weight").detach()
            measured = von_neumann_ratio(weights), layer_noise(weights), float(weights.std(dim=0).mean())
            rows.append((*key, name, run.values["test_accuracy"], *measured, *ratios_along_depth(weights)))
    return {name: [row[place] for row in rows] for place, name in enumerate(columns)}


def panel_title(data: Data, config: Config, epochs: int, initialisation: str) -> str:
    """What a panel shows: activation, initialisation, test accuracy, schedule."""
    network = f"{tables.word(config.choice.activation)}, {tables.word(initialisation)}"
    found = tables.select(data["figure_3_networks"], epochs=epochs, initialisation=initialisation)["test_accuracy"]
    if not len(found):
        return network
    return f"{network}: test {found[0]:.2f} %\n{records.training_length(epochs)}"


def draw_entries(seed: int, channels: int = 16) -> dict[str, tuple[int, int, int, int]]:
    """An entry (out, in, row, column) of "conv1" and one of "conv2", each drawn from all C x C x 3 x 3 by the seed."""
    checks.positive_int("entry_seed", seed, least=0)
    random = np.random.default_rng(seed)
    shape = (channels, channels, 3, 3)
    return {
        name: tuple(int(i) for i in np.unravel_index(random.integers(math.prod(shape)), shape)) for name in CONVOLUTIONS
    }


def networks_by_schedule(runs: Iterable[Run], choice: NetworkChoice, seed: int = 0) -> dict[Key, Run]:
    """The networks of one choice and seed whose weights are here: the shortest schedule first, and in each the
    weight-tied network first."""
    schedules = by_schedule((run for run in runs if run.has_weights), choice, seed=seed)
    return {(epochs, name): side[-1] for epochs, pair in schedules.items() for name, side in pair.items()}


def entries_across_layers(
    layers: Mapping[Key, ResidualLayers], entries: Mapping[str, tuple[int, int, int, int]]
) -> dict[str, list]:
    """The table of ``figure_3.csv``: epochs (of the schedule), initialisation, convolution, layer (1..L), value."""
    columns: dict[str, list] = {"epochs": [], "initialisation": [], "convolution": [], "layer": [], "value": []}
    for (epochs, initialisation), stacked in layers.items():
        for name, entry in entries.items():
            values = stacked.stacked(f"{name}.weight")[(slice(None), *entry)].tolist()
            columns["epochs"] += [epochs] * len(values)
            columns["initialisation"] += [initialisation] * len(values)
            columns["convolution"] += [name] * len(values)
            columns["layer"] += range(1, len(values) + 1)
            columns["value"] += values
    return columns


@styled
def draw(data: Data, config: Config) -> Figure:
    """One entry of conv1 and of conv2 across the layers, weight-tied beside i.i.d., two rows for each schedule.

    ``data``: what `compute` returns.
    """
    table, entries = data["figure_3"], config.entries
    schedules = sorted(set(table["epochs"])) or [0]
    figure, axes = panels(2, rows=2 * len(schedules), height=3.6 * len(schedules), sharex=True)
    for first, epochs in zip(axes[::2], schedules, strict=True):
        for panel, initialisation in zip(first, INITIALISATION_COLORS, strict=True):
            panel.set_title(panel_title(data, config, epochs, initialisation))
    shown = [(epochs, convolution) for epochs in schedules for convolution in entries]
    for row, (epochs, convolution) in zip(axes, shown, strict=True):
        for panel, (initialisation, color) in zip(row, INITIALISATION_COLORS.items(), strict=True):
            curve = tables.select(table, epochs=epochs, initialisation=initialisation, convolution=convolution)
            if len(curve["layer"]) == 0:
                write_across(panel, "no such network is here")
                panel.set_axis_off()
                continue
            # A scale of its own for each: what matters is whether a curve is smooth, not where it lies.
            panel.plot(curve["layer"], curve["value"], color=color, linewidth=0.8)
            panel.set_ylabel(f"{convolution} $[{','.join(str(i) for i in entries[convolution])}]$")
    for panel in axes[-1]:
        panel.set_xlabel("layer $k$")
    return figure

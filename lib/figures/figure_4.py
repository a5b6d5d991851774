"""The appendix's figure: how far successive layers are from each other after training."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lib import tables
from lib.cifar import records
from lib.cifar.choice import RELEASED, NetworkChoice, Setting, describe_training, group_by_setting
from lib.cifar.network import INITIALISATIONS
from lib.cifar.records import CONVOLUTIONS, PAPER_EPOCHS, Run
from lib.figures.claim import OPEN, Claim, Read, factor_above, factor_below, judge, tightest
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import HEIGHT, INITIALISATION_COLORS, panels, styled, write_across

PAPER_CLOSER = 10  # "about ten times": how much closer the paper's weight-tied layers are than its i.i.d. ones


@dataclass(frozen=True)
class Config:
    """Which networks: a ``choice`` of one activation, in every setting and schedule that there is."""

    choice: NetworkChoice


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `successive_distance_tables`."""
    networks = group_by_setting(records.read_runs(), config.choice)
    layers, averages = successive_distance_tables(networks, records.read_distances())
    return {"figure_4": averages, "figure_4_layers": layers}


def block_titles(averages: tables.Table, activation: str) -> dict[tuple[str, int], str]:
    """For each setting and schedule: activation, length, how many runs of an initialisation there are, setting."""
    titles = {}
    for setting, epochs in blocks(averages):
        rows = tables.select(averages, setting=setting, epochs=epochs)
        sides = (tables.select(rows, initialisation=side)["seed"] for side in INITIALISATIONS)
        counts = sorted({len(set(seeds.tolist())) for seeds in sides if len(seeds)})
        runs = "1 run" if counts == [1] else f"{' and '.join(map(str, counts))} runs"
        words = f"{tables.word(activation)}, {records.describe_length(epochs)}, {runs}"
        titles[setting, epochs] = f"{words}\n{setting}"
    return titles


def blocks(averages: tables.Table) -> list[tuple[str, int]]:
    """The settings and lengths of schedules in a table, in its order."""
    return list(dict.fromkeys((str(s), int(n)) for s, n in zip(averages["setting"], averages["epochs"], strict=True)))


def successive_distance_tables(
    networks: Mapping[Setting, Mapping[str, list[Run]]], distances: Mapping[str, np.ndarray]
) -> tuple[dict[str, list], dict[str, list]]:
    """The tables of figure 4 out of ``successive_distance.csv``: per layer, mean over runs (setting, epochs,
    initialisation, convolution, layer, distance), and averaged over layers (setting, epochs, initialisation,
    convolution, seed, average)."""
    which = ("setting", "epochs", "initialisation", "convolution")
    layers: dict[str, list] = {name: [] for name in (*which, "layer", "distance")}
    averages: dict[str, list] = {name: [] for name in (*which, "seed", "average")}
    sides = [(setting, side, runs) for setting, pair in networks.items() for side, runs in pair.items()]
    for setting, initialisation, runs in sides:
        for name in CONVOLUTIONS:
            of = dict(zip(which, (setting.words, setting.epochs, initialisation, name), strict=True))
            curves = []
            for run in runs:
                rows = (distances["run"] == run.config.name) & (distances["convolution"] == name)
                curves.append(distances["distance"][rows][np.argsort(distances["layer"][rows])])
                _append(averages, of | {"seed": run.config.seed, "average": float(curves[-1].mean())})
            for layer, distance in enumerate(np.mean(curves, axis=0).tolist(), start=1):
                _append(layers, of | {"layer": layer, "distance": distance})
    return layers, averages


def _append(table: dict[str, list], row: Mapping[str, Any]) -> None:
    for name, column in table.items():
        column.append(row[name])


def closer_by(averages: Mapping[str, list], setting: str, epochs: int) -> dict[str, float]:
    """How many times closer successive layers are from weight-tied than from i.i.d. initialisation in a setting, after
    a schedule of that length: for each convolution the ratio of the medians over runs of the averages (without an entry
    if one side is missing)."""
    chosen = tables.select(averages, setting=setting, epochs=epochs)
    factors = {}
    for name in CONVOLUTIONS:
        sides = (tables.select(chosen, initialisation=side, convolution=name) for side in INITIALISATIONS)
        tied, iid = (side["average"] for side in sides)
        if len(tied) and len(iid):
            factors[name] = float(np.median(iid) / np.median(tied))
    return factors


def closer_along_depth(
    layers: Mapping[str, list], setting: str, epochs: int, convolution: str, parts: int = 4
) -> list[float]:
    """The same in each of ``parts`` equal parts of the layers, from the input to the output, out of the first table of
    `successive_distance_tables`: the ratio of the means over layers and runs (nothing if one side is missing)."""
    chosen = tables.select(layers, setting=setting, epochs=epochs, convolution=convolution)
    sides = (tables.select(chosen, initialisation=side)["distance"] for side in INITIALISATIONS)
    tied, iid = ([part.mean() for part in np.array_split(side, parts)] if len(side) else [] for side in sides)
    return [float(above / below) for above, below in zip(iid, tied, strict=False)]


@styled
def draw(data: Data, config: Config) -> Figure:
    """Successive Frobenius distance of conv1 and conv2, a row a setting and schedule: across the layers, and on average
    with a dot a run. ``data``: what `compute` returns."""
    layers, averages = data["figure_4_layers"], data["figure_4"]
    titles = block_titles(averages, config.choice.activation)
    rows = max(len(titles), 1)
    figure, axes = panels(2, rows=rows, height=HEIGHT * rows, width_ratios=[1.5, 1], sharey=True)
    if not titles:
        write_across(axes[0], "no such network is trained yet")
        for panel in axes:
            panel.set_axis_off()
        return figure
    for ((setting, epochs), title), (curves, points) in zip(titles.items(), np.reshape(axes, (-1, 2)), strict=True):
        for initialisation, color in INITIALISATION_COLORS.items():
            for place, (convolution, line) in enumerate((("conv1", "-"), ("conv2", "--"))):
                of = {
                    "setting": setting,
                    "epochs": epochs,
                    "initialisation": initialisation,
                    "convolution": convolution,
                }
                curve, values = tables.select(layers, **of), tables.select(averages, **of)["average"]
                if len(values) == 0:
                    continue
                label = f"{tables.word(initialisation)}, {convolution}"
                curves.plot(curve["layer"], curve["distance"], line, color=color, linewidth=0.8, label=label)
                x = place + (-0.15 if initialisation == "weight-tied" else 0.15)
                points.hlines(np.median(values), x - 0.12, x + 0.12, color=color, linewidth=2)
                points.plot([x] * len(values), values, "o", color=color, alpha=0.7)
        curves.set_ylabel(r"$\|\mathrm{conv}_{i,k+1}-\mathrm{conv}_{i,k}\|_F$")
        curves.set_title(title)
        points.set_xticks([0, 1], ["conv1", "conv2"])
        points.set_xlim(-0.5, 1.5)
        points.set_title("mean over layers, by run")
        curves.set_yscale("log")
    first, last = np.reshape(axes, (-1, 2))[[0, -1], 0]
    first.legend()
    last.set_xlabel("layer $k$")
    return figure


def claims(read: Read) -> Iterator[Claim]:
    """What the appendix says of the trained networks, for each setting that both sides were trained in; open if none
    was for as long as the paper's."""
    averages = read("figure_4")
    whole: dict[str, list[int]] = {}  # the schedules of both initialisations
    for setting, epochs in blocks(averages):
        if closer_by(averages, setting, epochs):
            whole.setdefault(setting, []).append(epochs)
    for setting, schedules in (whole or {RELEASED: []}).items():
        epochs = PAPER_EPOCHS if PAPER_EPOCHS in schedules else max(schedules, default=0)
        factors = closer_by(averages, setting, epochs)
        measured = " and ".join(f"{factor:.3g} ({name})" for name, factor in factors.items())
        low, high = PAPER_CLOSER / 2, 2 * PAPER_CLOSER
        found = list(factors.values()) or [math.nan]
        margin = tightest(*(each for by in found for each in (factor_above(by, low), factor_below(by, high))))
        sides = (
            tables.select(averages, setting=setting, epochs=epochs, initialisation=side)["seed"]
            for side in INITIALISATIONS
        )
        trained = describe_training(epochs, min(len(np.unique(seeds)) for seeds in sides))
        networks = "CIFAR-10, GELU" if setting == RELEASED else f"CIFAR-10, GELU, {setting}"
        yield Claim(
            f"{networks}: layers are about {PAPER_CLOSER} times closer from weight-tied than from i.i.d. ones",
            "Appendix, Fig. 4",
            f"{measured} times, after {trained} of each at least ({setting})" if schedules else "nothing trained yet",
            f"{low:g} to {high} times",
            "",
            judge(margin) if epochs >= PAPER_EPOCHS else OPEN,
            "figure_4",
            margin,
        )

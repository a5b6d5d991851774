"""The appendix's figure: how far successive layers are from each other after training."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import tables
from lib.cifar import records
from lib.cifar.choice import RELEASED, NetworkChoice, Setting, describe_training, group_by_setting
from lib.cifar.network import INITIALISATIONS
from lib.cifar.records import CONVOLUTIONS, PAPER_EPOCHS, Run
from lib.figures.claim import OPEN, Claim, Read, combine_margins, factor_above, factor_below, judge_margin
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import HEIGHT, INITIALISATION_COLORS, make_panels, styled, write_across

PAPER_CLOSER = 10  # the paper's weight-tied layers are "about ten times" closer to each other than its i.i.d. ones


@dataclass(frozen=True)
class Config:
    """A ``choice`` of networks of one activation, in every setting and schedule."""

    choice: NetworkChoice


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `tabulate_distances`."""
    networks = group_by_setting(records.read_runs(), config.choice)
    layers, averages = tabulate_distances(networks, records.read_distances())
    return {"figure_4": averages, "figure_4_layers": layers}


def write_titles(averages: tables.Table, activation: str) -> dict[tuple[str, int], str]:
    """The title for each setting and schedule: activation, length, number of runs of each initialisation, setting."""
    titles = {}
    for setting, epochs in list_blocks(averages):
        rows = tables.select(averages, setting=setting, epochs=epochs)
        sides = (tables.select(rows, initialisation=side)["seed"] for side in INITIALISATIONS)
        counts = sorted({len(set(seeds.tolist())) for seeds in sides if len(seeds)})
        runs = "1 run" if counts == [1] else f"{' and '.join(map(str, counts))} runs"
        words = f"{tables.word(activation)}, {records.describe_length(epochs)}, {runs}"
        titles[setting, epochs] = f"{words}\n{setting}"
    return titles


def list_blocks(averages: tables.Table) -> list[tuple[str, int]]:
    """The settings and lengths of schedules in a table, in order of appearance."""
    return list(tables.group(averages, "setting", "epochs"))


def tabulate_distances(
    networks: Mapping[Setting, Mapping[str, list[Run]]], distances: Mapping[str, np.ndarray]
) -> tuple[dict[str, list], dict[str, list]]:
    """Two tables from ``successive_distance.csv``. Both have columns setting, epochs, initialisation, convolution. The
    first adds layer and distance, as a mean over runs; the second adds seed and average, as a mean over layers."""
    which = ("setting", "epochs", "initialisation", "convolution")
    layers, averages = [], []
    sides = [(setting, side, runs) for setting, pair in networks.items() for side, runs in pair.items()]
    for setting, initialisation, runs in sides:
        for name in CONVOLUTIONS:
            named = dict(zip(which, (setting.words, setting.epochs, initialisation, name), strict=True))
            curves = []
            for run in runs:
                rows = (distances["run"] == run.config.name) & (distances["convolution"] == name)
                curves.append(distances["distance"][rows][np.argsort(distances["layer"][rows])])
                averages.append(named | {"seed": run.config.seed, "average": float(curves[-1].mean())})
            for layer, distance in enumerate(np.mean(curves, axis=0).tolist(), start=1):
                layers.append(named | {"layer": layer, "distance": distance})
    columns = (*which, "layer", "distance"), (*which, "seed", "average")
    return tables.from_rows(layers, columns[0]), tables.from_rows(averages, columns[1])


def compare_distances(averages: Mapping[str, list], setting: str, epochs: int) -> dict[str, float]:
    """How many times smaller the successive distance is with weight-tied than with i.i.d. initialisation, in a setting
    and schedule. For each convolution it is a ratio of medians over runs; there is none if one side is missing."""
    chosen = tables.select(averages, setting=setting, epochs=epochs)
    factors = {}
    for name in CONVOLUTIONS:
        sides = (tables.select(chosen, initialisation=side, convolution=name) for side in INITIALISATIONS)
        tied, iid = (side["average"] for side in sides)
        if len(tied) and len(iid):
            factors[name] = float(np.median(iid) / np.median(tied))
    return factors


def compare_distances_along_depth(
    layers: Mapping[str, list], setting: str, epochs: int, convolution: str
) -> list[float]:
    """The same in each quarter of the layers, from the input to the output, as ratios of means over layers and runs.
    ``layers`` is the first table of `tabulate_distances`. The list is empty if one side is missing."""
    chosen = tables.select(layers, setting=setting, epochs=epochs, convolution=convolution)
    sides = (tables.select(chosen, initialisation=side)["distance"] for side in INITIALISATIONS)
    tied, iid = ([part.mean() for part in np.array_split(side, 4)] if len(side) else [] for side in sides)
    return [float(above / below) for above, below in zip(iid, tied, strict=False)]


@styled
def draw(data: Data, config: Config) -> Figure:
    """The successive Frobenius distance of conv1 and conv2, with a row for each setting and schedule: across the layers
    on the left; averaged over the layers on the right, with a dot for each run."""
    layers, averages = data["figure_4_layers"], data["figure_4"]
    titles = write_titles(averages, config.choice.activation)
    rows = max(len(titles), 1)
    figure, axes = make_panels(2, rows=rows, height=HEIGHT * rows, width_ratios=[1.5, 1], sharey=True)
    if not titles:
        write_across(axes[0], "no such network is trained yet")
        for panel in axes:
            panel.set_axis_off()
        return figure
    for ((setting, epochs), title), (curves, points) in zip(titles.items(), np.reshape(axes, (-1, 2)), strict=True):
        for initialisation, color in INITIALISATION_COLORS.items():
            for place, (convolution, line) in enumerate((("conv1", "-"), ("conv2", "--"))):
                chosen = {"setting": setting, "epochs": epochs}
                chosen |= {"initialisation": initialisation, "convolution": convolution}
                curve, values = tables.select(layers, **chosen), tables.select(averages, **chosen)["average"]
                if len(values) == 0:
                    continue
                label = f"{tables.word(initialisation)}, {convolution}"
                curves.plot(curve["layer"], curve["distance"], line, color=color, linewidth=0.8, label=label)
                x = place + (-0.15 if initialisation == "weight-tied" else 0.15)
                points.hlines(np.median(values), x - 0.12, x + 0.12, color=color, linewidth=2)
                points.plot([x] * len(values), values, "o", color=color, alpha=0.7)
        curves.set(ylabel=r"$\|\mathrm{conv}_{i,k+1}-\mathrm{conv}_{i,k}\|_F$", title=title)
        points.set_xticks([0, 1], ["conv1", "conv2"])
        points.set_xlim(-0.5, 1.5)
        points.set_title("mean over layers, by run")
        curves.set_yscale("log")
    first, last = np.reshape(axes, (-1, 2))[[0, -1], 0]
    first.legend()
    last.set_xlabel("layer $k$")
    return figure


def judge_claims(read: Read) -> Iterator[Claim]:
    """The appendix's statement on trained networks, for each setting that has both initialisations. It is open if no
    network was trained for as long as the paper's."""
    averages = read("figure_4")
    whole: dict[str, list[int]] = {}  # by setting, the schedules that both initialisations have
    for setting, epochs in list_blocks(averages):
        if compare_distances(averages, setting, epochs):
            whole.setdefault(setting, []).append(epochs)
    for setting, schedules in (whole or {RELEASED: []}).items():
        epochs = PAPER_EPOCHS if PAPER_EPOCHS in schedules else max(schedules, default=0)
        factors = compare_distances(averages, setting, epochs)
        measured = " and ".join(f"{factor:.3g} ({name})" for name, factor in factors.items())
        low, high = PAPER_CLOSER / 2, 2 * PAPER_CLOSER
        found = list(factors.values()) or [math.nan]
        margin = combine_margins(*(each for by in found for each in (factor_above(by, low), factor_below(by, high))))
        sides = (
            tables.select(averages, setting=setting, epochs=epochs, initialisation=side)["seed"]
            for side in INITIALISATIONS
        )
        trained = describe_training(epochs, min(len(np.unique(seeds)) for seeds in sides))
        networks = "CIFAR-10, GELU" if setting == RELEASED else f"CIFAR-10, GELU, {setting}"
        yield judge_margin(
            f"{networks}: layers are about {PAPER_CLOSER} times closer from weight-tied than from i.i.d. ones",
            "Appendix, Fig. 4",
            "figure_4",
            margin,
            f"{measured} times, after {trained} of each at least ({setting})" if schedules else "nothing trained yet",
            f"{low:g} to {high} times",
            **({} if epochs >= PAPER_EPOCHS else {"verdict": OPEN}),
        )

"""The appendix's figure: how far successive layers are from each other after training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice, by_schedule, length_in_words
from lib.cifar.network import INITIALISATIONS
from lib.cifar.records import CONVOLUTIONS, PAPER_EPOCHS, Run
from lib.figures.claim import OPEN, Claim, Read, judge
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import HEIGHT, INITIALISATION_COLORS, panels, styled, write_across

PAPER_CLOSER = 10  # "about ten times": how much closer the paper's weight-tied layers are than its i.i.d. ones


@dataclass(frozen=True)
class Config:
    """Which networks: a ``choice`` of one activation, in every schedule that there is."""

    choice: NetworkChoice


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `successive_distance_tables`."""
    networks = by_schedule(records.read_runs(), config.choice)
    layers, averages = successive_distance_tables(networks, records.read_distances())
    return {"figure_4": averages, "figure_4_layers": layers}


def schedule_titles(averages: tables.Table, activation: str) -> dict[int, str]:
    """For each schedule: activation, length, how many runs of an initialisation there are."""
    titles = {}
    for epochs in dict.fromkeys(averages["epochs"]):
        rows = tables.select(averages, epochs=epochs)
        sides = (tables.select(rows, initialisation=side)["seed"] for side in INITIALISATIONS)
        counts = sorted({len(set(seeds.tolist())) for seeds in sides if len(seeds)})
        runs = "1 run" if counts == [1] else f"{' and '.join(map(str, counts))} runs"
        titles[int(epochs)] = f"{tables.word(activation)}, {records.training_length(epochs)}, {runs}"
    return titles


def successive_distance_tables(
    networks: Mapping[int, Mapping[str, list[Run]]], distances: Mapping[str, np.ndarray]
) -> tuple[dict[str, list], dict[str, list]]:
    """The tables of figure 4 out of ``successive_distance.csv``: per layer, mean over runs (epochs,
    initialisation, convolution, layer, distance), and averaged over layers (epochs, initialisation, convolution, seed,
    average)."""
    layers: dict[str, list] = {"epochs": [], "initialisation": [], "convolution": [], "layer": [], "distance": []}
    averages: dict[str, list] = {"epochs": [], "initialisation": [], "convolution": [], "seed": [], "average": []}
    sides = [(epochs, name, runs) for epochs, pair in networks.items() for name, runs in pair.items()]
    for epochs, initialisation, runs in sides:
        for name in CONVOLUTIONS:
            curves = []
            for run in runs:
                rows = (distances["run"] == run.config.name) & (distances["convolution"] == name)
                curves.append(distances["distance"][rows][np.argsort(distances["layer"][rows])])
                averages["epochs"].append(epochs)
                averages["initialisation"].append(initialisation)
                averages["convolution"].append(name)
                averages["seed"].append(run.config.seed)
                averages["average"].append(float(curves[-1].mean()))
            mean = np.mean(curves, axis=0)
            layers["epochs"] += [epochs] * len(mean)
            layers["initialisation"] += [initialisation] * len(mean)
            layers["convolution"] += [name] * len(mean)
            layers["layer"] += range(1, len(mean) + 1)
            layers["distance"] += mean.tolist()
    return layers, averages


def closer_by(averages: Mapping[str, list], epochs: int) -> dict[str, float]:
    """How many times closer successive layers are from weight-tied than from i.i.d. initialisation after a schedule of
    that length: for each convolution the ratio of the medians over runs of the averages (without an entry if one
    side is missing)."""
    chosen = tables.select(averages, epochs=epochs)
    factors = {}
    for name in CONVOLUTIONS:
        sides = (tables.select(chosen, initialisation=side, convolution=name) for side in INITIALISATIONS)
        tied, iid = (side["average"] for side in sides)
        if len(tied) and len(iid):
            factors[name] = float(np.median(iid) / np.median(tied))
    return factors


def closer_along_depth(layers: Mapping[str, list], epochs: int, convolution: str, parts: int = 4) -> list[float]:
    """The same in each of ``parts`` equal parts of the layers, from the input to the output, out of the first table of
    `successive_distance_tables`: the ratio of the means over layers and runs (nothing if one side is missing)."""
    chosen = tables.select(layers, epochs=epochs, convolution=convolution)
    sides = (tables.select(chosen, initialisation=side)["distance"] for side in INITIALISATIONS)
    tied, iid = ([part.mean() for part in np.array_split(side, parts)] if len(side) else [] for side in sides)
    return [float(above / below) for above, below in zip(iid, tied, strict=False)]


@styled
def draw(data: Data, config: Config) -> Figure:
    """Successive Frobenius distance of conv1 and conv2, a row a schedule: across the layers, and on average with a dot
    a run.

    ``layers`` has the columns epochs, initialisation, convolution, layer, distance (mean over runs); ``averages``
    epochs, initialisation, convolution, seed, average (over layers), as in ``figure_4.csv``.
    """
    layers, averages = data["figure_4_layers"], data["figure_4"]
    titles = schedule_titles(averages, config.choice.activation)
    rows = max(len(titles), 1)
    figure, axes = panels(2, rows=rows, height=HEIGHT * rows, width_ratios=[1.5, 1], sharey=True)
    if not titles:
        write_across(axes[0], "no such network is trained yet")
        for panel in axes:
            panel.set_axis_off()
        return figure
    for (epochs, title), (curves, points) in zip(titles.items(), np.reshape(axes, (-1, 2)), strict=True):
        for initialisation, color in INITIALISATION_COLORS.items():
            for place, (convolution, line) in enumerate((("conv1", "-"), ("conv2", "--"))):
                shown = {"epochs": epochs, "initialisation": initialisation, "convolution": convolution}
                curve, values = tables.select(layers, **shown), tables.select(averages, **shown)["average"]
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
    """What the appendix says of the trained networks; open if none was trained for as long as the paper's."""
    averages = read("figure_4")
    factors = {int(epochs): closer_by(averages, epochs) for epochs in np.unique(averages["epochs"])}
    whole = [epochs for epochs in factors if factors[epochs]]  # of both initialisations
    epochs = PAPER_EPOCHS if PAPER_EPOCHS in whole else max(whole, default=0)
    measured = " and ".join(f"{factor:.3g} ({name})" for name, factor in factors.get(epochs, {}).items())
    near = all(PAPER_CLOSER / 2 <= factor <= 2 * PAPER_CLOSER for factor in factors.get(epochs, {}).values())
    sides = (tables.select(averages, epochs=epochs, initialisation=side)["seed"] for side in INITIALISATIONS)
    runs = min(len(np.unique(seeds)) for seeds in sides)
    yield Claim(
        f"CIFAR-10, GELU: layers are about {PAPER_CLOSER} times closer from weight-tied than from i.i.d. ones",
        "Appendix, Fig. 4",
        f"{measured} times, after {length_in_words(epochs, runs)} of each at least" if whole else "nothing trained yet",
        f"{PAPER_CLOSER // 2} to {2 * PAPER_CLOSER} times",
        "",
        judge(near) if epochs >= PAPER_EPOCHS else OPEN,
        "figure_4",
    )

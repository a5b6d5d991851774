"""Trained networks with fewer layers: their accuracy, and the distance of their logits."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import dataset, records
from lib.cifar.choice import PAPER, run_name
from lib.cifar.records import Run
from lib.cifar.resampling import accuracy, distance, logits, resample
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import (
    COLORS,
    GREY,
    GUIDE,
    MARKERS,
    TEXT_WIDTH,
    activation_color,
    set_layers_axis,
    styled,
    write_across,
)
from lib.rates import NO_SLOPE, Slope, fit_slope
from lib.tables import Table, select

ROUNDING = 1e-5  # smaller distances of logits are rounding errors of float32
# The names of the policies, by the weights and the statistics of the batch norms.
POLICY_LABELS = {
    ("kept", "kept"): "kept, statistics with them",
    ("kept", "averaged"): "kept, statistics averaged",
    ("kept", "recomputed"): "kept, statistics recomputed",
    ("averaged", "averaged"): "averaged, statistics too",
    ("interpolated", "interpolated"): "interpolated, statistics too",
    ("parallel", "kept"): "all layers, in parallel",
}


@dataclass(frozen=True)
class Config:
    """The policies of one to three networks, ``shown``, are drawn. They are named by activation, initialisation and
    epochs, as in "gelu weight-tied 30", and have seed 0 and the paper's depth.

    Fewer layers may cost ``points`` of test accuracy. Slopes of the logits' distance are fitted over the numbers of
    layers from ``slope_from`` to a quarter of the depth.
    """

    shown: list[str]
    points: float = 0.5
    slope_from: int = 4

    def __post_init__(self) -> None:
        checks.check_fields(self, "slope_from", points=0)
        checks.distinct_texts("shown", self.shown)
        if len(self.shown) > 3:
            raise ValueError(f"shown lists {len(self.shown)} networks, expected one to three.")
        for words in self.shown:
            run_name(words)


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `tabulate_curves`, `summarise_runs` and `select_shallow`."""
    runs = records.read_runs()
    table = tabulate_curves(runs)
    return {
        "resampling": table,
        "resampling_summary": summarise_runs(table, config),
        "resampling_shallow": select_shallow([run for run in runs if run.has_weights], table),
    }


def tabulate_curves(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``resampling.csv``: the rows of ``checkpoints/resampling.csv`` for these runs. Its columns are run,
    activation, initialisation, batch_norm, hold_stem, depth, epochs, and those of `measured.resampling_rows`."""
    named = {run.config.name: run.config for run in runs}
    rows = []
    for row in tables.rows(records.read_measured("resampling")):
        if (config := named.get(str(row["run"]))) is not None:
            which = ("activation", "initialisation", "batch_norm", "hold_stem", "depth", "epochs")
            rows.append({"run": config.name} | {name: getattr(config, name) for name in which} | row)
    return tables.from_rows(rows)


def summarise_runs(table: Table, config: Config) -> dict[str, list]:
    """The table of ``resampling_summary.csv``, with a row for each run, if layers are kept unchanged.

    The columns are run, depth, accuracy_all, half (the logits' distance with half of the layers), slope, slope_low,
    slope_high (of that distance in the number of layers; nan with fewer than two points) and fewest: the smallest
    number of layers so that neither it nor any larger number costs more than ``points`` (the depth if half of it does).
    """
    rows = []
    for name in dict.fromkeys(table.get("run", ())):
        found = select(table, run=name, **records.KEPT)
        if not len(found["layers"]):
            continue
        order = np.argsort(-found["layers"])
        depth, fewest = int(found["depth"][0]), int(found["depth"][0])
        for layers, reached in zip(found["layers"][order], found["accuracy"][order], strict=True):
            # A rounding error of an accuracy does not count.
            if found["accuracy_all"][0] - reached > config.points + 1e-9:
                break
            fewest = int(layers)
        fit = fit_rate(found, config)
        row = {"run": str(name), "depth": depth, "accuracy_all": float(found["accuracy_all"][0])}
        row |= {"half": float(found["distance"][order[0]]), "slope": fit.slope}
        rows.append(row | {"slope_low": fit.low, "slope_high": fit.high, "fewest": fewest})
    return tables.from_rows(rows)


def fit_rate(rows: Table, config: Config) -> Slope:
    """The slope of the logits' distance in the number of layers kept, for one run's rows. It is nan if fewer than two
    distances are above rounding."""
    layers, distance = rows["layers"], rows["distance"]
    fitted = (layers >= config.slope_from) & (4 * layers <= rows["depth"]) & (distance > ROUNDING)
    if fitted.sum() < 2:
        return NO_SLOPE
    return fit_slope(layers[fitted], distance[fitted])


def spot_check(network: str, layers: int, images: int) -> str:
    """A sentence with new measurements of a network (in the words of `run_name`) with that many of its ``layers``, on
    the first test ``images``. If there are no images or no weights, the sentence says so."""
    checks.positive_int("layers", layers)
    checks.positive_int("images", images, least=0)
    runs = {run.config.name: run for run in records.read_runs()}
    run = runs.get(run_name(network))
    if run is None or not run.has_weights:
        return f"The weights of {network} are not here."
    if not images:
        return "No images were asked for."
    try:
        test = dataset.load(train=False, limit=images, download=False)
    except dataset.DataNotFoundError as error:
        return str(error)
    trained = run.load().network
    expected, found = logits(trained, test), logits(resample(trained, layers), test)
    return (
        f"{run.config.name} on {len(test)} images: {accuracy(expected, test.labels):.1f} % with all layers, "
        f"{accuracy(found, test.labels):.1f} % with {layers}, logits off by {distance(found, expected):.2g}."
    )


def select_shallow(runs: Iterable[Run], table: Table) -> dict[str, list]:
    """The networks that were trained with fewer layers than the deepest of the table, and else in the paper's setting:
    layers, accuracy (%), activation."""
    deepest = max(table.get("depth", [0]), default=0)
    found = [run for run in records.select(runs, **PAPER) if run.config.depth < deepest and not run.config.trial]
    return {
        "layers": [run.config.depth for run in found],
        "accuracy": [run.values["test_accuracy"] for run in found],
        "activation": [run.config.activation for run in found],
    }


def label_network(row: Table) -> str:
    """A network in words, from its row in the table of `tabulate_curves`."""
    name = f"{tables.word(row['activation'])}, {tables.word(row['initialisation'])}, {row['epochs']} ep."
    name += "" if row["batch_norm"] else ", no bn"
    name += "" if row["depth"] == DEEPEST else f", L = {row['depth']}"
    return name + (", stem held" if row["hold_stem"] else "")


DEEPEST = 256  # layers: networks of fewer are drawn faint
DRAWN = (1e-4, 10.0)  # distances of logits


def _style_network(row: Table) -> dict:
    color = activation_color(row["activation"])
    return {
        "color": color,
        "linestyle": "-" if row["epochs"] >= records.PAPER_EPOCHS else (0, (4, 1.2)),
        "marker": "s" if not row["batch_norm"] else "^" if row["hold_stem"] else "o" if row["depth"] != 64 else "D",
        "markerfacecolor": color if row["initialisation"] == "weight-tied" else "white",
        "linewidth": 1.1,
        "markersize": 4,
        "alpha": 1 if row["depth"] == DEEPEST else 0.4,
    }


@styled
def draw(data: Data, config: Config) -> Figure:
    """Above, the accuracy and the logits' distance of every network against the layers kept. Below, the policies of the
    networks that the config shows. Distances outside of `DRAWN` are left out."""
    table, trained = data["resampling"], data["resampling_shallow"]
    figure = Figure(figsize=(TEXT_WIDTH, 6.6), layout="constrained")
    grid = figure.add_gridspec(3, 6, height_ratios=[1, 0.3, 0.9])
    above = [figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])]
    names = figure.add_subplot(grid[1, :])
    names.set_axis_off()
    if not len(table.get("run", ())):
        write_across(above[0], "nothing is measured yet: make measure")
        for panel in above:
            panel.set_axis_off()
        return figure
    accuracies, distances = above
    kept = select(table, **records.KEPT)
    for found in tables.group(kept, "run").values():
        rows = sorted(tables.rows(found), key=lambda row: row["layers"])
        style, layers = _style_network(rows[0]), [row["layers"] for row in rows]
        off = np.array([row["distance"] for row in rows])
        whole = [*layers, rows[0]["depth"]], [*(row["accuracy"] for row in rows), rows[0]["accuracy_all"]]
        accuracies.plot(*whole, label=label_network(rows[0]), **style)
        distances.plot(layers, np.where((off > DRAWN[0]) & (off < DRAWN[1]), off, np.nan), **style)
    star = {"markersize": 9, "markeredgecolor": "black", "markeredgewidth": 0.6, "linestyle": "none", "zorder": 5}
    for row in tables.rows(trained):
        color = activation_color(row["activation"])
        accuracies.plot(row["layers"], row["accuracy"], marker="*", color=color, **star)
    if len(trained["layers"]):
        accuracies.plot([], [], marker="*", color=GREY, label="trained with that many layers", **star)
    guide = np.array([2, max(kept["layers"])])
    distances.plot(guide, 0.6 / guide, "--", color=GREY, linewidth=1, label="slope $-1$")
    distances.legend(loc="lower left")
    accuracies.set(ylabel="test accuracy (%)", title="all networks, the middle layer of each part kept")
    distances.set(yscale="log", ylabel="distance of the logits, relative", title="how far the logits are off")
    for panel in above:
        set_layers_axis(panel, {*kept["layers"], *kept["depth"]})
        panel.set_xlabel("layers kept")
    names.legend(*accuracies.get_legend_handles_labels(), loc="center", ncols=3, fontsize=7, columnspacing=1.2,
                 labelspacing=0.25)  # fmt: skip
    found = [name for name in map(run_name, config.shown) if name in table["run"]]
    for place, name in enumerate(found):
        span = 6 // len(found)
        panel = figure.add_subplot(grid[2, span * place : span * (place + 1)])
        _draw_policies(panel, select(table, run=name), first=place == 0)
        if place == 0:
            keys = panel.get_legend_handles_labels()
    if found:
        figure.legend(*keys, loc="outside lower center", ncols=3, fontsize=7, columnspacing=1.2, labelspacing=0.25)
    return figure


def _draw_policies(axes: Axes, table: Table, first: bool) -> None:
    for (policy, words), color, marker in zip(POLICY_LABELS.items(), COLORS, MARKERS, strict=True):
        rows = select(table, weights=policy[0], statistics=policy[1])
        if not len(rows["layers"]):
            continue
        order = np.argsort(rows["layers"])
        change = (rows["accuracy"] - rows["accuracy_all"])[order]
        axes.plot(rows["layers"][order], change, marker + "-", color=color, label=words, linewidth=1, markersize=3.5)
    axes.axhline(0, linestyle=":", **GUIDE)
    if len(table["run"]):
        set_layers_axis(axes, table["layers"])
        axes.set_title(label_network(tables.rows(table)[0]))
    axes.set_xlabel("layers kept")
    if first:
        axes.set_ylabel("change of test accuracy (points)")

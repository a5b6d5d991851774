"""Where along the depth, and when in training, layers stop being like their neighbours."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import dataset, records, schedule
from lib.cifar.choice import ConvolutionChoice, Setting, select_longest_schedule
from lib.cifar.layer_log import LayerLog
from lib.cifar.records import Run
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import GREY, SEQUENTIAL, activation_color, panels, styled, write_across
from lib.measures import PARTS, ROUGH, local_roughness

ACTIVATIONS = ("gelu", "relu", "identity")
MOST_PARTS = 64  # of the depth, in the picture
INDEPENDENT = 1.5  # the local roughness of independent layers
SHOWN = (1e-3, INDEPENDENT)  # of it, in colour
NO_LOG = "no such run\nhas a layer log yet"


@dataclass(frozen=True)
class Config(ConvolutionChoice):
    """Which weight-tied networks (``choice``, of every activation and one ``seed``), which ``convolution``, and after
    which ``epoch`` they are drawn on their own (0: the last one)."""

    epoch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_int("epoch", self.epoch, least=0)

    @property
    def parts(self) -> int:
        """How many parts of the layers are drawn."""
        return max(1, min(MOST_PARTS, self.choice.depth - 2))


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `roughness_in_training`, `fronts` and `logged_runs`: of the runs that have a layer log, those with
    the longest schedule in their setting."""
    found = config.choice.select(records.read_runs(), activation=None, initialisation="weight-tied", seed=config.seed)
    logs = {run.config.name: run.layers() for run in found}
    logged = [run for run in found if run.config.activation in ACTIVATIONS and logs[run.config.name]]
    shown = [(run, logs[run.config.name]) for run in select_longest_schedule(logged)]
    return {
        "roughness": roughness_in_training(shown, config.convolution, config.parts),
        "roughness_front": fronts(shown, config.convolution),
        "roughness_runs": logged_runs((run, logs[run.config.name]) for run in found),
    }


def _rows(run: Run, log: LayerLog, convolution: str, parts: int) -> list[dict[str, Any]]:
    # A line an epoch in the log: which run, which epoch, its training time, the roughness in the parts.
    config, images = run.config, run.config.train_images or dataset.TRAIN_IMAGES
    values = local_roughness(log[f"distance_{convolution}"], log[f"second_difference_{convolution}"], parts)
    which = {"run": config.name, "setting": Setting.from_config(config).words, "activation": config.activation}
    rows = []
    for epoch, line in zip(log["epoch"].tolist(), values.tolist(), strict=True):
        begun, time = (schedule.training_time(config, images, epochs) for epochs in (epoch, epoch + 1))
        reached = {"epoch": epoch + 1, "begun": begun, "time": time}
        rows.append(which | reached | {f"part_{part}": value for part, value in enumerate(line, start=1)})
    return rows


def roughness_in_training(
    logs: Iterable[tuple[Run, LayerLog]], convolution: str, parts: int = MOST_PARTS
) -> dict[str, list]:
    """The table of ``roughness.csv``, a line an epoch in the layer log of each run: run, setting, activation, epoch
    (1, 2, ...), begun and time (the sum of the learning rates of all steps before it and after it), and the
    `local_roughness` in each of so many equal parts of the layers, part_1 (next to the input), part_2, ..."""
    rows = [row for run, log in logs for row in _rows(run, log, convolution, parts)]
    names = ("run", "setting", "activation", "epoch", "begun", "time", *(f"part_{k}" for k in range(1, parts + 1)))
    return tables.from_rows(rows, names)


def fronts(logs: Iterable[tuple[Run, LayerLog]], convolution: str) -> dict[str, list]:
    """The table of ``roughness_front.csv``, a line a run and eighth of its layers: run, setting, activation, part (1 is
    next to the input), first (the first epoch in its log), epoch and time at which the local roughness of the part
    first was `ROUGH` or more (0 and nan: at none that is in the log)."""
    rows = []
    for run, log in logs:
        lines = _rows(run, log, convolution, PARTS)
        for part in range(1, PARTS + 1):
            rough = next((line for line in lines if line[f"part_{part}"] >= ROUGH), {"epoch": 0, "time": math.nan})
            which = {name: lines[0][name] for name in ("run", "setting", "activation")}
            rows.append(
                which | {"part": part, "first": lines[0]["epoch"]} | {name: rough[name] for name in ("epoch", "time")}
            )
    return tables.from_rows(rows, ("run", "setting", "activation", "part", "first", "epoch", "time"))


def logged_runs(logs: Iterable[tuple[Run, LayerLog]]) -> dict[str, list]:
    """The table of ``roughness_runs.csv``: run, setting, activation, epochs, and how many of them its layer log has (0:
    it was trained before there were such logs)."""
    rows = []
    for run, log in logs:
        logged = len(log["epoch"]) if log else 0
        which = {
            "run": run.config.name,
            "setting": Setting.from_config(run.config).words,
            "activation": run.config.activation,
        }
        rows.append(which | {"epochs": run.config.epochs, "logged": logged})
    return tables.from_rows(rows, ("run", "setting", "activation", "epochs", "logged"))


@styled
def draw(data: Data, config: Config) -> Figure:
    """Local roughness in colour over layers and training time, a row a setting and a column an activation; below, each
    after one epoch. ``data``: what `compute` returns."""
    table = data["roughness"]
    settings = list(dict.fromkeys(table["setting"])) or [""]
    figure, axes = panels(len(ACTIVATIONS), rows=len(settings) + 1, height=2.6 * len(settings) + 1.9, sharex=True,
                          sharey="row")  # fmt: skip
    colors = ScalarMappable(LogNorm(*SHOWN), SEQUENTIAL)
    for row, setting in zip(axes, settings, strict=False):
        for panel, activation in zip(row, ACTIVATIONS, strict=True):
            lines = tables.select(table, setting=setting, activation=activation)
            if len(lines["epoch"]):
                _front(panel, lines, config, colors.norm)
            else:
                write_across(panel, NO_LOG, color=GREY)
        row[0].set_ylabel(f"{setting}\ntraining time $t$".lstrip())
    for panel, activation in zip(axes[0], ACTIVATIONS, strict=True):
        panel.set_title(f"{tables.word(activation)}, weight-tied")
    bar = figure.colorbar(colors, ax=list(axes[:-1].flat), pad=0.02, aspect=25)
    bar.set_label("local roughness")
    bar.outline.set_visible(False)
    for panel, activation in zip(axes[-1], ACTIVATIONS, strict=True):
        _profiles(panel, table, activation, config)
    return figure


def _layers(config: Config) -> np.ndarray:
    # The bounds of the parts: layers 2..L-1 have two neighbours.
    sizes = [len(part) for part in np.array_split(np.arange(config.choice.depth - 2), config.parts)]
    return 1.5 + np.concatenate([[0], np.cumsum(sizes)])


def _values(lines: tables.Table, config: Config) -> np.ndarray:
    return np.stack([np.asarray(lines[f"part_{part}"], dtype=float) for part in range(1, config.parts + 1)], axis=1)


def _shown_epoch(lines: tables.Table, config: Config) -> int:
    # The place of the line that is drawn on its own: the nearest to the epoch that is asked for.
    return int(np.argmin(np.abs(lines["epoch"] - config.epoch))) if config.epoch else len(lines["epoch"]) - 1


def _front(panel: Axes, lines: tables.Table, config: Config, norm: Normalize) -> None:
    values, breaks = _values(lines, config), np.flatnonzero(np.diff(lines["epoch"]) != 1) + 1
    for rows in np.split(np.arange(len(values)), breaks):  # epochs that follow one another
        times = [lines["begun"][rows[0]], *lines["time"][rows]]
        panel.pcolormesh(_layers(config), times, values[rows], norm=norm, cmap=SEQUENTIAL, rasterized=True)
    panel.set_ylim(0, None)
    panel.axhline(lines["time"][_shown_epoch(lines, config)], color="white", linestyle="--", linewidth=1)
    if lines["begun"][0] > 0:
        panel.text(0.5, 0.02, f"no log before epoch {lines['epoch'][0]}", ha="center", color=GREY, fontsize=8,
                   transform=panel.transAxes)  # fmt: skip


def _profiles(panel: Axes, table: tables.Table, activation: str, config: Config) -> None:
    edges = _layers(config)
    settings = list(dict.fromkeys(table["setting"]))
    for number, setting in enumerate(settings):
        lines = tables.select(table, setting=setting, activation=activation)
        if len(lines["epoch"]):
            place = _shown_epoch(lines, config)
            style = {"color": activation_color(activation), "linestyle": ("-", "--", ":")[number % 3]}
            label = f"epoch {lines['epoch'][place]}" + (f", row {number + 1}" if len(settings) > 1 else "")
            panel.plot((edges[1:] + edges[:-1]) / 2, _values(lines, config)[place], label=label, **style)
    if panel.lines:
        panel.legend(loc="lower left")
    for level, words in ((INDEPENDENT, "independent"), (ROUGH, "rough")):
        panel.axhline(level, color=GREY, linestyle=":", linewidth=1, zorder=0)
        panel.annotate(words, (1, level), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                       ha="right", fontsize=7, color=GREY)  # fmt: skip
    panel.set(yscale="log", xlabel="layer $k$", ylim=(SHOWN[0] / 3, 3))
    if activation == ACTIVATIONS[0]:
        panel.set_ylabel("local roughness")

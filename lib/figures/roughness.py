"""At which layers, and when in training, layers become rough."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
from lib.figures.style import (
    GREY,
    GUIDE,
    SEQUENTIAL,
    activation_color,
    draw_color_bar,
    make_panels,
    styled,
    write_across,
)
from lib.measures import PARTS, ROUGH, local_roughness

ACTIVATIONS = ("gelu", "relu", "identity")
MOST_PARTS = 64  # of the layers, in the picture
INDEPENDENT = 1.5  # the local roughness of independent layers
SHOWN = (1e-3, INDEPENDENT)  # the range of the colours
NO_LOG = "no such run\nhas a layer log yet"


@dataclass(frozen=True)
class Config(ConvolutionChoice):
    """Weight-tied networks (``choice``, with every activation and one ``seed``) and a ``convolution``. The roughness
    after ``epoch`` is also drawn as a curve (0: after the last one)."""

    epoch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_fields(self, epoch=0)

    @property
    def parts(self) -> int:
        """The number of parts of the layers in the picture."""
        return max(1, min(MOST_PARTS, self.choice.depth - 2))


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `tabulate_roughness` and `find_fronts`, for the runs that have a layer log and the longest schedule
    in their setting, and the table of `list_logged_runs`."""
    found = config.choice.select(records.read_runs(), activation=None, initialisation="weight-tied", seed=config.seed)
    logs = {run.config.name: run.layers() for run in found}
    logged = [run for run in found if run.config.activation in ACTIVATIONS and logs[run.config.name]]
    shown = [(run, logs[run.config.name]) for run in select_longest_schedule(logged)]
    return {
        "roughness": tabulate_roughness(shown, config.convolution, config.parts),
        "roughness_front": find_fronts(shown, config.convolution),
        "roughness_runs": list_logged_runs((run, logs[run.config.name]) for run in found),
    }


WHICH = ("run", "setting", "activation")


def _describe_run(run: Run) -> dict[str, str]:
    values = run.config.name, Setting.from_config(run.config).words, run.config.activation
    return dict(zip(WHICH, values, strict=True))


def tabulate_roughness(logs: Iterable[tuple[Run, LayerLog]], convolution: str, parts: int) -> dict[str, list]:
    """The table of ``roughness.csv``, with a row for each run and each epoch in its layer log.

    The columns are run, setting, activation, epoch (1, 2, ...), begun and time (the sums of the learning rates of all
    steps before the epoch and up to its end), and the `local_roughness` in equal parts of the layers: part_1 (next to
    the input), part_2, ...
    """
    rows, names = [], [f"part_{part}" for part in range(1, parts + 1)]
    for run, log in logs:
        images = run.config.train_images or dataset.TRAIN_IMAGES
        values = local_roughness(log[f"distance_{convolution}"], log[f"second_difference_{convolution}"], parts)
        for epoch, line in zip(log["epoch"].tolist(), values.tolist(), strict=True):
            begun, time = (schedule.training_time(run.config, images, epochs) for epochs in (epoch, epoch + 1))
            reached = {"epoch": epoch + 1, "begun": begun, "time": time}
            rows.append(_describe_run(run) | reached | dict(zip(names, line, strict=True)))
    return tables.from_rows(rows, (*WHICH, "epoch", "begun", "time", *names))


def find_fronts(logs: Iterable[tuple[Run, LayerLog]], convolution: str) -> dict[str, list]:
    """The table of ``roughness_front.csv``, with a row for each run and each eighth of its layers.

    The columns are run, setting, activation, part (1 is next to the input), first (the first epoch in the log), and the
    epoch and the time at which the local roughness of the part first was `ROUGH` or more (0 and nan if it never was).
    """
    rows = []
    for run, log in logs:
        lines = tables.rows(tabulate_roughness([(run, log)], convolution, PARTS))
        for part in range(1, PARTS + 1):
            rough = next((line for line in lines if line[f"part_{part}"] >= ROUGH), {"epoch": 0, "time": math.nan})
            row = _describe_run(run) | {"part": part, "first": lines[0]["epoch"]}
            rows.append(row | {"epoch": rough["epoch"], "time": rough["time"]})
    return tables.from_rows(rows, (*WHICH, "part", "first", "epoch", "time"))


def list_logged_runs(logs: Iterable[tuple[Run, LayerLog]]) -> dict[str, list]:
    """The table of ``roughness_runs.csv``: run, setting, activation, epochs, and logged, the number of epochs in the
    layer log (0 for runs that were trained before there were such logs)."""
    rows = [
        _describe_run(run) | {"epochs": run.config.epochs, "logged": len(log["epoch"]) if log else 0}
        for run, log in logs
    ]
    return tables.from_rows(rows, (*WHICH, "epochs", "logged"))


@styled
def draw(data: Data, config: Config) -> Figure:
    """Local roughness in colour over layers and training time, with a row for each setting and a column for each
    activation. Below, the curves after one epoch."""
    table = data["roughness"]
    settings = list(dict.fromkeys(table["setting"])) or [""]
    figure, axes = make_panels(len(ACTIVATIONS), rows=len(settings) + 1, height=2.6 * len(settings) + 1.9, sharex=True,
                          sharey="row")  # fmt: skip
    colors = ScalarMappable(LogNorm(*SHOWN), SEQUENTIAL)
    for row, setting in zip(axes, settings, strict=False):
        for panel, activation in zip(row, ACTIVATIONS, strict=True):
            lines = tables.select(table, setting=setting, activation=activation)
            if len(lines["epoch"]):
                _draw_front(panel, lines, config, colors.norm)
            else:
                write_across(panel, NO_LOG, color=GREY)
        row[0].set_ylabel(f"{setting}\ntraining time $t$" if len(settings) > 1 else "training time $t$")
    for panel, activation in zip(axes[0], ACTIVATIONS, strict=True):
        panel.set_title(f"{tables.word(activation)}, weight-tied")
    draw_color_bar(figure, colors, list(axes[:-1].flat), "local roughness", pad=0.02, aspect=25)
    for panel, activation in zip(axes[-1], ACTIVATIONS, strict=True):
        _draw_profiles(panel, table, activation, config)
    return figure


def _compute_edges(config: Config) -> np.ndarray:
    # The edges of the parts. Layers 2..L-1 have two neighbours.
    sizes = [len(part) for part in np.array_split(np.arange(config.choice.depth - 2), config.parts)]
    return 1.5 + np.concatenate([[0], np.cumsum(sizes)])


def _stack_parts(lines: tables.Table, config: Config) -> np.ndarray:
    return np.stack([np.asarray(lines[f"part_{part}"], dtype=float) for part in range(1, config.parts + 1)], axis=1)


def _find_shown_line(lines: tables.Table, config: Config) -> int:
    # The index of the epoch that is drawn as a curve: the nearest to the one in the config.
    return int(np.argmin(np.abs(lines["epoch"] - config.epoch))) if config.epoch else len(lines["epoch"]) - 1


def _draw_front(panel: Axes, lines: tables.Table, config: Config, norm: Normalize) -> None:
    values, breaks = _stack_parts(lines, config), np.flatnonzero(np.diff(lines["epoch"]) != 1) + 1
    for rows in np.split(np.arange(len(values)), breaks):  # epochs that follow one another
        times = [lines["begun"][rows[0]], *lines["time"][rows]]
        panel.pcolormesh(_compute_edges(config), times, values[rows], norm=norm, cmap=SEQUENTIAL, rasterized=True)
    panel.set_ylim(0, None)
    panel.axhline(lines["time"][_find_shown_line(lines, config)], color="white", linestyle="--", linewidth=1)
    if lines["begun"][0] > 0:
        panel.text(0.5, 0.02, f"no log before epoch {lines['epoch'][0]}", ha="center", color=GREY, fontsize=8,
                   transform=panel.transAxes)  # fmt: skip


def _draw_profiles(panel: Axes, table: tables.Table, activation: str, config: Config) -> None:
    edges = _compute_edges(config)
    settings = list(dict.fromkeys(table["setting"]))
    for number, setting in enumerate(settings):
        lines = tables.select(table, setting=setting, activation=activation)
        if len(lines["epoch"]):
            place = _find_shown_line(lines, config)
            style = {"color": activation_color(activation), "linestyle": ("-", "--", ":")[number % 3]}
            label = f"epoch {lines['epoch'][place]}" + (f", row {number + 1}" if len(settings) > 1 else "")
            panel.plot((edges[1:] + edges[:-1]) / 2, _stack_parts(lines, config)[place], label=label, **style)
    if panel.lines:
        panel.legend(loc="lower left")
    for level, words in ((INDEPENDENT, "independent"), (ROUGH, "rough")):
        panel.axhline(level, linestyle=":", **GUIDE)
        panel.annotate(words, (1, level), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                       ha="right", fontsize=7, color=GREY)  # fmt: skip
    panel.set(yscale="log", xlabel="layer $k$", ylim=(SHOWN[0] / 3, 3))
    if activation == ACTIVATIONS[0]:
        panel.set_ylabel("local roughness")

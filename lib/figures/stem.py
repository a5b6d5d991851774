"""The size of the stem, which determines how long the ODE of a trained network is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice, select_longest_schedule
from lib.cifar.course import RATIOS, SCALES, describe_run, make_columns, smoothness_in_training
from lib.cifar.records import Run
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import (
    BLUE,
    GREY,
    GUIDE,
    PURPLE,
    activation_color,
    make_panels,
    set_plain_ticks,
    styled,
    write_across,
)
from lib.measures import SMOOTH_BELOW

SPIKE_COLUMNS = (
    "scale_before",
    "scale_after",
    "batch_loss",
    "loss_before",
    "loss_highest",
    "path_before",
    "path_after",
)


@dataclass(frozen=True)
class Config:
    """Networks after training (``choice``) and ``small`` ones along training. The spike is averaged over ``every``
    steps."""

    choice: NetworkChoice
    small: NetworkChoice
    every: int = 8

    def __post_init__(self) -> None:
        checks.check_fields(self, "every")


def compute(config: Config, progress: Progress = silent) -> Data:
    """Four tables: the networks after training, the small ones along training, the spike of a loss, and its summary."""
    found = records.read_runs()
    small = config.small.select(found, initialisation="weight-tied", hold_stem=None)
    both = {run.config.epochs for run in small if run.config.hold_stem} & {
        run.config.epochs for run in small if not run.config.hold_stem
    }
    stems = records.select(small, epochs=max(both)) if both else select_longest_schedule(small)
    spike = average_spike(config.every)
    return {
        "stem": measure_path_lengths(config.choice.select(found, activation=None, hold_stem=None)),
        "stem_training": smoothness_in_training(stems),
        "stem_spike": spike,
        "stem_spike_summary": summarise_spike(spike),
    }


def measure_path_lengths(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``stem.csv``, with a row for each run with batch norm whose weights or logged scales are here.

    The columns are run, activation, initialisation, epochs, hold_stem, test_accuracy (%), von_neumann_conv1,
    von_neumann_conv2, stem_scale, path_length (`ConvResNet.scales`) and relative_path_length. The last one is
    path_length / stem_scale: how far the layers may carry the hidden state, in units of the stem's output before its
    ReLU (|h_0| is 0.6 to 1 times that unit).
    """
    rows = []
    for run in (run for run in runs if run.config.batch_norm):
        if run.has_weights:
            scales = run.load().network.scales()
        elif (log := run.log()) and log[-1].get("stem_scale"):
            scales = {name: log[-1][name] for name in SCALES[:2]}
        else:
            continue
        relative = {"relative_path_length": scales["path_length"] / scales["stem_scale"]}
        results = {name: run.values[name] for name in ("test_accuracy", *RATIOS)}
        rows.append(describe_run(run) | {"hold_stem": run.config.hold_stem} | results | scales | relative)
    return make_columns(rows, ("hold_stem", "test_accuracy"), (*RATIOS, *SCALES))


def relate_accuracy_to_length(networks: tables.Table) -> dict[str, float]:
    """How test accuracy depends on the relative path length, in the table of `measure_path_lengths`.

    ``networks`` is their number. ``points`` is the change of accuracy for ten times the length (least squares), and
    ``correlation`` is that with the logarithm of the length. ``alike`` is the number of networks of the longest
    schedule that are not linear, and ``correlation_alike`` is the correlation among them (nan for fewer than three).
    """
    lengths = np.log10(np.asarray(networks["relative_path_length"], dtype=float))
    accuracy = np.asarray(networks["test_accuracy"], dtype=float)
    alike = np.asarray(networks["epochs"]) == max(networks["epochs"])
    alike &= np.asarray(networks["activation"]) != "identity"
    return {
        "networks": len(lengths),
        "points": float(np.polyfit(lengths, accuracy, 1)[0]),
        "correlation": float(np.corrcoef(lengths, accuracy)[0, 1]),
        "alike": int(alike.sum()),
        "correlation_alike": float(np.corrcoef(lengths[alike], accuracy[alike])[0, 1]) if alike.sum() > 2 else math.nan,
    }


def average_spike(every: int) -> dict[str, list]:
    """The table of ``stem_spike.csv``, from ``checkpoints/loss_spike.csv``: a few epochs of a run, in means over
    ``every`` steps. The columns are epochs (complete so far, with a fraction), loss, relative_path_length."""
    checks.positive_int("every", every)
    watched = records.read_spike()
    steps = watched["step"].max() if len(watched["step"]) else 1
    epochs = watched["epoch"] - 1 + (watched["step"] - 0.5) / steps
    columns = {"epochs": epochs, "loss": watched["loss"]}
    columns["relative_path_length"] = watched["path_length"] / watched["stem_scale"]
    whole = len(epochs) // every * every
    return {name: column[:whole].reshape(-1, every).mean(axis=1).tolist() for name, column in columns.items()}


def summarise_spike(spike: tables.Table) -> dict[str, list]:
    """The table of ``stem_spike_summary.csv``: a row, or none without ``checkpoints/loss_spike.csv``.

    The columns scale_before and scale_after are the stem's scale around the step that it grows most in, and batch_loss
    is the loss on the batch of that step. In the means of `average_spike` (``spike``), loss_before and path_before are
    medians before the highest loss, loss_highest is that loss, and path_after is the least relative path length from
    there on.
    """
    rows = []
    if loss := spike["loss"]:
        watched, path = records.read_spike(), spike["relative_path_length"]
        scale = watched["stem_scale"]
        step, highest = int(np.argmax(scale[1:] / scale[:-1])) + 1, int(np.argmax(loss))
        row = {"scale_before": scale[step - 1], "scale_after": scale[step], "batch_loss": watched["loss"][step]}
        row |= {"loss_before": np.median(loss[: max(highest, 1)]), "loss_highest": loss[highest]}
        row |= {"path_before": np.median(path[: max(highest, 1)]), "path_after": min(path[highest:])}
        rows.append({name: float(value) for name, value in row.items()})
    return tables.from_rows(rows, SPIKE_COLUMNS)


@styled
def draw(data: Data, config: Config) -> Figure:
    """Accuracy and von Neumann ratio against the relative path length, the same small networks with a trained and a
    held stem, and a spike of the loss step by step.

    Networks have the colour of their activation. Weight-tied ones are full, i.i.d. ones hollow, and those with a held
    stem are squares. Longer schedules have larger markers. Along training there is a line for each run, and a dotted
    one at `SMOOTH_BELOW`.
    """
    figure, axes = make_panels(2, rows=3, height=6.4, width_ratios=[1.25, 1])
    (accuracy, ratio, rougher), (loss, length, longer) = axes.T
    for above, under in ((accuracy, ratio), (loss, length)):
        above.sharex(under)
        above.tick_params(labelbottom=False)
    _draw_networks(accuracy, ratio, data["stem"])
    _draw_training(rougher, longer, data["stem_training"])
    _draw_spike(loss, length, data["stem_spike"])
    return figure


def _draw_networks(accuracy: Axes, ratio: Axes, networks: tables.Table) -> None:
    lengths = np.unique(networks["epochs"]).tolist()
    sizes = dict(zip(lengths[::-1], (7, 4.5, 3), strict=False))
    for name, panel in (("test_accuracy", accuracy), ("von_neumann_conv1", ratio)):
        for row in tables.rows(networks):
            color = activation_color(row["activation"])
            face = color if row["initialisation"] == "weight-tied" else "white"
            marker = "s" if row["hold_stem"] else "o"
            place = row["relative_path_length"], row[name]
            size = sizes.get(row["epochs"], min(sizes.values()))
            panel.plot(*place, marker, color=color, markerfacecolor=face, markersize=size)
    accuracy.set(ylabel="test accuracy (%)", title="networks at the end of training")
    ratio.set(yscale="log", xlabel="relative path length", ylabel="von Neumann ratio of conv1")
    for activation in dict.fromkeys(networks["activation"]):
        label, color = tables.word(activation), activation_color(activation)
        ratio.plot([], [], "o", color=color, label=label)
    ratio.plot([], [], "o", color=GREY, label="full: weight-tied")
    ratio.plot([], [], "o", color=GREY, markerfacecolor="white", label="hollow: i.i.d.")
    if any(networks["hold_stem"]):
        ratio.plot([], [], "s", color=GREY, label="stem held")
    for epochs, size in sizes.items():
        ratio.plot([], [], "o", color=GREY, markersize=size, label=f"{epochs} epochs")
    ratio.legend(loc="lower right", labelspacing=0.3, ncols=2, columnspacing=0.8)
    ratio.set_xscale("log")
    ratio.margins(x=0.12, y=0.12)
    set_plain_ticks(ratio.xaxis)
    if not len(networks["run"]):
        write_across(ratio, "none is here")


def _draw_training(rougher: Axes, longer: Axes, training: tables.Table) -> None:
    for hold_stem, label, color in ((False, "stem trains", BLUE), (True, "stem held", PURPLE)):
        for line in tables.group(tables.select(training, hold_stem=hold_stem), "run").values():
            longer.plot(line["epoch"], line["relative_path_length"], color=color, linewidth=1, label=label)
            rougher.plot(line["epoch"], line["von_neumann_conv1"], color=color, linewidth=1)
            label = None  # one entry of the legend for all runs
    rougher.axhline(SMOOTH_BELOW, linestyle=":", **GUIDE)
    for panel, name in ((rougher, "von Neumann ratio of conv1"), (longer, "relative path length")):
        panel.set(yscale="log", xlabel="epochs complete", ylabel=name)
    set_plain_ticks(longer.yaxis)
    if not len(training["run"]):
        write_across(rougher, "none is here")
        return
    rougher.set_title(f"{training['depth'][0]} layers, {tables.word(training['activation'][0])}, weight-tied")
    longer.set_title("the same networks")
    longer.legend(loc="lower right", handlelength=1.2)


def _draw_spike(loss: Axes, length: Axes, spike: tables.Table) -> None:
    loss.plot(spike["epochs"], spike["loss"], color=GREY, linewidth=1)
    length.plot(spike["epochs"], spike["relative_path_length"], color=BLUE, linewidth=1)
    loss.set(ylabel="training loss", title="a spike of the loss: GELU, i.i.d.")
    length.set(yscale="log", xlabel="epochs complete", ylabel="relative path length")
    set_plain_ticks(length.yaxis)
    if not len(spike["epochs"]):
        write_across(length, "none is here")

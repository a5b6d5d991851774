"""Table 1: accuracy on CIFAR-10, and smoothness of the trained weights (Section 5.2)."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice, length_in_words
from lib.cifar.records import CONVOLUTIONS, PAPER_EPOCHS, Run
from lib.figures.claim import OPEN, Claim, Read, judge
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import styled
from lib.measures import SMOOTH_BELOW

PAPER_RUNS = 5


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1 as published: medians and interquartile ranges over 5 runs, in %, and the judgement by eye."""

    activation: str
    initialisation: str
    train: float
    train_range: float
    test: float
    test_range: float
    smooth: bool


PAPER_TABLE = (
    PaperRow("identity", "weight-tied", 56.5, 0.1, 59.8, 0.7, True),
    PaperRow("identity", "iid", 56.1, 0.3, 59.6, 0.7, False),
    PaperRow("gelu", "weight-tied", 80.5, 0.7, 79.9, 0.2, True),
    PaperRow("gelu", "iid", 89.8, 0.5, 85.7, 0.1, False),
    PaperRow("relu", "weight-tied", 97.4, 0.6, 88.1, 0.1, False),
    PaperRow("relu", "iid", 98.4, 0.1, 88.4, 0.5, False),
)


@dataclass(frozen=True)
class Config:
    """Which networks (``choice``), and the ``accuracy`` of which epoch: "last", or "best" as the released checkpoints
    log it."""

    choice: NetworkChoice
    accuracy: str = "last"

    def __post_init__(self) -> None:
        checks.choice("accuracy", self.accuracy, ("last", "best"))


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of `compare`."""
    return {"table_1": compare(records.read_runs(), config.choice, config.accuracy)}


def median_and_range(values: Iterable[float]) -> tuple[float, float]:
    """Median and interquartile range; both nan without values, the range nan with a single one."""
    values = np.asarray(list(values), dtype=float)
    if len(values) == 0:
        return math.nan, math.nan
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(high - low) if len(values) > 1 else math.nan


def compare(runs: Iterable[Run], choice: NetworkChoice, accuracy: str = "last") -> dict[str, list]:
    """The table of ``table_1.csv``, a row for each of the paper's: its numbers and ours.

    ``resampling`` is the median of the `resampling_distances` of those of its runs that have one (nan of none).

    Without batch norm the columns paper_... are absent: the paper's networks have it. Each row takes the runs of
    its longest schedule. ``accuracy`` "last" takes that of the last epoch, "best" that of the best evaluated epoch (see
    ``test_every``), which is what the released checkpoints log.
    """
    checks.choice("accuracy", accuracy, ("last", "best"))
    suffix = "" if accuracy == "last" else "_best"
    runs, resampled = list(runs), resampling_distances()
    rows = []
    for paper in PAPER_TABLE:
        here = choice.select(runs, activation=paper.activation, initialisation=paper.initialisation)
        here = records.longest_schedule(here)
        train, train_range = median_and_range(run.values[f"train_accuracy{suffix}"] for run in here)
        test, test_range = median_and_range(run.values[f"test_accuracy{suffix}"] for run in here)
        ratios = [median_and_range(run.values[f"von_neumann_{name}"] for run in here)[0] for name in CONVOLUTIONS]
        published = {
            "paper_train": paper.train,
            "paper_train_range": paper.train_range,
            "paper_test": paper.test,
            "paper_test_range": paper.test_range,
            "paper_smooth": paper.smooth,
        }
        rows.append(
            {
                "activation": paper.activation,
                "initialisation": paper.initialisation,
                **(published if choice.batch_norm else {}),
                "train": train,
                "train_range": train_range,
                "test": test,
                "test_range": test_range,
                "von_neumann_conv1": ratios[0],
                "von_neumann_conv2": ratios[1],
                "smooth": all(ratio < SMOOTH_BELOW for ratio in ratios),
                "resampling": median_and_range(
                    resampled[run.config.name] for run in here if run.config.name in resampled
                )[0],
                "runs": len(here),
                "epochs": here[0].config.epochs if here else 0,
            }
        )
    return tables.from_rows(rows)


def make_readable(table: Mapping[str, list]) -> dict[str, list[str]]:
    """The table as it is read and printed: a row says itself if it has fewer epochs or runs than the paper."""

    def percent(middle: float, spread: float) -> str:
        return f"{middle:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")

    lines = []
    for row in tables.rows(table):
        line = {"activation": tables.word(row["activation"]), "initialisation": tables.word(row["initialisation"])}
        if "paper_test" in row:
            line["paper train %"] = percent(row["paper_train"], row["paper_train_range"])
            line["paper test %"] = percent(row["paper_test"], row["paper_test_range"])
            line["paper smooth"] = "yes" if row["paper_smooth"] else "no"
        ours = ("train %", "test %", "von Neumann conv1", "von Neumann conv2", "smooth", "resampling distance")
        if row["runs"] == 0:
            line |= dict.fromkeys(ours, "-") | {"trained": "not yet"}
        else:
            texts = (
                percent(row["train"], row["train_range"]),
                percent(row["test"], row["test_range"]),
                f"{row['von_neumann_conv1']:.2g}",
                f"{row['von_neumann_conv2']:.2g}",
                "yes" if row["smooth"] else "no",
                "-" if math.isnan(row["resampling"]) else f"{row['resampling']:.2g}",
            )
            line |= dict(zip(ours, texts, strict=True)) | {"trained": _trained(row["epochs"], row["runs"])}
        lines.append(line)
    return tables.from_rows(lines)


def resampling_distances() -> dict[str, float]:
    """How far the logits on the test images are off with half of the layers kept, relative to their size, by run: those
    in ``checkpoints/resampling.csv``, whose weights are here. Small, if layers are like their neighbours or their
    differences average out; 1 or more, if nothing of the network is left."""
    kept = tables.select(records.read_measured("resampling"), weights="kept", statistics="kept")
    return {
        str(run): float(rows["distance"][rows["layers"].argmax()])
        for run in dict.fromkeys(kept["run"])
        for rows in [tables.select(kept, run=run)]
    }


def _trained(epochs: int, runs: int) -> str:
    count = f"{runs} runs" if runs >= PAPER_RUNS else f"{runs} of {PAPER_RUNS} runs"
    return f"{records.training_length(epochs)}, {count}"


def claims(read: Read) -> Iterator[Claim]:
    """What the paper says of its trained networks; open if none was trained for as long as the paper's."""
    for row in tables.rows(read("table_1")):
        claimed, found = row["paper_smooth"], row["smooth"]
        network = f"{tables.word(row['activation'])}, {tables.word(row['initialisation'])}"
        measured = (
            f"von Neumann ratio {row['von_neumann_conv1']:.2g} (conv1) and {row['von_neumann_conv2']:.2g} (conv2) "
            f"after {length_in_words(row['epochs'], row['runs'])}"
        )
        yield Claim(
            f"CIFAR-10, {network}: {'smooth' if claimed else 'rough'} across layers after training",
            "Table 1",
            measured if row["runs"] else "nothing trained yet",
            f"{'both' if claimed else 'not both'} below {SMOOTH_BELOW} (medians over runs)",
            "",
            judge(claimed == found) if row["epochs"] >= PAPER_EPOCHS else OPEN,
            "table_1",
        )


@styled
def draw(data: Data, config: Config) -> Figure:
    """The readable table as a picture, columns as wide as what they hold."""
    readable = make_readable(data["table_1"])
    rows = list(zip(*readable.values(), strict=True))
    wide = [2 + max(map(len, [*name.split(), *column])) for name, column in readable.items()]
    lines = max(len(name.split()) for name in readable)
    figure = Figure(figsize=(max(8.0, 0.085 * sum(wide)), 0.3 * len(rows) + 0.22 * lines), layout="none")
    axes = figure.add_axes([0.01, 0.01, 0.98, 0.98])
    axes.set_axis_off()
    drawn = axes.table(
        rows,
        colLabels=[name.replace(" ", "\n") for name in readable],
        colWidths=[width / sum(wide) for width in wide],
        cellLoc="center",
        edges="horizontal",
        bbox=[0, 0, 1, 1],
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, _), cell in drawn.get_celld().items():
        cell.set_height(0.75 * lines if row == 0 else 1)
        cell.set_linewidth(0.5)
        cell.set_text_props(weight="bold" if row == 0 else "normal")
    return figure

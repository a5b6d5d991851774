"""Table 1: accuracy on CIFAR-10, and the smoothness of the trained weights (Section 5.2)."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.choice import (
    RELEASED,
    NetworkChoice,
    Setting,
    describe_training,
    released_setting,
    select_longest_schedule,
)
from lib.cifar.course import RATIOS, smooth_shares
from lib.cifar.records import CONVOLUTIONS, PAPER_EPOCHS, SHARES, Run
from lib.figures.claim import OPEN, Claim, Read, combine_margins, factor_below, judge_margin
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import styled
from lib.measures import PARTS, SMOOTH_BELOW

PAPER_RUNS = 5


@dataclass(frozen=True)
class PaperRow:
    """A row of the published Table 1: medians and interquartile ranges over 5 runs, in %, and smoothness by eye."""

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
    """The ``choice`` of networks, and the epoch of the ``accuracy``: "last", or "best" as in the released
    checkpoints."""

    choice: NetworkChoice
    accuracy: str = "last"

    def __post_init__(self) -> None:
        checks.choice("accuracy", self.accuracy, ("last", "best"))


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table that `compare` makes."""
    return {"table_1": compare(records.read_runs(), config.choice, config.accuracy)}


def compute_median_and_range(values: Iterable[float]) -> tuple[float, float]:
    """Median and interquartile range. Both are nan without values; the range is nan for a single value."""
    values = np.asarray(list(values), dtype=float)
    if len(values) == 0:
        return math.nan, math.nan
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(high - low) if len(values) > 1 else math.nan


def compare(runs: Iterable[Run], choice: NetworkChoice, accuracy: str = "last") -> dict[str, list]:
    """The table of ``table_1.csv``: a block of rows for each `Setting` of the choice, with schedules of any length.

    A block has a row for each row of the paper, with its numbers and those of our runs with the longest schedule. The
    released script's setting comes first, with all rows. Other settings have the rows that are trained.

    ``smooth`` says whether all medians of the von Neumann ratio over all layers are below `SMOOTH_BELOW`.
    ``smooth_share_...`` is the median of `smooth_shares` over the ``smooth_known`` runs for which it is known.
    ``resampling`` is the median of `read_resampling_distances` over the runs that have one. A median of no runs is nan.

    Without batch norm there are no columns paper_...: the paper's networks have batch norm. If ``accuracy`` is "last",
    accuracies are those of the last epoch. If it is "best", they are those of the best evaluated epoch (see
    ``test_every``), as in the released checkpoints.
    """
    checks.choice("accuracy", accuracy, ("last", "best"))
    resampled = read_resampling_distances()
    found = choice.select(runs, activation=None)
    first = released_setting(choice)
    settings = sorted({Setting.from_config(run.config).of_any_length for run in found} - {first})
    rows = []
    for setting in (first, *settings):
        block = [run for run in found if Setting.from_config(run.config).of_any_length == setting]
        for paper in PAPER_TABLE:
            here = records.select(block, activation=paper.activation, initialisation=paper.initialisation)
            if here or setting == first:
                row = {"setting": setting.words, "activation": paper.activation}
                row |= {"initialisation": paper.initialisation} | (_quote_paper(paper) if choice.batch_norm else {})
                rows.append(row | _measure_runs(select_longest_schedule(here), accuracy, resampled))
    return tables.from_rows(rows)


def _quote_paper(paper: PaperRow) -> dict[str, Any]:
    columns = ("train", "train_range", "test", "test_range", "smooth")
    return {f"paper_{name}": getattr(paper, name) for name in columns}


def _measure_runs(runs: list[Run], accuracy: str, resampled: Mapping[str, float]) -> dict[str, Any]:
    # The measured part of a row, over runs of one setting and schedule.
    suffix = "" if accuracy == "last" else "_best"
    train, train_range = compute_median_and_range(run.values[f"train_accuracy{suffix}"] for run in runs)
    test, test_range = compute_median_and_range(run.values[f"test_accuracy{suffix}"] for run in runs)
    ratios = {name: compute_median_and_range(run.values[name] for run in runs)[0] for name in RATIOS}
    known = [shares for run in runs if np.isfinite(list((shares := smooth_shares(run)).values())).all()]
    distances = (resampled[run.config.name] for run in runs if run.config.name in resampled)
    return {
        "train": train,
        "train_range": train_range,
        "test": test,
        "test_range": test_range,
        **ratios,
        "smooth": all(ratio < SMOOTH_BELOW for ratio in ratios.values()),
        **{name: compute_median_and_range(shares[name] for shares in known)[0] for name in SHARES},
        "smooth_known": len(known),
        "resampling": compute_median_and_range(distances)[0],
        "runs": len(runs),
        "epochs": runs[0].config.epochs if runs else 0,
        "seeds": " ".join(str(run.config.seed) for run in runs),
    }


def make_readable(table: Mapping[str, list]) -> dict[str, list[str]]:
    """The table for readers. The first row of a block names its setting. A row says if it has fewer epochs or runs than
    the paper."""

    def percent(middle: float, spread: float) -> str:
        return f"{middle:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")

    lines, block = [], None
    for row in tables.rows(table):
        line = {"setting": "" if row["setting"] == block else row["setting"]}
        block = row["setting"]
        line |= {"activation": tables.word(row["activation"]), "initialisation": tables.word(row["initialisation"])}
        if "paper_test" in row:
            line["paper train %"] = percent(row["paper_train"], row["paper_train_range"])
            line["paper test %"] = percent(row["paper_test"], row["paper_test_range"])
            line["paper smooth"] = "yes" if row["paper_smooth"] else "no"
        ours = ("train %", "test %", "von Neumann conv1", "von Neumann conv2", "smooth over all layers",
                "smooth eighths conv1", "smooth eighths conv2", "resampling distance")  # fmt: skip
        if row["runs"] == 0:
            line |= dict.fromkeys(ours, "-") | {"trained": "not yet"}
        else:
            texts = (
                percent(row["train"], row["train_range"]),
                percent(row["test"], row["test_range"]),
                f"{row['von_neumann_conv1']:.2g}",
                f"{row['von_neumann_conv2']:.2g}",
                "yes" if row["smooth"] else "no",
                *(_format_eighths(row[name], row["smooth_known"], row["runs"]) for name in SHARES),
                "-" if math.isnan(row["resampling"]) else f"{row['resampling']:.2g}",
            )
            line |= dict(zip(ours, texts, strict=True)) | {"trained": _describe_trained(row)}
        lines.append(line)
    return tables.from_rows(lines)


def _format_eighths(share: float, known: int, runs: int) -> str:
    # If the share is not known for all runs, the number of runs is given.
    if known == 0:
        return "unknown"
    return f"{PARTS * share:g} of {PARTS}" + ("" if known == runs else f" ({known} run{'' if known == 1 else 's'})")


def read_resampling_distances() -> dict[str, float]:
    """The relative distance of the logits on the test images if half of the layers are kept, for each run in
    ``checkpoints/resampling.csv``. It is small if neighbouring layers are similar or their differences average out. It
    is 1 or more if nothing of the network is left."""
    kept = tables.select(records.read_measured("resampling"), **records.KEPT)
    by_run = tables.group(kept, "run").items()
    return {str(run): float(rows["distance"][rows["layers"].argmax()]) for run, rows in by_run}


def _describe_trained(row: Mapping[str, Any]) -> str:
    runs, seeds = row["runs"], str(row["seeds"]).split()
    count = f"{runs} runs" if runs >= PAPER_RUNS else f"{runs} of {PAPER_RUNS} runs"
    named = f"seed{'' if runs == 1 else 's'} {', '.join(seeds)}"
    return f"{records.describe_length(row['epochs'])}, {count} ({named})"


def judge_claims(read: Read) -> Iterator[Claim]:
    """The paper's statements on trained networks, for each setting that has runs. A claim is open if no network was
    trained for as long as the paper's."""
    for row in tables.rows(read("table_1")):
        claimed = row["paper_smooth"]
        smooth = combine_margins(*(factor_below(row[f"von_neumann_{name}"], SMOOTH_BELOW) for name in CONVOLUTIONS))
        margin = smooth if claimed else -smooth  # rough: not smooth in one of them
        network = f"{tables.word(row['activation'])}, {tables.word(row['initialisation'])}"
        if row["setting"] != RELEASED:
            network += f", {row['setting']}"
        known, runs = row["smooth_known"], row["runs"]
        named = zip(SHARES, CONVOLUTIONS, strict=True)
        shares = " and ".join(f"{_format_eighths(row[share], known, known)} ({name})" for share, name in named)
        of_runs = f" of {known} run{'' if known == 1 else 's'}" if 0 < known < runs else ""
        measured = (
            f"von Neumann ratio over all layers {row['von_neumann_conv1']:.2g} (conv1) and "
            f"{row['von_neumann_conv2']:.2g} (conv2), smooth eighths of the depth{of_runs} "
            f"{shares if known else 'unknown'}, after {describe_training(row['epochs'], row['runs'])} "
            f"({row['setting']})"
        )
        yield judge_margin(
            f"CIFAR-10, {network}: {'smooth' if claimed else 'rough'} across layers after training",
            "Table 1",
            "table_1",
            margin,
            measured if row["runs"] else "nothing trained yet",
            f"{'both' if claimed else 'not both'} below {SMOOTH_BELOW} over all layers (medians over runs)",
            **({} if row["epochs"] >= PAPER_EPOCHS else {"verdict": OPEN}),
        )


@styled
def draw(data: Data, config: Config) -> Figure:
    """The readable table as a picture, with columns as wide as their texts."""
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

"""The paper's claims, one a row, each judged by its figure's room from the tables that the figures were drawn from."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib import checks, paths, tables
from lib.figures import (
    clipping,
    conv_limit,
    figure_1_left,
    figure_1_right,
    figure_2,
    figure_3,
    figure_4,
    initialisation,
    long_time,
    mean_limit,
    neural_ode,
    relu_counterexample,
    table_1,
)
from lib.figures.claim import BEYOND, RATE_WITHIN, Claim
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import COLORS, GREY, panels, styled
from lib.tables import from_rows

# The rooms that judge claims: the theorems first, then the networks trained on CIFAR-10, then what is beyond the paper.
ROOMS = (
    neural_ode,
    figure_1_left,
    figure_1_right,
    clipping,
    long_time,
    figure_2,
    initialisation,
    relu_counterexample,
    figure_3,
    table_1,
    figure_4,
    mean_limit,
)

# Rooms whose networks may not be trained yet: they are judged if their table is there.
IF_TRAINED = {conv_limit: "conv_limit_slopes"}


@dataclass(frozen=True)
class Config:
    """Whose tables are judged: those of a ``profile`` that has every figure in `ROOMS`, else ValueError."""

    profile: str = "paper"

    def __post_init__(self) -> None:
        judged = {room.__name__.rpartition(".")[2] for room in ROOMS}
        having = [folder.name for folder in sorted(paths.PROFILES.iterdir()) if folder.is_dir()]
        whole = [name for name in having if judged <= {file.stem for file in (paths.PROFILES / name).glob("*.yaml")}]
        checks.choice("profile", self.profile, ["quick", *whole])


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``claims.csv``: a row for each `Claim`."""
    return {"claims": from_rows(asdict(claim) for claim in judge_all(config.profile))}


WORDS = ("statement", "where", "measured", "criterion", "interval", "verdict", "figure")


def make_readable(data: Data) -> dict[str, list]:
    """The columns that people read."""
    return {name: data["claims"][name] for name in WORDS}


def folder(profile: str) -> Path:
    """Where a profile's tables are: ``figures`` for "paper", ``figures/<profile>`` for every other."""
    return paths.FIGURES if profile == "paper" else paths.FIGURES / profile


def read(profile: str, name: str) -> dict[str, np.ndarray]:
    """The table ``<name>.csv`` of a profile; raises FileNotFoundError with the command that makes it."""
    path = folder(profile) / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{paths.short(path)} is missing: `make figures PROFILE={profile}` makes it.")
    return tables.read_csv(path)


def judge_all(profile: str = "paper") -> list[Claim]:
    """Every claim, judged from the tables of ``profile``, in the order of the paper's statements.

    Raises ValueError for a profile without these figures, FileNotFoundError if one is not made yet.
    """
    Config(profile)
    rooms = [*ROOMS, *(room for room, table in IF_TRAINED.items() if (folder(profile) / f"{table}.csv").is_file())]
    found = [claim for room in rooms for claim in room.claims(partial(read, profile))]
    order = ["Prop. 2", "Prop. 3", "clipped flow", "Thm 4", "Def. 1", "Thm 6", "section 4.3", "App. D"]
    order += ["Fig. 3", "Table 1", "Appendix", BEYOND]
    return sorted(found, key=lambda claim: next(i for i, name in enumerate(order) if claim.where.startswith(name)))


@styled
def draw(data: Data, config: Config) -> Figure:
    """The claims on rates: how far the fitted slopes in L are from the claimed ones, with 95 % intervals.

    The picture says how many claims without a slope are left out. The band is +- `RATE_WITHIN`.
    """
    table, within = data["claims"], RATE_WITHIN
    keep = np.isfinite(np.asarray(table["slope"], dtype=float))
    rows = {name: np.asarray(column)[keep] for name, column in table.items()}
    figure, axes = panels(1, height=0.6 + 0.2 * keep.sum())
    places = np.arange(keep.sum())[::-1]
    # An interval by resampling may leave its slope out.
    reach = np.maximum([rows["slope"] - rows["low"], rows["high"] - rows["slope"]], 0)
    axes.axvspan(-within, within, color="#E8EEF4", zorder=0)
    axes.axvline(0, color=GREY, linewidth=1, zorder=1)
    axes.errorbar(
        rows["slope"] - rows["expected"], places, xerr=reach, fmt="o", color=COLORS[0], capsize=2, linewidth=1
    )
    labels = [f"{statement} ({where})" for statement, where in zip(rows["statement"], rows["where"], strict=True)]
    axes.set_yticks(places, labels, fontsize=7)
    for place, expected in zip(places, rows["expected"], strict=True):
        text = f"{expected:g}".replace("-", "−")
        axes.annotate(text, (1.04, place), xycoords=("axes fraction", "data"), va="center", ha="center", fontsize=7)
    axes.annotate("claimed", (1.04, len(places) - 0.2), xycoords=("axes fraction", "data"), ha="center", fontsize=7)
    axes.set_ylim(-0.7, len(places) - 0.3)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1.25 * within), max(high, 1.25 * within))
    axes.set_xticks([-within, 0, within])
    others = len(keep) - keep.sum()
    axes.set_xlabel("measured − claimed, 95 % interval")
    if others:
        figure.supxlabel(
            f"The other {others} claims are no slopes in $L$: claims.md has them.", fontsize=7, x=0.02, ha="left"
        )
    return figure

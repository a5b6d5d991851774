"""The clipped flow: norms and Lipschitz constants that do not grow with the depth (Prop. 3)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from lib import checks, digits
from lib.dense.distances import successive_squares
from lib.dense.network import NetworkConfig
from lib.dense.training import lockstep, train
from lib.digits import difference
from lib.figures.claim import Claim, Read, find_largest, fit_in_depth, judge, judge_rate, select_last
from lib.figures.experiment import Progress, evenly, largest_norm, silent, sorted_table
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, LIGHT, MARKERS, depth_axis, panels, plain_ticks, styled
from lib.measures import fit_slope
from lib.tables import select

POWER_WITHIN = 0.05  # by how much the exponent of a power law may seem to rise


@dataclass(frozen=True)
class Config:
    """The flow clipped at several ``clips`` C (0 stands for no clipping) at several ``depths``.

    Trained for ``iterations`` with ``learning_rate`` eta (t = eta * iterations), looked at ``recorded`` times.
    """

    network: NetworkConfig
    clips: list[float]
    depths: list[int]
    iterations: int
    learning_rate: float = 0.01
    recorded: int = 30

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_floats("clips", self.clips, zero_allowed=True)
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("recorded", self.recorded, least=2)


def compute(config: Config, progress: Progress = silent) -> Data:
    """Columns clip, depth, iteration, time, loss and, over the states recorded so far and all layers,

    - ``norm_V``, ``norm_W``: the largest |V_k|_F and |W_k|_F;
    - ``lipschitz``: L max_k |Z_{k+1} - Z_k|_F;
    - ``change``: the largest |entry(t) - entry(0)|, at most C t for the flow clipped at C.
    """
    recorded = evenly(config.iterations, config.recorded)
    runs = [(clip, depth) for clip in config.clips for depth in config.depths]
    trainings = [
        train(config.network.at_depth(depth), config.learning_rate, config.iterations, recorded, clip=clip)
        for clip, depth in runs
    ]
    starts, so_far, rows = {}, {}, []
    for records in progress(lockstep(trainings), len(recorded)):
        for (clip, depth), record in zip(runs, records, strict=True):
            weights = record.weights
            start = starts.get((clip, depth)) or starts.setdefault((clip, depth), weights.clone())
            now = {
                "norm_V": largest_norm(weights.V.flatten(1)),
                "norm_W": largest_norm(weights.W.flatten(1)),
                "lipschitz": depth * math.sqrt(float(sum(successive_squares(weights)).max())),
                "change": max(float((getattr(weights, name) - getattr(start, name)).abs().max()) for name in "VW"),
            }
            before = so_far.get((clip, depth), now)
            so_far[clip, depth] = {name: max(difference(value), before[name]) for name, value in now.items()}
            when = {"iteration": record.iteration, "time": config.learning_rate * record.iteration}
            rows.append({"clip": clip, "depth": depth, **when, "loss": record.loss, **so_far[clip, depth]})
    return {"clipping": sorted_table(rows, "clip", "depth", "iteration")}


@styled
def draw(data: Data, config: Config) -> Figure:
    """The clipped flow: weight norms and Lipschitz constants against depth and time, and the bound C t."""
    table = data["clipping"]
    figure, ((norm, constant), (growth, change)) = panels(2, 2, height=5)
    clips, depths = np.unique(table["clip"]), np.unique(table["depth"])
    last, deepest = max(table["iteration"]), depths[-1]
    for clip, color, marker in zip(clips, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        end = select(table, clip=clip, iteration=last)
        label = "no clipping" if clip == 0 else f"$C={clip:g}$"
        norm.plot(end["depth"], end["norm_V"], marker + "-", color=color, label=label)
        constant.plot(end["depth"], end["lipschitz"], marker + "-", color=color)
        path = select(table, clip=clip, depth=deepest)
        later = path["time"] > 0
        growth.plot(path["time"][later], path["lipschitz"][later], color=color)
        change.plot(path["time"][later], path["change"][later], color=color)
        if clip > 0:
            bound = clip * path["time"][later]
            change.plot(path["time"][later], bound, "--", color=LIGHT, linewidth=4, zorder=0)
    time = table["time"][-1]
    norm.set_title(rf"$\max_{{k,\,t\leq {time:g}}}\,\|V_k(t)\|_F$")
    constant.set_title(rf"$L\,\max_{{k,\,t\leq {time:g}}}\,\|Z_{{k+1}}(t)-Z_k(t)\|_F$")
    growth.set_title(rf"$L\,\max_k\,\|Z_{{k+1}}-Z_k\|_F$ up to time $t$, $L={deepest}$")
    change.set_title(r"largest change of an entry (dashes: bound $C\,t$)")
    for panel in (norm, constant):
        depth_axis(panel, depths)
        panel.set_ylim(0)
    for panel in (growth, change):
        panel.set_xlabel("training time $t$")
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain_ticks(panel.xaxis)
    figure.legend(loc="outside lower center", ncols=len(clips))
    return figure


def claims(read: Read) -> Iterator[Claim]:
    table = read("clipping")
    clipped = [clip for clip in np.unique(table["clip"]) if clip > 0]
    end = select_last(table)
    for columns, statement in (
        (("norm_V", "norm_W"), "Clipped flow: weight norms do not grow with L"),
        (("lipschitz",), "Clipped flow: K in |Z_(k+1) - Z_k| <= K/L does not grow with L"),
    ):
        fits = [fit_in_depth(select(end, clip=clip), column, at_least=8) for clip in clipped for column in columns]
        yield judge_rate(statement, "Prop. 3", "clipping", find_largest(fits), 0.0)
    later = (table["clip"] > 0) & (table["time"] > 0)
    share = table["change"][later] / (table["clip"][later] * table["time"][later])
    measured = f"at most {share.max():.6f} of C t"
    yield Claim(
        "Clipped flow: no entry moves by more than C t", "clipped flow", measured, "at most 1, up to rounding", "",
        judge(share.max() < 1 + 10.0 ** (1 - digits.DIGITS)), "clipping",
    )  # fmt: skip
    exponents = []
    for clip in clipped:
        path = select(table, clip=clip, depth=max(table["depth"]))
        for start, stop in ((0.25, 0.5), (0.5, 1.0)):
            part = (path["time"] >= start * path["time"][-1]) & (path["time"] <= stop * path["time"][-1])
            exponents.append(fit_slope(path["time"][part], path["lipschitz"][part]).slope)
    early, late = np.array(exponents).reshape(-1, 2).T
    yield Claim(
        "Clipped flow: K grows with T as a power of it, where the bound allows an exponential",
        "Prop. 3",
        f"K grows as T^p, p = {early.min():.2f} to {early.max():.2f} in the second quarter, {late.min():.2f} to "
        f"{late.max():.2f} in the second half",
        f"p rises by {POWER_WITHIN} at most; for an exponential it is proportional to T",
        "",
        judge(bool((late <= early + POWER_WITHIN).all())),
        "clipping",
    )

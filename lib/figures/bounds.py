"""Bounds and measurements over the training time, in powers of ten from each other (Prop. 2, Prop. 3, Thm 6)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from lib import activations, checks
from lib.dense import gronwall, limit, lojasiewicz, spectral
from lib.dense.distances import largest_successive_distance
from lib.dense.network import NetworkConfig, Weights, hidden_states, initialise, outputs
from lib.dense.training import train
from lib.digits import round_significant
from lib.figures.claim import (
    PROVED,
    Claim,
    Read,
    combine_margins,
    factor_above,
    factor_below,
    judge_margin,
    require_rows,
)
from lib.figures.experiment import Progress, compute_runs, draw_inputs, largest_norm, silent, space_evenly, vary_seed
from lib.figures.results import Data
from lib.figures.style import BLACK, BLUE, VERMILION, make_panels, styled
from lib.tables import Table, from_rows, select

TITLES = {
    "M": r"$M$ of Prop. 3: largest $\|A\|,\,\|V_k\|,\,\|W_k\|,\,\|B\|_F$",
    "K": r"$K$ of Prop. 3: $L\,\max_k\,\|Z_{k+1}-Z_k\|_F$",
    "C": r"$C$ of Prop. 2: $L\,\sup_x\,|F^L(x)-F(x)|$",
    "rate": r"rate of Thm 6: $-\log(\ell(t)/\ell(0))\,/\,t$",
}
LOWER = ("rate",)  # the lower bounds; all others are upper bounds
DIGITS = 6  # of the numbers in the table


@dataclass(frozen=True)
class Config:
    """A network trained by the flow clipped at ``clip`` C > 0, and for Thm 6 once more without clipping.

    It takes ``iterations`` steps of ``learning_rate``, is recorded ``recorded`` times, and is drawn with ``seeds``
    consecutive seeds, starting at the network's. Suprema over x are over ``inputs`` new Gaussian points. For
    ``tolerance`` see `limit.train`.
    """

    network: NetworkConfig
    clip: float
    iterations: int
    learning_rate: float = 0.025
    recorded: int = 11
    seeds: int = 1
    inputs: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        checks.check_fields(self, "clip", "iterations", "learning_rate", "seeds", "inputs", "tolerance", recorded=2)
        checks.positive_float("target_scale", self.network.target_scale)  # the rate divides by the first loss
        spectral.check_limit_exists(self.network)
        activations.check_smooth(self.network.activation)
        if not self.network.train_ends:
            raise ValueError("train_ends is False, expected True: the bounds are those of trained A and B.")
        at_zero = float(activations.get(self.network.activation).function(torch.zeros(1)))
        if at_zero != 0:
            raise ValueError(f"activation is {self.network.activation!r}, expected one that is 0 at 0, as gelu is.")

    @property
    def moments(self) -> list[int]:
        """The recorded iterations without the first, at which nothing has moved."""
        return space_evenly(self.iterations, self.recorded)[1:]


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``bounds.csv``: columns seed, bound ("M", "K", "C" or "rate"), time, measured, own, prior.

    ``own`` is the bound computed from the run's own norms, ``prior`` the bound known before training (nan if there is
    none). M and K are suprema up to that time; their bounds hold for every L and for the discrete steps. The rate has a
    lower bound: the smallest constant of the PL condition up to that time.
    """
    found = compute_runs(_measure_seed, config, vary_seed(config.network, config.seeds), progress)
    return {"bounds": from_rows(row for part in found for row in part)}


def _measure_seed(config: Config, network: NetworkConfig) -> list[dict]:
    measures = (_bound_clipped_flow, _bound_euler_error, _bound_rate)
    return [{"seed": network.seed} | row for measure in measures for row in measure(config, network)]


def _make_row(config: Config, bound: str, iteration: int, measured: float, own: float, prior: float) -> dict:
    values = {"measured": measured, "own": own, "prior": prior}
    time = {"bound": bound, "time": round_significant(config.learning_rate * iteration)}
    return time | {name: round_significant(value, DIGITS) for name, value in values.items()}


def _measure_norms(weights: Weights) -> dict[str, float]:
    return {name: largest_norm(values.flatten(1 if name in "VW" else 0)) for name, values in weights.items().items()}


def _bound_clipped_flow(config: Config, network: NetworkConfig) -> Iterator[dict]:
    start, data = initialise(network)
    first = _measure_norms(start)
    entries = {name: values[0].numel() if name in "VW" else values.numel() for name, values in start.items().items()}
    own, prior, largest, apart, moments = (0.0, 0.0), (0.0, 0.0), 0.0, 0.0, config.moments
    for record in train(network, config.learning_rate, config.iterations, clip=config.clip):
        time, step = config.learning_rate * record.iteration, config.learning_rate
        now = network.depth * largest_successive_distance(record.weights)
        largest, apart = max(largest, *_measure_norms(record.weights).values()), max(apart, now)
        if record.iteration in moments:
            known = max(first[name] + config.clip * time * math.sqrt(entries[name]) for name in first)
            yield _make_row(config, "M", record.iteration, largest, math.nan, known)
            yield _make_row(config, "K", record.iteration, apart, math.hypot(*own), math.hypot(*prior))
        own = gronwall.advance(network, gronwall.measure_sizes(network, record.weights, data), *own, step)
        known = gronwall.bound_sizes(network, start, data, config.clip, time)
        prior = gronwall.advance(network, known, *prior, step)


def _bound_euler_error(config: Config, network: NetworkConfig) -> Iterator[dict]:
    x = draw_inputs(network, config.inputs)
    schedule = config.learning_rate, config.iterations, config.moments
    for record in limit.train(network, *schedule, clip=config.clip, tolerance=config.tolerance):
        sampled = record.ode.network(network.depth)
        away = outputs(sampled, hidden_states(network, sampled, x)) - record.ode(x, 1e-8)
        constant = gronwall.euler_constant(record.ode, x)
        yield _make_row(config, "C", record.iteration, network.depth * largest_norm(away), constant, math.nan)


def _bound_rate(config: Config, network: NetworkConfig) -> Iterator[dict]:
    first, least = None, math.inf
    for record in train(network, config.learning_rate, config.iterations, [0, *config.moments]):
        first = first or record.loss
        least = min(least, lojasiewicz.constant(network, record.weights, record.solver.data.x))
        if record.iteration:
            rate = -math.log(record.loss / first) / (config.learning_rate * record.iteration)
            yield _make_row(config, "rate", record.iteration, rate, least, math.nan)


def compute_margins(table: Table, bound: str, kind: str) -> np.ndarray:
    """log10 of the factor between the measured value and its bound of this ``kind`` ("own" or "prior"), for each time
    and seed. It is negative if the bound is violated, and nan if there is none."""
    rows, margin = select(table, bound=bound), factor_above if bound in LOWER else factor_below
    measured = np.where(rows["measured"] < 0, 0.0, rows["measured"])  # the rate of a loss that rises
    return np.array([margin(*pair) for pair in zip(measured, rows[kind], strict=True)])


def compute_least_margin(table: Table, bound: str, kind: str, time: float) -> float:
    """The least margin over the seeds at that time (`compute_margins`)."""
    return combine_margins(*compute_margins(select(table, time=time), bound, kind))


@styled
def draw(data: Data, config: Config) -> Figure:
    """Measured values and their bounds against the training time, as medians over the seeds.

    At the end of a bound stands the least margin over the seeds, in powers of ten: it is positive if the bound holds. A
    cross marks each time at which a seed violates the bound.
    """
    table = data["bounds"]
    figure, axes = make_panels(2, 2, height=5)
    labels = {
        "measured": ("measured", {"color": BLACK}),
        "own": ("bound, the run's own norms", {"color": BLUE, "linestyle": "--"}),
        "prior": ("bound, before training", {"color": VERMILION, "linestyle": ":"}),
    }
    median = partial(np.median, axis=0)
    for panel, (bound, title) in zip(axes.flat, TITLES.items(), strict=True):
        rows = select(table, bound=bound)
        times = np.unique(rows["time"])
        for column, (label, style) in labels.items():
            values = np.array([median(select(rows, time=time)[column]) for time in times])
            panel.plot(times, values, label=label, **style)
            if column != "measured" and np.isfinite(values).all():
                powers = np.array([compute_least_margin(table, bound, column, time) for time in times])
                place = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
                panel.annotate(f"$10^{{{powers[-1]:+.2g}}}$", (times[-1], values[-1]), (5, -3), **place)
                if (powers < 0).any():
                    panel.plot(times[powers < 0], values[powers < 0], "X", color=BLACK, markersize=7, zorder=4)
        if bound != "M":  # M hardly moves
            panel.set_yscale("log")
        panel.set(title=title, xlabel="training time $T$")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


CLAIMED = (  # bound, kinds, where, statement
    ("C", ("own",), "Prop. 2; constant ours" + PROVED,
     "A network that samples the trained ODE: L sup over x of |F^L(x) - F(x)| is at most the bound C"),
    ("K", ("own", "prior"), "Prop. 3; constant ours" + PROVED,
     "Clipped flow: L times sup over k and t <= T of |Z_(k+1) - Z_k|_F is at most the bound K"),
    ("rate", ("own",), "Thm 6" + PROVED, "-log(l(t)/l(0))/t is at least the least PL constant up to t"),
)  # fmt: skip
KINDS = {"own": "with the run's own norms", "prior": "known before training"}


def judge_claims(read: Read) -> Iterator[Claim]:
    """No bound is violated. These claims are marked as proved: one that fails shows an error of the computation. They
    measure how far a bound is from the truth. (The bound M is left out: it only adds up the clipped steps.)"""
    table = read("bounds")
    for bound, kinds, where, statement in CLAIMED:
        margins = {kind: combine_margins(*compute_margins(table, bound, kind)) for kind in kinds}
        told = " and ".join(f"{margin:+.2g} ({KINDS[kind]})" for kind, margin in margins.items())
        margin = combine_margins(*margins.values(), require_rows(table, "seed", "bound", "time"))
        measured = f"{len(np.unique(table['seed']))} seeds: powers of ten to the bound at least {told}"
        criterion = "at least 0 at every T and seed, which is proved"
        yield judge_margin(statement, where, "bounds", margin, measured, criterion)

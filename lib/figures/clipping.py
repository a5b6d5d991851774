"""The clipped flow, A and B trained: constants that do not grow with the depth, and its limit (Prop. 3 and Thm 4)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib import activations, checks
from lib.dense import limit, spectral
from lib.dense.distances import largest_successive_distance
from lib.dense.network import NetworkConfig, Weights, hidden_states, outputs
from lib.dense.training import Record
from lib.digits import STATE_DECIMALS, round_difference
from lib.figures.claim import (
    PROVED,
    RATE_OURS,
    Claim,
    Read,
    fit_over_seeds,
    judge_rates,
    maximise_over_time,
)
from lib.figures.experiment import (
    Progress,
    compute_runs,
    draw_inputs,
    largest_norm,
    silent,
    sort_rows,
    space_evenly,
    train_beside_limit,
    vary_seed,
)
from lib.figures.results import Data
from lib.figures.style import (
    BLACK,
    COLORS,
    MARKERS,
    draw_rate_line,
    make_panels,
    set_depth_axis,
    set_plain_ticks,
    styled,
)
from lib.rates import fit_mean_slope
from lib.tables import Table, select

NORMS = ("norm_A", "norm_V", "norm_W", "norm_B")


@dataclass(frozen=True)
class Config:
    """The flow clipped at several ``clips`` C (0 stands for no clipping) at several ``depths``, and its limit.

    Networks are trained for ``iterations`` with ``learning_rate`` eta (t = eta * iterations), recorded ``recorded``
    times, and drawn with ``seeds`` consecutive seeds, starting at the network's. Suprema over x are over ``inputs`` new
    Gaussian points. For ``tolerance`` see `limit.train`. Raises ValueError if A and B are not trained, or if the
    activation is not C^2.
    """

    network: NetworkConfig
    clips: list[float]
    depths: list[int]
    iterations: int
    learning_rate: float = 0.01
    recorded: int = 11
    seeds: int = 1
    inputs: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        several = {"clips": 0, "depths": 2, "recorded": 2}
        checks.check_fields(self, "iterations", "learning_rate", "seeds", "inputs", "tolerance", **several)
        spectral.check_limit_exists(self.network)
        activations.check_smooth(self.network.activation)
        if not self.network.train_ends:
            raise ValueError("train_ends is False, expected True: Prop. 3 and Thm 4 train A and B as well.")

    @property
    def moments(self) -> list[int]:
        """The recorded iterations, with the first and the last one."""
        return space_evenly(self.iterations, self.recorded)

    @property
    def runs(self) -> list[tuple[NetworkConfig, float]]:
        """(network, C) for every seed and every clip."""
        return [(network, clip) for network in vary_seed(self.network, self.seeds) for clip in self.clips]


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``clipping.csv``: columns seed, clip, depth, iteration, time, loss, ``clipped`` (the share of the
    entries of all velocities that clipping changes), and in Frobenius and Euclidean norms

    - ``norm_A``, ``norm_V``, ``norm_W``, ``norm_B``: |A|, the largest |V_k| and |W_k|, and |B|;
    - ``lipschitz``: L max_k |Z_{k+1} - Z_k|, Z = (V, W);
    - the distances from the limit of the same flow: ``weights``, sup over s of |Z^L(s) - Z(s)|; ``distance_A`` and
      ``distance_B``, |A^L - A| and |B^L - B|; ``hidden_states``, the largest |h_k - H(k/L)| over k and new inputs;
      ``output``, the largest distance of F(x) over new inputs.
    """
    rows = [row for part in compute_runs(_measure_run, config, config.runs, progress) for row in part]
    return {"clipping": sort_rows(rows, "seed", "clip", "depth", "iteration")}


def _measure_run(config: Config, run: tuple[NetworkConfig, float]) -> list[dict]:
    network, clip = run
    arguments = config.depths, config.learning_rate, config.moments, config.tolerance, clip
    x, rows = draw_inputs(network, config.inputs), []
    for exact, *networks in train_beside_limit(network, *arguments):
        states = exact.ode.states_at_layers(x, config.depths)
        for depth, record, expected in zip(config.depths, networks, states, strict=True):
            away = _measure_distances(network.at_depth(depth), exact.ode, record.weights, x, expected)
            case = {"seed": network.seed, "clip": clip, "depth": depth, "iteration": record.iteration}
            case |= {"time": config.learning_rate * record.iteration, "loss": record.loss}
            rows.append(
                case | {"clipped": _measure_share_clipped(record, clip)} | _measure_constants(record.weights) | away
            )
    return rows


def _measure_share_clipped(record: Record, clip: float) -> float:
    if clip == 0:
        return 0.0
    above = total = 0
    for name, gradient in record.gradients().items().items():
        velocity = gradient * (record.solver.step_factor if name in "VW" else 1)
        above, total = above + int((velocity.abs() > clip).sum()), total + velocity.numel()
    return above / total


def _measure_constants(weights: Weights) -> dict[str, float]:
    norms = {
        "norm_A": float(weights.A.norm()),
        "norm_V": largest_norm(weights.V.flatten(1)),
        "norm_W": largest_norm(weights.W.flatten(1)),
        "norm_B": float(weights.B.norm()),
        "lipschitz": len(weights.V) * largest_successive_distance(weights),
    }
    return {name: round_difference(value) for name, value in norms.items()}


def _measure_distances(
    network: NetworkConfig, ode: limit.TrainedODE, weights: Weights, x: Tensor, expected: Tensor
) -> dict[str, float]:
    # The distances from the limit; ``expected`` holds H(k/L) for x: (L+1, n, q).
    states = hidden_states(network, weights, x)
    ends = {f"distance_{name}": float((getattr(weights, name) - getattr(ode.weights, name)).norm()) for name in "AB"}
    away = ends | {
        "weights": ode.uniform_distance(weights),
        "hidden_states": largest_norm(states - expected),
        "output": largest_norm(outputs(weights, states) - expected[-1] @ ode.weights.B),
    }
    return {name: round_difference(value, STATE_DECIMALS) for name, value in away.items()}


def maximise_so_far(table: Table, *columns: str) -> Table:
    """The table with each of the columns maximised over the time so far, by seed, clip and depth."""
    found = {name: np.array(column) for name, column in table.items()}
    keys = np.stack([found[name] for name in ("seed", "clip", "depth")])
    for key in np.unique(keys, axis=1).T:
        keep = (keys == key[:, None]).all(axis=0)
        for name in columns:
            found[name][keep] = np.maximum.accumulate(found[name][keep])
    return found


@styled
def draw(data: Data, config: Config) -> Figure:
    """The clipped flow, in medians over the seeds: weight norms, Lipschitz constants and distances to the limit, as
    suprema up to the last time, against depth; and Lipschitz constants against time."""
    table = maximise_so_far(data["clipping"], *NORMS, "lipschitz", "weights", "output")
    figure, ((norm, constant), (growth, limits)) = make_panels(2, 2, height=5.2)
    clips, depths = np.unique(table["clip"]), np.unique(table["depth"])
    last, deepest, time = max(table["iteration"]), depths[-1], max(table["time"])
    for clip, color, marker in zip(clips, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        end = select(table, clip=clip, iteration=last)
        label = "no clipping" if clip == 0 else f"$C={clip:g}$"
        for panel, column in ((norm, "norm_V"), (constant, "lipschitz"), (limits, "weights")):
            values = [np.median(select(end, depth=depth)[column]) for depth in depths]
            panel.plot(depths, values, marker + "-", color=color, label=label)
        path = select(table, clip=clip, depth=deepest)
        times = np.unique(path["time"][path["time"] > 0])
        growth.plot(times, [np.median(select(path, time=each)["lipschitz"]) for each in times], color=color)
    fits = [fit_mean_slope(select(table, clip=clip, iteration=last), "weights", depths[0]) for clip in clips]
    draw_rate_line(limits, depths, max(fits, key=lambda fit: fit.constant), -1.0, "slope $-1$")
    norm.set_title(rf"$\max_{{k,\,t\leq {time:g}}}\,\|V_k(t)\|_F$")
    constant.set_title(rf"$L\,\max_{{k,\,t\leq {time:g}}}\,\|Z_{{k+1}}(t)-Z_k(t)\|_F$")
    growth.set_title(rf"the same up to time $t$, $L={deepest}$")
    limits.set_title(rf"$Z$ to the limit, $\sup_{{s,\,t\leq {time:g}}}\,\|\cdot\|_F$")
    for panel in (norm, constant, limits):
        set_depth_axis(panel, depths)
    for panel in (norm, constant):
        panel.set_ylim(0)
    limits.set_yscale("log")
    growth.set(xlabel="training time $t$", xscale="log", yscale="log")
    set_plain_ticks(growth.xaxis)
    figure.legend(*limits.get_legend_handles_labels(), loc="outside lower center", ncols=len(clips) + 1)
    return figure


BOUNDED = {"norm_A": "sup over t <= T of |A|_F", "norm_V": "sup over k and t <= T of |V_k|_F",
           "norm_W": "sup over k and t <= T of |W_k|_F", "norm_B": "sup over t <= T of |B|_F",
           "lipschitz": "L times sup over k and t <= T of |Z_(k+1) - Z_k|_F"}  # fmt: skip
CONVERGING = {"weights": "sup over s and t <= T of |Z^L - Z|_F", "distance_A": "sup over t <= T of |A^L - A|_F",
              "distance_B": "sup over t <= T of |B^L - B|_F",
              "hidden_states": "sup over k, x and t <= T of |h_k - H(k/L)|",
              "output": "sup over x and t <= T of |F^L(x,t) - F(x,t)|"}  # fmt: skip


def judge_claims(read: Read) -> Iterator[Claim]:
    """Prop. 3 and Thm 4, for every C > 0."""
    table = read("clipping")
    clips = [clip for clip in np.unique(table["clip"]) if clip > 0]
    ever = [maximise_over_time(select(table, clip=clip), *BOUNDED, *CONVERGING) for clip in clips]
    what = f"largest slope in L over {len(clips)} C"
    for claimed, where, words, expected in (
        (BOUNDED, "Prop. 3", "does not grow with L", 0.0),
        (CONVERGING, "Thm 4" + RATE_OURS, "is O(1/L)", -1.0),
    ):
        for name, measure in claimed.items():
            fits = [fit_over_seeds(rows, name) for rows in ever]
            statement = f"Clipped flow, A and B trained: {measure} {words}"
            # Clipping itself bounds how far a norm moves, whatever L.
            place = where + PROVED if name in NORMS else where
            yield judge_rates(statement, place, "clipping", fits, expected, what)

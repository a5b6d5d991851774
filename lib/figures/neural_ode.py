"""Networks and the neural ODE to which they converge (Prop. 2 and Thm 4)."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib import activations, checks
from lib.dense import spectral
from lib.dense.limit import LIMIT
from lib.dense.network import NetworkConfig, Weights, hidden_states, outputs
from lib.digits import STATE_DECIMALS, round_difference
from lib.figures.claim import RATE_OURS, Claim, Read, fit_over_seeds, judge_rate, maximise_over_time, select_last
from lib.figures.experiment import (
    Progress,
    compute_runs,
    draw_inputs,
    largest_norm,
    silent,
    train_beside_limit,
    vary_seed,
)
from lib.figures.results import Data
from lib.figures.style import (
    BLACK,
    COLORS,
    GREY,
    GUIDE,
    LIGHT,
    MARKERS,
    draw_rate_line,
    draw_slopes,
    label_depth,
    leave_room_above,
    make_panels,
    set_depth_axis,
    styled,
)
from lib.rates import fit_mean_slope, fit_slope
from lib.tables import from_rows, select


@dataclass(frozen=True)
class Config:
    """Networks of several ``depths`` and the neural ODE of infinite depth, trained in the same way.

    They are compared at the iterations ``compared``. Suprema over x are over ``inputs`` standard Gaussian points that
    are not in the training set. Weights, data and inputs are drawn with ``seeds`` consecutive seeds, starting at the
    network's. For ``tolerance`` see `limit.train`. Rates are fitted over the depths from ``slope_from`` on. Raises
    ValueError if the activation is not C^2: the solver does not resolve its ODE.
    """

    network: NetworkConfig
    depths: list[int]
    compared: list[int]
    learning_rate: float = 0.01
    inputs: int = 100
    tolerance: float = 1e-5
    slope_from: int = 16
    seeds: int = 1

    def __post_init__(self) -> None:
        checks.check_fields(self, "depths", "learning_rate", "inputs", "tolerance", "seeds", compared=0)
        checks.slope_range(self.slope_from, self.depths)
        spectral.check_limit_exists(self.network)
        activations.check_smooth(self.network.activation)


def compute(config: Config, progress: Progress = silent) -> Data:
    """The errors of networks, as distances from the limit, and a few hidden states.

    The first table has columns seed, iteration, depth, and suprema of Euclidean or Frobenius norms:

    - ``weights``: |Z^L(s) - Z(s)| over s, at both ends of every layer's cell (Thm 4 is uniform in s);
    - ``distance_V``, ``distance_W``: the same for V and for W, in the integral norm of Figure 1 right;
    - ``hidden_states``: |h_k - H(k/L)| over layers and new inputs; ``output``: the error of F(x) over new inputs;
    - ``discretised``: the error of F(x) of the network whose layers are the limit's weights at k/L (Prop. 2);
    - ``scipy``: the distance of F(x) between the trained network and SciPy's solution of the ODE that interpolates its
      weights, at the last iteration (else nan). This check does not use `lib.dense.limit`.

    The second table has the first coordinate of the hidden states of five inputs after training, for the first seed,
    the limit and the second and fourth depth: columns depth, s, input, value.
    """
    found = compute_runs(_measure_seed, config, vary_seed(config.network, config.seeds), progress)
    rows, trajectories = zip(*found, strict=True)
    return {"neural_ode": from_rows(itertools.chain(*rows)), "neural_ode_states": from_rows(trajectories[0])}


def _measure_seed(config: Config, network: NetworkConfig) -> tuple[list[dict], list[dict]]:
    arguments = config.depths, config.learning_rate, config.compared, config.tolerance
    x, rows = draw_inputs(network, config.inputs), []
    for record, *records in train_beside_limit(network, *arguments):
        ode, last = record.ode, record.iteration == config.compared[-1]
        exact = ode.states_at_layers(x, config.depths)
        for depth, states, other in zip(config.depths, exact, records, strict=True):
            errors = _measure_errors(network.at_depth(depth), ode, states, other.weights, x, last)
            rows.append({"seed": network.seed, "iteration": record.iteration, "depth": depth, **errors})
    few = x[:5]
    shown = [(LIMIT, ode.hidden_states(few, torch.linspace(0, 1, 101, dtype=torch.float64)))]
    for depth, other in list(zip(config.depths, records, strict=True))[1:4:2]:
        shown.append((depth, hidden_states(network.at_depth(depth), other.weights, few)))
    return rows, [
        {"depth": depth, "s": k / (len(states) - 1), "input": number, "value": round_difference(value, STATE_DECIMALS)}
        for depth, states in shown
        for k, values in enumerate(states[:, :, 0].tolist())
        for number, value in enumerate(values)
    ]


def _measure_errors(network, ode, exact, weights, x, last) -> dict[str, float]:
    """The errors of one network; ``exact`` holds H(k/L) for x: (L+1, n, q)."""
    output = exact[-1] if ode.weights.B is None else exact[-1] @ ode.weights.B
    states = hidden_states(network, weights, x)
    sampled = ode.network(network.depth)
    discretised = outputs(sampled, hidden_states(network, sampled, x))
    distances = ode.distance_to_network(weights)
    scipy = solve_with_scipy(network, weights, x) if last else None
    errors = {
        "weights": ode.uniform_distance(weights),
        "distance_V": distances["V"],
        "distance_W": distances["W"],
        "hidden_states": largest_norm(states - exact),
        "output": largest_norm(outputs(weights, states) - output),
        "discretised": largest_norm(discretised - output),
        "scipy": largest_norm(scipy - outputs(weights, states)) if last else math.nan,
    }
    return {name: round_difference(error, STATE_DECIMALS) for name, error in errors.items()}


def solve_with_scipy(config: NetworkConfig, weights: Weights, x: Tensor, tolerance: float = 1e-7) -> Tensor:
    """F(x): (n, d') of the neural ODE whose V(s), W(s) interpolate a network's layers, by SciPy.

    V(s) and W(s) are piecewise linear through layer k at the middle of its cell, s = (k - 1/2)/L, and constant at both
    ends. The ODE is solved to ``tolerance`` by scipy.integrate.solve_ivp (DOP853), one linear piece after another. If
    a step crossed a kink, a rounding error in a state could change the accepted steps, and so the result, by more than
    the tolerance.
    """
    s = activations.get(config.activation).function
    depth, outer = len(weights.V), config.at_depth(1).outer_scale
    start = x if weights.A is None else x @ weights.A

    def right_side(position: float, flat: np.ndarray) -> np.ndarray:
        place = min(max(position * depth - 0.5, 0.0), depth - 1.0)
        below = min(int(place), max(depth - 2, 0))
        above, share = min(below + 1, depth - 1), place - below
        V, W = (torch.lerp(Z[below], Z[above], share) for Z in (weights.V, weights.W))
        h = torch.from_numpy(flat).view(start.shape)
        return (outer * s(config.inner_scale * (h @ W)) @ V).flatten().numpy()

    from scipy.integrate import solve_ivp

    state = start.flatten().numpy()
    bends = (np.arange(depth) + 0.5) / depth
    for ends in itertools.pairwise([0.0, *bends.tolist(), 1.0]):
        state = solve_ivp(right_side, ends, state, method="DOP853", rtol=tolerance, atol=tolerance).y[:, -1]
    end = torch.from_numpy(state).view(start.shape)
    return end if weights.B is None else end @ weights.B


ERRORS = {
    "hidden_states": "hidden states, sup over $x$, $k$",
    "output": "output, sup over $x$",
    "discretised": r"output, limit's weights",
    "scipy": "output, SciPy's ODE",
    "weights": "weights, sup over $s$",
}


@styled
def draw(data: Data, config: Config) -> Figure:
    """Hidden states of networks and of the limit; errors against depth, for the first seed after training; slopes
    during training, with intervals over the seeds."""
    errors, trajectories, slope_from = data["neural_ode"], data["neural_ode_states"], config.slope_from
    figure, (states, error, slope) = make_panels(3, height=3.2, width_ratios=[1, 1.1, 1])
    depths = np.unique(trajectories["depth"])
    for depth, color in zip(depths, (BLACK, GREY, LIGHT), strict=False):
        for number in np.unique(trajectories["input"]):
            rows = select(trajectories, depth=depth, input=number)
            style = {"linewidth": 1.4, "zorder": 3}
            if depth != LIMIT:
                style = {"marker": "o", "markersize": 3.5, "linewidth": 0.7}
            label = label_depth(depth) if number == 0 else None
            states.plot(rows["s"], rows["value"], color=color, label=label, **style)
    states.set(xlabel="$s=k/L$", title="first coordinate of $h_k$, a few inputs")
    leave_room_above(states, 0.3)
    states.legend(loc="upper center", ncols=3, handlelength=1, columnspacing=0.7, handletextpad=0.4)
    iterations = np.unique(errors["iteration"])
    last = select(errors, iteration=iterations[-1], seed=min(errors["seed"]))
    for (name, label), color, marker in zip(ERRORS.items(), COLORS, MARKERS, strict=False):
        style = {"markerfacecolor": "none", "linestyle": "none", "markersize": 7} if name == "hidden_states" else {}
        error.plot(last["depth"], last[name], marker=marker, color=color, label=label, **style)
    fitted = last["depth"][last["depth"] >= slope_from]
    if len(fitted) > 1:
        fit = fit_slope(last["depth"], last["hidden_states"], slope_from)
        draw_rate_line(error, fitted, fit, -1.0, "slope $-1$")
    set_depth_axis(error, last["depth"])
    error.set(yscale="log", title=f"at iteration {iterations[-1]}, first seed")
    error.set_ylabel("largest distance, $|\\cdot|_2$ or $\\|\\cdot\\|_F$")
    for place, shift in ((4, -1), (1, 1)):
        name, times, fits = list(ERRORS)[place], [], []
        for iteration in iterations:
            rows = select(errors, iteration=iteration)
            if (rows[name][rows["depth"] >= slope_from] > 1e-12).all():
                times.append(iteration + shift * 0.006 * iterations[-1])
                fits.append(fit_mean_slope(rows, name, slope_from))
        draw_slopes(slope, times, fits, color=COLORS[place], marker=MARKERS[place])
    slope.axhline(-1, linestyle="--", **GUIDE)
    low, high = slope.get_ylim()
    slope.set_ylim(min(low, -1.1), max(high, -0.9))
    slope.set(xlabel="training iteration", title=f"slopes in $L$, {config.seeds} seed{'s' if config.seeds > 1 else ''}")
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


LIMIT_PROVED, LIMIT_DRAWN = "Thm 4" + RATE_OURS, "Thm 4, Fig. 1 right" + RATE_OURS
CLAIMED = (  # column, whether the supremum is over all t, place in the paper, statement
    ("discretised", False, "Prop. 2", "A network that samples Lipschitz V(s), W(s): sup over x of |F^L(x) - F(x)|"),
    ("weights", True, LIMIT_PROVED, "Trained weights: sup over s and t <= T of |Z^L(s,t) - Z(s,t)|_F"),
    ("hidden_states", True, LIMIT_PROVED, "Trained hidden states: sup over k, x and t <= T of |h_k - H(k/L)|"),
    ("output", True, LIMIT_PROVED, "Trained outputs: sup over x and t <= T of |F^L(x,t) - F(x,t)|"),
    ("distance_V", True, LIMIT_DRAWN, "Trained V: sup over t <= T of (int |V^L - V|_F^2 ds)^(1/2)"),
    ("distance_W", True, LIMIT_DRAWN, "Trained W: sup over t <= T of (int |W^L - W|_F^2 ds)^(1/2)"),
    ("scipy", False, LIMIT_PROVED, "SciPy's ODE through the weights at the end: sup over x of |F^L(x) - F(x)|"),
)


def judge_claims(read: Read) -> Iterator[Claim]:
    errors = read("neural_ode")
    end, ever = select_last(errors), maximise_over_time(errors, *(name for name, always, *_ in CLAIMED if always))
    for name, always, where, statement in CLAIMED:
        fit = fit_over_seeds(ever if always else end, name)
        yield judge_rate(f"{statement} is O(1/L)", where, "neural_ode", fit, -1.0)

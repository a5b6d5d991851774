"""Experiments on what the paper proves: the neural ODE as the limit, long times, initialisations, clipping.

Each function trains, reduces what arises and returns tidy tables (`lib.counterexample` has Appendix D). In every
table depth 0 stands for the large-depth limit of `lib.limit`.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from lib import activations, checks, limit
from lib.digits import LIMIT_DECIMALS, STATE_DECIMALS, difference, of_square, significant, square
from lib.distances import integral_distance, successive_squares
from lib.experiments import Progress, evenly, silent
from lib.network import NetworkConfig, Weights, hidden_states, initialise, outputs
from lib.tables import from_rows
from lib.training import Record, lockstep, train

LIMIT = 0  # the depth that stands for the limit in a table


def largest_norm(rows: Tensor) -> float:
    """The largest Euclidean (Frobenius) norm among the entries rows[..., :]: a supremum over layers and inputs."""
    return float(rows.norm(dim=-1).max())


# --- The neural ODE (Prop. 2 and Thm 4) --------------------------------------------------------------------


@dataclass(frozen=True)
class NeuralODEConfig:
    """Networks of several ``depths`` beside the neural ODE of infinite depth, all trained alike.

    The states at ``compared`` (increasing iterations t) are compared; suprema over x are taken over ``inputs``
    standard Gaussian points that are not in the training set. ``tolerance``: see `limit.train`; ``slope_from``: the
    smallest depth that rates are fitted over. Raises ValueError for an activation that is not C^2, whose ODE the
    solver does not resolve.
    """

    network: NetworkConfig
    depths: list[int]
    compared: list[int]
    learning_rate: float = 0.01
    inputs: int = 100
    tolerance: float = 1e-5
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.positive_ints("depths", self.depths)
        checks.positive_ints("compared", self.compared, least=0)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("inputs", self.inputs)
        checks.positive_float("tolerance", self.tolerance)
        checks.two_sizes(self.slope_from, self.depths)
        limit.check_exists(self.network)
        activations.check_smooth(self.network.activation)

    def draw_inputs(self) -> Tensor:
        """New inputs x: (inputs, d), drawn from the seed after the network's."""
        generator = torch.Generator().manual_seed(self.network.seed + 1)
        return torch.randn(self.inputs, self.network.dimension, generator=generator, dtype=torch.float64)


def neural_ode(config: NeuralODEConfig, progress: Progress = silent) -> tuple[dict[str, list], dict[str, list]]:
    """Errors of networks beside the limit, and hidden states to look at.

    The first table has columns iteration, depth and, each a supremum of Euclidean or Frobenius norms,

    - ``weights``: |Z^L(s) - Z(s)| over s, at both ends of every layer's cell (Thm 4 is uniform in s);
    - ``distance_V``, ``distance_W``: the same in the integral norm of Figure 1 right, V and W apart;
    - ``hidden_states``: |h_k - H(k/L)| over layers and new inputs; ``output``: of F(x) over new inputs;
    - ``discretised``: of F(x) for the network that samples the limit's own weights at k/L (Prop. 2);
    - ``scipy``: of F(x) between the trained network and SciPy's solution of the ODE whose weights interpolate the
      network's (nan but for the last iteration): this knows nothing of `lib.limit`.

    The second table holds the first coordinate of five hidden states over s at the end, for the limit and the
    second and fourth depth: columns depth, s, input, value.
    """
    x = config.draw_inputs()
    reference = limit.train(
        config.network, config.learning_rate, config.compared[-1], config.compared, tolerance=config.tolerance
    )
    trainings = [
        train(config.network.at_depth(depth), config.learning_rate, config.compared[-1], config.compared)
        for depth in config.depths
    ]
    grids = [torch.arange(depth + 1, dtype=torch.float64) / depth for depth in config.depths]
    rows, shown = [], []
    steps = zip(reference, lockstep(trainings), strict=True)
    for record, records in progress(steps, len(config.compared)):
        ode, last = record.ode, record.iteration == config.compared[-1]
        exact = ode.hidden_states(x, torch.cat(grids)).split([len(grid) for grid in grids])
        for depth, states, other in zip(config.depths, exact, records, strict=True):
            errors = _errors(config.network.at_depth(depth), ode, states, other.weights, x, last)
            rows.append({"iteration": record.iteration, "depth": depth, **errors})
    few = x[:5]
    fine = torch.linspace(0, 1, 101, dtype=torch.float64)
    shown = [(LIMIT, fine, ode.hidden_states(few, fine))]
    for depth, grid, other in list(zip(config.depths, grids, records, strict=True))[1:4:2]:
        shown.append((depth, grid, hidden_states(config.network.at_depth(depth), other.weights, few)))
    trajectories = [
        {"depth": depth, "s": float(s), "input": number, "value": difference(float(value), STATE_DECIMALS)}
        for depth, grid, states in shown
        for s, values in zip(grid, states[:, :, 0], strict=True)
        for number, value in enumerate(values)
    ]
    return from_rows(rows), from_rows(trajectories)


def _errors(network, ode, exact, weights, x, last) -> dict[str, float]:
    """The errors of one network beside the limit; ``exact`` holds H(k/L) for x: (L+1, n, q)."""
    output = exact[-1] if ode.weights.B is None else exact[-1] @ ode.weights.B
    states = hidden_states(network, weights, x)
    sampled = ode.network(network.depth)
    discretised = outputs(sampled, hidden_states(network, sampled, x))
    distances = ode.distance_to_network(weights)
    scipy = scipy_output(network, weights, x) if last else None
    errors = {
        "weights": uniform_distance(ode, weights),
        "distance_V": distances["V"],
        "distance_W": distances["W"],
        "hidden_states": largest_norm(states - exact),
        "output": largest_norm(outputs(weights, states) - output),
        "discretised": largest_norm(discretised - output),
        "scipy": largest_norm(scipy - outputs(weights, states)) if last else math.nan,
    }
    return {name: difference(error, STATE_DECIMALS) for name, error in errors.items()}


def uniform_distance(ode: limit.TrainedODE, weights: Weights) -> float:
    """sup over s of |Z^L(s) - Z(s)|_F, Z = (V, W), at both ends of every layer's cell [(k-1)/L, k/L]."""
    depth = len(weights.V)
    at_ends = ode.weights_at(torch.arange(depth + 1, dtype=torch.float64) / depth)
    squares = torch.zeros(2, depth, dtype=torch.float64)
    for name in "VW":
        ends, layers = getattr(at_ends, name), getattr(weights, name)
        squares += torch.stack([(layers - end).square().sum(dim=(1, 2)) for end in (ends[:-1], ends[1:])])
    return math.sqrt(float(squares.max()))


def scipy_output(config: NetworkConfig, weights: Weights, x: Tensor, tolerance: float = 1e-7) -> Tensor:
    """F(x): (n, d') of the neural ODE whose V(s), W(s) interpolate a network's layers, by SciPy.

    Layer k stands for the middle of its cell, s = (k - 1/2)/L, with straight lines between and constants at both
    ends; solved by scipy.integrate.solve_ivp (DOP853) to ``tolerance``, from one bend of the weights to the next: over
    a bend, an ulp in a state can change which steps are accepted, and the result by more than the tolerance.
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

    state = start.flatten().numpy()
    bends = (np.arange(depth) + 0.5) / depth
    for ends in itertools.pairwise([0.0, *bends.tolist(), 1.0]):
        state = solve_ivp(right_side, ends, state, method="DOP853", rtol=tolerance, atol=tolerance).y[:, -1]
    end = torch.from_numpy(state).view(start.shape)
    return end if weights.B is None else end @ weights.B


# --- Long times (Def. 1, Prop. 5 and Thm 6) ----------------------------------------------------------------


@dataclass(frozen=True)
class PolyakLojasiewiczConfig:
    """Networks of several ``widths`` and ``seeds`` (at the network's depth), then of several ``depths`` (at its width).

    The former train for ``width_iterations``, the latter and the limit for ``iterations``, all with
    ``learning_rate``; losses and PL ratios are kept ``recorded`` times. ``tolerance``: see `limit.train`.
    """

    network: NetworkConfig
    widths: list[int]
    seeds: list[int]
    depths: list[int]
    width_iterations: int
    iterations: int
    learning_rate: float = 0.03
    recorded: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        checks.positive_ints("widths", self.widths)
        checks.positive_ints("seeds", self.seeds, least=0)
        checks.positive_ints("depths", self.depths)
        checks.positive_int("width_iterations", self.width_iterations)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("recorded", self.recorded, least=2)
        checks.positive_float("tolerance", self.tolerance)
        checks.positive_float("target_scale", self.network.target_scale)  # the ratio divides by the loss
        limit.check_exists(self.network)


def polyak_lojasiewicz_ratio(record: Record | limit.LimitRecord) -> float:
    """(|dl/dA|^2 + L sum_k |dl/dZ_k|^2 + |dl/dB|^2) / l, which Def. 1 bounds below by mu.

    For the limit the middle term is the integral over s of the squared functional gradient.
    """
    gradients = record.gradients()
    squares = {name: gradient.square().flatten(1).sum(dim=1) for name, gradient in gradients.items().items()}
    if isinstance(record, limit.LimitRecord):
        layers = record.solver.grid.quadrature @ (squares.pop("V") + squares.pop("W"))
    else:
        layers = len(gradients.V) * (squares.pop("V") + squares.pop("W")).sum()
    return float(layers + sum(square.sum() for square in squares.values())) / record.loss


def _point(record: Record | limit.LimitRecord, learning_rate: float) -> dict[str, float]:
    # The ratio divides by the loss: it has no more digits, but two of them even next to where the loss is rounding.
    ratio = significant(polyak_lojasiewicz_ratio(record), max(2, of_square(record.loss)))
    time = learning_rate * record.iteration
    return {"iteration": record.iteration, "time": time, "loss": square(record.loss), "ratio": ratio}


def by_width(config: PolyakLojasiewiczConfig, progress: Progress = silent) -> dict[str, list]:
    """PL ratios along training: columns width, seed, iteration, time, loss, ratio."""
    recorded = evenly(config.width_iterations, config.recorded)
    runs = [(width, seed) for width in config.widths for seed in config.seeds]
    rows = []
    for width, seed in progress(runs, len(runs)):
        network = dataclasses.replace(config.network, width=width, seed=seed)
        for record in train(network, config.learning_rate, config.width_iterations, recorded):
            rows.append({"width": width, "seed": seed, **_point(record, config.learning_rate)})
    return from_rows(rows)


def by_depth(config: PolyakLojasiewiczConfig, progress: Progress = silent) -> tuple[dict[str, list], ...]:
    """Three tables on the ``depths`` and the limit: training curves, the weights at the end, nearness to the limit.

    The first has columns depth, iteration, time, loss, ratio; the second depth, s, entry_V, entry_W (layer k at
    s = (k - 1/2)/L; those entries of V and of W that vary most over s in the limit); the third depth, distance_V,
    distance_W (integral norm), residual (the largest |F(x_i) - y_i|).
    """
    recorded = evenly(config.iterations, config.recorded)
    arguments = config.learning_rate, config.iterations, recorded
    trainings = [limit.train(config.network, *arguments, tolerance=config.tolerance)]
    trainings += [train(config.network.at_depth(depth), *arguments) for depth in config.depths]
    rows = []
    for records in progress(lockstep(trainings), len(recorded)):
        for depth, record in zip([LIMIT, *config.depths], records, strict=True):
            rows.append({"depth": depth, **_point(record, config.learning_rate)})
    ode = records[0].ode
    liveliest = [int(values.flatten(1).std(dim=0).argmax()) for values in (ode.weights.V, ode.weights.W)]
    weights, nearness = [], []
    _, data = initialise(config.network)
    for depth, record in zip([LIMIT, *config.depths], records, strict=True):
        if depth == LIMIT:
            s = torch.linspace(0, 1, 101, dtype=torch.float64)
            Z, distances, output = ode.weights_at(s), {"V": 0.0, "W": 0.0}, ode(data.x)
        else:
            s = (torch.arange(depth, dtype=torch.float64) + 0.5) / depth
            Z, distances = record.weights, ode.distance_to_network(record.weights)
            output = outputs(Z, hidden_states(config.network.at_depth(depth), Z, data.x))
        entries = [values.flatten(1)[:, entry].tolist() for values, entry in zip((Z.V, Z.W), liveliest, strict=True)]
        for position, V, W in zip(s.tolist(), *entries, strict=True):
            weights.append({"depth": depth, "s": position, "entry_V": difference(V), "entry_W": difference(W)})
        away = {f"distance_{name}": difference(distance, LIMIT_DECIMALS) for name, distance in distances.items()}
        nearness.append({"depth": depth, **away, "residual": difference(largest_norm(output - data.y))})
    return (
        from_rows(sorted(rows, key=lambda row: (row["depth"], row["iteration"]))),
        from_rows(weights),
        from_rows(nearness),
    )


# --- Initialisations (section 4.3) -------------------------------------------------------------------------


@dataclass(frozen=True)
class InitialisationConfig:
    """Initialisations compared at several ``depths``, before and after ``iterations`` of training.

    ``length_scales``: those of the Gaussian processes. ``initial_V``: whether i.i.d. layers and Gaussian processes
    draw V as well; the weight-tied case is the paper's, V = 0. ``network`` gives everything else.
    """

    network: NetworkConfig
    depths: list[int]
    length_scales: list[float]
    iterations: int
    initial_V: str = "drawn"
    learning_rate: float = 0.1
    tolerance: float = 1e-5
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_floats("length_scales", self.length_scales)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_float("tolerance", self.tolerance)
        checks.two_sizes(self.slope_from, self.depths)
        self.cases  # noqa: B018 (the configurations check themselves)

    @property
    def cases(self) -> dict[str, NetworkConfig]:
        """The initialisations by name."""

        def case(initialisation: str, **changes) -> NetworkConfig:
            return dataclasses.replace(self.network, initialisation=initialisation, **changes)

        drawn = {"initial_V": self.initial_V}
        processes = {
            f"Gaussian process {scale:g}": case("gaussian-process", length_scale=scale, **drawn)
            for scale in self.length_scales
        }
        return {
            "weight-tied": case("weight-tied", initial_V="zero"),
            **processes,
            "iid": case("iid", **drawn),
            "iid 1/sqrt(L)": case("iid", residual_scaling="1/sqrt(L)", initial_V="drawn"),
        }


def initialisations(
    config: InitialisationConfig, progress: Progress = silent
) -> tuple[dict[str, list], dict[str, list]]:
    """Two tables: how layers and hidden states behave as the depth grows, and one entry of W across the layers.

    The first has columns case, iteration (0 and the last), depth, loss,

    - ``successive``: max over k of |Z_{k+1} - Z_k|_F;
    - ``distance``: of Z^L from the limit Z in the integral norm, or, where there is no limit (i.i.d.), from the
      deepest network (nan for itself);
    - ``variation``: sum over k of |h_{k+1} - h_k|^2, averaged over the training inputs: the quadratic variation,
      of order 1/L for an ordinary differential equation and of order 1 for a stochastic one.

    The second has columns case, iteration, s = k/L, entry for the deepest network.
    """
    rows, entries = [], []
    moments = [0, config.iterations]
    for case, network in progress(config.cases.items(), len(config.cases)):
        smooth = network.initialisation != "iid"
        _, data = initialise(network)
        trainings = [
            train(network.at_depth(L), config.learning_rate, config.iterations, moments) for L in config.depths
        ]
        if smooth:
            reference = limit.train(
                network, config.learning_rate, config.iterations, moments, tolerance=config.tolerance
            )
            trainings.append(reference)
        for records in lockstep(trainings):
            networks = records[:-1] if smooth else records
            deepest = networks[-1].weights
            iteration = networks[-1].iteration
            for depth, record in zip(config.depths, networks, strict=True):
                weights = record.weights
                if smooth:
                    parts = records[-1].ode.distance_to_network(weights).values()
                elif depth < config.depths[-1]:
                    parts = (integral_distance(weights.V, deepest.V), integral_distance(weights.W, deepest.W))
                else:
                    parts = (math.nan,)
                squares = sum(successive_squares(weights))
                states = hidden_states(network.at_depth(depth), weights, data.x)
                variation = states.diff(dim=0).square().sum() / config.network.samples
                rows.append(
                    {
                        "case": case,
                        "iteration": iteration,
                        "depth": depth,
                        "loss": record.loss,
                        "successive": difference(math.sqrt(float(squares.max()))),
                        "distance": difference(math.hypot(*parts)),
                        "variation": difference(float(variation)),
                    }
                )
            for k, entry in enumerate(deepest.W[:, 0, 0].tolist(), start=1):
                entries.append({"case": case, "iteration": iteration, "s": k / len(deepest.W), "entry": entry})
    return from_rows(rows), from_rows(entries)


# --- The clipped flow (Prop. 3) ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ClippingConfig:
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
        checks.positive_floats("clips", self.clips, zero_allowed=True)
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("recorded", self.recorded, least=2)


def clipped_flow(config: ClippingConfig, progress: Progress = silent) -> dict[str, list]:
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
    return from_rows(sorted(rows, key=lambda row: (row["clip"], row["depth"], row["iteration"])))

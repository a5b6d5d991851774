"""The large-depth limit: gradient descent on the functions V(s), W(s), with a spectral method in s in [0, 1].

As L grows, layer k of the network of `lib.dense.network` becomes the point s = k/L, and with row vectors

    dH/ds = c s(inner * H W) V,                  H(0) = X A,               c = L * outer = 1 or 1/sqrt(m)
    dP/ds = -c inner * U W^T,                    P(1) = dl/dF B^T,         U = (P V^T) * s'(inner * H W)
    dV/dt = -c s(inner * H W)^T P,               dW/dt = -c inner * H^T U,      pointwise in s

This is the limit of Theorem 4; the factor L of the step cancels the 1/L of the chain rule. All functions of s are
smooth, so a few dozen Chebyshev-Gauss-Lobatto nodes replace thousands of layers. The integral equations of H and P are
solved by Picard iteration with the spectral integration matrix, all nodes in one batched product. The iteration starts
from an extrapolation of the last training steps. Everything is in float64.
"""

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import checks
from lib.checks import Divergence
from lib.dense import conventions
from lib.dense.network import Data, NetworkConfig, Weights, initialise, prepare_start
from lib.dense.spectral import (
    FIRST_NODES,
    Grid,
    SpectralSolver,
    cell_matrices,
    check_limit_exists,
    get_grid,
    solve_states,
)
from lib.dense.training import check_schedule

MAX_NODES = 256
CHECK_EVERY = 10  # training steps between two checks of the error

LIMIT = 0  # the depth that stands for the limit in a table


class ToleranceMissed(UserWarning):
    """The limit is less accurate than the tolerance, even with the largest number of nodes."""


@dataclass
class TrainedODE:
    """A neural ODE dH/ds = c s(inner * H W(s)) V(s), F(X) = H(1) B: the limit at one moment of training.

    ``weights`` holds V: (N, m, q) and W: (N, q, m) at the nodes of ``grid``, and A and B. They determine polynomials of
    degree N-1, whose values at every other s are exact.
    """

    config: NetworkConfig
    grid: Grid
    weights: Weights

    def weights_at(self, s: Tensor) -> Weights:
        """V(s): (k, m, q) and W(s): (k, q, m) at the points s: (k,) in [0, 1], with A and B."""
        matrix = self.grid.interpolation(s)
        V, W = (torch.tensordot(matrix, values, dims=1) for values in (self.weights.V, self.weights.W))
        return Weights(V, W, self.weights.A, self.weights.B)

    def network(self, depth: int) -> Weights:
        """The weights of the network of ``depth`` layers that discretises these functions, Z_k = Z(k/L)."""
        return self.weights_at(torch.arange(1, depth + 1, dtype=torch.float64) / depth)

    def hidden_states(self, x: Tensor, s: Tensor | None = None, tolerance: float = 1e-10) -> Tensor:
        """H(s) for inputs x: (n, d), at the points s: (k,) (default: the nodes) -> (k, n, q).

        The number of nodes is doubled until H(1) changes by less than ``tolerance`` (relative). Raises `Divergence` if
        this needs too many nodes.
        """
        x = x.to(self.grid.s)
        start = x if self.weights.A is None else x @ self.weights.A
        device, nodes = str(self.grid.s.device), len(self.grid)
        last = None
        while nodes <= 8 * MAX_NODES:
            grid = get_grid(nodes, device)
            H, _ = solve_states(self.config, grid, self.weights_at(grid.s), start, deque(), 0.01 * tolerance)
            if last is not None and float((H[-1] - last).abs().max()) <= tolerance * float(H[-1].abs().max()):
                return torch.tensordot(grid.interpolation(self.grid.s if s is None else s), H, dims=1)
            last, nodes = H[-1], 2 * nodes
        raise Divergence(
            f"The neural ODE is not resolved to {tolerance:g} by {nodes // 2} nodes: set a larger tolerance."
        )

    def states_at_layers(self, x: Tensor, depths: Iterable[int]) -> tuple[Tensor, ...]:
        """H(k/L), k = 0..L, for inputs x: (n, d) and each of ``depths`` L: (L+1, n, q)."""
        points = [torch.arange(depth + 1, dtype=torch.float64) / depth for depth in depths]
        return self.hidden_states(x, torch.cat(points)).split([len(s) for s in points])

    def __call__(self, x: Tensor, tolerance: float = 1e-10) -> Tensor:
        """The output F(X): (n, d') for inputs x: (n, d)."""
        H = self.hidden_states(x, torch.ones(1), tolerance)[0]
        return H if self.weights.B is None else H @ self.weights.B

    def distance_to_network(self, weights: Weights, rule: str = "integral") -> dict[str, float]:
        """Distances of a network's V and W, layer k constant on its cell [(k-1)/L, k/L), from V(s), W(s).

        The ``rule`` "integral" is ( int_0^1 |V^L(s) - V(s)|_F^2 ds )^(1/2). It is computed from the distances of the
        cells' means and the variation of V(s) within the cells, which is exact and has no cancellation. The ``rule``
        "left" compares at the left end of each cell, as the released code does.
        """
        checks.choice("sampling", rule, conventions.SAMPLING_RULES)
        depth, device = len(weights.V), str(self.grid.s.device)
        if rule == "integral":
            at_cells, deviations = cell_matrices(len(self.grid), depth, device)
        else:
            at_cells, deviations = self.grid.interpolation(torch.arange(depth, dtype=torch.float64) / depth), None
        distances = {}
        for name in ("V", "W"):
            values = getattr(self.weights, name).flatten(1)
            layers = getattr(weights, name).flatten(1).to(values)
            square = float((layers - at_cells @ values).square().sum()) / depth
            if deviations is not None:
                square += float((deviations @ values).square().sum())
            distances[name] = math.sqrt(square)
        return distances

    def uniform_distance(self, weights: Weights) -> float:
        """sup over s of |Z^L(s) - Z(s)|_F, Z = (V, W), for a network's weights, layer k constant on its cell
        [(k-1)/L, k/L]. The supremum is taken over both ends of every cell."""
        depth = len(weights.V)
        at_ends = self.weights_at(torch.arange(depth + 1, dtype=torch.float64) / depth)
        squares = torch.zeros(2, depth, dtype=torch.float64, device=weights.V.device)
        for name in "VW":
            ends, layers = getattr(at_ends, name), getattr(weights, name)
            squares += torch.stack([(layers - end).square().sum(dim=(1, 2)) for end in (ends[:-1], ends[1:])])
        return math.sqrt(float(squares.max()))

    def steepness(self) -> float:
        """max over the nodes of |dZ/ds|_F, Z = (V, W): the limit of L max_k |Z_{k+1} - Z_k|_F."""
        slopes = [self.grid.derivative @ Z.flatten(1) for Z in (self.weights.V, self.weights.W)]
        return math.sqrt(float(sum(slope.square().sum(dim=1) for slope in slopes).max()))


@dataclass
class LimitRecord:
    """The limit at ``iteration`` t, before step t.

    ``error`` is an estimate from above of the error of ``ode``'s weights: the largest distance of V and W (integral
    norm) and of A and B (Frobenius norm) between this solution and one with two thirds of its nodes.
    """

    iteration: int
    loss: float
    ode: TrainedODE
    error: float
    solver: SpectralSolver

    @property
    def nodes(self) -> int:
        """The number of nodes in s."""
        return len(self.ode.grid)

    def gradients(self) -> Weights:
        """The functional gradients at these weights. Call it before the generator's next step."""
        return self.solver.gradients()


def train(
    config: NetworkConfig,
    learning_rate: float,
    iterations: int,
    record_at: Iterable[int] | None = None,
    *,
    tolerance: float = 1e-6,
    clip: float = 0.0,
    max_nodes: int = MAX_NODES,
    data: Data | None = None,
) -> Iterator[LimitRecord]:
    """Train the limit by gradient descent: `lib.dense.training.train` for infinite depth.

    Main arguments: those of `lib.dense.training.train`; the depth of ``config`` is not used. ``tolerance`` is the
    largest error of V(s) and W(s), in the norm of the distances to the limit.

    Other arguments: ``clip`` C > 0 gives the clipped flow. ``max_nodes`` is the largest number of nodes. ``data`` holds
    inputs and targets in place of those that `lib.dense.network.initialise` draws.

    Yields a `LimitRecord` for each of these iterations. Two solutions, one with 3/2 of the other's nodes, train side by
    side. If they differ by more than ``tolerance``, the finer one becomes the coarser one, and a new finer one is
    trained from the start. If ``max_nodes`` do not suffice, warns once with `ToleranceMissed`, and `LimitRecord.error`
    holds the error. Raises ValueError if the configuration has no such limit, `Divergence` if the states are not
    finite, ValueError or TypeError for wrong arguments."""
    check_limit_exists(config)
    wanted = check_schedule(learning_rate, iterations, record_at, clip)
    checks.positive_float("tolerance", tolerance)
    checks.positive_int("max_nodes", max_nodes, least=FIRST_NODES)
    if data is not None:
        data = _prepare_data(config, data)
    # The error that Picard sweeps leave in one step enters the weights times the learning rate. With ten times this
    # tolerance (one sweep less in each step), extrapolation amplifies rounding faster than the sweeps damp it: after
    # 400 steps of Figure 1 right, weights that start an ulp apart are then 1e-10 apart, instead of 3e-15.
    picard = min(1e-7, max(1e-13, 1e-4 * tolerance))

    def new_solver(nodes: int) -> SpectralSolver:
        return SpectralSolver(config, nodes, str(config.torch_device), picard, data)

    return _records(new_solver, checks.plain(learning_rate), wanted, tolerance, checks.plain(clip), max_nodes)


def _prepare_data(config: NetworkConfig, data: Data) -> Data:
    """The data in float64, on the device of ``config``. Raises TypeError or ValueError as `prepare_start` does."""
    if not isinstance(data, Data):
        raise TypeError(f"data is {type(data).__name__}, expected Data as in data=Data(x, y).")
    network = dataclasses.replace(config, depth=1, dtype="float64")
    weights, _ = initialise(network)
    return prepare_start(network, weights, data)[1]


def _records(new_solver, learning_rate, wanted, tolerance, clip, max_nodes) -> Iterator[LimitRecord]:
    coarse, fine = new_solver(FIRST_NODES * 2 // 3), new_solver(FIRST_NODES)
    done, warned, error = 0, False, math.nan
    fresh = False  # whether the states of the finer solution's last `forward` are those of its weights
    for iteration in wanted:
        while done < iteration or math.isnan(error):
            # The error is checked every few steps, so that a refinement does not repeat many.
            count = min(CHECK_EVERY, iteration - done)
            coarse.run(learning_rate, count, clip)
            if fresh and count:
                fine.descend(learning_rate, clip)
                fine.run(learning_rate, count - 1, clip)
                fresh = False
            else:
                fine.run(learning_rate, count, clip)
            done += count
            while (error := _difference(coarse, fine)) > tolerance and len(fine.grid) < max_nodes:
                coarse, fine = fine, new_solver(min(max_nodes, len(fine.grid) * 3 // 2))
                fine.run(learning_rate, done, clip)
                fresh = False
        if error > tolerance and not warned:
            warned = True
            warnings.warn(
                f"The limit at iteration {iteration} is accurate to {error:.1e} with {len(fine.grid)} nodes, "
                f"expected {tolerance:.1e}: functions of s that are not smooth (a kink of the activation or of "
                "the clipping, a short length scale) need more nodes than max_nodes allows.",
                ToleranceMissed,
                stacklevel=2,
            )
        ode = TrainedODE(fine.config, fine.grid, fine.weights)
        loss, fresh = float(fine.forward()), True
        yield LimitRecord(iteration, loss, ode, error, fine)


def _difference(coarse: SpectralSolver, fine: SpectralSolver) -> float:
    """The largest distance between two solutions' V, W, A and B."""
    matrix = coarse.grid.interpolation(fine.grid.s)
    distances = []
    for name, values in fine.weights.items().items():
        other = getattr(coarse.weights, name)
        if name in ("V", "W"):
            distances.append(fine.grid.norm(values - torch.tensordot(matrix, other, dims=1)))
        else:
            distances.append(float((values - other).norm()))
    return max(distances)

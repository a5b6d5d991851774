"""The large-depth limit: gradient descent on the functions V(s), W(s) themselves, spectral in s in [0, 1].

As L grows, layer k of the network of `lib.dense.network` becomes the point s = k/L, and with row vectors

    dH/ds = c s(inner * H W) V,                  H(0) = X A,               c = L * outer = 1 or 1/sqrt(m)
    dP/ds = -c inner * U W^T,                    P(1) = dl/dF B^T,         U = (P V^T) * s'(inner * H W)
    dV/dt = -c s(inner * H W)^T P,               dW/dt = -c inner * H^T U,      pointwise in s

(Theorem 4's limit; the factor L of the step cancels the 1/L of the chain rule). All functions of s are
smooth, so a few dozen Chebyshev-Gauss-Lobatto nodes replace thousands of layers: H and P solve their integral
equations by Picard iteration with the spectral integration matrix, all nodes in one batched product,
warm-started by extrapolation from the last training steps. Float64 throughout.
"""

import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from lib import activations, checks
from lib.dense import conventions
from lib.dense.network import Data, NetworkConfig, Weights, check_functions, initial_functions
from lib.dense.solver import take_steps
from lib.dense.training import Divergence, checked_schedule

FIRST_NODES = 16
MAX_NODES = 256
MAX_SWEEPS = 200
CHECK_EVERY = 10  # training steps between two looks at the tolerance
# The guess for the next training step: the polynomial of degree 4 through the solutions of the last five.
EXTRAPOLATION = (1, -5, 10, -10, 5)
POINTS_AT_ONCE = 1024  # points of the cells whose interpolants are in memory at a time

LIMIT = 0  # the depth that stands for the limit in a table


class ToleranceMissed(UserWarning):
    """The limit is less accurate than asked for, even with the largest number of nodes."""


class Grid:
    """N Chebyshev-Gauss-Lobatto nodes on [0, 1], s_j = (1 - cos(pi j / (N-1))) / 2, both ends among them.

    ``from_zero`` and ``to_one``: (N, N) matrices that take values at the nodes to the integrals of their
    interpolant from 0 to s_i and from s_i to 1; ``quadrature``: (N,), the integral over [0, 1] (the weights
    are positive); ``derivative``: (N, N), d/ds of the interpolant at the nodes.
    """

    def __init__(self, nodes: int, device: str | torch.device = "cpu") -> None:
        checks.positive_int("nodes", nodes, least=2)
        x = -np.cos(np.pi * np.arange(nodes) / (nodes - 1))
        coefficients = np.linalg.inv(chebyshev.chebvander(x, nodes - 1))  # node values -> coefficients

        def matrix(operation: Callable[[np.ndarray], np.ndarray]) -> Tensor:
            return torch.as_tensor(chebyshev.chebval(x, operation(coefficients)).T, device=device)

        # On [-1, 1] an integral is twice, a derivative half of what it is on [0, 1].
        self.s = torch.as_tensor((x + 1) / 2, device=device)
        self.from_zero = matrix(lambda c: chebyshev.chebint(c, lbnd=-1) / 2).contiguous()
        self.derivative = matrix(lambda c: chebyshev.chebder(c) * 2).contiguous()
        self.quadrature = self.from_zero[-1]
        self.to_one = self.quadrature - self.from_zero
        # Weights of the barycentric formula at these nodes: alternating, halved at the ends.
        self._barycentric = torch.ones_like(self.s)
        self._barycentric[1::2] = -1
        self._barycentric[[0, -1]] *= 0.5

    def __len__(self) -> int:
        return len(self.s)

    def interpolation(self, s: Tensor) -> Tensor:
        """The matrix (k, N) that takes values at the nodes to their interpolant at s: (k,)."""
        difference = s.to(self.s)[:, None] - self.s
        at_node = difference == 0
        terms = self._barycentric / torch.where(at_node, 1.0, difference)
        terms = torch.where(at_node.any(dim=1, keepdim=True), at_node.to(terms), terms)
        return terms / terms.sum(dim=1, keepdim=True)

    def norm(self, f: Tensor) -> float:
        """( int_0^1 |f(s)|_F^2 ds )^(1/2) by quadrature, from f at the nodes: (N, ...)."""
        return math.sqrt(float(self.quadrature @ f.flatten(1).square().sum(dim=1)))


@functools.lru_cache(maxsize=64)
def grid_of(nodes: int, device: str = "cpu") -> Grid:
    """The grid of that many nodes, made once."""
    return Grid(nodes, device)


@functools.lru_cache(maxsize=256)
def _cells(nodes: int, depth: int, device: str) -> tuple[Tensor, Tensor]:
    """Cell means (L, N) and within-cell deviations (N, N) of interpolants over the cells [(k-1)/L, k/L).

    For node values F the means are ``means @ F``, and |deviations @ F|^2 is the integral over [0, 1] of
    |f(s) - mean over its cell|^2: a sum of squares, so that nothing cancels. N Gauss points a cell make both exact
    (the square has degree 2N-2); a QR factorisation condenses the points of all cells to N rows.
    """
    grid = grid_of(nodes)
    x, weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(nodes))
    x, weight = (x + 1) / 2, weight / 2
    means, deviations = [], torch.empty(0, nodes, dtype=torch.float64)
    for cells in torch.arange(depth, dtype=torch.float64).split(max(1, POINTS_AT_ONCE // len(x))):
        points = (cells[:, None] + x) / depth
        values = grid.interpolation(points.flatten()).reshape(len(cells), len(x), nodes)
        mean = torch.einsum("g,kgj->kj", weight, values)
        scaled = (values - mean[:, None]) * (weight / depth).sqrt()[:, None]
        deviations = torch.linalg.qr(torch.cat([deviations, scaled.flatten(0, 1)])).R
        means.append(mean)
    return torch.cat(means).to(device), deviations.to(device)


class SpectralSolver:
    """Gradient descent on V(s), W(s), A, B with a fixed number of ``nodes``; `train` chooses and checks it.

    ``weights`` holds V: (N, m, q) and W: (N, q, m) at the nodes. ``picard_tolerance`` is the largest change
    of the last Picard sweep, relative to the largest entry. ``data`` is other than the config draws. A
    `lib.dense.solver.Solver` whose layers are the nodes.
    """

    name = "spectral limit"

    def __init__(
        self,
        config: NetworkConfig,
        nodes: int,
        device: str = "cpu",
        picard_tolerance: float = 1e-12,
        data: Data | None = None,
    ) -> None:
        check_exists(config)
        self.config, self.grid, self.picard_tolerance = config, grid_of(nodes, device), picard_tolerance
        weights_at, drawn = initial_functions(config)
        self.weights = weights_at(self.grid.s.cpu()).to(device, torch.float64)
        self.data: Data = (data or drawn).to(device, torch.float64)
        self.step_factor, self.layer_weights = 1.0, self.grid.quadrature
        self._past_H, self._past_P = (deque(maxlen=len(EXTRAPOLATION)) for _ in range(2))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The loss at the present weights, a tensor without axes; leaves H and G = inner * H W at the nodes behind."""
        weights, data = self.weights, self.data
        start = data.x if weights.A is None else data.x @ weights.A
        self.H, self.G = _states(self.config, self.grid, weights, start, self._past_H, self.picard_tolerance)
        self.P = None
        output = self.H[-1] if weights.B is None else self.H[-1] @ weights.B
        self.residual = output - data.y
        return self.residual.square().sum() * self.config.loss_scale

    @torch.no_grad()
    def gradients(self) -> Weights:
        """Functional gradients at the states of the last `forward`: dV/dt = -V of the result, and so on (times m in
        mean-field scaling).

        Beside a network's gradients this is L dl/dV_k at s = k/L; dl/dA and dl/dB are as there.
        """
        config, weights = self.config, self.weights
        slope = activations.get(config.activation).derivative(self.G)
        above = self.residual * (2 * config.loss_scale)
        top = above if weights.B is None else above @ weights.B.mT
        scale = _outer(config) * config.inner_scale
        Vt, Wt = weights.V.mT, weights.W.mT

        def right_side(P: Tensor) -> Tensor:
            return scale * torch.bmm(torch.bmm(P, Vt) * slope, Wt)

        if self.P is None:  # solved once for the states of a `forward`: the extrapolation wants one solution a step
            self.P = _picard(right_side, top, self.grid.to_one, self._past_P, self.picard_tolerance, len(self.grid))
        P = self.P
        U = torch.bmm(P, Vt) * slope
        activated = activations.get(config.activation).function(self.G)
        gradient = Weights(torch.bmm(activated.mT, P).mul_(_outer(config)), torch.bmm(self.H.mT, U).mul_(scale))
        if config.train_ends:
            gradient.A, gradient.B = self.data.x.mT @ P[0], self.H[-1].mT @ above
        return gradient

    def descend(self, learning_rate: float, clip: float = 0.0) -> None:
        """One step of ``learning_rate`` from the states of the last `forward`, in place.

        With ``clip`` C > 0 every velocity is clipped to [-C, C] first, entry by entry.
        """
        factor = self.config.at_depth(1).step_factor  # the network's, without its L
        for name, velocity in self.gradients().items().items():
            if name in ("V", "W"):
                velocity.mul_(factor)
            if clip > 0:
                velocity.clamp_(-clip, clip)
            getattr(self.weights, name).sub_(velocity, alpha=learning_rate)

    def run(self, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
        """See `lib.dense.solver.Solver.run`."""
        return take_steps(self, learning_rate, count, clip)


def _outer(config: NetworkConfig) -> float:
    """The factor c of the limit's right side: the network's, without its 1/L."""
    return config.at_depth(1).outer_scale


def check_exists(config: NetworkConfig) -> None:
    """Raise ValueError for a configuration without such a limit: i.i.d. layers, the scaling 1/sqrt(L)."""
    check_functions(config)
    if config.residual_scaling != "1/L":
        raise ValueError(
            f"residual_scaling is {config.residual_scaling!r}, whose limit is no ordinary differential "
            "equation: expected '1/L'."
        )


def _states(config, grid, weights, start, past, tolerance) -> tuple[Tensor, Tensor]:
    """H and G = inner * H W at the nodes, by Picard iteration."""
    s, inner, outer = activations.get(config.activation).function, config.inner_scale, _outer(config)
    G = None

    def right_side(H: Tensor) -> Tensor:
        nonlocal G
        G = torch.bmm(H, weights.W).mul_(inner)
        return torch.bmm(s(G), weights.V).mul_(outer)

    H = _picard(right_side, start, grid.from_zero, past, tolerance, len(grid))
    return H, G


def _picard(right_side, start, integration, past, tolerance, nodes) -> Tensor:
    """Solve f = start + integral of right_side(f) at all nodes: (N, n, q). ``past``: earlier solutions."""
    if len(past) == len(EXTRAPOLATION):
        f = sum(factor * solution for factor, solution in zip(EXTRAPOLATION, past, strict=True))
    else:
        f = past[-1] if past else start.expand(nodes, *start.shape)
    for sweep in range(1, MAX_SWEEPS + 1):  # noqa: B007 (the sentence below counts them)
        new = start + (integration @ right_side(f).flatten(1)).view(f.shape)
        change, size = float((new - f).abs().max()), float(new.abs().max())
        f = new
        if not math.isfinite(change):
            break
        if change <= tolerance * size:
            past.append(f)
            return f
    raise Divergence(
        f"The hidden states of the limit do not settle: the last of {sweep} Picard sweeps over {nodes} nodes "
        f"changed them by {change:.1e}; a smaller learning rate, or smaller initial weights, is the usual cure."
    )


@dataclass
class TrainedODE:
    """A neural ODE dH/ds = c s(inner * H W(s)) V(s), F(X) = H(1) B: the limit at one moment of training.

    ``weights`` holds V: (N, m, q) and W: (N, q, m) at the nodes of ``grid`` (and A, B); everything else is
    interpolated from them, which is exact for the polynomials of degree N-1 that they stand for.
    """

    config: NetworkConfig
    grid: Grid
    weights: Weights

    def weights_at(self, s: Tensor) -> Weights:
        """V(s): (k, m, q) and W(s): (k, q, m) at the points s: (k,) in [0, 1]; A and B as they are."""
        matrix = self.grid.interpolation(s)
        V, W = (torch.tensordot(matrix, values, dims=1) for values in (self.weights.V, self.weights.W))
        return Weights(V, W, self.weights.A, self.weights.B)

    def network(self, depth: int) -> Weights:
        """The weights of the network of ``depth`` layers that discretises these functions, Z_k = Z(k/L)."""
        return self.weights_at(torch.arange(1, depth + 1, dtype=torch.float64) / depth)

    def hidden_states(self, x: Tensor, s: Tensor | None = None, tolerance: float = 1e-10) -> Tensor:
        """H(s) for inputs x: (n, d), at the points s: (k,) (default: the nodes) -> (k, n, q).

        Solved on more and more nodes until H(1) changes by less than ``tolerance`` (relative); raises
        `Divergence` where that does not happen.
        """
        x = x.to(self.grid.s)
        start = x if self.weights.A is None else x @ self.weights.A
        device, nodes = str(self.grid.s.device), len(self.grid)
        last = None
        while nodes <= 8 * MAX_NODES:
            grid = grid_of(nodes, device)
            H, _ = _states(self.config, grid, self.weights_at(grid.s), start, deque(), 0.01 * tolerance)
            if last is not None and float((H[-1] - last).abs().max()) <= tolerance * float(H[-1].abs().max()):
                return torch.tensordot(grid.interpolation(self.grid.s if s is None else s), H, dims=1)
            last, nodes = H[-1], 2 * nodes
        raise Divergence(
            f"The neural ODE is not resolved to {tolerance:g} by {nodes // 2} nodes: ask for a larger tolerance."
        )

    def __call__(self, x: Tensor, tolerance: float = 1e-10) -> Tensor:
        """The output F(X): (n, d') for inputs x: (n, d)."""
        H = self.hidden_states(x, torch.ones(1), tolerance)[0]
        return H if self.weights.B is None else H @ self.weights.B

    def distance_to_network(self, weights: Weights, rule: str = "integral") -> dict[str, float]:
        """Distances of a network's V and W, layer k constant on its cell [(k-1)/L, k/L), from V(s), W(s).

        ``rule`` "integral": ( int_0^1 |V^L(s) - V(s)|_F^2 ds )^(1/2), computed as distances of the cells'
        means plus the variation of V(s) within the cells, which is exact and cancels nothing. ``rule`` "left"
        compares at the left end of each cell, as the released code does.
        """
        checks.choice("sampling", rule, conventions.SAMPLING_RULES)
        depth, device = len(weights.V), str(self.grid.s.device)
        if rule == "integral":
            at_cells, deviations = _cells(len(self.grid), depth, device)
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

    def steepness(self) -> float:
        """max over the nodes of |dZ/ds|_F, Z = (V, W): the limit of L max_k |Z_{k+1} - Z_k|_F."""
        slopes = [self.grid.derivative @ Z.flatten(1) for Z in (self.weights.V, self.weights.W)]
        return math.sqrt(float(sum(slope.square().sum(dim=1) for slope in slopes).max()))


@dataclass
class LimitRecord:
    """The limit at ``iteration`` t, before step t.

    ``error`` estimates the accuracy of ``ode``'s weights from above: the largest of the distances of V and W
    (integral norm) and of A and B (Frobenius norm) between this solution and one with two thirds of its nodes.
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
        """The functional gradients at these weights (valid until the generator moves on)."""
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
    """Gradient descent on the limit itself: `lib.dense.training.train` for infinite depth.

    Main arguments: as there; of ``config`` the depth is not used. ``tolerance`` is the error asked for in
    V(s) and W(s), in the norm that distances to the limit are measured in.

    Other arguments: ``clip`` C, the clipped flow where above 0; ``max_nodes``, where refinement ends; ``data``, inputs
    and targets other than `lib.dense.network.initialise` draws.

    Yields a `LimitRecord` for each asked iteration. Two solutions, one with 3/2 of the other's nodes, train
    side by side; where they part by more than ``tolerance`` the finer one is kept as the coarser and a new one
    takes its place from the start. Warns with `ToleranceMissed`, once, where ``max_nodes`` do not suffice
    (then `LimitRecord.error` says what was reached). Raises ValueError for a configuration without such a
    limit, `Divergence` where the states stop being finite.
    """
    check_exists(config)
    wanted = checked_schedule(learning_rate, iterations, record_at, clip)
    checks.positive_float("tolerance", tolerance)
    checks.positive_int("max_nodes", max_nodes, least=FIRST_NODES)
    # The error that Picard sweeps leave in one step enters the weights times the learning rate. With ten times as
    # much, a sweep less a step, extrapolation amplified rounding faster than the sweeps damped it: after 400 steps of
    # Figure 1 right weights that started an ulp apart were 1e-10 apart, and are 3e-15 apart now.
    picard = min(1e-7, max(1e-13, 1e-4 * tolerance))

    def new_solver(nodes: int) -> SpectralSolver:
        return SpectralSolver(config, nodes, str(config.torch_device), picard, data)

    return _records(new_solver, checks.plain(learning_rate), wanted, tolerance, checks.plain(clip), max_nodes)


def _records(new_solver, learning_rate, wanted, tolerance, clip, max_nodes) -> Iterator[LimitRecord]:
    coarse, fine = new_solver(FIRST_NODES * 2 // 3), new_solver(FIRST_NODES)
    done, warned, error = 0, False, math.nan
    fresh = False  # whether the states of the finer solution's last `forward` are those of its weights
    for iteration in wanted:
        while done < iteration or math.isnan(error):
            # Looking every few steps keeps what a refinement has to repeat short.
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

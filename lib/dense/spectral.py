"""The equations of the large-depth limit on Chebyshev nodes in s, solved by Picard iteration (`lib.dense.limit`)."""

import functools
import math
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from lib import activations, checks
from lib.checks import Divergence
from lib.dense.network import Data, NetworkConfig, Weights, check_functions, initial_functions
from lib.dense.solver import take_steps

FIRST_NODES = 16
MAX_SWEEPS = 200
# Coefficients of the guess for the next training step: the polynomial of degree 4 through the last five solutions.
EXTRAPOLATION = (1, -5, 10, -10, 5)
POINTS_AT_ONCE = 1024  # points whose interpolation matrices are in memory at a time


class Grid:
    """N Chebyshev-Gauss-Lobatto nodes on [0, 1], s_j = (1 - cos(pi j / (N-1))) / 2, both ends among them.

    The matrices ``from_zero`` and ``to_one`` (N, N) map values at the nodes to the integrals of their interpolant from
    0 to s_i and from s_i to 1. ``quadrature`` (N,) gives the integral over [0, 1]; its weights are positive.
    ``derivative`` (N, N) gives d/ds of the interpolant at the nodes."""

    def __init__(self, nodes: int, device: str | torch.device = "cpu") -> None:
        checks.positive_int("nodes", nodes, least=2)
        x = -np.cos(np.pi * np.arange(nodes) / (nodes - 1))
        coefficients = np.linalg.inv(chebyshev.chebvander(x, nodes - 1))  # node values -> coefficients

        def matrix(operation: Callable[[np.ndarray], np.ndarray]) -> Tensor:
            return torch.as_tensor(chebyshev.chebval(x, operation(coefficients)).T, device=device)

        # An integral on [-1, 1] is twice that on [0, 1], a derivative half.
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
        """The matrix (k, N) that maps values at the nodes to their interpolant at s: (k,)."""
        difference = s.to(self.s)[:, None] - self.s
        at_node = difference == 0
        terms = self._barycentric / torch.where(at_node, 1.0, difference)
        terms = torch.where(at_node.any(dim=1, keepdim=True), at_node.to(terms), terms)
        return terms / terms.sum(dim=1, keepdim=True)

    def norm(self, f: Tensor) -> float:
        """( int_0^1 |f(s)|_F^2 ds )^(1/2) by quadrature, from f at the nodes: (N, ...)."""
        return math.sqrt(float(self.quadrature @ f.flatten(1).square().sum(dim=1)))


@functools.lru_cache(maxsize=64)
def get_grid(nodes: int, device: str = "cpu") -> Grid:
    """The grid with that number of nodes. It is made once."""
    return Grid(nodes, device)


@functools.lru_cache(maxsize=256)
def cell_matrices(nodes: int, depth: int, device: str) -> tuple[Tensor, Tensor]:
    """Cell means (L, N) and within-cell deviations (N, N) of interpolants over the cells [(k-1)/L, k/L).

    For node values F the means are ``means @ F``, and |deviations @ F|^2 is the integral over [0, 1] of
    |f(s) - mean over its cell|^2. As a sum of squares it has no cancellation. N Gauss points in each cell make both
    exact (the square has degree 2N-2). A QR factorisation reduces the points of all cells to N rows.
    """
    grid = get_grid(nodes)
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
    """Gradient descent on V(s), W(s), A, B: a `lib.dense.solver.Solver` whose layers are the nodes.

    The number of ``nodes`` is fixed; `limit.train` chooses and checks it. ``weights`` holds V: (N, m, q) and
    W: (N, q, m) at the nodes. ``picard_tolerance`` is the largest change in the last Picard sweep, relative to the
    largest entry. ``data`` replaces those that the config draws.
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
        check_limit_exists(config)
        self.config, self.grid, self.picard_tolerance = config, get_grid(nodes, device), picard_tolerance
        weights_at, drawn = initial_functions(config)
        self.weights = weights_at(self.grid.s.cpu()).to(device, torch.float64)
        self.data: Data = (data or drawn).to(device, torch.float64)
        self.step_factor = config.at_depth(1).step_factor  # the network's, without its L
        self.layer_weights = self.grid.quadrature
        self._past_H, self._past_P = (deque(maxlen=len(EXTRAPOLATION)) for _ in range(2))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The loss at the present weights, a tensor without axes. Leaves H and G = inner * H W at the nodes."""
        weights, data = self.weights, self.data
        start = data.x if weights.A is None else data.x @ weights.A
        self.H, self.G = solve_states(self.config, self.grid, weights, start, self._past_H, self.picard_tolerance)
        self.P = None
        output = self.H[-1] if weights.B is None else self.H[-1] @ weights.B
        self.residual = output - data.y
        return self.residual.square().sum() * self.config.loss_scale

    @torch.no_grad()
    def gradients(self) -> Weights:
        """Functional gradients at the states of the last `forward`: those of V at s = k/L correspond to L dl/dV_k of a
        network. dl/dA and dl/dB are those of a network.
        """
        config, weights = self.config, self.weights
        slope = activations.get(config.activation).derivative(self.G)
        above = self.residual * (2 * config.loss_scale)
        top = above if weights.B is None else above @ weights.B.mT
        scale = _outer(config) * config.inner_scale
        Vt, Wt = weights.V.mT, weights.W.mT

        def right_side(P: Tensor) -> Tensor:
            return scale * torch.bmm(torch.bmm(P, Vt) * slope, Wt)

        if self.P is None:  # once for each `forward`: the extrapolation needs one solution for each step
            self.P = _picard(right_side, top, self.grid.to_one, self._past_P, self.picard_tolerance, len(self.grid))
        P = self.P
        U = torch.bmm(P, Vt) * slope
        activated = activations.get(config.activation).function(self.G)
        gradient = Weights(torch.bmm(activated.mT, P).mul_(_outer(config)), torch.bmm(self.H.mT, U).mul_(scale))
        if config.train_ends:
            gradient.A, gradient.B = self.data.x.mT @ P[0], self.H[-1].mT @ above
        return gradient

    def descend(self, learning_rate: float, clip: float = 0.0) -> None:
        """See `lib.dense.solver.Solver.descend`."""
        for name, velocity in self.gradients().items().items():
            if name in ("V", "W"):
                velocity.mul_(self.step_factor)
            if clip > 0:
                velocity.clamp_(-clip, clip)
            getattr(self.weights, name).sub_(velocity, alpha=learning_rate)

    def run(self, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
        """See `lib.dense.solver.Solver.run`."""
        return take_steps(self, learning_rate, count, clip)


@functools.lru_cache(maxsize=256)
def _outer(config: NetworkConfig) -> float:
    """The factor c of the limit's right side: that of the network's branch, without its 1/L."""
    return config.at_depth(1).outer_scale


def check_limit_exists(config: NetworkConfig) -> None:
    """Raise ValueError if the configuration has no such limit: with i.i.d. layers, or the scaling 1/sqrt(L)."""
    check_functions(config)
    if config.residual_scaling != "1/L":
        raise ValueError(
            f"residual_scaling is {config.residual_scaling!r}, whose limit is not an ordinary differential "
            "equation: expected '1/L'."
        )


def solve_states(config, grid, weights, start, past, tolerance) -> tuple[Tensor, Tensor]:
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

"""What trains a network, or its large-depth limit: three implementations stand behind one interface.

`lib.dense.adjoint.Adjoint` is the reference, in PyTorch; `lib.dense.compiled.Compiled` the same in C++;
`lib.dense.spectral.SpectralSolver` the limit, whose layers are the nodes of a grid in s.
"""

from typing import Protocol

import torch
from torch import Tensor

from lib.dense.network import Data, NetworkConfig, Weights


class Solver(Protocol):
    """A network with its weights and its data, ready for gradient descent in place.

    Call `forward` for the loss at the present weights, then `gradients` or `descend` for what follows from
    the states that `forward` left. Shapes are those of `Weights`, with row vectors: V (L, m, q), W (L, q, m), A (d, q),
    B (q, d'); for the limit L is the number of nodes. All tensors have one dtype and one device.

    ``layer_weights`` w (L,) are those in dl = sum_k w_k <g_k, dZ_k> for the `gradients` g: 1 for a network, the
    quadrature's over s for the limit. ``step_factor`` is what a step multiplies g_k by: L for a network with the
    scaling 1/L, 1 for the limit (each times m in mean-field scaling). ``residual`` (n, d') is F(X) - Y after a
    `forward`.
    """

    name: str
    config: NetworkConfig
    weights: Weights
    data: Data
    residual: Tensor
    step_factor: float
    layer_weights: Tensor

    def forward(self) -> Tensor:
        """The loss at the present weights, a tensor without axes; leaves states for what follows."""

    def gradients(self) -> Weights:
        """dl/dV_k and dl/dW_k, and dl/dA and dl/dB if they are trained (else None), at the states of `forward`.

        For the limit: the functional gradients, beside which a network's are 1/L times as large.
        """

    def descend(self, learning_rate: float, clip: float = 0.0) -> None:
        """One step of gradient descent, in place: V_k and W_k move by -eta * ``step_factor`` * gradient, A and B by
        -eta * gradient, eta = ``learning_rate``. With ``clip`` C > 0 every velocity is clipped to [-C, C] first, entry
        by entry (the clipped flow of Prop. 3)."""

    def run(self, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
        """``count`` times `forward` and `descend`; returns the loss before each: (count,), float64."""


def take_steps(solver: Solver, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
    """`Solver.run` by `forward` and `descend`."""
    losses = torch.empty(count, dtype=torch.float64, device=solver.weights.V.device)
    for step in range(count):
        losses[step] = solver.forward()
        solver.descend(learning_rate, clip)
    return losses


def squared_speed(solver: Solver) -> float:
    """-dl/dt along the gradient flow: |dl/dA|^2 + L sum_k |dl/dZ_k|^2 + |dl/dB|^2, Z_k = (V_k, W_k) (Def. 1).

    For the limit the middle term is the integral over s of the squared functional gradient.
    """
    return sum(squared_speeds(solver).values())


def squared_speeds(solver: Solver) -> dict[str, float]:
    """The terms of `squared_speed`: of V and W (summed over the layers) and, if they are trained, of A and B."""
    squares = {name: gradient.square().flatten(1).sum(dim=1) for name, gradient in solver.gradients().items().items()}
    return {
        name: float(solver.step_factor * (solver.layer_weights @ square) if name in "VW" else square.sum())
        for name, square in squares.items()
    }

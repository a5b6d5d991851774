"""The interface of the solvers, which train a network or its large-depth limit by gradient descent.

`lib.dense.adjoint.Adjoint` is the reference, in PyTorch. `lib.dense.compiled.Compiled` is the same in C++.
`lib.dense.spectral.SpectralSolver` is the limit; its layers are the nodes of a grid in s.
"""

from typing import Protocol

import torch
from torch import Tensor

from lib.dense.network import Data, NetworkConfig, Weights


class Solver(Protocol):
    """A network with its weights and its data, ready for gradient descent in place.

    Call `forward` first: it computes the loss at the present weights. `gradients` and `descend` use the states that it
    leaves. Shapes are those of `Weights`, with row vectors: V (L, m, q), W (L, q, m), A (d, q), B (q, d'). For the
    limit, L is the number of nodes. All tensors have one dtype and one device.

    ``layer_weights`` w (L,) are those in dl = sum_k w_k <g_k, dZ_k> for the `gradients` g: 1 for a network, the weights
    of the quadrature over s for the limit. ``step_factor`` multiplies g_k in a step: it is L for a network with the
    scaling 1/L, and 1 for the limit (each times m in mean-field scaling). ``residual`` (n, d') is F(X) - Y after a
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
        """The loss at the present weights, a tensor without axes. Leaves the states for `gradients` and `descend`."""

    def gradients(self) -> Weights:
        """dl/dV_k and dl/dW_k, and dl/dA and dl/dB if they are trained (else None), at the states of `forward`.

        For the limit they are the functional gradients; a network's gradients are 1/L times as large.
        """

    def descend(self, learning_rate: float, clip: float = 0.0) -> None:
        """One step of gradient descent, in place, with eta = ``learning_rate``.

        V_k and W_k move by -eta * ``step_factor`` * gradient, A and B by -eta * gradient. If ``clip`` C > 0, every
        entry of these velocities is first clipped to [-C, C] (the clipped flow of Prop. 3).
        """

    def run(self, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
        """`forward` and `descend`, ``count`` times; returns the loss before each step: (count,), float64."""


def take_steps(solver: Solver, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
    """`Solver.run` by `forward` and `descend`."""
    losses = torch.empty(count, dtype=torch.float64, device=solver.weights.V.device)
    for step in range(count):
        losses[step] = solver.forward()
        solver.descend(learning_rate, clip)
    return losses


def squared_speed(solver: Solver) -> float:
    """-dl/dt along the gradient flow: |dl/dA|^2 + L sum_k |dl/dZ_k|^2 + |dl/dB|^2, Z_k = (V_k, W_k) (Def. 1).

    For the limit, the middle term is the integral over s of the squared functional gradient.
    """
    return sum(squared_speeds(solver).values())


def squared_speeds(solver: Solver) -> dict[str, float]:
    """The terms of `squared_speed`: those of V and W, summed over the layers, and of A and B if they are trained."""
    squares = {name: gradient.square().flatten(1).sum(dim=1) for name, gradient in solver.gradients().items().items()}
    return {
        name: float(solver.step_factor * (solver.layer_weights @ square) if name in "VW" else square.sum())
        for name, square in squares.items()
    }

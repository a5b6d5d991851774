"""The paper's bounds, evaluated with numbers: how fast neighbouring layers separate, and the error of Euler's steps.

Row vectors as in `lib.dense.network`, with c = L outer, i = inner, S_k = s(i H_k W_k) and
U_k = (P_{k+1} V_k^T) * s'(i H_k W_k). The flow moves V_k by -c S_k^T P_{k+1} and W_k by -c i H_k^T U_k, and clipping by
entries is 1-Lipschitz. Let s1, s2 be the suprema of |s'| and |s''|, and h' = L max |H_{k+1} - H_k|_F,
p' = L max |P_{k+1} - P_k|_F. Norms without a name are operator norms, and the largest over the layers. Then the largest
differences v = L |V_{k+1} - V_k|_F and w = L |W_{k+1} - W_k|_F grow at most as

    dv/dt = c i s1 |P| |H| w + c i s1 |P| |W| h' + c |S| p',
    dw/dt = c i s1 |H| |P| v + c i^2 s2 |H|^2 |PV|_max w + c i (|U| h' + |H| (s1 |V| p' + i s2 |PV|_max |W| h')),

which is Groenwall's inequality behind Prop. 3. In steps of eta the same holds, with differences in place of
derivatives."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import activations
from lib.dense.limit import TrainedODE
from lib.dense.network import Data, NetworkConfig, Weights, hidden_states


@functools.cache
def suprema(activation: str) -> tuple[float, float]:
    """sup |s'| and sup |s''| of an activation of class C^2, on a fine grid."""
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    slope = activations.get(activation).derivative(z)
    return float(slope.abs().max()), float((slope.diff() / z.diff()).abs().max())


@dataclass(frozen=True)
class Sizes:
    """Norms of a network with its data: the largest over the layers of H, P, V, W, S, U and PV (see the module's
    docstring), and ``h`` and ``p``, L times the largest differences of H and P."""

    H: float
    P: float
    V: float
    W: float
    S: float
    U: float
    PV: float
    h: float
    p: float


def measure_sizes(config: NetworkConfig, weights: Weights, data: Data) -> Sizes:
    """The sizes at these weights."""
    s, inner, depth = activations.get(config.activation), config.inner_scale, len(weights.V)
    H = hidden_states(config, weights, data.x)
    G = inner * H[:-1] @ weights.W
    P = [2 * config.loss_scale * (H[-1] @ weights.B - data.y) @ weights.B.mT]
    products, U = [], []
    for k in reversed(range(depth)):
        products.append(P[-1] @ weights.V[k].mT)
        U.append(products[-1] * s.derivative(G[k]))
        P.append(P[-1] + config.outer_scale * inner * U[-1] @ weights.W[k].mT)
    P = torch.stack(P[::-1])
    operators = (H, P, weights.V, weights.W, s.function(G), torch.stack(U))
    largest = (float(torch.linalg.matrix_norm(each, ord=2).max()) for each in operators)
    steps = (depth * float(each.diff(dim=0).flatten(1).norm(dim=1).max()) for each in (H, P))
    return Sizes(*largest, float(torch.stack(products).abs().max()), *steps)


def bound_sizes(config: NetworkConfig, start: Weights, data: Data, clip: float, time: float) -> Sizes:
    """Bounds of the sizes at ``time`` that are known before training: the clipped flow moves an entry by at most C t.

    They hold if s(0) = 0. Operator norms are bounded by Frobenius norms.
    """
    slope, _ = suprema(config.activation)
    c, i = config.depth * config.outer_scale, config.inner_scale
    moved = {name: clip * time * math.sqrt(values[0].numel() if name in "VW" else values.numel())
             for name, values in start.items().items()}  # fmt: skip
    first = {name: float(torch.linalg.matrix_norm(values, ord=2).max()) for name, values in start.items().items()}
    A, V, W, B = (first[name] + moved[name] for name in "AVWB")
    growth = math.exp(c * i * slope * W * V)
    H = float(data.x.norm()) * A * growth
    P = 2 * config.loss_scale * (H * B + float(data.y.norm())) * B * growth
    S, U = slope * i * W * H, slope * P * V
    return Sizes(H, P, V, W, S, U, P * V, c * S * V, c * i * U * W)


def advance(config: NetworkConfig, sizes: Sizes, v: float, w: float, step: float) -> tuple[float, float]:
    """The bounds of v and w (see the module's docstring) after one more step of length ``step``."""
    s1, s2 = suprema(config.activation)
    c, i, z = config.depth * config.outer_scale, config.inner_scale, sizes
    dv = c * i * s1 * z.P * (z.H * w + z.W * z.h) + c * z.S * z.p
    bend = i * s2 * z.PV
    dw = c * i * (s1 * z.H * z.P * v + z.H**2 * bend * w + z.U * z.h + z.H * (s1 * z.V * z.p + bend * z.W * z.h))
    return v + step * dv, w + step * dw


def euler_constant(ode: TrainedODE, x: Tensor) -> float:
    """A C with |F^L(x) - F(x)| <= C/L for the network of L layers Z_k = Z(k/L), for inputs x: (n, d) (Prop. 2).

    Let the ODE's right side f be Lipschitz in h with constant a. The error of one step is at most b/L^2 with
    b = (a sup |dH/ds| + sup |df/dZ dZ/ds|)/2, and that of L steps b (e^a - 1)/(a L). Suprema are taken over the nodes.
    """
    config, weights, grid = ode.config, ode.weights, ode.grid
    s1, _ = suprema(config.activation)
    c, i = config.at_depth(1).outer_scale, config.inner_scale
    H = ode.hidden_states(x, tolerance=1e-8)
    S = activations.get(config.activation).function(i * H @ weights.W)
    V, W = (torch.linalg.matrix_norm(Z, ord=2) for Z in (weights.V, weights.W))
    dV, dW = (
        torch.linalg.matrix_norm(torch.tensordot(grid.derivative, Z, dims=1), ord=2) for Z in (weights.V, weights.W)
    )
    a = float((c * i * s1 * W * V).max())
    speed = float((c * S @ weights.V).norm(dim=2).max())
    change = float((c * (S.norm(dim=2) * dV[:, None] + s1 * i * H.norm(dim=2) * (dW * V)[:, None])).max())
    end = float(torch.linalg.matrix_norm(weights.B, ord=2))
    return end * 0.5 * (a * speed + change) * (math.expm1(a) / a if a > 0 else 1.0)

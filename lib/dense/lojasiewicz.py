"""The Polyak-Lojasiewicz (PL) condition of Def. 1: its ratio, the share of each parameter, and its constant.

With r = F(X) - Y, the n x d' residuals, l = scale |r|^2, and K the tangent kernel, the sum over all parameters of
dF_ia/dtheta dF_jb/dtheta with the metric of the flow (1 for A and B, L for each Z_k),

    |dl/dA|^2 + L sum_k |dl/dZ_k|^2 + |dl/dB|^2 = 4 scale^2 <r, K r> >= mu l,      mu = 4 scale lambda_min(K),

and no larger mu holds for all targets. At the initialisation of Prop. 5 (V = 0, q >= d + d'), K acts only on the
samples: K = 2 X X^T + S S^T / m with S = s(X W / sqrt(q)). Its rank is at most d + m, so mu = 0 if m < n - d.
"""

import torch
from torch import Tensor

from lib import activations
from lib.dense import limit
from lib.dense.network import NetworkConfig, Weights, hidden_states
from lib.dense.solver import squared_speed, squared_speeds
from lib.dense.training import Record


def ratio(record: Record | limit.LimitRecord) -> float:
    """(|dl/dA|^2 + L sum_k |dl/dZ_k|^2 + |dl/dB|^2) / l, which is at least mu by Def. 1. For the limit, the middle term
    is an integral over s (`lib.dense.solver.squared_speed`)."""
    return squared_speed(record.solver) / record.loss


def shares(record: Record | limit.LimitRecord) -> dict[str, float]:
    """The shares of A, of Z (V and W) and of B in the `ratio`, which sum to 1."""
    parts = squared_speeds(record.solver)
    parts["Z"] = parts.pop("V") + parts.pop("W")
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}


def tangent_kernel(config: NetworkConfig, weights: Weights, x: Tensor) -> Tensor:
    """K: (n, d', n, d') at inputs x: (n, d), for a network with trained A and B (ValueError otherwise)."""
    if weights.A is None:
        raise ValueError("A and B are not trained, expected a network that trains them: set train_ends=True.")
    s, depth = activations.get(config.activation), len(weights.V)
    inner, outer = config.inner_scale, config.outer_scale
    states = hidden_states(config, weights, x)
    n, outputs = len(x), weights.B.shape[1]
    # p: (n, d', q) is dF_a/dh_{k+1} for each sample.
    p = weights.B.mT.expand(n, outputs, -1)
    kernel = torch.einsum("ih,jh,ab->iajb", states[-1], states[-1], torch.eye(outputs, dtype=x.dtype))
    # Of a layer: outer s(G) for V and p, outer inner H for W and u = (p V^T) s'(G).
    for k in reversed(range(depth)):
        G = inner * states[k] @ weights.W[k]
        u = (p @ weights.V[k].mT) * s.derivative(G)[:, None]
        for left, right, scale in ((s.function(G), p, outer), (states[k], u, outer * inner)):
            kernel += depth * scale**2 * torch.einsum("ij,iajb->iajb", left @ left.mT, _products(right))
        p = p + outer * inner * u @ weights.W[k].mT
    return kernel + torch.einsum("ij,iajb->iajb", x @ x.mT, _products(p))


def _products(rows: Tensor) -> Tensor:
    # <rows_ia, rows_jb>: (n, d', n, d').
    flat = rows.flatten(0, 1)
    return (flat @ flat.mT).view(*rows.shape[:2], *rows.shape[:2])


def constant(config: NetworkConfig, weights: Weights, x: Tensor) -> float:
    """mu = 4 scale lambda_min(K): the largest mu with which the PL condition holds at these weights for all targets. It
    is 0 up to rounding if K is singular."""
    kernel = tangent_kernel(config, weights, x)
    size = kernel.shape[0] * kernel.shape[1]
    return max(0.0, 4 * config.loss_scale * float(torch.linalg.eigvalsh(kernel.reshape(size, size))[0]))

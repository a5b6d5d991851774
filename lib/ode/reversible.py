"""Gradients without stored states: each h_k is computed backwards from h_{k+1} (Sander, Ablin, Peyre, 2022).

    Euler       h_{k+1} = h_k + f(h_k, Z_k) / L
    backwards   h_k ~ h_{k+1} - f(h_{k+1}, Z_k) / L

    Heun        h_{k+1} = h_k + (f(h_k, Z_k) + f(y, Z_{k+1})) / 2L,             y = h_k + f(h_k, Z_k) / L
    backwards   h_k ~ h_{k+1} - (f(h_{k+1}, Z_{k+1}) + f(y, Z_k)) / 2L,         y = h_{k+1} - f(h_{k+1}, Z_{k+1}) / L

With L layers, Heun's method makes L - 1 steps of size 1/(L - 1). The backward step is the method with a negative step.
After all layers, the error of h_0 is O(1/L) with Euler. With Heun and smooth layers it is O(1/L^2) by their bound. In
fact it is O(1/L^3): the error of a Heun step is odd in the step size, up to terms of higher order, so the errors
forwards and backwards cancel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import checks
from lib.ode.solvers import Branch

METHODS = ("Euler", "Heun")
Layer = Sequence[Tensor]


@dataclass(frozen=True)
class Gradients:
    """The result of a backward pass: the ``start`` h_0 that it used, and the gradients with respect to h_0 (``state``)
    and to the layers (``layers``, each (L, ...))."""

    start: Tensor
    state: Tensor
    layers: tuple[Tensor, ...]


def _layers_of_steps(method: str, layers: Sequence[Tensor]) -> list[tuple[int, ...]]:
    # The numbers of the layers that each step uses.
    depth = len(layers[0])
    return [(k,) for k in range(depth)] if method == "Euler" else [(k, k + 1) for k in range(depth - 1)]


def _step(method: str, branch: Branch, h: Tensor, read: Sequence[Layer], size: float) -> Tensor:
    first = branch(h, read[0])
    if method == "Euler":
        return h + size * first
    return h + size / 2 * (first + branch(h + size * first, read[1]))


@torch.no_grad()
def forward(method: str, branch: Branch, layers: Sequence[Tensor], start: Tensor, states: list | None = None) -> Tensor:
    """h_L from h_0 = ``start``. If ``states`` is a list, the state before each step is appended to it."""
    checks.choice("method", method, METHODS)
    steps, h = _layers_of_steps(method, layers), start
    for numbers in steps:
        if states is not None:
            states.append(h)
        h = _step(method, branch, h, [[layer[k] for layer in layers] for k in numbers], 1 / len(steps))
    return h


def backward(
    method: str,
    branch: Branch,
    layers: Sequence[Tensor],
    end: Tensor,
    gradient: Tensor,
    states: list[Tensor] | None = None,
) -> Gradients:
    """Gradients of a loss with ``gradient`` dl/dh_L at ``end`` h_L, layer by layer from the last to the first.

    ``states`` is the list of `forward`, which is emptied. Without it, each state is computed backwards, and only one is
    in memory.
    """
    checks.choice("method", method, METHODS)
    steps, h = _layers_of_steps(method, layers), end
    found = tuple(torch.zeros_like(layer) for layer in layers)
    for numbers in reversed(steps):
        read = [[layer[k] for layer in layers] for k in numbers]
        if states is not None:
            h = states.pop()
        else:
            with torch.no_grad():
                h = _step(method, branch, h, read[::-1], -1 / len(steps))
        with torch.enable_grad():
            state = h.detach().requires_grad_()
            leaves = [[tensor.detach().requires_grad_() for tensor in layer] for layer in read]
            stepped = _step(method, branch, state, leaves, 1 / len(steps))
            flat = [tensor for layer in leaves for tensor in layer]
            gradient, *parts = torch.autograd.grad(stepped, [state, *flat], gradient)
        for place, part in enumerate(parts):
            found[place % len(layers)][numbers[place // len(layers)]] += part
    return Gradients(h, gradient, found)


def compute_gradients(
    method: str, branch: Branch, layers: Sequence[Tensor], start: Tensor, loss: Callable[[Tensor], Tensor], stored: bool
) -> Gradients:
    """Gradients of ``loss(h_L)`` with stored states or with states computed backwards."""
    states = [] if stored else None
    end = forward(method, branch, layers, start, states).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(end), [end])
    return backward(method, branch, layers, end.detach(), gradient, states)


def relative_errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Relative errors of a pass: "state", |h_0 - h_0'| / |h_0|, and "gradient", that of all layers together."""
    gradients = [torch.cat([layer.flatten() for layer in each.layers]) for each in (found, exact)]
    return {
        "state": float((found.start - exact.start).norm() / exact.start.norm()),
        "gradient": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
    }


def measure_errors(
    method: str, branch: Branch, layers: Sequence[Tensor], start: Tensor, loss: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """`relative_errors` of a pass with states computed backwards, compared with a pass with stored states."""
    exact, found = (compute_gradients(method, branch, layers, start, loss, stored) for stored in (True, False))
    return relative_errors(found, exact)

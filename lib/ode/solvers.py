"""A residual network as an ODE: its layers as functions of s, integrated by explicit Runge-Kutta methods and by SciPy.

    network    h_{k+1} = h_k + (1/L) f(h_k, Z_k),     k = 0..L-2
    ODE        dH/ds = (1 - 1/L) f(H, Z(s)),          Z(k/(L-1)) = Z_k, k = 0..L-1, a cubic spline between them

The last step of the network is left out, so that Z is only interpolated: a cubic that goes on after the last of
independent layers grows tenfold in 1/L, and its error hides all others. Euler's method in L - 1 steps is the network.
If Z is smooth enough, a solver of order p in n steps has an error of order n^-p with respect to the ODE, and stays at a
distance of about 1/L from the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib import checks
from lib.tables import from_rows

# f(h, Z): the residual branch without its 1/L, of states h (n, ...) and the tensors Z of one layer.
Branch = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Method:
    """An explicit Runge-Kutta method of ``order`` p, with ``nodes`` c, ``stages`` a (rows below the diagonal) and
    ``weights`` b."""

    name: str
    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


METHODS = {
    method.name: method
    for method in (
        Method("Euler", 1, (0.0,), ((),), (1.0,)),
        Method("Heun", 2, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
        Method("RK4", 4, (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    )
}


class LayersODE:
    """The ODE of a network with the ``branch`` f and the ``layers``: its parameters stacked over the depth, each
    (L, ...), in float64."""

    def __init__(self, branch: Branch, layers: Sequence[Tensor]) -> None:
        from scipy.interpolate import make_interp_spline

        self.branch, self.depth = branch, len(layers[0])
        self._shapes = [layer.shape[1:] for layer in layers]
        flat = torch.cat([layer.detach().double().flatten(1) for layer in layers], dim=1)
        degree = min(3, self.depth - 1)
        self._spline = make_interp_spline(np.arange(self.depth) / max(1, self.depth - 1), flat.numpy(), k=degree)

    def layer(self, s: float) -> list[Tensor]:
        """Z(s), the parameters at s in [0, 1]."""
        flat = torch.from_numpy(self._spline(s))
        parts = flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def slope(self, s: float, h: Tensor) -> Tensor:
        """dH/ds = (1 - 1/L) f(h, Z(s)) at H = h."""
        return (1 - 1 / self.depth) * self.branch(h, self.layer(s))

    @torch.no_grad()
    def solve(self, start: Tensor, method: str, steps: int) -> Tensor:
        """H(1) from H(0) = ``start``, by a method of `METHODS` in that number of equal steps."""
        checks.choice("method", method, METHODS)
        checks.positive_int("steps", steps)
        rule, h = METHODS[method], start
        for step in range(steps):
            slopes: list[Tensor] = []
            for node, row in zip(rule.nodes, rule.stages, strict=True):
                moved = sum((a * slope for a, slope in zip(row, slopes, strict=True) if a), torch.zeros_like(h))
                slopes.append(self.slope((step + node) / steps, h + moved / steps))
            h = h + sum(b * slope for b, slope in zip(rule.weights, slopes, strict=True)) / steps
        return h

    @torch.no_grad()
    def solve_adaptively(self, start: Tensor, tolerance: float) -> tuple[Tensor, int]:
        """H(1) by SciPy's RK45 (order 5, adaptive steps) to this relative and absolute tolerance, and the number of
        evaluations of the right-hand side."""
        from scipy.integrate import solve_ivp

        def right_side(s: float, flat: np.ndarray) -> np.ndarray:
            return self.slope(s, torch.from_numpy(flat).view(start.shape)).flatten().numpy()

        solution = solve_ivp(
            right_side, (0, 1), start.flatten().numpy(), method="RK45", rtol=tolerance, atol=tolerance, t_eval=[1.0]
        )
        return torch.from_numpy(solution.y[:, -1]).view(start.shape), solution.nfev


def count_evaluations(method: str, steps: int) -> int:
    """The number of evaluations of f in that number of steps of a method."""
    return len(METHODS[method].nodes) * steps


@torch.no_grad()
def run_network(branch: Branch, layers: Sequence[Tensor], start: Tensor) -> Tensor:
    """h_{L-1} of the network itself, from h_0 = ``start``: Euler's method, layer by layer."""
    h, depth = start, len(layers[0])
    for layer in zip(*(each[:-1] for each in layers), strict=True):
        h = h + branch(h, layer) / depth
    return h


ADAPTIVE = "RK45, adaptive"


def measure_solver_errors(
    branch: Branch,
    layers: Sequence[Tensor],
    start: Tensor,
    steps: Sequence[int],
    tolerances: Sequence[float] = (),
    reference_steps: int = 0,
) -> dict[str, list]:
    """The distance of solvers from the ODE and from the network: a table of method, steps (0 for the adaptive solver),
    evaluations of f, error and error_network.

    Errors are those of H(1) for all states ``start``, in the Frobenius norm, relative to the ODE's H(1). The row
    "network" has the network's own distance to the ODE. The ODE's H(1) is that of RK4 in ``reference_steps`` (0: four
    times the most steps). A solver with more than half as many evaluations is not compared with it.
    """
    ode = LayersODE(branch, layers)
    reference_steps = reference_steps or 4 * max(steps)
    exact, own = ode.solve(start, "RK4", reference_steps), run_network(branch, layers, start)

    def row(method: str, count: int, calls: int, end: Tensor) -> dict[str, Any]:
        errors = {name: float((end - other).norm() / exact.norm()) for name, other in (("", exact), ("_network", own))}
        return {"method": method, "steps": count, "evaluations": calls} | {
            f"error{name}": error for name, error in errors.items()
        }

    rows = [row("network", ode.depth - 1, ode.depth - 1, own)]
    for method in METHODS:
        for count in steps:
            calls = count_evaluations(method, count)
            if 2 * calls <= count_evaluations("RK4", reference_steps):
                rows.append(row(method, count, calls, ode.solve(start, method, count)))
    for tolerance in tolerances:
        end, calls = ode.solve_adaptively(start, tolerance)
        rows.append(row(ADAPTIVE, 0, calls, end))
    return from_rows(rows)

"""The conventions of the paper, of its released code, and of mean-field scaling.

They describe the same residual network and differ in constants. With row vectors,

    h_{k+1} = h_k + outer * s(inner * h_k W_{k+1}) V_{k+1},      k = 0, ..., L-1.

=============================  ==============================  ===========================
point                          "eq3" (the paper)               "released" (its code)
=============================  ==============================  ===========================
outer, residual scaling 1/L    1 / (L sqrt(m))                 1 / L
inner                          1 / sqrt(q)                     1
step of V_k and W_k            L eta                           L eta
loss                           (1/n) sum_i |F(x_i) - y_i|^2    mean over all n d' entries
successive distance            "max" over k and t              "aggregate" over t, k
distance to the limit          "integral" over s in [0, 1]     "left" end of each cell
=============================  ==============================  ===========================

"mean-field" is eq. (3) with outer = 1 / (L m) and steps of L m eta. The residual branch is then the mean over the L m
units of all layers, and every unit moves by O(eta) in a step, whatever L and m. Of the three, it alone has a limit in
L m (Chizat 2025, "The hidden width of deep ResNets", arXiv 2509.10167).

At s, Thm 4 takes layer floor((L-1) s) + 1. Here, as in Figure 1, layer k stands for the cell [(k-1)/L, k/L). The two
differ by O(1/L), in constants and not in rates.

With W = sqrt(q) W' and V = sqrt(m) V', eq. (3) in (V, W) is the released network in (V', W').
"""

import math
from dataclasses import dataclass

from lib import checks


@dataclass(frozen=True)
class Convention:
    """Width scalings and normalisation of the loss (see above). outer has a factor sqrt(m)^-``width_power``."""

    name: str
    width_power: int
    inner_scaling: bool
    loss_per_coordinate: bool

    def inner_scale(self, hidden_dimension: int) -> float:
        """The factor of h_k W_k inside the activation: 1/sqrt(q) or 1."""
        return 1 / math.sqrt(hidden_dimension) if self.inner_scaling else 1.0

    def outer_scale(self, depth: int, width: int, residual_exponent: float = 1.0) -> float:
        """The factor of the residual branch: L^-beta, times 1/sqrt(m) or 1/m if the convention scales by width."""
        return depth**-residual_exponent / math.sqrt(width) ** self.width_power

    def width_step(self, width: int) -> float:
        """The factor of the step of V_k and W_k: m^(p - 1) if outer has sqrt(m)^-p, else 1.

        The amount by which a step moves the network's output then does not depend on m: two factors sqrt(m)^-p are
        summed over m units.
        """
        return width ** (self.width_power - 1) if self.width_power else 1

    def loss_scale(self, samples: int, output_dimension: int) -> float:
        """The factor of sum_i |F(x_i) - y_i|^2 in the loss: 1/n or 1/(n d')."""
        return 1 / (samples * output_dimension) if self.loss_per_coordinate else 1 / samples


CONVENTIONS = {
    "released": Convention("released", width_power=0, inner_scaling=False, loss_per_coordinate=True),
    "eq3": Convention("eq3", width_power=1, inner_scaling=True, loss_per_coordinate=False),
    "mean-field": Convention("mean-field", width_power=2, inner_scaling=True, loss_per_coordinate=False),
}

# The order of draws from the seeded generator. The code of the released Figure 2 draws an unused (d, d) matrix between
# W and X. Without that draw its data would change.
DRAW_ORDERS = ("W X Y", "W unused X Y")

# Distance to the limit: "integral" over s with each layer constant on its cell [(k-1)/L, k/L), or with the limit
# sampled at the "left" end of each cell.
SAMPLING_RULES = ("integral", "left")

# The exponents beta of residual scalings L^-beta. The limit of 1/L is a neural ODE. The limit of 1/sqrt(L) with i.i.d.
# weights is a stochastic differential equation (section 4.3).
RESIDUAL_EXPONENTS = {"1/L": 1.0, "1/sqrt(L)": 0.5}


def get(name: str) -> Convention:
    """The convention of that name. Raises ValueError, with the list of names, if there is none."""
    checks.choice("convention", name, CONVENTIONS)
    return CONVENTIONS[name]

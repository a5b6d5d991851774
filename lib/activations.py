"""Activations s and their derivatives s', by their names in notebooks, profiles and checkpoints."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import checks


@dataclass(frozen=True)
class Activation:
    """An activation s, entry by entry.

    ``function`` is s. ``derivative`` is s', for the hand-written adjoint; at a kink it has the value that autograd
    uses. ``smooth`` says whether s is C^2, as the theorems assume."""

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    smooth: bool


def _gelu_derivative(z: Tensor) -> Tensor:
    # GELU(z) = z Phi(z), so GELU'(z) = Phi(z) + z phi(z) with the normal distribution's Phi and density phi.
    # torch.special.ndtr takes nine times as long as erf and gains accuracy only in the far tail.
    density = torch.exp(z.square().mul_(-0.5)).mul_(z).mul_(1 / math.sqrt(2 * math.pi))
    return torch.erf(z * math.sqrt(0.5)).add_(1).mul_(0.5).add_(density)


def _tanh_derivative(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _silu_derivative(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _leaky_relu_derivative(z: Tensor) -> Tensor:
    # In z's own dtype, since 0.01 in float32 is another number.
    return torch.where(z > 0, z.new_ones(()), z.new_full((), 0.01))


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("gelu", F.gelu, _gelu_derivative, True),
        Activation("relu", F.relu, lambda z: (z > 0).to(z.dtype), False),
        Activation("tanh", torch.tanh, _tanh_derivative, True),
        Activation("identity", lambda z: z, torch.ones_like, True),
        Activation("softplus", F.softplus, torch.sigmoid, True),
        Activation("leaky_relu", F.leaky_relu, _leaky_relu_derivative, False),
        Activation("silu", F.silu, _silu_derivative, True),
    )
}
# The released code calls the identity "linear".
ALIASES = {"linear": "identity"}


def get(name: str) -> Activation:
    """The activation of that name; "linear" is the released code's name of the identity.

    Raises ValueError, with the list of names, if there is none.
    """
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    checks.choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def check_smooth(name: str) -> None:
    """Raise ValueError unless the activation of that name is C^2, as the theorems assume."""
    if not get(name).smooth:
        smooth = ", ".join(each.name for each in ACTIVATIONS.values() if each.smooth)
        raise ValueError(f"activation is {name!r}, which is not C^2 as the theorems assume: expected one of: {smooth}.")

"""The residual branch and the layers of the fully connected network, in the form that `lib.ode` takes."""

from torch import Tensor

from lib import activations
from lib.dense.network import NetworkConfig, Weights
from lib.ode.solvers import Branch


def dense_branch(config: NetworkConfig) -> Branch:
    """f of the fully connected network, for Z = (V, W): L outer s(inner h W) V."""
    s, outer = activations.get(config.activation).function, config.depth * config.outer_scale
    return lambda h, layer: outer * s(config.inner_scale * (h @ layer[1])) @ layer[0]


def dense_layers(weights: Weights) -> tuple[Tensor, Tensor]:
    """The layers' parameters that `dense_branch` takes."""
    return weights.V, weights.W

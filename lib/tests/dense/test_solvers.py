"""Every solver does what `lib.dense.solver.Solver` says: gradients of its loss, steps, clipping, trained ends."""

import dataclasses

import pytest
import torch

from lib.dense import compiled
from lib.dense.adjoint import Adjoint
from lib.dense.compiled import Compiled
from lib.dense.network import NetworkConfig, initialise
from lib.dense.solver import squared_speed
from lib.dense.spectral import SpectralSolver

PLAIN = NetworkConfig(depth=12, width=6, dimension=4, samples=9, initialisation="gaussian-process", initial_V="drawn")
ENDS = dataclasses.replace(
    PLAIN, convention="eq3", train_ends=True, output_dimension=3, hidden_dimension=7, target_scale=0.5
)
MEAN_FIELD = dataclasses.replace(PLAIN, convention="mean-field")


def make(kind: str, config: NetworkConfig):
    if kind == "limit":
        return SpectralSolver(config, nodes=40)
    weights, data = initialise(config)
    if kind == "compiled" and (reason := compiled.find_problem(config, weights, data)):
        pytest.skip(reason)
    return {"adjoint": Adjoint, "compiled": Compiled}[kind](config, weights, data)


def copy(weights):
    return {name: tensor.clone() for name, tensor in weights.items().items()}


solvers = pytest.mark.parametrize("kind", ["adjoint", "compiled", "limit"])
configs = pytest.mark.parametrize(
    "config", [PLAIN, ENDS, MEAN_FIELD], ids=["identity ends", "trained ends", "mean-field"]
)


@solvers
@configs
def test_gradients_are_those_of_the_loss(kind, config):
    """By central differences of `forward` along random directions, in the inner product of the flow."""
    solver = make(kind, config)
    solver.forward()
    gradients = copy(solver.gradients())
    start, step = copy(solver.weights), 1e-5
    generator = torch.Generator().manual_seed(1)
    for name, gradient in gradients.items():
        if kind == "limit" and name in "VW":  # a smooth direction, which the nodes resolve
            constant = torch.randn(1, *gradient.shape[1:], generator=generator, dtype=torch.float64)
            direction = constant.expand_as(gradient) * solver.grid.s[:, None, None].cos()
        else:
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            getattr(solver.weights, name).copy_(start[name] + sign * step * direction)
            losses.append(float(solver.forward()))
        getattr(solver.weights, name).copy_(start[name])
        product = gradient * direction
        if name in "VW":
            product = torch.tensordot(solver.layer_weights, product, dims=1)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(product.sum()), rel=2e-6, abs=1e-9)


@solvers
@configs
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_step_goes_down_the_clipped_gradient(kind, config, clip):
    solver = make(kind, config)
    solver.forward()
    expected = copy(solver.weights)
    for name, gradient in copy(solver.gradients()).items():
        velocity = gradient * (solver.step_factor if name in "VW" else 1)
        expected[name] -= 0.03 * (velocity.clamp(-clip, clip) if clip else velocity)
    solver.descend(0.03, clip)
    for name, tensor in solver.weights.items().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-14)


@solvers
@configs
def test_a_run_is_its_steps(kind, config):
    one, other = make(kind, config), make(kind, config)
    losses = one.run(0.02, 4, clip=0.5)
    for loss in losses:
        assert float(other.forward()) == pytest.approx(float(loss), rel=1e-10)
        other.descend(0.02, clip=0.5)
    assert losses.shape == (4,)
    assert one.residual.shape == (config.samples, config.outputs)


@solvers
@configs
def test_the_squared_speed_is_how_fast_the_loss_falls(kind, config):
    solver, rate = make(kind, config), 1e-6
    before = float(solver.forward())
    speed = squared_speed(solver)
    solver.forward()
    solver.descend(rate)
    assert (before - float(solver.forward())) / rate == pytest.approx(speed, rel=1e-3)

"""The hand-written adjoint against autograd, and whole steps against the textbook loop."""

import dataclasses
import itertools

import pytest
import torch

from lib.dense.adjoint import Adjoint
from lib.dense.network import NetworkConfig, hidden_states, initialise, outputs

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SMALL = NetworkConfig(depth=7, width=5, dimension=4, samples=6, seed=3)


def draw_perturbed(config, device="cpu"):
    """Draw data, and weights that are neither zero nor equal."""
    weights, data = initialise(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.items().values():
        tensor += 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return weights.to(device), data.to(device)


def compute_autograd_gradients(config, weights, data):
    """Compute loss and gradients of the same function in float64, by autograd."""
    tensors = {name: t.double().requires_grad_() for name, t in weights.items().items()}
    config64 = dataclasses.replace(config, dtype="float64")
    copy = type(weights)(**tensors)
    prediction = outputs(copy, trace_hidden_states(config64, copy, data.x.double()))
    loss = (prediction - data.y.double()).square().sum() * config.loss_scale
    return loss.detach(), dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def trace_hidden_states(config, weights, x):
    """The forward recursion without in-place writes, so that autograd can follow it."""
    from lib import activations

    s = activations.get(config.activation).function
    h = x if weights.A is None else x @ weights.A
    states = [h]
    for V, W in zip(weights.V, weights.W, strict=True):
        states.append(states[-1] + config.outer_scale * s(config.inner_scale * (states[-1] @ W)) @ V)
    return torch.stack(states)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("activation", "convention", "ends"),
    [*itertools.product(["gelu", "tanh"], ["released", "eq3"], [False, True]), ("identity", "eq3", False)],
)
def test_gradients_match_float64_autograd(activation, convention, ends, dtype, tolerance, device):
    config = dataclasses.replace(
        SMALL,
        activation=activation,
        convention=convention,
        dtype=dtype,
        train_ends=ends,
        **({"hidden_dimension": 9, "output_dimension": 3} if ends else {}),
    )
    weights, data = draw_perturbed(config, device)
    solver = Adjoint(config, weights, data, chunk=3)
    loss = solver.forward()
    expected_loss, expected = compute_autograd_gradients(config, weights, data)
    assert torch.isclose(loss.double(), expected_loss, rtol=tolerance)
    got = solver.gradients().items()
    assert set(got) == set(expected)
    for name, gradient in got.items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: {error}"


def test_relu_gradients_match_autograd():
    config = dataclasses.replace(SMALL, activation="relu")
    weights, data = draw_perturbed(config)
    solver = Adjoint(config, weights, data)
    solver.forward()
    _, expected = compute_autograd_gradients(config, weights, data)
    for name, gradient in solver.gradients().items().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_chunks_do_not_change_the_result(chunk):
    weights, data = draw_perturbed(SMALL)
    reference, other = Adjoint(SMALL, weights, data), Adjoint(SMALL, weights, data, chunk=chunk)
    assert reference.forward() == other.forward()
    torch.testing.assert_close(other.gradients().V, reference.gradients().V, rtol=1e-13, atol=0)
    torch.testing.assert_close(other.gradients().W, reference.gradients().W, rtol=1e-13, atol=1e-16)


def test_descend_takes_depth_times_learning_rate():
    config = dataclasses.replace(SMALL, train_ends=True, hidden_dimension=8)
    weights, data = draw_perturbed(config)
    before = weights.clone()
    solver = Adjoint(config, weights, data, chunk=2)
    solver.forward()
    gradient = solver.gradients()
    solver.descend(0.01)
    for name, factor in {"V": config.depth, "W": config.depth, "A": 1, "B": 1}.items():
        expected = getattr(before, name) - 0.01 * factor * getattr(gradient, name)
        torch.testing.assert_close(getattr(weights, name), expected, rtol=1e-12, atol=1e-15)


def test_clipped_descend_bounds_every_velocity():
    weights, data = draw_perturbed(SMALL)
    before = weights.clone()
    solver = Adjoint(SMALL, weights, data)
    solver.forward()
    velocity = solver.gradients().V * SMALL.depth
    clip = float(velocity.abs().median())
    solver.descend(0.1, clip=clip)
    torch.testing.assert_close(weights.V, before.V - 0.1 * velocity.clamp(-clip, clip))
    assert float((weights.W - before.W).abs().max()) <= 0.1 * clip * (1 + 1e-12)


def test_hidden_states_are_those_of_the_solver():
    weights, data = draw_perturbed(SMALL)
    solver = Adjoint(SMALL, weights, data)
    solver.forward()
    torch.testing.assert_close(hidden_states(SMALL, weights, data.x), solver.H, rtol=1e-13, atol=1e-14)

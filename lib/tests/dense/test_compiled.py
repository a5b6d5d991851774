"""The compiled engine of the fully connected network: the adjoint's results, for any shape and number of threads."""

import dataclasses

import pytest
import torch

from lib.activations import ACTIVATIONS
from lib.dense import compiled
from lib.dense.adjoint import Adjoint
from lib.dense.compiled import Compiled
from lib.dense.network import NetworkConfig, initialise
from lib.dense.training import make_solver, train
from lib.engine import build as engine

needs_engine = pytest.mark.skipif(engine.load()[0] is None, reason=engine.load()[1])
TOLERANCE = {"float32": 3e-5, "float64": 1e-12}
# Widths below, at and above a whole number of vectors; one sample; blocks of samples with a remainder.
SHAPES = [
    {"depth": 7, "width": 5, "dimension": 4, "samples": 6},
    {"depth": 1, "width": 1, "dimension": 1, "samples": 1},
    {"depth": 20, "width": 33, "dimension": 17, "samples": 103},
    {"depth": 9, "width": 64, "dimension": 16, "samples": 50},
    {"depth": 9, "width": 24, "dimension": 6, "samples": 70, "hidden_dimension": 10, "output_dimension": 3},
    {"depth": 5, "width": 24, "dimension": 6, "samples": 9, "hidden_dimension": 9, "train_ends": True},
]


def draw_problem(config):
    """Draw data, and weights that are neither zero nor equal."""
    weights, data = initialise(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.items().values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return weights, data


def compute_relative_error(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@needs_engine
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("activation", list(engine.ACTIVATION_CODES))
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_gradients_and_steps_are_those_of_the_adjoint(shape, activation, dtype):
    for convention in ("released", "eq3", "mean-field"):
        config = NetworkConfig(activation=activation, convention=convention, dtype=dtype, **shape)
        weights, data = draw_problem(config)
        reference, found = Adjoint(config, weights.clone(), data), Compiled(config, weights.clone(), data)
        tolerance = TOLERANCE[dtype]
        assert float(found.forward()) == pytest.approx(float(reference.forward()), rel=tolerance)
        expected = reference.gradients().items()
        for name, gradient in found.gradients().items().items():
            assert compute_relative_error(gradient, expected[name]) < tolerance, name
        before = found.weights.clone()
        found.descend(0.0)  # a rate of 0 leaves the weights as they are
        assert all(torch.equal(tensor, before.items()[name]) for name, tensor in found.weights.items().items())
        for step in (lambda s: s.descend(1e-3), lambda s: s.run(1e-3, 2), lambda s: s.run(1e-3, 2, clip=0.05)):
            step(reference), step(found)
            for name, tensor in reference.weights.items().items():
                assert compute_relative_error(found.weights.items()[name], tensor) < tolerance, name


@needs_engine
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("ends", [{}, {"train_ends": True, "hidden_dimension": 21, "output_dimension": 3}])
def test_any_number_of_threads_gives_the_same_bits_with_activations_kept_or_not(ends, dtype, monkeypatch):
    config = NetworkConfig(depth=40, width=33, dimension=17, samples=101, dtype=dtype, **ends)
    before = torch.get_num_threads()
    results = []
    try:
        for keep_bytes in (compiled.KEEP_BYTES, 0):
            monkeypatch.setattr(compiled, "KEEP_BYTES", keep_bytes)
            for threads in (1, 2, 3, 8, 1):
                torch.set_num_threads(threads)
                weights, data = draw_problem(config)
                solver = Compiled(config, weights, data)
                losses = solver.run(0.01, 3)
                solver.forward()
                # With A and B, forward uses PyTorch's products, and their bits depend on the threads.
                gradients = {} if ends else solver.gradients().items()
                results.append((losses, *weights.items().values(), *gradients.values()))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(result, results[0], strict=True))


@needs_engine
def test_whole_steps_are_forward_and_descend():
    config = NetworkConfig(depth=6, width=10, dimension=7, samples=20)
    weights, data = draw_problem(config)
    together, apart = Compiled(config, weights.clone(), data), Compiled(config, weights.clone(), data)
    losses = together.run(0.02, 5)
    for loss in losses:
        assert float(apart.forward()) == pytest.approx(float(loss), rel=1e-13)
        apart.descend(0.02)
    assert torch.equal(together.weights.V, apart.weights.V)
    assert torch.equal(together.weights.W, apart.weights.W)


@needs_engine
def test_gelu_is_accurate_everywhere():
    # One layer with W = V = 1: H_1 - H_0 = s(x), from the far tail to large values.
    for dtype, tolerance in (("float32", 1.5e-7), ("float64", 4e-16)):
        x = torch.linspace(-40, 40, 8001, dtype=getattr(torch, dtype))[:, None]
        config = NetworkConfig(depth=1, width=1, dimension=1, samples=len(x), dtype=dtype)
        weights, data = initialise(config)
        weights.V.fill_(1), weights.W.fill_(1)
        data.x, data.y = x, torch.zeros_like(x)
        solver = Compiled(config, weights, data)
        solver.forward()
        exact = x.double() + torch.nn.functional.gelu(x.double())
        assert float(((solver.output.double() - exact).abs() / (1 + x.abs())).max()) < tolerance


@needs_engine
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_far_tail_of_gelu_is_zero(dtype):
    # With one sample and W = V = 1, dl/dV = s(x) p_1 and dl/dW = x s'(x) p_1. In the far tail both must be 0, since
    # computing with subnormal numbers takes a hundred times longer.
    config = NetworkConfig(depth=1, width=1, dimension=1, samples=1, dtype=dtype)
    weights, data = initialise(config)
    weights.V.fill_(1), weights.W.fill_(1), data.y.zero_()
    for x in (-38.0, -1e20):
        data.x.fill_(x)
        solver = Compiled(config, weights, data)
        solver.forward()
        gradient = solver.gradients()
        assert solver.output.item() == pytest.approx(x, rel=1e-7)
        assert (gradient.V.item(), gradient.W.item()) == (0, 0)


@needs_engine
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflow_is_not_hidden(dtype, sign):
    # With one sample, W = sign and V = 1, z = W x overflows to an infinity of that sign.
    config = NetworkConfig(depth=1, width=1, dimension=1, samples=1, dtype=dtype)
    weights, data = initialise(config)
    large = 0.9 * torch.finfo(config.torch_dtype).max
    weights.V.fill_(1), weights.W.fill_(sign * 2), data.y.zero_(), data.x.fill_(large)
    for solver in (Compiled(config, weights, data), Adjoint(config, weights, data)):
        loss = solver.forward()
        assert loss.isnan() if sign < 0 else loss.isinf(), solver.name
        assert solver.gradients().W.isnan().all(), solver.name


@needs_engine
def test_auto_takes_the_compiled_engine_if_it_applies():
    config = NetworkConfig(depth=3, width=4, dimension=2, samples=5)
    weights, data = initialise(config)
    assert make_solver(config, weights, data).name == "compiled"
    assert make_solver(config, weights, data, "adjoint").name == "PyTorch adjoint"
    strided = dataclasses.replace(weights, W=weights.W.mT.contiguous().mT)
    assert "W is not contiguous" in compiled.find_problem(config, strided, data)
    assert make_solver(config, strided, data).name == "PyTorch adjoint"
    with pytest.raises(ValueError, match=r"The compiled engine cannot be used: W is not contiguous\."):
        make_solver(config, strided, data, "compiled")
    wide = NetworkConfig(depth=1, width=512, dimension=128, samples=20)
    assert "a layer has 65536 entries, and beyond 24576 (n = 20, float64)" in compiled.find_problem(
        wide, *initialise(wide)
    )
    assert make_solver(wide, *initialise(wide)).name == "PyTorch adjoint"


@needs_engine
def test_a_training_takes_the_same_path_with_both_engines():
    config = NetworkConfig(depth=12, width=8, dimension=5, samples=30, seed=4)
    paths = [[record.loss for record in train(config, 0.02, 40, [0, 7, 40], engine=e)] for e in ("adjoint", "compiled")]
    assert paths[0] == pytest.approx(paths[1], rel=1e-12)


def test_without_the_engine_the_adjoint_trains(monkeypatch):
    monkeypatch.setattr(engine, "load", lambda: (None, "the compiled engine is not built"))
    config = NetworkConfig(depth=3, width=4, dimension=2, samples=5)
    weights, data = initialise(config)
    assert make_solver(config, weights, data).name == "PyTorch adjoint"
    with pytest.raises(ValueError, match="cannot be used: the compiled engine is not built"):
        make_solver(config, weights, data, "compiled")


def test_gradients_of_every_activation_are_those_of_autograd():
    z = torch.linspace(-3, 3, 101, dtype=torch.float64).requires_grad_()
    for activation in ACTIVATIONS.values():
        (expected,) = torch.autograd.grad(activation.function(z).sum(), z)
        torch.testing.assert_close(activation.derivative(z.detach()), expected, rtol=1e-13, atol=1e-15)

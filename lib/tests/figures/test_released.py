"""The released profile against a textbook loop with the released conventions.

The loop is float64 autograd with `torch.optim.SGD`. It keeps the weights of all steps.
"""

import math

import pytest
import torch
import yaml

from lib import paths
from lib.dense.network import NetworkConfig
from lib.figures import figure_1_left, figure_1_right, figure_2
from lib.tables import select

TOLERANCE = 1e-5  # of the released profile's CSVs; rounding is far below


def train_textbook(depth, width, dimension, samples, seed, rate, iterations, unused_draw=False):
    """Train, and return V and W before each step and the losses: lists of length ``iterations``."""
    torch.manual_seed(seed)
    W0 = torch.randn(dimension, width)
    if unused_draw:
        torch.randn(dimension, dimension)
    X, Y = torch.randn(samples, dimension).double(), torch.randn(samples, dimension).double()
    W = W0.double().repeat(depth, 1, 1).requires_grad_()
    V = torch.zeros(depth, width, dimension, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([V, W], lr=rate * depth)
    states, losses = [], []
    for _ in range(iterations):
        h = X
        for k in range(depth):
            h = h + torch.nn.functional.gelu(h @ W[k]) @ V[k] / depth
        loss = torch.nn.functional.mse_loss(h, Y)
        states.append((V.detach().clone(), W.detach().clone()))
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return states, losses


def read_profile(name):
    return yaml.safe_load((paths.PROFILES / "released" / f"{name}.yaml").read_text())


def test_figure_1_left_is_that_of_the_textbook_loop():
    profile = read_profile("figure_1_left")
    depths, times = profile["depths"][:2], profile["iterations"][:3]
    network = NetworkConfig(width=32, dimension=16, samples=100, seed=profile["seed"])
    table = figure_1_left.compute(figure_1_left.Config(network, depths, times, 0.01, slope_from=2))["figure_1_left"]
    for depth in depths:
        states, _ = train_textbook(depth, 32, 16, 100, profile["seed"], 0.01, times[-1])
        for time in times:
            row = select(table, depth=depth, iterations=time)
            for index, Z in enumerate("VW"):
                steps = [torch.diff(state[index], dim=0) for state in states[:time]]
                aggregate = math.sqrt(sum(float(step.square().sum()) for step in steps))
                largest = max(float(step.flatten(1).norm(dim=1).max()) for step in steps)
                assert row[f"aggregate_{Z}"][0] == pytest.approx(aggregate, rel=TOLERANCE, abs=1e-15)
                assert row[f"max_distance_{Z}"][0] == pytest.approx(largest, rel=TOLERANCE, abs=1e-15)


def test_figure_1_right_is_that_of_the_textbook_loop():
    profile = read_profile("figure_1_right")
    depths, deep = profile["depths"][:3], 32
    network = NetworkConfig(width=32, dimension=16, samples=100, seed=profile["seed"])
    options = {"reference_depth": deep, "sampling": profile["sampling"], "slope_from": 2}
    config = figure_1_right.Config(network, depths, 8, **options)
    table = figure_1_right.compute(config)["figure_1_right"]
    reference, _ = train_textbook(deep, 32, 16, 100, profile["seed"], 0.01, 8)
    for depth in depths:
        states, _ = train_textbook(depth, 32, 16, 100, profile["seed"], 0.01, 8)
        for t in (3, 7):
            row = select(table, depth=depth, iteration=t)
            for index, Z in enumerate("VW"):
                gap = states[t][index] - reference[t][index][:: deep // depth]
                expected = math.sqrt(float(gap.square().sum()) / depth)
                assert row[f"distance_{Z}"][0] == pytest.approx(expected, rel=TOLERANCE)


def test_figure_2_is_that_of_the_textbook_loop():
    profile = read_profile("figure_2")
    network = NetworkConfig(depth=64, width=64, samples=50, seed=profile["seed"], draw_order="W unused X Y")
    config = figure_2.Config(network, 12, 0.005, recorded=3, row=3, column=5)
    loss, weights = figure_2.compute(config).values()
    states, losses = train_textbook(64, 64, 16, 50, profile["seed"], 0.005, 13, unused_draw=True)
    assert loss["loss"] == pytest.approx(losses, rel=TOLERANCE)
    for t in (0, 6, 12):
        rows = select(weights, iteration=t)
        for index, Z in enumerate("VW"):
            assert rows[f"entry_{Z}"] == pytest.approx(states[t][index][:, 3, 5].numpy(), rel=TOLERANCE, abs=1e-15)


def test_the_first_loss_is_the_one_of_the_released_figure_2():
    network = NetworkConfig(depth=64, width=64, samples=50, seed=0, draw_order="W unused X Y")
    loss, _ = figure_2.compute(figure_2.Config(network, 100, 0.005, recorded=2, loss_every=100)).values()
    assert loss["loss"] == pytest.approx([1.883, 0.972], abs=5e-4)

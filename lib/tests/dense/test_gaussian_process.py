"""Gaussian processes: their covariance in closed form, and one function for all depths."""

import dataclasses

import pytest
import torch

from lib.dense.gaussian_process import GaussianProcess
from lib.dense.network import NetworkConfig, initialise

CONFIG = NetworkConfig(
    depth=8, width=3, dimension=2, samples=4, initialisation="gaussian-process", initial_V="drawn", length_scale=0.3
)


@pytest.mark.parametrize("length_scale", [0.02, 0.3, 1.0, 5.0])
def test_covariance_is_squared_exponential(length_scale):
    def draw_unit_coefficients(frequencies, parts, _):
        return torch.eye(frequencies * parts, dtype=torch.float64).reshape(frequencies, parts, -1)

    s = torch.linspace(0, 1, 21, dtype=torch.float64)
    features = GaussianProcess((1,), length_scale, draw_unit_coefficients)(s)
    expected = torch.exp(-(((s[:, None] - s) / length_scale) ** 2) / 2)
    torch.testing.assert_close(features @ features.T, expected, rtol=0, atol=1e-12)


def test_a_seed_fixes_functions_that_every_depth_evaluates():
    shallow, _ = initialise(CONFIG)
    deep, _ = initialise(CONFIG.at_depth(40))
    for name in "VW":
        torch.testing.assert_close(getattr(deep, name)[4::5], getattr(shallow, name), rtol=0, atol=1e-14)
    assert not torch.equal(shallow.W[0], shallow.W[1])
    other, _ = initialise(dataclasses.replace(CONFIG, seed=1))
    assert not torch.allclose(other.W, shallow.W)


def test_data_do_not_depend_on_depth_or_initialisation():
    _, expected = initialise(CONFIG)
    for initialisation in ("weight-tied", "gaussian-process", "iid"):
        for initial_V in ("zero", "drawn"):
            config = dataclasses.replace(CONFIG, initialisation=initialisation, initial_V=initial_V, depth=5)
            weights, data = initialise(config)
            assert torch.equal(data.x, expected.x)
            assert torch.equal(data.y, expected.y)
            assert bool((weights.V == 0).all()) == (initial_V == "zero")
            tied = torch.equal(weights.W[0], weights.W[1])
            assert tied == (initialisation == "weight-tied")


def test_length_scale_must_be_positive():
    with pytest.raises(ValueError, match="length_scale is 0"):
        NetworkConfig(length_scale=0)

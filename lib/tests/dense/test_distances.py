"""Distances, ratios and slopes against exact values."""

import math

import numpy as np
import pytest
import torch

from lib.dense.distances import SuccessiveDistance, distance, left_end_distance, successive_squares
from lib.dense.network import Weights
from lib.measures import (
    integral_distance,
    layer_noise,
    noise_share,
    ratios_along_depth,
    straight_line_ratio,
    von_neumann_ratio,
)
from lib.rates import fit_slope


def draw_weights(depth, width=3, hidden=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Weights(
        V=torch.randn(depth, width, hidden, generator=generator, dtype=torch.float64),
        W=torch.randn(depth, hidden, width, generator=generator, dtype=torch.float64),
    )


def test_successive_distance_is_the_maximum_over_layers_and_times():
    states = [draw_weights(5, seed=seed) for seed in range(4)]
    running = SuccessiveDistance()
    joint, total = [], 0.0
    for weights in states:
        running.update(weights)
        for k in range(4):
            dV, dW = weights.V[k + 1] - weights.V[k], weights.W[k + 1] - weights.W[k]
            joint.append(math.sqrt(float(dV.norm() ** 2 + dW.norm() ** 2)))
            total += float(dV.norm() ** 2)
    values = running.values()
    assert values["max_distance"] == pytest.approx(max(joint), rel=1e-13)
    assert values["aggregate_V"] == pytest.approx(math.sqrt(total), rel=1e-13)
    assert max(values["max_distance_V"], values["max_distance_W"]) <= values["max_distance"]


def test_successive_distance_of_one_layer_is_zero():
    running = SuccessiveDistance()
    running.update(draw_weights(1))
    assert set(running.values().values()) == {0.0}


def test_tied_weights_have_no_successive_distance():
    weights = draw_weights(1)
    tied = Weights(weights.V.repeat(6, 1, 1), weights.W.repeat(6, 1, 1))
    assert all(float(squares.max()) == 0 for squares in successive_squares(tied))


@pytest.mark.parametrize(("L", "R"), [(2, 8), (3, 7), (6, 4), (5, 5), (1, 9)])
def test_integral_distance_equals_a_fine_riemann_sum(L, R):
    f, g = draw_weights(L, seed=1).V, draw_weights(R, seed=2).V
    cells = L * R
    fine = f.repeat_interleave(cells // L, 0) - g.repeat_interleave(cells // R, 0)
    expected = math.sqrt(float(fine.square().sum()) / cells)
    assert integral_distance(f, g) == pytest.approx(expected, rel=1e-13)
    assert integral_distance(f, g) == pytest.approx(integral_distance(g, f), rel=1e-13)


def test_sampling_rules_give_a_straight_line_its_two_distances():
    # g(s) = s on a fine grid, f its left-end value on each of L cells. The rule "left" finds the distance 0.
    # The integral finds that of a sawtooth of height 1/L, whose norm is 1/(L sqrt(3)).
    L, R = 8, 8 * 4096
    g = (torch.arange(R, dtype=torch.float64) / R).reshape(R, 1, 1)
    f = (torch.arange(L, dtype=torch.float64) / L).reshape(L, 1, 1)
    assert left_end_distance(f, g) == 0
    assert integral_distance(f, g) == pytest.approx(1 / (L * math.sqrt(3)), rel=1e-3)
    assert distance(f, g, "left") == left_end_distance(f, g)
    with pytest.raises(ValueError, match="sampling is 'right', expected one of: integral, left"):
        distance(f, g, "right")


def test_von_neumann_ratio_of_independent_layers_is_two():
    layers = torch.randn(256, 40, 40, generator=torch.Generator().manual_seed(0))
    assert von_neumann_ratio(layers) == pytest.approx(2, abs=0.02)


def test_von_neumann_ratio_of_a_smooth_curve_falls_as_the_depth_squared():
    depths = [32, 64, 128, 256, 512]
    ratios = []
    for depth in depths:
        s = torch.linspace(0, 1, depth, dtype=torch.float64)[:, None]
        ratios.append(von_neumann_ratio(torch.cat([torch.sin(3 * s), s**2 + 5], dim=1)))
    assert fit_slope(depths, ratios).slope == pytest.approx(-2, abs=0.05)


@pytest.mark.parametrize("layers", [2, 7, 32])
def test_von_neumann_ratio_of_a_straight_line(layers):
    line = torch.arange(layers, dtype=torch.float64)[:, None] * torch.tensor([3.0, -0.2]) + 1
    assert von_neumann_ratio(line) == pytest.approx(straight_line_ratio(layers))
    assert ratios_along_depth(torch.cat([line, 5 - line]), 2) == pytest.approx([straight_line_ratio(layers)] * 2)
    assert math.isnan(straight_line_ratio(1))


def test_von_neumann_ratio_is_undefined_without_variation():
    assert math.isnan(von_neumann_ratio(torch.full((9, 3), 0.1)))
    assert math.isnan(von_neumann_ratio(torch.zeros(9, 3)))
    assert math.isnan(von_neumann_ratio(torch.randn(1, 3)))


@pytest.mark.parametrize("order", [2, 8])
def test_layer_noise_is_what_was_added_to_a_smooth_curve(order):
    s = torch.linspace(0, 1, 256, dtype=torch.float64)[:, None]
    curve = torch.sin(3 * s + torch.arange(100))  # (layers, entries)
    noise = torch.randn(256, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert layer_noise(noise, order) == pytest.approx(1, rel=0.03)
    assert layer_noise(curve + 1e-3 * noise, order) == pytest.approx(1e-3, rel=0.03)


def test_layer_noise_of_a_smooth_curve_falls_as_the_depth_to_its_order():
    depths = [16, 32, 64, 128]
    curves = [torch.sin(9 * torch.linspace(0, 1, depth, dtype=torch.float64))[:, None] for depth in depths]
    assert fit_slope(depths, [layer_noise(curve, 4) for curve in curves]).slope == pytest.approx(-4, abs=0.15)
    with pytest.raises(ValueError, match="order 8 needs more than 8 layers, found 8"):
        layer_noise(torch.zeros(8, 3))


def test_noise_share_tells_noise_from_a_fast_oscillation():
    s = torch.linspace(0, 1, 256, dtype=torch.float64)[:, None]
    curve = torch.sin(2 * math.pi * 13 * s + torch.arange(100))  # 20 layers a period
    noise = torch.randn(256, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert von_neumann_ratio(curve) > 0.09
    assert noise_share(curve) < 1e-6
    assert noise_share(noise) == pytest.approx(1, rel=0.05)
    assert noise_share(curve + 0.1 * noise) == pytest.approx(0.01 / 0.51, rel=0.05)


def test_noise_share_is_undefined_without_variation_or_layers():
    assert math.isnan(noise_share(torch.full((9, 3), 0.1)))
    assert math.isnan(noise_share(torch.randn(6, 3)))
    assert math.isfinite(noise_share(torch.randn(7, 3)))


def test_a_slope_is_exact_and_its_interval_covers_the_truth():
    x = np.array([2.0, 16, 64, 256, 1024])
    exact = fit_slope(x, 3 * x**-1.0, at_least=16)
    assert (exact.slope, exact.constant) == (pytest.approx(-1), pytest.approx(3))
    rng = np.random.default_rng(0)
    inside = sum(
        (lambda fit: fit.low <= -1 <= fit.high)(fit_slope(x, x**-1.0 * np.exp(0.1 * rng.standard_normal(5))))
        for _ in range(400)
    )
    assert 0.91 < inside / 400 < 0.99  # a 95 % interval holds the truth 95 % of the time


def test_slope_without_points_says_so():
    with pytest.raises(ValueError, match="needs two points with x >= 16 and y > 0, found 1"):
        fit_slope([2, 16, 64], [1.0, 0.5, 0.0], at_least=16)


FORMS = [np.asarray, torch.tensor, list, tuple, lambda values: torch.tensor(values, requires_grad=True)]


@pytest.mark.parametrize("form", FORMS)
def test_measures_take_arrays_and_lists(form):
    depths, distances = [2.0, 4.0, 8.0, 16.0], [3.0, math.nan, 0.75, 0.375]
    assert fit_slope(form(depths), form(distances)).slope == pytest.approx(-1)
    line = torch.linspace(0, 1, 20, dtype=torch.float64).tolist()
    assert von_neumann_ratio(form(line)) == pytest.approx(straight_line_ratio(20))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fit_slope([2, 4, 8], [1, 0.5]), "A slope needs as many y as x, found 3 x and 2 y"),
        (lambda: fit_slope([4, 4], [1, 2]), "A slope needs two different x, found 4 alone"),
        (lambda: fit_slope([0, 4], [1, 2]), "A slope needs two points"),
        (lambda: fit_slope([2, 4], [1, math.inf]), "A slope needs finite numbers, found 1 infinite"),
        (lambda: fit_slope([2, 4], None), "y is None, expected a tensor"),
        (lambda: fit_slope(["a", "b"], [1, 2]), "x is a list that is not an array of real numbers"),
        (lambda: von_neumann_ratio(None), "weights is None"),
        (
            lambda: von_neumann_ratio(3.0),
            r"weights is torch.float64 of the shape \(\), expected real",
        ),
        (lambda: von_neumann_ratio(torch.ones(3) * 1j), "weights is torch.complex64"),
    ],
)
def test_wrong_arguments_of_measures_are_named(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()

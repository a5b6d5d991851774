"""The experiments on the theory, small: rates, bounds and closed forms that the tables must show."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lib.dense import limit, spectral
from lib.dense.limit import LIMIT
from lib.dense.network import NetworkConfig, Weights, hidden_states, initialise
from lib.dense.training import train
from lib.figures import clipping, initialisation, long_time, neural_ode
from lib.figures.long_time import polyak_lojasiewicz_ratio
from lib.figures.neural_ode import scipy_output, uniform_distance
from lib.measures import fit_slope
from lib.tables import from_rows, select

SMALL = NetworkConfig(width=6, dimension=4, samples=10, seed=3)
TRAINED_ENDS = NetworkConfig(
    depth=8, width=12, dimension=4, output_dimension=3, hidden_dimension=7, samples=5, convention="eq3",
    train_ends=True, target_scale=0.5, seed=1,
)  # fmt: skip


BESIDE = neural_ode.Config(SMALL, [8, 16, 32, 64], [0, 10, 20], 0.05, inputs=20, tolerance=1e-7)
LONG = long_time.Config(TRAINED_ENDS, [2, 8], [0, 1], [4, 8, 16], 10, 60, 0.05, recorded=7)
CASES = initialisation.Config(dataclasses.replace(SMALL, convention="eq3"), [16, 32, 64, 128], [0.5], 5, tolerance=1e-4)


def last(records):
    *_, record = records
    return record


# --- The neural ODE ---


@pytest.fixture(scope="module")
def beside_ode():
    return neural_ode.compute(BESIDE)


@pytest.mark.parametrize("name", ["discretised", "weights", "hidden_states", "output", "scipy"])
def test_errors_beside_the_neural_ode_have_slope_minus_one(beside_ode, name):
    errors = beside_ode["neural_ode"]
    rows = select(errors, iteration=20)
    assert fit_slope(rows["depth"], rows[name], 16).slope == pytest.approx(-1, abs=0.1)


def test_networks_start_on_the_neural_ode(beside_ode):
    errors = beside_ode["neural_ode"]
    start = select(errors, iteration=0)
    for name in ("weights", "hidden_states", "output", "discretised"):
        assert start[name].max() < 1e-12
    assert np.isnan(start["scipy"]).all()


def test_shown_states_start_at_the_inputs_and_reach_the_outputs(beside_ode):
    errors, states = beside_ode["neural_ode"], beside_ode["neural_ode_states"]
    assert sorted(set(states["depth"])) == [LIMIT, 16, 64]
    for number in range(5):
        at_zero = select(states, input=number, s=0.0)["value"]
        assert at_zero == pytest.approx([at_zero[0]] * 3, abs=1e-12)
        limit_end, *ends = select(states, input=number, s=1.0)["value"]
        for depth, end in zip((16, 64), ends, strict=True):
            assert abs(end - limit_end) <= select(errors, iteration=20, depth=depth)["output"][0] + 1e-9


def test_neural_ode_figure_draws_its_table(beside_ode):
    errors = beside_ode["neural_ode"]
    figure = neural_ode.draw(beside_ode, BESIDE)
    drawn = next(line for line in figure.axes[1].lines if line.get_label() == neural_ode.ERRORS["output"])
    assert list(drawn.get_ydata()) == list(select(errors, iteration=20)["output"])


def test_uniform_distance_looks_at_both_ends_of_a_cell():
    """V(s) = s, W(s) = 0: layers at the right ends, k/L, are 1/L off at the left end of their cell."""
    grid = spectral.grid_of(4)
    ode = limit.TrainedODE(SMALL, grid, Weights(grid.s[:, None, None], torch.zeros(4, 1, 1, dtype=torch.float64)))
    layers = torch.arange(1, 6, dtype=torch.float64)[:, None, None] / 5
    assert uniform_distance(ode, Weights(layers, torch.zeros_like(layers))) == pytest.approx(1 / 5)


def test_scipy_solves_the_constant_linear_ode():
    config = dataclasses.replace(SMALL, depth=3, activation="identity", initial_V="drawn")
    weights, data = initialise(config)
    expected = data.x @ torch.linalg.matrix_exp(weights.W[0] @ weights.V[0])
    size = float(expected.abs().max())
    torch.testing.assert_close(scipy_output(config, weights, data.x), expected, rtol=0, atol=1e-5 * size)


# --- Long times ---


def test_ratio_is_the_sum_of_squared_gradients_over_the_loss():
    config = dataclasses.replace(TRAINED_ENDS, initialisation="iid", initial_V="drawn")
    record = last(train(config, 0.1, 0))
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in record.weights.items().items()}
    weights = Weights(**tensors)
    data = record.solver.data
    h = data.x @ weights.A
    for V, W in zip(weights.V, weights.W, strict=True):
        h = h + config.outer_scale * torch.nn.functional.gelu(config.inner_scale * h @ W) @ V
    loss = (h @ weights.B - data.y).square().sum() / config.samples
    gradients = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    squares = {name: float(gradient.square().sum()) for name, gradient in gradients.items()}
    expected = squares["A"] + squares["B"] + config.depth * (squares["V"] + squares["W"])
    assert polyak_lojasiewicz_ratio(record) == pytest.approx(expected / loss.item(), rel=1e-10)


def test_ratio_of_networks_converges_to_that_of_the_limit():
    iterations = 20
    exact = polyak_lojasiewicz_ratio(last(limit.train(TRAINED_ENDS, 0.05, iterations, [iterations])))
    depths = (8, 16, 32, 64)
    errors = []
    for depth in depths:
        record = last(train(TRAINED_ENDS.at_depth(depth), 0.05, iterations, [iterations]))
        errors.append(abs(polyak_lojasiewicz_ratio(record) - exact))
    assert fit_slope(depths, errors).slope == pytest.approx(-1, abs=0.15)


@pytest.fixture(scope="module")
def trained_long():
    return long_time.compute(LONG)


def test_curves_hold_every_run(trained_long):
    ratios, curves, weights, nearness = (
        trained_long[f"long_time{name}"] for name in ("", "_depths", "_weights", "_limit")
    )
    for width in (2, 8):
        for seed in (0, 1):
            rows = select(ratios, width=width, seed=seed)
            assert rows["iteration"][[0, -1]].tolist() == [0, 10]
            assert (rows["ratio"] > 0).all()
    for depth in (LIMIT, 4, 8, 16):
        rows = select(curves, depth=depth)
        assert rows["time"][-1] == pytest.approx(60 * 0.05)
        assert (np.diff(rows["loss"]) < 0).all()
        assert len(select(weights, depth=depth)["s"]) == (depth or 101)
    finite = {name: np.asarray(column)[1:] for name, column in nearness.items()}
    assert fit_slope(finite["depth"], finite["distance_V"]).slope == pytest.approx(-1, abs=0.1)
    # The loss, (1/n) sum of squared residuals, lies between the largest squared residual over n and that residual.
    end_loss, residual = select(curves, depth=16)["loss"][-1], select(nearness, depth=16)["residual"][0]
    assert residual**2 / TRAINED_ENDS.samples <= end_loss <= residual**2


def test_long_time_figure_draws_its_tables(trained_long):
    curves = trained_long["long_time_depths"]
    figure = long_time.draw(trained_long, LONG)
    loss = figure.axes[2].lines[1]
    assert list(loss.get_ydata()) == list(select(curves, depth=4)["loss"])


def test_long_time_figure_draws_every_depth_there_is():
    depths = [LIMIT, 2, 4, 8, 16, 32, 64, 128]
    curves = from_rows({"depth": L, "time": t, "loss": 2.0**-t} for L in depths for t in (0.0, 1.0))
    weights = from_rows({"depth": L, "s": k / 2, "entry_V": 0.0} for L in depths for k in range(L or 3))
    ratios = from_rows({"width": 2, "seed": 0, "time": t, "ratio": 0.1} for t in (0.0, 1.0))
    data = {"long_time": ratios, "long_time_depths": curves, "long_time_weights": weights}
    loss = long_time.draw(data, LONG).axes[2]
    assert loss.get_legend_handles_labels()[1] == [r"$L=\infty$", *(f"$L={L}$" for L in depths[1:])]


# --- Initialisations ---


@pytest.fixture(scope="module")
def initialisations():
    return initialisation.compute(CASES)


@pytest.mark.parametrize("case", ["weight-tied", "Gaussian process 0.5"])
def test_smooth_initialisations_stay_smooth(initialisations, case):
    table = initialisations["initialisation"]
    rows = select(table, case=case, iteration=5)
    for name in ("successive", "distance", "variation"):
        assert fit_slope(rows["depth"], rows[name]).slope == pytest.approx(-1, abs=0.1), name


def test_independent_layers_stay_rough(initialisations):
    table = initialisations["initialisation"]
    for case, variation in (("iid", -1), ("iid 1/sqrt(L)", 0)):
        rows = select(table, case=case, iteration=5)
        # Two independent standard Gaussian Z differ by the square root of twice their number of entries.
        typical = math.sqrt(2 * 2 * SMALL.width * SMALL.dimension)
        assert rows["distance"][:-1] == pytest.approx([typical] * 3, rel=0.15)
        assert fit_slope(rows["depth"], rows["successive"]).slope == pytest.approx(0, abs=0.15)
        assert fit_slope(rows["depth"], rows["variation"]).slope == pytest.approx(variation, abs=0.3)


def test_variation_is_that_of_the_hidden_states(initialisations):
    table = initialisations["initialisation"]
    config = dataclasses.replace(SMALL, convention="eq3", initialisation="iid", initial_V="drawn", depth=16)
    weights, data = initialise(config)
    states = hidden_states(config, weights, data.x)
    expected = sum(float((after - before).square().sum()) for before, after in pairwise(states))
    found = select(table, case="iid", iteration=0, depth=16)["variation"][0]
    assert found == pytest.approx(expected / SMALL.samples, rel=1e-7)


def test_initialisation_figure_draws_its_table(initialisations):
    figure = initialisation.draw(initialisations, CASES)
    rows = select(initialisations["initialisation"], case="weight-tied", iteration=5)
    assert any(list(line.get_ydata()) == list(rows["successive"]) for line in figure.axes[0].lines)


# --- Clipping ---


def test_clipping_figure_draws_every_clip_there_is():
    config = clipping.Config(SMALL, [0.01 * k for k in range(8)], [4, 8], 2, 0.05, recorded=2)
    figure = clipping.draw(clipping.compute(config), config)
    assert len(figure.axes[0].lines) == 8


def test_clipping_bounds_every_change_and_hardly_touches_a_high_ceiling():
    config = clipping.Config(SMALL, [0.0, 0.01, 100.0], [8, 16], 20, 0.05, recorded=5)
    data = clipping.compute(config)
    table = data["clipping"]
    clipped, free, high = (select(table, clip=clip) for clip in (0.01, 0.0, 100.0))
    assert (clipped["change"] <= 0.01 * clipped["time"] * (1 + 1e-12)).all()
    assert clipped["change"].max() == pytest.approx(0.01 * 20 * 0.05)  # some entry moves at the bound throughout
    assert (free["change"] > clipped["change"])[free["time"] > 0].all()
    for name in ("norm_V", "norm_W", "lipschitz", "change", "loss"):
        assert high[name] == pytest.approx(free[name], rel=1e-12)
    for depth in (8, 16):
        for name in ("norm_V", "norm_W", "lipschitz", "change"):  # largest so far
            assert (np.diff(select(table, clip=0.01, depth=depth)[name]) >= 0).all()
    figure = clipping.draw(data, config)
    assert list(figure.axes[0].lines[1].get_ydata()) == list(select(table, clip=0.01, iteration=20)["norm_V"])


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match="an entry of clips is -1"):
        clipping.Config(SMALL, [-1.0], [2], 5)
    with pytest.raises(TypeError, match=r"clips is \[\], expected a non-empty list of numbers"):
        clipping.Config(SMALL, [], [2], 5)
    with pytest.raises(ValueError, match=r"clips is \[0.01, 0.01\], expected numbers without repeats"):
        clipping.Config(SMALL, [0.01, 0.01], [2], 5)
    with pytest.raises(ValueError, match=r"activation is 'relu', which is not C\^2 .* expected one of: gelu, tanh"):
        neural_ode.Config(dataclasses.replace(SMALL, activation="relu"), [16, 32], [0, 5])
    with pytest.raises(ValueError, match="target_scale is 0"):
        long_time.Config(dataclasses.replace(TRAINED_ENDS, target_scale=0), [2], [0], [4], 5, 5)
    with pytest.raises(ValueError, match="an entry of length_scales is 0"):
        initialisation.Config(SMALL, [2, 4], [0.0], 5)
    with pytest.raises(ValueError, match="slope_from is 16, which leaves fewer than two"):
        initialisation.Config(SMALL, [2, 4], [0.5], 5)
    with pytest.raises(ValueError, match="inputs is 0"):
        neural_ode.Config(SMALL, [2, 4], [0, 5], inputs=0)

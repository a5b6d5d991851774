"""The mean ODE: its scaling, distances of small networks to it, and fits with known answers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lib.dense import limit
from lib.dense.network import NetworkConfig, Weights, initialise
from lib.dense.training import train
from lib.figures import mean_limit
from lib.figures.mean_limit import MEAN, OWN, Config
from lib.rates import compute_root_mean_squares, fit_slope, fit_slope_in_depth, fit_two_terms
from lib.tables import from_rows, select

NETWORK = NetworkConfig(
    dimension=3, samples=6, convention="mean-field", initialisation="iid", initial_V="drawn", seed=2
)


def make_config(**changes):
    sizes = {"depths": [4, 8, 16, 32], "widths": [2, 16], "seeds": 6, "iterations": 6, "reference_depth": 256,
             "reference_width": 32, "most_units": 256, "recorded": 2, "slope_from": 4}  # fmt: skip
    return Config(NETWORK, **sizes | changes)


# --- The scaling ---


def test_a_network_of_doubled_units_trains_as_the_single_ones():
    """Two copies of every unit have the same mean over units, and each copy moves as the single unit."""
    single = dataclasses.replace(NETWORK, depth=5, width=4)
    weights, data = initialise(single)
    doubled = Weights(torch.cat([weights.V, weights.V], dim=1), torch.cat([weights.W, weights.W], dim=2))
    *_, one = train(single, 0.3, 10, start=(weights, data))
    *_, two = train(dataclasses.replace(single, width=8), 0.3, 10, start=(doubled, data))
    assert two.loss == pytest.approx(one.loss, rel=1e-12)
    torch.testing.assert_close(two.weights.V[:, :4], one.weights.V, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(two.weights.W[:, :, 4:], one.weights.W, rtol=1e-10, atol=1e-12)


def test_the_limit_of_given_data_is_that_of_networks_with_these_data():
    tied = dataclasses.replace(NETWORK, initialisation="weight-tied", width=3)
    _, data = initialise(dataclasses.replace(NETWORK, seed=9, width=3, depth=1))
    *_, exact = limit.train(tied, 0.3, 6, [6], data=data)
    errors = []
    for depth in (8, 16, 32):
        weights, _ = initialise(tied.at_depth(depth))
        *_, record = train(tied.at_depth(depth), 0.3, 6, start=(weights, data))
        errors.append(abs(record.loss - exact.loss))
    assert fit_slope((8, 16, 32), errors).slope == pytest.approx(-1, abs=0.1)


# --- The experiment ---


@pytest.fixture(scope="module")
def data():
    return mean_limit.compute(make_config())


@pytest.mark.slow
def test_rates_are_a_half_from_independent_and_one_from_equal_layers(data):
    end = select(data["mean_limit"], iteration=6)
    for quantity in ("output", "hidden_states"):
        iid = fit_slope_in_depth(end, quantity, 4, initialisation="iid", width=2)
        tied = fit_slope_in_depth(end, quantity, 4, initialisation="weight-tied", reference=OWN)
        assert iid.slope == pytest.approx(-0.5, abs=0.2)
        assert iid.low < iid.slope < iid.high
        assert tied.slope == pytest.approx(-1, abs=0.2)
    start = select(data["mean_limit"], iteration=0, initialisation="iid", depth=16)
    narrow, wide = (np.mean(select(start, width=m)["output"]) for m in (2, 16))
    assert narrow / wide == pytest.approx(math.sqrt(8), rel=0.5)


def test_every_network_is_there_with_every_draw(data):
    table = select(data["mean_limit"], iteration=6, reference=MEAN)
    columns = (np.asarray(table[name]).tolist() for name in ("initialisation", "width", "depth"))
    sizes = set(zip(*columns, strict=True))
    assert sizes == {("iid", m, L) for m in (2, 16) for L in (4, 8, 16, 32) if L * m <= 256} | {
        ("weight-tied", 2, L) for L in (4, 8, 16, 32)
    }
    assert all(len(select(table, width=m, depth=L, initialisation=kind)["seed"]) == 6 for kind, m, L in sizes)
    states = data["mean_limit_states"]
    assert sorted(set(states["depth"])) == [0, 4, 32]
    assert {len(select(states, depth=L, input=0)["s"]) for L in (4, 32)} == {5, 33}


@pytest.mark.slow
def test_the_figure_draws_its_table(data):
    figure = mean_limit.draw(data, make_config())
    points = compute_root_mean_squares(
        select(data["mean_limit"], iteration=6), "output", initialisation="iid", width=16
    )
    drawn = [list(line.get_ydata()) for line in figure.axes[3].lines]
    assert any(np.allclose(points["value"], line, rtol=1e-6) for line in drawn if len(line) == len(points["value"]))


# --- Fits ---


def test_a_fit_of_two_terms_finds_their_coefficients():
    a, b = 0.5, 2.0
    rows = [
        {"depth": L, "width": m, "seed": seed, "output": math.sqrt((a / L) ** 2 + b**2 / (L * m)), "kind": "iid"}
        for L in (8, 32, 128) for m in (4, 64, 1024) for seed in (1, 2, 3)
    ]  # fmt: skip
    fit = fit_two_terms(from_rows(rows), "output", kind="iid")
    assert (fit.a, fit.b, fit.residual) == (pytest.approx(a), pytest.approx(b), pytest.approx(0, abs=1e-9))
    assert fit.crossover == pytest.approx(a**2 / b**2)
    assert fit.value(fit.crossover * 64, 64) == pytest.approx(math.sqrt(2) * a / (fit.crossover * 64))


def test_without_a_term_in_the_width_the_two_are_never_equal():
    rows = [
        {"depth": L, "width": m, "seed": seed, "output": 0.5 / L * (1 + m / 1e4), "kind": "iid"}
        for L in (8, 32, 128) for m in (4, 64, 1024) for seed in (1, 2, 3)
    ]  # fmt: skip
    fit = fit_two_terms(from_rows(rows), "output", kind="iid")
    assert fit.b == 0
    assert fit.crossover == math.inf


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("distance", [0.0, math.nan])
def test_a_slope_over_a_missing_or_zero_distance_is_nan(distance):
    rows = [{"depth": L, "seed": seed, "output": 1 / L, "width": 4} for L in (8, 16, 32) for seed in range(3)]
    rows[4]["output"] = distance
    fit = fit_slope_in_depth(from_rows(rows), "output", 8, width=4)
    assert fit.seeds == 3
    assert all(map(math.isnan, (fit.slope, fit.low, fit.high, fit.fit_low, fit.fit_high)))


def test_intervals_come_from_the_seeds():
    random = np.random.default_rng(3)
    rows = [
        {"depth": L, "width": 4, "seed": seed, "output": abs(random.standard_normal()) * L**-0.5}
        for L in (8, 16, 32, 64) for seed in range(20)
    ]  # fmt: skip
    fit = fit_slope_in_depth(from_rows(rows), "output", 8, width=4)
    assert fit.low < -0.5 < fit.high
    assert 0.05 < fit.high - fit.low < 0.6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 1}, "seeds is 1, expected a whole number of at least 2"),
        ({"depths": [8, 12], "slope_from": 8}, "A depth is 12, expected multiples of the smallest, 8"),
        ({"most_units": 60}, "most_units is 60, which leaves no network of width 16: expected at least 64"),
    ],
)
def test_wrong_values_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_config(**changes)


def test_other_networks_are_refused():
    for changes, sentence in (
        ({"convention": "eq3"}, "convention is 'eq3', expected one of: mean-field"),
        ({"hidden_dimension": 5}, "A and B that are not the identity"),
        ({"residual_scaling": "1/sqrt(L)"}, "residual_scaling is"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Config(dataclasses.replace(NETWORK, **changes), [4, 8], [2], 2, 5, slope_from=4, reference_depth=8)

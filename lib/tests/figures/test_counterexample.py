"""Appendix D's example against autograd and its closed form."""

import math

import numpy as np
import pytest
import torch

from lib.figures import relu_counterexample
from lib.rates import fit_slope
from lib.tables import select

CONFIG = relu_counterexample.Config([4, 8, 16, 32], [2.0, 4.0], ["relu", "gelu"], 400)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_step_follows_the_gradient(activation):
    """Two steps of dw_k/dt = -2L dl/dw_k from the initial weights, by autograd."""
    L, factor, eta, x = 3, 2.0, 0.05, 0.7
    s = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]
    w = torch.tensor([(-1) ** k / (2 * L) for k in range(1, 2 * L + 1)], dtype=torch.float64)
    for _ in range(2):
        w.requires_grad_()
        h = torch.tensor(x, dtype=torch.float64)
        for weight in w:
            h = h + s(weight * h) / (2 * L)
        (gradient,) = torch.autograd.grad((h - factor * x) ** 2, w)
        w = (w - eta * 2 * L * gradient).detach()
    _, found, _ = relu_counterexample.train(L, torch.tensor([1.5, factor], dtype=torch.float64), activation, 2, eta, x)
    torch.testing.assert_close(found[:, 1], w, rtol=1e-12, atol=1e-14)


def test_closed_form_solves_its_equation():
    for L in (1, 5, 400):
        for factor in (1.1, 3.0):
            star = relu_counterexample.limit_weight(L, factor)
            assert (1 + star / (2 * L)) ** L == pytest.approx(factor, rel=1e-12)
            assert star >= 2 * math.log(factor)


@pytest.fixture(scope="module")
def data():
    return relu_counterexample.compute(CONFIG)


@pytest.mark.slow
def test_relu_ends_at_the_closed_form(data):
    rows = select(data["relu_counterexample"], activation="relu")
    assert np.abs(rows["even"] - rows["limit_weight"]).max() < 1e-9
    assert rows["even_spread"].max() < 1e-12
    assert rows["odd_moved"].max() == 0
    # Neighbours end w* + 1/(2L) apart, which is above 2 log C at every depth.
    assert rows["end"] == pytest.approx(rows["limit_weight"] + 1 / rows["depth"], rel=1e-7)
    assert rows["loss"].max() < 1e-12


def test_gelu_stays_smooth(data):
    for factor in (2.0, 4.0):
        rows = select(data["relu_counterexample"], activation="gelu", factor=factor)
        assert fit_slope(rows["depth"], rows["end"], 16).slope == pytest.approx(-1, abs=0.1)
        assert rows["loss"].max() < 1e-12


def test_figure_draws_its_tables(data):
    weights = data["relu_counterexample_weights"]
    figure = relu_counterexample.draw(data, CONFIG)
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx(select(weights, activation="relu")["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("names", [["gelu"], ["tanh", "relu", "gelu"]])
def test_figure_has_a_panel_for_each_activation(names):
    config = relu_counterexample.Config([8, 16], [1.5, 2.0], names, 10)
    data = relu_counterexample.compute(config)
    weights = data["relu_counterexample_weights"]
    *across, compared = relu_counterexample.draw(data, config).axes
    for panel, name in zip(across, names, strict=True):
        assert list(panel.lines[0].get_ydata()) == pytest.approx(select(weights, activation=name)["weight"])
    assert len({panel.get_ylim() for panel in across}) == 1
    curves = [line for line in compared.lines if line.get_linestyle() != "None"]
    assert len(curves) == 2 * len(names)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ([], ValueError),
        (["relu", "relu"], ValueError),
        ([5], TypeError),
        ([["gelu"]], TypeError),
        ("relu", TypeError),
    ],
)
def test_activations_are_a_list_of_different_names(names, error):
    with pytest.raises(error, match=r"activations is .*, expected"):
        relu_counterexample.Config([8, 16], [2.0], names, 10)


def test_a_factor_below_one_is_refused():
    with pytest.raises(ValueError, match=r"an entry of factors is 1\.0, expected C > 1"):
        relu_counterexample.Config([4], [1.0], ["relu"], 10)

"""Networks as ODEs: orders of solvers, and gradients with states that are computed backwards."""

import math

import numpy as np
import pytest
import torch

from lib import tables
from lib.cifar import dataset, measured, records
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.dense.branch import dense_branch, dense_layers
from lib.dense.network import NetworkConfig, hidden_states, initialise
from lib.dense.training import train
from lib.figures import reversible as reversible_room
from lib.figures import solvers as solvers_room
from lib.ode import reversible
from lib.ode import solvers as ode
from lib.rates import fit_slope


def make_smooth(depth):
    """Branch, layers and inputs of a fully connected network whose layers are cosines of s."""
    config = NetworkConfig(depth=depth, width=8, dimension=4, samples=5, initial_V="drawn", initialisation="iid")
    weights, data = initialise(config.at_depth(1))
    s = torch.arange(depth, dtype=torch.float64)[:, None, None] / depth
    layers = 0.3 * weights.V * torch.cos(3 * s), weights.W * torch.cos(2 * s + 1)
    return dense_branch(config), layers, data.x


def make_rough(depth):
    """The same with independent layers."""
    config = NetworkConfig(depth=depth, width=8, dimension=4, samples=5, initial_V="drawn", initialisation="iid")
    weights, data = initialise(config)
    return dense_branch(config), (0.3 * weights.V, weights.W), data.x


def test_eulers_method_in_as_many_steps_is_the_network():
    config = NetworkConfig(depth=16, width=8, dimension=4, samples=5, convention="eq3", initial_V="drawn")
    weights, data = initialise(config)
    branch, layers = dense_branch(config), dense_layers(weights)
    expected = hidden_states(config, weights, data.x)[-2]
    torch.testing.assert_close(ode.run_network(branch, layers, data.x), expected)
    torch.testing.assert_close(ode.LayersODE(branch, layers).solve(data.x, "Euler", 15), expected)


@pytest.mark.parametrize(("method", "order"), [("Euler", 1), ("Heun", 2), ("RK4", 4)])
def test_solvers_have_their_orders(method, order):
    branch, layers, x = make_smooth(64)
    table = ode.measure_solver_errors(branch, layers, x, [8, 16, 32, 64])
    rows = tables.select(table, method=method)
    assert -fit_slope(rows["steps"], rows["error"]).slope == pytest.approx(order, abs=0.25)
    assert rows["evaluations"].tolist() == [ode.count_evaluations(method, steps) for steps in (8, 16, 32, 64)]


def test_parameters_are_those_of_the_layers_and_not_extrapolated():
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    Z = ode.LayersODE(lambda h, layer: h, [layers])
    found = torch.stack([Z.layer(k / 31)[0] for k in range(32)])
    torch.testing.assert_close(found, layers)


def test_the_network_is_1_over_L_from_its_ode():
    depths = (16, 32, 64)
    errors = [ode.measure_solver_errors(*make_smooth(depth), [2], reference_steps=64)["error"][0] for depth in depths]
    assert fit_slope(depths, errors).slope == pytest.approx(-1, abs=0.1)


def test_the_adaptive_solver_takes_as_many_steps_as_it_needs():
    calls, errors = [], []
    for tolerance in (1e-2, 1e-8):
        table = ode.measure_solver_errors(*make_smooth(64), [2], [tolerance], reference_steps=256)
        row = tables.select(table, method=ode.ADAPTIVE)
        calls.append(row["evaluations"][0])
        errors.append(row["error"][0])
    assert calls[0] < calls[1]
    assert errors[1] < 1e-6 < errors[0] < 0.1


def test_wrong_values_are_named():
    branch, layers, x = make_smooth(4)
    with pytest.raises(ValueError, match="'Adams', expected one of: Euler, Heun, RK4"):
        ode.LayersODE(branch, layers).solve(x, "Adams", 4)
    with pytest.raises(ValueError, match="steps is 0"):
        ode.LayersODE(branch, layers).solve(x, "Euler", 0)
    with pytest.raises(ValueError, match="'RK4', expected one of: Euler, Heun"):
        reversible.forward("RK4", branch, layers, x)


def mean_square(h):
    return h.square().mean()


@pytest.mark.parametrize("method", reversible.METHODS)
def test_with_stored_states_gradients_are_exact(method):
    branch, layers, x = make_rough(6)
    found = reversible.compute_gradients(method, branch, layers, x, mean_square, stored=True)
    leaves = [layer.clone().requires_grad_() for layer in layers]
    state = x.clone().requires_grad_()
    steps = 6 if method == "Euler" else 5
    h = state
    for k in range(steps):
        first = branch(h, [leaf[k] for leaf in leaves])
        if method == "Euler":
            h = h + first / steps
        else:
            h = h + (first + branch(h + first / steps, [leaf[k + 1] for leaf in leaves])) / (2 * steps)
    expected = torch.autograd.grad(mean_square(h), [state, *leaves])
    for gradient, other in zip((found.state, *found.layers), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert torch.equal(found.start, x)


@pytest.mark.parametrize(
    ("layers_of", "method", "order"),
    [(make_smooth, "Euler", -1), (make_smooth, "Heun", -3), (make_rough, "Euler", -1), (make_rough, "Heun", -1)],
)
def test_errors_of_gradients_with_states_computed_backwards_have_their_orders(layers_of, method, order):
    depths, errors = (16, 32, 64, 128), []
    for depth in depths:
        exact, found = (
            reversible.compute_gradients(method, *layers_of(depth), mean_square, stored) for stored in (True, False)
        )
        errors.append(reversible.relative_errors(found, exact))
    for quantity in ("state", "gradient"):
        slope = fit_slope(depths, [error[quantity] for error in errors]).slope
        # Slopes of random layers are random too, but far from the -3 of smooth layers with Heun's method.
        assert slope == pytest.approx(order, abs=0.2 if layers_of is make_smooth else 0.7)


def test_gradients_of_a_convolutional_network_are_closer_with_heun_and_depth():
    network = ConvResNet(ConvNetConfig(depth=8)).eval()
    with torch.no_grad():
        network.residual_layers.bn2_weight.fill_(0.5)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 32, 32), generator=generator).to(torch.uint8)
    rows = measured.reversible_rows(network, dataset.Images(pixels, torch.tensor([3, 5])), [8, 4])
    assert [(row["method"], row["layers"]) for row in rows] == [("Euler", 8), ("Heun", 8), ("Euler", 4), ("Heun", 4)]
    assert 0 < rows[1]["gradient"] < rows[0]["gradient"] < rows[2]["gradient"] < 0.5


@pytest.mark.slow
def test_the_figures_of_solvers_and_of_gradients_draw_their_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.paths.CHECKPOINTS", tmp_path)  # no tables: fully connected networks alone
    network = NetworkConfig(depth=16, width=8, dimension=4, samples=10)
    config = solvers_room.Config(network, 20, 0.01, [4, 8, 15, 16], [1e-2], order_from=4)
    data = solvers_room.compute(config)
    orders = data["solvers_orders"]
    first = {row["method"]: row["order"] for row in tables.rows(orders)[:3]}
    assert [round(order) for order in first.values()] == [1, 2, 4]
    assert tables.select(data["solvers"], method="Euler", steps=15)["error_network"].max() < 1e-12  # L - 1 steps
    assert solvers_room.draw(data, config).axes[0].get_title() == "GELU, weight-tied"
    config = reversible_room.Config(network, [4, 8], 20, slope_from=4)
    data = reversible_room.compute(config)
    dense = data["reversible"]
    assert data["reversible_cifar"] == {}
    low, high = reversible_room.compare_gradient_with_state(dense)
    ratios = np.divide(dense["gradient"], dense["state"])
    assert (low, high) == (ratios.min(), ratios.max())
    worse = dense | {"state": np.ones(len(ratios))}
    assert np.isnan(reversible_room.compare_gradient_with_state(worse)).all()
    assert reversible_room.fit_error_slope(dense, "weight-tied", "Euler", 4).slope == pytest.approx(-1, abs=0.2)
    figure = reversible_room.draw(data, config)
    rows = tables.select(dense, initialisation="weight-tied", method="Euler")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), rows["gradient"], rtol=1e-7)
    assert "make measure" in figure.axes[1].texts[0].get_text()


def test_solvers_of_higher_order_are_closer_to_the_ode_of_a_trained_network():
    config = NetworkConfig(depth=32, width=16, dimension=8, samples=10)
    (record,) = train(config, 0.01, 50, [50])
    errors = ode.measure_solver_errors(
        dense_branch(config), dense_layers(record.weights), initialise(config)[1].x, [8], reference_steps=128
    )
    by_method = dict(zip(errors["method"], errors["error"], strict=True))
    assert by_method["RK4"] < by_method["Heun"] < by_method["network"] < by_method["Euler"]
    assert math.isclose(errors["error_network"][0], 0)
    assert records.read_measured("solvers").keys() >= {"run", "method"}

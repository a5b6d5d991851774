"""The bounds on trained networks: their constants, and that they are above what is measured."""

import dataclasses

import numpy as np
import pytest
import torch

from lib.dense import gronwall
from lib.dense.limit import TrainedODE
from lib.dense.network import NetworkConfig, Weights, hidden_states, initialise
from lib.dense.spectral import get_grid
from lib.figures import bounds
from lib.tables import select

CONFIG = NetworkConfig(
    depth=8, width=6, dimension=3, output_dimension=2, hidden_dimension=5, samples=5, convention="eq3",
    train_ends=True, target_scale=0.5, seed=1,
)  # fmt: skip
RUN = bounds.Config(CONFIG, 0.02, 40, 0.05, recorded=5, seeds=2, inputs=20)


def test_suprema_of_derivatives_are_those_of_the_closed_forms():
    assert gronwall.suprema("identity") == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    # tanh'' = -2 tanh (1 - tanh^2) is largest at tanh^2 = 1/3.
    assert gronwall.suprema("tanh") == (pytest.approx(1), pytest.approx(4 / 27**0.5, rel=1e-4))
    slope, bend = gronwall.suprema("gelu")
    assert slope == pytest.approx(1.1289, abs=1e-4)
    assert bend == pytest.approx(2 / (2 * np.pi) ** 0.5, rel=1e-4)


def test_bounds_known_before_training_are_above_the_sizes_at_the_start():
    start, data = initialise(CONFIG)
    measured = dataclasses.asdict(gronwall.measure_sizes(CONFIG, start, data))
    known = dataclasses.asdict(gronwall.bound_sizes(CONFIG, start, data, clip=0.1, time=0.0))
    assert all(known[name] >= value - 1e-12 for name, value in measured.items())
    assert known["W"] == pytest.approx(measured["W"])


def test_one_step_of_the_bound_covers_one_step_of_the_flow():
    """One step of gradient descent without clipping, from layers that are far from equal."""
    from lib.dense.distances import successive_squares
    from lib.dense.training import train

    config = dataclasses.replace(CONFIG, initialisation="gaussian-process", initial_V="drawn")
    start, data = initialise(config)
    before = [config.depth * float(squares.max().sqrt()) for squares in successive_squares(start)]
    sizes = gronwall.measure_sizes(config, start, data)
    bound = gronwall.advance(config, sizes, *before, 0.05)
    *_, record = train(config, 0.05, 1)
    after = [config.depth * float(squares.max().sqrt()) for squares in successive_squares(record.weights)]
    assert all(now <= most for now, most in zip(after, bound, strict=True))
    assert bound[0] > before[0]


def test_the_euler_constant_of_a_linear_ode_is_reached_to_a_factor():
    """dH/ds = a H with a constant: the error of L steps is e^a a^2 / (2 L) to first order, and C = a (e^a - 1) / 2."""
    config = NetworkConfig(depth=4, width=1, dimension=1, samples=1, activation="identity", output_dimension=1,
                           hidden_dimension=2, train_ends=True)  # fmt: skip
    grid, one = get_grid(8), torch.ones(8, 1, 1, dtype=torch.float64)
    ends = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    a = 0.5
    V, W = torch.cat([a * one, 0 * one], dim=2), torch.cat([one, 0 * one], dim=1)
    ode = TrainedODE(config, grid, Weights(V, W, ends, ends.mT.clone()))
    x = torch.ones(1, 1, dtype=torch.float64)
    constant = gronwall.euler_constant(ode, x)
    assert constant == pytest.approx(0.5 * a * np.exp(a) * np.expm1(a), rel=1e-4)
    for depth in (4, 64):
        network = ode.network(depth)
        states = hidden_states(config.at_depth(depth), network, x)
        assert abs(float(states[-1, 0, 0]) - np.exp(a)) * depth <= constant


@pytest.fixture(scope="module")
def table():
    return {name: np.array(column) for name, column in bounds.compute(RUN)["bounds"].items()}


@pytest.mark.parametrize("bound", ["M", "K", "C"])
def test_upper_bounds_are_above_the_measured_values(table, bound):
    rows = select(table, bound=bound)
    for kind in ("own", "prior"):
        finite = np.isfinite(rows[kind])
        assert (rows["measured"][finite] <= rows[kind][finite]).all()
    assert (rows["measured"] > 0).all()


def test_the_rate_is_above_the_constant_of_the_pl_condition(table):
    rows = select(table, bound="rate")
    assert (rows["measured"] >= rows["own"]).all()


def test_bounds_known_before_training_are_not_below_those_of_the_runs_norms(table):
    rows = select(table, bound="K")
    assert (rows["own"] <= rows["prior"]).all()
    powers = bounds.compute_least_margin(table, "K", "prior", max(rows["time"]))
    ends = select(rows, time=max(rows["time"]))
    assert powers == pytest.approx(np.min(np.log10(ends["prior"] / ends["measured"])))


@pytest.mark.parametrize(("bound", "kind"), [("M", "prior"), ("K", "own"), ("rate", "own")])
def test_a_violated_bound_is_seen(table, bound, kind):
    """A bound violated in one seed at one time has a negative margin, and a cross in its panel."""
    end = max(table["time"])
    kept = bounds.draw({"bounds": table}, RUN).axes[list(bounds.TITLES).index(bound)]
    one = (table["bound"] == bound) & (table["time"] == end) & (table["seed"] == min(table["seed"]))
    scale = table[kind][one] / table["measured"][one] * (2 if bound != "rate" else 0.5)
    violated = table | {"measured": np.where(one, table["measured"] * np.resize(scale, len(one)), table["measured"])}
    assert bounds.compute_least_margin(table, bound, kind, end) > 0
    assert bounds.compute_least_margin(violated, bound, kind, end) == pytest.approx(-np.log10(2))
    panel = bounds.draw({"bounds": violated}, RUN).axes[list(bounds.TITLES).index(bound)]
    (cross,) = [line for line in panel.lines if line.get_marker() == "X"]
    assert list(cross.get_xdata()) == [end]
    assert not [line for line in kept.lines if line.get_marker() == "X"]


@pytest.mark.slow
def test_the_figure_draws_medians_over_the_seeds(table):
    figure = bounds.draw({"bounds": table}, RUN)
    for panel, bound in zip(figure.axes, bounds.TITLES, strict=True):
        rows = select(table, bound=bound)
        expected = [np.median(select(rows, time=time)["measured"]) for time in np.unique(rows["time"])]
        assert list(panel.lines[0].get_ydata()) == pytest.approx(expected, rel=1e-7)


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="train_ends is False"):
        dataclasses.replace(RUN, network=NetworkConfig(depth=2, width=2, dimension=2, samples=2))
    with pytest.raises(ValueError, match="activation is 'softplus', expected one that is 0 at 0"):
        dataclasses.replace(RUN, network=dataclasses.replace(CONFIG, activation="softplus"))
    with pytest.raises(ValueError, match="clip is 0"):
        dataclasses.replace(RUN, clip=0.0)
    with pytest.raises(ValueError, match="target_scale is 0"):
        dataclasses.replace(RUN, network=dataclasses.replace(CONFIG, target_scale=0))

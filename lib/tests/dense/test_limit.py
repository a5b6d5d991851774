"""The limit solver against closed forms, an independent ODE solver, deep networks and more nodes."""

import dataclasses
import math
import warnings
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

from lib.dense import limit, spectral
from lib.dense.network import Data, NetworkConfig, Weights, hidden_states, initialise, outputs
from lib.dense.training import train
from lib.figures import figure_1_right
from lib.rates import fit_slope

SMALL = NetworkConfig(width=6, dimension=4, samples=10, seed=3)
GENERAL = dataclasses.replace(
    SMALL, convention="eq3", hidden_dimension=7, output_dimension=3, train_ends=True,
    initialisation="gaussian-process", initial_V="drawn", length_scale=0.4,
)  # fmt: skip


def take_last(records):
    *_, record = records
    return record


def train_limit(config, iterations, **options):
    return take_last(limit.train(config, 0.05, iterations, [iterations], **options))


# --- The grid ---


def test_grid_integrates_differentiates_and_interpolates_polynomials_exactly():
    grid = spectral.Grid(9)
    points = torch.linspace(0, 1, 11, dtype=torch.float64)
    for degree in range(9):
        f = grid.s**degree
        torch.testing.assert_close(grid.from_zero @ f, grid.s ** (degree + 1) / (degree + 1), rtol=0, atol=1e-14)
        torch.testing.assert_close(grid.to_one @ f, (1 - grid.s ** (degree + 1)) / (degree + 1), rtol=0, atol=1e-14)
        slope = degree * grid.s ** max(degree - 1, 0)
        torch.testing.assert_close(grid.derivative @ f, slope, rtol=0, atol=1e-11)
        torch.testing.assert_close(grid.interpolation(points) @ f, points**degree, rtol=0, atol=1e-14)
    assert torch.equal(grid.interpolation(grid.s), torch.eye(9, dtype=torch.float64))


@pytest.mark.parametrize("depth", [1, 2, 7, 64, 1000])
def test_distance_to_a_network_is_exact_for_polynomials(depth):
    """If layers are the means of s^p over their cells, the distance is the variation within the cells."""
    nodes, power = 12, 11  # the highest power that the nodes hold, whose square has the highest degree
    grid = spectral.get_grid(nodes)
    edges = torch.arange(depth + 1, dtype=torch.float64) / depth
    # The variation is the integral of s^(2p) minus that of the squared means, in fractions. The layers are the means
    # plus ``offset``.
    exact_means = [
        Fraction(depth, power + 1) * (Fraction(k + 1, depth) ** (power + 1) - Fraction(k, depth) ** (power + 1))
        for k in range(depth)
    ]
    variation = Fraction(1, 2 * power + 1) - sum(mean**2 for mean in exact_means) / depth
    offset = 1e-3
    ode = limit.TrainedODE(SMALL, grid, Weights(V=(grid.s**power)[:, None, None], W=grid.s[:, None, None]))
    means = torch.tensor([float(mean) for mean in exact_means], dtype=torch.float64)
    network = Weights(V=(means + offset)[:, None, None], W=(edges[:-1])[:, None, None])
    distances = ode.distance_to_network(network)
    assert distances["V"] == pytest.approx(math.sqrt(float(variation) + offset**2), rel=1e-12)
    # W(s) = s and its left ends: each cell adds the integral of u^2 over [0, 1/L].
    assert distances["W"] == pytest.approx(1 / (math.sqrt(3) * depth), rel=1e-12)
    assert ode.distance_to_network(network, "left")["W"] == pytest.approx(0, abs=1e-15)


# --- The solution ---


def test_scalar_linear_network_follows_its_closed_form():
    """d = m = 1, s = identity: H P does not depend on s, so V and W stay constant and H(1) = x exp(V W)."""
    config = NetworkConfig(width=1, dimension=1, samples=3, activation="identity", initial_V="drawn", seed=5)
    weights, data = initialise(config.at_depth(1))
    v, w = weights.V.item(), weights.W.item()
    record = train_limit(config, 40, tolerance=1e-10)
    x, y = data.x[:, 0], data.y[:, 0]
    for _ in range(40):
        end = x * math.exp(v * w)
        common = 0.05 * float((2 * (end - y) / 3 * end).sum())
        v, w = v - w * common, w - v * common
    assert record.ode.weights.V[:, 0, 0].tolist() == pytest.approx([v] * record.nodes, rel=1e-9)
    assert record.ode.weights.W[:, 0, 0].tolist() == pytest.approx([w] * record.nodes, rel=1e-9)
    assert record.loss == pytest.approx(float((x * math.exp(v * w) - y).square().mean()), rel=1e-9)


def test_hidden_states_of_constant_linear_weights_are_the_matrix_exponential():
    config = dataclasses.replace(SMALL, activation="identity", initial_V="drawn")
    solver = spectral.SpectralSolver(config, 16)
    ode = limit.TrainedODE(config, solver.grid, solver.weights)
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    A = solver.weights.W[0] @ solver.weights.V[0]
    expected = torch.stack([x @ torch.linalg.matrix_exp(t * A) for t in s])
    torch.testing.assert_close(ode.hidden_states(x, s), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [SMALL, GENERAL], ids=["released", "general"])
def test_output_agrees_with_an_independent_solver(config):
    ode = train_limit(config, 20, tolerance=1e-9).ode
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = x if ode.weights.A is None else x @ ode.weights.A
    scale = 1.0 if config.convention == "released" else 1 / math.sqrt(config.width)

    def compute_right_side(s, h):
        Z = ode.weights_at(torch.tensor([s], dtype=torch.float64))
        h = torch.from_numpy(h).reshape(start.shape)
        return (scale * torch.nn.functional.gelu(config.inner_scale * h @ Z.W[0]) @ Z.V[0]).flatten().numpy()

    solution = solve_ivp(compute_right_side, (0, 1), start.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    end = torch.from_numpy(solution.y[:, -1]).reshape(start.shape)
    expected = end if ode.weights.B is None else end @ ode.weights.B
    torch.testing.assert_close(ode(x), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["V", "W", "A", "B"])
def test_gradient_is_the_derivative_of_the_loss(name):
    """Along a smooth direction D the loss changes by the integral of <gradient, D> (float64 differences)."""

    def compute_loss(step):
        solver = spectral.SpectralSolver(GENERAL, 40)
        tensor = getattr(solver.weights, name)
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(tensor.shape[-2:], generator=generator, dtype=torch.float64)
        if name in "VW":
            direction = torch.cos(3 * solver.grid.s)[:, None, None] * direction
        tensor += step * direction
        return float(solver.forward()), solver, direction

    loss, solver, direction = compute_loss(0.0)
    product = getattr(solver.gradients(), name) * direction
    expected = product.sum()
    if name in "VW":
        expected = solver.grid.quadrature @ product.sum(dim=(1, 2))
    step = 1e-4
    difference = (compute_loss(step)[0] - compute_loss(-step)[0]) / (2 * step)
    assert difference == pytest.approx(float(expected), rel=1e-6)
    assert loss > 0


@pytest.mark.slow
def test_more_nodes_converge_spectrally():
    reference = spectral.SpectralSolver(SMALL, 48, picard_tolerance=1e-14)
    reference.run(0.05, 60)
    errors = []
    for nodes in (4, 8, 16, 32):
        solver = spectral.SpectralSolver(SMALL, nodes, picard_tolerance=1e-14)
        solver.run(0.05, 60)
        errors.append(limit._difference(solver, reference))
    # An algebraic order p would gain the same factor 2^-p from each doubling. Here the gain grows.
    first, second, third = (after / before for before, after in pairwise(errors))
    assert second < 0.2 * first
    assert third < 0.01 * second
    assert errors[-1] < 1e-12


@pytest.mark.slow
def test_tolerance_is_met_and_reported():
    reference = train_limit(SMALL, 60, tolerance=1e-11)
    for tolerance in (1e-3, 1e-6, 1e-9):
        record = train_limit(SMALL, 60, tolerance=tolerance)
        assert record.error <= tolerance
        assert limit._difference(record.solver, reference.solver) <= record.error
    assert reference.nodes > spectral.FIRST_NODES  # nodes were added during training


@pytest.mark.slow
def test_missed_tolerance_is_said():
    with pytest.warns(limit.ToleranceMissed, match=r"accurate to .* with 16 nodes, expected 1\.0e-10"):
        record = train_limit(SMALL, 60, tolerance=1e-10, max_nodes=16)
    assert record.error > 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_limit(SMALL, 60, tolerance=1e-6)


def test_a_record_does_not_depend_on_the_other_records():
    whole = {record.iteration: record.loss for record in limit.train(SMALL, 0.05, 12, tolerance=1e-8)}
    assert list(whole) == list(range(13))
    assert take_last(limit.train(SMALL, 0.05, 12, [12], tolerance=1e-8)).loss == pytest.approx(whole[12], rel=1e-10)


def test_records_cost_no_solutions_and_no_sweeps(monkeypatch):
    """Records with gradients at every step take as many solutions and Picard sweeps as one record at the end."""
    sweeps = []
    integrals, states = spectral._picard, []

    def count_solution(right_side, start, *arguments):
        def count_sweep(f):
            sweeps.append(1)
            return right_side(f)

        states.append(1)
        return integrals(count_sweep, start, *arguments)

    monkeypatch.setattr(spectral, "_picard", count_solution)
    monkeypatch.setattr(limit, "CHECK_EVERY", 1)  # compare the two solutions at each step in both cases
    counts = []
    for recorded in ([40], range(41)):
        for record in limit.train(SMALL, 0.05, 40, recorded, tolerance=1e-4):
            record.gradients()
        counts.append((len(states), len(sweeps)))
        states.clear()
        sweeps.clear()
    assert counts[0] == counts[1]


def test_given_data_are_prepared_as_those_of_a_network():
    _, data = initialise(SMALL)
    missing = data.x.clone()
    missing[3, 1] = math.nan
    for sentence, wrong in {
        r"y is \(9, 4\), expected \(n, d'\) = \(10, 4\)": Data(data.x, data.y[:9]),
        r"x is \(9, 4\), expected \(n, d\) = \(10, 4\)": Data(data.x[:9], data.y[:9]),
        r"x is \(10, 3\), expected \(n, d\) = \(10, 4\)": Data(data.x[:, :3], data.y),
        r"x holds nan in row 3, column 1": Data(missing, data.y),
    }.items():
        with pytest.raises(ValueError, match=sentence):
            limit.train(SMALL, 0.1, 1, data=wrong)
    with pytest.raises(TypeError, match=r"data is tuple, expected Data as in data=Data\(x, y\)"):
        limit.train(SMALL, 0.1, 1, data=(data.x, data.y))
    line = dataclasses.replace(SMALL, dimension=1)
    _, data = initialise(line)
    assert train_limit(line, 1, data=Data(data.x[:, 0], data.y[:, 0])).loss == train_limit(line, 1).loss


def test_configurations_without_a_limit_are_refused():
    iid = dataclasses.replace(SMALL, initialisation="iid")
    for ask in (lambda: limit.train(iid, 0.1, 1), lambda: figure_1_right.Config(iid, [16, 32], 2, reference="limit")):
        with pytest.raises(ValueError, match="not functions of s: expected 'weight-tied' or 'gaussian-process'"):
            ask()  # before anything is trained
    with pytest.raises(ValueError, match="not an ordinary differential equation: expected '1/L'"):
        train_limit(dataclasses.replace(SMALL, residual_scaling="1/sqrt(L)"), 1)
    with pytest.raises(ValueError, match="expected them within 0 to 5"):
        limit.train(SMALL, 0.1, 5, [6])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_gives_the_same_limit():
    configs = (dataclasses.replace(GENERAL, device=device) for device in ("cuda", "cpu"))
    record, expected = (train_limit(config, 20, tolerance=1e-8) for config in configs)
    assert record.loss == pytest.approx(expected.loss, rel=1e-10)
    torch.testing.assert_close(record.ode.weights.V.cpu(), expected.ode.weights.V, rtol=1e-8, atol=1e-10)
    network = expected.ode.network(9)
    distances = expected.ode.distance_to_network(network)
    assert record.ode.distance_to_network(network.to("cuda")) == pytest.approx(distances, rel=1e-8)
    x = expected.solver.data.x
    torch.testing.assert_close(record.ode(x).cpu(), expected.ode(x), rtol=1e-8, atol=1e-8)


# --- Networks and their limit ---


@pytest.mark.parametrize(
    ("config", "clip"),
    [(SMALL, 0.0), (GENERAL, 0.0), (dataclasses.replace(SMALL, activation="tanh"), 0.05)],
    ids=["released", "general", "clipped"],
)
def test_networks_converge_at_rate_one_over_depth(config, clip):
    iterations = 25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", limit.ToleranceMissed)  # clipping leaves kinks in s
        record = train_limit(config, iterations, clip=clip, tolerance=1e-7, max_nodes=80)
    depths = (16, 32, 64, 128)
    errors = {"V": [], "W": [], "output": []}
    for depth in depths:
        network = config.at_depth(depth)
        weights = take_last(train(network, 0.05, iterations, [iterations], clip=clip)).weights
        for name, distance in record.ode.distance_to_network(weights).items():
            errors[name].append(distance)
        x = record.solver.data.x
        output = outputs(weights, hidden_states(network, weights, x))
        errors["output"].append(float((output - record.ode(x)).norm()))
    for name, error in errors.items():
        assert fit_slope(depths, error).slope == pytest.approx(-1, abs=0.1), name
        assert error[-1] > 10 * record.error or clip  # the limit is known better than the distances to it


def test_steepness_is_the_limit_of_depth_times_successive_distance():
    steepness = train_limit(SMALL, 25, tolerance=1e-7).ode.steepness()
    weights = take_last(train(SMALL.at_depth(512), 0.05, 25, [25])).weights
    squares = sum(torch.diff(Z, dim=0).square().sum(dim=(1, 2)) for Z in (weights.V, weights.W))
    assert 512 * float(squares.max().sqrt()) == pytest.approx(steepness, rel=1e-2)


@pytest.mark.slow
def test_distances_on_the_problem_of_figure_1():
    """n = 100, d = 16, m = 32, seed 0, 50 iterations: distances at L = 64 by three ways to compare."""
    config = NetworkConfig(depth=64)
    ode = take_last(limit.train(config, 0.01, 50, [50], tolerance=1e-6)).ode
    weights = take_last(train(config, 0.01, 50, [50])).weights
    assert ode.distance_to_network(weights)["V"] == pytest.approx(1.53e-3, rel=5e-3)
    assert ode.distance_to_network(weights, "left")["V"] == pytest.approx(2.12e-3, rel=5e-3)
    midpoints = ode.weights_at((torch.arange(64) + 0.5) / 64)
    assert float((weights.V - midpoints.V).norm()) / 8 == pytest.approx(1.20e-3, rel=5e-3)


@pytest.mark.parametrize("sampling", ["integral", "left"])
def test_reference_of_figure_1_right_agrees_with_a_deep_network(sampling):
    """Distances to the limit and to a deep network differ by at most the deep network's own distance."""
    network = dataclasses.replace(SMALL, seed=0)
    deep = 512
    common = {"network": network, "depths": [4, 16, 64], "iterations": 21, "every": 5, "sampling": sampling}
    by_limit = figure_1_right.compute(figure_1_right.Config(**common, reference="limit", tolerance=1e-8))[
        "figure_1_right"
    ]
    by_network = figure_1_right.compute(figure_1_right.Config(**common, reference="network", reference_depth=deep))[
        "figure_1_right"
    ]
    ode = take_last(limit.train(network, 0.01, 20, [20], tolerance=1e-8)).ode
    weights = take_last(train(network.at_depth(deep), 0.01, 20, [20])).weights
    accuracy = ode.distance_to_network(weights, sampling)
    for name in "VW":
        rows = zip(by_limit[f"distance_{name}"], by_network[f"distance_{name}"], strict=True)
        differences = [abs(first - second) for first, second in rows]
        # Sampling at left ends adds the reference's own step, at most its steepness over its depth.
        slack = 1e-12 + (ode.steepness() / deep if sampling == "left" else 0)
        assert 0 < max(differences) <= accuracy[name] + slack

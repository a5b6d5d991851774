"""The experiments on the theory at a small size: rates, bounds and closed forms."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lib.dense import limit, lojasiewicz, spectral
from lib.dense.limit import LIMIT
from lib.dense.network import NetworkConfig, Weights, hidden_states, initialise
from lib.dense.training import train
from lib.figures import clipping, initialisation, long_time, neural_ode, pl_condition
from lib.figures.neural_ode import solve_with_scipy
from lib.rates import fit_slope
from lib.tables import from_rows, select

SMALL = NetworkConfig(width=6, dimension=4, samples=10, seed=3)
TRAINED_ENDS = NetworkConfig(
    depth=8, width=12, dimension=4, output_dimension=3, hidden_dimension=7, samples=5, convention="eq3",
    train_ends=True, target_scale=0.5, seed=1,
)  # fmt: skip


BESIDE = neural_ode.Config(SMALL, [8, 16, 32, 64], [0, 10, 20], 0.05, inputs=20, tolerance=1e-7, seeds=2)
LONG = long_time.Config(TRAINED_ENDS, [4, 8, 16], 60, 0.05, recorded=7, seeds=2)
CLIPPED = clipping.Config(TRAINED_ENDS, [0.0, 0.02, 100.0], [8, 16, 32], 20, 0.05, recorded=5, seeds=2, inputs=10)
NARROW_AND_WIDE = pl_condition.Config(
    dataclasses.replace(TRAINED_ENDS, dimension=3, output_dimension=2, hidden_dimension=5, samples=6),
    [1, 24], [0.05, 0.5], 2, 100, 0.05, recorded=6,
)  # fmt: skip
CASES = initialisation.Config(
    dataclasses.replace(SMALL, convention="eq3"), [16, 32, 64, 128], [0.5], 5, tolerance=1e-4, seeds=2
)


def take_last(records):
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
    for seed in (3, 4):
        of_seed = select(rows, seed=seed)
        assert fit_slope(of_seed["depth"], of_seed[name], 16).slope == pytest.approx(-1, abs=0.1)


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
            assert abs(end - limit_end) <= select(errors, seed=3, iteration=20, depth=depth)["output"][0] + 1e-9


def test_neural_ode_figure_draws_its_table(beside_ode):
    errors = beside_ode["neural_ode"]
    figure = neural_ode.draw(beside_ode, BESIDE)
    drawn = next(line for line in figure.axes[1].lines if line.get_label() == neural_ode.ERRORS["output"])
    assert list(drawn.get_ydata()) == list(select(errors, seed=3, iteration=20)["output"])


def test_uniform_distance_takes_both_ends_of_a_cell():
    """V(s) = s, W(s) = 0: layers at the right ends, k/L, are 1/L off at the left end of their cell."""
    grid = spectral.get_grid(4)
    ode = limit.TrainedODE(SMALL, grid, Weights(grid.s[:, None, None], torch.zeros(4, 1, 1, dtype=torch.float64)))
    layers = torch.arange(1, 6, dtype=torch.float64)[:, None, None] / 5
    assert ode.uniform_distance(Weights(layers, torch.zeros_like(layers))) == pytest.approx(1 / 5)


def test_scipy_solves_the_constant_linear_ode():
    config = dataclasses.replace(SMALL, depth=3, activation="identity", initial_V="drawn")
    weights, data = initialise(config)
    expected = data.x @ torch.linalg.matrix_exp(weights.W[0] @ weights.V[0])
    size = float(expected.abs().max())
    torch.testing.assert_close(solve_with_scipy(config, weights, data.x), expected, rtol=0, atol=1e-5 * size)


# --- Long times ---


def test_ratio_is_the_sum_of_squared_gradients_over_the_loss():
    config = dataclasses.replace(TRAINED_ENDS, initialisation="iid", initial_V="drawn")
    record = take_last(train(config, 0.1, 0))
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
    assert lojasiewicz.ratio(record) == pytest.approx(expected / loss.item(), rel=1e-10)


def test_ratio_of_networks_converges_to_that_of_the_limit():
    iterations = 20
    exact = lojasiewicz.ratio(take_last(limit.train(TRAINED_ENDS, 0.05, iterations, [iterations])))
    depths = (8, 16, 32, 64)
    errors = []
    for depth in depths:
        record = take_last(train(TRAINED_ENDS.at_depth(depth), 0.05, iterations, [iterations]))
        errors.append(abs(lojasiewicz.ratio(record) - exact))
    assert fit_slope(depths, errors).slope == pytest.approx(-1, abs=0.15)


@pytest.fixture(scope="module")
def trained_long():
    return long_time.compute(LONG)


def test_losses_fall_weights_converge_and_residuals_fit_the_loss(trained_long):
    curves, weights, nearness = (trained_long[f"long_time{name}"] for name in ("", "_weights", "_limit"))
    finite = {name: np.asarray(column)[np.array(nearness["depth"]) > 0] for name, column in nearness.items()}
    for seed in (1, 2):
        for depth in (LIMIT, 4, 8, 16):
            rows = select(curves, seed=seed, depth=depth)
            assert rows["time"][-1] == pytest.approx(60 * 0.05)
            assert (np.diff(rows["loss"]) < 0).all()
        of_seed = select(finite, seed=seed)
        assert fit_slope(of_seed["depth"], of_seed["distance_V"]).slope == pytest.approx(-1, abs=0.1)
        # The loss, (1/n) sum of squared residuals, lies between the largest squared residual over n and that residual.
        end_loss = select(curves, seed=seed, depth=16)["loss"][-1]
        residual = select(nearness, seed=seed, depth=16)["residual"][0]
        assert residual**2 / TRAINED_ENDS.samples <= end_loss <= residual**2
    assert {depth: len(select(weights, depth=depth)["s"]) for depth in (LIMIT, 4)} == {LIMIT: 101, 4: 4}


def test_rates_are_those_of_an_exponential():
    curves = from_rows({"seed": 0, "depth": 4, "time": t, "loss": math.exp(-0.3 * t)} for t in np.arange(20.0))
    assert long_time.fit_rates({name: np.array(column) for name, column in curves.items()})[0, 4] == pytest.approx(0.3)


def test_long_time_figure_draws_its_tables(trained_long):
    curves = trained_long["long_time"]
    figure = long_time.draw(trained_long, LONG)
    assert list(figure.axes[0].lines[1].get_ydata()) == list(select(curves, seed=1, depth=4)["loss"])


def test_ratios_are_drawn_as_long_as_the_loss_is_resolved(trained_long):
    curves = {name: np.array(column) for name, column in trained_long["long_time"].items()}
    late = curves["iteration"] >= 40
    curves["loss"] = np.where(late, 1e-3 * long_time.ROUNDING * curves["loss"][0], curves["loss"])
    for line in long_time.draw(trained_long | {"long_time": curves}, LONG).axes[1].lines:
        assert max(line.get_xdata()) == pytest.approx(30 * 0.05)


def test_long_time_figure_draws_every_depth_of_its_table():
    depths = [LIMIT, 2, 4, 8, 16, 32, 64, 128]
    curves = from_rows({"seed": 0, "depth": L, "time": t, "loss": 2.0**-t, "ratio": 1.0} for L in depths
                       for t in (0.0, 1.0))  # fmt: skip
    weights = from_rows({"depth": L, "s": k / 2, "entry_V": 0.0} for L in depths for k in range(L or 3))
    loss = long_time.draw({"long_time": curves, "long_time_weights": weights}, LONG).axes[0]
    assert loss.get_legend_handles_labels()[1] == [r"$L=\infty$", *(f"$L={L}$" for L in depths[1:])]


# --- The PL condition ---


@pytest.fixture(scope="module")
def condition():
    return {name: np.array(column) for name, column in pl_condition.compute(NARROW_AND_WIDE)["pl_condition"].items()}


def test_the_pl_condition_fails_in_narrow_networks_and_holds_in_wide_ones(condition):
    """m = 1 is less than n - d = 3; 24 is more than n = 6."""
    small = select(condition, target_scale=0.05)
    assert pl_condition.judge_part(select(small, width=1)) == -math.inf
    assert pl_condition.judge_part(select(small, width=24)) >= 0
    assert (select(condition, width=1)["mu_start"] == 0).all()
    assert (select(condition, width=24)["mu_start"] > 1e-6).all()


def test_the_ratio_is_never_below_the_constant(condition):
    assert (condition["ratio"] >= condition["mu"]).all()
    shares = sum(condition[f"of_{name}"] for name in "AZB")
    assert shares == pytest.approx(np.ones(len(shares)), abs=1e-4)


def test_the_pl_figure_draws_medians_over_the_seeds(condition):
    figure = pl_condition.draw({"pl_condition": condition}, NARROW_AND_WIDE)
    image = np.ma.filled(figure.axes[0].collections[0].get_array(), 0).reshape(2, 2)
    for i, scale in enumerate((0.05, 0.5)):
        for j, width in enumerate((1, 24)):
            expected = np.median(select(condition, target_scale=scale, width=width)["ratio"])
            assert image[i, j] == pytest.approx(expected, rel=1e-7)


# --- Initialisations ---


@pytest.fixture(scope="module")
def initialisations():
    return initialisation.compute(CASES)


@pytest.mark.parametrize("case", ["weight-tied", "Gaussian process 0.5"])
def test_training_adds_smooth_weights_to_smooth_layers(initialisations, case):
    table = initialisations["initialisation"]
    for seed in (3, 4):
        rows = select(table, seed=seed, case=case)
        for name in ("successive", "distance", "variation"):
            assert fit_slope(rows["depth"], rows[name]).slope == pytest.approx(-1, abs=0.1), name


def test_training_adds_rough_weights_to_independent_layers(initialisations):
    table = initialisations["initialisation"]
    for case, variation in (("iid", -1), ("iid 1/sqrt(L)", 0)):
        rows = select(table, seed=3, case=case)
        # Differences of independent layers are about sqrt(2) times as large as the layers.
        assert (rows["successive"] > 1).all()
        assert fit_slope(rows["depth"], rows["successive"]).slope == pytest.approx(0, abs=0.2)
        assert fit_slope(rows["depth"], rows["variation"]).slope == pytest.approx(variation, abs=0.4)


def test_slopes_of_independent_networks_leave_the_deepest_out(initialisations):
    independent = select(initialisations["initialisation"], case="iid")
    seeds = [select(independent, seed=seed) for seed in (3, 4)]
    fitted = [fit_slope(run["depth"][:-1], run["output"][:-1]).slope for run in seeds]
    slopes = initialisation.fit_slopes(initialisations["initialisation"], "iid", 16)
    assert slopes["output"].slope == pytest.approx(np.mean(fitted))
    assert all(math.isfinite(slope.slope) for slope in slopes.values())


def test_what_training_adds_is_the_change_of_the_weights(initialisations):
    config = dataclasses.replace(CASES.cases["iid"], depth=16)
    start, data = initialise(config)
    end = take_last(train(config, CASES.learning_rate, 5)).weights
    moved = torch.cat([(end.V - start.V).flatten(1), (end.W - start.W).flatten(1)], dim=1)
    row = select(initialisations["initialisation"], seed=3, case="iid", depth=16)
    size = float(moved.norm(dim=1).square().mean().sqrt())
    assert row["size"][0] == pytest.approx(size, rel=1e-7)
    assert row["successive"][0] == pytest.approx(float(moved.diff(dim=0).norm(dim=1).max()) / size, rel=1e-7)
    change = hidden_states(config, end, data.x) - hidden_states(config, start, data.x)
    expected = sum(float((after - before).square().sum()) for before, after in pairwise(change)) / config.samples
    assert row["variation"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_initialisation_figure_draws_its_table(initialisations):
    figure = initialisation.draw(initialisations, CASES)
    rows = select(initialisations["initialisation"], case="weight-tied")
    expected = [np.exp(np.log(select(rows, depth=depth)["successive"]).mean()) for depth in CASES.depths]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx(expected, rel=1e-7)


# --- Clipping ---


@pytest.fixture(scope="module")
def clipped():
    return {name: np.array(column) for name, column in clipping.compute(CLIPPED)["clipping"].items()}


def test_clipped_networks_converge_to_the_limit_of_the_clipped_flow(clipped):
    end = select(clipped, iteration=20)
    for seed in (1, 2):
        for clip in CLIPPED.clips:
            rows = select(end, seed=seed, clip=clip)
            for name in clipping.CONVERGING:
                assert fit_slope(rows["depth"], rows[name]).slope == pytest.approx(-1, abs=0.15), name


def test_a_high_clip_changes_nothing_and_a_low_one_bounds_every_entry(clipped):
    low, free, high = (select(clipped, clip=clip) for clip in (0.02, 0.0, 100.0))
    for name in (*clipping.NORMS, "lipschitz", "loss"):
        assert high[name] == pytest.approx(free[name], rel=1e-12)
    assert (high["clipped"] == 0).all()
    assert low["clipped"].max() > 0.1
    start, _ = initialise(TRAINED_ENDS)
    end = take_last(train(TRAINED_ENDS, 0.05, 20, [20], clip=0.02)).weights
    moved = max(float((getattr(end, name) - values).abs().max()) for name, values in start.items().items())
    assert moved == pytest.approx(0.02 * 20 * 0.05)  # some entry moves at the bound in every step


def test_the_largest_so_far_never_falls(clipped):
    table = clipping.maximise_so_far(clipped, "weights")
    for seed in (1, 2):
        path = select(table, seed=seed, clip=0.02, depth=16)["weights"]
        assert (np.diff(path) >= 0).all()
        assert path[-1] == select(clipped, seed=seed, clip=0.02, depth=16)["weights"].max()


def test_clipping_figure_draws_medians_of_every_clip(clipped):
    figure = clipping.draw({"clipping": clipped}, CLIPPED)
    table = select(clipping.maximise_so_far(clipped, "norm_V"), clip=0.02, iteration=20)
    expected = [np.median(select(table, depth=depth)["norm_V"]) for depth in CLIPPED.depths]
    assert list(figure.axes[0].lines[1].get_ydata()) == pytest.approx(expected, rel=1e-7)


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="an entry of clips is -1"):
        clipping.Config(TRAINED_ENDS, [-1.0], [2], 5)
    with pytest.raises(TypeError, match=r"clips is \[\], expected a non-empty list of numbers"):
        clipping.Config(TRAINED_ENDS, [], [2], 5)
    with pytest.raises(ValueError, match=r"clips is \[0.01, 0.01\], expected numbers without repeats"):
        clipping.Config(TRAINED_ENDS, [0.01, 0.01], [2], 5)
    with pytest.raises(ValueError, match=r"activation is 'relu', which is not C\^2 .* expected one of: gelu, tanh"):
        neural_ode.Config(dataclasses.replace(SMALL, activation="relu"), [16, 32], [0, 5])
    with pytest.raises(ValueError, match="target_scale is 0"):
        long_time.Config(dataclasses.replace(TRAINED_ENDS, target_scale=0), [4], 5)
    with pytest.raises(ValueError, match="an entry of length_scales is 0"):
        initialisation.Config(SMALL, [2, 4], [0.0], 5)
    with pytest.raises(ValueError, match="slope_from is 16, which leaves fewer than two"):
        initialisation.Config(SMALL, [2, 4], [0.5], 5)
    with pytest.raises(ValueError, match="inputs is 0"):
        neural_ode.Config(SMALL, [2, 4], [0, 5], inputs=0)
    with pytest.raises(ValueError, match="train_ends is False, expected True"):
        clipping.Config(SMALL, [0.01], [2, 4], 5)
    with pytest.raises(ValueError, match="samples is 5, expected more than d = 5"):
        pl_condition.Config(dataclasses.replace(TRAINED_ENDS, dimension=5, hidden_dimension=8), [2], [0.1], 2, 5)
    with pytest.raises(ValueError, match=r"train_ends is True and q is 6, expected True and at least d \+ d' = 7"):
        pl_condition.Config(dataclasses.replace(TRAINED_ENDS, hidden_dimension=6), [2], [0.1], 2, 5)

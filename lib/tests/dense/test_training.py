"""Training: exact solutions, rates, invariances between conventions, determinism, error texts."""

import collections
import dataclasses
import math

import numpy as np
import pytest
import torch

from lib.checks import Divergence
from lib.dense.network import DTYPES, Data, NetworkConfig, Weights, hidden_states, initialise, outputs
from lib.dense.training import run_in_lockstep, train
from lib.figures import figure_1_left, figure_1_right, figure_2
from lib.rates import fit_slope
from lib.tables import select

SMALL = NetworkConfig(depth=8, width=6, dimension=4, samples=10, seed=1)


def take_last(records):
    return collections.deque(records, maxlen=1).pop()


def test_a_linear_network_with_tied_weights_has_a_closed_form():
    # With s = identity, H_L = X (I + W V / L)^L.
    config = dataclasses.replace(SMALL, activation="identity", depth=50)
    weights, data = initialise(config)
    weights.V += torch.randn(6, 4, generator=torch.Generator().manual_seed(5)).double() * 0.3
    step = torch.eye(4, dtype=torch.float64) + weights.W[0] @ weights.V[0] / 50
    expected = data.x @ torch.linalg.matrix_power(step, 50)
    torch.testing.assert_close(outputs(weights, hidden_states(config, weights, data.x)), expected)
    loss = next(train(config, 0.1, 0, start=(weights, data))).loss
    assert loss == pytest.approx(float((expected - data.y).square().mean()), rel=1e-12)


def test_one_step_from_zero_V_moves_V_by_the_closed_form():
    # V = 0: states stay X, the adjoint stays P = 2 (X - Y)/(n d), so V_k moves by -eta s(X W)^T P.
    record = take_last(train(SMALL, 0.3, 1))
    weights, data = initialise(SMALL)
    P = 2 * (data.x - data.y) / data.y.numel()
    expected = -0.3 * torch.nn.functional.gelu(data.x @ weights.W[0]).mT @ P
    for V in record.weights.V:
        torch.testing.assert_close(V, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(record.weights.W, weights.W)  # dl/dW_k = 0 while V_k = 0


def test_the_textbook_loop_takes_the_same_path():
    config = SMALL
    weights, data = initialise(config)
    V, W = weights.V.clone().requires_grad_(), weights.W.clone().requires_grad_()
    optimiser = torch.optim.SGD([V, W], lr=0.05 * config.depth)
    losses = []
    for _ in range(20):
        h = data.x
        for k in range(config.depth):
            h = h + torch.nn.functional.gelu(h @ W[k]) @ V[k] / config.depth
        loss = (h - data.y).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    records = list(train(config, 0.05, 19))
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-12)


def test_conventions_are_one_network_in_other_coordinates():
    # Let q = m = d, W = sqrt(q) W' and V = sqrt(m) V'. The scaling and the factor d of the loss cancel in the step, so
    # eq. (3) takes the path of the released network, with the same eta and rescaled weights.
    square = NetworkConfig(depth=6, width=4, dimension=4, samples=9, seed=2)
    weights, data = initialise(square)
    scaled = Weights(V=2 * weights.V, W=2 * weights.W)
    released = take_last(train(square, 0.05, 30))
    config = dataclasses.replace(square, convention="eq3")
    eq3 = take_last(train(config, 0.05, 30, start=(scaled, data)))
    assert eq3.loss == pytest.approx(4 * released.loss, rel=1e-11)
    torch.testing.assert_close(eq3.weights.V, 2 * released.weights.V, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(eq3.weights.W, 2 * released.weights.W, rtol=1e-10, atol=1e-13)


def test_recorded_iterations_do_not_change_the_path():
    every = {record.iteration: record.loss for record in train(SMALL, 0.05, 30)}
    few = {record.iteration: record.loss for record in train(SMALL, 0.05, 30, record_at=[0, 7, 8, 30])}
    assert set(few) == {0, 7, 8, 30}
    assert all(few[t] == pytest.approx(every[t], rel=1e-12) for t in few)


def test_a_seed_fixes_everything_and_another_changes_it():
    one, two = take_last(train(SMALL, 0.05, 5)), take_last(train(SMALL, 0.05, 5))
    assert torch.equal(one.weights.V, two.weights.V)
    other = take_last(train(dataclasses.replace(SMALL, seed=9), 0.05, 5))
    assert not torch.equal(one.weights.V, other.weights.V)


def test_draws_follow_the_released_order_in_float32():
    torch.manual_seed(7)
    W, X, Y = torch.randn(4, 6), torch.randn(10, 4), torch.randn(10, 4)
    weights, data = initialise(dataclasses.replace(SMALL, seed=7))
    assert torch.equal(weights.W[3], W.double())
    assert torch.equal(data.x, X.double())
    assert torch.equal(data.y, Y.double())
    torch.manual_seed(7)
    torch.randn(4, 6), torch.randn(4, 4)
    X_after_unused = torch.randn(10, 4)
    _, data = initialise(dataclasses.replace(SMALL, seed=7, draw_order="W unused X Y"))
    assert torch.equal(data.x, X_after_unused.double())


def test_data_and_first_layer_do_not_depend_on_depth_or_initialisation():
    tied, data = initialise(SMALL)
    independent, same = initialise(dataclasses.replace(SMALL, depth=20, initialisation="iid"))
    assert torch.equal(data.x, same.x)
    assert torch.equal(tied.W[0], independent.W[0])
    assert float((independent.W[1] - independent.W[0]).norm()) > 1


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_loss_falls(dtype):
    records = list(train(dataclasses.replace(SMALL, dtype=dtype), 0.05, 200, record_at=[0, 100, 200]))
    assert records[0].loss > records[1].loss > records[2].loss


def test_successive_distance_falls_as_one_over_the_depth():
    network = NetworkConfig(width=12, dimension=6, samples=20, seed=2)
    config = figure_1_left.Config(network, [16, 32, 64, 128], [1, 10, 40])
    table = figure_1_left.compute(config)["figure_1_left"]
    assert all(value == 0 for value in select(table, iterations=1)["max_distance"])
    late = select(table, iterations=40)
    assert fit_slope(late["depth"], late["max_distance"]).slope == pytest.approx(-1, abs=0.03)
    aggregate = [max(pair) for pair in zip(late["aggregate_V"], late["aggregate_W"], strict=True)]
    assert fit_slope(late["depth"], aggregate).slope == pytest.approx(-0.5, abs=0.03)


def test_iid_layers_stay_apart():
    network = NetworkConfig(width=12, dimension=6, samples=20, seed=2, initialisation="iid")
    table = figure_1_left.compute(figure_1_left.Config(network, [16, 64], [5]))["figure_1_left"]
    assert abs(fit_slope(table["depth"], table["max_distance"]).slope) < 0.2


def test_lockstep_yields_equal_iterations():
    trainings = [train(SMALL.at_depth(depth), 0.05, 6, [0, 3, 6]) for depth in (2, 4)]
    assert [tuple(r.iteration for r in pair) for pair in run_in_lockstep(trainings)] == [(0, 0), (3, 3), (6, 6)]


def test_divergence_is_a_sentence():
    with pytest.raises(Divergence, match=r"The loss is (inf|nan) at iteration \d+ \(depth 8, weight-tied"):
        take_last(train(SMALL, 1e3, 200, record_at=[200]))


def test_the_step_factor_is_that_of_the_residual_scaling():
    assert SMALL.step_factor == SMALL.depth
    assert dataclasses.replace(SMALL, residual_scaling="1/sqrt(L)").step_factor == 1
    assert dataclasses.replace(SMALL, residual_scaling="1/sqrt(L)").outer_scale == pytest.approx(1 / math.sqrt(8))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("depth", 0, "depth is 0, expected a whole number of at least 1"),
        ("depth", 2.5, "depth is 2.5, expected a whole number"),
        ("activation", "swish", "activation is 'swish', expected one of: gelu, relu, tanh, identity"),
        ("convention", "mine", "convention is 'mine', expected one of: released, eq3, mean-field"),
        ("initialisation", "zero", "initialisation is 'zero', expected one of: weight-tied, gaussian-process, iid"),
        ("dtype", "float16", "dtype is 'float16', expected one of: float32, float64"),
        ("hidden_dimension", 3, r"hidden_dimension q is 3, expected at least max\(d, d'\) = 4"),
        ("train_ends", "yes", "train_ends is 'yes', expected True or False"),
    ],
)
def test_a_wrong_value_is_named(field, value, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize("rate", [-0.1, 0, math.nan, "4e-2"])
def test_a_wrong_learning_rate_is_named(rate):
    with pytest.raises((TypeError, ValueError), match="learning_rate is"):
        train(SMALL, rate, 1)


def test_weights_and_data_of_another_configuration_get_a_sentence():
    weights, data = initialise(SMALL)
    wrong = {
        r"x is \(10, 3\), expected \(n, d\) = \(10, 4\) by the configuration": (weights, Data(data.x[:, :3], data.y)),
        r"y is \(9, 4\), expected \(n, d'\) = \(10, 4\)": (weights, Data(data.x, data.y[:9])),
        r"V is \(7, 6, 4\), expected \(L, m, q\) = \(8, 6, 4\)": (Weights(weights.V[1:], weights.W), data),
        r"A is given, but is the identity in this configuration": (Weights(weights.V, weights.W, torch.eye(4)), data),
    }
    for sentence, start in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            train(SMALL, 0.1, 1, start=start)
    with pytest.raises(ValueError, match="A is missing: draw weights with `initialise"):
        train(dataclasses.replace(SMALL, train_ends=True), 0.1, 1, start=(weights, data))


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: tuple(map(tuple, rows)),
        lambda rows: [torch.tensor(row, dtype=torch.float64) for row in rows],
        np.array,
        lambda rows: np.array(rows, dtype=">f8"),
        lambda rows: np.array(rows)[::-1][::-1],
        lambda rows: np.array(rows, dtype=object),
        lambda rows: torch.tensor(rows, dtype=torch.float64).to_sparse(),
        lambda rows: torch.tensor(rows, dtype=torch.float64, requires_grad=True),
    ],
)
def test_data_are_taken_in_any_form(form):
    weights, data = initialise(SMALL)
    start = Weights(weights.V.numpy(), weights.W.numpy()), Data(form(data.x.tolist()), form(data.y.tolist()))
    found, expected = take_last(train(SMALL, 0.1, 3, start=start)), take_last(train(SMALL, 0.1, 3))
    assert found.loss == expected.loss
    assert torch.equal(found.weights.W, expected.weights.W)


def test_data_take_the_dtype_of_the_configuration():
    config = dataclasses.replace(SMALL, dtype="float32")
    weights, _ = initialise(config)
    x, y = np.arange(40).reshape(10, 4), np.ones((10, 4), dtype=np.float16)
    record = next(train(config, 0.1, 0, start=(weights, Data(x, y))))
    # V = 0: the network is the identity.
    assert record.loss == pytest.approx(((x - y) ** 2).mean())
    assert record.weights.V.dtype == torch.float32
    assert record.weights.V.data_ptr() == weights.V.data_ptr()  # it has the dtype already, so it is trained in place


def test_one_axis_is_enough_for_one_coordinate_or_one_sample():
    line = NetworkConfig(depth=3, width=5, dimension=1, samples=6)
    weights, data = initialise(line)
    flat = Data(data.x.flatten().tolist(), data.y.flatten().numpy())
    assert next(train(line, 0.1, 0, start=(weights, flat))).loss == next(train(line, 0.1, 0)).loss
    single = NetworkConfig(depth=3, width=5, dimension=4, samples=1)
    weights, data = initialise(single)
    assert next(train(single, 0.1, 0, start=(weights, Data(data.x[0], data.y[0])))).loss == pytest.approx(
        float((data.x - data.y).square().mean())
    )


def test_data_that_are_no_numbers_get_a_sentence():
    weights, data = initialise(SMALL)
    with pytest.raises(ValueError, match=r"y is \(10,\), expected \(n, d'\) = \(10, 4\) by the configuration"):
        train(SMALL, 0.1, 1, start=(weights, Data(data.x, data.y[:, 0])))
    for values, found in (
        ([[1.0, 2.0], [3.0]], r"list that is not an array of real numbers \(.*\(2,\)"),
        (np.array([["a"]]), "ndarray that is not an array of real numbers .*<U1"),
        (np.ones((10, 4)) * 1j, "ndarray that is not an array of real numbers .*complex128"),
    ):
        with pytest.raises(TypeError, match=f"x is a {found}"):
            Data(values, data.y)
    with pytest.raises(TypeError, match=r"y is torch.complex128, expected real numbers"):
        train(SMALL, 0.1, 1, start=(weights, Data(data.x, data.y * 1j)))
    for start, found in ((data, "Data"), ((weights, (data.x, data.y)), "Weights, tuple")):
        with pytest.raises(TypeError, match=rf"start holds {found}, expected Weights, Data"):
            train(SMALL, 0.1, 1, start=start)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_before_training(value):
    weights, data = initialise(SMALL)
    data.y[7, 2] = value
    with pytest.raises(ValueError, match=rf"y holds {value} in row 7, column 2 .*1 entry is not finite"):
        train(SMALL, 0.1, 1, start=(weights, data))
    weights, data = initialise(SMALL)
    weights.W[3, 0, 1] = value
    with pytest.raises(ValueError, match=rf"W holds {value} in layer 3 at \(0, 1\)"):
        train(SMALL, 0.1, 1, start=(weights, data))
    weights, data = initialise(single := dataclasses.replace(SMALL, dtype="float32"))
    data.x = data.x.double()
    data.x[4:6, 0] = 1e300
    with pytest.raises(ValueError, match=r"x holds inf in row 4, column 0 .*2 entries are not finite in float32"):
        train(single, 0.1, 1, start=(weights, data))


def test_masked_entries_count_as_missing():
    weights, data = initialise(SMALL)
    x = np.ma.masked_array(data.x.numpy(), mask=np.arange(40).reshape(10, 4) == 21)
    with pytest.raises(ValueError, match="x holds nan in row 5, column 1"):
        train(SMALL, 0.1, 1, start=(weights, Data(x, data.y)))
    x.mask = False
    assert next(train(SMALL, 0.1, 0, start=(weights, Data(x, data.y)))).loss == next(train(SMALL, 0.1, 0)).loss


def test_a_loss_that_is_not_finite_at_the_start_blames_no_learning_rate():
    weights, data = initialise(SMALL)
    with pytest.raises(Divergence, match=r"at iteration 0 .*no step was made yet") as error:
        next(train(SMALL, 0.1, 5, start=(weights, Data(data.x * 1e200, data.y))))
    assert "smaller" not in str(error.value)


@pytest.mark.parametrize("moments", [3, "0", [0.5], [None], np.array([0.5])])
def test_moments_that_are_no_whole_numbers_get_a_sentence(moments):
    with pytest.raises(TypeError, match=r"record_at is .*, expected a list of whole numbers within 0 to 4"):
        train(SMALL, 0.1, 4, moments)


def test_numbers_of_numpy_are_taken():
    network = NetworkConfig(depth=np.int64(8), width=np.uint8(6), dimension=4, samples=10, seed=np.int32(1))
    assert network == SMALL
    assert {type(value) for value in vars(network).values()} <= {int, float, str, bool}
    assert dataclasses.replace(SMALL, train_ends=np.bool_(True), target_scale=np.float32(0.5)).target_scale == 0.5
    config = figure_1_left.Config(network, 2 ** np.arange(1, 6), (np.int64(1), 5), np.float32(0.25), np.int64(16))
    assert (config.depths, config.iterations, config.learning_rate) == ([2, 4, 8, 16, 32], (1, 5), 0.25)
    assert [type(depth) for depth in config.depths] == [int] * 5
    records = list(train(SMALL, np.float32(0.25), np.int64(4), np.array([0, 4]), clip=np.float64(1.5)))
    assert [(r.iteration, r.loss) for r in records] == [
        (r.iteration, r.loss) for r in train(SMALL, 0.25, 4, [0, 4], clip=1.5)
    ]
    with pytest.raises(ValueError, match=r"dtype is <class .numpy\.float32.>, expected one of"):
        dataclasses.replace(SMALL, dtype=np.float32)
    for value, found in ((np.float64(8), "8.0"), (np.bool_(True), "True"), (np.array([1, 2]), r"\[1, 2\]")):
        with pytest.raises(TypeError, match=f"depth is {found}, expected a whole number"):
            dataclasses.replace(SMALL, depth=value)
    with pytest.raises(ValueError, match="learning_rate is nan, expected a number above 0"):
        train(SMALL, np.float32("nan"), 1)


def test_a_device_that_is_not_there_gets_a_sentence():
    with pytest.raises(ValueError, match="device is 'gpu', expected auto, cpu, cuda"):
        dataclasses.replace(SMALL, device="gpu")
    if not torch.cuda.is_available():
        assert dataclasses.replace(SMALL, device="auto").torch_device.type == "cpu"
        with pytest.raises(ValueError, match="PyTorch sees no CUDA device here"):
            dataclasses.replace(SMALL, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device on this machine")
def test_experiments_on_cuda_give_the_tables_of_the_cpu():
    for make in (
        lambda network: (room := figure_1_left).compute(room.Config(network, [4, 8, 16], [5, 20], 0.05, slope_from=4)),
        lambda network: figure_1_right.compute(figure_1_right.Config(network, [4, 8], 10, learning_rate=0.05)),
        lambda network: figure_2.compute(figure_2.Config(network, 50, recorded=5))[1],
    ):
        here, there = (make(dataclasses.replace(SMALL, device=device)) for device in ("cpu", "cuda"))
        for name, column in here.items():
            assert there[name] == pytest.approx(column, rel=1e-9, abs=1e-12), name

"""Residual blocks of any kind: training, what is measured over depths, the blocks on board, and what is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

from lib.blocks import BlockNetwork, Divergence, fit_slope, gaussian_data, make_block, successive_distances, train
from lib.blocks.catalogue import ACTIVATIONS, BLOCKS
from lib.dense.network import NetworkConfig, initialise
from lib.dense.training import train as train_dense

ALL_ON_BOARD = [(name, norm) for name, block in BLOCKS.items() for norm in block.normalisations]


class Bias(nn.Module):
    """f(h) = b: the network is linear in its parameters."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.randn(3))

    def forward(self, h):
        return self.b.expand_as(h)


class Factor(nn.Module):
    """f(h) = w h, one number w, which starts at 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def start_at_zero(self):
        self.w.zero_()

    def forward(self, h):
        return self.w * h


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initialisation", ["weight-tied", "iid"])
def test_the_paper_s_block_trains_as_the_fully_connected_network(initialisation):
    config = NetworkConfig(depth=8, width=5, dimension=3, samples=10, initialisation=initialisation)
    weights, data = initialise(config)
    layers = iter(weights.W.clone())

    class Paper(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.V = nn.Parameter(next(layers)), nn.Parameter(torch.zeros(5, 3))

        def forward(self, h):
            return nn.functional.gelu(h @ self.W) @ self.V

    found = train(Paper, 8, data.x, data.y, 0.1, 20, initialisation=initialisation, chunk=3)
    for record, expected in zip(found, train_dense(config, 0.1, 20, engine="adjoint"), strict=True):
        assert record.loss == pytest.approx(expected.loss, abs=1e-10)
        for name in "WV":
            torch.testing.assert_close(record.weights[name], getattr(expected.weights, name), rtol=0, atol=1e-10)


def test_layers_are_computed_again_to_the_same_bits():
    x, y = gaussian_data(BLOCKS["transformer"].shape)
    ends = []
    for chunk in (2, 7):
        *_, record = train(make_block("transformer", normalisation="layer"), 7, x, y, 0.1, 3, chunk=chunk)
        ends.append([record.loss, *record.weights.values()])
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1:], ends[1][1:]))


@pytest.mark.parametrize(("name", "norm"), ALL_ON_BOARD)
def test_every_block_on_board_starts_as_the_identity_and_learns(name, norm):
    x, y = gaussian_data(BLOCKS[name].shape, dtype=torch.float32)
    for activation in ACTIVATIONS if BLOCKS[name].activated else ["gelu"]:
        first, last = train(make_block(name, activation, norm), 3, x, y, 0.2, 2, [0, 2])
        assert first.loss == pytest.approx(float((x - y).square().mean()), rel=1e-6)
        assert last.loss < first.loss
        assert {Z.dtype for Z in last.weights.values()} == {torch.float32}


def test_draws_do_not_depend_on_the_depth_and_leave_the_caller_s_alone():
    before = torch.get_rng_state()
    x, y = gaussian_data((4, 3))
    deep, shallow = (BlockNetwork(Bias, depth, x, y, initialisation="iid").weights["b"] for depth in (6, 2))
    assert torch.equal(deep[:2], shallow)
    assert len({float(b) for b in deep[:, 0]}) == 6
    tied = BlockNetwork(Bias, 4, x, y).weights["b"]
    assert torch.equal(tied, deep[:1].expand(4, 3))
    assert not torch.equal(tied, BlockNetwork(Bias, 4, x, y, seed=1).weights["b"])
    assert torch.equal(torch.get_rng_state(), before)


def test_any_loss_and_frozen_parameters():
    def block():
        made = nn.Linear(3, 3)
        made.bias.requires_grad_(False)
        return made

    x, labels = gaussian_data((6, 3))[0], torch.tensor([0, 1, 2, 0, 1, 2])
    records = list(train(block, 4, x, labels, 0.5, 5, loss=nn.functional.cross_entropy))
    assert records[-1].loss < records[0].loss
    assert list(records[0].weights) == ["weight"]
    with pytest.raises(ValueError, match=r"The loss has the shape \(6,\), expected one number"):
        next(train(block, 4, x, labels, loss=lambda h, y: nn.functional.cross_entropy(h, y, reduction="none")))


def test_own_data_come_as_arrays_and_lists():
    x, y = gaussian_data((6, 3))
    expected = [record.loss for record in train(Bias, 4, x, y, iterations=2)]
    for form in (Tensor.numpy, Tensor.tolist):
        assert [record.loss for record in train(Bias, 4, form(x), form(y), iterations=2)] == expected
    single = list(train(Bias, 4, x.float(), y.numpy(), iterations=2))
    assert [record.loss for record in single] == pytest.approx(expected, rel=1e-6)
    assert single[0].weights["b"].dtype == torch.float32
    # Labels stay whole numbers.
    labels, loss = torch.tensor([0, 1, 2, 0, 1, 2]), nn.functional.cross_entropy
    expected = [record.loss for record in train(Bias, 4, x, labels, iterations=2, loss=loss)]
    for form in (Tensor.numpy, Tensor.tolist):
        assert [record.loss for record in train(Bias, 4, x, form(labels), iterations=2, loss=loss)] == expected


def test_own_data_that_cannot_be_are_said_before_training():
    x, y = gaussian_data((6, 3))
    missing = y.clone()
    missing[4, 1] = math.nan
    for data, sentence in (
        ((missing, y), "x holds nan in row 4, column 1"),
        ((x, missing.numpy()), "y holds nan in row 4, column 1"),
        ((x, y[:, :1]), r"y is \(6, 1\), expected \(6, 3\)"),
        ((x * 1j, y), "x is torch.complex128"),
        ((x, ["a"]), "y is a list that is no array of real numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            train(Bias, 4, *data)


def test_divergence_is_a_sentence():
    x, y = gaussian_data((4, 3))
    with pytest.raises(Divergence, match=r"The loss of Factor is (inf|nan) at iteration \d+ \(depth 4, learning rate"):
        list(train(Factor, 4, x, y, 1e6, 100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same():
    x, y = gaussian_data(BLOCKS["self-attention"].shape)
    tables = [
        successive_distances(make_block("self-attention"), [2, 4], x.to(device), y.to(device), iterations=3)
        for device in ("cpu", "cuda")
    ]
    assert tables[1]["max_distance"] == pytest.approx(tables[0]["max_distance"], rel=1e-8)


# --- Distances --------------------------------------------------------------------------------------------------------


def _slope(name, activation="gelu", norm="none"):
    x, y = gaussian_data(BLOCKS[name].shape)
    block = make_block(name, activation, norm)
    table = successive_distances(block, [4, 8, 16], x, y, iterations=3, learning_rate=0.4)
    return fit_slope(table["depth"], table["max_distance"]).slope


@pytest.mark.parametrize("case", [("perceptron", "gelu"), ("self-attention",), ("gated unit", "silu", "layer")])
def test_smooth_blocks_stay_smooth(case):
    assert _slope(*case) == pytest.approx(-1, abs=0.05)


def test_relu_fails_where_gelu_holds():
    assert _slope("convolution", "gelu", "batch") == pytest.approx(-1, abs=0.05)
    assert _slope("convolution", "relu", "batch") > -0.5


def test_the_table_against_the_weights():
    x, y = gaussian_data((5, 16))
    block, depths = make_block("perceptron"), [2, 4, 6]
    options = {"iterations": 3, "learning_rate": 0.3, "record_at": [1, 3]}
    table = successive_distances(block, depths, x, y, **options)
    assert (table["depth"], table["step"]) == (depths * 2, [1, 1, 1, 3, 3, 3])
    assert table["learning_rate_multiplier"] == table["depth"]
    ends, largest, starts = {}, {}, {}
    for depth in depths:
        for record in train(block, depth, x, y, 0.3, 3):
            Z = torch.cat([each.flatten(1) for each in record.weights.values()], dim=1)
            starts.setdefault(depth, Z)
            largest[depth] = max(largest.get(depth, 0), float(Z.diff(dim=0).norm(dim=1).max()))
            ends[depth] = Z
    assert table["max_distance"][3:] == pytest.approx(list(largest.values()), rel=1e-12)
    double = float((ends[4] - ends[2].repeat_interleave(2, dim=0)).square().sum() / 4) ** 0.5
    assert table["to_double"][3] == pytest.approx(double, rel=1e-12)
    assert [math.isnan(each) for each in table["to_double"][3:]] == [False, True, True]
    assert [math.isnan(each) for each in table["to_deepest"][3:]] == [False, False, True]
    change = ends[6] - starts[6]
    assert table["moved"][5] == pytest.approx(float(change.norm(dim=1).max()), rel=1e-12)
    assert table["moved_share"][5] == pytest.approx(float(change.norm() / starts[6].norm()), rel=1e-12)
    by_parameter = successive_distances(block, depths, x, y, by_parameter=True, **options)
    assert by_parameter["parameter"][:2] == ["W.weight", "V.weight"]
    for row, whole in enumerate(table["to_double"]):
        parts = by_parameter["to_double"][2 * row : 2 * row + 2]
        assert math.hypot(*parts) == pytest.approx(whole, rel=1e-12, nan_ok=True)


def test_distance_to_the_linearisation():
    x, y = gaussian_data((5, 3))
    linear = successive_distances(Bias, [2, 4], x, y, iterations=5)
    assert max(linear["from_linear"]) < 1e-9
    # F = x (1 + w/2)^2 is x + x w at first order, so the rest is w/4 of it (w at depth 2, both layers alike).
    *_, record = train(Factor, 2, x, y, 0.5, 5)
    w = float(record.weights["w"][0])
    table = successive_distances(Factor, [2], x, y, iterations=5, learning_rate=0.5)
    assert table["from_linear"] == pytest.approx([abs(w / 4 / (1 + w / 4))], rel=1e-5)
    apart = successive_distances(Factor, [2, 3], x, y, iterations=1)  # layers of one number, on cells of 1/2 and 1/3
    assert 0 <= apart["to_deepest"][0] < 1e-2


# --- What is refused --------------------------------------------------------------------------------------------------


def _of(forward, **members):
    class Odd(nn.Linear):
        pass

    Odd.forward = forward

    def block():
        made = Odd(3, 3)
        for name, member in members.items():
            setattr(made, name, member)
        return made

    return block


SHARED = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (lambda: nn.Linear(3, 2), r"Linear turns h of the shape \(4, 3\) into \(4, 2\), expected the shape of h"),
        (_of(lambda self, h: (h, h)), "Odd turns h .* into tuple"),
        (nn.Identity, "Identity has no parameters to train"),
        (lambda: nn.BatchNorm1d(3), r"BatchNorm1d keeps running statistics \(running_mean .*track_running_stats=False"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)),
            "Sequential draws random numbers in forward.*dropout",
        ),
        (_of(lambda self, h: h / 0), r"Odd is not finite \(NaN or infinite\) at h = x"),
        (_of(lambda self, h: h.mul_(2)), "Odd changes its input h in place"),
        (_of(lambda self, h: h.float()), "Odd turns h of torch.float64 into torch.float32"),
        (nn.Linear(3, 3), "block is an object of the class Linear, expected what makes one"),
        (3, "block is int, expected what makes one"),
        (lambda: 3, r"block\(\) is 3, expected a torch.nn.Module"),
        (lambda: SHARED, r"block\(\) returns the same Linear object again"),
    ],
)
def test_blocks_that_cannot_be_layers(block, sentence):
    x, y = gaussian_data((4, 3))
    with pytest.raises((TypeError, ValueError), match=sentence):
        successive_distances(block, [2, 4], x, y, initialisation="iid")


def test_dropout_that_does_nothing_passes():
    x, y = gaussian_data((4, 3))
    for dropout in (nn.Dropout(0.0), nn.Dropout(0.5).eval()):
        successive_distances(lambda d=dropout: nn.Sequential(nn.Linear(3, 3), d), [2, 4], x, y, iterations=1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam', expected 'sgd'.* depth L, and an optimizer that divides"),
        ({"initialisation": "gaussian"}, "initialisation is 'gaussian', expected one of: weight-tied, iid"),
        ({"depths": [8, 4]}, r"depths is \[8, 4\], expected increasing numbers"),
        ({"record_at": [9]}, "record_at asks for iterations 9 to 9, expected them within 0 to 2"),
        ({"x": torch.arange(6).reshape(2, 3)}, "x is no tensor of floating-point numbers"),
    ],
)
def test_values_that_cannot_be(values, sentence):
    x, y = gaussian_data((4, 3))
    arguments = {"block": Bias, "depths": [2, 4], "x": x, "y": y, "iterations": 2} | values
    with pytest.raises((TypeError, ValueError), match=sentence):
        successive_distances(**arguments)


def test_blocks_on_board_that_do_not_exist():
    with pytest.raises(ValueError, match="block is 'mixer', expected one of: perceptron"):
        make_block("mixer")
    with pytest.raises(ValueError, match="normalisation of perceptron is 'batch', expected one of: none, layer"):
        make_block("perceptron", normalisation="batch")

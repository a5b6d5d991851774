"""Residual blocks of any kind: training, distances over depths, the catalogue, and blocks that are refused."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib import activations
from lib.blocks import BlockNetwork, Divergence, fit_slope, gaussian_data, make_block, successive_distances, train
from lib.blocks.catalogue import BLOCKS
from lib.dense.network import NetworkConfig, initialise
from lib.dense.training import train as train_dense

ALL_BLOCKS = [(name, norm) for name, block in BLOCKS.items() for norm in block.normalisations]


class Bias(nn.Module):
    """f(h) = b: the network is linear in its parameters."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.randn(3))

    def forward(self, h):
        return self.b.expand_as(h)


class Factor(nn.Module):
    """f(h) = w h with a number w that starts at 0."""

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


@pytest.mark.parametrize(("name", "norm"), ALL_BLOCKS)
def test_every_block_of_the_catalogue_starts_as_the_identity_and_learns(name, norm):
    x, y = gaussian_data(BLOCKS[name].shape, dtype=torch.float32)
    for activation in activations.ACTIVATIONS if BLOCKS[name].activated else ["gelu"]:
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


def test_any_loss_trains_frozen_parameters_stay_and_wrong_losses_are_named():
    def block():
        made = nn.Linear(3, 3)
        made.bias.requires_grad_(False)
        return made

    x, labels = gaussian_data((6, 3))[0], torch.tensor([0, 1, 2, 0, 1, 2])
    records = list(train(block, 4, x, labels, 0.5, 5, loss=nn.functional.cross_entropy))
    assert records[-1].loss < records[0].loss
    assert list(records[0].weights) == ["weight"]
    for loss, sentence in (
        (
            lambda h, y: nn.functional.cross_entropy(h, y, reduction="none"),
            r"The loss has the shape \(6,\), expected one",
        ),
        (lambda h, y: (h @ y).mean(), r"loss\(F\(x\), y\) raised RuntimeError: .* F\(x\) is \(6, 3\) .* y is \(6,\)"),
        (lambda h, y: h.detach().mean(), "The loss is a tensor without a gradient"),
        (lambda h, y: 1.0, "The loss is of the type float"),
        (lambda h, y: nn.functional.dropout(h).mean(), "The loss draws random numbers, and other ones at each depth"),
        (lambda h, y: (h * 1j).sum(), "The loss is a complex number"),
        (nn.CrossEntropyLoss, "loss is <class .*CrossEntropyLoss'>, expected .* an object of that class"),
        ("mse", "loss is 'mse', expected a function"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            next(train(block, 4, x, labels, loss=loss))


def _nest(values):
    return tuple(map(tuple, values.tolist()))


def _compute_losses(x, y, **options):
    """The losses of the training and of the table, after two steps."""
    (record,) = train(Bias, 4, x, y, iterations=2, record_at=[2], **options)
    table = successive_distances(Bias, [2, 4], x, y, iterations=2, **options)
    assert table["loss"][1] == record.loss
    return [record.loss, *table["loss"]]


@pytest.mark.parametrize("form", [Tensor.numpy, Tensor.tolist, _nest, list, Tensor.to_sparse])
def test_data_are_taken_as_arrays_and_lists(form):
    x, y = gaussian_data((6, 3))
    assert _compute_losses(form(x), form(y)) == _compute_losses(x, y)
    labels, loss = torch.tensor([0, 1, 2, 0, 1, 2]), nn.functional.cross_entropy  # labels stay whole numbers
    form = Tensor.tolist if form is _nest else form
    assert _compute_losses(x, form(labels), loss=loss) == _compute_losses(x, labels, loss=loss)


def test_data_of_other_dtypes_give_the_same_losses():
    x, y = gaussian_data((6, 3))
    assert _compute_losses(x.float(), y.numpy()) == pytest.approx(_compute_losses(x, y), rel=1e-6)
    (start,) = train(Bias, 4, x.float(), y.numpy(), iterations=0)
    assert start.weights["b"].dtype == torch.float32
    whole = [(10 * each).int() for each in (x, y)]
    assert _compute_losses(*whole) == _compute_losses(*(each.double() for each in whole))
    assert _compute_losses(whole[0].numpy(), whole[1].tolist()) == _compute_losses(*whole)


def test_data_of_inference_mode_are_taken_and_training_in_it_is_refused():
    x, y = gaussian_data((6, 3))
    with torch.inference_mode():
        inside = [each.clone() for each in (x, y)]
        with pytest.raises(ValueError, match="inference_mode is on"):
            train(Bias, 4, x, y)
    assert inside[0].is_inference()
    assert _compute_losses(*inside) == _compute_losses(x, y)


def test_training_in_autocast_is_refused():
    x, y = gaussian_data((6, 3), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"torch\.autocast is on"):
        train(Bias, 4, x, y)


def test_the_squared_error_as_a_module_takes_what_the_function_takes():
    x, y = gaussian_data((6, 3))
    assert _compute_losses(x, y.float().tolist(), loss=nn.MSELoss()) == _compute_losses(x, y.float().tolist())
    with pytest.raises(ValueError, match=r"y is \(6, 1\), expected \(6, 3\)"):
        _compute_losses(x, y[:, :1], loss=nn.MSELoss())


def test_targets_of_several_kinds_go_to_the_loss_in_a_dict():
    x, y = gaussian_data((6, 3))
    both = {"y": y, "labels": torch.arange(6)}
    assert _compute_losses(x, both, loss=lambda h, y: (h - y["y"]).square().mean()) == pytest.approx(
        _compute_losses(x, y)
    )
    with pytest.raises(TypeError, match="y is a tuple that is not an array of real numbers"):
        _compute_losses(x, tuple(both.values()), loss=lambda h, y: (h - y[0]).square().mean())


def test_numbers_of_numpy_are_taken():
    x, y = gaussian_data((6, 3))
    plain = {"depths": [2, 4], "iterations": 2, "learning_rate": 0.25, "seed": 3, "record_at": [0, 2], "chunk": 1}
    expected = successive_distances(Bias, x=x, y=y, **plain)
    same = {
        "depths": [np.array([2, 4]), range(2, 6, 2), (np.int8(2), np.int64(4)), torch.tensor([2, 4])],
        "iterations": [np.int8(2)],
        "learning_rate": [np.float32(0.25), np.array(0.25), torch.tensor(0.25)],
        "seed": [np.int8(3), np.uint8(3)],
        "record_at": [np.array([0, 2]), range(0, 3, 2), (2, 0), iter([0, 2])],
        "chunk": [np.int8(1)],
    }
    for name, values in same.items():
        for value in values:
            found = successive_distances(Bias, x=x, y=y, **plain | {name: value})
            for column in ("depth", "step", "loss", "max_distance"):
                assert found[column] == expected[column], name
    (record,) = train(Bias, np.int8(100), x, y, np.float32(0.25), np.int8(2), [np.int8(2)])  # 2 * 100 overflows an int8
    (plainly,) = train(Bias, 100, x, y, 0.25, 2, [2])
    assert record.loss == plainly.loss
    for data in (gaussian_data(np.array([6, 3]), np.int32(0)), gaussian_data(torch.Size([6, 3]))):
        assert torch.equal(data[0], x)


def test_wrong_data_are_named_before_training():
    x, y = gaussian_data((6, 3))
    missing = y.clone()
    missing[4, 1] = math.nan
    for data, sentence in (
        ((missing, y), "x holds nan in row 4, column 1"),
        ((x, missing.numpy()), "y holds nan in row 4, column 1"),
        ((x, y[:, :1]), r"y is \(6, 1\), expected \(6, 3\)"),
        ((x, y[:, 0].numpy()), r"y is \(6,\), expected \(6, 3\)"),
        ((x * 1j, y), "x is torch.complex128"),
        ((x, y * 1j), "y is torch.complex128"),
        ((1.0, y), r"x is torch.float64 of the shape \(\), expected real numbers \(n, ...\)"),
        ((x[:0], y[:0]), r"x is torch.float64 of the shape \(0, 3\)"),
        ((None, y), "x is None, expected a tensor"),
        ((x, None), "y is None, expected a tensor"),
        ((x.to("meta"), y), "x is on the meta device"),
        ((x.half(), y.half()), "x is torch.float16, expected float32 or float64"),
        ((x.bfloat16(), y), "x is torch.bfloat16, expected float32 or float64"),
        ((x, ["a"]), "y is a list that is not an array of real numbers"),
        (([[1.0, 2.0], [3.0]], y), "x is a list that is not an array .* lists of equal lengths"),
    ):
        for call in (lambda x, y: train(Bias, 4, x, y), lambda x, y: successive_distances(Bias, [2, 4], x, y)):
            with pytest.raises((TypeError, ValueError), match=sentence):
                call(*data)
    for shape, sentence in (
        (4, "shape is 4, expected the sizes"),
        ((), "shape is"),
        ((4, 0), "an entry of shape is 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            gaussian_data(shape)
    with pytest.raises(TypeError, match=r"dtype is torch\.float16"):
        gaussian_data((4, 3), dtype=torch.float16)
    with pytest.raises(ValueError, match="device is None"):
        gaussian_data((4, 3), device=None)


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


def _compute_slope(name, activation="gelu", norm="none"):
    x, y = gaussian_data(BLOCKS[name].shape)
    block = make_block(name, activation, norm)
    table = successive_distances(block, [4, 8, 16], x, y, iterations=3, learning_rate=0.4)
    return fit_slope(table["depth"], table["max_distance"]).slope


@pytest.mark.parametrize("case", [("perceptron", "gelu"), ("self-attention",), ("gated unit", "silu", "layer")])
def test_smooth_blocks_stay_smooth(case):
    assert _compute_slope(*case) == pytest.approx(-1, abs=0.05)


def test_relu_has_a_flatter_slope_than_gelu():
    assert _compute_slope("convolution", "gelu", "batch") == pytest.approx(-1, abs=0.05)
    assert _compute_slope("convolution", "relu", "batch") > -0.5


def test_the_table_is_that_of_the_weights():
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


def test_distances_to_the_linearisation_are_those_of_a_closed_form():
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


def _make_odd(forward, **members):
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


class Remembers(nn.Linear):
    """Adds its last result to its result, or with `count` the number of calls."""

    def __init__(self, detach=False, count=False):
        super().__init__(3, 3)
        self.before, self.detach, self.count = 0, detach, count

    def forward(self, h):
        found = super().forward(h) + self.before
        self.before = self.before + 1 if self.count else found.detach() if self.detach else found
        return found


class Constant(nn.Linear):
    """Holds a tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__(3, 3)
        self.C = torch.randn(3, 3)

    def forward(self, h):
        return super().forward(h) @ self.C


class Listed(nn.Module):
    """Two maps of h. The second is in a list, so PyTorch does not see its parameters."""

    def __init__(self, second):
        super().__init__()
        self.first, self.others = nn.Linear(3, 3), [second]

    def forward(self, h):
        return self.first(h)


class OwnList(nn.Module):
    """Takes its parameters from a list of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.own = list(self.parameters())

    def forward(self, h):
        return nn.functional.linear(h, *self.own)


class Checkpointed(nn.Module):
    """V tanh(h W), computed again in the backward pass. V starts at zero, so the first gradient for W is zero."""

    def __init__(self):
        super().__init__()
        self.W, self.V = nn.Linear(3, 3), nn.Linear(3, 3)

    def start_at_zero(self):
        nn.init.zeros_(self.V.weight)

    def forward(self, h):
        return self.V(checkpoint(lambda h: torch.tanh(self.W(h)), h, use_reentrant=False))


def _make_hooked():
    block = nn.Linear(3, 3)
    block.weight.register_hook(lambda gradient: 0 * gradient)
    return block


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.S = nn.Parameter(torch.eye(3).to_sparse())


class NamedAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.Parameter(torch.ones(3))

    def forward(self, h):
        return self.all * h


class ZeroNothing(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

    def start_at_zero(self):
        self.nothing.zero_()


class Doubling(nn.Linear):
    """Doubles its weight at each call."""

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, h):
        self.weight.data.mul_(2)
        return super().forward(h)


@torch.no_grad()
def _apply_without_gradient(self, h):
    return nn.Linear.forward(self, h)


def _raise(*_):
    raise RuntimeError("no luck\nmore lines")


OUTSIDE = np.random.default_rng(0)  # random numbers that torch's seed does not set


def _scale_by_outside(self, h):
    return nn.Linear.forward(self, h) * OUTSIDE.random()


class Scaled(nn.Linear):
    def __init__(self, scale):
        super().__init__(3, 3)
        nn.init.constant_(self.weight, scale)


def _change_in_place(self, h):
    found = torch.exp(nn.Linear.forward(self, h))
    found += 1
    return found


def _script():
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return torch.jit.script(nn.Linear(3, 3))


def _make_nan():
    block = nn.Linear(3, 3)
    block.weight.data[0, 0] = math.nan
    return block


WRONG_BLOCKS = [
    (lambda: nn.Linear(3, 2), r"Linear turns h of the shape \(4, 3\) into \(4, 2\), expected the shape of h"),
    (_make_odd(lambda self, h: (h, h)), "Odd turns h .* into tuple"),
    (_make_odd(lambda self, h: None), "Odd turns h .* into NoneType"),
    (_make_odd(lambda self, h: h.detach().numpy()), "Odd turns h .* into ndarray"),
    (lambda: nn.LSTM(3, 3), "LSTM turns h .* into tuple"),
    (nn.Identity, "Identity has no parameters to train"),
    (_make_odd(lambda self, h: h, weight=None, bias=None), "Odd has no parameters to train"),
    (lambda: nn.Linear(3, 3).requires_grad_(False), "Linear has no parameters to train"),
    (lambda: nn.BatchNorm1d(3), r"BatchNorm1d keeps running statistics \(running_mean .*track_running_stats=False"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)), "Sequential draws random numbers in forward.*dropout"),
    (_make_odd(lambda self, h: self.weight[0] * h / 0), r"Odd is not finite \(NaN or infinite\) at h = x"),
    (_make_odd(lambda self, h: h.mul_(2)), "Odd changes its input h in place"),
    (_make_odd(lambda self, h: h.float()), "Odd turns h of torch.float64 into torch.float32, expected the dtype of h"),
    (_make_odd(lambda self, h: h.long()), "Odd turns h of torch.float64 into torch.int64, expected the dtype of h"),
    (_make_odd(lambda self, h: h * 1j), "Odd turns h of torch.float64 into torch.complex128, expected the dtype of h"),
    (_make_odd(lambda self, h: h.to_sparse()),
     "Odd turns h of torch.strided into torch.sparse_coo, expected the layout"),
    (lambda: nn.Linear(3, 3, dtype=torch.complex64), "Linear has complex numbers in weight, expected real ones"),
    (lambda: nn.Linear(3, 3, device="meta"), "Linear has no numbers in weight, which is on the meta device"),
    (lambda: nn.LazyLinear(3), "LazyLinear has no shape for weight yet"),
    (_script, "RecursiveScriptModule is compiled by torch.jit"),
    (Constant, r"Constant holds the tensor C as a plain attribute.*register_buffer"),
    (lambda: Listed(nn.Linear(3, 3)), "Listed holds modules or tensors in the list others.*ModuleList"),
    (lambda: Listed(torch.ones(3)), "Listed holds modules or tensors in the list others.*register_buffer"),
    (OwnList, "OwnList takes its parameter linear.weight from elsewhere than the attribute"),
    (Checkpointed, "Checkpointed takes its parameter W.weight from elsewhere.*`chunk` in place of checkpoints"),
    (_make_hooked, "Linear takes its parameter weight from elsewhere than the attribute, as from a list, a hook"),
    (Sparse, "Sparse has sparse numbers in S, expected dense ones"),
    (NamedAll, "NamedAll has a parameter all.*rename it"),
    (Remembers, "Remembers gives another result when it is called again"),
    (lambda: Remembers(detach=True), "Remembers gives another result when it is called again"),
    (lambda: Remembers(count=True), "Remembers gives another result when it is called again"),
    (_make_odd(_scale_by_outside), "Odd gives another result when it is called again.*random numbers"),
    (Doubling, "Doubling changes its parameter weight in forward"),
    (_make_odd(_apply_without_gradient), "Odd gives no gradient to its parameters"),
    (_make_odd(lambda self, h: (nn.Linear.forward(self, h) > 0).to(h)), "Odd gives no gradient to its parameters"),
    (_make_odd(lambda self, h: h.clone()), "Odd gives no gradient to its parameters"),
    (_make_odd(_change_in_place), "Odd has no gradient: its backward pass raised RuntimeError"),
    (_make_odd(lambda self, h, t: h * t),
     r"Odd cannot take h of the shape \(4, 3\) .* raised TypeError: .* argument: 't'"),
    (lambda: nn.Linear(5, 5), "Linear cannot take h of the shape .* raised RuntimeError: mat1 and mat2"),
    (lambda: nn.MultiheadAttention(3, 1), "MultiheadAttention cannot take h .* raised TypeError"),
    (_make_odd(_raise), "Odd cannot take h .* forward raised RuntimeError: no luck; expected a forward"),
    (ZeroNothing, r"ZeroNothing.start_at_zero\(\) raised AttributeError: .*nothing"),
    (nn.Linear(3, 3), "block is an object of the class Linear, expected what makes one"),
    ([nn.Linear(3, 3)], "block is list, expected what makes one"),
    (3, "block is int, expected what makes one"),
    (lambda: 3, r"What block\(\) makes is of the type int, expected a torch.nn.Module"),
    (lambda: Bias, r"What block\(\) makes is the class Bias, expected a torch.nn.Module"),
    (nn.Linear, r"block\(\) raised TypeError: .*in_features.*such as `lambda: MyBlock\(16\)`"),
    (lambda h: h, r"block\(\) raised TypeError: .* argument: 'h', expected a class or a function without"),
    (_raise, r"block\(\) raised RuntimeError: no luck, expected a class"),
    (_make_nan, "Linear is not finite"),
    (_make_odd(lambda self, h: h * self.weight[0] * (1 + random.random())), "Odd draws random numbers in forward"),
    (_make_odd(lambda self, h: h * self.weight[0] * (2 if torch.is_grad_enabled() else 1)), "Odd gives another result"),
    (lambda: nn.ParameterList([nn.Parameter(torch.zeros(0))]), "ParameterList has no parameters to train"),
    (lambda: SHARED, r"block\(\) returns the same Linear object again"),
    (lambda: Scaled(OUTSIDE.random()), "block.. makes a Scaled with other parameters at each call, from the same seed"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "sentence"), WRONG_BLOCKS)
def test_wrong_blocks_are_named(block, sentence):
    x, y = gaussian_data((4, 3))
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        successive_distances(block, [2, 4], x, y)
    assert "\n" not in str(caught.value)


def _seed_and_make():
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_layers_that_are_one_object_or_unlike_are_refused():
    x, y = gaussian_data((4, 3))
    bias = iter([True, False] * 2)
    for block, sentence in (
        (lambda: SHARED, r"block\(\) returns the same Linear object again"),
        (lambda: nn.Sequential(SHARED), r"block\(\) returns the same Sequential object again, or one with the same"),
        (
            lambda: nn.Linear(3, 3, bias=next(bias)),
            r"makes a Linear with \{'weight': \(3, 3\)\} after one with .*'bias'",
        ),
        (lambda: copy.deepcopy(SHARED), "All layers of Linear start equal"),
        (_seed_and_make, r"block\(\) sets torch's random seed, so all layers of Linear start equal"),
    ):
        with pytest.raises(ValueError, match=sentence):
            BlockNetwork(block, 2, x, y, initialisation="iid")


def test_layers_without_random_numbers_may_start_equal():
    x, y = gaussian_data((4, 3))
    assert BlockNetwork(Factor, 3, x, y, initialisation="iid").weights["w"].tolist() == [0, 0, 0]


def test_output_and_descent_need_a_forward_pass_with_the_present_weights():
    network = BlockNetwork(Bias, 2, *gaussian_data((4, 3)))
    for ask in (lambda: network.output, lambda: network.descend(0.1)):
        with pytest.raises(RuntimeError, match="call forward"):
            ask()
    network.forward()
    network.descend(0.1)
    with pytest.raises(RuntimeError, match="call forward"):
        _ = network.output


class Aliased(nn.Module):
    """Holds its module in a list too, and a module without parameters in a dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.linears, self.activations = [self.linear], {"tanh": nn.Tanh()}

    def forward(self, h):
        return self.activations["tanh"](self.linears[0](h))


class Narrow(Factor):
    """f(h) = w h, which raises an error if w > 0.01."""

    def forward(self, h):
        if float(self.w.detach()) > 0.01:
            raise RuntimeError("too large\nmore lines")
        return super().forward(h)


def test_a_block_that_raises_while_it_trains_is_named():
    x, _ = gaussian_data((4, 3))
    with pytest.raises(
        ValueError, match="Narrow raised RuntimeError: too large within a network of depth 2: "
    ) as caught:
        successive_distances(Narrow, [2, 4], x, 2 * x, iterations=30)
    assert "\n" not in str(caught.value)


class Tied(nn.Module):
    """f(h) = tanh(h W) W: two modules share one parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, h):
        return self.second(torch.tanh(self.first(h)))


class Recurrent(nn.Module):
    """A recurrent unit, which reads its weights from attributes of its own."""

    def __init__(self):
        super().__init__()
        self.unit = nn.LSTM(3, 3, batch_first=True)

    def forward(self, h):
        return self.unit(h[:, None])[0][:, 0]


@pytest.mark.parametrize(
    "block",
    [
        Tied,
        Recurrent,
        Aliased,
        lambda: nn.BatchNorm1d(3).eval(),
        lambda: nn.Linear(3, 3).float(),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    ],
)
def test_every_layer_has_its_own_weights(block):
    """The output is that of modules that hold the weights. The block itself does not change."""
    x, y = gaussian_data((4, 3))
    *_, record = train(block, 3, x, y, 0.5, 2)
    h, network = x, record.network
    before = {name: tensor.clone() for name, tensor in network.block.state_dict().items()}
    for k in range(3):
        layer = block().double().requires_grad_(False)
        for name, parameter in layer.named_parameters():
            parameter.copy_(record.weights[name][k])
        h = h + layer(h) / 3
    torch.testing.assert_close(network.output, h, rtol=0, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.block.state_dict().items())
    assert not torch.equal(record.weights[name], record.weights[name][:1].expand_as(record.weights[name]))


def test_dropout_that_does_nothing_passes():
    x, y = gaussian_data((4, 3))
    for dropout in (nn.Dropout(0.0), nn.Dropout(0.5).eval()):
        successive_distances(lambda d=dropout: nn.Sequential(nn.Linear(3, 3), d), [2, 4], x, y, iterations=1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam', expected 'sgd'.* depth L, and an optimizer that divides"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1, requires_grad=True)])}, "optimizer is Adam, expected 'sgd'"),
        ({"optimizer": torch.optim.Adam}, "optimizer is Adam, expected 'sgd'"),
        ({"seeds": [0, 1]}, "no option seeds, expected some of: loss, initialisation, seed, optimizer, chunk"),
        ({"progress": True}, "progress is True, expected a function"),
        ({"record_at": []}, "record_at is empty"),
        ({"initialisation": "gaussian"}, "initialisation is 'gaussian', expected one of: weight-tied, iid"),
        ({"depths": [8, 4]}, r"depths is \[8, 4\], expected increasing numbers"),
        ({"record_at": [9]}, "record_at asks for iterations 9 to 9, expected them within 0 to 2"),
        ({"depths": np.array([2.0, 4.0])}, "an entry of depths is 2.0, expected a whole number"),
        ({"depths": [2, 2, 4]}, r"depths is \[2, 2, 4\], expected increasing numbers without repeats"),
        ({"depths": [1, 2]}, "an entry of depths is 1, expected a whole number of at least 2"),
        ({"depths": range(0)}, r"depths is \[\], expected a non-empty list"),
    ],
)
def test_wrong_values_are_named(values, sentence):
    x, y = gaussian_data((4, 3))
    arguments = {"block": Bias, "depths": [2, 4], "x": x, "y": y, "iterations": 2} | values
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        successive_distances(**arguments)
    assert "\n" not in str(caught.value)


def test_a_depth_that_memory_cannot_hold_is_refused():
    with pytest.raises(MemoryError, match="depth is 1000000000000000, and the parameters of that many Bias"):
        train(Bias, 10**15, *gaussian_data((4, 3)))


def test_no_slope_is_fitted_to_equal_layers():
    table = successive_distances(make_block("perceptron"), [2, 4], *gaussian_data((4, 16)), iterations=1)
    assert table["max_distance"] == [0, 0]
    with pytest.raises(ValueError, match=r"found 0: .* train for more steps"):
        fit_slope(table["depth"], table["max_distance"])


def test_blocks_that_the_catalogue_lacks_are_named():
    with pytest.raises(ValueError, match="block is 'mixer', expected one of: perceptron"):
        make_block("mixer")
    with pytest.raises(ValueError, match="normalisation of perceptron is 'batch', expected one of: none, layer"):
        make_block("perceptron", normalisation="batch")

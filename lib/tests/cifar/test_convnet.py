import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib import activations
from lib.cifar.network import INITIALISATIONS, ConvNetConfig, ConvResNet

SMALL = {"depth": 5, "seed": 1}
MODULES = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "identity": nn.Identity, "softplus": nn.Softplus,
           "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU}  # fmt: skip


class Reference(nn.Module):
    """The same network, layer by layer, in PyTorch's own modules."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        C = config.channels
        self.conv1, self.bn1 = nn.Conv2d(3, C, 5, stride=3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.residual_layers = nn.ModuleList()
        for _ in range(config.depth):
            layer = nn.Module()
            layer.conv1, layer.conv2 = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
            for i in "12":
                if config.norm_groups:
                    layer.add_module(f"gn{i}", nn.GroupNorm(config.norm_groups, C))
                else:
                    layer.add_module(f"bn{i}", nn.BatchNorm2d(C) if config.batch_norm else nn.Identity())
            self.residual_layers.append(layer)
        self.norm = "gn" if config.norm_groups else "bn"
        self.linear = nn.Linear(4 * C, 10)
        self.s = MODULES[config.activation]()
        self.stem_s = MODULES[config.stem_activation]()

    def forward(self, x):
        h = self.stem_s(self.bn1(self.conv1(x)))
        for layer in self.residual_layers:
            first, second = (layer.get_submodule(f"{self.norm}{i}") for i in "12")
            branch = second(layer.conv2(self.s(first(layer.conv1(h)))))
            h = h + branch / len(self.residual_layers)
        return self.linear(F.avg_pool2d(h, 4).flatten(1))


def perturb(network: ConvResNet) -> ConvResNet:
    """Move the weights away from the initialisation, at which the blocks are zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def compute_hidden_states(network: ConvResNet, x: torch.Tensor) -> torch.Tensor:
    """h_0, ..., h_L in training mode."""
    h = network.train().stem(x)
    return torch.stack([h, *network.residual_layers.states(h)]).detach()


def test_scales_are_those_of_the_hidden_states():
    network = perturb(ConvResNet(ConvNetConfig(initialisation="iid", **SMALL))).double()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scales = network.scales()
    stem = network.bn1(network.conv1(x))
    assert scales["stem_scale"] == pytest.approx(stem.square().mean().sqrt().item(), rel=1e-3)
    steps = compute_hidden_states(network, x).diff(dim=0)
    lengths = steps.square().flatten(1).mean(dim=1).sqrt()  # of h_{k+1} - h_k
    assert scales["path_length"] == pytest.approx(lengths.sum().item(), rel=1e-3)  # up to the eps of batch norm


def test_a_smaller_stem_gives_the_relative_path_of_larger_steps():
    """A stem scaled by c gives the relative path of steps scaled by 1/c."""
    smaller, longer = (perturb(ConvResNet(ConvNetConfig(initialisation="iid", **SMALL))).double() for _ in range(2))
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    c, layers = 0.5, longer.residual_layers
    with torch.no_grad():
        for parameter in smaller.bn1.parameters():
            parameter *= c
        for name in ("weight", "bias"):
            layers.stacked(f"bn2.{name}").div_(c)
    torch.testing.assert_close(
        compute_hidden_states(smaller, x), c * compute_hidden_states(longer, x), rtol=1e-3, atol=1e-4
    )
    lengths = [scales["path_length"] / scales["stem_scale"] for scales in (smaller.scales(), longer.scales())]
    assert lengths[0] == pytest.approx(lengths[1])


def test_without_batch_norm_the_weights_do_not_tell_the_path_length():
    network = ConvResNet(ConvNetConfig(batch_norm=False, **SMALL))
    assert network.scales() == {"stem_scale": 1.0, "path_length": None}


@pytest.mark.parametrize("norm", [{}, {"batch_norm": False}, {"batch_norm": False, "norm_groups": 4},
                                  {"stem_activation": "gelu"}])  # fmt: skip
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_agrees_with_stock_modules_in_float64(activation, norm):
    config = ConvNetConfig(activation=activation, initialisation="iid", **SMALL, **norm)
    network = perturb(ConvResNet(config)).double()
    reference = Reference(config).double()
    assert list(reference.state_dict()) == list(network.state_dict())
    reference.load_state_dict(network.state_dict())
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    for mode in (True, True, False):  # training twice, so that the running statistics have moved
        network.train(mode), reference.train(mode)
        torch.testing.assert_close(network(x), reference(x), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(network.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    network.train(), reference.train()
    network(x).square().sum().backward()
    reference(x).square().sum().backward()
    gradient = network.residual_layers.stacked("conv1.weight").grad
    for k, layer in enumerate(reference.residual_layers):
        torch.testing.assert_close(gradient[k], layer.conv1.weight.grad, rtol=1e-8, atol=1e-10)


def test_initialisation_is_weight_tied_or_independent():
    tied, iid = (
        ConvResNet(ConvNetConfig(depth=40, initialisation=initialisation)) for initialisation in INITIALISATIONS
    )
    for name in tied.residual_layers.CONVOLUTIONS:
        stacked, independent = tied.residual_layers.stacked(name), iid.residual_layers.stacked(name)
        assert torch.equal(stacked, stacked[:1].expand_as(stacked))
        assert torch.equal(stacked[0], independent[0])  # they differ in the later layers alone
        assert len({layer.flatten()[0].item() for layer in independent}) == 40
        # PyTorch's default for 3x3 convolutions of 16 channels: uniform in +- 1/12, standard deviation 1/(12 sqrt 3).
        assert independent.abs().max() <= 1 / 12
        assert independent.std().item() == pytest.approx(1 / (12 * math.sqrt(3)), rel=0.05)
    assert torch.equal(tied.conv1.weight, iid.conv1.weight)
    assert torch.equal(tied.linear.weight, iid.linear.weight)
    layers = tied.residual_layers
    assert (layers.bn1_weight == 1).all()
    assert not any(t.any() for t in (layers.bn1_bias, layers.bn2_weight, layers.bn2_bias))


def test_group_norm_starts_as_batch_norm_does_and_has_no_batch_statistics():
    grouped = ConvResNet(ConvNetConfig(batch_norm=False, norm_groups=1, **SMALL))
    plain = ConvResNet(ConvNetConfig(**SMALL))
    assert torch.equal(grouped.residual_layers.conv1_weight, plain.residual_layers.conv1_weight)
    h = torch.randn(3, 16, 10, 10, generator=torch.Generator().manual_seed(2))
    layers = grouped.residual_layers
    assert torch.equal(layers(h), h)  # each block starts at 0
    perturb(grouped)
    torch.testing.assert_close(layers.train()(h)[:1], layers.eval()(h[:1]))


def test_initialisation_without_batch_norm_is_small_in_conv1_and_zero_in_conv2():
    layers = ConvResNet(ConvNetConfig(depth=10, batch_norm=False, initialisation="iid")).residual_layers
    assert not layers.conv2_weight.any()
    assert not layers.conv2_bias.any()
    bound = 1e-4 * math.sqrt(6 / 288)
    assert 0.99 * bound < layers.conv1_weight.abs().max() <= bound
    assert layers.conv1_bias.std().item() == pytest.approx(1 / (12 * math.sqrt(3)), rel=0.2)


def test_a_seed_fixes_the_weights_and_another_changes_them():
    first, again, other = (ConvResNet(ConvNetConfig(depth=2, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["residual_layers.0.conv1.weight"], other["residual_layers.0.conv1.weight"])


def test_wrong_state_dicts_are_named():
    network = ConvResNet(ConvNetConfig(**SMALL))
    state = network.state_dict()
    state["residual_layers.3.bn1.weight"] = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"residual_layers.3.bn1.weight has shape \(8,\), expected \(16,\)"):
        network.load_state_dict(state)
    deeper = ConvResNet(ConvNetConfig(depth=6)).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*residual_layers.5.conv1.weight"):
        network.load_state_dict(deeper)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"depth": 0}, "depth is 0, expected a whole number of at least 1"),
        ({"activation": "swish"}, "activation is 'swish', expected one of: gelu, relu"),
        ({"batch_norm": "True"}, "batch_norm is 'True', expected True or False"),
        ({"norm_groups": 4}, "norm_groups is 4 with batch_norm True, expected one of the two"),
        ({"batch_norm": False, "norm_groups": 3}, "norm_groups is 3, expected a divisor of the 16 channels"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_config_checks_itself(values, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        ConvNetConfig(**values)


def test_linear_is_the_released_name_of_the_identity():
    assert ConvNetConfig(activation="linear") == ConvNetConfig(activation="identity")

"""The convolutional residual network of Section 5.2 (Figure 3, Table 1).

    stem     h_0     = relu(bn(conv 5x5, stride 3 (x)))               (n, 3, 32, 32) -> (n, 16, 10, 10)
    layers   h_{k+1} = h_k + (1/L) bn2(conv2(s(bn1(conv1(h_k)))))     k = 0..L-1, conv 3x3 with bias
    head     F(x)    = linear(average pooling of h_L)                 (n, 16, 10, 10) -> (n, 64) -> (n, 10)

The strides (3 in the stem, 1 in the residual layers) and the padding are those of the released script, whose head has
64 features; the paper's text says strides of 2 and 2. The stem's ReLU stays whatever the activation s, unless
`ConvNetConfig.stem_activation` replaces it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import activations, checks
from lib.engine import build as engine

CLASSES = 10
CONVOLUTIONS = ("conv1", "conv2")  # of a layer
INITIALISATIONS = ("weight-tied", "iid")
STEM_PADDING = 1  # as in the released script; 0 would give 10x10 as well
BN_EPS = 1e-5
BN_MOMENTUM = 0.1
# Without batch norm, conv1 starts this much below Xavier's scale, so that 256 layers start near the identity.
XAVIER_GAIN = 1e-4


@dataclass(frozen=True)
class ConvNetConfig:
    """Shape and initialisation of a network.

    ``norm_groups`` G > 0 needs ``batch_norm`` False, and gives each layer a group norm of G groups of channels (1: a
    layer norm). A group norm has no batch statistics. The stem has batch norm always. ``stem_activation`` replaces the
    ReLU of the stem. Neither option is in the paper.

    ``initialisation`` is "weight-tied" (every layer starts with the draw of layer 0) or "iid" (each layer has its own
    draw). For a given ``seed``, the two share the draws of the stem, the head and layer 0.
    """

    depth: int = 256
    channels: int = 16
    activation: str = "gelu"
    batch_norm: bool = True
    initialisation: str = "weight-tied"
    seed: int = 0
    norm_groups: int = 0
    stem_activation: str = "relu"

    def __post_init__(self) -> None:
        checks.check_fields(self, "depth", "channels", "batch_norm", seed=0, norm_groups=0)
        checks.choice("initialisation", self.initialisation, INITIALISATIONS)
        if self.norm_groups and self.batch_norm:
            raise ValueError(
                f"norm_groups is {self.norm_groups} with batch_norm True, expected one of the two: set batch_norm to "
                f"False, or norm_groups to 0."
            )
        if self.norm_groups and self.channels % self.norm_groups:
            raise ValueError(f"norm_groups is {self.norm_groups}, expected a divisor of the {self.channels} channels.")
        object.__setattr__(self, "activation", activations.get(self.activation).name)
        checks.choice("stem_activation", self.stem_activation, activations.ACTIVATIONS)


class ResidualLayers(nn.Module):
    """The L residual layers, with each parameter stacked over the depth: ``conv1_weight`` (L, C, C, 3, 3), ...

    An optimiser then steps a dozen tensors instead of two thousand, and depth is an ordinary axis for the measures of
    smoothness. The state dict has the released names: ``{k}.conv1.weight``, ``{k}.bn1.running_mean``, ..., k = 0..L-1.
    """

    CONVOLUTIONS = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
    BN_PARAMETERS = ("weight", "bias")
    BN_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.depth, self.channels = config.depth, config.channels
        self.activation = config.activation
        self.batch_norm, self.norm_groups = config.batch_norm, config.norm_groups
        self.engine = "pytorch"  # that ran the last forward pass
        kernel, vector = (self.depth, self.channels, self.channels, 3, 3), (self.depth, self.channels)
        for name in self.names():
            if name.endswith("num_batches_tracked"):
                self.register_buffer(_attribute(name), torch.zeros(self.depth, dtype=torch.int64))
            elif name.endswith(self.BN_BUFFERS):
                self.register_buffer(_attribute(name), torch.full(vector, float(name.endswith("var"))))
            else:
                shape = kernel if name in ("conv1.weight", "conv2.weight") else vector
                self.register_parameter(_attribute(name), nn.Parameter(torch.empty(shape)))

    def names(self) -> Iterator[str]:
        """The released names of one layer's tensors, in the released order; group norms are gn1 and gn2."""
        yield from self.CONVOLUTIONS
        for bn in ("bn1", "bn2") if self.batch_norm else ():
            yield from (f"{bn}.{name}" for name in self.BN_PARAMETERS + self.BN_BUFFERS)
        for gn in ("gn1", "gn2") if self.norm_groups else ():
            yield from (f"{gn}.{name}" for name in self.BN_PARAMETERS)

    def stacked(self, name: str) -> Tensor:
        """The tensor of that released name ("conv1.weight", ...) over all layers, depth first."""
        return getattr(self, _attribute(name))

    def forward(self, h: Tensor) -> Tensor:
        """h_0 (n, C, 10, 10) -> h_L, of the same shape. The compiled engine runs it if it can, else PyTorch."""
        tensors = {name: self.stacked(name) for name in self.names()}
        if not engine.find_conv_stack_problem(h, tensors, self.activation, self.norm_groups):
            self.engine = "compiled"
            norm = {"norm_groups": self.norm_groups, "momentum": BN_MOMENTUM, "eps": BN_EPS}
            return engine.conv_stack(h, tensors, self.activation, training=self.training, **norm)
        self.engine = "pytorch"
        for state in self.states(h):
            h = state
        return h

    def states(self, h: Tensor) -> Iterator[Tensor]:
        """h_1, ..., h_L from h_0 = ``h``, by PyTorch. In training mode, batch norm uses the batch's statistics."""
        s = activations.get(self.activation).function
        if self.batch_norm and self.training:
            self.bn1_num_batches_tracked += 1
            self.bn2_num_batches_tracked += 1
        names = [name for name in self.names() if not name.endswith("num_batches_tracked")]
        for tensors in zip(*(self.stacked(name).unbind() for name in names), strict=True):
            layer = dict(zip(names, tensors, strict=True))
            z = F.conv2d(h, layer["conv1.weight"], layer["conv1.bias"], padding=1)
            z = s(self._normalise(z, layer, 1))
            z = F.conv2d(z, layer["conv2.weight"], layer["conv2.bias"], padding=1)
            h = h + self._normalise(z, layer, 2) / self.depth
            yield h

    def _normalise(self, z: Tensor, layer: dict[str, Tensor], number: int) -> Tensor:
        """The layer's batch norm or group norm of that number, applied to z; z itself if the layer has none."""
        if self.batch_norm:
            statistics = [layer[f"bn{number}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
            return F.batch_norm(z, *statistics, training=self.training, momentum=BN_MOMENTUM, eps=BN_EPS)
        if self.norm_groups:
            return F.group_norm(z, self.norm_groups, layer[f"gn{number}.weight"], layer[f"gn{number}.bias"], BN_EPS)
        return z

    # The state dict has the released names and shapes: one tensor for each layer.

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for k in range(self.depth):
            for name in self.names():
                tensor = self.stacked(name)[k]
                destination[f"{prefix}{k}.{name}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        expected = set()
        for k in range(self.depth):
            for name in self.names():
                key, own = f"{prefix}{k}.{name}", self.stacked(name)[k]
                expected.add(key)
                if key not in state_dict:
                    missing_keys.append(key)
                elif state_dict[key].shape != own.shape:
                    found, wanted = tuple(state_dict[key].shape), tuple(own.shape)
                    error_msgs.append(f"{key} has shape {found}, expected {wanted}.")
                else:
                    with torch.no_grad():
                        own.copy_(state_dict[key])
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in expected]


def _attribute(name: str) -> str:
    return name.replace(".", "_")


@torch.no_grad()
def batch_norm_scale(scale: Tensor, shift: Tensor) -> Tensor:
    """The root mean square over channels of a batch norm's output on its own batch:
    sqrt(mean_c(gamma_c^2 + beta_c^2)), (..., C) -> (...), float64. Its parameters alone determine it."""
    return (scale.double().square() + shift.double().square()).mean(dim=-1).sqrt()


class ConvResNet(nn.Module):
    """The network of the module's docstring, initialised as its config says.

    The draws come from one generator seeded with ``config.seed``, on the CPU, in this order: stem, head,
    then layer by layer conv1 weight and bias, conv2 weight and bias. Its state dict has the names of the
    released checkpoints (``conv1.weight``, ``bn1.*``, ``residual_layers.{k}.*``, ``linear.*``).
    """

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.channels, 5, stride=3, padding=STEM_PADDING, bias=False)
        self.bn1 = nn.BatchNorm2d(config.channels)
        self.residual_layers = ResidualLayers(config)
        self.linear = nn.Linear(4 * config.channels, CLASSES)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, 32, 32) -> logits (n, 10)."""
        return self.head(self.residual_layers(self.stem(images)))

    def stem(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, 32, 32) -> h_0 (n, C, 10, 10), in the precision of the weights."""
        s = activations.get(self.config.stem_activation).function
        return s(self.bn1(self.conv1(images.to(self.conv1.weight.dtype))))

    def head(self, h: Tensor) -> Tensor:
        """h_L (n, C, 10, 10) -> logits (n, 10)."""
        h = F.avg_pool2d(h, 4).flatten(1)  # (n, C, 2, 2) -> (n, 4C)
        return self.linear(h)

    @torch.no_grad()
    def hidden_states(self, images: Tensor) -> Tensor:
        """h_0, ..., h_L of normalised images (n, 3, 32, 32), in evaluation mode: (L+1, n, C, 10, 10)."""
        training = self.training
        self.eval()
        h = self.stem(images)
        states = torch.stack([h, *self.residual_layers.states(h)])
        self.train(training)
        return states

    def kernels(self) -> dict[str, Tensor]:
        """The kernels of both convolutions of all layers, by the names "conv1" and "conv2", each (L, C, C, 3, 3)."""
        return {name: self.residual_layers.stacked(f"{name}.weight").detach() for name in CONVOLUTIONS}

    def scales(self) -> dict[str, float | None]:
        """How large the hidden states are, by `batch_norm_scale`.

        "stem_scale" is the scale of the stem's output before its activation. "path_length" is the mean over layers of
        the scale of bn2's output; the path h_0, ..., h_L has at most this length. Without batch norm the weights alone
        do not determine it, and it is None.

        Up to its head, a network depends only on the ratio of the two: bn1 takes the scale out of a layer's input. If
        the stem is c times smaller, h / |h_0| solves an ODE whose right-hand side is c times larger.
        """
        layers = self.residual_layers
        return {
            "stem_scale": batch_norm_scale(self.bn1.weight, self.bn1.bias).item(),
            "path_length": batch_norm_scale(layers.bn2_weight, layers.bn2_bias).mean().item()
            if self.config.batch_norm
            else None,
        }

    @property
    def engine(self) -> str:
        """The engine that last ran the residual layers: "compiled" or "pytorch"."""
        return self.residual_layers.engine

    @torch.no_grad()
    def _initialise(self) -> None:
        config, layers = self.config, self.residual_layers
        generator = torch.Generator().manual_seed(config.seed)

        def uniform(tensor: Tensor, bound: float) -> None:
            tensor.uniform_(-bound, bound, generator=generator)

        # PyTorch's default for weights and biases is uniform in +- 1/sqrt(fan in).
        uniform(self.conv1.weight, 1 / math.sqrt(3 * 5 * 5))
        uniform(self.linear.weight, 1 / math.sqrt(4 * config.channels))
        uniform(self.linear.bias, 1 / math.sqrt(4 * config.channels))
        fan = 9 * config.channels
        default = 1 / math.sqrt(fan)
        xavier = XAVIER_GAIN * math.sqrt(6 / (fan + fan))
        for k in range(1 if config.initialisation == "weight-tied" else config.depth):
            uniform(layers.conv1_weight[k], default if config.batch_norm or config.norm_groups else xavier)
            uniform(layers.conv1_bias[k], default)
            uniform(layers.conv2_weight[k], default)
            uniform(layers.conv2_bias[k], default)
        if config.initialisation == "weight-tied":
            for name in layers.CONVOLUTIONS:
                layers.stacked(name)[1:] = layers.stacked(name)[0]
        # Each layer starts as the identity, so the network starts as its stem and head.
        if config.batch_norm:
            layers.bn1_weight.fill_(1)
            for tensor in (layers.bn1_bias, layers.bn2_weight, layers.bn2_bias):
                tensor.zero_()
        elif config.norm_groups:
            layers.gn1_weight.fill_(1)
            for tensor in (layers.gn1_bias, layers.gn2_weight, layers.gn2_bias):
                tensor.zero_()
        else:
            layers.conv2_weight.zero_()
            layers.conv2_bias.zero_()

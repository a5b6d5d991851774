"""Trained convolutional networks with fewer layers, or more: every r-th one, without any training.

A network near a neural ODE discretises it with L steps of 1/L, and any n of them in steps of 1/n do about as well; so
`resample` makes of its layers, by a rule of `lib.ode.layers`, a network of n layers. The parallel form

    h_{j+1} = h_j + (1/L) sum over the layers k of group j of f_k(h_j),    j = 0..n-1

computes all layers, n groups of them at the same h: it asks of the layers that h moves little within a group, and not
that they are alike.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import activations, checks
from lib.cifar import dataset
from lib.cifar.checkpoints import Checkpoint
from lib.cifar.dataset import Images
from lib.cifar.network import BN_EPS, BN_MOMENTUM, ConvResNet
from lib.ode import layers as depth_layers
from lib.ode.solvers import Branch

RECOMPUTED = "recomputed"
BN_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
BATCH = 500


@torch.no_grad()
def resample(
    network: ConvResNet,
    layers: int,
    weights: str = "kept",
    statistics: str | None = None,
    images: Tensor | None = None,
) -> ConvResNet:
    """A network of ``layers`` residual layers, in evaluation mode, with the stem and the head of ``network``.

    Main arguments: ``network``, of L layers, which stays as it is; ``layers`` n, which need not divide L (n > L is
    interpolated, with a warning that says so).

    Other arguments: ``weights`` is the rule for everything that was trained (convolutions, and scale and shift of the
    batch norms), ``statistics`` the one for the means and variances of the batch norms: "kept", "averaged" or
    "interpolated" as in `lib.ode.layers`, or "recomputed", those of the ``images`` (m, 3, 32, 32), normalised training
    images, as one batch; by default that of the weights.

    Raises TypeError or ValueError, one sentence, for values that cannot be.
    """
    layers, statistics = checks.plain(layers), statistics or weights
    checks.choice("statistics", statistics, (*depth_layers.RULES, RECOMPUTED))
    if statistics == RECOMPUTED and images is None:
        raise ValueError("statistics is 'recomputed' and images is None, expected the normalised images to do it on.")
    depth = network.config.depth
    trained = depth_layers.matrix(depth, layers, weights)
    rule = "kept" if statistics == RECOMPUTED else statistics
    # What a rule other than that of the weights says of n > L has been said.
    counted = depth_layers.matrix(depth, layers, rule if layers <= depth else "interpolated")
    made = ConvResNet(replace(network.config, depth=layers))
    for part in ("conv1", "bn1", "linear"):
        getattr(made, part).load_state_dict(getattr(network, part).state_dict())
    for name in network.residual_layers.names():
        coefficients = counted if name.endswith(BN_STATISTICS) else trained
        made.residual_layers.stacked(name).copy_(
            depth_layers.apply(coefficients, network.residual_layers.stacked(name))
        )
    made.eval()
    if statistics == RECOMPUTED:
        recompute_statistics(made, images)
    return made


@torch.no_grad()
def recompute_statistics(network: ConvResNet, images: Tensor) -> None:
    """Set the means and variances of the layers' batch norms, in place, to those of normalised ``images``
    (m, 3, 32, 32) as one batch, each layer's with those before it recomputed.

    Raises TypeError or ValueError, one sentence, for images that are no such array of finite numbers.
    """
    images = checks.as_tensor("images", images).to(network.linear.weight)
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not len(images):
        raise ValueError(f"images is {tuple(images.shape)}, expected (m, 3, 32, 32), normalised images.")
    checks.finite_entries("images", images)
    layers = network.residual_layers
    if not layers.batch_norm:
        return
    running = [layers.stacked(f"{bn}.{name}") for bn in ("bn1", "bn2") for name in BN_STATISTICS[:2]]
    for statistic in running:
        statistic.zero_()
    h = network.eval().stem(images)
    layers.train()
    layers(h)  # leaves BN_MOMENTUM times the batch's statistics
    layers.eval()
    for statistic in running:
        statistic.div_(BN_MOMENTUM)


def resample_checkpoint(checkpoint: Checkpoint, layers: int, **rules) -> Checkpoint:
    """`resample` of a checkpoint: what `checkpoints.save` writes and `checkpoints.load` rebuilds as any other.

    Its configuration is that of the run with another depth, and ``origin`` says what it was made of: no accuracy is
    taken over, since none was measured.
    """
    config = replace(checkpoint.config, depth=layers)
    made = resample(checkpoint.network, layers, **rules)
    origin = f"resampled from {checkpoint.config.name}"
    return Checkpoint(config, made, {}, checkpoint.versions, origin)


# ------------------------------------------------------------------------------------- layers as plain convolutions


@torch.no_grad()
def folded(network: ConvResNet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layers in evaluation mode as two convolutions each, with their batch norms inside:
    f_k(h) = conv2(s(conv1(h))). Weights and biases, (L, C, C, 3, 3) and (L, C) twice, conv1's first. Raises ValueError
    for a network with group norm, which cannot be folded."""
    layers, found = network.residual_layers, []
    if layers.norm_groups:
        raise ValueError(
            f"norm_groups is {layers.norm_groups}, expected 0: a group norm depends on its image, and is no part of a "
            "convolution."
        )
    for convolution, bn in (("conv1", "bn1"), ("conv2", "bn2")):
        weight, bias = (layers.stacked(f"{convolution}.{name}") for name in ("weight", "bias"))
        if layers.batch_norm:
            scale = layers.stacked(f"{bn}.weight") * (layers.stacked(f"{bn}.running_var") + BN_EPS).rsqrt()
            bias = (bias - layers.stacked(f"{bn}.running_mean")) * scale + layers.stacked(f"{bn}.bias")
            weight = weight * scale[:, :, None, None, None]
        found += [weight.clone(), bias.clone()]
    return tuple(found)


def branch(activation: str) -> Branch:
    """f of a layer that `folded` has made two convolutions of, Z = (w1, b1, w2, b2): what `lib.ode` integrates."""
    s = activations.get(activation).function
    return lambda h, layer: F.conv2d(s(F.conv2d(h, *layer[:2], padding=1)), *layer[2:], padding=1)


class ParallelForm(nn.Module):
    """The layers of ``network`` in ``groups`` groups (a whole number of at least 1), each computed at one h (see the
    module's docstring), in evaluation mode: normalised images -> logits.

    A group of r layers is one layer of r times the channels: conv1 from C to r C channels, conv2 back to C.
    """

    def __init__(self, network: ConvResNet, groups: int) -> None:
        super().__init__()
        checks.positive_int("groups", groups)
        self.network, depth = network, network.config.depth
        self.activation = activations.get(network.config.activation).function
        w1, b1, w2, b2 = folded(network)
        edges = [group * depth // groups for group in range(groups + 1)]
        self.groups = [
            (
                w1[start:stop].flatten(0, 1),
                b1[start:stop].flatten(),
                w2[start:stop].transpose(0, 1).flatten(1, 2) / depth,
                b2[start:stop].sum(dim=0) / depth,
            )
            for start, stop in itertools.pairwise(edges)
            if stop > start
        ]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, 32, 32) -> logits (n, 10)."""
        h = self.network.stem(images).contiguous(memory_format=torch.channels_last)
        for w1, b1, w2, b2 in self.groups:
            h = h + F.conv2d(self.activation(F.conv2d(h, w1, b1, padding=1)), w2, b2, padding=1)
        return self.network.head(h)


# ------------------------------------------------------------------------------------------------- what it costs


@torch.no_grad()
def logits(network: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """The logits (n, 10) of all images, in evaluation mode, in batches."""
    return torch.cat([network(dataset.normalise(pixels)) for pixels in images.pixels.split(BATCH)])


def accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is their label's, in %."""
    return 100 * int((found.argmax(dim=1) == labels).sum()) / len(labels)


def distance(found: Tensor, expected: Tensor) -> float:
    """|F_n(X) - F_L(X)|_F / |F_L(X)|_F of logits (n, 10), those of all L layers second; what is the same for all
    classes is taken out first, since no probability depends on it."""
    found, expected = (each.double() - each.double().mean(dim=1, keepdim=True) for each in (found, expected))
    return float((found - expected).norm() / expected.norm())

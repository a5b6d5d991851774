"""Trained convolutional networks with fewer or more layers, without any training.

A network near a neural ODE discretises it with L steps of 1/L, and n steps of 1/n then do about as well. `resample`
makes a network of n layers from its L layers, by a rule of `lib.ode.layers`. The parallel form

    h_{j+1} = h_j + (1/L) sum over the layers k of group j of f_k(h_j),    j = 0..n-1

computes all layers, but those of a group at the same h. It is accurate if h moves little within a group, whether the
layers of the group are alike or not.
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

    Main arguments: ``network``, of L layers, which is not changed; ``layers`` n, which need not divide L. If n > L, the
    layers are interpolated whatever the rules, with a warning if one of them is another.

    Other arguments: ``weights`` is the rule for everything that was trained (convolutions, and scale and shift of the
    batch norms): "kept", "averaged" or "interpolated" as in `lib.ode.layers`. ``statistics`` is the rule for the means
    and variances of the batch norms: one of these (default: that of the weights) or "recomputed". The latter takes the
    statistics of ``images`` (m, 3, 32, 32), normalised training images, as one batch.

    Raises TypeError or ValueError for wrong values.
    """
    if not isinstance(network, ConvResNet):
        raise TypeError(f"network is {type(network).__name__}, expected a network: of a checkpoint, its `network`.")
    checks.choice("weights", weights, depth_layers.RULES)
    layers, statistics = checks.plain(layers), statistics or weights
    checks.choice("statistics", statistics, (*depth_layers.RULES, RECOMPUTED))
    if statistics == RECOMPUTED and images is None:
        raise ValueError("statistics is 'recomputed' and images is None, expected normalised training images.")
    depth = network.config.depth
    trained = depth_layers.matrix(depth, layers, weights)
    rule = "kept" if statistics == RECOMPUTED else statistics
    if layers > depth and (weights != "interpolated" or statistics == RECOMPUTED):
        rule = "interpolated"  # as every rule does then; the call above has warned of it if that was not asked for
    counted = depth_layers.matrix(depth, layers, rule)
    made = ConvResNet(replace(network.config, depth=layers)).to(network.linear.weight)
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
    (m, 3, 32, 32) as one batch. Each layer sees the output of the layers before it with their new statistics.

    Raises TypeError or ValueError if the images are not such an array of finite numbers.
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
    layers(h)  # sets each to BN_MOMENTUM times the batch's statistics
    layers.eval()
    for statistic in running:
        statistic.div_(BN_MOMENTUM)


def resample_checkpoint(checkpoint: Checkpoint, layers: int, **rules) -> Checkpoint:
    """`resample` a checkpoint. The result can be saved and loaded as any other checkpoint.

    Its configuration is that of the run with another depth, and its ``origin`` names the run. Its summary is empty,
    since its accuracy was not measured.
    """
    made = resample(checkpoint.network, layers, **rules)
    config = replace(checkpoint.config, depth=made.config.depth)
    origin = f"resampled from {checkpoint.config.name}"
    return Checkpoint(config, made, {}, checkpoint.versions, origin)


# ------------------------------------------------------------------------------------- layers as plain convolutions


@torch.no_grad()
def fold_batch_norms(network: ConvResNet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold the batch norms into the convolutions, so that in evaluation mode f_k(h) = conv2(s(conv1(h))).

    Returns weights (L, C, C, 3, 3) and biases (L, C) of conv1, then those of conv2. Raises ValueError for a network
    with group norm, which cannot be folded.
    """
    layers, found = network.residual_layers, []
    if layers.norm_groups:
        raise ValueError(
            f"norm_groups is {layers.norm_groups}, expected 0: a group norm depends on its image, and cannot be folded "
            "into a convolution."
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
    """f of a layer Z = (w1, b1, w2, b2) of `fold_batch_norms`: the right-hand side that `lib.ode` integrates."""
    s = activations.get(activation).function
    return lambda h, layer: F.conv2d(s(F.conv2d(h, *layer[:2], padding=1)), *layer[2:], padding=1)


class ParallelForm(nn.Module):
    """The parallel form (see the module's docstring) of ``network`` in ``groups`` >= 1 groups, in evaluation mode.

    A group of r layers is one layer with r times the channels: conv1 from C to r C channels, conv2 back to C.
    """

    def __init__(self, network: ConvResNet, groups: int) -> None:
        super().__init__()
        checks.positive_int("groups", groups)
        self.network, depth = network, network.config.depth
        self.activation = activations.get(network.config.activation).function
        w1, b1, w2, b2 = fold_batch_norms(network)
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
    """|F_n(X) - F_L(X)|_F / |F_L(X)|_F of the logits F_n(X) = ``found`` and F_L(X) = ``expected``, (images, 10).

    The mean over classes is subtracted from both first, since probabilities do not depend on it.
    """
    found, expected = (each.double() - each.double().mean(dim=1, keepdim=True) for each in (found, expected))
    return float((found - expected).norm() / expected.norm())

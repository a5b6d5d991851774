"""The schedule of a run on CIFAR-10: steps, learning rates, weight decay, training time."""

import math

from lib.cifar.config import CifarConfig

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SCALING_DEPTH = 256  # with depth_scaling, layers move as in a network of this depth
ADAPTIVE_LEARNING_RATE = 1e-2  # of the stem and the head, if config.adaptive


def steps(config: CifarConfig, images: int) -> int:
    """Steps of an epoch over that number of images. The last batch has those that are left (50,000 = 781 x 64 + 16)."""
    return math.ceil(images / config.batch_size)


def tests_after(config: CifarConfig, epoch: int) -> bool:
    """Whether the network is evaluated on the test images after that epoch (0-based)."""
    return (epoch + 1) % config.test_every == 0 or epoch + 1 == config.epochs


def learning_rate(config: CifarConfig, epoch: int) -> float:
    """Learning rate of the residual layers in that epoch (0-based): (eta/2) (1 + cos(pi epoch / epochs)), times L / 256
    if ``config.depth_scaling``."""
    return config.learning_rate * _depth_factor(config) * _cosine(config, epoch)


def layer_weight_decay(config: CifarConfig) -> float:
    """Weight decay of the residual layers: lambda, times 256 / L if ``config.depth_scaling``. It then removes the same
    share of the weights at every depth."""
    return WEIGHT_DECAY / _depth_factor(config)


def _depth_factor(config: CifarConfig) -> float:
    return config.depth / SCALING_DEPTH if config.depth_scaling else 1.0


def end_learning_rate(config: CifarConfig, epoch: int) -> float:
    """Learning rate of the stem and the head: the same schedule, starting at 0.01 if ``config.adaptive``."""
    return (ADAPTIVE_LEARNING_RATE if config.adaptive else config.learning_rate) * _cosine(config, epoch)


def _cosine(config: CifarConfig, epoch: int) -> float:
    return (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def training_time(config: CifarConfig, images: int, epochs: int | None = None) -> float:
    """The sum of the learning rates of all steps in the run's first ``epochs`` (None: all), if an epoch has that number
    of ``images``."""
    epochs = config.epochs if epochs is None else epochs
    return steps(config, images) * sum(learning_rate(config, epoch) for epoch in range(epochs))


def weight_decay_alone(time: float) -> float:
    """The share of a weight without gradient that is left after the training time t: exp(-lambda t / (1 - mu)). A step
    with momentum mu and weight decay lambda counts as 1/(1 - mu) steps of gradient descent."""
    return math.exp(-WEIGHT_DECAY * time / (1 - MOMENTUM))

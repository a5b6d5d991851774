"""The configuration of a run on CIFAR-10, and its schedule: learning rates, steps, training time."""

from dataclasses import dataclass, fields

from lib import checks
from lib.cifar.network import ConvNetConfig


@dataclass(frozen=True)
class CifarConfig:
    """One run. The defaults are the paper's setting; every field is part of the run's name or of its check.

    ``smooth_init`` is the weight-tied initialisation. ``adaptive`` starts the step of the stem and the head at
    0.01, whatever ``learning_rate``; it falls to 0 by the same cosine. ``hold_stem`` leaves the stem's batch norm at
    scale 1 and shift 0, as it starts: an experiment that is not in the paper. So are ``depth_scaling``, with which the
    layers' learning rate is L / 256 times as large and their weight decay 256 / L times, and ``norm_groups``, for group
    norm (see `ConvNetConfig`). A layer's gradient is of order 1/L, so that with ``depth_scaling`` networks of every
    depth follow the same flow in time, decay included. The cosine schedule always ends at ``epochs``, so that a run of
    30 epochs is a short schedule of its own, not the beginning of one of 180.
    ``train_images`` and ``test_images`` (0 means all) cut the sets for trials.
    """

    activation: str = "gelu"
    smooth_init: bool = True
    batch_norm: bool = True
    depth: int = 256
    channels: int = 16
    learning_rate: float = 0.04
    epochs: int = 180
    batch_size: int = 64
    adaptive: bool = False
    hold_stem: bool = False
    depth_scaling: bool = False
    norm_groups: int = 0
    seed: int = 0
    test_every: int = 5
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        checks.make_plain(self)
        network = self.network  # checks depth, channels, activation, batch_norm, smooth_init, seed and norm_groups
        object.__setattr__(self, "activation", network.activation)
        checks.positive_float("learning_rate", self.learning_rate)
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        checks.positive_int("epochs", self.epochs)
        checks.positive_int("batch_size", self.batch_size)
        checks.boolean("adaptive", self.adaptive)
        checks.boolean("hold_stem", self.hold_stem)
        checks.boolean("depth_scaling", self.depth_scaling)
        checks.positive_int("test_every", self.test_every)
        checks.positive_int("train_images", self.train_images, least=0)
        checks.positive_int("test_images", self.test_images, least=0)

    @property
    def network(self) -> ConvNetConfig:
        return ConvNetConfig(
            self.depth, self.channels, self.activation, self.batch_norm, self.smooth_init, self.seed, self.norm_groups
        )

    @property
    def trial(self) -> bool:
        """Whether the run sees a part of the images only: not a result."""
        return bool(self.train_images or self.test_images)

    @property
    def name(self) -> str:
        """Name of the run's folder, record and checkpoint; rarer departures from the paper are appended."""
        parts = [
            self.activation,
            "weight-tied" if self.smooth_init else "iid",
            "bn" if self.batch_norm else f"gn{self.norm_groups}" if self.norm_groups else "nobn",
            f"depth{self.depth}",
            f"lr{self.learning_rate:g}",
            f"epochs{self.epochs}",
            f"seed{self.seed}",
        ]
        extras = {"channels": "channels", "batch_size": "batch", "test_every": "testevery"}
        extras |= {"train_images": "train", "test_images": "test"}
        parts += ["adaptive"] if self.adaptive else []
        parts += ["holdstem"] if self.hold_stem else []
        parts += ["depthscaling"] if self.depth_scaling else []
        parts += [
            f"{short}{getattr(self, field.name)}"
            for field in fields(self)
            if (short := extras.get(field.name)) and getattr(self, field.name) != field.default
        ]
        return "_".join(parts)

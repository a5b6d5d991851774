"""The configuration of a run on CIFAR-10."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lib import checks
from lib.cifar.network import ConvNetConfig


@dataclass(frozen=True)
class CifarConfig:
    """One run. The defaults are the paper's setting. Every field is checked if a run goes on from its state.

    ``activation`` to ``channels``, ``norm_groups``, ``stem_activation`` and ``seed`` are the network's: see
    `ConvNetConfig`.

    ``learning_rate`` is that of the first epoch. The cosine schedule ends at ``epochs``: a run of 30 epochs is a short
    schedule of its own, not the beginning of one of 180. With ``adaptive`` the learning rate of the stem and the head
    starts at 0.01 instead, and falls to 0 by the same cosine.

    These options are not in the paper, nor are the network's ``norm_groups`` and ``stem_activation``. ``hold_stem``
    keeps the stem's batch norm at its initial scale 1 and shift 0. ``depth_scaling`` multiplies the layers' learning
    rate by L / 256, and their weight decay by 256 / L. A layer's gradient is of order 1/L, so networks of every depth
    then follow the same flow in time, decay included.

    ``train_images`` and ``test_images`` are for trials: the number of images used (0: all).
    """

    activation: str = "gelu"
    initialisation: str = "weight-tied"
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
    stem_activation: str = "relu"
    seed: int = 0
    test_every: int = 5
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        flags = ("adaptive", "hold_stem", "depth_scaling")
        positive = ("learning_rate", "epochs", "batch_size", "test_every")
        checks.check_fields(self, *positive, *flags, train_images=0, test_images=0)
        network = self.network  # checks its own fields
        object.__setattr__(self, "activation", network.activation)
        object.__setattr__(self, "learning_rate", float(self.learning_rate))

    @property
    def network(self) -> ConvNetConfig:
        return ConvNetConfig(**{field.name: getattr(self, field.name) for field in fields(ConvNetConfig)})

    @property
    def trial(self) -> bool:
        """Whether the run uses only a part of the images; it is then not a result."""
        return bool(self.train_images or self.test_images)

    @property
    def name(self) -> str:
        """Name of the run's folder, record and checkpoint. Rarely used options are named only if they are used."""
        parts = [
            self.activation,
            self.initialisation,
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
        parts += [f"{self.stem_activation}stem"] if self.stem_activation != "relu" else []
        parts += [
            f"{short}{getattr(self, field.name)}"
            for field in fields(self)
            if (short := extras.get(field.name)) and getattr(self, field.name) != field.default
        ]
        return "_".join(parts)


def rename_saved(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a saved config by the names of `CifarConfig`, in their order. Older files and those of the released
    code have ``smooth_init`` (True or False) in place of ``initialisation`` ("weight-tied" or "iid")."""
    renamed = dict(values)
    if "smooth_init" in renamed:
        checks.boolean("smooth_init", renamed["smooth_init"])
        tied = checks.plain(renamed["smooth_init"])
        renamed = {("initialisation" if name == "smooth_init" else name): value for name, value in renamed.items()}
        renamed["initialisation"] = "weight-tied" if tied else "iid"
    return renamed

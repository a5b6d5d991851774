"""The picture of a training on CIFAR-10 that is going on."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lib.figures.style import BLUE, VERMILION, panels, styled


@styled
def draw(log: Sequence[Mapping], epochs: int) -> Figure:
    """Loss and accuracy against the epoch; ``log`` has a line an epoch (`cifar_training.EpochRecord`), test
    values if they were measured, ``epochs`` is the length of the schedule."""
    figure, axes = panels(2)
    done = [line["epoch"] + 1 for line in log]
    tested = [line for line in log if line["test_loss"] is not None]
    for panel, quantity, label in zip(axes, ("loss", "accuracy"), ("cross-entropy", "accuracy (%)"), strict=True):
        panel.plot(done, [line[f"train_{quantity}"] for line in log], "-", color=BLUE, label="train (running)")
        panel.plot(
            [line["epoch"] + 1 for line in tested],
            [line[f"test_{quantity}"] for line in tested],
            "o-",
            color=VERMILION,
            label="test",
        )
        panel.set_xlim(0, epochs + 0.5)
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
    axes[0].legend()
    return figure

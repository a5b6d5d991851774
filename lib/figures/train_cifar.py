"""The picture of a running training on CIFAR-10."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lib.figures.style import BLUE, VERMILION, make_panels, styled


@styled
def draw(log: Sequence[Mapping], epochs: int) -> Figure:
    """Loss and accuracy against the epoch. ``log`` has a `lib.cifar.training.EpochRecord` for each epoch, with test
    values if they were measured; ``epochs`` is the length of the schedule."""
    figure, axes = make_panels(2)
    done = [line["epoch"] + 1 for line in log]
    tested = [line for line in log if line["test_loss"] is not None]
    for panel, quantity, label in zip(axes, ("loss", "accuracy"), ("cross-entropy", "accuracy (%)"), strict=True):
        panel.plot(done, [line[f"train_{quantity}"] for line in log], "-", color=BLUE, label="train (running)")
        measured = [line[f"test_{quantity}"] for line in tested]
        panel.plot([line["epoch"] + 1 for line in tested], measured, "o-", color=VERMILION, label="test")
        panel.set(xlim=(0, epochs + 0.5), xlabel="epoch", ylabel=label)
    axes[0].legend()
    return figure

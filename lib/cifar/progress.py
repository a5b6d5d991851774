"""What a training on CIFAR-10 reports, and how it is shown: as a bar, or as lines in a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from lib import checks, paths
from lib.cifar.config import CifarConfig


@dataclass(frozen=True)
class Progress:
    """Where a run is inside an epoch (0-based). Loss and accuracy (%) are means over the epoch so far."""

    epoch: int
    batch: int
    batches: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class EpochRecord:
    """One line of a run's log. Accuracies are in %, ``seconds`` are the epoch's, evaluation included.

    Training loss and accuracy are means over the epoch, in training mode on augmented images. Test values are None at
    epochs without evaluation. After the epoch are measured: ``von_neumann_conv1`` and ``_conv2``, the smoothness of the
    weights along the depth (`measures.von_neumann_ratio`; None if undefined); ``noise_conv1`` and ``_conv2``, the share
    of them that is noise from layer to layer (`measures.noise_share`; None if undefined); ``stem_scale`` and
    ``path_length``, the size of the hidden states (`ConvResNet.scales`).
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    von_neumann_conv1: float | None
    von_neumann_conv2: float | None
    seconds: float
    device: str
    engine: str
    threads: int
    stem_scale: float | None = None
    path_length: float | None = None
    noise_conv1: float | None = None
    noise_conv2: float | None = None


BAR = "{desc} {percentage:.0f} %|{bar}| epoch {n:.2f} of {total}, {elapsed} gone, {remaining} left{postfix}"


def progress(
    reports: Iterable[Progress | EpochRecord], config: CifarConfig, kind: str | None = None
) -> Iterator[EpochRecord]:
    """Pass on the EpochRecords, and show how far the run is.

    ``kind`` is "bar", with loss, accuracy and time left; "lines", one for each epoch, for a log; or "none". By default
    it is "bar", and "none" if no person looks (`paths.is_unattended`). The environment variable TRAINING_PROGRESS, if
    it is set, decides instead."""
    variable = os.environ.get("TRAINING_PROGRESS")
    kind = variable or kind or ("none" if paths.is_unattended() else "bar")
    checks.choice("TRAINING_PROGRESS" if variable else "kind", kind, ("bar", "lines", "none"))
    started, first = time.perf_counter(), None
    with tqdm(total=config.epochs, bar_format=BAR, desc="training", disable=kind != "bar", leave=False) as bar:
        for report in reports:
            if first is None:
                first = bar.n = bar.initial = report.epoch
            at_end = isinstance(report, EpochRecord)
            bar.n = report.epoch + (1 if at_end else report.batch / report.batches)
            loss, accuracy = (report.train_loss, report.train_accuracy) if at_end else (report.loss, report.accuracy)
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %")
            if not at_end:
                continue
            if kind == "lines":
                done = report.epoch + 1
                left = (time.perf_counter() - started) / (done - first) * (config.epochs - done) / 60
                test = "" if report.test_accuracy is None else f", test {report.test_accuracy:.2f} %"
                print(
                    f"{config.name}: epoch {done} of {config.epochs}, loss {loss:.4f}, train {accuracy:.2f} %"
                    f"{test}, {left:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
            yield report

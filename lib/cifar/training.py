"""Training a convolutional residual network on CIFAR-10 (Section 5.2), in a run that survives interruption.

`train` is the loop, `Training` the network with its optimiser, and `evaluate` the test. The state of a run is written
into its folder after every epoch, atomically, and training starts from the state that is found there. A run that was
killed at any moment and started again ends, on the CPU, with the same bits as one that was never interrupted.

The config is in `lib.cifar.config`, its learning rates in `schedule`, the images in `dataset`, the network in
`network`, the files of a state in `states`, and what a run reports in `progress` and `monitor`.
"""

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import checks, paths
from lib.checks import Divergence
from lib.cifar import dataset, layer_log
from lib.cifar.config import CifarConfig
from lib.cifar.monitor import find_not_finite, measure_smoothness
from lib.cifar.network import ConvResNet
from lib.cifar.progress import EpochRecord, Progress
from lib.cifar.schedule import (
    MOMENTUM,
    WEIGHT_DECAY,
    end_learning_rate,
    layer_weight_decay,
    learning_rate,
    steps,
    tests_after,
)
from lib.cifar.states import (
    LAYER_LOG_FILE,
    LOG_FILE,
    STATE_FILE,
    STATE_FORMAT,
    advise_restart,
    check_same,
    lock_folder,
    read_state,
    run_folder,
)

EVALUATION_BATCH = 250
CHECK_EVERY = 100  # batches between two looks at the loss, so that a diverged run stops early in its epoch


# ---------------------------------------------------------------------------------------------- the loop


def train(
    config: CifarConfig,
    folder: Path | str | None = None,
    *,
    device: str = "cpu",
    threads: int = 0,
    report_every: int = 0,
    download: bool = True,
) -> Iterator[Progress | EpochRecord]:
    """Train the run of ``config``, or go on training it; yield an EpochRecord after each epoch.

    Main arguments: ``config``; ``folder`` for the state (default ``run_folder(config)``). If the run in the folder is
    finished, nothing is yielded. When the generator is exhausted, `read_state` gives the network and the log.

    Other arguments: ``device`` is "auto", "cpu", "cuda" or "cuda:1". ``threads`` is PyTorch's number of threads on the
    CPU (0 leaves it); rounding outside the residual layers may depend on it. With ``report_every``, a Progress is
    yielded after every so many batches (0: never); each one waits for the device. ``download`` allows torchvision to
    fetch the images.

    Raises ValueError if the folder holds the state of another config, locks.Busy if another process trains in it,
    DataNotFoundError without the images, and Divergence if a loss or a weight is not finite. The state of the last
    complete epoch stays in the folder.
    """
    # Settings.
    folder = Path(folder) if folder is not None else run_folder(config)
    device = checks.usable_device(device)
    checks.thread_count("threads", threads)
    if threads:
        torch.set_num_threads(checks.plain(threads))
    disable_tf32()

    # The network, as it is after the epochs that are complete.
    run = Training(config, device)
    with lock_folder(folder):
        state = read_state(folder)
        if state is not None:
            run.restore(state, folder)
        if run.epoch == config.epochs:
            return

        # The images.
        train_set = dataset.load(True, device, config.train_images or None, download)
        test_set = dataset.load(False, device, config.test_images or None, download)

        # Epoch after epoch: train, test, measure, save.
        while run.epoch < config.epochs:
            started = time.perf_counter()
            for now in run.train_epoch(train_set, report_every):
                if not math.isfinite(now.loss):
                    place = f"in epoch {run.epoch + 1}, batch {now.batch} of {now.batches}"
                    raise Divergence(run.describe_divergence(f"the loss is {now.loss} {place}", folder))
                if report_every and now.batch % report_every == 0:
                    yield now
            test_loss = test_accuracy = None
            if tests_after(config, run.epoch):
                test_loss, test_accuracy = evaluate(run.network, test_set)
            if found := find_not_finite({**run.tensors(), "the test loss": test_loss}):
                raise Divergence(run.describe_divergence(f"{found} after epoch {run.epoch + 1}", folder))
            record = run.complete_epoch(
                (now.loss, now.accuracy),
                (test_loss, test_accuracy),
                run.network.kernels(),
                run.network.scales(),
                seconds=time.perf_counter() - started,
                device=device_name(device),
                engine=run.network.engine,
            )
            run.save(folder)
            yield record


# ---------------------------------------------------------------------------------- the network and its optimiser


class Training:
    """A run, with all that it carries over an interruption: network, optimiser, random state, log.

    ``dtype`` is float32 in every run of `train`. With float64, from the same initial weights, `monitor.watch` shows
    what rounding does.
    """

    def __init__(self, config: CifarConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device = config, device
        self.network = ConvResNet(config.network).to(device, dtype)
        residual = list(self.network.residual_layers.parameters())
        known = {id(parameter) for parameter in residual}
        if config.hold_stem:
            self.network.bn1.requires_grad_(False)
        others = [parameter for parameter in self.network.parameters() if id(parameter) not in known]
        others = [parameter for parameter in others if parameter.requires_grad]
        # Two groups, since the learning rates of the layers and of the stem and the head may differ.
        self.optimizer = torch.optim.SGD(
            [{"params": residual, "weight_decay": layer_weight_decay(config)}, {"params": others}],
            lr=config.learning_rate,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        # Not the network's own generator: order and augmentation depend on the seed alone, whatever the
        # initialisation draws.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch = 0
        self.log: list[dict[str, Any]] = []
        self.layers: layer_log.LayerLog = {}
        self.versions = versions()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and running statistic of the network by its name, those of the layers stacked."""
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())

    def train_epoch(self, images: dataset.Images, report_every: int) -> Iterator[Progress]:
        """Train one epoch; yield after every ``report_every`` and CHECK_EVERY batches and after the last one."""
        config, size = self.config, self.config.batch_size
        self.optimizer.param_groups[0]["lr"] = learning_rate(config, self.epoch)
        self.optimizer.param_groups[1]["lr"] = end_learning_rate(config, self.epoch)
        self.network.train()
        epoch = dataset.draw_epoch(len(images), self.generator, self.device)
        batches = steps(config, len(images))
        # The sums stay on the device, since reading them waits for it.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in range(1, batches + 1):
            pixels, labels = dataset.batch(images, epoch, (batch - 1) * size, size)  # (b, 3, 32, 32), (b,)
            logits = self.network(pixels)  # (b, 10)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach() * len(labels)
            correct += (logits.detach().argmax(1) == labels).sum()
            reported = report_every and batch % report_every == 0
            if reported or batch % CHECK_EVERY == 0 or batch == batches:
                seen = min(batch * size, len(images))
                yield Progress(self.epoch, batch, batches, loss_sum.item() / seen, 100 * correct.item() / seen)

    def complete_epoch(
        self,
        train: tuple[float, float],
        test: tuple[float | None, float | None],
        kernels: Mapping[str, Tensor],
        scales: Mapping[str, float | None],
        *,
        seconds: float,
        device: str,
        engine: str,
    ) -> EpochRecord:
        """Log the epoch that is over, and go to the next.

        ``train`` and ``test`` are loss and accuracy. ``kernels`` and ``scales`` are those of `ConvResNet` after the
        epoch. ``device`` and ``engine`` are in words.
        """
        record = EpochRecord(
            epoch=self.epoch,
            learning_rate=learning_rate(self.config, self.epoch),
            train_loss=train[0],
            train_accuracy=train[1],
            test_loss=test[0],
            test_accuracy=test[1],
            **measure_smoothness(kernels),
            **scales,
            seconds=round(seconds, 3),
            device=device,
            engine=engine,
            threads=torch.get_num_threads(),
        )
        self.log.append(asdict(record))
        self.layers = layer_log.extend(self.layers, self.epoch, kernels)
        self.epoch += 1
        return record

    def save(self, folder: Path) -> None:
        """Write the state, the log and the layer log into the folder, each atomically."""
        state = {
            "format": STATE_FORMAT,
            "config": asdict(self.config),
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "log": self.log,
            "layers": self.layers,
            "versions": self.versions,
        }
        paths.write_atomically(folder / STATE_FILE, lambda draft: torch.save(state, draft))
        text = json.dumps({"config": state["config"], "log": self.log}, indent=1)
        paths.write_content(folder / LOG_FILE, text + "\n")
        layer_log.write(folder / LAYER_LOG_FILE, self.layers, self.config.name)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from a state of `read_state`. Raises ValueError if it is not one of this run."""
        check_same(state, self.config, folder)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            layers = state.get("layers", {})  # older states have no layer log
            layer_log.extend(layers, state["epoch"], self.network.kernels())  # fails now if it would after the epoch
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder / STATE_FILE} does not hold the run that its config describes ({reason}): "
                f"{advise_restart(folder)}."
            ) from error
        self.epoch, self.log = state["epoch"], state["log"]
        self.layers = layers
        # Every version that the run was trained with.
        before = {name: str(version).split(" + ") for name, version in state["versions"].items()}
        self.versions = {
            name: " + ".join(dict.fromkeys([*before.get(name, []), version])) for name, version in versions().items()
        }

    def describe_divergence(self, found: str, folder: Path) -> str:
        """The sentence of a Divergence: what was ``found``, what is kept in the folder, and what to try."""
        kept = f"the state after epoch {self.epoch} stays in {folder}" if self.epoch else "no epoch was complete yet"
        rate = self.config.learning_rate
        return f"{self.config.name} diverged: {found}; {kept}: try a learning rate below {rate:g}."


@torch.no_grad()
def evaluate(network: ConvResNet, images: dataset.Images) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (%) on whole images, in evaluation mode."""
    was_training = network.training
    network.eval()
    device = images.labels.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    chunks = zip(images.pixels.split(EVALUATION_BATCH), images.labels.split(EVALUATION_BATCH), strict=True)
    for pixels, labels in chunks:
        logits: Tensor = network(dataset.normalise(pixels))
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    network.train(was_training)
    return loss_sum.item() / len(images), 100 * correct.item() / len(images)


# ------------------------------------------------------------------------------------------------ the machine


def disable_tf32() -> None:
    """Use full float32 on CUDA. TF32 rounds to 10 bits. Rounding is independent noise in each layer, and smoothness
    across layers is what these runs measure."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),
    }


def device_name(device: torch.device) -> str:
    """The device in words, for the records: "cpu", or "cuda" with the card's name."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type

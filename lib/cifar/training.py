"""Training a convolutional residual network on CIFAR-10 (Section 5.2), in a run that survives interruption.

``train(config, folder)`` is a generator. It writes the state of the run into the folder at the end of every
epoch, atomically, and starts from the state that it finds there: a run that was killed at any moment and
started again ends, on the CPU, with the same bits as one that was never interrupted.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import checks, measures, paths
from lib.checks import Divergence
from lib.cifar import dataset, layer_log
from lib.cifar.config import CifarConfig
from lib.cifar.network import CONVOLUTIONS, ConvResNet
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
    _aside,
    alone_in,
    check_same,
    read_state,
    run_folder,
)

EVALUATION_BATCH = 250
# The loss is looked at this often (in batches), so that a diverged run stops early in its epoch.
CHECK_EVERY = 100
# Images in all epochs of a trial that takes seconds, such as the notebook's own.
TINY_TRIAL = 10_000


def start_trial_anew(config: CifarConfig) -> bool:
    """Forget the state of a trial of seconds (TINY_TRIAL images in all its epochs, at most), and say whether this is
    one; every other run goes on from its state. Raises paths.Busy if another process is training it."""
    if not 0 < config.train_images * config.epochs <= TINY_TRIAL:
        return False
    folder = run_folder(config)
    with alone_in(folder):
        (folder / STATE_FILE).unlink(missing_ok=True)
    return True


def without_tf32() -> None:
    """Full float32 on CUDA. TF32 rounds to 10 bits; rounding is independent noise in each layer, and smoothness
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
    """Train, or go on training, the run of ``config``; yield an EpochRecord after each epoch.

    Main arguments: ``config``; ``folder`` for the state (default ``run_folder(config)``). When the
    generator is exhausted, the run is finished and ``read_state`` gives its network and log. A folder whose
    run is finished yields nothing.

    Other arguments: ``device`` "auto", "cpu", "cuda" or "cuda:1"; ``threads`` sets PyTorch's number of threads
    on the CPU (0 leaves it), which rounding may depend on outside the residual layers; ``report_every``
    yields a Progress every so many batches (0: never; each one waits for the device); ``download`` allows
    torchvision to fetch the set.

    Raises ValueError for a folder with the state of another config, paths.Busy if another process is training
    in it, DataNotFoundError without the data, and Divergence if a loss or a weight is not finite; the state of the
    last complete epoch stays in the folder.
    """
    folder = Path(folder) if folder is not None else run_folder(config)
    device = checks.usable_device(device)
    checks.thread_count("threads", threads)
    if threads:
        torch.set_num_threads(checks.plain(threads))
    without_tf32()

    run = Training(config, device)
    with alone_in(folder):
        state = read_state(folder)
        if state is not None:
            run.restore(state, folder)
        yield from _epochs(run, folder, report_every, download)


def _epochs(run: "Training", folder: Path, report_every: int, download: bool) -> Iterator[Progress | EpochRecord]:
    config, device = run.config, run.device
    if run.epoch == config.epochs:
        return
    train_set = dataset.load(True, device, config.train_images or None, download)
    test_set = dataset.load(False, device, config.test_images or None, download)

    while run.epoch < config.epochs:
        started = time.perf_counter()
        running: Progress | None = None
        for running in run.train_epoch(train_set, report_every):
            if not math.isfinite(running.loss):
                place = f"in epoch {run.epoch + 1}, batch {running.batch} of {running.batches}"
                raise Divergence(_diverged(run, f"the loss is {running.loss} {place}", folder))
            if report_every and running.batch % report_every == 0:
                yield running
        test_loss = test_accuracy = None
        if tests_after(config, run.epoch):
            test_loss, test_accuracy = evaluate(run.network, test_set)
        if found := not_finite({**run.tensors(), "the test loss": test_loss}):
            raise Divergence(_diverged(run, f"{found} after epoch {run.epoch + 1}", folder))
        record = run.complete(
            (running.loss, running.accuracy),
            (test_loss, test_accuracy),
            kernels(run.network),
            run.network.scales(),
            seconds=time.perf_counter() - started,
            device=device_name(device),
            engine=run.network.engine,
        )
        run.save(folder)
        yield record


class Training:
    """A run, with all that it must carry over an interruption: network, optimiser, random state, log.

    ``dtype`` is float32 in every run of `train`; float64, from the same initial weights, is for looking at what
    rounding does (`watch`).
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
        # Two groups with the same settings, so that the step of the stem and the head can be held.
        self.optimizer = torch.optim.SGD(
            [{"params": residual, "weight_decay": layer_weight_decay(config)}, {"params": others}],
            lr=config.learning_rate,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        # Apart from the network's own generator: order and augmentation depend on the seed alone, not on
        # how many numbers the initialisation drew.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch = 0
        self.log: list[dict[str, Any]] = []
        self.layers: layer_log.LayerLog = {}
        self.versions = versions()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and running statistic of the network by its name, those of the layers stacked."""
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())

    def train_epoch(self, images: dataset.Images, report_every: int) -> Iterator[Progress]:
        """One epoch; yields every ``report_every`` and CHECK_EVERY batches and after the last one."""
        config, size = self.config, self.config.batch_size
        self.optimizer.param_groups[0]["lr"] = learning_rate(config, self.epoch)
        self.optimizer.param_groups[1]["lr"] = end_learning_rate(config, self.epoch)
        self.network.train()
        epoch = dataset.draw_epoch(len(images), self.generator, self.device)
        batches = steps(config, len(images))
        # Sums stay on the device: reading them is what waits for it.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in range(1, batches + 1):
            pixels, labels = dataset.batch(images, epoch, (batch - 1) * size, size)
            logits = self.network(pixels)
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

    def complete(
        self,
        train: tuple[float, float],
        test: tuple[float | None, float | None],
        weights: Mapping[str, Tensor],
        scales: Mapping[str, float | None],
        *,
        seconds: float,
        device: str,
        engine: str,
    ) -> EpochRecord:
        """Log the epoch that is over, and go to the next. ``train`` and ``test``: loss and accuracy; ``weights``: the
        `kernels` and ``scales`` the `ConvResNet.scales` after it; ``device`` and ``engine`` in words."""
        record = EpochRecord(
            epoch=self.epoch,
            learning_rate=learning_rate(self.config, self.epoch),
            train_loss=train[0],
            train_accuracy=train[1],
            test_loss=test[0],
            test_accuracy=test[1],
            **smoothness(weights),
            **scales,
            seconds=round(seconds, 3),
            device=device,
            engine=engine,
            threads=torch.get_num_threads(),
        )
        self.log.append(asdict(record))
        self.layers = layer_log.extend(self.layers, self.epoch, weights)
        self.epoch += 1
        return record

    def save(self, folder: Path) -> None:
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
        check_same(state, self.config, folder)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            layers = state.get("layers", {})  # a state from before this log has none
            layer_log.extend(layers, state["epoch"], kernels(self.network))  # as will be done after the next epoch
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder / STATE_FILE} does not hold the run that its config describes ({reason}): {_aside(folder)}."
            ) from error
        self.epoch, self.log = state["epoch"], state["log"]
        self.layers = layers
        # All that it was trained with, as the log has all devices.
        before = {name: str(version).split(" + ") for name, version in state["versions"].items()}
        self.versions = {
            name: " + ".join(dict.fromkeys([*before.get(name, []), version])) for name, version in versions().items()
        }


def watch(
    run: Training,
    images: dataset.Images,
    every: int = 1,
    measure: Callable[[ConvResNet], dict[str, float | None]] = ConvResNet.scales,
) -> Iterator[dict[str, Any]]:
    """Train one epoch more, and yield every so many steps, and after the last one, its epoch and step (1, 2, ...), the
    mean loss since the line before, and what ``measure`` finds in the network: what an epoch's line in the log
    averages over. The run is left at the next epoch, and its log as it was. Raises ValueError for ``every`` below 1."""
    checks.positive_int("every", every)
    before, last = 0.0, 0
    for now in run.train_epoch(images, every):
        if now.batch % every and now.batch < now.batches:
            continue
        seen = min(now.batch * run.config.batch_size, len(images))
        loss = (now.loss * seen - before) / (seen - last)
        before, last = now.loss * seen, seen
        yield {"epoch": run.epoch + 1, "step": now.batch, "loss": loss, **measure(run.network)}
    run.epoch += 1


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


def kernels(network: ConvResNet) -> dict[str, Tensor]:
    """The kernels of both convolutions of all layers, by the names "conv1" and "conv2", each (L, C, C, 3, 3)."""
    return {name: network.residual_layers.stacked(f"{name}.weight").detach() for name in CONVOLUTIONS}


def measured(network: ConvResNet) -> dict[str, float | None]:
    """What a run logs about the weights after each epoch, by the names of `EpochRecord`."""
    return smoothness(kernels(network)) | network.scales()


def smoothness(weights: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The von Neumann ratio along depth and the share of noise of both convolutions (L, ...), None if undefined."""
    found = {f"von_neumann_{name}": measures.von_neumann_ratio(tensor) for name, tensor in weights.items()}
    found |= {f"noise_{name}": measures.noise_share(tensor) for name, tensor in weights.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def not_finite(values: Mapping[str, Tensor | float | None]) -> str:
    """What the first of the values is that is not finite, in words; empty if all are. None is left out."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if not value.isfinite().all():
                return f"{name} holds {value[~value.isfinite()][0].item()}"
        elif value is not None and not math.isfinite(value):
            return f"{name} is {value}"
    return ""


def _diverged(run: "Training", found: str, folder: Path) -> str:
    kept = f"the state after epoch {run.epoch} stays in {folder}" if run.epoch else "no epoch was complete yet"
    rate = run.config.learning_rate
    return f"{run.config.name} diverged: {found}; {kept}: try a learning rate below {rate:g}."

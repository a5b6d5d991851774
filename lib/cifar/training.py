"""Training a convolutional residual network on CIFAR-10 (Section 5.2), in a run that survives interruption.

``train(config, folder)`` is a generator. It writes the state of the run into the folder at the end of every
epoch, atomically, and starts from the state that it finds there: a run that was killed at any moment and
started again ends, on the CPU, with the same bits as one that was never interrupted.
"""

import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lib import checks, measures, paths
from lib.cifar import dataset, layer_log
from lib.cifar.network import CONVOLUTIONS, ConvNetConfig, ConvResNet
from lib.dense.training import Divergence

STATE_FORMAT = 1
STATE_FILE = "state.pt"
LOG_FILE = "log.json"
LAYER_LOG_FILE = f"log{layer_log.ENDING}"
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# With depth_scaling, layers move as in a network of that depth.
SCALING_DEPTH = 256
ADAPTIVE_LEARNING_RATE = 1e-2
EVALUATION_BATCH = 250
# The loss is looked at this often (in batches), so that a diverged run stops early in its epoch.
CHECK_EVERY = 100
# Images in all epochs of a trial that takes seconds, such as the notebook's own.
TINY_TRIAL = 10_000
STATE_ENTRIES = ("config", "epoch", "network", "optimizer", "generator", "log", "versions")


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


@dataclass(frozen=True)
class Progress:
    """Where a run is inside an epoch (0-based); loss and accuracy (%) are the running ones of the epoch."""

    epoch: int
    batch: int
    batches: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class EpochRecord:
    """One line of a run's log. Accuracies are in %, ``seconds`` are the epoch's, evaluation included.

    Training loss and accuracy are the running averages of the epoch, in training mode on augmented images.
    Test values are None at epochs without evaluation. ``von_neumann_conv1`` and ``_conv2`` are the smoothness
    of the weights along depth after the epoch (`measures.von_neumann_ratio`; None where undefined),
    ``noise_conv1`` and ``_conv2`` what in them is noise from layer to layer (`measures.noise_share`; likewise),
    ``stem_scale`` and ``path_length`` the size of the hidden states (`ConvResNet.scales`).
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


def run_folder(config: CifarConfig) -> Path:
    """Where the run of that config keeps its state: an ignored folder, so that a clone starts clean."""
    return paths.BUILD / "training" / config.name


def steps(config: CifarConfig, images: int) -> int:
    """Steps of an epoch over so many images, the last one on those that are left (50,000 = 781 x 64 + 16)."""
    return math.ceil(images / config.batch_size)


def tests_after(config: CifarConfig, epoch: int) -> bool:
    """Whether the network is evaluated on the test images after that epoch (0-based)."""
    return (epoch + 1) % config.test_every == 0 or epoch + 1 == config.epochs


def start_trial_anew(config: CifarConfig) -> bool:
    """Forget the state of a trial of seconds (TINY_TRIAL images in all its epochs, at most), and say whether this is
    one; every other run goes on from its state. Raises paths.Busy where another process is training it."""
    if not 0 < config.train_images * config.epochs <= TINY_TRIAL:
        return False
    folder = run_folder(config)
    with alone_in(folder):
        (folder / STATE_FILE).unlink(missing_ok=True)
    return True


def learning_rate(config: CifarConfig, epoch: int) -> float:
    """That of the residual layers, one value an epoch (0-based): (eta/2) (1 + cos(pi epoch / epochs)), times L / 256 if
    ``config.depth_scaling``."""
    return config.learning_rate * _depth_factor(config) * _cosine(config, epoch)


def layer_weight_decay(config: CifarConfig) -> float:
    """That of the residual layers: lambda, times 256 / L if ``config.depth_scaling``, so that it takes the same share
    of the weights in every depth."""
    return WEIGHT_DECAY / _depth_factor(config)


def _depth_factor(config: CifarConfig) -> float:
    return config.depth / SCALING_DEPTH if config.depth_scaling else 1.0


def end_learning_rate(config: CifarConfig, epoch: int) -> float:
    """That of the stem and the head: the same schedule, from 0.01 on if ``config.adaptive``."""
    return (ADAPTIVE_LEARNING_RATE if config.adaptive else config.learning_rate) * _cosine(config, epoch)


def _cosine(config: CifarConfig, epoch: int) -> float:
    return (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def training_time(config: CifarConfig, images: int, epochs: int | None = None) -> float:
    """The sum of the learning rates of all steps of the run's first ``epochs`` (all of them where None), over so many
    images an epoch."""
    epochs = config.epochs if epochs is None else epochs
    return steps(config, images) * sum(learning_rate(config, epoch) for epoch in range(epochs))


def weight_decay_alone(time: float) -> float:
    """The share of a weight that is left after the training time t where it has no gradient: a step of momentum mu and
    weight decay lambda counts as 1/(1 - mu) steps of gradient descent, so that exp(-lambda t / (1 - mu)) is left."""
    return math.exp(-WEIGHT_DECAY * time / (1 - MOMENTUM))


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

    Raises ValueError for a folder with the state of another config, paths.Busy where another process is training
    in it, DataNotFoundError without the data, and Divergence where a loss or a weight is not finite; the state of the
    last complete epoch stays in the folder.
    """
    folder = Path(folder) if folder is not None else run_folder(config)
    device = checks.usable_device(device)
    checks.positive_int("threads", threads, least=0)
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
        paths.write_atomically(folder / LOG_FILE, lambda draft: draft.write_text(text + "\n"))
        layer_log.write(folder / LAYER_LOG_FILE, self.layers, self.config.name)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        check_same(state, self.config, folder)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder / STATE_FILE} does not hold the run that its config describes ({reason}): {_aside(folder)}."
            ) from error
        self.epoch, self.log = state["epoch"], state["log"]
        self.layers = state.get("layers", {})  # a state from before this log has none
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
    """The von Neumann ratio along depth and the share of noise of both convolutions (L, ...), None where undefined."""
    found = {f"von_neumann_{name}": measures.von_neumann_ratio(tensor) for name, tensor in weights.items()}
    found |= {f"noise_{name}": measures.noise_share(tensor) for name, tensor in weights.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def not_finite(values: Mapping[str, Tensor | float | None]) -> str:
    """What the first of the values is that is not finite, in words; empty where all are. None is left out."""
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


# -------------------------------------------------------------------------------------- for whoever waits

BAR = "{desc} {percentage:.0f} %|{bar}| epoch {n:.2f} of {total}, {elapsed} gone, {remaining} left{postfix}"


def progress(reports: Iterable[Progress | EpochRecord], config: CifarConfig) -> Iterator[EpochRecord]:
    """Pass on the EpochRecords, and show how far the run is.

    A bar with loss, accuracy and time left for a person, nothing where nobody looks (`paths.unattended`); the
    environment variable TRAINING_PROGRESS, which ``make train`` sets, chooses "bar", "lines" (one an epoch,
    for the logs of a cluster) or "none".
    """
    kind = os.environ.get("TRAINING_PROGRESS") or ("none" if paths.unattended() else "bar")
    checks.choice("TRAINING_PROGRESS", kind, ("bar", "lines", "none"))
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


# --------------------------------------------------------------------------------------------- the state


def read_state(folder: Path | str) -> dict[str, Any] | None:
    """The state that a run left in the folder, on the CPU, or None where there is none.

    A dict with format, config, epoch (how many are complete), network, optimizer, generator, log, layers (a
    `lib.cifar.layer_log`), versions. Raises ValueError with one sentence for a file that is not such a state, and
    OSError or MemoryError where the system cannot read one that may well be.
    """
    folder = Path(folder)
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = read_saved(path)
    except DamagedFile as error:
        raise ValueError(f"{path} cannot be read as a training state ({error}): {_aside(folder)}.") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        raise ValueError(f"{path} has state format {found!r}, expected {STATE_FORMAT}: {_aside(folder)}.")
    if lacking := [name for name in STATE_ENTRIES if name not in state]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}, expected with a state: {_aside(folder)}.")
    return state


def _aside(folder: Path) -> str:
    return f"move {folder} aside to start anew"


class DamagedFile(ValueError):
    """A file that is not, or not wholly, what `torch.save` writes of tensors and plain values."""


def read_saved(path: Path) -> Any:
    """What `torch.save` wrote to the file, on the CPU; no code of the file is run.

    Raises DamagedFile, or what the system says about a file that it cannot read: OSError, MemoryError (RuntimeError,
    where PyTorch's allocator says it).
    """
    content = path.read_bytes()
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for damaged files
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise DamagedFile(f"{type(error).__name__}, {len(content)} bytes") from error


def check_same(state: dict[str, Any], config: CifarConfig, folder: Path) -> None:
    """Raise ValueError where the state in the folder is that of another run than this config's."""
    wanted = asdict(config)
    found = asdict(CifarConfig()) | state["config"]  # an older state lacks the options that came later
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} {found.get(name)!r}, expected {wanted.get(name)!r}: "
                f"give this run another folder, or {_aside(folder)}."
            )


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Be the one that trains the run in the folder; paths.Busy where another process does."""
    return paths.alone(folder / "lock", f"Another process is training the run in {folder}: wait for it, or end it.")

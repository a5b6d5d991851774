"""Several CIFAR-10 runs at once on one CUDA GPU: stacked on one more axis, a whole step captured as one CUDA graph.

A lone run leaves a GPU nearly idle: a step launches some 6,000 small kernels, one after the other. Here the residual
layers of R runs take one launch forward and one backward (`lib.cifar.stacked.layers`), and stem, head, loss and update
are PyTorch's operations with the runs as first axis. Every run draws the initialisation, the order and the augmentation
that it draws alone, and leaves the same files (`lib.cifar.training`, `lib.cifar.records`): it can be gone on with
alone, on any device.

Runs of a stack share depth, schedule and batch size, and have batch norm; they differ in activation (GELU, ReLU,
identity), initialisation and seed. All arithmetic has the accuracy of float32; nothing uses TF32.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import checks, paths, tables
from lib.cifar import dataset, records
from lib.cifar import training as cifar_training
from lib.cifar.network import BN_EPS, BN_MOMENTUM, CONVOLUTIONS, STEM_PADDING, batch_norm_scale
from lib.cifar.stacked import layers as stacked_layers
from lib.cifar.stacked.layers import ACTIVATIONS, CHANNELS, PIXELS, SIDE, Kernels, StackedLayers, descend
from lib.cifar.training import CifarConfig, EpochRecord, Training
from lib.dense.training import Divergence

# Blocks that may hold a run. They form a cluster, which lies in one part of the chip, and parts lack a multiprocessor
# here and there: the 132 of an H200 seat 7 clusters of 16 or 15 of 8.
BLOCKS_A_RUN = (16, 8)
SEATED = 0.85
# The parameters outside the residual layers, by their names in `ConvResNet`.
STEM, HEAD = ("conv1.weight", "bn1.weight", "bn1.bias"), ("linear.weight", "linear.bias")
MOST = 15


class Stack:
    """R runs that train together: see the module's docstring.

    Main arguments: ``runs``, R `Training` states on the CPU at the same epoch, which `give_back` brings up to date;
    the sets, on the ``device``. ``kernels`` stands in for `Kernels` in tests on a CPU, where nothing is captured.

    Raises ValueError for runs that cannot be stacked.
    """

    def __init__(
        self,
        runs: Sequence[Training],
        train_set: dataset.Images,
        test_set: dataset.Images,
        device: torch.device,
        kernels=None,
    ) -> None:
        self.runs, self.device = list(runs), device
        self.train_set, self.test_set = train_set, test_set
        self.config = _common([run.config for run in runs])
        self.captured = kernels is None
        if kernels is None:
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            kernels = Kernels(blocks_a_run(len(runs), multiprocessors), device)
        self.blocks = kernels.blocks
        _check_batches(len(train_set), self.blocks)
        networks = [run.network for run in self.runs]
        self.layers = StackedLayers(networks, kernels, device)

        def stacked(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([tensor.detach() for tensor in tensors]).to(device)

        self.ends = {
            name: stacked(network.get_parameter(name) for network in networks).requires_grad_() for name in STEM + HEAD
        }
        statistics = ("running_mean", "running_var")
        self.running = {name: stacked(getattr(network.bn1, name) for network in networks) for name in statistics}
        self.steps_taken = int(networks[0].bn1.num_batches_tracked)
        self._end_momenta = {name: stacked(_momentum(run, name) for run in self.runs) for name in self.ends}
        self._layer_momenta = {
            name: stacked(_momentum(run, _stacked_name(name)) for run in self.runs) for name in self.layers.parameters
        }
        self._rates = {name: torch.zeros((), device=device) for name in ("layers", "ends")}
        size, count = len(runs), len(train_set)
        self._drawn = dataset.Epoch(
            torch.zeros(size, count, dtype=torch.int64, device=device),
            torch.zeros(size, count, 2, dtype=torch.int64, device=device),
            torch.zeros(size, count, dtype=torch.bool, device=device),
        )
        self._start = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros(size, dtype=torch.float64, device=device)
        self._correct = torch.zeros(size, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    # -- One step --

    def images(self, size: int) -> tuple[Tensor, Tensor]:
        """The next ``size`` images of every run, augmented: (R, n, 3, 32, 32), and labels (R, n)."""
        place = self._start + torch.arange(size, device=self.device)
        index = self._drawn.order[:, place].flatten()
        shifts, flips = self._drawn.shifts[:, place].flatten(0, 1), self._drawn.flips[:, place].flatten()
        pixels = dataset.normalise(dataset.augment(self.train_set.pixels[index], shifts, flips))
        return pixels.unflatten(0, (len(self.runs), size)), self.train_set.labels[index].view(-1, size)

    def stem(self, pixels: Tensor, training: bool) -> Tensor:
        """(R, n, 3, 32, 32) -> h_0 (R, n, 100, 16)."""
        runs, n = pixels.shape[:2]
        padded = F.pad(pixels, (STEM_PADDING,) * 4)
        patches = padded.unfold(3, 5, 3).unfold(4, 5, 3)  # (R, n, 3, 10, 10, 5, 5)
        patches = patches.permute(0, 1, 3, 4, 2, 5, 6).reshape(runs, n * PIXELS, 75)
        z = patches @ self.ends["conv1.weight"].flatten(2).mT
        if training:
            variance, mean = torch.var_mean(z, dim=1, correction=0)
            with torch.no_grad():
                count = n * PIXELS
                self.running["running_mean"].lerp_(mean, BN_MOMENTUM)
                self.running["running_var"].lerp_(variance * (count / (count - 1)), BN_MOMENTUM)
        else:
            mean, variance = self.running["running_mean"], self.running["running_var"]
        scale = torch.rsqrt(variance + BN_EPS) * self.ends["bn1.weight"]
        h = torch.relu((z - mean[:, None]) * scale[:, None] + self.ends["bn1.bias"][:, None])
        return h.view(runs, n, PIXELS, CHANNELS)

    def head(self, h: Tensor) -> Tensor:
        """h_L (R, n, 100, 16) -> logits (R, n, 10)."""
        whole = h.unflatten(2, (SIDE, SIDE))[:, :, :8, :8]  # a pooling of 4 leaves the last two lines out
        pooled = whole.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean(dim=(3, 5))  # (R, n, 2, 2, 16)
        pooled = pooled.flatten(2, 3).mT.flatten(2)  # the channel first, as in `ConvResNet.head`
        return torch.baddbmm(self.ends["linear.bias"][:, None], pooled, self.ends["linear.weight"].mT)

    def step(self, size: int) -> None:
        """One step of every run on the next ``size`` images."""
        pixels, labels = self.images(size)
        h = self.stem(pixels, training=True)
        last = self.layers.forward(h.detach()).requires_grad_()
        logits = self.head(last)
        losses = _losses(logits, labels)
        stem, head = ([self.ends[name] for name in names] for names in (STEM, HEAD))
        *head_gradients, above = torch.autograd.grad(losses.mean(dim=1).sum(), [*head, last])
        stem_gradients = torch.autograd.grad(h, stem, self.layers.backward(above))
        with torch.no_grad():
            ends = [parameter.detach() for parameter in stem + head]
            gradients = [*stem_gradients, *head_gradients]
            descend(ends, list(self._end_momenta.values()), gradients, self._rates["ends"])
            self.layers.update(self._layer_momenta, self._rates["layers"])
            self._loss += losses.double().sum(dim=1)
            self._correct += (logits.argmax(dim=2) == labels).sum(dim=1)
            self._start += size

    def _run_step(self, size: int) -> None:
        if not self.captured:
            return self.step(size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        self._graphs[size].replay()
        return None

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        # A capture runs nothing, but needs a step before it outside; whatever that changed is put back.
        changed = [*self.layers.parameters.values(), *self.layers.running.values(), *self.running.values()]
        changed += [*self._end_momenta.values(), *self._layer_momenta.values(), self._start, self._loss, self._correct]
        changed += [*(parameter.detach() for parameter in self.ends.values()), self.layers.buffers["weight"]]
        before = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.step(size)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(size)
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(old)
        return graph

    # -- Epochs --

    def train_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Epoch number ``epoch`` (0-based) of every run; mean loss and accuracy (%), (R,) each, on the CPU."""
        config = self.config
        self._rates["layers"].fill_(cifar_training.learning_rate(config, epoch))
        self._rates["ends"].fill_(cifar_training.end_learning_rate(config, epoch))
        for place, run in enumerate(self.runs):
            drawn = dataset.draw_epoch(len(self.train_set), run.generator)
            for name in ("order", "shifts", "flips"):
                getattr(self._drawn, name)[place].copy_(getattr(drawn, name))
        for counter in (self._start, self._loss, self._correct):
            counter.zero_()
        batches = cifar_training.steps(config, len(self.train_set))
        total = len(self.train_set)
        for batch in range(batches):
            self._run_step(min(stacked_layers.BATCH, total - batch * stacked_layers.BATCH))
        self.steps_taken += batches
        return self._loss.cpu() / total, 100 * self._correct.cpu().double() / total

    @torch.no_grad()
    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Mean test loss and accuracy (%) of every run in evaluation mode, (R,) each, on the CPU."""
        runs = len(self.runs)
        loss = torch.zeros(runs, dtype=torch.float64, device=self.device)
        correct = torch.zeros(runs, dtype=torch.int64, device=self.device)
        size = stacked_layers.BATCH
        for pixels, labels in zip(self.test_set.pixels.split(size), self.test_set.labels.split(size), strict=True):
            missing = -len(labels) % self.blocks  # the last few images are filled up, and the filling not counted
            whole = F.pad(dataset.normalise(pixels), (0, 0, 0, 0, 0, 0, 0, missing))
            h = self.stem(whole.expand(runs, *whole.shape), training=False)
            logits = self.head(self.layers.forward(h, training=False))[:, : len(labels)]
            expected = labels.expand(runs, -1)
            loss += _losses(logits, expected).double().sum(dim=1)
            correct += (logits.argmax(dim=2) == expected).sum(dim=1)
        return loss.cpu() / len(self.test_set), 100 * correct.cpu().double() / len(self.test_set)

    def measured(self) -> list[tuple[dict[str, Tensor], dict[str, float | None]]]:
        """The `cifar_training.kernels` and the `ConvResNet.scales` of every run."""
        stem = batch_norm_scale(*(self.ends[f"bn1.{name}"] for name in ("weight", "bias")))
        path = batch_norm_scale(*(self.layers.parameters[f"bn2.{name}"] for name in ("weight", "bias"))).mean(dim=1)
        found = []
        for run in range(len(self.runs)):
            weights = {name: self.layers.parameters[f"{name}.weight"][run] for name in CONVOLUTIONS}
            scales = {"stem_scale": stem[run].item(), "path_length": path[run].item()}
            found.append((weights, scales))
        return found

    def not_finite(self, run: int) -> str:
        """What in the parameters and running statistics of that run is not finite, in words; empty where all are."""
        tensors = {name: tensor.detach() for name, tensor in self.ends.items()}
        tensors |= {f"bn1.{name}": tensor for name, tensor in self.running.items()}
        tensors |= {
            _stacked_name(name): tensor for name, tensor in (self.layers.parameters | self.layers.running).items()
        }
        return cifar_training.not_finite({name: tensor[run] for name, tensor in tensors.items()})

    @torch.no_grad()
    def give_back(self) -> None:
        """Bring the networks and optimisers of the runs up to date."""
        tensors = {name: tensor.cpu() for name, tensor in self.ends.items()}
        layers = self.layers.parameters | self.layers.running
        tensors |= {_stacked_name(name): tensor.cpu() for name, tensor in layers.items()}
        tensors |= {f"bn1.{name}": tensor.cpu() for name, tensor in self.running.items()}
        momenta = {name: tensor.cpu() for name, tensor in self._end_momenta.items()}
        momenta |= {_stacked_name(name): tensor.cpu() for name, tensor in self._layer_momenta.items()}
        for place, run in enumerate(self.runs):
            own = dict(run.network.named_parameters()) | dict(run.network.named_buffers())
            for name, tensor in tensors.items():
                own[name].copy_(tensor[place])
            for name, tensor in own.items():
                if name.endswith("num_batches_tracked"):
                    tensor.fill_(self.steps_taken)
            for name, parameter in run.network.named_parameters():
                run.optimizer.state[parameter]["momentum_buffer"] = momenta[name][place].clone()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every image: logits (R, n, 10), labels (R, n) -> (R, n)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def _stacked_name(name: str) -> str:
    """The name in `ConvResNet` of the residual layers' tensor with that released name."""
    return "residual_layers." + name.replace(".", "_")


def _momentum(run: Training, name: str) -> Tensor:
    parameter = run.network.get_parameter(name)
    found = run.optimizer.state[parameter].get("momentum_buffer")
    return torch.zeros_like(parameter) if found is None else found


def blocks_a_run(runs: int, multiprocessors: int) -> int:
    """Blocks that share the images of a run: as many as are seated at once, one a multiprocessor, for all runs."""
    return next((blocks for blocks in BLOCKS_A_RUN if runs * blocks <= SEATED * multiprocessors), BLOCKS_A_RUN[-1])


def _shared(config: CifarConfig) -> CifarConfig:
    """What the runs of a stack have in common: the config but for activation, initialisation and seed."""
    return replace(config, activation=ACTIVATIONS[0], smooth_init=True, seed=0)


def _common(configs: Sequence[CifarConfig]) -> CifarConfig:
    """A config that stands for all; ValueError where the runs cannot be stacked."""
    first = configs[0]
    for config in configs:
        if _shared(config) != _shared(first):
            raise ValueError(
                f"{config.name} and {first.name} cannot be stacked: runs of a stack differ in activation, "
                f"initialisation and seed alone."
            )
        if reason := _why_alone(config):
            raise ValueError(f"{config.name} cannot be stacked: {reason}.")
    return first


def _why_alone(config: CifarConfig) -> str:
    """Why a run can be trained alone only; nothing where it can be stacked."""
    if config.activation not in ACTIVATIONS or not config.batch_norm or config.hold_stem or config.depth_scaling:
        return (
            f"that takes batch norm, a stem that trains, no depth_scaling, and one of the activations "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.channels != CHANNELS or config.batch_size != stacked_layers.BATCH:
        return (
            f"it has {config.channels} channels and batches of {config.batch_size}, expected {CHANNELS} and "
            f"{stacked_layers.BATCH}"
        )
    return ""


def _check_batches(images: int, blocks: int) -> None:
    if (last := images % stacked_layers.BATCH) % blocks:
        raise ValueError(
            f"{images} training images leave {last} for the last batch, expected a multiple of {blocks}: "
            f"change train_images."
        )


# ---- Training ----


def train(
    configs: Sequence[CifarConfig],
    *,
    device: str = "cuda",
    save_every: int = 10,
    minutes: float = math.inf,
    download: bool = True,
    kernels=None,
) -> Iterator[list[EpochRecord]]:
    """Train, or go on training, the runs of these configs side by side; yield an EpochRecord a run after each epoch.

    Their states are in the folders of `cifar_training.run_folder`, written every ``save_every`` epochs, after the last
    one, and after ``minutes``, where training stops. The ``seconds`` of a record are those of the whole stack.

    Raises ValueError for runs that cannot be stacked or are not equally far, RuntimeError where the kernels do not run,
    DataNotFoundError without the data, and, when the others are finished, Divergence for runs with a loss or a weight
    that was not finite: their state before that stays.
    """
    started = time.perf_counter()
    if kernels is None and not torch.cuda.is_available():
        raise ValueError("Stacked runs need CUDA, and PyTorch sees no CUDA device here: make train trains a run alone.")
    place = checks.usable_device(device)
    if kernels is None and place.type != "cuda":
        raise ValueError(f"device is {device!r}, and stacked runs need CUDA: make train trains a run alone.")
    if place.index is not None:
        torch.cuda.set_device(place)  # where graphs are captured and the kernels are loaded
    config = _common(configs)
    cifar_training.without_tf32()
    with contextlib.ExitStack() as locks:
        runs, lost = [], {}
        for own in configs:
            folder = cifar_training.run_folder(own)
            locks.enter_context(cifar_training.alone_in(folder))
            run = Training(own, torch.device("cpu"))
            if (state := cifar_training.read_state(folder)) is not None:
                run.restore(state, folder)
            runs.append(run)
        if len(epochs := {run.epoch for run in runs}) > 1:
            far = ", ".join(map(str, sorted(epochs)))
            raise ValueError(f"The runs of the stack are {far} epochs far, expected all equally far.")
        if runs[0].epoch == config.epochs:
            return
        train_set = dataset.load(True, place, config.train_images or None, download)
        test_set = dataset.load(False, place, config.test_images or None, download)
        stack = Stack(runs, train_set, test_set, place, kernels)
        words = {"device": cifar_training.device_name(place), "engine": f"stacked ({len(runs)} runs)"}
        for epoch in range(runs[0].epoch, config.epochs):
            begun = time.perf_counter()
            train_values = stack.train_epoch(epoch)
            test_values = stack.evaluate() if cifar_training.tests_after(config, epoch) else None
            measured = stack.measured()
            seconds = time.perf_counter() - begun
            written = []
            for index, run in enumerate(runs):
                if run.config.name in lost:
                    continue
                training = tuple(value[index].item() for value in train_values)
                test = (None, None) if test_values is None else tuple(value[index].item() for value in test_values)
                losses = {"the loss": training[0], "the test loss": test[0]}
                if found := cifar_training.not_finite(losses) or stack.not_finite(index):
                    lost[run.config.name] = f"{found} in epoch {epoch + 1}"
                    continue
                written.append(run.complete(training, test, *measured[index], seconds=seconds, **words))
            if len(lost) == len(runs):
                break
            over = time.perf_counter() - started > 60 * minutes
            if (epoch + 1) % save_every == 0 or epoch + 1 == config.epochs or over:
                stack.give_back()
                for run in runs:
                    if run.config.name not in lost:
                        run.save(cifar_training.run_folder(run.config))
            yield written
            if over:
                break
        if lost:
            sentence = ", ".join(f"{name} ({found})" for name, found in lost.items())
            raise Divergence(f"Runs diverged: {sentence}. Try a smaller learning rate.")


# ---- Command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.cifar.stacked.training [RUN ...] [--epochs N]``: runs of ``checkpoints/sweep.csv``, stacked.

    Returns 2 for wrong arguments, 1 where training failed, 130 where it was interrupted.
    """
    description = "Train runs side by side on one GPU, or go on training them."
    parser = argparse.ArgumentParser(prog="python -m lib.cifar.stacked.training", description=description)
    parser.add_argument("runs", nargs="*", help=f"names that checkpoints/{records.SWEEP} lists (default: all pending)")
    parser.add_argument("--epochs", type=int, help="a schedule of this length for all")
    parser.add_argument("--most", type=int, default=MOST, help=f"runs of a stack (default: {MOST})")
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1 and the like")
    parser.add_argument("--save-every", type=int, default=10, metavar="EPOCHS", help="write the states so often")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, to be gone on with, after so long")
    chosen = parser.parse_args(arguments)
    return checks.exit_code(
        partial(_train_command, chosen),
        "Interrupted; the same command goes on after the last state that was written.",
        failures=(RuntimeError, OSError, MemoryError, records.CheckpointError, tables.TableError, Divergence),
        misuses=(ValueError, TypeError),
    )


def _train_command(chosen: argparse.Namespace) -> None:
    checks.positive_int("most", chosen.most)
    checks.positive_int("save-every", chosen.save_every)
    pending = _pending(chosen.runs, chosen.epochs)
    paths.check_writable(paths.CHECKPOINTS, paths.CHECKPOINTS / "records")  # before hours of training
    if not pending:
        print("All of these runs are finished.")
    ends, diverged = time.perf_counter() + 60 * chosen.minutes, []
    for number, configs in enumerate(_stacks(pending, chosen.most)):
        minutes = (ends - time.perf_counter()) / 60
        if minutes <= 0 < number:
            break
        print(f"A stack of {len(configs)} runs: {', '.join(config.name for config in configs)}", flush=True)
        try:
            options = {"device": chosen.device, "save_every": chosen.save_every, "minutes": minutes}
            for written in train(configs, **options):
                _report(written, configs)
        except Divergence as error:  # the other stacks are none the worse for it
            diverged.append(str(error))
        finally:
            finished = [config for config in configs if _published(config, diverged)]
            if finished:
                records.gather()
    if diverged:
        raise Divergence(" ".join(diverged))


def _pending(names: Sequence[str], epochs: int | None) -> list[CifarConfig]:
    """The named runs of the sweep, or without names those that can be stacked, as far as they are not finished."""
    listed = {config.name: config for config in records.sweep(epochs)}
    if unknown := [name for name in names if name not in listed]:
        raise ValueError(f"checkpoints/{records.SWEEP} lists no run of the name {unknown[0]}.")
    fitting = [name for name, config in listed.items() if not _why_alone(config)]
    done = records.finished()
    return [listed[name] for name in dict.fromkeys(names or fitting) if name not in done]


def _stacks(configs: Iterable[CifarConfig], most: int) -> list[list[CifarConfig]]:
    """Runs that can be trained side by side, at most so many: alike but for activation, initialisation and seed, and
    equally far."""
    groups: dict[tuple[CifarConfig, int], list[CifarConfig]] = {}
    for config in configs:
        state = cifar_training.read_state(cifar_training.run_folder(config))
        groups.setdefault((_shared(config), state["epoch"] if state else 0), []).append(config)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def _published(config: CifarConfig, diverged: list[str]) -> bool:
    """Publish the run where it is finished; whether it is. What is said of one that diverged goes to ``diverged``."""
    state = cifar_training.read_state(cifar_training.run_folder(config))
    if state is None or state["epoch"] < config.epochs:
        return False
    try:
        records.export(config)
    except Divergence as error:
        diverged.append(str(error))
        return False
    print(f"{config.name}: finished, {paths.short(records.publish(config))}", flush=True)
    return True


def _report(written: Sequence[EpochRecord], configs: Sequence[CifarConfig]) -> None:
    if not written:
        return
    accuracies = " ".join(f"{record.train_accuracy:.1f}" for record in written)
    tests = [record.test_accuracy for record in written if record.test_accuracy is not None]
    test = "; test " + " ".join(f"{value:.1f}" for value in tests) if tests else ""
    epochs, seconds = configs[0].epochs, written[0].seconds
    print(f"epoch {written[0].epoch + 1} of {epochs}, {seconds:.1f} s: train {accuracies}{test}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

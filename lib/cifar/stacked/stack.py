"""R runs stacked as one network: their training step on a CUDA GPU is captured as one CUDA graph."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.cifar import dataset, monitor, schedule
from lib.cifar.config import CifarConfig
from lib.cifar.network import BN_EPS, BN_MOMENTUM, CONVOLUTIONS, STEM_PADDING, batch_norm_scale
from lib.cifar.stacked import layers as stacked_layers
from lib.cifar.stacked.layers import ACTIVATIONS, CHANNELS, PIXELS, SIDE, Kernels, StackedLayers, descend
from lib.cifar.training import Training

# The numbers of blocks that can share a run. They form a cluster, which lies in one part of the chip, and some parts
# lack a multiprocessor. The 132 of an H200 hold 7 clusters of 16 or 15 clusters of 8.
BLOCKS_PER_RUN = (16, 8)
USABLE_SHARE = 0.85  # of the multiprocessors
# The parameters outside the residual layers, by their names in `ConvResNet`.
STEM, HEAD = ("conv1.weight", "bn1.weight", "bn1.bias"), ("linear.weight", "linear.bias")


class Stack:
    """R runs that train together: see `lib.cifar.stacked.training`.

    Main arguments: ``runs``, R `Training` states on the CPU at the same epoch, which `update_runs` brings up to date;
    the images, on the ``device``. In tests on a CPU, ``kernels`` stands in for `Kernels`, and nothing is captured.

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
        self.config = common_config([run.config for run in runs])
        self.captured = kernels is None
        if kernels is None:
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            kernels = Kernels(blocks_per_run(len(runs), multiprocessors), device)
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
        whole = h.unflatten(2, (SIDE, SIDE))[:, :, :8, :8]  # a pooling of 4 leaves out the last two lines
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
        # A capture runs nothing, but a step must run before it. What that step changes is restored.
        changed = [*self.tensors().values(), *self._end_momenta.values(), *self._layer_momenta.values()]
        changed += [self._start, self._loss, self._correct, self.layers.buffers["weight"]]
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
        self._rates["layers"].fill_(schedule.learning_rate(config, epoch))
        self._rates["ends"].fill_(schedule.end_learning_rate(config, epoch))
        for place, run in enumerate(self.runs):
            drawn = dataset.draw_epoch(len(self.train_set), run.generator)
            for name in ("order", "shifts", "flips"):
                getattr(self._drawn, name)[place].copy_(getattr(drawn, name))
        for counter in (self._start, self._loss, self._correct):
            counter.zero_()
        batches = schedule.steps(config, len(self.train_set))
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
            missing = -len(labels) % self.blocks  # the last batch is padded; the padding is not counted
            whole = F.pad(dataset.normalise(pixels), (0, 0, 0, 0, 0, 0, 0, missing))
            h = self.stem(whole.expand(runs, *whole.shape), training=False)
            logits = self.head(self.layers.forward(h, training=False))[:, : len(labels)]
            expected = labels.expand(runs, -1)
            loss += _losses(logits, expected).double().sum(dim=1)
            correct += (logits.argmax(dim=2) == expected).sum(dim=1)
        return loss.cpu() / len(self.test_set), 100 * correct.cpu().double() / len(self.test_set)

    def measure(self) -> list[tuple[dict[str, Tensor], dict[str, float | None]]]:
        """The `ConvResNet.kernels` and the `ConvResNet.scales` of every run, as `Training.complete_epoch` takes
        them."""
        stem = batch_norm_scale(*(self.ends[f"bn1.{name}"] for name in ("weight", "bias")))
        path = batch_norm_scale(*(self.layers.parameters[f"bn2.{name}"] for name in ("weight", "bias"))).mean(dim=1)
        found = []
        for run in range(len(self.runs)):
            weights = {name: self.layers.parameters[f"{name}.weight"][run] for name in CONVOLUTIONS}
            scales = {"stem_scale": stem[run].item(), "path_length": path[run].item()}
            found.append((weights, scales))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and running statistics of all runs (R, ...), by their names in `ConvResNet`."""
        layers = self.layers.parameters | self.layers.running
        return (
            {name: tensor.detach() for name, tensor in self.ends.items()}
            | {f"bn1.{name}": tensor for name, tensor in self.running.items()}
            | {_stacked_name(name): tensor for name, tensor in layers.items()}
        )

    def find_not_finite(self, run: int) -> str:
        """The first parameter or running statistic of that run that is not finite, in words; empty if all are
        finite."""
        return monitor.find_not_finite({name: tensor[run] for name, tensor in self.tensors().items()})

    @torch.no_grad()
    def update_runs(self) -> None:
        """Bring the networks and optimisers of the runs up to date."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        momenta = {name: tensor.cpu() for name, tensor in self._end_momenta.items()}
        momenta |= {_stacked_name(name): tensor.cpu() for name, tensor in self._layer_momenta.items()}
        for place, run in enumerate(self.runs):
            own = run.tensors()
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


def blocks_per_run(runs: int, multiprocessors: int) -> int:
    """The number of blocks that share a run, such that the blocks of all runs fit at once, one on a multiprocessor."""
    most = USABLE_SHARE * multiprocessors
    return next((blocks for blocks in BLOCKS_PER_RUN if runs * blocks <= most), BLOCKS_PER_RUN[-1])


def shared_settings(config: CifarConfig) -> CifarConfig:
    """The config with the default activation, initialisation and seed: equal for all runs of a stack."""
    return replace(config, activation=ACTIVATIONS[0], initialisation="weight-tied", seed=0)


def common_config(configs: Sequence[CifarConfig]) -> CifarConfig:
    """The first config, which stands for all. Raises ValueError if the runs cannot be stacked."""
    first = configs[0]
    for config in configs:
        if shared_settings(config) != shared_settings(first):
            raise ValueError(
                f"{config.name} and {first.name} cannot be stacked: runs of a stack differ in activation, "
                f"initialisation and seed alone."
            )
        if reason := find_stacking_problem(config):
            raise ValueError(f"{config.name} cannot be stacked: {reason}.")
    return first


def find_stacking_problem(config: CifarConfig) -> str:
    """Why a run cannot be stacked; empty if it can."""
    changed = config.hold_stem or config.depth_scaling or config.stem_activation != "relu"
    if config.activation not in ACTIVATIONS or not config.batch_norm or changed:
        return (
            f"stacking needs batch norm, hold_stem and depth_scaling False, a ReLU in the stem, and one of the "
            f"activations {', '.join(ACTIVATIONS)}; train it alone"
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

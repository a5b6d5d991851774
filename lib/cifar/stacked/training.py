"""Several CIFAR-10 runs at once on one CUDA GPU: stacked on one more axis, a whole step captured as one CUDA graph.

A single run leaves a GPU nearly idle: a step launches some 6,000 small kernels, one after the other. Here the residual
layers of R runs take one launch forward and one backward (`lib.cifar.stacked.layers`). Stem, head, loss and update are
PyTorch's operations with the runs as first axis. Every run has the same initialisation, order and augmentation as if it
were trained alone, and leaves the same files (`lib.cifar.training`, `lib.cifar.records`). Its training can go on alone,
on any device.

Runs of a stack share depth, schedule and batch size, and have batch norm. They differ in activation (GELU, ReLU,
identity), initialisation and seed. All arithmetic has the accuracy of float32; nothing uses TF32.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from lib import checks, commands, paths, tables
from lib.checks import Divergence
from lib.cifar import dataset, monitor, records, schedule, states
from lib.cifar import training as cifar_training
from lib.cifar.config import CifarConfig
from lib.cifar.progress import EpochRecord
from lib.cifar.stacked.stack import Stack, common_config, find_stacking_problem, shared_settings
from lib.cifar.training import Training

MOST = 15


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
    """Train the runs of these configs side by side, or go on training them; yield the EpochRecords of each epoch.

    Their states are in the folders of `states.run_folder`. They are written every ``save_every`` epochs, after the last
    one, and after ``minutes``, when training stops. The ``seconds`` of a record are those of the whole stack.

    Raises ValueError if the runs cannot be stacked or have not completed the same epochs, RuntimeError if the kernels
    do not run, and DataNotFoundError without the images. If a loss or a weight of a run is not finite, its last state
    stays, the others are trained to the end, and then Divergence is raised.
    """
    started = time.perf_counter()
    if kernels is None and not torch.cuda.is_available():
        raise ValueError("Stacked runs need CUDA, but PyTorch sees no CUDA device here: train one run with make train.")
    place = checks.usable_device(device)
    if kernels is None and place.type != "cuda":
        raise ValueError(f"device is {device!r}, but stacked runs need CUDA: train one run with make train.")
    if place.index is not None:
        torch.cuda.set_device(place)  # where graphs are captured and the kernels are loaded
    config = common_config(configs)
    cifar_training.disable_tf32()
    with contextlib.ExitStack() as held:
        runs, lost = [], {}
        for own in configs:
            folder = states.run_folder(own)
            held.enter_context(states.lock_folder(folder))
            run = Training(own, torch.device("cpu"))
            if (state := states.read_state(folder)) is not None:
                run.restore(state, folder)
            runs.append(run)
        if len(epochs := {run.epoch for run in runs}) > 1:
            far = ", ".join(map(str, sorted(epochs)))
            raise ValueError(
                f"The runs of the stack have completed {far} epochs, expected the same number for all: stack those "
                "that agree."
            )
        if runs[0].epoch == config.epochs:
            return
        train_set = dataset.load(True, place, config.train_images or None, download)
        test_set = dataset.load(False, place, config.test_images or None, download)
        stack = Stack(runs, train_set, test_set, place, kernels)
        words = {"device": cifar_training.device_name(place), "engine": f"stacked ({len(runs)} runs)"}
        for epoch in range(runs[0].epoch, config.epochs):
            begun = time.perf_counter()
            train_values = stack.train_epoch(epoch)
            test_values = stack.evaluate() if schedule.tests_after(config, epoch) else None
            measured = stack.measure()
            seconds = time.perf_counter() - begun
            written = []
            for index, run in enumerate(runs):
                if run.config.name in lost:
                    continue
                training = tuple(value[index].item() for value in train_values)
                test = (None, None) if test_values is None else tuple(value[index].item() for value in test_values)
                losses = {"the loss": training[0], "the test loss": test[0]}
                if found := monitor.find_not_finite(losses) or stack.find_not_finite(index):
                    lost[run.config.name] = f"{found} in epoch {epoch + 1}"
                    continue
                written.append(run.complete_epoch(training, test, *measured[index], seconds=seconds, **words))
            if len(lost) == len(runs):
                break
            over = time.perf_counter() - started > 60 * minutes
            if (epoch + 1) % save_every == 0 or epoch + 1 == config.epochs or over:
                stack.update_runs()
                for run in runs:
                    if run.config.name not in lost:
                        run.save(states.run_folder(run.config))
            yield written
            if over:
                break
        if lost:
            sentence = ", ".join(f"{name} ({found})" for name, found in lost.items())
            raise Divergence(f"Runs diverged: {sentence}. Try a smaller learning rate.")


# ---- Command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.cifar.stacked.training [RUN ...] [--epochs N]``: runs of ``checkpoints/sweep.csv``, stacked.

    Returns 2 for wrong arguments, 1 if training failed, 130 if it was interrupted.
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
    return commands.exit_code(
        partial(_train_command, chosen),
        "Interrupted; the same command goes on after the last state that was written.",
        failures=(RuntimeError, OSError, MemoryError, records.CheckpointError, tables.TableError, Divergence),
        misuses=(ValueError, TypeError),
    )


def _train_command(chosen: argparse.Namespace) -> None:
    paths.check_clone()
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
        except Divergence as error:  # the other stacks go on
            diverged.append(str(error))
        finally:
            finished = [config for config in configs if publish_if_finished(config, diverged)]
            if finished:
                records.gather()
    if diverged:
        raise Divergence(" ".join(diverged))


def _pending(names: Sequence[str], epochs: int | None) -> list[CifarConfig]:
    """The runs of the sweep that are not finished: those with these names, or without names all that can be stacked."""
    listed = {config.name: config for config in records.read_sweep(epochs)}
    if unknown := [name for name in names if name not in listed]:
        raise ValueError(
            f"checkpoints/{records.SWEEP} lists no run {unknown[0]}: check the name, or add a line for it."
        )
    fitting = [name for name, config in listed.items() if not find_stacking_problem(config)]
    done = records.finished_runs()
    return [listed[name] for name in dict.fromkeys(names or fitting) if name not in done]


def _stacks(configs: Iterable[CifarConfig], most: int) -> list[list[CifarConfig]]:
    """Groups of at most ``most`` runs that can be stacked: they share their settings and their completed epochs."""
    groups: dict[tuple[CifarConfig, int], list[CifarConfig]] = {}
    for config in configs:
        groups.setdefault((shared_settings(config), states.epochs_done(states.run_folder(config))), []).append(config)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def publish_if_finished(config: CifarConfig, diverged: list[str]) -> bool:
    """Publish the run if it is finished; returns whether it is. The message of a run that diverged is appended to
    ``diverged``."""
    state = states.read_state(states.run_folder(config))
    if state is None or state["epoch"] < config.epochs:
        return False
    try:
        records.export(config)
    except Divergence as error:
        diverged.append(str(error))
        return False
    print(f"{config.name}: finished, {paths.shorten(records.publish(config))}", flush=True)
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

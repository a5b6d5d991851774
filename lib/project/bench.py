"""The cost of a training step: `make bench`, or ``python -m lib.project.bench``.

The engines of one experiment take turns, so that disturbances of the machine affect all of them. A ratio is the median
over the turns. The baseline is the simplest code: for the fully connected network the textbook loop of
`lib.project.cases` (autograd and `torch.optim.SGD`), for CIFAR-10 stock PyTorch. Operations are those of the textbook's
products, two for a multiply-add, whatever an engine recomputes or saves. Winograd's convolutions need fewer, so their
share of the measured matrix peak may exceed 1. Peak memory is the growth of the resident memory of a new process from
the imports to the third step.
"""

import argparse
import math
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import nbformat
import torch

from lib import commands, parallel, parameters, paths, tables
from lib.engine import build as engine
from lib.project import notebooks, report
from lib.project.cases import Case, Steps, cases, dtype_name

TURN_SECONDS = 0.05  # about the length of a turn
PEAK_SIZE = 2048  # rows of the square product with which the machine's peak is measured


def take_turns(
    engines: Mapping[str, Steps], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per step of each engine in each turn. The engines take at least three turns, one after the other."""
    counts = {}
    for name, steps in engines.items():
        steps(1)  # buffers, caches
        started = clock()
        steps(1)
        counts[name] = max(1, round(TURN_SECONDS / max(clock() - started, 1e-9)))
    turns: dict[str, list[float]] = {name: [] for name in engines}
    end = clock() + seconds
    while len(turns[next(iter(engines))]) < 3 or clock() < end:
        for name, steps in engines.items():
            started = clock()
            steps(counts[name])
            turns[name].append((clock() - started) / counts[name])
    return turns


def measure_matrix_peak(dtype: torch.dtype) -> float:
    """Operations per second of PyTorch's large square product, the best of ten."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return 2.0 * PEAK_SIZE**3 / min(times)


def _read_memory(kind: str) -> int:
    """Resident memory in bytes, by its name in /proc: VmRSS for now, VmHWM for the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(rf"{kind}:\s+(\d+)", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # other systems report only the peak
    return peak if sys.platform == "darwin" else 1024 * peak


def _send_growth(case: Case, name: str, threads: int, answer) -> None:
    torch.set_num_threads(threads)
    torch.mm(*(torch.randn(64, 64, dtype=case.dtype) for _ in range(2)))  # the libraries' own buffers
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # resets the peak
    before = _read_memory("VmRSS")
    case.engines()[name]()(3)
    answer.send(_read_memory("VmHWM") - before)


def measure_peak_memory(case: Case, name: str) -> float:
    """Megabytes that three steps of that engine add to a new process; nan if it died."""
    try:
        return parallel.ask_process(_send_growth, case, name, torch.get_num_threads()) / 1e6
    except EOFError:
        return float("nan")  # the process died, most likely because memory ran out


def describe_machine() -> str:
    """The processor, the threads and the software, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    )


def rows(case: Case, turns: Mapping[str, list[float]], peak: float, memory: Mapping[str, float]) -> list[dict]:
    """The table's rows of one experiment, from the seconds of its turns."""
    result, here = [], describe_machine()
    for name, seconds in turns.items():
        ratios = [base / own for base, own in zip(turns[case.baseline], seconds, strict=True)]
        rate = case.operations / statistics.median(seconds)
        result.append(
            {
                "experiment": case.name,
                "dtype": dtype_name(case),
                "engine": name,
                "ms": 1e3 * statistics.median(seconds),
                "ms_min": 1e3 * min(seconds),
                "ms_max": 1e3 * max(seconds),
                "gflops": rate / 1e9,
                "share_of_peak": rate / peak,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "memory_mb": memory[name],
                "turns": len(seconds),
                "machine": here,
            }
        )
    return result


def format_table(table: tables.Table) -> dict[str, list]:
    """The columns that are printed, rounded."""

    def column(name: str, text: str) -> list[str]:
        return [text.format(value) for value in table[name]]

    ratios = zip(table["ratio"], table["ratio_min"], table["ratio_max"], strict=True)
    return {
        "experiment": list(table["experiment"]),
        "dtype": list(table["dtype"]),
        "engine": list(table["engine"]),
        "ms a step": [f"{ms:.3g}" if ms < 100 else f"{ms:.0f}" for ms in table["ms"]],
        "GFLOP/s": column("gflops", "{:.1f}"),
        "of matrix peak": column("share_of_peak", "{:.0%}"),
        "times faster (min to max)": [f"{middle:.1f} ({low:.1f} to {high:.1f})" for middle, low, high in ratios],
        "peak memory, MB": column("memory_mb", "{:.0f}"),
    }


def measure(
    chosen: list[Case], seconds: float, memory: bool = True, report: Callable[[str], object] = print
) -> dict[str, list]:
    """The table of the chosen experiments, with ``seconds`` of turns for each."""
    peaks = {dtype: measure_matrix_peak(dtype) for dtype in {case.dtype for case in chosen}}
    found = []
    for case in chosen:
        report(f"{case.name}, {case.dtype}")
        turns = take_turns({name: make() for name, make in case.engines().items()}, seconds)
        grown = {name: measure_peak_memory(case, name) if memory else float("nan") for name in turns}
        found += rows(case, turns, peaks[case.dtype], grown)
    return tables.from_rows(found)


def merge_rows(measured: tables.Table, path: Path) -> dict[str, list]:
    """The measured rows, and the file's rows of the other experiments, in the order of `cases`."""
    place = {(case.name, dtype_name(case)): place for place, case in enumerate(cases())}
    new = tables.rows(measured)
    old = tables.rows(tables.read_csv(path)) if path.exists() else []

    def experiment(row: Mapping[str, object]) -> tuple[object, object]:
        return row["experiment"], row["dtype"]

    now = {experiment(row) for row in new}
    kept = [row for row in old if experiment(row) in place and experiment(row) not in now]
    return tables.from_rows(sorted(kept + new, key=lambda row: place[experiment(row)]))


def read_figure_seconds() -> dict[str, list]:
    """The seconds that each executed notebook of a profile took, with the start of its kernel: columns notebook,
    seconds, machine. They are too large if the machine was busy. Raises FileNotFoundError if no notebook was run."""
    here = describe_machine()
    found = {path.stem: nbformat.read(path, as_version=4).metadata for path in report.find_executed(parameters.PAPER)}
    return tables.from_rows(
        {"notebook": name, "seconds": metadata[notebooks.SECONDS], "machine": here} for name, metadata in found.items()
    )


def main(arguments: list[str]) -> int:
    """The command line; returns 1 if the folder cannot be written or no notebook was run, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.project.bench", description="The cost of a training step, by engine."
    )
    parser.add_argument(
        "--save", action="store_true", help="write the tracked figures/bench.csv instead of .build/bench.csv"
    )
    parser.add_argument(
        "--only", default="", help="only experiments whose name or dtype contains this; the others keep their rows"
    )
    parser.add_argument("--seconds", type=float, default=5, help="of turns for each experiment (default 5)")
    parser.add_argument(
        "--figures", action="store_true", help="instead, the seconds of each notebook in the last `make figures`"
    )
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if options.only in f"{case.name}, {case.dtype}"]
    if not chosen:
        parser.error(
            f"no experiment is called {options.only!r}; there are: " + "; ".join(case.name for case in cases())
        )
    if not 0 <= options.seconds < math.inf:
        parser.error(f"--seconds is {options.seconds}, expected a number of at least 0.")
    return commands.exit_code(
        partial(_command, options, chosen), "Interrupted; no table is written.", failures=(OSError, tables.TableError)
    )


def _command(options: argparse.Namespace, chosen: list[Case]) -> None:
    folder = paths.make_folder(paths.FIGURES if options.save else paths.BUILD)
    paths.check_writable(folder)  # before minutes of measuring
    if options.figures:
        table = read_figure_seconds()
        print(tables.markdown({name: table[name] for name in ("notebook", "seconds")}))
        print(f"\n{paths.shorten(tables.write_csv(folder / 'figure_seconds.csv', table))}")
        return
    print(describe_machine(), engine.report(), sep="\n")
    table = measure(chosen, options.seconds, report=partial(print, flush=True, file=sys.stderr))
    print("\n" + tables.markdown(format_table(table)))
    path = folder / "bench.csv"
    print(f"\n{paths.shorten(tables.write_csv(path, merge_rows(table, path)))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

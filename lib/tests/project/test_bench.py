"""The benchmark's textbook loop, its counts of operations and its table. No test depends on a measured time."""

import math
import signal

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib import tables
from lib.cifar.network import ConvNetConfig
from lib.dense.adjoint import Adjoint
from lib.dense.network import NetworkConfig, initialise
from lib.engine import build as engine
from lib.project import bench, cases, notebooks

DENSE = cases.Dense(NetworkConfig(depth=5, width=6, dimension=3, samples=7))
CIFAR = cases.Cifar(ConvNetConfig(depth=2))


@pytest.mark.parametrize("convention", ["released", "eq3"])
def test_the_textbook_loop_descends_as_the_adjoint_does(convention):
    config = NetworkConfig(depth=5, width=6, dimension=3, samples=7, convention=convention)
    weights, data = initialise(config)
    textbook, adjoint = cases.Textbook(config, weights, data), Adjoint(config, weights.clone(), data)
    textbook.run(3)
    adjoint.run(cases.LEARNING_RATE, 3)
    for (W, V), expected_W, expected_V in zip(textbook.layers, adjoint.weights.W, adjoint.weights.V, strict=True):
        torch.testing.assert_close(W.detach(), expected_W)
        torch.testing.assert_close(V.detach(), expected_V)


def test_operations_are_those_that_pytorch_counts():
    config = DENSE.config
    textbook = cases.Textbook(config, *initialise(config))
    with FlopCounterMode(display=False) as counter:
        textbook.run(1)
    # The data take no gradient: one product less, in the first layer.
    first = 2 * config.samples * config.width * config.dimension
    assert DENSE.operations == counter.get_total_flops() + first

    network = CIFAR.engines()["stock PyTorch"]()
    with FlopCounterMode(display=False) as counter:
        network(1)
    counts = counter.get_flop_counts()["Global"]
    total = sum(count for operation, count in counts.items() if "convolution" in str(operation))
    stem = 2 * 2 * cases.CIFAR_BATCH * 10 * 10 * 3 * 5 * 5 * 16  # forward, and backward to its weights alone
    assert CIFAR.operations == total - stem


def test_engines_take_turns_and_a_step_is_a_share_of_its_turn():
    now = 0.0
    steps_of = {"slow": 0, "quick": 0}

    def make_steps(name: str, seconds: float):
        def run(count: int) -> None:
            nonlocal now
            now += count * seconds
            steps_of[name] += count

        return run

    turns = bench.take_turns(
        {"slow": make_steps("slow", 0.2), "quick": make_steps("quick", 0.01)}, 1, clock=lambda: now
    )
    # A round is one step of 0.2 s and five of 0.01 s. Rounds go on until a second is over.
    assert turns["slow"] == pytest.approx([0.2] * 4)
    assert turns["quick"] == pytest.approx([0.01] * 4)
    assert steps_of == {"slow": 2 + 4, "quick": 2 + 4 * 5}


def test_ratios_are_taken_turn_by_turn():
    # The machine was twice as slow in the second turn. That does not change the ratio.
    turns = {"textbook loop": [0.4, 0.8, 0.6], "PyTorch adjoint": [0.2, 0.4, 0.2]}
    first, second = bench.rows(DENSE, turns, 1e9, {"textbook loop": 5.0, "PyTorch adjoint": 3.0})
    assert (first["ratio"], first["ms"]) == (1, pytest.approx(600))
    assert [second[name] for name in ("ratio", "ratio_min", "ratio_max")] == pytest.approx([2, 2, 3])
    assert second["gflops"] == pytest.approx(DENSE.operations / 0.2 / 1e9)
    assert second["share_of_peak"] == pytest.approx(DENSE.operations / 0.2 / 1e9)
    assert second["memory_mb"] == 3


@pytest.mark.slow
def test_the_table_has_a_row_for_each_engine_and_is_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "cases", lambda: [DENSE, CIFAR])
    monkeypatch.setattr(bench, "measure_peak_memory", lambda case, name: math.nan)
    monkeypatch.setattr(bench.paths, "ROOT", tmp_path)
    monkeypatch.setattr(bench.paths, "BUILD", tmp_path / "build")
    assert bench.main(["--seconds", "0"]) == 0
    table = tables.read_csv(tmp_path / "build" / "bench.csv")
    extra = ["compiled"] if engine.load()[0] else []
    expected = ["textbook loop", "PyTorch adjoint", *extra, "stock PyTorch", *extra]
    assert list(table["engine"]) == expected
    assert (table["ms"] > 0).all()
    assert all("PyTorch" in line for line in table["machine"])
    assert "CIFAR-10, L=2, batch norm" in capsys.readouterr().out
    # Experiments that are not measured again keep their rows.
    assert bench.main(["--seconds", "0", "--only", "CIFAR"]) == 0
    again = tables.read_csv(tmp_path / "build" / "bench.csv")
    assert list(again["engine"]) == expected
    stays = again["experiment"] == DENSE.name
    assert (again["ms"][stays] == table["ms"][stays]).all()
    assert not (again["ms"][~stays] == table["ms"][~stays]).any()


def test_seconds_of_figures_come_from_the_executed_notebooks(monkeypatch, tmp_path, capsys):
    for name in ("ROOT", "BUILD"):
        monkeypatch.setattr(bench.paths, name, tmp_path)
    assert bench.main(["--figures"]) == 1
    assert "`make figures PROFILE=paper` makes them" in capsys.readouterr().err
    (tmp_path / "paper").mkdir()
    notebook = nbformat.v4.new_notebook(metadata={notebooks.SECONDS: 12.5})
    nbformat.write(notebook, tmp_path / "paper" / "figure_2.ipynb")
    assert bench.main(["--figures"]) == 0
    table = tables.read_csv(tmp_path / "figure_seconds.csv")
    assert (list(table["notebook"]), list(table["seconds"])) == (["figure_2"], [12.5])
    assert "figure_2 | 12.5" in capsys.readouterr().out


def test_an_experiment_that_does_not_exist_is_said(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "imagenet"])
    assert "no experiment is called 'imagenet'; there are: L=64, m=32" in capsys.readouterr().err


def test_an_interrupted_measurement_is_said_and_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.paths, "BUILD", tmp_path)
    monkeypatch.setattr(bench, "measure", interrupt)
    assert bench.main([]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.startswith("Interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_peak_memory_is_at_least_what_the_textbook_loop_keeps():
    case = cases.Dense(NetworkConfig(depth=64, width=512, dimension=4, samples=500, dtype="float32"))
    kept = 2 * 64 * 512 * 500 * 4 / 1e6  # pre-activations and activations of all layers: 131 MB
    assert kept < bench.measure_peak_memory(case, "textbook loop") < 4 * kept

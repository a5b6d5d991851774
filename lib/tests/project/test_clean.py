"""make clean removes the files that make made, and no others."""

import os
import subprocess
import sys
import time

import pytest
import toy_project

MADE = (
    ".build/paper/checked", ".build/paper/figure_a.ipynb", ".build/quick/figure_a.ipynb",
    ".build/custom/figure_a.ipynb", ".build/quick/figure_a.outputs/figure_a.csv", ".build/engine/engine_1/engine_1.so",
    ".build/nbval/figure_a.csv",
    ".build/report-paper.html", ".build/bench.csv", ".build/released/checked", ".pytest_cache/README.md",
    "figures/quick/figure_a.csv", "figures/quick/more/figure_a.csv", "figures/released/figure_a.csv",
    "figures/.4f.draft", "checkpoints/records/.4f.draft",
)  # fmt: skip
KEPT = (
    ".build/training/run/state.pt", ".build/training/run/.4f.draft", ".build/training.bak/run/state.pt",
    ".build/locks/paper_figure_a", ".build/paper.bak/checked", ".build/notes.txt",
    "figures/figure_a.csv", "figures/custom/figure_a.csv", "figures/thesis/figure_a.csv", "figures/old lib/a.csv",
    "figures/released/mine.csv", "figures/$(touch P)/x", "checkpoints/mine.safetensors", "checkpoints/.new.draft",
    "notebooks/my notes.ipynb", ".data/x",
)  # fmt: skip


def write_files(root):
    for file in (*MADE, *KEPT):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
        if file != "checkpoints/.new.draft":  # a file that is being written now
            os.utime(root / file, (time.time() - 60,) * 2)
    listed = {
        "paper": ["figures/figure_a.csv"],
        "quick": ["figures/quick/figure_a.csv", "figures/quick/more/figure_a.csv", "figures/quick/gone.csv"],
        "released": ["figures/released/figure_a.csv", "figures/released/../thesis/figure_a.csv", "/etc/hostname"],
    }
    for profile, files in listed.items():
        (root / ".build" / profile / "figure_a.made").write_text("".join(f"{file}\n" for file in files))


def list_files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("goal", ["clean", "distclean"])
def test_only_what_make_made_is_removed(tmp_path, goal):
    root = toy_project.write(tmp_path / "project")
    before = list_files(root)
    write_files(root)
    (root / ".venv.old").mkdir()
    result = toy_project.make(root, goal, "PYTHON=/no/python")
    assert result.returncode == 0, result.stderr
    assert list_files(root) == before | set(KEPT)
    assert not any((root / folder).exists() for folder in (".build/quick", ".build/engine", "figures/quick"))
    assert (root / ".venv.old").exists() == (goal == "clean")
    assert toy_project.make(root, goal).returncode == 0  # a second time, with nothing left to remove
    assert list_files(root) == before | set(KEPT)


def test_the_target_of_a_link_stays(tmp_path):
    root = toy_project.write(tmp_path / "project")
    elsewhere = tmp_path / "scratch"
    for kind in ("engine", "quick"):
        (elsewhere / kind).mkdir(parents=True)
        (elsewhere / kind / "mine").touch()
    (elsewhere / "quick" / "figure_a.csv").touch()
    (root / ".build" / "quick").mkdir(parents=True)
    (root / ".build" / "quick" / "figure_a.made").write_text("figures/quick/figure_a.csv\n")
    (root / ".build" / "engine").symlink_to(elsewhere / "engine")
    (root / "figures" / "quick").symlink_to(elsewhere / "quick")
    assert toy_project.make(root, "clean").returncode == 0
    assert list_files(elsewhere) == {"engine/mine", "quick/mine"}
    assert (root / "figures" / "quick").is_symlink()


def test_files_that_cannot_be_removed_are_named(tmp_path):
    root = toy_project.write(tmp_path / "project")
    (root / ".build" / "engine").mkdir(parents=True)
    fails = "import runpy, shutil\ndef fails(path): raise PermissionError(13, 'Permission denied', str(path))\n"
    code = f"{fails}shutil.rmtree = fails\nrunpy.run_path('lib/project/clean.py', run_name='__main__')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"Not all files could be removed: [Errno 13] Permission denied: '{root}/.build/engine'.\n"

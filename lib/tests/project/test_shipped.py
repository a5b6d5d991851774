"""Tests read the files that ship, without what a user has added."""

import subprocess

import pytest
import shipped

from lib import paths

SHIPPED = {
    "checkpoints/runs.csv": "run\nlr0.04_seed0\n",
    "checkpoints/lr0.04_seed0.safetensors": "weights",
    "checkpoints/records/lr0.04_seed0.json": "{}",
    "checkpoints/records/lr0.04_seed1.json": "{}",
    "figures/stem.csv": "networks\n2\n",
}


def write(root, files):
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


@pytest.fixture(params=["", "a folder of it"])
def repository(tmp_path, monkeypatch, request):
    """A project that is a repository, or a folder of one."""
    root = tmp_path / request.param
    write(root, SHIPPED)
    (tmp_path / ".gitignore").write_text("*_seed1.safetensors\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(paths, "ROOT", root)
    return root


def test_a_project_to_which_nothing_was_added_is_read_as_it_is(repository):
    write(repository, {"figures/stem.csv": "networks\n2.0\n", "figures/custom/mine.csv": ""})
    write(repository, {"checkpoints/lr0.04_seed1.safetensors": "weights of a tracked run", "checkpoints/.x.draft": ""})
    assert shipped.list_added() == []
    assert shipped.find_root() == repository
    assert shipped.list_tracked() == sorted(SHIPPED)


@pytest.mark.parametrize(
    "own", ["checkpoints/lr0.1_seed0.safetensors", "checkpoints/any_seed1.safetensors", "checkpoints/records/mine.json"]
)
def test_files_that_a_user_added_are_left_out(repository, own):
    write(
        repository, {own: "", "checkpoints/runs.csv": "run\nlr0.04_seed0\nmine\n", "figures/stem.csv": "networks\n3\n"}
    )
    assert shipped.list_added() == [own]
    root = shipped.find_root()
    found = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert found == SHIPPED


def test_without_git_all_files_ship(tmp_path, monkeypatch):
    write(tmp_path, SHIPPED)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert shipped.find_root() == tmp_path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (shipped.list_tracked(), shipped.find_root()) == ([], tmp_path)

"""`make verify`: the distance of a run's tables to the tracked ones."""

import math
import subprocess

import pytest

from lib import paths
from lib.project import verify

TABLE = "depth,loss,name,smooth\n2,0.33333333,V,True\n1024,5.2e-11,W,False\n"


@pytest.mark.parametrize(
    ("old", "new", "distance"),
    [
        ("0.33333333", "0.33333333", 0.0),
        ("0.33333333", "0.33333366", 9.9e-7),
        ("0.33333333", "0.33334333", 3.0e-5),
        # A difference of one in the last place of numbers with few digits, also if one of them has lost a zero.
        ("5.2e-11", "5.3e-11", 0.0),
        ("5.2e-11", "5.4e-11", 2 / 54),
        ("1e-10", "0.0", 0.0),
        ("2.9e-09", "3e-09", 0.0),
        # For a measured number with few digits, that difference counts.
        ("82.5", "82.6", 0.1 / 82.6),
        ("nan", "nan", 0.0),
        ("80000000", "80000001", math.inf),
        ("1", "1.0", 0.0),
    ],
)
def test_the_distance_of_two_numbers_is_relative_beyond_their_last_digit(old, new, distance):
    found = verify.compare(f"x\n{old}\n", f"x\n{new}\n")
    assert found.distance == pytest.approx(distance, rel=0.02)
    assert found.reproduced == (distance <= 1e-6)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("W,False", "V,False", "name in row 2 is 'V', expected 'W'"),
        ("W,False", "W,True", "smooth in row 2 is 'True', expected 'False'"),
        ("5.2e-11", "nan", "loss in row 2 is 'nan', expected '5.2e-11'"),
        ("depth", "layers", "its columns are layers, loss, name, smooth, expected depth, loss, name, smooth"),
        ("1024,5.2e-11,W,False\n", "", "it has 1 rows, expected 2"),
        ("5.2e-11,W,False\n", "5.2", "row 2 has 2 entries, expected 4: it is cut off"),
        (TABLE, "", "its columns are none, expected depth, loss, name, smooth"),
    ],
)
def test_other_differences_are_said_in_words(old, new, said):
    found = verify.compare(TABLE, TABLE.replace(old, new))
    assert (found.difference, found.reproduced) == (said, False)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of figures with two tables and a measurement of times."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(verify, "SHIPPED", tmp_path / "figures" / ".shipped")
    paths.FIGURES.mkdir()
    for name in ("a", "b", "bench"):
        (paths.FIGURES / f"{name}.csv").write_text(TABLE)
    return tmp_path


def test_the_tracked_tables_are_those_of_the_last_commit(project, capsys):
    git = ("git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(project))
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "tables")):
        subprocess.run([*git, *arguments], check=True)
    (paths.FIGURES / "bench.csv").write_text("what took how long\n")
    assert verify.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [["a:", "the", "same"], ["b:", "the", "same"]]
    assert lines[-1] == "reproduced: 2 of 2 tables within 1e-06"
    (paths.FIGURES / "a.csv").write_text(TABLE.replace("0.33333333", "0.33333366"))
    (paths.FIGURES / "b.csv").write_text(TABLE.replace("0.33333333", "0.33433333"))
    assert verify.main([]) == 1
    out = capsys.readouterr().out
    assert "within 1e-06\n" in out
    assert "within 3e-03, beyond 1e-06" in out
    assert "reproduced: 1 of 2" in out
    (paths.FIGURES / "b.csv").unlink()
    assert verify.main(["--against", "HEAD"]) == 1
    assert "it is not here" in capsys.readouterr().out
    assert verify.main(["--against", "no-such-commit"]) == 1
    assert verify.main(["--against", ""]) == 1
    assert verify.main(["--look", "--against", "no-such-commit"]) == 1
    assert verify.main(["--look"]) == 0
    assert "no-such-commit" in capsys.readouterr().err


def test_without_git_the_tracked_tables_are_the_first_ones(project, capsys):
    from lib.project import notebooks

    staging = project / "staging"
    for value in ("0.33433333", "0.33533333"):  # two runs: the tables that came are kept once
        staging.mkdir(exist_ok=True)
        (staging / "a.csv").write_text(TABLE.replace("0.33333333", value))
        notebooks._copy({paths.FIGURES / "a.csv": staging / "a.csv"})
    assert (verify.SHIPPED / "a.csv").read_text() == TABLE
    assert verify.main([]) == 1
    assert "reproduced: 1 of 2" in capsys.readouterr().out
    assert verify.main(["--against", str(paths.FIGURES)]) == 0

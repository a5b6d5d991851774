"""Tables are the same after they are written and read as CSV; broken ones are named in a sentence."""

import math

import numpy as np
import pytest

from lib import tables


def test_csv_round_trip_is_exact(tmp_path):
    table = {"depth": [2, 1024], "distance": [1 / 3, 1e-300], "name": ["V", "W, tied"], "none": [math.nan, 1.0]}
    back = tables.read_csv(tables.write_csv(tmp_path / "t.csv", table, exact=True))
    assert list(back) == list(table)
    assert back["depth"].dtype == np.int64
    assert list(back["depth"]) == [2, 1024]
    assert list(back["distance"]) == [1 / 3, 1e-300]
    assert list(back["name"]) == ["V", "W, tied"]
    assert math.isnan(back["none"][0])


def test_floats_are_written_to_eight_digits(tmp_path):
    path = tables.write_csv(
        tmp_path / "t.csv", {"x": [1 / 3, 1e-300], "y": np.array([math.pi, 123456789.0]), "n": [1, 2]}
    )
    assert path.read_text() == "x,y,n\n0.33333333,3.1415927,1\n1e-300,123456790.0,2\n"


def test_whole_numbers_that_int64_cannot_hold_come_back_as_floats(tmp_path):
    back = tables.read_csv(tables.write_csv(tmp_path / "t.csv", {"n": [1, 2**64, -(10**30)]}))
    assert back["n"].tolist() == [1.0, 2.0**64, -1e30]


def test_truth_values_come_back_as_such(tmp_path):
    table = {"smooth": [True, False], "none": [True, None], "ratio": [1.0, 0.5]}
    back = tables.read_csv(tables.write_csv(tmp_path / "t.csv", table))
    assert back["smooth"].dtype == bool
    assert list(back["smooth"]) == [True, False]
    assert list(back["none"]) == ["True", "None"]
    assert len(tables.select(back, smooth=True)["ratio"]) == 1


def test_numpy_numbers_are_written_as_plain_numbers(tmp_path):
    path = tables.write_csv(tmp_path / "t.csv", {"x": np.array([0.1]), "n": np.array([3]), "ok": [np.True_]})
    assert path.read_text() == "x,n,ok\n0.1,3,True\n"


def test_unequal_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv: the columns have lengths \{'a': 1, 'b': 2\}"):
        tables.write_csv(tmp_path / "t.csv", {"a": [1], "b": [1, 2]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "t.csv: it is empty, expected a first line that names the columns"),
        ("a,b\n1,2\n3", "t.csv: line 3 has 1 entries, expected 2 as in the first line"),
        ("a,b\n1,2,3\n", "t.csv: line 2 has 3 entries, expected 2"),
        ('a,b\n1,"two\nlines"\n3\n', "t.csv: line 4 has 1 entries, expected 2"),
        ('a,b\n1,"t', r"t.csv: line 2 cannot be read \(unexpected end of data\)"),
        (b"a,b\n1,\xff\n", r"t.csv: line \d cannot be read .*utf-8"),
    ],
)
def test_a_table_that_is_not_whole_is_named_with_the_line(tmp_path, content, sentence):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(tables.TableError, match=sentence):
        tables.read_csv(path)


def test_a_table_cut_at_any_place_is_found_out(tmp_path):
    path = tables.write_csv(
        tmp_path / "t.csv", {"run": ["one", "two"], "depth": [2, 16], "torch": ["2.14.1", "2.14.1"]}
    )
    whole = path.read_bytes()
    assert list(tables.read_csv(path, ended=True)["depth"]) == [2, 16]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if whole[:size].endswith(b"\n"):  # a shorter table
            tables.read_csv(path, ended=True)
            continue
        with pytest.raises(tables.TableError, match=r"t.csv: (line|it is empty)"):
            tables.read_csv(path, ended=True)


def test_rows_of_a_value_are_selected():
    table = tables.from_rows([{"L": 2, "x": 0.5}, {"L": 4, "x": 0.25}])
    assert list(tables.select(table, L=4)["x"]) == [0.25]
    assert {name: column.tolist() for name, column in tables.select(table).items()} == table
    assert tables.from_rows([]) == {}


def test_markdown_and_latex_hold_the_table_with_signs_escaped():
    table = {"activation": ["GELU"], "test_acc %": ["79.9 ± 0.2"]}
    assert tables.markdown(table).splitlines()[2] == "| GELU | 79.9 ± 0.2 |"
    assert r"test\_acc \% \\" in tables.latex(table)
    assert r"79.9 $\pm$ 0.2 \\" in tables.latex(table)

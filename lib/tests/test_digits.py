"""Numbers are written with the digits that another machine computes too."""

import math

import numpy as np
import pytest

from lib import digits, tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice
from lib.figures import figure_3
from lib.figures.results import save


def test_numbers_are_rounded_to_significant_digits():
    assert digits.round_significant(1 / 3) == 0.33333333
    assert digits.round_significant(-123456789.0) == -123456790.0
    assert digits.round_significant(1 / 3, 2) == 0.33
    assert digits.round_significant(1 / 3, 0) == 0.0
    assert math.isnan(digits.round_significant(math.nan))
    assert digits.round_significant(math.inf) == math.inf


def test_a_difference_that_is_zero_up_to_rounding_is_zero():
    assert [digits.round_difference(value) for value in (8.9e-15, -8.9e-15, 0.0)] == [0.0, 0.0, 0.0]
    assert digits.round_difference(2.6128723e-9) == 2.6129e-9
    assert str(digits.round_difference(-8.9e-15)) == "0.0"
    assert digits.round_difference(2.6979461536e-3) == 0.0026979462
    assert digits.round_difference(23.010776725) == 23.010777


@pytest.mark.parametrize(("loss", "known"), [(1.994, 8), (1e-4, 8), (5.243911e-8, 8), (7.7e-17, 3), (1e-24, 0)])
def test_a_loss_has_the_digits_that_its_root_has(loss, known):
    """Residuals of a loss of 7.7e-17 are 8.8e-9, which is 880 units of the eleventh decimal."""
    assert digits.count_known_digits(loss) == known
    assert digits.round_square(loss) == digits.round_significant(loss, known)


def test_a_loss_of_zero_and_numbers_that_are_not_finite_stay():
    assert digits.round_square(0.0) == 0.0
    assert math.isnan(digits.round_square(math.nan))
    assert digits.round_square(math.inf) == math.inf


@pytest.mark.slow
def test_rounding_noise_reaches_neither_a_table_nor_its_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path))
    setting = "batch size 64, learning rate 0.04"
    table = {
        "setting": [setting] * 4,
        "epochs": [30] * 4,
        "initialisation": ["weight-tied"] * 4,
        "convolution": ["conv1"] * 2 + ["conv2"] * 2,
    }
    table |= {"layer": [1, 2, 1, 2], "value": [0.1, 1 / 3, 2 / 3, 0.7]}
    noisy = {**table, "value": np.nextafter(table["value"], 1)}
    config = figure_3.Config(NetworkChoice())
    published = records.read_published()
    others = {"figure_3_published": published}
    others["figure_3_networks"] = figure_3.measure_networks({}, {}, figure_3.measure_published(published))

    def save_and_read(data):
        save("figure_3", figure_3.draw({"figure_3": data, **others}, config), {"figure_3": data})
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert noisy["value"].tolist() != table["value"]
    assert save_and_read(table) == save_and_read(noisy)
    # The picture of the table that was written is the same.
    read = tables.read_csv(tmp_path / "figure_3.csv")
    save("figure_3", figure_3.draw({"figure_3": read, **others}, config))
    assert save_and_read(table)["figure_3.pdf"] == (tmp_path / "figure_3.pdf").read_bytes()

"""The table of claims says what the other tables hold, and nothing else."""

import dataclasses
import math

import numpy as np
import pytest

from lib import paths, tables
from lib.cifar.choice import RELEASED
from lib.cifar.network import CONVOLUTIONS, INITIALISATIONS
from lib.figures import claims
from lib.figures.claim import FAILS, HOLDS, OPEN
from lib.figures.experiment import mean_log_loss_rate
from lib.figures.table_1 import PAPER_TABLE
from lib.tables import from_rows

DEPTHS = [16, 32, 64, 128]


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A folder of tables in which every claim holds exactly."""
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    rate = {"iteration": [9] * 4, "depth": DEPTHS}
    inverse = [1 / depth for depth in DEPTHS]
    errors = ("discretised", "weights", "hidden_states", "output", "scipy")
    times = [0.0, 1.0, 2.0, 3.0, 4.0]
    clipping = [
        {"clip": clip, "depth": L, "iteration": int(t), "time": t, "norm_V": 1.0, "norm_W": 1.0,
         "lipschitz": math.log1p(t), "change": clip * t}
        for clip in (0.0, 0.1) for L in (8, 16, 32) for t in times
    ]  # fmt: skip
    ratios = [
        {"width": m, "seed": seed, "iteration": t, "ratio": r * (1 + t)}
        for m, r in ((2, 0.01), (8, 0.1), (32, 0.2)) for seed in (0, 1) for t in range(4)
    ]  # fmt: skip
    curves = [
        {"depth": L, "iteration": t, "time": float(t), "loss": math.exp(-t)} for L in (0, 4, 16, 64) for t in range(17)
    ]
    cases = {"weight-tied": -1, "Gaussian process 0.5": -1, "iid": 0, "iid 1/sqrt(L)": 0}
    initialisation = [
        {"case": case, "iteration": 5, "depth": L, "successive": L**slope,
         "variation": 1.0 if case == "iid 1/sqrt(L)" else 1 / L}
        for case, slope in cases.items() for L in DEPTHS
    ]  # fmt: skip
    counterexample = [
        {"activation": name, "factor": 2.0, "depth": L, "end": 1.4 if name == "relu" else 1 / L, "even": 1.4,
         "even_spread": 0.0, "odd_moved": 0.0, "limit_weight": 1.4}
        for name in ("relu", "gelu") for L in (64, 128, 256)
    ]  # fmt: skip
    weights = [{"iteration": 7, "layer": k, "entry_V": k / 50, "entry_W": math.sin(k / 50)} for k in range(50)]
    smooth = [{"setting": RELEASED, "activation": paper.activation, "initialisation": paper.initialisation,
               "paper_smooth": paper.smooth, "smooth": paper.smooth, "von_neumann_conv1": 0.01 if paper.smooth else 2.0,
               "von_neumann_conv2": 0.01, "runs": 5, "epochs": 180, "smooth_share_conv1": 0.25,
               "smooth_share_conv2": 0.25, "smooth_known": 1}
              for paper in PAPER_TABLE]  # fmt: skip
    averages = [
        {"setting": RELEASED, "epochs": epochs, "initialisation": tied, "convolution": name, "seed": seed,
         "average": 1.0 if tied == "weight-tied" else (9.0 if epochs == 180 else 100.0)}
        for epochs in (30, 180) for tied in INITIALISATIONS for name in CONVOLUTIONS for seed in (0, 1)
    ]  # fmt: skip
    # Of the narrow networks the slope is exact, of the wide ones the term in 1/L is seen.
    beside = [
        {"initialisation": kind, "reference": reference, "width": m, "depth": L, "seed": seed, "iteration": 9,
         **dict.fromkeys(("output", "hidden_states", "loss"), math.hypot(euler / L, L**power / m**0.5))}
        for kind, reference, m, power, euler in (
            ("iid", "mean ODE", 4, -0.5, 0.0), ("iid", "mean ODE", 1024, -0.5, 0.3),
            ("weight-tied", "own ODE", 4, -1.0, 0.0),
        )
        for L in DEPTHS for seed in (1, 2)
    ]  # fmt: skip
    rates = [
        {"activation": "gelu", "normalisation": "group", "epoch": epoch, "measure": measure, "seeds": 1,
         "slope": -1.0, "low": -1.1, "high": -0.9}
        for epoch in (1, 2) for measure in ("weights_conv1", "logits")
    ]  # fmt: skip
    published = [
        {"picture": picture, "convolution": name, "low": 0.02, "high": 0.03, "smooth_share": 1.0}
        for picture in ("first", "second") for name in ("conv1", "conv2")
    ]  # fmt: skip
    held = {
        "figure_3_published_ratios": from_rows(published),
        "mean_limit": from_rows(beside),
        "conv_limit_slopes": from_rows(rates),
        "table_1": from_rows(smooth),
        "figure_4": from_rows(averages),
        "neural_ode": {**rate, **dict.fromkeys(errors, inverse)},
        "figure_1_left": {"iterations": [9] * 4, "depth": DEPTHS, "max_distance": inverse},
        "figure_1_right": {**rate, "distance_V": inverse, "distance_W": inverse},
        "clipping": from_rows(clipping),
        "long_time": from_rows(ratios),
        "long_time_depths": from_rows(curves),
        "long_time_limit": {
            "depth": [0, 4, 16, 64],
            "distance_V": [0.0, 1 / 4, 1 / 16, 1 / 64],
            "distance_W": [0.0, 2 / 4, 2 / 16, 2 / 64],
            "residual": [1e-4] * 4,
        },
        "figure_2": {"iteration": [0, 7], "loss": [1.0, 1e-6]},
        "figure_2_weights": from_rows(weights),
        "initialisation": from_rows(initialisation),
        "relu_counterexample": from_rows(counterexample),
    }
    for name, table in held.items():
        tables.write_csv(tmp_path / f"{name}.csv", table)
    return tmp_path


def test_tables_in_which_all_holds_give_only_that_verdict(figures):
    found = claims.judge_all()
    assert {claim.verdict for claim in found} == {HOLDS}
    assert all(claim.slope == pytest.approx(claim.expected, abs=1e-9) for claim in found if math.isfinite(claim.slope))
    assert found[0].where == "Prop. 2"
    assert {"Prop. 3", "Thm 4", "Def. 1", "Thm 6", "section 4.3", "App. D"} < {c.where.split(",")[0] for c in found}
    trained = [claim.where for claim in found if claim.where != claims.BEYOND][-8:]
    assert trained == ["Fig. 3"] + ["Table 1"] * 6 + ["Appendix, Fig. 4"]
    assert [claim.figure for claim in found[-9:]] == ["mean_limit"] * 7 + ["conv_limit"] * 2


@pytest.mark.parametrize(
    ("name", "column", "change", "where"),
    [
        ("neural_ode", "output", lambda x: x**0.5, "Thm 4"),
        ("figure_1_left", "max_distance", lambda x: x**0.5, "Prop. 3, Fig. 1 left"),
        ("clipping", "change", lambda x: 1.01 * x, "clipped flow"),
        ("clipping", "lipschitz", lambda x: np.expm1(np.expm1(x)), "Prop. 3"),
        ("long_time", "ratio", lambda x: x[::-1], "Def. 1, Prop. 5"),
        ("long_time", "ratio", lambda x: 1e-3 * x, "Def. 1, Prop. 5"),
        ("relu_counterexample", "end", lambda x: np.where(x > 1, 1 / x, x**0.5), "App. D"),
        ("long_time_depths", "loss", lambda x: np.maximum(x, 1e-2), "Thm 6"),
        ("long_time_depths", "loss", lambda x: np.exp(-2 * np.sqrt(-8 * np.log(x))), "Thm 6"),
        ("long_time_depths", "loss", lambda x: (1 - np.log(x)) ** -4.0, "Thm 6"),
        ("neural_ode", "weights", lambda x: x**0.5, "Thm 4"),
        ("table_1", "smooth", np.logical_not, "Table 1"),
        ("figure_4", "average", np.sqrt, "Appendix, Fig. 4"),
        ("figure_3_published_ratios", "low", lambda x: 10 * x, "Fig. 3"),
        ("long_time_limit", "residual", lambda x: 1e3 * x, "Thm 6"),
        ("figure_2_weights", "entry_V", lambda x: np.random.default_rng(0).permutation(x), "Thm 6, Fig. 2"),
        ("initialisation", "variation", lambda x: np.ones_like(x), "section 4.3"),
        ("relu_counterexample", "odd_moved", lambda x: x + 1e-3, "App. D"),
        ("mean_limit", "hidden_states", np.sqrt, claims.BEYOND),
        (
            "mean_limit",
            "width",
            lambda x: np.minimum(x, 8),
            claims.BEYOND,
        ),  # Euler's term is no longer of the order said
        ("conv_limit_slopes", "slope", lambda x: -x, claims.BEYOND),
    ],
)
def test_a_table_that_contradicts_a_claim_is_judged_so(figures, name, column, change, where):
    path = figures / f"{name}.csv"
    table = tables.read_csv(path)
    values = table[column] if column == "smooth" else np.asarray(table[column], dtype=float)
    table[column] = change(values)
    tables.write_csv(path, table)
    wrong = [claim for claim in claims.judge_all() if claim.verdict == FAILS]
    assert wrong
    assert {claim.where for claim in wrong} == {where}


def test_a_bound_holds_with_room_to_spare(figures):
    """A steeper fall than an upper bound's is no contradiction; a lower bound is one of the other side."""
    for name, column in (("figure_1_left", "max_distance"), ("neural_ode", "weights"), ("clipping", "norm_W")):
        table = tables.read_csv(figures / f"{name}.csv")
        table[column] = table[column] / table["depth"] ** 0.3
        tables.write_csv(figures / f"{name}.csv", table)
    assert {claim.verdict for claim in claims.judge_all()} == {HOLDS}


def test_distances_are_judged_where_both_sides_have_the_papers_schedule(figures):
    path = figures / "figure_4.csv"
    table = tables.rows(tables.read_csv(path))
    table += [row | {"epochs": 200, "average": 1.0} for row in table if row["epochs"] == 180]
    table = [row for row in table if (row["epochs"], row["initialisation"], row["seed"]) != (180, "weight-tied", 1)]
    tables.write_csv(path, from_rows(table))
    (last,) = [claim for claim in claims.judge_all() if claim.figure == "figure_4"]
    assert (last.verdict, last.measured) == (
        HOLDS, f"9 (conv1) and 9 (conv2) times, after 180 epochs, 1 run of each at least ({RELEASED})",
    )  # fmt: skip
    tables.write_csv(
        path, from_rows(row for row in table if row["epochs"] == 30 or row["initialisation"] == "weight-tied")
    )
    (last,) = [claim for claim in claims.judge_all() if claim.figure == "figure_4"]
    assert last.verdict == OPEN
    assert last.measured.startswith("100 (conv1) and 100 (conv2) times, after own schedule of 30 epochs")


def test_the_criterion_of_a_linear_rate_says_what_a_power_law_would_do():
    """(1 + t)^-p falls by the factor that the criterion's sentence names, whatever p is."""
    t = np.linspace(0, 1e4, 4001)
    rates = [mean_log_loss_rate({"iteration": t[part], "loss": (1 + t[part]) ** -3.0}, 1.0)
             for part in ((t >= 5e3) & (t < 7.5e3), t >= 7.5e3)]  # fmt: skip
    assert 1 - rates[1] / rates[0] == pytest.approx(0.29, abs=0.005)


def test_each_setting_is_judged_by_itself(figures):
    other = "batch size 128, learning rate 0.04"
    for name, column, changed in (("table_1", "smooth", np.logical_not), ("figure_4", "average", np.ones_like)):
        table = tables.read_csv(figures / f"{name}.csv")
        rougher = table | {"setting": np.full(len(table["setting"]), other), column: changed(table[column])}
        both = {key: np.concatenate([table[key], rougher[key]]) for key in table}
        tables.write_csv(figures / f"{name}.csv", both)
    found = [claim for claim in claims.judge_all() if claim.figure in ("table_1", "figure_4")]
    assert len(found) == 14
    for claim in found:
        assert claim.verdict == (FAILS if other in claim.statement else HOLDS)
        assert (other if other in claim.statement else RELEASED) in claim.measured


def test_what_was_not_trained_as_long_as_the_papers_is_open(figures):
    for name in ("table_1", "figure_4"):
        table = tables.read_csv(figures / f"{name}.csv")
        table["epochs"] = np.full(len(table["epochs"]), 30)
        tables.write_csv(figures / f"{name}.csv", table)
    found = [claim for claim in claims.judge_all() if claim.figure in ("table_1", "figure_4")]
    assert [claim.verdict for claim in found] == [OPEN] * 7
    assert all("own schedule of 30 epochs (paper: 180)" in claim.measured for claim in found)


def test_a_missing_table_is_named_with_what_makes_it(figures):
    (figures / "clipping.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"clipping\.csv is missing: `make figures PROFILE=paper` makes it\."):
        claims.judge_all()
    for name in ("other", "released", "custom"):
        with pytest.raises(ValueError, match=f"profile is '{name}', expected one of: quick, paper"):
            claims.judge_all(name)


def test_figure_draws_the_slopes(figures):
    found = claims.judge_all()
    figure = claims.draw({"claims": from_rows(dataclasses.asdict(claim) for claim in found)}, claims.Config())
    line = next(line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    assert list(line.get_xdata()) == [c.slope - c.expected for c in found if math.isfinite(c.slope)]


def test_tracked_tables_agree_with_the_tracked_claims():
    path = paths.FIGURES / "claims.csv"
    if not path.is_file():
        pytest.skip("figures/claims.csv is not made yet: `make claims`")
    stored = tables.read_csv(path)
    found = claims.judge_all()
    assert list(stored["statement"]) == [claim.statement for claim in found]
    assert list(stored["verdict"]) == [claim.verdict for claim in found]
    assert stored["slope"] == pytest.approx([claim.slope for claim in found], nan_ok=True, rel=1e-6)

"""The table of claims follows from the other tables: each claim fails in a table in which it is false."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from lib import paths, tables
from lib.cifar.choice import RELEASED
from lib.cifar.network import CONVOLUTIONS, INITIALISATIONS
from lib.figures import claims, long_time, pl_condition
from lib.figures import clipping as clipping_room
from lib.figures.claim import FAILS, HOLDS, OPEN, combine_margins, judge, judge_rate, judge_rates
from lib.figures.table_1 import PAPER_TABLE
from lib.rates import Slope, fit_mean_slope
from lib.tables import from_rows, select

DEPTHS = [16, 32, 64, 128]
SEEDS = [0, 1, 2]


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A folder of tables in which every claim holds exactly."""
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    errors = ("discretised", "weights", "hidden_states", "output", "distance_V", "distance_W", "scipy")
    beside_ode = [
        {"seed": seed, "iteration": t, "depth": L, **dict.fromkeys(errors, (1 + seed) * t / L)}
        for seed in SEEDS for t in (3, 9) for L in DEPTHS
    ]  # fmt: skip
    norms = dict.fromkeys(("norm_A", "norm_V", "norm_W", "norm_B"), 1.0)
    clipping = [
        {"seed": seed, "clip": clip, "depth": L, "iteration": t, **norms, "lipschitz": 1.0 + t,
         **dict.fromkeys(clipping_room.CONVERGING, (1 + seed + t) / L)}
        for seed in SEEDS for clip in (0.0, 0.1, 0.2) for L in DEPTHS for t in (0, 5)
    ]  # fmt: skip
    condition = [
        {"width": m, "target_scale": scale, "seed": seed, "samples": 6, "mu": mu * kept, "mu_start": mu,
         "start": 1.0, "loss": 1e-7}
        for m, mu in ((2, 0.0), (6, 0.1), (24, 0.2)) for scale, kept in ((0.1, 0.9), (1.0, 0.6)) for seed in SEEDS
    ]  # fmt: skip
    constants = [
        {"seed": seed, "bound": bound, "time": t, "measured": 2.0, "own": 1.0 if bound == "rate" else 3.0, "prior": 4.0}
        for seed in SEEDS for bound in ("M", "K", "C", "rate") for t in (1.0, 2.0)
    ]  # fmt: skip
    curves = [
        {"seed": seed, "depth": L, "iteration": t, "time": float(t), "loss": math.exp(-t), "ratio": 1.0}
        for seed in SEEDS for L in (0, 4, 16, 64) for t in range(17)
    ]  # fmt: skip
    ends = [
        {"seed": seed, "depth": L, "distance_V": 1 / L if L else 0.0, "distance_W": 2 / L if L else 0.0,
         "residual": 1e-4}
        for seed in SEEDS for L in (0, 4, 16, 64)
    ]  # fmt: skip
    cases = {"weight-tied": -1, "Gaussian process 0.5": -1, "iid": 0, "iid 1/sqrt(L)": 0}
    initialisation = [
        {"seed": seed, "case": case, "depth": L, "start": 1.0, "loss": 0.05, "successive": L**slope,
         "distance": L**slope, "variation": 1.0 if case == "iid 1/sqrt(L)" else 1 / L}
        for seed in SEEDS for case, slope in cases.items() for L in (128, 256, 512)
    ]  # fmt: skip
    counterexample = [
        {"activation": name, "factor": factor, "depth": L, "end": 1.4 if name == "relu" else 1 / L, "even": 1.4,
         "even_spread": 0.0, "odd_moved": 0.0, "limit_weight": 1.4}
        for name in ("relu", "gelu") for factor in (1.5, 2.0) for L in (64, 128, 256)
    ]  # fmt: skip
    smooth = [{"setting": RELEASED, "activation": paper.activation, "initialisation": paper.initialisation,
               "paper_smooth": paper.smooth, "von_neumann_conv1": 0.01 if paper.smooth else 2.0,
               "von_neumann_conv2": 0.01, "runs": 5, "epochs": 180, "smooth_share_conv1": 0.25,
               "smooth_share_conv2": 0.25, "smooth_known": 1}
              for paper in PAPER_TABLE]  # fmt: skip
    averages = [
        {"setting": RELEASED, "epochs": epochs, "initialisation": initialisation, "convolution": name, "seed": seed,
         "average": 1.0 if initialisation == "weight-tied" else (9.0 if epochs == 180 else 100.0)}
        for epochs in (30, 180) for initialisation in INITIALISATIONS for name in CONVOLUTIONS for seed in (0, 1)
    ]  # fmt: skip
    # The slope is exact in the narrow networks; the wide ones have a term in 1/L too.
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
        {"activation": "gelu", "normalisation": "batch", "stem_activation": stem, "epochs": 2, "epoch": epoch,
         "measure": measure, "seeds": 1, "slope": slope, "low": slope - 0.05, "high": slope + 0.05, "least": least,
         "most": 2 * least}
        for epoch in (1, 2) for stem, least in (("gelu", 10.0), ("relu", 1.0))
        for measure, slope in (("weights_conv1", -1.0), ("logits", -1.0), ("steepness", 0.0))
    ]  # fmt: skip
    published = [
        {"picture": picture, "convolution": name, "low": 0.02, "high": 0.03, "smooth_share": 1.0}
        for picture in ("first", "second") for name in ("conv1", "conv2")
    ]  # fmt: skip
    long = {"iteration": [0, 80, 160], "loss": [1.0, 1e-3, 1e-6], "ratio_V": [math.nan, 0.01, 0.02],
            "ratio_W": [math.nan, 0.02, 0.03]}  # fmt: skip
    held = {
        "neural_ode": from_rows(beside_ode),
        "figure_1_left": from_rows(
            {"seed": seed, "iterations": 9, "depth": L, "max_distance": 1 / L} for seed in SEEDS for L in DEPTHS
        ),
        "clipping": from_rows(clipping),
        "pl_condition": from_rows(condition),
        "bounds": from_rows(constants),
        "long_time": from_rows(curves),
        "long_time_limit": from_rows(ends),
        "figure_2": long,
        "initialisation": from_rows(initialisation),
        "relu_counterexample": from_rows(counterexample),
        "figure_3_published_ratios": from_rows(published),
        "table_1": from_rows(smooth),
        "figure_4": from_rows(averages),
        "mean_limit": from_rows(beside),
        "conv_limit_slopes": from_rows(rates),
    }
    for name, table in held.items():
        tables.write_csv(tmp_path / f"{name}.csv", table)
    return tmp_path


def test_tables_in_which_all_holds_give_only_that_verdict(figures):
    found = claims.judge_all()
    assert {claim.statement: claim.verdict for claim in found if claim.verdict != HOLDS} == {}
    assert all(claim.slope == pytest.approx(claim.expected, abs=1e-9) for claim in found if claim.figure != "conv_limit"
               and math.isfinite(claim.slope))  # fmt: skip
    assert found[0].where == "Prop. 2"
    assert {"Prop. 3", "Thm 4", "Def. 1", "Thm 6", "section 4.3", "App. D"} < {c.where.split(",")[0] for c in found}
    trained = [claim.where for claim in found if claim.where != claims.BEYOND][-8:]
    assert trained == ["Fig. 3"] + ["Table 1"] * 6 + ["Appendix, Fig. 4"]
    assert [claim.figure for claim in found[-13:]] == ["mean_limit"] * 7 + ["conv_limit"] * 6


# --- Counter-tests ---


def take_root(column: np.ndarray) -> np.ndarray:
    """Make a quantity of order 1/L one of order 1/sqrt(L)."""
    return column**0.5


def raise_by_row(column: np.ndarray) -> np.ndarray:
    """Make a quantity that should not depend on L grow from row to row, and so with L."""
    return column * np.arange(1, 1 + len(column))


def halve_by_depth(column: np.ndarray) -> np.ndarray:
    """Halve a quantity that should not fall from depth to depth. These tables have three depths."""
    return column * 0.5 ** (np.arange(len(column)) % 3)


@dataclass(frozen=True)
class Counter:
    """A table in which a claim is false: one ``column``, and the ``others``, are changed in the rows with the
    ``chosen`` values."""

    statement: str
    table: str
    column: str
    change: Callable[[np.ndarray], np.ndarray]
    chosen: dict = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] = ()

    def write(self, folder, change: Callable[[np.ndarray], np.ndarray]) -> None:
        path = folder / f"{self.table}.csv"
        table = tables.read_csv(path)
        keep = np.ones(len(table[self.column]), dtype=bool)
        for name, value in self.chosen.items():
            keep &= table[name] == value
        for column in (self.column, *self.others):
            values = np.array(table[column], dtype=float)
            values[keep] = change(values[keep])
            table = table | {column: values}
        tables.write_csv(path, table)


def change_each_seed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Apply the change to each seed: the tables are sorted by seed, and there are three."""
    return lambda column: np.concatenate([change(part) for part in np.split(column, len(SEEDS))])


CIFAR = [(paper.activation, paper.initialisation, paper.smooth) for paper in PAPER_TABLE]
ODE = (
    ("A network that samples Lipschitz", "discretised"), ("Trained weights:", "weights"),
    ("Trained hidden", "hidden_states"), ("Trained outputs:", "output"),
    ("Trained V:", "distance_V"), ("Trained W:", "distance_W"), ("SciPy", "scipy"),
)  # fmt: skip
CLIPPED = "Clipped flow, A and B trained: "
COUNTERS = [
    *(Counter(statement, "neural_ode", column, take_root) for statement, column in ODE),
    Counter("Layers that start equal", "figure_1_left", "max_distance", take_root),
    *(Counter(CLIPPED + measure, "clipping", column, change_each_seed(raise_by_row))
      for column, measure in clipping_room.BOUNDED.items()),
    *(Counter(CLIPPED + measure, "clipping", column, take_root, {"clip": clip})
      for column, measure in clipping_room.CONVERGING.items() for clip in (0.1, 0.2)),
    Counter("A network that samples the trained", "bounds", "measured", lambda x: 1.6 * x, {"bound": "C", "seed": 1}),
    Counter("Clipped flow: L times", "bounds", "own", lambda x: 0.5 * x, {"bound": "K", "seed": 1}),
    Counter("Clipped flow: L times", "bounds", "prior", lambda x: 0.1 * x, {"bound": "K", "seed": 1}),
    Counter("-log(l(t)/l(0))/t", "bounds", "measured", np.negative, {"bound": "rate", "time": 1.0}),
    *(Counter("m >= n", "pl_condition", "mu", lambda mu: 0.1 * mu, {"target_scale": size}) for size in (0.1, 1.0)),
    Counter("The loss goes to 0", "long_time", "ratio", np.zeros_like, {"seed": 1, "depth": 4}),
    Counter("The loss goes to 0", "long_time", "loss", lambda loss: loss**0.1),
    Counter("The loss goes to 0", "long_time", "loss", np.ones_like),
    # It falls by e^-12, and then rises at an even rate.
    Counter("The loss goes to 0", "long_time", "loss",
            lambda loss: np.where(loss > math.exp(-7.5), loss**1.5, math.exp(-14.4) * loss**-0.3)),
    # A power of t, and one after a plateau. In the table in which the claim holds, t = -log(loss).
    Counter("The loss goes to 0", "long_time", "loss", lambda loss: (1 - np.log(loss)) ** -9, {"seed": 2}),
    Counter("The loss goes to 0", "long_time", "loss", lambda loss: (1 + np.maximum(-4 - np.log(loss), 0)) ** -9),
    # e^(-4 sqrt(t)) falls ever more slowly.
    Counter("The loss goes to 0", "long_time", "loss", lambda loss: np.exp(-4 * np.sqrt(-np.log(loss)))),
    Counter("The rate does not depend", "long_time", "loss", lambda loss: loss**1.2, {"depth": 64}),
    *(Counter("Weights at the end of long", "long_time_limit", f"distance_{Z}", take_root) for Z in "VW"),
    Counter("The neural ODE of the trained", "long_time_limit", "residual", lambda x: 1e3 * x),
    *(Counter("Trained for long", "figure_2", f"ratio_{Z}", lambda ratio: 100 * ratio) for Z in "VW"),
    Counter("Trained for long", "figure_2", "loss", np.ones_like),
    Counter("Weight-tied layers: what", "initialisation", "successive", take_root, {"case": "weight-tied"}),
    Counter("Gaussian process of", "initialisation", "successive", take_root, {"case": "Gaussian process 0.5"}),
    Counter("i.i.d. layers: what training adds", "initialisation", "successive", halve_by_depth, {"case": "iid"}),
    Counter("i.i.d. layers, 1/sqrt(L): what", "initialisation", "successive", halve_by_depth,
            {"case": "iid 1/sqrt(L)"}),
    *(Counter("Smooth initialisations", "initialisation", "distance", take_root, {"case": case})
      for case in ("weight-tied", "Gaussian process 0.5")),
    Counter("i.i.d. layers, 1/L:", "initialisation", "variation", take_root, {"case": "iid"}),
    Counter("i.i.d. layers, 1/sqrt(L): h_k", "initialisation", "variation", halve_by_depth,
            {"case": "iid 1/sqrt(L)"}),
    *(Counter("ReLU: odd layers", "relu_counterexample", column, lambda x: x + 1e-3,
              {"activation": "relu", "factor": factor})
      for column in ("odd_moved", "even", "even_spread") for factor in (1.5, 2.0)),
    *(Counter(f"{words}", "relu_counterexample", "end", change, {"activation": name, "factor": factor})
      for words, name, change in (("ReLU: max_k", "relu", halve_by_depth), ("GELU: on the same", "gelu", take_root))
      for factor in (1.5, 2.0)),
    *(Counter("CIFAR-10, the published GELU", "figure_3_published_ratios", "low", lambda x: 10 * x,
              {"convolution": name}) for name in CONVOLUTIONS),
    *(Counter(f"CIFAR-10, {tables.word(activation)}, {tables.word(name)}", "table_1", "von_neumann_conv1",
              lambda x, smooth=smooth: x * 0 + (2.0 if smooth else 0.01),
              {"activation": activation, "initialisation": name}) for activation, name, smooth in CIFAR),
    *(Counter(f"CIFAR-10, {tables.word(activation)}, {tables.word(name)}", "table_1", "von_neumann_conv2",
              lambda x: x * 0 + 2.0, {"activation": activation, "initialisation": name})
      for activation, name, smooth in CIFAR if smooth),
    *(Counter("CIFAR-10, GELU: layers are about", "figure_4", "average", np.sqrt, {"convolution": name})
      for name in CONVOLUTIONS),
    *(Counter(f"{words}: trained {quantity}", "mean_limit", column, lambda x: x**0.3,
              {"initialisation": kind})
      for words, kind in (("i.i.d. layers", "iid"), ("Weight-tied layers, mean-field scaling", "weight-tied"))
      for quantity, column in (("outputs", "output"), ("hidden states", "hidden_states"), ("losses", "loss"))),
    Counter("i.i.d. layers: the distance of the outputs", "mean_limit", "width", lambda x: np.minimum(x, 8)),
    *(Counter(f"CIFAR-10, GELU, batch norm, {stem} stem: {words}", "conv_limit_slopes", "slope", lambda x: x + 1,
              {"measure": measure, "stem_activation": stem.lower()}, ("low", "high"))
      for words, measure, stem in (("weights", "weights_conv1", "GELU"), ("logits", "logits", "GELU"),
                                   ("L max_k", "steepness", "GELU"), ("L max_k", "steepness", "ReLU"))),
    *(Counter(f"CIFAR-10, GELU, batch norm, ReLU stem: {words}", "conv_limit_slopes", "most", lambda x: 10 * x,
              {"measure": measure, "stem_activation": "relu"})
      for words, measure in (("weights", "weights_conv1"), ("logits", "logits"))),
]  # fmt: skip


def find_claim(statement: str) -> claims.Claim:
    (found,) = [claim for claim in claims.judge_all() if claim.statement.startswith(statement)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("counter", COUNTERS, ids=lambda counter: f"{counter.statement} {counter.column}")
def test_each_claim_fails_in_a_table_in_which_it_is_false(figures, counter):
    assert find_claim(counter.statement).margin >= 0
    counter.write(figures, counter.change)
    found = find_claim(counter.statement)
    assert found.verdict == FAILS
    assert found.margin < 0


@pytest.mark.slow
@pytest.mark.parametrize("counter", COUNTERS, ids=lambda counter: f"{counter.statement} {counter.column}")
def test_each_claim_is_open_while_its_numbers_are_missing(figures, counter):
    column = "output" if counter.column == "width" else counter.column
    dataclasses.replace(counter, column=column, chosen={}).write(figures, lambda values: np.full(len(values), math.nan))
    assert find_claim(counter.statement).verdict == OPEN


ROWS = (  # a row of a table, and the claim that is open without it
    ("neural_ode", {"seed": 1, "depth": 128}, "Trained outputs:"),
    ("neural_ode", {"seed": 1, "depth": 128, "iteration": 9}, "SciPy"),
    ("clipping", {"seed": 1, "clip": 0.1, "depth": 16}, CLIPPED + "sup over s"),
    ("bounds", {"seed": 2, "bound": "K", "time": 2.0}, "Clipped flow: L times"),
    ("relu_counterexample", {"activation": "relu", "factor": 1.5, "depth": 64}, "ReLU: odd layers"),
    ("long_time", {"seed": 1, "depth": 4, "iteration": 0}, "The rate does not depend"),
    ("long_time_limit", {"seed": 1, "depth": 0}, "The neural ODE of"),
    ("long_time_limit", {"seed": 1, "depth": 64}, "Weights at the end"),
    ("initialisation", {"seed": 1, "case": "weight-tied", "depth": 512}, "Weight-tied layers: what"),
    ("figure_1_left", {"seed": 1, "depth": 64}, "Layers that start equal"),
    ("pl_condition", {"seed": 1, "width": 6, "target_scale": 0.1}, "m >= n"),
    ("mean_limit", {"seed": 1, "initialisation": "iid", "width": 4, "depth": 32}, "i.i.d. layers: trained outputs"),
    ("mean_limit", {"seed": 1, "initialisation": "iid", "width": 4, "depth": 32}, "i.i.d. layers: the distance"),
)


@pytest.mark.parametrize(("name", "lost", "statement"), ROWS)
def test_a_claim_is_open_while_a_row_is_missing(figures, name, lost, statement):
    if name == "figure_1_left":  # seeds may differ in depths; two depths that all seeds have are left
        lost = {"seed": 1, "depth": 64}
        shorter = tables.rows(tables.read_csv(figures / f"{name}.csv"))
        tables.write_csv(figures / f"{name}.csv", from_rows(row for row in shorter if row["depth"] < 128))
    table = tables.rows(tables.read_csv(figures / f"{name}.csv"))
    kept = [row for row in table if any(row[column] != value for column, value in lost.items())]
    assert len(kept) < len(table)
    tables.write_csv(figures / f"{name}.csv", from_rows(kept))
    assert find_claim(statement).verdict == OPEN


def test_a_clipped_flow_without_clipping_leaves_its_claims_open(figures):
    path = figures / "clipping.csv"
    tables.write_csv(path, select(tables.read_csv(path), clip=0.0))
    assert {claim.verdict for claim in claims.judge_all() if claim.figure == "clipping"} == {OPEN}


def test_a_slope_through_two_points_is_open():
    """Two points do not show whether the line is straight."""
    table = from_rows({"seed": seed, "depth": L, "d": (1 + 0.01 * seed) / L} for seed in range(5) for L in (16, 32))
    fit = fit_mean_slope(table, "d")
    assert math.isnan(fit.fit_low)
    assert judge_rate("s", "w", "f", fit, -1.0).verdict == OPEN


@pytest.mark.parametrize("left", [0.5, math.nan])
def test_networks_that_are_not_trained_to_the_end_leave_the_pl_condition_open(figures, left):
    table = tables.read_csv(figures / "pl_condition.csv")
    table["loss"][-1] = left
    tables.write_csv(figures / "pl_condition.csv", table)
    assert find_claim("m >= n").verdict == OPEN


def test_a_slope_with_a_missing_number_is_open():
    depths, seeds = np.array([8, 16, 32, 64] * 5), np.repeat(np.arange(5), 4)
    table = {"seed": seeds, "depth": depths, "distance": 1.0 / depths * (1 + 0.01 * seeds)}
    assert judge_rate("s", "w", "f", fit_mean_slope(table, "distance"), -1.0).verdict == HOLDS
    for missing in (0, 7, 19):
        distance = table["distance"].copy()
        distance[missing] = math.nan
        assert (
            judge_rate("s", "w", "f", fit_mean_slope(table | {"distance": distance}, "distance"), -1.0).verdict == OPEN
        )


def test_every_claim_has_its_counter_test(figures):
    for claim in claims.judge_all():
        matching = {each.statement for each in COUNTERS if claim.statement.startswith(each.statement)}
        assert len(matching) == 1, claim.statement


def test_an_interval_on_both_sides_of_the_criterion_leaves_a_claim_open():
    verdicts = {}
    for low, high in ((-1.1, -0.95), (-1.1, -0.8), (-0.85, -0.8)):
        verdicts[low, high] = judge_rate("", "", "", Slope((low + high) / 2, low, high, 1.0), -1.0).verdict
    assert list(verdicts.values()) == [HOLDS, OPEN, FAILS]
    assert [judge(margin) for margin in (0.1, 0.0, -0.1, math.nan)] == [HOLDS, HOLDS, FAILS, OPEN]


def test_a_part_that_fails_is_not_hidden_by_one_that_is_missing():
    """Nor by a part that holds. If no part fails, a missing one leaves the claim open."""
    holds, fails, missing = Slope(-1.0, -1.01, -0.99, 1.0), Slope(-0.5, -0.51, -0.49, 1.0), Slope(*[math.nan] * 4)
    expected = {(holds, fails): FAILS, (fails, missing): FAILS, (missing, fails, holds): FAILS,
                (holds, missing): OPEN, (missing,): OPEN, (holds, holds): HOLDS}  # fmt: skip
    for parts, verdict in expected.items():
        for fits in (parts, parts[::-1]):
            found = judge_rates("", "", "", fits, -1.0)
            assert (found.verdict, judge(found.margin)) == (verdict, verdict)
    # A lower bound: the steepest fall decides.
    assert judge_rates("", "", "", [holds, missing], 0.0, bound=-1).slope == holds.slope
    margins = {
        (0.2, -0.1): -0.1,
        (math.nan, -0.1): -0.1,
        (-0.1, math.nan, 3.0): -0.1,
        (0.2, 0.1): 0.1,
        (math.inf,): math.inf,
    }
    for parts, least in margins.items():
        assert combine_margins(*parts) == least
    for parts in ((0.2, math.nan), (math.nan, 0.2), (math.nan,), ()):
        assert math.isnan(combine_margins(*parts))


PARTS = (  # claims of several parts: what makes one part fail, and what is missing of another
    (Counter(CLIPPED + "sup over s", "clipping", "weights", take_root, {"clip": 0.1}), "weights", {"clip": 0.2}),
    (Counter("Weights at the end", "long_time_limit", "distance_W", take_root), "distance_V", {}),
    (Counter("The loss goes to 0", "long_time", "loss", lambda loss: loss**0.1), "ratio", {}),
    (Counter("m >= n", "pl_condition", "mu", lambda mu: 0.1 * mu, {"width": 6}), "mu", {"width": 24}),
    (Counter("The neural ODE", "long_time_limit", "residual", lambda x: 1e3 * x, {"seed": 0}), "residual", {"seed": 1}),
    (Counter("Trained for long", "figure_2", "ratio_V", lambda ratio: 100 * ratio), "ratio_W", {}),
    (Counter("Smooth init", "initialisation", "distance", take_root, {"case": "weight-tied"}),
     "distance", {"case": "Gaussian process 0.5"}),
    (Counter("ReLU: odd layers", "relu_counterexample", "even", lambda x: x + 1e-3), "odd_moved", {}),
    (Counter("GELU: on the same", "relu_counterexample", "end", take_root, {"factor": 1.5}), "end", {"factor": 2.0}),
    (Counter("CIFAR-10, the published", "figure_3_published_ratios", "low", lambda x: 10 * x, {"convolution": "conv1"}),
     "low", {"convolution": "conv2"}),
    (Counter("CIFAR-10, identity, weight-tied", "table_1", "von_neumann_conv1", lambda x: x * 0 + 2.0),
     "von_neumann_conv2", {}),
    (Counter("CIFAR-10, GELU: layers", "figure_4", "average", np.sqrt, {"convolution": "conv1"}),
     "average", {"convolution": "conv2"}),
    (Counter("Clipped flow: L times", "bounds", "own", lambda x: 0.5 * x, {"bound": "K"}), "prior", {"bound": "K"}),
)  # fmt: skip


@pytest.mark.parametrize(("counter", "column", "chosen"), PARTS, ids=[counter.statement for counter, *_ in PARTS])
def test_a_claim_fails_with_one_part_while_others_are_missing(figures, counter, column, chosen):
    missing = Counter(counter.statement, counter.table, column, lambda x: x * math.nan, chosen)
    missing.write(figures, missing.change)
    assert find_claim(counter.statement).verdict == OPEN
    counter.write(figures, counter.change)
    assert find_claim(counter.statement).verdict == FAILS


def test_one_seed_leaves_slopes_open(figures):
    for name, seed in (("figure_1_left", 0), ("mean_limit", 1)):
        tables.write_csv(figures / f"{name}.csv", select(tables.read_csv(figures / f"{name}.csv"), seed=seed))
    found = [claim for claim in claims.judge_all() if claim.figure in ("figure_1_left", "mean_limit")]
    assert len(found) == 8
    assert {claim.verdict for claim in found} == {OPEN}


def test_one_depth_leaves_a_comparison_of_depths_open(figures):
    path = figures / "long_time.csv"
    tables.write_csv(path, select(tables.read_csv(path), depth=16))
    assert find_claim("The rate does not depend").verdict == OPEN


def test_a_slope_of_a_bent_curve_is_open():
    """The mean slope of all seeds is -1, but that of the deepest networks is not."""
    depths, seeds = np.array([16, 32, 64, 128, 256] * 5), np.repeat(np.arange(5), 5)
    bent = np.minimum(1.0, depths / 64.0) ** -1.4 * np.maximum(1.0, depths / 64.0) ** -0.6
    fits = [
        fit_mean_slope({"seed": seeds, "depth": depths, "distance": each}, "distance") for each in (1 / depths, bent)
    ]
    assert [fit.slope for fit in fits] == pytest.approx([-1, -1])
    assert [judge_rate("s", "w", "f", fit, -1.0).verdict for fit in fits] == [HOLDS, OPEN]


@pytest.mark.parametrize(
    ("statement", "table", "column", "chosen"),
    [
        ("i.i.d. layers: what training adds", "initialisation", "successive", {"case": "iid", "depth": 512}),
        ("ReLU: max_k", "relu_counterexample", "end", {"activation": "relu", "factor": 2.0, "depth": 256}),
    ],
)
def test_a_slope_through_a_zero_is_open(figures, statement, table, column, chosen):
    """A quantity that should not fall with L is 0 at the largest depth. The other depths do not hide that."""
    zero = Counter(statement, table, column, np.zeros_like, chosen)
    zero.write(figures, zero.change)
    assert find_claim(statement).verdict == OPEN


@pytest.mark.parametrize(
    ("name", "last", "statement"),
    [
        ("neural_ode", 9, "Trained outputs:"),
        ("clipping", 5, CLIPPED + "sup over x"),
        ("long_time", 16, "The loss goes"),
    ],
)
def test_a_network_without_its_last_time_leaves_a_supremum_over_time_open(figures, name, last, statement):
    path = figures / f"{name}.csv"
    table = tables.read_csv(path)
    lost = (table["seed"] == 1) & (table["depth"] == 64) & (table["iteration"] == last)
    assert lost.any()
    tables.write_csv(path, {column: values[~lost] for column, values in table.items()})
    assert find_claim(statement).verdict == OPEN


def test_the_slope_over_seeds_is_that_of_the_geometric_mean():
    random = np.random.default_rng(0)
    table = from_rows({"seed": seed, "depth": L, "value": math.exp(0.2 * random.standard_normal()) / L}
                      for seed in range(6) for L in (8, 16, 32, 64))  # fmt: skip
    fit = fit_mean_slope(table, "value", 8)
    slopes = [fit_mean_slope(select(table, seed=seed), "value", 8).slope for seed in range(6)]
    assert fit.slope == pytest.approx(np.mean(slopes))
    # Student's t with 5 degrees of freedom.
    half = 2.5705818 * np.std(slopes, ddof=1) / 6**0.5
    assert (fit.low, fit.high) == (pytest.approx(fit.slope - half), pytest.approx(fit.slope + half))
    assert fit.fit_low < fit.slope < fit.fit_high
    assert fit.seeds == 6


def test_networks_that_are_not_trained_leave_the_initialisations_open(figures):
    table = tables.read_csv(figures / "initialisation.csv")
    tables.write_csv(figures / "initialisation.csv", table | {"loss": np.full(len(table["loss"]), 0.5)})
    assert {claim.verdict for claim in claims.judge_all() if claim.figure == "initialisation"} == {OPEN}


def test_the_pl_criterion_fails_for_narrow_networks(figures):
    table = select(tables.read_csv(figures / "pl_condition.csv"), target_scale=0.1)
    narrow, wide = (pl_condition.judge_part(select(table, width=m)) for m in (2, 24))
    assert judge(narrow) == FAILS
    assert judge(wide) == HOLDS


def test_an_upper_bound_holds_for_a_steeper_fall(figures):
    """A quantity may fall faster than its upper bound."""
    for name, column in (("figure_1_left", "max_distance"), ("neural_ode", "weights"), ("clipping", "norm_W")):
        table = tables.read_csv(figures / f"{name}.csv")
        table[column] = table[column] / table["depth"] ** 0.3
        tables.write_csv(figures / f"{name}.csv", table)
    assert {claim.verdict for claim in claims.judge_all()} == {HOLDS}


def test_distances_are_judged_if_both_sides_have_the_papers_schedule(figures):
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
    assert last.measured.startswith("100 (conv1) and 100 (conv2) times, after a schedule of 30 epochs")


def test_late_rates_tell_an_exponential_from_a_power_of_t():
    """For several exponents, and after a plateau or a faster fall."""
    t = np.linspace(0, 1e4, 4001)
    curves = {"seed": t * 0, "depth": t * 0, "time": t}
    plateau, faster = np.minimum(1, t / 2e3), np.exp(-np.minimum(t, 100) / 10)
    for loss, expected in (
        ((1 + t) ** -1.0, long_time.POWER),
        ((1 + t) ** -3.0, long_time.POWER),
        ((1 + t) ** (-3.0 * plateau), long_time.POWER),
        (np.exp(-t / 1e3), 1),
        (np.exp(-plateau * t / 1e3), 1),
        (faster * np.exp(-t / 1e3), 1),
    ):
        ((third, fourth),) = long_time.measure_late_rates(curves | {"loss": loss}).values()
        assert fourth / third == pytest.approx(expected, abs=0.002)


def test_each_setting_is_judged_by_itself(figures):
    other = "batch size 128, learning rate 0.04"
    for name, column, changed in (
        ("table_1", "von_neumann_conv1", lambda x: np.where(x < 0.1, 2.0, 0.01)),
        ("figure_4", "average", np.ones_like),
    ):
        table = tables.read_csv(figures / f"{name}.csv")
        rougher = table | {"setting": np.full(len(table["setting"]), other), column: changed(table[column])}
        both = {key: np.concatenate([table[key], rougher[key]]) for key in table}
        tables.write_csv(figures / f"{name}.csv", both)
    found = [claim for claim in claims.judge_all() if claim.figure in ("table_1", "figure_4")]
    assert len(found) == 14
    for claim in found:
        assert claim.verdict == (FAILS if other in claim.statement else HOLDS)
        assert (other if other in claim.statement else RELEASED) in claim.measured


def test_networks_trained_for_a_shorter_time_than_the_papers_leave_claims_open(figures):
    for name in ("table_1", "figure_4"):
        table = tables.read_csv(figures / f"{name}.csv")
        table["epochs"] = np.full(len(table["epochs"]), 30)
        tables.write_csv(figures / f"{name}.csv", table)
    found = [claim for claim in claims.judge_all() if claim.figure in ("table_1", "figure_4")]
    assert [claim.verdict for claim in found] == [OPEN] * 7
    assert all("a schedule of 30 epochs (paper: 180)" in claim.measured for claim in found)


def test_a_missing_table_is_named_with_what_makes_it(figures):
    (figures / "clipping.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"clipping\.csv is missing: `make figures PROFILE=paper` makes it\."):
        claims.judge_all()
    for name in ("other", "released", "custom"):
        with pytest.raises(ValueError, match=f"profile is '{name}', expected one of: quick, paper"):
            claims.judge_all(name)


@pytest.mark.slow
def test_the_figure_draws_every_claim_with_its_margin_the_failing_first(figures):
    COUNTERS[0].write(figures, COUNTERS[0].change)  # the first claim of all fails
    dataclasses.replace(COUNTERS[-1]).write(figures, lambda x: x + math.nan)  # the last one is open, without a margin
    found = claims.judge_all()
    data = {"claims": from_rows(dataclasses.asdict(claim) for claim in found)}
    figure = claims.draw(data, claims.Config())
    slopes, factors = figure.axes[:2]
    top = max(zip(slopes.get_yticks(), slopes.get_yticklabels(), strict=True))
    assert top[1].get_text().startswith(found[0].statement)
    assert len(slopes.get_yticks()) == len(found)
    lines = {slopes: [bars.lines[0] for bars in slopes.containers], factors: factors.lines}
    points = {(axes, float(line.get_ydata()[0])): float(line.get_xdata()[0])
              for axes, drawn in lines.items() for line in drawn if len(line.get_xdata()) == 1}  # fmt: skip
    ordered = sorted(found, key=lambda claim: [FAILS, OPEN, HOLDS].index(claim.verdict))
    for place, claim in zip(range(len(found) - 1, -1, -1), ordered, strict=True):
        if math.isfinite(claim.slope):
            assert points[slopes, place] == pytest.approx(claim.margin, rel=1e-6)
        elif not math.isnan(claim.margin):
            expected = np.clip(claim.margin, -claims.FARTHEST, claims.FARTHEST)
            assert points[factors, place] == pytest.approx(expected, rel=1e-6)


def test_tracked_tables_agree_with_the_tracked_claims():
    path = paths.FIGURES / "claims.csv"
    if not path.is_file():
        pytest.skip("figures/claims.csv is not made yet: `make claims`")
    stored = tables.read_csv(path)
    found = claims.judge_all()
    assert list(stored["statement"]) == [claim.statement for claim in found]
    assert list(stored["verdict"]) == [claim.verdict for claim in found]
    assert stored["slope"] == pytest.approx([claim.slope for claim in found], nan_ok=True, rel=1e-6)

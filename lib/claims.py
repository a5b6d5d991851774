"""The paper's claims, one a row, each judged from the tables that the figures were drawn from.

The theorems' claims come first, then what the paper says of the networks that it trained on CIFAR-10, and last what
others have proved since, and is shown here beside it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib import checks, parameters, paths, tables
from lib.cifar_results import PAPER_CLOSER, SMOOTH_BELOW, closer_by
from lib.distances import Slope, fit_slope, von_neumann_ratio
from lib.experiments import mean_log_loss_rate
from lib.figures import conv_limit, mean_limit
from lib.records import PAPER_EPOCHS, training_length
from lib.tables import Table, select
from lib.theory import LIMIT

HOLDS, FAILS, OPEN = "as claimed", "not as claimed", "open"
RATE_WITHIN = 0.1  # how far a fitted slope may lie from the claimed one
LEAST_DEPTH = 16  # slopes are fitted over depths of at least this, where not said otherwise
SAME_RATE = 0.1  # by how much of one rate of the loss another may differ
POWER_WITHIN = 0.05  # by how much the exponent of a power law may seem to rise
LEAST_RATIO = 1e-3  # what counts as a positive mu
BEYOND = "beyond the paper"
TWO_TERMS_WITHIN = 0.2  # how far distances may lie from their fit by two terms, relative


@dataclass(frozen=True)
class Claim:
    """What is said and where, what was measured and by which ``criterion`` it is judged (in words), the interval of
    what was measured, the verdict and the figure.

    Claims on a rate also hold it as numbers: the ``expected`` slope and the fitted one with its bounds. A verdict is
    `OPEN` where nothing of the paper's size has been run.
    """

    statement: str
    where: str
    measured: str
    criterion: str
    interval: str
    verdict: str
    figure: str
    expected: float = math.nan
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan


def check_profile(profile: str) -> None:
    """Raise ValueError for a profile that does not have every figure which claims are judged from."""
    whole = [name for name in parameters.profiles() if all(parameters.in_profile(figure, name) for figure in JUDGED)]
    checks.choice("profile", profile, whole)


def folder(profile: str) -> Path:
    """Where a profile's tables are: ``figures`` for "paper", ``figures/<profile>`` for every other."""
    return paths.FIGURES if profile == "paper" else paths.FIGURES / profile


def read(profile: str, name: str) -> dict[str, np.ndarray]:
    """The table ``<name>.csv`` of a profile; raises FileNotFoundError with the command that makes it."""
    path = folder(profile) / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{paths.short(path)} is missing: `make figures PROFILE={profile}` makes it.")
    return tables.read_csv(path)


def _rate(
    statement: str, where: str, figure: str, fit: Slope, expected: float, what: str = "slope in L", bound: int = 1
) -> Claim:
    """A claim on a slope: an upper bound (``bound`` 1), which a steeper fall fulfils too, a lower one (-1), or the
    slope itself (0)."""
    off = fit.slope - expected
    verdict = _judge((bound * off if bound else abs(off)) <= RATE_WITHIN)
    criteria = {1: f"at most {expected + RATE_WITHIN:g}", -1: f"at least {expected - RATE_WITHIN:g}"}
    criterion = criteria.get(bound, f"within {RATE_WITHIN}")
    measured = f"{what} {fit.slope:.3f}, claimed {expected:g}"
    interval = f"[{fit.low:.3f}, {fit.high:.3f}]"
    return Claim(
        statement, where, measured, criterion, interval, verdict, figure, expected, fit.slope, fit.low, fit.high
    )


def _fit(rows: Table, column: str, at_least: int = LEAST_DEPTH) -> Slope:
    depths = np.unique(rows["depth"])
    # Small sizes have few depths: take the larger half of them.
    start = at_least if (depths >= at_least).sum() >= 3 else depths[len(depths) // 2 - 1]
    return fit_slope(rows["depth"], rows[column], start)


def _at_end(table: Table, column: str = "iteration") -> dict[str, np.ndarray]:
    return select(table, **{column: max(table[column])})


def _over_time(table: Table, *columns: str) -> dict[str, np.ndarray]:
    """The largest value of each column over the training times, by depth."""
    depths = np.unique(table["depth"])
    largest = {name: [np.max(select(table, depth=depth)[name]) for depth in depths] for name in columns}
    return {"depth": depths} | {name: np.array(values) for name, values in largest.items()}


def _largest(fits: Iterable[Slope]) -> Slope:
    return max(fits, key=lambda fit: fit.slope)


def _judge(true: bool) -> str:
    return HOLDS if true else FAILS


def _neural_ode(profile: str) -> Iterator[Claim]:
    errors = read(profile, "neural_ode")
    end, ever = _at_end(errors), _over_time(errors, "weights", "hidden_states", "output")
    claims = (
        (end, "A network that samples Lipschitz V(s), W(s) is within C/L of its neural ODE", "Prop. 2", "discretised"),
        (ever, "Trained weights converge to the limit's, uniformly in s and t", "Thm 4", "weights"),
        (ever, "Trained hidden states converge to the limit's, uniformly in s and t", "Thm 4", "hidden_states"),
        (ever, "Trained outputs converge to the limit's, uniformly in t", "Thm 4", "output"),
        (end, "The ODE through a trained network's weights, solved by SciPy, gives its outputs", "Thm 4", "scipy"),
    )
    for table, statement, where, column in claims:
        yield _rate(statement, where, "neural_ode", _fit(table, column), -1.0)


def _figure_1(profile: str) -> Iterator[Claim]:
    left = _at_end(read(profile, "figure_1_left"), "iterations")
    statement = "Layers that start equal stay within K/L of each other during training"
    yield _rate(statement, "Prop. 3, Fig. 1 left", "figure_1_left", _fit(left, "max_distance"), -1.0)
    right = _over_time(read(profile, "figure_1_right"), "distance_V", "distance_W")
    for name in "VW":
        statement = f"{name} of the trained network converges to the limit's, in the norm of Fig. 1, uniformly in t"
        yield _rate(statement, "Thm 4, Fig. 1 right", "figure_1_right", _fit(right, f"distance_{name}"), -1.0)


def _clipping(profile: str) -> Iterator[Claim]:
    table = read(profile, "clipping")
    clipped = [clip for clip in np.unique(table["clip"]) if clip > 0]
    end = _at_end(table)
    for columns, statement in (
        (("norm_V", "norm_W"), "Clipped flow: weight norms do not grow with L"),
        (("lipschitz",), "Clipped flow: K in |Z_(k+1) - Z_k| <= K/L does not grow with L"),
    ):
        fits = [_fit(select(end, clip=clip), column, at_least=8) for clip in clipped for column in columns]
        yield _rate(statement, "Prop. 3", "clipping", _largest(fits), 0.0)
    later = (table["clip"] > 0) & (table["time"] > 0)
    share = table["change"][later] / (table["clip"][later] * table["time"][later])
    measured = f"at most {share.max():.6f} of C t"
    yield Claim(
        "Clipped flow: no entry moves by more than C t", "clipped flow", measured, "at most 1, up to rounding", "",
        _judge(share.max() < 1 + 1e-9), "clipping",
    )  # fmt: skip
    exponents = []
    for clip in clipped:
        path = select(table, clip=clip, depth=max(table["depth"]))
        for start, stop in ((0.25, 0.5), (0.5, 1.0)):
            part = (path["time"] >= start * path["time"][-1]) & (path["time"] <= stop * path["time"][-1])
            exponents.append(fit_slope(path["time"][part], path["lipschitz"][part]).slope)
    early, late = np.array(exponents).reshape(-1, 2).T
    yield Claim(
        "Clipped flow: K grows with T as a power of it, where the bound allows an exponential",
        "Prop. 3",
        f"K grows as T^p, p = {early.min():.2f} to {early.max():.2f} in the second quarter, {late.min():.2f} to "
        f"{late.max():.2f} in the second half",
        f"p rises by {POWER_WITHIN} at most; for an exponential it is proportional to T",
        "",
        _judge(bool((late <= early + POWER_WITHIN).all())),
        "clipping",
    )


def _long_time(profile: str) -> Iterator[Claim]:
    ratios = read(profile, "long_time")
    widths, seeds = np.unique(ratios["width"]), np.unique(ratios["seed"])
    paths_of = {width: [select(ratios, width=width, seed=seed)["ratio"] for seed in seeds] for width in widths}
    middle = int(np.median(widths))
    wide = [path for width in widths if width >= middle for path in paths_of[width]]
    least = [path.min() for path in wide]
    narrow = np.median([path.min() for path in paths_of[widths[0]]])
    yield Claim(
        "The PL ratio stays above a positive mu along training, for wide networks",
        "Def. 1, Prop. 5",
        f"smallest ratio along training {np.median(least):.3f} for m >= {middle}, {narrow:.3f} for m = {widths[0]} "
        "(medians)",
        f"at least {LEAST_RATIO}, and for no m >= {middle} reached in the second half of training",
        f"[{min(least):.3f}, {max(least):.3f}] over widths and seeds",
        _judge(min(least) >= LEAST_RATIO and all(path.argmin() < len(path) / 2 for path in wide)),
        "long_time",
    )
    curves, ends = read(profile, "long_time_depths"), read(profile, "long_time_limit")
    rates, quarters, losses = [], [], []
    for depth in np.unique(curves["depth"]):
        rows = select(curves, depth=depth)
        by_time = {"iteration": rows["time"], "loss": rows["loss"]}
        rates.append(mean_log_loss_rate(by_time))
        third, fourth = (rows["time"] >= rows["time"][-1] * start for start in (0.5, 0.75))
        quarters.append([mean_log_loss_rate({name: column[part] for name, column in by_time.items()}, 1.0)
                         for part in (third & ~fourth, fourth)])  # fmt: skip
        losses.append(rows["loss"][-1] / rows["loss"][0])
    third, fourth = np.array(quarters).T
    yield Claim(
        "The loss goes to 0 at a linear rate",
        "Thm 6",
        f"falls to {max(losses):.1e} of its start; rate of the limit {third[0]:.3f} in the third quarter, "
        f"{fourth[0]:.3f} in the last",
        f"at every depth the two rates within {100 * SAME_RATE:.0f} % (of a power of t, the second is 29 % lower)",
        "",
        _judge(bool(max(losses) < 1e-3 and (np.abs(fourth - third) < SAME_RATE * third).all())),
        "long_time",
    )
    spread = max(rates) / min(rates) - 1
    yield Claim(
        "The rate does not depend on L",
        "Thm 6",
        f"rates differ by {100 * spread:.1f} % over depths from {min(d for d in ends['depth'] if d)} to infinity",
        f"within {100 * SAME_RATE:.0f} %",
        f"[{min(rates):.4f}, {max(rates):.4f}]",
        _judge(spread < SAME_RATE),
        "long_time",
    )
    finite = {name: column[ends["depth"] != LIMIT] for name, column in ends.items()}
    fit = _largest(_fit(finite, f"distance_{name}", at_least=4) for name in "VW")
    yield _rate("The weights at the end of long training converge to the limit's", "Thm 6", "long_time", fit, -1.0)
    residual = select(ends, depth=LIMIT)["residual"][0]
    yield Claim(
        "The neural ODE of the trained limit interpolates the data",
        "Thm 6",
        f"largest |F(x_i) - y_i| {residual:.1e}",
        "below 0.01",
        "",
        _judge(residual < 1e-2),
        "long_time",
    )


def _figure_2(profile: str) -> Iterator[Claim]:
    loss, weights = read(profile, "figure_2"), read(profile, "figure_2_weights")
    last = _at_end(weights)
    ratios = [von_neumann_ratio(torch.as_tensor(last[f"entry_{name}"])[:, None]) for name in "VW"]
    yield Claim(
        "Trained for long, the weights stay smooth across layers while the loss goes to 0",
        "Thm 6, Fig. 2",
        f"loss {loss['loss'][0]:.2f} to {loss['loss'][-1]:.1e}; von Neumann ratio of an entry of V and of W at most "
        f"{max(ratios):.4f}",
        f"loss below 1/1000 of the first, ratio below {SMOOTH_BELOW} (independent: 2)",
        "",
        _judge(loss["loss"][-1] < 1e-3 * loss["loss"][0] and max(ratios) < SMOOTH_BELOW),
        "figure_2",
    )


def _initialisation(profile: str) -> Iterator[Claim]:
    table = read(profile, "initialisation")
    after = _at_end(table)
    longest = {}
    for case in dict.fromkeys(table["case"]):
        rows = select(after, case=case)
        smooth = not case.startswith("iid")
        # A Gaussian process of length scale ell is resolved by depths well above 1/ell.
        at_least = max(LEAST_DEPTH, 8 / float(case.split()[-1])) if case.startswith("Gaussian") else LEAST_DEPTH
        fit = _fit(rows, "successive", int(at_least))
        names = {
            "weight-tied": "Weight-tied layers",
            "iid": "i.i.d. layers",
            "iid 1/sqrt(L)": "i.i.d. layers, 1/sqrt(L)",
        }
        what = names.get(case, f"Gaussian process of length scale {case.split()[-1]}")
        statement = f"{what}: {'smooth' if smooth else 'rough'} after training"
        expected, bound = (-1.0, 1) if smooth else (0.0, -1)
        yield _rate(statement, "section 4.3", "initialisation", fit, expected, bound=bound)
        longest[case] = rows
    for case, expected, kind in (("iid", -1.0, "an ordinary"), ("iid 1/sqrt(L)", 0.0, "a stochastic")):
        fit = _fit(longest[case], "variation")
        scaling = "1/sqrt(L)" if "sqrt" in case else "1/L"
        statement = f"i.i.d. layers, {scaling}: hidden states vary as for {kind} differential equation"
        what = "quadratic variation, slope in L"
        yield _rate(statement, "section 4.3", "initialisation", fit, expected, what, bound=0)


def _counterexample(profile: str) -> Iterator[Claim]:
    table = read(profile, "relu_counterexample")
    relu = select(table, activation="relu")
    error = np.abs(relu["even"] - relu["limit_weight"]) + relu["even_spread"]
    bound = np.all(relu["limit_weight"] >= 2 * np.log(relu["factor"]))
    yield Claim(
        "ReLU: odd layers never move, even layers go to w* >= 2 log C",
        "App. D",
        f"odd layers moved by {relu['odd_moved'].max():.0e}, even layers are {error.max():.0e} from w*",
        "not at all, within 1e-6",
        "",
        _judge(bool(relu["odd_moved"].max() == 0 and error.max() < 1e-6 and bound)),
        "relu_counterexample",
    )
    for name, expected, bound, statement in (
        ("relu", 0.0, -1, "ReLU: neighbouring layers end Omega(1) apart"),
        ("gelu", -1.0, 1, "GELU: on the same example neighbouring layers end O(1/L) apart"),
    ):
        rows = select(table, activation=name)
        fits = [_fit(select(rows, factor=factor), "end", 64) for factor in np.unique(rows["factor"])]
        worst = max(fits, key=lambda fit, sign=bound: sign * fit.slope)
        yield _rate(statement, "App. D", "relu_counterexample", worst, expected, bound=bound)


def _cifar(profile: str) -> Iterator[Claim]:
    """What the paper says of its trained networks; open where none was trained for as long as the paper's."""
    for row in tables.rows(read(profile, "table_1")):
        claimed, found = row["paper_smooth"], row["smooth"]
        network = f"{tables.word(row['activation'])}, {row['initialisation']}"
        measured = (
            f"von Neumann ratio {row['von_neumann_conv1']:.2g} (conv1) and {row['von_neumann_conv2']:.2g} (conv2) "
            f"after {_length(row['epochs'], row['runs'])}"
        )
        yield Claim(
            f"CIFAR-10, {network}: {'smooth' if claimed else 'rough'} across layers after training",
            "Table 1",
            measured if row["runs"] else "nothing trained yet",
            f"{'both' if claimed else 'not both'} below {SMOOTH_BELOW} (medians over runs)",
            "",
            _judge(claimed == found) if row["epochs"] >= PAPER_EPOCHS else OPEN,
            "table_1",
        )
    averages = read(profile, "figure_4")
    factors = {int(epochs): closer_by(averages, epochs) for epochs in np.unique(averages["epochs"])}
    whole = [epochs for epochs in factors if factors[epochs]]  # of both initialisations
    epochs = PAPER_EPOCHS if PAPER_EPOCHS in whole else max(whole, default=0)
    measured = " and ".join(f"{factor:.3g} ({name})" for name, factor in factors.get(epochs, {}).items())
    near = all(PAPER_CLOSER / 2 <= factor <= 2 * PAPER_CLOSER for factor in factors.get(epochs, {}).values())
    sides = (select(averages, epochs=epochs, smooth_init=side)["seed"] for side in (True, False))
    runs = min(len(np.unique(seeds)) for seeds in sides)
    yield Claim(
        f"CIFAR-10, GELU: layers are about {PAPER_CLOSER} times closer from weight-tied than from i.i.d. ones",
        "Appendix, Fig. 4",
        f"{measured} times, after {_length(epochs, runs)} of each at least" if whole else "nothing trained yet",
        f"{PAPER_CLOSER // 2} to {2 * PAPER_CLOSER} times",
        "",
        _judge(near) if epochs >= PAPER_EPOCHS else OPEN,
        "figure_4",
    )


def _mean_limit(profile: str) -> Iterator[Claim]:
    end = _at_end(read(profile, "mean_limit"))
    narrow, seeds = min(end["width"]), len(np.unique(end["seed"]))
    kinds = (
        ("iid", mean_limit.MEAN, "i.i.d. layers", "the mean ODE's as 1/sqrt(L)", -0.5),
        ("weight-tied", mean_limit.OWN, "Weight-tied layers, mean-field scaling", "their own ODE's as 1/L", -1.0),
    )
    for initialisation, reference, layers, where_to, expected in kinds:
        for quantity, word in mean_limit.QUANTITIES.items():
            chosen = {"initialisation": initialisation, "reference": reference, "width": narrow}
            fit = mean_limit.slope_in_depth(end, quantity, LEAST_DEPTH, **chosen)
            statement, what = f"{layers}: trained {word} converge to {where_to}", f"{seeds} seeds, slope in L"
            yield _rate(statement, BEYOND, "mean_limit", fit, expected, what, bound=0)
    fit = mean_limit.two_terms(end, "output", initialisation="iid")
    widths = [int(width) for width in np.unique(select(end, initialisation="iid")["width"])]
    yield Claim(
        "i.i.d. layers: the distance of the outputs from the mean ODE's is of order 1/L + 1/sqrt(L m)",
        BEYOND,
        f"{seeds} seeds, m = {', '.join(map(str, widths))}: root of ({fit.a:.2g}/L)^2 + {fit.b:.2g}^2/(L m), "
        f"{100 * fit.residual:.0f} % off",
        f"within {100 * TWO_TERMS_WITHIN:.0f} % (root mean square over sizes), both terms above 0",
        "a [{:.2g}, {:.2g}], b [{:.2g}, {:.2g}]".format(*fit.a_interval, *fit.b_interval),
        _judge(fit.residual < TWO_TERMS_WITHIN and min(*fit.a_interval, *fit.b_interval) > 0),
        "mean_limit",
    )


def _conv_limit(profile: str) -> Iterator[Claim]:
    """That trained convolutional networks converge, where a family of them has been trained; nothing for the others."""
    rates = read(profile, "conv_limit_slopes")
    for activation, normalisation in conv_limit.FAMILIES:
        for measure, words in (("weights_conv1", "weights of conv1"), ("logits", "logits")):
            rows = select(rates, activation=activation, normalisation=normalisation, measure=measure)
            if not len(rows["epoch"]):
                continue
            family = conv_limit.family_name(activation, normalisation)
            last, end = conv_limit.converges_until(rates, activation, normalisation, measure), rows["epoch"][-1]
            slope, low, high = (rows[name][-1] for name in ("slope", "low", "high"))
            yield Claim(
                f"CIFAR-10, {family}: {words} of depths L and 2L come together",
                BEYOND,
                f"{_runs(rows['seeds'][-1])}, slope in L {slope:.2f} after {end} epochs; at most "
                f"-{conv_limit.CONVERGES:g} up to epoch {last}",
                f"slope at most -{conv_limit.CONVERGES:g} after every epoch",
                f"[{low:.2f}, {high:.2f}]",
                _judge(last == end),
                "conv_limit",
            )


def _length(epochs: int, runs: int) -> str:
    return f"{training_length(epochs)}, {_runs(runs)}"


def _runs(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"


PARTS = (_neural_ode, _figure_1, _clipping, _long_time, _figure_2, _initialisation, _counterexample, _cifar,
         _mean_limit, _conv_limit)  # fmt: skip
# The figures whose tables they are judged from.
JUDGED = ("neural_ode", "figure_1_left", "figure_1_right", "clipping", "long_time", "figure_2", "initialisation",
          "relu_counterexample", "table_1", "figure_4", "mean_limit",
          "conv_limit")  # fmt: skip


def claims(profile: str = "paper") -> list[Claim]:
    """Every claim, judged from the tables of ``profile``, in the order of the paper's statements.

    Raises ValueError for a profile without these figures, FileNotFoundError where one is not made yet.
    """
    check_profile(profile)
    found = [claim for part in PARTS for claim in part(profile)]
    order = ["Prop. 2", "Prop. 3", "clipped flow", "Thm 4", "Def. 1", "Thm 6", "section 4.3", "App. D"]
    order += ["Table 1", "Appendix", BEYOND]
    return sorted(found, key=lambda claim: next(i for i, name in enumerate(order) if claim.where.startswith(name)))

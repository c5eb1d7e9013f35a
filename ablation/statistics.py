"""The statistics of ablations, and no more words than they allow.

Scores are a dict seed -> figure per arm. A difference is taken seed by seed (paired), because
the noise that a seed brings to both arms cancels; Welch's test stands beside it for arms that
share no noise. Every interval and verdict is two-sided at 5 %, and none is corrected for the
number of comparisons made; holm corrects the p of a whole family.

Sources: Student, Biometrika 6 (1908); Welch, Biometrika 34 (1947); Satterthwaite, Biometrics
Bulletin 2 (1946); Holm, Scandinavian Journal of Statistics 6 (1979); Bonett and Wright,
Psychometrika 65 (2000). scipy.stats has the distributions.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from train_gpt import Refusal

# Two-sided, of every interval and verdict
LEVEL = 0.05

# The challenge: a record is better by this much per token, at this one-sided p
RECORD_NATS = 0.005
RECORD_LEVEL = 0.01

# Of the largest score: a difference or spread below it is arithmetic, not training
ROUNDING = 1e-14


class Summary(NamedTuple):
    """One arm. sd is that of a sample (n - 1), nan for one run."""

    n: int
    mean: float
    sd: float


class Comparison(NamedTuple):
    """b - a, or a contrast of a factorial, with its two-sided t-test and 95 % interval.

    n: pairs, or (runs of a, runs of b) of a Welch test.
    mean, sd, low, high: in the metric; sd is that of the difference between one run of each.
    term: which contrast of a factorial it is.
    """

    n: int | tuple[int, int]
    mean: float
    sd: float
    t: float
    df: float
    p: float
    low: float
    high: float
    term: str = ""


class Record(NamedTuple):
    """The challenge's rule.

    difference: old - new, and margin: what it must exceed; both in BPB.
    t, df, p: of a one-sided Welch test of the excess.
    """

    margin: float
    difference: float
    t: float
    df: float
    p: float
    holds: bool


class RankCorrelation(NamedTuple):
    """Spearman's rho of n pairs, with its 95 % interval."""

    n: int
    rho: float
    low: float
    high: float


# ── One arm ───────────────────────────────────────────────────────────────────────────────────────
def scores(values: dict[int, float]) -> np.ndarray:
    """(n,) in the order of seeds. Refusal for none at all and for one that is not finite."""
    if not values:
        raise Refusal("no scores: an arm needs at least one finished run")
    for seed in sorted(values):
        if not math.isfinite(values[seed]):
            raise Refusal(f"seed {seed} scored {values[seed]}: leave the run out and say so")
    return np.array([values[seed] for seed in sorted(values)], np.float64)


def largest(*arms: np.ndarray) -> float:
    """The scale of rounding errors: the largest score, without its sign."""
    return max(abs(x).max() for x in arms)


def clean(x: float, scale: float) -> float:
    """0 where x is no more than rounding errors of scores as large as scale."""
    return 0.0 if abs(x) <= ROUNDING * scale else float(x)


def sample_sd(x: np.ndarray, scale: float) -> float:
    """Sample standard deviation (n - 1); nan for one value."""
    return clean(x.std(ddof=1), scale) if len(x) > 1 else math.nan


def summary(values: dict[int, float]) -> Summary:
    """Mean and sample standard deviation of an arm."""
    x = scores(values)
    return Summary(len(x), float(x.mean()), sample_sd(x, largest(x)))


# ── Two arms ──────────────────────────────────────────────────────────────────────────────────────
def student(difference: float, error: float, df: float) -> tuple[float, float]:
    """(t, two-sided p). With a standard error of 0, p is 0 for any difference and 1 for none."""
    if error == 0:
        return (math.copysign(math.inf, difference), 0.0) if difference else (0.0, 1.0)
    t = difference / error
    return t, float(2 * stats.t.sf(abs(t), df))


def half_width(error: float, df: float, alpha: float = LEVEL) -> float:
    """Half of the two-sided interval at alpha around a mean with this standard error."""
    return float(stats.t.ppf(1 - alpha / 2, df) * error)


def one_sample(differences: np.ndarray, scale: float, term: str = "") -> Comparison:
    """Student's t of (n,) same-seed differences of scores as large as scale."""
    n = len(differences)
    df = n - 1
    mean = clean(differences.mean(), scale)
    sd = sample_sd(differences, scale)

    error = sd / math.sqrt(n)
    t, p = student(mean, error, df)
    half = half_width(error, df)
    return Comparison(n, mean, sd, t, df, p, mean - half, mean + half, term)


def paired(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """b - a over the seeds that both have. Refusal below 2 such seeds."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        raise Refusal(
            f"a has the seeds {sorted(a)}, b has {sorted(b)}, common: {seeds}; "
            "a paired test needs 2 in common"
        )
    x = scores({seed: a[seed] for seed in seeds})
    y = scores({seed: b[seed] for seed in seeds})
    return one_sample(y - x, largest(x, y))


def welch_error(sd_a: float, sd_b: float, n_a: int, n_b: int) -> tuple[float, float]:
    """(standard error of a difference of two means, df by Welch and Satterthwaite).

    Refusal below 2 runs in either.
    """
    if min(n_a, n_b) < 2:
        raise Refusal(f"{n_a} and {n_b} runs: Welch's test needs at least 2 in each arm")
    variance_a = sd_a**2 / n_a
    variance_b = sd_b**2 / n_b
    variance = variance_a + variance_b
    share_of_a = variance_a / variance if variance else 0.5
    df = 1 / (share_of_a**2 / (n_a - 1) + (1 - share_of_a) ** 2 / (n_b - 1))
    return math.sqrt(variance), df


def welch(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """b - a of arms that share no noise and may differ in variance. Refusal below 2 runs."""
    x = scores(a)
    y = scores(b)
    scale = largest(x, y)
    sd_a = sample_sd(x, scale)
    sd_b = sample_sd(y, scale)
    mean = clean(y.mean() - x.mean(), scale)

    error, df = welch_error(sd_a, sd_b, len(x), len(y))
    t, p = student(mean, error, df)
    half = half_width(error, df)
    sd = math.hypot(sd_a, sd_b)
    return Comparison((len(x), len(y)), mean, sd, t, df, p, mean - half, mean + half)


def one_arm(values: dict[int, float]) -> Comparison:
    """An arm's mean with its interval, and its test against 0. Refusal below 2 runs."""
    if len(values) < 2:
        raise Refusal(f"{len(values)} runs: an interval needs at least 2")
    x = scores(values)
    return one_sample(x, largest(x))


# ── Several comparisons ───────────────────────────────────────────────────────────────────────────
def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p of each, in the same order.

    Where all that are below 5 % count as differences, one or more of them are false in at most 5 %
    of such families, however the tests depend on each other.
    """
    p = np.array(p_values, np.float64)
    order = p.argsort(kind="stable")
    # the smallest is one of all, the next one of those that remain
    steps = np.arange(len(p), 0, -1) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


# ── Factorials ────────────────────────────────────────────────────────────────────────────────────
# Scores of a factorial: tuple of levels, in the order of the factors -> seed -> score
Cells = dict[tuple, dict[int, float]]


def check_cells(cells: Cells, factors: dict[str, list]) -> list[tuple]:
    """All combinations of levels. Refusal unless the cells are exactly these."""
    wanted = list(itertools.product(*factors.values()))
    missing = [cell for cell in wanted if cell not in cells]
    stray = [cell for cell in cells if cell not in wanted]
    for cell in missing + stray:
        levels = zip(factors, cell, strict=False)  # a stray cell may have more or fewer
        name = ", ".join(f"{factor}={level}" for factor, level in levels)
        problem = "is missing" if cell in wanted else "is no combination of the levels"
        raise Refusal(
            f"the cell {name} {problem}: a full factorial has exactly the {len(wanted)} "
            f"combinations of {dict(factors)}"
        )
    return wanted


def cell_array(cells: Cells, factors: dict[str, list]) -> np.ndarray:
    """(levels of the first factor, levels of the second, ..., common seeds).

    Refusal for missing or stray cells, and below 2 seeds that all cells have.
    """
    wanted = check_cells(cells, factors)
    seeds = sorted(set.intersection(*(set(cells[cell]) for cell in wanted)))
    if len(seeds) < 2:
        have = ", ".join(f"{cell}: {sorted(cells[cell])}" for cell in wanted)
        raise Refusal(
            f"the seeds common to all cells are {seeds}: a factorial needs at least 2; "
            f"the cells have {have}"
        )
    y = np.stack([scores({seed: cells[cell][seed] for seed in seeds}) for cell in wanted])
    levels = [len(of_factor) for of_factor in factors.values()]
    return y.reshape(*levels, len(seeds))


def factorial(cells: Cells, factors: dict[str, list]) -> list[Comparison]:
    """Main effects and two-factor interactions of a full factorial, one row per contrast.

    A main effect is level - first level, an interaction (y11 - y01) - (y10 - y00), each of the
    means over all levels of the other factors, seed by seed. Refusal as in cell_array.
    """
    y = cell_array(cells, factors)
    scale = abs(y).max()
    rows = []
    for names in [*itertools.combinations(factors, 1), *itertools.combinations(factors, 2)]:
        others = tuple(axis for axis, name in enumerate(factors) if name not in names)
        # (levels of each factor in names, seeds)
        contrast = y.mean(axis=others)
        for axis in range(len(names)):
            contrast = contrast - contrast.take([0], axis)

        for levels in itertools.product(*(range(1, len(factors[name])) for name in names)):
            effects = [
                f"{name} {factors[name][level]} - {factors[name][0]}"
                for name, level in zip(names, levels, strict=True)
            ]
            rows.append(one_sample(contrast[levels], scale, " x ".join(effects)))
    return rows


# ── The challenge's rule, and what can be shown ───────────────────────────────────────────────────
def record_rule(new: dict[int, float], old: dict[int, float], tokens_per_byte: float) -> Record:
    """Is old - new above 0.005 nats per token at a one-sided p below 0.01?

    new, old: BPB by seed. tokens_per_byte: val_tokens / val_bytes of both.
    Refusal below 2 runs in either. Source: README of openai/parameter-golf.
    """
    margin = RECORD_NATS / math.log(2) * tokens_per_byte
    gain = welch(new, old)
    error, _ = welch_error(summary(new).sd, summary(old).sd, *gain.n)
    t, two_sided = student(gain.mean - margin, error, gain.df)
    p = two_sided / 2 if t > 0 else 1 - two_sided / 2
    return Record(margin, gain.mean, t, gain.df, p, p < RECORD_LEVEL)


def detectable(sd: float, n: int, alpha: float = LEVEL) -> float:
    """The smallest observed mean difference that n pairs can tell from 0 at two-sided alpha.

    sd: of the differences. No statement of power: a true effect of this size is missed about
    half of the time. Refusal below 2 pairs.
    """
    if n < 2:
        raise Refusal(f"{n} pairs: at least 2 are needed to tell a difference from noise")
    return half_width(sd / math.sqrt(n), n - 1, alpha)


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────
def decimal_places(comparison: Comparison, least: int = 4, factor: float = 1.0) -> int:
    """`least` to 9, so that a bound that is not 0 never reads as 0.

    The mean lies between the bounds, so that it needs no more. factor: figures are written times
    this.
    """
    bounds = (comparison.low * factor, comparison.high * factor)
    smallest = min([abs(x) for x in bounds if x], default=1.0)
    return min(max(least, math.ceil(-math.log10(smallest))), 9)


def look_of(comparison: Comparison) -> str:
    """lower, higher, or open: the interval has 0 in it."""
    if comparison.low <= 0 <= comparison.high:
        return "open"
    return "lower" if comparison.mean < 0 else "higher"


def verdict(
    comparison: Comparison, names: tuple[str, str] = ("a", "b"), metric: str = "BPB"
) -> str:
    """The comparison in words, and no more than its interval allows.

    It says lower, higher, or not distinguishable. For a row of a factorial:
    names=("0", row.term).
    """
    a, b = names
    mean, low, high = comparison.mean, comparison.low, comparison.high
    places = decimal_places(comparison)
    n = " and ".join(map(str, np.atleast_1d(comparison.n)))
    p = f"p = {comparison.p:.3g}" if comparison.p >= 1e-4 else "p < 0.0001"

    look = look_of(comparison)
    if look == "open":
        resolution = "the scores are the same"
        if comparison.sd:
            resolution = f"{n} seeds could show {(high - low) / 2:.{places}f}"
        return (
            f"{b} is not distinguishable from {a} (difference {mean:.{places}f} {metric}, "
            f"95 % CI {low:.{places}f} to {high:.{places}f} includes 0, {p}, n = {n}; {resolution})"
        )

    near, far = sorted((abs(low), abs(high)))
    alike = ", no spread between seeds" if comparison.sd == 0 else ""
    return (
        f"{b} is {look} than {a} by {abs(mean):.{places}f} {metric} "
        f"(95 % CI {near:.{places}f} to {far:.{places}f}, {p}, n = {n}{alike})"
    )


# ── Ranks ─────────────────────────────────────────────────────────────────────────────────────────
def rank_correlation(a: list[float], b: list[float]) -> RankCorrelation:
    """Spearman's rho of pairs; the interval by Fisher's z with Bonett and Wright's variance,
    (1 + rho^2 / 2) / (n - 3). Refusal below 4 pairs, and where one side is all the same.
    """
    n = len(a)
    if n < 4 or len(set(a)) < 2 or len(set(b)) < 2:
        raise Refusal(f"{n} pairs: ranks need 4 or more, and different values on both sides")
    rho = float(stats.spearmanr(a, b).statistic)
    if abs(rho) > 1 - ROUNDING:
        return RankCorrelation(n, math.copysign(1.0, rho), *[math.copysign(1.0, rho)] * 2)
    half = stats.norm.ppf(1 - LEVEL / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    z = math.atanh(rho)
    return RankCorrelation(n, rho, math.tanh(z - half), math.tanh(z + half))

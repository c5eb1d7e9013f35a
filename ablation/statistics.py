"""The statistics of ablations: same-seed differences, Welch tests, factorials, the record rule, and what may be said."""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from train_gpt import Refusal

LEVEL = 0.05  # two-sided, of every interval and verdict

RECORD_NATS, RECORD_LEVEL = (
    0.005,
    0.01,
)  # the challenge: a record is better by this much per token, at this one-sided p

ROUNDING = (
    1e-14  # of the largest score: a difference or spread below it is arithmetic, not training
)


class Summary(NamedTuple):
    """One arm; sd is that of a sample (n - 1), nan for one run."""

    n: int
    mean: float
    sd: float


class Comparison(NamedTuple):
    """b - a, or a contrast of a factorial, with its two-sided t-test and 95 % interval; all but t, df and p in the metric.
    n: pairs, or (runs of a, runs of b) of a Welch test. sd: of the difference between one run of each. No p value here is
    corrected for the number of comparisons made."""

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
    """The challenge's rule; difference: old - new, and margin: what it must exceed, in BPB; t, df, p: one-sided Welch."""

    margin: float
    difference: float
    t: float
    df: float
    p: float
    holds: bool


def scores(values: dict[int, float]) -> np.ndarray:
    """(n,) in the order of seeds; Refusal for none at all and for one that is not finite."""
    broken = [seed for seed in sorted(values) if not math.isfinite(values[seed])]
    if broken or not values:
        raise Refusal(
            f"seed {broken[0]} scored {values[broken[0]]}: leave the run out and say so"
            if broken
            else "no scores: an arm needs at least one finished run"
        )
    return np.array([values[seed] for seed in sorted(values)], np.float64)


def clean(x: float, scale: float) -> float:
    """0 where x is no more than rounding errors of scores as large as scale."""
    return 0.0 if abs(x) <= ROUNDING * scale else float(x)


def sample_sd(x: np.ndarray, scale: float) -> float:
    """Sample standard deviation; nan for one value."""
    return clean(x.std(ddof=1), scale) if len(x) > 1 else math.nan


def summary(values: dict[int, float]) -> Summary:
    x = scores(values)
    return Summary(len(x), float(x.mean()), sample_sd(x, abs(x).max()))


def student(difference: float, error: float, df: float) -> tuple[float, float]:
    """t and two-sided p; with a standard error of 0, p is 0 for any difference and 1 for none."""
    if error == 0:
        return (math.copysign(math.inf, difference), 0.0) if difference else (0.0, 1.0)
    return difference / error, float(2 * stats.t.sf(abs(difference / error), df))


def half_width(error: float, df: float, alpha: float = LEVEL) -> float:
    return float(stats.t.ppf(1 - alpha / 2, df) * error)


def one_sample(differences: np.ndarray, scale: float, term: str = "") -> Comparison:
    """Student's t of (n,) same-seed differences of scores as large as scale."""
    n, mean, sd = len(differences), clean(differences.mean(), scale), sample_sd(differences, scale)
    error, df = sd / math.sqrt(n), n - 1
    (t, p), half = student(mean, error, df), half_width(error, df)
    return Comparison(n, mean, sd, t, df, p, mean - half, mean + half, term)


def paired(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """b - a over the seeds that both have: noise that a seed brings to both arms cancels. Refusal below 2 such seeds."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        raise Refusal(
            f"a has the seeds {sorted(a)}, b has {sorted(b)}, common: {seeds}; a paired test needs 2 in common"
        )
    x, y = (scores({seed: arm[seed] for seed in seeds}) for arm in (a, b))
    return one_sample(y - x, max(abs(x).max(), abs(y).max()))


def welch_error(sd_a: float, sd_b: float, n_a: int, n_b: int) -> tuple[float, float]:
    """Standard error of the difference of two means, and Welch-Satterthwaite df; Refusal below 2 runs in either."""
    if min(n_a, n_b) < 2:
        raise Refusal(f"{n_a} and {n_b} runs: Welch's test needs at least 2 in each arm")
    u, v = sd_a**2 / n_a, sd_b**2 / n_b
    share = u / (u + v) if u + v else 0.5  # of a in the variance
    return math.sqrt(u + v), 1 / (share**2 / (n_a - 1) + (1 - share) ** 2 / (n_b - 1))


def welch(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """b - a of arms that share no noise, of unequal variance."""
    x, y = scores(a), scores(b)
    scale = max(abs(x).max(), abs(y).max())
    sd_a, sd_b, mean = sample_sd(x, scale), sample_sd(y, scale), clean(y.mean() - x.mean(), scale)
    error, df = welch_error(sd_a, sd_b, len(x), len(y))
    (t, p), half = student(mean, error, df), half_width(error, df)
    return Comparison(
        (len(x), len(y)), mean, math.hypot(sd_a, sd_b), t, df, p, mean - half, mean + half
    )


def cell_array(cells: dict[tuple, dict[int, float]], factors: dict[str, list]) -> np.ndarray:
    """(levels of the first factor, levels of the second, ..., common seeds); Refusal for missing or stray cells."""
    wanted = list(itertools.product(*factors.values()))
    wrong = [cell for cell in wanted if cell not in cells] + [
        cell for cell in cells if cell not in wanted
    ]
    if wrong:
        name = ", ".join(f"{factor}={level}" for factor, level in zip(factors, wrong[0]))
        raise Refusal(
            f"the cell {name} {'is no combination of the levels' if wrong[0] in cells else 'is missing'}: a full "
            f"factorial has exactly the {len(wanted)} combinations of {dict(factors)}"
        )
    seeds = sorted(set.intersection(*(set(cells[cell]) for cell in wanted)))
    if len(seeds) < 2:
        raise Refusal(
            f"the seeds common to all cells are {seeds}: a factorial needs at least 2; the cells have "
            + ", ".join(f"{cell}: {sorted(cells[cell])}" for cell in wanted)
        )
    y = np.stack([scores({seed: cells[cell][seed] for seed in seeds}) for cell in wanted])
    return y.reshape(*(len(levels) for levels in factors.values()), len(seeds))


def factorial(cells: dict[tuple, dict[int, float]], factors: dict[str, list]) -> list[Comparison]:
    """Main effects, level - first level, and two-factor interactions, (y11 - y01) - (y10 - y00), as same-seed contrasts of
    the means over all levels of the other factors. cells: tuple of levels, in the order of factors -> seed -> score."""
    y, rows = cell_array(cells, factors), []
    for names in [*itertools.combinations(factors, 1), *itertools.combinations(factors, 2)]:
        contrast = y.mean(axis=tuple(k for k, name in enumerate(factors) if name not in names))
        for axis in range(len(names)):
            contrast = contrast - contrast.take([0], axis)
        for levels in itertools.product(*(range(1, len(factors[name])) for name in names)):
            term = " x ".join(
                f"{name} {factors[name][k]} - {factors[name][0]}" for name, k in zip(names, levels)
            )
            rows.append(one_sample(contrast[levels], abs(y).max(), term))
    return rows


def record_rule(new: dict[int, float], old: dict[int, float], tokens_per_byte: float) -> Record:
    """Is old - new above 0.005 nats per token at p < 0.01? tokens_per_byte: val_tokens / val_bytes of both. Refusal below 2
    runs in either."""
    margin, gain = RECORD_NATS / math.log(2) * tokens_per_byte, welch(new, old)
    excess, error = gain.mean - margin, welch_error(summary(new).sd, summary(old).sd, *gain.n)[0]
    t, p = student(excess, error, gain.df)
    p = p / 2 if t > 0 else 1 - p / 2
    return Record(margin, gain.mean, t, gain.df, p, p < RECORD_LEVEL)


def detectable(sd: float, n: int, alpha: float = LEVEL) -> float:
    """The smallest observed mean difference that n pairs can tell from 0 at two-sided alpha; sd: of the differences. No
    statement of power: a true effect of this size is missed about half of the time. Refusal below 2 pairs."""
    if n < 2:
        raise Refusal(f"{n} pairs: at least 2 are needed to tell a difference from noise")
    return half_width(sd / math.sqrt(n), n - 1, alpha)


def verdict(
    comparison: Comparison, names: tuple[str, str] = ("a", "b"), metric: str = "BPB"
) -> str:
    """The comparison in words, and no more than its interval allows: lower, higher, or not distinguishable. For a row of a
    factorial, names=("0", row.term)."""
    (a, b), mean, low, high = names, comparison.mean, comparison.low, comparison.high
    smallest = min([abs(x) for x in (mean, low, high) if x], default=1.0)
    places = min(
        max(4, math.ceil(-math.log10(smallest))), 9
    )  # a bound that is not 0 never reads 0.0000
    n = " and ".join(map(str, np.atleast_1d(comparison.n)))
    p = f"p = {comparison.p:.3g}" if comparison.p >= 1e-4 else "p < 0.0001"
    resolution = (
        f"{n} seeds could show {(high - low) / 2:.{places}f}"
        if comparison.sd
        else "the scores are the same"
    )
    if low <= 0 <= high:
        return (
            f"{b} is not distinguishable from {a} (difference {mean:.{places}f} {metric}, 95 % CI {low:.{places}f} to "
            f"{high:.{places}f} includes 0, {p}, n = {n}; {resolution})"
        )
    near, far = sorted((abs(low), abs(high)))
    alike = ", no spread between seeds" if comparison.sd == 0 else ""
    return (
        f"{b} is {'lower' if mean < 0 else 'higher'} than {a} by {abs(mean):.{places}f} {metric} (95 % CI {near:.{places}f} "
        f"to {far:.{places}f}, {p}, n = {n}{alike})"
    )

"""What somebody computes from the seeds: means, spreads, differences, tests. All is recomputed.

The other side of a difference or a test is another folder's: it is taken from the numbers that
README.md and submission.json state. Where none of them fits, the claim is not checked.
"""

import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import stats

from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, WEIGHTS, Finding
from ablation.folder import SCORE_KEYS, Folder, json_numbers, rounds_to
from ablation.logs import Log
from ablation.prose import ANY, BPB, NATS, Stated, half_a_digit, numbers_of
from ablation.statistics import RECORD_NATS, one_sample, welch

MAX_CLAIMS = 20  # of one README
MAX_SIDES = 400  # numbers that may be the other side of one claim
SLACK = 0.005  # of a t whose standard deviation was rounded before
NEAR = 12  # lines between a test and what it compares

# ── Means and spreads ─────────────────────────────────────────────────────────────────────────────

STATISTICS: dict[str, Callable] = {
    "mean": statistics.fmean,
    "std": statistics.stdev,
    "max": max,
    "min": min,
}

# the keys of one seed for a figure, and what its log shows: any of these for one of two senses
SAME: list[tuple[set[str], list[Callable[[Log], float | None]]]] = [
    ({"val_bpb", "bpb"}, [lambda log: log.final and log.final.bpb]),
    ({"val_loss", "val_loss_nats", "loss"}, [lambda log: log.final and log.final.loss]),
    ({"bytes_total", "total_bytes"}, [lambda log: log.total_bytes]),
    # with the code by the rules of the contest, and alone in some folders
    ({"artifact_bytes"}, [lambda log: log.total_bytes, lambda log: log.model_bytes]),
    ({"steps", "train_steps"}, [lambda log: log.steps]),
    ({"train_time_s", "train_time_seconds"}, [lambda log: log.train_seconds]),
    ({"eval_time_s", "eval_time_seconds"}, [lambda log: log.eval_seconds]),
    ({"step_avg_ms", "ms_per_step"}, [lambda log: log.step_ms]),
]


class Values(NamedTuple):
    """A figure of every seed."""

    values: list[float]
    from_json: bool  # else from the logs, of which a seed may have several


def per_seed(f: Folder, figure: str) -> list[Values]:
    """A figure of each seed, by submission.json, else by the logs in each sense that it has.

    Empty where there are not two seeds with it.
    """
    names = {figure, f"{figure}_bpb"}
    readings: list[Callable[[Log], float | None]] = []
    for same, of_log in SAME:
        if figure in same:
            names, readings = same, of_log
    for name in (figure, *sorted(names - {figure})):
        values = [row.get(name) for row in f.seed_rows.values()]
        if len(values) > 1 and all(type(value) in (int, float) for value in values):
            return [Values(values, from_json=True)]
    found = []
    for read in readings:
        by_seed = {log.seed: read(log) for log in f.logs if log.seed is not None}
        values = [value for value in by_seed.values() if value is not None]
        if len(values) > 1:
            found.append(Values(values, from_json=False))
    return found


def statistic_of(key: str) -> tuple[str, str] | None:
    """(statistic, figure) that a key like val_bpb_std or mean_val_loss names."""
    words = key.split("_")
    for name in STATISTICS:
        if name in words:
            words.remove(name)
            return name, "_".join(words)
    return None


def wrong_means(f: Folder) -> Iterator[Finding]:
    """Means, sample standard deviations and extremes of submission.json that the seeds do not give.

    The mean score has a check of its own.
    """
    for key, stated in f.submission.items():
        found = statistic_of(key)
        if not found or key in SCORE_KEYS or type(stated) not in (int, float):
            continue
        name, figure = found
        where = f"{f.where}.{key}"
        found = [compared(f, key, name, seeds) for seeds in per_seed(f, figure)]
        if not found:
            yield Finding(UNCHECKED, where, f"{stated}: no such figure of two seeds")
            continue
        # in the sense that fits
        yield max(found, key=lambda one: WEIGHTS.index(one.weight))


def compared(f: Folder, key: str, name: str, seeds: Values) -> Finding:
    """A statistic that submission.json states beside that of the seeds."""
    where = f"{f.where}.{key}"
    stated = f.submission[key]
    values = seeds.values
    made = STATISTICS[name](values)
    shown = f"{made:.8f}".rstrip("0").rstrip(".")
    source = f"{f.where} has" if seeds.from_json else "the logs have"
    words = f"{stated}, but the {len(values)} seeds that {source} give {shown}"
    if rounds_to(made, stated, digits=2.02):
        return Finding(FINE, where, f"{stated}, of {len(values)} seeds")
    if name == "std":
        words = f"{stated}, but the {len(values)} seeds have {made:.8f} (n - 1)"
        if rounds_to(statistics.pstdev(values), stated, digits=2.02):
            return Finding(WARNING, where, f"{words}: it is divided by n", "give the sample's")
    weight = ERROR if seeds.from_json else WARNING
    return Finding(weight, where, words, "correct it")


def is_recomputed(key: str) -> bool:
    """Whether a check here holds a key of submission.json to the seeds."""
    return bool(statistic_of(key)) or "delta" in key or key in ("t_statistic", "welch_df")


# ── Differences ───────────────────────────────────────────────────────────────────────────────────


def sides(f: Folder) -> list[Stated]:
    """Every number that README.md and submission.json state and that may be a score."""
    found = list(json_numbers(f.submission))
    if f.readme is not None:
        found += numbers_of("README.md", f.readme)[0]
    return [n for n in found if n.kind in (BPB, NATS, ANY) and 0 < n.half <= 5e-4]


def wrong_differences(f: Folder) -> Iterator[Finding]:
    """Differences of submission.json from another folder's score, which it or README.md states."""
    stated_ones = sides(f)[:MAX_SIDES]
    for key, stated in f.submission.items():
        if "delta" not in key or type(stated) not in (int, float):
            continue
        nats = key.endswith("nats")
        ours = f.submission.get("val_loss" if nats else "val_bpb")
        where = f"{f.where}.{key}"
        other = type(ours) in (int, float) and ours - stated
        if not other or not any(
            abs(n.value - other) <= n.half + 2 * half_a_digit(repr(stated)) for n in stated_ones
        ):
            problem = f"{stated}: no number here is the other side of it"
            yield Finding(UNCHECKED, where, problem, "state both sides")
        else:
            yield Finding(FINE, where, f"{stated}, from {other:.6f} to {ours}")
        if nats and f.is_record and stated > -RECORD_NATS:
            problem = f"{stated}; a record is {RECORD_NATS} nats better, as a rule"
            yield Finding(WARNING, where, problem, "say why it is one")


# ── Tests ─────────────────────────────────────────────────────────────────────────────────────────

FIGURE = r"[*`\s]{0,4}([-−]?\d{0,5}\.?\d{1,8}(?:e-?\d{1,2})?)"
T_CLAIM = re.compile(rf"(?<![\w-])t(?:[ _-]?stat(?:istic)?)?[*`]{{0,3}}\s?[:=≈]{FIGURE}(?![\w%])")
P_CLAIM = re.compile(rf"(?<![\w-])p(?:[ _-]?value)?[*`]{{0,3}}\s?([<=≈]{{1,3}}){FIGURE}(?![\w%])")
DF_CLAIM = re.compile(rf"\bdf[*`]{{0,3}}\s?[=≈]{FIGURE}")
SCORES_IN_BRACKETS = re.compile(r"\(([^()]{8,400})\)")
SCORE = re.compile(r"(?<![\d.\w])\d\.\d{3,10}(?![\d.\w])")


class Claim(NamedTuple):
    """A test that somebody made."""

    where: str
    line: int | None  # of README.md
    t: float
    half: float
    df: float | None
    p: tuple[str, str] | None  # (=, < or ≈; the number)


class Made(NamedTuple):
    """A test that is made here of what is stated."""

    t: float
    df: float
    reach: float  # of t, by the digits of the other side
    words: str


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_claims(f: Folder) -> Iterator[Claim]:
    """The t tests of README.md, and that of submission.json."""
    for row, line in enumerate((f.readme or "").split("\n"), start=1):
        found = T_CLAIM.search(line) if len(line) < 4000 else None
        if found:
            df = DF_CLAIM.search(line)
            p = P_CLAIM.search(line)
            yield Claim(
                f"README.md, line {row}",
                row,
                number(found[1]),
                half_a_digit(found[1]),
                number(df[1]) if df else None,
                (p[1], p[2]) if p else None,
            )
    t = f.submission.get("t_statistic")
    if type(t) in (int, float):
        df = f.submission.get("welch_df")
        p = P_CLAIM.search(f"p{spelled(f.submission.get('p_value'))}")
        df = df if type(df) in (int, float) else None
        where = f"{f.where}.t_statistic"
        yield Claim(where, None, t, half_a_digit(repr(t)), df, (p[1], p[2]) if p else None)


def spelled(p) -> str:
    """ "=0.01" of 0.01, "<0.01" of itself: people write both."""
    return p if isinstance(p, str) else f"={p}"


def tests_of(f: Folder, known: list[Stated], line: int | None) -> Iterator[Made]:
    """Every t test of the seeds against what is stated near a line, or anywhere."""
    near = [n for n in known if line is None or not n.line or abs(n.line - line) <= NEAR]
    scores = [(seeds, "BPB") for seeds in per_seed(f, "val_bpb")]
    scores += [(seeds, "nats") for seeds in per_seed(f, "val_loss")]
    for seeds, unit in scores:
        if len(set(seeds.values)) < 2:
            continue
        ours = np.array(seeds.values, float)
        error = ours.std(ddof=1) / len(ours) ** 0.5
        who = f"of {len(ours)} seeds in {unit}"
        for n in near[:MAX_SIDES]:
            for other in (n.value, ours.mean() - n.value):
                t = one_sample(ours - other, scale=float(ours.max())).t
                words = f"a one-sample test {who} against {other:.6g}"
                yield Made(t, len(ours) - 1, n.half / error, words)
        for theirs in listed_scores(f.readme or ""):
            if sorted(theirs) != sorted(np.round(ours, 8)):
                test = welch(dict(enumerate(theirs)), dict(enumerate(seeds.values)))
                words = f"Welch's test {who} against {', '.join(map(str, theirs))}"
                yield Made(test.t, test.df, 0.0, words)


def listed_scores(text: str) -> Iterator[list[float]]:
    """Scores that stand together in brackets."""
    for match in itertools.islice(SCORES_IN_BRACKETS.finditer(text), MAX_CLAIMS):
        found = [float(score) for score in SCORE.findall(match[1])]
        if len(set(found)) > 1:
            yield found


def wrong_tests(f: Folder) -> Iterator[Finding]:
    """t and p that the two sides do not give."""
    known = sides(f)
    for claim in itertools.islice(test_claims(f), MAX_CLAIMS):
        fitting = fitting_test(claim, tests_of(f, known, claim.line))
        if fitting:
            said = f"t {claim.t:g}; {fitting.words} gives {fitting.t:.5g}"
            yield Finding(FINE, claim.where, said)
        else:
            problem = f"t {claim.t:g}: no number here is the other side of such a test"
            yield Finding(UNCHECKED, claim.where, problem, "state the scores of both sides")
        df = fitting.df if fitting else claim.df
        if df and claim.p:
            yield of_p(claim, df)


def fitting_test(claim: Claim, made: Iterator[Made]) -> Made | None:
    """The test whose t is nearest to a claim, where its digits and roundings allow that one."""
    size = abs(claim.t)
    near = [
        one
        for one in made
        if one.reach <= SLACK * size
        and abs(abs(one.t) - size) <= claim.half * 1.02 + one.reach + SLACK * size
    ]
    return min(near, key=lambda one: abs(abs(one.t) - size), default=None)


def of_p(claim: Claim, df: float) -> Finding:
    """A p value beside that of its t."""
    sign, text = claim.p
    one = float(stats.t.sf(abs(claim.t), df))
    stated = number(text)
    agrees = one < stated if "<" in sign else any(rounds_to(p, stated) for p in (one, 2 * one))
    said = f"p {sign} {text}, and t {claim.t:g} with {df:g} degrees of freedom has"
    said = f"{said} {one:.2g} (one-sided; two-sided {2 * one:.2g})"
    return Finding(FINE if agrees else WARNING, claim.where, said, "" if agrees else "correct it")

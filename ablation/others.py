"""Leaderboard folders that other tools made: what their files show, and what does not agree.

Nothing of a folder is run here. What cannot be read is said to be not checked, and never taken for
good.
"""

from collections.abc import Callable, Iterator

from ablation.claims import is_recomputed, wrong_differences, wrong_means, wrong_tests
from ablation.findings import ERROR, UNCHECKED, WARNING, Finding
from ablation.folder import (
    SCORE_KEYS,
    Folder,
    groups,
    json_numbers,
    number_at,
    one_per_seed,
)
from ablation.limits import wrong_bytes, wrong_compliance, wrong_times, wrong_totals
from ablation.logs import MAX_LINES, Log
from ablation.prose import (
    ANY,
    BPB,
    BYTES,
    HEADROOM,
    NATS,
    SECONDS,
    Figures,
    listed,
    numbers_of,
    told_numbers,
)
from ablation.scores import record_rule, wrong_scores
from ablation.submission import CAP_BYTES

WANTED_KEYS = ("author", "github_id", "name", "date", "val_bpb", "bytes_total")


def wrong_words(f: Folder) -> Iterator[Finding]:
    """Keys that every accepted submission.json has."""
    missing = [key for key in WANTED_KEYS if key not in f.submission]
    if f.submission and missing:
        yield Finding(WARNING, f.where, f"no {', '.join(missing)}", "add what reviewers look for")
    if not f.logs:
        problem = "no training log whose lines are known"
        yield Finding(ERROR, "logs", problem, "add one train_seedN.log per seed")


def wrong_seeds(f: Folder) -> Iterator[Finding]:
    """Seeds without a log, a log of another seed than its name says, fewer than three."""
    for log in f.logs:
        if None not in (log.named_seed, log.said_seed) and log.named_seed != log.said_seed:
            problem = f"its name says seed {log.named_seed}, its lines say {log.said_seed}"
            yield Finding(ERROR, log.name, problem, "put back the log of that seed")
    shown_seeds = {str(log.seed) for log in f.logs if log.seed is not None}
    unknown = [log.name for log in f.logs if log.seed is None]
    lost = [seed for seed in f.seeds if seed not in shown_seeds]
    if lost and f.logs:
        weight = UNCHECKED if len(unknown) >= len(lost) else ERROR
        problem = f"{f.where} names seed {', '.join(lost)}, and no log says that it is of it"
        yield Finding(weight, "seeds", problem, "add the logs of all seeds")
    seeds = set(f.seeds) or shown_seeds
    if f.is_record and 0 < len(seeds) < 3:
        problem = f"{len(seeds)}; a record is shown by three runs or more, as a rule"
        yield Finding(WARNING, "seeds", problem, "run more seeds")
    for log in f.logs:
        if log.train_shards is not None and log.train_shards > 1000:
            problem = f"train_shards {log.train_shards:,}: data that was prepared at home"
            yield Finding(WARNING, log.name, problem, "show that no validation document is in it")


# ── The README ────────────────────────────────────────────────────────────────────────────────────


def figures_of(f: Folder) -> Figures:
    """All that the logs show."""
    figures = Figures()
    figures.add(BYTES, CAP_BYTES)
    for log in f.logs:
        figures.add_text(log.text)
        for one in log.evaluations + log.finals:
            figures.add(BPB, one.bpb)
            figures.add(NATS, one.loss)
        figures.add_differences(BPB, (one.bpb for one in log.finals))
        figures.add_differences(NATS, (one.loss for one in log.finals))
        for size in (log.total_bytes, log.model_bytes, *log.code_bytes.values()):
            figures.add(HEADROOM, size and CAP_BYTES - size)
        if log.steps and log.train_seconds:
            figures.add(SECONDS, log.train_seconds / log.steps)
        figures.add(SECONDS, log.eval_seconds)
        figures.add(SECONDS, log.train_seconds)
    for kind, key in ((BPB, "bpb"), (NATS, "loss")):
        for _, values in groups(f.logs, key):
            figures.add_group(kind, values)
    for kind, read in LOG_FIGURES:
        for values in one_per_seed(f.logs, read):
            figures.add_group(kind, values)
    for size in f.scripts.values():
        figures.add(BYTES, size)
    return figures


LOG_FIGURES: list[tuple[str, Callable[[Log], float | None]]] = [
    (BPB, lambda log: log.evaluations[-1].bpb if log.evaluations else None),
    (NATS, lambda log: log.evaluations[-1].loss if log.evaluations else None),
    (BYTES, lambda log: log.total_bytes),
    (BYTES, lambda log: log.model_bytes),
    (ANY, lambda log: log.steps),
    (SECONDS, lambda log: log.eval_seconds),
    (SECONDS, lambda log: log.train_seconds),
    (SECONDS, lambda log: log.train_seconds and log.steps and log.train_seconds / log.steps),
]


def wrong_prose(f: Folder, figures: Figures) -> Iterator[Finding]:
    """The score of submission.json has to stand in the README; numbers that no log shows."""
    if f.readme is None:
        return
    found, long = numbers_of("README.md", f.readme)
    yield from long
    stated = number_at(f.submission, SCORE_KEYS)
    if stated:
        score = stated[1]
        if not any(abs(n.value - score) <= n.half * 1.02 and n.half <= 5e-3 for n in found):
            problem = f"does not show the score of {f.where}, {score}"
            yield Finding(WARNING, "README.md", problem, "let both say the same")
    lost = [n for n in found if not figures.shows(n, cut=True)]
    claims = [n for n in lost if n.is_claim]
    others = [n for n in lost if not n.is_claim]
    if claims:
        problem = f"no log here shows {listed(claims)}"
        remedy = "correct them, or say whose they are"
        yield Finding(WARNING, "README.md", problem, remedy)
    if found:
        yield told_numbers("README.md", len(found) - len(lost), len(found), others)


def unread_json(f: Folder, figures: Figures) -> Iterator[Finding]:
    """Numbers of submission.json that no log shows."""
    rest = {key: value for key, value in f.submission.items() if not is_recomputed(key)}
    lost = [n for n in json_numbers(rest) if not figures.shows(n, cut=True)]
    if lost:
        yield Finding(UNCHECKED, f.where, f"no log shows {listed(lost)}")


CHECKS = (
    wrong_words,
    wrong_seeds,
    wrong_scores,
    wrong_means,
    wrong_differences,
    wrong_tests,
    record_rule,
    wrong_totals,
    wrong_bytes,
    wrong_times,
    wrong_compliance,
)


def check_others(f: Folder) -> Iterator[Finding]:
    """Every finding of a folder that another tool made."""
    for check in CHECKS:
        yield from check(f)
    figures = figures_of(f)
    yield from wrong_prose(f, figures)
    yield from unread_json(f, figures)
    for log in f.logs:
        if log.too_long:
            problem = f"more than {MAX_LINES:,} lines with figures: the rest of it"
            yield Finding(UNCHECKED, log.name, problem, "shorten it")

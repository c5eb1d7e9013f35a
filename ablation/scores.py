"""Scores of somebody else's folder: of submission.json, beside those of the logs."""

import math
import statistics
from collections.abc import Iterator

from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, Finding
from ablation.folder import SCORE_KEYS, Folder, groups, number_at, rounds_to
from ablation.statistics import RECORD_LEVEL, RECORD_NATS, half_width


def wrong_scores(f: Folder) -> Iterator[Finding]:
    """A score of submission.json that no log gives."""
    if not f.submission:
        return
    has_finals = any(log.finals for log in f.logs)
    stated = number_at(f.submission, SCORE_KEYS)
    if not stated:
        yield Finding(ERROR, f"{f.where}.val_bpb", "missing", "add the score")
    for key, value, name in [
        (stated and stated[0], stated and stated[1], "bpb"),
        ("val_loss", f.submission.get("val_loss"), "loss"),
    ]:
        if type(value) not in (int, float):
            continue
        source = shown_by(f, value, name)
        where = f"{f.where}.{key}"
        if source:
            yield Finding(FINE, where, f"{value}, as {source}")
            if name == "bpb":
                yield from of_one_seed(f, where, value, source)
        elif not has_finals:
            yield in_training_alone(f, where, value, name)
        elif name == "loss" and shown_by(f, value, "bpb"):
            yield Finding(ERROR, where, f"{value} is a score in BPB", "give nats per token")
        else:
            problem = f"{value}, but the logs end with {logs_say(f, name)}"
            yield Finding(ERROR, where, problem, "correct it, or add the log that shows it")
    yield from wrong_rows(f)
    yield from wrong_ratio(f)


def shown_by_log(f: Folder, stated: float, key: str) -> str:
    """Which evaluation of which log is a score; empty when none is."""
    for log in f.logs:
        if one := log.has(key, stated):
            return f"'{one.label}' of {log.name}"
    return ""


def shown_by(f: Folder, stated: float, key: str) -> str:
    """Which mean of evaluations, or single one, shows a score; empty when none does."""
    for label, values in groups(f.logs, key):
        if rounds_to(statistics.fmean(values), stated, digits=2.02):
            return f"the mean of '{label}' over {len(values)} seeds"
    if source := shown_by_log(f, stated, key):
        return source
    rows = [row.get("val_" + key) for row in f.seed_rows.values()]
    if len(rows) < 2 or any(type(value) not in (int, float) for value in rows):
        return ""
    of_logs = all(shown_by_log(f, value, key) for value in rows)
    if of_logs and rounds_to(statistics.fmean(rows), stated, digits=2.02):
        return "the mean of its seeds"
    return ""


def logs_say(f: Folder, key: str) -> str:
    """The last score of each log, in words."""
    words = [f"{log.name} {getattr(log.final, key)}" for log in f.logs if log.final]
    return ", ".join(words[:6]) or "nothing"


def in_training_alone(f: Folder, where: str, value: float, key: str) -> Finding:
    """A score where no log scores what is shipped."""
    for log in f.logs:
        if log.evaluations and rounds_to(getattr(log.evaluations[-1], key), value):
            problem = f"{value} is of {log.name} while it trains, none is of what is shipped"
            return Finding(WARNING, where, problem, "score the artifact")
    return Finding(UNCHECKED, where, f"{value}: no log has an evaluation after training")


def of_one_seed(f: Folder, where: str, value: float, source: str) -> Iterator[Finding]:
    """A score that is one seed's, although there is a mean over several."""
    known = [log for log in f.logs if log.seed is not None]
    if not f.is_record or "the mean of" in source:
        return
    for label, values in groups(known, "bpb"):
        if f"'{label}'" in source:
            problem = f"{value} is that of one seed, the mean over {len(values)} is"
            mean = statistics.fmean(values)
            yield Finding(WARNING, where, f"{problem} {mean:.8f}", "give the mean")
            return


def wrong_rows(f: Folder) -> Iterator[Finding]:
    """A seed's figures in submission.json that no log of that seed gives."""
    for seed, row in f.seed_rows.items():
        logs = [log for log in f.logs if str(log.seed) == seed]
        if not logs:
            continue
        for key, name in (("val_bpb", "bpb"), ("val_loss", "loss")):
            value = row.get(key)
            finals = [getattr(one, name) for log in logs for one in log.finals]
            if type(value) not in (int, float) or not finals:
                continue
            if not any(log.has(name, value) for log in logs):
                problem = f"{value}, but {logs[0].name} ends with {finals[-1]}"
                other = shown_by_log(f, value, name)
                if other:
                    problem += f", and it is {other}"
                where = f"{f.where}.{seed}.{key}"
                yield Finding(ERROR, where, problem, "correct it, or add the log that shows it")


def wrong_ratio(f: Folder) -> Iterator[Finding]:
    """Bytes per token are of the validation text: the same in each evaluation of all logs."""
    ratios = {}
    for log in f.logs:
        if log.final and min(log.final.bpb, log.final.loss) > 0:
            ratios[log.name] = log.final.loss / log.final.bpb / math.log(2)
    if len(ratios) > 1 and max(ratios.values()) / min(ratios.values()) > 1.001:
        low = min(ratios, key=ratios.get)
        high = max(ratios, key=ratios.get)
        problem = f"{ratios[low]:.4f} in {low}, {ratios[high]:.4f} in {high}"
        remedy = "say which validation text and tokenizer each one has"
        yield Finding(WARNING, "bytes per token", problem, remedy)


def seed_scores(f: Folder) -> list[float]:
    """One score per seed: of submission.json, else the last one of each log."""
    rows = [row.get("val_bpb") for row in f.seed_rows.values()]
    if rows and all(type(value) in (int, float) for value in rows):
        return rows
    by_seed = {log.seed: log.final.bpb for log in f.logs if log.final and log.seed is not None}
    return list(by_seed.values())


def record_rule(f: Folder) -> Iterator[Finding]:
    """Which earlier mean these seeds would beat by the rule; the runs of it are not here."""
    values = seed_scores(f)
    stated = number_at(f.submission, SCORE_KEYS)
    final = next((log.final for log in f.logs if log.final and log.final.loss > 0), None)
    if not f.is_record or not stated or not final:
        return
    margin = RECORD_NATS * final.bpb / final.loss
    words = f"0.005 nats are {margin:.5f} BPB here: an earlier mean of {stated[1] + margin:.5f}"
    if len(values) > 1:
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        error = spread / math.sqrt(len(values))
        reach = half_width(error, len(values) - 1, alpha=2 * RECORD_LEVEL)  # one-sided
        words = (
            f"{len(values)} seeds, mean {mean:.6f}, sample standard deviation {spread:.6f}; "
            f"0.005 nats are {margin:.5f} BPB here: an earlier record at or above "
            f"{mean + margin + reach:.5f} is beaten by it with p < 0.01 (one-sample t test)"
        )
    yield Finding(UNCHECKED, "record rule", words, "compare with the seeds of the last record")

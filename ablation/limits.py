"""Bytes and seconds of somebody else's folder, beside the limits, its logs and its files."""

import math
import statistics
from collections.abc import Iterator

from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, Finding
from ablation.folder import CODE_KEYS, TOTAL_KEYS, Folder, number_at, one_per_seed
from ablation.logs import Log
from ablation.prose import half_a_digit
from ablation.submission import CAP_BYTES
from train_gpt import LIMIT_SECONDS

# Beyond the limit, as accepted records are: their clock is read after a step. Ours stops before
LATE_SECONDS = 1.0


def wrong_totals(f: Folder) -> Iterator[Finding]:
    """Code and artifact over the cap, or not the sum of their parts."""
    for log in f.logs:
        code, model, total = log.counted_code, log.model_bytes, log.total_bytes
        if None not in (code, model, total) and code + model != total:
            problem = f"total {total:,}, but code {code:,} and artifact {model:,} make another sum"
            yield Finding(WARNING, log.name, problem, "say which is right")
        if total is None and None not in (code, model):
            total = code + model
        if total is not None:
            yield over_or_under(f, log, total)
        else:
            problem = "shows no bytes of code and artifact"
            yield Finding(UNCHECKED, log.name, problem, "weigh them: code + artifact <= 16,000,000")
    yield from shipped_code(f)
    for name, size in f.artifacts.items():
        total = size + sum(f.scripts.values())
        weight = ERROR if total > CAP_BYTES else FINE
        problem = f"{size:,} bytes, with the scripts {total:,} of {CAP_BYTES:,}"
        yield Finding(weight, name, problem, "make it smaller" if weight == ERROR else "")


def over_or_under(f: Folder, log: Log, total: int) -> Finding:
    """Whether a log's total fits. One that fits with the scripts that are here is a warning."""
    said = f"code + artifact {total:,} bytes, {abs(CAP_BYTES - total):,}"
    if total <= CAP_BYTES:
        return Finding(FINE, log.name, f"{said} under the cap")
    shipped = sum(f.scripts.values())
    if log.model_bytes and shipped and shipped + log.model_bytes <= CAP_BYTES:
        fits = f"with the scripts that are here {shipped + log.model_bytes:,}"
        remedy = "show a log of the script that is shipped"
        return Finding(WARNING, log.name, f"{said} over the cap; {fits}", remedy)
    return Finding(ERROR, log.name, f"{said} over the cap of {CAP_BYTES:,}", "make it smaller")


def shipped_code(f: Folder) -> Iterator[Finding]:
    """The script that is here beside the code that the logs counted."""
    counted = sorted({log.counted_code for log in f.logs} - {None})
    logged = {size for log in f.logs for size in log.code_bytes.values()}
    if not counted or "train_gpt.py" not in f.scripts:
        return
    size = f.scripts["train_gpt.py"]
    if size not in logged:
        words = ", ".join(f"{n:,}" for n in sorted(logged))
        problem = f"{size:,} bytes, but the logs say {words}: not the very script of the logs"
        yield Finding(WARNING, "train_gpt.py", problem, "ship the script that ran")
    models = [log.model_bytes for log in f.logs if log.model_bytes]
    if size not in counted and size > counted[-1] and models:
        total = size + max(models)
        if total > CAP_BYTES >= counted[-1] + max(models):
            problem = (
                f"{size:,} bytes as it is here, {total:,} with the artifact: over the cap, "
                f"under it by the {counted[-1]:,} bytes that the log counts"
            )
            yield Finding(WARNING, "train_gpt.py", problem, "ship the packed script, or say so")


def wrong_bytes(f: Folder) -> Iterator[Finding]:
    """Bytes of submission.json that no log gives, or that are over the cap."""
    for keys, known in ((TOTAL_KEYS, known_totals(f)), (CODE_KEYS, known_codes(f))):
        found = number_at(f.submission, keys)
        if not found:
            continue
        where = f"{f.where}.{found[0]}"
        value = found[1]
        if keys == TOTAL_KEYS and value > CAP_BYTES:
            yield Finding(ERROR, where, f"{value:,}, over the cap of {CAP_BYTES:,}", "shrink it")
        if not known:
            yield Finding(UNCHECKED, where, f"{value:,}: neither a log nor a file shows it")
        elif value in known:
            yield Finding(FINE, where, f"{value:,}, as a log or a file")
        elif keys == TOTAL_KEYS and value in {log.model_bytes for log in f.logs}:
            problem = f"{value:,} are the artifact alone, without the code"
            yield Finding(ERROR, where, problem, "give code + artifact")
        else:
            near = ", ".join(f"{n:,}" for n in sorted(known, key=lambda n: abs(n - value))[:3])
            problem = f"{value:,}, but the logs and files give {near}"
            yield Finding(ERROR, where, problem, "correct it")
    yield from wrong_row_bytes(f)


def known_codes(f: Folder) -> set[int]:
    """Bytes of code that a log or a script has."""
    return {size for log in f.logs for size in log.code_bytes.values()} | set(f.scripts.values())


def known_totals(f: Folder) -> set[int]:
    """Bytes of code + artifact that the logs and files give, and their means over the seeds."""
    models = {log.model_bytes for log in f.logs} - {None} | set(f.artifacts.values())
    totals = {log.total_bytes for log in f.logs} - {None}
    totals |= {code + model for code in known_codes(f) for model in models}
    for values in one_per_seed(f.logs, lambda log: log.total_bytes):
        if values:
            mean = statistics.fmean(values)  # some give it in place of the largest
            totals |= {math.floor(mean), math.ceil(mean)}
    return totals


def wrong_row_bytes(f: Folder) -> Iterator[Finding]:
    """The bytes of a seed that its log does not give, or that are over the cap."""
    for seed, row in f.seed_rows.items():
        found = number_at(row, TOTAL_KEYS)
        if not found:
            continue
        key, value = found
        where = f"{f.where}.{seed}.{key}"
        if value > CAP_BYTES:
            yield Finding(ERROR, where, f"{value:,}, over the cap of {CAP_BYTES:,}", "shrink it")
        logs = [log for log in f.logs if str(log.seed) == seed and log.total_bytes]
        known = {n for log in logs for n in (log.total_bytes, log.model_bytes)} - {None}
        if logs and value not in known | {n + sum(f.scripts.values()) for n in known}:
            problem = f"{value:,}, but {logs[0].name} says {logs[0].total_bytes:,}"
            yield Finding(ERROR, where, problem, "correct it")


# ── Seconds ───────────────────────────────────────────────────────────────────────────────────────

# seconds of submission.json: key -> (of what, one in seconds)
TIMES = {
    "train_time_s": ("training", 1.0),
    "train_time_seconds": ("training", 1.0),
    "train_time_s_mean": ("training", 1.0),
    "train_time_ms": ("training", 1e-3),
    "wallclock_seconds": ("training", 1.0),
    "eval_time_s": ("scoring", 1.0),
    "eval_time_seconds": ("scoring", 1.0),
    "eval_time_s_mean": ("scoring", 1.0),
    "eval_time_ms": ("scoring", 1e-3),
    "ttt_eval_time_s": ("scoring", 1.0),
    "ttt_time_ms": ("scoring", 1e-3),
}


def wrong_times(f: Folder) -> Iterator[Finding]:
    """Training or scoring beyond the limit, by the logs and by submission.json."""
    for log in f.logs:
        for what, seconds in (("training", log.train_seconds), ("scoring", log.eval_seconds)):
            if seconds is None:
                yield Finding(UNCHECKED, log.name, f"no seconds of {what} that are known")
            else:
                yield in_time(f, log.name, what, seconds)
    yield from stated_times(f, f.where, f.submission, f.logs)
    for seed, row in f.seed_rows.items():
        logs = [log for log in f.logs if str(log.seed) == seed]
        yield from stated_times(f, f"{f.where}.{seed}", row, logs)


def in_time(f: Folder, where: str, what: str, seconds: float) -> Finding:
    """Seconds beside the limit; a step too many is a warning, as it is tolerated."""
    said = f"{what} took {seconds:,.3f} s"
    if seconds <= LIMIT_SECONDS:
        return Finding(FINE, where, said)
    over = f"{said}, over {LIMIT_SECONDS} s by {seconds - LIMIT_SECONDS:,.3f} s"
    if not f.is_record:
        return Finding(WARNING, where, f"{over} (no record)", "say so")
    if seconds - LIMIT_SECONDS <= LATE_SECONDS:
        return Finding(WARNING, where, over, "stop a step earlier")
    return Finding(ERROR, where, over, "stop earlier")


def stated_times(f: Folder, where: str, row: dict, logs: list[Log]) -> Iterator[Finding]:
    """Seconds that submission.json states: beside the limit, and beside those of the logs."""
    for key, (what, unit) in TIMES.items():
        stated = row.get(key)
        if type(stated) not in (int, float):
            continue
        seconds = stated * unit
        late = in_time(f, f"{where}.{key}", what, seconds)
        if late.weight != FINE:
            yield late
        half = half_a_digit(repr(stated)) * unit * 1.02
        shown = seconds_of(logs, what)
        near = [one for one in shown if abs(one - seconds) <= half]
        if near:
            yield Finding(FINE, f"{where}.{key}", f"{seconds:,.3f} s, as a log")
        elif not key.endswith("_mean"):  # recomputed with the other means
            known = ", ".join(f"{one:,.3f}" for one in sorted(shown)[:5]) or "none"
            problem = f"{seconds:,.3f} s of {what}; its logs show {known}"
            yield Finding(UNCHECKED, f"{where}.{key}", problem)


def seconds_of(logs: list[Log], what: str) -> set[float]:
    """The seconds of training or of scoring that logs show."""
    if what == "training":
        return {log.train_seconds for log in logs} - {None}
    return {seconds for log in logs for seconds in log.all_eval_seconds}


# ── What submission.json promises ─────────────────────────────────────────────────────────────────


def wrong_compliance(f: Folder) -> Iterator[Finding]:
    """Promises of submission.json that the logs do not keep."""
    promises = f.submission.get("compliance")
    if not isinstance(promises, dict):
        return
    train = [log.train_seconds for log in f.logs if log.train_seconds is not None]
    scoring = [log.eval_seconds for log in f.logs if log.eval_seconds is not None]
    sizes = [log.total_bytes for log in f.logs if log.total_bytes is not None]
    kept = {
        "train": (train, "training took {:,.3f} s at most", LIMIT_SECONDS),
        "eval": (scoring, "scoring took {:,.3f} s at most", LIMIT_SECONDS),
        "artifact": (sizes, "code + artifact have {:,} bytes at most", CAP_BYTES),
    }
    lost = []
    for key, promised in promises.items():
        rule = next((rule for name, rule in kept.items() if str(key).startswith(name)), None)
        where = f"{f.where}.compliance.{key}"
        if promised is not True:
            continue
        if key == "three_seeds" and f.seeds:
            seeds = len(set(f.seeds))
            weight = FINE if seeds > 2 else WARNING
            yield Finding(weight, where, f"true, and {seeds} seeds are named")
        elif rule and rule[0]:
            most = max(rule[0])
            weight = FINE if most <= rule[2] else WARNING
            yield Finding(weight, where, f"true, and in the logs {rule[1].format(most)}")
        else:
            lost.append(str(key))
    if lost:
        problem = f"{', '.join(lost)}: no log shows them"
        yield Finding(UNCHECKED, f"{f.where}.compliance", problem, "read the script")

"""Bytes and seconds of somebody else's folder, beside the limits, its logs and its files."""

import math
import statistics
from collections.abc import Iterator

from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, Finding
from ablation.folder import CODE_KEYS, TOTAL_KEYS, Folder, number_at, one_per_seed
from ablation.logs import Log
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
    """Bytes of submission.json that no log gives."""
    totals = {log.total_bytes for log in f.logs} - {None}
    models = {log.model_bytes for log in f.logs} - {None}
    codes = {size for log in f.logs for size in log.code_bytes.values()} | set(f.scripts.values())
    totals |= {code + model for code in codes for model in models}
    for values in one_per_seed(f.logs, lambda log: log.total_bytes):
        if values:
            mean = statistics.fmean(values)  # some give it in place of the largest
            totals |= {math.floor(mean), math.ceil(mean)}
    for keys, known in ((TOTAL_KEYS, totals), (CODE_KEYS, codes)):
        found = number_at(f.submission, keys)
        if not found or not known:
            continue
        where = f"{f.where}.{found[0]}"
        value = found[1]
        if value in known:
            yield Finding(FINE, where, f"{value:,}, as a log or a file")
        elif keys == TOTAL_KEYS and value in models:
            problem = f"{value:,} are the artifact alone, without the code"
            yield Finding(ERROR, where, problem, "give code + artifact")
        else:
            near = ", ".join(f"{n:,}" for n in sorted(known, key=lambda n: abs(n - value))[:3])
            problem = f"{value:,}, but the logs and files give {near}"
            yield Finding(ERROR, where, problem, "correct it")
        if keys == TOTAL_KEYS and value > CAP_BYTES:
            yield Finding(ERROR, where, f"{value:,}, over the cap of {CAP_BYTES:,}", "shrink it")
    yield from wrong_row_bytes(f)


def wrong_row_bytes(f: Folder) -> Iterator[Finding]:
    """The bytes of a seed that its log does not give."""
    for seed, row in f.seed_rows.items():
        value = row.get("artifact_bytes")
        logs = [log for log in f.logs if str(log.seed) == seed and log.total_bytes]
        if type(value) is not int or not logs:
            continue
        known = {n for log in logs for n in (log.total_bytes, log.model_bytes)} - {None}
        if value not in known | {n + sum(f.scripts.values()) for n in known}:
            problem = f"{value:,}, but {logs[0].name} says {logs[0].total_bytes:,}"
            yield Finding(ERROR, f"{f.where}.{seed}.artifact_bytes", problem, "correct it")


def wrong_times(f: Folder) -> Iterator[Finding]:
    """Training or scoring beyond the limit; a step too many is a warning, as it is tolerated."""
    for log in f.logs:
        limits = (("training", log.train_seconds), ("scoring", log.eval_seconds))
        for name, seconds in limits:
            if seconds is None:
                yield Finding(UNCHECKED, log.name, f"no seconds of {name} that are known")
                continue
            said = f"{name} took {seconds:,.3f} s"
            if seconds <= LIMIT_SECONDS:
                yield Finding(FINE, log.name, said)
                continue
            over = f"{said}, over {LIMIT_SECONDS} s by {seconds - LIMIT_SECONDS:,.3f} s"
            if not f.is_record:
                yield Finding(WARNING, log.name, f"{over} (no record)", "say so")
            elif seconds - LIMIT_SECONDS <= LATE_SECONDS:
                yield Finding(WARNING, log.name, over, "stop a step earlier")
            else:
                yield Finding(ERROR, log.name, over, "stop earlier")

"""Leaderboard folders that other tools made: what their logs show, and what does not agree.

The lines that these logs have in common are read; nothing of a folder is run. What cannot be read
is said to be not checked, and never taken for good.
"""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, Finding
from ablation.prose import (
    ANY,
    BPB,
    BYTES,
    HEADROOM,
    NATS,
    SECONDS,
    Figures,
    Stated,
    half_a_digit,
    kind_of,
    listed,
    numbers_of,
    told_numbers,
)
from ablation.records import MAX_BYTES
from ablation.statistics import RECORD_LEVEL, RECORD_NATS, half_width
from ablation.submission import CAP_BYTES, NO_RECORD
from train_gpt import LIMIT_SECONDS

MAX_LOG_LINE = 4000  # characters of a line of a log that holds a figure
MAX_CHOICES = 64  # of one log for each seed
MAX_LINES = 100_000  # of a log that may hold figures
MAX_EVALUATIONS = 1000  # of a log while it trains
MAX_FINALS = 100  # of a log after training, and stages of all logs
# Beyond the limit, as accepted records are: their clock is read after a step. Ours stops before
LATE_SECONDS = 1.0

MAY_HOLD = re.compile(
    r"^.*(?:val_bpb|train_time|total_eval_time|bytes|Code size|Total submission|budget:"
    r"|train_shards|seed[:=]).*$",
    re.MULTILINE,
)
EVALUATION = re.compile(
    r"^(?:\d{9,10}\.\d+ )?(?P<label>.{0,200}?)[ ]*(?:sliding )?val_loss: ?"
    r"(?P<loss>\d{1,12}\.\d{1,20}) "
    r"(?:sliding )?val_bpb: ?(?P<bpb>\d{1,12}\.\d{1,20})(?P<rest>.*)$"
)
STEP_LABEL = re.compile(r"^(?:step:? ?)?\d+/\d+")
TOOK = re.compile(
    r"\btime: ?(\d{1,12}(?:\.\d{1,20})?)(ms|s)\b|eval_time: ?(\d{1,12}(?:\.\d{1,20})?)(ms|s)\b"
)
TOTAL_EVAL = re.compile(r"total_eval_time: ?(\d{1,12}(?:\.\d{1,20})?)s")
STOPPED = re.compile(r"stopping_early: .*train_time: ?(\d{1,15})ms step: ?(\d{1,15})/")
TRAIN_TIME = re.compile(
    r"^(?:\d{1,12}\.\d{1,20} )?(?:step:? ?)?(\d{1,15})/\d+ .*train_time: ?(\d{1,15})ms"
)
CODE = re.compile(r"Code size( \([a-z]+\))?: ?(\d{1,15})(?: bytes)?\s*$")
MODEL = re.compile(r"Serialized model (\S[^:]{0,60}): ?(\d{1,15}) bytes")
TOTAL = re.compile(r"Total submission(?: size)?( [^:]{0,60})?: ?(\d{1,15})(?: bytes)?\s*$")
BUDGET = re.compile(r"budget: ?(\d{1,15})/16000000\b")
SHARDS = re.compile(r"train_shards: ?(\d{1,15})")
SEED_LINE = re.compile(r"^\s*(?:\d{1,12}\.\d{1,20} )?seed: ?(\d{1,15})\s*$")
SEED_SETTING = re.compile(r"(?:^| )seed=(\d{1,15})(?= |$)")
SEED_NAME = re.compile(r"seed[_-]?(\d{1,15})|[_-](\d{1,15})\.(?:txt|log)$", re.IGNORECASE)

SCORE_KEYS = ("val_bpb", "mean_val_bpb", "mean_bpb")
TOTAL_KEYS = ("bytes_total", "artifact_bytes", "artifact_size_bytes", "artifact_bytes_max")
CODE_KEYS = ("bytes_code", "code_bytes")
WANTED_KEYS = ("author", "github_id", "name", "date", "val_bpb", "bytes_total")


class Evaluation(NamedTuple):
    """One line of a log with a score."""

    label: str
    loss: float
    bpb: float
    half: float  # of the last digit of the bpb


class Log:
    """What one log shows; None, or empty, where it does not."""

    def __init__(self, name: str, text: str):
        self.name = name
        self.text = text
        self.evaluations: list[Evaluation] = []  # in training
        self.finals: list[Evaluation] = []  # after it
        self.steps: int | None = None
        self.train_seconds: float | None = None
        self.eval_seconds: float | None = None
        self.code_bytes: dict[str, int] = {}
        self.model_bytes: int | None = None
        self.total_bytes: int | None = None
        self.train_shards: int | None = None
        self.said_seed: int | None = None
        self.too_long = False
        lines = itertools.islice(MAY_HOLD.finditer(text), MAX_LINES + 1)
        for number, match in enumerate(lines):
            if match.end() - match.start() <= MAX_LOG_LINE:
                self.read_line(match[0].rstrip("\r"))
            self.too_long = number == MAX_LINES
        match = SEED_NAME.search(name.rpartition("/")[2])
        self.named_seed = int(match[1] or match[2]) if match else None

    @property
    def seed(self) -> int | None:
        return self.said_seed if self.said_seed is not None else self.named_seed

    def read_line(self, line: str) -> None:
        if "val_bpb" in line and (match := EVALUATION.match(line)):
            self.read_evaluation(match)
        if match := STOPPED.search(line) or TRAIN_TIME.match(line):
            a, b = int(match[1]), int(match[2])
            stopped = "stopping_early" in line
            self.train_seconds = (a if stopped else b) / 1e3
            self.steps = b if stopped else a
        if match := TOTAL_EVAL.search(line):
            self.eval_seconds = float(match[1])
        if match := SHARDS.search(line):
            self.train_shards = int(match[1])
        seed = SEED_LINE.match(line)
        if not seed and line.count("=") > 9:  # a line of settings
            seed = SEED_SETTING.search(line)
        if seed:
            self.said_seed = int(seed[1])
        self.read_bytes(line)

    def read_evaluation(self, match: re.Match) -> None:
        seconds = None
        if took := TOOK.search(match["rest"]):
            seconds = float(took[1] or took[3]) / (1e3 if (took[2] or took[4]) == "ms" else 1)
        label = match["label"].strip()
        in_training = bool(STEP_LABEL.match(label))
        if not in_training and seconds is not None:
            self.eval_seconds = seconds
        bpb = float(match["bpb"])
        half = half_a_digit(match["bpb"])
        found = Evaluation(label, float(match["loss"]), bpb, half)
        if in_training and len(self.evaluations) < MAX_EVALUATIONS:
            self.evaluations.append(found)
        elif not in_training:
            self.finals = [*self.finals[1 - MAX_FINALS :], found]

    def read_bytes(self, line: str) -> None:
        if match := CODE.search(line):
            self.code_bytes[(match[1] or "").strip(" ()")] = int(match[2])
        if match := MODEL.search(line):
            self.model_bytes = int(match[2])
        if match := BUDGET.search(line):
            self.total_bytes = int(match[1])
        match = TOTAL.search(line)
        # without a label it may be that of the weights before they are compressed
        if match and (match[1] or self.model_bytes is not None or "size" not in line):
            self.total_bytes = int(match[2])

    @property
    def counted_code(self) -> int | None:
        """The bytes of code that the total holds: packed, where the log says so."""
        for label in ("compressed", ""):
            if label in self.code_bytes:
                return self.code_bytes[label]
        return next(iter(self.code_bytes.values()), None)

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation after training."""
        return self.finals[-1] if self.finals else None

    @property
    def shows_anything(self) -> bool:
        return bool(self.evaluations or self.finals or self.total_bytes or self.train_seconds)

    def has(self, key: str, stated: float) -> Evaluation | None:
        """The last evaluation after training that rounds to a number.

        Where the log shows fewer digits, the number has to round to these; but not when the log
        shows the same evaluation with more of them, too.
        """
        for one in reversed(self.finals):
            value = getattr(one, key)
            finer = any(
                other.half < one.half and abs(getattr(other, key) - value) <= one.half * 1.01
                for other in self.finals
            )
            reach = 0.0 if finer else one.half
            if abs(value - stated) <= max(half_a_digit(repr(stated)), reach) + 1e-9:
                return one
        return None


class Folder(NamedTuple):
    """A folder of plain files that somebody else made."""

    logs: list[Log]
    submission: dict
    where: str  # the name of its submission.json
    readme: str | None
    scripts: dict[str, int]  # name -> bytes
    artifacts: dict[str, int]
    path: str  # the last two parts of its own

    @property
    def seed_rows(self) -> dict[str, dict]:
        """Seed -> what submission.json says of it."""
        for key in ("seed_results", "seeds"):
            rows = self.submission.get(key)
            if isinstance(rows, dict) and rows:
                return {seed: row for seed, row in rows.items() if isinstance(row, dict)}
        return {}

    @property
    def seeds(self) -> list[str]:
        """The seeds that submission.json claims."""
        listed = self.submission.get("seeds")
        if isinstance(listed, list):
            return [str(seed) for seed in listed]
        if self.seed_rows:
            return list(self.seed_rows)
        return [str(self.submission["seed"])] if "seed" in self.submission else []

    @property
    def is_record(self) -> bool:
        """Whether it is held to the limits of the leaderboard track."""
        texts = [self.submission.get(key) for key in ("track", "name", "run_name", "blurb")]
        texts += [(self.readme or "")[:400]]
        said = " ".join(text for text in [self.path, *texts] if isinstance(text, str))
        return not NO_RECORD.search(said)


def number_at(value, keys: Iterable[str]) -> tuple[str, float] | None:
    """The first of these keys that has a number, and the number."""
    for key in keys:
        if isinstance(value, dict) and type(value.get(key)) in (int, float):
            return key, value[key]
    return None


def rounds_to(value: float, stated: float, digits: float = 1.0) -> bool:
    """Whether a value rounds to a number that is written with as many digits as it has."""
    return abs(value - stated) <= digits * half_a_digit(repr(stated)) + 6e-9


# ── Files and words ───────────────────────────────────────────────────────────────────────────────


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


# ── Scores ────────────────────────────────────────────────────────────────────────────────────────


def one_per_seed(logs: list[Log], read: Callable[[Log], float | None]) -> Iterator[tuple]:
    """A figure of each seed, for every choice among the logs of the same seed."""
    by_seed: dict[str, dict[float, None]] = {}
    for log in logs:
        value = read(log)
        if value is not None:
            # a name and a line that differ hide which seed it is: then each log counts
            odd = None not in (log.named_seed, log.said_seed) and log.named_seed != log.said_seed
            seed = log.name if odd or log.seed is None else str(log.seed)
            by_seed.setdefault(seed, {})[value] = None
    yield from itertools.islice(itertools.product(*by_seed.values()), MAX_CHOICES)


def at_stage(label: str, key: str) -> Callable[[Log], float | None]:
    """The last figure of a log with this label."""

    def read(log: Log) -> float | None:
        values = [getattr(one, key) for one in log.finals if one.label == label]
        return values[-1] if values else None

    return read


def groups(logs: list[Log], key: str) -> Iterator[tuple[str, tuple]]:
    """(label, a figure of each seed) of every evaluation that two seeds or more have."""
    labels = dict.fromkeys(one.label for log in logs for one in log.finals)
    for label in itertools.islice(labels, MAX_FINALS):
        for values in one_per_seed(logs, at_stage(label, key)):
            if len(values) > 1:
                yield label, values


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


def wrong_spread(f: Folder) -> Iterator[Finding]:
    """A standard deviation that is none of the sample; what a record has to beat."""
    values = seed_scores(f)
    if len(values) < 2:
        return
    sample = statistics.stdev(values)
    stated = f.submission.get("val_bpb_std")
    if type(stated) in (int, float):
        where = f"{f.where}.val_bpb_std"
        spread = f"{stated}, but the {len(values)} seeds have {sample:.8f} (n - 1)"
        if rounds_to(sample, stated, digits=2.02):
            yield Finding(FINE, where, f"{stated}, of the sample")
        elif rounds_to(statistics.pstdev(values), stated, digits=2.02):
            yield Finding(WARNING, where, f"{spread}: it is divided by n", "give the sample's")
        else:
            yield Finding(ERROR, where, spread, "correct it")


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


# ── Bytes and seconds ─────────────────────────────────────────────────────────────────────────────


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


HELD = (*SCORE_KEYS, *TOTAL_KEYS, *CODE_KEYS, "val_loss", "val_bpb_std", "seeds", "seed")


def json_numbers(value, path: str = "", name: str = "") -> Iterator[Stated]:
    """Every number of a JSON value that no check of its own holds to the logs."""
    if isinstance(value, dict):
        for key, part in value.items():
            if path or key not in HELD or isinstance(part, dict):
                known = kind_of(key)[0] != ANY or not name
                yield from json_numbers(part, f"{path}.{key}".lstrip("."), key if known else name)
    elif isinstance(value, list):
        for part in value:
            yield from json_numbers(part, path, name)
    elif type(value) in (int, float):
        kind, unit = kind_of(name)
        half = half_a_digit(repr(value)) * unit
        yield Stated(f"{path} {value}", 0, kind, abs(value) * unit, half)


def unread_json(f: Folder, figures: Figures) -> Iterator[Finding]:
    """Numbers of submission.json that no log shows."""
    lost = [n for n in json_numbers(f.submission) if not figures.shows(n, cut=True)]
    if lost:
        yield Finding(UNCHECKED, f.where, f"no log shows {listed(lost)}")


CHECKS = (
    wrong_words,
    wrong_seeds,
    wrong_scores,
    wrong_spread,
    record_rule,
    wrong_totals,
    wrong_bytes,
    wrong_times,
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


def read_logs(folder: Path, files: list[Path]) -> tuple[list[Log], list[Finding]]:
    """The logs among these files of a folder, and those that are too long to read."""
    logs = []
    problems = []
    for path in files:
        name = str(path.relative_to(folder))
        if path.suffix not in (".log", ".txt") or path.name.startswith("requirements"):
            continue
        if path.stat().st_size > MAX_BYTES:
            problem = f"{path.stat().st_size:,} bytes, over {MAX_BYTES:,}"
            problems.append(Finding(UNCHECKED, name, problem, "shorten it"))
            continue
        log = Log(name, path.read_text(encoding="utf-8", errors="replace"))
        if log.shows_anything:
            logs.append(log)
        else:
            problems.append(Finding(UNCHECKED, name, "no line of it is known"))
    return logs, problems

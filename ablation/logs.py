"""What the logs of the contest show: the lines that they have in common."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

from ablation.findings import UNCHECKED, Finding
from ablation.prose import half_a_digit
from ablation.records import MAX_BYTES

MAX_LOG_LINE = 4000  # characters of a line of a log that holds a figure
MAX_LINES = 100_000  # of a log that may hold figures
MAX_EVALUATIONS = 1000  # of a log while it trains
MAX_FINALS = 100  # of a log after training, and stages of all logs

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
        self.all_eval_seconds: set[float] = set()
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
            self.all_eval_seconds.add(self.eval_seconds)
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
            self.all_eval_seconds.add(seconds)
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
    def step_ms(self) -> float | None:
        """Milliseconds of a step of training, on average."""
        return 1e3 * self.train_seconds / self.steps if self.train_seconds and self.steps else None

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

"""A leaderboard folder of somebody else as it is checked: logs, submission.json, README, files."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ablation.logs import MAX_FINALS, Log
from ablation.prose import ANY, Stated, half_a_digit, kind_of
from ablation.submission import NO_RECORD

MAX_CHOICES = 64  # of one log for each seed

SCORE_KEYS = ("val_bpb", "mean_val_bpb", "mean_bpb")
TOTAL_KEYS = ("bytes_total", "artifact_bytes", "artifact_size_bytes", "artifact_bytes_max")
CODE_KEYS = ("bytes_code", "code_bytes")


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

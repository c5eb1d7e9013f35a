"""Numbers in a text, looked up among the figures that logs show.

A figure has a kind, by the name or the unit that it stands with, so that "1.12 BPB" has to be a
score and is not excused by any 1.12 of a learning rate.
"""

import bisect
import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ablation.findings import FINE, UNCHECKED, Finding
from train_gpt import LIMIT_SECONDS

BPB, NATS, BYTES, SECONDS, ANY = "BPB", "nats", "bytes", "seconds", "any"
# Bytes below the cap. No size in MB: 15.9 MB is no artifact because another one leaves 15.9 MB
HEADROOM = "headroom"
SIZE = 1e5  # bytes that may be a claim on the size of what is shipped

MAX_NUMBERS = 20_000  # of a text that a person wrote
MAX_PROSE = 1 << 20  # characters of one
MAX_LOGGED = 200_000  # of a log
MAX_LISTED = 40  # of one in one line of a finding
MAX_ROW = 10_000  # characters of a row of a table

# What the rules of the contest say, so that a text may say it too
RULES = {BYTES: (16e6,), SECONDS: (LIMIT_SECONDS,), NATS: (0.005,), ANY: (0.01, 8, 80, 10, 16, 3)}

# one in the unit of its kind
UNITS = {
    "bpb": (BPB, 1.0),
    "nats": (NATS, 1.0),
    "nat": (NATS, 1.0),
    "bytes": (BYTES, 1.0),
    "byte": (BYTES, 1.0),
    "kb": (BYTES, 1e3),
    "mb": (BYTES, 1e6),
    # memory, and numbers of parameters and tokens
    "kib": (ANY, 2.0**10),
    "mib": (ANY, 2.0**20),
    "gib": (ANY, 2.0**30),
    "gb": (ANY, 1e9),
    "k": (ANY, 1e3),
    "m": (ANY, 1e6),
    "b": (ANY, 1e9),
    "s": (SECONDS, 1.0),
    "sec": (SECONDS, 1.0),
    "seconds": (SECONDS, 1.0),
    "ms": (SECONDS, 1e-3),
    "min": (SECONDS, 60.0),
    "minutes": (SECONDS, 60.0),
    "val_loss": (NATS, 1.0),
    "%": (ANY, 1.0),
    "x": (ANY, 1.0),
}

NUMBER = re.compile(
    r"""
    (?:
        (?P<before>(?<!train[ ])bpb|val_loss|nats|bytes)      # val_bpb: 1.08, BPB of 1.08
        [\s:=*`|~≈()]{0,6}
        (?:(?:of|is|was|at|to|from|by|about|mean)\s{1,3})?
        [*_`~≈]{0,3}
        | (?<![\d.\w\#])
    )
    (?P<number>
        \d{1,3}(?:,\d{3})+(?:\.\d{1,40})?                     # 15,952,086
        | \d{0,18}\.\d{1,40}(?:e[-+]?\d{1,2})?                # 1.0611, .98, 1.2e-4
        | \d{1,18}(?:e-\d{1,2})?
    )
    (?!\d|\.\d|,\d{3})
    (?:
        (?:/\d{1,18}(?:\.\d{1,20})?)?                            # 15.50/16.00 MB
        (?P<unit>
            [ ~*_`]{0,3}
            (?:bpb|nats?|bytes?|[kmg]i?b|b|k|m|seconds|sec|ms|minutes|min|s|%|x)
        )(?![\w/])
        | (?![a-z_])
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Not numbers of a result: links, and numbers of pull requests, dates, versions, list items
CUT = re.compile(
    r"\]\([^)\s]{0,500}\)|https?://\S+|(?:#|\b(?:PR|pull|issue)s?[ #]{0,2})\d+(?: ?/ ?#?\d+)*"
    r"|\b\d{4}-\d\d-\d\d(?:T[\d:.Z]+)?|\b\d+(?:\.\d+){2,}\S*|^[ \t]*\d+\.\s",
    re.IGNORECASE | re.MULTILINE,
)


class Stated(NamedTuple):
    """A number of a text: how it stands there, where, its kind, and its value with half a digit."""

    text: str
    line: int
    kind: str
    value: float
    half: float

    @property
    def is_claim(self) -> bool:
        """Whether a reader takes it for a result, whatever the number of its digits."""
        return self.kind in (BPB, NATS) or (self.kind == BYTES and self.value >= SIZE)


@functools.lru_cache(maxsize=4096)
def kind_of(name: str) -> tuple[str, float]:
    """The kind and the unit of a figure by its key in a JSON file."""
    name = name.lower()
    if "bpb" in name:
        return BPB, 1.0
    if "loss" in name or "nats" in name:
        return NATS, 1.0
    if "bytes" in name:
        return BYTES, 1.0
    if re.search(r"(^|_)ms(_|$)", name):
        return SECONDS, 1e-3
    if "seconds" in name or re.search(r"(time|_t|elapsed).*_s(_|$)|_s$", name):
        return SECONDS, 1.0
    return ANY, 1.0


class Figures:
    """The figures that logs and results show, by kind."""

    def __init__(self):
        self.values: dict[str, set[float]] = {kind: set() for kind in RULES}
        self.values |= {BPB: set(), HEADROOM: set()}
        for kind, values in RULES.items():
            self.values[kind].update(values)
        self.ordered: dict[str, list[float]] = {}

    def add(self, kind: str, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self.values[kind].add(abs(float(value)))
            self.ordered.clear()

    def add_json(self, value, name: str = "", depth: int = 0) -> None:
        """Every number of a JSON value, by the last name on its path that says a kind."""
        if depth > 20:
            return
        if isinstance(value, dict):
            for key, part in value.items():
                known = kind_of(str(key))[0] != ANY
                self.add_json(part, str(key) if known or not name else name, depth + 1)
        elif isinstance(value, list):
            for part in value:
                self.add_json(part, name, depth + 1)
        elif type(value) in (int, float):
            kind, unit = kind_of(name)
            self.add(kind, value * unit)
            self.add(ANY, value)

    def add_text(self, text: str) -> None:
        """Every number of a log: of any kind, and of the kind that its unit says."""
        for found in itertools.islice(numbers(text), MAX_LOGGED):
            self.add(found.kind, found.value)
            self.add(ANY, found.value)

    def add_group(self, kind: str, values: Iterable[float]) -> None:
        """Figures of the same kind of several runs: with their mean, spread and extremes."""
        values = list(values)
        for value in values:
            self.add(kind, value)
        if len(values) > 1:
            self.add(kind, statistics.fmean(values))
            self.add(kind, statistics.stdev(values))
            self.add(kind, statistics.pstdev(values))
            self.add(kind, max(values) - min(values))

    def add_differences(self, kind: str, values: Iterable[float]) -> None:
        """What one stage of a run loses or gains on another one."""
        for a, b in itertools.combinations([v for v in values if v is not None][:30], 2):
            self.add(kind, a - b)

    def shows(self, found: Stated, cut: bool = False) -> bool:
        """Whether a figure rounds to this number.

        cut: it may also be cut to it, or be a mean of rounded figures, as people write them.
        """
        kinds = [found.kind]
        if found.kind == BYTES and found.half < SIZE / 100:
            kinds.append(HEADROOM)
        if found.kind == ANY:
            kinds = list(self.values)
        below = found.half * 1.000001 + 1e-12
        above = below
        if cut:
            above *= 2.01
        if cut and found.half < 0.5e-3:
            below = above
        return any(self.between(kind, found.value - below, found.value + above) for kind in kinds)

    def between(self, kind: str, low: float, high: float) -> bool:
        """Whether a figure of this kind lies there."""
        if kind not in self.ordered:
            self.ordered[kind] = sorted(self.values[kind])
        known = self.ordered[kind]
        place = bisect.bisect_left(known, low)
        return place < len(known) and known[place] <= high


def half_a_digit(text: str) -> float:
    """Half of the last digit of a number as it is written."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(exponent or 0) - decimals)


def columns_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def header_units(line: str) -> list[str]:
    """The unit that each heading of a Markdown table gives to its column; empty for none."""
    units = []
    for cell in columns_of(line):
        words = re.findall(r"(?<![a-z0-9])[a-z]+(?![a-z0-9])", cell.lower())
        known = [word for word in words if word in UNITS and (len(word) > 1 or word == "s")]
        units.append(known[-1] if known else "")
    return units


def numbers(text: str) -> Iterator[Stated]:
    """Every number of a text."""
    heads: list[str] = []
    lines = CUT.sub(lambda cut: re.sub(r"[^\n]", " ", cut[0]), text).split("\n")
    for row, line in enumerate(lines, start=1):
        in_table = line.lstrip().startswith("|")
        if not in_table:
            heads = []
        elif row < len(lines) and re.fullmatch(r"[\s|:-]+", lines[row] or "x"):
            heads = header_units(line)
            continue
        if not any(map(str.isdigit, line)):
            continue
        for match in NUMBER.finditer(line):
            yield stated(match, row, column_of(line, match, heads))


def numbers_of(name: str, text: str) -> tuple[list[Stated], list[Finding]]:
    """(the numbers of a text that a person wrote, what of it is too long to look at)."""
    found = list(itertools.islice(numbers(text[:MAX_PROSE]), MAX_NUMBERS + 1))
    if len(found) <= MAX_NUMBERS and len(text) <= MAX_PROSE:
        return found, []
    problem = f"what comes after {MAX_NUMBERS:,} numbers or {MAX_PROSE:,} characters"
    return found[:MAX_NUMBERS], [Finding(UNCHECKED, name, problem, "shorten it")]


def column_of(line: str, match: re.Match, heads: list[str]) -> str:
    """The unit that the heading of a table gives to a number in this line."""
    if not heads or len(line) > MAX_ROW:
        return ""
    place = line.count("|", 0, match.start("number")) - 1
    return heads[place] if 0 <= place < len(heads) else ""


def stated(match: re.Match, line: int, column: str) -> Stated:
    """The number of a match, in the unit of its kind."""
    text = match["number"]
    unit = (match["unit"] or "").strip(" ~*_`").lower()
    name = unit or (match["before"] or "").lower() or column
    kind, factor = UNITS.get(name, (ANY, 1.0))
    half = half_a_digit(text.replace(",", ""))
    start = match.start("number")
    if re.search(r"[~≈±][ *_`]{0,3}$", match.string[max(0, start - 4) : start]):
        half *= 2  # "about": the last digit may be cut instead of rounded
    value = float(text.replace(",", "")) * factor
    shown = text + re.sub(r"[*_`~]", "", match["unit"] or "")
    if not unit and kind != ANY:
        shown = f"{text} [{name}]"
    return Stated(shown, line, kind, value, half * factor)


def listed(found: list[Stated]) -> str:
    """Numbers of a text with their lines."""
    words = [f"{n.text} (line {n.line})" if n.line else n.text for n in found[:MAX_LISTED]]
    more = f" and {len(found) - MAX_LISTED:,} more" if len(found) > MAX_LISTED else ""
    return ", ".join(words) + more


def told_numbers(name: str, shown_ones: int, total: int, others: list[Stated]) -> Finding:
    """How many numbers of a text the logs show, and which were not checked."""
    said = f"{shown_ones:,} of its {total:,} numbers are of the logs"
    if not others:
        return Finding(FINE, name, said)
    return Finding(UNCHECKED, name, f"{said}; none shows {listed(others)}")

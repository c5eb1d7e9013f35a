"""What a check says: one finding a line, each with its weight, the worst first."""

from collections.abc import Iterable
from typing import NamedTuple

from prepare_data import printable

ERROR = "error"  # wrong, or against the rules
WARNING = "warning"  # odd, and a reviewer will ask
UNCHECKED = "not checked"  # the folder alone cannot show it
FINE = "fine"
WEIGHTS = (ERROR, WARNING, UNCHECKED, FINE)

MAX_TOLD = 100  # findings of one weight
MAX_FINDING = 600  # characters


class Finding(NamedTuple):
    """The weight, the thing, what is the matter with its value, and the remedy."""

    weight: str
    thing: str
    value: str
    remedy: str = ""

    def __str__(self) -> str:
        """One printable line, without the weight."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return printable(shortened(f"{self.thing}: {self.value}{remedy}"))


def shortened(text: str) -> str:
    if len(text) < MAX_FINDING:
        return text
    return f"{text[: MAX_FINDING - 200]} ... {text[-100:]}"


def finding(text: str, weight: str = ERROR) -> Finding:
    """A finding from a line `thing: value; remedy`."""
    thing, _, rest = text.partition(": ")
    value, cut, remedy = rest.rpartition("; ")
    return Finding(weight, thing, value if cut else rest, remedy if cut else "")


def sorted_findings(found: Iterable[Finding]) -> list[Finding]:
    """The worst first, each once, at most MAX_TOLD of a weight."""
    by_weight: dict[str, list[Finding]] = {weight: [] for weight in WEIGHTS}
    for one in dict.fromkeys(found):
        by_weight[one.weight].append(one)
    told = []
    for weight, ones in by_weight.items():
        told += ones[:MAX_TOLD]
        if len(ones) > MAX_TOLD:
            told.append(Finding(weight, "and more", f"{len(ones) - MAX_TOLD:,} of this weight"))
    return told


def counts(found: list[Finding]) -> str:
    """How many of each weight, in words."""
    number = {weight: sum(one.weight == weight for one in found) for weight in WEIGHTS}
    plural = {ERROR: "errors", WARNING: "warnings"}
    return ", ".join(
        f"{n} {plural.get(weight, weight) if n != 1 else weight}" for weight, n in number.items()
    )


def worst_is(found: list[Finding], weight: str) -> bool:
    """Whether a finding has this weight."""
    return any(one.weight == weight for one in found)


def is_clean(found: list[Finding]) -> bool:
    """Whether there is neither an error nor a warning."""
    return not (worst_is(found, ERROR) or worst_is(found, WARNING))

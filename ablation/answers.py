"""What a study answers: a sentence per comparison, and the charts that show it.

In: scores by seed of the two sides of each comparison. Out: the first screen of the page.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ablation.page import (
    COLOURS,
    FIRST_WIDTH,
    LINES,
    LOOKS,
    WIDTH,
    Chart,
    Line,
    add_legend,
    label,
    row_figure,
    side_by_side,
)
from ablation.statistics import (
    LEVEL,
    Cells,
    Comparison,
    cell_array,
    decimal_places,
    half_width,
    look_of,
    paired,
    sample_sd,
    welch,
)
from train_gpt import Refusal

# Characters of a line beside a row of the forest plot
LABEL_WIDTH = 34


class Scale(NamedTuple):
    """How figures of a metric are written: times `factor`, in `unit`, with `digits` or more."""

    heading: str
    unit: str
    factor: float
    digits: int


class Compared(NamedTuple):
    """A comparison that a study makes: b - a.

    names: of its sides; of a contrast of a factorial "" and its term.
    figures: the metric of each side. a, b: by seed; of a contrast empty.
    test: None where there is none, and then problem says why. loose: Welch's, of two sides.
    asked: by the study's own metrics or pairs, so that it belongs to the family.
    family, holm_p: how many comparisons were corrected together, and its p; 0, None: it was not.
    """

    names: tuple[str, str]
    figures: tuple[str, str]
    a: dict[int, float]
    b: dict[int, float]
    test: Comparison | None
    problem: str = ""
    loose: Comparison | None = None
    asked: bool = True
    family: int = 0
    holm_p: float | None = None

    @property
    def contrast(self) -> bool:
        """Whether it is a contrast of a factorial."""
        return not self.names[0]

    @property
    def title(self) -> str:
        """As a table names it."""
        return self.names[1] if self.contrast else f"{self.names[1]} - {self.names[0]}"

    @property
    def falls(self) -> int:
        """The family in which a difference by its own p is none by Holm's; 0: it does not fall."""
        if self.test is None or self.holm_p is None:
            return 0
        return self.family if self.test.p < LEVEL <= self.holm_p else 0


def compare_sides(
    names: tuple[str, str],
    figures: tuple[str, str],
    a: dict[int, float],
    b: dict[int, float],
    asked: bool = True,
) -> Compared:
    """b - a over the seeds that both have."""
    try:
        return Compared(names, figures, a, b, paired(a, b), loose=welch(a, b), asked=asked)
    except Refusal as refusal:
        return Compared(names, figures, a, b, None, str(refusal), asked=asked)


class Answer(NamedTuple):
    """A comparison as it is told: b - a.

    a, b: the two sides by what tells them apart; both: what they have in common, or "".
    differences: by seed. test: None where there is none, and then problem says why.
    falls: as in Compared.
    """

    a: str
    b: str
    both: str
    differences: dict[int, float]
    test: Comparison | None
    problem: str = ""
    falls: int = 0

    @property
    def look(self) -> str:
        """The verdict, as a key of LOOKS."""
        return look_of(self.test) if self.test else "open"

    @property
    def same(self) -> bool:
        """Whether both sides have the same figure for every seed."""
        return self.test is not None and self.look == "open" and self.test.sd == 0


def scale_of(heading: str, unit: str, digits: int) -> Scale:
    """Differences in BPB are read in thousandths. heading: empty for several figures."""
    if unit == "BPB":
        return Scale(f"{heading} BPB".lstrip(), "mBPB", 1000.0, 1)
    return Scale(heading, unit, 1.0, digits)


# ── Sentences ─────────────────────────────────────────────────────────────────────────────────────
def by_holm(family: int) -> str:
    """What is said of a difference that falls in a family of this size; "" for 0: none does."""
    return f"; by Holm (of {family}) not distinguishable" if family else ""


def answer(sides: tuple[dict[str, str], dict[str, str]], one: Compared) -> Answer:
    """A comparison in words. sides: of a and of b, what each is: factor -> words."""
    left, right = sides
    both = [words for key, words in left.items() if right.get(key) == words]
    names = [
        ", ".join(words for words in side.values() if words not in both) or ", ".join(both)
        for side in sides
    ]
    shared = ", ".join(both) if names[0] != names[1] else ""
    common = sorted(one.a.keys() & one.b.keys())
    differences = {seed: one.b[seed] - one.a[seed] for seed in common}
    differences = {seed: value for seed, value in differences.items() if math.isfinite(value)}
    problem = one.problem
    if len(differences) < 2:
        problem = f"seeds in common: {len(differences)}, and a paired test needs 2"
    return Answer(*names, shared, differences, one.test, problem, one.falls)


def interactions(factors: dict[str, list[str]], contrasts: list[Compared]) -> list[Answer]:
    """Each two-factor interaction: how much an effect depends on a level of another factor.

    contrasts: all of a full factorial, in its order.
    """
    sides = []
    for first, second in itertools.combinations(factors, 2):
        base, *levels = factors[first]
        none, *others = factors[second]
        for level, other in itertools.product(levels, others):
            effect = f"{second} {other} − {none} with {first}"
            sides.append((f"that with {first} {base}", f"{effect} {level}"))
    if not sides or not contrasts:
        return []
    # the main effects stand before the interactions
    crossed = contrasts[-len(sides) :]
    found = []
    for (a, b), one in zip(sides, crossed, strict=True):
        found.append(Answer(a, b, "interaction", {}, one.test, falls=one.falls))
    return found


def sentence(found: Answer, scale: Scale) -> Line:
    """The answer in words, and no more than its interval allows."""
    a, b, test = found.a, found.b, found.test
    before = f"{found.both}: {b}" if found.both else b
    if test is None:
        return Line("open", f"{before} and {a} are", "not compared", f"({found.problem}).")

    digits = decimal_places(test, scale.digits, scale.factor)
    unit = f" {scale.unit}" if scale.unit else ""

    def size(x: float) -> str:
        return f"{abs(x) * scale.factor:,.{digits}f}"

    if found.same:
        return Line("open", f"{before} is", "the same", f"as {a} in each of {test.n} seeds.")
    if found.look == "open":
        between = f"between {size(test.low)}{unit} lower and {size(test.high)} higher"
        after = f"from {a}: {between} (95 % interval, {test.n} seeds)."
        return Line("open", f"{before} is", "not distinguishable", after)
    near, far = sorted((test.low, test.high), key=abs)
    interval = f"95 % interval {size(near)} to {size(far)} {found.look}, {test.n} seeds"
    if test.sd == 0:
        interval = f"no spread between {test.n} seeds"
    after = f"than {a} ({interval}){by_holm(found.falls)}."
    return Line(found.look, f"{before} is", f"{size(test.mean)}{unit} {found.look}", after)


def tally(answers: list[Answer], scale: Scale) -> str:
    """How many comparisons have which verdict."""
    if not answers:
        return "Nothing can be compared yet."
    looks = ["same" if found.same else found.look for found in answers if found.test]
    counts = {
        "lower": looks.count("lower"),
        "higher": looks.count("higher"),
        "not distinguishable": looks.count("open"),
        "the same": looks.count("same"),
        "not compared": len(answers) - len(looks),
    }
    several = f"{len(answers)} comparison{'s' if len(answers) > 1 else ''}"
    verdicts = ", ".join(f"{n} {words}" for words, n in counts.items() if n)
    better = " (lower is better)" if scale.unit == "mBPB" else ""
    fallen = [found.falls for found in answers if found.falls]
    holm = ""
    if fallen:
        holm = f"; by Holm (of {fallen[0]}) {len(fallen)} of these not distinguishable either"
    return f"{several} of {scale.heading}{better}: {verdicts}{holm}."


# ── Forest plot ───────────────────────────────────────────────────────────────────────────────────
def signed(x: float, digits: int) -> str:
    return f"{x:+,.{digits}f}".replace("-", "−")


def interval_text(found: Answer, scale: Scale) -> str:
    """mean (low to high), at the end of a row."""
    if found.test is None:
        return "not compared"
    test = found.test
    digits = decimal_places(test, scale.digits, scale.factor)
    mean, low, high = (signed(x * scale.factor, digits) for x in (test.mean, test.low, test.high))
    return f"{mean} ({low} to {high}){' *' if found.falls else ''}"


def draw_row(ax: Axes, y: int, found: Answer, scale: Scale) -> None:
    """The interval of one comparison, and faintly each seed."""
    look = LOOKS[found.look]
    values = [value * scale.factor for value in found.differences.values()]
    spots = side_by_side(y, len(values))
    ax.plot(values, spots, "o", color=look.colour, markersize=3.5, alpha=0.3, zorder=2)
    if found.test is None:
        return
    ends = [found.test.low * scale.factor, found.test.high * scale.factor]
    ax.plot(ends, [y, y], color=look.colour, linewidth=2, solid_capstyle="butt", zorder=3)
    filled = look.colour if found.look != "open" else "white"
    mark = {"marker": look.marker, "markersize": 8, "markerfacecolor": filled}
    ax.plot([found.test.mean * scale.factor], [y], color=look.colour, zorder=4, **mark)


def row_label(found: Answer) -> str:
    """b - a, and below it what they have in common."""
    parts = [f"{found.b} − {found.a}"]
    if len(parts[0]) > LABEL_WIDTH:
        parts = [found.b, f"− {found.a}"]
    if found.both:
        parts.append(found.both)
    return "\n".join(label(part, LABEL_WIDTH, 2) for part in parts)


def forest_legend(answers: list[Answer], rule: Line2D | None) -> list[Line2D]:
    """An entry per verdict that was drawn, one for the seeds and one for the record rule."""
    words = {"lower": "lower", "higher": "higher", "open": "not distinguishable"}
    handles = []
    for name, look in LOOKS.items():
        if any(found.look == name and found.test for found in answers):
            filled = look.colour if name != "open" else "white"
            mark = {"marker": look.marker, "markersize": 7, "markerfacecolor": filled}
            handles.append(
                Line2D([], [], color=look.colour, linewidth=2, label=words[name], **mark)
            )
    seed = {"marker": "o", "linestyle": "", "markersize": 3.5, "alpha": 0.4}
    handles.append(Line2D([], [], color="#444444", label="one seed", **seed))
    return [*handles, rule] if rule else handles


def draw_rule(ax: Axes, margin: float, scale: Scale) -> Line2D | None:
    """A dashed line at the record rule; None where it is far outside of what was measured."""
    low, high = ax.get_xlim()
    place = -margin * scale.factor
    if place < low - 2 * (high - low):
        return None
    words = f"record rule: {-place:.1f} {scale.unit} lower"
    return ax.axvline(place, color="#009E73", linestyle="--", linewidth=1.2, label=words)


def forest(answers: list[Answer], scale: Scale, margin: float) -> Chart | None:
    """A row per comparison. margin: of the record rule, in the metric; 0: none."""
    if not any(found.differences for found in answers):
        return None
    labels = [row_label(found) for found in answers]
    figure, ax = row_figure(labels, f"difference in {scale.heading}, {scale.unit}".rstrip(", "))
    figure.set_figwidth(FIRST_WIDTH)
    for y, found in enumerate(answers):
        draw_row(ax, y, found, scale)
    ax.axvline(0, color="#222222", linewidth=1, zorder=1)
    rule = draw_rule(ax, margin, scale) if margin else None

    beside = ax.twinx()
    texts = [interval_text(found, scale) for found in answers]
    beside.set_yticks(range(len(texts)), texts, fontsize=8)
    beside.set_ylim(ax.get_ylim())
    beside.grid(visible=False)
    beside.tick_params(length=0)
    add_legend(figure, forest_legend(answers, rule))
    star = " *: by Holm not distinguishable." if any(found.falls for found in answers) else ""
    record = ""
    if margin:
        amount = f"{margin * scale.factor:.1f} {scale.unit}"
        outside = "" if rule else ", which is outside of this chart"
        record = f" The record rule asks for 0.005 nats per token, here {amount} lower{outside}."
    return Chart(
        figure,
        f"Differences in {scale.heading}, paired by seed: the mean, its 95 % "
        f"t-interval and, faint, each seed.{record}{star}",
    )


# ── Interactions ──────────────────────────────────────────────────────────────────────────────────
def draw_lines(ax: Axes, y: np.ndarray, levels: list[str], names: list[str]) -> None:
    """A line per name over the levels: means with intervals, and faintly each seed.

    y: (levels, names, seeds).
    """
    n = y.shape[2]
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        line = LINES[i // len(COLOURS) % len(LINES)]
        shift = 0.04 * (i - (len(names) - 1) / 2)
        x = [place + shift for place in range(len(levels))]
        halves = []
        for values in y[:, i]:
            halves.append(half_width(sample_sd(values, abs(y).max()) / math.sqrt(n), n - 1))
        look = {"color": colour, "linestyle": line}
        ax.plot(x, y[:, i], linewidth=0.6, alpha=0.3, **look)
        style = {"fmt": "o", "markersize": 5, "capsize": 3, "linewidth": 1.8}
        ax.errorbar(x, y[:, i].mean(axis=1), yerr=halves, label=name or None, **style, **look)
    ax.set_xticks(range(len(levels)), [label(level) for level in levels])
    ax.set_xlim(-0.4, len(levels) - 0.6)


def panel(ax: Axes, y: np.ndarray, factors: dict[str, list[str]], pair: tuple[int, ...]) -> None:
    """Means by one or two of the factors, over the levels of the others.

    y: (levels of the first factor, of the second, ..., seeds). pair: the factor along the axis,
    and that of the lines.
    """
    names = [list(factors)[i] for i in pair]
    others = tuple(i for i in range(len(factors)) if i not in pair)
    shown = y.mean(axis=others)
    if len(pair) == 1:
        shown = shown[:, None]
        lines = [""]
    else:
        # the mean keeps the order of the factors
        shown = shown if pair[0] < pair[1] else shown.swapaxes(0, 1)
        lines = [f"{names[1]} {level}" for level in factors[names[1]]]
    draw_lines(ax, shown, factors[names[0]], lines)
    ax.set_xlabel(label(names[0]))
    if len(pair) > 1:
        ax.legend(frameon=False, fontsize=8)


def interaction(cells: Cells, factors: dict[str, list[str]], heading: str) -> Chart | None:
    """Lines per level of one factor over the other; of more factors, a panel per pair.

    None where there are no factors, or not all cells with two seeds.
    """
    if not factors:
        return None
    try:
        y = cell_array(cells, factors)
    except Refusal:
        return None
    levels = y.shape[:-1]
    # the factor with more levels along the axis
    order = sorted(range(len(levels)), key=lambda i: -levels[i])
    pairs = list(itertools.combinations(order, 2)) or [(order[0],)]
    figure = Figure((WIDTH, 0.3 + 3.2 * len(pairs)))
    axes = figure.subplots(len(pairs), 1, squeeze=False)[:, 0]
    for ax, pair in zip(axes, pairs, strict=True):
        panel(ax, y, factors, pair)
        ax.set_ylabel(heading)

    what = f"{heading[:1].upper()}{heading[1:]} by {' and '.join(factors)}"
    mean = " over the levels of the other factors" if len(levels) > 2 else ""
    parallel = "Parallel lines: no interaction. " if len(levels) > 1 else ""
    return Chart(
        figure,
        f"{what}: means{mean} with 95 % t-intervals, n = {y.shape[-1]} seeds, faint each seed. "
        f"{parallel}A seed moves all its points together, so that differences are known better "
        "than these intervals show.",
    )

"""One HTML page that needs nothing else: first screen, charts of what was measured, tables."""

import contextlib
import io
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ablation.records import quantised, split_trial, training_of

Table = tuple[list[str], list[list]]  # header, rows

# Okabe and Ito's colours, without their yellow, which fades on white
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#999999",
    "#000000",
)
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "xxx")

MAX_ROWS = 40  # of phases or groups in a chart: ours have a dozen

# Key of `scores`, in a run's order -> what was scored, and how
STAGE_WORDS = {
    "live": "live weights",
    "averaged": "averaged",
    "unfitted": "quantised, before it was made to fit the cap",
    "quantised": "quantised, read back",
    "sliding": "the same, sliding windows",
    "documents": "the same, each document by itself",
    "ttt": "the same, test-time training",
}
STAGES = tuple(STAGE_WORDS)
# those that say what quantisation does
QUANTISED_STAGES = ("unfitted", "quantised")

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "figure.facecolor": "white",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": True,
}

# Inches: of a chart, and of the one beside the answers
WIDTH = 6.6
FIRST_WIDTH = 7.1

# Characters: what a table may be wide, with the space around each of its cells; and how long a word
# may be that is not broken
PAGE_CHARACTERS = 145
PADDING = 2
LONGEST_WORD = 20


class Look(NamedTuple):
    """How a verdict is told apart, by more than its colour: a sign in text, a marker in a chart."""

    colour: str
    mark: str
    marker: str


LOOKS = {
    "lower": Look("#0072B2", "▼", "v"),
    "higher": Look("#B84A00", "▲", "^"),
    "open": Look("#555555", "○", "o"),
}


def styled() -> contextlib.AbstractContextManager:
    """The look of all charts: they are to be made within it."""
    return matplotlib.rc_context(STYLE)


class Arm(NamedTuple):
    """The finished runs of one arm, and how it looks in every chart."""

    label: str
    colour: str
    line: str
    runs: list[dict]


class Chart(NamedTuple):
    figure: Figure
    caption: str


class Line(NamedTuple):
    """A sentence on the first screen. look: of LOOKS; verdict: the words that matter."""

    look: str
    before: str
    verdict: str
    after: str


class Lead(NamedTuple):
    """The first screen. charts: the first stands beside the lines, the others below."""

    question: str
    summary: str
    lines: list[Line]
    remarks: list[str]
    charts: list[Chart]


def number(record, *keys):
    """The number at this path of nested dicts; None where there is none that can be drawn."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, (int, float)) and abs(record) < 1e18 else None


def label(text, width: int = 44, lines: int = 3) -> str:
    """As a chart can show it: at most so many lines of this width, in characters of XML."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return textwrap.fill(printable, width, max_lines=lines, placeholder=" …")


def group(runs: list[dict]) -> list[Arm]:
    """The finished runs by arm, in order of appearance."""
    members: dict[str, list[dict]] = {}
    for run in runs:
        members.setdefault(run["arm"], []).append(run)
    arms = []
    for i, (name, its_runs) in enumerate(members.items()):
        line = LINES[i // len(COLOURS) % len(LINES)]
        arms.append(Arm(label(name), COLOURS[i % len(COLOURS)], line, its_runs))
    return arms


def runs_of(arms: list[Arm]) -> list[dict]:
    return [run for arm in arms for run in arm.runs]


def measured(arms: list[Arm], value: Callable) -> list[tuple[Arm, list]]:
    """value(run) of each run that has one, for the arms with such runs."""
    rows = []
    for arm in arms:
        values = [value(run) for run in arm.runs]
        values = [v for v in values if v not in (None, [], {})]
        if values:
            rows.append((arm, values))
    return rows


def seeds(rows: list[tuple[Arm, list]]) -> str:
    """How many runs per arm a chart shows."""
    counts = [len(values) for _, values in rows]
    low = min(counts)
    high = max(counts)
    several = f" to {high}" if high > low else ""
    return f"n = {low}{several} seed{'s' if high > 1 else ''} per arm"


def legend_columns(labels: list[str], inches: float = WIDTH) -> int:
    """How many entries of a legend stand beside each other below a figure of this width."""
    longest = max(len(line) for text in labels for line in text.split("\n"))
    return min(max(int((inches - 0.1) / (0.065 * longest + 0.55)), 1), 4)


def legend(figure: Figure, arms: list[Arm]) -> None:
    """One entry per arm below the axes; the figure grows by the room that it takes."""
    handles = []
    for arm in arms:
        look = {"color": arm.colour, "linestyle": arm.line, "linewidth": 2}
        handles.append(Line2D([], [], label=arm.label, **look))
    add_legend(figure, handles)


def add_legend(figure: Figure, handles: list) -> None:
    """These entries below the axes; the figure grows by the room that they take."""
    labels = [handle.get_label() for handle in handles]
    columns = legend_columns(labels, figure.get_figwidth())
    tall = sorted((text.count("\n") + 1.4 for text in labels), reverse=True)
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.15 + 0.13 * sum(tall[:rows]))
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles=handles, frameon=False, fontsize=8, markerscale=0.7, **place)


def side_by_side(y: float, n: int) -> list[float]:
    """Where n dots of the row at y stand."""
    gap = min(0.12, 0.5 / max(n, 1))
    return [y + gap * (i - (n - 1) / 2) for i in range(n)]


def row_figure(
    labels: list[str], unit: str, rows: Sequence[tuple[Arm, list]] = ()
) -> tuple[Figure, Axes]:
    """A figure with a horizontal row per arm, the first on top.

    rows: (arm, values) to draw as dots, a dot per seed, side by side in the arm's row.
    """
    height = 0.9
    for text in labels:
        height += max(0.3, 0.14 * (text.count("\n") + 1.6))
    figure = Figure((WIDTH, height))
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(xlabel=unit, ylim=(len(labels) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)

    look = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 3}
    for y, (arm, values) in enumerate(rows):
        ax.plot(values, side_by_side(y, len(values)), "o", color=arm.colour, **look)
    return figure, ax


def events(run: dict, kind: str) -> list[dict]:
    return [event for event in run.get("events") or [] if event.get("event") == kind]


# Step -> (x, y) of a curve of one run; the end of the training is the step None
Curve = dict[int | None, tuple[float, float]]


def curve(run: dict, kind: str, key: str, value: str) -> Curve:
    """A figure of the events of this kind against `key` of theirs."""
    found: Curve = {}
    for event in events(run, kind):
        step = number(event, "step")
        point = (number(event, key), number(event, value))
        if None not in (step, *point):
            found[step] = point
    return found


def training(run: dict, key: str) -> Curve:
    """Training loss, where the log has it."""
    return curve(run, "step", key, "loss")


def validation(run: dict, key: str, end: str) -> Curve:
    """BPB of each validation during training, then of the live weights after it."""
    found = curve(run, "val", key, "val_bpb")
    last = (number(run, end), number(run, "live_val_bpb"))
    if None not in last and (found or training(run, key)):
        found[None] = last
    return found


def phases(arm: Arm, key: str) -> dict[str, float]:
    """Where each phase of the arm begins: the median over its seeds."""
    starts: dict[str, list[float]] = {}
    for run in arm.runs:
        for event in events(run, "phase"):
            x = number(event, key)
            if x is not None:
                starts.setdefault(label(event.get("name")), []).append(x)
    shown = itertools.islice(starts.items(), MAX_ROWS)
    return {name: statistics.median(places) for name, places in shown}


def phase_strip(ax: Axes, begun: dict[str, list[tuple[float, str]]]) -> None:
    """A row per phase; in it a coloured mark per arm that has the phase, below one another."""
    for row, marks in enumerate(begun.values()):
        height = 0.8 / len(marks)
        for i, (x, colour) in enumerate(marks):
            top = row - 0.4 + i * height
            bottom = row - 0.4 + (i + 1) * height
            ax.vlines(x, top, bottom, color=colour, linewidth=3)
    ax.set_yticks(range(len(begun)), begun, fontsize=8)
    ax.set(ylabel="begins", ylim=(len(begun) - 0.5, -0.5))


def curve_axes(panels: int, begun: dict[str, list]) -> tuple[Figure, list[Axes]]:
    """Axes for the curves, and below them a strip for the phases where there are any."""
    heights = [2.7] * panels
    if begun:
        heights.append(sum(max(0.2, 0.045 * len(marks)) for marks in begun.values()))
    figure = Figure((WIDTH, 0.4 + sum(heights)))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(grid[:, 0])


def zoom(rows: list[tuple[Arm, list[Curve]]]) -> tuple[float, float]:
    """The vertical scale of the last nine tenths of training: the first steps fall too steeply."""
    drawn = [point for _, curves_ in rows for one in curves_ for point in one.values()]
    late = 0.1 * max(x for x, _ in drawn)
    shown = [y for x, y in drawn if x >= late]
    room = 0.05 * (max(shown) - min(shown)) or 0.01
    return min(shown) - room, max(shown) + room


def few(rows: list) -> bool:
    """Whether so few arms are drawn that a line per seed can be told apart."""
    return len(rows) <= len(COLOURS)


def mean_curve(several: list[Curve]) -> list[tuple[float, float]]:
    """The mean over runs at each step that all of them have."""
    steps = [step for step in several[0] if all(step in one for one in several)]
    found = []
    for step in steps:
        x, y = zip(*(one[step] for one in several), strict=True)
        found.append((statistics.fmean(x), statistics.fmean(y)))
    return found


def draw_curves(ax: Axes, rows: list[tuple[Arm, list[Curve]]]) -> None:
    """Thick the mean of each arm; thin each seed, unless there are too many arms to tell apart."""
    for arm, several in rows:
        look = {"color": arm.colour, "linestyle": arm.line}
        lines = [(mean_curve(several), 1.8, 1.0)]
        if len(several) > 1 and few(rows):
            lines += [(list(one.values()), 0.6, 0.4) for one in several]
        for line, width, alpha in lines:
            x, y = zip(*line, strict=True) if line else ((), ())
            end = {"marker": "o", "markersize": 2 * width, "markevery": [-1] if line else []}
            ax.plot(x, y, linewidth=width, alpha=alpha, **end, **look)
    ax.set_ylim(zoom(rows))


def with_sharers(drawn: list[Arm], arms: list[Arm]) -> list[Arm]:
    """Those that are drawn, with the names of those that share their trainings in their labels."""
    shared: dict[str, list[str]] = {}
    for arm in arms:
        for run in arm.runs:
            donor, _ = split_trial(training_of(run))
            if donor != run["arm"]:
                shared.setdefault(donor, []).append(run["arm"])
    named = []
    for arm in drawn:
        others = dict.fromkeys(shared.get(arm.runs[0]["arm"], []))
        also = f"\n{label('also ' + ', '.join(others))}" if others else ""
        named.append(arm._replace(label=arm.label + also))
    return named


def has_lines(rows: list[tuple[Arm, list[Curve]]]) -> bool:
    """Whether a run has more than one point."""
    return any(len(one) > 1 for _, several in rows for one in several)


def curves(arms: list[Arm], key: str, end: str, unit: str) -> Chart | None:
    """Training loss and validation BPB against `key` of the events, above where phases begin."""
    panels = {
        "training loss (nats per token)": measured(arms, lambda run: training(run, key)),
        "validation loss (bits per byte)": measured(arms, lambda run: validation(run, key, end)),
    }
    panels = {name: rows for name, rows in panels.items() if has_lines(rows)}
    if not panels:
        return None
    names = {arm.label for rows in panels.values() for arm, _ in rows}
    drawn = [arm for arm in arms if arm.label in names]
    begun: dict[str, list[tuple[float, str]]] = {}
    for arm in drawn:
        for name, x in phases(arm, key).items():
            begun.setdefault(name, []).append((x, arm.colour))

    figure, axes = curve_axes(len(panels), begun)
    for ax, (name, rows) in zip(axes, panels.items(), strict=False):
        draw_curves(ax, rows)
        ax.set_ylabel(name)
    below = ""
    if begun:
        phase_strip(axes[-1], begun)
        below = " Below: where each phase of training begins, a mark per arm (median of its seeds)."
    axes[-1].set_xlabel(unit)
    figure.align_ylabels(axes)
    legend(figure, with_sharers(drawn, arms))
    rows = [row for several in panels.values() for row in several]
    return Chart(figure, f"{curves_caption(list(panels), unit)}, {seeds(rows)}.{below}")


def curves_caption(names: list[str], unit: str) -> str:
    """What the panels show."""
    ends = ""
    if names[-1].startswith("validation"):
        ends = " The dot at the end of validation is the live weights after training."
    return (
        f"Learning curves against {unit}: {', '.join(names)}. The vertical scale is that of the "
        f"last nine tenths of training.{ends} A colour per arm: thick the mean, thin each seed"
    )


def stage_scores(run: dict) -> dict[str, float]:
    """BPB of each stage that was scored; the last is the result."""
    found = {}
    for stage in STAGES:
        bpb = number(run, "scores", stage, "bpb")
        if bpb is not None:
            found[stage] = bpb
    if run.get("scored") in STAGES and number(run, "val_bpb") is not None:
        found.setdefault(run["scored"], run["val_bpb"])
    return found


def stages_of(arms: list[Arm], rows: list[tuple[Arm, list]]) -> list[str]:
    """The stages that were scored; where nothing is quantised, without those that are about it."""
    scored = {stage for _, values in rows for one in values for stage in one}
    told = () if quantised(runs_of(arms)) else QUANTISED_STAGES
    return [stage for stage in STAGES if stage in scored and stage not in told]


def journey(arms: list[Arm]) -> Chart | None:
    """What averaging, quantising and the way of scoring do to the same runs."""
    rows = measured(arms, stage_scores)
    if not rows:
        return None
    stages = stages_of(arms, rows)
    if len(stages) < 2:
        return None
    figure = Figure((WIDTH, 4))
    ax = figure.subplots()
    ax.set_xticks(range(len(stages)), stages)

    def draw(scores: dict[str, float], **look) -> None:
        shown = {stages.index(stage): bpb for stage, bpb in scores.items() if stage in stages}
        ax.plot(list(shown), list(shown.values()), **look)

    for arm, values in rows:
        look = {"color": arm.colour, "linestyle": arm.line}
        means = {}
        for stage in stages:
            bpb = [one[stage] for one in values if stage in one]
            if bpb:
                means[stage] = statistics.fmean(bpb)
        for one in values if few(rows) else ():
            draw(one, linewidth=0.7, alpha=0.5, **look)
        draw(means, linewidth=2, marker="o", markersize=4, **look)
    ax.set(xlabel="weights, and how they are scored", ylabel="validation loss (bits per byte)")
    legend(figure, [arm for arm, _ in rows])
    artifact = ""
    if "quantised" in stages:
        artifact = (
            " From quantised on, the weights are those of the artifact and only the way of scoring "
            "differs."
        )
    return Chart(
        figure,
        "Validation loss (bits per byte) of the same runs at each stage: thick the mean over seeds "
        f"with a dot per stage that was scored, thin each seed, {seeds(rows)}.{artifact}",
    )


def quant_gaps(arms: list[Arm]) -> Chart | None:
    """What quantisation costs."""
    rows = measured(arms, lambda run: number(run, "quant_gap_bpb"))
    if not rows or not quantised(runs_of(arms)):
        return None
    labels = [arm.label for arm, _ in rows]
    means = [statistics.fmean(values) for _, values in rows]
    colours = [arm.colour for arm, _ in rows]
    figure, ax = row_figure(labels, "quantisation gap (bits per byte)", rows)
    ax.barh(range(len(rows)), means, 0.7, color=colours, alpha=0.35)
    ax.axvline(0, color="#444444", linewidth=0.8)
    return Chart(
        figure,
        "Quantisation gap: validation loss of the quantised weights minus that of the weights "
        "before quantisation (bits per byte; less is better). A dot per seed, the bar is their "
        f"mean, {seeds(rows)}.",
    )


def sized(arms: list[Arm]) -> list[tuple[Arm, dict]]:
    """(arm, its first run that says where its bytes are)."""
    found = []
    for arm in arms:
        run = next((run for run in arm.runs if run.get("groups")), None)
        if run and isinstance(run["groups"], dict) and len(run["groups"]) <= MAX_ROWS:
            found.append((arm, run))
    return found


def bytes_by_part(run: dict) -> dict[str, float]:
    """MB of each group of tensors, and of the code."""
    parts = {name: number(run, "groups", name, "bytes") or 0 for name in run["groups"]}
    parts["code"] = number(run, "code_bytes") or 0
    return {name: size / 1e6 for name, size in parts.items()}


def stack_bars(ax: Axes, parts: list[dict[str, float]]) -> list[float]:
    """A bar per run out of its parts; returns the length of each bar."""
    names = dict.fromkeys(name for part in parts for name in part if name != "code")
    left = [0.0] * len(parts)
    for i, name in enumerate([*names, "code"]):
        width = [part.get(name, 0) for part in parts]
        # never the last colour: a black tick marks the total
        colour = COLOURS[i % 7]
        hatch = HATCHES[i // 7 % len(HATCHES)]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
        ax.barh(range(len(parts)), width, 0.6, left, label=label(name), **look)
        left = [a + b for a, b in zip(left, width, strict=True)]
    return left


def sizes(arms: list[Arm]) -> Chart | None:
    """Where the bytes are, by group of tensors."""
    found = sized(arms)
    if not found:
        return None
    labels = [arm.label for arm, _ in found]
    figure, ax = row_figure(labels, "size (MB = 1,000,000 bytes)")
    stacked = stack_bars(ax, [bytes_by_part(run) for _, run in found])

    totals = []
    for (_, run), length in zip(found, stacked, strict=True):
        totals.append((number(run, "total_bytes") or 0) / 1e6 or length)
    tick = {"color": "black", "markersize": 16, "label": "artifact and code"}
    ax.plot(totals, range(len(totals)), "|", **tick)

    cap = max(number(run, "cap_bytes") or 0 for _, run in found)
    if 0 < cap / 2e6 <= max(totals):
        line = {"color": "black", "linestyle": "--", "linewidth": 1}
        ax.axvline(cap / 1e6, label=f"cap: {cap:,} bytes", **line)

    add_legend(figure, ax.get_legend_handles_labels()[0])
    return Chart(
        figure,
        "Size by group of tensors, each compressed alone, and of the code (MB = 1,000,000 bytes), "
        "n = 1 seed per arm: its first. The black tick is the artifact, compressed as a whole, and "
        "the code: what the cap counts.",
    )


def spread(arms: list[Arm]) -> Chart | None:
    """The result, and how much of it is the seed."""
    rows = measured(arms, lambda run: number(run, "val_bpb"))
    if not rows:
        return None
    modes = [", ".join(sorted({str(run.get("scored")) for run in arm.runs})) for arm, _ in rows]
    labels = [arm.label for arm, _ in rows]
    how = f"scored: {modes[0]}"
    if len(set(modes)) > 1:
        how = "not scored alike, see the labels"
        pairs = zip(labels, modes, strict=True)
        labels = [f"{name}\n(scored: {label(mode)})" for name, mode in pairs]

    figure, ax = row_figure(labels, "final validation loss (bits per byte)", rows)
    look = {"color": "#444444", "markersize": 14, "capsize": 4, "linewidth": 1}
    for y, (_, values) in enumerate(rows):
        deviation = statistics.stdev(values) if len(values) > 1 else None
        ax.errorbar(statistics.fmean(values), y, xerr=deviation, fmt="|", **look)
    return Chart(
        figure,
        f"Final validation loss (bits per byte; {how}). A dot per seed, the tick is their mean, "
        f"the whiskers are one sample standard deviation to either side, {seeds(rows)}.",
    )


def inline_svg(chart: Chart, name: str) -> Markup:
    """The figure as an <svg> element that can stand beside others.

    It has no document type, and only the ids that it refers to itself: figure_1 or axes_1 would be
    the same in every chart.
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        chart.figure.savefig(buffer, format="svg", metadata=nothing)
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())

    values = [value for element in root.iter() for value in element.attrib.values()]
    used = set(re.findall(r"#([\w-]+)", " ".join(values)))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    root.attrib.update({"role": "img", "aria-label": chart.caption})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def svg_of(charts: dict[str, Chart | None]) -> list[tuple[Markup, str]]:
    """(svg, caption) of each chart that there is; the names keep their ids apart."""
    with styled():
        return [(inline_svg(chart, name), chart.caption) for name, chart in charts.items() if chart]


def draw_charts(runs: list[dict]) -> dict[str, Chart | None]:
    """Every chart of runs; None where there are no figures for it."""
    arms = group(runs)
    with styled():
        return {
            "steps": curves(arms, "step", "steps", "training steps"),
            "seconds": curves(arms, "seconds", "train_seconds", "training seconds"),
            "spread": spread(arms),
            "journey": journey(arms),
            "gap": quant_gaps(arms),
            "sizes": sizes(arms),
        }


def is_numeric(cell) -> bool:
    """Whether a cell of a table is a number, or a few, perhaps with a unit."""
    return bool(re.fullmatch(r"[-+−±.,%eE ]*\d[-+−±\d.,%eE ]*( [a-z]+)?", str(cell)))


class Column(NamedTuple):
    """Of a table. characters: its least width. right: it holds numbers."""

    name: str
    characters: int
    right: bool


class Fitting(NamedTuple):
    """A table that fits the page."""

    caption: str
    columns: list[Column]
    rows: list[list]

    @property
    def broad(self) -> bool:
        """Whether it is better read by scrolling than squeezed, on half of the page."""
        return sum(column.characters + PADDING for column in self.columns) > PAGE_CHARACTERS / 2


def column_of(name: str, cells: list) -> Column:
    """As narrow as its longest word allows."""
    words = [word for cell in (name, *cells) for word in str(cell).split()]
    longest = max(map(len, words), default=0)
    numbers = [is_numeric(cell) for cell in cells if cell not in (None, "-")]
    return Column(name, min(longest, LONGEST_WORD), bool(numbers) and all(numbers))


def parts_of(columns: list[Column]) -> list[list[int]]:
    """Which columns stand beside each other. Every part has the first: it names the rows."""
    parts = [[0]]
    widths = [column.characters + PADDING for column in columns]
    for i in range(1, len(columns)):
        if sum(widths[j] for j in parts[-1]) + widths[i] > PAGE_CHARACTERS:
            parts.append([0])
        parts[-1].append(i)
    return parts


def laid_out(tables: dict[str, Table]) -> list[Fitting]:
    """The tables; one that is too wide in parts, below one another."""
    found = []
    for caption, (header, rows) in tables.items():
        columns = [column_of(name, [row[i] for row in rows]) for i, name in enumerate(header)]
        parts = parts_of(columns)
        for number_, part in enumerate(parts, start=1):
            which = f" ({number_} of {len(parts)})" if len(parts) > 1 else ""
            cells = [[row[i] for i in part] for row in rows]
            found.append(Fitting(f"{caption}{which}", [columns[i] for i in part], cells))
    return found


def html_page(
    title: str,
    notes: list[str],
    tables: dict[str, Table],
    runs: list[dict],
    lead: Lead | None = None,
) -> str:
    """One page that needs nothing else.

    The first screen (lead), notes, charts of what was measured, tables, failed runs.
    """
    finished = [run for run in runs if run.get("failed") is None]
    failed = [run for run in runs if run.get("failed") is not None]
    if failed:
        rows = [[run["arm"], run.get("seed"), run["failed"]] for run in failed]
        tables = {**tables, "Failed runs (in no chart)": (["arm", "seed", "reason"], rows)}

    told = {f"lead {i}": chart for i, chart in enumerate(lead.charts if lead else [])}
    first = dict(itertools.islice(told.items(), 1))
    others = {name: chart for name, chart in told.items() if name not in first}
    strict = {"autoescape": True, "trim_blocks": True, "undefined": jinja2.StrictUndefined}
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    page = (
        jinja2.Environment(**strict)
        .from_string(template)
        .render(
            title=title,
            lead=lead,
            looks=LOOKS,
            first=svg_of(first),
            notes=notes,
            charts=svg_of(others | draw_charts(finished)),
            tables=laid_out(tables),
        )
    )
    # JSON can hold half a surrogate pair, UTF-8 cannot
    return page.encode("utf-8", "replace").decode()

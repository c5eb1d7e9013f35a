"""One HTML page that needs nothing else: notes, tables and a chart of whatever was measured."""

import io
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from typing import NamedTuple
from xml.etree import ElementTree

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#999999",
    "#000000",
)  # Okabe-Ito; its yellow

MAX_ROWS = 40  # of phases or groups in a chart: ours have a dozen

LINES, HATCHES = ("-", "--", ":", "-."), ("", "///", "...", "xxx")  # fades on white: grey

STAGES = (
    "live",
    "averaged",
    "unfitted",
    "quantised",
    "sliding",
    "documents",
    "ttt",
)  # keys of `scores`, in a run's order

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

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111; background: #fff }
table { border-collapse: collapse; margin: 1.5rem 0; font-size: 13px }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; white-space: pre-line }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 2rem 0; break-inside: avoid }
figure svg { max-width: 100%; height: auto }
figcaption { font-size: 13px; color: #333 }
@media screen { .wide { overflow-x: auto } }
@media print { body { max-width: none; margin: 0; font-size: 11px } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if notes %}
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% for caption, (header, rows) in tables.items() %}
<div class="wide"><table>
<caption>{{ caption }}</caption>
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td{% if numeric(cell) %} class="n"{% endif %}>{{ "-" if cell is none else cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% for svg, caption in charts %}
<figure>
{{ svg }}
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
</body>
</html>
"""


class Arm(NamedTuple):
    """The finished runs of one arm, and how it looks in every chart."""

    label: str
    colour: str
    line: str
    runs: list[dict]


class Chart(NamedTuple):
    figure: Figure
    caption: str


def number(record, *keys):
    """The number at this path of nested dicts, or None where there is none that a chart can show."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, (int, float)) and abs(record) < 1e18 else None


def label(text) -> str:
    """As a chart can show it: at most 3 lines of 44 characters, all of them allowed in XML."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return textwrap.fill(printable, 44, max_lines=3, placeholder=" …")


def group(runs: list[dict]) -> list[Arm]:
    """The finished runs by arm, in order of appearance."""
    arms: dict[str, list[dict]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return [
        Arm(label(name), COLOURS[i % 8], LINES[i // 8 % 4], members)
        for i, (name, members) in enumerate(arms.items())
    ]


def measured(arms: list[Arm], value: Callable) -> list[tuple[Arm, list]]:
    """value(run) of each run that has one, for the arms with such runs."""
    rows = [(arm, [v for v in map(value, arm.runs) if v not in (None, [], {})]) for arm in arms]
    return [(arm, values) for arm, values in rows if values]


def seeds(rows: list[tuple[Arm, list]]) -> str:
    """How many runs per arm a chart shows."""
    low, high = (bound(len(values) for _, values in rows) for bound in (min, max))
    return f"n = {low}{f' to {high}' if high > low else ''} seed{'s' if high > 1 else ''} per arm"


def legend(figure: Figure, rows: list[tuple[Arm, list]]) -> None:
    """One entry per arm below the axes; the figure grows by the room that it takes."""
    handles = [
        Line2D([], [], color=arm.colour, linestyle=arm.line, linewidth=2, label=arm.label)
        for arm, _ in rows
    ]
    figure.set_figheight(
        figure.get_figheight() + 0.2 + 0.07 * sum(arm.label.count("\n") + 1.3 for arm, _ in rows)
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def row_figure(
    labels: list[str], unit: str, rows: list[tuple[Arm, list]] = ()
) -> tuple[Figure, Axes]:
    """A figure with a horizontal row per arm, the first on top, and side by side in it a dot per seed of `rows`."""
    figure = Figure((9, 0.9 + sum(max(0.3, 0.14 * (text.count("\n") + 1.6)) for text in labels)))
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(xlabel=unit, ylim=(len(labels) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    for y, (arm, values) in enumerate(rows):
        gap = min(0.14, 0.5 / len(values))
        ax.plot(
            values,
            [y + gap * (i - (len(values) - 1) / 2) for i in range(len(values))],
            "o",
            color=arm.colour,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=3,
        )
    return figure, ax


def points(run: dict, key: str, end: str) -> list[tuple[float, float]]:
    """(x, BPB) of each validation during training, then of the live weights after it."""
    seen = [
        (number(e, key), number(e, "val_bpb"))
        for e in run.get("events") or []
        if e.get("event") == "val"
    ]
    return [xy for xy in [*seen, (number(run, end), number(run, "live_val_bpb"))] if None not in xy]


def phases(arm: Arm, key: str) -> dict[str, float]:
    """Where each phase of the arm begins: the median over its seeds."""
    starts: dict[str, list[float]] = {}
    for event in [
        e for run in arm.runs for e in run.get("events") or [] if e.get("event") == "phase"
    ]:
        if (x := number(event, key)) is not None:
            starts.setdefault(label(event.get("name")), []).append(x)
    return {name: statistics.median(xs) for name, xs in itertools.islice(starts.items(), MAX_ROWS)}


def phase_strip(ax: Axes, begun: dict[str, list[tuple[float, str]]]) -> None:
    """A row per phase; in it a coloured mark per arm that has the phase, below one another."""
    for row, marks in enumerate(begun.values()):
        high = 0.8 / len(marks)
        for i, (x, colour) in enumerate(marks):
            ax.vlines(
                x, row - 0.4 + i * high, row - 0.4 + (i + 1) * high, color=colour, linewidth=3
            )
    ax.set_yticks(range(len(begun)), begun, fontsize=8)
    ax.set(ylabel="begins", ylim=(len(begun) - 0.5, -0.5))


def curves(arms: list[Arm], key: str, end: str, unit: str) -> Chart | None:
    """Validation BPB against `key` of the events, above a strip that marks where the phases begin."""
    rows = measured(arms, lambda run: points(run, key, end))
    if not rows:
        return None
    begun: dict[str, list[tuple[float, str]]] = {}
    for arm, _ in rows:
        for name, x in phases(arm, key).items():
            begun.setdefault(name, []).append((x, arm.colour))
    heights = [3.6] + [sum(max(0.2, 0.045 * len(marks)) for marks in begun.values())] * bool(begun)
    figure = Figure((9, 0.4 + sum(heights)))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for arm, lines in rows:
        for line in lines:
            axes[0].plot(
                *zip(*line),
                color=arm.colour,
                linestyle=arm.line,
                linewidth=1,
                marker="o",
                markersize=3,
                markevery=[-1],
            )
    late = 0.1 * max(x for _, lines in rows for line in lines for x, _ in line)
    shown = [y for _, lines in rows for line in lines for x, y in line if x >= late]
    room = 0.05 * (max(shown) - min(shown)) or 0.01
    axes[0].set(
        ylabel="validation loss (bits per byte)", ylim=(min(shown) - room, max(shown) + room)
    )
    if begun:
        phase_strip(axes[1], begun)
    axes[-1].set_xlabel(unit)
    legend(figure, rows)
    below = (
        " Below: where each phase of training begins, a mark per arm (median of its seeds)."
        if begun
        else ""
    )
    return Chart(
        figure,
        f"Validation loss (bits per byte) against {unit}: a thin line per seed, a colour per arm, "
        f"{seeds(rows)}. The dot at its end is the live weights after training. The vertical scale is that of the last "
        f"nine tenths of training.{below}",
    )


def stage_scores(run: dict) -> dict[str, float]:
    """BPB of each stage that was scored; the last is the result."""
    found = {
        stage: bpb for stage in STAGES if (bpb := number(run, "scores", stage, "bpb")) is not None
    }
    if run.get("scored") in STAGES and number(run, "val_bpb") is not None:
        found.setdefault(run["scored"], run["val_bpb"])
    return found


def journey(arms: list[Arm]) -> Chart | None:
    """What averaging, quantising and the way of scoring do to the same runs."""
    rows = measured(arms, stage_scores)
    if not rows:
        return None
    stages = [
        stage for stage in STAGES if any(stage in one for _, values in rows for one in values)
    ]
    figure = Figure((9, 4))
    ax = figure.subplots()
    ax.set_xticks(range(len(stages)), stages)
    for arm, values in rows:
        per_stage = {stage: [one[stage] for one in values if stage in one] for stage in stages}
        mean = {stage: statistics.fmean(bpb) for stage, bpb in per_stage.items() if bpb}
        look = dict(color=arm.colour, linestyle=arm.line)
        for one in values:
            ax.plot(
                [stages.index(stage) for stage in one],
                list(one.values()),
                linewidth=0.7,
                alpha=0.5,
                **look,
            )
        ax.plot(
            [stages.index(stage) for stage in mean],
            list(mean.values()),
            linewidth=2,
            marker="o",
            markersize=4,
            **look,
        )
    ax.set(xlabel="weights, and how they are scored", ylabel="validation loss (bits per byte)")
    legend(figure, rows)
    return Chart(
        figure,
        "Validation loss (bits per byte) of the same runs at each stage: thick the mean over seeds with a dot "
        f"per stage that was scored, thin each seed, {seeds(rows)}. From quantised on, the weights are those of the "
        "artifact and only the way of scoring differs.",
    )


def quant_gaps(arms: list[Arm]) -> Chart | None:
    """What quantisation costs."""
    rows = measured(arms, lambda run: number(run, "quant_gap_bpb"))
    if not rows:
        return None
    figure, ax = row_figure(
        [arm.label for arm, _ in rows], "quantisation gap (bits per byte)", rows
    )
    means, colours = (
        [statistics.fmean(values) for _, values in rows],
        [arm.colour for arm, _ in rows],
    )
    ax.barh(range(len(rows)), means, 0.7, color=colours, alpha=0.35)
    ax.axvline(0, color="#444444", linewidth=0.8)
    return Chart(
        figure,
        "Quantisation gap: validation loss of the quantised weights minus that of the weights before "
        f"quantisation (bits per byte; less is better). A dot per seed, the bar is their mean, {seeds(rows)}.",
    )


def sizes(arms: list[Arm]) -> Chart | None:
    """Where the bytes are, by group of tensors."""
    firsts = [(arm, next((run for run in arm.runs if run.get("groups")), None)) for arm in arms]
    firsts = [
        (arm, run)
        for arm, run in firsts
        if run and isinstance(run["groups"], dict) and len(run["groups"]) <= MAX_ROWS
    ]
    if not firsts:
        return None
    figure, ax = row_figure([arm.label for arm, _ in firsts], "size (MB = 1,000,000 bytes)")
    parts = [
        {name: number(run, "groups", name, "bytes") or 0 for name in run["groups"]}
        for _, run in firsts
    ]
    names = [*dict.fromkeys(name for part in parts for name in part), "code"]
    for part, (_, run) in zip(parts, firsts):
        part["code"] = number(run, "code_bytes") or 0
    left = [0.0] * len(parts)
    for i, name in enumerate(names):
        width = [part.get(name, 0) / 1e6 for part in parts]
        ax.barh(
            range(len(parts)),
            width,
            0.6,
            left,
            color=COLOURS[i % 7],
            hatch=HATCHES[i // 7 % 4],
            edgecolor="white",
            linewidth=0.5,
            label=label(name),
        )  # not the last colour: black is the tick
        left = [a + b for a, b in zip(left, width)]
    totals = [
        (number(run, "total_bytes") or 0) / 1e6 or stacked
        for (_, run), stacked in zip(firsts, left)
    ]
    ax.plot(totals, range(len(parts)), "|", color="black", markersize=16, label="artifact and code")
    cap = max(number(run, "cap_bytes") or 0 for _, run in firsts)
    if 0 < cap / 2e6 <= max(totals):
        ax.axvline(
            cap / 1e6, color="black", linestyle="--", linewidth=1, label=f"cap: {cap:,} bytes"
        )
    figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil((len(names) + 2) / 4))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return Chart(
        figure,
        "Size by group of tensors, each compressed alone, and of the code (MB = 1,000,000 bytes), n = 1 seed "
        "per arm: its first. The black tick is the artifact, compressed as a whole, and the code: what the cap counts.",
    )


def spread(arms: list[Arm]) -> Chart | None:
    """The result, and how much of it is the seed."""
    rows = measured(arms, lambda run: number(run, "val_bpb"))
    if not rows:
        return None
    modes = [", ".join(sorted({str(run.get("scored")) for run in arm.runs})) for arm, _ in rows]
    mixed = len(set(modes)) > 1
    labels = [
        arm.label + f"\n(scored: {label(mode)})" * mixed for (arm, _), mode in zip(rows, modes)
    ]
    figure, ax = row_figure(labels, "final validation loss (bits per byte)", rows)
    for y, (_, values) in enumerate(rows):
        sd = statistics.stdev(values) if len(values) > 1 else None
        ax.errorbar(
            statistics.fmean(values),
            y,
            xerr=sd,
            fmt="|",
            color="#444444",
            markersize=14,
            capsize=4,
            linewidth=1,
        )
    how = "not scored alike, see the labels" if mixed else f"scored: {modes[0]}"
    return Chart(
        figure,
        f"Final validation loss (bits per byte; {how}). A dot per seed, the tick is their mean, the whiskers "
        f"are one sample standard deviation to either side, {seeds(rows)}.",
    )


def inline_svg(chart: Chart, name: str) -> Markup:
    """The figure as an <svg> element that can stand beside others: no document type, and no ids but its own."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        chart.figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(
        re.findall(
            r"#([\w-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())
        )
    )
    for element in root.iter():
        if element.get("id") not in used:  # figure_1, axes_1: the same in every chart
            element.attrib.pop("id", None)
    root.attrib.update({"role": "img", "aria-label": chart.caption})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def html_page(
    title: str, notes: list[str], tables: dict[str, tuple[list[str], list[list]]], runs: list[dict]
) -> str:
    """One page that needs nothing else: notes, tables, the runs that failed, and a chart of whatever was measured."""
    failed = [
        [run["arm"], run.get("seed"), run["failed"]]
        for run in runs
        if run.get("failed") is not None
    ]
    if failed:
        tables = {**tables, "Failed runs (in no chart)": (["arm", "seed", "reason"], failed)}
    arms = group([run for run in runs if run.get("failed") is None])
    with matplotlib.rc_context(STYLE):
        charts = {
            "spread": spread(arms),
            "journey": journey(arms),
            "steps": curves(arms, "step", "steps", "training steps"),
            "seconds": curves(arms, "seconds", "train_seconds", "training seconds"),
            "gap": quant_gaps(arms),
            "sizes": sizes(arms),
        }
        drawn = [
            (inline_svg(chart, name), chart.caption) for name, chart in charts.items() if chart
        ]
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(PAGE)
    page = template.render(
        title=title,
        notes=notes,
        tables=tables,
        charts=drawn,
        numeric=lambda cell: re.fullmatch(r"[-+−±.,%eE ]*\d[-+−±\d.,%eE ]*", str(cell)),
    )
    return page.encode(
        "utf-8", "replace"
    ).decode()  # JSON can hold half a surrogate pair, UTF-8 cannot

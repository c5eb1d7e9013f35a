"""One HTML page that needs nothing else: notes, tables and a chart of whatever was measured."""

import io
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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

# keys of `scores`, in a run's order
STAGES = ("live", "averaged", "unfitted", "quantised", "sliding", "documents", "ttt")

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
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body {
  font: 15px/1.5 system-ui, sans-serif;
  max-width: 62rem;
  margin: 2rem auto;
  padding: 0 1rem;
  color: #111;
  background: #fff
}
table { border-collapse: collapse; margin: 1.5rem 0; font-size: 13px }
caption { text-align: left; font-weight: 600 }
th, td {
  padding: .25rem .6rem;
  border-bottom: 1px solid #ddd;
  text-align: left;
  vertical-align: top;
  white-space: pre-line
}
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
<tr>
{%- for cell in row -%}
<td{% if numeric(cell) %} class="n"{% endif %}>{{ "-" if cell is none else cell }}</td>
{%- endfor -%}
</tr>
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
    """The number at this path of nested dicts; None where there is none that can be drawn."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, (int, float)) and abs(record) < 1e18 else None


def label(text) -> str:
    """As a chart can show it: at most 3 lines of 44 characters, all of them allowed in XML."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return textwrap.fill(printable, 44, max_lines=3, placeholder=" …")


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


def legend(figure: Figure, rows: list[tuple[Arm, list]]) -> None:
    """One entry per arm below the axes; the figure grows by the room that it takes."""
    handles = []
    room = 0.2
    for arm, _ in rows:
        look = {"color": arm.colour, "linestyle": arm.line, "linewidth": 2}
        handles.append(Line2D([], [], label=arm.label, **look))
        room += 0.07 * (arm.label.count("\n") + 1.3)
    figure.set_figheight(figure.get_figheight() + room)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def row_figure(
    labels: list[str], unit: str, rows: Sequence[tuple[Arm, list]] = ()
) -> tuple[Figure, Axes]:
    """A figure with a horizontal row per arm, the first on top.

    rows: (arm, values) to draw as dots, a dot per seed, side by side in the arm's row.
    """
    height = 0.9
    for text in labels:
        height += max(0.3, 0.14 * (text.count("\n") + 1.6))
    figure = Figure((9, height))
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(xlabel=unit, ylim=(len(labels) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)

    look = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 3}
    for y, (arm, values) in enumerate(rows):
        gap = min(0.14, 0.5 / len(values))
        places = [y + gap * (i - (len(values) - 1) / 2) for i in range(len(values))]
        ax.plot(values, places, "o", color=arm.colour, **look)
    return figure, ax


def events(run: dict, kind: str) -> list[dict]:
    return [event for event in run.get("events") or [] if event.get("event") == kind]


def points(run: dict, key: str, end: str) -> list[tuple[float, float]]:
    """(x, BPB) of each validation during training, then of the live weights after it."""
    seen = [(number(event, key), number(event, "val_bpb")) for event in events(run, "val")]
    seen.append((number(run, end), number(run, "live_val_bpb")))
    return [point for point in seen if None not in point]


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


def curve_axes(begun: dict[str, list[tuple[float, str]]]) -> tuple[Figure, list[Axes]]:
    """Axes for the curves, and below them a strip for the phases where there are any."""
    heights = [3.6]
    if begun:
        heights.append(sum(max(0.2, 0.045 * len(marks)) for marks in begun.values()))
    figure = Figure((9, 0.4 + sum(heights)))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(grid[:, 0])


def zoom(rows: list[tuple[Arm, list]]) -> tuple[float, float]:
    """The vertical scale of the last nine tenths of training: the first steps fall too steeply."""
    drawn = [point for _, lines in rows for line in lines for point in line]
    late = 0.1 * max(x for x, _ in drawn)
    shown = [y for x, y in drawn if x >= late]
    room = 0.05 * (max(shown) - min(shown)) or 0.01
    return min(shown) - room, max(shown) + room


def curves(arms: list[Arm], key: str, end: str, unit: str) -> Chart | None:
    """Validation BPB against `key` of the events, above a strip of where the phases begin."""
    rows = measured(arms, lambda run: points(run, key, end))
    if not rows:
        return None
    begun: dict[str, list[tuple[float, str]]] = {}
    for arm, _ in rows:
        for name, x in phases(arm, key).items():
            begun.setdefault(name, []).append((x, arm.colour))

    figure, axes = curve_axes(begun)
    for arm, lines in rows:
        look = {"color": arm.colour, "linestyle": arm.line, "linewidth": 1}
        for line in lines:
            x, y = zip(*line, strict=True)
            axes[0].plot(x, y, marker="o", markersize=3, markevery=[-1], **look)
    axes[0].set(ylabel="validation loss (bits per byte)", ylim=zoom(rows))
    below = ""
    if begun:
        phase_strip(axes[1], begun)
        below = " Below: where each phase of training begins, a mark per arm (median of its seeds)."
    axes[-1].set_xlabel(unit)
    legend(figure, rows)
    return Chart(
        figure,
        f"Validation loss (bits per byte) against {unit}: a thin line per seed, a colour per arm, "
        f"{seeds(rows)}. The dot at its end is the live weights after training. The vertical scale "
        f"is that of the last nine tenths of training.{below}",
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


def journey(arms: list[Arm]) -> Chart | None:
    """What averaging, quantising and the way of scoring do to the same runs."""
    rows = measured(arms, stage_scores)
    if not rows:
        return None
    scored = {stage for _, values in rows for one in values for stage in one}
    stages = [stage for stage in STAGES if stage in scored]
    figure = Figure((9, 4))
    ax = figure.subplots()
    ax.set_xticks(range(len(stages)), stages)

    def draw(scores: dict[str, float], **look) -> None:
        ax.plot([stages.index(stage) for stage in scores], list(scores.values()), **look)

    for arm, values in rows:
        look = {"color": arm.colour, "linestyle": arm.line}
        means = {}
        for stage in stages:
            bpb = [one[stage] for one in values if stage in one]
            if bpb:
                means[stage] = statistics.fmean(bpb)
        for one in values:
            draw(one, linewidth=0.7, alpha=0.5, **look)
        draw(means, linewidth=2, marker="o", markersize=4, **look)
    ax.set(xlabel="weights, and how they are scored", ylabel="validation loss (bits per byte)")
    legend(figure, rows)
    return Chart(
        figure,
        "Validation loss (bits per byte) of the same runs at each stage: thick the mean over seeds "
        f"with a dot per stage that was scored, thin each seed, {seeds(rows)}. From quantised on, "
        "the weights are those of the artifact and only the way of scoring differs.",
    )


def quant_gaps(arms: list[Arm]) -> Chart | None:
    """What quantisation costs."""
    rows = measured(arms, lambda run: number(run, "quant_gap_bpb"))
    if not rows:
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

    entries = len(ax.get_legend_handles_labels()[1])
    figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil((entries + 1) / 4))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
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


def draw_charts(arms: list[Arm]) -> list[tuple[Markup, str]]:
    """(svg, caption) of every chart that there are figures for."""
    with matplotlib.rc_context(STYLE):
        charts = {
            "spread": spread(arms),
            "journey": journey(arms),
            "steps": curves(arms, "step", "steps", "training steps"),
            "seconds": curves(arms, "seconds", "train_seconds", "training seconds"),
            "gap": quant_gaps(arms),
            "sizes": sizes(arms),
        }
        drawn = []
        for name, chart in charts.items():
            if chart:
                drawn.append((inline_svg(chart, name), chart.caption))
    return drawn


def is_numeric(cell) -> bool:
    """Whether a cell of a table is to be aligned to the right."""
    return bool(re.fullmatch(r"[-+−±.,%eE ]*\d[-+−±\d.,%eE ]*", str(cell)))


def html_page(
    title: str, notes: list[str], tables: dict[str, tuple[list[str], list[list]]], runs: list[dict]
) -> str:
    """One page that needs nothing else: notes, tables, failed runs, charts of what was measured."""
    finished = [run for run in runs if run.get("failed") is None]
    failed = [run for run in runs if run.get("failed") is not None]
    if failed:
        rows = [[run["arm"], run.get("seed"), run["failed"]] for run in failed]
        tables = {**tables, "Failed runs (in no chart)": (["arm", "seed", "reason"], rows)}

    strict = {"autoescape": True, "trim_blocks": True, "undefined": jinja2.StrictUndefined}
    page = (
        jinja2.Environment(**strict)
        .from_string(PAGE)
        .render(
            title=title,
            notes=notes,
            tables=tables,
            charts=draw_charts(group(finished)),
            numeric=is_numeric,
        )
    )
    # JSON can hold half a surrogate pair, UTF-8 cannot
    return page.encode("utf-8", "replace").decode()

"""docs/demo.svg: loss and validation BPB of the demo run over its seconds, with its phases."""

import io
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOSS = "#3b6ea5"
SCORE = "#c4572e"
MARK = "#666666"

# Score of result.json -> its name in the picture, from the live weights to the shipped ones
STAGES = {
    "live": "live weights",
    "averaged": "averaged",
    "quantised": "quantised, read back",
    "sliding": "the same, sliding windows",
}

# The same bytes from the same records: text as text, no date, no random ids
STYLE = {
    "svg.hashsalt": "demo",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
}

# Of the time axis: the width of a letter, and the room to its right end that labels leave
LETTER = 0.014
GAP = 0.02


def read_events(path: Path) -> dict[str, list[dict]]:
    """The records of metrics.jsonl by kind."""
    events = {"phase": [], "step": [], "val": []}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        events.setdefault(event["event"], []).append(event)
    return events


def draw_loss(ax: Axes, steps: list[dict]) -> None:
    seconds = [step["seconds"] for step in steps]
    ax.plot(seconds, [step["loss"] for step in steps], color=LOSS, marker=".")
    ax.set_ylabel("training loss,\nnats per token")


def draw_scores(ax: Axes, points: list[dict], result: dict) -> None:
    """The live weights while training; then what became of them, as a list."""
    seconds = [point["seconds"] for point in points]
    scores = [point["val_bpb"] for point in points]
    end = result["train_seconds"]
    last = result["scores"]["live"]["bpb"]
    ax.plot([*seconds, end], [*scores, last], color=SCORE, marker=".")
    ax.set_ylabel("validation BPB\n(lower is better)")
    ax.set_xlabel("seconds of training")

    lines = []
    for name, label in STAGES.items():
        if name in result["scores"]:
            lines.append(f"{label} {result['scores'][name]['bpb']:.4f}")
    text = "at the end:\n" + "\n".join(lines)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    ax.text(0.99, 0.97, text, transform=ax.transAxes, ha="right", va="top", bbox=paper)


def begins(phases: list[dict]) -> dict[float, str]:
    """Second -> the names of all that begins in it."""
    names: dict[float, list[str]] = {}
    for phase in phases:
        names.setdefault(round(phase["seconds"], 1), []).append(phase["name"])
    return {second: ", ".join(names[second]) for second in sorted(names)}


def mark_phases(axes: list[Axes], phases: list[dict], end: float) -> None:
    """A line where something begins; its name above, a row higher where there is no room."""
    ends_of_rows: list[float] = []
    for second, names in begins(phases).items():
        for ax in axes:
            ax.axvline(second, color=MARK, linestyle=":", linewidth=1)

        width = (LETTER * len(names) + GAP) * end
        left = min(second, end - width)
        row = 0
        while row < len(ends_of_rows) and ends_of_rows[row] > left:
            row += 1
        ends_of_rows[row:] = [left + width, *ends_of_rows[row + 1 :]]
        transform = axes[0].get_xaxis_transform()
        axes[0].text(left, 1.03 + 0.1 * row, names, transform=transform, color=MARK)


def demo_figure(folder: Path) -> Figure:
    """The picture of a run's folder with metrics.jsonl and result.json."""
    events = read_events(folder / "metrics.jsonl")
    result = json.loads((folder / "result.json").read_text())
    figure = Figure(figsize=(7.6, 4.6), layout="constrained", facecolor="white")
    axes = [*figure.subplots(2, 1, sharex=True)]
    draw_loss(axes[0], events["step"])
    draw_scores(axes[1], events["val"], result)
    mark_phases(axes, events["phase"], result["train_seconds"])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e5e5e5")
    return figure


def demo_picture(folder: Path) -> str:
    """The same as SVG."""
    picture = io.StringIO()
    with matplotlib.rc_context(STYLE):
        demo_figure(folder).savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()

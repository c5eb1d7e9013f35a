"""docs/demo.svg: loss and validation BPB of the demo run over its seconds, with its phases."""

import io
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOSS, SCORE, MARK = "#3b6ea5", "#c4572e", "#777777"
STAGES = {"live": "live", "averaged": "averaged", "quantised": "quantised", "sliding": "sliding"}

# the same bytes from the same records: text as text, no date, no random ids
STYLE = {
    "svg.hashsalt": "demo",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
}


def read_events(path: Path) -> dict[str, list[dict]]:
    """The records of metrics.jsonl by kind."""
    events = {"phase": [], "step": [], "val": []}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        events.setdefault(event["event"], []).append(event)
    return events


def draw_loss(ax: Axes, steps: list[dict]) -> None:
    ax.plot([s["seconds"] for s in steps], [s["loss"] for s in steps], color=LOSS, marker=".")
    ax.set_ylabel("training loss,\nnats per token")


def draw_scores(ax: Axes, points: list[dict], result: dict) -> None:
    """The live weights while training, then every stage from them to the shipped ones."""
    seconds = [p["seconds"] for p in points] + [result["train_seconds"]]
    scores = [p["val_bpb"] for p in points] + [result["scores"]["live"]["bpb"]]
    ax.plot(seconds, scores, color=SCORE, marker=".")
    ax.set_ylabel("validation BPB\n(lower is better)")
    ax.set_xlabel("seconds of training")

    lines = []
    for name, label in STAGES.items():
        if name in result["scores"]:
            lines.append(f"{label} {result['scores'][name]['bpb']:.4f}")
    ax.text(0.99, 0.95, "\n".join(lines), transform=ax.transAxes, ha="right", va="top")


def mark_phases(axes: list[Axes], phases: list[dict]) -> None:
    """One line for each second in which something begins; its name at the top."""
    begun: dict[float, list[str]] = {}
    for phase in phases:
        begun.setdefault(round(phase["seconds"], 1), []).append(phase["name"])
    for second, names in begun.items():
        for ax in axes:
            ax.axvline(second, color=MARK, linestyle=":", linewidth=1)
        axes[0].text(
            second, 1.03, " ".join(names), transform=axes[0].get_xaxis_transform(), color=MARK
        )


def demo_picture(folder: Path) -> str:
    """The SVG of a run's folder with metrics.jsonl and result.json."""
    events = read_events(folder / "metrics.jsonl")
    result = json.loads((folder / "result.json").read_text())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained", facecolor="white")
        axes = [*figure.subplots(2, 1, sharex=True)]
        draw_loss(axes[0], events["step"])
        draw_scores(axes[1], events["val"], result)
        mark_phases(axes, events["phase"])
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color="#e5e5e5")
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()

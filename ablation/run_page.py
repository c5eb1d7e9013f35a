"""The page of one run, from its folder: what ran, what came of it, charts, tables.

A run that failed, or only scored, has the part of it that there are figures for.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import train_gpt
from ablation.page import (
    COLOURS,
    FIRST_WIDTH,
    LOOKS,
    MAX_ROWS,
    STAGE_WORDS,
    WIDTH,
    Chart,
    Lead,
    Line,
    Table,
    bytes_by_part,
    events,
    html_page,
    label,
    number,
    row_figure,
    stage_scores,
    styled,
    training,
    validation,
)
from ablation.records import METRICS, RESULTS, load, read_lines, read_log
from train_gpt import Refusal

LOSS = COLOURS[0]
SCORE = COLOURS[1]
MARK = "#666666"

# How the lines of a log begin that the page of a run without a result repeats
TOLD_OF_A_FAILURE = ("settings: ", "without effect: ", "WARNING: ", "INACTIVE: ")

# What a verdict of train_gpt.in_words looks like
LOOK_OF = {"better": "lower", "worse": "higher"}

# Of the time axis: the width of a letter, and the room to its right end that labels leave
LETTER = 0.014
GAP = 0.02

# Captions of the tables at the end of the log
CAPTIONS = {
    "scores": "Scores",
    "size": "Size",
    "time": "Where the seconds went",
    "toggle": "What each toggle did",
    "toggle's cost": "What each toggle took",
    "where": "Files",
}


# ── The run ───────────────────────────────────────────────────────────────────────────────────────
def read_run(folder: Path) -> dict:
    """The run of this folder: of one without a result its events, settings and machine.

    Refusal where there is no run.
    """
    if (folder / "result.json").exists():
        return load(folder)
    if (folder / RESULTS).exists():
        raise Refusal(
            f"{folder}: the runs of a study lie here ({RESULTS}); "
            f"give its TOML file, and --out {folder}"
        )
    told = read_lines(folder / METRICS)
    if not told and not read_log(folder / "train.log"):
        raise Refusal(
            f"{folder}: no run lies here (no result.json, metrics.jsonl, train.log); give "
            "LOGS_DIR/RUN_ID, or the TOML file of a study"
        )
    run: dict = {"name": str(folder), "events": told}
    for start in events(run, "start"):
        environment = start.get("environment")
        if isinstance(environment, dict):
            run |= environment
        run["config"] = start.get("config")
    return run


def has_result(run: dict) -> bool:
    return "val_bpb" in run


def log_of(run: dict) -> list[str]:
    """The lines of its log; at least one, which may be empty."""
    return read_log(Path(run["name"]) / "train.log").rstrip().split("\n")


def what_ran(run: dict) -> str:
    """One sentence: what was done, by which code, on which machine."""
    if not has_result(run):
        return log_of(run)[0]
    did = f"Scored {run.get('artifact_path')}, trained nothing"
    if run["steps"] is not None and run.get("checkpoint"):
        did = f"Exported and scored {run['checkpoint']}, the weights after {run['steps']:,} steps"
    elif run["steps"] is not None:
        seconds = run["train_seconds"]
        did = f"Trained {run.get('params') or 0:,} parameters for {run['steps']:,} steps"
        did += f" in {seconds:,.1f} s"
        if seconds and number(run, "tokens_seen"):
            did += f" ({run['tokens_seen'] / seconds:,.0f} tokens/s)"
    ranks = "1 rank" if run["world_size"] == 1 else f"{run['world_size']} ranks"
    return (
        f"{did}, on {run['device']}, {ranks}: seed {run['seed']}, code {run['code_sha256'][:12]}, "
        f"torch {run['torch']}, {run['date']}."
    )


def what_came(run: dict) -> str:
    """The result in one sentence, or what stands in its place."""
    if has_result(run):
        cap = number(run, "cap_bytes")
        share = f" of {cap:,}" if cap else ""
        code = run["exit_code"]
        return (
            f"{run['val_bpb']:.6f} bits per byte ({run['scored']}; lower is better) in "
            f"{run['total_bytes']:,}{share} bytes; exit code {code}: "
            f"{train_gpt.EXIT_CODES.get(code, 'unknown')}."
        )
    for event in events(run, "stopped"):
        return f"No result: it stopped {event.get('error')}."
    return f"No result: it is at work, or was killed. The log ends with: {log_of(run)[-1]}"


def toggle_lines(run: dict) -> list[Line]:
    """What each toggle did, in a sentence."""
    lines = []
    for name, row in (run.get("toggles") or {}).items():
        verdict = row.get("verdict") or ("acted" if row["active"] else train_gpt.DID_NOTHING)
        effect = train_gpt.effect_text(row) if "effect_interval" in row else None
        how = ", ".join(str(part) for part in (effect, row.get("compared")) if part)
        lines.append(Line(LOOK_OF.get(verdict, "open"), f"{name}:", verdict, how))
    return lines


def remarks(run: dict) -> list[str]:
    """What to know beside the result, and what to do next."""
    if not has_result(run):
        return [line for line in log_of(run) if line.startswith(TOLD_OF_A_FAILURE)]
    lines = [f"WARNING: {text}" for text in run.get("warnings") or []]
    # older code did not say its folder
    with contextlib.suppress(KeyError):
        lines += train_gpt.time_lines(run)
        lines.append(f"{train_gpt.next_launches(run)}.")
    return lines


# ── Charts ────────────────────────────────────────────────────────────────────────────────────────
def begins(run: dict) -> dict[float, str]:
    """Second of training -> the names of all that begins in it."""
    names: dict[float, list[str]] = {}
    for event in events(run, "phase"):
        second = number(event, "seconds")
        if second is not None and len(names) < MAX_ROWS:
            names.setdefault(round(second, 1), []).append(label(event.get("name")))
    return {second: ", ".join(names[second]) for second in sorted(names)}


def mark_phases(axes: list[Axes], run: dict) -> None:
    """A line where something begins; its name above, a row higher where there is no room."""
    end = max(ax.dataLim.x1 for ax in axes)
    ends_of_rows: list[float] = []
    for second, names in begins(run).items():
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


def course(run: dict) -> Chart | None:
    """Training loss and validation BPB over the seconds, with the phases."""
    loss = [*training(run, "seconds").values()]
    scores = [*validation(run, "seconds", "train_seconds").values()]
    panels = [
        ("training loss\n(nats per token)", LOSS, loss),
        ("validation\n(bits per byte)", SCORE, scores),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    figure = Figure((FIRST_WIDTH, 0.8 + 2.0 * len(panels)))
    axes = [*figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]]
    for ax, (name, colour, points) in zip(axes, panels, strict=True):
        ax.plot(*zip(*points, strict=True), color=colour, marker=".")
        ax.set_ylabel(name)
    axes[-1].set_xlabel("seconds of training")
    mark_phases(axes, run)

    told = [f"{STAGE_WORDS[stage]} {bpb:.4f}" for stage, bpb in stage_scores(run).items()]
    if told and scores:
        text = "at the end:\n" + "\n".join(told)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        place = {"transform": axes[-1].transAxes, "ha": "right", "va": "top", "bbox": paper}
        axes[-1].text(0.99, 0.97, text, fontsize=8, **place)
    live = ", of the live weights" if scores else ""
    marked = "; dotted where a phase begins" if begins(run) else ""
    return Chart(figure, f"Loss over the seconds of training{live}{marked}.")


def speed(run: dict) -> Chart | None:
    """Tokens per second over the seconds."""
    batch = number(run, "config", "train_batch_tokens")
    points = []
    for event in events(run, "step"):
        second = number(event, "seconds")
        milliseconds = number(event, "step_ms")
        if batch and milliseconds and second is not None:
            points.append((second, 1e3 * batch / milliseconds))
    if not points:
        return None
    figure = Figure((WIDTH, 2.6))
    ax = figure.subplots()
    ax.plot(*zip(*points, strict=True), color=COLOURS[2], marker=".")
    ax.set(xlabel="seconds of training", ylabel="tokens per second")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    mark_phases([ax], run)
    return Chart(figure, "Tokens per second: the median of the last 20 steps, at each line of log.")


def bars(rows: dict[str, tuple[float, str]], unit: str, colour: str) -> Figure:
    """A bar per name: (its length, what stands beside it)."""
    figure, ax = row_figure([label(name) for name in rows], unit)
    drawn = ax.barh(range(len(rows)), [length for length, _ in rows.values()], 0.7, color=colour)
    ax.bar_label(drawn, [text for _, text in rows.values()], padding=3, fontsize=8)
    ax.margins(x=0.18)
    return figure


def sizes(run: dict) -> Chart | None:
    """Where the bytes are."""
    groups = run.get("groups")
    if not has_result(run) or (isinstance(groups, dict) and len(groups) > MAX_ROWS):
        return None
    if isinstance(groups, dict):
        found = bytes_by_part(run)
        how = "each group of tensors compressed alone, and the code"
    else:
        found = {"artifact": run["artifact_bytes"] / 1e6, "code": run["code_bytes"] / 1e6}
        how = "the artifact, and the code"
    rows = {name: (size, f"{1e6 * size:,.0f}") for name, size in found.items()}
    unit = "MB (1,000,000 bytes)"
    return Chart(bars(rows, unit, COLOURS[5]), f"Bytes by role: {how}. In all {total_words(run)}.")


def total_words(run: dict) -> str:
    cap = number(run, "cap_bytes")
    share = f", {run['total_bytes'] / cap:.1%} of the cap" if cap else ""
    return f"{run['total_bytes']:,} bytes{share}"


def stages(run: dict) -> Chart | None:
    """The way of the score from the live weights to what is shipped."""
    scores = stage_scores(run)
    if len(scores) < 2:
        return None
    names = [f"{STAGE_WORDS[stage]}: {bpb:.6f}" for stage, bpb in scores.items()]
    figure, ax = row_figure(names, "bits per byte")
    ax.plot(list(scores.values()), range(len(scores)), color=SCORE, marker="o")
    return Chart(
        figure,
        "Validation loss at each stage, from the live weights to what is shipped and how it is "
        "scored; the last is the result.",
    )


def measured_toggles(run: dict) -> dict[str, dict]:
    """The toggles whose effect is a loss with an interval."""
    found = {}
    for name, row in (run.get("toggles") or {}).items():
        ends = row.get("effect_interval")
        known = isinstance(ends, list) and len(ends) == 2 and None not in (*ends, row["effect"])
        known = known and row.get("verdict")
        if known and all(math.isfinite(end) for end in ends):
            found[name] = row
    return dict(list(found.items())[:MAX_ROWS])


def effects(run: dict) -> Chart | None:
    """Each toggle's effect with its interval, on a scale of its own."""
    rows = measured_toggles(run)
    if not rows:
        return None
    figure = Figure((WIDTH, 0.4 + 0.62 * len(rows)))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for ax, (name, row) in zip(axes, rows.items(), strict=True):
        look = LOOKS[LOOK_OF.get(row["verdict"], "open")]
        low, high = row["effect_interval"]
        error = [[row["effect"] - low], [high - row["effect"]]]
        drawn = {"color": look.colour, "marker": look.marker, "capsize": 4}
        ax.errorbar(row["effect"], 0, xerr=error, **drawn)
        ax.axvline(0, color="#444444", linewidth=0.8)
        ax.set_yticks([0], [label(name)], fontsize=8)
        ax.set_title(f"{train_gpt.effect_text(row)}: {row['verdict']}", fontsize=8, loc="right")
        ax.tick_params(axis="x", labelsize=7)
        ax.locator_params(axis="x", nbins=5)
        ax.margins(x=0.1)
        ax.grid(axis="y", visible=False)
    return Chart(
        figure,
        "What each toggle did: the loss with it minus without (nats per token, or bpb: bits per "
        "byte), and its 95 % interval. Each row has its own scale; left of the line at 0 is "
        "better.",
    )


def ledger(run: dict) -> Chart | None:
    """Where the seconds went."""
    seconds = run.get("seconds")
    if not has_result(run) or len(seconds) > MAX_ROWS:
        return None
    rows = {name: (spent, f"{spent:,.1f} s") for name, spent in seconds.items() if spent >= 0.05}
    if not rows:
        return None
    return Chart(
        bars(rows, "seconds", COLOURS[4]),
        f"Time ledger: {sum(seconds.values()):,.1f} s of all launches. Every second is in one row; "
        "rows below 0.05 s are in the table alone.",
    )


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────
def log_table(run: dict, title: str) -> Table | None:
    """A table of the end of the log, with its figures as they stand there.

    None where it has no row, and where a result of older code does not hold what it says.
    """
    rows_of = train_gpt.END_TABLES.get(title, train_gpt.file_rows)
    try:
        rows = rows_of(run)
    except KeyError:
        return None
    if not rows:
        return None
    header, *lines = train_gpt.titled(title, rows)
    columns = [train_gpt.column_cells([*cells])[0] for cells in zip(*lines, strict=True)]
    return [*header], [[*row] for row in zip(*columns, strict=True)]


def settings(run: dict) -> Table | None:
    """Those that are not the defaults."""
    rows = [[name, str(value)] for name, value in (run.get("non_default") or {}).items()]
    return (["setting", "value"], rows) if rows else None


def machine(run: dict) -> Table | None:
    rows = [[key, str(run[key])] for key in MACHINE if run.get(key) not in (None, {})]
    return (["what", "value"], rows) if rows else None


MACHINE = (
    "device",
    "gpu",
    "world_size",
    "threads_per_rank",
    "dtype",
    "compile",
    "attention",
    "python",
    "torch",
    "cuda",
    "variables",
)


# ── The page ──────────────────────────────────────────────────────────────────────────────────────
class Parts:
    """Makes the parts of a page, and notes those that a strange result keeps from being made."""

    def __init__(self, run: dict):
        self.run = run
        self.notes: list[str] = []

    def make(self, part: Callable, *more):
        """part(run, ...); None where that fails."""
        try:
            return part(self.run, *more)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = " ".join([part.__name__.replace("_", " "), *more])
            problem = f"{type(error).__name__}: {error}"
            self.notes.append(
                f"Not shown: {name} ({problem}). The result holds what no run writes, or "
                "ablation/run_page.py has a mistake."
            )
            return None


def page_of(run: dict) -> str:
    """The page as HTML."""
    parts = Parts(run)
    with styled():
        charts = [parts.make(draw) for draw in (course, stages, effects, speed, sizes, ledger)]
    lead = Lead(
        parts.make(what_ran) or "",
        parts.make(what_came) or "",
        parts.make(toggle_lines) or [],
        parts.make(remarks) or [],
        [chart for chart in charts if chart],
    )
    made = {caption: parts.make(log_table, title) for title, caption in CAPTIONS.items()}
    made["Settings other than the defaults"] = parts.make(settings)
    made["Machine"] = parts.make(machine)
    tables = {caption: table for caption, table in made.items() if table}
    return html_page(f"Run {Path(run['name']).name}", parts.notes, tables, [], lead)


def write_run_page(folder: Path) -> Path:
    """page.html in the folder of a run. Refusal where there is no run."""
    path = folder / "page.html"
    train_gpt.write_atomic(path, page_of(read_run(folder)).encode())
    return path

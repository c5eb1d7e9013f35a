"""The page of one run shows the figures of its records, whatever became of the run.

Would have caught: a page that needs a result and hides what a failed run has told, one that draws
the phases of another clock, a bar that is no figure of result.json, a page wider than its window.
"""

import json
import math
import re
import shutil
from pathlib import Path

import matplotlib.text
import pytest
from browser import layouts, needs_browser
from matplotlib.figure import Figure
from pages_demo import DEMO

import ablate
from ablation import run_page
from ablation.page import styled
from ablation.records import RESULT_SHAPE, run_of
from ablation.run_page import page_of, read_run, write_run_page
from train_gpt import EXIT_CODES, Refusal

RESULT = json.loads((DEMO / "result.json").read_text())
CHARTS = ("course", "stages", "effects", "speed", "sizes", "ledger")


# A result that leaves next to nothing to draw
BARE = {"scores": {"live": RESULT["scores"]["live"]}, "toggles": {}, "seconds": {}, "groups": None}


def copied(place: Path, *names: str, **changes) -> Path:
    """These files of the demo's folder, its result with these changes."""
    for name in names:
        shutil.copy(DEMO / name, place)
    if changes:
        (place / "result.json").write_text(json.dumps(RESULT | changes))
    return place


def figure_of(run: dict, name: str) -> Figure | None:
    with styled():
        chart = getattr(run_page, name)(run)
    return chart and chart.figure


def lines_of(figure: Figure) -> list[list[tuple[float, float]]]:
    """The points of what is drawn as a curve, of each of its axes."""
    return [[*zip(*ax.lines[0].get_data(), strict=True)] for ax in figure.axes]


def bars_of(figure: Figure) -> dict[str, float]:
    (ax,) = figure.axes
    names = [text.get_text() for text in ax.get_yticklabels()]
    return dict(zip(names, (bar.get_width() for bar in ax.patches), strict=True))


@pytest.fixture(scope="module")
def demo() -> dict:
    return read_run(DEMO)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of the demo run."""
    folder = copied(tmp_path_factory.mktemp("demo"), "result.json", "metrics.jsonl", "train.log")
    return write_run_page(folder)


# ── What it says ──────────────────────────────────────────────────────────────────────────────────
def test_the_first_screen_says_what_ran_what_came_and_what_toggles_did(page):
    text = " ".join(re.sub(r"<[^>]*>", " ", page.read_text().partition("Charts</h2>")[0]).split())
    r = RESULT
    for words in (
        f"Trained {r['params']:,} parameters for {r['steps']:,} steps "
        f"in {r['train_seconds']:.1f} s",
        f"on {r['device']}, {r['world_size']} ranks: seed {r['seed']}, code ",
        f"{r['val_bpb']:.6f} bits per byte ({r['scored']}; lower is better) in "
        f"{r['total_bytes']:,} of {r['cap_bytes']:,} bytes; exit code 0: {EXIT_CODES[0]}.",
        *(f"{name}: {row['verdict']} " for name, row in r["toggles"].items()),
        *(f"WARNING: {warning}" for warning in r["warnings"]),
    ):
        assert words in text


def test_the_page_needs_nothing_and_runs_nothing(page):
    text = page.read_text()
    assert "default-src 'none'" in text and "<script" not in text
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*", text) == [] and "@import" not in text


def test_the_tables_are_those_of_the_log(page):
    text = page.read_text()
    for caption in run_page.CAPTIONS.values():
        # the demo may be of code that did not yet name its folder
        assert f"<caption>{caption}</caption>" in text or caption == "Files"
    assert f"{RESULT['scores']['sliding']['bpb']:.6f}</td>" in text
    assert f'class="n">{RESULT["total_bytes"]:,}</td>' in text
    assert f'class="n">{RESULT["seconds"]["train"]:.1f} s</td>' in text


def test_nothing_of_a_result_is_markup(tmp_path):
    toggles = {"<b>": RESULT["toggles"]["QAT"] | {"compared": "<i>"}}
    changes = dict(device="<img src=x>", warnings=["<script>"], toggles=toggles)
    text = page_of(read_run(copied(tmp_path, **BARE | changes)))
    for mark in ("<b>", "<i>", "<img src=x>", "<script>"):
        assert mark not in text and mark.replace("<", "&lt;").replace(">", "&gt;") in text


# ── What it draws ─────────────────────────────────────────────────────────────────────────────────
def events(kind: str) -> list[dict]:
    lines = map(json.loads, (DEMO / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def test_the_curves_are_the_events_and_end_with_the_live_weights(demo):
    figure = figure_of(demo, "course")
    loss, scores = lines_of(figure)
    assert loss == [(event["seconds"], event["loss"]) for event in events("step")]
    seen = [(event["seconds"], event["val_bpb"]) for event in events("val")]
    assert scores == [*seen, (RESULT["train_seconds"], RESULT["live_val_bpb"])]
    said = {text.get_text() for text in figure.axes[0].texts}
    assert said == {"QAT, EMA", "WARMDOWN"}
    begun = {round(event["seconds"], 1) for event in events("phase")}
    for ax in figure.axes:
        assert {line.get_xdata()[0] for line in ax.lines[1:]} == begun


def test_the_speed_is_the_tokens_of_a_step_over_its_time(demo):
    (points,) = lines_of(figure_of(demo, "speed"))
    batch = RESULT["config"]["train_batch_tokens"]
    expected = [(e["seconds"], pytest.approx(batch * 1000 / e["step_ms"])) for e in events("step")]
    assert points == expected


def test_the_bars_are_the_bytes_and_the_seconds_of_the_result(demo):
    sizes = {name: group["bytes"] / 1e6 for name, group in RESULT["groups"].items()}
    assert bars_of(figure_of(demo, "sizes")) == sizes | {"code": RESULT["code_bytes"] / 1e6}
    long = {name: spent for name, spent in RESULT["seconds"].items() if spent >= 0.05}
    assert bars_of(figure_of(demo, "ledger")) == long and len(long) > 5


def test_the_stages_are_the_scores_in_their_order(demo):
    figure = figure_of(demo, "stages")
    (points,) = lines_of(figure)
    bpb = [score["bpb"] for score in RESULT["scores"].values()]
    assert points == [(value, row) for row, value in enumerate(bpb)]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert [label[-8:] for label in labels] == [f"{value:.6f}" for value in bpb]


def test_the_effects_have_their_intervals(demo):
    figure = figure_of(demo, "effects")
    known = {name: row for name, row in RESULT["toggles"].items() if row["effect_interval"]}
    assert len(known) == len(figure.axes) == 6
    for ax, (name, row) in zip(figure.axes, known.items(), strict=True):
        assert ax.get_yticklabels()[0].get_text() == name
        ((low, high),) = ax.collections[0].get_segments()
        assert [low[0], high[0]] == pytest.approx(row["effect_interval"])
        assert ax.get_title("right").endswith(row["verdict"])


def busy_records(folder: Path) -> Path:
    """The demo's records with validation points, and phases that begin close together."""
    lines = []
    for line in (DEMO / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        lines.append(event)
        if event["event"] == "step":
            bpb = 2.2 + math.exp(-event["step"] / 150)
            lines.append(event | {"event": "val", "val_bpb": bpb})
    for name, seconds in (("SWA", 46), ("QNA", 47.5), ("SQWA", 89), ("TTT", 89), ("LATE", 90)):
        lines.append({"event": "phase", "name": name, "seconds": seconds})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    groups = {f"a_long_name_of_a_role_{i}": group for i, group in enumerate(RESULT["groups"])}
    groups = dict(zip(groups, RESULT["groups"].values(), strict=True))
    scores = RESULT["scores"] | {name: RESULT["scores"]["live"] for name in ("documents", "ttt")}
    return copied(folder, "train.log", groups=groups, scores=scores)


@pytest.mark.parametrize("records", ["as committed", "busy"])
@pytest.mark.parametrize("name", ["course", "effects", "ledger"])
def test_no_text_of_a_chart_lies_on_another(name, records, tmp_path):
    figure = figure_of(read_run(busy_records(tmp_path) if records == "busy" else DEMO), name)
    with styled():
        figure.draw_without_rendering()
    boxes = {}
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_visible() and text.get_text():
            boxes[text] = text.get_window_extent()
    ticks = {text for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for text in labels(axis)}
    ours = [text for text in boxes if text not in ticks]
    assert len(ours) >= 3
    for text in ours:
        box = boxes.pop(text)
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
        for other, its_box in boxes.items():
            assert not box.overlaps(its_box), (text.get_text(), other.get_text())


def labels(axis) -> list:
    """The labels of its ticks; of some that are not shown matplotlib keeps the text."""
    return [tick.label1 for tick in axis.get_major_ticks()]


@needs_browser
def test_no_page_is_wider_than_its_window(page, tmp_path):
    long = dict(device="x" * 300, warnings=["y" * 500], artifact_path="/".join(["z" * 50] * 9))
    folder = copied(busy_records(tmp_path), folder="/".join(["z" * 50] * 9), **long)
    views = [(path, width) for path in (page, write_run_page(folder)) for width in (1400, 700)]
    assert [layout[:2] for layout in layouts(views)] == [(0, 0)] * 4


# ── Of runs that have less ────────────────────────────────────────────────────────────────────────
def drawn(run: dict) -> set[str]:
    return {name for name in CHARTS if figure_of(run, name)}


def test_a_run_without_validation_points_has_its_training_loss(tmp_path):
    copied(tmp_path, "result.json")
    lines = (DEMO / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(x for x in lines if '"val"' not in x))
    run = read_run(tmp_path)
    loss, scores = lines_of(figure_of(run, "course"))
    assert len(loss) == len(events("step"))
    assert scores == [(RESULT["train_seconds"], RESULT["live_val_bpb"])]


def test_a_run_without_toggles_has_no_chart_of_them(demo):
    assert drawn(demo | {"toggles": {}}) == {*CHARTS} - {"effects"}


def test_a_run_that_only_scores_says_so(tmp_path):
    none = dict.fromkeys(("steps", "train_seconds", "live_val_bpb", "groups", "codes", "params"))
    scores = {name: RESULT["scores"][name] for name in ("quantised", "sliding")}
    folder = copied(tmp_path, **none, scores=scores, toggles={}, artifact_path="a/artifact.bin")
    run = read_run(folder)
    assert drawn(run) == {"stages", "sizes", "ledger"}
    parts = {"artifact": RESULT["artifact_bytes"] / 1e6, "code": RESULT["code_bytes"] / 1e6}
    assert bars_of(figure_of(run, "sizes")) == parts
    assert run_page.what_ran(run).startswith("Scored a/artifact.bin, trained nothing, on CPU")
    exported = run | dict(steps=707, checkpoint="b/checkpoint.bin")
    assert run_page.what_ran(exported).startswith("Exported and scored b/checkpoint.bin, the wei")


def test_a_run_that_failed_shows_what_there_is(tmp_path):
    run = read_run(copied(tmp_path, "metrics.jsonl", "train.log"))
    assert "at work, or was killed. The log ends with: RESULT" in run_page.what_came(run)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "stopped", "error": "in phase \'train\': OSError: full"}\n')
    run = read_run(tmp_path)
    assert run_page.what_came(run) == "No result: it stopped in phase 'train': OSError: full."
    assert drawn(run) == {"course", "speed"}
    assert run_page.what_ran(run).startswith("run demo: CPU ")
    assert run_page.remarks(run)[0].startswith("settings: DATA_PATH=data/demo")
    (tmp_path / "metrics.jsonl").unlink()
    assert "No result: it is at work" in page_of(read_run(tmp_path))


def test_a_result_of_older_code_has_a_page():
    """Without the compared texts, intervals, folder and limits of today."""
    toggle = {key: RESULT["toggles"]["QAT"][key] for key in RESULT_SHAPE["toggles"]["*"]}
    old = {key: RESULT[key] for key in RESULT_SHAPE} | {"toggles": {"QAT": toggle}}
    run = run_of(old, "old", "", [])
    assert drawn(run) == {"sizes", "ledger"}
    (line,) = run_page.toggle_lines(run)
    assert (line.look, line.before, line.verdict, line.after) == ("open", "QAT:", "acted", "")
    text = page_of(run)
    assert f"{old['val_bpb']:.6f} bits per byte" in text and "Settings other than" in text


@pytest.mark.parametrize(
    "change, lost",
    [
        (dict(limits=7), "log table time"),
        (dict(warnings=7), "remarks"),
        (dict(params="many"), "what ran"),
        (
            dict(toggles={"QAT": RESULT["toggles"]["QAT"] | {"effect_interval": [None, 1]}}),
            "toggle",
        ),
        (dict(toggles={"QAT": RESULT["toggles"]["QAT"] | {"effect": -1e9}}), "effects"),
        (dict(seconds={}, scores=[7]), "log table scores"),
    ],
)
def test_a_figure_that_no_run_writes_costs_its_part_of_the_page_alone(change, lost, tmp_path):
    text = page_of(read_run(copied(tmp_path, **BARE | change)))
    (said, *others) = re.findall(r"<li>Not shown: ([\w ]+)", text)
    assert said.startswith(lost) and len(others) <= 2
    assert "Settings other than" in text and f"{RESULT['total_bytes']:,}</td>" in text


def test_a_mistake_of_the_page_itself_is_not_hidden():
    def ledger(run):
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        run_page.Parts({}).make(ledger)


def test_the_folder_of_the_runs_of_a_study_is_no_run(tmp_path):
    for name in ("results.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text('{"event": "step"}\n')
    words = rf"{tmp_path}: the runs of a study lie here .*give its TOML file, and --out {tmp_path}"
    with pytest.raises(Refusal, match=words):
        write_run_page(tmp_path)
    assert not (tmp_path / "page.html").exists()


def test_report_takes_the_folder_of_a_run_and_refuses_what_is_none(tmp_path, capsys):
    assert ablate.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no run lies here" in line and not [*tmp_path.iterdir()]
    copied(tmp_path, **BARE)
    assert ablate.main(["report", str(tmp_path), "--size", "full"]) == 2
    assert "--size: is of a study" in capsys.readouterr().err
    assert ablate.main(["report", str(tmp_path), "--across-code", "--pair", "a,b"]) == 2
    assert "--pair: is of a study" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    assert ablate.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'}\n"
    (tmp_path / "result.json").write_text('{"val_bpb": NaN}')
    with pytest.raises(Refusal, match="no good JSON"):
        read_run(tmp_path)

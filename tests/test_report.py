"""The report of an ablation: one page that stands alone,
shows what was measured and nothing else, and trusts no file.

Would have caught: a figure that needs the network, a chart of runs that failed, an arm name that
becomes markup, formula or table cell, and a mean that leaves out a seed or counts one twice.
"""

import json
import re
import statistics
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from conftest import ROOT

from ablation.page import (
    Chart,
    curves,
    group,
    html_page,
    journey,
    label,
    measured,
    number,
    quant_gaps,
    seeds,
    sizes,
    spread,
)
from ablation.report import markdown_table

CAPTIONS = {
    "spread": "Final validation loss",
    "journey": "Validation loss (bits per byte) of the same runs",
    "steps": "Learning curves against training steps",
    "seconds": "Learning curves against training seconds",
    "gap": "Quantisation gap",
    "sizes": "Size by",
}
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = [
    "<script>alert(1)</script>",
    "\"' onload=alert(1) x='",
    "a|b",
    "</svg></style>",
    "&lt;b&gt;",
    "$\\frac$ {{ 7 * 7 }}",
    "_hidden",
    "-->",
    "]]>",
]


class Page(HTMLParser):
    """Tags, attributes and texts of a page; `problems` when the tags are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.problems, self.elements, self.texts, self.figures = [], [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.texts.append(data)
        if "figure" in self.open:
            self.figures[-1] += data + "\n"

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def captions(self) -> set:
        """The names of the charts on the page."""
        return {
            name
            for name, begin in CAPTIONS.items()
            for figure in self.figures
            if f"\n{begin}" in figure
        }


def finished(arm: str, seed: int = 0, **changes) -> dict:
    """A run with everything that a chart can show; the numbers depend on the seed alone."""
    bpb = 1.2 + 0.01 * seed
    events = [
        {"event": "phase", "name": "QAT", "step": 10 * seed**2, "seconds": 1.0 * seed},
        {"event": "val", "step": 50, "seconds": 5.0, "val_bpb": 1.5},
        {"event": "step", "step": 50, "seconds": 5.0, "loss": 4.0 + seed},
        {"event": "step", "step": 100, "seconds": 10.0, "loss": 3.0 + seed},
    ]
    scores = {"live": bpb + 0.03, "averaged": bpb + 0.02, "quantised": bpb + 0.04, "sliding": bpb}
    groups = {
        name: {"tensors": 4, "params": 9, "bytes": n}
        for name, n in (("mlp", 6_000_000), ("attention", 2_000_000))
    }
    return (
        dict(
            arm=arm,
            seed=seed,
            events=events,
            steps=100,
            train_seconds=10.0,
            live_val_bpb=bpb + 0.03,
            val_bpb=bpb,
            scored="sliding",
            quant_gap_bpb=0.02 + 0.001 * seed,
            scores={s: {"bpb": v} for s, v in scores.items()},
            groups=groups,
            code_bytes=100_000,
            total_bytes=8_100_000,
            cap_bytes=16_000_000,
        )
        | changes
    )


def sample() -> list[dict]:
    return [finished(arm, seed) for arm in ("baseline", "QAT") for seed in range(3)]


def page(runs, title="An ablation", notes=("a note",), tables=None) -> Page:
    return Page(
        html_page(
            title,
            list(notes),
            tables or {"Results": (["arm", "bpb"], [["baseline", 1.2], ["QAT", None]])},
            runs,
        )
    )


def made_of(texts: list[str]) -> Page:
    """A page with these texts in every place that takes text from a file."""
    runs = [finished(text) for text in texts] + [
        finished("QAT", scored=texts[0], groups={t: {"bytes": 9} for t in texts})
    ]
    runs += [{"arm": text, "seed": text, "failed": text} for text in texts]
    runs[0]["events"] += [
        {"event": "phase", "name": text, "step": 1, "seconds": 1} for text in texts
    ]
    return page(runs, texts[0], texts, {text: ([text], [[text]]) for text in texts})


@pytest.fixture(scope="module")
def hostile() -> Page:
    return made_of(HOSTILE)


def only(chart: Chart) -> matplotlib.axes.Axes:
    return chart.figure.axes[0]


# ── The page ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "runs",
    [[], sample(), [{"arm": "x", "seed": 1, "failed": "exit 5"}]],
    ids=["none", "some", "failed"],
)
def test_the_page_is_well_formed(runs):
    assert page(runs).problems == []


def test_the_walk_finds_what_is_not_balanced():
    assert [
        bool(Page(text).problems)
        for text in ("<p><b></b></p>", "<p><b></p></b>", "<p>", "</p>", "<br>")
    ] == [False, True, True, True, False]


def test_the_page_names_its_encoding_and_has_title_and_notes():
    p = page([], "My title", ["first note", "second note"])
    assert ("meta", {"charset": "utf-8"}) in p.elements and p.text.count("My title") == 2
    assert {"first note", "second note"} <= set(p.texts)


def test_nothing_is_loaded_from_elsewhere():
    text = html_page("t", [], {}, sample())
    p = Page(text)
    assert re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)) == []
    assert {tag for tag, _ in p.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "image",
        "base",
    } == set()
    targets = [
        v
        for _, attrs in p.elements
        for k, v in attrs.items()
        if k in ("src", "href", "xlink:href", "srcset", "data")
    ]
    assert targets and all(target.startswith("#") for target in targets)
    assert "@import" not in text and re.findall(r"url\((?!#)", text) == []


def test_two_calls_give_the_same_page():
    assert html_page("t", ["n"], {}, sample()) == html_page("t", ["n"], {}, sample())


def test_an_id_stands_once_and_every_reference_has_one():
    text = html_page("t", [], {}, sample())
    ids = [attrs["id"] for _, attrs in Page(text).elements if "id" in attrs]
    assert ids and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', text)) == set(ids)


def test_text_in_charts_stays_text():
    shown = page(sample()).figures
    assert all("baseline\n" in figure for figure in shown) and any(
        "bits per byte" in figure for figure in shown
    )


def test_settings_of_matplotlib_are_left_alone():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = repr(matplotlib.rcParams)
        html_page("t", [], {}, [finished("a")])
        assert repr(matplotlib.rcParams) == before


def test_tables_show_their_cells_and_numbers_stand_right():
    p = page(
        [],
        tables={
            "Results": (
                ["arm", "bpb"],
                [["baseline", "1.2345 ± 0.0010"], ["QAT 6", None], ["-", 1337]],
            )
        },
    )
    assert {"Results", "arm", "bpb", "baseline", "1.2345 ± 0.0010", "QAT 6", "1337"} <= set(p.texts)
    assert p.texts.count("-") == 2  # one is None
    assert [attrs.get("class") for tag, attrs in p.elements if tag == "td"] == [
        None,
        "n",
        None,
        "n",
        None,
        "n",
    ]


# ── Text from files ───────────────────────────────────────────────────────────────────────────────
def test_hostile_text_adds_no_element_and_no_attribute(hostile):
    def kinds(p: Page) -> list:
        return sorted({(tag, name) for tag, attrs in p.elements for name in ("", *attrs)})

    friendly = made_of([f"text {i}" for i in range(len(HOSTILE))])
    assert kinds(hostile) == kinds(friendly) and hostile.problems == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(hostile, text):
    assert (
        hostile.texts.count(text) >= 7
    )  # note; caption, header and cell of its table; arm, seed and reason of a failure
    assert [text in figure for figure in hostile.figures] == [True] * len(CAPTIONS)


def test_hostile_text_is_escaped_in_the_source():
    source = html_page(
        HOSTILE[0], HOSTILE, {}, [finished(HOSTILE[0]), {"arm": "x", "failed": HOSTILE[0]}]
    )
    assert "<script" not in source and "alert(1)" in source


@pytest.mark.filterwarnings("ignore:Glyph")  # the reader's font has it
def test_any_string_can_name_an_arm():
    texts = ["\x1b[31mred\x00", "\ud800", "line\nbreak", "\ufffe", "", "名前", "x" * 500]
    runs = [run for text in texts for run in (finished(text), {"arm": text, "failed": text})]
    p = page(runs)
    assert p.problems == [] and p.captions == set(CAPTIONS) and p.text.encode()


def test_labels_are_short_and_say_where_they_are_cut():
    lines = label("QUANT_BITS_MLP=5 " * 40).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 44 and lines[-1].endswith("…")
    assert label("baseline") == "baseline"


# ── Which charts ──────────────────────────────────────────────────────────────────────────────────
def test_every_chart_is_there_when_its_data_are():
    p = page(sample())
    assert p.captions == set(CAPTIONS) and len(p.figures) == len(CAPTIONS)


@pytest.mark.parametrize(
    "without, missing",
    [
        (["val_bpb"], {"spread"}),
        (["scores", "val_bpb"], {"spread", "journey"}),
        (["quant_gap_bpb"], {"gap"}),
        (["groups"], {"sizes"}),
        (["events"], {"steps", "seconds"}),
    ],
    ids=lambda value: ",".join(sorted(value)),
)
def test_a_chart_is_absent_without_its_data(without, missing):
    """In one run these are None, in the other they are gone."""
    none = {k: None if k in without else v for k, v in finished("a").items()}
    gone = {k: v for k, v in finished("b").items() if k not in without}
    assert page([none, gone]).captions == set(CAPTIONS) - missing


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text", {}, []], ids=repr)
def test_one_bad_value_does_not_break_the_page(value):
    keys = sorted(set(finished("a")) - {"arm", "events", "groups", "scores"})
    p = page([finished("baseline"), *(finished(f"odd {key}") | {key: value} for key in keys)])
    assert (
        p.problems == []
        and p.captions == set(CAPTIONS)
        and all(f"odd {key}" in p.text for key in keys)
    )
    assert [
        v for _, attrs in p.elements for v in attrs.values() if re.search(r"\b(nan|inf)\b", v or "")
    ] == []


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), "1", [1], {"y": 1}], ids=repr)
def test_what_is_no_finite_number_is_missing(value):
    assert number({"x": value}, "x") is None and number({"x": {"y": 0}}, "x", "y") == 0
    assert number(value, "x", "y") is None


def test_a_seed_without_a_number_is_not_counted():
    chart = spread(group([finished("a"), finished("a", 2), finished("a", 1, val_bpb=float("nan"))]))
    assert "n = 2 seeds" in chart.caption and only(chart).lines[0].get_xdata().tolist() == [
        1.2,
        1.22,
    ]


def test_a_run_that_only_has_a_name_is_in_no_chart():
    p = page([finished("baseline"), {"arm": "bare"}])
    assert p.captions == set(CAPTIONS) and not any("bare" in figure for figure in p.figures)


def test_failed_runs_are_listed_and_not_plotted():
    p = page([*sample(), finished("broken", 7, failed="exit 5: loss is nan")])
    assert {"broken", "7", "exit 5: loss is nan"} <= set(p.texts)
    assert not any("broken" in figure for figure in p.figures)


def test_without_failed_runs_there_is_no_list_of_them():
    assert "Failed" not in page(sample()).text


def test_the_committed_demo_run_is_charted():
    demo = ROOT / "logs" / "demo"
    events = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    p = page([json.loads((demo / "result.json").read_text()) | {"arm": "demo", "events": events}])
    assert p.problems == [] and p.captions >= {"spread", "journey", "steps", "seconds", "gap"}
    assert any("WARMDOWN" in figure for figure in p.figures)


# ── What they show ────────────────────────────────────────────────────────────────────────────────
def test_captions_count_the_seeds():
    runs = [*sample(), finished("one")]
    rows = [measured(group(some), lambda run: run["seed"]) for some in (runs, runs[:6], runs[6:])]
    assert [seeds(some) for some in rows] == [
        "n = 1 to 3 seeds per arm",
        "n = 3 seeds per arm",
        "n = 1 seed per arm",
    ]
    assert all(" per arm" in figure for figure in page(runs).figures)


def test_twelve_arms_look_different():
    looks = {(arm.colour, arm.line) for arm in group([finished(str(i)) for i in range(12)])}
    assert len(looks) == 12


def panels(runs: list[dict], key: str = "step", end: str = "steps") -> list:
    """The axes of the learning curves."""
    return curves(group(runs), key, end, "training steps").figure.axes


def data_of(ax) -> list:
    """The points of each line."""
    return [line.get_xydata().tolist() for line in ax.lines]


def test_a_curve_is_the_mean_of_the_seeds_and_each_of_them():
    training = data_of(panels(sample())[0])
    seeds_ = [[[50, 4.0 + seed], [100, 3.0 + seed]] for seed in range(3)]
    assert training == [[[50, 5.0], [100, 4.0]], *seeds_] * 2


def test_a_curve_of_validation_ends_with_the_live_weights():
    validation = data_of(panels(sample())[1])
    seeds_ = [[[50, 1.5], [100, 1.23 + 0.01 * seed]] for seed in range(3)]
    assert validation[1:4] == [pytest.approx(line) for line in map(np.array, seeds_)]


def test_training_is_drawn_where_nothing_was_validated():
    runs = [finished("a", seed, live_val_bpb=None) for seed in range(2)]
    for run in runs:
        run["events"] = [event for event in run["events"] if event["event"] == "step"]
    chart = curves(group(runs), "seconds", "train_seconds", "training seconds")
    assert [ax.get_ylabel() for ax in chart.figure.axes] == ["training loss (nats per token)"]
    assert data_of(only(chart))[0] == [[5, 4.5], [10, 3.5]]
    assert "validation" not in chart.caption and "n = 2 seeds" in chart.caption


def test_the_score_at_the_end_alone_is_no_curve():
    run = finished("a")
    run["events"] = [event for event in run["events"] if event["event"] == "step"]
    assert [ax.get_ylabel() for ax in panels([run])] == ["training loss (nats per token)"]


def test_the_mean_of_a_curve_is_of_the_steps_that_all_seeds_have():
    short = finished("a", 1)
    short["events"] = [event for event in short["events"] if event["step"] < 100]
    training = data_of(panels([finished("a"), short])[0])
    assert training == [[[50, 4.5]], [[50, 4.0], [100, 3.0]], [[50, 5.0]]]


def test_many_arms_have_no_line_per_seed():
    runs = [finished(str(arm), seed) for arm in range(9) for seed in range(2)]
    assert [len(panels(some)[0].lines) for some in (runs, runs[2:])] == [9, 24]


def test_the_legend_names_arms_that_share_a_training():
    shared = finished("ema", checkpoint="runs/plain-s0/checkpoint.bin", events=[])
    odd = finished("odd", checkpoint={"x": 1})
    chart = curves(group([finished("plain"), shared, odd]), "step", "steps", "training steps")
    texts = [text.get_text() for text in chart.figure.legends[0].get_texts()]
    assert texts == ["plain\nalso ema", "odd"]


def test_the_scale_of_a_curve_is_not_that_of_its_first_steps():
    late = [
        {"event": "val", "step": step, "seconds": step, "val_bpb": bpb}
        for step, bpb in ((0, 4.1), (50, 1.3))
    ]
    low, high = panels([finished("a", events=late)])[0].get_ylim()
    assert 1.2 < low < 1.23 and 1.3 < high < 1.4


def test_phases_are_marked_at_their_median():
    chart = curves(group(sample()), "step", "steps", "training steps")
    marks = chart.figure.axes[2].collections
    assert [label.get_text() for label in chart.figure.axes[2].get_yticklabels()] == ["QAT"]
    assert [mark.get_segments()[0][0][0] for mark in marks] == [
        10,
        10,
    ]  # two arms, seeds at 0, 10 and 40


def test_without_phases_there_is_no_strip():
    run = finished("a")
    run["events"] = run["events"][1:]
    chart = curves(group([run]), "step", "steps", "training steps")
    assert len(chart.figure.axes) == 2 and "Below" not in chart.caption


def test_the_journey_shows_the_mean_of_the_stages_that_were_scored():
    runs = [
        finished("a", 0),
        finished("a", 2),
        finished("b", scores={"quantised": {"bpb": 1.3}, "averaged": None}),
    ]
    ax = only(journey(group(runs)))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "live",
        "averaged",
        "quantised",
        "sliding",
    ]
    assert ax.lines[2].get_xdata().tolist() == [0, 1, 2, 3]
    assert ax.lines[2].get_ydata().tolist() == pytest.approx([1.24, 1.23, 1.25, 1.21])
    assert ax.lines[4].get_xydata().tolist() == [
        [2, 1.3],
        [3, 1.2],
    ]  # the result stands in for its score


def test_the_gap_is_a_dot_per_seed_and_a_bar_to_their_mean():
    ax = only(quant_gaps(group(sample())))
    assert ax.lines[0].get_xdata().tolist() == [0.02, 0.021, 0.022]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.021, 0.021])


def test_the_bars_of_the_sizes_stack_up_to_groups_and_code():
    other = finished("b", groups={"bigram": {"bytes": 1_000_000}}, total_bytes=None)
    ax = only(sizes(group([finished("a", total_bytes=8_200_000), other])))
    ends = {}
    for bar in ax.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(ends.get(row, 0))
        ends[row] = bar.get_x() + bar.get_width()
    assert ends == pytest.approx({0: 8.1, 1: 1.1})
    assert ax.lines[0].get_xdata().tolist() == pytest.approx([8.2, 1.1])


@pytest.mark.parametrize(
    "total, drawn", [(7_999_999, False), (8_000_000, True), (17_000_000, True)]
)
def test_the_cap_is_drawn_when_it_is_near(total, drawn):
    chart = sizes(group([finished("a", total_bytes=total)]))
    texts = [text.get_text() for text in chart.figure.legends[0].get_texts()]
    assert ("cap: 16,000,000 bytes" in texts) == drawn


def test_the_spread_is_mean_and_sample_deviation():
    ax = only(spread(group(sample())))
    segment = ax.containers[0].lines[2][0].get_segments()[0]
    values = [1.2, 1.21, 1.22]
    assert ax.lines[0].get_xdata().tolist() == pytest.approx(values)
    assert segment[:, 0].tolist() == pytest.approx(
        [1.21 - statistics.stdev(values), 1.21 + statistics.stdev(values)]
    )


def test_one_seed_has_no_whiskers():
    assert not only(spread(group([finished("a")]))).containers[0].has_xerr


def test_the_spread_says_when_arms_are_not_scored_alike():
    alike, mixed = (
        spread(group([finished("a"), finished("b", scored=mode)])) for mode in ("sliding", "ttt")
    )
    assert "scored: sliding" in alike.caption and "not scored alike" in mixed.caption
    assert [[t.get_text() for t in only(chart).get_yticklabels()] for chart in (alike, mixed)] == [
        ["a", "b"],
        ["a\n(scored: sliding)", "b\n(scored: ttt)"],
    ]


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────────
def test_a_markdown_table():
    assert markdown_table(["arm", "bpb"], [["baseline", 1.5], ["QAT", None]]) == (
        "| arm | bpb |\n| --- | --- |\n| baseline | 1.5 |\n| QAT | - |"
    )


@pytest.mark.parametrize("text", [*HOSTILE, "a\nb\r\nc", "ends in \\", "\\|", "\\\\|"])
def test_a_markdown_cell_stays_one_cell(text):
    lines = markdown_table(["x", "y"], [[text, "next"]]).split("\n")
    cells = re.findall(r"(?:\\.|[^\\|])+", lines[2])
    assert len(lines) == 3 and len(cells) == 2 and cells[1].strip() == "next"
    shown = re.sub(r"\\([\\|<])", r"\1", cells[0].strip().replace("<br>", "\n"))
    assert shown == "\n".join(text.splitlines()) and not re.search(r"(?<!\\)<(?!br>)", cells[0])

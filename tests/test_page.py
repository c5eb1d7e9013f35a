"""The page of a study: what it answers, and how a browser lays it out.

Would have caught: a verdict that its interval does not allow, a record rule drawn for another
text, an interaction with its factors exchanged, and a table that reaches beyond the page.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from browser import layouts, needs_browser
from conftest import ROOT
from matplotlib.axes import Axes

from ablation.answers import (
    Answer,
    Compared,
    answer,
    compare_sides,
    forest,
    interaction,
    interactions,
    scale_of,
    sentence,
    tally,
)
from ablation.page import group, journey, laid_out, quant_gaps
from ablation.report import (
    Finished,
    answers_of,
    lead_of,
    margin_of,
    remarks,
    scale_of_answers,
    study_page,
)
from ablation.statistics import factorial, holm, paired
from ablation.study import matrix, read_study, with_pairs

BPB = scale_of("final", "BPB", 5)


# ── Studies to look at ────────────────────────────────────────────────────────────────────────────
def study_of(folder, text: str, failed: dict | None = None, bpb=None, **changes) -> Finished:
    """A study with a run for each trial, made from a committed result.

    bpb: (arm, seed) -> score.
    """
    path = folder / "study.toml"
    path.write_text(text)
    made = matrix(read_study(path), "small", "steps")
    result = json.loads((ROOT / "logs/submission/result_seed1.json").read_text())
    runs: dict = {}
    for trial in made.trials:
        if trial.id in (failed or {}):
            continue
        score = bpb(trial.arm, trial.seed) if bpb else 2.5
        events = [
            {"event": "step", "step": step, "seconds": step / 10, "loss": 9 - step / 20}
            for step in (20, 40, 60)
        ]
        run = result | {"arm": trial.arm, "seed": trial.seed, "events": events, "val_bpb": score}
        runs.setdefault(trial.arm, {})[trial.seed] = run | changes
    return Finished(made, runs, failed or {})


SIZE = "[size.small]\nsteps = 60\nseconds = 6\n"


def crowded() -> str:
    """A study of ten arms with long names and long words, and twelve more figures to show."""
    shown = [f"toggles.A_LONG_NAME_OF_A_TOGGLE_{i}.cost_ms" for i in range(12)]
    lines = [f"question = {'Why? ' * 40 + 'w' * 300!r}", f"title = {'title' * 30!r}"]
    lines += [f"seeds = [1, 2]\nshow = {shown}", SIZE]
    for i in range(10):
        name = f"arm_{i}_" + ("x" * 100 if i % 3 == 0 else "with.many=words-" * (i % 4))
        lines.append(f'[arm."{name.strip("-")}"]\nMATRIX_LR = {0.01 + i / 1000}')
        lines.append(f'FP16_KEEP_NAME_PATTERNS = "{"pattern" * 20}"')
        lines.append(f'expect = "{"much " * 20}"')
    return "\n".join(lines)


FACTORIAL = f"""
question = "Does it?"
seeds = [1, 2, 3]
compare = [["qat-1_average-none", "qat-1_average-swa"]]
{SIZE}
[env]
SWA_ENABLED = 1
EMA_ENABLED = 1
[factorial]
qat = [0, 1]
average = ["none", "swa", "ema"]
"""
ARMS = f"""
question = "Does it?"
seeds = [1, 2, 3]
metrics = ["val_bpb", "steps"]
compare = [["b", "c"], ["b:scores.live.bpb", "b:scores.quantised.bpb"]]
{SIZE}
[arm.a]
[arm.b]
MATRIX_LR = 0.01
[arm.c]
MATRIX_LR = 0.03
"""


def by_arm(**scores):
    """A score for each arm, that the seeds move alike but for the arm b."""
    return lambda arm, seed: scores[arm] + 0.1 * seed + 0.001 * seed * (arm == "b")


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("arms")
    return study_of(folder, ARMS, bpb=by_arm(a=1.0, b=1.0, c=0.9))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> tuple[Finished, Path]:
    """The crowded study with a failed trial, and its page."""
    folder = tmp_path_factory.mktemp("crowd")
    failed = {f"{'arm_3_' + 'x' * 100}-s1": "FAILED (exit 5): " + "reason" * 40}
    found = study_of(folder, crowded(), failed, lambda arm, seed: 2 + len(arm) / 1e3 + seed)
    path = folder / "page.html"
    path.write_text(study_page(found), "utf-8")
    return found, path


# ── Sentences ─────────────────────────────────────────────────────────────────────────────────────
def moved(*differences: float) -> tuple[dict, dict]:
    """Scores of two arms that differ so, seed by seed."""
    return dict.fromkeys(range(len(differences)), 1.0), dict(
        enumerate(1.0 + difference for difference in differences)
    )


def of(*differences: float, sides=({"arm": "a"}, {"arm": "b"})) -> Answer:
    return answer(sides, compare_sides(("a", "b"), ("val_bpb", "val_bpb"), *moved(*differences)))


def text(found: Answer, scale=BPB) -> str:
    line = sentence(found, scale)
    return f"{line.before} [{line.verdict}] {line.after}"


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        # mean 12, half of the interval t(0.975, 2) 2 / sqrt(3) = 4.97, in mBPB
        (
            (-0.010, -0.012, -0.014),
            "b is [12.0 mBPB lower] than a (95 % interval 7.0 to 17.0 lower, 3 seeds).",
        ),
        (
            (0.010, 0.012, 0.014),
            "b is [12.0 mBPB higher] than a (95 % interval 7.0 to 17.0 higher, 3 seeds).",
        ),
        (
            (-0.001, 0.001, 0.003),
            "b is [not distinguishable] from a: between 4.0 mBPB lower and 6.0 higher "
            "(95 % interval, 3 seeds).",
        ),
        ((0.5, 0.5), "b is [500.0 mBPB higher] than a (no spread between 2 seeds)."),
        ((0.0, 0.0), "b is [the same] as a in each of 2 seeds."),
        (
            (0.01,),
            "b and a are [not compared] (seeds in common: 1, and a paired test needs 2).",
        ),
        (
            (-1e-6, -1.2e-6, -1.4e-6),
            "b is [0.0012 mBPB lower] than a (95 % interval 0.0007 to 0.0017 lower, 3 seeds).",
        ),
    ],
)
def test_a_sentence_says_what_the_interval_allows(differences, words):
    assert text(of(*differences)) == words


def test_a_sentence_has_the_unit_of_its_metric():
    assert "[12.00 ms higher] than a" in text(of(11, 12, 13), scale_of("step", "ms", 2))


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (({"x": "x 0", "y": "y 0"}, {"x": "x 0", "y": "y 1"}), "x 0: y 1 is ... than y 0"),
        (({"x": "x 0", "y": "y 0"}, {"x": "x 1", "y": "y 1"}), "x 1, y 1 is ... than x 0, y 0"),
        (({"arm": "a"}, {"x": "x 1", "y": "y 1"}), "x 1, y 1 is ... than a"),
        (({"arm": "a"}, {"arm": "a"}), "a is ... than a"),
    ],
)
def test_a_sentence_names_what_differs_and_what_is_alike(sides, words):
    line = sentence(of(0.1, 0.1, sides=sides), BPB)
    assert f"{line.before} ... {line.after}".startswith(words)


def test_the_summary_counts_the_verdicts():
    answers = [of(-0.1, -0.1), of(0.1, 0.1), of(0.2, 0.2), of(-1, 1), of(0, 0), of(0.1)]
    assert tally(answers, BPB) == (
        "6 comparisons of final BPB (lower is better): 1 lower, 2 higher, 1 not distinguishable, "
        "1 the same, 1 not compared."
    )
    assert tally(answers[:1], scale_of("steps", "", 0)) == "1 comparison of steps: 1 lower."
    assert tally([], BPB) == "Nothing can be compared yet."


def test_an_interaction_is_how_much_an_effect_depends_on_a_level():
    """Effects by hand: w - u is 2 with p, and 2 + 5, 2 + 7 with q; v - u is 1 with both."""
    cells = {levels: dict(scores) for levels, scores in CELLS.items()}
    cells["q", "w"] = {1: cells["q", "w"][1] + 5, 2: cells["q", "w"][2] + 7}
    contrasts = []
    for one in factorial(cells, FACTORS):
        contrasts.append(Compared(("", one.term), ("steps", "steps"), {}, {}, one))
    found = interactions(FACTORS, contrasts)
    assert [text(one, scale_of("steps", "", 0)) for one in found] == [
        "interaction: y v − u with x q is [the same] as that with x p in each of 2 seeds.",
        "interaction: y w − u with x q is [not distinguishable] from that with x p: between 7 lower"
        " and 19 higher (95 % interval, 2 seeds).",
    ]
    assert interactions({"y": ["u", "v"]}, contrasts[:1]) == interactions(FACTORS, []) == []


def test_the_first_screen_of_a_factorial_ends_with_its_interactions(tmp_path):
    found = study_of(tmp_path, FACTORIAL, bpb=lambda arm, seed: sum(map(ord, arm)) + seed)
    lines = lead_of(found).lines
    assert [line.before for line in lines[-2:]] == [
        "interaction: average swa − none with qat 1 is",
        "interaction: average ema − none with qat 1 is",
    ]
    assert len(lines) == len(answers_of(found)) + 2


# ── The first screen ──────────────────────────────────────────────────────────────────────────────
def test_the_answers_stand_in_the_order_of_the_study(arms):
    found = [(one.b, one.a, one.both) for one in answers_of(arms)]
    assert found == [
        ("b", "a", "final"),
        ("c", "a", "final"),
        ("c", "b", "final"),
        ("quantised", "live", "b"),
    ]
    assert tally(answers_of(arms), scale_of_answers(arms)).startswith("4 comparisons of BPB (lower")


@pytest.mark.parametrize("pair", ["a:live_val_bpb,b", "a,b:live_val_bpb"])
def test_a_side_without_a_figure_has_that_of_the_other(arms, pair):
    asked = replace(arms, matrix=with_pairs(arms.matrix, [pair]))
    (found,) = [one for one in answers_of(asked) if "live" in one.both]
    assert (found.a, found.b, found.both) == ("a", "b", "live")


def test_answers_in_one_figure_name_it_once(tmp_path):
    text = ARMS.replace(', ["b:scores.live.bpb", "b:scores.quantised.bpb"]', "")
    found = study_of(tmp_path, text, bpb=by_arm(a=1.0, b=1.0, c=0.9))
    assert [one.both for one in answers_of(found)] == [""] * 3
    assert lead_of(found).summary.startswith("3 comparisons of final BPB")


def test_the_answers_of_a_factorial_name_its_levels(tmp_path):
    found = study_of(tmp_path, FACTORIAL, bpb=lambda arm, seed: sum(map(ord, arm)) + seed)
    answers = answers_of(found)
    assert (answers[0].b, answers[0].a, answers[0].both) == ("average swa", "average none", "qat 0")
    assert (answers[3].b, answers[3].both) == ("qat 1, average swa", "")
    assert (answers[5].b, answers[5].both) == ("average swa", "qat 1")


def test_the_first_screen_is_question_answers_and_forest_plot(crowd):
    found, path = crowd
    page = path.read_text("utf-8")
    places = [
        page.index(words)
        for words in (
            "Why? Why?",
            "9 comparisons of final BPB (lower is better): ",
            "<strong>85.0 mBPB lower</strong> than arm_0_xxx",
            "FAILED, and in no figure: arm_3_xxx",
            "<svg",
            "Differences in final BPB, paired by seed",
            "<h2>Charts</h2>",
            "Learning curves",
            "<h2>Tables</h2>",
        )
    ]
    assert places == sorted(places) and len(found.matrix.arms) == 10


def test_a_failed_trial_and_one_not_run_stand_on_the_first_screen(arms):
    runs = {"a": arms.runs["a"]}
    lead = lead_of(Finished(arms.matrix, runs, {"b-s1": "exit 5"}))
    assert lead.remarks == [
        "FAILED, and in no figure: b-s1.",
        "NOT RUN YET: c-s1, b-s2, c-s2, b-s3, c-s3.",
    ]
    assert lead.summary == "Nothing can be compared yet." and lead.charts == []


MANY = f"""
seeds = [1, 2, 3]
metrics = ["val_bpb", "steps"]
{SIZE}
[arm.plain]
""" + "".join(f"[arm.a{i}]\nMATRIX_LR = 0.{20 + i}\n" for i in range(1, 12))


def test_a_difference_that_falls_by_holm_says_so_in_sentence_summary_and_chart(tmp_path):
    """a1 differs by far, a2 barely, the others not at all."""

    def score(arm, seed):
        noise = {"a1": 1e-5, "a2": 0.002, "plain": 0.0}.get(arm, 0.02) * (seed - 2)
        return 2 + {"a1": 0.1, "a2": 0.01}.get(arm, 0.001) * (arm != "plain") + noise

    found = study_of(tmp_path, MANY, bpb=score)
    answers = {one.b: one for one in answers_of(found)}
    p = [paired(found.values("plain", "val_bpb"), found.values(b, "val_bpb")).p for b in answers]
    assert p[1] < 0.05 < holm(p)[1] and holm(p)[0] < 0.05
    lead = lead_of(found)
    after = {line.before: line.after for line in lead.lines}
    assert after["a2 is"].endswith("3 seeds); by Holm (of 22) not distinguishable.")
    assert [line for line in lead.lines if "Holm" in line.after] == [lead.lines[1]]
    assert lead.summary.endswith(
        ": 2 higher, 9 not distinguishable; by Holm (of 22) 1 of these not distinguishable either."
    )
    texts = [text.get_text() for text in lead.charts[0].figure.axes[1].get_yticklabels()]
    assert [text.endswith(" *") for text in texts] == [False, True] + [False] * 9
    assert "*: by Holm" in lead.charts[0].caption


@pytest.mark.parametrize(
    ("metrics", "falls"),
    [(["val_bpb", "live_val_bpb", "steps"], True), (["val_bpb"], False)],
    ids=["30 comparisons", "10 comparisons"],
)
def test_an_interaction_that_falls_by_holm_says_so(tmp_path, metrics, falls):
    def score(arm, seed):
        return 2 + (arm == "qat-1_average-swa") * (0.01 + 0.002 * (seed - 2))

    alone = FACTORIAL.replace('compare = [["qat-1_average-none", "qat-1_average-swa"]]', "")
    study = f"metrics = {metrics}\n{alone}"
    line = lead_of(study_of(tmp_path, study, bpb=score)).lines[-2]
    assert line.verdict == "10.0 mBPB higher"
    assert line.after.endswith("; by Holm (of 30) not distinguishable.") == falls


# ── Forest plot ───────────────────────────────────────────────────────────────────────────────────
def axes(chart) -> Axes:
    return chart.figure.axes[0]


def xs(line) -> list:
    return list(line.get_xdata())


def test_a_row_of_the_forest_plot_is_seeds_interval_and_mean():
    found = of(-0.010, -0.012, -0.014)
    dots, interval, mean = axes(forest([of(0.1, 0.1), found], BPB, 0.0)).lines[3:6]
    assert xs(dots) == pytest.approx([-10, -12, -14])
    assert xs(interval) == pytest.approx([1000 * found.test.low, 1000 * found.test.high])
    assert xs(mean) == pytest.approx([-12]) and list(mean.get_ydata()) == [1]


def test_verdicts_differ_in_shape_and_in_text():
    chart = forest([of(-0.1, -0.1), of(0.1, 0.1), of(-0.1, 0.1)], BPB, 0.0)
    assert [line.get_marker() for line in axes(chart).lines[2:9:3]] == ["v", "^", "o"]
    texts = [text.get_text() for text in chart.figure.axes[1].get_yticklabels()]
    assert texts[:2] == ["−100.0 (−100.0 to −100.0)", "+100.0 (+100.0 to +100.0)"]
    words = [text.get_text() for text in chart.figure.legends[0].get_texts()]
    assert words == ["lower", "higher", "not distinguishable", "one seed"]


def test_the_record_rule_is_drawn_where_this_text_has_it(arms):
    run = arms.all()[0]
    margin = 0.005 / math.log(2) * run["val_tokens"] / run["val_bytes"]
    chart = lead_of(arms).charts[0]
    place = [xs(line) for line in axes(chart).lines if line.get_linestyle() == "--"]
    assert place == [pytest.approx([-1000 * margin] * 2)]
    words = f"record rule: {1000 * margin:.1f} mBPB lower"
    assert words in [text.get_text() for text in chart.figure.legends[0].get_texts()]


def test_a_record_rule_far_away_is_said_and_not_drawn():
    chart = forest([of(-1e-5, 1e-5)], BPB, 0.0032)
    assert "here 3.2 mBPB lower, which is outside of this chart" in chart.caption
    assert not [line for line in axes(chart).lines if line.get_linestyle() == "--"]
    low, _ = axes(chart).get_xlim()
    assert low > -1


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("val_bpb", True),
        ("scores.live.bpb", True),
        ("quant_gap_bpb", False),
        ("steps", False),
        ("scores.sliding.seconds", False),
        ("scores.sliding.loss", False),
    ],
)
def test_the_record_rule_is_for_scores_alone(arms, name, drawn):
    assert (margin_of(arms, name) > 0) == drawn


def test_long_names_of_a_comparison_share_its_row():
    sides = ({"arm": "a" * 100}, {"arm": "b" * 100})
    chart = forest([of(0.1, 0.1, sides=sides)], BPB, 0.0)
    (label,) = axes(chart).get_yticklabels()
    lines = label.get_text().split("\n")
    assert lines[0].startswith("bbb") and lines[2].startswith("− a") and len(lines) == 4


# ── Interactions ──────────────────────────────────────────────────────────────────────────────────
CELLS = {
    (x, y): {seed: 10 * i + j + 100 * seed for seed in (1, 2)}
    for i, x in enumerate("pq")
    for j, y in enumerate("uvw")
}
FACTORS = {"x": ["p", "q"], "y": ["u", "v", "w"]}


def means_of(ax: Axes) -> dict[str, list[float]]:
    """Line -> its means, of an interaction plot."""
    return {bar.get_label(): list(bar.lines[0].get_ydata()) for bar in ax.containers}


def test_an_interaction_is_a_line_per_level_over_the_factor_with_more():
    chart = interaction(CELLS, FACTORS, "final BPB")
    assert [tick.get_text() for tick in axes(chart).get_xticklabels()] == ["u", "v", "w"]
    assert means_of(axes(chart)) == {"x p": [150, 151, 152], "x q": [160, 161, 162]}
    (low, high), *_ = axes(chart).containers[0].lines[2][0].get_segments()
    # t(0.975, 1) = 12.706 times the standard error of 110 and 210
    assert (high - low)[1] == pytest.approx(2 * 12.7062047 * 50)


def test_three_factors_have_a_panel_per_pair_over_the_mean_of_the_third():
    cells = {
        (*levels, z): {seed: value + 1000 * k for seed, value in scores.items()}
        for levels, scores in CELLS.items()
        for k, z in enumerate("gh")
    }
    chart = interaction(cells, FACTORS | {"z": ["g", "h"]}, "final BPB")
    drawn = [(ax.get_xlabel(), means_of(ax)) for ax in chart.figure.axes]
    assert drawn == [
        ("y", {"x p": [650, 651, 652], "x q": [660, 661, 662]}),
        ("y", {"z g": [155, 156, 157], "z h": [1155, 1156, 1157]}),
        ("x", {"z g": [151, 161], "z h": [1151, 1161]}),
    ]


def test_one_factor_has_one_line():
    cells = {(level,): {1: i, 2: i + 2} for i, level in enumerate("uvw")}
    chart = interaction(cells, {"y": ["u", "v", "w"]}, "final BPB")
    assert list(means_of(axes(chart)).values()) == [[1, 2, 3]]
    assert axes(chart).get_legend() is None and "interaction" not in chart.caption


def test_a_factorial_with_a_missing_cell_has_no_interaction_plot():
    assert interaction({k: v for k, v in CELLS.items() if k != ("p", "u")}, FACTORS, "x") is None
    assert interaction({}, {}, "x") is None


# ── Nothing quantised ─────────────────────────────────────────────────────────────────────────────
def stages(found: Finished) -> list[str]:
    return [tick.get_text() for tick in axes(journey(group(found.all()))).get_xticklabels()]


def test_a_study_in_which_nothing_is_quantised_says_so_and_draws_none_of_it(arms, tmp_path):
    words = "Nothing is quantised: all tensors ship as floats."
    found = study_of(tmp_path, ARMS, bpb=by_arm(a=1.0, b=1.0, c=0.9), codes={})
    assert words in remarks(found) and quant_gaps(group(found.all())) is None
    assert words not in remarks(arms) and quant_gaps(group(arms.all())) is not None
    assert stages(arms) == ["live", "averaged", "quantised", "sliding"]
    assert stages(found) == ["live", "averaged", "sliding"]


def test_one_quantised_run_is_enough_for_the_charts_of_quantisation(tmp_path):
    found = study_of(tmp_path, ARMS, codes={})
    found.runs["a"][1]["codes"] = {"weights": 9}
    assert quant_gaps(group(found.all())) is not None
    assert not [line for line in remarks(found) if line.startswith("Nothing is quantised")]


# ── Tables and browsers ───────────────────────────────────────────────────────────────────────────
def test_a_table_that_is_too_wide_stands_in_parts_that_all_name_their_rows():
    header = ["arm", *(f"figure_{i}" for i in range(30))]
    rows = [[f"arm {n}", *range(30)] for n in range(2)]
    parts = laid_out({"Arms": (header, rows)})
    assert [part.caption for part in parts] == [f"Arms ({i} of 3)" for i in (1, 2, 3)]
    assert all([row[0] for row in part.rows] == ["arm 0", "arm 1"] for part in parts)
    names = [column.name for part in parts for column in part.columns[1:]]
    cells = [cell for part in parts for cell in part.rows[0][1:]]
    assert names == header[1:] and cells == list(range(30))


def test_a_table_that_fits_stands_whole():
    (part,) = laid_out({"Arms": (["arm", "BPB"], [["a", "1.25"]])})
    assert (part.caption, part.rows) == ("Arms", [["a", "1.25"]])
    assert [(column.characters, column.right) for column in part.columns] == [(3, False), (4, True)]


@needs_browser
def test_nothing_reaches_beyond_a_page_of_1400_700_or_400_pixels(crowd, tmp_path):
    _, page = crowd
    wide = tmp_path / "wide.html"
    wide.write_text(f"<!DOCTYPE html><p style='width: 900px'>{'x' * 9}")
    *found, control = layouts([(page, 1400), (page, 700), (page, 400), (wide, 700)])
    assert [one.page for one in found] == [0, 0, 0] and found[0].boxes == 0
    assert control.page >= 200

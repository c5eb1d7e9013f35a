"""The tables of a study: what they leave out, what they list, and what many comparisons are worth.

Would have caught: an interaction whose interval just excludes 0, as one of 39 comparisons; columns
of quantising where nothing was quantised; a cost without an interval; tables of older code that
pass for today's.
"""

import dataclasses

import pytest
from pages_studies import STUDIES, how_it_ran, study

import train_gpt
from ablation.records import metric
from ablation.report import (
    Finished,
    comparison_table,
    factorial_table,
    markdown_report,
    shown_table,
    tables,
)
from ablation.statistics import holm, paired
from ablation.study import matrix, read_study, with_pairs

SEEDS = (1, 2, 3)
STUDY = """
seeds = [1, 2, 3]
metrics = ["val_bpb", "quant_gap_bpb"]
show = ["toggles.QNA.cost_ms", "toggles.QNA.cost_share", "quantised_val_bpb"]
[size.small]
steps = 4
seconds = 2.0
[arm.plain]
"""
RESULT = dict(
    codes={"weights": 9},
    code_sha256="ab" * 32,
    scored="quantised",
    device="CPU",
    torch="2.13.0",
    world_size=1,
    threads_per_rank=1,
    val_tokens=100,
    val_bytes=200,
    quantised_val_bpb=1.4,
)
NOISE = {1: 0.0, 2: 0.001, 3: -0.0005}


def finished(folder, effects: dict[str, float], **changes) -> Finished:
    """A study whose arms are `plain` and these, each with its effect on val_bpb and noise."""
    arms = "".join(f"[arm.{arm}]\nMATRIX_LR = {i}e-3\n" for i, arm in enumerate(effects, start=1))
    (folder / "many.toml").write_text(STUDY + arms)
    made = matrix(read_study(folder / "many.toml"), "small", "steps", out=folder / "runs")
    runs = {}
    for i, (arm, effect) in enumerate({"plain": 0.0, **effects}.items()):
        for seed in SEEDS:
            noise = NOISE[seed] * (1 + 0.1 * i)
            run = RESULT | {"name": f"{arm}-s{seed}", "seed": seed, "arm": arm, "events": []}
            run |= {"val_bpb": 1.3 + effect + noise, "quant_gap_bpb": 0.1 - noise}
            run["step_ms_median"] = 40.0 + seed
            runs.setdefault(arm, {})[seed] = run | changes
    return Finished(made, runs, {})


@pytest.fixture
def many(tmp_path) -> Finished:
    """12 comparisons: one that stands, one that falls, ten of noise."""
    noise = {f"{letter}{i}": 0.0 for letter in "ab" for i in range(1, 6)}
    return finished(tmp_path, {**noise, "large": 0.2, "slight": 0.004}, codes={})


# ── Holm ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_table_of_more_than_ten_comparisons_has_holms_verdict_beside_the_plain_one(many):
    header, rows = comparison_table(many)
    assert len(rows) == 12 and header[-2:] == ["Holm p of 12", "in words"]
    plain = many.values("plain", "val_bpb")
    p_values = [paired(plain, many.values(arm, "val_bpb")).p for arm in many.matrix.arms[1:]]
    assert [row[-2] for row in rows] == [f"{p:.2g}" for p in holm(p_values)]
    words = {row[0]: row[-1] for row in rows}
    assert "large is higher than plain" in words["large - plain"]
    assert "Holm" not in words["large - plain"]
    assert "slight is higher than plain" in words["slight - plain"]
    assert words["slight - plain"].endswith("; by Holm (of 12) not distinguishable")
    assert "by Holm" not in words["a2 - plain"]  # not distinguishable by itself
    assert (
        "Holm's p is corrected for all 12 comparisons that the study asks for, differences and "
        "contrasts of all its metrics; not distinguishable by it: slight - plain (final)."
        in markdown_report(many)
    )


def test_ten_comparisons_have_no_holm(tmp_path):
    few = finished(tmp_path, {f"a{i}": 0.004 for i in range(1, 11)}, codes={})
    header, rows = comparison_table(few)
    assert len(rows) == 10
    assert not any("Holm" in str(cell) for row in [header, *rows] for cell in row)
    assert "Holm" not in markdown_report(few)


def test_what_was_not_compared_is_no_member_of_the_family(many):
    del many.runs["a1"][2], many.runs["a1"][3]
    header, rows = comparison_table(many)
    assert (len(rows), header[-2]) == (12, "Holm p of 11")
    assert rows[0][-2] == "-" and rows[0][-1].startswith("not compared")
    del many.runs["a2"][2], many.runs["a2"][3]
    header, rows = comparison_table(dataclasses.replace(many))
    assert (len(rows), header[-2]) == (12, "Welch p")


# ── Nothing quantised ─────────────────────────────────────────────────────────────────────────────
def test_a_study_in_which_nothing_is_quantised_says_so_and_leaves_those_figures_out(tmp_path):
    found = finished(tmp_path, {"a1": 0.1, "b1": 0.2}, codes={})
    asked = with_pairs(found.matrix, ["plain:quant_gap_bpb,a1"])
    report = markdown_report(dataclasses.replace(found, matrix=asked))
    (line,) = [line for line in report.splitlines() if line.startswith("Nothing is quantised")]
    assert report.count("quantis") == line.count("quantis")
    assert "| b1 - plain | final, BPB |" in report


@pytest.mark.parametrize("codes", [{"weights": 9}, None], ids=["codes", "older results"])
def test_a_study_that_may_have_quantised_keeps_those_figures(tmp_path, codes):
    found = finished(tmp_path, {"a1": 0.1, "b1": 0.2}, codes=codes)
    if codes is None:
        for run in found.all():
            del run["codes"]
    report = markdown_report(found)
    assert "Nothing is quantised" not in report
    assert "quantised, BPB" in report and "| a1 - plain | quantisation gap, BPB |" in report


# ── Figures that are listed ───────────────────────────────────────────────────────────────────────
def test_the_cost_of_a_toggle_is_listed_with_its_interval_for_the_arms_that_have_it(tmp_path):
    found = finished(tmp_path, {"a1": 0.1, "b1": 0.2})
    for seed, ms in {1: 4.1, 2: 4.2, 3: 4.3}.items():
        found.runs["a1"][seed]["toggles"] = {"QNA": {"cost_ms": ms, "cost_per": "step"}}
    header, rows = shown_table(found)
    assert header == ["arm", "figure", "n", "mean", "95 % CI"]
    # t of 2 degrees of freedom at 97.5 %: 4.3027
    half = 4.3027 * 0.1 / 3**0.5
    assert rows[0] == ["a1", "QNA.cost_ms, ms", 3, "4.20", f"{4.2 - half:.2f} to {4.2 + half:.2f}"]
    assert rows[1] == ["a1", "QNA.cost_share, of a step", 3, "0.100", "0.100 to 0.100"]
    assert "Figures" in tables(found)


def test_a_cost_that_is_of_no_step_has_no_share_of_one():
    run = {"step_ms_median": 40.0, "toggles": {"SWA": {"cost_ms": 4.0, "cost_per": "snapshot"}}}
    assert metric(run, "toggles.SWA.cost_ms") == 4.0
    assert metric(run, "toggles.SWA.cost_share") is None
    assert metric(run, "toggles.QNA.cost_share") is None
    run["toggles"]["SWA"]["cost_per"] = "step"
    assert metric(run, "toggles.SWA.cost_share") == 0.1
    assert metric(run | {"step_ms_median": None}, "toggles.SWA.cost_share") is None


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "code, age", [(train_gpt.CODE_SHA256, "today's."), ("0" * 64, "older than today's.")]
)
def test_a_table_of_the_page_says_which_code_its_runs_are_of(code, age):
    made = study(*STUDIES[0])
    run = RESULT | {"code_sha256": code, "checkpoint": None, "arm": "plain"}
    assert how_it_ran(made, [run]).endswith(f"; code `{code[:12]}`, {age}")


def test_differences_and_contrasts_of_a_study_are_one_family(tmp_path):
    """Of 2 x 7 levels: 13 differences, 7 main effects and 6 interactions."""
    levels = [f"0.0{i}" for i in range(1, 8)]
    text = STUDY.replace("[arm.plain]", f"[factorial]\nqat = [0, 1]\nMATRIX_LR = {levels}")
    (tmp_path / "cells.toml").write_text(text)
    made = matrix(read_study(tmp_path / "cells.toml"), "small", "steps", out=tmp_path / "runs")
    runs = {}
    for i, arm in enumerate(made.arms):
        for seed in SEEDS:
            bpb = 1.3 + 0.2 * arm.startswith("qat-1") + NOISE[seed] * (i % 3) + 0.003 * (i % 2)
            run = RESULT | {"name": f"{arm}-s{seed}", "seed": seed, "val_bpb": bpb, "events": []}
            runs.setdefault(arm, {})[seed] = run | {"codes": {}, "arm": arm}  # nothing of the gap
    found = Finished(made, runs, {})
    p_values = []
    holm_p = []
    for header, rows in (comparison_table(found), factorial_table(found)):
        assert (len(rows), header[-2]) == (13, "Holm p of 26")
        holm_p += [row[-2] for row in rows]
    p_values = [one.test.p for one in found.tests]
    assert holm_p == [f"{p:.2g}" for p in holm(p_values)]


def test_what_equal_time_adds_is_compared_and_not_in_the_family(many):
    timed = dataclasses.replace(many, matrix=dataclasses.replace(many.matrix, equal="time"))
    for run in timed.all():
        run |= {"step_ms_median": 40.0 + run["val_bpb"], "steps": 9}
    header, rows = comparison_table(timed)
    assert (len(rows), header[-2]) == (36, "Holm p of 12")
    assert [row[-2] for row in rows if not row[1].startswith("final")] == ["-"] * 24


# ── What is compared ──────────────────────────────────────────────────────────────────────────────
def test_two_arms_with_the_same_scores_are_told_to_be_the_same(tmp_path):
    """A toggle that did nothing, trained by itself or on a shared training."""
    found = finished(tmp_path, {"a1": 0.0, "b1": 0.0}, quant_gap_bpb=0.1)
    for seed in SEEDS:
        found.runs["a1"][seed]["val_bpb"] = found.runs["plain"][seed]["val_bpb"]
        shared = {"checkpoint": f"runs/plain-s{seed}/checkpoint.bin"}
        found.runs["b1"][seed] |= shared | {"val_bpb": found.runs["plain"][seed]["val_bpb"]}
    report = markdown_report(found)
    assert "2 comparisons of final BPB (lower is better): 2 the same." in report
    assert "- a1 is **the same** as plain in each of 3 seeds." in report
    assert "- b1 is **the same** as plain in each of 3 seeds." in report


@pytest.mark.parametrize(
    ("metric_", "average", "shown"),
    [
        ("live_val_bpb", "ema", False),
        ("step_ms_median", "ema", False),
        ("float_val_bpb", "none", False),
        ("float_val_bpb", "ema", True),
        ("val_bpb", "none", True),
    ],
)
def test_figures_of_one_shared_training_are_no_comparison(tmp_path, metric_, average, shown):
    found = finished(tmp_path, {"a1": 0.0}, live_val_bpb=1.5, config={"average": "none"})
    made = with_pairs(found.matrix, [f"plain:{metric_},a1"])
    for seed, run in found.runs["a1"].items():
        run |= {"checkpoint": f"runs/plain-s{seed}/checkpoint.bin", "config": {"average": average}}
    titles = [row[0] for row in comparison_table(dataclasses.replace(found, matrix=made))[1]]
    assert (f"a1 - plain:{metric_}" in titles) == shown
    for run in found.runs["a1"].values():
        run["checkpoint"] = None
    titles = [row[0] for row in comparison_table(dataclasses.replace(found, matrix=made))[1]]
    assert f"a1 - plain:{metric_}" in titles


def test_a_bound_in_a_table_never_reads_as_0(tmp_path):
    found = finished(tmp_path, {"a1": 0.0})
    for seed in SEEDS:
        run = found.runs["a1"][seed]
        run["val_bpb"] = found.runs["plain"][seed]["val_bpb"] + 1e-7 * (seed - 2)
        run["toggles"] = {"QNA": {"cost_ms": 1e-4 * (seed - 2), "cost_per": "step"}}
    (row, *_) = comparison_table(found)[1]
    assert row[3] == "-0.0000002 to +0.0000002"
    assert shown_table(found)[1][0][-1] == "-0.0002 to 0.0002"

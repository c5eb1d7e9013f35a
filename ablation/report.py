"""The tables of a study, from run folders alone, and the report that holds them."""

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import train_gpt
from ablation.answers import (
    FALLS,
    Answer,
    answer,
    forest,
    interaction,
    interactions,
    scale_of,
    sentence,
    tally,
)
from ablation.page import Lead, Table, html_page, styled
from ablation.records import (
    RunStore,
    check_alike,
    check_arm,
    code_difference,
    metric,
    quantised,
)
from ablation.runner import Ledger
from ablation.statistics import (
    LEVEL,
    RECORD_NATS,
    Cells,
    Comparison,
    detectable,
    factorial,
    holm,
    one_arm,
    paired,
    record_rule,
    summary,
    verdict,
    welch,
)
from ablation.study import Matrix, Study, Trial, product_arms
from train_gpt import Refusal

# name -> (heading, unit, digits)
METRICS = {
    "val_bpb": ("final", "BPB", 5),
    "live_val_bpb": ("live", "BPB", 5),
    "float_val_bpb": ("float", "BPB", 5),
    "quantised_val_bpb": ("quantised", "BPB", 5),
    "quant_gap_bpb": ("quantisation gap", "BPB", 5),
    "step_ms_median": ("step", "ms", 1),
    "steps": ("steps", "", 0),
    "total_bytes": ("code + artifact", "bytes", 0),
}

# What says nothing where nothing ships as codes
QUANTISED = {"quantised_val_bpb", "quant_gap_bpb"}

# With more rows than these, a table has Holm's p beside its own
FAMILY = 10

# Interactions on the first screen of a page; where there are more, they stand in the table alone
MAX_CROSSED = 6


# suffix of a metric's name -> (unit, digits)
UNITS = {
    "bpb": ("BPB", 5),
    "_ms": ("ms", 2),
    "seconds": ("s", 2),
    "bytes": ("bytes", 0),
    "loss": ("nats", 5),
    "cost_share": ("of a step", 3),
}


def heading_of(name: str) -> tuple[str, str, int]:
    """(heading, unit, digits) of a metric."""
    if name in METRICS:
        return METRICS[name]
    heading = name.removeprefix("scores.").removeprefix("toggles.")
    for suffix, (unit, digits) in UNITS.items():
        if name.endswith(suffix):
            return heading, unit, digits
    return heading, "", 5


def titled(name: str) -> str:
    """A metric as the head of a column: with its unit, where it has one."""
    heading, unit, _ = heading_of(name)
    return f"{heading}, {unit}" if unit else heading


@dataclass(frozen=True)
class Finished:
    """What there is of a matrix: results by arm and seed, and why the failed trials failed."""

    matrix: Matrix
    runs: dict[str, dict[int, dict]]
    failed: dict[str, str]

    def all(self) -> list[dict]:
        return [run for by_seed in self.runs.values() for run in by_seed.values()]

    def metrics(self, names: Iterable[str]) -> list[str]:
        """Those of these figures that say anything here."""
        return [name for name in names if name not in QUANTISED or quantised(self.all())]

    def values(self, arm: str, name: str) -> dict[int, float]:
        """Seed -> figure, for the runs of an arm that have it."""
        found = {seed: metric(run, name) for seed, run in self.runs.get(arm, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}


def load_matrix(matrix: Matrix, across_code: bool = False) -> Finished:
    """The finished and failed trials.

    Refusal when a log says other settings than the study, or when the runs are of different code,
    data or hardware. across_code: arms may be of different code.
    """
    runs: dict[str, dict[int, dict]] = {}
    failed = Ledger(matrix.folder).failures(matrix.trials)
    store = RunStore(matrix.folder)
    for trial in matrix.trials:
        run = None if trial.id in failed else store.find(trial.id)
        if run is None:
            continue
        code = run["exit_code"]
        if code:
            failed[trial.id] = f"FAILED (exit {code}): {train_gpt.EXIT_CODES.get(code)}"
            continue
        check_settings(trial, run)
        runs.setdefault(trial.arm, {})[trial.seed] = run | {"arm": trial.arm}

    found = Finished(matrix, runs, failed)
    for by_seed in runs.values():
        check_arm(list(by_seed.values()))
    check_alike(found.all(), across_code)
    return found


def check_settings(trial: Trial, run: dict) -> None:
    """Refusal when a run was made with other settings than its trial asks for.

    Those that can do nothing in this trial may differ.
    """
    logged = run["config"] | {"seed": run["seed"]}
    wrong = []
    for name in trial.cfg.differing(logged):
        value = getattr(trial.cfg, name)
        wrong.append(f"{name.upper()}={value} in the study, {logged[name]} in the log")
    if wrong:
        remedy = "run the study again, or take the old file"
        raise Refusal(f"{trial.folder}: {', '.join(wrong)}; {remedy}")


def spell(values: dict[int, float], digits: int) -> str:
    """mean +- sample sd."""
    if not values:
        return "-"
    s = summary(values)
    deviation = f" ± {s.sd:.{digits}f}" if s.n > 1 else ""
    return f"{s.mean:,.{digits}f}{deviation}"


ARM_METRICS = ("live_val_bpb", "float_val_bpb", "quantised_val_bpb", "val_bpb", "quant_gap_bpb")
COST_METRICS = ("step_ms_median", "steps", "total_bytes")


def arm_table(found: Finished) -> Table:
    """One row per arm, failed trials included."""
    study = found.matrix.study
    extra = [name for name in study.metrics if name not in METRICS]
    names = found.metrics([*ARM_METRICS, *extra, *COST_METRICS])
    header = ["arm", "settings", "n", *map(titled, names)]
    told = any("published" in facts or "expect" in facts for facts in study.facts.values())
    if told:
        header.append("published, expected")

    rows = []
    for arm in found.matrix.arms:
        settings = " ".join(f"{key}={value}" for key, value in study.arms[arm].items())
        figures = [spell(found.values(arm, name), heading_of(name)[2]) for name in names]
        row = [arm, settings, run_count(found, arm), *figures]
        if told:
            row.append(published(study.facts.get(arm, {})))
        rows.append(row)
    return header, rows


def run_count(found: Finished, arm: str) -> str:
    """How many runs an arm has, and why the others failed."""
    lost = []
    for trial, reason in found.failed.items():
        name, _, seed = trial.rpartition("-s")
        if name == arm:
            lost.append(f"s{seed} {reason}")
    count = str(len(found.runs.get(arm, {})))
    return f"{count}, failed: {'; '.join(lost)}" if lost else count


def published(facts: dict) -> str:
    """What others have published of an arm, or what the study expects of it."""
    said = dict(facts.get("published", {}))
    for key in ("expect", "note"):
        if key in facts:
            said[key] = facts[key]
    words = []
    for key, value in said.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        words.append(f"{key}: {text}")
    return "; ".join(words)


def pairs(found: Finished) -> Iterator[tuple[tuple[str, str], str, dict, dict]]:
    """((name of a, name of b), metric, values of a, values of b) of every comparison.

    Each arm against the reference in every metric of the study, then the study's own comparisons,
    where `arm:metric` names a figure: of its arm, and of the other where that one names none.
    """
    study = found.matrix.study
    arms = found.matrix.arms
    metrics = found.metrics(study.metrics)
    if found.matrix.equal == "time":
        # what an arm costs
        metrics += ["step_ms_median", "steps"]

    against = [(study.reference, arm) for arm in arms if arm != study.reference]
    for left, right in dict.fromkeys(against + list(study.compare)):
        a, _, own_a = left.partition(":")
        b, _, own_b = right.partition(":")
        if a not in arms or b not in arms:
            continue
        own = own_a or own_b
        for name in found.metrics([own]) if own else dict.fromkeys(metrics):
            values_a = found.values(a, name)
            values_b = found.values(b, own_b or name)
            # a name that nothing has is shown
            unknown = not any(found.values(arm, name) for arm in arms)
            if (values_a and values_b) or unknown:
                yield (left, right), name, values_a, values_b


COMPARISON_HEADER = [
    "difference",
    "metric",
    "mean",
    "95 % CI",
    "n could show",
    "paired t (df)",
    "paired p",
    "Welch p",
    "in words",
]


def comparison_row(
    names: tuple[str, str], name: str, a: dict[int, float], b: dict[int, float]
) -> list:
    """b - a, in the columns of COMPARISON_HEADER."""
    heading, unit, digits = heading_of(name)
    difference = f"{names[1]} - {names[0]}"
    try:
        test = paired(a, b)
        loose = welch(a, b)
    except Refusal as refusal:
        return [difference, heading, *["-"] * 6, f"not compared: {refusal}"]
    least = detectable(test.sd, test.n)
    return [
        difference,
        titled(name),
        f"{test.mean:+.{digits}f}",
        f"{test.low:+.{digits}f} to {test.high:+.{digits}f}",
        f"{least:.{digits}f}",
        f"{test.t:.2f} ({test.df:.0f})",
        f"{test.p:.2g}",
        f"{loose.p:.2g} (df {loose.df:.1f})",
        verdict(test, names, unit),
    ]


def compared(found: Finished) -> list[tuple[tuple[str, str], str, dict, dict]]:
    """As pairs, without the figures of one shared training: they are the same."""
    return [pair for pair in pairs(found) if pair[2] != pair[3] or not pair[2]]


def comparison_table(found: Finished) -> Table:
    """Same-seed differences, Welch's test beside them, and what can be said."""
    rows = []
    p_values = []
    for names, name, a, b in compared(found):
        rows.append(comparison_row(names, name, a, b))
        p_values.append(paired_p(a, b))
    return with_holm(COMPARISON_HEADER, rows, p_values)


def paired_p(a: dict[int, float], b: dict[int, float]) -> float | None:
    """The p of comparison_row; None where nothing is compared."""
    try:
        return paired(a, b).p
    except Refusal:
        return None


def corrected(p_values: list[float | None]) -> list[float | None]:
    """Holm's p of each; None of what is not compared, and of all where they are at most FAMILY."""
    tested = [p for p in p_values if p is not None]
    if len(tested) <= FAMILY:
        return [None] * len(p_values)
    adjusted = iter(holm(tested))
    return [None if p is None else next(adjusted) for p in p_values]


def falls(p: float | None, holm_p: float | None) -> bool:
    """Whether a difference is one by its own p, and none by Holm's."""
    return p is not None and holm_p is not None and p < LEVEL <= holm_p


def with_holm(header: list[str], rows: list[list], p_values: list[float | None]) -> Table:
    """The table with Holm's p before its words, where it makes more than FAMILY comparisons.

    p_values: of each row; None: not compared. All rows of the table are one family.
    """
    adjusted = corrected(p_values)
    tested = sum(p is not None for p in adjusted)
    if not tested:
        return header, rows
    wider = []
    for row, p, holm_p in zip(rows, p_values, adjusted, strict=True):
        *cells, words = row
        text = "-" if holm_p is None else f"{holm_p:.2g}"
        wider.append([*cells, text, words + FALLS * falls(p, holm_p)])
    return [*header[:-1], f"Holm p of {tested}", header[-1]], wider


def levels_of(study: Study) -> dict[str, tuple[str, ...]]:
    """Arm -> its levels, for the cells of a factorial study."""
    if not study.factors:
        return {}
    arms = product_arms(study.factors, str(study.path))
    return dict(zip(arms, itertools.product(*study.factors.values()), strict=True))


def cells_of(found: Finished, name: str) -> Cells:
    """A figure of every cell of a factorial study that has it."""
    values = {
        levels: found.values(arm, name) for arm, levels in levels_of(found.matrix.study).items()
    }
    return {levels: by_seed for levels, by_seed in values.items() if by_seed}


FACTORIAL_HEADER = ["effect", "metric", "mean", "95 % CI", "p", "in words"]


def contrasts_of(found: Finished) -> list[tuple[str, Comparison | None, str]]:
    """(metric, contrast of a factorial, "") in every metric; None and why, where there is none."""
    study = found.matrix.study
    if not study.factors:
        return []
    contrasts = []
    for name in found.metrics(study.metrics):
        try:
            for contrast in factorial(cells_of(found, name), study.factors):
                contrasts.append((name, contrast, ""))
        except Refusal as refusal:
            contrasts.append((name, None, str(refusal)))
    return contrasts


def factorial_table(found: Finished) -> Table:
    """Main effects and interactions of a factorial study."""
    rows = []
    p_values = []
    for name, contrast, problem in contrasts_of(found):
        heading, _, digits = heading_of(name)
        if contrast is None:
            rows.append(["-", heading, "-", "-", "-", f"not computed: {problem}"])
            p_values.append(None)
            continue
        interval = f"{contrast.low:+.{digits}f} to {contrast.high:+.{digits}f}"
        mean = f"{contrast.mean:+.{digits}f}"
        words = in_words(contrast)
        p = f"{contrast.p:.2g}"
        rows.append([contrast.term, titled(name), mean, interval, p, words])
        p_values.append(contrast.p)
    return with_holm(FACTORIAL_HEADER, rows, p_values)


SHOWN_HEADER = ["arm", "figure", "n", "mean", "95 % CI"]


def shown_table(found: Finished) -> Table:
    """The figures that the study lists besides: each arm that has one, with its interval."""
    rows = []
    for name in dict.fromkeys(found.metrics(found.matrix.study.show)):
        _, _, digits = heading_of(name)
        for arm in found.matrix.arms:
            values = found.values(arm, name)
            if len(values) > 1:
                test = one_arm(values)
                interval = f"{test.low:,.{digits}f} to {test.high:,.{digits}f}"
                rows.append([arm, titled(name), test.n, f"{test.mean:,.{digits}f}", interval])
            elif values:
                rows.append([arm, titled(name), 1, spell(values, digits), "-"])
    return SHOWN_HEADER, rows


def in_words(contrast: Comparison) -> str:
    if contrast.low <= 0 <= contrast.high:
        return "not distinguishable from 0"
    return "lower" if contrast.mean < 0 else "higher"


def record_lines(found: Finished) -> list[str]:
    """The challenge's rule for every arm against the reference."""
    reference = found.matrix.study.reference
    old = found.values(reference, "val_bpb")
    lines = []
    tested = False
    for arm, runs in found.runs.items():
        new = found.values(arm, "val_bpb")
        both = [*runs.values(), *found.runs.get(reference, {}).values()]
        modes = {run["scored"] for run in both}
        if arm == reference or min(len(new), len(old)) < 2 or len(modes) != 1:
            continue
        tested = True
        run = found.all()[0]
        rule = record_rule(new, old, run["val_tokens"] / run["val_bytes"])
        if rule.holds:
            lines.append(
                f"{arm} is below {reference} by {rule.difference:.5f} BPB, more than the "
                f"{rule.margin:.5f} BPB (0.005 nats) of the record rule, at p = {rule.p:.2g}."
            )
    if tested and not lines:
        return [f"No arm is below {reference} by 0.005 nats at p < 0.01 (the record rule)."]
    return lines


def holm_lines(found: Finished) -> list[str]:
    """The differences that Holm's p does not bear out, table by table."""
    lines = []
    for title, (_, rows) in {
        "Differences": comparison_table(found),
        "Factorial": factorial_table(found),
    }.items():
        fallen = [f"{row[0]} ({row[1].split(',')[0]})" for row in rows if row[-1].endswith(FALLS)]
        if fallen:
            lines.append(
                f"Corrected for all rows of the table {title} (Holm), not distinguishable: "
                f"{some(fallen)}."
            )
    return lines


def made_on(found: Finished) -> str:
    """The runs, the machine and what was scored, in one sentence."""
    runs = found.all()
    r = runs[0]
    trained = sum(not run.get("checkpoint") for run in runs)
    return (
        f"{len(runs)} runs, {trained} trainings, on {r['device']}, ranks: {r['world_size']}, "
        f"threads per rank: {r['threads_per_rank']}, trainings side by side: "
        f"{found.matrix.size.jobs}, torch {r['torch']}; scored: {r['val_tokens']:,} targets, "
        f"{r['val_bytes']:,} bytes; code {' and '.join(codes(runs))}."
    )


def codes(runs: list[dict]) -> list[str]:
    """The code of these runs, the first 12 digits of each hash."""
    return list(dict.fromkeys(run["code_sha256"][:12] for run in runs))


def some(names: Collection[str], most: int = 6) -> str:
    """The first of these names, and how many more there are."""
    shown = ", ".join(itertools.islice(names, most))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def warnings(found: Finished) -> list[str]:
    """What differs or is missing in a study, in sentences."""
    matrix = found.matrix
    sets = {arm: list(by_seed.values()) for arm, by_seed in found.runs.items()}
    difference = code_difference(sets)
    lines = [difference] if difference else []
    if found.failed:
        lines.append(f"FAILED, and in no figure: {some(found.failed)}.")
    waiting = []
    for trial in matrix.trials:
        if trial.id not in found.failed and trial.seed not in found.runs.get(trial.arm, {}):
            waiting.append(trial.id)
    if waiting:
        lines.append(f"NOT RUN YET: {some(waiting)}.")
    return lines


def how_made(found: Finished) -> list[str]:
    """How it was made, in sentences."""
    matrix = found.matrix
    study = matrix.study
    source = f"Source: {study.source}" if study.source else ""
    lines = [study.limits, matrix.size.note, source]
    if found.all():
        lines.append(made_on(found))
        lines.append(
            "Differences are between runs of one seed, and not shown where arms share the figure "
            "with their training; intervals are 95 % t-intervals, not corrected for their number. "
            f"Holm's p is corrected, for all rows of a table of more than {FAMILY}."
        )
        lines += holm_lines(found)

    budget = f"{matrix.size.seconds:g} s of training"
    if matrix.equal == "steps":
        budget = f"{matrix.size.steps} steps"
    lines.append(f"Command: {matrix.command()} ({budget} each).")
    return [line for line in lines if line]


def remarks(found: Finished) -> list[str]:
    """What to know beside the answers: what differs or is missing, and the record rule."""
    lines = warnings(found)
    if not found.all():
        return lines
    if not quantised(found.all()):
        lines.append("Nothing is quantised: all tensors ship as floats.")
    return lines + record_lines(found)


def notes(found: Finished) -> list[str]:
    """What to know before the question, the question, and how the answers were made."""
    question = found.matrix.study.question
    return [*remarks(found), *([question] if question else []), *how_made(found)]


def tables(found: Finished) -> dict[str, Table]:
    """The tables that have rows, by title."""
    made = {
        "Arms": arm_table(found),
        "Differences": comparison_table(found),
        "Factorial": factorial_table(found),
        "Figures": shown_table(found),
    }
    return {title: table for title, table in made.items() if table[1]}


def title_of(matrix: Matrix) -> str:
    return f"{matrix.study.title} ({matrix.size.name}, equal {matrix.equal})"


def markdown_report(found: Finished) -> str:
    """The report as Markdown."""
    parts = [f"# {title_of(found.matrix)}", *notes(found)]
    for title, (header, rows) in tables(found).items():
        parts.append(f"## {title}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts) + "\n"


def facets(study: Study, side: str) -> dict[str, str]:
    """What one side of a comparison is: factor -> words, and the figure where it names one."""
    arm, _, own = side.partition(":")
    levels = levels_of(study).get(arm)
    words = {"arm": arm}
    if levels:
        words = {name: f"{name} {level}" for name, level in zip(study.factors, levels, strict=True)}
    if own:
        words["figure"] = heading_of(own)[0].removesuffix(".bpb")
    return words


def main_metric(found: Finished) -> str:
    """The study's first metric that says anything here: the one of the first screen."""
    return next(iter(found.metrics(found.matrix.study.metrics)), "val_bpb")


def answers_of(found: Finished) -> list[Answer]:
    """Every comparison of the main metric, and of the figures that `compare` names in its unit.

    Holm's verdict is that of the table Differences.
    """
    study = found.matrix.study
    main = main_metric(found)
    every = compared(found)
    p_values = [paired_p(a, b) for _, _, a, b in every]
    answers = []
    for (names, name, a, b), p, holm_p in zip(every, p_values, corrected(p_values), strict=True):
        named = any(":" in side for side in names)
        if name == main or (named and heading_of(name)[1] == heading_of(main)[1]):
            sides = (facets(study, names[0]), facets(study, names[1]))
            answers.append(answer(sides, a, b, falls(p, holm_p)))
    return answers


def crossed_of(found: Finished) -> list[Answer]:
    """The interactions of a factorial in the main metric, where they are few.

    Holm's verdict is that of the table Factorial.
    """
    every = contrasts_of(found)
    adjusted = corrected([contrast.p if contrast else None for _, contrast, _ in every])
    contrasts = []
    for (name, contrast, _), holm_p in zip(every, adjusted, strict=True):
        if contrast and name == main_metric(found):
            contrasts.append((contrast, falls(contrast.p, holm_p)))
    crossed = interactions(found.matrix.study.factors, contrasts)
    return crossed if len(crossed) <= MAX_CROSSED else []


def margin_of(found: Finished, name: str) -> float:
    """What the record rule asks for, in BPB of this text; 0 for what is no score."""
    if not name.endswith("val_bpb") and not name.startswith("scores."):
        return 0.0
    run = found.all()[0]
    return RECORD_NATS / math.log(2) * run["val_tokens"] / run["val_bytes"]


def lead_of(found: Finished) -> Lead:
    """The first screen: the question, an answer per comparison, and their forest plot."""
    study = found.matrix.study
    name = main_metric(found)
    scale = scale_of(*heading_of(name))
    answers = answers_of(found)
    cells = cells_of(found, name)
    charts = []
    if found.all():
        with styled():
            charts.append(forest(answers, scale, margin_of(found, name)))
            charts.append(interaction(cells, study.factors, scale.heading))
    return Lead(
        study.question,
        tally(answers, scale),
        [sentence(one, scale) for one in answers + crossed_of(found)],
        remarks(found),
        [chart for chart in charts if chart],
    )


def study_page(found: Finished) -> str:
    """The report as a page."""
    lost = []
    for trial, reason in found.failed.items():
        arm, _, seed = trial.rpartition("-s")
        lost.append({"arm": arm, "seed": int(seed), "failed": reason})
    runs = found.all() + lost
    return html_page(title_of(found.matrix), how_made(found), tables(found), runs, lead_of(found))


def write_report(matrix: Matrix, across_code: bool = False) -> list[Path]:
    """report.md and report.html in the folder of the matrix. across_code: as in load_matrix."""
    found = load_matrix(matrix, across_code)
    pages = {"report.md": markdown_report(found), "report.html": study_page(found)}
    for name, text in pages.items():
        train_gpt.write_atomic(matrix.folder / name, text.encode("utf-8", "replace"))
    return [matrix.folder / name for name in pages]


def markdown_table(header: list, rows: list[list]) -> str:
    """A table in GitHub Markdown."""

    def cell(value) -> str:
        text = "-" if value is None else str(value)
        return "<br>".join(re.sub(r"([\\|<])", r"\\\1", text).splitlines())

    lines = [[cell(value) for value in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""The tables of a study, from run folders alone, and the report that holds them."""

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import train_gpt
from ablation.answers import (
    Answer,
    Compared,
    Scale,
    answer,
    by_holm,
    compare_sides,
    forest,
    interaction,
    interactions,
    scale_of,
    sentence,
    tally,
)
from ablation.page import Lead, Line, Table, html_page, styled
from ablation.records import (
    RunStore,
    check_alike,
    check_arm,
    code_difference,
    lookup,
    metric,
    quantised,
    split_trial,
    training_of,
)
from ablation.runner import Ledger
from ablation.statistics import (
    RECORD_NATS,
    Cells,
    decimal_places,
    detectable,
    factorial,
    holm,
    look_of,
    one_arm,
    record_rule,
    summary,
    verdict,
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

# What runs of one training have in common: nothing of it is a comparison
OF_TRAINING = {
    "live_val_bpb",
    "scores.live.bpb",
    "scores.live.loss",
    "step_ms_median",
    "steps",
    "train_seconds",
}
# Of these, what they have in common if they ship the same average of its weights
OF_AVERAGE = {"averaged_val_bpb", "float_val_bpb"}

# A study of more comparisons than these has Holm's p beside their own
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

    @cached_property
    def tests(self) -> list[Compared]:
        """Every comparison of the study, with Holm's p: pairs of arms, then contrasts."""
        return corrected([*pairs(self), *contrasts(self)])

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
    check_alike(found.all(), across_code, across_data=bool(matrix.size.scale))
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
        name, seed = split_trial(trial)
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


def pairs(found: Finished) -> Iterator[Compared]:
    """Every comparison of two sides, without the figures of one training that they share.

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
            figures = (name, own_b or name)
            values_a = found.values(a, figures[0])
            values_b = found.values(b, figures[1])
            # a name that nothing has is shown
            unknown = not any(found.values(arm, name) for arm in arms)
            if unknown or (values_a and values_b and not is_shared(found, (a, b), figures)):
                asked = bool(own) or name in study.metrics
                yield compare_sides((left, right), figures, values_a, values_b, asked)


def is_shared(found: Finished, arms: tuple[str, str], figures: tuple[str, str]) -> bool:
    """Whether both sides are one figure of one training, in every seed that both have."""
    a, b = (found.runs[arm] for arm in arms)
    both = [(a[seed], b[seed]) for seed in a.keys() & b.keys()]
    if not both or figures[0] != figures[1]:
        return False
    if any(training_of(left) != training_of(right) for left, right in both):
        return False
    if figures[0] in OF_AVERAGE:
        average = "config.average"
        return all(lookup(left, average) == lookup(right, average) for left, right in both)
    return figures[0] in OF_TRAINING


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


def comparison_row(one: Compared) -> list:
    """b - a, in the columns of COMPARISON_HEADER."""
    heading, unit, digits = heading_of(one.figures[0])
    test = one.test
    if test is None:
        return [one.title, heading, *["-"] * 6, f"not compared: {one.problem}"]
    least = detectable(test.sd, test.n)
    digits = decimal_places(test, digits)
    return [
        one.title,
        titled(one.figures[0]),
        f"{test.mean:+.{digits}f}",
        f"{test.low:+.{digits}f} to {test.high:+.{digits}f}",
        f"{least:.{digits}f}",
        f"{test.t:.2f} ({test.df:.0f})",
        f"{test.p:.2g}",
        f"{one.loose.p:.2g} (df {one.loose.df:.1f})",
        verdict(test, one.names, unit) + by_holm(one.falls),
    ]


def corrected(tests: list[Compared]) -> list[Compared]:
    """The comparisons with Holm's p, where the study asks for more than FAMILY.

    What it asks for is one family; what is not compared, and what equal time adds, is not in it.
    """
    members = [one for one in tests if one.asked and one.test]
    if len(members) <= FAMILY:
        return tests
    adjusted = iter(holm([one.test.p for one in members]))
    found = []
    for one in tests:
        member = one.asked and one.test
        found.append(one._replace(family=len(members), holm_p=next(adjusted)) if member else one)
    return found


def with_holm(header: list[str], rows: list[list], tests: list[Compared]) -> Table:
    """The table with Holm's p before its words, where there is one. tests: of each row."""
    family = max((one.family for one in tests), default=0)
    if not family:
        return header, rows
    wider = []
    for row, one in zip(rows, tests, strict=True):
        *cells, words = row
        wider.append([*cells, "-" if one.holm_p is None else f"{one.holm_p:.2g}", words])
    return [*header[:-1], f"Holm p of {family}", header[-1]], wider


def differences_of(found: Finished) -> list[Compared]:
    return [one for one in found.tests if not one.contrast]


def contrasts_of(found: Finished) -> list[Compared]:
    return [one for one in found.tests if one.contrast]


def comparison_table(found: Finished) -> Table:
    """Same-seed differences, Welch's test beside them, and what can be said."""
    tests = differences_of(found)
    return with_holm(COMPARISON_HEADER, [comparison_row(one) for one in tests], tests)


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


def contrasts(found: Finished) -> Iterator[Compared]:
    """The main effects and interactions of a factorial, in every metric of the study."""
    study = found.matrix.study
    if not study.factors:
        return
    for name in found.metrics(study.metrics):
        figures = (name, name)
        try:
            for contrast in factorial(cells_of(found, name), study.factors):
                yield Compared(("", contrast.term), figures, {}, {}, contrast)
        except Refusal as refusal:
            yield Compared(("", "-"), figures, {}, {}, None, str(refusal))


def factorial_row(one: Compared) -> list:
    """A contrast, in the columns of FACTORIAL_HEADER."""
    heading, _, digits = heading_of(one.figures[0])
    test = one.test
    if test is None:
        return ["-", heading, "-", "-", "-", f"not computed: {one.problem}"]
    digits = decimal_places(test, digits)
    look = look_of(test)
    words = "not distinguishable from 0" if look == "open" else look
    return [
        one.title,
        titled(one.figures[0]),
        f"{test.mean:+.{digits}f}",
        f"{test.low:+.{digits}f} to {test.high:+.{digits}f}",
        f"{test.p:.2g}",
        words + by_holm(one.falls),
    ]


def factorial_table(found: Finished) -> Table:
    """Main effects and interactions of a factorial study."""
    tests = contrasts_of(found)
    return with_holm(FACTORIAL_HEADER, [factorial_row(one) for one in tests], tests)


SHOWN_HEADER = ["arm", "figure", "n", "mean", "95 % CI"]


def shown_table(found: Finished) -> Table:
    """The figures that the study lists besides: each arm that has one, with its interval."""
    rows = []
    for name in dict.fromkeys(found.metrics(found.matrix.study.show)):
        for arm in found.matrix.arms:
            values = found.values(arm, name)
            if len(values) > 1:
                test = one_arm(values)
                digits = decimal_places(test, heading_of(name)[2])
                interval = f"{test.low:,.{digits}f} to {test.high:,.{digits}f}"
                rows.append([arm, titled(name), test.n, f"{test.mean:,.{digits}f}", interval])
            elif values:
                rows.append([arm, titled(name), 1, spell(values, heading_of(name)[2]), "-"])
    return SHOWN_HEADER, rows


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
    """The family of the study, and the differences that Holm's p does not bear out."""
    family = max((one.family for one in found.tests), default=0)
    if not family:
        return []
    fallen = []
    for one in found.tests:
        if one.falls:
            fallen.append(f"{one.title} ({heading_of(one.figures[0])[0]})")
    stands = f"not distinguishable by it: {some(fallen)}" if fallen else "every difference stands"
    return [
        f"Holm's p is corrected for all {family} comparisons that the study asks for, differences "
        f"and contrasts of all its metrics; {stands}."
    ]


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
            "with their training; intervals are 95 % t-intervals, not corrected for their number."
        )
        lines += holm_lines(found)

    lines.append(f"Command: {matrix.command()} ({matrix.budget()} each).")
    return [line for line in lines if line]


def remarks(found: Finished) -> list[str]:
    """What to know beside the answers: what differs or is missing, and the record rule."""
    lines = warnings(found)
    if not found.all():
        return lines
    if not quantised(found.all()):
        lines.append("Nothing is quantised: all tensors ship as floats.")
    return lines + record_lines(found)


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
    summary, lines = told(found)
    sentences = [f"- {line.before} **{line.verdict}** {line.after}" for line in lines]
    answers = [found.matrix.study.question, summary, "\n".join(sentences)]
    parts = [f"# {title_of(found.matrix)}", *remarks(found), *answers, *how_made(found)]
    parts = [part for part in parts if part]
    for title, (header, rows) in tables(found).items():
        parts.append(f"## {title}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts) + "\n"


def facets(study: Study, side: str, figure: str) -> dict[str, str]:
    """What one side of a comparison is: factor -> words, and the figure unless it is ""."""
    arm = side.partition(":")[0]
    levels = levels_of(study).get(arm)
    words = {"arm": arm}
    if levels:
        words = {name: f"{name} {level}" for name, level in zip(study.factors, levels, strict=True)}
    if figure:
        words["figure"] = short(figure)
    return words


def short(figure: str) -> str:
    """A figure as a sentence names it."""
    return heading_of(figure)[0].removesuffix(".bpb")


def main_metric(found: Finished) -> str:
    """The study's first metric that says anything here: the one of the first screen."""
    return next(iter(found.metrics(found.matrix.study.metrics)), "val_bpb")


def asked_first(found: Finished) -> list[Compared]:
    """Every comparison of the main metric, and of the figures that `compare` names in its unit."""
    main = main_metric(found)
    chosen = []
    for one in differences_of(found):
        named = any(":" in side for side in one.names)
        if one.figures[0] == main or (
            named and heading_of(one.figures[0])[1] == heading_of(main)[1]
        ):
            chosen.append(one)
    return chosen


def figures_of(found: Finished) -> list[str]:
    """The figures of the first screen."""
    chosen = [figure for one in asked_first(found) for figure in one.figures]
    return list(dict.fromkeys(chosen)) or [main_metric(found)]


def headings_of(found: Finished) -> list[str]:
    """Their names: with one alone, a sentence leaves it out."""
    return list(dict.fromkeys(map(short, figures_of(found))))


def answers_of(found: Finished) -> list[Answer]:
    """The comparisons of the first screen. Each names its figure where there are several."""
    study = found.matrix.study
    several = len(headings_of(found)) > 1
    answers = []
    for one in asked_first(found):
        left, right = (
            facets(study, side, figure if several else "")
            for side, figure in zip(one.names, one.figures, strict=True)
        )
        answers.append(answer((left, right), one))
    return answers


def scale_of_answers(found: Finished) -> Scale:
    """How the figures of the first screen are written; with no name where they are several."""
    _, unit, digits = heading_of(figures_of(found)[0])
    names = headings_of(found)
    return scale_of(names[0] if len(names) == 1 else "", unit, digits)


def crossed_of(found: Finished) -> list[Answer]:
    """The interactions of a factorial in the main metric, where they are few."""
    main = main_metric(found)
    chosen = [one for one in contrasts_of(found) if one.test and one.figures[0] == main]
    crossed = interactions(found.matrix.study.factors, chosen)
    if len(headings_of(found)) > 1:
        crossed = [one._replace(both=f"{short(main)}, {one.both}") for one in crossed]
    return crossed if len(crossed) <= MAX_CROSSED else []


def told(found: Finished) -> tuple[str, list[Line]]:
    """The answers: how many have which verdict, and a sentence each."""
    scale = scale_of_answers(found)
    answers = answers_of(found)
    return tally(answers, scale), [sentence(one, scale) for one in answers + crossed_of(found)]


def margin_of(found: Finished, name: str) -> float:
    """What the record rule asks for, in BPB of this text; 0 for what is no score."""
    score = name.endswith("val_bpb") or name.startswith("scores.")
    if not score or heading_of(name)[1] != "BPB":
        return 0.0
    run = found.all()[0]
    return RECORD_NATS / math.log(2) * run["val_tokens"] / run["val_bytes"]


def lead_of(found: Finished) -> Lead:
    """The first screen: the question, an answer per comparison, and their forest plot."""
    study = found.matrix.study
    main = main_metric(found)
    heading = scale_of(*heading_of(main)).heading
    charts = []
    if found.all():
        margin = min(margin_of(found, name) for name in figures_of(found))
        with styled():
            charts.append(forest(answers_of(found), scale_of_answers(found), margin))
            charts.append(interaction(cells_of(found, main), study.factors, heading))
    summary, lines = told(found)
    return Lead(
        study.question,
        summary,
        lines,
        remarks(found),
        [chart for chart in charts if chart],
    )


def study_page(found: Finished) -> str:
    """The report as a page."""
    lost = []
    for trial, reason in found.failed.items():
        arm, seed = split_trial(trial)
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

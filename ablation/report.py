"""The tables of a study, from run folders alone, and the report that holds them."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import train_gpt
from ablation.page import html_page
from ablation.records import check_alike, load, metric
from ablation.runner import Ledger
from ablation.statistics import detectable, factorial, paired, record_rule, summary, verdict, welch
from ablation.study import Matrix, product_arms
from train_gpt import COMPARED, Refusal

METRICS = {  # name -> (heading, unit, digits)
    "val_bpb": ("final", "BPB", 5),
    "live_val_bpb": ("live", "BPB", 5),
    "float_val_bpb": ("float", "BPB", 5),
    "quantised_val_bpb": ("quantised", "BPB", 5),
    "quant_gap_bpb": ("quantisation gap", "BPB", 5),
    "step_ms_median": ("step", "ms", 1),
    "steps": ("steps", "", 0),
    "total_bytes": ("code + artifact", "bytes", 0),
}


def heading_of(name: str) -> tuple[str, str, int]:
    """(heading, unit, digits) of a metric."""
    units = {
        "bpb": ("BPB", 5),
        "_ms": ("ms", 2),
        "seconds": ("s", 2),
        "bytes": ("bytes", 0),
        "loss": ("nats", 5),
    }
    unit, digits = next((u for suffix, u in units.items() if name.endswith(suffix)), ("", 5))
    return METRICS.get(name, (name.removeprefix("scores.").removeprefix("toggles."), unit, digits))


def titled(name: str) -> str:
    """A metric as the head of a column: with its unit, where it has one."""
    return ", ".join(filter(None, heading_of(name)[:2]))


@dataclass(frozen=True)
class Finished:
    """What there is of a matrix: results by arm and seed, and reasons of the failed trials by trial."""

    matrix: Matrix
    runs: dict[str, dict[int, dict]]
    failed: dict[str, str]

    def all(self) -> list[dict]:
        return [run for by_seed in self.runs.values() for run in by_seed.values()]

    def values(self, arm: str, name: str) -> dict[int, float]:
        """Seed -> figure, for the runs of an arm that have it."""
        return {
            seed: v
            for seed, run in self.runs.get(arm, {}).items()
            if (v := metric(run, name)) is not None
        }


def load_matrix(matrix: Matrix) -> Finished:
    """The finished and failed trials. Refusal when a log says other settings than the study, or when the runs are of
    different code, data or hardware."""
    runs, failed = {}, Ledger(matrix.folder).failures(matrix.trials)
    for trial in matrix.trials:
        if trial.id in failed or not (trial.folder / "result.json").exists():
            continue
        run = load(trial.folder) | {"arm": trial.arm}
        logged = run["config"]
        if run["exit_code"]:
            failed[trial.id] = (
                f"FAILED (exit {run['exit_code']}): {train_gpt.EXIT_CODES.get(run['exit_code'])}"
            )
            continue
        wrong = [
            f"{n.upper()}={v} in the study, {logged[n]} in the log"
            for n, v in trial.cfg.knobs(*COMPARED).items()
            if n in logged and logged[n] != v
        ]
        if wrong or run["seed"] != trial.seed:
            raise Refusal(
                f"{trial.folder}: {', '.join(wrong) or 'another seed'}; run the study again, or take the old file"
            )
        runs.setdefault(trial.arm, {})[trial.seed] = run
    found = Finished(matrix, runs, failed)
    check_alike(found.all(), config=False)
    for by_seed in runs.values():
        check_alike(list(by_seed.values()), config=True)
    return found


def spell(values: dict[int, float], digits: int) -> str:
    """mean +- sample sd."""
    if not values:
        return "-"
    s = summary(values)
    return f"{s.mean:,.{digits}f}" + (f" ± {s.sd:.{digits}f}" if s.n > 1 else "")


def arm_table(found: Finished) -> tuple[list[str], list[list]]:
    """One row per arm, failed trials included."""
    study = found.matrix.study
    extra = [name for name in study.metrics + study.show if name not in METRICS]
    names = [
        "live_val_bpb",
        "float_val_bpb",
        "quantised_val_bpb",
        "val_bpb",
        "quant_gap_bpb",
        *extra,
        "step_ms_median",
        "steps",
        "total_bytes",
    ]
    rows, told = (
        [],
        any("published" in facts or "expect" in facts for facts in study.facts.values()),
    )
    for arm in found.matrix.arms:
        lost = [
            f"s{name.rpartition('-s')[2]} {why}"
            for name, why in found.failed.items()
            if name.rpartition("-s")[0] == arm
        ]
        figures = [spell(found.values(arm, name), heading_of(name)[2]) for name in names]
        facts = study.facts.get(arm, {})
        published = {
            **facts.get("published", {}),
            **{k: facts[k] for k in ("expect", "note") if k in facts},
        }
        words = "; ".join(
            f"{k}: {', '.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in published.items()
        )
        rows.append(
            [
                arm,
                " ".join(f"{k}={v}" for k, v in study.arms[arm].items()),
                str(len(found.runs.get(arm, {})))
                + (f", failed: {'; '.join(lost)}" if lost else ""),
                *figures,
                *[words] * told,
            ]
        )
    return ["arm", "settings", "n", *map(titled, names), *["published, expected"] * told], rows


def pairs(found: Finished) -> Iterator[tuple[str, str, str, dict, dict]]:
    """(name of a, name of b, metric, values of a, values of b): each arm against the reference in every metric of the
    study, then its own comparisons, where `arm:metric` names a figure of one arm."""
    study, arms, metrics = (
        found.matrix.study,
        found.matrix.arms,
        dict.fromkeys(found.matrix.study.metrics),
    )
    metrics |= dict.fromkeys(
        ["step_ms_median", "steps"] if found.matrix.equal == "time" else []
    )  # what an arm costs
    against = [(study.reference, arm) for arm in arms if arm != study.reference]
    for a, b in dict.fromkeys(against + list(study.compare)):
        (a, own_a), (b, own_b) = (
            (side.partition(":")[0], side.partition(":")[2]) for side in (a, b)
        )
        if a in arms and b in arms:
            for name in [own_a] if own_a else metrics:
                names = (f"{a}:{own_a}" if own_a else a, f"{b}:{own_b}" if own_b else b)
                left, right = found.values(a, name), found.values(b, own_b or name)
                if (left and right) or not any(
                    found.values(arm, name) for arm in arms
                ):  # a name that nothing has is shown
                    yield *names, name, left, right


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
    heading, unit, digits = heading_of(name)
    try:
        test, loose = paired(a, b), welch(a, b)
    except Refusal as refusal:
        return [f"{names[1]} - {names[0]}", heading, *["-"] * 6, f"not compared: {refusal}"]
    mean, low, high, least = (
        f"{x:+.{digits}f}" for x in (test.mean, test.low, test.high, detectable(test.sd, test.n))
    )
    return [
        f"{names[1]} - {names[0]}",
        titled(name),
        mean,
        f"{low} to {high}",
        least.removeprefix("+"),
        f"{test.t:.2f} ({test.df:.0f})",
        f"{test.p:.2g}",
        f"{loose.p:.2g} (df {loose.df:.1f})",
        verdict(test, names, unit),
    ]


def comparison_table(found: Finished) -> tuple[list[str], list[list]]:
    """Same-seed differences, Welch's test beside them, and what can be said. Figures of one shared training are left out."""
    rows = [
        comparison_row((a, b), name, left, right)
        for a, b, name, left, right in pairs(found)
        if left != right or not left
    ]
    return COMPARISON_HEADER, rows


def factorial_table(found: Finished) -> tuple[list[str], list[list]]:
    """Main effects and interactions of a factorial study."""
    study, rows = found.matrix.study, []
    cells = dict(
        zip(
            itertools.product(*study.factors.values()), product_arms(study.factors, str(study.path))
        )
    )
    for name in study.metrics if study.factors else ():
        heading, _, digits = heading_of(name)
        values = {
            cell: found.values(arm, name) for cell, arm in cells.items() if found.values(arm, name)
        }
        try:
            contrasts = factorial(values, study.factors)
        except Refusal as refusal:
            rows.append(["-", heading, "-", "-", "-", f"not computed: {refusal}"])
            continue
        rows += [
            [
                c.term,
                titled(name),
                f"{c.mean:+.{digits}f}",
                f"{c.low:+.{digits}f} to {c.high:+.{digits}f}",
                f"{c.p:.2g}",
                "not distinguishable from 0"
                if c.low <= 0 <= c.high
                else "lower"
                if c.mean < 0
                else "higher",
            ]
            for c in contrasts
        ]
    return ["effect", "metric", "mean", "95 % CI", "p", "in words"], rows


def record_lines(found: Finished) -> list[str]:
    """The challenge's rule for every arm against the reference."""
    reference, lines, tested = found.matrix.study.reference, [], False
    for arm in found.runs:
        new, old = found.values(arm, "val_bpb"), found.values(reference, "val_bpb")
        alike = {
            run["scored"] for name in (arm, reference) for run in found.runs.get(name, {}).values()
        }
        if arm != reference and min(len(new), len(old)) >= 2 and len(alike) == 1:
            run = found.all()[0]
            rule, tested = record_rule(new, old, run["val_tokens"] / run["val_bytes"]), True
            if rule.holds:
                lines.append(
                    f"{arm} is below {reference} by {rule.difference:.5f} BPB, more than the {rule.margin:.5f} BPB "
                    f"(0.005 nats) of the record rule, at p = {rule.p:.2g}."
                )
    return (
        lines
        or [f"No arm is below {reference} by 0.005 nats at p < 0.01 (the record rule)."] * tested
    )


def notes(found: Finished) -> list[str]:
    """How it was made, in sentences."""
    m, runs = found.matrix, found.all()
    waiting = [
        t.id
        for t in m.trials
        if t.id not in found.failed and t.seed not in found.runs.get(t.arm, {})
    ]
    lines = [
        m.study.question,
        f"Source: {m.study.source}" if m.study.source else "",
        m.study.limits,
        m.size.note,
    ]
    if runs:
        r = runs[0]
        trained = sum(1 for run in runs if not run.get("checkpoint"))
        lines += [
            f"{len(runs)} runs, {trained} trainings, on {r['device']}, ranks: {r['world_size']}, threads per rank: "
            f"{r['threads_per_rank']}, trainings side by side: {m.size.jobs}, torch {r['torch']}; scored: "
            f"{r['val_tokens']:,} targets, {r['val_bytes']:,} bytes; code {r['code_sha256'][:12]}.",
            *record_lines(found),
            "Differences are between runs of one seed, and not shown where arms share the figure with their training; "
            "intervals are 95 % t-intervals, not corrected for their number.",
        ]
    budget = f"{m.size.steps} steps" if m.equal == "steps" else f"{m.size.seconds:g} s of training"
    lines += [f"Command: {m.command()} ({budget} each)."]
    lines += [f"NOT RUN YET: {', '.join(waiting)}."] if waiting else []
    return [line for line in lines if line]


def tables(found: Finished) -> dict[str, tuple[list[str], list[list]]]:
    made = {
        "Arms": arm_table(found),
        "Differences": comparison_table(found),
        "Factorial": factorial_table(found),
    }
    return {title: table for title, table in made.items() if table[1]}


def markdown_report(found: Finished) -> str:
    """The report as Markdown."""
    parts = [
        f"# {found.matrix.study.title} ({found.matrix.size.name}, equal {found.matrix.equal})",
        *notes(found),
    ]
    parts += [f"## {title}\n\n{markdown_table(*table)}" for title, table in tables(found).items()]
    return "\n\n".join(parts) + "\n"


def write_report(matrix: Matrix) -> list[Path]:
    """report.md and report.html in the folder of the matrix."""
    found = load_matrix(matrix)
    lost = [
        {"arm": n.rpartition("-s")[0], "seed": int(n.rpartition("-s")[2]), "failed": why}
        for n, why in found.failed.items()
    ]
    title = f"{matrix.study.title} ({matrix.size.name}, equal {matrix.equal})"
    page = html_page(title, notes(found), tables(found), found.all() + lost)
    pages = {"report.md": markdown_report(found), "report.html": page}
    for name, text in pages.items():
        train_gpt.write_atomic(matrix.folder / name, text.encode("utf-8", "replace"))
    return [matrix.folder / name for name in pages]


def markdown_table(header: list, rows: list[list]) -> str:
    """A table in GitHub Markdown."""

    def cell(value) -> str:
        text = "-" if value is None else str(value)
        return "<br>".join(re.sub(r"([\\|<])", r"\\\1", text).splitlines())

    lines = [[cell(value) for value in line] for line in (header, *rows)]
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(header), *lines[1:]]
    )

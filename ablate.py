"""Ablations that can be trusted: studies as data, clean runs, honest statistics, reports,
submission folders.

    python ablate.py run studies/pr989_qat_x_swa.toml --size small
        Train what is missing of a study, then report.

    python ablate.py report studies/pr989_qat_x_swa.toml --size small
        Markdown, and one HTML page.

    python ablate.py compare 'logs/base-s*' 'logs/mine-s*'
        Two sets of runs.

    python ablate.py sweep studies/pr989_qat_x_swa.toml --grid MATRIX_LR=0.01,0.02,0.04
        One or two settings over a grid.

    python ablate.py env studies/leaderboard.toml pr1855
        The command that runs an arm, to paste.

    python ablate.py sensitivity logs/mine
        What each tensor costs quantised alone, and where bytes are worth most.

    python ablate.py submission logs/mine-s1 logs/mine-s2 --out records/mine
        --author A --github-id a --name Mine
        A leaderboard folder.

    python ablate.py check records/mine
        From that folder alone.

This file is the command line; the package ablation does the work, in the order in which data
flows: STUDY.toml -> arms -> trials (arm x seed) -> processes -> run folders -> statistics ->
report -> submission folder. Any file in studies/ shows the format of a study.
"""

import dataclasses
import hashlib
import json
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import train_gpt
from ablation.answers import compare_sides
from ablation.check import check_submission
from ablation.findings import counts, is_clean
from ablation.records import (
    check_alike,
    check_arm,
    code_difference,
    differing,
    find_runs,
    metric,
)
from ablation.report import (
    COMPARISON_HEADER,
    comparison_row,
    heading_of,
    markdown_table,
    spell,
    write_report,
)
from ablation.run_page import write_run_page
from ablation.runner import Runner, gpu_gate, pasted, run_here, shell
from ablation.sensitivity import write_sensitivity
from ablation.slurm import run_as_jobs
from ablation.statistics import record_rule
from ablation.study import (
    OWN,
    ROOT,
    Matrix,
    Size,
    Study,
    arm_settings,
    check_equal,
    matrix,
    read_study,
    with_pairs,
)
from ablation.submission import ABOUT, build_submission
from prepare_data import exit_code_of, options_as_parameters, printable
from train_gpt import Refusal

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__.split("\n\n")[0]
)


def say(text: str) -> None:
    """Prints lines that may hold strings of a file."""
    print("\n".join(map(printable, text.split("\n"))))


# ── Options ───────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Which matrix."""

    study: Annotated[Path, typer.Argument(help="a TOML file, see studies/")]
    size: Annotated[str, typer.Option(help="a [size.NAME] of the study")] = "small"
    equal: Annotated[
        str,
        typer.Option(
            help="what all arms get: steps, or time (the challenge's view); default: the size's"
        ),
    ] = ""
    seeds: Annotated[str, typer.Option(help="such as 1,2,3; default: the study's")] = ""
    ranks: Annotated[int, typer.Option(min=0, help="processes, one per GPU; 0: the size's")] = 0
    out: Annotated[
        Path | None, typer.Option(help="folder of the runs; default logs/runs/STUDY/SIZE-EQUAL")
    ] = None

    def matrix(self) -> Matrix:
        """The trials. Refusal on a wrong option, and on a wrong study."""
        if self.equal:
            check_equal(self.equal, "--equal")
        try:
            seeds = tuple(int(seed) for seed in self.seeds.split(",") if seed)
        except ValueError:
            raise Refusal(f"--seeds {self.seeds}: give whole numbers separated by commas") from None
        made = matrix(read_study(self.study), self.size, self.equal, seeds, self.out)
        if not self.ranks:
            return made
        return dataclasses.replace(made, size=dataclasses.replace(made.size, ranks=self.ranks))


@dataclass(frozen=True, kw_only=True)
class RunOptions(StudyOptions):
    """Which matrix, and how to run it."""

    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the commands and projected seconds, run nothing"),
    ] = False
    retry: Annotated[bool, typer.Option("--retry", help="run failed trials again")] = False
    only: Annotated[str, typer.Option(help="these trials alone, separated by commas")] = ""
    launcher: Annotated[str, typer.Option(help="here, or slurm: one job per training")] = "here"
    slurm: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE", help="an option of sbatch, such as partition=NAME; once or more"
        ),
    ] = ()
    synced: Annotated[
        float,
        typer.Option(min=0, help="seconds until other machines see a file; 0: they share the disk"),
    ] = 0.0
    price: Annotated[float, typer.Option(min=0, help="dollars for an hour of one GPU")] = 0.0
    cool_down: Annotated[float, typer.Option(min=0, help="seconds to wait before each trial")] = 0.0
    max_celsius: Annotated[
        float, typer.Option(min=0, help="wait until every GPU is cooler; 0: do not look")
    ] = 0.0
    max_busy: Annotated[
        float,
        typer.Option(min=0, help="wait until every GPU is less busy, percent; 0: do not look"),
    ] = 0.0

    def limits(self) -> tuple[float, float, float]:
        """What gpu_gate waits for."""
        return self.cool_down, self.max_celsius, self.max_busy

    def trials(self) -> tuple[str, ...]:
        """Those that --only names; empty: all."""
        return tuple(name for name in self.only.split(",") if name)

    def check(self, made: Matrix) -> None:
        """Refusal on options that do not fit each other or the matrix."""
        if self.launcher not in ("here", "slurm"):
            raise Refusal(f"--launcher {self.launcher}: choose here or slurm")
        if self.slurm and self.launcher != "slurm":
            raise Refusal(f"--slurm {self.slurm[0]}: add --launcher slurm, or leave it out")
        if self.synced and self.launcher == "slurm":
            raise Refusal(
                f"--synced {self.synced:g}: the nodes of a cluster share a disk; remove it"
            )
        if self.price and not made.size.gpu:
            raise Refusal(f"--price {self.price:g}: size {made.size.name} names no gpu; remove it")
        if self.price and not self.dry_run:
            raise Refusal(f"--price {self.price:g}: add --dry-run, or leave it out")
        jobs = made.size.jobs
        if any(self.limits()) and jobs > 1:
            raise Refusal(
                f"--cool-down, --max-celsius, --max-busy: {jobs} trainings run side by side; "
                "set its jobs to 1"
            )

    def repeated(self, made: Matrix) -> list[str]:
        """The arguments of a job that runs a part of this matrix."""
        seeds = dict.fromkeys(trial.seed for trial in made.trials)
        options = {
            "size": made.size.name,
            "equal": made.equal,
            "out": made.folder,
            "seeds": ",".join(map(str, seeds)),
            "ranks": made.size.ranks,
            "cool-down": self.cool_down,
            "max-celsius": self.max_celsius,
            "max-busy": self.max_busy,
        }
        words = ["run", str(made.study.path.absolute())]
        if self.retry:
            words.append("--retry")
        return words + [f"--{name}={value}" for name, value in options.items()]


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """`study` gives settings, sizes and seeds; its reference arm is what the grid varies."""

    grid: Annotated[list[str], typer.Option(help="KNOB=v1,v2,...; once or twice")]


ACROSS_CODE = typer.Option(
    "--across-code", help="let the code of the arms differ; the difference is named"
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(StudyOptions):
    """Which matrix, and what to make of it; or the folder of one run."""

    study: Annotated[
        Path, typer.Argument(help="a TOML file, see studies/; or the folder of one run")
    ]
    pair: Annotated[
        list[str] | None,
        typer.Option(help="A,B: B - A too; ARM,ARM or ARM:METRIC,ARM:METRIC; may be repeated"),
    ] = None
    across_code: Annotated[bool, ACROSS_CODE] = False

    def refuse_all_but_the_folder(self) -> None:
        """Refusal on an option beside the folder of a run, which leaves nothing to choose."""
        for f in dataclasses.fields(self):
            if f.default is not dataclasses.MISSING and getattr(self, f.name) != f.default:
                option = f.name.replace("_", "-")
                raise Refusal(f"--{option}: is of a study; {self.study} is the folder of a run")


# ── Run and report ────────────────────────────────────────────────────────────────────────────────
def print_plan(runner: Runner, price: float) -> None:
    """Every command that would run, with its projected seconds; GPU hours, and what they cost."""
    made = runner.matrix
    for trial in runner.todo:
        shares = f", shares the training of {trial.donor}" if trial.donor else ""
        print(f"# {trial.id}: about {runner.seconds(trial):.0f} s{shares}")
        print(shell(trial, made.size))
    print(
        f"# {len(runner.todo)} of {len(made.trials)} trials to run, "
        f"about {runner.remaining() / 60:.0f} min"
    )
    if made.size.gpu:
        hours = runner.gpu_hours()
        cost = f", {hours * price:,.0f} dollars at {price:g} an hour" if price else ""
        print(f"# about {hours:.1f} hours of one {made.size.gpu}{cost}; compiling is not counted")


@app.command()
@options_as_parameters(RunOptions)
def run(options: RunOptions) -> None:
    """Run what is missing of a study, then write its report. Exit code 1 when a trial failed."""
    made = options.matrix()
    only = options.trials()
    options.check(made)
    gate = partial(gpu_gate, *options.limits())
    if options.synced and not options.dry_run:
        print(f"waiting {options.synced:g} s for what other machines have written", flush=True)
        time.sleep(options.synced)
    runner = Runner(made, options.retry, only, gate, options.synced)
    if runner.failed:
        print(f"{len(runner.failed)} trials failed before and stay so (--retry runs them again)")
    if options.dry_run:
        print_plan(runner, options.price)
        return

    if options.launcher == "here":
        run_here(runner)
    else:
        run_as_jobs(runner, options.slurm, options.repeated(made))
    if not only:
        for path in write_report(made):
            print(f"wrote {path}")

    after = Runner(made, only=only)
    failed = any(trial.id in after.failed for trial in after.chosen)
    raise typer.Exit(int(bool(after.todo) or failed))


@app.command()
@options_as_parameters(ReportOptions)
def report(options: ReportOptions) -> None:
    """Print the report of a study as Markdown; write report.md and report.html beside its runs.
    Of a run, given by its folder: write page.html there.
    """
    if options.study.is_dir():
        options.refuse_all_but_the_folder()
        print(f"page: {write_run_page(options.study)}")
        return
    made = with_pairs(options.matrix(), options.pair or [])
    paths = write_report(made, options.across_code)
    say(paths[0].read_text())
    print("\n".join(f"wrote {path}" for path in paths), file=sys.stderr)


# ── One arm ───────────────────────────────────────────────────────────────────────────────────────
@app.command()
def env(
    study: Annotated[Path, typer.Argument(help="a TOML file, see studies/")],
    arm: Annotated[str, typer.Argument(help="an [arm.NAME] of it")],
    size: Annotated[str, typer.Option(help="a [size.NAME] of the study")] = "full",
    equal: Annotated[str, typer.Option(help="its budget: steps, or time")] = "",
    seed: Annotated[int, typer.Option(min=0)] = 1337,
) -> None:
    """Print the command that runs one arm of a study, to paste: with every setting spelt out, and
    by the base that it refers to.
    """
    made = read_study(study)
    if size not in made.sizes:
        raise Refusal(f"{study}: no size {size}; choose from {', '.join(made.sizes)}")
    chosen = made.sizes[size]
    equal = equal or chosen.equal
    check_equal(equal, "--equal")
    spelt_out, *by_base = pasted(made, chosen, arm, equal, seed)
    say(f"# {arm}, every setting\n{spelt_out}")
    for line in by_base:
        say(f"# the same by its base\n{line}")


# ── Compare ───────────────────────────────────────────────────────────────────────────────────────
def run_set(patterns: str) -> list[dict]:
    """The runs whose folders match one of these patterns, separated by commas.

    Refusal unless they are one arm.
    """
    runs = find_runs(patterns.split(","))
    if not runs:
        raise Refusal(
            f"{patterns}: no folder with a result.json matches; "
            "quote the pattern, as in 'logs/base-s*'"
        )
    for found in runs:
        if found["exit_code"]:
            raise Refusal(
                f"{found['name']}: exit code {found['exit_code']}; only good runs are compared, "
                "leave it out"
            )
    check_arm(runs)
    return runs


def figures(runs: list[dict], name: str) -> dict[int, float]:
    """Seed -> a figure, for the runs that have it."""
    found = {r["seed"]: metric(r, name) for r in runs}
    return {seed: value for seed, value in found.items() if value is not None}


def comparison_rows(left: list[dict], right: list[dict], metrics: str) -> list[list]:
    """One row per figure that both sides have. Refusal where there is none."""
    rows = []
    for name in metrics.split(","):
        a = figures(left, name)
        b = figures(right, name)
        if a and b:
            digits = heading_of(name)[2]
            row = comparison_row(compare_sides(("a", "b"), (name, name), a, b))
            rows.append([*row, spell(a, digits), spell(b, digits)])
    if not rows:
        raise Refusal(
            f"--metrics {metrics}: no run of both sides has one of them; "
            "see the keys of result.json"
        )
    return rows


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(help="run folders: a quoted pattern, or several separated by commas")
    ],
    b: Annotated[str, typer.Argument(help="the same for the other side")],
    metrics: Annotated[
        str, typer.Option(help="figures of result.json, with commas")
    ] = "val_bpb,quant_gap_bpb,step_ms_median",
    across_code: Annotated[bool, ACROSS_CODE] = False,
) -> None:
    """Compare two sets of runs: b - a, seed by seed, with Welch's test and the record rule
    beside it.
    """
    left = run_set(a)
    right = run_set(b)
    check_alike(left + right, across_code)
    difference = code_difference({"a": left, "b": right})
    if difference:
        say(f"{difference}\n")
    settings = differing(left[0]["config"], right[0]["config"]) or "none"
    say(f"a: {a}, {len(left)} runs\nb: {b}, {len(right)} runs\nsettings that differ: {settings}\n")
    rows = comparison_rows(left, right, metrics)
    say(markdown_table([*COMPARISON_HEADER, "a", "b"], rows))

    old = {r["seed"]: r["val_bpb"] for r in left}
    new = {r["seed"]: r["val_bpb"] for r in right}
    rule = record_rule(new, old, left[0]["val_tokens"] / left[0]["val_bytes"])
    holds = "holds" if rule.holds else "does not hold"
    print(
        f"\nRecord rule, b against a: {holds} (a - b {rule.difference:+.5f} BPB against a "
        f"margin of {rule.margin:.5f} BPB = 0.005 nats; "
        f"one-sided Welch p = {rule.p:.3g}, needed below 0.01)"
    )


# ── Sweep ─────────────────────────────────────────────────────────────────────────────────────────
def sweep_tables(base: Study, scale: Size, equal: str, factors: dict[str, str]) -> dict[str, dict]:
    """The tables of a study that varies these knobs of the reference arm; "": the top level."""
    env = {**base.env, **arm_settings(base, scale, base.reference, equal or scale.equal)}
    size = dataclasses.asdict(scale)
    if scale.scale:
        size["steps"] = int(env["ITERATIONS"])
    for key in ("name", "arms", "time_arms", "env", "seeds", "scale"):
        del size[key]
    return {
        "": {
            "title": f"Sweep of {', '.join(factors)} on {base.name}",
            "seeds": list(scale.seeds or base.seeds),
            "metrics": list(base.metrics),
        },
        "env": {knob: env[knob] for knob in env if knob not in factors and knob not in OWN},
        f"size.{scale.name}": size,
        "factorial": {knob: values.split(",") for knob, values in factors.items()},
    }


def toml(tables: dict[str, dict]) -> str:
    """The tables as TOML: JSON's strings, numbers and lists are TOML's, too."""
    lines = []
    for name, table in tables.items():
        if name:
            lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


@app.command()
@options_as_parameters(SweepOptions)
def sweep(options: SweepOptions) -> None:
    """Write a study that varies one or two settings of a study's reference arm over a grid,
    and run it.
    """
    base = read_study(options.study)
    factors = dict(entry.partition("=")[::2] for entry in options.grid)
    if not 1 <= len(factors) <= 2 or not all(factors.values()):
        raise Refusal(f"--grid {options.grid}: give one or two, each as KNOB=v1,v2,...")
    if options.size not in base.sizes:
        raise Refusal(f"{base.path}: no size {options.size}; choose from {', '.join(base.sizes)}")

    text = toml(sweep_tables(base, base.sizes[options.size], options.equal, factors))
    digest = hashlib.sha256(repr(sorted(factors.items())).encode()).hexdigest()[:6]
    name = f"sweep_{'_'.join(factors).lower()}_{base.name}_{digest}.toml"
    path = ROOT / "logs/runs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    train_gpt.write_atomic(path, text.encode())
    print(f"wrote {path}")
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(RunOptions)}
    run(**values | {"study": path})


# ── Sensitivity ───────────────────────────────────────────────────────────────────────────────────
@app.command()
def sensitivity(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder with checkpoint.bin")],
    by: Annotated[str, typer.Option(help="what is quantised alone: tensor, or layer")] = "tensor",
    bits: Annotated[str, typer.Option(help="such as 4,8: these bits, too")] = "",
    tokens: Annotated[
        int, typer.Option(min=1, help="so many of the end of the training text are scored")
    ] = 32768,
) -> None:
    """Quantise each part of a trained model alone, also at other k and bits, and tell where bytes
    are worth most, on training text; write sensitivity.html into the folder.
    """
    if by not in ("tensor", "layer"):
        raise Refusal(f"--by {by}: choose tensor or layer")
    given = tuple(bits.split(",")) if bits else ()
    known = [str(n) for n in train_gpt.CODE_BITS]
    if not set(given) <= set(known):
        raise Refusal(f"--bits {bits}: give numbers separated by commas, of {', '.join(known)}")
    say(write_sensitivity(folder, by, tuple(map(int, given)), tokens))


# ── Submission ────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, kw_only=True)
class SubmissionOptions:
    """Which runs, and what no log can tell."""

    runs: Annotated[list[Path], typer.Argument(help="run folders, one per seed")]
    out: Annotated[Path, typer.Option(help="the folder to make")]
    author: Annotated[str, typer.Option()]
    github_id: Annotated[str, typer.Option()]
    name: Annotated[str, typer.Option(help="title of the run")]
    blurb: Annotated[str, typer.Option(help="one paragraph")] = ""
    track: Annotated[
        str, typer.Option(help="default: 10min_16mb for three good seeds on 8xH100, else none")
    ] = ""

    def about(self) -> dict[str, str]:
        """The texts of the folder."""
        return {key: getattr(self, key) for key in ABOUT}


@app.command()
@options_as_parameters(SubmissionOptions)
def submission(options: SubmissionOptions) -> None:
    """Build the leaderboard folder from the logs of full trainings, one per seed."""
    print(f"wrote {build_submission(options.runs, options.out, options.about())}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="a submission folder; nothing outside it is read")],
    run_script: Annotated[
        bool,
        typer.Option("--run-script", help="import its script too: only if you trust it"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False,
) -> None:
    """Check anybody's submission folder by itself: files, bytes, times, scores, seeds, numbers.
    One line per finding with its weight, errors first. Exit code 0: clean, neither an error nor a
    warning (what is not checked does not count); 1: findings; 2: no folder, or nothing in it that
    can be read.
    """
    found = check_submission(folder, run_script)
    clean = is_clean(found)
    if as_json:
        print(json.dumps([one._asdict() for one in found], indent=1))
    else:
        print("\n".join(f"{one.weight.upper():11s} {one}" for one in found))
        say(f"{folder}: {'clean' if clean else 'not clean'}: {counts(found)}")
    raise typer.Exit(int(not clean))


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return exit_code_of(app, "ablate.py", arguments, Refusal)


if __name__ == "__main__":
    # A terminated study ends its runs, as an interrupted one does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

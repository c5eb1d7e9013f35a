"""Ablations that can be trusted: studies as data, clean runs, honest statistics, reports, submission folders.

    python ablate.py run studies/pr989_qat_x_swa.toml --size small            # train what is missing, then report
    python ablate.py report studies/pr989_qat_x_swa.toml --size small         # Markdown, and one HTML page
    python ablate.py compare 'logs/base-s*' 'logs/mine-s*'                    # two sets of runs
    python ablate.py sweep studies/pr989_qat_x_swa.toml --grid MATRIX_LR=0.01,0.02,0.04
    python ablate.py submission logs/mine-s1 logs/mine-s2 --out records/mine --author A --github-id a --name Mine
    python ablate.py check records/mine

The file reads in the order in which data flows:
STUDY.toml -> arms -> trials (arm x seed) -> processes -> run folders -> statistics -> report -> submission folder.
Format of a study: see README, or any file in studies/.
"""

import dataclasses
import glob
import hashlib
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import train_gpt
from ablation.records import check_alike, differing, load, metric
from ablation.report import (
    COMPARISON_HEADER,
    comparison_row,
    heading_of,
    markdown_table,
    spell,
    write_report,
)
from ablation.runner import Runner, gpu_gate, run_elsewhere, run_here, shell
from ablation.statistics import record_rule
from ablation.study import ROOT, Matrix, matrix, read_study
from ablation.check import check_submission
from ablation.submission import build_submission
from prepare_data import exit_code_of, options_as_parameters, printable
from train_gpt import Refusal

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__.split("\n\n")[0]
)


def say(text: str) -> None:
    """Prints lines that may hold strings of a file."""
    print("\n".join(map(printable, text.split("\n"))))


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Which matrix."""

    study: Annotated[Path, typer.Argument(help="a TOML file, see studies/")]
    size: Annotated[str, typer.Option(help="a [size.NAME] of the study")] = "small"
    equal: Annotated[
        str, typer.Option(help="what all arms get: steps, or time (the challenge's view)")
    ] = "steps"
    seeds: Annotated[str, typer.Option(help="such as 1,2,3; default: the study's")] = ""
    ranks: Annotated[int, typer.Option(min=0, help="processes, one per GPU; 0: the size's")] = 0
    out: Annotated[
        Path | None, typer.Option(help="folder of the runs; default logs/runs/STUDY/SIZE-EQUAL")
    ] = None

    def matrix(self) -> Matrix:
        if self.equal not in ("steps", "time"):
            raise Refusal(f"--equal {self.equal}: choose steps or time")
        try:
            seeds = tuple(int(s) for s in self.seeds.split(",") if s)
        except ValueError:
            raise Refusal(f"--seeds {self.seeds}: give whole numbers separated by commas") from None
        m = matrix(read_study(self.study), self.size, self.equal, seeds, self.out)
        return dataclasses.replace(
            m, size=dataclasses.replace(m.size, ranks=self.ranks or m.size.ranks)
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(StudyOptions):
    """Which matrix, and how to run it."""

    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the commands and projected seconds, run nothing"),
    ] = False
    retry: Annotated[bool, typer.Option("--retry", help="run failed trials again")] = False
    only: Annotated[str, typer.Option(help="these trials alone, separated by commas")] = ""
    launcher: Annotated[
        str, typer.Option(help="here; slurm or local: one job per training, through submitit")
    ] = "here"
    cool_down: Annotated[float, typer.Option(min=0, help="seconds to wait before each trial")] = 0.0
    max_celsius: Annotated[
        float, typer.Option(min=0, help="wait until every GPU is cooler; 0: do not look")
    ] = 0.0
    max_busy: Annotated[
        float,
        typer.Option(min=0, help="wait until every GPU is less busy, percent; 0: do not look"),
    ] = 0.0


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """`study` gives settings, sizes and seeds; its reference arm is what the grid varies."""

    grid: Annotated[list[str], typer.Option(help="KNOB=v1,v2,...; once or twice")]


@app.command()
@options_as_parameters(RunOptions)
def run(options: RunOptions) -> None:
    """Run what is missing of a study, then write its report. Exit code 1 when a trial failed."""
    m, only = options.matrix(), tuple(name for name in options.only.split(",") if name)
    limits = (options.cool_down, options.max_celsius, options.max_busy)
    if options.launcher not in ("here", "slurm", "local"):
        raise Refusal(f"--launcher {options.launcher}: choose here, slurm or local")
    if any(limits) and m.size.jobs > 1:
        raise Refusal(
            f"--cool-down, --max-celsius, --max-busy: {m.size.jobs} trainings run side by side; set its jobs to 1"
        )
    runner = Runner(m, options.retry, only, lambda: gpu_gate(*limits))
    if runner.failed:
        print(f"{len(runner.failed)} trials failed before and stay so (--retry runs them again)")
    if options.dry_run:
        for trial in runner.todo:
            shares = f", shares the training of {trial.donor}" if trial.donor else ""
            print(
                f"# {trial.id}: about {runner.seconds(trial):.0f} s{shares}\n{shell(trial, m.size)}"
            )
        print(
            f"# {len(runner.todo)} of {len(m.trials)} trials to run, about {runner.remaining() / 60:.0f} min"
        )
        return
    if options.launcher == "here":
        run_here(runner)
    else:
        seeds = ",".join(str(seed) for seed in dict.fromkeys(t.seed for t in m.trials))
        said = {
            "size": m.size.name,
            "equal": m.equal,
            "out": m.folder,
            "seeds": seeds,
            "ranks": m.size.ranks,
            "cool-down": limits[0],
            "max-celsius": limits[1],
            "max-busy": limits[2],
        }
        run_elsewhere(
            runner,
            options.launcher,
            [
                "run",
                str(m.study.path.absolute()),
                *["--retry"] * options.retry,
                *(f"--{name}={value}" for name, value in said.items()),
            ],
        )
    for path in [] if only else write_report(m):
        print(f"wrote {path}")
    after = Runner(m, only=only)
    raise typer.Exit(int(bool(after.todo) or any(t.id in after.failed for t in after.chosen)))


@app.command()
@options_as_parameters(StudyOptions)
def report(options: StudyOptions) -> None:
    """Print the report of a study as Markdown; write report.md and report.html beside its runs."""
    paths = write_report(options.matrix())
    say(paths[0].read_text())
    print("\n".join(f"wrote {path}" for path in paths), file=sys.stderr)


def run_set(patterns: str) -> list[dict]:
    """The runs whose folders match one of these patterns, separated by commas; Refusal unless they are one arm."""
    folders = [
        Path(name)
        for name in sorted({name for pattern in patterns.split(",") for name in glob.glob(pattern)})
    ]
    folders = [folder for folder in folders if (folder / "result.json").exists()]
    if not folders:
        raise Refusal(
            f"{patterns}: no folder with a result.json matches; quote the pattern, as in 'logs/base-s*'"
        )
    runs = [load(folder) for folder in folders]
    for run in runs:
        if run["exit_code"]:
            raise Refusal(
                f"{run['name']}: exit code {run['exit_code']}; only good runs are compared, leave it out"
            )
    check_alike(runs, config=True)
    return runs


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(help="run folders: a quoted pattern, or several separated by commas")
    ],
    b: Annotated[str, typer.Argument(help="the same for the other side")],
    metrics: Annotated[
        str, typer.Option(help="figures of result.json, with commas")
    ] = "val_bpb,quant_gap_bpb,step_ms_median",
) -> None:
    """Compare two sets of runs: b - a, seed by seed, with Welch's test and the record rule beside it."""
    left, right = run_set(a), run_set(b)
    check_alike(left + right, config=False)
    say(
        f"a: {a}, {len(left)} runs\nb: {b}, {len(right)} runs\nsettings that differ: "
        f"{differing(left[0]['config'], right[0]['config']) or 'none'}\n"
    )
    rows = []
    for name in metrics.split(","):
        values = [
            {r["seed"]: v for r in side if (v := metric(r, name)) is not None}
            for side in (left, right)
        ]
        if all(values):
            rows.append(
                [
                    *comparison_row(("a", "b"), name, *values),
                    *(spell(v, heading_of(name)[2]) for v in values),
                ]
            )
    if not rows:
        raise Refusal(
            f"--metrics {metrics}: no run of both sides has one of them; see the keys of result.json"
        )
    say(markdown_table([*COMPARISON_HEADER, "a", "b"], rows))
    new, old = ({r["seed"]: r["val_bpb"] for r in side} for side in (right, left))
    rule = record_rule(new, old, left[0]["val_tokens"] / left[0]["val_bytes"])
    print(
        f"\nRecord rule, b against a: {'holds' if rule.holds else 'does not hold'} (a - b {rule.difference:+.5f} BPB against a "
        f"margin of {rule.margin:.5f} BPB = 0.005 nats; one-sided Welch p = {rule.p:.3g}, needed below 0.01)"
    )


@app.command()
@options_as_parameters(SweepOptions)
def sweep(options: SweepOptions) -> None:
    """Write a study that varies one or two settings of a study's reference arm over a grid, and run it."""
    base, factors = (
        read_study(options.study),
        dict(entry.partition("=")[::2] for entry in options.grid),
    )
    if not 1 <= len(factors) <= 2 or not all(factors.values()):
        raise Refusal(f"--grid {options.grid}: give one or two, each as KNOB=v1,v2,...")
    if options.size not in base.sizes:
        raise Refusal(f"{base.path}: no size {options.size}; choose from {', '.join(base.sizes)}")
    digest = hashlib.sha256(repr(sorted(factors.items())).encode()).hexdigest()[:6]
    path = ROOT / "logs/runs" / f"sweep_{'_'.join(factors).lower()}_{base.name}_{digest}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = base.sizes[options.size]
    env = {**base.env, **scale.env, **base.arms[base.reference]}
    size = {
        k: v
        for k, v in dataclasses.asdict(scale).items()
        if k not in ("name", "arms", "env", "seeds")
    }
    title = f"Sweep of {', '.join(factors)} on {base.name}"
    blocks = {
        "": {
            "title": title,
            "seeds": list(scale.seeds or base.seeds),
            "metrics": list(base.metrics),
        },
        "env": {k: v for k, v in env.items() if k not in factors},
        f"size.{options.size}": size,
        "factorial": {knob: values.split(",") for knob, values in factors.items()},
    }
    lines = [
        line
        for name, table in blocks.items()
        for line in [
            f"[{name}]" * bool(name),
            *(f"{key} = {json.dumps(value)}" for key, value in table.items()),
            "",
        ]
    ]
    train_gpt.write_atomic(path, "\n".join(lines).encode())
    print(f"wrote {path}")
    run(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(RunOptions)}
        | {"study": path}
    )


@app.command()
def submission(
    runs: Annotated[list[Path], typer.Argument(help="run folders, one per seed")],
    out: Annotated[Path, typer.Option(help="the folder to make")],
    author: Annotated[str, typer.Option()],
    github_id: Annotated[str, typer.Option()],
    name: Annotated[str, typer.Option(help="title of the run")],
    blurb: Annotated[str, typer.Option(help="one paragraph")] = "",
    track: Annotated[
        str, typer.Option(help="default: 10min_16mb for three good seeds on 8xH100, else none")
    ] = "",
) -> None:
    """Build the leaderboard folder from the logs of full trainings, one per seed."""
    about = {"author": author, "github_id": github_id, "name": name, "blurb": blurb, "track": track}
    print(f"wrote {build_submission(runs, out, about)}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="a submission folder; nothing outside it is read")],
) -> None:
    """Check a submission folder by itself: figures against logs, files, hashes, bytes, times, import. Exit code 1: a problem."""
    problems = check_submission(folder)
    print("\n".join(f"PROBLEM {p}" for p in problems) or f"{folder}: good")
    raise typer.Exit(int(bool(problems)))


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return exit_code_of(app, "ablate.py", arguments, Refusal)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a terminated study ends its runs, as an interrupted one does
    sys.exit(main())

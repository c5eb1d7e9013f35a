"""What train_gpt.py costs here: every stage beside its simple twin and the floor that this machine
sets; and beside its peers.

    # the configuration of the environment, as train_gpt.py takes it
    python bench.py run
    # the same on several ranks
    torchrun --standalone --nproc_per_node=8 bench.py run
    # public training scripts and ours, on the same shards
    python bench.py peers --script 194=PATH --data FOLDER
    # ranks x threads for these cores, measured once: what make train takes without a GPU
    python bench.py ranks
    # the table of a report of either kind
    python bench.py show logs/bench/NAME.json --markdown

A twin does the same in the plainest way: one tensor, one window, one batch at a time. It is timed
in turn with the fast part, so that what disturbs one disturbs both, and it is the reference for
correctness (tests/test_bench.py). A floor is FLOPs over the measured matmul rate plus bytes over
the measured speed of a copy with as large a working set. Comparisons of two times on a busy machine
are to be trusted more than the times.

This is the command line; benchmarks/ holds the parts, and says in which order to read them.
"""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer

import prepare_data
import train_gpt
from benchmarks.machine import device_name
from benchmarks.measure import measure
from benchmarks.peers import PeerOptions, compare
from benchmarks.ranks import say_choice
from benchmarks.report import BENCH, table
from train_gpt import Config, Refusal, refuse

app = typer.Typer(help=__doc__.split("\n\n")[0], add_completion=False, rich_markup_mode=None)


@app.command()
def run(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=value ...", help="as for train_gpt.py")
    ] = None,
    name: Annotated[str, typer.Option(help="of the report; default: the device's")] = "",
    force: Annotated[bool, typer.Option("--force", help="overwrite a report of this name")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a few repeats of small work: to try it, not to publish")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of the reports")] = BENCH,
) -> None:
    """Measure everything here, write OUT/NAME.json, print its table. Settings: arguments and the
    environment, as for train_gpt.py.
    """
    cfg = Config.from_env(os.environ, settings or [])
    refuse(
        cfg.checkpoint or cfg.eval_only,
        "CHECKPOINT, EVAL_ONLY: bench.py trains a few steps; unset them",
    )
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    path = out / f"{name or default_name(world)}.json"
    refuse(
        path.exists() and not force, f"{path}: exists; --force overwrites it, --name gives another"
    )

    report = measure(cfg, quick)
    command = command_of(report, path.stem, world, quick)
    report = dict(name=path.stem, command=command, **report)
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        train_gpt.write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
        print(f"{table(json.loads(path.read_text()))}\n\nwrote {path}")
    if dist.is_initialized():
        dist.destroy_process_group()


def default_name(world: int) -> str:
    """The device and the number of ranks, as a file's name."""
    ranks = f" x {world}" if world > 1 else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{device_name()}{ranks}".lower()).strip("-")


def command_of(report: dict, name: str, world: int, quick: bool) -> str:
    """The line for a shell that makes this report again."""
    threads = {key: value for key, value in report["variables"].items() if "OMP_" in key}
    settings = threads | report["settings"]
    words = [f"{key}={shlex.quote(value)}" for key, value in settings.items()]
    if world == 1:
        words.append("python")
    else:
        words.append(f"torchrun --standalone --nproc_per_node={world}")
    words += ["bench.py run --name", shlex.quote(name)]
    if quick:
        words.append("--quick")
    return " ".join(words)


@app.command()
def ranks(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=value ...", help="as for train_gpt.py")
    ] = None,
) -> None:
    """Print the ranks and the threads of each with which this CPU steps fastest; never fails."""
    say_choice(settings or [])


@app.command()
@prepare_data.options_as_parameters(PeerOptions)
def peers(options: PeerOptions) -> None:
    """Run public scripts and ours for the same seconds on the same shards; write OUT.json. A
    failure is a row.
    """
    compare(options)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="a report", exists=True, dir_okay=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="as in README")] = False,
) -> None:
    """Print the table of a report."""
    print(table(json.loads(path.read_text()), markdown))


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return prepare_data.exit_code_of(app, "bench.py", arguments, Refusal)


if __name__ == "__main__":
    # Whoever ends this ends the run under way.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

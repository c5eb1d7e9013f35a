"""Ranks x threads: how this machine's cores step fastest. For `make train` without a GPU.

In: a configuration. Out: an arrangement. Each is a group of processes that make real steps of the
configuration on its data, the groups in turn. What was found is remembered for the machine and the
model. Nothing here may end a run: where it fails, the usual arrangement is taken.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

import train_gpt
from benchmarks.machine import ROOT
from train_gpt import AS_FAST, Config, Refusal, Run, Split, StepPlan, Trainer, Validation

REMEMBERED = ROOT / ".venv" / "ranks.json"
STEPS = 2  # of a turn
TURNS = 4
# Seconds until all are ready, then of all turns; the first turn is made whatever it takes
PATIENCE = 60.0
LIMIT = 4.0


class Arrangement(NamedTuple):
    """So many processes with so many threads each."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        return f"{self.ranks} x {self.threads}"


def usual(cores: int) -> Arrangement:
    """What is taken where nothing was measured."""
    return Arrangement(min(2, cores), 1)


def arrangements(cores: int, rows: int) -> list[Arrangement]:
    """What is tried, the usual one first: else all cores, in as many ranks as have rows, or one."""
    most = 2 ** int(math.log2(max(min(cores, rows), 1)))
    found = [usual(cores), Arrangement(most, cores // most), Arrangement(1, cores)]
    return [*dict.fromkeys(a for a in found if a.ranks <= rows)]


def cores_here() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ── The groups ────────────────────────────────────────────────────────────────────────────────────
def make_steps(cfg: Config, turns: Connection, threads: int, variables: dict[str, str]) -> None:
    """One rank, in a process of its own: sends a word when it is ready, then seconds per step."""
    os.environ.update(variables)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(threads)

    run = Run(cfg)
    model = train_gpt.build_model(cfg, run, train_gpt.choose_attention(cfg, run))
    plan = train_gpt.export_plan(cfg, model)
    split = Split(cfg, "train")
    trainer = Trainer(cfg, run, model, plan, split, Validation(cfg, run, Split(cfg, "val")))
    loader = train_gpt.Loader(cfg, run, split)
    batch = loader.next(cfg.train_seq_len)
    loader.close()
    now = StepPlan(1.0, cfg.muon_momentum, qat=cfg.qat_enabled, loops=cfg.num_loops)
    for _ in range(2):
        trainer.step(batch, now)
    turns.send(0.0)
    while turns.recv():
        began = time.perf_counter()
        for _ in range(STEPS):
            trainer.step(batch, now)
        turns.send((time.perf_counter() - began) / STEPS)


class Group:
    """The ranks of an arrangement, each a process behind a pipe."""

    def __init__(self, cfg: Config, arrangement: Arrangement, folder: Path):
        cfg = dataclasses.replace(cfg, logs_dir=str(folder / str(arrangement)), run_id="ranks")
        # What has been imported is there at once; but macOS does not bear it
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        port = str(get_free_port())
        self.processes = []
        self.pipes = []
        for rank in range(arrangement.ranks):
            ours, theirs = context.Pipe()
            variables = dict(RANK=str(rank), WORLD_SIZE=str(arrangement.ranks))
            variables |= dict(MASTER_ADDR="localhost", MASTER_PORT=port)
            arguments = (cfg, theirs, arrangement.threads, variables)
            process = context.Process(target=make_steps, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def seconds(self, patience: float = PATIENCE) -> float:
        """What the slowest rank sends next. OSError: one has ended, or is late."""
        end = time.monotonic() + patience
        sent = []
        for pipe in self.pipes:
            if not pipe.poll(max(end - time.monotonic(), 0)):
                raise TimeoutError("no answer")
            sent.append(pipe.recv())
        return max(sent)

    def turn(self) -> float:
        """Seconds of a step."""
        for pipe in self.pipes:
            pipe.send(True)
        return self.seconds()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def measure(cfg: Config, candidates: Iterable[Arrangement]) -> dict[Arrangement, float]:
    """Median seconds of a step of each arrangement that can make one, in turn."""
    cfg = dataclasses.replace(cfg, val_max_tokens=cfg.window, val_loss_every=0, ema_enabled=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        groups = {}
        for candidate in candidates:
            groups[candidate] = Group(cfg, candidate, Path(folder))
            stack.callback(groups[candidate].end)
        seconds = {}
        for candidate, group in groups.items():
            with contextlib.suppress(OSError, EOFError):
                group.seconds()
                seconds[candidate] = []
        end = time.monotonic() + LIMIT
        for turn in range(TURNS):
            if turn and time.monotonic() > end:
                break
            for candidate, times in seconds.items():
                times.append(groups[candidate].turn())
    return {candidate: statistics.median(times) for candidate, times in seconds.items()}


# ── The choice ────────────────────────────────────────────────────────────────────────────────────
def fastest(seconds: dict[Arrangement, float], first: Arrangement) -> Arrangement:
    """The fastest; the first one where it is as fast, so that noise seldom decides."""
    best = min(seconds, key=seconds.get)
    if seconds.get(first, math.inf) <= AS_FAST * seconds[best]:
        return first
    return best


def key_of(cfg: Config, cores: int) -> str:
    """What a measurement holds for: machine, libraries, model and batch."""
    shape = cfg.knobs("model") | dict(
        tokens=cfg.train_batch_tokens,
        length=cfg.train_seq_len,
        parts=cfg.grad_accum_steps,
        compiled=cfg.compile,
        qat=cfg.qat_enabled,
    )
    text = json.dumps([platform.node(), cores, torch.__version__, shape], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remembered(path: Path) -> dict[str, list[int]]:
    """Key -> ranks and threads, the last found last; nothing where the file is not whole."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = json.loads(path.read_text())
        if all(min(Arrangement(*map(int, pair))) > 0 for pair in found.values()):
            return found
    return {}


def begun_with(cfg: Config) -> Arrangement | None:
    """That of a run's first launch, where it goes on and its record tells."""
    if not cfg.resume:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with (Path(cfg.logs_dir) / cfg.run_id / "metrics.jsonl").open() as lines:
            start = json.loads(next(lines, ""))
        return Arrangement(int(start["world_size"]), int(start["environment"]["threads_per_rank"]))
    return None


def choose(settings: list[str], path: Path) -> tuple[Arrangement, str]:
    """For these settings and the environment: the arrangement, and a line about it.

    A run that goes on takes what it began with; one of another file what was found last.
    """
    cores = cores_here()
    found = remembered(path)
    try:
        cfg = Config.from_env(os.environ, settings)
    except Refusal:
        # train_gpt.py will say what is wrong
        return usual(cores), ""
    first = begun_with(cfg)
    if first:
        return first, f"ranks x threads: {first}, as the run began"
    key = [*found][-1] if cfg.sources and found else key_of(cfg, cores)
    if key in found:
        arrangement = Arrangement(*found[key])
        return arrangement, f"ranks x threads: {arrangement}, as measured before ({path.name})"
    candidates = arrangements(cores, cfg.train_batch_tokens // cfg.train_seq_len)
    if cfg.sources or len(candidates) < 2:
        return usual(cores), ""

    began = time.monotonic()
    seconds = measure(cfg, candidates)
    took = time.monotonic() - began
    arrangement = fastest(seconds, candidates[0])
    busy = os.getloadavg()[0] > cores + 1
    if not busy:
        found[key] = list(arrangement)
        with contextlib.suppress(OSError):
            train_gpt.write_atomic(path, json.dumps(found).encode())
    figures = ", ".join(f"{one} {1e3 * s:.1f}" for one, s in seconds.items())
    kept = "not remembered, as the machine is busy" if busy else f"remembered in {path.name}"
    return arrangement, (
        f"ranks x threads: {arrangement} (ms of a step: {figures}; measured in {took:.1f} s, "
        f"{kept}; make train RANKS=2 OMP_NUM_THREADS=1 does without)"
    )


def say_choice(settings: list[str], path: Path = REMEMBERED) -> None:
    """Prints "RANKS THREADS", and the line about it where people read."""
    try:
        arrangement, line = choose(settings, path)
    # whatever it is: the run itself will say it better, or does without
    except Exception as error:
        arrangement = usual(cores_here())
        line = f"ranks x threads: {arrangement}, not measured ({type(error).__name__})"
    if line:
        print(line, file=sys.stderr)
    print(*arrangement)

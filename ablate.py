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

import bisect
import contextlib
import dataclasses
import difflib
import fcntl
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import site
import stat
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple
from xml.etree import ElementTree

import jinja2
import matplotlib
import numpy as np
import rich.console
import rich.live
import rich.table
import tomli
import typer
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

import train_gpt
from prepare_data import exit_code_of, options_as_parameters, printable
from train_gpt import COMPARED, Config, Refusal

ROOT = (
    Path(__file__).resolve().parent
)  # runs start here, so that relative paths of a study are below it
PLACES = {
    f.name for f in train_gpt.KNOBS if f.metadata["scope"] in ("run", "seed")
}  # knobs that make no other arm

# ── 1 STUDY: a TOML file as data ──────────────────────────────────────────────────────────────────────────────────
STUDY_KEYS = {
    **dict.fromkeys(("title", "source", "question", "limits", "reference"), str),
    **dict.fromkeys(("seeds", "metrics", "show", "compare"), list),
    **dict.fromkeys(("env", "size", "arm", "factorial"), dict),
}
SIZE_KEYS = {
    **dict.fromkeys(("ranks", "jobs", "threads", "steps"), int),
    **dict.fromkeys(("seeds", "arms", "time_arms"), list),
    "seconds": (int, float),
    "note": str,
    "env": dict,
}
ARM_KEYS = {"published": dict, "expect": str, "note": str}
OWN = {
    "RUN_ID",
    "LOGS_DIR",
    "SEED",
    "CHECKPOINT",
    "EVAL_ONLY",
    "ITERATIONS",
    "MAX_WALLCLOCK_SECONDS",
}  # the runner sets these
SETTINGS = (
    {f.name.upper() for f in train_gpt.KNOBS} | set(train_gpt.ALIASES) | set(train_gpt.UNSUPPORTED)
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]{0,200}")
MAX_TRIALS = 10_000  # of a study: more is a mistake, or meant to keep us busy


@dataclass(frozen=True)
class Size:
    """One scale of a study. steps and seconds are the budgets of --equal steps and --equal time."""

    name: str
    steps: int
    seconds: float
    ranks: int = 1
    jobs: int = 1  # trainings side by side
    threads: int = 1  # per rank; 0: as the machine has
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()  # empty: all
    time_arms: tuple[
        str, ...
    ] = ()  # of --equal time: arms whose steps cost alike have nothing to add; empty: arms
    note: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What a TOML file says. arms: name -> settings on top of env; facts: name -> published figures, expectation, note.
    metrics are compared; show stands in the table of arms only."""

    path: Path
    title: str
    question: str
    source: str
    limits: str
    seeds: tuple[int, ...]
    reference: str
    metrics: tuple[str, ...]
    show: tuple[str, ...]
    compare: tuple[tuple[str, str], ...]
    env: dict[str, str]
    sizes: dict[str, Size]
    arms: dict[str, dict[str, str]]
    facts: dict[str, dict]
    factors: dict[str, list[str]]

    @property
    def name(self) -> str:
        return self.path.stem


def settings(table: dict, where: str) -> dict[str, str]:
    """The environment variables of a TOML table. Refusal on a name that train_gpt.py does not know, or a nested value."""
    found = {}
    for key, value in table.items():
        if key not in SETTINGS or key in OWN:
            close = difflib.get_close_matches(key, SETTINGS - OWN, 1, 0.5)
            unknown = f"no such setting; did you mean {', '.join(close) or '--help'}?"
            raise Refusal(
                f"{where}: {key}={value}: {'is set by ablate.py itself; remove it' if key in OWN else unknown}"
            )
        if not isinstance(value, (str, int, float)) or not str(value).isprintable():
            raise Refusal(
                f"{where}: {key}={value}: must be a number, a boolean or a string without control characters"
            )
        found[key] = str(int(value)) if isinstance(value, bool) else str(value)
    return found


def typed(table: dict, allowed: dict[str, type | tuple], where: str) -> dict:
    """The table, if it has only these keys with values of these types; else Refusal."""
    for key, value in table.items():
        if key not in allowed:
            raise Refusal(f"{where}: {key}: no such key; choose from {', '.join(sorted(allowed))}")
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            raise Refusal(f"{where}: {key} = {value!r}: wrong type")
    return table


def split_arm(table: dict, where: str) -> tuple[dict[str, str], dict]:
    """(settings, facts) of one arm: upper-case keys are settings, lower-case ones facts."""
    if not isinstance(table, dict):
        raise Refusal(f"{where} = {table!r}: must be a table of settings")
    facts = typed({k: v for k, v in table.items() if k != k.upper()}, ARM_KEYS, where)
    return settings({k: v for k, v in table.items() if k == k.upper()}, where), facts


def product_arms(factors: dict[str, list], where: str) -> dict[str, dict[str, str]]:
    """The arms of a full factorial: {"qat": [0, 1], "swa": [0, 1]} -> qat-0_swa-0, qat-0_swa-1, ..."""
    for key, levels in factors.items():
        if not isinstance(levels, list) or not 1 < len(levels) == len(
            {str(level).lower() for level in levels}
        ):
            raise Refusal(
                f"{where}: {key} = {levels!r}: a factor needs a list of two or more different levels"
            )
    if math.prod(map(len, factors.values())) > MAX_TRIALS:
        raise Refusal(
            f"{where}: more than {MAX_TRIALS:,} combinations of {', '.join(factors)}; leave out levels"
        )
    cells = itertools.product(
        *([(key, level) for level in levels] for key, levels in factors.items())
    )
    return (
        {
            "_".join(f"{k}-{v}".lower() for k, v in cell): settings(
                {k.upper(): v for k, v in cell}, where
            )
            for cell in cells
        }
        if factors
        else {}
    )


def read_size(name: str, table: dict, where: str) -> Size:
    if not isinstance(table, dict) or not {"steps", "seconds"} <= table.keys():
        raise Refusal(
            f"{where}: needs steps and seconds, the budgets of --equal steps and --equal time"
        )
    typed(table, SIZE_KEYS, where)
    lists = {key: tuple(table[key]) for key in ("seeds", "arms", "time_arms") if key in table}
    for key in ("arms", "time_arms"):
        if not all(isinstance(arm, str) for arm in lists.get(key, ())):
            raise Refusal(f"{where}: {key} = {table[key]!r}: must be names of arms")
    size = Size(name=name, **{**table, **lists, "env": settings(table.get("env", {}), where)})
    for key, least in {"ranks": 1, "jobs": 1, "threads": 0, "steps": 1, "seconds": 1e-3}.items():
        if not least <= getattr(size, key) < 1e9:
            raise Refusal(f"{where}: {key} = {getattr(size, key)}: must be {least} or more")
    return size


def read_toml(path: Path) -> dict:
    """The tables of a TOML file. Refusal on any other file, and on one that would keep us busy or fill the memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 20:
            raise Refusal(f"{path}: no plain file of at most 1 MiB; give the path of a study")
        text = path.read_text(encoding="utf-8")
        if (
            max((line.count(".") for line in text.split("\n")), default=0) > 100
        ):  # tomli takes memory by the square of them
            raise ValueError("a line with more than 100 dots")
        data = tomli.loads(text)
        list(leaves(data))  # ValueError where it is nested too deeply
        return data
    except OSError as error:
        raise Refusal(
            f"{path}: {error.strerror}; give the path of a study, such as studies/pr989_qat_x_swa.toml"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: no valid TOML ({error}); correct it") from None


def read_study(path: Path) -> Study:
    """The study in a TOML file. Refusal on anything unknown, mistyped, missing, or that no Config would take."""
    data = read_toml(path)
    typed(data, STUDY_KEYS, str(path))
    sizes = {
        name: read_size(name, table, f"{path}: size.{name}")
        for name, table in data.get("size", {}).items()
    }
    split = {
        name: split_arm(table, f"{path}: arm.{name}") for name, table in data.get("arm", {}).items()
    }
    arms = product_arms(data.get("factorial", {}), f"{path}: factorial")
    arms |= {
        name: {**arms.get(name, {}), **env} for name, (env, _) in split.items()
    }  # of a cell: its facts
    study = Study(
        path,
        data.get("title", path.stem),
        data.get("question", ""),
        data.get("source", ""),
        data.get("limits", ""),
        tuple(data.get("seeds", (1, 2, 3))),
        data.get("reference", next(iter(arms), "")),
        tuple(data.get("metrics", ("val_bpb", "quant_gap_bpb", "step_ms_median"))),
        tuple(data.get("show", ())),
        tuple(tuple(pair) if isinstance(pair, list) else () for pair in data.get("compare", ())),
        settings(data.get("env", {}), f"{path}: env"),
        sizes,
        arms,
        {name: facts for name, (_, facts) in split.items()},
        {key: list(map(str, levels)) for key, levels in data.get("factorial", {}).items()},
    )
    named = {
        str(side).partition(":")[0]
        for side in itertools.chain(
            [study.reference],
            *study.compare,
            *(scale.arms + scale.time_arms for scale in sizes.values()),
        )
    }
    for problem, message in [
        (
            not all(
                len(pair) == 2 and all(isinstance(side, str) for side in pair)
                for pair in study.compare
            ),
            "compare: needs pairs of arms",
        ),
        (not sizes, "no [size.NAME]; give at least one"),
        (len(arms) < 2, "fewer than two arms; add [arm.NAME] or [factorial]"),
        (
            not all(
                type(seed) is int and seed >= 0
                for group in (study, *sizes.values())
                for seed in group.seeds
            ),
            "seeds must be whole numbers, 0 or more",
        ),
        (
            not all(isinstance(name, str) for name in study.metrics + study.show),
            "metrics and show must be names of figures of result.json",
        ),
        (
            any(len(set(scale.arms)) < len(scale.arms) for scale in sizes.values()),
            "an arm stands twice in a size",
        ),
        (named - arms.keys(), f"no such arm: {', '.join(map(str, named - arms.keys()))}"),
        (
            not all(NAME.fullmatch(arm) for arm in (*arms, *sizes)),
            "names may hold letters, digits and _ . = - only",
        ),
        (
            not NAME.fullmatch(path.stem),
            "its file name, which names the folder of its runs, must be such a name; rename it",
        ),
    ]:
        if problem:
            raise Refusal(f"{path}: {message}")
    return study


# ── 2 TRIALS: one run each, and which of them share a training ────────────────────────────────────────────────────
@dataclass(frozen=True)
class Trial:
    """One run: an arm with a seed. donor: the trial whose checkpoint it exports or scores again (None: it trains)."""

    arm: str
    seed: int
    folder: Path
    env: dict[str, str]
    cfg: Config
    donor: str | None = None

    @property
    def id(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Matrix:
    """A study at one size and one kind of budget: the trials, in the order in which they run."""

    study: Study
    size: Size
    equal: str
    folder: Path
    arms: tuple[str, ...]
    trials: list[Trial]

    def command(self) -> str:
        """What a user types to make these runs (in the default folder)."""
        seeds = tuple(dict.fromkeys(t.seed for t in self.trials))
        chosen = (
            ""
            if seeds == (self.size.seeds or self.study.seeds)
            else f" --seeds {','.join(map(str, seeds))}"
        )
        return f"python ablate.py run {from_root(self.study.path)} --size {self.size.name} --equal {self.equal}{chosen}"

    def groups(self) -> list[list[Trial]]:
        """Each training with the trials that share it."""
        return [
            [t, *(f for f in self.trials if f.donor == t.id)]
            for t in self.trials
            if t.donor is None
        ]


def from_root(path: Path) -> str:
    """The path as a run sees it: relative to the repository where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def matrix(
    study: Study, size: str, equal: str, seeds: tuple[int, ...] = (), out: Path | None = None
) -> Matrix:
    """All trials, seed by seed (A B A B, so that drift of the machine hits all arms alike). Arms whose training settings
    agree (Config.training_scopes) share one training. Every setting is checked here, before anything starts."""
    if size not in study.sizes:
        raise Refusal(f"{study.path}: no size {size}; choose from {', '.join(study.sizes)}")
    scale, trials, donors = study.sizes[size], [], {}
    folder = (out or ROOT / "logs/runs" / study.name / f"{size}-{equal}").absolute()
    budget = {
        "steps": {"ITERATIONS": str(scale.steps), "MAX_WALLCLOCK_SECONDS": "0"},
        "time": {"MAX_WALLCLOCK_SECONDS": str(scale.seconds)},
    }[equal]
    arms, seeds = (
        scale.time_arms * (equal == "time") or scale.arms or tuple(study.arms),
        seeds or scale.seeds or study.seeds,
    )
    if len(arms) * len(seeds) > MAX_TRIALS:
        raise Refusal(
            f"{study.path}: {len(arms)} arms with {len(seeds)} seeds: over {MAX_TRIALS:,} trials; leave some out"
        )
    for seed in seeds:
        for arm in arms:
            env = {**study.env, **scale.env, **study.arms[arm], **budget, "SEED": str(seed)}
            env |= {"RUN_ID": f"{arm}-s{seed}", "LOGS_DIR": from_root(folder)}
            try:
                cfg = Config.from_env(env)
            except Refusal as refusal:
                raise Refusal(f"{study.path}: arm {arm}: {refusal}") from None
            key = (cfg.digest(*cfg.training_scopes), cfg.data_path)
            donor = donors.setdefault(key, Trial(arm, seed, folder / env["RUN_ID"], env, cfg))
            if (
                donor.arm != arm
            ):  # what it inherits from the checkpoint must not replace a default of its own
                differing = {
                    n.upper(): v
                    for n, v in cfg.knobs("grid", "export", "eval").items()
                    if getattr(donor.cfg, n) != v
                }
                env |= {n: str(int(v) if isinstance(v, bool) else v) for n, v in differing.items()}
                env["CHECKPOINT"] = from_root(donor.folder / "checkpoint.bin")
            trials.append(
                Trial(
                    arm,
                    seed,
                    folder / env["RUN_ID"],
                    env,
                    cfg,
                    donor.id if donor.arm != arm else None,
                )
            )
    if not trials or len({t.id for t in trials}) < len(trials):
        raise Refusal(f"{study.path}: no seed, or a seed stands there twice")
    return Matrix(study, scale, equal, folder, arms, trials)


def clean_environment(trial: Trial, size: Size) -> dict[str, str]:
    """The whole environment of a run: its settings, and from ours only what a process needs to start."""
    needed = (
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "SYSTEMROOT",
    )
    machine = {name: os.environ[name] for name in needed if name in os.environ}
    threads = (
        {"OMP_NUM_THREADS": str(size.threads), "GOMP_SPINCOUNT": "1000"} if size.threads else {}
    )
    return machine | threads | trial.env


def command(size: Size) -> list[str]:
    """torchrun where there are several ranks; one process needs no launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size.ranks}"]
    return [sys.executable, *(torchrun if size.ranks > 1 else []), "train_gpt.py"]


# ── 3 RUNNER: clean processes, nothing twice, nothing lost ────────────────────────────────────────────────────────
def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; what a crash or a stranger left otherwise is passed over."""
    found = []
    if path.is_file() and path.stat().st_size > MAX_LOG_BYTES:
        raise Refusal(
            f"{path}: {path.stat().st_size:,} bytes, over {MAX_LOG_BYTES:,}; no run writes that: move it away"
        )
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    ):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict)]


class Ledger:
    """ledger.jsonl of a matrix: one line when a trial starts and one when it ends, whatever its end."""

    def __init__(self, folder: Path):
        self.path, self.lock = folder / "ledger.jsonl", threading.Lock()

    def write(self, trial: Trial, event: str, **facts) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        record = dict(
            trial=trial.id, event=event, time=now, config_sha256=trial.cfg.digest(), **facts
        )
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(
                "\n" * (file.tell() > 0 and not self.path.read_bytes().endswith(b"\n"))
                + json.dumps(record)
                + "\n"
            )

    def failures(self, trials: list[Trial]) -> dict[str, str]:
        """Trial -> reason, for those of these trials whose last attempt with these settings ended badly."""
        last = {
            (str(e.get("trial")), str(e.get("config_sha256"))): e for e in read_lines(self.path)
        }
        ends = {t.id: last.get((t.id, t.cfg.digest()), {}) for t in trials}
        return {
            name: f"FAILED (exit {e.get('exit_code')}): {e.get('reason')}"
            for name, e in ends.items()
            if e.get("event") == "end" and e.get("exit_code") != 0
        }


class Runner:
    """Runs what is missing of a matrix. A finished trial is never run again, a failed one stays failed (--retry runs it
    again and keeps the old attempt's line in the ledger), one that a crash cut off is set aside and run again."""

    def __init__(
        self,
        matrix: Matrix,
        retry: bool = False,
        only: tuple[str, ...] = (),
        before: Callable[[], None] = lambda: None,
    ):
        self.matrix, self.before, self.ledger = matrix, before, Ledger(matrix.folder)
        self.running: dict[str, subprocess.Popen] = {}
        self.lock, self.stopping = threading.Lock(), False
        self.failed = {} if retry else self.ledger.failures(matrix.trials)
        self.results = {
            t.id: r for t in matrix.trials if t.id not in self.failed and (r := self.finished(t))
        }
        self.chosen = [t for t in matrix.trials if not only or t.id in only]
        if len(self.chosen) < len(set(only)):
            raise Refusal(
                f"--only {','.join(only)}: not all are trials of {matrix.study.name}; see --dry-run"
            )
        self.todo = [t for t in self.chosen if t.id not in self.results and t.id not in self.failed]

    def finished(self, trial: Trial) -> dict | None:
        """The result of a trial that ended well, else None. Refusal if it came from other code, settings, data or ranks."""
        if (
            not (trial.folder / "result.json").exists()
            or (result := load(trial.folder))["exit_code"]
        ):
            return None
        wanted = {
            "code_sha256": train_gpt.CODE_SHA256,
            "seed": trial.seed,
            "world_size": self.matrix.size.ranks,
        }
        settings = trial.cfg.knobs(*COMPARED) | {"data_path": trial.cfg.data_path}
        for there, expected in (
            (result, wanted),
            (result["config"], settings),
            (result, {"config_sha256": trial.cfg.digest()}),
        ):
            for name, value in expected.items():
                if there.get(name) != value:
                    raise Refusal(
                        f"{trial.folder}: finished with {name} {there.get(name)}, now {value}; move the folder away, "
                        "or use --out"
                    )
        return result

    def seconds(self, trial: Trial) -> float:
        """Projected wall seconds: as a finished trial of this arm took, else the size's budget."""
        mine = [
            r for name, r in list(self.results.items()) if name.rpartition("-s")[0] == trial.arm
        ]
        known = [sum(r["seconds"].values()) + 5 for r in mine]
        return (
            sum(known) / len(known)
            if known
            else (self.matrix.size.seconds if trial.donor is None else 0) + 10
        )

    def remaining(self) -> float:
        waiting = [t for t in self.todo if t.id not in self.results and t.id not in self.failed]
        return sum(map(self.seconds, waiting)) / self.matrix.size.jobs

    def run(self, log: Callable[[str], None]) -> None:
        """Runs the groups, `jobs` at a time, in order. An interruption ends what runs, and writes no end of it."""
        self.matrix.folder.mkdir(parents=True, exist_ok=True)
        groups = [[t for t in group if t in self.todo] for group in self.matrix.groups()]
        with ThreadPoolExecutor(self.matrix.size.jobs) as pool:
            try:
                for future in [
                    pool.submit(self.run_group, group, log) for group in groups if group
                ]:
                    future.result()
            except BaseException as error:
                with self.lock:
                    self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running.values()):
                    process.terminate()
                for process in list(self.running.values()):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(30)
                    process.kill()
                if isinstance(error, KeyboardInterrupt):
                    raise Refusal(
                        "interrupted; the same command goes on where this one stopped", 130
                    ) from None
                raise

    def run_group(self, group: list[Trial], log: Callable[[str], None]) -> None:
        """A training and what shares it. Its checkpoint is removed at the end; a later arm that would share it trains."""
        for trial in group:
            if trial.donor in self.failed:
                self.end(trial, -1, f"its training {trial.donor} failed")
            else:
                self.before()
                self.run_trial(trial)
            outcome = (
                self.failed.get(trial.id) or f"val bpb {self.results[trial.id]['val_bpb']:.5f}"
            )
            done = len(self.results) + len(self.failed)
            log(
                f"[{done}/{len(self.matrix.trials)}] {trial.id}: {outcome}; about {self.remaining() / 60:.0f} min left"
            )
        (self.matrix.folder / (group[0].donor or group[0].id) / "checkpoint.bin").unlink(
            missing_ok=True
        )

    def start(self, trial: Trial, output, lock) -> subprocess.Popen:
        """The process of a trial; it holds the trial's lock, even when this program is gone."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(
                f"{trial.id}: a process of an earlier start still runs it; end that first"
            ) from None
        if trial.folder.exists():  # cut off by a crash
            attempts = itertools.count(1)
            trial.folder.rename(
                next(
                    p
                    for n in attempts
                    if not (p := trial.folder.with_name(f"{trial.id}.cut{n}")).exists()
                )
            )
        env = clean_environment(trial, self.matrix.size)
        if trial.donor and not (self.matrix.folder / trial.donor / "checkpoint.bin").exists():
            del env["CHECKPOINT"]  # that training is over: this trial trains
        with self.lock:
            if self.stopping:
                raise Refusal(f"{trial.id}: interrupted", 130)
            self.ledger.write(trial, "start")
            self.running[trial.id] = subprocess.Popen(
                command(self.matrix.size),
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
            )
        return self.running[trial.id]

    def run_trial(self, trial: Trial) -> None:
        """Runs one trial and writes down how it ended."""
        lock_path = self.matrix.folder / f".{trial.id}.lock"
        with tempfile.TemporaryFile() as output, lock_path.open("w") as lock:
            code = self.start(trial, output, lock).wait()
            del self.running[trial.id]
            output.seek(max(0, output.seek(0, os.SEEK_END) - 20_000))
            lines = output.read().decode(errors="replace").strip().splitlines()
        lock_path.unlink(missing_ok=True)
        if self.stopping or code in (
            130,
            143,
            -signal.SIGINT,
            -signal.SIGTERM,
        ):  # no end is written: it runs again next time
            raise Refusal(
                f"{trial.id}: interrupted; the same command goes on where this one stopped", 130
            )
        try:
            code, reason = self.outcome(trial, code, lines)
            if code == 0 and (result := self.finished(trial)):
                self.results[trial.id] = result
        except Refusal as refusal:  # an unreadable or foreign result
            code, reason = code or 5, str(refusal)
        self.end(trial, code, reason)

    @staticmethod
    def outcome(trial: Trial, code: int, lines: list[str]) -> tuple[int, str]:
        """(exit code, reason) of a run; torchrun itself ends with 1, whatever the rank's code."""
        if (trial.folder / "result.json").exists():
            code = load(trial.folder)["exit_code"]
            return code, train_gpt.EXIT_CODES.get(code, "unknown exit code")
        told = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["no output"]
        exits = re.findall(r"\[exit (\d+):", told[-1])
        return int(exits[-1]) if exits else code or 1, told[-1]

    def end(self, trial: Trial, code: int, reason: str) -> None:
        self.ledger.write(trial, "end", exit_code=code, reason=reason)
        self.failed |= self.ledger.failures([trial])


def shell(trial: Trial, size: Size) -> str:
    """The command of a trial as one line for a shell, with the whole environment that it gets."""
    env = [
        f"{name}={shlex.quote(value)}"
        for name, value in clean_environment(trial, size).items()
        if name != "PATH"
    ]
    return " ".join(["env", "-i", 'PATH="$PATH"', *env, shlex.join(command(size))])


def watch(runner: Runner) -> rich.table.Table:
    """What is running: arm, seed, step, seconds left."""
    title = (
        f"{runner.matrix.study.name}: {len(runner.results)} done, {len(runner.failed)} failed, "
        f"about {runner.remaining() / 60:.0f} min left"
    )
    table = rich.table.Table("trial", "step", "loss", "time left", title=title)
    for trial in [t for t in runner.matrix.trials if t.id in runner.running]:
        events = read_lines(trial.folder / "metrics.jsonl")
        step = next((e for e in reversed(events) if e.get("event") == "step"), {})
        left = runner.seconds(trial) - (events[-1].get("t", 0) if events else 0)
        table.add_row(
            trial.id,
            str(step.get("step", "-")),
            str(step.get("loss", "-"))[:6],
            f"{max(left, 0):.0f} s",
        )
    return table


def run_here(runner: Runner) -> None:
    """All in this machine, with one live display on a terminal and one line per trial elsewhere."""
    console = rich.console.Console()
    if not console.is_terminal:
        runner.run(lambda line: print(line, flush=True))
        return
    with rich.live.Live(
        get_renderable=lambda: watch(runner), refresh_per_second=1, console=console
    ):
        runner.run(lambda line: console.print(line, markup=False, highlight=False))


def run_elsewhere(runner: Runner, cluster: str, arguments: list[str]) -> None:
    """One job per training through submitit (cluster: slurm; local starts all at once), each a call of `ablate.py run --only`."""
    try:
        import submitit
    except ImportError:
        raise Refusal(
            f"--launcher {cluster}: submitit is not installed; pip install submitit"
        ) from None
    size = runner.matrix.size
    executor = submitit.AutoExecutor(folder=runner.matrix.folder / "jobs", cluster=cluster)
    jobs = []
    for group in runner.matrix.groups():
        if mine := [t for t in group if t in runner.todo]:
            minutes, gpus = (
                math.ceil(3 * sum(map(runner.seconds, mine)) / 60) + 30,
                size.ranks if cluster == "slurm" else 0,
            )
            executor.update_parameters(
                timeout_min=minutes, name=runner.matrix.study.name, gpus_per_node=gpus
            )
            call = [sys.executable, __file__, *arguments, "--only", ",".join(t.id for t in mine)]
            jobs.append(
                executor.submit(
                    submitit.helpers.CommandFunction(call, cwd=str(ROOT), verbose=False)
                )
            )
    for job in jobs:
        print(f"job {job.job_id}: {job.state}", flush=True)
    for job in jobs:
        if error := job.exception():
            print(f"job {job.job_id} failed: {str(error).strip().splitlines()[-1]}", flush=True)


def gpu_gate(cool_down: float, max_celsius: float, max_busy: float) -> None:
    """Sleeps cool_down seconds, then until every GPU is idle and cool (0: no limit). Refusal where no GPU can be asked, and
    after 15 minutes of waiting."""
    time.sleep(cool_down)
    query = [
        "nvidia-smi",
        "--query-gpu=utilization.gpu,temperature.gpu",
        "--format=csv,noheader,nounits",
    ]
    for _ in range(90 if max_celsius or max_busy else 0):
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            found = [tuple(map(float, line.split(","))) for line in answer.strip().splitlines()]
            if all(
                busy <= (max_busy or math.inf) and celsius <= (max_celsius or math.inf)
                for busy, celsius in found
            ):
                return
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise Refusal(
                f"--max-celsius, --max-busy: nvidia-smi does not answer ({error}); leave them out"
            ) from None
        time.sleep(10)
    if max_celsius or max_busy:
        raise Refusal(
            f"GPUs are not idle and cool after 15 minutes: (% busy, Celsius) {found}; stop what uses them, or raise "
            "the limits"
        )


# ── 4 STATISTICS ──────────────────────────────────────────────────────────────────────────────────────────────────
LEVEL = 0.05  # two-sided, of every interval and verdict
RECORD_NATS, RECORD_LEVEL = (
    0.005,
    0.01,
)  # the challenge: a record is better by this much per token, at this one-sided p
ROUNDING = (
    1e-14  # of the largest score: a difference or spread below it is arithmetic, not training
)
FINGERPRINT = (
    "code_sha256",
    "data.val_sha256",
    "data.tokenizer_sha256",
    "data.train_tokens",
    "val_tokens",
    "val_bytes",
    "device",
    "world_size",
    "threads_per_rank",
    "dtype",
    "compile",
    "cuda",
    "torch",
)


class Summary(NamedTuple):
    """One arm; sd is that of a sample (n - 1), nan for one run."""

    n: int
    mean: float
    sd: float


class Comparison(NamedTuple):
    """b - a, or a contrast of a factorial, with its two-sided t-test and 95 % interval; all but t, df and p in the metric.
    n: pairs, or (runs of a, runs of b) of a Welch test. sd: of the difference between one run of each. No p value here is
    corrected for the number of comparisons made."""

    n: int | tuple[int, int]
    mean: float
    sd: float
    t: float
    df: float
    p: float
    low: float
    high: float
    term: str = ""


class Record(NamedTuple):
    """The challenge's rule; difference: old - new, and margin: what it must exceed, in BPB; t, df, p: one-sided Welch."""

    margin: float
    difference: float
    t: float
    df: float
    p: float
    holds: bool


def scores(values: dict[int, float]) -> np.ndarray:
    """(n,) in the order of seeds; Refusal for none at all and for one that is not finite."""
    broken = [seed for seed in sorted(values) if not math.isfinite(values[seed])]
    if broken or not values:
        raise Refusal(
            f"seed {broken[0]} scored {values[broken[0]]}: leave the run out and say so"
            if broken
            else "no scores: an arm needs at least one finished run"
        )
    return np.array([values[seed] for seed in sorted(values)], np.float64)


def clean(x: float, scale: float) -> float:
    """0 where x is no more than rounding errors of scores as large as scale."""
    return 0.0 if abs(x) <= ROUNDING * scale else float(x)


def sample_sd(x: np.ndarray, scale: float) -> float:
    """Sample standard deviation; nan for one value."""
    return clean(x.std(ddof=1), scale) if len(x) > 1 else math.nan


def summary(values: dict[int, float]) -> Summary:
    x = scores(values)
    return Summary(len(x), float(x.mean()), sample_sd(x, abs(x).max()))


def student(difference: float, error: float, df: float) -> tuple[float, float]:
    """t and two-sided p; with a standard error of 0, p is 0 for any difference and 1 for none."""
    if error == 0:
        return (math.copysign(math.inf, difference), 0.0) if difference else (0.0, 1.0)
    return difference / error, float(2 * stats.t.sf(abs(difference / error), df))


def half_width(error: float, df: float, alpha: float = LEVEL) -> float:
    return float(stats.t.ppf(1 - alpha / 2, df) * error)


def one_sample(differences: np.ndarray, scale: float, term: str = "") -> Comparison:
    """Student's t of (n,) same-seed differences of scores as large as scale."""
    n, mean, sd = len(differences), clean(differences.mean(), scale), sample_sd(differences, scale)
    error, df = sd / math.sqrt(n), n - 1
    (t, p), half = student(mean, error, df), half_width(error, df)
    return Comparison(n, mean, sd, t, df, p, mean - half, mean + half, term)


def paired(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """b - a over the seeds that both have: noise that a seed brings to both arms cancels. Refusal below 2 such seeds."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        raise Refusal(
            f"a has the seeds {sorted(a)}, b has {sorted(b)}, common: {seeds}; a paired test needs 2 in common"
        )
    x, y = (scores({seed: arm[seed] for seed in seeds}) for arm in (a, b))
    return one_sample(y - x, max(abs(x).max(), abs(y).max()))


def welch_error(sd_a: float, sd_b: float, n_a: int, n_b: int) -> tuple[float, float]:
    """Standard error of the difference of two means, and Welch-Satterthwaite df; Refusal below 2 runs in either."""
    if min(n_a, n_b) < 2:
        raise Refusal(f"{n_a} and {n_b} runs: Welch's test needs at least 2 in each arm")
    u, v = sd_a**2 / n_a, sd_b**2 / n_b
    share = u / (u + v) if u + v else 0.5  # of a in the variance
    return math.sqrt(u + v), 1 / (share**2 / (n_a - 1) + (1 - share) ** 2 / (n_b - 1))


def welch(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """b - a of arms that share no noise, of unequal variance."""
    x, y = scores(a), scores(b)
    scale = max(abs(x).max(), abs(y).max())
    sd_a, sd_b, mean = sample_sd(x, scale), sample_sd(y, scale), clean(y.mean() - x.mean(), scale)
    error, df = welch_error(sd_a, sd_b, len(x), len(y))
    (t, p), half = student(mean, error, df), half_width(error, df)
    return Comparison(
        (len(x), len(y)), mean, math.hypot(sd_a, sd_b), t, df, p, mean - half, mean + half
    )


def cell_array(cells: dict[tuple, dict[int, float]], factors: dict[str, list]) -> np.ndarray:
    """(levels of the first factor, levels of the second, ..., common seeds); Refusal for missing or stray cells."""
    wanted = list(itertools.product(*factors.values()))
    wrong = [cell for cell in wanted if cell not in cells] + [
        cell for cell in cells if cell not in wanted
    ]
    if wrong:
        name = ", ".join(f"{factor}={level}" for factor, level in zip(factors, wrong[0]))
        raise Refusal(
            f"the cell {name} {'is no combination of the levels' if wrong[0] in cells else 'is missing'}: a full "
            f"factorial has exactly the {len(wanted)} combinations of {dict(factors)}"
        )
    seeds = sorted(set.intersection(*(set(cells[cell]) for cell in wanted)))
    if len(seeds) < 2:
        raise Refusal(
            f"the seeds common to all cells are {seeds}: a factorial needs at least 2; the cells have "
            + ", ".join(f"{cell}: {sorted(cells[cell])}" for cell in wanted)
        )
    y = np.stack([scores({seed: cells[cell][seed] for seed in seeds}) for cell in wanted])
    return y.reshape(*(len(levels) for levels in factors.values()), len(seeds))


def factorial(cells: dict[tuple, dict[int, float]], factors: dict[str, list]) -> list[Comparison]:
    """Main effects, level - first level, and two-factor interactions, (y11 - y01) - (y10 - y00), as same-seed contrasts of
    the means over all levels of the other factors. cells: tuple of levels, in the order of factors -> seed -> score."""
    y, rows = cell_array(cells, factors), []
    for names in [*itertools.combinations(factors, 1), *itertools.combinations(factors, 2)]:
        contrast = y.mean(axis=tuple(k for k, name in enumerate(factors) if name not in names))
        for axis in range(len(names)):
            contrast = contrast - contrast.take([0], axis)
        for levels in itertools.product(*(range(1, len(factors[name])) for name in names)):
            term = " x ".join(
                f"{name} {factors[name][k]} - {factors[name][0]}" for name, k in zip(names, levels)
            )
            rows.append(one_sample(contrast[levels], abs(y).max(), term))
    return rows


def record_rule(new: dict[int, float], old: dict[int, float], tokens_per_byte: float) -> Record:
    """Is old - new above 0.005 nats per token at p < 0.01? tokens_per_byte: val_tokens / val_bytes of both. Refusal below 2
    runs in either."""
    margin, gain = RECORD_NATS / math.log(2) * tokens_per_byte, welch(new, old)
    excess, error = gain.mean - margin, welch_error(summary(new).sd, summary(old).sd, *gain.n)[0]
    t, p = student(excess, error, gain.df)
    p = p / 2 if t > 0 else 1 - p / 2
    return Record(margin, gain.mean, t, gain.df, p, p < RECORD_LEVEL)


def detectable(sd: float, n: int, alpha: float = LEVEL) -> float:
    """The smallest observed mean difference that n pairs can tell from 0 at two-sided alpha; sd: of the differences. No
    statement of power: a true effect of this size is missed about half of the time. Refusal below 2 pairs."""
    if n < 2:
        raise Refusal(f"{n} pairs: at least 2 are needed to tell a difference from noise")
    return half_width(sd / math.sqrt(n), n - 1, alpha)


def verdict(
    comparison: Comparison, names: tuple[str, str] = ("a", "b"), metric: str = "BPB"
) -> str:
    """The comparison in words, and no more than its interval allows: lower, higher, or not distinguishable. For a row of a
    factorial, names=("0", row.term)."""
    (a, b), mean, low, high = names, comparison.mean, comparison.low, comparison.high
    smallest = min([abs(x) for x in (mean, low, high) if x], default=1.0)
    places = min(
        max(4, math.ceil(-math.log10(smallest))), 9
    )  # a bound that is not 0 never reads 0.0000
    n = " and ".join(map(str, np.atleast_1d(comparison.n)))
    p = f"p = {comparison.p:.3g}" if comparison.p >= 1e-4 else "p < 0.0001"
    resolution = (
        f"{n} seeds could show {(high - low) / 2:.{places}f}"
        if comparison.sd
        else "the scores are the same"
    )
    if low <= 0 <= high:
        return (
            f"{b} is not distinguishable from {a} (difference {mean:.{places}f} {metric}, 95 % CI {low:.{places}f} to "
            f"{high:.{places}f} includes 0, {p}, n = {n}; {resolution})"
        )
    near, far = sorted((abs(low), abs(high)))
    alike = ", no spread between seeds" if comparison.sd == 0 else ""
    return (
        f"{b} is {'lower' if mean < 0 else 'higher'} than {a} by {abs(mean):.{places}f} {metric} (95 % CI {near:.{places}f} "
        f"to {far:.{places}f}, {p}, n = {n}{alike})"
    )


def lookup(run: dict, key: str):
    """run["data"]["val_sha256"] for data.val_sha256; "(absent)" where there is none."""
    for part in key.split("."):
        run = run.get(part, "(absent)") if isinstance(run, dict) else "(absent)"
    return run


def differing(a: dict, b: dict) -> str:
    """The settings of an arm in which two configurations differ, as environment variables."""
    names = sorted(
        name for name in (a.keys() | b.keys()) - PLACES if lookup(a, name) != lookup(b, name)
    )
    return ", ".join(
        f"{name.upper()}={lookup(a, name)} against {lookup(b, name)}" for name in names
    )


def check_alike(runs: list[dict], config: bool) -> None:
    """Refusal for runs of other code, data or machine than the first; with config, for one arm, also of other settings or
    with a seed that another run has. runs: result.json each, plus name."""
    by_seed = {}
    for run in runs:
        for key in FINGERPRINT + ("config_sha256",) * config:
            mine, its = lookup(runs[0], key), lookup(run, key)
            if mine != its:
                settings = (
                    f" ({differing(runs[0]['config'], run['config'])})"
                    if key == "config_sha256"
                    else ""
                )
                raise Refusal(
                    f"{key} is {mine} in {runs[0]['name']} but {its} in {run['name']}{settings}; such runs cannot be "
                    "put together"
                )
        if config and run["seed"] in by_seed:
            raise Refusal(
                f"{by_seed[run['seed']]} and {run['name']} both have seed {run['seed']}; keep one of them"
            )
        by_seed[run["seed"]] = run["name"]


# ── 5 TABLES: from run folders alone ──────────────────────────────────────────────────────────────────────────────
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


def metric(run: dict, name: str) -> float | None:
    """A figure of a result: a key, a dotted path such as scores.documents.bpb, or float_val_bpb (the weights to ship, before
    quantisation). None where the run has none."""
    if name == "float_val_bpb":
        return (
            run["averaged_val_bpb"]
            if run.get("averaged_val_bpb") is not None
            else run.get("live_val_bpb")
        )
    value = lookup(run, name)
    return float(value) if isinstance(value, (int, float)) else None


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


def load(folder: Path) -> dict:
    """result.json of a run folder, with the folder as `name` and metrics.jsonl as `events`."""
    result = read_json(folder / "result.json", f"{folder}/result.json", RESULT_SHAPE)
    if min(result["val_tokens"], result["val_bytes"]) < 1:
        raise Refusal(
            f"{folder}/result.json: scored {result['val_tokens']} targets of {result['val_bytes']} bytes; run it again"
        )
    return result | {"name": str(folder), "events": read_lines(folder / "metrics.jsonl")}


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


# ── 6 PAGE ──────────────────────────────────────────────────────────────────────────────────────────────────────
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#999999",
    "#000000",
)  # Okabe-Ito; its yellow
MAX_ROWS = 40  # of phases or groups in a chart: ours have a dozen
LINES, HATCHES = ("-", "--", ":", "-."), ("", "///", "...", "xxx")  # fades on white: grey
STAGES = (
    "live",
    "averaged",
    "unfitted",
    "quantised",
    "sliding",
    "documents",
    "ttt",
)  # keys of `scores`, in a run's order
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "figure.facecolor": "white",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": True,
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111; background: #fff }
table { border-collapse: collapse; margin: 1.5rem 0; font-size: 13px }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; white-space: pre-line }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 2rem 0; break-inside: avoid }
figure svg { max-width: 100%; height: auto }
figcaption { font-size: 13px; color: #333 }
@media screen { .wide { overflow-x: auto } }
@media print { body { max-width: none; margin: 0; font-size: 11px } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if notes %}
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% for caption, (header, rows) in tables.items() %}
<div class="wide"><table>
<caption>{{ caption }}</caption>
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td{% if numeric(cell) %} class="n"{% endif %}>{{ "-" if cell is none else cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% for svg, caption in charts %}
<figure>
{{ svg }}
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
</body>
</html>
"""


class Arm(NamedTuple):
    """The finished runs of one arm, and how it looks in every chart."""

    label: str
    colour: str
    line: str
    runs: list[dict]


class Chart(NamedTuple):
    figure: Figure
    caption: str


def number(record, *keys):
    """The number at this path of nested dicts, or None where there is none that a chart can show."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, (int, float)) and abs(record) < 1e18 else None


def label(text) -> str:
    """As a chart can show it: at most 3 lines of 44 characters, all of them allowed in XML."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return textwrap.fill(printable, 44, max_lines=3, placeholder=" …")


def group(runs: list[dict]) -> list[Arm]:
    """The finished runs by arm, in order of appearance."""
    arms: dict[str, list[dict]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return [
        Arm(label(name), COLOURS[i % 8], LINES[i // 8 % 4], members)
        for i, (name, members) in enumerate(arms.items())
    ]


def measured(arms: list[Arm], value: Callable) -> list[tuple[Arm, list]]:
    """value(run) of each run that has one, for the arms with such runs."""
    rows = [(arm, [v for v in map(value, arm.runs) if v not in (None, [], {})]) for arm in arms]
    return [(arm, values) for arm, values in rows if values]


def seeds(rows: list[tuple[Arm, list]]) -> str:
    """How many runs per arm a chart shows."""
    low, high = (bound(len(values) for _, values in rows) for bound in (min, max))
    return f"n = {low}{f' to {high}' if high > low else ''} seed{'s' if high > 1 else ''} per arm"


def legend(figure: Figure, rows: list[tuple[Arm, list]]) -> None:
    """One entry per arm below the axes; the figure grows by the room that it takes."""
    handles = [
        Line2D([], [], color=arm.colour, linestyle=arm.line, linewidth=2, label=arm.label)
        for arm, _ in rows
    ]
    figure.set_figheight(
        figure.get_figheight() + 0.2 + 0.07 * sum(arm.label.count("\n") + 1.3 for arm, _ in rows)
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def row_figure(
    labels: list[str], unit: str, rows: list[tuple[Arm, list]] = ()
) -> tuple[Figure, Axes]:
    """A figure with a horizontal row per arm, the first on top, and side by side in it a dot per seed of `rows`."""
    figure = Figure((9, 0.9 + sum(max(0.3, 0.14 * (text.count("\n") + 1.6)) for text in labels)))
    ax = figure.subplots()
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(xlabel=unit, ylim=(len(labels) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    for y, (arm, values) in enumerate(rows):
        gap = min(0.14, 0.5 / len(values))
        ax.plot(
            values,
            [y + gap * (i - (len(values) - 1) / 2) for i in range(len(values))],
            "o",
            color=arm.colour,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=3,
        )
    return figure, ax


def points(run: dict, key: str, end: str) -> list[tuple[float, float]]:
    """(x, BPB) of each validation during training, then of the live weights after it."""
    seen = [
        (number(e, key), number(e, "val_bpb"))
        for e in run.get("events") or []
        if e.get("event") == "val"
    ]
    return [xy for xy in [*seen, (number(run, end), number(run, "live_val_bpb"))] if None not in xy]


def phases(arm: Arm, key: str) -> dict[str, float]:
    """Where each phase of the arm begins: the median over its seeds."""
    starts: dict[str, list[float]] = {}
    for event in [
        e for run in arm.runs for e in run.get("events") or [] if e.get("event") == "phase"
    ]:
        if (x := number(event, key)) is not None:
            starts.setdefault(label(event.get("name")), []).append(x)
    return {name: statistics.median(xs) for name, xs in itertools.islice(starts.items(), MAX_ROWS)}


def phase_strip(ax: Axes, begun: dict[str, list[tuple[float, str]]]) -> None:
    """A row per phase; in it a coloured mark per arm that has the phase, below one another."""
    for row, marks in enumerate(begun.values()):
        high = 0.8 / len(marks)
        for i, (x, colour) in enumerate(marks):
            ax.vlines(
                x, row - 0.4 + i * high, row - 0.4 + (i + 1) * high, color=colour, linewidth=3
            )
    ax.set_yticks(range(len(begun)), begun, fontsize=8)
    ax.set(ylabel="begins", ylim=(len(begun) - 0.5, -0.5))


def curves(arms: list[Arm], key: str, end: str, unit: str) -> Chart | None:
    """Validation BPB against `key` of the events, above a strip that marks where the phases begin."""
    rows = measured(arms, lambda run: points(run, key, end))
    if not rows:
        return None
    begun: dict[str, list[tuple[float, str]]] = {}
    for arm, _ in rows:
        for name, x in phases(arm, key).items():
            begun.setdefault(name, []).append((x, arm.colour))
    heights = [3.6] + [sum(max(0.2, 0.045 * len(marks)) for marks in begun.values())] * bool(begun)
    figure = Figure((9, 0.4 + sum(heights)))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for arm, lines in rows:
        for line in lines:
            axes[0].plot(
                *zip(*line),
                color=arm.colour,
                linestyle=arm.line,
                linewidth=1,
                marker="o",
                markersize=3,
                markevery=[-1],
            )
    late = 0.1 * max(x for _, lines in rows for line in lines for x, _ in line)
    shown = [y for _, lines in rows for line in lines for x, y in line if x >= late]
    room = 0.05 * (max(shown) - min(shown)) or 0.01
    axes[0].set(
        ylabel="validation loss (bits per byte)", ylim=(min(shown) - room, max(shown) + room)
    )
    if begun:
        phase_strip(axes[1], begun)
    axes[-1].set_xlabel(unit)
    legend(figure, rows)
    below = (
        " Below: where each phase of training begins, a mark per arm (median of its seeds)."
        if begun
        else ""
    )
    return Chart(
        figure,
        f"Validation loss (bits per byte) against {unit}: a thin line per seed, a colour per arm, "
        f"{seeds(rows)}. The dot at its end is the live weights after training. The vertical scale is that of the last "
        f"nine tenths of training.{below}",
    )


def stage_scores(run: dict) -> dict[str, float]:
    """BPB of each stage that was scored; the last is the result."""
    found = {
        stage: bpb for stage in STAGES if (bpb := number(run, "scores", stage, "bpb")) is not None
    }
    if run.get("scored") in STAGES and number(run, "val_bpb") is not None:
        found.setdefault(run["scored"], run["val_bpb"])
    return found


def journey(arms: list[Arm]) -> Chart | None:
    """What averaging, quantising and the way of scoring do to the same runs."""
    rows = measured(arms, stage_scores)
    if not rows:
        return None
    stages = [
        stage for stage in STAGES if any(stage in one for _, values in rows for one in values)
    ]
    figure = Figure((9, 4))
    ax = figure.subplots()
    ax.set_xticks(range(len(stages)), stages)
    for arm, values in rows:
        per_stage = {stage: [one[stage] for one in values if stage in one] for stage in stages}
        mean = {stage: statistics.fmean(bpb) for stage, bpb in per_stage.items() if bpb}
        look = dict(color=arm.colour, linestyle=arm.line)
        for one in values:
            ax.plot(
                [stages.index(stage) for stage in one],
                list(one.values()),
                linewidth=0.7,
                alpha=0.5,
                **look,
            )
        ax.plot(
            [stages.index(stage) for stage in mean],
            list(mean.values()),
            linewidth=2,
            marker="o",
            markersize=4,
            **look,
        )
    ax.set(xlabel="weights, and how they are scored", ylabel="validation loss (bits per byte)")
    legend(figure, rows)
    return Chart(
        figure,
        "Validation loss (bits per byte) of the same runs at each stage: thick the mean over seeds with a dot "
        f"per stage that was scored, thin each seed, {seeds(rows)}. From quantised on, the weights are those of the "
        "artifact and only the way of scoring differs.",
    )


def quant_gaps(arms: list[Arm]) -> Chart | None:
    """What quantisation costs."""
    rows = measured(arms, lambda run: number(run, "quant_gap_bpb"))
    if not rows:
        return None
    figure, ax = row_figure(
        [arm.label for arm, _ in rows], "quantisation gap (bits per byte)", rows
    )
    means, colours = (
        [statistics.fmean(values) for _, values in rows],
        [arm.colour for arm, _ in rows],
    )
    ax.barh(range(len(rows)), means, 0.7, color=colours, alpha=0.35)
    ax.axvline(0, color="#444444", linewidth=0.8)
    return Chart(
        figure,
        "Quantisation gap: validation loss of the quantised weights minus that of the weights before "
        f"quantisation (bits per byte; less is better). A dot per seed, the bar is their mean, {seeds(rows)}.",
    )


def sizes(arms: list[Arm]) -> Chart | None:
    """Where the bytes are, by group of tensors."""
    firsts = [(arm, next((run for run in arm.runs if run.get("groups")), None)) for arm in arms]
    firsts = [
        (arm, run)
        for arm, run in firsts
        if run and isinstance(run["groups"], dict) and len(run["groups"]) <= MAX_ROWS
    ]
    if not firsts:
        return None
    figure, ax = row_figure([arm.label for arm, _ in firsts], "size (MB = 1,000,000 bytes)")
    parts = [
        {name: number(run, "groups", name, "bytes") or 0 for name in run["groups"]}
        for _, run in firsts
    ]
    names = [*dict.fromkeys(name for part in parts for name in part), "code"]
    for part, (_, run) in zip(parts, firsts):
        part["code"] = number(run, "code_bytes") or 0
    left = [0.0] * len(parts)
    for i, name in enumerate(names):
        width = [part.get(name, 0) / 1e6 for part in parts]
        ax.barh(
            range(len(parts)),
            width,
            0.6,
            left,
            color=COLOURS[i % 7],
            hatch=HATCHES[i // 7 % 4],
            edgecolor="white",
            linewidth=0.5,
            label=label(name),
        )  # not the last colour: black is the tick
        left = [a + b for a, b in zip(left, width)]
    totals = [
        (number(run, "total_bytes") or 0) / 1e6 or stacked
        for (_, run), stacked in zip(firsts, left)
    ]
    ax.plot(totals, range(len(parts)), "|", color="black", markersize=16, label="artifact and code")
    cap = max(number(run, "cap_bytes") or 0 for _, run in firsts)
    if 0 < cap / 2e6 <= max(totals):
        ax.axvline(
            cap / 1e6, color="black", linestyle="--", linewidth=1, label=f"cap: {cap:,} bytes"
        )
    figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil((len(names) + 2) / 4))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return Chart(
        figure,
        "Size by group of tensors, each compressed alone, and of the code (MB = 1,000,000 bytes), n = 1 seed "
        "per arm: its first. The black tick is the artifact, compressed as a whole, and the code: what the cap counts.",
    )


def spread(arms: list[Arm]) -> Chart | None:
    """The result, and how much of it is the seed."""
    rows = measured(arms, lambda run: number(run, "val_bpb"))
    if not rows:
        return None
    modes = [", ".join(sorted({str(run.get("scored")) for run in arm.runs})) for arm, _ in rows]
    mixed = len(set(modes)) > 1
    labels = [
        arm.label + f"\n(scored: {label(mode)})" * mixed for (arm, _), mode in zip(rows, modes)
    ]
    figure, ax = row_figure(labels, "final validation loss (bits per byte)", rows)
    for y, (_, values) in enumerate(rows):
        sd = statistics.stdev(values) if len(values) > 1 else None
        ax.errorbar(
            statistics.fmean(values),
            y,
            xerr=sd,
            fmt="|",
            color="#444444",
            markersize=14,
            capsize=4,
            linewidth=1,
        )
    how = "not scored alike, see the labels" if mixed else f"scored: {modes[0]}"
    return Chart(
        figure,
        f"Final validation loss (bits per byte; {how}). A dot per seed, the tick is their mean, the whiskers "
        f"are one sample standard deviation to either side, {seeds(rows)}.",
    )


def inline_svg(chart: Chart, name: str) -> Markup:
    """The figure as an <svg> element that can stand beside others: no document type, and no ids but its own."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        chart.figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(
        re.findall(
            r"#([\w-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())
        )
    )
    for element in root.iter():
        if element.get("id") not in used:  # figure_1, axes_1: the same in every chart
            element.attrib.pop("id", None)
    root.attrib.update({"role": "img", "aria-label": chart.caption})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def markdown_table(header: list, rows: list[list]) -> str:
    """A table in GitHub Markdown."""

    def cell(value) -> str:
        text = "-" if value is None else str(value)
        return "<br>".join(re.sub(r"([\\|<])", r"\\\1", text).splitlines())

    lines = [[cell(value) for value in line] for line in (header, *rows)]
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(header), *lines[1:]]
    )


def html_page(
    title: str, notes: list[str], tables: dict[str, tuple[list[str], list[list]]], runs: list[dict]
) -> str:
    """One page that needs nothing else: notes, tables, the runs that failed, and a chart of whatever was measured."""
    failed = [
        [run["arm"], run.get("seed"), run["failed"]]
        for run in runs
        if run.get("failed") is not None
    ]
    if failed:
        tables = {**tables, "Failed runs (in no chart)": (["arm", "seed", "reason"], failed)}
    arms = group([run for run in runs if run.get("failed") is None])
    with matplotlib.rc_context(STYLE):
        charts = {
            "spread": spread(arms),
            "journey": journey(arms),
            "steps": curves(arms, "step", "steps", "training steps"),
            "seconds": curves(arms, "seconds", "train_seconds", "training seconds"),
            "gap": quant_gaps(arms),
            "sizes": sizes(arms),
        }
        drawn = [
            (inline_svg(chart, name), chart.caption) for name, chart in charts.items() if chart
        ]
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(PAGE)
    page = template.render(
        title=title,
        notes=notes,
        tables=tables,
        charts=drawn,
        numeric=lambda cell: re.fullmatch(r"[-+−±.,%eE ]*\d[-+−±\d.,%eE ]*", str(cell)),
    )
    return page.encode(
        "utf-8", "replace"
    ).decode()  # JSON can hold half a surrogate pair, UTF-8 cannot


# ── 7 SUBMISSION: one rendering for the builder, which writes it, and for the checker, which compares ──────────────
OFFICIAL_TOKENIZER = "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a"  # sha256 of fineweb_1024_bpe.model
TOKENIZER = "tokenizer.model"  # the name of any other one inside the folder
CAP_BYTES, LIMIT_SECONDS = 16_000_000, 600  # of the rules, whatever the runs were told
MAX_FILES, MAX_BYTES, IMPORT_SECONDS = 200, 1 << 24, 120  # of a folder that is worth reading
MAX_CODE_BYTES, MAX_PROBLEMS, MAX_LOG_BYTES = 1 << 20, 100, 1 << 28
BEGIN, END = "<!-- generated -->", "<!-- end -->"
REQUIRED = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
ABOUT = (
    "author",
    "github_id",
    "name",
    "blurb",
    "track",
)  # what no log can tell; the first three are required
PLACE_VARIABLES = {
    "DATA_PATH",
    "TOKENIZER_PATH",
    "LOGS_DIR",
    "RUN_ID",
    "SEED",
}  # the run command or its reader sets these
DECIMAL = re.compile(
    r"(?<![\d.])(?:\d[\d,]{0,20})?\.(\d{3,40})(?:[eE]([-+]?\d{1,2}))?(?!\d*\.\d)"
)  # no version like 1.234.5
Results = dict  # seed -> its result.json, by ascending seed

# Shapes of JSON: the types that a value may have, or a shape for each required key ("*": for every key)
TEXT, WHOLE, NUMBER, PERHAPS = (str,), (int,), (int, float), (int, float, type(None))
RESULT_SHAPE = {
    **dict.fromkeys(
        ["date", "scored", "device", "torch", "python", "code_sha256", "config_sha256"], TEXT
    ),
    **dict.fromkeys(
        [
            "exit_code",
            "seed",
            "world_size",
            "threads_per_rank",
            "artifact_bytes",
            "code_bytes",
            "total_bytes",
            "val_tokens",
            "val_bytes",
        ],
        WHOLE,
    ),
    **dict.fromkeys(("val_bpb", "val_loss", "quantised_val_bpb", "eval_seconds"), NUMBER),
    **dict.fromkeys(
        ("steps", "train_seconds", "live_val_bpb", "averaged_val_bpb"), PERHAPS
    ),  # null where nothing was trained
    "config": {"seed": WHOLE, "tokenizer_path": TEXT, "ttt_mode": TEXT},
    "non_default": {"*": (str, int, float, bool)},
    "seconds": {"*": NUMBER},
    "toggles": {
        "*": {
            "active": (bool,),
            "unit": TEXT,
            "scope": TEXT,
            "first_step": PERHAPS,
            "last_step": PERHAPS,
            "effect": PERHAPS,
        }
    },
    "data": {"tokenizer_sha256": TEXT, "val_sha256": {"*": TEXT}, "manifest": TEXT},
}
SUBMISSION_SHAPE = {"seeds": (list,), **dict.fromkeys(ABOUT, TEXT)}
NUMBER_HOOKS = ("parse_int", "parse_float", "parse_constant")
ANSWER_SHAPE = {"*": {"table": TEXT, "config_sha256": TEXT, "non_default": {}}}


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def leaves(value, depth: int = 0) -> Iterator[float]:
    """Every number in a JSON value. ValueError when it is nested deeper than any result."""
    if depth > 20:
        raise ValueError("nested too deeply")
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from leaves(part, depth + 1)
    if type(value) in NUMBER:
        yield value


def misfits(value, shape: tuple | dict, where: str) -> Iterator[str]:
    """What in a JSON value does not have this shape."""
    if not isinstance(shape, dict):
        if type(value) not in shape:
            yield f"{where}: {shown(value)}, not {' or '.join(kind.__name__ for kind in shape)}"
    elif not isinstance(value, dict):
        yield f"{where}: {shown(value)}, not an object"
    else:
        for key in value if "*" in shape else shape:
            part = shape.get(key, shape.get("*"))
            yield from (
                misfits(value[key], part, f"{where}.{key}")
                if key in value
                else [f"{where}.{key}: missing"]
            )


def read_text(path: Path, name: str) -> str:
    """Refusal when it is missing, no plain file, too large or no UTF-8."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise OSError(0, f"no plain file of at most {MAX_BYTES:,} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise Refusal(f"{name}: cannot be read ({reason}); build it again from runs") from None


def read_json(path: Path, name: str, shape: dict) -> dict:
    """A JSON object of this shape. Refusal on anything else: NaN, doubled keys, absurd numbers, other types."""

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def number(text: str) -> float:
        value = (
            math.inf
            if len(text) > 40
            else int(text)
            if text.lstrip("-").isdecimal()
            else float(text)
        )
        if not abs(value) < 1e18:
            raise ValueError(f"no number to work with: {text[:20]}")
        return value

    try:
        value = json.loads(
            read_text(path, name), object_pairs_hook=unique, **dict.fromkeys(NUMBER_HOOKS, number)
        )
        sum(leaves(value))  # visits each
        problem = next(misfits(value, shape, name), None)
    except (ValueError, RecursionError) as error:
        problem = f"{name}: no good JSON ({error})"
    if problem:
        raise Refusal(f"{problem}; build it again from runs")
    return value


def unfit(results: Results) -> Iterator[str]:
    """Runs that are no complete, good training."""
    for seed, r in results.items():
        for key, source in (
            ("eval_only", r["config"].get("eval_only")),
            ("checkpoint", r["config"].get("checkpoint")),
            ("checkpoint", r.get("checkpoint")),
        ):
            if source:
                yield f"seed {seed}: {key}={shown(source)}, so it is not a full training; give the run that trained"
                return
        if None in (r["steps"], r["train_seconds"], r["live_val_bpb"]) or r["steps"] < 1:
            yield f"seed {seed}: steps={r['steps']}, so it trained nothing; give the run that trained"
        if r["exit_code"]:
            meaning = train_gpt.EXIT_CODES.get(r["exit_code"], "unknown")
            yield f"seed {seed}: exit_code={r['exit_code']} ({meaning}); only good runs count, run it again"
        for name in r["non_default"]:
            if not re.fullmatch(r"[A-Z0-9_]+", name):  # it stands in the README's command
                yield f"seed {seed}: non_default {shown(name)}: no name of a setting; run it again"


def unlike(results: Results) -> Iterator[str]:
    """What differs between the runs although it must not, with both values."""

    def identity(r: dict) -> dict:
        data = {
            f"data.{key}": value
            for key, value in r["data"].items()
            if key not in ("path", "manifest")
        }
        config = {key.upper(): value for key, value in r["config"].items() if key not in PLACES}
        return (
            {key: lookup(r, key) for key in FINGERPRINT}
            | data
            | config
            | {"config_sha256": r["config_sha256"]}
        )

    (seed, first), *others = [(seed, identity(r)) for seed, r in results.items()]
    for other, found in others:
        for key in dict.fromkeys([*first, *found]):
            if first.get(key) != found.get(key):
                yield (
                    f"{key}: {shown(first.get(key))} with seed {seed}, but {shown(found.get(key))} with seed {other}; "
                    "average only runs of one script, configuration, data and machine"
                )


def seed_row(r: dict) -> dict:
    return dict(
        val_bpb=r["val_bpb"],
        val_loss=r["val_loss"],
        artifact_bytes=r["artifact_bytes"],
        bytes_total=r["total_bytes"],
        steps=r["steps"],
        step_avg_ms=1e3 * r["train_seconds"] / r["steps"],
        train_time_s=r["train_seconds"],
        eval_time_s=r["eval_seconds"],
        live_val_bpb=r["live_val_bpb"],
        averaged_val_bpb=r["averaged_val_bpb"],
        pre_quant_val_bpb=metric(r, "float_val_bpb"),
        quantised_val_bpb=r["quantised_val_bpb"],
        scored=r["scored"],
    )


def summarise(results: Results, about: dict) -> dict:
    """submission.json: every figure from the results, every text from `about`. Refusal when a text is missing or odd."""
    columns = {key: [r[key] for r in results.values()] for key in RESULT_SHAPE}
    averaged = ["val_bpb", "val_loss", "steps", "train_seconds", "eval_seconds", "artifact_bytes"]
    mean = {key: statistics.fmean(columns[key]) for key in averaged}
    spread = {
        key: statistics.stdev(columns[key]) if len(results) > 1 else None
        for key in ("val_bpb", "val_loss")
    }
    first, toggles = (
        next(iter(results.values())),
        [row for rows in columns["toggles"] for row in rows.items()],
    )
    compliance = dict(
        train_under_600s=max(columns["train_seconds"]) <= LIMIT_SECONDS,
        three_seeds=len(results) >= 3,
        artifact_under_16mb=max(columns["total_bytes"]) <= CAP_BYTES,
        eval_under_600s=max(columns["eval_seconds"]) <= LIMIT_SECONDS,
        score_first_ttt=None if first["config"]["ttt_mode"] == "none" else True,
    )
    leaderboard = (
        first["world_size"] == 8 and "H100" in first["device"] and False not in compliance.values()
    )
    technique = (
        ", ".join(dict.fromkeys(name for name, row in toggles if row["active"])) or "no toggle"
    )
    texts = {key: about.get(key) for key in ABOUT}
    texts["blurb"] = texts["blurb"] or f"Active: {technique}."
    texts["track"] = texts["track"] or (
        "10min_16mb" if leaderboard else "none: not three seeds on 8xH100 within the limits"
    )
    for key, text in texts.items():
        if (
            not (isinstance(text, str) and text.strip() and text.isprintable())
            or BEGIN in text
            or END in text
        ):
            raise Refusal(
                f"{key}: {shown(text)}, not one line of text; give --{key.replace('_', '-')} TEXT"
            )
    return texts | dict(
        date=max(columns["date"]),
        val_bpb=mean["val_bpb"],
        val_bpb_std=spread["val_bpb"],
        val_loss=mean["val_loss"],
        val_loss_std=spread["val_loss"],
        bytes_total=max(columns["total_bytes"]),
        bytes_code=max(columns["code_bytes"]),
        artifact_bytes_mean=mean["artifact_bytes"],
        artifact_bytes_max=max(columns["artifact_bytes"]),
        seeds=list(results),
        seed_results={str(seed): seed_row(r) for seed, r in results.items()},
        hardware=f"{first['device']}, {first['world_size']} ranks",
        pytorch_version=first["torch"],
        train_steps_mean=mean["steps"],
        train_time_s_mean=mean["train_seconds"],
        eval_time_s_mean=mean["eval_seconds"],
        compliance=compliance,
        technique_summary=technique,
        code_sha256=first["code_sha256"],
        config_sha256=first["config_sha256"],
        tokenizer_sha256=first["data"]["tokenizer_sha256"],
        val_sha256=first["data"]["val_sha256"],
    )


def figures_table(header: str, rows: list[list]) -> str:
    """Cells by type: 6 digits for a float, thousands apart for an int, - for None."""
    form = {float: ".6f", int: ",d"}
    return markdown_table(
        header.split(" | "),
        [
            [cell if cell is None else format(cell, form.get(type(cell), "")) for cell in row]
            for row in rows
        ],
    )


def toggle_rows(results: Results) -> list[list]:
    """One row per toggle; where seeds differ, their values one after the other."""
    rows = []
    for name in dict.fromkeys(name for r in results.values() for name in r["toggles"]):
        acts = [r["toggles"][name] for r in results.values() if name in r["toggles"]]
        steps = [f"{a['first_step']} to {a['last_step']}" if a["active"] else "never" for a in acts]
        effects = ["-" if a["effect"] is None else f"{a['effect']:+.6f}" for a in acts]
        rows.append(
            [
                name,
                f"{sum(a['active'] for a in acts)} of {len(results)}",
                *(
                    " / ".join(dict.fromkeys(cells))
                    for cells in (
                        steps,
                        effects,
                        [a["unit"] for a in acts],
                        [a["scope"] for a in acts],
                    )
                ),
            ]
        )
    return rows


def run_command(results: Results) -> str:
    """Shell lines that repeat the runs inside the folder."""
    first = next(iter(results.values()))
    settings = " ".join(
        f"{name}={shlex.quote(str(int(value) if isinstance(value, bool) else value))}"
        for name, value in first["non_default"].items()
        if name not in PLACE_VARIABLES
    )
    tokenizer = (
        "FILE_OF_THE_OFFICIAL_TOKENIZER"
        if first["data"]["tokenizer_sha256"] == OFFICIAL_TOKENIZER
        else TOKENIZER
    )
    return "\n".join(
        [
            "```sh",
            "pip install -r requirements.txt",
            f"export DATA_PATH=FOLDER_OF_THE_SHARDS TOKENIZER_PATH={tokenizer}",
            f"for seed in {' '.join(map(str, results))}; do",
            f"  SEED=$seed RUN_ID=seed$seed {settings} \\",
            f"    torchrun --standalone --nproc_per_node={first['world_size']} train_gpt.py",
            "done",
            "```",
        ]
    )


def render(results: Results, about: dict) -> str:
    """The generated part of README.md, which is all of it until somebody adds prose outside the two marks."""
    s, first, n = summarise(results, about), next(iter(results.values())), len(results)
    verdict = {True: "yes", False: "**NO**", None: "no test-time training"}
    kept = {key: verdict[value] for key, value in s["compliance"].items()}
    seeds = [
        [
            str(seed),
            r["steps"],
            f"{r['step_avg_ms']:.1f}",
            f"{r['train_time_s']:.1f}",
            float(r["live_val_bpb"]),
            r["averaged_val_bpb"],
            r["quantised_val_bpb"],
            r["val_bpb"],
            f"{r['eval_time_s']:.1f}",
            r["bytes_total"],
            CAP_BYTES - r["bytes_total"],
        ]
        for seed, r in s["seed_results"].items()
    ]
    deviation = (
        "1 seed: no standard deviation"
        if n == 1
        else f"{n} seeds, sample standard deviation "
        f"{s['val_bpb_std']:.6f} BPB, {s['val_loss_std']:.6f} nats"
    )
    worst = {
        key: max(r[key] for r in results.values()) for key in ("train_seconds", "eval_seconds")
    }
    hashes = "".join(f"\n- {name}: sha256 `{digest}`" for name, digest in s["val_sha256"].items())
    sections = [
        f"# {s['name']}: val_bpb {s['val_bpb']:.6f}",
        s["blurb"],
        f"{s['author']} ({s['github_id']}), {s['date']}, track: {s['track']}",
        f"Mean val_bpb **{s['val_bpb']:.6f}**, val_loss {s['val_loss']:.6f} nats per token ({deviation}); "
        f"scored: {first['scored']}.",
        figures_table(
            "seed | steps | ms/step | train s | live | averaged | quantised | final BPB | eval s | bytes | headroom",
            seeds,
        ),
        f"Hardware: {s['hardware']}; torch {s['pytorch_version']}, Python {first['python']}.",
        "## Run it inside this folder",
        run_command(results),
        "## Toggles",
        figures_table(
            "toggle | active in seeds | steps | effect | unit | scope", toggle_rows(results)
        ),
        "## Compliance",
        f"- training at most {LIMIT_SECONDS} s: {kept['train_under_600s']}, the longest took {worst['train_seconds']:.1f} s\n"
        f"- scoring at most {LIMIT_SECONDS} s: {kept['eval_under_600s']}, the longest took {worst['eval_seconds']:.1f} s\n"
        f"- code and artifact at most {CAP_BYTES:,} bytes: {kept['artifact_under_16mb']}, the largest has {s['bytes_total']:,}\n"
        f"- three seeds or more, one script and one configuration: {kept['three_seeds']}, {n}\n"
        f"- test-time training only on tokens already scored: {kept['score_first_ttt']}\n"
        f"- data: manifest {first['data']['manifest']}",
        "## Size",
        f"Largest seed: train_gpt.py {s['bytes_code']:,} bytes + artifact {s['artifact_bytes_max']:,} bytes = "
        f"{s['bytes_total']:,} of {CAP_BYTES:,} bytes, headroom {CAP_BYTES - s['bytes_total']:,}.",
        "## Hashes",
        f"- train_gpt.py: sha256 `{s['code_sha256']}`\n- configuration: sha256 `{s['config_sha256']}`\n"
        f"- tokenizer: sha256 `{s['tokenizer_sha256']}`{hashes}",
    ]
    return f"{BEGIN}\n" + "\n\n".join(sections) + f"\n{END}\n"


def build_submission(folders: list[Path], out: Path, about: dict) -> Path:
    """Makes the leaderboard folder `out` from run folders, one per seed; all or nothing. Refusal on runs that do not belong
    together, or are no good complete training, on missing files, missing texts, and when `out` is not empty."""
    results, origin, out = {}, {}, Path(out)
    if not folders:
        raise Refusal("no run: name the run folders, LOGS_DIR/RUN_ID, one per seed")
    for folder in map(Path, folders):
        r = read_json(folder / "result.json", f"{folder / 'result.json'}", RESULT_SHAPE)
        if r["seed"] in origin:
            raise Refusal(
                f"{folder}: seed {r['seed']}, as {origin[r['seed']]}; give one run per seed"
            )
        results[r["seed"]], origin[r["seed"]] = r, folder
    results = dict(sorted(results.items()))
    for problem in itertools.chain(unfit(results), unlike(results)):
        raise Refusal(problem)
    files = {
        "README.md": render(results, about),
        "submission.json": json.dumps(summarise(results, about), indent=1) + "\n",
    }
    sources = {"requirements.txt": Path(train_gpt.__file__).with_name("requirements.txt")}
    for seed, folder in origin.items():
        sources |= {
            f"train_seed{seed}.log": folder / "train.log",
            f"result_seed{seed}.json": folder / "result.json",
            "train_gpt.py": folder / "train_gpt.py",
        }
        check_hash(
            sources["train_gpt.py"], f"{sources['train_gpt.py']}", results[seed]["code_sha256"]
        )
    first = results[min(results)]
    if first["data"]["tokenizer_sha256"] != OFFICIAL_TOKENIZER:
        sources[TOKENIZER] = Path(first["config"]["tokenizer_path"])
        check_hash(
            sources[TOKENIZER],
            f"TOKENIZER_PATH={sources[TOKENIZER]}",
            first["data"]["tokenizer_sha256"],
        )
    write_folder(out, files, sources)
    return out


def check_hash(path: Path, name: str, expected: str) -> None:
    """Refusal unless the file is there and has this sha256."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise Refusal(
            f"{name}: {error.strerror}; put back the file of the runs, sha256 {shown(expected)}"
        ) from None
    if found != expected:
        raise Refusal(
            f"{name}: sha256 {found}, but the results say {shown(expected)}; put back the file of the runs"
        )


def write_folder(out: Path, files: dict[str, str], sources: dict[str, Path]) -> None:
    """Writes contents and copies files into a new folder that gets its name when it is complete. Refusal when it cannot."""
    problem, draft = f"{out}: exists and is not empty; choose another folder", None
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            out.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            draft.chmod(0o755)
            for name, content in files.items():
                (draft / name).write_bytes(content.encode())
            for name, path in sources.items():
                shutil.copyfile(path, draft / name)
            os.replace(draft, out)
            return
    except OSError as error:
        problem = f"{out}: cannot be made ({error.strerror}: {error.filename}); mend that or choose another folder"
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)  # after the rename there is none
    raise Refusal(problem)


def copy_in(folder: Path, copy: Path) -> list[str]:
    """Copies a folder of plain files; returns what in it is a link, a device, unreadable or too much."""
    everything = (
        Path(root, name) for root, *names in os.walk(folder) for name in itertools.chain(*names)
    )
    entries, room, problems = list(itertools.islice(everything, MAX_FILES + 1)), MAX_BYTES, []
    if not folder.is_dir() or len(entries) > MAX_FILES:
        return [
            f"{folder}: no folder, or more than {MAX_FILES} files; name the folder that a build made"
        ]
    for path in entries:
        name = path.relative_to(folder)
        try:
            status = path.lstat()
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                problems.append(f"{name}: a link or a device; put a plain file there")
            elif stat.S_ISREG(status.st_mode):
                room -= status.st_size
                if room < 0:
                    problems.append(
                        f"{name}: {status.st_size:,} bytes; a whole submission has at most {MAX_BYTES:,}"
                    )
                else:
                    shutil.copyfile(path, copy / name, follow_symlinks=False)
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror}); make it readable")
    return problems


def wrong_seed_files(folder: Path, seeds: list) -> list[str]:
    """Logs and results that are missing, or that submission.json does not know."""
    if not seeds or any(type(seed) is not int for seed in seeds):
        return [
            f"submission.json.seeds: {shown(seeds)}, not a list of whole numbers; build it again from runs"
        ]
    wanted = {
        name for seed in seeds for name in (f"train_seed{seed}.log", f"result_seed{seed}.json")
    }
    found = {
        path.name
        for pattern in ("train_seed*.log", "result_seed*.json")
        for path in folder.glob(pattern)
    }
    return [
        f"{name}: "
        + (
            "missing, although submission.json has its seed; build it again from runs"
            if name in wanted
            else "submission.json does not have its seed; build it again from all runs"
        )
        for name in sorted(wanted ^ found)
    ]


def wrong_figures(results: Results, code_bytes: int) -> Iterator[str]:
    """Figures of a result that break a limit of the rules or contradict each other."""
    for seed, r in results.items():
        name, total = f"result_seed{seed}.json", code_bytes + r["artifact_bytes"]
        inactive = [toggle for toggle, row in r["toggles"].items() if not row["active"]] or r.get(
            "inactive"
        )
        nats = r["val_bpb"] * math.log(2) * r["val_bytes"]
        for broken, problem in (
            (
                [r["seed"], r["config"]["seed"]] != [seed, seed],
                f"seed is {r['seed']}, in config {r['config']['seed']}",
            ),
            (
                (r["code_bytes"], r["total_bytes"]) != (code_bytes, total),
                f"code_bytes is {r['code_bytes']:,} and total_bytes "
                f"{r['total_bytes']:,}, but train_gpt.py has {code_bytes:,} bytes, which makes {total:,}",
            ),
            (
                total > CAP_BYTES,
                f"code + artifact have {total:,} bytes, over the cap of {CAP_BYTES:,}",
            ),
            (
                r["train_seconds"] > LIMIT_SECONDS,
                f"train_seconds is {r['train_seconds']:.1f}, over {LIMIT_SECONDS}",
            ),
            (
                r["eval_seconds"] > LIMIT_SECONDS,
                f"eval_seconds is {r['eval_seconds']:.1f}, over {LIMIT_SECONDS}",
            ),
            (inactive, f"{shown(inactive)} was requested and did nothing"),
            (
                r["val_bytes"] < 1
                or not math.isclose(nats, r["val_loss"] * r["val_tokens"], rel_tol=1e-6),
                f"val_bpb is {r['val_bpb']}, which val_loss, val_tokens and val_bytes do not give",
            ),
        ):
            if broken:
                yield f"{name}: {problem}; train that seed again"


def differences(stored, made, where: str) -> Iterator[str]:
    """Where a stored JSON value is not the one made from the logs."""
    if isinstance(stored, dict) and isinstance(made, dict):
        for key in dict.fromkeys([*made, *stored]):
            if key not in made:
                yield f"{where}.{key}: no log gives that; take it out, or tell it in README.md"
            elif key not in stored:
                yield f"{where}.{key}: missing, the logs give {shown(made[key])}"
            else:
                yield from differences(stored[key], made[key], f"{where}.{key}")
    elif type(stored) is not type(made) or not (
        stored == made or (type(made) is float and math.isclose(stored, made))
    ):
        yield f"{where}: {shown(stored)}, but the logs give {shown(made)}"


def wrong_readme(readme: str, results: Results, about: dict) -> Iterator[str]:
    """A generated part that is not what the logs give, and numbers in the prose that no result shows."""
    start, end = readme.find(BEGIN), readme.find(END) + len(END)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or start > end:
        yield f"README.md: needs one part between {BEGIN} and {END}; build it again from runs"
        return
    for old, new in itertools.zip_longest(
        readme[start:end].split("\n"), render(results, about).strip().split("\n")
    ):
        if old != new:
            yield f"README.md: its generated part says {shown(old)}, but the logs give {shown(new)}"
            return
    pool = sorted(
        {abs(number) for number in leaves([list(results.values()), summarise(results, about)])}
    )
    for match in DECIMAL.finditer(
        "\n".join([readme[:start], readme[end:], *map(about.get, ABOUT)])
    ):
        value, half = (
            float(match[0].replace(",", "")),
            0.500001 * 10.0 ** (int(match[2] or 0) - len(match[1])),
        )
        if (near := bisect.bisect_left(pool, value - half)) == len(pool) or pool[
            near
        ] > value + half:
            yield f"README.md: no result shows the number {match[0]} of its prose or of a text in submission.json; correct it"


# Loads this very file: not a package, an extension or a cached file of that name beside it
ASK_SCRIPT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("train_gpt", "train_gpt.py")
train_gpt = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_gpt)
answer = {}
for seed in sys.argv[1:]:
    with open(f"result_seed{seed}.json", encoding="utf-8") as file:
        result = json.load(file)
    cfg = train_gpt.Config(**result["config"])
    answer[seed] = dict(table=train_gpt.final_table(result), config_sha256=cfg.digest(), non_default=cfg.non_default())
print("\\0" + json.dumps(answer))
"""


def ask_script(folder: Path, seeds: list[int]) -> tuple[str, dict]:
    """Imports the folder's train_gpt.py in a process of its own, with next to no environment. Returns (what went wrong,
    seed -> its final table, configuration hash and non-default settings as that script gives them)."""

    def listing() -> dict:
        return {
            path: (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in folder.parent.rglob("*")
        }

    home = folder.parent / "home"
    home.mkdir()
    before = listing()
    env = (
        {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
        | dict.fromkeys(("HOME", "TMPDIR", "PYTHONPYCACHEPREFIX"), str(home))
        | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUSERBASE": site.getuserbase(),
            "PYTHONIOENCODING": "utf-8",
        }
    )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", ASK_SCRIPT, *map(str, seeds)],
            cwd=folder,
            env=env,
            stdout=out,
            stdin=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = child.wait(IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"is not imported within {IMPORT_SECONDS} s", {}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with all that it started
            child.wait()
        printed, complaint = (
            file.seek(0) or file.read(MAX_BYTES).decode("utf-8", "replace")
            for file in (out, errors)
        )
    chatter, mark, answer = printed.rpartition("\0")
    last = (complaint.strip().splitlines() or ["it ended early"])[-1]
    if code or not mark:
        return f"does not import, or does not read its results ({last})", {}
    if chatter or complaint:
        return f"prints {shown(chatter or complaint)} when imported", {}
    if listing() != before:
        return "writes files when imported", {}
    try:
        answer = json.loads(answer)
        return next(misfits(answer, ANSWER_SHAPE, "final_table"), ""), answer
    except (ValueError, RecursionError):
        return f"answers {shown(answer)}", {}


def wrong_logs(folder: Path, results: Results) -> list[str]:
    """Logs that do not show their results, by the word of the folder's own script; configurations that it reads differently."""
    problem, answer = ask_script(folder, list(results))
    if problem:
        return [f"train_gpt.py: {problem}; ship the source as run, with all that it imports"]
    problems = []
    for seed, r in results.items():
        said, name = answer.get(str(seed), {}), f"result_seed{seed}.json"
        log = read_text(folder / f"train_seed{seed}.log", f"train_seed{seed}.log")
        if said.get("table", "\0").strip() not in log:
            problems.append(
                f"train_seed{seed}.log: does not show the final table of {name}; put back both files of that run"
            )
        problems += [
            f"{name}: {key} is not what train_gpt.py makes of its config; put back the file of that run"
            for key in ("config_sha256", "non_default")
            if said.get(key) != r[key]
        ]
    return problems


def check_copy(folder: Path) -> list[str]:
    """check_submission of a folder of plain files; raises the first Refusal of a file. The script runs when all else is well."""
    problems = [
        f"{name}: missing; build it again from runs"
        for name in REQUIRED
        if not (folder / name).is_file()
    ]
    if problems:
        return problems
    submission = read_json(folder / "submission.json", "submission.json", SUBMISSION_SHAPE)
    if problems := wrong_seed_files(folder, submission["seeds"]):
        return problems
    names = {seed: f"result_seed{seed}.json" for seed in sorted(submission["seeds"])}
    results = {seed: read_json(folder / name, name, RESULT_SHAPE) for seed, name in names.items()}
    if problems := [*unfit(results), *unlike(results)]:
        return problems
    first = results[min(results)]
    check_hash(folder / "train_gpt.py", "train_gpt.py", first["code_sha256"])
    if first["data"]["tokenizer_sha256"] != OFFICIAL_TOKENIZER:
        check_hash(folder / TOKENIZER, TOKENIZER, first["data"]["tokenizer_sha256"])
    about, source = {key: submission[key] for key in ABOUT}, (folder / "train_gpt.py").read_bytes()
    if len(source) > MAX_CODE_BYTES:  # to compile it takes up to 600 times the memory
        return [
            f"train_gpt.py: {len(source):,} bytes, over {MAX_CODE_BYTES:,}; no script of a person is that long"
        ]
    problems = [
        *wrong_figures(results, len(source)),
        *differences(submission, summarise(results, about), "submission.json"),
        *wrong_readme(read_text(folder / "README.md", "README.md"), results, about),
    ]
    return problems or wrong_logs(folder, results)


def check_submission(folder: Path) -> list[str]:
    """The problems of a submission folder, one line each; none when it is good. Reads and runs only a copy of that folder,
    and trusts no file in it; but its train_gpt.py is executed, once everything else is found good."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "submission"
        try:
            problems = copy_in(Path(folder), copy) or check_copy(copy)
        except Refusal as refusal:
            problems = [str(refusal)]
    more = [f"and {len(problems) - MAX_PROBLEMS:,} more"] * (len(problems) > MAX_PROBLEMS)
    return [
        printable(problem if len(problem) < 600 else f"{problem[:400]} ... {problem[-100:]}")
        for problem in problems[:MAX_PROBLEMS] + more
    ]


# ── 8 COMMANDS ────────────────────────────────────────────────────────────────────────────────────────────────────
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

"""Runs what is missing of a matrix: clean processes, nothing twice, nothing lost."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rich.console
import rich.live
import rich.table

import train_gpt
from ablation.records import load, read_lines
from ablation.study import ROOT, Matrix, Size, Trial, clean_environment, command
from train_gpt import COMPARED, Refusal


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
            call = [
                sys.executable,
                str(ROOT / "ablate.py"),
                *arguments,
                "--only",
                ",".join(t.id for t in mine),
            ]
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

"""Runs what is missing of a matrix: clean processes, nothing twice, nothing lost.

In: a Matrix. Out: a run folder per trial, and its lines in the ledger. A finished trial is never
run again, a failed one stays failed until it is asked for, and one that a crash or an interruption
cut off is set aside and run again. Several machines may run one folder: each takes what no other
has claimed (ledger.py), and stays until all is done, in case another is lost.
"""

import contextlib
import itertools
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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

import rich.console
import rich.live
import rich.table

import train_gpt
from ablation.ledger import Claim, Ledger
from ablation.records import METRICS, RunStore, load, read_lines, split_trial
from ablation.study import ROOT, Matrix, Size, Study, Trial, arm_settings
from planning.forecast import Options, plan
from train_gpt import COMPARED, Config, Refusal, settings_line

# Of a machine, all that a process needs to start
MACHINE = (
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "SYSTEMROOT",
)

# Ends of a process that was told to stop
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
GO_ON = "interrupted; the same command goes on where this one stopped"
# In a job: what is beyond its memory ends so, and more memory is asked for from outside
KILLED = "killed from outside; if for its memory, give more with --slurm memory=..."

TAKEN = "taken over by another machine, as this one gave no sign of life for a while"

# Seconds that a run takes besides its phases, and that one takes of which nothing is known
START_SECONDS = 5
GUESSED_SECONDS = 10
# Seconds that a run has to end once it was told to; torchrun gives its ranks 30 of them
STOP_SECONDS = 60
# Seconds between two looks at what others run, where nothing else is to do
POLL_SECONDS = 5.0
# What a trial does of which step and loss are shown
RUNNING = "running"
# Of what a failed run printed
TAIL_BYTES = 20_000


# ── One process ───────────────────────────────────────────────────────────────────────────────────
def clean_environment(trial: Trial, size: Size) -> dict[str, str]:
    """The whole environment of a run: its settings, and from ours only what a process needs."""
    env = {name: os.environ[name] for name in MACHINE if name in os.environ}
    if size.threads:
        env["OMP_NUM_THREADS"] = str(size.threads)
    return env | trial.env


def command(size: Size) -> list[str]:
    """torchrun where there are several ranks; one process needs no launcher."""
    words = [sys.executable]
    if size.ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size.ranks}"]
    return [*words, "train_gpt.py"]


def shell(trial: Trial, size: Size) -> str:
    """The command of a trial as one line for a shell, with the whole environment that it gets."""
    words = ["env", "-i", 'PATH="$PATH"']
    for name, value in clean_environment(trial, size).items():
        if name != "PATH":
            words.append(f"{name}={shlex.quote(value)}")
    return " ".join([*words, shlex.join(command(size))])


def pasted(study: Study, size: Size, arm: str, equal: str, seed: int) -> list[str]:
    """The commands that run an arm, each a line for a shell: all settings spelt out; by its base.

    The second only where it has a base. Refusal of an arm that the study lacks.
    """
    if arm not in study.arms:
        why = f"no arm: {study.missing[arm][1]}" if arm in study.missing else "no such arm"
        choices = ", ".join(study.arms)
        raise Refusal(f"{study.path}: {arm}: {why}; choose from {choices}")
    env = {**study.env, **arm_settings(study, size, arm, equal), "SEED": str(seed)}
    cfg = Config.from_env(env)
    launch = "torchrun --standalone"
    if size.threads:
        launch = f"OMP_NUM_THREADS={size.threads} {launch}"
    launch += f" --nproc_per_node={size.ranks} train_gpt.py"
    lines = [f"{settings_line(cfg)} {launch}"]
    if cfg.base:
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
        lines.append(f"{words} {launch}")
    return lines


def told_reason(lines: list[str], code: int) -> tuple[int, str]:
    """(exit code, reason) of a run that left no result, from the last lines that it printed.

    torchrun itself ends with 1, whatever the rank's code, but our errors name theirs.
    """
    errors = [line for line in lines if line.startswith("error: ")]
    told = errors or lines[-1:] or ["no output"]
    named = re.findall(r"\[exit (\d+):", told[-1])
    if named:
        return int(named[-1]), told[-1]
    return code or 1, told[-1]


def killed(lines: list[str], code: int) -> bool:
    """Whether a run, or of several ranks one, ended by SIGKILL: from outside, as for its memory.

    lines: the last that it printed; torchrun names there the end of each rank that failed first.
    """
    ranks = any(re.search(rf"^ *exitcode +: -{signal.SIGKILL:d} ", line) for line in lines)
    own = any(line.startswith("error: ") for line in lines)
    return code == -signal.SIGKILL or (ranks and not own)


# ── The runner ────────────────────────────────────────────────────────────────────────────────────
class Runner:
    """Runs what is missing of a matrix.

    results: trial -> run of the finished ones; failed: trial -> reason; todo: what is missing.
    side_by_side: how many run at a time, for the projection.
    A retried trial keeps the lines of its old attempts in the ledger. before: called before
    each trial, and may wait for the machine. synced: see Ledger.
    """

    def __init__(
        self,
        matrix: Matrix,
        retry: bool = False,
        only: tuple[str, ...] = (),
        before: Callable[[], None] = lambda: None,
        synced: float = 0.0,
    ):
        self.matrix = matrix
        self.before = before
        self.stopped = threading.Event()
        self.ledger = Ledger(matrix.folder, synced, self.stopped.wait)
        self.began = self.ledger.known()
        self.store = RunStore(matrix.folder)
        self.running: dict[str, subprocess.Popen] = {}
        # the trainings that the workers of this process have in hand
        self.in_hand: dict[str, Claim] = {}
        # one worker at a time looks for a training, and none starts once all is to stop
        self.lock = threading.Lock()
        self.starting = threading.Lock()
        self.side_by_side = matrix.size.jobs
        # arm -> seconds of a training, and of the rest, before it has run
        self.forecasts: dict[str, tuple[float, float]] = {}

        self.failed = {} if retry else self.ledger.failures(matrix.trials)
        self.results: dict[str, dict] = {}
        for trial in matrix.trials:
            if trial.id not in self.failed:
                self.adopt(trial)
        self.chosen = [trial for trial in matrix.trials if not only or trial.id in only]
        if len(self.chosen) < len(set(only)):
            raise Refusal(
                f"--only {','.join(only)}: not all are trials of {matrix.study.name}; see --dry-run"
            )
        self.todo = list(self.waiting(self.chosen))

    def waiting(self, trials: list[Trial]) -> Iterator[Trial]:
        """Those that have neither finished nor failed."""
        for trial in trials:
            if trial.id not in self.results and trial.id not in self.failed:
                yield trial

    def adopt(self, trial: Trial) -> None:
        """Takes up the result of a trial, if it ended well."""
        result = self.finished(trial)
        if result is not None:
            self.results[trial.id] = result

    def finished(self, trial: Trial) -> dict | None:
        """The result of a trial that ended well, else None.

        Refusal if it came from other code, settings, data or ranks.
        """
        result = self.store.find(trial.id)
        if result is None or result["exit_code"]:
            return None
        for found, wanted in (
            (result, self.identity(trial)),
            (result["config"], trial.cfg.knobs(*COMPARED) | {"data_path": trial.cfg.data_path}),
            (result, {"config_sha256": trial.cfg.digest()}),
        ):
            for name, value in wanted.items():
                if found.get(name) != value:
                    raise Refusal(
                        f"{trial.folder}: finished with {name} {found.get(name)}, now {value}; "
                        "move the folder away, or use --out"
                    )
        return result

    def identity(self, trial: Trial) -> dict:
        """What a result of this trial must say of code, seed and ranks."""
        return {
            "code_sha256": train_gpt.CODE_SHA256,
            "seed": trial.seed,
            "world_size": self.matrix.size.ranks,
        }

    def seconds(self, trial: Trial) -> float:
        """Projected wall seconds: as finished trials of this arm took; else what --plan says of the
        size's GPU; without one the size's budget.
        """
        known = [
            sum(result["seconds"].values()) + START_SECONDS
            for name, result in list(self.results.items())
            if split_trial(name)[0] == trial.arm
        ]
        if known:
            return sum(known) / len(known)
        if trial.arm not in self.forecasts:
            self.forecasts[trial.arm] = self.forecast(trial)
        training, rest = self.forecasts[trial.arm]
        return rest if trial.donor else training + rest

    def forecast(self, trial: Trial) -> tuple[float, float]:
        """Wall seconds of its training, and of the rest."""
        size = self.matrix.size
        if size.gpu:
            # what is refused there fails when its turn comes
            with contextlib.suppress(Refusal):
                found = plan(trial.cfg, Options(size.gpu.lower(), size.ranks))
                training = found["training"]["seconds"]
                return training, found["seconds"] - training + START_SECONDS
        return size.seconds, GUESSED_SECONDS

    def gpu_hours(self) -> float:
        """Projected hours of one GPU, of all that is missing."""
        seconds = sum(map(self.seconds, self.waiting(self.todo)))
        return seconds * self.matrix.size.ranks / 3600

    def remaining(self) -> float:
        """Projected wall seconds of all that is missing."""
        return sum(map(self.seconds, self.waiting(self.todo))) / self.side_by_side

    def run(self, log: Callable[[str], None]) -> None:
        """Runs the groups in order, `jobs` at a time. log: gets a line per trial.

        An interruption ends what runs, and writes no end of it: it runs again next time.
        """
        self.matrix.folder.mkdir(parents=True, exist_ok=True)
        jobs = self.matrix.size.jobs
        with self.ledger.beating(self.end_what_is_lost), ThreadPoolExecutor(jobs) as pool:
            try:
                workers = [pool.submit(self.work, log) for _ in range(jobs)]
                for worker in wait(workers, return_when=FIRST_EXCEPTION).done:
                    worker.result()
            except BaseException as error:
                self.stop()
                if isinstance(error, KeyboardInterrupt):
                    raise Refusal(GO_ON, 130) from None
                raise

    def work(self, log: Callable[[str], None]) -> None:
        """Runs one training after the other, until nothing is missing."""
        while claim := self.next_claim(log):
            try:
                self.run_group(claim, log)
            finally:
                self.ledger.give_up(claim)
                del self.in_hand[claim.training.id]

    def next_claim(self, log: Callable[[str], None]) -> Claim | None:
        """The next training that is ours to run, perhaps after others of which one is lost;
        None once nothing is missing.
        """
        told = False
        while not self.stopped.is_set():
            held = []
            with self.lock:
                self.take_up(log)
                for group in self.matrix.groups():
                    missing = list(self.waiting([trial for trial in group if trial in self.todo]))
                    if not missing or group[0].id in self.in_hand:
                        continue
                    claim = self.ledger.claim(group[0], missing)
                    if not isinstance(claim, Claim):
                        held.append(f"{missing[0].id} by {claim}")
                        continue
                    # the last claimant may have ended it a moment ago
                    self.take_up(log)
                    if any(self.waiting(missing)):
                        self.in_hand[group[0].id] = claim
                        return claim
                    self.ledger.give_up(claim)
            if not held:
                return None
            if not told:
                log(f"waiting, as {len(held)} are run elsewhere: {', '.join(held[:3])}")
            told = True
            self.stopped.wait(POLL_SECONDS)
        return None

    def take_up(self, log: Callable[[str], None]) -> None:
        """What others have ended since this began."""
        own = [trial for claim in list(self.in_hand.values()) for trial in claim.trials]
        missing = [trial for trial in self.waiting(self.todo) if trial not in own]
        self.failed |= self.ledger.failures(missing, self.began)
        for trial in missing:
            try:
                self.adopt(trial)
            except Refusal as refusal:  # an unreadable or foreign result
                self.failed[trial.id] = str(refusal)
            if trial.id in self.results or trial.id in self.failed:
                log(self.progress(trial))

    def stop(self) -> None:
        """Starts nothing more, and ends what runs."""
        with self.starting:
            self.stopped.set()
        processes = list(self.running.values())
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()

    def lost(self, training: Trial) -> bool:
        """Whether another machine has taken a training over that this one has in hand."""
        # without our ledger the disk is away, and may come back
        return self.ledger.path.exists() and self.ledger.holder(training) != self.ledger.owner

    def end_what_is_lost(self) -> None:
        """Ends what another machine runs by now, as this one was cut off for a while."""
        for claim in list(self.in_hand.values()):
            if self.lost(claim.training):
                for trial in claim.trials:
                    process = self.running.get(trial.id)
                    if process:
                        process.terminate()

    def run_group(self, claim: Claim, log: Callable[[str], None]) -> None:
        """A training and what shares it.

        Its checkpoint is removed at the end; a later arm that would share it trains.
        """
        for trial in self.waiting(claim.trials):
            if trial.donor in self.failed:
                self.end(trial, -1, f"its training {trial.donor} failed")
            else:
                self.before()
                if not self.lost(claim.training):
                    self.run_trial(trial, claim)
            if trial.id not in self.results and trial.id not in self.failed:
                log(f"{trial.id}: {TAKEN}")
                return
            log(self.progress(trial))
        (claim.training.folder / "checkpoint.bin").unlink(missing_ok=True)

    def progress(self, trial: Trial) -> str:
        """The line of a trial that has just ended."""
        done = len(self.results) + len(self.failed)
        outcome = self.failed.get(trial.id)
        if not outcome:
            outcome = f"val bpb {self.results[trial.id]['val_bpb']:.5f}"
        return (
            f"[{done}/{len(self.matrix.trials)}] {trial.id}: {outcome}; "
            f"about {self.remaining() / 60:.0f} min left"
        )

    def run_trial(self, trial: Trial, claim: Claim) -> None:
        """Runs one trial and writes down how it ended, unless its training is lost by then."""
        with tempfile.TemporaryFile() as output:
            code = self.start(trial, output, claim.lock).wait()
            del self.running[trial.id]
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - TAIL_BYTES))
            lines = output.read().decode(errors="replace").strip().splitlines()
        if self.lost(claim.training):
            return
        if self.stopped.is_set() or code in INTERRUPTED:
            raise Refusal(f"{trial.id}: {GO_ON}", 130)
        if "SLURM_JOB_ID" in os.environ and killed(lines, code):
            raise Refusal(f"{trial.id}: {KILLED}", 137)

        try:
            code, reason = self.outcome(trial, code, lines)
            if code == 0:
                self.adopt(trial)
        except Refusal as refusal:  # an unreadable or foreign result
            code = code or 5
            reason = str(refusal)
        self.end(trial, code, reason)

    def start(self, trial: Trial, output: IO, lock: IO) -> subprocess.Popen:
        """The process of a trial; it holds the lock of its training, even when this program is
        gone.
        """
        if trial.folder.exists():
            set_aside(trial.folder)
        env = clean_environment(trial, self.matrix.size)
        if trial.donor and not (self.matrix.folder / trial.donor / "checkpoint.bin").exists():
            del env["CHECKPOINT"]  # that training is over: this trial trains

        with self.starting:
            if self.stopped.is_set():
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

    @staticmethod
    def outcome(trial: Trial, code: int, lines: list[str]) -> tuple[int, str]:
        """(exit code, reason) of a run. code: of its process. lines: the last that it printed."""
        if not (trial.folder / "result.json").exists():
            return told_reason(lines, code)
        code = load(trial.folder)["exit_code"]
        return code, train_gpt.EXIT_CODES.get(code, "unknown exit code")

    def end(self, trial: Trial, code: int, reason: str) -> None:
        """Writes down how a trial ended."""
        self.ledger.write(trial, "end", exit_code=code, reason=reason)
        self.failed |= self.ledger.failures([trial])


def set_aside(folder: Path) -> None:
    """Renames the folder of a run that a crash cut off to FOLDER.cut1, .cut2 and so on."""
    for attempt in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.cut{attempt}")
        if not aside.exists():
            folder.rename(aside)
            return


# ── In this machine ───────────────────────────────────────────────────────────────────────────────
def latest_step(trial: Trial) -> tuple[dict, float]:
    """(the last step that a running trial has logged, seconds since it began); {} and 0 before."""
    events = read_lines(trial.folder / METRICS)
    steps = [event for event in events if event.get("event") == "step"]
    return (steps[-1] if steps else {}), (events[-1].get("t", 0) if events else 0)


def seconds_left(runner: Runner, trial: Trial, done: int, passed: float) -> float:
    """Projected seconds of a trial: at the pace of its steps, where their number is the budget.

    done: its steps until now, in the passed seconds.
    """
    if done and runner.matrix.equal == "steps":
        return passed / done * max(trial.cfg.iterations - done, 0)
    return max(runner.seconds(trial) - passed, 0)


def watch(runner: Runner, states: dict[str, str]) -> rich.table.Table:
    """What is running: trial, state, step, loss, seconds left. states: trial -> what it does."""
    title = (
        f"{runner.matrix.study.name}: {len(runner.results)} done, {len(runner.failed)} failed, "
        f"about {runner.remaining() / 60:.0f} min left"
    )
    table = rich.table.Table("trial", "state", "step", "loss", "time left", title=title)
    for trial in runner.matrix.trials:
        if trial.id not in states:
            continue
        state = states[trial.id]
        step, passed = latest_step(trial) if state.endswith(RUNNING) else ({}, 0)
        left = seconds_left(runner, trial, step.get("step", 0), passed)
        loss = str(step.get("loss", "-"))[:6]
        table.add_row(trial.id, state, str(step.get("step", "-")), loss, f"{left:.0f} s")
    return table


@contextlib.contextmanager
def display(
    runner: Runner, states: Callable[[], dict[str, str]]
) -> Iterator[Callable[[str], None]]:
    """A live table on a terminal, nothing elsewhere. Gives the function that prints a line."""
    console = rich.console.Console()
    if not console.is_terminal:
        yield lambda line: print(line, flush=True)
        return
    with rich.live.Live(
        get_renderable=lambda: watch(runner, states()), refresh_per_second=1, console=console
    ):
        yield lambda line: console.print(line, markup=False, highlight=False)


def run_here(runner: Runner) -> None:
    """All in this machine, with one line per trial."""
    with display(runner, lambda: dict.fromkeys(runner.running, RUNNING)) as say:
        runner.run(say)


# ── GPUs that are idle and cool ───────────────────────────────────────────────────────────────────
GPU_QUERY = [
    "nvidia-smi",
    "--query-gpu=utilization.gpu,temperature.gpu",
    "--format=csv,noheader,nounits",
]
GPU_POLL_SECONDS = 10
# 15 minutes
GPU_POLLS = 90


def gpu_states() -> list[tuple[float, float]]:
    """(percent busy, Celsius) of each GPU. Refusal where no GPU can be asked."""
    found = []
    try:
        done = subprocess.run(GPU_QUERY, capture_output=True, text=True, check=True)
        for line in done.stdout.strip().splitlines():
            busy, celsius = line.split(",")
            found.append((float(busy), float(celsius)))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Refusal(
            f"--max-celsius, --max-busy: nvidia-smi does not answer ({error}); leave them out"
        ) from None
    return found


def gpu_gate(cool_down: float, max_celsius: float, max_busy: float) -> None:
    """Sleeps cool_down seconds, then until every GPU is idle and cool (0: no limit).

    Refusal where no GPU can be asked, and after 15 minutes of waiting.
    """
    time.sleep(cool_down)
    if not max_celsius and not max_busy:
        return
    for _ in range(GPU_POLLS):
        found = gpu_states()
        idle = all(busy <= (max_busy or math.inf) for busy, _ in found)
        cool = all(celsius <= (max_celsius or math.inf) for _, celsius in found)
        if idle and cool:
            return
        time.sleep(GPU_POLL_SECONDS)
    raise Refusal(
        "GPUs are not idle and cool after 15 minutes: (% busy, Celsius) "
        f"{found}; stop what uses them, or raise the limits"
    )

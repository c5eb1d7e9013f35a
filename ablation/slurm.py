"""Runs what is missing of a matrix as Slurm jobs, one per training; no accounting is needed.

In: a Runner and options for sbatch. Out: what the jobs leave, as if they had run here: a run
folder per trial and lines of ledger.jsonl.

A job is a call of `ablate.py run --only` on a node. It has the name of its training, and the
folder of the matrix is where it starts. By these two squeue finds it again, and the ledger says
which trials it runs: whoever gives the same command watches what is queued and submits the rest.
"""

import contextlib
import fcntl
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from ablation.records import read_log
from ablation.runner import Runner, display, latest_step, told_reason
from ablation.study import ROOT, Size, Trial
from train_gpt import Refusal

# What --slurm may not give, as it makes a job one of a study
OURS = (
    "array",
    "chdir",
    "clusters",
    "error",
    "job-name",
    "nodes",
    "ntasks",
    "output",
    "parsable",
    "test-only",
    "wait",
    "wrap",
)
# What has to be known by its whole name
WHOLE = ("dependency", "partition")
SHORT = {"cpus": "cpus-per-task", "memory": "mem"}
# sbatch ends with it when it does not understand an option, whatever the job
NOT_UNDERSTOOD = 255

# States of a job that has left the queue
BY_ITSELF = ("COMPLETED", "FAILED", "GONE")
KILLED = {
    "BOOT_FAIL": "its node did not start",
    "CANCELLED": "cancelled",
    "DEADLINE": "not begun by its deadline",
    "NODE_FAIL": "its node went down",
    "OUT_OF_MEMORY": "out of memory; give more with --slurm memory=...",
    "PREEMPTED": "a job that goes before took its place",
    "REVOKED": "revoked",
    "TIMEOUT": "over its time limit; give more with --slurm time=...",
}

# Seconds between two looks at the queue
POLL_SECONDS = 5.0
# Seconds without a line, where no terminal shows the table
SILENT_SECONDS = 10.0
# Seconds until all of a shared folder shows on another machine
LATE_SECONDS = 60.0


# ── Slurm's commands ──────────────────────────────────────────────────────────────────────────────
class Refused(Refusal):
    """A command of Slurm failed. status: its exit code."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def ask(*words: str) -> str:
    """What a command of Slurm prints. Refused, in its own words, where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Refusal(
            f"--launcher slurm: {words[0]} is not installed here; "
            "give the command where Slurm's commands are"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("Try ")]
        told = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in lines]
        raise Refused(f"{words[0]}: {'; '.join(told) or 'no reason given'}", done.returncode)
    return done.stdout


class Job(NamedTuple):
    """What squeue says of a job. why: it waits. GONE: squeue does not know it any more."""

    number: int
    state: str = "GONE"
    why: str = ""
    name: str = ""

    def ended(self) -> bool:
        return self.state in KILLED or self.state in BY_ITSELF

    def __str__(self) -> str:
        why = f" ({self.why})" if self.state == "PENDING" else ""
        return f"job {self.number}{why} {self.state.lower()}"


def queue(folder: str) -> dict[int, Job]:
    """Number -> job of ours that starts in this folder; of those that have ended, the last few."""
    found = {}
    told = ask(
        "squeue",
        "--noheader",
        "--states=all",
        f"--user={os.getuid()}",
        "--format=%A|%T|%r|%j|%Z",
    )
    for line in told.splitlines():
        number, *facts = line.split("|", 4)
        if len(facts) == 4 and facts[3] == folder:
            found[int(number)] = Job(int(number), *facts[:3])
    return found


def number_of(told: str) -> int:
    """The number of a job in what `sbatch --parsable` prints: NUMBER or NUMBER;CLUSTER.

    A site's own sbatch may print more before it. Refusal where there is none.
    """
    numbers = re.findall(r"^(\d+)(?:;.*)?$", told, re.MULTILINE)
    if not numbers:
        words = " ".join(told.split())[-200:] or "nothing"
        raise Refusal(f"sbatch gives no number of a job, but: {words}; see squeue for what it did")
    return int(numbers[-1])


# ── What a job asks for ───────────────────────────────────────────────────────────────────────────
def sbatch_options(entries: list[str]) -> dict[str, str]:
    """Name -> word for sbatch, of each KEY=VALUE of --slurm. Refusal on what is set here.

    sbatch takes the beginning of a name for the name.
    """
    words = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        key = SHORT.get(key, key)
        if not re.fullmatch("[a-z][a-z-]*", key):
            raise Refusal(f"--slurm {entry}: give an option of sbatch as KEY=VALUE")
        for name in OURS:
            if name.startswith(key):
                raise Refusal(f"--slurm {entry}: ablate.py sets {name} itself; remove it")
        for name in WHOLE:
            if len(key) > 2 and name.startswith(key):
                key = name
        words[key] = f"--{key}{equals}{value}"
    return words


def has_gpus(partitions: str) -> bool:
    """Whether nodes of these partitions, or else of the default one, have GPUs for Slurm to give.

    A login node need not have any.
    """
    words = ["sinfo", "--noheader", "--format=%P %G"]
    if partitions:
        words.append(f"--partition={partitions}")
    rows = [line.split() for line in ask(*words).splitlines()]
    default = [row for row in rows if row[0].endswith("*")]
    if default and not partitions:
        rows = default
    return any(re.search(r"(^|,)gpu\b", row[-1]) for row in rows)


def resources(size: Size, given: dict[str, str]) -> dict[str, str]:
    """What a training needs of a node and nobody else may use: cores, and GPUs where it uses them.

    given: options that say so already.
    """
    words = {"nodes": "--nodes=1", "ntasks": "--ntasks=1"}
    if "cpus-per-task" not in given:
        cores = f"--cpus-per-task={size.ranks * size.threads}"
        words["cpus"] = cores if size.threads else "--exclusive"
    if not any(key.startswith(("gpus", "gres", "tres")) for key in given):
        partition = given.get("partition", "").partition("=")[2]
        if has_gpus(partition or os.environ.get("SBATCH_PARTITION", "")):
            words["gpus"] = f"--gres=gpu:{size.ranks}"
    return words


# ── Submit, watch ─────────────────────────────────────────────────────────────────────────────────
class Jobs:
    """The jobs of a matrix.

    at_work: number of a job -> the trials that it has still to run.
    seen: number -> what squeue last said; ended: number -> when it first said that it has ended.
    say: gets each line for people; said: when it last got one.
    """

    def __init__(self, runner: Runner, options: list[str]):
        self.runner = runner
        self.folder = os.path.realpath(runner.matrix.folder)
        given = sbatch_options(options)
        self.options = resources(runner.matrix.size, given) | given
        self.at_work: dict[int, list[Trial]] = {}
        self.seen: dict[int, Job] = {}
        self.ended: dict[int, float] = {}
        self.deaf = False
        self.say: Callable[[str], None] = print
        self.said = time.monotonic()

    def tell(self, line: str) -> None:
        self.said = time.monotonic()
        self.say(line)

    def submit(self, arguments: list[str]) -> None:
        """A job for each training of which something is missing, and which is not queued yet.

        arguments: of `ablate.py`, for the whole matrix. Refusal of options that sbatch does not
        know; a job that it refuses is said, and the others go on. Of two calls at once, the
        second waits, and sees what the first has queued.
        """
        jobs = self.runner.matrix.folder / "jobs"
        jobs.mkdir(parents=True, exist_ok=True)
        with (jobs / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            queued = [job for job in queue(self.folder).values() if not job.ended()]
            for group in self.runner.matrix.groups():
                trials = [trial for trial in group if trial in self.runner.todo]
                before = [job for job in queued if job.name == group[0].id]
                missing = self.watch_queued(trials, before)
                if missing:
                    self.submit_one(group[0].id, missing, before, arguments)

    def watch_queued(self, trials: list[Trial], queued: list[Job]) -> list[Trial]:
        """Watches those trials of a training that its queued jobs run. Returns the others."""
        number = self.runner.ledger.jobs(trials)
        for job in queued:
            own = [trial for trial in trials if number.get(trial.id) == job.number]
            if own:
                self.watch(job, own)
                self.tell(f"{own[0].id}: {job}; it was submitted before")
        return [trial for trial in trials if number.get(trial.id) not in self.at_work]

    def submit_one(
        self, name: str, trials: list[Trial], before: list[Job], arguments: list[str]
    ) -> None:
        """Submits a job of one training. before: its other jobs, which must have ended first: the
        checkpoint and the folders are theirs.
        """
        only = ",".join(trial.id for trial in trials)
        call = [sys.executable, str(ROOT / "ablate.py"), *arguments, f"--only={only}"]
        minutes = math.ceil(3 * sum(map(self.runner.seconds, trials)) / 60) + 30
        words = {"time": f"--time={minutes}"} | self.options
        if before:
            after = ":".join(["afterany", *(str(job.number) for job in before)])
            given = self.options.get("dependency")
            words["dependency"] = f"{given},{after}" if given else f"--dependency={after}"
        try:
            told = ask(
                "sbatch",
                "--parsable",
                f"--job-name={name}",
                f"--chdir={self.folder}",
                "--output=jobs/%j.out",
                *words.values(),
                f"--wrap={shlex.join(call)}",
            )
        except Refused as refused:
            if refused.status == NOT_UNDERSTOOD:
                raise
            self.tell(f"{trials[0].id}: refused by {refused}")
            return
        job = Job(number_of(told), "PENDING", "submitted now", name)
        for trial in trials:
            self.runner.ledger.write(trial, "queue", job=job.number)
        self.watch(job, trials)
        self.tell(f"{trials[0].id}: {job}")

    def watch(self, job: Job, trials: list[Trial]) -> None:
        self.seen[job.number] = job
        self.at_work[job.number] = trials

    def follow(self) -> None:
        """Waits until all jobs have ended, with a line now and then where no table is shown."""
        self.said = -math.inf  # the first look says at once why a job waits
        while self.at_work:
            time.sleep(POLL_SECONDS)
            self.poll()
            silent = time.monotonic() - self.said
            if self.at_work and silent > SILENT_SECONDS and not sys.stdout.isatty():
                self.tell(self.summary())

    def poll(self) -> None:
        """Looks at the queue, and takes up what has ended."""
        try:
            found = queue(self.folder)
        except Refused as refused:
            if not self.deaf:
                self.tell(f"{refused}; the jobs go on, and this asks again")
            self.deaf = True
            return
        self.deaf = False
        for number in list(self.at_work):
            before = self.seen[number]
            job = found.get(number, Job(number))
            self.seen[number] = job
            if job.state != before.state and before.state == "PENDING":
                self.tell(f"{self.at_work[number][0].id}: {job}")
            self.look_at(job)
        self.runner.side_by_side = max(1, len(self.running()))

    def look_at(self, job: Job) -> None:
        """Takes up the trials of a job that have ended, and says how the job ended."""
        missing = [trial for trial in self.at_work[job.number] if not self.take_up(trial, job)]
        self.at_work[job.number] = missing
        if missing and not job.ended():
            return
        since = self.ended.setdefault(job.number, time.monotonic())
        if missing and job.state in BY_ITSELF and time.monotonic() - since < LATE_SECONDS:
            return
        del self.at_work[job.number]
        if missing:
            self.give_up(job, missing)

    def take_up(self, trial: Trial, job: Job) -> bool:
        """Whether a trial has ended; if so, says how.

        A job that was killed fails no trial, and one that still runs may yet be killed.
        """
        for folder in (self.folder, trial.folder):
            with contextlib.suppress(OSError):
                os.listdir(folder)  # or a shared disk shows what it was some seconds ago
        try:
            self.runner.adopt(trial)
        except Refusal as refusal:  # an unreadable or foreign result
            self.runner.failed[trial.id] = str(refusal)
        if job.state in BY_ITSELF:
            self.runner.failed |= self.runner.ledger.failures([trial])
        ended = trial.id in self.runner.results or trial.id in self.runner.failed
        if ended:
            self.tell(self.runner.progress(trial))
        return ended

    def give_up(self, job: Job, trials: list[Trial]) -> None:
        """Says why a job has ended without these trials, and that they are still to run."""
        reason = KILLED.get(job.state)
        if not reason:
            lines = read_log(self.runner.matrix.folder / f"jobs/{job.number}.out").splitlines()
            reason = told_reason(lines, 0)[1]
        for trial in trials:
            self.runner.ledger.write(trial, "killed", job=job.number, reason=reason)
        for group in self.runner.matrix.groups():
            if trials[0] in group:
                self.runner.ledger.free(group[0], job.number)
        names = ", ".join(trial.id for trial in trials)
        self.tell(f"{names}: job {job.number}: {reason}; the same command runs it again")

    def states(self) -> dict[str, str]:
        """Trial -> what its job does."""
        found = {}
        for number, trials in list(self.at_work.items()):
            found |= dict.fromkeys((trial.id for trial in trials), str(self.seen[number]))
        return found

    def running(self) -> list[Trial]:
        """What each running job has in hand."""
        return [
            trials[0]
            for number, trials in self.at_work.items()
            if self.seen[number].state == "RUNNING"
        ]

    def summary(self) -> str:
        """What runs, what waits and why, in one line."""
        running = self.running()
        waiting = [self.seen[number] for number in self.at_work]
        reasons = dict.fromkeys(job.why for job in waiting if job.state == "PENDING")
        why = "; ".join(reason for reason in reasons if reason not in ("", "None"))
        told = [
            f"{len(running)} running, {len(self.at_work) - len(running)} waiting"
            + (f" ({why})" if why else "")
        ]
        for trial in running:
            step = latest_step(trial)[0]
            loss = str(step.get("loss", "-"))[:6]
            told.append(f"{trial.id} at step {step.get('step', '-')}, loss {loss}")
        return "; ".join([*told, f"about {self.runner.remaining() / 60:.0f} min left"])

    def farewell(self) -> str:
        """What an interruption leaves."""
        numbers = " ".join(map(str, self.at_work))
        if not numbers:
            return "interrupted; no job is queued, and the same command goes on"
        return (
            "interrupted; jobs go on without this: the same command watches them again, "
            f"scancel {numbers} ends them"
        )


def run_as_jobs(runner: Runner, options: list[str], arguments: list[str]) -> None:
    """Submits what is missing and not queued yet, and watches it to its end.

    options: KEY=VALUE, of --slurm. arguments: of `ablate.py`, for the whole matrix.
    Refusal when interrupted; the jobs go on.
    """
    jobs = Jobs(runner, options)
    try:
        with display(runner, jobs.states) as jobs.say:
            jobs.submit(arguments)
            jobs.follow()
    except KeyboardInterrupt:
        raise Refusal(jobs.farewell(), 130) from None

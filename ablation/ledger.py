"""ledger.jsonl of a matrix: what became of each trial, and who runs which training.

In: a line from every process, on every machine that has the folder, when a trial starts and when
it ends, however, and when a training is claimed or given up. Out: what has failed, which job runs
what, and of a training whether it is free.

A training, with the trials that share it, is claimed before anything of it runs. Two things say
that a claim still holds. On its machine two locks: of .TRAINING.HOST.lock, which the process of a
trial holds too, and of train.log, which its rank 0 holds, so that one of them lasts until rank 0 is
gone. On the others signs of life: what the claimant writes every few seconds, and what its training
writes. A machine that shows nothing new for LOST_SECONDS, by the clock of who waits for it, is
lost, and another takes its training over. One that was only cut off notices that at its next sign
of life, and ends its own.

Shared disks show all machines one file. Where files are copied from machine to machine, within S
seconds (synced), a process writes a ledger of its own. It waits S before it claims anything, and
2 S after each claim. A claim made more than S after that one has seen it; one made earlier is here
by then. So all see the same claims, and the first holds. `n` orders the lines: one more than any
that the writer knew. A machine is lost there after 3 S more.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ablation.records import read_lines
from ablation.study import Trial
from train_gpt import ALIVE, Refusal

# Seconds between two signs of life, and without a new one until a machine counts as lost: an NFS
# client may see a new file a minute late
BEAT_SECONDS = 10.0
LOST_SECONDS = 180.0

# Who has the locks of a training that is claimed by nobody else
EARLIER = "a process of an earlier start"

BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """A name of this machine until it starts anew, unlike all others."""
    boot = BOOT.read_text() if BOOT.exists() else str(uuid.getnode())
    return hashlib.sha256(f"{platform.node()} {boot}".encode()).hexdigest()[:12]


def locked(file: IO) -> bool:
    """Locks a file, unless another has it open and locked. Refusal where the disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Refusal(f"{file.name}: no locks on this disk ({error}); use --out") from None
    return True


def in_use(folder: Path) -> bool:
    """Whether a training is at work in this folder: its rank 0 has locked its log."""
    try:
        with (folder / "train.log").open("r+b") as log:
            return not locked(log)
    except FileNotFoundError:
        return False


class Claim(NamedTuple):
    """A training that is ours to run: trials: those of it that are missing; lock: of its file."""

    training: Trial
    trials: list[Trial]
    lock: IO


class Ledger:
    """The lines of a matrix, as they are now; nothing is kept in memory.

    synced: seconds until another machine sees a file, where it gets a copy; 0: one disk. Then who
    reads the lines for the first time has waited so long. wait: sleeps so many seconds, or less if
    all is to stop.
    owner: who writes, HOST-PROCESS.
    """

    def __init__(self, folder: Path, synced: float = 0.0, wait: Callable | None = None):
        self.folder = folder
        self.synced = synced
        self.wait = wait or time.sleep
        self.host = this_host()
        self.owner = f"{self.host}-{uuid.uuid4().hex[:8]}"
        own = f"-{self.owner}" if synced else ""
        self.path = folder / f"ledger{own}.jsonl"
        self.lock = threading.Lock()
        # (owner, training) -> its last signs of life, and when they were new to us
        self.seen: dict[tuple[str, str], tuple[list[bytes], float]] = {}

    # ── Lines ─────────────────────────────────────────────────────────────────────────────────────
    def lines(self) -> list[dict]:
        """All lines, each behind those that its writer knew."""
        found = []
        for path in sorted(self.folder.glob("ledger*.jsonl")):
            found += read_lines(path)
        return sorted(found, key=number)

    def latest(self) -> int:
        """The greatest number of a line."""
        return max(map(number, self.lines()), default=0)

    def known(self) -> set[tuple]:
        """The lines that are there by now."""
        return set(map(key, self.lines()))

    def write(self, trial: Trial, event: str, **facts) -> None:
        """A line of a trial."""
        self.append({"trial": trial.id}, trial, event, **facts)

    def append(self, subject: dict[str, str], trial: Trial, event: str, **facts) -> None:
        """Appends a line, on a line of its own even where a crash cut off the one before.

        Several processes may write to this file, so each write holds its lock.
        """
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            record = {
                **subject,
                "event": event,
                "n": self.latest() + 1,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "config_sha256": trial.cfg.digest(),
                "owner": self.owner,
                **facts,
            }
            if file.seek(0, os.SEEK_END) > 0 and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(json.dumps(record) + "\n")

    # ── Of trials ─────────────────────────────────────────────────────────────────────────────────
    def last(self, trials: list[Trial], *events: str) -> dict[str, dict]:
        """Trial -> its last line with these settings, of those of these events (none: of any)."""
        lines = {}
        for line in self.lines():
            if not events or line.get("event") in events:
                lines[str(line.get("trial")), str(line.get("config_sha256"))] = line
        return {trial.id: lines.get((trial.id, trial.cfg.digest()), {}) for trial in trials}

    def failures(self, trials: list[Trial], before: Container = ()) -> dict[str, str]:
        """Trial -> reason, where the last attempt with these settings ended badly.

        before: lines that do not count, as `known` gave them.
        """
        found = {}
        for name, line in self.last(trials).items():
            code = line.get("exit_code")
            if line.get("event") == "end" and code != 0 and key(line) not in before:
                found[name] = f"FAILED (exit {code}): {line.get('reason')}"
        return found

    def jobs(self, trials: list[Trial]) -> dict[str, int]:
        """Trial -> number of the job that was submitted last to run it with these settings."""
        found = {name: line.get("job") for name, line in self.last(trials, "queue").items()}
        return {name: job for name, job in found.items() if isinstance(job, int)}

    # ── Of trainings ──────────────────────────────────────────────────────────────────────────────
    def lines_of(self, training: Trial) -> list[dict]:
        """Those of its claims."""
        wanted = training.id, training.cfg.digest()
        lines = self.lines()
        return [x for x in lines if (x.get("training"), x.get("config_sha256")) == wanted]

    def held(self, training: Trial) -> dict:
        """The claim of a training, first of those that are not given up; {}: nobody's."""
        held = {}
        for line in self.lines_of(training):
            if line.get("event") == "claim":
                held = held or line
            elif line.get("owner") == held.get("owner"):
                held = {}
        return held

    def claimant(self, training: Trial) -> str:
        """Who has claimed a training last; ourselves, where nobody has."""
        claims = [line for line in self.lines_of(training) if line.get("event") == "claim"]
        return str(claims[-1].get("owner")) if claims else self.owner

    def holder(self, training: Trial) -> str:
        """Who has claimed a training; empty: nobody."""
        return str(self.held(training).get("owner", ""))

    def claim(self, training: Trial, trials: list[Trial]) -> Claim | str:
        """The claim of a training for the sake of these trials of it, or who has it."""
        lock = (self.folder / f".{training.id}.{self.host}.lock").open("w")
        if not locked(lock):
            lock.close()
            return EARLIER
        rival = self.holder(training)
        for owner in filter(None, [rival, *self.not_seen_yet(trials)]):
            if not self.is_lost(owner, training, trials):
                lock.close()
                return self.name_of(owner)
        # a server may keep the locks of a machine that is lost
        if self.is_here(self.claimant(training)) and any(in_use(t.folder) for t in trials):
            lock.close()
            return EARLIER
        if rival:
            self.tell(training, "lost", owner=rival, by=self.owner)
        self.tell(training, "claim", job=job_number())
        self.wait(2 * self.synced)
        first = self.holder(training)
        if first != self.owner:
            self.give_up(Claim(training, trials, lock))
            return self.name_of(first) if first else "nobody any more"
        return Claim(training, trials, lock)

    def not_seen_yet(self, trials: list[Trial]) -> list[str]:
        """Who has ended these trials well, of those whose results are missing here."""
        ends = self.last(trials, "end").values()
        return [str(line.get("owner", "")) for line in ends if line.get("exit_code") == 0]

    def tell(self, training: Trial, event: str, **facts) -> None:
        """A line of a training."""
        self.append({"training": training.id}, training, event, **facts)

    def give_up(self, claim: Claim) -> None:
        """Ends a claim: all has ended that it was for, or is for others to run."""
        self.tell(claim.training, "release")
        claim.lock.close()

    def free(self, training: Trial, job: int) -> None:
        """Ends the claim of a job that is known to be gone."""
        claim = self.held(training)
        if claim.get("job") == job:
            self.tell(training, "lost", owner=claim["owner"], by=self.owner)

    # ── Signs of life ─────────────────────────────────────────────────────────────────────────────
    def is_lost(self, owner: str, training: Trial, trials: list[Trial]) -> bool:
        """Whether the owner of a claim is gone, of a training whose lock we have."""
        if self.is_here(owner):
            return True
        files = [self.sign_of(owner), *(trial.folder / ALIVE for trial in trials)]
        signs = [content(path) for path in files]
        before, since = self.seen.get((owner, training.id), (None, 0.0))
        now = time.monotonic()
        if signs != before:
            self.seen[owner, training.id] = signs, now
            return False
        return now - since > LOST_SECONDS + 3 * self.synced

    def is_here(self, owner: str) -> bool:
        """Whether this is a process of this machine."""
        return owner.partition("-")[0] == self.host

    def sign_of(self, owner: str) -> Path:
        return self.folder / f".{owner}.alive"

    def name_of(self, owner: str) -> str:
        """The machine of an owner, as far as it says so."""
        words = content(self.sign_of(owner)).decode(errors="replace").split()
        return words[0] if words else f"machine {owner}"

    @contextlib.contextmanager
    def beating(self, look: Callable[[], None]) -> Iterator[None]:
        """Leaves signs of life while something runs, and calls `look` after each."""
        ended = threading.Event()
        own = self.sign_of(self.owner)

        def beat() -> None:
            count = 0
            while not ended.wait(BEAT_SECONDS if count else 0):
                count += 1
                with contextlib.suppress(OSError):  # the disk may come back
                    own.write_text(f"{platform.node()} {count}\n")
                    look()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                own.unlink()


def number(line: dict) -> int:
    """Its place among all lines; 0 for those of before there were any."""
    n = line.get("n")
    return n if isinstance(n, int) else 0


def key(line: dict) -> tuple:
    """What no other line of a trial has."""
    return str(line.get("owner")), number(line), str(line.get("trial")), str(line.get("time"))


def job_number() -> int | None:
    """Of the Slurm job that this runs in."""
    told = os.environ.get("SLURM_JOB_ID", "")
    return int(told) if told.isdecimal() else None


def content(path: Path) -> bytes:
    """The start of a small file; empty where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(200)
    except OSError:
        return b""

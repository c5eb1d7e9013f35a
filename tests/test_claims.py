"""Several machines run one folder: each training by one of them, and by another once that is lost.

Failures that these tests would have caught: a machine that starts anew what another one runs, as
each wrote its claim where the other could not see it yet; a training that goes on without its
program, and a second one beside it; a machine that was cut off for a while and, back again, ended
what another had taken over; a finished run that was set aside, as its claimant was killed first.
"""

import fcntl
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import HANG, slowdown
from test_ablate import tables, toml
from test_slurm import ledger as told
from test_slurm import stand_in

import ablate
from ablation.ledger import BEAT_SECONDS, EARLIER, LOST_SECONDS, Claim, Ledger
from ablation.runner import TAKEN, Runner
from ablation.study import Matrix, matrix, read_study
from train_gpt import ALIVE, Refusal

SEEDS = (1, 2, 3)
KILLS = 20

# In place of train_gpt.py: until its program is gone or all kills are over, and some milliseconds;
# and a word where it runs twice at a time
TRIAL = """\
run="$LOGS_DIR/$RUN_ID"
mkdir -p "$run"
exec 9>> "{folder}/$RUN_ID.lock"
flock -n 9 || echo "$RUN_ID" >> {folder}/twice
while [ ! -e "{folder}/enough" ] && kill -0 $PPID 2> {folder}/null; do sleep 0.02; done
sleep 0.0$SEED
cp "{folder}/$RUN_ID.json" "$run/part"
mv "$run/part" "$run/result.json"
"""


@pytest.fixture
def made(tmp_path) -> Matrix:
    return study_of(tmp_path, SEEDS)


def study_of(tmp_path: Path, seeds: tuple[int, ...]) -> Matrix:
    """A study without data: two trainings, of which two trials share one, with these seeds."""
    found = tables(tmp_path, **{"": {"seeds": seeds}})
    del found["arm.stride_8"]
    (tmp_path / "tiny.toml").write_text(toml(found))
    return matrix(read_study(tmp_path / "tiny.toml"), "small", "steps", out=tmp_path / "runs")


def runs_by(monkeypatch, made: Matrix, script: str) -> Path:
    """Trials run this script, which finds the result of each in the folder returned."""
    folder = made.folder.with_name("tools")
    if not folder.exists():
        stand_in(folder, made.trials)
    text = script.replace("{folder}", str(folder))
    monkeypatch.setattr("ablation.runner.command", lambda size: ["sh", "-c", text])
    return folder


def ledger_of(monkeypatch, folder: Path, host: str, synced: float = 0.0) -> Ledger:
    """The ledger as a machine of this name has it."""
    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr("ablation.ledger.this_host", lambda: host)
        return Ledger(folder, synced)


@pytest.fixture
def clock(monkeypatch):
    """The clock of ablation.ledger: clock.now; clock.nap is called in place of sleep."""
    own = SimpleNamespace(now=0.0, nap=lambda seconds: None)

    def sleep(seconds: float) -> None:
        own.nap(seconds)

    ours = {"monotonic": lambda: own.now, "sleep": sleep}
    monkeypatch.setattr("ablation.ledger.time", SimpleNamespace(**vars(time) | ours))
    return own


# ── Killed at random ──────────────────────────────────────────────────────────────────────────────
def run_on(host: str, made: Matrix) -> None:
    """All that is missing, on a machine of this name, which is a process group."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import ablation.ledger

    ablation.ledger.this_host = lambda: host
    Runner(made).run(lambda line: None)


def test_two_machines_killed_at_random_20_times_run_each_trial_to_its_end_once(
    tmp_path, monkeypatch
):
    """The program alone, whose training goes on, or all that runs on the machine; and only what
    has a training in hand. Neither machine sees the locks of the other.
    """
    # a kill of a program leaves two trials that run to their end
    made = study_of(tmp_path, tuple(range(1, 2 * KILLS // 3 + 3)))
    tools = runs_by(monkeypatch, made, TRIAL)
    monkeypatch.setattr("ablation.runner.POLL_SECONDS", 0.01)
    monkeypatch.setattr("ablation.ledger.BEAT_SECONDS", 0.01)
    # far longer than what a busy machine keeps a thread waiting, and than what is left of a trial
    monkeypatch.setattr("ablation.ledger.LOST_SECONDS", 5 * slowdown())
    chance = random.Random(16)
    machines = {}
    gone = set()
    kills = 0
    try:
        while kills < KILLS:
            boot(machines, made)
            time.sleep(chance.uniform(0.0, 0.1))
            host = chance.choice("ab")
            at_work = owners(made, host) - gone
            if not at_work:
                continue
            kills += 1
            gone |= at_work
            if chance.random() < 0.5:
                os.kill(machines[host].pid, signal.SIGKILL)
            else:
                kill_group(machines[host].pid)
            machines[host].join()
        (tools / "enough").touch()
        boot(machines, made)
        for machine in machines.values():
            machine.join(HANG)
            assert machine.exitcode == 0
    finally:
        for machine in machines.values():
            machine.kill()

    Runner(made).run(lambda line: None)
    assert all((trial.folder / "result.json").exists() for trial in made.trials)
    assert not list(made.folder.glob("*.cut*/result.json"))
    assert not (tools / "twice").exists()
    ends = told(made.folder, "end")
    assert len(ends) == len(set(ends)) >= len(made.trials) - 2 * KILLS
    assert not Runner(made).todo and not Runner(made).failed


def boot(machines: dict, made: Matrix) -> None:
    """Starts the command again on each machine where it is not running."""
    forked = multiprocessing.get_context("fork")
    for host in "ab":
        if host not in machines or not machines[host].is_alive():
            assert host not in machines or machines[host].exitcode in (0, -signal.SIGKILL)
            machines[host] = forked.Process(target=run_on, args=(host, made))
            machines[host].start()


def owners(made: Matrix, host: str) -> set[str]:
    """Who of this machine has a training in hand, or had when it was killed."""
    ledger = Ledger(made.folder)
    held = {ledger.holder(group[0]) for group in made.groups()}
    return {owner for owner in held if owner.startswith(f"{host}-")}


def kill_group(number: int) -> None:
    """Kills a process and all that it has started, or itself where it is no group yet."""
    try:
        os.killpg(number, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(number, signal.SIGKILL)


# ── Claims ────────────────────────────────────────────────────────────────────────────────────────
def claimed(ledger: Ledger, made: Matrix) -> Claim | str:
    group = made.groups()[0]
    found = ledger.claim(group[0], group)
    if isinstance(found, Claim):
        # the locks of one machine are not seen by the other
        found.lock.close()
    return found


def test_a_machine_is_lost_when_neither_it_nor_its_training_shows_anything_new(
    made, monkeypatch, clock
):
    a, b = (ledger_of(monkeypatch, made.folder, host) for host in "ab")
    training = made.groups()[0][0]
    training.folder.mkdir()
    assert isinstance(claimed(a, made), Claim)
    steps = LOST_SECONDS / 2, LOST_SECONDS, LOST_SECONDS
    signs = [a.sign_of(a.owner), training.folder / ALIVE, a.sign_of(a.owner)]
    for count, (seconds, sign) in enumerate(zip(steps, signs, strict=True)):
        sign.write_text(f"there {count}")
        assert claimed(b, made) == "there"
        clock.now += seconds
        assert claimed(b, made) == "there"
    assert a.holder(training) == a.owner
    clock.now += 1
    assert isinstance(claimed(b, made), Claim)
    assert a.holder(training) == b.owner
    # what the lost one says of its claim is no word on the other's
    a.tell(training, "release")
    assert a.holder(training) == b.owner
    assert LOST_SECONDS > 60 + 3 * BEAT_SECONDS


def test_a_process_that_is_gone_from_this_machine_is_lost_at_once(made, monkeypatch):
    first, second = (ledger_of(monkeypatch, made.folder, "a") for _ in range(2))
    group = made.groups()[0]
    claim = first.claim(group[0], group)
    assert second.claim(group[0], group) == EARLIER
    claim.lock.close()
    # of several ranks the first may outlive what holds that lock
    group[1].folder.mkdir()
    with (group[1].folder / "train.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert second.claim(group[0], group) == EARLIER
    assert isinstance(second.claim(group[0], group), Claim)


def test_a_claim_that_is_given_up_or_freed_is_nobodys(made, monkeypatch):
    a, b = (ledger_of(monkeypatch, made.folder, host) for host in "ab")
    group = made.groups()[0]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for end in (a.give_up, lambda claim: b.free(group[0], 7)):
        claim = a.claim(group[0], group)
        b.free(group[0], 8)
        # who comes second holds nothing, and gives nothing up
        b.tell(group[0], "claim")
        assert b.holder(group[0]) == a.owner
        b.tell(group[0], "release")
        assert b.holder(group[0]) == a.owner
        end(claim)
        claim.lock.close()
        assert b.holder(group[0]) == ""
        again = b.claim(group[0], group)
        assert isinstance(again, Claim)
        b.give_up(again)


def test_a_trial_that_another_machine_has_ended_well_is_not_run_before_its_result_can_show(
    made, monkeypatch, clock
):
    a, b = (ledger_of(monkeypatch, made.folder, host) for host in "ab")
    group = made.groups()[0]
    claim = a.claim(group[0], group)
    a.write(group[1], "end", exit_code=0, reason="good")
    a.give_up(claim)
    assert claimed(b, made) == f"machine {a.owner}"
    clock.now += LOST_SECONDS + 1
    assert isinstance(claimed(b, made), Claim)


class Disks:
    """A folder per machine with copies of the ledgers of all, each as it was `late` seconds ago."""

    def __init__(self, clock, ledgers: dict[str, Ledger], late: float):
        self.clock = clock
        self.ledgers = ledgers
        self.late = late
        self.history = [(-math.inf, dict.fromkeys(ledgers, ""))]

    def record(self) -> None:
        now = {h: read(ledger.path) for h, ledger in self.ledgers.items()}
        self.history.append((self.clock.now, now))

    def show(self) -> None:
        old = [texts for moment, texts in self.history if moment <= self.clock.now - self.late]
        for host, other in itertools.permutations(self.ledgers, 2):
            copy = self.ledgers[host].folder / self.ledgers[other].path.name
            copy.write_text(old[-1][other])

    def play(self, acts: dict[str, tuple[float, Callable]]) -> dict:
        """Machine -> what its act gives. acts: machine -> (when it begins, what it does).

        One is at work at a time, and time passes while all sleep.
        """
        wakes = {host: begin for host, (begin, _) in acts.items()}
        turns = {host: threading.Semaphore(0) for host in acts}
        done = threading.Semaphore(0)
        found = {}

        def nap(seconds: float) -> None:
            host = threading.current_thread().name
            wakes[host] = self.clock.now + seconds
            done.release()
            turns[host].acquire()

        def work(host: str) -> None:
            turns[host].acquire()
            try:
                found[host] = acts[host][1]()
            finally:
                del wakes[host]
                done.release()

        self.clock.nap = nap
        for host in acts:
            threading.Thread(target=work, args=(host,), name=host, daemon=True).start()
        while wakes:
            host = min(wakes, key=wakes.get)
            self.clock.now = wakes[host]
            self.show()
            turns[host].release()
            assert done.acquire(timeout=HANG)
            self.record()
        self.clock.now += self.late
        self.show()
        return found


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("after", [0.0, 3.0, 4.9, 5.0, 6.0])
@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("behind", [0, 9])
def test_on_a_synced_disk_one_of_two_claims_holds_and_both_know_which(
    made, monkeypatch, clock, tmp_path, first, after, behind
):
    """behind: how many lines of the first one the second has not seen when it claims."""
    ledgers = {h: ledger_of(monkeypatch, tmp_path / f"disk-{h}", h, 5.0) for h in "ab"}
    disks = Disks(clock, ledgers, late=5.0)
    for _ in range(behind):
        ledgers[first].tell(made.groups()[1][0], "claim")
    disks.record()
    begins = {first: 0.0, "ab".replace(first, ""): after}
    acts = {h: (begin, partial(claimed, ledgers[h], made)) for h, begin in begins.items()}
    found = disks.play(acts)
    (winner,) = (host for host in "ab" if isinstance(found[host], Claim))
    training = made.groups()[0][0]
    assert [ledgers[host].holder(training) for host in "ab"] == [ledgers[winner].owner] * 2
    assert after < 5.0 or winner == first


# ── The runner ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("over", [False, True], ids=["that runs", "that has ended"])
def test_a_machine_that_was_cut_off_leaves_what_another_has_taken_over(made, monkeypatch, over):
    tools = runs_by(monkeypatch, made, "exec sleep 60")
    monkeypatch.setattr("ablation.ledger.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("ablation.runner.POLL_SECONDS", 0.01)
    other = ledger_of(monkeypatch, made.folder, "b")
    qat = next(trial for trial in made.trials if trial.id == "qat-s1")
    start = Runner.start
    lines = []
    processes = []

    def start_and_be_lost(runner, trial, *rest):
        process = start(runner, trial, *rest)
        other.tell(qat, "lost", owner=runner.ledger.owner)
        other.tell(qat, "claim")
        if over:
            other.tell(qat, "release")
        processes.append(process)
        return process

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting") or over:
            qat.folder.mkdir(exist_ok=True)
            shutil.copy(tools / "qat-s1.json", qat.folder / "result.json")

    monkeypatch.setattr(Runner, "start", start_and_be_lost)
    runner = Runner(made, only=("qat-s1",))
    runner.run(tell)
    assert [process.returncode for process in processes] == [-signal.SIGTERM]
    assert lines[0] == f"qat-s1: {TAKEN}"
    if not over:
        assert lines.pop(1).startswith("waiting, as 1 are run elsewhere: qat-s1 by machine b-")
    assert "qat-s1: val bpb" in lines[1]
    assert told(made.folder, "end") == [] and not runner.failed


def test_a_training_that_was_lost_before_a_trial_starts_is_left_alone(made, monkeypatch):
    tools = runs_by(monkeypatch, made, "touch {folder}/begun")
    monkeypatch.setattr("ablation.runner.POLL_SECONDS", 0.01)
    other = ledger_of(monkeypatch, made.folder, "b")
    qat = next(trial for trial in made.trials if trial.id == "qat-s1")
    lines = []

    def lose() -> None:
        other.tell(qat, "lost", owner=runner.ledger.owner)
        other.tell(qat, "claim")
        qat.folder.mkdir()
        (tools / "qat-s1.json").rename(qat.folder / "result.json")

    runner = Runner(made, only=("qat-s1",), before=lose)
    runner.run(lines.append)
    assert lines[0] == f"qat-s1: {TAKEN}" and "qat-s1: val bpb" in lines[1]
    assert not (tools / "begun").exists() and not list(made.folder.glob("*.cut*"))


def test_who_comes_to_a_synced_folder_first_waits_for_its_copy(made, monkeypatch, capsys):
    seen = []

    def look(*_):
        seen.append("lines")
        raise Refusal("enough")

    monkeypatch.setattr("ablate.Runner", look)
    monkeypatch.setattr("ablate.time", SimpleNamespace(sleep=seen.append))
    call = ["run", str(made.study.path), "--synced", "5"]
    assert ablate.main(call) == 2
    assert seen == [5.0, "lines"] and "waiting 5 s" in capsys.readouterr().out
    assert ablate.main([*call, "--dry-run"]) == 2
    assert seen[2:] == ["lines"]


def test_a_stop_cuts_the_wait_after_a_claim_short(made, monkeypatch):
    runs_by(monkeypatch, made, "exit 1")
    runner = Runner(made, only=("qat-s1",), synced=HANG)
    asleep = {"sleep": lambda seconds: pytest.fail(f"sleeps {seconds} s")}
    monkeypatch.setattr("ablation.ledger.time", SimpleNamespace(**vars(time) | asleep))
    threading.Timer(0.1, runner.stopped.set).start()
    with pytest.raises(Refusal, match="qat-s1: interrupted"):
        runner.run(lambda line: None)
    assert runner.ledger.holder(runner.todo[0]) == "" and not runner.failed


def test_a_failure_that_a_copy_brings_late_is_one(made, monkeypatch):
    """Although it has a smaller number than lines that were there before."""
    runs_by(monkeypatch, made, "exit 1")
    a, b = (ledger_of(monkeypatch, made.folder, host, 1.0) for host in "ab")
    qat = next(trial for trial in made.trials if trial.id == "qat-s1")
    for _ in range(3):
        a.write(qat, "start")
    runner = Runner(made)
    monkeypatch.setattr(b, "latest", lambda: 0)
    b.write(made.trials[0], "end", exit_code=5, reason="not finite")
    runner.take_up(lambda line: None)
    assert runner.failed == {made.trials[0].id: "FAILED (exit 5): not finite"}


def test_what_a_worker_has_in_hand_is_its_own_to_report(made, monkeypatch):
    tools = runs_by(monkeypatch, made, "exit 1")
    runner = Runner(made)
    group = made.groups()[0]
    group[0].folder.mkdir(parents=True)
    shutil.copy(tools / f"{group[0].id}.json", group[0].folder / "result.json")
    lines = []
    runner.in_hand[group[0].id] = Claim(group[0], group, None)
    runner.take_up(lines.append)
    assert lines == [] and not runner.results
    del runner.in_hand[group[0].id]
    runner.take_up(lines.append)
    assert len(lines) == 1 and runner.results.keys() == {group[0].id}


def test_what_another_machine_ends_just_before_it_is_claimed_is_not_run_again(made, monkeypatch):
    tools = runs_by(monkeypatch, made, "exit 1")
    (qat,) = (trial for trial in made.trials if trial.id == "qat-s1")
    claim = Ledger.claim

    def claim_late(ledger: Ledger, training, trials) -> Claim | str:
        qat.folder.mkdir()
        shutil.copy(tools / "qat-s1.json", qat.folder / "result.json")
        return claim(ledger, training, trials)

    monkeypatch.setattr(Ledger, "claim", claim_late)
    runner = Runner(made, only=("qat-s1",))
    runner.run(lambda line: None)
    assert runner.results.keys() == {"qat-s1"} and not runner.failed
    assert told(made.folder, "start") == [] and runner.ledger.holder(qat) == ""


def test_what_another_machine_has_tried_again_is_not_tried_once_more(made, monkeypatch):
    tools = runs_by(monkeypatch, made, 'echo "$RUN_ID" >> {folder}/begun; exit 1')
    only = ("qat-s1", "plain-s1")
    Runner(made, only=only).run(lambda line: None)
    a, b = (Runner(made, retry=True, only=only) for _ in range(2))
    lines = []
    for runner in (a, b):
        runner.run(lines.append)
        assert runner.failed.keys() == {*only}
    assert len((tools / "begun").read_text().split()) == 4
    assert len(lines) == 4 and all("FAILED (exit 1)" in line for line in lines)


def test_a_claim_ends_with_its_trials_however_they_end(made, monkeypatch):
    runs_by(monkeypatch, made, "exit 1")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Refusal, match="goes on where this one stopped"):
        Runner(made).run(interrupt)
    Runner(made, only=("qat-s3",)).run(lambda line: None)
    lines = map(json.loads, (made.folder / "ledger.jsonl").read_text().splitlines())
    held = [line["training"] for line in lines if line["event"] == "claim"]
    assert len(held) >= 2
    assert not any(Ledger(made.folder).holder(group[0]) for group in made.groups())
    assert not list(made.folder.glob(".*.alive"))

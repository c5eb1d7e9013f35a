"""Several machines run one folder: each training by one of them, and by another once that is lost.

Failures that these tests would have caught: a machine that starts anew what another one runs, as
each wrote its claim where the other could not see it yet; a training that goes on without its
program, and a second one beside it; a machine that was cut off for a while and, back again, ended
what another had taken over; a finished run that was set aside, as its claimant was killed first.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_ablate import tables, toml
from test_slurm import ledger as told
from test_slurm import stand_in

from ablation.ledger import BEAT_SECONDS, LOST_SECONDS, Claim, Ledger
from ablation.runner import TAKEN, Runner
from ablation.study import Matrix, matrix, read_study
from train_gpt import ALIVE, Refusal

SEEDS = (1, 2, 3)
ROUNDS = 20

# In place of train_gpt.py: some milliseconds, and a word where it runs twice at a time
TRIAL = """\
run="$LOGS_DIR/$RUN_ID"
mkdir -p "$run"
exec 9>> "{folder}/$RUN_ID.lock"
flock -n 9 || echo "$RUN_ID" >> {folder}/twice
sleep 0.0$SEED
cp "{folder}/$RUN_ID.json" "$run/part"
mv "$run/part" "$run/result.json"
"""


@pytest.fixture
def made(tmp_path) -> Matrix:
    """A study without data: two trainings, of which two trials share one, with three seeds."""
    found = tables(tmp_path, **{"": {"seeds": SEEDS}})
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


def test_two_machines_killed_at_random_20_times_run_each_trial_to_its_end_once(made, monkeypatch):
    """The program alone, whose trainings go on, or all that runs on the machine."""
    tools = runs_by(monkeypatch, made, TRIAL)
    monkeypatch.setattr("ablation.runner.POLL_SECONDS", 0.01)
    monkeypatch.setattr("ablation.ledger.BEAT_SECONDS", 0.01)
    # a machine is lost at once here, where locks tell that a training still runs
    monkeypatch.setattr("ablation.ledger.LOST_SECONDS", 0.0)
    forked = multiprocessing.get_context("fork")
    chance = random.Random(16)
    machines = {}
    for _ in range(ROUNDS):
        for host in ("a", "b"):
            if host not in machines or not machines[host].is_alive():
                machines[host] = forked.Process(target=run_on, args=(host, made))
                machines[host].start()
        time.sleep(chance.uniform(0.0, 0.1))
        victim = machines[chance.choice("ab")].pid
        if chance.random() < 0.5:
            os.kill(victim, signal.SIGKILL)
        else:
            kill_group(victim)
    for machine in machines.values():
        machine.kill()
        machine.join()

    Runner(made).run(lambda line: None)
    assert all((trial.folder / "result.json").exists() for trial in made.trials)
    assert not list(made.folder.glob("*.cut*/result.json"))
    assert not (tools / "twice").exists()
    ends = told(made.folder, "end")
    assert len(ends) == len(set(ends))
    assert not Runner(made).todo and not Runner(made).failed


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
    assert second.claim(group[0], group) == "a process of an earlier start"
    claim.lock.close()
    assert isinstance(second.claim(group[0], group), Claim)


def test_a_claim_that_is_given_up_or_freed_is_nobodys(made, monkeypatch):
    a, b = (ledger_of(monkeypatch, made.folder, host) for host in "ab")
    group = made.groups()[0]
    for end in (a.give_up, lambda claim: b.free(group[0])):
        claim = a.claim(group[0], group)
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


@pytest.mark.parametrize("later", ["a", "b"])
def test_of_two_claims_on_a_synced_disk_the_same_is_first_for_both(
    made, monkeypatch, clock, tmp_path, later
):
    """Each has its own copy of the folder; both claim before either sees the other's."""
    folders = {host: tmp_path / f"disk-{host}" for host in "ab"}
    ledgers = {host: ledger_of(monkeypatch, folders[host], host, 5.0) for host in "ab"}
    found = {}
    naps = []

    def sync(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            found[later] = claimed(ledgers[later], made)
        for one, other in itertools.permutations("ab"):
            own = folders[one] / ledgers[one].path.name
            shutil.copy(own, folders[other])

    clock.nap = sync
    first = "ab".replace(later, "")
    found[first] = claimed(ledgers[first], made)
    assert naps == [5.0, 5.0]
    winners = [host for host in "ab" if isinstance(found[host], Claim)]
    training = made.groups()[0][0]
    assert [ledgers[host].holder(training) for host in "ab"] == [ledgers[winners[0]].owner] * 2
    assert len(winners) == 1


# ── The runner ────────────────────────────────────────────────────────────────────────────────────
def test_a_machine_that_was_cut_off_leaves_what_another_has_taken_over(made, monkeypatch):
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
        processes.append(process)
        return process

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting"):
            qat.folder.mkdir()
            shutil.copy(tools / "qat-s1.json", qat.folder / "result.json")

    monkeypatch.setattr(Runner, "start", start_and_be_lost)
    runner = Runner(made, only=("qat-s1",))
    runner.run(tell)
    assert [process.returncode for process in processes] == [-signal.SIGTERM]
    assert lines[0] == f"qat-s1: {TAKEN}"
    assert lines[1].startswith("waiting, as 1 are run elsewhere: qat-s1 by machine b-")
    assert "qat-s1: val bpb" in lines[2]
    assert told(made.folder, "end") == [] and not runner.failed


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

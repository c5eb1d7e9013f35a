"""A study as Slurm jobs: what a job asks for, what is said of its end, and that nothing is lost,
submitted or run twice.

Failures that these tests would have caught: GPUs asked of a cluster that has none, a refused job
that shows as a traceback of 100 lines and ends the others, states that only an accounting daemon
knows (all three of our own first launcher, on Debian's slurm-wlm).
"""

import contextlib
import fcntl
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from private_slurm import MISSING, private_slurm
from test_ablate import tables, toml

import ablate
import train_gpt
from ablation import slurm
from ablation.ledger import Ledger
from ablation.runner import Runner, watch
from ablation.slurm import Job, Jobs, Refused, has_gpus, number_of, resources, sbatch_options
from ablation.study import Size, Trial, matrix, read_study
from train_gpt import COMPARED, Refusal

TRIALS = ["plain-s1", "five_bits-s1", "qat-s1"]


@pytest.fixture
def path(tmp_path) -> Path:
    """The file of a study of two trainings, one of which two trials share. It has no data."""
    changes = {"": {"seeds": [1]}, "size__small": {"jobs": 1}}
    found = tables(tmp_path, **changes)
    del found["arm.stride_8"]
    path = tmp_path / "tiny.toml"
    path.write_text(toml(found))
    return path


# ── What a job asks for ───────────────────────────────────────────────────────────────────────────
def test_options_go_to_sbatch_as_they_are_and_two_have_short_names():
    given = ["partition=a,b", "cpus=3", "memory=2G", "qos=x", "exclusive", "comment=a=b c"]
    assert list(sbatch_options(given).values()) == [
        "--partition=a,b",
        "--cpus-per-task=3",
        "--mem=2G",
        "--qos=x",
        "--exclusive",
        "--comment=a=b c",
    ]


@pytest.mark.parametrize(
    "entry",
    ["chdir=/", "chd=/", "job=x", "-p x", "=x", "Time=1", "nodes=2", "test-only", "wait"],
)
def test_an_option_that_makes_a_job_one_of_a_study_is_refused(entry):
    with pytest.raises(Refusal, match=f"--slurm {entry}: "):
        sbatch_options([entry])


def test_the_beginning_of_a_name_hides_nothing_from_us():
    words = sbatch_options(["part=gpus", "depend=singleton", "wait-all-nodes=1"])
    assert words["partition"] == "--partition=gpus"
    assert words["dependency"] == "--dependency=singleton"
    assert words["wait-all-nodes"] == "--wait-all-nodes=1"


@pytest.mark.parametrize(
    "told, number",
    [("7\n", 7), ("7;cluster\n", 7), ("5 hours are left\n\n7\n", 7), ("3\n7;cluster\n", 7)],
)
def test_the_number_of_a_job_is_found_below_what_a_site_says(told, number):
    assert number_of(told) == number


@pytest.mark.parametrize(
    "told, words", [("", "nothing"), ("no job\nof yours\n", "no job of yours")]
)
def test_what_has_no_number_of_a_job_is_quoted(told, words):
    with pytest.raises(Refusal, match=f"^sbatch gives no number of a job, but: {words}; "):
        number_of(told)


@pytest.mark.parametrize(
    "partitions, told, expected",
    [
        ("", "cores* (null)\ncards gpu:8\n", False),
        ("cards", "cards gpu:a100:4(S:0-1)\n", True),
        ("cores,mixed", "cores* (null)\nmixed nvme:1,gpu:2\n", True),
        ("", "cards gpu:8\n", True),
        ("cores", "cores* not_a_gpu:1\n", False),
        ("nowhere", "", False),
    ],
)
def test_nodes_have_gpus_where_sinfo_says_so(monkeypatch, partitions, told, expected):
    asked = []
    monkeypatch.setattr(slurm, "ask", lambda *words: asked.append(words) or told)
    assert has_gpus(partitions) == expected
    assert (f"--partition={partitions}" in asked[0]) == bool(partitions)


@pytest.mark.parametrize(
    "gpus, given, expected",
    [
        (True, [], "--nodes=1 --ntasks=1 --cpus-per-task=6 --gres=gpu:2"),
        (False, [], "--nodes=1 --ntasks=1 --cpus-per-task=6"),
        (True, ["gpus-per-node=0"], "--nodes=1 --ntasks=1 --cpus-per-task=6"),
        (True, ["gres=gpu:4", "cpus=9"], "--nodes=1 --ntasks=1"),
    ],
)
def test_a_job_has_a_core_for_each_thread_and_a_gpu_for_each_rank(
    monkeypatch, gpus, given, expected
):
    monkeypatch.setattr(slurm, "has_gpus", lambda partitions: gpus)
    size = Size("small", 1, 1.0, ranks=2, threads=3)
    assert " ".join(resources(size, sbatch_options(given)).values()) == expected


def test_a_job_whose_threads_are_those_of_the_machine_has_the_node_for_itself(monkeypatch):
    monkeypatch.setattr(slurm, "has_gpus", lambda partitions: False)
    assert "--exclusive" in resources(Size("small", 1, 1.0, threads=0), {}).values()


def test_the_partition_is_the_one_given_or_that_of_the_environment(monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "has_gpus", asked.append)
    monkeypatch.setenv("SBATCH_PARTITION", "a")
    for given in ([], ["partition=b"]):
        resources(Size("small", 1, 1.0), sbatch_options(given))
    assert asked == ["a", "b"]


def test_without_slurm_one_line_says_so(monkeypatch, path, tmp_path, capsys):
    monkeypatch.setenv("PATH", "")
    call = ["run", str(path), "--out", str(tmp_path / "runs"), "--launcher", "slurm"]
    assert ablate.main(call) == 2
    assert capsys.readouterr().err == (
        "ablate.py: error: --launcher slurm: sinfo is not installed here; "
        "give the command where Slurm's commands are\n"
    )


# ── What is said of a job, by what squeue says of it ──────────────────────────────────────────────
@pytest.fixture
def jobs(path, tmp_path, monkeypatch):
    """Jobs with job 7 at work on the training that two trials share. jobs.queue: what squeue
    says; jobs.lines: what was said; jobs.results: trial -> result of those that have ended.
    """
    runner = Runner(matrix(read_study(path), "small", "steps", out=tmp_path / "runs"))
    (tmp_path / "runs/jobs").mkdir(parents=True)
    made = Jobs(runner, ["gres=none"])
    made.queue = {7: Job(7, "RUNNING")}
    made.lines = []
    made.results = {}
    made.say = made.lines.append
    made.watch(Job(7, "PENDING"), runner.todo[:2])
    monkeypatch.setattr(slurm, "queue", lambda folder: made.queue)
    monkeypatch.setattr(Runner, "finished", lambda self, trial: made.results.get(trial.id))
    return made


GOOD = {"val_bpb": 1.5, "seconds": {"train": 1.0}}


def test_results_are_taken_up_while_a_job_runs_and_those_that_show_late_are_waited_for(jobs):
    jobs.poll()
    jobs.results["plain-s1"] = GOOD
    jobs.poll()
    assert jobs.lines[0] == "plain-s1: job 7 running"
    assert "[1/3] plain-s1: val bpb 1.50000" in jobs.lines[1]
    assert [trial.id for trial in jobs.at_work[7]] == ["five_bits-s1"]

    jobs.queue = {7: Job(7, "COMPLETED")}
    jobs.poll()
    assert 7 in jobs.at_work
    jobs.results["five_bits-s1"] = GOOD
    jobs.poll()
    assert not jobs.at_work
    assert "[2/3] five_bits-s1: val bpb 1.50000" in jobs.lines[2]
    assert len(jobs.lines) == 3


@pytest.mark.parametrize("state", ["GONE", "FAILED"])
def test_a_job_that_ends_without_a_result_is_quoted(jobs, monkeypatch, state):
    monkeypatch.setattr(slurm, "LATE_SECONDS", 0.0)
    (jobs.runner.matrix.folder / "jobs/7.out").write_text("x\nno such interpreter\n")
    jobs.queue = {7: Job(7, state)} if state != "GONE" else {}
    jobs.poll()
    assert jobs.lines[-1] == (
        "plain-s1, five_bits-s1: job 7: no such interpreter; the same command runs it again"
    )
    assert not jobs.at_work


@pytest.mark.parametrize(
    "state, told",
    [
        ("OUT_OF_MEMORY", "out of memory; give more with --slurm memory=..."),
        ("TIMEOUT", "over its time limit; give more with --slurm time=..."),
        ("NODE_FAIL", "its node went down"),
        ("PREEMPTED", "a job that goes before took its place"),
    ],
)
def test_a_job_that_was_killed_fails_no_trial(jobs, state, told):
    """Although its own runner may have taken the end of the process for one of the trial."""
    runner = jobs.runner
    runner.ledger.write(runner.todo[0], "end", exit_code=-9, reason="no output")
    Ledger(runner.matrix.folder).tell(runner.todo[0], "claim", job=7)
    jobs.poll()
    assert runner.ledger.holder(runner.todo[0])
    assert not runner.failed
    jobs.watch(Job(8, "RUNNING"), runner.todo[2:])
    jobs.queue = {7: Job(7, state), 8: Job(8, "RUNNING")}
    jobs.poll()
    assert jobs.lines[1:] == [
        f"plain-s1, five_bits-s1: job 7: {told}; the same command runs it again"
    ]
    assert list(jobs.at_work) == [8]
    # another node need not wait for signs of life
    assert not runner.ledger.holder(runner.todo[0])
    assert not runner.failed
    assert not Runner(runner.matrix).failed


def test_a_trial_that_failed_in_its_job_is_failed_once_the_job_has_ended(jobs):
    runner = jobs.runner
    jobs.results["five_bits-s1"] = GOOD
    runner.ledger.write(runner.todo[0], "end", exit_code=5, reason="not finite")
    jobs.queue = {7: Job(7, "FAILED")}
    jobs.poll()
    assert runner.failed == {"plain-s1": "FAILED (exit 5): not finite"}
    assert not jobs.at_work


def test_a_result_of_other_code_fails_its_trial_and_the_others_are_watched(jobs, monkeypatch):
    def finished(self, trial):
        raise Refusal(f"{trial.id}: other code")

    monkeypatch.setattr(Runner, "finished", finished)
    jobs.poll()
    assert jobs.runner.failed["plain-s1"] == "plain-s1: other code"


def test_while_the_controller_does_not_answer_one_line_says_so(jobs, monkeypatch):
    def silence(folder):
        raise Refused("squeue: Unable to contact slurm controller", 1)

    with monkeypatch.context() as patch:
        patch.setattr(slurm, "queue", silence)
        jobs.poll()
        jobs.poll()
    assert jobs.lines == [
        "squeue: Unable to contact slurm controller; the jobs go on, and this asks again"
    ]
    jobs.poll()
    assert jobs.lines[1:] == ["plain-s1: job 7 running"]


def test_the_table_and_the_line_show_the_step_of_what_runs(jobs):
    jobs.poll()
    folder = jobs.at_work[7][0].folder
    folder.mkdir()
    event = {"event": "step", "step": 3, "loss": 3.14159, "t": 6.0}
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert jobs.summary().startswith("1 running, 0 waiting; plain-s1 at step 3, loss 3.1415; ")
    columns = watch(jobs.runner, jobs.states()).columns
    shown = [next(iter(column.cells)) for column in columns]
    assert shown == ["plain-s1", "job 7 running", "3", "3.1415", "2 s"]


def test_the_first_look_says_why_jobs_wait(jobs, monkeypatch):
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "SILENT_SECONDS", 1e9)
    reasons = ["Node is DOWN, DRAINED", "Priority", "Priority", "None"]
    waiting = {number: Job(number, "PENDING", why) for number, why in enumerate(reasons, 7)}
    for job in waiting.values():
        jobs.watch(job, jobs.runner.todo)
    looks = iter([waiting])
    monkeypatch.setattr(slurm, "queue", lambda folder: next(looks))

    def end(line):
        jobs.lines.append(line)
        jobs.at_work.clear()

    jobs.say = end
    jobs.follow()
    assert len(jobs.lines) == 1
    assert jobs.lines[0].startswith("0 running, 4 waiting (Node is DOWN, DRAINED; Priority); ")


def test_where_no_terminal_shows_the_table_a_line_does(jobs, monkeypatch):
    monkeypatch.setattr(slurm, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    asked = []

    def finished(self, trial):
        asked.append(trial)
        return GOOD if len(asked) > 8 else None

    monkeypatch.setattr(Runner, "finished", finished)
    jobs.follow()
    assert jobs.lines[1].startswith("1 running, 0 waiting")


# ── What is submitted ─────────────────────────────────────────────────────────────────────────────
def refuses_the_lock(jobs: Jobs) -> None:
    """Fails where another command could begin to submit."""
    lock = (jobs.runner.matrix.folder / "jobs/.lock").open()
    with lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def submitting(jobs, monkeypatch):
    """jobs that submit to a stand-in for sbatch, which puts them into jobs.queue.

    jobs.called: the words of each call.
    """

    def ask(*words):
        refuses_the_lock(jobs)
        number = len(jobs.called) + 20
        jobs.called.append(words)
        name = next(word for word in words if word.startswith("--job-name=")).partition("=")[2]
        jobs.queue[number] = Job(number, "PENDING", "Priority", name)
        return f"{number}\n"

    jobs.called = []
    jobs.queue = {}
    jobs.at_work = {}
    monkeypatch.setattr(slurm, "ask", ask)
    return jobs


def only(words: tuple[str, ...]) -> list[str]:
    """The trials that a job runs, and what it waits for."""
    return re.findall(r"--only=([^ ]*)|--dependency=(.*)", "\n".join(words))


def test_a_queued_job_is_watched_for_what_it_runs_and_the_rest_runs_after_it(submitting):
    """Else its runner and another one would write, and remove, the same checkpoint at once."""
    plain, five, qat = submitting.runner.todo
    submitting.runner.todo = [plain]
    submitting.submit([])
    submitting.at_work = {}
    submitting.runner.todo = [plain, five, qat]
    submitting.options["dependency"] = "--dependency=singleton"
    submitting.submit([])
    assert submitting.at_work == {20: [plain], 21: [five], 22: [qat]}
    assert [only(words) for words in submitting.called] == [
        [("plain-s1", "")],
        [("", "singleton,afterany:20"), ("five_bits-s1", "")],
        [("", "singleton"), ("qat-s1", "")],
    ]
    assert submitting.lines[1] == ("plain-s1: job 20 (Priority) pending; it was submitted before")

    submitting.at_work = {}
    submitting.submit([])
    assert submitting.at_work == {20: [plain], 21: [five], 22: [qat]}
    assert len(submitting.called) == 3


def test_nobody_submits_between_a_look_at_the_queue_and_what_follows_from_it(
    submitting, monkeypatch
):
    """The stand-in for sbatch sees the lock, too."""

    def locked(folder):
        refuses_the_lock(submitting)
        return {}

    monkeypatch.setattr(slurm, "queue", locked)
    submitting.submit([])
    assert len(submitting.called) == 2


# ── In a job ──────────────────────────────────────────────────────────────────────────────────────
TORCHRUN_TOLD = "echo '  exitcode  : -9 (pid: 7)'; echo ======; exit 1"


@pytest.mark.parametrize(
    "script, job, failed",
    [
        ("kill -9 $$", True, False),
        (TORCHRUN_TOLD, True, False),
        ("echo 'error: x [exit 5: y]'; " + TORCHRUN_TOLD, True, True),
        ("exit 1", True, True),
        ("kill -9 $$", False, True),
    ],
)
def test_what_is_killed_in_a_job_runs_again(jobs, monkeypatch, script, job, failed):
    """Nobody may watch when Slurm kills a process for its memory."""
    monkeypatch.setattr("ablation.runner.command", lambda size: ["sh", "-c", script])
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    runner = jobs.runner
    told = contextlib.nullcontext()
    if not failed:
        told = pytest.raises(Refusal, match=r"^plain-s1: killed from outside; .*memory=")
    with told:
        runner.todo = runner.todo[:1]
        runner.run(lambda line: None)
    assert list(Runner(runner.matrix).failed) == ["plain-s1"] * failed


# ── A real one ────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def cluster():
    """A private Slurm; see private_slurm.py."""
    if MISSING:
        pytest.skip(f"needs Slurm and munge (apt install slurm-wlm): no {', '.join(MISSING)}")
    with private_slurm() as ours:
        yield ours


# In place of `python train_gpt.py`, with the environment of a trial: five_bits-s1 takes long
TRIAL = """\
#!/bin/sh
run="$LOGS_DIR/$RUN_ID"
mkdir -p "$run"
echo weights > "${{CHECKPOINT:-$run/checkpoint.bin}}"
while [ "$RUN_ID" = five_bits-s1 ] && [ -e {folder}/busy ]; do sleep 0.1; done
cp "{folder}/$RUN_ID.json" "$run/result.json"
"""


def stand_in(folder: Path, trials: list[Trial]) -> None:
    """In this folder TRIAL, the result of each trial, and what makes `ablate.py` start TRIAL where
    the folder is in PYTHONPATH.
    """
    folder.mkdir()
    program = folder / "trial"
    program.write_text(TRIAL.format(folder=folder))
    program.chmod(0o755)
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(program)!r}\n")
    result = json.loads((ROOT / "logs/demo/result.json").read_text())
    for trial in trials:
        own = {"data_path": trial.cfg.data_path, "seed": trial.seed}
        result |= {
            "code_sha256": train_gpt.CODE_SHA256,
            "config": result["config"] | trial.cfg.knobs(*COMPARED) | own,
            "config_sha256": trial.cfg.digest(),
            "world_size": 1,
            "seed": trial.seed,
        }
        (folder / f"{trial.id}.json").write_text(json.dumps(result))


@pytest.fixture
def by_slurm(cluster, path, tmp_path, monkeypatch, capsys):
    """by_slurm(*options, nap=...) -> (exit code, lines) of `ablate.py run --launcher slurm`, with N
    for each number of a job. In a job TRIAL takes the place of train_gpt.py.

    nap: called in place of each wait between two looks at the queue.
    """
    tools = tmp_path / "tools"
    stand_in(tools, matrix(read_study(path), "small", "steps", out=tmp_path / "runs").trials)
    monkeypatch.setenv("PYTHONPATH", str(tools))
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.env["PATH"])

    def run(*options, nap=lambda: None):
        def sleep(seconds):
            nap()
            time.sleep(0.1)

        quick = SimpleNamespace(**vars(time) | {"sleep": sleep})
        monkeypatch.setattr("ablation.slurm.time", quick)
        call = ["run", str(path), "--out", str(tmp_path / "runs"), "--launcher", "slurm"]
        code = ablate.main([*call, *options])
        told = capsys.readouterr()
        return code, re.sub(r"job \d+", "job N", told.out + told.err).splitlines()

    return run


def ledger(folder: Path, event: str) -> list[str]:
    """The trials of which the ledger has such a line."""
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return sorted(line["trial"] for line in lines if line["event"] == event)


def test_a_study_with_a_killed_job_goes_on_to_its_end(cluster, by_slurm, tmp_path):
    """The job is killed while it runs the second of the two trials that share a training. The other
    training has run before.
    """
    runs = tmp_path / "runs"
    tools = tmp_path / "tools"
    (tools / "busy").touch()
    results = {name: runs / name / "result.json" for name in TRIALS}
    results["qat-s1"].parent.mkdir(parents=True)
    shutil.copy(tools / "qat-s1.json", results["qat-s1"])

    def kill():
        if (runs / "five_bits-s1").exists():
            cluster.call("scancel", "--name=plain-s1")

    code, lines = by_slurm(nap=kill)
    assert code == 1, lines
    assert [line for line in lines if "again" in line] == [
        "five_bits-s1: job N: cancelled; the same command runs it again"
    ]
    assert "plain-s1: job N running" in lines
    assert [name for name in TRIALS if results[name].exists()] == ["plain-s1", "qat-s1"]

    (tools / "busy").unlink()
    code, lines = by_slurm()
    assert code == 0, lines
    assert lines[0] == "five_bits-s1: job N (submitted now) pending"
    assert [name for name in TRIALS if any(f"{name}: val bpb" in line for line in lines)] == [
        "five_bits-s1"
    ]
    assert all(at.exists() for at in results.values())
    assert ledger(runs, "start") == ["five_bits-s1", "five_bits-s1", "plain-s1"]
    assert ledger(runs, "queue") == ["five_bits-s1", "five_bits-s1", "plain-s1"]
    assert (runs / "five_bits-s1.cut1").is_dir()
    assert not (runs / "plain-s1/checkpoint.bin").exists()
    assert (runs / "report.html").exists()


def test_a_refused_job_is_one_line_and_the_others_go_on(by_slurm):
    code, lines = by_slurm("--slurm", "partition=nowhere")
    assert code == 1
    why = (
        "refused by sbatch: invalid partition specified: nowhere; "
        "Batch job submission failed: Invalid partition name specified"
    )
    assert [line for line in lines if "wrote" not in line] == [
        f"plain-s1: {why}",
        f"qat-s1: {why}",
    ]
    code, lines = by_slurm("--slurm", "colour=red")
    assert (code, lines) == (2, ["ablate.py: error: sbatch: unrecognized option '--colour=red'"])


def test_queued_jobs_stay_when_the_command_is_interrupted_and_are_not_submitted_twice(
    cluster, by_slurm, tmp_path
):
    """In a partition whose node has GPUs and is down; nor by another name of the folder."""

    def queued() -> list[str]:
        return cluster.call("squeue", "--noheader", "--format=%i", "--partition=gpus").split()

    def interrupt():
        raise KeyboardInterrupt

    def cancel():
        cluster.call("scancel", "--partition=gpus")

    options = ("--slurm", "partition=gpus", "--slurm", "memory=10M", "--slurm", "time=7")
    code, lines = by_slurm(*options, nap=interrupt)
    numbers = queued()
    assert code == 130
    assert len(numbers) == 2
    assert lines[-1] == (
        "ablate.py: error: interrupted; jobs go on without this: the same command watches them "
        f"again, scancel {' '.join(sorted(numbers))} ends them"
    )
    asked = cluster.call("scontrol", "show", "job", numbers[0])
    for fact in ("TresPerNode=gres:gpu:1", "NumCPUs=1 ", "MinMemoryNode=10M", "TimeLimit=00:07:00"):
        assert fact in asked

    other = tmp_path / "other"
    other.symlink_to(tmp_path / "runs")
    code, lines = by_slurm(*options, "--out", str(other), nap=interrupt)
    assert code == 130
    assert queued() == numbers
    assert sum("it was submitted before" in line for line in lines) == 2
    code, lines = by_slurm(*options, nap=cancel)
    assert code == 1
    assert sum("cancelled; the same command runs it again" in line for line in lines) == 2

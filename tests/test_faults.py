"""What happens when...: every fault of README's table, injected, with its line,
its exit code and what is kept.

Would have caught: pods that take the run with them (#1728, #637, #204), evaluation that crashes
after training (autoresearch#7), ranks that hang for ever (#975), a disk that is full at the last
write, data that change under a run.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HANG, ROOT, TINY, read_shard, until, write_shard
from launch import codes, finish, launch
from test_pipeline import events, folder
from test_resume import BASE, MODES, assert_same_run, go_on
from torch.distributed import PrefixStore

import train_gpt
from train_gpt import CHECKPOINTS, Config, read_container

# which rows a step has must be known to spoil one of them
EVERYTHING = BASE | MODES["late QAT, SQWA of EMA"] | dict(strict=False, loader="rows")
KILLS = 40
NEVER = 1e5  # seconds: a DIST_TIMEOUT that ends nothing


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Config:
    """An uninterrupted run of EVERYTHING."""
    paths = dict(
        data_path=str(data),
        tokenizer_path=str(data / "tokenizer.model"),
        logs_dir=str(tmp_path_factory.mktemp("reference") / "logs"),
    )
    cfg = Config(**TINY | paths | EVERYTHING | dict(run_id="reference"))
    assert codes(finish(cfg)) == [0]
    return cfg


@pytest.fixture
def broken(reference, tmp_path) -> Config:
    """The same settings, in a folder of its own."""
    return dataclasses.replace(reference, logs_dir=str(tmp_path / "logs"), run_id="broken")


def own_data(cfg: Config, tmp_path: Path) -> Config:
    """With a copy of the data that a test may spoil."""
    shutil.copytree(cfg.data_path, tmp_path / "data")
    return dataclasses.replace(
        cfg, data_path=str(tmp_path / "data"), tokenizer_path=str(tmp_path / "data/tokenizer.model")
    )


# ── processes that die ────────────────────────────────────────────────────────────────────────────
def all_whole(path: Path) -> set[str]:
    """The .bin files of a run's folder; each must load."""
    names = {p.name for p in path.glob("*.bin")} if path.exists() else set()
    for name in names:
        read_container(path / name)
    return names


@dataclass
class DiesAt:
    """In a child: kill -9 at this event of the run, or a few milliseconds later;
    counts the events into a file.

    Events are what a stopped run can be torn at:
    files of its folder opened and renamed, phases, steps.
    """

    event: float
    later: float
    count: Path
    seen: int = 0

    def happened(self):
        self.seen += 1
        self.count.write_text(str(self.seen))
        if self.seen == self.event:
            threading.Timer(self.later, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def __call__(self):
        phase = train_gpt.Run.phase
        step = train_gpt.Trainer.step
        inside = threading.local()

        def heed(event, arguments):
            """An audit hook: may open files itself."""
            file = event in ("open", "os.rename") and "killed" in str(arguments[0])
            if file and not getattr(inside, "hook", False):
                inside.hook = True
                self.happened()
                inside.hook = False

        def counted_phase(run, name):
            self.happened()
            return phase(run, name)

        def counted_step(trainer, *rest):
            self.happened()
            return step(trainer, *rest)

        sys.addaudithook(heed)
        train_gpt.Run.phase = counted_phase
        train_gpt.Trainer.step = counted_step


@pytest.fixture(scope="module")
def events_of_a_run(reference, tmp_path_factory) -> int:
    """How many events a whole run has."""
    folder = tmp_path_factory.mktemp("counted")
    cfg = one_that_dies(reference, folder)
    assert codes(finish(cfg, prepare=DiesAt(math.inf, 0, folder / "count"))) == [0]
    return int((folder / "count").read_text())


def one_that_dies(reference: Config, folder: Path) -> Config:
    """With a checkpoint after nearly every step."""
    return dataclasses.replace(
        reference,
        logs_dir=str(folder / "logs"),
        run_id="killed",
        resume=True,
        checkpoint_every=0.01,
    )


@pytest.mark.parametrize("group", range(KILLS // 10))
def test_after_kill_9_at_any_moment_the_run_goes_on_to_the_same_end(
    reference, events_of_a_run, tmp_path, group
):
    """Kills over start, training, averaging, export, compression and scoring;
    a run that ends before its kill is no trial.
    """
    chance = random.Random(group)
    kills = 0
    runs = itertools.count()
    cfg = one = one_that_dies(reference, tmp_path)
    while kills < 10:
        event = chance.randint(1, events_of_a_run)
        death = DiesAt(event, chance.uniform(0, 0.005), tmp_path / "count")
        run = finish(cfg, prepare=death)
        assert codes(run) in ([0], [-9])
        assert all_whole(run.folder) <= {*CHECKPOINTS, "artifact.bin"}
        assert not list(run.folder.glob("*.damaged"))
        if codes(run) == [-9]:
            kills += 1
        else:
            assert_same_run(reference, dataclasses.replace(cfg, resume=False))
            cfg = dataclasses.replace(one, run_id=f"killed-{next(runs)}")
    assert codes(finish(cfg)) == [0]
    assert_same_run(reference, dataclasses.replace(cfg, resume=False))


@pytest.mark.parametrize("victim, world", [(1, 2), (2, 3), (0, 2)])
@pytest.mark.parametrize("phase", ("train", "score quantised"))
def test_when_one_rank_is_killed_the_others_name_it_and_stop(
    reference, broken, victim, world, phase
):
    """They notice the loss itself: no timeout is there to end them."""
    cfg = dataclasses.replace(broken, checkpoint_every=0.01, dist_timeout=NEVER)
    with launch(cfg, world, DiesIn(phase, victim)) as run:
        ends = run.wait()
    others = [rank for rank in range(world) if rank != victim]
    assert ends[victim] == -9
    assert [ends[rank] for rank in others] == [6] * len(others)
    for rank in others:
        line = run.stderr(rank).splitlines()[-1]
        assert line.startswith(f"error: lost rank {victim} in phase '{phase}'")
        assert "RESUME=1" in line and "[exit 6" in line
    assert codes(finish(go_on(cfg))) == [0]
    assert_close_run(reference, cfg)


def assert_close_run(one: Config, other: Config) -> None:
    for a, b in zip(events(one, "step"), events(other, "step"), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=2e-4)


class AllButOneSpeak:
    """A store in which the ranks wait, however long it takes, for the word of all but one.

    Once these know that all have heard of all, it is gone, as when its host is lost.
    """

    def __init__(self, name: str, store, silent: int):
        self.store = PrefixStore(name, store)
        self.set = self.store.set
        self.own = os.environ["RANK"]
        every = {str(rank) for rank in range(int(os.environ["WORLD_SIZE"]))}
        self.others = every - {self.own, str(silent)}
        self.heard = set()
        self.in_vain = 0

    def check(self, names: list[str]) -> bool:
        if self.heard != self.others:
            there = self.store.check(names)
            if there:
                self.heard.update(names)
            return there
        # once to end the round in which the last one was heard
        self.in_vain += 1
        if self.in_vain > 1:
            self.set(f"{self.own} has heard", "")
            until(lambda: all(self.store.check([f"{rank} has heard"]) for rank in self.others))
            raise RuntimeError("the store is gone")
        return False


@dataclass
class DiesIn:
    """In a child: this rank is killed in the middle of the phase.

    The others wait for its word for ever: within 5 s a busy machine may not bring theirs.
    """

    phase: str
    rank: int

    def __call__(self):
        step, fill = train_gpt.Trainer.step, train_gpt.ScoreSheet.fill
        silent_ranks = train_gpt.Run.silent_ranks
        train_gpt.Run.silent_ranks = lambda run: silent_ranks(run, HANG)
        train_gpt.dist.PrefixStore = partial(AllButOneSpeak, silent=self.rank)

        def die(run, where):
            if run.rank == self.rank and run.phase_name == where == self.phase:
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_step(trainer, *rest):
            if trainer.steps == 7:
                die(trainer.run, "train")
            return step(trainer, *rest)

        def dying_fill(sheet, *rest):
            die(sheet.run, "score quantised")
            return fill(sheet, *rest)

        train_gpt.Trainer.step, train_gpt.ScoreSheet.fill = dying_step, dying_fill


def test_a_rank_that_is_not_let_go_hears_the_others_all_the_same(monkeypatch):
    """Gloo may wait for the lost rank before it ends its group."""
    store = torch.distributed.HashStore()
    PrefixStore("stopped", store).set("1", "")
    held = threading.Event()
    monkeypatch.setattr(train_gpt.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(train_gpt.dist, "destroy_process_group", held.wait)
    run = SimpleNamespace(rank=0, world=2, cuda=False)
    assert train_gpt.Run.silent_ranks(run, HANG) == []
    held.set()


class Group:
    """Stands for a group of ranks: who holds it?"""


@pytest.mark.parametrize("chained", [False, True])
def test_a_rank_that_stops_holds_nothing_of_the_call_that_broke(chained):
    """Its group of ranks would not end: another rank's all_reduce would wait for ever."""
    held = []
    alive_when_asked = []

    def broken_call():
        group = Group()
        held.append(weakref.ref(group))
        raise RuntimeError("connection closed by peer")

    def call():
        try:
            broken_call()
        except RuntimeError as error:
            if chained:
                raise RuntimeError("all_reduce failed") from error
            raise

    def silent_ranks():
        alive_when_asked.append(held[0]() is not None)
        return [1]

    run = SimpleNamespace(phase_name="train", world=2, stop=0, dir=Path("run"))
    run.log = run.event = run.tick = lambda *_, **__: None
    run.silent_ranks = silent_ranks
    try:
        call()
    except RuntimeError as error:
        assert str(train_gpt.explain(run, error)).startswith("lost rank 1 in phase 'train'")
    assert alive_when_asked == [False]


GROUP_OF_ONE = """
import sys
import time
from pathlib import Path
from train_gpt import Config, Run, dist
group = dict(backend="gloo", init_method=sys.argv[1], rank=0, world_size=1)
Run.join = lambda run, patience: dist.init_process_group(**group)
Run(Config(logs_dir=sys.argv[2]))
tasks = Path("/proc/self/task")
threads = lambda: sum("gloo" in path.read_text() for path in tasks.glob("*/comm"))
while not threads():  # each takes its name itself
    time.sleep(0.01)
dist.destroy_process_group()
print(threads())
"""


def test_the_threads_of_a_group_end_with_it(tmp_path):
    """torch._dynamo, imported after it, would keep the group: an abort (-6) as Python ends."""
    command = [sys.executable, "-c", GROUP_OF_ONE, f"file://{tmp_path}/meet", str(tmp_path)]
    said = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert said.splitlines()[-1] == "0"


def at_step(step: int, act) -> None:
    """In a child: act(trainer) once so many steps are done, before they are reported."""
    report = train_gpt.Trainer.report

    def acting(trainer, k):
        if trainer.steps == step:
            act(trainer)
        report(trainer, k)

    train_gpt.Trainer.report = acting


# ── disks ─────────────────────────────────────────────────────────────────────────────────────────
FULL = "No space left on device"


@pytest.mark.parametrize(
    "name, kept",
    [
        ("checkpoint.bin", set()),
        ("artifact.bin", {"checkpoint.bin", "checkpoint.previous.bin"}),
        ("result.json", {"artifact.bin", "checkpoint.bin", "checkpoint.previous.bin"}),
    ],
)
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_finished(reference, broken, name, kept):
    """/dev/full in the place where the file is written first."""
    cfg = go_on(broken)
    folder(cfg).mkdir(parents=True)
    (folder(cfg) / f"{name}.tmp").symlink_to("/dev/full")
    run = finish(cfg)
    assert (
        codes(run) == [7]
        and len(run.stderr().splitlines()) == 1
        and FULL in run.stderr()
        and "RESUME=1" in run.stderr()
    )
    assert all_whole(folder(cfg)) == kept and not (folder(cfg) / "result.json").exists()
    assert codes(finish(cfg)) == [0]  # the half-written file is gone, and there is room again
    assert_same_run(reference, broken)
    assert json.loads((folder(cfg) / "result.json").read_text())["resumed"] == []


def test_a_log_that_cannot_be_written_is_one_line(broken):
    cfg = go_on(broken)
    folder(cfg).mkdir(parents=True)
    (folder(cfg) / "train.log").symlink_to("/dev/full")
    run = finish(cfg)
    assert (
        codes(run) == [7]
        and FULL in run.stderr().splitlines()[0]
        and "Traceback" not in run.stderr()
    )


@dataclass
class FillsUp:
    """In a child: from this step on no file may grow."""

    step: int

    def __call__(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 1
        )  # what Python cannot flush at its end would be another exit code
        at_step(self.step, lambda trainer: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))


def test_a_disk_that_fills_up_while_training_leaves_the_last_checkpoint(reference, broken):
    cfg = dataclasses.replace(broken, checkpoint_every=0.001)
    run = finish(cfg, prepare=FillsUp(7))
    assert codes(run) == [7] and "File too large" in run.stderr() and "RESUME=1" in run.stderr()
    assert all_whole(folder(cfg)) and max(
        read_container(p)[0]["progress"]["steps"] for p in folder(cfg).glob("checkpoint*.bin")
    ) in (5, 6)
    assert codes(finish(go_on(cfg))) == [0]
    assert_same_run(reference, broken)


def test_a_log_folder_that_cannot_be_made_is_refused(broken, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (
        tmp_path / "file",
        Path("/proc/logs"),
    ):  # root may write into a read-only folder, but not there
        run = finish(dataclasses.replace(broken, logs_dir=str(place)))
        assert (
            codes(run) == [2]
            and f"cannot create {place}/broken" in run.stderr()
            and len(run.stderr().splitlines()) == 1
        )


# ── data that change under the run ────────────────────────────────────────────────────────────────
@dataclass
class Spoils:
    """In a child: before this step something happens to the training shard."""

    how: str
    step: int = 5

    def __call__(self):
        at_step(self.step, lambda trainer: self.spoil(trainer.split.paths[0]))

    def spoil(self, path: Path) -> None:
        if self.how == "deleted":
            path.unlink(missing_ok=True)  # each rank does it
        elif self.how == "cut":
            os.truncate(path, 1024 + 2 * 100)
        elif self.how == "overwritten":
            with open(path, "r+b") as shard:  # in place: the other rank may be reading it
                shard.seek(1024)
                shard.write(b"\xff" * (path.stat().st_size - 1024))
        else:  # reading there is a real EIO
            link = path.with_name(str(os.getpid()))
            link.symlink_to("/proc/self/mem")
            link.replace(path)


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize(
    "how, message, code",
    [
        ("deleted", "No such file or directory; prepare the data again", 2),
        ("cut", "has been cut since the run began", 2),
        ("overwritten", ", but VOCAB_SIZE=384", 2),
        ("unreadable", "Input/output error; mend that", 7),
    ],
)
def test_a_shard_that_changes_while_training_stops_the_run_and_loses_no_step(
    reference, broken, tmp_path, how, message, code, world
):
    cfg = own_data(broken, tmp_path)
    shard = tmp_path / "data/fineweb_train_000000.bin"
    good = shard.read_bytes()
    run = finish(cfg, world, Spoils(how))
    assert codes(run) == [code] * world
    said = [line for line in run.stderr().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0] and str(shard) in said[0]
    saved = read_container(folder(cfg) / CHECKPOINTS[0])[0]["progress"]["steps"]
    # rows are read two steps ahead
    assert saved in (5, 6, 7) and f"saved after {saved} steps" in run.log()
    shard.unlink(missing_ok=True)
    shard.write_bytes(good)
    assert codes(finish(go_on(cfg))) == [0]
    (assert_same_run if world == 1 else assert_close_run)(reference, cfg)


def test_a_launch_takes_its_own_folder_back_and_not_what_another_put_in_its_place(tiny):
    cfg = tiny()
    first = train_gpt.Run(cfg)
    aside = first.dir.rename(first.dir.with_name("aside"))
    second = train_gpt.Run(cfg)
    first.take_back_folder()
    assert second.dir.exists() and aside.exists()
    second.take_back_folder()
    assert not second.dir.exists()
    second.take_back_folder()


def spoil_row_of_rank_1(cfg: Config, step: int) -> int:
    """Puts a token of no vocabulary into the last row of this step; returns its place."""
    shard = Path(cfg.data_path) / "fineweb_train_000000.bin"
    tokens = read_shard(shard)
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    place = len(tokens) * (rows - 1) // rows + (step + 1) * cfg.train_seq_len - 1
    tokens[place] = 999
    write_shard(shard, tokens)
    return place


def test_a_bad_token_of_one_rank_stops_all_ranks_before_that_step(reference, broken, tmp_path):
    cfg = own_data(broken, tmp_path)
    place = spoil_row_of_rank_1(cfg, step=5)
    run = finish(cfg, 2)
    assert codes(run) == [2, 2], run.stderr()
    (line,) = run.stderr().splitlines()
    shard = tmp_path / "data/fineweb_train_000000.bin"
    assert line.startswith(f"error: {shard}: token id 999 at {place:,}, but VOCAB_SIZE=384")
    assert "saved after 5 steps" in run.log()
    assert read_container(folder(cfg) / CHECKPOINTS[0])[0]["progress"]["steps"] == 5
    shutil.copy(Path(reference.data_path) / shard.name, shard)
    assert codes(finish(go_on(cfg), 2)) == [0, 0]
    assert_close_run(reference, cfg)


@dataclass
class DiskFailsForRank1:
    """In a child: from this step on rank 1 alone cannot read its rows."""

    step: int

    def __call__(self):
        def broken(*_):
            raise OSError(5, "Input/output error")

        if os.environ["RANK"] == "1":
            at_step(self.step, lambda _: setattr(train_gpt.os, "pread", broken))


def test_a_disk_that_fails_for_one_rank_is_one_line_of_all(broken):
    run = finish(broken, 2, DiskFailsForRank1(3))
    assert codes(run) == [7, 7]
    (line,) = run.stderr().splitlines()
    assert "fineweb_train_000000.bin: Input/output error; mend that" in line
    steps = read_container(folder(broken) / CHECKPOINTS[0])[0]["progress"]["steps"]
    assert steps in (3, 4, 5) and f"saved after {steps} steps" in run.log()


@pytest.mark.parametrize(
    "tokens, message", [([], "0 tokens"), ([1], "1 tokens"), ([1, 2, 2], "0 bytes of text")]
)
def test_an_empty_or_tiny_validation_split_is_refused_before_anything_is_trained(
    broken, tmp_path, tokens, message
):
    cfg = own_data(broken, tmp_path)
    write_shard(tmp_path / "data/fineweb_val_000000.bin", tokens)
    run = finish(cfg)
    assert (
        codes(run) == [2]
        and message in run.stderr()
        and len(run.stderr().splitlines()) == 1
        and not folder(cfg).exists()
    )


def test_the_smallest_validation_split_is_scored(broken, tmp_path):
    cfg = own_data(broken, tmp_path)
    shard = tmp_path / "data/fineweb_val_000000.bin"
    text = np.fromfile(shard, "<u2", offset=1024)
    write_shard(shard, text[:4])
    run = finish(cfg)
    assert codes(run) == [0], run.stderr()
    assert json.loads((folder(cfg) / "result.json").read_text())["val_tokens"] == 3


# ── numbers that are none ─────────────────────────────────────────────────────────────────────────
@dataclass
class NotFinite:
    """In a child: in these steps one gradient, or the loss, is not finite
    (on one rank, if that is given).
    """

    steps: tuple
    value: float = math.nan
    where: str = "blocks.1.mlp.fc.weight"
    rank: int | None = None

    def __call__(self):
        step = train_gpt.Trainer.step

        def spoilt(trainer, batch, k):
            hit = (
                trainer.steps in self.steps
                and self.rank in (None, trainer.run.rank)
                and len(trainer.step_seconds) == trainer.steps > 0
            )
            if hit and self.where == "loss":
                forward, trainer.forward = (
                    trainer.forward,
                    lambda *a: trainer.model(*a) * self.value,
                )
            elif hit:
                hook = dict(trainer.model.named_parameters())[self.where].register_hook(
                    lambda g: g * self.value
                )
            try:
                step(trainer, batch, k)
            finally:
                if hit and self.where == "loss":
                    trainer.forward = forward
                elif hit:
                    hook.remove()

        train_gpt.Trainer.step = spoilt


@pytest.mark.parametrize(
    "value, where, world",
    [
        (math.nan, "blocks.1.mlp.fc.weight", 1),
        (math.inf, "tok_emb", 1),
        (math.nan, "loss", 1),
        (math.nan, "blocks.1.mlp.fc.weight", 2),
        (math.nan, "loss", 2),
    ],
)
def test_nan_or_inf_stops_before_it_reaches_the_weights(broken, value, where, world):
    """One rank is enough.

    The message names step and tensor; the state before it is saved; NONFINITE=skip goes on from
    there.
    """
    fault = NotFinite((5,), value, where, rank=world - 1)
    run = finish(broken, world, fault)
    assert codes(run) == [5] * world
    (line,) = [
        line for line in run.stderr().splitlines() if line.startswith("error: ")
    ]  # of both ranks together
    assert "step 5: not finite" in line and "NONFINITE=skip" in line and "[exit 5" in line
    assert where == "loss" or f"first gradient: {where}" in line
    facts, tensors = read_container(folder(broken) / CHECKPOINTS[0])
    assert (
        facts["progress"]["steps"] == 5
        and all(w.isfinite().all() for w in tensors.values())
        and "saved after 5 steps" in run.log()
    )
    assert (
        codes(finish(dataclasses.replace(broken, resume=True, nonfinite="skip"), world, fault))
        == [0] * world
    )
    result = json.loads((folder(broken) / "result.json").read_text())
    assert result["skipped"] == [5] and result["steps"] == 12 and math.isfinite(result["val_bpb"])


def test_a_skipped_step_leaves_weights_moments_and_averages_alone(tiny):
    """Skipping the last of six steps gives what five steps give."""
    knobs = BASE | dict(
        max_wallclock_seconds=0.0, warmdown_iters=0, ema_enabled=True, ema_decay=0.5
    )
    five, six = (
        tiny(**knobs | dict(iterations=5)),
        tiny(**knobs | dict(iterations=6, nonfinite="skip")),
    )
    assert codes(finish(five)) == [0] and codes(finish(six, prepare=NotFinite((5,)))) == [0]
    one, other = (read_container(folder(cfg) / CHECKPOINTS[0])[1] for cfg in (five, six))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class BadWeights:
    """In a child: after this step a weight is not finite, although no gradient was."""

    step: int

    def __call__(self):
        at_step(self.step, lambda trainer: trainer.flat.weights[11].fill_(math.inf))


def test_weights_that_are_not_finite_are_never_saved_and_the_log_says_so(broken):
    cfg = dataclasses.replace(broken, checkpoint_every=0.0)
    run = finish(cfg, prepare=BadWeights(3))
    assert codes(run) == [5] and "step 3: not finite" in run.stderr()
    assert (
        "not saved, as live/" in run.log()
        and "is not finite, after 3 steps" in run.log()
        and "saved after" not in run.log()
    )
    assert read_container(folder(cfg) / CHECKPOINTS[0])[0]["progress"]["steps"] == 0


@dataclass
class BadMoments:
    """In a child: after this step AdamW divides by infinity,
    which stops the embedding and shows in no loss.
    """

    step: int

    def __call__(self):
        at_step(self.step, lambda trainer: trainer.optimiser.second_moments.fill_(math.inf))


def test_a_periodic_checkpoint_that_was_not_written_is_told(broken):
    run = finish(dataclasses.replace(broken, checkpoint_every=0.001), prepare=BadMoments(3))
    assert codes(run) == [0] and "WARNING: no checkpoint: second/" in run.log()


def test_a_run_of_nothing_but_nan_stops_although_steps_may_be_skipped(broken):
    cfg = dataclasses.replace(broken, nonfinite="skip", iterations=40)
    run = finish(cfg, prepare=NotFinite(tuple(range(3, 40))))
    assert codes(run) == [5] and "step 12: not finite" in run.stderr()  # 3 to 11 were left out
    assert run.log().count("WARNING: step") == 9


# ── clocks and memory ─────────────────────────────────────────────────────────────────────────────
@dataclass
class JumpingClock:
    """In a child: the wall clock goes backwards and forwards,
    the monotonic one stands still for an hour, once.
    """

    step: int | None = None

    def __call__(self):
        jumps, counter, wall = random.Random(0), time.perf_counter, time.time
        train_gpt.time.time = lambda: wall() + jumps.uniform(-1e9, 1e9)
        report, late = train_gpt.Trainer.report, [0.0]

        def jumping(trainer, k):
            report(trainer, k)
            late[0] += 3600.0 * (trainer.steps == self.step)

        train_gpt.time.perf_counter, train_gpt.Trainer.report = lambda: counter() + late[0], jumping


def test_a_wall_clock_that_jumps_changes_nothing(reference, broken):
    assert codes(finish(broken, prepare=JumpingClock())) == [0]
    assert_same_run(reference, broken)


def test_a_machine_that_slept_ends_the_run_in_good_order(broken):
    cfg = dataclasses.replace(broken, max_wallclock_seconds=600.0, iterations=10**4)
    run = finish(cfg, prepare=JumpingClock(step=5))
    assert codes(run) == [9], run.stderr()  # an hour over its limit
    result = json.loads((folder(cfg) / "result.json").read_text())
    assert (
        result["steps"] == 6 and result["train_seconds"] > 3600 and math.isfinite(result["val_bpb"])
    )


class LittleMemory:
    """In a child: 200 MB more than it has now."""

    def __call__(self):
        status = Path("/proc/self/status").read_text().splitlines()
        size = next(line for line in status if line.startswith("VmSize"))
        now = int(size.split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20),) * 2)


@dataclass
class LittleMemoryOnRank1:
    def __call__(self):
        if os.environ["RANK"] == "1":
            LittleMemory()()


MUCH = dict(train_batch_tokens=2**17, grad_accum_steps=1)  # logits of 200 MB


def test_out_of_memory_of_one_rank_is_told_by_that_rank(broken):
    cfg = dataclasses.replace(broken, **MUCH, dist_timeout=NEVER)
    run = finish(cfg, 2, LittleMemoryOnRank1())
    assert codes(run) == [6, 8], run.stderr()
    assert "out of memory in phase 'warm-up and compile'" in run.stderr(1)


def test_out_of_memory_names_the_phase_and_the_knob(broken):
    cfg = dataclasses.replace(broken, **MUCH)
    run = finish(cfg, prepare=LittleMemory())
    assert codes(run) == [8], run.stderr()
    line = run.stderr().splitlines()[-1]
    assert (
        "out of memory in phase 'warm-up and compile'" in line
        and "GRAD_ACCUM_STEPS" in line
        and "[exit 8" in line
    )


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class BitFlip:
    """In a child: one weight of this rank is another after this step."""

    rank: int
    step: int = 5

    def __call__(self):
        at_step(
            self.step,
            lambda trainer: trainer.flat.weights[11].add_(1e-3 * (trainer.run.rank == self.rank)),
        )


@dataclass
class SaysWhetherItLeft:
    """In a child: as its last act it prints whether this rank is still in the process group."""

    fault: object = None

    def __call__(self):
        command_line = train_gpt.command_line

        def last_act(arguments):
            code = command_line(arguments)
            print(f"still in the group: {torch.distributed.is_initialized()}", flush=True)
            return code

        train_gpt.command_line = last_act
        if self.fault:
            self.fault()


@pytest.mark.parametrize(
    "fault, knobs, code",
    [
        (None, {}, 0),
        (None, dict(cap_bytes=1), 3),
        (None, dict(train_seq_len=256, train_batch_tokens=256), 2),
        (NotFinite((5,), math.nan, "loss"), {}, 5),
        (BitFlip(0), {}, 6),
    ],
    ids=["good", "over the cap", "refused", "NaN", "drift"],
)
def test_every_rank_leaves_the_group_before_the_interpreter_ends(broken, fault, knobs, code):
    """Or gloo's threads may abort it, and a good run ends as Signal 6.

    Seen once, PyTorch #179291.
    """
    run = finish(dataclasses.replace(broken, **knobs), 2, SaysWhetherItLeft(fault))
    assert codes(run) == [code] * 2, run.stderr()
    assert [run.stdout(rank).splitlines()[-1] for rank in (0, 1)] == [
        "still in the group: False"
    ] * 2


class StoppedTooLate:
    """In a child: SIGTERM comes when all is done."""

    def __call__(self):
        destroy = train_gpt.dist.destroy_process_group
        train_gpt.dist.destroy_process_group = lambda: (
            os.kill(os.getpid(), signal.SIGTERM),
            destroy(),
        )


def test_a_signal_after_the_end_changes_nothing(broken):
    run = finish(broken, 2, StoppedTooLate())
    assert (
        codes(run) == [0, 0] and "error: " not in run.stderr() and "Traceback" not in run.stderr()
    )


@pytest.mark.parametrize("rank", (0, 1))
def test_ranks_that_drift_apart_are_noticed_before_the_next_checkpoint(reference, broken, rank):
    cfg = dataclasses.replace(broken, train_log_every=3, checkpoint_every=0.001)
    run = finish(cfg, 2, BitFlip(rank))
    assert (
        codes(run) == [6, 6]
        and "step 5: the ranks hold different weights" in run.stderr(0)
        and "RESUME=1" in run.stderr(0)
    )
    for name in CHECKPOINTS:  # none was made of weights that differ
        assert read_container(folder(cfg) / name)[0]["progress"]["steps"] <= 5


def test_one_two_four_and_eight_ranks_train_alike(reference, tiny):
    """8 rows of a step on 3 and 8 ranks too; every rank holds the same weights after each step,
    or it would have stopped.
    """
    for world in (2, 3, 4, 8):
        cfg = tiny(**EVERYTHING)
        assert codes(finish(cfg, world)) == [0] * world
        assert_close_run(reference, cfg)
        assert json.loads((folder(cfg) / "result.json").read_text())["world_size"] == world


def test_more_ranks_than_rows_are_refused_on_every_rank(tiny):
    run = finish(tiny(**BASE, train_seq_len=256), 3)
    assert (
        codes(run) == [2, 2, 2]
        and run.stderr().count("TRAIN_BATCH_TOKENS=512: fewer rows than 3 ranks") == 1
    )

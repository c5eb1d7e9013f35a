"""The time ledger: one clock, disjoint rows that add up to the wall time of all launches.

By a clock of the test, so that every second is known to the bit. Would have caught: a row `train`
that holds validations and the last save (48 of 48 equal-time runs "over" their limit), a resumed
run that shows its last launch alone, seconds before a kill that nobody counts, and a training or a
scoring over its limit that ends in "good".
"""

import signal
from types import SimpleNamespace

import pytest
import torch
from soak import may_end_so
from test_figures import Clock
from test_pipeline import SMALL, folder

import train_gpt
from train_gpt import (
    ALIVE,
    CHECKPOINTS,
    EXIT_CODES,
    SCORE_GPUS,
    Config,
    Refusal,
    Run,
    ScoreSheet,
    Trainer,
    main,
    read_container,
    time_limits,
    verdict,
)

STEPS = 26
KNOBS = SMALL | dict(
    iterations=STEPS,
    max_wallclock_seconds=600.0,
    warmup_steps=3,
    warmdown_iters=10,
    train_log_every=10,
    val_loss_every=5,
    val_max_tokens=200,
    checkpoint_every=3.0,
)
# Dyadic, so that sums are exact
STEP = 0.25
WARM = 8.0
SAVE = 0.125
PARTS = {
    "live": 32.0,
    "averaged": 64.0,
    "quantised": 128.0,
    "sliding": 256.0,
    "validate": 16.0,
    "compile": 1.0,
}
EXPORT = 4.0
COMPARE = 32.0  # the ranks, after the last step


class Killed(BaseException):
    """What no part of the run sees."""


class World:
    """Launches by the clock of the test: how long each part lasts, and when the run is killed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch = patch
        self.clock = Clock(patch)
        self.wall = 0.0  # of all launches
        self.slow = {}  # step -> its seconds
        self.warm = WARM
        lasts = self.clock.lasts
        lasts(Trainer, "step", self.of_step)
        lasts(Trainer, "save", lambda *_: SAVE)
        lasts(Trainer, "compare_ranks", lambda trainer: COMPARE * trainer.done())
        lasts(ScoreSheet, "fill", lambda sheet, *_: PARTS[sheet.run.phase_name.split()[-1]])
        lasts(train_gpt, "export", lambda *_: EXPORT)
        patch.setattr(Run, "milliseconds", lambda run, work: work() or 1.0)
        # a sign of life at each step
        patch.setattr(train_gpt, "ALIVE_SECONDS", 0.0)

    def of_step(self, trainer: Trainer, *_) -> float:
        if trainer.run.phase_name != "train":
            return self.warm
        return self.slow.get(trainer.steps, STEP)

    def launch(self, cfg: Config) -> dict:
        began = self.clock.now
        try:
            return main(cfg)
        finally:
            self.wall += self.clock.now - began

    def killed(self, cfg: Config, owner, name: str, when) -> None:
        """A launch that ends, without a word, in the call of owner.name for which when(...)."""
        work = getattr(owner, name)

        def dying(*arguments, **named):
            result = work(*arguments, **named)
            if when(*arguments):
                raise Killed
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, dying)
            # this process lives on, and so would the thread that writes a checkpoint
            save = Trainer.save
            patch.setattr(Trainer, "save", lambda trainer, wait=True: save(trainer, wait=True))
            patch.setattr(train_gpt, "explain", lambda run, error: None)
            with pytest.raises(Killed):
                self.launch(cfg)
        dead = signal.getsignal(signal.SIGTERM).__self__
        dead.text.close()


@pytest.fixture
def world(monkeypatch) -> World:
    return World(monkeypatch)


def again(cfg: Config) -> Config:
    return Config(**{**cfg.knobs(), "resume": True})


def saved(cfg: Config) -> dict:
    """The facts of the newest checkpoint."""
    return read_container(folder(cfg) / CHECKPOINTS[0])[0]


def log_of(cfg: Config) -> str:
    return (folder(cfg) / "train.log").read_text()


# ── The rows ──────────────────────────────────────────────────────────────────────────────────────
def test_the_rows_are_disjoint_and_add_up_to_the_wall_time(world, tiny):
    cfg = tiny(**KNOBS)
    report = world.launch(cfg)
    rows = report["seconds"]
    # A checkpoint every 3 s of training: after the steps 12 and 24, and the copies are on the clock
    assert rows["train"] == report["train_seconds"] == STEPS * STEP + 2 * SAVE
    assert rows["validate"] == 5 * PARTS["validate"]
    assert rows["first checkpoint"] == SAVE
    # the clock stops with the last step: what is done then is not on it
    assert rows["last checkpoint"] == COMPARE + SAVE
    # the validation of the warm-up is no pause of the training
    assert rows["warm-up and compile"] == 3 * WARM + PARTS["compile"]
    assert rows["quantise and compress"] == EXPORT
    for name in ("live", "quantised", "sliding"):
        assert rows[f"score {name}"] == PARTS[name] == report["scores"][name]["seconds"]
    assert report["eval_seconds"] == rows["score sliding"]
    assert sum(rows.values()) == world.wall
    assert (report["launches"], report["lost_seconds"]) == (1, 0.0)
    assert not (folder(cfg) / ALIVE).exists()


def test_an_inner_phase_pauses_the_one_around_it(run, monkeypatch):
    clock = Clock(monkeypatch)
    clock.now = run.booked
    seconds = {"train": 0.0, "validate": 0.0}
    with run.phase("train"):
        for spent in (1.0, 2.0):
            clock.now += spent
            with run.phase("validate"):
                clock.now += 10 * spent
                assert run.tick() == pytest.approx(seconds["validate"] + 10 * spent)
            seconds["validate"] += 10 * spent
        clock.now += 4.0
        assert run.tick() == pytest.approx(7.0)
    clock.now += 64.0
    run.tick()
    assert run.ledger() == pytest.approx({"train": 7.0, "validate": 30.0, "set-up and other": 64.0})


def test_what_the_process_took_before_has_a_row(tiny, monkeypatch):
    assert Run(tiny(), 3.0).ledger()["start-up"] == 3.0
    assert "start-up" not in Run(tiny()).ledger()
    assert 0 <= train_gpt.process_seconds() < 86_400
    told = []
    monkeypatch.setattr(train_gpt, "process_seconds", lambda: 7.0)
    monkeypatch.setattr(train_gpt, "main", lambda cfg, start_up: told.append(start_up) or {})
    with pytest.raises(KeyError):
        train_gpt.command_line([])
    assert told == [7.0]


def test_the_seconds_of_a_process_are_those_since_it_was_started(monkeypatch):
    """By what Linux tells: the 22nd field of its line, in ticks since the machine was."""
    line = f"7 (a (b) c) S {' '.join(map(str, range(4, 22)))} 250000 {' '.join('9' * 30)}"
    monkeypatch.setattr(train_gpt.Path, "read_text", lambda path: line)
    monkeypatch.setattr(train_gpt.time, "clock_gettime", lambda clock: 2503.5)
    monkeypatch.setattr(train_gpt.os, "sysconf", lambda name: 100)
    assert train_gpt.process_seconds() == 3.5
    monkeypatch.setattr(train_gpt.time, "clock_gettime", lambda clock: 2499.0)
    assert train_gpt.process_seconds() == 0.0


# ── Several launches ──────────────────────────────────────────────────────────────────────────────
def test_a_resumed_run_has_the_rows_of_all_launches(world, tiny):
    """Killed after step 20, with a checkpoint of step 12, and then when it had trained."""
    cfg = tiny(**KNOBS)
    world.killed(cfg, Trainer, "report", lambda trainer, _: trainer.steps == 20)
    first = saved(cfg)
    assert first["progress"]["elapsed"] == first["ledger"]["train"] == 12 * STEP
    assert first["progress"]["warmed"] == [WARM] * 2
    world.warm = 2 * WARM
    world.killed(again(cfg), train_gpt, "collect_averages", lambda *_: True)
    report = world.launch(again(cfg))

    rows = report["seconds"]
    assert report["resumed"] == [12] and report["launches"] == 3
    assert saved(cfg)["progress"]["warmed"] == [WARM] * 2  # a resumed run has the speed it had
    # as without a stop: each step once. The copy of step 12 is the first launch's, and lost
    assert rows["train"] == report["train_seconds"] == STEPS * STEP + SAVE
    # a copy, 8 steps and the validations at 15 and 20 of the first launch; the end of the second
    assert rows["lost"] == report["lost_seconds"]
    assert rows["lost"] == SAVE + 8 * STEP + 2 * PARTS["validate"] + COMPARE + SAVE
    assert rows["warm-up and compile"] == 9 * WARM + 2 * PARTS["compile"]
    assert rows["validate"] == 5 * PARTS["validate"]
    assert rows["score sliding"] == PARTS["sliding"]
    assert sum(rows.values()) == world.wall
    assert f"3 launches: at least {report['lost_seconds']:.1f} s from the last" in log_of(cfg)
    assert not (folder(cfg) / ALIVE).exists()


def test_a_checkpoint_is_of_the_end_of_its_step(world, tiny):
    """A line of 0.5 s and a validation come before it: they belong to the launch that ended.

    Lines are of steps 1, 10 and 20; that of the last one comes when the clock has stopped.
    """
    cfg = tiny(**KNOBS | dict(checkpoint_every=3.0))
    world.clock.lasts(Trainer, "report_step", lambda *_: 0.5)
    world.killed(cfg, Trainer, "report", lambda trainer, _: trainer.steps == 12)
    facts = saved(cfg)
    assert facts["progress"]["steps"] == 10
    assert facts["ledger"]["train"] == facts["progress"]["elapsed"] == 10 * STEP + 0.5
    report = world.launch(again(cfg))
    rows = report["seconds"]
    assert rows["train"] == report["train_seconds"] == STEPS * STEP + 2 * 0.5 + SAVE
    assert rows["lost"] == 0.5 + SAVE + 2 * STEP
    assert sum(rows.values()) == world.wall


def test_a_run_that_was_killed_before_its_first_checkpoint_loses_all_of_it(world, tiny):
    cfg = tiny(**KNOBS)
    world.killed(cfg, Trainer, "warm_up", lambda *_: True)
    report = world.launch(again(cfg))
    # until the last sign of life: the warm-up itself left none but that of its validation
    assert 0 <= 3 * WARM + PARTS["compile"] - report["lost_seconds"] <= PARTS["compile"]
    assert report["launches"] == 2 and report["resumed"] == []
    assert report["train_seconds"] == STEPS * STEP + 2 * SAVE


def test_scoring_that_was_killed_is_lost_as_far_as_there_are_signs_of_life(world, tiny):
    cfg = tiny(**KNOBS)
    world.killed(cfg, train_gpt, "prove_toggles", lambda *_: True)
    assert sum(saved(cfg)["ledger"].values()) < world.wall
    report = world.launch(again(cfg))
    scored = sum(PARTS[name] for name in report["scores"])
    assert report["lost_seconds"] == COMPARE + SAVE + EXPORT + scored
    assert sum(report["seconds"].values()) == world.wall
    assert report["limits"]["train"]["spent"] == report["train_seconds"]


@pytest.mark.parametrize("content", [None, b"", b"soon\n", b"1 nan\n", b"x 3\n", b"\xff" * 99])
def test_seconds_that_are_not_known_are_said_to_be_so(world, tiny, content):
    cfg = tiny(**KNOBS | dict(val_loss_every=0))
    world.killed(cfg, Trainer, "report", lambda trainer, _: trainer.steps == 20)
    (folder(cfg) / ALIVE).unlink()
    if content is not None:
        (folder(cfg) / ALIVE).write_bytes(content)
    report = world.launch(again(cfg))
    assert report["lost_seconds"] is None and "lost" not in report["seconds"]
    assert "2 launches: how long the ones before went on after" in log_of(cfg)
    assert "those seconds are in no row" in log_of(cfg)


def test_what_is_not_known_of_one_launch_is_not_forgotten_by_the_next(world, tiny):
    """The sign of life of the first launch is gone; the second leaves one of its own."""
    cfg = tiny(**KNOBS | dict(val_loss_every=0))
    at_20 = (Trainer, "report", lambda trainer, _: trainer.steps == 20)
    trained = (train_gpt, "collect_averages", lambda *_: True)
    # the second launch has saved nothing yet, or has
    for name, second, steps in (("early", at_20, 12), ("late", trained, STEPS)):
        cfg = Config(**{**cfg.knobs(), "run_id": name})
        world.killed(cfg, *at_20)
        (folder(cfg) / ALIVE).unlink()
        world.killed(again(cfg), *second)
        assert saved(cfg)["progress"]["steps"] == steps
        report = world.launch(again(cfg))
        assert report["launches"] == 3 and report["lost_seconds"] is None
        assert report["seconds"]["lost"] >= SAVE  # what is known is in its row
        assert "3 launches: how long the ones before went on after" in log_of(cfg)


def test_warnings_survive_a_resume(world, tiny):
    cfg = tiny(**KNOBS | dict(ema_enabled=True, ema_decay=0.999, val_loss_every=0))
    world.killed(cfg, Trainer, "report", lambda trainer, _: trainer.steps == 20)
    report = world.launch(again(cfg))
    found = [text for text in report["warnings"] if text.startswith("EMA_DECAY=0.999: ")]
    assert len(found) == 1 and "about 1,000 steps, more than the 26 of the run" in found[0]
    assert log_of(cfg).count(f"WARNING: {found[0]}") == 2  # by the first launch, and at the end


@pytest.mark.parametrize(
    "change",
    [
        dict(ledger=None),
        dict(ledger={"train": "soon"}),
        dict(ledger={"train": -1.0}),
        dict(ledger={"train": float("inf")}),
        dict(launches="2"),
        dict(warnings=[3]),
    ],
    ids=str,
)
def test_a_ledger_that_no_run_has_kept_is_refused(run, change):
    fine = dict(ledger={"train": 1.0}, launches=2, warnings=["a"])
    train_gpt.take_over(run, fine)
    assert (run.launches, run.earlier, run.warnings) == (3, {"train": 1.0}, ["a"])
    with pytest.raises(Refusal, match=r"RESUME=1: the checkpoint in .* holds no ledger"):
        train_gpt.take_over(run, fine | change)


# ── Limits ────────────────────────────────────────────────────────────────────────────────────────
def test_training_over_its_limit_is_not_good(world, tiny):
    """The last step takes longer than any before: 7 s are spent of 6.5."""
    cfg = tiny(**KNOBS | dict(max_wallclock_seconds=6.625, checkpoint_every=0.0))
    world.slow = {STEPS - 2: 1.0}
    report = world.launch(cfg)
    row = {"spent": 7.0, "limit": 6.625, "slack": -0.375}
    assert report["limits"] == {"train": row} and report["over_limit"] == ["train"]
    assert report["exit_code"] == 9 and (folder(cfg) / "artifact.bin").exists()
    line = "OVER THE LIMIT: train took 7.000 s of 6.625 s, 0.375 s too long"
    assert line in log_of(cfg) and f"exit code 9: {EXIT_CODES[9]}" in log_of(cfg)
    assert train_gpt.ledger_rows(report)["train"] == {
        "spent": "7.0 s",
        "limit": "6.625 s",
        "left": "-0.375 s",
    }

    path = str(folder(cfg) / CHECKPOINTS[0])
    exported = world.launch(Config(**{**cfg.knobs(), "checkpoint": path, "run_id": "b"}))
    assert exported["exit_code"] == 9 and "train" not in exported["seconds"]
    assert "train (before the checkpoint)" in train_gpt.ledger_rows(exported)


def test_a_limit_that_is_kept_has_its_slack_beside_it(world, tiny):
    report = world.launch(tiny(**KNOBS | dict(max_wallclock_seconds=4.0, checkpoint_every=0.0)))
    assert report["limits"] == {"train": {"spent": 3.75, "limit": 4.0, "slack": 0.25}}
    assert report["exit_code"] == 0 and report["over_limit"] == []
    table = train_gpt.ledger_rows(report)
    assert table["train"] == {"spent": "3.8 s", "limit": "4 s", "left": "+0.250 s"}
    assert table["validate"]["limit"] is None and table["validate"]["left"] is None
    assert table["sum"]["spent"] == f"{world.wall:.1f} s"


def test_a_limit_that_is_met_to_the_bit_is_kept(world, tiny):
    world.slow = {STEPS - 2: 1.0}
    report = world.launch(tiny(**KNOBS | dict(max_wallclock_seconds=7.0, checkpoint_every=0.0)))
    assert report["limits"] == {"train": {"spent": 7.0, "limit": 7.0, "slack": 0.0}}
    assert report["exit_code"] == 0 and report["over_limit"] == []


@pytest.mark.parametrize("code", EXIT_CODES)
def test_a_soak_goes_on_after_a_run_over_its_limit_alone(code):
    """As on a busy machine; the launcher makes a 1 of every code."""
    result = dict(exit_code=code, val_bpb=1.0, val_tokens=9, val_bytes=9, total_bytes=9, scored="a")
    assert may_end_so(train_gpt.result_line(result)) == (code == 9)


def test_steps_alone_have_no_limit(world, tiny, monkeypatch):
    held = []
    monkeypatch.setattr(
        train_gpt, "time_limits", lambda *given: held.append(given[2:]) or time_limits(*given)
    )
    report = world.launch(tiny(**KNOBS | dict(max_wallclock_seconds=0.0)))
    assert report["limits"] == {} and report["exit_code"] == 0
    # what is held to a limit where there is one: training, and the scoring that gives the result
    assert held == [(report["train_seconds"], "sliding", PARTS["sliding"])]


def test_scoring_is_held_to_the_limit_where_the_contest_holds_it():
    def held(cuda: bool, world: int, seconds: float) -> dict:
        run = SimpleNamespace(cuda=cuda, world=world, ledger=dict)
        return time_limits(Config(), run, 590.0, "sliding", seconds)

    train = {"spent": 590.0, "limit": 600.0, "slack": 10.0}
    assert held(False, 1, 700.0) == held(True, SCORE_GPUS - 1, 700.0) == {"train": train}
    assert held(False, SCORE_GPUS, 700.0) == {"train": train}
    assert held(True, SCORE_GPUS, 700.5) == {
        "train": train,
        "score sliding": {"spent": 700.5, "limit": 600, "slack": -100.5},
    }
    short = Config(max_wallclock_seconds=9.0)
    alone = time_limits(short, SimpleNamespace(cuda=True, world=8), None, "ttt", 600.0)
    assert alone == {"score ttt": {"spent": 600.0, "limit": 600, "slack": 0.0}}


@pytest.mark.parametrize(
    "under_cap, late, inactive, strict, code",
    [
        (True, [], [], True, 0),
        (True, [], ["EMA"], False, 0),
        (True, [], ["EMA"], True, 4),
        (True, ["train"], ["EMA"], True, 9),
        (True, ["score sliding"], [], False, 9),
        (False, ["train"], ["EMA"], True, 3),
    ],
)
def test_the_exit_code_is_that_which_weighs_most(under_cap, late, inactive, strict, code):
    assert verdict(Config(strict=strict), under_cap, late, inactive) == code


# ── The clock and the schedule ────────────────────────────────────────────────────────────────────
def test_a_slow_first_step_of_a_run_does_not_start_qat(world, tiny):
    """0.25 s for 1/16 s; 64 steps fit, so that the scale is below 0.7 for about the last 17."""
    cfg = tiny(
        **KNOBS
        | dict(
            iterations=1000,
            max_wallclock_seconds=4.0,
            warmdown_iters=24,
            val_loss_every=0,
            qat_enabled=True,
            qat_start_kind="lr_scale",
            qat_start=0.7,
        )
    )
    world.slow = {0: 0.25} | dict.fromkeys(range(1, 100), 1 / 16)
    report = world.launch(cfg)
    assert report["toggles"]["WARMDOWN"]["first_step"] == 1  # the seeds' rule: scale 0.625
    assert report["steps"] - report["toggles"]["QAT"]["first_step"] in range(12, 20)


def test_the_alive_file_says_launch_and_seconds(run):
    run.earlier = {"train": 5.0}
    run.launches = 3
    run.tick()
    launches, seconds = (run.dir / ALIVE).read_text().split()
    assert int(launches) == 3
    assert float(seconds) == pytest.approx(5.0 + run.booked - run.started, abs=1e-6)
    run.remove_alive()
    assert not (run.dir / ALIVE).exists()


def test_every_rank_goes_by_the_training_clock_of_rank_0(world, tiny, monkeypatch):
    """That of rank 0, in place of which the test tells: all seconds are twice as long there."""
    told = Run.broadcast
    monkeypatch.setattr(
        Run,
        "broadcast",
        lambda run, v: 2 * v if isinstance(v, (float, torch.Tensor)) else told(run, v),
    )
    report = world.launch(tiny(**KNOBS | dict(max_wallclock_seconds=0.0, checkpoint_every=0.0)))
    assert report["train_seconds"] == 2 * report["seconds"]["train"] == 2 * STEPS * STEP
    assert report["step_ms_median"] == 2 * 1000 * STEP


def test_signs_of_life_are_left_once_a_second_and_at_each_change_of_phase(run, monkeypatch):
    clock = Clock(monkeypatch)
    clock.now = run.booked
    signs = []
    monkeypatch.setattr(train_gpt.os, "pwrite", lambda file, line, place: signs.append(clock.now))
    with run.phase("train"):
        began = clock.now
        for _ in range(40):
            clock.now += 0.125
            run.tick()
    assert signs == [began, *(began + second for second in range(1, 6)), began + 5.0]


def test_a_disk_that_takes_no_sign_of_life_ends_nothing(world, tiny, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(train_gpt.os, "pwrite", broken)
    cfg = tiny(**KNOBS)
    report = world.launch(cfg)
    assert report["exit_code"] == 0
    (warning,) = [text for text in report["warnings"] if text.startswith("alive.txt: ")]
    assert "Input/output error" in warning
    assert log_of(cfg).count(f"WARNING: {warning}") == 2  # when it happened, and at the end


def test_what_is_said_and_closed_between_steps_is_not_training(world, tiny, monkeypatch):
    """The schedule at step 50 looks at every step to come; a reader may wait for its disk."""
    world.clock.lasts(train_gpt.Loader, "close", lambda *_: 512.0)
    world.clock.lasts(train_gpt, "timeline", lambda *_: 2.0)
    cfg = tiny(**KNOBS | dict(iterations=60, val_loss_every=0, checkpoint_every=0.0))
    report = world.launch(cfg)
    rows = report["seconds"]
    assert rows["train"] == report["train_seconds"] == 60 * STEP
    assert rows["schedule"] == 2.0 and rows["last checkpoint"] == 512.0 + COMPARE + SAVE
    assert sum(rows.values()) == world.wall
    assert "schedule" in train_gpt.WAITING  # a signal does not take one rank out of a step


def test_signs_of_life_are_those_of_rank_0(run):
    run.rank = 1
    run.tick()
    assert not (run.dir / ALIVE).exists()


def test_a_launch_that_is_refused_forgets_nothing(world, tiny):
    cfg = tiny(**KNOBS | dict(val_loss_every=0))
    world.killed(cfg, Trainer, "report", lambda trainer, _: trainer.steps == 20)
    spent = (folder(cfg) / ALIVE).read_text().split()[1]
    changed = Config(**{**again(cfg).knobs(), "matrix_lr": 0.5}, given=frozenset({"MATRIX_LR"}))
    with pytest.raises(Refusal, match="MATRIX_LR"):
        world.launch(changed)
    assert (folder(cfg) / ALIVE).read_text().split() == ["2", spent]
    signal.getsignal(signal.SIGTERM).__self__.text.close()
    report = world.launch(again(cfg))
    assert report["launches"] == 3 and report["lost_seconds"] == 8 * STEP + SAVE

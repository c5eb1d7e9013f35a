"""What a run shows while it is at work: one live line on a terminal, else no long silence.

Failures that these tests would have caught: a run of 40 steps that showed no loss; minutes without
a line while toggles were proved, weights compressed, torch imported; log lines cut at the width of
a terminal; a terminal without a cursor after Ctrl-C; a run ended by a terminal that was closed.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import HANG, QUIET_SECONDS_OF_A_RUN, ROOT, until
from test_launch import nobody_reads

import train_gpt
from train_gpt import Config, Progress, Run, Trainer, main

WIDTH = 60  # of the terminal: narrower than most lines of the log
KNOBS = dict(iterations=4, val_loss_every=2, qat_enabled=True, ema_enabled=True, prune_pct=0.1)


class Terminal:
    """A pseudo-terminal as stdout, and all that was written to it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.master, slave = os.openpty()
        self.stdout = os.fdopen(slave, "w")
        self.text = ""
        patch.setattr(sys, "stdout", self.stdout)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(WIDTH))
        patch.setattr(train_gpt, "REFRESH_SECONDS", 0.005)
        # it would be full after 4,096 bytes that nobody reads
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        # an error: the other end is closed
        with contextlib.suppress(OSError):
            while piece := os.read(self.master, 1 << 16):
                self.text += piece.decode()

    def close(self) -> None:
        self.stdout.close()
        self.reader.join(HANG)
        os.close(self.master)

    def lines(self) -> list[str]:
        """What stands there at the end: ESC [1A goes a line up, ESC [2K deletes a line."""
        told = re.sub(r"\x1b\[\?25[lh]", "", self.text)
        told = re.sub(r"[^\n]*\n\r\x1b\[1A\x1b\[2K", "", told)
        return [line.rpartition("\x1b[2K")[2] for line in told.split("\r\n")]

    def live(self) -> list[str]:
        """What stood there for a while, with the cursor at its start."""
        return re.findall(r"([^\r\n]+)\r\r\x1b\[2K", self.text)


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal() -> a Terminal. (pytest puts its own stdout back before the test itself.)"""
    made = []

    def make() -> Terminal:
        made.append(Terminal(monkeypatch))
        return made[0]

    yield make
    made[0].close()


def hold_each_phase(patch: pytest.MonkeyPatch, shown) -> None:
    """Every phase lasts until what it shows first is there."""
    held = set()

    def enter(run: Run, name: str) -> None:
        of_the_script(run, name)
        if name not in held:
            held.add(name)
            until(lambda: shown(f"{name}, "))

    of_the_script = Run.enter
    patch.setattr(Run, "enter", enter)


def folder(cfg: Config) -> Path:
    return Path(cfg.logs_dir) / cfg.run_id


def steps_logged(cfg: Config) -> list[int]:
    events = map(json.loads, (folder(cfg) / "metrics.jsonl").open())
    return [event["step"] for event in events if event["event"] == "step"]


# ── On a terminal ─────────────────────────────────────────────────────────────────────────────────
def test_a_terminal_shows_one_live_line_below_a_log_that_is_whole(tiny, on_terminal, monkeypatch):
    terminal = on_terminal()

    def at_work(run: Run, work: str) -> None:
        of_the_script(run, work)
        until(lambda: run.progress.line().plain[:WIDTH] in terminal.text)

    of_the_script = Run.at_work
    monkeypatch.setattr(Run, "at_work", at_work)
    hold_each_phase(monkeypatch, lambda start: start in terminal.text)
    cfg = tiny(**KNOBS)
    result = main(cfg)
    until(lambda: "\x1b[?25h\r\x1b[1A\x1b[2K" in terminal.text)  # the cursor is back

    log = (folder(cfg) / "train.log").read_text().splitlines()
    assert terminal.lines() == [*log, ""]
    assert "\x1b[?25l\x1b[?25h" in terminal.text  # a killed run leaves a cursor
    assert max(map(len, log)) > WIDTH >= max(map(len, terminal.live()[1:]))

    live = re.sub(r"\b\d+ s\b", "0 s", "\n".join(terminal.live()))
    for phase in result["seconds"].keys() - {"start-up"}:
        assert f"{phase}, 0 s" in live
    for work in (
        "warm-up and compile, 0 s: step 1 of 2",
        "quantise and compress, 0 s: zstd, 10.0% pruned",
        "prove toggles, 0 s: QAT, 1 of 4",
        "prove toggles, 0 s: PRUNE_PCT, 4 of 4",
    ):
        assert work in live
    assert re.search(r"score sliding, 0 s: (\d+) of \1 windows, 0 s left", live)
    assert re.search(r"train, 0 s: step 1, loss \d\.\d{4}, [\d,]+ tok/s, 0 s left", live)
    assert re.search(r"train, 0 s: step 3, loss \d\.\d{4}, val bpb \d\.\d{4}, ", live)


def test_a_terminal_that_is_closed_ends_no_run(on_terminal, monkeypatch):
    terminal = on_terminal()
    with Progress() as progress:
        progress.watch()
        until(lambda: "start-up, " in terminal.text)
        monkeypatch.setattr(progress.live.console, "print", raises_hang_up)
        progress.say("nobody reads this")
        assert progress.live is None
        assert progress.thread.is_alive()


def raises_hang_up(*_, **__) -> None:
    raise OSError(5, "Input/output error")


# ── Elsewhere ─────────────────────────────────────────────────────────────────────────────────────
def test_no_phase_is_silent_for_long(tiny, monkeypatch):
    monkeypatch.setattr(train_gpt, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(train_gpt, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    hold_each_phase(monkeypatch, lambda start: f"\n... {start}" in sys.stdout.getvalue())
    cfg = tiny(**KNOBS)
    assert main(cfg)["exit_code"] == 0
    log = (folder(cfg) / "train.log").read_text()
    told = sys.stdout.getvalue().splitlines(keepends=True)
    assert "".join(line for line in told if not line.startswith("... ")) == log
    assert "... " not in log


def test_the_thread_ends_with_the_run_however_that_ends(tiny):
    before = threading.enumerate()
    seen = []

    def stops(*_):
        seen.extend(threading.enumerate())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "load_inputs", stops)
        with pytest.raises(KeyboardInterrupt):
            main(tiny())
    (thread,) = set(seen) - set(before)
    assert not thread.is_alive()


def test_signs_of_life_that_nobody_reads_end_nothing(monkeypatch):
    monkeypatch.setattr(train_gpt, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(train_gpt, "REFRESH_SECONDS", 0.001)
    said = []
    say = Progress.say
    monkeypatch.setattr(Progress, "say", lambda *told: (say(*told), said.append(told)))
    with nobody_reads(), Progress() as progress:
        progress.watch()
        until(lambda: len(said) > 2)
        assert progress.thread.is_alive()


@pytest.mark.parametrize("step_seconds", [0.25, 1.75, 4.5, 30.0])
def test_no_silence_is_longer_than_ten_seconds_and_lines_of_steps_come_first(
    tiny, monkeypatch, step_seconds
):
    """Where a step takes less, its line alone is said. By a clock of our own."""
    now = 1000.0
    said = [now]
    monkeypatch.setattr(train_gpt, "QUIET_SECONDS", QUIET_SECONDS_OF_A_RUN)
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(train_gpt, "say", lambda text, _: (said.append(now), lines.add(text[:4])))
    lines = set()
    progress = Progress()
    trainer = Trainer.__new__(Trainer)
    trainer.cfg = trainer.paced = tiny(iterations=10**6, train_log_every=10**6)
    trainer.steps, trainer.step_seconds = 1, [step_seconds]
    trainer.told = trainer.saved = 0.0
    for name in ("report_starts", "compare_ranks", "save"):
        monkeypatch.setattr(trainer, name, lambda *_, **__: None)
    trainer.run = None

    def report_step(_) -> None:
        trainer.told = trainer.elapsed
        progress.say("step")

    trainer.report_step = report_step
    steps = [(n * step_seconds, trainer.report) for n in range(1, int(100 / step_seconds))]
    looks = [(n * train_gpt.REFRESH_SECONDS, lambda _: progress.show()) for n in range(1, 200)]
    for at, act in sorted(steps + looks, key=lambda event: event[0]):
        now = 1000.0 + at
        trainer.elapsed = at
        act(None)
    assert max(b - a for a, b in itertools.pairwise(said)) <= 10
    assert lines == ({"step", "... "} if step_seconds > 10 else {"step"})


def test_a_phase_is_entered_as_a_whole():
    """No line is made of two phases: what it is made of is changed under the lock."""
    changed = {}

    class Watched(Progress):
        def __setattr__(self, name: str, value) -> None:
            super().__setattr__(name, value)
            changed[name] = hasattr(self, "lock") and self.lock._is_owned()

    Watched().enter("train")
    assert changed["phase"] and changed["began"] and changed["work"]


# ── The lines of training ─────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("quiet, steps", [(math.inf, [1, 4]), (0.0, [1, 2, 3, 4])])
def test_a_short_run_shows_its_first_and_last_loss_and_a_slow_one_each(
    tiny, monkeypatch, quiet, steps
):
    monkeypatch.setattr(train_gpt, "QUIET_SECONDS", quiet)
    monkeypatch.setattr(train_gpt, "prove_toggles", lambda *_: None)
    cfg = tiny(iterations=4, train_log_every=1000, eval_stride=0)
    main(cfg)
    assert steps_logged(cfg) == steps
    log = (folder(cfg) / "train.log").read_text()
    assert re.findall(r"^step +(\d+) .* loss \d", log, re.M) == [str(step) for step in steps]


def test_the_seconds_left_are_those_of_the_budget_or_of_the_steps(tiny, monkeypatch):
    trainer = Trainer.__new__(Trainer)
    trainer.steps, trainer.loss, trainer.val_bpb = 100, 2.0, math.nan
    trainer.step_seconds, trainer.elapsed = [0.5] * 100, 50.0
    told = []
    for seconds, iterations in ((0.0, 120), (600.0, 120), (57.0, 10**6)):
        trainer.cfg = tiny(iterations=iterations, max_wallclock_seconds=seconds)
        trainer.paced = trainer.cfg
        told.append(trainer.standing())
    start = "step 100, loss 2.0000, 1,024 tok/s"
    assert told == [f"{start}, 10 s left", f"{start}, 10 s left", f"{start}, 7 s left"]


# ── The start of the script ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "name, argument, variables, says, spins",
    [
        ("__main__", "SEED=1", {}, {"stdout": 2}, "1000"),
        ("__main__", "SEED=1", {"GOMP_SPINCOUNT": "7", "LOCAL_RANK": "0"}, {"stdout": 2}, "7"),
        ("__main__", "SEED=1", {"OMP_WAIT_POLICY": "active"}, {"stdout": 2}, None),
        ("__main__", "SEED=1", {"LOCAL_RANK": "1"}, {}, "1000"),
        ("__main__", "--help", {}, {"stderr": 1}, "1000"),
        ("train_gpt", "SEED=1", {}, {}, None),
    ],
)
def test_before_torch_is_imported_the_script_speaks_and_keeps_threads_from_spinning(
    monkeypatch, tmp_path, name, argument, variables, says, spins
):
    start, _, rest = (ROOT / "train_gpt.py").read_text().partition("import numpy as np\n")
    assert "import torch" not in start and "import torch\n" in rest
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", argument])
    script = {"__name__": name}
    slept = []

    def sleep(seconds: float) -> None:
        """The imports end after ten seconds and more."""
        slept.append(seconds)
        if len(slept) == 2:
            script["main"] = main

    monkeypatch.setattr(time, "sleep", sleep)
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        for stream in ("stdout", "stderr"):
            file = stack.enter_context((tmp_path / stream).open("w"))
            monkeypatch.setattr(sys, stream, file)
        exec(compile(start, "train_gpt.py", "exec"), script)
        seen_spins = os.environ.get("GOMP_SPINCOUNT")
        for thread in set(threading.enumerate()) - before:
            thread.join(HANG)
        monkeypatch.undo()
    told = {}
    for stream in ("stdout", "stderr"):
        lines = re.findall(r"^importing torch, \d+ s$", (tmp_path / stream).read_text(), re.M)
        if lines:
            told[stream] = len(lines)
    assert told == says and set(slept) == ({QUIET_SECONDS_OF_A_RUN} if says else set())
    assert QUIET_SECONDS_OF_A_RUN <= 10
    assert seen_spins == spins


def test_a_stdout_that_is_closed_during_the_imports_keeps_the_exit_code():
    """What nobody reads must not lie in stdout's buffer when that is flushed."""
    start, _, _ = (ROOT / "train_gpt.py").read_text().partition("import numpy as np\n")
    flush = "sys.stdout.reconfigure(errors='backslashreplace')"
    after = f"main = 0\nwhile threading.active_count() > 1: time.sleep(0.01)\n{flush}\nsys.exit(2)"
    start = start.replace("time.sleep(10)", "time.sleep(0.01)")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{after}"], stdout=writing, stderr=-1, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, b"")

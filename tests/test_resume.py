"""A run that was stopped goes on as if it had not been: bit for bit on the CPU, in every mode.

On 1 and 2 ranks. Would have caught: runs that start again from step 0 or with another schedule,
data order or optimiser (#1960's lost GPU window), pods that take everything with them (#1728,
#637), and a torn checkpoint that loads.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TIMED, TINY
from launch import codes, finish, launch
from test_optimiser import make_trainer
from test_pipeline import events, flipped, folder, truncated

import train_gpt
from train_gpt import CHECKPOINTS, Config, Refusal, finished_result, main, read_container

BASE = dict(
    iterations=12,
    warmdown_iters=8,
    train_log_every=1,
    checkpoint_every=0.0,
    keep_float_max_numel=128,
    val_max_tokens=260,
    bigram_vocab_size=64,
    bigram_dim=16,
)
MODES = {  # what is on when the run is stopped
    "plain": dict(),
    "QAT from the start, EMA": dict(qat_enabled=True, ema_enabled=True, ema_decay=0.8),
    "late QAT, SWA": dict(
        qat_enabled=True,
        qat_start_kind="lr_scale",
        qat_start=0.5,
        swa_enabled=True,
        swa_start_frac=0.9,
        swa_every=2,
    ),
    "late QAT, SQWA of EMA": dict(
        qat_enabled=True,
        qat_start_kind="iter_frac",
        qat_start=0.4,
        sqwa_enabled=True,
        ema_enabled=True,
        ema_decay=0.8,
        swa_start_kind="always",
        swa_start_frac=0.0,
        swa_every=1,
        loader="shuffled",
    ),
    "loops one by one, rows that grow, EMA": dict(
        num_loops=2,
        loop_start=1,
        loop_end=1,
        enable_looping_at=0.25,
        loop_phase2_at=0.6,
        train_seq_schedule="16@0.4,32@0.8,64@1",
        seq_change_warmup_steps=4,
        min_lr=0.5,
        wd_taper_final_mult=0.5,
        wd_taper_start_frac=0.3,
        ema_enabled=True,
        ema_decay=0.8,
    ),
    "QNA, SQWA, GPTQ": dict(
        quant_clip="sigma",
        quant_scale_floor=False,
        gptq_enabled=True,
        gptq_calibration_batches=2,
        loader="documents",
        doc_mask=True,
        qna_enabled=True,
        sqwa_enabled=True,
        swa_start_kind="iter_frac",
        swa_start_frac=0.3,
        swa_every=1,
    ),
    "SWA in bf16, three micro-batches": dict(
        swa_enabled=True,
        swa_dtype="bf16",
        swa_start_kind="always",
        swa_start_frac=0.0,
        swa_every=3,
        grad_accum_steps=3,
        adam_wd=0.1,
        loader="coprime",
    ),
}
TIMES = {"t", "seconds", "step_ms", "environment"}


@dataclasses.dataclass
class StopAfter:
    """In a child: SIGTERM arrives during the step after this one, on one rank or on all."""

    step: int
    rank: str | None = None

    def __call__(self):
        report = train_gpt.Trainer.report

        def stopping(trainer, k):
            report(trainer, k)
            if trainer.steps == self.step and self.rank in (None, os.environ.get("RANK")):
                trainer.run.signalled(signal.SIGTERM, None)

        train_gpt.Trainer.report = stopping


def logged(cfg: Config) -> list[dict]:
    """What metrics.jsonl says of the training, without times."""
    found = [json.loads(line) for line in (folder(cfg) / "metrics.jsonl").open()]
    return [
        {k: v for k, v in e.items() if k not in TIMES}
        for e in found
        if e["event"] in ("step", "phase", "val")
    ]


def state(cfg: Config) -> tuple[dict, dict]:
    """(facts, tensors) of checkpoint.bin, without times and what depends on them."""
    facts, tensors = read_container(folder(cfg) / CHECKPOINTS[0])
    facts["progress"] = {
        k: v
        for k, v in facts["progress"].items()
        if k not in ("elapsed", "step_seconds", "resumed", "warmed")
    }
    times = ("metrics_bytes", "ledger", "launches", "warnings")
    return {k: v for k, v in facts.items() if k not in times}, tensors


def assert_same_run(one: Config, other: Config) -> None:
    assert logged(one) == logged(other)
    steps = [e["step"] for e in logged(one) if e["event"] == "step"]
    last = steps[-1]
    assert last == one.iterations or one.max_wallclock_seconds
    assert steps == sorted({1, *range(0, last, one.train_log_every), last} - {0})
    assert (folder(one) / "artifact.bin").read_bytes() == (
        folder(other) / "artifact.bin"
    ).read_bytes()
    (facts, tensors), (facts2, tensors2) = state(one), state(other)
    assert (
        facts == facts2
        and tensors.keys() == tensors2.keys()
        and all(torch.equal(tensors[n], tensors2[n]) for n in tensors)
    )
    results = [json.loads((folder(cfg) / "result.json").read_text()) for cfg in (one, other)]
    for name in (
        "val_bpb",
        "live_val_bpb",
        "averaged_val_bpb",
        "quant_gap_bpb",
        "artifact_bytes",
        "inactive",
        "exit_code",
        "steps",
    ):
        assert results[0][name] == results[1][name], name
    timeless = [
        [{k: v for k, v in row.items() if k not in TIMED} for row in result["toggles"].values()]
        for result in results
    ]
    assert timeless[0] == timeless[1]


def go_on(cfg: Config) -> Config:
    return dataclasses.replace(cfg, resume=True)


# On two ranks those modes that together have every kind of state; each rank has the same code
ON_TWO = ("late QAT, SQWA of EMA", "SWA in bf16, three micro-batches")


@pytest.mark.parametrize(
    "mode, world", [*((mode, 1) for mode in MODES), *((mode, 2) for mode in ON_TWO)]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, mode, world):
    """Stopped twice, in the middle and shortly before the end."""
    knobs = BASE | MODES[mode] | dict(strict=False)
    whole, broken = tiny(**knobs), tiny(**knobs)
    assert codes(finish(whole, world)) == [0] * world
    assert codes(finish(broken, world, StopAfter(5))) == [143] * world
    assert (
        read_container(folder(broken) / CHECKPOINTS[0])[0]["progress"]["steps"] == 6
    )  # the step under way was finished
    assert codes(finish(go_on(broken), world, StopAfter(9))) == [143] * world
    assert codes(finish(go_on(broken), world)) == [0] * world
    assert_same_run(whole, broken)
    assert json.loads((folder(broken) / "result.json").read_text())["resumed"] == [6, 10]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tiny, before, after):
    # without QAT: another order of summation moves a weight across the boundary of a code
    knobs = BASE | {"ema_enabled": True, "ema_decay": 0.8}
    whole, broken = tiny(**knobs), tiny(**knobs)
    assert codes(finish(whole)) == [0]
    assert codes(finish(broken, before, StopAfter(5))) == [143] * before
    assert codes(finish(go_on(broken), after)) == [0] * after
    for one, other in zip(events(whole, "step"), events(broken, "step"), strict=True):
        assert one["step"] == other["step"] and one["loss"] == pytest.approx(
            other["loss"], rel=2e-4
        )
    (facts, tensors), (_, tensors2) = state(whole), state(broken)
    for name, w in tensors.items():
        torch.testing.assert_close(w, tensors2[name], rtol=2e-3, atol=2e-4, msg=name)
    assert facts["progress"]["steps"] == 12


@pytest.mark.parametrize("after, parts, told", [(1, 0, False), (2, 0, True), (2, 2, False)])
def test_packed_documents_go_on_in_the_micro_batches_in_which_they_began(tiny, after, parts, told):
    """512 tokens in one micro-batch of one rank, or in four of two ranks."""
    cfg = tiny(resume=True, loader="documents", doc_mask=True, grad_accum_steps=parts)
    trainer = make_trainer(cfg)
    trainer.lengths = [128 if parts else 512]
    facts = trainer.facts()
    tensors = {name: w.clone() for name, w in trainer.tensors().items()}
    trainer.run.world = after
    if told:
        message = "micro-batches of 256 tokens, as 2 ranks have them, after 512: .*; take 1 ranks"
        with pytest.raises(Refusal, match=message):
            trainer.restore(facts, tensors)
        # a finished training reads no more
        facts["progress"]["steps"] = cfg.iterations
    trainer.restore(facts, tensors)
    assert trainer.lengths == facts["progress"]["lengths"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny):
    cfg = tiny(**BASE)
    stopped = finish(cfg, 2, StopAfter(5, rank="1"))
    assert codes(stopped) == [143, 143] and "saved after 6 steps; RESUME=1" in stopped.log()
    assert codes(finish(go_on(cfg), 1)) == [0]


class Clock:
    """Every reading is 1/128 s after the one before: budgets can be compared bit for bit."""

    def __call__(self):
        ticks = iter(range(10**9))
        train_gpt.time.perf_counter = lambda: next(ticks) / 128  # without rounding


class StoppedClock(Clock):
    def __call__(self):
        super().__call__()
        StopAfter(5)()


def test_a_wallclock_run_goes_on_with_the_time_that_is_left(tiny):
    """QAT, SWA and the warm-down start at shares of the time: the clock must come back."""
    knobs = BASE | dict(
        max_wallclock_seconds=0.4,
        iterations=1000,
        warmdown_iters=0,
        warmdown_frac=0.5,
        qat_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.6,
        swa_enabled=True,
        swa_start_kind="lr_scale",
        swa_start_frac=0.7,
        swa_every=2,
        train_log_every=10**6,  # each line in the log is one more reading of the clock
    )
    whole, broken = tiny(**knobs), tiny(**knobs)
    assert codes(finish(whole, prepare=Clock())) == [0]
    assert codes(finish(broken, prepare=StoppedClock())) == [143]
    assert codes(finish(go_on(broken), prepare=Clock())) == [0]
    assert_same_run(whole, broken)
    begun = [e["name"] for e in logged(whole) if e["event"] == "phase"]
    assert begun == ["WARMDOWN", "QAT", "SWA"]
    for cfg in (whole, broken):  # the budget is spent, but for less than two steps
        result = json.loads((folder(cfg) / "result.json").read_text())
        assert 40 < result["steps"] < 60
        assert 0.4 - 2 / 128 <= result["train_seconds"] <= 0.4
        assert result["toggles"]["WARMDOWN"]["effect"] < -0.9


# ── which checkpoint ──────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> tuple[Config, Config]:
    """An uninterrupted run, and one with checkpoints after 6 and 12 of its 18 steps on disk."""
    logs = tmp_path_factory.mktemp("stopped") / "logs"
    paths = dict(
        data_path=str(data), tokenizer_path=str(data / "tokenizer.model"), logs_dir=str(logs)
    )
    whole, broken = (
        Config(
            **TINY
            | paths
            | BASE
            | MODES["QAT from the start, EMA"]
            | dict(iterations=18, run_id=name)
        )
        for name in ("whole", "broken")
    )
    assert codes(finish(whole)) == [0] and codes(finish(broken, prepare=StopAfter(5))) == [143]
    assert codes(finish(go_on(broken), prepare=StopAfter(11))) == [143]
    assert [
        read_container(folder(broken) / name)[0]["progress"]["steps"] for name in CHECKPOINTS
    ] == [
        12,
        6,
    ]
    return whole, broken


@pytest.fixture
def copy(stopped, tmp_path) -> Config:
    shutil.copytree(folder(stopped[1]), tmp_path / "logs" / "broken")
    return dataclasses.replace(stopped[1], logs_dir=str(tmp_path / "logs"), resume=True)


@pytest.mark.parametrize(
    "damage",
    (truncated, flipped, lambda data, share: b"", lambda data, share: b"\0" * len(data)),
    ids=("truncated", "flipped", "empty", "zeros"),
)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_used_loudly(
    stopped, copy, damage
):
    newest = folder(copy) / CHECKPOINTS[0]
    newest.write_bytes(damage(newest.read_bytes(), 0.7))
    main(copy)
    log = (folder(copy) / "train.log").read_text()
    assert "WARNING" in log and "checkpoint.bin" in log and "the one before it is used" in log
    assert_same_run(stopped[0], copy)
    assert json.loads((folder(copy) / "result.json").read_text())["resumed"] == [6, 6]
    assert (folder(copy) / "checkpoint.damaged").exists()  # kept, but never read


@pytest.mark.parametrize("how, code", [("told to stop meanwhile", 143), ("a failing disk", 7)])
def test_what_is_no_damage_leaves_the_checkpoints_as_they_are(copy, monkeypatch, how, code):
    newest, before = (
        folder(copy) / CHECKPOINTS[0],
        {path.name: path.read_bytes() for path in folder(copy).glob("*.bin")},
    )
    read_container, data = train_gpt.read_container, newest.read_bytes()
    if code == 143:
        monkeypatch.setattr(
            train_gpt,
            "read_container",
            lambda path: (os.kill(os.getpid(), signal.SIGTERM), read_container(path))[1],
        )
    else:
        newest.unlink()
        newest.symlink_to("/proc/self/mem")  # reading there is a real EIO
    with pytest.raises(Refusal) as refused:
        main(copy)
    if code == 7:
        newest.unlink()
        newest.write_bytes(data)
    assert refused.value.code == code and "is used" not in (folder(copy) / "train.log").read_text()
    assert {path.name: path.read_bytes() for path in folder(copy).glob("*.bin")} == before


def test_a_missing_newest_checkpoint_is_as_good_as_one_that_was_never_written(stopped, copy):
    (folder(copy) / CHECKPOINTS[0]).unlink()  # the machine stopped between the two renamings
    main(copy)
    assert_same_run(stopped[0], copy)


def test_without_a_whole_checkpoint_the_run_is_refused_and_nothing_is_touched(copy):
    for name in CHECKPOINTS:
        (folder(copy) / name).write_bytes(b"GOLFGPT\n torn")
    before = {
        path.name: path.read_bytes() for path in folder(copy).iterdir() if path.suffix != ".log"
    }
    with pytest.raises(Refusal, match=r"RESUME=1: no checkpoint in .* is whole") as refused:
        main(copy)
    after = {
        path.name: path.read_bytes() for path in folder(copy).iterdir() if path.suffix != ".log"
    }
    assert refused.value.code == 2 and {**before, "metrics.jsonl": 0} == {
        **after,
        "metrics.jsonl": 0,
    }
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])


def test_a_run_without_any_checkpoint_yet_begins_again(stopped, copy):
    for name in CHECKPOINTS:
        (folder(copy) / name).unlink()
    main(copy)
    assert_same_run(stopped[0], copy)


def test_resume_starts_a_run_that_is_not_there(tiny):
    cfg = tiny(**BASE, resume=True)
    assert main(cfg)["exit_code"] == 0 and len(events(cfg, "step")) == 12


def test_a_complete_run_is_left_alone_and_keeps_its_exit_code(tiny):
    cfg = tiny(**BASE, cap_bytes=1000)
    assert codes(finish(cfg)) == [3]
    before = {
        path.name: path.read_bytes() for path in folder(cfg).iterdir() if path.name != "train.log"
    }
    again = finish(go_on(cfg), 2)
    assert codes(again) == [3, 3] and "nothing is left to do" in again.log()
    assert before == {
        path.name: path.read_bytes() for path in folder(cfg).iterdir() if path.name != "train.log"
    }
    assert set(before) == {
        "artifact.bin",
        "checkpoint.bin",
        "metrics.jsonl",
        "result.json",
        "train_gpt.py",
        train_gpt.PACKED_NAME,
    }


def test_a_complete_run_is_not_asked_for_another_one(stopped):
    cfg = dataclasses.replace(stopped[0], resume=True)
    run = SimpleNamespace(dir=folder(cfg), log=str)
    # what the first launch was told may be told again
    same = dataclasses.replace(cfg, given=frozenset({"EVAL_STRIDE", "NUM_LAYERS", "DATA_PATH"}))
    assert finished_result(same, run)["exit_code"] == 0

    changed = dict(seed=99, eval_stride=7, num_layers=1, cap_bytes=9, qat_grid="amax")
    # another data path may be a new mount; TTT_LR can do nothing; nobody gave QK_GAIN_INIT
    given = frozenset(name.upper() for name in (*changed, "ttt_lr", "data_path"))
    others = dict(ttt_lr=0.5, data_path="elsewhere", qk_gain_init=3.0, qat_enabled=False)
    with pytest.raises(Refusal) as refusal:
        finished_result(dataclasses.replace(cfg, given=given, **changed, **others), run)
    assert refusal.value.code == 2 and len(refusal.value.problems) == len(changed)
    for name, value in changed.items():
        (line,) = [text for text in refusal.value.problems if text.startswith(name.upper())]
        assert line.startswith(f"{name.upper()}={value}: ") and f"={getattr(cfg, name)};" in line

    base = Config.from_env({"BASE": "pr989", "RESUME": "1", "RUN_ID": cfg.run_id})
    with pytest.raises(Refusal, match="BASE=pr989: has "):
        finished_result(base, run)


@pytest.mark.parametrize(
    "lacking, named",
    [
        (["num_loops", "doc_mask"], "DOC_MASK, NUM_LOOPS"),
        (["num_loops", "doc_mask", "loader", "min_lr"], "DOC_MASK, NUM_LOOPS, MIN_LR ..."),
    ],
)
def test_a_run_that_an_older_script_completed_is_said_to_be_one(tmp_path, lacking, named):
    cfg = Config(resume=True, run_id="old")
    there = {name: value for name, value in cfg.knobs().items() if name not in lacking}
    (tmp_path / "result.json").write_text(json.dumps({"config": there}))
    message = f"by an older script, without {re.escape(named)}; take another RUN_ID$"
    with pytest.raises(Refusal, match=message):
        finished_result(cfg, SimpleNamespace(dir=tmp_path, log=str))


@pytest.mark.parametrize("name", CHECKPOINTS, ids=["whole", "between the two renamings"])
def test_a_run_stopped_after_training_exports_and_scores_without_training_again(
    stopped, tmp_path, name
):
    shutil.copytree(folder(stopped[0]), tmp_path / "logs" / "whole")
    cfg = dataclasses.replace(stopped[0], logs_dir=str(tmp_path / "logs"), resume=True)
    for file in ("result.json", "artifact.bin"):
        (folder(cfg) / file).unlink()
    (folder(cfg) / CHECKPOINTS[0]).rename(folder(cfg) / name)
    before = read_container(folder(cfg) / name)[0]["ledger"]
    report = main(cfg)
    assert_same_run(stopped[0], cfg)
    # no second warm-up, no second training
    for phase in ("warm-up and compile", "train"):
        assert report["seconds"][phase] == before[phase]
    assert report["resumed"] == [] and report["launches"] == 2


# ── whose checkpoint ──────────────────────────────────────────────────────────────────────────────
def test_settings_come_from_the_checkpoint(stopped, copy):
    """Only RUN_ID, LOGS_DIR and where the data are."""
    main(
        Config(
            resume=True,
            run_id="broken",
            given=frozenset(),
            **{name: getattr(copy, name) for name in ("logs_dir", "data_path", "tokenizer_path")},
        )
    )
    assert_same_run(stopped[0], copy)


@pytest.mark.parametrize(
    "name, value",
    [("matrix_lr", 0.5), ("seed", 7), ("num_layers", 2), ("quant_bits_mlp", 5), ("iterations", 99)],
)
def test_another_training_setting_is_refused_with_both_values(copy, name, value):
    kept = getattr(copy, name)
    message = f"^{name.upper()}={value}: RESUME=1 RUN_ID=broken was made with {kept}"
    with pytest.raises(Refusal, match=message):
        main(dataclasses.replace(copy, given=frozenset({name.upper()}), **{name: value}))


def test_other_data_are_refused(copy, tmp_path):
    shutil.copytree(copy.data_path, tmp_path / "data")
    shutil.copy(
        tmp_path / "data/fineweb_train_000000.bin", tmp_path / "data/fineweb_train_000001.bin"
    )
    with pytest.raises(Refusal, match="not the run's data"):
        main(dataclasses.replace(copy, data_path=str(tmp_path / "data")))


def test_another_export_setting_is_taken(copy):
    report = main(dataclasses.replace(copy, given=frozenset({"COMPRESSOR"}), compressor="lzma"))
    assert report["config"]["compressor"] == "lzma" and report["steps"] == 18


def test_another_script_is_refused_and_the_one_that_began_is_kept(copy, monkeypatch):
    monkeypatch.setattr(train_gpt, "CODE_SHA256", "0" * 64)
    monkeypatch.setattr(train_gpt, "SOURCE", b"other")
    with pytest.raises(
        Refusal, match=r"was begun by another script; go on with .*broken/train_gpt.py"
    ):
        main(copy)
    assert (folder(copy) / "train_gpt.py").read_bytes() != b"other"


def test_two_processes_never_work_on_one_run(tiny):
    cfg = tiny(**BASE | dict(iterations=10**4))
    with launch(cfg) as first:
        first.until(lambda: "step     3" in first.log())
        second = finish(go_on(cfg))
        assert codes(second) == [2] and "another process is at work there" in second.stderr()
        assert first.processes[0].is_alive()


@pytest.mark.parametrize(
    "knobs, name",
    [
        (dict(resume=True), "RESUME=1"),
        (dict(resume=True, run_id="a", eval_only="b"), "EVAL_ONLY=b and RESUME=1 RUN_ID=a"),
        (dict(resume=True, run_id="a", checkpoint="b"), "CHECKPOINT=b and RESUME=1 RUN_ID=a"),
    ],
)
def test_a_contradiction_is_refused(knobs, name):
    with pytest.raises(Refusal, match=name):
        Config(**knobs)


# ── the cost, and the interval ────────────────────────────────────────────────────────────────────
@dataclasses.dataclass
class NotesCheckpoints(Clock):
    """In a child: each checkpoint that is written, as a line of steps,
    seconds and how many lie there.
    """

    notes: Path

    def __call__(self):
        super().__call__()
        replace = Path.replace

        def noting(path, target):
            there = replace(path, target)
            if Path(target).name == CHECKPOINTS[0]:
                progress = read_container(Path(target))[0]["progress"]
                files = len(list(Path(target).parent.glob("checkpoint*.bin")))
                with self.notes.open("a") as file:
                    print(progress["steps"], progress["elapsed"], files, file=file)
            return there

        Path.replace = noting


def test_checkpoints_come_at_their_interval_and_never_more_than_two(tiny, tmp_path):
    cfg = tiny(**BASE | dict(iterations=100, checkpoint_every=0.15, train_log_every=10**6))
    assert codes(finish(cfg, prepare=NotesCheckpoints(tmp_path / "notes"))) == [0]
    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    seconds = [float(elapsed) for _, elapsed, _ in lines]
    assert [int(steps) for steps, _, _ in lines] == sorted({int(steps) for steps, _, _ in lines})
    assert max(int(files) for _, _, files in lines) == 2
    gaps = [after - before for before, after in itertools.pairwise(seconds[:-1])]
    assert len(gaps) >= 5 and all(0.15 <= gap <= 0.15 + 2 / 128 for gap in gaps)


def test_a_checkpoint_is_copied_once_the_one_before_is_written(tiny):
    """There is never more than one copy in memory."""
    trainer = make_trainer(tiny(**BASE))
    happened = []
    tensors = trainer.tensors
    trainer.writing = SimpleNamespace(result=lambda: happened.append("written"))
    trainer.tensors = lambda: happened.append("copied") or tensors()
    trainer.save()
    assert happened == ["written", "copied"]

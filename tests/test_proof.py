"""The proof that toggles acted: effects with their uncertainty, costs with theirs, in words.

Would have caught: a cost of -326 ms, which was noise (the machine grew slower while it was
measured); an average that made the model worse and ended in "good"; an effect of NaN that counted
as "active"; a score that is not finite and ended in "good".
"""

import dataclasses
import json
import math
import random
import statistics
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import PAIRS_OF_A_RUN, TINY
from test_optimiser import make_trainer, on_ranks
from test_pipeline import folder

import train_gpt
from train_gpt import Activity, Probe, Run, Trained, in_words, main, measure_cost

# With these the probe is all of the validation text, in the fixed windows of the scores
WHOLE = dict(val_max_tokens=1472, eval_stride=0)


@pytest.fixture(autouse=True)
def pairs_of_a_run(monkeypatch) -> None:
    """Costs are measured as often as in a run that is no test."""
    monkeypatch.setattr(train_gpt, "COST_PAIRS", PAIRS_OF_A_RUN)


# ── In words ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "effect, interval, words, active",
    [
        (-0.02, [-0.03, -0.01], "better", True),
        (0.057, [0.04, 0.07], "worse", True),
        (0.001, [-0.001, 0.003], "not distinguishable", True),
        (-0.001, [-0.003, 0.001], "not distinguishable", True),
        (0.0, [-0.001, 0.001], "not distinguishable", True),
        (0.001, [0.0, 0.002], "not distinguishable", True),
        (-0.001, [-0.002, 0.0], "not distinguishable", True),
        (0.0, [0.0, 0.0], "did nothing", False),
        (0.0, None, "did nothing", False),
        (-0.99, None, "acted", True),
        (math.nan, None, "not finite", False),
        (math.inf, None, "not finite", False),
        (math.nan, [math.nan, math.nan], "not finite", False),
        (None, None, None, False),
    ],
)
def test_an_effect_in_words(effect, interval, words, active):
    row = Activity(steps=[3, 4], effect=effect, effect_interval=interval).row(5)
    assert in_words(effect, interval) == row["verdict"] == words
    assert row["active"] is active
    json.dumps(row, allow_nan=False)
    never = Activity(effect=effect, effect_interval=interval).row(5)
    assert never["active"] is False


# ── Intervals ─────────────────────────────────────────────────────────────────────────────────────
def test_the_interval_of_the_median_of_nine_holds_95_percent():
    values = random.Random(9).sample(range(100), 9)
    assert train_gpt.median_interval(values) == [sorted(values)[1], sorted(values)[7]]
    # outside: none or one of nine on a side; one place further in would be too narrow
    outside = [2 * scipy.stats.binom.cdf(r, train_gpt.COST_PAIRS, 0.5) for r in (1, 2)]
    assert outside[0] <= 0.05 < outside[1]
    assert train_gpt.median_interval(values[:8]) is None


def test_a_paired_margin_is_two_standard_errors_of_what_differs():
    draw = random.Random(0)
    hard = [draw.uniform(0, 1000) for _ in range(64)]  # of the text: in both
    by = [draw.gauss(0.5, 0.1) for _ in range(64)]
    margin = train_gpt.paired_margin([h + b for h, b in zip(hard, by, strict=True)], hard, 640)
    # the sum of 64 differences, per 640 tokens
    assert margin == pytest.approx(2 * scipy.stats.sem(by) * 64 / 640, rel=1e-9)
    assert train_gpt.paired_margin(hard, hard, 640) == 0
    assert math.isnan(train_gpt.paired_margin([1.0], [2.0], 1))
    assert math.isnan(train_gpt.paired_margin([1.0, math.nan], [2.0, 1.0], 1))


def test_block_sums_add_up_and_keep_their_order():
    nats = torch.rand(1001)
    sums = train_gpt.block_sums(nats)
    assert len(sums) == train_gpt.BLOCKS
    assert sum(sums) == pytest.approx(nats.double().sum().item(), rel=1e-12)
    assert sums[0] == pytest.approx(nats[:16].double().sum().item(), rel=1e-12)
    assert train_gpt.block_sums(torch.ones(3)) == (1.0, 1.0, 1.0)


# ── Cost ──────────────────────────────────────────────────────────────────────────────────────────
class Machine:
    """A run whose clock says what the test likes: milliseconds(name, how many were timed).

    timed: without the first call of each, which sets up what the others find.
    """

    world, cuda = 1, False
    fails = Run.fails

    def __init__(self, milliseconds, told=lambda value: value):
        self.takes = milliseconds
        self.broadcast = told
        self.calls = []
        self.timed = []
        self.activity = {"X": Activity(cost_per="step")}
        self.warnings = []
        self.warn = self.warnings.append

    def work(self, name: str):
        return lambda: self.calls.append(name)

    def milliseconds(self, work) -> float:
        work()
        if len(self.calls) > 2:
            self.timed.append(self.calls[-1])
        return self.takes(self.calls[-1], len(self.timed))

    def cost(self, times: int = 1) -> Activity:
        measure_cost(self, "X", self.work("on"), self.work("off"), times)
        return self.activity["X"]


def test_milliseconds_are_those_of_one_call_to_its_end(monkeypatch):
    clock = SimpleNamespace(now=7.0)
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: clock.now)
    waits = []

    def work():
        waits.append("work")
        clock.now += 0.25

    def run(cuda: bool):
        waiting = SimpleNamespace(cuda=cuda)
        waiting.wait = partial(Run.wait, waiting)
        return waiting

    assert Run.milliseconds(run(False), work) == 250.0
    # on a GPU a call returns before its work is done
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    assert Run.milliseconds(run(True), work) == 250.0
    assert waits == ["work", "wait", "work", "wait"]


def test_a_cost_is_measured_in_pairs_that_take_turns():
    machine = Machine(lambda name, n: 5.0 if name == "on" else 3.0)
    activity = machine.cost()
    assert (activity.cost_ms, activity.cost_interval) == (2.0, [2.0, 2.0])
    pairs = list(zip(machine.timed[::2], machine.timed[1::2], strict=True))
    assert len(pairs) == train_gpt.COST_PAIRS
    assert pairs[:4] == [("off", "on"), ("on", "off"), ("off", "on"), ("on", "off")]
    # what the first call of each sets up is not timed
    assert machine.calls[:2] == ["on", "off"] and len(machine.calls) == len(machine.timed) + 2


def test_a_cost_is_of_a_step_and_not_of_a_micro_batch():
    activity = Machine(lambda name, n: 5.0 if name == "on" else 3.0).cost(times=4)
    assert (activity.cost_ms, activity.cost_interval) == (8.0, [8.0, 8.0])


def test_a_machine_that_slows_down_makes_no_cost():
    """Each timing takes 10 ms more than the one before: -326 ms, one after the other."""
    activity = Machine(lambda name, n: 100.0 + 10 * n).cost()
    low, high = activity.cost_interval
    assert low < 0 < high
    row = activity.row(1)
    assert train_gpt.cost_text(row) == "not distinguishable (-10.00 to 10.00)"
    train_gpt.sum_up_cost(activity, 1, [0.1])
    assert activity.cost_seconds is None and activity.steps_lost is None


def test_one_stall_makes_no_cost():
    activity = Machine(lambda name, n: 900.0 if n == 4 else 5.0 if name == "on" else 3.0).cost()
    assert (activity.cost_ms, activity.cost_interval) == (2.0, [2.0, 2.0])


def test_a_cost_beyond_the_noise_is_found_and_summed_up():
    noise = random.Random(1)
    activity = Machine(lambda name, n: (5.0 if name == "on" else 3.0) + noise.gauss(0, 0.3)).cost()
    low, high = activity.cost_interval
    assert 1 < low < activity.cost_ms < high < 3
    train_gpt.sum_up_cost(activity, 500, [0.1, 0.2, 0.9])
    assert activity.cost_seconds == pytest.approx(activity.cost_ms / 2)  # 500 times
    assert activity.steps_lost == pytest.approx(activity.cost_seconds / 0.2)
    text = f"{activity.cost_ms:.2f} ms a step ({low:.2f} to {high:.2f})"
    assert train_gpt.cost_text(activity.row(500)) == text


def test_what_would_take_too_long_is_left_out_after_one_pair():
    most = 1e3 * train_gpt.COST_SECONDS / train_gpt.COST_PAIRS / 2  # milliseconds of one repeat
    assert Machine(lambda name, n: 0.9 * most).cost().cost_ms == 0
    machine = Machine(lambda name, n: 1.1 * most)
    activity = machine.cost()
    assert activity.cost_ms is None and activity.cost_interval is None
    assert machine.calls == ["on", "off"] and not machine.timed
    assert train_gpt.cost_text(activity.row(1)) == "not measured" and not machine.warnings


def test_a_first_pair_that_compiles_says_nothing_about_the_others(monkeypatch):
    """It takes an hour; only the second one tells how long the others will take."""
    graphs = torch._dynamo.utils.counters["stats"]
    monkeypatch.setitem(graphs, "unique_graphs", 7)

    class Compiling(Machine):
        def milliseconds(self, work) -> float:
            if not self.calls:
                graphs["unique_graphs"] += 1
            return super().milliseconds(work)

    assert Compiling(lambda name, n: 3.6e6 if n == 0 else 5.0).cost().cost_ms == 0
    slow = Compiling(lambda name, n: 1e3 * train_gpt.COST_SECONDS)
    assert slow.cost().cost_ms is None and slow.timed == ["off", "on"]


def test_all_ranks_go_by_the_clock_of_rank_0():
    """This one is slow, rank 0 is not: it tells 6 ms for each pair, then its differences."""
    told = iter([0.006, 0.006, [2.0] * train_gpt.COST_PAIRS])
    machine = Machine(lambda name, n: 1e9, told=lambda value: next(told))
    activity = machine.cost()
    assert activity.cost_ms == 2.0 and len(machine.timed) == 2 * train_gpt.COST_PAIRS


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("inductor")]
)
@pytest.mark.parametrize("place", [1, 2, 9])
def test_a_cost_that_fails_is_not_measured_and_ends_nothing(error, place):
    """Memory that is too small for a second model, a compiler that fails: with or after a pair."""
    machine = Machine(lambda name, n: 5.0)
    work = machine.work

    def failing(name: str):
        def call():
            work(name)()
            if len(machine.calls) == place:
                raise error

        return call

    machine.work = failing
    activity = machine.cost()
    assert activity.cost_ms is None and len(machine.calls) == place
    (warning,) = machine.warnings
    assert warning.startswith(f"X: its cost is not measured: {type(error).__name__}: {error}")


def test_a_mistake_of_the_code_and_a_signal_are_no_lack_of_memory():
    for error in (TypeError("x"), train_gpt.Refusal("stopped", 143)):

        def broken(error=error):
            raise error

        with pytest.raises(type(error)):
            Run.fails(Machine(None), broken)


def test_the_steps_of_the_run_are_compared_where_there_are_enough():
    seconds = [0.1] * 15 + [0.3] * 15
    activity = Activity(steps=[*range(15, 30)])
    train_gpt.compare_steps(activity, seconds)
    assert (activity.step_ms_without, activity.step_ms_with) == (100.0, 300.0)
    assert train_gpt.steps_text(activity.row(30)) == "100.0 ms, 300.0 ms"
    always = Activity(steps=[*range(25)])  # 5 without are too few
    train_gpt.compare_steps(always, seconds)
    assert always.step_ms_with is None and train_gpt.steps_text(always.row(30)) is None


def test_on_a_gpu_an_average_takes_its_time_in_the_step_after(tiny, monkeypatch):
    """It is queued behind the sync of its step: snapshots at 1, 3, 5 make 2, 4, 6 longer."""
    seconds = [0.1, 0.1] + [0.3, 0.1] * 14
    on_a_gpu = SimpleNamespace(activity={"SWA": Activity(steps=[*range(1, 29, 2)])}, cuda=True)
    average = SimpleNamespace(every_step=False, update=None)
    trainer = SimpleNamespace(
        averages=SimpleNamespace(on={"swa": average}), step_seconds=seconds, model=None
    )
    trained = SimpleNamespace(trainer=trainer, averages={"swa": {}})
    probe = SimpleNamespace(
        nats=lambda *_: 0, measure=lambda *_: None, base=0, begin=lambda _: None
    )
    monkeypatch.setattr(train_gpt, "measure_cost", lambda *_: None)
    for cuda, found in ((True, (100.0, 300.0)), (False, (300.0, 100.0))):
        on_a_gpu.cuda = cuda
        train_gpt.prove_averages(on_a_gpu, trained, probe)
        row = on_a_gpu.activity["SWA"]
        assert (row.step_ms_without, row.step_ms_with) == pytest.approx(found)


def test_all_that_may_be_compiled_of_the_forward_pass_stays_below_the_limit(tiny):
    cfg = tiny(compile="1", val_max_tokens=1500)
    trainer = make_trainer(cfg)
    sheet = train_gpt.ScoreSheet(cfg, trainer.run, trainer.val, 0)
    n, length, stride = trainer.val.n, cfg.window, cfg.eval_stride
    fixed = train_gpt.windows(0, n, length, 0)
    ways = [
        train_gpt.windows(0, n, length, stride),
        train_gpt.document_windows(trainer.val, length, stride),
    ]
    shapes = [np.unique(sheet.shapes(rows), axis=0) for rows in (fixed, *ways)]
    scored = len(np.unique(np.concatenate(shapes), axis=0))
    assert len(shapes[0]) == 1 and scored >= 2
    # trained on micro-batches of two sizes and three lengths, and scored, at three numbers of
    # loops; scored in every way; without each part
    graphs = 3 * (2 * 3 + len(shapes[0])) + scored + len(train_gpt.MODEL_TOGGLES)
    assert graphs < train_gpt.RECOMPILE_LIMIT == torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("patience, measured", [(1e9, True), (-1.0, False)])
def test_a_compiled_run_measures_what_it_compiled(tiny, monkeypatch, patience, measured):
    """Stands in for the compiler: what is called, and how often, is all that is asked here."""
    made = []

    def compiled(model, **options):
        made.append(SimpleNamespace(model=model, calls=0, trained=0))
        here = made[-1]

        def call(*inputs, **named):
            here.calls += 1
            here.trained += torch.is_grad_enabled()
            return model(*inputs, **named)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(train_gpt, "COMPILE_SECONDS", patience)
    monkeypatch.setattr(train_gpt, "COST_SECONDS", math.inf)
    cfg = tiny(compile="1", bigram_vocab_size=64, bigram_dim=8)
    report = main(cfg)
    models = [m for m in made if isinstance(m.model, train_gpt.GPT)]
    without = [m.calls for m in models[2:]]
    each = train_gpt.COST_PAIRS + 1
    assert without == [each] * 2 * measured
    for name in ("SMEAR_GATE", "BIGRAM_VOCAB_SIZE"):
        row = report["toggles"][name]
        assert row["scope"] == "the model, compiled" and row["active"]
        assert (row["cost_ms"] is not None) == measured
    assert models[0].trained == 1 + 6 + 2 * each * measured  # the warm-up, the steps, "on"

    # A last step that is left out has a loss of NaN: what trained has been compiled all the same
    work = train_gpt.Trainer.backward

    def backward(trainer, batch):
        work(trainer, batch)
        if trainer.steps == 5:
            trainer.flat.loss.fill_(math.nan)

    monkeypatch.setattr(train_gpt.Trainer, "backward", backward)
    skipping = dataclasses.replace(cfg, run_id="skips", nonfinite="skip")
    report = main(skipping)
    assert report["skipped"] == [5]
    assert (report["toggles"]["SMEAR_GATE"]["cost_ms"] is not None) == measured

    # A launch that only exports again compiles nothing that trains
    del made[:]
    main(dataclasses.replace(cfg, run_id="again", checkpoint=str(folder(cfg) / "checkpoint.bin")))
    assert not any(m.trained for m in made)


def test_a_proof_that_runs_out_of_memory_costs_no_result(tiny, monkeypatch):
    """A view that fails half-way, and a second model that does not fit: the scores stand."""
    monkeypatch.setattr(train_gpt, "COST_SECONDS", math.inf)
    late = dict(qat_start_kind="iter_frac", qat_start=0.5, qna_enabled=True)
    cfg = tiny(qat_enabled=True, **late, ema_enabled=True, ema_decay=0.9)
    plain = main(cfg)
    leave = train_gpt.WeightViews.leave

    def failing(views, latent):
        calls.append("leave")
        if len(calls) == 2:  # the first belongs to the effect
            raise torch.OutOfMemoryError("CUDA out of memory")
        leave(views, latent)

    def no_room(probe, forward, model):
        def run_once():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run_once

    prove = train_gpt.prove_toggles

    def prove_with_little(*given):
        monkeypatch.setattr(train_gpt.WeightViews, "leave", failing)
        prove(*given)

    monkeypatch.setattr(train_gpt, "prove_toggles", prove_with_little)
    monkeypatch.setattr(Probe, "both_ways", no_room)
    calls = []
    report = main(dataclasses.replace(cfg, run_id="small"))
    assert report["exit_code"] == 0 and (folder(cfg).parent / "small" / "result.json").exists()
    for name in ("QAT", "SMEAR_GATE"):
        row = report["toggles"][name]
        assert row["cost_ms"] is None and row["effect"] == plain["toggles"][name]["effect"]
        assert any(text.startswith(f"{name}: its cost is not") for text in report["warnings"])
    for name in ("QNA", "EMA"):
        row = report["toggles"][name]
        assert row["cost_ms"] is not None and row["effect"] == plain["toggles"][name]["effect"]


def test_peak_memory_is_that_of_training_and_scoring(tiny, monkeypatch):
    """The proof holds a second model, whose need is none of the run's."""
    held = ["proof"]
    prove, score_all = train_gpt.prove_toggles, train_gpt.score_all
    patch = partial(monkeypatch.setattr, train_gpt)
    patch("score_all", lambda *given: (score_all(*given), held.append(7))[0])
    patch("prove_toggles", lambda *given: (prove(*given), held.append(9))[0])
    patch("peak_memory", lambda run: held[-1])
    assert main(tiny())["peak_memory_bytes"] == 7


# ── The machine ───────────────────────────────────────────────────────────────────────────────────
NVIDIA_SMI = """#!/bin/sh
case "$*" in *--id=GPU-7f3a*driver_version,power.limit,clocks.max.sm,clocks.max.memory*) ;;
  *) exit 6 ;; esac
"""
TOLD = {
    "driver": "550.54.15",
    "power_limit_w": "700.00",
    "max_sm_mhz": "1980",
    "max_memory_mhz": "2619",
}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name and this answer on the path."""

    def put(answer: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(NVIDIA_SMI + answer)
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    train_gpt.gpu_limits.cache_clear()
    yield put
    train_gpt.gpu_limits.cache_clear()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_result_has_the_driver_and_the_limits_of_its_gpu(nvidia_smi, monkeypatch, rank):
    nvidia_smi("echo '550.54.15, 700.00, 1980, 2619'")
    properties = SimpleNamespace(uuid="7f3a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    run = SimpleNamespace(cuda=True, rank=rank, dtype=torch.bfloat16, compile=True)
    assert train_gpt.environment(run)["gpu"] == (None if rank else TOLD)


@pytest.mark.parametrize(
    "answer", ["exit 9", "echo 550.54.15", "echo", r"printf '\377, 1, 2, 3'", "exec sleep 9"]
)
def test_an_nvidia_smi_that_does_not_answer_is_no_error(nvidia_smi, monkeypatch, answer):
    monkeypatch.setattr(train_gpt, "NVIDIA_SMI_SECONDS", 0.3)
    nvidia_smi(answer)
    assert train_gpt.gpu_limits("7f3a") is None


def test_without_nvidia_smi_there_are_no_limits(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train_gpt.gpu_limits.__wrapped__("7f3a") is None


# ── Effects of whole runs ─────────────────────────────────────────────────────────────────────────
def in_nats(report: dict, name: str) -> float:
    return report["scores"][name]["loss"]


def test_the_effect_of_an_average_is_what_the_scores_say(tiny, monkeypatch):
    monkeypatch.setattr(train_gpt, "COST_SECONDS", math.inf)
    report = main(tiny(**WHOLE, ema_enabled=True, ema_decay=0.999))
    row = report["toggles"]["EMA"]
    assert report["val_tokens"] == 1472
    worse = in_nats(report, "averaged") - in_nats(report, "live")
    assert row["effect"] == pytest.approx(worse, rel=1e-4) and worse > 0
    assert row["verdict"] == "worse" and row["unit"] == "nats"
    low, high = row["effect_interval"]
    assert 0 < low < row["effect"] < high and low + high == pytest.approx(2 * row["effect"])
    assert row["cost_per"] == "step" and len(row["cost_interval"]) == 2


def test_the_effect_and_the_cost_of_pruning(tiny, monkeypatch):
    monkeypatch.setattr(train_gpt, "COST_SECONDS", math.inf)
    plain, pruned = main(tiny(**WHOLE)), main(tiny(**WHOLE, prune_pct=0.5))
    row = pruned["toggles"]["PRUNE_PCT"]
    worse = in_nats(pruned, "quantised") - in_nats(plain, "quantised")
    assert row["effect"] == pytest.approx(worse, rel=1e-4)
    assert row["bytes_saved"] == plain["artifact_bytes"] - pruned["artifact_bytes"] > 0
    assert row["cost_per"] == "export" and row["cost_ms"] is not None
    assert row["steps_lost"] is None  # it is off the clock


def test_the_cost_of_snapshots_is_of_those_that_were_taken(tiny, monkeypatch):
    def milliseconds(run, work) -> float:
        work()
        return 1.0 if work is train_gpt.nothing else 3.0

    monkeypatch.setattr(Run, "milliseconds", milliseconds)
    cfg = tiny(swa_enabled=True, swa_every=2, swa_start_kind="always")
    row = main(cfg)["toggles"]["SWA"]
    assert row["cost_per"] == "snapshot" and row["last_step"] == 5
    assert row["cost_ms"] == 2.0 and row["cost_seconds"] == 3 * 2.0 / 1e3  # three snapshots
    assert row["steps_lost"] > 0


def test_what_is_timed_is_what_a_step_does(tiny, monkeypatch):
    """`on` takes a snapshot in, or puts the seen weights in and the latent ones back."""
    done = []

    def count(owner, name: str) -> None:
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: done.append(name) or work(*given))

    def measure(run, name, on, off=train_gpt.nothing, times=1) -> None:
        before = len(done)
        on()
        found.append((done[before:], off))

    count(train_gpt.Swa, "update")
    count(train_gpt.WeightViews, "enter")
    count(train_gpt.WeightViews, "leave")
    monkeypatch.setattr(train_gpt, "measure_cost", measure)
    found = []
    swa = dict(swa_enabled=True, swa_every=2, swa_start_kind="always")
    main(tiny(smear_gate=False, qat_enabled=True, **swa))
    assert found == [(["enter", "leave"], train_gpt.nothing), (["update"], train_gpt.nothing)]


def test_the_effect_of_a_part_of_the_model_is_with_it_minus_without(tiny):
    """A gate that is wide open mixes every token with the one before: much worse without need."""
    cfg = tiny(**WHOLE)
    trainer = make_trainer(cfg)
    trainer.train()
    with torch.no_grad():
        trainer.model.smear.gate.fill_(20.0)
    live = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trained = Trained(trainer, live, {}, live)
    probe = Probe(cfg, trainer.run, trained, trainer.val)
    train_gpt.prove_model_toggles(cfg, trainer.run, trained, probe, train_gpt.sdpa)
    row = trainer.run.activity["SMEAR_GATE"].row(6)
    assert row["effect"] > 0.01 and row["verdict"] == "worse"


# ── settings of the optimiser, a mask of a gate ──
def test_muons_settings_are_measured_by_the_updates_that_they_make(tiny, monkeypatch):
    """And one that changes none of them has done nothing."""
    cfg = tiny(muon_row_normalize=True, muon_coeffs="polar_express", iterations=3)
    report = main(cfg)
    rows = {name: report["toggles"][name] for name in train_gpt.MUON_TOGGLES}
    assert report["exit_code"] == 0 and len(rows) == 2
    for row in rows.values():
        assert row["active"] and row["verdict"] == "acted" and row["unit"] == "of the update"
        assert 0.01 < row["effect"] < 1 and (row["first_step"], row["last_step"]) == (0, 2)
        assert row["tensors"] == 6 * cfg.num_layers and row["params"] > 0
    assert rows["MUON_COEFFS"]["effect"] != rows["MUON_ROW_NORMALIZE"]["effect"]

    told = train_gpt.orthogonaliser

    def cut(cfg):
        return told(cfg) | dict(row_normalise=False)

    monkeypatch.setattr(train_gpt, "orthogonaliser", cut)
    report = main(dataclasses.replace(cfg, run_id="cut"))
    assert report["exit_code"] == 4 and report["inactive"] == ["MUON_ROW_NORMALIZE"]


def test_the_mask_of_a_gate_is_measured_where_there_is_a_gate(tiny):
    report = main(tiny(smear_mask_bos=True, iterations=2))
    row = report["toggles"]["SMEAR_MASK_BOS"]
    assert row["active"] and row["effect"] != 0 and row["params"] == 0
    report = main(tiny(smear_mask_bos=True, smear_gate=False, iterations=2))
    assert report["exit_code"] == 0 and "SMEAR_MASK_BOS" not in report["toggles"]


def test_a_way_of_scoring_is_compared_with_plain_scoring(tiny, monkeypatch):
    ttt = dict(ttt_mode="sgd", ttt_chunk_tokens=256, ttt_lr=0.5)
    report = main(tiny(**ttt, doc_isolated_eval=True))
    scores, plain = report["scores"], report["scores"]["sliding"]
    for name, toggle in (("documents", "DOC_ISOLATED_EVAL"), ("ttt", "TTT_MODE")):
        row = report["toggles"][toggle]
        effect = scores[name]["bpb"] - plain["bpb"]
        assert row["effect"] == effect and row["unit"] == "bpb"
        assert row["cost_seconds"] == scores[name]["seconds"] - plain["seconds"]
        low, high = row["effect_interval"]
        assert low < effect < high
        words = "not distinguishable"
        if low > 0 or high < 0:
            words = "better" if effect < 0 else "worse"
        assert row["verdict"] == words
    assert "blocks" not in plain


# ── Not finite ────────────────────────────────────────────────────────────────────────────────────
def test_an_effect_of_nan_is_not_active_and_is_told(tiny, monkeypatch):
    """An average that is collected, not shipped, and full of NaN."""
    collect = train_gpt.collect_averages

    def poisoned(*arguments):
        trained = collect(*arguments)
        for w in trained.averages["ema"].values():
            w.fill_(math.nan)
        return trained

    monkeypatch.setattr(train_gpt, "collect_averages", poisoned)
    cfg = tiny(ema_enabled=True, average="none")
    report = main(cfg)
    row = report["toggles"]["EMA"]
    assert (row["active"], row["verdict"], row["effect"]) == (False, "not finite", None)
    assert report["inactive"] == ["EMA"] and report["exit_code"] == 4
    text = "INACTIVE: EMA was requested and its effect is not finite"
    assert text in (folder(cfg) / "train.log").read_text()
    json.dumps(report, allow_nan=False)


def test_a_score_that_is_not_finite_ends_the_run(tiny):
    with pytest.raises(train_gpt.Refusal, match=r"score ttt: .* not finite; lower TTT_LR") as error:
        main(tiny(ttt_mode="sgd", ttt_chunk_tokens=256, ttt_lr=1e38))
    assert error.value.code == 5


# ── Ranks ─────────────────────────────────────────────────────────────────────────────────────────
def probe_nats(rank: int, world: int, cfg) -> tuple:
    trainer = make_trainer(cfg)
    live = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    probe = Probe(cfg, trainer.run, Trained(trainer, live, {}, live), trainer.val)
    return probe.base, probe.targets.numel()


def test_two_ranks_share_the_probe_and_find_the_same(data, tmp_path):
    def cfg(world: int):
        paths = dict(
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            logs_dir=str(tmp_path),
        )
        return train_gpt.Config(**TINY | paths | dict(run_id=f"probe{world}"))

    first, second = on_ranks(2, tmp_path, probe_nats, cfg(2))
    alone, tokens = probe_nats(0, 1, cfg(1))
    assert first == second and first[1] == tokens == 23 * 64
    assert first[0] == pytest.approx(alone, rel=1e-5)
    assert statistics.stdev(alone) > 0 and len(alone) == train_gpt.BLOCKS


def cost_on_a_rank(rank: int, world: int, cfg) -> tuple:
    """The last rank alone runs out of memory in the fourth call; then a toggle that all measure."""
    train_gpt.COST_PAIRS = PAIRS_OF_A_RUN
    run = Run(cfg)
    run.activity = {"A": Activity(), "B": Activity()}
    calls = []

    def on():
        calls.append("on")
        if rank == world - 1 and len(calls) == 4:
            raise torch.OutOfMemoryError("here")

    measure_cost(run, "A", on)
    in_a = len(calls)
    measure_cost(run, "B", partial(calls.append, "on"))
    costs = [activity.cost_ms is not None for activity in run.activity.values()]
    return in_a, costs, run.warnings


def test_a_rank_that_runs_out_of_memory_leaves_no_other_waiting(data, tmp_path):
    paths = dict(
        data_path=str(data),
        tokenizer_path=str(data / "tokenizer.model"),
        logs_dir=str(tmp_path),
    )
    cfg = train_gpt.Config(**TINY | paths | dict(run_id="costs"))
    found = on_ranks(2, tmp_path, cost_on_a_rank, cfg)
    assert [(in_a, costs) for in_a, costs, _ in found] == [(4, [False, True])] * 2
    assert "another rank could not" in found[0][2][0] and "OutOfMemoryError: here" in found[1][2][0]


@pytest.mark.parametrize("val_tokens, batch, rows", [(1500, 512, 23), (1500, 64, 8), (40, 512, 1)])
def test_the_probe_is_spread_over_the_validation_text(tiny, val_tokens, batch, rows):
    cfg = tiny(val_max_tokens=val_tokens, train_batch_tokens=batch)
    trainer = make_trainer(cfg)
    live = dict(trainer.model.named_parameters())
    probe = Probe(cfg, trainer.run, Trained(trainer, live, {}, live), trainer.val)
    length = min(64, val_tokens)
    assert probe.ids.shape == probe.targets.shape == (rows, length)
    assert torch.equal(probe.ids[:, 1:], probe.targets[:, :-1])
    tokens = trainer.val.tokens
    first = [row * (val_tokens // length) // rows * length for row in range(rows)]
    assert [int(ids[0]) for ids in probe.ids] == [int(tokens[place]) for place in first]
    assert probe.micro_batch[0].shape == (batch // 64, 64)

"""Loops that begin late and rows that grow: in training, and nothing of them compiles on its clock.

Would have caught: a switch read inside a compiled graph, and so folded to off (the late QAT of
#315); records whose ranks flip a loop one step apart, each by its own clock; a momentum that the
warm-up leaves behind (#1855).
"""

import functools
import itertools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_optimiser import make_trainer
from torch._dynamo.utils import counters

import train_gpt
from train_gpt import Form, Schedule, main

STAGES = dict(
    num_layers=3,
    num_loops=2,
    loop_start=1,
    loop_end=1,
    enable_looping_at=0.25,
    loop_phase2_at=0.5,
    train_seq_schedule="16@0.25,32@0.75,64@1",
    seq_change_warmup_steps=2,
    iterations=12,
    warmdown_iters=6,
    train_log_every=1,
)
FORMS = [Form(0, 16), Form(1, 32), Form(2, 32), Form(2, 64)]
TAKEN = [FORMS[0]] * 3 + [FORMS[1]] * 3 + [FORMS[2]] * 3 + [FORMS[3]] * 3


def events(cfg, kind: str) -> list[dict]:
    lines = (Path(cfg.logs_dir) / cfg.run_id / "metrics.jsonl").open()
    return [told for told in map(json.loads, lines) if told["event"] == kind]


@pytest.fixture(scope="module")
def staged(data, tmp_path_factory):
    """(cfg, report, log, loops of each call of score) of a run with all of them."""
    from conftest import TINY

    knobs = dict(
        **STAGES,
        val_loss_every=3,
        min_lr=0.5,
        ema_enabled=True,
        ema_decay=0.5,
        wd_taper_final_mult=0.5,
        wd_taper_start_frac=0.5,
        data_path=str(data),
        tokenizer_path=str(data / "tokenizer.model"),
        logs_dir=str(tmp_path_factory.mktemp("staged")),
        run_id="r",
    )
    cfg = train_gpt.Config(**TINY | knobs)
    scored = []
    score = train_gpt.score

    def noting(cfg, run, forward, *rest):
        scored.append(forward.loops)
        return score(cfg, run, forward, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "score", noting)
        patch.setattr(train_gpt, "tells_apart", lambda interval: True)  # so that costs are summed
        report = main(cfg)
    log = (Path(cfg.logs_dir) / "r" / "train.log").read_text()
    return SimpleNamespace(cfg=cfg, report=report, log=log, scored=scored)


def test_each_step_has_the_loops_and_the_rows_of_its_time(staged):
    steps = events(staged.cfg, "step")
    assert [Form(e["loops"], e["length"]) for e in steps] == TAKEN
    assert [e["rewarm"] for e in steps] == [1, 1, 1, 0.5, 1, 1, 1, 1, 1, 0.5, 1, 1]
    decay = [min(max((12 - step) / 6, 0.5), 1) for step in range(12)]
    assert [e["lr_scale"] for e in steps] == pytest.approx(
        [scale * e["rewarm"] for scale, e in zip(decay, steps, strict=True)]
    )


def test_what_acts_late_says_so_and_is_measured(staged):
    assert staged.report["exit_code"] == 0
    rows = staged.report["toggles"]
    found = {name: (rows[name]["first_step"], rows[name]["last_step"]) for name in rows}
    assert found["NUM_LOOPS"] == (3, 11) and found["TRAIN_SEQ_SCHEDULE"] == (0, 8)
    assert found["WARMDOWN"] == (7, 11) and found["MIN_LR"] == (10, 11)
    assert found["WD_TAPER"] == (7, 11)
    effects = {name: rows[name]["effect"] for name in found}
    assert effects["TRAIN_SEQ_SCHEDULE"] == 32 - 64
    # without the floor the last of 6 steps of decay has 1/6
    assert effects["MIN_LR"] == pytest.approx(0.5 - 1 / 6) and effects["WARMDOWN"] == -0.5
    assert effects["WD_TAPER"] == pytest.approx(-0.5 * 5 / 6)
    assert abs(effects["NUM_LOOPS"]) > 0 and all(row["active"] for row in rows.values())
    starts = re.findall(r"^([\w ]+) from step (\d+) \(", staged.log, re.M)
    # one line for an event: the stage's alone
    assert [(name, int(step)) for name, step in starts if "acts" not in name] == [
        ("1 loop", 3),
        ("rows of 32", 3),
        ("2 loops", 6),
        ("rows of 64", 9),
    ]
    assert {name for name, _ in starts if "acts" in name}.isdisjoint(
        {"NUM_LOOPS acts", "TRAIN_SEQ_SCHEDULE acts"}
    )


def test_a_step_of_fewer_loops_costs_its_part_of_all(staged):
    schedule = Schedule(staged.cfg)
    schedule.restore({"1 loop": 3, "rows of 32": 3, "2 loops": 6, "rows of 64": 9})
    assert schedule.late_loops.in_full(range(12), schedule.fired) == 3 / 2 + 6
    row = staged.report["toggles"]["NUM_LOOPS"]
    assert row["cost_seconds"] == pytest.approx(row["cost_ms"] * 7.5 / 1e3)


def test_a_run_that_ends_before_its_loops_is_scored_with_them_and_says_that_they_never_came(tiny):
    knobs = dict(num_loops=1, loop_start=0, loop_end=0, looping_kind="steps")
    trainer = make_trainer(tiny(**knobs, enable_looping_at=100, iterations=2))
    trainer.train()
    assert trainer.schedule.plan(2, 0.0).loops == 0 and trainer.model.loops == 1
    assert trainer.schedule.missing() == {"NUM_LOOPS": "1 loop"}


def test_the_cost_of_a_part_says_for_which_steps_it_holds(staged):
    """All are counted so, whatever loops and rows the early ones had."""
    rows = staged.report["toggles"]
    parts = [rows[name]["scope"] for name in ("SMEAR_GATE", "NUM_LOOPS")]
    assert parts == ["the model, eager, steps as with 2 loops in rows of 64"] * 2


def test_validation_scores_the_model_of_then_and_the_result_that_with_all_loops(staged):
    # warm-up: each number of loops once; then steps 3, 6, 9, 12; then what was trained
    warm, rest = staged.scored[:3], staged.scored[3:]
    assert warm == [0, 1, 2] and rest[:4] == [0, 1, 2, 2] and {*rest[4:]} == {2}
    told = re.findall(r"^step +(\d+)  val bpb [\d.]+ \((.*?)\)", staged.log, re.M)
    assert told == [
        ("3", "live, fixed windows, 0 of 2 loops"),
        ("6", "live, fixed windows, 1 of 2 loops"),
        ("9", "live, fixed windows"),
        ("12", "live, fixed windows"),
    ]


def test_the_warm_up_takes_steps_of_each_form_and_leaves_nothing(tiny):
    cfg = tiny(**STAGES, val_loss_every=3)
    trainer = make_trainer(cfg)
    weights = trainer.flat.weights.clone()
    seconds = trainer.warm_up()
    assert {form: len(timed) for form, timed in seconds.items()} == dict.fromkeys(FORMS, 2)
    assert trainer.flat.weights.equal(weights) and trainer.steps == 0
    assert not trainer.optimiser.first_moments.any() and trainer.schedule.fired == {}
    assert trainer.model.loops == 2
    log = (trainer.run.dir / "train.log").read_text()
    told = "0 x 16, 1 x 32, 2 x 32, 2 x 64"
    assert f"WARMUP_STEPS=1: 8 are taken, 2 of each form (loops x tokens of a row: {told})" in log
    assert [len(timed) for timed in make_trainer(tiny()).warm_up().values()] == [1]


@pytest.mark.parametrize("knobs", [{}, dict(qna_enabled=True)], ids=str)
@pytest.mark.parametrize("forms", [1, 2, 4])
def test_the_warm_up_takes_each_form_with_each_variant_of_a_step(tiny, forms, knobs):
    """Two variants and two forms took turns: no loop ever met the step without QAT."""
    late = dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.1)
    stages = {1: {}, 2: STAGES | dict(train_seq_schedule="", loop_phase2_at=0), 4: STAGES}[forms]
    trainer = make_trainer(tiny(**stages, **late, **knobs))
    taken = []
    trainer.step = lambda batch, now: taken.append((Form(now.loops, now.length), now.qat, now.qna))
    trainer.warm_up()
    variants = {(True, 0.0), (False, 0.0), *({(False, 1.0)} if knobs else ())}
    known = trainer.schedule.forms()
    assert {*taken} == {(form, *variant) for form in known for variant in variants}
    assert len(known) == forms and len(taken) == forms * len(variants)


def test_the_speed_after_50_steps_is_that_of_the_forms_that_they_had(tiny):
    """96 ms, with loops from step 45 on 141: 4,269 steps fit; by the last form alone, 5,984."""
    loops = dict(num_layers=3, num_loops=2, loop_start=1, loop_end=1, looping_kind="steps")
    budget = dict(iterations=10**5, max_wallclock_seconds=600.0, enable_looping_at=45)
    trainer = make_trainer(tiny(**loops, **budget))
    usual = {0: 0.096, 2: 0.141}
    trainer.usual = {form: usual[form.loops] for form in trainer.schedule.forms()}
    for trainer.steps in range(50):
        now = trainer.schedule.at(trainer.steps, trainer.elapsed)
        # a tenth slower than in the warm-up
        trainer.step_seconds.append(1.1 * usual[now.loops])
        trainer.elapsed += trainer.step_seconds[-1]
    trainer.steps = 50
    trainer.report(now)
    log = (trainer.run.dir / "train.log").read_text()
    told = int(re.search(r"schedule \(measured speed\): (\d+) steps", log)[1])
    assert told == int(45 + (600 - 45 * 0.1056) / 0.1551)


@pytest.mark.parametrize("loader", ["rows", "documents"])
def test_nothing_compiles_on_the_clock_in_any_form(tiny, monkeypatch, loader):
    """Loops in two phases, rows of three lengths, QNA, then QAT, SWA, validation in between."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    stages = STAGES | dict(
        num_layers=2,
        qna_enabled=True,
        qat_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.4,
        swa_enabled=True,
        swa_start_kind="time_frac",
        swa_start_frac=0.6,
        swa_every=1,
        val_loss_every=2,
    )
    cfg = tiny(**stages, compile="1", loader=loader, doc_mask=loader == "documents")
    trainer = make_trainer(cfg)
    taken = []
    step = trainer.step

    def noting(batch, now):
        taken.append(Form(now.loops, now.length))
        assert batch[0].shape[1] == (now.length if loader == "rows" else 512)
        step(batch, now)

    trainer.step = noting
    trainer.train()
    assert taken[-12:] == TAKEN and trainer.run.compile
    assert trainer.recompiles == 0 and not counters["graph_break"]
    acted = {name for name, toggle in trainer.run.activity.items() if toggle.steps}
    assert acted >= {"QNA", "QAT", "SWA", "NUM_LOOPS", "TRAIN_SEQ_SCHEDULE"}
    torch._dynamo.reset()


def test_without_loops_and_growing_rows_a_step_has_one_form(tiny):
    assert Schedule(tiny()).forms() == [Form(0, 64)]


# ── One clock on all ranks ────────────────────────────────────────────────────────────────────────
def on_two_ranks(tiny, seconds: list[list[float]], **knobs) -> tuple[list, list, int]:
    """(elapsed after each step, seconds of each step) as either rank has them; messages.

    seconds: of each step, on the clock of each rank. The run goes on until they or its budget end.
    """
    messages = []
    with_gradients = []
    elapsed = []
    timed = []
    for rank, clock in enumerate(seconds):
        trainer = make_trainer(tiny(iterations=len(clock), **knobs))
        trainer.run.world, trainer.run.rank = 2, rank
        trainer.run.tick = functools.partial(next, itertools.accumulate(clock))
        heard, brought = iter(messages), iter(with_gradients)

        def broadcast(own, rank=rank, heard=heard):
            if rank == 0:
                messages.append(own)
            return own if rank == 0 else next(heard)

        def reduce(clip, rank=rank, flat=trainer.flat, brought=brought):
            if rank == 0:
                with_gradients.append(flat.ends / 2)
            flat.seen.copy_(with_gradients[-1] if rank == 0 else next(brought))

        def report(now, trainer=trainer, after=elapsed):
            after[-1].append(trainer.elapsed)

        elapsed.append([])
        trainer.run.broadcast, trainer.flat.reduce, trainer.report = broadcast, reduce, report
        trainer.backward = trainer.optimiser.step = trainer.take_in = lambda _: None
        rows = torch.zeros(8, 64)
        trainer.loop(SimpleNamespace(next=lambda length, rows=rows: (rows, rows)))
        elapsed[-1].append(trainer.elapsed)
        timed.append(trainer.step_seconds)
    return elapsed, timed, len(messages)


NOISY = [[random.Random(rank).uniform(0.09, 0.11) for _ in range(500)] for rank in range(2)]


def test_all_ranks_go_by_the_clock_of_rank_0_which_the_gradients_bring(tiny):
    (one, other), (timed, others), messages = on_two_ranks(tiny, NOISY)
    assert one == other and timed == others == pytest.approx(NOISY[0], rel=1e-4)
    true = [*itertools.accumulate(NOISY[0])]
    # at once until a typical step is known, and at the end
    assert one[:10] == pytest.approx(true[:10]) and one[-1] == true[-1] and messages == 11
    assert max(abs(a - b) for a, b in zip(one, true, strict=True)) < 0.02


def test_a_stall_is_seen_a_step_later(tiny):
    clock = [0.1] * 100
    clock[45] = 30.0
    (one, other), *_ = on_two_ranks(tiny, [clock, [0.1] * 100])
    true = [*itertools.accumulate(clock)]
    late = [step for step, (a, b) in enumerate(zip(one, true, strict=True)) if abs(a - b) > 0.05]
    assert one == other and late == [45]


def test_the_last_ten_seconds_of_a_budget_are_exact(tiny):
    budget = sum(NOISY[0])
    (one, _), (timed, _), messages = on_two_ranks(tiny, NOISY, max_wallclock_seconds=budget)
    true = [*itertools.accumulate(timed)]
    late = [n for n, elapsed in enumerate(true) if elapsed > budget - 9]
    assert len(late) > 80 and [one[n] for n in late] == pytest.approx([true[n] for n in late])
    assert messages == pytest.approx(10 + 100, abs=10)


@pytest.mark.parametrize("slow", [2.0, 3.0, 5.0])
def test_steps_that_become_slow_before_the_last_ten_seconds_end_within_the_budget(tiny, slow):
    """From 0.1 s: counted as typical ones for a second, they overran by 3 and 10 s."""
    clock = [0.1] * 300 + [slow] * 20
    for budget in (40.7, 41.7):
        (one, other), *_ = on_two_ranks(tiny, [clock, clock], max_wallclock_seconds=budget)
        assert one == other and budget - 2.2 * slow < one[-1] <= budget


def test_a_checkpoint_holds_the_seconds_of_all_steps(tiny):
    """Of the last one, too, which no gradients have brought."""
    trainer = make_trainer(tiny(max_wallclock_seconds=600.0))
    trainer.run.world = 2
    trainer.run.broadcast = lambda own: own
    clock = [0.1] * 15 + [30.0]
    trainer.run.tick = functools.partial(next, itertools.accumulate(clock))
    for seconds in clock:
        trainer.count_seconds()
        trainer.steps += 1
        if seconds == 0.1 and trainer.own_elapsed:
            trainer.take_over(trainer.own_elapsed)
    assert trainer.elapsed < sum(clock) - 20
    trainer.save()
    progress = trainer.facts()["progress"]
    assert progress["step_seconds"] == pytest.approx(clock)
    assert progress["elapsed"] == trainer.saved == sum(clock)

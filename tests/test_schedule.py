"""The schedule is a pure function of (steps done, training seconds), checked on a simulated clock.

Failures that these tests would have caught: warm-down, SWA and QAT configured but never reached
because fewer steps fit the budget (#1681, #48, #145's fixed step 6,000); the same WARMDOWN_ITERS
decaying from step 1 on one GPU and never on eight (#1107); step-time jitter switching QAT on and
off (#1002); runs of 601 s and more against a cap of 600 s (#1908, #1956); noise and QAT on the same
weights at once (#975).
"""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    Config,
    Forecast,
    Form,
    Refusal,
    Schedule,
    StepPlan,
    averaging_warnings,
    budget_spent,
    careful_step,
    forecast,
    timeline,
    typical_step,
)

# What #1855's schedule gives
GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimiser.json").read_text())
UNCAPPED = dict(iterations=10**6)
SPEEDS = pytest.mark.parametrize("speed", [0.5, 1.0, 3.0])
PLANNED = 0.09  # seconds per step at speed 1: 6,666 steps in 600 s


def drive(cfg: Config, seconds) -> tuple[list[StepPlan], float]:
    """The training loop on a simulated clock: every step's plan, and the seconds at the end.

    seconds: of a step, or a function of its plan.
    """
    schedule = Schedule(cfg)
    taken = []
    elapsed = 0.0
    while len(taken) < cfg.iterations and not budget_spent(cfg, len(taken), elapsed):
        now = schedule.at(len(taken), elapsed)
        taken.append(now)
        elapsed += seconds(now) if callable(seconds) else seconds
    return taken, elapsed


def steady(seconds: float):
    """The pace of a machine on which every step takes so long."""
    return lambda now: seconds


def first(taken: list[StepPlan], wanted) -> int:
    """The first step whose plan is wanted."""
    return next(step for step, now in enumerate(taken) if wanted(now))


def decays(now: StepPlan) -> bool:
    return now.lr_scale < 1


def quantises(now: StepPlan) -> bool:
    return now.qat


def averages(now: StepPlan) -> bool:
    return now.snapshot


def seeds_scale(budget: float, warmdown: int, step: int, elapsed: float) -> float:
    """The learning-rate scale as the seeds compute it."""
    step_seconds = elapsed / max(step, 1)
    length, remaining = warmdown * step_seconds, max(budget - elapsed, 0)
    return remaining / length if length and remaining <= length else 1.0


# ── Learning rate and momentum ────────────────────────────────────────────────────────────────────
@settings(deadline=None)
@given(
    step=st.integers(1, 30_000),
    elapsed=st.floats(0.001, 900),
    warmdown=st.integers(0, 5000),
    budget=st.floats(1, 900),
)
def test_the_learning_rate_is_the_seeds_wallclock_aware_formula(step, elapsed, warmdown, budget):
    cfg = Config(max_wallclock_seconds=budget, warmdown_iters=warmdown, **UNCAPPED)
    expected = seeds_scale(budget, warmdown, step, elapsed)
    assert Schedule(cfg).at(step, elapsed).lr_scale == pytest.approx(expected, abs=1e-9)


def test_the_first_step_has_the_full_learning_rate_whatever_the_warmdown():
    assert Schedule(Config(warmdown_iters=10**6)).at(0, 0.0).lr_scale == 1.0
    assert Schedule(Config(warmdown_frac=1.0)).at(0, 0.0).lr_scale == 1.0


@settings(deadline=None)
@given(
    step=st.integers(0, 20_000),
    elapsed=st.floats(0, 10_000),
    budget=st.floats(0, 900),
    frac=st.floats(0, 1),
    warmdown=st.integers(0, 30_000),
    ramp=st.integers(0, 3000),
)
def test_every_output_is_bounded_for_any_clock(step, elapsed, budget, frac, warmdown, ramp):
    cfg = Config(
        max_wallclock_seconds=budget,
        warmdown_frac=frac,
        warmdown_iters=warmdown,
        muon_momentum_warmup_steps=ramp,
    )
    now = Schedule(cfg).at(step, elapsed)
    assert 0 <= now.lr_scale <= 1 and 0.92 - 1e-12 <= now.momentum <= 0.99 + 1e-12
    # The same on every rank that is told the same time
    assert now == Schedule(cfg).at(step, elapsed)


@pytest.mark.parametrize(
    "step, momentum", [(0, 0.85), (125, 0.875), (250, 0.9), (500, 0.95), (19_999, 0.95)]
)
def test_the_momentum_rises_linearly_and_then_stays(step, momentum):
    cfg = Config(
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500
    )
    assert Schedule(cfg).at(step, step * PLANNED).momentum == pytest.approx(momentum)


def test_without_a_ramp_the_momentum_is_the_final_one_from_the_start():
    assert Schedule(Config(muon_momentum_warmup_steps=0)).at(0, 0.0).momentum == 0.99


@pytest.mark.parametrize("golden", GOLDEN["lr_schedule"], ids=lambda case: str(case["floor"]))
def test_the_learning_rate_and_its_floor_are_those_of_1855(golden):
    cfg = Config(
        warmdown_frac=golden["warmdown"], warmdown_iters=0, min_lr=golden["floor"], **UNCAPPED
    )
    found = [
        Schedule(cfg).at(1000 if done else 0, 600 * done).lr_scale for done in golden["progress"]
    ]
    assert found == pytest.approx(golden["multiplier"], abs=1e-12)


def test_the_momentum_is_that_of_1855():
    golden = GOLDEN["momentum_warmup"]
    cfg = Config(
        muon_momentum=golden["end"],
        muon_momentum_warmup_start=golden["start"],
        muon_momentum_warmup_steps=golden["steps"],
    )
    found = [Schedule(cfg).at(step, step * PLANNED).momentum for step in golden["step"]]
    assert found == pytest.approx(golden["momentum"], abs=1e-12)


@pytest.mark.parametrize("decay", [dict(warmdown_frac=0.5), dict(warmdown_iters=500)], ids=str)
def test_a_decay_to_a_floor_is_the_decay_to_zero_until_it_is_there(decay):
    steps = dict(iterations=1000, max_wallclock_seconds=0.0)
    whole, floored = (drive(Config(min_lr=low, **decay, **steps), 1.0)[0] for low in (0, 0.3))
    assert [now.lr_scale for now in floored] == [max(now.lr_scale, 0.3) for now in whole]
    assert floored[-1].lr_scale == 0.3 > whole[-1].lr_scale


def test_the_weight_decay_falls_as_in_1729():
    cfg = Config(wd_taper_start_frac=0.6, wd_taper_final_mult=0.25, **UNCAPPED)
    taken, _ = drive(cfg, 0.5)
    for step, now in enumerate(taken):
        late = min(max((0.5 * step / 600 - 0.6) / 0.4, 0.0), 1.0)
        assert now.wd_scale == pytest.approx(1 + (0.25 - 1) * late, abs=1e-9)
    assert [now._replace(wd_scale=1.0) for now in taken] == drive(Config(**UNCAPPED), 0.5)[0]
    begun = [now.wd_scale for now in drive(dataclasses.replace(cfg, wd_taper_start_frac=1), 1.0)[0]]
    assert {*begun} == {1.0}


# ── Speed: what a faster or slower machine does ───────────────────────────────────────────────────
PHASES = {
    "fractions of the run": dict(
        qat_start_kind="time_frac",
        qat_start=0.683,
        swa_start_kind="time_frac",
        swa_start_frac=0.814,
        warmdown_iters=0,
        warmdown_frac=0.453,
    ),
    "lr scale": dict(
        qat_start_kind="lr_scale", qat_start=0.7, swa_start_kind="lr_scale", swa_start_frac=0.4
    ),
}


@SPEEDS
@pytest.mark.parametrize("kind", PHASES)
def test_every_phase_fires_and_the_budget_holds_at_any_speed(kind, speed):
    cfg = Config(qat_enabled=True, swa_enabled=True, **PHASES[kind], **UNCAPPED)
    taken, total = drive(cfg, PLANNED / speed)
    warmdown, qat, swa = (first(taken, on) for on in (decays, quantises, averages))
    assert 0 < warmdown < qat < swa < len(taken)
    assert 600 - 2 * PLANNED / speed < total <= 600  # all of the budget, and no more
    assert taken[-1].lr_scale < 3 / 2500  # the decay ends at 0, not before and not above


@SPEEDS
def test_fractions_of_the_run_begin_at_that_share_of_the_time_at_any_speed(speed):
    cfg = Config(
        qat_enabled=True,
        swa_enabled=True,
        swa_every=1,
        **PHASES["fractions of the run"],
        **UNCAPPED,
    )
    taken, _ = drive(cfg, PLANNED / speed)
    begins = [first(taken, on) / len(taken) for on in (decays, quantises, averages)]
    assert begins == pytest.approx([1 - 0.453, 0.683, 0.814], abs=0.001)


@SPEEDS
def test_an_lr_scale_trigger_begins_where_the_specification_says(speed):
    taken, _ = drive(
        Config(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.7, **UNCAPPED),
        PLANNED / speed,
    )
    assert first(taken, quantises) / len(taken) == pytest.approx(
        1 - 0.7 * 3000 / len(taken), abs=0.001
    )


def test_a_warmdown_longer_than_the_run_decays_from_the_second_step():
    taken, _ = drive(Config(), 1.0)  # 600 steps fit, WARMDOWN_ITERS=3000
    assert taken[1].lr_scale == pytest.approx(599 / 3000) and taken[-1].lr_scale == pytest.approx(
        1 / 3000
    )


@pytest.mark.parametrize("slowdown", [1.06, 1.5, 3.0])
def test_steps_that_become_dearer_overrun_by_less_than_that_one_steps_extra(slowdown):
    cfg = Config(qat_enabled=True, qat_start_kind="time_frac", qat_start=0.683, **UNCAPPED)
    _, total = drive(cfg, lambda now: PLANNED * (slowdown if now.qat else 1))
    assert total <= 600 + PLANNED * (slowdown - 1)


@settings(deadline=None)
@given(st.floats(0.01, 50), st.floats(1, 900))
def test_the_budget_is_never_exceeded_at_a_steady_speed(seconds, budget):
    _, total = drive(Config(max_wallclock_seconds=budget, iterations=300), seconds)
    assert total <= budget * (1 + 1e-9) or total == seconds  # the first step is always taken


# ── The bound of ITERATIONS ───────────────────────────────────────────────────────────────────────
def test_a_run_without_a_budget_depends_on_steps_alone():
    cfg = Config(
        max_wallclock_seconds=0.0,
        iterations=1000,
        warmdown_iters=400,
        qat_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.25,
    )
    fast, slow = (drive(cfg, seconds)[0] for seconds in (1e-6, 1e6))
    assert fast == slow and len(fast) == 1000
    assert [now.lr_scale for now in fast] == pytest.approx(
        [min((1000 - step) / 400, 1) for step in range(1000)]
    )
    assert first(fast, quantises) == 250


def test_a_warmdown_without_a_budget_may_cover_the_first_step_too():
    assert (
        Schedule(Config(max_wallclock_seconds=0.0, iterations=1000, warmdown_iters=2000))
        .at(0, 0.0)
        .lr_scale
        == 0.5
    )


def test_iterations_that_end_before_the_budget_still_see_the_whole_schedule():
    cfg = Config(
        iterations=1000,
        warmdown_iters=300,
        qat_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.5,
        swa_enabled=True,
        swa_start_kind="lr_scale",
        swa_start_frac=0.4,
        swa_every=10,
    )
    taken, total = drive(cfg, PLANNED)
    assert len(taken) == 1000 and total == pytest.approx(90)
    assert first(taken, decays) == 701 and taken[-1].lr_scale == pytest.approx(1 / 300)
    assert first(taken, quantises) == 500
    # The scale is below 0.4 from step 881 on; after step 889, 890 are done
    assert first(taken, averages) == 889


def test_the_budget_ends_a_run_that_iterations_would_continue():
    taken, total = drive(Config(iterations=1000, max_wallclock_seconds=50.0), PLANNED)
    assert len(taken) == 555 and total <= 50


# ── Triggers ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "kind, value, start",
    [
        ("always", 0.0, 0),
        ("iter_frac", 0.30, 600),
        ("time_frac", 0.5, 1000),
        ("lr_scale", 0.7, 1301),
        ("lr_scale", 1.0, 1001),
    ],
)
def test_each_kind_of_trigger_starts_where_its_name_says(kind, value, start):
    cfg = Config(
        iterations=2000,
        max_wallclock_seconds=0.0,
        warmdown_iters=1000,
        qat_enabled=True,
        qat_start_kind=kind,
        qat_start=value,
    )
    assert first(drive(cfg, 1.0)[0], quantises) == start


def test_145s_fraction_of_iterations_is_its_step_6000():
    cfg = Config(qat_enabled=True, qat_start_kind="iter_frac", qat_start=0.30, iterations=20_000)
    assert first(drive(cfg, 0.0645)[0], quantises) == 6000


def test_a_trigger_that_fired_stays_on_when_a_stall_is_made_up_for():
    cfg = Config(
        qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.7, swa_enabled=True, swa_every=1
    )
    stalled, caught_up = (10, 300.0), (4000, 310.0)
    fresh, latched = Schedule(cfg).at(*caught_up), Schedule(cfg)
    # By itself this moment starts nothing
    assert not fresh.qat and not fresh.snapshot and fresh.lr_scale == 1.0
    assert latched.at(*stalled).qat
    later = latched.at(*caught_up)
    assert later.qat and later.snapshot and later.lr_scale == 1.0


@pytest.mark.parametrize("toggle", ["qat_enabled", "swa_enabled", "sqwa_enabled", "qna_enabled"])
def test_a_toggle_that_is_off_never_acts(toggle):
    on = {
        "qat_enabled": dict(qat_start_kind="lr_scale", qat_start=1.0),
        "swa_enabled": dict(swa_start_kind="always"),
        "sqwa_enabled": dict(swa_start_kind="always"),
        "qna_enabled": {},
    }[toggle]
    acts = [
        any(
            now.qat or now.snapshot or now.qna
            for now in drive(Config(**{toggle: requested}, **on), 0.5)[0]
        )
        for requested in (False, True)
    ]
    assert acts == [False, True]


@settings(deadline=None)
@given(
    kind=st.sampled_from(["lr_scale", "iter_frac", "time_frac"]),
    start=st.floats(0, 1),
    stop=st.floats(0, 1),
    seconds=st.floats(1, 20),
)
def test_noise_and_qat_never_act_in_the_same_step(kind, start, stop, seconds):
    cfg = Config(
        qna_enabled=True,
        qna_magnitude=2.0,
        qna_stop_scale=stop,
        qat_enabled=True,
        qat_start_kind=kind,
        qat_start=start,
        iterations=500,
        warmdown_frac=0.6,
    )
    for now in drive(cfg, seconds)[0]:
        assert not (now.qat and now.qna)
        assert now.qna == (0 if now.qat or now.lr_scale < stop else 2.0 * now.lr_scale)


def with_stalls(cfg: Config, stalls: dict[int, float], warmed: list[float]) -> list[StepPlan]:
    """The training loop at PLANNED seconds a step, but for these (step -> its seconds)."""
    schedule = Schedule(cfg)
    taken = []
    timed = []
    while not budget_spent(cfg, len(taken), sum(timed)):
        typical = typical_step(warmed + timed[-100:])
        taken.append(schedule.at(len(taken), sum(timed), typical))
        timed.append(stalls.get(len(timed), PLANNED))
    return taken


LATE = dict(qat_enabled=True, swa_enabled=True, swa_every=1, max_wallclock_seconds=200.0)
STALLS = {
    "no step is slow": {},
    "the first": {0: 4 * PLANNED},
    "the first by 1,000": {0: 1000 * PLANNED},
    "the first three": dict.fromkeys(range(3), 20 * PLANNED),
    "one amid the run": {700: 300 * PLANNED},
}


@pytest.mark.parametrize("warmed", [[], [PLANNED] * 19], ids=["WARMUP_STEPS=1", "20"])
@pytest.mark.parametrize("kind", ["lr_scale", "time_frac"])
@pytest.mark.parametrize("stalls", STALLS.values(), ids=STALLS)
def test_a_slow_step_fires_no_trigger(stalls, kind, warmed):
    """0.29 s for 0.0745 s switched QAT on from step 1. The mean without its stalls is no more
    than 1.25 times a step, so that nothing begins with more than 1.25 times its share left.
    """
    starts = {
        "lr_scale": dict(qat_start=0.7, swa_start_frac=0.4, warmdown_iters=1000),
        "time_frac": dict(qat_start=0.7, swa_start_frac=0.8, warmdown_iters=0),
    }[kind]
    cfg = Config(qat_start_kind=kind, swa_start_kind=kind, **LATE, **starts, **UNCAPPED)
    taken = with_stalls(cfg, stalls, warmed)
    left = [len(taken) - first(taken, on) for on in (quantises, averages)]
    usual = [700, 400] if kind == "lr_scale" else [0.3 * len(taken), 0.2 * len(taken)]
    for found, share in zip(left, usual, strict=True):
        assert share * 0.98 - 2 <= found <= share * 1.27


def test_until_ten_steps_are_timed_no_speed_is_known():
    cfg = Config(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.7)
    # 600 steps fit, so that the scale is 0.2 from the start
    assert quantises(Schedule(cfg).at(4, 4.0))
    taken = {
        n: first(with_stalls(cfg, {k: 1.0 for k in range(600)}, [1.0] * n), quantises)
        for n in (0, 3, 9, 19)
    }
    assert taken == {0: 10, 3: 7, 9: 1, 19: 1}
    assert typical_step([1.0] * 9) == 0
    assert typical_step([9.0] * 4 + [1.0] * 5 + [2.0]) == 1.5


def test_the_learning_rate_is_that_of_the_seeds_with_a_slow_first_step_too():
    cfg = Config(max_wallclock_seconds=600.0)
    taken = with_stalls(cfg, {0: 0.29}, [PLANNED] * 19)
    for step in (1, 2, 3, 100):
        elapsed = 0.29 + (step - 1) * PLANNED
        expected = seeds_scale(600.0, 3000, step, elapsed)
        assert taken[step].lr_scale == pytest.approx(expected, abs=1e-9)
    assert [step for step, now in enumerate(taken[:3000]) if now.lr_scale < 1] == [1]


# ── The end of the budget ─────────────────────────────────────────────────────────────────────────
def test_a_run_stops_while_a_slow_step_still_fits():
    """A step may take what the second slowest of the last 20 took, and a tenth more."""
    cfg = Config(max_wallclock_seconds=100.0)
    timed = [1.0] * 90 + [2.0, 1.0, 3.0]
    assert careful_step(timed) == pytest.approx(2.2) and careful_step([4.0]) == pytest.approx(4.4)
    assert careful_step([3.0] * 9 + [1.0] * 20) == pytest.approx(1.1)
    for elapsed, spent in ((97.7, False), (97.9, True)):
        assert budget_spent(cfg, 93, elapsed, careful_step(timed)) == spent
        assert not budget_spent(cfg, 93, elapsed)


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_a_noisy_run_hardly_ever_overruns_and_gives_no_more_than_a_slow_step_away(noise):
    """500 runs of 50 s at about 1 s a step; by the mean alone 13 % of the noisy ones overrun."""
    chance, budget, over = random.Random(0), 50.0, []
    cfg = Config(max_wallclock_seconds=budget)
    for _ in range(500):
        timed = []
        while not timed or not budget_spent(cfg, len(timed), sum(timed), careful_step(timed)):
            timed.append(chance.lognormvariate(0, noise))
        over.append(sum(timed) - budget)
    assert sum(seconds > 0 for seconds in over) <= 10
    assert min(over) > -1.1 * 4


# ── Snapshots ─────────────────────────────────────────────────────────────────────────────────────
def snapshots(cfg: Config, seconds: float = 1.0) -> list[int]:
    """The number of steps done when each snapshot is taken."""
    return [step + 1 for step, now in enumerate(drive(cfg, seconds)[0]) if now.snapshot]


def test_snapshots_are_taken_every_so_many_steps_once_the_trigger_fired():
    cfg = Config(
        swa_enabled=True,
        swa_start_frac=0.4,
        swa_every=50,
        iterations=1000,
        warmdown_iters=500,
        max_wallclock_seconds=0.0,
    )
    assert snapshots(cfg) == [850, 900, 950, 1000]


def test_989s_control_takes_its_24_published_snapshots():
    cfg = Config(
        swa_enabled=True,
        swa_start_frac=0.4,
        swa_every=50,
        iterations=6600,
        max_wallclock_seconds=0.0,
    )
    assert snapshots(cfg) == list(range(5450, 6601, 50)) and len(snapshots(cfg)) == 24


def test_sqwa_uses_the_swa_trigger():
    swa, sqwa = (
        Config(**{name: True}, swa_start_frac=0.2, iterations=5000)
        for name in ("swa_enabled", "sqwa_enabled")
    )
    assert snapshots(swa, 0.1) == snapshots(sqwa, 0.1) != []


def test_an_ema_needs_no_snapshot():
    assert snapshots(Config(ema_enabled=True, swa_start_kind="always", iterations=200)) == []


# ── Loops that begin late ─────────────────────────────────────────────────────────────────────────
LOOPED = dict(num_loops=2)
STEPS = dict(max_wallclock_seconds=0.0, iterations=1000)


def changes(taken: list, name: str) -> list[tuple[int, int]]:
    """(step, value) wherever the plan's field becomes another."""
    values = [getattr(now, name) for now in taken]
    return [(n, value) for n, value in enumerate(values) if not n or values[n - 1] != value]


@pytest.mark.parametrize(
    "knobs, found",
    [
        ({}, [(0, 0), (350, 2)]),
        (dict(enable_looping_at=0.0), [(0, 2)]),
        (dict(enable_looping_at=0.5, loop_phase2_at=0.65), [(0, 0), (500, 1), (650, 2)]),
        (dict(enable_looping_at=0.0, loop_phase2_at=0.65), [(0, 1), (650, 2)]),
        (dict(num_loops=1, enable_looping_at=0.2), [(0, 0), (200, 1)]),
        (dict(num_loops=3, enable_looping_at=0.5, loop_phase2_at=1), [(0, 0), (500, 1)]),
        (dict(looping_kind="steps", enable_looping_at=300), [(0, 0), (300, 2)]),
        (dict(looping_kind="steps", enable_looping_at=0), [(0, 2)]),
        (dict(num_loops=0, loop_phase2_at=0.5), [(0, 0)]),
    ],
    ids=str,
)
def test_the_loops_begin_where_the_knobs_say(knobs, found):
    assert changes(drive(Config(**LOOPED | knobs, **STEPS), 1.0)[0], "loops") == found


@SPEEDS
def test_loops_begin_at_their_share_of_the_time_although_their_steps_are_dearer(speed):
    cfg = Config(**LOOPED, enable_looping_at=0.35, loop_phase2_at=0.65, **UNCAPPED)
    taken, total = drive(cfg, lambda now: PLANNED / speed * (1 + 0.25 * now.loops))
    seconds = [
        sum(PLANNED / speed * (1 + 0.25 * now.loops) for now in taken[:step])
        for step, _ in changes(taken, "loops")
    ]
    assert seconds == pytest.approx([0, 210, 390], abs=2 * PLANNED / speed)
    assert total <= 600 + PLANNED / speed


def test_loops_that_have_begun_go_on_when_a_stall_is_made_up_for():
    schedule = Schedule(Config(**LOOPED, enable_looping_at=0.4, **UNCAPPED))
    assert schedule.at(10, 300.0).loops == 2 and Schedule(schedule.cfg).at(4000, 200.0).loops == 0
    assert schedule.at(4000, 200.0).loops == 2


def test_a_slow_step_begins_no_loop_and_no_longer_row():
    cfg = Config(**LOOPED, **GROWING, max_wallclock_seconds=200.0, **UNCAPPED)
    for stalls in STALLS.values():
        taken = with_stalls(cfg, stalls, [PLANNED] * 19)
        found = [step for step, _ in (*changes(taken, "loops")[1:], *changes(taken, "length")[1:])]
        usual = [share * len(taken) for share in (0.35, 0.1, 0.7)]
        for step, share in zip(found, usual, strict=True):
            assert share * 0.8 - 2 <= step <= share * 1.27 + 2


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(enable_looping_at=1.1), ["ENABLE_LOOPING_AT=1.1", "LOOPING_KIND=steps"]),
        (dict(loop_phase2_at=3), ["LOOP_PHASE2_AT=3"]),
        (
            dict(looping_kind="steps", enable_looping_at=0.35),
            ["ENABLE_LOOPING_AT=0.35", "LOOPING_KIND=time_frac"],
        ),
        (
            dict(looping_kind="steps", enable_looping_at=0, loop_phase2_at=0.65),
            ["LOOP_PHASE2_AT=0.65", "LOOPING_KIND=time_frac"],
        ),
        (dict(enable_looping_at=0.5, loop_phase2_at=0.5), ["LOOP_PHASE2_AT=0.5"]),
        (dict(num_loops=1, loop_phase2_at=0.5), ["NUM_LOOPS=1", "LOOP_PHASE2_AT=0.5"]),
    ],
    ids=str,
)
def test_loops_that_cannot_begin_as_told_are_refused(knobs, words):
    with pytest.raises(Refusal) as caught:
        Config(**LOOPED | knobs)
    assert all(word in str(caught.value) for word in words)


def test_the_step_of_1204_is_a_number_of_steps():
    for start, found in (({"RECUR_START_STEP": "2000"}, 2000), ({}, 3000)):
        cfg = Config.from_env({"RECUR_LAYERS": "4,5", "ITERATIONS": "5000", **start})
        assert (cfg.looping_kind, cfg.enable_looping_at) == ("steps", found)
        assert changes(drive(cfg, 0.1)[0], "loops") == [(0, 0), (found, 1)]
    by_share = Config.from_env({"RECUR_LAYERS": "4,5", "ENABLE_LOOPING_AT": "0.5"})
    assert (by_share.looping_kind, by_share.enable_looping_at) == ("time_frac", 0.5)


# ── Rows that grow ────────────────────────────────────────────────────────────────────────────────
GROWING = dict(train_seq_schedule="1024@0.100,2048@0.700,4096@1.000", train_seq_len=4096)


@pytest.mark.parametrize(
    "knobs, found",
    [
        ({}, [(0, 1024), (100, 2048), (700, 4096)]),
        (dict(train_seq_schedule="2048@0.7, 4096@1"), [(0, 2048), (700, 4096)]),
        (dict(train_seq_schedule="", train_seq_len=512), [(0, 512)]),
    ],
    ids=str,
)
def test_the_rows_grow_where_the_schedule_says(knobs, found):
    assert changes(drive(Config(**GROWING | knobs, **STEPS), 1.0)[0], "length") == found


def test_a_share_of_the_rows_is_of_the_time_or_of_iterations():
    found = {}
    for mode, iterations in (("wallclock", 10**6), ("step", 2000)):
        cfg = Config(**GROWING, train_seq_schedule_mode=mode, iterations=iterations)
        taken, _ = drive(cfg, lambda now: now.length / 8192)
        steps = [step for step, _ in changes(taken, "length")]
        seconds = [sum(now.length / 8192 for now in taken[:step]) for step in steps]
        found[mode] = steps if mode == "step" else seconds
    assert found["step"] == [0, 200, 1400]
    assert found["wallclock"] == pytest.approx([0, 60, 420], abs=0.5)


def reference_2014(cfg: Config, step_seconds: float) -> list[tuple[float, int]]:
    """(lr scale, length) of each step as #2014 says it."""
    stages = [(1024, 0.1), (2048, 0.7), (4096, 1.0)]
    found, changed, before = [], None, 1024
    for step in range(int(600 / step_seconds)):
        done = step * step_seconds / 600
        length = next(length for length, end in stages if done < end)
        if length != before:
            changed, before = step, length
        scale = min((1 - done) / cfg.warmdown_frac, 1) if done >= 1 - cfg.warmdown_frac else 1
        scale = max(scale, cfg.min_lr)
        if changed is not None:
            scale *= min((step - changed + 1) / cfg.seq_change_warmup_steps, 1)
        found.append((scale, length))
    return found


@pytest.mark.parametrize("floor", [0.0, 0.4])
def test_the_learning_rate_rises_again_after_each_change_as_in_2014(floor):
    cfg = Config(
        **GROWING,
        seq_change_warmup_steps=32,
        warmdown_frac=0.85,
        warmdown_iters=0,
        min_lr=floor,
        **UNCAPPED,
    )
    taken, _ = drive(cfg, 0.5)
    expected = reference_2014(cfg, 0.5)
    assert [now.length for now in taken] == [length for _, length in expected]
    assert [now.lr_scale for now in taken] == pytest.approx([scale for scale, _ in expected])
    assert {now.rewarm for now in taken} == {1.0, *(n / 32 for n in range(1, 33))}


def test_the_rise_fires_no_trigger_ends_no_noise_and_is_no_warmdown():
    growing = GROWING | dict(qna_enabled=True, qat_enabled=True, qat_start_kind="lr_scale")
    knobs = dict(qat_start=0.3, qna_stop_scale=0.3, swa_enabled=True, warmdown_frac=0.5)
    plain = Config(**growing, **knobs, **UNCAPPED)
    rising = dataclasses.replace(plain, seq_change_warmup_steps=100)
    schedule = Schedule(rising)
    for one, other in zip(drive(plain, 0.5)[0], drive(rising, 0.5)[0], strict=True):
        assert other._replace(lr_scale=one.lr_scale, rewarm=1.0) == one
        effects = schedule.effects(other).keys()
        assert effects == Schedule(plain).effects(one).keys()


@pytest.mark.parametrize(
    "text, word",
    [
        ("1024", "LENGTH@SHARE"),
        ("1024@", "LENGTH@SHARE"),
        ("a@0.1,4096@1", "a@0.1"),
        ("1024@0.1,,4096@1", "LENGTH@SHARE"),
        ("1@0.1,4096@1", "lengths"),
        ("2048@0.1,1024@0.7,4096@1", "must grow"),
        ("1024@0.7,4096@0.1", "shares must grow"),
        ("1024@nan,4096@1", "shares must grow"),
        ("1024@0,4096@1", "shares must grow"),
        ("1024@0.1,4096@7", "its last share must be 1"),
        ("1024@0.3,4096@0.5", "its last share must be 1"),
        ("4096@1", "one length"),
        ("4096@0.5", "one length"),
        ("1000@0.1,4096@1", "TRAIN_BATCH_TOKENS"),
        ("1024@0.1,2048@1", "TRAIN_SEQ_LEN=2048"),
    ],
)
def test_a_schedule_of_rows_that_is_none_is_refused(text, word):
    with pytest.raises(Refusal) as caught:
        Config(train_seq_schedule=text, train_seq_len=4096)
    assert word in str(caught.value) and text in str(caught.value)


# ── What is compiled before the clock starts ──────────────────────────────────────────────────────
def test_the_combination_of_2014_and_1855_has_four_forms():
    cfg = Config(**LOOPED, **GROWING)
    assert Schedule(cfg).forms() == [Form(0, 1024), Form(0, 2048), Form(2, 2048), Form(2, 4096)]
    assert Schedule(Config()).forms() == [Form(0, 2048)]


@settings(deadline=None, max_examples=50)
@given(
    loops=st.integers(0, 3),
    first=st.floats(0, 0.9),
    second=st.sampled_from([0.0, 0.05, 1.0]),
    ends=st.lists(
        st.sampled_from([0.01, 0.1, 0.35, 0.5, 0.9]), unique=True, min_size=0, max_size=2
    ),
    kinds=st.tuples(
        st.sampled_from(["time_frac", "steps"]), st.sampled_from(["wallclock", "step"])
    ),
    budget=st.floats(0, 100),
    dearer=st.floats(0.1, 10),
)
def test_every_form_that_a_run_comes_to_is_known_before(
    loops, first, second, ends, kinds, budget, dearer
):
    stages = zip((64, 128, 256), [*sorted(ends), 1], strict=False)
    starts = first, min(first + second, 1.0)
    if kinds[0] == "steps":
        starts = [round(100 * start) for start in starts]
    cfg = Config(
        num_loops=loops,
        looping_kind=kinds[0],
        enable_looping_at=starts[0],
        loop_phase2_at=starts[1] if loops > 1 and second else 0.0,
        train_seq_schedule=",".join(f"{length}@{end}" for length, end in stages) if ends else "",
        train_seq_schedule_mode=kinds[1],
        train_seq_len=(64, 128, 256)[len(ends)],
        max_wallclock_seconds=budget,
        iterations=120,
    )
    known = Schedule(cfg).forms()
    taken, _ = drive(cfg, lambda now: 1 + dearer * now.loops + now.length / 256)
    met = list(dict.fromkeys(Form(now.loops, now.length) for now in taken))
    assert {*met} <= {*known}
    if kinds == ("time_frac", "wallclock"):
        assert [form for form in known if form in met] == met
        assert len(known) <= 3 + len(ends)


# ── The printed timeline ──────────────────────────────────────────────────────────────────────────
ALL = dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.15, qna_enabled=True)


@SPEEDS
@pytest.mark.parametrize("average", ["SWA", "SQWA"])
def test_the_timeline_says_what_a_run_at_that_speed_does(average, speed):
    cfg = Config(**ALL, **{f"{average.lower()}_enabled": True})
    taken, _ = drive(cfg, PLANNED / speed)
    text = timeline(forecast(cfg, steady(PLANNED / speed)))
    assert text.startswith(f"{len(taken)} steps of {PLANNED / speed * 1e3:.1f} ms")
    acts = {
        "WARMDOWN": decays,
        "QNA": lambda now: now.qna > 0,
        "QAT": quantises,
        average: averages,
    }
    starts = {name: first(taken, on) for name, on in acts.items()}
    assert dict(re.findall(r"(\w+) from step (\d+)", text)) == {
        name: str(step) for name, step in starts.items()
    }
    assert [int(s) for s in re.findall(r"\((\d+) s\)", text)] == pytest.approx(
        [starts[name] * PLANNED / speed for name in acts], abs=0.51
    )


def test_the_timeline_says_when_loops_rows_floor_and_taper_begin():
    cfg = Config(
        **LOOPED,
        **GROWING,
        loop_phase2_at=0.65,
        warmdown_frac=0.85,
        warmdown_iters=0,
        min_lr=0.1,
        wd_taper_final_mult=0.5,
        **UNCAPPED,
    )
    seen = forecast(cfg, lambda now: 0.1 + 0.025 * now.loops)
    told = re.findall(r", ([\w ]+?) from step \d+ \((\d+) s\)", timeline(seen))
    assert dict(told) == {
        "WARMDOWN": "90",
        "MIN_LR": "549",
        "WD_TAPER": "420",
        "1 loop": "210",
        "2 loops": "390",
        "rows of 2048": "60",
        "rows of 4096": "420",
    }
    assert timeline(seen).startswith(f"{seen.steps} steps of {seen.step_seconds * 1e3:.1f} ms")
    assert seen.step_seconds * seen.steps == pytest.approx(600, abs=0.2)


def test_the_timeline_is_silent_about_what_was_not_requested():
    text = timeline(forecast(Config(warmdown_iters=0), steady(PLANNED)))
    assert "from" not in text and "NEVER" not in text


@pytest.mark.parametrize(
    "never, cfg",
    [
        ("QAT", dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.0)),
        # Of 20,000 steps; 6,666 fit the budget
        ("QAT", dict(qat_enabled=True, qat_start_kind="iter_frac", qat_start=0.5)),
        ("QAT", dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.7, warmdown_iters=0)),
        ("SWA", dict(swa_enabled=True, swa_start_kind="iter_frac", swa_start_frac=0.5)),
        ("SWA", dict(swa_enabled=True, swa_every=7000)),
        ("SQWA", dict(sqwa_enabled=True, warmdown_iters=0)),
        # the learning rate never falls below its floor
        ("QAT", dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.2, min_lr=0.2)),
        ("SWA", dict(swa_enabled=True, swa_start_frac=0.15, min_lr=0.2)),
        ("MIN_LR", dict(min_lr=0.1, warmdown_iters=1)),
        ("WD_TAPER", dict(wd_taper_final_mult=0.5, wd_taper_start_frac=1.0)),
        ("2 loops", dict(num_loops=2, looping_kind="steps", enable_looping_at=7000)),
        ("2 loops", dict(num_loops=2, loop_phase2_at=1.0)),
        ("rows of 4096", GROWING | dict(train_seq_schedule_mode="step")),
        ("QNA", dict(qna_enabled=True, qna_magnitude=0.0)),
        ("WARMDOWN", dict(iterations=1)),
    ],
    ids=str,
)
def test_the_timeline_says_never_for_a_phase_that_cannot_fire(never, cfg):
    assert f"{never} from NEVER" in timeline(forecast(Config(**cfg), steady(PLANNED)))


# ── Averages that hold what they should not ───────────────────────────────────────────────────────
QAT_LATE = dict(qat_enabled=True, qat_start_kind="time_frac", qat_start=0.7)


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(ema_enabled=True, ema_decay=0.997), []),  # 333 of 1,000 steps
        (dict(ema_enabled=True, ema_decay=0.9991), ["EMA_DECAY=0.9991", "1,111", "1,000"]),
        (dict(ema_enabled=True, ema_decay=1.0), ["EMA_DECAY=1", "initial weights"]),
        (dict(ema_decay=0.9999), []),  # there is none
        (QAT_LATE | dict(ema_enabled=True, ema_decay=0.996), []),  # 250 of 300 steps with QAT
        (QAT_LATE | dict(ema_enabled=True, ema_decay=0.997), ["333", "the 300 with QAT"]),
        (dict(qat_enabled=True, ema_enabled=True, ema_decay=0.997), []),  # from the start
        (QAT_LATE | dict(swa_enabled=True, swa_start_kind="time_frac", swa_start_frac=0.7), []),
        (
            QAT_LATE | dict(swa_enabled=True, swa_start_kind="time_frac", swa_start_frac=0.5),
            ["SWA takes snapshots from step 499 on", "QAT acts from step 700 on"],
        ),
        (
            QAT_LATE | dict(sqwa_enabled=True, swa_start_kind="time_frac", swa_start_frac=0.5),
            ["SQWA takes snapshots from step 499 on"],
        ),
        (dict(swa_enabled=True, swa_start_kind="always"), []),  # without QAT
        (dict(min_lr=0.1, warmdown_frac=0.5), ["MIN_LR=0.1", "EMA_ENABLED=1"]),
        (dict(min_lr=0.1, warmdown_frac=0.5, ema_enabled=True), []),
        (dict(min_lr=0.1, warmdown_iters=0), []),  # a floor of nothing
        (LOOPED | dict(ema_enabled=True, ema_decay=0.998), []),  # 500 of 650 steps with loops
        (LOOPED | dict(ema_enabled=True, ema_decay=0.9985), ["667", "the 650 with 2 loops"]),
        (LOOPED | dict(ema_enabled=True, ema_decay=0.9985, enable_looping_at=0), []),
        (
            LOOPED | dict(swa_enabled=True, swa_start_kind="always"),
            ["SWA takes snapshots from step 49 on", "2 loops acts from step 350 on"],
        ),
        # QAT never comes: that is the toggle's own line
        (QAT_LATE | dict(qat_start=1.0, swa_enabled=True, swa_start_kind="always"), []),
    ],
    ids=str,
)
def test_an_average_of_weights_that_are_too_old_is_warned_of(knobs, words):
    cfg = Config(iterations=1000, max_wallclock_seconds=0.0, **knobs)
    lines = averaging_warnings(cfg, forecast(cfg, steady(PLANNED)))
    assert len(lines) == bool(words)
    assert all(word in line for word in words for line in lines)


def test_a_forecast_is_of_the_budget_at_the_speed_that_is_known():
    cfg = Config(ema_enabled=True, ema_decay=0.999, max_wallclock_seconds=600.0, warmdown_iters=0)
    assert forecast(cfg, steady(0.25)) == Forecast(0.25, 2400, {})
    assert averaging_warnings(cfg, forecast(cfg, steady(0.25))) == []
    assert "more than the 600" in averaging_warnings(cfg, forecast(cfg, steady(1.0)))[0]

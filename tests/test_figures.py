"""Figures of the log, of metrics.jsonl and of result.json, each against its definition.

One run by a clock of the test: what takes time, and how long, is known to the bit. Would have
caught: a speed that counts other tokens, bits per byte that are nats, a scoring time of another
scoring, validation on the training clock, a peak in KiB, an effect with its sign turned round.
"""

import json
import math
import re
import resource
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS_OF_A_RUN, TINY
from test_pipeline import SMALL, folder

import train_gpt
from train_gpt import (
    GPT,
    Config,
    Ema,
    Grid,
    Run,
    ScoreSheet,
    Swa,
    Trainer,
    WeightViews,
    as_shipped,
    main,
    peak_memory,
    prune,
    read_container,
)

STEPS = 52
KNOBS = SMALL | dict(
    iterations=STEPS,
    warmdown_iters=10,
    muon_momentum_warmup_start=0.5,
    muon_momentum=0.9,
    muon_momentum_warmup_steps=8,
    train_log_every=1,
    val_loss_every=10,
    val_max_tokens=200,
    qna_enabled=True,
    qna_magnitude=2.0,
    qna_stop_scale=0.0,
    qat_enabled=True,
    qat_start_kind="iter_frac",
    qat_start=0.9,
    swa_enabled=True,
    swa_every=3,
    swa_start_kind="iter_frac",
    swa_start_frac=0.5,
)
# Seconds of a step, of filling one score sheet, of one encoding: dyadic, so that sums are exact
STEP_SECONDS = [(1 + step**2 % 37) / 8 for step in range(STEPS)]
SCORE_SECONDS = {"live": 32.0, "averaged": 64.0, "quantised": 128.0, "sliding": 256.0}
VALIDATION_SECONDS = 16.0
ENCODE_SECONDS = 4.0
PACK_SECONDS = 1 / 8


class Clock:
    """A clock that stands still but for what the test lets take time."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 1000.0
        self.spent: dict[str, float] = {}  # by the phase of the run
        self.patch = patch
        self.patch.setattr(Run, "__init__", self.watched(Run.__init__))
        patch.setattr(train_gpt, "time", SimpleNamespace(**vars(train_gpt.time)))
        patch.setattr(train_gpt.time, "perf_counter", lambda: self.now)

    def watched(self, make):
        """Of which run the phases are."""

        def made(run, *arguments, **named):
            self.run = run
            self.began = self.now
            make(run, *arguments, **named)

        return made

    def lasts(self, owner, name: str, seconds) -> None:
        """From now on each call of owner.name lasts seconds(its arguments)."""
        work = getattr(owner, name)

        def lasting(*arguments, **named):
            took = seconds(*arguments)
            self.now += took
            phase = self.run.phase_name
            self.spent[phase] = self.spent.get(phase, 0.0) + took
            return work(*arguments, **named)

        self.patch.setattr(owner, name, lasting)


def one_millisecond(run: Run, work) -> float:
    work()
    return 1.0


@pytest.fixture(scope="module")
def clocked(data, tmp_path_factory) -> SimpleNamespace:
    """A run by this clock: its report, events and log."""
    paths = dict(data_path=str(data), tokenizer_path=str(data / "tokenizer.model"))
    logs = tmp_path_factory.mktemp("clocked")
    cfg = Config(**TINY | KNOBS | paths, logs_dir=str(logs), run_id="run")

    def of_step(trainer, *_) -> float:
        return STEP_SECONDS[trainer.steps]

    def of_score(sheet, *_) -> float:
        return SCORE_SECONDS.get(sheet.run.phase_name.split()[-1], VALIDATION_SECONDS)

    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        clock.lasts(Trainer, "step", of_step)
        clock.lasts(ScoreSheet, "fill", of_score)
        clock.lasts(train_gpt, "encode_artifact", lambda *_: ENCODE_SECONDS)
        clock.lasts(train_gpt, "shipped_code", lambda *_: PACK_SECONDS)
        patch.setattr(Run, "milliseconds", one_millisecond)
        report = main(cfg)
    events = [json.loads(line) for line in (folder(cfg) / "metrics.jsonl").open()]
    log = (folder(cfg) / "train.log").read_text()
    return SimpleNamespace(cfg=cfg, report=report, events=events, log=log, clock=clock)


def of_kind(run: SimpleNamespace, kind: str) -> list[dict]:
    return [event for event in run.events if event["event"] == kind]


# ── The clock of training ─────────────────────────────────────────────────────────────────────────
def test_the_training_clock_counts_steps_alone(clocked):
    """Five validations of 20 s and more lie between the steps."""
    assert len(of_kind(clocked, "val")) == STEPS // 10
    after = [sum(STEP_SECONDS[: n + 1]) for n in range(STEPS)]
    assert [event["seconds"] for event in of_kind(clocked, "step")] == after
    assert [event["seconds"] for event in of_kind(clocked, "val")] == after[9::10]
    assert clocked.report["train_seconds"] == after[-1]


def test_the_seconds_of_a_score_are_its_own_and_eval_seconds_those_of_the_result(clocked):
    scores = clocked.report["scores"]
    assert {name: score["seconds"] for name, score in scores.items()} == SCORE_SECONDS
    assert clocked.report["scored"] == "sliding" and clocked.report["eval_seconds"] == 256.0
    # of 200 targets: 4 windows side by side, 6 sliding ones
    assert "score sliding: about 192 s at the speed of the fixed windows" in clocked.log
    lines = re.findall(r"^(\w+) +val bpb \d\.\d{6}  \((\d+\.\d) s\)$", clocked.log, re.M)
    assert {name: float(seconds) for name, seconds in lines} == SCORE_SECONDS


def test_a_validation_says_its_score_in_both_units_and_the_size_to_expect(clocked):
    r = clocked.report
    to_bpb = r["val_tokens"] / r["val_bytes"] / math.log(2)
    for event in of_kind(clocked, "val"):
        assert event["val_bpb"] == pytest.approx(event["val_loss"] * to_bpb, rel=1e-12)
        assert abs(event["size_estimate"] - r["total_bytes"]) < r["artifact_bytes"] / 2
        line = (
            f"step {event['step']:5d}  val bpb {event['val_bpb']:.4f} (live, fixed windows)  "
            f"size ~{event['size_estimate']:,} bytes (fast compression)"
        )
        assert line in clocked.log
    # each is of the weights of its moment
    assert len({event["val_bpb"] for event in of_kind(clocked, "val")}) == STEPS // 10


def test_the_ledger_holds_every_second_once_under_what_it_was_spent_on(clocked):
    seconds, spent = clocked.report["seconds"], clocked.clock.spent
    assert {name: n for name, n in seconds.items() if n} == spent
    assert sum(seconds.values()) == clocked.clock.now - clocked.clock.began
    assert spent["train"] == sum(STEP_SECONDS) == clocked.report["train_seconds"]
    pause = VALIDATION_SECONDS + ENCODE_SECONDS + PACK_SECONDS
    assert spent["validate"] == STEPS // 10 * pause
    scores = {name: spent[f"score {name}"] for name in SCORE_SECONDS}
    assert scores == SCORE_SECONDS
    assert {"warm-up and compile", "quantise and compress"} < spent.keys()
    for name, n in spent.items():
        assert re.search(rf"^{name} +{n:.1f} s( |$)", clocked.log, re.M)


# ── What a step says ──────────────────────────────────────────────────────────────────────────────
def test_the_line_of_a_step_says_its_figures(clocked):
    line = re.compile(
        r"step +(\d+) +([\d.]+) s  loss ([\d.]+)  train bpb ~([\d.]+)  lr x([\d.]+)  "
        r"([\d.]+) ms  ([\d,]+) tok/s"
    )
    tokens_per_byte = clocked.report["val_tokens"] / clocked.report["val_bytes"]
    found = [match.groups() for match in line.finditer(clocked.log)]
    events = of_kind(clocked, "step")
    assert len(found) == len(events) == STEPS
    for n, (event, texts) in enumerate(zip(events, found, strict=True), 1):
        # the median of the last 20 steps
        seconds = statistics.median(STEP_SECONDS[max(n - 20, 0) : n])
        bpb = event["loss"] / math.log(2) * tokens_per_byte
        assert event["step"] == n and event["step_ms"] == 1000 * seconds
        assert texts == (
            str(n),
            f"{sum(STEP_SECONDS[:n]):.1f}",
            f"{event['loss']:.4f}",
            f"{bpb:.4f}",
            f"{event['lr_scale']:.3f}",
            f"{1000 * seconds:.1f}",
            f"{clocked.cfg.train_batch_tokens / seconds:,.0f}",
        )


def test_the_event_of_a_step_says_what_the_step_did(clocked):
    """Event n is of the step that was begun after n - 1."""
    for begun, event in enumerate(of_kind(clocked, "step")):
        ramp = min(begun / 8, 1.0)
        lr_scale = min((STEPS - begun) / 10, 1.0)
        expected = dict(
            lr_scale=pytest.approx(lr_scale),
            momentum=pytest.approx(0.5 * (1 - ramp) + 0.9 * ramp),
            qat=begun >= 46,
            qna=0.0 if begun >= 46 else pytest.approx(2.0 * lr_scale),
            snapshot=begun in range(26, 51, 3),
        )
        assert {name: event[name] for name in expected} == expected, begun


def test_toggles_are_dated_by_the_steps_that_they_acted_in(clocked):
    toggles = clocked.report["toggles"]
    dates = {
        name: tuple(row[key] for key in ("first_step", "last_step", "share_of_steps"))
        for name, row in toggles.items()
    }
    assert dates == {
        "QNA": (0, 45, 46 / STEPS),
        "QAT": (46, 51, 6 / STEPS),
        "SWA": (26, 50, 9 / STEPS),
        "WARMDOWN": (43, 51, 9 / STEPS),
    }
    assert toggles["WARMDOWN"]["effect"] == pytest.approx(1 / 10 - 1)  # of the last step
    # said once the speed is known, and true
    planned = [f"{name} from step {dates[name][0]} " for name in ("QNA", "QAT", "SWA")]
    milliseconds = sum(STEP_SECONDS[:50]) / 50 * 1000
    line = rf"schedule \(measured speed\): {STEPS} steps of {milliseconds:.1f} ms, .*"
    said = re.findall(line, clocked.log)[0]
    assert re.findall(r"(?:QNA|QAT|SWA) from step \d+ ", said) == planned
    phases = {event["name"]: event for event in of_kind(clocked, "phase")}
    for name, (begun, *_) in dates.items():
        seconds = sum(STEP_SECONDS[: begun + 1])
        assert (phases[name]["step"], phases[name]["seconds"]) == (begun, seconds)
        lr_scale = min((STEPS - begun) / 10, 1.0)
        line = f"{name} acts from step {begun} ({seconds:.1f} s, lr scale {lr_scale:.3f})"
        assert line in clocked.log


def score_of(*blocks: float, seconds: float) -> train_gpt.Score:
    """Of 100 targets and 250 bytes."""
    nats = sum(blocks)
    return train_gpt.Score(nats / math.log(2) / 250, nats / 100, 100, 250, seconds, blocks)


@pytest.mark.parametrize("against", ["quantised", "sliding"])
def test_ways_of_scoring_are_compared_in_bits_per_byte(against):
    scores = {
        "quantised": score_of(90.0, 80.0, 70.0, 60.0, seconds=1.0),
        against: score_of(80.0, 70.0, 60.0, 50.0, seconds=8.0),
        "ttt": score_of(79.0, 68.0, 58.0, 49.0, seconds=96.0),
    }
    run = SimpleNamespace(activity={})
    train_gpt.add_scoring_toggles(run, scores, steps=7)
    row = run.activity.pop("TTT_MODE").row(7)
    assert run.activity == {}
    # -1, -2, -2 and -1 nats; of their sum two standard errors
    bits = math.log(2) * 250
    effect, margin = -6 / bits, 2 * math.sqrt(1 / 3) * 2 / bits
    assert row["effect"] == pytest.approx(effect)
    assert row["effect_interval"] == pytest.approx([effect - margin, effect + margin])
    assert (row["verdict"], row["unit"], row["cost_seconds"]) == ("better", "bpb", 88.0)
    assert row["scope"].endswith(against) and row["compared"].endswith(against)


# ── What a result says ────────────────────────────────────────────────────────────────────────────
def test_the_result_is_the_last_score_and_names_the_others(clocked):
    r, scores = clocked.report, clocked.report["scores"]
    assert len({score["bpb"] for score in scores.values()}) == 4
    final = (r["val_bpb"], r["val_loss"], r["val_tokens"], r["val_bytes"])
    assert final == tuple(scores["sliding"][key] for key in ("bpb", "loss", "targets", "bytes"))
    assert r["tokens_per_byte"] == r["val_tokens"] / r["val_bytes"] != 1
    assert r["val_tokens"] == 200 and r["val_loss"] != scores["quantised"]["loss"]
    named = {name: r[f"{name}_val_bpb"] for name in ("live", "averaged", "quantised")}
    assert named == {name: scores[name]["bpb"] for name in named}
    assert r["quant_gap_bpb"] == named["quantised"] - named["averaged"]
    assert f"quantising costs: {r['quant_gap_bpb']:+.6f} BPB\n" in clocked.log
    assert r["step_ms_median"] == 1000 * statistics.median(STEP_SECONDS)
    checkpoint = read_container(folder(clocked.cfg) / "checkpoint.bin")[1]
    live = [w.numel() for name, w in checkpoint.items() if name.startswith("live/")]
    assert r["params"] == sum(live) > len(live)
    assert f"model: {r['params']:,} parameters, " in clocked.log
    assert f"run run: {r['device']}, 1 ranks, code {r['code_sha256'][:12]}\n" in clocked.log


def test_a_good_exit_code_hides_neither_a_bad_average_nor_steps_that_were_left_out():
    """With the average: 1, 2, 2 and 1 nats more in 250 bytes."""
    warned = []
    run = SimpleNamespace(warn=warned.append, dir=Path("it's/a b"), ledger=dict)
    cfg = Config(ema_enabled=True)
    scores = {
        "live": score_of(79.0, 68.0, 58.0, 49.0, seconds=1.0),
        "averaged": score_of(80.0, 70.0, 60.0, 50.0, seconds=1.0),
    }
    trainer = SimpleNamespace(skipped=[3, 9], steps=40, reserve=0.0, elapsed=0.0)
    steps_left_out = SimpleNamespace(trainer=trainer)
    train_gpt.closing_warnings(cfg, run, steps_left_out, scores)
    bits = math.log(2) * 250
    assert len(warned) == 2
    text = "2 of 40 steps were not finite and were left out, the first of them step 3"
    assert warned[0] == text
    assert f"{260 / bits:.6f} against {254 / bits:.6f} BPB, {6 / bits:+.6f} +- " in warned[1]
    assert f"+- {2 * math.sqrt(1 / 3) * 2 / bits:.6f} (fixed" in warned[1]
    assert "average, ema, is worse than" in warned[1]
    pasted = shlex.split(warned[1].partition("; ")[2])
    assert pasted[:2] == ["CHECKPOINT=it's/a b/checkpoint.bin", "AVERAGE=none"]

    better = dict(live=scores["averaged"], averaged=scores["live"])
    nothing_to_say = SimpleNamespace(trainer=SimpleNamespace(**vars(trainer) | {"skipped": []}))
    for fine in (better, dict(live=scores["live"])):
        train_gpt.closing_warnings(cfg, run, nothing_to_say, fine)
    assert len(warned) == 2

    # a text of one block has no interval
    assert train_gpt.in_words(0.1, [math.nan, math.nan]) == "acted"
    short = dict(live=score_of(79.0, seconds=1.0), averaged=score_of(80.0, seconds=1.0))
    train_gpt.closing_warnings(cfg, run, nothing_to_say, short)
    assert ", too little text for an interval (fixed windows" in warned[2]
    assert "nan" not in warned[2] and "ema, lies above the live weights: " in warned[2]

    # 3 more and 2 less
    unclear = dict(
        live=score_of(79.0, 68.0, seconds=1.0), averaged=score_of(82.0, 66.0, seconds=1.0)
    )
    train_gpt.closing_warnings(cfg, run, nothing_to_say, unclear)
    assert "ema, is not distinguishable from the live weights: " in warned[3]
    assert "worse" not in warned[3]


@pytest.mark.parametrize(
    "bpb, gap, fit",
    [
        (dict(live=2.0, quantised=2.25), 0.25, None),
        (dict(live=2.0, averaged=1.5, quantised=2.25), 0.75, None),
        (dict(live=2.0, averaged=1.5, unfitted=1.75, quantised=2.25), 0.25, 0.5),
        (dict(live=2.0, unfitted=1.75, quantised=1.625, sliding=1.0), -0.25, -0.125),
    ],
)
def test_what_quantising_costs_is_apart_from_what_fitting_costs(bpb, gap, fit):
    assert train_gpt.gap_figures(bpb) == dict(quant_gap_bpb=gap, fit_cost_bpb=fit)


def test_the_codes_are_told_in_bits_and_beside_their_entropy():
    assert train_gpt.codes_line("ans", weights=1000, order0_bytes=500, stored_bytes=625) == (
        "ans stores 1,000 quantised weights, codes and scales, in 625 bytes: 5.000 bits each; "
        "order-0 entropy of the codes alone, without scales: 4.000 bits each; +25.00%"
    )


@pytest.mark.parametrize(
    "fields, cells",
    [
        (
            dict(effect=-0.0155, effect_interval=[-0.0172, -0.0138]),
            ["-0.0155 nats (-0.0172 to -0.0138)", None, None],
        ),
        (
            dict(effect=0.00262, effect_interval=[0.000239, 0.00501]),
            ["+0.00262 nats (+0.00024 to +0.00501)", None, None],
        ),
        (
            dict(effect=-5.32e-7, effect_interval=[-9.45e-7, -1.2e-7]),
            ["-5.32e-7 nats (-9.45e-7 to -1.20e-7)", None, None],
        ),
        (
            dict(effect=-1e-4, effect_interval=[-9.994e-4, 3e-12]),
            ["-1.00e-4 nats (-9.99e-4 to +3.00e-12)", None, None],
        ),
        (
            dict(effect=-1234.5, effect_interval=[-2468.75, -0.25]),
            ["-1234 nats (-2469 to +0)", None, None],
        ),
        (dict(effect=0.0, effect_interval=[0.0, 0.0]), ["+0 nats (+0 to +0)", None, None]),
        (dict(effect=0.25, unit="bpb"), ["+0.250 bpb", None, None]),
        (
            dict(cost_ms=3.71, cost_interval=[3.65, 3.8], cost_per="step", cost_seconds=2.5),
            [None, "3.71 ms a step (3.65 to 3.80)", "2.5 s"],
        ),
        (
            dict(cost_ms=-0.5, cost_interval=[-0.75, -0.25], cost_per="step", steps_lost=-19.625),
            [None, "-0.50 ms a step (-0.75 to -0.25)", "-19.6 steps lost"],
        ),
        (dict(cost_ms=3.71, cost_per="step"), [None, "not distinguishable", None]),
        (
            dict(cost_ms=0.0, cost_interval=[0.0, 0.0], cost_per="step"),
            [None, "not distinguishable (0.00 to 0.00)", None],
        ),
        (
            dict(cost_per="export", cost_seconds=0.5, bytes_saved=1234),
            [None, "not measured", "0.50 s, 1,234 bytes saved"],
        ),
        (
            dict(cost_per="scoring", cost_seconds=-1.0),
            [None, None, "1.0 s less than plain scoring"],
        ),
        (
            dict(cost_per="scoring", cost_seconds=2.5),
            [None, None, "2.5 s more than plain scoring"],
        ),
    ],
)
def test_the_words_of_the_table_are_those_of_the_numbers(fields, cells):
    row = train_gpt.Activity(steps=[2, 7], **fields).row(10)
    result = {"toggles": {"X": row}}
    table = train_gpt.toggle_rows(result)["X"]
    costs = train_gpt.cost_rows(result).get("X", {})
    said = [table["on minus off (95 %)"], costs.get("each time (95 %)"), costs.get("in all")]
    assert said == cells and bool(costs) == (cells[1:] != [None, None])
    assert table["steps"] == "2 to 7" and table["in words"] == row["verdict"]
    never = train_gpt.toggle_rows({"toggles": {"X": train_gpt.Activity().row(10)}})["X"]
    assert never["steps"] == "never"


# ── The end of the log ────────────────────────────────────────────────────────────────────────────
def table_of(log: str, title: str) -> list[list[str]]:
    """The rows of the table with this title, the header first, cut where two spaces are."""
    table = re.search(rf"^{title}  .*\n-+\n(?:.+\n)+", log, re.M)[0]
    return [re.split(" {2,}", line) for line in table.splitlines() if line.strip("-")]


def test_the_scores_are_in_peoples_units_and_bytes_of_text_are_called_so(clocked):
    header, *rows = table_of(clocked.log, "scores")
    assert header[1:] == [
        "BPB (lower is better)",
        "nats per token",
        "tokens scored",
        "text bytes",
        "took",
    ]
    size = clocked.report["val_bytes"]
    for (name, *cells), (stage, score) in zip(rows, clocked.report["scores"].items(), strict=True):
        figures = [f"{score['bpb']:.6f}", f"{score['loss']:.6f}", "200", f"{size:,}"]
        assert (name, cells) == (stage, [*figures, f"{SCORE_SECONDS[stage]:.1f} s"])
    assert clocked.log.count("lower is better") == 1
    # in every table "bytes" alone are those of a file
    bytes_said = re.findall(r"(\w+) bytes\b", clocked.log.partition("\nscores  ")[2])
    assert set(bytes_said) - {"text"} and all(n == "text" or n.isdigit() for n in bytes_said)


def test_no_table_of_the_log_is_wider_than_120_columns(clocked):
    tables = re.findall(r"^.+\n-+\n(?:.+\n)+", clocked.log, re.M)
    assert len(tables) == 6 and {name for name in clocked.report["toggles"]} >= {"QAT", "SWA"}
    assert [line for table in tables for line in table.splitlines() if len(line) > 120] == []


def test_the_end_names_every_file_and_what_to_do_next(clocked):
    """The files lie where it says, with the bytes that it says; what it says to do is a command."""
    rows = {name: Path(path) for name, path in table_of(clocked.log, "where")[1:]}
    there = {path for path in folder(clocked.cfg).iterdir()}
    assert set(rows.values()) == there - {folder(clocked.cfg) / "train_gpt.py"}
    sizes = {name: path.stat().st_size for name, path in rows.items() if "bytes" in name}
    artifact = folder(clocked.cfg) / "artifact.bin"
    assert sizes == {
        f"artifact, {clocked.report['artifact_bytes']:,} bytes": artifact.stat().st_size,
        f"code, {clocked.report['code_bytes']:,} bytes": clocked.report["code_bytes"],
    }
    following, blank, result = clocked.log.splitlines()[-3:]
    assert (following[:6], blank, result[:7]) == ("NEXT: ", "", "RESULT ")
    again, page = following[6:].split("; ")
    assert shlex.split(again) == [f"EVAL_ONLY={artifact}", "scores", "it", "again"]
    assert shlex.split(page)[:4] == ["python", "ablate.py", "report", str(folder(clocked.cfg))]


def test_the_end_of_a_run_over_the_cap_says_how_it_fits(clocked):
    over = clocked.report | dict(under_cap=False, folder="it's/a b")
    said = train_gpt.next_line(over).split("; ")[1]
    pasted = ["CHECKPOINT=it's/a b/checkpoint.bin", "FIT_TO_CAP=1", "prunes"]
    assert shlex.split(said)[:3] == pasted
    exported = over | dict(checkpoint="other.bin")
    assert train_gpt.file_rows(exported)["checkpoint"] == {"file": "other.bin"}
    scored = over | dict(steps=None)
    assert "checkpoint" not in train_gpt.file_rows(scored)
    assert "FIT_TO_CAP" not in train_gpt.next_line(scored)
    unpacked = over | dict(config=over["config"] | dict(pack_code="none"))
    assert {"file": "it's/a b/train_gpt.py"} in train_gpt.file_rows(unpacked).values()


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────
def test_peak_memory_is_the_bytes_of_this_process_at_its_largest(monkeypatch):
    status = Path("/proc/self/status").read_text()
    largest = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    # the kernel's two counts differ a little; one of a child, or of kilobytes, is far away
    assert 0.9 < peak_memory(SimpleNamespace(cuda=False)) / largest < 100

    usage = {resource.RUSAGE_SELF: 7, resource.RUSAGE_CHILDREN: 11}
    fake = monkeypatch.setattr
    fake(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=usage[who]))
    fake(torch.cuda, "max_memory_allocated", lambda: 13)
    assert peak_memory(SimpleNamespace(cuda=False)) == 7 * 1024
    assert peak_memory(SimpleNamespace(cuda=True)) == 13


def test_a_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert train_gpt.device_name(SimpleNamespace(cuda=True)) == "NVIDIA H100"
    assert re.fullmatch(r"CPU \S.*, \d+ cores", train_gpt.device_name(SimpleNamespace(cuda=False)))


# ── Effects, with a loss whose every value the test knows ─────────────────────────────────────────
TENSOR_SECONDS = 1 / 64  # a forward pass of training takes so many for each tensor of the model
PART_SECONDS = {
    (WeightViews, "enter"): 1 / 4,
    (WeightViews, "leave"): 1 / 8,
    (Ema, "update"): 1 / 2,
    (Swa, "update"): 1 / 16,
    (train_gpt, "prune"): 1.0,
}


def made_nats(weights: dict[str, torch.Tensor]) -> float:
    """The nats of every target: 4, more for each tensor that is there, less for the bigram's."""
    sizes = {name: w.double().abs().mean().item() for name, w in weights.items()}
    return 4 + sum(-n if name.startswith("bigram.") else n for name, n in sizes.items())


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> SimpleNamespace:
    """A run that trains as ever and is scored by the made loss, with an EMA half as large as the
    live weights and a mean of snapshots twice as large: its report and weights.
    """
    knobs = SMALL | dict(
        smear_gate=True,
        bigram_vocab_size=64,
        bigram_dim=16,
        keep_float_max_numel=64,
        grad_accum_steps=2,
        quant_bits_mlp=3,
        qat_enabled=True,
        qat_start_kind="iter_frac",
        qat_start=0.5,
        ema_enabled=True,
        swa_enabled=True,
        swa_every=1,
        swa_start_kind="always",
        average="swa",
        prune_pct=0.5,
        strict=False,
    )
    paths = dict(data_path=str(data), tokenizer_path=str(data / "tokenizer.model"))
    logs = tmp_path_factory.mktemp("made")
    cfg = Config(**TINY | knobs | paths, logs_dir=str(logs), run_id="run")
    trains = GPT.forward
    collects = train_gpt.collect_averages
    kept = []
    averages = {}

    def forward(model, ids, targets, positions=None) -> torch.Tensor:
        if torch.is_grad_enabled():
            clock.now += len([*model.parameters()]) * TENSOR_SECONDS
            return trains(model, ids, targets, positions)
        return torch.full(targets.shape, made_nats(dict(model.named_parameters())))

    def collect(*arguments):
        trained = collects(*arguments)
        for name, share in (("ema", 0.5), ("swa", 2.0)):
            trained.averages[name] = {key: share * w for key, w in trained.live.items()}
        trained.final = trained.averages["swa"]
        trained.trainer.skipped.append(2)
        trained.trainer.recompiles = 3
        kept.append(trained)
        averages.update(trained.averages)
        return trained

    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        for (owner, name), seconds in PART_SECONDS.items():
            clock.lasts(owner, name, lambda *_, seconds=seconds: seconds)
        patch.setattr(GPT, "forward", forward)
        patch.setattr(train_gpt, "collect_averages", collect)
        patch.setattr(train_gpt, "COST_PAIRS", PAIRS_OF_A_RUN)
        patch.setattr(train_gpt, "COST_SECONDS", math.inf)
        report = main(cfg)
    return SimpleNamespace(cfg=cfg, report=report, trained=kept[0], averages=averages)


def test_an_effect_is_the_nats_with_the_toggle_minus_those_without(made):
    live, plan = made.trained.live, made.trained.trainer.plan
    base = made_nats(live)
    shipped = {name: as_shipped(w, plan[name]) for name, w in live.items()}
    quantised = {n: shipped[n] if isinstance(plan[n], Grid) else w for n, w in live.items()}
    final = made.trained.final
    pruned = prune(made.cfg, final, 0.5)
    off, on = ({n: as_shipped(w, plan[n]) for n, w in state.items()} for state in (final, pruned))

    def without(part: str) -> float:
        return made_nats({name: w for name, w in live.items() if not name.startswith(part)})

    expected = {
        "QAT": made_nats(quantised) - base,
        "EMA": made_nats(made.averages["ema"]) - base,
        "SWA": made_nats(made.averages["swa"]) - base,
        "SMEAR_GATE": base - without("smear"),
        "BIGRAM_VOCAB_SIZE": base - without("bigram."),
        "PRUNE_PCT": made_nats(on) - made_nats(off),
    }
    toggles = made.report["toggles"]
    words = {name: "better" if effect < 0 else "worse" for name, effect in expected.items()}
    assert {name: toggles[name]["verdict"] for name in expected} == words
    assert {name: toggles[name]["effect"] for name in expected} == pytest.approx(expected, abs=1e-5)
    changed = [int((on[name] != off[name]).sum()) for name in on]
    touched = {"SMEAR_GATE": [16], "PRUNE_PCT": [n for n in changed if n]}
    touched["BIGRAM_VOCAB_SIZE"] = [w.numel() for n, w in live.items() if n.startswith("bigram.")]
    for name, sizes in touched.items():
        assert (toggles[name]["tensors"], toggles[name]["params"]) == (len(sizes), sum(sizes)), name
    assert expected["EMA"] < 0 < expected["SWA"] and expected["BIGRAM_VOCAB_SIZE"] < 0
    assert all(abs(effect) > 1e-4 for effect in expected.values())
    assert not made.trained.averages  # copies that a second model may need the room of


def test_a_cost_is_the_milliseconds_of_what_the_toggle_adds(made):
    """To a step of two micro-batches, to a snapshot, to the export; and so often as it acted."""
    toggles, trainer = made.report["toggles"], made.trained.trainer
    part = 2 * 1000 * TENSOR_SECONDS
    expected = {
        "QAT": (375.0, "step", 2),
        "EMA": (500.0, "step", 4),
        "SWA": (62.5, "snapshot", 4),
        "SMEAR_GATE": (part, "step", 4),
        "BIGRAM_VOCAB_SIZE": (part * toggles["BIGRAM_VOCAB_SIZE"]["tensors"], "step", 4),
        "PRUNE_PCT": (1000.0, "export", 1),
    }
    assert toggles["BIGRAM_VOCAB_SIZE"]["tensors"] > 1
    for name, (cost, per, times) in expected.items():
        row = toggles[name]
        assert (row["cost_ms"], row["cost_per"]) == (cost, per), name
        assert row["cost_interval"] == [cost, cost] and row["cost_seconds"] == cost * times / 1000
        lost = row["cost_seconds"] / statistics.median(trainer.step_seconds)
        assert row["steps_lost"] == (None if per == "export" else pytest.approx(lost))
    for name in ("SMEAR_GATE", "BIGRAM_VOCAB_SIZE"):
        row = toggles[name]
        acted = (row["first_step"], row["last_step"], row["share_of_steps"])
        assert acted == (0, trainer.steps - 1, 1.0)


def test_scores_and_gaps_are_those_of_their_weights(made):
    live, plan = made.trained.live, made.trained.trainer.plan
    pruned = prune(made.cfg, made.trained.final, 0.5)
    shipped = {name: as_shipped(w, plan[name]) for name, w in pruned.items()}
    nats = {
        "live": made_nats(live),
        "averaged": made_nats(made.trained.final),
        "quantised": made_nats(shipped),
        "sliding": made_nats(shipped),
    }
    r = made.report
    to_bpb = r["val_tokens"] / r["val_bytes"] / math.log(2)
    bpb = {name: to_bpb * n for name, n in nats.items()}
    assert {name: score["bpb"] for name, score in r["scores"].items()} == pytest.approx(bpb)
    assert {name: score["loss"] for name, score in r["scores"].items()} == pytest.approx(nats)
    found = {name: r[f"{name}_val_bpb"] for name in ("live", "averaged", "quantised")}
    assert found == {name: r["scores"][name]["bpb"] for name in found}
    assert r["val_bpb"] == r["scores"]["sliding"]["bpb"]
    assert r["quant_gap_bpb"] == found["quantised"] - found["averaged"]
    assert (r["skipped"], r["recompiles"]) == ([2], 3)
    left_out, average = r["warnings"][-2:]
    assert left_out.startswith("1 of 4 steps were not finite")
    assert f"swa, is worse than the live weights: {found['averaged']:.6f} against" in average

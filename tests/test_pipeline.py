"""The whole run, from tokens to a scored artifact: numerics, every pair of toggles,
exit codes, signals, two ranks.

Would have caught: toggles that are requested and never act (#1681, #315, #199's SWA window);
combinations that crash or deadlock (#975's SQWA, #199's USE_ZSTD); a run whose artifact dies with
its scoring (autoresearch#7, #1728); "off" that is not the baseline (#769); results overwritten by
the next run (#1048); refactors that change the numerics.
"""

import functools
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TIMED, TINY, environment
from launch import launch, script
from test_score import short_documents, two_ranks

import train_gpt
from train_gpt import (
    CODE_SHA256,
    Config,
    Refusal,
    encode_container,
    main,
    read_artifact,
    read_container,
)

SMALL = dict(
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    train_batch_tokens=256,
    iterations=4,
    warmdown_iters=2,
    keep_float_max_numel=128,
    val_max_tokens=260,
    eval_stride=32,
    smear_gate=False,
)


@pytest.fixture(scope="module")
def documents(data, tmp_path_factory) -> Path:
    """Data whose validation has documents shorter than a window."""
    return short_documents(data, tmp_path_factory.mktemp("documents") / "data")


def folder(cfg: Config) -> Path:
    return Path(cfg.logs_dir) / cfg.run_id


def events(cfg: Config, kind: str) -> list[dict]:
    """None of a launch that was refused: it leaves no folder."""
    path = folder(cfg) / "metrics.jsonl"
    told = [json.loads(line) for line in path.open()] if path.exists() else []
    return [e for e in told if e["event"] == kind]


def losses(cfg: Config) -> list[float]:
    """Trains; returns the loss of every step."""
    main(cfg)
    return [e["loss"] for e in events(cfg, "step")]


# ── every toggle, every pair ──────────────────────────────────────────────────────────────────────
HALF = dict(swa_every=1, swa_start_kind="iter_frac", swa_start_frac=0.5)
TOGGLES = {
    "SMEAR_GATE": dict(smear_gate=True),
    "SMEAR_GATE_ENABLED": dict(smear_gate_enabled=True),
    "BIGRAM_VOCAB_SIZE": dict(bigram_vocab_size=64, bigram_dim=16),
    "VE_ENABLED": dict(ve_enabled=True, ve_dim=16, ve_layers="0,1"),
    "XSA_LAST_N": dict(xsa_last_n=1),
    "DOC_MASK": dict(doc_mask=True, doc_max_len=40),
    "LN_SCALE": dict(ln_scale=True),
    "SPARSE_ATTN_GATE_ENABLED": dict(sparse_attn_gate_enabled=True),
    "GATED_ATTN_ENABLED": dict(gated_attn_enabled=True),
    "ATTN_OUT_GATE_ENABLED": dict(attn_out_gate_enabled=True),
    "NEGATIVE_SLOPE": dict(negative_slope=0.5),
    "SKIP_GATES_ENABLED": dict(skip_gates_enabled=True),
    "NUM_LOOPS": dict(num_loops=1, loop_start=0, loop_end=0),
    "PARALLEL_START_LAYER": dict(parallel_start_layer=1),
    "PARALLEL_RESIDUAL_START": dict(parallel_residual_start=0),
    "ASYM_LOGIT_RESCALE": dict(asym_logit_rescale=True),
    "MIN_LR": dict(min_lr=0.7),
    "WD_TAPER": dict(wd_taper_final_mult=0.5, wd_taper_start_frac=0.2),
    "TRAIN_SEQ_SCHEDULE": dict(train_seq_schedule="32@0.5,64@1", seq_change_warmup_steps=2),
    "QAT": dict(qat_enabled=True, qat_start_kind="iter_frac", qat_start=0.5),
    "QNA": dict(qna_enabled=True),
    "SWA": dict(swa_enabled=True, **HALF),
    "EMA": dict(ema_enabled=True, ema_decay=0.5),
    "SQWA": dict(sqwa_enabled=True, **HALF),
    "PRUNE_PCT": dict(prune_pct=0.3),
    "DOC_ISOLATED_EVAL": dict(doc_isolated_eval=True),
    "TTT_MODE": dict(ttt_mode="sgd", ttt_chunk_tokens=128, ttt_epochs=1, ttt_freeze_blocks=1),
    "NGRAM_TILT_ENABLED": dict(ngram_tilt_enabled=True, token_order=2, token_threshold=0.3),
}
HEAD_GATES = ("SPARSE_ATTN_GATE_ENABLED", "GATED_ATTN_ENABLED", "ATTN_OUT_GATE_ENABLED")
REFUSED = [
    ("SWA", "EMA"),
    ("SWA", "SQWA"),
    ("SMEAR_GATE", "SMEAR_GATE_ENABLED"),
    *itertools.combinations(HEAD_GATES, 2),
]
PAIRS = [names for names in itertools.combinations(TOGGLES, 2) if names not in REFUSED]
ALONE = [(), *itertools.combinations(TOGGLES, 1)]


def pairs_in(names: tuple) -> set[tuple]:
    return {*itertools.combinations([name for name in TOGGLES if name in names], 2)}


def sevens() -> list[tuple]:
    """Runs of seven toggles each, in which every pair that is not refused meets."""
    left = PAIRS
    found = []
    while left:
        names = left[0]
        while len(names) < 7:
            more = [(*names, name) for name in TOGGLES if name not in names]
            allowed = [each for each in more if not pairs_in(each) & {*REFUSED}]
            names = max(allowed, key=lambda each: len(pairs_in(each) & {*left}))
        found.append(names)
        left = [pair for pair in left if pair not in pairs_in(names)]
    return found


SEVENS = sevens()


def combination(names: tuple, data: Path, logs: Path) -> Config:
    """The small run on this data with these toggles on."""
    paths = dict(
        data_path=str(data), tokenizer_path=str(data / "tokenizer.model"), logs_dir=str(logs)
    )
    settings = {k: v for name in names for k, v in TOGGLES[name].items()}
    return Config(**TINY | SMALL | settings | paths, run_id="-".join(names) or "none")


def assert_all_acted(report: dict, names: tuple) -> None:
    assert (
        report["exit_code"] == 0 and report["inactive"] == [] and math.isfinite(report["val_bpb"])
    )
    assert {*names, "WARMDOWN"} == {
        name for name, row in report["toggles"].items() if row["active"]
    }


@pytest.fixture(scope="module")
def alone(documents, tmp_path_factory):
    """alone(names) -> (cfg, report) of these toggles on one rank, trained once."""
    logs = tmp_path_factory.mktemp("alone")

    @functools.cache
    def train(names: tuple) -> tuple[Config, dict]:
        cfg = combination(names, documents, logs)
        return cfg, main(cfg)

    return train


@pytest.mark.parametrize("names", ALONE, ids="-".join)
def test_each_toggle_trains_exports_reloads_scores_and_acts(alone, names):
    cfg, report = alone(names)
    assert_all_acted(report, names)
    assert read_artifact(folder(cfg) / "artifact.bin")[0] == cfg.knobs("model", "eval")


@pytest.mark.parametrize("names", REFUSED, ids="-".join)
def test_an_ambiguous_pair_is_refused(documents, tmp_path, names):
    with pytest.raises(Refusal, match=f"^{names[0]}|^{names[1]}"):
        combination(names, documents, tmp_path)


def run_combinations(data: Path, logs: Path) -> dict:
    """names -> report, of every combination, in the one process group of this process."""
    return {names: main(combination(names, data, logs)) for names in (*ALONE, *SEVENS)}


def test_every_pair_of_toggles_meets_in_a_run_of_seven():
    assert set().union(*map(pairs_in, SEVENS)) == {*PAIRS}
    assert {len(names) for names in SEVENS} == {7}
    assert len(PAIRS) == math.comb(len(TOGGLES), 2) - len(REFUSED)


def test_each_toggle_and_each_pair_trains_exports_scores_and_acts_on_two_ranks(
    documents, tmp_path, alone
):
    """Pairs run here alone: one rank does what two do, and nothing else."""
    first, second = two_ranks(run_combinations, documents, tmp_path / "two", folder=tmp_path)
    for names in (*ALONE, *SEVENS):
        assert_all_acted(first[names], names)
        assert (
            first[names]["world_size"] == 2
            and first[names]["scores"].keys() == second[names]["scores"].keys()
        )
        assert first[names]["val_bpb"] == second[names]["val_bpb"]
        if names in ALONE:
            _, one = alone(names)
            assert first[names]["val_bpb"] == pytest.approx(one["val_bpb"], rel=1e-3), names
    assert_the_widest_table_is_read_without_wrapping(first.values())


def assert_the_widest_table_is_read_without_wrapping(reports) -> None:
    """All toggles in one table, late in a long run, of small effects that nothing tells from 0."""
    rows = {name: row for report in reports for name, row in report["toggles"].items()}
    for row in rows.values():
        row |= dict(first_step=10_000, last_step=19_999, verdict=train_gpt.UNCLEAR)
        if row["effect_interval"]:
            row |= dict(effect=-5.32e-7, effect_interval=[-9.45e-7, 1.2e-7])
    table = train_gpt.text_table(
        train_gpt.titled("toggle", train_gpt.toggle_rows({"toggles": rows}))
    )
    assert {*TOGGLES} <= rows.keys() and max(map(len, table.splitlines())) <= 120


@pytest.mark.parametrize("names", [("SWA",), ("EMA",), ("SQWA",), ("EMA", "SQWA")], ids="-".join)
def test_the_average_is_what_is_exported_and_scored(tiny, names):
    settings = {k: v for name in names for k, v in TOGGLES[name].items()} | dict(
        ema_decay=0.9, swa_start_frac=0.1
    )
    report = main(
        tiny(
            **settings, warmdown_iters=0, keep_float_max_numel=10**6 if names[-1] != "SQWA" else 512
        )
    )
    away = abs(report["averaged_val_bpb"] - report["live_val_bpb"])
    assert away > 0.02
    assert abs(report["quantised_val_bpb"] - report["averaged_val_bpb"]) < away / 2


# ── proof of action ───────────────────────────────────────────────────────────────────────────────
ONE_BLOCK = dict(loop_start=1, loop_end=1)
NEVER = [
    ("QAT", dict(qat_enabled=True, qat_start_kind="iter_frac", qat_start=1.0)),
    ("QAT", dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.0)),
    ("QAT", dict(qat_enabled=True, qat_start_kind="time_frac", qat_start=1.0)),
    ("QNA", dict(qna_enabled=True, qna_magnitude=0.0)),
    ("QNA", dict(qna_enabled=True, qat_enabled=True, qat_start_kind="iter_frac", qat_start=0.0)),
    ("SWA", dict(swa_enabled=True)),  # SWA_EVERY=50, in a run of 6 steps
    ("SWA", dict(swa_enabled=True, swa_every=1, swa_start_frac=0.0)),
    ("SQWA", dict(sqwa_enabled=True, ema_enabled=True)),
    ("EMA", dict(ema_enabled=True, ema_decay=0.0)),
    ("WARMDOWN", dict(warmdown_iters=1)),
    ("WARMDOWN", dict(warmdown_iters=0, warmdown_frac=0.01)),
    ("MIN_LR", dict(min_lr=0.1)),
    ("WD_TAPER", dict(wd_taper_final_mult=0.5, wd_taper_start_frac=1.0)),
    ("NUM_LOOPS", ONE_BLOCK | dict(num_loops=1, looping_kind="steps", enable_looping_at=6)),
    ("NUM_LOOPS", ONE_BLOCK | dict(num_loops=2, loop_phase2_at=1.0)),
    ("TRAIN_SEQ_SCHEDULE", dict(train_seq_schedule="32@0.99,64@1")),
    ("PRUNE_PCT", dict(prune_pct=0.1, keep_float_max_numel=10**6)),
    ("TTT_MODE", dict(ttt_mode="sgd", ttt_chunk_tokens=6400)),
    ("TTT_MODE", dict(ttt_mode="lora", ttt_lora_lr=0.0)),
    ("PHASED_TTT_ENABLED", dict(ttt_mode="lora", phased_ttt_enabled=True)),
    ("DOC_ISOLATED_EVAL", dict(doc_isolated_eval=True, val_max_tokens=100)),
]


@pytest.mark.parametrize("name, knobs", NEVER, ids=str)
def test_a_toggle_that_never_acts_is_named_and_exits_4(tiny, name, knobs):
    cfg = tiny(smear_gate=False, **knobs)
    report = main(cfg)
    assert (report["exit_code"], report["inactive"]) == (4, [name])
    did = "did nothing"
    if name in train_gpt.STAGED:
        did = "never came to " + [*train_gpt.Schedule(cfg).stages][-1]
    log = (folder(cfg) / "train.log").read_text()
    assert f"INACTIVE: {name} was requested and {did}" in log


def test_a_run_that_is_not_strict_names_it_too_and_exits_0(tiny):
    name, knobs = NEVER[0]
    report = main(tiny(**knobs, strict=False))
    assert (report["exit_code"], report["inactive"]) == (0, [name])


@pytest.mark.parametrize("toggle", ["qat_enabled", "qna_enabled"])
def test_a_toggle_that_would_touch_no_tensor_is_refused_before_training(tiny, toggle):
    knobs = {toggle: True, "keep_float_max_numel": 10**6}
    with pytest.raises(Refusal, match=toggle[:3].upper()) as caught:
        main(tiny(**knobs))
    assert caught.value.code == 4
    assert main(tiny(**knobs, strict=False))["exit_code"] == 0


def test_off_is_the_same_whatever_the_other_knobs_of_the_techniques_say(tiny):
    off = dict(smear_gate=False, train_log_every=1)
    idle = dict(
        smear_pos="post_norm",
        smear_mask_bos=True,
        smear_beta2=0.5,
        bigram_dim=64,
        bigram_proj_gain=0.5,
        bigram_proj_opt="adam",
        quant_bits_bigram=4,
        ve_dim=64,
        ve_layers="0",
        qat_start_kind="lr_scale",
        qat_start=0.9,
        qat_scope="linears",
        qat_grid="amax",
        qat_bits=2,
        qna_magnitude=2.0,
        qna_stop_scale=0.0,
        qna_scope="linears",
        qna_grid="row",
        swa_start_kind="always",
        swa_start_frac=0.9,
        swa_every=1,
        swa_dtype="bf16",
        ema_decay=0.5,
        ttt_lr=0.5,
        ttt_epochs=9,
        ttt_chunk_tokens=99,
        ttt_freeze_blocks=0,
    )
    plain, other = tiny(**off), tiny(**off, **idle)
    assert losses(plain) == losses(other)
    first, second = (
        json.loads((folder(cfg) / "result.json").read_text()) for cfg in (plain, other)
    )
    assert first["val_bpb"] == second["val_bpb"] and first["toggles"].keys() == second[
        "toggles"
    ].keys() == {"WARMDOWN"}


# ── exit codes and signals ────────────────────────────────────────────────────────────────────────
@pytest.fixture
def command(monkeypatch, capfd):
    """command(cfg) -> (exit code, lines on stderr) of the command line in this process."""

    def call(cfg: Config) -> tuple[int, list[str]]:
        for name, value in environment(cfg).items():
            monkeypatch.setenv(name, value)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return train_gpt.command_line([]), capfd.readouterr().err.splitlines()
        finally:
            signal.signal(signal.SIGTERM, handler)

    return call


HUGE = dict(
    matrix_lr=1e38, scalar_lr=1e38, tied_embed_lr=1e38, grad_clip_norm=0.0, warmdown_iters=0
)


@pytest.mark.parametrize(
    "knobs, step",
    [
        (HUGE, "step 1"),
        (HUGE | dict(train_log_every=100), "step 1"),
        (HUGE | dict(iterations=1), ""),
    ],
    ids=["logged", "between logs", "last step"],
)
def test_a_loss_that_is_not_finite_exits_5_and_names_the_step(tiny, command, knobs, step):
    cfg = tiny(**knobs)
    code, stderr = command(cfg)
    assert (
        code == 5
        and len(stderr) == 1
        and step in stderr[0]
        and not (folder(cfg) / "result.json").exists()
    )
    assert "stopped in phase" in (folder(cfg) / "train.log").read_text() and events(cfg, "stopped")


def test_a_good_run_exits_0_with_nothing_on_stderr(tiny, command):
    assert command(tiny()) == (0, [])


def as_on_a_terminal() -> None:
    """In a child: Control-C is what it is for a program in the foreground."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    "name, code, word", [("SIGTERM", 143, "SIGTERM"), ("SIGINT", 130, "SIGINT")]
)
def test_a_signal_ends_the_run_with_its_exit_code_and_one_line(tiny, name, code, word):
    cfg = tiny(iterations=10**4, train_log_every=1)
    with launch(cfg, prepare=as_on_a_terminal) as run:
        run.until(lambda: "step     3" in run.log())
        os.kill(run.processes[0].pid, getattr(signal, name))
        assert run.wait() == [code]
    stderr = run.stderr()
    assert len(stderr.splitlines()) == 1
    assert word in stderr and f"[exit {code}" in stderr
    assert "stopped in phase 'train'" in run.log().splitlines()[-1]


def test_a_run_id_is_never_overwritten(tiny):
    cfg = tiny()
    main(cfg)
    before = {path: path.read_bytes() for path in folder(cfg).iterdir()}
    with pytest.raises(Refusal, match=f"RUN_ID={cfg.run_id}"):
        main(cfg)
    assert {path: path.read_bytes() for path in folder(cfg).iterdir()} == before
    assert {path.name for path in before} == {
        "artifact.bin",
        "checkpoint.bin",
        "metrics.jsonl",
        "result.json",
        "train.log",
        "train_gpt.packed.py",
        "train_gpt.py",
    }


# ── the artifact outlives the run ─────────────────────────────────────────────────────────────────
def test_eval_only_in_a_fresh_process_scores_identically_from_validation_tokens_alone(
    tiny, documents, tmp_path
):
    cfg = tiny(
        doc_isolated_eval=True,
        ttt_mode="sgd",
        ttt_chunk_tokens=128,
        qat_enabled=True,
        ema_enabled=True,
        ema_decay=0.5,
        data_path=str(documents),
    )
    trained, shards = main(cfg), tmp_path / "validation alone"
    shards.mkdir()
    (shards / "fineweb_val_000000.bin").symlink_to(documents / "fineweb_val_000000.bin")
    code, printed = script(
        str(ROOT / "train_gpt.py"),
        EVAL_ONLY=str(folder(cfg) / "artifact.bin"),
        DATA_PATH=str(shards),
        TOKENIZER_PATH=cfg.tokenizer_path,
        LOGS_DIR=str(tmp_path / "fresh"),
        RUN_ID="a",
    )
    assert code == 0 and printed.splitlines()[-1].startswith("RESULT val_bpb"), printed
    scored = json.loads((tmp_path / "fresh/a/result.json").read_text())
    assert scored["val_bpb"] == trained["val_bpb"]
    assert list(scored["scores"]) == ["quantised", "sliding", "documents", "ttt"]
    for mode, found in scored["scores"].items():
        assert {**found, "seconds": 0} == {**trained["scores"][mode], "seconds": 0}
    assert not (tmp_path / "fresh/a/artifact.bin").exists()


def test_eval_only_refuses_another_model_and_takes_other_scoring_knobs(tiny):
    cfg = tiny()
    trained = main(cfg)
    path = str(folder(cfg) / "artifact.bin")
    with pytest.raises(Refusal, match="MODEL_DIM=64"):
        main(tiny(eval_only=path, model_dim=64, given=frozenset({"MODEL_DIM"})))
    same = main(
        tiny(eval_only=path, model_dim=32, given=frozenset({"MODEL_DIM"}), num_layers=7)
    )  # 7 is not "given"
    other = main(tiny(eval_only=path, eval_stride=8, given=frozenset({"EVAL_STRIDE"})))
    assert same["val_bpb"] == trained["val_bpb"] != other["val_bpb"]
    assert same["config"]["num_layers"] == 3 and other["config"]["eval_stride"] == 8


def test_a_run_killed_while_scoring_leaves_a_whole_artifact(tiny):
    cfg = tiny(val_max_tokens=0, eval_stride=1, eval_batch_seqs=1)
    path = folder(cfg) / "artifact.bin"
    with launch(cfg) as run:
        run.until(path.exists)
        run.processes[0].kill()
        assert run.wait() == [-signal.SIGKILL]
    assert not (folder(cfg) / "result.json").exists()
    assert "trained 6 steps" in (folder(cfg) / "train.log").read_text()
    given = frozenset({"EVAL_STRIDE", "EVAL_BATCH_SEQS", "VAL_MAX_TOKENS"})
    scored = main(tiny(eval_only=str(path), given=given))
    assert scored["val_bpb"] == main(tiny())["val_bpb"] and scored["exit_code"] == 0


# ── the training outlives the run: a checkpoint is exported and scored again ──────────────────────
def again(cfg: Config, **settings: str) -> Config:
    """The configuration, from the environment,
    that exports and scores cfg's checkpoint with these settings.
    """
    places = {
        name: getattr(cfg, name.lower()) for name in ("DATA_PATH", "TOKENIZER_PATH", "LOGS_DIR")
    }
    run_id = f"{cfg.run_id}-{'-'.join(f'{n}={v}' for n, v in settings.items())}-again"
    return Config.from_env(
        {**places, "CHECKPOINT": str(folder(cfg) / "checkpoint.bin"), "RUN_ID": run_id, **settings}
    )


def artifact(report: dict) -> bytes:
    return Path(report["artifact_path"]).read_bytes()


def outcome(report: dict, *also: str) -> dict:
    """What a run found, and these keys of result.json;
    nothing that a clock measured while it exported and scored.
    """
    report = json.loads(json.dumps(report))
    for row in [*report["scores"].values(), *report["toggles"].values()]:
        for name in ("seconds", *TIMED):
            row.pop(name, None)
    keys = [
        "scores",
        "toggles",
        "inactive",
        "exit_code",
        "val_bpb",
        "steps",
        "tokens_seen",
        "params",
        "average",
        "groups",
        "pruned",
        "live_val_bpb",
        "averaged_val_bpb",
        "quantised_val_bpb",
        "quant_gap_bpb",
        "fit_cost_bpb",
        "total_bytes",
        "trained_code_sha256",
        "config_sha256",
        *also,
    ]
    return {key: report[key] for key in keys}


CLOCK = (
    "train_seconds",
    "step_ms_median",
    "recompiles",
)  # of the training: a re-export reports the recorded ones
TABLES = dict(bigram_vocab_size=64, bigram_dim=16, quant_bits_embed=8)
# one of those that refuse each other is enough
NOT_BESIDE = ("SWA", "SQWA", "SMEAR_GATE_ENABLED", *HEAD_GATES[1:])
KEPT = {
    "nothing": {},
    "QAT": TOGGLES["QAT"],
    "QNA": TOGGLES["QNA"],
    "EMA": TOGGLES["EMA"],
    "SWA": TOGGLES["SWA"],
    "SWA in bf16": TOGGLES["SWA"] | dict(swa_dtype="bf16"),
    "SWA, native": TOGGLES["SWA"] | TABLES | dict(swa_dtype="native"),
    "SQWA": TOGGLES["SQWA"],
    "SQWA in bf16": TOGGLES["SQWA"] | dict(swa_dtype="bf16"),
    "SQWA of the EMA, QAT": TOGGLES["SQWA"]
    | TOGGLES["EMA"]
    | TOGGLES["QAT"]
    | dict(swa_dtype="native"),
    "SWA and EMA": TOGGLES["SWA"] | TOGGLES["EMA"] | dict(average="swa"),
    "no warm-down": dict(warmdown_iters=0),
    "everything": {
        k: v for name in TOGGLES if name not in NOT_BESIDE for k, v in TOGGLES[name].items()
    },
}


def kept(name: str, data: Path, logs: Path) -> Config:
    paths = dict(
        data_path=str(data), tokenizer_path=str(data / "tokenizer.model"), logs_dir=str(logs)
    )
    return Config(**TINY | SMALL | KEPT[name] | paths, run_id=name)


@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_exported_again_unchanged_gives_the_same_bytes_scores_and_clock(
    documents, tmp_path, name
):
    cfg = kept(name, documents, tmp_path)
    first = main(cfg)
    second = main(again(cfg))
    assert artifact(first) == artifact(second) and first["artifact_path"] != second["artifact_path"]
    assert outcome(first, *CLOCK) == outcome(second, *CLOCK) and first["exit_code"] == 0
    assert (
        second["checkpoint"] == str(folder(cfg) / "checkpoint.bin") and first["checkpoint"] is None
    )
    assert "train" in first["seconds"] and "train" not in second["seconds"]
    assert (
        first["trained_code_sha256"] == CODE_SHA256
        and not (Path(second["artifact_path"]).parent / "checkpoint.bin").exists()
    )


def keep_and_export_again(names: list[str], data: Path, logs: Path) -> dict:
    """name -> (report of the training, report of its checkpoint exported again,
    the two artifacts) on this process's ranks.
    """
    found = {}
    for name in names:
        cfg = kept(name, data, logs)
        reports = main(cfg), main(again(cfg))
        found[name] = (*reports, *map(artifact, reports))
    return found


def test_a_checkpoint_exported_again_on_two_ranks_gives_the_same_and_one_rank_the_same_bytes(
    documents, tmp_path
):
    names = ["QAT", "SQWA of the EMA, QAT", "SWA and EMA", "everything"]
    ranks = two_ranks(keep_and_export_again, names, documents, tmp_path / "two", folder=tmp_path)
    for found in ranks:
        for first, second, trained, exported in found.values():
            assert trained == exported and outcome(first, *CLOCK) == outcome(second, *CLOCK)
            assert first["world_size"] == second["world_size"] == 2 and first["exit_code"] == 0
    for name in names:
        alone = main(again(kept(name, documents, tmp_path / "two"), STRICT="0"))
        assert alone["world_size"] == 1 and artifact(alone) == ranks[0][name][2]
        assert alone["quantised_val_bpb"] == pytest.approx(
            ranks[0][name][0]["quantised_val_bpb"], rel=1e-6
        )


PLAIN = (
    TOGGLES["SWA"]
    | TOGGLES["EMA"]
    | TABLES
    | dict(average="swa", strict=False, quant_clip="search5", quant_scale_floor=False)
)
OTHER_SETTINGS = [
    dict(quant_bits_mlp=5, quant_bits_embed=6),
    dict(quant_bits_attn=16),
    dict(quant_clip="amax"),
    dict(quant_codes="asym", quant_bits_mlp=4),
    dict(quant_scale_floor=True),
    dict(keep_float_max_numel=10**6),
    dict(fp16_keep_name_patterns="mlp.fc"),
    dict(prune_pct=0.3),
    dict(compressor="lzma"),
    dict(compressor="zlib", compress_level=9),
    dict(average="ema"),
    dict(average="none"),
    dict(fit_to_cap=True, cap_bytes=len(train_gpt.pack_code(train_gpt.SOURCE, "lzma")) + 12_200),
    dict(cap_bytes=10_000),
    dict(eval_stride=8),
    dict(eval_stride=0),
    dict(eval_seq_len=32),
    dict(val_max_tokens=130),
    dict(doc_isolated_eval=True),
    TOGGLES["TTT_MODE"],
    dict(average="ema", quant_bits_mlp=4, prune_pct=0.1, eval_stride=16),
]


@pytest.fixture(scope="module")
def plain(documents, tmp_path_factory) -> tuple[Config, dict]:
    """A training without QAT that collects two averages: (cfg, report)."""
    paths = dict(data_path=str(documents), tokenizer_path=str(documents / "tokenizer.model"))
    cfg = Config(
        **TINY | SMALL | PLAIN | paths,
        logs_dir=str(tmp_path_factory.mktemp("plain")),
        run_id="plain",
    )
    return cfg, main(cfg)


@pytest.mark.parametrize("settings", OTHER_SETTINGS, ids=str)
def test_other_export_and_scoring_settings_give_what_a_full_training_with_them_gives(
    plain, tmp_path, settings
):
    cfg, before = plain
    full = main(
        Config(
            **{f.name: getattr(cfg, f.name) for f in train_gpt.KNOBS}
            | settings
            | dict(logs_dir=str(tmp_path))
        )
    )
    text = {name.upper(): str(int(v) if isinstance(v, bool) else v) for name, v in settings.items()}
    second = main(again(cfg, **text, STRICT="0"))
    assert artifact(second) == artifact(full) and outcome(second) == outcome(full)
    assert outcome(second) != {
        **outcome(before),
        "config_sha256": second["config_sha256"],
    }  # they take effect
    for name in CLOCK:
        assert second[name] == before[name]
    assert {name: second["config"][name] for name in settings} == settings
    assert (full["pruned"] > 0) == bool({"prune_pct", "fit_to_cap"} & settings.keys())


def test_a_checkpoint_needs_no_setting_and_an_old_spelling_works_too(plain, tmp_path):
    cfg, before = plain
    assert artifact(main(again(cfg, STRICT="0"))) == artifact(before)
    assert main(again(cfg, STRICT="0", QUANT_BITS="5"))["config"]["quant_bits_attn"] == 5


@pytest.mark.parametrize(
    "name, value, trained",
    [
        ("SEED", "7", "1337"),
        ("MATRIX_LR", "0.5", "0.02"),
        ("MODEL_DIM", "32", "16"),
        ("ITERATIONS", "9", "4"),
        ("EMA_DECAY", "0.75", "0.5"),
        ("SWA_EVERY", "2", "1"),
        ("QAT_ENABLED", "1", "False"),
        ("QNA_ENABLED", "1", "False"),
        ("TRAIN_BATCH_TOKENS", "512", "256"),
        ("TRAIN_SEQ_LEN", "32", "64"),
        ("SMEAR_GATE", "1", "False"),
        ("BIGRAM_HASH_BUCKETS", "128", "64"),
        ("WEIGHT_DECAY", "0.25", "0.0"),
    ],
)
def test_a_setting_that_the_training_contradicts_is_refused_with_both_values(
    plain, name, value, trained
):
    with pytest.raises(Refusal) as caught:
        main(again(plain[0], **{name: value}))
    known = {"BIGRAM_HASH_BUCKETS": "BIGRAM_VOCAB_SIZE", "WEIGHT_DECAY": "ADAM_WD"}.get(name, name)
    message = str(caught.value)
    assert caught.value.code == 2 and message.startswith(
        f"{known}={'True' if trained == 'False' else value}: "
    )
    assert "checkpoint.bin" in message and f"made with {trained};" in message


def test_a_setting_that_the_training_had_is_accepted(plain):
    assert (
        main(again(plain[0], SEED="1337", MODEL_DIM="16", EMA_DECAY="0.50", STRICT="0"))["val_bpb"]
        == plain[1]["val_bpb"]
    )


@pytest.mark.parametrize("toggle", ["QAT", "QNA", "SQWA"])
def test_the_grid_is_a_training_setting_where_training_used_it(documents, tmp_path, toggle):
    cfg = kept(toggle, documents, tmp_path)
    main(cfg)
    for name, value, trained in [
        ("QUANT_BITS_MLP", "5", "6"),
        ("QUANT_CLIP", "amax", "quantile"),
        ("KEEP_FLOAT_MAX_NUMEL", "0", "128"),
        ("QUANT_SCALE_FLOOR", "0", "True"),
    ]:
        with pytest.raises(Refusal) as caught:
            main(again(cfg, **{name: value}))
        shown = "False" if value == "0" and trained == "True" else value
        assert str(caught.value).startswith(f"{name}={shown}: ") and f"made with {trained};" in str(
            caught.value
        )
    assert (
        main(again(cfg, QUANT_BITS_MLP="6", PRUNE_PCT="0.3", COMPRESSOR="zlib"))["exit_code"] == 0
    )


def truncated(data: bytes, share: float) -> bytes:
    return data[: int(share * len(data))]


def flipped(data: bytes, share: float) -> bytes:
    place = int(share * (len(data) - 1))
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGE = {
    f"{change.__name__} at {share}": (lambda data, change=change, share=share: change(data, share))
    for change, shares in (
        (truncated, (0.0, 0.001, 0.5, 0.9999)),
        (flipped, (0.0, 0.0001, 0.01, 0.5, 1.0)),
    )
    for share in shares
} | {"with a tail": lambda data: data + b"!"}


AVERAGED = TOGGLES["SWA"] | TOGGLES["EMA"] | dict(average="ema", strict=False)


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory) -> Path:
    """The folder of a training with the settings AVERAGED."""
    paths = dict(data_path=str(data), tokenizer_path=str(data / "tokenizer.model"))
    logs = tmp_path_factory.mktemp("averaged")
    cfg = Config(**TINY | AVERAGED | paths, logs_dir=str(logs), run_id="averaged")
    main(cfg)
    return folder(cfg)


@pytest.fixture
def checkpoint(averaged, tmp_path) -> tuple[dict, Path]:
    """(the settings of a training, a copy of the file that it left beside the others)."""
    return AVERAGED, Path(shutil.copytree(averaged, tmp_path / "averaged")) / "checkpoint.bin"


def refusal(found: tuple[int, list[str]]) -> str:
    """The one line with which the command line refuses."""
    code, stderr = found
    assert (
        code == 2 and len(stderr) == 1 and "Traceback" not in stderr[0] and "[exit 2" in stderr[0]
    )
    return stderr[0]


def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint, tiny, command):
    settings, path = checkpoint
    data = path.read_bytes()
    assert command(tiny(**settings, checkpoint=str(path))) == (0, [])
    for damage, inflict in DAMAGE.items():
        path.write_bytes(inflict(data))
        assert str(path) in refusal(command(tiny(**settings, checkpoint=str(path)))), damage


def test_another_file_in_its_place_is_refused_in_one_line(checkpoint, tiny, command):
    settings, path = checkpoint
    artifact_path, missing = path.with_name("artifact.bin"), path.with_name("none.bin")
    for other in (artifact_path, missing, path.parent, path.with_name("train.log")):
        assert str(other) in refusal(command(tiny(**settings, checkpoint=str(other))))
    assert str(path) in refusal(command(tiny(**settings, eval_only=str(path))))


FORGED = {  # a right checksum around something that no training wrote
    "no configuration": lambda facts, tensors: facts.pop("config"),
    "a configuration that is none": lambda facts, tensors: facts.update(config=[1]),
    "a knob is missing": lambda facts, tensors: facts["config"].pop("matrix_lr"),
    "a knob is unknown": lambda facts, tensors: facts["config"].update(surprise=1),
    "a knob of another type": lambda facts, tensors: facts["config"].update(ema_decay="0.5"),
    "a knob of a place": lambda facts, tensors: facts["config"].update(data_path="/"),
    "no progress": lambda facts, tensors: facts.pop("progress"),
    "no steps": lambda facts, tensors: facts["progress"].pop("steps"),
    "a clock that is text": lambda facts, tensors: facts["progress"].update(elapsed="soon"),
    "no ledger": lambda facts, tensors: facts.pop("activity"),
    "a toggle without ledger": lambda facts, tensors: facts["activity"].pop("EMA"),
    "a ledger with another column": lambda facts, tensors: facts["activity"]["EMA"].update(evil=1),
    "no count": lambda facts, tensors: facts.pop("snapshots"),
    "live weights missing": lambda facts, tensors: tensors.pop("live/tok_emb"),
    "live weights of another shape": lambda facts, tensors: tensors.update(
        {"live/tok_emb": torch.zeros(3, 3)}
    ),
    "more live weights": lambda facts, tensors: tensors.update({"live/evil": torch.zeros(3)}),
    "an average's tensor missing": lambda facts, tensors: tensors.pop("ema/tok_emb"),
    "an average's tensor of one number": lambda facts, tensors: tensors.update(
        {"sum/tok_emb": torch.zeros(1)}
    ),
    "a sum that is not finite": lambda facts, tensors: tensors["sum/tok_emb"].fill_(math.inf),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_checkpoint_that_no_training_wrote_is_refused_in_one_line(
    checkpoint, tiny, command, change
):
    settings, path = checkpoint
    facts, tensors = read_container(path)
    change(facts, tensors)
    path.write_bytes(encode_container(tensors, facts, "none"))
    assert str(path) in refusal(command(tiny(**settings, checkpoint=str(path))))


def test_facts_of_a_checkpoint_reach_nothing_but_the_clock(checkpoint, tiny):
    settings, path = checkpoint
    facts, tensors = read_container(path)
    facts["progress"].update(cfg=None, model=None)
    path.write_bytes(encode_container(tensors, facts, "none"))
    assert main(tiny(**settings, checkpoint=str(path)))["exit_code"] == 0


def test_a_checkpoint_and_an_artifact_together_are_refused_in_one_line(monkeypatch, capfd):
    monkeypatch.setenv("CHECKPOINT", "a.bin")
    monkeypatch.setenv("EVAL_ONLY", "b.bin")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    code = train_gpt.command_line([])
    message = refusal((code, capfd.readouterr().err.splitlines()))
    assert "CHECKPOINT=a.bin" in message and "EVAL_ONLY" in message


# ── several averages are collected, one is shipped ────────────────────────────────────────────────
@pytest.mark.parametrize(
    "shipped, alone", [("none", {}), ("swa", TOGGLES["SWA"]), ("ema", TOGGLES["EMA"])], ids=str
)
def test_the_average_that_is_asked_for_is_shipped_while_all_are_collected(tiny, shipped, alone):
    both, single = tiny(**TOGGLES["SWA"], **TOGGLES["EMA"], average=shipped), tiny(**alone)
    report, reference = main(both), main(single)
    assert artifact(report) == artifact(reference) and report["val_bpb"] == reference["val_bpb"]
    assert report["average"] == reference["average"] == shipped
    assert (
        report["toggles"]["SWA"]["active"]
        and report["toggles"]["EMA"]["active"]
        and report["exit_code"] == 0
    )
    assert (report["averaged_val_bpb"] is None) == (shipped == "none")
    log = (folder(both) / "train.log").read_text()
    for name in ("swa", "ema"):
        line = next(line for line in log.splitlines() if line.startswith(f"average: {name} "))
        assert line.endswith(
            "applied: yes" if name == shipped else f"applied: no (AVERAGE={shipped})"
        )


@pytest.mark.parametrize(
    "knobs, blamed",
    [
        (TOGGLES["SWA"] | TOGGLES["EMA"], "SWA_ENABLED"),
        (dict(average="ema"), "AVERAGE=ema"),
        (TOGGLES["EMA"] | dict(average="swa"), "AVERAGE=swa"),
    ],
    ids=str,
)
def test_an_average_that_is_ambiguous_or_not_collected_is_refused(tiny, knobs, blamed):
    with pytest.raises(Refusal, match=blamed):
        tiny(**knobs)


# ── compilers ─────────────────────────────────────────────────────────────────────────────────────
def test_a_compiled_run_equals_an_eager_one_and_does_not_recompile_when_qat_starts(
    tiny, monkeypatch
):
    inductor = torch._inductor.config
    monkeypatch.setattr(inductor, "compile_threads", 1)  # no workers that outlive the test
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)  # half the time, and one code everywhere
    met = []

    def generate_for_training(graph, inputs):
        """Code for the graph that trains; the 18 other kernels cost most of a minute."""
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        met.append("inductor" if trains else "aot_eager")
        return torch._dynamo.lookup_backend(met[-1])(graph, inputs)

    compiled_so = functools.partial(torch.compile, backend=generate_for_training)
    monkeypatch.setattr(torch, "compile", compiled_so)
    torch._dynamo.reset()
    knobs = dict(
        num_layers=1,
        num_kv_heads=4,
        mlp_mult=1.0,
        muon_backend_steps=2,
        train_log_every=1,
        eval_stride=0,
        smear_gate=False,
        qat_enabled=True,
        qat_start_kind="iter_frac",
        qat_start=0.5,
        warmup_steps=2,
        eval_batch_seqs=8,
    )
    eager, compiled = tiny(**knobs), tiny(**knobs, compile="1")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    report, reference = (
        json.loads((folder(cfg) / "result.json").read_text()) for cfg in (compiled, eager)
    )
    assert (
        report["compile"]
        and report["recompiles"] == 0
        and report["toggles"]["QAT"]["first_step"] == 3
    )
    assert report["val_bpb"] == pytest.approx(reference["val_bpb"], rel=1e-3)
    assert met.count("inductor") == 1
    torch._dynamo.reset()


def test_eval_only_needs_no_training_setting(tiny):
    made = tiny(
        train_seq_len=48, train_batch_tokens=480
    )  # 48 does not divide the default TRAIN_BATCH_TOKENS
    first = train_gpt.main(made)
    again = train_gpt.main(
        train_gpt.Config(
            data_path=made.data_path,
            tokenizer_path=made.tokenizer_path,
            run_id="again",
            logs_dir=made.logs_dir,
            eval_only=first["artifact_path"],
        )
    )
    assert again["val_bpb"] == first["val_bpb"] and again["exit_code"] == 0


def test_ntk_scaling_that_does_nothing_is_inactive(tiny):
    assert train_gpt.main(tiny(rope_ntk_len=32))["toggles"]["ROPE_NTK_LEN"]["active"]
    idle = train_gpt.main(tiny(rope_ntk_len=64))  # as long as the training row: no stretch
    assert idle["exit_code"] == 4 and idle["inactive"] == ["ROPE_NTK_LEN"]

"""A setting that is given and can do nothing is named; the settings of a log can be pasted back.

Failures that these tests would have caught: EMA_DECAY documented by #975 and read by nobody; a
WARMDOWN_ITERS that WARMDOWN_FRAC overrules; QAT_* and SWA_* of a factorial whose toggle is off; the
settings of a log that a shell reads otherwise, as they held True, spaces or quotes.
"""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BY_NAME,
    COMPARED,
    KNOBS,
    Config,
    Refusal,
    main,
    read_artifact,
    settings_line,
)

NEEDING = {f.name: f.metadata["needs"] for f in KNOBS if f.metadata["needs"]}
# The toggle of each technique, by what its knobs begin with
TOGGLES = {
    "ve": "ve_enabled",
    "smear": "smear_gate",
    "sparse_attn_gate": "sparse_attn_gate_enabled",
    "gated_attn": "gated_attn_enabled",
    "loop": "num_loops",
    "parallel": "parallel_start_layer",
    "bigram": "bigram_vocab_size",
    "qat": "qat_enabled",
    "qna": "qna_enabled",
    "swa": "swa_enabled",
    "ema": "ema_enabled",
    "gptq": "gptq_enabled",
    "lqer": "lqer_enabled",
    "ttt": "ttt_mode",
    "phased_ttt": "phased_ttt_enabled",
    "global_ttt": "phased_ttt_enabled",
    "token": "ngram_tilt_enabled",
}
# Toggles that no knob tunes alone
UNTUNED = {
    "sqwa_enabled",
    "smear_gate_enabled",
    "attn_out_gate_enabled",
    "skip_gates_enabled",
    "gated_attn_quant_gate",
    "parallel_residual_start",
}


def needed_by(name: str) -> set[str]:
    """The knobs that this one needs, and those that these need."""
    words = [word.partition("=")[0] for word in NEEDING.get(name, "").split()]
    return set(words).union(*map(needed_by, words))


# ── The declaration ───────────────────────────────────────────────────────────────────────────────
def test_every_knob_of_a_technique_says_that_it_needs_it():
    for f in KNOBS:
        toggles = [TOGGLES[word] for word in TOGGLES if f.name.startswith(f"{word}_")]
        for toggle in toggles if f.name not in {*toggles, *UNTUNED} else ():
            assert toggle in needed_by(f.name), f.name
    techniques = {f.name for f in KNOBS if f.name.endswith(("_enabled", "_gate", "_mode"))}
    parts = {"train_seq_schedule_mode", "lqer_asym_enabled"}
    checks = {"caseops_enabled"}  # what data must be, and nothing that is done
    assert techniques <= {*TOGGLES.values(), *UNTUNED, *parts, *checks}


def test_what_a_knob_needs_is_a_knob():
    for name, needs in NEEDING.items():
        for word in needs.split():
            knob, _, value = word.partition("=")
            assert word in ("or", "and", "not") or knob.upper() in BY_NAME, name
            assert not value or value in BY_NAME[knob.upper()].metadata["choices"], name


def test_a_number_other_than_zero_leaves_nothing_idle_but_16_bits_do():
    words = {word.partition("=")[0] for needs in NEEDING.values() for word in needs.split()}
    for name in words - {"or", "and", "not"}:
        off = BY_NAME[name.upper()].metadata["off"]
        numbers = {16} if name.startswith("quant_bits_") else {0}
        # a taper to the whole weight decay is none
        numbers = {1} if name == "wd_taper_final_mult" else numbers
        assert {value for value in off if not isinstance(value, str)} == numbers & {*off}, name
    few = vain("BIGRAM_VOCAB_SIZE=16 BIGRAM_DIM=64 MUON_MOMENTUM_WARMUP_STEPS=16")
    assert few == vain("MUON_MOMENTUM_WARMUP_STEPS=16 MUON_MOMENTUM_WARMUP_START=.8") == {}


def another(f: dataclasses.Field):
    """A value of this knob that is not its default."""
    choices = [value for value in f.metadata["choices"] if value not in (f.default, "auto")]
    if choices:
        return choices[0]
    others = {"bool": not f.default, "int": 2, "float": 0.3, "str": "1"}
    return others[f.type]


def test_a_knob_without_what_it_needs_changes_nothing(tiny):
    off = dict(
        smear_gate=False,
        warmdown_frac=0.0,
        warmdown_iters=0,
        muon_wd=0.0,
        muon_momentum_warmup_steps=0,
        quant_bits_mlp=16,
        quant_bits_attn=16,
        eval_stride=0,
        iterations=5,
    )
    changed = {name: another(BY_NAME[name.upper()]) for name in NEEDING}
    # no average is collected, and so none can be chosen
    changed["average"] = "none"
    # it needs that WARMDOWN_FRAC is off, and is the other knob of the warmdown
    del changed["warmdown_iters"]
    found = []
    for knobs in ({}, changed):
        cfg = tiny(**{**off, **knobs})
        assert NEEDING.keys() - {"warmdown_iters"} <= cfg.idle().keys()
        result = main(cfg)
        _, weights = read_artifact(Path(cfg.logs_dir) / cfg.run_id / "artifact.bin")
        found.append((result["val_bpb"], result["live_val_bpb"], result["toggles"], weights))
    (*figures, weights), (*others, other_weights) = found
    assert figures == others and weights.keys() == other_weights.keys()
    assert all(w.equal(other_weights[name]) for name, w in weights.items())


# ── What is said ──────────────────────────────────────────────────────────────────────────────────
def vain(command: str) -> dict[str, str]:
    return Config.from_env(dict(word.split("=", 1) for word in command.split())).without_effect()


@pytest.mark.parametrize(
    "command, told",
    [
        ("", {}),
        ("QAT_SCOPE=linears", {"QAT_SCOPE": "QAT_ENABLED=0"}),
        ("QAT_SCOPE=linears QAT_ENABLED=1", {}),
        ("QAT_START_FRAC=0.7 ENABLE_QAT=0", {"QAT_START": "QAT_ENABLED=0"}),
        ("SWA_EVERY=7", {"SWA_EVERY": "SWA_ENABLED=0 SQWA_ENABLED=0"}),
        ("SWA_EVERY=7 SQWA_ENABLED=1", {}),
        ("SWA_START_FRAC=.3", {"SWA_START_FRAC": "SWA_ENABLED=0 SQWA_ENABLED=0"}),
        (
            "SWA_START_FRAC=.3 SWA_ENABLED=1 SWA_START_KIND=always",
            {"SWA_START_FRAC": "SWA_START_KIND=always"},
        ),
        ("EMA_DECAY=0.9", {"EMA_DECAY": "EMA_ENABLED=0"}),
        (
            "TTT_LR=0.1 TTT_EPOCHS=1",
            {"TTT_LR": "TTT_MODE=none", "TTT_EPOCHS": "TTT_MODE=none"},
        ),
        ("TTT_LR=0.1 TTT_MODE=sgd TTT_LORA_LR=0.1", {"TTT_LORA_LR": "TTT_MODE=sgd"}),
        ("TTT_LR=0.1 TTT_MODE=lora TTT_LORA_LR=0.1", {"TTT_LR": "TTT_MODE=lora"}),
        ("TTT_MODE=lora GLOBAL_TTT_LR=0.1", {"GLOBAL_TTT_LR": "PHASED_TTT_ENABLED=0"}),
        ("WARMDOWN_ITERS=9 WARMDOWN_FRAC=0.5", {"WARMDOWN_ITERS": "WARMDOWN_FRAC=0.5"}),
        ("WARMDOWN_ITERS=9", {}),
        ("MIN_LR=.1 WARMDOWN_ITERS=0", {"MIN_LR": "WARMDOWN_FRAC=0.0 WARMDOWN_ITERS=0"}),
        ("MIN_LR=.1 WARMDOWN_FRAC=.5", {}),
        ("WD_TAPER_START_FRAC=.5", {"WD_TAPER_START_FRAC": "WD_TAPER_FINAL_MULT=1.0"}),
        ("ENABLE_LOOPING_AT=.5", {"ENABLE_LOOPING_AT": "NUM_LOOPS=0"}),
        ("SEQ_CHANGE_WARMUP_STEPS=9", {"SEQ_CHANGE_WARMUP_STEPS": "TRAIN_SEQ_SCHEDULE=''"}),
        (
            "MUON_MOMENTUM_WARMUP_START=.8 MUON_MOMENTUM_WARMUP_STEPS=0",
            {"MUON_MOMENTUM_WARMUP_START": "MUON_MOMENTUM_WARMUP_STEPS=0"},
        ),
        ("SMEAR_BETA2=0 SMEAR_GATE=0", {"SMEAR_BETA2": "SMEAR_GATE=0"}),
        ("QUANT_BITS_BIGRAM=8", {"QUANT_BITS_BIGRAM": "BIGRAM_VOCAB_SIZE=0 VE_ENABLED=0"}),
        ("AVERAGE=none", {"AVERAGE": "SWA_ENABLED=0 EMA_ENABLED=0 SQWA_ENABLED=0"}),
        (
            "QUANT_CLIP=amax QUANT_BITS_MLP=16 QUANT_BITS_ATTN=16",
            {
                "QUANT_CLIP": "QUANT_BITS_MLP=16 QUANT_BITS_ATTN=16 "
                "BIGRAM_VOCAB_SIZE=0 VE_ENABLED=0 QUANT_BITS_EMBED=16"
            },
        ),
        ("QUANT_CLIP=amax QUANT_BITS_MLP=16", {}),
        (
            "QUANT_CLIP=amax QUANT_CLIP_MLP=amax QUANT_CLIP_ATTN=search5",
            {
                "QUANT_CLIP": "QUANT_CLIP_MLP=amax QUANT_CLIP_ATTN=search5 "
                "BIGRAM_VOCAB_SIZE=0 VE_ENABLED=0 QUANT_BITS_EMBED=16"
            },
        ),
        ("QUANT_CLIP=amax QUANT_CLIP_MLP=amax", {}),
        ("ROPE_NTK_LEN=2048", {"ROPE_NTK_LEN": "TRAIN_SEQ_LEN=2048"}),
        ("ROPE_NTK_LEN=2047", {}),
        ("DOC_MASK=1 DOC_MAX_LEN=2048", {"DOC_MAX_LEN": "no row has more than 2048 tokens"}),
        ("DOC_MASK=1 DOC_MAX_LEN=2047", {}),
        ("DOC_MASK=1 DOC_MAX_LEN=2048 EVAL_SEQ_LEN=4096", {}),
        ("DOC_MASK=1 DOC_MAX_LEN=2048 LOADER=documents", {}),
        ("DOC_MAX_LEN=2048", {"DOC_MAX_LEN": "DOC_MASK=0"}),
        # what a base says was given by nobody
        ("BASE=pr989 ENABLE_QAT=0", {}),
        ("BASE=pr989 QAT_START_FRAC=0.7", {"QAT_START": "QAT_ENABLED=0"}),
    ],
)
def test_what_is_given_and_can_do_nothing_is_named_with_the_reason(command, told):
    assert vain(command) == told


def test_where_an_artifact_is_scored_what_only_trains_or_exports_can_do_nothing():
    given = """EVAL_ONLY=a.bin MATRIX_LR=0.1 SEED=3 QUANT_BITS_MLP=5 PRUNE_PCT=0.1 NONFINITE=skip
    CAP_BYTES=9 EVAL_STRIDE=8 VAL_MAX_TOKENS=9 STRICT=0"""
    names = {"MATRIX_LR", "SEED", "QUANT_BITS_MLP", "PRUNE_PCT", "NONFINITE"}
    assert vain(given) == dict.fromkeys(names, "EVAL_ONLY=a.bin")


def test_where_a_checkpoint_is_exported_what_only_trains_can_do_nothing():
    # its other training settings are compared with those that made it
    found = vain("CHECKPOINT=a.bin CHECKPOINT_EVERY=3 BASE=upstream PRUNE_PCT=0.1 MATRIX_LR=0.1")
    assert found == dict.fromkeys(("BASE", "CHECKPOINT_EVERY"), "CHECKPOINT=a.bin")


def test_settings_of_other_scripts_that_do_nothing_stand_in_the_same_line():
    found = vain("EMBED_LR=0.6 QAT_SCOPE=linears")
    assert set(found) == {"EMBED_LR", "QAT_SCOPE"} and "there either" in found["EMBED_LR"]


def test_log_and_result_name_what_is_without_effect(tiny):
    cfg = tiny(iterations=2)
    names = frozenset({"QAT_SCOPE", "EMA_DECAY", "ITERATIONS"})
    cfg = dataclasses.replace(cfg, qat_scope="linears", given=names, others={"HEAD_LR": "off"})
    result = main(cfg)
    folder = Path(cfg.logs_dir) / cfg.run_id
    assert set(result["without_effect"]) == {"QAT_SCOPE", "EMA_DECAY", "HEAD_LR"}
    assert json.loads((folder / "result.json").read_text()) == result
    lines = (folder / "train.log").read_text().splitlines()
    (line,) = [line for line in lines if "without effect" in line]
    assert all(name in line for name in result["without_effect"]) and "ITERATIONS" not in line


# ── Settings that can be pasted back ──────────────────────────────────────────────────────────────
def values_of(f: dataclasses.Field) -> st.SearchStrategy:
    """Values that this knob can take, whatever the others are."""
    limits = f.metadata
    if limits["choices"]:
        return st.sampled_from(limits["choices"])
    if f.type == "bool":
        return st.booleans()
    if f.type == "str":
        return st.text(st.sampled_from("ab 7\u00fc\u3000'\"\\$`#=;&|*~?!.,/-(){}"), max_size=8)
    least = 0 if limits["lo"] is None else limits["lo"]
    most = 1000 if limits["hi"] is None else limits["hi"]
    if f.type == "int":
        return st.integers(int(least), int(most))
    return st.floats(least, most)


@st.composite
def configurations(draw) -> Config:
    """Any configuration: knobs are changed one by one, as long as the rules take it."""
    cfg = Config()
    for f in draw(st.lists(st.sampled_from(KNOBS), max_size=12)):
        if f.name == "base":
            continue
        try:
            cfg = dataclasses.replace(cfg, **{f.name: draw(values_of(f))})
        except Refusal:
            continue
    return cfg


@settings(max_examples=60)
@given(configurations())
def test_the_settings_of_a_log_read_back_to_the_same_configuration(cfg):
    words = shlex.split(settings_line(cfg))
    variables = dict(word.split("=", 1) for word in words)
    assert Config.from_env(variables) == cfg
    assert Config.from_env({}, words) == cfg
    assert variables.keys() >= cfg.non_default().keys()


@pytest.mark.parametrize("told", [{"num_loops": 1}, {"qat_enabled": True, "qat_start": 0.3}])
def test_what_scripts_read_differently_is_settled_in_the_line(told):
    cfg = Config(**told)
    words = shlex.split(settings_line(cfg))
    assert Config.from_env({}, words) == cfg and len(words) == len(told) + 1


@pytest.mark.parametrize("base", train_gpt.base_tables())
def test_the_settings_of_a_base_need_no_base_where_they_are_pasted(base):
    cfg = Config.from_env({"BASE": base})
    line = settings_line(cfg)
    again = Config.from_env(dict(word.split("=", 1) for word in shlex.split(line)))
    assert "BASE" not in line and again == dataclasses.replace(cfg, base="")


# What changes nothing of such a run: when it speaks, steps that are undone, what is for one over
# the cap
SILENT = {"train_log_every", "val_loss_every", "warmup_steps", "fit_to_cap"}
# Values where that of another() is none, no other one, or needs more
OTHERS = dict(
    rope_base=50.0,
    ve_enabled=dict(ve_enabled=True, ve_layers="0"),
    loader="shuffled",
    grad_clip_norm=0.01,
    smear_gate=True,
    num_loops=dict(num_loops=1, loop_start=0, loop_end=0),
    parallel_start_layer=1,
    parallel_residual_start=0,
    swa_enabled=dict(swa_enabled=True, swa_every=1),
    sqwa_enabled=dict(sqwa_enabled=True, swa_every=1),
    num_layers=1,
    iterations=3,
    eval_seq_len=32,
    model_dim=64,
    num_heads=2,
    num_kv_heads=1,
    rope_ntk_len=16,
    bigram_vocab_size=16,
    val_max_tokens=300,
    train_seq_len=32,
    train_batch_tokens=256,
    eval_stride=8,
    train_seq_schedule="32@0.5,64@1",
)


def test_a_knob_that_needs_nothing_changes_something(tiny):
    def figures(knobs: dict) -> tuple:
        small = dict(iterations=2, num_layers=2, smear_gate=False, val_max_tokens=64, strict=False)
        cfg = tiny(**{**small, **knobs})
        result = main(cfg)
        artifact = (Path(cfg.logs_dir) / cfg.run_id / "artifact.bin").read_bytes()
        size = result["total_bytes"], result["exit_code"]
        return artifact, size, result["val_bpb"], result["steps"], sorted(result["scores"])

    plain = figures({})
    silent = set()
    for f in KNOBS:
        # a tokenizer has one size of its vocabulary
        free = not f.metadata["needs"] and f.name != "vocab_size"
        if free and f.metadata["scope"] in ("seed", *COMPARED):
            value = OTHERS.get(f.name, another(f))
            if figures(value if isinstance(value, dict) else {f.name: value}) == plain:
                silent.add(f.name)
    assert silent == SILENT

"""Settings are arguments or variables: typed, checked, never ignored.

Failures that these tests would have caught: #194's own run command set WARMDOWN_STEPS, which its
script never read; #549, #975 and the record's parent documented variables that no script read
(EMA_DECAY, LATE_QAT, PHASED_TTT_ENABLED); #1048 and #212 were poisoned by stale variables;
bool("0") is True; #989 and #117 gave QAT_START_FRAC opposite meanings; a checker with false
alarms, which people switch off; two runs averaged although one knob differed (#2124, #989).
"""

import collections
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
from itertools import takewhile

import pytest
import torch
from conftest import HANG, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ABSENT,
    ALIASES,
    ANY,
    EXIT_CODES,
    GPT,
    KNOBS,
    NEVER,
    Config,
    Refusal,
    command_line,
    text_table,
)

BY_NAME = {f.name.upper(): f for f in KNOBS}
NUMERIC = [f for f in KNOBS if f.type in ("int", "float")]
BOOLS = [f.name.upper() for f in KNOBS if f.type == "bool"]


def parse(command: str) -> dict[str, str]:
    """The environment assignments that a shell command starts with."""
    words = shlex.split(command.replace("\\\n", " "))
    return dict(word.split("=", 1) for word in takewhile(lambda word: "=" in word, words))


def refused(env: dict[str, str]) -> str:
    """The message with which this environment is refused, exit code 2."""
    with pytest.raises(Refusal) as refusal:
        Config.from_env(env)
    assert refusal.value.code == 2
    return str(refusal.value)


# ── Commands that were published ──────────────────────────────────────────────────────────────────
PUBLISHED_194 = r"""NCCL_NVLS_ENABLE=0 \
VOCAB_SIZE=1024 NUM_HEADS=8 NUM_KV_HEADS=4 MODEL_DIM=512 \
NUM_LAYERS=11 MLP_MULT=3 \
QAT=1 QUANT_BITS=6 FP16_EMBED=1 LATE_K_LAYERS=0 \
EVAL_STRIDE=64 EVAL_BATCH_SEQS=32 \
MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 \
MUON_MOMENTUM=0.99 MUON_WEIGHT_DECAY=0.038 \
SMEAR_GATE=1 BIGRAM_HASH=0 \
TRAIN_SEQ_LEN=2048 TRAIN_BATCH_TOKENS=524288 \
WARMDOWN_STEPS=3000 MAX_WALLCLOCK_SECONDS=600 \
SWA_ENABLED=1 SWA_START_FRAC=0.5 SWA_EVERY=50 \
torchrun --standalone --nproc_per_node=8 train_gpt.py"""
MEANT_194 = dict(
    vocab_size=1024,
    num_heads=8,
    num_kv_heads=4,
    model_dim=512,
    num_layers=11,
    mlp_mult=3.0,
    qat_enabled=True,
    quant_bits_mlp=6,
    quant_bits_attn=6,
    quant_bits_bigram=6,
    quant_bits_embed=16,
    eval_stride=64,
    eval_batch_seqs=32,
    matrix_lr=0.02,
    scalar_lr=0.02,
    tied_embed_lr=0.03,
    muon_momentum=0.99,
    muon_wd=0.038,
    smear_gate=True,
    bigram_vocab_size=0,
    train_seq_len=2048,
    train_batch_tokens=524288,
    warmdown_iters=3000,
    max_wallclock_seconds=600.0,
    swa_enabled=True,
    swa_start_frac=0.5,
    swa_every=50,
)


def test_the_published_command_of_194_means_what_it_says():
    cfg = Config.from_env(parse(PUBLISHED_194))
    assert {name: getattr(cfg, name) for name in MEANT_194} == MEANT_194
    assert cfg == Config(**MEANT_194)  # and nothing else moved
    assert cfg.given == {name.upper() for name in MEANT_194}


@pytest.mark.parametrize(
    "name, knob",
    [
        ("WARMDOWN_STEPS", "warmdown_iters"),
        ("MUON_WEIGHT_DECAY", "muon_wd"),
        ("QUANT_BITS", "quant_bits_mlp"),
        ("SWA_EVERY", "swa_every"),
        ("NUM_LAYERS", "num_layers"),
        ("EVAL_BATCH_SEQS", "eval_batch_seqs"),
    ],
)
def test_no_assignment_of_that_command_is_dead(name, knob):
    changed = Config.from_env({**parse(PUBLISHED_194), name: "7"})
    assert getattr(changed, knob) == 7


def test_bare_defaults_are_194s_architecture_with_every_averaging_and_quantisation_toggle_off():
    cfg = Config.from_env({})
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(cfg).parameters()) == 26_502_232
    assert (
        cfg.smear_gate
        and cfg.smear_pos == "pre_norm"
        and cfg.init == "ortho"
        and cfg.negative_slope == 0
    )
    assert (cfg.bigram_vocab_size, cfg.ve_enabled, cfg.xsa_last_n, cfg.ln_scale) == (
        0,
        False,
        0,
        False,
    )
    assert (cfg.ttt_mode, cfg.doc_isolated_eval, cfg.prune_pct, cfg.fit_to_cap) == (
        "none",
        False,
        0,
        False,
    )
    assert (
        cfg.qat_enabled,
        cfg.swa_enabled,
        cfg.ema_enabled,
        cfg.qna_enabled,
        cfg.sqwa_enabled,
    ) == (False,) * 5
    assert (cfg.quant_bits_mlp, cfg.quant_bits_attn, cfg.quant_bits_embed) == (6, 6, 16)
    assert (cfg.compressor, cfg.compress_level, cfg.eval_stride, cfg.cap_bytes) == (
        "zstd",
        -1,
        64,
        16_000_000,
    )
    assert cfg.non_default() == {} and cfg.shipped_average == "none"


# ── Old spellings ─────────────────────────────────────────────────────────────────────────────────
LR_TRIGGER = {"QAT_START_KIND": "lr_scale"}
# Old name: (value, other variables, what must differ from the defaults), none of it a default
OLD_SPELLINGS = {
    "DATA_DIR": (
        "here",
        {},
        {
            "DATA_PATH": "here/datasets/fineweb10B_sp1024",
            "TOKENIZER_PATH": "here/tokenizers/fineweb_1024_bpe.model",
        },
    ),
    "DATASETS_DIR": ("here", {}, {"DATA_PATH": "here"}),
    "ARTIFACT_DIR": ("here", {}, {"LOGS_DIR": "here"}),
    "MLP_HIDDEN": ("992", {}, {"MLP_MULT": 1.9375}),
    "ACTIVATION": ("leaky_relu2", {}, {"NEGATIVE_SLOPE": 0.5}),
    "LEAKY_SLOPE": ("0.3", {}, {"NEGATIVE_SLOPE": 0.3}),
    "LEAKY_RELU_SLOPE": ("0.3", {}, {"NEGATIVE_SLOPE": 0.3}),
    "MLP_LEAKY_SLOPE": ("0.3", {}, {"NEGATIVE_SLOPE": 0.3}),
    "MLP_ACT": ("leaky_relu2", {}, {"NEGATIVE_SLOPE": 0.5}),
    "GATE_ATTN_OUT": ("1", {}, {"ATTN_OUT_GATE_ENABLED": True}),
    "GATE_WIDTH": ("8", {}, {"GATE_WINDOW": 8}),
    "SMEAR_GATE_WIDTH": ("8", {}, {"GATE_WINDOW": 8}),
    "RECUR_LAYERS": (
        "5,4",
        {},
        {"NUM_LOOPS": 1, "LOOP_START": 4, "LOOPING_KIND": "steps", "ENABLE_LOOPING_AT": 3000.0},
    ),
    "SMEAR_GATE_BOS_FIX": ("1", {}, {"SMEAR_MASK_BOS": True}),
    "SLIDING_EVAL": ("0", {}, {"EVAL_STRIDE": 0}),
    "SLIDING_WINDOW_ENABLED": ("0", {}, {"EVAL_STRIDE": 0}),
    "QAT": ("1", {}, {"QAT_ENABLED": True}),
    "ENABLE_QAT": ("1", {"QAT_START_KIND": "always"}, {"QAT_ENABLED": True}),
    "LATE_QAT": ("1", {"QAT_START_KIND": "always"}, {"QAT_ENABLED": True}),
    "SWA": ("1", {}, {"SWA_ENABLED": True}),
    "MUON_WEIGHT_DECAY": ("0.5", {}, {"MUON_WD": 0.5}),
    "WEIGHT_DECAY": ("0.5", {}, {"ADAM_WD": 0.5}),
    "ADAM_WEIGHT_DECAY": ("0.5", {}, {"ADAM_WD": 0.5}),
    "SCALAR_WD": ("0.5", {}, {"ADAM_WD": 0.5}),
    "LOADER_MODE": ("coprime", {}, {"LOADER": "coprime"}),
    "USE_POLAR_EXPRESS": ("1", {}, {"MUON_COEFFS": "polar_express"}),
    "POLAR_EXPRESS_NS": ("1", {}, {"MUON_COEFFS": "polar_express"}),
    "POLAR_EXPRESS": ("1", {}, {"MUON_COEFFS": "polar_express"}),
    "RECUR_START_STEP": (
        "3000",
        {"NUM_LOOPS": "1", "LOOP_START": "3", "LOOP_END": "5"},
        {"LOOPING_KIND": "steps", "ENABLE_LOOPING_AT": 3000.0, "NUM_LOOPS": 1},
    ),
    "WARMDOWN_STEPS": ("77", {}, {"WARMDOWN_ITERS": 77}),
    "LR_FLOOR": ("0.1", {}, {"MIN_LR": 0.1}),
    "WARMDOWN_FRACTION": ("0.2", {}, {"WARMDOWN_FRAC": 0.2}),
    "QAT_START_FRAC": ("0.7", LR_TRIGGER, {"QAT_START": 0.7, "QAT_START_KIND": "lr_scale"}),
    "LATE_QAT_THRESHOLD": ("0.15", {}, {"QAT_START": 0.15, "QAT_START_KIND": "lr_scale"}),
    "QAT_THRESHOLD": ("0.1", {}, {"QAT_START": 0.1, "QAT_START_KIND": "lr_scale"}),
    "BIGRAM_HASH": ("1", {"BIGRAM_VOCAB_SIZE": "4096"}, {"BIGRAM_VOCAB_SIZE": 4096}),
    "BIGRAM_HASH_BUCKETS": ("2048", {}, {"BIGRAM_VOCAB_SIZE": 2048}),
    "BIGRAM_HASH_DIM": ("64", {}, {"BIGRAM_DIM": 64}),
    "QUANT_BITS": ("5", {}, {"QUANT_BITS_MLP": 5, "QUANT_BITS_ATTN": 5, "QUANT_BITS_BIGRAM": 5}),
    "MATRIX_BITS": ("5", {}, {"QUANT_BITS_MLP": 5, "QUANT_BITS_ATTN": 5}),
    "EMBED_BITS": ("7", {}, {"QUANT_BITS_EMBED": 7}),
    "FP16_EMBED": ("0", {}, {"QUANT_BITS_EMBED": 8}),
    "FP16_EMBED_EXPORT": ("0", {}, {"QUANT_BITS_EMBED": 8}),
    "FP16_PASSTHROUGH_PATTERNS": ("tok_emb", {}, {"FP16_KEEP_NAME_PATTERNS": "tok_emb"}),
    "COMPRESSOR": ("pergroup", {}, {"COMPRESSOR": "ans"}),
    "USE_ZSTD": ("0", {}, {"COMPRESSOR": "zlib"}),
    "ZSTD_LEVEL": ("19", {}, {"COMPRESS_LEVEL": 19}),
    "MATRIX_CLIP_SIGMAS": (
        "9",
        {"ATTN_CLIP_SIGMAS": "10"},
        {"ATTN_CLIP_SIGMAS": 10.0, "MLP_CLIP_SIGMAS": 9.0, "BIGRAM_CLIP_SIGMAS": 9.0},
    ),
    "USE_GPTQ": ("1", {}, {"GPTQ_ENABLED": True}),
    "GPTQ_RESERVE_MS": ("500", {}, {"GPTQ_RESERVE_SECONDS": 0.5}),
    "SLIDING_EVAL_STRIDE": ("16", {}, {"EVAL_STRIDE": 16}),
    "SLIDING_BATCH_SIZE": ("64", {}, {"EVAL_BATCH_SEQS": 64}),
    "EVAL_BATCH_SIZE": ("64", {}, {"EVAL_BATCH_SEQS": 64}),
    "SW_EVAL_BATCH": ("64", {}, {"EVAL_BATCH_SEQS": 64}),
    "TTT_ENABLED": ("1", {"TTT_LR": "0.3"}, {"TTT_MODE": "sgd", "TTT_LR": 0.3}),
    "TTT_EVAL_SEQ_LEN": ("1024", {}, {"EVAL_SEQ_LEN": 1024}),
    "TTT_LOCAL_LR_MULT": ("0.75", {}, {"TTT_LORA_LR": 7.5e-05}),
    "TTT_MASK": ("no_qv", {}, {"TTT_Q_LORA": False, "TTT_V_LORA": False}),
    "TTT_SHORT_SCORE_FIRST_ENABLED": (
        "1",
        {"TTT_SHORT_DOC_LEN": "256"},
        {"TTT_SHORT_SCORE_FIRST_STEPS": "256:48"},
    ),
}


def test_every_alias_has_a_case_here():
    assert OLD_SPELLINGS.keys() == ALIASES.keys()


@pytest.mark.parametrize("old", OLD_SPELLINGS)
def test_an_old_spelling_does_what_its_name_says_and_only_that(old):
    value, others, changed = OLD_SPELLINGS[old]
    assert Config.from_env({old: value, **others}).non_default() == changed


@pytest.mark.parametrize("slope", ["NEGATIVE_SLOPE", "LEAKY_SLOPE", "MLP_LEAKY_SLOPE"])
def test_a_slope_wins_over_the_word_for_one(slope):
    for word in ("ACTIVATION", "MLP_ACT"):
        cfg = Config.from_env({word: "leaky_relu2", slope: "0.3"})
        assert cfg.negative_slope == 0.3 and not cfg.without_effect()
        with pytest.raises(Refusal, match=f"{word}=relu2"):
            Config.from_env({word: "relu2", slope: "0.3"})
        with pytest.raises(Refusal, match=f"{word}=leaky_relu2"):
            Config.from_env({word: "leaky_relu2", slope: "0"})


def test_bigram_hash_takes_its_size_from_the_variable_beside_it():
    for others in (
        {"BIGRAM_VOCAB_SIZE": "2048"},
        {"BIGRAM_VOCAB_SIZE": "2048", "BIGRAM_HASH_BUCKETS": "2048"},
    ):
        assert Config.from_env({"BIGRAM_HASH": "1", **others}).bigram_vocab_size == 2048


def test_a_sliding_window_takes_its_stride_from_the_variable_beside_it():
    assert Config.from_env({"SLIDING_EVAL": "1", "SLIDING_EVAL_STRIDE": "16"}).eval_stride == 16
    assert Config.from_env({"SLIDING_EVAL": "1", "EVAL_STRIDE": "32"}).eval_stride == 32
    assert Config.from_env({"BASE": "upstream", "SLIDING_EVAL": "1"}).eval_stride == 64
    message = refused({"SLIDING_EVAL": "1", "EVAL_STRIDE": "0"})
    assert message == "SLIDING_EVAL=1 contradicts EVAL_STRIDE=0; set only EVAL_STRIDE"


def test_two_old_spellings_that_contradict_each_other_are_both_named_and_nothing_else():
    message = refused({"QUANT_BITS": "6", "MATRIX_BITS": "5"})
    assert message == "QUANT_BITS=6 contradicts MATRIX_BITS=5; set only MATRIX_BITS"


def test_a_folder_of_data_yields_to_what_names_its_parts():
    sizes = {"BASE": "pr989", "DATA_DIR": "here", "VOCAB_SIZE": "8192"}
    cfg = Config.from_env(sizes)
    assert cfg.data_path == "here/datasets/fineweb10B_sp8192"
    assert cfg.tokenizer_path == "here/tokenizers/fineweb_8192_bpe.model"
    named = Config.from_env(sizes | {"DATA_PATH": "there"}, ["TOKENIZER_PATH=a.model"])
    assert (named.data_path, named.tokenizer_path) == ("there", "a.model")
    assert named.without_effect()["DATA_DIR"] == "DATA_PATH and TOKENIZER_PATH win"
    defaults = ["DATA_PATH?=data/demo", "TOKENIZER_PATH?=demo.model"]
    assert Config.from_env(sizes, defaults).data_path == cfg.data_path


@pytest.mark.parametrize("width", ["368", "496", "512"])
def test_the_hidden_width_of_other_scripts_is_met_exactly(width):
    # at 368 and 496 the quotient times the width falls below the whole number
    for hidden in range(20, 560, 3):
        cfg = Config.from_env({"MODEL_DIM": width, "MLP_HIDDEN": str(hidden)})
        assert int(cfg.mlp_mult * cfg.model_dim) == hidden


def test_the_loaders_of_the_rascals_have_other_words():
    told = {"LOADER_MODE": "sequential"}
    assert Config.from_env(told | {"LOADER": "rows"}).loader == "rows"
    assert "contradicts LOADER=shuffled" in refused(told | {"LOADER": "shuffled"})


def test_no_hidden_width_leaves_the_multiple():
    assert Config.from_env({"MLP_HIDDEN": "0", "MLP_MULT": "2"}).mlp_mult == 2
    cfg = Config.from_env({"BASE": "upstream", "MLP_HIDDEN": "0"})
    assert cfg.mlp_mult == 2
    assert cfg.without_effect() == {"MLP_HIDDEN": "0: the width is MLP_MULT's"}


def test_a_clip_of_all_matrices_yields_to_the_clips_of_some():
    told = {"MATRIX_CLIP_SIGMAS": "9", "MLP_CLIP_SIGMAS": "10", "ATTN_CLIP_SIGMAS": "11"}
    cfg = Config.from_env(told)
    clips = (cfg.mlp_clip_sigmas, cfg.attn_clip_sigmas, cfg.bigram_clip_sigmas)
    assert clips == (10, 11, 9)
    cfg = Config.from_env(told | {"BIGRAM_CLIP_SIGMAS": "12"})
    assert cfg.without_effect()["MATRIX_CLIP_SIGMAS"] == train_gpt.WINS["MATRIX_CLIP_SIGMAS"]
    # in the scripts from #1626 on it is that of the other matrices alone
    cfg = Config.from_env({"BASE": "script1855", "MATRIX_CLIP_SIGMAS": "9"})
    clips = (cfg.mlp_clip_sigmas, cfg.attn_clip_sigmas, cfg.bigram_clip_sigmas)
    assert clips == (10, 13, 9)


# These give way to what is said of a part of what they mean; the last is today's name itself
YIELDING = {"DATA_DIR", "MATRIX_CLIP_SIGMAS", "COMPRESSOR"}


@pytest.mark.parametrize("old", sorted(OLD_SPELLINGS.keys() - YIELDING))
def test_an_old_spelling_that_contradicts_the_new_name_is_refused(old):
    value, others, changed = OLD_SPELLINGS[old]
    new = next(iter(changed))
    default = BY_NAME[new].default
    message = refused(
        {old: value, **others, new: str(int(default) if isinstance(default, bool) else default)}
    )
    assert message.startswith(f"{old}={value} contradicts {new}=") and f"set only {new}" in message


# One that multiplies what the new name says cannot agree with it
@pytest.mark.parametrize("old", [old for old in OLD_SPELLINGS if old != "TTT_LOCAL_LR_MULT"])
def test_an_old_spelling_that_agrees_with_the_new_name_is_accepted(old):
    value, others, changed = OLD_SPELLINGS[old]
    both = {name: str(int(v) if isinstance(v, bool) else v) for name, v in changed.items()}
    assert Config.from_env({old: value, **others, **both}).non_default() == changed


FREE_TEXTS = {"DATA_DIR", "DATASETS_DIR", "ARTIFACT_DIR", "FP16_PASSTHROUGH_PATTERNS"}


@pytest.mark.parametrize("old", sorted(OLD_SPELLINGS.keys() - FREE_TEXTS))
def test_a_bad_value_is_blamed_on_the_variable_that_the_user_wrote(old):
    message = refused({old: "maybe"})
    assert message.startswith(f"{old}=maybe: ")
    assert "must be" in message or "choose one of" in message


def test_a_spelling_that_multiplies_a_knob_does_so_and_takes_no_other_value_of_it():
    env = {"TTT_LOCAL_LR_MULT": "0.5", "BASE": "script1953"}
    assert Config.from_env(env).ttt_lora_lr == 5e-5
    message = refused({"TTT_LOCAL_LR_MULT": "0.75", "TTT_LORA_LR": "8e-5"})
    assert message == "TTT_LOCAL_LR_MULT=0.75 contradicts TTT_LORA_LR=8e-5; set only TTT_LORA_LR"


# ── Settings of other scripts ─────────────────────────────────────────────────────────────────────
# Name -> (a value at which nothing is lost without it or None, why), for the names of the record
# commands. Read off the scripts, and not off the table in train_gpt.py.
OFF = "off, as here"
BUILT_IN = "what is built in here"
UNUSED = "changes no result there either"
OFF_AT_0 = """MTP_HEADS MTP_NUM_HEADS DIFF_ATTN REFINER
 MLP_GROUPS UNTIE_AT_FRACTION LORA_RANK TVERSKY_NUM_FEATURES TVERSKY_FEATURE_POOLS SEQ_LEN_START
 BATCH_TOKENS_START POST_GPTQ_EVAL_ONLY TRAINING_DEPTH_RECURRENCE
 EVAL_DEPTH_RECURRENCE NGRAM_WITHIN_BETA"""
OF_RECORDS = {name: ("0", OFF) for name in OFF_AT_0.split()} | {
    "TIE_EMBEDDINGS": ("1", BUILT_IN),
    "TTT_OPTIMIZER": ("sgd", BUILT_IN),
    "MATRIX_OPTIMIZER": ("muon", BUILT_IN),
    "SOFTCAP_TYPE": ("tanh", BUILT_IN),
    "ROPE_TYPE": ("rope", BUILT_IN),
    "ATTN_PROJ_TYPE": ("standard", BUILT_IN),
    "LOGIT_HEAD_TYPE": ("standard", BUILT_IN),
    "COMPILE_MODE": ("default", BUILT_IN),
    "INT4_LAYERS": ("", OFF),
    "HEAD_LR": ("0.02", UNUSED),
    "EMBED_LR": ("0.6", UNUSED),
    "MUON_BETA2": ("0.9", UNUSED),
    "VAL_BATCH_SIZE": ("524288", UNUSED),
    "FUSED_CE_ENABLED": ("1", UNUSED),
    "CHURN_LOG_EVERY": ("0", UNUSED),
}
# At 0 a filter takes all or nothing, and one step is no pass over a chunk
NOT_OFF = """TTT_ENTROPY_HIGH=0 BITNET_GROUP_SIZE=0 TTT_GRAD_STEPS=2 SMEAR=0
 TTT_OPTIMIZER=adam TIE_EMBEDDINGS=0 SOFTCAP_TYPE=poly QAT_INT6=0"""


@pytest.mark.parametrize("name", OF_RECORDS)
def test_a_setting_of_other_scripts_is_without_effect_where_nothing_is_lost(name):
    text, why = OF_RECORDS[name]
    cfg = Config.from_env({name: text})
    assert cfg == Config() and cfg.without_effect() == {name: why}


@pytest.mark.parametrize("told", NOT_OFF.split())
def test_a_setting_of_other_scripts_is_refused_where_something_is_lost(told):
    message = refused(dict([told.split("=")]))
    assert message.startswith(f"{told}: a setting of other scripts; this one has none such: unset")
    assert len(message.splitlines()) == 1


def test_one_loop_is_no_loop_under_the_base_whose_script_counts_passes():
    for base in ("upstream", "pr145", "pr194"):
        cfg = Config.from_env({"BASE": base, "NUM_LOOPS": "1"})
        assert cfg.num_loops == 0 and cfg.spelt == {"NUM_LOOPS"}
        assert "number of passes" in refused({"BASE": base, "NUM_LOOPS": "2"})
    # which of the two is meant, nobody can say who sees this alone
    assert "or one beside the first" in refused({"NUM_LOOPS": "1"})
    assert Config.from_env({"NUM_LOOPS": "1", "LOOP_START": "3"}).num_loops == 1


@pytest.mark.parametrize("blocks", ["4,x", "3,5", "4;5", "-1", "9,10,11", "1" * 5000, "\u0664"])
def test_recurring_layers_that_are_no_run_of_blocks_are_refused(blocks):
    assert "RECUR_LAYERS" in refused({"RECUR_LAYERS": blocks}) or "LOOP_END" in refused(
        {"RECUR_LAYERS": blocks}
    )


def test_no_recurring_layers_are_no_loop():
    assert Config.from_env({"RECUR_LAYERS": ""}) == Config()


@pytest.mark.parametrize("name", sorted(ABSENT.keys() - {n for n in ABSENT if ABSENT[n] == ANY}))
def test_a_setting_of_other_scripts_is_refused_by_name(name):
    message = refused({name: "3.7"})
    assert message.startswith(f"{name}=3.7: a setting of other scripts; this one has none such: ")
    if ABSENT[name] != NEVER:
        assert Config.from_env({name: ABSENT[name]}) == Config()


def test_what_to_do_instead_names_settings_of_ours():
    assert train_gpt.INSTEAD.keys() <= ABSENT.keys()
    for name in train_gpt.INSTEAD:
        if ABSENT[name] != ANY:
            told = refused({name: "3"}).partition("unset it, or ")[2]
            named = set(re.findall(r"[A-Z][A-Z0-9_]{3,}", told))
            assert named and named <= BY_NAME.keys() | ALIASES.keys(), told


def test_numbers_and_switches_are_compared_by_value():
    texts = {"VAL_DOC_FRACTION": "1.0", "TIE_EMBEDDINGS": "True", "GATED_ATTENTION": "False"}
    assert Config.from_env(texts).others.keys() == texts.keys()


@pytest.mark.parametrize(
    "env, hint",
    [
        ({"EMA": "1"}, "did you mean EMA_ENABLED"),
        ({"ENABLE_EMA": "1"}, "did you mean EMA_ENABLED"),
        ({"USE_EMA": "1"}, "did you mean EMA_ENABLED"),
        ({"USE_SWA": "1"}, "did you mean SWA_ENABLED"),
        ({"LATE_QAT_TRESHOLD": "0.15"}, "did you mean LATE_QAT_THRESHOLD"),
        ({"qat_enabled": "1"}, "did you mean QAT_ENABLED"),
        ({"Num_Layers": "9"}, "did you mean NUM_LAYERS"),
        ({"seed": "9"}, "did you mean SEED"),
        ({"qat": "1"}, "did you mean QAT_ENABLED"),
        ({"num_layer": "9"}, "did you mean NUM_LAYERS"),
        ({"late_qat": "1"}, "did you mean LATE_QAT"),
        (
            {"gated_attention": "1"},
            "GATED_ATTENTION is a setting of other scripts; this one has none such: ",
        ),
        (
            {"GATED_ATTENTON": "1"},
            "GATED_ATTENTION is a setting of other scripts; this one has none such: ",
        ),
        ({"ema": "1"}, "did you mean EMA_ENABLED"),
        ({"seeds": "1"}, "did you mean SEED?"),
        ({"numlayers": "9"}, "did you mean NUM_LAYERS"),
        ({"matrixlr": "0.1"}, "did you mean MATRIX_LR"),
        ({"USE_BIGRAM": "1"}, "did you mean BIGRAM_"),
        ({"USE_SMEAR": "1"}, "SMEAR is a setting of other scripts"),
        ({"ENABLEQAT": "1"}, "did you mean QAT_ENABLED"),
        ({"QUANTBITS": "6"}, "did you mean QUANT_BITS"),
        ({"QKGAIN": "2"}, "did you mean QK_GAIN_INIT"),
        ({"GRADCLIP": "1"}, "did you mean GRAD_CLIP_NORM"),
        ({"CLIP_GRAD_NORM": "1"}, "did you mean GRAD_CLIP_NORM"),
        ({"N_LAYER": "9"}, "did you mean NUM_LAYERS"),
        ({"LEARNING_RATE": "0.1"}, "did you mean MATRIX_LR"),
        ({"NS_STEPS": "5"}, "did you mean MUON_BACKEND_STEPS"),
        ({"COMPRESION": "zstd"}, "did you mean COMPRESSOR"),
        ({"LR_SCHEDULE": "linear"}, "did you mean WARMDOWN_FRAC"),
        ({"GRADIENT_ACCUMULATION_STEPS": "2"}, "did you mean GRAD_ACCUM_STEPS"),
        ({"RANDOM_SEED": "7"}, "did you mean SEED"),
        ({"VALUE_EMBEDDING": "1"}, "did you mean VE_ENABLED"),
        ({"BATCH_TOKENS": "8"}, "did you mean TRAIN_BATCH_TOKENS"),
        ({"MAX_STEPS": "8"}, "did you mean ITERATIONS"),
        ({"EMA_BETA": "8"}, "did you mean EMA_DECAY"),
        ({"EVAL_STRDIE": "8"}, "did you mean EVAL_STRIDE"),
        ({"USE_SMEARGATE": "1"}, "set SMEAR_GATE=1"),
        ({"QAT_FRACTION": "0.3"}, "set QAT_START_KIND=time_frac QAT_START=0.7"),
    ],
    ids=str,
)
def test_the_best_hint_is_given(env, hint):
    message = refused(env)
    assert message.startswith(f"{next(iter(env))}=") and hint in message
    assert len(message.splitlines()) == 1


RECORDS = json.loads((ROOT / "tests" / "golden" / "record_settings.json").read_text())


def fate(name: str, command: dict[str, str]) -> str:
    """What becomes of one variable of a launch."""
    told = re.compile(rf"(?<!\w){re.escape(name)}={re.escape(command[name])}(?!\w)")
    try:
        others = Config.from_env(command).others
    except Refusal as refusal:
        if any(told.search(problem) for problem in refusal.problems):
            return "refused by name"
        # then it is accepted: so it must be without others, which were refused
        others = train_gpt.settings_of_others(command, train_gpt.Base())[0]
    if name in others:
        return "without effect"
    return "ours" if name in BY_NAME or name in ALIASES else "ignored"


def test_no_variable_of_a_published_command_is_ignored_in_silence():
    fates = collections.Counter()
    for command in RECORDS["commands"].values():
        for name in command:
            fates[fate(name, command)] += 1
    assert sum(fates.values()) == 471
    # without BASE; a floor, not a goal
    assert fates["ours"] + fates["without effect"] >= 436
    assert fates.keys() == {"ours", "without effect", "refused by name"}
    unknown = {"COMPRESSOR": "gzip", "NUM_LAYERS": "9"}
    assert [fate(name, unknown) for name in unknown] == ["refused by name", "ours"]


@pytest.mark.parametrize("text", ["1", "0", "off"])
def test_no_setting_that_records_read_is_ignored_in_silence(text):
    names = RECORDS["settings"]
    assert len(names) == 347
    for name in names:
        off = ABSENT.get(name, NEVER)
        value = off if text == "off" and off not in (ANY, NEVER) else text
        assert fate(name, {name: value}) != "ignored", name


# ── Variables that look like ours ─────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("WARMDOWN_FRACTIONS", "WARMDOWN_FRAC"),
        ("SWA_START", "SWA_START_"),
        ("QAT_SCOPES", "QAT_SCOPE"),
        ("ITERATION", "ITERATIONS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("EMA_DEKAY", "EMA_DECAY"),
        ("XSA_LAST", "XSA_LAST_N"),
        ("MAX_WALLCLOCK", "MAX_WALLCLOCK_SECONDS"),
        ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
        ("EVAL_STRIDES", "EVAL_STRIDE"),
        ("MLP_MULTI", "MLP_MULT"),
        ("QUANT_BIT_MLP", "QUANT_BITS_MLP"),
        ("COMPRESSION", "COMPRESSOR"),
        ("SEEDS", "SEED"),
        ("PRUNE_PERCENT", "PRUNE_PCT"),
        ("TTT_LEARNING_RATE", "TTT_"),
        ("MATRX_LR", "MATRIX_LR"),
        ("VOCABSIZE", "VOCAB_SIZE"),
    ],
)
def test_a_mistyped_variable_is_refused_with_the_right_suggestion(name, suggestion):
    message = refused({name: "1"})
    assert (
        message.startswith(f"{name}=1: ")
        and f"did you mean {suggestion}" in message
        and "unset" in message
    )


@pytest.mark.parametrize(
    "name",
    [
        "GATED_ATTENTION",
        "VALUE_RESIDUAL",
        "DTG_ENABLED",
        "CURRICULUM",
        "TTT_LORA_EMA_DECAY",
        "GRAD_CLIP_LOCAL",
        "CONTROL_TENSOR_NAME_PATTERNS",
    ],
)
def test_a_variable_of_the_seeds_that_we_lack_is_refused_and_not_ignored(name):
    assert refused({name: "8"}).startswith(f"{name}=8: ")


# Variables of other programs, as those that set them document them
ORDINARY = {
    "an NGC image of PyTorch": """
        NVIDIA_PYTORCH_VERSION PYTORCH_BUILD_VERSION PYTORCH_VERSION PYTORCH_BUILD_NUMBER
        PYTORCH_HOME MODEL_OPT_VERSION CUDA_VERSION CUDA_DRIVER_VERSION CUDA_CACHE_DISABLE
        CUDA_ARCH_LIST CUDNN_VERSION CUDNN_FRONTEND_VERSION CUBLAS_VERSION CUFFT_VERSION
        CURAND_VERSION CUSPARSE_VERSION CUSOLVER_VERSION CUTENSOR_VERSION NPP_VERSION
        NVJPEG_VERSION NCCL_VERSION NSIGHT_SYSTEMS_VERSION NSIGHT_COMPUTE_VERSION NVSHMEM_VERSION
        TRT_VERSION TRTOSS_VERSION DALI_VERSION DALI_BUILD DALI_URL_SUFFIX POLYGRAPHY_VERSION
        TRANSFORMER_ENGINE_VERSION NVIDIA_BUILD_ID NVIDIA_PRODUCT_NAME NVIDIA_REQUIRE_CUDA
        NVIDIA_REQUIRE_JETPACK_HOST_MOUNTS NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES
        OPENMPI_VERSION OPENUCX_VERSION OPAL_PREFIX UCC_CL_BASIC_TLS UCC_EC_CUDA_EXEC_NUM_THREADS
        RDMACORE_VERSION GDRCOPY_VERSION MOFED_VERSION HPCX_VERSION EFA_VERSION
        AWS_OFI_NCCL_VERSION MPI_HOME JUPYTER_PORT TENSORBOARD_PORT LIBRARY_PATH LD_LIBRARY_PATH
        NVM_DIR PIP_CONSTRAINT PIP_BREAK_SYSTEM_PACKAGES PIP_DEFAULT_TIMEOUT
        TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_CUDA_ARCH_LIST TORCH_CUDNN_V8_API_ENABLED
        CUDA_MODULE_LOADING USE_EXPERIMENTAL_CUDNN_V8_API LC_ALL PYTHONIOENCODING SHELL BASH_ENV
        ENV COCOAPI_VERSION TENSORRT_VERSION NVFUSER_BUILD_VERSION NVFUSER_VERSION
        CUBLASMP_VERSION CUDLA_VERSION CUSPARSELT_VERSION CUFILE_VERSION CUDA_COMPONENT_LIST
        NVPL_LAPACK_MATH_MODE RAPIDS_VERSION""",
    "GitHub Actions": """
        CI GITHUB_ACTION GITHUB_ACTIONS GITHUB_ACTOR GITHUB_ACTOR_ID GITHUB_API_URL
        GITHUB_BASE_REF GITHUB_ENV GITHUB_EVENT_NAME GITHUB_EVENT_PATH GITHUB_HEAD_REF GITHUB_JOB
        GITHUB_OUTPUT GITHUB_PATH GITHUB_REF GITHUB_REF_NAME GITHUB_REPOSITORY
        GITHUB_RETENTION_DAYS GITHUB_RUN_ATTEMPT GITHUB_RUN_ID GITHUB_RUN_NUMBER GITHUB_SHA
        GITHUB_STEP_SUMMARY GITHUB_TOKEN GITHUB_WORKFLOW GITHUB_WORKSPACE RUNNER_ARCH
        RUNNER_DEBUG RUNNER_NAME RUNNER_OS RUNNER_TEMP RUNNER_TOOL_CACHE RUNNER_ENVIRONMENT
        ImageOS ImageVersion AGENT_TOOLSDIRECTORY ACCEPT_EULA ANDROID_HOME CHROMEWEBDRIVER CONDA
        EDGEWEBDRIVER GECKOWEBDRIVER GOROOT_1_22_X64 JAVA_HOME_17_X64 PIPX_BIN_DIR
        POWERSHELL_DISTRIBUTION_CHANNEL SELENIUM_JAR_PATH SWIFT_PATH VCPKG_INSTALLATION_ROOT
        DEPLOYMENT_BASEPATH USE_BAZEL_FALLBACK_VERSION SGX_AESM_ADDR DOTNET_NOLOGO
        DOTNET_MULTILEVEL_LOOKUP BOOTSTRAP_HASKELL_NONINTERACTIVE NVM_DIR XDG_CONFIG_HOME
        SYSTEMD_EXEC_PID JOURNAL_STREAM GHCUP_INSTALL_BASE_PREFIX HOMEBREW_NO_AUTO_UPDATE
        HOMEBREW_CLEANUP_PERIODIC_FULL_DAYS""",
    "SLURM and other batch systems": """
        SLURM_JOB_ID SLURM_JOBID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES
        SLURM_JOB_PARTITION SLURM_JOB_ACCOUNT SLURM_JOB_QOS SLURM_JOB_CPUS_PER_NODE
        SLURM_JOB_GPUS SLURM_JOB_START_TIME SLURM_JOB_END_TIME SLURM_JOB_UID SLURM_JOB_USER
        SLURM_NNODES SLURM_NODELIST SLURM_NODEID SLURM_NODE_ALIASES SLURM_NPROCS SLURM_NTASKS
        SLURM_NTASKS_PER_NODE SLURM_PROCID SLURM_LOCALID SLURM_GTIDS SLURM_STEPID SLURM_STEP_ID
        SLURM_STEP_NODELIST SLURM_STEP_NUM_NODES SLURM_STEP_NUM_TASKS SLURM_STEP_TASKS_PER_NODE
        SLURM_STEP_GPUS SLURM_STEP_LAUNCHER_PORT SLURM_SRUN_COMM_HOST SLURM_SRUN_COMM_PORT
        SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST SLURM_CLUSTER_NAME SLURM_CONF SLURM_CPUS_ON_NODE
        SLURM_CPUS_PER_TASK SLURM_CPU_BIND SLURM_CPU_BIND_TYPE SLURM_DISTRIBUTION SLURM_GPUS
        SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_LAUNCH_NODE_IPADDR SLURM_MEM_PER_NODE
        SLURM_PRIO_PROCESS SLURM_TASKS_PER_NODE SLURM_TASK_PID SLURM_TOPOLOGY_ADDR
        SLURM_TOPOLOGY_ADDR_PATTERN SLURM_UMASK SLURM_WORKING_CLUSTER SLURM_ARRAY_TASK_ID
        SLURM_RESTART_COUNT SLURM_EXPORT_ENV SLURMD_NODENAME SLURMD_DEBUG SBATCH_EXPORT
        SRUN_DEBUG TMPDIR PMI_RANK PMIX_RANK PMIX_NAMESPACE PMI_FD ENVIRONMENT HOSTTYPE
        MODULEPATH MODULESHOME LOADEDMODULES LMOD_CMD LMOD_DIR LMOD_VERSION _LMFILES_
        ROCR_VISIBLE_DEVICES GPU_DEVICE_ORDINAL NHOSTS NSLOTS PBS_JOBID PBS_NODEFILE PBS_NUM_PPN
        PBS_O_WORKDIR LSB_JOBID LSB_MCPU_HOSTS SGE_TASK_ID JOB_ID QUEUE RESTARTED NQUEUES""",
    "SageMaker": """
        SM_MODEL_DIR SM_CHANNELS SM_CHANNEL_TRAIN SM_CHANNEL_VAL SM_HPS SM_HP_EPOCHS
        SM_HP_LEARNING_RATE SM_HP_BATCH_SIZE SM_HP_SEED SM_HP_NUM_LAYERS SM_HP_MODEL_DIM
        SM_CURRENT_HOST SM_CURRENT_INSTANCE_TYPE SM_HOSTS SM_NUM_GPUS SM_NUM_CPUS SM_NUM_NEURONS
        SM_LOG_LEVEL SM_INPUT_DIR SM_INPUT_CONFIG_DIR SM_INPUT_DATA_CONFIG SM_OUTPUT_DIR
        SM_OUTPUT_DATA_DIR SM_OUTPUT_INTERMEDIATE_DIR SM_USER_ENTRY_POINT SM_USER_ARGS
        SM_MODULE_DIR SM_MODULE_NAME SM_TRAINING_ENV SM_FRAMEWORK_MODULE SM_FRAMEWORK_PARAMS
        SM_NETWORK_INTERFACE_NAME SM_RESOURCE_CONFIG SM_IS_HETERO TRAINING_JOB_NAME
        TRAINING_JOB_ARN MODEL_CACHE_ROOT MODEL_SERVER_TIMEOUT MODEL_SERVER_WORKERS
        SAGEMAKER_PROGRAM SAGEMAKER_REGION SAGEMAKER_SUBMIT_DIRECTORY
        SAGEMAKER_CONTAINER_LOG_LEVEL SAGEMAKER_JOB_NAME SAGEMAKER_METRICS_DIRECTORY
        SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY DMLC_INTERFACE
        AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_EXECUTION_ENV AWS_REGION AWS_DEFAULT_REGION
        ECS_CONTAINER_METADATA_URI_V4 CURRENT_HOST HF_MODEL_ID HF_TASK DATA_CONFIG
        SMDATAPARALLEL_LMC_ENABLE FI_PROVIDER FI_EFA_USE_DEVICE_RDMA RDMAV_FORK_SAFE""",
    "Kubernetes, whose services bear any name": """
        KUBERNETES_PORT KUBERNETES_PORT_443_TCP KUBERNETES_PORT_443_TCP_ADDR
        KUBERNETES_PORT_443_TCP_PORT KUBERNETES_PORT_443_TCP_PROTO KUBERNETES_SERVICE_HOST
        KUBERNETES_SERVICE_PORT KUBERNETES_SERVICE_PORT_HTTPS DATA_SERVICE_HOST DATA_SERVICE_PORT
        DATA_PORT DATA_PORT_80_TCP DATA_PORT_80_TCP_ADDR MODEL_SERVICE_HOST MODEL_SERVICE_PORT
        MODEL_SERVER_SERVICE_HOST TRAIN_SERVICE_HOST TRAIN_PORT_29500_TCP EVAL_SERVICE_HOST
        EVAL_SERVICE_PORT EVAL_PORT TRAIN_PORT LOGS_SERVICE_HOST TOKENIZER_SERVICE_HOST
        TOKENIZER_SERVICE_PORT VAL_SERVICE_HOST RUN_SERVICE_HOST CHECKPOINT_SERVICE_HOST
        SEED_SERVICE_HOST MATRIX_SERVICE_HOST BASE_SERVICE_HOST CACHE_SERVICE_HOST
        MASTER_SERVICE_HOST POD_NAME POD_NAMESPACE POD_IP NODE_NAME NODE_IP PET_NPROC_PER_NODE
        PET_NNODES PET_RDZV_ENDPOINT PET_MASTER_ADDR PET_MASTER_PORT PET_NODE_RANK
        JOB_COMPLETION_INDEX HOSTNAME TF_CONFIG NUM_PROCESSES NUM_TRAINERS NUM_SERVICES
        RUNAI_NUM_OF_GPUS RUNAI_JOB_NAME VC_WORKER_HOSTS VK_TASK_INDEX""",
    "any": """
        PATH HOME PWD OLDPWD SHLVL TERM USER LOGNAME LANG TZ EDITOR PAGER DISPLAY COLORTERM PS1 _
        MAIL SSH_CLIENT SSH_CONNECTION SSH_AUTH_SOCK XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS
        LS_COLORS LESSOPEN INIT_CWD MAKEFLAGS MAKELEVEL VIRTUAL_ENV CONDA_PREFIX
        CONDA_DEFAULT_ENV PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED PIP_INDEX_URL
        PYTEST_CURRENT_TEST MAX_JOBS BASE_URL BASE_DIR CHECKPOINT_DISABLE DATA_HOME DATA_ROOT
        MODEL_NAME MODEL_PATH NUM_CPUS NUM_GPUS NUM_NODES NUM_WORKERS RUN_ATTEMPT RUN_NAME
        RUN_NUMBER USE_TORCH USE_CUDA XDG_DATA_DIRS SWAP OMPI_COMM_WORLD_SIZE
        SKYPILOT_NUM_GPUS_PER_NODE npm_config_cache all_proxy TERM_PROGRAM_VERSION INVOCATION_ID
        WANDB_NAME RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME
        ROLE_WORLD_SIZE GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
        TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_ERROR_FILE
        TORCHINDUCTOR_CACHE_DIR TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_LOGS
        PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS MKL_NUM_THREADS KMP_AFFINITY GOMP_CPU_AFFINITY
        NUMEXPR_MAX_THREADS NCCL_DEBUG NCCL_IB_DISABLE NCCL_NVLS_ENABLE NCCL_SOCKET_IFNAME
        NCCL_P2P_DISABLE CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_LAUNCH_BLOCKING
        CUDA_DEVICE_MAX_CONNECTIONS TRITON_CACHE_DIR TOKENIZERS_PARALLELISM HF_HOME HF_TOKEN
        HF_HUB_OFFLINE TRANSFORMERS_CACHE WANDB_API_KEY WANDB_RUN_ID WANDB_MODE MLFLOW_RUN_ID
        AWS_PROFILE GOOGLE_APPLICATION_CREDENTIALS AZUREML_RUN_ID RUNPOD_POD_ID RUNPOD_GPU_COUNT
        VAST_CONTAINERLABEL DATA_DIRECTORY OPEN_BUTTON_PORT JUPYTER_TOKEN COLAB_GPU DATABASE_URL
        CI_JOB_ID CI_COMMIT_SHA BUILD_NUMBER BUILD_ID JOB_NAME EXECUTOR_NUMBER JENKINS_URL
        RUN_DISPLAY_URL RUN_CHANGES_DISPLAY_URL RUN_TESTS_DISPLAY_URL RUN_ARTIFACTS_DISPLAY_URL
        WORKSPACE http_proxy https_proxy no_proxy DEBIAN_FRONTEND SPEED MATRIX COVERAGE TRAIN
        EVAL MODEL DATA RUN DIST_URL DIST_BACKEND NUM_THREADS NUM_TASKS MAX_TOKENS MAX_WORKERS
        MAX_RETRIES MAX_MEMORY MODEL_TYPE MODEL_ID MODEL_ENDPOINT DATA_BUCKET DATA_VERSION
        EVAL_HOST TRAIN_IMAGE VAL_DIR DIST_DIR CHECKPOINT_DIR CHECKPOINT_PATH LOG_DIR LOGS_BUCKET
        LOG_LEVEL LOGS TOKENIZER CONTROL_PLANE_IP CONTROL_PORT COMPRESS CAP_ADD KEEP_ALIVE
        FIT_FILE PACK_NAME TIED LOGIT EMBED BETA BETA_FEATURES SCALAR INITIAL INIT_SCRIPT
        BASE_IMAGE SEED_URL RESUME_URL AVERAGE_LOAD NUM_PARALLEL_BUILD_JOBS WARMUP
        WARMUP_REQUESTS ITERATIONS_COUNT EVAL_DIR USE_FLAX TEMP NAME LOG_EVERY ENABLE_TELEMETRY
        ENABLE_USER_SITE STRICT_MODE DOC_URL""",
}


@pytest.mark.parametrize("place", ORDINARY)
def test_the_ordinary_variables_of_other_programs_pass(place):
    names = ORDINARY[place].split()
    assert len(names) > 40 and [name for name in names if train_gpt.meant(name)] == []
    assert Config.from_env(dict.fromkeys(names, "value")) == Config()


@pytest.mark.parametrize("word", train_gpt.TECHNIQUES.split())
def test_any_name_that_begins_like_a_technique_is_one_of_ours_misspelt(word):
    for name in (f"{word}_FOO", f"USE_{word}_FOO", f"{word.lower()}_foo"):
        assert f"{train_gpt.meant(name)}_".startswith(f"{word}_")
        with pytest.raises(Refusal, match=name):
            Config.from_env({name: "1"})


def test_the_environment_that_runs_these_tests_passes():
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in BY_NAME and name not in ALIASES
    }
    assert Config.from_env(clean) == Config()


# ── One knob ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", BOOLS)
def test_a_switch_takes_nothing_but_0_and_1(name):
    for text in ["true", "FALSE", "yes", "on", "", "2", "-1", "01", " 1", "1.0"]:
        message = refused({name: text})
        assert message.startswith(f"{name}={text}: ") and "0 or 1" in message


# What some switches cannot do without, and what no two may be
BESIDE_A_SWITCH = {"QAT_START_KIND": "lr_scale", "RUN_ID": "x", "SMEAR_GATE": "0"}


@pytest.mark.parametrize(
    "name", [*BOOLS, *(n for n, case in OLD_SPELLINGS.items() if case[0] in "01")]
)
def test_a_switch_is_read_as_the_log_prints_it(name):
    around = BESIDE_A_SWITCH | {"TTT_LR": "0.3"}
    for text, printed in (("0", "False"), ("1", "True")):
        if (name, text) == ("BIGRAM_HASH", "1"):
            around["BIGRAM_VOCAB_SIZE"] = "64"
        assert Config.from_env({**around, name: printed}) == Config.from_env({**around, name: text})


def test_switches_parse_0_as_off_and_1_as_on():
    off = Config.from_env(dict.fromkeys(BOOLS, "0") | {"RUN_ID": "x"})
    assert not any(getattr(off, name.lower()) for name in BOOLS)
    for name in BOOLS:
        assert (
            getattr(
                Config.from_env(BESIDE_A_SWITCH | {name: "1"}),
                name.lower(),
            )
            is True
        )


@pytest.mark.parametrize("name", [f.name.upper() for f in NUMERIC])
def test_a_number_that_is_none_not_finite_or_negative_is_refused(name):
    for text in [
        " 7 ",
        "1_000",
        "\u0667",
        "7\n",
        "nan",
        "",
        "many",
        "0x10",
        "-1e9",
        "-5",
        "-inf",
        "inf",
        "1e999",
    ]:
        message = refused({name: text})
        assert message.startswith(f"{name}=") and (
            "must be" in message or "choose one of" in message
        )


@pytest.mark.parametrize(
    "name, bound, beyond",
    [
        (f.name.upper(), m[side], m[side] + sign * (1 if f.type == "int" else 1e-3))
        for f in NUMERIC
        for m in [f.metadata]
        for side, sign in (("lo", -1), ("hi", 1))
        if m[side] is not None
    ],
)
def test_a_number_beyond_its_bound_is_refused_with_the_bound(name, bound, beyond):
    message = refused({name: str(beyond)})
    assert message.startswith(f"{name}={beyond}: ") and str(bound) in message


@pytest.mark.parametrize("name", [f.name.upper() for f in KNOBS if f.metadata["choices"]])
def test_a_wrong_choice_is_refused_with_all_right_ones(name):
    wrong = "9" if BY_NAME[name].type == "int" else "nonsense"
    message = refused({name: wrong})
    assert message.startswith(f"{name}={wrong}: ") and all(
        str(c) in message for c in BY_NAME[name].metadata["choices"]
    )


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.integers(-1, 12), max_size=4).map(lambda ns: ",".join(map(str, ns))),
)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(KNOBS), TEXT)
def test_any_text_gives_either_a_valid_setting_or_printable_lines_of_refusal(f, text):
    name = f.name.upper()
    try:
        value = getattr(Config.from_env({"VE_ENABLED": "1", name: text}), f.name)
    except Refusal as refusal:
        assert refusal.code == 2 and str(refusal).split("\n") == refusal.problems
        # one value can break several rules
        for problem in refusal.problems:
            assert problem.isprintable() and problem.split("=")[0] in BY_NAME
        return
    assert type(value).__name__ == f.type
    assert not isinstance(value, float) or math.isfinite(value)
    assert not f.metadata["choices"] or value in f.metadata["choices"]


@pytest.mark.parametrize(
    "env", [{"SEED": "1\n2"}, {"INIT": "a\nb"}, {"QAT": "1\n"}, {"SEEDS": "1\n2"}], ids=str
)
def test_a_value_with_a_line_break_is_still_refused_in_one_line(env):
    assert len(refused(env).splitlines()) == 1


@pytest.mark.parametrize("name", ["BETA1", "BETA2", "SMEAR_BETA2"])
def test_an_adamw_beta_of_1_is_refused_before_it_divides_by_zero(name):
    assert name in refused({name: "1"})


@pytest.mark.parametrize("text", [str(2**63), str(2**70), str(10**30)])
def test_a_seed_that_no_generator_takes_is_refused(text):
    assert refused({"SEED": text}).startswith(f"SEED={text}: ")


# ── Several knobs ─────────────────────────────────────────────────────────────────────────────────
RULES = [  # (settings that break the rule, the variable to blame, a change that mends it)
    ("RUN_ID=a/b", "RUN_ID", "RUN_ID=ab"),
    ("MODEL_DIM=510", "MODEL_DIM", "NUM_HEADS=5 NUM_KV_HEADS=5"),
    ("NUM_KV_HEADS=3", "NUM_KV_HEADS", "NUM_KV_HEADS=2"),
    ("ROPE_DIMS=66", "ROPE_DIMS", "ROPE_DIMS=64"),
    ("ROPE_DIMS=15", "ROPE_DIMS", "ROPE_DIMS=16"),
    ("NUM_HEADS=4 MODEL_DIM=36", "ROPE_DIMS", "ROPE_DIMS=8"),
    ("ROPE_DIMS=2 ROPE_NTK_LEN=512", "ROPE_DIMS", "ROPE_NTK_LEN=0"),
    ("MUON_COEFFS=polar_express MUON_BACKEND_STEPS=6", "MUON_BACKEND_STEPS", "MUON_COEFFS=quintic"),
    ("TRAIN_BATCH_TOKENS=5000", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN=1000"),
    ("TRAIN_SEQ_SCHEDULE=2048@1", "TRAIN_SEQ_SCHEDULE", "TRAIN_SEQ_SCHEDULE=512@.5,2048@1"),
    ("TRAIN_SEQ_SCHEDULE=512@.5,1024@1", "TRAIN_SEQ_SCHEDULE", "TRAIN_SEQ_LEN=1024"),
    (
        "NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=2",
        "ENABLE_LOOPING_AT",
        "LOOPING_KIND=steps",
    ),
    (
        "NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 LOOPING_KIND=steps",
        "ENABLE_LOOPING_AT",
        "ENABLE_LOOPING_AT=2",
    ),
    ("NUM_LOOPS=1 LOOP_START=3 LOOP_END=5 LOOP_PHASE2_AT=.5", "ENABLE_LOOPING_AT", "NUM_LOOPS=2"),
    ("EVAL_STRIDE=2049", "EVAL_STRIDE", "EVAL_SEQ_LEN=2049"),
    ("EVAL_SEQ_LEN=32", "EVAL_STRIDE", "EVAL_STRIDE=32"),
    ("XSA_LAST_N=12", "XSA_LAST_N", "NUM_LAYERS=12"),
    ("BIGRAM_VOCAB_SIZE=1", "BIGRAM_VOCAB_SIZE", "BIGRAM_VOCAB_SIZE=2"),
    ("LOADER=documents", "LOADER", "DOC_MASK=1"),
    (
        "LOADER=documents DOC_MASK=1 DOC_MAX_LEN=2047 TRAIN_SEQ_SCHEDULE=512@.5,2048@1",
        "DOC_MAX_LEN",
        "DOC_MAX_LEN=2048",
    ),
    ("SMEAR_GATE_ENABLED=1", "SMEAR_GATE_ENABLED", "SMEAR_GATE=0"),
    (
        "SPARSE_ATTN_GATE_ENABLED=1 GATED_ATTN_ENABLED=1",
        "SPARSE_ATTN_GATE_ENABLED",
        "GATED_ATTN_ENABLED=0",
    ),
    (
        "GATED_ATTN_ENABLED=1 GATE_ATTN_OUT=1",
        "GATED_ATTN_ENABLED",
        "GATED_ATTN_ENABLED=0",
    ),
    ("ATTN_OUT_GATE_ENABLED=1 GATE_WINDOW=513", "GATE_WINDOW", "GATE_WINDOW=512"),
    (
        "SMEAR_GATE=0 SMEAR_GATE_ENABLED=1 NUM_HEADS=4 MODEL_DIM=8",
        "GATE_WINDOW",
        "GATE_WINDOW=8",
    ),
    ("NUM_LOOPS=2 LOOP_START=6", "NUM_LOOPS", "LOOP_END=6"),
    ("NUM_LOOPS=2 NUM_LAYERS=5", "NUM_LOOPS", "LOOP_END=4"),
    ("PARALLEL_START_LAYER=4", "PARALLEL_START_LAYER", "PARALLEL_START_LAYER=5"),
    ("PARALLEL_START_LAYER=11", "PARALLEL_START_LAYER", "PARALLEL_START_LAYER=10"),
    ("NUM_LAYERS=1 PARALLEL_START_LAYER=1", "PARALLEL_START_LAYER", "NUM_LAYERS=2"),
    ("PARALLEL_RESIDUAL_START=11", "PARALLEL_RESIDUAL_START", "PARALLEL_RESIDUAL_START=10"),
    (
        "PARALLEL_START_LAYER=7 PARALLEL_RESIDUAL_START=7",
        "PARALLEL_RESIDUAL_START",
        "PARALLEL_RESIDUAL_START=6",
    ),
    ("NUM_LOOPS=2 PARALLEL_START_LAYER=5", "PARALLEL_START_LAYER", "NUM_LOOPS=0"),
    ("VE_ENABLED=1 VE_LAYERS=9,11", "VE_LAYERS", "NUM_LAYERS=12"),
    ("VE_ENABLED=1 VE_LAYERS=", "VE_LAYERS", "VE_ENABLED=0"),
    ("VE_ENABLED=1 VE_LAYERS=-1", "VE_LAYERS", "VE_LAYERS=1"),
    ("VE_ENABLED=1 VE_LAYERS=\u00b2", "VE_LAYERS", "VE_LAYERS=2"),
    ("SWA_ENABLED=1 EMA_ENABLED=1", "SWA_ENABLED", "SWA_ENABLED=0"),
    *(
        ("SWA_ENABLED=1 EMA_ENABLED=1", "SWA_ENABLED", f"AVERAGE={name}")
        for name in ("swa", "ema", "none")
    ),
    *(
        (f"AVERAGE={name}", "AVERAGE", f"{name.upper()}_ENABLED=1")
        for name in ("swa", "ema", "sqwa")
    ),
    ("AVERAGE=sqwa EMA_ENABLED=1", "AVERAGE", "AVERAGE=ema"),
    ("SWA_ENABLED=1 SQWA_ENABLED=1", "SWA_ENABLED", "SWA_ENABLED=0"),
    ("QNA_ENABLED=1 QAT_ENABLED=1", "QNA_ENABLED", "QAT_START_KIND=lr_scale QAT_START=0.15"),
    ("QAT_ENABLED=1 QAT_START=0.7", "QAT_START", "QAT_START_KIND=lr_scale"),
    ("QAT=1 QAT_START_FRAC=0.7", "QAT_START_FRAC", "QAT_START_KIND=iter_frac"),
    ("TTT_MODE=sgd TTT_CHUNK_TOKENS=3000", "TTT_CHUNK_TOKENS", "TTT_CHUNK_TOKENS=4096"),
    ("TTT_MODE=lora TTT_CHUNK_SIZE=4096", "TTT_CHUNK_SIZE", "EVAL_SEQ_LEN=4096"),
    (
        "TTT_MODE=lora TTT_SHORT_SCORE_FIRST_STEPS=256:8,9999:4096",
        "TTT_SHORT_SCORE_FIRST_STEPS",
        "TTT_SHORT_SCORE_FIRST_STEPS=256:8,9999:2048",
    ),
    (
        "TTT_MODE=lora TTT_SHORT_SCORE_FIRST_STEPS=256",
        "TTT_SHORT_SCORE_FIRST_STEPS",
        "TTT_SHORT_SCORE_FIRST_STEPS=256:8",
    ),
    (
        "TTT_MODE=lora TTT_SHORT_SCORE_FIRST_STEPS=256:0",
        "TTT_SHORT_SCORE_FIRST_STEPS",
        "TTT_SHORT_SCORE_FIRST_STEPS=256:1",
    ),
    (
        "TTT_MODE=lora PHASED_TTT_ENABLED=1 PHASED_TTT_NUM_PHASES=3 PHASED_TTT_PREFIX_DOCS=2",
        "PHASED_TTT_NUM_PHASES",
        "PHASED_TTT_NUM_PHASES=2",
    ),
    ("QUANT_CLIP=sigma", "QUANT_CLIP", "QUANT_SCALE_FLOOR=0"),
    (
        "GPTQ_ENABLED=1 GPTQ_RESERVE_SECONDS=600",
        "GPTQ_RESERVE_SECONDS",
        "MAX_WALLCLOCK_SECONDS=601",
    ),
    (
        "TTT_MODE=lora PHASED_TTT_ENABLED=1 GLOBAL_TTT_CHUNK_TOKENS=2047",
        "GLOBAL_TTT_CHUNK_TOKENS",
        "GLOBAL_TTT_CHUNK_TOKENS=2048",
    ),
    ("MODEL_DIM=64 MLP_MULT=0.01", "MLP_MULT", "MODEL_DIM=128"),
    ("COMPRESSOR=lzma COMPRESS_LEVEL=22", "COMPRESS_LEVEL", "COMPRESSOR=zstd"),
    ("COMPRESSOR=zlib COMPRESS_LEVEL=10", "COMPRESS_LEVEL", "COMPRESS_LEVEL=9"),
    ("COMPRESSOR=brotli COMPRESS_LEVEL=12", "COMPRESS_LEVEL", "COMPRESS_LEVEL=11"),
    ("COMPRESSOR=ans COMPRESS_LEVEL=12", "COMPRESS_LEVEL", "COMPRESS_LEVEL=11"),
]


@pytest.mark.parametrize("settings, blamed, mend", RULES)
def test_a_contradiction_between_knobs_is_refused_and_its_remedy_works(settings, blamed, mend):
    message = refused(parse(settings))
    assert message.startswith(f"{blamed}=") and len(message.splitlines()) == 1
    Config.from_env({**parse(settings), **parse(mend)})


def test_every_rule_between_knobs_has_a_case_here(monkeypatch):
    broken = set()

    def noting(check):
        @functools.wraps(check)
        def noted(**knobs):
            try:
                check(**knobs)
            except Refusal:
                broken.add(check.__name__)
                raise

        return noted

    monkeypatch.setattr(
        train_gpt, "RULES", {noting(check): names for check, names in train_gpt.RULES.items()}
    )
    for env in [*(parse(broken_rule) for broken_rule, *_ in RULES), TWO_SOURCES, {"RESUME": "1"}]:
        refused(env)
    assert broken == {check.__name__ for check in train_gpt.RULES}


@pytest.mark.parametrize(
    "settings, average",
    [
        ("", "none"),
        ("SWA_ENABLED=1", "swa"),
        ("EMA_ENABLED=1", "ema"),
        ("SQWA_ENABLED=1", "sqwa"),
        ("SQWA_ENABLED=1 EMA_ENABLED=1", "sqwa"),
        ("SQWA_ENABLED=1 EMA_ENABLED=1 AVERAGE=ema", "ema"),
        ("SWA_ENABLED=1 EMA_ENABLED=1 AVERAGE=swa", "swa"),
        ("SWA_ENABLED=1 EMA_ENABLED=1 AVERAGE=none", "none"),
    ],
)
def test_the_shipped_average_is_the_one_asked_for_or_follows_the_documented_precedence(
    settings, average
):
    assert Config.from_env(parse(settings)).shipped_average == average


TWO_SOURCES = {"CHECKPOINT": "a.bin", "EVAL_ONLY": "b.bin"}


def test_a_checkpoint_and_an_artifact_to_score_exclude_each_other():
    message = refused(TWO_SOURCES)
    assert message.startswith("CHECKPOINT=a.bin and EVAL_ONLY=b.bin contradict each other")


@pytest.mark.parametrize("file", ["CHECKPOINT", "EVAL_ONLY"])
def test_a_rule_between_knobs_waits_until_those_in_the_file_are_known(file):
    cfg = Config.from_env({file: "a.bin", "EVAL_STRIDE": "4096"})  # the window may be that long
    assert dataclasses.replace(cfg, train_seq_len=4096, inherited=True).window == 4096
    with pytest.raises(Refusal, match="EVAL_STRIDE=4096"):
        dataclasses.replace(cfg, inherited=True)


# ── All at once ───────────────────────────────────────────────────────────────────────────────────
def all_refused(env: dict[str, str]) -> list[str]:
    """The lines with which this environment is refused."""
    return refused(env).splitlines()


def test_all_that_is_wrong_with_a_launch_is_said_at_once():
    env = {
        "SEED": "one",
        "MATRIX_LR": "-1",
        "INIT": "zero",
        "EMA_DEKAY": "0.9",
        "QAT": "1",
        "QAT_ENABLED": "0",
        "LORA_RANK": "3",
        "NUM_KV_HEADS": "3",
        "RESUME": "1",
    }
    assert sorted(all_refused(env)) == [
        "EMA_DEKAY=0.9: no such setting; did you mean EMA_DECAY? Else unset it",
        "INIT=zero: choose one of default, ortho",
        "LORA_RANK=3: a setting of other scripts; this one has none such: unset it",
        "MATRIX_LR=-1.0: must be 0 or more",
        "NUM_KV_HEADS=3: must divide NUM_HEADS=8",
        "QAT=1 contradicts QAT_ENABLED=0; set only QAT_ENABLED",
        "RESUME=1: of which run? Set its RUN_ID",
        "SEED=one: must be a whole number in digits 0-9, without spaces",
    ]


def test_each_of_several_problems_reads_as_it_does_alone():
    alone = [
        {"SEED": "one"},
        {"STRICT": "yes"},
        {"EVAL_STRIDE": "4096"},
        {"PRUNE_PERCENT": "1"},
        {"QUANT_BITS": "six"},
        {"USE_ZSTD": "maybe"},
        {"VE_ENABLED": "1", "VE_LAYERS": "1,99"},
    ]
    together = {name: text for env in alone for name, text in env.items()}
    assert sorted(all_refused(together)) == sorted(refused(env) for env in alone)


def test_a_configuration_made_in_python_is_refused_with_all_that_is_wrong_too():
    with pytest.raises(Refusal) as refusal:
        Config(seed=-1, compile="yes", mlp_mult=math.nan, num_heads=7)
    assert [problem.partition("=")[0] for problem in refusal.value.problems] == [
        "SEED",
        "COMPILE",
        "MLP_MULT",
        "MODEL_DIM",
        "NUM_KV_HEADS",
    ]


@pytest.mark.parametrize(
    "env",
    [
        {"NUM_LAYERS": "none", "XSA_LAST_N": "12"},
        {"NUM_LAYERS": "0", "VE_ENABLED": "1", "VE_LAYERS": "20"},
        {"SWA": "maybe", "AVERAGE": "swa"},
        {"RESUME": "maybe", "RUN_ID": "x", "EVAL_STRIDE": "4096"},
    ],
    ids=str,
)
def test_a_rule_is_not_applied_to_a_knob_that_is_wrong_itself(env):
    assert len(all_refused(env)) == 1 and refused(env).startswith(next(iter(env)))


def test_each_problem_is_a_printable_line_whatever_it_quotes():
    lines = all_refused({"INIT": "a\nb\x1b[2J", "SEED": "1\n2", "COMPRESSOR": "9" * 9000})
    assert len(lines) == 3 and all(line.isprintable() and len(line) < 1400 for line in lines)


def test_several_problems_are_lines_below_one_error(monkeypatch, capsys):
    for known in BY_NAME.keys() | ALIASES.keys():
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv("SEED", "one")
    monkeypatch.setenv("NUM_LAYERS", "0")
    assert command_line([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        f"error: 2 problems [exit 2: {EXIT_CODES[2]}]",
        "  SEED=one: must be a whole number in digits 0-9, without spaces",
        "  NUM_LAYERS=0: must be 1 or more",
    ]


def test_a_refusal_survives_the_way_to_another_process():
    copied = pickle.loads(pickle.dumps(Refusal(["a\nb", "c"], 7)))
    assert str(copied) == "a\\nb\nc" and copied.code == 7


# ── Identity of a configuration ───────────────────────────────────────────────────────────────────
def with_other(cfg: Config, f) -> Config:
    """The same configuration but for one knob, unchecked."""
    other, value = copy.copy(cfg), getattr(cfg, f.name)
    object.__setattr__(
        other, f.name, not value if f.type == "bool" else value + ("x" if f.type == "str" else 1)
    )
    return other


@pytest.mark.parametrize("name", ["SEED", "RUN_ID", "DATA_PATH", "TOKENIZER_PATH", "LOGS_DIR"])
def test_the_digest_ignores_seed_names_and_places(name):
    assert with_other(Config(), BY_NAME[name]).digest() == Config().digest()


@pytest.mark.parametrize(
    "f",
    [f for f in KNOBS if f.metadata["scope"] not in ("run", "loop", "seed")],
    ids=lambda f: f.name,
)
def test_the_digest_changes_with_every_knob_that_changes_the_result(f):
    assert with_other(Config(), f).digest() != Config().digest()


@pytest.mark.parametrize(
    "on", [{}, *({name: True} for name in ("qat_enabled", "qna_enabled", "sqwa_enabled"))], ids=str
)
@pytest.mark.parametrize("f", KNOBS, ids=lambda f: f.name)
def test_the_training_digest_changes_with_the_knobs_that_a_checkpoint_depends_on_and_no_other(
    f, on
):
    cfg, other = Config(**on), with_other(Config(**on), f)
    depends = {
        "run": False,
        "loop": False,
        "seed": True,
        "model": True,
        "train": True,
        "grid": bool(on),
        "export": False,
        "size": False,
        "eval": False,
    }
    changed = other.digest(*cfg.training_scopes) != cfg.digest(*cfg.training_scopes)
    assert changed == depends[f.metadata["scope"]]


def test_the_grid_belongs_to_the_training_only_where_training_uses_it():
    for names in itertools.product((False, True), repeat=5):
        flags = dict(
            zip(
                ("qat_enabled", "qna_enabled", "sqwa_enabled", "ema_enabled", "swa_enabled"),
                names,
                strict=True,
            )
        )
        if not (flags["swa_enabled"] and (flags["sqwa_enabled"] or flags["ema_enabled"])):
            scopes = Config(**flags, qat_start_kind="lr_scale").training_scopes
            assert scopes == ("seed", "model", "train") + ("grid",) * any(names[:3])


def test_the_digest_does_not_depend_on_the_spelling():
    assert (
        Config.from_env({"MUON_WEIGHT_DECAY": ".04"}).digest()
        == Config.from_env({"MUON_WD": "0.040"}).digest()
    )


# ── The command ───────────────────────────────────────────────────────────────────────────────────
def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    base = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *arguments],
        env=base | variables,
        text=True,
        capture_output=True,
        timeout=HANG,
        check=False,
    )


def beside_imports(text: str) -> list[str]:
    """The lines that do not say that imports are under way, as they do every 10 s."""
    return [line for line in text.splitlines() if not line.startswith("importing torch, ")]


def test_help_lists_every_knob_with_type_default_unit_meaning_and_alias():
    done = launch("--help")
    assert done.returncode == 0 and beside_imports(done.stderr) == []
    text = " ".join(done.stdout.split())
    for f in KNOBS:
        default = str(int(f.default)) if f.type == "bool" else str(f.default) or '""'
        kind = f"{f.type}, {f.metadata['unit']}".removesuffix(", ")
        choices = " | ".join(map(str, f.metadata["choices"]))
        lo, hi = f.metadata["lo"], f.metadata["hi"]
        if lo is not None:
            choices = f"{lo} or more" if hi is None else f"{lo} to {hi}"
        meaning = f"{f.metadata['doc']} ({kind}: {choices})".replace(": )", ")")
        assert f.metadata["doc"] and f" {f.name.upper()}={default} {meaning}" in text
    assert all(alias in done.stdout for alias in ALIASES)
    assert all(f"{code} {meaning}" in done.stdout for code, meaning in EXIT_CODES.items())


def test_the_meaning_of_a_knob_needs_no_other_line_of_the_help():
    """Not: of the next two; the same of tables; their coefficients; or step."""
    pointing = re.compile(r"\b(next|same|ones|at last)\b|^(or|none|their)\b")
    assert [f.name for f in KNOBS if pointing.search(f.metadata["doc"])] == []
    assert "Spellings of other scripts that also work: " in train_gpt.help_text()


@pytest.mark.parametrize("width", [60, 80, 160])
def test_help_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = train_gpt.help_text().removeprefix(train_gpt.__doc__.strip()).splitlines()
    assert all(len(line) <= width for line in lines)
    first = next(i for i, line in enumerate(lines) if line.startswith("DATA_PATH="))
    below = [line for line in lines[first:] if line.startswith(" ")]
    assert all(line.startswith(" " * 34) and line[34] != " " for line in below)


def test_every_knob_is_declared_in_one_line_that_a_reader_can_take_in():
    source = inspect.getsource(Config)
    for f in KNOBS:
        (line,) = re.findall(rf"^    {f.name}: .*", source, re.M)
        assert line.endswith(")") and len(line) <= 100


def test_a_bad_variable_ends_the_process_with_exit_2_and_one_line():
    done = launch(SWA_START="0.5")
    assert done.returncode == 2 and done.stdout.startswith("importing torch, 0 s\n")
    assert (
        beside_imports(done.stdout) == []
        and len(done.stderr.splitlines()) == 1
        and "Traceback" not in done.stderr
    )
    assert "SWA_START=0.5" in done.stderr and "did you mean SWA_START_" in done.stderr


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("SEED", "one", "must be a whole number in digits 0-9, without spaces"),
        ("QAT_ENABLED", "true", "must be 0 or 1"),
        ("ITERATIONS", "99999999999999999999", "must be 1 or more, 4611686018427387904 or less"),
        ("QUANT_BITS_MLP", "9", "choose one of 2,"),
        ("MATRIX_LR", "-1.0", "must be 0 or more"),
        ("NUM_KV_HEADS", "3", "must divide NUM_HEADS=8"),
    ],
)
def test_a_refusal_names_variable_value_and_remedy_in_one_line(
    name, value, remedy, monkeypatch, capsys
):
    for known in BY_NAME.keys() | ALIASES.keys():
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv(name, value)
    assert command_line([]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and len(err.splitlines()) == 1
        and err.startswith(f"error: {name}={value}: ")
        and remedy in err
    )
    assert f"exit 2: {EXIT_CODES[2]}" in err


@pytest.mark.parametrize("arguments", [["--seed"], ["help"], ["--help", "--verbose"]], ids=str)
def test_an_argument_that_is_no_assignment_is_refused_with_exit_2(arguments, capsys):
    assert command_line(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("an argument is NAME=value; --help lists") == len(arguments)


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────
ROWS_OF_A_TABLE = [
    ("what [bold]", "bytes", "share", "said"),
    ("a" * 300, 1_234_567, 0.5, None),
    ("[red]b[/red] \u00e9", 8, 2, True),
    (":smile:", None, None, "3"),
]


def test_a_table_is_plain_text_with_a_rule_below_its_header(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "20", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    lines = text_table(ROWS_OF_A_TABLE).splitlines()
    rows = [line.split() for line in lines]
    assert rows[0] == ["what", "[bold]", "bytes", "share", "said"]
    assert set(lines[1]) == {"-"} and len(lines[1]) > 300
    assert rows[2] == ["a" * 300, "1,234,567", "0.500000", "-"]
    assert rows[3] == ["[red]b[/red]", "\u00e9", "8", "2.000000", "True"]
    assert rows[4] == [":smile:", "-", "-", "3"]


def test_numbers_of_a_table_end_below_each_other():
    header, _, first, second, third = text_table([("n",), (1000,), (20,), (None,)]).splitlines()
    assert (header, first, second, third) == ("    n", "1,000", "   20", "    -")


@pytest.mark.parametrize("cells", [("15.9 s", "1,234.0 s"), ("-0.133 s", "+7 s"), ("2.5", "30")])
def test_figures_with_a_unit_end_below_each_other(cells):
    _, _, *rows = text_table([("took", "what"), *((cell, "x") for cell in cells)]).splitlines()
    assert {row.index("  x") for row in rows} == {max(len("took"), *map(len, cells))}
    words = text_table([("took",), *((cell,) for cell in cells), ("1 to 2",)]).splitlines()
    assert words[2].startswith(cells[0])


def test_a_table_without_rows_is_its_header():
    assert text_table([("a", "b")]).splitlines()[0].split() == ["a", "b"]


def test_a_table_can_be_markdown():
    text = text_table([("row", "ms"), ("a | b", "1.5 x")], markdown=True)
    assert text.splitlines() == ["| row   |    ms |", "|-------|-------|", "| a | b | 1.5 x |"]

"""Another script's commands train here what they trained there: BASE supplies its defaults.

Failures that these tests would have caught: run commands of five pull requests were accepted and
trained something else, as 17 to 27 of their settings took our defaults; the Naive Baseline's seven
variables were all understood, and 11 of its defaults differ; #199's SWA_START_FRAC is a share of
ITERATIONS, #989's an lr scale; #989's ten published runs mix two settings of pruning, and two rows
of #194 are two configurations.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from pages_frontier import RECORDS, script_base

import train_gpt
from ablation.study import matrix, read_study
from train_gpt import (
    BASES,
    COMPARED,
    GPT,
    KNOBS,
    Config,
    Refusal,
    base_tables,
    help_text,
    read_base,
)

FILES = sorted(set((ROOT / "studies").glob("*.toml")) - {ROOT / BASES})
STUDIES = [read_study(path) for path in FILES]
# (study, arm, variables of a published command)
PUBLISHED = [
    (study, arm, command)
    for study in STUDIES
    for arm, commands in study.commands.items()
    for command in commands
]


def refused(env: dict[str, str]) -> str:
    with pytest.raises(Refusal) as refusal:
        Config.from_env(env)
    assert refusal.value.code == 2
    return str(refusal.value)


# ── The published rows ────────────────────────────────────────────────────────────────────────────
def full_size(study) -> dict[str, Config]:
    """Arm -> what it is at the published size."""
    return {trial.arm: trial.cfg for trial in matrix(study, "full", "time", (1,)).trials}


def test_every_published_figure_has_its_command():
    for study in STUDIES:
        for arm, facts in study.facts.items():
            figures = len(facts.get("published", {}).get("val_bpb", ()))
            assert len(study.commands[arm]) in ({1, figures} if figures else {0}), arm
    rows = {Config.from_env(command).digest() for *_, command in PUBLISHED}
    assert len(PUBLISHED) == 23 and len(rows) == 16


@pytest.mark.parametrize("study", [s for s in STUDIES if "full" in s.sizes], ids=lambda s: s.name)
def test_each_arm_is_its_published_command_but_for_the_corrections_that_the_study_states(study):
    arms = full_size(study)
    found = set()
    for arm, commands in study.commands.items():
        for command in commands:
            assert command["BASE"]
            found |= set(arms[arm].differing(Config.from_env(command).knobs(*COMPARED)))
    assert {name.upper() for name in found} == set(study.corrections)


# Parameters of each script's rows, as its log says them
PARAMETERS = {
    "upstream": 17_059_912,
    "pr145": 17_059_912,
    "pr199": 17_059_912,
    "pr194": 26_502_232,
    "pr989": 25_517_137,
    "pr975": 26_993_756,
}


@pytest.mark.parametrize("base", PARAMETERS)
def test_each_published_command_gives_the_published_parameter_count(base):
    commands = [command for *_, command in PUBLISHED if command["BASE"] == base]
    shapes = {tuple(Config.from_env(command).knobs("model").values()) for command in commands}
    assert commands
    for model in shapes:
        cfg = Config(**dict(zip(Config().knobs("model"), model, strict=True)))
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(cfg).parameters()) == PARAMETERS[base]


# What a script does when it is told nothing, for each variable that it reads and that we have,
# where it is not what the Naive Baseline does. Read off the scripts (their sha256:
# tests/golden/seeds.json).
UPSTREAM = """SEED=1337 ITERATIONS=20000 WARMDOWN_ITERS=1200 WARMUP_STEPS=20 TRAIN_SEQ_LEN=1024
 TRAIN_BATCH_TOKENS=524288 MAX_WALLCLOCK_SECONDS=600 VAL_LOSS_EVERY=1000 TRAIN_LOG_EVERY=200
 QK_GAIN_INIT=1.5
 VOCAB_SIZE=1024 NUM_LAYERS=9 NUM_KV_HEADS=4 MODEL_DIM=512 NUM_HEADS=8 MLP_MULT=2 ROPE_BASE=10000
 LOGIT_SOFTCAP=30 TIED_EMBED_LR=0.05 TIED_EMBED_INIT_STD=0.005 MATRIX_LR=0.04 SCALAR_LR=0.04
 MUON_MOMENTUM=0.95 MUON_BACKEND_STEPS=5 MUON_MOMENTUM_WARMUP_START=0.85
 MUON_MOMENTUM_WARMUP_STEPS=500 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0"""
DEFAULTS = {
    "upstream": "",
    "pr145": "QAT=1 EVAL_STRIDE=64 EVAL_BATCH_SEQS=32 DOC_ISOLATED_EVAL=1 FP16_EMBED_EXPORT=0",
    "pr199": """QAT=1 EVAL_STRIDE=64 EVAL_BATCH_SEQS=32 DOC_ISOLATED_EVAL=1 FP16_EMBED_EXPORT=0
 SMEAR_GATE=0 BIGRAM_HASH=0 SWA=0 SWA_START_FRAC=0.5 USE_ZSTD=0""",
    "pr194": """WARMDOWN_ITERS=3000 TRAIN_SEQ_LEN=2048 NUM_KV_HEADS=8 MLP_MULT=3 QAT=1
 EVAL_STRIDE=64 QUANT_BITS=6 FP16_EMBED=1 EVAL_BATCH_SEQS=32 SMEAR_GATE=0 BIGRAM_HASH=0
 TIED_EMBED_LR=0.03
 MATRIX_LR=0.02 SCALAR_LR=0.02 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_WEIGHT_DECAY=0 GRAD_CLIP_NORM=0.3 SWA_ENABLED=0
 SWA_START_FRAC=0.5 SWA_EVERY=200 TTT_ENABLED=0""",
    "pr989": """SEED=42 VAL_LOSS_EVERY=500 TRAIN_LOG_EVERY=100 WARMDOWN_ITERS=3000
 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 NUM_LAYERS=10 MLP_MULT=3 TIED_EMBED_LR=0.03
 MATRIX_LR=0.02 SCALAR_LR=0.02 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
 MUON_MOMENTUM_WARMUP_STEPS=1500 GRAD_CLIP_NORM=0.3 WEIGHT_DECAY=0.04 EVAL_STRIDE=64
 EVAL_BATCH_SEQS=32 BIGRAM_VOCAB_SIZE=10240 BIGRAM_DIM=128 SWA_ENABLED=1 SWA_START_FRAC=0.4
 SWA_EVERY=50 ENABLE_QAT=0 QAT_START_FRAC=0.7 PRUNE_PCT=0.1
 FP16_KEEP_NAME_PATTERNS=tok_emb,blocks.8.attn.c_k""",
    "pr975": """VAL_LOSS_EVERY=4000 TRAIN_LOG_EVERY=500 WARMDOWN_ITERS=3500
 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048 NUM_LAYERS=11 MLP_MULT=3
 TIED_EMBED_LR=0.035
 MATRIX_LR=0.025 SCALAR_LR=0.025 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
 MUON_MOMENTUM_WARMUP_STEPS=1500 GRAD_CLIP_NORM=0.3 EVAL_STRIDE=64 SWA_EVERY=50 MUON_WD=0.04
 ADAM_WD=0.04 BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 XSA_LAST_N=4 ROPE_DIMS=16 LN_SCALE=1
 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 TTT_ENABLED=0 TTT_LR=0.002
 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=2 TTT_MOMENTUM=0.9 TTT_GRAD_CLIP=1.0
 QNA_ENABLED=0 QNA_MAGNITUDE=1
 SQWA_ENABLED=0""",
}


# What is written into the code of a script, where no variable reaches it, in our names
HARD_CODED = {
    "upstream": """INIT=default MLP_ACT=relu2 SMEAR_GATE=0 SMEAR_GATE_ENABLED=0 NUM_LOOPS=0
 SPARSE_ATTN_GATE_ENABLED=0 GATED_ATTN_ENABLED=0 ATTN_OUT_GATE_ENABLED=0 SKIP_GATES_ENABLED=0
 PARALLEL_START_LAYER=0 PARALLEL_RESIDUAL_START=-1 ASYM_LOGIT_RESCALE=0 BIGRAM_VOCAB_SIZE=0
 XSA_LAST_N=0
 LN_SCALE=0
 VE_ENABLED=0 ROPE_DIMS=0 ROPE_NTK_LEN=0 MUON_WD=0 ADAM_WD=0 QAT_ENABLED=0 SWA_ENABLED=0
 EMA_ENABLED=0 QUANT_BITS_MLP=8 QUANT_BITS_ATTN=8 QUANT_BITS_EMBED=8 QUANT_CLIP=quantile
 QUANT_CODES=sym QUANT_SCALE_FLOOR=1 KEEP_FLOAT_MAX_NUMEL=65536 PRUNE_PCT=0 COMPRESSOR=zlib
 EVAL_STRIDE=0 DOC_ISOLATED_EVAL=0 TTT_MODE=none NGRAM_TILT_ENABLED=0 CONTROL_DTYPE=fp32
 WARMDOWN_FRAC=0 EVAL_SEQ_LEN=0 SMEAR_MASK_BOS=0 QNA_ENABLED=0 SQWA_ENABLED=0 AVERAGE=auto
 QUANT_BITS_BIGRAM=8 FP16_KEEP_NAME_PATTERNS= GATED_ATTN_QUANT_GATE=0 GPTQ_ENABLED=0""",
    "pr145": """QAT_START_KIND=iter_frac QAT_START=0.3 QAT_SCOPE=linears QAT_GRID=export
 INIT=default
 MUON_WD=0 ADAM_WD=0 QUANT_BITS_EMBED=8 QUANT_CLIP=quantile COMPRESSOR=zlib""",
    "pr199": """QAT_START_KIND=iter_frac QAT_START=0.3 QAT_SCOPE=linears QAT_GRID=export
 INIT=default
 SWA_START_KIND=iter_frac SWA_EVERY=50 SWA_DTYPE=fp32 MUON_WD=0 ADAM_WD=0 QUANT_CLIP=quantile""",
    "pr194": """INIT=ortho SMEAR_POS=pre_norm SMEAR_BETA2=0.99 ADAM_WD=0 QAT_START_KIND=always
 QAT_START=0
 QAT_SCOPE=linears QAT_GRID=amax SWA_START_KIND=lr_scale SWA_DTYPE=native QUANT_CLIP=quantile
 QUANT_CODES=sym QUANT_SCALE_FLOOR=1 KEEP_FLOAT_MAX_NUMEL=65536 COMPRESSOR=zstd""",
    "pr989": """INIT=ortho SMEAR_GATE=1 SMEAR_POS=post_norm SMEAR_BETA2=0 SMEAR_MASK_BOS=0
 BIGRAM_PROJ_OPT=muon BIGRAM_PROJ_GAIN=0.2236068 MUON_WD=0.04 QAT_START_KIND=lr_scale
 SWA_START_KIND=lr_scale SWA_DTYPE=native QUANT_BITS_MLP=5 QUANT_BITS_ATTN=6 QUANT_BITS_BIGRAM=6
 QUANT_BITS_EMBED=16 QUANT_CLIP=amax QUANT_CODES=asym QUANT_SCALE_FLOOR=0 KEEP_FLOAT_MAX_NUMEL=8192
 COMPRESSOR=zstd CONTROL_DTYPE=fp16 QAT_SCOPE=exported QAT_GRID=export""",
    "pr975": """INIT=ortho MLP_ACT=leaky_relu2 ROPE_NTK_LEN=1024 SMEAR_GATE=1 SMEAR_POS=post_norm
 SMEAR_BETA2=0 SMEAR_MASK_BOS=0 BIGRAM_PROJ_OPT=adam BIGRAM_PROJ_GAIN=1 EMA_ENABLED=1
 EMA_DECAY=0.997 QAT_ENABLED=1 QAT_SCOPE=small_linears QAT_GRID=amax SWA_START_KIND=lr_scale
 SWA_START_FRAC=0.2 QUANT_BITS_MLP=6 QUANT_BITS_ATTN=6 QUANT_BITS_BIGRAM=8 QUANT_BITS_EMBED=8
 QUANT_CLIP=search5 QUANT_CODES=sym QUANT_SCALE_FLOOR=1 KEEP_FLOAT_MAX_NUMEL=65536
 COMPRESSOR=lzma CONTROL_DTYPE=fp16 QAT_BITS=6 QNA_SCOPE=block_linears QNA_GRID=row
 QNA_STOP_SCALE=0.15 QUANT_CLIP_BIGRAM=quantile QUANT_CLIP_EMBED=quantile SWA_DTYPE=fp32
 QAT_START_KIND=lr_scale EVAL_BATCH_SEQS=32""",
}


def pairs(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


@pytest.mark.parametrize("base", DEFAULTS)
def test_a_base_is_what_its_script_does_when_it_is_told_nothing(base):
    bare = Config.from_env({"BASE": base})
    told = Config.from_env({"BASE": base} | pairs(UPSTREAM) | pairs(DEFAULTS[base]))
    hard_coded = Config.from_env({"BASE": base} | pairs(HARD_CODED[base]))
    assert told == hard_coded == bare
    # nothing that it states stands here by itself alone
    own = {name for name in base_tables()[base] if name.isupper()}
    assert own <= told.given | hard_coded.given


def test_every_base_has_its_defaults_here_and_states_only_what_it_changes():
    # the others are in test_record_bases.py and, those that are a record, in test_leaderboard.py
    (leaderboard,) = [study for study in STUDIES if study.name == "leaderboard"]
    records = {arm for arm, facts in leaderboard.facts.items() if "score" in facts["published"]}
    others = {script_base(name) for name in RECORDS} | records
    assert set(base_tables()) - others == set(DEFAULTS) == set(PARAMETERS)
    for name, table in base_tables().items():
        over = read_base(table.get("base", "")).settings
        own = read_base(name).settings
        assert not [key for key in table if key in over and over[key] == own[key]], name


# ── Precedence and identity ───────────────────────────────────────────────────────────────────────
def test_what_is_given_wins_over_the_base_and_the_base_over_our_defaults():
    cfg = Config.from_env({"BASE": "pr989", "NUM_LAYERS": "12", "WEIGHT_DECAY": "0.1"})
    assert (cfg.num_layers, cfg.adam_wd, cfg.bigram_vocab_size) == (12, 0.1, 10240)
    cfg = Config.from_env({"BASE": "pr989", "MLP_MULT": "4"}, ["NUM_LAYERS=12"])
    assert (cfg.num_layers, cfg.mlp_mult, cfg.prune_pct) == (12, 4, 0.1)
    # a base named as an argument too, and over what a launcher chooses
    cfg = Config.from_env({"BASE": "pr145"}, ["BASE=pr989", "NUM_LAYERS?=3", "COMPILE?=0"])
    assert (cfg.base, cfg.num_layers, cfg.compile) == ("pr989", 10, "0")
    # as with our own defaults, what a checkpoint holds wins over what nobody gave
    assert Config.from_env({"BASE": "pr989", "SEED": "1"}).given == {"BASE", "SEED"}


def test_the_hash_of_a_configuration_depends_on_the_values_and_not_on_their_base():
    cfg = Config.from_env({"BASE": "pr975"})
    spelt_out = {name: str(value) for name, value in cfg.knobs().items() if name != "base"}
    for f in KNOBS:
        if f.type == "bool":
            spelt_out[f.name] = str(int(getattr(cfg, f.name)))
    other = Config.from_env({name.upper(): value for name, value in spelt_out.items()})
    assert other.base == "" and other.digest() == cfg.digest() != Config().digest()
    assert "BASE" not in cfg.non_default() and cfg.knobs()["base"] == "pr975"


# ── What another script means otherwise ───────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "command, base, meant",
    [
        (
            "SWA=1 SWA_START_FRAC=.5",
            "pr199",
            {"swa_enabled": True, "swa_start_kind": "iter_frac", "swa_start_frac": 0.5},
        ),
        (
            "ENABLE_QAT=1 QAT_START_FRAC=0.7",
            "pr989",
            {"qat_enabled": True, "qat_start_kind": "lr_scale", "qat_start": 0.7},
        ),
        ("ENABLE_QAT=1", "pr989", {"qat_start_kind": "lr_scale", "qat_start": 0.7}),
        ("LATE_QAT=1", "pr975", {"qat_start_kind": "lr_scale", "qat_start": 0.15}),
        ("TTT_ENABLED=1", "pr975", {"ttt_mode": "sgd"}),
        ("TTT_ENABLED=1", "pr1855", {"ttt_mode": "lora"}),
    ],
)
def test_a_pair_that_scripts_read_differently_is_read_as_its_script_did_or_asked_about(
    command, base, meant
):
    cfg = Config.from_env({"BASE": base} | pairs(command))
    assert {name: getattr(cfg, name) for name in meant} == meant
    message = refused(pairs(command))
    assert "BASE" in message and len(message.splitlines()) == 1
    assert all(word.split("=")[0] in message for word in command.split()[-1:]) or "QAT" in message


@pytest.mark.parametrize(
    "command",
    [
        "SWA=1 SWA_START_FRAC=.5 SWA_START_KIND=iter_frac",
        "SWA=1",
        "SWA_ENABLED=1 SWA_START_FRAC=.5",
        "SWA=0 SWA_START_FRAC=.5",
        "ENABLE_QAT=1 QAT_START_FRAC=0.7 QAT_START_KIND=lr_scale",
        "ENABLE_QAT=0 QAT_START_FRAC=0.7",
        "ENABLE_QAT=1 QAT_START_KIND=always",
        "ENABLE_QAT=0",
        "LATE_QAT=1 LATE_QAT_THRESHOLD=0.15",
        "LATE_QAT=0",
        "TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3",
        "TTT_ENABLED=1 TTT_MODE=sgd",
        "TTT_ENABLED=0",
        "BIGRAM_HASH=1 BIGRAM_VOCAB_SIZE=512",
        "BIGRAM_HASH=0",
    ],
)
def test_nothing_is_asked_where_it_is_said_or_off(command):
    assert Config.from_env(pairs(command)).given


@pytest.mark.parametrize(
    "base, command",
    [
        ("upstream", "LATE_QAT=1"),
        ("upstream", "ENABLE_QAT=1"),
        ("upstream", "ENABLE_QAT=1 QAT_START_FRAC=0.7"),
        ("upstream", "BIGRAM_HASH=1"),
        ("upstream", "TTT_ENABLED=1"),
        ("pr145", "SWA=1 SWA_START_FRAC=.5"),
        ("pr194", "QAT_START=.5"),
        ("pr989", "TTT_ENABLED=1"),
        ("pr989", "LATE_QAT=1"),
        ("pr989", "BIGRAM_HASH=1"),
    ],
)
def test_a_base_that_says_nothing_of_the_matter_settles_nothing(base, command):
    message = refused({"BASE": base} | pairs(command))
    asked = [word.split("=")[0] for word in command.split()][-1]
    assert asked in message and "?" in message and len(message.splitlines()) == 1


def test_nothing_is_asked_of_what_an_argument_overrules():
    env = pairs("LATE_QAT=1 SWA=1 SWA_START_FRAC=.5")
    arguments = ["QAT_ENABLED=0", "SWA_ENABLED=0"]
    assert not Config.from_env(env, arguments).qat_enabled
    with pytest.raises(Refusal, match="below which lr scale"):
        Config.from_env(env, arguments[1:])


def test_a_base_may_be_a_default_of_the_launcher():
    cfg = Config.from_env({"NUM_LAYERS": "12"}, ["BASE?=pr989"])
    assert (cfg.base, cfg.num_layers, cfg.bigram_vocab_size) == ("pr989", 12, 10240)
    assert cfg.given == {"NUM_LAYERS"}
    cfg = Config.from_env({"BASE": "pr145"}, ["BASE?=pr989"])
    assert cfg == Config.from_env({"BASE": "pr145"})


def test_the_noise_of_975_ends_where_its_qat_begins():
    cfg = Config.from_env({"BASE": "pr975", "LATE_QAT_THRESHOLD": "0.3"})
    assert (cfg.qat_start, cfg.qna_stop_scale) == (0.3, 0.3)
    ours = Config.from_env({"LATE_QAT_THRESHOLD": "0.3"})
    assert (ours.qat_start, ours.qna_stop_scale) == (0.3, 0.15)


@pytest.mark.parametrize(
    "base, command",
    [
        ("pr199", "SMEAR_GATE=1"),
        ("pr199", "BIGRAM_HASH=1"),
        ("pr194", "BIGRAM_VOCAB_SIZE=4096"),
        ("pr194", "TTT_ENABLED=1 TTT_LR=0.01"),
    ],
)
def test_what_we_have_under_the_same_name_but_otherwise_is_refused_under_that_base(base, command):
    message = refused({"BASE": base} | pairs(command))
    assert f"with BASE={base}" in message and "unset BASE" in message
    # as it can be written
    assert "True" not in message
    if "BIGRAM_HASH" in command:
        # without a base it is asked which hash is meant
        command = "BIGRAM_HASH=1 BIGRAM_VOCAB_SIZE=4096"
    Config.from_env(pairs(command))


@pytest.mark.parametrize(
    "base, command, remedy",
    [
        ("pr1285", "RECUR_LAYERS=4,5", "unset RECUR_LAYERS"),
        ("pr1285", "NUM_LOOPS=1", "set NUM_LOOPS=0"),
        ("pr1412", "TTT_ENABLED=1", "unset TTT_ENABLED"),
        ("pr1412", "TTT_MODE=sgd", "set TTT_MODE=none"),
    ],
)
def test_what_a_base_refuses_is_named_as_it_was_spelt(base, command, remedy):
    message = refused({"BASE": base} | pairs(command))
    assert message.startswith(f"{command}: with BASE={base}") and f"; {remedy}, or" in message
    assert len(message.splitlines()) == 1


def test_the_old_toggle_of_other_hashes_is_asked_about():
    assert "BIGRAM_VOCAB_SIZE=4096" in refused({"BIGRAM_HASH": "1"})


# ── Where the tables come from ────────────────────────────────────────────────────────────────────
@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """elsewhere(text) writes a file of bases, and has the script look for it there alone."""
    (tmp_path / "studies").mkdir()
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    base_tables.cache_clear()

    def write(text: str) -> Path:
        (tmp_path / BASES).write_text(text, encoding="utf-8")
        base_tables.cache_clear()
        return tmp_path / "studies"

    yield write
    base_tables.cache_clear()


def test_an_unknown_base_is_refused_with_the_names_that_there_are():
    message = refused({"BASE": "pr98", "SEED": "one"})
    assert message.splitlines() == [
        f"BASE=pr98: no such script; choose from {', '.join(base_tables())}, or unset BASE",
        "SEED=one: must be a whole number in digits 0-9, without spaces",
    ]


def test_without_the_studies_a_base_is_refused_and_all_else_works(elsewhere):
    message = refused({"BASE": "pr989"})
    assert message.startswith("BASE=pr989: ") and len(message.splitlines()) == 1
    assert BASES in message and "settings:" in message
    Config.from_env({"NUM_LAYERS": "3"})
    assert "BASE=" in help_text()


@pytest.mark.parametrize(
    "text, told",
    [
        ("[base.x\n", "bases.toml: cannot be read"),
        ("[base.x]\nNO_SUCH = 1\n", "base.x: NO_SUCH: no such setting"),
        ("[base.x]\nSMEAR_GATE = 0\nfixed = { NO_SUCH = 'why' }\n", "NO_SUCH"),
        ("[base.x]\nfixed = { SMEAR_GATE = 'why' }\n", "at which value?"),
        ("[base.x]\nfixed = 3\n", "fixed needs"),
        ("[base.x]\noff = 3\n", "off"),
        ("[base.x]\nlacks = 'GPTQ'\n", "lacks a list"),
        ("[base.x]\noff = { SEED = 1 }\n", "SEED: fixed or off at which value"),
        ("[base.x]\nmeans = { OLD = 'SEED' }\n", "fixed needs"),
        ("[base.x]\nmodel = 'y'\n", "model: no such key"),
        ("[base.x]\nSEED = [1]\n", "SEED=[1]: must be a whole number"),
        ("[base.x]\nbase = ['x']\n", "base = ['x']: no base"),
        ("base = 3\n", "no tables"),
        ("[base]\nx = 3\n", "base.x: no table"),
        ("[base.x]\nmeans = { OLD = ['NO_SUCH'] }\n", "NO_SUCH"),
        ("[base.x]\nbase = 'y'\n", "base = y: no base"),
        ("[base.x]\nbase = 'y'\n[base.y]\nbase = 'x'\n", "comes back to itself"),
        ("[base.x]\nSEED = -1\n", "SEED=-1: must be 0 or more"),
    ],
    ids=str,
)
def test_a_broken_base_is_refused_in_one_line(elsewhere, text, told):
    elsewhere(text)
    message = refused({"BASE": "x"})
    assert told in message and len(message.splitlines()) == 1


def test_a_base_states_what_it_changes_in_another_one_even_after_a_byte_order_mark(elsewhere):
    elsewhere(
        "\ufeff[base.x]\nNUM_LAYERS = 3\nLN_SCALE = true\n"
        "[base.y]\nbase = 'x'\nMODEL_DIM = 64\nVE_LAYERS = '1'\n",
    )
    cfg = Config.from_env({"BASE": "y"})
    assert (cfg.num_layers, cfg.ln_scale, cfg.model_dim, cfg.ve_layers) == (3, True, 64, "1")


def test_studies_of_ones_own_are_run_and_change_no_base(elsewhere):
    """A copy of each study says the same, and one that is half edited is nobody else's trouble."""
    folder = elsewhere((ROOT / BASES).read_text(encoding="utf-8"))
    for study in STUDIES:
        mine = folder / f"mine_{study.name}.toml"
        mine.write_bytes(study.path.read_bytes())
        copy = read_study(mine)
        for size in study.sizes:
            trials = [matrix(s, size, "steps").trials for s in (study, copy)]
            digests = [[trial.cfg.digest("seed", *COMPARED) for trial in t] for t in trials]
            assert digests[0] == digests[1]
    mine.write_text("[base.pr989]\nNO_SUCH = [\n", encoding="utf-8")
    assert Config.from_env({"BASE": "pr989"}).num_layers == 10
    assert "BASE takes upstream" in help_text()


def test_a_name_that_we_lack_may_be_one_of_ours_under_a_base(elsewhere):
    elsewhere("[base.x]\nmeans = { LAWA_K = ['NUM_LAYERS'] }\n")
    told = {"LAWA_K": "7"}
    assert Config.from_env(told | {"BASE": "x"}).num_layers == 7
    assert "a setting of other scripts" in refused(told)


def test_what_a_script_means_otherwise_its_successors_mean_too(elsewhere):
    told = "SMEAR_GATE = 0\nfixed = { SMEAR_GATE = 'it is another gate' }\n"
    elsewhere(f"[base.x]\n{told}means = {{ SIZE = ['NUM_LAYERS'] }}\n[base.y]\nbase = 'x'\n")
    assert Config.from_env({"BASE": "y", "SIZE": "3"}).num_layers == 3
    assert "it is another gate" in refused({"BASE": "y", "SMEAR_GATE": "1"})


def test_a_run_goes_on_under_its_base_and_under_no_other(elsewhere):
    small = "MODEL_DIM = 32\nNUM_HEADS = 2\nNUM_KV_HEADS = 1\nVOCAB_SIZE = 16\nNUM_LAYERS = "
    elsewhere(f"[base.x]\n{small}2\nPRUNE_PCT = 0.2\n[base.y]\n{small}1\n")
    variables = {"BASE": "x", "RESUME": "1", "RUN_ID": "r"}
    cfg = Config.from_env(variables)
    weights = {name: p.detach() for name, p in GPT(cfg).named_parameters()}

    def go_on(**changes: str) -> Config:
        launch = Config.from_env(variables | changes)
        return train_gpt.inherit_settings(launch, cfg.knobs("seed", *COMPARED), weights)

    assert go_on() == dataclasses.replace(cfg, inherited=True)
    # what is given may differ where a resumed run may
    assert go_on(PRUNE_PCT="0.1").prune_pct == 0.1
    assert go_on(BASE="y", NUM_LAYERS="2").num_layers == 2
    with pytest.raises(Refusal) as refusal:
        go_on(BASE="y")
    made = "has NUM_LAYERS=1, but RESUME=1 RUN_ID=r was made with NUM_LAYERS=2"
    assert str(refusal.value) == f"BASE=y: {made}; unset BASE"


def test_help_lists_the_bases():
    text = " ".join(help_text().split())
    assert f"BASE takes {', '.join(base_tables())}" in text


def test_a_base_is_named_in_the_log_and_in_the_result(tiny):
    places = {name.upper(): str(value) for name, value in tiny().knobs("run").items() if value}
    small = "NUM_LAYERS=1 MODEL_DIM=32 VOCAB_SIZE=384 ITERATIONS=2 TRAIN_SEQ_LEN=16 EVAL_STRIDE=0"
    small += " TRAIN_BATCH_TOKENS=64 VAL_MAX_TOKENS=64 WARMUP_STEPS=1 STRICT=0 COMPILE=0"
    small += " FP16_KEEP_NAME_PATTERNS="
    cfg = Config.from_env(
        places | pairs(small) | {"BASE": "pr989", "DATA_PATH": str(tiny().data_path)}
    )
    result = train_gpt.main(cfg)
    log = (Path(cfg.logs_dir) / cfg.run_id / "train.log").read_text()
    assert result["config"]["base"] == "pr989" and "base: pr989" in log
    assert result["config"] | {"quant_bits_mlp": 5, "swa_every": 50} == result["config"]
    assert "BASE" not in result["non_default"]
    settings = next(line for line in log.splitlines() if line.startswith("settings: "))
    assert "BASE" not in settings and "ITERATIONS=2" in settings
    assert "QUANT_BITS_MLP=5" in settings and "QUANT_CLIP=amax" in settings


def test_what_a_base_lacks_is_said_in_the_log(tiny, run, elsewhere):
    def said(base: str) -> list[str]:
        lines = []
        run.rank, run.log = 1, lines.append
        train_gpt.log_start(tiny(base=base), run)
        return [line for line in lines if "has not" in line]

    lacking = "[base.x]\nlacks = ['GPTQ', 'brotli']\n[base.y]\nbase = 'x'\n"
    elsewhere(lacking + "[base.z]\nbase = 'y'\nlacks = []\n")
    assert said("x") == ["base: x has what this script has not: GPTQ, brotli"]
    assert said("y") == ["base: y has what this script has not: GPTQ, brotli"]
    assert said("z") == []


def test_spellings_of_other_scripts_without_their_base_are_named_in_the_log(tiny, run):
    def said(variables: dict, **more) -> list[str]:
        lines = []
        run.rank, run.log = 1, lines.append
        train_gpt.log_start(tiny(spelt=Config.from_env(variables).spelt, **more), run)
        return [line for line in lines if "spellings of other scripts" in line]

    theirs = {"WEIGHT_DECAY": "0.04", "EMBED_LR": "0.6", "MUON_WD": "0.04", "HOME": "/"}
    (line,) = said(theirs)
    assert line.startswith("EMBED_LR, WEIGHT_DECAY: ") and "BASE=NAME" in line
    assert not said({"ADAM_WD": "0.04"}) and not said(theirs, base="pr989")
    # the rest is a checkpoint's
    assert not said(theirs, inherited=True)


def test_what_a_command_leaves_to_our_defaults_without_its_base():
    """The numbers of docs/studies.md."""
    found = {}
    for *_, command in PUBLISHED:
        row = Config.from_env(command)
        if row.base in ("pr194", "pr975"):
            bare = Config.from_env({k: v for k, v in command.items() if k != "BASE"})
            found.setdefault(row.base, set()).add(len(row.differing(bare.knobs(*COMPARED))))
    assert found == {"pr194": {3, 4}, "pr975": {33, 35, 36}}

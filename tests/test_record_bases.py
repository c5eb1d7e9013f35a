"""The accepted records from #549 on as bases: what their scripts do when they are told nothing.

Failures that these tests would have caught: a table that was read off a README, whose settings
are not those of the log; a default that a later script changed in silence (#2135 has no mask in
its SmearGate, #1851 has); a variable that a script reads and never uses.
"""

import pytest
import torch
from pages_frontier import RECORDS, command, refused, script_base

from train_gpt import ABSENT, BY_NAME, GPT, Config, base_tables, read_base

NAMES = list(RECORDS.keys() & base_tables().keys())
NAMES.sort(key=list(RECORDS).index)

# Variables that we have, whose default there is no setting of ours -> why
NOT_A_SETTING = {
    "GPTQ_RESERVE_MS": "0 is nothing for text of the model's own; training rows take some (pr1204)",
    "QAT_ENABLED": "0 leaves the late QAT on, which LATE_QAT_THRESHOLD starts",
    "EVAL_STRIDE": "64 is nothing where SLIDING_WINDOW_ENABLED is 0, or is not read",
}


def defaults(name: str) -> dict[str, str]:
    """VARIABLE -> what the script of this record takes by itself."""
    record = RECORDS[name]
    inherited = defaults(record["of"]) if record["of"] else {}
    kept = {key: text for key, text in inherited.items() if key not in record["gone"]}
    return kept | record["defaults"]


def ours(name: str, variables: dict[str, str]) -> dict[str, str]:
    """Those of these variables that are settings of ours under this base."""
    base = read_base(script_base(name))
    old_names = base.old_names()
    known = (BY_NAME.keys() | old_names.keys()) - base.absent() - NOT_A_SETTING.keys()
    found = {key: text for key, text in variables.items() if key in known}
    # without those that say what this base means otherwise
    means = {
        key: old_names[key](text, {}) if key in old_names else {key: text}
        for key, text in found.items()
    }
    return {key: text for key, text in found.items() if not means[key].keys() & base.fixed.keys()}


# What is written into the code of a script, where no variable reaches it, in our names; and what
# a variable says that is no setting of ours (NOT_A_SETTING)
HARD_CODED = {
    "pr549": "SWA_DTYPE=native AVERAGE=ema EMA_ENABLED=1 EMA_DECAY=0.997 NEGATIVE_SLOPE=0.5",
    "pr1060": "LOADER=coprime QAT_ENABLED=0 EMA_DECAY=0.997 GPTQ_RESERVE_SECONDS=14",
    "pr1204": "LOADER=coprime SKIP_GATES_ENABLED=1 NEGATIVE_SLOPE=0.5 COMPRESSOR=brotli",
    "pr1218": """SMEAR_GATE=0 BIGRAM_VOCAB_SIZE=0 ROPE_NTK_LEN=0 LOADER=coprime QAT_ENABLED=0
     SWA_ENABLED=0 AVERAGE=auto EMA_ENABLED=1 NEGATIVE_SLOPE=0.5 MUON_ROW_NORMALIZE=0
     QAT_START_KIND=always QAT_START=0 QAT_SCOPE=exported QAT_GRID=export QAT_BITS=0
     QNA_SCOPE=exported QNA_GRID=export""",
    "pr1285": "MUON_ROW_NORMALIZE=1 LOADER=coprime",
    "pr1334": "MUON_ROW_NORMALIZE=1 LOADER=coprime",
    "pr1394": """VE_ENABLED=0 LOADER=shuffled NEGATIVE_SLOPE=0.5 DOC_MASK=0 GPTQ_ENABLED=1
     QUANT_CLIP=sigma QUANT_CLIP_BIGRAM=auto QUANT_CLIP_EMBED=auto QUANT_SCALE_FLOOR=0""",
    "pr1529": "TTT_MODE=sgd LOADER=shuffled DOC_MASK=0",
    "pr1530": """PARALLEL_RESIDUAL_START=-1 LOADER=documents DOC_MASK=1 EVAL_STRIDE=0
     SMEAR_GATE_ENABLED=0 TTT_LORA_ALPHA=0
     TTT_WARM_START_A=0 PHASED_TTT_ENABLED=0""",
    "pr1667": "SMEAR_MASK_BOS=0",
    "pr1736": "MUON_COEFFS=quintic SMEAR_MASK_BOS=0 PHASED_TTT_ENABLED=1",
    "pr1787": "MUON_COEFFS=polar_express SMEAR_MASK_BOS=0",
    "pr1851": "MUON_COEFFS=polar_express SMEAR_MASK_BOS=1",
    "pr1953": "SMEAR_MASK_BOS=1",
    "pr2014": "SMEAR_MASK_BOS=1",
    "pr2135": "MUON_COEFFS=polar_express LOADER=documents",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_what_the_script_of_the_record_does_by_itself(name):
    bare = Config.from_env({"BASE": script_base(name)})
    told = Config.from_env({"BASE": script_base(name)} | ours(name, defaults(name)))
    written = dict(word.split("=") for word in HARD_CODED.get(name, "").split())
    hard_coded = Config.from_env({"BASE": script_base(name)} | written)
    assert told == hard_coded == bare and len(told.given) > 35
    # nothing that it states stands here by itself alone
    own = {key for key in base_tables()[script_base(name)] if key.isupper()}
    assert own <= told.given | hard_coded.given


@pytest.mark.parametrize("name", NAMES[NAMES.index("pr1218") :])
def test_qat_can_be_added_to_a_record_that_has_none(name):
    cfg = Config.from_env({"BASE": script_base(name), "QAT_ENABLED": "1"})
    plain = Config()
    for knob in ("qat_start_kind", "qat_start", "qat_scope", "qat_grid", "qat_bits"):
        assert getattr(cfg, knob) == getattr(plain, knob)


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_of_a_record_is_a_setting_or_refused_by_name(name):
    known = BY_NAME.keys() | ABSENT.keys() | read_base(script_base(name)).old_names().keys()
    assert not defaults(name).keys() - known


# ── Their commands ────────────────────────────────────────────────────────────────────────────────
# What commands say of techniques that are still to come, and that is refused by name until then
TO_COME = """
    TARGET_MB HESSIAN_CLIP_LAMBDA MIXED_QUANT N_INT6_LAYERS AWQ_LITE_ENABLED"""
# What belongs to lanes and loops that later records do without, or changes nothing there
NOT_TO_COME = {
    "pr1204": """NUM_LOOPS RECUR_LAYERS RECUR_START_STEP REPEAT_UNTIE_MLP REPEAT_UNTIE_MLP_LAYERS
     DISABLE_LAYER0_ATTN PARALLEL_RESIDUAL PARALLEL_START_LAYER""",
    "pr1285": "NUM_LOOPS RECUR_LAYERS",
    "pr1334": "NUM_LOOPS RECUR_LAYERS RECUR_START_STEP PARALLEL_START_LAYER",
    "pr1477": "PARALLEL_START_LAYER",
    "pr1514": "NGRAM_TILT_ENABLED",
    "pr2014": "EVAL_STRIDE",
}


def test_what_is_still_to_come_is_no_setting_yet():
    """Once it is, its name leaves TO_COME, and the tests below ask more."""
    assert set(TO_COME.split()) <= ABSENT.keys()


@pytest.mark.parametrize("name", NAMES)
def test_of_a_records_command_only_that_is_refused_which_is_still_to_come(name):
    problems = refused(name)
    known = {*TO_COME.split(), *NOT_TO_COME.get(name, "").split()}
    assert problems.keys() <= known, problems
    assert all(len(problem.splitlines()) == 1 for problem in problems.values())


# With parameters of their own
OTHER_PARTS = ("pr1204", "pr1334", "pr1477")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHER_PARTS])
def test_the_rest_of_a_records_command_gives_the_parameters_of_its_log(name):
    variables = command(name)
    rest = variables.keys() - refused(name).keys()
    cfg = Config.from_env({"BASE": script_base(name)} | {key: variables[key] for key in rest})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(cfg).parameters())
    assert parameters == RECORDS[name]["parameters"]


# The first parallel block and the first with lanes, of 11
PARALLEL = {
    "pr1394": (11, 0),
    "pr1412": (7, 0),
    "pr1493": (7, 0),
    "pr1514": (7, 0),
    # #1529 gives the name of #1412's switch to the start of its lanes
    "pr1529": (11, 8),
    "pr1530": (11, 8),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_the_parallel_blocks_of_a_record(name):
    known = command(name).keys() - refused(name).keys()
    cfg = Config.from_env({"BASE": script_base(name)} | {key: command(name)[key] for key in known})
    with torch.device("meta"):
        blocks = GPT(cfg).blocks
    first, lanes = PARALLEL[name]
    assert [block.layer for block in blocks if block.parallel] == [*range(first, 11)]
    assert cfg.parallel_start_layer == lanes


# What the log of #1855 prints, seed 42, and what its script has without a variable
RECORD_1855 = dict(
    vocab_size=8192,
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    mlp_mult=4,
    negative_slope=0.5,
    init="ortho",
    tied_embed_init_std=0.005,
    qk_gain_init=5,
    logit_softcap=30,
    rope_base=10000,
    rope_dims=16,
    rope_ntk_len=0,
    xsa_last_n=11,
    ln_scale=True,
    skip_gates_enabled=True,
    sparse_attn_gate_enabled=True,
    sparse_attn_gate_scale=0.5,
    sparse_attn_gate_init_std=0,
    gate_window=12,
    smear_gate_enabled=True,
    smear_mask_bos=True,
    num_loops=2,
    loop_start=3,
    loop_end=5,
    enable_looping_at=0.35,
    parallel_start_layer=8,
    parallel_final_lane="mean",
    # off, or not there
    smear_gate=False,
    bigram_vocab_size=0,
    ve_enabled=False,
    gated_attn_enabled=False,
    attn_out_gate_enabled=False,
    asym_logit_rescale=False,
    qat_enabled=False,
    swa_enabled=False,
    # data, batch and schedule
    loader="documents",
    doc_mask=True,
    train_batch_tokens=786_432,
    train_seq_len=2048,
    iterations=20_000,
    max_wallclock_seconds=600,
    warmup_steps=20,
    warmdown_frac=0.85,
    min_lr=0.1,
    # optimisers and average
    matrix_lr=0.026,
    muon_momentum=0.97,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_backend_steps=5,
    muon_coeffs="polar_express",
    muon_row_normalize=True,
    muon_wd=0.095,
    tied_embed_lr=0.03,
    embed_wd=0.085,
    scalar_lr=0.02,
    adam_wd=0.02,
    beta1=0.9,
    beta2=0.99,
    adam_eps=1e-8,
    grad_clip_norm=0.3,
    ema_enabled=True,
    ema_decay=0.9965,
    shipped_average="ema",
    quant_bits_mlp=6,
    quant_bits_attn=6,
    quant_bits_embed=7,
    quant_clip="sigma",
    mlp_clip_sigmas=11.5,
    attn_clip_sigmas=13,
    embed_clip_sigmas=14,
    quant_scale_floor=False,
    gated_attn_quant_gate=True,
    gptq_enabled=True,
    gptq_calibration_batches=16,
    gptq_reserve_seconds=0.5,
    gptq_damp=0.01,
    lqer_enabled=True,
    lqer_fit="svd",
    lqer_rank=4,
    lqer_top_k=3,
    lqer_asym_enabled=True,
    lqer_asym_group=64,
    # scoring
    eval_stride=0,
    window=2048,
    ttt_mode="lora",
    ttt_batch_size=64,
    ttt_chunk_size=48,
    ttt_lora_rank=80,
    ttt_lora_alpha=144,
    ttt_lora_lr=1e-4,
    ttt_beta1=0,
    ttt_beta2=0.99,
    ttt_weight_decay=0.5,
    ttt_warm_start_a=True,
    ttt_q_lora=True,
    ttt_k_lora=True,
    ttt_v_lora=True,
    ttt_o_lora=True,
    ttt_mlp_lora=True,
    phased_ttt_enabled=True,
    phased_ttt_prefix_docs=2500,
    phased_ttt_num_phases=3,
    global_ttt_lr=0.001,
    global_ttt_momentum=0.9,
    global_ttt_chunk_tokens=32768,
    global_ttt_grad_clip=1,
    seed=42,
)


def test_the_published_command_of_1855_is_the_record():
    cfg = Config.from_env({"BASE": "script1855"} | command("pr1855"))
    assert {key: getattr(cfg, key) for key in RECORD_1855} == RECORD_1855
    with torch.device("meta"):
        assert sum(weight.numel() for weight in GPT(cfg).parameters()) == 35_945_671
    assert cfg.without_effect().keys() == {"DATA_DIR", "FUSED_CE_ENABLED"}

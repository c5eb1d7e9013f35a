"""The accepted records from #549 on as bases: what their scripts do when they are told nothing.

Failures that these tests would have caught: a table that was read off a README, whose settings
are not those of the log; a default that a later script changed in silence (#2135 has no mask in
its SmearGate, #1851 has); a variable that a script reads and never uses.
"""

import pytest
import torch
from pages_frontier import RECORDS, command, refused

from train_gpt import ABSENT, BY_NAME, GPT, Config, base_tables, read_base

NAMES = list(RECORDS.keys() & base_tables().keys())
NAMES.sort(key=list(RECORDS).index)

# Variables that we have, whose default there is no setting of ours -> why
NOT_A_SETTING = {
    "QAT_ENABLED": "0 leaves the late QAT on, which LATE_QAT_THRESHOLD starts",
    "COMPRESSOR": "brotli is still to come",
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
    base = read_base(name)
    old_names = base.old_names()
    known = (BY_NAME.keys() | old_names.keys()) - base.absent() - NOT_A_SETTING.keys()
    found = {key: text for key, text in variables.items() if key in known}
    # without those that say what this base means otherwise
    means = {
        key: old_names[key](text, {}) if key in old_names else {key: text}
        for key, text in found.items()
    }
    return {key: text for key, text in found.items() if not means[key].keys() & base.fixed.keys()}


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_what_the_script_of_the_record_does_by_itself(name):
    bare = Config.from_env({"BASE": name})
    told = Config.from_env({"BASE": name} | ours(name, defaults(name)))
    assert told == bare and len(told.given) > 35


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_of_a_record_is_a_setting_or_refused_by_name(name):
    known = BY_NAME.keys() | ABSENT.keys() | read_base(name).old_names().keys()
    assert not defaults(name).keys() - known


# ── Their commands ────────────────────────────────────────────────────────────────────────────────
# What commands say of techniques that are still to come, and that is refused by name until then
TO_COME = """
    GPTQ_RESERVE_SECONDS GPTQ_RESERVE_MS GPTQ_CALIBRATION_BATCHES USE_GPTQ TARGET_MB
    MLP_CLIP_SIGMAS ATTN_CLIP_SIGMAS EMBED_CLIP_SIGMAS MATRIX_CLIP_SIGMAS GATED_ATTN_QUANT_GATE
    HESSIAN_CLIP_LAMBDA MIXED_QUANT N_INT6_LAYERS COMPRESSOR
    LQER_ENABLED LQER_ASYM_ENABLED LQER_RANK LQER_FACTOR_BITS LQER_ASYM_GROUP LQER_TOP_K
    AWQ_LITE_ENABLED CASEOPS_ENABLED
    PHASED_TTT_ENABLED PHASED_TTT_PREFIX_DOCS PHASED_TTT_NUM_PHASES GLOBAL_TTT_MOMENTUM TTT_ENABLED
    TTT_CHUNK_SIZE TTT_BETA2 TTT_WEIGHT_DECAY TTT_LORA_RANK TTT_LORA_LR TTT_EVAL_SEQ_LEN TTT_MASK
    TTT_LOCAL_LR_MULT TTT_Q_LORA TTT_V_LORA TTT_K_LORA TTT_BATCH_SIZE
    TTT_SHORT_BETA2 TTT_SHORT_CHUNK_SIZE TTT_SHORT_DOC_LEN TTT_SHORT_LORA_RANK
    TTT_SHORT_SCORE_FIRST_ENABLED TTT_SHORT_SCORE_FIRST_STEPS TTT_SHORT_WEIGHT_DECAY
    TTT_WARM_START_MEAN_DOC_LEN
    NGRAM_TILT_ENABLED NGRAM_HINT_PRECOMPUTE_OUTSIDE ARTIFACT_DIR"""
# What belongs to lanes and loops that later records do without, or changes nothing there
NOT_TO_COME = {
    "pr1204": """NUM_LOOPS RECUR_LAYERS RECUR_START_STEP REPEAT_UNTIE_MLP REPEAT_UNTIE_MLP_LAYERS
     DISABLE_LAYER0_ATTN PARALLEL_RESIDUAL PARALLEL_START_LAYER""",
    "pr1285": "NUM_LOOPS RECUR_LAYERS",
    "pr1334": "NUM_LOOPS RECUR_LAYERS RECUR_START_STEP PARALLEL_START_LAYER",
    "pr1412": "PARALLEL_RESIDUAL_START",
    "pr1477": "PARALLEL_START_LAYER",
    "pr1514": "PARALLEL_RESIDUAL_START",
    "pr2014": "EVAL_STRIDE",
}


def test_what_is_still_to_come_is_no_setting_yet():
    """Once it is, its name leaves TO_COME, and the tests below ask more."""
    assert set(TO_COME.split()) - {"COMPRESSOR", "TTT_ENABLED"} <= ABSENT.keys()


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
    cfg = Config.from_env({"BASE": name} | {key: variables[key] for key in rest})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(cfg).parameters())
    assert parameters == RECORDS[name]["parameters"]

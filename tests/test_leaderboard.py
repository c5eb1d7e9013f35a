"""studies/leaderboard.toml: the records as arms, in full and in small, and their commands.

Failures that these tests would have caught: #1769's arm was #1736's, whose logs have the same
settings; a chunk of test-time training longer than the window that was scaled down; the published
command of #1855 without BASE, refused for one setting without a word on the other 43.
"""

import dataclasses
import re
import statistics

import pages_leaderboard
import pytest
import torch
from conftest import ROOT
from pages_frontier import COMMANDS, RECORDS, command, refused, script_base
from typer.testing import CliRunner

import ablate
import train_gpt
from ablation import scale, submission
from ablation.report import Finished
from ablation.statistics import rank_correlation
from ablation.study import arm_settings, matrix, parse_toml, read_study, study_of
from train_gpt import COMPARED, GPT, KNOBS, Config, Refusal, base_tables, log_start

STUDY = read_study(ROOT / "studies" / "leaderboard.toml")
FULL = {trial.arm: trial.cfg for trial in matrix(STUDY, "full", "time", (1,)).trials}
SMALL = {trial.arm: trial.cfg for trial in matrix(STUDY, "small", "steps", (1,)).trials}

# Their folders, for those whose commands record_defaults.json has not
FOLDERS = {
    "baseline": "2026-03-17_NaiveBaseline",
    "lower_lr": "2026-03-18_LowerLR",
    "pr42": "2026-03-18_FP16Embed_WD3600",
    "pr49": "2026-03-18_LongContextSeq2048",
    "pr50": "2026-03-19_SlidingWindowEval",
    "pr52": "2026-03-19_TrainingOptSeq4096",
    "pr65": "2026-03-19_MixedQuant_Int6Int8_SlidingWindow",
    "pr63": "2026-03-19_Seq2048_FP16Emb_TunedLR",
    "pr86": "2026-03-19_MLP3x_QAT_Int6_SlidingWindow",
    "pr265": "2026-03-20_11L_EfficientPartialXSA_FA3_SWA120",
    "pr287": "2026-03-20_11L_XSA4_EMA_Int6_MLP3x_WD04_1.1271",
    "pr315": "2026-03-21_11L_XSA4_EMA_PartialRoPE_LateQAT_1.1248",
    "pr1851": "2026-04-29_SmearGateBOSFix_3Seed_1.06141",
}
# Folders of rows that are no arm, besides those of record_defaults.json
NO_ARM = {
    "pr39": "2026-03-19_10L_MixedPrecision",
    "warmdown_quantization": "2026-03-19_WarmdownQuantization",
    "smeargate_orthoinit": "2026-03-19_smeargate_orthoinit_muonwd",
    "pr640": "2026-03-24_74M_Ternary_UNet_FP8_10L_8192BPE_YaRN_NeoMuon",
}
# Parameters of the logs of those that record_defaults.json has not, one of each shape
PARAMETERS = {
    "baseline": 17_059_912,
    "pr42": 16_765_000,
    "pr65": 21_778_504,
    "pr63": 22_174_288,
    "pr86": 26_501_720,
    "pr162": 22_368_841,
    "pr180": 25_517_137,
    "pr287": 26_829_913,
    "pr414": 26_993_756,
}

# What a command says and its record has otherwise -> why
OTHERWISE = {
    "pr315": {"qat_enabled"},  # compiled away there
    # the leaderboard has the score of an earlier commit than the one whose settings these are
    "pr1945": {"qk_gain_init", "eval_seq_len"},
}
# Of a command, what means nothing of ours: every fourth code of 8 bits; one pass in all
NOT_OURS = {
    "pr86": {"INT6_LAYER_START", "INT6_LAYER_END", "QAT_INT6"},
    "pr50": {"NUM_LOOPS", "LORA_RANK"},
}


def parameters(cfg: Config) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in GPT(cfg).parameters())


def told(arm: str) -> dict[str, str]:
    """The published command of an arm, as far as its base understands it."""
    if arm in FOLDERS:
        variables = COMMANDS[FOLDERS[arm]]
        unknown = NOT_OURS.get(arm, set())
    else:
        variables = command(arm)
        unknown = refused(arm).keys()
    return {key: text for key, text in variables.items() if key not in unknown}


# ── The records ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("arm", [arm for arm in STUDY.arms if arm in FOLDERS or arm in RECORDS])
def test_the_arm_of_a_record_is_its_published_command(arm):
    record = Config.from_env(STUDY.arms[arm])
    logging = {"val_loss_every", "train_log_every"}
    # with the base of its script, and with its own, to which it adds nothing
    own = STUDY.arms[arm]["BASE"]
    for base in {script_base(own), own}:
        beside = Config.from_env({"BASE": base} | told(arm))
        found = set(record.differing(beside.knobs(*COMPARED))) - logging
        assert found == OTHERWISE.get(arm, set()), base
        assert record.caseops_enabled >= beside.caseops_enabled


def test_the_early_arms_have_the_parameters_of_their_logs():
    """The later ones: test_record_bases.py."""
    assert {arm: parameters(FULL[arm]) for arm in PARAMETERS} == PARAMETERS
    shapes = {FULL[arm].digest("model") for arm in PARAMETERS}
    early = [arm for arm in pages_leaderboard.in_order(STUDY) if arm not in RECORDS]
    rows = ("pr49", "pr52", "pr265", "pr315")
    assert {FULL[arm].digest("model") for arm in early if arm not in rows} == shapes


def test_an_arm_states_nothing_that_its_base_states():
    """One definition: an arm of a record is a base, and says nothing besides."""
    for arm in pages_leaderboard.in_order(STUDY):
        assert STUDY.arms[arm].keys() == {"BASE"} and STUDY.arms[arm]["BASE"] in base_tables()


def test_every_row_of_the_leaderboard_is_an_arm_or_stands_there_with_the_reason():
    placed = pages_leaderboard.in_order(STUDY)
    scores = {name: record["bpb"] for name, record in RECORDS.items()}
    for arm in placed:
        facts = STUDY.facts[arm]["published"]
        figures = [facts[key] for key in ("seeds", "bpb", "total_bytes", "steps", "ms")]
        assert len({len(figure) for figure in figures}) == 1
        best = STUDY.facts[arm].get("note") == "the score is its best seed"
        score = min(facts["bpb"]) if best else statistics.mean(facts["bpb"])
        assert facts["score"] == pytest.approx(score, abs=3e-4), arm
        assert facts["score"] == scores.get(arm, facts["score"])
        trained = [s * ms / 1e3 for s, ms in zip(facts["steps"], facts["ms"], strict=True)]
        assert min(trained) > 585 and max(trained) < 602  # GPTQ keeps up to 14 s back
        assert min(facts["total_bytes"]) > 15.3e6 and max(facts["total_bytes"]) < 16e6
    assert RECORDS.keys() | NO_ARM.keys() <= {*placed, *STUDY.missing}
    of_records = {record["folder"] for record in RECORDS.values() if "folder" in record}
    assert COMMANDS.keys() <= {*FOLDERS.values(), *NO_ARM.values(), *of_records}
    assert not set(placed) & STUDY.missing.keys()
    assert STUDY.missing["pr1285"][1] == "layers 4 and 5 once more from step 3,000 on"


@pytest.mark.parametrize(
    "arm, stem, row",
    [
        ("seed145", "pr145_int8_qat", "qat_linears"),
        ("seed199", "pr199_swa_doc_isolated", "swa_full_lr"),
        ("seed194", "pr194_11l_record", "with_swa"),
        ("seed989", "pr989_qat_x_swa", "qat-1_average-none"),
        ("seed975", "pr975_qna_sqwa", "run3"),
    ],
)
def test_the_seeds_are_the_published_rows_of_their_studies(arm, stem, row):
    study = read_study(ROOT / "studies" / f"{stem}.toml")
    facts = STUDY.facts[arm]["published"]
    assert set(facts["bpb"]) <= set(study.facts[row]["published"]["val_bpb"])
    own = Config.from_env(study.commands[row][0])
    differing = own.differing(Config.from_env(STUDY.arms[arm]).knobs(*COMPARED))
    assert set(differing) <= {"val_loss_every", "train_log_every"}


def test_a_study_refuses_a_base_twice_and_a_missing_row_without_a_reason():
    arms = {"a": {"base": "pr989"}, "b": {"base": "pr989", "BASE": "pr975"}}
    for data, problem in (
        ({"arm": arms}, "base and BASE say the same thing"),
        ({"missing": {"x": {"score": 1.1}}}, "needs score, and why or base"),
        ({"missing": {"x": {"score": 1.1, "base": "upstream"}}}, "needs score, and why or base"),
        ({"size": {"s": {"seconds": 1, "scale": "half"}}}, "no such rule"),
        ({"size": {"s": {"steps": 1, "seconds": 1, "scale": "two cores"}}}, "no steps"),
        ({"size": {"s": {"seconds": 1}}}, "needs seconds and steps"),
        ({"size": {"s": {"seconds": 1, "scale": "two cores", "equal": "time"}}}, "use equal steps"),
    ):
        with pytest.raises(Refusal, match=problem):
            study_of(data, ROOT / "x.toml")


# ── In small ──────────────────────────────────────────────────────────────────────────────────────
def test_small_arms_keep_every_toggle_and_are_small():
    assert SMALL.keys() == FULL.keys()
    for arm, small in SMALL.items():
        full = FULL[arm]
        for f in KNOBS:
            theirs, ours = getattr(full, f.name), getattr(small, f.name)
            if f.metadata["scope"] not in COMPARED or f.name == "max_wallclock_seconds":
                continue
            if f.type == "bool" or f.metadata["choices"]:
                assert ours == theirs, (arm, f.name)
            elif f.type in ("int", "float") and f.name not in ("train_log_every", "val_loss_every"):
                assert (ours > 0) == (theirs > 0) and ours <= theirs, (arm, f.name)
        assert 200_000 < parameters(small) < 1_000_000
        assert small.train_batch_tokens % small.train_seq_len == 0
        assert small.iterations == -(
            -round(statistics.mean(STUDY.facts[arm]["published"]["steps"])) // 32
        )


def test_every_count_scales_by_one_rule_or_stays_for_a_reason():
    counts = {
        f.name
        for f in KNOBS
        if f.type == "int" and f.metadata["scope"] in COMPARED and not f.metadata["choices"]
    }
    known = scale.DIVISORS.keys() | scale.UNSCALED.keys() | {"compress_level"}
    assert counts <= known and not scale.DIVISORS.keys() & scale.UNSCALED.keys()
    for full, small in ((FULL[arm], SMALL[arm]) for arm in SMALL):
        assert small.ttt_chunk_size == min(full.ttt_chunk_size, small.window)
        by_size = {"train_log_every", "val_loss_every", "ttt_chunk_size"}
        for name in scale.UNSCALED.keys() - by_size:
            assert getattr(small, name) == getattr(full, name)
        for name in ("model_dim", "num_heads", "vocab_size", "bigram_vocab_size", "warmdown_iters"):
            divisor = scale.DIVISORS[name]
            assert getattr(small, name) == -(-getattr(full, name) // divisor)


def test_small_arms_read_the_shards_of_their_vocabulary():
    assert SMALL["baseline"].data_path == "data/leaderboard/sp512"
    assert SMALL["pr1394"].data_path == "data/leaderboard/sp4096"
    assert SMALL["pr1855"].data_path == "data/leaderboard/sp4096_caseops"
    assert SMALL["pr1855"].tokenizer_path == "data/leaderboard/sp4096_caseops/tokenizer.model"
    assert SMALL["pr2014"].train_seq_schedule == "128@0.1,256@0.7,384@1"
    # 786,432 / 768 tokens, 512 / 8 dimensions, 2,048 / 8 tokens, (4,932 + 4,917 + 4,945) / 3 / 32
    record = SMALL["pr1855"]
    shape = record.train_batch_tokens, record.model_dim, record.train_seq_len, record.iterations
    assert shape == (1024, 64, 256, 155)
    assert record.ema_decay == pytest.approx(1 - 32 * 0.0035)
    assert (record.phased_ttt_prefix_docs, record.num_heads, record.ttt_lora_rank) == (4, 4, 10)
    # one document of a phase is more, so that it acts
    assert record.global_ttt_chunk_tokens == 512
    assert SMALL["baseline"].train_batch_tokens == 768 == 6 * SMALL["baseline"].train_seq_len
    unmeasured = dataclasses.replace(STUDY, facts={})
    with pytest.raises(Refusal, match="no published steps"):
        arm_settings(unmeasured, STUDY.sizes["small"], "pr1855", "steps")


def test_the_first_phase_of_each_small_arm_comes_with_a_dozen_documents():
    """Behind the last batch there is nothing to gain: with 5 documents #2135's one never came."""
    phased = {arm: cfg for arm, cfg in SMALL.items() if cfg.phased_ttt_enabled}
    assert len(phased) == 11
    for arm, cfg in phased.items():
        assert train_gpt.phase_boundaries(cfg, 12)[0] <= 12 - cfg.ttt_batch_size, arm


def test_the_full_size_is_equal_time_on_8_gpus_and_the_small_one_equal_steps():
    full, small = (matrix(STUDY, size, "", (1,)) for size in ("full", "small"))
    assert (full.equal, full.budget()) == ("time", "600 s of training")
    assert (full.size.gpu, full.size.ranks, full.size.scale) == ("H100", 8, "")
    assert (small.equal, small.budget()) == ("steps", "143 to 451 steps")
    with pytest.raises(Refusal, match="--equal time: size small: the steps of each arm"):
        matrix(STUDY, "small", "time", (1,))


def test_a_sweep_in_small_varies_the_reference_arm_in_small():
    size = STUDY.sizes["small"]
    tables = ablate.sweep_tables(STUDY, size, "", {"MATRIX_LR": "0.01,0.02"})
    made = study_of(parse_toml(ablate.toml(tables)), ROOT / "x.toml")
    assert (made.sizes["small"].scale, made.sizes["small"].steps) == ("", 431)
    for trial, rate in zip(matrix(made, "small", "steps", (1,)).trials, (0.01, 0.02), strict=True):
        assert trial.cfg.differing(SMALL["baseline"].knobs(*COMPARED)) == ["matrix_lr"]
        assert trial.cfg.matrix_lr == rate and trial.cfg.iterations == 431


# ── The command of an arm ─────────────────────────────────────────────────────────────────────────
def test_env_prints_two_commands_that_are_the_same_run():
    said = CliRunner().invoke(
        ablate.app, ["env", str(STUDY.path), "pr1855", "--seed", "7"], catch_exceptions=False
    )
    commands = [line for line in said.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) == 2
    runs = []
    for line in commands:
        settings, launch = line.split(" torchrun ")
        assert launch == "--standalone --nproc_per_node=8 train_gpt.py"
        words = re.findall(r"(\w+)=('[^']*'|\S*)", settings)
        runs.append(Config.from_env({name: text.strip("'") for name, text in words}))
    spelt_out, by_base = runs
    assert spelt_out.base == "" and by_base.base == "pr1855"
    assert spelt_out.digest() == by_base.digest() == FULL["pr1855"].digest()
    assert spelt_out.seed == by_base.seed == 7
    assert spelt_out.data_path == by_base.data_path and "caseops" in spelt_out.data_path


@pytest.mark.parametrize("arm, why", [("pr1769", "no arm: its logs"), ("nobody", "no such arm")])
def test_env_says_why_there_is_no_such_arm(arm, why):
    with pytest.raises(Refusal, match=why):
        CliRunner().invoke(ablate.app, ["env", str(STUDY.path), arm], catch_exceptions=False)


def test_a_submission_folder_holds_the_settings_of_a_record_spelt_out(monkeypatch):
    monkeypatch.setattr(submission, "ships_tokenizer", lambda result: False)
    cfg = FULL["pr1855"]
    text = submission.run_command({7: {"non_default": cfg.non_default(), "world_size": 8}})
    (line,) = [line for line in text.splitlines() if "RUN_ID=" in line]
    settings = dict(re.findall(r"([A-Z0-9_]+)=(\S+)", line)) | {"SEED": "7", "RUN_ID": "x"}
    assert "BASE" not in settings and "record" not in text
    assert Config.from_env(settings).digest() == cfg.digest()


# ── A published command without BASE ──────────────────────────────────────────────────────────────
# Folder -> the base that its command is like, of those with 5 settings or more that are not ours
NEAREST = {
    "2026-03-19_MLP3x_QAT_Int6_SlidingWindow": "pr86",
    "2026-03-20_11L_EfficientPartialXSA_FA3_SWA120": "pr265",
    "2026-03-20_11L_XSA4_EMA_Int6_MLP3x_WD04_1.1271": "pr287",
    "2026-03-21_11L_XSA4_EMA_PartialRoPE_LateQAT_1.1248": "pr315",
    "2026-03-23_LeakyReLU_LegalTTT_ParallelMuon": "pr549",
    "2026-03-29_Loader_FullGPTQ_XSA11_BigramHash2816": "pr1060",
    "2026-04-09_A2_Muon097_3Seed": "pr1514",
    "2026-04-14_MultiPhaseGlobalSGD_PhasedTTT": "pr1626",
    "2026-04-19_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT": "pr1736",
    "2026-04-22_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT_MLPClip12": "pr1736",
    "2026-04-23_SP8192_CaseOps_SparseGate_QuantGate_Loop45_PhasedTTT_PolarNS_MinLR_FusedCE": (
        "pr1787"
    ),
    "2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611": "pr1855",
    "2026-04-29_SmearGateBOSFix_3Seed_1.06141": "pr1851",
}


def nearest(variables: dict[str, str]) -> str:
    """The base that the log or the refusal of a launch names; empty: none."""
    try:
        cfg = Config.from_env(variables)
    except Refusal as refusal:
        lines = refusal.problems
    else:
        lines = train_gpt.likeness_line(train_gpt.nearest_base(vars(cfg), cfg.given), cfg)
    named = [re.match(r"nearest base: (\w+) has", line) for line in lines]
    return "".join(match[1] for match in named if match)


def test_a_published_command_without_base_names_the_base_that_it_is_like():
    found = {folder: nearest(variables) for folder, variables in COMMANDS.items()}
    assert {folder: base for folder, base in found.items() if base} == NEAREST


def test_settings_of_ones_own_are_told_of_no_base():
    demo = "NUM_LAYERS=2 MODEL_DIM=160 NUM_HEADS=4 TRAIN_SEQ_LEN=256 EMA_ENABLED=1 LOADER=shuffled"
    lrs = "MATRIX_LR=0.031 SCALAR_LR=0.017 TIED_EMBED_LR=0.05 MLP_MULT=4 XSA_LAST_N=3 LN_SCALE=1"
    for words in (demo, lrs, "", "NUM_LAYERS=9 SEED=3"):
        assert nearest(dict(word.split("=") for word in words.split())) == ""


def test_the_log_says_which_base_and_what_differs(tiny, run):
    run.rank = 1
    lines = []
    run.log = lines.append
    variables = COMMANDS["2026-04-14_MultiPhaseGlobalSGD_PhasedTTT"]
    places = {name.upper(): str(value) for name, value in tiny().knobs("run").items() if value}
    log_start(Config.from_env(variables | places), run)
    (line,) = [line for line in lines if line.startswith("nearest base")]
    assert line.startswith("nearest base: pr1626 has 10 of the 10 settings given; it differs")
    assert "NUM_LOOPS=2" in line and "VOCAB_SIZE=8192" in line and "EMBED_BITS" not in line
    lines.clear()
    # with its base nothing is left to say
    log_start(Config.from_env({"BASE": "pr1626"} | variables | places), run)
    assert not [line for line in lines if line.startswith("nearest base")]


# ── The page ──────────────────────────────────────────────────────────────────────────────────────
def test_ranks_agree_with_figures_made_by_hand():
    # rho = 1 - 6 (0 + 1 + 1 + 0 + 0) / (5 * 24); z +- 1.96 sqrt((1 + .81 / 2) / 2)
    found = rank_correlation([1, 2, 3, 4, 5], [10, 30, 20, 40, 50])
    assert found.n == 5 and found.rho == pytest.approx(0.9)
    assert (found.low, found.high) == pytest.approx((-0.168896, 0.996069), abs=1e-5)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1])[1:] == (-1, -1, -1)
    for short in ([1, 2, 3], [1, 1, 1, 1]):
        with pytest.raises(Refusal, match="ranks need 4 or more"):
            rank_correlation(short, short)


def test_the_page_sets_made_up_scores_beside_the_published_ones():
    arms = ["baseline", "pr50", "pr1218", "pr1394", "pr1855"]
    # one step is seen, one is turned round, one cannot be told, one is seen
    levels = [2.5, 2.4, 2.45, 2.449, 2.2]
    noise = {1: 0.0, 2: 0.001, 3: -0.001}
    wobble = [1.0, 1.5, 1.0, 5.0, 1.0]
    runs = {}
    for arm, level, share in zip(arms, levels, wobble, strict=True):
        runs[arm] = {s: {"val_bpb": level + share * noise[s]} for s in noise}
    made = matrix(STUDY, "small", "steps", (1,))
    text = pages_leaderboard.steps_seen(Finished(made, runs, {}))
    assert "of all 5 arms: 0.70, 95 % interval -0.59 to 0.98" in text and "Of those" not in text
    assert "Of 4 steps 2 are seen, 1 go the other way, 1 cannot be told from nothing." in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip() for row in rows] == [f"`{arm}`" for arm in arms]
    verdicts = [row[5].strip() for row in rows]
    assert verdicts == ["", "seen", "the other way", "not distinguishable", "seen"]
    assert rows[1][3].strip() == "-31.9" and rows[1][4].strip().startswith("-100.0 (")


def test_ranks_within_a_vocabulary_are_of_its_arms_alone():
    made = matrix(STUDY, "small", "steps", (1,))
    arms = ["baseline", "pr42", "pr50", "pr65", "pr1218", "pr1394", "pr1413"]
    theirs = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    ours = [1.0, 2.0, 3.0, 4.0, 0.3, 0.2, 0.1]
    (line,) = pages_leaderboard.within_vocabularies(made, arms, theirs, ours)
    assert line == "Of those with 512 tokens here, 4 arms: -1.00, 95 % interval -1.00 to -1.00."


def test_the_table_has_every_row_of_the_leaderboard():
    text = pages_leaderboard.leaderboard_table(STUDY)
    for name in (*STUDY.arms, *STUDY.missing):
        assert f"`{name}`" in text
    assert "| `pr1855` | 1.0611 | 1.06108 | 3 | 15,901,919 | 4,931 | 121.6 | `pr1787` |" in text

"""Studies as data, and the runner: every setting is checked first, environments are clean,
trainings are shared, and nothing is run twice.

Failures that these tests would have caught: stale variables that silently poison a run (#1048,
#212), a run that overwrites another (#1048), a third seed with another configuration (#2124),
5 % and 10 % pruning averaged as one (#989), two trainings where one checkpoint scored twice was
meant (#199), hand-copied figures (#2076).
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich.console
from conftest import ROOT, TINY, until
from launch import Forked

import ablate
import train_gpt
from ablation.ledger import Ledger, this_host
from ablation.report import factorial_table, load_matrix, markdown_report
from ablation.runner import (
    RUNNING,
    START_SECONDS,
    Runner,
    clean_environment,
    gpu_gate,
    shell,
    told_reason,
    watch,
)
from ablation.statistics import paired, summary
from ablation.study import Matrix, matrix, read_study
from planning.forecast import Options, plan
from train_gpt import BASES, Refusal

BASE = {k.upper(): v for k, v in TINY.items() if k not in ("iterations", "max_wallclock_seconds")}
BASE["SMEAR_GATE"] = 0
STUDIES = sorted(set((ROOT / "studies").glob("*.toml")) - {ROOT / BASES})


def toml(tables: dict[str, dict]) -> str:
    """TOML of {"": top level, "name": table}."""
    lines = []
    for name, table in tables.items():
        if name:
            lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def tables(data: Path, **changes) -> dict[str, dict]:
    """A study of tiny runs: two arms that train, and two that share a training with the first."""
    found = {
        "": {"title": "tiny", "seeds": [1, 2], "compare": [["plain", "qat"]]},
        "env": dict(BASE),
        "size.small": {"steps": 4, "seconds": 2.0, "jobs": 2},
        "size.small.env": {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")},
        "arm.plain": {"QAT_ENABLED": 0},
        "arm.five_bits": {"QUANT_BITS": 5},
        "arm.stride_8": {"EVAL_STRIDE": 8},
        "arm.qat": {"QAT_ENABLED": 1, "expect": "lower"},
    }
    for name, table in changes.items():
        key = name.replace("__", ".")
        found[key] = {**found.get(key, {}), **table}
    return found


@pytest.fixture
def study(data, tmp_path):
    """study(**changes) -> a read study; a table is named with __ for its dots."""

    def make(name="tiny", without=(), **changes):
        path = tmp_path / f"{name}.toml"
        path.write_text(
            toml({k: v for k, v in tables(data, **changes).items() if k not in without})
        )
        return read_study(path)

    return make


def start_trial(argv: list[str], **options):
    """In place of Popen: forked where one process is enough, for it starts in milliseconds."""
    alone = Path(argv[1]).name == "train_gpt.py"
    return Forked(argv, **options) if alone else subprocess.Popen(argv, **options)


@pytest.fixture(scope="module", autouse=True)
def forked_trials():
    """What these tests start; `ablate.py run` as a program starts its trials itself."""
    with pytest.MonkeyPatch.context() as patch:
        quick = SimpleNamespace(**vars(subprocess) | {"Popen": start_trial})
        patch.setattr("ablation.runner.subprocess", quick)
        yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A tiny study that has run: (study, matrix, lines that the runner printed)."""
    folder = tmp_path_factory.mktemp("study")
    lines = []
    (folder / "tiny.toml").write_text(toml(tables(data)))
    m = matrix(read_study(folder / "tiny.toml"), "small", "steps", out=folder / "runs")
    poison = {"QAT_ENABLED": "1", "NUM_LAYERS": "7", "MODEL_DIM": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in poison}
    os.environ.update(poison)  # must not reach the runs
    try:
        Runner(m).run(lines.append)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return m.study, m, lines


def copy_of(m: Matrix, folder: Path) -> Matrix:
    """The same matrix with a copy of its run folders."""
    shutil.copytree(m.folder, folder)
    return matrix(m.study, "small", "steps", out=folder)


def made_settings(makefile: str, size: str) -> dict[str, str]:
    """What SIZE_size of the Makefile sets."""
    lines = makefile.replace("\\\n", "").splitlines()
    values = dict(line.split(" := ", 1) for line in lines if " := " in line)
    words = values[f"SIZE_{size}"].replace("$(SMALL)", values["SMALL"]).split()
    return dict(word.split("?=") for word in words)


# ── Studies ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_committed_study_makes_a_matrix_at_every_size_and_budget(path):
    made = read_study(path)
    for size in made.sizes:
        for equal in ("steps",) if made.sizes[size].scale else ("steps", "time"):
            m = matrix(made, size, equal)
            arms = (m.size.time_arms if equal == "time" else ()) or m.size.arms or tuple(made.arms)
            assert [t.arm for t in m.trials] == list(arms) * len(m.size.seeds or made.seeds)
            assert sorted(t.id for group in m.groups() for t in group) == sorted(
                t.id for t in m.trials
            )
    small_alone = path.stem in ("swa_sums_in_bf16", "frontier_training", "frontier_export")
    assert {"full", "small"} <= set(made.sizes) or small_alone


def test_the_top_of_the_ladder_is_the_demo():
    """And its first arm is `make train SIZE=reference`."""
    m = matrix(read_study(ROOT / "studies/frontier_training.toml"), "small", "time", (1,))
    arms = {trial.arm: trial.cfg for trial in m.trials}
    makefile = (ROOT / "Makefile").read_text()
    for size, arm in ("reference", "before"), ("demo", "top"):
        settings = m.size.env | made_settings(makefile, size)
        demo = train_gpt.Config.from_env(settings | {"MAX_WALLCLOCK_SECONDS": "90", "SEED": "1"})
        assert arms[arm].differing(demo.knobs(*train_gpt.COMPARED)) == [], size


def test_a_step_of_the_ladder_is_one_setting_and_what_is_left_out_is_one():
    m = matrix(read_study(ROOT / "studies/frontier_training.toml"), "small", "steps", (1,))
    arms = {trial.arm: trial.cfg.knobs(*train_gpt.COMPARED) for trial in m.trials}
    ladder = list(arms)[: list(arms).index("top") + 1]
    left_out = [("top", arm) for arm in arms if arm.startswith("no_")]
    changed = {
        (one, other): [name for name in arms[one] if arms[one][name] != arms[other][name]]
        for one, other in [*itertools.pairwise(ladder), *left_out]
    }
    assert all(len(names) == 1 for names in changed.values()), changed
    assert len(ladder) == 9 and len(left_out) == 8


def test_the_five_pull_requests_have_a_study_with_every_published_row():
    published = {
        989: [1.14475420, 1.14335055, 1.13968856, 1.14429409],
        199: [1.19293811, 1.19329502, 1.20152136],
        975: [1.12156083, 1.12219171, 1.12579977],
        194: [1.14534973, 1.14896214],
        145: [1.20515425, 1.19250007],
    }
    for number, figures in published.items():
        (path,) = [path for path in STUDIES if path.stem.startswith(f"pr{number}_")]
        told = [
            v
            for facts in read_study(path).facts.values()
            for v in facts.get("published", {}).get("val_bpb", [])
        ]
        assert set(figures) <= set(told), number


def test_full_sizes_build_the_models_that_were_published():
    parameters = {
        "pr989": 25_517_137,
        "pr199": 17_059_912,
        "pr975": 26_993_756,
        "pr194": 26_502_232,
        "pr145": 17_059_912,
    }
    for path in STUDIES:
        if path.stem[:5] in parameters:
            made = read_study(path)
            cfg = matrix(made, "full", "time").trials[0].cfg
            with train_gpt.torch.device("meta"):
                assert (
                    sum(p.numel() for p in train_gpt.GPT(cfg).parameters())
                    == parameters[path.stem[:5]]
                )


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(arm__qat={"QAT_ENABLE": 1}), ["arm.qat", "QAT_ENABLE=1", "QAT_ENABLED"]),
        (dict(env={"WARMDOWN_STEP": 1}), ["env", "WARMDOWN_STEP", "WARMDOWN_STEPS"]),
        (dict(env={"SEED": 3}), ["SEED=3", "set by ablate.py"]),
        (dict(env={"CHECKPOINT": "x"}), ["CHECKPOINT=x", "set by ablate.py"]),
        (dict(arm__qat={"NUM_LAYERS": "many"}), ["arm qat", "NUM_LAYERS=many"]),
        (dict(arm__qat={"NUM_LAYERS": 0}), ["arm qat", "NUM_LAYERS=0"]),
        (dict(arm__qat={"NUM_LAYERS": [1]}), ["arm.qat", "NUM_LAYERS=[1]", "a number"]),
        (dict(arm__qat={"expct": "x"}), ["arm.qat", "expct", "no such key"]),
        (dict(arm__qat={"expect": 3}), ["expect = 3", "wrong type"]),
        ({"": {"seed": [1]}}, ["seed", "no such key"]),
        ({"": {"seeds": 1}}, ["seeds = 1", "wrong type"]),
        ({"": {"seeds": [1, 1]}}, ["seed", "twice"]),
        ({"": {"reference": "x"}}, ["no such arm: x"]),
        ({"": {"compare": [["plain", "y:val_bpb"]]}}, ["no such arm: y"]),
        ({"": {"compare": [["plain"]]}}, ["pairs of arms"]),
        (dict(size__small={"step": 3}), ["size.small", "step", "no such key"]),
        (dict(size__big={"steps": 3}), ["size.big", "seconds"]),
        (dict(size__small={"steps": "3"}), ["steps = '3'", "wrong type"]),
        (dict(size__small={"jobs": 0}), ["size.small", "jobs = 0"]),
        (dict(size__small={"equal": "luck"}), ["size.small", "equal = luck"]),
        (dict(size__small={"seconds": 0}), ["seconds = 0"]),
        (dict(size__small={"arms": ["qat", "qat"]}), ["twice"]),
        (dict(size__small={"seeds": [-1]}), ["seeds"]),
        ({"": {"seeds": ["1"]}}, ["seeds", "whole numbers"]),
        ({"": {"seeds": []}}, ["no seed"]),
        ({"": {"metrics": [3]}}, ["metrics"]),
        # one run, twice; two runs in one folder where a disk takes A and a for the same
        (dict(arm__twin={"QAT_ENABLED": 0}), ["plain and twin", "same settings"]),
        (dict(arm__twin={"QUANT_BITS": "5"}), ["five_bits and twin", "same settings"]),
        (dict(arm__Plain={"QAT_ENABLED": 1}), ["plain and Plain", "case alone"]),
        (dict(size__Small={"steps": 3, "seconds": 1}), ["small and Small", "case alone"]),
        # published commands and other scripts' defaults
        (dict(arm__qat={"command": "QAT=1 SWA=maybe"}), ["arm.qat", "command", "SWA=maybe"]),
        (dict(arm__qat={"command": ["QAT=1", "NOT_ONE"]}), ["arm.qat", "command", "NOT_ONE"]),
        (dict(arm__qat={"command": "QAT='1"}), ["arm.qat", "command", "quot"]),
        (dict(arm__qat={"command": "BASE=nobody"}), ["arm.qat", "command", "BASE=nobody"]),
        (dict(env={"BASE": "nobody"}), ["BASE=nobody", "choose from"]),
        (dict(corrections={"NOT_ONE": "why"}), ["corrections", "NOT_ONE"]),
        (dict(corrections={"SEED": "why"}), ["corrections", "SEED"]),
        (dict(corrections={"MATRIX_LR": 3}), ["corrections", "MATRIX_LR", "wrong type"]),
        (dict(base__x={"SEED": 3}), ["base: no such key"]),
        (dict(factorial={"qat": 1}), ["qat = 1", "two or more"]),
        (dict(factorial={"qat": [1, 1]}), ["two or more different"]),
        (dict(factorial={"qatt": [0, 1]}), ["QATT", "no such setting"]),
    ],
)
def test_a_wrong_study_is_refused_by_name_before_anything_starts(study, tmp_path, changes, words):
    with pytest.raises(Refusal) as refusal:
        matrix(study(**changes), "small", "steps", out=tmp_path / "runs")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert refusal.value.code == 2
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_a_study_is_read_whether_or_not_it_begins_with_a_byte_order_mark(data, tmp_path):
    text = toml(tables(data))
    (tmp_path / "plain.toml").write_text(text, encoding="utf-8")
    (tmp_path / "marked.toml").write_text("\ufeff" + text, encoding="utf-8")
    plain, marked = (read_study(tmp_path / f"{name}.toml") for name in ("plain", "marked"))
    assert dataclasses.replace(marked, path=plain.path) == plain


def test_an_arm_of_a_base_is_that_script_but_for_what_the_study_gives(study):
    made = study(env={"BASE": "pr989"}, arm__qat={"NUM_LAYERS": 1})
    trials = {t.arm: t for t in matrix(made, "small", "steps", (1,)).trials}
    assert trials["qat"].cfg.prune_pct == 0.1 and trials["qat"].cfg.num_layers == 1
    # a checkpoint's settings win over those of a base, so that what differs is given
    assert trials["stride_8"].env["BASE"] == "pr989" and trials["stride_8"].donor == "plain-s1"


@pytest.mark.parametrize(
    "text",
    [
        "a = ",
        "[arm",
        "\x00",
        "seeds = [1",
        "a.b.c.d = 1\na.b = 2",
        "[[arm]]\nx = 1",
        "arm = 3",
        "size = {small = 3}",
    ],
)
def test_broken_toml_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "broken.toml").write_text(text)
    with pytest.raises(Refusal, match=r"broken\.toml"):
        read_study(tmp_path / "broken.toml")


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", ".hidden"])
def test_names_of_arms_never_leave_the_folder(study, name):
    with pytest.raises(Refusal, match="letters, digits"):
        study(**{f'arm."{name}"'.replace("arm.", "arm__"): {"QAT_ENABLED": 0}})


def test_missing_study_and_unknown_size_are_refused(study, tmp_path):
    with pytest.raises(Refusal, match=r"nowhere\.toml"):
        read_study(tmp_path / "nowhere.toml")
    with pytest.raises(Refusal, match="no size big; choose from small"):
        matrix(study(), "big", "steps")


def test_a_factorial_makes_every_combination(study):
    made = study(
        without=("arm.plain", "arm.five_bits", "arm.stride_8", "arm.qat"),
        **{"": {"compare": []}},
        factorial={"qat": [0, 1], "SWA": [0, 1]},
    )
    assert list(made.arms) == ["qat-0_swa-0", "qat-0_swa-1", "qat-1_swa-0", "qat-1_swa-1"]
    assert [
        (t.cfg.qat_enabled, t.cfg.swa_enabled) for t in matrix(made, "small", "steps", (1,)).trials
    ] == [(False, False), (False, True), (True, False), (True, True)]


# ── Trials ────────────────────────────────────────────────────────────────────────────────────────
def test_arms_that_differ_only_in_export_or_scoring_share_one_training(study):
    donors = {t.id: t.donor for t in matrix(study(), "small", "steps").trials}
    assert donors == {
        "plain-s1": None,
        "five_bits-s1": "plain-s1",
        "stride_8-s1": "plain-s1",
        "qat-s1": None,
        "plain-s2": None,
        "five_bits-s2": "plain-s2",
        "stride_8-s2": "plain-s2",
        "qat-s2": None,
    }


def test_under_qat_the_grid_is_part_of_the_training(study):
    made = study(
        env={"QAT_ENABLED": 1},
        without=("arm.plain", "arm.qat"),
        arm__other_stride={"EVAL_STRIDE": 32},
        **{"": {"compare": []}},
    )
    assert {t.arm: t.donor for t in matrix(made, "small", "steps", (1,)).trials} == {
        "five_bits": None,
        "stride_8": None,
        "other_stride": "stride_8-s1",
    }


def test_trials_are_interleaved_by_seed(study):
    assert [(t.seed, t.arm) for t in matrix(study(), "small", "steps").trials] == [
        (seed, arm) for seed in (1, 2) for arm in ("plain", "five_bits", "stride_8", "qat")
    ]


def test_equal_steps_and_equal_time_are_one_word_apart(study):
    steps, seconds = (matrix(study(), "small", equal).trials[0].cfg for equal in ("steps", "time"))
    assert (steps.iterations, steps.max_wallclock_seconds) == (4, 0.0)
    assert (seconds.iterations, seconds.max_wallclock_seconds) == (20000, 2.0)


def test_equal_time_may_leave_out_arms_whose_steps_cost_alike(study):
    made = study(size__small={"time_arms": ["plain", "qat"]})
    assert [t.arm for t in matrix(made, "small", "time", (1,)).trials] == ["plain", "qat"]
    assert len(matrix(made, "small", "steps", (1,)).trials) == 4


def test_a_shared_training_never_lends_its_own_export_settings(study, tmp_path):
    m = matrix(
        study(arm__plain={"PRUNE_PCT": 0.1, "QAT_ENABLED": 0}), "small", "steps", (1,), tmp_path
    )
    follower = next(t for t in m.trials if t.arm == "five_bits")
    assert follower.cfg.prune_pct == 0
    assert follower.env["PRUNE_PCT"] == "0.0"


def test_the_environment_of_a_run_is_clean(study, monkeypatch, tmp_path):
    monkeypatch.setenv("MLP_MULT", "2")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    m = matrix(study(), "small", "steps", (1,), tmp_path)
    env = clean_environment(m.trials[0], m.size)
    assert env["PATH"] == os.environ["PATH"]
    assert env["NUM_LAYERS"] == "3"
    assert "MLP_MULT" not in env
    assert "NCCL_IB_DISABLE" not in env


# ── Runner ────────────────────────────────────────────────────────────────────────────────────────
def test_every_trial_has_its_own_folder_with_its_settings_and_nothing_of_our_environment(finished):
    _, m, lines = finished
    results = {t.id: json.loads((t.folder / "result.json").read_text()) for t in m.trials}
    assert len(lines) == 8
    assert "[8/8]" in lines[-1]
    assert "val bpb" in lines[-1]
    for t in m.trials:
        assert results[t.id]["config_sha256"] == t.cfg.digest()
        assert results[t.id]["seed"] == t.seed
        assert results[t.id]["exit_code"] == 0
        assert results[t.id]["config"]["num_layers"] == 3
    assert results["plain-s1"]["config"]["qat_enabled"] is False  # our own environment said 1


def test_arms_of_one_training_have_the_same_float_weights_and_their_own_export(finished):
    found = load_matrix(finished[1])
    for seed in (1, 2):
        plain, five, stride, qat = (
            found.runs[arm][seed] for arm in ("plain", "five_bits", "stride_8", "qat")
        )
        assert (
            plain["live_val_bpb"]
            == five["live_val_bpb"]
            == stride["live_val_bpb"]
            != qat["live_val_bpb"]
        )
        assert (
            plain["quantised_val_bpb"] == stride["quantised_val_bpb"] != five["quantised_val_bpb"]
        )
        assert plain["val_bpb"] != stride["val_bpb"]
        assert plain["checkpoint"] is None
        assert five["checkpoint"]


def test_checkpoints_are_removed_once_all_that_need_them_have_ended(finished):
    assert not list(finished[1].folder.rglob("checkpoint.bin"))


def test_finished_trials_are_never_run_again(finished):
    m = finished[1]
    before = {p: p.stat().st_mtime_ns for p in m.folder.rglob("*.json*")}
    runner = Runner(m)
    assert runner.todo == []
    assert len(runner.results) == 8
    runner.run(pytest.fail)
    assert {p: p.stat().st_mtime_ns for p in m.folder.rglob("*.json*")} == before


def edit(m: Matrix, trial: str, **changes) -> None:
    """Changes keys of a trial's result.json."""
    path = m.folder / trial / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "key, value",
    [("code_sha256", "0" * 64), ("seed", 5), ("config_sha256", "0" * 64), ("world_size", 2)],
)
def test_a_finished_trial_of_other_code_settings_or_ranks_is_refused(
    finished, tmp_path, key, value
):
    m = copy_of(finished[1], tmp_path / "runs")
    edit(m, "plain-s1", **{key: value})
    with pytest.raises(Refusal, match=f"plain-s1: finished with {key} {value}"):
        Runner(m)


def test_a_finished_trial_of_other_data_is_refused(finished, study, tmp_path):
    m = copy_of(finished[1], tmp_path / "runs")
    moved = matrix(
        study(size__small__env={"DATA_PATH": "elsewhere"}), "small", "steps", out=m.folder
    )
    with pytest.raises(Refusal, match=r"finished with data_path .* now elsewhere"):
        Runner(moved)


def test_a_changed_setting_that_can_do_nothing_keeps_no_report_from_being_made(
    finished, study, tmp_path
):
    m = copy_of(finished[1], tmp_path / "runs")
    idle = matrix(study(env={"BIGRAM_DIM": 5, "QNA_MAGNITUDE": 2}), "small", "steps", out=m.folder)
    assert load_matrix(idle).all()
    acting = matrix(study(env={"BIGRAM_VOCAB_SIZE": 5}), "small", "steps", out=m.folder)
    with pytest.raises(Refusal, match="BIGRAM_VOCAB_SIZE=5 in the study, 0 in the log"):
        load_matrix(acting)


def test_a_changed_setting_is_named(finished, study, tmp_path):
    m = copy_of(finished[1], tmp_path / "runs")
    changed = matrix(study(env={"MATRIX_LR": 0.5}), "small", "steps", out=m.folder)
    with pytest.raises(Refusal, match=r"finished with matrix_lr 0.02, now 0.5"):
        Runner(changed)
    with pytest.raises(Refusal, match=r"MATRIX_LR=0.5 in the study, 0.02 in the log"):
        load_matrix(changed)


def test_a_trial_that_a_crash_cut_off_is_set_aside_and_run_again(finished, tmp_path):
    m = copy_of(finished[1], tmp_path / "runs")
    (m.folder / "qat-s2" / "result.json").unlink()
    lines = []
    Runner(m).run(lines.append)
    assert len(lines) == 1
    assert (m.folder / "qat-s2" / "result.json").exists()
    assert (m.folder / "qat-s2.cut1").is_dir()


def test_a_failed_trial_stays_failed_until_retry_and_the_rest_goes_on(study, data, tmp_path):
    m = matrix(
        study(arm__qat={"MATRIX_LR": 1e30}, without=("arm.stride_8",)),
        "small",
        "steps",
        (1,),
        tmp_path / "runs",
    )
    lines = []
    Runner(m).run(lines.append)
    assert Runner(m).todo == []
    assert Runner(m, retry=True).todo == [t for t in m.trials if t.arm == "qat"]
    found = load_matrix(m)
    assert list(found.failed) == ["qat-s1"]
    assert sorted(found.runs) == ["five_bits", "plain"]
    assert "not finite" in found.failed["qat-s1"]
    assert any("FAILED (exit 5)" in line for line in lines)
    text = markdown_report(found)
    assert "failed: s1" in text
    assert "not finite" in text


def test_arms_whose_training_failed_are_failed_too(study, tmp_path):
    m = matrix(
        study(
            arm__plain={"MATRIX_LR": 1e30},
            arm__five_bits={"MATRIX_LR": 1e30},
            without=("arm.stride_8", "arm.qat"),
            **{"": {"compare": []}},
        ),
        "small",
        "steps",
        (1,),
        tmp_path / "runs",
    )
    Runner(m).run(lambda line: None)
    assert load_matrix(m).failed["five_bits-s1"] == "FAILED (exit -1): its training plain-s1 failed"


def test_an_interrupted_study_goes_on_where_it_stopped(study, tmp_path):
    m = matrix(study(), "small", "steps", (1,), tmp_path / "runs")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Refusal, match="goes on where this one stopped") as refusal:
        Runner(m).run(interrupt)
    assert refusal.value.code == 130
    done = {t.id for t in m.trials} - {t.id for t in Runner(m).todo}
    assert 1 <= len(done) < 4
    assert not Ledger(m.folder).failures(m.trials)
    Runner(m).run(lambda line: None)
    assert Runner(m).todo == []
    assert not load_matrix(m).failed


@pytest.mark.parametrize("code", [3, 4])
def test_a_run_that_ended_badly_with_a_result_is_failed_whatever_the_ledger_knows(
    finished, tmp_path, code
):
    m = copy_of(finished[1], tmp_path / "runs")
    edit(m, "five_bits-s1", exit_code=code)
    assert list(load_matrix(m).failed) == ["five_bits-s1"]
    assert 1 not in load_matrix(m).runs["five_bits"]
    assert [t.id for t in Runner(m).todo] == ["five_bits-s1"]
    with pytest.raises(Refusal, match=f"exit code {code}"):
        ablate.run_set(str(m.folder / "five_bits-s*"))


def test_retry_runs_a_failed_trial_again_and_a_follower_trains_where_its_training_is_over(
    finished, tmp_path
):
    m = copy_of(finished[1], tmp_path / "runs")
    before = json.loads((m.folder / "five_bits-s1/result.json").read_text())
    edit(m, "five_bits-s1", exit_code=4)
    five = next(t for t in m.trials if t.id == "five_bits-s1")
    Ledger(m.folder).write(five, "end", exit_code=4, reason="x")
    assert Runner(m).todo == []
    assert Runner(m, retry=True).todo == [five]
    Runner(m, retry=True).run(lambda line: None)
    again = load_matrix(m).runs["five_bits"][1]
    assert again["checkpoint"] is None
    assert again["val_bpb"] == before["val_bpb"]
    assert not load_matrix(m).failed


def test_a_failure_under_other_settings_is_forgotten(study, tmp_path):
    m, other = (
        matrix(study(arm__qat={"MATRIX_LR": lr}), "small", "steps", (1,), tmp_path)
        for lr in (1.0, 2.0)
    )
    Ledger(tmp_path).write(m.trials[3], "end", exit_code=5, reason="x")
    assert list(Runner(m).failed) == ["qat-s1"]
    assert Runner(other).failed == {}


def test_a_ledger_from_a_stranger_or_a_crash_does_no_harm(study, tmp_path):
    m = matrix(study(), "small", "steps", (1,), tmp_path)
    lines = [
        "[1]",
        '{"trial": []}',
        "[" * 9999,
        '{"trial": {"a": 1}, "event": "end"}',
        "\udcff",
        '{"trial": "qat-s1", "ev',
    ]
    (tmp_path / "ledger.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    ledger = Ledger(tmp_path)
    assert ledger.failures(m.trials) == {}
    ledger.write(m.trials[0], "end", exit_code=7, reason="because")
    assert ledger.failures(m.trials) == {"plain-s1": "FAILED (exit 7): because"}


def test_several_machines_write_to_the_ledger_one_after_the_other(study, tmp_path, monkeypatch):
    """What another one wrote, or half wrote, until we had the lock stays a line of its own."""
    m = matrix(study(), "small", "steps", (1,), tmp_path)
    ledger = Ledger(tmp_path)

    def flock(file, how) -> None:
        assert how == fcntl.LOCK_EX
        ledger.path.write_text('{"trial": "plain-s1"}\n{"cut')

    locking = SimpleNamespace(**vars(fcntl) | {"flock": flock})
    monkeypatch.setattr("ablation.ledger.fcntl", locking)
    ledger.write(m.trials[0], "start")
    first, cut, ours = ledger.path.read_text().splitlines()
    assert (first, cut) == ('{"trial": "plain-s1"}', '{"cut')
    assert json.loads(ours)["event"] == "start"


def test_two_ranks_through_torchrun_from_another_folder(study, tmp_path, monkeypatch):
    made = study(
        without=("arm.stride_8", "arm.five_bits"),
        size__small={"ranks": 2, "jobs": 1},
    )
    monkeypatch.chdir(tmp_path)
    m = matrix(made, "small", "steps", (1,), Path("runs"))
    Runner(m, only=("plain-s1",)).run(lambda line: None)
    found = load_matrix(m)
    assert found.runs["plain"][1]["world_size"] == 2 and not found.failed


def test_the_exit_code_of_a_rank_is_found_in_what_torchrun_prints():
    error = "error: step 3: not finite [exit 5: the training diverged]"
    said = ["step 2", error, "Root Cause (first observed failure):", "  exitcode  : 5", "====="]
    assert told_reason(said, 1) == (5, error)
    assert told_reason(["Killed"], -9) == (-9, "Killed")
    assert told_reason([], 0) == (1, "no output")


def test_a_terminated_study_ends_its_runs_and_goes_on_later(study, tmp_path):
    made = study(env={"MUON_MOMENTUM_WARMUP_STEPS": 11}, size__small={"steps": 20000})
    folder = tmp_path / "runs"
    call = [
        sys.executable,
        str(ROOT / "ablate.py"),
        "run",
        str(made.path),
        "--out",
        str(folder),
        "--seeds",
        "1",
    ]
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        ablation = Forked(call, dict(os.environ), file, cwd=tmp_path)

    def both_have_begun() -> bool:
        assert ablation.process.exitcode is None, printed.read_text()
        return len(list(folder.glob("*/metrics.jsonl"))) == 2

    until(both_have_begun)
    ablation.terminate()
    assert ablation.wait() == 130
    assert "goes on where" in printed.read_text()
    m = matrix(made, "small", "steps", (1,), folder)
    locks = [path.open("w") for path in folder.glob(".*.lock")]
    for lock in locks:  # nobody holds them: the trainings are gone
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(Runner(m).todo) == 4
    assert not Runner(m).failed


def test_a_trial_that_still_runs_is_waited_for(study, tmp_path, monkeypatch):
    made = study(without=("arm.stride_8", "arm.five_bits"), size__small={"jobs": 1})
    m = matrix(made, "small", "steps", (1,), tmp_path)
    monkeypatch.setattr("ablation.runner.POLL_SECONDS", 0.0)
    lines = []
    with (tmp_path / f".plain-s1.{this_host()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def tell(line: str) -> None:
            """The other one has run; the process ends once this waits for it."""
            if line.startswith("waiting"):
                assert list(runner.results) == ["qat-s1"]
                fcntl.flock(lock, fcntl.LOCK_UN)
            lines.append(line)

        runner = Runner(m)
        runner.run(tell)
    assert "waiting, as 1 are run elsewhere: plain-s1 by a process of an earlier start" in lines
    assert runner.results.keys() == {"plain-s1", "qat-s1"}


def test_only_runs_what_it_names(study, tmp_path):
    m = matrix(study(), "small", "steps", out=tmp_path / "runs")
    assert [t.id for t in Runner(m, only=("plain-s2", "five_bits-s2")).todo] == [
        "plain-s2",
        "five_bits-s2",
    ]
    with pytest.raises(Refusal, match="--only nobody-s1"):
        Runner(m, only=("nobody-s1",))


def test_the_progress_display_shows_step_and_seconds_of_what_runs(finished):
    table = watch(Runner(finished[1]), {"qat-s1": RUNNING})
    console = rich.console.Console(width=120)
    with console.capture() as shown:
        console.print(table)
    assert "qat-s1" in shown.get()
    assert "4" in shown.get()
    assert "8 done, 0 failed" in shown.get()


def test_the_gpu_gate_waits_until_cards_are_idle_and_cool(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    naps = []
    tool.write_text("#!/bin/sh\ncat " + str(tmp_path / "state") + "\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "state").write_text("90, 80\n0, 30\n")

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / "state").write_text("1, 40\n0, 30\n")

    monkeypatch.setattr(time, "sleep", sleep)
    gpu_gate(120, 50, 5)
    assert naps == [120, 10, 10]
    (tmp_path / "state").write_text("90, 80\n")
    with pytest.raises(Refusal, match=r"90.0, 80.0"):
        gpu_gate(0, 50, 5)
    gpu_gate(0, 0, 0)  # nothing asked: nothing looked at
    (tmp_path / "state").write_text("[N/A], 40\n")
    with pytest.raises(Refusal, match="does not answer"):
        gpu_gate(0, 50, 0)
    tool.unlink()
    with pytest.raises(Refusal, match="does not answer"):
        gpu_gate(0, 0, 5)


# ── Commands and reports ──────────────────────────────────────────────────────────────────────────
def test_dry_run_prints_every_command_with_its_seconds_and_runs_nothing(study, tmp_path, capsys):
    made = study()
    assert ablate.main(["run", str(made.path), "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("train_gpt.py") == 8
    assert "# 8 of 8 trials to run" in out
    assert "shares the training of plain-s1" in out
    assert "QUANT_BITS=5" in out
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_hours_of_a_gpu_and_what_they_cost(study, tmp_path, capsys):
    """By the plan of each arm: training once for those that share it, scoring for each."""
    small = {"seconds": 600, "ranks": 8, "jobs": 1, "gpu": "H100", "equal": "time"}
    made = study(size__small=small)
    path = str(made.path)
    call = ["run", path, "--out", str(tmp_path / "runs"), "--dry-run"]
    m = matrix(made, "small", "time", out=tmp_path / "runs")
    seconds = 0.0
    for trial in m.trials:
        found = plan(trial.cfg, Options("h100", 8))
        seconds += found["seconds"] + START_SECONDS
        seconds -= found["training"]["seconds"] if trial.donor else 0
    assert len(m.trials) == 8 and sum(trial.donor is not None for trial in m.trials) == 4
    hours = 8 * seconds / 3600
    assert ablate.main([*call, "--price", "3"]) == 0
    out = capsys.readouterr().out
    told = f"# about {hours:.1f} hours of one H100, {3 * hours:,.0f} dollars at 3 an hour; "
    assert "MAX_WALLCLOCK_SECONDS=600" in out and told in out
    assert ablate.main(["run", path, "--price", "3"]) == 2
    assert "--price 3: add --dry-run" in capsys.readouterr().err
    with pytest.raises(Refusal, match="gpu = TPU: not of h100, h200"):
        study(size__small=small | {"gpu": "TPU"})


def test_the_printed_command_is_what_runs(finished, tmp_path):
    trial = finished[1].trials[3]
    fresh = dataclasses.replace(trial, env={**trial.env, "LOGS_DIR": str(tmp_path)})
    subprocess.run(
        shell(fresh, finished[1].size), shell=True, cwd=ROOT, check=True, capture_output=True
    )
    ours, theirs = (
        json.loads((folder / trial.id / "result.json").read_text())
        for folder in (finished[1].folder, tmp_path)
    )
    assert ours["val_bpb"] == theirs["val_bpb"]
    assert ours["config_sha256"] == theirs["config_sha256"]


def test_the_report_holds_each_arm_each_difference_and_its_command(finished, capsys):
    made, m, _ = finished
    assert ablate.main(["report", str(made.path), "--out", str(m.folder)]) == 0
    text = capsys.readouterr().out
    bpb = summary(load_matrix(m).values("qat", "val_bpb"))
    assert f"{bpb.mean:.5f} ± {bpb.sd:.5f}" in text
    assert "| qat - plain |" in text
    assert "not distinguishable" in text
    assert f"python ablate.py run {made.path} --size small --equal steps (4 steps each)" in text
    assert "NOT RUN" not in text
    assert (m.folder / "report.md").read_text().strip() == text.strip()
    assert "<svg" in (m.folder / "report.html").read_text()


def test_the_report_says_what_has_not_run(finished):
    m = matrix(finished[0], "small", "steps", (1, 2, 3), finished[1].folder)
    assert "NOT RUN YET: plain-s3, five_bits-s3, stride_8-s3, qat-s3" in markdown_report(
        load_matrix(m)
    )


def test_runs_of_other_hardware_are_not_averaged(finished, tmp_path):
    m = copy_of(finished[1], tmp_path / "runs")
    path = m.trials[-1].folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "a faster one"}))
    with pytest.raises(Refusal, match=r"device is .* but a faster one in .*qat-s2"):
        load_matrix(m)


def test_a_factorial_report_has_main_effects_and_the_interaction(study, tmp_path):
    made = study(
        without=("arm.plain", "arm.five_bits", "arm.stride_8", "arm.qat"),
        factorial={"quant_bits": [6, 3], "prune_pct": [0.0, 0.5]},
        **{"": {"compare": [], "metrics": ["val_bpb"]}},
    )
    m = matrix(made, "small", "steps", out=tmp_path / "runs")
    Runner(m).run(lambda line: None)
    header, rows = factorial_table(load_matrix(m))
    assert [row[0] for row in rows] == [
        "quant_bits 3 - 6",
        "prune_pct 0.5 - 0.0",
        "quant_bits 3 - 6 x prune_pct 0.5 - 0.0",
    ]
    found = load_matrix(m)
    six, six_pruned, three, three_pruned = (
        summary(found.values(arm, "val_bpb")).mean for arm in made.arms
    )
    effect = (three + three_pruned - six - six_pruned) / 2
    assert float(rows[0][2]) == pytest.approx(effect, abs=1e-5)
    assert header[0] == "effect"


def test_compare_of_two_sets_of_runs(finished, capsys):
    folder = finished[1].folder
    assert ablate.main(["compare", str(folder / "plain-s*"), str(folder / "qat-s*")]) == 0
    out = capsys.readouterr().out
    a, b = (load_matrix(finished[1]).values(arm, "val_bpb") for arm in ("plain", "qat"))
    assert f"{paired(a, b).mean:+.5f}" in out
    assert "settings that differ: QAT_ENABLED=False against True" in out
    assert "Record rule, b against a: does not hold" in out


def test_compare_refuses_mixtures_and_nothing(finished, capsys):
    folder = finished[1].folder
    assert ablate.main(["compare", str(folder / "*-s1"), str(folder / "qat-s*")]) == 2
    assert "config_sha256" in capsys.readouterr().err
    assert ablate.main(["compare", str(folder / "nobody*"), str(folder / "qat-s*")]) == 2
    assert "nobody*" in capsys.readouterr().err


@pytest.fixture
def of_two_codes(finished, tmp_path) -> Matrix:
    """The finished study, as if the code had changed before its arm qat ran."""
    m = copy_of(finished[1], tmp_path / "runs")
    text = train_gpt.SOURCE + b"# one line more\n"
    for trial in m.trials:
        if trial.arm == "qat":
            path = trial.folder / "result.json"
            code = {"code_sha256": hashlib.sha256(text).hexdigest()}
            path.write_text(json.dumps(json.loads(path.read_text()) | code))
            (trial.folder / "train_gpt.py").write_bytes(text)
    return m


def test_arms_of_different_code_are_compared_when_asked_and_the_first_line_says_so(
    of_two_codes, capsys
):
    folder = of_two_codes.folder
    calls = {
        "a": ["compare", str(folder / "plain-s*"), str(folder / "qat-s*")],
        "plain, five_bits, stride_8": [
            "report",
            str(of_two_codes.study.path),
            "--out",
            str(folder),
        ],
    }
    for names, call in calls.items():
        assert ablate.main(call) == 2
        assert "--across-code" in capsys.readouterr().err
        assert ablate.main([*call, "--across-code"]) == 0
        out = capsys.readouterr().out
        said = next(line for line in out.splitlines() if line and not line.startswith("#"))
        assert said.startswith(f"THE CODE DIFFERS: {names} ran code {train_gpt.CODE_SHA256[:12]}; ")
        assert said.endswith(" (0 lines less, 1 more).")
        assert "qat - plain" in out or "b - a" in out


def test_a_pair_of_the_command_line_is_compared_too(finished, capsys):
    made, m, _ = finished
    call = ["report", str(made.path), "--out", str(m.folder)]
    assert ablate.main(call) == 0
    assert "five_bits - qat" not in capsys.readouterr().out
    pairs = ["qat,five_bits", "plain:live_val_bpb,qat", "plain,qat:live_val_bpb"]
    assert ablate.main([*call, *(f"--pair={pair}" for pair in pairs)]) == 0
    rows = capsys.readouterr().out.splitlines()
    found = load_matrix(m)
    for names, heading, b, a, name in (
        ("five_bits - qat", "final", "five_bits", "qat", "val_bpb"),
        ("qat - plain:live_val_bpb", "live", "qat", "plain", "live_val_bpb"),
        ("qat:live_val_bpb - plain", "live", "qat", "plain", "live_val_bpb"),
    ):
        mean = paired(found.values(a, name), found.values(b, name)).mean
        assert any(row.startswith(f"| {names} | {heading}, BPB | {mean:+.5f} |") for row in rows)
    for pair, words in {
        "qat": "two arms",
        "qat,plain,qat": "two arms",
        "qat,nobody": "no arm nobody; choose from plain",
        "nobody:val_bpb,qat": "no arm nobody",
    }.items():
        assert ablate.main([*call, "--pair", pair]) == 2
        assert f"--pair {pair}: " in (error := capsys.readouterr().err) and words in error


def test_sweep_writes_a_study_of_its_grid_on_the_reference_arm_and_size(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    monkeypatch.setattr("ablation.study.ROOT", tmp_path)
    call = [
        "sweep",
        str(finished[0].path),
        "--grid",
        "MATRIX_LR=0.01,0.02",
        "--grid",
        "NUM_LAYERS=2,3",
        "--dry-run",
    ]
    assert ablate.main(call) == 0
    (path,) = (tmp_path / "logs/runs").glob("sweep_matrix_lr_num_layers_tiny_*.toml")
    made = read_study(path)
    grid = [("0.01", "2"), ("0.01", "3"), ("0.02", "2"), ("0.02", "3")]
    assert [(a["MATRIX_LR"], a["NUM_LAYERS"]) for a in made.arms.values()] == grid
    assert "# 8 of 8 trials to run" in capsys.readouterr().out
    assert made.env["QAT_ENABLED"] == "0"
    assert made.env["DATA_PATH"]
    assert made.sizes["small"].jobs == 2
    assert ablate.main([*call[:3], "MATRIX_LR=0.5,0.6", "--dry-run"]) == 0
    assert len(list((tmp_path / "logs/runs").glob("*.toml"))) == 2
    capsys.readouterr()
    assert ablate.main([*call[:3], "MATRIX_LR"]) == 2
    assert "KNOB=v1,v2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["run", "nowhere.toml"], "nowhere.toml"),
        (["run"], "Missing argument"),
        (["walk"], "walk"),
        (["run", "studies/pr989_qat_x_swa.toml", "--equal", "luck"], "--equal luck"),
        (["run", "studies/pr989_qat_x_swa.toml", "--seeds", "a"], "--seeds a"),
        (["run", "studies/pr989_qat_x_swa.toml", "--launcher", "cloud"], "--launcher cloud"),
        (["run", "studies/pr989_qat_x_swa.toml", "--slurm", "qos=x"], "add --launcher slurm"),
        (["run", "studies/pr989_qat_x_swa.toml", "--max-busy", "5"], "side by side"),
        (["run", "studies/pr989_qat_x_swa.toml", "--price", "3"], "names no gpu"),
        (
            ["run", "studies/pr989_qat_x_swa.toml", "--launcher", "slurm", "--synced", "9"],
            "--synced 9",
        ),
        (["run", "studies/pr989_qat_x_swa.toml", "--cool-down", "-1"], "cool-down"),
        (["report", "studies/pr989_qat_x_swa.toml", "--size", "tiny"], "no size tiny"),
    ],
)
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(monkeypatch, arguments, word, capsys):
    monkeypatch.chdir(ROOT)
    assert ablate.main(arguments) == 2
    error = capsys.readouterr().err
    assert word in error
    assert len(error.strip().splitlines()) == 1

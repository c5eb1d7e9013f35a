"""The leaderboard folder: built from run folders alone, checked from the folder alone.

Would have caught: hand-copied numbers (#2076), a stale log beside another configuration's README
(#86), missing logs and JSON (#505), folders that are not self-contained (#545), a third seed from
another configuration (#2124), 5 % and 10 % pruning inside one mean (#989), artifacts over the cap
(#194, #975), evaluation of 688 s (#1972), a population standard deviation shown as the sample's
(#989), scripts that do not import (#1437, #514).
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import py_compile
import random
import re
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import TINY
from launch import codes, finish
from test_faults import NotFinite
from test_resume import StopAfter

import ablate
import train_gpt
from ablation.check import check_submission
from ablation.findings import ERROR, UNCHECKED, WARNING, WEIGHTS
from ablation.report import markdown_table
from ablation.script import imports_of
from ablation.submission import (
    build_submission,
    documents_come_back,
    lost_documents,
    render,
    summarise,
)
from train_gpt import PACKED_NAME, READABLE_NAME, Config, Refusal

ABOUT = dict(
    author="A. Author",
    github_id="aauthor",
    name="Tiny QAT",
    blurb="Three tiny runs.",
    track="none: a test",
)
SEEDS = [1, 7, 1337]
UNPACK = functools.cache(train_gpt.unpack_code)
IMPORTS_OF = functools.cache(imports_of)


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory) -> list[Path]:
    """Folders of three real runs, one per seed, out of order."""
    logs = tmp_path_factory.mktemp("logs")
    for seed in SEEDS:
        cfg = Config(
            **TINY,
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            logs_dir=str(logs),
            run_id=f"seed{seed}",
            seed=seed,
            qat_enabled=True,
            ema_enabled=True,
            ema_decay=0.5,
        )
        assert train_gpt.main(cfg)["exit_code"] == 0
    return [logs / f"seed{seed}" for seed in reversed(SEEDS)]


@pytest.fixture(scope="session")
def built(runs, tmp_path_factory) -> Path:
    return build_submission(runs, tmp_path_factory.mktemp("built") / "folder", ABOUT)


@pytest.fixture
def copied_runs(runs, tmp_path) -> list[Path]:
    """The run folders, to be spoilt."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]


@pytest.fixture
def folder(built, tmp_path) -> Path:
    """A good submission, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "submission"))


@pytest.fixture(autouse=True)
def scripts_read_once(monkeypatch) -> None:
    """The same script is in nearly every folder: to unpack and to read it takes half of a check."""
    monkeypatch.setattr("ablation.submission.unpack_code", UNPACK)
    monkeypatch.setattr("ablation.script.imports_of", IMPORTS_OF)


@pytest.fixture
def trusting(monkeypatch) -> None:
    """Does not ask what the script makes of results."""
    monkeypatch.setattr("ablation.ours.check_script", lambda *_: [])


def said(folder: Path, weight: str, run_script: bool = False) -> list[str]:
    """The findings of this weight, a line each."""
    found = check_submission(folder, run_script)
    # one line each, no control characters, the worst first
    assert all(str(one).isprintable() for one in found)
    order = [WEIGHTS.index(one.weight) for one in found]
    assert order == sorted(order)
    return [str(one) for one in found if one.weight == weight]


def errors(folder: Path, run_script: bool = False) -> list[str]:
    return said(folder, ERROR, run_script)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def results_of(folder: Path) -> dict:
    paths = [
        folder / f"result_seed{seed}.json" for seed in read(folder / "submission.json")["seeds"]
    ]
    return {r["seed"]: r for r in map(read, paths)}


def put(path: Path, key: str, value) -> None:
    """Sets a key (a dotted path) of a JSON file."""
    whole = read(path)
    *outer, last = key.split(".")
    functools.reduce(lambda part, name: part[name], outer, whole)[last] = value
    path.write_text(json.dumps(whole))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def rebuild(folder: Path) -> None:
    """A forger's work: log, submission.json and README.md again,
    in agreement with the results as they are now.
    """
    results = results_of(folder)
    for seed, r in results.items():
        (folder / f"train_seed{seed}.log").write_text(train_gpt.final_table(r))
    (folder / "submission.json").write_text(json.dumps(summarise(results, ABOUT)))
    (folder / "README.md").write_text(render(results, ABOUT))


def forge(folder: Path, key: str, value, seeds=tuple(SEEDS)) -> None:
    """Changes a key of these results, and everything that shows it."""
    for seed in seeds:
        put(folder / f"result_seed{seed}.json", key, value)
    rebuild(folder)


def claim(folder: Path) -> None:
    """Says that the folder is of the leaderboard's track, wherever that stands."""
    put(folder / "submission.json", "track", "10min_16mb")
    (folder / "README.md").write_text(render(results_of(folder), ABOUT | {"track": "10min_16mb"}))


def limit(folder: Path, **rows) -> None:
    """Rows of the limits of seed 7: name=(spent, limit)."""
    held = {name: dict(spent=a, limit=b, slack=b - a) for name, (a, b) in rows.items()}
    forge(folder, "limits", held, [7])


def ship(folder: Path, source: bytes) -> None:
    """Another script, with everything in agreement with its size and hash."""
    (folder / "train_gpt.py").write_bytes(source)
    (folder / READABLE_NAME).unlink()
    for seed in SEEDS:
        path = folder / f"result_seed{seed}.json"
        artifact = read(path)["artifact_bytes"]
        for key, value in dict(
            code_bytes=len(source),
            total_bytes=len(source) + artifact,
            code_sha256=hashlib.sha256(source).hexdigest(),
        ).items():
            put(path, key, value)
    rebuild(folder)


def assert_caught(folder: Path, *words: str, weight: str = ERROR, run_script: bool = False):
    problems = said(folder, weight, run_script)
    assert any(all(word in problem for word in words) for problem in problems), problems


# ── A good folder ─────────────────────────────────────────────────────────────────────────────────
def test_a_built_folder_is_good_and_so_says_its_own_script(built):
    assert errors(built, run_script=True) == said(built, UNCHECKED) == []


def test_a_built_folder_has_these_files(built, runs, data):
    names = {"README.md", "submission.json", "train_gpt.py", "requirements.txt", "tokenizer.model"}
    names.add(READABLE_NAME)
    names |= {name for n in SEEDS for name in (f"train_seed{n}.log", f"result_seed{n}.json")}
    assert {p.name for p in built.iterdir()} == names
    for name, origin in (("train_gpt.py", PACKED_NAME), (READABLE_NAME, "train_gpt.py")):
        assert (built / name).read_bytes() == (runs[0] / origin).read_bytes()
    assert (built / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
    for run in runs:
        seed = read(run / "result.json")["seed"]
        assert (built / f"train_seed{seed}.log").read_bytes() == (run / "train.log").read_bytes()
        assert (built / f"result_seed{seed}.json").read_bytes() == (
            run / "result.json"
        ).read_bytes()
    assert list(built.parent.iterdir()) == [built]


def test_submission_json_holds_the_figures_of_the_runs(built, runs):
    s, results = (
        read(built / "submission.json"),
        [read(run / "result.json") for run in reversed(runs)],
    )
    bpb = [r["val_bpb"] for r in results]
    mean = sum(bpb) / 3
    assert s["val_bpb"] == pytest.approx(mean, rel=1e-12)
    assert s["val_bpb_std"] == pytest.approx(
        math.sqrt(sum((x - mean) ** 2 for x in bpb) / 2), rel=1e-9
    )  # sample
    assert s["val_loss_std"] == pytest.approx(statistics.stdev(r["val_loss"] for r in results))
    assert (
        s["bytes_total"]
        == max(r["total_bytes"] for r in results)
        == s["artifact_bytes_max"] + s["bytes_code"]
    )
    assert s["seeds"] == SEEDS and {k: s[k] for k in ABOUT} == ABOUT
    for r in results:
        row = s["seed_results"][str(r["seed"])]
        assert [
            row[k]
            for k in (
                "val_bpb",
                "steps",
                "train_time_s",
                "eval_time_s",
                "artifact_bytes",
                "pre_quant_val_bpb",
            )
        ] == [
            r[k]
            for k in (
                "val_bpb",
                "steps",
                "train_seconds",
                "eval_seconds",
                "artifact_bytes",
                "averaged_val_bpb",
            )
        ]
        assert row["step_avg_ms"] == pytest.approx(1000 * r["train_seconds"] / 6)
    assert s["compliance"] == dict(
        train_under_600s=True,
        three_seeds=True,
        artifact_under_16mb=True,
        eval_under_600s=True,
        documents_come_back=None,
        score_first_ttt=None,
    )
    assert set(s["technique_summary"].split(", ")) == {"QAT", "EMA", "WARMDOWN", "SMEAR_GATE"}
    assert (
        s["date"] == max(r["date"] for r in results) and s["code_sha256"] == train_gpt.CODE_SHA256
    )


def test_readme_is_the_rendering_of_the_results_and_shows_them(built):
    readme, results = (built / "README.md").read_text(), results_of(built)
    assert readme == render(results, ABOUT)
    for r in results.values():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {r['seed']} |"))
        cells = [c.strip() for c in row.strip("|").split("|")]
        assert cells[1] == "6" and cells[4:8] == [
            f"{r[k]:.6f}"
            for k in ("live_val_bpb", "averaged_val_bpb", "quantised_val_bpb", "val_bpb")
        ]
        assert cells[9:] == [f"{r['total_bytes']:,}", f"{16_000_000 - r['total_bytes']:,}"]
    assert (
        f"# Tiny QAT: val_bpb {statistics.fmean(r['val_bpb'] for r in results.values()):.6f}"
        in readme
    )
    assert "3 seeds, sample standard deviation" in readme and results[7]["device"] in readme


def test_the_run_command_gives_the_configuration_of_the_runs(built):
    readme, config = (built / "README.md").read_text(), results_of(built)[7]["config"]
    line = next(line for line in readme.splitlines() if "RUN_ID=" in line)
    settings = dict(re.findall(r"([A-Z0-9_]+)=(\S+)", line))
    exported = dict(
        re.findall(
            r"([A-Z_]+)=(\S+)",
            next(line for line in readme.splitlines() if line.startswith("export")),
        )
    )
    cfg = Config.from_env(settings | exported | {"SEED": "7", "RUN_ID": "seed7"})
    assert cfg.digest() == Config(**config).digest() and cfg.seed == 7
    assert exported["TOKENIZER_PATH"] == "tokenizer.model" and "for seed in 1 7 1337; do" in readme


def test_one_seed_has_no_standard_deviation(runs, tmp_path):
    folder = build_submission(runs[:1], tmp_path / "one", ABOUT)
    s = read(folder / "submission.json")
    assert (
        s["val_bpb_std"] is None
        and s["val_loss_std"] is None
        and not s["compliance"]["three_seeds"]
    )
    assert "1 seed: no standard deviation" in (folder / "README.md").read_text()
    assert errors(folder) == []


def test_the_official_tokenizer_is_not_shipped(runs, tmp_path, data, monkeypatch, trusting):
    monkeypatch.setattr(
        "ablation.submission.OFFICIAL_TOKENIZER",
        hashlib.sha256((data / "tokenizer.model").read_bytes()).hexdigest(),
    )
    folder = build_submission(runs, tmp_path / "out", ABOUT)
    assert not (folder / "tokenizer.model").exists() and errors(folder) == []


def test_prose_with_numbers_that_the_results_show_is_welcome(folder, trusting):
    s, path = read(folder / "submission.json"), folder / "README.md"
    r, more = results_of(folder)[7], s["seed_results"]["7"]
    prose = (
        f"Mean {s['val_bpb']:.4f} (sd {s['val_bpb_std']:.5f}), seed 7 {more['val_bpb']:.3f}; "
        f"{more['train_time_s']:.3f} s; "
        f"decay 0.500, gap {r['quant_gap_bpb']:+.6f} or {r['quant_gap_bpb']:.3e}. On torch "
        "2.13.1234.5, 3.14, 16,000.\n"
    )
    path.write_text(prose + path.read_text() + "\n## Why\n" + prose)
    assert errors(folder) == []


def test_a_number_that_no_log_shows_and_that_is_no_result_is_listed_as_not_checked(folder):
    replace(
        folder / "README.md",
        "<!-- generated -->",
        "Line one.\n\n7.25 weeks, 941,641 times.\n<!-- generated -->",
    )
    assert errors(folder) == []
    assert_caught(folder, "README.md", "7.25 (line 3)", "941,641 (line 3)", weight=UNCHECKED)


CLAIMS = {  # what a README says -> how the error names it
    "score": ("We reach 1.12 BPB.", "1.12 BPB"),
    "score of": ("a val_bpb of **1.12**", "1.12 [bpb]"),
    "score, one decimal": ("BPB: 1.1", "1.1 [bpb]"),
    "nats": ("that is 1.9 nats", "1.9 nats"),
    "megabytes": ("in 15.9 MB", "15.9 MB"),
    "kilobytes": ("an artifact of 734 kB", "734 kB"),
    "bytes": ("in all 15,911,222 bytes", "15,911,222 bytes"),
    "thousands": ("in all 15,911,222", "15,911,222"),
    "table": ("\n| seed | final BPB | MB |\n|---|---|---|\n| 7 | 1.12 | 0.1 |\n", "1.12 [bpb]"),
    "table, bytes": ("\n| seed | bytes |\n|---|---|\n| 7 | 734,001 |\n", "734,001 [bytes]"),
}


@pytest.mark.parametrize("text, name", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_has_to_be_a_result_whatever_its_digits(folder, text, name):
    replace(folder / "README.md", "<!-- end -->\n", f"<!-- end -->\n{text}\n")
    assert_caught(folder, "README.md, line", f"no result shows the number {name}; correct it")


def test_the_same_claims_are_welcome_where_they_are_true(folder):
    s = read(folder / "submission.json")
    r = results_of(folder)[7]
    text = (
        f"BPB {s['val_bpb']:.2f}, {r['val_bpb']:.1f} BPB, {r['val_loss']:.1f} nats, "
        f"{r['total_bytes'] / 1e6:.2f} MB, {r['artifact_bytes']:,} bytes of {16_000_000:,}\n\n"
        f"| seed | final BPB | kB |\n|---|---|---|\n| 7 | **{r['val_bpb']:.2f}** | "
        f"{r['total_bytes'] / 1e3:.1f} |\n"
    )
    replace(folder / "README.md", "<!-- end -->\n", f"<!-- end -->\n{text}")
    assert errors(folder) == said(folder, UNCHECKED) == []


def test_the_toggle_table_and_what_scoring_gains_are_of_the_results(folder):
    """As a log shows them: the effect with its unit, the interval, costs, and differences."""
    row = read(folder / SEED7)["toggles"]["QAT"]
    ttt = dict(unit="bpb", effect=-0.00213456, effect_interval=[-0.0024567, -0.0018123])
    qat = dict(effect=-0.01554321, effect_interval=[-0.01721234, -0.01381234])
    forge(folder, "toggles.TTT", row | ttt, [7])
    forge(folder, "toggles.QAT", row | qat | dict(cost_ms=3.71, cost_interval=[3.65, 3.8]), [7])
    scores = read(folder / SEED7)["scores"]
    scores["documents"] = dict(scores["sliding"], bpb=1.23456, loss=2.34567)
    forge(folder, "scores", scores, [7])
    tables = []
    for rows_of in (train_gpt.toggle_rows, train_gpt.cost_rows):
        rows = rows_of(results_of(folder)[7])
        heads = ["toggle", *rows["QAT"]]
        cells = [[name, *[cell or "" for cell in row.values()]] for name, row in rows.items()]
        tables += [markdown_table(heads, cells), train_gpt.text_table([heads, *cells])]
    gain = scores["sliding"]["bpb"] - 1.23456
    nats = scores["quantised"]["loss"] - 2.34567
    prose = "\n\n".join([f"Documents gain {gain:.3f} BPB, {nats:.3f} nats.", *tables])
    assert "-0.00213 bpb (-0.00246 to -0.00181)" in prose and "-0.0155 nats (" in prose
    replace(folder / "README.md", "<!-- end -->\n", f"<!-- end -->\n{prose}")
    assert errors(folder) == []
    replace(folder / "README.md", "-0.00213 bpb", "-0.00313 bpb")
    assert_caught(folder, "README.md, line", "no result shows the number 0.00313 bpb")


# ── What a reader of the scores has to know ───────────────────────────────────────────────────────
@pytest.fixture(scope="session")
def eventful(data, tmp_path_factory) -> Path:
    """The folder of a run that went on after step 2 and left out step 4."""
    logs = tmp_path_factory.mktemp("eventful")
    paths = dict(data_path=str(data), tokenizer_path=str(data / "tokenizer.model"))
    cfg = Config(**TINY, **paths, logs_dir=str(logs), run_id="run", seed=7, nonfinite="skip")
    assert codes(finish(cfg, prepare=StopAfter(1))) == [143]
    again = dataclasses.replace(cfg, resume=True)
    assert codes(finish(again, prepare=NotFinite((4,)))) == [0]
    return build_submission([logs / "run"], tmp_path_factory.mktemp("built") / "folder", ABOUT)


def test_launches_and_left_out_steps_are_told_and_demanded(eventful, tmp_path):
    result = read(eventful / SEED7)
    assert (result["resumed"], result["skipped"]) == ([2], [4])
    row = read(eventful / "submission.json")["seed_results"]["7"]
    assert (row["launches"], row["resumed_after_steps"], row["skipped_steps"]) == (2, [2], [4])
    readme = (eventful / "README.md").read_text()
    lost = f"{result['lost_seconds']:.1f} s from a checkpoint to an end were lost or done again"
    for words in (
        f"2 launches: went on after step 2; {lost}",
        "left out 1 steps, as they were not finite: 4",
    ):
        assert f"- seed 7: {words}" in readme
        assert_caught(eventful, SEED7, words, weight=WARNING)
    assert errors(eventful) == []

    folder = Path(shutil.copytree(eventful, tmp_path / "folder"))
    replace(folder / "README.md", "2 launches: went on", "1 launch: went on")
    assert_caught(folder, "README.md", "generated part")
    put(folder / "submission.json", "seed_results.7.skipped_steps", [])
    assert_caught(folder, "submission.json.seed_results.7.skipped_steps", "the logs give [4]")


@pytest.mark.parametrize(
    "key, words",
    [("resumed", "goes on from a checkpoint after [2]"), ("skipped", "leaves out the steps [4]")],
)
def test_a_result_that_hides_what_its_log_shows_is_caught(eventful, tmp_path, key, words):
    folder = Path(shutil.copytree(eventful, tmp_path / "folder"))
    log = (folder / "train_seed7.log").read_text()
    put(folder / SEED7, key, [])
    results = results_of(folder)
    (folder / "submission.json").write_text(json.dumps(summarise(results, ABOUT)))
    (folder / "README.md").write_text(render(results, ABOUT))
    assert (folder / "train_seed7.log").read_text() == log
    assert_caught(folder, "train_seed7.log", words, f"{SEED7} says nothing")


REMARKS = {  # a key of the results -> its value -> the words of README.md and check
    "warnings": (["the average is worse"], "warned: the average is worse"),
    "without_effect": (
        {"QAT_START_FRAC": "QAT_ENABLED is 0"},
        "settings without effect: 'QAT_START",
    ),
    "data.lost_documents": (
        {"lost": 1030, "of": 12345},
        "1,030 of 12,345 validation documents do not come back",
    ),
}


@pytest.mark.parametrize("key", REMARKS)
def test_warnings_and_what_had_no_effect_are_told(folder, key):
    value, words = REMARKS[key]
    forge(folder, key, value)
    assert words in (folder / "README.md").read_text()
    assert_caught(folder, SEED7, words, weight=WARNING)
    assert read(folder / "submission.json")["compliance"]["documents_come_back"] is (
        False if "lost" in key else None
    )


@pytest.mark.parametrize(
    "lost, back, words",
    [
        (None, None, ""),
        ({"lost": 0, "of": 9}, True, ""),
        ({"lost": 9, "of": None}, False, "an unknown number of validation documents do not"),
        ({"lost": "0", "of": 9}, False, "data.lost_documents.lost: '0', not int or NoneType"),
        ("0 of 9", False, "data.lost_documents: '0 of 9', not an object"),
        ({}, False, "data.lost_documents.lost: missing"),
    ],
)
def test_only_a_count_of_none_says_that_every_document_comes_back(lost, back, words):
    results = {7: {"data": {"lost_documents": lost}}}
    assert lost_documents(results[7]).startswith(words) and bool(words) == (back is False)
    assert documents_come_back(results) is back


@pytest.mark.parametrize("key", ["resumed", "skipped", "warnings", "without_effect"])
def test_a_result_that_does_not_say_is_not_taken_for_one_that_says_nothing_happened(folder, key):
    for seed in SEEDS:
        path = folder / f"result_seed{seed}.json"
        whole = read(path)
        del whole[key]
        path.write_text(json.dumps(whole))
    rebuild(folder)
    words = f"its result says nothing of {key}"
    assert words in (folder / "README.md").read_text()
    assert_caught(folder, SEED7, words, weight=WARNING)


def test_a_warning_of_a_log_alone_is_told_too(folder):
    path = folder / "train_seed7.log"
    path.write_text("WARNING: the disk is slow\n" + path.read_text())
    assert_caught(folder, "train_seed7.log", "warned: the disk is slow", weight=WARNING)


def test_a_score_of_documents_that_do_not_come_back_is_in_no_track(folder, monkeypatch):
    forge(folder, "data.lost_documents", {"lost": None, "of": None})
    put(folder / "submission.json", "track", "10min_16mb")
    assert_caught(folder, "submission.json.track", "10min_16mb", "an unknown number of validation")
    results = results_of(folder)
    for r in results.values():
        r.update(device="NVIDIA H100 80GB HBM3", world_size=8)
    assert summarise(results, ABOUT | {"track": ""})["track"].startswith("none")


def test_a_run_of_no_track_may_take_longer_where_it_was_held_to_no_limit(folder):
    """As in train_gpt.time_limits: with fewer GPUs, or on a CPU, scoring takes as long as it does.

    The README says that the contest's limit was not kept.
    """
    forge(folder, "eval_seconds", 688.0)
    assert errors(folder) == []
    assert_caught(folder, "submission.json.track, seed 7", "over 600; say so", weight=WARNING)
    assert "scoring at most 600 s: **NO**" in (folder / "README.md").read_text()


def test_the_first_problem_does_not_end_the_check(folder):
    (folder / "requirements.txt").write_text("torch==2.13.0\n")
    (folder / "pipe").symlink_to("README.md")
    put(folder / "submission.json", "val_bpb", 1.25)
    forged = results_of(folder)[7]
    put(folder / SEED7, "total_bytes", 16_638_468)
    put(folder / SEED7, "artifact_bytes", 16_638_468 - forged["code_bytes"])
    (folder / "result_seed1337.json").write_text("{")
    found = "\n".join(errors(folder))
    for words in (
        "requirements.txt: lists no package of brotli, numpy",
        "pipe: a link",
        "over the cap of 16,000,000",
        "result_seed1337.json: no good JSON",
    ):
        assert words in found
    assert_caught(folder, "submission.json and README.md", "not compared", weight=UNCHECKED)


def test_the_command_says_its_findings_and_fails_on_a_warning_or_an_error(folder, capsys):
    replace(folder / "README.md", "<!-- end -->\n", "<!-- end -->\nIt took 7.25 weeks.\n")
    assert ablate.main(["check", str(folder)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("NOT CHECKED README.md: ") for line in lines)
    assert last.startswith(f"{folder}: not clean: 0 errors, ") and " 1 not checked, " in last
    (folder / "requirements.txt").write_text("")
    assert ablate.main(["check", str(folder), "--json"]) == 1
    first = json.loads(capsys.readouterr().out)[0]
    assert first["weight"] == ERROR and first["thing"] == "requirements.txt" and first["remedy"]


def test_readme_may_come_with_the_line_ends_of_windows(folder, trusting):
    path = folder / "README.md"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert errors(folder) == []


def test_about_texts_that_are_not_required_have_a_default(runs, tmp_path, trusting):
    s = read(
        build_submission(
            runs, tmp_path / "out", {k: ABOUT[k] for k in ("author", "github_id", "name")}
        )
        / "submission.json"
    )
    assert "QAT" in s["blurb"] and s["track"].startswith("none") and errors(tmp_path / "out") == []


def test_a_calibration_within_its_limit_is_no_problem(folder):
    forge(folder, "seconds.calibrate", 4.5, [7])
    limit(folder, calibrate=(4.5, 5.0))
    assert errors(folder) == []


def test_the_leaderboard_track_needs_eight_h100(folder):
    results = results_of(folder)
    for r in results.values():
        r.update(device="NVIDIA H100 80GB HBM3", world_size=8)
    texts = dict(author="a", github_id="b", name="c")
    assert summarise(results, texts)["track"] == "10min_16mb"
    results[7]["eval_seconds"] = 600.5
    late = summarise(results, texts)
    assert late["track"].startswith("none") and late["compliance"]["eval_under_600s"] is False
    assert "scoring at most 600 s: **NO**, the longest took 600.5 s" in render(results, texts)
    results[7].update(eval_seconds=1.0, train_seconds=596.0, seconds={"calibrate": 4.0})
    assert summarise(results, texts)["compliance"]["train_under_600s"] is True
    results[7]["seconds"]["calibrate"] = 4.5
    assert summarise(results, texts)["compliance"]["train_under_600s"] is False
    assert "training at most 600 s: **NO**, the longest took 600.5 s" in render(results, texts)


# ── What the builder refuses ──────────────────────────────────────────────────────────────────────
def edit(key: str, value):
    return lambda runs: put(runs[1] / "result.json", key, value)


REFUSED_RUNS = {  # what is done to the folders of seeds 1337, 7, 1 -> words of the refusal
    "no result": (
        lambda runs: (runs[1] / "result.json").unlink(),
        ["seed7/result.json", "No such file"],
    ),
    "no log": (lambda runs: (runs[1] / "train.log").unlink(), ["seed7/train.log", "No such file"]),
    "no source": (
        lambda runs: (runs[1] / "train_gpt.py").unlink(),
        ["seed7/train_gpt.py", "No such file"],
    ),
    "no packed script": (
        lambda runs: (runs[1] / PACKED_NAME).unlink(),
        [f"seed7/{PACKED_NAME}", "No such file"],
    ),
    "other packed script": (
        lambda runs: replace(runs[1] / PACKED_NAME, "exec(", "print("),
        [f"seed7/{PACKED_NAME}", "sha256"],
    ),
    "bad JSON": (
        lambda runs: (runs[1] / "result.json").write_text("{"),
        ["seed7/result.json", "JSON"],
    ),
    "wrong type": (edit("val_bpb", "1.0"), ["seed7/result.json.val_bpb", "'1.0'"]),
    "exit code": (edit("exit_code", 4), ["seed 7", "exit_code=4", "a toggle did nothing"]),
    "same seed": (edit("seed", 1337), ["seed7", "seed 1337", "one run per seed"]),
    "code": (edit("code_sha256", "0" * 64), ["code_sha256", train_gpt.CODE_SHA256, "0" * 64]),
    "config": (edit("config.matrix_lr", 0.5), ["MATRIX_LR", "0.02 with seed 1", "0.5 with seed 7"]),
    "config hash": (edit("config_sha256", "0" * 64), ["config_sha256", "0" * 64, "seed 7"]),
    "validation data": (
        edit("data.val_sha256", {"v": "0"}),
        ["data.val_sha256", "'v': '0'", "fineweb_val_000000.bin"],
    ),
    "training data": (edit("data.train_tokens", 5), ["data.train_tokens", "5 with seed 7"]),
    "device": (edit("device", "abacus"), ["device", "'abacus' with seed 7", "with seed 1,"]),
    "ranks": (edit("world_size", 3), ["world_size", "1 with seed 1", "3 with seed 7"]),
    "torch": (edit("torch", "0.1"), ["torch", "'0.1' with seed 7"]),
    "only scored": (
        edit("config.eval_only", "a.bin"),
        ["seed 7", "eval_only='a.bin'", "full training"],
    ),
    "exported again": (
        edit("checkpoint", "w.bin"),
        ["seed 7", "checkpoint='w.bin'", "full training"],
    ),
    "exported again by its config": (
        edit("config.checkpoint", "w.bin"),
        ["seed 7", "checkpoint='w.bin'"],
    ),
    "no step": (edit("steps", 0), ["seed 7", "steps=0"]),
    "other source": (
        lambda runs: (runs[1] / "train_gpt.py").write_text("1"),
        ["seed7/train_gpt.py", "sha256"],
    ),
}


@pytest.mark.parametrize("spoil, words", REFUSED_RUNS.values(), ids=REFUSED_RUNS)
def test_the_builder_refuses(copied_runs, tmp_path, spoil, words):
    spoil(copied_runs)
    with pytest.raises(Refusal) as refusal:
        build_submission(copied_runs, tmp_path / "out" / "folder", ABOUT)
    assert (
        all(word in str(refusal.value) for word in words)
        and len(str(refusal.value).splitlines()) == 1
    ), refusal.value
    assert not (tmp_path / "out" / "folder").exists() and list((tmp_path / "out").glob("*")) == []


def test_a_run_that_only_scored_is_refused_by_name(runs, tmp_path, data):
    cfg = Config(
        data_path=str(data),
        tokenizer_path=str(data / "tokenizer.model"),
        logs_dir=str(tmp_path),
        run_id="score",
        eval_only=str(runs[0] / "artifact.bin"),
    )
    train_gpt.main(cfg)
    with pytest.raises(Refusal, match=r"eval_only=.*not a full training"):
        build_submission([tmp_path / "score"], tmp_path / "out", ABOUT)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no run"):
        build_submission([], tmp_path / "out", ABOUT)


@pytest.mark.parametrize("key", ["author", "github_id", "name"])
@pytest.mark.parametrize("text", [None, " ", "two\nlines", "<!-- end -->", 5])
def test_a_missing_or_odd_text_is_refused_with_its_option(runs, tmp_path, key, text):
    with pytest.raises(Refusal, match=f"{key}: .*give --{key.replace('_', '-')}"):
        build_submission(runs, tmp_path / "out", {**ABOUT, key: text})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_and_left_alone(runs, tmp_path):
    (tmp_path / "mine").write_text("x")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(Refusal, match="is not empty"):
            build_submission(runs, out, ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and (
        tmp_path / "mine"
    ).read_text() == "x"


def test_an_empty_folder_is_filled(runs, tmp_path):
    assert (build_submission(runs, tmp_path, ABOUT) / "README.md").exists()


def test_a_lost_or_changed_tokenizer_is_refused(copied_runs, tmp_path):
    for run in copied_runs:
        put(run / "result.json", "config.tokenizer_path", str(tmp_path / "lost.model"))
    with pytest.raises(Refusal, match=r"TOKENIZER_PATH=.*lost\.model: No such file"):
        build_submission(copied_runs, tmp_path / "out", ABOUT)
    (tmp_path / "lost.model").write_text("another")
    with pytest.raises(Refusal, match=r"TOKENIZER_PATH=.*lost\.model: sha256"):
        build_submission(copied_runs, tmp_path / "out", ABOUT)
    assert not (tmp_path / "out").exists()


def test_a_build_that_fails_half_way_leaves_nothing(runs, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def fail_late(source, target, **options):
        if Path(source).name == "train.log":
            raise OSError(28, "No space left on device", str(target))
        return copyfile(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", fail_late)
    with pytest.raises(Refusal, match="No space left on device"):
        build_submission(runs, tmp_path / "out", ABOUT)
    assert list(tmp_path.iterdir()) == []


# ── What the checker catches ──────────────────────────────────────────────────────────────────────
def without(name: str):
    return lambda f: (f / name).unlink()


def setting(name: str, key: str, value):
    return lambda f: put(f / name, key, value)


def writing(name: str, text: str):
    return lambda f: (f / name).write_text(text)


def adding(text: str):
    return lambda f: replace(f / "README.md", "<!-- end -->\n", "<!-- end -->\n" + text)


def linking(name: str, target: str):
    def spoil(f: Path) -> None:
        (f / name).unlink(missing_ok=True)
        (f / name).symlink_to(target)

    return spoil


SEED7 = "result_seed7.json"
CAUGHT = {  # what is done to a good folder -> words of one line about it
    **{
        f"no {name}": (without(name), [name, "missing"])
        for name in (
            "README.md",
            "submission.json",
            "train_gpt.py",
            "requirements.txt",
            "train_seed7.log",
            SEED7,
        )
    },
    "no tokenizer": (without("tokenizer.model"), ["tokenizer.model", "No such file"]),
    "other tokenizer": (writing("tokenizer.model", "x"), ["tokenizer.model", "sha256"]),
    "a log too many": (
        writing("train_seed8.log", "x"),
        ["train_seed8.log", "does not have its seed"],
    ),
    "a result too many": (
        writing("result_seed8.json", "{}"),
        ["result_seed8.json", "does not have its seed"],
    ),
    "a seed without files": (
        setting("submission.json", "seeds", [1, 7, 8, 1337]),
        ["train_seed8.log", "missing"],
    ),
    "a seed left out": (
        setting("submission.json", "seeds", [1, 7]),
        ["train_seed1337.log", "does not have its seed"],
    ),
    "a seed twice": (
        setting("submission.json", "seeds", [1, 7, 7, 1337]),
        ["submission.json.seeds", "[1, 7, 1337]"],
    ),
    "seeds as text": (
        setting("submission.json", "seeds", ["../1"]),
        ["submission.json.seeds", "'../1'"],
    ),
    "no seeds": (setting("submission.json", "seeds", []), ["submission.json.seeds", "[]"]),
    "seed results left out": (
        setting("submission.json", "seed_results", {}),
        ["submission.json.seed_results.1:", "missing"],
    ),
    "cut JSON": (writing("submission.json", '{"seeds"'), ["submission.json", "no good JSON"]),
    "a list": (writing("submission.json", "[]"), ["submission.json", "not an object"]),
    "no UTF-8": (
        lambda f: (f / "submission.json").write_bytes(b"\xff\xfe"),
        ["submission.json", "no UTF-8"],
    ),
    "README is no UTF-8": (
        lambda f: (f / "README.md").write_bytes(b"\xff"),
        ["README.md", "no UTF-8"],
    ),
    "cut result": (writing(SEED7, "{"), [SEED7, "no good JSON"]),
    "NaN": (lambda f: replace(f / SEED7, '"val_bpb": ', '"val_bpb": NaN, "x": '), [SEED7, "NaN"]),
    "minus infinity": (setting(SEED7, "val_bpb", -math.inf), [SEED7, "-Infinity"]),
    "infinite": (
        lambda f: replace(f / SEED7, '"val_bpb": ', '"val_bpb": 1e999, "x": '),
        [SEED7, "1e999"],
    ),
    "thousands of digits": (
        lambda f: replace(f / SEED7, '"steps": ', '"steps": ' + "9" * 5000 + ', "x": '),
        [SEED7, "99999"],
    ),
    "deep": (writing(SEED7, "[" * 100_000 + "]" * 100_000), [SEED7, "no good JSON"]),
    "rather deep": (
        setting(SEED7, "data.x", json.loads("[" * 30 + "]" * 30)),
        [SEED7, "nested too deeply"],
    ),
    "a key twice": (
        lambda f: replace(f / "submission.json", '"date"', '"val_bpb": 0.5, "date"'),
        ["submission.json", "twice"],
    ),
    "steps as text": (setting(SEED7, "steps", "6"), [f"{SEED7}.steps", "'6'"]),
    "author as number": (
        setting("submission.json", "author", 3),
        ["submission.json.author", "3, not str"],
    ),
    "an author of two lines": (
        setting("submission.json", "author", "a\n\x1b[2J"),
        ["author", r"'a\n\x1b[2J'"],
    ),
    "a control character in a key": (
        setting("submission.json", "\x1b[2J", 1),
        [r"submission.json.\x1b[2J", "no log gives that"],
    ),
    "half a character": (setting("submission.json", "name", "\ud800"), ["name", r"\ud800"]),
    "a toggle without row": (
        setting(SEED7, "toggles.QAT", 1),
        [f"{SEED7}.toggles.QAT", "not an object"],
    ),
    "mean": (
        setting("submission.json", "val_bpb", 1.25),
        ["submission.json.val_bpb:", "1.25", "logs give"],
    ),
    "sd": (
        setting("submission.json", "val_bpb_std", 0.25),
        ["submission.json.val_bpb_std", "0.25", "logs give"],
    ),
    "a seed's figure": (
        setting("submission.json", "seed_results.7.val_bpb", 1.25),
        ["seed_results.7.val_bpb", "1.25"],
    ),
    "bytes": (
        setting("submission.json", "bytes_total", 12),
        ["submission.json.bytes_total", "12", "logs give"],
    ),
    "a verdict": (
        setting("submission.json", "compliance.train_under_600s", False),
        ["compliance.train_under_600s", "True"],
    ),
    "a verdict as number": (
        setting("submission.json", "compliance.train_under_600s", 1),
        ["train_under_600s", "True"],
    ),
    "hardware": (
        setting("submission.json", "hardware", "8xH100"),
        ["submission.json.hardware", "'8xH100'"],
    ),
    "a key of its own": (
        setting("submission.json", "p_value", 0.001),
        ["submission.json.p_value", "no log gives that"],
    ),
    "README's number": (
        lambda f: replace(f / "README.md", "| 7 | 6 |", "| 7 | 8 |"),
        ["README.md", "| 7 | 8 |", "| 7 | 6 |"],
    ),
    "README without marks": (writing("README.md", "# Good\n"), ["README.md", "<!-- generated -->"]),
    "README with two parts": (
        adding("<!-- generated -->\n<!-- end -->"),
        ["README.md", "one part"],
    ),
    "README's marks swapped": (
        writing("README.md", "<!-- end --><!-- generated -->"),
        ["README.md", "generated part"],
    ),
    "prose": (adding("We reach 0.987.\n"), ["README.md", "0.987"]),
    "prose before": (
        lambda f: replace(f / "README.md", "<!-- gen", "BPB0.4321!\n<!-- gen"),
        ["README.md", "0.4321"],
    ),
    "prose behind a comma": (adding("6,.98765"), ["README.md", ".98765"]),
    "prose with an exponent": (adding("p = 1.234e-7"), ["README.md", "1.234e-7"]),
    "prose at the end of a sentence": (adding("It is 0.9871."), ["README.md", "0.9871"]),
    "a log of other numbers": (
        lambda f: replace(f / "train_seed7.log", "RESULT val_bpb ", "RESULT val_bpb 1"),
        ["train_seed7.log", "final table", SEED7],
    ),
    "another seed's log": (
        lambda f: shutil.copy(f / "train_seed1.log", f / "train_seed7.log"),
        ["train_seed7.log", "final table"],
    ),
    "an empty log": (writing("train_seed7.log", ""), ["train_seed7.log", "final table"]),
    "another seed's result": (
        lambda f: shutil.copy(f / "result_seed1.json", f / SEED7),
        [SEED7, "seed is 1"],
    ),
    "exit code": (setting(SEED7, "exit_code", 3), ["seed 7", "exit_code=3", "over the size cap"]),
    "code hash": (setting(SEED7, "code_sha256", "0" * 64), ["code_sha256", "0" * 64, "seed 7"]),
    "config": (
        setting(SEED7, "config.prune_pct", 0.1),
        ["PRUNE_PCT", "0.0 with seed 1", "0.1 with seed 7"],
    ),
    "config hash": (setting(SEED7, "config_sha256", "0"), ["config_sha256", "'0'", "seed 7"]),
    "data": (setting(SEED7, "data.val_sha256", {}), ["data.val_sha256", "{}", "seed 7"]),
    "machine": (setting(SEED7, "device", "abacus"), ["device", "'abacus'", "seed 7"]),
    "only scored": (setting(SEED7, "config.eval_only", "x"), ["seed 7", "eval_only"]),
    "exported again": (setting(SEED7, "checkpoint", "x"), ["seed 7", "checkpoint"]),
    "other script": (
        lambda f: replace(f / "train_gpt.py", "import", "import  "),
        ["train_gpt.py", "sha256"],
    ),
    "other loader": (
        lambda f: replace(f / "train_gpt.py", "exec(", "import os; exec("),
        ["train_gpt.py", "sha256"],
    ),
    "no readable script": (without(READABLE_NAME), [READABLE_NAME, "No such file"]),
    "other readable script": (writing(READABLE_NAME, "x"), [READABLE_NAME, "sha256"]),
    "forged bytes of code": (lambda f: forge(f, "code_bytes", 5), [SEED7, "code_bytes is 5"]),
    "over the cap": (
        lambda f: forge(f, "artifact_bytes", 16_000_000, [7]),
        [SEED7, "over the cap of 16,000,000"],
    ),
    "training too long for the contest": (
        lambda f: (forge(f, "train_seconds", 600.5, [7]), claim(f)),
        ["submission.json.track, seed 7", "'10min_16mb', but train_seconds is 600.5, over 600"],
    ),
    "training over its own limit": (
        lambda f: (forge(f, "train_seconds", 9.5, [7]), limit(f, train=(9.5, 9.0))),
        [SEED7, "train took 9.5 s, over 9 s"],
    ),
    "a calibration too long for the contest": (
        lambda f: (
            forge(f, "train_seconds", 596.0, [7]),
            forge(f, "seconds.calibrate", 4.5, [7]),
            claim(f),
        ),
        [
            "submission.json.track, seed 7",
            "but train_seconds with calibration is 600.5, over 600",
        ],
    ),
    "a calibration over its limit": (
        lambda f: (forge(f, "seconds.calibrate", 4.5, [7]), limit(f, calibrate=(4.5, 4.0))),
        [SEED7, "calibrate took 4.5 s, over 4 s"],
    ),
    "a limit that was held against other seconds": (
        lambda f: limit(f, train=(3.5, 9.0)),
        [SEED7, "train took", "held against 3.5"],
    ),
    "a limit that nothing was held to": (
        lambda f: forge(f, "config.max_wallclock_seconds", 9.0),
        [SEED7, "limits have no row 'train'", "MAX_WALLCLOCK_SECONDS is 9.0"],
    ),
    "over a limit that was kept": (
        setting(SEED7, "over_limit", ["train"]),
        [SEED7, "over_limit is ['train'], but by its seconds it is []"],
    ),
    "training too long, by a result that knows no limits": (
        lambda f: (put(f / SEED7, "limits", {"train": 9}), put(f / SEED7, "train_seconds", 600.5)),
        [SEED7, "train took 600.5 s, over 600 s"],
    ),
    "scoring too long for the contest": (
        lambda f: (forge(f, "eval_seconds", 688.0, [7]), claim(f)),
        ["submission.json.track, seed 7", "eval_seconds is 688.0, over 600"],
    ),
    "scoring over its limit": (
        lambda f: (forge(f, "eval_seconds", 688.0), limit(f, **{"score sliding": (688.0, 600)})),
        [SEED7, "score sliding took 688.0 s, over 600 s"],
    ),
    "an inactive toggle": (
        lambda f: forge(f, "toggles.QAT.active", False, [7]),
        [SEED7, "QAT", "did nothing"],
    ),
    "a bpb that the bytes do not give": (
        lambda f: forge(f, "val_bytes", 10**6),
        [SEED7, "val_bpb", "do not give"],
    ),
    "a bpb of nothing": (
        lambda f: (forge(f, "val_bytes", 0), forge(f, "val_tokens", 0)),
        [SEED7, "val_bpb", "do not give"],
    ),
    "all hashes of the config forged": (
        lambda f: forge(f, "config_sha256", "0" * 64),
        [SEED7, "config_sha256", "train_gpt.py"],
    ),
    "settings left out": (
        lambda f: forge(f, "non_default", {}),
        [SEED7, "non_default", "train_gpt.py"],
    ),
    "a config that the script refuses": (
        lambda f: forge(f, "config.num_heads", 0),
        ["train_gpt.py", "NUM_HEADS=0"],
    ),
    "a missing module": (
        lambda f: ship(f, b"import helper_of_mine\n"),
        ["requirements.txt", "helper_of_mine"],
    ),
    "emptied requirements": (
        writing("requirements.txt", ""),
        ["requirements.txt", "numpy, rich, safetensors, sentencepiece, torch, zstandard"],
    ),
    "requirements without one": (
        lambda f: replace(f / "requirements.txt", "zstandard", "# zstandard"),
        ["requirements.txt", "lists no package of zstandard"],
    ),
    "a README that is a folder": (
        lambda f: ((f / "README.md").unlink(), (f / "README.md").mkdir()),
        ["README.md", "missing"],
    ),
    "a link": (linking("README.md", "submission.json"), ["README.md", "a link"]),
    "a link out of the folder": (linking("notes.txt", "../notes.txt"), ["notes.txt", "a link"]),
    "a link to a folder": (linking("more", ".."), ["more", "a link"]),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), ["pipe", "a device"]),
    "an absurd size": (
        lambda f: os.truncate(f / "train_seed7.log", 1 << 40),
        ["train_seed7.log", "1,099,511,627,776 bytes"],
    ),
}


@pytest.mark.parametrize("spoil, words", CAUGHT.values(), ids=CAUGHT)
def test_the_checker_catches(folder, spoil, words):
    spoil(folder)
    assert_caught(folder, *words)


CAUGHT_RUNNING = {
    "not Python": (lambda f: ship(f, b"def f(:\n"), ["train_gpt.py", "SyntaxError"]),
    "a zero byte": (lambda f: ship(f, b"x = '\0'\n"), ["train_gpt.py", "null bytes"]),
    "a script without the table": (lambda f: ship(f, b"x = 1\n"), ["train_gpt.py", "Config"]),
    "leaves when imported": (
        lambda f: ship(f, b"import os; os._exit(0)\n"),
        ["train_gpt.py", "ended early"],
    ),
}


@pytest.mark.parametrize("spoil, words", CAUGHT_RUNNING.values(), ids=CAUGHT_RUNNING)
def test_the_script_is_run_on_demand_alone(folder, spoil, words):
    spoil(folder)
    assert errors(folder) == []
    assert_caught(folder, "train_gpt.py", "--run-script", weight=UNCHECKED)
    assert_caught(folder, *words, run_script=True)


STUB = b"""%s
class Config:
    def __init__(self, **knobs): self.knobs = knobs
    def digest(self): return "%s"
    def non_default(self): return {}
def final_table(result): return "the table"
"""


@pytest.fixture
def stub(folder):
    """stub(line) -> the good folder with a small script that starts
    with this line and fits in every other way.
    """

    def make(line: bytes) -> Path:
        for seed in SEEDS:
            put(folder / f"result_seed{seed}.json", "non_default", {})
        ship(folder, STUB % (line, read(folder / SEED7)["config_sha256"].encode()))
        for seed in SEEDS:
            bpb = read(folder / f"result_seed{seed}.json")["val_bpb"]
            text = f"log\nthe table\nRESULT val_bpb {bpb:.6f} (a stub)\n"
            (folder / f"train_seed{seed}.log").write_text(text)
        return folder

    return make


def test_the_stub_alone_is_good(stub):
    assert errors(stub(b"pass"), run_script=True) == []


@pytest.mark.parametrize(
    "line, words",
    [
        (b"print('hello')", ["prints 'hello"]),
        (b"import sys; print('hello', file=sys.stderr)", ["prints 'hello"]),
        (b"open('here', 'w').close()", ["writes files"]),
        (b"open('train_seed7.log', 'a').write('x')", ["writes files"]),
        (b"import os; open(os.environ['HOME'] + '/x', 'w').close()", ["writes files"]),
        (b"import time; time.sleep(99)", ["not imported within 0.5 s"]),
        (b"1 / 0", ["ZeroDivisionError"]),
        (b"import sys; sys.exit('stop')", ["stop"]),
        (b"import json; json.dumps = lambda answer: '{'", ["answers"]),
        (b"import json; json.dumps = lambda answer: '[]'", ["final_table"]),
        (
            (
                b"import os; assert 'SECRET' not in os.environ and "
                b"os.environ['CUDA_VISIBLE_DEVICES'] == '', 'leak'; 1 / 0"
            ),
            ["ZeroDivisionError"],
        ),
    ],
)
def test_the_import_of_the_script_must_have_no_side_effect(stub, monkeypatch, line, words):
    monkeypatch.setenv("SECRET", "1")
    if b"sleep" in line:  # the others may take their time
        monkeypatch.setattr("ablation.script.IMPORT_SECONDS", 0.5)
    assert_caught(stub(line), "train_gpt.py", *words, run_script=True)


def test_the_script_is_not_run_when_something_else_is_wrong(stub, tmp_path):
    folder = stub(f"open({str(tmp_path / 'ran')!r}, 'w').close()".encode())
    (folder / "requirements.txt").unlink()
    assert_caught(folder, "requirements.txt", run_script=True)
    (folder / "requirements.txt").touch()
    (folder / "link").symlink_to("README.md")
    assert_caught(folder, "link", run_script=True)
    (folder / "link").unlink()
    assert errors(folder) == [] and not (tmp_path / "ran").exists()  # nor without being asked
    assert errors(folder, run_script=True) == [] and (tmp_path / "ran").exists()


def test_no_package_beside_the_script_takes_its_place(stub):
    folder = stub(b"pass")
    (folder / "train_gpt").mkdir()
    (folder / "train_gpt" / "__init__.py").write_text("1 / 0")
    assert errors(folder, run_script=True) == []


def test_no_cached_code_takes_the_place_of_the_script(stub, tmp_path):
    folder, other = stub(b"pass"), tmp_path / "other.py"
    other.write_text("1 / 0")
    cached = importlib.util.cache_from_source(str(folder / "train_gpt.py"))
    py_compile.compile(
        str(other),
        cached,
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    assert errors(folder, run_script=True) == []


def test_what_the_script_imports_may_lie_beside_it(stub):
    folder = stub(b"import helper_of_mine")
    (folder / "helper_of_mine.py").touch()
    assert errors(folder, run_script=True) == []


def test_a_missing_folder_is_one_problem(tmp_path):
    with pytest.raises(Refusal, match="nothing: no folder"):
        check_submission(tmp_path / "nothing")


def test_the_checker_changes_nothing(folder):
    def state():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}

    before = state()
    assert errors(folder) == [] and state() == before


def places(value, path=()) -> list[tuple]:
    """Paths of every value inside a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        place for key, part in inner for place in places(part, (*path, key))
    ]


@pytest.mark.parametrize(
    "name, watched",
    ids=["submission.json", SEED7],
    argvalues=[
        ("submission.json", ""),
        (
            SEED7,
            (
                "exit_code val_bpb val_loss val_tokens val_bytes quantised_val_bpb live_val_bpb "
                "averaged_val_bpb steps train_seconds eval_seconds artifact_bytes code_bytes "
                "total_bytes seed world_size device torch code_sha256 config_sha256"
            ),
        ),
    ],
)
def test_no_value_in_a_file_is_changed_unseen_or_makes_the_checker_stumble(
    folder, trusting, name, watched
):
    good, dice, unseen = (folder / name).read_text(), random.Random(0), set()
    odd = [
        None,
        False,
        -1,
        0.5,
        10**17,
        1e-300,
        "",
        "../../x",
        "a\nb",
        "\ud800",
        "<!-- end -->",
        [],
        [[]],
        {},
        {"": None},
    ]
    for place in places(json.loads(good)):
        whole = json.loads(good)
        *outer, last = place
        part = functools.reduce(lambda part, key: part[key], outer, whole)
        part[last] = dice.choice([value for value in odd if value != part[last]])
        (folder / name).write_text(json.dumps(whole))
        problems = errors(folder)
        assert all(type(p) is str and p.isprintable() for p in problems), place
        unseen |= set() if problems else {place[0]}
    assert not unseen & set(watched.split() or json.loads(good))

"""What runs leave behind: a folder each where they ran, a line each where they are committed.

Would have caught: 648 files of single results that nobody looks through; a figure that is lost
or changed when they are put together; a table made of half a study; a file that a stranger
damaged and that is believed all the same.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from pages_studies import COMMITTED, STUDIES, adopt, study

import train_gpt
from ablation import records
from ablation.page import html_page
from ablation.records import (
    MAX_PART_BYTES,
    METRICS,
    RESULTS,
    RunStore,
    find_runs,
    keep,
    load_lines,
    parts,
)
from ablation.report import how_made, load_matrix, markdown_report, tables
from ablation.runner import Ledger, Runner
from ablation.study import Matrix, matrix, read_study
from train_gpt import Config, Refusal

EACH_STUDY = pytest.mark.parametrize("name", STUDIES, ids="-".join)
ARMS = {"plain": 0, "qat": 1}
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory) -> Matrix:
    """A study of two arms and two seeds that has run, in a folder per trial."""
    folder = tmp_path_factory.mktemp("ran")
    fixed = ("iterations", "max_wallclock_seconds")
    env = {name.upper(): value for name, value in TINY.items() if name not in fixed}
    env |= {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}
    lines = ["[size.small]", "steps = 4", "seconds = 2.0", "[env]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in env.items()]
    lines += [f"[arm.{arm}]\nQAT_ENABLED = {on}" for arm, on in ARMS.items()]
    (folder / "tiny.toml").write_text("\n".join(lines))

    made = matrix(read_study(folder / "tiny.toml"), "small", "steps", SEEDS, folder / "runs")
    made.folder.mkdir()
    for trial in made.trials:
        assert train_gpt.main(Config.from_env(trial.env))["exit_code"] == 0
    return made


@pytest.fixture
def in_folders(ran, tmp_path) -> Matrix:
    """The same, to be spoilt."""
    folder = Path(shutil.copytree(ran.folder, tmp_path / "runs"))
    return matrix(ran.study, "small", "steps", SEEDS, folder)


@pytest.fixture
def in_lines(in_folders) -> Matrix:
    """The same as lines, without a folder."""
    runs = runs_of(in_folders)
    keep(in_folders.folder, runs)
    for trial in runs:
        shutil.rmtree(in_folders.folder / trial)
    return in_folders


def runs_of(made: Matrix) -> dict[str, dict]:
    store = RunStore(made.folder)
    return {trial.id: store.find(trial.id) for trial in made.trials}


def report_of(made: Matrix) -> tuple[str, str]:
    """The report as Markdown and as a page."""
    found = load_matrix(made)
    page = html_page(made.study.title, how_made(found), tables(found), found.all())
    return markdown_report(found), page


def test_a_run_says_on_what_kernel_and_gpu_it_ran(ran):
    said = {(run["attention"], run["gpu"]) for run in runs_of(ran).values()}
    assert said == {("sdpa", None)}


# ── A line each ───────────────────────────────────────────────────────────────────────────────────
def test_the_report_from_lines_equals_the_report_from_folders(ran, in_folders):
    before = report_of(in_folders)
    keep(in_folders.folder, runs_of(in_folders))
    for trial in in_folders.trials:
        shutil.rmtree(trial.folder)
    assert sorted(path.name for path in in_folders.folder.iterdir()) == [
        "metrics.jsonl",
        "results.jsonl",
    ]
    assert report_of(in_folders) == before
    assert "<svg" in before[1] and "qat - plain" in before[0]


def test_lines_hold_every_value_of_the_files_of_a_run(ran, in_lines):
    for trial, run in load_lines(in_lines.folder).items():
        result = json.loads((ran.folder / trial / "result.json").read_text())
        lines = (ran.folder / trial / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        name = str(in_lines.folder / trial)
        assert json.dumps(run) == json.dumps(result | {"name": name, "events": events})
        assert not result.keys() & {"name", "events"}
        assert not any("trial" in event for event in events)


def test_a_line_names_its_trial(in_lines):
    lines = (in_lines.folder / "results.jsonl").read_text().splitlines()
    named = [[json.loads(line)[key] for key in ("trial", "arm", "seed")] for line in lines]
    assert named == [[trial.id, trial.arm, trial.seed] for trial in in_lines.trials]
    events = (in_lines.folder / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["trial"] for line in events} == {line[0] for line in named}


def test_what_stands_in_lines_is_never_run_again(in_lines):
    assert Runner(in_lines).todo == []


def test_a_folder_counts_before_its_line(ran, in_lines):
    trial = in_lines.trials[0]
    shutil.copytree(ran.folder / trial.id, trial.folder)
    path = trial.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_bpb": 9.0}))
    assert load_matrix(in_lines).runs[trial.arm][trial.seed]["val_bpb"] == 9.0


def test_patterns_find_runs_in_folders_and_in_lines(ran, in_lines):
    for folder in (ran.folder, in_lines.folder):
        found = find_runs([f"{folder}/qat-s*", f"{folder}/plain-s1", f"{folder}/qat-s1"])
        names = [Path(run["name"]).relative_to(folder).as_posix() for run in found]
        assert names == ["plain-s1", "qat-s1", "qat-s2"]
    assert find_runs([f"{ran.folder}/nobody*", "nowhere/qat-s*"]) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"val_bpb": ', '"val_bpb": "', "no good JSON"),
        ('"exit_code": 0', '"exit_code": "0"', "exit_code: '0', not int"),
        ('"exit_code": 0', '"exit_code": NaN', "no number to work with"),
        ('"exit_code": 0', '"exit_code": 0, "exit_code": 0', "a key stands there twice"),
        ('"trial": "qat-s1"', '"trial": 3', "trial: 3, not str"),
        ('"trial": "qat-s1"', '"trial": "plain-s1"', "'plain-s1' stands there twice"),
        ('"val_bytes": ', '"val_bytes": -', "run it again"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(in_lines, old, new, words):
    path = in_lines.folder / "results.jsonl"
    lines = path.read_text().split("\n")
    assert old in lines[1]
    lines[1] = lines[1].replace(old, new, 1)
    path.write_text("\n".join(lines))
    with pytest.raises(Refusal, match=r"results\.jsonl, line 2") as refusal:
        load_matrix(in_lines)
    assert words in str(refusal.value)


def test_events_that_a_crash_left_are_passed_over(in_lines):
    before = load_lines(in_lines.folder)
    with (in_lines.folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"event": "step"}\n{"trial": ["qat-s1"]}\n{"trial": "qat-s1", "ev')
    assert load_lines(in_lines.folder) == before


def test_lines_beyond_a_part_follow_in_the_next_one(in_lines, monkeypatch):
    runs = load_lines(in_lines.folder)
    whole = (in_lines.folder / RESULTS).read_bytes()
    longest = max(map(len, whole.splitlines(keepends=True)))
    monkeypatch.setattr(records, "MAX_PART_BYTES", 2 * longest)
    keep(in_lines.folder, runs)
    found = list(parts(in_lines.folder, RESULTS))
    assert [path.name for path in found] == ["results.jsonl", "results-2.jsonl"]
    assert b"".join(path.read_bytes() for path in found) == whole
    assert load_lines(in_lines.folder) == runs

    monkeypatch.undo()
    keep(in_lines.folder, runs)
    names = [path.name for path in in_lines.folder.iterdir()]
    assert sorted(names) == ["metrics.jsonl", "results.jsonl"]


# ── The committed studies ─────────────────────────────────────────────────────────────────────────
@EACH_STUDY
def test_every_trial_of_a_committed_study_has_its_line_or_its_reason(name):
    made = study(*name)
    runs = load_lines(made.folder)
    failed = Ledger(made.folder).failures(made.trials)
    assert runs.keys() | failed.keys() == {trial.id for trial in made.trials}
    for run in runs.values():
        kinds = [event["event"] for event in run["events"]]
        assert (kinds[0], kinds[-1]) == ("start", "result")


def test_a_committed_study_is_three_files_in_parts_that_can_be_looked_through():
    # report.md and report.html are what `ablate.py report` makes of them; git ignores those
    files = [path for path in COMMITTED.rglob("*") if path.is_file()]
    paths = [path for path in files if path.stem != "report"]
    wanted = []
    for name in STUDIES:
        folder = study(*name).folder
        wanted += [folder / "ledger.jsonl", *parts(folder, RESULTS), *parts(folder, METRICS)]
    assert sorted(paths) == sorted(wanted)
    assert max(path.stat().st_size for path in paths) <= MAX_PART_BYTES


def test_folders_of_runs_become_the_committed_lines_byte_for_byte(tmp_path):
    """What `make studies-small` ends with, on folders made of a committed study."""
    name = ("swa_sums_in_bf16", "small", "steps")
    made = study(*name, tmp_path / "logs")
    kept = study(*name).folder
    for trial, run in load_lines(kept).items():
        folder = made.folder / trial
        folder.mkdir(parents=True)
        result = {key: value for key, value in run.items() if key not in ("name", "events")}
        (folder / "result.json").write_text(json.dumps(result, indent=1))
        lines = [json.dumps(event) + "\n" for event in run["events"]]
        (folder / "metrics.jsonl").write_text("".join(lines))
    shutil.copy(kept / "ledger.jsonl", made.folder)

    adopt(tmp_path / "logs", tmp_path / "kept")
    (adopted,) = (tmp_path / "kept").glob("*/*")
    assert adopted.relative_to(tmp_path / "kept") == kept.relative_to(COMMITTED)
    for path in kept.iterdir():
        assert (adopted / path.name).read_bytes() == path.read_bytes()


def test_a_study_that_is_not_complete_leaves_the_committed_one_alone(tmp_path):
    made = study("swa_sums_in_bf16", "small", "steps", tmp_path / "logs")
    made.folder.mkdir(parents=True)
    adopt(tmp_path / "logs", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()

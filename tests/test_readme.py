"""README.md and submission.json say what the code and the committed log say.

Would have caught: commands that set variables no script reads, hand-copied numbers, tables that drifted from the code.
"""

import json
import re
import subprocess
import sys

import pytest
import readme_tables

import train_gpt
from ablation.study import matrix, read_study
from ablation.submission import check_submission

ROOT = readme_tables.ROOT
README = (ROOT / "README.md").read_text()


def test_generated_blocks_are_up_to_date():
    assert readme_tables.rendered(README) == README
    assert set(re.findall(r"<!-- generated: ([\w-]+) -->", README)) == set(readme_tables.BLOCKS)


def test_the_example_study_of_readme_is_a_whole_study(tmp_path):
    (tmp_path / "mine.toml").write_text(re.search(r"```toml\n(.*?)```", README, re.S)[1])
    m = matrix(read_study(tmp_path / "mine.toml"), "small", "steps")
    assert [t.arm for t in m.trials[:4]] == [
        "qat-0_average-none",
        "qat-0_average-ema",
        "qat-1_average-none",
        "qat-1_average-ema",
    ]
    assert len(m.trials) == 12 and len(m.groups()) == 6


def test_the_committed_logs_of_studies_are_small():
    files = [
        path
        for path in (ROOT / "logs/studies").rglob("*")
        if path.name in ("result.json", "metrics.jsonl", "ledger.jsonl")
    ]
    assert len(files) > 100 and max(path.stat().st_size for path in files) < 100_000


def test_the_submission_folder_is_good_and_submission_json_is_its_own():
    assert check_submission(ROOT / "logs/submission") == []
    assert (ROOT / "submission.json").read_bytes() == (
        ROOT / "logs/submission/submission.json"
    ).read_bytes()


def test_every_setting_that_readme_names_exists():
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", README)) - {
        "PIP_EXTRA_INDEX_URL",
        "SEED194",
        "RECORD1855",
        "OMP_NUM_THREADS",
        "GOMP_SPINCOUNT",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "GPUS",
    }
    assert len(named) > 10 and named <= {f.name.upper() for f in train_gpt.KNOBS} | set(
        train_gpt.ALIASES
    )


@pytest.mark.parametrize("name, test", readme_tables.fault_tests(), ids="::".join)
def test_every_fault_of_readme_is_shown_by_a_test(name, test):
    assert re.search(rf"^def {test}\(", (ROOT / f"tests/{name}.py").read_text(), re.MULTILINE)


def test_every_make_target_that_readme_names_exists():
    targets = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"train", "test"} <= targets
    subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "command",
    [
        ["train_gpt.py", "--help"],
        ["prepare_data.py", "--help"],
        ["prepare_data.py", "fineweb", "--help"],
        ["ablate.py", "--help"],
        *(["bench.py", name, "--help"] for name in ("run", "show", "peers")),
        *(
            ["ablate.py", name, "--help"]
            for name in ("run", "report", "compare", "sweep", "submission", "check")
        ),
    ],
)
def test_the_commands_of_readme_start(command):
    shown = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert len(shown.splitlines()) >= 10 and "--help" in shown


def test_every_file_that_readme_names_exists():
    for name in (
        "train_gpt.py",
        "prepare_data.py",
        "submission.json",
        "Makefile",
        ".ci/run",
        "requirements.txt",
        "logs/demo",
    ):
        assert name in README and (ROOT / name).exists(), name


def test_the_demo_is_one_good_run():
    result = json.loads((readme_tables.DEMO / "result.json").read_text())
    events = [
        json.loads(line) for line in (readme_tables.DEMO / "metrics.jsonl").read_text().splitlines()
    ]
    assert result["exit_code"] == 0 and result["under_cap"] and result["val_bpb"] < 2.5
    assert events[0]["config"] == result["config"] and events[-1]["val_bpb"] == result["val_bpb"]

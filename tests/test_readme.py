"""README.md, docs/ and submission.json say what the code and the committed logs say.

Would have caught: commands that set variables no script reads, hand-copied numbers, tables that
drifted from the code; an example study that quantised nothing and exited 4; a README of 1,234 lines
that nobody finished.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import readme_tables
from conftest import make_data
from demo_picture import demo_picture
from launch import script

import train_gpt
from ablation.check import check_submission

ROOT = readme_tables.ROOT
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in readme_tables.PAGES}
EVERYTHING = "\n".join(PAGES.values())


@pytest.mark.parametrize("page", PAGES)
def test_generated_blocks_are_up_to_date(page):
    assert readme_tables.rendered(PAGES[page]) == PAGES[page]


def test_every_generated_block_stands_on_a_page():
    named = re.findall(r"<!-- generated: ([\w-]+) -->", EVERYTHING)
    assert sorted(named) == sorted(readme_tables.BLOCKS)


def test_the_picture_is_that_of_the_demo():
    assert readme_tables.PICTURE.read_text() == demo_picture(readme_tables.DEMO)


def test_readme_is_a_page_that_one_reads_to_its_end():
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 25_000


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+)\)", README))
    pages = {path.relative_to(ROOT).as_posix() for path in readme_tables.PAGES}
    assert linked >= pages - {"README.md"}


def anchors(page: str) -> set[str]:
    """Names by which a page's headings can be linked."""
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", readme_tables.PAGES, ids=lambda path: path.name)
def test_every_link_within_the_repository_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_the_ablation_of_readme_runs_as_it_is_printed(tmp_path):
    section = README.partition("## An ablation in ten lines")[2].partition("\n## ")[0]
    study = re.search(r"```toml\n(.*?)```", section, re.S)[1]
    command = re.search(r"^python (.+)$", section, re.M)[1]
    for name in ("ablate.py", "train_gpt.py", "prepare_data.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "ablation", tmp_path / "ablation")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "mine.toml").write_text(study)
    (tmp_path / "data" / "demo").mkdir(parents=True)
    make_data(tmp_path / "data" / "demo", 1024)

    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    quantised = [r["toggles"].get("QAT", {"tensors": None})["tensors"] for r in results]
    assert len(results) == 4 and quantised.count(None) == 2
    assert min(n for n in quantised if n is not None) > 0
    assert len(study.splitlines()) <= 11


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


def test_every_setting_that_a_page_names_exists():
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", EVERYTHING)) - {
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
def test_every_fault_of_the_table_is_shown_by_a_test(name, test):
    assert re.search(rf"^def {test}\(", (ROOT / f"tests/{name}.py").read_text(), re.MULTILINE)


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", EVERYTHING, re.M))
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
def test_the_commands_start(command):
    code, shown = script(*command)
    assert code == 0 and len(shown.splitlines()) >= 10 and "--help" in shown


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

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
from pathlib import Path
from types import SimpleNamespace

import pages
import pages_code
import pytest
import torch
from conftest import PAIRS_OF_A_RUN, make_data
from demo_picture import demo_picture
from fault_table import fault_tests
from launch import Forked, script
from pages_demo import DEMO

import ablate
import train_gpt
from ablation.check import check_submission
from ablation.findings import ERROR, UNCHECKED
from ablation.study import matrix, read_study

ROOT = pages.ROOT
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in pages.PAGES}
EVERYTHING = "\n".join(PAGES.values())


def test_every_toggle_that_proves_something_has_a_row():
    proofs = set(re.findall(r'\["([A-Z_]+)"\] = Activity\(', train_gpt.SOURCE.decode()))
    assert {"GPTQ", "LQER", "PRUNE_PCT", "NUM_LOOPS"} <= proofs
    # WARMDOWN is no technique: every schedule has one
    for name in proofs - {"WARMDOWN"}:
        assert any(row.startswith(name) for row in pages_code.toggle_names()), name


@pytest.mark.parametrize("page", PAGES)
def test_generated_blocks_are_up_to_date(page):
    assert pages.rendered(PAGES[page]) == PAGES[page]


def test_every_generated_block_stands_on_a_page():
    named = re.findall(r"<!-- generated: ([\w-]+) -->", EVERYTHING)
    assert sorted(named) == sorted(pages.BLOCKS)


def test_the_picture_is_that_of_the_demo():
    assert pages.PICTURE.read_text() == demo_picture(DEMO)


def test_readme_is_a_page_that_one_reads_to_its_end():
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 25_000


def prose(page: str) -> list[str]:
    """Its lines, without generated blocks, tables and the targets of links."""
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", PAGES[page], flags=re.S)
    lines = re.sub(r"\]\([^)]*\)", "]", text).splitlines()
    return [line for line in lines if not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_a_page_are_short(page):
    assert [line for line in prose(page) if len(line) > 110] == []


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+)\)", README))
    every = {path.relative_to(ROOT).as_posix() for path in pages.PAGES}
    assert linked >= every - {"README.md"}


def anchors(page: str) -> set[str]:
    """Names by which a page's headings can be linked."""
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.name)
def test_every_link_within_the_repository_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def printed_study(page: str) -> str:
    """The first study that a page prints."""
    return re.search(r"```toml\n(.*?)```", PAGES[page], re.S)[1]


@pytest.fixture
def fresh_clone(tmp_path, monkeypatch) -> Path:
    """A folder with train_gpt.py and the demo's data, where ablate.py runs its trials (forked)."""
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    demo = tmp_path / "data" / "demo"
    demo.mkdir(parents=True)
    make_data(demo, 1024)
    (tmp_path / "studies").mkdir()

    for module in ("ablate", "ablation.study", "ablation.runner"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    quick = SimpleNamespace(**vars(subprocess) | {"Popen": Forked})
    monkeypatch.setattr("ablation.runner.subprocess", quick)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_ablation_of_readme_runs_as_it_is_printed(fresh_clone):
    study = printed_study("README.md")
    (fresh_clone / "studies" / "mine.toml").write_text(study)
    command = re.search(r"^python ablate.py (run .+)$", README, re.M)[1]
    assert ablate.main(shlex.split(command)) == 0

    (folder,) = fresh_clone.glob("logs/runs/mine/*")
    quantised = {}
    for path in folder.glob("*/result.json"):
        toggles = json.loads(path.read_text())["toggles"]
        quantised[path.parent.name] = "QAT" in toggles and toggles["QAT"]["tensors"]
    on = [name for name, tensors in quantised.items() if tensors]
    assert sorted(on) == ["qat_enabled-1-s1", "qat_enabled-1-s2"] and len(quantised) == 4

    report = (folder / "report.md").read_text()
    # narrower with QAT; two seeds may show it or not, so in words it is one or the other
    answer = r"^\| qat_enabled-1 - qat_enabled-0 \| quantisation gap, BPB \| -0\.\d+ \| .* is "
    assert re.search(answer, report, re.M)
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("page", ["README.md", "ablations.md"])
def test_a_printed_study_is_short_and_quantises_something(page, tmp_path):
    study = printed_study(page)
    lines = study.splitlines()
    assert len(lines) <= {"README.md": 12, "ablations.md": 30}[page]
    assert max(len(line) for line in lines) <= 100

    (tmp_path / "mine.toml").write_text(study)
    for trial in matrix(read_study(tmp_path / "mine.toml"), "small", "steps").trials:
        with torch.device("meta"):
            plan = train_gpt.export_plan(trial.cfg, train_gpt.GPT(trial.cfg))
        assert any(isinstance(how, train_gpt.Grid) for how in plan.values()), trial.id


def test_the_longer_study_has_the_arms_that_its_page_promises(tmp_path):
    (tmp_path / "mine.toml").write_text(printed_study("ablations.md"))
    m = matrix(read_study(tmp_path / "mine.toml"), "small", "steps")
    assert [t.arm for t in m.trials[:4]] == [
        "qat-0_average-none",
        "qat-0_average-ema",
        "qat-1_average-none",
        "qat-1_average-ema",
    ]
    # an arm that differs in AVERAGE alone exports the checkpoint of the other one
    assert len(m.trials) == 12 and len(m.groups()) == 6


def test_the_submission_folder_is_good_and_submission_json_is_its_own():
    found = check_submission(ROOT / "logs/submission", run_script=True)
    assert [str(one) for one in found if one.weight in (ERROR, UNCHECKED)] == []
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
        "NAME",
        "PROMPT",
        "RANKS",
        "SIZE",
    }
    assert len(named) > 10 and named <= {f.name.upper() for f in train_gpt.KNOBS} | set(
        train_gpt.ALIASES
    )


@pytest.mark.parametrize("name, test", fault_tests(), ids="::".join)
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
        ["sample.py", "--help"],
        *(["bench.py", name, "--help"] for name in ("run", "show", "peers")),
        *(
            ["ablate.py", name, "--help"]
            for name in (
                "run",
                "report",
                "compare",
                "sweep",
                "sensitivity",
                "submission",
                "check",
            )
        ),
    ],
)
def test_the_commands_start(command):
    code, shown = script(*command)
    assert code == 0 and len(shown.splitlines()) >= 10 and "--help" in shown


def test_the_files_of_a_run_stand_on_their_page():
    """Those that train_gpt.py names, but for what prepare_data.py and a submission write, and for
    the script beside it.
    """
    source = (ROOT / "train_gpt.py").read_text()
    names = set(re.findall(r"[\"/](\w[\w.]*\.(?:bin|jsonl?|log|py))\"", source))
    names -= {"manifest.json", train_gpt.READABLE_NAME, "ablate.py"}
    assert {"train.log", "artifact.bin", train_gpt.PACKED_NAME} <= names
    folder = PAGES["how_it_works.md"].partition("## The folder of a run")[2]
    assert [name for name in names if f"| `{name}` |" not in folder] == []


def test_the_fields_of_every_event_stand_on_their_page():
    metrics = (DEMO / "metrics.jsonl").read_text().splitlines()
    folder = PAGES["how_it_works.md"].partition("## The folder of a run")[2]
    for event in map(json.loads, metrics):
        row = re.search(rf"^\| `{event['event']}` \| (.*) \|$", folder, re.M)[1]
        assert [name for name in event.keys() - {"event", "t"} if name not in row] == []


def test_the_columns_of_the_toggles_stand_on_their_page():
    page = PAGES["how_it_works.md"].partition("## The table of toggles")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| .* \| ([\w, ]+) \|$", page, re.M)
    activity = train_gpt.Activity(steps=[1]).row(2)
    result = {"toggles": {"QAT": activity | {"cost_ms": 1.0}}}
    (effects,) = train_gpt.toggle_rows(result).values()
    (costs,) = train_gpt.cost_rows(result).values()
    assert [name for name, _ in rows] == [*effects, *costs]
    keys = {key for _, names in rows for key in names.split(", ")}
    assert keys == activity.keys() - {"tensors", "params"}
    for figure in (
        f"at most {train_gpt.PROBE_TOKENS:,} tokens",
        f"{train_gpt.BLOCKS} stretches",
        f"take {train_gpt.COST_SECONDS:g} s",
        f"taken {train_gpt.COMPILE_SECONDS:g} s",
    ):
        assert figure in page
    assert (train_gpt.PROBE_STEPS, PAIRS_OF_A_RUN) == (8, 9)  # eight batches, nine pairs


def test_the_printed_figures_of_ans_can_be_made(capsys):
    code = re.search(r"^python - <<END\n(.*?)^END$", PAGES["speed.md"], re.M | re.S)[1]
    assert "52736, 512" in code
    exec(code.replace("52736", "96"), {})
    assert re.fullmatch(r"\d+\.\d s to code, \d+\.\d s to decode\n", capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """Paths in code spans, below the folders of this repository."""
    named = re.findall(r"`((?:tests|studies|benchmarks|ablation|docs|logs)/[\w./]+)`", PAGES[page])
    written_by_users = {"logs/runs", "studies/mine.toml"}
    for name in set(named) - written_by_users:
        assert (ROOT / name).exists() or "RUN_ID" in name, name


def test_every_file_that_readme_names_exists():
    for name in (
        "train_gpt.py",
        "prepare_data.py",
        "sample.py",
        "submission.json",
        "Makefile",
        ".ci/run",
        "requirements.txt",
        "logs/demo",
    ):
        assert name in README and (ROOT / name).exists(), name


def test_the_demo_is_one_good_run():
    result = json.loads((DEMO / "result.json").read_text())
    events = [json.loads(line) for line in (DEMO / "metrics.jsonl").read_text().splitlines()]
    assert result["exit_code"] == 0 and result["under_cap"] and result["val_bpb"] < 2.5
    assert events[0]["config"] == result["config"] and events[-1]["val_bpb"] == result["val_bpb"]

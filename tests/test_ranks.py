"""bench.py ranks: ranks x threads for this CPU, by a measurement that never ends a run.

Here mostly a made measurement: no test is about seconds. Would have caught: a choice that flips by
noise, one that is kept from a busy moment, a damaged file that stops make train.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment

from benchmarks import ranks
from benchmarks.ranks import Arrangement, arrangements, choose, fastest, say_choice
from train_gpt import main


@pytest.mark.parametrize(
    "cores, rows, found",
    [
        (1, 4, [(1, 1)]),
        (2, 4, [(2, 1), (1, 2)]),
        (3, 4, [(2, 1), (1, 3)]),
        (16, 4, [(2, 1), (4, 4), (1, 16)]),
        (2, 1, [(1, 2)]),
        (4, 0, []),
    ],
)
def test_what_is_tried_uses_all_cores_and_no_more_ranks_than_rows(cores, rows, found):
    tried = arrangements(cores, rows)
    # three cores in two ranks: what the usual one leaves idle is no other arrangement
    assert [a for a in tried if a != (2, 1) or rows > 1] == found


def test_noise_does_not_change_the_usual_arrangement():
    usual, other = Arrangement(2, 1), Arrangement(1, 2)
    assert fastest({usual: 1.02, other: 1.0}, usual) == usual
    assert fastest({usual: 1.04, other: 1.0}, usual) == other
    assert fastest({other: 1.0}, usual) == other


@pytest.fixture
def measured(monkeypatch):
    """Two quiet cores on which 1 x 2 is faster; the configurations for which that was measured."""
    monkeypatch.setattr(ranks, "cores_here", lambda: 2)
    monkeypatch.setattr(ranks.os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    calls = []

    def measure(cfg, candidates):
        calls.append(cfg)
        return dict(zip(candidates, (0.2, 0.1), strict=True))

    monkeypatch.setattr(ranks, "measure", measure)
    return calls


SETTINGS = ["TRAIN_SEQ_LEN=64", "TRAIN_BATCH_TOKENS=512"]


def test_what_was_found_is_remembered_for_the_machine_and_the_model(
    measured, tmp_path, monkeypatch
):
    path = tmp_path / "ranks.json"
    arrangement, line = choose(SETTINGS, path)
    assert arrangement == (1, 2) and "2 x 1 200.0, 1 x 2 100.0" in line
    again, line = choose([*SETTINGS, "SEED=7", "MATRIX_LR=0.1"], path)
    assert again == (1, 2) and "as measured before" in line and len(measured) == 1
    choose([*SETTINGS, "NUM_LAYERS=3"], path)
    assert len(measured) == 2
    monkeypatch.setattr(ranks, "cores_here", lambda: 3)
    choose(SETTINGS, path)
    assert len(measured) == 3


def test_what_was_found_at_a_busy_moment_is_not_remembered(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks.os, "getloadavg", lambda: (9.0, 0.5, 0.5))
    path = tmp_path / "ranks.json"
    arrangement, line = choose(SETTINGS, path)
    assert arrangement == (1, 2) and "not remembered" in line and not path.exists() and measured


@pytest.mark.parametrize("text", ["", "[1]", '{"a": [0, 1]}', '{"a": "x"}', '{"a": [1, 2, 3]}'])
def test_a_damaged_file_is_as_none(measured, tmp_path, text):
    path = tmp_path / "ranks.json"
    path.write_text(text)
    assert choose(SETTINGS, path)[0] == (1, 2)
    assert list(json.loads(path.read_text()).values()) == [[1, 2]]


def test_a_run_that_goes_on_takes_what_was_found_last(measured, tmp_path):
    """Its settings lie in its file."""
    path = tmp_path / "ranks.json"
    goes_on = ["CHECKPOINT=x"]
    assert choose(goes_on, path) == ((2, 1), "")
    choose(SETTINGS, path)
    assert choose(goes_on, path)[0] == (1, 2) and len(measured) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"world_size": 3}', "real"])
def test_a_resumed_run_takes_what_it_began_with(measured, tiny, tmp_path, text):
    """Whatever was found for other runs since: packed documents lie otherwise on other ranks."""
    cfg = tiny(iterations=1)
    path = tmp_path / "ranks.json"
    choose(SETTINGS, path)
    folder = Path(cfg.logs_dir) / cfg.run_id
    if text == "real":
        main(cfg)
    else:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(text)
    goes_on = ["RESUME=1", f"RUN_ID={cfg.run_id}", f"LOGS_DIR={cfg.logs_dir}"]
    began = (1, torch.get_num_threads()) if text == "real" else (1, 2)
    found, line = choose(goes_on, path)
    assert found == began and ("as the run began" in line) == (text == "real")


def test_whatever_goes_wrong_the_usual_arrangement_is_printed(
    measured, tmp_path, monkeypatch, capsys
):
    def broken(cfg, candidates):
        raise MemoryError

    monkeypatch.setattr(ranks, "measure", broken)
    say_choice(SETTINGS, tmp_path / "ranks.json")
    out, err = capsys.readouterr()
    assert out == "2 1\n" and "not measured (MemoryError)" in err
    say_choice(["TYPO=1"], tmp_path / "ranks.json")
    assert capsys.readouterr() == ("2 1\n", "")


def test_groups_of_processes_make_steps_in_turn(tiny, tmp_path):
    """In earnest, two rows, all loops; three ranks are one too many and left out."""
    code = (
        "import sys; from pathlib import Path; from benchmarks import ranks;"
        "ranks.cores_here = lambda: 2; pairs = [(2, 1), (1, 2), (3, 1)];"
        "ranks.arrangements = lambda *_: [ranks.Arrangement(*pair) for pair in pairs];"
        "step = ranks.Trainer.step;"
        "ranks.Trainer.step = lambda self, batch, now: 1 / now.loops and step(self, batch, now);"
        "ranks.say_choice([], Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ranks.json")],
        cwd=ROOT,
        env=environment(tiny(train_batch_tokens=128, num_loops=1, loop_start=0, loop_end=0))
        | {"GOMP_SPINCOUNT": "1000"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout in ("2 1\n", "1 2\n")
    assert re.search(r"\(ms of a step: 2 x 1 [\d.]+, 1 x 2 [\d.]+; measured", done.stderr)

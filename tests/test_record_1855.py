"""The published command of #1855 on a model of 32 dimensions: the whole way that a record goes.

Training with loops, lanes, gates and packed documents of CaseOps, then GPTQ, LQER, packing, reading
back, and the score of adapters that learn document by document, with phases of SGD. Failures that
these tests would have caught: a toggle of the command that does nothing; a score that cannot be
taken again from the artifact alone; a calibration that a resumed run makes otherwise.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from launch import codes, finish
from pages_frontier import command
from test_caseops import prepare, texts_of
from test_faults import at_step
from test_score import two_ranks

import train_gpt
from train_gpt import Config

# Of the command, what depends on the size of the model and of the run
SHAPES = dict(
    VOCAB_SIZE=384,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    ROPE_DIMS=4,
    TRAIN_SEQ_LEN=64,
    EVAL_SEQ_LEN=64,
    TRAIN_BATCH_TOKENS=512,
    DOC_MAX_LEN=64,
    ITERATIONS=12,  # the last below the floor of MIN_LR
    MAX_WALLCLOCK_SECONDS=0,
    WARMUP_STEPS=1,
    KEEP_FLOAT_MAX_NUMEL=512,
    VAL_MAX_TOKENS=600,
    GPTQ_CALIBRATION_BATCHES=2,
    GPTQ_RESERVE_SECONDS=0,
    LQER_ASYM_GROUP=16,
    TTT_LORA_RANK=4,
    TTT_CHUNK_SIZE=16,
    TTT_BATCH_SIZE=2,
    PHASED_TTT_PREFIX_DOCS=3,
    GLOBAL_TTT_CHUNK_TOKENS=128,
)


@pytest.fixture(scope="module")
def record(tmp_path_factory, worker_id) -> Config:
    folder = tmp_path_factory.mktemp("record")
    texts = [text[:500] for text in texts_of(70)]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = folder / "data"
    options = ("--transform", "caseops", "--vocab-size", "384", "--val-docs", "6")
    assert prepare(source, data, *options) == 0
    paths = dict(
        DATA_PATH=data,
        TOKENIZER_PATH=data / "tokenizer.model",
        LOGS_DIR=folder / "logs",
        RUN_ID="whole",
    )
    settings = {"BASE": "pr1855", **command("pr1855"), **SHAPES, **paths}
    cfg = Config.from_env({name: str(value) for name, value in settings.items()})
    # a launch gets the settings spelt out
    return dataclasses.replace(cfg, base="")


def result(cfg: Config) -> dict:
    return json.loads((Path(cfg.logs_dir) / cfg.run_id / "result.json").read_text())


@pytest.fixture(scope="module")
def whole(record) -> dict:
    """The result of one rank that is not stopped."""
    run = finish(record)
    assert codes(run) == [0], run.stderr()
    return result(record)


def test_every_toggle_of_the_command_acts(record, whole):
    assert whole["exit_code"] == 0 and whole["inactive"] == []
    active = {name for name, row in whole["toggles"].items() if row["active"]}
    assert active >= {"NUM_LOOPS", "GPTQ", "LQER", "TTT_MODE", "PHASED_TTT_ENABLED"}
    assert whole["data"]["side_car"].startswith("used")
    assert whole["codes"]["compressor"] == "ans"
    assert any(line.startswith("COMPRESSOR=pergroup: ans stands") for line in record.won)


def test_the_artifact_alone_gives_the_score_again(record, whole, monkeypatch):
    read = dict(eval_only=whole["artifact_path"], run_id="read", given=frozenset())
    monkeypatch.setattr(train_gpt, "prove_toggles", lambda *_: None)
    again = train_gpt.main(dataclasses.replace(record, **read))
    assert again["val_bpb"] == whole["val_bpb"] and again["val_tokens"] == whole["val_tokens"]


def without_proofs():
    """The runs that follow need no proof that a toggle acted: the whole one has given it."""
    train_gpt.prove_toggles = lambda *_: None


def stop_after_five_steps():
    def stop(trainer):
        raise KeyboardInterrupt

    at_step(5, stop)


def test_a_run_that_is_stopped_comes_to_the_same_artifact(record, whole):
    cfg = dataclasses.replace(record, run_id="stopped", checkpoint_every=1e-9, strict=False)
    assert codes(finish(cfg, prepare=stop_after_five_steps)) != [0]
    assert codes(finish(dataclasses.replace(cfg, resume=True), prepare=without_proofs)) == [0]
    assert result(cfg)["launches"] == 2 and result(cfg)["val_bpb"] == whole["val_bpb"]
    paths = [Path(run["artifact_path"]) for run in (whole, result(cfg))]
    assert paths[0].read_bytes() == paths[1].read_bytes()


# Two ranks with one document each have the batches of a rank with two
def score_again(cfg: Config) -> tuple[float, int]:
    report = train_gpt.main(cfg)
    return report["val_bpb"], report["val_tokens"]


def test_two_ranks_score_the_one_artifact_alike(record, whole, tmp_path):
    path = dict(eval_only=whole["artifact_path"], run_id="read by two")
    cfg = dataclasses.replace(record, **path, ttt_batch_size=1, given=frozenset({"TTT_BATCH_SIZE"}))
    first, second = two_ranks(score_again, cfg, folder=tmp_path)
    assert first == second and first[1] == whole["val_tokens"]
    assert first[0] == pytest.approx(whole["val_bpb"], rel=1e-6)


def test_two_ranks_come_to_the_same_score(record, whole):
    cfg = dataclasses.replace(record, run_id="two", ttt_batch_size=1, strict=False)
    assert codes(finish(cfg, 2, without_proofs)) == [0, 0]
    two = result(cfg)
    assert two["val_tokens"] == whole["val_tokens"] and two["val_bytes"] == whole["val_bytes"]
    # sums of gradients and of Hessians in another order
    assert two["val_bpb"] == pytest.approx(whole["val_bpb"], rel=1e-3)

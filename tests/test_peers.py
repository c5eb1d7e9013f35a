"""bench.py peers: public scripts as black boxes, ours beside them.

Here fake scripts that print the two log formats. Would have caught: a variable of the caller's
shell that changes a black box (#1048, #212), a log parser that matches the script's own source
(#13), a file of bytes per token read as validation tokens, a failed run that stops the rest, a
record that names folders of the machine it was made on, FlashAttention 2 published as 3.
"""

import importlib.util
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, slowdown

import bench as command_line
from benchmarks import peers
from prepare_data import file_sha256
from train_gpt import ByteTable, Config, sdpa

REPORT = """
import glob, json, os, sys
json.dump({"env": dict(os.environ), "files": os.listdir(".")}, open("../seen.json", "w"))
print(os.environ["RUN_ID"], "starts")
"""
FAKE_194 = (
    REPORT
    + """
print("step:1/20000 train_loss:6.9 train_time:900ms step_avg:900.00ms")
for step, ms in ((10, 6000), (20, 11000), (30, 16200)):
    print(f"step:{step}/20000 train_loss:3.5 train_time:{ms}ms step_avg:{ms / step:.2f}ms")
print("step:36/20000 val_loss:3.1 val_bpb:1.9012 train_time:20000ms step_avg:555.56ms")
print("stopping_early: wallclock_cap train_time:20000ms step:36/20000")
print("peak memory allocated: 17408 MiB reserved: 17714 MiB")
print("Total submission size: 105085932 bytes")
print("Total submission size int6+zstd22: 15000001 bytes")
print("final_int6_zstd22_roundtrip val_loss:3.0 val_bpb:1.9 eval_time:19500ms")
print("final_int6_zstd22_roundtrip_exact val_loss:3.00000000 val_bpb:1.87654321")
"""
)
FAKE_1855 = (
    REPORT
    + """
print("1/20000 train_loss: 9.0 train_time: 0.0m tok/s: 17921784")
for step, seconds in ((10, 8), (20, 16), (30, 26), (40, 37)):
    speed = step * 786432 / seconds
    print(f"{step}/20000 train_loss: 4.0 train_time: {seconds / 60:.1f}m tok/s: {speed:.0f}")
    if step == 20:
        print("layer_loop:enabled step:20 frac:0.350 encoder:[0] decoder:[1]")
print("40/20000 val_loss: 3.3 val_bpb: 1.9500")
print("stopping_early: wallclock_cap train_time: 37000ms step: 40/20000")
print("peak memory allocated: 41984 MiB reserved: 47140 MiB")
print("diagnostic pre-quantization post-ema val_loss:3.2 val_bpb:1.93000000 eval_time:6718ms")
print("Total submission size quantized+brotli: 14000000 bytes")
print("diagnostic quantized val_loss:3.2 val_bpb:1.94000000 eval_time:4500ms")
"""
)
OURS = (
    REPORT
    + """
os.mkdir("run")
scores = {"live": {"bpb": 1.91}, "quantised": {"bpb": 1.92}, "sliding": {"bpb": 1.89}}
config = dict(
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=1024,
    mlp_mult=3.0,
    train_seq_len=2048,
    train_batch_tokens=524288,
)
result = dict(
    steps=40,
    train_seconds=20.0,
    step_ms_median=495.0,
    eval_seconds=9.0,
    total_bytes=15000002,
    scores=scores,
    config=config,
    peak_memory_bytes=2**34,
)
json.dump(result, open("run/result.json", "w"))
events = (
    dict(event="start"),
    dict(event="step", step_ms=510.0),
    dict(event="step", step_ms=490.0),
    dict(event="val"),
)
with open("run/metrics.jsonl", "w") as file:
    for event in events:
        print(json.dumps(event), file=file)
"""
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards with some 70,000 validation tokens, and the tokenizer, from Python's help topics."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("data")
    documents = [" ".join(text.split()) for _, text in sorted(topics.items())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=384,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
        max_sentence_length=200_000,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = np.concatenate([[1, *sp.encode(text)] for text in documents])
    assert len(tokens) > 2 * 70_000
    for split, part in {"train": tokens[70_000:], "val": tokens[:70_000]}.items():
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (folder / f"fineweb_{split}_000000.bin").write_bytes(
            header.tobytes() + part.astype("<u2").tobytes()
        )
    return folder


@pytest.fixture
def bench(data, tmp_path, monkeypatch):
    """bench(*arguments, ours=..., NAME=source...), as on an H100.

    Returns exit code, report or None, folder of the runs.
    """
    monkeypatch.setattr(peers, "nominal", lambda: 989e12)

    def call(*arguments: str, ours: str = OURS, **scripts: str):
        for name, source in ({"ours": ours} | scripts).items():
            (tmp_path / f"{name}.py").write_text(source)
        places = [
            f"--script={name}={tmp_path}/{name}.py:{name.removeprefix('pr')[:4]}"
            for name in scripts
        ]
        code = command_line.main(
            [
                "peers",
                *places,
                f"--ours={tmp_path}/ours.py",
                f"--data={data}",
                f"--out={tmp_path}/out",
                "--val-tokens=65536",
                "--seconds=20",
                *arguments,
            ]
        )
        record = tmp_path / "out.json"
        return code, json.loads(record.read_text()) if record.exists() else None, tmp_path / "out"

    return call


def test_every_figure_of_both_formats_and_of_ours(bench, capsys):
    code, record, _ = bench(pr194=FAKE_194.replace("pr194", "194"), pr1855=FAKE_1855)
    rows = {row["name"]: row for row in record["rows"]}
    assert code == 0 and [*rows] == [
        "pr194",
        "pr1855",
        "ours_as_pr194",
        "ours_as_pr1855",
        "ours_best",
    ]
    a, b, c = rows["pr194"], rows["pr1855"], rows["ours_as_pr194"]
    once = ("steps", "train_seconds", "peak_gib", "total_bytes", "eval_seconds")
    assert [a[name] for name in once] == [36, 20.0, 17.0, 15000001, 19.5]
    assert (a["step_ms_median"], a["step_ms_last"]) == (
        510.0,
        520.0,
    )  # of the intervals 500 and 520; step 1 is none
    assert a["bpb"] == {"live": 1.9012, "sliding": 1.87654321}
    assert [b[name] for name in once] == [40, 37.0, 41.0, 14000000, 4.5]
    assert (b["step_ms_median"], b["step_ms_last"]) == pytest.approx((1000.0, 1100.0), abs=0.01)
    assert b["bpb"] == {"live": 1.95, "averaged": 1.93, "quantised": 1.94}
    assert (c["step_ms_median"], c["step_ms_last"], c["peak_gib"]) == (495.0, 490.0, 16.0)
    assert c["bpb"] == {"live": 1.91, "quantised": 1.92, "sliding": 1.89}
    assert a["tokens_per_second"] == pytest.approx(36 * 524288 / 20)
    assert c["mfu"] == pytest.approx(40 * 524288 / 20 * 228.1e6 / 989e12, rel=1e-3)
    assert b["mflop_per_token"] > a["mflop_per_token"]
    printed = capsys.readouterr().out
    assert "1.8765" in printed and "15,000,001" in printed and "510.0" in printed


def test_repeated_blocks_count_each_time_that_they_run():
    kind = peers.KINDS["1855"]
    env = {
        name: value
        for text in (kind.shared, kind.theirs, "VOCAB_SIZE=1024 TRAIN_LOG_EVERY=10")
        for name, value in peers.pairs_of(text).items()
    }
    ends = (
        "layer_loop:enabled step:20 frac:0.35\n"
        "stopping_early: wallclock_cap train_time: 1000ms step: 40/20000\n"
    )
    found = peers.read_output(ends, peers.Peer("x", "", Path("x"), env, kind))
    assert found["blocks"] == 14  # half the steps run 11 blocks, half 17
    deep = Config.from_env(
        {name: env[name] for name in peers.pairs_of(kind.shared)} | {"NUM_LAYERS": "14"}
    )
    assert peers.rates(found, 1)["mflop_per_token"] == pytest.approx(
        peers.forward_flops(deep).trained / 1e6
    )
    assert peers.rates(found, 1)["mfu"] is None  # no data sheet of this machine


def test_repeated_blocks_of_ours_count_in_the_share_of_the_steps_that_had_them(tmp_path):
    cfg = Config(num_loops=2, num_layers=11, loop_start=3, loop_end=5)
    result = dict.fromkeys(("steps", "train_seconds", "step_ms_median", "eval_seconds"), 40)
    result |= dict(total_bytes=1, peak_memory_bytes=1, scores={}, config=cfg.knobs())
    result |= dict(toggles={"NUM_LOOPS": {"share_of_steps": 0.5}})
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "metrics.jsonl").write_text("")
    found = peers.read_records(tmp_path)
    assert found["blocks"] == 14
    deep = peers.forward_flops(Config(num_layers=14))
    assert peers.rates(found, 1)["mflop_per_token"] == pytest.approx(deep.trained / 1e6)


def test_a_black_box_sees_an_empty_folder_and_nothing_of_the_caller(bench, monkeypatch):
    monkeypatch.setenv("WARMDOWN_ITERS", "9")
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code, _, out = bench("--env=MORE=1", "--env=pr194:QAT=0", "--env=SEED=7", pr194=FAKE_194)
    seen = json.loads((out / "pr194" / "seen.json").read_text())
    kind = peers.KINDS["194"]
    expected = {
        "PATH",
        "HOME",
        "CUDA_VISIBLE_DEVICES",
        "MORE",
        "VOCAB_SIZE",
        "TOKENIZER_PATH",
        "DATA_PATH",
        "RUN_ID",
        "MAX_WALLCLOCK_SECONDS",
        *kind.counts,
    }
    expected |= {
        name for text in (peers.COMMON, kind.shared, kind.theirs) for name in peers.pairs_of(text)
    }
    machine = {name for name in os.environ if name.startswith("CUDA_") or name == "LD_LIBRARY_PATH"}
    assert (
        set(seen["env"]) - {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"} == expected | machine
        and seen["files"] == []
    )
    assert (seen["env"]["QAT"], seen["env"]["SEED"], seen["env"]["WARMDOWN_ITERS"]) == (
        "0",
        "7",
        "12",
    )
    ours = json.loads((out / "ours_as_pr194" / "seen.json").read_text())["env"]
    assert "QAT" not in ours and ours["SEED"] == "7" and code == 0


def test_counts_of_steps_shrink_with_the_budget_and_are_published_ones_at_full_length():
    assert peers.scaled(peers.KINDS["194"], 1) == {
        "WARMDOWN_ITERS": "3000",
        "MUON_MOMENTUM_WARMUP_STEPS": "1500",
    }
    assert peers.scaled(peers.KINDS["194"], 1 / 48) == {
        "WARMDOWN_ITERS": "62",
        "MUON_MOMENTUM_WARMUP_STEPS": "31",
    }
    assert float(peers.scaled(peers.KINDS["1855"], 1)["EMA_DECAY"]) == pytest.approx(
        0.9965, abs=2e-5
    )
    assert 0.5 <= float(peers.scaled(peers.KINDS["1855"], 1e-6)["EMA_DECAY"]) < 1


def test_our_script_takes_every_setting_and_as_194_is_194(bench):
    _, _, out = bench(pr194=FAKE_194, pr1855=FAKE_1855)
    configs = {}
    for name in ("ours_as_pr194", "ours_as_pr1855", "ours_best"):
        configs[name] = Config.from_env(json.loads((out / name / "seen.json").read_text())["env"])
    as_194 = configs["ours_as_pr194"]
    wanted = dict(
        num_layers=11,
        mlp_mult=3.0,
        num_kv_heads=4,
        train_batch_tokens=524288,
        train_seq_len=2048,
        init="ortho",
        smear_gate=True,
        smear_pos="pre_norm",
        smear_beta2=0.99,
        bigram_vocab_size=0,
        matrix_lr=0.02,
        scalar_lr=0.02,
        tied_embed_lr=0.03,
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_wd=0.038,
        adam_wd=0.0,
        grad_clip_norm=0.3,
        quant_bits_mlp=6,
        quant_bits_attn=6,
        quant_bits_embed=16,
        quant_clip="quantile",
        quant_codes="sym",
        quant_scale_floor=True,
        keep_float_max_numel=65536,
        compressor="zstd",
        prune_pct=0.0,
        qat_enabled=True,
        qat_start_kind="always",
        qat_scope="linears",
        qat_grid="amax",
        ttt_mode="none",
        swa_enabled=False,
        ema_enabled=False,
        eval_stride=64,
    )
    assert {name: getattr(as_194, name) for name in wanted} == wanted
    as_1855 = configs["ours_as_pr1855"]
    model = dict(negative_slope=0.5, num_loops=2, loop_start=3, loop_end=5, parallel_start_layer=8)
    training = dict(loader="documents", doc_mask=True, min_lr=0.1, muon_row_normalize=True)
    assert {name: getattr(as_1855, name) for name in model} == model
    assert {name: getattr(as_1855, name) for name in training} == training


def test_a_failed_black_box_is_a_row_and_the_rest_runs(bench, capsys):
    code, record, _ = bench(pr194="import module_that_is_not_there\n")
    row, *others = record["rows"]
    assert (
        code == 0
        and row["exit_code"] == 1
        and "No module named 'module_that_is_not_there'" in row["last_line"]
    )
    assert row["steps"] is None and row["bpb"] == {} and "mfu" not in row
    assert [other["exit_code"] for other in others] == [0, 0]
    assert "exit 1: ModuleNotFoundError" in capsys.readouterr().out


def test_our_own_failure_is_a_row_too(bench):
    code, record, _ = bench(
        pr194=FAKE_194,
        ours="print('error: no GPU [exit 2: bad configuration]'); raise SystemExit(2)",
    )
    assert code == 0 and [row["exit_code"] for row in record["rows"]] == [0, 2, 2]


def test_a_run_over_its_time_is_ended_with_its_children_and_keeps_what_it_printed(bench):
    hang = (
        FAKE_194[: FAKE_194.index('print("peak')]
        + """
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid)
sys.stdout.flush()
time.sleep(600)
"""
    )
    timeout = math.ceil(3 * slowdown())
    _, record, out = bench(f"--timeout={timeout}", "--only=pr194", pr194=hang)
    row = record["rows"][0]
    assert row["exit_code"] == f"over {timeout} s" and row["steps"] == 36
    assert row["bpb"] == {"live": 1.9012} and row["peak_gib"] is None
    child = int((out / "pr194" / "stdout.txt").read_text().split("child ")[1])
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z"


def test_the_source_of_a_script_in_its_output_is_no_result(bench):
    leak = """
print("    log0('stopping_early: wallclock_cap train_time:99ms step:9/9')")
print("    log0('peak memory allocated: 99 MiB')")
"""
    _, record, _ = bench("--only=pr194", pr194=REPORT + leak)
    assert record["rows"][0]["steps"] is None and record["rows"][0]["peak_gib"] is None


def test_bytes_per_token_lie_apart_and_are_those_of_the_text(bench, data):
    _, record, out = bench("--only=pr1855", pr1855=FAKE_1855)
    name = "fineweb_val_000000.bin"
    assert sorted(p.name for p in (out / "data").iterdir()) == [
        "fineweb_train_000000.bin",
        name,
        "tokenizer.model",
    ]
    tokens = np.fromfile(out / "data" / name, "<u2", offset=1024)
    sizes = np.fromfile(
        out / "data_with_bytes" / "fineweb_val_bytes_000000.bin", "<u2", offset=1024
    )
    assert len(tokens) == len(sizes) == 65537 and sizes[0] == 0
    assert (np.fromfile(out / "data_with_bytes" / name, "<u2", offset=1024) == tokens).all()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    starts = np.flatnonzero(tokens == 1)
    for a, b in itertools.pairwise(starts):
        assert sizes[a:b].sum() == len(sp.decode(tokens[a:b].tolist()).encode())
    table = ByteTable(Config(tokenizer_path=str(data / "tokenizer.model"), vocab_size=384))
    assert record["setup"]["val_bytes"] == table.count(tokens).sum()
    env = {
        row["name"]: json.loads((out / row["name"] / "seen.json").read_text())["env"]
        for row in record["rows"]
    }
    assert env["pr1855"]["DATA_PATH"] == "../../data_with_bytes"


def test_a_dry_run_prints_every_command_and_makes_nothing(bench, capsys):
    code, record, out = bench(
        "--dry-run", "--gpus=8", "--val-tokens=524288", pr194=FAKE_194, pr1855=FAKE_1855
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert code == 0 and record is None and not out.exists() and len(lines) == 5
    assert all(" && env -i " in line and "--nproc_per_node=8" in line for line in lines)
    assert (
        "MUON_WEIGHT_DECAY=0.038" in lines[0]
        and "CASEOPS_ENABLED=1" in lines[1]
        and "QAT_SCOPE=linears" in lines[2]
    )


def test_one_run_again_keeps_the_other_rows_of_the_same_setup(bench):
    _, first, _ = bench(pr194=FAKE_194)
    _, second, _ = bench("--only=ours_best", pr194=FAKE_194)
    assert [row["name"] for row in second["rows"]] == [row["name"] for row in first["rows"]]
    assert second["rows"][0] == first["rows"][0]
    _, third, _ = bench("--only=ours_best", "--seconds=21", pr194=FAKE_194)
    assert [row["name"] for row in third["rows"]] == ["ours_best"]


def test_the_record_says_what_ran_where(bench, tmp_path):
    _, record, _ = bench(pr194=FAKE_194)
    row, setup = record["rows"][0], record["setup"]
    assert row["sha256"] == file_sha256(tmp_path / "pr194.py") and row["command"].endswith(
        " python ../train_gpt.py"
    )
    assert (
        row["command"].startswith("cd ")
        and "TRAIN_BATCH_TOKENS=524288" in row["command"]
        and row["seconds"] > 0
    )
    assert setup["torch"] == torch.__version__ and "CPU" in setup["device"] and setup["gpus"] == 1
    assert (
        setup["val_tokens"] == 65536
        and record["packages"]["numpy"]
        and len(record["code_sha256"]) == 2
    )


def test_no_record_names_a_folder_of_this_machine(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    trace = "import sys\nraise OSError(f'no {sys.argv[0]} in {__file__}')\n"
    _, record, out = bench("--path=ours_best:" + str(ROOT), pr194=FAKE_194, pr1855=trace)
    text, places = json.dumps(record), (str(tmp_path), os.environ["PATH"], os.environ["HOME"])
    assert record["rows"][1]["exit_code"] == 1 and "OSError: no ../train_gpt.py in " in text
    assert not [place for place in places if f'{place}"' in text or f"{place}/" in text]
    assert str(tmp_path) not in (out / "pr1855" / "stdout.txt").read_text()
    command = record["rows"][0]["command"]
    assert command.startswith("cd out/pr194/work && env -i ") and 'PATH="$PATH"' in command


def test_folders_for_python_reach_the_named_run_and_a_stand_in_is_named(bench):
    pytest.importorskip("torch.nn.attention.varlen")
    with_fa = "import flash_attn_interface\n" + FAKE_1855
    _, record, out = bench(
        f"--path={ROOT / 'tests'}",
        f"--path=pr1855:{peers.STAND_IN}",
        pr194=FAKE_194,
        pr1855=with_fa,
    )
    rows = {row["name"]: row for row in record["rows"]}
    found = {
        name: json.loads((out / name / "seen.json").read_text())["env"]["PYTHONPATH"].split(
            os.pathsep
        )
        for name in rows
    }
    stand_in, everywhere = str(ROOT / "tests" / "fa3_stand_in"), str(ROOT / "tests")
    assert found.pop("pr1855") == [stand_in, everywhere] and set(map(tuple, found.values())) == {
        (everywhere,)
    }
    assert [
        name for name, row in rows.items() if "FA2" in row["about"] and "FA3" in row["about"]
    ] == ["pr1855"]
    assert (
        rows["pr1855"]["exit_code"] == 0
        and "$OLDPWD/tests/fa3_stand_in" in rows["pr1855"]["command"]
    )


def test_show_prints_the_table_of_peers_and_says_what_each_run_is(bench, tmp_path, capsys):
    _, record, _ = bench(
        f"--path=pr1855:{peers.STAND_IN}", pr194=FAKE_194, pr1855="raise SystemExit(3)"
    )
    capsys.readouterr()
    assert command_line.main(["show", str(tmp_path / "out.json"), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert (
        text.rstrip() == peers.table(record, markdown=True)
        and "STOOD IN FOR FA3" in text
        and "exit 3" in text
    )
    assert "65,536 targets" in text and "1.8765" in text


def test_the_stand_in_for_flash_attention_3_is_causal_attention_with_shared_heads():
    pytest.importorskip("torch.nn.attention.varlen")
    spec = importlib.util.spec_from_file_location(
        "stand_in", peers.STAND_IN / "flash_attn_interface.py"
    )
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    q, k, v = (torch.randn(2, 16, heads, 8) for heads in (4, 2, 2))
    torch.testing.assert_close(stand_in.flash_attn_func(q, k, v, causal=True), sdpa(q, k, v))
    with pytest.raises(NotImplementedError):
        stand_in.flash_attn_varlen_func(q[0], k[0], v[0], None, None, 16, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--val-tokens=65000"], "multiple of 65536"),
        (["--val-tokens=131072"], "below the 70000"),
        (["--gpus=3"], "1, 2, 4 or 8"),
        (["--script=x=nowhere.py:194"], "existing file"),
        (["--script=x=ours.py:13"], "194, 1855"),
        (["--env=oops"], "NAME=VALUE"),
        (["--only=nothing"], "the runs are"),
        (["--tokenizer=nowhere.model"], "nowhere.model"),
        (["--path=nowhere"], "give a FOLDER"),
    ],
)
def test_a_mistake_is_one_line(bench, capsys, arguments, message):
    code, record, _ = bench(*arguments, pr194=FAKE_194)
    error = capsys.readouterr().err
    assert code == 2 and record is None and message in error and error.count("\n") == 1


COMMITTED = [path for path in [ROOT / "logs" / "bench" / "peers.json"] if path.exists()]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_the_committed_report_is_whole(path):
    report = json.loads(path.read_text())
    assert {"setup", "date", "code_sha256", "packages"} <= report.keys() and peers.table(
        report, markdown=True
    )
    for row in report["rows"]:
        assert (
            len(row["sha256"]) == 64
            and row["command"].startswith("cd logs/bench/")
            and row["about"]
        )
        assert row["exit_code"] == 0 or row["last_line"]

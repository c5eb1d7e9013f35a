"""What must hold for the scripts as text, and for the records that a run leaves.

Failures that these tests would have caught: 26 of 58 published scripts parse a setting that nothing
uses; late QAT switched by a class attribute, which torch.compile drops; scripts that fail a
reviewer's import on an older Python (#1437, #1532) or do things when imported; copied NCCL
variables that cost 15 ms per step (#42, #48); a 392-line main(); logs that no program could read
(66 of 165 contain source, #13), numbers in a table that differ from the log (#86, #2076).
"""

import ast
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import HANG, ROOT, TINY

import train_gpt
from train_gpt import KNOBS, Config, main

SCRIPTS = [
    *sorted(ROOT.glob("*.py")),
    *sorted((ROOT / "ablation").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "planning").glob("*.py")),
]
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in SCRIPTS
}
EACH = pytest.mark.parametrize("script", TREES)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes(script: str, *kinds) -> list[ast.AST]:
    return [node for node in ast.walk(TREES[script]) if isinstance(node, kinds)]


# ── Readable: the limits, and what does not keep them yet ─────────────────────────────────────────
FUNCTION_LINES = 50
PARAMETERS = 6  # besides self
MEDIAN_LINE = 60  # characters of a line that is not blank
BLANK_LINES = 0.10
MAIN_LINES = 40  # of train_gpt.py: the data flow on one screen


def ruff(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_formatter_would_change_nothing():
    done = ruff("format", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_nothing():
    done = ruff("check", "--no-cache", "--output-format=json")
    found = [
        f"{Path(problem['filename']).relative_to(ROOT).as_posix()}: {problem['code']}"
        for problem in json.loads(done.stdout)
    ]
    assert found == []


def test_the_scripts_are_found():
    assert {
        "train_gpt.py",
        "prepare_data.py",
        "ablation/study.py",
        "benchmarks/peers.py",
        "planning/forecast.py",
    } <= TREES.keys()


def lines_of(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def parameters_of(function: ast.FunctionDef) -> int:
    """Without self and cls."""
    a = function.args
    names = [p.arg for p in a.posonlyargs + a.args + a.kwonlyargs]
    names += [p.arg for p in (a.vararg, a.kwarg) if p is not None]
    return len([name for name in names if name not in ("self", "cls")])


def unreadable(script: str) -> list[str]:
    """What of the limits above this script does not keep."""
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    written = [len(line) for line in lines if line.strip()]
    median = statistics.median(written)
    blank = 1 - len(written) / len(lines)
    problems = []
    for function in nodes(script, *FUNCTION):
        if lines_of(function) > FUNCTION_LINES:
            problems.append(f"{function.name}: {lines_of(function)} lines")
        if parameters_of(function) > PARAMETERS:
            problems.append(f"{function.name}: {parameters_of(function)} parameters")
    if median > MEDIAN_LINE:
        problems.append(f"median line: {median} characters")
    if blank < BLANK_LINES:
        problems.append(f"blank lines: {blank:.1%}")
    return problems


@EACH
def test_every_script_is_laid_out_to_be_read(script):
    assert unreadable(script) == []


def test_main_fits_on_one_screen():
    (main,) = [f for f in nodes("train_gpt.py", *FUNCTION) if f.name == "main"]
    assert lines_of(main) <= MAIN_LINES


# ── The scripts as text ───────────────────────────────────────────────────────────────────────────
def newer_f_strings(source: str) -> list[int]:
    """Lines with f-strings that Python reads only since 3.12 (before,
    the parser itself refuses them).
    """
    quotes, lines = [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            quotes.pop()
        around = quotes[:-1] if kind == "FSTRING_MIDDLE" else quotes
        if any(
            quote in token.string
            or "\\" in token.string
            or kind == "COMMENT"
            or (kind == "NL" and len(quote) == 1)
            for quote in around
        ):
            lines.append(token.start[0])
        if kind == "FSTRING_START":
            quotes.append(token.string.lstrip("fFrR"))
    return lines


@EACH
def test_every_script_parses_on_python_3_10(script):
    source = (ROOT / script).read_text()
    ast.parse(source, feature_version=(3, 10))
    assert newer_f_strings(source) == []


@EACH
def test_no_script_uses_a_standard_library_newer_than_python_3_10(script):
    newer = {
        "tomllib",
        "UTC",
        "StrEnum",
        "ExceptionGroup",
        "batched",
        "Self",
        "override",
        "file_digest",
        "TaskGroup",
        "add_note",
    }
    used = {n.attr for n in nodes(script, ast.Attribute)} | {n.id for n in nodes(script, ast.Name)}
    used |= {a.name for n in nodes(script, ast.Import, ast.ImportFrom) for a in n.names}
    used |= {n.module for n in nodes(script, ast.ImportFrom)}
    assert used & newer == set()


@EACH
def test_no_class_attribute_is_switched(script):
    classes = {n.name for n in nodes(script, ast.ClassDef)} | {"cls"}
    stored = [n for n in nodes(script, ast.Attribute) if isinstance(n.ctx, (ast.Store, ast.Del))]
    assert [
        ast.unparse(n)
        for n in stored
        if ast.unparse(n.value) in classes or re.search(r"type\(|__class__", ast.unparse(n.value))
    ] == []
    calls = [n for n in nodes(script, ast.Call) if ast.unparse(n.func) == "setattr"]
    assert [ast.unparse(n) for n in calls if ast.unparse(n.args[0]) in classes] == []


@pytest.mark.parametrize(
    "path", [p for p in [*SCRIPTS, ROOT / "Makefile"] if p.exists()], ids=lambda p: p.name
)
def test_no_nccl_variable_is_set_by_us(path):
    assert re.findall(r"NCCL_[A-Z]\w*", path.read_text()) == []


def test_the_environment_is_read_in_four_places_and_written_at_the_start_of_the_script_alone():
    reads = {"environ", "getenv", "putenv", "unsetenv"}
    places = {}
    for top in TREES["train_gpt.py"].body:
        found = [
            n
            for n in ast.walk(top)
            if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "os" and n.attr in reads
        ]
        if found:
            start = isinstance(top, ast.If) and ast.unparse(top.test) == "__name__ == '__main__'"
            name = "start" if start else getattr(top, "name", ast.unparse(top))
            places[name] = {n.attr for n in found}
    assert places.keys() == {"start", "Run", "environment", "command_line"}
    assert all(found == {"environ"} for found in places.values())
    assert not [n for n in nodes("train_gpt.py", ast.ImportFrom) if n.module == "os"]
    source = (ROOT / "train_gpt.py").read_text()
    written = re.findall(
        r"os\.environ(?:\[[^\]]*\]\s*=[^=]|\.(?:update|setdefault|pop|clear)\b).*", source
    )
    assert written == ['os.environ.setdefault("GOMP_SPINCOUNT", "1000")']


def test_every_knob_is_read_outside_its_declaration_and_its_checks():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    config.body = [n for n in config.body if isinstance(n, FUNCTION) and n.name != "__post_init__"]
    read = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    # getattr(cfg, role.bits) and the like read knobs whose names stand as text; or NAME_ENABLED; or
    # the clip and the k beside a role's bits
    for top in tree.body:
        if not ast.unparse(top).startswith(("ALIASES", "ABSENT")) and top is not config:
            texts = [n.value for n in ast.walk(top) if isinstance(n, ast.Constant)]
            names = {text.lower() for text in texts if isinstance(text, str)}
            read |= names | {f"{name}_enabled" for name in names}
            read |= {name.replace("quant_bits", "quant_clip") for name in names}
            kinds = (re.fullmatch("quant_bits_(.+)", name) for name in names)
            read |= {f"{kind[1]}_clip_sigmas" for kind in kinds if kind}
    assert [f.name for f in KNOBS if f.name not in read] == []


def test_importing_train_gpt_does_nothing_else(tmp_path):
    program = """
import json, os, random, signal, sys, threading
import numpy, safetensors.torch, sentencepiece, torch, torch.distributed, zstandard
import torch.utils.benchmark

def state():
    return [
        dict(os.environ), sorted(os.listdir(".")), sys.argv, threading.active_count(),
        random.getstate(), str(numpy.random.get_state()),
        signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
        torch.random.get_rng_state().tolist(), torch.get_default_dtype(),
        torch.distributed.is_initialized(), torch.cuda.is_initialized(),
        torch.get_num_threads(), torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
    ]
before = state()
import train_gpt
print(state() == before)
"""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR")} | {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "QAT_ENABLED": "nonsense",
        "RANK": "1",
        "WORLD_SIZE": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=HANG,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


# ── The records of a run ──────────────────────────────────────────────────────────────────────────
NUMBER = (float, int)
OPTIONAL = (float, type(None))
EVENTS = {  # event: its fields, besides `event` and `t`
    "start": dict(schema=int, config=dict, world_size=int, environment=dict),
    "phase": dict(name=str, step=int, seconds=float),
    "step": dict(
        step=int,
        seconds=float,
        loss=float,
        step_ms=float,
        lr_scale=float,
        momentum=float,
        qat=bool,
        qna=NUMBER,
        snapshot=bool,
        wd_scale=float,
        loops=int,
        length=int,
        rewarm=float,
        floor=float,
    ),
    "val": dict(step=int, seconds=float, val_bpb=float, val_loss=float, size_estimate=int),
    "result": dict(val_bpb=float, exit_code=int),
    "stopped": dict(phase=str, error=str),
}
RESULT = dict(  # what result.json has at least
    val_bpb=float,
    val_loss=float,
    val_tokens=int,
    val_bytes=int,
    live_val_bpb=float,
    averaged_val_bpb=OPTIONAL,
    quantised_val_bpb=float,
    quant_gap_bpb=float,
    folder=str,
    artifact_path=str,
    artifact_bytes=int,
    code_bytes=int,
    total_bytes=int,
    cap_bytes=int,
    under_cap=bool,
    steps=int,
    tokens_seen=int,
    epochs=float,
    step_ms_median=float,
    train_seconds=float,
    eval_seconds=float,
    params=int,
    seed=int,
    world_size=int,
    device=str,
    toggles=dict,
    warnings=list,
    seconds=dict,
    launches=int,
    lost_seconds=OPTIONAL,
    limits=dict,
    over_limit=list,
    config=dict,
    code_sha256=str,
    config_sha256=str,
    data=dict,
)
TOGGLE = dict(
    active=bool,
    first_step=(int, type(None)),
    last_step=(int, type(None)),
    share_of_steps=float,
    tensors=int,
    params=int,
    verdict=(str, type(None)),
    effect=OPTIONAL,
    effect_interval=(list, type(None)),
    unit=str,
    compared=str,
    cost_ms=OPTIONAL,
    cost_interval=(list, type(None)),
    cost_per=str,
    cost_seconds=OPTIONAL,
    steps_lost=OPTIONAL,
    step_ms_without=OPTIONAL,
    step_ms_with=OPTIONAL,
    bytes_saved=(int, type(None)),
    missing=str,
    scope=str,
)


def has_type(value, kinds) -> bool:
    return type(value) in (kinds if isinstance(kinds, tuple) else (kinds,))  # a bool is no int here


def strict(text: str):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def records(folder: Path) -> tuple[dict, list[dict], str]:
    """result.json, the events of metrics.jsonl, train.log."""
    events = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return strict((folder / "result.json").read_text()), events, (folder / "train.log").read_text()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a real run with an average, QAT, noise and validation while training."""
    logs = tmp_path_factory.mktemp("logs")
    toggles = dict(
        qat_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.5,
        qna_enabled=True,
        swa_enabled=True,
        swa_every=1,
        swa_start_kind="time_frac",
        swa_start_frac=0.5,
        val_loss_every=4,
        warmup_steps=2,
    )
    main(
        Config(
            **TINY | toggles,
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            logs_dir=str(logs),
            run_id="train",
        )
    )
    return logs / "train"


@pytest.fixture(scope="module")
def scored(trained, data) -> Path:
    """The folder of a run that only scores the other one's artifact."""
    main(
        Config(
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            logs_dir=str(trained.parent),
            run_id="score",
            eval_only=str(trained / "artifact.bin"),
        )
    )
    return trained.parent / "score"


@pytest.fixture(params=["trained", "scored"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


def test_every_line_of_the_metrics_is_one_event_of_the_schema(folder):
    _, events, _ = records(folder)
    for e in events:
        fields = {"event": str, "t": float, **EVENTS[e["event"]]}
        assert e.keys() == fields.keys()
        assert [name for name, kinds in fields.items() if not has_type(e[name], kinds)] == []
    assert events[0]["event"] == "start" and events[-1]["event"] == "result"
    assert [e["t"] for e in events] == sorted(e["t"] for e in events)


def test_a_training_run_writes_an_event_of_every_kind_at_its_step(trained):
    _, events, _ = records(trained)
    of = {kind: [e for e in events if e["event"] == kind] for kind in EVENTS}
    assert [e["step"] for e in of["step"]] == [1, 2, 4, 6] and [e["step"] for e in of["val"]] == [4]
    assert {e["name"]: e["step"] for e in of["phase"]} == {
        "QNA": 0,
        "WARMDOWN": 3,
        "QAT": 3,
        "SWA": 2,
    }
    assert [e["qat"] for e in of["step"]] == [False, False, True, True]


def test_the_result_has_every_promised_key_with_its_type(trained):
    report, *_ = records(trained)
    assert [
        name
        for name, kinds in RESULT.items()
        if name not in report or not has_type(report[name], kinds)
    ] == []
    for row in report["toggles"].values():
        assert row.keys() == TOGGLE.keys() and all(
            has_type(row[name], kinds) for name, kinds in TOGGLE.items()
        )
    assert report["config"].keys() == {f.name for f in KNOBS}


def test_the_result_of_scoring_alone_has_every_promised_key_too(scored):
    report, *_ = records(scored)
    assert [name for name in RESULT if name not in report] == []
    assert [
        name
        for name, kinds in RESULT.items()
        if report[name] is not None and not has_type(report[name], kinds)
    ] == []


def test_the_figures_of_a_result_agree_with_each_other_and_with_the_files(folder):
    r, *_ = records(folder)
    assert r["val_bpb"] == pytest.approx(
        r["val_loss"] / math.log(2) * r["val_tokens"] / r["val_bytes"], rel=1e-12
    )
    assert r["total_bytes"] == r["artifact_bytes"] + r["code_bytes"]
    assert r["under_cap"] == (r["total_bytes"] <= r["cap_bytes"])
    assert r["artifact_bytes"] == Path(r["artifact_path"]).stat().st_size
    source = (folder / "train_gpt.py").read_bytes()
    assert source == train_gpt.SOURCE  # the source as run lies beside the log, not in it
    assert r["code_sha256"] == hashlib.sha256(source).hexdigest()
    assert r["code_bytes"] == (folder / train_gpt.PACKED_NAME).stat().st_size
    assert r["config_sha256"] == Config(**r["config"]).digest()


def test_the_figures_of_training_agree_with_the_configuration(trained):
    r, events, log = records(trained)
    assert r["tokens_seen"] == r["steps"] * r["config"]["train_batch_tokens"] == 6 * 512
    assert r["epochs"] == r["tokens_seen"] / r["data"]["train_tokens"]
    assert f"read 3,072 training tokens: {r['epochs']:.3g} epochs\n" in log
    assert r["quant_gap_bpb"] == pytest.approx(
        r["quantised_val_bpb"] - r["averaged_val_bpb"], abs=1e-12
    )
    assert r["exit_code"] == 0 and all(row["active"] for row in r["toggles"].values())
    assert r["toggles"].keys() == {"WARMDOWN", "QAT", "QNA", "SWA", "SMEAR_GATE"}
    assert events[0]["config"] == r["config"]


def test_the_ledger_shows_validation_apart_from_training(trained):
    assert records(trained)[0]["seconds"]["validate"] > 0


def test_scoring_alone_gives_the_identical_number(trained, scored):
    assert records(trained)[0]["val_bpb"] == records(scored)[0]["val_bpb"]


def test_the_result_line_of_the_log_agrees_with_the_result(folder):
    report, events, log = records(folder)
    lines = [line for line in log.splitlines() if line.startswith("RESULT ")]
    pattern = (
        r"RESULT val_bpb (\S+) \((\w+), (\S+) tokens, (\S+) text bytes\), "
        r"(\S+) bytes in all, exit code (\d+): (.+)"
    )
    bpb, mode, targets, size, total, code, meaning = re.fullmatch(pattern, lines[0]).groups()
    assert len(lines) == 1 and log.splitlines()[-1] == lines[0]
    assert bpb == f"{report['val_bpb']:.6f}" and float(bpb) == pytest.approx(
        events[-1]["val_bpb"], abs=1e-6
    )
    numbers = [int(n.replace(",", "")) for n in (targets, size, total, code)]
    assert numbers == [
        report["val_tokens"],
        report["val_bytes"],
        report["total_bytes"],
        report["exit_code"],
    ]
    assert mode == report["scored"] and meaning == train_gpt.EXIT_CODES[report["exit_code"]]


def test_the_log_holds_no_source(folder):
    log = records(folder)[2]
    assert "import " not in log and "def " not in log


def test_a_run_that_stops_says_so_in_both_records(tiny):
    cfg = tiny(matrix_lr=1e38, scalar_lr=1e38, tied_embed_lr=1e38, grad_clip_norm=0.0)
    with pytest.raises(train_gpt.Refusal):
        main(cfg)
    folder = Path(cfg.logs_dir) / cfg.run_id
    last = strict((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() == {"event", "t", *EVENTS["stopped"]} and (last["event"], last["phase"]) == (
        "stopped",
        "train",
    )
    assert (
        "not finite" in last["error"]
        and "not finite" in (folder / "train.log").read_text().splitlines()[-1]
    )


def test_the_smallest_model_that_the_ranges_allow_trains_to_the_end(tiny):
    lows = dict(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        model_dim=2,
        mlp_mult=1.0,
        warmdown_iters=0,
        muon_backend_steps=1,
    )
    assert main(dataclasses.replace(tiny(), **lows, strict=False))["steps"] == 6

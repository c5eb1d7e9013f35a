"""Peers: public training scripts as black boxes, and ours beside them, on the same shards.

In: scripts of two known families. Out: a row each, from what the script printed or, for ours, from
the records of the run. A black box is unmodified, starts in an empty folder with no variable but
those of the machine and its settings, and is known only by what it prints. Then ours runs with the
settings of each, and with our best ones. Nothing of theirs is part of this.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer

import prepare_data
import train_gpt
from benchmarks.machine import ROOT, device_name, nominal
from benchmarks.report import BENCH, SCORES, origin, table
from planning.flops import forward_flops
from train_gpt import Config, Split, refuse

STAND_IN = ROOT / "tests" / "fa3_stand_in"
# Validation targets of one scoring batch per GPU; #1855 drops a last batch that is not full.
BATCH = 32 * 2048
# What a published run had: 600 s on 8 GPUs.
PUBLISHED_GPU_SECONDS = 4800


# ── What they are told ────────────────────────────────────────────────────────────────────────────
class Kind(NamedTuple):
    """A family of scripts: what it is told, what ours is told for the same model, what it prints.

    counts: settings of both in steps of the published run, which shrink with the run. shared,
    theirs, ours: settings of both, of it and of ours. step: pattern of a logged step: its number,
    then milliseconds (ms) or mean tokens per second (speed) since the start. sidecar: it reads the
    bytes of each validation token from a file.
    """

    about: str
    counts: dict[str, float]
    shared: str
    theirs: str
    ours: str
    step: str
    sidecar: bool = False


SIZE = "NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 TRAIN_SEQ_LEN=2048 "
# Settings beside each script's own defaults.
KINDS = {
    "194": Kind(
        "#194 as run for its best seed: QAT, no SWA; ours has all parts of it",
        {"WARMDOWN_ITERS": 3000, "MUON_MOMENTUM_WARMUP_STEPS": 1500},
        shared=SIZE + "MLP_MULT=3 TRAIN_BATCH_TOKENS=524288 SMEAR_GATE=1",
        theirs="QAT=1 QUANT_BITS=6 MUON_WEIGHT_DECAY=0.038 SWA_ENABLED=0 TTT_ENABLED=0",
        ours="QAT_ENABLED=1 QAT_SCOPE=linears QAT_GRID=amax MUON_WD=0.038",
        step=r"^step:(\d+)/\d+ train_loss:\S+ train_time:(?P<ms>\d+)ms",
    ),
    "1855": Kind(
        "record #1855 without test-time training and lrzip; ours trains the same model on the same "
        "schedule, is without CaseOps here, and has no GPTQ, SDClip, LQER and brotli",
        # EMA_DECAY: its memory in steps.
        {"MUON_MOMENTUM_WARMUP_STEPS": 1500, "EMA_DECAY": 1 / (1 - 0.9965)},
        shared=SIZE + "MLP_MULT=4 TRAIN_BATCH_TOKENS=786432 ROPE_DIMS=16 XSA_LAST_N=11 LN_SCALE=1 "
        "QK_GAIN_INIT=5 MATRIX_LR=0.026 BETA2=0.99 MUON_MOMENTUM=0.97 MUON_WD=0.095 ADAM_WD=0.02 "
        "WARMDOWN_FRAC=0.85",
        theirs="CASEOPS_ENABLED=1 NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 MIN_LR=0.1 EMBED_BITS=7 "
        "MLP_CLIP_SIGMAS=11.5 EMBED_CLIP_SIGMAS=14 GPTQ_RESERVE_SECONDS=0 "
        "GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 "
        "SMEAR_GATE_ENABLED=1 COMPRESSOR=brotli TTT_ENABLED=0",
        ours="BASE=script1855 MIN_LR=0.1 SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 "
        "SMEAR_GATE_ENABLED=1 QUANT_BITS_EMBED=7 COMPRESSOR=zstd",
        step=r"^(\d+)/\d+ train_loss: \S+ train_time: \S+m tok/s: (?P<speed>\d+)",
        sidecar=True,
    ),
}
COMMON = "WARMUP_STEPS=5 SEED=1337 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=10 PYTHONUNBUFFERED=1"
OURS = "DATA_PATH=../../data LOGS_DIR=. RUN_ID=run STRICT=0"
# Of ours, beside the defaults: for some 200 steps on one GPU of 140 GB.
BEST = (
    "WARMDOWN_FRAC=0.5 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_STEPS=100 QAT_ENABLED=1 "
    "EMA_ENABLED=1 EMA_DECAY=0.95 GRAD_ACCUM_STEPS=2"
)
# How many blocks there are, and which are repeated: of both
LOOPS = ("NUM_LAYERS", "NUM_LOOPS", "LOOP_START", "LOOP_END")
# What a black box prints once: name -> pattern; of several matches the last counts.
FINAL = {
    "end": r"^stopping_early: wallclock_cap train_time: ?(\d+)ms step: ?(\d+)/",
    "loops": r"^layer_loop:enabled step:(\d+)",
    "memory": r"^peak memory allocated: (\d+) MiB",
    "bytes": r"^Total submission size \S+: (\d+) bytes",
    "live": r"^(?:step:)?\d+/\d+ val_loss: ?\S+ val_bpb: ?(\S+)",
    "averaged": r"^diagnostic pre-quantization post-ema val_loss:\S+ val_bpb:(\S+)",
    "quantised": r"^diagnostic quantized val_loss:\S+ val_bpb:(\S+) eval_time:(\d+)ms",
    "sliding_ms": r"^final_\w+_roundtrip val_loss:\S+ val_bpb:\S+ eval_time:(\d+)ms",
    "sliding": r"^final_\w+_roundtrip_exact val_loss:\S+ val_bpb:(\S+)",
    "ttt": r"^quantized_ttt_phased val_loss:\S+ val_bpb:(\S+) eval_time:(\d+)ms",
}


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """The options of the peers command."""

    script: Annotated[
        list[str],
        typer.Option(help="NAME=PATH[:KIND]; KIND is 194 or 1855; without it NAME must be one"),
    ]
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="folder of shards fineweb_train_*, fineweb_val_*"
        ),
    ]
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="SentencePiece model; else tokenizer.model beside the shards"),
    ] = None
    ours: Annotated[Path, typer.Option(help="our script")] = ROOT / "train_gpt.py"
    out: Annotated[Path, typer.Option(help="a folder with one a run; the report is OUT.json")] = (
        BENCH / "peers"
    )
    seconds: Annotated[float, typer.Option(min=1, help="training time of each")] = 600
    gpus: Annotated[int, typer.Option(min=1, max=8, help="1, 2, 4 or 8")] = 1
    val_tokens: Annotated[int, typer.Option(min=1, help="score the first N validation targets")] = (
        8 * BATCH
    )
    timeout: Annotated[
        float, typer.Option(min=1, help="seconds after which a run is ended, whatever it does")
    ] = 3600
    env: Annotated[list[str], typer.Option(help="[RUN:]NAME=VALUE: one more variable")] = ()
    path: Annotated[
        list[str],
        typer.Option(help="[RUN:]FOLDER: more Python modules; tests/fa3_stand_in: FA2 for FA3"),
    ] = ()
    only: Annotated[list[str], typer.Option(help="run this one alone; the other rows stay")] = ()
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands, run nothing")] = (
        False
    )


# ── The runs ──────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Peer:
    """One row of the table.

    The script is run as OUT/NAME/train_gpt.py, a link to it, in the empty folder OUT/NAME/work.
    kind: None for ours.
    """

    name: str
    about: str
    script: Path
    env: dict[str, str]
    kind: Kind | None = None

    def command(self, gpus: int) -> list[str]:
        """What is started in its folder."""
        launcher = []
        if gpus > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        return [sys.executable, *launcher, "../train_gpt.py"]

    def shell(self, options: PeerOptions) -> str:
        """The run as one line for a shell in this repository's folder."""
        work = shlex.quote(str(options.out / self.name / "work"))
        machine = [f'{name}="${name}"' for name in machine_variables()]
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        command = ["python", *self.command(options.gpus)[1:]]
        line = " ".join(["cd", work, "&& env -i", *machine, *settings, *command])
        return line.replace(f"cd {ROOT}/", "cd ").replace(str(ROOT), "$OLDPWD")


def machine_variables() -> dict[str, str]:
    """The only variables of the caller that a run sees."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "HOME", "LD_LIBRARY_PATH") or name.startswith("CUDA_")
    }


def pairs_of(text: str) -> dict[str, str]:
    """Settings as they stand before a command."""
    return dict(pair.split("=", 1) for pair in text.split())


def scaled(kind: Kind, share: float) -> dict[str, str]:
    """The counts of steps of a run with this share of the published budget, never below 2."""
    settings = {}
    for name, steps in kind.counts.items():
        count = max(2, round(steps * share))
        settings[name] = str(round(1 - 1 / count, 6) if name == "EMA_DECAY" else count)
    return settings


def parse_script(text: str) -> tuple[str, Path, Kind]:
    """NAME=PATH[:KIND] -> all three; a path may hold colons."""
    name, _, place = text.partition("=")
    path, _, label = place.rpartition(":")
    if label not in KINDS:
        path = place
        label = name
    known = label in KINDS and re.fullmatch(r"[\w.-]+", name) and Path(path).is_file()
    refuse(
        not known,
        f"--script {text}: give NAME=PATH:KIND, an existing file and one of {', '.join(KINDS)}",
    )
    return name, Path(path).absolute(), KINDS[label]


def plan_peers(options: PeerOptions, vocab_size: int) -> list[Peer]:
    """All runs in order: the black boxes, ours with the settings of each, ours with the best ones.

    --only leaves some.
    """
    common = pairs_of(COMMON) | {
        "TOKENIZER_PATH": "../../data/tokenizer.model",
        "VOCAB_SIZE": str(vocab_size),
        "MAX_WALLCLOCK_SECONDS": str(options.seconds),
    }
    mine = common | pairs_of(OURS)
    script = options.ours.absolute()
    share = options.seconds * options.gpus / PUBLISHED_GPU_SECONDS
    theirs = []
    ours = []
    for text in options.script:
        name, path, kind = parse_script(text)
        both = pairs_of(kind.shared) | scaled(kind, share)
        folder = "data_with_bytes" if kind.sidecar else "data"
        data = {"DATA_PATH": f"../../{folder}", "RUN_ID": name}
        settings = common | both | pairs_of(kind.theirs) | data
        theirs.append(Peer(name, kind.about, path, settings, kind))
        settings = mine | both | pairs_of(kind.ours)
        ours.append(Peer(f"ours_as_{name}", kind.about, script, settings))
    best = Peer("ours_best", "our defaults and BEST", script, mine | pairs_of(BEST))
    found = [*theirs, *ours, best]

    names = [peer.name for peer in found]
    known = len(set(names)) == len(names) and set(options.only) <= set(names)
    refuse(not known, f"--script, --only: the runs are {', '.join(names)}; each name once")
    for text in options.env:
        add_variable(text, found)
    for text in options.path:
        add_modules(text, found)
    return [peer for peer in found if not options.only or peer.name in options.only]


def chosen(text: str, peers: list[Peer]) -> tuple[str, list[Peer]]:
    """[RUN:]VALUE -> the value and the runs that it is for: one, or all."""
    target, _, value = text.partition(":")
    named = [peer for peer in peers if peer.name == target]
    return (value, named) if named else (text, peers)


def add_variable(text: str, peers: list[Peer]) -> None:
    """--env: [RUN:]NAME=VALUE."""
    value, targets = chosen(text, peers)
    refuse(not re.match(r"\w+=", value), f"--env {text}: give NAME=VALUE, or RUN: before it")
    name, _, content = value.partition("=")
    for peer in targets:
        peer.env[name] = content


def add_modules(text: str, peers: list[Peer]) -> None:
    """--path: [RUN:]FOLDER, before those given earlier; a stand-in for FA3 is named."""
    value, targets = chosen(text, peers)
    folder = Path(value)
    refuse(not folder.is_dir(), f"--path {text}: give a FOLDER, or RUN: before it")
    for peer in targets:
        folders = [str(folder.absolute())]
        if peer.env.get("PYTHONPATH"):
            folders.append(peer.env["PYTHONPATH"])
        peer.env["PYTHONPATH"] = os.pathsep.join(folders)
        if folder.resolve() == STAND_IN:
            peer.about += "; HERE FA2, AS TORCH HAS IT, STOOD IN FOR FA3"


# ── Their data ────────────────────────────────────────────────────────────────────────────────────
def lay_out(options: PeerOptions, tokenizer: Path, cfg: Config) -> dict:
    """Link tokenizer and training shards, cut a head of validation; returns what there is.

    All score that head to its last target. The file of bytes per token lies in a folder of its own,
    as its name makes other scripts take it for a shard.
    """
    train = Split(cfg, "train")
    val = Split(cfg, "val")
    refuse(
        list(options.data.glob("fineweb_val_bytes_*")),
        f"--data {options.data}: holds bytes per token; take shards without them",
    )
    together = BATCH * options.gpus
    refuse(
        options.val_tokens % together or options.val_tokens >= val.tokens,
        f"--val-tokens {options.val_tokens}: must be below the {val.tokens} that are there, "
        f"and a multiple of {together}, so that all score the same targets",
    )

    tokens = val.take(0, options.val_tokens + 1)
    sizes = np.append(0, train_gpt.ByteTable(cfg).count(tokens))
    lay_out_folder(options.out / "data", train.paths, {"val": tokens})
    with_bytes = {"val": tokens, "val_bytes": sizes}
    lay_out_folder(options.out / "data_with_bytes", train.paths, with_bytes)
    (options.out / "data" / "tokenizer.model").symlink_to(tokenizer.absolute())
    return dict(
        train_tokens=train.tokens,
        val_tokens=options.val_tokens,
        val_bytes=int(sizes.sum()),
        tokenizer_sha256=prepare_data.file_sha256(tokenizer),
    )


def lay_out_folder(folder: Path, train: list[Path], files: dict[str, np.ndarray]) -> None:
    """Make it anew: links to the training shards, and one shard for each array."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in train:
        (folder / path.name).symlink_to(path.absolute())
    for split, values in files.items():
        writer = prepare_data.ShardWriter(folder, split, prepare_data.Recipe())
        tokens = values.astype("<u2")
        writer.add(prepare_data.Encoded(b"", tokens, utf8_bytes=0, raw_bytes=0, altered=False))
        writer.close()


# ── Running and reading ───────────────────────────────────────────────────────────────────────────
def execute(peer: Peer, options: PeerOptions) -> dict:
    """Run it in an empty folder with its environment alone; whatever happens is a row.

    Its output is in stdout.txt.
    """
    folder = options.out / peer.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    (folder / "train_gpt.py").symlink_to(peer.script)
    began = time.perf_counter()
    code = run_to_its_end(peer, options, folder)
    seconds = time.perf_counter() - began

    output = folder / "stdout.txt"
    text = output.read_text(errors="replace").replace(str(ROOT), ".")
    output.write_text(text)
    row = dict(
        name=peer.name,
        about=peer.about,
        exit_code=code,
        last_line=text.strip().rpartition("\n")[2][:300],
        seconds=seconds,
        sha256=prepare_data.file_sha256(peer.script),
        command=peer.shell(options),
    )
    found = read_output(text, peer) if peer.kind else read_records(folder / "work" / "run")
    return row | found | rates(found, options.gpus)


def run_to_its_end(peer: Peer, options: PeerOptions, folder: Path) -> int | str:
    """Exit code, or that it was over its time."""
    with (folder / "stdout.txt").open("wb") as output:
        process = subprocess.Popen(
            peer.command(options.gpus),
            cwd=folder / "work",
            env=machine_variables() | peer.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            return f"over {options.timeout:g} s"
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """SIGTERM to what is left of its group, which torchrun hands on; SIGKILL 15 s later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(15)


def last_match(pattern: str, text: str) -> re.Match | None:
    """The last line that looks like this."""
    found = None
    for match in re.finditer(pattern, text, re.M):
        found = match
    return found


def step_times(peer: Peer, text: str, batch: int) -> dict[int, float]:
    """Step -> milliseconds since the start, of every step that was logged."""
    times = {}
    for match in re.finditer(peer.kind.step, text, re.M):
        step = int(match[1])
        value = float(match[2])
        times[step] = value if "ms" in match.groupdict() else 1e3 * step * batch / value
    return times


def step_figures(steps_ms: list[float]) -> dict:
    """The last and the median time of a step."""
    return dict(
        step_ms_last=steps_ms[-1] if steps_ms else None,
        step_ms_median=float(np.median(steps_ms)) if steps_ms else None,
    )


def blocks_of_a_step(layers: int, loops: int, first: int, last: int, share: float) -> float:
    """Blocks that a mean step runs: `loops` more of first to last in this share of the steps."""
    return layers + share * loops * (last - first + 1)


def read_output(text: str, peer: Peer) -> dict:
    """The figures of a black box, from what it printed; None for what it did not come to."""
    last = {name: last_match(pattern, text) for name, pattern in FINAL.items()}
    config = {name: peer.env[name] for name in ("VOCAB_SIZE", *pairs_of(peer.kind.shared))}
    times = step_times(peer, text, int(config["TRAIN_BATCH_TOKENS"]))
    every = int(peer.env["TRAIN_LOG_EVERY"])
    marks = [step for step in times if step % every == 0]
    steps_ms = [(times[b] - times[a]) / (b - a) for a, b in itertools.pairwise(marks)]

    steps, train_ms = max(times.items(), default=(None, None))
    if last["end"]:
        steps = int(last["end"][2])
        train_ms = float(last["end"][1])
    # The seconds of the last score that it came to stand in the last group of that line.
    scored = last["ttt"] or last["sliding_ms"] or last["quantised"]
    return dict(
        steps=steps,
        train_seconds=None if train_ms is None else train_ms / 1e3,
        **step_figures(steps_ms),
        blocks=blocks_of_a_step(
            *(int(peer.env.get(name, 0)) for name in LOOPS),
            share=1 - int(last["loops"][1]) / steps if last["loops"] and steps else 0,
        ),
        peak_gib=int(last["memory"][1]) / 1024 if last["memory"] else None,
        total_bytes=int(last["bytes"][1]) if last["bytes"] else None,
        eval_seconds=int(scored[scored.lastindex]) / 1e3 if scored else None,
        config=Config.from_env(config).non_default(),
        bpb={name: float(last[name][1]) for name in SCORES if last[name]},
    )


def read_records(folder: Path) -> dict:
    """The figures of our run, from result.json and metrics.jsonl; nothing if it did not end."""
    if not (folder / "result.json").exists():
        return {}
    result = json.loads((folder / "result.json").read_text())
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps_ms = [event["step_ms"] for event in events if event["event"] == "step"]
    config = Config(**result["config"])
    same = ("steps", "train_seconds", "step_ms_median", "eval_seconds", "total_bytes")
    scores = result["scores"]
    return {name: result[name] for name in same} | dict(
        step_ms_last=steps_ms[-1] if steps_ms else None,
        peak_gib=result["peak_memory_bytes"] / 2**30,
        blocks=blocks_of_a_step(
            *(getattr(config, name.lower()) for name in LOOPS),
            share=result["toggles"]["NUM_LOOPS"]["share_of_steps"] if config.num_loops else 0,
        ),
        config=config.non_default(),
        bpb={name: scores[name]["bpb"] for name in SCORES if name in scores},
    )


def rates(found: dict, gpus: int) -> dict:
    """Tokens per second, FLOPs and MFU of the whole training."""
    if not found.get("steps") or not found["train_seconds"]:
        return {}
    # without loops: `blocks` has those of the steps
    cfg = Config(
        **{name.lower(): v for name, v in found["config"].items() if name not in LOOPS[1:]}
    )
    speed = found["steps"] * cfg.train_batch_tokens / found["train_seconds"]
    flops = forward_flops(cfg)
    in_blocks = flops.linear - flops.head + flops.attention
    work = 3 * (flops.head + in_blocks * found["blocks"] / cfg.num_layers)
    peak = nominal()
    return dict(
        tokens_per_second=speed,
        mflop_per_token=work / 1e6,
        mfu=speed * work / gpus / peak if peak else None,
    )


# ── The command ───────────────────────────────────────────────────────────────────────────────────
def compare(options: PeerOptions) -> None:
    """Run all that is planned, one after the other; the report is rewritten after each."""
    refuse(8 % options.gpus, f"--gpus {options.gpus}: choose 1, 2, 4 or 8")
    tokenizer = options.tokenizer or options.data / "tokenizer.model"
    cfg = Config(
        data_path=str(options.data),
        tokenizer_path=str(tokenizer),
        vocab_size=prepare_data.load_tokenizer(tokenizer).vocab_size(),
    )
    wanted = plan_peers(options, cfg.vocab_size)
    if options.dry_run:
        for peer in wanted:
            print(f"# {peer.name}: {peer.about}\n{peer.shell(options)}")
        return

    setup = dict(
        gpus=options.gpus,
        device=device_name(),
        torch=torch.__version__,
        seconds=options.seconds,
        **lay_out(options, tokenizer, cfg),
    )
    path = options.out.with_name(f"{options.out.name}.json")
    rows = rows_to_keep(path, setup) if options.only else {}
    for peer in wanted:
        print(f"{peer.name}: {peer.about}", flush=True)
        rows[peer.name] = execute(peer, options)
        report = origin() | dict(setup=setup, rows=list(rows.values()))
        train_gpt.write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))


def rows_to_keep(path: Path, setup: dict) -> dict[str, dict]:
    """Name -> row of an earlier report, if it was made with the same setup."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    if old["setup"] != setup:
        return {}
    return {row["name"]: row for row in old["rows"]}

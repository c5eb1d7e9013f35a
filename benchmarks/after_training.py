"""Stages after training, and beside it: scoring, export, preparation of data, import.

Each is one function that says what is timed, with its floor and its twin as in training.py.
"""

import contextlib
import dataclasses
import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import Tensor

import prepare_data
import train_gpt
from benchmarks.machine import ROOT, Bench, Measured
from benchmarks.twins import plain_score
from planning.flops import forward_flops
from train_gpt import COMPRESSORS, Grid, Split, Trainer, Validation

# A compressor may take seconds: few samples, none of them untimed.
SLOW = dict(most=3, limit=3, warm=False)


# ── Scoring ───────────────────────────────────────────────────────────────────────────────────────
class Mode(NamedTuple):
    """A way to score. kind: fixed, sliding or documents; twin: what it is timed beside."""

    name: str
    kind: str
    stride: int
    twin: str = ""


MODES = (
    Mode("fixed windows", "fixed", 64),
    Mode("sliding, stride 64", "sliding", 64, twin="one window at a time, all logits"),
    Mode("sliding, stride 256", "sliding", 256),
    Mode("document-isolated, stride 64", "documents", 64),
)


def scoring(b: Bench, trainer: Trainer) -> None:
    """All ways to score, on as many targets as fill a few batches of windows."""
    compiling = sum(score_mode(b, trainer, mode) for mode in MODES)
    if b.run.compile:
        seconds = np.array([[compiling]])
        note = "first calls less usual ones"
        b.add(Measured("start-up", "compile for scoring", seconds, note=note))


def score_mode(b: Bench, trainer: Trainer, mode: Mode) -> float:
    """Timed: the score of all windows of one mode. Twin: one window at a time, all logits.

    Floor: the products of each window's tokens, with the head for its new targets alone. Returns
    the seconds by which the first calls took longer.
    """
    cfg = b.cfg
    window = cfg.window
    stride = min(mode.stride, window)
    sliding = mode.kind == "sliding"
    targets = b.windows * (stride if sliding else window)
    narrow = dataclasses.replace(
        cfg, eval_stride=stride, val_max_tokens=min(targets, trainer.val.n)
    )
    val = Validation(narrow, b.run, Split(cfg, "val"))
    if mode.kind == "documents":
        rows = train_gpt.document_windows(val, window, stride)
    else:
        rows = train_gpt.windows(0, val.n, window, stride if sliding else 0)

    works = [lambda: train_gpt.score(narrow, b.run, trainer.forward, val, rows)]
    if mode.twin:
        works.append(lambda: plain_score(trainer.model, val, rows))
    seconds = b.time(*works, most=7, limit=4, block=False)
    compiling = max(b.first - seconds.mean(1).sum(), 0)

    floor = b.floor(scoring_flops(b, rows, val.n) / b.run.world)
    rate = (val.n, "targets/s")
    note = f"{val.n:,} targets, {len(rows):,} windows of up to {window}"
    b.add(Measured("scoring", mode.name, seconds, floor, rate, mode.twin, note))
    return compiling


def scoring_flops(b: Bench, rows: np.ndarray, targets: int) -> float:
    """Products of all windows: attention over what lies in the window, the head at the targets."""
    flops = forward_flops(b.cfg)
    spans = rows[:, 1] - rows[:, 0]
    blocks = ((flops.linear - flops.head) * spans).sum()
    attention = (flops.attention / (b.cfg.train_seq_len + 1) * spans * (spans + 1)).sum()
    return float(blocks + flops.head * targets + attention)


# ── Export ────────────────────────────────────────────────────────────────────────────────────────
def like_trained(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random weights.

    The rows and columns of a matrix differ in spread as trained ones do, which is what a coder can
    use.
    """
    w = 0.15 * torch.randn(shape, generator=generator)
    if len(shape) != 2:
        return w
    rows, columns = ((0.5 * torch.randn(n, generator=generator)).exp() for n in shape)
    return w * torch.outer(rows, columns)


def exporting(b: Bench, trainer: Trainer) -> None:
    """Quantise, compress with everything that can, decompress, load: of synthetic weights."""
    plan = trainer.plan
    path = Path(b.cfg.logs_dir) / "artifact.bin"
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, p in trainer.model.named_parameters():
        state[name] = like_trained(p.shape, generator).to(p.device)
    quantisation(b, state, plan)

    quick = dataclasses.replace(b.cfg, compressor="zstd")
    ready = train_gpt.quantised(b.cfg, state, plan)
    path.write_bytes(train_gpt.encode_artifact(quick, ready, level=1))
    facts, parts = train_gpt.read_container(path)
    for name in COMPRESSORS:
        if name != "none":
            compression(b, name, facts, parts, path)
    packing(b, state, plan, path)
    loading(b, state, path)


def quantisation(b: Bench, state: dict[str, Tensor], plan: dict) -> None:
    """Timed: codes and steps of all matrices. Floor: 5 bytes a weight."""
    coded = [(how, state[name]) for name, how in plan.items() if isinstance(how, Grid)]
    if not coded:
        return
    weights = sum(w.numel() for _, w in coded)
    parts = train_gpt.quantised(b.cfg, state, plan)
    entropy = train_gpt.code_size(b.cfg, parts, 0)["order0_bytes"]

    def quantise() -> None:
        for grid, w in coded:
            grid.quantise(w)

    seconds = b.time(quantise)
    floor = b.floor(nbytes=5 * weights)
    note = f"{weights:,} weights; order-0 entropy of their codes {entropy:,} bytes"
    b.add(Measured("export", "quantise", seconds, floor=floor, note=note))


def compression(b: Bench, name: str, facts: dict, parts: dict[str, Tensor], path: Path) -> None:
    """Timed: the container compressed, then read back from the file.

    Twin of zstd: all in one frame. Floor of both: the raw and the packed bytes, in the host's
    memory.
    """
    level = COMPRESSORS[name].level
    raw = sum(part.nbytes for part in parts.values())
    packed: dict[str, bytes] = {}

    def fast() -> None:
        packed["ours"] = train_gpt.encode_container(parts, facts, name)

    def one_frame() -> None:
        everything = safetensors.torch.save(parts)
        packed["twin"] = zstandard.ZstdCompressor(level=level).compress(everything)

    works = [fast]
    twin = ""
    if name == "zstd":
        works.append(one_frame)
        twin = "all in one frame"
    seconds = b.time(*works, **SLOW)
    rate = (raw, "B/s")
    ours = len(packed["ours"])
    note = f"{raw:,} -> {ours:,} bytes"
    if twin:
        note += f", its twin {len(packed['twin']):,} bytes"
    floor = b.floor(nbytes=raw + ours, host=True)
    b.add(Measured("export", f"compress, {name} {level}", seconds, floor, rate, twin, note))

    path.write_bytes(packed["ours"])
    seconds = b.time(lambda: train_gpt.read_container(path), limit=1)
    note = f"{ours:,} -> {raw:,} bytes"
    b.add(Measured("export", f"decompress, {name}", seconds, floor, rate, note=note))


def packing(b: Bench, state: dict[str, Tensor], plan: dict, path: Path) -> None:
    """Timed: all of the export, as shipped: quantise, compress, write."""

    def pack() -> None:
        parts = train_gpt.quantised(b.cfg, state, plan)
        path.write_bytes(train_gpt.encode_artifact(b.cfg, parts))

    seconds = b.time(pack, **SLOW)
    note = f"COMPRESSOR={b.cfg.compressor}, as shipped"
    b.add(Measured("export", "pack (quantise, compress)", seconds, note=note))


def loading(b: Bench, state: dict[str, Tensor], path: Path) -> None:
    """Timed: the artifact read back to fp32 weights. Floor: its bytes and theirs, on the host."""
    seconds = b.time(lambda: train_gpt.read_artifact(path), limit=1)
    numel = sum(w.numel() for w in state.values())
    floor = b.floor(nbytes=path.stat().st_size + 4 * numel, host=True)
    b.add(Measured("export", "load (unpack)", seconds, floor=floor))


# ── Data and import ───────────────────────────────────────────────────────────────────────────────
def preparation(b: Bench, trainer: Trainer) -> None:
    """prepare_data.py on the text behind the first training tokens; and the import."""
    tokenisation(b, trainer.split)
    import_time(b)


def texts_of(b: Bench, split: Split) -> list[str]:
    """The documents behind the first training tokens."""
    sp = train_gpt.ByteTable(b.cfg).sp
    wanted = 20_000 if b.quick else 400_000
    tokens = split.take(0, min(split.tokens, wanted))
    starts = np.flatnonzero(tokens == train_gpt.BOS).tolist()
    edges = [0, *starts, len(tokens)]
    return [sp.decode(tokens[i:j].tolist()) for i, j in itertools.pairwise(edges) if j > i]


def tokenisation(b: Bench, split: Split) -> None:
    """Timed: documents tokenised and written as shards, by one worker."""
    texts = texts_of(b, split)
    size = sum(len(text.encode()) for text in texts)
    model = Path(b.cfg.tokenizer_path)
    folder = Path(b.cfg.logs_dir)

    def prepare() -> None:
        writer = prepare_data.ShardWriter(folder, "train", prepare_data.Recipe())
        with contextlib.redirect_stdout(io.StringIO()):
            for document in prepare_data.encode_batch(model, texts):
                writer.add(document)
            writer.close()

    seconds = b.time(prepare, most=5, limit=3)
    name = "tokenise and write shards, 1 worker"
    note = f"{size:,} bytes of text"
    b.add(Measured("data", name, seconds, rate=(size, "B/s"), note=note))


def import_time(b: Bench) -> None:
    """Timed: a Python process that imports train_gpt and ends."""
    command = [sys.executable, "-c", "import train_gpt"]
    seconds = b.time(lambda: subprocess.run(command, cwd=ROOT, check=True), limit=6, warm=False)
    b.add(Measured("start-up", "python, import train_gpt", seconds))

"""Train a small GPT under a wallclock budget, ship it in 16,000,000 bytes, score what was shipped.

    shards -> batches -> training steps      (views change what the forward pass sees)
           -> averages                       (or the live weights)
           -> prune, quantise, compress      -> artifact.bin, on disk
           -> read back                      -> windows over the validation tokens
           -> nats of every target, once     -> bits per byte
           -> toggles measured on and off    -> result.json, the table at the end of the log

Launch:  make train KNOB=value ..., or
         torchrun --standalone --nproc_per_node=8 train_gpt.py KNOB=value ...
         A knob may be an environment variable instead; the argument wins.
Help:    python train_gpt.py --help lists every knob.
Plan:    python train_gpt.py --plan KNOB=value ... says what a run would take, and runs nothing.
Leaves:  LOGS_DIR/RUN_ID/ with train.log, metrics.jsonl, result.json, checkpoint.bin, artifact.bin,
         train_gpt.py as it was run and train_gpt.packed.py, the script that is counted.

Sections, in the order in which the data flow:

    1 Config       every knob once; refusals
    2 Run          ranks, log, live line, clock, phases, stop signals
    3 Data         shards, batches, bytes per token
    4 Grid         the one definition of quantisation
    5 Model        its parts, the techniques, one forward pass
    6 Schedule     what a step does, from the step and the clock alone
    7 Optimiser    flat buffers, Muon, AdamW
    8 Views and averages   QAT, QNA; SWA, EMA, SQWA
    9 Train        one step, warm-up, the loop, checkpoints
    10 Artifact    codes, coders, container, cap
    11 Score       windows, the sheet of nats, test-time training
    12 Report      proof that toggles acted, result, tables
    13 Names       settings of other scripts, their defaults, misspelt ones; --help
    14 Main        the data flow
"""

from __future__ import annotations

import base64
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import hashlib
import importlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # OpenMP reads this when torch is imported. Threads that spin while they wait for each other are
    # up to 35 times slower beside a busy process. What you set yourself stays.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    def tell_of_imports() -> None:
        """Says every 10 s that imports are under way, at once if it is a run: a cold disk takes
        minutes.
        """
        began = time.monotonic()
        stream = sys.stdout
        if {"--help", "--plan"} & {*sys.argv}:
            stream = sys.stderr
            time.sleep(10)
        # nothing in the stream's buffer: what nobody reads would end the run when that is flushed
        with contextlib.suppress(OSError, AttributeError):
            while "main" not in globals():
                text = f"importing torch, {time.monotonic() - began:.0f} s\n"
                os.write(stream.fileno(), text.encode())
                time.sleep(10)

    if os.environ.get("LOCAL_RANK", "0") == "0":
        threading.Thread(target=tell_of_imports, daemon=True).start()

import brotli
import numpy as np
import safetensors.torch
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from rich.box import MARKDOWN, Box
from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ── 1 Config ──────────────────────────────────────────────────────────────────────────────────────
# In: environment variables and arguments. Out: one frozen Config, every value typed and in range.
# Promise: nothing that looks like a setting is ignored; all that is wrong with a launch is said
# at once. Knows nothing of torch.

# What the exit code of a run says
EXIT_CODES = {
    0: "good",
    2: "bad configuration or data",
    3: "over the size cap (all is saved)",
    4: "a toggle did nothing",
    5: "non-finite loss, gradient or score",
    6: "a rank was lost or differs",
    7: "cannot read or write a file",
    8: "out of memory",
    9: "over a time limit (all is saved)",
    130: "interrupted",
    143: "terminated",
}

# What a rank alone finds, and says for itself
RANKS_OWN_CODES = (6, 8)


class Refusal(Exception):
    """Ends the run. Each problem is one line that names the thing, its value and the remedy.

    A line may quote a file or a variable: what cannot be printed is escaped, what is long is cut.
    `code` is a key of EXIT_CODES. base: the one that refused settings are like.
    """

    def __init__(self, problems: str | list[str], code: int = 2, base: str = ""):
        super().__init__(problems, code, base)
        if isinstance(problems, str):
            problems = [problems]
        longest = max(4000 // len(problems), 200)
        self.problems = [one_line(problem[:longest]) for problem in problems]
        self.code = code
        self.base = base

    def __str__(self) -> str:
        return "\n".join(self.problems)


def one_line(text: str) -> str:
    """The text with escapes in place of line breaks and of all else that cannot be printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def refuse(broken, message: str, code: int = 2) -> None:
    """Raises Refusal if `broken` is true."""
    if broken:
        raise Refusal(message, code)


@contextlib.contextmanager
def noted(problems: list[str]):
    """Notes a Refusal of what is done inside, and goes on."""
    try:
        yield
    except Refusal as refusal:
        problems += refusal.problems


@dataclass(frozen=True)
class Knob:
    """What is known of a knob beside its name, type and default."""

    unit: str
    # Its meaning in one line, for --help and README
    doc: str
    # Where it acts: run, loop (how training runs, not what it makes), seed, train, model and eval
    # (both go into the artifact), grid (from QAT to export), export, size (what counts)
    scope: str = "train"
    # The range of a number, both ends included
    lo: float | None = None
    hi: float | None = None
    # All values that it can take
    choices: tuple = ()
    # A toggle that makes the training depend on the quantisation grid
    on_grid: bool = False
    # What it can do nothing without: other knobs, each perhaps behind "not" or with the value that
    # it must have, as ttt_mode=sgd; joined by "and" and then by "or"
    needs: str = ""
    # Values at which it gives the knobs that need it nothing to do
    off: tuple = (0, "none")


def knob(default, unit: str, doc: str, **more):
    """One setting, as a field of Config. more: the rest of Knob."""
    return field(default=default, metadata=vars(Knob(unit, doc, **more)))


# What several knobs choose from
CODE_BITS = (2, 3, 4, 5, 6, 7, 8)
BITS = (*CODE_BITS, 16)
QAT_BITS = (0, *CODE_BITS)
# of the lr scale, of ITERATIONS, of the run as long as it will be
TRIGGERS = ("always", "lr_scale", "iter_frac", "time_frac")
STARTS = "lr scale / share of ITERATIONS / of run"
SCOPES = ("exported", "linears", "small_linears", "block_linears")
NOISES = ("export", "row")
SUM_TYPES = ("fp32", "native", "bf16")
FLOATS = ("fp16", "fp32")
FITS = ("svd", "refit")
MATRIX = ("muon", "adam")
BACKENDS = ("auto", "sdpa", "cudnn", "flash", "flex", "fa3", "fa2")
CODERS = ("zlib", "zstd", "lzma", "brotli", "ans")
TTT = ("none", "sgd", "lora")
LOADERS = ("rows", "documents", "shuffled", "coprime")
READS = "rows in order / packed documents / rows at random / in coprime strides"

# What knobs need that is too long for their line
SNAPSHOTS = "swa_enabled or sqwa_enabled"
TABLES = "bigram_vocab_size or ve_enabled"
WARMDOWN = "warmdown_frac or warmdown_iters"
SHARED = "quant_clip_mlp or quant_clip_attn or quant_clip_bigram or quant_clip_embed"
SMEARS = "smear_gate or smear_gate_enabled"
HEAD_GATES = "sparse_attn_gate_enabled or gated_attn_enabled or attn_out_gate_enabled"
GATES = "smear_gate_enabled or sparse_attn_gate_enabled or attn_out_gate_enabled"
WAYS = "eval_stride or doc_isolated_eval or ttt_mode"
CODES = "quant_bits_mlp or quant_bits_attn or quant_bits_bigram or quant_bits_embed"

run_knob = partial(knob, scope="run")
loop_knob = partial(knob, scope="loop")
model_knob = partial(knob, scope="model")
grid_knob = partial(knob, scope="grid")
export_knob = partial(knob, scope="export")
size_knob = partial(knob, scope="size")
eval_knob = partial(knob, scope="eval")

# 16 bits: no codes
bits_knob = partial(grid_knob, choices=BITS, off=(16,))
code_knob = partial(grid_knob, needs=CODES)

# The knobs of several techniques
lqer_knob = partial(export_knob, needs="lqer_enabled")
svd_knob = partial(export_knob, needs="lqer_fit")
snapshot_knob = partial(knob, needs=SNAPSHOTS)
start_knob = partial(knob, choices=TRIGGERS, off=("always",))

# Where prepare_data.py puts the challenge's data
FINEWEB = "data/datasets/fineweb10B_sp1024"
TOKENIZER = "data/tokenizers/fineweb_1024_bpe.model"

# Scopes that make runs comparable: not names, places, machine and seed
COMPARED = ("model", "train", "grid", "export", "size", "eval")

# What names finished weights -> scopes whose knobs can do nothing for them. Beside a checkpoint
# other settings of a training are compared with those that made it.
IDLE_SCOPES = {
    "eval_only": ("loop", "seed", "train", "grid", "export"),
    "checkpoint": ("loop",),
}

# QUANT_CLIP -> the quantiles of a row's magnitudes among which its largest code is chosen
CLIP_QUANTILES = {
    "amax": (1.0,),
    "quantile": (0.9999984,),
    "search5": (0.999, 0.9995, 0.9999, 0.99999, 1.0),
}
QUANTILES = tuple(CLIP_QUANTILES)
# The last one: a multiple of a row's standard deviation
CLIPS = (*QUANTILES, "sigma")
# at a choice of its own it leaves QUANT_CLIP nothing to say
clip_knob = partial(grid_knob, choices=("auto", *QUANTILES), off=QUANTILES)
sigma_knob = partial(grid_knob, lo=0.1, hi=1e3)

# MUON_COEFFS -> (a, b, c) of each iteration that orthogonalises; one alone is that of all
COEFFICIENTS = {
    "quintic": ((3.4445, -4.775, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
POLYNOMIALS = tuple(COEFFICIENTS)

# Functions of knobs, and which: their parameters. Each refuses what does not go together
RULES: dict[Callable[..., None], set[str]] = {}


def row_stages(text: str) -> list[tuple[int, float]]:
    """[(tokens of a row, share of the run at which that ends)] of a TRAIN_SEQ_SCHEDULE."""
    told = f"TRAIN_SEQ_SCHEDULE={text}"
    stages = []
    for stage in text.split(","):
        length, _, end = stage.strip().partition("@")
        try:
            stages.append((int(length), float(end)))
        except ValueError:
            raise Refusal(f"{told}: {stage}: write LENGTH@SHARE, as 1024@0.1,2048@1") from None
    lengths, ends = zip((1, 0.0), *stages, strict=True)
    for values, name in ((lengths, "lengths (2 or more)"), (ends, "shares")):
        grow = all(a < b for a, b in itertools.pairwise(values))
        refuse(not grow, f"{told}: its {name} must grow")
    refuse(len(stages) < 2, f"{told}: one length grows into none; set TRAIN_SEQ_LEN={lengths[-1]}")
    refuse(ends[-1] != 1, f"{told}: its last share must be 1, the end of the run")
    return stages


def short_document_chunks(text: str) -> list[tuple[int, int]]:
    """[(most tokens of a document, tokens of its chunks)], shortest first, of a
    TTT_SHORT_SCORE_FIRST_STEPS.
    """
    steps = []
    for step in filter(None, text.split(",")):
        longest, _, chunk = step.strip().partition(":")
        try:
            steps.append((int(longest), int(chunk)))
        except ValueError:
            told = f"TTT_SHORT_SCORE_FIRST_STEPS={text}: {step}"
            raise Refusal(f"{told}: write LENGTH:CHUNK, as 256:8,2000:24") from None
    broken = any(number < 1 for step in steps for number in step)
    refuse(broken, f"TTT_SHORT_SCORE_FIRST_STEPS={text}: lengths and chunks must be 1 or more")
    return sorted(steps)


def rule(check: Callable[..., None]) -> staticmethod:
    """Adds a function to RULES. Inside Config it stands below the knobs that it is about."""
    RULES[check] = set(inspect.signature(check).parameters)
    return staticmethod(check)


@dataclass(frozen=True)
class Config:
    """Every knob, once. A command calls it by its name in upper case.

    A technique's knobs and rules are one block, which begins with what they alone need. An
    artifact holds the knobs of the scopes model and eval in this order.
    """

    # The run: where and what
    data_path: str = run_knob(FINEWEB, "folder", "fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = run_knob(TOKENIZER, "file", "SentencePiece model of the shards")
    caseops_enabled: bool = run_knob(False, "", "refuse data that is not CaseOps")
    logs_dir: str = run_knob("logs", "folder", "runs are written to LOGS_DIR/RUN_ID")
    run_id: str = run_knob("", "name", "a new one, but with RESUME; empty: date, time, hash, seed")
    resume: bool = run_knob(False, "", "go on with RUN_ID from its last checkpoint, if it has one")
    base: str = loop_knob("", "name", "another script's defaults, from studies/bases.toml")
    checkpoint_every: float = loop_knob(60.0, "s", "between checkpoints; 0: 1st, last, stop", lo=0)
    checkpoint: str = run_knob("", "file", "export and score this checkpoint.bin; train nothing")
    eval_only: str = run_knob("", "file", "score this artifact.bin and train nothing")
    nonfinite: str = loop_knob("stop", "", "a step with NaN or Inf", choices=("stop", "skip"))
    dist_timeout: float = run_knob(300.0, "s", "a rank gives up after waiting for so long", lo=1)
    seed: int = knob(1337, "", "initial weights and noise", scope="seed", lo=0, hi=2**32 - 1)
    strict: bool = run_knob(True, "", "exit 4 when a requested toggle did nothing")
    attn_backend: str = run_knob("auto", "", "auto: the fastest, within 3 %", choices=BACKENDS)
    compile: str = run_knob("auto", "", "torch.compile; auto: on GPUs", choices=("auto", "0", "1"))

    @rule
    def one_source(checkpoint, eval_only, resume, run_id):
        sources = sources_of(checkpoint, eval_only, resume, run_id)
        refuse(len(sources) > 1, f"{' and '.join(sources)} contradict each other: choose one")

    @rule
    def resume_needs_a_run(resume, run_id):
        refuse(resume and not run_id, "RESUME=1: of which run? Set its RUN_ID")

    @rule
    def run_is_a_folder_of_logs_dir(run_id):
        remedy = "a name, not a path: it becomes a folder in LOGS_DIR"
        refuse("/" in run_id or run_id in (".", ".."), f"RUN_ID={run_id}: {remedy}")

    # The model
    vocab_size: int = model_knob(1024, "tokens", "must be the tokenizer's", lo=2, hi=65536)
    num_layers: int = model_knob(11, "blocks", "transformer blocks", lo=1)
    model_dim: int = model_knob(512, "", "width of the residual stream", lo=1)
    num_heads: int = model_knob(8, "", "query heads", lo=1)
    num_kv_heads: int = model_knob(4, "", "key / value heads, shared by query heads", lo=1)
    mlp_mult: float = model_knob(3.0, "x dim", "hidden width of the MLP", lo=0.01)
    init: str = model_knob("ortho", "", "initial matrices", choices=("default", "ortho"))
    tied_embed_init_std: float = model_knob(0.005, "", "of the initial token embedding", lo=0)
    qk_gain_init: float = model_knob(1.5, "", "initial gain of the queries, one per head", lo=0)
    logit_softcap: float = model_knob(30.0, "", "logits = cap * tanh(z / cap)", lo=1e-6)

    @rule
    def heads_divide_the_width(model_dim, num_heads):
        remedy = f"must be a multiple of NUM_HEADS={num_heads}"
        refuse(model_dim % num_heads, f"MODEL_DIM={model_dim}: {remedy}")

    @rule
    def heads_share_keys_evenly(num_heads, num_kv_heads):
        remedy = f"must divide NUM_HEADS={num_heads}"
        refuse(num_heads % num_kv_heads, f"NUM_KV_HEADS={num_kv_heads}: {remedy}")

    @rule
    def mlp_has_hidden_units(mlp_mult, model_dim):
        remedy = f"leaves no hidden unit at MODEL_DIM={model_dim}"
        refuse(mlp_mult * model_dim < 1, f"MLP_MULT={mlp_mult}: {remedy}")

    # MLP slope
    negative_slope: float = model_knob(0.0, "", "LeakyReLU^2 in the MLP; 0: ReLU^2", lo=0, hi=1)

    # Rotary positions: all or some dimensions of a head, NTK scaling
    rope_base: float = model_knob(10000.0, "", "rotary base", lo=1)
    rope_dims: int = model_knob(0, "dims", "rotated dimensions of a head; 0: all", lo=0)
    rope_ntk_len: int = model_knob(0, "tokens", "NTK: base for TRAIN_SEQ_LEN/this; 0: off", lo=0)

    @rule
    def rotated_dimensions_are_pairs(model_dim, num_heads, rope_dims, rope_ntk_len):
        head, rest = divmod(model_dim, num_heads)
        if rest:
            return
        rotated = rope_dims or head
        broken = rope_dims > head or rotated % 2 or (rope_ntk_len and rotated == 2)
        remedy = f"must be even and at most the head dimension {head} (with ROPE_NTK_LEN above 2)"
        refuse(broken, f"ROPE_DIMS={rope_dims}: {remedy}")

    # XSA
    xsa_last_n: int = model_knob(0, "blocks", "exclusive self-attention, last N; 0: off", lo=0)

    @rule
    def xsa_blocks_exist(xsa_last_n, num_layers):
        remedy = f"the model has {num_layers} blocks"
        refuse(xsa_last_n > num_layers, f"XSA_LAST_N={xsa_last_n}: {remedy}")

    # Document masks
    doc_knob = partial(model_knob, needs="doc_mask")
    doc_mask: bool = model_knob(False, "", "no token attends to another document")
    doc_max_len: int = doc_knob(0, "tokens", "attention cuts documents here; 0: by the row", lo=0)

    # Norm scale
    ln_scale: bool = model_knob(False, "", "scale the norms of block i by 1 / sqrt(i + 1)")

    # Value embedding
    ve_knob = partial(model_knob, needs="ve_enabled")
    ve_enabled: bool = model_knob(False, "", "value embedding: a second token table added to V")
    ve_dim: int = ve_knob(128, "", "width of the value-embedding table", lo=1)
    ve_layers: str = ve_knob("9,10", "blocks", "blocks that get the value embedding")

    @rule
    def value_embedding_blocks_exist(ve_enabled, ve_layers, num_layers):
        blocks = [n.strip().lstrip("0") or n.strip() for n in ve_layers.split(",")]
        # nine digits say enough: int() refuses thousands of them
        strange = [n for n in blocks if not n.isdecimal() or int(n[:9]) >= num_layers]
        doubled = len(set(blocks)) < len(blocks)
        remedy = f"needs different block numbers below NUM_LAYERS={num_layers}, separated by commas"
        refuse(ve_enabled and (strange or doubled), f"VE_LAYERS={ve_layers}: {remedy}")

    # SmearGate
    smear_knob = partial(model_knob, needs="smear_gate")
    smear_gate: bool = model_knob(True, "", "SmearGate: blend in the previous token's embedding")
    smear_pos: str = smear_knob("pre_norm", "", "input norm", choices=("pre_norm", "post_norm"))
    smear_beta2: float = knob(0.99, "", "in AdamW; 0: BETA2", lo=0, hi=0.9999, needs="smear_gate")

    # Gated SmearGate, another technique than SMEAR_GATE; the mask is for both
    smear_gate_enabled: bool = model_knob(False, "", "gated SmearGate: one learned gate per token")
    smear_mask_bos: bool = model_knob(False, "", "no smear over a document start", needs=SMEARS)

    @rule
    def previous_token_is_blended_in_once(smear_gate, smear_gate_enabled):
        remedy = "SMEAR_GATE=1 blends in the previous token too: set SMEAR_GATE=0"
        refuse(smear_gate and smear_gate_enabled, f"SMEAR_GATE_ENABLED=1: {remedy}")

    # Gates of what attention heads have gathered: sparse, dense, output
    sparse_knob = partial(model_knob, needs="sparse_attn_gate_enabled")
    dense_knob = partial(model_knob, needs="gated_attn_enabled")
    sparse_attn_gate_enabled: bool = model_knob(False, "", "head gates that read GATE_WINDOW dims")
    sparse_attn_gate_scale: float = sparse_knob(1.0, "", "times the sigmoid's input", lo=0)
    sparse_attn_gate_init_std: float = sparse_knob(0.0, "", "of the initial gate weights", lo=0)
    gated_attn_enabled: bool = model_knob(False, "", "head gates that read all dims")
    gated_attn_init_std: float = dense_knob(0.01, "", "of the initial gate weights", lo=0)
    attn_out_gate_enabled: bool = model_knob(False, "", "head gates of 0 to 2, 1 at the start")
    gate_window: int = model_knob(12, "dims", "gates read so many first dims", lo=1, needs=GATES)

    @rule
    def heads_are_gated_once(sparse_attn_gate_enabled, gated_attn_enabled, attn_out_gate_enabled):
        gates = {
            "SPARSE_ATTN_GATE_ENABLED": sparse_attn_gate_enabled,
            "GATED_ATTN_ENABLED": gated_attn_enabled,
            "ATTN_OUT_GATE_ENABLED": attn_out_gate_enabled,
        }
        on = [f"{name}=1" for name, gate in gates.items() if gate]
        refuse(len(on) > 1, f"{' and '.join(on)}: a head has one gate; choose one")

    @rule
    def gates_read_dimensions_that_exist(
        gate_window, model_dim, smear_gate_enabled, sparse_attn_gate_enabled, attn_out_gate_enabled
    ):
        on = smear_gate_enabled or sparse_attn_gate_enabled or attn_out_gate_enabled
        remedy = f"gates read dimensions of MODEL_DIM={model_dim}: lower it"
        refuse(on and gate_window > model_dim, f"GATE_WINDOW={gate_window}: {remedy}")

    # Skip gates
    skip_gates_enabled: bool = model_knob(False, "", "sigmoid gates between stream and skips")

    # Depth recurrence: blocks that are passed several times
    loops_knob = partial(model_knob, needs="num_loops")
    num_loops: int = model_knob(0, "", "more passes of LOOP_START to LOOP_END; 0: off", lo=0, hi=64)
    loop_start: int = loops_knob(3, "block", "the first of a loop", lo=0)
    loop_end: int = loops_knob(5, "block", "the last of a loop", lo=0)

    @rule
    def looped_blocks_exist(num_loops, loop_start, loop_end, num_layers):
        broken = num_loops and not loop_start <= loop_end < num_layers
        remedy = f"needs LOOP_START <= LOOP_END < NUM_LAYERS={num_layers}"
        told = f"NUM_LOOPS={num_loops} LOOP_START={loop_start} LOOP_END={loop_end}"
        refuse(broken, f"{told}: {remedy}")

    # Two lanes
    LANES = ("mean", "attn", "mlp")
    lane_knob = partial(model_knob, needs="parallel_start_layer")
    parallel_start_layer: int = model_knob(0, "block", "two lanes from this on; 0: off", lo=0)
    parallel_final_lane: str = lane_knob("mean", "", "which lane is read at the end", choices=LANES)

    @rule
    def lanes_open_in_the_decoder(parallel_start_layer, num_layers):
        # 0 is off, also where block 0 is a decoder
        first, last = max(num_layers // 2, 1), num_layers - 1
        broken = parallel_start_layer and not first <= parallel_start_layer <= last
        choices = f" or one of blocks {first} to {last} (decoders)" if first <= last else ""
        remedy = f"with NUM_LAYERS={num_layers} choose 0 (off){choices}"
        refuse(broken, f"PARALLEL_START_LAYER={parallel_start_layer}: {remedy}")

    @rule
    def lanes_open_behind_the_loop(parallel_start_layer, num_loops, loop_end):
        # a visit of a looped block would update a stream that nothing reads any more
        broken = num_loops and 0 < parallel_start_layer <= loop_end
        remedy = f"must lie behind the loop, so above LOOP_END={loop_end}"
        refuse(broken, f"PARALLEL_START_LAYER={parallel_start_layer}: {remedy}")

    # Parallel blocks
    first_knob = partial(model_knob, lo=-1, off=(-1,))
    parallel_residual_start: int = first_knob(-1, "block", "parallel blocks from this on; -1: off")

    @rule
    def parallel_blocks_exist(parallel_residual_start, parallel_start_layer, num_layers):
        last = (parallel_start_layer or num_layers) - 1
        remedy = f"choose -1 (off) or one of blocks 0 to {last}, those without lanes"
        broken = parallel_residual_start > last
        refuse(broken, f"PARALLEL_RESIDUAL_START={parallel_residual_start}: {remedy}")

    # Two softcaps
    asym_logit_rescale: bool = model_knob(False, "", "a learned cap for logits above 0, one below")

    # BigramHash
    bigram_knob = partial(model_knob, needs="bigram_vocab_size")
    bigram_vocab_size: int = model_knob(0, "buckets", "BigramHash table; 0: off", lo=0)
    bigram_dim: int = bigram_knob(128, "", "width of the BigramHash table", lo=1)
    bigram_proj_gain: float = bigram_knob(1.0, "", "initial gain of its projection", lo=0)
    bigram_proj_opt: str = bigram_knob("muon", "", "its optimiser", scope="train", choices=MATRIX)

    @rule
    def bigrams_have_buckets(bigram_vocab_size):
        remedy = "needs 2 buckets or more (the last one is for row starts)"
        refuse(bigram_vocab_size == 1, f"BIGRAM_VOCAB_SIZE={bigram_vocab_size}: {remedy}")

    # Optimiser
    ramp_knob = partial(knob, needs="muon_momentum_warmup_steps")
    matrix_lr: float = knob(0.02, "", "Muon learning rate", lo=0)
    scalar_lr: float = knob(0.02, "", "AdamW learning rate of vectors, gates and scales", lo=0)
    tied_embed_lr: float = knob(0.03, "", "AdamW learning rate of embedding tables", lo=0)
    muon_momentum: float = knob(0.99, "", "Nesterov momentum after its warm-up", lo=0, hi=1)
    muon_momentum_warmup_steps: int = knob(1500, "steps", "momentum warm-up", lo=0)
    muon_momentum_warmup_start: float = ramp_knob(0.92, "", "at step 0", lo=0, hi=1)
    muon_backend_steps: int = knob(5, "", "Newton-Schulz iterations", lo=1)
    muon_coeffs: str = knob("quintic", "", "coefficients of Newton-Schulz", choices=POLYNOMIALS)
    muon_row_normalize: bool = knob(False, "", "MuonEq-R: first every row to length 1")
    muon_wd: float = knob(0.038, "", "decoupled weight decay of Muon matrices", lo=0)
    beta1: float = knob(0.9, "", "AdamW", lo=0, hi=0.9999)
    beta2: float = knob(0.95, "", "AdamW", lo=0, hi=0.9999)
    adam_eps: float = knob(1e-8, "", "AdamW", lo=0)
    adam_wd: float = knob(0.0, "", "AdamW decoupled weight decay", lo=0)
    embed_wd: float = knob(-1.0, "", "AdamW decay of embeddings; below 0: ADAM_WD", lo=-1)
    grad_clip_norm: float = knob(0.3, "", "global norm of the averaged gradient; 0: off", lo=0)

    @rule
    def each_iteration_has_coefficients(muon_coeffs, muon_backend_steps):
        known = len(COEFFICIENTS[muon_coeffs])
        remedy = f"MUON_COEFFS={muon_coeffs} has coefficients for {known}"
        refuse(1 < known < muon_backend_steps, f"MUON_BACKEND_STEPS={muon_backend_steps}: {remedy}")

    # Budget, batch and schedule
    iterations: int = knob(20000, "steps", "upper bound of steps", lo=1)
    max_wallclock_seconds: float = knob(600.0, "s", "training budget; 0: ITERATIONS alone", lo=0)
    warmup_steps: int = knob(20, "steps", "untimed; they compile everything and are undone", lo=1)
    warmdown_iters: int = knob(3000, "steps", "linear decay to 0", lo=0, needs="not warmdown_frac")
    warmdown_frac: float = knob(0.0, "of run", "> 0: the decay's share of the run", lo=0, hi=1)
    min_lr: float = knob(0.0, "", "floor of the decaying lr scale", lo=0, hi=1, needs=WARMDOWN)
    train_seq_len: int = model_knob(2048, "tokens", "training row", lo=2, hi=1 << 20)
    train_batch_tokens: int = knob(524288, "tokens", "per step, over all ranks", lo=2)
    grad_accum_steps: int = knob(0, "", "micro-batches; 0: 8 // ranks on GPUs, 1 on CPU", lo=0)
    loader: str = knob("rows", "", READS, choices=LOADERS)
    train_log_every: int = knob(200, "steps", "a line in the log (or 10 s), a check of ranks", lo=1)
    val_loss_every: int = knob(1000, "steps", "score live weights, clock paused; 0: never", lo=0)

    @rule
    def documents_are_kept_apart(loader, doc_mask):
        broken = loader == "documents" and not doc_mask
        refuse(broken, "LOADER=documents: puts many documents in a row; set DOC_MASK=1")

    @rule
    def rows_fill_a_batch(train_batch_tokens, train_seq_len, loader, eval_only):
        in_rows = not eval_only and loader != "documents"
        broken = in_rows and train_batch_tokens % train_seq_len
        remedy = f"is no multiple of TRAIN_SEQ_LEN={train_seq_len}"
        refuse(broken, f"TRAIN_BATCH_TOKENS={train_batch_tokens}: {remedy}")

    # Weight decay that falls
    wd_knob = partial(knob, needs="muon_wd")
    taper_knob = partial(knob, needs="wd_taper_final_mult")
    wd_taper_final_mult: float = wd_knob(1.0, "", "x MUON_WD at the end; 1: off", lo=0, off=(1,))
    wd_taper_start_frac: float = taper_knob(0.7, "of run", "MUON_WD falls from here", lo=0, hi=1)

    # Loops that begin late
    LOOPINGS = ("time_frac", "steps")  # of the run as long as it will be; a number of them
    late_knob = partial(knob, needs="num_loops")
    looping_kind: str = late_knob("time_frac", "", "loops begin by time or steps", choices=LOOPINGS)
    enable_looping_at: float = late_knob(0.35, "", "loops begin: share of the run, or step", lo=0)
    loop_phase2_at: float = late_knob(0.0, "", "> 0: one loop until here, then all", lo=0)

    @rule
    def loops_begin_in_order(num_loops, looping_kind, enable_looping_at, loop_phase2_at):
        if not num_loops:
            return
        late = looping_kind == "time_frac" and max(enable_looping_at, loop_phase2_at) > 1
        problem = f"ENABLE_LOOPING_AT={enable_looping_at} LOOP_PHASE2_AT={loop_phase2_at}"
        refuse(late, f"{problem}: shares of the run are at most 1; LOOPING_KIND=steps counts steps")
        share = any(0 < start < 1 for start in (enable_looping_at, loop_phase2_at))
        remedy = (
            "steps, of which there is no part; for a share of the run set LOOPING_KIND=time_frac"
        )
        refuse(looping_kind == "steps" and share, f"{problem}: {remedy}")
        broken = loop_phase2_at and (num_loops < 2 or loop_phase2_at <= enable_looping_at)
        remedy = "two loops or more, and the second phase after the first; 0: no second phase"
        refuse(broken, f"{problem}, NUM_LOOPS={num_loops}: needs {remedy}")

    # Rows that grow
    MODES = ("wallclock", "step")  # of the run as long as it will be; of ITERATIONS
    rows_knob = partial(knob, needs="train_seq_schedule")
    train_seq_schedule: str = knob("", "", "rows to a share of the run: 512@.1,1024@1", off=("",))
    train_seq_schedule_mode: str = rows_knob("wallclock", "", "counts time or steps", choices=MODES)
    seq_change_warmup_steps: int = rows_knob(0, "steps", "lr rises after each change", lo=0)

    @rule
    def rows_grow(train_seq_schedule, train_seq_len, train_batch_tokens, loader, eval_only):
        if not train_seq_schedule or eval_only:
            return
        told = f"TRAIN_SEQ_SCHEDULE={train_seq_schedule}"
        lengths = [length for length, _ in row_stages(train_seq_schedule)]
        for length in lengths if loader != "documents" else ():
            remedy = f"must divide TRAIN_BATCH_TOKENS={train_batch_tokens}"
            refuse(train_batch_tokens % length, f"{told}: {length} {remedy}")
        remedy = f"must be its last length; set TRAIN_SEQ_LEN={lengths[-1]}"
        refuse(lengths[-1] != train_seq_len, f"{told}: TRAIN_SEQ_LEN={train_seq_len} {remedy}")

    @rule
    def growing_pieces_are_not_cut(
        train_seq_schedule, loader, doc_max_len, train_seq_len, eval_only
    ):
        growing = train_seq_schedule and loader == "documents" and not eval_only
        cut = growing and 0 < doc_max_len < train_seq_len
        remedy = f"cuts what grows to {train_seq_len} tokens; 0: the schedule alone cuts"
        refuse(cut, f"DOC_MAX_LEN={doc_max_len}: TRAIN_SEQ_SCHEDULE={train_seq_schedule} {remedy}")

    # QAT. Scopes, QNA's too: exported, every tensor that ships as codes; linears, the matrices of
    # linear layers; small_linears and block_linears, those outside and inside of the blocks
    qat_knob = partial(knob, needs="qat_enabled")
    qat_enabled: bool = knob(False, "", "STE fake-quantisation on the export grid", on_grid=True)
    qat_start_kind: str = start_knob("always", "", "what starts QAT", needs="qat_enabled")
    qat_start: float = knob(0.0, "", STARTS, lo=0, hi=1, needs="qat_start_kind")
    qat_scope: str = qat_knob("exported", "", "which tensors see their codes", choices=SCOPES)
    qat_grid: str = qat_knob("export", "", "clip: QUANT_CLIP's or amax", choices=("export", "amax"))
    qat_bits: int = qat_knob(0, "bits", "to round to; 0: those that ship", choices=QAT_BITS)

    # QNA
    qna_knob = partial(knob, needs="qna_enabled")
    qna_enabled: bool = knob(False, "", "uniform noise of a grid step, falls with lr", on_grid=True)
    qna_magnitude: float = qna_knob(1.0, "steps", "noise width at full learning rate", lo=0)
    qna_stop_scale: float = qna_knob(0.15, "", "no noise below this lr scale", lo=0, hi=1)
    qna_scope: str = qna_knob("exported", "", "which tensors get noise", choices=SCOPES)
    qna_grid: str = qna_knob("export", "", "step; row: without clip and floor", choices=NOISES)

    @rule
    def qat_leaves_time_for_noise(qna_enabled, qat_enabled, qat_start_kind):
        broken = qna_enabled and qat_enabled and qat_start_kind == "always"
        remedy = "would never act, as QAT_START_KIND=always replaces the noise; start QAT later"
        refuse(broken, f"QNA_ENABLED={qna_enabled}: {remedy}")

    # SWA and SQWA: means of snapshots
    swa_enabled: bool = knob(False, "", "mean of snapshots of the live weights")
    swa_start_kind: str = start_knob("lr_scale", "", "what starts SWA / SQWA", needs=SNAPSHOTS)
    swa_start_frac: float = knob(0.4, "", "as QAT_START", lo=0, hi=1, needs="swa_start_kind")
    swa_every: int = snapshot_knob(50, "steps", "between snapshots", lo=1)
    swa_dtype: str = snapshot_knob("fp32", "", "of sums; native: bf16 tables", choices=SUM_TYPES)
    sqwa_enabled: bool = knob(False, "", "mean of quantised-dequantised snapshots", on_grid=True)

    @rule
    def snapshots_are_summed_once(swa_enabled, sqwa_enabled):
        remedy = "SQWA_ENABLED sums snapshots too: choose one"
        refuse(swa_enabled and sqwa_enabled, f"SWA_ENABLED={swa_enabled}: {remedy}")

    # EMA, and which average is shipped: if auto, the last of AVERAGES that is on
    ema_enabled: bool = knob(False, "", "exponential moving average, every step")
    ema_decay: float = knob(0.997, "", "weight of the past", lo=0, hi=1, needs="ema_enabled")
    AVERAGES = ("swa", "ema", "sqwa")
    KEPT = "swa_enabled or ema_enabled or sqwa_enabled"
    SHIPPED = ("auto", "none", *AVERAGES)
    average: str = export_knob("auto", "", "to ship; auto: what is on", choices=SHIPPED, needs=KEPT)

    @rule
    def one_average_is_shipped(swa_enabled, ema_enabled, average):
        broken = swa_enabled and ema_enabled and average == "auto"
        remedy = "EMA_ENABLED is on too: choose one, or say with AVERAGE which one is shipped"
        refuse(broken, f"SWA_ENABLED={swa_enabled}: {remedy}")

    @rule
    def shipped_average_is_collected(average, swa_enabled, ema_enabled, sqwa_enabled):
        collected = {"swa": swa_enabled, "ema": ema_enabled, "sqwa": sqwa_enabled}
        remedy = f"is not collected; set {average.upper()}_ENABLED=1"
        refuse(not collected.get(average, True), f"AVERAGE={average}: {remedy}")

    # The quantisation grid
    quant_bits_mlp: int = bits_knob(6, "bits", "MLP matrices; 16: fp16")
    quant_bits_attn: int = bits_knob(6, "bits", "attention matrices")
    quant_bits_bigram: int = bits_knob(6, "bits", "BigramHash, tables' projections", needs=TABLES)
    quant_bits_embed: int = bits_knob(16, "bits", "token and value-embedding tables")
    quant_clip_mlp: str = clip_knob("auto", "", "auto: QUANT_CLIP", needs="quant_bits_mlp")
    quant_clip_attn: str = clip_knob("auto", "", "auto: QUANT_CLIP", needs="quant_bits_attn")
    quant_clip_bigram: str = clip_knob("auto", "", "auto: QUANT_CLIP", needs="quant_bits_bigram")
    quant_clip_embed: str = clip_knob("auto", "", "auto: QUANT_CLIP", needs="quant_bits_embed")
    quant_clip: str = grid_knob("quantile", "", "largest of a row", choices=CLIPS, needs=SHARED)
    quant_codes: str = code_knob("sym", "", "sym: -c..c, asym: -(c+1)..c", choices=("sym", "asym"))
    quant_scale_floor: bool = code_knob(True, "", "step at least 1/c: rows below 1 share one")
    keep_float_max_numel: int = code_knob(65536, "weights", "tensors up to this size: fp16", lo=0)
    fp16_keep_name_patterns: str = code_knob("", "csv", "fp16 if its name contains one of these")
    control_dtype: str = grid_knob("fp16", "", "of gains, gates and scales", choices=FLOATS)

    # SDClip: the largest code of a row is so many of its standard deviations
    MLP_SIGMA = "quant_clip_mlp and quant_clip=sigma"
    ATTN_SIGMA = "quant_clip_attn and quant_clip=sigma"
    REST_SIGMA = "quant_clip_bigram and quant_clip=sigma"
    EMBED_SIGMA = "quant_clip_embed and quant_clip=sigma"
    mlp_clip_sigmas: float = sigma_knob(11.5, "sigma", "QUANT_CLIP=sigma, MLP", needs=MLP_SIGMA)
    attn_clip_sigmas: float = sigma_knob(13.0, "sigma", "attention", needs=ATTN_SIGMA)
    bigram_clip_sigmas: float = sigma_knob(12.85, "sigma", "QUANT_BITS_BIGRAM", needs=REST_SIGMA)
    embed_clip_sigmas: float = sigma_knob(14.0, "sigma", "token tables", needs=EMBED_SIGMA)

    @rule
    def sigma_has_no_floor(quant_clip, quant_scale_floor):
        remedy = "the floor would be the step of most rows; set QUANT_SCALE_FLOOR=0"
        refuse(quant_clip == "sigma" and quant_scale_floor, f"QUANT_CLIP=sigma: {remedy}")

    # Gates of attention heads as codes
    gated_attn_quant_gate: bool = grid_knob(False, "", "head gates in 8 bits", needs=HEAD_GATES)

    # Looped blocks of their own fineness
    looped_knob = partial(grid_knob, needs="num_loops")
    loop_layer_bits: int = looped_knob(0, "bits", "0: as others", choices=QAT_BITS)
    loop_layer_clip_sigmas: float = looped_knob(0.0, "sigma", "0: as others", lo=0, hi=1e3)

    # GPTQ. A batch has TRAIN_BATCH_TOKENS
    gptq_knob = partial(export_knob, needs="gptq_enabled")
    reserve_knob = partial(knob, needs="gptq_enabled")
    gptq_enabled: bool = export_knob(False, "", "rounds by what is multiplied", needs=CODES)
    gptq_calibration_batches: int = gptq_knob(16, "batches", "of training text, read for it", lo=1)
    gptq_reserve_seconds: float = reserve_knob(-1.0, "s", "of the budget; < 0: measured", lo=-1)
    gptq_damp: float = gptq_knob(0.01, "", "x mean of a Hessian's diagonal, added", lo=1e-4, hi=1e6)
    gptq_refit: bool = gptq_knob(False, "", "then fits the steps to the codes")

    @rule
    def calibration_leaves_time_for_steps(
        gptq_enabled, gptq_reserve_seconds, max_wallclock_seconds
    ):
        broken = gptq_enabled and 0 < max_wallclock_seconds <= gptq_reserve_seconds
        remedy = f"takes all of MAX_WALLCLOCK_SECONDS={max_wallclock_seconds}"
        refuse(broken, f"GPTQ_RESERVE_SECONDS={gptq_reserve_seconds}: {remedy}")

    # Low-rank correction
    lqer_enabled: bool = export_knob(False, "", "corrects the worst matrices by thin factors")
    lqer_rank: int = lqer_knob(4, "", "of the correction", lo=1, hi=64)
    lqer_top_k: int = lqer_knob(3, "matrices", "that are corrected, the largest error first", lo=1)
    lqer_fit: str = lqer_knob("svd", "", "refit: to the codes", choices=FITS, off=("refit",))
    lqer_asym_enabled: bool = svd_knob(True, "", "2 bits and 4; 0: LQER_FACTOR_BITS")
    lqer_asym_group: int = svd_knob(64, "values", "of the right factor that share a step", lo=1)
    lqer_factor_bits: int = lqer_knob(4, "bits", "of both factors otherwise", choices=CODE_BITS)

    # Export: pruning, compression, size
    prune_pct: float = export_knob(0.0, "fraction", "set to 0 in each large matrix", lo=0, hi=0.9)
    compressor: str = export_knob("zstd", "", "of the artifact", choices=CODERS)
    compress_level: int = export_knob(-1, "", "-1: the largest, but lzma 6", lo=-1, hi=22)
    pack_code: str = size_knob("lzma", "", "of the script that ships", choices=("lzma", "none"))
    cap_bytes: int = size_knob(16_000_000, "bytes", "code + artifact, decimal", lo=1)
    fit_to_cap: bool = export_knob(False, "", "over the cap: a larger k of SDClip, then pruning")

    @rule
    def compressor_knows_the_level(compressor, compress_level):
        highest = {"zlib": 9, "lzma": 9, "brotli": 11, "ans": 11}.get(compressor, 22)
        remedy = f"{compressor} knows 0 to {highest}"
        refuse(compress_level > highest, f"COMPRESS_LEVEL={compress_level}: {remedy}")

    # Scoring
    eval_seq_len: int = eval_knob(0, "tokens", "window; 0: TRAIN_SEQ_LEN", lo=0, hi=1 << 20)
    eval_stride: int = eval_knob(64, "tokens", "scored per sliding window; 0: fixed windows", lo=0)
    eval_batch_seqs: int = eval_knob(32, "windows", "per forward pass and rank", lo=1)
    doc_isolated_eval: bool = eval_knob(False, "", "also score each document by itself")
    val_max_tokens: int = eval_knob(0, "tokens", "score only the first N targets; 0: all", lo=0)

    @rule
    def stride_fits_the_window(eval_stride, eval_seq_len, train_seq_len):
        window = eval_seq_len or train_seq_len
        remedy = f"must not exceed the window of {window} tokens"
        refuse(eval_stride > window, f"EVAL_STRIDE={eval_stride}: {remedy}")

    # Test-time training
    ttt_knob = partial(eval_knob, needs="ttt_mode=sgd")
    ttt_mode: str = eval_knob("none", "", "train while scoring: weights / adapters", choices=TTT)
    ttt_lr: float = ttt_knob(0.002, "", "SGD, cosine over chunks", lo=0)
    ttt_epochs: int = ttt_knob(3, "", "passes over a chunk once it is scored", lo=1)
    ttt_chunk_tokens: int = ttt_knob(32768, "tokens", "scored, then trained on", lo=1)
    ttt_batch_seqs: int = ttt_knob(32, "windows", "per SGD step, over all ranks", lo=1)
    ttt_freeze_blocks: int = ttt_knob(2, "blocks", "first blocks that do not adapt", lo=0)
    ttt_momentum: float = ttt_knob(0.9, "", "of SGD", lo=0, hi=1)
    ttt_grad_clip: float = ttt_knob(1.0, "", "norm of its gradient; 0: none", lo=0)

    @rule
    def windows_fill_a_chunk(ttt_mode, ttt_chunk_tokens, eval_seq_len, train_seq_len):
        window = eval_seq_len or train_seq_len
        remedy = f"is no multiple of the window of {window} tokens"
        broken = ttt_mode == "sgd" and ttt_chunk_tokens % window
        refuse(broken, f"TTT_CHUNK_TOKENS={ttt_chunk_tokens}: {remedy}")

    # Test-time training of adapters, and of all weights between its batches
    lora_knob = partial(eval_knob, needs="ttt_mode=lora")
    phase_knob = partial(eval_knob, needs="phased_ttt_enabled")
    ttt_batch_size: int = lora_knob(64, "documents", "on a rank at once, alike in length", lo=1)
    ttt_chunk_size: int = lora_knob(48, "tokens", "of a document: scored, then learned", lo=1)
    ttt_short_score_first_steps: str = lora_knob("", "csv", "for short documents: 256:8,2000:24")
    ttt_q_lora: bool = lora_knob(True, "", "adapters of the queries")
    ttt_k_lora: bool = lora_knob(True, "", "adapters of the keys")
    ttt_v_lora: bool = lora_knob(True, "", "adapters of the values")
    ttt_o_lora: bool = lora_knob(True, "", "adapters beside attention")
    ttt_mlp_lora: bool = lora_knob(True, "", "adapters beside the MLPs")
    ttt_lora_rank: int = lora_knob(96, "", "columns of A and B", lo=1)
    ttt_lora_alpha: float = lora_knob(144.0, "", "they count alpha / rank times; 0: once", lo=0)
    ttt_warm_start_a: bool = lora_knob(True, "", "a batch goes on with the A of the one before")
    ttt_lora_lr: float = lora_knob(1e-4, "", "AdamW, one step after each chunk", lo=0)
    ttt_beta1: float = lora_knob(0.0, "", "AdamW", lo=0, hi=0.9999)
    ttt_beta2: float = lora_knob(0.999, "", "AdamW", lo=0, hi=0.9999)
    ttt_weight_decay: float = lora_knob(1.0, "", "AdamW, also of adapters at rest", lo=0)
    phased_ttt_enabled: bool = lora_knob(False, "", "SGD of all weights on what is scored")
    phased_ttt_prefix_docs: int = phase_knob(2000, "documents", "that it learns at most", lo=1)
    phased_ttt_num_phases: int = phase_knob(1, "", "each on all that is scored by then", lo=1)
    global_ttt_lr: float = phase_knob(0.001, "", "SGD, cosine over chunks", lo=0)
    global_ttt_momentum: float = phase_knob(0.9, "", "SGD", lo=0, hi=0.9999)
    global_ttt_epochs: int = phase_knob(1, "", "passes over a chunk", lo=1)
    global_ttt_chunk_tokens: int = phase_knob(32768, "tokens", "of one lr; the last rests", lo=1)
    global_ttt_batch_seqs: int = phase_knob(32, "windows", "per SGD step", lo=1)
    global_ttt_grad_clip: float = phase_knob(1.0, "", "of the gradient's norm; 0: off", lo=0)

    @rule
    def a_window_holds_a_chunk(
        ttt_mode, ttt_chunk_size, ttt_short_score_first_steps, eval_seq_len, train_seq_len
    ):
        if ttt_mode != "lora":
            return
        window = eval_seq_len or train_seq_len
        remedy = f"must not exceed the window of {window} tokens"
        refuse(ttt_chunk_size > window, f"TTT_CHUNK_SIZE={ttt_chunk_size}: {remedy}")
        for _, chunk in short_document_chunks(ttt_short_score_first_steps):
            told = f"TTT_SHORT_SCORE_FIRST_STEPS={ttt_short_score_first_steps}"
            refuse(chunk > window, f"{told}: {chunk} {remedy}")

    @rule
    def a_global_chunk_holds_a_window(
        ttt_mode, phased_ttt_enabled, global_ttt_chunk_tokens, eval_seq_len, train_seq_len
    ):
        window = eval_seq_len or train_seq_len
        broken = ttt_mode == "lora" and phased_ttt_enabled and global_ttt_chunk_tokens < window
        told = f"GLOBAL_TTT_CHUNK_TOKENS={global_ttt_chunk_tokens}"
        refuse(broken, f"{told}: holds no window of {window} tokens; raise it")

    @rule
    def a_phase_has_a_document(
        ttt_mode, phased_ttt_enabled, phased_ttt_num_phases, phased_ttt_prefix_docs
    ):
        broken = phased_ttt_num_phases > phased_ttt_prefix_docs
        broken = ttt_mode == "lora" and phased_ttt_enabled and broken
        told = f"PHASED_TTT_NUM_PHASES={phased_ttt_num_phases}"
        documents = f"PHASED_TTT_PREFIX_DOCS={phased_ttt_prefix_docs}"
        refuse(broken, f"{told}: more than {documents}; lower it to {phased_ttt_prefix_docs}")

    # Tilting by n-grams
    tilt_knob = partial(eval_knob, needs="ngram_tilt_enabled")
    ngram_tilt_enabled: bool = eval_knob(False, "", "tilts the last way of scoring", needs=WAYS)
    token_order: int = tilt_knob(16, "tokens", "n-gram: the context is one less", lo=2, hi=1 << 20)
    token_threshold: float = tilt_knob(0.8, "share", "of its context, for a hint", lo=0, hi=1)
    token_boost: float = tilt_knob(2.625, "nats", "added to the logit of a hint", lo=0, hi=80)

    # No knobs: the names that this launch set, and whether the rest is complete. It is not
    # while a checkpoint or an artifact that is still to be read has a say; rules wait for it.
    given: frozenset = field(default=frozenset(), compare=False)
    inherited: bool = field(default=False, compare=False)
    # Name -> why nothing is lost without it, of other scripts' settings
    others: dict = field(default_factory=dict, compare=False)
    # Spellings of other scripts that were given
    spelt: frozenset = field(default=frozenset(), compare=False)
    # A line for each argument that wins over the environment, and for each stand-in
    won: tuple = field(default=(), compare=False)

    def __post_init__(self):
        problems = wrong_settings(self.knobs(), self.inherited)
        if problems:
            raise Refusal(problems)

    @property
    def window(self) -> int:
        """Tokens of one scoring window."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def sources(self) -> list[str]:
        """What names weights that exist already."""
        return sources_of(self.checkpoint, self.eval_only, self.resume, self.run_id)

    def longest_piece(self, length: int) -> int:
        """Tokens after which a document is cut in steps of rows of `length`; 0: at their ends."""
        if self.loader == "documents" and (self.train_seq_schedule or not self.doc_max_len):
            return length
        return self.doc_max_len

    def collected(self) -> list[str]:
        """The averages that are on."""
        return [name for name in self.AVERAGES if getattr(self, f"{name}_enabled")]

    @property
    def shipped_average(self) -> str:
        """An average, or none."""
        if self.average != "auto":
            return self.average
        collected = self.collected()
        return collected[-1] if collected else "none"

    @property
    def training_scopes(self) -> tuple[str, ...]:
        """Scopes of the knobs that a checkpoint depends on."""
        scopes = ("seed", "model", "train")
        on_grid = any(getattr(self, f.name) for f in KNOBS if f.metadata["on_grid"])
        return (*scopes, "grid") if on_grid else scopes

    def knobs(self, *scopes: str) -> dict:
        """Name -> value of the knobs in these scopes; of all without an argument."""
        chosen = [f.name for f in KNOBS if not scopes or f.metadata["scope"] in scopes]
        return {name: getattr(self, name) for name in chosen}

    def non_default(self) -> dict:
        """VARIABLE -> value of the knobs that differ from their defaults.

        Without BASE, whose values stand here: the rest is complete where no study is at hand.
        """
        values = self.knobs()
        del values["base"]
        defaults = {f.name: f.default for f in KNOBS}
        return {name.upper(): value for name, value in values.items() if value != defaults[name]}

    def idle(self) -> dict[str, str]:
        """Knob -> the settings by which it can do nothing."""
        found = {}
        for f in KNOBS:
            reason = self.lacking(f, found)
            if reason:
                found[f.name] = reason
        return found

    def lacking(self, f: dataclasses.Field, idle: dict[str, str]) -> str:
        """The settings by which this knob can do nothing; empty if it can do something.

        `idle`: the answers for the knobs before it.
        """
        for source, scopes in IDLE_SCOPES.items():
            if getattr(self, source) and f.metadata["scope"] in scopes:
                return setting(source, getattr(self, source))

        names = []
        for needed in f.metadata["needs"].split(" or "):
            wants = [want.split() for want in needed.split(" and ") if want]
            missing = [want[-1] for want in wants if not self.holds(want, idle)]
            if not missing:
                return ""
            names += [want.partition("=")[0] for want in missing]
        reasons = [idle.get(name) or setting(name, getattr(self, name)) for name in names]
        return " ".join(dict.fromkeys(reasons))

    def holds(self, want: list[str], idle: dict[str, str]) -> bool:
        """Whether [a knob] is on, or ["not", a knob] is off, or [knob=value] so."""
        name, _, value = want[-1].partition("=")
        off = BY_NAME[name.upper()].metadata["off"]
        on = getattr(self, name) not in off and name not in idle
        if value:
            on = on and str(getattr(self, name)) == value
        return on == (len(want) == 1)

    def differing(self, values: dict) -> list[str]:
        """The knobs of which these are other values, where that makes another run of this one."""
        idle = self.idle()
        own = self.knobs("seed", *COMPARED)
        return [
            name for name in own if name not in idle and values.get(name, own[name]) != own[name]
        ]

    def without_effect(self) -> dict[str, str]:
        """VARIABLE -> why it can do nothing, of each such setting that was given."""
        idle = {name.upper(): why for name, why in self.idle().items()}
        found = {name: why for name, why in idle.items() if name in self.given}
        if "ROPE_NTK_LEN" in self.given and self.rope_ntk_len >= self.train_seq_len:
            found["ROPE_NTK_LEN"] = setting("train_seq_len", self.train_seq_len)
        longest = max(self.train_seq_len, self.window)
        cuts = self.doc_max_len < longest or self.loader == "documents"
        if "DOC_MAX_LEN" in self.given and not cuts:
            found.setdefault("DOC_MAX_LEN", f"no row has more than {longest} tokens")
        return found | self.others

    def digest(self, *scopes: str) -> str:
        """sha256 of the knobs in these scopes; by default of all that make runs comparable."""
        knobs = self.knobs(*scopes or COMPARED)
        return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_env(cls, env, arguments: Iterable[str] = ()) -> Config:
        """The configuration of a launch. Refusal with all that is wrong with it.

        Settings are variables of env and arguments NAME=value, in today's or in old names. The
        arguments win, and each must be known; in env there are other programs' variables too.
        An argument NAME?=value is a default of the launcher: whatever else has a say wins.
        """
        problems = []
        arguments, defaults = read_arguments(arguments, problems)
        everything = dict(env) | arguments
        base = Base()
        with noted(problems):
            base = read_base((defaults | everything).get("BASE", ""))

        # what the environment says of a knob that has an argument is not looked at
        beside = base.settings | everything
        said = in_todays_names(arguments, base, beside)
        around = in_todays_names(env, base, beside)
        told = around | said
        texts = {name: agreed(told[name], problems) for name in BY_NAME if name in told}
        problems += strangers(around)
        problems += strangers(said | in_todays_names(defaults, base, beside), arguments=True)
        others, refused = settings_of_others(everything, base)
        others |= without_say(everything, base)
        problems += refused
        heard = {said.name: said.value for said in itertools.chain(*told.values())}
        heard |= {name: everything[name] for name in base.absent() & everything.keys()}
        problems += (problem for _, problem in ambiguous(heard, base))

        given = frozenset(texts)
        texts = defaults | base.settings | texts
        values = {}
        for name, f in BY_NAME.items():
            if name not in texts:
                values[f.name] = f.default
            elif texts[name] is not None:
                with noted(problems):
                    values[f.name] = parse(name, texts[name], f.type)
        problems += wrong_settings(values)
        problems += base.other_than_its_script(values, told)
        if problems:
            near = None if base.name else nearest_base(values, given)
            problems += likeness_line(near)
            # each once: an old spelling may stand for several knobs
            raise Refusal(list(dict.fromkeys(problems)), base=near.name if near else "")
        spelt = frozenset((base.old_names().keys() | ABSENT.keys()) & everything.keys())
        won = (*overruled(around, said), *stand_ins(heard))
        return cls(given=given, others=others, won=won, spelt=spelt, **values)


KNOBS = [f for f in dataclasses.fields(Config) if f.metadata]
BY_NAME = {f.name.upper(): f for f in KNOBS}


def setting(name: str, value) -> str:
    """A knob's NAME=value as a shell takes it and as it is read back."""
    text = str(int(value) if isinstance(value, bool) else value)
    return f"{name.upper()}={shlex.quote(text)}"


def settings_line(cfg: Config) -> str:
    """What gives cfg again, pasted before or behind a command.

    That is all that differs from our defaults, and a default where it would be asked about.
    """
    values = cfg.non_default()
    told = {name: str(value) for name, value in values.items()}
    for knob, _ in ambiguous(told, Base()):
        values[knob] = getattr(cfg, knob.lower())
    return " ".join(setting(name, value) for name, value in values.items())


def sources_of(checkpoint: str, eval_only: str, resume: bool, run_id: str) -> list[str]:
    """VARIABLE=value for each that names weights which exist already."""
    named = {"CHECKPOINT": checkpoint, "EVAL_ONLY": eval_only}
    if resume:
        named["RESUME=1 RUN_ID"] = run_id
    return [f"{name}={value}" for name, value in named.items() if value]


def wrong_settings(values: dict, complete: bool = False) -> list[str]:
    """All that is wrong with these values.

    A rule is left out where a knob of it is wrong or missing. Weights that exist already bring
    their own settings: until these are known (`complete`), rules on other knobs than the run's
    wait.
    """
    problems = []
    fine = {}
    for f in KNOBS:
        if f.name in values:
            with noted(problems):
                check_value(f, values[f.name])
                fine[f.name] = values[f.name]

    # RESUME may be missing here, but then it was set
    resume = values.get("resume", True)
    if not complete and sources_of(
        values["checkpoint"], values["eval_only"], resume, values["run_id"]
    ):
        of_the_run = {f.name for f in KNOBS if f.metadata["scope"] == "run"}
        fine = {name: value for name, value in fine.items() if name in of_the_run}

    for check, involved in RULES.items():
        if involved <= fine.keys():
            with noted(problems):
                check(**{name: fine[name] for name in involved})
    return problems


def check_value(f: dataclasses.Field, value, name: str = "") -> None:
    """Refusal of a value that this knob cannot take, whatever the others are.

    name: how it was written, if it was an old spelling.
    """
    limits = Knob(**f.metadata)
    told = f"{name or f.name.upper()}={value}"
    if isinstance(value, float):
        refuse(not math.isfinite(value), f"{told}: must be a finite number")
    if limits.choices:
        choices = ", ".join(map(str, limits.choices))
        refuse(value not in limits.choices, f"{told}: choose one of {choices}")
    if isinstance(value, str):
        # a name of a file may hold bytes that are no text, which Python keeps as \udc80 to \udcff
        rest = re.sub("[\udc80-\udcff]", "", value) if limits.unit in ("file", "folder") else value
        refuse(not rest.isprintable(), f"{told}: control characters; leave them out")
    if limits.lo is not None:
        # without a bound of its own: what fits a tensor
        largest = 2**62 if f.type == "int" else 3e38
        bounds = f"{limits.lo} or more"
        if limits.hi is not None:
            largest = limits.hi
        if limits.hi is not None or value > largest:
            bounds += f", {largest} or less"
        refuse(not limits.lo <= value <= largest, f"{told}: must be {bounds}")


# Spellings of a boolean: those of a command, and those of a log
SWITCHES = {"0": "0", "1": "1", "False": "0", "True": "1"}


def parse(name: str, text: str, kind: str):
    """The value of one variable, by the annotated type of its knob."""
    if kind == "bool":
        refuse(text not in SWITCHES, f"{name}={text}: must be 0 or 1 (or False or True)")
        return SWITCHES[text] == "1"
    if kind == "str":
        return text
    with contextlib.suppress(ValueError):
        # what Python reads, too, but no shell: 1_000, " 7 ", digits of other scripts
        if text.isascii() and not re.search(r"[\s_]", text):
            return int(text) if kind == "int" else float(text)
    number = "a whole number" if kind == "int" else "a number"
    raise Refusal(f"{name}={text}: must be {number} in digits 0-9, without spaces")


# ── 2 Run ─────────────────────────────────────────────────────────────────────────────────────────
# In: the launcher's variables (RANK, ...), a Config. Out: device, log, live line, clock, phases,
# stop signals.
# Promise: all ranks take the same decisions, and whatever ends a run is said. Knows nothing of
# model and data.

# This script, readable; a packed one hands its source over (see LOADER)
SOURCE = globals().get("__source__") or Path(__file__).read_bytes()
CODE_SHA256 = hashlib.sha256(SOURCE).hexdigest()

# Of metrics.jsonl and result.json; docs/how_it_works.md documents both
SCHEMA_VERSION = 2

# Graphs that may be compiled of one function, the model's forward pass: of the trained model one
# per shape (training, fixed windows) and number of loops, of the scored one one per shape (fixed,
# sliding, documents), and one of the model without each of MODEL_TOGGLES
RECOMPILE_LIMIT = 64

# Parameter name -> fp32 tensor, the same on every rank
State = dict

# Phases in which a stop signal waits: until the step is done and saved, or the run's end
WAITING = ("train", "validate", "schedule", "last checkpoint", "stop")

# In the folder of a run that is at work, or was killed: launches, seconds of all of them, and a
# word more where some are not known. The least seconds between two of these signs in one phase
ALIVE = "alive.txt"
ALIVE_SECONDS = 1.0


def process_seconds() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return max(since_boot - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def nothing() -> None:
    """What a toggle is measured against that is off by being absent."""


def say(text: str, stream) -> None:
    """One line on a terminal. The run goes on where nobody reads it any more (`| head -3`)."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # what is still in the stream's buffer goes there, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def append_to(path: Path):
    """A text file that each line is written to at once; names of files need not be text."""
    return path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")


def free_name(folder: Path, name: str) -> str:
    """The name, or the first of NAME-2, NAME-3 ... that is not taken in the folder."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(free for free in names if not (folder / free).exists())


# So often the live line is renewed
REFRESH_SECONDS = 0.5
# Where there is no terminal, no silence is longer
QUIET_SECONDS = 10.0


class Progress:
    """What is under way, for those who watch. None of it is in train.log.

    On a terminal it is one live line below the log. Elsewhere it is a line wherever nothing was
    said for QUIET_SECONDS. A thread sees to both, from watch() until the `with` block ends.

    start_up: seconds that this process took before.
    """

    def __init__(self, start_up: float = 0.0):
        self.live: Live | None = None
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        # two threads print; a signal may end either in the middle
        self.lock = threading.RLock()
        # of time.monotonic(); the imports may have been silent for as long
        self.last_said = time.monotonic() - min(start_up, QUIET_SECONDS)
        self.enter("start-up", start_up)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join(1)
        if self.live:
            self.draw(self.live.stop)

    def watch(self) -> None:
        """Shows from now on what is under way."""
        console = Console(color_system=None, force_jupyter=False)
        if sys.stdout and sys.stdout.isatty() and console.is_interactive:
            self.live = Live(
                get_renderable=self.live_line,
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.draw(self.live.start)
            # a run that is killed cannot bring it back
            self.draw(console.show_cursor)
        self.thread = threading.Thread(target=self.keep_showing, daemon=True)
        self.thread.start()

    def keep_showing(self) -> None:
        """The thread's work."""
        while not self.ended.wait(REFRESH_SECONDS):
            self.show()

    def show(self) -> None:
        """Renews the live line, or says a line where it is time."""
        with self.lock:
            silent = time.monotonic() - self.last_said
            if self.live:
                self.draw(self.live.refresh)
            elif silent >= QUIET_SECONDS - REFRESH_SECONDS:
                self.say(f"... {self.line()}")

    def draw(self, change: Callable[[], None]) -> None:
        """Does something to the terminal. The run goes on where that is gone."""
        with self.lock:
            try:
                change()
            except OSError:
                self.live = None

    def say(self, text: str) -> None:
        """One line, as it is, however narrow the terminal."""
        with self.lock:
            self.last_said = time.monotonic()
            if self.live:
                self.draw(partial(self.live.console.print, Text(text), soft_wrap=True))
            else:
                say(text, sys.stdout)

    def enter(self, phase: str, spent: float = 0.0) -> None:
        """Another phase is under way, in which `spent` seconds were spent before."""
        with self.lock:
            self.phase = phase
            self.began = time.monotonic() - spent
            self.work = ""

    def live_line(self) -> Group:
        """line(), and the cursor back at its start: there others write, and not behind it."""
        line = self.line()
        line.end = ""
        return Group(line, Control(ControlType.CARRIAGE_RETURN))

    def line(self) -> Text:
        """Phase, its seconds so far, and what it is at work on."""
        told = f"{self.phase}, {time.monotonic() - self.began:.0f} s"
        if self.work:
            told += f": {self.work}"
        return Text(told, no_wrap=True, overflow="crop")


class Run:
    """This process among its ranks: device, log, clock, and what each toggle did.

    One clock books all seconds: each belongs to the phase under way, an inner one pauses the one
    around it. So the rows of the ledger are disjoint and add up to the wall time of all launches.

    start_up: seconds that this process took before. progress: shows, on rank 0, what is under way.
    """

    def __init__(self, cfg: Config, start_up: float = 0.0, progress: Progress | None = None):
        self.started = time.perf_counter()
        self.booked = self.started
        self.rank = int(os.environ.get("RANK", "0"))
        self.progress = progress or Progress()
        if progress and self.rank == 0:
            progress.watch()
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        # of activations; bf16 is slow on a CPU
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        if self.cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self.compile = cfg.compile == "1" or (cfg.compile == "auto" and self.cuda)
        # This line imports torch._dynamo. Imported after join(), it would keep the group of ranks
        # as a default argument, and with it gloo's threads until the interpreter ends
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self.join(cfg.dist_timeout)

        # phase -> wall seconds of this launch, all until `booked`
        self.seconds = {}
        if start_up:
            self.seconds["start-up"] = start_up
        # the same of earlier launches, as far as a checkpoint tells
        self.earlier = {}
        self.launches = 1
        # from the last checkpoint of each earlier launch to its end; None: not known of all
        self.lost_seconds = 0.0
        # the open ALIVE, and `booked` of its last sign; what earlier launches left is read first
        self.alive_file = None
        self.last_sign = -math.inf
        self.leaves_signs = not cfg.resume
        # whether anything is trained, exported or scored yet; a stop before leaves no folder
        self.has_begun = False
        # toggle -> Activity
        self.activity = {}
        # the most bytes held until all was scored; what the proof holds is no need of the run
        self.peak_memory_bytes = 0
        # the kernel that ATTN_BACKEND chose
        self.attention = ""
        # what the log has warned of, for result.json
        self.warnings = []
        self.phase_name = "set-up and other"
        self.progress.enter(self.phase_name)
        # number of the first stop signal
        self.stop = 0
        self.open_folder(cfg)

    def join(self, patience: float) -> None:
        """Makes the process group of the ranks; `patience` in seconds."""
        if self.world > 1 and not dist.is_initialized():
            self.at_work(f"waiting for {self.world} ranks")
            backend = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=patience))

    def open_folder(self, cfg: Config) -> None:
        """Makes LOGS_DIR/RUN_ID and opens the records. Refusal on every rank if rank 0 cannot."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = cfg.run_id or free_name(
            Path(cfg.logs_dir), f"{stamp}-{cfg.digest()[:8]}-s{cfg.seed}"
        )
        self.dir = Path(cfg.logs_dir) / self.broadcast(name)

        problem = ""
        if self.rank == 0:
            self.made_folder = not self.dir.exists()
            try:
                self.dir.mkdir(parents=True, exist_ok=cfg.resume)
                self.text = append_to(self.dir / "train.log")
                self.jsonl = append_to(self.dir / "metrics.jsonl")
                # one process at a time
                fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                problem = self.why_no_folder(cfg, error)
        problem = self.broadcast(problem)
        refuse(problem, problem)

        unseen = f"rank {self.rank} does not see it; use a disk that all share"
        refuse(not self.dir.is_dir(), f"LOGS_DIR={cfg.logs_dir}: {unseen}")

    def why_no_folder(self, cfg: Config, error: OSError) -> str:
        """What is wrong with the folder of this run, and the remedy."""
        told = f"RUN_ID={self.dir.name}"
        if isinstance(error, FileExistsError) and self.dir.is_dir():
            free = free_name(Path(cfg.logs_dir), self.dir.name)
            return f"{told}: {self.dir} is there; RESUME=1 goes on with it, RUN_ID={free} is free"
        reason = f"cannot create {self.dir}, or another process is at work there"
        return f"{told}: {reason} ({error.strerror})"

    def take_back_folder(self) -> None:
        """Deletes the folder of a launch that came to nothing, so that its name is free.

        What else is in it stays, and ALIVE with it: a checkpoint may go on.
        """
        if self.rank or not self.made_folder or not self.is_in_its_folder():
            return
        records = {"train.log", "metrics.jsonl", "train_gpt.py", PACKED_NAME, ALIVE}
        if {path.name for path in self.dir.iterdir()} <= records:
            self.remove_alive()
            shutil.rmtree(self.dir)

    def is_in_its_folder(self) -> bool:
        """Whether no other launch has put a folder of its own in place of this one."""
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self.dir / "train.log")
            return os.path.samestat(os.fstat(self.text.fileno()), there)
        return False

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def first_refusal(self, own: Refusal | None) -> Refusal:
        """That of the lowest rank with one, on all ranks; at least one has one."""
        if self.world == 1:
            return own
        found = [None] * self.world
        dist.all_gather_object(found, own and (own.problems, own.code))
        return Refusal(*next(filter(None, found)))

    def log(self, text: str) -> None:
        """One line for people: terminal and train.log, flushed."""
        if self.rank == 0:
            self.progress.say(text)
            self.text.write(text + "\n")

    def at_work(self, work: str) -> None:
        """Says, for those who watch alone, how far the phase is."""
        self.progress.work = work

    def warn(self, text: str) -> None:
        """A line of the log that result.json and the end of the log repeat."""
        self.log(f"WARNING: {text}")
        if text not in self.warnings:
            self.warnings.append(text)

    def event(self, kind: str, **fields) -> None:
        """One JSON object for programs in metrics.jsonl; `t` is seconds since the start."""
        if self.rank == 0:
            told = {"event": kind, "t": time.perf_counter() - self.started, **fields}
            self.jsonl.write(json.dumps(told) + "\n")

    def signalled(self, number: int, _) -> None:
        """On SIGTERM and SIGINT: stops at once, but while training between two steps."""
        self.stop = self.stop or number
        waits = self.phase_name in WAITING
        refuse(not waits, f"stopped by {signal.Signals(number).name}", 128 + number)

    def silent_ranks(self, seconds: float = 5) -> list[int]:
        """Tells the launcher's store that this rank stops.

        Returns those that do not within so many seconds: killed, cut off, hanging.
        """
        silent = [rank for rank in range(self.world) if rank != self.rank]

        def leave() -> None:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

        def exchange() -> None:
            store = dist.PrefixStore("stopped", dist.distributed_c10d._get_default_store())
            end = time.perf_counter() + seconds
            # the store is gone with its host
            with contextlib.suppress(RuntimeError):
                store.set(str(self.rank), "")
                if not self.cuda:
                    # so that those who wait for this rank notice; it may wait for the lost one
                    threading.Thread(target=leave, daemon=True).start()
                while silent and time.perf_counter() < end:
                    silent[:] = [rank for rank in silent if not store.check([str(rank)])]
                    time.sleep(0.05)

        # In a thread: behind a link that loses all packets no call of a store ever returns
        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(seconds + 1)
        return silent

    @contextlib.contextmanager
    def phase(self, name: str):
        """Names what is going on. Its seconds are no longer those of the phase around it.

        An exception leaves the name, so that the message can say where.
        """
        outer = self.phase_name
        self.enter(name)
        yield
        self.enter(outer)

    def enter(self, name: str) -> None:
        """From now on another phase is under way; the GPU's work until now is the old one's."""
        self.wait()
        self.last_sign = -math.inf  # another one is due
        spent = self.earlier.get(name, 0.0) + self.seconds.get(name, 0.0)
        self.tick()
        self.phase_name = name
        self.progress.enter(name, spent)

    def tick(self) -> float:
        """Books the time until now on the phase under way.

        Returns its seconds in all launches: `train` is the training clock.
        """
        now = time.perf_counter()
        name = self.phase_name
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.booked
        self.booked = now
        if now - self.last_sign >= ALIVE_SECONDS:
            self.leave_sign_of_life()
        return self.earlier.get(name, 0.0) + self.seconds[name]

    def ledger(self) -> dict[str, float]:
        """Wall seconds by phase, of all launches, until the last tick."""
        rows = dict(self.earlier)
        for name, seconds in self.seconds.items():
            rows[name] = rows.get(name, 0.0) + seconds
        return rows

    def leave_sign_of_life(self) -> None:
        """Leaves on disk how long the run has been at work, should it be killed.

        A disk that does not take it ends nothing: what must be kept is written elsewhere.
        """
        if self.rank != 0 or not self.leaves_signs:
            return
        self.last_sign = self.booked
        seconds = sum(self.ledger().values())
        more = " unknown" if self.lost_seconds is None else ""
        try:
            if self.alive_file is None:
                self.alive_file = os.open(self.dir / ALIVE, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self.alive_file, f"{self.launches:9d} {seconds:20.6f}{more}\n".encode(), 0)
        except OSError as error:
            problem = f"{ALIVE}: {error.strerror}: after a kill fewer seconds will be known as lost"
            if not any(text.startswith(f"{ALIVE}: ") for text in self.warnings):
                self.warnings.append(problem)
                # the log may be on the same disk
                with contextlib.suppress(OSError):
                    self.log(f"WARNING: {problem}")

    def go_on(self, ledger: dict[str, float], launches: int, warnings: list[str]) -> None:
        """Takes over what earlier launches have booked and said until their last checkpoint.

        What ALIVE says beyond that was lost, or done again. Without it that is not known, and
        stays so, whatever later launches know of themselves: each says it in its own ALIVE.
        """
        self.earlier = dict(ledger)
        self.launches = launches + 1
        self.warnings[:] = dict.fromkeys([*warnings, *self.warnings])
        self.lost_seconds = None
        # a disk may hold anything
        with contextlib.suppress(OSError, ValueError):
            before, seconds, *more = (self.dir / ALIVE).read_text(errors="replace").split()
            self.launches = max(launches, int(before)) + 1
            lost = max(float(seconds) - sum(self.earlier.values()), 0.0)
            if math.isfinite(lost):
                self.earlier["lost"] = self.earlier.get("lost", 0.0) + lost
                if not more:
                    self.lost_seconds = self.earlier["lost"]

    def remove_alive(self) -> None:
        """The run is complete."""
        if self.alive_file is not None:
            os.close(self.alive_file)
            self.alive_file = None
        (self.dir / ALIVE).unlink(missing_ok=True)

    def milliseconds(self, work: Callable) -> float:
        """Time of one call, to the end of what it starts on the device."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - began)

    def wait(self) -> None:
        """To the end of what was started on the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def compiled(self, work: Callable) -> Callable:
        """The function or module, compiled where the run compiles: one graph for each shape."""
        if not self.compile:
            return work
        return torch.compile(work, dynamic=False, fullgraph=True)

    def fails(self, work: Callable) -> str:
        """What went wrong in work(), the same on all ranks where it did on one; else "".

        For what a run can do without: memory that is too small, or a compiler that fails, is told
        and ends nothing. No rank may wait for another in work().
        """
        problem = ""
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            problem = one_line(f"{type(error).__name__}: {error}"[:200])
        found = torch.tensor(float(bool(problem)))
        if self.world > 1:
            dist.all_reduce(found)
        if not found:
            return ""
        if self.cuda:
            torch.cuda.empty_cache()
        return problem or "another rank could not"


# What an effect amounts to, in words; lower is better
DID_NOTHING = "did nothing"
UNFINISHED = "not to its end"
NOT_FINITE = "not finite"
UNCLEAR = "not distinguishable"


@dataclass
class Activity:
    """What one requested toggle did: the proof that it acted, and what that cost."""

    tensors: int = 0
    params: int = 0
    scope: str = ""
    # of effect: the measured quantity with the toggle on, minus off
    unit: str = "nats"
    # when it acted
    steps: list[int] = field(default_factory=list)
    effect: float | None = None
    # 95 %: lowest and highest
    effect_interval: list[float] | None = None
    # what the effect is measured on, and against what
    compared: str = ""
    # of one time that it acts, which is a step, a snapshot, an export
    cost_ms: float | None = None
    cost_interval: list[float] | None = None
    cost_per: str = ""
    # in the whole run
    cost_seconds: float | None = None
    steps_lost: float | None = None
    # median of the run's own steps in which it did not act, and in which it did
    step_ms_without: float | None = None
    step_ms_with: float | None = None
    bytes_saved: int | None = None
    # its last stage, where that never began
    missing: str = ""

    def row(self, total_steps: int) -> dict:
        """For result.json. Active: it acted, to its last stage, and that made a difference."""
        acted = len(self.steps)
        verdict = in_words(self.effect, self.effect_interval)
        active = acted and not self.missing
        if self.missing:
            verdict = UNFINISHED
        fields = dataclasses.asdict(self)
        del fields["steps"]
        if verdict == NOT_FINITE:
            # JSON has no NaN
            fields.update(effect=None, effect_interval=None)
        return {
            "active": bool(active and verdict not in (None, DID_NOTHING, NOT_FINITE)),
            "verdict": verdict,
            "first_step": min(self.steps, default=None),
            "last_step": max(self.steps, default=None),
            "share_of_steps": acted / max(total_steps, acted, 1),
            **fields,
        }


def in_words(effect: float | None, interval: list[float] | None) -> str | None:
    """An effect as people would say it; None where there is none. An interval of NaN is none."""
    if effect is None:
        return None
    if not math.isfinite(effect):
        return NOT_FINITE
    if interval and not all(map(math.isfinite, interval)):
        interval = None
    low, high = interval or (effect, effect)
    if low == effect == high == 0:
        return DID_NOTHING
    if interval is None:
        return "acted"
    if low <= 0 <= high:
        return UNCLEAR
    return "better" if effect < 0 else "worse"


# A table's lines for rich: nothing but a rule of dashes below the header
HEADER_RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

# What ends below its likes in a table: 15.9 s, -0.13 s, 2.168706, 1,234
FIGURE = re.compile(r"[-+]?\d[\d,.]*( \w+)?")


def column_cells(values: list) -> tuple[list[str], bool]:
    """A column as text, and whether it holds figures only: numbers, or FIGURE.

    Numbers get thousands separators, or all six decimals as soon as one of them is a float; None
    is a dash.
    """
    known = [value for value in values if value is not None]
    numeric = all(type(value) in (int, float) for value in known)
    number_format = ".6f" if any(type(value) is float for value in known) else ","

    cells = []
    for value in values:
        if value is None:
            cells.append("-")
        elif numeric:
            cells.append(format(value, number_format))
        else:
            cells.append(str(value))
    figures = numeric or all(FIGURE.fullmatch(str(value)) for value in known)
    return cells, figures


def text_table(rows: Iterable[Iterable], markdown: bool = False) -> str:
    """Rows, the header first, as plain text of whatever width it takes; numbers to the right."""
    table = Table(
        box=MARKDOWN if markdown else HEADER_RULE,
        show_edge=markdown,
        pad_edge=markdown,
        padding=(0, 1) if markdown else (0, 1, 0, 0),
    )
    columns = []
    for title, *values in zip(*rows, strict=True):
        cells, numeric = column_cells(values)
        justify = "right" if numeric else "left"
        table.add_column(Text(title), justify=justify, no_wrap=True, overflow="ignore")
        columns.append(cells)
    for row in zip(*columns, strict=True):
        table.add_row(*map(Text, row))

    # Neither colours nor the width of a terminal: the same text in every environment
    page = io.StringIO()
    console = Console(file=page, width=1_000_000, color_system=None, force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip("\n")


# ── 3 Data ────────────────────────────────────────────────────────────────────────────────────────
# In: shards of tokens and their tokenizer. Out: the rows of each step, and the validation
# targets with the bytes that they stand for.
# Promise: a step holds the same rows on any number of ranks (LOADER=documents: of micro-batches
# in all); every token is checked as it is read; bytes are counted by the challenge's rule and
# compared with the decoded text.

# A shard: a header of little-endian int32 (magic, version, tokens, zeros), then uint16 tokens
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_INTS
# The token that opens each document; nothing closes one
BOS = 1
AGAIN = "prepare the data again (python prepare_data.py --help)"


def read_numbers(path: Path, kind: str, start: int, n: int) -> np.ndarray:
    """`n` numbers of numpy type `kind`, from byte `start` on; fewer where the file ends.

    Care: numpy.fromfile takes a failing disk for the end of the file; a mapped file that is cut
    while the run reads it kills the process. pread does neither.
    """
    width = np.dtype(kind).itemsize
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), n * width, start)
    except FileNotFoundError as error:
        raise Refusal(f"{path}: {error.strerror}; {AGAIN}") from None
    except OSError as error:
        remedy = "mend that, then go on with RESUME=1"
        raise Refusal(f"{path}: {error.strerror}; {remedy}", 7) from None
    return np.frombuffer(data, kind, len(data) // width)


def count_tokens(path: Path) -> int:
    """Tokens of one shard. Refusal where it is none, or where header and size disagree."""
    # A pipe would keep us waiting
    refuse(not path.is_file(), f"{path}: no plain file; {AGAIN}")
    header = read_numbers(path, "<i4", 0, SHARD_HEADER_INTS)
    size = path.stat().st_size
    start = header[:2].tolist()
    refuse(
        len(header) < SHARD_HEADER_INTS or start != [SHARD_MAGIC, SHARD_VERSION],
        f"{path}: no token shard (starts {start}, not {SHARD_MAGIC}, {SHARD_VERSION}); {AGAIN}",
    )
    tokens = int(header[2])
    refuse(
        size != SHARD_HEADER_BYTES + 2 * tokens,
        f"{path}: {size:,} bytes, but the header promises {tokens:,} tokens; "
        f"cut or damaged: {AGAIN}",
    )
    return tokens


def shard_paths(folder: Path, name: str) -> list[Path]:
    """The shards of one split. Refusal for a file whose name tells neither shard nor byte counts.

    Care: the byte counts of a data set whose tokens do not spell its text (CaseOps) lie beside
    the shards in the shards' own format, as fineweb_val_bytes_*.bin. Read as tokens they would be
    a text of low ids.
    """
    found = sorted(folder.glob(f"fineweb_{name}_*.bin"))
    shards = [path for path in found if path.stem.split("_", 2)[2].isdecimal()]
    for path in set(found) - set(shards) - set(byte_count_paths(folder, name)):
        number = "no number behind the split in its name, so no shard"
        raise Refusal(f"{path}: {number}; rename it, or move it out of DATA_PATH")
    return shards


def byte_count_paths(folder: Path, name: str) -> list[Path]:
    """The side-cars of one split, see SideCar."""
    return sorted(folder.glob(f"fineweb_{name}_bytes_*.bin"))


class Split:
    """The shards of one split, in the order of their names, as one endless stream."""

    def __init__(self, cfg: Config, name: str):
        self.vocab_size = cfg.vocab_size
        self.folder = Path(cfg.data_path)
        self.paths = shard_paths(self.folder, name)
        # Where each shard begins in the stream, and at last where the stream repeats itself
        sizes = [count_tokens(path) for path in self.paths]
        self.edges = np.cumsum([0, *sizes]).tolist()
        self.tokens = self.edges[-1]
        refuse(
            self.tokens < 2,
            f"DATA_PATH={cfg.data_path}: {self.tokens} tokens in {len(self.paths)} "
            f"fineweb_{name}_*.bin; run python prepare_data.py demo (or fineweb), or set DATA_PATH",
        )

    def take(self, start: int, n: int) -> np.ndarray:
        """Tokens [start, start + n) of the repeated stream, (n,) int64, each one checked."""
        parts = []
        while n > 0:
            start %= self.tokens
            shard = bisect.bisect(self.edges, start) - 1
            wanted = min(n, self.edges[shard + 1] - start)
            parts.append(self.read(shard, start - self.edges[shard], wanted))
            start += wanted
            n -= wanted
        return np.concatenate(parts)

    def first_document(self, shard: int) -> int:
        """The place of the first BOS in a shard. Refusal where it has none."""
        tokens = self.edges[shard + 1] - self.edges[shard]
        place = 0
        while place < tokens:
            part = self.read(shard, place, min(4096, tokens - place))
            if BOS in part:
                return place + int((part == BOS).argmax())
            place += len(part)
        no_start = f"{self.paths[shard]}: no document begins (token {BOS}) among {tokens:,} tokens"
        raise Refusal(f"{no_start}; {AGAIN}, or take LOADER=rows")

    def read(self, shard: int, place: int, n: int) -> np.ndarray:
        """`n` tokens of one shard. Refusal where it is too short, or an id is too large."""
        path = self.paths[shard]
        part = read_numbers(path, "<u2", SHARD_HEADER_BYTES + 2 * place, n).astype(np.int64)
        refuse(len(part) < n, f"{path}: has been cut since the run began; {AGAIN}")
        worst = int(part.argmax())
        refuse(
            part[worst] >= self.vocab_size,
            f"{path}: token id {part[worst]} at {place + worst:,}, but "
            f"VOCAB_SIZE={self.vocab_size}; {AGAIN}",
        )
        return part


class Manifest(NamedTuple):
    """What prepare_data.py wrote about a folder of shards."""

    shards: dict[str, tuple[int, str]]  # name -> (bytes, sha256)
    tokenizer_sha256: str
    shared: int | None  # documents in train and in validation; None: not stated
    lost: dict | None  # as lost_text takes it; None: not counted


def lost_text(found: dict | None) -> str:
    """Validation documents that do not come back from their tokens, in words; empty for none.

    found: {"lost": how many, or None: not known, "of": of how many}, or None: nothing was lost
    that anybody knows of.
    """
    if not found or found["lost"] == 0:
        return ""
    number = "an unknown number of"
    if None not in (found["lost"], found["of"]):
        number = f"{found['lost']:,} of {found['of']:,}"
    return f"{number} validation documents do not come back from their tokens"


def read_manifest(path: Path, splits: dict[str, Split]) -> Manifest:
    """The manifest, as far as it concerns these splits. Refusal where it is none."""
    try:
        content = json.loads(path.read_text())
        shards = {}
        for shard in content["shards"]:
            # fineweb, the split, number.bin
            words = shard["file"].split("_")
            if len(words) > 1 and words[1] in splits:
                shards[shard["file"]] = (shard["bytes"], shard["sha256"])
        tokenizer_sha256 = content["tokenizer"]["sha256"]
        disjoint = content["disjoint"]
        shared = disjoint["shared"] if disjoint else None
        val = content.get("splits", {}).get("val", {})
        lost = None
        if val.get("altered_documents") is not None:
            lost = {"lost": val["altered_documents"], "of": val["documents"]}
            if any(type(n) is not int for n in lost.values()):
                raise TypeError(f"splits.val: {lost}, not whole numbers")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(f"{path}: no manifest ({error!r}); {AGAIN}") from None
    return Manifest(shards, tokenizer_sha256, shared, lost)


def differing_shards(
    manifest: Manifest, splits: dict[str, Split], hashes: dict[str, str]
) -> list[str]:
    """Names of the shards that are missing, stray, or of another size or sha256 than promised.

    hashes: those that were computed. Training shards are too large to be read for this: the
    manifest's own hash is taken for theirs.
    """
    believed = {name: sha256 for name, (_, sha256) in manifest.shards.items()}
    known = believed | hashes
    actual = {}
    for name, split in splits.items():
        for path in [*split.paths, *byte_count_paths(split.folder, name)]:
            actual[path.name] = (path.stat().st_size, known.get(path.name))
    names = manifest.shards.keys() | actual.keys()
    return sorted(name for name in names if manifest.shards.get(name) != actual.get(name))


def check_manifest(
    cfg: Config, splits: dict[str, Split], tokenizer: str, hashes: dict
) -> tuple[str, dict | None]:
    """One line on what manifest.json says, and Manifest.lost; Refusal where the folder differs.

    tokenizer: the sha256 of the tokenizer; hashes: name -> sha256 of the files of validation.
    """
    folder = Path(cfg.data_path)
    path = folder / "manifest.json"
    if not path.exists():
        return "none: hashes and train/validation overlap not checked", None

    manifest = read_manifest(path, splits)
    refuse(
        manifest.shared,
        f"{path}: {manifest.shared} documents are in train and in validation; {AGAIN}",
    )
    refuse(
        tokenizer != manifest.tokenizer_sha256,
        f"TOKENIZER_PATH={cfg.tokenizer_path}: the shards in {folder} were made with another "
        f"tokenizer (sha256 {str(manifest.tokenizer_sha256)[:12]}..., not {tokenizer[:12]}...); "
        "use the one that lies beside them",
    )
    wrong = differing_shards(manifest, splits, hashes)
    if wrong:
        problem = "missing, stray, or not as manifest.json says (size, sha256)"
        raise Refusal(f"{folder}/{wrong[0]}: {problem}; {AGAIN}")

    overlap = "no document in both splits"
    if manifest.shared is None:
        overlap = "train/validation overlap not stated"
    return f"agrees (sizes, validation hashes, tokenizer); {overlap}", manifest.lost


def check_data(cfg: Config, splits: dict[str, Split]) -> dict:
    """The data's fingerprint for the log: hashes, shards, tokens, and what the manifest says.

    Refusal where a manifest.json says otherwise, or that documents are in both splits.
    """
    tokenizer = hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()
    hashes = {}
    val = splits["val"]
    for path in [*val.paths, *byte_count_paths(val.folder, "val")]:
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    found = {"path": str(Path(cfg.data_path))}
    found["tokenizer_sha256"] = tokenizer
    found["val_sha256"] = hashes
    for name, split in splits.items():
        found[f"{name}_shards"] = len(split.paths)
        found[f"{name}_tokens"] = split.tokens
    found["manifest"], lost = check_manifest(cfg, splits, tokenizer, hashes)
    if lost is not None:
        found["lost_documents"] = lost
    return found


class StepShape(NamedTuple):
    """How the tokens of a step lie."""

    step_rows: int  # of all ranks
    micro_batches: int  # of one rank
    rows: int  # of this rank's largest micro-batch
    length: int  # tokens of a row


def step_shape(cfg: Config, run: Run, length: int) -> StepShape:
    """The shape of a step whose rows have `length` tokens. Refusal: more ranks than rows.

    With LOADER=documents a micro-batch is one row, which must hold TRAIN_SEQ_LEN tokens, and
    `length` says nothing.
    """
    wanted = cfg.grad_accum_steps or (max(8 // run.world, 1) if run.cuda else 1)
    tokens = cfg.train_batch_tokens
    if cfg.loader == "documents":
        step_rows = run.world * wanted
        remedy = f"must be a multiple of its {run.world} ranks x {wanted} micro-batches"
        refuse(tokens % step_rows, f"LOADER=documents: TRAIN_BATCH_TOKENS={tokens} {remedy}")
        row = tokens // step_rows
        short = f"LOADER=documents: TRAIN_BATCH_TOKENS={tokens} has micro-batches of {row} tokens"
        remedy = f"raise it, or lower TRAIN_SEQ_LEN={cfg.train_seq_len} or GRAD_ACCUM_STEPS"
        refuse(row < cfg.train_seq_len, f"{short}: {remedy}={wanted}")
        return StepShape(step_rows, wanted, 1, row)

    step_rows = tokens // length
    too_few = f"TRAIN_BATCH_TOKENS={tokens}: fewer rows than {run.world} ranks"
    refuse(step_rows < run.world, too_few)
    micro_batches = min(wanted, step_rows // run.world)
    own = dealt(step_rows, run.world, run.rank)
    return StepShape(step_rows, micro_batches, -(-len(own) // micro_batches), length)


def longest_row(cfg: Config, run: Run) -> int:
    """Tokens of the longest row that training and scoring give the model."""
    longest = max(cfg.train_seq_len, cfg.window)
    if cfg.ttt_mode == "lora" and cfg.phased_ttt_enabled and cfg.doc_mask:
        longest = max(longest, global_step_windows(cfg) * cfg.window)
    if cfg.loader == "documents" and not cfg.eval_only:
        longest = max(longest, step_shape(cfg, run, cfg.train_seq_len).length)
    return longest


def dealt(rows: int, hands: int, hand: int) -> range:
    """Which of the rows this hand gets: neighbours, and one more for the first hands if need be."""
    each, more = divmod(rows, hands)
    first = hand * each + min(hand, more)
    return range(first, first + each + (hand < more))


class EvenRows:
    """Evenly spaced rows.

    What:   row i of r begins at i / r of the stream, and goes on where it ended in the step before.
    Why:    the rows of a step are not of one document, and nothing has to be drawn.
    Source: ours; toggle LOADER=rows.
    Care:   once the rows have crossed the distance between them, every token has been seen (those
            at the seams twice), and each row follows in the track of the next one.
    """

    def __init__(self, split: Split, shape: StepShape, own: range, first: int):
        self.length = shape.length
        self.begins = [split.tokens * row // shape.step_rows for row in own]

    def starts(self, step: int) -> list[int]:
        return [begin + step * self.length for begin in self.begins]


class PackedDocuments:
    """Documents in the order of the text, with no row's end but that of a micro-batch.

    What:   a step is one span of a shard: a row of inputs and a target more for each micro-batch.
            The spans begin at the shard's first BOS; the next one begins where the last one ended.
    Why:    documents keep their length, and DOC_MASK tells them apart: none is cut by a row's end
            but the first and last of a micro-batch.
    Source: #1530; toggle LOADER=documents.
    Care:   what is left of a shard when no span fits is dropped. Theirs deals micro-batches, so 1
            rank x 8 micro-batches ends a shard elsewhere than 8 ranks do; here a step is of one
            shard, as on their 8 GPUs. Equal products of ranks and micro-batches read alike, bit for
            bit. On CPU a rank has one micro-batch unless GRAD_ACCUM_STEPS says more: 2 ranks cut
            the text where 1 rank does not.
    """

    def __init__(self, split: Split, shape: StepShape, own: range, first: int):
        self.span = shape.length + 1
        self.step_span = self.span * shape.step_rows
        self.own = own
        self.shards = []
        steps = []
        for shard, edge in enumerate(split.edges[:-1]):
            begin = split.first_document(shard)
            self.shards.append(edge + begin)
            steps.append((split.edges[shard + 1] - edge - begin) // self.step_span)
        # the step of an epoch with which each shard begins, and at last how many there are
        self.edges = np.cumsum([0, *steps]).tolist()
        refuse(
            self.edges[-1] == 0,
            f"LOADER=documents: none of {len(steps)} training shards holds the {self.step_span} "
            "tokens of a step behind its first BOS; lower TRAIN_BATCH_TOKENS, or take LOADER=rows",
        )

    def starts(self, step: int) -> list[int]:
        step %= self.edges[-1]
        shard = bisect.bisect(self.edges, step) - 1
        begin = self.shards[shard] + (step - self.edges[shard]) * self.step_span
        return [begin + row * self.span for row in self.own]


class DrawnRows:
    """Rows that are drawn, step after step: whoever goes on at a step draws those before it again.

    Rows of another length begin anew, with other draws. Refusal where a shard is shorter than one.
    """

    def __init__(self, split: Split, shape: StepShape, own: range, first: int):
        self.split = split
        self.shape = shape
        self.own = own
        self.drawn = first
        self.last: list[int] = []
        for path, tokens in zip(split.paths, np.diff(split.edges).tolist(), strict=True):
            remedy = f"shorter than a row of {shape.length} and its last target"
            refuse(tokens <= shape.length, f"{path}: {tokens} tokens, {remedy}; take LOADER=rows")

    def starts(self, step: int) -> list[int]:
        while self.drawn <= step:
            self.last = self.draw()
            self.drawn += 1
        return self.last

    def draw(self) -> list[int]:
        raise NotImplementedError


def windows_of(random: np.random.Generator, split: Split, shard: int, length: int) -> range:
    """Where the rows of one shard begin: end to end, from a random place below `length` on."""
    begin, end = split.edges[shard : shard + 2]
    most = min(length - 1, end - begin - length - 1)
    if most:
        begin += int(random.integers(most + 1))
    return range(begin, end - length, length)


class Shuffler:
    """One reader of ShuffledRows, with shards and a generator of its own."""

    def __init__(self, split: Split, shards: Sequence[int], length: int, seed: list[int]):
        self.split = split
        self.shards = shards
        self.length = length
        self.random = np.random.Generator(np.random.PCG64(seed))
        self.shuffle()

    def shuffle(self) -> None:
        """Begins an epoch."""
        self.rows = []  # of each shard, those to come from the end
        for shard in self.shards:
            windows = windows_of(self.random, self.split, shard, self.length)
            self.rows.append(windows.start + windows.step * self.random.permutation(len(windows)))
        self.left = np.array([len(rows) for rows in self.rows], float)

    def draw(self, count: int) -> list[int]:
        drawn = []
        for _ in range(count):
            if not self.left.any():
                self.shuffle()
            # numpy's own choice(len, p=left / sum), without its checks
            share = np.cumsum(self.left / self.left.sum())
            chosen = int(np.searchsorted(share / share[-1], self.random.random(), "right"))
            self.left[chosen] -= 1
            drawn.append(int(self.rows[chosen][int(self.left[chosen])]))
        return drawn


class ShuffledRows(DrawnRows):
    """Rows in random order.

    What:   eight readers share the shards, r, r + 8, ... being reader r's. A reader cuts each of
            its shards in rows from a random place on and permutes them; for each row it draws a
            shard, in proportion to the rows that are left there. When none is left it begins anew.
    Why:    the rows of a step and of neighbouring steps have nothing to do with each other.
    Source: #1394; toggle LOADER=shuffled.
    Care:   there each rank is a reader. Here there are as many as on 8 GPUs, however many ranks
            there are, so that all read alike; fewer where there are fewer shards or rows.
    """

    READERS = 8

    def __init__(self, split: Split, shape: StepShape, own: range, first: int):
        super().__init__(split, shape, own, first)
        shards = range(len(split.paths))
        readers = min(self.READERS, len(shards), shape.step_rows)
        # a reader, how many rows it gives to a step, and which of them are this rank's
        self.readers = []
        for reader in range(readers):
            given = dealt(shape.step_rows, readers, reader)
            mine = slice(max(own.start - given.start, 0), max(own.stop - given.start, 0))
            if given[mine]:
                shuffler = Shuffler(split, shards[reader::readers], shape.length, [reader, first])
                self.readers.append((shuffler, len(given), mine))

    def draw(self) -> list[int]:
        drawn = [reader.draw(count)[mine] for reader, count, mine in self.readers]
        return [*itertools.chain(*drawn)]


class CoprimeWalk:
    """The rows of one shard, each once, in steps of a stride that is coprime with their number."""

    def __init__(self, random: np.random.Generator, split: Split, shard: int, length: int):
        self.rows = windows_of(random, split, shard, length)
        self.done = 0
        count = len(self.rows)
        self.place = 0
        self.stride = 1
        if count > 1:
            self.place = int(random.integers(count))
            self.stride = int(random.integers(1, count))
            while math.gcd(self.stride, count) > 1:
                self.stride = int(random.integers(1, count))

    @property
    def left(self) -> int:
        return len(self.rows) - self.done

    def next(self) -> int:
        row = self.rows[(self.place + self.done * self.stride) % len(self.rows)]
        self.done += 1
        return row


class CoprimeRows(DrawnRows):
    """Rows of many shards, each shard walked with a coprime stride.

    What:   a step draws shards, 8 at first and 64 after 1,800 steps, in proportion to the rows left
            there to the power .9 falling to .5; gives each one row and draws the others among them;
            and mixes the rows, a shard at a time in turn.
    Why:    every step sees many shards, and an order of a whole shard is two numbers.
    Source: #726; toggle LOADER=coprime.
    Care:   the draws depend on the names of the shards; there on their folder, too. The numbers of
            shards are those of 8 GPUs, however many ranks there are, so that all read alike.
    """

    GROWS = 1800  # steps

    def __init__(self, split: Split, shape: StepShape, own: range, first: int):
        super().__init__(split, shape, own, first)
        seed = 0
        for byte in "".join(path.name for path in split.paths).encode():
            seed = (seed ^ byte) * 1099511628211 % 2**64  # FNV
        self.random = np.random.Generator(np.random.PCG64([seed, first]))
        self.left = (np.diff(split.edges) - 1) // shape.length * 1.0
        self.walks: dict[int, CoprimeWalk] = {}

    def draw(self) -> list[int]:
        parts = []
        for shard, count in self.choose():
            rows = [self.next_row(shard) for _ in range(count)]
            if count > 1:
                rows = [rows[i] for i in self.random.permutation(count)]
            self.left[shard] = max(self.walks[shard].left, 1)
            parts.append(rows)

        mixed = []
        while parts:
            parts = [parts[i] for i in self.random.permutation(len(parts))]
            mixed += [rows.pop() for rows in parts]
            parts = [rows for rows in parts if rows]
        return mixed[self.own.start : self.own.stop]

    def choose(self) -> list[tuple[int, int]]:
        """The shards of this step, and how many rows each gives."""
        grown = min(self.drawn / self.GROWS, 1.0)
        weights = self.left ** (0.9 - 0.4 * grown)
        share = weights / weights.sum()
        low, high = (min(n, len(share), self.shape.step_rows) for n in (8, 64))
        mixed = round(low + grown * (high - low))
        shards = self.random.choice(len(share), mixed, replace=False, p=share)
        among = share[shards] / share[shards].sum()
        counts = 1 + self.random.multinomial(self.shape.step_rows - mixed, among)
        order = self.random.permutation(mixed)
        return [*zip(shards[order].tolist(), counts[order].tolist(), strict=True)]

    def next_row(self, shard: int) -> int:
        walk = self.walks.get(shard)
        if walk is None or not walk.left:
            walk = CoprimeWalk(self.random, self.split, shard, self.shape.length)
            self.walks[shard] = walk
        return walk.next()


# LOADER -> where its rows begin. Each: (split, shape, own rows of each step, the step that is asked
# for first); starts(step), asked for in the order of the steps: a place in the stream for each row
ORDERS = {
    "rows": EvenRows,
    "documents": PackedDocuments,
    "shuffled": ShuffledRows,
    "coprime": CoprimeRows,
}

# ids and targets, each (rows of this rank, tokens of a row) int64
Batch = tuple[Tensor, Tensor]


class Loader:
    """The rows of this rank, step after step; two steps are read ahead.

    lengths: tokens of a row in each step that is done, so that a run goes on exactly.

    Care: a rank reads and checks its own rows alone, so it may be the only one that is refused:
    Trainer.step tells the others.
    """

    def __init__(self, cfg: Config, run: Run, split: Split, lengths: Sequence[int] = ()):
        self.cfg = cfg
        self.run = run
        self.split = split
        self.step = len(lengths)
        self.shape: StepShape | None = None
        # one thread, in which the order of the rows is drawn, too
        self.reader = concurrent.futures.ThreadPoolExecutor(1)
        self.ahead: list[concurrent.futures.Future] = []
        if lengths:
            first = self.step
            while first and lengths[first - 1] == lengths[-1]:
                first -= 1
            self.begin(step_shape(cfg, run, lengths[-1]), first)
            self.read_ahead()
            concurrent.futures.wait(self.ahead[:1])  # before the clock starts

    def next(self, length: int) -> Batch | Refusal:
        """The next step, in rows of `length` tokens, or why there is none.

        A new length drops what was read ahead. Refusal where a signal stops the run.
        """
        shape = step_shape(self.cfg, self.run, length)
        if shape != self.shape:
            self.begin(shape, self.step)
        self.read_ahead()
        try:
            batch = self.ahead.pop(0).result()
        except Refusal as refusal:
            if refusal.code > 128:
                raise
            return refusal
        self.step += 1
        ids, targets = (side.to(self.run.device, non_blocking=True) for side in batch)
        return ids, targets

    def begin(self, shape: StepShape, first: int) -> None:
        """From step `first` on, steps of this shape."""
        for unread in self.ahead:
            unread.cancel()
        self.ahead = []
        self.shape = shape
        own = dealt(shape.step_rows, self.run.world, self.run.rank)
        make = ORDERS[self.cfg.loader]
        self.order = self.reader.submit(make, self.split, shape, own, first)

    def read_ahead(self) -> None:
        """Orders the next step and the two after it."""
        while len(self.ahead) < 3:
            step = self.step + len(self.ahead)
            self.ahead.append(self.reader.submit(self.load, self.order, self.shape.length, step))

    def load(self, order: concurrent.futures.Future, length: int, step: int) -> list[Tensor]:
        """ids and targets of one step, on the CPU."""
        starts = order.result().starts(step)
        taken = [self.split.take(start, length + 1) for start in starts]
        tokens = torch.from_numpy(np.stack(taken))
        pair = [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]
        return [side.pin_memory() if self.run.cuda else side for side in pair]

    def close(self) -> None:
        """Waits for what is being read ahead."""
        self.reader.shutdown()


def load_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model in this file. Refusal where there is none.

    Care: given a folder, SentencePieceProcessor(model_file=...) aborts the process.
    """
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(Path(path).read_bytes())
    except (RuntimeError, OSError):
        problem = f"TOKENIZER_PATH={path}: no SentencePiece model there; set it, or {AGAIN}"
        raise Refusal(problem) from None
    return tokenizer


# Tokens of validation that are decoded to check their bytes (a second); the ids are all checked
CHECKED_TOKENS = 2**20
# Tokens that may be others when the decoded text is encoded again: a few where validation is cut,
# and a share of all. With the shards' tokenizer it was 0 of 6,902 documents; with another of the
# same size 5 % to 11 %.
MOVED_TOKENS = 16
MOVED_SHARE = 0.01
# Latin, Greek, Cyrillic to Hangul letters, punctuation, symbols
PROBED_CHARACTERS = range(0x21, 0x3000)


class ByteCheck(NamedTuple):
    """How much of the validation text was decoded and found to have the bytes that are counted."""

    documents: int
    of_documents: int
    bytes: int
    of_bytes: int


class ByteTable:
    """The UTF-8 bytes that a target stands for, by the challenge's rule.

    A control piece counts 0, a byte piece 1, any other the bytes of its text. A leading word
    mark is a space of one byte, except behind a control piece, where no space is decoded. An
    operator of CaseOps counts 0, unless an escape makes it text.

    Care: the rule miscounts a piece with a space behind its first character (the mark has 3
    bytes), and what an unknown piece stands for is lost. Neither may stand in validation.
    """

    WORD_MARK = "\u2581"
    # The next letter, or the next word, is in capitals; a letter within a word is; an escape
    OPERATORS = "\ue001\ue002\ue003\ue004"

    def __init__(self, cfg: Config):
        self.path = cfg.tokenizer_path
        self.sp = load_tokenizer(cfg.tokenizer_path)
        n = self.sp.vocab_size()
        refuse(
            n != cfg.vocab_size,
            f"VOCAB_SIZE={cfg.vocab_size}: {cfg.tokenizer_path} has {n} pieces; set VOCAB_SIZE={n}",
        )
        ids = list(range(n))
        pieces = [self.sp.id_to_piece(i) for i in ids]
        texts = [piece.removeprefix(self.WORD_MARK) for piece in pieces]
        sizes = [len(text.encode()) for text in texts]
        marked = [piece.startswith(self.WORD_MARK) for piece in pieces]

        # (n,) each: stands for no text; has a leading space; bytes without that space
        self.control = np.array(self.sp.is_control(ids))
        self.unknown = np.array(self.sp.is_unknown(ids))
        self.boundary = self.control | self.unknown | np.array(self.sp.is_unused(ids))
        self.space = np.array(marked) & ~self.boundary
        self.byte = np.array(self.sp.is_byte(ids))
        self.base = ~self.boundary * np.where(self.byte, 1, sizes)
        # (n,): has a space elsewhere
        self.inner_space = np.array([self.WORD_MARK in text for text in texts]) & ~self.boundary

        # CaseOps: all four operators are pieces. (n,): is one; is the escape
        self.caseops = set(self.OPERATORS) <= set(pieces)
        self.operator = self.caseops & np.isin(pieces, list(self.OPERATORS))
        self.escape = self.caseops & (np.array(pieces) == self.OPERATORS[-1])

    def acting(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) token ids -> (n,) which are operators, and not text behind an escape."""
        if not self.caseops:
            return np.zeros(len(tokens), bool)
        place = np.arange(len(tokens))
        # an escape that is escaped itself escapes nothing: behind an odd number of them in a row
        other = np.maximum.accumulate(np.where(self.escape[tokens], -1, place))
        escapes = np.append(0, (place - other)[:-1])
        return self.operator[tokens] & (escapes % 2 == 0)

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """(n + 1,) token ids -> (n,) bytes of the targets tokens[1:]."""
        previous = tokens[:-1]
        targets = tokens[1:]
        sizes = self.base[targets] + (self.space[targets] & ~self.boundary[previous])
        return np.where(self.acting(tokens)[1:], 0, sizes)

    def count_document(self, document: np.ndarray) -> int:
        """Bytes of a text from its first token on, before which no space is decoded."""
        first = self.base[document[:1]] * ~self.acting(document[:1])
        return int(first.sum() + self.count(document).sum())

    def verify(self, tokens: np.ndarray) -> ByteCheck:
        """How much was compared with the decoded text; Refusal where the counts are not its bytes.

        Care: another tokenizer of the same size decodes the tokens to some text, too, but would
        have written that text in other tokens.
        """
        self.refuse_miscounted(tokens)
        starts, ends = self.documents(tokens)
        every = -(-len(tokens) // CHECKED_TOKENS)
        size = 0
        written = np.zeros(len(self.base), int)
        for start, end in zip(starts[::every], ends[::every], strict=True):
            document = self.head(tokens[start:end])
            text = self.sp.decode(document.tolist())
            size += self.compare(document, text, start)
            for ids, sign in ((document, 1), (self.sp.encode(text), -1)):
                written += sign * np.bincount(ids, minlength=len(written))

        moved = int(np.abs(written).sum()) // 2
        total = self.count_document(tokens)
        refuse(
            moved > max(MOVED_TOKENS, MOVED_SHARE * min(len(tokens), CHECKED_TOKENS)),
            f"validation: TOKENIZER_PATH={self.path} would write the text of these tokens with "
            f"{moved:,} other tokens, so another tokenizer made the shards; use theirs",
        )
        return ByteCheck(len(starts[::every]), len(starts), size, total)

    def refuse_miscounted(self, tokens: np.ndarray) -> None:
        """Refusal where the rule counts a token that it miscounts."""
        unknown = np.flatnonzero(self.unknown[tokens])
        if len(unknown):
            first = unknown[0]
            document = np.count_nonzero(self.control[tokens[:first]])
            raise Refusal(
                f"validation: {len(unknown):,} of {len(tokens):,} tokens are unknown pieces, the "
                f"first at token {first} in document {document}: what they stand for counts no "
                "byte, so that BPB would be too low; prepare the data with a tokenizer that has "
                "byte fallback"
            )
        odd = np.flatnonzero(self.inner_space[tokens])
        if len(odd):
            piece = self.sp.id_to_piece(int(tokens[odd[0]]))
            raise Refusal(
                f"validation: {len(odd):,} of {len(tokens):,} tokens are pieces such as {piece!r} "
                f"at token {odd[0]}, for whose space the challenge's rule counts 3 bytes: "
                "prepare the data with a tokenizer that has spaces at the start of pieces only"
            )

    def documents(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the texts between control pieces begin and end.

        Care: either end of the tokens may be cut within a character. Its bytes are left out.
        """
        whole = np.flatnonzero(~self.byte[tokens])
        if not len(whole):
            whole = np.zeros(0, int)
        controls = np.flatnonzero(self.control[tokens])
        starts = np.concatenate([whole[:1], controls + 1])
        ends = np.concatenate([controls, whole[-1:] + 1])
        return starts[ends > starts], ends[ends > starts]

    def head(self, document: np.ndarray) -> np.ndarray:
        """The document, or as many of its whole characters as fit into CHECKED_TOKENS."""
        if len(document) <= CHECKED_TOKENS:
            return document
        whole = np.flatnonzero(~self.byte[document[:CHECKED_TOKENS]])
        return document[: whole[-1]] if len(whole) else document[:0]

    def compare(self, document: np.ndarray, text: str, start: int) -> int:
        """Bytes of the document's decoded text. Refusal where its tokens count others.

        An operator that acts is three bytes of what is decoded, and none of the text.
        """
        size = len(text.encode()) - 3 * int(self.acting(document).sum())
        counted = self.count_document(document)
        reason = "damaged, or made with another tokenizer; use the shards' own, or " + AGAIN
        if text.startswith(" ") and size == counted + 1:
            reason = "its leading space counts nothing; take a tokenizer that drops extra spaces"
        refuse(
            size != counted,
            f"validation: the document at token {start} is {size} bytes of text, but its tokens "
            f"count {counted}, so that BPB would be wrong: {reason}",
        )
        return size

    def altered(self) -> list[tuple[str, str]]:
        """(character, what it becomes) where the challenge's own tokenizer would keep it.

        What folds case loses text: it has fewer bits and nearly as many bytes.
        """
        rule = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
        found = []
        for character in map(chr, PROBED_CHARACTERS):
            becomes = self.sp.normalize(character).replace(self.WORD_MARK, "")
            if becomes != character == rule.normalize(character):
                found.append((character, becomes))
        return found


class SideCar:
    """The bytes that each validation token stands for, as files beside the shards.

    What:   fineweb_val_bytes_000000.bin has a uint16 for each token of fineweb_val_000000.bin. With
            a CaseOps tokenizer scores divide by these, and not by the bytes that the tokens spell.
    Why:    its tokens spell a text without capitals but with operators; BPB is that of the text
            before, where an operator has no byte.
    Source: #1729. CASEOPS_ENABLED=1 refuses other data; without it a CaseOps tokenizer does the
            same for itself.
    Care:   those of prepare_data.py state the bytes of the normalised text, so what the tokens
            spell. The published ones state those of the text as it came: a fold of two spaces
            into one counts 2, which makes BPB lower. Of a character in byte pieces the last one
            has all bytes. Other tokenizers are scored by the challenge's rule whatever lies there.
    """

    # Tokens, and bytes, that may be others than spelt. Before it was normalised, text had 0.03 %
    # (428 articles of Wikipedia) to 0.4 % more bytes (63 documents of OpenWebText).
    OTHERS = 0.01

    def __init__(self, cfg: Config, split: Split, table: ByteTable):
        self.table = table
        self.paths = byte_count_paths(split.folder, "val")
        remedy = "python prepare_data.py text --transform caseops, or fineweb --variant caseops"
        refuse(
            cfg.caseops_enabled and not table.caseops,
            f"CASEOPS_ENABLED=1: TOKENIZER_PATH={table.path} has no operators; set DATA_PATH and "
            f"TOKENIZER_PATH to CaseOps data ({remedy}), or CASEOPS_ENABLED=0",
        )
        refuse(
            table.caseops and not self.paths,
            f"DATA_PATH={split.folder}: no fineweb_val_bytes_*.bin, and the tokens of "
            f"TOKENIZER_PATH={table.path} (CaseOps) do not spell the text; prepare the data again "
            f"({remedy})",
        )
        if self.paths:
            self.pair(split)

    def pair(self, split: Split) -> None:
        """Refusal unless each shard has its side-car, of as many numbers."""
        names = [path.name.replace("_val_", "_val_bytes_") for path in split.paths]
        there = [path.name for path in self.paths]
        for name in sorted({*names} ^ {*there}):
            problem = "no such side-car" if name in names else "a side-car without its shard"
            raise Refusal(f"{split.folder / name}: {problem}; {AGAIN}")
        for path, shard in zip(self.paths, split.paths, strict=True):
            numbers, tokens = count_tokens(path), count_tokens(shard)
            refuse(
                numbers != tokens,
                f"{path}: {numbers:,} numbers for the {tokens:,} tokens of {shard.name}; {AGAIN}",
            )

    def target_bytes(self, tokens: np.ndarray, n: int) -> tuple[np.ndarray, str, int]:
        """(n,) bytes of the first targets; one line on what the side-cars say; those spelt in all.

        tokens: as many as are looked at, more than n, from the split's first one on.
        """
        spelt = self.table.count(tokens)
        if not self.paths:
            return spelt[:n], "none", int(spelt[:n].sum())
        parts = [
            read_numbers(path, "<u2", SHARD_HEADER_BYTES, count_tokens(path)) for path in self.paths
        ]
        stated = np.concatenate(parts)[1 : len(tokens)].astype(np.int64)
        self.compare(stated, spelt, self.table.byte[tokens[1:]])

        stated, spelt = stated[:n], spelt[:n]
        total, counted = int(stated.sum()), int(spelt.sum())
        more = total - counted
        if not self.table.caseops:
            line = "states the same bytes" if not more else f"states {total:,} bytes, not used"
            return spelt, line, counted
        line = f"{more:+,} beside what the tokens spell" if more else "as the tokens spell"
        return stated, f"used: {total:,} bytes, {line}", counted

    def compare(self, stated: np.ndarray, spelt: np.ndarray, byte: np.ndarray) -> None:
        """Refusal where the numbers are those of other tokens. All (n,); byte: is a byte piece."""
        others = int(((stated != spelt) & ~byte).sum())
        total, counted = int(stated.sum()), int(spelt.sum())
        refuse(
            others > self.OTHERS * len(spelt) or abs(total - counted) > self.OTHERS * counted,
            f"{self.paths[0]}: states {total:,} bytes, the validation tokens spell {counted:,} "
            f"({others:,} of {len(spelt):,} tokens others): of another text; {AGAIN}",
        )


class Validation:
    """The validation targets: target t is token t + 1.

    tokens: (n + 1,) int32 on the device. target_bytes: (n,). tilt: what changes their nats.
    """

    tilt: NgramTilt | None = None

    def __init__(self, cfg: Config, run: Run, split: Split):
        table = ByteTable(cfg)
        targets = cfg.val_max_tokens or split.tokens - 1
        # However few are scored: which tokenizer made them shows in many only
        wanted = max(targets + 1, CHECKED_TOKENS)
        tokens = split.take(0, min(split.tokens, wanted))
        self.checked = table.verify(tokens)
        self.altered = table.altered()
        side_car = SideCar(cfg, split, table)
        sizes, self.side_car, self.spelt_bytes = side_car.target_bytes(tokens, targets)

        self.tokens = torch.from_numpy(tokens[: targets + 1]).int().to(run.device)
        self.target_bytes = torch.from_numpy(sizes)
        self.n = len(self.target_bytes)
        refuse(
            not self.target_bytes.any(),
            f"DATA_PATH={cfg.data_path}: the validation targets have 0 bytes of text; {AGAIN}",
        )

    def facts(self) -> dict:
        """What the log and the result say of it."""
        check = self.checked
        size = self.target_bytes.sum().item()
        return dict(
            tokens_per_byte=round(self.n / size, 6),
            side_car=self.side_car,
            **({"spelt_bytes": self.spelt_bytes} if self.spelt_bytes != size else {}),
            checked_documents=f"{check.documents:,} of {check.of_documents:,}",
            checked_bytes=f"{check.bytes:,} of {check.of_bytes:,}",
        )

    def warnings(self, lost: dict | None) -> list[str]:
        """Why the score is none of the challenge's text. lost: as lost_text takes it."""
        found = []
        problem = lost_text(lost)
        if problem:
            for character, becomes in self.altered[:1]:
                problem += f"; the tokenizer makes {character!r} {becomes!r}, among others"
            found.append(f"{problem}; no score for the leaderboard")
        off = self.spelt_bytes / self.target_bytes.sum().item() - 1
        if off:
            counts = "the side-car counts another text than the tokens spell"
            found.append(f"{counts}: BPB is {off:+.3%} off by it")
        if not self.checked.bytes:
            found.append("0 bytes of validation were compared with decoded text")
        return found


# ── 4 Grid ────────────────────────────────────────────────────────────────────────────────────────
# In: weights (..., rows, columns). Out: integer codes and fp16 steps, and back.
# Promise: the only definition of quantisation; views, averages and export all call it.
def row_quantile(magnitude: Tensor, q: float) -> Tensor:
    """torch.quantile(magnitude, q, -1, keepdim=True) for q near 1, without sorting whole rows.

    The quantile lies between two neighbours of the sorted row; for q near 1 both are among its
    few largest entries. Those are written to meanwhile: magnitudes end as they were.
    """
    columns = magnitude.shape[-1]
    place = q * (columns - 1)
    # The lower neighbour, and how far from it to the upper one
    lower = int(place)
    share = place - lower
    wanted = columns - lower
    if wanted > 2:
        top = magnitude.topk(wanted, dim=-1).values
        return torch.lerp(top[..., -1:], top[..., -2:-1], share)

    # Two maxima are faster than topk
    largest, where = magnitude.max(-1, keepdim=True)
    if wanted == 1:
        return largest
    magnitude.scatter_(-1, where, -1.0)
    second = magnitude.amax(-1, keepdim=True)
    magnitude.scatter_(-1, where, largest)
    return torch.lerp(second, largest, share)


FP16_LEAST = 2.0**-24  # above 0


def fp16_step(largest: Tensor, top: float, smallest: float) -> Tensor:
    """The step, at least `smallest`, with which `largest` gets the code `top`, as fp16 can hold it.

    Care: CUDA divides inexactly by a mere number, so that the top is a tensor here.
    """
    step = largest.float() / torch.full_like(largest, top)
    return step.clamp_min(smallest).half().float()


class Grid(NamedTuple):
    """Uniform grid with one step per row: weight = code * scale, the scale stored as fp16.

    For weights (..., rows, columns), so that a whole stack of matrices is quantised at once.
    clip:  which quantile of a row's magnitudes gets the largest code (CLIP_QUANTILES); "sigma":
           so many of its standard deviations do (SDClip).
    codes: "sym" -top..top, "asym" one more below.
    floor: the step is at least 1 / top.
    sigmas: of "sigma".

    Care: with the floor all rows of weights below 1 share one fixed step. That makes their
    codes small, so cheap to compress, and the grid of small weights coarse. #145, #199, #194
    and #975 shipped it so; without it their sizes and losses cannot be had again.
    """

    bits: int
    clip: str = "amax"
    codes: str = "sym"
    floor: bool = False
    sigmas: float = 0.0

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def lowest(self) -> int:
        """The least code."""
        return -self.top - (self.codes == "asym")

    def scale(self, w: Tensor) -> Tensor:
        """Step of each row, (..., rows, 1) fp32 but rounded to fp16.

        Of several quantiles each matrix takes the one with the least squared error.
        """
        if self.clip == "sigma":
            return self.step(self.deviations(w))
        magnitude = w.abs()
        steps = [self.step(row_quantile(magnitude, q)) for q in CLIP_QUANTILES[self.clip]]
        if len(steps) == 1:
            return steps[0]
        # (quantiles, ...): one error per matrix
        errors = torch.stack([self.squared_error(w, step) for step in steps])
        best = errors.argmin(0)[None, ..., None, None]
        return torch.take_along_dim(torch.stack(steps), best, 0)[0]

    def deviations(self, w: Tensor) -> Tensor:
        """SDClip: `sigmas` standard deviations of each row, (..., rows, 1) fp64.

        What:   k std(row), with n - 1: the steps are those of a normal row, however long it is,
                and few codes are far from 0, so cheap to store: k sets the size of the file.
        Why:    coarse steps and cheap codes beat a fine grid of fewer weights at equal bytes.
        Source: #1394; toggle QUANT_CLIP=sigma; k: MLP_CLIP_SIGMAS and its like.
        Care:   where all of a row would be cut, as its weights are one number or nearly so, the
                mean is added. The records divide by 0 there. Cost: one pass over fp64 copies, so
                that another order of the sums hardly ever rounds a step otherwise.
        """
        spread, mean = torch.std_mean(
            w.double(), -1, correction=min(w.shape[-1] - 1, 1), keepdim=True
        )
        reach = self.sigmas * spread
        return torch.where(mean.abs() > reach, mean.abs() + reach, reach)

    def step(self, largest: Tensor) -> Tensor:
        """The step with which `largest` (..., rows, 1) gets the top code, as fp16 can hold it.

        Care: a step that fp16 rounds to zero would make 0 / 0 of a row of zeros. Of SDClip the
        least is fp16's, as in the records; else it has all of fp16's digits.
        """
        smallest = torch.finfo(torch.float16).tiny
        if self.clip == "sigma":
            smallest = FP16_LEAST
        if self.floor:
            smallest = 1 / self.top
        return fp16_step(largest, self.top, smallest)

    def squared_error(self, w: Tensor, scale: Tensor) -> Tensor:
        """(..., rows, columns) -> (...) fp64: what rounding to this step costs each matrix."""
        error = self.levels(w, scale) * scale - w
        return error.square().sum((-2, -1), dtype=torch.float64)

    def levels(self, w: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """The codes, still as fp32."""
        return torch.div(w, scale, out=out).round_().clamp_(self.lowest, self.top)

    def quantise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(..., rows, columns) -> int8 codes of that shape, fp16 scales (..., rows, 1)."""
        scale = self.scale(w)
        codes = self.levels(w, scale).to(torch.int8)
        return codes, scale.half()

    @staticmethod
    def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
        """The inverse of quantise: fp32 weights."""
        return codes.to(torch.float32, copy=True).mul_(scale)

    def fake_quantise(self, w: Tensor) -> Tensor:
        """What a reader makes of the shipped bytes, bit for bit."""
        codes, scale = self.quantise(w)
        return self.dequantise(codes, scale)

    def snap(self, w: Tensor) -> None:
        """w becomes fake_quantise(w), without codes on the way: a zero may keep its sign."""
        scale = self.scale(w)
        self.levels(w, scale, out=w).mul_(scale)


GPTQ_BLOCK = 128  # columns done at a time


def gptq(grid: Grid, w: Tensor, hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """GPTQ: codes that make up for each other's rounding, on the same grid.

    What:   one column after the other is rounded, the one with the largest input first; what that
            does wrong is taken from the columns still to come: E = (w - code step) / U_jj times
            row j of U, the upper Cholesky factor of the inverse Hessian. Clipping counts too.
    Why:    of w only x w matters: errors that cancel on the inputs x cost nothing.
    Source: Frantar 2022, arXiv:2210.17323; #1019, as in #1394 on; toggle GPTQ_ENABLED.
    Care:   steps are those of rounding to nearest, from w as it was. A weight that is 0, as pruning
            leaves it, stays 0 and what would move it goes on. An input that is always 0 has code 0.
            Columns of a block feed each other one by one, later blocks all at once: no difference
            but in speed.

    w (n, rows, columns), hessian (n, columns, columns): the mean of x x' over inputs x. damp: what
    is added to its diagonal, of the mean there. Returns int8 codes like w and fp16 scales
    (n, rows, 1). Raises Indefinite.
    """
    scale = grid.scale(w)
    factor, order = inverse_factor(hessian, damp)
    # as exact as the weights, and no more
    factor = factor.to(w.dtype)
    spread_order = order[:, None].expand_as(w)
    left = w.take_along_dim(spread_order, -1)
    dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
    zero = (left == 0) | dead.take_along_dim(order, -1)[:, None]
    codes = torch.zeros_like(left)
    for begin in range(0, w.shape[-1], GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, w.shape[-1])
        errors = torch.zeros_like(left[..., begin:end])
        for j in range(begin, end):
            column = left[..., j : j + 1]
            code = grid.levels(column, scale).masked_fill_(zero[..., j : j + 1], 0)
            error = (column - code * scale) / factor[:, j, j, None, None]
            left[..., j + 1 : end] -= error * factor[:, None, j, j + 1 : end]
            codes[..., j : j + 1] = code
            errors[..., j - begin : j - begin + 1] = error
        left[..., end:] -= errors @ factor[:, begin:end, end:]
    placed = torch.zeros_like(codes).scatter_(-1, spread_order, codes)
    return placed.to(torch.int8), scale.half()


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(U, order) of damped Hessians (n, columns, columns): U' U is the inverse, its columns in
    order, in which the diagonal falls.

    fp64 (n, columns, columns), upper triangles; (n, columns). Raises Indefinite.

    How: H = R R' with R upper is Cholesky from the last column to the first; then U is R inverse,
    without the inverse of H.
    """
    h = damped(hessian, damp)
    order = h.diagonal(dim1=-2, dim2=-1).argsort(stable=True, dim=-1, descending=True)
    h = h.take_along_dim(order[:, :, None], -2).take_along_dim(order[:, None], -1)
    root = cholesky(h.flip(-2, -1)).flip(-2, -1)
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(root, identity, upper=True), order


def damped(hessian: Tensor, damp: float) -> Tensor:
    """Hessians (..., columns, columns) as fp64: of the diagonal an entry of 0 counts as 1, and
    `damp` of the mean is added."""
    h = hessian.double()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    diagonal = diagonal + damp * diagonal.mean(-1, keepdim=True)
    return h.diagonal_scatter(diagonal, dim1=-2, dim2=-1)


class Indefinite(Exception):
    """Too little damping. place: the number of the first Hessian without a Cholesky factor."""

    def __init__(self, place: int):
        super().__init__(place)
        self.place = place


def cholesky(h: Tensor) -> Tensor:
    """Lower factors of (..., columns, columns). Raises Indefinite."""
    root, failed = torch.linalg.cholesky_ex(h)
    if failed.any():
        raise Indefinite(int(failed.flatten().nonzero()[0]))
    return root


def weighted_error(error: Tensor, hessian: Tensor) -> Tensor:
    """(n, rows, columns), (n, columns, columns) -> (n,) fp64: mean squared error of the outputs."""
    error = error.double()
    return ((error @ hessian.double()) * error).sum((-2, -1))


def refitted(w: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Refit: the steps that suit these codes best, by the outputs.

    What:   step = q H w / q H q for each row of codes q: least squares, in closed form.
    Why:    GPTQ chose codes for a step that was chosen without inputs; a better one costs no byte.
    Source: our own; toggle GPTQ_REFIT.
    Care:   fp16 rounds it again; a row without codes, or whose step would not be positive, keeps
            its own. Twice the same codes have the same step, so once is enough.

    w, codes (n, rows, columns), scale (n, rows, 1) fp16, hessian (n, columns, columns).
    """
    q = codes.double()
    through = q @ hessian.double()
    step = (through * w).sum(-1, keepdim=True) / (through * q).sum(-1, keepdim=True)
    step = step.half()
    fine = (step > 0) & step.isfinite()
    return torch.where(fine, step, scale)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (rows, rank) and right (rank, columns) whose product is nearest to the matrix.

    The signs of an SVD are free, and codes depend on them: here the largest entry of each row of
    `right` is positive.
    """
    u, size, v = torch.linalg.svd(matrix, full_matrices=False)
    left = u[:, :rank] * size[:rank]
    right = v[:rank]
    largest = right.abs().argmax(1, keepdim=True)
    sign = right.gather(1, largest).sign()
    return left * sign.T, right * sign


def uneven_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes from -half to half - 1, and one fp16 step for each row of x: its largest
    magnitude is half a step inside of -half and half a step beyond half - 1."""
    half = 2 ** (bits - 1)
    largest = x.abs().amax(-1, keepdim=True)
    step = fp16_step(largest, half - 0.5, torch.finfo(torch.float16).tiny)
    codes = (x / step).round().clamp(-half, half - 1)
    return codes.to(torch.int8), step.half()


def svd_correction(cfg: Config, error: Tensor) -> dict[str, Tensor]:
    """The parts of a low-rank correction of the error, as #1797 packs the factors of its SVD.

    left (rows, rank): 2 bits and one step for all, or LQER_FACTOR_BITS and one for each row.
    right (rank, columns): 4 bits and one step for LQER_ASYM_GROUP values that follow each other,
    or LQER_FACTOR_BITS and one for each row.
    """
    left, right = truncated_svd(error, cfg.lqer_rank)
    if cfg.lqer_asym_enabled and right.numel() % cfg.lqer_asym_group == 0:
        left_codes, left_scale = uneven_codes(left.reshape(1, -1), 2)
        right_codes, right_scale = uneven_codes(right.reshape(-1, cfg.lqer_asym_group), 4)
    else:
        grid = Grid(cfg.lqer_factor_bits)
        left_codes, left_scale = grid.quantise(left)
        right_codes, right_scale = grid.quantise(right)
    return {
        "left": left_codes.view_as(left),
        "left_scale": left_scale,
        "right": right_codes.view_as(right),
        "right_scale": right_scale,
    }


REFITS = 3


def refit_correction(cfg: Config, error: Tensor, hessian: Tensor | None) -> dict[str, Tensor]:
    """The same parts, in LQER_FACTOR_BITS with one step for each triple, and fitted to the codes.

    hessian (columns, columns): of the layer's inputs, damped as for GPTQ: which errors count. None:
    all alike. Raises Indefinite.
    In turns each factor becomes the least-squares solution beside the codes of the other.
    """
    root = torch.eye(error.shape[1], device=error.device)
    if hessian is not None:
        root = cholesky(damped(hessian, cfg.gptq_damp)).to(error.dtype)
        # of an input that is always 0 no error counts
        error = error.masked_fill(hessian.diagonal() == 0, 0.0)
    grid = Grid(cfg.lqer_factor_bits)
    _, right = truncated_svd(error @ root, cfg.lqer_rank)
    right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    # whatever the size of the Hessian: fp16 has to hold the steps
    right = F.normalize(right, dim=1)
    for _ in range(REFITS):
        seen = grid.fake_quantise(right) @ root
        left = error @ root @ torch.linalg.pinv(seen)
        left_codes, left_scale = grid.quantise(left.T)
        right = torch.linalg.pinv(grid.dequantise(left_codes, left_scale).T) @ error
    right_codes, right_scale = grid.quantise(right)
    return {
        "left": left_codes.T.contiguous(),
        "left_scale": left_scale.T.contiguous(),
        "right": right_codes,
        "right_scale": right_scale,
    }


def correction(parts: dict[str, Tensor]) -> Tensor:
    """left @ right, (rows, columns) fp32, of the parts that either has made.

    Term by term: a matrix product has other last bits on other machines.
    """
    left = parts["left"].float() * parts["left_scale"].float()
    steps = parts["right_scale"].float()
    right = (parts["right"].float().view(len(steps), -1) * steps).view(parts["right"].shape)
    total = torch.zeros(len(left), right.shape[1], device=left.device)
    for column, row in zip(left.T, right, strict=True):
        total += column[:, None] * row
    return total


# ── 5 Model ───────────────────────────────────────────────────────────────────────────────────────
# In: token ids (batch, time). Out: nats per target.
# Promise: one forward path for training and scoring, and a causal one. A technique that is off is
# absent: no parameters, no arithmetic. What bears @technique is one class or function, and wired
# by one `if`: in GPT, Block, Attention, MLP, head_gate or rotary_tables.


class Role(NamedTuple):
    """A parameter's policy, given where it is created: its optimiser, and its bits at export."""

    optimiser: str  # "muon", or one of ADAMW_GROUPS
    bits: str | None = None  # the knob with its bits; None: a float of CONTROL_DTYPE
    gate: bool = False  # with GATED_ATTN_QUANT_GATE, codes of GATE_GRID


class AdamwKnobs(NamedTuple):
    """The knobs of a group of AdamW."""

    lr: str
    beta2: str = "beta2"  # at 0: BETA2
    wd: str = "adam_wd"  # below 0: ADAM_WD


ADAMW_GROUPS = {
    "embed": AdamwKnobs("tied_embed_lr", wd="embed_wd"),
    "scalar": AdamwKnobs("scalar_lr"),
}

CONTROL = Role("scalar")
HEAD_GATE_ROLE = Role("scalar", gate=True)
GATE_GRID = Grid(8, "amax")
ATTN_ROLE = Role("muon", "quant_bits_attn")
MLP_ROLE = Role("muon", "quant_bits_mlp")
EMBED_ROLE = Role("embed", "quant_bits_embed")


def parameter(tensor: Tensor, role: Role) -> nn.Parameter:
    """A parameter that carries its policy.

    Care: copy.deepcopy would drop the policy; never deepcopy the model.
    """
    p = nn.Parameter(tensor)
    p.role = role
    return p


# The initial matrices; "default" is that of nn.Linear
INITS = {
    "default": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "ortho": nn.init.orthogonal_,
}


class Linear(nn.Module):
    """y = x W^T in the dtype of x; optimiser, views and exporter see the fp32 weight."""

    def __init__(self, columns: int, rows: int, role: Role, init: Callable = nn.init.zeros_):
        super().__init__()
        self.weight = parameter(init(torch.empty(rows, columns)), role)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def table_projection(columns: int, rows: int, role: Role, init: Callable) -> nn.Module:
    """From the width of a second token table to the width where its rows are added.

    None where the two are equal (#989, #975): the table can learn all that it would do.
    """
    return nn.Identity() if columns == rows else Linear(columns, rows, role, init)


def rms_norm(x: Tensor) -> Tensor:
    """x / root mean square of its last dimension; no weights."""
    return F.rms_norm(x, (x.shape[-1],))


# Knobs of the techniques below, in order of appearance: the report measures the model without
# each of them that is on
MODEL_TOGGLES: list[str] = []


def technique(knob_name: str) -> Callable:
    """Marks a class or function as what this knob switches on."""

    def mark(part: Callable) -> Callable:
        MODEL_TOGGLES.append(knob_name)
        return part

    return mark


# Techniques before the first block: (x, ids) -> x


def input_norm(x: Tensor, ids: Tensor) -> Tensor:
    """The norm of the embedding, for a place in GPT.entry."""
    return rms_norm(x)


@technique("SMEAR_MASK_BOS")
def no_token_before(z: Tensor, ids: Tensor) -> Tensor:
    """Mask of the gates below: the first token of a document takes nothing of the one before.

    What:   z (batch, time, n), what is taken of the token before: zeros where ids are BOS.
    Why:    what stands before a document says nothing about it.
    Source: pull request #1851; toggle SMEAR_MASK_BOS.
    Care:   SmearGate still scales the embedding there, by 1 - g.
    """
    return z * (ids != BOS)[..., None]


@technique("SMEAR_GATE")
class SmearGate(nn.Module):
    """SmearGate: blend each position with the one before.

    What:   (1 - g) x_t + g x_{t-1}, with g = sigmoid(gate) per dimension; zeros before a row.
    Why:    the previous token is known before the first attention, which need not fetch it.
    Source: pull request #194 (after the norm: #989); toggle SMEAR_GATE.
    Care:   in a row of several documents the first token of each sees the last of the one
            before; SMEAR_MASK_BOS (#1851) puts zeros there. g starts at one half, not at zero.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.gate = parameter(torch.zeros(cfg.model_dim), Role("smear"))
        self.mask_bos = cfg.smear_mask_bos

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        previous = F.pad(x, (0, 0, 1, -1))
        if self.mask_bos:
            previous = no_token_before(previous, ids)
        return torch.lerp(x, previous, torch.sigmoid(self.gate).to(x.dtype))


ADAMW_GROUPS["smear"] = AdamwKnobs("scalar_lr", beta2="smear_beta2")


@technique("SMEAR_GATE_ENABLED")
class GatedSmear(nn.Module):
    """Gated SmearGate: add the token before, as much as the token at hand asks for.

    What:   x_t + strength * sigmoid(weight . first GATE_WINDOW dimensions of x_t) * x_{t-1}, on
            the embeddings before their norm; nothing at the start of a row.
    Why:    as SmearGate, and a token that needs no context takes none.
    Source: pull request #1667, masked: #1851; toggle SMEAR_GATE_ENABLED, mask SMEAR_MASK_BOS.
    Care:   #1667 calls it SMEAR_GATE. It starts as the identity: weight gets its first gradient
            once strength has left 0.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.weight = parameter(torch.zeros(1, cfg.gate_window), CONTROL)
        self.strength = parameter(torch.zeros(1), CONTROL)
        self.mask_bos = cfg.smear_mask_bos

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        window = self.weight.shape[1]
        gate = torch.sigmoid(F.linear(x[..., :window], self.weight.to(x.dtype)))
        gate = self.strength.to(x.dtype) * gate
        if self.mask_bos:
            gate = no_token_before(gate, ids)
        return x + gate * F.pad(x, (0, 0, 1, -1))


@technique("BIGRAM_VOCAB_SIZE")
class BigramHash(nn.Module):
    """BigramHash: an embedding of the pair (previous token, token).

    What:   x_t + scale * proj(embed[bucket]), with the bucket
            (36313 id_t XOR 27191 id_{t-1}) mod (buckets - 1).
    Why:    what depends on two neighbouring tokens alone is looked up, not computed.
    Source: pull request #989; toggle BIGRAM_VOCAB_SIZE.
    Care:   the last bucket is for row starts, and no pair may fall there. The table starts at
            zero, so that the first forward pass is that of the model without it.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        table = torch.zeros(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.embed = parameter(table, Role("embed", "quant_bits_bigram"))
        optimiser = "muon" if cfg.bigram_proj_opt == "muon" else "scalar"
        role = Role(optimiser, "quant_bits_bigram")

        def init(weight: Tensor) -> Tensor:
            return INITS[cfg.init](weight) * cfg.bigram_proj_gain

        self.proj = table_projection(cfg.bigram_dim, cfg.model_dim, role, init)
        self.scale = parameter(torch.tensor(0.05), CONTROL)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        row_start = len(self.embed) - 1
        # (batch, time - 1), then a bucket for each position
        bucket = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % row_start
        bucket = F.pad(bucket, (1, 0), value=row_start)
        pairs = F.embedding(bucket, self.embed).to(x.dtype)
        return x + self.scale.to(x.dtype) * self.proj(pairs)


# Techniques inside the blocks: on values, on what attention gathered, on norms, on positions


@technique("VE_ENABLED")
class ValueEmbedding(nn.Module):
    """ValueEmbedding: a second token table whose rows are added to V.

    What:   V of block b += block_scale_b * scale * proj(embed[id]).
    Why:    late blocks attend to the token itself, which the stream may have overwritten.
    Source: pull requests #549 and #975; toggle VE_ENABLED, blocks VE_LAYERS.
    Care:   one table and one projection for all its blocks: computed once, scaled per block.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.blocks = [int(number) for number in cfg.ve_layers.split(",")]
        kv_dim = cfg.model_dim // cfg.num_heads * cfg.num_kv_heads
        self.embed = parameter(0.01 * torch.randn(cfg.vocab_size, cfg.ve_dim), EMBED_ROLE)
        role = Role("scalar", "quant_bits_bigram")
        self.proj = table_projection(cfg.ve_dim, kv_dim, role, INITS["ortho"])
        self.scale = parameter(torch.tensor(0.1), CONTROL)
        self.block_scales = parameter(torch.ones(len(self.blocks)), CONTROL)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """Ids (batch, time) -> {block: (batch, time, kv_dim)}."""
        base = self.scale.to(dtype) * self.proj(F.embedding(ids, self.embed).to(dtype))
        scales = self.block_scales.to(dtype).unbind()
        return {block: scale * base for block, scale in zip(self.blocks, scales, strict=True)}


@technique("XSA_LAST_N")
def exclude_self(y: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """XSA, exclusive self-attention: take a position's own value out of what it has gathered.

    What:   y - (y . u) u, with u the unit vector of the own value; per head.
    Why:    the stream has the own token already; attention is left for the others.
    Source: pull request #265; toggle XSA_LAST_N.
    Care:   a query head uses the value of its own group: head h that of h // group size.

    y (batch, time, heads, head_dim), v (batch, time, kv heads, head_dim), x the input of the
    attention, which this one does not read -> as y.
    """
    # (batch, time, kv heads, heads of a group, head_dim)
    grouped = y.unflatten(2, (v.shape[2], -1))
    own = F.normalize(v, dim=-1)[:, :, :, None]
    along = (grouped * own).sum(-1, keepdim=True)
    return (grouped - along * own).flatten(2, 3)


class HeadGate(nn.Module):
    """Scales what each head has gathered by gain * sigmoid(scale * weight . input).

    weight (heads, dims): of the attention's input, normed, it reads the first `dims`.
    y (batch, time, heads, head_dim), x (batch, time, model_dim) -> as y.
    """

    def __init__(self, weight: Tensor, scale: float = 1.0, gain: float = 1.0):
        super().__init__()
        self.weight = parameter(weight, HEAD_GATE_ROLE)
        self.scale = scale
        self.gain = gain

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        window = self.weight.shape[1]
        asked = F.linear(x[..., :window], self.weight.to(x.dtype))
        return y * (self.gain * torch.sigmoid(self.scale * asked))[..., None]


@technique("SPARSE_ATTN_GATE_ENABLED")
def sparse_gate(cfg: Config) -> HeadGate:
    """Sparse attention gate: heads that can be silent, at 12 weights each.

    What:   head h times sigmoid(SPARSE_ATTN_GATE_SCALE * w_h . first GATE_WINDOW dims of x).
    Why:    softmax weights sum to one: without a gate a head must gather something.
    Source: pull request #1787; toggle SPARSE_ATTN_GATE_ENABLED.
    Care:   weights of 0 are gates of one half, which the output projection makes up for.
    """
    spread = cfg.sparse_attn_gate_init_std
    weight = torch.zeros(cfg.num_heads, cfg.gate_window)
    return HeadGate(weight.normal_(std=spread) if spread else weight, cfg.sparse_attn_gate_scale)


@technique("GATED_ATTN_ENABLED")
def dense_gate(cfg: Config) -> HeadGate:
    """Dense attention gate: as the sparse one, but from all dimensions.

    What:   head h times sigmoid(w_h . x).
    Why:    see the sparse gate; no dimensions have to be kept for it.
    Source: pull request #1736; toggle GATED_ATTN_ENABLED.
    Care:   MODEL_DIM weights a head; the sparse gate scores alike with GATE_WINDOW of them.
    """
    weight = torch.empty(cfg.num_heads, cfg.model_dim)
    return HeadGate(weight.normal_(std=cfg.gated_attn_init_std))


@technique("ATTN_OUT_GATE_ENABLED")
def output_gate(cfg: Config) -> HeadGate:
    """Attention output gate: as the sparse one, but it can also amplify a head.

    What:   head h times 2 sigmoid(w_h . first GATE_WINDOW dims of x).
    Why:    see the sparse gate; the model starts as that without it.
    Source: pull request #1667; toggle ATTN_OUT_GATE_ENABLED.
    Care:   it reads the attention's input; #1667 could also read the queries.
    """
    return HeadGate(torch.zeros(cfg.num_heads, cfg.gate_window), gain=2.0)


def head_gate(cfg: Config) -> Callable | None:
    """The gate that is on, as what makes one; None: none."""
    if cfg.sparse_attn_gate_enabled:
        return sparse_gate
    if cfg.gated_attn_enabled:
        return dense_gate
    return output_gate if cfg.attn_out_gate_enabled else None


@technique("LN_SCALE")
class DepthScaledNorm(nn.Module):
    """LN scale: smaller inputs for deeper blocks.

    What:   RMSNorm(x) / sqrt(block + 1), the first block being 0.
    Why:    deep blocks add less to the stream, and so disturb less of what is there.
    Source: pull request #315; toggle LN_SCALE.
    Care:   both norms of a block, and not the last norm before the head.
    """

    def __init__(self, layer: int):
        super().__init__()
        self.scale = 1 / math.sqrt(layer + 1)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x) * self.scale


@technique("ROPE_NTK_LEN")
def stretched_base(cfg: Config, dims: int) -> float:
    """NTK: a larger rotary base for rows longer than ROPE_NTK_LEN.

    What:   base * (TRAIN_SEQ_LEN / ROPE_NTK_LEN) ** (dims / (dims - 2)), if that is larger.
    Why:    the slowest pair turns as far over a training row as over ROPE_NTK_LEN before.
    Source: pull request #975; toggle ROPE_NTK_LEN.
    Care:   it grows with the TRAINING row, for rows of every length. #975 took the length of
            the row at hand, so that short scoring windows met another model than was trained.
    """
    stretch = max(cfg.train_seq_len / cfg.rope_ntk_len, 1.0) ** (dims / (dims - 2))
    return cfg.rope_base * stretch


def rotary_tables(cfg: Config, dtype: torch.dtype, longest: int = 0) -> tuple[Tensor, Tensor]:
    """Partial RoPE: cos and sin of every angle, each (longest row, 1, dims), for apply_rotary.

    What:   angle = position * base ** (-2 k / dims) for pair k of the ROPE_DIMS first dimensions
            of a head; the others are not rotated.
    Why:    what is not rotated is compared alike at every distance.
    Source: #315; toggle ROPE_DIMS, 0: all dimensions.
    Care:   `dims` counts the rotated dimensions, in the exponent too, not those of the head.
    """
    dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
    base = cfg.rope_base
    if cfg.rope_ntk_len:
        base = stretched_base(cfg, dims)
    frequency = base ** (-torch.arange(0, dims, 2) / dims)
    position = torch.arange(max(cfg.train_seq_len, cfg.window, longest))
    angle = torch.outer(position, frequency)[:, None]
    # of the first and of the second of each pair
    angle = torch.cat((angle, -angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first `dims` dimensions of each head.

    Pair k is dimensions (k, k + dims / 2): in halves, not interleaved. cos, sin: rotary_tables.
    x (batch, time, heads, head_dim) -> the same shape.
    """
    dims = cos.shape[-1]
    if dims < x.shape[-1]:
        rotated, rest = x.split((dims, x.shape[-1] - dims), dim=-1)
        return torch.cat((apply_rotary(rotated, cos, sin), rest), dim=-1)
    length = x.shape[1]
    first, second = x.chunk(2, dim=-1)
    return x * cos[:length] + torch.cat((second, first), dim=-1) * sin[:length]


class Documents(NamedTuple):
    """The pieces of each row, of one document each, that attention keeps apart."""

    first: Tensor  # (batch, time): the first token of the row that this one attends to
    longest: int  # the most tokens that a piece can have
    count: int = 0  # documents of a batch; 0: not counted


@technique("DOC_MASK")
def document_pieces(ids: Tensor, longest: int, count: int = 0) -> Documents:
    """Document masks: attention stays inside a document.

    What:   a token attends to those before it back to its document's BOS, or to the row's start;
            a document is cut after every `longest` tokens, counted from there. 0: only at the rows.
    Why:    what stands before a document says nothing about it, and kernels need not look there.
    Source: #1530; toggles DOC_MASK, DOC_MAX_LEN.
    Care:   made of the ids alone, so that training, scoring and test-time training cannot differ.
            Positions are those of the row. In sliding windows a document of at most
            window - EVAL_STRIDE + 1 tokens is scored as DOC_ISOLATED_EVAL scores it, a longer one
            in other windows, as they lie elsewhere in it. SmearGate and BigramHash still see
            the token before a BOS.

    ids (batch, time). No host sync; the shapes depend on those of the ids alone.
    """
    time = ids.shape[1]
    index = torch.arange(time, device=ids.device)
    first = torch.where(ids == BOS, index, 0).cummax(1).values
    if not 0 < longest < time:
        return Documents(first, time, count)
    return Documents(index - (index - first) % longest, longest, count)


@dataclass(frozen=True)
class Attend:
    """Causal attention: (q, k, v, documents) -> y.

    q, y (batch, time, heads, head_dim); k and v may have fewer heads. documents: what `prepare`,
    called once for all blocks, has made of Documents for this kernel; None: a token attends to all
    before it in its row.
    """

    kernel: Callable[..., Tensor]
    prepare: Callable[[Documents, torch.dtype], Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Any = None) -> Tensor:
        return self.kernel(q, k, v, documents)


def block_mask(documents: Documents, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a token attends, -inf elsewhere.

    (batch, 1, time, time). Of rows that are long beside the pieces only the band that may hold a 0:
    (batch * chunks, 1, chunk, 2 * chunk), the keys being those of in_chunks. What fills up the last
    chunk attends to itself alone, as nothing at all would be NaN.
    """
    first, longest, _ = documents
    rows, time = first.shape
    chunk = reach = time
    chunks = -(-time // longest)
    if chunks * longest * 2 * longest < time * time:
        chunk, reach = longest, 2 * longest
    index = torch.arange(-(-time // chunk) * chunk, device=first.device)
    first = torch.cat((first, index[time:].expand(rows, -1)), dim=1)
    # (chunks, chunk, 1) and (chunks, 1, reach)
    query = index.view(-1, chunk, 1)
    key = query[:, -1:] + torch.arange(1 - reach, 1, device=first.device)
    seen = (key <= query) & (key >= first.unflatten(1, (-1, chunk))[..., None])
    mask = torch.zeros((), dtype=dtype, device=first.device).where(seen, -math.inf)
    return mask.flatten(0, 1)[:, None]


def in_chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Rows as chunks: q (batch * chunks, chunk, ...), k and v with the chunk before each.

    Zeros fill up the last chunk.
    """

    def cut(z: Tensor) -> Tensor:
        z = F.pad(z, (0, 0, 0, 0, 0, -z.shape[1] % chunk))
        return z.unflatten(1, (-1, chunk))

    def with_the_one_before(z: Tensor) -> Tensor:
        z = cut(z)
        before = F.pad(z, (0, 0, 0, 0, 0, 0, 1, -1))
        return torch.cat((before, z), dim=2).flatten(0, 1)

    return cut(q).flatten(0, 1), with_the_one_before(k), with_the_one_before(v)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: SDPBackend | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention with this backend; None: with torch's own choice."""
    rows, time, *heads = q.shape
    if mask is not None and mask.shape[2] < time:
        q, k, v = in_chunks(q, k, v, mask.shape[2])
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    causal = mask is None
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(rows, -1, *heads)[:, :time]


sdpa = Attend(torch_attention, block_mask)


class Packed(NamedTuple):
    """Pieces as FlashAttention wants them: all rows as one, and where each piece begins in it."""

    bounds: Tensor  # (slots + 1,) int32, "cu_seqlens"; what is over holds the number of tokens
    longest: int
    overflow: Tensor  # () bool: there are more pieces than slots


# Slots for pieces in a batch: so many, or one for every so many tokens. (Text of FineWeb has one
# document in a thousand tokens, 77 in 65,536 at most.) An empty slot costs a kernel time.
LEAST_SLOTS = 256
TOKENS_OF_A_SLOT = 128


def pack(documents: Documents, dtype: torch.dtype) -> Packed:
    """The bounds of all pieces of a batch."""
    first, longest, count = documents
    rows, time = first.shape
    tokens = first.numel()
    slots = max(LEAST_SLOTS, tokens // TOKENS_OF_A_SLOT, count) + rows + tokens // longest
    index = torch.arange(time, device=first.device)
    # how many pieces have begun; the first token where that is j is the start of piece j
    begun = (first == index).flatten().cumsum(0)
    piece = torch.arange(1, min(slots, tokens) + 2, device=first.device)
    bounds = torch.searchsorted(begun, piece).int()
    return Packed(bounds, longest, bounds[-1] < tokens)


def with_slots(remedy: str, prepare: Callable | None) -> str:
    """A remedy for nats that are not finite, and that of a kernel that has slots."""
    if prepare is not pack:
        return remedy
    return f"{remedy}, or take ATTN_BACKEND=sdpa: a batch may have more documents than slots"


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, plain: Callable, varlen: Callable
) -> Tensor:
    """FlashAttention by its two functions: for rows, and for the pieces of all rows.

    Care: NaN where there are more pieces than slots, never attention between documents.
    """
    if packed is None:
        y = plain(q, k, v)
    else:
        bounds, longest, overflow = packed
        heads = (z.flatten(0, 1) for z in (q, k, v))
        y = varlen(*heads, bounds, bounds, longest, longest)
    # some versions return the log-sum-exp as well
    y = y[0] if isinstance(y, tuple) else y
    if packed is not None:
        # kernels leave what is behind the last slot as it was
        y = y.masked_fill(overflow, math.nan)
    return y.view(q.shape)


def torch_varlen() -> Callable:
    """torch's causal varlen_attn (from 2.10 on), which no two releases spell alike."""
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        return partial(varlen_attn, **causal, enable_gqa=True)

    def with_as_many_keys(q: Tensor, k: Tensor, v: Tensor, *bounds) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        return varlen_attn(q, k, v, *bounds, **causal)

    return with_as_many_keys


def flex_attention() -> Attend:
    """torch's flex_attention: it has no slots, and skips the blocks of 128 x 128 that are masked.

    Care: not compiled, it makes all scores, (time, time). So on a GPU it is compiled by itself
    where the model runs eagerly: in test-time training and on the probe. No gradients on a CPU.
    Not among those that auto tries: on an H200 (torch 2.11) it trained faster than the others, and
    scoring 32 rows of 2,048 with it ended in an illegal memory access. The cause is not known
    (pytorch#172225 has such accesses with several rows).
    """
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    alone = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    size = 128

    def prepare(documents: Documents, dtype: torch.dtype) -> Any:
        first = documents.first
        time = first.shape[1]

        def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= first[row, query])

        # `first` never falls: a block of queries needs the blocks from its first token's on
        block = torch.arange(-(-time // size), device=first.device)
        low = first[:, None, ::size] // size  # (batch, 1, blocks)
        number = block - low + 1
        blocks = (low[..., None] + block) % len(block)
        return flex.BlockMask.from_kv_blocks(
            number.int(), blocks.int(), BLOCK_SIZE=size, mask_mod=attends, seq_lengths=(time, time)
        )

    def kernel(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
        if blocks is None:
            whole_rows = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
            blocks = prepare(Documents(whole_rows, q.shape[1]), q.dtype)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        eager = q.is_cuda and not torch.compiler.is_compiling()
        attend = alone if eager else flex.flex_attention
        y = attend(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)

    return Attend(kernel, prepare)


# By the names of ATTN_BACKEND: what torch contains, and what packages add to it (module, remedy
# where it is missing)
KERNELS = {"sdpa": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PACKAGES = {
    "fa3": (
        "flash_attn_interface",
        "build the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
    "fa2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
}
# Kernels are as fast as the fastest up to this ratio: of them auto takes the first, so that noise
# of the timing seldom gives two runs different kernels
AS_FAST = 1.03
# Calls that are timed together: their work on the GPU hides what it takes to launch them
ATTENTION_CALLS = 5
# They are timed on documents of this length, about the mean of FineWeb
TOKENS_OF_A_DOCUMENT = 1000


def attention_function(name: str) -> Attend:
    """The kernel of this name; ImportError, or RuntimeError when called, where it fails."""
    if name == "flex":
        return flex_attention()
    if name in PACKAGES:
        package = importlib.import_module(PACKAGES[name][0])
        plain = partial(package.flash_attn_func, causal=True)
        varlen = partial(package.flash_attn_varlen_func, causal=True)
        return Attend(partial(flash_attention, plain=plain, varlen=varlen), pack)
    if name == "flash":
        plain = partial(torch_attention, mask=None, backend=KERNELS[name])
        return Attend(partial(flash_attention, plain=plain, varlen=torch_varlen()), pack)
    return Attend(partial(torch_attention, backend=KERNELS[name]), block_mask)


def attention_candidates(cfg: Config, run: Run) -> list[str]:
    """The kernels to try: the one that was asked for; auto: all of them on a GPU, but flex."""
    if cfg.attn_backend != "auto":
        return [cfg.attn_backend]
    if not run.cuda:
        return ["sdpa"]
    return [*KERNELS, *PACKAGES]


def attention_inputs(cfg: Config, run: Run, rows: int, length: int) -> tuple:
    """Random q, k, v of the model's shape; with DOC_MASK the Documents of such a batch, or None."""
    make = partial(torch.randn, device=run.device, dtype=run.dtype, requires_grad=True)
    head_dim = cfg.model_dim // cfg.num_heads
    q = make(rows, length, cfg.num_heads, head_dim)
    k = make(rows, length, cfg.num_kv_heads, head_dim)
    v = make(rows, length, cfg.num_kv_heads, head_dim)
    documents = None
    if cfg.doc_mask:
        ids = torch.arange(rows * length, device=run.device) % TOKENS_OF_A_DOCUMENT + BOS
        documents = document_pieces(ids.view(rows, length), cfg.longest_piece(cfg.train_seq_len))
    return q, k, v, documents


def attention_milliseconds(run: Run, attend: Attend, inputs: tuple) -> float:
    """Time of one call, forward and backward, compiled where the run will compile it."""
    q, k, v, documents = inputs
    if documents is not None:
        documents = attend.prepare(documents, run.dtype)
    if run.cuda:
        attend = run.compiled(attend)

    def both_ways() -> None:
        for _ in range(ATTENTION_CALLS):
            attend(q, k, v, documents).sum().backward()

    both_ways()  # whatever a first call sets up is no part of the others
    # the fastest: others only slow it down
    return min(run.milliseconds(both_ways) for _ in range(3)) / ATTENTION_CALLS


def choose_attention(cfg: Config, run: Run) -> Attend:
    """The attention of ATTN_BACKEND; auto on a GPU: see AS_FAST.

    run.attention is its name. Refusal, with the remedy, where the one that was asked for does not
    work.
    """
    names = attention_candidates(cfg, run)
    # Several are timed at the shape of a micro-batch, or of what is scored; a single one is tried
    rows, length = 1, 16
    if len(names) > 1 and cfg.eval_only:
        rows, length = cfg.eval_batch_seqs, cfg.window
    elif len(names) > 1:
        _, _, rows, length = step_shape(cfg, run, cfg.train_seq_len)
    inputs = attention_inputs(cfg, run, rows, length)

    found: dict[str, Attend] = {}
    cost: dict[str, float] = {}
    for name in names:
        try:
            attend = attention_function(name)
            cost[name] = attention_milliseconds(run, attend, inputs)
            found[name] = attend
        except (ImportError, RuntimeError) as error:
            _, remedy = PACKAGES.get(name, ("", "choose auto"))
            problem = f"ATTN_BACKEND={name}: fails ({error!r:.150}); {remedy}"
            refuse(len(names) == 1, problem)
            run.log(problem)

    fast = [name for name, ms in cost.items() if ms <= AS_FAST * min(cost.values())]
    run.attention = run.broadcast(fast[0])
    timed = ", ".join(f"{name} {ms:.2f}" for name, ms in cost.items())
    run.log(
        f"attention: {run.attention} (ATTN_BACKEND={cfg.attn_backend}; "
        f"ms for {rows} rows of {length}: {timed})"
    )
    return found[run.attention]


class Adapter(NamedTuple):
    """A low-rank addition to a projection, another one for each row of the batch.

    In the arguments of GPT.forward `visits` come first; a block gets those of its visit.
    """

    a: Tensor  # (batch, rank, columns)
    b: Tensor  # (batch, rows, rank)


def adapted(y: Tensor, x: Tensor, adapter: Adapter | None) -> Tensor:
    """y (batch, time, rows) with what its adapter makes of x (batch, time, columns); None: y."""
    if adapter is None:
        return y
    return y + x @ adapter.a.mT.to(x.dtype) @ adapter.b.mT.to(x.dtype)


class Context(NamedTuple):
    """What every block reads beside the stream."""

    x0: Tensor  # (batch, time, model_dim): what entered the first block
    cos: Tensor  # of the rotary angles, (longest row, 1, dims)
    sin: Tensor
    value_bias: dict[int, Tensor]  # block -> (batch, time, kv_dim), added to its V
    adapters: dict[str, Adapter]  # of this visit: of q, k, v, o and mlp those that there are
    documents: Any = None  # what the attention kernel reads of them; None: no masks


class Attention(nn.Module):
    """Causal grouped-query attention.

    Queries and keys are RMS-normed per head and rotated; queries have a learned gain per head.
    x (batch, time, model_dim) -> the same shape.
    """

    def __init__(self, cfg: Config, layer: int, attend: Attend):
        super().__init__()
        dim = cfg.model_dim
        init = INITS[cfg.init]
        self.head_dim = dim // cfg.num_heads
        kv_dim = self.head_dim * cfg.num_kv_heads
        self.c_q = Linear(dim, dim, ATTN_ROLE, init)
        self.c_k = Linear(dim, kv_dim, ATTN_ROLE, init)
        self.c_v = Linear(dim, kv_dim, ATTN_ROLE, init)
        self.proj = Linear(dim, dim, ATTN_ROLE)
        self.q_gain = parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init), CONTROL)
        self.layer = layer
        self.attend = attend

        # What is done to what attention has gathered: (y, v, x) -> y
        self.finish = []
        if layer >= cfg.num_layers - cfg.xsa_last_n:
            self.finish.append(exclude_self)

    def add_gate(self, gate: HeadGate) -> None:
        """The last of `finish`."""
        self.gate = gate
        self.finish.append(gate)

    def forward(self, x: Tensor, seen: Context) -> Tensor:
        adapters = seen.adapters
        v = adapted(self.c_v(x), x, adapters.get("v"))
        if self.layer in seen.value_bias:
            v = v + seen.value_bias[self.layer]

        # (batch, time, heads, head_dim): the layout of FlashAttention
        q = adapted(self.c_q(x), x, adapters.get("q")).unflatten(2, (-1, self.head_dim))
        k = adapted(self.c_k(x), x, adapters.get("k")).unflatten(2, (-1, self.head_dim))
        v = v.unflatten(2, (-1, self.head_dim))

        q = apply_rotary(rms_norm(q), seen.cos, seen.sin) * self.q_gain.to(x.dtype)[:, None]
        k = apply_rotary(rms_norm(k), seen.cos, seen.sin)
        y = self.attend(q, k, v, seen.documents)
        for part in self.finish:
            y = part(y, v, x)
        # the adapter beside an output projection reads what enters its part, as in #1530
        return adapted(self.proj(y.flatten(2)), x, adapters.get("o"))


@technique("NEGATIVE_SLOPE")
def leaky_relu2(z: Tensor, slope: float) -> Tensor:
    """LeakyReLU^2: as ReLU^2, but a part of what is negative stays.

    What:   (max(z, 0) + slope * min(z, 0)) squared.
    Why:    a unit that is negative still has a gradient.
    Source: #493 with slope 0.5, #1948 with 0.3; toggle NEGATIVE_SLOPE, 0: ReLU^2.
    Care:   the square drops the sign: it falls below 0 and rises above, so it is not monotone.
    """
    return F.leaky_relu(z, slope).square()


def relu2(z: Tensor) -> Tensor:
    """max(z, 0) squared."""
    return F.relu(z).square()


class MLP(nn.Module):
    """Two matrices with an activation between them. x (batch, time, model_dim) -> the same."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc = Linear(cfg.model_dim, hidden, MLP_ROLE, INITS[cfg.init])
        self.activation = relu2
        if cfg.negative_slope:
            self.activation = partial(leaky_relu2, slope=cfg.negative_slope)
        self.proj = Linear(hidden, cfg.model_dim, MLP_ROLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))


class Block(nn.Module):
    """Mix the input embedding back in, then attention and MLP.

    Each of the two reads the normed stream and adds to it through a gain per dimension.
    x (batch, time, model_dim) -> the same shape.
    """

    def __init__(self, cfg: Config, layer: int, attend: Attend):
        super().__init__()
        self.norm = rms_norm
        if cfg.ln_scale:
            self.norm = DepthScaledNorm(layer)

        self.layer = layer
        self.parallel = 0 <= cfg.parallel_residual_start <= layer
        self.attn = Attention(cfg, layer, attend)
        self.mlp = MLP(cfg)
        ones = torch.ones(cfg.model_dim)
        zeros = torch.zeros(cfg.model_dim)
        self.resid_mix = parameter(torch.stack((ones, zeros)), CONTROL)
        self.attn_scale = parameter(ones, CONTROL)
        self.mlp_scale = parameter(ones.clone(), CONTROL)

    def forward(self, x: Tensor, seen: Context) -> Tensor:
        x = self.mixed(x, seen)
        if self.parallel:
            return parallel_residual(self, x, seen)
        x = x + self.attention_update(x, seen)
        return x + self.mlp_update(x, seen)

    def mixed(self, x: Tensor, seen: Context) -> Tensor:
        """The stream with the input embedding mixed in."""
        current, origin = self.resid_mix.to(x.dtype).unbind()
        return current * x + origin * seen.x0

    def attention_update(self, x: Tensor, seen: Context) -> Tensor:
        """What attention adds to the stream."""
        return self.attn_scale.to(x.dtype) * self.attn(self.norm(x), seen)

    def mlp_update(self, x: Tensor, seen: Context) -> Tensor:
        """What the MLP adds to the stream."""
        normed = self.norm(x)
        update = adapted(self.mlp(normed), normed, seen.adapters.get("mlp"))
        return self.mlp_scale.to(x.dtype) * update


@technique("PARALLEL_RESIDUAL_START")
def parallel_residual(block: Block, x: Tensor, seen: Context) -> Tensor:
    """A parallel block: attention and MLP read the same stream, and both add to it.

    What:   x + attention(norm(x)) + MLP(norm(x)), in the blocks from this one on; x is the stream
            with the input embedding mixed in, and each of the two keeps its gain per dimension.
    Why:    neither waits for the other; #1420 had 68 steps more in the same time.
    Source: pull request #1412 (as in GPT-J); toggle PARALLEL_RESIDUAL_START.
    Care:   blocks with lanes (PARALLEL_START_LAYER) are parallel by themselves. #1529 calls the
            start of its lanes by this name: there BASE=pr1529.
    """
    return x + block.attention_update(x, seen) + block.mlp_update(x, seen)


# Techniques around the blocks: their order, what decoders take back, the streams, the logits


@technique("NUM_LOOPS")
def looped_visits(visits: list[int], first: int, last: int, loops: int) -> list[int]:
    """Depth recurrence: a run of blocks is passed several times.

    What:   blocks LOOP_START to LOOP_END so many times more, one pass after the other; the U-Net
            goes over all visits: its encoder is the first half of them.
    Why:    depth without weights: compute is cheaper than bytes.
    Source: pull requests #1204 and #1394; toggle NUM_LOOPS; when it begins: ENABLE_LOOPING_AT.
    Care:   a block has the same gates, scales and norms at each visit (#1204 had some for each),
            but row j of the skip weights belongs to decoder visit j, whatever block that is.
    """
    return visits[: last + 1] + loops * visits[first : last + 1] + visits[last + 1 :]


def add_skip(x: Tensor, skip: Tensor, visit: int) -> Tensor:
    """What an encoder kept, added to the stream."""
    return x + skip


@technique("SKIP_GATES_ENABLED")
class SkipGates(nn.Module):
    """Sigmoid skip gates: a decoder chooses between the stream and what an encoder kept.

    What:   g x + (1 - g) skip, with g = sigmoid(gate) per dimension and decoder visit.
    Why:    a sum lets the stream grow with each skip; a mean does not.
    Source: pull request #1089; toggle SKIP_GATES_ENABLED.
    Care:   g starts at one half; `skip` has its own gain per dimension already.
    """

    def __init__(self, visits: int, dim: int):
        super().__init__()
        self.gate = parameter(torch.zeros(visits, dim), CONTROL)

    def forward(self, x: Tensor, skip: Tensor, visit: int) -> Tensor:
        return torch.lerp(skip, x, torch.sigmoid(self.gate[visit]).to(x.dtype))


def one_lane(x: Tensor, visits: list[tuple[Block, Context]], take_back: Callable) -> Tensor:
    """The decoders: the stream (batch, time, model_dim) behind all of them.

    visits: each block with what it reads beside the stream.
    take_back: (stream, visit) -> the stream with what an encoder kept, if this visit has any.
    """
    for visit, (block, seen) in enumerate(visits):
        x = block(take_back(x, visit), seen)
    return x


@technique("PARALLEL_START_LAYER")
class Lanes(nn.Module):
    """Two lanes in place of one_lane: late attentions and MLPs have a stream each.

    What:   lanes a and b; A = what attention adds, reading a, M = what the MLP adds, reading b:
            a' = r_a a + p_Aa A + p_Ma M  and  b' = r_b b + p_Ab A + p_Mb M, a learned number each.
    Why:    neither waits for the other, and each writes where it is of use.
    Source: pull request #1529; toggle PARALLEL_START_LAYER, PARALLEL_FINAL_LANE.
    Care:   the input embedding is mixed into what attention reads, not into the lane. Skips enter
            lane a, as in all records from #1530 on; in #1529 that of the first visit with lanes
            enters both. All blocks have their numbers, but only those with lanes use them.
            #1204, #1285, #1334 and #1477 have other lanes under this name.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.start = cfg.parallel_start_layer
        self.final = cfg.parallel_final_lane
        # [block, writer: attention or MLP, lane], [block, lane]
        self.post = parameter(torch.ones(cfg.num_layers, 2, 2), CONTROL)
        self.residual = parameter(torch.full((cfg.num_layers, 2), 1.1), CONTROL)

    def forward(
        self, x: Tensor, visits: list[tuple[Block, Context]], take_back: Callable
    ) -> Tensor:
        """As one_lane. The stream is lane a; lane b is the MLPs' own, from `start` on."""
        b = None
        for visit, (block, seen) in enumerate(visits):
            if block.layer == self.start:
                b = x
            x = take_back(x, visit)
            if b is None:
                x = block(x, seen)
            else:
                x, b = self.updated(x, b, block, seen)
        if self.final == "mean":
            return (x + b) / 2
        return x if self.final == "attn" else b

    def updated(self, a: Tensor, b: Tensor, block: Block, seen: Context) -> tuple[Tensor, Tensor]:
        """The lanes behind one more block; each (batch, time, model_dim)."""
        residual = self.residual[block.layer].to(a.dtype)
        post = self.post[block.layer].to(a.dtype)
        attention = block.attention_update(block.mixed(a, seen), seen)
        mlp = block.mlp_update(b, seen)
        return (
            residual[0] * a + post[0, 0] * attention + post[1, 0] * mlp,
            residual[1] * b + post[0, 1] * attention + post[1, 1] * mlp,
        )


def softcap(z: Tensor, cap: float) -> Tensor:
    """Logits between -cap and cap."""
    return cap * torch.tanh(z / cap)


@technique("ASYM_LOGIT_RESCALE")
class TwoSoftcaps(nn.Module):
    """Asymmetric softcap: two caps that are learned, of logits above 0 and of those below.

    What:   c tanh(z / c), with c = LOGIT_SOFTCAP + positive where z > 0, + negative elsewhere.
    Why:    a likely token and an impossible one need not have the same distance from 0.
    Source: pull request #1923; toggle ASYM_LOGIT_RESCALE.
    Care:   both start at 0, have a gradient, and weight decay draws them back there. In #1945 the
            caps have none and are in no optimiser: there it changes nothing.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.middle = cfg.logit_softcap
        self.positive = parameter(torch.tensor(0.0), CONTROL)
        self.negative = parameter(torch.tensor(0.0), CONTROL)

    def forward(self, z: Tensor) -> Tensor:
        return softcap(z, self.middle + torch.where(z > 0, self.positive, self.negative))


def with_adapters(
    visits: list[tuple[Block, Context]], adapters: dict[str, Adapter]
) -> list[tuple[Block, Context]]:
    """The visits, each with its own adapters; that of the head belongs to none."""
    each = {name: [pair.a.unbind(), pair.b.unbind()] for name, pair in adapters.items()}
    del each["head"]
    found = []
    for visit, (block, seen) in enumerate(visits):
        own = {name: Adapter(a[visit], b[visit]) for name, (a, b) in each.items()}
        found.append((block, seen._replace(adapters=own)))
    return found


class GPT(nn.Module):
    """Blocks in a U-Net; embedding and head are one matrix.

    The first half of the visits are encoders: each keeps its output, and the decoders take these
    back, the last one first, with a gain per dimension. Parameters are fp32, activations `dtype`.
    longest: tokens of a row, where some are longer than TRAIN_SEQ_LEN and the window.
    """

    def __init__(
        self,
        cfg: Config,
        dtype: torch.dtype = torch.float32,
        attend: Attend = sdpa,
        longest: int = 0,
    ):
        super().__init__()
        self.dtype = dtype
        embedding = cfg.tied_embed_init_std * torch.randn(cfg.vocab_size, cfg.model_dim)
        self.tok_emb = parameter(embedding, EMBED_ROLE)
        self.blocks = nn.ModuleList(Block(cfg, i, attend) for i in range(cfg.num_layers))
        # Extra passes of the looped blocks at this moment
        self.loops = cfg.num_loops
        self.looped = cfg.loop_start, cfg.loop_end
        encoders, _ = self.order(cfg.num_loops)
        self.skip_weights = parameter(torch.ones(len(encoders), cfg.model_dim), CONTROL)

        # Techniques come last, so that a toggle leaves the other initial weights as they are
        self.entry = []
        self.add_entry(cfg)
        # What is added to V of some blocks: (ids, dtype) -> {block: (batch, time, kv_dim)}
        self.value_biases = []
        if cfg.ve_enabled:
            self.value_embed = ValueEmbedding(cfg)
            self.value_biases.append(self.value_embed)
        if make_gate := head_gate(cfg):
            for block in self.blocks:
                block.attn.add_gate(make_gate(cfg))
        self.skip = add_skip
        if cfg.skip_gates_enabled:
            self.skip = SkipGates(*self.skip_weights.shape)
        self.lanes = one_lane
        if cfg.parallel_start_layer:
            self.lanes = Lanes(cfg)
        self.softcap = partial(softcap, cap=cfg.logit_softcap)
        if cfg.asym_logit_rescale:
            self.softcap = TwoSoftcaps(cfg)
        # Which tokens attention keeps apart: made of the ids, for the kernel. Training sets its own
        # longest piece for the time of a step
        self.longest_piece = cfg.doc_max_len
        self.most_documents = 0
        self.prepare_documents = None
        if cfg.doc_mask:
            self.prepare_documents = attend.prepare

        cos, sin = rotary_tables(cfg, dtype, longest)
        self.cos = nn.Buffer(cos, persistent=False)
        self.sin = nn.Buffer(sin, persistent=False)

    def add_entry(self, cfg: Config) -> None:
        """What happens to the embedding before the first block, in this order: (x, ids) -> x."""
        if cfg.bigram_vocab_size:
            self.bigram = BigramHash(cfg)
            self.entry.append(self.bigram)
        if cfg.smear_gate_enabled:
            self.gated_smear = GatedSmear(cfg)
            self.entry.append(self.gated_smear)
        if cfg.smear_gate:
            self.smear = SmearGate(cfg)
        if cfg.smear_gate and cfg.smear_pos == "pre_norm":
            self.entry.append(self.smear)
        self.entry.append(input_norm)
        if cfg.smear_gate and cfg.smear_pos == "post_norm":
            self.entry.append(self.smear)

    def order(self, loops: int) -> tuple[list[int], list[int]]:
        """The blocks in the order of their visits, encoder and decoder, with so many loops."""
        visits = [*range(len(self.blocks))]
        if loops:
            visits = looped_visits(visits, *self.looped, loops)
        half = len(visits) // 2
        return visits[:half], visits[half:]

    def hidden(self, ids: Tensor, adapters: dict[str, Adapter] | None = None) -> Tensor:
        """Ids (batch, time) -> (batch, time, model_dim): the only forward path."""
        x = F.embedding(ids, self.tok_emb).to(self.dtype)
        for part in self.entry:
            x = part(x, ids)
        value_bias = {}
        for part in self.value_biases:
            value_bias.update(part(ids, self.dtype))
        documents = None
        if self.prepare_documents:
            pieces = document_pieces(ids, self.longest_piece, self.most_documents)
            documents = self.prepare_documents(pieces, self.dtype)
        seen = Context(x, self.cos, self.sin, value_bias, {}, documents)

        encoder, decoder = self.order(self.loops)
        visits = [(self.blocks[layer], seen) for layer in encoder + decoder]
        if adapters:
            visits = with_adapters(visits, adapters)
        skips = []
        for block, seen in visits[: len(encoder)]:
            x = block(x, seen)
            skips.append(x)

        skip_weights = self.skip_weights.to(self.dtype)

        def take_back(x: Tensor, visit: int) -> Tensor:
            if not skips:
                return x
            return self.skip(x, skip_weights[visit] * skips.pop(), visit)

        x = self.lanes(x, visits[len(encoder) :], take_back)
        return rms_norm(x)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        adapters: dict[str, Adapter] | None = None,
    ) -> Tensor:
        """Nats of each target, fp32, of the shape of `targets`.

        ids (batch, time). positions (batch, slots): where logits are computed, for targets
        (batch, slots); None: everywhere, for targets (batch, time). Targets (k, batch, slots) are
        k tokens at each place. adapters: only while they are trained; those of the blocks with one
        more dimension in front, that of the visits.
        """
        h = self.hidden(ids, adapters)
        if positions is not None:
            h = h.take_along_dim(positions[..., None], dim=1)
        logits = F.linear(h, self.tok_emb.to(h.dtype))
        if adapters:
            logits = adapted(logits, h, adapters["head"])
        logits = self.softcap(logits.float())
        if targets.ndim == 3:
            return -logits.log_softmax(-1).gather(-1, targets.movedim(0, -1)).movedim(-1, 0)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view(targets.shape)


def build_model(cfg: Config, run: Run, attend: Attend, longest: int = 0) -> GPT:
    """The initial model: of one SEED the same weights on every rank and device.

    longest: tokens of a row; 0: those of the run.
    """
    torch.manual_seed(cfg.seed)
    return GPT(cfg, run.dtype, attend, longest or longest_row(cfg, run)).to(run.device)


# ── 6 Schedule ────────────────────────────────────────────────────────────────────────────────────
# In: steps done and training seconds, of all steps and of a typical one. Out: what the next step
# does.
# Promise: pure functions of these, but for triggers, which stay on once they have fired; so every
# rank that is told the same times does the same. No trigger fires by a speed that is not known.

# The speed is known once so many steps have been timed, those of the warm-up included
TIMED_STEPS = 10
# A typical step is the median of so many, the last
RECENT_STEPS = 100
# A mean that is above a typical step by more than this holds a stall: it is no speed
STALL = 1.25


# So near the end of the budget the ranks agree on the clock after each step
LAST_SECONDS = 10.0


class StepPlan(NamedTuple):
    """What one step does."""

    lr_scale: float
    momentum: float
    qat: bool = False
    qna: float = 0.0  # width of the noise, in quantisation steps; 0: none
    snapshot: bool = False  # of the weights, after the step
    wd_scale: float = 1.0  # times MUON_WD
    loops: int = 0  # extra passes of the looped layers
    length: int = 0  # tokens of a row
    rewarm: float = 1.0  # the part of lr_scale that a change of length has
    floor: float = 0.0  # what MIN_LR adds to lr_scale, before the rewarm


# Phase (its toggle: NAME_ENABLED) -> the field of StepPlan by which it acts
PHASES = {"QNA": "qna", "QAT": "qat", "SWA": "snapshot", "SQWA": "snapshot"}


# Toggles that begin in stages, which are told one by one
STAGED = ("NUM_LOOPS", "TRAIN_SEQ_SCHEDULE")


class Form(NamedTuple):
    """What a graph is compiled for."""

    loops: int
    length: int


class Trigger(NamedTuple):
    """What something waits for."""

    kind: str  # of TRIGGERS, or steps
    value: float
    after: int = 0  # 1: for the end of the step, not for its beginning


def typical_step(timed: list[float]) -> float:
    """Seconds of a typical one of these steps; 0 while too few are timed to know."""
    if len(timed) < TIMED_STEPS:
        return 0.0
    return statistics.median(timed[-RECENT_STEPS:])


def steps_left(cfg: Config, step: int, elapsed: float, typical: float = math.inf) -> float:
    """Steps still to come: by ITERATIONS, or within the budget at the mean speed so far.

    The mean counts for no more than STALL times the `typical` seconds of a step; where those are
    not known yet (0), ITERATIONS alone counts.
    """
    left = float(cfg.iterations - step)
    # Before the first step no speed is known
    if not cfg.max_wallclock_seconds or step == 0:
        return left
    usual = min(elapsed, STALL * typical * step)
    affordable = (cfg.max_wallclock_seconds - elapsed) * step / max(usual, 1e-9)
    return max(min(left, affordable), 0.0)


def learning_rate_scale(cfg: Config, step: int, left: float) -> float:
    """The decay, which ends at MIN_LR.

    Care: with a floor the last weights are not annealed; an average of them is (#1787 on: the EMA
    gained 0.010 BPB with a floor of 0.1, 0.001 with none).
    """
    return max(decay_to_zero(cfg, step, left), cfg.min_lr)


def decay_to_zero(cfg: Config, step: int, left: float) -> float:
    """1, then a linear decay to 0 over the last WARMDOWN_FRAC of the run or WARMDOWN_ITERS."""
    warmdown = cfg.warmdown_frac * (step + left)
    if not warmdown:
        warmdown = cfg.warmdown_iters
    if not warmdown:
        return 1.0
    # Under a budget nothing is known at step 0 of the end of the run
    if cfg.max_wallclock_seconds and step == 0:
        return 1.0
    return min(left / warmdown, 1.0)


def weight_decay_scale(cfg: Config, step: int, left: float) -> float:
    """WD taper: Muon's weight decay falls late in the run.

    What:   1 until WD_TAPER_START_FRAC of the run, then linear to WD_TAPER_FINAL_MULT at its end.
    Why:    a high decay keeps weights small while they move; settled ones need less of it.
    Source: #1729; toggle WD_TAPER_FINAL_MULT.
    Care:   it multiplies MUON_WD, beside the learning rate, which decays too.
    """
    start = cfg.wd_taper_start_frac
    done = step / (step + left)
    if done <= start:
        return 1.0
    return 1 + (cfg.wd_taper_final_mult - 1) * (done - start) / (1 - start)


def momentum_at(cfg: Config, step: int) -> float:
    """Muon's: rises linearly over MUON_MOMENTUM_WARMUP_STEPS, then stays."""
    ramp = 1.0
    if cfg.muon_momentum_warmup_steps:
        ramp = min(step / cfg.muon_momentum_warmup_steps, 1.0)
    return (1 - ramp) * cfg.muon_momentum_warmup_start + ramp * cfg.muon_momentum


def trigger_reached(
    cfg: Config, total: float, lr_scale: float, steps: int, kind: str, value: float
) -> bool:
    """Whether a trigger of this kind and value (QAT_START_KIND and QAT_START, say) is reached.

    total: steps of the whole run, as far as is known now. steps: those that are done by then.
    """
    if kind == "lr_scale":
        return lr_scale < value
    if kind == "time_frac":
        return steps >= value * total
    if kind == "iter_frac":
        return steps >= int(value * cfg.iterations)
    if kind == "steps":
        return steps >= value
    return True  # always


class LateLoops:
    """Late loops: depth recurrence begins amid the run.

    What:   no extra pass before ENABLE_LOOPING_AT, all NUM_LOOPS from there on; with
            LOOP_PHASE2_AT one pass until then, and all from then on.
    Why:    a step without loops costs two thirds (#1855: 96 and 141 ms), and early ones learn as
            much; the loss jumps less when the passes come one by one (#1412).
    Source: #1204 (RECUR_START_STEP), #1394, #1412; toggle NUM_LOOPS.
    Care:   the model is scored with all passes: a run that never comes so far was trained as
            another model (INACTIVE). Validation before is of the model of then, and says so.
    """

    def __init__(self, cfg: Config):
        self.passes = [0]
        self.triggers: dict[str, Trigger] = {}
        if cfg.num_loops and cfg.loop_phase2_at:
            self.add(1, Trigger(cfg.looping_kind, cfg.enable_looping_at))
            self.add(cfg.num_loops, Trigger(cfg.looping_kind, cfg.loop_phase2_at))
        elif cfg.num_loops:
            self.add(cfg.num_loops, Trigger(cfg.looping_kind, cfg.enable_looping_at))

    def add(self, passes: int, trigger: Trigger) -> None:
        self.passes.append(passes)
        self.triggers[f"{passes} loop{'s' * (passes > 1)}"] = trigger

    def now(self, fired: Iterable[str]) -> int:
        """Extra passes, given the triggers that have fired."""
        return self.passes[len(self.triggers.keys() & fired)]

    def in_full(self, steps: Iterable[int], fired: dict[str, int]) -> float:
        """As how many steps of all passes these count."""
        passes = [self.now(name for name, began in fired.items() if began <= n) for n in steps]
        return sum(passes) / self.passes[-1]


class GrowingRows:
    """Progressive context: rows of few tokens first, and of more later.

    What:   TRAIN_SEQ_SCHEDULE=1024@0.1,2048@0.7,3072@1: rows of 1,024 tokens until a tenth of the
            run, of 3,072 from seven tenths on; as many tokens a step. After each change the
            learning rate rises from 1/n to n/n over n = SEQ_CHANGE_WARMUP_STEPS.
    Why:    a short row costs less attention, and what is learned first lies in few tokens.
    Source: #2014; toggle TRAIN_SEQ_SCHEDULE.
    Care:   TRAIN_SEQ_LEN is the longest, and the window of scoring unless EVAL_SEQ_LEN is set. The
            rise multiplies the floor of MIN_LR too; triggers by lr scale do not see it.
    """

    def __init__(self, cfg: Config):
        self.rewarm_steps = cfg.seq_change_warmup_steps
        self.lengths = [cfg.train_seq_len]
        self.triggers: dict[str, Trigger] = {}
        if cfg.train_seq_schedule:
            kind = {"wallclock": "time_frac", "step": "iter_frac"}[cfg.train_seq_schedule_mode]
            stages = row_stages(cfg.train_seq_schedule)
            self.lengths = [length for length, _ in stages]
            for (_, end), (length, _) in itertools.pairwise(stages):
                self.triggers[f"rows of {length}"] = Trigger(kind, end)

    def now(self, fired: Iterable[str]) -> int:
        """Tokens of a row, given the triggers that have fired."""
        return self.lengths[len(self.triggers.keys() & fired)]

    def rewarm(self, step: int, fired: dict[str, int]) -> float:
        """What the learning rate is multiplied by."""
        changes = [fired[name] for name in self.triggers if name in fired]
        if not changes or not self.rewarm_steps:
            return 1.0
        return min((step - changes[-1] + 1) / self.rewarm_steps, 1.0)


class Schedule:
    """(steps done, training seconds, seconds of a typical step) -> StepPlan.

    Care: a trigger that has fired stays on; else jitter of the step time would switch QAT on and
    off. `fired`, trigger -> its step, is all that is remembered, and what a checkpoint must keep.
    So a slow step must not fire one: triggers see the mean speed without stalls (steps_left). The
    learning rate keeps the records' rule, the plain mean: after a slow first step it is low until
    the mean has recovered (4 times a typical step, of 8,000: for one step), and nothing stays.
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.fired: dict[str, int] = {}
        self.late_loops = LateLoops(cfg)
        self.growing_rows = GrowingRows(cfg)
        self.stages = self.late_loops.triggers | self.growing_rows.triggers
        self.triggers = dict(self.stages)
        if cfg.qat_enabled:
            self.triggers["qat"] = Trigger(cfg.qat_start_kind, cfg.qat_start)
        if cfg.swa_enabled or cfg.sqwa_enabled:
            # A snapshot is taken after its step, which is done by then
            self.triggers["swa"] = Trigger(cfg.swa_start_kind, cfg.swa_start_frac, after=1)

    def at(self, step: int, elapsed: float, typical: float = math.inf) -> StepPlan:
        """The plan of the next step, `step` steps and `elapsed` seconds of training being done.

        typical: typical_step of those timed; inf where all take the same.
        """
        left = steps_left(self.cfg, step, elapsed, typical)
        usual_scale = learning_rate_scale(self.cfg, step, left)
        reached = partial(trigger_reached, self.cfg, step + left, usual_scale)
        for name, trigger in self.triggers.items():
            if name not in self.fired and reached(step + trigger.after, *trigger[:2]):
                self.fired[name] = step
        return self.plan(step, steps_left(self.cfg, step, elapsed))

    def plan(self, step: int, left: float) -> StepPlan:
        """What a step does, so many being left, given the triggers that have fired."""
        cfg = self.cfg
        scale = learning_rate_scale(cfg, step, left)
        rewarm = self.growing_rows.rewarm(step, self.fired)
        qat = "qat" in self.fired
        qna = 0.0
        if cfg.qna_enabled and not qat and scale >= cfg.qna_stop_scale:
            qna = cfg.qna_magnitude * scale
        return StepPlan(
            lr_scale=scale * rewarm,
            momentum=momentum_at(cfg, step),
            qat=qat,
            qna=qna,
            snapshot="swa" in self.fired and (step + 1) % cfg.swa_every == 0,
            wd_scale=weight_decay_scale(cfg, step, left),
            loops=self.late_loops.now(self.fired),
            length=self.growing_rows.now(self.fired),
            rewarm=rewarm,
            floor=scale - decay_to_zero(cfg, step, left),
        )

    def forms(self) -> list[Form]:
        """Every form that a step may have, in the order in which they come.

        Where loops and rows go by the same share, few of them meet.
        """
        if len({trigger.kind for trigger in self.stages.values()}) > 1:
            every = itertools.product(self.late_loops.passes, self.growing_rows.lengths)
            return [Form(*each) for each in every]
        found = []
        for moment in sorted({0.0, *(trigger.value for trigger in self.stages.values())}):
            fired = [name for name, trigger in self.stages.items() if trigger.value <= moment]
            found.append(Form(self.late_loops.now(fired), self.growing_rows.now(fired)))
        return list(dict.fromkeys(found))

    def form(self, step: int) -> Form:
        """The form of a step that is done."""
        fired = [name for name, first in self.fired.items() if first <= step]
        return Form(self.late_loops.now(fired), self.growing_rows.now(fired))

    def restore(self, fired: dict[str, int]) -> None:
        """The triggers that have fired, as a checkpoint says; ValueError of what is none."""
        if any(name not in self.triggers or type(n) is not int for name, n in fired.items()):
            raise ValueError("odd triggers")
        self.fired = dict(fired)

    def effects(self, now: StepPlan) -> dict[str, float | None]:
        """Toggle of the schedule that acts in this step -> its effect, as far as known here."""
        cfg = self.cfg
        found = {}
        if now.lr_scale < now.rewarm:
            found["WARMDOWN"] = now.lr_scale - now.rewarm
        if now.floor:
            found["MIN_LR"] = now.floor * now.rewarm
        if cfg.muon_wd and now.wd_scale != 1:
            found["WD_TAPER"] = now.wd_scale - 1
        if now.loops:
            found["NUM_LOOPS"] = None
        if cfg.train_seq_schedule and now.length < cfg.train_seq_len:
            found["TRAIN_SEQ_SCHEDULE"] = float(now.length - cfg.train_seq_len)
        return found

    def missing(self) -> dict[str, str]:
        """Toggle -> its last stage, where that has not begun: the end was of no such model."""
        parts = dict(zip(STAGED, (self.late_loops, self.growing_rows), strict=True))
        found = {name: [*part.triggers][-1] for name, part in parts.items() if part.triggers}
        return {name: stage for name, stage in found.items() if stage not in self.fired}


def schedule_toggles(cfg: Config) -> dict[str, Activity]:
    """The toggles that act by the schedule alone."""
    found = {}
    if cfg.warmdown_iters or cfg.warmdown_frac:
        found["WARMDOWN"] = Activity(
            scope="learning rates", unit="lr scale", compared="at the last step"
        )
        if cfg.min_lr:
            found["MIN_LR"] = Activity(
                scope="learning rates", unit="lr scale", compared="at the last step"
            )
    if cfg.muon_wd and cfg.wd_taper_final_mult != 1:
        found["WD_TAPER"] = Activity(
            scope="weight decay of Muon", unit="x MUON_WD", compared="at the last step"
        )
    if cfg.num_loops:
        found["NUM_LOOPS"] = Activity()  # the report measures it
    if cfg.train_seq_schedule:
        found["TRAIN_SEQ_SCHEDULE"] = Activity(
            scope="rows", unit="tokens", compared="against the longest"
        )
    return found


def careful_step(timed: list[float]) -> float:
    """Seconds that the next step may take, by those timed: the second slowest of the last 20.

    And a tenth, for what the clock sees after the last step. One slow step among 20 is a stall.
    """
    slowest = sorted(timed[-20:])
    return 1.1 * slowest[-2:][0]


def budget_spent(cfg: Config, step: int, elapsed: float, coming: float = 0.0) -> bool:
    """True when one more step would end after the wallclock budget.

    It takes the mean of those done, or `coming` seconds where that is more.
    """
    if not cfg.max_wallclock_seconds or step == 0:
        return False
    return elapsed + max(elapsed / step, coming) > cfg.max_wallclock_seconds


class Forecast(NamedTuple):
    """What a run would do at a known speed."""

    step_seconds: float  # mean
    steps: int
    # what is asked for -> (first step, its second), or None: never
    starts: dict[str, tuple[int, float] | None]


# Seconds of a step that does this
Pace = Callable[[StepPlan], float]


def forecast(cfg: Config, pace: Pace) -> Forecast:
    """Found by running the schedule itself."""
    schedule = Schedule(cfg)
    starts = dict.fromkeys(expected(cfg, schedule))
    step = 0
    elapsed = 0.0
    while step < cfg.iterations and not budget_spent(cfg, step, elapsed):
        now = schedule.at(step, elapsed)
        acting = [name for name, field in PHASES.items() if getattr(now, field)]
        for name in (*schedule.effects(now), *acting, *schedule.fired):
            if name in starts and starts[name] is None:
                starts[name] = step, elapsed
        step += 1
        elapsed += pace(now)
    return Forecast(elapsed / step, step, starts)


def expected(cfg: Config, schedule: Schedule) -> list[str]:
    """What the run asks for, in the order of the timeline: STAGED by their stages."""
    toggles = [name for name in schedule_toggles(cfg) if name not in STAGED]
    phases = [name for name in PHASES if getattr(cfg, f"{name.lower()}_enabled")]
    return [*toggles, *phases, *schedule.stages]


def timeline(seen: Forecast) -> str:
    """Planned step and second of all that is asked for, or NEVER."""
    text = f"{seen.steps} steps of {seen.step_seconds * 1e3:.1f} ms"
    for name, start in seen.starts.items():
        when = "NEVER"
        if start is not None:
            step, elapsed = start
            when = f"step {step} ({elapsed:.0f} s)"
        text += f", {name} from {when}"
    return text


def late_changes(cfg: Config, seen: Forecast) -> dict[str, int]:
    """What weights from before it know nothing of -> its first step, where that is not the first.

    All loops, not the first of them: the model is scored with all.
    """
    names = ["QAT", *[name for name in seen.starts if name.endswith((" loop", " loops"))][-1:]]
    starts = {name: seen.starts.get(name) for name in names}
    return {name: start[0] for name, start in starts.items() if start and start[0]}


def averaging_warnings(cfg: Config, seen: Forecast) -> list[str]:
    """Averages that will hold weights which they should not, or are missing: one line each."""
    lines = []
    late = late_changes(cfg, seen)
    if seen.starts.get("MIN_LR") and cfg.shipped_average == "none":
        missing = "the last weights are not annealed, and no average of them ships"
        lines.append(f"MIN_LR={cfg.min_lr:g}: {missing}; set EMA_ENABLED=1")
    if cfg.ema_enabled:
        # a decay of 1 never forgets
        memory = 1 / max(1 - cfg.ema_decay, 1e-9)
        about = f"EMA_DECAY={cfg.ema_decay:g}: the average remembers about {memory:,.0f} steps, "
        if memory > seen.steps:
            remedy = "it will hold much of the initial weights; lower EMA_DECAY"
            lines.append(f"{about}more than the {seen.steps:,} of the run: {remedy}")
            late.clear()
        for name, step in late.items():
            if memory > seen.steps - step:
                problem = f"{about}more than the {seen.steps - step:,} with {name}"
                remedy = f"lower EMA_DECAY, or start {name} earlier"
                lines.append(f"{problem}: it will hold weights from before {name}; {remedy}")
    return lines + snapshot_warnings(seen, late_changes(cfg, seen))


def snapshot_warnings(seen: Forecast, late: dict[str, int]) -> list[str]:
    """Means of snapshots, of weights from before a change and after it."""
    lines = []
    for average, (name, step) in itertools.product(("SWA", "SQWA"), late.items()):
        start = seen.starts.get(average)
        # a snapshot is taken after its step
        if start and start[0] + 1 < step:
            lines.append(
                f"{average} takes snapshots from step {start[0]} on, {name} acts from step {step} "
                f"on: their mean will hold weights from before {name}; lower SWA_START_FRAC, or "
                f"start {name} earlier"
            )
    return lines


# ── 7 Optimiser ───────────────────────────────────────────────────────────────────────────────────
# In: the parameters with their roles, and the gradients of one step. Out: new weights.
# Promise: weights and gradients lie in one buffer each, and every rank holds the same bits after
# every step.
ALIGNMENT = 16  # fp32 entries: 64 bytes, what vector loads want
# Of one tensor into one; later torches call it so
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Bank(NamedTuple):
    """Muon matrices of one role and shape, one behind the other: they are updated as one stack."""

    names: list[str]
    place: slice  # of a buffer like the weights
    stride: int  # entries from one matrix to the next
    shape: tuple[int, int]


class Reduced(NamedTuple):
    """What all ranks know of a step's gradients."""

    loss: float  # nats per token
    norm: float  # of the gradients, before the clip
    stopping: float  # share of the ranks that were told to stop
    refused: float  # share of the ranks that have no rows
    seconds: float  # of the step before on rank 0, where the others do not know them yet; or 0


class FlatParameters:
    """Weights in one fp32 buffer, gradients in another: one all-reduce, one norm, no copies.

    Each parameter is a view of `weights`, its .grad the view of `gradients` at the same place:

        weights    | embed | bank | bank | ... | scalar |
        gradients  | embed | bank | bank | ... | scalar | loss, norm, stop, refused, seconds |

    The step's loss, two flags and the clock travel with the gradients. The update does not wait for
    a host to read them: `skip` tells it on the device whether to leave all as it is. A group is one
    slice, so that AdamW sees one tensor. A bank is filled up with zeros to an equal share per rank,
    here 5 matrices on 3 ranks; each rank updates its share (Optimiser):

        | matrix 0  matrix 1 | matrix 2  matrix 3 | matrix 4  zeros |
          rank 0               rank 1               rank 2

    run: world and rank, and the device.
    """

    def __init__(self, params: dict[str, nn.Parameter], run: Run):
        self.world = run.world
        self.rank = run.rank
        self.shapes = {name: p.shape for name, p in params.items()}
        self.places: dict[str, int] = {}  # name -> first entry
        self.groups: dict[str, slice] = {}  # optimiser of a Role -> entries
        self.banks: list[Bank] = []
        size = self.lay_out(params)

        self.weights = torch.zeros(size, device=run.device)
        # a whole cache line behind the weights' places
        self.gradients = torch.zeros(size + ALIGNMENT, device=run.device)
        self.proper_gradients = self.gradients[:size]
        self.ends = self.gradients[size : size + len(Reduced._fields)]
        self.loss, self.norm, self.stop, self.refused, self.seconds = self.ends.unbind()
        # 1: the step is not finite, or refused. fp32 is what fused AdamW reads
        self.skip = torch.zeros((), device=run.device, dtype=torch.float)
        cuda = self.weights.is_cuda
        self.seen = torch.zeros(len(self.ends), pin_memory=cuda)  # what `outcome` reads
        self.unclipped = torch.full_like(self.norm, 1 / run.world)  # factor of the sum
        self.arrived = torch.cuda.Event() if cuda else None

        gradients = self.views(self.gradients)
        for name, weights in self.views(self.weights).items():
            weights.copy_(params[name].data)
            params[name].data = weights
            params[name].grad = gradients[name]

    def lay_out(self, params: dict[str, nn.Parameter]) -> int:
        """Gives every tensor its place; returns the number of entries of all."""

        def kind(name: str) -> tuple:
            role = params[name].role
            return role.optimiser, role.bits or "", tuple(params[name].shape)

        size = 0
        for (group, _, shape), alike in itertools.groupby(sorted(params, key=kind), kind):
            names = list(alike)
            start = size
            stride = math.ceil(math.prod(shape) / ALIGNMENT) * ALIGNMENT
            for i, name in enumerate(names):
                self.places[name] = start + i * stride

            slots = len(names)
            if group == "muon":
                slots = math.ceil(slots / self.world) * self.world
            size += slots * stride
            if group == "muon":
                self.banks.append(Bank(names, slice(start, size), stride, shape))

            first = self.groups[group].start if group in self.groups else start
            self.groups[group] = slice(first, size)
        return size

    def views(self, buffer: Tensor) -> State:
        """Name -> its part of a buffer like `weights`, in its own shape."""
        parts = {}
        for name, shape in self.shapes.items():
            place = self.places[name]
            parts[name] = buffer[place : place + shape.numel()].view(shape)
        return parts

    def shares(self, buffer: Tensor) -> list[Tensor]:
        """The banks of a buffer like `weights`, each (ranks, entries of one rank)."""
        return [buffer[bank.place].view(self.world, -1) for bank in self.banks]

    def matrices(self, buffer: Tensor) -> list[Tensor]:
        """The banks of a buffer like `weights`, each (ranks, matrices, rows, columns)."""
        stacks = []
        for bank, shares in zip(self.banks, self.shares(buffer), strict=True):
            slots = shares.unflatten(1, (-1, bank.stride))
            stacks.append(slots[..., : math.prod(bank.shape)].unflatten(-1, bank.shape))
        return stacks

    def pair_with_weights(self, grids: dict[str, Grid]) -> list[tuple[Grid, Tensor]]:
        """Name -> grid as (grid, view of the weights): one view for a bank of equal grids."""
        views = self.views(self.weights)
        covered = set()
        for bank, matrices in zip(self.banks, self.matrices(self.weights), strict=True):
            first, *others = bank.names
            if all(grids.get(name) == grids.get(first) for name in others):
                views[first] = matrices
                covered.update(others)
        return [(grid, views[name]) for name, grid in grids.items() if name not in covered]

    def gather(self, stacks: Iterable[Tensor]) -> None:
        """Every rank's row of each (ranks, entries), on all ranks.

        `stacks` may be a generator: one stack travels while the next is made.
        """
        works = []
        for rows in stacks:
            if self.world > 1:
                works.append(all_gather(rows.view(-1), rows[self.rank], async_op=True))
        for work in works:
            work.wait()

    def reduce(self, clip: float) -> None:
        """The mean over the ranks, THEN the clip: each rank's own clip would bend the mean (#975).

        Both in one pass over the gradients. No host sync.
        """
        if self.world > 1:
            dist.all_reduce(self.gradients)
            self.ends /= self.world
        torch.div(self.proper_gradients.norm(), self.world, out=self.norm)
        if clip or self.world > 1:
            # fmin takes no NaN: that would hide whose gradient is not finite
            factor = (clip or math.inf) / self.world / (self.norm.double() + 1e-6)
            self.proper_gradients *= factor.to(self.norm.dtype).fmin(self.unclipped)

        total = self.loss + self.norm
        # 0 where it is finite
        self.skip.copy_(total - total + self.refused != 0)
        self.seen.copy_(self.ends, non_blocking=True)
        if self.arrived:
            self.arrived.record()

    def outcome(self) -> Reduced:
        """Of the last `reduce`. Host sync: to its end, not to that of what was started since."""
        if self.arrived:
            self.arrived.synchronize()
        return Reduced(*self.seen.tolist())

    def checksums(self) -> list[int]:
        """The sum of the bits of every rank's weights: unlike where ranks have drifted apart.

        A host sync.
        """
        sums = self.weights.new_zeros(self.world, 1, dtype=torch.int64)
        sums[self.rank] = self.weights.view(torch.int32).sum()
        self.gather([sums])
        return sums.flatten().tolist()


def row_sizes(g: Tensor) -> Tensor:
    """MuonEq-R: what to divide each row of matrices (n, rows, columns) by; (n, rows, 1).

    What:   u_row / |u_row|, then the whole by its norm, before the iterations.
    Why:    they begin with rows, the outputs of a layer, that all count alike: singular values
            lie nearer to each other, and five steps bring them nearer to 1.
    Source: #1217; toggle MUON_ROW_NORMALIZE.
    Care:   rows of the weight, (out, in), in tall matrices too. A row of zeros stays one. The norm
            of the whole follows from those of the rows: g is read no more often than without it.
    """
    rows = g.norm(dim=-1, keepdim=True)
    divisors = rows.clamp(min=1e-7)
    whole = rows.div_(divisors).norm(dim=-2, keepdim=True)
    return divisors.mul_(whole.add_(1e-7))


def newton_schulz(g: Tensor, triples: Sequence[tuple], row_normalise: bool = False) -> Tensor:
    """Newton-Schulz: matrices (n, rows, columns) -> nearly semi-orthogonal ones, all at once.

    What:   x = g / |g|, then for each (a, b, c) x <- a x + (b A + c A^2) x with A = x x^T.
    Why:    it pulls every singular value towards 1 by matrix products alone, without an SVD.
    Source: Muon (K. Jordan 2024) with quintic; polar_express (Amsel 2025): #1344.
            MUON_COEFFS, MUON_BACKEND_STEPS.
    Care:   singular values end between 0.7 and 1.2, not at 1: a, b, c trade that for few steps.
            The triples of polar_express are each right for their place alone. POLAR_EXPRESS of
            #1412 leaves a margin of 1 % above the norm, so that its triples differ by that.
            A is built on the short side. On a CPU it runs in fp32: some multiply bf16 faster, but
            others would train to other numbers.
    """
    sizes = row_sizes(g) if row_normalise else g.norm(dim=(-2, -1), keepdim=True) + 1e-7
    x = (g / sizes).to(torch.bfloat16 if g.is_cuda else torch.float32)
    tall = g.shape[-2] > g.shape[-1]
    x = x.mT if tall else x
    for a, b, c in triples:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if tall else x
    return x.to(g.dtype)


def orthogonaliser(cfg: Config) -> dict:
    """What newton_schulz is told by the settings."""
    triples = itertools.cycle(COEFFICIENTS[cfg.muon_coeffs])
    return dict(
        triples=tuple(itertools.islice(triples, cfg.muon_backend_steps)),
        row_normalise=cfg.muon_row_normalize,
    )


# Toggles of Muon that the report measures -> their value where they are off
MUON_TOGGLES = {"MUON_ROW_NORMALIZE": False, "MUON_COEFFS": "quintic"}


class MuonShare(NamedTuple):
    """What one rank updates of a bank: its share, each (matrices, rows, columns)."""

    weights: Tensor
    gradients: Tensor
    momenta: Tensor
    bank: Tensor  # the weights of all ranks, (ranks, entries)


def muon_update(
    share: MuonShare, now: StepPlan, cfg: Config, orthogonalise: Callable, counts: Tensor
) -> None:
    """Muon: one step of a stack of matrices along the orthogonalised momentum, in place.

    What:   m <- momentum m + g;  u = Newton-Schulz(g + momentum m)
            w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) u
    Why:    all directions of a matrix move alike, however unequal its gradient is.
    Source: K. Jordan 2024 (Nesterov form); MATRIX_LR, MUON_MOMENTUM, MUON_WD.
    Care:   for matrices inside the model only: tables, vectors and scalars go to AdamW.
            The decay is decoupled, and must reach Muon (#989's did not). Where `counts`, a bool ()
            on the device, is false, momenta and weights stay what they are.
    """
    lr = cfg.matrix_lr * now.lr_scale
    wd = cfg.muon_wd * now.wd_scale
    # by its bits, as NaN * 0 is NaN
    bits = share.gradients.view(torch.int32) & -counts.to(torch.int32)
    gradients = bits.view(share.gradients.dtype)
    share.momenta.mul_(torch.where(counts, now.momentum, 1.0)).add_(gradients)
    nesterov = torch.add(gradients, share.momenta, alpha=now.momentum)
    update = orthogonalise(nesterov).mul_(counts.to(nesterov.dtype))
    rows, columns = update.shape[-2:]
    scale = lr * math.sqrt(max(1, rows / columns))
    share.weights.mul_(torch.where(counts, 1 - lr * wd, 1.0)).add_(update, alpha=-scale)


class Optimiser:
    """Muon for the matrices inside the model, AdamW for the rest.

    Each rank updates its share of each Muon bank; AdamW does all of its work on every rank. The
    moments lie in buffers like the weights. Where flat.skip says so, weights and moments stay what
    they are, bit for bit. No host sync.
    """

    def __init__(self, flat: FlatParameters, cfg: Config, run: Run):
        self.flat = flat
        self.cfg = cfg
        self.first_moments = torch.zeros_like(flat.weights)  # momenta of Muon too
        self.second_moments = torch.zeros_like(flat.weights)  # of AdamW alone
        iterate = torch.compile(newton_schulz, dynamic=False) if run.compile else newton_schulz
        self.orthogonalise = partial(iterate, **orthogonaliser(cfg))

        banks = flat.shares(flat.weights)
        stacks = [flat.matrices(b) for b in (flat.weights, flat.gradients, self.first_moments)]
        self.shares = []
        for bank, *parts in zip(banks, *stacks, strict=True):
            own = [part[run.rank] for part in parts]
            self.shares.append(MuonShare(*own, bank))
        self.adamw = self.make_adamw()

    def make_adamw(self) -> torch.optim.AdamW:
        """One tensor per group: its slice of the buffers. KeyError: a group without a rate."""
        flat, cfg = self.flat, self.cfg
        groups = []
        states = {}
        for name, place in flat.groups.items():
            if name == "muon":
                continue
            knobs = ADAMW_GROUPS[name]
            lr = getattr(cfg, knobs.lr)
            wd = getattr(cfg, knobs.wd)
            weights = nn.Parameter(flat.weights[place])
            weights.grad = flat.gradients[place]
            group = {
                "params": [weights],
                "lr": lr,
                "base_lr": lr,
                "betas": (cfg.beta1, getattr(cfg, knobs.beta2) or cfg.beta2),
                "weight_decay": cfg.adam_wd if wd < 0 else wd,
            }
            groups.append(group)
            states[weights] = {
                "step": torch.zeros((), device=weights.device),
                "exp_avg": self.first_moments[place],
                "exp_avg_sq": self.second_moments[place],
            }
        adamw = torch.optim.AdamW(groups, eps=cfg.adam_eps, fused=True)
        adamw.state.update(states)
        adamw.found_inf = flat.skip  # at 1 it does nothing
        return adamw

    def step(self, now: StepPlan) -> None:
        """New weights on every rank, from `flat.gradients`."""
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * now.lr_scale
        self.adamw.step()
        self.flat.gather(self.muon(now))

    def muon(self, now: StepPlan) -> Iterator[Tensor]:
        """Updates this rank's share of each bank; yields each bank, (ranks, entries)."""
        counts = self.flat.skip == 0
        for share in self.shares:
            muon_update(share, now, self.cfg, self.orthogonalise, counts)
            yield share.bank


# ── 8 Views and averages ──────────────────────────────────────────────────────────────────────────
# In: the latent weights. Out: what a forward pass sees of them (views), and their averages over
# steps, wherever they are quantised by the grid of the artifact.
# Promise: a view changes the latent weights for no longer than a step, an average never, and every
# rank does the same arithmetic.


def grids_in_scope(
    cfg: Config, model: GPT, exported: dict[str, Grid], scope: str
) -> dict[str, Grid]:
    """Name -> grid of the tensors that a view changes; the records had narrower scopes (SCOPES)."""
    if scope == "exported":
        return exported
    grids = {}
    for name, p in model.named_parameters():
        place = "block_linears" if name.startswith("blocks.") else "small_linears"
        linear = name.endswith(".weight") and p.role.bits and getattr(cfg, p.role.bits) < 16
        if linear and scope in ("linears", place):
            grids[name] = role_grid(cfg, name, p.role)
    return grids


class Qat:
    """QAT, quantisation-aware training: the forward pass sees what the artifact will hold.

    What:   w -> codes(w) * scale(w), the round trip of the export grid.
    Why:    training moves the weights to where rounding costs least.
    Source: #989; toggle QAT_ENABLED, from QAT_START_KIND and QAT_START on.
    Care:   grids and tensors are those of the exporter, bit for bit; the records' were not
            (#194), or had other bits (#975), or covered other tensors (#975, #145): QAT_GRID,
            QAT_BITS and QAT_SCOPE rebuild them.
    """

    def __init__(self, cfg: Config, model: GPT, exported: dict[str, Grid]):
        self.cfg = cfg
        self.scope = cfg.qat_scope
        self.grids = grids_in_scope(cfg, model, exported, self.scope)
        if cfg.qat_grid == "amax":
            self.grids = {n: grid._replace(clip="amax") for n, grid in self.grids.items()}
        if cfg.qat_bits:
            self.grids = {n: grid._replace(bits=cfg.qat_bits) for n, grid in self.grids.items()}

    def at_full_strength(self) -> StepPlan:
        """A step in which it acts, for the warm-up and for the proof that it does something."""
        return StepPlan(1.0, self.cfg.muon_momentum, qat=True)

    def acts(self, now: StepPlan) -> bool:
        return now.qat

    def apply(self, stacks: list[tuple[Grid, Tensor]], now: StepPlan, step: int) -> None:
        for grid, weights in stacks:
            grid.snap(weights)


class Qna:
    """QNA, quantisation noise: the forward pass sees the weights with uniform noise on them.

    What:   w -> w + width * scale(w) * u, u uniform in [-1/2, 1/2); width: QNA_MAGNITUDE times the
            learning-rate scale, 0 once QAT has begun.
    Why:    weights learn to bear errors as large as those of rounding, before QAT rounds them.
    Source: #975; toggle QNA_ENABLED.
    Care:   noise depends on SEED, step and stack alone: every rank, and a run that goes on, draws
            the same. scale(w) is the exported one. #975's is the largest weight of the row over
            the largest code, without clip and floor, so smaller than the true error, in the
            matrices of the blocks alone: QNA_GRID=row, QNA_SCOPE=block_linears. It was drawn for
            each micro-batch, here for each step: the same on 8 GPUs, where a step has one.
    """

    def __init__(self, cfg: Config, model: GPT, exported: dict[str, Grid]):
        self.cfg = cfg
        self.scope = cfg.qna_scope
        self.grids = grids_in_scope(cfg, model, exported, self.scope)
        if cfg.qna_grid == "row":
            row = dict(clip="amax", floor=False)
            self.grids = {n: grid._replace(**row) for n, grid in self.grids.items()}

    def at_full_strength(self) -> StepPlan:
        """A step with the noise of full learning rate."""
        return StepPlan(1.0, self.cfg.muon_momentum, qna=self.cfg.qna_magnitude)

    def acts(self, now: StepPlan) -> bool:
        return now.qna > 0

    def apply(self, stacks: list[tuple[Grid, Tensor]], now: StepPlan, step: int) -> None:
        for i, (grid, weights) in enumerate(stacks):
            seed = (self.cfg.seed * 1_000_003 + step) * 1009 + i
            generator = torch.Generator(weights.device).manual_seed(seed)
            noise = torch.rand(weights.shape, generator=generator, device=weights.device) - 0.5
            weights.add_(grid.scale(weights) * now.qna * noise)


# Toggle without _ENABLED -> view
VIEWS = {"QAT": Qat, "QNA": Qna}


class WeightViews:
    """For the forward and backward of a step, weights become what the forward pass shall see.

    Then the latent ones return and take the gradient of the seen ones: a straight-through estimator
    outside of the compiled graph, so that nothing compiles again when a technique starts or ends.
    No host sync.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, flat: FlatParameters, plan: dict):
        exported = {name: how for name, how in plan.items() if isinstance(how, Grid)}
        self.techniques = {}  # name -> its view
        self.stacks: dict[str, list[tuple[Grid, Tensor]]] = {}
        for name, technique in VIEWS.items():
            if not getattr(cfg, f"{name.lower()}_enabled"):
                continue
            view = technique(cfg, model, exported)
            self.techniques[name] = view
            self.stacks[name] = flat.pair_with_weights(view.grids)
            entries = sum(flat.shapes[tensor].numel() for tensor in view.grids)
            run.activity[name] = Activity(len(view.grids), entries, view.scope)
            refuse(
                not view.grids and cfg.strict,
                f"{name}: would touch no tensor; see {name}_SCOPE, QUANT_BITS_*, "
                "KEEP_FLOAT_MAX_NUMEL, STRICT",
                4,
            )

    def acting(self, now: StepPlan) -> list[str]:
        """The techniques that change what this step sees."""
        return [name for name, view in self.techniques.items() if view.acts(now)]

    def enter(self, now: StepPlan, step: int) -> list[tuple[Tensor, Tensor]]:
        """Puts the seen weights in; returns what `leave` needs to bring the latent ones back."""
        latent = []
        for name in self.acting(now):
            stacks = self.stacks[name]
            latent += [(weights, weights.clone()) for _, weights in stacks]
            self.techniques[name].apply(stacks, now, step)
        return latent

    def leave(self, latent: list[tuple[Tensor, Tensor]]) -> None:
        for weights, saved in reversed(latent):
            weights.copy_(saved)


AVERAGES: dict[str, type] = {}  # the name of an average -> its class, by which it is wired


class Ema:
    """EMA: exponential moving average of the weights, from the initial ones on.

    What:   e <- decay e + (1 - decay) w after every step.
    Why:    it takes out the noise of the last steps, at any time and without a start to choose.
    Source: #975; toggle EMA_ENABLED.
    Care:   in fp32, or 1 - decay drowns in rounding. Latent weights are averaged, QAT or not.
    """

    of = "live weights"
    every_step = True
    kept_as = "ema"

    def __init__(self, cfg: Config, model: GPT, averages: Averages):
        self.decay = cfg.ema_decay
        self.live = averages.flat.weights
        self.buffer = self.live.clone()
        self.kept = averages.flat.views(self.buffer)

    def update(self) -> None:
        self.buffer.lerp_(self.live, 1 - self.decay)

    def result(self) -> State:
        return self.kept


AVERAGES["ema"] = Ema


class Swa:
    """SWA, stochastic weight averaging: the mean of snapshots of the live weights.

    What:   (w_1 + ... + w_n) / n, a snapshot every SWA_EVERY steps once SWA_START_FRAC is reached.
    Why:    the mean of points around a minimum lies lower than the points themselves.
    Source: #199, #194, #989; toggle SWA_ENABLED.
    Care:   a sum in bf16 goes wrong as snapshots are added: fp32, unless SWA_DTYPE rebuilds the
            seeds (#194, #989). Latent weights are averaged, QAT or not.
    """

    of = "live weights"
    every_step = False
    kept_as = "sum"

    def __init__(self, cfg: Config, model: GPT, averages: Averages):
        self.source = averages.live
        self.count = 0
        self.kept = {}
        for name, p in model.named_parameters():
            is_table = p.role.optimiser == "embed"
            low = cfg.swa_dtype == "bf16" or (cfg.swa_dtype == "native" and is_table)
            self.kept[name] = torch.zeros_like(p, dtype=torch.bfloat16 if low else torch.float32)

    def snapshot(self, name: str) -> Tensor:
        return self.source[name]

    def update(self) -> None:
        for name, total in self.kept.items():
            total.add_(self.snapshot(name).to(total.dtype))
        self.count += 1

    def result(self) -> State:
        """The mean; empty before the first snapshot."""
        if not self.count:
            return {}
        return {name: total.float() / self.count for name, total in self.kept.items()}


AVERAGES["swa"] = Swa


class Sqwa(Swa):
    """SQWA: the mean of snapshots that are quantised and dequantised first.

    What:   SWA of Q(w), each tensor as the artifact would hold it; of the EMA where one is on.
    Why:    what is averaged has already paid for its rounding, so the last rounding costs less.
    Source: #975; toggle SQWA_ENABLED.
    Care:   the mean is off the grid and is rounded once more at export. It is taken on the device,
            on every rank (#975's lived on rank 0 alone).
    """

    def __init__(self, cfg: Config, model: GPT, averages: Averages):
        super().__init__(cfg, model, averages)
        self.plan = averages.plan
        for name, average in averages.on.items():
            if average.every_step:
                self.source = average.kept
                self.of = name.upper()

    def snapshot(self, name: str) -> Tensor:
        return as_shipped(self.source[name], self.plan[name])


AVERAGES["sqwa"] = Sqwa


class Averages:
    """The averages that the run collects: one of every step, and a mean of snapshots.

    Of the latent weights, on the device, the same on every rank. No host sync. An average has:
        of          what it averages
        every_step  whether it takes every step in; else snapshots
        kept        the tensors that a checkpoint keeps, under the name `kept_as`
        update()    takes the weights in
        result()    the averaged weights, if there are any yet
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, flat: FlatParameters, plan: dict):
        self.flat = flat
        self.plan = plan
        self.live = flat.views(flat.weights)
        self.on: dict[str, Ema | Swa] = {}
        for name, technique in AVERAGES.items():
            if name in cfg.collected():
                self.on[name] = technique(cfg, model, self)

        entries = sum(weights.numel() for weights in self.live.values())
        for name in cfg.collected():
            scope = f"of {self.on[name].of}"
            run.activity[name.upper()] = Activity(len(self.live), entries, scope)

    @property
    def snapshots(self) -> Swa | None:
        """The mean of snapshots that is on. At most one is: a rule of Config sees to it."""
        return next((average for average in self.on.values() if not average.every_step), None)

    def update(self, snapshot: bool) -> list[str]:
        """After an optimiser step. Returns which averages took the weights in."""
        acting = []
        for name, average in self.on.items():
            if average.every_step or snapshot:
                average.update()
                acting.append(name.upper())
        return acting

    def results(self) -> dict[str, State]:
        """Every average that has weights, by name."""
        results = {name: average.result() for name, average in self.on.items()}
        return {name: state for name, state in results.items() if state}

    def tensors(self) -> dict[str, State]:
        """What a checkpoint keeps: the live weights, and what every average keeps."""
        groups = {"live": self.live}
        for average in self.on.values():
            groups[average.kept_as] = average.kept
        return groups


# ── 9 Train ───────────────────────────────────────────────────────────────────────────────────────
# In: a model, its plan of export, training and validation tokens. Out: trained weights, averages,
# checkpoints.
# Promise: a step that is not finite never reaches the weights; a run that was stopped goes on from
# its last checkpoint as if it had not been.
CHECKPOINTS = ("checkpoint.bin", "checkpoint.previous.bin")  # the newest first


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict) -> list[str]:
    """Makes this the newest checkpoint, and the newest the previous one.

    Returns the names of the tensors that are not finite. With any of them nothing is written, as
    no reader would take the file.

    Care: steps go on meanwhile. Numpy, hashlib and files let go of the interpreter for as long as
    they are at work on a tensor, and take no thread from torch.
    """
    bad = [name for name, w in tensors.items() if not np.isfinite(w.float().numpy()).all()]
    if bad:
        return bad
    newest, previous = (folder / name for name in CHECKPOINTS)
    pieces = container(tensors, facts, "none")
    if newest.exists():
        newest.replace(previous)
    write_atomic(newest, *pieces)
    return []


def last_checkpoint(run: Run) -> tuple[dict, dict[str, Tensor]] | None:
    """(facts, tensors) of the newest whole checkpoint of this run; None when it has none yet.

    metrics.jsonl is cut back to that moment. Refusal: all are damaged, another script wrote them,
    or the ranks do not read the same.
    """
    saved = None
    damaged = []
    for path in (run.dir / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        try:
            saved = saved or read_container(path)
        except Refusal as error:
            if error.code != 2:
                raise  # told to stop, or a failing disk: no damage
            run.warn(f"{error}: the one before it is used")
            damaged.append(path)

    progress = saved[0].get("progress", {}) if saved else None
    refuse(
        damaged and not saved,
        f"RESUME=1: no checkpoint in {run.dir} is whole; delete {damaged} to begin again",
    )
    refuse(
        saved and progress.get("code_sha256") != CODE_SHA256,
        f"RUN_ID={run.dir.name}: was begun by another script; go on with "
        f"{run.dir / 'train_gpt.py'}, or choose another RUN_ID",
    )
    refuse(run.broadcast(progress) != progress, "RESUME=1: the ranks read different checkpoints")

    if run.rank == 0:
        for path in damaged:
            path.replace(path.with_suffix(".damaged"))
        kept = min(run.jsonl.tell(), saved[0]["metrics_bytes"]) if saved else 0
        os.truncate(run.dir / "metrics.jsonl", kept)
    return saved


class Trainer:
    """Model, optimiser, views and averages, driven by the schedule.

    plan: parameter name -> how it is shipped (export_plan).
    """

    # What a checkpoint keeps of these attributes
    PROGRESS = (
        "data",
        "steps",
        "lengths",
        "skipped",
        "resumed",
        "elapsed",
        "reserve",
        "step_seconds",
        "warmed",
        "recompiles",
        "code_sha256",
    )

    def __init__(
        self, cfg: Config, run: Run, model: GPT, plan: dict, split: Split, val: Validation
    ):
        self.cfg = cfg
        self.run = run
        self.model = model
        self.plan = plan
        self.split = split
        self.val = val
        self.bytes_per_token = val.target_bytes.double().mean().item()
        # Where the steps find their rows: another set would be another run
        self.data = [*(path.name for path in split.paths), split.tokens, val.n]

        self.accumulate = step_shape(cfg, run, cfg.train_seq_len).micro_batches

        self.forward = run.compiled(model)
        self.flat = FlatParameters(dict(model.named_parameters()), run)
        self.writer = concurrent.futures.ThreadPoolExecutor(1)
        self.writing: concurrent.futures.Future | None = None  # of the last checkpoint
        self.trained_here = False  # whether this launch trains, and so has compiled what does
        self.restart()

    def restart(self) -> None:
        """Everything but the weights as before the first step."""
        cfg, run = self.cfg, self.run
        run.activity.clear()
        self.schedule = Schedule(cfg)
        self.optimiser = Optimiser(self.flat, cfg, run)
        self.views = WeightViews(cfg, run, self.model, self.flat, self.plan)
        self.averages = Averages(cfg, run, self.model, self.flat, self.plan)
        run.activity.update(schedule_toggles(cfg))
        self.model.loops = cfg.num_loops

        self.loss = math.nan  # of the last step, nats per token
        self.val_bpb = math.nan  # of the last validation
        self.steps = 0
        self.lengths: list[int] = []  # tokens of a row in each of them
        self.skipped: list[int] = []  # steps that were left out, as they were not finite
        self.resumed: list[int] = []  # steps done when the run went on
        self.elapsed = 0.0  # seconds of training
        self.keep_back(0.0)
        self.step_seconds: list[float] = []
        self.agreed = 0.0  # `elapsed` after the steps whose seconds all ranks know
        self.own_elapsed: float | None = None  # `elapsed` by this rank's clock, if one is unknown
        self.warmed: list[float] = []  # of the warm-up's steps of the first form, but the first
        self.recompiles = 0
        self.saved = 0.0  # `elapsed` of the last checkpoint
        self.told = -math.inf  # `elapsed` of the last line about a step
        self.code_sha256 = CODE_SHA256

    def keep_back(self, seconds: float) -> None:
        """Leaves so much of the budget for what reads training text after the last step."""
        self.reserve = seconds
        self.paced = left_for_steps(self.cfg, seconds)
        self.schedule.cfg = self.paced

    def done(self) -> bool:
        if self.steps >= self.cfg.iterations:
            return True
        coming = careful_step(self.step_seconds) if self.step_seconds else 0.0
        return budget_spent(self.paced, self.steps, self.elapsed, coming)

    @property
    def tokens_seen(self) -> int:
        return self.steps * self.cfg.train_batch_tokens

    @property
    def epochs(self) -> float:
        """Tokens seen, as a multiple of those that there are."""
        return self.tokens_seen / self.split.tokens

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint; the moments only while there are steps to come.

        There is no random state: weights and noise depend on SEED and step, as do the data.
        """
        groups = self.averages.tensors()
        if not self.done():
            groups["first"] = self.flat.views(self.optimiser.first_moments)
            groups["second"] = {}
            for name, w in self.flat.views(self.optimiser.second_moments).items():
                if self.model.get_parameter(name).role.optimiser != "muon":
                    groups["second"][name] = w

        named = {}
        for group, weights in groups.items():
            for name, w in weights.items():
                named[f"{group}/{name}"] = w
        return named

    def facts(self) -> dict:
        """What a checkpoint says beside its tensors, as JSON can hold it."""
        snapshots = self.averages.snapshots
        activity = {n: dataclasses.asdict(a) for n, a in self.run.activity.items()}
        # the checkpoint is of the end of the last step: what is booked since is lost with a kill
        ledger = self.run.ledger()
        if "train" in ledger:
            ledger["train"] = self.elapsed
        return {
            "ledger": ledger,
            "launches": self.run.launches,
            "warnings": [*self.run.warnings],
            "config": self.cfg.knobs("seed", *COMPARED),
            "fired": dict(self.schedule.fired),
            "progress": {name: copy.copy(getattr(self, name)) for name in self.PROGRESS},
            "metrics_bytes": self.run.jsonl.tell(),
            "activity": activity,
            "snapshots": snapshots.count if snapshots else 0,
        }

    def save(self, wait: bool = True) -> list[str]:
        """A checkpoint of this moment: copied at once, written now or beside the next steps.

        Returns the names of the tensors that are not finite, for which there is none (`wait` only).
        Host sync: the copy, and the writing of the checkpoint before.
        """
        self.agree()
        if not self.done():
            # Each rank has the Muon momenta of its own share alone
            self.flat.gather(self.flat.shares(self.optimiser.first_moments))
        self.saved = self.elapsed
        if self.run.rank != 0:
            return []

        # before the copy, so that there is never more than one; or its error
        bad = self.writing.result() if self.writing else []
        if bad:
            self.run.warn(f"no checkpoint: {bad[0]} is not finite")
        facts = self.facts()
        tensors = {name: w.to("cpu", copy=True) for name, w in self.tensors().items()}
        self.writing = self.writer.submit(write_checkpoint, self.run.dir, tensors, facts)
        return self.writing.result() if wait else []

    def restore(self, facts: dict, tensors: State) -> None:
        """The inverse of save. Refusal when the file does not belong to these settings."""
        try:
            self.restore_progress(facts["progress"])
            self.saved = self.agreed = self.elapsed
            if self.steps:
                self.told = self.elapsed  # the line of the first step is in the log
            self.schedule.restore(facts["fired"])
            count = int(facts["snapshots"])
            if self.averages.snapshots:
                self.averages.snapshots.count = count
            self.check_rows()
            for name, w in self.tensors().items():
                w.copy_(tensors[name].view_as(w))
            for state in self.optimiser.adamw.state.values():
                state["step"].fill_(self.steps - len(self.skipped))
            self.restore_activity(facts["activity"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Refusal(
                f"{self.cfg.sources[0]}: incomplete ({type(error).__name__} {error}); train again"
            ) from None

    def restore_progress(self, progress: dict) -> None:
        kept = {name: copy.copy(progress[name]) for name in self.PROGRESS}
        for name, value in kept.items():
            if type(value) is not type(getattr(self, name)):
                raise TypeError("odd progress")
        if any(type(length) is not int or length < 1 for length in kept["lengths"]):
            raise TypeError("odd lengths of rows")
        refuse(
            kept["data"] != self.data and not self.cfg.checkpoint,
            f"DATA_PATH={self.cfg.data_path}: not the run's data",
        )
        for name, value in kept.items():
            setattr(self, name, value)
        self.keep_back(self.reserve)

    def check_rows(self) -> None:
        """Refusal where the steps to come would cut the text otherwise than those before."""
        if not self.lengths or self.cfg.checkpoint or self.done():
            return
        length = self.lengths[-1]
        shape = step_shape(self.cfg, self.run, length)
        ranks = self.cfg.train_batch_tokens // length // (self.cfg.grad_accum_steps or 1)
        refuse(
            shape.length != length,
            f"{self.cfg.sources[0]}: LOADER=documents would go on with micro-batches of "
            f"{shape.length} tokens, as {self.run.world} ranks have them, after {length}: other "
            f"text; take {ranks} ranks",
        )

    def restore_activity(self, activity: dict) -> None:
        """A file may hold anything: whatever is no number ends as a TypeError here, not later."""
        for name in self.run.activity:
            self.run.activity[name] = Activity(**copy.deepcopy(activity[name]))
        numbers = sum(self.step_seconds + self.warmed + self.skipped + self.resumed)
        for toggle in self.run.activity.values():
            toggle.row(numbers)

    # One step

    def step(self, batch: Batch | Refusal, now: StepPlan) -> None:
        """One optimiser step on the rows of this rank; `now`: what the schedule says of it.

        Refusal of all ranks, and nothing is updated, where one of them has no rows.
        Host sync: one, when the update is under way, so that a GPU always has work.
        """
        refusal = batch if isinstance(batch, Refusal) else None
        self.model.loops = now.loops
        self.flat.gradients.zero_()
        if refusal:
            self.flat.refused.fill_(1)
        else:
            latent = self.views.enter(now, self.steps)
            self.model.longest_piece = self.cfg.longest_piece(now.length or self.cfg.train_seq_len)
            self.backward(batch)
            self.model.longest_piece = self.cfg.doc_max_len
            self.views.leave(latent)
        if self.run.stop:
            self.flat.stop.fill_(1)
        if self.own_elapsed and self.run.rank == 0:
            self.flat.seconds.fill_(self.run.world * (self.own_elapsed - self.agreed))
        self.flat.reduce(self.cfg.grad_clip_norm)
        self.optimiser.step(now)
        self.loss, norm, self.stopping, refused, seconds = self.flat.outcome()
        if seconds:
            self.take_over(self.agreed + seconds)
        if refused:
            raise self.run.first_refusal(refusal)
        if math.isfinite(self.loss + norm):
            self.take_in(now)
        else:
            self.leave_out(norm)
        self.steps += 1
        self.lengths.append(batch[0].shape[1])

    def backward(self, batch: Batch) -> None:
        """Adds to the gradients and the loss behind them, both as this rank's part of the mean."""
        share = self.run.world / self.cfg.train_batch_tokens
        ids, targets = (part.tensor_split(self.accumulate) for part in batch)
        for micro_ids, micro_targets in zip(ids, targets, strict=True):
            loss = self.forward(micro_ids, micro_targets).sum() * share
            loss.backward()
            self.flat.loss += loss.detach()

    def take_in(self, now: StepPlan) -> None:
        """The new weights into the averages; notes which toggles have acted."""
        effects = self.schedule.effects(now)
        for name, effect in effects.items():
            self.run.activity[name].effect = effect
        acting = self.views.acting(now) + self.averages.update(now.snapshot)
        for name in (*acting, *effects):
            self.run.activity[name].steps.append(self.steps)

    def leave_out(self, norm: float) -> None:
        """Loss or gradients are not finite: the step is left out, or ends the run (exit code 5)."""
        gradients = self.flat.views(self.flat.gradients)
        bad = [name for name, g in gradients.items() if not g.isfinite().all()]
        problem = (
            f"step {self.steps}: not finite: loss {self.loss}, gradient norm {norm}, "
            f"first gradient: {bad[0] if bad else 'none'}"
        )
        remedy = "lower MATRIX_LR or GRAD_CLIP_NORM"
        remedy = with_slots(remedy, self.model.prepare_documents)
        # The ninth last one that was left out is nine steps back: nine in a row before this one
        too_many = self.skipped[-9:-8] == [self.steps - 9]
        refuse(
            self.cfg.nonfinite == "stop" or too_many,
            f"{problem}; {remedy}; NONFINITE=skip leaves out up to 9 such steps in a row",
            5,
        )
        self.run.log(f"WARNING: {problem}; left out")
        self.skipped.append(self.steps)

    # The run

    def warm_up(self) -> dict[Form, list[float]]:
        """Runs all that the run will need, so that nothing compiles on the clock, and undoes it.

        Returns the seconds of each step, by its form. The first ones are those that compile.
        """
        cfg, run = self.cfg, self.run
        weights = self.flat.weights.clone()
        variants = [view.at_full_strength() for view in self.views.techniques.values()]
        variants.append(StepPlan(1.0, cfg.muon_momentum))
        snapshot = self.averages.snapshots is not None
        seconds = {form: [] for form in self.schedule.forms()}
        # each form with each variant; where there are several, once more for its speed
        each = max(len(variants), 2) if len(seconds) > 1 else len(variants)
        steps = max(cfg.warmup_steps, each * len(seconds))
        if steps > cfg.warmup_steps:
            forms = ", ".join(f"{loops} x {length}" for loops, length in seconds)
            why = f"{each} of each form (loops x tokens of a row: {forms})"
            run.log(f"WARMUP_STEPS={cfg.warmup_steps}: {steps} are taken, {why}")
        loader = Loader(cfg, run, self.split)
        for n, form in zip(range(steps), itertools.cycle(seconds), strict=False):
            began = time.perf_counter()
            run.at_work(f"step {n + 1} of {steps}")
            now = variants[n // len(seconds) % len(variants)]._replace(**form._asdict())
            now = now._replace(snapshot=snapshot and n % 2 == 0)
            self.step(loader.next(now.length), now)
            seconds[form].append(time.perf_counter() - began)
        loader.close()

        if cfg.val_loss_every:
            for loops in dict.fromkeys(form.loops for form in seconds):
                self.model.loops = loops
                self.score_weights()
        self.flat.weights.copy_(weights)
        self.restart()
        return seconds

    def train(self, saved: tuple | None = None) -> None:
        """Steps, from the beginning or from what was saved, until ITERATIONS or the budget ends."""
        run = self.run
        self.trained_here = True
        with run.phase("warm-up and compile"):
            seconds = run.broadcast(self.warm_up())
            # the run begins with steps of the first form
            self.warmed = next(iter(seconds.values()))[1:]
            self.usual = {form: statistics.median(s[1:] or s) for form, s in seconds.items()}
            self.keep_back(self.calibration_seconds())
            self.foretell("warm-up", warn=not saved)
        if saved:
            self.restore(*saved)  # again: the warm-up has undone it
            self.resumed.append(self.steps)
        with run.phase("first checkpoint"):
            self.save()  # shows, before anything is spent, that the disk takes it

        compiled = torch._dynamo.utils.counters["stats"]
        graphs = compiled["unique_graphs"]
        loader = Loader(self.cfg, run, self.split, self.lengths)
        try:
            with run.phase("train"):
                last = self.loop(loader)
            self.elapsed = run.broadcast(run.ledger()["train"])
            self.recompiles += compiled["unique_graphs"] - graphs
            with run.phase("last checkpoint"):
                loader.close()  # waits for what is being read ahead
                self.close(last)
            self.model.loops = self.cfg.num_loops  # as it is scored
        except Refusal as stop:
            self.save_what_is_left(stop)
            raise
        if run.stop:
            run.signalled(run.stop, None)

    def foretell(self, speed: str, warn: bool = False, ratio: float = 1.0) -> None:
        """Says when what will begin, and what is wrong with that.

        At the speed of the warm-up, for each form of a step, times this ratio.
        """
        seen = forecast(self.paced, lambda now: ratio * self.usual[now.loops, now.length])
        self.run.log(f"schedule ({speed} speed): {timeline(seen)}")
        if warn:
            for text in averaging_warnings(self.cfg, seen):
                self.run.warn(text)

    def loop(self, loader: Loader) -> StepPlan:
        """Step after step; returns what the last one did.

        Refusal of all ranks, after the same step, when one was told to stop.
        """
        run = self.run
        while True:
            typical = typical_step(self.warmed + self.step_seconds[-RECENT_STEPS:])
            now = self.schedule.at(self.steps, self.elapsed, typical)
            self.step(loader.next(now.length), now)
            self.count_seconds()
            run.at_work(self.standing())
            if self.done():
                break
            self.report(now)
            self.obey()
        self.agree()
        return now

    def count_seconds(self) -> None:
        """Another step on the clock of rank 0, by which all ranks go.

        The next step's gradients bring its seconds along; until then it counts as a typical one. A
        message brings them at once where no typical step is known, and in the last LAST_SECONDS.
        """
        self.own_elapsed = self.run.tick()
        typical = typical_step(self.step_seconds)
        self.elapsed = self.agreed + typical
        last = 0 < self.paced.max_wallclock_seconds < self.elapsed + LAST_SECONDS
        if self.run.world == 1 or last or not typical:
            self.agree()

    def agree(self) -> None:
        """The seconds of the last step on all ranks, by a message if they are not known."""
        if self.own_elapsed:
            self.take_over(self.run.broadcast(self.own_elapsed))

    def take_over(self, elapsed: float) -> None:
        """What the clock of rank 0 said after the last step."""
        self.step_seconds.append(elapsed - self.agreed)
        self.elapsed = self.agreed = elapsed
        self.own_elapsed = None

    def close(self, last: StepPlan) -> None:
        """What is due after the last step, when the clock of training has stopped."""
        self.report(last)
        self.obey()
        self.run.log(
            f"trained {self.steps} steps in {self.elapsed:.1f} s; "
            f"recompiles after the clock started: {self.recompiles}"
        )
        self.run.log(f"read {self.tokens_seen:,} training tokens: {self.epochs:.3g} epochs")
        self.save()

    def obey(self) -> None:
        """Refusal of all ranks when one was told to stop before the step that is done."""
        number = self.run.stop or signal.SIGTERM
        refuse(self.stopping, f"stopped by {signal.Signals(number).name}", 128 + number)

    def save_what_is_left(self, stop: Refusal) -> None:
        """A checkpoint before the run ends early: no step is half done, and all ranks are here.

        None where the weights of the ranks differ (6).
        """
        if stop.code == 6:
            return
        bad = self.save()
        what = f"not saved, as {bad[0]} is not finite," if bad else "saved"
        self.run.log(
            f"{what} after {self.steps} steps; RESUME=1 RUN_ID={self.run.dir.name} goes on from "
            "the last checkpoint"
        )

    # What is said and done between two steps

    def report(self, now: StepPlan) -> None:
        """Whatever is due after this step. Host sync: only in what is due."""
        cfg, run, step = self.cfg, self.run, self.steps
        # whether the next step might end after Progress has spoken
        silent = self.elapsed - self.told + self.step_seconds[-1]
        waited = silent >= QUIET_SECONDS - 2 * REFRESH_SECONDS
        log_due = step % cfg.train_log_every == 0 or waited or self.done()
        save_due = 0 < cfg.checkpoint_every <= self.elapsed - self.saved

        self.report_starts(now)
        if log_due or save_due:
            self.compare_ranks()
        if log_due:
            self.report_step(now)
        if step == 50:
            with run.phase("schedule"):  # it looks at every step to come
                usual = sum(self.usual[self.schedule.form(n)] for n in range(step))
                self.foretell("measured", ratio=self.elapsed / usual)
        if cfg.val_loss_every and step % cfg.val_loss_every == 0:
            self.validate()
        if save_due:
            self.save(wait=False)

    def report_starts(self, now: StepPlan) -> None:
        """One line for every toggle that has acted for the first time, or its stage."""
        step = self.steps - 1
        for name, began in self.schedule.fired.items():
            if began == step and name in self.schedule.stages:
                self.run.log(f"{name} from step {step} ({self.elapsed:.1f} s)")
        for name, toggle in self.run.activity.items():
            if toggle.steps == [step]:
                scale = f"lr scale {now.lr_scale:.3f}"
                if name not in STAGED:
                    self.run.log(f"{name} acts from step {step} ({self.elapsed:.1f} s, {scale})")
                self.run.event("phase", name=name, step=step, seconds=self.elapsed)

    def compare_ranks(self) -> None:
        """Refusal (exit code 6) if the ranks' weights differ in any bit. A host sync."""
        sums = self.flat.checksums()
        refuse(
            len(set(sums)) > 1,
            f"step {self.steps}: the ranks hold different weights (sums of their bits: {sums}); "
            f"look for faulty hardware, then RESUME=1 RUN_ID={self.run.dir.name}",
            6,
        )

    def speed(self) -> tuple[float, str]:
        """Seconds of a step, the median of the last ones, and tokens per second as text."""
        seconds = statistics.median(self.step_seconds[-20:])
        return seconds, f"{self.cfg.train_batch_tokens / seconds:,.0f} tok/s"

    def standing(self) -> str:
        """Where training stands, for those who watch."""
        cfg = self.cfg
        seconds, speed = self.speed()
        left = (cfg.iterations - self.steps) * seconds
        if cfg.max_wallclock_seconds:
            left = min(left, self.paced.max_wallclock_seconds - self.elapsed)
        val = f"val bpb {self.val_bpb:.4f}, " if math.isfinite(self.val_bpb) else ""
        return f"step {self.steps:,}, loss {self.loss:.4f}, {val}{speed}, {left:.0f} s left"

    def report_step(self, now: StepPlan) -> None:
        """The line of the log, and its event."""
        self.told = self.elapsed
        seconds, speed = self.speed()
        train_bpb = self.loss / math.log(2) / self.bytes_per_token
        self.run.log(
            f"step {self.steps:5d}  {self.elapsed:6.1f} s  loss {self.loss:.4f}  "
            f"train bpb ~{train_bpb:.4f}  lr x{now.lr_scale:.3f}  {seconds * 1e3:.1f} ms  "
            f"{speed}"
        )
        self.run.event(
            "step",
            step=self.steps,
            seconds=self.elapsed,
            loss=self.loss,
            step_ms=seconds * 1e3,
            **now._asdict(),
        )

    def validate(self) -> None:
        """Score of the live weights and an estimate of the size, off the clock. A host sync."""
        size = 0
        with self.run.phase("validate"):
            live = self.score_weights()
            if self.run.rank == 0:
                weights = dict(self.model.named_parameters())
                parts = quantised(self.cfg, weights, self.plan)
                artifact = encode_artifact(self.cfg, parts, level=1)
                size = len(shipped_code(self.cfg)) + len(artifact)
        self.val_bpb = live.bpb
        model = "live, fixed windows"
        if self.model.loops < self.cfg.num_loops:
            model += f", {self.model.loops} of {self.cfg.num_loops} loops"
        self.run.log(
            f"step {self.steps:5d}  val bpb {live.bpb:.4f} ({model})  "
            f"size ~{size:,} bytes (fast compression)"
        )
        self.run.event(
            "val",
            step=self.steps,
            seconds=self.elapsed,
            val_bpb=live.bpb,
            val_loss=live.loss,
            size_estimate=size,
        )

    def calibration_seconds(self) -> float:
        """GPTQ_RESERVE_SECONDS; or what a calibration will take, as measured, and a tenth."""
        cfg, run = self.cfg, self.run
        if not (cfg.gptq_enabled and cfg.max_wallclock_seconds):
            return 0.0
        if cfg.gptq_reserve_seconds >= 0:
            return cfg.gptq_reserve_seconds
        run.at_work("how long a calibration takes")
        # what a first use costs is paid here: loading, compiling, what is allocated
        self.hessians(1)
        one, three = (run.milliseconds(partial(self.hessians, n)) / 1e3 for n in (1, 3))
        each = max(three - one, 0.0) / 2
        # the first one also has what comes with each calibration
        seconds = run.broadcast(1.1 * (one + (cfg.gptq_calibration_batches - 1) * each))
        run.log(f"GPTQ: {seconds:.2f} s of the budget are kept back for its calibration")
        problem = long_calibration(cfg, seconds)
        refuse(problem, problem)
        return seconds

    def hessians(self, batches: int) -> dict[str, Tensor]:
        """What collect_hessians finds on so many more steps of training rows, of all ranks.

        Per token, with the masks of training and the weights and loops that the model has now.
        Refusal of all ranks where one has no rows, or where the inputs are not finite (5).
        """
        cfg, run = self.cfg, self.run
        coded = [name for name, how in self.plan.items() if isinstance(how, Grid)]
        loader = Loader(cfg, run, self.split, self.lengths)
        refusals = []

        def own_ids() -> Iterator[Tensor]:
            for n in range(batches):
                run.at_work(f"batch {n + 1} of {batches}")
                batch = loader.next(cfg.train_seq_len)
                if isinstance(batch, Refusal):
                    refusals.append(batch)
                    return
                yield from batch[0].tensor_split(self.accumulate)

        self.model.longest_piece = cfg.longest_piece(cfg.train_seq_len)
        totals = collect_hessians(self.model, own_ids(), coded)
        self.model.longest_piece = cfg.doc_max_len
        loader.close()

        refused = torch.tensor(float(len(refusals)))
        if run.world > 1:
            dist.all_reduce(refused)
        if refused:
            raise run.first_refusal(next(iter(refusals), None))
        for name, total in totals.items():
            if run.world > 1:
                dist.all_reduce(total)
            total.div_(batches * cfg.train_batch_tokens)
            problem = f"GPTQ: the inputs of {name} are not finite; lower the learning rates"
            refuse(not total.isfinite().all(), problem, 5)
        return totals

    def score_weights(self, state: State | None = None) -> Score:
        """These (default: the live, latent) weights on fixed windows, with the loops of now."""
        self.model.load_state_dict(state or {}, strict=False)
        return score(self.cfg, self.run, self.forward, self.val)


def left_for_steps(cfg: Config, reserve: float) -> Config:
    """The settings by which steps are planned, where so many seconds of the budget are kept."""
    budget = max(cfg.max_wallclock_seconds - reserve, 0.0)
    return without_part(cfg, "max_wallclock_seconds", budget)


def long_calibration(cfg: Config, seconds: float) -> str:
    """What is wrong with a calibration that takes so long; empty: nothing."""
    if seconds <= 0.5 * cfg.max_wallclock_seconds:
        return ""
    return (
        f"GPTQ_CALIBRATION_BATCHES={cfg.gptq_calibration_batches}: would take {seconds:.1f} s, "
        f"over half of MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}; lower it"
    )


@torch.no_grad()
def collect_hessians(
    model: GPT, batches: Iterable[Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """Name -> the sum of x x' over the inputs x of this matrix, (columns, columns) fp32.

    Of each of these names that is the weight of a Linear, or the token embedding: as a head, which
    reads the final hidden state. Looped blocks add up over their visits. batches: ids (rows, time).
    """
    totals = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        if name not in totals:
            totals[name] = x.new_zeros(x.shape[1], x.shape[1])
        totals[name].addmm_(x.T, x)

    def watch(module: Linear, inputs: tuple[Tensor], name: str) -> None:
        add(name, inputs[0])

    wanted = set(names)
    hooks = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, Linear) and weight in wanted:
            hooks.append(module.register_forward_pre_hook(partial(watch, name=weight)))
    try:
        for ids in batches:
            hidden = model.hidden(ids)
            if "tok_emb" in wanted:
                add("tok_emb", hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return totals


# ── 10 Artifact ───────────────────────────────────────────────────────────────────────────────────
# In: fp32 weights by name, and a plan that says how each is shipped. Out: one file, and back.
# Promise: what is read back is `restored` from the parts that were written, bit for bit; a damaged
# or hostile file ends in a Refusal, in bounded time and memory, and nothing in it is ever run (no
# pickle).

MAGIC = b"GOLFGPT\n"
FORMAT_VERSION = 4
HEADER = struct.Struct("<8sHHQ32s")  # its fields: see container
MAX_FILE_BYTES = 1 << 33
MAX_RAW_BYTES = 1 << 28  # of a compressed file, once decompressed
LZMA_MEMORY = 1 << 27
ZSTD_FRAME = 1 << 17  # bytes
BROTLI_WINDOW = 24  # log2 of bytes


class Compressor(NamedTuple):
    """compress(raw, level) -> blob; decompress(blob, n) -> its first n bytes; the usual level.

    arranges: its payload is `arranged`.
    """

    compress: Callable[[bytes, int], bytes]
    decompress: Callable[[bytes, int], bytes]
    level: int
    arranges: bool = False


def store(raw: bytes, level: int) -> bytes:
    return raw


def first_bytes(blob: bytes, n: int) -> bytes:
    return blob[:n]


def zlib_decompress(blob: bytes, n: int) -> bytes:
    return zlib.decompressobj().decompress(blob, n)


def zstd_compress(raw: bytes, level: int) -> bytes:
    """Independent frames, made on all cores: each kind of tensor gets its own statistics."""
    pieces = [raw[i : i + ZSTD_FRAME] for i in range(0, len(raw), ZSTD_FRAME)]
    compressor = zstandard.ZstdCompressor(level=level)
    frames = compressor.multi_compress_to_buffer(pieces, threads=-1)
    return b"".join(bytes(frame) for frame in frames)


def zstd_decompress(blob: bytes, n: int) -> bytes:
    reader = zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True)
    return reader.read(n)


def lzma_compress(raw: bytes, level: int) -> bytes:
    return lzma.compress(raw, preset=level)


def lzma_decompress(blob: bytes, n: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=LZMA_MEMORY).decompress(blob, n)


def brotli_compress(raw: bytes, level: int) -> bytes:
    return brotli.compress(raw, quality=level, lgwin=BROTLI_WINDOW)


def brotli_decompress(blob: bytes, n: int) -> bytes:
    decoder = brotli.Decompressor()
    pieces = [decoder.process(blob, output_buffer_limit=n)]
    left = n - len(pieces[0])
    while left > 0 and not decoder.is_finished() and not decoder.can_accept_more_data():
        pieces.append(decoder.process(b"", output_buffer_limit=left))
        left -= len(pieces[-1])
    return b"".join(pieces)[:n]


# A file names its compressor by the place in this table; the last one makes the smallest files.
COMPRESSORS = {
    "none": Compressor(store, first_bytes, 0),
    "zlib": Compressor(zlib.compress, zlib_decompress, 9),
    "zstd": Compressor(zstd_compress, zstd_decompress, 22),
    "lzma": Compressor(lzma_compress, lzma_decompress, 6),
    "brotli": Compressor(brotli_compress, brotli_decompress, 11, arranges=True),
    # brotli too, for what is not in the stream of codes
    "ans": Compressor(brotli_compress, brotli_decompress, 11, arranges=True),
}


class NotOurs(Exception):
    """What a file holds that `container` would not have made."""


def demand(fine, problem: str) -> None:
    if not fine:
        raise NotOurs(problem)


# ANS. The codes become one stream of their own (below); brotli takes the rest of the file.
MAX_CODES = 1 << 26  # that a stream may hold
MAX_LINES = 1 << 20  # rows and columns of its matrices
MAX_FACTS = 1 << 20  # bytes of JSON
SHORTEST = 8  # row or column
LANE = 1 << 14  # codes per lane
RESIDUES = 251  # a prime: see CodeModel.groups
GROUP_CODES = 1 << 20
RANS_BITS = 15
RANS_TOTAL = 1 << RANS_BITS  # to which the frequencies of one class sum
WORD_BITS = 16
WORD_MASK = (1 << WORD_BITS) - 1
STATE_MIN = 1 << WORD_BITS  # a lane's state stays in [2^16, 2^32)
STATE_BITS = 32
VARIANCE_BITS = 16  # of the fraction of a variance
FINEST = 4  # fine classes of variance to one class
MAX_TRUST = 12
SEEN = 16  # what a code that was seen adds to its count
EXPECTED = 128 * SEEN  # what a class's counts sum to before


def ans_encode(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ANS: the codes of the file in one stream of a range asymmetric numeral system.

    What:   in place of each `NAME:codes`, int8 (rows, columns), its share of `:stream`, 16-bit
            words, and a line in `:coded`, JSON as int8.
    Why:    rows and columns differ in spread. With frequencies for each spread, learnt on the way,
            a code takes close to its entropy, which no general compressor reaches.
    Source: Duda 2013, arXiv:1311.2540; toggle COMPRESSOR=ans.
    Care:   all of CodeModel is integers, but for a few operations that IEEE 754 rounds the same
            everywhere, so the decoder of another machine sees the same frequencies. A matrix of
            which brotli makes less stays as it is: rows that are alike, as of tokens never seen.
    """
    codes = {}
    codes_left, lines_left = MAX_CODES, MAX_LINES
    for name, t in sorted(tensors.items()):
        matrix = name.endswith(":codes") and t.ndim == 2 and min(t.shape) >= SHORTEST
        fits = t.numel() <= codes_left and sum(t.shape) <= lines_left
        if matrix and fits and not alike_rows(t):
            codes[name] = t.cpu().numpy()
            codes_left -= t.numel()
            lines_left -= sum(t.shape)
    if not codes:
        return tensors

    model = CodeModel(described(codes))
    slots = model.coded(np.concatenate([t.ravel() for t in codes.values()]))
    parts = {name: t for name, t in tensors.items() if name not in codes}
    text = json.dumps(model.facts, separators=(",", ":")).encode()
    if len(text) > MAX_FACTS:
        return tensors
    parts[":coded"] = torch.frombuffer(bytearray(text), dtype=torch.int8)
    parts[":stream"] = torch.from_numpy(rans_encode(slots, model.lanes).view(np.int16))
    return parts


def ans_decode(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ans_encode was given.

    Raises ValueError, LookupError, TypeError or RuntimeError on parts that it would not have made.
    """
    facts, stream = parts[":coded"], parts[":stream"]
    if facts.nbytes > MAX_FACTS:
        raise ValueError(f"facts of {facts.nbytes:,} bytes")
    model = CodeModel(json.loads(facts.numpy().tobytes()))
    # two words begin a lane, and a code adds one at most
    fits = 2 * model.lanes <= len(stream) <= 2 * model.lanes + model.count
    if stream.dtype != torch.int16 or stream.ndim != 1 or not fits:
        raise ValueError("a stream that does not fit")
    flat = model.decoded(RansDecoder(stream.numpy().view(np.uint16).astype(int), model.lanes))

    tensors = {name: t for name, t in parts.items() if name not in (":coded", ":stream")}
    sizes = (model.rows * model.columns).tolist()
    for name, codes in zip(model.facts["codes"], torch.from_numpy(flat).split(sizes), strict=True):
        if name in tensors:
            raise ValueError("codes that are there twice")
        tensors[name] = codes.view(model.facts["codes"][name][:2])
    return tensors


def alike_rows(codes: Tensor) -> bool:
    """Whether one row in 16 correlates above 0.8 with another, among at most 1,024 of them.

    Such are embeddings of tokens never seen: all have been moved alike. Rows of less than 32 codes
    may look alike by chance.
    """
    if codes.shape[1] < 32:
        return False
    rows = codes[:: -(-len(codes) // 1024)].cpu().float()
    rows = F.normalize(rows - rows.mean(0), dim=1)
    correlation = (rows @ rows.T).fill_diagonal_(0)
    return bool((correlation.amax(1) > 0.8).float().mean() > 1 / 16)


class MatrixFacts(NamedTuple):
    """What a CodeModel is told of a matrix. Classes are of variances: see fine_classes.

    Trust is log2 of the number of codes that a line must show before its own variance counts as
    much as the usual one.
    """

    rows: int
    columns: int
    fine: int  # fine class of all its codes
    row_fine: int  # of a usual row
    row_trust: int
    column_fine: int
    column_trust: int


def described(codes: dict[str, np.ndarray]) -> dict:
    """The facts of a CodeModel: the least and the largest symbol, with 0 between, and name ->
    MatrixFacts."""
    facts = {}
    for name, t in codes.items():
        squares = t.astype(np.float64) ** 2
        variance = squares.mean() + 1 / 64
        chance = squares.var() / variance**2  # of one code
        of_rows, of_columns = (
            usual_line(squares.mean(axis), chance / t.shape[axis]) for axis in (1, 0)
        )
        facts[name] = MatrixFacts(*t.shape, fine_class(variance), *of_rows, *of_columns)
    lowest = min(0, *(int(t.min()) for t in codes.values()))
    largest = max(0, *(int(t.max()) for t in codes.values()))
    return {"symbols": [lowest, largest], "codes": facts}


def usual_line(squares: np.ndarray, chance: float) -> tuple[int, int]:
    """Fine class and trust of a usual line. squares: the mean of each; chance: how far these would
    be apart if all lines were alike."""
    logs = np.log(squares + 1 / 64)
    apart = logs.var() - chance
    trust = round(math.log2(2 / max(apart, 1e-9)))
    return fine_class(math.exp(logs.mean())), min(max(trust, 0), MAX_TRUST)


def fine_class(variance: float) -> int:
    return int(np.searchsorted(fine_classes(), int(variance * (1 << VARIANCE_BITS))))


@cache
def fine_classes() -> np.ndarray:
    """Variances in units of 2^-16, from 2^-6 to 2^14, 16 to an octave: integers on any machine."""
    classes = [1 << VARIANCE_BITS - 6]
    while classes[-1] < 1 << VARIANCE_BITS + 14:
        classes.append(classes[-1] + classes[-1] * 45 // 1024)
    return np.array(classes)


def expected_counts(lowest: int, largest: int) -> np.ndarray:
    """(classes, symbols) of a normal distribution of each class's variance, before a code is seen.

    Only operations that IEEE 754 rounds the same everywhere. exp(-x) is a fraction to the 8th.
    """
    middle = fine_classes()[FINEST // 2 :: FINEST] / (1 << VARIANCE_BITS)
    x = 1 / (2 * np.maximum(middle, 1 / 8))
    decay = (16 - x) / (16 + x)
    for _ in range(3):
        decay = decay * decay
    powers = np.cumprod(np.where(np.arange(129) == 0, 1, decay[:, None]), axis=1)
    odd_powers = powers[:, 1:] * powers[:, :-1]  # decay^(2 distance - 1)
    density = np.cumprod(np.concatenate((np.ones((len(x), 1)), odd_powers), axis=1), axis=1)
    weights = (density * (1 << 20)).astype(np.int64)
    weights = weights[:, np.abs(np.arange(lowest, largest + 1))]
    return weights * EXPECTED // weights.sum(1, keepdims=True).clip(1)


class CodeModel:
    """The frequencies of codes, from those already known: the same for encoder and decoder.

    facts: see described; ValueError or TypeError where it would not have made them. The codes of
    all matrices lie one after the other, by rows. They are coded in groups; with each the
    variances of rows and columns become better known. A code's fine class is that of its row plus
    that of its column minus that of the matrix; each class, of FINEST fine ones, counts its
    symbols.
    """

    def __init__(self, facts: dict):
        self.facts = facts
        self.lowest, largest = facts["symbols"]
        table = np.array(list(dict(facts["codes"]).values()))
        symbols_fit = -128 <= self.lowest <= 0 <= largest < 128
        if table.dtype != int or table.shape[1:] != (len(MatrixFacts._fields),) or not symbols_fit:
            raise ValueError("facts of codes that do not fit")
        self.rows, self.columns, self.fine, *of_lines = table.T
        widest = len(fine_classes()) - 1
        of_line = (widest, MAX_TRUST)
        least = MatrixFacts(SHORTEST, SHORTEST, 0, 0, 0, 0, 0)
        most = MatrixFacts(MAX_LINES, MAX_LINES, widest, *of_line, *of_line)
        fits = (table >= least).all() and (table <= most).all()
        self.count = sum(rows * columns for rows, columns, *_ in table.tolist())
        lines = int(table[:, :2].sum())
        if not fits or self.count > MAX_CODES or lines > MAX_LINES:
            raise ValueError(f"{self.count:,} codes with facts that do not fit")

        self.lanes = -(-self.count // LANE)
        self.starts = np.cumsum(self.rows * self.columns) - self.rows * self.columns
        self.counts = expected_counts(self.lowest, largest)
        self.lines = [Lines(self.rows, *of_lines[:2]), Lines(self.columns, *of_lines[2:])]

    def groups(self) -> Iterator[np.ndarray]:
        """The places of the codes that are coded together, in rising order.

        Places with the same remainder are spread evenly over rows and columns, unless a matrix has
        a multiple of RESIDUES columns. A group has a seventh of what is known: each learns much.
        """
        most = max(1, GROUP_CODES * RESIDUES // self.count)
        start = 0
        while start < min(RESIDUES, self.count):
            end = min(RESIDUES, start + min(most, max(1, start // 7)))
            blocks = np.arange(0, self.count, RESIDUES)
            places = (blocks[:, None] + np.arange(start, end)).ravel()
            yield places[places < self.count]
            start = end

    def classes(self, places: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """([row, column], class) of the codes there."""
        ends = np.searchsorted(places, np.append(self.starts, self.count))
        matrix = np.repeat(np.arange(len(self.starts)), np.diff(ends))
        row, column = np.divmod(places - self.starts[matrix], self.columns[matrix])
        where = []
        fine = -self.fine[matrix]
        for lines, line in zip(self.lines, (row, column), strict=True):
            where.append(line + lines.starts[matrix])
            fine = fine + lines.fine()[where[-1]]
        return where, (fine // FINEST).clip(0, len(self.counts) - 1)

    def frequency(self) -> np.ndarray:
        """(classes, symbols): their counts scaled so that each class sums to RANS_TOTAL, each >= 1.

        What rounding leaves goes to the most frequent one.
        """
        to_share = RANS_TOTAL - self.counts.shape[1]
        frequency = self.counts * to_share // self.counts.sum(1, keepdims=True) + 1
        frequency[range(len(frequency)), frequency.argmax(1)] += RANS_TOTAL - frequency.sum(1)
        return frequency

    def learn(self, where: list[np.ndarray], keys: np.ndarray, codes: np.ndarray) -> None:
        """The codes at these lines, with their keys: class times symbols, plus symbol."""
        seen = np.bincount(keys, minlength=self.counts.size)
        self.counts += SEEN * seen.reshape(self.counts.shape)
        for lines, line in zip(self.lines, where, strict=True):
            lines.learn(line, codes)

    def coded(self, codes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Frequency and slots before it, of each code's symbol, uint16, group by group."""
        slots = []
        for places in self.groups():
            where, spread = self.classes(places)
            frequency = self.frequency()
            keys = spread * frequency.shape[1] + codes[places] - self.lowest
            both = (frequency, slots_before(frequency))
            slots.append(tuple(values.ravel()[keys].astype(np.uint16) for values in both))
            self.learn(where, keys, codes[places])
        return slots

    def decoded(self, decoder: RansDecoder) -> np.ndarray:
        """(codes,) int8, all that the decoder's stream holds."""
        codes = np.empty(self.count, np.int8)
        for places in self.groups():
            where, spread = self.classes(places)
            keys = decoder.keys(spread, self.frequency())
            codes[places] = keys % self.counts.shape[1] + self.lowest
            self.learn(where, keys, codes[places])
        decoder.finish()
        return codes


class Lines:
    """The variances of the rows (or columns) of all matrices, from the codes known so far.

    lengths, usual, trusts: of each matrix, the number of its lines and its facts of them.
    """

    def __init__(self, lengths: np.ndarray, usual: np.ndarray, trusts: np.ndarray):
        self.starts = np.cumsum(lengths) - lengths
        self.known = np.repeat(1 << trusts, lengths)
        self.squares = np.repeat(fine_classes()[usual] << trusts, lengths)

    def fine(self) -> np.ndarray:
        """The fine class of each line."""
        return np.searchsorted(fine_classes(), self.squares // self.known)

    def learn(self, line: np.ndarray, codes: np.ndarray) -> None:
        lines = len(self.known)
        self.known += np.bincount(line, minlength=lines)
        squares = np.bincount(line, codes.astype(np.float64) ** 2, lines)
        self.squares += squares.astype(np.int64) << VARIANCE_BITS


def slots_before(frequency: np.ndarray) -> np.ndarray:
    """The first of the slots that belong to each symbol: the sum of the frequencies before it."""
    return frequency.cumsum(1) - frequency


def slot_owners(frequency: np.ndarray, least: int, most: int) -> np.ndarray:
    """Class times slots, plus slot -> key; of the classes `least` to `most`, from 0 on."""
    keys = np.arange(frequency.size, dtype=np.uint16).reshape(frequency.shape)
    return np.repeat(keys[least : most + 1].ravel(), frequency[least : most + 1].ravel())


# How it works. A state x is one number that holds all symbols so far. In 2^15 slots a symbol owns
# `f`, from slot `before` on. To code it: x -> (x // f) * 2^15 + before + x % f; x grows by the
# symbol's log2(2^15 / f) bits. To decode: slot = x % 2^15 tells the symbol, and its inverse is
# x -> f * (x // 2^15) + slot - before. Last in, first out: the encoder goes backwards.
# A state too large for 32 bits first sends 16 of them to the stream; the decoder fetches them when
# a state is too small. Many states, the lanes, go side by side, so that numpy has work to do.
def rans_encode(slots: list[tuple[np.ndarray, np.ndarray]], lanes: int) -> np.ndarray:
    """The encoder: frequency and slots before, of each symbol of each group -> (words,) uint16.

    First the upper halves of the final states, then the lower, then the words in the order in which
    the decoder wants them.
    """
    states = np.full(lanes, STATE_MIN)
    sent = []
    for group in reversed(slots):
        owned, before = (values.astype(np.int64) for values in group)
        for start in reversed(range(0, len(owned), lanes)):
            f = owned[start : start + lanes]
            state = states[: len(f)]
            full = state >= f << (STATE_BITS - RANS_BITS)
            sent.append(state[full] & WORD_MASK)
            state[full] >>= WORD_BITS
            whole, rest = np.divmod(state, f)
            state[:] = (whole << RANS_BITS) + rest + before[start : start + lanes]
    words = np.concatenate((states >> WORD_BITS, states & WORD_MASK, *reversed(sent)))
    return words.astype(np.uint16)


class RansDecoder:
    """The decoder. words: the stream, int64, at least two per lane."""

    def __init__(self, words: np.ndarray, lanes: int):
        self.words = words
        self.states = words[:lanes] << WORD_BITS | words[lanes : 2 * lanes]
        self.place = 2 * lanes

    def keys(self, spreads: np.ndarray, frequency: np.ndarray) -> np.ndarray:
        """Class times symbols, plus symbol, of the next codes, which have these classes."""
        owned = frequency.ravel()
        before = slots_before(frequency).ravel()
        least = spreads.min()
        owner = slot_owners(frequency, least, spreads.max())
        keys = np.empty(len(spreads), np.int64)
        lanes = len(self.states)
        for start in range(0, len(spreads), lanes):
            spread = spreads[start : start + lanes]
            state = self.states[: len(spread)]
            slot = state & (RANS_TOTAL - 1)
            key = owner[(spread - least << RANS_BITS) + slot]
            keys[start : start + lanes] = key
            state = owned[key] * (state >> RANS_BITS) + slot - before[key]
            small = np.flatnonzero(state < STATE_MIN)
            fetched = self.words[self.place : self.place + len(small)]
            state[small] = state[small] << WORD_BITS | fetched
            self.place += len(small)
            self.states[: len(spread)] = state
        return keys

    def finish(self) -> None:
        """ValueError unless this is where the encoder began."""
        if self.place != len(self.words) or (self.states != STATE_MIN).any():
            raise ValueError("the stream does not end with its codes")


# Bytes, or uint8 (n,)
Piece = bytes | np.ndarray

# The types of tensors in a file, in the order in which safetensors lays them out
FILE_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
}


def arranged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same names, types and shapes, whose bytes lie so that brotli makes less.

    Of all floats of a type first each one's first byte, then each one's second: exponents are much
    alike, and the rest is noise. Codes wider than tall lie by columns: hidden units, which differ
    in spread, are then read one after the other.
    """
    found = dict(tensors)
    for name, t in tensors.items():
        if are_wide_codes(t):
            found[name] = t.T.reshape(t.shape).contiguous()
    for names, flat in floats_by_type(tensors):
        by_number = flat.view(torch.uint8).view(len(flat), -1)
        found |= split_as(by_number.T.flatten().view(flat.dtype), tensors, names)
    return found


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `arranged` was given."""
    found = dict(tensors)
    for name, t in tensors.items():
        if are_wide_codes(t):
            found[name] = t.reshape(t.shape[::-1]).T.contiguous()
    for names, flat in floats_by_type(tensors):
        by_place = flat.view(torch.uint8).view(-1, len(flat))
        found |= split_as(by_place.T.flatten().view(flat.dtype), tensors, names)
    return found


def are_wide_codes(t: Tensor) -> bool:
    return t.dtype == torch.int8 and t.ndim == 2 and t.shape[1] > t.shape[0]


def floats_by_type(tensors: dict[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """The names of all floats of a type, and their numbers (n,) one after the other."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        names = sorted(name for name, t in tensors.items() if t.dtype == dtype)
        flat = [tensors[name].detach().cpu().flatten() for name in names]
        if sum(map(len, flat)):
            yield names, torch.cat(flat)


def split_as(flat: Tensor, tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """These numbers in the shapes of the tensors of these names."""
    pieces = flat.split([tensors[name].numel() for name in names])
    return {
        name: piece.view(tensors[name].shape) for name, piece in zip(names, pieces, strict=True)
    }


def serialise(tensors: dict[str, Tensor], facts: dict, arrange: bool = False) -> list[Piece]:
    """safetensors with the facts as JSON in its metadata, in pieces: the header, then each tensor.

    arrange: they lie as `arranged`, and the metadata says so.

    Byte for byte what safetensors.torch.save makes. That copies all tensors, and other threads wait
    for it; here those in the host's memory are not copied.
    """
    order = list(FILE_TYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header = {"__metadata__": {"facts": json.dumps(facts)}}
    if arrange:
        header["__metadata__"]["arranged"] = "1"
        tensors = arranged(tensors)
    pieces = []
    end = 0
    for name in names:
        t = tensors[name].detach().contiguous().cpu()
        start = end
        end += t.nbytes
        offsets = [start, end]
        header[name] = {"dtype": FILE_TYPES[t.dtype], "shape": [*t.shape], "data_offsets": offsets}
        pieces.append(t.view(-1).view(torch.uint8).numpy())
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *pieces]


def deserialise(raw: bytes) -> tuple[dict, dict[str, Tensor]]:
    """(facts, tensors) that serialise was given."""
    tensors = safetensors.torch.load(raw)
    (length,) = struct.unpack_from("<Q", raw)
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    if "arranged" in metadata:
        tensors = in_order(tensors)
    if ":stream" in tensors:
        tensors = ans_decode(tensors)
    for name, t in tensors.items():
        demand(t.isfinite().all(), f"tensor {name} is not finite")
    return dict(json.loads(metadata["facts"])), tensors


def container(
    tensors: dict[str, Tensor], facts: dict, compressor: str, level: int = -1
) -> list[Piece]:
    """The file format of artifacts and checkpoints, in pieces. level -1: the compressor's usual.

    HEADER, little-endian, then the payload:
        byte  0   8 bytes   MAGIC
        byte  8   2 bytes   FORMAT_VERSION
        byte 10   2 bytes   compressor: its place in COMPRESSORS
        byte 12   8 bytes   size of the payload before compression
        byte 20  32 bytes   sha256 of the rest of the file
        byte 52             the compressed payload: safetensors, with the facts as JSON
    """
    if compressor == "ans":
        tensors = ans_encode(tensors)
    how = COMPRESSORS[compressor]
    payload = serialise(tensors, facts, how.arranges)
    size = sum(map(len, payload))
    if compressor != "none":
        payload = [how.compress(b"".join(payload), how.level if level < 0 else level)]

    digest = hashlib.sha256()
    for piece in payload:
        digest.update(piece)
    number = list(COMPRESSORS).index(compressor)
    return [HEADER.pack(MAGIC, FORMAT_VERSION, number, size, digest.digest()), *payload]


def encode_container(
    tensors: dict[str, Tensor], facts: dict, compressor: str, level: int = -1
) -> bytes:
    """The container in one piece."""
    return b"".join(container(tensors, facts, compressor, level))


def read_container(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(facts, tensors). Refusal on anything that `container` would not have made."""
    try:
        header, blob = read_plain_file(path)
        return deserialise(decompress_checked(header, blob))
    except NotOurs as damage:
        problem = str(damage)
    except OSError as error:
        code = 2 if isinstance(error, FileNotFoundError) else 7
        remedy = "give the path of a file that a run has written"
        raise Refusal(f"{path}: {error.strerror}; {remedy}", code) from None
    except (
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        zlib.error,
        lzma.LZMAError,
        zstandard.ZstdError,
        brotli.error,
        safetensors.SafetensorError,
    ) as error:
        problem = f"unreadable ({type(error).__name__})"
    raise Refusal(f"{path}: {problem}; not one of our files, or damaged: make it again")


def read_plain_file(path: Path) -> tuple[bytes, bytes]:
    """(header, the rest). The header is checked before the rest is read."""
    small = path.stat().st_size < MAX_FILE_BYTES
    demand(small and path.is_file(), "no plain file below 8 GiB")
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        ours = header.startswith(MAGIC) and len(header) == HEADER.size
        demand(ours, "no GOLFGPT header")
        return header, file.read()


def decompress_checked(header: bytes, blob: bytes) -> bytes:
    """The payload, once version, compressor, size and checksum are as they should be."""
    _, version, number, size, digest = HEADER.unpack(header)
    demand(
        version == FORMAT_VERSION,
        f"format version {version}, but this script reads {FORMAT_VERSION}",
    )
    compressors = list(COMPRESSORS.values())
    largest = MAX_RAW_BYTES if number else len(blob)
    fits = number < len(compressors) and 8 < size <= largest
    demand(
        fits and hashlib.sha256(blob).digest() == digest,
        f"compressor {number}, size {size:,}, or checksum differs",
    )
    raw = compressors[number].decompress(blob, size + 1)  # one byte too many would show
    demand(len(raw) == size, f"holds {len(raw):,} bytes instead of {size:,}")
    return raw


def write_atomic(path: Path, *pieces: Piece) -> None:
    """All of the file or none of it, also when the machine stops in between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def role_grid(cfg: Config, name: str, role: Role) -> Grid:
    """The grid of a tensor with this role: QUANT_BITS_MLP and QUANT_CLIP_MLP, say."""
    kind = role.bits.removeprefix("quant_bits_")
    bits = getattr(cfg, role.bits)
    clip = getattr(cfg, f"quant_clip_{kind}")
    if clip == "auto":
        clip = cfg.quant_clip
    sigmas = getattr(cfg, f"{kind}_clip_sigmas")
    if is_looped(cfg, name):
        bits = cfg.loop_layer_bits or bits
        sigmas = cfg.loop_layer_clip_sigmas or sigmas
    if clip != "sigma":
        sigmas = 0.0
    return Grid(bits, clip, cfg.quant_codes, cfg.quant_scale_floor, sigmas)


def is_looped(cfg: Config, name: str) -> bool:
    """Whether a parameter belongs to a block that is passed several times."""
    words = name.split(".")
    if not cfg.num_loops or words[0] != "blocks":
        return False
    return cfg.loop_start <= int(words[1]) <= cfg.loop_end


def export_plan(cfg: Config, model: GPT) -> dict[str, Grid | torch.dtype]:
    """How each tensor is shipped: the one decision that views, averages and the exporter share.

    Refusal of a pattern that no name of a tensor contains.
    """
    parameters = dict(model.named_parameters())
    for pattern in kept_patterns(cfg):
        if not any(pattern in name for name in parameters):
            raise Refusal(unknown_pattern(pattern, parameters))
    return {name: planned(cfg, name, p) for name, p in parameters.items()}


def kept_patterns(cfg: Config) -> list[str]:
    """What a tensor's name contains, if it ships in fp16 whatever its size."""
    patterns = [pattern.strip() for pattern in cfg.fp16_keep_name_patterns.split(",")]
    return [pattern for pattern in patterns if pattern]


def unknown_pattern(pattern: str, names: Iterable[str]) -> str:
    """The line about a pattern that is in none of these names, with the likeliest part of one."""
    parts = set()
    for name in names:
        words = name.split(".")
        for start, end in itertools.combinations(range(len(words) + 1), 2):
            parts.add(".".join(words[start:end]))
    close = difflib.get_close_matches(pattern, sorted(parts), 1, 0.4) or ["tok_emb or attn.c_k"]
    remedy = f"no tensor has it in its name; did you mean {close[0]}? Else leave it out"
    return f"FP16_KEEP_NAME_PATTERNS={pattern}: {remedy}"


def planned(cfg: Config, name: str, p: nn.Parameter) -> Grid | torch.dtype:
    if p.role.gate and cfg.gated_attn_quant_gate:
        return GATE_GRID
    if p.role.bits is None:
        return torch.float16 if cfg.control_dtype == "fp16" else torch.float32
    kept = any(pattern in name for pattern in kept_patterns(cfg))
    small = p.ndim < 2 or p.numel() <= cfg.keep_float_max_numel
    if kept or small or getattr(cfg, p.role.bits) == 16:
        return torch.float16
    return role_grid(cfg, name, p.role)


# A tensor as it ships: "" is a float; "codes" and "scale" are those of a grid, and "left" and
# "right", each with its "_scale", what corrects them
Parts = dict[str, Tensor]


def rounded(w: Tensor, how: Grid | torch.dtype) -> Parts:
    """One tensor as planned, each weight rounded for itself."""
    if isinstance(how, Grid):
        codes, scale = how.quantise(w)
        return {"codes": codes, "scale": scale}
    return {"": w.to(how)}


Hessians = dict[str, Tensor]  # what Trainer.hessians makes


def quantised(
    cfg: Config, state: State, plan: dict, hessians: Hessians | None = None
) -> dict[str, Parts]:
    """Name -> parts of every tensor of an artifact. Its inverse is shipped_state.

    With GPTQ_ENABLED what has a Hessian is rounded by it: matrices of one grid and shape at once.
    Refusal where a Hessian needs more GPTQ_DAMP.
    """
    parts = {name: {} for name in state}
    stacks = {}
    for name, w in state.items():
        if hessians and name in hessians and cfg.gptq_enabled:
            stacks.setdefault((plan[name], w.shape), []).append(name)
        else:
            parts[name] = rounded(w.detach(), plan[name])
    for (grid, _), names in stacks.items():
        w = torch.stack([state[name].detach() for name in names])
        h = torch.stack([hessians[name] for name in names])
        try:
            codes, scales = gptq(grid, w, h, cfg.gptq_damp)
        except Indefinite as found:
            raise Refusal(too_little_damping(cfg, names[found.place])) from None
        if cfg.gptq_refit:
            scales = refitted(w, codes, scales, h)
        for name, *coded in zip(names, codes, scales, strict=True):
            parts[name] = dict(zip(("codes", "scale"), coded, strict=True))
    if cfg.lqer_enabled:
        add_corrections(cfg, state, parts, hessians or {})
    return parts


def too_little_damping(cfg: Config, name: str) -> str:
    return (
        f"GPTQ_DAMP={cfg.gptq_damp:g}: the Hessian of {name} has no Cholesky factor; raise "
        "GPTQ_DAMP, and export the checkpoint.bin of this run again with CHECKPOINT=PATH"
    )


def add_corrections(cfg: Config, state: State, parts: dict[str, Parts], hessians: Hessians) -> None:
    """LQER: a low-rank correction of the matrices that rounding has changed most.

    What:   weight = codes * scale + left @ right, where left (rows, rank) and right (rank, columns)
            are the rank largest singular triples of the error, in few bits. Of all matrices with
            codes the LQER_TOP_K with the largest Frobenius norm of the error.
    Why:    what GPTQ feeds forward piles up in a few directions, and those cost few bytes.
    Source: LQER (arXiv 2402.02446), #1797; toggle LQER_ENABLED. LQER_FIT=refit is our own.
    Care:   as #1797 packs it, with 2 bits, -2..1, and the step that the largest entry asks for,
            the left factor has -1, 0 and 1 alone, and of most triples nothing but zeros.
    """
    errors = {}
    for name, tensor in parts.items():
        if "codes" in tensor:
            errors[name] = (state[name].detach() - restored(tensor)).norm().item()
    for name in sorted(errors, key=errors.get, reverse=True)[: cfg.lqer_top_k]:
        error = state[name].detach() - restored(parts[name])
        if cfg.lqer_fit == "refit":
            try:
                factors = refit_correction(cfg, error, hessians.get(name))
            except Indefinite:
                raise Refusal(too_little_damping(cfg, name)) from None
        else:
            factors = svd_correction(cfg, error)
        parts[name] |= factors


def restored(parts: Parts) -> Tensor:
    """The fp32 weights that a reader makes of the parts."""
    if "" in parts:
        return parts[""].float()
    w = Grid.dequantise(parts["codes"], parts["scale"])
    if "left" in parts:
        w += correction(parts)
    return w


def shipped_state(parts: dict[str, Parts]) -> State:
    return {name: restored(tensor) for name, tensor in parts.items()}


def as_shipped(w: Tensor, how: Grid | torch.dtype) -> Tensor:
    """The fp32 weights that a reader gets for w, rounded as it is."""
    return restored(rounded(w, how))


def encode_artifact(cfg: Config, parts: dict[str, Parts], level: int | None = None) -> bytes:
    """A container of the parts; its facts: the knobs that a reader needs."""
    tensors = {}
    for name, tensor in parts.items():
        for part, t in tensor.items():
            tensors[part_name(name, part)] = t
    facts = cfg.knobs("model", "eval")
    level = cfg.compress_level if level is None else level
    return encode_container(tensors, facts, cfg.compressor, level)


def part_name(name: str, part: str) -> str:
    """What a part of a tensor is called in a file."""
    return f"{name}:{part}" if part else name


def read_artifact(path: Path) -> tuple[dict, State]:
    """(knobs, fp32 weights) of an artifact. Refusal as in read_container."""
    knobs, parts = read_parts(path)
    return knobs, shipped_state(parts)


def read_parts(path: Path) -> tuple[dict, dict[str, Parts]]:
    """(knobs, parts by name) of an artifact. Refusal as in read_container."""
    knobs, tensors = read_container(path)
    parts = {}
    for name, t in tensors.items():
        base, _, part = name.partition(":")
        refuse(part_name(base, part) != name, f"{path}: tensor {name}: {NOT_OUR_ARTIFACT}")
        parts.setdefault(base, {})[part] = t
    for name, tensor in parts.items():
        refuse(not are_parts(tensor), f"{path}: tensor {name}: {NOT_OUR_ARTIFACT}")
    return knobs, parts


NOT_OUR_ARTIFACT = "not one of our artifacts; export it again"


def are_parts(parts: Parts) -> bool:
    """Whether this is one float, or int8 codes (rows, columns) and fp16 scales (rows, 1), perhaps
    with a correction of their shape."""
    types = {part: t.dtype for part, t in parts.items()}
    if types in ({"": torch.float16}, {"": torch.float32}):
        return True
    grid = {"codes": torch.int8, "scale": torch.float16}
    factors = {f"{part}{more}": t for part in ("left", "right") for more, t in FACTOR_TYPES.items()}
    if types not in (grid, grid | factors):
        return False
    codes = parts["codes"]
    if codes.ndim != 2 or parts["scale"].shape != (codes.shape[0], 1):
        return False
    return "left" not in parts or is_correction(parts)


FACTOR_TYPES = {"": torch.int8, "_scale": torch.float16}


def is_correction(parts: Parts) -> bool:
    """Whether the factors fit the codes, and the steps of each fit the factor: of the left one a
    step for all, for each row or each column, of the right one a step for so many values."""
    rows, columns = parts["codes"].shape
    left, right = parts["left"], parts["right"]
    if left.ndim != 2 or not 0 < left.shape[1] <= min(rows, columns):
        return False
    rank = left.shape[1]
    if left.shape != (rows, rank) or right.shape != (rank, columns):
        return False
    steps = parts["right_scale"]
    shared = steps.ndim == 2 and steps.shape[1] == 1 and len(steps)
    fits = shared and right.numel() % len(steps) == 0
    return bool(fits and parts["left_scale"].shape in ((1, 1), (rows, 1), (1, rank)))


def order0_bits(codes: Tensor) -> float:
    """Entropy of one of these int8 codes, in bits, by one histogram of all."""
    counts = (codes.flatten().int() + 128).bincount()
    nats = torch.special.entr(counts.double() / codes.numel()).sum().item()
    return nats / math.log(2)


def code_size(cfg: Config, parts: dict[str, Parts], total: int) -> dict:
    """How well the codes are compressed in an artifact of `total` bytes; {} where it has none.

    Their number, their order-0 entropy in bytes, and the bytes that codes and scales take.
    """
    codes = []
    floats = {}
    for name, tensor in parts.items():
        if "codes" in tensor:
            codes.append(tensor["codes"].flatten())
        else:
            floats[name] = tensor

    symbols = torch.cat(codes or [torch.empty(0)])
    bits = len(symbols) * order0_bits(symbols)
    if not bits:
        return {}
    return dict(
        compressor=cfg.compressor,
        weights=len(symbols),
        order0_bytes=int(bits / 8),
        stored_bytes=total - len(encode_artifact(cfg, floats)),
    )


def kind_of(role: Role) -> str:
    """Which bits ship a parameter: mlp, attn, ...; control: none do."""
    return (role.bits or "control").removeprefix("quant_bits_")


def sizes_by_kind(
    cfg: Config, model: GPT, state: State, parts: dict[str, Parts]
) -> dict[str, dict]:
    """Per kind of tensor: how many, parameters, bytes when compressed alone (fast), and the root
    mean square of the rounding error: what the parts restore, minus `state`."""
    kinds = {}
    for name, p in model.named_parameters():
        kinds.setdefault(kind_of(p.role), []).append(name)

    sizes = {}
    for kind, names in kinds.items():
        part = {name: parts[name] for name in names}
        errors = torch.cat([(restored(part[name]) - state[name]).flatten() for name in names])
        sizes[kind] = dict(
            tensors=len(part),
            params=len(errors),
            bytes=len(encode_artifact(cfg, part, 1)),
            rms_error=errors.square().mean(dtype=torch.float64).sqrt().item(),
        )
    return sizes


PACKED_NAME = "train_gpt.packed.py"  # in the folder of a run, beside train_gpt.py
# In a submission, whose train_gpt.py is the packed one
READABLE_NAME = "train_gpt.readable.py"
MAX_SOURCE_BYTES = 1 << 24
XZ_PRESET = 9 | lzma.PRESET_EXTREME

# The packed script. It runs the source under the name of the file that holds it readable, and
# gives the lines of tracebacks itself, should that file not be there.
LOADER = """\
# train_gpt.py, packed without loss by PACK_CODE=lzma. To read it: train_gpt.readable.py beside it,
# or put print(__source__.decode()) in place of the last line.
import base64, linecache, lzma, sys, traceback

__source__ = lzma.decompress(base64.b85decode("{code}"))
__readable__ = __file__.removesuffix(".py") + ".readable.py"
__lines__ = __source__.decode().splitlines(keepends=True)
linecache.cache[__readable__] = len(__source__), None, __lines__, __readable__
if __name__ == "__main__":
    sys.excepthook = traceback.print_exception  # asks linecache; the built-in one may not
exec(compile(__source__, __readable__, "exec"))
"""


@cache
def pack_code(source: bytes, how: str) -> bytes:
    """Packed code: the script that is counted and shipped.

    What:   "lzma": LOADER with the source as xz in base85, one file of ASCII text that runs as
            the source does; "none": the source itself.
    Why:    code counts towards the cap; packed without loss it is about a third.
    Source: what records ship; toggle PACK_CODE.
    Care:   lossless, so SOURCE and the hash of the code are the same when run packed.
    """
    if how == "none":
        return source
    code = base64.b85encode(lzma.compress(source, preset=XZ_PRESET)).decode()
    return LOADER.replace("{code}", code).encode()


def unpack_code(script: bytes) -> bytes:
    """The source in a packed script. ValueError on any that pack_code would not have made.

    Nothing of the script is run: it has to be LOADER, but for the code.
    """
    head, tail = (part.encode() for part in LOADER.split("{code}"))
    if not (script.startswith(head) and script.endswith(tail)):
        raise ValueError("no packed script of this loader")
    code = script[len(head) : len(script) - len(tail)]
    try:
        source = lzma_decompress(base64.b85decode(code), MAX_SOURCE_BYTES + 1)
    except (ValueError, lzma.LZMAError) as error:
        raise ValueError(f"no packed source ({error})") from None
    if len(source) > MAX_SOURCE_BYTES:
        raise ValueError(f"a source above {MAX_SOURCE_BYTES:,} bytes")
    return source


def shipped_code(cfg: Config) -> bytes:
    """The script whose bytes count: in the size estimate, FIT_TO_CAP, the cap and result.json."""
    return pack_code(SOURCE, cfg.pack_code)


def write_code(cfg: Config, folder: Path) -> None:
    """The script as it was run, readable; and packed, where that is what counts."""
    write_atomic(folder / "train_gpt.py", SOURCE)
    if cfg.pack_code != "none":
        write_atomic(folder / PACKED_NAME, shipped_code(cfg))


# Compressor -> its bytes, without steps and floats, / the entropy of normal codes. Plain brotli's
# are 1.0113 in the five logs of #1394, 36 million trained weights; times the ratios of the others
# to it on five small checkpoints (logs/bench/coders.json). Those take 3 to 6 % less than this:
# with them are tokens that training has never seen, whose rows are alike.
OVER_ENTROPY = {"zlib": 1.174, "zstd": 1.048, "lzma": 1.051, "brotli": 1, "ans": 0.981}
# Bytes of an fp16 step, and of another fp16 number, once compressed; files of records
STEP_BYTES = 1.34
FLOAT_BYTES = 1.8


class SizeForecast(NamedTuple):
    """Bytes of an artifact before there are weights: from their shapes and grids."""

    entropy: float  # of the codes of normal rows, order 0
    rest: float  # steps, floats and corrections, compressed
    at_most: bool  # a floor of the steps makes codes smaller, as the weights are small

    def artifact(self, compressor: str) -> int:
        return round(self.entropy * OVER_ENTROPY[compressor] + self.rest)


@cache
def normal_bits(grid: Grid, columns: int) -> float:
    """Order-0 entropy, in bits per weight, of the codes of normally distributed rows.

    SDClip fixes the step in standard deviations; elsewhere the largest of a row has the top code,
    and of so many columns that is about the median of their maximum.
    """
    normal = statistics.NormalDist()
    reach = grid.sigmas
    if grid.clip != "sigma":
        reach = normal.inv_cdf((1 + 0.5 ** (1 / columns)) / 2)
    step = reach / grid.top
    below = [normal.cdf((code + 0.5) * step) for code in range(grid.lowest, grid.top)]
    shares = [high - low for low, high in itertools.pairwise([0.0, *below, 1.0])]
    return -sum(p * math.log2(p) for p in shares if p > 0)


def forecast_size(cfg: Config, plan: dict, shapes: dict[str, Sequence[int]]) -> SizeForecast:
    """What an artifact of tensors of these shapes will take, as planned.

    Rows of trained matrices are normal to three digits, so that k of SDClip sets the size.
    """
    entropy = 0.0
    rest = 0.0
    floor = False
    coded = []
    for name, shape in shapes.items():
        how = plan[name]
        count = math.prod(shape)
        if isinstance(how, Grid):
            rows, columns = shape
            entropy += count * normal_bits(how, columns) / 8
            rest += rows * STEP_BYTES
            floor = floor or how.floor
            coded.append((count, rows, columns))
        else:
            rest += count * FLOAT_BYTES * how.itemsize / 2
    if cfg.lqer_enabled:
        # of the largest matrices, which are mostly those with the largest error
        for _, rows, columns in sorted(coded)[-cfg.lqer_top_k :]:
            left, right = cfg.lqer_factor_bits, cfg.lqer_factor_bits
            if cfg.lqer_fit == "svd" and cfg.lqer_asym_enabled:
                left, right = 2, 4
            rest += cfg.lqer_rank * (rows * left + columns * right) / 8
    return SizeForecast(entropy, rest, floor)


class Exported(NamedTuple):
    """The artifact, and what it took."""

    blob: bytes  # on rank 0; empty on the others
    parts: dict[str, Parts]  # what it holds; empty where the blob is
    total: int  # bytes with the code
    cfg: Config  # with the COMPRESSOR that was used
    pruned: float  # share of each large matrix
    plan: dict  # how each tensor ships
    stretch: float = 1.0  # x the standard deviations of SDClip, to fit the cap
    stretch_saved: int = 0  # bytes, by that


def prune(cfg: Config, state: State, fraction: float) -> State:
    """Pruning: the smallest weights of each large matrix become 0.

    What:   in each 2-D tensor above KEEP_FLOAT_MAX_NUMEL weights, w = 0 where |w| is below its
            quantile `fraction`: that lies between two magnitudes, and the upper one stays.
    Why:    zeros compress well, and the smallest weights are missed least.
    Source: #989; toggle PRUNE_PCT.
    Care:   weights of equal magnitude stay or go together, so fewer than the fraction may go.
            #989 prunes above 65,536 weights whatever ships as fp16: not its bigram projection.
    """
    pruned = dict(state)
    if not fraction:
        return pruned
    for name, w in state.items():
        if w.ndim == 2 and w.numel() > cfg.keep_float_max_numel:
            below = math.ceil(fraction * (w.numel() - 1))
            stays = w.abs().flatten().kthvalue(below + 1).values
            pruned[name] = torch.where(w.abs() < stays, 0.0, w)
    return pruned


def export_pruned(
    cfg: Config, run: Run, state: State, plan: dict, hessians: Hessians, fraction: float
) -> Exported:
    """One try with this share pruned. Rank 0 does the work and tells the others the size.

    Refusal of all ranks, as of `quantised`.
    """
    blob = b""
    parts = {}
    total = 0
    refusal = None
    run.at_work(f"{cfg.compressor}, {fraction:.1%} pruned")
    if run.rank == 0:
        try:
            parts = quantised(cfg, prune(cfg, state, fraction), plan, hessians)
            blob = encode_artifact(cfg, parts)
            total = len(blob) + len(shipped_code(cfg))
        except Refusal as found:
            refusal = found
            total = -1
    total = run.broadcast(total)
    if total < 0:
        raise run.first_refusal(refusal)
    run.log(f"export: {cfg.compressor}, {fraction:.1%} pruned, {total:,} bytes in all")
    return Exported(blob, parts, total, cfg, fraction, plan)


def export(
    cfg: Config, run: Run, state: State, plan: dict, hessians: Hessians | None = None
) -> Exported:
    """The artifact of these weights. Over the cap it is shipped too: the exit code tells."""
    made = export_pruned(cfg, run, state, plan, hessians, cfg.prune_pct)
    if cfg.fit_to_cap and made.total > cfg.cap_bytes:
        made = fit_to_cap(run, state, plan, hessians, made)
    return made


PRUNE_STEP = 0.005
PRUNE_MOST = 0.9


# k of SDClip is raised at most so far, in so many tries, each but the first by as much as takes at
# least this share of the file
STRETCH_MOST = 2.0
STRETCH_TRIES = 8
STRETCH_LEAST = 0.001


def stretched(plan: dict, stretch: float) -> dict:
    """The plan with k of each grid of SDClip so many times as large."""
    wider = dict(plan)
    for name, how in plan.items():
        if isinstance(how, Grid) and how.clip == "sigma":
            wider[name] = how._replace(sigmas=how.sigmas * stretch)
    return wider


def stretch_that_saves(cfg: Config, plan: dict, shapes: dict, stretch: float, size: float) -> float:
    """The least stretch, at most STRETCH_MOST, that is forecast to take `size` bytes less than
    this one."""

    def forecast(stretch: float) -> int:
        return forecast_size(cfg, stretched(plan, stretch), shapes).artifact(cfg.compressor)

    wanted = forecast(stretch) - size
    low, high = stretch, STRETCH_MOST
    while high - low > 1e-4:
        middle = (low + high) / 2
        if forecast(middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def stretch_to_cap(run: Run, state: State, hessians: Hessians, made: Exported) -> Exported:
    """The export with k of SDClip raised until it fits; the last try where none does."""
    cfg = made.cfg
    plan = made.plan
    shapes = {name: w.shape for name, w in state.items()}
    before = made.total
    for attempt in range(STRETCH_TRIES):
        size = made.total - cfg.cap_bytes
        if attempt:
            size = max(size, STRETCH_LEAST * made.total)
        stretch = stretch_that_saves(cfg, plan, shapes, made.stretch, size)
        run.log(f"fit to cap: the standard deviations of SDClip x {stretch:.4f}")
        wider = stretched(plan, stretch)
        made = export_pruned(cfg, run, state, wider, hessians, cfg.prune_pct)
        made = made._replace(stretch=stretch, stretch_saved=before - made.total)
        if made.total <= cfg.cap_bytes or stretch == STRETCH_MOST:
            break
    return made


def fit_to_cap(run: Run, state: State, plan: dict, hessians: Hessians, made: Exported) -> Exported:
    """Fit to cap: what has become too large is exported again until it fits.

    What:   first with the compressor that makes the smallest files; then, with the smaller of
            the two, with k of SDClip raised, to at most twice; then with the least extra pruning
            that fits, in steps of 0.5 %.
    Why:    a run that ends over the cap is lost, one that has lost a little accuracy is not; and a
            coarser grid costs less of it than weights that become 0.
    Source: our own; toggle FIT_TO_CAP.
    Care:   sizes do not fall steadily as more is pruned, so no bisection. Where nothing fits,
            the smaller one of the first two is returned.
    """
    cfg = made.cfg
    smaller = made
    smallest = list(COMPRESSORS)[-1]
    if cfg.compressor != smallest:
        other = dataclasses.replace(cfg, compressor=smallest, compress_level=-1)
        made = export_pruned(other, run, state, plan, hessians, cfg.prune_pct)
        if made.total <= cfg.cap_bytes:
            return made
        if made.total < smaller.total:
            smaller = made

    widest = smaller
    if stretched(plan, 2.0) != plan:
        widest = stretch_to_cap(run, state, hessians, smaller)
        if widest.total <= cfg.cap_bytes:
            return widest

    steps = int((PRUNE_MOST - cfg.prune_pct) / PRUNE_STEP + 1.5)
    for step in range(1, steps):
        fraction = cfg.prune_pct + step * PRUNE_STEP
        made = export_pruned(widest.cfg, run, state, widest.plan, hessians, fraction)
        if made.total <= cfg.cap_bytes:
            return made._replace(stretch=widest.stretch, stretch_saved=widest.stretch_saved)
    return smaller


# ── 11 Score ──────────────────────────────────────────────────────────────────────────────────────
# In: a forward function, the validation tokens, rows of windows. Out: a Score, the same on any
# number of ranks.
# Promise: every target is scored exactly once, or the run ends with an error. That it is scored
# from the tokens before it alone is the model's promise: see 5.


class Score(NamedTuple):
    """Sums over all targets: bits per byte of text, nats per target, and what was counted.

    blocks: nats of each of BLOCKS stretches of the text, by which two scores are compared.
    acted: whether a way of scoring did what makes it another than plain scoring.
    plain: the same without the tilt, where there is one.
    pace: seconds per window, without the batch that compiled.
    """

    bpb: float
    loss: float
    targets: int
    bytes: int
    seconds: float = 0.0  # of its phase: the row of the ledger
    blocks: tuple[float, ...] = ()
    acted: bool = True
    plain: tuple[float, ...] = ()
    pace: float = 0.0

    def figures(self) -> dict:
        """For result.json."""
        named = ("bpb", "loss", "targets", "bytes", "seconds")
        return {name: getattr(self, name) for name in named}

    def without_tilt(self) -> Score:
        """What the model alone scores."""
        if not self.plain:
            return self
        nats = math.fsum(self.plain)
        bpb = nats / math.log(2) / self.bytes
        return self._replace(bpb=bpb, loss=nats / self.targets, blocks=self.plain, plain=())


# Of paired differences: so many that their mean is nearly normal, each of many tokens
BLOCKS = 64


def block_sums(nats: Tensor) -> tuple[float, ...]:
    """Sums of BLOCKS stretches of these nats, in fp64. A host sync."""
    parts = nats.double().flatten().tensor_split(min(BLOCKS, nats.numel()))
    return tuple(torch.stack([part.sum() for part in parts]).tolist())


def paired_margin(on: Sequence[float], off: Sequence[float], units: float) -> float:
    """Half of the 95 % interval of (sum(on) - sum(off)) / units: two standard errors.

    on, off: nats of the same stretches of text. What makes a stretch hard is in both, so that the
    spread of the differences is all that counts. NaN where there is but one.
    """
    differences = [a - b for a, b in zip(on, off, strict=True)]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return math.nan
    return 2 * statistics.stdev(differences) * math.sqrt(len(differences)) / units


def windows(low: int, high: int, length: int, stride: int) -> np.ndarray:
    """Sliding windows: rows (n, 3) [start, end, first] that score the targets [low, high) once.

    What:   each window reads up to `length` tokens and scores the last `stride` targets of them.
    Why:    a target is scored with more text before it than at the start of a fixed window.
    Source: toggle EVAL_STRIDE; 0: fixed windows.
    Care:   the first window scores all that it reads, or the first targets would be missing.

    A window reads the tokens [start, end), at most `length`, and scores the targets [first, end);
    target t is token t + 1. stride 0: windows side by side, each scores all that it reads. Else
    the first scores all that it reads, each later one `stride` new targets in full context.
    """
    if high <= low:
        first = np.arange(0)
    else:
        first = np.append(low, np.arange(low + length, high, stride or length))
    end = np.append(first[1:], high)[: len(first)]
    start = first if stride == 0 else np.maximum(end - length, low)
    return np.stack((start, end, first), axis=1)


class ScoreSheet:
    """Nats of every validation target, each written by one rank and counted.

    Every score adds 1 to the target's count, padding to that of one extra slot at the end. total()
    sums the counts over all ranks and fails unless each is 1: nothing is missed or scored twice.

    windows: how many all calls of fill() score; the live line counts up to it.
    """

    PAD_TOKENS = 64

    def __init__(self, cfg: Config, run: Run, val: Validation, windows: int):
        self.cfg = cfg
        self.run = run
        self.val = val
        self.n = val.n
        self.windows = windows
        self.filled = 0  # of these, on all ranks, where each has done as many batches as this one
        self.compiled = run.tick(), 0  # seconds and windows until nothing new compiles
        # nats of the model, how often scored, and nats that are tilted
        self.table = torch.zeros(2 + bool(val.tilt), self.n + 1, device=run.device)
        self.plain, self.hits = self.table[:2]
        self.nats = self.table[2 if val.tilt else 0]

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        """(n, 2): tokens that the forward pass reads for each window, and logits it computes.

        Tokens are padded on the right: to the full window where each new shape would compile, else
        to a multiple of 64, so that many windows share a batch. Logits cost more than all else in
        a small model, so a window that scores few targets computes EVAL_STRIDE of them only.
        0 logits stands for one at every token: the window scores all that it reads.
        """
        spans = rows[:, 1] - rows[:, 0]
        targets = rows[:, 1] - rows[:, 2]
        if self.run.compile:
            tokens = np.full(len(rows), self.cfg.window)
        else:
            padded = -(-spans // self.PAD_TOKENS) * self.PAD_TOKENS
            tokens = np.minimum(padded, self.cfg.window)

        stride = self.cfg.eval_stride
        slots = np.where(targets <= stride, np.minimum(stride, tokens), tokens)
        slots[targets == spans] = 0
        return np.stack((tokens, slots), axis=1)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[Tensor, int, int | None]]:
        """This rank's (windows (batch, 3) on the device, tokens per window, logits or None: all).

        Windows of one shape go together, the longest first; the batches are dealt to the ranks in
        turn, so that each has as much of each length. A compiled
        forward pass gets full batches only: windows with first = end, which score nothing, fill up.
        """
        size, world, rank = self.cfg.eval_batch_seqs, self.run.world, self.run.rank
        shapes = self.shapes(rows)
        turn = 0
        for tokens, slots in np.unique(shapes, axis=0)[::-1].tolist():
            alike = rows[(shapes == (tokens, slots)).all(axis=1)]
            filled = self.filled + len(alike)
            if self.run.compile:
                start_end_end = alike[:1, [0, 1, 1]]
                idle = np.repeat(start_end_end, -len(alike) % size, axis=0)
                alike = np.concatenate((alike, idle))
            for batch in torch.from_numpy(alike).to(self.run.device).split(size):
                # idle windows do not count
                self.filled = min(self.filled + len(batch), filled)
                if turn % world == rank:
                    own = batch, tokens, slots or None
                turn += 1
                if turn % world == 0:
                    yield own
        if turn % world > rank:
            yield own

    def read(
        self, batch: Tensor, tokens: int, slots: int | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """((ids, targets, positions) of these windows, for GPT.forward; where its nats belong).

        Behind a window's end stands one token again and again, which is no BOS: that would be a
        document each time. Attention is causal, so that changes nothing before it, and what is
        computed there goes to the extra slot.
        """
        val = self.val.tokens
        start, end, first = batch.split(1, dim=1)  # (batch, 1) each
        read = start + torch.arange(tokens, device=val.device)  # (batch, tokens)
        ids = val[read.minimum(end - 1)].long().where(read < end, BOS - 1)
        target = first + torch.arange(slots or tokens, device=val.device)  # (batch, slots)
        inside = target.minimum(end - 1)
        positions = inside - start if slots else None
        return (ids, self.wanted(inside), positions), (inside, target < end)

    def wanted(self, target: Tensor) -> Tensor:
        """The tokens whose nats these targets (batch, slots) need, as GPT.forward takes them."""
        tokens = self.val.tokens[target + 1].long()
        if not self.val.tilt:
            return tokens
        return torch.stack((tokens, self.val.tilt.tokens(target)))

    def write(self, target: Tensor, real: Tensor, nats: Tensor) -> Tensor:
        """Keeps the nats that wanted(target) asked for; where they are not real, nowhere.

        Returns those of the targets alone, without a tilt.
        """
        slot = torch.where(real, target, self.n)
        plain = nats
        if self.val.tilt:
            plain = nats[0]
            self.nats[slot] = self.val.tilt.tilted(target, *nats.detach())
        self.plain[slot] = plain.detach()
        self.hits.index_add_(0, slot.flatten(), torch.ones_like(plain.flatten()))
        return plain

    def pace(self) -> float:
        """Seconds per window until now, on all ranks."""
        seconds, filled = self.compiled
        return (self.run.tick() - seconds) / max(self.filled - filled, 1)

    def tell(self) -> None:
        """How far the scoring is, for those who watch."""
        if self.run.compile and not self.compiled[1]:
            self.compiled = self.run.tick(), self.filled
        left = self.pace() * (self.windows - self.filled)
        self.run.at_work(f"{self.filled:,} of {self.windows:,} windows, {left:.0f} s left")

    @torch.no_grad()
    def fill(self, forward: Callable, rows: np.ndarray) -> ScoreSheet:
        """Scores these windows: forward(ids, targets, positions) -> nats, as in GPT.forward."""
        for batch, tokens, slots in self.batches(rows):
            arguments, places = self.read(batch, tokens, slots)
            self.write(*places, forward(*arguments))
            self.tell()
        return self

    def total(self) -> Score:
        """Sums over all ranks, in fp64. RuntimeError unless every target was scored once."""
        if self.run.world > 1:
            dist.all_reduce(self.table)
        if not bool((self.hits[:-1] == 1).all()):
            raise RuntimeError("a target was scored never or twice")
        plain = block_sums(self.plain[:-1]) if self.val.tilt else ()
        nats = self.nats[:-1].double().sum().item()
        blocks = block_sums(self.nats[:-1])
        size = int(self.val.target_bytes.sum())
        bpb = nats / math.log(2) / size
        sums = Score(bpb, nats / self.n, self.n, size, blocks=blocks, plain=plain)
        return sums._replace(pace=self.pace())


def score(
    cfg: Config, run: Run, forward: Callable, val: Validation, rows: np.ndarray | None = None
) -> Score:
    """The score over these windows; without rows: fixed windows over all targets."""
    if rows is None:
        rows = windows(0, val.n, cfg.window, 0)
    return ScoreSheet(cfg, run, val, len(rows)).fill(forward, rows).total()


class ScoringWay(NamedTuple):
    """A way of scoring beside fixed windows, and the knob that asks for it.

    score(cfg, run, model, forward, val): the model, and its compiled forward pass.
    cost(cfg, run, val): (how many full windows of the fixed ones take as long, what makes it less).
    A backward pass counts as two forward ones, or as one where it is not of the weights.
    """

    toggle: str
    score: Callable[[Config, Run, GPT, Callable, Validation], Score]
    cost: Callable[[Config, Run, Validation], tuple[float, str]]

    def wanted(self, cfg: Config) -> bool:
        """Whether the knob is on."""
        knob = BY_NAME[self.toggle]
        return getattr(cfg, knob.name) not in knob.metadata["off"]


# In this order, as the last one changes the model; the last one that is on gives the result.
SCORING_WAYS: dict[str, ScoringWay] = {}


def full_windows(cfg: Config, run: Run, rows: np.ndarray) -> float:
    """So many full windows read as much as these rows. Each is padded to one where it compiles."""
    if run.compile:
        return len(rows)
    return (rows[:, 1] - rows[:, 0]).sum() / cfg.window


def score_sliding(cfg: Config, run: Run, model: GPT, forward: Callable, val: Validation) -> Score:
    """The score over sliding windows: see windows()."""
    return score(cfg, run, forward, val, windows(0, val.n, cfg.window, cfg.eval_stride))


def sliding_cost(cfg: Config, run: Run, val: Validation) -> tuple[float, str]:
    rows = windows(0, val.n, cfg.window, cfg.eval_stride)
    return full_windows(cfg, run, rows), "raise EVAL_STRIDE"


SCORING_WAYS["sliding"] = ScoringWay("EVAL_STRIDE", score_sliding, sliding_cost)


def document_spans(val: Validation) -> np.ndarray:
    """(n, 2): the targets [low, high) of each document, in the order of the text.

    The last target of a document is the BOS of the next one.
    """
    starts = np.flatnonzero(val.tokens[: val.n].cpu().numpy() == BOS)
    edges = np.unique([0, *starts, val.n])
    return np.stack((edges[:-1], edges[1:]), axis=1)


def document_windows(val: Validation, length: int, stride: int) -> np.ndarray:
    """The targets of windows(0, val.n, ...), none with context from before its document."""
    return np.concatenate([windows(a, b, length, stride) for a, b in document_spans(val)])


def score_documents(cfg: Config, run: Run, model: GPT, forward: Callable, val: Validation) -> Score:
    """Documents by themselves: no target is scored in the context of another document.

    What:   windows as ever (EVAL_STRIDE), but of one document each, from its BOS on.
    Why:    in the stream, what stands before a document says nothing about it.
    Source: #199; toggle DOC_ISOLATED_EVAL.
    Care:   the last target of a document is the BOS of the next one: every target still counts.
    """
    return score(cfg, run, forward, val, document_windows(val, cfg.window, cfg.eval_stride))


def documents_cost(cfg: Config, run: Run, val: Validation) -> tuple[float, str]:
    rows = document_windows(val, cfg.window, cfg.eval_stride)
    return full_windows(cfg, run, rows), "raise EVAL_STRIDE"


SCORING_WAYS["documents"] = ScoringWay("DOC_ISOLATED_EVAL", score_documents, documents_cost)


def train_on_stream(cfg: Config, run: Run, model: GPT, forward: Callable, val: Validation) -> Score:
    """Test-time training of the weights: each chunk of the text is scored, then learned from.

    What:   SGD (cosine over the chunks) on TTT_CHUNK_TOKENS tokens at a time, TTT_EPOCHS passes,
            all but the first TTT_FREEZE_BLOCKS blocks.
    Why:    later text resembles the text before it.
    Source: #549, #975; toggle TTT_MODE=sgd.
    Care:   score first: a target is never learned before it is scored (#568, #677). A rank without
            rows takes part in every step all the same, or the others wait for ever (#975).
            The model is changed, so it must be scored otherwise before; and not compiled.
    """
    rows = windows(0, val.n, cfg.window, cfg.eval_stride)
    frozen = set(model.blocks[: cfg.ttt_freeze_blocks].parameters())
    adapted = {name: p for name, p in model.named_parameters() if p not in frozen}
    for p in frozen:
        p.requires_grad_(False)
    flat = FlatParameters(adapted, run)
    optimiser = torch.optim.SGD(adapted.values(), lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
    sheet = ScoreSheet(cfg, run, val, len(rows))

    chunk_of = rows[:, 2] // cfg.ttt_chunk_tokens  # by a window's first target
    last = int(chunk_of[-1])
    for chunk in range(last):
        sheet.fill(model, rows[chunk_of == chunk])
        optimiser.param_groups[0]["lr"] = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / last))
        start = chunk * cfg.ttt_chunk_tokens
        tokens = val.tokens[start : start + cfg.ttt_chunk_tokens + 1].long()
        for ids, targets in chunk_batches(cfg, tokens):
            flat.gradients.zero_()
            mine = ids[run.rank :: run.world]
            if len(mine):
                nats = model(mine, targets[run.rank :: run.world]).sum()
                (nats * (run.world / targets.numel())).backward()
            flat.reduce(clip=cfg.ttt_grad_clip)
            optimiser.step()
    for p in frozen:
        p.requires_grad_(True)
    return sheet.fill(model, rows[chunk_of == last]).total()


def stream_cost(cfg: Config, run: Run, val: Validation) -> tuple[float, str]:
    sliding, wider = sliding_cost(cfg, run, val)
    learned = (val.n - 1) // cfg.ttt_chunk_tokens * cfg.ttt_chunk_tokens
    windows = sliding + 3 * cfg.ttt_epochs * learned / cfg.window
    return windows, f"lower TTT_EPOCHS or {wider}"


def chunk_batches(cfg: Config, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets), each (rows, window), of a chunk (tokens + 1,): all of it TTT_EPOCHS times."""
    ids = tokens[:-1].view(-1, cfg.window).split(cfg.ttt_batch_seqs)
    targets = tokens[1:].view(-1, cfg.window).split(cfg.ttt_batch_seqs)
    for _ in range(cfg.ttt_epochs):
        yield from zip(ids, targets, strict=True)


# TTT_MODE=lora. The documents, in the order of their lengths; batches of neighbours, the one with
# the longest first. A batch is one of all ranks, with TTT_BATCH_SIZE documents for each: the i-th
# has the i-th set of adapters, on rank i modulo the ranks. Only a phase makes them wait.

# Part of the model -> the knob that gives it adapters; the head has them always
ADAPTED = {
    "q": "ttt_q_lora",
    "k": "ttt_k_lora",
    "v": "ttt_v_lora",
    "o": "ttt_o_lora",
    "mlp": "ttt_mlp_lora",
}
# AdamW's, of the adapters
ADAPTER_EPS = 1e-10


class Adapters:
    """The sets of adapters of this rank, and what trains them.

    pairs: part -> Adapter; a (visits, sets, rank, columns), b (visits, sets, rows, rank). The head
    has one visit.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT):
        self.run = run
        self.sets = cfg.ttt_batch_size * run.world
        self.own = slice(run.rank, self.sets, run.world)
        self.scale = cfg.ttt_lora_alpha / cfg.ttt_lora_rank if cfg.ttt_lora_alpha else 1.0
        self.random = torch.Generator(run.device).manual_seed(cfg.seed)
        self.warm = cfg.ttt_warm_start_a
        self.fresh = True  # whether the next batch draws another A, warm or not
        self.pairs = {}
        own, rank = cfg.ttt_batch_size, cfg.ttt_lora_rank
        for part, (visits, rows) in adapted_parts(cfg, model).items():
            a = torch.zeros(visits, own, rank, cfg.model_dim, device=run.device)
            b = torch.zeros(visits, own, rows, rank, device=run.device)
            self.pairs[part] = Adapter(a.requires_grad_(), b.requires_grad_())
        self.optimiser = torch.optim.AdamW(
            [tensor for pair in self.pairs.values() for tensor in pair],
            lr=cfg.ttt_lora_lr,
            betas=(cfg.ttt_beta1, cfg.ttt_beta2),
            eps=ADAPTER_EPS,
            weight_decay=cfg.ttt_weight_decay,
            fused=run.cuda,
        )
        # behind each batch, of B: sum of squares and entries
        self.moved = torch.zeros(2, dtype=torch.double, device=run.device)

    def draw(self, part: str, shape: Sequence[int]) -> Tensor:
        """A for the sets of all ranks: uniform in +-1 / sqrt(columns)."""
        numbers = torch.rand(shape, generator=self.random, device=self.run.device)
        return (2 * numbers - 1) / math.sqrt(shape[-1])

    def begin(self, documents: int) -> None:
        """For a batch of so many; one that does not fill the sets has an A that is its alone."""
        full = documents == self.sets
        self.reset(self.fresh or not full or not self.warm)
        self.fresh = not full

    @torch.no_grad()
    def reset(self, draws: bool) -> None:
        """B = 0, and the optimiser knows nothing; draws: another A."""
        self.optimiser.state.clear()
        for part, pair in self.pairs.items():
            pair.b.zero_()
            if draws:
                visits, _, *matrix = pair.a.shape
                pair.a.copy_(self.draw(part, (visits, self.sets, *matrix))[:, self.own])

    def of_first(self, documents: int) -> dict[str, Adapter]:
        """The first sets, so many, as GPT.forward takes them."""
        found = {}
        for part, (a, b) in self.pairs.items():
            found[part] = Adapter(a[:, :documents], self.scale * b[:, :documents])
        a, b = found["head"]
        found["head"] = Adapter(a[0], b[0])
        return found

    @torch.no_grad()
    def count_moves(self, documents: int) -> None:
        """Adds what the first sets have learned to `moved`."""
        for pair in self.pairs.values():
            b = pair.b[:, :documents]
            self.moved[0] += b.double().square().sum()
            self.moved[1] += b.numel()

    def root_mean_square(self) -> float:
        """Of all B of all batches, when they had learned all."""
        if self.run.world > 1:
            dist.all_reduce(self.moved)
        squares, entries = self.moved.tolist()
        return math.sqrt(squares / entries)


def adapted_parts(cfg: Config, model: GPT) -> dict[str, tuple[int, int]]:
    """Part -> (visits with an adapter, rows of its B)."""
    attention = model.blocks[0].attn
    rows = dict.fromkeys(ADAPTED, cfg.model_dim)
    rows["k"] = rows["v"] = len(attention.c_k.weight)
    encoder, decoder = model.order(model.loops)
    visits = len(encoder) + len(decoder)
    parts = {part: (visits, rows[part]) for part, name in ADAPTED.items() if getattr(cfg, name)}
    return parts | {"head": (1, cfg.vocab_size)}


class DocumentBatch(NamedTuple):
    """Documents that are scored together, chunk by chunk."""

    spans: np.ndarray  # (documents, 2): their targets [low, high), the shortest document first
    chunk: int  # tokens

    @property
    def chunks(self) -> np.ndarray:
        """How many each document has."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return -(-lengths // self.chunk)


def document_batches(cfg: Config, run: Run, val: Validation) -> list[DocumentBatch]:
    """Documents of alike length together, the longest first, so that the end waits for short ones.

    Of documents that are as long, those that stand later go first; inside a batch, last. Only the
    first batch may have fewer than TTT_BATCH_SIZE for each rank.
    """
    spans = document_spans(val)
    lengths = spans[:, 1] - spans[:, 0]
    spans = spans[np.argsort(lengths, kind="stable")]
    short = short_document_chunks(cfg.ttt_short_score_first_steps)
    size = cfg.ttt_batch_size * run.world
    batches = []
    for start in range(0, len(spans), size):
        some = spans[start : start + size]
        longest = int(some[-1, 1] - some[-1, 0])
        batches.append(DocumentBatch(some, chunk_size(cfg, short, longest)))
    batches.reverse()
    return batches


def chunk_size(cfg: Config, short: list[tuple[int, int]], longest: int) -> int:
    """Tokens of a chunk in a batch whose longest document has so many targets.

    What:   TTT_SHORT_SCORE_FIRST_STEPS=LENGTH:CHUNK,...: the CHUNK of the first LENGTH that holds
            them all; else TTT_CHUNK_SIZE.
    Why:    a document of one chunk is over before it has taught anything.
    Source: #2014.
    Care:   LENGTH counts tokens: a document has one more than targets. So what a token costs
            depends on the length of its document, which is known only behind it, and on that of
            the longest in its batch: on what comes later, though on none of its tokens.

    short: see short_document_chunks.
    """
    for most, chunk in short:
        if longest < most:
            return chunk
    return cfg.ttt_chunk_size


def read_shape(cfg: Config, run: Run, batch: DocumentBatch, turn: int) -> tuple[list[int], int]:
    """(rows on each rank that has documents of this batch, tokens of a row) of a forward pass.

    Where each new shape would compile, rows for all sets, and one of eight lengths.
    """
    tokens = min((turn + 1) * batch.chunk, cfg.window)
    if run.compile:
        step = -(-cfg.window // 8)
        tokens = min(-(-tokens // step) * step, cfg.window)
        return [cfg.ttt_batch_size] * min(len(batch.spans), run.world), tokens
    documents = (len(batch.spans[rank :: run.world]) for rank in range(run.world))
    return [*filter(None, documents)], tokens


class DocumentLearner:
    """Scores documents chunk by chunk, each with adapters that have learned its chunks before.

    What:   every projection gets a low-rank addition, another one for each document: the targets of
            a chunk are scored, then their mean nats are the loss of one step of AdamW. A window
            ends where its chunk ends, and reads up to EVAL_SEQ_LEN tokens of its document.
    Why:    a document goes on as it began.
    Source: #1530; alpha, and A that stays warm: #1767; toggle TTT_MODE=lora.
    Care:   score first: one forward pass gives both the score and the gradient. The adapters beside
            the outputs read what enters their part. Sets of documents that are over decay on.
            A score depends on TTT_BATCH_SIZE * ranks, not on how they divide: on it depends which A
            a document begins with, which chunks (TTT_SHORT_SCORE_FIRST_STEPS), and behind how many
            documents a phase comes.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, forward: Callable, sheet: ScoreSheet):
        self.cfg = cfg
        self.run = run
        self.forward = forward
        self.sheet = sheet
        self.adapters = Adapters(cfg, run, model)
        self.steps = 0
        short = short_document_chunks(cfg.ttt_short_score_first_steps)
        self.most_slots = max([cfg.ttt_chunk_size, *(chunk for _, chunk in short)])

    def work_through(self, batch: DocumentBatch) -> None:
        """Scores the documents of a batch that are this rank's."""
        adapters = self.adapters
        adapters.begin(len(batch.spans))
        turns = int(batch.chunks.max())
        self.steps += turns - 1
        own = batch._replace(spans=batch.spans[adapters.own])
        if len(own.spans):
            self.learn(batch, *self.plan(own, turns))
        adapters.count_moves(len(own.spans))

    def plan(self, own: DocumentBatch, turns: int) -> tuple[Tensor, Tensor]:
        """All turns of this rank's documents: windows (turns, rows, 3), as windows() gives them;
        the weight of each one's sum in the loss (turns, rows): 1 / chunk where more come behind it.

        Copied to the device at once.
        """
        idle = self.cfg.ttt_batch_size - len(own.spans) if self.run.compile else 0
        low, high = torch.from_numpy(own.spans).unbind(1)
        first = (low + own.chunk * torch.arange(turns)[:, None]).minimum(high)
        end = (first + own.chunk).minimum(high)
        start = (end - self.cfg.window).maximum(low)
        rows = torch.stack((start, end, first), dim=2)
        # those read what the first one reads, and score nothing
        rows = torch.cat((rows, rows[:, :1, [0, 1, 1]].expand(-1, idle, -1)), dim=1)
        weights = F.pad((end < high) / own.chunk, (0, idle))
        return rows.to(self.run.device), weights.to(self.run.device)

    def learn(self, batch: DocumentBatch, rows: Tensor, weights: Tensor) -> None:
        """Scores these windows turn by turn, and learns behind each but the last."""
        adapters = self.adapters
        slots = self.most_slots if self.run.compile else batch.chunk
        last = len(rows) - 1
        for turn in range(last + 1):
            self.sheet.filled += int((batch.chunks > turn).sum())
            _, tokens = read_shape(self.cfg, self.run, batch, turn)
            arguments, places = self.sheet.read(rows[turn], tokens, slots)
            nats = self.forward(*arguments, adapters.of_first(rows.shape[1]))
            nats = self.sheet.write(*places, nats)
            self.sheet.tell()
            if turn < last:
                adapters.optimiser.zero_grad()
                (nats[:, : batch.chunk].sum(1) * weights[turn]).sum().backward()
                adapters.optimiser.step()


def global_step_windows(cfg: Config) -> int:
    """Windows of one step of the global SGD."""
    return min(cfg.global_ttt_batch_seqs, cfg.global_ttt_chunk_tokens // cfg.window)


def phase_boundaries(cfg: Config, documents: int) -> list[int]:
    """How many of so many documents are scored when a phase begins."""
    if not cfg.phased_ttt_enabled:
        return []
    prefix = min(cfg.phased_ttt_prefix_docs, documents)
    phases = cfg.phased_ttt_num_phases
    # of fewer documents than phases some would have none
    return sorted({prefix * (i + 1) // phases for i in range(phases)} - {0})


def phase_documents(cfg: Config, batches: list[DocumentBatch]) -> dict[int, list[list[int]]]:
    """Batch, by its place -> the documents that the phase behind it learns from, see GlobalPhases.

    Behind the last one there is nothing to gain.
    """
    boundaries = phase_boundaries(cfg, sum(len(batch.spans) for batch in batches))
    found = {}
    scored = []
    for place, batch in enumerate(batches[:-1]):
        scored += batch.spans.tolist()
        if boundaries and len(scored) >= boundaries[0]:
            scored.sort(key=lambda span: (span[1] - span[0], span[0]))
            found[place] = scored[: boundaries.pop(0)]
    return found


def chunks_of_a_phase(cfg: Config, documents: list[list[int]]) -> int:
    """How many a phase learns: all but the last one."""
    targets = sum(high - low + 1 for low, high in documents) - 1
    return -(-targets // cfg.global_ttt_chunk_tokens) - 1


class GlobalPhases:
    """Phases in which all weights learn from the documents that are scored.

    What:   once PHASED_TTT_PREFIX_DOCS * i / PHASED_TTT_NUM_PHASES documents are scored, SGD goes
            over so many of them, the shortest first, in chunks of GLOBAL_TTT_CHUNK_TOKENS with a
            cosine over these; then scoring goes on, with other adapters.
    Why:    documents resemble each other, too.
    Source: #1610; several phases: #1626; toggle PHASED_TTT_ENABLED.
    Care:   as there, a document brings the BOS behind it, so that two stand side by side; the last
            chunk and what fills no window teach nothing; momentum starts anew in each phase. With
            DOC_MASK the windows of a step are one row, cut at document starts and behind a window.
            Every rank does all of it: sharing it would be a wait for each other at every step.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, forward: Callable, val: Validation):
        self.cfg = cfg
        self.run = run
        self.model = model
        self.forward = forward
        self.val = val
        self.masks = model.prepare_documents
        self.steps = 0
        # the weights that were scored first
        self.start = [p.detach().clone() for p in model.parameters()]

    def learn(self, documents: list[list[int]]) -> None:
        """One phase, on the texts of these."""
        cfg = self.cfg
        model = self.model
        tokens = torch.cat([self.val.tokens[low : high + 1] for low, high in documents]).long()
        chunks = chunks_of_a_phase(cfg, documents)
        parts = [tokens[chunk * cfg.global_ttt_chunk_tokens :] for chunk in range(chunks)]
        optimiser = torch.optim.SGD(
            model.parameters(), lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum
        )
        with prepared(model, True, self.masks, cfg.window):
            model.most_documents = self.most_documents(parts)
            for chunk, part in enumerate(parts):
                self.run.at_work(f"chunk {chunk + 1} of {chunks} of a phase")
                scale = 0.5 * (1 + math.cos(math.pi * chunk / chunks))
                optimiser.param_groups[0]["lr"] = cfg.global_ttt_lr * scale
                for ids, targets in self.rows(part):
                    optimiser.zero_grad()
                    self.forward(ids, targets).mean().backward()
                    if cfg.global_ttt_grad_clip:
                        nn.utils.clip_grad_norm_(model.parameters(), cfg.global_ttt_grad_clip)
                    optimiser.step()
                    self.steps += 1
                    self.run.tick()
        self.agree()

    def most_documents(self, parts: list[Tensor]) -> int:
        """That a step of these chunks has, rounded up so that phases seldom compile anew."""
        counts = [(ids == BOS).sum() for part in parts for ids, _ in self.rows(part)]
        if not counts:
            return 0
        return 1 << int(torch.stack(counts).max()).bit_length()

    def agree(self) -> None:
        """The weights of rank 0 on every rank. Refusal where they are not finite."""
        for p in self.model.parameters():
            p.grad = None
            if self.run.world > 1:
                # kernels that add up in any order may have rounded otherwise elsewhere
                dist.broadcast(p.data, 0)
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()
        told = setting("global_ttt_lr", self.cfg.global_ttt_lr)
        problem = f"a phase of test-time training: its loss is not finite; lower {told}"
        refuse(not finite, problem, 5)

    @torch.no_grad()
    def proof(self) -> Activity:
        """How far the weights have moved."""
        pairs = zip(self.model.parameters(), self.start, strict=True)
        moved = torch.stack([(p - start).norm() for p, start in pairs]).norm()
        size = torch.stack([start.norm() for start in self.start]).norm()
        return Activity(
            tensors=len(self.start),
            params=sum(w.numel() for w in self.start),
            scope="scoring, its own steps",
            unit="of the weights",
            steps=[*range(self.steps)],
            effect=(moved / size).item(),
            compared="those that were scored first",
        )

    def rows(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, targets) of each step of the first chunk of these tokens."""
        window = self.cfg.window
        there = self.cfg.global_ttt_chunk_tokens // window
        size = global_step_windows(self.cfg)
        for _ in range(self.cfg.global_ttt_epochs):
            for first in range(0, there, size):
                n = min(size, there - first)
                rows = 1 if self.cfg.doc_mask else n
                part = tokens[first * window : (first + n) * window + 1]
                yield part[:-1].view(rows, -1), part[1:].view(rows, -1)


@contextlib.contextmanager
def prepared(model: GPT, trains: bool, masks: Callable | None, longest: int = 0) -> Iterator[None]:
    """Within: whether the weights have gradients, and how documents are kept apart.

    masks: what prepares them for the attention kernel; None: not at all. longest: see Documents.
    """
    before = model.prepare_documents, model.longest_piece, model.most_documents
    model.requires_grad_(trains)
    model.prepare_documents, model.longest_piece = masks, longest
    try:
        yield
    finally:
        model.requires_grad_(not trains)
        model.prepare_documents, model.longest_piece, model.most_documents = before


def train_on_documents(
    cfg: Config, run: Run, model: GPT, forward: Callable, val: Validation
) -> Score:
    """Test-time training of adapters, and between batches of all weights: see DocumentLearner."""
    batches = document_batches(cfg, run, val)
    sheet = ScoreSheet(cfg, run, val, sum(int(batch.chunks.sum()) for batch in batches))
    learner = DocumentLearner(cfg, run, model, forward, sheet)
    phases = GlobalPhases(cfg, run, model, forward, val) if cfg.phased_ttt_enabled else None
    documents = phase_documents(cfg, batches)

    # a row is the text of one document alone, which needs no masks
    with prepared(model, trains=False, masks=None):
        for place, batch in enumerate(batches):
            learner.work_through(batch)
            if place in documents:
                phases.learn(documents[place])
                learner.adapters.fresh = True
    found = sheet.total()
    return found._replace(acted=tell_what_was_learned(cfg, run, learner, phases))


def tell_what_was_learned(
    cfg: Config, run: Run, learner: DocumentLearner, phases: GlobalPhases | None
) -> bool:
    """Logs and warns; returns whether anything was."""
    steps = phases.steps if phases else 0
    size = learner.adapters.root_mean_square()
    run.log(
        f"ttt: {learner.steps:,} steps of adapters, root mean square of B behind a batch "
        f"{size:.3g}; {steps:,} steps of all weights"
    )
    if not size:
        why = setting("ttt_lora_lr", cfg.ttt_lora_lr)
        if cfg.ttt_lora_lr:
            why = (
                f"no document has a second chunk of {setting('ttt_chunk_size', cfg.ttt_chunk_size)}"
            )
        run.warn(f"TTT_MODE=lora: the adapters learned nothing: {why}")
    if phases:
        run.activity["PHASED_TTT_ENABLED"] = phases.proof()
    if phases and not steps:
        tokens = setting("global_ttt_chunk_tokens", cfg.global_ttt_chunk_tokens)
        why = f"no phase had more than {tokens} of documents, with others behind it"
        run.warn(f"PHASED_TTT_ENABLED=1: no step was taken: {why}")
    return bool(size or steps)


def documents_learned_cost(cfg: Config, run: Run, val: Validation) -> tuple[float, str]:
    """Behind the last chunk of a batch there is no backward pass. Every rank does all phases."""
    tokens = 0
    batches = document_batches(cfg, run, val)
    for batch in batches:
        turns = int(batch.chunks.max())
        for turn in range(turns):
            rows, each = read_shape(cfg, run, batch, turn)
            tokens += sum(rows) * each * (2 if turn + 1 < turns else 1)
    whole = cfg.global_ttt_chunk_tokens // cfg.window * cfg.window
    for documents in phase_documents(cfg, batches).values():
        learned = chunks_of_a_phase(cfg, documents) * whole
        tokens += 3 * cfg.global_ttt_epochs * run.world * learned
    return tokens / cfg.window, "raise TTT_CHUNK_SIZE"


# TTT_MODE -> what it trains, and what that costs
TEST_TIME_TRAINING = {
    "sgd": (train_on_stream, stream_cost),
    "lora": (train_on_documents, documents_learned_cost),
}


def test_time_train(cfg: Config, run: Run, model: GPT, forward: Callable, val: Validation) -> Score:
    """Scores, and learns from what is scored, in the way of TTT_MODE."""
    train, _ = TEST_TIME_TRAINING[cfg.ttt_mode]
    return train(cfg, run, model, forward, val)


def test_time_cost(cfg: Config, run: Run, val: Validation) -> tuple[float, str]:
    _, cost = TEST_TIME_TRAINING[cfg.ttt_mode]
    return cost(cfg, run, val)


SCORING_WAYS["ttt"] = ScoringWay("TTT_MODE", test_time_train, test_time_cost)


def scoring_work(
    cfg: Config, run: Run, model: GPT, forward: Callable
) -> dict[str, Callable[[Validation], Score]]:
    """Name -> what scores in that way, of all that are wanted; the last one with the tilt."""
    ways = {name: way for name, way in SCORING_WAYS.items() if way.wanted(cfg)}
    work = {name: partial(way.score, cfg, run, model, forward) for name, way in ways.items()}
    if work and cfg.ngram_tilt_enabled:
        last = [*work][-1]
        work[last] = partial(score_tilted, cfg, run, work[last])
    return work


class NgramTilt:
    """Tilting: where the text before names one next token, that token becomes more likely.

    What:   p'(t) = p(t) e^(b [t = hint]) / (1 + p(hint) (e^b - 1)), b = TOKEN_BOOST, of the
            targets with a hint (ngram_hints), in the last way of scoring and in what it reports.
    Why:    a long run of tokens that has come up before goes on as it did then.
    Source: #1514, #2135; toggle NGRAM_TILT_ENABLED, TOKEN_ORDER, TOKEN_THRESHOLD, TOKEN_BOOST.
    Care:   a distribution over all tokens, which the target has no part in. Test-time training
            learns from the model's own nats. The hints are made on the clock of scoring.
    """

    def __init__(self, cfg: Config, val: Validation):
        self.boost = cfg.token_boost
        self.hints = ngram_hints(val.tokens, cfg.token_order, cfg.token_threshold)
        self.hits = self.hints == val.tokens[1:]

    def tokens(self, target: Tensor) -> Tensor:
        """The hints of these targets; any token where there is none."""
        return self.hints[target].clamp(min=0)

    def tilted(self, target: Tensor, nats: Tensor, of_hint: Tensor) -> Tensor:
        """Nats of these targets, from the model's, and from its nats of their hints."""
        spread = torch.log1p((-of_hint).exp() * math.expm1(self.boost))
        change = spread - self.boost * self.hits[target]
        return nats + change.where(self.hints[target] >= 0, 0.0)


def score_tilted(cfg: Config, run: Run, work: Callable, val: Validation) -> Score:
    """work(val) with an NgramTilt; what its hints cost is booked where the toggle is proved."""
    began = run.tick()
    tilted = copy.copy(val)
    tilted.tilt = NgramTilt(cfg, val)
    run.activity["NGRAM_TILT_ENABLED"] = Activity(cost_seconds=run.tick() - began)
    return work(tilted)


def ngram_hints(tokens: Tensor, order: int, threshold: float) -> Tensor:
    """(n,) int64: a token for each target t, which is tokens[t + 1] of tokens (n + 1,); -1: none.

    The hint is what followed most often, and of several first so often, wherever the order - 1
    tokens before the target have stood before; in at least this share of those places.
    """
    length = order - 1
    hints = tokens.new_full((len(tokens) - 1,), -1, dtype=torch.int64)
    if len(hints) < length:
        return hints

    # contexts[i]: a number of tokens[i : i + length]. What is twice as long has the numbers of two
    contexts = tokens.long()
    known = 1
    while known < length:
        shift = min(known, length - known)
        pairs = contexts[:-shift] * (contexts.max() + 1) + contexts[shift:]
        contexts = torch.unique(pairs, return_inverse=True)[1]
        known += shift
    contexts = contexts[:-1]
    # most contexts stand in one place alone
    places = (torch.bincount(contexts)[contexts] > 1).nonzero()[:, 0]

    found = []
    best = {}  # context -> its hint
    counts = collections.Counter()  # of contexts, and of (context, next token)
    following = tokens[places + length].tolist()
    for context, token in zip(contexts[places].tolist(), following, strict=True):
        hint = best.get(context, -1)
        share = counts[context, hint] / max(counts[context], 1)
        found.append(hint if share >= threshold else -1)
        counts[context] += 1
        counts[context, token] += 1
        if counts[context, token] > counts[context, hint]:
            best[context] = token
    hints[places + length - 1] = torch.tensor(found, dtype=torch.int64, device=tokens.device)
    return hints


# ── 12 Report ─────────────────────────────────────────────────────────────────────────────────────
# In: what was trained and what was scored. Out: the dict that 14 writes as result.json, with the
# exit code in it, and the last table of the log.
# Promise: each toggle that was asked for is measured with and without; one that did nothing is
# named and, with STRICT, is the exit code.

# What a run that only scores has no figures for.
TRAINING_FIGURES = (
    "steps",
    "tokens_seen",
    "epochs",
    "train_seconds",
    "step_ms_median",
    "params",
    "live_val_bpb",
    "averaged_val_bpb",
    "quant_gap_bpb",
)

# The environment variables that change the speed of a run.
SPEED_VARIABLES = ("NCCL_", "OMP_", "GOMP_", "TORCH_")

# What result.json says of a GPU -> the field of nvidia-smi, and the most seconds it may take.
GPU_LIMITS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.memory",
}
NVIDIA_SMI_SECONDS = 5.0

# The phase that reads training text after the last step
CALIBRATE = "calibrate"
# The contest's limit on the seconds of training, and on those of scoring
LIMIT_SECONDS = 600
# The GPUs that it is meant for
SCORE_GPUS = 8


@dataclass
class Trained:
    """What training hands to scoring and to the report. Weights are fp32, by parameter name."""

    trainer: Trainer
    live: State
    averages: dict[str, State]
    final: State  # the weights that are shipped, before pruning and quantisation
    hessians: Hessians = field(default_factory=dict)  # of `final`, where GPTQ is on
    exported: Exported | None = None
    forecast: int = 0  # bytes of the artifact, from its shapes and grids
    # kind of tensor -> how many, bytes, rounding error
    kinds: dict = field(default_factory=dict)
    codes: dict = field(default_factory=dict)  # the codes beside their order-0 entropy


# The probe holds the tokens of so many training steps, and at most so many
PROBE_STEPS = 8
PROBE_TOKENS = 1 << 20
# Costs: pairs of repeats, the most seconds that one toggle's pairs may take, and the seconds after
# which no other model is compiled. Nobody asked for them, and GPUs are paid by the second
COST_PAIRS = 9
COST_SECONDS = 5.0
COMPILE_SECONDS = 30.0


class Probe:
    """Validation text on which toggles are measured, dealt to the ranks.

    ids, targets: (rows, at most TRAIN_SEQ_LEN) int64, evenly spread over the validation text.
    base: nats of the live weights, in blocks.
    """

    def __init__(self, cfg: Config, run: Run, trained: Trained, val: Validation):
        self.run = run
        self.trainer = trained.trainer
        self.longest_piece = cfg.longest_piece(cfg.train_seq_len)
        length = min(val.n, cfg.train_seq_len)
        shape = step_shape(cfg, run, cfg.train_seq_len)
        there = val.n // length
        wanted = min(PROBE_STEPS * cfg.train_batch_tokens, PROBE_TOKENS) // length
        rows = max(min(there, wanted), 1)
        start = torch.arange(rows, device=run.device) * there // rows * length
        place = start[:, None] + torch.arange(length, device=run.device)
        self.ids = val.tokens[place].long()
        self.targets = val.tokens[place + 1].long()

        # What the forward pass of training sees at a time: compiled already, and known to fit
        self.at_once = max(shape.rows * shape.length // cfg.train_seq_len, 1)
        place = torch.arange(shape.rows * shape.length, device=run.device) % val.n
        place = place.view(shape.rows, shape.length)
        self.micro_batch = val.tokens[place].long(), val.tokens[place + 1].long()
        self.base = self.nats(trained.trainer.model, trained.live)

        # how many are measured in all, and how many have begun
        self.toggles = 0
        self.begun = 0

    def begin(self, name: str) -> None:
        """Tells those who watch which toggle is measured now."""
        self.begun += 1
        self.run.at_work(f"{name}, {self.begun} of {self.toggles}")

    @torch.no_grad()
    def nats(self, model: GPT, state: State | None = None) -> tuple[float, ...]:
        """Nats in blocks, with these weights or with those that the model has. On every rank."""
        model.load_state_dict(state or {}, strict=False)
        nats = torch.zeros(self.targets.shape, device=self.run.device)
        # None for the last ranks where there are more ranks than rows
        own = torch.arange(len(nats), device=self.run.device)[self.run.rank :: self.run.world]
        for rows in own.split(self.at_once) if len(own) else ():
            nats[rows] = model(self.ids[rows], self.targets[rows])
        if self.run.world > 1:
            dist.all_reduce(nats)
        return block_sums(nats)

    def measure(self, activity: Activity, compared: str, on: Sequence, off: Sequence) -> None:
        """Fills in the effect: nats per token with the toggle minus without, and its interval."""
        tokens = self.targets.numel()
        activity.compared = compared
        set_effect(activity, (sum(on) - sum(off)) / tokens, paired_margin(on, off, tokens))

    def both_ways(self, forward: Callable, model: GPT) -> Callable[[], None]:
        """What runs one micro-batch of training forward and backward."""
        parameters = [*model.parameters()]
        model.longest_piece = self.longest_piece

        def run_once() -> None:
            loss = forward(*self.micro_batch).mean()
            # a model of one block has skip weights that it does not use
            torch.autograd.grad(loss, parameters, allow_unused=True)

        return run_once


def set_effect(activity: Activity, effect: float, margin: float) -> None:
    activity.effect = effect
    if math.isfinite(effect + margin):
        activity.effect_interval = [effect - margin, effect + margin]


def median_interval(values: Sequence[float]) -> list[float] | None:
    """An interval of 96 % for the median of nine: the second and the eighth, in order.

    Whatever their distribution: that two or more of nine are on either side of the median has
    probability 1 - 2 (1 + 9) / 2^9. None of fewer; wider than it need be of more.
    """
    ordered = sorted(values)
    return [ordered[1], ordered[-2]] if len(ordered) >= 9 else None


def measure_cost(
    run: Run, name: str, on: Callable, off: Callable = nothing, times: int = 1
) -> None:
    """Fills in the milliseconds of on() above those of off(), so many times: paired repeats.

    The two take turns at going first, so that a machine that slows down slows both. A pair before
    compiles, and allocates what the others will find. Left out where it would take too long, by
    rank 0's clock, or fails: all has been scored by now, and the result is worth more. No rank may
    wait for another in on() and off().
    """
    compiled = torch._dynamo.utils.counters["stats"]
    graphs = compiled["unique_graphs"]
    took = {}
    differences = []

    def one_pair(first: Callable, second: Callable) -> None:
        took[first] = run.milliseconds(first)
        took[second] = run.milliseconds(second)

    for pair in range(-1, COST_PAIRS):
        problem = run.fails(partial(one_pair, *((on, off) if pair % 2 else (off, on))))
        if problem:
            run.warn(f"{name}: its cost is not measured: {problem}")
            return
        if pair >= 0:
            differences.append(times * (took[on] - took[off]))
        # what compiles says nothing about the pairs to come
        known = pair == 0 or (pair < 0 and compiled["unique_graphs"] == graphs)
        if pair <= 0:
            spent = run.broadcast(sum(took.values()) / 1e3 if known else 0.0)
            if spent * COST_PAIRS > COST_SECONDS:
                return
    differences = run.broadcast(differences)
    activity = run.activity[name]
    activity.cost_ms = statistics.median(differences)
    activity.cost_interval = median_interval(differences)


def prove_toggles(
    cfg: Config, run: Run, trained: Trained, val: Validation, attend: Callable
) -> None:
    """Fills in what each toggle does and costs: nats on the probe, with it minus without."""
    probe = Probe(cfg, run, trained, val)
    tokens = probe.targets.numel()
    run.log(f"toggles are measured on {tokens:,} tokens of validation text")
    probe.toggles = len(trained.trainer.views.techniques) + len(trained.averages)
    probe.toggles += len(model_parts(cfg)) + len(muon_parts(cfg)) + bool(trained.exported.pruned)
    probe.toggles += bool(trained.hessians)
    probe.toggles += cfg.lqer_enabled + (trained.exported.stretch > 1)
    prove_views(run, trained, probe)
    prove_averages(run, trained, probe)
    # room for a second model: nothing reads the copies any more
    trained.averages.clear()
    trained.trainer.model.load_state_dict(trained.live)
    prove_muon(cfg, run, trained, probe)
    prove_model_toggles(cfg, run, trained, probe, attend)
    if trained.exported.pruned:
        prove_pruning(cfg, run, trained, probe)
    if trained.exported.stretch > 1:
        prove_stretch(cfg, run, trained, probe)
    if trained.hessians:
        prove_gptq(cfg, run, trained, probe)
    if cfg.lqer_enabled:
        prove_lqer(cfg, run, trained, probe)
    schedule = trained.trainer.schedule
    for name, activity in run.activity.items():
        activity.missing = schedule.missing().get(name, "")
        times = len(activity.steps)
        if name == "NUM_LOOPS":
            times = schedule.late_loops.in_full(activity.steps, schedule.fired)
        sum_up_cost(activity, times, trained.trainer.step_seconds)


def sum_up_cost(activity: Activity, times: float, step_seconds: list[float]) -> None:
    """The cost in the whole run, in which it acted so often, where there is any to be seen."""
    if activity.cost_ms is None or not tells_apart(activity.cost_interval):
        return
    activity.cost_seconds = activity.cost_ms * times / 1e3
    if activity.cost_per != "export" and step_seconds:
        activity.steps_lost = activity.cost_seconds / statistics.median(step_seconds)


def tells_apart(interval: list[float] | None) -> bool:
    """Whether what has this interval can be told from 0."""
    return interval is not None and not interval[0] <= 0 <= interval[1]


def other_export(trainer: Trainer, on: State, off: State) -> dict[str, Any]:
    """For an Activity: what a toggle of the export changes of the weights as they ship."""
    changed = [int((on[name] != off[name]).sum()) for name in on]
    return dict(
        tensors=sum(n > 0 for n in changed),
        params=sum(changed),
        steps=[trainer.steps],
        cost_per="export",
    )


def prove_pruning(cfg: Config, run: Run, trained: Trained, probe: Probe) -> None:
    """Pruning: the shipped weights against what would have been shipped without it."""
    probe.begin("PRUNE_PCT")
    trainer = trained.trainer
    made = trained.exported
    pruned = prune(cfg, trained.final, made.pruned)
    unpruned = quantised(cfg, trained.final, made.plan, trained.hessians)
    off = shipped_state(unpruned)
    on = shipped_state(quantised(cfg, pruned, made.plan, trained.hessians))
    activity = run.activity["PRUNE_PCT"] = Activity(
        scope=f"export, {made.pruned:.1%}", **other_export(trainer, on, off)
    )
    nats = [probe.nats(trainer.model, state) for state in (on, off)]
    probe.measure(activity, "against unpruned", *nats)
    measure_cost(run, "PRUNE_PCT", partial(prune, cfg, trained.final, made.pruned))
    saved = 0
    if run.rank == 0:
        saved = len(encode_artifact(made.cfg, unpruned)) - len(made.blob)
    activity.bytes_saved = run.broadcast(saved)


def on_grid(grid: Grid, coded: Parts) -> bool:
    codes = coded["codes"]
    return bool(grid.lowest <= codes.min() and codes.max() <= grid.top)


def ratio(part: float, whole: float) -> float:
    """part / whole; nothing of nothing is all of it."""
    if not whole:
        return math.inf if part else 1.0
    return part / whole


def prove_gptq(cfg: Config, run: Run, trained: Trained, probe: Probe) -> None:
    """GPTQ: the shipped weights against the same weights rounded to nearest, on the same grids.

    A tensor counts where its codes are on the grid and their weighted error is the smaller one,
    without corrections. The effect is in nats.
    """
    probe.begin("GPTQ")
    trainer = trained.trainer
    weights = prune(cfg, trained.final, trained.exported.pruned)
    by_inputs = partial(quantised, cfg, weights, trained.exported.plan, trained.hessians)
    to_nearest = partial(quantised, cfg, weights, trained.exported.plan)
    parts, nearest = by_inputs(), to_nearest()

    def error(name: str, coded: Parts) -> float:
        e = Grid.dequantise(coded["codes"], coded["scale"]) - weights[name]
        return weighted_error(e[None], trained.hessians[name][None]).item()

    errors = {}
    better = []
    for name in trained.hessians:
        errors[name] = [error(name, found[name]) for found in (parts, nearest)]
        fits = on_grid(trained.exported.plan[name], parts[name])
        same = cfg.gptq_refit or torch.equal(parts[name]["scale"], nearest[name]["scale"])
        if fits and same and errors[name][0] < errors[name][1]:
            better.append(name)
    worse = [name for name in errors if name not in better]
    if worse:
        run.warn(
            f"GPTQ: {len(worse)} of {len(errors)} tensors are no nearer to their outputs than "
            f"rounded to nearest, {worse[0]} among them"
        )
    share = ratio(*(sum(found) for found in zip(*errors.values(), strict=True)))
    changed = [(parts[name]["codes"] != nearest[name]["codes"]).sum() for name in errors]
    activity = run.activity["GPTQ"] = Activity(
        tensors=len(better),
        params=int(sum(changed)),
        scope=f"export, {share:.3f} x the weighted error",
        steps=[trainer.steps],
        cost_per="export",
    )
    nats = [probe.nats(trainer.model, shipped_state(found)) for found in (parts, nearest)]
    probe.measure(activity, "against rounding to nearest", *nats)
    measure_cost(run, "GPTQ", by_inputs, to_nearest)


def prove_stretch(cfg: Config, run: Run, trained: Trained, probe: Probe) -> None:
    """FIT_TO_CAP: the shipped weights against the same with k of SDClip as it was asked for."""
    probe.begin("FIT_TO_CAP")
    trainer = trained.trainer
    made = trained.exported
    weights = prune(cfg, trained.final, made.pruned)
    plans = (made.plan, trainer.plan)
    on, off = (shipped_state(quantised(cfg, weights, plan, trained.hessians)) for plan in plans)
    activity = run.activity["FIT_TO_CAP"] = Activity(
        scope=f"export, SDClip x {made.stretch:.4f}",
        bytes_saved=made.stretch_saved,
        **other_export(trainer, on, off),
    )
    nats = [probe.nats(trainer.model, state) for state in (on, off)]
    probe.measure(activity, "against the k asked for", *nats)


def prove_lqer(cfg: Config, run: Run, trained: Trained, probe: Probe) -> None:
    """LQER: the shipped weights against the same codes without their corrections, in nats.

    In its scope: what is left of the squared error of the corrected matrices.
    """
    probe.begin("LQER")
    trainer = trained.trainer
    _, parts = read_parts(run.dir / "artifact.bin")
    plain, factors = {}, {}
    for name, tensor in parts.items():
        is_factor = {part: part.startswith(("left", "right")) for part in tensor}
        plain[name] = {part: t for part, t in tensor.items() if not is_factor[part]}
        if "left" in tensor:
            factors[name] = {part: t for part, t in tensor.items() if is_factor[part]}
    on, off = shipped_state(parts), shipped_state(plain)

    weights = prune(cfg, trained.final, trained.exported.pruned)

    def error(shipped: State) -> float:
        errors = [shipped[name].to(weights[name]) - weights[name] for name in factors]
        return sum(e.square().sum(dtype=torch.float64).item() for e in errors)

    share = ratio(error(on), error(off))
    activity = run.activity["LQER"] = Activity(
        tensors=len(factors),
        params=sum(on[name].numel() for name in factors),
        scope=f"export, {share:.3f} x the squared error",
        steps=[trainer.steps] if factors else [],
        cost_per="export",
    )
    nats = [probe.nats(trainer.model, state) for state in (on, off)]
    probe.measure(activity, "against the codes alone", *nats)
    made = trained.exported
    activity.bytes_saved = len(encode_artifact(made.cfg, {})) - len(
        encode_artifact(made.cfg, factors)
    )


def prove_views(run: Run, trained: Trained, probe: Probe) -> None:
    """Views: the loss with the weights that the forward pass sees, against the latent ones."""
    trainer = trained.trainer
    views = trainer.views
    for name, view in views.techniques.items():
        probe.begin(name)
        activity = run.activity[name]
        enter = partial(views.enter, view.at_full_strength(), 0)
        # a cost that failed half-way may have left what the view before showed
        trainer.model.load_state_dict(trained.live)

        def there_and_back(enter: Callable = enter) -> None:
            views.leave(enter())

        latent = enter()
        seen = probe.nats(trainer.model)
        views.leave(latent)
        probe.measure(activity, "seen against latent", seen, probe.base)
        activity.cost_per = "step"
        measure_cost(run, name, there_and_back)
        compare_steps(activity, trainer.step_seconds)


def prove_averages(run: Run, trained: Trained, probe: Probe) -> None:
    """Averages: the loss with the average against the live weights."""
    trainer = trained.trainer
    for name, state in trained.averages.items():
        probe.begin(name.upper())
        activity = run.activity[name.upper()]
        average = trainer.averages.on[name]
        averaged = probe.nats(trainer.model, state)
        probe.measure(activity, "against live", averaged, probe.base)
        activity.cost_per = "step" if average.every_step else "snapshot"
        # this changes the run's own average; what is exported and probed was copied before
        measure_cost(run, name.upper(), average.update)
        compare_steps(activity, trainer.step_seconds, delay=int(run.cuda))


def compare_steps(activity: Activity, step_seconds: list[float], delay: int = 0) -> None:
    """Fills in how long the run's own steps took, without and with; from ten of each on.

    delay: 1 for what a GPU is given behind the sync of a step, and does in the time of the next.
    """
    acted = {step + delay for step in activity.steps}
    taken = [s for step, s in enumerate(step_seconds) if step in acted]
    others = [s for step, s in enumerate(step_seconds) if step not in acted]
    if min(len(taken), len(others)) >= 10:
        activity.step_ms_with = 1e3 * statistics.median(taken)
        activity.step_ms_without = 1e3 * statistics.median(others)


def off_value(name: str) -> Any:
    """The value at which a toggle is off."""
    return BY_NAME[name].metadata["off"][0]


def without_part(cfg: Config, knob_name: str, off: Any) -> Config:
    """The settings without a part, whether or not a model could be trained so."""
    changed = copy.copy(cfg)
    object.__setattr__(changed, knob_name, off)
    return changed


def model_parts(cfg: Config) -> list[str]:
    """The toggles of the model that are on."""
    idle = cfg.idle()
    names = [name for name in MODEL_TOGGLES if name.lower() not in idle]
    return [name for name in names if getattr(cfg, name.lower()) != off_value(name)]


def muon_parts(cfg: Config) -> dict[str, Any]:
    """The toggles of Muon that are on -> their value where they are off."""
    return {name: off for name, off in MUON_TOGGLES.items() if getattr(cfg, name.lower()) != off}


def prove_muon(cfg: Config, run: Run, trained: Trained, probe: Probe) -> None:
    """Toggles of Muon: the updates that it makes of gradients, against those without the toggle.

    The gradients are those of the trained model on the first row of the probe, the same on every
    rank. The effect is |with - without| / |without| over all matrices.
    """
    toggles = muon_parts(cfg)
    if not toggles:
        return
    model = trained.trainer.model
    matrices = [p for p in model.parameters() if p.role.optimiser == "muon"]
    loss = model(probe.ids[:1], probe.targets[:1]).mean()
    gradients = torch.autograd.grad(loss, matrices, materialize_grads=True)

    def updates(cfg: Config) -> Tensor:
        made = [newton_schulz(g[None], **orthogonaliser(cfg)).flatten() for g in gradients]
        return torch.cat(made)

    on = updates(cfg)
    for name, off in toggles.items():
        probe.begin(name)
        without = updates(without_part(cfg, name.lower(), off))
        run.activity[name] = Activity(
            tensors=len(matrices),
            params=len(on),
            scope="Muon",
            unit="of the update",
            steps=[*range(trained.trainer.steps)],
            compared="the last update",
            effect=((on - without).norm() / without.norm()).item(),
        )


def rows_of(state: State, model: State) -> State:
    """Of `state` what a model takes that has a part less: without loops fewer skip weights."""
    return {name: state[name][tuple(slice(n) for n in w.shape)] for name, w in model.items()}


def prove_model_toggles(
    cfg: Config, run: Run, trained: Trained, probe: Probe, attend: Callable
) -> None:
    """Parts of the model: the trained model against itself without the part."""
    trainer = trained.trainer
    model = trainer.model
    acted = {**run.activity}  # from the schedule
    scope = f"the model, {'compiled' if run.compile else 'eager'}"
    if len(trainer.schedule.forms()) > 1:
        # early steps may cost less: fewer visits of looped blocks, less attention
        scope += f", steps as with {cfg.num_loops} loops in rows of {cfg.train_seq_len}"
    began = time.perf_counter()
    for name in model_parts(cfg):
        knob_name = name.lower()
        probe.begin(name)
        plain = without_part(cfg, knob_name, off_value(name))
        without = build_model(plain, run, attend, longest_row(cfg, run))
        kept = rows_of(trained.live, without.state_dict())
        extra = [
            w.numel() - kept[key].numel() if key in kept else w.numel()
            for key, w in trained.live.items()
        ]
        activity = run.activity[name] = Activity(
            tensors=sum(n > 0 for n in extra),
            params=sum(extra),
            scope=scope,
            steps=acted[name].steps if name in acted else [*range(trainer.steps)],
            cost_per="step",
        )
        nats = probe.nats(without, kept)
        probe.measure(activity, "the model without", probe.base, nats)

        if run.compile:
            # a launch that only exports has not compiled what trains, and needs not
            spent = run.broadcast(time.perf_counter() - began)
            if not trainer.trained_here or spent > COMPILE_SECONDS:
                continue
        on = probe.both_ways(trainer.forward, model)
        off = probe.both_ways(run.compiled(without), without)
        measure_cost(run, name, on, off, trainer.accumulate)


def environment(run: Run) -> dict:
    """The hardware, versions and variables that figures depend on."""
    # rank 0 alone writes them down, and nvidia-smi is slow where eight ask at once
    asked = run.cuda and run.rank == 0
    return dict(
        device=device_name(run),
        gpu=gpu_limits(str(torch.cuda.get_device_properties().uuid)) if asked else None,
        threads_per_rank=torch.get_num_threads(),
        dtype=str(run.dtype),
        compile=run.compile,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=torch.__version__,
        variables={k: v for k, v in os.environ.items() if k.startswith(SPEED_VARIABLES)},
    )


def device_name(run: Run) -> str:
    """The GPU's name; else the processor's, where Linux tells it, and its cores."""
    if run.cuda:
        return torch.cuda.get_device_name()
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            name = line.split(": ")[1]
            break
    return f"CPU {name}, {os.cpu_count()} cores"


@cache
def gpu_limits(uuid: str) -> dict[str, str] | None:
    """What a GPU's speed depends on beside its name: driver, power limit, highest clocks.

    None where nvidia-smi does not tell them.
    """
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid.removeprefix('GPU-')}",
        f"--query-gpu={','.join(GPU_LIMITS.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        told = subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, timeout=NVIDIA_SMI_SECONDS
        )
        return dict(zip(GPU_LIMITS, map(str.strip, told.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def peak_memory(run: Run) -> int:
    """The most bytes that this rank has held: of the GPU's memory, or of the process on a CPU."""
    if run.cuda:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def add_scoring_toggles(run: Run, scores: dict[str, Score], steps: int) -> None:
    """Ways of scoring that are toggles: effect in BPB, and seconds, against plain scoring."""
    against = "sliding" if "sliding" in scores else "quantised"
    plain = scores[against]
    tilt = run.activity.get("NGRAM_TILT_ENABLED")
    for name, way in SCORING_WAYS.items():
        if name not in scores or name == against:
            continue
        score = scores[name].without_tilt()
        activity = run.activity[way.toggle] = Activity(
            scope=f"scoring, against {against}",
            unit="bpb",
            steps=[steps] if score.acted else [],
            compared=f"against {against}",
            cost_per="scoring",
            cost_seconds=score.seconds - plain.seconds,
        )
        compare_scores(activity, score, plain)
        if tilt and name == [*scores][-1]:
            # its hints have a row of their own
            activity.cost_seconds -= tilt.cost_seconds

    if tilt:
        name, score = list(scores.items())[-1]
        tilt.scope = f"scoring {name}"
        tilt.unit = "bpb"
        tilt.steps = [steps]
        tilt.compared = "the pass without"
        compare_scores(tilt, score, score.without_tilt())


def compare_scores(activity: Activity, on: Score, off: Score) -> None:
    """Fills in the effect in BPB of the same targets."""
    margin = paired_margin(on.blocks, off.blocks, math.log(2) * on.bytes)
    set_effect(activity, on.bpb - off.bpb, margin)


def closing_warnings(cfg: Config, run: Run, trained: Trained, scores: dict[str, Score]) -> None:
    """What a good exit code would hide: steps left out, an average that made nothing better."""
    trainer = trained.trainer
    if trainer.skipped:
        run.warn(
            f"{len(trainer.skipped)} of {trainer.steps} steps were not finite and were left out, "
            f"the first of them step {trainer.skipped[0]}"
        )
    late = late_calibration(cfg, trainer.reserve, trainer.elapsed, run.ledger().get(CALIBRATE, 0.0))
    if late:
        run.warn(late)
    live = scores["live"]
    averaged = scores.get("averaged", live)
    worse = averaged.bpb - live.bpb
    if worse <= 0:
        return
    margin = paired_margin(averaged.blocks, live.blocks, math.log(2) * live.bytes)
    words = in_words(worse, [worse - margin, worse + margin])
    judged = {"worse": "is worse than", UNCLEAR: f"is {UNCLEAR} from"}.get(words, "lies above")
    sure = f" +- {margin:.6f}" if math.isfinite(margin) else ", too little text for an interval"
    saved = cfg.checkpoint or run.dir / CHECKPOINTS[0]
    run.warn(
        f"the shipped average, {cfg.shipped_average}, {judged} the live weights: "
        f"{averaged.bpb:.6f} against {live.bpb:.6f} BPB, {worse:+.6f}{sure} (fixed windows, "
        "before quantisation); "
        f"{setting('checkpoint', saved)} AVERAGE=none exports the live ones"
    )


def late_calibration(cfg: Config, reserve: float, trained: float, spent: float) -> str:
    """What is wrong where so many seconds of training leave too few of the budget to GPTQ's.

    Empty: nothing.
    """
    over = trained + spent - cfg.max_wallclock_seconds
    if not (cfg.gptq_enabled and cfg.max_wallclock_seconds) or over <= 0:
        return ""
    remedy = f"train with GPTQ_RESERVE_SECONDS={math.ceil(reserve + over)}"
    if cfg.checkpoint:
        remedy = "nothing for the leaderboard; train with GPTQ_ENABLED=1"
    late = f"training ended {over:.1f} s too late for the {spent:.1f} s of its calibration"
    return f"GPTQ: {late}: {remedy}"


def training_figures(cfg: Config, trained: Trained | None, bpb: dict[str, float]) -> dict:
    """What result.json says of the training; without one, None for each of TRAINING_FIGURES."""
    if trained is None:
        return dict.fromkeys(TRAINING_FIGURES)
    trainer = trained.trainer
    return dict(
        recompiles=trainer.recompiles,
        groups=trained.kinds,
        codes=trained.codes,
        pruned=trained.exported.pruned,
        stretch=trained.exported.stretch,
        forecast_artifact_bytes=trained.forecast,
        resumed=trainer.resumed,
        skipped=trainer.skipped,
        steps=trainer.steps,
        tokens_seen=trainer.tokens_seen,
        epochs=trainer.epochs,
        params=sum(w.numel() for w in trained.live.values()),
        train_seconds=trainer.elapsed,
        step_ms_median=statistics.median(trainer.step_seconds or [0.0]) * 1e3,
        trained_code_sha256=trainer.code_sha256,
        average=cfg.shipped_average,
        live_val_bpb=bpb["live"],
        averaged_val_bpb=bpb.get("averaged"),
        **gap_figures(bpb),
    )


def gap_figures(bpb: dict[str, float]) -> dict:
    """What quantising costs and, apart from that, what FIT_TO_CAP's pruning costs."""
    unfitted = bpb.get("unfitted", bpb["quantised"])
    fit_cost = None
    if "unfitted" in bpb:
        fit_cost = bpb["quantised"] - unfitted
    quant_gap = unfitted - bpb.get("averaged", bpb["live"])
    return dict(quant_gap_bpb=quant_gap, fit_cost_bpb=fit_cost)


# Key of result.json -> what it is
GAP_FIGURES = {"quant_gap_bpb": "quantising costs", "fit_cost_bpb": "fitting the cap costs"}


def size_figures(cfg: Config, run: Run, path: Path) -> dict:
    """What is shipped, in bytes, beside the cap."""
    artifact_bytes = path.stat().st_size
    code_bytes = run.broadcast(len(shipped_code(cfg)) if run.rank == 0 else 0)
    total = code_bytes + artifact_bytes
    return dict(
        artifact_path=str(path),
        artifact_bytes=artifact_bytes,
        code_bytes=code_bytes,
        total_bytes=total,
        cap_bytes=cfg.cap_bytes,
        under_cap=total <= cfg.cap_bytes,
    )


def spelt_figures(final: Score, data: dict) -> dict:
    """The score by the bytes that the tokens spell, where a side-car states others."""
    if "spelt_bytes" not in data:
        return {}
    return {"val_bpb_as_spelt": final.bpb * final.bytes / data["spelt_bytes"]}


def build_result(
    cfg: Config,
    run: Run,
    scores: dict[str, Score],
    data: dict,
    path: Path,
    trained: Trained | None,
) -> dict:
    """result.json: everything that the final table says, and what it takes to reproduce it."""
    mode, final = list(scores.items())[-1]
    bpb = {name: score.bpb for name, score in scores.items()}
    steps = trained.trainer.steps if trained else 0
    sizes = size_figures(cfg, run, path)

    add_scoring_toggles(run, scores, steps)
    if trained:
        closing_warnings(cfg, run, trained, scores)
    toggles = {name: activity.row(steps) for name, activity in run.activity.items()}
    inactive = [name for name, row in toggles.items() if not row["active"]]
    elapsed = trained.trainer.elapsed if trained else None
    limits = time_limits(cfg, run, elapsed, mode, final.seconds)
    late = [name for name, row in limits.items() if row["slack"] < 0]

    return dict(
        schema=SCHEMA_VERSION,
        date=time.strftime("%Y-%m-%d"),
        exit_code=verdict(cfg, sizes["under_cap"], late, inactive),
        folder=str(run.dir),
        val_bpb=final.bpb,
        val_loss=final.loss,
        val_tokens=final.targets,
        val_bytes=final.bytes,
        **spelt_figures(final, data),
        tokens_per_byte=final.targets / final.bytes,
        quantised_val_bpb=bpb["quantised"],
        **training_figures(cfg, trained, bpb),
        scored=mode,
        **sizes,
        eval_seconds=final.seconds,
        inactive=inactive,
        warnings=run.warnings,
        limits=limits,
        over_limit=late,
        toggles=toggles,
        scores={name: score.figures() for name, score in scores.items()},
        data=data,
        **provenance(cfg, run),
    )


def time_limits(
    cfg: Config, run: Run, elapsed: float | None, mode: str, seconds: float
) -> dict[str, dict[str, float]]:
    """Row of the ledger -> its seconds, its limit, and what is left: negative when it is over.

    Training is held to its budget, wherever it runs. What reads training text after the last step
    is held to what the contest's limit leaves, or a larger budget: beyond a smaller budget it is
    warned of. Not where another launch trained, which may have kept nothing back. Scoring is held
    to the contest's limit on the contest's number of GPUs, or more. With fewer, or on a CPU, the
    same scoring takes longer without being too slow for the contest, so that there no limit is
    claimed.
    """
    held = {}
    if elapsed is not None and cfg.max_wallclock_seconds:
        held["train"] = elapsed, cfg.max_wallclock_seconds
        ledger = run.ledger()
        if CALIBRATE in ledger and not cfg.checkpoint:
            most = max(cfg.max_wallclock_seconds, LIMIT_SECONDS)
            held[CALIBRATE] = ledger[CALIBRATE], most - elapsed
    if run.cuda and run.world >= SCORE_GPUS:
        held[f"score {mode}"] = seconds, LIMIT_SECONDS
    return {
        name: {"spent": spent, "limit": limit, "slack": limit - spent}
        for name, (spent, limit) in held.items()
    }


def verdict(cfg: Config, under_cap: bool, late: list[str], inactive: list[str]) -> int:
    """The exit code of a run that came to its end: of several the one that weighs most.

    Size before time: both break the contest's rules, but a file can be made smaller without
    training again. The log names everything.
    """
    if not under_cap:
        return 3
    if late:
        return 9
    if inactive and cfg.strict:
        return 4
    return 0


def provenance(cfg: Config, run: Run) -> dict:
    """What it takes to reproduce the run, and what the run took."""
    run.tick()
    return dict(
        seconds=run.ledger(),
        launches=run.launches,
        lost_seconds=run.lost_seconds,
        seed=cfg.seed,
        world_size=run.world,
        peak_memory_bytes=run.peak_memory_bytes,
        attention=run.attention,
        checkpoint=cfg.checkpoint or None,
        config=cfg.knobs(),
        **environment(run),
        non_default=cfg.non_default(),
        without_effect=cfg.without_effect(),
        config_sha256=cfg.digest(),
        code_sha256=CODE_SHA256,
    )


def final_table(r: dict) -> str:
    """The end of the log, from result.json alone."""
    parts = [""]
    for title, rows_of in END_TABLES.items():
        rows = rows_of(r)
        if rows:
            parts.append(text_table(titled(title, rows)))
    if r.get("codes"):
        parts.append(codes_line(**r["codes"]))
    for name, words in GAP_FIGURES.items():
        if r.get(name) is not None:
            parts.append(f"{words}: {r[name]:+.6f} BPB")
    parts += time_lines(r)
    for name in r["inactive"]:
        did = "did nothing"
        if r["toggles"][name]["verdict"] == NOT_FINITE:
            did = "its effect is not finite"
        elif r["toggles"][name].get("missing"):
            did = f"never came to {r['toggles'][name]['missing']}"
        parts.append(f"INACTIVE: {name} was requested and {did}")
    for text in r.get("warnings", []):
        parts.append(f"WARNING: {text}")
    parts.append(text_table(titled("where", file_rows(r))))
    parts += [next_line(r), result_line(r)]
    return "\n\n".join(parts)


def titled(title: str, rows: dict[str, dict]) -> list[tuple]:
    """Rows by name as a table, the header first, without columns that no row fills."""
    filled = {key for row in rows.values() for key, cell in row.items() if cell is not None}
    columns = [key for key in next(iter(rows.values())) if key in filled]
    lines = [(name, *(row[key] for key in columns)) for name, row in rows.items()]
    return [(title, *columns), *lines]


def score_rows(r: dict) -> dict[str, dict]:
    """Of all weights and ways of scoring, in the order in which they were scored."""
    rows = {}
    for name, score in r["scores"].items():
        rows[name] = {
            "BPB (lower is better)": f"{score['bpb']:.6f}",
            "nats per token": f"{score['loss']:.6f}",
            "tokens scored": score["targets"],
            "text bytes": score["bytes"],
            "took": f"{score['seconds']:.1f} s",
        }
    return rows


def size_rows(r: dict) -> dict[str, dict]:
    """Bytes of what is shipped, beside the cap."""
    headroom = "headroom" if r["under_cap"] else "OVER CAP BY"
    sizes = {
        "code as shipped": r["code_bytes"],
        "artifact": r["artifact_bytes"],
        "total": r["total_bytes"],
        "cap": r["cap_bytes"],
        headroom: abs(r["cap_bytes"] - r["total_bytes"]),
    }
    return {name: {"bytes": n} for name, n in sizes.items()}


def ledger_rows(r: dict) -> dict[str, dict]:
    """Seconds of every phase, a limit beside those that have one; the sum is the wall time."""

    def row(seconds: float, held: dict | None = None) -> dict:
        cells = {"spent": f"{seconds:,.1f} s", "limit": None, "left": None}
        if held:
            # as many decimals as it takes to see who is over
            cells["limit"] = f"{held['limit']:g} s"
            cells["left"] = f"{held['slack']:+.3f} s"
        return cells

    rows = {name: row(seconds, r["limits"].get(name)) for name, seconds in r["seconds"].items()}
    rows["sum"] = row(sum(r["seconds"].values()))
    for name, held in r["limits"].items():
        if name not in rows:
            rows[f"{name} (before the checkpoint)"] = row(held["spent"], held)
    return rows


def toggle_rows(r: dict) -> dict[str, dict]:
    """What each toggle did; the numbers are in result.json."""
    rows = {}
    for name, row in r["toggles"].items():
        steps = "never"
        if row["first_step"] is not None:
            steps = f"{row['first_step']} to {row['last_step']}"
        rows[name] = {
            "steps": steps,
            "on minus off (95 %)": effect_text(row),
            "in words": row["verdict"],
            "compared": row["compared"] or None,
        }
    return rows


def effect_text(row: dict) -> str | None:
    """-0.0155 nats (-0.0172 to -0.0138), -5.32e-7 nats (-9.45e-7 to -1.20e-7): all with as many
    decimals as the largest needs for three digits; below a thousandth each with its power of ten.
    """
    if row["effect"] is None:
        return None
    interval = row["effect_interval"] or []
    largest = max(map(abs, [row["effect"], *interval]))
    decimals = max(2 - math.floor(math.log10(largest)), 0) if largest else 0

    def digits(value: float) -> str:
        if 0 < largest < 1e-3:
            return f"{value:+.2e}".replace("e-0", "e-")
        # + 0.0: no minus sign on a zero
        return f"{round(value, decimals) + 0.0:+.{decimals}f}"

    text = f"{digits(row['effect'])} {row['unit']}"
    if interval:
        text += f" ({digits(interval[0])} to {digits(interval[1])})"
    return text


def cost_rows(r: dict) -> dict[str, dict]:
    """What each toggle took, of those of which that is known; the numbers are in result.json."""
    rows = {}
    for name, row in r["toggles"].items():
        cells = {
            "each time (95 %)": cost_text(row),
            "in all": total_text(row),
            "steps without, with": steps_text(row),
        }
        if any(cells.values()):
            rows[name] = cells
    return rows


def cost_text(row: dict) -> str | None:
    """3.71 ms a step (3.65 to 3.80)"""
    if row["cost_ms"] is None:
        return "not measured" if row["cost_per"] in ("step", "snapshot", "export") else None
    text = f"{row['cost_ms']:.2f} ms a {row['cost_per']}"
    if not tells_apart(row["cost_interval"]):
        text = UNCLEAR
    if row["cost_interval"]:
        text += " ({:.2f} to {:.2f})".format(*row["cost_interval"])
    return text


def total_text(row: dict) -> str | None:
    """2.5 s, 19.6 steps lost"""
    parts = []
    if row["cost_per"] == "scoring":
        seconds = row["cost_seconds"]
        than = "more" if seconds > 0 else "less"
        parts.append(f"{seconds_text(abs(seconds))} {than} than plain scoring")
    elif row["cost_seconds"] is not None:
        parts.append(seconds_text(row["cost_seconds"]))
    if row["steps_lost"] is not None:
        parts.append(f"{row['steps_lost']:.1f} steps lost")
    if row["bytes_saved"] is not None:
        parts.append(f"{row['bytes_saved']:,} bytes saved")
    return ", ".join(parts) or None


def seconds_text(seconds: float) -> str:
    """2.5 s, 0.25 s"""
    return f"{seconds:.{1 if abs(seconds) >= 1 else 2}f} s"


def steps_text(row: dict) -> str | None:
    """128.1 ms, 131.9 ms"""
    if row["step_ms_with"] is None:
        return None
    return f"{row['step_ms_without']:.1f} ms, {row['step_ms_with']:.1f} ms"


# Of the end of the log: the heading of the first column -> the rows by name
END_TABLES: dict[str, Callable[[dict], dict[str, dict]]] = {
    "scores": score_rows,
    "size": size_rows,
    "time": ledger_rows,
    "toggle": toggle_rows,
    "toggle's cost": cost_rows,
}


def time_lines(r: dict) -> list[str]:
    """What the ledger does not say by itself: limits that were broken, seconds that were lost."""
    lines = []
    for name in r["over_limit"]:
        row = r["limits"][name]
        lines.append(
            f"OVER THE LIMIT: {name} took {row['spent']:.3f} s of {row['limit']:g} s, "
            f"{-row['slack']:.3f} s too long"
        )
    if r["launches"] > 1 and r["lost_seconds"] is None:
        lines.append(
            f"{r['launches']} launches: how long the ones before went on after their last "
            "checkpoint is not known of all; those seconds are in no row"
        )
    elif r["launches"] > 1:
        lines.append(
            f"{r['launches']} launches: at least {r['lost_seconds']:.1f} s from the last "
            "checkpoint of each to its end were lost or done again; they are in the row `lost`, "
            "and no training that counts"
        )
    return lines


def codes_line(compressor: str, weights: int, order0_bytes: int, stored_bytes: int) -> str:
    """How close the compressor, with the scales, comes to the order-0 entropy of the codes."""
    stored_bits = 8 * stored_bytes / weights
    entropy_bits = 8 * order0_bytes / weights
    return (
        f"{compressor} stores {weights:,} quantised weights, codes and scales, in "
        f"{stored_bytes:,} bytes: {stored_bits:.3f} bits each; order-0 entropy of the codes alone, "
        f"without scales: {entropy_bits:.3f} bits each; {stored_bytes / order0_bytes - 1:+.2%}"
    )


def checkpoint_of(r: dict) -> str | None:
    """The file with the weights before the export; None where only an artifact was scored."""
    if r["steps"] is None:
        return None
    return r["checkpoint"] or str(Path(r["folder"]) / CHECKPOINTS[0])


def file_rows(r: dict) -> dict[str, dict]:
    """Where everything lies that the run has left."""
    folder = Path(r["folder"])
    packed = r["config"]["pack_code"] != "none"
    files = {
        f"artifact, {r['artifact_bytes']:,} bytes": r["artifact_path"],
        f"code, {r['code_bytes']:,} bytes": folder / (PACKED_NAME if packed else "train_gpt.py"),
        "checkpoint": checkpoint_of(r),
        "every figure": folder / "result.json",
        "every step": folder / "metrics.jsonl",
        "this log": folder / "train.log",
    }
    return {name: {"file": one_line(str(path))} for name, path in files.items() if path}


def next_launches(r: dict) -> str:
    """What can be done with the artifact."""
    ways = [f"{setting('eval_only', r['artifact_path'])} scores it again"]
    checkpoint = checkpoint_of(r)
    if not r["under_cap"] and checkpoint:
        ways.append(f"{setting('checkpoint', checkpoint)} FIT_TO_CAP=1 prunes it to the cap")
    return one_line("; ".join(ways))


def next_line(r: dict) -> str:
    """What can be done with the run."""
    page = (
        f"python ablate.py report {shlex.quote(r['folder'])} draws it as a page (in the repository)"
    )
    return one_line(f"NEXT: {next_launches(r)}; {page}")


def result_line(r: dict) -> str:
    """The last line of the log."""
    code = r["exit_code"]
    other = ""
    if "val_bpb_as_spelt" in r:
        other = f", {r['val_bpb_as_spelt']:.6f} by the bytes that the tokens spell"
    return (
        f"RESULT val_bpb {r['val_bpb']:.6f} ({r['scored']}, {r['val_tokens']:,} tokens, "
        f"{r['val_bytes']:,} text bytes{other}), {r['total_bytes']:,} bytes in all, "
        f"exit code {code}: {EXIT_CODES[code]}"
    )


# ── 13 Names ──────────────────────────────────────────────────────────────────────────────────────
# In: variables and arguments of a launch. Out: what they mean in the names of today's knobs.
# Promise: whatever looks like a setting is ours, stands for one of ours, or is refused by name.
# Only Config.from_env and --help need this section, and nothing else needs it to be understood.

# Where the defaults of other scripts stand, beside this one
BASES = "studies/bases.toml"


@dataclass(frozen=True)
class Base:
    """What a run of another script is, when it is told nothing: the tables [base.NAME] of BASES.

    settings: today's VARIABLE -> text.
    fixed: VARIABLE -> what that script means by another value than this; we have none such. Empty:
    no longer.
    means: a variable of that script -> today's variables.
    off: VARIABLE, also one that we lack -> a value at which it does nothing in that script alone.
    lacks: what that script has by itself and this one has not.
    What a base sets itself, its bases no longer fix or switch off.
    """

    name: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    means: dict[str, list[str]] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)

    def with_changes(self, name: str, table: dict) -> Base:
        """The base `name` whose table states what it changes in this one."""
        where = f"{BASES}: base.{name}"
        own = {key: value for key, value in table.items() if key == key.upper()}
        fixed = table.get("fixed", {})
        means = table.get("means", {})
        off = table.get("off", {})
        lacks = table.get("lacks", self.lacks)
        rest = table.keys() - own.keys() - {"base", "fixed", "means", "off", "lacks"}
        refuse(rest, f"{where}: {', '.join(sorted(rest))}: no such key; take it out")
        shaped = isinstance(fixed, dict) and isinstance(means, dict) and isinstance(off, dict)
        shaped = shaped and all(isinstance(names, list) for names in [lacks, *means.values()])
        shape = "fixed needs NAME = 'why', means NAME = ['NAME'], off NAME = 'value', lacks a list"
        refuse(not shaped, f"{where}: {shape}")
        for key in off:
            known = key in ABSENT or key in BY_NAME
            refuse(not known, f"{where}: off.{key}: no such setting, of others or ours; correct it")

        for key in [*own, *fixed, *itertools.chain(*means.values())]:
            refuse(key not in BY_NAME, f"{where}: {key}: no such setting; correct it")
        texts = {key: str(int(v) if isinstance(v, bool) else v) for key, v in own.items()}
        settings = self.settings | texts
        for key in [*fixed, *(off.keys() & BY_NAME.keys())]:
            refuse(key not in settings, f"{where}: {key}: fixed or off at which value? Set it too")
        fixed = {key: why for key, why in self.fixed.items() if key not in own} | fixed
        fixed = {key: why for key, why in fixed.items() if why}
        off = {key: str(value) for key, value in off.items()}
        off = {key: value for key, value in self.off.items() if key not in own} | off
        lacks = [str(technique) for technique in lacks]
        return Base(name, settings, fixed, self.means | means, off, lacks)

    def old_names(self) -> dict[str, Meaning]:
        """ALIASES as the script of this base reads them."""
        ours = {name: self.meaning_off(name) for name in self.off.keys() & BY_NAME.keys()}
        return ALIASES | ours | {old: renamed(*names) for old, names in self.means.items()}

    def meaning_off(self, name: str) -> Meaning:
        """Of a variable that is off there at another value than here."""
        there, here = self.off[name], self.settings[name]
        return lambda text, env: {name: here if same_value(text, there) else text}

    def absent(self) -> set[str]:
        """The names in ABSENT that mean nothing of ours in the script of this base."""
        return ABSENT.keys() - self.means.keys()

    def other_than_its_script(self, values: dict, told: dict[str, list[Said]]) -> list[str]:
        """A problem for each value that means something else in the script of this base.

        told: what was given for each knob, as it was spelt.
        """
        problems = []
        for name, why in self.fixed.items():
            own = self.settings[name]
            value = values.get(name.lower())
            if value is None or value == parse(name, own, BY_NAME[name].type):
                continue
            given, remedy = setting(name, value), f"set {name}={own}"
            if name in told and told[name][0].name != name:
                given, remedy = told[name][0], f"unset {told[name][0].name}"
            problem = f"{given}: with BASE={self.name} {why}"
            problems.append(f"{problem}; {remedy}, or unset BASE for ours")
        return problems


@cache
def base_tables() -> dict[str, dict]:
    """NAME -> table of every [base.NAME] in BASES beside this script; none without that file."""
    import tomli

    path = Path(__file__).resolve().parent / BASES
    if not path.exists():
        return {}
    try:
        bases = tomli.loads(path.read_text(encoding="utf-8-sig")).get("base", {})
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: cannot be read ({error}); mend it, or unset BASE") from None
    refuse(not isinstance(bases, dict), f"{path}: base: no tables; write [base.NAME]")
    for name, table in bases.items():
        remedy = f"no table; write [base.{name}]"
        refuse(not isinstance(table, dict), f"{path}: base.{name}: {remedy}")
    return bases


def read_base(name: str) -> Base:
    """The base of this name, with what it takes over from its own base. Refusal of other names."""
    if not name:
        return Base()
    tables = base_tables()
    absent = f"{BASES} is not beside this script: give the settings themselves, as the line "
    refuse(not tables, f"BASE={name}: {absent}'settings:' of a log has them, and unset BASE")
    choices = ", ".join(tables)
    refuse(name not in tables, f"BASE={name}: no such script; choose from {choices}, or unset BASE")

    lineage = [name]
    while parent := tables[lineage[-1]].get("base"):
        broken = parent not in list(tables) or parent in lineage
        remedy = f"no base, or one that comes back to itself; choose from {choices}"
        refuse(broken, f"{BASES}: base.{lineage[-1]}: base = {parent}: {remedy}")
        lineage.append(parent)
    base = Base()
    for ancestor in reversed(lineage):
        base = base.with_changes(ancestor, tables[ancestor])
    return base


def read_arguments(arguments: Iterable[str], problems: list[str]) -> tuple[dict, dict]:
    """NAME -> text of the arguments NAME=text, and of those NAME?=text; adds to the problems."""
    settings = {}
    defaults = {}
    for argument in arguments:
        name, sign, text = argument.partition("=")
        if not sign:
            problems.append(f"{argument}: an argument is NAME=value; --help lists the names")
        elif name.endswith("?"):
            defaults[name[:-1]] = text
        elif settings.setdefault(name, text) != text:
            problems.append(f"{name}={text} contradicts {name}={settings[name]}; give only one")
    return settings, defaults


class Unreadable(str):
    """In the place of a text in today's terms: why there is none."""


# What an old variable means: (its text, the environment) -> today's variables
Meaning = Callable[[str, dict], dict[str, str]]


def renamed(*names: str) -> Meaning:
    """An old variable whose text these have today."""
    return lambda text, env: dict.fromkeys(names, text)


def switch(name: str, off: str, on: str) -> Meaning:
    """An old 0 / 1 variable that stands for NAME=off or NAME=on."""
    neither = Unreadable("must be 0 or 1 (or False or True)")
    return lambda text, env: {name: {"0": off, "1": on}.get(SWITCHES.get(text), neither)}


def choice(name: str, **texts: str) -> Meaning:
    """An old variable whose values are words, each for a value of NAME."""
    none = Unreadable(f"choose one of {', '.join(texts)}")
    return lambda text, env: {name: texts.get(text, none)}


def sized(name: str, other: str, size: str) -> Meaning:
    """An old 0 / 1 variable beside that of a size: NAME or OTHER, or else this one."""

    def meaning(text: str, env: dict) -> dict[str, str]:
        beside = [env[known] for known in (other, name) if env.get(known, "0") != "0"]
        return switch(name, off="0", on=[*beside, size][0])(text, env)

    return meaning


# How the published CaseOps data calls itself
CASEOPS = "lossless_caps_caseops_v1_reserved"


def data_dir(text: str, env: dict) -> dict[str, str]:
    """An old variable of a folder that holds shards and tokenizers; what names those wins."""
    vocabulary = env.get("VOCAB_SIZE", Config.vocab_size)
    folder, shards, pieces = text, f"sp{vocabulary}", f"{vocabulary}_bpe"
    if SWITCHES.get(env.get("CASEOPS_ENABLED")) == "1":
        folder = f"{text}/datasets/fineweb10B_sp8192_caseops/datasets"
        shards, pieces = f"sp8192_{CASEOPS}", f"8192_bpe_{CASEOPS}"
    parts = {
        "DATA_PATH": f"{folder}/datasets/fineweb10B_{shards}",
        "TOKENIZER_PATH": f"{folder}/tokenizers/fineweb_{pieces}.model",
    }
    return {name: path for name, path in parts.items() if name not in env}


def artifact_dir(text: str, env: dict) -> dict[str, str]:
    """An old variable of a folder for all that a run leaves; empty: logs."""
    return {"LOGS_DIR": text} if text else {}


def mlp_hidden(text: str, env: dict) -> dict[str, str]:
    """An old variable of the MLP's hidden width, our multiple of MODEL_DIM; 0: as MLP_MULT says."""
    try:
        hidden, width = int(text), int(env.get("MODEL_DIM", Config.model_dim))
        multiple = hidden / width
    except (ValueError, ZeroDivisionError):
        return {"MLP_MULT": text}
    if int(multiple * width) < hidden:
        multiple = math.nextafter(multiple, math.inf)
    return {"MLP_MULT": str(multiple)} if hidden else {}


def loader_mode(text: str, env: dict) -> dict[str, str]:
    """An old variable with another word for one loader."""
    return {"LOADER": "rows" if text == "sequential" else text}


def recur_layers(text: str, env: dict) -> dict[str, str]:
    """The blocks of a loop that is passed once more, separated by commas."""
    numbers = [number for number in text.split(",") if number]
    if not numbers:
        return {"NUM_LOOPS": "0"}
    blocks = sorted(
        {int(number[:9]) if number.isascii() and number.isdecimal() else -1 for number in numbers}
    )
    first, last = blocks[0], blocks[-1]
    if first < 0 or len(blocks) <= last - first:
        return {"NUM_LOOPS": Unreadable("must be blocks in a row, separated by commas")}
    found = {"NUM_LOOPS": "1", "LOOP_START": str(first), "LOOP_END": str(last)}
    if not {"RECUR_START_STEP", "ENABLE_LOOPING_AT"} & env.keys():
        # as its scripts do
        found |= recur_start_step("3000", env)
    return found


def late_qat_threshold(text: str, env: dict) -> dict[str, str]:
    """An old variable that also says what starts QAT."""
    return {"QAT_START_KIND": "lr_scale", "QAT_START": text}


def activation(text: str, env: dict) -> dict[str, str]:
    """A word for the slope, beside which a slope may stand: leaky_relu2 is any but 0."""
    slopes = [env[name] for name in SLOPES if env.get(name, "0") not in ("0", "0.0")]
    return choice("NEGATIVE_SLOPE", relu2="0", leaky_relu2=[*slopes, "0.5"][0])(text, env)


def recur_start_step(text: str, env: dict) -> dict[str, str]:
    """An old variable that counts in steps where ours does in shares."""
    return {"LOOPING_KIND": "steps", "ENABLE_LOOPING_AT": text}


def ttt_enabled(text: str, env: dict) -> dict[str, str]:
    """An old 0 / 1 variable; on is the mode that its script has, or else the older one."""
    mode = env.get("TTT_MODE", "none")
    return switch("TTT_MODE", off="none", on="sgd" if mode == "none" else mode)(text, env)


def times(name: str) -> Meaning:
    """An old variable that multiplies the default of NAME, which is that of its scripts too."""

    def meaning(text: str, env: dict) -> dict[str, str]:
        try:
            product = float(text) * BY_NAME[name].default
        except ValueError:
            return {name: Unreadable("must be a number")}
        return {name: f"{product:.10g}"}

    return meaning


def ttt_mask(text: str, env: dict) -> dict[str, str]:
    """A word for the adapters that there are not."""
    without = {"": "", "all": "", "baseline_all": "", "no_q": "Q", "no_v": "V", "no_qv": "QV"}
    if text not in without:
        return {"TTT_Q_LORA": Unreadable(f"choose one of {', '.join(filter(None, without))}")}
    return {f"TTT_{part}_LORA": "0" for part in without[text]}


def short_chunks(text: str, env: dict) -> dict[str, str]:
    """An old 0 / 1 variable beside TTT_SHORT_SCORE_FIRST_STEPS, or else a length and a chunk."""
    steps = env.get("TTT_SHORT_SCORE_FIRST_STEPS", "")
    if SWITCHES.get(text) == "1" and steps:
        return {}
    length = env.get("TTT_SHORT_DOC_LEN", "512")
    chunk = env.get("TTT_SHORT_CHUNK_SIZE", env.get("TTT_CHUNK_SIZE", str(Config.ttt_chunk_size)))
    return switch("TTT_SHORT_SCORE_FIRST_STEPS", off="", on=f"{length}:{chunk}")(text, env)


def matrix_clip_sigmas(text: str, env: dict) -> dict[str, str]:
    """An old variable of all matrices (#1394), or of those that have none of their own (#1626)."""
    kinds = ("MLP_CLIP_SIGMAS", "ATTN_CLIP_SIGMAS", "BIGRAM_CLIP_SIGMAS")
    return {name: text for name in kinds if name not in env}


def gptq_reserve_ms(text: str, env: dict) -> dict[str, str]:
    """An old variable in milliseconds."""
    try:
        return {"GPTQ_RESERVE_SECONDS": f"{float(text) / 1e3:.10g}"}
    except ValueError:
        return {"GPTQ_RESERVE_SECONDS": text}


def record_coder(text: str, env: dict) -> dict[str, str]:
    """A word of records (from #1855 on) for their order of rows with lrzip and brotli.

    brotli alone takes 2 % more, so that their models would not fit.
    """
    return {"COMPRESSOR": "ans" if text == "pergroup" else text}


def stand_ins(given: dict[str, str]) -> list[str]:
    """A line for each setting that has here only its like."""
    if given.get("COMPRESSOR") == "pergroup":
        return ["COMPRESSOR=pergroup: ans stands for it, the nearest in bytes; there is no lrzip"]
    return []


SLOPES = ("NEGATIVE_SLOPE", "LEAKY_SLOPE", "LEAKY_RELU_SLOPE", "MLP_LEAKY_SLOPE")

# Spellings of other scripts for our knobs
ALIASES: dict[str, Meaning] = {
    # The run
    "DATA_DIR": data_dir,
    "DATASETS_DIR": renamed("DATA_PATH"),
    "ARTIFACT_DIR": artifact_dir,
    # The model
    "MLP_HIDDEN": mlp_hidden,
    "MLP_ACT": activation,
    "ACTIVATION": activation,
    **dict.fromkeys(SLOPES[1:], renamed("NEGATIVE_SLOPE")),
    "GATE_ATTN_OUT": renamed("ATTN_OUT_GATE_ENABLED"),
    "GATE_WIDTH": renamed("GATE_WINDOW"),
    "SMEAR_GATE_WIDTH": renamed("GATE_WINDOW"),
    "RECUR_LAYERS": recur_layers,
    "SMEAR_GATE_BOS_FIX": renamed("SMEAR_MASK_BOS"),
    "BIGRAM_HASH": sized("BIGRAM_VOCAB_SIZE", "BIGRAM_HASH_BUCKETS", "4096"),
    "BIGRAM_HASH_BUCKETS": renamed("BIGRAM_VOCAB_SIZE"),
    "BIGRAM_HASH_DIM": renamed("BIGRAM_DIM"),
    "RECUR_START_STEP": recur_start_step,
    # QAT and SWA
    "QAT": renamed("QAT_ENABLED"),
    "ENABLE_QAT": renamed("QAT_ENABLED"),
    "LATE_QAT": renamed("QAT_ENABLED"),
    "QAT_START_FRAC": renamed("QAT_START"),
    "LATE_QAT_THRESHOLD": late_qat_threshold,
    "QAT_THRESHOLD": late_qat_threshold,
    "SWA": renamed("SWA_ENABLED"),
    # Data, optimiser and schedule
    "LOADER_MODE": loader_mode,
    "MUON_WEIGHT_DECAY": renamed("MUON_WD"),
    "WEIGHT_DECAY": renamed("ADAM_WD"),
    "ADAM_WEIGHT_DECAY": renamed("ADAM_WD"),
    "SCALAR_WD": renamed("ADAM_WD"),
    "POLAR_EXPRESS": switch("MUON_COEFFS", off="quintic", on="polar_express"),
    "USE_POLAR_EXPRESS": switch("MUON_COEFFS", off="quintic", on="polar_express"),
    "POLAR_EXPRESS_NS": switch("MUON_COEFFS", off="quintic", on="polar_express"),
    "WARMDOWN_STEPS": renamed("WARMDOWN_ITERS"),
    "WARMDOWN_FRACTION": renamed("WARMDOWN_FRAC"),
    "LR_FLOOR": renamed("MIN_LR"),
    # Export
    "QUANT_BITS": renamed("QUANT_BITS_MLP", "QUANT_BITS_ATTN", "QUANT_BITS_BIGRAM"),
    "MATRIX_BITS": renamed("QUANT_BITS_MLP", "QUANT_BITS_ATTN"),
    "EMBED_BITS": renamed("QUANT_BITS_EMBED"),
    "MATRIX_CLIP_SIGMAS": matrix_clip_sigmas,
    "USE_GPTQ": renamed("GPTQ_ENABLED"),
    "GPTQ_RESERVE_MS": gptq_reserve_ms,
    "FP16_EMBED": switch("QUANT_BITS_EMBED", off="8", on="16"),
    "FP16_EMBED_EXPORT": switch("QUANT_BITS_EMBED", off="8", on="16"),
    "FP16_PASSTHROUGH_PATTERNS": renamed("FP16_KEEP_NAME_PATTERNS"),
    "COMPRESSOR": record_coder,
    "USE_ZSTD": switch("COMPRESSOR", off="zlib", on="zstd"),
    "ZSTD_LEVEL": renamed("COMPRESS_LEVEL"),
    # Scoring and test-time training
    "SLIDING_EVAL": sized("EVAL_STRIDE", "SLIDING_EVAL_STRIDE", "64"),
    "SLIDING_WINDOW_ENABLED": sized("EVAL_STRIDE", "SLIDING_EVAL_STRIDE", "64"),
    "SLIDING_EVAL_STRIDE": renamed("EVAL_STRIDE"),
    "SLIDING_BATCH_SIZE": renamed("EVAL_BATCH_SEQS"),
    "EVAL_BATCH_SIZE": renamed("EVAL_BATCH_SEQS"),
    "SW_EVAL_BATCH": renamed("EVAL_BATCH_SEQS"),
    "TTT_ENABLED": ttt_enabled,
    "TTT_EVAL_SEQ_LEN": renamed("EVAL_SEQ_LEN"),
    "TTT_LOCAL_LR_MULT": times("TTT_LORA_LR"),
    "TTT_MASK": ttt_mask,
    "TTT_SHORT_SCORE_FIRST_ENABLED": short_chunks,
}

# Spellings that may say nothing -> why
WINS = {
    "DATA_DIR": "DATA_PATH and TOKENIZER_PATH win",
    "MLP_HIDDEN": "0: the width is MLP_MULT's",
    "TTT_SHORT_SCORE_FIRST_ENABLED": "TTT_SHORT_SCORE_FIRST_STEPS has the chunks",
    "MATRIX_CLIP_SIGMAS": "MLP_, ATTN_ and BIGRAM_CLIP_SIGMAS win",
}

# Beside names: whatever the value is, the result is the same / is another
ANY, NEVER = "any value", "no value"

# Settings of other scripts that this one has none such of, by the value at which nothing is
# lost without them. What later becomes a technique here leaves the table.
ABSENT_AT = {
    "0": """
        EMBED_DIM UNTIE_AT_FRACTION MLP_GROUPS FP_STORAGE DISABLE_LAYER0_ATTN REFINER
        TVERSKY_NUM_FEATURES TVERSKY_FEATURE_POOLS OPTROT_ENABLED TEMP_SCALING DIFF_ATTN
        ASYMMETRIC_LOGIT GATED_ATTENTION VALUE_RESIDUAL DTG_ENABLED LATE_K_LAYERS GATE_MLP_OUT
        GATED_ATTN GATED_SKIPS TRIGRAM NGRAM_HINT_PRECOMPUTE_OUTSIDE NGRAM_WITHIN_BETA
        NGRAM_WORD_BETA AGREE_ADD_BOOST WITHIN_BOOST WORD_BOOST ROPE_YARN EVAL_NTK_ALPHA LORA_RANK
        TRAINING_DEPTH_RECURRENCE EVAL_DEPTH_RECURRENCE PARALLEL_RESIDUAL PARALLEL_FREEZE_LANE0
        PARALLEL_MLP_READ_MIX MUON_HUBER_WD BLOCK_LARS_TRUST CAUTIOUS_WD SEQ_LEN_START
        BATCH_TOKENS_START CURRICULUM MTP_NUM_HEADS MTP_HEADS LAWA_ENABLED FORCE_STOP_STEP
        QAT_FRACTION MIXED_QUANT PRUNE_RATIO HESSIAN_CLIP_LAMBDA
        AWQ_LITE_ENABLED SLOT_ENABLED HASH_EMBED_ENABLED ETLB_ENABLED
        TTT_DEBUG_BYPASS TTT_SHORT_LORA_ENABLED TTT_WARM_START_MEAN_ENABLED TTT_DOC_LIMIT
        TTT_GRAD_STEPS_CLEAN TTT_TRAIN_MIN_DOC_LEN TTT_TRAIN_MAX_DOC_LEN TTT_ADAMW_WD
        TTT_LORA_EMA_DECAY GLOBAL_TTT_DOC_LIMIT GLOBAL_TTT_WARMUP_CHUNKS PREQUANT_ONLY
        QUANTIZE_ONLY POST_GPTQ_EVAL_ONLY TTT_EVAL_ONLY TTT_ONLY TTT_ONLY_EVAL
        SKIP_POST_TRAIN_EVAL""",
    "-1": "INT6_LAYER_START INT6_LAYER_END",
    "none": "REPEAT_UNTIE_MLP",
    "": """
        CANON_AC_LAYERS QK_GAIN_INIT_SCHEDULE MIDRUN_CAP_SCHEDULE INT4_LAYERS
        CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS INT5_LAYERS
        TTT_EVAL_BATCHES OUT_DIR TTT_OUTPUT_DIR EVAL_ONLY_PATH
        EVAL_ONLY_QUANTIZED_PATH""",
    "1": """
        TIE_EMBEDDINGS PARALLEL_START_LAYER_IS_PHYSICAL PARALLEL_IDENTITY_INIT
        PARALLEL_SKIP_LANE0_ONLY CLIP_MULT_EARLY CLIP_MULT_MID CLIP_MULT_LATE CLIP_MULT_LOOP
        VAL_DOC_FRACTION EVAL_INCLUDE_TAIL TTT_GRAD_STEPS TTT_UPDATE_EVERY
        GLOBAL_TTT_RESPECT_DOC_BOUNDARIES""",
    "proj": "ATTN_OUT_GATE_SRC GATE_ATTN_SRC",
    "standard": "ATTN_PROJ_TYPE LOGIT_HEAD_TYPE",
    "tanh": "SOFTCAP_TYPE",
    "rope": "ROPE_TYPE",
    "muon": "MATRIX_OPTIMIZER",
    "sgd": "TTT_OPTIMIZER GLOBAL_TTT_OPTIMIZER",
    "default": "COMPILE_MODE",
    # read and never used, read by another of these alone, or for speed, memory and messages
    ANY: """
        ROPE_TRAIN_SEQ_LEN RECUR_WARMUP_STEPS EMBED_LR HEAD_LR MUON_BETA2 MIDRUN_CAP_LOG_UPDATES
        GPTQ_BLOCK_SIZE
        TTT_HEARTBEAT_SECONDS VAL_BATCH_SIZE VAL_BATCH_TOKENS LOGIT_CHUNK_TOKENS
        FUSED_CE_ENABLED MLX_MAX_MICROBATCH_TOKENS MLX_EAGER_EVAL PERGROUP_ROUNDTRIP_CHECK
        COMPILE_SHAPE_WARMUP COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_LOOP_MODES
        DYNAMO_CACHE_SIZE_LIMIT DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT CHURN_LOG_EVERY
        SAVE_QUANT_STATE GLOBAL_TTT_MUON_NESTEROV GLOBAL_TTT_MUON_NS_STEPS
        GLOBAL_TTT_WARMUP_START_LR TTT_SHORT_BETA2 TTT_SHORT_LORA_LR TTT_SHORT_LORA_RANK
        TTT_SHORT_WEIGHT_DECAY TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_MOMENTUM
        TTT_SHORT_DOC_LEN TTT_SHORT_CHUNK_SIZE""",
    NEVER: """
        EMBEDDING_DIM BITNET_GROUP_SIZE TVERSKY_MEMBERSHIP REFINER_KERNEL USE_SMEARGATE SMEAR
        BIGRAM_BUCKETS WITHIN_TAU WORD_NORMALIZE WORD_ORDER WORD_TAU NGRAM_AGREE_BONUS
        NGRAM_BASE_BETA NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE NGRAM_WITHIN_THRESHOLD
        NGRAM_WORD_THRESHOLD YARN_MAX_LEN NUM_UNIQUE_BLOCKS EFFECTIVE_DEPTH DEPTH_LORA_RANK
        UNTIE_LOOP_MLPS LORA_LR REPEAT_UNTIE_MLP_LAYERS MATRIX_LR_EARLY MATRIX_LR_LATE
        BANK_SPLIT CORR_WEIGHT_LR ADAM_LR MUON_HUBER_DELTA BLOCK_LARS_MIN_SCALE
        SEQ_SCHEDULE_FRACTION BATCH_SCHEDULE_FRACTION TRAIN_MAX_SEQ_LEN MTP_LOSS_WEIGHT
        LAWA_FREQ LAWA_K QAT_INT6 USE_INT6 QUANT_CLIP_RANGE TARGET_MB N_INT6_LAYERS INT4_STEP
        GPTQ_AR_SELFGEN GPTQ_BATCH_SIZE GPTQ_CALIB_BATCHES GPTQ_CALIB_SAMPLES GPTQ_TEMPERATURE
        LQER_GAIN_SELECT LQER_SCOPE
        AWQ_LITE_BITS AWQ_LITE_GROUP_SIZE AWQ_LITE_GROUP_TOP_K GPTQ_CALIBRATION_MODE
        SLOT_LR SLOT_STEPS ETLB_CLIP ETLB_LR ETLB_STEPS HASH_EMBED_SIZE TTT_NS_STEPS
        TTT_ENTROPY_HIGH TTT_ENTROPY_LOW TRAIN_FILES VAL_FILES""",
}

# Name -> the value at which nothing is lost without it
ABSENT = {name: value for value, names in ABSENT_AT.items() for name in names.split()}


def qat_fraction(text: str, env: dict) -> str:
    """The share of the run that has QAT as our share of it that has none."""
    with contextlib.suppress(ValueError):
        return f"set QAT_START_KIND=time_frac QAT_START={1 - float(text):.10g}"
    return "set QAT_START_KIND=time_frac and QAT_START"


# What to set instead, where we have something like it; {text}: the value
INSTEAD_OF = {
    "EMBEDDING_DIM": "set MODEL_DIM={text}",
    "USE_SMEARGATE SMEAR": "set SMEAR_GATE={text}",
    "BIGRAM_BUCKETS": "set BIGRAM_VOCAB_SIZE={text}",
    "MATRIX_LR_EARLY MATRIX_LR_LATE": "set MATRIX_LR for all layers",
    "FORCE_STOP_STEP": "set ITERATIONS={text}",
    "QAT_INT6": "set QUANT_BITS, which QAT follows",
    "QAT_FRACTION": qat_fraction,
    "USE_INT6": "set QUANT_BITS=6 (or 8 for none)",
    "INT6_LAYER_START INT6_LAYER_END": "set QUANT_BITS",
    "QUANT_CLIP_RANGE": "set QUANT_BITS (6 for 31, 8 for 127)",
    "PRUNE_RATIO": "see PRUNE_PCT",
    "TARGET_MB": "set FIT_TO_CAP=1 and CAP_BYTES",
    "VAL_DOC_FRACTION": "set VAL_MAX_TOKENS",
    "TTT_GRAD_STEPS TTT_UPDATE_EVERY": "see TTT_CHUNK_SIZE: one step after each",
    "TRAIN_FILES VAL_FILES": "set DATA_PATH to their folder",
    "OUT_DIR TTT_OUTPUT_DIR": "set LOGS_DIR={text}",
    "EVAL_ONLY_PATH EVAL_ONLY_QUANTIZED_PATH": "see EVAL_ONLY, CHECKPOINT",
    "PREQUANT_ONLY QUANTIZE_ONLY POST_GPTQ_EVAL_ONLY": "see CHECKPOINT",
    "TTT_EVAL_ONLY TTT_ONLY TTT_ONLY_EVAL": "see EVAL_ONLY",
    "COMPILE_MODE": "see COMPILE",
}
INSTEAD = {name: remedy for names, remedy in INSTEAD_OF.items() for name in names.split()}


def settings_of_others(env: dict, base: Base) -> tuple[dict[str, str], list[str]]:
    """(name -> why it can do nothing, a problem for each of the rest) of names in ABSENT."""
    idle = {}
    problems = []
    for name in sorted(base.absent() & env.keys()):
        text = env[name]
        why = without_loss(name, text)
        if name in base.off and same_value(text, base.off[name]):
            why = "off, as here"
        if why:
            idle[name] = why
            continue
        remedy = INSTEAD.get(name, "")
        remedy = remedy(text, env) if callable(remedy) else remedy.format(text=text)
        told = f"{name}={text}: a setting of other scripts; this one has none such: unset it"
        problems.append(f"{told}, or {remedy}" if remedy else told)
    return idle, problems


def without_say(env: dict, base: Base) -> dict[str, str]:
    """Name -> why it can do nothing, of old names that stand for nothing beside the others."""
    beside = base.settings | env
    given = [(name, means) for name, means in base.old_names().items() if name in env]
    mute = [name for name, means in given if not means(env[name], beside)]
    return {name: WINS.get(name, "has no say here") for name in mute}


def without_loss(name: str, text: str) -> str:
    """Why nothing is lost without this setting of other scripts; empty if something is."""
    if ABSENT[name] == ANY:
        return "changes no result there either"
    if not same_value(text, ABSENT[name]):
        return ""
    return "off, as here" if ABSENT[name] in ("0", "-1", "none", "") else "what is built in here"


def same_value(one: str | None, other: str | None) -> bool:
    """Whether two texts say the same: as texts, switches or numbers."""
    one, other = SWITCHES.get(one, one), SWITCHES.get(other, other)
    with contextlib.suppress(ValueError, TypeError):
        return float(one) == float(other)
    return one == other


class Said(NamedTuple):
    """What one setting says of a knob."""

    # as it was written
    name: str
    value: str
    # in today's terms; None if it cannot be read, and then why
    text: str | None
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


def in_todays_names(settings, base: Base, beside: dict) -> dict[str, list[Said]]:
    """Knob, or a name that is none -> what these settings say of it, without those in ABSENT.

    beside: all of base and launch, for an old name that means something only beside another.
    """
    found = {}
    old_names = base.old_names()
    names = settings.keys() - base.absent()
    # today's names before the old ones
    for name in sorted(names, key=lambda name: (name in old_names, name)):
        value = settings[name]
        for today, text in old_names.get(name, renamed(name))(value, beside).items():
            said = Said(name, value, text)
            if name in old_names:
                said = checked_spelling(said, today)
            found.setdefault(today, []).append(said)
    return found


def checked_spelling(said: Said, name: str) -> Said:
    """What an old spelling says of this knob, with a problem if it cannot be read or be so."""
    f = BY_NAME[name]
    try:
        refuse(isinstance(said.text, Unreadable), f"{said}: {said.text}")
        if said.text == said.value:
            check_value(f, parse(said.name, said.value, f.type), said.name)
    except Refusal as refusal:
        return said._replace(text=None, problem=str(refusal))
    return said


def agreed(told: list[Said], problems: list[str]) -> str | None:
    """The text that these all give a knob; None if one cannot be read. Adds to the problems."""
    first = told[0]
    for said in told:
        if said.problem:
            problems.append(said.problem)
        elif first.text is not None and not same_value(first.text, said.text):
            problems.append(f"{said} contradicts {first}; set only {first.name}")
    return first.text


def overruled(around: dict[str, list[Said]], said: dict[str, list[Said]]) -> tuple[str, ...]:
    """A line for each setting of the environment that an argument says otherwise."""
    lines = []
    for name in sorted(said.keys() & around.keys()):
        argument, other = said[name][0], around[name][0]
        if not same_value(argument.text, other.text):
            lines.append(f"argument {argument} wins over {other} of the environment")
    return tuple(dict.fromkeys(lines))


def ambiguous(env: dict, base: Base) -> Iterator[tuple[str, str]]:
    """Settings that scripts read differently: the knob that would say which is meant, the problem.

    env: what was given, as it is spelt. A base says so only where it says something of the matter.
    """
    on = {name for name, text in env.items() if SWITCHES.get(text) == "1"}
    said = env.keys() | base.settings.keys()
    if "SWA" in on and "SWA_START_FRAC" in env and "SWA_START_KIND" not in said:
        told = f"SWA=1 SWA_START_FRAC={env['SWA_START_FRAC']}"
        meant = "a share of ITERATIONS (#199) or an lr scale (#194, #989)"
        yield "SWA_START_KIND", f"{told}: {meant}? Set SWA_START_KIND or a BASE that has it"

    yield from ambiguous_start(env, on, base)

    if "BIGRAM_HASH" in on and "BIGRAM_VOCAB_SIZE" not in {*env, *base.fixed}:
        meant = "the hashes of #194 and #199, which we lack"
        remedy = "Set BIGRAM_VOCAB_SIZE=4096 for ours, or BASE=pr194, pr199"
        yield "BIGRAM_VOCAB_SIZE", f"BIGRAM_HASH=1: {meant}? {remedy}"

    if env.get("NUM_LOOPS") == "1" and not {"LOOP_START", "LOOP_END", *base.settings} & said:
        meant = "one pass in all (first scripts) or one beside the first (#1394)"
        remedy = "Set LOOP_START and LOOP_END for the latter, or a BASE"
        yield "LOOP_START", f"NUM_LOOPS=1: {meant}? {remedy}"

    details = {"TTT_LR", "TTT_EPOCHS", "TTT_CHUNK_TOKENS", "TTT_FREEZE_BLOCKS"}
    if "TTT_ENABLED" in on and "TTT_MODE" not in {*env, *base.fixed} and not details & said:
        meant = "of all weights (#549, TTT_MODE=sgd) or of adapters (#1530, TTT_MODE=lora)"
        yield "TTT_MODE", f"TTT_ENABLED=1: {meant}? Set TTT_MODE or a BASE that has it"

    tilts = {"NGRAM_WITHIN_BETA", "NGRAM_WORD_BETA", "NGRAM_BASE_BETA"} & env.keys()
    if "NGRAM_TILT_ENABLED" in on and tilts:
        meant = "by one order (#2135) or by orders 8 to 16 (#1514), which we lack"
        remedy = f"Unset {', '.join(sorted(tilts))} for the first"
        yield "NGRAM_TILT_ENABLED", f"NGRAM_TILT_ENABLED=1: {meant}? {remedy}"


def ambiguous_start(env: dict, on: set[str], base: Base) -> Iterator[tuple[str, str]]:
    """The same for what starts QAT."""
    if {"QAT_START_KIND", "LATE_QAT_THRESHOLD", "QAT_THRESHOLD"} & env.keys():
        return
    toggles = {"QAT_ENABLED", "QAT", "ENABLE_QAT", "LATE_QAT"}
    quantises = base.settings.get("QAT_ENABLED") == "1"
    if toggles & env.keys():
        quantises = bool(toggles & on)
    kind = base.settings.get("QAT_START_KIND", "")
    starts = [name for name in ("QAT_START", "QAT_START_FRAC") if name in env]
    starts = [name for name in starts if not same_value(env[name], "0")]

    if "LATE_QAT" in on and "LATE_QAT_THRESHOLD" not in base.means:
        remedy = "Set LATE_QAT_THRESHOLD (0.1 or 0.15 in its scripts) or a BASE that has it"
        yield "QAT_START_KIND", f"LATE_QAT=1: below which lr scale? {remedy}"
    elif quantises and starts and kind in ("", "always"):
        remedy = "of what? lr scale (#989) or share of steps (#117)? Set QAT_START_KIND or BASE"
        yield "QAT_START_KIND", f"{starts[0]}={env[starts[0]]}: {remedy}"
    elif "ENABLE_QAT" in on and not kind:
        remedy = "Set QAT_START_KIND (always: from the first step) or a BASE that has it"
        yield "QAT_START_KIND", f"ENABLE_QAT=1: from where on? {remedy}"


# A launch without BASE is like a base that has such a share of the settings given, and of these so
# many that are not our defaults
ALIKE_SHARE = 0.75
ALIKE_SETTINGS = 5


class Likeness(NamedTuple):
    """A base that the settings of a launch are like.

    values: knob -> what the base has. same, given: how many of the settings given it has, of all.
    missing: how many it states itself that were not given.
    """

    name: str
    values: dict
    same: int
    given: int
    missing: int


def nearest_base(values: dict, given: Iterable[str]) -> Likeness | None:
    """The base that these settings are most like; None where none is near, or none can be read.

    values: knob -> value, perhaps without those that cannot be read. given: the variables set.
    """
    mine = {}
    for name in given:
        f = BY_NAME[name]
        if f.metadata["scope"] in COMPARED and f.name in values:
            mine[f.name] = values[f.name]
    if len(mine) < ALIKE_SETTINGS:
        return None
    found = []
    # a launch without BASE needs no tables
    with contextlib.suppress(Refusal):
        found = [likeness(name, mine) for name in base_tables()]
    near = [one for one in found if one is not None]
    return max(near, key=lambda one: (one.same, -one.missing), default=None)


def likeness(name: str, mine: dict) -> Likeness | None:
    """How like this base the settings `mine` are; None if not enough."""
    theirs = {f.name: f.default for f in KNOBS}
    for variable, text in read_base(name).settings.items():
        f = BY_NAME[variable]
        theirs[f.name] = parse(variable, text, f.type)
    same = [knob for knob, value in mine.items() if theirs[knob] == value]
    telling = [knob for knob in same if theirs[knob] != BY_NAME[knob.upper()].default]
    if len(telling) < ALIKE_SETTINGS or len(same) < ALIKE_SHARE * len(mine):
        return None
    own = {key.lower() for key in base_tables()[name] if key in BY_NAME}
    return Likeness(name, theirs, len(same), len(mine), len(own - mine.keys()))


def likeness_line(near: Likeness | None, cfg: Config | None = None) -> list[str]:
    """What to say of it, in one line: which base, and what differs from it; nothing of none.

    cfg: the launch, unless it is refused.
    """
    if near is None:
        return []
    line = f"nearest base: {near.name} has {near.same} of the {near.given} settings given"
    if cfg is None:
        return [f"{line}; BASE={near.name} beside them adds the rest of that run"]
    names = cfg.differing(near.values)
    if not names:
        return [f"{line}, and of the rest nothing differs"]
    there = " ".join(setting(name, near.values[name]) for name in names)
    return [f"{line}; it differs from this run in {there}"]


# First words of our settings and of those in ABSENT that no other program's variables have
TECHNIQUES = """
    QAT QNA SWA SQWA EMA TTT SMEAR BIGRAM TRIGRAM NGRAM XSA MUON QUANT WARMDOWN ROPE QK GRAD PRUNE
    VE MLP GPTQ LQER LAWA MTP LEAKY RECUR"""

# What other trainers call them
SYNONYMS = {
    "BATCH_TOKENS": "TRAIN_BATCH_TOKENS",
    "CLIP_GRAD_NORM": "GRAD_CLIP_NORM",
    "COMPRESSION": "COMPRESSOR",
    "D_MODEL": "MODEL_DIM",
    "GRADIENT_ACCUMULATION_STEPS": "GRAD_ACCUM_STEPS",
    "GRAD_CLIP": "GRAD_CLIP_NORM",
    "LAYERS": "NUM_LAYERS",
    "LEARNING_RATE": "MATRIX_LR",
    "LR_SCHEDULE": "WARMDOWN_FRAC",
    "MAX_STEPS": "ITERATIONS",
    "MAX_WALLCLOCK": "MAX_WALLCLOCK_SECONDS",
    "NS_STEPS": "MUON_BACKEND_STEPS",
    "NUM_ITERATIONS": "ITERATIONS",
    "NUM_STEPS": "ITERATIONS",
    "N_EMBD": "MODEL_DIM",
    "N_HEAD": "NUM_HEADS",
    "N_LAYER": "NUM_LAYERS",
    "QK_GAIN": "QK_GAIN_INIT",
    "RANDOM_SEED": "SEED",
    "SEQ_LEN": "TRAIN_SEQ_LEN",
    "VALUE_EMBEDDING": "VE_ENABLED",
}


def bare(name: str) -> str:
    """A name as it is compared: EMA of ENABLE_EMA, use_ema and EMA_ENABLED; SEED of seeds."""
    name = re.sub(r"^(USE_|ENABLE_?)|_?ENABLED?$", "", name.upper().strip("-_"))
    return re.sub("[-_]", "", name).removesuffix("S")


@cache
def spellings() -> dict[str, str]:
    """How a name is compared -> the name."""
    names = {bare(name): name for name in (*ABSENT, *ALIASES, *BY_NAME)}
    return names | {bare(other): name for other, name in SYNONYMS.items()}


@cache
def meant(name: str, argument: bool = False) -> str | None:
    """Which of our names, or of ABSENT, a name that is none of them stands for; None: none.

    It may be another program's where it is not an argument: then it must be nearer, and not to a
    name of the run, as LOG_DIR is to LOGS_DIR. Of a technique any name will do.
    """
    known = spellings()
    letters = bare(name)
    if letters in known:
        return known[letters]

    word, *rest = re.sub("^(USE|ENABLE)_", "", name.upper().strip("-_")).split("_")
    kin = [other for other in known if f"{known[other]}_".startswith(f"{word}_")]
    ours = [other for other in known if known[other] not in ABSENT]
    if word in TECHNIQUES.split():
        kin = [other for other in kin if other in ours] or kin
        return known[difflib.get_close_matches(letters, kin, 1, 0)[0]]
    if kin and not rest:
        # the first word of ours alone is a word that others use, too
        return None

    if not argument:
        run = {f.name.upper() for f in KNOBS if f.metadata["scope"] in ("run", "loop")}
        ours = [other for other in ours if known[other] not in run]
    nearness = 0.6 if argument else 0.89
    kin = [other for other in kin if other in ours]
    for group, least in ((kin, nearness), (ours, nearness), (known, 0.93)):
        for near in difflib.get_close_matches(letters, group, 1, least):
            # a slip is seldom at the beginning: SPEED is not SEED
            if argument or near[:2] == letters[:2]:
                return known[near]
    return None


def strangers(told: dict[str, list[Said]], arguments: bool = False) -> list[str]:
    """A problem for each name that is no setting: of arguments all, else those that are meant."""
    problems = []
    for name in sorted(told.keys() - BY_NAME.keys()):
        nearest = meant(name, arguments)
        written = told[name][0]
        remedy = "--help lists all" if arguments else "Else unset it"
        if nearest in ABSENT:
            lacking = f"{nearest} is a setting of other scripts; this one has none such"
            problems.append(f"{written}: {lacking}: unset it")
        elif nearest:
            problems.append(f"{written}: no such setting; did you mean {nearest}? {remedy}")
        elif arguments:
            problems.append(f"{written}: no such setting; {remedy}")
    return problems


# Where the meanings begin in --help
HELP_COLUMN = 34


def help_text() -> str:
    """Every knob with its default, meaning, type, unit and range, as wide as the terminal."""
    width = shutil.get_terminal_size().columns
    codes = "\n".join(f"{code:>7} {meaning}" for code, meaning in EXIT_CODES.items())
    knobs = "\n".join(help_entry(f, width) for f in KNOBS)
    aliases = ", ".join(ALIASES)
    bases = f"the name of a [base.NAME] in {BASES} beside this script; none is there"
    with contextlib.suppress(Refusal):
        bases = ", ".join(base_tables()) or bases
    parts = [
        __doc__.strip(),
        f"Exit codes:\n\n{codes}",
        f"VARIABLE=default, meaning (type, unit: choices or range)\n\n{knobs}",
        textwrap.fill(f"BASE takes {bases}", width),
        textwrap.fill(f"Spellings of other scripts that also work: {aliases}", width),
    ]
    return "\n\n".join(parts)


def help_entry(f: dataclasses.Field, width: int) -> str:
    """A knob of --help: VARIABLE=default, and to the right of it or below what it means."""
    limits = Knob(**f.metadata)
    default = int(f.default) if f.type == "bool" else f.default
    setting = f"{f.name.upper()}={default}"
    if default == "":
        setting += '""'

    kind = f.type
    if limits.unit:
        kind += f", {limits.unit}"
    if limits.choices:
        kind += ": " + " | ".join(map(str, limits.choices))
    elif limits.hi is not None:
        kind += f": {limits.lo} to {limits.hi}"
    elif limits.lo is not None:
        kind += f": {limits.lo} or more"

    indent = " " * HELP_COLUMN
    meaning = f"{limits.doc} ({kind})"
    lines = textwrap.fill(meaning, width, initial_indent=indent, subsequent_indent=indent)
    if len(setting) >= HELP_COLUMN:
        return f"{setting}\n{lines}"
    return setting + lines[len(setting) :]


# ── 14 Main ───────────────────────────────────────────────────────────────────────────────────────
# In: a Config. Out: result.json and an exit code.
# Promise: what is scored was read back from disk; whatever ends a run early is one line and one
# exit code.


class Inputs(NamedTuple):
    """The data of a run."""

    splits: dict[str, Split]
    validation: Validation
    fingerprint: dict


def main(cfg: Config, start_up: float = 0.0) -> dict:
    """One run, from its settings to result.json, which it returns."""
    with Progress(start_up) as progress:
        run = Run(cfg, start_up, progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, run.signalled)
        try:
            finished = finished_result(cfg, run)
            return finished or train_and_score(cfg, run)
        except BaseException as error:
            refusal = explain(run, error)
            # torchrun stops this rank where another one was refused first
            stopped = run.stop and not run.has_begun
            if stopped or (isinstance(error, Refusal) and error.code == 2):
                run.take_back_folder()
            if refusal is None:
                raise
            raise refusal from error


def train_and_score(cfg: Config, run: Run) -> dict:
    """tokens -> train -> average -> quantise -> pack -> disk -> read back -> score -> result"""
    path = Path(cfg.eval_only) if cfg.eval_only else run.dir / "artifact.bin"
    run.log(f"run {run.dir.name}: {device_name(run)}, {run.world} ranks, code {CODE_SHA256[:12]}")
    saved = saved_training(cfg, run)
    cfg = complete_settings(cfg, path, saved)
    log_start(cfg, run)

    inputs = load_inputs(cfg, run)
    attend = choose_attention(cfg, run)
    trained = None
    if not cfg.eval_only:
        trained = train_and_export(cfg, run, inputs, attend, saved)

    run.has_begun = True
    with run.phase("read back"):
        _, state = read_artifact(path)
    scores = score_all(cfg, run, state, inputs.validation, attend, trained)
    run.peak_memory_bytes = peak_memory(run)
    if trained:
        with run.phase("prove toggles"):
            prove_toggles(cfg, run, trained, inputs.validation, attend)

    report = build_result(cfg, run, scores, inputs.fingerprint, path, trained)
    return finish(run, report)


def finished_result(cfg: Config, run: Run) -> dict | None:
    """With RESUME, the result of a run that is complete already."""
    path = run.dir / "result.json"
    if not cfg.resume or not path.exists():
        return None
    result = json.loads(path.read_text())
    source = f"RESUME=1 RUN_ID={run.dir.name}"
    knobs = cfg.knobs("seed", *COMPARED)
    lacking = [name.upper() for name in knobs if name not in result["config"]]
    names = f"{', '.join(lacking[:3])}{' ...' if lacking[3:] else ''}"
    older = f"{source}: was completed by an older script, without {names}; take another RUN_ID"
    refuse(lacking, older)
    made = {name: result["config"][name] for name in knobs}
    own = {name: value for name, value in made.items() if name.upper() not in cfg.given}
    check_base(cfg, own, source)
    told = []
    for name in dataclasses.replace(cfg, inherited=True, **own).differing(made):
        given = setting(name, getattr(cfg, name))
        there = f"{source} is complete, with {setting(name, made[name])}"
        told.append(f"{given}: {there}; unset it, or take another RUN_ID")
    refuse(told, told)
    run.log(f"resume: {path} is there: nothing is left to do")
    return result


def saved_training(cfg: Config, run: Run) -> tuple[dict, State] | None:
    """(facts, tensors) of the checkpoint that this run starts from, if any."""
    if cfg.checkpoint:
        return read_container(Path(cfg.checkpoint))
    if cfg.resume:
        saved = last_checkpoint(run)
        take_over(run, saved[0] if saved else {})
        return saved
    return None


def take_over(run: Run, facts: dict) -> None:
    """The ledger of the launches before this one. Refusal where a checkpoint holds none.

    A run that was stopped before its first checkpoint begins again; its seconds are lost.
    """
    if not facts and not (run.dir / ALIVE).exists():
        run.leaves_signs = True
        return
    ledger = facts.get("ledger", {})
    launches = facts.get("launches", 0)
    warnings = facts.get("warnings", [])
    fine = isinstance(ledger, dict) and isinstance(warnings, list) and type(launches) is int
    fine = fine and all(type(n) in (int, float) and 0 <= n < math.inf for n in ledger.values())
    fine = fine and all(isinstance(text, str) for text in warnings)
    refuse(not fine, f"RESUME=1: the checkpoint in {run.dir} holds no ledger; train again")
    run.go_on(ledger, launches, warnings)
    run.leaves_signs = True


def complete_settings(cfg: Config, path: Path, saved: tuple[dict, State] | None) -> Config:
    """The settings with those that the artifact at `path` (EVAL_ONLY) or the checkpoint holds."""
    if cfg.eval_only:
        return inherit_settings(cfg, *read_artifact(path))
    if saved:
        facts, tensors = saved
        live = {
            name.removeprefix("live/"): w for name, w in tensors.items() if name.startswith("live/")
        }
        return inherit_settings(cfg, facts.get("config", {}), live)
    return dataclasses.replace(cfg, inherited=True)


def inherit_settings(cfg: Config, knobs: dict, state: State) -> Config:
    """The knobs that a file holds, and those of this launch where they may differ.

    Refusal unless all of them fit the very tensors `state` that the file holds.
    """
    source = cfg.sources[0]
    try:
        check_knob_types(cfg, knobs)
        own = {name: value for name, value in knobs.items() if name.upper() not in cfg.given}
        if cfg.resume and cfg.base:
            check_base(cfg, own, source)
        cfg = dataclasses.replace(cfg, inherited=True, **own)
        fixed = ("model",) if cfg.eval_only else cfg.training_scopes
        for name, value in cfg.knobs(*fixed).items():
            made = f"{name.upper()}={value}: {source} was made with {knobs[name]}; unset it"
            refuse(knobs[name] != value, made)
        check_tensors(cfg, state)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        problem = f"its configuration does not fit ({error!r:.200}); make it again"
        raise Refusal(f"{source}: {problem}") from None
    return cfg


def check_base(cfg: Config, own: dict, source: str) -> None:
    """Refusal of a BASE whose values are not those with which a run goes on.

    own: the values of the file that this launch does not give itself.
    """
    for variable in read_base(cfg.base).settings:
        name = variable.lower()
        if name in own and own[name] != getattr(cfg, name):
            made = f"{source} was made with {setting(name, own[name])}"
            there = setting(name, getattr(cfg, name))
            raise Refusal(f"BASE={cfg.base}: has {there}, but {made}; unset BASE")


def check_knob_types(cfg: Config, knobs: dict) -> None:
    """TypeError unless a file holds exactly the knobs that it should, each of its own type."""
    scopes = ("model", "eval") if cfg.eval_only else ("seed", *COMPARED)
    wanted = {f.name: f for f in KNOBS if f.metadata["scope"] in scopes}
    problem = "unknown, missing or mistyped settings"
    if knobs.keys() != wanted.keys():
        raise TypeError(problem)
    for name, value in knobs.items():
        kinds = (float, int) if wanted[name].type == "float" else (type(wanted[name].default),)
        if type(value) not in kinds:
            raise TypeError(problem)


def check_tensors(cfg: Config, state: State) -> None:
    """TypeError unless these are the tensors of a model with these settings; allocates nothing."""
    shapes = {}
    # a file may promise more layers than there is memory for, even for empty tensors
    if cfg.num_layers <= len(state):
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in GPT(cfg).named_parameters()}
    if shapes != {name: w.shape for name, w in state.items()}:
        raise TypeError("tensors of other names or shapes")


def log_start(cfg: Config, run: Run) -> None:
    """The first lines of both records, and the script beside them."""
    where = environment(run)
    if cfg.base and "base" not in cfg.idle():
        run.log(f"base: {cfg.base}, whose values are among the settings")
        lacks = read_base(cfg.base).lacks
        if lacks:
            run.log(f"base: {cfg.base} has what this script has not: {', '.join(lacks)}")
    run.log(f"settings: {settings_line(cfg) or 'all defaults'}")
    idle = [f"{name} ({why})" for name, why in cfg.without_effect().items()]
    if idle:
        run.log(f"without effect: {', '.join(idle)}")
    if not cfg.base and not cfg.inherited:
        for line in likeness_line(nearest_base(vars(cfg), cfg.given), cfg):
            run.log(line)
    if cfg.spelt and not cfg.base and not cfg.inherited:
        theirs = f"{', '.join(sorted(cfg.spelt))}: spellings of other scripts"
        run.log(f"{theirs}; what is not given has our defaults, BASE=NAME has another script's")
    for line in cfg.won:
        run.log(line)
    run.event(
        "start", schema=SCHEMA_VERSION, config=cfg.knobs(), world_size=run.world, environment=where
    )
    if run.rank == 0:
        write_code(cfg, run.dir)


def load_inputs(cfg: Config, run: Run) -> Inputs:
    """Opens and checks the data; training data only where something is trained."""
    with run.phase("data"):
        splits = {"val": Split(cfg, "val")}
        if not cfg.eval_only:
            splits["train"] = Split(cfg, "train")
        validation = Validation(cfg, run, splits["val"])
        fingerprint = check_data(cfg, splits)
        fingerprint |= validation.facts()
        if validation.altered:
            fingerprint.setdefault("lost_documents", {"lost": None, "of": None})
    run.log("data: " + ", ".join(f"{key} {value}" for key, value in fingerprint.items()))
    for problem in validation.warnings(fingerprint.get("lost_documents")):
        run.warn(problem)
    return Inputs(splits, validation, fingerprint)


def train_and_export(
    cfg: Config, run: Run, inputs: Inputs, attend: Callable, saved: tuple[dict, State] | None
) -> Trained:
    """Trains (or restores what was saved), averages, exports.

    Checkpoint and artifact are on disk when it returns, before anything is scored.
    """
    model = build_model(cfg, run, attend)
    plan = export_plan(cfg, model)
    trainer = Trainer(cfg, run, model, plan, inputs.splits["train"], inputs.validation)
    log_model(run, trainer)

    if saved:
        trainer.restore(*saved)
        code = trainer.code_sha256[:12]
        run.log(f"from a checkpoint: {trainer.steps} steps, {trainer.elapsed:.1f} s, code {code}")
    run.has_begun = True
    complete = cfg.checkpoint or (saved and trainer.done())
    if not complete:
        trainer.train(saved)

    with run.phase("average"):
        trained = collect_averages(cfg, run, trainer)
    if cfg.gptq_enabled:
        with run.phase(CALIBRATE):
            trainer.model.load_state_dict(trained.final)
            trained.hessians = trainer.hessians(cfg.gptq_calibration_batches)
    with run.phase("quantise and compress"):
        write_artifact(cfg, run, trained)
    return trained


def log_model(run: Run, trainer: Trainer) -> None:
    """Says how large the model is and how it will be shipped."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    bits = [how.bits for how in trainer.plan.values() if isinstance(how, Grid)]
    run.log(
        f"model: {parameters:,} parameters, {len(bits)} of {len(trainer.plan)} tensors quantised "
        f"to {sorted(set(bits))} bits; {trainer.accumulate} micro-batches per step"
    )
    if run.rank == 0:
        shapes = {name: p.shape for name, p in trainer.model.named_parameters()}
        size = forecast_size(trainer.cfg, trainer.plan, shapes)
        log_forecast(trainer.cfg, run, size)


def log_forecast(cfg: Config, run: Run, size: SizeForecast) -> None:
    """Says what the file will take beside the cap, and warns before it is trained too large."""
    total = size.artifact(cfg.compressor) + len(shipped_code(cfg))
    words = "at most" if size.at_most else "about"
    run.log(f"size: {words} {total:,} bytes forecast, code included; CAP_BYTES={cfg.cap_bytes:,}")
    if total > cfg.cap_bytes and not size.at_most and not cfg.fit_to_cap:
        over = total - cfg.cap_bytes
        remedy = "a smaller model, fewer bits, a larger k (MLP_CLIP_SIGMAS, ...) or FIT_TO_CAP=1"
        run.warn(f"size: forecast {over:,} bytes over CAP_BYTES={cfg.cap_bytes:,}: {remedy}")


def collect_averages(cfg: Config, run: Run, trainer: Trainer) -> Trained:
    """Copies the live weights and every average, and chooses what is shipped."""
    live = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    averages = {}
    for name, state in trainer.averages.results().items():
        averages[name] = {key: w.clone() for key, w in state.items()}

    for name in cfg.collected():
        activity = run.activity[name.upper()]
        steps = activity.steps
        applied = f"no (AVERAGE={cfg.average})"
        if name == cfg.shipped_average:
            applied = "yes"
        if name not in averages:
            applied = "NO, none was taken"
        run.log(
            f"average: {name} {activity.scope}, {len(steps)} snapshots, "
            f"steps {steps[:1]} to {steps[-1:]}; applied: {applied}"
        )

    final = averages.get(cfg.shipped_average, live)
    finite = all(bool(w.isfinite().all()) for w in final.values())
    last = trainer.steps - 1
    problem = f"step {last}: the weights after it are not finite; lower the learning rates"
    refuse(not finite, problem, 5)
    return Trained(trainer, live, averages, final)


def refuse_what_no_artifact_holds(cfg: Config, model: GPT, state: State, plan: dict) -> None:
    """Refusal (exit code 5) where a reader of the artifact would get weights that are not finite.

    fp16 ends early. The same on every rank, before anything is written.
    """
    lost = {}
    for name, w in state.items():
        bad = int((~as_shipped(w, plan[name]).isfinite()).sum())
        if bad:
            lost[name] = bad
    if not lost:
        return
    name, bad = next(iter(lost.items()))
    others = f", and those of {len(lost) - 1} other tensors" if len(lost) > 1 else ""
    optimiser = model.get_parameter(name).role.optimiser
    rate = "matrix_lr" if optimiser == "muon" else ADAMW_GROUPS[optimiser].lr
    raise Refusal(
        f"{name}: {bad:,} of {state[name].numel():,} weights, up to "
        f"{state[name].abs().max().item():.3g}, are beyond what fp16 holds (65,504, for a weight "
        f"or a step of its grid){others}; lower {rate.upper()}={getattr(cfg, rate):g} and train "
        "again; no artifact is written",
        5,
    )


def write_artifact(cfg: Config, run: Run, trained: Trained) -> None:
    """Exports the final weights to artifact.bin and measures what the bytes are spent on."""
    plan = trained.trainer.plan
    refuse_what_no_artifact_holds(cfg, trained.trainer.model, trained.final, plan)
    made = export(cfg, run, trained.final, plan, trained.hessians)
    trained.exported = made
    shapes = {name: w.shape for name, w in trained.final.items()}
    size = forecast_size(made.cfg, made.plan, shapes)
    trained.forecast = size.artifact(made.cfg.compressor)
    sizes = None
    if run.rank == 0:
        write_atomic(run.dir / "artifact.bin", made.blob)
        words = "at most " if size.at_most else ""
        run.log(f"artifact: {len(made.blob):,} bytes, forecast {words}{trained.forecast:,}")
        run.at_work("bytes by kind of tensor")
        kinds = sizes_by_kind(made.cfg, trained.trainer.model, trained.final, made.parts)
        sizes = kinds, code_size(made.cfg, made.parts, len(made.blob))
    # the broadcast also keeps the other ranks from reading the file before it is written
    trained.kinds, trained.codes = run.broadcast(sizes)


def score_all(
    cfg: Config,
    run: Run,
    state: State,
    val: Validation,
    attend: Callable,
    trained: Trained | None,
) -> dict[str, Score]:
    """Scores the trainer's own weights, then the read-back ones in every mode asked for.

    Returns name -> score; the last one is the result.
    """
    scores = {}

    def keep(name: str, job: Callable[[], Score]) -> None:
        phase = f"score {name}"
        with run.phase(phase):
            found = job()
        scores[name] = found._replace(seconds=run.ledger()[phase])
        run.log(f"{name:10s} val bpb {scores[name].bpb:.6f}  ({scores[name].seconds:.1f} s)")
        remedy = "lower the learning rates"
        if name == "ttt":
            remedy = {"sgd": "lower TTT_LR", "lora": "lower TTT_LORA_LR"}[cfg.ttt_mode]
        remedy = with_slots(remedy, attend.prepare if cfg.doc_mask else None)
        broken = not math.isfinite(scores[name].bpb)
        refuse(broken, f"score {name}: a target's nats are not finite; {remedy}", 5)

    for name, job in stages_before_the_artifact(cfg, trained):
        keep(name, job)

    model = build_model(cfg, run, attend)
    model.load_state_dict(state)
    forward = run.compiled(model)
    keep("quantised", partial(score, cfg, run, forward, val))

    for name, work in scoring_work(cfg, run, model, forward).items():
        count, cheaper = SCORING_WAYS[name].cost(cfg, run, val)
        tell_seconds(run, name, scores["quantised"].pace * count, cheaper)
        keep(name, partial(work, val))
    return scores


def tell_seconds(run: Run, name: str, seconds: float, cheaper: str) -> None:
    """How long a way of scoring will take; a warning where the contest's limit is shorter.

    What fewer GPUs than the contest's do is done by those in a share of the time.
    """
    text = f"score {name}: about {seconds:.0f} s at the speed of the fixed windows"
    gpus = max(run.world, SCORE_GPUS)
    there = seconds * run.world / gpus
    if run.cuda and gpus > run.world:
        text += f", {there:.0f} s on {gpus} GPUs"
    run.log(text)
    if run.cuda and there > LIMIT_SECONDS:
        over = f"about {there:.0f} s on {gpus} GPUs, over the limit of {LIMIT_SECONDS} s"
        run.warn(f"score {name}: {over}; {cheaper}")


def stages_before_the_artifact(
    cfg: Config, trained: Trained | None
) -> Iterator[tuple[str, Callable[[], Score]]]:
    """(name, what scores it) of each stage between the last step and the artifact."""
    if trained is None:
        return
    score_weights = trained.trainer.score_weights

    def score_unfitted() -> Score:
        """Quantised, but without what FIT_TO_CAP pruned, and on the grids asked for."""
        weights = prune(cfg, trained.final, cfg.prune_pct)
        parts = quantised(cfg, weights, trained.trainer.plan, trained.hessians)
        return score_weights(shipped_state(parts))

    yield "live", partial(score_weights, trained.live)
    if cfg.shipped_average in trained.averages:
        yield "averaged", partial(score_weights, trained.final)
    if trained.exported.pruned > cfg.prune_pct or trained.exported.stretch > 1:
        yield "unfitted", score_unfitted


def finish(run: Run, report: dict) -> dict:
    """Writes the result; returns rank 0's, so that all ranks exit alike."""
    run.log(final_table(report))
    run.event("result", val_bpb=report["val_bpb"], exit_code=report["exit_code"])
    if run.rank == 0:
        write_atomic(run.dir / "result.json", (json.dumps(report, indent=1) + "\n").encode())
        keep_one_checkpoint(run.dir)
        run.remove_alive()
    report = run.broadcast(report)
    # from here on a signal comes too late
    run.phase_name = "stop"
    return report


def keep_one_checkpoint(folder: Path) -> None:
    """Deletes the checkpoint before the newest.

    It is the newest itself where the machine stopped between the two renamings after the last step.
    """
    newest, previous = (folder / name for name in CHECKPOINTS)
    if previous.exists() and not newest.exists():
        previous.replace(newest)
    previous.unlink(missing_ok=True)


def explain(run: Run, error: BaseException) -> Refusal | None:
    """Writes what ended the run into its records.

    Returns the line and the exit code for it, or None where the error speaks for itself.
    """
    phase = run.phase_name
    run.phase_name = "stop"
    where = f"in phase '{phase}': {type(error).__name__}: {error}"
    out_of_memory = is_out_of_memory(error)

    # the other ranks are asked only where one of them may be the reason
    waited = isinstance(error, RuntimeError) or (run.stop and phase not in WAITING)
    silent = []
    if waited and run.world > 1 and not out_of_memory:
        # Frames of the broken call hold the group of ranks. While it lives, other ranks wait for
        # this one for ever
        cause = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        silent = run.silent_ranks()

    # the disk may be full
    with contextlib.suppress(OSError):
        run.log(f"stopped {where}")
        run.event("stopped", phase=phase, error=where)
        run.tick()

    again = f"RESUME=1 RUN_ID={run.dir.name}"
    if out_of_memory:
        remedy = "training: raise GRAD_ACCUM_STEPS; scoring: lower EVAL_BATCH_SEQS"
        return Refusal(f"out of memory {where}; {remedy}", 8)
    if isinstance(error, OSError):
        return Refusal(f"{where}; mend that, then {again}", 7)
    if silent:
        lost = ", ".join(map(str, silent))
        return Refusal(f"lost rank {lost} {where}; go on with {again}", 6)
    if run.stop:
        return Refusal(f"stopped {where}", 128 + run.stop)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host's memory or of the GPU's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate" in str(error)


# Where torchrun looks for what ended a rank. It shows that at the end of its own last words,
# which would bury it otherwise
LAUNCHERS_FILE = "TORCHELASTIC_ERROR_FILE"

# Seconds; torchrun takes less than one, once rank 0 has ended
PATIENCE_OF_THE_SILENT = 60


# The parts of --plan, in a folder beside this script: they are no part of what is shipped
PLANNER = "planning"


def show_plan(arguments: list[str]) -> int:
    """Says what a run would take; returns the exit code. Refusal where PLANNER is missing."""
    here = Path(__file__).resolve().parent
    absent = f"--plan: {PLANNER}/ is not beside {here / 'train_gpt.py'}; take both from a checkout"
    refuse(not (here / PLANNER).is_dir(), absent)
    # one module, whether it was started or is imported
    sys.modules.setdefault("train_gpt", sys.modules[__name__])
    return importlib.import_module(f"{PLANNER}.command").show(arguments)


def command_line(arguments: list[str]) -> int:
    """Runs the configuration of the environment and the arguments; returns the exit code."""
    if sys.stdout:
        # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments == ["--help"]:
        say(help_text(), sys.stdout)
        return 0

    try:
        if "--plan" in arguments:
            code = show_plan(arguments)
        else:
            code = main(Config.from_env(os.environ, arguments), process_seconds())["exit_code"]
        if code:
            tell_launcher(f"[exit {code}: {EXIT_CODES[code]}]", os.environ)
    except Refusal as refusal:
        code = refusal.code
        say_once(refusal.problems, code, os.environ)
    except KeyboardInterrupt:
        code = 130
        say_once([], code, os.environ)
    except Exception:
        tell_launcher(traceback.format_exc(), os.environ)
        raise

    # Gloo's threads must let go before the interpreter ends, or may abort it (PyTorch #179291);
    # NCCL would wait for lost ranks
    if dist.is_initialized() and (code in (0, 3, 4, 9) or not torch.cuda.is_available()):
        dist.destroy_process_group()
    return code


def say_once(problems: list[str], code: int, env) -> None:
    """Says on stderr what ended this rank; one of the ranks on a host does if all find the same."""
    text = "\n".join(problems)
    says_it = env.get("LOCAL_RANK", "0") == "0"
    if code in RANKS_OWN_CODES:
        says_it = True
    else:
        host = env.get("GROUP_RANK", "0")
        # there may be no store and no group
        with contextlib.suppress(RuntimeError, ValueError):
            says_it = dist.distributed_c10d._get_default_store().add(f"{host} {text}", 1) == 1

    message = f"error: {text or EXIT_CODES[code]} [exit {code}: {EXIT_CODES[code]}]"
    if len(problems) > 1:
        first = f"error: {len(problems)} problems [exit {code}: {EXIT_CODES[code]}]"
        message = "\n  ".join([first, *problems])
    if says_it:
        say(message, sys.stderr)
    elif LAUNCHERS_FILE in env and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        # torchrun ends the others with the first that fails: let that be who says it
        time.sleep(PATIENCE_OF_THE_SILENT)
    tell_launcher(message, env)


def tell_launcher(text: str, env) -> None:
    """Leaves what ended this rank for torchrun, in the form of its @record."""
    if LAUNCHERS_FILE in env:
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        told = {"message": {"message": text, "extraInfo": more}}
        with contextlib.suppress(OSError):
            Path(env[LAUNCHERS_FILE]).write_text(json.dumps(told))


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))

"""What train_gpt.py costs here: every stage beside its simple twin and the floor that this machine sets; and beside its peers.

    python bench.py run                                    # the configuration of the environment, as train_gpt.py takes it
    torchrun --standalone --nproc_per_node=8 bench.py run  # the same on several ranks
    python bench.py peers --script 194=PATH --data FOLDER  # public training scripts and ours, on the same shards
    python bench.py show logs/bench/NAME.json --markdown   # the table of a report of either kind

A twin does the same in the plainest way: one tensor, one window, one batch at a time. It is timed in turn with the fast part,
so that what disturbs one disturbs both, and it is the reference for correctness (tests/test_bench.py). A floor is FLOPs over
the measured matmul rate plus bytes over the measured speed of a copy with as large a working set. Comparisons of two times on
a busy machine are to be trusted more than the times.

The file reads in the order in which data flows: twins -> machine -> parts of a run -> report -> peers -> tables -> commands.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import typer
import zstandard
from torch import Tensor
from torch.utils.benchmark import timer  # seconds; waits for the GPU first

import prepare_data
import train_gpt
from train_gpt import (
    COMPRESSORS,
    GPT,
    Averages,
    Config,
    Grid,
    StepPlan,
    Refusal,
    Run,
    Split,
    Trainer,
    Validation,
    WeightViews,
    refuse,
    text_table,
)

SCHEMA_VERSION = 1
CODE_SHA256 = prepare_data.file_sha256(Path(__file__))
ROOT = Path(__file__).resolve().parent
BENCH, STAND_IN = ROOT / "logs" / "bench", ROOT / "tests" / "fa3_stand_in"


# ── 1 TWINS: the plainest code that computes the same ─────────────────────────────────────────────────────────────
@torch.no_grad()
def plain_muon(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    momentum: float,
    cfg: Config,
) -> None:
    """One Muon step on each (rows, columns) matrix by itself, in place, by the formula of K. Jordan 2024."""
    for w, g, m in zip(weights, gradients, momenta):
        m.mul_(momentum).add_(g)
        x = (g + momentum * m).to(torch.bfloat16 if w.is_cuda else torch.float32)
        if w.shape[0] > w.shape[1]:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(cfg.muon_backend_steps):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        if w.shape[0] > w.shape[1]:
            x = x.T
        w.mul_(1 - lr * cfg.muon_wd).sub_(lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x)


@torch.no_grad()
def plain_score(model: GPT, val: Validation, rows: np.ndarray) -> float:
    """Bits per byte: one window at a time, logits at all its positions, those of its targets kept."""
    nats = torch.zeros(val.n, device=val.tokens.device)
    for start, end, first in rows.tolist():
        ids, targets = (val.tokens[i : i + end - start].long()[None] for i in (start, start + 1))
        nats[first:end] = model(ids, targets)[0, first - start :]
    return nats.double().sum().item() / math.log(2) / int(val.target_bytes.sum())


@torch.no_grad()
def plain_average(
    live: dict, ema: dict, sums: dict, decay: float, plan: dict | None = None
) -> None:
    """EMA and snapshot sums in host memory: a copy of every tensor after every step. plan: sum what would be shipped."""
    for name, p in live.items():
        w = p.detach().cpu().clone()
        if ema:
            w = ema[name].mul_(decay).add_(w, alpha=1 - decay)
        if sums:
            how = plan[name] if plan else torch.float32
            sums[name] += plain_snap(w, how) if isinstance(how, Grid) else w.to(how)


def plain_snap(w: Tensor, grid: Grid) -> Tensor:
    """(rows, columns) on the export grid, by the formula; of several clips the one with the least error."""
    candidates = []
    for q in train_gpt.CLIP_QUANTILES[grid.clip]:
        step = torch.quantile(w.abs().double(), q, dim=1, keepdim=True).float() / grid.top
        step = (
            step.clamp(min=1 / grid.top if grid.floor else torch.finfo(torch.float16).tiny)
            .half()
            .float()
        )
        candidates.append(
            torch.clamp(torch.round(w / step), -grid.top - (grid.codes == "asym"), grid.top) * step
        )
    return (
        min(candidates, key=lambda snapped: (snapped - w).square().sum().item())
        if len(candidates) > 1
        else candidates[0]
    )


@contextlib.contextmanager
def plain_view(live: dict, grids: dict[str, Grid]) -> Iterator[None]:
    """Inside, the weights are fake-quantised, tensor by tensor; then the latent ones come back."""
    with torch.no_grad():
        latent = {name: live[name].clone() for name in grids}
        for name, grid in grids.items():
            live[name].copy_(plain_snap(live[name], grid))
        yield
        for name, w in latent.items():
            live[name].copy_(w)


def plain_batches(cfg: Config, run: Run, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets) of every step, read when they are asked for: no thread, no pinned memory."""
    length, rows = cfg.train_seq_len, cfg.train_batch_tokens // cfg.train_seq_len
    for n in itertools.count():
        tokens = [
            torch.from_numpy(split.take(split.tokens * row // rows + n * length, length + 1))
            for row in range(rows)
        ]
        mine = torch.stack(tokens).tensor_split(run.world)[run.rank]
        yield mine[:, :-1].to(run.device), mine[:, 1:].to(run.device)


def plain_reduce(params: list[torch.nn.Parameter], world: int, clip: float) -> Tensor:
    """Mean over the ranks and clip, with one .grad tensor per parameter; returns the gradient norm."""
    for p in params:
        if world > 1:
            dist.all_reduce(p.grad)
            p.grad /= world
    return torch.nn.utils.clip_grad_norm_(params, clip or math.inf)


# ── 2 MACHINE: what the floors are made of ────────────────────────────────────────────────────────────────────────
class Flops(NamedTuple):
    """Forward FLOPs per token: all linear layers (head included), the head alone, causal attention over a full row."""

    linear: float
    head: float
    attention: float

    @property
    def trained(self) -> float:  # forward and backward, which takes twice as much
        return 3 * (self.linear + self.attention)


def forward_flops(cfg: Config) -> Flops:
    """Counted in the model's own shapes: 2 per weight; attention: 2 products of 2 * MODEL_DIM over half a row on average."""
    with torch.device("meta"):
        model = GPT(cfg)
    head = 2.0 * model.tok_emb.numel()
    linear = sum(
        2.0 * layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, train_gpt.Linear)
    )
    return Flops(
        linear + head, head, len(model.blocks) * 2.0 * cfg.model_dim * (cfg.train_seq_len + 1)
    )


def muon_flops(shapes: Iterable[tuple[int, int]], steps: int) -> float:
    """Newton-Schulz: per iteration X X^T, its square, and their sum times X."""
    return sum(steps * (4.0 * min(s) ** 2 * max(s) + 2.0 * min(s) ** 3) for s in shapes)


def device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {os.cpu_count()} cores"
    )


def nominal() -> float | None:
    """Dense bf16 FLOP/s of the data sheet, by which published MFU figures divide; None for a device not known here."""
    return 989e12 if re.search("H[12]00(?!.*(PCIe|NVL))", device_name()) else None


def human(value: float, unit: str) -> str:
    """1234567, "B" -> 1.23 MB; tokens and targets in full."""
    if unit[0] == "t":
        return f"{float(f'{value:.3g}'):,.0f} {unit}"
    power = min(max(int(math.log10(max(abs(value), 1)) // 3), 0), 5)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"


class Floor(NamedTuple):
    """The least seconds that some work can take here, and how they were computed."""

    seconds: float
    how: str


class Bench:
    """Times work in turns and collects rows."""

    def __init__(self, cfg: Config, run: Run, quick: bool):
        self.cfg, self.run, self.quick, self.rows, self.together = cfg, run, quick, [], True
        self.flop_rate, self.speeds, self.step = 0.0, {}, 0.0
        self.first = 0.0  # seconds of the first, untimed calls: compiling
        self.windows = (
            (1 if quick else 8 if run.cuda else 2) * cfg.eval_batch_seqs * run.world
        )  # to score: a few batches

    def broadcast(self, value):
        """Rank 0's value on all ranks, which then make equally many calls; in work of rank 0 alone just the value."""
        return self.run.broadcast(value) if self.together else value

    def time(
        self,
        *works: Callable,
        most: int = 20,
        limit: float = 2.0,
        block: bool = True,
        warm: bool = True,
    ) -> np.ndarray:
        """Seconds per call, (works, samples), the works in turn. A sample is a block of calls of 5 ms or more (block), after two
        untimed ones (warm). `most` samples, fewer when `limit` seconds a work are over, but 3 (cold: 1)."""

        def sample(work: Callable, calls: int) -> float:
            began = timer()
            for _ in range(calls):
                work()
            return (timer() - began) / calls

        most, limit = (3, 0.1) if self.quick else (most, limit)
        calls = [1] * len(works)
        if warm:
            self.first = sum(sample(work, 1) for work in works)
            spent = [sample(work, 1) for work in works]
            calls = [
                self.broadcast(math.ceil(min(max(0.005 / s, 1), 2000))) if block else 1
                for s in spent
            ]
        samples, deadline = [], timer() + limit * len(works)
        while len(samples) < (3 if warm else 1) or (
            len(samples) < most and self.broadcast(float(timer() < deadline))
        ):
            samples.append([sample(work, n) for work, n in zip(works, calls)])
        return np.array(samples).T

    def bandwidth(self, nbytes: float, host: bool = False) -> float:
        """Bytes per second, read and written, of a copy whose working set is about this large; measured once per size."""
        on_gpu = self.run.cuda and not host
        size = 1 << int(
            min(
                max(round(math.log2(max(nbytes, 1))), 16),
                22 if self.quick else 32 if on_gpu else 28,
            )
        )
        size = self.broadcast(size)  # all ranks measure, or none
        if (size, on_gpu) not in self.speeds:
            a, b = (
                torch.ones(size // 8, device=self.run.device if on_gpu else "cpu") for _ in range(2)
            )
            seconds = self.time(lambda: b.copy_(a), limit=0.5)
            self.speeds[size, on_gpu] = size / seconds.min()
            where = " of the host" * (self.run.cuda and host)
            self.add(
                "machine",
                f"copy, working set {human(size, 'B')}{where}",
                seconds,
                rate=(size, "B/s"),
            )
        return self.speeds[size, on_gpu]

    def measure_matmul(self) -> None:
        """The ceiling of FLOP/s: a square product in the run's dtype, small enough for a CPU to repeat."""
        n = 512 if self.quick else 8192 if self.run.cuda else 1024
        a, b = (torch.randn(n, n, device=self.run.device, dtype=self.run.dtype) for _ in range(2))
        seconds = self.time(lambda: a @ b, limit=3)
        self.flop_rate = 2 * n**3 / seconds.min()
        self.add(
            "machine",
            f"matmul {n} x {n} x {n}, {self.run.dtype}",
            seconds,
            rate=(2 * n**3, "FLOP/s"),
        )

    def floor(
        self, flops: float = 0, nbytes: float = 0, working_set: float = 0, host: bool = False
    ) -> Floor:
        """FLOPs at the matmul rate, then bytes at the speed of a copy with that working set (default: all the bytes)."""
        speed = self.bandwidth(working_set or nbytes, host) if nbytes else 1
        parts = [f"{human(flops, 'FLOP')} at {human(self.flop_rate, 'FLOP/s')}"] * bool(flops)
        parts += [f"{human(nbytes, 'B')} at {human(speed, 'B/s')}"] * bool(nbytes)
        return Floor(flops / self.flop_rate + nbytes / speed, " + ".join(parts))

    def add(
        self,
        group: str,
        name: str,
        seconds: np.ndarray,
        floor: Floor | None = None,
        rate: tuple | None = None,
        twin: str = "",
        note: str = "",
    ) -> None:
        """A row from seconds (1, n), or (2, n) with the twin's. rate: (amount per call, unit)."""

        def spread(s: np.ndarray) -> float | None:
            return (
                float((np.percentile(s, 90) - np.percentile(s, 10)) / np.median(s))
                if len(s) > 1
                else None
            )

        medians = np.median(seconds, axis=1).tolist()
        row = dict(
            group=group,
            name=name,
            ms=medians[0] * 1e3,
            spread=spread(seconds[0]),
            n=seconds.shape[1],
        )
        if group == "training":
            self.step = self.step or medians[0]  # the first row is the whole step
            row["share"] = medians[0] / self.step
        if rate:
            row |= dict(rate=rate[0] / medians[0], unit=rate[1])
        if floor:
            row |= dict(
                floor_ms=floor.seconds * 1e3, floor=floor.how, ratio=medians[0] / floor.seconds
            )
        if twin:
            speedups = seconds[1] / seconds[0]
            row |= dict(
                twin=twin,
                twin_ms=medians[1] * 1e3,
                twin_spread=spread(seconds[1]),
                speedup=np.median(speedups),
                speedup_p10=np.percentile(speedups, 10),
                speedup_p90=np.percentile(speedups, 90),
            )
        self.rows.append(
            {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
            | dict(note=note)
        )


# ── 3 PARTS OF A RUN ──────────────────────────────────────────────────────────────────────────────────────────────
def peak_memory(run: Run) -> tuple[int, str]:
    """(bytes, of what) since the warm-up began."""
    if run.cuda:
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    with contextlib.suppress(OSError):
        return 1024 * int(
            re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]
        ), "resident, torch included"
    return resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss, "resident, torch included, since the start"  # macOS: bytes


def start_up(b: Bench) -> Trainer:
    """Everything before the first step; returns the trainer, warmed up."""
    cfg, run, laps = b.cfg, b.run, [timer()]

    def lap(name: str, note: str = "") -> None:
        laps.append(timer())
        b.add("start-up", name, np.diff(laps[-2:])[None], note=note)

    splits = {name: Split(cfg, name) for name in ("val", "train")}
    val = Validation(cfg, run, splits["val"])
    train_gpt.check_data(cfg, splits)
    lap("open and check the data", f"{val.n:,} validation targets")
    attend = train_gpt.choose_attention(cfg, run)
    lap("choose the attention kernel")
    model = train_gpt.build_model(cfg, run, attend)
    trainer = Trainer(cfg, run, model, train_gpt.export_plan(cfg, model), splits["train"], val)
    lap("build model and trainer", f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: start the high-water mark anew
        Path("/proc/self/clear_refs").write_text("5")
    trainer.warm_up()
    lap(
        "warm-up and compile", f"{cfg.warmup_steps} steps, {'compiled' if run.compile else 'eager'}"
    )
    return trainer


def muon_matrices(model: GPT) -> dict[str, tuple[int, int]]:
    """Name -> shape of what Muon trains."""
    return {
        name: tuple(p.shape) for name, p in model.named_parameters() if p.role.optimiser == "muon"
    }


def step_floors(b: Bench, model: GPT, tokens: int) -> tuple[Floor, Floor, Floor]:
    """Of forward, backward and the whole step on so many tokens of this rank: products, and element-wise passes, all fused: 20
    and 30.5 over the residual stream of each block, 2 and 2 over the logits, 9 over the weights."""
    cfg, world, flops, width = b.cfg, b.run.world, forward_flops(b.cfg), b.run.dtype.itemsize
    stream, weights = (
        cfg.num_layers * cfg.model_dim * width,
        sum(p.numel() for p in model.parameters()),
    )
    forward, backward = (
        b.floor(
            times * (flops.linear + flops.attention) * tokens,
            (passes * stream + 2 * cfg.vocab_size * width) * tokens,
            2 * tokens * cfg.model_dim * width,
        )
        for times, passes in ((1, 20), (2, 30.5))
    )
    update = b.floor(
        muon_flops(muon_matrices(model).values(), cfg.muon_backend_steps) / world,
        36 * weights / world,
    )
    parts = (forward, backward, update)
    return (
        forward,
        backward,
        Floor(sum(part.seconds for part in parts), " + ".join(part.how for part in parts)),
    )


def training_step(b: Bench, trainer: Trainer) -> None:
    """The whole step as the configuration has it, its forward and backward, and what it waits for data."""
    cfg, run, batch = b.cfg, b.run, []

    def halves() -> list[float]:  # seconds of all forwards and of all backwards
        laps = [timer()]
        for x, y in zip(
            ids.tensor_split(trainer.accumulate), targets.tensor_split(trainer.accumulate)
        ):
            loss = trainer.forward(x, y).sum()
            laps.append(timer())
            loss.backward()
            laps.append(timer())
        return [sum(np.diff(laps)[0::2]), sum(np.diff(laps)[1::2])]

    k = StepPlan(
        1.0,
        cfg.muon_momentum,
        qat=cfg.qat_enabled,
        qna=cfg.qna_magnitude * (cfg.qna_enabled and not cfg.qat_enabled),
    )
    fast, plain = train_gpt.batches(cfg, run, trainer.split), plain_batches(cfg, run, trainer.split)
    waits, steps, reads = b.time(
        lambda: batch.append(next(fast)),
        lambda: trainer.step(batch.pop(), k),
        lambda: next(plain),
        most=30,
        limit=4,
        block=False,
    )
    ids, targets = next(fast)
    fast.close()
    peak, kind = peak_memory(run)
    forward, backward = np.array([halves() for _ in range(len(steps) + 1)][1:]).T
    floors, flops, tokens = (
        step_floors(b, trainer.model, ids.numel()),
        forward_flops(cfg),
        ids.numel(),
    )
    rate, speed = (cfg.train_batch_tokens, "tokens/s"), flops.trained * tokens / np.median(steps)
    card = nominal()
    mfu = dict(mfu=float(speed / b.flop_rate), mfu_nominal=float(speed / card) if card else None)
    note = f"MFU {mfu['mfu']:.1%} of the matmul rate here"
    note += f", {mfu['mfu_nominal']:.1%} of {human(card, 'FLOP/s')}" if card else ""
    b.add(
        "training",
        "step, whole",
        steps[None],
        floors[2],
        rate,
        note=f"{note}; {flops.trained / 1e6:.1f} MFLOP a token = "
        f"3 x ({flops.linear / 1e6:.2f} linear + {flops.attention / 1e6:.2f} attention)",
    )
    b.rows[-1] |= mfu
    b.add(
        "training",
        "forward",
        forward[None],
        floors[0],
        rate,
        note=f"{trainer.accumulate} micro-batches",
    )
    b.add("training", "backward", backward[None], floors[1], rate)
    floor = b.floor(nbytes=18 * tokens, host=True)
    b.add("training", "wait for data", np.stack((waits, reads)), floor, rate, "synchronous reads")
    b.rows.append(
        dict(
            group="training",
            name="peak memory",
            ms=None,
            spread=None,
            n=1,
            rate=peak,
            unit="B",
            note=kind,
        )
    )


def optimisation(b: Bench, trainer: Trainer) -> None:
    """Gradient exchange and clip, AdamW, Muon: from the gradients of one step to new weights."""
    cfg, run, flat, optimiser = b.cfg, b.run, trainer.flat, trainer.optimiser
    flat.gradients.normal_()
    shapes = muon_matrices(trainer.model)
    muon = sum(map(math.prod, shapes.values()))
    rest = sum(p.numel() for p in trainer.model.parameters()) - muon
    live, gradients = flat.views(flat.weights), flat.views(flat.gradients)
    copies = [torch.nn.Parameter(w.clone()) for w in live.values()]
    for p, g in zip(copies, gradients.values()):
        p.grad = g.clone()
    seconds = b.time(
        lambda: flat.reduce(cfg.grad_clip_norm),
        lambda: plain_reduce(copies, run.world, cfg.grad_clip_norm),
    )
    b.add(
        "training",
        f"gradient{' exchange,' * (run.world > 1)} norm and clip",
        seconds,
        b.floor(nbytes=12 * (muon + rest)),
        twin="a loop over .grad, clip_grad_norm_",
        note="floor without the exchange" * (run.world > 1),
    )
    lr, momentum = cfg.matrix_lr, cfg.muon_momentum
    matrices, grads, momenta = (
        [how(source[name]) for name in shapes]
        for source, how in ((live, torch.clone), (gradients, torch.clone), (live, torch.zeros_like))
    )
    ours = torch.no_grad()(lambda: flat.gather(optimiser.muon(lr, momentum)))
    seconds = b.time(ours, lambda: plain_muon(matrices, grads, momenta, lr, momentum, cfg))
    floor = b.floor(
        muon_flops(shapes.values(), cfg.muon_backend_steps) / run.world, 20 * muon / run.world
    )
    note = f"{len(shapes)} matrices, {muon:,} weights"
    b.add("training", "optimiser: Muon", seconds, floor, twin="one matrix at a time", note=note)
    b.add(
        "training",
        "optimiser: AdamW",
        b.time(optimiser.adamw.step),
        b.floor(nbytes=28 * rest),
        note=f"{rest:,} parameters",
    )


def checkpointing(b: Bench, trainer: Trainer) -> None:
    """What a checkpoint costs the training clock, and how long it is being written beside the next steps."""

    def save() -> list[float]:
        laps = [timer()]
        trainer.save(wait=False)
        laps.append(timer())
        if trainer.writing:  # rank 0 writes
            trainer.writing.result()
        return [laps[1] - laps[0], timer() - laps[1]]

    copied, written = np.array([save() for _ in range(3 if b.quick else 8)][1:]).T
    every, path = b.cfg.checkpoint_every, b.run.dir / train_gpt.CHECKPOINTS[0]
    note = (
        f"{np.median(copied) / every:.4%} of the time at CHECKPOINT_EVERY={every:g}"
        if every
        else ""
    )
    b.add("training", "checkpoint: copy, on the clock", copied[None], note=note)
    if b.run.rank == 0:
        b.add(
            "training",
            "checkpoint: write, beside the steps",
            written[None],
            rate=(path.stat().st_size, "B/s"),
        )


def techniques(b: Bench, trainer: Trainer) -> None:
    """QAT, QNA and the averages while they act, whatever the configuration has switched on."""
    cfg, run, model, flat, plan = b.cfg, b.run, trainer.model, trainer.flat, trainer.plan
    live, numel = dict(model.named_parameters()), flat.weights.numel()

    def plain_qat() -> None:
        with plain_view(live, grids):
            pass

    both = dataclasses.replace(
        cfg,
        qat_enabled=True,
        qna_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.5,
        qna_magnitude=cfg.qna_magnitude or 1.0,
        strict=False,
    )
    views = WeightViews(both, run, model, flat, plan)
    grids = views.techniques["QAT"].grids
    plain = {"QAT": [plain_qat], "QNA": []}
    for name, stacks in views.stacks.items():
        if stacks:
            now = views.techniques[name].at_full_strength()
            seconds = b.time(lambda: views.leave(views.enter(now, 0)), *plain[name])
            b.add(
                "training",
                f"{name}: enter and leave",
                seconds,
                b.floor(nbytes=8 * sum(w.numel() for _, w in stacks)),
                twin="one tensor at a time, by the formula" * bool(plain[name]),
                note="floor: weights read and written once",
            )
    for name, does in (("ema", "update"), ("swa", "snapshot"), ("sqwa", "snapshot")):
        on = {f"{other}_enabled": other == name for other in ("ema", "swa", "sqwa")}
        average = Averages(
            dataclasses.replace(cfg, average="auto", strict=False, **on), run, model, flat, plan
        )
        host = {n: p.detach().cpu().clone() for n, p in live.items()}
        kept, shipped = (
            (host, {}) if name == "ema" else ({}, host),
            plan if name == "sqwa" else None,
        )
        seconds = b.time(
            lambda: average.update(name != "ema"),
            lambda: plain_average(live, *kept, cfg.ema_decay, shipped),
        )
        b.add(
            "training",
            f"{name.upper()} {does}",
            seconds,
            b.floor(nbytes=12 * numel),
            twin="host copies",
        )


def scoring(b: Bench, trainer: Trainer) -> None:
    """All ways to score, on as many targets as fill a few batches of windows."""
    cfg, run, window, compiling = b.cfg, b.run, b.cfg.window, 0.0
    modes = {
        "fixed windows": 64,
        **{f"sliding, stride {s}": s for s in (64, 256)},
        "document-isolated, stride 64": 64,
    }
    for name, stride in modes.items():
        stride = min(stride, window)
        targets = b.windows * (stride if "sliding" in name else window)
        narrow = dataclasses.replace(
            cfg, eval_stride=stride, val_max_tokens=min(targets, trainer.val.n)
        )
        val = Validation(narrow, run, Split(cfg, "val"))
        rows = (
            train_gpt.document_windows(val, window, stride)
            if "document" in name
            else train_gpt.windows(0, val.n, window, stride if "sliding" in name else 0)
        )
        works = [
            lambda: train_gpt.score(narrow, run, trainer.forward, val, rows),
            lambda: plain_score(trainer.model, val, rows),
        ]
        twin = "one window at a time, all logits" if name == "sliding, stride 64" else ""
        seconds = b.time(*works[: 2 if twin else 1], most=7, limit=4, block=False)
        compiling += max(b.first - seconds.mean(1).sum(), 0)
        spans, flops = rows[:, 1] - rows[:, 0], forward_flops(cfg)
        need = float(
            ((flops.linear - flops.head) * spans).sum()
            + flops.head * val.n
            + (flops.attention / (cfg.train_seq_len + 1) * spans * (spans + 1)).sum()
        )
        note = f"{val.n:,} targets, {len(rows):,} windows of up to {window}"
        b.add("scoring", name, seconds, b.floor(need / run.world), (val.n, "targets/s"), twin, note)
    if run.compile:
        b.add(
            "start-up",
            "compile for scoring",
            np.array([[compiling]]),
            note="first calls less usual ones",
        )


def like_trained(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random weights; the rows and columns of a matrix differ in spread as trained ones do, which is what a coder can use."""
    w = 0.15 * torch.randn(shape, generator=generator)
    return (
        w * torch.outer(*((0.5 * torch.randn(n, generator=generator)).exp() for n in shape))
        if len(shape) == 2
        else w
    )


def exporting(b: Bench, trainer: Trainer) -> None:
    """Quantise, compress with everything that can, decompress, load: of synthetic weights (like_trained)."""
    cfg, plan, generator, path = (
        b.cfg,
        trainer.plan,
        torch.Generator().manual_seed(0),
        Path(b.cfg.logs_dir) / "artifact.bin",
    )
    state = {
        n: like_trained(p.shape, generator).to(p.device)
        for n, p in trainer.model.named_parameters()
    }
    coded = [(how, state[n]) for n, how in plan.items() if isinstance(how, Grid)]
    weights = sum(w.numel() for _, w in coded)
    if coded:
        entropy = train_gpt.code_size(cfg, state, plan, 0)["order0_bytes"]
        b.add(
            "export",
            "quantise",
            b.time(lambda: [how.quantise(w) for how, w in coded]),
            b.floor(nbytes=5 * weights),
            note=f"{weights:,} weights; order-0 entropy of their codes {entropy:,} bytes",
        )
    path.write_bytes(
        train_gpt.encode_artifact(dataclasses.replace(cfg, compressor="zstd"), state, plan, level=1)
    )
    facts, parts = train_gpt.read_container(path)
    raw, slow = sum(t.nbytes for t in parts.values()), dict(most=3, limit=3, warm=False)

    def one_frame(level: int) -> bytes:
        return zstandard.ZstdCompressor(level=level).compress(safetensors.torch.save(parts))

    for name in [name for name in COMPRESSORS if name != "none"]:
        level, twin, blobs = COMPRESSORS[name][2], name == "zstd", {}
        works = [
            lambda: blobs.update(fast=train_gpt.encode_container(parts, facts, name)),
            lambda: blobs.update(twin=one_frame(level)),
        ]
        seconds, rate, sizes = (
            b.time(*works[: 1 + twin], **slow),
            (raw, "B/s"),
            [f"{len(z):,}" for z in blobs.values()],
        )
        floor = b.floor(nbytes=raw + len(blobs["fast"]), host=True)
        b.add(
            "export",
            f"compress, {name} {level}",
            seconds,
            floor,
            rate,
            "all in one frame" * twin,
            f"{raw:,} -> {' bytes, its twin '.join(sizes)} bytes",
        )
        path.write_bytes(blobs["fast"])
        b.add(
            "export",
            f"decompress, {name}",
            b.time(lambda: train_gpt.read_container(path), limit=1),
            floor,
            rate,
            note=f"{sizes[0]} -> {raw:,} bytes",
        )
    b.add(
        "export",
        "pack (quantise, compress)",
        b.time(lambda: path.write_bytes(train_gpt.encode_artifact(cfg, state, plan)), **slow),
        note=f"COMPRESSOR={cfg.compressor}, as shipped",
    )
    numel, size = sum(w.numel() for w in state.values()), path.stat().st_size
    b.add(
        "export",
        "load (unpack)",
        b.time(lambda: train_gpt.read_artifact(path), limit=1),
        b.floor(nbytes=size + 4 * numel, host=True),
    )


def preparation(b: Bench, trainer: Trainer) -> None:
    """prepare_data.py on the text behind the first training tokens; and the import, in processes of their own."""
    sp, tokens = (
        train_gpt.ByteTable(b.cfg).sp,
        trainer.split.take(0, min(trainer.split.tokens, 20_000 if b.quick else 400_000)),
    )
    starts = [0, *np.flatnonzero(tokens == train_gpt.BOS).tolist(), len(tokens)]
    texts = [sp.decode(tokens[i:j].tolist()) for i, j in zip(starts, starts[1:]) if j > i]
    size, model, folder = (
        sum(len(text.encode()) for text in texts),
        Path(b.cfg.tokenizer_path),
        Path(b.cfg.logs_dir),
    )

    def prepare() -> None:
        writer = prepare_data.ShardWriter(folder, "train", prepare_data.Recipe())
        with contextlib.redirect_stdout(io.StringIO()):
            for _, document, utf8_bytes in prepare_data.encode_batch(model, texts):
                writer.add(document, utf8_bytes)
            writer.close()

    seconds = b.time(prepare, most=5, limit=3)
    b.add(
        "data",
        "tokenise and write shards, 1 worker",
        seconds,
        rate=(size, "B/s"),
        note=f"{size:,} bytes of text",
    )
    start = [sys.executable, "-c", "import train_gpt"]
    seconds = b.time(lambda: subprocess.run(start, cwd=ROOT, check=True), limit=6, warm=False)
    b.add("start-up", "python, import train_gpt", seconds)


# ── 4 REPORT ──────────────────────────────────────────────────────────────────────────────────────────────────────
GROUPS = ("machine", "start-up", "training", "scoring", "export", "data")


def measure(cfg: Config, quick: bool) -> dict:
    """Everything, on all ranks; the report is rank 0's. Leaves nothing in LOGS_DIR."""
    wanted = cfg
    launch = os.environ.get(
        "TORCHELASTIC_RUN_ID", os.getpid()
    )  # the same for all ranks: they must see one folder
    folder = Path(tempfile.gettempdir()) / f"bench-{launch}"
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
        if os.environ.get("RANK", "0") == "0":
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cfg = dataclasses.replace(cfg, logs_dir=str(folder), run_id="bench")
        run = Run(cfg)
        b = Bench(cfg, run, quick)
        b.cfg = dataclasses.replace(
            cfg, val_max_tokens=min(b.windows * cfg.window, cfg.val_max_tokens or math.inf)
        )
        b.measure_matmul()
        b.bandwidth(2**40)
        trainer = start_up(b)
        weights = trainer.flat.weights.clone()
        for part in (training_step, optimisation, checkpointing, techniques, scoring):
            run.log(f"{part.__name__.replace('_', ' ')} ...")
            part(b, trainer)
            trainer.flat.weights.copy_(weights)
        b.together = False  # what one process does while the others wait
        for part in (exporting, preparation) if run.rank == 0 else ():
            run.log(f"{part.__name__} ...")
            part(b, trainer)
        run.broadcast(None)
    return facts(wanted, run, quick) | dict(
        rows=sorted(b.rows, key=lambda row: GROUPS.index(row["group"]))
    )


def facts(cfg: Config, run: Run, quick: bool) -> dict:
    """What the figures depend on: code, settings, hardware, versions, the model's size and FLOPs."""
    values = {name: getattr(cfg, name.lower()) for name in sorted(cfg.given)}
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(cfg).parameters())
    size = dict(
        params=params,
        layers=cfg.num_layers,
        dim=cfg.model_dim,
        seq_len=cfg.train_seq_len,
        vocab=cfg.vocab_size,
        tokens_per_step=cfg.train_batch_tokens,
        flops_per_token=forward_flops(cfg)._asdict(),
    )
    return (
        origin()
        | train_gpt.environment(run)
        | dict(
            quick=quick,
            settings={
                name: str(int(v) if isinstance(v, bool) else v) for name, v in values.items()
            },
            config_sha256=cfg.digest(),
            world_size=run.world,
            load_average=os.getloadavg()[0],
            model=size,
        )
    )


def origin() -> dict:
    """What a report of either kind begins with."""
    hashes = {"train_gpt.py": train_gpt.CODE_SHA256, "bench.py": CODE_SHA256}
    installed = {
        d.metadata["Name"].replace("-", "_"): d.version for d in importlib.metadata.distributions()
    }
    wanted = [
        "numpy",
        "safetensors",
        "sentencepiece",
        "zstandard",
        "triton",
        "brotli",
        "flash_attn",
        "flash_attn_3",
    ]
    return dict(
        schema=SCHEMA_VERSION,
        date=time.strftime("%Y-%m-%d %H:%M"),
        code_sha256=hashes,
        packages={name: installed[name] for name in wanted if name in installed},
    )


# ── 5 PEERS: public training scripts as black boxes, ours beside them ─────────────────────────────────────────────
# A black box is unmodified, starts in an empty folder with no variable but those of the machine and its settings, and is known
# only by what it prints. Then ours runs with the settings of each, and with our best ones. Nothing of theirs is part of this.
BATCH = (
    32 * 2048
)  # validation targets of one scoring batch per GPU; #1855 drops a last batch that is not full
SCORES = ("live", "averaged", "quantised", "sliding", "ttt")


class Kind(NamedTuple):
    """A family of scripts: what it is told, what ours is told for the same model, and how its steps look in its output."""

    about: str
    counts: dict[
        str, float
    ]  # settings of both in steps of the published run (600 s, 8 GPUs), which shrink with the run
    shared: str
    theirs: str
    ours: str
    step: str  # pattern of a logged step: its number, then milliseconds (ms) or mean tokens per second (speed) since the start
    sidecar: bool = False  # reads the bytes of each validation token from a file


SIZE = "NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 TRAIN_SEQ_LEN=2048 "
KINDS = {  # settings beside each script's own defaults
    "194": Kind(
        "#194 as run for its best seed: QAT, no SWA; ours has all parts of it",
        {"WARMDOWN_ITERS": 3000, "MUON_MOMENTUM_WARMUP_STEPS": 1500},
        shared=SIZE + "MLP_MULT=3 TRAIN_BATCH_TOKENS=524288 SMEAR_GATE=1",
        theirs="QAT=1 QUANT_BITS=6 MUON_WEIGHT_DECAY=0.038 SWA_ENABLED=0 TTT_ENABLED=0",
        ours="QAT_ENABLED=1 QAT_SCOPE=linears QAT_GRID=amax MUON_WD=0.038",
        step=r"^step:(\d+)/\d+ train_loss:\S+ train_time:(?P<ms>\d+)ms",
    ),
    "1855": Kind(
        "record #1855 without test-time training and lrzip; ours in size, batch, sequence and plain parts alone: no repeated "
        "blocks, parallel lanes, gates, attention within documents, floor of the learning rate, GPTQ, LQER",
        {
            "MUON_MOMENTUM_WARMUP_STEPS": 1500,
            "EMA_DECAY": 1 / (1 - 0.9965),
        },  # EMA_DECAY: its memory in steps
        shared=SIZE
        + "MLP_MULT=4 TRAIN_BATCH_TOKENS=786432 ROPE_DIMS=16 XSA_LAST_N=11 LN_SCALE=1 QK_GAIN_INIT=5 MATRIX_LR=0.026 "
        "BETA2=0.99 MUON_MOMENTUM=0.97 MUON_WD=0.095 ADAM_WD=0.02 WARMDOWN_FRAC=0.85",
        theirs="CASEOPS_ENABLED=1 NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 MIN_LR=0.1 EMBED_BITS=7 MLP_CLIP_SIGMAS=11.5 "
        "EMBED_CLIP_SIGMAS=14 GPTQ_RESERVE_SECONDS=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 "
        "SPARSE_ATTN_GATE_SCALE=0.5 SMEAR_GATE_ENABLED=1 COMPRESSOR=brotli TTT_ENABLED=0",
        ours="MLP_ACT=leaky_relu2 SMEAR_GATE=0 EMA_ENABLED=1 QUANT_BITS_EMBED=7",
        step=r"^(\d+)/\d+ train_loss: \S+ train_time: \S+m tok/s: (?P<speed>\d+)",
        sidecar=True,
    ),
}
COMMON = "WARMUP_STEPS=5 SEED=1337 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=10 PYTHONUNBUFFERED=1"
OURS = "DATA_PATH=../../data LOGS_DIR=. RUN_ID=run STRICT=0"
BEST = (
    "WARMDOWN_FRAC=0.5 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_STEPS=100 QAT_ENABLED=1 EMA_ENABLED=1 EMA_DECAY=0.95 "
    "GRAD_ACCUM_STEPS=2"
)  # of ours, beside the defaults: for some 200 steps on one GPU of 140 GB
FINAL = {  # what a black box prints once: name -> pattern; of several matches the last counts
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


@dataclass
class Peer:
    """One row of the table. The script is run as OUT/NAME/train_gpt.py, a link to it, in the empty folder OUT/NAME/work."""

    name: str
    about: str
    script: Path
    env: dict[str, str]
    kind: Kind | None = None  # None: ours

    def command(self, gpus: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        return [sys.executable, *(torchrun if gpus > 1 else []), "../train_gpt.py"]

    def shell(self, options: PeerOptions) -> str:
        """The run as one line for a shell in this script's folder."""
        pairs = [f'{name}="${name}"' for name in machine_variables()] + [
            f"{k}={shlex.quote(v)}" for k, v in self.env.items()
        ]
        command = ["python", *self.command(options.gpus)[1:]]
        line = [
            "cd",
            shlex.quote(str(options.out / self.name / "work")),
            "&& env -i",
            *pairs,
            *command,
        ]
        return " ".join(line).replace(f"cd {ROOT}/", "cd ").replace(str(ROOT), "$OLDPWD")


def machine_variables() -> dict[str, str]:
    return {
        n: v
        for n, v in os.environ.items()
        if n in ("PATH", "HOME", "LD_LIBRARY_PATH") or n.startswith("CUDA_")
    }


def pairs_of(text: str) -> dict[str, str]:
    """Settings as they stand before a command."""
    return dict(pair.split("=", 1) for pair in text.split())


def scaled(kind: Kind, share: float) -> dict[str, str]:
    """The counts of steps of a run with this share of the published budget, never below 2."""
    counts = {name: max(2, round(steps * share)) for name, steps in kind.counts.items()}
    return {
        name: str(round(1 - 1 / n, 6) if name == "EMA_DECAY" else n) for name, n in counts.items()
    }


def plan_peers(options: PeerOptions, vocab_size: int) -> list[Peer]:
    """All runs in order: the black boxes, ours with the settings of each, ours with the best ones; --only leaves some."""
    common = pairs_of(COMMON) | {
        "TOKENIZER_PATH": "../../data/tokenizer.model",
        "VOCAB_SIZE": str(vocab_size),
        "MAX_WALLCLOCK_SECONDS": str(options.seconds),
    }
    mine, script = common | pairs_of(OURS), options.ours.absolute()
    theirs, ours = [], []
    for text in options.script:
        name, _, place = text.partition("=")
        path, _, label = (
            place.rpartition(":") if place.rpartition(":")[2] in KINDS else (place, "", name)
        )
        refuse(
            label not in KINDS or not re.fullmatch(r"[\w.-]+", name) or not Path(path).is_file(),
            f"--script {text}: give NAME=PATH:KIND, an existing file and one of {', '.join(KINDS)}",
        )
        kind = KINDS[label]
        both = pairs_of(kind.shared) | scaled(kind, options.seconds * options.gpus / 4800)
        data = {"DATA_PATH": "../../data" + "_with_bytes" * kind.sidecar, "RUN_ID": name}
        theirs.append(
            Peer(
                name,
                kind.about,
                Path(path).absolute(),
                common | both | pairs_of(kind.theirs) | data,
                kind,
            )
        )
        ours.append(Peer(f"ours_as_{name}", kind.about, script, mine | both | pairs_of(kind.ours)))
    found = [
        *theirs,
        *ours,
        Peer("ours_best", "our defaults and BEST", script, mine | pairs_of(BEST)),
    ]
    names = [peer.name for peer in found]
    refuse(
        len({*names}) < len(names) or {*options.only} - {*names},
        f"--script, --only: the runs are {', '.join(names)}; each name once",
    )
    for text, folder in [(text, False) for text in options.env] + [
        (text, True) for text in options.path
    ]:
        target, _, value = (
            text.partition(":") if text.partition(":")[0] in names else ("", "", text)
        )
        refuse(
            not (Path(value).is_dir() if folder else re.match(r"\w+=", value)),
            f"--{'path' if folder else 'env'} {text}: give {'a FOLDER' if folder else 'NAME=VALUE'}, or RUN: before it",
        )
        for peer in [peer for peer in found if target in ("", peer.name)]:
            path = os.pathsep.join(
                [str(Path(value).absolute()), *filter(None, [peer.env.get("PYTHONPATH")])]
            )
            peer.env.update([("PYTHONPATH", path) if folder else value.split("=", 1)])
            peer.about += "; HERE FA2, AS TORCH HAS IT, STOOD IN FOR FA3" * (
                folder and Path(value).resolve() == STAND_IN
            )
    return [peer for peer in found if not options.only or peer.name in options.only]


def lay_out(options: PeerOptions, tokenizer: Path, cfg: Config) -> dict:
    """Link tokenizer and training shards, cut a head of validation that all score to its last target; returns what there is.

    The file of bytes per token lies in a folder of its own, as its name makes other scripts take it for a shard."""
    train, val = Split(cfg, "train"), Split(cfg, "val")
    refuse(
        [*options.data.glob("fineweb_val_bytes_*")],
        f"--data {options.data}: holds bytes per token; take shards without them",
    )
    refuse(
        options.val_tokens % (BATCH * options.gpus) or options.val_tokens >= val.tokens,
        f"--val-tokens {options.val_tokens}: must be below the {val.tokens} that are there, and a multiple of "
        f"{BATCH * options.gpus}, so that all score the same targets",
    )
    tokens = val.take(0, options.val_tokens + 1)
    sizes = np.append(0, train_gpt.ByteTable(cfg).count(tokens))
    for name, files in {
        "data": {"val": tokens},
        "data_with_bytes": {"val": tokens, "val_bytes": sizes},
    }.items():
        shutil.rmtree(options.out / name, ignore_errors=True)
        (options.out / name).mkdir(parents=True)
        for path in train.paths:
            (options.out / name / path.name).symlink_to(path.absolute())
        for split, values in files.items():
            writer = prepare_data.ShardWriter(options.out / name, split, prepare_data.Recipe())
            writer.add(values.astype("<u2"), 0)
            writer.close()
    (options.out / "data" / "tokenizer.model").symlink_to(tokenizer.absolute())
    return dict(
        train_tokens=train.tokens,
        val_tokens=options.val_tokens,
        val_bytes=int(sizes.sum()),
        tokenizer_sha256=prepare_data.file_sha256(tokenizer),
    )


def execute(peer: Peer, options: PeerOptions) -> dict:
    """Run it in an empty folder with its environment alone, its output in stdout.txt; whatever happens is a row."""
    folder = options.out / peer.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    (folder / "train_gpt.py").symlink_to(peer.script)
    began = time.perf_counter()
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
            code = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            code = f"over {options.timeout:g} s"
        finally:  # SIGTERM to what is left of its group, which torchrun hands to its ranks, and SIGKILL 15 s later
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(15)
    text = (folder / "stdout.txt").read_text(errors="replace").replace(str(ROOT), ".")
    (folder / "stdout.txt").write_text(text)
    row = dict(
        name=peer.name,
        about=peer.about,
        exit_code=code,
        last_line=text.strip().rpartition("\n")[2][:300],
        seconds=time.perf_counter() - began,
        sha256=prepare_data.file_sha256(peer.script),
        command=peer.shell(options),
    )
    found = read_output(text, peer) if peer.kind else read_records(folder / "work" / "run")
    return row | found | rates(found, options.gpus)


def read_output(text: str, peer: Peer) -> dict:
    """The figures of a black box, from what it printed; None for what it did not come to. Blocks that repeat count each time."""
    last = {
        name: (list(re.finditer(pattern, text, re.M)) or [None])[-1]
        for name, pattern in FINAL.items()
    }
    config = {name: peer.env[name] for name in ("VOCAB_SIZE", *pairs_of(peer.kind.shared))}
    batch, every, times = int(config["TRAIN_BATCH_TOKENS"]), int(peer.env["TRAIN_LOG_EVERY"]), {}
    for match in re.finditer(peer.kind.step, text, re.M):
        step, value = int(match[1]), float(match[2])
        times[step] = value if "ms" in match.groupdict() else 1e3 * step * batch / value
    marks = [step for step in times if step % every == 0]
    steps_ms = [(times[b] - times[a]) / (b - a) for a, b in zip(marks, marks[1:])]
    end, blocks = last["end"], int(config["NUM_LAYERS"])
    steps, train_ms = (
        (int(end[2]), float(end[1])) if end else max(times.items(), default=(None, None))
    )
    if last["loops"] and steps:
        again = int(peer.env["NUM_LOOPS"]) * (
            int(peer.env["LOOP_END"]) - int(peer.env["LOOP_START"]) + 1
        )
        blocks += again * (1 - int(last["loops"][1]) / steps)
    scored = next((last[name] for name in ("ttt", "sliding_ms", "quantised") if last[name]), None)
    return dict(
        steps=steps,
        train_seconds=train_ms and train_ms / 1e3,
        step_ms_last=steps_ms[-1] if steps_ms else None,
        step_ms_median=float(np.median(steps_ms)) if steps_ms else None,
        blocks=blocks,
        peak_gib=last["memory"] and int(last["memory"][1]) / 1024,
        total_bytes=last["bytes"] and int(last["bytes"][1]),
        eval_seconds=scored and int(scored[scored.lastindex]) / 1e3,
        config=Config.from_env(config).non_default(),
        bpb={name: float(last[name][1]) for name in SCORES if last[name]},
    )


def read_records(folder: Path) -> dict:
    """The figures of our run, from its result.json and metrics.jsonl; nothing where it did not come to the end."""
    if not (folder / "result.json").exists():
        return {}
    r, events = (
        json.loads((folder / "result.json").read_text()),
        (folder / "metrics.jsonl").read_text().splitlines(),
    )
    steps_ms = [e["step_ms"] for e in map(json.loads, events) if e["event"] == "step"]
    config = Config(**r["config"])
    return {
        name: r[name]
        for name in ("steps", "train_seconds", "step_ms_median", "eval_seconds", "total_bytes")
    } | dict(
        step_ms_last=steps_ms[-1] if steps_ms else None,
        peak_gib=r["peak_memory_bytes"] / 2**30,
        blocks=config.num_layers,
        config=config.non_default(),
        bpb={name: r["scores"][name]["bpb"] for name in SCORES if name in r["scores"]},
    )


def rates(found: dict, gpus: int) -> dict:
    """Tokens per second, FLOPs and MFU of the whole training."""
    if not found.get("steps") or not found["train_seconds"]:
        return {}
    cfg = Config(**{name.lower(): value for name, value in found["config"].items()})
    speed, flops = (
        found["steps"] * cfg.train_batch_tokens / found["train_seconds"],
        forward_flops(cfg),
    )
    work, peak = (
        3
        * (
            flops.head
            + (flops.linear - flops.head + flops.attention) * found["blocks"] / cfg.num_layers
        ),
        nominal(),
    )
    return dict(
        tokens_per_second=speed, mflop_per_token=work / 1e6, mfu=peak and speed * work / gpus / peak
    )


# ── 6 TABLES: from a report alone ─────────────────────────────────────────────────────────────────────────────────
COLUMNS = {  # heading: the cell, from a row
    "what": "{group}: {name}",
    "ms": "{ms:,.3f}",
    "n": "{n}",
    "spread": "{spread:.0%}",
    "of step": "{share:.1%}",
    "rate": lambda row: human(row["rate"], row["unit"]),
    "floor ms": "{floor_ms:,.3f}",
    "x floor": "{ratio:,.2f}",
    "twin ms": "{twin_ms:,.3f}",
    "x faster than its twin (p10 to p90)": "{speedup:.2f} ({speedup_p10:.2f} to {speedup_p90:.2f})",
}
PEER_COLUMNS = {
    "run": "{name}",
    "exit": "{exit_code}",
    "steps": "{steps:,}",
    "ms median": "{step_ms_median:,.1f}",
    "ms last": "{step_ms_last:,.1f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "MFU": "{mfu:.1%}",
    "GiB": "{peak_gib:.1f}",
    "train s": "{train_seconds:.1f}",
    "eval s": "{eval_seconds:.1f}",
    "bytes": "{total_bytes:,}",
    **{f"{name} BPB": f"{{bpb[{name}]:.4f}}" for name in SCORES},
    "wall s": "{seconds:.0f}",
}


def caption(report: dict) -> str:
    """What the table was measured on, in a sentence or two."""
    if s := report.get("setup"):
        return (
            f"{s['gpus']} x {s['device']}, torch {s['torch']}, {report['date']}. {s['seconds']:g} s of training each, on "
            f"{s['train_tokens']:,} tokens; scored on the first {s['val_tokens']:,} targets ({s['val_bytes']:,} bytes)."
        )
    r, m = report, report["model"]
    return (
        f"{r['device']}, ranks: {r['world_size']}, threads per rank: {r['threads_per_rank']}, torch {r['torch']}, "
        f"{r['dtype']}, {'compiled' if r['compile'] else 'eager'}, {r['date']}. Model: {m['params']:,} parameters, "
        f"{m['layers']} x {m['dim']}, rows of {m['seq_len']}, {m['tokens_per_step']:,} tokens per step."
    )


def table(report: dict, markdown: bool = False) -> str:
    """A report as text: caption, rows, what explains them, command. markdown: as in README, floors and twins unexplained."""

    def cell(how: str | Callable, row: dict) -> str:
        try:
            return how(row) if callable(how) else how.format_map(row)
        except (KeyError, TypeError):  # the row has no such figure, or None
            return "-"

    def how(row: dict) -> str:
        failed = f"exit {row['exit_code']}: {row['last_line']}" if row.get("exit_code") else ""
        parts = [f"{key}: {row[key]}" for key in ("floor", "twin") if key in row]
        return "; ".join(filter(None, [*parts, row.get("note"), row.get("about"), failed]))

    peers, rows = "setup" in report, report["rows"]
    columns = PEER_COLUMNS if peers else COLUMNS
    cells = [[*columns], *([cell(form, row) for form in columns.values()] for row in rows)]
    hows = [("row", "how"), *((row["name"], how(row)) for row in rows if how(row))]
    parts = [
        caption(report),
        text_table(cells, markdown),
        text_table(hows, markdown) if peers or not markdown else "",
    ]
    return "\n\n".join(
        filter(None, [*parts, f"`{report['command']}`" if "command" in report else ""])
    )


# ── 7 COMMANDS ────────────────────────────────────────────────────────────────────────────────────────────────────
app = typer.Typer(help=__doc__.split("\n\n")[0], add_completion=False, rich_markup_mode=None)


@app.command()
def run(
    name: Annotated[str, typer.Option(help="of the report; default: the device's")] = "",
    force: Annotated[bool, typer.Option("--force", help="overwrite a report of this name")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a few repeats of small work: to try it, not to publish")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of the reports")] = BENCH,
) -> None:
    """Measure everything here, write OUT/NAME.json, print its table. Settings: the environment, as for train_gpt.py."""
    cfg = Config.from_env(os.environ)
    refuse(
        cfg.checkpoint or cfg.eval_only,
        "CHECKPOINT, EVAL_ONLY: bench.py trains a few steps; unset them",
    )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    slug = re.sub(
        r"[^a-z0-9]+", "-", f"{device_name()}{f' x {world}' if world > 1 else ''}".lower()
    ).strip("-")
    path = out / f"{name or slug}.json"
    refuse(
        path.exists() and not force, f"{path}: exists; --force overwrites it, --name gives another"
    )
    report = measure(cfg, quick)
    settings = {k: v for k, v in report["variables"].items() if "OMP_" in k} | report["settings"]
    launcher = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    command = [
        *(f"{k}={shlex.quote(v)}" for k, v in settings.items()),
        launcher,
        "bench.py run --name",
        shlex.quote(path.stem),
    ]
    report = dict(name=path.stem, command=" ".join(command + ["--quick"] * quick), **report)
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        train_gpt.write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
        print(f"{table(json.loads(path.read_text()))}\n\nwrote {path}")
    if dist.is_initialized():
        dist.destroy_process_group()


@app.command()
@prepare_data.options_as_parameters(PeerOptions)
def peers(options: PeerOptions) -> None:
    """Run public scripts and ours for the same seconds on the same shards; write OUT.json. A failure is a row."""
    refuse(8 % options.gpus, f"--gpus {options.gpus}: choose 1, 2, 4 or 8")
    tokenizer = options.tokenizer or options.data / "tokenizer.model"
    cfg = Config(
        data_path=str(options.data),
        tokenizer_path=str(tokenizer),
        vocab_size=prepare_data.load_tokenizer(tokenizer).vocab_size(),
    )
    wanted = plan_peers(options, cfg.vocab_size)
    if options.dry_run:
        return print(
            "\n".join(f"# {peer.name}: {peer.about}\n{peer.shell(options)}" for peer in wanted)
        )
    setup = dict(
        gpus=options.gpus,
        device=device_name(),
        torch=torch.__version__,
        seconds=options.seconds,
        **lay_out(options, tokenizer, cfg),
    )
    path, rows = options.out.with_name(f"{options.out.name}.json"), {}
    if options.only and path.exists() and (old := json.loads(path.read_text()))["setup"] == setup:
        rows = {row["name"]: row for row in old["rows"]}
    for peer in wanted:
        print(f"{peer.name}: {peer.about}", flush=True)
        rows[peer.name] = execute(peer, options)
        report = origin() | dict(setup=setup, rows=[*rows.values()])
        train_gpt.write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="a report", exists=True, dir_okay=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="as in README")] = False,
) -> None:
    """Print the table of a report."""
    print(table(json.loads(path.read_text()), markdown))


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return prepare_data.exit_code_of(app, "bench.py", arguments, Refusal)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # whoever ends this ends the run under way
    sys.exit(main())

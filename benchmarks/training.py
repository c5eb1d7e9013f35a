"""Stages before and during training, each one function that says what is timed.

"Floor:" is the work that no machine with this one's rates can do in less time; "Twin:" the plainest
code that does the same. Every stage leaves its rows in the Bench.
"""

import contextlib
import dataclasses
import math
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import timer

import train_gpt
from benchmarks.machine import (
    Bench,
    Floor,
    Measured,
    human,
    nominal,
)
from benchmarks.twins import (
    plain_average,
    plain_batches,
    plain_muon,
    plain_reduce,
    plain_view,
)
from planning.flops import forward_flops, muon_flops, muon_matrices
from train_gpt import (
    GPT,
    Averages,
    Batch,
    Config,
    Optimiser,
    Run,
    Split,
    StepPlan,
    Trainer,
    Validation,
    WeightViews,
)


# ── Start-up ──────────────────────────────────────────────────────────────────────────────────────
class Laps:
    """Rows of the start-up: each has the seconds since the one before."""

    def __init__(self, b: Bench):
        self.b = b
        self.last = timer()

    def add(self, name: str, note: str = "") -> None:
        now = timer()
        seconds = np.array([[now - self.last]])
        self.last = now
        self.b.add(Measured("start-up", name, seconds, note=note))


def start_up(b: Bench) -> Trainer:
    """Everything before the first step; returns the trainer, warmed up.

    Timed: each part once, as it happens.
    """
    cfg = b.cfg
    run = b.run
    laps = Laps(b)

    splits = {name: Split(cfg, name) for name in ("val", "train")}
    val = Validation(cfg, run, splits["val"])
    train_gpt.check_data(cfg, splits)
    laps.add("open and check the data", f"{val.n:,} validation targets")

    attend = train_gpt.choose_attention(cfg, run)
    laps.add("choose the attention kernel")

    model = train_gpt.build_model(cfg, run, attend)
    plan = train_gpt.export_plan(cfg, model)
    trainer = Trainer(cfg, run, model, plan, splits["train"], val)
    params = sum(p.numel() for p in model.parameters())
    laps.add("build model and trainer", f"{params:,} parameters")

    start_peak_memory(run)
    steps = sum(map(len, trainer.warm_up().values()))
    how = "compiled" if run.compile else "eager"
    laps.add("warm-up and compile", f"{steps} steps, {how}")
    return trainer


def start_peak_memory(run: Run) -> None:
    """Start the high-water mark anew: of the GPU, and on Linux of the process."""
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(run: Run) -> tuple[int, str]:
    """(bytes, of what) since the warm-up began."""
    if run.cuda:
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        kilobytes = int(re.search(r"VmHWM:\s*(\d+)", status)[1])
        return 1024 * kilobytes, "resident, torch included"
    # macOS counts bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak, "resident, torch included, since the start"


# ── The step ──────────────────────────────────────────────────────────────────────────────────────
def training_step(b: Bench, trainer: Trainer) -> None:
    """The whole step, its forward and backward, what it waits for data, and its memory."""
    (waits, steps, reads), batch = time_steps(b, trainer)
    peak, kind = peak_memory(b.run)
    forward, backward = time_halves(trainer, batch, len(steps))

    tokens = batch[0].numel()
    floors = step_floors(b, trainer.model, tokens)
    rate = (b.cfg.train_batch_tokens, "tokens/s")
    add_whole_step(b, steps, floors[2], tokens)
    note = f"{trainer.accumulate} micro-batches"
    b.add(Measured("training", "forward", forward[None], floor=floors[0], rate=rate, note=note))
    b.add(Measured("training", "backward", backward[None], floor=floors[1], rate=rate))

    seconds = np.stack((waits, reads))
    floor = b.floor(nbytes=18 * tokens, host=True)
    twin = "synchronous reads"
    b.add(Measured("training", "wait for data", seconds, floor=floor, rate=rate, twin=twin))
    memory = dict(
        group="training",
        name="peak memory",
        ms=None,
        spread=None,
        n=1,
        rate=peak,
        unit="B",
        note=kind,
    )
    b.rows.append(memory)


def time_steps(b: Bench, trainer: Trainer) -> tuple[np.ndarray, Batch]:
    """Seconds (3, samples) of waits, steps and reads, and one more batch.

    Timed: what a step waits for its batch; the step as the configuration has it. Twin of the wait:
    the batch read when it is asked for.
    """
    cfg = b.cfg
    qna = cfg.qna_enabled and not cfg.qat_enabled
    now = StepPlan(
        1.0,
        cfg.muon_momentum,
        qat=cfg.qat_enabled,
        qna=cfg.qna_magnitude if qna else 0.0,
        loops=cfg.num_loops,
    )
    fast = train_gpt.Loader(cfg, b.run, trainer.split)
    plain = plain_batches(cfg, b.run, trainer.split)
    fetched = []

    def wait() -> None:
        fetched.append(fast.next(cfg.train_seq_len))

    def step() -> None:
        trainer.step(fetched.pop(), now)

    def read() -> None:
        next(plain)

    seconds = b.time(wait, step, read, most=30, limit=4, block=False)
    batch = fast.next(cfg.train_seq_len)
    fast.close()
    return seconds, batch


def time_halves(trainer: Trainer, batch: Batch, samples: int) -> np.ndarray:
    """Seconds (2, samples) of all forwards and of all backwards of a batch.

    Timed: the micro-batches of one step, without exchange and update; one untimed repeat before.
    """
    micro_batches = [part.tensor_split(trainer.accumulate) for part in batch]

    def halves() -> list[float]:
        forward = backward = 0.0
        for ids, targets in zip(*micro_batches, strict=True):
            began = timer()
            loss = trainer.forward(ids, targets).sum()
            between = timer()
            loss.backward()
            forward += between - began
            backward += timer() - between
        return [forward, backward]

    halves()
    return np.array([halves() for _ in range(samples)]).T


def step_floors(b: Bench, model: GPT, tokens: int) -> tuple[Floor, Floor, Floor]:
    """Of forward, backward and the whole step on so many tokens of this rank.

    Products, and element-wise passes, all fused: 20 and 30.5 over the residual stream of each
    block, 2 and 2 over the logits, 9 over the weights.
    """
    cfg = b.cfg
    flops = forward_flops(cfg)
    width = b.run.dtype.itemsize
    stream = cfg.num_layers * cfg.model_dim * width
    logits = cfg.vocab_size * width
    weights = sum(p.numel() for p in model.parameters())

    def pass_floor(times: int, passes: float) -> Floor:
        return b.floor(
            times * (flops.linear + flops.attention) * tokens,
            (passes * stream + 2 * logits) * tokens,
            2 * tokens * cfg.model_dim * width,
        )

    forward = pass_floor(1, 20)
    backward = pass_floor(2, 30.5)
    newton_schulz = muon_flops(muon_matrices(model).values(), cfg.muon_backend_steps)
    update = b.floor(newton_schulz / b.run.world, 36 * weights / b.run.world)

    parts = (forward, backward, update)
    seconds = sum(part.seconds for part in parts)
    return forward, backward, Floor(seconds, " + ".join(part.how for part in parts))


def add_whole_step(b: Bench, steps: np.ndarray, floor: Floor, tokens: int) -> None:
    """The row of the whole step, with its MFU: of the matmul rate here, and of the data sheet's."""
    flops = forward_flops(b.cfg)
    speed = flops.trained * tokens / np.median(steps)
    card = nominal()
    mfu = float(speed / b.flop_rate)
    mfu_nominal = float(speed / card) if card else None

    note = f"MFU {mfu:.1%} of the matmul rate here"
    if card:
        note += f", {mfu_nominal:.1%} of {human(card, 'FLOP/s')}"
    note += (
        f"; {flops.trained / 1e6:.1f} MFLOP a token = "
        f"3 x ({flops.linear / 1e6:.2f} linear + {flops.attention / 1e6:.2f} attention)"
    )
    rate = (b.cfg.train_batch_tokens, "tokens/s")
    b.add(Measured("training", "step, whole", steps[None], floor=floor, rate=rate, note=note))
    b.rows[-1].update(mfu=mfu, mfu_nominal=mfu_nominal)


# ── From gradients to weights ─────────────────────────────────────────────────────────────────────
def optimisation(b: Bench, trainer: Trainer) -> None:
    """Gradient exchange and clip, Muon, AdamW: from the gradients of one step to new weights."""
    trainer.flat.gradients.normal_()
    gradient_norm(b, trainer)
    muon(b, trainer)
    muon_with_rows_normalised(b, trainer)
    adamw(b, trainer)


def muon_numel(trainer: Trainer) -> int:
    """Weights that Muon trains."""
    return sum(math.prod(shape) for shape in muon_matrices(trainer.model).values())


def gradient_norm(b: Bench, trainer: Trainer) -> None:
    """Timed: the mean over the ranks and the clip of the flat gradients.

    Twin: the same for one .grad after the other. Floor: every gradient read twice and written once.
    """
    flat = trainer.flat
    clip = b.cfg.grad_clip_norm
    world = b.run.world
    copies = [torch.nn.Parameter(w.clone()) for w in flat.views(flat.weights).values()]
    for p, g in zip(copies, flat.views(flat.gradients).values(), strict=True):
        p.grad = g.clone()

    seconds = b.time(
        lambda: (flat.reduce(clip), flat.outcome()),
        lambda: plain_reduce(copies, world, clip),
    )
    name = "gradient norm and clip"
    note = ""
    if world > 1:
        name = "gradient exchange, norm and clip"
        note = "floor without the exchange"
    floor = b.floor(nbytes=12 * sum(p.numel() for p in trainer.model.parameters()))
    twin = "a loop over .grad, clip_grad_norm_"
    b.add(Measured("training", name, seconds, floor=floor, twin=twin, note=note))


def muon(b: Bench, trainer: Trainer) -> None:
    """Timed: Muon's step on all matrices, shared among the ranks.

    Twin: one matrix at a time. Floor: the products of Newton-Schulz, and 20 bytes a weight.
    """
    cfg = b.cfg
    flat = trainer.flat
    shapes = muon_matrices(trainer.model)
    numel = muon_numel(trainer)
    live = flat.views(flat.weights)
    gradients = flat.views(flat.gradients)
    copies = [live[name].clone() for name in shapes]
    their_gradients = [gradients[name].clone() for name in shapes]
    momenta = [torch.zeros_like(live[name]) for name in shapes]
    now = StepPlan(1.0, cfg.muon_momentum)

    @torch.no_grad()
    def fast() -> None:
        flat.gather(trainer.optimiser.muon(now))

    def plain() -> None:
        plain_muon(copies, their_gradients, momenta, cfg.matrix_lr, now.momentum, cfg)

    seconds = b.time(fast, plain)
    flops = muon_flops(shapes.values(), cfg.muon_backend_steps)
    floor = b.floor(flops / b.run.world, 20 * numel / b.run.world)
    twin = "one matrix at a time"
    note = f"{len(shapes)} matrices, {numel:,} weights"
    b.add(Measured("training", "optimiser: Muon", seconds, floor=floor, twin=twin, note=note))


def muon_with_rows_normalised(b: Bench, trainer: Trainer) -> None:
    """Timed: Muon's step with MUON_ROW_NORMALIZE. Twin: without it, in turn."""
    flat = trainer.flat
    now = StepPlan(1.0, b.cfg.muon_momentum)

    def step_of(row_normalise: bool) -> Callable[[], None]:
        cfg = dataclasses.replace(b.cfg, muon_row_normalize=row_normalise)
        optimiser = Optimiser(flat, cfg, b.run)
        return torch.no_grad()(lambda: flat.gather(optimiser.muon(now)))

    seconds = b.time(step_of(True), step_of(False))
    name = "optimiser: Muon, rows normalised"
    twin = "rows as they are"
    b.add(Measured("training", name, seconds, twin=twin))


def adamw(b: Bench, trainer: Trainer) -> None:
    """Timed: AdamW's step on all that Muon does not train. Floor: 28 bytes a parameter."""
    numel = sum(p.numel() for p in trainer.model.parameters()) - muon_numel(trainer)
    seconds = b.time(trainer.optimiser.adamw.step)
    floor = b.floor(nbytes=28 * numel)
    note = f"{numel:,} parameters"
    b.add(Measured("training", "optimiser: AdamW", seconds, floor=floor, note=note))


# ── Beside the steps ──────────────────────────────────────────────────────────────────────────────
def checkpointing(b: Bench, trainer: Trainer) -> None:
    """Timed: what a checkpoint costs the training clock, and its writing beside the next steps."""

    def save() -> list[float]:
        began = timer()
        trainer.save(wait=False)
        saved = timer()
        # Rank 0 writes.
        if trainer.writing:
            trainer.writing.result()
        return [saved - began, timer() - saved]

    save()
    copied, written = np.array([save() for _ in range(2 if b.quick else 7)]).T
    every = b.cfg.checkpoint_every
    note = ""
    if every:
        note = f"{np.median(copied) / every:.4%} of the time at CHECKPOINT_EVERY={every:g}"
    b.add(Measured("training", "checkpoint: copy, on the clock", copied[None], note=note))

    if b.run.rank == 0:
        path = b.run.dir / train_gpt.CHECKPOINTS[0]
        rate = (path.stat().st_size, "B/s")
        name = "checkpoint: write, beside the steps"
        b.add(Measured("training", name, written[None], rate=rate))


# The model without the techniques of the rows below
PLAIN = dict(
    loader="rows",
    doc_mask=False,
    num_loops=0,
    parallel_start_layer=0,
    skip_gates_enabled=False,
    sparse_attn_gate_enabled=False,
    gated_attn_enabled=False,
    attn_out_gate_enabled=False,
    smear_gate=False,
    smear_gate_enabled=False,
)


def model_rows(layers: int) -> dict[str, dict]:
    """Row -> the knobs that the plain model gets: of 11 layers, those of the record (#1855)."""
    start = layers // 3
    end = min(start + 2, layers - 1)
    return {
        f"two more passes of {end - start + 1} of {layers} blocks": dict(
            num_loops=2, loop_start=start, loop_end=end
        ),
        "two lanes in the last blocks": dict(parallel_start_layer=3 * layers // 4),
        "gates of skips, heads and smear": dict(
            skip_gates_enabled=True, sparse_attn_gate_enabled=True, smear_gate_enabled=True
        ),
        "document masks": dict(doc_mask=True),
    }


def model_techniques(b: Bench, trainer: Trainer) -> None:
    """Timed: forward and backward of a micro-batch with the technique. Twin: the plain model's."""
    plain = dataclasses.replace(b.cfg, **PLAIN)
    _, _, rows, length = train_gpt.step_shape(plain, b.run, plain.train_seq_len)
    place = torch.arange(rows * length, device=b.run.device).view(rows, length) % trainer.val.n
    ids = trainer.val.tokens[place].long()
    targets = trainer.val.tokens[place + 1].long()
    attend = trainer.model.blocks[0].attn.attend

    def both_ways(cfg: Config) -> Callable[[], None]:
        model = train_gpt.build_model(cfg, b.run, attend)
        forward = b.run.compiled(model)
        parameters = [*model.parameters()]

        def work() -> None:
            loss = forward(ids, targets).mean()
            torch.autograd.grad(loss, parameters, allow_unused=True)

        return work

    without = both_ways(plain)
    for name, knobs in model_rows(plain.num_layers).items():
        seconds = b.time(both_ways(dataclasses.replace(plain, **knobs)), without)
        b.add(Measured("training", f"model: {name}", seconds, twin="the model without"))


def techniques(b: Bench, trainer: Trainer) -> None:
    """QAT, QNA and the averages while they act, whatever the configuration has switched on."""
    both = dataclasses.replace(
        b.cfg,
        qat_enabled=True,
        qna_enabled=True,
        qat_start_kind="time_frac",
        qat_start=0.5,
        qna_magnitude=b.cfg.qna_magnitude or 1.0,
        strict=False,
    )
    views = WeightViews(both, b.run, trainer.model, trainer.flat, trainer.plan)
    for name, stacks in views.stacks.items():
        if stacks:
            numel = sum(w.numel() for _, w in stacks)
            weight_view(b, trainer, views, name, numel)
    ema(b, trainer)
    snapshots(b, trainer, "swa")
    snapshots(b, trainer, "sqwa")


def weight_view(b: Bench, trainer: Trainer, views: WeightViews, name: str, numel: int) -> None:
    """Timed: QAT's or QNA's weights put in, and the latent ones back.

    Twin, of QAT: tensor by tensor, by the formula. Floor: every weight read and written once.
    """
    now = views.techniques[name].at_full_strength()
    grids = views.techniques["QAT"].grids
    live = dict(trainer.model.named_parameters())

    def fast() -> None:
        views.leave(views.enter(now, 0))

    def plain() -> None:
        with plain_view(live, grids):
            pass

    works = [fast]
    twin = ""
    if name == "QAT":
        works.append(plain)
        twin = "one tensor at a time, by the formula"
    seconds = b.time(*works)
    floor = b.floor(nbytes=8 * numel)
    note = "floor: weights read and written once"
    row = f"{name}: enter and leave"
    b.add(Measured("training", row, seconds, floor=floor, twin=twin, note=note))


def average_of(b: Bench, trainer: Trainer, name: str) -> Averages:
    """The average of this name alone: ema, swa or sqwa."""
    on = {f"{other}_enabled": other == name for other in ("ema", "swa", "sqwa")}
    cfg = dataclasses.replace(b.cfg, average="auto", strict=False, **on)
    return Averages(cfg, b.run, trainer.model, trainer.flat, trainer.plan)


def in_host_memory(live: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of every tensor there."""
    return {name: p.detach().cpu().clone() for name, p in live.items()}


def ema(b: Bench, trainer: Trainer) -> None:
    """Timed: one update of the EMA. Twin: host copies. Floor: 12 bytes a weight."""
    average = average_of(b, trainer, "ema")
    live = dict(trainer.model.named_parameters())
    host = in_host_memory(live)
    add_average(
        b,
        trainer,
        "EMA update",
        lambda: average.update(False),
        lambda: plain_average(live, host, {}, b.cfg.ema_decay),
    )


def snapshots(b: Bench, trainer: Trainer, name: str) -> None:
    """Timed: one snapshot of SWA, or of SQWA, which quantises it. Twin: host copies.

    Floor: 12 bytes a weight.
    """
    average = average_of(b, trainer, name)
    live = dict(trainer.model.named_parameters())
    host = in_host_memory(live)
    shipped = trainer.plan if name == "sqwa" else None
    add_average(
        b,
        trainer,
        f"{name.upper()} snapshot",
        lambda: average.update(True),
        lambda: plain_average(live, {}, host, b.cfg.ema_decay, shipped),
    )


def add_average(b: Bench, trainer: Trainer, name: str, fast: Callable, plain: Callable) -> None:
    """The row of an average."""
    seconds = b.time(fast, plain)
    floor = b.floor(nbytes=12 * trainer.flat.weights.numel())
    b.add(Measured("training", name, seconds, floor=floor, twin="host copies"))

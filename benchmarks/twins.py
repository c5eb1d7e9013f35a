"""Twins: the plainest code that computes the same as a part of train_gpt.py.

One tensor, one window, one batch at a time. A twin is timed in turn with the fast part and is the
reference for its correctness (tests/test_bench.py).
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train_gpt
from train_gpt import COEFFICIENTS, GPT, Config, Grid, Run, Split, Validation


@torch.no_grad()
def plain_muon(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    momentum: float,
    cfg: Config,
) -> None:
    """One Muon step on each (rows, columns) matrix by itself, in place: K. Jordan 2024."""
    triples = COEFFICIENTS[cfg.muon_coeffs]
    for w, g, m in zip(weights, gradients, momenta, strict=True):
        m.mul_(momentum).add_(g)
        x = (g + momentum * m).to(torch.bfloat16 if w.is_cuda else torch.float32)
        if cfg.muon_row_normalize:
            x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-7)
        if w.shape[0] > w.shape[1]:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for step in range(cfg.muon_backend_steps):
            one, two, three = triples[step % len(triples)]
            a = x @ x.T
            x = one * x + two * a @ x + three * a @ a @ x
        if w.shape[0] > w.shape[1]:
            x = x.T
        scale = max(1, w.shape[0] / w.shape[1]) ** 0.5
        w.mul_(1 - lr * cfg.muon_wd).sub_(lr * scale * x)


@torch.no_grad()
def plain_score(model: GPT, val: Validation, rows: np.ndarray) -> float:
    """Bits per byte, one window at a time.

    rows: start, end and first new target of each window. The logits of all its positions are
    computed, the losses of its new targets kept.
    """
    nats = torch.zeros(val.n, device=val.tokens.device)
    for start, end, first in rows.tolist():
        ids = val.tokens[start:end].long()[None]
        targets = val.tokens[start + 1 : end + 1].long()[None]
        nats[first:end] = model(ids, targets)[0, first - start :]
    return nats.double().sum().item() / math.log(2) / int(val.target_bytes.sum())


@torch.no_grad()
def plain_average(
    live: dict, ema: dict, sums: dict, decay: float, plan: dict | None = None
) -> None:
    """EMA and snapshot sums in host memory: a copy of every tensor after every step.

    ema, sums: empty for the one that is off. plan: sum what would be shipped (SQWA).
    """
    for name, p in live.items():
        w = p.detach().cpu().clone()
        if ema:
            w = ema[name].mul_(decay).add_(w, alpha=1 - decay)
        if sums:
            how = plan[name] if plan else torch.float32
            sums[name] += plain_snap(w, how) if isinstance(how, Grid) else w.to(how)


def squared_error(snapped: Tensor, w: Tensor) -> float:
    """Sum of the squares of what rounding changed."""
    return (snapped - w).square().sum().item()


def plain_snap(w: Tensor, grid: Grid) -> Tensor:
    """(rows, columns) on the export grid, by the formula; of several clips the closest one."""
    lowest_step = 1 / grid.top if grid.floor else torch.finfo(torch.float16).tiny
    lowest_code = -grid.top - 1 if grid.codes == "asym" else -grid.top
    candidates = []
    for quantile in train_gpt.CLIP_QUANTILES[grid.clip]:
        clip = torch.quantile(w.abs().double(), quantile, dim=1, keepdim=True).float()
        step = (clip / grid.top).clamp(min=lowest_step).half().float()
        codes = torch.clamp(torch.round(w / step), lowest_code, grid.top)
        candidates.append(codes * step)

    if len(candidates) == 1:
        return candidates[0]
    errors = [squared_error(snapped, w) for snapped in candidates]
    return candidates[errors.index(min(errors))]


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
    length = cfg.train_seq_len
    rows = cfg.train_batch_tokens // length
    for n in itertools.count():
        tokens = []
        for row in range(rows):
            start = split.tokens * row // rows + n * length
            tokens.append(torch.from_numpy(split.take(start, length + 1)))
        mine = torch.stack(tokens).tensor_split(run.world)[run.rank]
        yield mine[:, :-1].to(run.device), mine[:, 1:].to(run.device)


def plain_reduce(params: list[torch.nn.Parameter], world: int, clip: float) -> Tensor:
    """Mean over the ranks and clip, one .grad tensor per parameter; returns the gradient norm."""
    for p in params:
        if world > 1:
            dist.all_reduce(p.grad)
            p.grad /= world
    return torch.nn.utils.clip_grad_norm_(params, clip or math.inf)

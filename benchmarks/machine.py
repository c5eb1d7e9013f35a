"""This machine: its rates, the floors that they set, and the stop-watch.

In: work to time. Out: rows, each with its seconds and what they are compared with. A floor is FLOPs
over the measured matmul rate plus bytes over the measured speed of a copy with as large a working
set.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.benchmark import timer  # seconds; waits for the GPU first

from planning.machines import CARDS
from train_gpt import Config, Run

ROOT = Path(__file__).resolve().parents[1]


# ── The device ────────────────────────────────────────────────────────────────────────────────────
def device_name() -> str:
    """As reports and captions name it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def nominal() -> float | None:
    """Dense bf16 FLOP/s of the data sheet, by which published MFU figures divide.

    None for a device that is not known here.
    """
    found = re.search("(H[12]00)(?!.*(PCIe|NVL))", device_name())
    return CARDS[found[1].lower()].rate if found else None


def human(value: float, unit: str) -> str:
    """1234567, "B" -> 1.23 MB; tokens and targets in full."""
    if unit.startswith("t"):
        return f"{float(f'{value:.3g}'):,.0f} {unit}"
    power = int(math.log10(max(abs(value), 1)) // 3)
    power = min(max(power, 0), 5)
    prefix = ("", "k", "M", "G", "T", "P")[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}"


# ── Rows ──────────────────────────────────────────────────────────────────────────────────────────
class Floor(NamedTuple):
    """The least seconds that some work can take here, and how they were computed."""

    seconds: float
    how: str


def spread(seconds: np.ndarray) -> float | None:
    """From the 10th to the 90th percentile, as a share of the median; None for a single sample."""
    if len(seconds) == 1:
        return None
    width = np.percentile(seconds, 90) - np.percentile(seconds, 10)
    return float(width / np.median(seconds))


@dataclass
class Measured:
    """One row before it is written.

    seconds: (1, samples), or (2, samples) with those of the twin. rate: (amount per call, unit).
    """

    group: str
    name: str
    seconds: np.ndarray
    floor: Floor | None = None
    rate: tuple[float, str] | None = None
    twin: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return float(np.median(self.seconds[0]))

    def row(self, step: float) -> dict:
        """All figures, to six digits. step: seconds of a training step, which has shares."""
        row = dict(
            group=self.group,
            name=self.name,
            ms=self.median * 1e3,
            spread=spread(self.seconds[0]),
            n=self.seconds.shape[1],
        )
        if self.group == "training":
            row["share"] = self.median / step
        if self.rate:
            amount, unit = self.rate
            row |= dict(rate=amount / self.median, unit=unit)
        if self.floor:
            row |= dict(
                floor_ms=self.floor.seconds * 1e3,
                floor=self.floor.how,
                ratio=self.median / self.floor.seconds,
            )
        if self.twin:
            row |= self.comparison()
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = float(f"{value:.6g}")
        return row | dict(note=self.note)

    def comparison(self) -> dict:
        """The twin's time, and how many times faster ours is, call by call."""
        ours, twins = self.seconds
        speedups = twins / ours
        return dict(
            twin=self.twin,
            twin_ms=float(np.median(twins)) * 1e3,
            twin_spread=spread(twins),
            speedup=np.median(speedups),
            speedup_p10=np.percentile(speedups, 10),
            speedup_p90=np.percentile(speedups, 90),
        )


# ── The stop-watch ────────────────────────────────────────────────────────────────────────────────
def seconds_per_call(work: Callable, calls: int) -> float:
    """One sample."""
    began = timer()
    for _ in range(calls):
        work()
    return (timer() - began) / calls


def calls_of_a_block(seconds: float) -> int:
    """How many calls of so many seconds fill 5 ms."""
    return math.ceil(min(max(0.005 / seconds, 1), 2000))


class Bench:
    """Times work in turns and collects rows."""

    def __init__(self, cfg: Config, run: Run, quick: bool):
        self.cfg = cfg
        self.run = run
        self.quick = quick
        self.rows: list[dict] = []
        # Whether all ranks are at work, or rank 0 alone.
        self.together = True
        self.flop_rate = 0.0
        # (bytes, on the GPU) -> bytes per second.
        self.speeds: dict[tuple[int, bool], float] = {}
        # Seconds of a training step, of which other rows are shares.
        self.step = 0.0
        # Seconds of the first, untimed calls: they compile.
        self.first = 0.0
        # Windows to score: a few batches.
        batches = self.pick(run.cuda, quick=1, gpu=8, cpu=2)
        self.windows = batches * cfg.eval_batch_seqs * run.world

    def pick(self, on_gpu: bool, *, quick: int, gpu: int, cpu: int) -> int:
        """The size of some work: in a quick run, on a GPU, on a CPU."""
        if self.quick:
            return quick
        return gpu if on_gpu else cpu

    def broadcast(self, value):
        """Rank 0's value on all ranks, which then make equally many calls.

        In work of rank 0 alone just the value.
        """
        return self.run.broadcast(value) if self.together else value

    def time(
        self,
        *works: Callable,
        most: int = 20,
        limit: float = 2.0,
        block: bool = True,
        warm: bool = True,
    ) -> np.ndarray:
        """Seconds per call, (works, samples), the works in turn.

        A sample is a block of calls of 5 ms or more (block), after two untimed ones (warm). `most`
        samples, fewer when `limit` seconds a work are over, but 3 (cold: 1).
        """
        if self.quick:
            most = 3
            limit = 0.1
        calls = [1] * len(works)
        if warm:
            self.first = sum(seconds_per_call(work, 1) for work in works)
            spent = [seconds_per_call(work, 1) for work in works]
            if block:
                calls = [self.broadcast(calls_of_a_block(seconds)) for seconds in spent]

        samples = []
        least = 3 if warm else 1
        deadline = timer() + limit * len(works)
        while len(samples) < least or (
            len(samples) < most and self.broadcast(float(timer() < deadline))
        ):
            sample = [seconds_per_call(work, n) for work, n in zip(works, calls, strict=True)]
            samples.append(sample)
        return np.array(samples).T

    def bandwidth(self, nbytes: float, host: bool = False) -> float:
        """Bytes per second, read and written, of a copy whose working set is about this large.

        Measured once per size: a power of two from 64 kB up.
        """
        on_gpu = self.run.cuda and not host
        largest = self.pick(on_gpu, quick=22, gpu=32, cpu=28)
        power = round(math.log2(max(nbytes, 1)))
        # All ranks measure, or none.
        size = self.broadcast(1 << min(max(power, 16), largest))
        if (size, on_gpu) not in self.speeds:
            self.measure_copy(size, on_gpu)
        return self.speeds[size, on_gpu]

    def measure_copy(self, size: int, on_gpu: bool) -> None:
        """Timed: one array copied over another, both together of this size."""
        device = self.run.device if on_gpu else "cpu"
        source = torch.ones(size // 8, device=device)
        target = torch.ones(size // 8, device=device)
        seconds = self.time(lambda: target.copy_(source), limit=0.5)
        self.speeds[size, on_gpu] = size / seconds.min()

        name = f"copy, working set {human(size, 'B')}"
        if self.run.cuda and not on_gpu:
            name += " of the host"
        self.add(Measured("machine", name, seconds, rate=(size, "B/s")))

    def measure_matmul(self) -> None:
        """Timed: a square product in the run's dtype, small enough for a CPU to repeat.

        Its fastest sample is the ceiling of FLOP/s.
        """
        n = self.pick(self.run.cuda, quick=512, gpu=8192, cpu=1024)
        a = torch.randn(n, n, device=self.run.device, dtype=self.run.dtype)
        b = torch.randn(n, n, device=self.run.device, dtype=self.run.dtype)
        seconds = self.time(lambda: a @ b, limit=3)
        self.flop_rate = 2 * n**3 / seconds.min()
        name = f"matmul {n} x {n} x {n}, {self.run.dtype}"
        self.add(Measured("machine", name, seconds, rate=(2 * n**3, "FLOP/s")))

    def floor(
        self, flops: float = 0, nbytes: float = 0, working_set: float = 0, host: bool = False
    ) -> Floor:
        """FLOPs at the matmul rate, then bytes at the speed of a copy.

        working_set: of that copy; default: all the bytes. host: it is in the host's memory.
        """
        seconds = flops / self.flop_rate
        parts = []
        if flops:
            parts.append(f"{human(flops, 'FLOP')} at {human(self.flop_rate, 'FLOP/s')}")
        if nbytes:
            speed = self.bandwidth(working_set or nbytes, host)
            seconds += nbytes / speed
            parts.append(f"{human(nbytes, 'B')} at {human(speed, 'B/s')}")
        return Floor(seconds, " + ".join(parts))

    def add(self, measured: Measured) -> None:
        """Append a row; the first one of training is the whole step."""
        if measured.group == "training" and not self.step:
            self.step = measured.median
        self.rows.append(measured.row(self.step))

"""What a run may be planned for: cards by their data sheets, and the CPU that is here."""

import time
from functools import cache
from typing import NamedTuple

import torch

# The share of the data sheet's rate that training comes to. One for all cards: that of #1855's
# 4,945 steps in 599.6 s on 8 H100 (seed 42), to two digits. docs/plan.md says how far others are
# off
MFU = 0.30
# Of this CPU's own rate: logs/bench/demo.json
CPU_MFU = 0.17
# The part of that which scoring comes to: windows, as in #1394's 84.0 s; test-time training, with
# little to do at a time, as in #1413's 293.4 s (sgd) and #1855's 508.8 s (lora)
WINDOWS_SHARE = 0.82
TTT_SHARE = {"none": WINDOWS_SHARE, "sgd": 0.30, "lora": 0.42}

CPU = "cpu"


class Machine(NamedTuple):
    """One GPU; or all the cores of a CPU, however many ranks share them."""

    name: str
    # dense bf16 with sums in fp32, FLOP/s
    rate: float
    # bytes; 0: not known
    memory: float


# By NVIDIA's data sheets: H100 SXM, H200 SXM, A100 80GB SXM, GeForce RTX 4090
CARDS = {
    "h100": Machine("h100", 989e12, 80e9),
    "h200": Machine("h200", 989e12, 141e9),
    "a100": Machine("a100", 312e12, 80e9),
    "4090": Machine("4090", 165.2e12, 24e9),
}
MACHINES = (*CARDS, CPU)


def usual_mfu(name: str) -> float:
    return CPU_MFU if name == CPU else MFU


def machine(name: str) -> Machine:
    """A card, or this CPU, whose rate is measured."""
    if name == CPU:
        return Machine(CPU, matmul_rate(), 0.0)
    return CARDS[name]


@cache
def matmul_rate() -> float:
    """FLOP/s of this CPU, now: the fastest of five products of fp32 matrices, 512 x 512."""
    n = 512
    a = torch.ones(n, n)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds[1:])

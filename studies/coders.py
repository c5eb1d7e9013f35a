"""Bytes of trained weights with each compressor, against what entropy says.

    python studies/coders.py CHECKPOINT...

Each checkpoint's shipped weights (the EMA, where there is one) are put on the sigma grid: 6 bits,
k = 12, all matrices of more than 4,096 weights, the rest fp16. Then the whole file is packed.
"brotli, plain" is brotli 11 of the safetensors as they are, as the records pack theirs.
"""

import statistics
import sys
import time
from pathlib import Path

import brotli
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_gpt import Grid, encode_container, read_container, serialise

GRID = Grid(6, "sigma", sigmas=12.0)
LARGE = 4096  # weights
HEADER = ("checkpoint", "codes", "bits", "bound", "order-0", "zstd", "lzma", "brotli, plain")


def parts_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an artifact of these weights."""
    _, tensors = read_container(path)
    state = {name[5:]: w for name, w in tensors.items() if name.startswith("live/")}
    state |= {name[4:]: w for name, w in tensors.items() if name.startswith("ema/")}
    parts = {}
    for name, w in state.items():
        if w.ndim == 2 and w.numel() > LARGE:
            parts[name + ":codes"], parts[name + ":scale"] = GRID.quantise(w)
        else:
            parts[name] = w.half()
    return parts


def order0_bits(codes: np.ndarray) -> float:
    """Entropy of a code, all of them in one histogram."""
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(share * np.log2(share)).sum())


def normal_bits() -> float:
    """Entropy of a code of normal weights on this grid."""
    step = GRID.sigmas / GRID.top
    edges = [(code - 0.5) * step for code in range(-GRID.top + 1, GRID.top + 1)]
    shares = np.diff([0.0, *map(statistics.NormalDist().cdf, edges), 1.0])
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def row(path: Path) -> list[str]:
    parts = parts_of(path)
    codes = [part.numpy().ravel() for name, part in parts.items() if name.endswith(":codes")]
    codes = np.concatenate(codes)
    bits = order0_bits(codes)
    plain = len(brotli.compress(b"".join(map(bytes, serialise(parts, {}))), quality=11, lgwin=24))
    sizes = {name: len(encode_container(parts, {}, name)) for name in ("zstd", "lzma")}
    ours = {}
    seconds = {}
    for name in ("brotli", "ans"):
        start = time.process_time()
        ours[name] = len(encode_container(parts, {}, name))
        seconds[name] = time.process_time() - start
    return [
        path.parent.name,
        f"{codes.size:,}",
        f"{bits:.3f}",
        f"{normal_bits() * codes.size / 8:,.0f}",
        f"{bits * codes.size / 8:,.0f}",
        *(f"{size:,}" for size in (*sizes.values(), plain)),
        *(f"{size:,} ({100 * (size / plain - 1):+.2f} %)" for size in ours.values()),
        f"{100 * (ours['ans'] / ours['brotli'] - 1):+.2f} %",
        " / ".join(f"{second:.1f}" for second in seconds.values()),
    ]


def main() -> None:
    header = [*HEADER, "brotli", "ans", "ans against brotli", "CPU s: brotli / ans"]
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---" for _ in header) + " |")
    for path in sys.argv[1:]:
        print("| " + " | ".join(row(Path(path))) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Bytes of trained weights with each compressor, against what entropy says, and what parts of the
ANS coder are worth.

    python studies/coders.py CHECKPOINT...

Each checkpoint's shipped weights (the EMA, where there is one) are put on the sigma grid: 6 bits,
all matrices of more than 4,096 weights, the rest fp16. Then the whole file is packed. "brotli,
plain" is brotli 11 of the safetensors as they are, as the records pack theirs. Writes
logs/bench/coders.json, of which tests/pages.py makes tables.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from unittest import mock

import brotli
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt
from train_gpt import (
    HEADER,
    CodeModel,
    Config,
    Grid,
    Lines,
    Run,
    ans_decode,
    ans_encode,
    deserialise,
    device_name,
    encode_container,
    forecast_size,
    order0_bits,
    part_name,
    quantised,
    serialise,
)

ROOT = Path(__file__).parents[1]
K = 12.0
OTHER_K = (10.0, 12.85, 15.0)  # of the last checkpoint, as what is left out
LARGE = 4096  # weights
SYNTHETIC = (70144, 512)  # about the codes of a record


def grid(k: float) -> Grid:
    return Grid(6, "sigma", sigmas=k)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """The shipped weights of a checkpoint, of whatever version its header is."""
    _, tensors = deserialise(path.read_bytes()[HEADER.size :])
    state = {name[5:]: w for name, w in tensors.items() if name.startswith("live/")}
    return state | {name[4:]: w for name, w in tensors.items() if name.startswith("ema/")}


def label(state: dict[str, torch.Tensor]) -> str:
    """Layers x width, and whether there is a bigram table."""
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    bigram = ", bigram" if "bigram.embed" in state else ""
    return f"{len(layers)} x {state['tok_emb'].shape[1]}{bigram}"


def plan_of(state: dict[str, torch.Tensor], k: float) -> dict:
    large = {name for name, w in state.items() if w.ndim == 2 and w.numel() > LARGE}
    return {name: grid(k) if name in large else torch.float16 for name in state}


def tensors_of(state: dict[str, torch.Tensor], k: float) -> dict[str, torch.Tensor]:
    """The tensors of an artifact of these weights."""
    parts = quantised(Config(), state, plan_of(state, k))
    return {part_name(name, part): t for name in parts for part, t in parts[name].items()}


def codes_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for name, t in tensors.items() if name.endswith(":codes")])


def sizes(state: dict[str, torch.Tensor], k: float, compressors) -> dict:
    """One row: what entropy says, and bytes and CPU seconds of each compressor."""
    tensors = tensors_of(state, k)
    codes = codes_of(tensors)
    shapes = {name: w.shape for name, w in state.items()}
    forecast = forecast_size(Config(), plan_of(state, k), shapes)
    row = dict(
        checkpoint=label(state),
        k=k,
        codes=len(codes),
        bits=order0_bits(codes),
        bound=forecast.entropy,
        rest=forecast.rest,
        bytes={},
        seconds={},
    )
    for name in compressors:
        start = time.process_time()
        if name == "brotli, plain":
            raw = b"".join(map(bytes, serialise(tensors, {})))
            size = len(brotli.compress(raw, quality=11, lgwin=24))
        else:
            size = len(encode_container(tensors, {}, name))
        row["bytes"][name] = size
        row["seconds"][name] = time.process_time() - start
    return row


class StillLines(Lines):
    """Lines that are all as wide as their matrix."""

    def __init__(self, lines: Lines, widths: np.ndarray):
        self.starts = lines.starts
        self.widths = widths

    def fine(self) -> np.ndarray:
        return self.widths

    def learn(self, line: np.ndarray, codes: np.ndarray) -> None:
        pass


class WithoutRows(CodeModel):
    axis = 0

    def __init__(self, facts: dict):
        super().__init__(facts)
        lengths = (self.rows, self.columns)[self.axis]
        widths = np.repeat(self.fine, lengths)
        self.lines[self.axis] = StillLines(self.lines[self.axis], widths)


class WithoutColumns(WithoutRows):
    axis = 1


class WithoutCounts(CodeModel):
    """Normal distributions, whatever is seen."""

    def frequency(self) -> np.ndarray:
        self.counts = train_gpt.expected_counts(self.lowest, self.facts["symbols"][1])
        return super().frequency()


LEFT_OUT = {
    "the spread of rows": ("CodeModel", WithoutRows),
    "the spread of columns": ("CodeModel", WithoutColumns),
    "counts of what was seen": ("CodeModel", WithoutCounts),
    "brotli for alike rows": ("alike_rows", lambda codes: False),
}


def left_out(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of the whole file by what `ans` does without."""
    tensors = tensors_of(state, K)
    found = {"": len(encode_container(tensors, {}, "ans"))}
    for name, (part, other) in LEFT_OUT.items():
        patch = contextlib.nullcontext()
        if hasattr(train_gpt, part):
            patch = mock.patch.object(train_gpt, part, other)
        with patch:
            found[name] = len(encode_container(tensors, {}, "ans"))
    return found


def synthetic() -> dict:
    """Normal codes, whose columns are spread by a lognormal of 0.18: seconds of one core."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(SYNTHETIC, generator=generator)
    w *= torch.exp(0.18 * torch.randn(SYNTHETIC[1], generator=generator))
    codes, _ = grid(12.85).quantise(w)
    start = time.process_time()
    parts = ans_encode({"w:codes": codes})
    middle = time.process_time()
    back = ans_decode(parts)
    end = time.process_time()
    assert torch.equal(back["w:codes"], codes)
    return dict(
        codes=codes.numel(),
        bytes=parts[":stream"].nbytes,
        order0=order0_bits(codes) * codes.numel() / 8,
        encode_seconds=middle - start,
        decode_seconds=end - middle,
    )


def table(report: dict) -> list[list[str]]:
    """The rows, of bytes, for a page."""
    rows = []
    for row in report["rows"]:
        size = row["bytes"]
        plain = size["brotli, plain"]
        ours = [f"{size[name]:,} ({100 * (size[name] / plain - 1):+.2f} %)" for name in OURS]
        cells = [row["checkpoint"], f"{row['codes']:,}", f"{row['bits']:.3f}"]
        cells += [f"{row['bound']:,.0f}", f"{row['bits'] * row['codes'] / 8:,.0f}"]
        cells += [f"{size[name]:,}" for name in ("zstd", "lzma", "brotli, plain")] + ours
        cells += [f"{100 * (size['ans'] / size['brotli'] - 1):+.2f} %"]
        rows.append([*cells, " / ".join(f"{row['seconds'][name]:.1f}" for name in OURS)])
    return rows


OURS = ("brotli", "ans")
ALL = ("zlib", "zstd", "lzma", "brotli, plain", *OURS)
HEADER_OF_TABLE = [
    *("checkpoint", "codes", "bits", "bound", "order-0", "zstd", "lzma", "brotli, plain"),
    *(*OURS, "ans against brotli", "CPU s: brotli / ans"),
]


def over_entropy(row: dict, compressor: str) -> float:
    """What this compressor takes of a byte that the normal bound says of the codes."""
    return (row["bytes"][compressor] - row["rest"]) / row["bound"]


def main() -> None:
    states = [state_of(Path(path)) for path in sys.argv[1:]]
    report = dict(device=device_name(Run(Config())), rows=[], other_k=[])
    report["left_out"] = dict(checkpoint=label(states[-1]), bytes=left_out(states[-1]))
    print(report["left_out"], flush=True)
    for state in states:
        row = sizes(state, K, ALL)
        report["rows"].append(row)
        factors = {name: round(over_entropy(row, name), 4) for name in ALL}
        print(row["checkpoint"], row["bytes"], factors, flush=True)
    for k in OTHER_K:
        report["other_k"].append(sizes(states[-1], k, OURS))
    report["synthetic"] = synthetic()
    print(report["other_k"], report["synthetic"])
    path = ROOT / "logs" / "bench" / "coders.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One-pass banded scoring against sliding windows: is running each token once worth it?

    python studies/banded_scoring.py logs/bench/banded_scoring.json --data data/text

Sliding windows of L tokens with stride 64 run each token L / 64 times. In a band every layer
attends to exactly the previous L - 1 tokens of one long row, so each token is run about once. Two
models per seed, alike but for the training: one as usual in rows of L, one in rows of 4 L with the
band. Each is scored on the same targets with fixed windows, sliding windows, and the band (rows of
8 L, of which the first L only give context), also with the first 4 tokens of the row kept in sight
of all.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from ablation.statistics import paired
from train_gpt import Config, Run, Split, Trainer, Validation

L = 256
ROW = 2048
SIZE = dict(
    model_dim=96,
    num_heads=4,
    num_kv_heads=2,
    train_batch_tokens=2048,
    max_wallclock_seconds=0.0,
    warmup_steps=1,
    val_loss_every=0,
    muon_momentum=0.95,
    muon_momentum_warmup_steps=100,
    warmdown_frac=0.5,
    train_log_every=100,
    # How long the rotary table is.
    eval_seq_len=ROW,
)


class Mode(NamedTuple):
    """A way to score. stride: new targets per row, 0: all; band 0: causal; kept: first tokens."""

    row: int
    stride: int
    band: int
    kept: int


SLIDING = "sliding, stride 64"
MODES = {
    "fixed": Mode(L, 0, 0, 0),
    SLIDING: Mode(L, 64, 0, 0),
    "banded": Mode(ROW, ROW - L, L, 0),
    "banded, 4 kept": Mode(ROW, ROW - L, L, 4),
}


class BandedAttention:
    """train_gpt.sdpa, but each query sees itself, the previous band - 1 keys and the first `kept`.

    Band 0: all before it.
    """

    band = 0
    kept = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: None = None) -> Tensor:
        n = q.shape[1]
        if self.band == 0 or n <= self.band:
            return train_gpt.sdpa(q, k, v)
        positions = torch.arange(n)
        age = positions[:, None] - positions
        mask = (age >= 0) & ((age < self.band) | (positions < self.kept))
        # (batch, heads, time, head_dim)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)


def scores(cfg: Config, run: Run, val: Validation, banded: bool) -> dict[str, dict]:
    """Train one model and score it in every mode: {mode: {bpb, seconds}}."""
    attend = BandedAttention()
    model = train_gpt.build_model(cfg, run, attend)
    trainer = Trainer(cfg, run, model, train_gpt.export_plan(cfg, model), Split(cfg, "train"), val)
    attend.band = L if banded else 0
    trainer.train()

    training = "banded" if banded else "usual"
    found = {}
    for name, mode in MODES.items():
        attend.band = mode.band
        attend.kept = mode.kept
        how = dataclasses.replace(
            cfg,
            eval_seq_len=mode.row,
            eval_stride=mode.stride or 64,
            eval_batch_seqs=32 * L // mode.row,
        )
        rows = train_gpt.windows(0, val.n, mode.row, mode.stride)
        began = time.perf_counter()
        score = train_gpt.score(how, run, model, val, rows)
        seconds = time.perf_counter() - began
        found[name] = dict(bpb=score.bpb, seconds=seconds)
        run.log(
            f"{training} training, seed {cfg.seed}, {name}: {score.bpb:.5f} BPB, {seconds:.1f} s"
        )
    return found


def gap_cell(runs: dict[str, dict], mode: str) -> str:
    """A mode less sliding windows in mBPB: mean and 95 % interval over paired seeds."""
    if mode == SLIDING:
        return "0"
    base = {int(seed): run[SLIDING]["bpb"] for seed, run in runs.items()}
    values = {int(seed): run[mode]["bpb"] for seed, run in runs.items()}
    gap = paired(base, values)
    return f"{1e3 * gap.mean:+.2f} ({1e3 * gap.low:+.2f} to {1e3 * gap.high:+.2f})"


def table(report: dict) -> str:
    """GitHub Markdown: each mode against sliding windows, and its seconds."""
    lines = [
        "| training | scoring | BPB | mBPB against sliding | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for training, runs in report["runs"].items():
        for mode in MODES:
            bpb = sum(run[mode]["bpb"] for run in runs.values()) / len(runs)
            seconds = sum(run[mode]["seconds"] for run in runs.values()) / len(runs)
            gap = gap_cell(runs, mode)
            lines.append(f"| {training} | {mode} | {bpb:.4f} | {gap} | {seconds:.1f} |")
    return "\n".join(lines)


def train_and_score_all(wanted: list[int], settings: dict) -> tuple[dict, dict]:
    """Both trainings of every seed: {training: {seed: scores}}, and the environment."""
    runs: dict = {"usual": {}, "banded": {}}
    for seed in wanted:
        for training, length in (("usual", L), ("banded", 4 * L)):
            cfg = Config(
                **SIZE,
                **settings,
                seed=seed,
                train_seq_len=length,
                run_id=f"{training}{seed}",
            )
            run = Run(cfg)
            val = Validation(cfg, run, Split(cfg, "val"))
            runs[training][seed] = scores(cfg, run, val, training == "banded")
    return runs, train_gpt.environment(run)


def main(
    out: Path,
    data: Annotated[Path, typer.Option(exists=True)] = Path("data/demo"),
    seeds: str = "1,2,3",
    steps: int = 250,
    targets: int = 65536,
) -> None:
    """Train and score both models for every seed; write the JSON and print the table."""
    torch.set_num_threads(1)
    wanted = [int(seed) for seed in seeds.split(",")]
    with tempfile.TemporaryDirectory() as logs:
        settings = dict(
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            iterations=steps,
            val_max_tokens=targets,
            logs_dir=logs,
        )
        runs, environment = train_and_score_all(wanted, settings)
    report = dict(
        date=time.strftime("%Y-%m-%d"),
        command=f"python studies/banded_scoring.py {out} --data {data} --seeds {seeds} "
        f"--steps {steps} --targets {targets}",
        window=L,
        row=ROW,
        steps=steps,
        targets=targets,
        runs=runs,
        code_sha256=train_gpt.CODE_SHA256,
        environment=environment,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    typer.run(main)

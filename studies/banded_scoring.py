"""One-pass banded scoring against sliding windows: is running each token once worth it?

    python studies/banded_scoring.py logs/bench/banded_scoring.json --data data/text

Sliding windows of L tokens with stride 64 run each token L / 64 times. In a band every layer attends to exactly the previous
L - 1 tokens of one long row, so each token is run about once. Two models per seed, alike but for the training: one as usual in
rows of L, one in rows of 4 L with the band. Each is scored on the same targets with fixed windows, sliding windows, and the band
(rows of 8 L, of which the first L only give context), also with the first 4 tokens of the row kept in sight of all.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from ablation.statistics import paired
from train_gpt import Config, Run, Split, Trainer, Validation

L, ROW = 256, 2048
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
    eval_seq_len=ROW,
)  # EVAL_SEQ_LEN: how long the rotary table is
MODES = {  # name: (row, new targets per row, band, kept first tokens)
    "fixed": (L, 0, 0, 0),
    "sliding, stride 64": (L, 64, 0, 0),
    "banded": (ROW, ROW - L, L, 0),
    "banded, 4 kept": (ROW, ROW - L, L, 4),
}


class BandedAttention:
    """train_gpt.sdpa, but each query sees itself, the previous band - 1 keys and the first `kept`; band 0: all before it."""

    band, kept = 0, 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[1]
        if self.band == 0 or n <= self.band:
            return train_gpt.sdpa(q, k, v)
        age = torch.arange(n)[:, None] - torch.arange(n)
        mask = (age >= 0) & ((age < self.band) | (torch.arange(n) < self.kept))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(
            1, 2
        )


def scores(cfg: Config, run: Run, val: Validation, banded: bool) -> dict[str, dict]:
    """Train one model and score it in every mode: {mode: {bpb, seconds}}."""
    attend = BandedAttention()
    model = train_gpt.build_model(cfg, run, attend)
    trainer = Trainer(cfg, run, model, train_gpt.export_plan(cfg, model), Split(cfg, "train"), val)
    attend.band = L if banded else 0
    trainer.train()
    found = {}
    for mode, (row, stride, attend.band, attend.kept) in MODES.items():
        how = dataclasses.replace(
            cfg, eval_seq_len=row, eval_stride=stride or 64, eval_batch_seqs=32 * L // row
        )
        score = train_gpt.score(how, run, model, val, train_gpt.windows(0, val.n, row, stride))
        found[mode] = dict(bpb=score.bpb, seconds=score.seconds)
        run.log(
            f"{'banded' if banded else 'usual'} training, seed {cfg.seed}, {mode}: {score.bpb:.5f} BPB, {score.seconds:.1f} s"
        )
    return found


def table(report: dict) -> str:
    """GitHub Markdown: each mode less sliding windows in mBPB, mean and 95 % interval over paired seeds, and its seconds."""
    lines = [
        "| training | scoring | BPB | mBPB against sliding | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for training, runs in report["runs"].items():
        for mode in MODES:
            base, values = (
                {int(seed): r[m]["bpb"] for seed, r in runs.items()}
                for m in ("sliding, stride 64", mode)
            )
            gap = paired(base, values) if mode != "sliding, stride 64" else None
            words = (
                f"{1e3 * gap.mean:+.2f} ({1e3 * gap.low:+.2f} to {1e3 * gap.high:+.2f})"
                if gap
                else "0"
            )
            bpb, seconds = (
                sum(r[mode][key] for r in runs.values()) / len(runs) for key in ("bpb", "seconds")
            )
            lines.append(f"| {training} | {mode} | {bpb:.4f} | {words} | {seconds:.1f} |")
    return "\n".join(lines)


def main(
    out: Path,
    data: Annotated[Path, typer.Option(exists=True)] = Path("data/demo"),
    seeds: str = "1,2,3",
    steps: int = 250,
    targets: int = 65536,
) -> None:
    """Train and score both models for every seed; write the JSON and print the table."""
    torch.set_num_threads(1)
    runs: dict = {"usual": {}, "banded": {}}
    with tempfile.TemporaryDirectory() as logs:
        for seed in map(int, seeds.split(",")):
            for training, length in (("usual", L), ("banded", 4 * L)):
                cfg = Config(
                    **SIZE,
                    data_path=str(data),
                    tokenizer_path=str(data / "tokenizer.model"),
                    seed=seed,
                    iterations=steps,
                    train_seq_len=length,
                    val_max_tokens=targets,
                    logs_dir=logs,
                    run_id=f"{training}{seed}",
                )
                run = Run(cfg)
                runs[training][seed] = scores(
                    cfg, run, Validation(cfg, run, Split(cfg, "val")), training == "banded"
                )
        environment = train_gpt.environment(run)
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

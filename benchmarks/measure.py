"""All stages in order. In: a configuration. Out: the report of `bench.py run`."""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import train_gpt
from benchmarks.after_training import exporting, preparation, scoring
from benchmarks.machine import Bench
from benchmarks.report import origin
from benchmarks.training import (
    checkpointing,
    model_techniques,
    optimisation,
    start_up,
    techniques,
    training_step,
)
from planning.flops import forward_flops
from train_gpt import GPT, Config, Run, Trainer

GROUPS = ("machine", "start-up", "training", "scoring", "export", "data")
ON_ALL_RANKS = (
    training_step,
    optimisation,
    checkpointing,
    model_techniques,
    techniques,
    scoring,
)
# What one process does while the others wait.
ON_RANK_0 = (exporting, preparation)


def measure(cfg: Config, quick: bool) -> dict:
    """Everything, on all ranks; the report is rank 0's. Leaves nothing in LOGS_DIR."""
    folder = scratch_folder()
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
        if os.environ.get("RANK", "0") == "0":
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mine = dataclasses.replace(cfg, logs_dir=str(folder), run_id="bench")
        run = Run(mine)
        b = Bench(mine, run, quick)
        targets = min(b.windows * mine.window, mine.val_max_tokens or math.inf)
        b.cfg = dataclasses.replace(mine, val_max_tokens=targets)

        b.measure_matmul()
        # The largest copy: the speed of memory itself.
        b.bandwidth(2**40)
        trainer = start_up(b)
        run_stages(b, trainer)
        run.broadcast(None)
    rows = sorted(b.rows, key=lambda row: GROUPS.index(row["group"]))
    return facts(cfg, run, quick) | dict(rows=rows)


def scratch_folder() -> Path:
    """The same for all ranks of a launch: they must see one folder."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    return Path(tempfile.gettempdir()) / f"bench-{launch}"


def run_stages(b: Bench, trainer: Trainer) -> None:
    """Every stage, on the weights that the start-up left."""
    weights = trainer.flat.weights.clone()
    for stage in ON_ALL_RANKS:
        b.run.log(f"{stage.__name__.replace('_', ' ')} ...")
        stage(b, trainer)
        trainer.flat.weights.copy_(weights)

    b.together = False
    if b.run.rank == 0:
        for stage in ON_RANK_0:
            b.run.log(f"{stage.__name__} ...")
            stage(b, trainer)


def setting(value) -> str:
    """The value of a setting as it stands in the environment."""
    return str(int(value) if isinstance(value, bool) else value)


def facts(cfg: Config, run: Run, quick: bool) -> dict:
    """What the figures depend on: code, settings, hardware, versions, the model's size."""
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(cfg).parameters())
    model = dict(
        params=params,
        layers=cfg.num_layers,
        dim=cfg.model_dim,
        seq_len=cfg.train_seq_len,
        vocab=cfg.vocab_size,
        tokens_per_step=cfg.train_batch_tokens,
        flops_per_token=forward_flops(cfg)._asdict(),
    )
    own = dict(
        quick=quick,
        settings={name: setting(value) for name, value in sorted(cfg.non_default().items())},
        config_sha256=cfg.digest(),
        world_size=run.world,
        load_average=os.getloadavg()[0],
        model=model,
    )
    return origin() | train_gpt.environment(run) | own

"""What a checkpoint costs the steps beside it, and what a rank reads for a step.

    python -m benchmarks.pauses

Settings come from the environment, as train_gpt.py takes them; without any the model has the
reference size. Weights are as initialised, tokens are random.
"""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import train_gpt
from train_gpt import Config, Run, Split, Trainer

STEP_SECONDS = 5e-3
STEPS_READ = 20
SHARDS = 8
SHARD_TOKENS = 2_000_000
RANKS = 8


def write_tokens(cfg: Config) -> None:
    """Shards of random tokens in DATA_PATH."""
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, SHARD_TOKENS
    draw = np.random.default_rng(0)
    for shard in range(SHARDS):
        tokens = draw.integers(cfg.vocab_size, size=SHARD_TOKENS, dtype="<u2")
        path = Path(cfg.data_path) / f"fineweb_train_{shard:06d}.bin"
        path.write_bytes(header.tobytes() + tokens.tobytes())


def cheap_step(tensor: Tensor) -> None:
    """Small operations of torch, one after the other, for STEP_SECONDS."""
    end = time.perf_counter() + STEP_SECONDS
    while time.perf_counter() < end:
        tensor.mul_(1.0)


def longest_step(done: Callable[[], bool]) -> float:
    """Seconds of the longest of the cheap steps that are made until then."""
    tensor = torch.ones(1000)
    longest = 0.0
    while not done():
        began = time.perf_counter()
        cheap_step(tensor)
        longest = max(longest, time.perf_counter() - began)
    return longest


def checkpoint_line(trainer: Trainer) -> str:
    """Timed: save() itself, the steps beside its writing, and as long a stretch of steps alone."""
    began = time.perf_counter()
    trainer.save(wait=False)
    saved = time.perf_counter()
    beside = longest_step(trainer.writing.done)
    written = time.perf_counter()
    trainer.writing.result()

    end = 2 * written - saved
    alone = longest_step(lambda: time.perf_counter() >= end)
    size = (trainer.run.dir / train_gpt.CHECKPOINTS[0]).stat().st_size
    return (
        f"checkpoint of {size / 1e6:.0f} MB: save() {saved - began:.3f} s, written in "
        f"{written - saved:.2f} s; longest step beside it {1e3 * beside:.0f} ms, "
        f"alone {1e3 * alone:.0f} ms"
    )


def reading_line(cfg: Config, run: Run, split: Split) -> str:
    """Timed: the CPU of one of RANKS ranks for the rows of a step, as LOADER takes them."""
    rank = SimpleNamespace(world=RANKS, rank=0, cuda=False, device=run.device)
    loader = train_gpt.Loader(cfg, rank, split)
    loader.next(cfg.train_seq_len)
    began = time.process_time()
    for _ in range(STEPS_READ):
        loader.next(cfg.train_seq_len)
    milliseconds = 1e3 * (time.process_time() - began) / STEPS_READ
    loader.close()
    return f"LOADER={cfg.loader}: {milliseconds:.2f} ms of CPU a step for one of {RANKS} ranks"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config.from_env(os.environ)
        cfg = dataclasses.replace(cfg, data_path=folder, logs_dir=f"{folder}/logs")
        write_tokens(cfg)
        run = Run(cfg)
        split = Split(cfg, "train")
        for loader in train_gpt.LOADERS:
            print(reading_line(dataclasses.replace(cfg, loader=loader, doc_mask=True), run, split))

        model = train_gpt.build_model(cfg, run, train_gpt.sdpa)
        plan = train_gpt.export_plan(cfg, model)
        val = SimpleNamespace(target_bytes=torch.ones(1), n=1)
        trainer = Trainer(cfg, run, model, plan, split, val)
        trainer.save()  # as the first one of a run: later ones find their memory
        print(checkpoint_line(trainer))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shared ground of the tests: a tiny configuration, small real-text data, several ranks."""

import gc
import math
import os
import sys
import time
from pathlib import Path

# The suite pins fp32 numbers, and its tests run side by side. Both are read when torch is imported.
if os.environ.get("GOLF_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch
from roles import exact  # noqa: F401

import train_gpt

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)

# Nine pairs of repeats for the cost of each toggle would be a fifth of a tiny run
PAIRS_OF_A_RUN = train_gpt.COST_PAIRS
train_gpt.COST_PAIRS = 1

# Which kernels compute: the same in every process of a test. (Another choice is another rounding.)
KERNELS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
INHERITED = ("PATH", "HOME", "TMPDIR", *KERNELS)

# No example of hypothesis is slow or fast by itself: the machine may be busy.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


# ── Time. No test is about seconds: limits only end what hangs ────────────────────────────────────
# On a slow machine a run would say more; who tests that gives it a limit
QUIET_SECONDS_OF_A_RUN = train_gpt.QUIET_SECONDS
train_gpt.QUIET_SECONDS = math.inf

HANG = 600.0  # seconds for what takes a few: only a deadlock takes more (TCP gives up after 924)


def until(happened, story=str) -> None:
    """Waits for what always comes; fails, with the story, where something hangs."""
    end = time.monotonic() + HANG
    while not happened():
        if time.monotonic() > end:
            pytest.fail(f"hangs: waited {HANG:.0f} s\n{story()}")
        time.sleep(0.05)


def slowdown() -> float:
    """Seconds that one second of computing takes at this moment:
    1 on a quiet machine, more on a busy one.
    """
    wall = time.perf_counter()
    used = time.thread_time()
    while time.thread_time() - used < 0.1:
        pass
    return max((time.perf_counter() - wall) / 0.1, 1.0)


# What a clock says of a toggle in result.json
TIMED = (
    "cost_ms",
    "cost_interval",
    "cost_seconds",
    "steps_lost",
    "step_ms_without",
    "step_ms_with",
)

TINY = dict(
    vocab_size=384,
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    train_seq_len=64,
    train_batch_tokens=512,
    keep_float_max_numel=512,
    iterations=6,
    max_wallclock_seconds=0.0,
    warmup_steps=1,
    warmdown_iters=4,
    train_log_every=2,
    val_loss_every=0,
    eval_stride=16,
    val_max_tokens=1500,
    compress_level=1,
    muon_momentum_warmup_steps=10,
)


def write_shard(path: Path, tokens) -> None:
    """Writes a shard of the challenge's format."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, by numpy alone."""
    return np.fromfile(path, "<u2", offset=1024)


def make_data(folder: Path, pieces: int) -> None:
    """Writes a tokenizer, one training and one validation shard, from Python's help topics."""
    from pydoc_data.topics import topics

    documents = [" ".join(text.split()) for _, text in sorted(topics.items())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=pieces,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        character_coverage=0.999,
        add_dummy_prefix=False,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        max_sentence_length=200_000,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [[1, *sp.encode(text)] for text in documents]
    write_shard(folder / "fineweb_train_000000.bin", np.concatenate(encoded[8:60]))
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(encoded[:8]))


@pytest.fixture(scope="session")
def data(tmp_path_factory, worker_id) -> Path:
    """A folder of data with 384 pieces."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, 384)
    return folder


LONGEST = [
    "hosts",
    "ablate",
    "faults",
    "pipeline",
    "record_1855",
    "slurm",
    "export",
    "readme",
    "resume",
    "pins",
    "submission",
    "hostile",
    "strangers",
    "golden",
    "run_page",
    "page",
    "pack",
    "report",
    "prepare_data",
    "proof",
    "frontier_model",
    "lora",
    "bench",
    "stages",
    "average",
    "peers",
    "config",
    "data",
    "caseops",
    "needs",
    "launch",
    "size",
    "lqer",
    "views",
    "gptq",
    "gpu",
    "dependencies",
    "progress",
    "sensitivity",
    "sample",
    "plan",
    "conditions",
    "figures",
    "claims",
    "ledger",
]


def pytest_collection_modifyitems(items: list) -> None:
    """Files that take long begin first, so that no worker is left alone with one at the end."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no search for garbage looks at it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def worker_id(request) -> str:
    """pytest-xdist's worker name; "master" without it."""
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture
def tiny(data, tmp_path):
    """tiny(**knobs) -> a Config that trains in well under a second, logging below tmp_path."""

    def make(**knobs) -> train_gpt.Config:
        paths = dict(
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            logs_dir=str(tmp_path / "logs"),
        )
        return train_gpt.Config(**{**TINY, **paths, "run_id": f"r{next(COUNTER)}", **knobs})

    return make


COUNTER = iter(range(10**9))


@pytest.fixture
def run(tiny):
    """A Run of the tiny configuration."""
    return train_gpt.Run(tiny())


def environment(cfg: train_gpt.Config) -> dict[str, str]:
    """The environment variables that give this configuration, on top of what a test inherits."""
    knobs = {
        f.name.upper(): str(int(v) if isinstance(v := getattr(cfg, f.name), bool) else v)
        for f in train_gpt.KNOBS
    }
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return inherited | {"CUDA_VISIBLE_DEVICES": ""} | knobs

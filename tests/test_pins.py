"""What training, artifacts and scores give today, to the last bit: tests/golden/pins.json.

On the machine that wrote the file (its CPU, kernels, versions, threads) every number must be the
same one; elsewhere it may differ by what another order of additions does, as stated at each
comparison.

    python tests/test_pins.py --write

renews the file. A commit that does so says which numbers were meant to change, and why.

Would have caught: refactors that change the numerics (#769's "off" that is not the baseline), an
order of parameters or of random draws that moved, a container that gained a byte.
"""

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import write_shard
from launch import finish

from train_gpt import GPT, Config, encode_artifact, export_plan, main, quantised, read_artifact

FILE = Path(__file__).parent / "golden" / "pins.json"
WRITE = os.environ.get("WRITE_PINS") == "1"


# ── The file ──────────────────────────────────────────────────────────────────────────────────────
def arithmetic() -> str:
    """Hash of products, sums and functions: it shows which kernels the libraries choose here."""
    random = np.random.RandomState(3)
    x = torch.tensor(random.standard_normal((512, 96))).to(torch.float32)
    square = x[:96]
    results = [
        x @ square,
        x[:, :32] @ x[:32],
        x.T @ x,
        x.view(8, 64, 96) @ x.view(8, 64, 96).mT,
        torch.linalg.qr(square).Q,
        x.softmax(-1),
        torch.nn.functional.rms_norm(x, (96,)),
        x.sum(),
        x.norm(),
        x.exp().log1p().tanh(),
    ]
    return hashlib.sha256(b"".join(result.numpy().tobytes() for result in results)).hexdigest()


@functools.cache
def machine() -> dict:
    """What the last bits depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": [zlib.ZLIB_RUNTIME_VERSION, zstandard.__version__, brotli.__version__],
        "arithmetic": arithmetic(),
    }


def read_pins() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {"machine": {}, "values": {}}


def write_pin(name: str, found) -> None:
    pins = read_pins()
    pins["machine"] = machine()
    pins["values"][name] = found
    pins["values"] = dict(sorted(pins["values"].items()))
    FILE.write_text(json.dumps(pins, indent=1) + "\n")


def pinned(name: str, found):
    """The number of the file, once `found` is written there if that was asked for."""
    if WRITE:
        write_pin(name, found)
    return read_pins()["values"][name]


def same_machine() -> bool:
    return read_pins()["machine"] == machine()


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────
SETTINGS = {
    "vocab_size": 384,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "train_seq_len": 64,
    "train_batch_tokens": 512,
    "keep_float_max_numel": 512,
    "iterations": 10,
    "max_wallclock_seconds": 0.0,
    "warmup_steps": 1,
    "warmdown_iters": 5,
    "train_log_every": 1,
    "val_loss_every": 0,
    "eval_stride": 0,
    "val_max_tokens": 200,
    "muon_momentum_warmup_steps": 10,
    "compress_level": 1,
    "strict": False,
}
HALF = {"swa_start_kind": "iter_frac", "swa_start_frac": 0.5, "swa_every": 2}
LATE_QAT = {"qat_enabled": True, "qat_start_kind": "iter_frac", "qat_start": 0.5}
MODEL = {
    "smear_pos": "post_norm",
    "smear_mask_bos": True,
    "bigram_vocab_size": 64,
    "bigram_dim": 16,
    "bigram_proj_opt": "adam",
    "ve_enabled": True,
    "ve_dim": 8,
    "ve_layers": "1,2",
    "xsa_last_n": 2,
    "ln_scale": True,
    "rope_dims": 4,
    "rope_ntk_len": 32,
    "negative_slope": 0.5,
    "tied_embed_init_std": 0.3,
    "logit_softcap": 8.0,
}
GRID = {"quant_bits_mlp": 5, "quant_bits_embed": 8}
EVERYTHING = {**MODEL, **GRID, **LATE_QAT, "qna_enabled": True, "adam_wd": 0.04}
RUNS = {
    "default": {},
    "bare": {"smear_gate": False, "init": "default"},
    "model": MODEL,
    "bigram": {"bigram_vocab_size": 64, "bigram_dim": 16},
    "ve": {"ve_enabled": True, "ve_dim": 8, "ve_layers": "0,2"},
    "xsa": {"xsa_last_n": 2},
    "partial rope": {"rope_dims": 4},
    "qat": {**LATE_QAT, "quant_clip": "amax", "quant_scale_floor": False},
    "qna": {"qna_enabled": True},
    "everything": EVERYTHING,
}
AVERAGES = {
    "swa": {"swa_enabled": True, **HALF},
    "ema": {"ema_enabled": True, "ema_decay": 0.8},
    "sqwa": {"sqwa_enabled": True, **HALF},
    "sqwa of ema": {"sqwa_enabled": True, "ema_enabled": True, "ema_decay": 0.8, **HALF},
}
EVERY_MODE = {
    **EVERYTHING,
    **AVERAGES["sqwa of ema"],
    "eval_stride": 16,
    "doc_isolated_eval": True,
    "ttt_mode": "sgd",
    "ttt_chunk_tokens": 128,
    "ttt_epochs": 1,
    "ttt_freeze_blocks": 1,
}


def training_tokens() -> np.ndarray:
    random = np.random.RandomState(0)
    steps = np.cumsum(random.randint(0, 7, 8000))
    tokens = 4 + (steps + random.randint(0, 40, 8000) ** 2 // 99) % 380
    tokens[::113] = 1
    return tokens


def validation_tokens() -> np.ndarray:
    """Documents of letters that no test's tokenizer knows: each is the pieces of its three bytes.

    So tokens and bytes are the same with every version of the tokenizer's library.
    """
    random = np.random.RandomState(1)
    documents = []
    for length in (30, 7, 60, 15, 40):
        letters = [chr(number) for number in random.randint(0x4E00, 0x4E40, length)]
        documents.append([1, *(4 + byte for byte in "".join(letters).encode())])
    return np.concatenate(documents)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A folder with tokens that are the same everywhere (the text of `data` is Python's own)."""
    folder = tmp_path_factory.mktemp("tokens")
    write_shard(folder / "fineweb_train_000000.bin", training_tokens())
    write_shard(folder / "fineweb_val_000000.bin", validation_tokens())
    return folder


@pytest.fixture
def train(tiny, tokens):
    """train(world, **knobs) -> folder of a run of ten steps."""

    def run(world: int, **knobs) -> Path:
        cfg = tiny(**{**SETTINGS, **knobs, "data_path": str(tokens)})
        if world == 1:
            main(cfg)
        else:
            done = finish(cfg, world, seconds=600)
            assert [process.exitcode for process in done.processes] == [0] * world
        return Path(cfg.logs_dir) / cfg.run_id

    return run


def losses(folder: Path) -> list[float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [event["loss"] for event in events if event["event"] == "step"]


def checksum(state: dict[str, torch.Tensor]) -> str:
    """Of the bits of all weights, whatever their order."""
    parts = [name.encode() + state[name].numpy().tobytes() for name in sorted(state)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check_losses(name: str, found: list[float], tolerance: float = 2e-4) -> None:
    expected = pinned(name, found)
    assert len(found) == 10
    if same_machine():
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps(train, name):
    check_losses(f"losses: {name}", losses(train(1, **RUNS[name])))


@pytest.mark.parametrize("name", ["default", "everything"])
def test_ten_steps_on_two_ranks(train, name):
    """The sums of two ranks are added in another order, so that the last bits are their own."""
    found = losses(train(2, **RUNS[name]))
    check_losses(f"losses: {name}, 2 ranks", found)
    alone = read_pins()["values"][f"losses: {name}"]
    assert found == pytest.approx(alone, rel=2e-4)


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_after_ten_steps(train, name):
    """The weights that are shipped. An average leaves the training as it is."""
    folder = train(1, **AVERAGES[name])
    check_losses("losses: default", losses(folder))
    _, state = read_artifact(folder / "artifact.bin")
    result = json.loads((folder / "result.json").read_text())
    found = {"weights": checksum(state), "nats": result["scores"]["averaged"]["loss"]}
    expected = pinned(f"average: {name}", found)
    if same_machine():
        assert found == expected
    assert found["nats"] == pytest.approx(expected["nats"], rel=2e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_scores_in_every_mode(train, world):
    folder = train(world, **EVERY_MODE)
    scores = json.loads((folder / "result.json").read_text())["scores"]
    assert list(scores) == ["live", "averaged", "quantised", "sliding", "documents", "ttt"]
    found = {mode: [score["bpb"], score["loss"]] for mode, score in scores.items()}
    expected = pinned(f"scores, {world} ranks", found)
    for mode, pair in found.items():
        if same_machine():
            assert pair == expected[mode]
        else:
            assert pair == pytest.approx(expected[mode], rel=1e-3), mode


# ── Artifacts of fixed weights ────────────────────────────────────────────────────────────────────
GRIDS = {
    "quantile": {"quant_bits_embed": 8},
    "amax asym": {"quant_clip": "amax", "quant_codes": "asym", "quant_scale_floor": False},
    "search5": {"quant_clip": "search5", "quant_bits_mlp": 5},
}


def fixed_artifact(monkeypatch, grid: str, compressor: str) -> bytes:
    """An artifact of weights that no training has made. Its knobs are left out."""
    cfg = Config(**{**SETTINGS, **MODEL, **GRIDS[grid], "compressor": compressor})
    monkeypatch.setattr(Config, "knobs", lambda self, *scopes: {})
    random = np.random.RandomState(2)
    state = {}
    with torch.device("meta"):
        model = GPT(cfg)
    for name, p in sorted(model.named_parameters()):
        rows = np.exp(random.standard_normal((len(p), 1))) if p.ndim == 2 else 1.0
        state[name] = torch.tensor(0.1 * rows * random.standard_normal(p.shape)).to(torch.float32)
    return encode_artifact(cfg, quantised(cfg, state, export_plan(cfg, model)))


@pytest.mark.parametrize("compressor", ["zlib", "zstd", "lzma", "brotli", "ans"])
@pytest.mark.parametrize("grid", GRIDS)
def test_artifact_of_fixed_weights(tmp_path, monkeypatch, grid, compressor):
    """Another machine may have another zlib, but the weights that a reader gets are close."""
    blob = fixed_artifact(monkeypatch, grid, compressor)
    path = tmp_path / "artifact.bin"
    path.write_bytes(blob)
    _, state = read_artifact(path)
    sums = {name: w.double().sum().item() for name, w in sorted(state.items())}
    found = {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "bytes": len(blob),
        "sum": sum(sums.values()),
    }
    expected = pinned(f"artifact: {grid}, {compressor}", found)
    if same_machine():
        assert found == expected
    assert found["bytes"] == pytest.approx(expected["bytes"], rel=0.02)
    assert found["sum"] == pytest.approx(expected["sum"], rel=1e-3)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_pins.py --write")
    FILE.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__]
    sys.exit(subprocess.call(command, env=os.environ | {"WRITE_PINS": "1", "OMP_NUM_THREADS": "1"}))

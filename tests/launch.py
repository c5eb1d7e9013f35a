"""Runs of train_gpt.py in processes of their own that start in milliseconds, forked by a server that has imported torch."""

import contextlib
import multiprocessing
import os
import random
import socket
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest
from conftest import HANG, ROOT, THREADS, environment, until

import train_gpt

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train_gpt", "conftest", "test_pipeline", "torch.testing", "torch._dynamo"]
)


def serve() -> None:
    """Starts the server, once; it finds what it shall import in PYTHONPATH alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()


def free_port() -> int:
    """A port that nobody listens at, from below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def child(env: dict, output: str, prepare) -> None:
    """command_line() with this environment; `prepare` injects a fault before."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    train_gpt.torch.set_num_threads(THREADS)
    if prepare:
        prepare()
    raise SystemExit(train_gpt.command_line([]))


@dataclass
class Launch:
    """The ranks of one run."""

    cfg: train_gpt.Config
    processes: list
    outputs: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.logs_dir) / self.cfg.run_id

    def wait(self) -> list[int]:
        """Exit codes (-9: killed)."""
        end = time.monotonic() + HANG
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.01))
        assert all(process.exitcode is not None for process in self.processes), (
            f"still at work after {HANG:.0f} s: {self.stderr()}"
        )
        return codes(self)

    def until(self, happened) -> None:
        """Waits for something that happens while the run is at work."""

        def happened_at_work() -> bool:
            if happened():
                return True
            assert any(process.is_alive() for process in self.processes), self.stderr()
            return False

        until(happened_at_work, self.stderr)

    def log(self) -> str:
        path = self.folder / "train.log"
        return path.read_text() if path.exists() else ""

    def printed(self, stream: str, rank: int | None = None) -> str:
        paths = [
            Path(f"{output}.{stream}")
            for output in (self.outputs if rank is None else [self.outputs[rank]])
        ]
        return "".join(path.read_text() for path in paths if path.exists())

    def stdout(self, rank: int | None = None) -> str:
        return self.printed("out", rank)

    def stderr(self, rank: int | None = None) -> str:
        return self.printed("err", rank)


@contextlib.contextmanager
def launch(cfg: train_gpt.Config, world: int = 1, prepare=None, **variables: str):
    """`world` ranks of this configuration, killed at the end if they still run."""
    serve()
    port, stem = free_port(), Path(tempfile.mkdtemp()) / "rank"
    outputs, processes = [f"{stem}.{rank}" for rank in range(world)], []
    for rank, output in enumerate(outputs):
        ranks = (
            dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=world,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            if world > 1
            else {}
        )
        env = environment(cfg) | {
            name: str(value) for name, value in {**ranks, **variables}.items()
        }
        processes.append(SERVER.Process(target=child, args=(env, output, prepare)))
    for process in processes:
        process.start()
    try:
        yield Launch(cfg, processes, outputs)
    finally:
        for process in processes:
            process.kill()
            process.join()


def finish(cfg: train_gpt.Config, world: int = 1, prepare=None, **variables: str) -> Launch:
    """The run until its end."""
    with launch(cfg, world, prepare, **variables) as run:
        run.wait()
    return run


def codes(run: Launch) -> list[int]:
    return [process.exitcode for process in run.processes]

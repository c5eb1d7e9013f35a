"""Runs of train_gpt.py in processes of their own that start in milliseconds,
forked by a server that has imported torch.
"""

import contextlib
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver, reduction
from pathlib import Path

import pytest
from conftest import HANG, INHERITED, ROOT, THREADS, environment, until

import train_gpt

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train_gpt", "conftest", "test_pipeline", "torch.testing", "torch._dynamo", "ablate", "bench"]
)


def serve() -> None:
    """Starts the server, once; it finds what it shall import in PYTHONPATH alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()


def free_port() -> int:
    """A port that nobody listens at,
    from below those that the system gives to outgoing connections.
    """
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


class Lent:
    """An open file of this process that a child of the server gets too, with its lock."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return take, (reduction.DupFd(self.number),)


def take(lent) -> int:
    return lent.detach()


def script_child(argv: list[str], env: dict, cwd: Path, output: int, kept: list[int]) -> None:
    """The main program `python argv`, in this folder and environment;
    all that it prints goes to output.
    """
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # Python reads this when it starts, and here it has started already
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    train_gpt.torch.set_num_threads(int(env.get("OMP_NUM_THREADS", THREADS)))
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], {"__name__": "__main__"})
    else:
        sys.argv = argv
        if Path(argv[0]).read_bytes() == train_gpt.SOURCE:
            # imported already
            sys.exit(train_gpt.command_line(argv[1:]))
        runpy.run_path(argv[0], run_name="__main__")


class Forked:
    """What subprocess.Popen([python, script, ...], env=...) does,
    without the seconds that Python and torch need to start.
    """

    def __init__(
        self, argv: list[str], env: dict, stdout, pass_fds: tuple = (), cwd: Path = ROOT, **_
    ):
        serve()
        assert argv[0] == sys.executable
        lent = [Lent(number) for number in pass_fds]
        arguments = (list(map(str, argv[1:])), env, cwd, Lent(stdout.fileno()), lent)
        self.process = SERVER.Process(target=script_child, args=arguments)
        self.process.start()
        self.terminate = self.process.terminate
        self.kill = self.process.kill

    def wait(self, timeout: float = HANG) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self.process.exitcode


def script(*argv, **variables: str) -> tuple[int, str]:
    """(exit code, what it printed) of a script of this repository."""
    env = {name: os.environ[name] for name in INHERITED if name in os.environ} | variables
    with tempfile.TemporaryFile("w+") as output:
        code = Forked([sys.executable, *argv], env, output).wait()
        output.seek(0)
        return code, output.read()


def ranks_of(world: int, env: dict, *argv) -> tuple[list[int], str]:
    """(exit codes, all that was printed) of a script on so many ranks, as torchrun starts them."""
    meet = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    meet["TORCHELASTIC_RUN_ID"] = "test"
    with tempfile.TemporaryFile("w+") as output:
        started = []
        for rank in range(world):
            place = {name: str(value) for name, value in meet.items()}
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(Forked([sys.executable, *argv], env | place, output))
        ends = [process.wait() for process in started]
        output.seek(0)
        return ends, output.read()


def codes(run: Launch) -> list[int]:
    return [process.exitcode for process in run.processes]

"""The demo run again and again, stopped at random moments and resumed:
does anything leak, hang or get lost?

    python tests/soak.py --seconds 3600 --out logs/bench/soak.json
                         [--script train_gpt.py] [--ranks 2]

Settings are those of `make train` on a CPU (data/demo must be there), with MAX_WALLCLOCK_SECONDS=60
and a checkpoint every 5 s. Each attempt is stopped after a random time by SIGKILL or SIGTERM, of
one rank or of the launcher; the same command goes on until the run is complete. Every second the
ranks' memory and open files are read from /proc; after each attempt the ranks that are still at
work are counted, after each run the files of its folder. Fails when a launch hangs or a run does
not come to its end; exits 1 when something grew.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOWS = (
    "kill -9 of a rank",
    "kill -9 of the launcher",
    "SIGTERM to a rank",
    "SIGTERM to the launcher",
)


def demo_settings() -> dict[str, str]:
    """What `make train` sets without a GPU."""
    text = (ROOT / "Makefile").read_text().split("else\nRANKS := gpu")[0]
    variables = dict(re.findall(r"^export (\w+) \?= (\S+)$", text, re.MULTILINE))
    defaults = dict(re.findall(r" (\w+)\?=(\S+)", text))
    return (
        variables
        | defaults
        | dict(
            DATA_PATH="data/demo",
            TOKENIZER_PATH="data/demo/tokenizer.model",
            MAX_WALLCLOCK_SECONDS="60",
            CHECKPOINT_EVERY="5",
        )
    )


def ranks_of(script: str) -> list[int]:
    """Process ids of the ranks (not of the launcher) that run this script."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            argv = (path / "cmdline").read_bytes().split(b"\0")
            found += [int(path.name)] * (
                script.encode() in argv
                and b"RANK=" in (path / "environ").read_bytes()
                and b"torch.distributed.run" not in argv
            )
        except OSError:
            pass  # it ended meanwhile
    return found


def sample(pid: int) -> tuple[int, int] | None:
    """Resident bytes and open files of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024, len(
            os.listdir(f"/proc/{pid}/fd")
        )
    except (OSError, TypeError):
        return None


def may_end_so(said: str) -> bool:
    """Whether a launch that nobody stopped may end with an error, by what it says.

    The ranks of the launch before hold the lock; or the machine is so busy that training ends over
    its limit, exit code 9, which the launcher turns into a 1.
    """
    return "another process is at work" in said or "exit code 9: " in said


def attempt(argv: list[str], env: dict, script: str, log: Path, chance: random.Random) -> dict:
    """One launch, stopped at a random moment if it lasts so long."""
    began, moment, how = time.monotonic(), chance.uniform(3, 60), chance.choice(HOWS)
    series, stopped, before = {}, None, log.stat().st_size if log.exists() else 0
    with (
        log.open("ab") as out,
        subprocess.Popen(
            argv, env=env, cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        ) as launcher,
    ):
        while launcher.poll() is None:
            time.sleep(1)
            alive = ranks_of(script)
            for pid in alive:
                if found := sample(pid):
                    series.setdefault(pid, []).append(found)
            if stopped is None and time.monotonic() - began > moment and alive:
                stopped = time.monotonic()
                target = launcher.pid if "launcher" in how else chance.choice(alive)
                os.kill(target, signal.SIGKILL if "kill" in how else signal.SIGTERM)
            assert stopped is None or time.monotonic() - stopped < 600, f"hangs after {how}"
    ended = time.monotonic()
    while ranks_of(script) and time.monotonic() - ended < 40:
        # Ranks outlive a launcher that was killed: they go on to the end, and hold the run's lock
        time.sleep(0.5)
    said = log.read_bytes()[before:].decode(errors="replace")
    good = stopped or not launcher.returncode or may_end_so(said)
    assert good, f"ends with {launcher.returncode}:\n{said}"
    growth = [
        dict(files=s[-1][1] - s[len(s) // 2][1], peak=max(r for r, _ in s))
        for s in series.values()
        if len(s) > 20
    ]
    return dict(
        code=launcher.returncode,
        how=how if stopped else None,
        seconds=ended - began,
        stop_seconds=ended - stopped if stopped else None,
        left=len(ranks_of(script)),
        growth=growth,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind, default in (
        ("--seconds", float, 3600),
        ("--out", Path, None),
        ("--script", Path, ROOT / "train_gpt.py"),
        ("--ranks", int, 2),
        ("--seed", int, 1),
    ):
        parser.add_argument(name, type=kind, default=default)
    options, began = parser.parse_args(), time.monotonic()
    place, chance = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(options.seed)
    script = str(
        shutil.copy(options.script, place / "train_gpt.py")
    )  # edits meanwhile change nothing
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={options.ranks}",
        script,
    ]
    runs, attempts = [], []
    while time.monotonic() - began < options.seconds:
        run_id, tries = f"run{len(runs)}", []
        folder = place / "logs" / run_id
        env = (
            {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
            | demo_settings()
            | dict(LOGS_DIR=str(place / "logs"), RUN_ID=run_id, RESUME="1", CUDA_VISIBLE_DEVICES="")
        )
        while not (folder / "result.json").exists():
            tries.append(attempt(argv, env, script, place / f"{run_id}.txt", chance))
            assert len(tries) < 30, "does not come to its end"
        result = json.loads((folder / "result.json").read_text())
        runs.append(
            dict(
                attempts=len(tries),
                resumed=len(result["resumed"]),
                steps=result["steps"],
                train_seconds=result["train_seconds"],
                val_bpb=result["val_bpb"],
                bytes=sum(p.stat().st_size for p in folder.iterdir()),
                files=sorted(p.name for p in folder.iterdir()),
            )
        )
        attempts += tries
        print(f"{time.monotonic() - began:6.0f} s  {run_id}: {runs[-1]}", flush=True)
    stops = {
        how: [a["stop_seconds"] for a in attempts if a["how"] == how]
        for how in {a["how"] for a in attempts} - {None}
    }
    grown = [g for a in attempts for g in a["growth"]]
    own_ends = [
        a["code"] for a in attempts if a["how"] is None
    ]  # not 0: the ranks of the launch before hold the lock
    report = dict(
        seconds=time.monotonic() - began,
        ranks=options.ranks,
        seed=options.seed,
        code_sha256=result["code_sha256"],
        device=result["device"],
        torch=result["torch"],
        runs=runs,
        attempts=len(attempts),
        stops={how: dict(n=len(s), slowest_seconds=max(s)) for how, s in stops.items()},
        not_stopped={str(code): own_ends.count(code) for code in sorted({*own_ends})},
        ranks_at_work_40_s_after_their_launcher=sum(a["left"] for a in attempts),
        longest_attempt=max(a["seconds"] for a in attempts),
        open_files_growth=max(g["files"] for g in grown),
        peak_rss=max(g["peak"] for g in grown),
    )
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    shutil.rmtree(place)
    return int(report["open_files_growth"] > 0 or any(len(r["files"]) != 6 for r in runs))


if __name__ == "__main__":
    sys.exit(main())

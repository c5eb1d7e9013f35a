"""The demo run in words, from its committed records."""

import json
from pathlib import Path

from pages_studies import age_of

DEMO = Path(__file__).resolve().parents[1] / "logs" / "demo"

# Eight lines of its log: the first (or last) one that starts so
LINES = (
    ("run ", 0),
    ("model: ", 0),
    ("schedule (measured speed)", 0),
    ("step ", -1),
    ("trained ", 0),
    ("export: ", -1),
    ("sliding ", 0),
    ("RESULT ", 0),
)


def fenced(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def log_lines() -> list[str]:
    return (DEMO / "train.log").read_text().rstrip().splitlines()


def demo_log() -> str:
    return fenced(log_lines())


def demo_lines() -> str:
    chosen = []
    for start, which in LINES:
        found = [line for line in log_lines() if line.startswith(start)]
        chosen.append(found[which])
    return fenced(chosen)


def demo_summary() -> str:
    r = json.loads((DEMO / "result.json").read_text())
    speed = r["tokens_seen"] / r["train_seconds"]
    threads = f"{r['threads_per_rank']} thread"
    return (
        f"Measured: {r['device']}, {r['world_size']} ranks of {threads}, torch {r['torch']}, "
        f"1 seed, command `make train`: {r['steps']} steps of {r['step_ms_median']:.0f} ms "
        f"({speed:,.0f} tokens/s) in {r['train_seconds']:.1f} s, "
        f"{sum(r['seconds'].values()):.0f} s in all; code {age_of(r)}."
    )

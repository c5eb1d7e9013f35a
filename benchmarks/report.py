"""What a report begins with, and its tables: made from a report alone."""

import hashlib
import importlib.metadata
import time
from collections.abc import Callable

import train_gpt
from benchmarks.machine import ROOT, human

SCHEMA_VERSION = 1
BENCH = ROOT / "logs" / "bench"
SOURCES = (ROOT / "bench.py", *sorted((ROOT / "benchmarks").glob("*.py")))
CODE_SHA256 = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
PACKAGES = (
    "numpy",
    "safetensors",
    "sentencepiece",
    "zstandard",
    "triton",
    "brotli",
    "flash_attn",
    "flash_attn_3",
)
# The scores of a run, in the order of a table.
SCORES = ("live", "averaged", "quantised", "sliding", "ttt")


def origin() -> dict:
    """What a report of either kind begins with."""
    installed = {}
    for distribution in importlib.metadata.distributions():
        installed[distribution.metadata["Name"].replace("-", "_")] = distribution.version
    return dict(
        schema=SCHEMA_VERSION,
        date=time.strftime("%Y-%m-%d %H:%M"),
        code_sha256={"train_gpt.py": train_gpt.CODE_SHA256, "bench.py": CODE_SHA256},
        packages={name: installed[name] for name in PACKAGES if name in installed},
    )


# ── Cells ─────────────────────────────────────────────────────────────────────────────────────────
def rate_cell(row: dict) -> str:
    """An amount per second, spelt for people."""
    return human(row["rate"], row["unit"])


# heading: the cell, from a row
COLUMNS = {
    "what": "{group}: {name}",
    "ms": "{ms:,.3f}",
    "n": "{n}",
    "spread": "{spread:.0%}",
    "of step": "{share:.1%}",
    "rate": rate_cell,
    "floor ms": "{floor_ms:,.3f}",
    "x floor": "{ratio:,.2f}",
    "twin ms": "{twin_ms:,.3f}",
    "x faster than its twin (p10 to p90)": "{speedup:.2f} ({speedup_p10:.2f} to {speedup_p90:.2f})",
}
PEER_COLUMNS = {
    "run": "{name}",
    "exit": "{exit_code}",
    "steps": "{steps:,}",
    "ms median": "{step_ms_median:,.1f}",
    "ms last": "{step_ms_last:,.1f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "MFU": "{mfu:.1%}",
    "GiB": "{peak_gib:.1f}",
    "train s": "{train_seconds:.1f}",
    "eval s": "{eval_seconds:.1f}",
    "bytes": "{total_bytes:,}",
    **{f"{name} BPB": f"{{bpb[{name}]:.4f}}" for name in SCORES},
    "wall s": "{seconds:.0f}",
}


def cell(how: str | Callable, row: dict) -> str:
    """One figure of a row; a dash where the row has none, or None."""
    try:
        return how(row) if callable(how) else how.format_map(row)
    except (KeyError, TypeError):
        return "-"


def explanation(row: dict) -> str:
    """What explains the figures of a row: its floor, its twin, its note, why it failed."""
    parts = [f"{key}: {row[key]}" for key in ("floor", "twin") if key in row]
    parts += [row.get("note"), row.get("about")]
    if row.get("exit_code"):
        parts.append(f"exit {row['exit_code']}: {row['last_line']}")
    return "; ".join(part for part in parts if part)


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────
def caption(report: dict) -> str:
    """What the table was measured on, in a sentence or two."""
    if report.get("setup"):
        return peers_caption(report["setup"], report["date"])
    model = report["model"]
    compiled = "compiled" if report["compile"] else "eager"
    return (
        f"{report['device']}, ranks: {report['world_size']}, "
        f"threads per rank: {report['threads_per_rank']}, torch {report['torch']}, "
        f"{report['dtype']}, {compiled}, {report['date']}. "
        f"Model: {model['params']:,} parameters, {model['layers']} x {model['dim']}, "
        f"rows of {model['seq_len']}, {model['tokens_per_step']:,} tokens per step."
    )


def peers_caption(setup: dict, date: str) -> str:
    """What the peers were measured on."""
    return (
        f"{setup['gpus']} x {setup['device']}, torch {setup['torch']}, {date}. "
        f"{setup['seconds']:g} s of training each, on {setup['train_tokens']:,} tokens; "
        f"scored on the first {setup['val_tokens']:,} targets ({setup['val_bytes']:,} bytes)."
    )


def table(report: dict, markdown: bool = False) -> str:
    """A report as text: caption, rows, what explains them, command.

    markdown: as in README, floors and twins unexplained.
    """
    peers = "setup" in report
    columns = PEER_COLUMNS if peers else COLUMNS

    cells = [list(columns)]
    explanations = [("row", "how")]
    for row in report["rows"]:
        cells.append([cell(how, row) for how in columns.values()])
        why = explanation(row)
        if why:
            explanations.append((row["name"], why))

    parts = [caption(report), train_gpt.text_table(cells, markdown)]
    if peers or not markdown:
        parts.append(train_gpt.text_table(explanations, markdown))
    if "command" in report:
        parts.append(f"`{report['command']}`")
    return "\n\n".join(parts)

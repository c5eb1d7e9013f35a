"""What runs leave behind, as read from a disk: every file is checked for size, form and type before it is believed."""

import contextlib
import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path

import train_gpt
from train_gpt import Refusal

PLACES = {
    f.name for f in train_gpt.KNOBS if f.metadata["scope"] in ("run", "seed")
}  # knobs that make no other arm


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; what a crash or a stranger left otherwise is passed over."""
    found = []
    if path.is_file() and path.stat().st_size > MAX_LOG_BYTES:
        raise Refusal(
            f"{path}: {path.stat().st_size:,} bytes, over {MAX_LOG_BYTES:,}; no run writes that: move it away"
        )
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    ):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict)]


FINGERPRINT = (
    "code_sha256",
    "data.val_sha256",
    "data.tokenizer_sha256",
    "data.train_tokens",
    "val_tokens",
    "val_bytes",
    "device",
    "world_size",
    "threads_per_rank",
    "dtype",
    "compile",
    "cuda",
    "torch",
)


def lookup(run: dict, key: str):
    """run["data"]["val_sha256"] for data.val_sha256; "(absent)" where there is none."""
    for part in key.split("."):
        run = run.get(part, "(absent)") if isinstance(run, dict) else "(absent)"
    return run


def differing(a: dict, b: dict) -> str:
    """The settings of an arm in which two configurations differ, as environment variables."""
    names = sorted(
        name for name in (a.keys() | b.keys()) - PLACES if lookup(a, name) != lookup(b, name)
    )
    return ", ".join(
        f"{name.upper()}={lookup(a, name)} against {lookup(b, name)}" for name in names
    )


def check_alike(runs: list[dict], config: bool) -> None:
    """Refusal for runs of other code, data or machine than the first; with config, for one arm, also of other settings or
    with a seed that another run has. runs: result.json each, plus name."""
    by_seed = {}
    for run in runs:
        for key in FINGERPRINT + ("config_sha256",) * config:
            mine, its = lookup(runs[0], key), lookup(run, key)
            if mine != its:
                settings = (
                    f" ({differing(runs[0]['config'], run['config'])})"
                    if key == "config_sha256"
                    else ""
                )
                raise Refusal(
                    f"{key} is {mine} in {runs[0]['name']} but {its} in {run['name']}{settings}; such runs cannot be "
                    "put together"
                )
        if config and run["seed"] in by_seed:
            raise Refusal(
                f"{by_seed[run['seed']]} and {run['name']} both have seed {run['seed']}; keep one of them"
            )
        by_seed[run["seed"]] = run["name"]


def metric(run: dict, name: str) -> float | None:
    """A figure of a result: a key, a dotted path such as scores.documents.bpb, or float_val_bpb (the weights to ship, before
    quantisation). None where the run has none."""
    if name == "float_val_bpb":
        return (
            run["averaged_val_bpb"]
            if run.get("averaged_val_bpb") is not None
            else run.get("live_val_bpb")
        )
    value = lookup(run, name)
    return float(value) if isinstance(value, (int, float)) else None


def load(folder: Path) -> dict:
    """result.json of a run folder, with the folder as `name` and metrics.jsonl as `events`."""
    result = read_json(folder / "result.json", f"{folder}/result.json", RESULT_SHAPE)
    if min(result["val_tokens"], result["val_bytes"]) < 1:
        raise Refusal(
            f"{folder}/result.json: scored {result['val_tokens']} targets of {result['val_bytes']} bytes; run it again"
        )
    return result | {"name": str(folder), "events": read_lines(folder / "metrics.jsonl")}


MAX_BYTES = 1 << 24  # of a file or folder that is worth reading
MAX_LOG_BYTES = 1 << 28

# Shapes of JSON: the types that a value may have, or a shape for each required key ("*": for every key)
TEXT, WHOLE, NUMBER, PERHAPS = (str,), (int,), (int, float), (int, float, type(None))

RESULT_SHAPE = {
    **dict.fromkeys(
        ["date", "scored", "device", "torch", "python", "code_sha256", "config_sha256"], TEXT
    ),
    **dict.fromkeys(
        [
            "exit_code",
            "seed",
            "world_size",
            "threads_per_rank",
            "artifact_bytes",
            "code_bytes",
            "total_bytes",
            "val_tokens",
            "val_bytes",
        ],
        WHOLE,
    ),
    **dict.fromkeys(("val_bpb", "val_loss", "quantised_val_bpb", "eval_seconds"), NUMBER),
    **dict.fromkeys(
        ("steps", "train_seconds", "live_val_bpb", "averaged_val_bpb"), PERHAPS
    ),  # null where nothing was trained
    "config": {"seed": WHOLE, "tokenizer_path": TEXT, "ttt_mode": TEXT},
    "non_default": {"*": (str, int, float, bool)},
    "seconds": {"*": NUMBER},
    "toggles": {
        "*": {
            "active": (bool,),
            "unit": TEXT,
            "scope": TEXT,
            "first_step": PERHAPS,
            "last_step": PERHAPS,
            "effect": PERHAPS,
        }
    },
    "data": {"tokenizer_sha256": TEXT, "val_sha256": {"*": TEXT}, "manifest": TEXT},
}

NUMBER_HOOKS = ("parse_int", "parse_float", "parse_constant")


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def leaves(value, depth: int = 0) -> Iterator[float]:
    """Every number in a JSON value. ValueError when it is nested deeper than any result."""
    if depth > 20:
        raise ValueError("nested too deeply")
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from leaves(part, depth + 1)
    if type(value) in NUMBER:
        yield value


def misfits(value, shape: tuple | dict, where: str) -> Iterator[str]:
    """What in a JSON value does not have this shape."""
    if not isinstance(shape, dict):
        if type(value) not in shape:
            yield f"{where}: {shown(value)}, not {' or '.join(kind.__name__ for kind in shape)}"
    elif not isinstance(value, dict):
        yield f"{where}: {shown(value)}, not an object"
    else:
        for key in value if "*" in shape else shape:
            part = shape.get(key, shape.get("*"))
            yield from (
                misfits(value[key], part, f"{where}.{key}")
                if key in value
                else [f"{where}.{key}: missing"]
            )


def read_text(path: Path, name: str) -> str:
    """Refusal when it is missing, no plain file, too large or no UTF-8."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise OSError(0, f"no plain file of at most {MAX_BYTES:,} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise Refusal(f"{name}: cannot be read ({reason}); build it again from runs") from None


def read_json(path: Path, name: str, shape: dict) -> dict:
    """A JSON object of this shape. Refusal on anything else: NaN, doubled keys, absurd numbers, other types."""

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def number(text: str) -> float:
        value = (
            math.inf
            if len(text) > 40
            else int(text)
            if text.lstrip("-").isdecimal()
            else float(text)
        )
        if not abs(value) < 1e18:
            raise ValueError(f"no number to work with: {text[:20]}")
        return value

    try:
        value = json.loads(
            read_text(path, name), object_pairs_hook=unique, **dict.fromkeys(NUMBER_HOOKS, number)
        )
        sum(leaves(value))  # visits each
        problem = next(misfits(value, shape, name), None)
    except (ValueError, RecursionError) as error:
        problem = f"{name}: no good JSON ({error})"
    if problem:
        raise Refusal(f"{problem}; build it again from runs")
    return value

"""What runs leave behind, read from a disk and not believed unseen.

A run, as the rest of the package sees it, is a dict: all keys of its result.json, `name` (its
folder) and `events` (its metrics.jsonl). It is read from one of two places:

    FOLDER/TRIAL/result.json, metrics.jsonl    where it ran; logs/runs is full of these
    FOLDER/results.jsonl, metrics.jsonl        all runs of a study at one size, to be committed:
                                               a line per run, and a line per event; what goes
                                               beyond 1 MB follows in results-2.jsonl and so on

Every file is checked for size, form and type before a figure of it is used.
"""

import contextlib
import fnmatch
import glob
import hashlib
import itertools
import json
import math
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

import train_gpt
from train_gpt import Refusal

RESULTS = "results.jsonl"
METRICS = "metrics.jsonl"

# Of a file, or of a folder, that is worth reading
MAX_BYTES = 1 << 24
# Of a file of lines, before the next one is begun
MAX_PART_BYTES = 1_000_000
# Of a log
MAX_LOG_BYTES = 1 << 28
# Levels of a JSON value
MAX_DEPTH = 20

# A setting that makes no other arm, but another kernel
BACKEND = "attn_backend"
# Knobs that make no other arm
PLACES = {f.name for f in train_gpt.KNOBS if f.metadata["scope"] not in train_gpt.COMPARED}

# What runs must have in common to stand in one table
CODE = "code_sha256"
KERNEL = "attention"
FINGERPRINT = (
    CODE,
    "data.val_sha256",
    "data.tokenizer_sha256",
    "data.train_tokens",
    "val_tokens",
    "val_bytes",
    "device",
    "gpu",
    KERNEL,
    "world_size",
    "threads_per_rank",
    "dtype",
    "compile",
    "cuda",
    "torch",
)

# Of these, what differs where one text is cut into other tokens
TOKENS = ("data.val_sha256", "data.tokenizer_sha256", "data.train_tokens", "val_tokens")

# Of these, what seeds of one submission may differ in: each is a launch of its own
MACHINE = ("gpu", KERNEL)

# What to do about arms of different code, and about runs on different kernels
ASK = "--across-code compares arms of different code all the same"
CHOOSE = "give both the same ATTN_BACKEND, as auto takes the fastest"

# ── Shapes of JSON ────────────────────────────────────────────────────────────────────────────────
# The types that a value may have, or a shape for each required key ("*": for every key)
TEXT = (str,)
WHOLE = (int,)
NUMBER = (int, float)
PERHAPS = (int, float, type(None))

RESULT_SHAPE = {
    "date": TEXT,
    "scored": TEXT,
    "device": TEXT,
    "torch": TEXT,
    "python": TEXT,
    "code_sha256": TEXT,
    "config_sha256": TEXT,
    "exit_code": WHOLE,
    "seed": WHOLE,
    "world_size": WHOLE,
    "threads_per_rank": WHOLE,
    "artifact_bytes": WHOLE,
    "code_bytes": WHOLE,
    "total_bytes": WHOLE,
    "val_tokens": WHOLE,
    "val_bytes": WHOLE,
    "val_bpb": NUMBER,
    "val_loss": NUMBER,
    "quantised_val_bpb": NUMBER,
    "eval_seconds": NUMBER,
    # null where nothing was trained
    "steps": PERHAPS,
    "train_seconds": PERHAPS,
    "live_val_bpb": PERHAPS,
    "averaged_val_bpb": PERHAPS,
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
# data.lost_documents of a result, where it has one; null: not known
LOST_SHAPE = {"lost": (int, type(None)), "of": (int, type(None))}
# A line of results.jsonl
RESULT_LINE_SHAPE = {"trial": TEXT, "arm": TEXT, "seed": WHOLE, "result": RESULT_SHAPE}


def shown(value) -> str:
    """A value as a message may quote it."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def leaves(value, depth: int = 0) -> Iterator[float]:
    """Every number in a JSON value. ValueError when it is nested deeper than any result."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from leaves(part, depth + 1)
    elif type(value) in NUMBER:
        yield value


def misfits(value, shape: tuple | dict, where: str) -> Iterator[str]:
    """What in a JSON value does not have this shape, as words."""
    if not isinstance(shape, dict):
        if type(value) not in shape:
            yield f"{where}: {shown(value)}, not {' or '.join(kind.__name__ for kind in shape)}"
        return
    if not isinstance(value, dict):
        yield f"{where}: {shown(value)}, not an object"
        return
    for key in value if "*" in shape else shape:
        if key in value:
            part = shape.get(key, shape.get("*"))
            yield from misfits(value[key], part, f"{where}.{key}")
        else:
            yield f"{where}.{key}: missing"


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────
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


def object_of(pairs: list[tuple]) -> dict:
    """A JSON object. ValueError when it has a key twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands there twice")
    return made


def number_of(text: str) -> float:
    """A JSON number. ValueError for NaN, infinity and what is too large or long to be one."""
    value = math.inf
    if len(text) <= 40:
        value = int(text) if text.lstrip("-").isdecimal() else float(text)
    if not abs(value) < 1e18:
        raise ValueError(f"no number to work with: {text[:20]}")
    return value


def parse_json(text: str, name: str, shape: dict) -> dict:
    """A JSON object of this shape.

    Refusal on anything else: NaN, doubled keys, absurd numbers, other types, deep nesting.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=object_of,
            parse_int=number_of,
            parse_float=number_of,
            parse_constant=number_of,
        )
        for _ in leaves(value):
            pass
        problem = next(misfits(value, shape, name), None)
    except (ValueError, RecursionError) as error:
        problem = f"{name}: no good JSON ({error})"
    if problem:
        raise Refusal(f"{problem}; build it again from runs")
    return value


def read_json(path: Path, name: str, shape: dict) -> dict:
    """A JSON object of this shape from a file. Refusal on anything else."""
    return parse_json(read_text(path, name), name, shape)


def read_log(path: Path) -> str:
    """The text of a log; "" where there is none. Refusal when it is too large."""
    if not path.is_file():
        return ""
    size = path.stat().st_size
    if size > MAX_LOG_BYTES:
        raise Refusal(
            f"{path}: {size:,} bytes, over {MAX_LOG_BYTES:,}; no run writes that: move it away"
        )
    return path.read_text(encoding="utf-8", errors="replace")


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file.

    What a crash or a stranger left otherwise is passed over.
    """
    found = []
    for line in read_log(path).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict)]


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────
def run_of(result: dict, name: str, source: str, events: list[dict]) -> dict:
    """A run from its parts. Refusal when nothing was scored. source: the file, for a message."""
    tokens = result["val_tokens"]
    size = result["val_bytes"]
    if min(tokens, size) < 1:
        raise Refusal(f"{source}: scored {tokens} targets of {size} bytes; run it again")
    return result | {"name": name, "events": events}


def load(folder: Path) -> dict:
    """The run of a run folder."""
    source = f"{folder}/result.json"
    result = read_json(folder / "result.json", source, RESULT_SHAPE)
    return run_of(result, str(folder), source, read_lines(folder / METRICS))


def part(folder: Path, name: str, number: int) -> Path:
    """FOLDER/results.jsonl, FOLDER/results-2.jsonl, and so on: where lines stand."""
    path = folder / name
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def parts(folder: Path, name: str) -> Iterator[Path]:
    """The parts of a file of lines, in their order, up to the first that is not there."""
    paths = (part(folder, name, number) for number in itertools.count(1))
    return itertools.takewhile(Path.is_file, paths)


def load_lines(folder: Path) -> dict[str, dict]:
    """Trial -> run, of results.jsonl and metrics.jsonl; empty where there are none."""
    events: dict[str, list[dict]] = {}
    for path in parts(folder, METRICS):
        for event in read_lines(path):
            events.setdefault(str(event.pop("trial", "")), []).append(event)

    runs: dict[str, dict] = {}
    for path in parts(folder, RESULTS):
        for number, text in enumerate(read_log(path).split("\n"), start=1):
            if not text:
                continue
            source = f"{path}, line {number}"
            line = parse_json(text, source, RESULT_LINE_SHAPE)
            trial = line["trial"]
            if trial in runs:
                raise Refusal(
                    f"{source}: {shown(trial)} stands there twice; build it again from runs"
                )
            name = str(folder / trial)
            runs[trial] = run_of(line["result"], name, source, events.get(trial, []))
    return runs


class RunStore:
    """The runs of a study at one size: a folder each, or a line each.

    A trial's own folder counts before its line, so that what runs now replaces what was kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.kept = load_lines(folder)

    def find(self, trial: str) -> dict | None:
        """The run of a trial, or None where it left no result."""
        if (self.folder / trial / "result.json").exists():
            return load(self.folder / trial)
        return self.kept.get(trial)


def split_trial(trial: str) -> tuple[str, str]:
    """(arm, seed) of the name of a trial, ARM-sSEED."""
    arm, _, seed = trial.rpartition("-s")
    return arm, seed


def training_of(run: dict) -> str:
    """The trial whose training a run of a study has its weights from: another's, or its own."""
    path = run.get("checkpoint")
    if isinstance(path, str) and path:
        return PurePath(path).parent.name
    return f"{run['arm']}-s{run.get('seed')}"


def write_lines(folder: Path, name: str, lines: list[str]) -> None:
    """Writes the parts of a file of lines, and removes those that an earlier one had beyond."""
    written = [b""]
    for line in map(str.encode, lines):
        if written[-1] and len(written[-1]) + len(line) > MAX_PART_BYTES:
            written.append(b"")
        written[-1] += line
    old = list(parts(folder, name))
    for number, content in enumerate(written, start=1):
        train_gpt.write_atomic(part(folder, name, number), content)
    for path in old[len(written) :]:
        path.unlink()


def keep(folder: Path, runs: dict[str, dict]) -> None:
    """Writes trial -> run as results.jsonl and metrics.jsonl; load_lines gives them back."""
    results = []
    metrics = []
    for trial, run in runs.items():
        result = {key: value for key, value in run.items() if key not in ("name", "events")}
        line = {
            "trial": trial,
            "arm": split_trial(trial)[0],
            "seed": result["seed"],
            "result": result,
        }
        results.append(json.dumps(line) + "\n")
        metrics += [json.dumps({"trial": trial, **event}) + "\n" for event in run["events"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder, RESULTS, results)
    write_lines(folder, METRICS, metrics)


def find_runs(patterns: list[str]) -> list[dict]:
    """The runs whose folders match one of these shell patterns, whether a folder or a line each."""
    found = {}
    for pattern in patterns:
        outer = Path(pattern).parent
        for folder in map(Path, glob.glob(str(outer))):
            for run in load_lines(folder).values():
                if fnmatch.fnmatchcase(Path(run["name"]).name, Path(pattern).name):
                    found[run["name"]] = run
        for folder in map(Path, glob.glob(pattern)):
            if (folder / "result.json").exists():
                found[str(folder)] = load(folder)
    return [found[name] for name in sorted(found)]


# ── Figures of a run, and runs that may be put together ───────────────────────────────────────────
# What lookup gives where a run has no such key
ABSENT = "(absent)"


def lookup(run: dict, key: str):
    """run["data"]["val_sha256"] for data.val_sha256; ABSENT where there is none."""
    value = run
    for part in key.split("."):
        value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def known(run: dict, key: str) -> bool:
    """Whether a run has this key."""
    return lookup(run, key) != ABSENT


def metric(run: dict, name: str) -> float | None:
    """A figure of a run, or None where it has none.

    name: a key, a dotted path such as scores.documents.bpb, float_val_bpb (the weights to ship,
    before quantisation), or toggles.QNA.cost_share (the part of a step that cost_ms is).
    """
    if name == "float_val_bpb":
        averaged = run.get("averaged_val_bpb")
        return averaged if averaged is not None else run.get("live_val_bpb")
    value = lookup(run, name)
    if name.endswith(".cost_share"):
        value = cost_share(run, name.removesuffix(".cost_share"))
    return float(value) if isinstance(value, (int, float)) else None


def cost_share(run: dict, toggle: str) -> float | None:
    """What part of the run's median step a toggle costs that costs something in every step."""
    cost = metric(run, f"{toggle}.cost_ms")
    step = metric(run, "step_ms_median")
    if cost is None or not step or lookup(run, f"{toggle}.cost_per") != "step":
        return None
    return cost / step


def quantised(runs: list[dict]) -> bool:
    """Whether an artifact of these holds codes. Results that do not tell are taken to."""
    return any(run.get("codes") != {} for run in runs)


def differing(a: dict, b: dict) -> str:
    """The settings of an arm in which two configurations differ, as environment variables."""
    names = sorted((a.keys() | b.keys()) - (PLACES - {BACKEND}))
    return ", ".join(
        f"{name.upper()}={lookup(a, name)} against {lookup(b, name)}"
        for name in names
        if lookup(a, name) != lookup(b, name)
    )


def check_agree(first: dict, run: dict, key: str, remedy: str = "") -> None:
    """Refusal, with the remedy, unless two runs have the same value at this key.

    A key that one of them lacks differs.
    """
    wanted = lookup(first, key)
    found = lookup(run, key)
    if wanted == found:
        return
    why = ""
    if key == "config_sha256":
        why = f" ({differing(first['config'], run['config'])})"
    elif ABSENT in (wanted, found):
        why = " (older code does not record it)"
    remedy = CHOOSE if key == KERNEL and not why else remedy
    raise Refusal(
        f"{key} is {wanted} in {first['name']} but {found} in {run['name']}{why}; "
        f"such runs cannot be put together{remedy and '; '}{remedy}"
    )


def check_arm(runs: list[dict]) -> None:
    """Refusal unless these can be the runs of one arm.

    They need the same code, data, machine and settings; and different seeds.
    """
    names: dict[int, str] = {}
    for run in runs:
        for key in (*FINGERPRINT, "config_sha256"):
            check_agree(runs[0], run, key)
        seed = run["seed"]
        if seed in names:
            raise Refusal(
                f"{names[seed]} and {run['name']} both have seed {seed}; keep one of them"
            )
        names[seed] = run["name"]


def check_alike(runs: list[dict], across_code: bool = False, across_data: bool = False) -> None:
    """Refusal for runs of other code, data or machine than the first.

    Kernels must agree among those that ask for the same ATTN_BACKEND. across_code: the code may
    differ, and what it records must agree among the runs that have it. across_data: tokens must
    agree among the runs of one DATA_PATH; all score the same bytes.
    """
    first_of: dict[tuple[str, str], dict] = {}
    for run in runs:
        for key in FINGERPRINT:
            if across_code and (key == CODE or not known(run, key)):
                continue
            asked = str(lookup(run["config"], BACKEND)) if key == KERNEL else ""
            if across_data and key in TOKENS:
                asked = str(lookup(run["config"], "data_path"))
            first = first_of.setdefault((key, asked), run)
            check_agree(first, run, key, ASK if key == CODE else "")


def lines_of_code(run: dict) -> Counter | None:
    """The lines of the script in a run's folder; None where that is not what ran."""
    with contextlib.suppress(Refusal):
        text = read_text(Path(run["name"]) / "train_gpt.py", "train_gpt.py")
        if hashlib.sha256(text.encode()).hexdigest() == run[CODE]:
            return Counter(text.split("\n"))
    return None


def code_difference(sets: dict[str, list[dict]]) -> str:
    """How the code of sets of runs differs, in one sentence; empty where it does not.

    sets: name -> its runs, of one code. Lines are counted where both folders hold the script.
    """
    first: dict[str, dict] = {}
    names: dict[str, list[str]] = {}
    for name, runs in sets.items():
        first.setdefault(runs[0][CODE], runs[0])
        names.setdefault(runs[0][CODE], []).append(name)
    if len(first) < 2:
        return ""

    (old, run), *others = first.items()
    parts = [f"{', '.join(names[old])} ran code {old[:12]}"]
    mine = lines_of_code(run)
    for code, other in others:
        part = f"{', '.join(names[code])} code {code[:12]}"
        its = lines_of_code(other)
        if mine is not None and its is not None:
            part += f" ({(mine - its).total():,} lines less, {(its - mine).total():,} more)"
        unknown = [key for key in FINGERPRINT if known(run, key) != known(other, key)]
        if unknown:
            part += f" (not known of both: {', '.join(unknown)})"
        parts.append(part)
    return f"THE CODE DIFFERS: {'; '.join(parts)}."

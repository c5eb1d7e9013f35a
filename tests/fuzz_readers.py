"""Coverage-guided fuzzing of all that reads a file: a value that keeps its promise, or one line.

    python -m venv fuzz && fuzz/bin/pip install atheris -r requirements.txt
    fuzz/bin/python tests/fuzz_readers.py TARGET CORPUS_FOLDER -max_total_time=600

atheris is no dependency of `make test`; any option of libFuzzer may follow.

TARGET is container, artifact, shard, manifest, study or submission. The corpus is seeded with good
files and odd ones. A finding is anything else than a good value or a Refusal in one printable line:
another exception, more than 10 CPU seconds, more than 1 GiB of memory for one input, a file opened
outside of the given folder, a process started, a pickle read. To reproduce one: `python
tests/fuzz_readers.py TARGET FILE` (with atheris), or replay(TARGET, bytes), which test_hostile.py
does with every file in fuzz_cases/.

Where a checksum or a compressor would stop the fuzzer, its bytes become what lies behind: the
first byte of an input chooses how the rest is used (see each target).
"""

import contextlib
import functools
import hashlib
import html.parser
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if os.environ.get("GOLF_GPU") != "1" else {}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import safetensors.torch
import torch

# what torch loads when it first makes a model on meta, which must not happen within the guard
import torch._dynamo

if __name__ == "__main__":
    import atheris

    instrumented = atheris.instrument_imports(include=["train_gpt", "ablation", "prepare_data"])
else:
    instrumented = contextlib.nullcontext()
with instrumented:
    import prepare_data
    import train_gpt
    from ablation import report
    from ablation.answers import compare_sides
    from ablation.check import check_submission
    from ablation.page import html_page
    from ablation.records import check_alike, load, metric
    from ablation.report import Finished, comparison_row, markdown_report
    from ablation.runner import shell
    from ablation.statistics import record_rule
    from ablation.study import Matrix, matrix, read_study
    from ablation.submission import render, summarise

CPU_SECONDS, MEMORY = 10, 1 << 30
REFUSALS = (train_gpt.Refusal, prepare_data.UserError)
SMALL = dict(
    vocab_size=16,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=1.0,
    train_seq_len=16,
    train_batch_tokens=32,
    keep_float_max_numel=16,
    eval_stride=4,
)


class Finding(AssertionError):
    """What no reader may do."""


# ── The guard ─────────────────────────────────────────────────────────────────────────────────────
WATCHED = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
}
LIBRARIES = [
    os.path.realpath(p) for p in {sys.prefix, sys.base_prefix, *sys.path} if p and os.path.isdir(p)
]
allowed: list[str] = []  # folders that the reader at work may touch; empty: none is at work
strayed: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """Audit hook: notes what a reader opens elsewhere, or starts."""
    if not allowed or event not in WATCHED or (arguments and isinstance(arguments[0], int)):
        return
    by_descriptor = (
        arguments[-1] not in (-1, None)
        if event in ("os.remove", "os.rmdir", "os.mkdir")
        else (event == "open" and arguments[1] is None and not os.path.isabs(arguments[0]))
    )
    if by_descriptor:  # of a folder that was opened before: shutil.rmtree
        return
    places = [
        os.path.realpath(os.fsdecode(a))
        for a in arguments[: 1 + (event == "os.rename")]
        if isinstance(a, (str, bytes, Path))
    ]
    reading = event in ("os.listdir", "os.scandir") or (
        event == "open" and arguments[1] in ("r", "rb", None)
    )
    fine = allowed + (LIBRARIES if reading else [])
    if event in ("os.system", "os.exec", "subprocess.Popen", "socket.connect", "pickle.find_class"):
        strayed.append(f"{event} {arguments!r:.200}")
    strayed.extend(
        f"{event} {place}"
        for place in places
        if not any(place == f or place.startswith(f + "/") for f in fine)
    )


sys.addaudithook(watch)


@contextlib.contextmanager
def guard(folder: Path) -> Iterator[None]:
    """Finding where the reader inside takes too long or too much, or leaves the folder."""

    def slow(*_):
        raise Finding(f"takes more than {CPU_SECONDS} CPU seconds")

    before, temporary = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tempfile.tempdir
    previous, tempfile.tempdir = signal.signal(signal.SIGVTALRM, slow), str(folder / "tmp")
    allowed[:], strayed[:] = [os.path.realpath(folder)], []
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        allowed.clear()
        tempfile.tempdir = temporary
    if strayed:
        raise Finding(f"touches {strayed[:3]}")
    if (more := 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)) > MEMORY:
        raise Finding(f"takes {more:,} bytes of memory")


def read(reader: Callable, *arguments):
    """What the reader returns; None when it refuses, as it should: in one printable line."""
    try:
        return reader(*arguments)
    except REFUSALS as refusal:
        if not (
            str(refusal)
            and (str(refusal).isprintable() or isinstance(refusal, prepare_data.UserError))
        ):
            raise Finding(
                f"refuses in no printable line: {str(refusal)!r:.300}"
            ) from refusal  # (UserErrors are mended in print)


def promise(kept: bool, what: str) -> None:
    if not kept:
        raise Finding(what)


# ── From bytes to decisions ───────────────────────────────────────────────────────────────────────
class Dice:
    """Decisions from the fuzzer's bytes; when they run out, each is 0."""

    def __init__(self, data: bytes):
        self.data = data

    def take(self, n: int) -> bytes:
        head, self.data = self.data[:n], self.data[n:]
        return head.ljust(n, b"\0")

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "little")

    def pick(self, options):
        options = list(options)
        return options[self.number(1 if len(options) < 256 else 2) % len(options)]


ODD = [
    "null",
    "true",
    "0",
    "-1",
    "2",
    "1e3",
    "0.5",
    "1e-320",
    "1e300",
    "1e999",
    "NaN",
    "-Infinity",
    "9223372036854775808",
    "1" + "0" * 400,
    "9" * 5000,
    '""',
    '"0"',
    '".."',
    '"../../x"',
    '"/etc/passwd"',
    '"a\\nb"',
    r'"\u001b[2J"',
    r'"\ud800"',
    r'"\u0000"',
    '"<script>alert(1)</script>"',
    '"' + "x" * 5000 + '"',
    "[]",
    "{}",
    "[[]]",
    '{"a":1,"a":2}',
    "[1,1]",
    "[" * 30 + "]" * 30,
    "[" * 5000 + "]" * 5000,
    '"x" "',
    '"<!-- end -->"',
    '["../x"]',
    "1e17",
    '"inf"',
]


def fragment(dice: Dice) -> str:
    """A piece of JSON (mostly TOML, too): an odd one, or what the fuzzer wrote."""
    return dice.pick(ODD) if dice.number() < 128 else dice.data.decode("utf-8", "replace")


def places(value, path=()) -> list[tuple]:
    """Paths of all values inside a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        place for key, part in inner for place in places(part, (*path, key))
    ]


def spoilt(value, dice: Dice) -> str:
    """JSON of the value, with one of its parts replaced, removed, renamed or joined by another."""
    whole, mark = json.loads(json.dumps(value)), "@here@"
    spots = places(whole)
    if not spots:
        return fragment(dice)
    *outer, last = spots[dice.number(2) % len(spots)]
    part = functools.reduce(lambda part, key: part[key], outer, whole)
    action = dice.number() % 8
    if action == 0:
        del part[last]
    elif action == 1 and isinstance(part, dict):
        part[dice.pick(["", "..", "../x", "\x1b[2J", "\ud800", "a\nb", "<b>", "x" * 300, mark])] = (
            part.pop(last)
        )
    elif action == 2 and isinstance(part, dict):
        part["added"] = mark
    else:
        part[last] = mark
    return json.dumps(whole).replace(f'"{mark}"', fragment(dice))


# ── Artifacts and checkpoints ─────────────────────────────────────────────────────────────────────
@functools.cache
def product(**knobs) -> tuple[train_gpt.Config, dict]:
    """(configuration, weights) of a model of some 600 parameters."""
    cfg = train_gpt.Config(**SMALL, **knobs)
    torch.manual_seed(0)
    return cfg, {n: p.detach() + 0.1 for n, p in train_gpt.GPT(cfg).named_parameters()}


def artifact_file(compressor: str) -> bytes:
    cfg, state = product(compressor=compressor)
    with torch.device("meta"):
        plan = train_gpt.export_plan(cfg, train_gpt.GPT(cfg))
    return train_gpt.encode_artifact(cfg, train_gpt.quantised(cfg, state, plan))


@functools.cache
def good(kind: str) -> tuple[dict, dict]:
    """(facts, tensors as they stand in the file).

    kind: "zstd", "ans" (an artifact with coded codes) or "checkpoint".
    """
    if kind == "checkpoint":
        cfg, state = product()
        facts = dict(
            config=cfg.knobs("seed", *train_gpt.COMPARED),
            snapshots=0,
            activity={},
            progress=dict(steps=1, elapsed=1.0, step_seconds=[0.1], recompiles=0, code_sha256="0"),
        )
        return facts, {f"live/{name}": w for name, w in state.items()}
    raw = train_gpt.COMPRESSORS[kind].decompress(
        artifact_file(kind)[train_gpt.HEADER.size :], 1 << 20
    )
    header = json.loads(raw[8 : 8 + struct.unpack_from("<Q", raw)[0]])
    tensors = safetensors.torch.load(bytes(raw))
    if train_gpt.COMPRESSORS[kind].arranges:
        tensors = train_gpt.in_order(tensors)
    return json.loads(header["__metadata__"]["facts"]), tensors


def sealed(blob: bytes, compressor: str = "none", size: int | None = None) -> bytes:
    """A container with a true checksum. size: None: of a blob that is not compressed."""
    number, size = (
        list(train_gpt.COMPRESSORS).index(compressor),
        len(blob) if size is None else size,
    )
    digest = hashlib.sha256(blob).digest()
    return (
        train_gpt.HEADER.pack(train_gpt.MAGIC, train_gpt.FORMAT_VERSION, number, size, digest)
        + blob
    )


def safetensors_of(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def as_artifact(path: Path) -> None:
    """As main() does with EVAL_ONLY."""
    knobs, state = train_gpt.read_artifact(path)
    cfg = train_gpt.inherit_settings(train_gpt.Config(eval_only=str(path)), knobs, state)
    for name, w in state.items():
        promise(
            w.dtype == torch.float32 and bool(w.isfinite().all()),
            f"tensor {name} is {w.dtype} or not finite",
        )
    promise(
        all(str(value).isprintable() for value in cfg.knobs().values()),
        "a setting commands the terminal",
    )
    train_gpt.GPT(cfg).load_state_dict(state)


def as_checkpoint(path: Path) -> None:
    """As main() does with CHECKPOINT."""
    facts, tensors = train_gpt.read_container(path)
    live = {name[5:]: w for name, w in tensors.items() if name.startswith("live/")}
    cfg = train_gpt.inherit_settings(
        train_gpt.Config(checkpoint=str(path)), facts.get("config", {}), live
    )
    promise(
        all(str(value).isprintable() for value in cfg.knobs().values()),
        "a setting commands the terminal",
    )


def container(data: bytes, folder: Path) -> None:
    """The bytes are the file."""
    (folder / "file.bin").write_bytes(data)
    read(as_artifact, folder / "file.bin")
    read(as_checkpoint, folder / "file.bin")


DTYPES = [
    "F32",
    "F16",
    "I8",
    "I16",
    "F64",
    "BF16",
    "U8",
    "BOOL",
    "I64",
    "U64",
    "F8_E5M2",
    "C64",
    "F4",
    "X",
]


def changed_tensor(tensors: dict, dice: Dice) -> bytes:
    """Safetensors; one tensor has another name, type, shape or contents, or is gone."""
    stored = {
        name: [
            {torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.float32: "F32"}.get(
                t.dtype, "U8"
            ),
            list(t.shape),
            t.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        ]
        for name, t in tensors.items()
    }
    name = dice.pick(sorted(stored))
    row = stored.pop(name)
    for _ in range(1 + dice.number() % 3):
        match dice.number() % 6:
            case 0:
                name = dice.pick(
                    [
                        name + ":",
                        name + ":codes",
                        name.partition(":")[0],
                        ":stream",
                        "",
                        "\x1b",
                        *sorted(tensors),
                    ]
                )
            case 1:
                row[0] = dice.pick(DTYPES)
            case 2:
                row[1] = [
                    dice.number(dice.pick([1, 1, 1, 2, 4, 8])) for _ in range(dice.number() % 4)
                ]
            case 3:
                row[2] = bytes(dice.number(2))
            case 4 if row[2]:
                at = dice.number(2) % len(row[2])
                row[2] = row[2][:at] + dice.take(dice.number() % 16) + row[2][at:]
                row[2] = row[2][: len(row[2]) if dice.number() % 2 else at]
            case 5 if row[2]:
                at, new = dice.number(2) % len(row[2]), dice.take(1 + dice.number() % 16)
                row[2] = (row[2][:at] + new + row[2][at + len(new) :])[: len(row[2])]
    if dice.number() % 16:
        stored[name] = row
    header, body = {"__metadata__": {"facts": json.dumps(good("ans")[0])}}, b""
    for name, (dtype, shape, content) in stored.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    return safetensors_of(json.dumps(header).encode(), body)


def artifact(data: bytes, folder: Path) -> None:
    """What lies behind the checksum.

    0: safetensors, 1: their header, 2: the facts as text, 3: a fact, 4: a tensor of the coded form,
    5: of the plain form, 6: a fact of a checkpoint, 7: a tensor of one, 8: a compressed payload and
    its size.
    """
    dice, compressor, size = Dice(data), "none", None
    mode = dice.number() % 9
    kind = {4: "ans", 6: "checkpoint", 7: "checkpoint"}.get(mode, "zstd")
    facts, tensors = good(kind)
    if mode == 0:
        blob = dice.data
    elif mode == 1:
        raw = safetensors.torch.save(tensors)
        blob = safetensors_of(dice.data, raw[8 + struct.unpack_from("<Q", raw)[0] :])
    elif mode in (2, 3, 6):
        text = dice.data.decode("utf-8", "replace") if mode == 2 else spoilt(facts, dice)
        blob = safetensors.torch.save(tensors, {"facts": text})
    elif mode in (4, 5, 7):
        blob = changed_tensor(tensors, dice)
    else:
        compressor, size = dice.pick(train_gpt.COMPRESSORS), dice.number(dice.pick([1, 2, 4, 8]))
        blob = dice.data
    container(sealed(blob, compressor, size), folder)


# ── Shards and manifests ──────────────────────────────────────────────────────────────────────────
def shard_file(tokens: list[int]) -> bytes:
    return (
        np.array([20240520, 1, len(tokens)] + [0] * 253, "<i4").tobytes()
        + np.array(tokens, "<u2").tobytes()
    )


def data_config(folder: Path) -> train_gpt.Config:
    return train_gpt.Config(
        **SMALL, data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model")
    )


def shard(data: bytes, folder: Path) -> None:
    """0: the file, 1: numbers of its header and then its tokens; as the middle one of three."""
    dice, path = Dice(data), folder / "fineweb_val_000001.bin"
    if dice.number() % 2 == 0:
        content = dice.data
    else:
        good_one = [20240520, 1, len(dice.data) // 2]
        numbers = [dice.number(4) if dice.number() % 4 == 0 else n for n in good_one]
        content = np.array(numbers + [0] * 253, np.uint32).tobytes() + dice.data
    path.write_bytes(content)
    for n, tokens in (0, [1, 2, 3]), (2, [4]):
        (folder / f"fineweb_val_{n:06d}.bin").write_bytes(shard_file(tokens))
    found = read(prepare_data.inspect_shard, path, SMALL["vocab_size"])
    if split := read(train_gpt.Split, data_config(folder), "val"):
        promise(
            split.tokens == 4 + (len(content) - 1024) // 2,
            f"{split.tokens} tokens of {len(content)} bytes",
        )
        taken = read(split.take, 0, min(3 * split.tokens, 1 << 16))
        promise(
            taken is None or (taken.dtype == np.int64 and 0 <= taken.min() <= taken.max() < 16),
            "a token out of range",
        )
        promise(
            not found or (found[0] == split.tokens - 4 and taken is not None),
            "the two readers disagree",
        )
    else:
        promise(found is None, "the two readers disagree")


@functools.cache
def good_dataset() -> tuple[dict[str, bytes], dict]:
    """(files, manifest) of a folder as prepare_data.py writes it."""
    files = {
        "tokenizer.model": b"model",
        "fineweb_val_000000.bin": shard_file([1, 2, 3]),
        "fineweb_train_000000.bin": shard_file([1, 5]),
    }
    entry = {
        name: {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    shards = [
        entry[name] | {"split": name.split("_")[1], "bytes": len(files[name]), "tokens": 2}
        for name in list(files)[1:]
    ]
    return files, {
        "format": "golf-shards",
        "version": 1,
        "tokenizer": entry["tokenizer.model"] | {"vocab_size": 16},
        "shards": shards,
        "splits": {},
        "disjoint": {"shared": 0},
        "settings": {"command": "demo", "train_shards": 1},
    }


LISTING = {
    "datasets": [
        {
            "name": "fineweb10B_sp1024",
            "tokenizer_name": "t",
            "stats": {"files_train": 9, "files_val": 1},
        }
    ],
    "tokenizers": [{"name": "t", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
}


def manifest(data: bytes, folder: Path) -> None:
    """0: the bytes, 1: a part of a good manifest of shards, 2: of the hub's listing.

    In a folder with good files.
    """
    dice, (files, whole) = Dice(data), good_dataset()
    mode = dice.number() % 3
    text = (
        dice.data
        if mode == 0
        else spoilt(whole if mode == 1 else LISTING, dice).encode("utf-8", "replace")
    )
    folder = folder / "a" / "b"
    folder.mkdir(parents=True)
    for name, content in {**files, "manifest.json": text}.items():
        (folder / name).write_bytes(content)
    if mode == 2:
        return check_listing(text)
    if (cfg := data_config(folder)) and (
        found := read(
            train_gpt.check_data, cfg, {n: train_gpt.Split(cfg, n) for n in ("val", "train")}
        )
    ):
        json.dumps(found)
    read(prepare_data.is_finished, folder, whole["settings"])


def check_listing(text: bytes) -> None:
    """As fetch_dataset does."""
    try:
        model, names = prepare_data.published_files(json.loads(text), "sp1024", 1)
    except (
        *REFUSALS,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # it catches these
        return
    promise(
        ".." not in model.split("/") and not model.startswith("/") and len(names) <= 10**6,
        f"{model!r:.100}, {len(names)} files",
    )


# ── Studies ───────────────────────────────────────────────────────────────────────────────────────
STUDY = """title = "A title"
source = "#1"
question = "Which?"
limits = "None."
reference = "plain"
seeds = [1, 2]
metrics = ["val_bpb"]
show = ["scores.documents.bpb"]
compare = [["plain", "qat:val_bpb"]]
[env]
DATA_PATH = "data"
MODEL_DIM = 16
VE_LAYERS = "0,1"
VE_ENABLED = 1
[size.small]
steps = 4
seconds = 2.0
ranks = 1
jobs = 2
threads = 1
seeds = [1]
arms = ["plain", "qat"]
time_arms = ["plain", "qat"]
note = "A note."
env = {NUM_HEADS = 4, TRAIN_SEQ_LEN = 64}
[arm.plain]
QAT_ENABLED = 0
[arm.qat]
QAT_ENABLED = 1
expect = "lower"
published = {val_bpb = [1.2, 1.3]}
[factorial]
qat_enabled = [0, 1]
ema_enabled = [false, true]
""".splitlines()


class Tags(html.parser.HTMLParser):
    """Refuses what no page of ours has: elements, attributes that run or load something."""

    known: ClassVar = set(
        [
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "section",
            "p",
            "span",
            "strong",
            "ul",
            "li",
            "div",
            "table",
            "caption",
            "thead",
            "tr",
            "th",
            "tbody",
            "td",
            "figure",
            "figcaption",
            "svg",
            "defs",
            "g",
            "path",
            "text",
            "use",
            "rect",
            "clippath",
            "tspan",
            "image",
            "pattern",
        ]
    )

    def handle_starttag(self, tag, attrs):
        promise(tag in self.known, f"an element <{tag}>")
        for name, value in attrs:
            loads = name in ("href", "src", "xlink:href", "action") and not (
                value or ""
            ).startswith("#")
            promise(not name.startswith("on") and not loads, f"an attribute {name}={value!r:.100}")


def check_page(page: str) -> None:
    Tags().feed(page)
    page.encode()


def study(data: bytes, folder: Path) -> None:
    """0: the bytes, 1: a good study with a line changed, left out or inserted.

    Then its trials and its empty report.
    """
    dice = Dice(data)
    if dice.number() % 2:
        lines, at = list(STUDY), dice.number() % len(STUDY)
        key, _, value = lines[at].partition(" = ")
        match dice.number() % 5:
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, dice.data.decode("utf-8", "replace"))
            case 2:
                lines[at] = (
                    f"{dice.data.decode('utf-8', 'replace')} = {value}"
                    if value
                    else f"[{fragment(dice)}]"
                )
            case 3:
                other = dice.pick([line.partition(" = ")[2] or "1" for line in STUDY])
                lines[at] = f"{key} = {other}" if value else key
            case _:
                lines[at] = f"{key} = {fragment(dice)}" if value else key
        data = "\n".join(lines).encode()
        name = "study.toml"
    else:
        name, data = (
            dice.pick(["study.toml"] * 5 + ["...toml", "a b.toml", "<b>.toml", "x\x1b.toml"]),
            dice.data,
        )
    (folder / name).write_bytes(data)
    made = read(read_study, folder / name)
    for size, equal in (
        [(size, equal) for size in list(made.sizes)[:2] for equal in ("steps", "time")]
        if made
        else ()
    ):
        if m := read(matrix, made, size, equal):
            check_matrix(m)


def check_matrix(m: Matrix) -> None:
    runs = ROOT / "logs/runs"
    promise(
        m.folder.resolve().parent.parent == runs.resolve() and ".." not in m.folder.parts,
        f"runs in {m.folder}",
    )
    for trial in m.trials[:50]:
        promise(
            trial.folder.parent == m.folder and len(trial.id) < 240 and trial.id.isprintable(),
            f"a run in {trial.folder}",
        )
        promise("\0" not in "".join(trial.env.values()), "NUL in the environment")
        promise(shell(trial, m.size).isprintable(), "a command with control characters")
    found = Finished(m, {}, {m.trials[0].id: "<b>"})
    markdown_report(found)
    check_page(report.study_page(found))


# ── Run folders and submissions ───────────────────────────────────────────────────────────────────
ABOUT = dict(author="A", github_id="a", name="N", blurb="B", track="none: a test")


@functools.cache
def good_results() -> dict[int, dict]:
    """Results of the committed submission, with a script of one line."""
    results = {}
    for seed in (1, 2, 3):
        r = results[seed] = json.loads(
            (ROOT / f"logs/submission/result_seed{seed}.json").read_text()
        )
        r |= dict(
            code_bytes=6,
            total_bytes=6 + r["artifact_bytes"],
            code_sha256=hashlib.sha256(b"x = 1\n").hexdigest(),
        )
        r["data"]["tokenizer_sha256"] = hashlib.sha256(b"model").hexdigest()
    return results


def submission_of(results: dict[int, dict]) -> dict[str, bytes]:
    files = {"train_gpt.py": b"x = 1\n", "requirements.txt": b"", "tokenizer.model": b"model"}
    for seed, r in results.items():
        files |= {
            f"result_seed{seed}.json": json.dumps(r).encode(),
            f"train_seed{seed}.log": f"RESULT val_bpb {r['val_bpb']:.6f} (x)".encode(),
        }
    files["README.md"] = render(results, ABOUT).encode("utf-8", "replace")
    return files | {"submission.json": json.dumps(summarise(results, ABOUT)).encode()}


def submission(data: bytes, folder: Path) -> None:
    """0: a file of a good folder, 1: a part of a JSON file, 2: another file, 3: a result and what
    shows it, 4: the prose of README.md, 5: a run folder's result, 6: its metrics.jsonl.

    The script of the folder is not run.
    """
    dice, results = Dice(data), good_results()
    mode, target = dice.number() % 7, folder / "submission"
    files = dict(submission_of(results)) if mode < 5 else {}
    if mode == 0:
        files[dice.pick(sorted(files))] = dice.data
    elif mode == 1:
        name = dice.pick(["submission.json", "result_seed2.json"])
        files[name] = spoilt(json.loads(files[name]), dice).encode("utf-8", "replace")
    elif mode == 2:
        name = (
            dice.take(1 + dice.number() % 40).replace(b"\0", b"").replace(b"..", b"").strip(b"/")
            or b"x"
        )
        files[os.fsdecode(name)] = dice.data
    elif mode == 3:
        with contextlib.suppress(
            ValueError,
            RecursionError,
            KeyError,
            TypeError,
            AttributeError,
            ZeroDivisionError,
            *REFUSALS,
        ):
            text = spoilt(results[2], dice)
            files = submission_of(
                {1: json.loads(text) | {"seed": 1}}
            )  # (what no builder would write is left as it was)
    elif mode == 4:
        files["README.md"] += b"\n" + dice.data
    else:
        return run_folder(
            folder / "run", spoilt(results[2], dice) if mode == 5 else json.dumps(results[2]), dice
        )
    with contextlib.suppress(OSError, ValueError):  # names that no file can have
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    with mock.patch("ablation.ours.check_script", lambda *_: []):
        found = read(check_submission, target) or []  # nothing of it can be read
    lines = list(map(str, found))
    promise(
        all(line.isprintable() and len(line) <= 6000 for line in lines) and len(lines) < 500,
        f"{lines!r:.300}",
    )


def run_folder(run: Path, text: str, dice: Dice) -> None:
    """A run of a stranger in reports and comparisons."""
    run.mkdir(parents=True)
    (run / "result.json").write_bytes(text.encode("utf-8", "replace"))
    (run / "metrics.jsonl").write_bytes(dice.data)
    if not (r := read(load, run)):
        return
    m = (
        matrix(
            read_study(ROOT / "studies/swa_sums_in_bf16.toml"),
            "small",
            "steps",
            (r["seed"], r["seed"] + 1),
        )
        if 0 <= r["seed"] < 1 << 31
        else None
    )
    runs = {r["seed"]: r | {"arm": "x"}, r["seed"] + 1: r | {"arm": "x", "seed": r["seed"] + 1}}
    read(check_alike, [*runs.values(), good_results()[1] | {"name": "good"}])
    left, right = (
        {seed: v for seed, one in runs.items() if (v := metric(one, "val_bpb")) is not None}
        for _ in range(2)
    )
    figures = ("val_bpb", "val_bpb")
    read(lambda: comparison_row(compare_sides(("a", "b"), figures, left, right)))
    read(record_rule, left, right, r["val_tokens"] / r["val_bytes"])
    if m:
        found = Finished(m, {m.arms[0]: runs, m.arms[1]: runs}, {})
        markdown_report(found)
        notes, tables = report.how_made(found), report.tables(found)
        drawn = (
            list(runs.values())
            if hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] < 8
            else []
        )  # charts take long
        check_page(html_page("title", notes, tables, drawn))


# ── Command ───────────────────────────────────────────────────────────────────────────────────────
TARGETS = {f.__name__: f for f in (container, artifact, shard, manifest, study, submission)}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: good files, and each way of using the bytes."""
    modes = {"artifact": 9, "shard": 2, "manifest": 3, "study": 2, "submission": 7}.get(target, 0)
    found = [
        bytes([mode]) + tail
        for mode in range(modes)
        for tail in (bytes(range(16)), b"\1\2\3\4\x90{}", bytes(8) + b"\xff[1]")
    ]
    compressed = [name for name in train_gpt.COMPRESSORS if name != "none"]
    facts, tensors = good("zstd")
    raw = safetensors.torch.save(tensors, {"facts": json.dumps(facts)})
    return (
        found
        + {
            "container": lambda: (
                [artifact_file(name) for name in compressed]
                + [train_gpt.encode_container(*reversed(good("checkpoint")), "none")]
            ),
            "artifact": lambda: [
                b"\0" + raw,
                b"\1" + raw[8 : 8 + struct.unpack_from("<Q", raw)[0]],
                b"\2" + json.dumps(facts).encode(),
                *(
                    bytes([8, n, 2])
                    + struct.pack("<I", len(raw))
                    + train_gpt.COMPRESSORS[name].compress(raw, 1)
                    for n, name in enumerate(train_gpt.COMPRESSORS)
                ),
            ],
            "shard": lambda: [
                b"\0" + shard_file([1, 2, 15]),
                b"\0" + shard_file([]),
                b"\1\1\1\1" + bytes([1, 0, 2, 0, 15, 0]),
            ],
            "manifest": lambda: [b"\0" + json.dumps(good_dataset()[1]).encode()],
            "study": lambda: (
                [b"\0\0" + path.read_bytes() for path in sorted((ROOT / "studies").glob("*.toml"))]
                + [b"\0\0" + "\n".join(STUDY).encode()]
            ),
            "submission": lambda: [
                bytes([0, n]) + content
                for n, (_, content) in enumerate(sorted(submission_of(good_results()).items()))
            ],
        }[target]()
    )


def replay(target: str, data: bytes) -> None:
    """Finding, or any other exception, unless the target does with this input as it promises."""
    folder = Path(tempfile.mkdtemp(prefix="golf-fuzz-"))
    try:
        (folder / "tmp").mkdir()
        with guard(folder), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            TARGETS[target](data, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    target, *rest = sys.argv[1:] or [""]
    if target not in TARGETS:
        sys.exit(
            f"usage: python tests/fuzz_readers.py {'|'.join(TARGETS)} CORPUS_FOLDER "
            "[options of libFuzzer]"
        )
    torch.set_num_threads(1)
    for corpus in [Path(r) for r in rest if not r.startswith("-")][:1]:
        if not corpus.is_file():
            corpus.mkdir(parents=True, exist_ok=True)
            for n, data in enumerate(seeds(target)):
                (corpus / f"seed{n:03d}").write_bytes(data)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))
    replay(target, b"")  # imports and caches are not the first input's
    atheris.Setup([sys.argv[0], *rest], lambda data: replay(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

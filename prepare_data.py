"""Make the token shards that train_gpt.py reads: from installed documentation, from your text, or
from FineWeb.

    # no download, under a minute
    python prepare_data.py demo
    # any text of yours
    python prepare_data.py text corpus.jsonl.zst --out data/mine
    # the same in the records' spelling of capitals, with the bytes of each validation token
    python prepare_data.py text corpus.jsonl.zst --out data/mine --transform caseops
    # the challenge's own shards, 16 GB
    python prepare_data.py fineweb

A dataset folder holds shards, a SentencePiece tokenizer and, written last, manifest.json, which
states the hash and size of each file. A shard is a header of 256 little-endian int32 (magic,
version, token count, zeros), then that many little-endian uint16 tokens; BOS opens each document
and nothing closes it. A side-car (fineweb_val_bytes_*.bin) is such a shard of the bytes that each
validation token stands for.

The file reads in the order in which data flows: documents -> train or val -> capitals -> tokenizer
-> tokens -> shards -> manifest -> folder -> download -> commands.
"""

import ast
import bz2
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import typing
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import httpx
import huggingface_hub
import numpy as np
import rich.console
import rich.progress
import sentencepiece as spm
import typer
import zstandard
from filelock import FileLock, Timeout
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars

HEADER_INTS = 256
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
TOKEN = np.dtype("<u2")
BOS = 1
SPLITS = ("train", "val")
SIDE_CAR = "val_bytes"  # in place of a split, in the names of these files and in the manifest
# As many as the challenge holds out
MAX_VAL_DOCUMENTS = 50_000
# A container often grants fewer cores than it shows.
DEFAULT_WORKERS = min(os.cpu_count() or 1, 16)


class UserError(typer.TyperException):
    """A mistake the user can mend: one line with the thing, its value and the remedy; exit 2."""


# ---- Progress

PROGRESS_SECONDS = 8  # between two lines where there is no terminal
REFRESH_SECONDS = 0.2  # of the live line on one


def duration(seconds: float) -> str:
    """Write a time as people do: 8 s, 12 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Progress:
    """How far a piece of work is: how many items of how many, and how long it still takes."""

    def __init__(self, what: str, unit: str, total: int | None) -> None:
        self.what = what
        self.unit = unit  # empty: nothing is counted
        self.total = total  # None: not known
        self.share: Callable[[], float | None] | None = None  # done, 0 to 1, where no total says it
        self.done = 0
        self.began = time.monotonic()

    def advance(self) -> None:
        """Count one item."""
        self.done += 1

    def fraction(self) -> float | None:
        """Tell how much is done, 0 to 1; None where that cannot be known."""
        if self.share:
            return self.share()
        return self.done / self.total if self.total else None

    def items(self) -> list[str]:
        """Tell how many items are done, of how many."""
        if not self.unit:
            return []
        of_all = f" of {self.total:,}" if self.total else ""
        return [f"{self.done:,}{of_all} {self.unit}"]

    def line(self) -> str:
        """Say all of it while the work goes on."""
        seconds = time.monotonic() - self.began
        parts = [*self.items(), f"{duration(seconds)} so far"]
        fraction = self.fraction()
        if fraction:
            fraction = min(fraction, 1.0)
            parts.append(f"about {duration(seconds * (1 / fraction - 1))} left")
        return f"{self.what}: {', '.join(parts)}"

    def last_line(self) -> str:
        """Say what has been done, and how long it took."""
        seconds = duration(time.monotonic() - self.began)
        return f"{self.what}: {' '.join(self.items() or ['done'])} in {seconds}"


def say(text: str) -> None:
    """Print a line in one piece: what another thread prints meanwhile stands on its own."""
    print(text + "\n", end="", flush=True)


@contextmanager
def progress(what: str, unit: str = "", total: int | None = None) -> Iterator[Progress]:
    """Show how far a piece of work is; yields what counts its items.

    On a terminal a live bar, below what is printed meanwhile; elsewhere a line from time to time,
    whether or not an item was done, and one at the end.
    """
    state = Progress(what, unit, total)
    console = rich.console.Console()
    if not console.is_terminal:
        with repeated(lambda: say(state.line()), PROGRESS_SECONDS):
            yield state
        say(state.last_line())
        return
    columns = (
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TextColumn("{task.description}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)

        def show() -> None:
            fraction = state.fraction()
            known = {"total": 1.0, "completed": fraction} if fraction else {}
            bar.update(task, description=state.line(), **known)

        with repeated(show, REFRESH_SECONDS):
            yield state
        bar.update(task, description=state.last_line(), total=1.0, completed=1.0)


@contextmanager
def repeated(show: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds, beside what the block does."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ---- Options


class Transform(str, enum.Enum):
    """What becomes of a text before it is cut into tokens."""

    CASEOPS = "caseops"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How documents become shards: all that changes the result, so all of it is in the manifest."""

    tokenizer: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="SentencePiece model; else one is trained."),
    ] = None
    vocab_size: Annotated[
        int, typer.Option(max=2**16, help="Pieces of a tokenizer to be trained.")
    ] = 1024
    transform: Annotated[
        Transform | None,
        typer.Option(help="Capitals as operators before small letters; validation with side-car."),
    ] = None
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of documents held out, chosen by the hash of their text; 50,000 at most.",
        ),
    ] = 0.01
    val_docs: Annotated[
        int | None, typer.Option(min=1, help="Hold out the first N distinct documents instead.")
    ] = None
    shard_tokens: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Tokens in a full shard.")
    ] = 100_000_000
    max_docs: Annotated[
        int | None, typer.Option(min=1, help="Read no more than this many documents.")
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop once both splits together hold this many.")
    ] = None
    name: Annotated[str, typer.Option(help="First part of the shard names.")] = "fineweb"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(Recipe):
    """The options of the text command."""

    inputs: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files, in reading order.")
    ]
    out: Annotated[Path, typer.Option(help="Dataset folder to make.")]
    field: Annotated[
        str, typer.Option(help="Field or column that holds the text (.jsonl, .parquet).")
    ] = "text"
    workers: Annotated[int, typer.Option(min=1, help="Processes; never changes the result.")] = (
        DEFAULT_WORKERS
    )


# ---- Documents of the user's files


class Packing(typing.NamedTuple):
    """A kind of compressed file: one stream after the other, each with a start and an end."""

    new_decoder: Callable  # for one stream: decompress(), eof, unused_data
    padding: int  # zeros between streams come in so many; 0: none may be there
    errors: type[Exception]


def new_zst_decoder():
    """Decode one zstd frame, of a window of any size."""
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


PACKINGS = {
    ".gz": Packing(functools.partial(zlib.decompressobj, wbits=31), 1, zlib.error),
    ".bz2": Packing(bz2.BZ2Decompressor, 0, OSError),
    ".xz": Packing(functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), 4, lzma.LZMAError),
    ".zst": Packing(new_zst_decoder, 0, zstandard.ZstdError),
}
# Small, as a chunk may become a thousand times as large.
CHUNK = 1 << 14


def pieces(file: typing.BinaryIO, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield a file chunk by chunk, and tell `advance` their bytes."""
    while chunk := file.read(CHUNK):
        advance(len(chunk))
        yield chunk


def unpack(chunks: Iterable[bytes], packing: Packing) -> Iterator[bytes]:
    """Decompress every stream of a file, chunk by chunk; parallel compressors write many.

    Raises EOFError for one that is cut or damaged, and for what stands behind a stream and is
    none: Python's own readers of .xz and .zst files take those for the end.
    """
    decoder = None
    streams = 0
    zeros = 0
    for piece in chunks:
        chunk = piece
        while chunk:
            if decoder is None:
                rest = chunk.lstrip(b"\0")
                zeros += len(chunk) - len(rest)
                chunk = rest
                if not chunk:
                    break
                check_padding(zeros, packing, streams)
                zeros = 0
                streams += 1
                decoder = packing.new_decoder()
            try:
                yield decoder.decompress(chunk)
            except packing.errors as error:
                raise EOFError(f"stream {streams}: {error}") from error
            chunk = decoder.unused_data
            if decoder.eof:
                decoder = None
    if decoder:
        raise EOFError(f"it ends inside stream {streams}")
    if not streams:
        raise EOFError("it is empty")
    check_padding(zeros, packing, streams)


def check_padding(zeros: int, packing: Packing, streams: int) -> None:
    """Raise EOFError for zeros that are no padding of this kind of file."""
    if zeros and (not packing.padding or zeros % packing.padding or not streams):
        raise EOFError(f"{zeros} zeros behind stream {streams}")


# Kind of file: how it begins. Frames that a reader of zstd skips count up in their first byte.
BEGINNINGS = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    ".xz": (b"\xfd7zXZ\0",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),
    ".parquet": (b"PAR1\x15",),
    ".zip": (b"PK\x03\x04",),
    ".lz4": (b"\x04\x22\x4d\x18",),
    ".7z": (b"7z\xbc\xaf",),
    ".arrow": (b"ARROW1\0\0",),
    ".avro": (b"Obj\x01",),
    ".pdf": (b"%PDF-",),
}
BEGINNING = 16  # bytes that tell all of them
# UTF-32 first, as its mark begins like that of UTF-16. Without one the zeros of two letters tell.
ENCODINGS = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    "UTF-16": re.compile(rb"\xff\xfe|\xfe\xff"),
    "UTF-32LE": re.compile(rb"([^\0]\0\0\0){2}"),
    "UTF-32BE": re.compile(rb"(\0\0\0[^\0]){2}"),
    "UTF-16LE": re.compile(rb"([^\0]\0){2}"),
    "UTF-16BE": re.compile(rb"(\0[^\0]){2}"),
}
UTF8_MARK = b"\xef\xbb\xbf"


def kind_of(start: bytes) -> str:
    """Tell the kind of a file from its first bytes; "" for one without such a mark, as text."""
    for kind, beginnings in BEGINNINGS.items():
        if start.startswith(beginnings):
            return kind
    return ""


def check_kind(path: Path) -> None:
    """Raise UserError when a file is of another kind than its name says; pipes are not opened."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        found = kind_of(file.read(BEGINNING))
    if found and found != path.suffix:
        raise UserError(f"{path} holds {found} data: rename it so that its name ends in {found}")


def check_text(path: Path, start: bytes) -> None:
    """Raise UserError when this start of a file, decompressed, is none of UTF-8 text."""
    found = kind_of(start)
    if found:
        raise UserError(f"{path} holds {found} data within: unpack it")
    for name, beginning in ENCODINGS.items():
        if beginning.match(start):
            raise UserError(f"{path} is {name}: convert it, with iconv -f {name} -t UTF-8")


def read_chunks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield what a plain or compressed file holds, without the mark that some put before UTF-8.

    It tells `advance` how many bytes of the file it has read.
    """
    with path.open("rb") as file:
        chunks = pieces(file, advance)
        if path.suffix in PACKINGS:
            chunks = unpack(chunks, PACKINGS[path.suffix])
        start = b""
        # Enough to tell what it is
        while len(start) < BEGINNING and (chunk := next(chunks, b"")):
            start += chunk
        check_text(path, start)
        yield start.removeprefix(UTF8_MARK)
        yield from chunks


def read_lines(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the lines of a plain or compressed file without their newlines.

    Raises UserError when it is damaged.
    """
    rest = []
    try:
        for chunk in read_chunks(path, advance):
            first, *others = chunk.split(b"\n")
            rest.append(first)
            if others:
                yield b"".join(rest)
                yield from others[:-1]
                rest = others[-1:]
    except (EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): get a whole copy") from error
    if any(rest):
        yield b"".join(rest)


def is_not_blank(line: bytes) -> bool:
    """Tell a line with text from one of white space alone."""
    return bool(line.strip())


def read_txt(path: Path, field: str, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the blocks of text between blank lines: each is one document, and has no fields."""
    for has_text, lines in itertools.groupby(read_lines(path, advance), key=is_not_blank):
        try:
            block = b"\n".join(lines).decode()
            if "\0" in block:
                raise UserError(f"{path} is no text (it holds zero bytes): give plain UTF-8 text")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 ({error}): convert it, for example with iconv"
            ) from error
        if has_text:
            yield block


# What json.loads makes of the other kinds of values
JSON_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
JSON_KINDS |= {dict: "an object", str: "a string", type(None): "null"}


def text_field(line: bytes, field: str) -> str:
    """Return the text field of a line of JSON. Raises ValueError that says what is wrong."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error}): convert it, for example with iconv") from error
    except RecursionError as error:
        raise ValueError("is JSON nested too deeply to be read: leave that line out") from error
    except ValueError as error:
        raise ValueError(f"is no JSON ({error}): give one whole object a line") from error
    if not isinstance(found, dict):
        kind = JSON_KINDS[type(found)]
        raise ValueError(f"is {kind} and no JSON object: give one object a line")
    if field not in found:
        fields = ", ".join(map(repr, itertools.islice(found, 9))) or "none"
        raise ValueError(f"has no field {field!r} (but {fields}): name one with --field")
    text = found[field]
    if not isinstance(text, str):
        kind = JSON_KINDS[type(text)]
        raise ValueError(
            f"has {kind} in the field {field!r}, not text: leave that line out, "
            "or name another with --field"
        )
    return text


def read_jsonl(path: Path, field: str, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the text field of the JSON object on each line."""
    for number, line in enumerate(read_lines(path, advance), start=1):
        if not line.strip():
            continue
        try:
            text = text_field(line, field)
        except ValueError as error:
            raise UserError(f"{path}:{number} {error}") from error
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8 form.
        yield text.encode(errors="replace").decode()


# Bytes are taken for UTF-8: not every writer marks its text so.
TEXT_COLUMN = re.compile(
    r"(dictionary<values=)?(large_)?(string|binary)(_view)?(, .*>)?|fixed_size_binary\[\d+\]"
)


@contextmanager
def open_parquet(path: Path, field: str) -> Iterator:
    """Yield a Parquet file with that text column.

    Raises UserError when it is none, has no such column, or is damaged.
    """
    import pyarrow.parquet  # optional: only Parquet input needs it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kinds = {column.name: str(column.type) for column in file.schema_arrow}
            texts = [name for name, kind in kinds.items() if TEXT_COLUMN.fullmatch(kind)]
            remedy = f"name one of {texts} with --field"
            if file.schema_arrow.names.count(field) != 1:
                raise UserError(f"{path} has no column {field!r}, or two: {remedy}")
            if field not in texts:
                kind = kinds[field]
                raise UserError(f"{path} has {kind} in its column {field!r}, not text: {remedy}")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is no readable Parquet file ({error}): get a whole copy"
        ) from error


def read_parquet(path: Path, field: str, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the values of one text column; rows without one are left out, and counted aloud."""
    rows = 0
    nulls = 0
    with open_parquet(path, field) as file:
        for batch in file.iter_batches(columns=[field]):
            try:
                texts = [as_text(value) for value in batch.column(0).to_pylist()]
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} has a value in its column {field!r} that is not UTF-8 ({error}), "
                    f"in row {rows + 1} or later: convert it"
                ) from error
            advance(path.stat().st_size * len(texts) // file.metadata.num_rows)
            yield from filter(None, texts)
            rows += len(texts)
            nulls += texts.count(None)
    if nulls:
        say(f"{path}: left out {nulls:,} of {rows:,} rows, which have null in {field!r}")


def as_text(value: str | bytes | None) -> str | None:
    """Read bytes as UTF-8."""
    return value.decode() if isinstance(value, bytes) else value


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def reader_of(path: Path) -> Callable[[Path, str, Callable[[int], None]], Iterator[str]]:
    """Choose the reader by suffix."""
    compressed = path.suffix in PACKINGS
    reader = READERS.get(Path(path.stem).suffix if compressed else path.suffix)
    if reader is None or (compressed and reader is read_parquet):
        raise UserError(
            f"{path} is of no known kind: "
            "give .txt or .jsonl, plain or as .gz .bz2 .xz .zst, or .parquet"
        )
    return reader


def check_input(path: Path, field: str) -> None:
    """Raise UserError at once for a file that would fail hours into a long run."""
    reader = reader_of(path)
    check_kind(path)
    if reader is read_parquet and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} needs pyarrow, which is not installed: pip install pyarrow")
    if reader is read_parquet:
        with open_parquet(path, field):
            pass


class TextDocuments:
    """The documents of some files, in order; those of white space alone are left out.

    Each call starts a new pass, which streams them. `share` tells how far the newest one is.
    """

    def __init__(self, inputs: list[Path], field: str) -> None:
        self.inputs = inputs
        self.field = field
        self.bytes = sum(path.stat().st_size for path in inputs)
        if not all(path.is_file() for path in inputs):  # a pipe: nobody knows how much will come
            self.bytes = 0
        self.bytes_read = 0
        self.documents_read = 0

    def __call__(self) -> Iterator[str]:
        self.bytes_read = 0
        self.documents_read = 0
        for path in self.inputs:
            before = self.documents_read
            for text in reader_of(path)(path, self.field, self.advance):
                if text.strip():
                    self.documents_read += 1
                    yield text
            if self.documents_read == before:
                say(f"WARNING: {path} holds no document with text")

    def advance(self, size: int) -> None:
        """Count bytes of a file that were read."""
        self.bytes_read += size

    def share(self, documents: int) -> float | None:
        """Tell how much of the files so many documents are, 0 to 1, of those that were read."""
        if not self.bytes or not self.documents_read:
            return None
        return self.bytes_read / self.bytes * documents / self.documents_read


# ---- Documents of the demo: the English in Python's own documentation

DEMO_PACKAGES = ("huggingface_hub", "mpmath", "networkx", "numpy", "sympy", "torch")
# Tests are code with few words; site-packages lies inside the standard library's folder.
DEMO_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
}
DEMO_MIN_CHARACTERS = 300
DEMO_VAL_FRACTION = 0.02
DEMO_VAL_CHARACTERS = 400_000
# fmt: off
STOP_WORDS = frozenset({
    "the", "of", "to", "and", "a", "in", "is", "for", "that", "it", "as",
    "be", "this", "with", "by", "or", "are", "an", "from", "if", "on", "not",
})
# fmt: on
# English prose has about a third, code and tables of output next to none.
STOP_WORD_SHARE = 0.12


def demo_versions() -> dict[str, str]:
    """Return the version of everything that shapes the demo dataset."""
    try:
        versions = {
            name: importlib.metadata.version(name) for name in (*DEMO_PACKAGES, "sentencepiece")
        }
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed and has demo text: pip install -r requirements.txt"
        ) from error
    return {"python": platform.python_version(), **versions}


def demo_files() -> list[Path]:
    """List the modules of the standard library and of DEMO_PACKAGES without importing any."""
    roots = [sysconfig.get_path("stdlib")]
    for package in DEMO_PACKAGES:
        roots += importlib.util.find_spec(package).submodule_search_locations
    return [
        path
        for root in roots
        for path in sorted(Path(root).rglob("*.py"))
        if DEMO_SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]


def is_demo_document(text: str) -> bool:
    """Tell prose of some length from remarks and from code, by its share of little words."""
    words = text.lower().split()
    english = sum(word in STOP_WORDS for word in words) >= STOP_WORD_SHARE * len(words)
    return len(text) >= DEMO_MIN_CHARACTERS and english


def module_docstrings(path: Path) -> list[str]:
    """Return the docstrings of one module, its classes and its functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a template, or kept for a Python of long ago
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)
    ]


def demo_documents(workers: int) -> list[str]:
    """Return the distinct demo documents of useful length, shuffled by their hashes.

    The order, unlike that of folders, mixes the packages in every shard and is the same on every
    machine.
    """
    files = demo_files()
    texts = []
    with worker_pool(workers) as pool, progress("reading", "modules", len(files)) as state:
        for docstrings in pool.map(module_docstrings, files, chunksize=32):
            texts += docstrings
            state.advance()
    texts += topics.values()
    keyed = {document_key(text): text for text in texts if is_demo_document(text)}
    return [keyed[key] for key in sorted(keyed)]


class DemoDocuments:
    """A list of documents: each call starts a new pass, and `share` tells how far one is."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __call__(self) -> Iterator[str]:
        return iter(self.texts)

    def share(self, documents: int) -> float:
        """Tell how much of all so many documents are, 0 to 1."""
        return documents / len(self.texts)


def demo_val_fraction(documents: list[str]) -> float:
    """Return the fraction of key space below which lie 2 % of the text, but at most 400 kB."""
    sizes = np.cumsum([len(text) for text in documents])
    budget = min(DEMO_VAL_FRACTION * sizes[-1], DEMO_VAL_CHARACTERS)
    first_of_train = min(int(np.searchsorted(sizes, budget)) + 1, len(documents) - 1)
    return key_fraction(document_key(documents[first_of_train]))


# ---- Train or val

NORMALIZER = spm.SentencePieceNormalizer(rule_name="nmt_nfkc", remove_extra_whitespaces=True)


def document_key(text: str) -> bytes:
    """Hash a text as the tokenizer will see it: folded spaces, one form for each character.

    Returns 16 bytes.
    """
    return key_of(NORMALIZER.normalize(text))


def key_of(normalised: str) -> bytes:
    """Hash a text that is normalised already."""
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()


def key_fraction(key: bytes) -> float:
    """Place a key in [0, 1). Six bytes fit a float exactly, so no key rounds up to 1."""
    return int.from_bytes(key[:6], "big") / 2**48


class Splitter:
    """Send each distinct document to "train" or "val", the same way on every run.

    It remembers every key: about 100 bytes of memory a document, 1.5 GB for the 15 million of
    FineWeb's 10B sample.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.keys: dict[str, set[bytes]] = {split: set() for split in SPLITS}

    def split_of(self, key: bytes) -> str | None:
        """Return the side of the document with this key, or None for one seen before."""
        if any(key in keys for keys in self.keys.values()):
            return None
        if self.recipe.val_docs is not None:
            held_out = len(self.keys["val"]) < self.recipe.val_docs
        else:
            held_out = (
                key_fraction(key) < self.recipe.val_fraction
                and len(self.keys["val"]) < MAX_VAL_DOCUMENTS
            )
        split = "val" if held_out else "train"
        self.keys[split].add(key)
        return split


def in_split(documents: Iterable[str], recipe: Recipe, split: str) -> Iterator[str]:
    """Yield the distinct documents of one side."""
    splitter = Splitter(recipe)
    for text in documents:
        if splitter.split_of(document_key(text)) == split:
            yield text


# ---- Capitals


class CaseOps:
    """Text in small letters, with operators that say which were capitals, and back.

    What:   of a longest run of ASCII letters one that begins with a capital gets TITLE before it,
            one of two or more capitals alone ALLCAPS, and each further capital of any other NEXT.
            An operator that stands in the text gets ESCAPE.
    Why:    "The" and "the" become one word of the vocabulary: -4 to -6 mBPB in the records, with
            18 % more tokens than without.
    Source: #1729 (lossless_caps_caseops_v1); --transform caseops.
    Care:   a tokenizer normalises, and does so with "E" and a loose accent only when TITLE stands
            before "e": what encode gets should be normalised. decode takes any text, as a model may
            write one: an operator in front of nothing that it could change does nothing. It never
            changes the number of bytes, so that an operator has none; a "J" with a loose caron
            therefore stays small.
    """

    OPERATORS = "\ue001\ue002\ue003\ue004"
    TITLE, ALLCAPS, NEXT, ESCAPE = OPERATORS
    # a whole run that has a capital; one without stays as it is
    RUN = re.compile(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{OPERATORS}]")
    MARKED = re.compile(
        f"{ESCAPE}(?P<literal>.?)|{ALLCAPS}(?P<word>[a-z]*)"
        f"|[{TITLE}{NEXT}](?P<letter>[^{OPERATORS}]?)",
        re.DOTALL,
    )

    @classmethod
    def encode(cls, text: str) -> str:
        """Write capitals as small letters behind operators."""
        return cls.RUN.sub(cls.marked, text)

    @classmethod
    def marked(cls, match: re.Match) -> str:
        """Encode one run of letters, or one operator that stands in the text."""
        run = match[0]
        small = run.lower()
        if run in cls.OPERATORS:
            return cls.ESCAPE + run
        if len(run) > 1 and run.isupper():
            return cls.ALLCAPS + small
        first = cls.TITLE if run[0].isupper() else ""
        rest = [cls.NEXT * a.isupper() + b for a, b in zip(run[1:], small[1:], strict=True)]
        return first + small[0] + "".join(rest)

    @classmethod
    def decode(cls, text: str) -> str:
        """Carry out the operators; never raises."""
        return cls.MARKED.sub(cls.unmarked, text)

    @staticmethod
    def unmarked(match: re.Match) -> str:
        """Carry out one operator."""
        if match["word"]:
            return match["word"].upper()
        letter = match["letter"] or ""
        capital = letter.upper()
        if len(capital.encode()) != len(letter.encode()):
            capital = letter
        return (match["literal"] or "") + capital


class Codec:
    """Documents as tokens and back, through a tokenizer; with operators if it has such pieces."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        ids = {tokenizer.piece_to_id(operator) for operator in CaseOps.OPERATORS}
        self.caseops = len(ids - {tokenizer.unk_id()}) == len(CaseOps.OPERATORS)

    def encode(self, text: str) -> list[int]:
        """Cut a document into tokens, without BOS."""
        if self.caseops:
            text = CaseOps.encode(NORMALIZER.normalize(text))
        return self.tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text that tokens stand for."""
        text = self.tokenizer.decode(tokens)
        return CaseOps.decode(text) if self.caseops else text


def check_transform(tokenizer: Path, transform: Transform | None) -> None:
    """Raise UserError for a tokenizer with operators and no transform, or the other way round."""
    caseops = Codec(load_tokenizer(tokenizer)).caseops
    if transform and not caseops:
        raise UserError(
            f"{tokenizer} has no pieces for the four operators of --transform caseops: give "
            "another --tokenizer, or none, and one is trained"
        )
    if caseops and not transform:
        raise UserError(f"{tokenizer} is one of CaseOps: add --transform caseops")


# ---- Tokenizer

# More text moves few of 1,024 merges; 10 MB train in two seconds.
TOKENIZER_SAMPLE_CHARACTERS = 50_000_000


def tokenizer_sample(documents: Iterable[str], recipe: Recipe) -> Iterator[str]:
    """Yield the first training documents, so that no validation text shapes the tokenizer."""
    characters = 0
    for text in in_split(documents, recipe, "train"):
        yield text
        characters += len(text)
        if characters >= TOKENIZER_SAMPLE_CHARACTERS:
            return


def train_tokenizer(texts: list[str], vocab_size: int, transform: Transform | None = None) -> bytes:
    """Train a BPE model with the settings of the challenge's own and return the file's bytes.

    The texts are a list because SentencePiece takes an error in an iterator for its end.
    """
    operators = ""
    if transform:
        operators = CaseOps.OPERATORS
        texts = [CaseOps.encode(NORMALIZER.normalize(text)) for text in texts]
    if not texts:
        raise UserError(
            "no document is left to train a tokenizer on: lower --val-fraction or give --tokenizer"
        )
    model = BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(operators),
            # The default passes over every document of more than 4 kB.
            max_sentence_length=2**30,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].split("] ")[-1]
        raise UserError(f"--vocab-size {vocab_size} does not suit this text: {reason}") from error
    return model.getvalue()


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """Load a model. Raises UserError when it is none, or its ids do not fit the shards."""
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is no SentencePiece model: give another --tokenizer") from error
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > 2 ** (8 * TOKEN.itemsize):
        raise UserError(
            f"{path} has BOS id {tokenizer.bos_id()} and {tokenizer.vocab_size()} pieces, "
            f"shards need id {BOS} and at most 65536: give another --tokenizer"
        )
    return tokenizer


# ---- Do the tokens give their text back?

WORD_MARK = "\u2581"
# White space where models differ; a character of no text; letters, accents, another script.
PROBES = (" leads", "two  spaces", "ends ", "a \U000f0000", "The English, naïve \u65e5\u672c")


def byte_table(model: Path):
    """Return train_gpt.py's count of bytes: what is written here is scored by that rule there.

    It is imported late, as it needs torch, which the workers do without.
    """
    import train_gpt

    size = load_tokenizer(model).vocab_size()
    return train_gpt.ByteTable(train_gpt.Config(tokenizer_path=str(model), vocab_size=size))


def misfit(table) -> str:
    """Say why the tokens of this table's tokenizer do not give back their text; "" where they do.

    The text is as the tokenizer normalises it; what that loses is comes_back's to tell.
    """
    odd = np.flatnonzero(table.inner_space)
    if len(odd):
        return (
            f"its piece {table.sp.id_to_piece(int(odd[0]))!r} has a space behind its first "
            f"character, for which the challenge's rule counts 3 bytes ({len(odd)} pieces do)"
        )
    codec = Codec(table.sp)
    for probe in PROBES:
        tokens = np.array(codec.encode(probe))
        decoded = codec.decode(tokens.tolist())
        if table.unknown[tokens].any():
            return "it has no byte fallback, so that what it has no piece for is lost"
        # A model may put a space before the first word; decoding takes it away.
        text = table.sp.normalize(probe).replace(WORD_MARK, " ")
        if decoded not in (text, text.removeprefix(" ")):
            return f"its tokens of {probe!r} give back {decoded!r}"
        size = len(decoded.encode())
        counted = table.count_document(tokens)
        if size != counted:
            return (
                f"{decoded!r} has {size} bytes; by the challenge's rule its tokens have {counted}"
            )
    return ""


def refuse_misfit(name: Path, table, documents: Iterable[str]) -> None:
    """Raise UserError for a tokenizer whose scores would be wrong, and say what it loses here."""
    reason = misfit(table)
    if not reason:
        return
    lost = ""
    if not len(np.flatnonzero(table.inner_space)):
        lost = loss_of(table, documents)
    raise UserError(
        f"{name} is unfit: {reason}; BPB would be wrong{lost}: give another --tokenizer "
        "(byte fallback, spaces only at the start of pieces, no extra spaces)"
    )


def loss_of(table, documents: Iterable[str]) -> str:
    """Say how much of the first thousand validation documents is lost in their tokens."""
    lost = []
    codec = Codec(table.sp)
    sizes = np.zeros(3, int)
    number = 0
    for number, text in enumerate(itertools.islice(documents, 1000), start=1):
        tokens = np.array(codec.encode(text), int)
        if table.unknown[tokens].any():
            lost.append(number)
        normalised = NORMALIZER.normalize(text)
        sizes += len(text.encode()), len(normalised.encode()), table.count_document(tokens)
    if not lost:
        return ""
    raw, normalised, counted = sizes
    return (
        f" (unknown pieces in {len(lost):,} of {number:,} validation documents, first in number "
        f"{lost[0]:,}: of {raw:,} bytes, {normalised:,} normalised, {counted:,} would count)"
    )


def comes_back(normalised: str, decoded: str) -> bool:
    """Tell whether tokens lose no more of a text than those of the challenge's own tokenizer.

    That one folds white space and compatibility forms, and takes the word mark for a space:
    what it keeps of the text is `normalised`.
    """
    return decoded == normalised or NORMALIZER.normalize(decoded) == normalised


def print_changes(table) -> None:
    """Say before the hours of encoding what the tokenizer changes."""
    changes = table.altered()
    for character, becomes in changes[:1]:
        print(
            f"WARNING: the tokenizer makes {character!r} {becomes!r}, and changes {len(changes):,} "
            "characters in all that the challenge's own keeps"
        )


def print_losses(splits: dict[str, dict]) -> None:
    """Say aloud which splits have documents that do not come back from their tokens."""
    for split, totals in splits.items():
        if totals.get("altered_documents"):
            print(
                f"WARNING: {totals['altered_documents']:,} of {totals['documents']:,} documents "
                f"in {split} do not come back from their tokens: the tokenizer folds case, or "
                "loses other text, so that no score on them is one for the leaderboard"
            )


# ---- Tokens

BATCH_DOCUMENTS = 64


class Encoded(typing.NamedTuple):
    """A document as tokens."""

    key: bytes
    tokens: np.ndarray  # uint16, BOS first
    utf8_bytes: int  # of the text that they stand for
    raw_bytes: int  # of the document
    altered: bool  # it does not come back from the tokens


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Start processes that share nothing with this one: no thread is caught in a fork.

    Ctrl-C ends them at once, wherever they are.
    """
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )


@functools.cache
def worker_codec(model: Path) -> Codec:
    """Load a model once: a worker serves one run."""
    return Codec(load_tokenizer(model))


def encode_batch(model: Path, texts: list[str]) -> list[Encoded]:
    """Encode documents in a worker.

    Bytes are those of the decoded text, because that is what a score divides by.
    """
    codec = worker_codec(model)
    encoded = []
    for text in texts:
        tokens = codec.encode(text)
        decoded = codec.decode(tokens)
        normalised = NORMALIZER.normalize(text)
        encoded.append(
            Encoded(
                key=key_of(normalised),
                tokens=np.array([BOS, *tokens], dtype=TOKEN),
                utf8_bytes=len(decoded.encode()),
                raw_bytes=len(text.encode()),
                altered=not comes_back(normalised, decoded),
            )
        )
    return encoded


def encode(
    documents: Iterator[str], model: Path, workers: int, pool: ProcessPoolExecutor
) -> Iterator[Encoded]:
    """Encode a stream of documents in parallel and yield the results in the order of the input.

    At most four batches a worker are under way, whatever the size of the input: Executor.map would
    read it all first.
    """
    under_way: deque = deque()
    while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
        under_way.append(pool.submit(encode_batch, model, batch))
        if len(under_way) >= 4 * workers:
            yield from under_way.popleft().result()
    while under_way:
        yield from under_way.popleft().result()


# ---- Shards


def file_sha256(path: Path) -> str:
    """Hash a file of any size; returns 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def shard_entry(path: Path, split: str, tokens: int) -> dict:
    """Describe one finished shard for the manifest."""
    size = path.stat().st_size
    return {
        "file": path.name,
        "split": split,
        "sha256": file_sha256(path),
        "bytes": size,
        "tokens": tokens,
    }


# What the manifest sums up for each split; see Encoded.
TOTALS = ("documents", "tokens", "utf8_bytes", "raw_bytes", "altered_documents")


class ShardWriter:
    """Cut one split's tokens into shards of exactly `shard_tokens`, the last one shorter.

    It holds one in memory.
    """

    def __init__(self, folder: Path, split: str, recipe: Recipe) -> None:
        self.folder = folder
        self.split = split
        self.recipe = recipe
        self.buffer = bytearray()
        self.shards: list[dict] = []
        self.totals = dict.fromkeys(TOTALS, 0)

    def add(self, document: Encoded) -> None:
        """Append one document."""
        self.buffer += document.tokens.tobytes()
        self.totals["documents"] += 1
        self.totals["tokens"] += len(document.tokens)
        self.totals["utf8_bytes"] += document.utf8_bytes
        self.totals["raw_bytes"] += document.raw_bytes
        self.totals["altered_documents"] += document.altered
        shard_bytes = self.recipe.shard_tokens * TOKEN.itemsize
        while len(self.buffer) >= shard_bytes:
            self.write(self.buffer[:shard_bytes])
            del self.buffer[:shard_bytes]

    def close(self) -> None:
        """Write what is left."""
        if self.buffer:
            self.write(self.buffer)

    def write(self, payload: bytearray) -> None:
        """Write one shard whose tokens are `payload`."""
        path = self.folder / f"{self.recipe.name}_{self.split}_{len(self.shards):06d}.bin"
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, len(payload) // TOKEN.itemsize
        with path.open("wb") as file:
            file.write(header.tobytes())
            file.write(payload)
        self.shards.append(shard_entry(path, self.split, int(header[2])))
        say(f"wrote {path.name}: {header[2]:,} tokens")


def side_car(table, tokens: np.ndarray) -> np.ndarray:
    """The bytes of the text that each token of a document stands for, BOS included.

    An operator has none. Of a character in byte pieces the last one has all: the others alone
    stand for no character.
    """
    sizes = np.append(0, table.count(tokens))
    byte = table.byte[tokens]
    value = np.where(byte, tokens.astype(int) - int(np.argmax(table.byte)), 0)
    goes_on = byte & (value & 0xC0 == 0x80)
    last = byte & ~np.append(goes_on[1:], False)
    sizes[byte] = 0
    sizes[last] = np.flatnonzero(last) - np.flatnonzero(byte & ~goes_on) + 1
    return sizes


Documents = TextDocuments | DemoDocuments


def write_dataset(
    folder: Path, documents: Documents, recipe: Recipe, workers: int, settings: dict
) -> None:
    """Fill an empty folder with tokenizer, shards and manifest.

    The tokenizer takes one pass over the documents, the encoding another.
    """
    model = folder / "tokenizer.model"
    splitter = Splitter(recipe)
    files = [*SPLITS, SIDE_CAR] if recipe.transform else SPLITS
    writers = {split: ShardWriter(folder, split, recipe) for split in files}
    with worker_pool(workers) as pool:
        if recipe.tokenizer:
            # Refuses an unfit one here, before any worker starts.
            check_transform(recipe.tokenizer, recipe.transform)
            shutil.copyfile(recipe.tokenizer, model)
        else:
            make_tokenizer(model, documents, recipe, pool)

        with progress("trying the tokenizer"):
            table = byte_table(model)
            held_out = in_split(itertools.islice(documents(), recipe.max_docs), recipe, "val")
            refuse_misfit(recipe.tokenizer or model, table, held_out)
        print_changes(table)

        encoded = encode(itertools.islice(documents(), recipe.max_docs), model, workers, pool)
        write_splits(encoded, splitter, writers, table, documents)

    splits = {split: writers[split].totals for split in SPLITS}
    refuse_empty_splits(splits, recipe)
    shards = [entry for writer in writers.values() for entry in writer.shards]
    rest = {"splits": splits, "disjoint": proof_of_disjoint(splitter), "settings": settings}
    write_manifest(folder, model, shards, rest)


def make_tokenizer(
    model: Path, documents: Documents, recipe: Recipe, pool: ProcessPoolExecutor
) -> None:
    """Write a tokenizer of the first documents, trained by a worker.

    SentencePiece holds the interpreter until it is done, so that this process would be silent.
    """
    texts = []
    with progress("reading for the tokenizer", "documents") as state:
        source = itertools.islice(documents(), recipe.max_docs)
        for text in tokenizer_sample(source, recipe):
            texts.append(text)
            state.advance()
    with progress(f"training a tokenizer of {recipe.vocab_size:,} pieces"):
        model.write_bytes(
            pool.submit(train_tokenizer, texts, recipe.vocab_size, recipe.transform).result()
        )


def write_splits(
    encoded: Iterable[Encoded],
    splitter: Splitter,
    writers: dict[str, ShardWriter],
    table,
    documents: Documents,
) -> None:
    """Send each distinct document to the writer of its split, up to --max-tokens.

    Raises UserError for one whose tokens do not count the bytes of their text: misfit has probed
    the tokenizer, but not every text.
    """
    limit = splitter.recipe.max_tokens
    with progress("encoding", "documents") as state:
        state.share = functools.partial(share_encoded, state, splitter.recipe, writers, documents)
        for number, document in enumerate(encoded, start=1):
            split = splitter.split_of(document.key)
            if split:
                counted = table.count(document.tokens).sum()
                if counted != document.utf8_bytes:
                    raise UserError(
                        f"document {number:,} has {document.utf8_bytes:,} bytes when decoded; by "
                        f"the challenge's rule its tokens have {counted:,}: leave that document "
                        "out, or give another --tokenizer"
                    )
                writers[split].add(document)
                if split == "val" and SIDE_CAR in writers:
                    sizes = side_car(table, document.tokens).astype(TOKEN)
                    writers[SIDE_CAR].add(document._replace(tokens=sizes))
            state.advance()
            if limit and tokens_in(writers) >= limit:
                break
    for writer in writers.values():
        writer.close()


def tokens_in(writers: dict[str, ShardWriter]) -> int:
    """Count the tokens of both splits."""
    return sum(writer.totals["tokens"] for writer in writers.values() if writer.split in SPLITS)


def share_encoded(
    state: Progress, recipe: Recipe, writers: dict[str, ShardWriter], documents: Documents
) -> float | None:
    """Tell how much is encoded, 0 to 1, by whichever comes first: all documents, or a limit."""
    shares = [documents.share(state.done) or 0.0]
    if recipe.max_docs:
        shares.append(state.done / recipe.max_docs)
    if recipe.max_tokens:
        shares.append(tokens_in(writers) / recipe.max_tokens)
    return max(shares)


def refuse_empty_splits(splits: dict[str, dict], recipe: Recipe) -> None:
    """Raise UserError for a split without a document that the recipe did not ask to be empty."""
    empty = [split for split in SPLITS if not splits[split]["documents"]]
    if len(empty) == 2:
        raise UserError("the input holds no document with text: give other files")
    if empty and recipe.val_docs is None and 0 < recipe.val_fraction < 1:
        raise UserError(
            f"--val-fraction {recipe.val_fraction} leaves {empty[0]} without a document: change it"
        )


def proof_of_disjoint(splitter: Splitter) -> dict:
    """What the manifest says of the separation of the splits."""
    train = splitter.keys["train"]
    val = splitter.keys["val"]
    return {
        "method": "by document: blake2b of the nmt_nfkc text decides the side, "
        "repeated texts are dropped",
        "train_documents": len(train),
        "val_documents": len(val),
        "shared": len(train & val),
    }


# ---- Manifest and folder

MANIFEST = "manifest.json"
FORMAT = "golf-shards"


def write_manifest(folder: Path, model: Path, shards: list[dict], rest: dict) -> None:
    """Write manifest.json in one step, so that a reader sees all of it or none."""
    manifest = {
        "format": FORMAT,
        "version": 1,
        "tokenizer": {
            "file": Path(os.path.relpath(model, folder)).as_posix(),
            "sha256": file_sha256(model),
            "vocab_size": load_tokenizer(model).vocab_size(),
        },
        "shards": shards,
        **rest,
    }
    partial = sibling(folder / MANIFEST, "partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)
    for split, totals in manifest["splits"].items():
        print(f"{split}: {totals['tokens']:,} tokens of {totals['documents']:,} documents")
    print_losses(manifest["splits"])


def is_of_our_form(manifest: dict) -> bool:
    """Tell whether what is read of a manifest has the types that it is used with."""
    names_and_hashes = []
    for entry in (manifest["tokenizer"], *manifest["shards"]):
        names_and_hashes += [entry["file"], entry["sha256"]]
    # Manifests of before say nothing of altered documents.
    numbers = []
    for totals in dict(manifest["splits"]).values():
        numbers += [totals["documents"], dict(totals).get("altered_documents")]
    return (
        manifest["format"] == FORMAT
        and isinstance(manifest["settings"], dict)
        and all(isinstance(text, str) for text in names_and_hashes)
        and all(isinstance(number, int | None) for number in numbers)
    )


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of a finished folder, None for one that is missing or empty.

    Raises UserError for any other folder.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if is_of_our_form(manifest):
            return manifest
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UserError(
        f"{folder} holds files but no {MANIFEST} of this script: choose another --out or empty it"
    )


def is_finished(folder: Path, settings: dict) -> bool:
    """Tell whether the folder already holds what `settings` make, unchanged.

    Raises UserError when it was made with other settings or a file has changed: nothing is ever
    overwritten.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    old = manifest["settings"]
    for key in {**settings, **old}:
        if settings.get(key) != old.get(key):
            was = json.dumps(old.get(key))
            wanted = json.dumps(settings.get(key))
            raise UserError(
                f"{folder} was made with {key} = {was}, not {wanted}: "
                "choose another --out or delete that folder"
            )

    # By name, from lists of two folders: a name that leads elsewhere is never opened.
    there = {}
    for pattern in ("*", "../../tokenizers/*"):
        for path in folder.glob(pattern):
            if path.is_file():
                there[path.relative_to(folder).as_posix()] = path
    entries = [manifest["tokenizer"], *manifest["shards"]]
    with progress("comparing with their hashes", "files", len(entries)) as state:
        for entry in entries:
            name = entry["file"]
            if name not in there or file_sha256(there[name]) != entry["sha256"]:
                raise UserError(
                    f"{folder / name} is missing or no longer as {MANIFEST} states: "
                    f"delete {folder} and run again"
                )
            state.advance()
    shards = len(manifest["shards"])
    print(f"{folder} is complete and its {shards} shards match their hashes: nothing to do")
    print_losses(manifest["splits"])
    return True


def sibling(target: Path, role: str) -> Path:
    """Name the hidden neighbour of `target` that is its lock or holds it while unfinished."""
    return target.with_name(f".{target.name}.{role}")


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock on a folder; the system frees that of a killed run.

    Raises UserError when another run has it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(sibling(target, "lock")).acquire(timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"{target} is being written by another run: wait until it ends") from error


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block succeeds and is deleted if not."""
    partial = sibling(target, "partial")
    if partial.exists():
        print(f"{partial} is left of a run that was killed: deleted, this one starts anew")
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        partial.replace(target)
        print(f"made {target}")
    except KeyboardInterrupt:
        print(f"nothing is kept of {target}: the next run starts anew")
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- Download of the challenge's FineWeb
# The layout is upstream's: <out>/datasets/<name>/*.bin, <out>/tokenizers/


class Export(typing.NamedTuple):
    """Where a variant is published, and where the records' commands look for it by default."""

    repo: str = "willdepueoai/parameter-golf"
    out: str = "data"


CASEOPS_VARIANT = "sp8192_lossless_caps_caseops_v1_reserved"
EXPORTS = {
    "sp4096": Export("kevclark/parameter-golf"),
    "sp8192": Export("kevclark/parameter-golf"),
    CASEOPS_VARIANT: Export(
        "romeerp/parameter-golf-caseops-v1", "data/datasets/fineweb10B_sp8192_caseops/datasets"
    ),
}


def published_files(listing: dict, variant: str, train_shards: int) -> tuple[str, list[str]]:
    """Look up a variant in upstream's manifest.

    Returns its tokenizer's path and its files' names, validation first: the shards, and behind
    each one of validation its side-car where there are such.
    """
    datasets = {entry["name"].removeprefix("fineweb10B_"): entry for entry in listing["datasets"]}
    if variant not in datasets:
        raise UserError(
            f"--variant {variant} is not published there: choose one of "
            f"{', '.join(sorted(datasets))}, or another --repo"
        )
    published = datasets[variant]["stats"]
    if train_shards > published["files_train"]:
        raise UserError(
            f"--train-shards {train_shards} is more than are published: "
            f"take {published['files_train']}"
        )
    side_cars = bool(datasets[variant].get("val_bytes_glob"))
    if variant == CASEOPS_VARIANT and not side_cars:
        raise UserError(
            f"--variant {variant} has no side-cars there (val_bytes_glob), without which its "
            "tokens have no bytes: take another --repo"
        )
    models = {entry["name"]: entry.get("model_path") for entry in listing["tokenizers"]}
    model = models[datasets[variant]["tokenizer_name"]]
    if model is None:
        raise UserError(
            f"--variant {variant} has no SentencePiece tokenizer: choose one named sp<size>"
        )
    counts = {"val": published["files_val"], "train": train_shards}
    if not 0 <= counts["val"] < 10**6 or {"", ".", ".."} & set(model.split("/")):
        raise ValueError(f"{counts['val']} validation shards, tokenizer {model}")
    names = []
    for split, count in counts.items():
        for index in range(count):
            names.append(f"fineweb_{split}_{index:06d}.bin")
            if split == "val" and side_cars:
                names.append(f"fineweb_{SIDE_CAR}_{index:06d}.bin")
    return model, names


def inspect_shard(path: Path, vocab_size: int) -> tuple[int, int]:
    """Return the number of tokens and of documents of a shard.

    Raises UserError when it is none or not of this vocabulary.
    """
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path.name} has no shard header: check --repo and --variant")
    held = (path.stat().st_size - header.nbytes) / TOKEN.itemsize
    if held != header[2] or not held:
        raise UserError(
            f"{path.name} states {header[2]} tokens and holds {held:g}: check --repo and --variant"
        )
    tokens = np.memmap(path, dtype=TOKEN, mode="r", offset=header.nbytes)
    if tokens.max() >= vocab_size:
        raise UserError(
            f"{path.name} has token {tokens.max()}, its tokenizer {vocab_size}: "
            "check --repo and --variant"
        )
    return len(tokens), int(np.count_nonzero(tokens == BOS))


def inspect_side_car(path: Path, shard: dict) -> tuple[int, int]:
    """As inspect_shard. Raises UserError when it is not of this shard of the manifest."""
    numbers, _ = inspect_shard(path, 2**16)
    if numbers != shard["tokens"]:
        raise UserError(
            f"{path.name} has {numbers} numbers for the {shard['tokens']} tokens of "
            f"{shard['file']}: check --repo and --variant"
        )
    return numbers, 0


def hub_hash(path: Path, etag: str | None) -> str:
    """Hash a file as the hub does for its etag: a large one's sha256, a small one's git hash."""
    if len(etag or "") == 64:
        return file_sha256(path)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


def fetch(repo: str, remote: str, staging: Path, local: Path, inspect_file: Callable) -> object:
    """Bring a published file to its final place once it is whole.

    One already there is kept. Returns what `inspect_file` finds in it. Raises UserError when the
    file differs in size or hash from what the hub states.
    """
    url = huggingface_hub.hf_hub_url(repo, remote, repo_type="dataset")
    if not url.startswith(("https://", "http://127.0.0.1:")):
        raise UserError(f"{url} is not https: unset HF_ENDPOINT")
    stated = huggingface_hub.get_hf_file_metadata(url)
    path = local
    if not local.exists():
        staged = huggingface_hub.hf_hub_download(
            repo, remote, repo_type="dataset", local_dir=staging
        )
        path = Path(staged)
    if path.stat().st_size != stated.size or hub_hash(path, stated.etag) != stated.etag:
        remedy = "delete it and run again"
        if path != local:
            path.unlink()
            remedy = "run again to download it anew"
        raise UserError(
            f"{path} is not the published file of {stated.size} bytes and hash {stated.etag}: "
            f"{remedy}"
        )
    found = inspect_file(path)
    if path != local:
        local.parent.mkdir(parents=True, exist_ok=True)
        path.replace(local)
        say(f"verified {local}")
    return found


def fetch_shards(
    names: list[str], remote: str, folder: Path, vocab_size: int, bring: Callable
) -> tuple[list[dict], dict[str, dict]]:
    """Download shards and side-cars of these names.

    bring: fetch, of a repository. Returns what the manifest says of each and of the splits.
    """
    shards = []
    splits = {split: dict.fromkeys(TOTALS) | {"documents": 0, "tokens": 0} for split in SPLITS}
    with progress("downloading", "shards", len(names)) as state:
        for name in names:
            split = name.removeprefix("fineweb_").rpartition("_")[0]
            inspect_file = functools.partial(inspect_shard, vocab_size=vocab_size)
            if split == SIDE_CAR:
                inspect_file = functools.partial(inspect_side_car, shard=shards[-1])
            local = folder / name
            tokens, documents = bring(f"{remote}/{name}", local=local, inspect_file=inspect_file)
            shards.append(shard_entry(local, split, tokens))
            if split in SPLITS:
                splits[split]["tokens"] += tokens
                splits[split]["documents"] += documents
            state.advance()
    return shards, splits


def fetch_dataset(folder: Path, settings: dict) -> None:
    """Download the shards that `settings` name and their tokenizer; write the manifest of `folder`.

    What is under way lies in a folder that outlives a broken run, so that the next one goes on from
    there.
    """
    repo = settings["repo"]
    prefix = settings["prefix"]
    staging = sibling(folder, "partial")
    disable_progress_bars()  # the hub's own, which would overwrite ours

    remote = f"{prefix}/{MANIFEST}"
    local = staging / "listing.json"
    local.unlink(missing_ok=True)  # it may be of another repository, or have grown since
    with progress(f"asking {repo} what it has"):
        listing = fetch(repo, remote, staging, local, Path.read_bytes)
    try:
        model_path, names = published_files(
            json.loads(listing), settings["variant"], settings["train_shards"]
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{repo} has a {MANIFEST} of another form ({error!r}): try another --repo"
        ) from error
    model = folder.parent.parent / "tokenizers" / Path(model_path).name
    with progress("downloading the tokenizer"):
        tokenizer = fetch(repo, f"{prefix}/{model_path}", staging, model, load_tokenizer)

    remote = f"{prefix}/datasets/{folder.name}"
    size = tokenizer.vocab_size()
    bring = functools.partial(fetch, repo, staging=staging)
    shards, splits = fetch_shards(names, remote, folder, size, bring)
    held_out = splits["val"]["documents"]
    if held_out != MAX_VAL_DOCUMENTS:
        say(
            f"warning: {held_out:,} validation documents, where the challenge has "
            f"{MAX_VAL_DOCUMENTS:,}: no score for the leaderboard"
        )
    rest = {"splits": splits, "disjoint": None, "settings": settings}
    write_manifest(folder, model, shards, rest)
    shutil.rmtree(staging)
    print(f"made {folder}")
    print(f"train with DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={size}")


def complete_dataset(folder: Path, settings: dict) -> None:
    """Download what `folder` lacks of these settings. Raises UserError when that fails."""
    wanted = settings["train_shards"]
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    old = manifest["settings"] if manifest else None
    # Without a manifest a download broke off; with fewer shards of the same export, or without the
    # side-cars of CaseOps, more are wanted now.
    least = wanted
    if manifest and settings["variant"] == CASEOPS_VARIANT:
        least += SIDE_CAR not in {entry["split"] for entry in manifest["shards"]}
    adds = old is None or (
        {**old, "train_shards": wanted} == settings and old.get("train_shards") in range(least)
    )
    if not adds and is_finished(folder, settings):
        return
    try:
        fetch_dataset(folder, settings)
    except (OSError, httpx.HTTPError, HFValidationError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"download from {settings['repo']} failed ({reason}): "
            "check the network, the disk, --repo and --prefix, then run again; "
            "verified files are kept"
        ) from error


# ---- Commands

app = typer.Typer(help=__doc__.split("\n\n")[0], add_completion=False, rich_markup_mode=None)


def options_as_parameters(options: type) -> Callable[[Callable], Callable]:
    """Give a command one parameter for each field of a dataclass and call it with an instance."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def from_parameters(**values) -> None:
            command(options(**values))

        from_parameters.__signature__ = inspect.signature(options)
        from_parameters.__annotations__ = typing.get_type_hints(options, include_extras=True)
        return from_parameters

    return decorate


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Dataset folder to make.")] = Path("data/demo"),
    vocab_size: Annotated[int, typer.Option(max=2**16, help="Pieces of the tokenizer.")] = 1024,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; never changes the result.")
    ] = DEFAULT_WORKERS,
) -> None:
    """Make a small dataset of the documentation of installed packages, without any download."""
    out = out.absolute()
    settings = {"command": "demo", "vocab_size": vocab_size, **demo_versions()}
    with exclusive(out):
        if is_finished(out, settings):
            return
        with partial_folder(out) as folder:
            documents = demo_documents(workers)
            recipe = Recipe(vocab_size=vocab_size, val_fraction=demo_val_fraction(documents))
            write_dataset(folder, DemoDocuments(documents), recipe, workers, settings)


@app.command()
@options_as_parameters(TextOptions)
def text(options: TextOptions) -> None:
    """Make a dataset of your own text files.

    A .txt file holds documents separated by blank lines, a .jsonl file one object a line, a
    .parquet file one a row. All but .parquet may be compressed (.gz, .bz2, .xz, .zst). The order of
    the input is kept: shuffle it beforehand. A run that was interrupted starts anew.
    """
    for path in options.inputs:
        check_input(path, options.field)
    settings = {"command": "text", **dataclasses.asdict(options)}
    del settings["out"], settings["workers"]
    settings["inputs"] = [f"{path.name} of {path.stat().st_size} bytes" for path in options.inputs]
    settings["tokenizer"] = options.tokenizer and file_sha256(options.tokenizer)
    out = options.out.absolute()
    with exclusive(out):
        if is_finished(out, settings):
            return
        with partial_folder(out) as folder:
            documents = TextDocuments(options.inputs, options.field)
            write_dataset(folder, documents, options, options.workers, settings)


@app.command()
def fineweb(
    variant: Annotated[
        str, typer.Option(help="Tokenizer of the export: sp1024, sp4096, sp8192, caseops.")
    ] = "sp1024",
    train_shards: Annotated[
        int, typer.Option(min=0, help="How many, from the first; 200 MB each.")
    ] = 80,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for datasets/ and tokenizers/; else where the records look."),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            help="Dataset repository on the hub; else the one that the records took.",
            envvar="MATCHED_FINEWEB_REPO_ID",
        ),
    ] = None,
    prefix: Annotated[
        str,
        typer.Option(
            help="Folder of the export in it.", envvar="MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
        ),
    ] = "datasets",
) -> None:
    """Download the challenge's published shards and tokenizer and verify them; run it again to go
    on or add shards.
    """
    if variant == Transform.CASEOPS.value:
        variant = CASEOPS_VARIANT
    export = EXPORTS.get(variant, Export())
    repo = repo or export.repo
    out = out or Path(export.out)
    settings = {
        "command": "fineweb",
        "repo": repo,
        "prefix": prefix,
        "variant": variant,
        "train_shards": train_shards,
    }
    folder = out.absolute() / "datasets" / f"fineweb10B_{variant}"
    with exclusive(folder):
        complete_dataset(folder, settings)


def printable(text: str) -> str:
    """The text as one line that commands no terminal: such characters as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def exit_code_of(
    app: typer.Typer,
    script: str,
    arguments: list[str] | None,
    refused: type[Exception] | tuple = (),
) -> int:
    """Run a command; on rank 0, say in one line what was wrong. Returns the exit code.

    `refused`: exceptions that bring their own exit code.
    """
    code = 2
    try:
        return app(arguments, standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message()
    except refused as error:
        message = str(error)
        code = error.code
    except (KeyboardInterrupt, typer.Abort):
        message = "interrupted"
        code = 130
    except BrokenProcessPool:
        message = "a worker was ended from outside, most likely for lack of memory: lower --workers"
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}"
        message = f"{problem}; check its folder, rights and free space"
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: error:", printable(message), file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return exit_code_of(app, "prepare_data.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

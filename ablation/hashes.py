"""Hashes that a folder states, beside the files that are in it."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from ablation.findings import FINE, UNCHECKED, WARNING, Finding
from ablation.records import MAX_BYTES
from train_gpt import unpack_code

MAX_HASHES = 100  # of one text
MAX_LINE = 1000  # characters of a line with one
DIGITS = {32: "md5", 40: "sha1", 64: "sha256"}
KEYWORD = re.compile(r"sha-?_?256|sha-?_?1\b|md5|checksum|digest|hash", re.IGNORECASE)
HASH = re.compile(
    r"(?<![0-9a-fA-F])(?:[0-9a-fA-F]{64}|[0-9a-fA-F]{40}|[0-9a-fA-F]{32})(?![0-9a-fA-F])"
)


def lines_with_hashes(text: str) -> Iterator[tuple[str, str]]:
    """(a line, a hash in it) where the line says that it is one, as sha256sum does by its form."""
    found = 0
    for line in text.split("\n"):
        if len(line) > MAX_LINE or found >= MAX_HASHES:
            continue
        for match in HASH.finditer(line):
            if KEYWORD.search(line) or re.fullmatch(r"\s*[0-9a-fA-F]+ [ *]\S.*", line):
                found += 1
                yield line, match[0].lower()


def json_lines(value, path: str = "") -> Iterator[str]:
    """Every text of a JSON value as a line `path: text`."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from json_lines(part, f"{path} {key}")
    elif isinstance(value, list):
        for part in value:
            yield from json_lines(part, path)
    elif isinstance(value, str):
        yield f"{path}: {value}"


def digests_of(path: Path) -> dict[str, str]:
    """Hash -> what it is of, for a file as it is and unpacked."""
    content = path.read_bytes()
    contents = {path.name: content}
    if path.suffix == ".py" and len(content) <= MAX_BYTES:
        with contextlib.suppress(ValueError):
            contents[f"{path.name}, unpacked"] = unpack_code(content)
    return {
        hashlib.new(name, content).hexdigest(): what
        for what, content in contents.items()
        for name in DIGITS.values()
    }


def wrong_hashes(files: list[Path], texts: dict[str, str]) -> Iterator[Finding]:
    """Hashes that are of no file here, or not of the file that they stand with.

    texts: name -> what may state hashes.
    """
    stated = {name: list(lines_with_hashes(text)) for name, text in texts.items()}
    if not any(stated.values()):
        return
    known: dict[str, str] = {}
    for path in files:
        known |= digests_of(path)
    lost = []
    for name, lines in stated.items():
        for line, digest in lines:
            kind = DIGITS[len(digest)]
            beside = [path.name for path in files if is_named(path, line) and path.name != name]
            if digest in known:
                yield Finding(FINE, name, f"{kind} {digest[:12]}... is that of {known[digest]}")
            elif beside:
                problem = f"{kind} {digest[:12]}... is not that of {beside[0]}, which is beside it"
                yield Finding(WARNING, name, problem, "ship the file that it is of")
            else:
                lost.append(f"{kind} {digest[:12]}... of {name}")
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        problem = f"{', '.join(lost[:5])}{more}: of no file that is here"
        yield Finding(UNCHECKED, "hashes", problem)


def is_named(path: Path, line: str) -> bool:
    """Whether a line names a file, as train_gpt.py or train_gpt_sha256."""
    return (
        path.name in line
        or re.search(rf"(?<!\w){re.escape(path.stem)}_(sha|md5)", line) is not None
    )

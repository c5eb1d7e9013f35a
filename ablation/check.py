"""Is a leaderboard folder good? Everything in it is compared with what its results and logs give.

In: a folder of anybody. Out: findings, each with its weight. The first one does not end the check.

Nothing in the folder is trusted: it is read from a copy, and every file is checked before it is
believed. Nothing of it is run, unless that is asked for; then its script is imported last, in a
process of its own. That of a folder of ours is, only when nothing is wrong.
"""

import contextlib
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ablation.findings import (
    ERROR,
    UNCHECKED,
    WARNING,
    Finding,
    finding,
    sorted_findings,
    worst_is,
)
from ablation.folder import Folder
from ablation.hashes import json_lines, wrong_hashes
from ablation.logs import read_logs
from ablation.others import check_others
from ablation.ours import Found, check_ours
from ablation.records import MAX_BYTES, read_json, read_text
from ablation.script import REQUIREMENTS, import_script, needs_gpu, wrong_requirements
from ablation.submission import BEGIN
from train_gpt import READABLE_NAME, Refusal, unpack_code

MAX_FILES = 200  # of a folder that is worth reading
MAX_FOLDER_BYTES = 4 * MAX_BYTES
MAX_SCRIPTS = 3  # that are imported

ARTIFACTS = (".ptz", ".pt", ".bin", ".safetensors", ".xz", ".zst", ".br")


def check_submission(folder: Path, run_script: bool = False) -> list[Finding]:
    """Every finding of a submission folder, the worst first; it is clean without error and warning.

    run_script: import its script. Else nothing of it is run.
    Raises Refusal where there is no folder, or nothing in it that can be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "submission"
        found = copy_in(Path(folder), copy)
        path = "/".join(Path(folder).absolute().parts[-2:])
        found += check_copy(copy, run_script, path, worst_is(found, ERROR))
    return sorted_findings(found)


def copy_in(folder: Path, copy: Path) -> list[Finding]:
    """Copies plain files. Returns what is a link, a device, unreadable or too much.

    Raises Refusal where there is no folder, or nothing in it that can be read.
    """
    if not folder.is_dir():
        raise Refusal(f"{folder}: no folder; name the folder of one submission")
    names = (
        Path(root, name) for root, *lists in os.walk(folder) for name in itertools.chain(*lists)
    )
    entries = list(itertools.islice(names, MAX_FILES + 1))
    if len(entries) > MAX_FILES:
        problem = f"more than {MAX_FILES} files"
        raise Refusal(f"{folder}: {problem}; name the folder of one submission")

    copy.mkdir()
    copied = 0
    problems = []
    room = MAX_FOLDER_BYTES
    for path in entries:
        name = path.relative_to(folder)
        try:
            status = path.lstat()
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"{name}: a link or a device; put a plain file there")
                continue
            if status.st_size > room:
                most = f"not read, as the folder has more than {MAX_FOLDER_BYTES:,} bytes"
                problems.append(f"{name}: {status.st_size:,} bytes; {most}")
                continue
            room -= status.st_size
            shutil.copyfile(path, copy / name, follow_symlinks=False)
            copied += 1
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror}); make it readable")
    if not copied:
        problem = "; ".join(problems[:3]) or "it is empty, or may not be listed"
        raise Refusal(f"{folder}: no file in it can be read ({problem})")
    return [finding(problem) for problem in problems]


def plain_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_copy(folder: Path, run_script: bool, path: str, spoilt: bool) -> list[Finding]:
    """As check_submission, of a copy of plain files.

    path: where the folder itself lies. spoilt: something is wrong already.
    """
    files = plain_files(folder)
    ours = is_ours(folder)
    found = check_requirements(folder, files, ours)
    if ours:
        found += check_ours(folder, run_script, spoilt or worst_is(found, ERROR))
    else:
        found += check_strangers(folder, files, path)
        found += check_imports(folder, files, run_script)
    return found


def is_ours(folder: Path) -> bool:
    """Whether ablate.py made a folder, or somebody wants to look as if."""
    if any(folder.glob("result_seed*.json")):
        return True
    try:
        return BEGIN in read_text(folder / "README.md", "README.md")
    except Refusal:
        return False


def sources_of(files: list[Path]) -> dict[str, str]:
    """Name -> source of every script, unpacked where it is packed as ours are."""
    sources = {}
    for path in files:
        if path.suffix == ".py" and path.stat().st_size <= MAX_BYTES:
            content = path.read_bytes()
            with contextlib.suppress(ValueError):
                content = unpack_code(content)
            sources[path.name] = content.decode("utf-8", "replace")
    return sources


def check_requirements(folder: Path, files: list[Path], ours: bool) -> list[Finding]:
    """requirements.txt beside what the scripts import."""
    found = Found()
    if ours:  # one script, and beside it perhaps the same unpacked
        names = ("train_gpt.py", READABLE_NAME)
        sources = sources_of([path for path in files if path.name in names][-1:])
    else:
        sources = sources_of(files)
    beside = modules_of(files)
    text = None
    if (folder / REQUIREMENTS).is_file():
        text = found.attempt(read_text, folder / REQUIREMENTS, REQUIREMENTS)
        if text is None:
            return found
    found += wrong_requirements(text, sources, beside, ours)
    return found


def modules_of(files: list[Path]) -> set[str]:
    """Modules that lie in the folder."""
    beside = {path.stem for path in files if path.suffix in (".py", ".so", ".c", ".pyx")}
    return beside | {path.parent.name for path in files}


def check_strangers(folder: Path, files: list[Path], path: str) -> list[Finding]:
    """Every finding of a folder that another tool made."""
    found = Found()
    readme = None
    if (folder / "README.md").is_file():
        readme = found.attempt(read_text, folder / "README.md", "README.md")
    else:
        found.append(Finding(ERROR, "README.md", "missing", "write what was done"))

    where, submission = read_submission(files, found)
    scripts = {path.name: path.stat().st_size for path in files if is_training(path)}
    for name, size in scripts.items():
        if not size:
            found.append(Finding(ERROR, name, "empty", "ship the script that ran"))
    if not scripts:
        found.append(Finding(ERROR, "train_gpt.py", "missing", "ship the script that ran"))
    elif "train_gpt.py" not in scripts:
        names = ", ".join(scripts)
        found.append(Finding(WARNING, "train_gpt.py", f"called {names}", "call it train_gpt.py"))
    artifacts = {path.name: path.stat().st_size for path in files if path.suffix in ARTIFACTS}
    logs, problems = read_logs(folder, files)
    found += problems
    found += check_others(Folder(logs, submission, where, readme, scripts, artifacts, path))
    texts = {log.name: log.text for log in logs}
    texts |= {"README.md": readme or "", where: "\n".join(json_lines(submission))}
    found += wrong_hashes(files, texts)
    return found


def check_imports(folder: Path, files: list[Path], run_script: bool) -> Iterator[Finding]:
    """Whether the training scripts import on a bare CPU: by their lines, or by trying it."""
    sources = sources_of([path for path in files if is_training(path)])
    beside = modules_of(files)
    requirements = ""
    if (folder / REQUIREMENTS).is_file():
        with contextlib.suppress(Refusal):
            requirements = read_text(folder / REQUIREMENTS, REQUIREMENTS)
    for name, source in itertools.islice(sources.items(), MAX_SCRIPTS):
        path = next(path for path in files if path.name == name)
        if run_script:
            yield import_script(path.parent, name, requirements)
            continue
        lacks = ", ".join(needs_gpu(source, beside))
        needs = f"; it imports {lacks}, which a bare CPU lacks" if lacks else ""
        problem = f"whether it imports on a bare CPU{needs}, and what it scores"
        remedy = "check --run-script imports it: only if you trust it"
        yield Finding(UNCHECKED, name, problem, remedy)


def is_training(path: Path) -> bool:
    return path.suffix == ".py" and path.name.startswith("train")


def read_submission(files: list[Path], found: Found) -> tuple[str, dict]:
    """(name, contents) of submission.json, whatever it is called; ("submission.json", {})."""
    names = [path for path in files if path.name == "submission.json"]
    named = names or [path for path in files if path.match("submission*.json")]
    if not named:
        found.append(Finding(ERROR, "submission.json", "missing", "add it"))
        return "submission.json", {}
    path = named[0]
    if not names:
        problem = f"called {path.name}"
        found.append(Finding(WARNING, "submission.json", problem, "call it submission.json"))
    return path.name, found.attempt(read_json, path, path.name, {}) or {}

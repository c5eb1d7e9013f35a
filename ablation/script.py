"""The script of a leaderboard folder: what it imports, and what it makes of its own results.

Its imports are read as lines of text. It is run only by ask_script and import_script, in a process
of its own with next to nothing of our environment: that is no sandbox.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, Finding
from ablation.records import MAX_BYTES, TEXT, misfits, shown

IMPORT_SECONDS = 120

ANSWER_SHAPE = {"*": {"table": TEXT, "config_sha256": TEXT, "non_default": {}}}

# ── Requirements ──────────────────────────────────────────────────────────────────────────────────
REQUIREMENTS = "requirements.txt"

IMPORT = re.compile(
    r"^(?P<indent>[ \t]*)"
    r"(?:import (?P<plain>\w[\w., ]{0,300})|from (?P<source>\w+)[\w.]{0,100} import )",
    re.MULTILINE,
)
REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][\w.-]{0,100})", re.MULTILINE)
# modules whose packages have other names, when they are not installed here
PACKAGES = {
    "PIL": ["pillow"],
    "cv2": ["opencv-python"],
    "flash_attn_interface": ["flash-attn-3", "flash-attn"],
    "fla": ["flash-linear-attention"],
    "sklearn": ["scikit-learn"],
    "yaml": ["pyyaml"],
    "python_minifier": ["python-minifier"],
}


def imports_of(source: str) -> dict[str, bool]:
    """Top-level module -> whether it is imported whatever happens, from the lines of a script."""
    found: dict[str, bool] = {}
    for match in IMPORT.finditer(source):
        names = [match["source"]]
        if match["plain"]:
            names = [part.split()[0] for part in match["plain"].split(",") if part.strip()]
        for name in names:
            module = name.partition(".")[0]
            found[module] = found.get(module, False) or not match["indent"]
    return found


def third_party(source: str, beside: set[str]) -> dict[str, bool]:
    """The same for modules that neither Python nor a file beside the script has."""
    known = sys.stdlib_module_names | beside | {"__future__"}
    return {name: always for name, always in imports_of(source).items() if name not in known}


def plain(name: str) -> str:
    """The name of a package, as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def installed() -> dict[str, list[str]]:
    """Module -> the packages that brought it here."""
    return importlib.metadata.packages_distributions()


def packages_of(module: str) -> set[str]:
    """The packages that may bring a module."""
    names = [module, *PACKAGES.get(module, [])]
    names += installed().get(module, [])
    return {plain(name) for name in names}


def wrong_requirements(
    text: str | None, sources: dict[str, str], beside: set[str], ours: bool
) -> Iterator[Finding]:
    """Packages that a script imports and requirements.txt does not list.

    text: of requirements.txt, None where there is none. sources: name of a script -> its source.
    beside: modules in the folder. ours: all packages have to be listed.
    """
    modules: dict[str, bool] = {}
    for source in sources.values():
        for module, always in third_party(source, beside).items():
            modules[module] = modules.get(module, False) or always
    names = ", ".join(sorted(modules))
    if text is None:
        if ours:  # said with the other files that are missing
            return
        problem = "missing" + (f", although its scripts import {names}" if names else "")
        yield Finding(WARNING, REQUIREMENTS, problem, "list the packages of the script")
        return
    lines = "\n".join(line.partition("#")[0] for line in text.split("\n"))
    listed = {plain(name) for name in REQUIREMENT.findall(lines)}
    lost = [name for name in sorted(modules) if not packages_of(name) & listed]
    if ours:
        lost = [name for name in lost if modules[name]]
    if lost:
        weight = ERROR if ours or not listed else WARNING
        problem = f"lists no package of {', '.join(lost)}, which its scripts import"
        yield Finding(weight, REQUIREMENTS, problem, "list them, with their versions")
    elif names:
        yield Finding(FINE, REQUIREMENTS, f"lists what its scripts import: {names}")
    else:
        yield Finding(UNCHECKED, REQUIREMENTS, "no import of a script can be read here")


# ── Without a GPU ─────────────────────────────────────────────────────────────────────────────────

# modules that only a machine with a GPU has, or that load its libraries when they are imported
GPU_MODULES = frozenset(
    (
        "apex",
        "bitsandbytes",
        "causal_conv1d",
        "cuda",
        "cupy",
        "deepspeed",
        "fla",
        "flash_attn",
        "flash_attn_3",
        "flash_attn_interface",
        "liger_kernel",
        "mamba_ssm",
        "pycuda",
        "pynvml",
        "transformer_engine",
        "triton",
        "xformers",
    )
)


def needs_gpu(source: str, beside: set[str]) -> list[str]:
    """Modules that a script imports whatever happens, and that a bare CPU lacks."""
    always = {name for name, always in third_party(source, beside).items() if always}
    return sorted(always & GPU_MODULES)


# ── Running it ────────────────────────────────────────────────────────────────────────────────────

# Loads this very file: not a package, an extension or a cached file of that name beside it
ASK_SCRIPT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("train_gpt", "train_gpt.py")
train_gpt = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_gpt)
answer = {}
for seed in sys.argv[1:]:
    with open(f"result_seed{seed}.json", encoding="utf-8") as file:
        result = json.load(file)
    cfg = train_gpt.Config(**result["config"])
    answer[seed] = {
        "table": train_gpt.final_table(result),
        "config_sha256": cfg.digest(),
        "non_default": cfg.non_default(),
    }
print("\\0" + json.dumps(answer))
"""


def bare_environment(home: Path) -> dict[str, str]:
    """Next to nothing of ours: where programs are, and a home of its own."""
    env = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    env |= dict.fromkeys(("HOME", "TMPDIR", "PYTHONPYCACHEPREFIX"), str(home))
    return env | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONUSERBASE": site.getuserbase(),
        "PYTHONIOENCODING": "utf-8",
    }


class Answer(Exception):
    """What a script did instead of answering."""


def run_bare(command: list[str], folder: Path, home: Path) -> tuple[int, str, str]:
    """(exit code, what the command prints, what it complains of). Answer when it takes too long."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=bare_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = child.wait(IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Answer(f"is not imported within {IMPORT_SECONDS} s") from None
        finally:
            # with all that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return code, start_of(out), start_of(errors)


def answer_of(command: list[str], folder: Path, home: Path) -> str:
    """What the command answers. Answer when it takes too long, fails or complains."""
    code, printed, complaint = run_bare(command, folder, home)
    if code or "\0" not in printed:
        last = (complaint.strip().splitlines() or ["it ended early"])[-1]
        raise Answer(f"does not import, or does not read its results ({last})")
    chatter, _, answer = printed.rpartition("\0")
    if chatter or complaint:
        raise Answer(f"prints {shown(chatter or complaint)} when imported")
    return answer


def start_of(file) -> str:
    file.seek(0)
    return file.read(MAX_BYTES).decode("utf-8", "replace")


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of everything below a folder."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path] = (status.st_size, status.st_mtime_ns)
    return found


def ask_script(folder: Path, seeds: list[int]) -> tuple[str, dict]:
    """Imports the folder's train_gpt.py in a process of its own.

    Returns (what went wrong, seed -> the final table, configuration hash and non-default settings
    that this script makes of the seed's result).
    """
    home = folder.parent / "home"
    home.mkdir()
    before = listing(folder.parent)
    try:
        text = answer_of([sys.executable, "-c", ASK_SCRIPT, *map(str, seeds)], folder, home)
    except Answer as problem:
        return str(problem), {}
    if listing(folder.parent) != before:
        return "writes files when imported", {}
    try:
        answer = json.loads(text)
        return next(misfits(answer, ANSWER_SHAPE, "final_table"), ""), answer
    except (ValueError, RecursionError):
        return f"answers {shown(text)}", {}


IMPORT_SCRIPT = """
import importlib.util, sys
sys.path.insert(0, "")
spec = importlib.util.spec_from_file_location(sys.argv[1].removesuffix(".py"), sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("\\0")
"""
NO_MODULE = re.compile(r"No module named '([\w.]{1,100})'")


def import_script(folder: Path, name: str, requirements: str) -> Finding:
    """Imports a script of a folder in a process of its own, on a bare CPU.

    requirements: the text of requirements.txt.
    """
    remedy = "let it be imported without a GPU, or say what it needs"
    command = [sys.executable, "-c", IMPORT_SCRIPT, name]
    try:
        # a home beside the copy: whatever lies in that, it does not clash
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
            code, printed, complaint = run_bare(command, folder, Path(home))
    except Answer as problem:
        return Finding(WARNING, name, f"{problem} on a bare CPU", remedy)
    if not code and printed.endswith("\0\n"):
        return Finding(FINE, name, "imports on a bare CPU")
    last = (complaint.strip().splitlines() or ["it ended early"])[-1]
    missing = NO_MODULE.search(last)
    if missing:
        module = missing[1].partition(".")[0]
        listed = {plain(found) for found in REQUIREMENT.findall(requirements)}
        said = "lists it" if packages_of(module) & listed else "does not list it"
        problem = f"needs the module {module}, which is not here ({REQUIREMENTS} {said})"
        return Finding(WARNING, name, problem, remedy)
    version = platform.python_version()
    problem = f"does not import on a bare CPU with Python {version} ({last})"
    return Finding(WARNING, name, problem, remedy)

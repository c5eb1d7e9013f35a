"""Is a leaderboard folder good? Everything in it is compared with what its results give.

Nothing in the folder is trusted: it is read from a copy, every file is checked before it is
believed, and its script is run last, in a process of its own.
"""

import bisect
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import site
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ablation.records import (
    MAX_BYTES,
    RESULT_SHAPE,
    TEXT,
    leaves,
    misfits,
    read_json,
    read_text,
    shown,
)
from ablation.submission import (
    ABOUT,
    BEGIN,
    CAP_BYTES,
    END,
    LIMIT_SECONDS,
    TOKENIZER,
    Results,
    check_hash,
    render,
    ships_tokenizer,
    summarise,
    unfit,
    unlike,
)
from prepare_data import printable
from train_gpt import READABLE_NAME, Refusal

MAX_FILES = 200  # of a folder that is worth reading
MAX_PROBLEMS = 100  # that are told
MAX_CODE_BYTES = 1 << 20  # to compile a script takes up to 600 times its size in memory
IMPORT_SECONDS = 120

REQUIRED = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
SUBMISSION_SHAPE = {"seeds": (list,), **dict.fromkeys(ABOUT, TEXT)}
ANSWER_SHAPE = {"*": {"table": TEXT, "config_sha256": TEXT, "non_default": {}}}

# in prose, a number with three decimals or more: 1,234.567 or .123e-4, but no version 1.234.5
DECIMAL = re.compile(
    r"(?<![\d.])"
    r"(?:\d[\d,]{0,20})?\.(\d{3,40})"
    r"(?:[eE]([-+]?\d{1,2}))?"
    r"(?!\d*\.\d)"
)


def check_submission(folder: Path) -> list[str]:
    """The problems of a submission folder, one printable line each; none when it is good.

    Its train_gpt.py is executed, once everything else is found good.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "submission"
        try:
            problems = copy_in(Path(folder), copy) or check_copy(copy)
        except Refusal as refusal:
            problems = [str(refusal)]
    told = problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        told.append(f"and {len(problems) - MAX_PROBLEMS:,} more")
    return [printable(shortened(problem)) for problem in told]


def shortened(problem: str) -> str:
    if len(problem) < 600:
        return problem
    return f"{problem[:400]} ... {problem[-100:]}"


def copy_in(folder: Path, copy: Path) -> list[str]:
    """Copies plain files; returns what is a link, a device, unreadable or too much."""
    entries = []
    if folder.is_dir():
        names = (
            Path(root, name) for root, *lists in os.walk(folder) for name in itertools.chain(*lists)
        )
        entries = list(itertools.islice(names, MAX_FILES + 1))
    if not folder.is_dir() or len(entries) > MAX_FILES:
        problem = f"no folder, or more than {MAX_FILES} files"
        return [f"{folder}: {problem}; name the folder that a build made"]

    problems = []
    room = MAX_BYTES
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
            room -= status.st_size
            if room < 0:
                most = f"a whole submission has at most {MAX_BYTES:,}"
                problems.append(f"{name}: {status.st_size:,} bytes; {most}")
                continue
            shutil.copyfile(path, copy / name, follow_symlinks=False)
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror}); make it readable")
    return problems


def check_copy(folder: Path) -> list[str]:
    """As check_submission, of a folder of plain files. Raises the first Refusal of a file."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        return [f"{name}: missing; build it again from runs" for name in missing]
    submission = read_json(folder / "submission.json", "submission.json", SUBMISSION_SHAPE)
    problems = wrong_seed_files(folder, submission["seeds"])
    if problems:
        return problems

    results = {}
    for seed in sorted(submission["seeds"]):
        name = f"result_seed{seed}.json"
        results[seed] = read_json(folder / name, name, RESULT_SHAPE)
    problems = [*unfit(results), *unlike(results)]
    if problems:
        return problems

    problems = wrong_files(folder, results)
    if problems:
        return problems
    code_bytes = (folder / "train_gpt.py").stat().st_size
    about = {key: submission[key] for key in ABOUT}
    readme = read_text(folder / "README.md", "README.md")
    problems = [
        *wrong_figures(results, code_bytes),
        *differences(submission, summarise(results, about), "submission.json"),
        *wrong_readme(readme, results, about),
    ]
    return problems or wrong_logs(folder, results)


def wrong_seed_files(folder: Path, seeds: list) -> list[str]:
    """Logs and results that are missing, or that submission.json does not know."""
    if not seeds or any(type(seed) is not int for seed in seeds):
        problem = f"{shown(seeds)}, not a list of whole numbers"
        return [f"submission.json.seeds: {problem}; build it again from runs"]
    wanted = set()
    for seed in seeds:
        wanted |= {f"train_seed{seed}.log", f"result_seed{seed}.json"}
    found = set()
    for pattern in ("train_seed*.log", "result_seed*.json"):
        found |= {path.name for path in folder.glob(pattern)}

    problems = []
    for name in sorted(wanted ^ found):
        problem = "submission.json does not have its seed; build it again from all runs"
        if name in wanted:
            problem = "missing, although submission.json has its seed; build it again from runs"
        problems.append(f"{name}: {problem}")
    return problems


def wrong_files(folder: Path, results: Results) -> list[str]:
    """A script or a tokenizer that is not that of the results."""
    first = results[min(results)]
    script = folder / "train_gpt.py"
    source = check_hash(script, script.name, first["code_sha256"], unpacked=True)
    readable = folder / READABLE_NAME
    if readable.exists() or source != script.read_bytes():
        check_hash(readable, readable.name, first["code_sha256"])
    if ships_tokenizer(first):
        check_hash(folder / TOKENIZER, TOKENIZER, first["data"]["tokenizer_sha256"])
    size = max(len(source), script.stat().st_size)
    if size > MAX_CODE_BYTES:
        problem = f"{size:,} bytes, over {MAX_CODE_BYTES:,}"
        return [f"train_gpt.py: {problem}; no script of a person is that long"]
    return []


def wrong_figures(results: Results, code_bytes: int) -> Iterator[str]:
    """Figures of a result that break a limit of the rules or contradict each other."""
    for seed, r in results.items():
        for problem in wrong_result(seed, r, code_bytes):
            yield f"result_seed{seed}.json: {problem}; train that seed again"


def wrong_result(seed: int, r: dict, code_bytes: int) -> Iterator[str]:
    """The same for one seed."""
    if [r["seed"], r["config"]["seed"]] != [seed, seed]:
        yield f"seed is {r['seed']}, in config {r['config']['seed']}"

    total = code_bytes + r["artifact_bytes"]
    if (r["code_bytes"], r["total_bytes"]) != (code_bytes, total):
        yield (
            f"code_bytes is {r['code_bytes']:,} and total_bytes {r['total_bytes']:,}, "
            f"but train_gpt.py has {code_bytes:,} bytes, which makes {total:,}"
        )
    if total > CAP_BYTES:
        yield f"code + artifact have {total:,} bytes, over the cap of {CAP_BYTES:,}"
    for key in ("train_seconds", "eval_seconds"):
        if r[key] > LIMIT_SECONDS:
            yield f"{key} is {r[key]:.1f}, over {LIMIT_SECONDS}"

    inactive = [name for name, row in r["toggles"].items() if not row["active"]]
    inactive = inactive or r.get("inactive")
    if inactive:
        yield f"{shown(inactive)} was requested and did nothing"

    nats = r["val_bpb"] * math.log(2) * r["val_bytes"]
    agrees = math.isclose(nats, r["val_loss"] * r["val_tokens"], rel_tol=1e-6)
    if r["val_bytes"] < 1 or not agrees:
        yield f"val_bpb is {r['val_bpb']}, which val_loss, val_tokens and val_bytes do not give"


def differences(stored, made, where: str) -> Iterator[str]:
    """Where a stored JSON value is not the one made from the logs."""
    if isinstance(stored, dict) and isinstance(made, dict):
        for key in dict.fromkeys([*made, *stored]):
            if key not in made:
                yield f"{where}.{key}: no log gives that; take it out, or tell it in README.md"
            elif key not in stored:
                yield f"{where}.{key}: missing, the logs give {shown(made[key])}"
            else:
                yield from differences(stored[key], made[key], f"{where}.{key}")
        return
    same = type(stored) is type(made)
    same = same and (stored == made or (type(made) is float and math.isclose(stored, made)))
    if not same:
        yield f"{where}: {shown(stored)}, but the logs give {shown(made)}"


def wrong_readme(readme: str, results: Results, about: dict) -> Iterator[str]:
    """A generated part that is not what the logs give, and numbers that no result shows."""
    start = readme.find(BEGIN)
    end = readme.find(END) + len(END)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or start > end:
        yield f"README.md: needs one part between {BEGIN} and {END}; build it again from runs"
        return
    stored = readme[start:end].split("\n")
    made = render(results, about).strip().split("\n")
    for old, new in itertools.zip_longest(stored, made):
        if old != new:
            yield f"README.md: its generated part says {shown(old)}, but the logs give {shown(new)}"
            return

    prose = "\n".join([readme[:start], readme[end:], *map(about.get, ABOUT)])
    known = leaves([list(results.values()), summarise(results, about)])
    for number in unknown_numbers(prose, sorted({abs(value) for value in known})):
        yield (
            f"README.md: no result shows the number {number} of its prose or of a text in "
            "submission.json; correct it"
        )


def unknown_numbers(prose: str, known: list[float]) -> Iterator[str]:
    """Decimals in a text that no known number (ascending) rounds to."""
    for match in DECIMAL.finditer(prose):
        decimals, exponent = match.groups()
        value = float(match[0].replace(",", ""))
        half_a_digit = 0.500001 * 10.0 ** (int(exponent or 0) - len(decimals))
        nearest = bisect.bisect_left(known, value - half_a_digit)
        if nearest == len(known) or known[nearest] > value + half_a_digit:
            yield match[0]


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


def run_bare(command: list[str], folder: Path, home: Path) -> str:
    """What the command prints. Answer when it takes too long, fails or complains."""
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
        printed, complaint = [first_bytes(file) for file in (out, errors)]
    if code or "\0" not in printed:
        last = (complaint.strip().splitlines() or ["it ended early"])[-1]
        raise Answer(f"does not import, or does not read its results ({last})")
    chatter, _, answer = printed.rpartition("\0")
    if chatter or complaint:
        raise Answer(f"prints {shown(chatter or complaint)} when imported")
    return answer


def first_bytes(file) -> str:
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
        text = run_bare([sys.executable, "-c", ASK_SCRIPT, *map(str, seeds)], folder, home)
    except Answer as problem:
        return str(problem), {}
    if listing(folder.parent) != before:
        return "writes files when imported", {}
    try:
        answer = json.loads(text)
        return next(misfits(answer, ANSWER_SHAPE, "final_table"), ""), answer
    except (ValueError, RecursionError):
        return f"answers {shown(text)}", {}


def wrong_logs(folder: Path, results: Results) -> list[str]:
    """Logs that do not show their results, configurations that the script reads differently."""
    problem, answer = ask_script(folder, list(results))
    if problem:
        return [f"train_gpt.py: {problem}; ship the source as run, with all that it imports"]
    problems = []
    for seed, r in results.items():
        name = f"result_seed{seed}.json"
        said = answer.get(str(seed), {})
        log_name = f"train_seed{seed}.log"
        log = read_text(folder / log_name, log_name)
        if said.get("table", "\0").strip() not in log:
            table = f"does not show the final table of {name}"
            problems.append(f"{log_name}: {table}; put back both files of that run")
        for key in ("config_sha256", "non_default"):
            if said.get(key) != r[key]:
                differs = f"{key} is not what train_gpt.py makes of its config"
                problems.append(f"{name}: {differs}; put back the file of that run")
    return problems

"""Leaderboard folders: one rendering for the builder, which writes it, and for the checker, which compares."""

import bisect
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import site
import stat
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import train_gpt
from ablation.records import (
    FINGERPRINT,
    MAX_BYTES,
    PLACES,
    RESULT_SHAPE,
    TEXT,
    leaves,
    lookup,
    metric,
    misfits,
    read_json,
    read_text,
    shown,
)
from ablation.report import markdown_table
from prepare_data import printable
from train_gpt import Refusal

OFFICIAL_TOKENIZER = "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a"  # sha256 of fineweb_1024_bpe.model

TOKENIZER = "tokenizer.model"  # the name of any other one inside the folder

CAP_BYTES, LIMIT_SECONDS = 16_000_000, 600  # of the rules, whatever the runs were told

MAX_FILES = 200  # of a folder that is worth reading
IMPORT_SECONDS = 120

MAX_CODE_BYTES = 1 << 20
MAX_PROBLEMS = 100

BEGIN, END = "<!-- generated -->", "<!-- end -->"

REQUIRED = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")

ABOUT = (
    "author",
    "github_id",
    "name",
    "blurb",
    "track",
)  # what no log can tell; the first three are required

PLACE_VARIABLES = {
    "DATA_PATH",
    "TOKENIZER_PATH",
    "LOGS_DIR",
    "RUN_ID",
    "SEED",
}  # the run command or its reader sets these

DECIMAL = re.compile(
    r"(?<![\d.])(?:\d[\d,]{0,20})?\.(\d{3,40})(?:[eE]([-+]?\d{1,2}))?(?!\d*\.\d)"
)  # no version like 1.234.5

Results = dict  # seed -> its result.json, by ascending seed

SUBMISSION_SHAPE = {"seeds": (list,), **dict.fromkeys(ABOUT, TEXT)}

ANSWER_SHAPE = {"*": {"table": TEXT, "config_sha256": TEXT, "non_default": {}}}


def unfit(results: Results) -> Iterator[str]:
    """Runs that are no complete, good training."""
    for seed, r in results.items():
        for key, source in (
            ("eval_only", r["config"].get("eval_only")),
            ("checkpoint", r["config"].get("checkpoint")),
            ("checkpoint", r.get("checkpoint")),
        ):
            if source:
                yield f"seed {seed}: {key}={shown(source)}, so it is not a full training; give the run that trained"
                return
        if None in (r["steps"], r["train_seconds"], r["live_val_bpb"]) or r["steps"] < 1:
            yield f"seed {seed}: steps={r['steps']}, so it trained nothing; give the run that trained"
        if r["exit_code"]:
            meaning = train_gpt.EXIT_CODES.get(r["exit_code"], "unknown")
            yield f"seed {seed}: exit_code={r['exit_code']} ({meaning}); only good runs count, run it again"
        for name in r["non_default"]:
            if not re.fullmatch(r"[A-Z0-9_]+", name):  # it stands in the README's command
                yield f"seed {seed}: non_default {shown(name)}: no name of a setting; run it again"


def unlike(results: Results) -> Iterator[str]:
    """What differs between the runs although it must not, with both values."""

    def identity(r: dict) -> dict:
        data = {
            f"data.{key}": value
            for key, value in r["data"].items()
            if key not in ("path", "manifest")
        }
        config = {key.upper(): value for key, value in r["config"].items() if key not in PLACES}
        return (
            {key: lookup(r, key) for key in FINGERPRINT}
            | data
            | config
            | {"config_sha256": r["config_sha256"]}
        )

    (seed, first), *others = [(seed, identity(r)) for seed, r in results.items()]
    for other, found in others:
        for key in dict.fromkeys([*first, *found]):
            if first.get(key) != found.get(key):
                yield (
                    f"{key}: {shown(first.get(key))} with seed {seed}, but {shown(found.get(key))} with seed {other}; "
                    "average only runs of one script, configuration, data and machine"
                )


def seed_row(r: dict) -> dict:
    return dict(
        val_bpb=r["val_bpb"],
        val_loss=r["val_loss"],
        artifact_bytes=r["artifact_bytes"],
        bytes_total=r["total_bytes"],
        steps=r["steps"],
        step_avg_ms=1e3 * r["train_seconds"] / r["steps"],
        train_time_s=r["train_seconds"],
        eval_time_s=r["eval_seconds"],
        live_val_bpb=r["live_val_bpb"],
        averaged_val_bpb=r["averaged_val_bpb"],
        pre_quant_val_bpb=metric(r, "float_val_bpb"),
        quantised_val_bpb=r["quantised_val_bpb"],
        scored=r["scored"],
    )


def summarise(results: Results, about: dict) -> dict:
    """submission.json: every figure from the results, every text from `about`. Refusal when a text is missing or odd."""
    columns = {key: [r[key] for r in results.values()] for key in RESULT_SHAPE}
    averaged = ["val_bpb", "val_loss", "steps", "train_seconds", "eval_seconds", "artifact_bytes"]
    mean = {key: statistics.fmean(columns[key]) for key in averaged}
    spread = {
        key: statistics.stdev(columns[key]) if len(results) > 1 else None
        for key in ("val_bpb", "val_loss")
    }
    first, toggles = (
        next(iter(results.values())),
        [row for rows in columns["toggles"] for row in rows.items()],
    )
    compliance = dict(
        train_under_600s=max(columns["train_seconds"]) <= LIMIT_SECONDS,
        three_seeds=len(results) >= 3,
        artifact_under_16mb=max(columns["total_bytes"]) <= CAP_BYTES,
        eval_under_600s=max(columns["eval_seconds"]) <= LIMIT_SECONDS,
        score_first_ttt=None if first["config"]["ttt_mode"] == "none" else True,
    )
    leaderboard = (
        first["world_size"] == 8 and "H100" in first["device"] and False not in compliance.values()
    )
    technique = (
        ", ".join(dict.fromkeys(name for name, row in toggles if row["active"])) or "no toggle"
    )
    texts = {key: about.get(key) for key in ABOUT}
    texts["blurb"] = texts["blurb"] or f"Active: {technique}."
    texts["track"] = texts["track"] or (
        "10min_16mb" if leaderboard else "none: not three seeds on 8xH100 within the limits"
    )
    for key, text in texts.items():
        if (
            not (isinstance(text, str) and text.strip() and text.isprintable())
            or BEGIN in text
            or END in text
        ):
            raise Refusal(
                f"{key}: {shown(text)}, not one line of text; give --{key.replace('_', '-')} TEXT"
            )
    return texts | dict(
        date=max(columns["date"]),
        val_bpb=mean["val_bpb"],
        val_bpb_std=spread["val_bpb"],
        val_loss=mean["val_loss"],
        val_loss_std=spread["val_loss"],
        bytes_total=max(columns["total_bytes"]),
        bytes_code=max(columns["code_bytes"]),
        artifact_bytes_mean=mean["artifact_bytes"],
        artifact_bytes_max=max(columns["artifact_bytes"]),
        seeds=list(results),
        seed_results={str(seed): seed_row(r) for seed, r in results.items()},
        hardware=f"{first['device']}, {first['world_size']} ranks",
        pytorch_version=first["torch"],
        train_steps_mean=mean["steps"],
        train_time_s_mean=mean["train_seconds"],
        eval_time_s_mean=mean["eval_seconds"],
        compliance=compliance,
        technique_summary=technique,
        code_sha256=first["code_sha256"],
        config_sha256=first["config_sha256"],
        tokenizer_sha256=first["data"]["tokenizer_sha256"],
        val_sha256=first["data"]["val_sha256"],
    )


def figures_table(header: str, rows: list[list]) -> str:
    """Cells by type: 6 digits for a float, thousands apart for an int, - for None."""
    form = {float: ".6f", int: ",d"}
    return markdown_table(
        header.split(" | "),
        [
            [cell if cell is None else format(cell, form.get(type(cell), "")) for cell in row]
            for row in rows
        ],
    )


def toggle_rows(results: Results) -> list[list]:
    """One row per toggle; where seeds differ, their values one after the other."""
    rows = []
    for name in dict.fromkeys(name for r in results.values() for name in r["toggles"]):
        acts = [r["toggles"][name] for r in results.values() if name in r["toggles"]]
        steps = [f"{a['first_step']} to {a['last_step']}" if a["active"] else "never" for a in acts]
        effects = ["-" if a["effect"] is None else f"{a['effect']:+.6f}" for a in acts]
        rows.append(
            [
                name,
                f"{sum(a['active'] for a in acts)} of {len(results)}",
                *(
                    " / ".join(dict.fromkeys(cells))
                    for cells in (
                        steps,
                        effects,
                        [a["unit"] for a in acts],
                        [a["scope"] for a in acts],
                    )
                ),
            ]
        )
    return rows


def run_command(results: Results) -> str:
    """Shell lines that repeat the runs inside the folder."""
    first = next(iter(results.values()))
    settings = " ".join(
        f"{name}={shlex.quote(str(int(value) if isinstance(value, bool) else value))}"
        for name, value in first["non_default"].items()
        if name not in PLACE_VARIABLES
    )
    tokenizer = (
        "FILE_OF_THE_OFFICIAL_TOKENIZER"
        if first["data"]["tokenizer_sha256"] == OFFICIAL_TOKENIZER
        else TOKENIZER
    )
    return "\n".join(
        [
            "```sh",
            "pip install -r requirements.txt",
            f"export DATA_PATH=FOLDER_OF_THE_SHARDS TOKENIZER_PATH={tokenizer}",
            f"for seed in {' '.join(map(str, results))}; do",
            f"  SEED=$seed RUN_ID=seed$seed {settings} \\",
            f"    torchrun --standalone --nproc_per_node={first['world_size']} train_gpt.py",
            "done",
            "```",
        ]
    )


def render(results: Results, about: dict) -> str:
    """The generated part of README.md, which is all of it until somebody adds prose outside the two marks."""
    s, first, n = summarise(results, about), next(iter(results.values())), len(results)
    verdict = {True: "yes", False: "**NO**", None: "no test-time training"}
    kept = {key: verdict[value] for key, value in s["compliance"].items()}
    seeds = [
        [
            str(seed),
            r["steps"],
            f"{r['step_avg_ms']:.1f}",
            f"{r['train_time_s']:.1f}",
            float(r["live_val_bpb"]),
            r["averaged_val_bpb"],
            r["quantised_val_bpb"],
            r["val_bpb"],
            f"{r['eval_time_s']:.1f}",
            r["bytes_total"],
            CAP_BYTES - r["bytes_total"],
        ]
        for seed, r in s["seed_results"].items()
    ]
    deviation = (
        "1 seed: no standard deviation"
        if n == 1
        else f"{n} seeds, sample standard deviation "
        f"{s['val_bpb_std']:.6f} BPB, {s['val_loss_std']:.6f} nats"
    )
    worst = {
        key: max(r[key] for r in results.values()) for key in ("train_seconds", "eval_seconds")
    }
    hashes = "".join(f"\n- {name}: sha256 `{digest}`" for name, digest in s["val_sha256"].items())
    sections = [
        f"# {s['name']}: val_bpb {s['val_bpb']:.6f}",
        s["blurb"],
        f"{s['author']} ({s['github_id']}), {s['date']}, track: {s['track']}",
        f"Mean val_bpb **{s['val_bpb']:.6f}**, val_loss {s['val_loss']:.6f} nats per token ({deviation}); "
        f"scored: {first['scored']}.",
        figures_table(
            "seed | steps | ms/step | train s | live | averaged | quantised | final BPB | eval s | bytes | headroom",
            seeds,
        ),
        f"Hardware: {s['hardware']}; torch {s['pytorch_version']}, Python {first['python']}.",
        "## Run it inside this folder",
        run_command(results),
        "## Toggles",
        figures_table(
            "toggle | active in seeds | steps | effect | unit | scope", toggle_rows(results)
        ),
        "## Compliance",
        f"- training at most {LIMIT_SECONDS} s: {kept['train_under_600s']}, the longest took {worst['train_seconds']:.1f} s\n"
        f"- scoring at most {LIMIT_SECONDS} s: {kept['eval_under_600s']}, the longest took {worst['eval_seconds']:.1f} s\n"
        f"- code and artifact at most {CAP_BYTES:,} bytes: {kept['artifact_under_16mb']}, the largest has {s['bytes_total']:,}\n"
        f"- three seeds or more, one script and one configuration: {kept['three_seeds']}, {n}\n"
        f"- test-time training only on tokens already scored: {kept['score_first_ttt']}\n"
        f"- data: manifest {first['data']['manifest']}",
        "## Size",
        f"Largest seed: train_gpt.py {s['bytes_code']:,} bytes + artifact {s['artifact_bytes_max']:,} bytes = "
        f"{s['bytes_total']:,} of {CAP_BYTES:,} bytes, headroom {CAP_BYTES - s['bytes_total']:,}.",
        "## Hashes",
        f"- train_gpt.py: sha256 `{s['code_sha256']}`\n- configuration: sha256 `{s['config_sha256']}`\n"
        f"- tokenizer: sha256 `{s['tokenizer_sha256']}`{hashes}",
    ]
    return f"{BEGIN}\n" + "\n\n".join(sections) + f"\n{END}\n"


def build_submission(folders: list[Path], out: Path, about: dict) -> Path:
    """Makes the leaderboard folder `out` from run folders, one per seed; all or nothing. Refusal on runs that do not belong
    together, or are no good complete training, on missing files, missing texts, and when `out` is not empty."""
    results, origin, out = {}, {}, Path(out)
    if not folders:
        raise Refusal("no run: name the run folders, LOGS_DIR/RUN_ID, one per seed")
    for folder in map(Path, folders):
        r = read_json(folder / "result.json", f"{folder / 'result.json'}", RESULT_SHAPE)
        if r["seed"] in origin:
            raise Refusal(
                f"{folder}: seed {r['seed']}, as {origin[r['seed']]}; give one run per seed"
            )
        results[r["seed"]], origin[r["seed"]] = r, folder
    results = dict(sorted(results.items()))
    for problem in itertools.chain(unfit(results), unlike(results)):
        raise Refusal(problem)
    files = {
        "README.md": render(results, about),
        "submission.json": json.dumps(summarise(results, about), indent=1) + "\n",
    }
    sources = {"requirements.txt": Path(train_gpt.__file__).with_name("requirements.txt")}
    for seed, folder in origin.items():
        sources |= {
            f"train_seed{seed}.log": folder / "train.log",
            f"result_seed{seed}.json": folder / "result.json",
            "train_gpt.py": folder / "train_gpt.py",
        }
        check_hash(
            sources["train_gpt.py"], f"{sources['train_gpt.py']}", results[seed]["code_sha256"]
        )
    first = results[min(results)]
    if first["data"]["tokenizer_sha256"] != OFFICIAL_TOKENIZER:
        sources[TOKENIZER] = Path(first["config"]["tokenizer_path"])
        check_hash(
            sources[TOKENIZER],
            f"TOKENIZER_PATH={sources[TOKENIZER]}",
            first["data"]["tokenizer_sha256"],
        )
    write_folder(out, files, sources)
    return out


def check_hash(path: Path, name: str, expected: str) -> None:
    """Refusal unless the file is there and has this sha256."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise Refusal(
            f"{name}: {error.strerror}; put back the file of the runs, sha256 {shown(expected)}"
        ) from None
    if found != expected:
        raise Refusal(
            f"{name}: sha256 {found}, but the results say {shown(expected)}; put back the file of the runs"
        )


def write_folder(out: Path, files: dict[str, str], sources: dict[str, Path]) -> None:
    """Writes contents and copies files into a new folder that gets its name when it is complete. Refusal when it cannot."""
    problem, draft = f"{out}: exists and is not empty; choose another folder", None
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            out.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            draft.chmod(0o755)
            for name, content in files.items():
                (draft / name).write_bytes(content.encode())
            for name, path in sources.items():
                shutil.copyfile(path, draft / name)
            os.replace(draft, out)
            return
    except OSError as error:
        problem = f"{out}: cannot be made ({error.strerror}: {error.filename}); mend that or choose another folder"
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)  # after the rename there is none
    raise Refusal(problem)


def copy_in(folder: Path, copy: Path) -> list[str]:
    """Copies a folder of plain files; returns what in it is a link, a device, unreadable or too much."""
    everything = (
        Path(root, name) for root, *names in os.walk(folder) for name in itertools.chain(*names)
    )
    entries, room, problems = list(itertools.islice(everything, MAX_FILES + 1)), MAX_BYTES, []
    if not folder.is_dir() or len(entries) > MAX_FILES:
        return [
            f"{folder}: no folder, or more than {MAX_FILES} files; name the folder that a build made"
        ]
    for path in entries:
        name = path.relative_to(folder)
        try:
            status = path.lstat()
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                problems.append(f"{name}: a link or a device; put a plain file there")
            elif stat.S_ISREG(status.st_mode):
                room -= status.st_size
                if room < 0:
                    problems.append(
                        f"{name}: {status.st_size:,} bytes; a whole submission has at most {MAX_BYTES:,}"
                    )
                else:
                    shutil.copyfile(path, copy / name, follow_symlinks=False)
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror}); make it readable")
    return problems


def wrong_seed_files(folder: Path, seeds: list) -> list[str]:
    """Logs and results that are missing, or that submission.json does not know."""
    if not seeds or any(type(seed) is not int for seed in seeds):
        return [
            f"submission.json.seeds: {shown(seeds)}, not a list of whole numbers; build it again from runs"
        ]
    wanted = {
        name for seed in seeds for name in (f"train_seed{seed}.log", f"result_seed{seed}.json")
    }
    found = {
        path.name
        for pattern in ("train_seed*.log", "result_seed*.json")
        for path in folder.glob(pattern)
    }
    return [
        f"{name}: "
        + (
            "missing, although submission.json has its seed; build it again from runs"
            if name in wanted
            else "submission.json does not have its seed; build it again from all runs"
        )
        for name in sorted(wanted ^ found)
    ]


def wrong_figures(results: Results, code_bytes: int) -> Iterator[str]:
    """Figures of a result that break a limit of the rules or contradict each other."""
    for seed, r in results.items():
        name, total = f"result_seed{seed}.json", code_bytes + r["artifact_bytes"]
        inactive = [toggle for toggle, row in r["toggles"].items() if not row["active"]] or r.get(
            "inactive"
        )
        nats = r["val_bpb"] * math.log(2) * r["val_bytes"]
        for broken, problem in (
            (
                [r["seed"], r["config"]["seed"]] != [seed, seed],
                f"seed is {r['seed']}, in config {r['config']['seed']}",
            ),
            (
                (r["code_bytes"], r["total_bytes"]) != (code_bytes, total),
                f"code_bytes is {r['code_bytes']:,} and total_bytes "
                f"{r['total_bytes']:,}, but train_gpt.py has {code_bytes:,} bytes, which makes {total:,}",
            ),
            (
                total > CAP_BYTES,
                f"code + artifact have {total:,} bytes, over the cap of {CAP_BYTES:,}",
            ),
            (
                r["train_seconds"] > LIMIT_SECONDS,
                f"train_seconds is {r['train_seconds']:.1f}, over {LIMIT_SECONDS}",
            ),
            (
                r["eval_seconds"] > LIMIT_SECONDS,
                f"eval_seconds is {r['eval_seconds']:.1f}, over {LIMIT_SECONDS}",
            ),
            (inactive, f"{shown(inactive)} was requested and did nothing"),
            (
                r["val_bytes"] < 1
                or not math.isclose(nats, r["val_loss"] * r["val_tokens"], rel_tol=1e-6),
                f"val_bpb is {r['val_bpb']}, which val_loss, val_tokens and val_bytes do not give",
            ),
        ):
            if broken:
                yield f"{name}: {problem}; train that seed again"


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
    elif type(stored) is not type(made) or not (
        stored == made or (type(made) is float and math.isclose(stored, made))
    ):
        yield f"{where}: {shown(stored)}, but the logs give {shown(made)}"


def wrong_readme(readme: str, results: Results, about: dict) -> Iterator[str]:
    """A generated part that is not what the logs give, and numbers in the prose that no result shows."""
    start, end = readme.find(BEGIN), readme.find(END) + len(END)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or start > end:
        yield f"README.md: needs one part between {BEGIN} and {END}; build it again from runs"
        return
    for old, new in itertools.zip_longest(
        readme[start:end].split("\n"), render(results, about).strip().split("\n")
    ):
        if old != new:
            yield f"README.md: its generated part says {shown(old)}, but the logs give {shown(new)}"
            return
    pool = sorted(
        {abs(number) for number in leaves([list(results.values()), summarise(results, about)])}
    )
    for match in DECIMAL.finditer(
        "\n".join([readme[:start], readme[end:], *map(about.get, ABOUT)])
    ):
        value, half = (
            float(match[0].replace(",", "")),
            0.500001 * 10.0 ** (int(match[2] or 0) - len(match[1])),
        )
        if (near := bisect.bisect_left(pool, value - half)) == len(pool) or pool[
            near
        ] > value + half:
            yield f"README.md: no result shows the number {match[0]} of its prose or of a text in submission.json; correct it"


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
    answer[seed] = dict(table=train_gpt.final_table(result), config_sha256=cfg.digest(), non_default=cfg.non_default())
print("\\0" + json.dumps(answer))
"""


def ask_script(folder: Path, seeds: list[int]) -> tuple[str, dict]:
    """Imports the folder's train_gpt.py in a process of its own, with next to no environment. Returns (what went wrong,
    seed -> its final table, configuration hash and non-default settings as that script gives them)."""

    def listing() -> dict:
        return {
            path: (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in folder.parent.rglob("*")
        }

    home = folder.parent / "home"
    home.mkdir()
    before = listing()
    env = (
        {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
        | dict.fromkeys(("HOME", "TMPDIR", "PYTHONPYCACHEPREFIX"), str(home))
        | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUSERBASE": site.getuserbase(),
            "PYTHONIOENCODING": "utf-8",
        }
    )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", ASK_SCRIPT, *map(str, seeds)],
            cwd=folder,
            env=env,
            stdout=out,
            stdin=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = child.wait(IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"is not imported within {IMPORT_SECONDS} s", {}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with all that it started
            child.wait()
        printed, complaint = (
            file.seek(0) or file.read(MAX_BYTES).decode("utf-8", "replace")
            for file in (out, errors)
        )
    chatter, mark, answer = printed.rpartition("\0")
    last = (complaint.strip().splitlines() or ["it ended early"])[-1]
    if code or not mark:
        return f"does not import, or does not read its results ({last})", {}
    if chatter or complaint:
        return f"prints {shown(chatter or complaint)} when imported", {}
    if listing() != before:
        return "writes files when imported", {}
    try:
        answer = json.loads(answer)
        return next(misfits(answer, ANSWER_SHAPE, "final_table"), ""), answer
    except (ValueError, RecursionError):
        return f"answers {shown(answer)}", {}


def wrong_logs(folder: Path, results: Results) -> list[str]:
    """Logs that do not show their results, by the word of the folder's own script; configurations that it reads differently."""
    problem, answer = ask_script(folder, list(results))
    if problem:
        return [f"train_gpt.py: {problem}; ship the source as run, with all that it imports"]
    problems = []
    for seed, r in results.items():
        said, name = answer.get(str(seed), {}), f"result_seed{seed}.json"
        log = read_text(folder / f"train_seed{seed}.log", f"train_seed{seed}.log")
        if said.get("table", "\0").strip() not in log:
            problems.append(
                f"train_seed{seed}.log: does not show the final table of {name}; put back both files of that run"
            )
        problems += [
            f"{name}: {key} is not what train_gpt.py makes of its config; put back the file of that run"
            for key in ("config_sha256", "non_default")
            if said.get(key) != r[key]
        ]
    return problems


def check_copy(folder: Path) -> list[str]:
    """check_submission of a folder of plain files; raises the first Refusal of a file. The script runs when all else is well."""
    problems = [
        f"{name}: missing; build it again from runs"
        for name in REQUIRED
        if not (folder / name).is_file()
    ]
    if problems:
        return problems
    submission = read_json(folder / "submission.json", "submission.json", SUBMISSION_SHAPE)
    if problems := wrong_seed_files(folder, submission["seeds"]):
        return problems
    names = {seed: f"result_seed{seed}.json" for seed in sorted(submission["seeds"])}
    results = {seed: read_json(folder / name, name, RESULT_SHAPE) for seed, name in names.items()}
    if problems := [*unfit(results), *unlike(results)]:
        return problems
    first = results[min(results)]
    check_hash(folder / "train_gpt.py", "train_gpt.py", first["code_sha256"])
    if first["data"]["tokenizer_sha256"] != OFFICIAL_TOKENIZER:
        check_hash(folder / TOKENIZER, TOKENIZER, first["data"]["tokenizer_sha256"])
    about, source = {key: submission[key] for key in ABOUT}, (folder / "train_gpt.py").read_bytes()
    if len(source) > MAX_CODE_BYTES:  # to compile it takes up to 600 times the memory
        return [
            f"train_gpt.py: {len(source):,} bytes, over {MAX_CODE_BYTES:,}; no script of a person is that long"
        ]
    problems = [
        *wrong_figures(results, len(source)),
        *differences(submission, summarise(results, about), "submission.json"),
        *wrong_readme(read_text(folder / "README.md", "README.md"), results, about),
    ]
    return problems or wrong_logs(folder, results)


def check_submission(folder: Path) -> list[str]:
    """The problems of a submission folder, one line each; none when it is good. Reads and runs only a copy of that folder,
    and trusts no file in it; but its train_gpt.py is executed, once everything else is found good."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "submission"
        try:
            problems = copy_in(Path(folder), copy) or check_copy(copy)
        except Refusal as refusal:
            problems = [str(refusal)]
    more = [f"and {len(problems) - MAX_PROBLEMS:,} more"] * (len(problems) > MAX_PROBLEMS)
    return [
        printable(problem if len(problem) < 600 else f"{problem[:400]} ... {problem[-100:]}")
        for problem in problems[:MAX_PROBLEMS] + more
    ]

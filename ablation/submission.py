"""Leaderboard folders: how one is written. ablation/ours.py compares with the same rendering."""

import contextlib
import hashlib
import html
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import train_gpt
from ablation.records import (
    FINGERPRINT,
    LOST_SHAPE,
    MACHINE,
    PLACES,
    RESULT_SHAPE,
    lookup,
    metric,
    misfits,
    read_json,
    shown,
)
from ablation.report import markdown_table
from train_gpt import (
    CALIBRATE,
    LIMIT_SECONDS,
    PACKED_NAME,
    READABLE_NAME,
    Refusal,
    unpack_code,
)

# sha256 of fineweb_1024_bpe.model; any other tokenizer lies in the folder under this name
OFFICIAL_TOKENIZER = "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a"
TOKENIZER = "tokenizer.model"

# of the rules, whatever the runs were told; train_gpt.py has LIMIT_SECONDS
CAP_BYTES = 16_000_000
# said by a folder that is held to none of the leaderboard's limits
NO_RECORD = re.compile(r"non[-_ ]?record|unlimited", re.IGNORECASE)

# the generated part of README.md stands between these
BEGIN = "<!-- generated -->"
END = "<!-- end -->"

# what no log can tell; the first three are required
ABOUT = ("author", "github_id", "name", "blurb", "track")

# the run command, or its reader, sets these
PLACE_VARIABLES = {"DATA_PATH", "TOKENIZER_PATH", "LOGS_DIR", "RUN_ID", "SEED"}

VERDICTS = {True: "yes", False: "**NO**", None: "no test-time training"}

SEED_COLUMNS = (
    "seed",
    "steps",
    "ms/step",
    "train s",
    "live",
    "averaged",
    "quantised",
    "final BPB",
    "eval s",
    "bytes",
    "headroom",
)
TOGGLE_COLUMNS = ("toggle", "active in seeds", "steps", "effect", "unit", "scope")

Results = dict  # seed -> its result.json, by ascending seed


# ── Do the runs belong together? ──────────────────────────────────────────────────────────────────


def unfit(results: Results) -> Iterator[str]:
    """Runs that are no complete, good training."""
    for seed, r in results.items():
        borrowed = borrowed_training(r)
        if borrowed:
            problem = f"{borrowed}, so it is not a full training"
            yield f"seed {seed}: {problem}; give the run that trained"
            return
        if None in (r["steps"], r["train_seconds"], r["live_val_bpb"]) or r["steps"] < 1:
            problem = f"steps={r['steps']}, so it trained nothing"
            yield f"seed {seed}: {problem}; give the run that trained"
        if r["exit_code"]:
            meaning = train_gpt.EXIT_CODES.get(r["exit_code"], "unknown")
            problem = f"exit_code={r['exit_code']} ({meaning})"
            yield f"seed {seed}: {problem}; only good runs count, run it again"
        for name in r["non_default"]:
            # it stands in the README's command
            if not re.fullmatch(r"[A-Z0-9_]+", name):
                yield f"seed {seed}: non_default {shown(name)}: no name of a setting; run it again"


def borrowed_training(r: dict) -> str:
    """The setting by which a run took its weights from another one; empty when it trained them."""
    for key, source in (
        ("eval_only", r["config"].get("eval_only")),
        ("checkpoint", r["config"].get("checkpoint")),
        ("checkpoint", r.get("checkpoint")),
    ):
        if source:
            return f"{key}={shown(source)}"
    return ""


def identity(r: dict) -> dict:
    """What must be the same in every run of a submission."""
    found = {key: lookup(r, key) for key in FINGERPRINT if key not in MACHINE}
    for key, value in r["data"].items():
        if key not in ("path", "manifest"):
            found[f"data.{key}"] = value
    for key, value in r["config"].items():
        if key not in PLACES:
            found[key.upper()] = value
    found["config_sha256"] = r["config_sha256"]
    return found


def unlike(results: Results) -> Iterator[str]:
    """What differs between the runs although it must not, with both values."""
    (seed, first), *others = [(seed, identity(r)) for seed, r in results.items()]
    for other, found in others:
        for key in dict.fromkeys([*first, *found]):
            mine, its = first.get(key), found.get(key)
            if mine != its:
                yield (
                    f"{key}: {shown(mine)} with seed {seed}, but {shown(its)} with seed {other}; "
                    "average only runs of one script, configuration, data and machine"
                )


# ── What a reader of the scores has to know ───────────────────────────────────────────────────────


def list_of(r: dict, key: str) -> list:
    """A list of a result; empty where it has none."""
    value = r.get(key)
    if isinstance(value, dict):
        return [f"{name}: {part}" for name, part in value.items()]
    return value if isinstance(value, list) else []


def launches_of(r: dict) -> int:
    """How often a run was started, as far as its result says."""
    told = r.get("launches")
    return max(told if type(told) is int else 1, len(list_of(r, "resumed")) + 1)


# keys of a result that say what was not as usual; results of older code lack some
TOLD = ("resumed", "skipped", "warnings", "without_effect")


def lost_documents(r: dict) -> str:
    """That validation documents do not come back from their tokens; empty when all do."""
    lost = r["data"].get("lost_documents")
    if lost is None:
        return ""
    return next(misfits(lost, LOST_SHAPE, "data.lost_documents"), "") or train_gpt.lost_text(lost)


def remarks(r: dict) -> list[str]:
    """What was not as usual in a run, in words; empty when it was trained in one go, and well."""
    found = []
    if launches_of(r) > 1:
        steps = shown(list_of(r, "resumed"))[1:-1] or "none"
        lost = r.get("lost_seconds")
        words = "what the earlier ones spent after their last checkpoint is not known"
        if type(lost) in (int, float):
            words = f"{lost:.1f} s from a checkpoint to an end were lost or done again"
        found.append(f"{launches_of(r)} launches: went on after step {steps}; {words}")
    skipped = list_of(r, "skipped")
    if skipped:
        steps = shown(skipped)[1:-1]
        found.append(f"left out {len(skipped)} steps, as they were not finite: {steps}")
    if lost_documents(r):
        found.append(lost_documents(r))
    found += [f"warned: {shown(text)[1:-1]}" for text in list_of(r, "warnings")]
    without_effect = list_of(r, "without_effect")
    if without_effect:
        found.append(f"settings without effect: {shown(without_effect)[1:-1]}")
    silent = [key for key in TOLD if key not in r]
    if silent:
        found.append(f"its result says nothing of {', '.join(silent)}")
    return found


# ── submission.json ───────────────────────────────────────────────────────────────────────────────


def seed_row(r: dict) -> dict:
    """One seed's figures in submission.json."""
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
        launches=launches_of(r),
        lost_seconds=r.get("lost_seconds"),
        resumed_after_steps=r.get("resumed"),
        skipped_steps=r.get("skipped"),
        lost_documents=r["data"].get("lost_documents"),
        warnings=r.get("warnings"),
        without_effect=r.get("without_effect"),
    )


def column(results: Results, key: str) -> list:
    return [r[key] for r in results.values()]


def mean(results: Results, key: str) -> float:
    return statistics.fmean(column(results, key))


def deviation(results: Results, key: str) -> float | None:
    """Sample standard deviation over the seeds; None with one seed."""
    if len(results) == 1:
        return None
    return statistics.stdev(column(results, key))


def training_seconds(r: dict) -> float:
    """Seconds in which training text was read: of the steps, and of a calibration behind them."""
    return r["train_seconds"] + r["seconds"].get(CALIBRATE, 0.0)


def documents_come_back(results: Results) -> bool | None:
    """Whether validation can be decoded from its tokens; None: the manifest does not say."""
    if any(map(lost_documents, results.values())):
        return False
    stated = [r["data"].get("lost_documents") for r in results.values()]
    return None if None in stated else True


def compliance_of(results: Results) -> dict[str, bool | None]:
    """Each rule of the contest that figures can show; None: it does not apply."""
    first = next(iter(results.values()))
    return dict(
        train_under_600s=max(map(training_seconds, results.values())) <= LIMIT_SECONDS,
        three_seeds=len(results) >= 3,
        artifact_under_16mb=max(column(results, "total_bytes")) <= CAP_BYTES,
        eval_under_600s=max(column(results, "eval_seconds")) <= LIMIT_SECONDS,
        documents_come_back=documents_come_back(results),
        score_first_ttt=None if first["config"]["ttt_mode"] == "none" else True,
    )


def texts_of(results: Results, about: dict, compliance: dict, technique: str) -> dict[str, str]:
    """The texts of a submission. Refusal when one is missing or is not one printable line."""
    first = next(iter(results.values()))
    on_contest_machine = first["world_size"] == 8 and "H100" in first["device"]
    track = "none: not three seeds on 8xH100 within the limits"
    if on_contest_machine and False not in compliance.values():
        track = "10min_16mb"

    texts = {key: about.get(key) for key in ABOUT}
    texts["blurb"] = texts["blurb"] or f"Active: {technique}."
    texts["track"] = texts["track"] or track
    for key, text in texts.items():
        good = isinstance(text, str) and text.strip() and text.isprintable()
        if not good or BEGIN in text or END in text:
            option = f"--{key.replace('_', '-')} TEXT"
            raise Refusal(f"{key}: {shown(text)}, not one line of text; give {option}")
    return texts


def summarise(results: Results, about: dict) -> dict:
    """submission.json: every figure from the results, every text from `about`.

    Refusal when a text is missing or odd.
    """
    first = next(iter(results.values()))
    active = []
    for r in results.values():
        active += [name for name, row in r["toggles"].items() if row["active"]]
    technique = ", ".join(dict.fromkeys(active)) or "no toggle"
    compliance = compliance_of(results)
    return texts_of(results, about, compliance, technique) | dict(
        date=max(column(results, "date")),
        val_bpb=mean(results, "val_bpb"),
        val_bpb_std=deviation(results, "val_bpb"),
        val_loss=mean(results, "val_loss"),
        val_loss_std=deviation(results, "val_loss"),
        bytes_total=max(column(results, "total_bytes")),
        bytes_code=max(column(results, "code_bytes")),
        artifact_bytes_mean=mean(results, "artifact_bytes"),
        artifact_bytes_max=max(column(results, "artifact_bytes")),
        seeds=list(results),
        seed_results={str(seed): seed_row(r) for seed, r in results.items()},
        hardware=f"{first['device']}, {first['world_size']} ranks",
        pytorch_version=first["torch"],
        train_steps_mean=mean(results, "steps"),
        train_time_s_mean=mean(results, "train_seconds"),
        eval_time_s_mean=mean(results, "eval_seconds"),
        compliance=compliance,
        technique_summary=technique,
        code_sha256=first["code_sha256"],
        config_sha256=first["config_sha256"],
        tokenizer_sha256=first["data"]["tokenizer_sha256"],
        val_sha256=first["data"]["val_sha256"],
    )


# ── README.md ─────────────────────────────────────────────────────────────────────────────────────


def cell_text(cell) -> str | None:
    """6 digits for a float, thousands apart for an int; None stays what it is."""
    if isinstance(cell, float):
        return f"{cell:.6f}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,d}"
    return cell


def figures_table(header: tuple[str, ...], rows: list[list]) -> str:
    return markdown_table(list(header), [[cell_text(cell) for cell in row] for row in rows])


def seed_rows(summary: dict) -> list[list]:
    """One line per seed, in the order of SEED_COLUMNS."""
    rows = []
    for seed, r in summary["seed_results"].items():
        row = [
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
        rows.append(row)
    return rows


def effect_in_words(row: dict) -> str:
    """A toggle's effect, and what it amounts to where the run's code has said so."""
    effect = "-" if row["effect"] is None else f"{row['effect']:+.6f}"
    verdict = row.get("verdict")
    return f"{effect} ({verdict})" if verdict else effect


def toggle_rows(results: Results) -> list[list]:
    """One row per toggle; where seeds differ, their values one after the other."""
    rows = []
    for name in dict.fromkeys(name for r in results.values() for name in r["toggles"]):
        acts = [r["toggles"][name] for r in results.values() if name in r["toggles"]]
        columns = {
            "steps": [
                f"{a['first_step']} to {a['last_step']}" if a["active"] else "never" for a in acts
            ],
            "effect": [effect_in_words(a) for a in acts],
            "unit": [a["unit"] for a in acts],
            "scope": [a["scope"] for a in acts],
        }
        active = sum(a["active"] for a in acts)
        values = [" / ".join(dict.fromkeys(cells)) for cells in columns.values()]
        rows.append([name, f"{active} of {len(results)}", *values])
    return rows


def run_command(results: Results) -> str:
    """Shell lines that repeat the runs inside the folder."""
    first = next(iter(results.values()))
    settings = []
    for name, value in first["non_default"].items():
        if name not in PLACE_VARIABLES:
            text = str(int(value) if isinstance(value, bool) else value)
            settings.append(f"{name}={shlex.quote(text)}")

    tokenizer = TOKENIZER if ships_tokenizer(first) else "FILE_OF_THE_OFFICIAL_TOKENIZER"
    lines = [
        "```sh",
        "pip install -r requirements.txt",
        f"export DATA_PATH=FOLDER_OF_THE_SHARDS TOKENIZER_PATH={tokenizer}",
        f"for seed in {' '.join(map(str, results))}; do",
        f"  SEED=$seed RUN_ID=seed$seed {' '.join(settings)} \\",
        f"    torchrun --standalone --nproc_per_node={first['world_size']} train_gpt.py",
        "done",
        "```",
    ]
    return "\n".join(lines)


def compliance_list(results: Results, summary: dict) -> str:
    """The rules, whether they were kept, and the figure that shows it."""
    first = next(iter(results.values()))
    kept = {key: VERDICTS[value] for key, value in summary["compliance"].items()}
    train = max(map(training_seconds, results.values()))
    evaluation = max(column(results, "eval_seconds"))
    back = kept["documents_come_back"]
    if summary["compliance"]["documents_come_back"] is None:
        back = "not counted by prepare_data.py"
    lines = [
        f"- training at most {LIMIT_SECONDS} s: {kept['train_under_600s']}, "
        f"the longest took {train:.1f} s",
        f"- scoring at most {LIMIT_SECONDS} s: {kept['eval_under_600s']}, "
        f"the longest took {evaluation:.1f} s",
        f"- code and artifact at most {CAP_BYTES:,} bytes: {kept['artifact_under_16mb']}, "
        f"the largest has {summary['bytes_total']:,}",
        f"- three seeds or more, one script and one configuration: {kept['three_seeds']}, "
        f"{len(results)}",
        f"- every validation document comes back from its tokens: {back}",
        f"- test-time training only on tokens already scored: {kept['score_first_ttt']}",
        f"- data: manifest {first['data']['manifest']}",
    ]
    return "\n".join(lines)


def remark_list(results: Results) -> str:
    """What was not as usual, run by run."""
    lines = []
    for seed, r in results.items():
        # nothing that a run wrote ends the generated part, or begins another one
        words = [html.escape(remark, quote=False) for remark in remarks(r)]
        lines += [f"- seed {seed}: {text}" for text in words]
    nothing = "- every run: one launch, no step left out, no warning, no setting without effect"
    return "\n".join(lines) or nothing


def hash_list(summary: dict) -> str:
    lines = [
        f"- train_gpt.py: sha256 `{summary['code_sha256']}`",
        f"- configuration: sha256 `{summary['config_sha256']}`",
        f"- tokenizer: sha256 `{summary['tokenizer_sha256']}`",
    ]
    for name, digest in summary["val_sha256"].items():
        lines.append(f"- {name}: sha256 `{digest}`")
    return "\n".join(lines)


def score_line(results: Results, s: dict) -> str:
    """The mean over the seeds, with its spread."""
    spread = "1 seed: no standard deviation"
    if len(results) > 1:
        spread = (
            f"{len(results)} seeds, sample standard deviation "
            f"{s['val_bpb_std']:.6f} BPB, {s['val_loss_std']:.6f} nats"
        )
    scored = next(iter(results.values()))["scored"]
    return (
        f"Mean val_bpb **{s['val_bpb']:.6f}**, val_loss {s['val_loss']:.6f} nats per token "
        f"({spread}); scored: {scored}."
    )


def size_line(s: dict) -> str:
    return (
        f"Largest seed: train_gpt.py {s['bytes_code']:,} bytes + artifact "
        f"{s['artifact_bytes_max']:,} bytes = {s['bytes_total']:,} of {CAP_BYTES:,} bytes, "
        f"headroom {CAP_BYTES - s['bytes_total']:,}."
    )


def render(results: Results, about: dict) -> str:
    """The generated part of README.md: all of it, until somebody adds prose outside the marks."""
    s = summarise(results, about)
    python = next(iter(results.values()))["python"]
    sections = [
        f"# {s['name']}: val_bpb {s['val_bpb']:.6f}",
        s["blurb"],
        f"{s['author']} ({s['github_id']}), {s['date']}, track: {s['track']}",
        score_line(results, s),
        figures_table(SEED_COLUMNS, seed_rows(s)),
        f"Hardware: {s['hardware']}; torch {s['pytorch_version']}, Python {python}.",
        "## Run it inside this folder",
        run_command(results),
        "## Toggles",
        figures_table(TOGGLE_COLUMNS, toggle_rows(results)),
        "## Compliance",
        compliance_list(results, s),
        "## Launches, steps left out, warnings",
        remark_list(results),
        "## Size",
        size_line(s),
        "## Hashes",
        hash_list(s),
    ]
    return f"{BEGIN}\n" + "\n\n".join(sections) + f"\n{END}\n"


# ── The folder ────────────────────────────────────────────────────────────────────────────────────


def ships_tokenizer(r: dict) -> bool:
    """Whether the folder holds the tokenizer: it does unless everybody has it."""
    return r["data"]["tokenizer_sha256"] != OFFICIAL_TOKENIZER


def read_runs(folders: list[Path]) -> tuple[Results, dict[int, Path]]:
    """(results, seed -> run folder). Refusal on runs that do not belong together or are no good."""
    if not folders:
        raise Refusal("no run: name the run folders, LOGS_DIR/RUN_ID, one per seed")
    results = {}
    origin = {}
    for folder in map(Path, folders):
        r = read_json(folder / "result.json", f"{folder / 'result.json'}", RESULT_SHAPE)
        seed = r["seed"]
        if seed in origin:
            raise Refusal(f"{folder}: seed {seed}, as {origin[seed]}; give one run per seed")
        results[seed] = r
        origin[seed] = folder
    results = dict(sorted(results.items()))
    for problem in itertools.chain(unfit(results), unlike(results)):
        raise Refusal(problem)
    return results, origin


def build_submission(folders: list[Path], out: Path, about: dict) -> Path:
    """Makes the leaderboard folder `out` from run folders, one per seed; all or nothing.

    Refusal on runs that do not belong together or are no good complete training, on missing files
    or texts, and when `out` is not empty.
    """
    out = Path(out)
    results, origin = read_runs(folders)
    texts = {
        "README.md": render(results, about),
        "submission.json": json.dumps(summarise(results, about), indent=1) + "\n",
    }
    sources = {"requirements.txt": Path(train_gpt.__file__).with_name("requirements.txt")}
    for seed, folder in origin.items():
        sources |= script_files(folder, results[seed])
        sources[f"train_seed{seed}.log"] = folder / "train.log"
        sources[f"result_seed{seed}.json"] = folder / "result.json"

    first = results[min(results)]
    if ships_tokenizer(first):
        tokenizer = Path(first["config"]["tokenizer_path"])
        check_hash(tokenizer, f"TOKENIZER_PATH={tokenizer}", first["data"]["tokenizer_sha256"])
        sources[TOKENIZER] = tokenizer
    write_folder(out, texts, sources)
    return out


def script_files(folder: Path, result: dict) -> dict[str, Path]:
    """What ships of the script of a run: the very file that was counted, and the readable one."""
    readable = folder / "train_gpt.py"
    check_hash(readable, f"{readable}", result["code_sha256"])
    if result["config"].get("pack_code", "none") == "none":
        return {"train_gpt.py": readable}
    packed = folder / PACKED_NAME
    check_hash(packed, f"{packed}", result["code_sha256"], unpacked=True)
    return {"train_gpt.py": packed, READABLE_NAME: readable}


def check_hash(path: Path, name: str, expected: str, unpacked: bool = False) -> bytes:
    """The file's contents. Refusal unless it is there and has this sha256.

    unpacked: of a packed script it is the source that has it, and that is returned.
    """
    remedy = "put back the file of the runs"
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"{name}: {error.strerror}; {remedy}, sha256 {shown(expected)}"
        raise Refusal(problem) from None
    if unpacked:
        with contextlib.suppress(ValueError):
            content = unpack_code(content)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise Refusal(f"{name}: sha256 {found}, but the results say {shown(expected)}; {remedy}")
    return content


def write_folder(out: Path, texts: dict[str, str], sources: dict[str, Path]) -> None:
    """A new folder with these texts and copies; it gets its name when it is complete.

    Refusal when it cannot be made.
    """
    draft = None
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Refusal(f"{out}: exists and is not empty; choose another folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        draft.chmod(0o755)
        for name, content in texts.items():
            (draft / name).write_bytes(content.encode())
        for name, path in sources.items():
            shutil.copyfile(path, draft / name)
        os.replace(draft, out)
    except OSError as error:
        problem = f"{out}: cannot be made ({error.strerror}: {error.filename})"
        raise Refusal(f"{problem}; mend that or choose another folder") from None
    finally:
        # after the rename there is none
        if draft:
            shutil.rmtree(draft, ignore_errors=True)

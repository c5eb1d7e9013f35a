"""Leaderboard folders that ablate.py made: everything is compared with what the results give.

In: a folder of plain files with a result per seed. Out: findings. Each check runs whatever the
others found, as far as there is something to compare with.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import train_gpt
from ablation.findings import ERROR, FINE, UNCHECKED, WARNING, Finding, finding, worst_is
from ablation.prose import (
    ANY,
    BPB,
    BYTES,
    HEADROOM,
    MAX_LOGGED,
    NATS,
    SECONDS,
    UNITS,
    Figures,
    Stated,
    numbers,
    numbers_of,
    told_numbers,
)
from ablation.records import (
    NUMBER,
    PERHAPS,
    RESULT_SHAPE,
    TEXT,
    misfits,
    read_json,
    read_text,
    shown,
)
from ablation.script import ask_script
from ablation.submission import (
    ABOUT,
    BEGIN,
    CAP_BYTES,
    END,
    NO_RECORD,
    TOKENIZER,
    Results,
    check_hash,
    list_of,
    lost_documents,
    remarks,
    render,
    ships_tokenizer,
    summarise,
    training_seconds,
    unfit,
    unlike,
)
from train_gpt import CALIBRATE, LIMIT_SECONDS, READABLE_NAME, Refusal

MAX_CODE_BYTES = 1 << 20  # to compile a script takes up to 600 times its size in memory

REQUIRED = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
SUBMISSION_SHAPE = {"seeds": (list,), **dict.fromkeys(ABOUT, TEXT)}

# row of the ledger -> how long it took, and how long it may take
LIMITS_SHAPE = {"*": {"spent": PERHAPS, "limit": NUMBER}}

RESULT_NAME = re.compile(r"result_seed(-?\d{1,18})\.json")

# what train.log says of launches that went on, and of steps that were left out
WENT_ON = re.compile(r"^from a checkpoint: (\d+) steps", re.MULTILINE)
LEFT_OUT = re.compile(r"^WARNING: step (\d+): .*; left out$", re.MULTILINE)
RESULT_LINE = re.compile(r"^RESULT val_bpb (\d+\.\d+) ", re.MULTILINE)
LOG_WARNING = re.compile(r"^WARNING: (.{1,2000})", re.MULTILINE)


class Found(list):
    """Findings, and a way to go on after a Refusal."""

    def attempt(self, function: Callable, *args, **options):
        """What a function returns; None where it refuses, which becomes an error."""
        try:
            return function(*args, **options)
        except Refusal as refusal:
            self.append(finding(str(refusal)))
            return None

    def errors(self, problems) -> bool:
        """Adds lines as errors; whether there was one."""
        before = len(self)
        self += [finding(problem) for problem in problems]
        return len(self) > before


def check_ours(folder: Path, run_script: bool, spoilt: bool) -> list[Finding]:
    """Every finding of a folder that ablate.py submission made, or that says so.

    spoilt: something is wrong already, so that its script is not run.
    """
    found = Found()
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    found.errors(f"{name}: missing; build it again from runs" for name in missing)

    submission = None
    if "submission.json" not in missing:
        name = "submission.json"
        submission = found.attempt(read_json, folder / name, name, SUBMISSION_SHAPE)
    results, complete = read_results(folder, submission, found)
    if not results:
        found.append(Finding(UNCHECKED, "results", "none can be read", "build it again from runs"))
        return found

    found.errors(unfit(results))
    found.errors(unlike(results))
    if not found.errors(wrong_files(folder, results)):
        found.append(Finding(FINE, "train_gpt.py", "the script of the results"))
    if "train_gpt.py" not in missing:
        code_bytes = (folder / "train_gpt.py").stat().st_size
        if not found.errors(wrong_figures(results, code_bytes)):
            figures = "bytes, seconds and scores keep the limits and agree with each other"
            found.append(Finding(FINE, "results", figures))
    found += remarks_of(results)
    found += check_texts(folder, submission if complete else None, results)
    found += check_logs(folder, results)
    found += check_script(folder, results, run_script, spoilt or worst_is(found, ERROR))
    return found


def read_results(folder: Path, submission: dict | None, found: Found) -> tuple[Results, bool]:
    """(the results that can be read, whether they are those that submission.json names)."""
    there = [RESULT_NAME.fullmatch(path.name) for path in folder.glob("result_seed*.json")]
    seeds = sorted(int(match[1]) for match in there if match)
    complete = submission is not None
    if complete:
        complete = not found.errors(wrong_seed_files(folder, submission["seeds"]))
    results = {}
    for seed in seeds:
        name = f"result_seed{seed}.json"
        result = found.attempt(read_json, folder / name, name, RESULT_SHAPE)
        if result is not None:
            results[seed] = result
    return results, complete and len(results) == len(seeds)


def remarks_of(results: Results) -> Iterator[Finding]:
    """What a reader of the scores has to know of each run."""
    for seed, r in results.items():
        for remark in remarks(r):
            yield Finding(WARNING, f"result_seed{seed}.json", remark)


def check_texts(folder: Path, submission: dict | None, results: Results) -> list[Finding]:
    """submission.json and README.md, beside those that the results give."""
    trained = [r for r in results.values() if None not in (r["train_seconds"], r["live_val_bpb"])]
    trained = [r for r in trained if (r["steps"] or 0) >= 1]
    if submission is None or len(trained) < len(results):
        problem = "not compared with the results, as not all of these can be used"
        return [Finding(UNCHECKED, "submission.json and README.md", problem)]
    found = Found()
    about = {key: submission[key] for key in ABOUT}
    for seed, r in results.items():
        found += wrong_track(seed, r, about["track"])
    summary = found.attempt(summarise, results, about)
    if summary is None:
        return found
    if not found.errors(differences(submission, summary, "submission.json")):
        found.append(Finding(FINE, "submission.json", "every figure is that of the results"))
    if (folder / "README.md").is_file():
        readme = found.attempt(read_text, folder / "README.md", "README.md")
        if readme is not None:
            found += check_readme(folder, readme, results, about)
    return found


def wrong_track(seed: int, r: dict, track: str) -> Iterator[Finding]:
    """What a run may not have in the track that is claimed for it, wherever it ran."""
    where = f"submission.json.track, seed {seed}"
    claimed = not track.startswith("none")
    if lost_documents(r) and claimed:
        problem = f"{shown(track)}, but {lost_documents(r)}"
        yield Finding(ERROR, where, problem, "use a tokenizer that keeps the text, or no track")
    train = "train_seconds with calibration" if CALIBRATE in r["seconds"] else "train_seconds"
    for key, seconds in ((train, training_seconds(r)), ("eval_seconds", r["eval_seconds"])):
        if seconds > LIMIT_SECONDS:
            problem = f"{shown(track)}, but {key} is {seconds:.1f}, over {LIMIT_SECONDS}"
            held = claimed and not NO_RECORD.search(track)
            weight = ERROR if held else WARNING
            yield Finding(weight, where, problem, "make it faster" if held else "say so")


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
    digest = first["code_sha256"]
    script = folder / "train_gpt.py"
    readable = folder / READABLE_NAME
    found = Found()
    source = None
    if script.is_file():
        source = found.attempt(check_hash, script, script.name, digest, unpacked=True)
    if readable.exists() or (source is not None and source != script.read_bytes()):
        found.attempt(check_hash, readable, readable.name, digest)
    if ships_tokenizer(first):
        expected = first["data"]["tokenizer_sha256"]
        found.attempt(check_hash, folder / TOKENIZER, TOKENIZER, expected)
    problems = [str(problem) for problem in found]
    size = max(len(source), script.stat().st_size) if source is not None else 0
    if size > MAX_CODE_BYTES:
        long = f"{size:,} bytes, over {MAX_CODE_BYTES:,}"
        problems.append(f"train_gpt.py: {long}; no script of a person is that long")
    return problems


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
    yield from wrong_seconds(r)
    inactive = [name for name, row in r["toggles"].items() if not row["active"]]
    inactive = inactive or r.get("inactive")
    if inactive:
        yield f"{shown(inactive)} was requested and did nothing"

    nats = r["val_bpb"] * math.log(2) * r["val_bytes"]
    agrees = math.isclose(nats, r["val_loss"] * r["val_tokens"], rel_tol=1e-6)
    if r["val_bytes"] < 1 or not agrees:
        yield f"val_bpb is {r['val_bpb']}, which val_loss, val_tokens and val_bytes do not give"


def wrong_seconds(r: dict) -> Iterator[str]:
    """Seconds over a limit that the run was held to, where it ran: see train_gpt.time_limits.

    A result of older code, which does not say its limits, is held to those of the contest.
    """
    took = {"train": r["train_seconds"], f"score {r['scored']}": r["eval_seconds"]}
    took[CALIBRATE] = r["seconds"].get(CALIBRATE)
    limits = r.get("limits")
    if next(misfits(limits, LIMITS_SHAPE, "limits"), ""):
        limits = {name: dict(spent=took[name], limit=LIMIT_SECONDS) for name in took}
    budget = r["config"].get("max_wallclock_seconds")
    if budget and "train" not in limits:
        yield f"limits have no row 'train', but MAX_WALLCLOCK_SECONDS is {shown(budget)}"
    late = []
    for name, row in limits.items():
        spent = took.get(name)
        if row["spent"] != spent:
            yield f"{name} took {spent} s, but the limit was held against {row['spent']}"
        if max(row["spent"] or 0, spent or 0) > row["limit"]:
            late.append(name)
            yield f"{name} took {spent} s, over {row['limit']:g} s"
    if r.get("over_limit", late) != late:
        yield f"over_limit is {shown(r['over_limit'])}, but by its seconds it is {shown(late)}"


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


# ── README.md ─────────────────────────────────────────────────────────────────────────────────────


def check_readme(folder: Path, readme: str, results: Results, about: dict) -> list[Finding]:
    """The generated part, and every number of what a person wrote."""
    start = readme.find(BEGIN)
    end = readme.find(END) + len(END)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or start > end:
        remedy = "build it again from runs"
        return [Finding(ERROR, "README.md", f"needs one part between {BEGIN} and {END}", remedy)]
    found = []
    generated = readme[start:end].split("\n")
    made = render(results, about).strip().split("\n")
    for old, new in itertools.zip_longest(generated, made):
        if old != new:
            problem = f"its generated part says {shown(old)}, but the logs give {shown(new)}"
            found.append(Finding(ERROR, "README.md", problem, "build it again from runs"))
            break
    else:
        found.append(Finding(FINE, "README.md", "its generated part is that of the results"))

    blank = "\n" * (len(generated) - 1)  # so that numbers keep their lines
    texts = {"README.md": readme[:start] + blank + readme[end:]}
    texts |= {f"submission.json.{key}": about[key] for key in ABOUT}
    stated = {}
    for name, text in texts.items():
        stated[name], long = numbers_of(name, text)
        found += long
    if any(stated.values()):
        strict, loose = known_figures(folder, results, summarise(results, about))
        for name, ones in stated.items():
            found += wrong_numbers(name, ones, strict, loose)
    return found


def known_figures(folder: Path, results: Results, summary: dict) -> tuple[Figures, Figures]:
    """(what results show, what results and logs show)."""
    strict = Figures()
    strict.add_json(list(results.values()))
    strict.add_json(summary)
    for r in results.values():
        for kind, value in effects_of(r):
            strict.add(kind, value)
        for kind, key in ((BPB, "bpb"), (NATS, "loss")):
            strict.add_differences(kind, stages_of(r, key))
        strict.add(HEADROOM, CAP_BYTES - r["total_bytes"])
        strict.add(SECONDS, r["train_seconds"] / r["steps"])
    for kind, key in RESULT_FIGURES:
        strict.add_group(kind, [r[key] for r in results.values()])
    loose = copy.deepcopy(strict)
    for seed in results:
        path = folder / f"train_seed{seed}.log"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            for number in itertools.islice(numbers(text), MAX_LOGGED):
                loose.add(ANY, number.value)
    return strict, loose


def effects_of(r: dict) -> Iterator[tuple[str, float]]:
    """(kind, value) of what toggles did, in the unit that each says."""
    for row in r["toggles"].values():
        kind, unit = UNITS.get(row["unit"].lower(), (ANY, 1.0))
        interval = row.get("effect_interval")
        ends = interval if isinstance(interval, list) else []
        for value in (row["effect"], *ends):
            if type(value) in (int, float):
                yield kind, value * unit


def stages_of(r: dict, key: str) -> list[float]:
    """A figure of every score of a run: live, averaged, quantised, and each way of scoring."""
    scores = r.get("scores")
    rows = scores.values() if isinstance(scores, dict) else []
    found = [row.get(key) for row in rows if isinstance(row, dict)]
    return [value for value in found if type(value) in (int, float)]


RESULT_FIGURES = (
    (BPB, "val_bpb"),
    (BPB, "quantised_val_bpb"),
    (BPB, "live_val_bpb"),
    (NATS, "val_loss"),
    (BYTES, "total_bytes"),
    (BYTES, "artifact_bytes"),
    (SECONDS, "train_seconds"),
    (SECONDS, "eval_seconds"),
    (ANY, "steps"),
)


def is_result(n: Stated) -> bool:
    """Whether a number reads like a result: by its unit, its decimals, or its size."""
    return n.is_claim or (n.kind == ANY and (n.half <= 0.5e-3 or n.value >= 1e6))


def wrong_numbers(
    name: str, stated: list[Stated], strict: Figures, loose: Figures
) -> Iterator[Finding]:
    """Numbers of a text: a result that no run has is an error, another one was not checked."""
    shown_ones = 0
    lost = []
    for n in stated:
        if (strict if is_result(n) else loose).shows(n):
            shown_ones += 1
        elif is_result(n):
            problem = f"no result shows the number {n.text}"
            yield Finding(ERROR, f"{name}, line {n.line}", problem, "correct it")
        else:
            lost.append(n)
    if shown_ones or lost:
        yield told_numbers(name, shown_ones, len(stated), lost)


# ── Logs, and the script ──────────────────────────────────────────────────────────────────────────


def check_logs(folder: Path, results: Results) -> Iterator[Finding]:
    """Logs that say another score, or launches and steps of which their results say nothing."""
    for seed, r in results.items():
        name = f"train_seed{seed}.log"
        path = folder / name
        if not path.is_file():
            continue
        log = path.read_text(encoding="utf-8", errors="replace")
        said = RESULT_LINE.findall(log)
        if not said or said[-1] != f"{r['val_bpb']:.6f}":
            problem = f"does not show the final table of result_seed{seed}.json"
            yield Finding(ERROR, name, problem, "put back both files of that run")
        for pattern, key, words in (
            (WENT_ON, "resumed", "goes on from a checkpoint after"),
            (LEFT_OUT, "skipped", "leaves out the steps"),
        ):
            told = {step for step in list_of(r, key) if type(step) is int}
            # one that began after the last step trained nothing
            seen = {int(step) for step in pattern.findall(log)}
            hidden = sorted(step for step in seen - told if step < (r["steps"] or 0))
            if hidden:
                problem = f"{words} {shown(hidden)}, of which result_seed{seed}.json says nothing"
                yield Finding(ERROR, name, problem, "put back both files of that run")
        told = {str(warning) for warning in list_of(r, "warnings")}
        warned = [text for text in dict.fromkeys(LOG_WARNING.findall(log)) if text not in told]
        for warning in warned[:3]:
            yield Finding(WARNING, name, f"warned: {warning}")
        if len(warned) > 3:
            yield Finding(WARNING, name, f"warned {len(warned) - 3} times more", "read it")


def check_script(folder: Path, results: Results, run_script: bool, spoilt: bool) -> list[Finding]:
    """What the script makes of the results: this repository's, or the folder's if that is asked.

    The folder's is run only when everything else is found good.
    """
    if run_script and not spoilt:
        problem, answer = ask_script(folder, list(results))
        if problem:
            remedy = "ship the source as run, with all that it imports"
            return [Finding(ERROR, "train_gpt.py", problem, remedy)]
        return wrong_answers(folder, results, answer)
    first = results[min(results)]
    if first["code_sha256"] == train_gpt.CODE_SHA256:
        return wrong_answers(folder, results, own_answers(results))
    problem = "configurations, tables and imports, which only it can show"
    remedy = "check --run-script runs it: only if you trust it"
    if spoilt and run_script:
        remedy = "mend the errors first"
    return [Finding(UNCHECKED, "train_gpt.py", problem, remedy)]


def own_answers(results: Results) -> dict[str, dict]:
    """As ask_script answers, by this repository's script; without the results that it refuses."""
    answers = {}
    for seed, r in results.items():
        try:
            cfg = train_gpt.Config(**r["config"])
            answers[str(seed)] = {
                "table": train_gpt.final_table(r),
                "config_sha256": cfg.digest(),
                "non_default": cfg.non_default(),
            }
        except Exception as error:  # whatever a stranger wrote into a result
            words = str(error) or type(error).__name__
            answers[str(seed)] = {"problem": f"cannot be read by its script ({words})"}
    return answers


def wrong_answers(folder: Path, results: Results, answers: dict[str, dict]) -> list[Finding]:
    """Logs that do not show their results, configurations that the script reads differently."""
    found = []
    for seed, r in results.items():
        name = f"result_seed{seed}.json"
        said = answers.get(str(seed), {})
        if "problem" in said:
            remedy = "put back the file of that run"
            found.append(Finding(ERROR, f"{name}, train_gpt.py", said["problem"], remedy))
            continue
        log_name = f"train_seed{seed}.log"
        log = ""
        if (folder / log_name).is_file():
            log = (folder / log_name).read_text(encoding="utf-8", errors="replace")
        if said.get("table", "\0").strip() not in log:
            problem = f"does not show the final table of {name}"
            found.append(Finding(ERROR, log_name, problem, "put back both files of that run"))
        for key in ("config_sha256", "non_default"):
            if said.get(key) != r[key]:
                problem = f"{key} is not what train_gpt.py makes of its config"
                found.append(Finding(ERROR, name, problem, "put back the file of that run"))
    if not found:
        problem = f"{len(results)} of {len(results)} show the final table of their results"
        found.append(Finding(FINE, "logs", problem))
    return found

"""Leaderboard folders that other tools made: every finding with its weight, and none too many.

Each case is of a kind that a folder of the contest has: no requirements.txt (most have none), a log
of another seed than its name says, an artifact over the cap, bytes of the artifact alone, the score
of the best seed, a standard deviation that is divided by n.
"""

import hashlib
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import pytest

import ablate
from ablation.check import check_submission
from ablation.findings import ERROR, FINE, UNCHECKED, WARNING

SCRIPT = "import numpy as np\nimport torch\n\nopen('ran', 'w').close()\n" + "# code\n" * 200
CODE = len(SCRIPT)
BPB = {1337: 1.07258208, 42: 1.07324696, 7: 1.07426259}
MODEL = {1337: 15_969_354, 42: 15_967_029, 7: 15_957_953}
LOSS = {seed: round(bpb * 2.58311, 8) for seed, bpb in BPB.items()}


def log_of(seed: int) -> str:
    """A log with the lines that the logs of the contest have in common."""
    bpb, loss, model = BPB[seed], LOSS[seed], MODEL[seed]
    return f"""Hyperparameters:
  matrix_lr: 0.022
  seed: {seed}
train_shards: 80
val_tokens: 40540160
4000/20000 val_loss: 2.8742 val_bpb: 1.1126
4867/20000 val_loss: 2.7700 val_bpb: 1.0723
stopping_early: wallclock_cap train_time: 587{seed % 1000:03d}ms step: 4867/20000
peak memory allocated: 41723 MiB reserved: 47090 MiB
diagnostic pre-quantization post-ema val_loss:2.76877360 val_bpb:1.07184400 eval_time:5993ms
Serialized model: 135409136 bytes
Code size: {CODE} bytes
Serialized model quantized+brotli: {model} bytes
Total submission size quantized+brotli: {model + CODE} bytes
quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:338190ms
total_eval_time:338.2s
"""


def submission_json() -> dict:
    mean = statistics.fmean(BPB.values())
    rows = {
        str(seed): {
            "val_bpb": BPB[seed],
            "val_loss": LOSS[seed],
            "artifact_bytes": MODEL[seed] + CODE,
        }
        for seed in BPB
    }
    return {
        "author": "A",
        "github_id": "a",
        "name": "Fast",
        "date": "2026-04-11",
        "track": "10min_16mb",
        "val_bpb": round(mean, 8),
        "val_bpb_std": round(statistics.stdev(BPB.values()), 8),
        "val_loss": round(statistics.fmean(LOSS.values()), 8),
        "bytes_total": max(MODEL.values()) + CODE,
        "bytes_code": CODE,
        "seeds": list(BPB),
        "seed_results": rows,
    }


def readme() -> str:
    mean = statistics.fmean(BPB.values())
    rows = "".join(f"| {n} | 4,867 | **{BPB[n]:.5f}** | {MODEL[n] + CODE:,} |\n" for n in BPB)
    largest = (max(MODEL.values()) + CODE) / 1e6
    return f"""# Fast: val_bpb {mean:.5f} (3-seed mean) | {largest:.2f} MB | 8xH100, 587 s

| seed | steps | BPB | bytes |
| --- | --- | --- | --- |
{rows}
MATRIX_LR=0.022 as in #1493, on torch 2.9.1+cu128, scored in 338 s.
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good folder of somebody else, to be spoilt."""
    made = tmp_path / "records" / "fast"
    made.mkdir(parents=True)
    files = {
        "README.md": readme(),
        "submission.json": json.dumps(submission_json()),
        "train_gpt.py": SCRIPT,
        "requirements.txt": "torch==2.9.1\nnumpy\n",
    } | {f"train_seed{seed}.log": log_of(seed) for seed in BPB}
    for name, text in files.items():
        (made / name).write_text(text)
    return made


def lines(folder: Path, weight: str) -> list[str]:
    found = check_submission(folder)
    assert all(str(one).isprintable() and len(str(one)) < 700 for one in found)
    return [str(one) for one in found if one.weight == weight]


def assert_said(folder: Path, weight: str, *words: str) -> None:
    found = lines(folder, weight)
    assert any(all(word in line for word in words) for line in found), (found, lines(folder, ERROR))


def test_a_good_folder_of_somebody_else_has_no_error_and_no_warning(folder):
    assert lines(folder, ERROR) == lines(folder, WARNING) == []
    assert_said(folder, FINE, "submission.json.val_bpb", "the mean of 'quantized_ttt' over 3 seeds")
    assert_said(folder, FINE, "train_seed42.log: code + artifact", "under the cap")
    assert_said(folder, FINE, "train_seed7.log: scoring took 338.200 s")
    # mean + 0.005 nats + t of one-sided 1 % with 2 degrees of freedom x sd / sqrt(3), by hand
    rule = 1.07336388 + 0.00193565 + 6.96456 * 0.00084633 / 3**0.5
    assert_said(folder, UNCHECKED, "record rule: 3 seeds", "0.00194 BPB", f"above {rule:.5f} is")


RUNS = [  # a script, what is said of it when it is run, and of its lines alone
    ("", FINE, "imports on a bare CPU", "whether it imports on a bare CPU, and"),
    (
        "import flash_attn_interface",
        WARNING,
        "needs the module flash_attn_interface, which is not here (requirements.txt does not list",
        "it imports flash_attn_interface, which a bare CPU lacks",
    ),
    (
        "import nothing_of_the_kind",
        WARNING,
        "needs the module nothing_of_the_kind, which is not here (requirements.txt lists it)",
        "whether it imports on a bare CPU, and",
    ),
    (
        "try:\n    import triton\nexcept ImportError:\n    triton = None\n",
        FINE,
        "imports on a bare CPU",
        "whether it imports on a bare CPU, and",  # it does without
    ),
    ("1 / 0", WARNING, "(ZeroDivisionError: division by zero)", "whether it imports"),
]


@pytest.mark.parametrize("code, weight, run, read", RUNS)
def test_a_script_of_somebody_else_is_imported_only_when_that_is_asked_for(
    folder, tmp_path, code, weight, run, read
):
    ran = tmp_path / "ran"
    script = f"print('hello')\nopen({str(ran)!r}, 'w').close()\n{code}\n"
    (folder / "train_gpt.py").write_text(script)
    (folder / "requirements.txt").write_text("torch\nnothing-of-the-kind\n")
    assert_said(folder, UNCHECKED, "train_gpt.py: ", read, "check --run-script")
    assert not ran.exists()
    found = check_submission(folder, run_script=True)
    assert ran.exists()
    (said,) = [one for one in found if one.thing == "train_gpt.py" and "bare CPU" in str(one)] or [
        one for one in found if "needs the module" in one.value
    ]
    assert said.weight == weight and run in str(said)


def test_a_script_is_imported_whatever_lies_beside_it(folder):
    for name in ("sub", "home of train_gpt.py"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").touch()
    (folder / "train_gpt.py").unlink()
    script = "import os\n\nassert os.listdir(os.environ['HOME']) == []\n"
    (folder / "sub" / "train_gpt.py").write_text(script)
    found = check_submission(folder, run_script=True)
    assert (FINE, "imports on a bare CPU") in [(one.weight, one.value) for one in found]


# ── Exit codes ────────────────────────────────────────────────────────────────────────────────────


def spoilt_to(folder: Path, what: str) -> Path:
    """What a person may name in place of a good folder."""
    if what == "warning":
        (folder / "requirements.txt").unlink()
    if what == "error":
        (folder / "submission.json").unlink()
    beside = folder.parent / what.replace(" ", "_")
    if what == "empty folder":
        beside.mkdir()
    elif what == "folder of links":
        beside.mkdir()
        (beside / "README.md").symlink_to(folder / "README.md")
    elif what == "many files":
        beside.mkdir()
        for n in range(201):
            (beside / f"{n}.log").touch()
    elif what == "no folder":
        pass
    elif what == "file":
        beside = folder / "README.md"
    elif what == "device":
        beside = Path("/dev/null")
    else:
        beside = folder
    return beside


EXIT_CODES = {
    "clean": 0,
    "warning": 1,
    "error": 1,
    "no folder": 2,
    "file": 2,
    "device": 2,
    "empty folder": 2,
    "folder of links": 2,
    "many files": 2,
}


@pytest.mark.parametrize("what, code", EXIT_CODES.items())
def test_exit_codes_are_clean_findings_and_unreadable(folder, capsys, what, code):
    target = spoilt_to(folder, what)
    assert ablate.main(["check", str(target)]) == code
    said = capsys.readouterr()
    if code == 2:
        assert said.out == "" and len(said.err.splitlines()) == 1 and str(target) in said.err
    else:
        last = said.out.splitlines()[-1]
        assert f"{target}: {'not clean' if code else 'clean'}: " in last and said.err == ""
    assert ablate.main(["check", "--json", str(target)]) == code
    if code < 2:
        assert len(json.loads(capsys.readouterr().out)) == len(said.out.splitlines()) - 1


def without(name: str):
    return lambda f: (f / name).unlink()


def put(key: str, value):
    def spoil(f: Path) -> None:
        whole = json.loads((f / "submission.json").read_text())
        *outer, last = key.split(".")
        part = whole
        for name in outer:
            part = part[name]
        part[last] = value
        (f / "submission.json").write_text(json.dumps(whole))

    return spoil


def edit(name: str, old: str, new: str):
    def spoil(f: Path) -> None:
        text = (f / name).read_text()
        assert old in text
        (f / name).write_text(text.replace(old, new))

    return spoil


def both(*spoils):
    return lambda f: [spoil(f) for spoil in spoils]


def grown(f: Path) -> None:
    """As the folder with an artifact of 16,638,468 bytes."""
    more = 16_638_468 - CODE - MODEL[7]
    for old in (MODEL[7], MODEL[7] + CODE):
        edit("train_seed7.log", f" {old} bytes", f" {old + more} bytes")(f)


WELCH = "Welch's test of (`1.0801`, `1.0809`, `1.0795`) and ours"
ALIKE = ("val_bpb_max", "bpb_max", "val_loss_mean", "loss_mean")
SHA = hashlib.sha256(SCRIPT.encode()).hexdigest()
SHA1 = hashlib.sha1(SCRIPT.encode()).hexdigest()
HASHES = f"""sha256 of the script: `{SHA}`
{"a" * 64}  requirements.txt
MD5 of the data is {"b" * 32}
A word of as many letters: {"d" * 32}
"""

SAID = {  # what is done to a good folder -> weight, words of one line
    "no requirements": (
        without("requirements.txt"),
        (WARNING, "requirements.txt: missing", "import numpy, torch"),
    ),
    "emptied requirements": (
        lambda f: (f / "requirements.txt").write_text("# none\n"),
        (ERROR, "requirements.txt: lists no package of numpy, torch"),
    ),
    "one package too few": (
        lambda f: (f / "requirements.txt").write_text("torch\n"),
        (WARNING, "requirements.txt: lists no package of numpy"),
    ),
    "no README": (without("README.md"), (ERROR, "README.md: missing")),
    "no submission.json": (without("submission.json"), (ERROR, "submission.json: missing")),
    "an empty script": (
        lambda f: (f / "train_gpt.py").write_text(""),
        (ERROR, "train_gpt.py: empty; ship the script that ran"),
    ),
    "no script": (without("train_gpt.py"), (ERROR, "train_gpt.py: missing")),
    "other names": (
        both(
            lambda f: (f / "train_gpt.py").rename(f / "train_gpt_ssm.py"),
            lambda f: (f / "submission.json").rename(f / "submission_ssm.json"),
        ),
        (WARNING, "train_gpt.py: called train_gpt_ssm.py"),
        (WARNING, "submission.json: called submission_ssm.json"),
        (FINE, "submission_ssm.json.val_bpb"),
    ),
    "no log": (
        both(*[without(f"train_seed{seed}.log") for seed in BPB]),
        (ERROR, "logs: no training log"),
        (UNCHECKED, "submission.json.val_bpb"),
    ),
    "a log is missing": (
        without("train_seed7.log"),
        (ERROR, "seeds: submission.json names seed 7, and no log says that it is of it"),
    ),
    "a log of another seed": (
        edit("train_seed7.log", "  seed: 7\n", "  seed: 1337\n"),
        (ERROR, "train_seed7.log: its name says seed 7, its lines say 1337"),
    ),
    "no key that reviewers want": (
        lambda f: (f / "submission.json").write_text('{"val_bpb": 1.07336388}'),
        (WARNING, "submission.json: no author, github_id, name, date, bytes_total"),
    ),
    "a better score": (
        put("val_bpb", 1.0611),
        (ERROR, "submission.json.val_bpb: 1.0611, but the logs end with", "1.07324696"),
        (WARNING, "README.md: does not show the score of submission.json, 1.0611"),
    ),
    "the best seed's score": (
        put("val_bpb", BPB[1337]),
        (WARNING, "submission.json.val_bpb: 1.07258208 is that of one seed, the mean over 3"),
    ),
    "BPB as loss": (
        put("val_loss", BPB[7]),
        (ERROR, "submission.json.val_loss: 1.07426259 is a score in BPB"),
    ),
    "a seed's score": (
        put("seed_results.42.val_bpb", BPB[7]),
        (ERROR, "submission.json.42.val_bpb: 1.07426259, but train_seed42.log ends with"),
        (ERROR, "and it is 'quantized_ttt' of train_seed7.log"),
    ),
    "a seed's bytes": (
        put("seed_results.42.artifact_bytes", 15_991_486),
        (ERROR, "submission.json.42.artifact_bytes: 15,991,486, but train_seed42.log says"),
    ),
    "a spread of all instead of a sample": (
        put("val_bpb_std", round(statistics.pstdev(BPB.values()), 8)),
        (WARNING, "submission.json.val_bpb_std", "it is divided by n"),
    ),
    "a spread of nothing": (
        put("val_bpb_std", 0.0001),
        (ERROR, "submission.json.val_bpb_std: 0.0001, but the 3 seeds have 0.00084633 (n - 1)"),
    ),
    "bytes of the artifact alone": (
        put("bytes_total", MODEL[1337]),
        (ERROR, "submission.json.bytes_total: 15,969,354 are the artifact alone"),
    ),
    "rounded bytes": (
        put("bytes_total", 15_900_000),
        (ERROR, "submission.json.bytes_total: 15,900,000, but the logs and files give"),
    ),
    "bytes of other code": (
        put("bytes_code", 48_917),
        (ERROR, f"submission.json.bytes_code: 48,917, but the logs and files give {CODE:,}"),
    ),
    "over the cap": (
        grown,
        (ERROR, "train_seed7.log: code + artifact 16,638,468 bytes, 638,468 over the cap"),
    ),
    "over the cap with the script of the log": (
        both(
            edit("train_seed7.log", f"Code size: {CODE} ", "Code size: 78688 "),
            edit("train_seed7.log", f" {MODEL[7] + CODE} ", f" {MODEL[7] + 78688} "),
        ),
        (WARNING, "train_seed7.log: code + artifact 16,036,641 bytes, 36,641 over the cap"),
        (WARNING, f"with the scripts that are here {MODEL[7] + CODE:,}"),
    ),
    "another script": (
        lambda f: (f / "train_gpt.py").write_text(SCRIPT + "#\n"),
        (WARNING, f"train_gpt.py: {CODE + 2:,} bytes, but the logs say {CODE:,}"),
    ),
    "packed bytes of a script that is not packed": (
        both(
            edit(
                "train_seed1337.log",
                f"Code size: {CODE} bytes",
                f"Code size (uncompressed): {CODE + 40_000} bytes\n"
                "Code size (compressed): 900 bytes",
            ),
            edit("train_seed1337.log", f" {MODEL[1337] + CODE} ", f" {MODEL[1337] + 900} "),
            put("seed_results.1337.artifact_bytes", MODEL[1337] + 900),
            put("bytes_total", MODEL[1337] + 900),
            lambda f: (f / "train_gpt.py").write_text(SCRIPT + "#" * 40_000),
        ),
        (WARNING, "over the cap, under it by the", "bytes that the log counts"),
    ),
    "training too long": (
        edit("train_seed7.log", "train_time: 587007ms", "train_time: 603500ms"),
        (ERROR, "train_seed7.log: training took 603.500 s, over 600 s by 3.500 s"),
    ),
    "a step too long": (
        edit("train_seed7.log", "train_time: 587007ms", "train_time: 600038ms"),
        (WARNING, "train_seed7.log: training took 600.038 s, over 600 s by 0.038 s"),
    ),
    "scoring too long": (
        edit("train_seed7.log", "total_eval_time:338.2s", "total_eval_time:688.4s"),
        (ERROR, "train_seed7.log: scoring took 688.400 s, over 600 s"),
    ),
    "seconds of submission.json": (
        both(
            put("seed_results.7.train_time_s", 587.007),
            put("seed_results.1337.train_time_ms", 650_000),
            put("seed_results.42.eval_time_ms", 688_400.0),
            put("wallclock_seconds", 600.028),
            put("eval_time_s_mean", 338.2),
        ),
        (FINE, "submission.json.7.train_time_s: 587.007 s, as a log"),
        (ERROR, "submission.json.1337.train_time_ms: training took 650.000 s, over 600 s"),
        (UNCHECKED, "submission.json.1337.train_time_ms: 650.000 s of training; its logs show 587"),
        (ERROR, "submission.json.42.eval_time_ms: scoring took 688.400 s, over 600 s by 88.4"),
        (WARNING, "submission.json.wallclock_seconds: training took 600.028 s, over 600 s"),
        (FINE, "submission.json.eval_time_s_mean: 338.2, of 3 seeds"),
    ),
    "bytes over the cap without a log": (
        both(
            *[without(f"train_seed{seed}.log") for seed in BPB],
            put("bytes_total", 16_000_001),
            put("seed_results.7.artifact_bytes", 16_000_002),
        ),
        (ERROR, "submission.json.bytes_total: 16,000,001, over the cap"),
        (ERROR, "submission.json.7.artifact_bytes: 16,000,002, over the cap"),
    ),
    "an artifact over the cap": (
        lambda f: (f / "final_model.ptz").write_bytes(b"0" * 16_000_000),
        (ERROR, "final_model.ptz: 16,000,000 bytes, with the scripts"),
    ),
    "promises": (
        both(
            put("compliance", {"train_under_600s": True, "three_seeds": True, "no_slot": True}),
            edit("train_seed7.log", "train_time: 587007ms", "train_time: 600038ms"),
        ),
        (WARNING, "compliance.train_under_600s: true, and in the logs training took 600.038 s"),
        (FINE, "submission.json.compliance.three_seeds: true, and 3 seeds are named"),
        (UNCHECKED, "submission.json.compliance: no_slot: no log shows them"),
    ),
    "promises that are kept": (
        put("compliance", {"artifact_under_16mb": True, "eval_under_600s": True}),
        (FINE, "compliance.artifact_under_16mb: true, and in the logs code + artifact have 15,9"),
        (FINE, "compliance.eval_under_600s: true, and in the logs scoring took 338.200 s at most"),
    ),
    "means": (
        both(
            put("artifact_bytes_mean", round(statistics.fmean(MODEL.values()) + CODE)),
            put("artifact_bytes_max", MODEL[7] + CODE),
            put("val_loss_std", round(statistics.pstdev(LOSS.values()), 8)),
            put("train_steps_mean", 4870),
            put("loops_mean", 3),
        ),
        (FINE, "submission.json.artifact_bytes_mean", "of 3 seeds"),
        (ERROR, "submission.json.artifact_bytes_max", f"give {MODEL[1337] + CODE}; correct it"),
        (WARNING, "submission.json.val_loss_std", "it is divided by n"),
        (WARNING, "submission.json.train_steps_mean: 4870, but the 3 seeds that the logs", "4867"),
        (UNCHECKED, "submission.json.loops_mean: 3: no such figure of two seeds"),
    ),
    "seeds with two names like that of a figure": (  # the very name counts
        both(
            *[put(f"seed_results.{seed}.bpb", BPB[seed] + 0.01) for seed in BPB],
            *[put(f"seed_results.{seed}.loss", LOSS[seed] + 1) for seed in BPB],
            put("val_bpb_max", BPB[7]),
            put("bpb_max", BPB[7] + 0.01),
            put("val_loss_mean", round(statistics.fmean(LOSS.values()), 8)),
            put("loss_mean", round(statistics.fmean(LOSS.values()) + 1, 8)),
        ),
        *[(FINE, f"submission.json.{key}: ", "of 3 seeds") for key in ALIKE],
    ),
    "seeds with an artifact alone and with the code": (
        both(
            *[put(f"seed_results.{seed}.artifact_bytes", MODEL[seed]) for seed in BPB],
            put("bytes_total_max", MODEL[1337] + CODE),  # of the logs
            put("artifact_bytes_max", MODEL[1337]),
        ),
        (FINE, "submission.json.bytes_total_max: ", "of 3 seeds"),
        (FINE, "submission.json.artifact_bytes_max: ", "of 3 seeds"),
    ),
    "seeds with a total, and an artifact of the logs": (
        both(
            *[put(f"seed_results.{seed}", {"bytes_total": MODEL[seed] + CODE}) for seed in BPB],
            put("artifact_bytes_min", MODEL[7]),
            put("artifact_bytes_max", MODEL[1337] + CODE),
            put("artifact_bytes_mean", 1),
        ),
        (FINE, "submission.json.artifact_bytes_min: ", "of 3 seeds"),
        (FINE, "submission.json.artifact_bytes_max: ", "of 3 seeds"),
        (WARNING, "submission.json.artifact_bytes_mean: 1, but the 3 seeds that the logs have"),
    ),
    "differences": (
        both(
            put("base_val_bpb", 1.081),
            put("delta_vs_base_bpb", round(statistics.fmean(BPB.values()) - 1.081, 5)),
            put("delta_vs_pr9_bpb", -0.02),
            put("delta_vs_base_loss_nats", -0.0021),
        ),
        (FINE, "submission.json.delta_vs_base_bpb: -0.00764, from 1.08100"),
        (UNCHECKED, "submission.json.delta_vs_pr9_bpb: -0.02: no number here is the other side"),
        (WARNING, "delta_vs_base_loss_nats: -0.0021; a record is 0.005 nats better, as a rule"),
    ),
    "a test against a number": (  # by hand: (1.07336388 - 1.081) / (0.00084633 / sqrt(3))
        edit(
            "README.md", "MATRIX_LR", "Against 1.08100: t = -15.63 (df = 2), p = 0.002. MATRIX_LR"
        ),
        (FINE, "README.md, line 9: t -15.63; a one-sample test of 3 seeds in BPB against 1.081"),
        (FINE, "README.md, line 9: p = 0.002, and t -15.63 with 2 degrees of freedom has 0.002"),
    ),
    "a p value that its t does not have": (
        edit(
            "README.md", "MATRIX_LR", "Against 1.08100: t = -15.63 (df = 2), p < 0.001. MATRIX_LR"
        ),
        (WARNING, "README.md, line 9: p < 0.001, and t -15.63 with 2 degrees of freedom has 0.002"),
    ),
    "a test against nothing": (
        edit("README.md", "MATRIX_LR", "**t = -99.1**, MATRIX_LR"),
        (UNCHECKED, "README.md, line 9: t -99.1: no number here is the other side"),
    ),
    "a test of two lists": (  # scipy.stats.ttest_ind(..., equal_var=False): -10.7133
        edit("README.md", "MATRIX_LR", f"{WELCH} gives **t = -10.71**. MATRIX_LR"),
        (FINE, "line 9: t -10.71; Welch's test of 3 seeds in BPB against 1.0801, 1.0809, 1.0795"),
    ),
    "hashes": (
        edit("README.md", "MATRIX_LR", f"{HASHES}MATRIX_LR"),
        (FINE, f"README.md: sha256 {SHA[:12]}... is that of train_gpt.py"),
        (WARNING, "README.md: sha256 aaaaaaaaaaaa... is not that of requirements.txt"),
        (UNCHECKED, "hashes: md5 bbbbbbbbbbbb... of README.md: of no file that is here"),
    ),
    "hashes of submission.json": (
        both(put("train_gpt_sha256", "c" * 64), put("code_sha1", SHA1)),
        (WARNING, "submission.json: sha256 cccccccccccc... is not that of train_gpt.py"),
        (FINE, f"submission.json: sha1 {SHA1[:12]}... is that of train_gpt.py"),
    ),
    "no record": (
        both(
            put("track", "non-record-unlimited-compute"),
            edit("train_seed7.log", "train_time: 587007ms", "train_time: 14400039ms"),
        ),
        (WARNING, "train_seed7.log: training took 14,400.039 s", "(no record)"),
    ),
    "data prepared at home": (
        edit("train_seed7.log", "train_shards: 80", "train_shards: 1499"),
        (WARNING, "train_seed7.log: train_shards 1,499"),
    ),
    "another validation text": (
        edit("train_seed7.log", "val_bpb:1.07426259", "val_bpb:0.91817315"),
        (WARNING, "bytes per token", "in train_seed7.log"),
        (ERROR, "submission.json.7.val_bpb: 1.07426259, but train_seed7.log ends with 0.91817315"),
    ),
    "claims of a README": (
        edit("README.md", "MATRIX_LR", "We reach 1.12 BPB in 15.7 MB, MATRIX_LR"),
        (WARNING, "README.md: no log here shows 1.12 BPB (line 9), 15.7 MB (line 9)"),
    ),
    "numbers of a README": (
        edit("README.md", "MATRIX_LR", "By 7.25 %, with 3,141 rows, MATRIX_LR"),
        (UNCHECKED, "README.md", "none shows 7.25 % (line 9), 3,141 (line 9)"),
    ),
    "numbers of submission.json": (
        put("comparison_baseline_bpb", 1.081),
        (UNCHECKED, "submission.json: no log shows comparison_baseline_bpb 1.081"),
    ),
    "a link": (
        lambda f: (f / "more.log").symlink_to("/etc/passwd"),
        (ERROR, "more.log: a link or a device"),
        (FINE, "submission.json.val_bpb"),
    ),
}


@pytest.mark.parametrize("spoil, expected", [(s, e) for s, *e in SAID.values()], ids=SAID)
def test_what_is_wrong_is_said_with_its_weight_and_the_rest_is_checked_too(folder, spoil, expected):
    spoil(folder)
    for weight, *words in expected:
        assert_said(folder, weight, *words)
    if all(weight != ERROR for weight, *_ in expected):
        assert lines(folder, ERROR) == []


def test_several_logs_of_a_seed_and_a_second_name_for_one_are_no_trouble(folder):
    """As a folder with the logs of a first and of a second try."""
    shutil.copy(folder / "train_seed1337.log", folder / "train.log")
    for seed in BPB:
        text = log_of(seed).replace("val_bpb:1.07", "val_bpb:1.08")
        (folder / f"train_seed{seed}_again.log").write_text(text)
    assert lines(folder, ERROR) == []
    assert_said(folder, FINE, "submission.json.val_bpb", "over 3 seeds")


def test_the_older_lines_are_known_too(folder):
    old = """seed:1337
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
    for seed in BPB:
        (folder / f"train_seed{seed}.log").unlink()
    (folder / "train.log").write_text(old)
    stated = dict(val_loss=2.07269931, val_bpb=1.2243657, bytes_total=15863489, bytes_code=47642)
    (folder / "submission.json").write_text(json.dumps(stated))
    assert lines(folder, ERROR) == []
    assert_said(folder, FINE, "train.log: code + artifact 15,863,489 bytes")
    assert_said(
        folder, FINE, "val_bpb: 1.2243657, as 'final_int8_zlib_roundtrip_exact' of train.log"
    )
    assert_said(folder, WARNING, "train.log: training took 600.038 s")


def test_bytes_before_compression_are_no_total(folder):
    for line in ("Serialized model quantized", "Total submission size quantized"):
        text = (folder / "train_seed7.log").read_text()
        kept = [one for one in text.split("\n") if not one.startswith(line)]
        (folder / "train_seed7.log").write_text("\n".join(kept))
    edit("train_seed7.log", "Code size", "Total submission size: 67272625 bytes\nCode size")(folder)
    assert lines(folder, ERROR) == []
    assert_said(folder, UNCHECKED, "train_seed7.log: shows no bytes of code and artifact")


def test_a_total_without_its_unit_is_known(folder):
    """As in the logs of ternary models, whose numbers a README may repeat."""
    edit("train_seed7.log", "Serialized model quantized", "budget:15993853/16000000 FITS\n#")(
        folder
    )
    edit("train_seed7.log", "Total submission size quantized", "#")(folder)
    edit("README.md", f"{MODEL[7] + CODE:,}", "15,993,853")(folder)
    put("seed_results.7.artifact_bytes", 15_993_853)(folder)
    assert lines(folder, ERROR) == lines(folder, WARNING) == []


HOSTILE = {
    "zeros": b"\0" * 10**6,
    "deep": b"[" * 10**6,
    "one long line": b"val_bpb: 1.1 " * 10**6,
    "many lines": b"val_loss: 2.1 val_bpb: 1.1\n" * 101_000,
    "many blank lines": b"\n" * 10**7,
    "many stages": b"".join(b"stage%d val_loss:2.1 val_bpb:1.1\n" % n for n in range(20_000)),
    "digits": b"9" * 10**7,
    "a row": b"| BPB |\n|---|\n" + b"| 1.23 " * 10**6,
    "seeds": b"seed: 7\n" * 10**6,
    "huge numbers": b"Serialized model x: %s bytes\nval_loss:9.9 val_bpb:9%s.9"
    % ((b"9" * 999,) * 2),
    "commands": b"\x1b[2J\x1b]0;x\x07 val_loss:2.1 val_bpb:1.1\n\x1b[2Jseed: 7",
    "no UTF-8": b"\xff\xfe val_loss:2.1 val_bpb:1.1",
}


@pytest.mark.parametrize("name", ["README.md", "submission.json", "train_seed7.log"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_no_content_of_a_file_of_a_stranger_makes_the_checker_stumble(folder, name, content):
    (folder / name).write_bytes(content)
    began = os.times()
    lines(folder, ERROR)
    ended = os.times()
    assert ended.user - began.user < 60  # seconds of processor, not of a busy machine


def test_a_folder_of_many_files_is_read(folder):
    for n in range(150):
        (folder / f"seed{n}_train.log").write_text(log_of(7))
    began = time.process_time()
    lines(folder, ERROR)
    assert time.process_time() - began < 60

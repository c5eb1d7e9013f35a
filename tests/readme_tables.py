"""The generated parts of README.md: from the code and from the committed logs of the demo, the studies and the bench.

`python tests/readme_tables.py` (make readme) rewrites them; test_readme.py fails when they are stale. With a folder of runs,
such as logs/runs, the committed logs of studies are first replaced by those.
"""
import functools
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ablate
import bench
import train_gpt
from ablate import markdown_table as markdown
from studies import banded_scoring

DEMO, BENCH = ROOT / "logs" / "demo", ROOT / "logs" / "bench"
TOGGLES = {  # knob that switches a technique -> the knobs that tune it start with
    "smear_gate": "SMEAR_", "bigram_vocab_size": "BIGRAM_", "ve_enabled": "VE_", "xsa_last_n": "", "ln_scale": "",
    "rope_ntk_len": "ROPE_", "qat_enabled": "QAT_", "qna_enabled": "QNA_", "swa_enabled": "SWA_", "ema_enabled": "EMA_",
    "sqwa_enabled": "SWA_", "prune_pct": "", "fit_to_cap": "CAP_", "doc_isolated_eval": "EVAL_", "ttt_mode": "TTT_"}


def toggles() -> str:
    knobs = {f.name: f for f in train_gpt.KNOBS}
    rows = []
    for name, prefix in TOGGLES.items():
        f = knobs[name]
        default = int(f.default) if f.type == "bool" else f.default
        tuned = [k.upper() for k in knobs if prefix and k.upper().startswith(prefix) and k not in TOGGLES
                 and knobs[k].metadata["scope"] != "run"]
        rows.append([f"`{name.upper()}`", default, f.metadata["doc"], " ".join(f"`{k}`" for k in tuned), f.metadata["seeds"]])
    return markdown(["variable", "default", "what it does", "tuned by", "seeds that set it"], rows)


def exit_codes() -> str:
    return markdown(["code", "meaning"], [[code, text] for code, text in train_gpt.EXIT_CODES.items()])


def demo_output() -> str:
    return "```text\n" + (DEMO / "train.log").read_text().rstrip() + "\n```"


def demo_summary() -> str:
    r = json.loads((DEMO / "result.json").read_text())
    return (f"Measured: {r['device']}, {r['world_size']} ranks of {r['threads_per_rank']} thread, torch {r['torch']}, 1 seed, "
            f"command `make train`: {r['steps']} steps of {r['step_ms_median']:.0f} ms "
            f"({r['tokens_seen'] / r['train_seconds']:,.0f} tokens/s) in {r['train_seconds']:.1f} s, "
            f"{sum(r['seconds'].values()):.0f} s in all.")


def study(stem: str, size: str, equal: str, logs: Path = ROOT / "logs" / "studies") -> ablate.Matrix:
    """The matrix of committed logs; equal time was run with three seeds."""
    folder = logs / stem / f"{size}-{equal}"
    seeds = (1, 2, 3) if equal == "time" else ()
    return ablate.matrix(ablate.read_study(ROOT / "studies" / f"{stem}.toml"), size, equal, seeds, folder)


def study_tables(stem: str, size: str, equal: str) -> str:
    """The tables of a study in short form: how it ran, the arms, the differences, the factorial."""
    matrix = study(stem, size, equal)
    found = ablate.load_matrix(matrix)
    runs = found.all()
    budget = f"{matrix.size.steps} steps" if equal == "steps" else f"{matrix.size.seconds:g} s of training"
    r, trainings = runs[0], sum(not run["checkpoint"] for run in runs)
    blocks = [f"`{matrix.command()}`: {budget} for every arm, {len(runs)} runs of {trainings} trainings on {r['device']}, "
              f"{matrix.size.jobs} side by side, threads: {r['threads_per_rank']}, torch {r['torch']}; scored: "
              f"{r['val_tokens']:,} targets of {r['val_bytes']:,} bytes."]
    long = {"settings", "published, expected", "code + artifact, bytes", "steps" * (equal == "steps")}
    for (header, rows), drop in [
            (ablate.arm_table(found), long), (ablate.comparison_table(found), {"in words", "paired t (df)"}),
            (ablate.factorial_table(found), set())]:
        kept = [i for i, name in enumerate(header) if name not in drop and any(row[i] != "-" for row in rows)]
        if rows:
            blocks.append(markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows]))
    return "\n\n".join(blocks)


def adopt(logs: Path) -> None:
    """Replaces the committed logs of each study that has been run to its end below `logs` by what tables are made of."""
    for stem, size, equal in STUDIES:
        matrix, kept = study(stem, size, equal, logs), study(stem, size, equal)
        if all((t.folder / "result.json").exists() or t.id in ablate.Ledger(matrix.folder).failures([t]) for t in matrix.trials):
            shutil.rmtree(kept.folder, ignore_errors=True)
            for trial in [Path(), *(Path(t.id) for t in matrix.trials)]:
                for path in [matrix.folder / trial / name for name in ("ledger.jsonl", "result.json", "metrics.jsonl")]:
                    if path.exists():
                        (kept.folder / trial).mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, kept.folder / trial)


def speed() -> str:
    return bench.table(json.loads((BENCH / "demo.json").read_text()), markdown=True)


def demo_settings() -> str:
    """What 2 cores do with the demo's model: the whole step, by ranks, threads and compiler."""
    rows = []
    for path in [BENCH / f"{name}.json" for name in ("demo", "demo_1x2", "demo_compiled")]:
        report = json.loads(path.read_text())
        row = {row["name"]: row for row in report["rows"]}
        step, warm = row["step, whole"], next(r for name, r in row.items() if name.startswith("warm-up"))
        rows.append([f"`{path.name}`", report["world_size"], report["threads_per_rank"], "yes" if report["compile"] else "no",
                     f"{step['ms']:.1f}", f"{step['rate']:,.0f}", f"{warm['ms'] / 1e3:.1f}"])
    return markdown(["logs/bench/", "ranks", "threads each", "compiled", "step, ms", "tokens/s", "warm-up and compile, s"], rows)


def artifact() -> str:
    """The demo's checkpoint exported with every compressor; zstd in frames against one frame, from the bench."""
    runs = [json.loads((BENCH / f"artifact_{name}.json").read_text()) for name in ("zlib", "lzma", "zstd", "ans")]
    rows = []
    for r in runs:
        stored, codes = r["codes"]["stored_bytes"], r["codes"]
        rows.append([f"`COMPRESSOR={codes['compressor']}`", f"{r['artifact_bytes']:,}", f"{stored:,}",
                     f"{8 * stored / codes['weights']:.3f}", f"{100 * (stored / codes['order0_bytes'] - 1):+.2f} %",
                     f"{r['seconds']['quantise and compress']:.2f}", f"{r['seconds']['read back']:.2f}", f"{r['quantised_val_bpb']:.6f}"])
    bench_rows = {row["name"]: row for row in json.loads((BENCH / "demo.json").read_text())["rows"]}
    zstd = bench_rows["compress, zstd 22"]
    return (f"{codes['weights']:,} codes, order-0 entropy {codes['order0_bytes']:,} bytes; {r['device']}, 1 seed; "
            "`CHECKPOINT=logs/demo/checkpoint.bin COMPRESSOR=... EVAL_STRIDE=0 python train_gpt.py` in the environment of the demo\n\n"
            + markdown(["", "artifact, bytes", "codes and scales", "bits per weight", "against order-0", "export, s", "read back, s",
                        "quantised BPB"], rows)
            + f"\n\nzstd in frames and in one, on the bench's weights: {zstd['note']}, {zstd['ms']:.0f} ms and {zstd['twin_ms']:.0f} ms.")


def banded() -> str:
    report = json.loads((BENCH / "banded_scoring.json").read_text())
    return f"`{report['command']}`, {report['environment']['device']}, 1 thread\n\n" + banded_scoring.table(report)


STUDIES = [*((stem, "small", equal) for stem in ("pr989_qat_x_swa", "pr199_swa_doc_isolated", "pr975_qna_sqwa", "pr145_int8_qat",
                                                 "pr194_11l_record") for equal in ("steps", "time")),
           ("pr199_swa_doc_isolated", "docs", "steps"), ("pr199_swa_doc_isolated", "fineweb", "steps"),
           ("swa_sums_in_bf16", "small", "steps")]
BLOCKS = {"toggles": toggles, "exit-codes": exit_codes, "demo": demo_output, "demo-summary": demo_summary,
          "speed": speed, "demo-settings": demo_settings, "artifact": artifact, "banded": banded,
          **{"-".join(name): functools.partial(study_tables, *name) for name in STUDIES}}


def rendered(readme: str) -> str:
    """README.md with every block between <!-- generated: NAME --> and <!-- end --> made anew."""
    def block(match: re.Match) -> str:
        return f"<!-- generated: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- generated: ([\w-]+) -->\n.*?<!-- end -->", block, readme, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        adopt(Path(sys.argv[1]).absolute())
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))

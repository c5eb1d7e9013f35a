"""The generated parts of README.md and submission.json: from the code and from the committed logs of the demo and the studies.

`python tests/readme_tables.py` (make readme) rewrites them; test_readme.py fails when they are stale.
"""
import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ablate
import train_gpt
from ablate import markdown_table as markdown

DEMO = ROOT / "logs" / "demo"
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


def study(stem: str, size: str, equal: str) -> str:
    """The tables of a study in short form: how it ran, the arms, the differences, the factorial."""
    matrix = ablate.matrix(ablate.read_study(ROOT / "studies" / f"{stem}.toml"), size, equal)
    folder = ROOT / matrix.folder
    matrix = ablate.matrix(matrix.study, size, equal, out=folder)
    found = ablate.load_matrix(matrix)
    run = found.all()[0]
    budget = f"{matrix.size.steps} steps" if equal == "steps" else f"{matrix.size.seconds:g} s of training"
    line = (f"`python ablate.py run studies/{stem}.toml --size {size} --equal {equal}`: {budget} for every arm, "
            f"{len(found.all())} runs of {sum(not r['checkpoint'] for r in found.all())} trainings on {run['device']}, one core each, "
            f"torch {run['torch']}; {run['val_tokens']:,} targets of {run['val_bytes']:,} bytes scored.")
    blocks = [line]
    for (header, rows), drop in ((ablate.arm_table(found), {"settings", "published", "code + artifact, bytes"}
             | ({"steps"} if equal == "steps" else set())), (ablate.comparison_table(found), {"in words", "paired t (df)"}),
            (ablate.factorial_table(found), set())):
        kept = [i for i, name in enumerate(header) if name not in drop and any(row[i] != "-" for row in rows)]
        if rows:
            blocks.append(markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows]))
    return "\n\n".join(blocks)


STUDIES = [("pr989_qat_x_swa", "small"), ("pr199_swa_doc_isolated", "small"), ("pr975_qna_sqwa", "small"),
           ("pr145_int8_qat", "small"), ("pr194_11l_record", "small")]
BLOCKS = {"toggles": toggles, "exit-codes": exit_codes, "demo": demo_output, "demo-summary": demo_summary,
          **{f"{stem}-{size}-{equal}": functools.partial(study, stem, size, equal) for stem, size in STUDIES
             for equal in ("steps", "time")},
          "swa_sums_in_bf16-small-steps": functools.partial(study, "swa_sums_in_bf16", "small", "steps"),
          "pr199_swa_doc_isolated-fineweb-steps": functools.partial(study, "pr199_swa_doc_isolated", "fineweb", "steps")}


def submission() -> dict:
    """submission.json of the demo run: hardware said plainly, every figure from its result.json."""
    r = json.loads((DEMO / "result.json").read_text())
    c = r["config"]
    return {
        "author": "the authors of this repository", "github_id": "", "name": "CPU demo run (not a leaderboard entry)",
        "date": r["date"], "track": "none: trained for 90 s on 2 CPU cores, on documentation text, not on FineWeb",
        "val_bpb": r["val_bpb"], "val_loss": r["val_loss"], "bytes_total": r["total_bytes"], "bytes_code": r["code_bytes"],
        "seeds": [r["seed"]], "hardware": f"{r['device']}, {r['world_size']} ranks", "pytorch_version": r["torch"],
        "seed_results": {str(r["seed"]): {
            "val_bpb": r["val_bpb"], "val_loss": r["val_loss"], "artifact_bytes": r["artifact_bytes"], "steps": r["steps"],
            "step_avg_ms": r["step_ms_median"], "train_time_s": r["train_seconds"], "eval_time_s": r["eval_seconds"]}},
        "blurb": f"{c['num_layers']} layers, {c['model_dim']} wide, SmearGate, Muon, int{c['quant_bits_mlp']} QAT, EMA, "
                 f"{c['compressor']}; scored from the artifact read back from disk with a sliding window of stride "
                 f"{c['eval_stride']}. Log: logs/demo.",
        "code_sha256": r["code_sha256"], "config_sha256": r["config_sha256"]}


def rendered(readme: str) -> str:
    """README.md with every block between <!-- generated: NAME --> and <!-- end --> made anew."""
    def block(match: re.Match) -> str:
        return f"<!-- generated: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- generated: ([\w-]+) -->\n.*?<!-- end -->", block, readme, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
    (ROOT / "submission.json").write_text(json.dumps(submission(), indent=1) + "\n")

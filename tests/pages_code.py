"""Tables of README.md and docs/how_it_works.md that are made from the code."""

import ast
import re
import textwrap
from pathlib import Path

import train_gpt
from ablation.report import markdown_table
from ablation.study import read_study

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "train_gpt.py"
MODEL_TESTS = "tests/test_model.py"

# Toggles that are no part of the model, no view and no average
OTHER_TOGGLES = (
    "MIN_LR",
    "WD_TAPER_FINAL_MULT",
    "TRAIN_SEQ_SCHEDULE",
    "LOADER",
    "QUANT_CLIP",
    "GPTQ_ENABLED",
    "PRUNE_PCT",
    "LQER_ENABLED",
    "FIT_TO_CAP",
    "DOC_ISOLATED_EVAL",
    "TTT_MODE",
    "PHASED_TTT_ENABLED",
    "NGRAM_TILT_ENABLED",
)

# The knobs that tune a toggle begin as it does, but for these
TUNED_BY = {
    "SQWA": ("SWA_",),
    "FIT": ("CAP_",),
    "QUANT": ("MLP_CLIP_", "ATTN_CLIP_", "EMBED_CLIP_", "BIGRAM_CLIP_", "LOOP_LAYER_CLIP_"),
    "DOC_ISOLATED_EVAL": ("EVAL_",),
    "PHASED": ("PHASED_", "GLOBAL_"),
    "NGRAM": ("TOKEN_",),
    "NUM": ("LOOP_", "LOOPING_", "ENABLE_LOOPING_"),
    "MUON_COEFFS": ("MUON_BACKEND_",),
    "MUON_ROW_NORMALIZE": (),
    "TRAIN": ("TRAIN_SEQ_SCHEDULE_", "SEQ_CHANGE_"),
    "SMEAR": ("SMEAR_", "GATE_"),
    "SPARSE": ("SPARSE_", "GATE_"),
    "ATTN": ("GATE_",),
}


def toggle_names() -> list[str]:
    """Variables that switch a technique, as the code itself lists them."""
    enabled = [*train_gpt.VIEWS, *(name.upper() for name in train_gpt.Config.AVERAGES)]
    return [
        *train_gpt.MODEL_TOGGLES,
        *train_gpt.MUON_TOGGLES,
        *(f"{name}_ENABLED" for name in enabled),
        *OTHER_TOGGLES,
    ]


def tuning_knobs(toggle: str, toggles: list[str]) -> list[str]:
    """Variables that say how a technique works once it is on."""
    word = toggle.partition("_")[0]
    prefixes = TUNED_BY.get(toggle, TUNED_BY.get(word, (word + "_",)))
    found = []
    for knob in train_gpt.KNOBS:
        name = knob.name.upper()
        if name.startswith(prefixes) and name not in toggles and knob.metadata["scope"] != "run":
            found.append(name)
    return [name for name in found if toggle in needed(name, {*toggles})]


def needed(name: str, toggles: set[str]) -> set[str]:
    """The toggles without which a knob does nothing; all, where it needs none."""
    needs = train_gpt.BY_NAME[name].metadata["needs"].upper().split()
    if not needs:
        return toggles
    words = [word.partition("=")[0] for word in needs]
    above = [word for word in words if word in train_gpt.BY_NAME]
    return {*above, *(other for word in above for other in needed(word, set()))}


def studied() -> dict[str, list[str]]:
    """Variable -> the pull requests whose study has an arm with another value than the default."""
    found = {}
    for path in sorted((ROOT / "studies").glob("pr*.toml")):
        number = re.match(r"pr(\d+)", path.stem)[1]
        study = read_study(path)
        for arm in study.arms.values():
            cfg = train_gpt.Config.from_env({**study.env, **study.sizes["full"].env, **arm})
            for name in cfg.non_default():
                if number not in found.setdefault(name, []):
                    found[name].append(number)
    return found


def toggles() -> str:
    knobs = {knob.name.upper(): knob for knob in train_gpt.KNOBS}
    names = toggle_names()
    users = studied()
    rows = []
    for name in names:
        default = knobs[name].default
        if knobs[name].type == "bool":
            default = int(default)
        tuned = " ".join(f"`{knob}`" for knob in tuning_knobs(name, names))
        numbers = " ".join(users.get(name, ()))
        rows.append([f"`{name}`", default, knobs[name].metadata["doc"], tuned, numbers])
    header = ["variable", "default", "what it does", "tuned by", "studies of"]
    return markdown_table(header, rows)


def exit_codes() -> str:
    return markdown_table(["code", "meaning"], [[*row] for row in train_gpt.EXIT_CODES.items()])


def sections() -> str:
    """The banners of train_gpt.py: what comes in, what goes out, what is promised."""
    source = (ROOT / SCRIPT).read_text()
    rows = []
    banner = re.compile(r"^# ── (\d+ .+?) ─+\n((?:# .*\n)+)", re.M)
    for title, text in banner.findall(source):
        words = re.sub(r"\s*\n?# ", " ", text)
        flow, _, promise = words.partition(" Promise: ")
        arrives, _, leaves = flow.partition(" Out: ")
        arrives = arrives.removeprefix(" In: ")
        rows.append([title, arrives.strip(" ."), leaves.strip(" ."), promise.strip()])
    return markdown_table(["section", "in", "out", "promise"], rows)


def fenced(code: str) -> str:
    return f"```python\n{textwrap.dedent(code).strip()}\n```"


def source_of(node: ast.AST, lines: list[str]) -> str:
    """The lines of a definition with its decorators, or of a statement."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    return "\n".join(lines[first - 1 : node.end_lineno])


def technique_hunks() -> str:
    """All that XSA consists of: its knob, its code, its wiring, its tests."""
    source = (ROOT / SCRIPT).read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    knobs = []
    for node in config.body:
        if "xsa_last_n" in source_of(node, lines):
            knobs.append(source_of(node, lines))
    (function,) = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "exclude_self"
    ]
    wiring = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "exclude_self" in source_of(node, lines):
            wiring.append(source_of(node, lines))
    tests = re.search(r"^(# ── XSA .*?)^# ── ", (ROOT / MODEL_TESTS).read_text(), re.M | re.S)[1]

    hunks = [
        ("Its block in `Config`", "\n\n\n".join(knobs)),
        ("Its code", source_of(function, lines)),
        ("Its wiring, in `Attention.__init__`", wiring[-1]),
        (f"Its section in `{MODEL_TESTS}`", tests),
    ]
    blocks = []
    for number, (title, code) in enumerate(hunks, 1):
        blocks.append(f"{number}. {title}:\n\n{fenced(code)}")
    return "\n\n".join(blocks)

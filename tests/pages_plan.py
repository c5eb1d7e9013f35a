"""What --plan predicts beside what logs state: the table of docs/plan.md."""

import json
from functools import cache
from pathlib import Path

import tomli
from pages_frontier import RECORDS, command, refused

from ablation.report import markdown_table
from planning.forecast import Options, plan
from train_gpt import Config

ROOT = Path(__file__).resolve().parents[1]
LOGGED = json.loads((ROOT / "tests/golden/plan.json").read_text(encoding="utf-8"))


def published_config(name: str) -> Config:
    """The configuration of a record's run, without what this script has not yet."""
    if name not in RECORDS:
        study = tomli.loads((ROOT / "studies/pr194_11l_record.toml").read_text(encoding="utf-8"))
        return Config.from_env(dict(word.split("=", 1) for word in study["command"].split()))
    absent = refused(name)
    told = {key: value for key, value in command(name).items() if key not in absent}
    return Config.from_env({"BASE": name} | told)


@cache
def predictions() -> list[dict]:
    """Each run of which a log states something: its title, machine, log and plan."""
    rows = []
    for title, logged in LOGGED["own"].items():
        cfg = Config.from_env({}, logged["settings"].split())
        options = Options("h200", 1)
        rows.append(dict(title=title, options=options, logged=logged, plan=plan(cfg, options)))
    for name, logged in LOGGED["records"].items():
        found = plan(published_config(name), Options())
        rows.append(dict(title=name, options=Options(), logged=logged, plan=found))
    return rows


def off(found: float, logged: float) -> float:
    """How far a prediction is off, as a share of what was logged."""
    return found / logged - 1


def beside_logs() -> str:
    """Step, memory and seconds of scoring: logged, predicted, and how far off that is."""

    def cells(logged: float | None, found: float, form: str) -> list[str]:
        if logged is None:
            return ["-", "-", "-"]
        return [f"{logged:{form}}", f"{found:{form}}", f"{off(found, logged):+.1%}"]

    rows = []
    for row in predictions():
        logged, found = row["logged"], row["plan"]
        memory = found["memory"]["training"] / 2**20
        way = next(reversed(logged.get("scores", {"-": 0})))
        seconds = logged.get("scores", {}).get(way)
        rows.append(
            [
                row["title"].replace("pr", "#"),
                f"{row['options'].gpus} x {row['options'].device.upper()}",
                *cells(logged["ms"], found["training"]["step_ms"], ".1f"),
                *cells(logged.get("peak_mib"), memory, ",.0f"),
                way,
                *cells(seconds, found["scoring_seconds"].get(way, 0.0), ".0f"),
            ]
        )
    header = ["run", "machine"]
    for what in ("ms a step", "peak, MiB"):
        header += [f"{what}, logged", "planned", "off"]
    return markdown_table([*header, "scored by", "s, logged", "planned", "off"], rows)

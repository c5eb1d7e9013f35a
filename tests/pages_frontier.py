"""The table of records in docs/frontier.md, from studies/bases.toml and the records' commands."""

import json
from pathlib import Path

from ablation.report import markdown_table
from train_gpt import BY_NAME, Config, Refusal, base_tables, read_base, setting

GOLDEN = Path(__file__).resolve().parent / "golden"
RECORDS = json.loads((GOLDEN / "record_defaults.json").read_text(encoding="utf-8"))["records"]
COMMANDS = json.loads((GOLDEN / "record_settings.json").read_text(encoding="utf-8"))["commands"]


def script_base(name: str) -> str:
    """The base that is the script of a record, told nothing; where that is not the record itself,
    it has a table of its own.
    """
    own = name.replace("pr", "script")
    return own if own in base_tables() else name


def command(name: str) -> dict[str, str]:
    """What the run of a record sets: its published command, else what its logs say."""
    record = RECORDS[name]
    return COMMANDS[record["folder"]] if "folder" in record else record["told"]


def refused(name: str) -> dict[str, str]:
    """Variable -> the problem with it, of the command of a record under its script's base."""
    variables = command(name)
    old_names = read_base(script_base(name)).old_names()
    spelt = {}
    for old in variables.keys() & old_names.keys():
        spelt |= dict.fromkeys(old_names[old](variables[old], variables), old)
    try:
        Config.from_env({"BASE": script_base(name)} | variables)
    except Refusal as refusal:
        names = [(problem.partition("=")[0], problem) for problem in refusal.problems]
        return {key if key in variables else spelt[key]: problem for key, problem in names}
    return {}


def record_bases() -> str:
    """Every accepted record whose script is a base: what its table states, and how far the record's
    command goes.
    """
    rows = []
    for name in RECORDS.keys() & base_tables().keys():
        record = RECORDS[name]
        script = script_base(name)
        own = {key: value for key, value in base_tables()[script].items() if key in BY_NAME}
        variables = command(name)
        understood = len(variables) - len(refused(name))
        rows.append(
            [
                f"#{name[2:]}",
                f"{record['bpb']:.4f}",
                f"{record['parameters']:,}",
                f"`{script}`",
                f"`{base_tables()[script]['base']}`",
                " ".join(f"`{setting(key, value)}`" for key, value in own.items()),
                f"{understood} of {len(variables)}",
                ", ".join(read_base(script).lacks),
            ]
        )
    rows.sort(key=lambda row: int(row[0][1:]))
    header = [
        "record",
        "BPB",
        "parameters",
        "script",
        "from",
        "its table states",
        "command",
        "not here",
    ]
    return markdown_table(header, rows)

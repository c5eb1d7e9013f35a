"""The accepted records from #549 on as bases: what their scripts do when they are told nothing.

Failures that these tests would have caught: a table that was read off a README, whose settings
are not those of the log; a default that a later script changed in silence (#2135 has no mask in
its SmearGate, #1851 has); a variable that a script reads and never uses.
"""

import json

import pytest
from conftest import ROOT

from train_gpt import ABSENT, BY_NAME, Config, base_tables, read_base

GOLDEN = ROOT / "tests" / "golden"
RECORDS = json.loads((GOLDEN / "record_defaults.json").read_text(encoding="utf-8"))["records"]
COMMANDS = json.loads((GOLDEN / "record_settings.json").read_text(encoding="utf-8"))["commands"]
NAMES = list(RECORDS.keys() & base_tables().keys())
NAMES.sort(key=list(RECORDS).index)

# Variables that we have, whose default there is no setting of ours -> why
NOT_A_SETTING = {
    "QAT_ENABLED": "0 leaves the late QAT on, which LATE_QAT_THRESHOLD starts",
}


def defaults(name: str) -> dict[str, str]:
    """VARIABLE -> what the script of this record takes by itself."""
    record = RECORDS[name]
    inherited = defaults(record["of"]) if record["of"] else {}
    kept = {key: text for key, text in inherited.items() if key not in record["gone"]}
    return kept | record["defaults"]


def ours(name: str, variables: dict[str, str]) -> dict[str, str]:
    """Those of these variables that are settings of ours under this base."""
    base = read_base(name)
    known = (BY_NAME.keys() | base.old_names().keys()) - base.absent() - NOT_A_SETTING.keys()
    return {key: text for key, text in variables.items() if key in known}


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_what_the_script_of_the_record_does_by_itself(name):
    bare = Config.from_env({"BASE": name})
    told = Config.from_env({"BASE": name} | ours(name, defaults(name)))
    assert told == bare and len(told.given) > 35


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_of_a_record_is_a_setting_or_refused_by_name(name):
    known = BY_NAME.keys() | ABSENT.keys() | read_base(name).old_names().keys()
    assert not defaults(name).keys() - known

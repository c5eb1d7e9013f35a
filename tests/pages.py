"""The generated parts of README.md and docs/, from the code and the committed logs.

    python tests/pages.py              make pages: renews every page and docs/demo.svg
    python tests/pages.py logs/runs    first takes the studies that have run there

A page holds blocks between <!-- generated: NAME --> and <!-- end -->. test_readme.py fails when one
of them is stale.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pages_bench
import pages_code
import pages_demo
import pages_effects
import pages_frontier
import pages_leaderboard
import pages_plan
from demo_picture import demo_picture
from fault_table import faults
from pages_studies import STUDIES, adopt, published_rows, study_tables

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURE = ROOT / "docs" / "demo.svg"

BLOCKS: dict[str, Callable[[], str]] = {
    "toggles": pages_code.toggles,
    "exit-codes": pages_code.exit_codes,
    "sections": pages_code.sections,
    "technique": pages_code.technique_hunks,
    "faults": faults,
    "soak": pages_bench.soak,
    "demo-lines": pages_demo.demo_lines,
    "demo-summary": pages_demo.demo_summary,
    "demo": pages_demo.demo_log,
    "speed": pages_bench.speed,
    "demo-in-turn": pages_bench.demo_in_turn,
    "model-rows": pages_bench.model_rows,
    "ranks-and-threads": pages_bench.ranks_and_threads,
    "artifact": pages_bench.artifact,
    "banded": pages_bench.banded,
    "coders": pages_bench.coders,
    "published-rows": published_rows,
    "record-bases": pages_frontier.record_bases,
    "leaderboard": pages_leaderboard.leaderboard,
    "leaderboard-small": pages_leaderboard.leaderboard_small,
    "effects-of-training": pages_effects.effects_of_training,
    **{
        f"effects-of-export-{size}": partial(pages_effects.effects_of_export, size)
        for size in ("small", "large")
    },
    "plan-beside-logs": pages_plan.beside_logs,
}
for _name in STUDIES:
    BLOCKS["-".join(_name)] = partial(study_tables, *_name)


def rendered(page: str) -> str:
    """A page with every block made anew."""

    def block(match: re.Match) -> str:
        name = match[1]
        return f"<!-- generated: {name} -->\n{BLOCKS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: ([\w-]+) -->\n.*?<!-- end -->", block, page, flags=re.S)


def main(arguments: list[str]) -> None:
    for logs in arguments:
        adopt(Path(logs).absolute())
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    PICTURE.write_text(demo_picture(pages_demo.DEMO))


if __name__ == "__main__":
    main(sys.argv[1:])

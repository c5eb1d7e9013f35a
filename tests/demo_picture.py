"""docs/demo.svg: loss and validation BPB of the demo run over its seconds, with its phases."""

from pathlib import Path

from ablation.page import inline_svg, styled
from ablation.run_page import course, read_run


def demo_picture(folder: Path) -> str:
    """The first chart of the run's page, as SVG."""
    with styled():
        return str(inline_svg(course(read_run(folder)), "demo")) + "\n"

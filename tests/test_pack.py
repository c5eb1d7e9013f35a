"""The packed script does what the readable one does, and its bytes are the ones that are counted.

Would have caught: a size that is not that of the shipped file (#1835), a minifier that changes
what runs, tracebacks that point into a line of base85, a packed script that forgets its source.
"""

import ast
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from launch import script as run_script

import train_gpt
from train_gpt import (
    CODE_SHA256,
    PACKED_NAME,
    SOURCE,
    Refusal,
    main,
    pack_code,
    shipped_code,
    unpack_code,
)

# several averages and a coder that FIT_TO_CAP would choose, to have much that could differ
KNOBS = dict(
    iterations=8,
    qat_enabled=True,
    ema_enabled=True,
    ema_decay=0.8,
    compressor="ans",
    checkpoint_every=0.0,
)
# two functions, so that a traceback has frames; a line that is not ASCII
FAILING = b"""\
\"\"\"Fails.\"\"\"


def outer(x):
    return inner(x)


def inner(x):
    # caf\xc3\xa9
    raise ValueError(f"x is {x}")


if __name__ == "__main__":
    outer(3)
"""


def load(path: Path, name: str):
    """The module in this file, under this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The packed script under its own name in an empty folder, as in a submission."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    path.write_bytes(pack_code(SOURCE, "lzma"))
    return path


@pytest.fixture(scope="module")
def packed(script):
    """The module that the packed script makes."""
    yield load(script, "packed_train_gpt")
    del sys.modules["packed_train_gpt"]


def without_bases(text: str) -> str:
    """A help text without what it says of BASE: the studies are not beside a packed script."""
    shorter, found = re.subn(r"^BASE takes .*?\n\n", "", text, flags=re.S | re.M)
    assert found == 1
    return shorter


def folder(cfg) -> Path:
    return Path(cfg.logs_dir) / cfg.run_id


def artifact(cfg) -> bytes:
    return (folder(cfg) / "artifact.bin").read_bytes()


def figures(report: dict) -> dict:
    """What has to be the same in two runs of one configuration."""
    names = [
        "exit_code",
        "val_bpb",
        "val_loss",
        "live_val_bpb",
        "averaged_val_bpb",
        "quant_gap_bpb",
        "artifact_bytes",
        "code_bytes",
        "total_bytes",
        "code_sha256",
        "config_sha256",
        "codes",
        "groups",
        "inactive",
    ]
    return {name: report[name] for name in names}


# ── packing ───────────────────────────────────────────────────────────────────────────────────────
def test_a_packed_script_is_short_ascii_and_gives_back_the_source():
    script = pack_code(SOURCE, "lzma")
    assert script.isascii() and b"\r" not in script
    assert len(script) < len(SOURCE) / 2
    assert unpack_code(script) == SOURCE
    ast.parse(script, feature_version=(3, 10))


def test_packing_is_the_same_each_time_and_none_means_as_it_is():
    again = pack_code.__wrapped__(SOURCE, "lzma")
    assert again == pack_code(SOURCE, "lzma")
    assert pack_code(SOURCE, "none") == SOURCE


@pytest.mark.parametrize(
    "change",
    [
        lambda script: SOURCE,
        lambda script: b"",
        lambda script: script + b"import os\n",
        lambda script: b"import os\n" + script,
        lambda script: script.replace(b"exec(", b"eval("),
        lambda script: script.replace(b'decode("', b'decode("")+b85decode("'),
        lambda script: script.replace(b'decode("', b'decode("\x00'),
        lambda script: script[: len(script) // 2] + script[len(script) // 2 + 5 :],
    ],
    ids=[
        "plain",
        "empty",
        "more after",
        "more before",
        "other loader",
        "expression",
        "byte",
        "cut",
    ],
)
def test_a_script_that_was_not_packed_here_is_not_unpacked(change):
    with pytest.raises(ValueError, match="packed"):
        unpack_code(change(pack_code(SOURCE, "lzma")))


def test_a_packed_script_does_not_unpack_to_any_size(monkeypatch):
    monkeypatch.setattr(train_gpt, "MAX_SOURCE_BYTES", 1000)
    fits, too_long = (pack_code(b"#" * n, "lzma") for n in (1000, 1001))
    assert unpack_code(fits) == b"#" * 1000
    with pytest.raises(ValueError, match="above 1,000 bytes"):
        unpack_code(too_long)


# ── running ───────────────────────────────────────────────────────────────────────────────────────
def test_the_packed_module_knows_its_source_its_hash_and_its_file(packed, script):
    assert packed.SOURCE == SOURCE and packed.CODE_SHA256 == CODE_SHA256
    assert packed.__file__ == str(script)
    assert packed.__doc__ == train_gpt.__doc__
    assert packed.pack_code(packed.SOURCE, "lzma") == script.read_bytes()
    assert without_bases(packed.help_text()) == without_bases(train_gpt.help_text())


@pytest.mark.parametrize("how", ["run", "imported"])
def test_a_traceback_shows_the_lines_of_the_readable_source(tmp_path, how):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack_code(FAILING, "lzma"))
    command = {
        "run": [str(path)],
        "imported": [
            "-c",
            "import train_gpt, logging\ntry: train_gpt.outer(3)\n"
            "except ValueError: logging.exception('caught')",
        ],
    }[how]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    lines = done.stderr.splitlines()
    name = str(tmp_path / "train_gpt.readable.py")
    for number, function, text in ((5, "outer", "return inner(x)"), (10, "inner", "raise ")):
        at = lines.index(f'  File "{name}", line {number}, in {function}')
        assert lines[at + 1].strip().startswith(text)
    assert lines[-1] == "ValueError: x is 3"
    assert done.returncode == (1 if how == "run" else 0)


def test_a_packed_run_is_the_plain_run_in_every_figure_and_byte(packed, tiny):
    plain, other = tiny(**KNOBS), tiny(**KNOBS)
    assert figures(main(plain)) == figures(packed.main(packed.Config(**other.knobs())))
    assert artifact(plain) == artifact(other)
    for name in ("train_gpt.py", PACKED_NAME):
        assert (folder(plain) / name).read_bytes() == (folder(other) / name).read_bytes()


def stop_after_three_steps(module, cfg) -> None:
    """As if SIGTERM came: what is left is the folder with a checkpoint."""
    report = module.Trainer.report

    def stopping(trainer, now):
        report(trainer, now)
        if trainer.steps == 3:
            trainer.run.signalled(signal.SIGTERM, None)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(module.Refusal, match="SIGTERM"):
        patch.setattr(module.Trainer, "report", stopping)
        module.main(module.Config(**cfg.knobs()))


@pytest.mark.parametrize("first", ["plain", "packed"])
def test_a_run_goes_on_with_the_other_script(packed, tiny, first):
    begun, resumed = (train_gpt, packed) if first == "plain" else (packed, train_gpt)
    whole, cfg = tiny(**KNOBS), tiny(**KNOBS)
    expected = figures(main(whole))
    stop_after_three_steps(begun, cfg)
    assert not (folder(cfg) / "artifact.bin").exists()

    # in a copy: the stopped run is still in this process, and holds the lock of its folder
    copy = tiny(**KNOBS, resume=True)
    shutil.copytree(folder(cfg), folder(copy))
    found = resumed.main(resumed.Config(**copy.knobs()))
    assert found["resumed"] and figures(found) == expected
    assert artifact(copy) == artifact(whole)


def test_each_script_scores_the_artifact_of_the_other(packed, tiny):
    trained = tiny(**KNOBS)
    bpb = main(trained)["val_bpb"]
    path = str(folder(trained) / "artifact.bin")
    for module in (train_gpt, packed):
        cfg = module.Config(**tiny(eval_only=path, iterations=8).knobs())
        assert module.main(cfg)["val_bpb"] == bpb


def test_the_packed_script_runs_under_torchrun_and_gives_the_same_help(script, tiny):
    plain, other = tiny(**KNOBS), tiny(**KNOBS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node=1", str(script)]
    subprocess.run(command, env=environment(other), check=True, capture_output=True)
    expected = main(plain)
    found = json.loads((folder(other) / "result.json").read_text())
    assert figures(found) == json.loads(json.dumps(figures(expected)))
    assert artifact(plain) == artifact(other)

    texts = set()
    for path in (script, ROOT / "train_gpt.py"):
        code, shown = run_script(path, "--help")
        assert code == 0
        texts.add(without_bases(shown))
    assert len(texts) == 1 and "PACK_CODE" in texts.pop()


# ── counting ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("how, name", [("lzma", PACKED_NAME), ("none", "train_gpt.py")])
def test_the_bytes_that_are_counted_are_those_of_the_shipped_file(tiny, how, name):
    cfg = tiny(pack_code=how, val_loss_every=6)
    report = main(cfg)
    code = (folder(cfg) / name).stat().st_size
    assert report["code_bytes"] == code == len(shipped_code(cfg))
    assert report["total_bytes"] == code + len(artifact(cfg))
    assert (folder(cfg) / "train_gpt.py").read_bytes() == SOURCE
    assert (folder(cfg) / PACKED_NAME).exists() == (how == "lzma")

    events = [json.loads(line) for line in (folder(cfg) / "metrics.jsonl").open()]
    (estimate,) = [e["size_estimate"] for e in events if e["event"] == "val"]
    assert code < estimate < code + 2 * len(artifact(cfg))


@pytest.mark.parametrize("how", ["lzma", "none"])
def test_the_cap_and_fit_to_cap_count_the_shipped_file(tiny, how):
    total = main(tiny(pack_code=how))["total_bytes"]
    assert main(tiny(pack_code=how, cap_bytes=total - 1))["exit_code"] == 3
    fitted = tiny(pack_code=how, cap_bytes=total - 1, fit_to_cap=True)
    report = main(fitted)
    assert report["exit_code"] == 0
    assert report["total_bytes"] == len(shipped_code(fitted)) + len(artifact(fitted)) < total


def test_no_other_way_of_packing_is_accepted(tiny):
    with pytest.raises(Refusal, match="PACK_CODE=zip: choose one of lzma, none"):
        tiny(pack_code="zip")

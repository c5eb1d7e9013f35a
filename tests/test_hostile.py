"""Files from strangers and broken disks: a good value or one line, in bounded time and memory.

Would have caught: loaders that run what they load (torch.load of every published script), a config
that decides how much memory is taken, a study of 200 KB that takes all of it, a name that is a
path, a report that is somebody else's page, a terminal that a log file commands.
tests/fuzz_readers.py looks for more of them; what it found is in fuzz_cases/.
"""

import contextlib
import dataclasses
import hashlib
import json
import lzma
import math
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import fuzz_readers
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import HANG, TINY
from fuzz_readers import SMALL, check_page, good_results, replay, sealed
from hypothesis import given, settings
from hypothesis import strategies as st

import ablate
import prepare_data
import train_gpt
from ablation.check import check_submission
from ablation.findings import ERROR
from ablation.ours import MAX_CODE_BYTES
from ablation.records import load
from ablation.report import Finished, study_page, write_report
from ablation.study import STUDY_KEYS, Study, matrix, read_study
from train_gpt import (
    Config,
    Refusal,
    Split,
    check_data,
    encode_container,
    inherit_settings,
    read_artifact,
    read_container,
)

CASES = sorted((Path(__file__).parent / "fuzz_cases").glob("*-*"))
ESCAPES = ["\x1b[2J\x1b]0;title\x07", "\ud800", "a\nb", "a\rb", "\u202egnp", "\x00", "\x9b31m"]
FEW = settings(deadline=None, max_examples=60)
GOOD_STUDY = """\
[size.small]
steps = 4
seconds = 2.0
[arm.plain]
QAT_ENABLED = 0
[arm.qat]
QAT_ENABLED = 1
"""


@contextlib.contextmanager
def within(seconds: int):
    """Fails what computes for longer, and what waits for ever, as on a pipe without writer."""

    def busy(*_):
        pytest.fail(f"not done after {seconds} s of computing")

    def stuck(*_):
        pytest.fail(f"hangs: waited {HANG:.0f} s")

    handlers = {signal.SIGPROF: busy, signal.SIGALRM: stuck}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def refusal(reader, *arguments) -> str:
    """The line with which the reader refuses, within 10 seconds."""
    with within(10), pytest.raises((Refusal, prepare_data.UserError)) as caught:
        reader(*arguments)
    assert isinstance(caught.value, prepare_data.UserError) or str(caught.value).isprintable()
    return str(caught.value)


# ── What the fuzzer found, and what it begins with ────────────────────────────────────────────────
def broken_promise(target: str, data: bytes) -> str:
    """What the target does with this input and should not; empty: nothing."""
    try:
        replay(target, data)
    except Exception as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_what_was_once_found_by_fuzzing_is_mended(path):
    assert broken_promise(path.name.partition("-")[0], path.read_bytes()) == ""


@pytest.mark.parametrize("target", fuzz_readers.TARGETS)
def test_the_seeds_of_the_fuzzer_do_as_their_target_promises(target):
    found = [broken_promise(target, data) for data in fuzz_readers.seeds(target)]
    assert found and set(found) == {""}


@pytest.mark.parametrize(
    "target, act",
    [
        ("container", lambda folder: open("/etc/hostname").close()),
        ("container", lambda folder: [do(f"{folder}x") for do in (os.mkdir, os.rmdir)]),
        ("container", lambda folder: os.system("true")),
        ("container", lambda folder: [0] * (300 << 20)),
        ("container", lambda folder: 1 / 0),
    ],
    ids=["reads elsewhere", "writes elsewhere", "a process", "memory", "an exception"],
)
def test_the_guard_of_the_fuzzer_notices(monkeypatch, target, act):
    monkeypatch.setitem(fuzz_readers.TARGETS, target, lambda data, folder: act(folder))
    with pytest.raises((fuzz_readers.Finding, ZeroDivisionError)):
        replay(target, b"")


# ── Configuration ─────────────────────────────────────────────────────────────────────────────────
NAMES = [f.name.upper() for f in train_gpt.KNOBS] + [*train_gpt.ALIASES, *train_gpt.ABSENT]
VALUES = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["0", "1", "", "8"]),
    st.sampled_from([10**18, 10**19, 10**400]).map(str),
    st.sampled_from(["9" * 5000, "1e308", "1 0", "0,00"]),
    st.lists(st.integers(-1, 12), max_size=4).map(lambda ns: ",".join(map(str, ns))),
)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=9)), VALUES, max_size=5))
def test_any_environment_gives_a_configuration_or_printable_lines(env):
    try:
        cfg = Config.from_env(env)
    except Refusal as refused:
        assert refused.code == 2 and len(str(refused)) < 10_000
        assert all(line.isprintable() for line in str(refused).split("\n"))
    else:
        assert all(str(value).isprintable() for value in cfg.knobs().values())


@pytest.mark.parametrize(
    "env",
    [
        {"VE_ENABLED": "1", "VE_LAYERS": "9" * 5000},
        {"VE_ENABLED": "1", "VE_LAYERS": "1,01"},
        {"MODEL_DIM": "1" + "0" * 400},
        {"QK_GAIN_INIT": "1e300"},
        {"DATA_PATH": "a\x1b[2J"},
        {"RUN_ID": "\x00"},
        {"FP16_KEEP_NAME_PATTERNS": "\ud800"},
    ],
    ids=str,
)
def test_a_value_that_no_run_can_work_with_is_refused(env):
    assert refusal(Config.from_env, env).startswith(f"{list(env)[-1]}=")


def test_blocks_that_the_rule_accepts_are_blocks_that_the_model_can_read():
    """ "1 0" passed the rule as block 10 and then ended the run with a ValueError."""
    for text, blocks in (("10,2", [10, 2]), (" 10 , 2", [10, 2]), ("1 0,2", [10, 2])):
        with contextlib.suppress(Refusal):
            cfg = Config(
                **{**SMALL, "num_layers": 11}, ve_enabled=True, ve_layers=text, init="default"
            )
            assert train_gpt.GPT(cfg).value_embed.blocks == blocks
    assert Config(ve_enabled=True, ve_layers="10,2").ve_layers == "10,2"


@pytest.mark.parametrize("text", ESCAPES, ids=repr)
def test_a_refusal_is_one_line_that_commands_no_terminal(text):
    assert str(Refusal(f"X={text}: no")).isprintable()


# ── Containers and artifacts ──────────────────────────────────────────────────────────────────────
SHAPES = st.lists(st.integers(0, 4), max_size=3)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters=":"), max_size=8).filter(
        lambda n: n != "__metadata__"
    ),
    st.tuples(SHAPES, st.sampled_from([torch.float32, torch.float16, torch.int8, torch.int16])),
    max_size=4,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@FEW
@given(
    TENSORS,
    st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    st.sampled_from(list(train_gpt.COMPRESSORS)),
    st.data(),
)
def test_any_container_comes_back_as_it_was_and_with_any_bit_flipped_is_refused(
    tmp_path_factory, shapes, facts, compressor, data
):
    path = tmp_path_factory.mktemp("container") / "file.bin"
    tensors = {
        name: (torch.arange(math.prod(shape)) % 7 - 3).reshape(shape).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    blob = encode_container(tensors, facts, compressor, 1)
    path.write_bytes(blob)
    found, back = read_container(path)
    assert found == facts and back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    at, bit = data.draw(st.integers(0, len(blob) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(blob[:at] + bytes([blob[at] ^ 1 << bit]) + blob[at + 1 :])
    assert "file.bin" in refusal(read_container, path)


def forged(path: Path, tensors: dict, facts: dict | str | None = None) -> Path:
    """An artifact of these tensors; facts None: good ones."""
    text = (
        facts
        if isinstance(facts, str)
        else json.dumps(fuzz_readers.good("zstd")[0] if facts is None else facts)
    )
    path.write_bytes(sealed(safetensors.torch.save(tensors, {"facts": text})))
    return path


def scored(path: Path) -> Config:
    """What main() does with EVAL_ONLY before it reads data."""
    return inherit_settings(Config(eval_only=str(path)), *read_artifact(path))


TENSOR = {
    "codes without a dimension": {
        "w:codes": torch.tensor(1, dtype=torch.int8),
        "w:scale": torch.ones(1).half(),
    },
    "a double that no float holds": {"w": torch.full((2,), 1e300, dtype=torch.float64)},
    "integers": {"w": torch.ones(2, dtype=torch.int64)},
    "a name that ends at the colon": {"w:": torch.ones(2)},
    "codes of three dimensions": {
        "w:codes": torch.ones(2, 2, 2, dtype=torch.int8),
        "w:scale": torch.ones(2, 2, 1).half(),
    },
}


@pytest.mark.parametrize("tensors", TENSOR.values(), ids=TENSOR)
def test_tensors_that_no_export_writes_are_refused(tmp_path, tensors):
    assert "a.bin" in refusal(read_artifact, forged(tmp_path / "a.bin", tensors, {}))


@pytest.mark.parametrize(
    "change",
    [
        {"ve_layers": "\x1b[2J"},
        {"ve_layers": "\ud800"},
        {"parallel_final_lane": "\x1b[2J"},
        {"parallel_final_lane": "\ud800"},
        {"qk_gain_init": 1e300},
        {"ve_enabled": True, "ve_layers": "9" * 5000},
        {"eval_batch_seqs": 10**30},
        {"model_dim": 10**400},
    ],
    ids=lambda c: str(c)[:40],
)
def test_settings_in_an_artifact_that_break_terminal_or_model_are_refused(tmp_path, change):
    facts, tensors = fuzz_readers.good("zstd")
    assert (
        "a.bin"
        in (line := refusal(scored, forged(tmp_path / "a.bin", tensors, {**facts, **change})))
        or "=" in line
    )
    assert scored(forged(tmp_path / "a.bin", tensors)).num_layers == SMALL["num_layers"]


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.write_bytes(sealed(b"x")) and os.truncate(path, 1 << 40),
    ],
    ids=["pipe", "folder", "device", "loop", "terabyte"],
)
@pytest.mark.parametrize("reader", [read_container, read_artifact])
def test_what_is_no_plain_file_of_a_sane_size_is_refused_unread(tmp_path, reader, make):
    make(tmp_path / "a.bin")
    assert "a.bin" in refusal(reader, tmp_path / "a.bin")


def test_an_xz_stream_cannot_ask_for_gigabytes(tmp_path):
    raw = safetensors.torch.save({"w": torch.ones(4)}, {"facts": "{}"})
    small, large = (
        lzma.compress(
            raw,
            filters=[
                {
                    "id": lzma.FILTER_LZMA2,
                    "dict_size": 1 << n,
                    "mode": lzma.MODE_FAST,
                    "mf": lzma.MF_HC3,
                    "nice_len": 8,
                }
            ],
        )
        for n in (20, 28)
    )
    (tmp_path / "a.bin").write_bytes(sealed(small, "lzma", len(raw)))
    assert read_container(tmp_path / "a.bin")[1]["w"].tolist() == [1] * 4
    (tmp_path / "a.bin").write_bytes(sealed(large, "lzma", len(raw)))
    assert "LZMAError" in refusal(read_container, tmp_path / "a.bin")


def test_few_bytes_cannot_stand_for_more_weights_than_a_run_could_ship(tmp_path):
    """Zeros compress without end: 1 GiB of int8 would be 4 GiB of fp32."""
    n = 1 << 14
    tensors = {"w:codes": torch.zeros(n, n, dtype=torch.int8), "w:scale": torch.ones(n, 1).half()}
    raw = safetensors.torch.save(tensors, {"facts": "{}"})
    (tmp_path / "a.bin").write_bytes(
        sealed(train_gpt.COMPRESSORS["zstd"].compress(raw, 1), "zstd", len(raw))
    )
    assert (tmp_path / "a.bin").stat().st_size < 1 << 20
    assert "a.bin" in refusal(read_artifact, tmp_path / "a.bin")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[dict, dict, dict]:
    """(settings, facts, tensors) of the checkpoint of a short training."""
    knobs = dict(
        TINY,
        data_path=str(data),
        tokenizer_path=str(data / "tokenizer.model"),
        ema_enabled=True,
        strict=False,
    )
    logs = tmp_path_factory.mktemp("trained")
    train_gpt.main(Config(**knobs, logs_dir=str(logs), run_id="run"))
    return knobs, *read_container(logs / "run" / "checkpoint.bin")


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["progress"].update(step_seconds=["x"]),
        lambda f: f["progress"].update(step_seconds=3),
        lambda f: f["progress"].update(lengths=[64, -1]),
        lambda f: f["progress"].update(lengths=["x"]),
        lambda f: f["progress"].update(warmed=["x"]),
        lambda f: f["progress"].update(warmed=[[1.0]]),
        lambda f: f.update(progress=[1]),
        lambda f: f["progress"].update(code_sha256=3),
        lambda f: f["progress"].update(steps="1"),
        lambda f: f["activity"]["EMA"].update(steps=3),
        lambda f: f.update(snapshots="x"),
    ],
    ids=[
        "seconds",
        "no seconds",
        "negative length",
        "length",
        "warm-up",
        "lists",
        "a list",
        "hash",
        "steps",
        "activity",
        "snapshots",
    ],
)
def test_facts_of_a_checkpoint_that_no_run_wrote_are_refused_before_anything_is_scored(
    trained, tmp_path, change
):
    knobs, facts, tensors = trained
    change(facts := json.loads(json.dumps(facts)))
    (tmp_path / "c.bin").write_bytes(encode_container(tensors, facts, "none"))
    cfg = Config(
        **knobs, logs_dir=str(tmp_path), run_id="again", checkpoint=str(tmp_path / "c.bin")
    )
    assert "checkpoint" in refusal(train_gpt.main, cfg).lower()


# ── Shards and manifests ──────────────────────────────────────────────────────────────────────────
@FEW
@given(
    st.tuples(*[st.one_of(st.just(n), st.integers(-(2**31), 2**31 - 1)) for n in (20240520, 1, 3)]),
    st.binary(max_size=12),
    st.sampled_from([0, 0, 0, 1, 100, 1024]),
)
def test_a_shard_is_read_exactly_where_header_and_size_agree(tmp_path_factory, numbers, tail, cut):
    path, cfg = (
        tmp_path_factory.mktemp("shard") / "fineweb_val_000000.bin",
        Config(**SMALL | {"vocab_size": 65536}),
    )
    content = (np.array([*numbers, *[0] * 253], "<i4").tobytes() + tail)[cut:]
    path.write_bytes(content)
    cfg = dataclasses.replace(cfg, data_path=str(path.parent))
    if not cut and numbers == (20240520, 1, len(tail) / 2) and len(tail) >= 4:
        assert (split := Split(cfg, "val")).take(0, split.tokens).tolist() == np.frombuffer(
            tail, "<u2"
        ).tolist()
    else:
        assert path.name in (line := refusal(Split, cfg, "val")) or "_val_*.bin" in line


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.mkdir(),
        lambda p: p.symlink_to("nowhere"),
        os.mkfifo,
        lambda p: p.symlink_to("/dev/zero"),
    ],
    ids=["folder", "dangling", "pipe", "device"],
)
def test_a_shard_that_is_no_plain_file_is_refused_unread(tmp_path, make):
    make(tmp_path / "fineweb_val_000000.bin")
    assert "fineweb_val_000000.bin" in refusal(Split, Config(data_path=str(tmp_path)), "val")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A small folder with a good manifest."""
    files, manifest = fuzz_readers.good_dataset()
    (tmp_path / "set").mkdir()
    for name, content in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
        (tmp_path / "set" / name).write_bytes(content)
    return tmp_path / "set"


def agrees(folder: Path) -> dict:
    cfg = fuzz_readers.data_config(folder)
    return check_data(cfg, {name: Split(cfg, name) for name in ("val", "train")})


def finished(folder: Path) -> bool:
    return prepare_data.is_finished(folder, fuzz_readers.good_dataset()[1]["settings"])


MANIFESTS = {
    "deep": lambda m: "[" * 100_000,
    "half a character": lambda m: json.dumps(m | {"disjoint": {"shared": "\ud800"}}),
    "a command to the terminal": lambda m: json.dumps(m | {"disjoint": {"shared": "\x1b[2J"}}),
    "a file name of half a character": lambda m: json.dumps(m).replace(
        "fineweb_val_", r"\ud800_val_"
    ),
    "a list": lambda m: "[]",
    "shards that are a number": lambda m: json.dumps(m | {"shards": 3}),
    "a shard elsewhere": lambda m: json.dumps(m).replace("fineweb_val_", "../fineweb_val_"),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_hostile_manifest_is_refused_by_both_readers(dataset, change):
    assert "agrees" in agrees(dataset)["manifest"] and finished(dataset)
    (dataset / "manifest.json").write_text(
        change(json.loads((dataset / "manifest.json").read_text()))
    )
    assert str(dataset) in refusal(agrees, dataset)
    if "shared" not in (dataset / "manifest.json").read_text():
        assert str(dataset) in refusal(finished, dataset)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("settings"),
        lambda m: m.update(settings=[1]),
        lambda m: m.pop("tokenizer"),
        lambda m: m.update(tokenizer=3),
        lambda m: m.update(shards=[3]),
        lambda m: m["shards"][0].update(file=3),
        lambda m: m["shards"][0].update(file=None),
        lambda m: m["shards"][0].pop("sha256"),
        lambda m: m["shards"][0].update(file="x" * 5000),
        lambda m: m["shards"][0].update(file="\0"),
    ],
)
def test_a_manifest_of_another_form_ends_no_preparation_with_a_traceback(dataset, change):
    manifest = json.loads((dataset / "manifest.json").read_text())
    change(manifest)
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    assert str(dataset) in refusal(finished, dataset)


def test_a_manifest_names_no_file_outside_its_folder(dataset):
    manifest, outside = (
        json.loads((dataset / "manifest.json").read_text()),
        dataset.parent / "outside",
    )
    outside.write_bytes(b"secret")
    for name in (str(outside), "../outside", "../set/../outside"):
        manifest["tokenizer"] |= {"file": name, "sha256": hashlib.sha256(b"secret").hexdigest()}
        (dataset / "manifest.json").write_text(json.dumps(manifest))
        assert "missing" in refusal(finished, dataset)


def test_a_tokenizer_may_lie_where_fineweb_puts_it(tmp_path, dataset):
    folder, manifest = (
        tmp_path / "data/datasets/x",
        json.loads((dataset / "manifest.json").read_text()),
    )
    shutil.copytree(dataset, folder)
    (tmp_path / "data/tokenizers").mkdir()
    (folder / "tokenizer.model").rename(tmp_path / "data/tokenizers/t.model")
    manifest["tokenizer"]["file"] = "../../tokenizers/t.model"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert finished(folder)


@pytest.mark.parametrize(
    "path", ["../../../etc/x", "/etc/x", "tokenizers/..", "", "a//b", 3, None, ["x"]], ids=repr
)
def test_a_tokenizer_of_the_hub_is_a_path_below_its_folder(path):
    listing = json.loads(json.dumps(fuzz_readers.LISTING))
    listing["tokenizers"][0]["model_path"] = path
    with pytest.raises(
        (prepare_data.UserError, ValueError, TypeError, AttributeError)
    ):  # fetch_dataset makes one line of them
        prepare_data.published_files(listing, "sp1024", 1)


@pytest.mark.parametrize("number", [10**12, -1, 1.5, "1", None])
def test_the_hub_cannot_name_shards_without_end(number):
    listing = json.loads(json.dumps(fuzz_readers.LISTING))
    listing["datasets"][0]["stats"]["files_val"] = number
    with within(10), pytest.raises((ValueError, TypeError)):
        prepare_data.published_files(listing, "sp1024", 1)


@pytest.mark.parametrize("text", ESCAPES, ids=repr)
def test_a_complaint_about_a_file_commands_no_terminal(dataset, capsys, text):
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["settings"] = {
        "command": "demo",
        "vocab_size": 1024,
        text: 1,
    } | prepare_data.demo_versions()
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    assert prepare_data.main(["demo", "--out", str(dataset)]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


# ── Studies ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def study(tmp_path):
    """study(text, file) -> what read_study makes of it."""

    def make(text: str, name: str = "study.toml") -> Study:
        (tmp_path / name).write_text(text)
        return read_study(tmp_path / name)

    return make


STUDIES = {  # what is wrong -> (text, words of the refusal)
    "an endless whole number": (f"seeds = [{'9' * 5000}]\n{GOOD_STUDY}", "digits"),
    "a key of many parts": (f"seeds{'.a' * 5000} = 1\n{GOOD_STUDY}", "dots"),
    "a key of many parts, inline": (f"[env]\nX = {{{'a.' * 5000}a = 1}}\n{GOOD_STUDY}", "dots"),
    "deep in small steps": (
        f"[env]\nDATA_PATH = {'[' * 90}{'{a.b.c = ' * 30}1{'}' * 30}{']' * 90}\n{GOOD_STUDY}",
        "nested too deeply",
    ),
    "deep lists": (f"seeds = {'[' * 50}{']' * 50}\n{GOOD_STUDY}", "nested too deeply"),
    "deep tables": (
        "".join(f"[{'.'.join('a' * n)}]\n" for n in range(1, 60)) + GOOD_STUDY,
        "nested too deeply",
    ),
    "arms that are lists": (
        GOOD_STUDY.replace("steps = 4", 'steps = 4\narms = [["plain"]]'),
        "names of arms",
    ),
    "arms that are numbers": (
        GOOD_STUDY.replace("steps = 4", "steps = 4\narms = [5]").replace("plain", "5"),
        "names of arms",
    ),
    "times of arms that are tables": (
        GOOD_STUDY.replace("steps = 4", "steps = 4\ntime_arms = [{a = 1}]"),
        "names of arms",
    ),
    "a comparison with a number": (
        'compare = [["5", 5]]\n' + GOOD_STUDY.replace("plain", "5"),
        "pairs of arms",
    ),
    "a factorial without end": (
        GOOD_STUDY
        + "[factorial]\n"
        + "".join(
            f"{f.name} = [1, 2]\n" for f in train_gpt.KNOBS if f.type == "int" and f.name != "seed"
        )[:2000].rpartition("\n")[0],
        "combinations",
    ),
    "levels that become one name": (
        GOOD_STUDY + '[factorial]\nfp16_keep_name_patterns = ["A", "a", "b"]',
        "different levels",
    ),
    "the same level as text and number": (
        GOOD_STUDY + '[factorial]\nqat_enabled = [0, 1, "1"]',
        "different levels",
    ),
    "a zero byte in a path": (GOOD_STUDY + '[env]\nDATA_PATH = "\\u0000"', "control characters"),
    "a command to the terminal": (
        GOOD_STUDY + '[env]\nDATA_PATH = "\\u001b[2J"',
        "control characters",
    ),
    "more trials than anybody runs": (f"seeds = {list(range(6000))}\n{GOOD_STUDY}", "trials"),
}


@pytest.mark.parametrize("text, words", STUDIES.values(), ids=STUDIES)
def test_a_hostile_study_is_refused_in_little_time_and_memory(study, text, words):
    tracemalloc.start()
    try:
        assert words in refusal(lambda: matrix(study(text), "small", "steps"))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["...toml", "a b.toml", "<img src=x>.toml", "x\x1b[2J.toml", "-x.toml", ".toml"]
)
def test_the_name_of_a_study_is_no_path_and_no_markup(study, name):
    assert "file name" in refusal(study, GOOD_STUDY, name)


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.mkdir(),
        lambda p: p.touch() or os.truncate(p, 1 << 40),
    ],
    ids=["pipe", "device", "folder", "terabyte"],
)
def test_a_study_that_is_no_plain_file_is_refused_unread(tmp_path, make):
    make(tmp_path / "study.toml")
    assert "study.toml" in refusal(read_study, tmp_path / "study.toml")


TOML_VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["..", "../x", "/x", "a\nb", "\x1b", "<script>", "x" * 300, "javascript:alert(1)"]
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *STUDY_KEYS,
        "steps",
        "seconds",
        "arms",
        "time_arms",
        "ranks",
        "note",
        "QAT_ENABLED",
        "VE_LAYERS",
        "DATA_PATH",
    ]
)


def toml_text(value: str) -> str:
    """A basic string of TOML: JSON's, but for half characters and what TOML wants escaped."""
    return json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=False).replace(
        "\x7f", "\\u007F"
    )


def toml_value(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return toml_text(value) if isinstance(value, str) else json.dumps(value)


@settings(deadline=None, max_examples=200)
@given(
    st.text(max_size=12) | st.sampled_from(["..", "../x", "/x", "a" * 300, "<b>"]),
    st.text(max_size=12),
    st.dictionaries(KEYS, TOML_VALUES, max_size=3),
)
def test_whatever_a_study_names_its_runs_stay_in_their_folder_and_its_page_is_ours(
    tmp_path_factory, arm, size, values
):
    path = tmp_path_factory.mktemp("study") / "study.toml"
    top = "".join(f"{key} = {toml_value(v)}\n" for key, v in values.items() if key in STUDY_KEYS)
    rest = "".join(
        f"{key} = {toml_value(v)}\n" for key, v in values.items() if key not in STUDY_KEYS
    )
    arms = f"[arm.{toml_text(arm)}]\nQAT_ENABLED = 1\n[arm.plain]\n"
    path.write_text(
        f"{top}[size.{toml_text(size)}]\nsteps = 4\nseconds = 2\n{rest}{arms}{rest}"
        if values and not len(rest) % 2
        else f"{top}[size.{toml_text(size)}]\nsteps = 4\nseconds = 2\n{arms}{rest}",
        encoding="utf-8",
    )
    try:
        m = matrix(read_study(path), next(iter(read_study(path).sizes)), "steps")
    except Refusal as refused:
        assert str(refused).isprintable()
    else:
        fuzz_readers.check_matrix(m)


# ── Run folders, reports, terminals ───────────────────────────────────────────────────────────────
def stranger(folder: Path, events: str = "", **changes) -> dict:
    """The run that ablate.py loads from a folder with this result."""
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(good_results()[1] | changes))
    (folder / "metrics.jsonl").write_text(events)
    return load(folder)


def report_of(study_, folder: Path, **changes) -> Finished:
    m = matrix(study_, "small", "steps")
    return Finished(
        m,
        {
            arm: {s: stranger(folder, **{"seed": s} | changes) | {"arm": arm} for s in (1, 2)}
            for arm in m.arms
        },
        {},
    )


def page_of(found: Finished) -> str:
    return study_page(found)


EVENTS = {
    "a whole number of 400 digits": '{"event": "val", "step": 1%s, "seconds": 1, "val_bpb": 1}'
    % ("0" * 400),
    "numbers that no axis holds": '{"event": "val", "step": 1e308, "seconds": 1, "val_bpb": 1e308}'
    '\n{"event": "val", "step": -1e308, "seconds": 1, "val_bpb": -1e308}',
    "20,000 phases": "\n".join(
        f'{{"event": "phase", "name": "p{n}", "step": 1, "seconds": 1}}' for n in range(20_000)
    ),
    "deep": "[" * 100_000,
    "text": '"event"',
    "half a character": '{"event": "phase", "name": "\\ud800", "step": 1}',
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("events", EVENTS.values(), ids=EVENTS)
def test_no_line_of_a_log_breaks_the_page(study, tmp_path, events):
    with within(20):
        check_page(page_of(report_of(study(GOOD_STUDY), tmp_path / "run", events=events)))


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 5},
        {"groups": [[1]]},
        {"groups": "abc"},
        {"groups": {str(n): {"bytes": 1} for n in range(20_000)}},
        {"scores": [1]},
        {"scores": {"live": 3}},
        {"averaged_val_bpb": None},
        {"inactive": 5},
        {"config": {"seed": 1, "tokenizer_path": "", "ttt_mode": "\x1b"}},
        {"quant_gap_bpb": -9e17, "val_bpb": 9e17},
        {"step_ms_median": "x"},
    ],
    ids=lambda c: str(c)[:40],
)
def test_no_value_of_a_result_breaks_the_page(study, tmp_path, changes):
    with within(20):
        check_page(page_of(report_of(study(GOOD_STUDY), tmp_path / "run", **changes)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"val_bytes": 0}, "0 bytes"),
        ({"val_tokens": 0}, "0 targets"),
        ({"threads_per_rank": "x"}, "threads_per_rank"),
        ({"seconds": 3}, "seconds"),
        ({"seconds": {"data": "x"}}, "seconds.data"),
    ],
    ids=str,
)
def test_a_result_that_no_report_can_use_is_refused(tmp_path, changes, words):
    assert words in refusal(lambda: stranger(tmp_path / "run", **changes))


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.touch() or os.truncate(p, 1 << 40),
    ],
    ids=["pipe", "device", "terabyte"],
)
def test_a_log_that_is_no_plain_file_keeps_nobody_waiting(tmp_path, name, make):
    stranger(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    make(tmp_path / "run" / name)
    with within(10), contextlib.suppress(Refusal):
        assert load(tmp_path / "run")["events"] == []


HTML = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onload="x',
    "' style='x",
    "javascript:alert(1)",
    "]]>",
    "<!--",
    "</td></tr></table>",
    "</svg>",
    "&lt;",
    "{{ 7 * 7 }}",
]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("text", HTML + ESCAPES[:2], ids=repr)
def test_no_string_of_any_file_becomes_markup_or_breaks_the_report(
    study, tmp_path, text, monkeypatch
):
    """Every text of a study and of its results that a report or a page shows."""
    quoted = toml_text(text)
    words = "".join(f"{key} = {quoted}\n" for key in ("title", "question", "source", "limits"))
    body = (
        GOOD_STUDY.replace("steps = 4", f"steps = 4\nnote = {quoted}")
        + f"expect = {quoted}\npublished = {{{toml_text(text)} = [{quoted}]}}\n"
    )
    made = study(words + body)
    changes = {key: text for key in ("device", "torch", "scored", "date")} | {
        "groups": {text: {"bytes": 9}}
    }
    found = report_of(
        made,
        tmp_path / "run",
        events=json.dumps({"event": "phase", "name": text, "step": 1, "seconds": 1}),
        **changes,
    )
    lost = dataclasses.replace(found, failed={f"{found.matrix.arms[0]}-s9": text})
    monkeypatch.setattr("ablation.report.load_matrix", lambda *given: lost)
    m = dataclasses.replace(found.matrix, folder=tmp_path)
    for path in write_report(m):
        assert path.read_bytes()
    page = (tmp_path / "report.html").read_text()
    check_page(page)
    assert "<script" not in page and "javascript:" not in [value for value in page.split('"')[1::2]]


@pytest.mark.parametrize("text", ESCAPES, ids=repr)
def test_strings_of_result_files_never_command_the_terminal(tmp_path, capsys, text):
    for side, layers in (("a", text), ("b", "0")):
        for seed in (1, 2):
            stranger(
                tmp_path / f"{side}{seed}",
                seed=seed,
                config=good_results()[1]["config"] | {"ve_layers": layers},
                scored=text,
            )
    assert ablate.main(["compare", str(tmp_path / "a*"), str(tmp_path / "b*")]) == 0
    out = capsys.readouterr().out
    assert "settings that differ: VE_LAYERS=" in out and all(
        line.isprintable() for line in out.split("\n")
    )


@pytest.mark.parametrize("text", ESCAPES, ids=repr)
def test_a_report_commands_no_terminal_either(study, tmp_path, capsys, text):
    study(f"title = {toml_text(text)}\n".replace("\x9b", "\\u009b") + GOOD_STUDY)
    (tmp_path / "runs").mkdir()
    assert (
        ablate.main(["report", str(tmp_path / "study.toml"), "--out", str(tmp_path / "runs")]) == 0
    )
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))


# ── Submissions ───────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A good submission, whose script is not run."""
    monkeypatch.setattr("ablation.ours.check_script", lambda *_: [])
    (tmp_path / "submission").mkdir()
    for name, content in fuzz_readers.submission_of(good_results()).items():
        (tmp_path / "submission" / name).write_bytes(content)
    assert wrong(tmp_path / "submission") == []
    return tmp_path / "submission"


def wrong(folder: Path) -> list[str]:
    """What the checker calls an error, in printable lines, within 20 seconds."""
    with within(20):
        found = check_submission(folder)
    lines = list(map(str, found))
    assert all(line.isprintable() and len(line) < 1000 for line in lines) and len(lines) < 300
    return [str(one) for one in found if one.weight == ERROR]


def problems(folder: Path) -> str:
    """The same as one text, of a folder that has some."""
    found = wrong(folder)
    assert found
    return "\n".join(found)


def test_a_million_numbers_in_the_prose_take_no_time(folder):
    with (folder / "README.md").open("a") as file:
        file.write("\n" + "".join(f".{n:06d}9 " for n in range(0, 1_000_000)))
    said = problems(folder)
    assert "no result shows the number" in said and "more" in said


def test_numbers_of_the_prose_are_found_whatever_their_size(folder):
    r = good_results()[1]
    with (folder / "README.md").open("a") as file:
        file.write(f"\n{r['val_bpb']:.3f} {r['val_bpb']:.9f} {r['train_seconds']:,.3f}\n")
    assert wrong(folder) == []
    with (folder / "README.md").open("a") as file:
        file.write(f"\n{r['val_bpb'] + 0.004:.4f} 99999999.123 .000\n")
    assert problems(folder).count("no result shows") in (1, 2, 3)


def test_a_script_that_takes_long_to_compile_is_not_compiled_here(folder):
    """CPython takes minutes and gigabytes for a megabyte of f-string."""
    source = b"f'" + b"{a}" * 300_000 + b"'"
    results = {
        seed: r
        | dict(
            code_bytes=len(source),
            total_bytes=len(source) + r["artifact_bytes"],
            code_sha256=hashlib.sha256(source).hexdigest(),
        )
        for seed, r in good_results().items()
    }
    for name, content in fuzz_readers.submission_of(results).items():
        (folder / name).write_bytes(content)
    (folder / "train_gpt.py").write_bytes(source)
    with within(20):
        assert (
            wrong(folder) == []
        )  # (its import is left out here; it has a process and a time limit of its own)
    source += b" " * MAX_CODE_BYTES
    results = {
        seed: r | dict(code_sha256=hashlib.sha256(source).hexdigest())
        for seed, r in results.items()
    }
    for name, content in fuzz_readers.submission_of(results).items():
        (folder / name).write_bytes(content)
    (folder / "train_gpt.py").write_bytes(source)
    assert "no script of a person" in problems(folder)


@pytest.mark.parametrize("name", ["X=1; rm -rf ~; Y", "a\nb", "$(id)", "", "x"], ids=repr)
def test_no_name_of_a_setting_becomes_a_command_of_the_readme(folder, name):
    r = good_results()[2]
    (folder / "result_seed2.json").write_text(
        json.dumps(r | {"non_default": r["non_default"] | {name: "1"}})
    )
    assert "no name of a setting" in problems(folder)


@pytest.mark.parametrize("name", ["a" * 255, "\x1b[2J", "a\nb", "\udcff", "<script>"], ids=repr)
def test_a_file_of_any_name_is_no_trouble(folder, name):
    (folder / name).write_bytes(b"x")
    assert wrong(folder) == []
    (folder / name).unlink()
    (folder / name).symlink_to("/etc/passwd")
    assert "a link or a device" in problems(folder)


def test_a_folder_deeper_than_any_path_is_reported(folder):
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(18):  # longer in all than a path may be
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        Path("x").touch()
    finally:
        os.chdir(here)
    assert any(line.startswith("d" * 250) for line in wrong(folder))


def test_a_problem_is_told_shortly_however_long_the_key(folder):
    whole = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(
        json.dumps(whole | {"k" * 1_000_000: 1} | {f"k{n}": 1 for n in range(5000)})
    )
    assert "no log gives that" in problems(folder)


@pytest.mark.parametrize("name", ["submission.json", "result_seed2.json", "README.md"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"\x00" * 100,
        b"[" * 10**6,
        b"{" * 10**6,
        b'{"a":' * 10**5,
        b"9" * 10**6,
        b"[[]," * 10**6,
        b'"' + b"\\u0000" * 10**5 + b'"',
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda c: repr(c[:8]),
)
def test_no_content_of_a_file_makes_the_checker_stumble(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in problems(folder)

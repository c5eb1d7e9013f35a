"""How a launch is spelt, what it says when it is refused, and what it leaves.

Failures that these tests would have caught: a mistyped argument of `make train` was a variable
that nobody read; the defaults of `make train` contradicted the checkpoint that it was given; under
torchrun what was wrong stood above 35 lines of its traceback, and was lost where rank 0 was not the
first to end; `| head -3` ended a run; RUN_ID=../x wrote elsewhere; a refused launch kept its name.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, INHERITED, ROOT, environment, make_data

import train_gpt
from train_gpt import EXIT_CODES, Config, Refusal, Run, command_line, main


def refused(env: dict[str, str], arguments: list[str]) -> list[str]:
    """The lines with which this launch is refused."""
    with pytest.raises(Refusal) as refusal:
        Config.from_env(env, arguments)
    assert refusal.value.code == 2
    return refusal.value.problems


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────
def test_an_argument_is_a_setting_in_any_spelling():
    cfg = Config.from_env({}, ["QAT=True", "NUM_LAYERS=9", "RUN_ID=a=b"])
    assert cfg == Config(qat_enabled=True, num_layers=9, run_id="a=b")
    assert cfg.given == {"QAT_ENABLED", "NUM_LAYERS", "RUN_ID"} and cfg.won == ()


@pytest.mark.parametrize(
    "argument, suggestion",
    [
        ("PATH=/bin", "DATA_PATH"),
        ("seed=7", "SEED"),
        ("--seed=7", "SEED"),
        ("EMA=1", "EMA_ENABLED"),
        ("LAYERS=9", "NUM_LAYERS"),
        ("SEQ_LENGTH=9", "TRAIN_SEQ_LEN"),
    ],
)
def test_an_argument_that_is_no_setting_is_refused_whatever_it_looks_like(argument, suggestion):
    (message,) = refused({}, [argument])
    assert message == f"{argument}: no such setting; did you mean {suggestion}? --help lists all"


@pytest.mark.parametrize("argument", ["TYPO=1", "=7", "CUDA_VISIBLE_DEVICES=0", "KEEP_ALIVE=1"])
def test_nothing_is_suggested_where_nothing_is_near(argument):
    assert refused({}, [argument]) == [f"{argument}: no such setting; --help lists all"]


def test_an_argument_of_other_scripts_is_refused_by_name_or_without_effect():
    assert Config.from_env({}, ["GATED_ATTENTION=0"]).others == {"GATED_ATTENTION": "off, as here"}
    (message,) = refused({}, ["GATED_ATTENTION=1"])
    assert message.startswith("GATED_ATTENTION=1: a setting of other scripts")


def test_arguments_win_over_the_environment_and_say_so():
    env = {"SEED": "1", "QAT": "1", "NUM_LAYERS": "9", "EMA_ENABLED": "maybe"}
    cfg = Config.from_env(env, ["SEED=2", "QAT_ENABLED=0", "NUM_LAYERS=9", "EMA_ENABLED=0"])
    assert (cfg.seed, cfg.qat_enabled, cfg.num_layers, cfg.ema_enabled) == (2, False, 9, False)
    assert cfg.won == (
        "argument EMA_ENABLED=0 wins over EMA_ENABLED=maybe of the environment",
        "argument QAT_ENABLED=0 wins over QAT=1 of the environment",
        "argument SEED=2 wins over SEED=1 of the environment",
    )


def test_an_old_name_wins_over_the_environment_too():
    cfg = Config.from_env({"QAT": "0"}, ["QAT=1"])
    assert cfg.qat_enabled
    assert cfg.won == ("argument QAT=1 wins over QAT=0 of the environment",)


@pytest.mark.parametrize("spelling", ["QAT", "QAT_ENABLED"])
@pytest.mark.parametrize("argument", ["QAT=1", "QAT_ENABLED=1"])
def test_what_an_argument_wins_over_is_not_looked_at(spelling, argument):
    cfg = Config.from_env({spelling: "maybe"}, [argument])
    told = f"argument {argument} wins over {spelling}=maybe of the environment"
    assert cfg.qat_enabled and cfg.won == (told,)


def test_an_argument_that_says_the_same_wins_over_nothing():
    env = {"MATRIX_LR": "0.020", "QAT": "True", "QUANT_BITS_MLP": "6"}
    assert Config.from_env(env, ["MATRIX_LR=.02", "QAT_ENABLED=1", "QUANT_BITS=6"]).won == ()


def test_a_default_of_the_launcher_yields_to_everything_and_is_not_given():
    defaults = ["SEED?=1", "NUM_LAYERS?=2", "MODEL_DIM?=96"]
    cfg = Config.from_env({"SEED": "5"}, [*defaults, "NUM_LAYERS=3"])
    assert (cfg.seed, cfg.num_layers, cfg.model_dim) == (5, 3, 96)
    assert cfg.given == {"SEED", "NUM_LAYERS"} and cfg.won == ()
    (message,) = refused({}, ["TYPO?=1"])
    assert message.startswith("TYPO=1: no such setting")


def test_all_that_is_wrong_with_arguments_and_environment_is_said_at_once():
    lines = refused(
        {"EMA": "1", "SEED": "one"}, ["help", "TYPO=1", "NUM_LAYERS=0", "INIT=a", "INIT=ortho"]
    )
    assert [line.split(":")[0] for line in lines] == [
        "help",
        "INIT=ortho contradicts INIT=a; give only one",
        "EMA=1",
        "TYPO=1",
        "SEED=one",
        "NUM_LAYERS=0",
        "INIT=a",
    ]


def test_the_log_says_which_argument_won(tiny, monkeypatch):
    cfg = tiny(iterations=1)
    env = environment(cfg) | {"SEED": "1"}
    assert main(Config.from_env(env, ["SEED=2"]))["exit_code"] == 0
    log = (Path(cfg.logs_dir) / cfg.run_id / "train.log").read_text().splitlines()
    assert "argument SEED=2 wins over SEED=1 of the environment" in log


def test_a_file_that_holds_its_settings_wins_over_the_launchers_defaults(tiny):
    cfg = tiny(iterations=1)
    first = main(cfg)
    artifact = Path(cfg.logs_dir) / cfg.run_id / "artifact.bin"
    env = {"DATA_PATH": cfg.data_path, "LOGS_DIR": cfg.logs_dir, "EVAL_ONLY": str(artifact)}
    env["TOKENIZER_PATH"] = cfg.tokenizer_path
    again = main(Config.from_env(env, ["MODEL_DIM?=96", "VAL_MAX_TOKENS?=7"]))
    assert again["val_bpb"] == first["val_bpb"]


# ── make ──────────────────────────────────────────────────────────────────────────────────────────
PRINTER = "#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done\n"


@pytest.fixture
def make(tmp_path):
    """make(*words, **variables) -> the arguments that its script gets on a machine without GPU."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for program in ("torchrun", "python"):
        (programs / program).write_text(PRINTER)
        (programs / program).chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)

    def ends(*words: str, **variables: str) -> subprocess.CompletedProcess:
        old = ["-o", ".venv/installed", "-o", "data/demo/manifest.json"]
        for path in old[1::2]:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        env = {name: os.environ[name] for name in INHERITED if name in os.environ}
        return subprocess.run(
            ["make", "-s", *old, *words, "GPUS=0"],
            cwd=tmp_path,
            env={**env, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def run(*words: str, **variables: str) -> list[str]:
        done = ends(*words, **variables)
        if done.returncode:
            raise SystemExit(done.stderr)
        printed = done.stdout.rpartition("\n")[2].removesuffix("\0").split("\0")
        return printed[printed.index(f"{'bench' if 'bench' in words else 'train_gpt'}.py") + 1 :]

    run.ends = ends
    return run


@pytest.mark.parametrize("target", ["train", "bench"])
def test_settings_on_makes_command_line_become_arguments_with_whatever_they_hold(make, target):
    strange = 'it\'s "one", a $HOME `x` \\ *;#'
    escaped = strange.replace("$", "$$")
    arguments = make(target, "SEED=7", f"RUN_ID={escaped}", "NAME=mine", "PYTHON=python3")
    cfg = Config.from_env({}, [a for a in arguments if a not in ("run", "--name", "mine")])
    assert (cfg.seed, cfg.run_id) == (7, strange) and cfg.given == {"SEED", "RUN_ID"}


def test_variables_of_make_and_of_other_programs_are_no_arguments(make):
    others = ["NAME=x", "PYTHON=python3", "RANKS=1", "CORES=2", "OMP_NUM_THREADS=1"]
    others += ["HF_HOME=/y", "TRITON_CACHE_DIR=/x", "PYTHONPATH=z", "https_proxy=p"]
    arguments = make("train", *others, "CUDA_VISIBLE_DEVICES=0", "NCCL_DEBUG=INFO")
    assert all("?=" in argument for argument in arguments)


@pytest.mark.parametrize(
    "found, words, variables, launched",
    [
        ("1 16", (), {}, ("1", "16")),
        ("4 2", (), {"RANKS": "3"}, ("4", "2")),
        ("", (), {}, ("2", "1")),
        ("Killed", (), {}, ("2", "1")),
        ("1 16", ("RANKS=3",), {}, ("3", "1")),
        ("1 16", ("OMP_NUM_THREADS=5",), {}, ("2", "5")),
        ("1 16", (), {"OMP_NUM_THREADS": "5"}, ("2", "5")),
    ],
)
def test_make_train_takes_the_measured_ranks_and_threads_unless_you_say_them(
    make, tmp_path, monkeypatch, found, words, variables, launched
):
    """Whatever the measurement prints, the run starts."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    programs = tmp_path / ".venv" / "bin"
    (programs / "python").write_text(f"#!/bin/sh\necho '{found}'\n")
    (programs / "torchrun").write_text('#!/bin/sh\necho "$2 $OMP_NUM_THREADS"\n')
    done = make.ends("train", "CORES=2", *words, **variables)
    ranks, threads = launched
    assert done.stdout.splitlines()[-1] == f"--nproc_per_node={ranks} {threads}"
    assert f"torchrun --nproc_per_node={ranks} train_gpt.py" in done.stdout.splitlines()[0]


# torchrun that leaves what a run does, under the RUN_ID that it is told, or the environment's
LAUNCHER = """#!/bin/sh
for word; do case $word in RUN_ID=*) name=${word#*=};; RUN_ID\\?=*) default=${word#*=};; esac; done
folder="$LOGS_DIR/${name:-${RUN_ID:-$default}}"
[ "$CODE" = 2 ] || { mkdir -p "$folder" && touch "$folder/result.json"; }
case "$CODE $*" in 2*|*EVAL_ONLY=*) ;; *) touch "$folder/artifact.bin";; esac
echo "the run's own words"
exit "$CODE"
"""
FAILING = '#!/bin/sh\nfor word; do printf "%s|" "$word"; done\necho\nexit 1\n'


def trained(make, tmp_path, *words: str, code: int = 0, **variables: str) -> tuple[int, list[str]]:
    """(exit code of make train, its lines without the command) where torchrun exits like that."""
    programs = tmp_path / ".venv" / "bin"
    (programs / "torchrun").write_text(LAUNCHER)
    (programs / "python").write_text(FAILING)
    told = {"LOGS_DIR": str(tmp_path / "my logs"), "CODE": str(code), **variables}
    done = make.ends("train", *words, **told)
    return done.returncode, [line for line in done.stdout.splitlines() if "torchrun" not in line]


@pytest.mark.parametrize(
    "words, variables, name, prompt",
    [
        ((), {}, r"\d{8}-\d{6}-\d+", "The"),
        (("RUN_ID=it's mine", "PROMPT=it's a"), {}, "it's mine", "it's a"),
        ((), {"RUN_ID": "theirs", "PROMPT": "$"}, "theirs", "The"),
        (("RUN_ID=old", "RESUME=1"), {}, "old", "The"),
        (("EVAL_ONLY=a.bin",), {}, r"\d{8}-\d{6}-\d+", None),
        (("RESUME=0",), {}, r"\d{8}-\d{6}-\d+", "The"),
    ],
)
def test_make_train_ends_with_a_sentence_and_the_page_of_its_run(
    make, tmp_path, words, variables, name, prompt
):
    """However those programs end; what made no artifact has no words of its own."""
    code, (run, *sentence, page) = trained(make, tmp_path, *words, **variables)
    assert (code, run) == (0, "the run's own words")
    folder = f"{tmp_path}/my logs/{name}"
    assert re.fullmatch(rf"ablate.py\|report\|{folder}\|", page)
    if prompt:
        told, text = sentence
        assert told == "its model writes (make sample PROMPT='...': more):"
        assert re.fullmatch(rf"sample.py\|{folder}\|{prompt}\|--tokens\|40\|", text)
    else:
        assert sentence == []


@pytest.mark.parametrize("code, more", [(2, 0), (1, 3)], ids=["no result", "over a limit"])
def test_a_run_that_is_not_good_has_them_where_it_has_a_result(make, tmp_path, code, more):
    ends, (run, *rest) = trained(make, tmp_path, code=code)
    assert ends and run == "the run's own words" and len(rest) == more


def test_a_name_that_make_gave_is_not_in_the_command_that_it_shows(make):
    assert "RUN_ID" not in make.ends("train").stdout.splitlines()[0]
    assert "RUN_ID=mine" in make.ends("train", "RUN_ID=mine").stdout.splitlines()[0]


def test_what_goes_on_has_no_name_of_makes(make):
    """RESUME=1 without RUN_ID is refused, as by train_gpt.py itself."""
    (message,) = refused({}, make("train", "RESUME=1"))
    assert message == "RESUME=1: of which run? Set its RUN_ID"


def test_make_sample_reads_the_newest_artifact_or_that_of_run(make, tmp_path):
    def words(*given: str, **variables: str) -> list[str]:
        done = make.ends("sample", *given, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\0").split("\0")

    none = make.ends("sample")
    assert none.returncode and "no artifact in logs: make train makes one" in none.stderr
    for age, name in enumerate(("new", "old")):
        path = tmp_path / "logs" / name / "artifact.bin"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert words(PROMPT="$") == ["sample.py", "logs/new/artifact.bin", "The"]
    prompt = 'it\'s "one" word'
    assert words("RUN=logs/old", f"PROMPT={prompt}") == ["sample.py", "logs/old", prompt]
    assert words(LOGS_DIR="elsewhere", RUN="a b") == ["sample.py", "a b", "The"]


@pytest.mark.parametrize("target", ["pages", "test", "knobs", "help", "sample"])
def test_a_setting_that_a_target_does_not_take_is_refused(make, target):
    with pytest.raises(SystemExit, match="SEED: settings are for make train, bench and gpu"):
        make(target, "SEED=7")


def test_no_variable_of_make_empties_the_settings_or_makes_up_another(make):
    for own in ("GIVEN=", "SETTINGS=", "NO_SETTINGS=%"):
        assert "SEED=7" in make("train", own, "SEED=7")
    with pytest.raises(SystemExit, match="foo-bar: no such settings; make knobs lists all"):
        make("train", "foo-bar=1")


def test_a_mistyped_setting_of_make_is_refused(make):
    (message,) = refused({}, make("train", "TYPO=1"))
    assert message.startswith("TYPO=1: no such setting")


def test_the_defaults_of_make_contradict_no_file_and_no_variable(make):
    arguments = make("train", "CHECKPOINT=x/checkpoint.bin", VAL_MAX_TOKENS="5")
    cfg = Config.from_env({"VAL_MAX_TOKENS": "5"}, arguments)
    assert cfg.given == {"CHECKPOINT", "VAL_MAX_TOKENS"}
    assert (cfg.model_dim, cfg.val_max_tokens, cfg.data_path) == (160, 5, "data/demo")


def test_the_reference_architecture_stays_one_word_away(make):
    cfg = Config.from_env({}, make("train", "SIZE=reference"))
    shape = (cfg.num_layers, cfg.model_dim, cfg.train_seq_len, cfg.train_batch_tokens)
    assert shape == (11, 96, 256, 1024) and cfg.max_wallclock_seconds == 90
    assert make("bench", "SIZE=demo") == make("bench", SIZE="an environment's")
    with pytest.raises(SystemExit, match="SIZE=large: choose demo or reference"):
        make("train", "SIZE=large")


def test_the_tokenizer_beside_your_own_data_is_the_default(make, tmp_path):
    place = tmp_path / "my data"
    place.mkdir()
    (place / "tokenizer.model").touch()
    cfg = Config.from_env({}, make("train", f"DATA_PATH={place}"))
    assert (cfg.data_path, cfg.tokenizer_path) == (str(place), f"{place}/tokenizer.model")
    arguments = make("train", DATA_PATH=str(place), TOKENIZER_PATH="other.model")
    env = {"DATA_PATH": str(place), "TOKENIZER_PATH": "other.model"}
    assert Config.from_env(env, arguments).tokenizer_path == "other.model"


# ── Refusals on the screen ────────────────────────────────────────────────────────────────────────
def test_what_is_wrong_is_the_last_thing_that_torchrun_shows():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {name: os.environ[name] for name in INHERITED if name in os.environ}
    done = subprocess.run(
        [*torchrun, str(ROOT / "train_gpt.py"), "NUM_LAYERS=0"],
        env=env | {"SEED": "one", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 1
    assert {line.partition(",")[0] for line in done.stdout.splitlines()} == {"importing torch"}
    *others, border = done.stderr.splitlines()
    assert set(border) == {"="}
    message = [
        f"error: 2 problems [exit 2: {EXIT_CODES[2]}]",
        "SEED=one: must be a whole number in digits 0-9, without spaces",
        "NUM_LAYERS=0: must be 1 or more",
    ]
    assert others[-3] == f"  traceback : {message[0]}"
    assert [line.strip() for line in others[-2:]] == message[1:]
    # by rank 0, which is not ended before it has said it
    assert done.stderr.startswith(f"{message[0]}\n  {message[1]}\n  {message[2]}\n")
    assert done.stderr.count(message[0]) == 2 and "rank      : 0 (local_rank: 0)" in others[-6]


def test_a_rank_that_says_nothing_lets_the_one_that_does_end_first(monkeypatch, tmp_path, capsys):
    path = tmp_path / "error.json"
    waited = []
    monkeypatch.setattr(train_gpt.time, "sleep", lambda s: waited.append((s, path.exists())))
    monkeypatch.setattr(train_gpt.signal, "getsignal", lambda _: train_gpt.signal.SIG_DFL)
    launched = {"LOCAL_RANK": "1", "TORCHELASTIC_ERROR_FILE": str(path)}
    train_gpt.say_once(
        ["SEED=one: must be a whole number in digits 0-9, without spaces"], 2, launched
    )
    assert waited == [(train_gpt.PATIENCE_OF_THE_SILENT, False)] and "SEED=one" in path.read_text()
    # where a signal has a handler it would not end the wait, and without torchrun there is none
    monkeypatch.setattr(train_gpt.signal, "getsignal", lambda _: print)
    train_gpt.say_once(
        ["SEED=one: must be a whole number in digits 0-9, without spaces"], 2, launched
    )
    monkeypatch.undo()
    train_gpt.say_once(
        ["SEED=one: must be a whole number in digits 0-9, without spaces"], 2, {"LOCAL_RANK": "1"}
    )
    assert len(waited) == 1 and capsys.readouterr().err == ""


def test_an_exception_that_nobody_expects_is_told_to_the_launcher_too(monkeypatch, tmp_path):
    def fail(*_):
        raise ZeroDivisionError("unexpected")

    monkeypatch.setattr(train_gpt, "main", fail)
    monkeypatch.setattr(Config, "from_env", fail)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ZeroDivisionError):
        command_line([])
    told = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]
    assert "ZeroDivisionError: unexpected" in told["py_callstack"] and told["timestamp"].isdecimal()


def test_a_result_that_is_not_good_is_told_to_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr(Config, "from_env", lambda *_: None)
    monkeypatch.setattr(train_gpt, "main", lambda *_: {"exit_code": 3})
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert command_line([]) == 3
    assert EXIT_CODES[3] in (tmp_path / "error.json").read_text()


@contextlib.contextmanager
def nobody_reads():
    """stdout and stderr are pipes that nobody reads any more."""
    streams = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            reading, writing = os.pipe()
            os.close(reading)
            streams.append(os.fdopen(writing, "w"))
            patch.setattr(sys, name, streams[-1])
        yield
    # what Python still writes when it ends meets no broken pipe
    for stream in streams:
        stream.close()


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tiny):
    cfg = tiny(iterations=2)
    with nobody_reads():
        assert main(cfg)["exit_code"] == 0
    log = (Path(cfg.logs_dir) / cfg.run_id / "train.log").read_text()
    assert "RESULT val_bpb" in log.splitlines()[-1]


def test_a_refusal_that_nobody_reads_keeps_its_exit_code():
    with nobody_reads():
        assert command_line(["TYPO=1"]) == 2
        assert command_line(["--help"]) == 0


# ── Names and places ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", "a/b", "a//b", "a/", "/", ".", ".."])
def test_a_run_id_cannot_leave_the_folder_of_the_logs(name):
    (message,) = refused({"RUN_ID": name}, [])
    assert message.startswith(f"RUN_ID={name}: a name, not a path")


def test_a_run_id_that_is_taken_is_refused_with_both_remedies(tiny, tmp_path):
    for taken in ("mine", "mine-2"):
        (tmp_path / "logs" / taken).mkdir(parents=True)
    with pytest.raises(Refusal) as refusal:
        Run(tiny(run_id="mine"))
    message = str(refusal.value)
    assert message.startswith(f"RUN_ID=mine: {tmp_path}/logs/mine is there; RESUME=1 ")
    assert message.endswith("RUN_ID=mine-3 is free")
    assert Run(tiny(run_id="mine", resume=True)).dir.name == "mine"
    assert Run(tiny(run_id="mine-3")).dir.name == "mine-3"


def test_two_runs_that_begin_in_the_same_second_get_names_of_their_own(tiny, monkeypatch):
    monkeypatch.setattr(train_gpt.time, "strftime", lambda _: "20260101-000000")
    first, second = Run(tiny(run_id="")), Run(tiny(run_id=""))
    assert second.dir.name == f"{first.dir.name}-2"


@pytest.mark.parametrize("resume", [False, True])
def test_a_refused_launch_leaves_its_name_free(tiny, resume):
    cfg = tiny(vocab_size=512, resume=resume)
    for _ in range(2):
        with pytest.raises(Refusal, match="VOCAB_SIZE=512"):
            main(cfg)
        assert not (Path(cfg.logs_dir) / cfg.run_id).exists()


def stopped_in(monkeypatch, owner, name: str, cfg: Config) -> Path:
    """The folder of a run to which SIGTERM comes in this function."""
    monkeypatch.setattr(
        owner, name, lambda *_: train_gpt.signal.raise_signal(train_gpt.signal.SIGTERM)
    )
    with pytest.raises(Refusal) as refusal:
        main(cfg)
    assert refusal.value.code == 143
    return Path(cfg.logs_dir) / cfg.run_id


BEFORE = ["complete_settings", "check_data", "choose_attention", "build_model", "log_model"]


@pytest.mark.parametrize("name", BEFORE)
def test_a_launch_that_is_stopped_before_it_trains_leaves_its_name_free(tiny, monkeypatch, name):
    assert not stopped_in(monkeypatch, train_gpt, name, tiny()).exists()


@pytest.mark.parametrize("name", ["warm_up", "save"])
def test_a_launch_that_is_stopped_once_it_is_at_work_keeps_its_folder(tiny, monkeypatch, name):
    folder = stopped_in(monkeypatch, train_gpt.Trainer, name, tiny())
    assert (folder / "train.log").exists() and (folder / train_gpt.ALIVE).exists()


def test_a_refusal_in_training_keeps_the_sign_of_life(tiny, monkeypatch):
    """A shard that cannot be read any more, after the first checkpoint."""

    def unreadable(*_):
        raise Refusal("fineweb_train_000000.bin: damaged")

    monkeypatch.setattr(train_gpt.Trainer, "loop", unreadable)
    cfg = tiny()
    with pytest.raises(Refusal, match="damaged"):
        main(cfg)
    folder = Path(cfg.logs_dir) / cfg.run_id
    assert (folder / "checkpoint.bin").exists() and (folder / train_gpt.ALIVE).exists()


def test_a_refused_launch_takes_nothing_of_others_with_it(tiny):
    cfg = tiny(vocab_size=512, resume=True)
    folder = Path(cfg.logs_dir) / cfg.run_id
    folder.mkdir(parents=True)
    (folder / "train.log").write_text("a launch before\n")
    with pytest.raises(Refusal, match="VOCAB_SIZE=512"):
        main(cfg)
    assert (folder / "train.log").read_text().startswith("a launch before\n")


def test_data_in_a_folder_whose_name_is_no_text_are_trained_on(tmp_path):
    """An umlaut of Latin-1, or any where the locale is C and UTF-8 mode is off."""
    place = os.fsdecode(os.fsencode(tmp_path) + b"/d\xe4ta")
    Path(place).mkdir()
    make_data(tmp_path, 384)
    for path in [*tmp_path.glob("*.bin"), tmp_path / "tokenizer.model"]:
        path.rename(f"{place}/{path.name}")
    command = "VOCAB_SIZE=384 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 ITERATIONS=1"
    command += " MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=128"
    command += " EVAL_STRIDE=0 VAL_MAX_TOKENS=500 RUN_ID=r"
    paths = [f"DATA_PATH={place}", f"TOKENIZER_PATH={place}/tokenizer.model"]
    cfg = Config.from_env({}, [*shlex.split(command), *paths, f"LOGS_DIR={tmp_path}"])
    assert cfg.data_path == place and main(cfg)["exit_code"] == 0
    assert re.search(r"settings: DATA_PATH=\S+d\\udce4ta", (tmp_path / "r/train.log").read_text())

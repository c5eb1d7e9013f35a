"""Two hosts: torchrun across a real network link, the link cut while training, a host killed,
and the run resumed.

Would have caught: a rank that waits for a lost one for ever, or until TCP gives up after a quarter
of an hour; store calls whose timeout does not count once the link is silent; torchrun's own agent
hanging on a lost store (--rdzv-backend=c10d); a run that starts again from nothing, or that differs
from an uninterrupted one, after a host has gone.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, ROOT, environment, slowdown, until
from hosts import Hosts, Impossible, Loopback
from launch import free_port

from train_gpt import Config, main

TCP_GIVES_UP = 924  # seconds after which Linux drops a connection whose packets stay unanswered
LONG = dict(
    iterations=100,
    train_log_every=1,
    warmdown_iters=50,
    checkpoint_every=0.05,
    eval_stride=0,
)


def long(tiny) -> Config:
    """A run long enough to be cut, whose ranks wait 6 s for each other,
    or more where the machine is busy.
    """
    return tiny(**LONG, dist_timeout=6 * slowdown())


@pytest.fixture(scope="module")
def hosts():
    """Two hosts that see each other, for all tests here that one worker runs;
    each test starts with the link mended.
    """
    try:
        with Hosts() as pair:
            yield pair
    except Impossible as reason:
        yield str(reason)


@pytest.fixture
def linked(hosts) -> Hosts:
    """Two hosts whose link can be cut."""
    if isinstance(hosts, str):
        pytest.skip(hosts)
    yield hosts
    for host in (0, 1):
        hosts.kill(host)
    hosts.mend()


@pytest.fixture
def either(hosts):
    """Two hosts; on machines that cannot have them, this one twice."""
    if not isinstance(hosts, str):
        yield hosts
        return
    with Loopback() as pair:
        yield pair


class Launch:
    """One torchrun per host, all of one run; what they print goes to a file per host."""

    def __init__(
        self,
        hosts,
        cfg: Config,
        ranks: int = 1,
        only: int | None = None,
        backend: str = "static",
        **variables: str,
    ):
        self.hosts, self.cfg = hosts, cfg
        self.on = (0, 1) if only is None else (only,)
        self.printed = {
            host: Path(cfg.logs_dir).with_name(f"{cfg.run_id}-host{host}.txt") for host in self.on
        }
        variables |= {"GLOO_SOCKET_IFNAME": hosts.interface}
        port = free_port()
        master, self.agents = hosts.address[self.on[0]], {}
        for number, host in enumerate(self.on):
            place = {
                "static": [
                    f"--node_rank={number}",
                    f"--master_addr={master}",
                    f"--master_port={port}",
                ],
                "c10d": [
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={master}:{port}",
                    "--rdzv-id=test",
                    f"--rdzv-conf=is_host={number == 0}",
                    f"--local-addr={hosts.address[host]}",
                ],
            }[backend]
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nnodes={len(self.on)}",
                f"--nproc_per_node={ranks}",
            ]
            with self.printed[host].open("a") as file:
                self.agents[host] = hosts.run(
                    host,
                    [*torchrun, *place, str(ROOT / "train_gpt.py")],
                    environment(cfg) | variables,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

    def text(self, host: int) -> str:
        return self.printed[host].read_text()

    def wait(self, hosts: tuple = ()) -> list[int]:
        """The exit codes of the agents on these (default: all) hosts,
        once they and all their ranks have ended.
        """
        hosts = hosts or self.on

        def ended() -> bool:
            # to look for processes takes a core, so first the agents
            agents = all(self.agents[host].poll() is not None for host in hosts)
            return agents and not any(self.hosts.processes(host) for host in hosts)

        until(ended, lambda: f"{[self.hosts.processes(host) for host in hosts]}\n{self.story()}")
        return [self.agents[host].returncode for host in hosts]

    def end_well(self) -> None:
        """Waits for the end; fails, with all that was printed, unless it is a good one."""
        ends = self.wait()
        if any(ends):
            pytest.fail(f"exit codes {ends}\n{self.story()}")

    def story(self) -> str:
        """What each host has printed."""
        return "\n".join(f"── host {host} ──\n{self.text(host)}" for host in self.on)

    def until(self, happened) -> None:
        """Waits until something has happened in the running run."""

        def happened_at_work() -> bool:
            if happened():
                return True
            if any(agent.poll() is not None for agent in self.agents.values()):
                pytest.fail(f"has ended\n{self.story()}")
            return False

        until(happened_at_work, self.story)


def folder(cfg: Config) -> Path:
    return Path(cfg.logs_dir) / cfg.run_id


def losses(cfg: Config) -> dict[int, float]:
    """Step -> loss, as far as the run has come."""
    path = folder(cfg) / "metrics.jsonl"
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )
    return {e["step"]: e["loss"] for e in map(json.loads, lines) if e["event"] == "step"}


def assert_complete(cfg: Config, ranks: int, alone: Config) -> dict:
    """A run that ended well, with the losses and the score of the uninterrupted one on one rank.

    Returns result.json.
    """
    result, expected = (json.loads((folder(c) / "result.json").read_text()) for c in (cfg, alone))
    assert (result["exit_code"], result["steps"], result["world_size"]) == (
        0,
        cfg.iterations,
        ranks,
    )
    found, wanted = losses(cfg), losses(alone)
    assert list(found) == list(wanted) and list(found.values()) == pytest.approx(
        list(wanted.values()), rel=1e-4
    )
    assert (
        result["val_bpb"] == pytest.approx(expected["val_bpb"], rel=1e-3)
        and (folder(cfg) / "artifact.bin").exists()
    )
    return result


def assert_lost(launch: Launch, host: int, other: int) -> None:
    """The rank on this host has said which one it lost, in which phase, and no more than that.

    Once itself, and once through torchrun, whose last lines it is.
    """
    said = launch.text(host)
    told = f"lost rank {other} in phase 'train'"
    assert said.count(told) == said.count("[exit 6") == 2, said
    assert said.count("exitcode  : 6") == 1 and told in said.rpartition("exitcode  : 6")[2], said
    assert "Exception in thread" not in said and f"RESUME=1 RUN_ID={launch.cfg.run_id}" in said, (
        said
    )


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """uninterrupted(cfg) -> the same run, by one rank in this process;
    trained once for each set of knobs.
    """
    done = {}

    def train(cfg: Config) -> Config:
        if cfg.digest() not in done:
            alone = Config(
                **cfg.knobs() | dict(logs_dir=str(tmp_path_factory.mktemp("alone")), run_id="alone")
            )
            main(alone)
            done[cfg.digest()] = alone
        return done[cfg.digest()]

    return train


def test_two_hosts_train_as_one_rank_does(either, tiny, uninterrupted):
    cfg = tiny(iterations=20, train_log_every=1)
    launch = Launch(either, cfg, ranks=2)
    launch.end_well()
    assert_complete(cfg, 4, uninterrupted(cfg))
    assert launch.text(0).count("RESULT val_bpb") == 1 and "RESULT" not in launch.text(1)


def test_a_link_that_loses_all_packets_ends_both_hosts_in_time_and_the_run_goes_on_once_mended(
    linked, tiny, uninterrupted
):
    assert HANG < TCP_GIVES_UP
    cfg = long(tiny)
    alone = uninterrupted(cfg)
    launch = Launch(linked, cfg, RESUME="1")
    launch.until(lambda: len(losses(cfg)) > 20)
    linked.cut()
    assert launch.wait() == [1, 1]
    assert 20 < len(losses(cfg)) < cfg.iterations and not (folder(cfg) / "result.json").exists()
    for host in (0, 1):
        assert_lost(launch, host, 1 - host)

    linked.mend()
    again = Launch(linked, cfg, backend="c10d", RESUME="1")
    again.end_well()
    (first,) = assert_complete(cfg, 2, alone)["resumed"]
    assert 0 < first < cfg.iterations


@pytest.mark.parametrize("killed, only", [(1, 0), (0, 1)], ids=["the other", "that of rank 0"])
def test_a_killed_host_ends_the_other_in_time_and_the_run_goes_on_with_what_is_left(
    linked, tiny, uninterrupted, killed, only
):
    cfg = long(tiny)
    alone = uninterrupted(cfg)
    launch = Launch(linked, cfg, RESUME="1")
    launch.until(lambda: len(losses(cfg)) > 20)
    linked.kill(killed)
    assert launch.wait((1 - killed,)) == [1]
    assert launch.wait((killed,)) == [-9]
    assert_lost(launch, 1 - killed, killed)
    assert not (folder(cfg) / "result.json").exists()
    again = Launch(linked, cfg, only=only, RESUME="1")
    again.end_well()
    (first,) = assert_complete(cfg, len(again.on), alone)["resumed"]
    assert 0 < first < cfg.iterations

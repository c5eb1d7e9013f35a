"""A Slurm of its own, for as long as a test takes: munged, slurmctld and slurmd of this machine,
with their keys, sockets, ports and files in one folder, on the loopback only.

    python tests/private_slurm.py COMMAND ...

runs a command in one. Its nodes: `here`, with this machine's cores, in the partition `cores`; and
`cards`, which has two GPUs in its description, is never up, and stands in the partition `gpus`.
There is no accounting (slurmdbd), and no cgroup: memory and cores are counted and not enforced.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "setpriv", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
# Where daemons lie is in no user's PATH
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]

# Seconds in which a daemon answers, unless something is wrong
START_SECONDS = 120.0

CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=2
GresTypes=gpu
NodeName=here NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000
NodeName=cards NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=gpu:2 State=DOWN
PartitionName=cores Nodes=here Default=YES
PartitionName=gpus Nodes=cards
"""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class PrivateSlurm:
    """folder: all that it writes. env: what a process needs to use it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self.daemons: list[subprocess.Popen] = []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        facts = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
        text = CONF.format(folder=folder, ports=free_ports(3), cores=os.cpu_count(), **facts)
        (folder / "slurm.conf").write_text(text)

    def call(self, *words: str) -> str:
        """What a command of Slurm prints; it may fail."""
        env = os.environ | self.env
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False).stdout

    def daemon(self, *words: str) -> None:
        """Starts one; its output goes to a file. It ends with us, even where we are killed."""
        with (self.folder / f"{words[0]}.out").open("wb") as output:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", shutil.which(words[0], path=PATH), *words[1:]],
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.daemons.append(daemon)

    def start(self) -> None:
        """Returns when the node takes jobs. RuntimeError, with what was said, when it does not."""
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self.daemon("munged", "--foreground", "--force", *options)
        self.wait((self.folder / "munge.socket").exists)
        self.daemon("slurmctld", "-D", "-i", "-c")
        self.daemon("slurmd", "-D", "-N", "here")
        self.wait(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T"))

    def wait(self, ready) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > end:
                told = [path.read_text()[-2000:] for path in self.folder.glob("*.out")]
                raise RuntimeError("\n".join(["a private Slurm does not start", *told]))
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Those of this Slurm and of its jobs: they have its slurm.conf in their environment."""
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return [number for number in found if number != os.getpid()]

    def stop(self) -> None:
        """Ends all that was started, jobs too: again, while a daemon may have started one more."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        for daemon in self.daemons:
            daemon.wait()


@contextlib.contextmanager
def private_slurm() -> Iterator[PrivateSlurm]:
    """A Slurm that runs, and is gone afterwards whatever happens. Its folder's name is short, for
    that of a socket may have 108 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        slurm = PrivateSlurm(Path(name))
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with private_slurm() as ours:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | ours.env, check=False).returncode)

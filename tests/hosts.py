"""Two hosts on one machine: Linux network namespaces joined by a veth pair, whose link can be cut.

Each host has its own network, process ids and an init, `cat`, that ends with the pipe to the test.
The kernel then ends all that runs there and removes the namespaces and the link: nothing is left
over, even of a test that was killed. The namespaces have no names, so tests can run side by side.
Users other than root get a user namespace around it, where the system allows it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import HANG

ROOT = os.geteuid() == 0
ENV = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
LINK = "link0"  # the interface on both hosts


class Impossible(Exception):
    """This machine or this user cannot have network namespaces; says why."""


class Hosts:
    """Two hosts, 0 and 1, that see each other; `with Hosts() as hosts:`.

    Impossible where the platform does not allow it.
    """

    address = "10.77.0.1", "10.77.0.2"
    interface = LINK

    def __enter__(self) -> "Hosts":
        self.inits = []
        try:
            for host in (0, 1):
                self.inits.append(self.boot(host))
            self.ip(0, f"link add {LINK} type veth peer name {LINK} netns {self.pid(1)}")
            for host in (0, 1):
                self.ip(host, f"address add {self.address[host]}/24 dev {LINK}")
                self.ip(host, "link set lo up")
                self.ip(host, f"link set {LINK} up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for init in self.inits:
            init.stdin.close()
            try:
                init.wait(HANG)
            finally:
                init.kill()

    def boot(self, host: int) -> subprocess.Popen:
        """The namespaces of a host; the user namespace of host 0 holds both."""
        missing = [
            tool
            for tool in ("unshare", "nsenter", "ip")
            if not shutil.which(tool, path=ENV["PATH"])
        ]
        if missing or sys.platform != "linux":
            raise Impossible(
                "network namespaces need Linux, util-linux and iproute2; missing: "
                f"{missing or 'Linux'}"
            )
        outside = (
            []
            if ROOT
            else self.enter(0, "--net")
            if host
            else ["unshare", "--user", "--map-root-user"]
        )
        words = [
            *outside,
            "unshare",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            "echo up; exec cat",
        ]
        init = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV
        )
        if init.stdout.readline() != b"up\n":
            raise Impossible(f"no network namespaces: {init.communicate()[1].decode().strip()}")
        return init

    def pid(self, host: int) -> int:
        """Process id, seen from outside, of a host's init."""
        outer = self.inits[host].pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())

    def enter(self, host: int, *namespaces: str) -> list[str]:
        """The start of a command line that runs on this host."""
        return [
            "nsenter",
            f"--target={self.pid(host)}",
            *([] if ROOT else ["--user", "--preserve-credentials"]),
            *namespaces,
        ]

    def ip(self, host: int, words: str) -> None:
        done = subprocess.run(
            [*self.enter(host, "--net"), "ip", *words.split()],
            env=ENV,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise Impossible(f"ip {words}: {done.stderr.strip()}")

    def run(self, host: int, argv: list[str], env: dict[str, str], **options) -> subprocess.Popen:
        """Starts a program on this host.

        Signals to what this returns do not reach it; see kill.
        """
        return subprocess.Popen(
            [
                shutil.which("nsenter", path=ENV["PATH"]),
                *self.enter(host, "--net", "--pid")[1:],
                *argv,
            ],
            env=env,
            **options,
        )

    def cut(self) -> None:
        """The link stays up, but all packets go to an address that no card has, and vanish.

        Worse than a link that goes down, of which the hosts are told.
        """
        for host in (0, 1):
            other = self.address[1 - host]
            nowhere = "02:00:00:00:00:99"
            self.ip(host, f"neighbour replace {other} lladdr {nowhere} nud permanent dev {LINK}")

    def mend(self) -> None:
        for host in (0, 1):
            self.ip(host, f"neighbour flush dev {LINK} nud permanent")

    def kill(self, host: int) -> None:
        """kill -9 of all that runs on this host but its init, so that it can be used again."""
        subprocess.run(
            [*self.enter(host, "--net", "--pid"), "sh", "-c", "kill -9 -1"],
            env=ENV,
            check=False,
            stderr=subprocess.DEVNULL,
        )

    def processes(self, host: int) -> list[str]:
        """The command lines of what runs on this host, besides its init."""
        init, found = self.pid(host), []
        space = os.readlink(f"/proc/{init}/ns/pid")
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (
                    path / "cmdline"
                ).read_bytes()  # none: it has ended, and waits for its parent
                if words and os.readlink(path / "ns/pid") == space and int(path.name) != init:
                    found.append(words.replace(b"\0", b" ").decode(errors="replace"))
            except OSError:  # it has ended, or is another user's
                pass
        return found


class Loopback:
    """The same for machines without namespaces: both hosts are this one,
    and there is no link to cut.
    """

    address = "127.0.0.1", "127.0.0.1"
    interface = "lo" if sys.platform == "linux" else "lo0"

    def __enter__(self) -> "Loopback":
        self.started = []
        return self

    def __exit__(self, *_) -> None:
        for process in self.started:
            process.terminate()
            process.wait(HANG)

    def run(self, host: int, argv: list[str], env: dict[str, str], **options) -> subprocess.Popen:
        self.started.append(subprocess.Popen(argv, env=env, **options))
        return self.started[-1]

    def processes(self, host: int) -> list[str]:
        return [" ".join(process.args) for process in self.started if process.poll() is None]

"""Hosts made of namespaces: each has its own network, name, processes, /dev/shm and /tmp/ray; the file system is shared, as
over NFS. A bridge in a network namespace of its own joins them, so that nothing of it is seen on the machine and nothing
in it reaches outside: there is no name, subnet or interface that could clash with another run's. All of it is tied to the
life of the process that made it, and goes with it even when that is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

TIED = ["setpriv", "--pdeathsig", "KILL"]  # to the thread that starts it
SPACES = ["--net", "--uts", "--mount", "--pid"]
# The first process of a host: what it mounts, the host alone sees. Then it reaps orphans for ever.
INIT = """
set -e
hostname {name}
mount --bind {names} /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
echo up
sleep infinity &
wait
"""


class Host:
    def __init__(self, name: str, address: str, folder: Path, switch: int):
        self.name, self.address = name, address
        self.folder = folder  # where its commands start; the others see it too
        self.switch = switch  # the process that holds the bridge
        self.parent: subprocess.Popen | None = None

    def boot(self) -> None:
        self.parent = _tied("unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", self._init())
        self.first = int(Path(f"/proc/{self.parent.pid}/task/{self.parent.pid}/children").read_text())
        _ip(self.switch, "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self.first))
        _ip(self.switch, "link", "set", self.name, "master", "bridge", "up")
        _ip(self.first, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip(self.first, "link", "set", link, "up")
        _ip(self.first, "route", "add", "default", "dev", "eth0")

    def start(self, command: str, log: Path, **environment: str) -> subprocess.Popen:
        """Run a line of shell on this host, in a process group of its own."""
        with log.open("a") as output:
            return subprocess.Popen(
                ["nsenter", f"--target={self.first}", *SPACES, "bash", "-c", f"cd {self.folder} && {command}"],
                env=_fresh_environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lose_power(self) -> None:
        """The others hear nothing more of it, not even that a connection has ended."""
        _ip(self.switch, "link", "delete", self.name)
        os.kill(self.first, signal.SIGKILL)
        self.off()

    def off(self) -> None:
        if self.parent is not None:
            self.parent.kill()
            self.parent.wait()

    def _init(self) -> str:
        return INIT.format(name=self.name, names=self.folder / f"{self.name}.hosts")


def _fresh_environment() -> dict[str, str]:
    """What a user's shell would have: nothing of what engines and pools of other tests left in this process."""
    left = ("RAY_", "GLOO_", "NCCL_", "MASTER_", "LOCAL_", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PYTHONPATH": str(ROOT), "PATH": path}


def lacking() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    probe = [*TIED, "unshare", *SPACES, "--fork", "ip", "link", "add", "type", "bridge"]
    try:
        subprocess.run(probe, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"needs {error.filename}, of util-linux"
    except subprocess.CalledProcessError as error:
        return f"needs root, util-linux and iproute2: {error.stderr.strip()}"
    return None


@contextmanager
def network(num_hosts: int, folder: Path) -> Iterator[Sequence[Host]]:
    """node1, node2, ... that know each other by name and start their commands in `folder`, until the context closes."""
    addresses = {f"node{i}": f"10.0.0.{i}" for i in range(1, num_hosts + 1)}
    for name in addresses:
        # As Debian's installer writes it: a host's own name is an address of loopback, where no other host can follow.
        others = [f"{address} {other}" for other, address in addresses.items() if other != name]
        (folder / f"{name}.hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others, ""]))
    switch = _tied("unshare", "--net", "bash", "-c", "echo up; exec sleep infinity")
    hosts = [Host(name, address, folder, switch.pid) for name, address in addresses.items()]
    try:
        _ip(switch.pid, "link", "add", "bridge", "type", "bridge")
        _ip(switch.pid, "link", "set", "bridge", "up")
        for host in hosts:
            host.boot()
        yield hosts
    finally:
        for host in hosts:
            host.off()
        switch.kill()
        switch.wait()


def _tied(*command: str) -> subprocess.Popen:
    """Start what ends with this process, and wait until it says that it is up."""
    process = subprocess.Popen([*TIED, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n", f"it did not start: {command}"
    return process


def _ip(pid: int, *arguments: str) -> None:
    """Configure the network of a process."""
    subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", *arguments], check=True)

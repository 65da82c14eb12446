"""A real Slurm on hosts made of namespaces: node1, node2, ... compute, the last host is where its controller runs and where
users log in. Ports, names and addresses are the network's own, so that any number of them live side by side."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.network import Host, network

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
CPUS = 4  # more than there are: jobs of these tests mostly wait
CONF = """
ClusterName=lab
SlurmctldHost={login}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=5
MessageTimeout=10
TCPTimeout=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
UP_S = 60


def slurm_lacking() -> str | None:
    """Why there is no Slurm here; None where it is installed."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(missing)}: apt-get install slurmctld slurmd munge slurm-client" if missing else None


@dataclass
class Slurm:
    nodes: list[Host]
    login: Host
    folder: Path  # of the cluster's own files
    processes: list[subprocess.Popen]

    def run(self, command: str, exit_code: int = 0, **environment: str) -> str:
        """What a line of shell prints on the login host."""
        log = self.folder / "commands" / f"{time.monotonic_ns()}.log"
        log.parent.mkdir(exist_ok=True)
        process = self.login.start(command, log, SLURM_CONF=str(self.folder / "slurm.conf"), **environment)
        code = process.wait(300)
        assert code == exit_code, f"{command}: exit code {code}\n{log.read_text()}\n{self.logs()}"
        return log.read_text()

    def logs(self) -> str:
        return "\n".join(f"== {f}\n{f.read_text()[-1500:]}" for f in sorted(self.folder.glob("*.log")))

    def serve(self, host: Host) -> None:
        """Start a node's slurmd."""
        config = f"-f {self.folder / 'slurm.conf'}"
        self.processes.append(host.start(f"exec slurmd -D -N {host.name} {config}", self.folder / f"{host.name}.out"))

    def processes_on(self, host: Host, word: str) -> list[str]:
        """Command lines that hold `word` on a node."""
        listed = subprocess.run(
            ["nsenter", f"--target={host.first}", "--pid", "--mount", "ps", "-ww", "-eo", "args"],
            capture_output=True,
            text=True,
        )
        return [line for line in listed.stdout.splitlines() if word in line and "ps -ww" not in line]


@contextmanager
def slurm(num_nodes: int, folder: Path) -> Iterator[Slurm]:
    """Raises: AssertionError when it does not come up."""
    own = folder / "slurm"
    for name in ("munge", "state", "spool"):
        (own / name).mkdir(parents=True)
    with network(num_nodes + 1, folder) as (*nodes, login):
        lines = [f"NodeName={n.name} NodeAddr={n.address} CPUs={CPUS} RealMemory=4000 State=UNKNOWN" for n in nodes]
        config = CONF.format(folder=own, login=f"{login.name}({login.address})", nodes="\n".join(lines))
        (own / "slurm.conf").write_text(config)
        (own / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = own / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for node in nodes:
            (own / "spool" / node.name).mkdir()
        cluster = Slurm(nodes, login, own, [])
        try:
            paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            options = " ".join(f"--{name}={own}/munge/{file}" for name, file in paths.items())
            cluster.processes.append(login.start(f"exec munged -F --force {options}", own / "munged.out"))
            _wait_until((own / "munge" / "socket").exists, cluster)
            cluster.processes.append(login.start(f"exec slurmctld -D -f {own}/slurm.conf", own / "slurmctld.out"))
            for node in nodes:
                cluster.serve(node)
            _wait_until(lambda: _num_idle(cluster) == num_nodes, cluster)
            yield cluster
        finally:
            for process in reversed(cluster.processes):
                process.terminate()
                process.wait()


def _num_idle(cluster: Slurm) -> int:
    try:
        return cluster.run("sinfo -h -N -o %T").split().count("idle")
    except AssertionError:  # the controller does not answer yet
        return 0


def _wait_until(condition, cluster: Slurm) -> None:
    deadline = time.monotonic() + UP_S
    while not condition():
        assert time.monotonic() < deadline, f"Slurm did not come up\n{cluster.logs()}"
        time.sleep(0.1)

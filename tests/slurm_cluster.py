"""A SLURM cluster of two nodes on this machine: Debian's daemons with ports and files of their own. Needs root."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packages import installed

SECONDS_TO_START = 60

CONFIGURATION = """
ClusterName=crossguard
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
MessageTimeout=60
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's programs speak to the cluster.

    Raises:
        RuntimeError: this machine cannot have it; says why.
    """
    if os.geteuid() != 0:
        raise RuntimeError("SLURM's daemons need root")
    installed({"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"})
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)))
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    own = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}"
        for name in ("key-file", "pid-file", "log-file", "seed-file")
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for line in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *own],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            daemons.append(_start(line, environment))
            if line[0] == "munged":
                _wait(lambda: (folder / "munge.sock").exists(), folder)
        _wait(lambda: _idle_nodes(environment) == 2, folder)
        yield environment
    finally:
        if len(daemons) == 4:
            subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _start(line: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    program = [str(shutil.which(line[0])), *line[1:]]
    return subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _idle_nodes(environment: dict[str, str]) -> int:
    line = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
    return (
        subprocess.run(line, env=environment, capture_output=True, text=True, check=False).stdout.split().count("idle")
    )


def _wait(condition, folder: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        if time.monotonic() > deadline:
            said = [line for log in sorted(folder.glob("*.log")) for line in log.read_text().splitlines()[-2:]]
            raise RuntimeError(f"SLURM did not start: {' / '.join(said)}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()

"""Ranks under torchrun's elastic agent: this process starts the agent of its own node.

On several nodes the same command is started on each; they meet at `launcher.torchrun.endpoint`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from crossguard.configs.errors import JobError
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.environment import environment_of
from crossguard.launchers.supervised import run

# The environment variable that names the file for torch's own messages; without it they go to the terminal.
AGENT_LOG = "CROSSGUARD_AGENT_LOG"


def launch(arguments: list[str], num_procs: int, config: LauncherConfig, run_dir: Path) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on the ranks of this node and wait for the end.

    Restarts are the agent's: it starts the ranks again together with those of the other nodes.

    Raises:
        JobError: a rank failed, or was lost once too often.
        UserError, Preempted: see `supervised.run`.
    """
    log = run_dir / "logs" / f"agent-{socket.gethostname()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | environment_of(config, num_procs) | {AGENT_LOG: str(log)}
    if lost := run(command(arguments, num_procs, config), config, ask=_ask, environment=environment):
        raise JobError(f"{lost}; see logs/ in the run directory; start again, or set launcher.max_restarts")


def command(arguments: list[str], num_procs: int, config: LauncherConfig) -> list[str]:
    """The command line of this node's agent."""
    return [
        *(sys.executable, "-m", "crossguard.launchers.agent"),
        *(f"--nproc-per-node={num_procs}", f"--max-restarts={config.max_restarts}"),
        *(
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            f"--shutdown-timeout={config.grace_seconds:.0f}",
        ),
        *_rendezvous(config, arguments[0]),
        *("-m", "crossguard.train", *arguments),
    ]


def _rendezvous(config: LauncherConfig, stage: str) -> list[str]:
    """Where and as what the nodes meet."""
    torchrun = config.torchrun
    if config.nodes == 1:
        return ["--standalone"]
    where = [f"--local-addr={torchrun.local_addr}"] if torchrun.local_addr else []
    if torchrun.rdzv_conf:
        where.append("--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in torchrun.rdzv_conf.items()))
    if torchrun.node_rank is not None:
        address, _, port = str(torchrun.endpoint).rpartition(":")
        where += [f"--node-rank={torchrun.node_rank}", f"--master-addr={address}", f"--master-port={port}"]
        return [f"--nnodes={config.nodes}", "--rdzv-backend=static", *where]
    nodes = f"{torchrun.min_nodes}:{config.nodes}" if torchrun.min_nodes else f"{config.nodes}"
    # The stages of a job follow each other at one endpoint: a node that comes early must not join the one before.
    name = f"{torchrun.id}-{stage.removeprefix('stage=')}"
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={torchrun.endpoint}",
        f"--rdzv-id={name}",
        *where,
    ]


def _ask(agent: subprocess.Popen[bytes]) -> None:
    """The agent passes it on to its ranks and waits for them."""
    agent.send_signal(signal.SIGTERM)

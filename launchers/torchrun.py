"""Ranks under torchrun's elastic agent: this process starts the agent of its own node.

On several nodes the same command is started on each; they meet at `launcher.torchrun.endpoint`. What only one of them
should do is in `one_node`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.environment import environment_of
from crossguard.launchers.supervised import Child, run

# The environment variable that names the file for torch's own messages; without it they go to the terminal.
AGENT_LOG = "CROSSGUARD_AGENT_LOG"
# Agents that end one after the other would otherwise tell of lost connections, with stacks, as warnings.
CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"

# How long a node waits for the endpoint's, as torchrun waits for nodes that are missing.
SECONDS_TO_MEET = 600


def launch(arguments: list[str], num_procs: int, config: LauncherConfig, run_dir: Path) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on the ranks of this node and wait for the end.

    Restarts are the agent's: it starts the ranks again together with those of the other nodes.

    Raises:
        JobError: a rank failed, or was lost once too often.
        UserError, Preempted: see `supervised.run`.
    """
    check_port(config)
    log = run_dir / "logs" / f"agent-{socket.gethostname()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    quiet = {AGENT_LOG: str(log), CPP_LOG_LEVEL: "ERROR"}
    environment = os.environ | environment_of(config, num_procs) | quiet
    agent = Child(command(arguments, num_procs, config), ask=_ask, environment=environment)
    if lost := run(agent, config.grace_seconds):
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
        *_rendezvous(config, arguments),
        *("-m", "crossguard.train", *arguments),
    ]


def _rendezvous(config: LauncherConfig, arguments: list[str]) -> list[str]:
    """Where and as what the nodes meet."""
    torchrun = config.torchrun
    if config.nodes == 1:
        return ["--standalone"]
    where = [f"--local-addr={torchrun.local_addr}"] if torchrun.local_addr else []
    settings = dict(torchrun.rdzv_conf)
    if torchrun.node_rank is None:
        # torch asks the host name alone, which need not lead to the address that the endpoint names; and it gives up
        # after a minute where the endpoint's node comes later than that.
        settings = {"is_host": int(endpoint_is_here(config)), "read_timeout": SECONDS_TO_MEET} | settings
    if settings:
        where.append("--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in settings.items()))
    if torchrun.node_rank is not None:
        address, port = endpoint_of(config)
        where += [f"--node-rank={torchrun.node_rank}", f"--master-addr={address}", f"--master-port={port}"]
        return [f"--nnodes={config.nodes}", "--rdzv-backend=static", *where]
    nodes = f"{torchrun.min_nodes}:{config.nodes}" if torchrun.min_nodes else f"{config.nodes}"
    # Stages and ablations follow each other at one endpoint: a node that comes early must not join the one before.
    stage, *places = [word.partition("=")[2] for word in arguments if word.startswith(("stage=", "run_dir="))]
    name = "-".join([torchrun.id, stage, *(Path(place).name for place in places[-1:])])
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={torchrun.endpoint}",
        f"--rdzv-id={name}",
        *where,
    ]


def check_port(config: LauncherConfig) -> None:
    """
    Raises:
        UserError: the nodes would meet at this one, and another program has the port.
    """
    if config.nodes > 1 and endpoint_is_here(config):
        try:
            listen(endpoint_of(config)[1]).close()
        except OSError:
            raise port_in_use(config) from None


def port_in_use(config: LauncherConfig) -> UserError:
    """Another program has the port where the nodes meet."""
    return UserError(
        f"launcher.torchrun.endpoint={config.torchrun.endpoint}: another program listens on port "
        f"{endpoint_of(config)[1]} of this node; end it or choose another port, the same on all nodes"
    )


def endpoint_of(config: LauncherConfig) -> tuple[str, int]:
    """Host and port where the nodes meet."""
    host, _, port = str(config.torchrun.endpoint).rpartition(":")
    return host.strip("[]"), int(port)


def endpoint_is_here(config: LauncherConfig) -> bool:
    """Whether the endpoint names this machine, by its own name or by one of its addresses."""
    host, own = endpoint_of(config)[0], socket.gethostname()
    # In a pod that has just started the name of the endpoint leads nowhere yet, even if it is its own.
    return host == own or host.startswith(f"{own}.") or _is_own_address(host)


def listen(port: int) -> socket.socket:
    """Listen on a port at all addresses, as torchrun's store does; OSError where another program does."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _is_own_address(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as listener, contextlib.suppress(OSError):
            listener.bind(address)
            return True
    return False


def _ask(agent: subprocess.Popen[str]) -> None:
    """The agent passes it on to its ranks and waits for them."""
    agent.send_signal(signal.SIGTERM)

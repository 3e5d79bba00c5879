"""Ranks under DeepSpeed's launcher: on this machine, or over ssh (pdsh) on the hosts of a hostfile.

What the ranks need of this environment goes through a file in the run directory that only the user may read and that
the ranks are told of (`environment=FILE`): DeepSpeed itself would write it on command lines, for everyone to see.

The launcher answers SIGTERM by ending the ranks after at most 30 seconds and does not wait for them, so that this one
asks the ranks itself, by SIGUSR1; their status comes back as that of `deepspeed`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.environment import environment_file, environment_of, matching
from crossguard.launchers.hostfile import Slots, chosen, read_hostfile
from crossguard.launchers.launcher_output import LauncherOutput
from crossguard.launchers.programs import need
from crossguard.launchers.supervised import Child, restarting, run

SECONDS_TO_REACH_HOSTS = 30.0
# Lines of DeepSpeed and of pdsh, and that where a host has ended.
OWN = r"\[\d{4}-\d\d-\d\d \S+ \[[A-Z]+\]|pdsh@\S+: "
ENDED = r"pdsh@\S+: \S+: ssh exited with exit code (\d+)"


def hosts_of(config: LauncherConfig) -> Slots:
    """Host -> the slots to use on it; empty without a hostfile.

    Raises:
        UserError: the hostfile is wrong, or include and exclude do not fit it.
    """
    settings = config.deepspeed
    if settings.hostfile is None:
        if settings.include or settings.exclude:
            raise UserError("launcher.deepspeed.include, exclude: choose from a hostfile; give one")
        return {}
    return chosen(read_hostfile(Path(settings.hostfile)), settings.include, settings.exclude, settings.hostfile)


def launch(arguments: list[str], num_procs: int, config: LauncherConfig, run_dir: Path) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on the ranks of all hosts and wait for the end.

    Raises:
        UserError: the hostfile is wrong, a program is missing, or a host; a rank ended with exit status 2.
        Preempted, JobError: see `supervised.run`.
    """
    hosts = hosts_of(config)
    need("pkill", "launcher=deepspeed asks its ranks to stop through it (apt install procps)")
    if hosts:
        need("pdsh", "launcher=deepspeed reaches the hosts through it (apt install pdsh)")
        _check_hosts(hosts, config)
    per_host = max(map(len, hosts.values())) if hosts else num_procs
    with environment_file(run_dir, exported(config, per_host)) as file:
        token = f"environment={file}"

        def send(sent: signal.Signals) -> None:
            line = _to_ranks(sent, token, hosts)
            with contextlib.suppress(subprocess.TimeoutExpired):  # A host is gone; the others have heard it.
                subprocess.run(line, env=_for_pdsh(config), stdout=subprocess.DEVNULL, timeout=SECONDS_TO_REACH_HOSTS)

        def start(arguments: list[str], _: int) -> str:
            with LauncherOutput(run_dir / "logs" / "deepspeed.log", OWN, ENDED, config.grace_seconds) as output:
                deepspeed = Child(
                    command([*arguments, token], num_procs, config),
                    ask=lambda _: send(signal.SIGUSR1),
                    ask_again=True,  # Ranks that are not there yet do not hear it.
                    kill=lambda: send(signal.SIGKILL),
                    at_death=signal.SIGTERM,  # At this it ends the ranks on all hosts.
                    output=output,
                )
                return run(deepspeed, config.grace_seconds)

        restarting(start, arguments, config)


def command(arguments: list[str], num_procs: int, config: LauncherConfig) -> list[str]:
    """The command line of DeepSpeed's launcher."""
    settings = config.deepspeed
    where = [f"--master_port={settings.master_port}"]
    if settings.hostfile is None:
        where.append(f"--num_gpus={num_procs}")
    else:
        where = [f"--hostfile={settings.hostfile}", "--launcher=pdsh", "--launcher_args=-N", "--force_multi", *where]
        where += [f"--{name}={value}" for name in ("include", "exclude") if (value := getattr(settings, name))]
        where += [f"--{name}={value}" for name in ("master_addr", "ssh_port") if (value := getattr(settings, name))]
    if settings.hostfile is not None:
        arguments = [_for_remote_shell(argument) for argument in arguments]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank", *where),
        *("--module", "crossguard.train", *arguments),
    ]


def _for_remote_shell(argument: str) -> str:
    """As the shell of a host has to see it; DeepSpeed puts what holds a blank into double quotes, and nothing else."""
    quoted = re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)
    return quoted.replace("%", "%%")  # pdsh puts the host in for %h.


def exported(config: LauncherConfig, num_procs: int) -> dict[str, str]:
    """The environment variables that the ranks get."""
    return matching(config.deepspeed.export) | environment_of(config, num_procs)


def _to_ranks(sent: signal.Signals, token: str, hosts: Slots) -> list[str]:
    """The command that sends a signal to the ranks of this job, on all hosts.

    The command lines of `deepspeed` and of what it starts on the hosts hold the same words in another order.
    """
    line = ["pkill", f"-{sent.name}", "-f", f"^[^ ]+ -u -m crossguard\\.train .*{token}"]
    return ["pdsh", "-w", ",".join(hosts), shlex.join(line)] if hosts else line


def _check_hosts(hosts: Slots, config: LauncherConfig) -> None:
    """
    Raises:
        UserError: a host does not let this one in without a password, or lacks Python or the working directory.
    """
    line = ["pdsh", "-w", ",".join(hosts), shlex.join(["ls", "-d", sys.executable, os.getcwd()])]
    options = _for_pdsh(config, "-oBatchMode=yes", f"-oConnectTimeout={SECONDS_TO_REACH_HOSTS / 2:.0f}")
    place = f"{config.deepspeed.hostfile}: host"
    try:
        done = subprocess.run(line, env=options, capture_output=True, text=True, timeout=SECONDS_TO_REACH_HOSTS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{place}s: do not all answer over ssh within {SECONDS_TO_REACH_HOSTS:.0f} s") from None
    failed = re.search(r"^pdsh@\S+: (\S+): ssh exited with exit code \d+$", done.stderr, re.MULTILINE)
    if failed:
        said = re.search(rf"^{re.escape(failed[1])}: (.+)$", done.stderr, re.MULTILINE)
        raise UserError(f"{place} '{failed[1]}': {said[1] if said else 'cannot be reached over ssh'}")


def _for_pdsh(config: LauncherConfig, *options: str) -> dict[str, str]:
    port = config.deepspeed.ssh_port
    own = [os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *options, *([f"-p {port}"] if port else [])]
    return os.environ | {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(own).strip()}

"""Two hosts on one machine: network namespaces joined by a cable, with an ssh server in each. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packages import installed

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SSH_PORT = 2222


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    interface: str

    def start(self, line: list[str], said: Path, **more: object) -> subprocess.Popen[bytes]:
        """Start a program on it; what it says goes to the file."""
        inside = ["ip", "netns", "exec", self.name, "env", f"GLOO_SOCKET_IFNAME={self.interface}", *line]
        with said.open("wb") as opened:
            return subprocess.Popen(inside, stdout=opened, stderr=opened, **more)  # type: ignore[call-overload]


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """The hosts, reachable for each other and for nobody else.

    Raises:
        RuntimeError: this machine cannot have them; says why.
    """
    if os.geteuid() != 0:
        raise RuntimeError("network namespaces need root")
    installed({"ip": "iproute2"})
    mine = os.getpid()
    hosts = [Host(f"cg{mine}-{n}", address, "cg0") for n, address in enumerate(ADDRESSES)]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = hosts
        peer = ("peer", "name", second.interface, "netns", second.name)
        _ip("link", "add", first.interface, "netns", first.name, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            # What a failed test has left running there.
            left = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False)
            for process in left.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


@contextmanager
def ssh_between(hosts: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """An ssh server on each host; yields the environment in which `ssh` and `pdsh` reach them without a password.

    Raises:
        RuntimeError: the programs are neither here nor to be had.
    """
    installed({"sshd": "openssh-server", "pdsh": "pdsh", "pkill": "procps"})
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "StrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nUsePAM no\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    # ssh finds the user's own configuration by the password file, whatever $HOME says.
    program = folder / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    program.chmod(0o755)
    server = [str(shutil.which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")]
    servers = [host.start(server, folder / f"sshd-{host.name}.log") for host in hosts]
    try:
        yield os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    finally:
        for running in servers:
            running.terminate()
            running.wait()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")

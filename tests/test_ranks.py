"""Ranks that cannot come together say so in one line."""

from __future__ import annotations

import socket

import pytest
import torch

from crossguard.configs.errors import JobError, UserError
from crossguard.train import code_version
from crossguard.train.code_version import check_same_code
from crossguard.train.ranks import Ranks, _store


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(JobError, match=f"port {port}: in use by another program"):
            _store()


class Pair(Ranks):
    """Rank 0, and what it hears of rank 1."""

    other: tuple[str, str]

    def gather(self, value):  # type: ignore[no-untyped-def]
        return [value, self.other]


def test_ranks_with_other_code_name_a_machine_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(0, 0, 2, torch.device("cpu"))
    object.__setattr__(pair, "other", ("other", code_version.code_version()))
    check_same_code(pair)
    object.__setattr__(pair, "other", ("other", "crossguard 0.0.9 (ffff)"))
    with pytest.raises(UserError) as error:
        check_same_code(pair)
    assert f"{socket.gethostname()} has crossguard {code_version.version('crossguard')} (" in str(error.value)
    assert "other has crossguard 0.0.9 (ffff); install the same on all machines" in str(error.value)

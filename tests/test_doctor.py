"""`crossguard doctor`: one line for each check, with what to do where something is missing."""

from __future__ import annotations

import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from rank_jobs import run_crossguard

from crossguard.configs.errors import JobError
from crossguard.recipes import doctor
from crossguard.recipes.doctor import CHECKS, GIB, examine


def test_every_check_says_something_of_this_machine(tmp_path: Path) -> None:
    lines = run_crossguard(["doctor"], tmp_path).stdout.splitlines()
    assert [line[6 : 6 + len(name)] for line, name in zip(lines, CHECKS, strict=True)] == list(CHECKS)
    assert {line[:4] for line in lines} <= {"ok  ", "note"}
    assert f"deepspeed {metadata.version('deepspeed')}" in lines[1]


def examined(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, fatal: bool = False
) -> str:
    """The line of one check."""
    monkeypatch.setattr(doctor, "CHECKS", {name: CHECKS[name]})
    if fatal:
        with pytest.raises(JobError, match=f"mend first: {name}"):
            examine(Path("/"))
    else:
        examine(Path("/"))
    return capsys.readouterr().out


def test_a_compiler_that_is_missing_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "note  compiler       no C++ compiler; " in examined("compiler", monkeypatch, capsys)
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    assert f"note  compiler       {tmp_path / 'c++'}; no ninja" in examined("compiler", monkeypatch, capsys)


def test_packages_outside_of_their_range_are_fatal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = metadata.version

    def other(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "deepspeed" else version(name)

    monkeypatch.setattr(metadata, "version", other)
    line = examined("versions", monkeypatch, capsys, fatal=True)
    assert line.startswith("FAIL  versions ")
    assert "torch is missing" in line
    assert "deepspeed 0.0.1 is not " in line
    assert line.endswith("; run `make setup`\n")


def test_a_package_that_cannot_be_imported_is_fatal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert examined("accelerator", monkeypatch, capsys, fatal=True).startswith("FAIL  accelerator ")


def test_little_room_is_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(9 * GIB, 9 * GIB, GIB // 2))
    assert "note  disk           0 GiB free here; less than 5 GiB: " in examined("disk", monkeypatch, capsys)
    assert "less than 1 GiB: " in examined("shared memory", monkeypatch, capsys)


def test_a_key_of_wandb_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "no API key" in examined("tracking", monkeypatch, capsys)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    line = examined("tracking", monkeypatch, capsys)
    assert "an API key is set" in line
    assert "secret" not in line

"""What tests of `crossguard launch` start from: a job in the working directory, and a secret in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_training import write_job

from crossguard.recipes.launching import launch

SECRET = "sk-1234567890"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a job in the working directory, which is a volume's mount path as well; a secret is in the environment."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return ["recipe=tiny.yaml", f"data.path={tmp_path}/posts.jsonl", f"run_dir={tmp_path}/runs/My_job"]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `crossguard launch --dry-run` prints; never a secret."""
    launch(["--dry-run", *argv])
    text = capsys.readouterr().out
    assert SECRET not in text
    return text

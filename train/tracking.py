"""Experiment tracking with Weights & Biases, beside metrics.jsonl. Whatever happens to it, training goes on."""

from __future__ import annotations

import functools
import io
import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from crossguard.configs.saved import as_plain
from crossguard.configs.schema import Config
from crossguard.train import preemption

logger = logging.getLogger(__name__)
# What a rank has left to do when it was asked to stop and the tracker is closed.
SECONDS_TO_END = 5.0
INIT_SECONDS = 30.0
CLOSE_SECONDS = 120.0
# Column -> value.
Row = dict[str, str | float | None]


class Tracker(Protocol):
    """What training tells about itself."""

    @property
    def run_id(self) -> str | None:
        """Names the run over all its resumes; kept in the checkpoint."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Something that somebody should look at."""
        ...

    def report(self, tables: Mapping[str, Sequence[Row]], pictures: Mapping[str, Mapping[str, bytes]]) -> None:
        """What an evaluation found: tables of rows with the same columns, and PNG files by section and title."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """The job ends, well or not."""
        ...


class NullTracker:
    """tracker=none, and every rank but the first. Keeps the id of a run that was tracked before."""

    def __init__(self, run_id: str | None = None):
        self.run_id = run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def alert(self, title: str, text: str) -> None:
        """Nothing."""

    def report(self, tables: Mapping[str, Sequence[Row]], pictures: Mapping[str, Mapping[str, bytes]]) -> None:
        """Nothing."""

    def close(self, *, failed: bool = False) -> None:
        """Nothing was opened."""


class WandbTracker:
    """One W&B run for a job: the id of the first start is used by every resume. After an error it stays silent."""

    def __init__(self, config: Config, run_id: str | None):
        self.run_id = run_id or secrets.token_hex(8)
        self._grace_seconds = config.launcher.grace_seconds
        self._run: Any = None
        mode = mode_of(config.tracker.mode)
        self._try(lambda: self._start(config, mode), otherwise="offline" if mode == "online" else "without")
        if self._run is None and mode == "online":
            self._try(lambda: self._start(config, "offline"))

    def _start(self, config: Config, mode: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracker.project,
            entity=config.tracker.entity,
            tags=list(config.tracker.tags),
            name=config.recipe,
            id=self.run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=config.run_dir,
            config=as_plain(config),
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step; W&B drops a step that it has already, so that a resume shows none twice."""
        if self._run is not None:
            self._try(lambda: self._run.log(dict(metrics), step=step))

    def alert(self, title: str, text: str) -> None:
        """W&B sends it by mail or to Slack, as its user has chosen; offline, once the run is synchronised."""
        if self._run is not None:
            self._try(lambda: self._run.alert(title=title, text=text, level="WARN"))

    def report(self, tables: Mapping[str, Sequence[Row]], pictures: Mapping[str, Mapping[str, bytes]]) -> None:
        """Under `report/`, each section's pictures as one list; a later evaluation shows beside the earlier ones."""
        if self._run is not None:
            self._try(lambda: self._run.log(_media(tables, pictures)))

    def close(self, *, failed: bool = False) -> None:
        """Hand over what is left, for a while: an unreachable server must not keep a finished job alive, nor have one
        that was asked to make room killed."""
        if self._run is None:
            return
        finish = functools.partial(self._run.finish, exit_code=int(failed))
        finishing = threading.Thread(target=self._try, args=(finish,), daemon=True)
        finishing.start()
        seconds = min(CLOSE_SECONDS, preemption.seconds_left(self._grace_seconds) - SECONDS_TO_END)
        finishing.join(max(seconds, 0.0))
        if finishing.is_alive():
            logger.warning("W&B has not finished after %d s; `wandb sync` sends what is left", seconds)

    def _try(self, action: Callable[[], Any], otherwise: str = "without") -> None:
        try:
            action()
        except Exception as error:  # Whatever the tracker raises is no reason to stop training.
            self._run = None
            logger.exception("tracker failed")
            print(f"crossguard: W&B failed ({type(error).__name__}), going on {otherwise}; see logs/", file=sys.stderr)


def _media(tables: Mapping[str, Sequence[Row]], pictures: Mapping[str, Mapping[str, bytes]]) -> dict[str, Any]:
    import wandb
    from PIL import Image

    media: dict[str, Any] = {
        f"report/{name}": wandb.Table(
            columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True
        )
        for name, rows in tables.items()
    }
    for section, drawn in pictures.items():
        media[f"report/{section} plots"] = [
            wandb.Image(Image.open(io.BytesIO(png)), caption=title) for title, png in drawn.items()
        ]
    return media


def mode_of(mode: str) -> str:
    """auto is online where there is an API key, in the environment or in the netrc file, and offline elsewhere."""
    if mode != "auto":
        return mode
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    return "online" if has_key else "offline"


def open_tracker(config: Config, run_id: str | None, *, first: bool) -> Tracker:
    """The configured tracker on rank 0, none on the others."""
    if config.tracker.name == "none" or not first:
        return NullTracker(run_id)
    return WandbTracker(config, run_id)

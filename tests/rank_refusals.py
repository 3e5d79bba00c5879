"""Run on ranks by test_refusals.py: the train stage for several jobs; each rank writes how each of them ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from crossguard.configs.compose import compose
from crossguard.configs.errors import CrossguardError
from crossguard.configs.parent_death import die_with_parent
from crossguard.train.ranks import Ranks, end_process, init_ranks
from crossguard.train.training import run_training


def outcome(job: list[str], ranks: Ranks) -> str:
    """ "done", or the error."""
    try:
        run_training(compose(job), ranks)
    except CrossguardError as error:
        return str(error)
    return "done"


def main(folder: Path, jobs: list[list[str]]) -> None:
    """Train each job."""
    die_with_parent()
    ranks = init_ranks()
    outcomes = [outcome(job, ranks) for job in jobs]
    (folder / f"outcomes-{ranks.rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    end_process(0)

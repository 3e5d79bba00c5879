"""Run by test_checkpoint_saving.py: two ranks of which one cannot save, or one process that saves without pause."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from pathlib import Path

from rank_checkpoint import counts, new_engine

from crossguard.configs.errors import JobError
from crossguard.configs.parent_death import die_with_parent
from crossguard.train.checkpoint import newest_valid
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.ranks import Ranks, end_process, init_ranks


def refused(ranks: Ranks, run_dir: Path, in_background: bool) -> str:
    """What this rank is told when rank 1 may write no more, after a save that went well."""
    engine = new_engine(ranks, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with CheckpointSaver(run_dir, engine, keep_last=3, in_background=in_background) as saver:
            saver.save(counts(1), {})
            saver.finish()
            if ranks.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
            saver.save(counts(2), {})
    except JobError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        engine.close()
    return "nothing"


def main(folder: Path) -> None:
    """Write what each rank was told."""
    die_with_parent()
    ranks = init_ranks()
    found = {way: refused(ranks, folder / way, way == "background") for way in ("front", "background")}
    engine = new_engine(ranks, 2)
    with CheckpointSaver(folder / "shared", engine, keep_last=3, in_background=True) as saver:
        saver.save(counts(1), {})
        saver.save(counts(2), {})
    if ranks.is_first:  # The file of the other rank.
        file = folder / "shared" / "checkpoints" / "step-00000002" / "fragments-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 128
        file.write_bytes(content)
    ranks.gather(None)
    chosen = newest_valid(folder / "shared", ranks)
    found["shared"] = chosen.name if chosen else "none"
    everyone = ranks.gather(found)
    if ranks.is_first:
        (folder / "found.json").write_text(json.dumps(everyone))


def save_endlessly(run_dir: Path) -> None:
    """Until killed."""
    die_with_parent()
    engine = new_engine(init_ranks(), 1)
    with CheckpointSaver(run_dir, engine, keep_last=2, in_background=True) as saver:
        for step in itertools.count(1):
            saver.save(counts(step), {}, best=step % 3 == 0)


if __name__ == "__main__":
    if sys.argv[2:] == ["endless"]:
        save_endlessly(Path(sys.argv[1]))
    main(Path(sys.argv[1]))
    end_process(0)

"""`make soak`: what the tests try briefly, tried at length: training that is killed, stopped and resumed at random
moments."""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

# One thread a process, on CPU, as the tests have it: results then do not depend on the machine.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}

from rank_training import write_shards
from soak import kills, resumes, stops

FORMS = {
    "changing": kills.changing,
    "same": kills.same,
    "stops": stops.stop_often,
    "resumes": resumes.resumes,
}


def main() -> None:
    """Every form, or those that are named."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("forms", nargs="*", help=f"of {', '.join(FORMS)}; by default all", default=list(FORMS))
    parser.add_argument("--folder", type=Path, help="where to work; by default a new folder, which is named on failure")
    parser.add_argument("--kills", type=int, default=50, help="in each of changing and same")
    parser.add_argument("--stops", type=int, default=10, help="in each of training, evaluation and saving")
    parser.add_argument("--resumes", type=int, default=1000, help="of the sample order, with nothing trained")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the random moments")
    asked = parser.parse_args()
    folder: Path = (asked.folder or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    print(f"soak: in {folder}, --seed {asked.seed}", flush=True)
    write_shards(folder)
    for name in asked.forms:
        began = time.monotonic()
        count = {"stops": asked.stops, "resumes": asked.resumes}.get(name, asked.kills)
        FORMS[name](folder, count, random.Random(f"{asked.seed} {name}"))
        print(f"soak: {name}: well, in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""The one entry for ranks: `torchrun … -m crossguard.train [stage=train|evaluate] recipe=NAME run_dir=DIR key=value …`.

The configuration is known to be right before anything heavy is imported. `environment=FILE` names environment variables
that the launcher of another machine hands over.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from crossguard.configs.arguments import take
from crossguard.configs.compose import compose
from crossguard.configs.errors import EXIT_FAILED, EXIT_LOST_CONTACT, CrossguardError, Preempted, UserError
from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.restarted import without_fresh_start
from crossguard.configs.schema import Config
from crossguard.configs.schema.checks import one_of
from crossguard.train import preemption, watchdog

if TYPE_CHECKING:
    from crossguard.train.ranks import Ranks

# As shells report a process that Ctrl-C ended.
EXIT_INTERRUPTED = 130
STAGES = ("train", "evaluate")
SECONDS_FOR_RANK_0 = 3.0


def main(argv: list[str]) -> int:
    """Run a stage as one rank; returns the exit status."""
    if "RANK" in os.environ:  # A launcher started this process.
        die_with_parent()
    with preemption.heeding():
        return _outcome(argv)


def _outcome(argv: list[str]) -> int:
    try:
        own, rest = take(argv, "stage", "environment")
        stage = own.get("stage", "train")
        one_of("stage", stage, STAGES)
        if "environment" in own:
            _take_environment(Path(own["environment"]))
        config = compose(without_fresh_start(rest))
        _run(stage, config)
    except Preempted as error:  # All ranks at once: the first one says so.
        if os.environ.get("RANK", "0") == "0":
            _say(str(error))
        return error.exit_status
    except CrossguardError as error:
        _say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED  # The launcher, which got the same Ctrl-C, says so.
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if _is_lost_contact(error, what):
            # What ended the other rank is the news: the launcher, knowing it, ends this process before its turn.
            time.sleep(SECONDS_FOR_RANK_0)
            _say("lost contact with another rank (see logs/)")
            return EXIT_LOST_CONTACT
        _say(f"{type(error).__name__}: {what} (see logs/)")
        return EXIT_FAILED
    return 0


def _is_lost_contact(error: Exception, what: str) -> bool:
    """Whether a connection to another rank broke: gloo tells in words, NCCL and the store by torch's own classes."""
    torch_says = any(cls.__name__ == "DistError" for cls in type(error).__mro__)
    return torch_says or (isinstance(error, RuntimeError) and "/gloo/transport/" in what)


def _take_environment(file: Path) -> None:
    """Environment variables from the launcher's machine, where a command line is no place for them."""
    try:
        os.environ |= json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not what the launcher wrote"
        raise UserError(f"environment={file}: {reason}; run_dir must lie where all hosts see it") from None


def _run(stage: str, config: Config) -> None:
    """Everything that libraries print goes to this rank's log; so does the traceback of an error."""
    from crossguard.train.rank_log import rank_log

    with rank_log(Path(config.run_dir)) as (terminal, log):
        from crossguard.train.code_version import check_same_code
        from crossguard.train.ranks import init_ranks, leave_ranks

        try:
            ranks = init_ranks()
            check_same_code(ranks)
            with watchdog.watching(config.train.step_timeout, ranks.rank, terminal, log):
                _run_stage(stage, config, ranks)
            leave_ranks()
        except Preempted as stopped:
            logging.getLogger(__name__).info("stage=%s: %s", stage, stopped)
            raise
        except Exception:
            logging.getLogger(__name__).exception("stage=%s failed", stage)
            raise


def _run_stage(stage: str, config: Config, ranks: Ranks) -> None:
    if stage == "train":
        from crossguard.train.training import run_training

        run_training(config, ranks)
    else:
        from crossguard.train.evaluation.stage import run_evaluation

        run_evaluation(config, ranks)


def _say(message: str) -> None:
    """Rank 0 speaks on the terminal. An error of another rank alone is heard as well: where rank 0 had it too, the
    launcher ends this process before its turn comes."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if preemption.asked():  # The launcher is ending the job: what went wrong has been said.
            return
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    print(f"crossguard: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "torch" not in sys.modules:  # A wrong configuration: nothing heavy was started.
        sys.exit(status)
    from crossguard.train.ranks import end_process

    end_process(status)

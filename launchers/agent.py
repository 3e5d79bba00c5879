"""torchrun with the exit status of its ranks: `python -m crossguard.launchers.agent`, with torchrun's own arguments.

torchrun ends with 1 whatever its ranks ended with, and starts them again after any error. Here the status is that of
the ranks, 75 after a signal, and they start again only where one was killed, hung, lost contact or ran out of memory:
what a rank has found wrong is wrong the next time as well.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import WorkerState
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from crossguard.configs.errors import (
    EXIT_FAILED,
    EXIT_LOST_CONTACT,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
)
from crossguard.configs.restarted import RESTARTED
from crossguard.launchers.statuses import status_of
from crossguard.launchers.torchrun import AGENT_LOG, CPP_LOG_LEVEL


class Agent(LocalElasticAgent):
    """torchrun's agent, which gives up at once where starting again would not help."""

    # Whether the nodes have met.
    met = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        Agent.met = True
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            status = status_of(_statuses(result.failures))
            if status in (EXIT_FAILED, EXIT_USER_ERROR, EXIT_PREEMPTED):
                self._remaining_restarts = 0
            elif status == EXIT_OUT_OF_MEMORY:  # Not counted: the next start takes fewer posts at once.
                self._remaining_restarts += 1
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        os.environ[RESTARTED] = "1"
        super()._restart_workers(worker_group)


def main(argv: list[str]) -> int:
    """Run torchrun's agent; returns the exit status."""
    if file := os.environ.pop(AGENT_LOG, None):
        _log_to(file)
        os.environ.pop(CPP_LOG_LEVEL, None)  # read when torch was imported; not meant for the ranks
    # The one place where torch names the class of its agent.
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        run(parse_args(argv))
    except ChildFailedError as failed:
        return status_of(_statuses(failed.failures))
    except SignalException:  # The ranks were given --shutdown-timeout to save.
        return EXIT_PREEMPTED
    except RendezvousClosedError:
        print("crossguard: another node has ended the job", file=sys.stderr)
        return EXIT_FAILED
    except (RendezvousError, DistError) as error:
        if Agent.met:
            print("crossguard: the node of launcher.torchrun.endpoint is gone", file=sys.stderr)
            return EXIT_LOST_CONTACT
        what = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        print(
            f"crossguard: the nodes did not meet: {what} Does launcher.torchrun.endpoint name one of them, and does no "
            "other program use its port?",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return 0


def _statuses(failures: dict[int, Any]) -> set[int]:
    return {failure.exitcode for failure in failures.values()}


def _log_to(file: str) -> None:
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("torch.distributed")
    logger.handlers, logger.propagate = [handler], False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line: `crossguard COMMAND key=value …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from signal import Signals

from crossguard.configs.errors import CrossguardError, Preempted, UserError
from crossguard.configs.preemption import on_preemption
from crossguard.configs.suggest import did_you_mean
from crossguard.recipes import commands

Command = Callable[[list[str]], None]

COMMANDS: dict[str, tuple[Command, str, str]] = {
    "run": (
        commands.run,
        "recipe=NAME [run_dir=DIR] [key=value …]",
        "all stages; those already done are skipped",
    ),
    "build": (commands.build, "recipe=NAME [key=value …]", "posts -> WebDataset shards"),
    "train": (commands.train, "recipe=NAME [key=value …]", "shards -> checkpoints; resumes by itself"),
    "evaluate": (commands.evaluate, "recipe=NAME [key=value …]", "checkpoint -> predictions and report"),
    "export": (commands.export, "recipe=NAME [key=value …]", "checkpoint -> a bundle that can be served"),
    "predict": (
        commands.predict,
        "bundle=DIR data.path=POSTS [output=predictions.parquet]",
        "score posts with a bundle",
    ),
    "plan": (
        commands.plan,
        "recipe=NAME [cluster.gpu=NAME] [cluster.nodes=N] [cluster.gpus_per_node=N] [key=value …] [--json]",
        "memory, micro-batch and time under each ZeRO stage, before anything runs",
    ),
    "shards": (
        commands.shards,
        "verify SHARDS | stats SHARDS | preview recipe=NAME step=N [key=value …] | exposure SAMPLE_ID run_dir=DIR",
        "tools for shards: damage, counts, the samples of a step, the steps of a sample",
    ),
    "report": (
        commands.report,
        "compare RUN_A RUN_B [--json]",
        "tools for reports: what changed from one run to another, with paired intervals",
    ),
    "prevalence": (
        commands.prevalence,
        "draw PREDICTIONS policy=NAME posts=N [views=COLUMN] [output=FILE] | estimate SAMPLE",
        "the share of posts or views that violate a policy, from few labels: which posts to label, and the estimate",
    ),
    "recipes": (commands.recipes, "", "the recipes, a sentence each"),
    "config": (commands.config, "recipe=NAME [key=value …]", "every field: value, meaning, where the value comes from"),
    "doctor": (commands.doctor, "", "check this machine and say what to do"),
}

EPILOG = """Settings are written key=value, e.g. train.lr=1e-4, zero=2, data.path=posts/.
Exit status: 0 success; 1 the job failed; 2 what was supplied is wrong; 75 preempted, start again."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `crossguard` command; ends the process with the exit status of the outcome."""
    sys.exit(_run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    try:
        command, rest = _choose(argv)
        with on_preemption(_stop):
            command(rest)
    except CrossguardError as error:
        if str(error):
            print(f"crossguard: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("crossguard: interrupted; start again and it goes on", file=sys.stderr)
        return 130
    return 0


def _stop(sent: Signals) -> None:
    raise Preempted(f"preempted by {sent.name}; start again and it goes on")


def _choose(argv: list[str]) -> tuple[Command, list[str]]:
    """The command that was named and its arguments; help and the version end the process here."""
    parser = argparse.ArgumentParser(
        prog="crossguard",
        description="Train cross-lingual, multimodal classifiers for trust and safety.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="crossguard COMMAND [key=value …]",
    )
    parser.add_argument("--version", action="version", version=f"crossguard {version('crossguard')}")
    listing = parser.add_argument_group("commands")
    for name, (_, arguments, meaning) in COMMANDS.items():
        listing.add_argument(f"{name}", metavar=f"{name} {arguments}", help=meaning, nargs="?")
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        sys.exit(0)
    if argv[0] == "--version":
        parser.parse_args(argv)
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; {did_you_mean(name, COMMANDS)}")
    command, arguments, meaning = COMMANDS[name]
    if "-h" in rest or "--help" in rest:
        print(f"usage: crossguard {name} {arguments}\n\n{meaning}\n\n{EPILOG}")
        sys.exit(0)
    return command, rest


if __name__ == "__main__":
    main()

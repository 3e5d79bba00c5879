"""The one preparation of arguments that the command line and `python -m crossguard.train` share."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from crossguard.configs.errors import UserError
from crossguard.configs.keys import GROUPS, UnknownKey, accepts_text, described_mapping, is_free_form, type_of


@dataclass(frozen=True)
class Arguments:
    """What was asked for: a recipe and Hydra overrides that Hydra accepts."""

    recipe: str | None
    overrides: list[str]


def prepare(argv: list[str]) -> Arguments:
    """Turn what a user or a launcher wrote into a recipe and overrides.

    `--local_rank` (added by the deepspeed launcher) is dropped, numeric group choices become strings, free-form keys
    such as `zero.deepspeed.*` need no `+`, and text with characters of Hydra's grammar (paths!) is quoted.

    Raises:
        UserError: an argument is not `key=value`, or names a key that does not exist.
    """
    recipe, overrides = None, []
    for argument in without_local_rank(argv):
        if argument.startswith("recipe="):
            recipe = argument.removeprefix("recipe=").strip("'\"")
        else:
            overrides.append(_accepted(argument))
    return Arguments(recipe, overrides)


def take(argv: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Split the `name=value` arguments of a command's own from the overrides of the configuration."""
    taken, rest = {}, []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if equals and name in names:
            taken[name] = value
        else:
            rest.append(argument)
    return taken, rest


def without_local_rank(argv: list[str]) -> list[str]:
    """The arguments without `--local_rank=N`, `--local-rank N` and their like."""
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _accepted(argument: str) -> str:
    """The override as Hydra accepts it."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-"):
        raise UserError(f"{argument}: unknown option; settings are written key=value")
    if not equals:
        hint = f"; did you mean recipe={argument}?" if argument.endswith((".yaml", ".yml")) else ""
        raise UserError(f"{argument}: not key=value{hint}")
    name = key.lstrip("+")
    if name == "cluster.gpu":  # A kind of GPU is a file of the group, with all that is known about it.
        name = "cluster"
    if name in GROUPS:
        choice = value.strip("'\"")
        return f"{name}={choice}" if choice.isidentifier() and choice.lower() != "null" else f"{name}='{choice}'"
    try:
        type_of(name)
    except UnknownKey as unknown:
        raise UserError(f"{argument}: {unknown.explain()}") from None
    if value.startswith("~") and accepts_text(name):
        return f"{key}='{value}'"
    override = _parse(argument)
    if override is None or override.is_sweep_override():
        if not accepts_text(name):
            raise UserError(
                f"{argument}: '{value}' is not a value (a list is written [a,b], a mapping {{a: 1}}; text with signs in"
                " it is quoted: ['a=1','b=2'])"
            )
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        argument = f"{key}='{quoted}'"
    argument = argument.lstrip("+")
    return f"++{_from_mapping(name, argument)}" if is_free_form(name) else argument


def _from_mapping(name: str, argument: str) -> str:
    """Where a mapping's values have a schema of their own, an override is merged into the mapping: OmegaConf makes no
    value of one that it is told a single field of."""
    mapping = described_mapping(name)
    if mapping is None or mapping == name:
        return argument
    value = argument.partition("=")[2]
    for part in reversed(name.removeprefix(f"{mapping}.").split(".")):
        value = f"{{{part}: {value}}}"
    return f"{mapping}={value}"


def _parse(argument: str) -> Override | None:
    """The parsed override, or None where Hydra's grammar refuses it."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None

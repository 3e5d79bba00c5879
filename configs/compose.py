"""Composing the configuration: the schema, one choice of each group, the recipe, the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crossguard.configs.arguments import Arguments, prepare
from crossguard.configs.encoder_names import check_folders, check_settings
from crossguard.configs.errors import UserError
from crossguard.configs.freeze_patterns import check_patterns
from crossguard.configs.keys import GROUPS, check_file_keys
from crossguard.configs.lora_targets import check_targets
from crossguard.configs.own_parts import find_own
from crossguard.configs.recipe_files import PACKAGE, find_recipe, own_configs
from crossguard.configs.schema import Config
from crossguard.configs.suggest import allowed


@dataclass(frozen=True)
class Composition:
    """A composed configuration and what it was composed of."""

    config: Config
    arguments: Arguments
    recipe_file: Path
    # Group -> the name of the chosen file.
    choices: dict[str, str] = field(default_factory=dict)


def compose(argv: list[str]) -> Config:
    """The configuration that `recipe=NAME key=value …` stands for.

    Raises:
        UserError: anything is wrong with it, in one line: what, where, the nearest valid name or the allowed values.
    """
    return composition(argv).config


def composition(argv: list[str]) -> Composition:
    """Like `compose`, with where everything came from."""
    arguments = prepare(argv)
    if arguments.recipe is None:
        raise UserError("recipe: not set; say recipe=NAME (see `crossguard recipes`) or recipe=path/to/mine.yaml")
    recipe_file = find_recipe(arguments.recipe)
    check_file_keys(recipe_file)
    _register(recipe_file)
    plain, choices = _compose_with_hydra(arguments.overrides, recipe_file)
    plain.recipe = recipe_file.stem
    plain.run_dir = plain.run_dir or f"runs/{recipe_file.stem}"
    config = to_schema(plain)
    if config.cluster.gpu != choices["cluster"]:
        raise UserError(
            f"cluster.gpu={config.cluster.gpu}: the figures are those of '{choices['cluster']}'; choose the file,"
            f" in a recipe with `defaults: - override /cluster: {config.cluster.gpu}`"
        )
    _find_own_parts(config)
    _check_model(config)
    return Composition(config, arguments, recipe_file, choices)


def to_schema(plain: DictConfig) -> Config:
    """The typed configuration, every check of the schema passed."""
    try:
        config = OmegaConf.to_object(plain)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None
    assert isinstance(config, Config)
    return config


def group_file(group: str, choice: str) -> Path | None:
    """The YAML file of a group's choice: the package's, or else that of the working directory."""
    folders = [PACKAGE, *([own] if (own := own_configs()) else [])]
    return next((file for folder in folders if (file := folder / group / f"{choice}.yaml").is_file()), None)


def group_choices(group: str) -> list[str]:
    """The names that `group=NAME` may take."""
    folders = [PACKAGE, *([own] if (own := own_configs()) else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _find_own_parts(config: Config) -> None:
    """Every `module:name` of the configuration must be importable from here."""
    parts = {
        "data.source": config.data.source,
        "train.loss.name": config.train.loss.name,
        **{f"model.{name}.build": encoder.build for name, encoder in config.model.encoders.items()},
        **{f"evaluation.metrics[{number}]": name for number, name in enumerate(config.evaluation.metrics)},
    }
    for key, spec in parts.items():
        if spec and ":" in spec:
            find_own(spec, key)


def _check_model(config: Config) -> None:
    """What only transformers and the built model know for sure; importing and building them takes seconds."""
    for modality, encoder in config.model.encoders.items():
        if encoder.config:
            check_settings(encoder.config, f"model.{modality}.config")
            encoder.check_sizes()
        check_folders(encoder, f"model.{modality}")
        check_targets(encoder, modality)
    check_patterns(config.train.freeze, config.model)
    check_patterns(config.train.lr_factors, config.model, "train.lr_factors")


def _register(recipe_file: Path) -> None:
    """Hand the schema and the recipe to Hydra under the names that `config.yaml` composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    recipe = OmegaConf.load(recipe_file)
    store.store(group="recipe", name="chosen", node=recipe or {}, package="_global_")


def _compose_with_hydra(overrides: list[str], recipe_file: Path) -> tuple[DictConfig, dict[str, str]]:
    searchpath = [f"hydra.searchpath=[file://{own}]"] if (own := own_configs()) else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(PACKAGE), version_base="1.3"):
            composed = hydra.compose("config", [*searchpath, *overrides], return_hydra_config=True)
    except MissingConfigException as error:
        raise UserError(_missing_choice(error, recipe_file)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_composition_error(error, recipe_file)) from None
    finally:
        GlobalHydra.instance().clear()
    choices = {str(group): str(choice) for group, choice in composed.hydra.runtime.choices.items() if group in GROUPS}
    without_hydra = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    plain = OmegaConf.merge(OmegaConf.structured(Config), without_hydra)
    assert isinstance(plain, DictConfig)
    return plain, choices


def _missing_choice(error: MissingConfigException, recipe_file: Path) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    choices = group_choices(group)
    if not group or not choices:
        return f"{recipe_file}: defaults: {_one_line(error)}"
    return f"{group}={choice}: no such choice; {allowed(choice, choices)}"


def _composition_error(error: Exception, recipe_file: Path) -> str:
    """One line for a value of the wrong type, a wrong key in a group's file, or a defaults list that does not hold."""
    lines = str(error).splitlines()
    if (override := re.search(r"override (\S+=.*)", lines[0])) is not None:
        return f"{override.group(1)}: {_reason(error.__cause__ or error)}"
    # Hydra: "In 'GROUP/CHOICE': X raised while composing config:", the reason, then "full_key: KEY".
    file = recipe_file
    composing = re.search(r"In '(\w+)/([^']+)'.*raised while composing", lines[0])
    if composing and composing.group(1) != "recipe":
        group, choice = composing.groups()
        file = group_file(group, choice) or recipe_file
        check_file_keys(file, group)
    reason = lines[1] if composing else lines[0]
    key = re.search(r"full_key: (\S+)", str(error))
    return f"{file}: {f'{key.group(1)}: ' if key else ''}{reason}"


def _reason(error: BaseException) -> str:
    return str(getattr(error, "msg", None) or error).strip().splitlines()[0]


def _one_line(error: Any) -> str:
    key = getattr(error, "full_key", None)
    reason = _reason(error)
    return f"{key}: {reason}" if key else reason

"""Encoders of `transformers`: pretrained ones from the hub or a folder, and small ones from a configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from crossguard.configs.encoder_names import EXAMPLES, PARTS
from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Role = Literal["text", "image", "video", "audio"]
# Layers left out and inputs hidden at random, which would differ from rank to rank.
RANDOM = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False}
ENCODED = {"text": "texts", "image": "images", "video": "images", "audio": "sound"}
# How weights are shared out while they are read; None: every rank holds them whole.
_DEEPSPEED: ContextVar[Mapping[str, Any] | None] = ContextVar("deepspeed", default=None)
INPUTS = {
    "text": ("input_ids",),
    "image": ("pixel_values",),
    "video": ("pixel_values",),
    "audio": ("input_features", "input_values"),
}


def load_encoder(name: str, role: Role, *, pooler: bool = False, layers: int | None = None) -> PreTrainedModel:
    """A pretrained encoder in float32; of a dual encoder (CLIP, SigLIP) the tower of `role`.

    Args:
        name: hub id or local folder.
        role: which tower, and which key of the configuration an error names.
        pooler: whether its pooler is used, which many checkpoints leave out.
        layers: so many of its layers, from below, where it has more; by default all.

    Raises:
        UserError: there is no such model, it reads something else, or its file lacks weights of the encoder.
    """
    key = f"model.{role}.pretrained={name}"
    # What a fresh pooler draws must not change what is drawn after it: that depends on how the weights are read. Nor
    # does it depend on the run's seed, so that runs of several may share embeddings that are computed once.
    with _opening(key), _quiet(), torch.random.fork_rng(devices=[]), _partitioning():
        torch.manual_seed(0)
        config, is_part = _read_config(name, role, layers)
        # Of a dual encoder's file only the tower's weights are read, whose names all begin alike.
        names = {rf"^{PARTS[role].replace('config', 'model')}\.": ""} if is_part else None
        model_class: Any = _model_class(config)
        encoder, info = model_class.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, key_mapping=names
        )
    missing = sorted(name for name in info["missing_keys"] if pooler or "pooler" not in name)
    if missing:
        raise UserError(
            f"{key}: has no weights for {len(missing)} parameters of the encoder, the first is '{missing[0]}'"
        )
    return _encoder_half(encoder, role, key)


@contextmanager
def partitioned(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `load_encoder` leaves every rank with its ZeRO-3 partition of the weights: rank 0 reads them module by
    module and the ranks share each of them out at once, so that none ever holds the encoder. All ranks load together.

    Args:
        settings: the configuration that DeepSpeed will be started with.
    """
    before = _DEEPSPEED.set(settings)
    try:
        yield
    finally:
        _DEEPSPEED.reset(before)


@contextmanager
def _partitioning() -> Iterator[None]:
    settings = _DEEPSPEED.get()
    if settings is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    from crossguard.train.deepspeed_settings import join_deepspeed

    join_deepspeed()
    kept = HfDeepSpeedConfig(settings)  # transformers holds it weakly.
    try:
        yield
    finally:
        del kept
        unset_hf_deepspeed_config()


def new_encoder(values: dict[str, Any], defaults: dict[str, Any], role: Role) -> PreTrainedModel:
    """An encoder with random weights, drawn from torch's generator.

    Args:
        values: a configuration of `transformers` with its `model_type`.
        defaults: settings that `values` need not repeat; used where the model knows them.
        role: which key of the configuration an error names.

    Raises:
        UserError: `model_type` is missing or unknown, or a setting is unknown or refused.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    key = f"model.{role}.config"
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{key}.model_type: missing; e.g. {EXAMPLES[role]}")
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"{key}.model_type={model_type}: unknown; {did_you_mean(model_type, CONFIG_MAPPING.keys())}")
    standard = AutoConfig.for_model(model_type)
    for name in values:
        if not hasattr(standard, name) and not _reads_by_name(standard, name):
            hint = did_you_mean(name, [*standard.to_dict(), *standard.attribute_map])
            raise UserError(f"{key}.{name}: no setting of {model_type}; {hint}")
    known = {name: value for name, value in defaults.items() if hasattr(standard, name)}
    try:
        config = AutoConfig.for_model(model_type, **{**known, **values})
        tower = _tower_config(config, role)
        encoder = _model_class(tower)._from_config(tower)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{key}: transformers refuses it ({_first_line(error)})") from error
    return _encoder_half(encoder, role, f"{key}.model_type={model_type}")


def encoder_config(encoder: PreTrainedModel) -> dict[str, Any]:
    """What `new_encoder` needs to build the same architecture without a hub."""
    return _as_values(encoder.config)


def pretrained_config(name: str, role: Role, layers: int | None = None) -> dict[str, Any]:
    """What `new_encoder` needs to build the architecture that `load_encoder` gives; weights are not looked at.

    Raises:
        UserError: there is no such model.
    """
    with _opening(f"model.{role}.pretrained={name}"):
        return _as_values(_read_config(name, role, layers)[0])


@contextmanager
def _opening(key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: neither a folder with a model nor one that the hub has ({_first_line(error)})"
        ) from error


def _read_config(name: str, role: Role, layers: int | None = None) -> tuple[Any, bool]:
    """The configuration of a pretrained encoder, without what is random in a way that differs from rank to rank, and
    whether it is that of one tower of a dual encoder."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(name)
    config = _tower_config(whole, role)
    if layers is not None and layers < config.num_hidden_layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    for setting, value in RANDOM.items():
        if hasattr(config, setting):
            setattr(config, setting, value)
    return config, config is not whole


def _as_values(config: Any) -> dict[str, Any]:
    # Files on the hub also hold settings of tools that nobody reads here; new_encoder would refuse them.
    standard = type(config)()
    known = {name: hasattr(standard, name) or _model_reads(config, name) for name in config.to_dict()}
    values = {name: value for name, value in config.to_dict().items() if known[name]}
    return {**values, "model_type": config.model_type}


def _reads_by_name(config: PreTrainedConfig, name: str) -> bool:
    """Whether a setting that is no attribute of its own is looked at; any other one transformers silently ignores.

    Derived and older settings (ModernBERT's `global_attn_every_n_layers`) are listed nowhere: the configuration's
    code takes them by their quoted name.
    """
    own = any(f'"{name}"' in inspect.getsource(part) for part in type(config).__mro__ if part is not object)
    return own or _model_reads(config, name)


def _model_reads(config: PreTrainedConfig, name: str) -> bool:
    """Whether the model's code asks for a setting that its configuration does not declare (DeBERTa's
    `position_buckets`)."""
    modeling = type(config).__module__.replace("configuration_", "modeling_")
    return f'getattr(config, "{name}"' in inspect.getsource(importlib.import_module(modeling))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own table of missing weights and its progress bar: what matters of it is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tower_config(config: Any, role: Role) -> Any:
    """Of a dual encoder's configuration the part of one tower."""
    return getattr(config, PARTS[role], config)


def _model_class(config: Any) -> type[PreTrainedModel]:
    """What is built from a configuration."""
    from transformers import MODEL_MAPPING

    if type(config) in MODEL_MAPPING:
        found: Any = MODEL_MAPPING[type(config)]
        return cast("type[PreTrainedModel]", found)
    # The table lacks the text towers of SigLIP and others, which stand in the module beside.
    module, name = type(config).__module__, type(config).__name__
    modeling = importlib.import_module(module.replace("configuration_", "modeling_"))
    tower: type[PreTrainedModel] | None = getattr(modeling, name.replace("Config", "Model"), None)
    if tower is None:
        raise ValueError(f"{name} describes no encoder")
    return tower


def _encoder_half(model: PreTrainedModel, role: Role, key: str) -> PreTrainedModel:
    """Of an encoder-decoder (T5) the encoder."""
    if model.main_input_name not in INPUTS[role]:
        raise UserError(
            f"{key}: does not read {' or '.join(INPUTS[role])}; choose a model that encodes {ENCODED[role]}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        encoder: PreTrainedModel = model.get_encoder()
        return encoder
    return model


def _first_line(error: Exception) -> str:
    """What is wrong, in one line; some errors of transformers go on for a page."""
    return " ".join(str(error).split())[:200] or type(error).__name__

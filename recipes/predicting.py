"""`crossguard predict`: the arguments of scoring posts with a bundle."""

from __future__ import annotations

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crossguard.configs.arguments import prepare, take
from crossguard.configs.errors import UserError
from crossguard.configs.schema import DataConfig, EvaluationConfig

GROUPS = {"data": DataConfig, "evaluation": EvaluationConfig}


def predict_posts(argv: list[str]) -> None:
    """Score posts: `bundle=DIR data.path=POSTS [data.…] [evaluation.batch_size=N] [output=FILE]`.

    Raises:
        UserError: an argument, the bundle or the posts are wrong.
    """
    own, rest = take(argv, "bundle", "output")
    if "bundle" not in own:
        raise UserError("bundle: not set; say bundle=DIR, the folder that `crossguard export` wrote")
    data, evaluation = _settings(rest)
    if not data.path:
        raise UserError("data.path: not set; say data.path=FILE_OR_FOLDER of posts")
    from crossguard.train.export.predict import predict

    written = predict(Path(own["bundle"]), data, Path(own.get("output", "predictions.parquet")), evaluation.batch_size)
    print(f"predict: {written}", flush=True)


def _settings(argv: list[str]) -> tuple[DataConfig, EvaluationConfig]:
    """The two groups that predicting reads; everything else comes from the bundle."""
    overrides = [override.lstrip("+") for override in prepare(argv).overrides]
    for override in overrides:
        if override.partition(".")[0] not in GROUPS:
            raise UserError(f"{override}: predict takes bundle=, output=, data.* and evaluation.batch_size=")
    schema = OmegaConf.create({name: OmegaConf.structured(group) for name, group in GROUPS.items()})
    parser = OverridesParser.create()
    try:
        for parsed in parser.parse_overrides(overrides):
            OmegaConf.update(schema, parsed.key_or_group, parsed.value(), force_add=True)
        data, evaluation = OmegaConf.to_object(schema.data), OmegaConf.to_object(schema.evaluation)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(data, DataConfig)
    assert isinstance(evaluation, EvaluationConfig)
    return data, evaluation

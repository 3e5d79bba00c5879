"""Composing a configuration: what is accepted, and how each mistake is answered."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import RankJob

from crossguard.configs import deepspeed_keys, encoder_names, recipe_files
from crossguard.configs.arguments import prepare, take
from crossguard.configs.compose import compose
from crossguard.configs.describe import describe
from crossguard.configs.errors import UserError
from crossguard.configs.keys import GROUPS, describe_fields
from crossguard.configs.saved import as_plain, load_config, save_config
from crossguard.configs.schema import Config
from crossguard.configs.schema.actions import ActionConfig

RECIPE = """
defaults:
  - override /model: small
description: posts in one language
taxonomy:
  name: mine
  policies:
    - {name: spam, description: unwanted advertising}
train:
  max_steps: 5
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return "recipe=mine.yaml"


def test_a_recipe_by_path_has_its_stem_as_name_and_the_command_line_has_the_last_word(recipe: str) -> None:
    config = compose([recipe, "data.path=posts.jsonl", "train.max_steps=7", "zero=3"])
    assert (config.recipe, config.run_dir) == ("mine", "runs/mine")
    assert (config.train.max_steps, config.zero.stage) == (7, 3)
    assert config.taxonomy.policies[0].name == "spam"


def test_a_recipe_of_the_working_directory_hides_the_package_s(recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "recipe"
    folder.mkdir(parents=True)
    (folder / "quickstart.yaml").write_text(RECIPE)
    assert compose(["recipe=quickstart", "data.path=x"]).description == "posts in one language"


def test_a_group_s_choice_of_the_working_directory(recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "train"
    folder.mkdir(parents=True)
    (folder / "slow.yaml").write_text("lr: 1e-6\n")
    assert compose([recipe, "data.path=x", "train=slow"]).train.lr == 1e-6
    (folder / "slow.yaml").write_text("\nlrr: 1e-6\n")
    with pytest.raises(UserError, match=r"slow.yaml:2: train.lrr: unknown key 'lrr'; did you mean 'lr'\?"):
        compose([recipe, "data.path=x", "train=slow"])


@pytest.mark.parametrize("spelling", [["--local_rank=1"], ["--local-rank", "1"], []])
def test_the_deepspeed_launcher_s_local_rank_is_dropped(spelling: list[str]) -> None:
    """Hydra would refuse what that launcher adds."""
    assert prepare([*spelling, "recipe=quickstart", "seed=3"]).overrides == ["seed=3"]


def test_prepared_arguments_can_be_prepared_again() -> None:
    once = prepare(
        ["data.path=/a (1)/b's[2].jsonl", "zero=2", "zero.deepspeed.steps_per_print=9", "train.freeze=[a,b]"]
    )
    assert prepare(once.overrides).overrides == once.overrides


def test_paths_may_hold_characters_of_hydra_s_grammar(recipe: str) -> None:
    path = "/data (old)/x,y/[1]{2}=it's.jsonl"
    assert compose([recipe, f"data.path={path}"]).data.path == path


def test_any_deepspeed_key_needs_no_plus(recipe: str) -> None:
    config = compose([recipe, "data.path=x", "zero.deepspeed.zero_optimization.reduce_bucket_size=1000"])
    assert config.zero.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}


def test_a_mapping_with_open_names_can_be_given_whole_or_by_key(recipe: str) -> None:
    config = compose([recipe, "data.path=x", "data.options={split: train}", "data.columns.text=tweet"])
    assert (config.data.options, config.data.columns) == ({"split": "train"}, {"text": "tweet"})


def test_a_mapping_of_described_values_takes_single_fields(recipe: str) -> None:
    fields = ["evaluation.actions.remove.precision=0.9", "evaluation.actions.remove.delta=0.2"]
    actions = compose([recipe, "data.path=x", *fields, "evaluation.actions.hide={recall: 0.5}"]).evaluation.actions
    assert actions == {"remove": ActionConfig(precision=0.9, delta=0.2), "hide": ActionConfig(recall=0.5)}
    assert prepare(prepare(fields).overrides).overrides == prepare(fields).overrides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.actions.remove.precison=0.9"], r"unknown key 'precison'; did you mean 'precision'\?"),
        (["train.lrr=1"], r"train.lrr=1: .*did you mean 'lr'\?"),
        (["trian.lr=1"], r"trian.lr=1: .*did you mean 'train'\?"),
        (["train.lr=fast"], r"train.lr=fast: .*'fast'"),
        (["train.lr=-1"], r"train.lr=-1.*above 0"),
        (["train.lr=1,2"], r"train.lr=1,2: '1,2' is not a value"),
        (["ablations.plain=[train.lr=1]"], r"is not a value .*quoted: \['a=1'"),
        (["train.precision=bf61"], r"train.precision=bf61: did you mean 'bf16'\? allowed: fp32, bf16"),
        (["train.loss.name=fokal"], r"train.loss.name=fokal: did you mean 'focal'\?"),
        (["tracker=wandbb"], r"tracker=wandbb: no such choice; did you mean 'wandb'\?"),
        (["zero=4"], r"zero=4: no such choice; allowed: 0, 1, 2, 3"),
        (["zero.deepspeed.gradient_cliping=1"], r"gradient_cliping: .*did you mean 'gradient_clipping'\?"),
        (["zero.deepspeed.zero_optimization.stge=1"], r"zero_optimization.stge: .*did you mean 'stage'\?"),
        (["zero.deepspeed.zero_optimization.overlap_comm=maybe"], r"overlap_comm=maybe: must be true or false"),
        (["zero.deepspeed.zero_optimization.reduce_bucket_size=big"], r"reduce_bucket_size=big: must be a number"),
        (["build.splits={train: 0.5}"], r"build.splits.*add up to 1"),
        (["build.splits={../train: 1.0}"], r"build.splits: name '../train': use letters"),
        (["taxonomy.policies=[{name: benign}]"], r"taxonomy.policies: 'benign' is no policy"),
        (
            ["model.text.config.hidden_sise=3"],
            r"config.hidden_sise: no setting of modernbert; did you mean 'hidden_size'",
        ),
        (["model.text.config.hidden_size=big"], r"model.text.config.hidden_size=big: must be int"),
        (["model.text.config.model_type=modernbret"], r"model_type=modernbret: unknown; did you mean 'modernbert'\?"),
        (
            [
                "model=inline",
                "model.text.config={model_type: clip, text_config: {hidden_sise: 4}}",
                "model.modalities=[text]",
            ],
            r"text_config.hidden_sise: no setting of clip_text_model; did you mean 'hidden_size'",
        ),
        (
            ["model=inline", "model.text.config={hidden_size: 4}", "model.modalities=[text]"],
            r"model_type: missing; e.g. bert",
        ),
        (["model.text.max_length=512"], r"model.text.max_length=512: the encoder has only 256 positions"),
        (["model.text.config.vocab_size=100"], r"vocab_size=100: the tokenizer 'bytes' has 259 tokens"),
        (["model.image.config.image_size=64"], r"model.image.size=32: the encoder was made for 64"),
        (["model.text.tokenizer=./nowhere"], r"model.text.tokenizer=./nowhere: no such folder"),
        (
            ["model=inline", "model.modalities=[text]", "model.text.pretrained=./empty"],
            r"pretrained=./empty: .* no model",
        ),
        (
            ["train.freeze=[text.encodr.*]"],
            r"train.freeze: 'text.encodr.\*' matches no .*; did you mean 'text.encoder.\*'",
        ),
        (
            ["model.text.lora.rank=4", "model.text.lora.targets=[Wqvk]"],
            r"model\.text\.lora\.targets: 'Wqvk' .*did you mean 'Wqkv'",
        ),
        (["train.compile=true", "zero=3"], r"train\.compile: not with zero=3.*use zero=2"),
        (["train.ema_decay=1.0"], r"train\.ema_decay=1\.0: a number in \[0, 1\)"),
        (["train.freeze=[image.encoder.layer.0.*]"], r"did you mean 'image.encoder.layers.0.\*'"),
        (["train.freeze=['*embedings*']"], r"'\*embedings\*' matches no parameter"),
        (["train.freeze=[heads.mian.*]"], r"did you mean 'heads.main.\*'"),
        (["train.freeze=[fusion.gates.*]"], r"'fusion.gates.\*' matches no parameter"),
        (["model.heads={one: {policies: [spamm]}}"], r"model.heads.one.policies=spamm: did you mean 'spam'"),
        (["train.freeze=['*']"], r"'\*' freezes every parameter"),
        (["train.loss.name=own_parts_here:los"], r"module 'own_parts_here' has no 'los'; did you mean 'loss'"),
        (["train.loss.name=nowhere:loss"], r"no module 'nowhere' is importable"),
        (["evaluation.metrics=['own_parts_here:auroc']"], r"the name 'auroc' is taken"),
        (["model.modalities=[text,smell]"], r"model.modalities=smell.*allowed: text, ngrams, image, video, audio"),
        (["evaluation.metrics=[auroc]"], r"evaluation.metrics: 'auroc': write module:function"),
        (["checkpoint.metric=macro.auorc"], r"checkpoint.metric=auorc: did you mean 'auroc'\?"),
        (["checkpoint.metric=policies.spamm.all.auroc"], r"policy=spamm: did you mean 'spam'\?"),
        (["checkpoint.metric=micro.auroc"], r"checkpoint.metric=micro.auroc: write macro.METRIC"),
        (["model.fusion.heads=0"], r"model.fusion.heads=0: must be at least 1"),
        (["seed=-1"], r"seed=-1: must be at least 0"),
        (["train.lr=nan"], r"train.lr=nan: must be above 0"),
        (["zero.deepspeed.zero_optimization.stage=null"], r"zero_optimization.stage: crossguard sets it; use zero="),
        (["zero.deepspeed.train_batch_size=4"], r"train_batch_size: crossguard sets it; use train.batch_size"),
        (["mine.yaml"], r"mine.yaml: not key=value; did you mean recipe=mine.yaml\?"),
        (["--verbose"], r"--verbose: unknown option"),
        (["verbose"], r"verbose: not key=value"),
    ],
)
def test_each_mistake_is_one_line_with_the_place_and_the_remedy(
    recipe: str, arguments: list[str], message: str
) -> None:
    """DeepSpeed accepts a misspelled key at the top, and Hydra, without a schema, one anywhere in a recipe's YAML."""
    Path("own_parts_here.py").write_text("def loss(logits, labels): ...\n")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        compose([recipe, "data.path=x", *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.freeze=['text.encoder.layers.[0-3].*','*.bias','fusion.*','image.encoder.layers.1?.mlp.fc2.weight']"],
        [
            "model.fusion.kind=gated",
            "train.freeze=[fusion.gates.text.weight,fusion.features.image.*,heads.main.logits.*]",
        ],
        ["model.heads={one: {policies: [spam], hidden: 4}}", "train.freeze=[heads.one.hidden.*]"],
        ["train.freeze=[text,image,fusion,heads.main]", "train.cache_embeddings=true"],
        ["model.text.config.global_attn_every_n_layers=2", "model.text.config.pad_token_id=null"],
        # What a hub's encoder or one's own is called inside shows when it is there.
        ["model=siglip2_base", "train.freeze=['text.encoder.anything.*']"],
        ["model=inline", "model.modalities=[text]", "model.text.build=json:loads", "train.freeze=[text.anything]"],
        ["model=inline", "model.modalities=[text]", "model.text.config={model_type: qwen3, anything: 1}"],
        ["zero.deepspeed.zero_optimization.reduce_bucket_size=5e7", "zero.deepspeed.steps_per_print=9"],
    ],
)
def test_names_that_may_be_right_are_accepted(recipe: str, arguments: list[str]) -> None:
    compose([recipe, "data.path=x", *arguments])


def test_the_names_in_a_local_folder_s_model_are_known(recipe: str) -> None:
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps({"model_type": "clip"}))
    pretrained = [recipe, "data.path=x", "model=inline", "model.modalities=[text]", "model.text.pretrained=./mine"]
    compose([*pretrained, "train.freeze=[text.encoder.embeddings.*]"])
    with pytest.raises(UserError, match=r"did you mean 'text.encoder.embeddings.\*'"):
        compose([*pretrained, "train.freeze=[text.encoder.embedings.*]"])


def test_a_snapshot_of_another_transformers_leaves_the_judgement_to_the_ranks(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_names, "version", lambda name: "99.0")
    compose([recipe, "data.path=x", "model.text.config.new_setting=1", "train.freeze=[text.encoder.new.*]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  max_stepz: 3\n",
            r"mine.yaml:2: train.max_stepz: unknown key 'max_stepz'; did you mean 'max_steps'\?",
        ),
        ("trane: {lr: 1}\n", r"mine.yaml:1: trane: unknown key 'trane'; did you mean 'train'\?"),
        ("train: {lr: [1\n", r"mine.yaml:2: not valid YAML"),
        ("- a\n", r"mine.yaml: must be a mapping"),
        ("train: {max_steps: many}\n", r"mine.yaml: .*max_steps.*'many'"),
        ("defaults:\n  - override /model: smal\n", r"model=smal: no such choice; did you mean 'small'\?"),
        (
            "defaults: [override /model: small]\ntaxonomy: {policies: [{name: a}]}\nzero: {deepspeed: {optimiser: {}}}\n",
            r"zero.deepspeed.optimiser: .*did you mean 'optimizer'\?",
        ),
        ("defaults: [override /model: small]\ntrain: {lr: 1}\n", r"taxonomy.policies: empty"),
        ("taxonomy: {policies: [{name: a}]}\n", r"model.text: set one of pretrained, config, build"),
    ],
)
def test_each_mistake_in_a_recipe_names_its_file_and_line(recipe: str, text: str, message: str) -> None:
    Path("mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        compose([recipe, "data.path=x"])
    assert "\n" not in str(caught.value)


PACKAGE_RECIPES = sorted(file.stem for file in (recipe_files.PACKAGE / "recipe").glob("*.yaml"))
PACKAGE_MODELS = sorted(file.stem for file in (recipe_files.PACKAGE / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", PACKAGE_RECIPES)
def test_every_recipe_of_the_package_composes_and_says_what_it_is(name: str) -> None:
    config = compose([f"recipe={name}", "data.path=posts"])
    assert config.recipe == name
    assert config.description.endswith(".")


@pytest.mark.parametrize("name", [name for name in PACKAGE_MODELS if name != "inline"])
def test_every_model_of_the_package_composes(recipe: str, name: str) -> None:
    Path("mine.yaml").write_text(RECIPE.replace("small", name))
    assert compose([recipe, "data.path=posts"]).model.modalities


def test_missing_recipe_and_missing_data(recipe: str) -> None:
    with pytest.raises(UserError, match="recipe: not set"):
        compose([])
    with pytest.raises(UserError, match=r"recipe=quickstrat: no such recipe; did you mean 'quickstart'\?"):
        compose(["recipe=quickstrat"])
    with pytest.raises(UserError, match="recipe=other.yaml: no such file$"):
        compose(["recipe=other.yaml"])
    with pytest.raises(UserError, match=r"recipe=mime.yaml: no such file; did you mean 'mine.yaml'\?"):
        compose(["recipe=mime.yaml"])
    with pytest.raises(UserError, match="data.path: not set"):
        compose([recipe])


def test_a_saved_configuration_loads_again_and_holds_no_absolute_path(recipe: str, tmp_path: Path) -> None:
    config = compose([recipe, f"data.path={tmp_path / 'posts.jsonl'}", f"run_dir={tmp_path / 'run'}"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert str(tmp_path) not in (tmp_path / "run" / "config.yaml").read_text()
    assert as_plain(load_config(tmp_path / "run" / "config.yaml")) == as_plain(config)


def test_every_field_of_the_schema_has_a_sentence() -> None:
    def check(cls: type) -> None:
        meanings = describe_fields(cls)
        for field in dataclasses.fields(cls):
            assert meanings.get(field.name, "").endswith("."), f"{cls.__name__}.{field.name} has no sentence"

    check(Config)
    for group in GROUPS:
        check(typing.get_type_hints(Config)[group])


def test_describe_says_where_each_value_comes_from(recipe: str) -> None:
    text = describe([recipe, "data.path=x", "zero=3", "train.lr=1"])
    assert "train.max_steps = 5\n" in text
    entries = dict(zip(*[iter(text.splitlines())] * 2, strict=True))
    assert entries["train.max_steps = 5"].endswith("[recipe mine.yaml]")
    assert entries["train.lr = 1.0"].endswith("[command line]")
    assert entries["zero.stage = 3"].endswith("[zero=3]")
    assert entries["train.batch_size = 64"].endswith("[default]")


def test_take_splits_a_command_s_own_arguments() -> None:
    assert take(["step=3", "train.lr=1", "stage=x"], "step", "stage") == ({"step": "3", "stage": "x"}, ["train.lr=1"])


HEAVY = ("torch", "transformers", "deepspeed", "datasets", "sklearn", "matplotlib", "wandb")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["nonsense"],
        ["run", "recipe=quickstart", "train.lrr=1"],
        ["train", "recipe=quickstart", "model.text.config.hidden_sise=3"],
        ["evaluate", "recipe=quickstart", "model.text.config.model_type=modernbret"],
        ["build", "recipe=quickstart", "train.freeze=[txt.*]"],
    ],
)
def test_help_and_configuration_errors_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom crossguard.recipes.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        f"    print('status', end.code, [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    status = 0 if arguments[0] in ("--help", "recipes") else 2
    assert done.stdout.splitlines()[-1] == f"status {status} []"
    assert len(done.stderr.splitlines()) == (status == 2)


@pytest.mark.parametrize(
    ("script", "committed"), [("deepspeed_keys", deepspeed_keys.snapshot), ("encoder_names", encoder_names.snapshot)]
)
def test_a_snapshot_is_that_of_the_installed_version(
    script: str, committed: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """In a process of its own, which imports every model of transformers."""
    with RankJob([str(Path(__file__).with_name(f"{script}.py")), str(tmp_path / "found.json")], 0) as job:
        assert job.wait(200) == [0], job.said()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == committed(), f"run `python tests/{script}.py`, look at what changed"

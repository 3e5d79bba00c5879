"""Encoders of every origin: pretrained, from a configuration, the user's own; refusals, and the names of their layers."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BERT, IMAGES, POSTS, SIZE, TAXONOMY, TEXTS, TINY, VIT, batch_of, build, model_config
from torch import nn

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.schema.train import TrainConfig
from crossguard.train.models import build_model, without_pretrained
from crossguard.train.optimizer import build_optimizer, freeze, layer_factors
from crossguard.train.tokenizers import load_tokenizer


def save_pretrained_text(folder: Path) -> None:
    """A tiny BERT and a tokenizer trained on a few words, as a user would have them in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    rules = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    rules.train_from_iterator(
        ["meet me at the river", "нам на реку"], trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
    )
    rules.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(5)
    sizes = {name: value for name, value in BERT.items() if name != "model_type"}
    encoder = BertModel(BertConfig(vocab_size=rules.get_vocab_size(), max_position_embeddings=64, **sizes))
    # Saved in half precision, as many checkpoints are; trained in float32.
    encoder.to(torch.bfloat16).save_pretrained(folder)


def save_pretrained_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(6)
    vision = {**TINY, "patch_size": 8, "image_size": SIZE}
    CLIPModel(CLIPConfig(vision_config=vision, text_config={**TINY, "vocab_size": 50})).save_pretrained(folder)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    save_pretrained_text(folder / "text")
    save_pretrained_clip(folder / "clip")
    return folder


def pretrained_config(folder: Path) -> ModelConfig:
    return ModelConfig(
        text=TextEncoderConfig(pretrained=str(folder / "text"), max_length=64),
        image=ImageEncoderConfig(pretrained=str(folder / "clip"), size=SIZE),
        fusion=FusionConfig(width=16, heads=2),
    )


def test_pretrained_encoders_come_from_a_folder_with_their_tokenizer(pretrained: Path) -> None:
    from safetensors.torch import load_file

    config = pretrained_config(pretrained)
    tokenizer = load_tokenizer(config.text)
    assert tokenizer.encode("meet at the river", 64)[0] == 2
    model = build_model(config, TAXONOMY, tokenizer, 0)
    text = load_file(pretrained / "text" / "model.safetensors")
    assert text["embeddings.word_embeddings.weight"].dtype == torch.bfloat16
    weight = model.text.get_parameter("encoder.embeddings.word_embeddings.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, text["embeddings.word_embeddings.weight"].float())
    # Of CLIP the image tower alone, with the weights that the file holds.
    saved = load_file(pretrained / "clip" / "model.safetensors")
    key = next(name for name in saved if name.endswith("patch_embedding.weight"))
    loaded = [p for name, p in model.image.named_parameters() if name.endswith("patch_embedding.weight")]
    assert len(loaded) == 1
    assert torch.equal(loaded[0], saved[key])
    assert not any("text_model" in name for name, _ in model.named_parameters())


def test_a_pretrained_model_can_be_built_again_without_its_folder(pretrained: Path) -> None:
    config = pretrained_config(pretrained)
    tokenizer = load_tokenizer(config.text)
    model = build_model(config, TAXONOMY, tokenizer, 0).eval()
    nn.init.normal_(model.heads.main.logits.weight)
    described = without_pretrained(config, model)
    assert described.text.pretrained is None
    assert described.image.pretrained is None
    encoders = json.loads(json.dumps([described.text.config, described.image.config]))
    described = replace(
        described,
        text=replace(described.text, config=encoders[0]),
        image=replace(described.image, config=encoders[1]),
    )
    again = build_model(described, TAXONOMY, tokenizer, 1).eval()
    again.load_state_dict(model.state_dict())
    batch = batch_of(*[replace(p, input_ids=None if p.input_ids is None else p.input_ids[:60] % 20) for p in POSTS])
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


OWN_MODULE = """
import torch
from torch import nn

class Hash(nn.Module):
    width = 6
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(300, 6)
        self.length = config.max_length
    def forward(self, input_ids, mask):
        assert mask.any(1).all(), "a row without a token"
        return self.table(input_ids)

class Patches(nn.Conv2d):
    width = 5
    def __init__(self, config):
        super().__init__(3, 5, config.size // 2, config.size // 2)
    def forward(self, pixels):
        return super().forward(pixels).flatten(2).transpose(1, 2)

def no_width(config):
    return nn.Linear(2, 2)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_encoders_of_test.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_encoders_of_test", raising=False)
    return "my_encoders_of_test"


def test_encoders_of_ones_own(own_module: str) -> None:
    config = replace(
        model_config(),
        text=TextEncoderConfig(build=f"{own_module}:Hash"),
        image=ImageEncoderConfig(build=f"{own_module}:Patches", size=SIZE, max_images=3),
    )
    model = build(config)
    with torch.no_grad():
        alone = torch.cat([model(batch_of(post)) for post in POSTS])
        assert (model(batch_of(*POSTS)) - alone).abs().max() <= 1e-5
    with pytest.raises(UserError, match=r"model.text.build=.*:no_width: must return .* attribute 'width'"):
        build(replace(config, text=TextEncoderConfig(build=f"{own_module}:no_width")))
    with pytest.raises(UserError, match=r"model.image.build=.*:Patch: .* did you mean 'Patches'"):
        build(replace(config, image=ImageEncoderConfig(build=f"{own_module}:Patch")))
    with pytest.raises(UserError, match=r"model.text.build=no_such_module_here:f"):
        build(replace(config, text=TextEncoderConfig(build="no_such_module_here:f")))


# -- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "brt"}, r"model\.text\.config\.model_type=brt: unknown; did you mean 'bert'"),
        ({"hidden_size": 16}, r"model\.text\.config\.model_type: missing"),
        (VIT, r"model\.text\.config\.model_type=vit: does not read input_ids"),
        (
            {**BERT, "hidden_sise": 8},
            r"model\.text\.config\.hidden_sise: no setting of bert; did you mean 'hidden_size'",
        ),
        ({**BERT, "num_attention_heads": 3}, r"model\.text\.config: transformers refuses it"),
        ({**BERT, "hidden_size": "many"}, r"model\.text\.config: transformers refuses it"),
        ({**BERT, "vocab_size": 100}, r"model\.text\.tokenizer: has 259 tokens and the encoder 100"),
        ({**BERT, "max_position_embeddings": 127}, r"model\.text\.max_length=128: .* only 127 positions"),
        # Position 0 of these comes after the id of the padding token: one is lost.
        (
            {**TEXTS["xlm-roberta"], "max_position_embeddings": 128},
            r"model\.text\.max_length=128: .* only 127 positions",
        ),
    ],
)
def test_a_text_encoder_that_cannot_work_is_refused_by_its_key(text: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        build(model_config(text))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"model_type": "vitt"}, r"model\.image\.config\.model_type=vitt: unknown; did you mean 'vit'"),
        (BERT, r"model\.image\.config\.model_type=bert: does not read pixel_values"),
        ({**VIT, "pach_size": 8}, r"model\.image\.config\.pach_size: no setting of vit; did you mean 'patch_size'"),
        ({**VIT, "image_size": 64}, r"model\.image\.size=32: the encoder was made for 64; set model\.image\.size=64"),
        ({**VIT, "patch_size": 64}, r"model\.image\.size=32: the encoder cannot look at such images"),
    ],
)
def test_an_image_encoder_that_cannot_work_is_refused_by_its_key(image: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        build(model_config(image=image))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_pretrained_encoder_that_is_not_there_or_not_whole_is_refused(pretrained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = pretrained_config(pretrained)
    tokenizer = load_tokenizer(config.text)
    nowhere = replace(config, text=TextEncoderConfig(pretrained=str(tmp_path / "nowhere"), max_length=64))
    with pytest.raises(UserError, match=r"model\.text\.pretrained=.*nowhere: neither a folder"):
        build_model(nowhere, TAXONOMY, tokenizer, 0)
    with pytest.raises(UserError, match=r"model\.image\.pretrained=.*text: does not read pixel_values"):
        build_model(
            replace(config, image=replace(config.image, pretrained=str(pretrained / "text"))), TAXONOMY, tokenizer, 0
        )
    with pytest.raises(UserError, match=r"model\.text\.max_length=65: .* only 64 positions"):
        build_model(replace(config, text=replace(config.text, max_length=65)), TAXONOMY, tokenizer, 0)
    weights = load_file(pretrained / "text" / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    (tmp_path / "config.json").write_text((pretrained / "text" / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for 1 parameters .* 'encoder\.layer\.1\.output\.dense\.weight'"
    ):
        build_model(replace(config, text=replace(config.text, pretrained=str(tmp_path))), TAXONOMY, tokenizer, 0)


# -- freezing and layer-wise decay on the names of these encoders


def test_parameters_are_frozen_by_pattern() -> None:
    model = build_model(model_config(), TAXONOMY, load_tokenizer(TextEncoderConfig()), 0)
    freeze(model, ["text.*embeddings*", "image.*"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert "text.encoder.embeddings.word_embeddings.weight" in frozen
    assert not any(name.startswith("text.encoder.encoder.layer") for name in frozen)
    assert all(name in frozen for name, _ in model.named_parameters() if name.startswith("image."))
    # What is frozen still lets the rest learn.
    model.train()
    nn.init.normal_(model.heads.main.logits.weight)
    model(batch_of(*POSTS)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    trained = {
        parameter for group in build_optimizer(model, TrainConfig()).param_groups for parameter in group["params"]
    }
    assert trained == {parameter for parameter in model.parameters() if parameter.requires_grad}
    with pytest.raises(UserError, match=r"train\.freeze: 'text\.encoder\.embeding' matches no parameter; did you mean"):
        freeze(model, ["text.encoder.embeding"])
    with pytest.raises(UserError, match=r"train\.freeze: every parameter is frozen"):
        freeze(model, ["*"])


LAYERS = {
    "bert": ("text.encoder.encoder.layer.{}.", "text.encoder.embeddings.", 2),
    "modernbert": ("text.encoder.layers.{}.", "text.encoder.embeddings.", 2),
    "xlm-roberta": ("text.encoder.encoder.layer.{}.", "text.encoder.embeddings.", 2),
    "t5": ("text.encoder.block.{}.", "text.encoder.embed_tokens.", 2),
    "vit": ("image.encoder.layers.{}.", "image.encoder.embeddings.", 2),
    "convnext": ("image.encoder.encoder.stages.{}.", "image.encoder.embeddings.", 4),
    "siglip": ("image.encoder.encoder.layers.{}.", "image.encoder.embeddings.", 2),
    "clip": ("image.encoder.encoder.layers.{}.", "image.encoder.embeddings.", 2),
}


@pytest.mark.parametrize("kind", ["bert", "modernbert", "t5"])
def test_a_token_may_be_what_several_layers_say_of_it(kind: str) -> None:
    config = model_config(text=TEXTS[kind])
    top, both = build(config), build(replace(config, text=replace(config.text, layers=[1, 2])))
    assert both.text.width == 2 * top.text.width
    assert both.fusion.project["text"].linear.in_features == both.text.width
    both.text.encoder.load_state_dict(top.text.encoder.state_dict())
    batch = batch_of(*POSTS)
    mask = batch.text_mask | ~batch.has_text[:, None]
    lower, upper = both.text(batch.input_ids, mask).chunk(2, dim=-1)
    norm = {"bert": nn.Identity(), "modernbert": "final_norm", "t5": "final_layer_norm"}[kind]
    norm = top.text.encoder.get_submodule(norm) if isinstance(norm, str) else norm
    assert torch.equal(norm(upper), top.text(batch.input_ids, mask))
    assert not torch.allclose(lower, upper, atol=1e-3)
    with pytest.raises(UserError, match=r"model\.text\.layers: 3 is asked for, and the encoder has 2 layers"):
        build(replace(config, text=replace(config.text, layers=[3])))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "albert", "embedding_size": 8, **TINY},
        {"model_type": "longformer", **TINY, "attention_window": 8},
    ],
    ids=["layers that share weights", "texts that are filled up"],
)
def test_the_last_layer_of_encoders_that_keep_it_in_other_ways(settings: dict[str, Any]) -> None:
    config = model_config(text={**settings, "max_position_embeddings": 140})
    top, layer = build(config), build(replace(config, text=replace(config.text, layers=[2])))
    layer.text.encoder.load_state_dict(top.text.encoder.state_dict())
    batch = batch_of(*POSTS)
    ids, mask = batch.input_ids[:, :5], (batch.text_mask | ~batch.has_text[:, None])[:, :5]
    assert torch.equal(layer.text(ids, mask), top.text(ids, mask))


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    """XLM has a list of attentions, one of networks behind them, and so on, of the same length."""
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
    config = model_config(text={"model_type": "xlm", **sizes, "max_position_embeddings": 140})
    with pytest.raises(UserError, match=r"model\.text\.layers: xlm has no layers that can be told apart; leave it out"):
        build(replace(config, text=replace(config.text, layers=[1])))


def test_threads_that_score_at_once_do_not_mix_up_posts() -> None:
    config = model_config()
    tower = build(replace(config, text=replace(config.text, layers=[1, 2]))).text
    mask = torch.ones((1, 5), dtype=torch.bool)
    mine, others = torch.arange(5)[None] + 5, torch.arange(5)[None] + 50
    alone = tower(mine, mask)
    with ThreadPoolExecutor(1) as thread:

        def meanwhile(*_: Any) -> None:
            hook.remove()
            thread.submit(tower, others, mask).result()

        hook = tower.encoder.register_forward_hook(meanwhile)
        assert torch.equal(tower(mine, mask), alone)


def test_no_layer_is_left_out_at_random() -> None:
    """Ranks would leave out different ones, and under ZeRO-3 wait for each other."""
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    model = build(model_config(text={"model_type": "m2m_100", **sizes, "max_position_embeddings": 140}))
    assert model.text.encoder.config.encoder_layerdrop == 0.0


def test_layers_above_the_highest_that_is_looked_at_are_not_loaded(pretrained: Path) -> None:
    config = pretrained_config(pretrained)
    lower = replace(config, text=replace(config.text, layers=[1]))
    tokenizer = load_tokenizer(config.text)
    whole, cut = (build_model(one, TAXONOMY, tokenizer, 0).eval() for one in (config, lower))
    assert [len(model.text.encoder.encoder.layer) for model in (whole, cut)] == [2, 1]
    batch = batch_of(*POSTS)
    ids, mask = (batch.input_ids % 20)[:, :64], (batch.text_mask | ~batch.has_text[:, None])[:, :64]
    every = whole.text.encoder(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert torch.equal(cut.text(ids, mask), every[1])
    assert without_pretrained(lower, cut).text.config["num_hidden_layers"] == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_lower_layers_learn_more_slowly(kind: str) -> None:
    model = build(model_config(**({"text": TEXTS[kind]} if kind in TEXTS else {"image": IMAGES[kind]})))
    names = [name for name, _ in model.named_parameters()]
    factors = layer_factors(names, 0.5)
    layer, embeddings, depth = LAYERS[kind]
    for number in range(depth):
        inside = [name for name in names if name.startswith(layer.format(number))]
        assert inside, names
        assert {factors[name] for name in inside} == {0.5 ** (depth - 1 - number)}
    below = [name for name in names if name.startswith(embeddings)]
    assert below, names
    assert {factors[name] for name in below} == {0.5**depth}
    above = [name for name in names if name.startswith(("fusion.", "heads."))]
    assert {factors[name] for name in above} == {1.0}
    optimizer = build_optimizer(model, TrainConfig(layer_decay=0.5))
    scales = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    assert scales == {id(p): factors[name] for name, p in model.named_parameters() if p.requires_grad}

"""The whole job on real clips, sound and text fields: each of them is learned where nothing else says anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from evaluation_job import ALONE, make_config
from media_posts import WHISPER
from rank_models import alone
from sklearn.metrics import roc_auc_score
from tiny_models import BERT, VIT

from crossguard.configs.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TaxonomyConfig,
    TrainConfig,
)
from crossguard.configs.schema.audio import AudioEncoderConfig
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.configs.schema.video import VideoEncoderConfig
from crossguard.data.curation.attacks import FAMILIES, TextAttacks
from crossguard.data.curation.normalise import VERSION
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.loading.sample import RawSample
from crossguard.data.shards.build import build_shards
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.export.bundle import write_bundle
from crossguard.train.export.predict import predict
from crossguard.train.tokenizers import BYTES, ByteTokenizer
from crossguard.train.training import run_training

PARTS = ("video", "audio", "ocr", "transcript", "comments")
TAXONOMY = TaxonomyConfig(name="parts", policies=[PolicyConfig(f"in_{part}") for part in PARTS])
WORDS = ("mint mint", "lava lava")
POSTS = 240
MODEL = ModelConfig(
    modalities=["text", "image", "video", "audio"],
    modality_dropout=0.1,
    text=TextEncoderConfig(
        config=BERT, tokenizer=BYTES, max_length=16, fields={"ocr": 12, "transcript": 12, "comments": 20}
    ),
    image=ImageEncoderConfig(config=VIT, size=16),
    video=VideoEncoderConfig(frames=2),
    audio=AudioEncoderConfig(config=WHISPER, mel_bins=16, max_seconds=0.5),
    fusion=FusionConfig(width=32, layers=1, heads=2),
)


def write_posts(folder: Path) -> None:
    """Five independent labels: the light of a clip, the pitch of what is heard (in the clip, or a recording of its own),
    and the word in each text field. The caption says nothing; what a post lacks has no label."""
    draw = np.random.default_rng(1)
    lines = []
    for number in range(POSTS):
        values = {part: int(draw.integers(2)) for part in PARTS}
        absent = {part for part in PARTS if draw.random() < 0.1}
        sound = clips.tone((500, 2000)[values["audio"]], 0.4) * draw.uniform(0.3, 1)
        own_track = draw.random() < 0.5 and "video" not in absent and "audio" not in absent
        post: dict[str, Any] = {"id": f"p{number}", "text": str(draw.integers(1000)), "language": "en"}
        if "video" not in absent:
            light = (60, 200)[values["video"]] + draw.integers(-30, 30, 8)
            data = clips.video(light.tolist(), size=(32, 32), codec="mpeg4", sound=sound if own_track else None)
            (folder / f"{number}.mp4").write_bytes(data)
            post["video"] = f"{number}.mp4"
        if "audio" not in absent and not own_track:
            (folder / f"{number}.flac").write_bytes(clips.recording(sound))
            post["audio"] = f"{number}.flac"
        for part in ("ocr", "transcript"):
            post[part] = None if part in absent else WORDS[values[part]]
        post["comments"] = [] if "comments" in absent else ["+1", WORDS[values["comments"]]]
        post["labels"] = {f"in_{part}": None if part in absent else values[part] for part in PARTS}
        post["split"] = "train" if number < 160 else "test"
        lines.append(json.dumps(post))
    # What a look at its middle does not find when shards are built.
    (folder / "bad.mp4").write_bytes(half_bad())
    lines.append(json.dumps({"id": "bad", "video": "bad.mp4", "labels": {"in_video": 1}, "split": "test"}))
    (folder / "posts.jsonl").write_text("\n".join(lines))


def half_bad() -> bytes:
    """A clip that is whole up to its middle."""
    draw = np.random.default_rng(2)
    data = bytearray(clips.pictures(draw.integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)))
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    place = start + (end - start) * 6 // 10
    data[place:end] = b"\x55" * (end - place)
    return bytes(data)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Shards are there."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "posts").mkdir()
    write_posts(folder / "posts")
    config = make_config(
        folder / "posts",
        folder / "run",
        taxonomy=TAXONOMY,
        data=DataConfig(path=str(folder / "posts"), shards=str(folder / "shards")),
        model=MODEL,
        train=TrainConfig(max_steps=60, batch_size=32, lr=1e-2, warmup_steps=5, num_workers=0),
        evaluation=EvaluationConfig(batch_size=16, min_positives=3, slices=["modality"]),
        checkpoint=CheckpointConfig(every_steps=0),
        ablations={},
    )
    manifest = build_shards(config, folder / "shards", folder / "quarantine.jsonl")
    assert manifest.refused == 0
    return config


def test_videos_sound_and_every_field_are_learned_through_the_whole_job(config: Config) -> None:
    run_dir = Path(config.run_dir)
    run_training(config, alone())
    run_evaluation(config, ALONE)
    evaluated = Predictions.read(run_dir / "predictions" / "test.parquet")
    known = ~np.isnan(evaluated.labels)
    for column, part in enumerate(PARTS):
        rows = known[:, column]
        assert roc_auc_score(evaluated.labels[rows, column], evaluated.scores[rows, column]) > 0.9, part
    report = json.loads((run_dir / "report" / "metrics.json").read_text())
    groups = report["splits"]["test"]["policies"]["in_ocr"]["by_slice"]["modality"]
    assert {"text+video", "text+video+audio"} <= set(groups)
    write_bundle(config, run_dir)
    predict(run_dir / "bundle", config.data, run_dir / "all.parquet", batch_size=7)
    predicted = Predictions.read(run_dir / "all.parquet")
    rows = {post: row for row, post in enumerate(predicted.ids)}
    same = [rows[post] for post in evaluated.ids]
    np.testing.assert_allclose(predicted.scores[same], evaluated.scores, atol=1e-5)
    for quarantine in (run_dir / "quarantine.jsonl", run_dir / "all.parquet.quarantine.jsonl"):
        (refused,) = map(json.loads, quarantine.read_text().splitlines())
        assert refused["id"] == "bad"
        assert refused["reason"].startswith("damaged, truncated or of an unknown format")
    assert "bad" not in [*evaluated.ids, *predicted.ids]
    assert len(evaluated) == 80


def raw(**values: Any) -> RawSample:
    return RawSample({"id": "p", "labels": {}}, **values)


def encoder(**changes: Any) -> PostEncoder:
    return PostEncoder(replace(MODEL, **changes), Taxonomy.from_config(TAXONOMY))


def said(sample: EncodedSample) -> list[str]:
    """The texts of each segment; control characters stand for special tokens."""
    assert sample.input_ids is not None
    assert sample.segments is not None
    tokens = np.maximum(sample.input_ids - ByteTokenizer.first_byte_id, 0).astype(np.uint8)
    return [bytes(tokens[sample.segments == field].tolist()).decode().replace("\0", "|") for field in range(4)]


def test_fields_are_one_sequence_with_a_budget_for_each() -> None:
    encode = encoder()
    texts = {"comments": ["first", "second one", "third that is too long"], "ocr": "SALE " * 9, "transcript": "hello"}
    sample = encode(raw(text="caption", texts=texts))
    assert said(sample) == ["|caption|", "SALE SALE S|", "hello|", "first|second one|th|"]
    assert encode.text_length(raw(text="caption", texts=texts)) == len(
        sample.input_ids if sample.input_ids is not None else []
    )
    assert said(encode(raw(texts={"transcript": "hello"}))) == ["||", "", "hello|", ""]
    assert said(encode(raw(text="caption"))) == ["|caption|", "", "", ""]
    assert encode(raw()).input_ids is None
    assert encode.text_length(raw()) == 0
    captions = encoder(text=replace(MODEL.text, fields={}))
    alone = captions(raw(text="caption", texts=texts))
    assert alone.segments is None
    assert alone.input_ids is not None
    assert np.array_equal(alone.input_ids, np.array(encode(raw(text="caption")).input_ids))
    assert captions(raw(texts=texts)).input_ids is None
    assert len({made.fingerprint for made in (encode, captions)}) == 2


def test_what_users_write_is_disguised_and_normalised_but_no_transcript() -> None:
    attacks = TextAttacks(1.0, tuple(FAMILIES), seed=1)
    taxonomy = Taxonomy.from_config(TAXONOMY)
    text = replace(MODEL.text, max_length=200, fields=dict.fromkeys(("ocr", "transcript", "comments"), 200))
    words = "people should never listen to nobody"
    post = raw(text=words, texts={"ocr": words, "transcript": words, "comments": [words, words]})
    sample = PostEncoder(replace(MODEL, text=text), taxonomy, attacks=attacks)(post, position=5)
    caption, ocr, transcript, comments = said(sample)
    assert transcript == f"{words}|"
    first, second, _ = comments.split("|")
    assert len({caption.strip("|"), ocr.strip("|"), first, second, words}) == 5
    normalising = PostEncoder(replace(MODEL, text=replace(text, normaliser=VERSION)), taxonomy)
    disguised = raw(text="h.a.t.e", texts={"ocr": "h.a.t.e", "transcript": "h.a.t.e", "comments": ["h.a.t.e"]})
    assert said(normalising(disguised)) == ["|hate|", "hate|", "h.a.t.e|", "hate|"]


def test_sound_is_that_of_the_recording_or_else_of_the_video() -> None:
    encode = encoder()
    low, high = clips.tone(500, 0.4), clips.tone(2000, 0.4)
    video, silent = clips.video([0] * 8, sound=high), clips.video([0] * 8)
    heard = {
        name: encode(raw(**media)).sound
        for name, media in {
            "both": {"audio": clips.recording(low), "video": video},
            "video": {"video": video},
            "silent": {"video": silent},
        }.items()
    }
    assert heard["silent"] is None
    assert heard["both"] is not None
    assert heard["video"] is not None
    assert heard["both"].mean(axis=1).argmax() < heard["video"].mean(axis=1).argmax()
    clip = encode(raw(video=silent)).clip
    assert clip is not None
    assert [frame.shape for frame in clip.frames] == [(16, 16, 3)] * 2
    deaf = encoder(modalities=["text"])(raw(text="t", video=b"no video", audio=b"no sound"))
    assert deaf.clip is None
    assert deaf.sound is None

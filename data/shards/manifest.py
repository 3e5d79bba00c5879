"""The manifest: what a set of shards holds. Canonical JSON with its own hash, without time, host or absolute path."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.data.records import canonical_json
from crossguard.data.shards.files import write_atomic
from crossguard.data.taxonomy import Taxonomy

FORMAT = 4
FILE_NAME = "manifest.json"
VERSIONS_FOLDER = "manifests"  # of earlier manifests, by their hashes


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar and the index beside it."""

    path: str  # of the tar, relative to the shards' folder: <split>/<shard>.tar
    bytes: int
    samples: int
    sha256: str
    index_sha256: str
    strata: dict[str, int]  # samples of each stratum
    labels: dict[str, list[float]]  # of each "<language>/<policy>": the known labels, and their sum

    @property
    def split(self) -> str:
        """The split whose posts it holds."""
        return self.path.partition("/")[0]

    @property
    def index_path(self) -> str:
        """Path of the index, relative to the shards' folder."""
        return f"{self.path.removesuffix('.tar')}.idx"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that training and evaluation need to know before they open a shard."""

    taxonomy: Taxonomy
    rarity: tuple[str, ...]  # the policies, rarest first in the training split
    strata: tuple[str, ...]  # "<language>/<policy or benign or unknown>"; an index row names one by its number
    shards: tuple[ShardInfo, ...]  # those of the parent, then new ones in the order of their paths
    left_out: dict[str, int]  # posts that were not written, by the rule that left them out
    refused: int  # posts that were not written because their media is missing or corrupt
    inputs: str  # hash of the posts and of the settings that decide the bytes
    parent: str = ""  # sha256 of the manifest that this one appends to
    version: int = 1  # one more than the parent's
    format: int = FORMAT
    sha256: str = ""  # of the canonical JSON of everything above

    @classmethod
    def load(cls, shards_dir: Path, name: str = FILE_NAME) -> Manifest:
        """The manifest in a shards' folder, or the earlier one that `version_name` names.

        Raises:
            UserError: it is missing, damaged, or of a format that this version does not know.
        """
        path = shards_dir / name
        return cls.read(path.read_bytes, str(path))

    @classmethod
    def read(cls, read: Callable[[], bytes], path: str) -> Manifest:
        """The manifest whose content `read` gives; `path` names it in errors. Raises as `load` does."""
        try:
            value = json.loads(read())
            found = value["format"]
        except FileNotFoundError:
            raise UserError(f"{path}: not found; build the shards first, or set data.shards to their folder") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({type(error).__name__}); remove the folder and build again"
            ) from error
        if found != FORMAT:
            raise UserError(
                f"{path}: format {found}, this crossguard reads {FORMAT}; remove the folder and build again"
            )
        sha256 = value.pop("sha256", "")
        if sha256 != _hash(value):
            raise UserError(
                f"{path}: damaged, its content does not match its own hash; remove the folder and build again"
            )
        return cls(
            taxonomy=Taxonomy.from_json(value["taxonomy"]),
            rarity=tuple(value["rarity"]),
            strata=tuple(value["strata"]),
            shards=tuple(ShardInfo(**shard) for shard in value["shards"]),
            left_out=value["left_out"],
            refused=value["refused"],
            inputs=value["inputs"],
            parent=value["parent"],
            version=value["version"],
            sha256=sha256,
        )

    def save(self, shards_dir: Path, staging: Path | None = None) -> Manifest:
        """Swap the manifest in, atomically (by way of the folder `staging`), and return it with its hash."""
        sealed = replace(self, sha256=_hash(self._content()))
        write_atomic(shards_dir / FILE_NAME, sealed.encode(), staging)
        return sealed

    def encode(self) -> bytes:
        """The file's bytes."""
        return canonical_json({**self._content(), "sha256": self.sha256}) + b"\n"

    def keep(self, shards_dir: Path, staging: Path | None = None) -> None:
        """Keep the manifest that is in place among the earlier ones, for when another takes its place."""
        path = shards_dir / version_name(self.sha256)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, self.encode(), staging)

    def _content(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "taxonomy": self.taxonomy.to_json(),
            "rarity": list(self.rarity),
            "strata": list(self.strata),
            "shards": [asdict(shard) for shard in self.shards],
            "left_out": self.left_out,
            "refused": self.refused,
            "inputs": self.inputs,
            "parent": self.parent,
            "version": self.version,
        }

    @property
    def splits(self) -> dict[str, int]:
        """Samples of each split, by name."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[shard.split] += shard.samples
        return dict(sorted(counts.items()))

    def shards_of(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split, in order; empty for a split that nobody built."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def check_taxonomy(self, taxonomy: Taxonomy) -> None:
        """Check that the shards were built with `taxonomy` (descriptions may differ).

        Raises:
            UserError: naming the first difference.
        """
        ours = self.taxonomy
        remedy = "use the taxonomy of the shards, or build shards of your own with data.shards=NEW_FOLDER"
        if (ours.name, ours.version) != (taxonomy.name, taxonomy.version):
            raise UserError(
                f"taxonomy: the shards were built with '{ours.name}' version {ours.version}, "
                f"the recipe names '{taxonomy.name}' version {taxonomy.version}; {remedy}"
            )
        if ours.names != taxonomy.names:
            gone, new = [n for n in ours.names if n not in taxonomy.names], set(taxonomy.names) - set(ours.names)
            parts = [f"missing in the recipe: {', '.join(gone)}"] if gone else []
            parts += [f"missing in the shards: {', '.join(sorted(new))}"] if new else []
            what = "; ".join(parts) or f"another order ({', '.join(ours.names)})"
            raise UserError(f"taxonomy '{ours.name}': its policies differ from those of the shards, {what}; {remedy}")
        for one, other in zip(ours.policies, taxonomy.policies, strict=True):
            if (one.parent, one.severity_levels) != (other.parent, other.severity_levels):
                raise UserError(
                    f"taxonomy '{ours.name}': '{one.name}' has parent {one.parent or 'none'} and {one.severity_levels} "
                    f"levels of severity in the shards, {other.parent or 'none'} and {other.severity_levels} in the "
                    f"recipe; {remedy}"
                )


def version_name(sha256: str) -> str:
    """Where an earlier manifest is kept, relative to the shards' folder."""
    return f"{VERSIONS_FOLDER}/{sha256}.json"


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()

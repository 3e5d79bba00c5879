"""Shards that were built here, put behind a URL: the manifest last, so that what has one is complete."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.progress import progress
from crossguard.data.shards import manifest as manifests
from crossguard.data.shards.folder import has_manifest, read_manifest
from crossguard.data.shards.manifest import Manifest
from crossguard.data.shards.remote import Remote

UPLOADS_AT_ONCE = 8


def publish(shards_dir: Path, manifest: Manifest, url: str) -> None:
    """Upload the shards of a folder.

    What was uploaded is noted beside the folder: a publication that was killed goes on where it stopped.

    Args:
        shards_dir: the folder; `<shards_dir>.published` is written beside it.
        manifest: what lies in it.
        url: where the shards belong.

    Raises:
        UserError: other shards lie there, the bucket does not exist, or it may not be written.
        JobError: the storage fails.
    """
    remote = Remote(url.rstrip("/"))
    before = set(_files(read_manifest(remote.url)).items()) if has_manifest(remote.url) else set()
    files = _files(manifest)
    if not before <= files.items():
        raise UserError(
            f"{url}: holds shards of other posts or settings, which are never overwritten; "
            "remove them, or choose another place with data.shards=URL"
        )
    noted = shards_dir.with_name(f"{shards_dir.name}.published")
    left = _left(shards_dir, remote, files, before | _read(noted, remote))
    try:
        with (
            progress("publish", len(files), "files", done=len(files) - len(left)) as shown,
            noted.open("a", encoding="utf-8") as log,
            ThreadPoolExecutor(UPLOADS_AT_ONCE) as threads,
        ):
            uploads = {threads.submit(remote.upload, shards_dir / path, path): path for path in left}
            try:
                for upload in as_completed(uploads):
                    upload.result()
                    path = uploads[upload]
                    print(files[path], remote.url, path, sep="\t", file=log, flush=True)
                    shown.advance()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        for earlier in sorted((shards_dir / manifests.VERSIONS_FOLDER).glob("*.json")):
            remote.upload(earlier, f"{manifests.VERSIONS_FOLDER}/{earlier.name}")
        remote.upload(shards_dir / manifests.FILE_NAME, manifests.FILE_NAME)
    except FileNotFoundError as error:
        raise UserError(f"{url}: the bucket or a folder does not exist; make it, or change data.shards") from error


def _files(manifest: Manifest) -> dict[str, str]:
    """Path -> SHA-256 of all tars and indexes."""
    return {shard.path: shard.sha256 for shard in manifest.shards} | {
        shard.index_path: shard.index_sha256 for shard in manifest.shards
    }


def _left(shards_dir: Path, remote: Remote, files: dict[str, str], done: set[tuple[str, str]]) -> list[str]:
    """The paths that are not there yet, or with another content or size."""
    sizes = {
        path: size for split in {path.partition("/")[0] for path in files} for path, size in remote.sizes(split).items()
    }
    return [
        path
        for path, sha256 in files.items()
        if (path, sha256) not in done or sizes.get(path) != (shards_dir / path).stat().st_size
    ]


def _read(noted: Path, remote: Remote) -> set[tuple[str, str]]:
    """(path, SHA-256) of what was uploaded to this place before; a line that a kill has torn does not count."""
    if not noted.exists():
        return set()
    lines = [line.split("\t") for line in noted.read_text(encoding="utf-8").splitlines()]
    return {(fields[2], fields[0]) for fields in lines if len(fields) == 3 and fields[1] == remote.url}

"""Files behind a URL that fsspec opens: s3://, gs://, abfs:// and others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crossguard.configs.errors import UserError
from crossguard.data.shards.storage import explain, with_retries

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Remote:
    """A folder behind a URL; can be sent to other processes.

    Every method raises FileNotFoundError where the file (or the bucket) does not exist, UserError where access is
    refused, a package is missing or the URL is wrong, and JobError where the storage fails however often it is tried.
    """

    url: str  # without a slash at its end

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        content: bytes = self._do(path, lambda store, full: store.cat_file(full))
        return content

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        try:
            self._do(path, _info)
        except FileNotFoundError:
            return False
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """Path -> bytes of the files in a folder, as they are now; empty when there is no such folder."""
        return {f"{folder}/{name}": entry["size"] for name, entry in self._listing(folder, "file").items()}

    def files(self) -> list[str]:
        """The paths of all files in all folders, as they are now."""

        def find(store: Any, full: str) -> list[str]:
            store.invalidate_cache()
            root = full.rstrip("/")
            return [path.removeprefix(f"{root}/") for path in store.find(root)]

        return self._do("", find)

    def folders(self) -> list[str]:
        """The names of the folders, as they are now."""
        return sorted(self._listing("", "directory"))

    def download(self, path: str, target: Path) -> None:
        """Write a file's content to `target`."""
        self._do(path, lambda store, full: store.get_file(full, str(target)), f" -> {target}")

    def upload(self, source: Path, path: str) -> None:
        """Put the content of `source` there."""

        def put(store: Any, full: str) -> None:
            # Object stores, whose clients are asynchronous, have no folders: some would make a bucket instead.
            if not store.async_impl:
                store.makedirs(full.rpartition("/")[0], exist_ok=True)
            store.put_file(str(source), full)

        self._do(path, put)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, where it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._do(path, lambda store, full: store.rm(full, recursive=True))

    def _listing(self, folder: str, kind: str) -> dict[str, Any]:
        """Name -> entry of what is in a folder of a kind; empty when there is no such folder."""

        def listing(store: Any, full: str) -> dict[str, Any]:
            store.invalidate_cache()
            entries = store.ls(full.rstrip("/"), detail=True)
            return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries if entry["type"] == kind}

        try:
            return self._do(folder, listing)
        except FileNotFoundError:
            return {}

    def _do(self, path: str, act: Callable[[Any, str], T], towards: str = "") -> T:
        place = f"{self.url}/{path}{towards}"

        def attempt() -> T:
            store, root = _open(self.url)
            try:
                return act(store, f"{root}/{path}")
            except Exception as error:
                raise _os_error(error) from error

        return with_retries(place, attempt)


def _info(store: Any, full: str) -> Any:
    store.invalidate_cache()
    return store.info(full)


def _open(url: str) -> tuple[Any, str]:
    """The store behind a URL, and the folder in it. fsspec keeps one instance of each store."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None) or str(error)
        raise UserError(f"{url}: the package that opens it is missing; pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{url}: cannot be opened ({explain(error)}); check the URL") from error


def _os_error(error: Exception) -> Exception:
    """Stores raise errors of their libraries (botocore's, aiohttp's, …) beside OSErrors: make them one kind."""
    if isinstance(error, OSError) or type(error).__module__ == "builtins":
        return error
    if "Credentials" in type(error).__name__:
        return PermissionError(explain(error))
    return OSError(explain(error))

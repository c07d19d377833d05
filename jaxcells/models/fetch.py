"""ImageNet weights from the hub: fetched once, resumed when broken off, checked by SHA-256."""

import dataclasses
import hashlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from jaxcells.files import Error

logger = logging.getLogger("jaxcells")

HUB_URL = "https://huggingface.co"
# For each address of the host, and for each silence: a machine without network learns it soon.
_TIMEOUT_S = 10.0
_CHUNK_BYTES = 1 << 20


class WeightsUnavailableError(Error):
    """Weights are neither in the cache nor to be had from the network."""


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file on the hub.

    Attributes:
      repo: "owner/name".
      filename: its name there.
      sha256: hash of its content, in hexadecimal.
      num_bytes: its size; None: not known.
    """

    repo: str
    filename: str
    sha256: str
    num_bytes: int | None

    @property
    def cache_name(self) -> str:
        """What the file is called in the cache."""
        return self.repo.rsplit("/", 1)[-1] + Path(self.filename).suffix


# torchvision's IMAGENET1K_V1 weights (BSD-3-Clause) as timm publishes them, the same generation for
# all depths; the only safetensors of ResNet-101 to be found are of another one (V2).
IMAGENET_WEIGHTS = {
    "resnet18": HubFile(
        "timm/resnet18.tv_in1k",
        "model.safetensors",
        "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
        46807446,
    ),
    # This hash has one source only; the others have two.
    "resnet34": HubFile(
        "timm/resnet34.tv_in1k",
        "model.safetensors",
        "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
        87278522,
    ),
    "resnet50": HubFile(
        "timm/resnet50.tv_in1k",
        "model.safetensors",
        "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
        102469840,
    ),
    "resnet152": HubFile(
        "timm/resnet152.tv_in1k",
        "model.safetensors",
        "15897077afdf4d6334dc0c3f8e6fb483afb3faa9298c139f3c6eb29bca6ae5b2",
        None,
    ),
}


def fetch_imagenet(
    name: str, *, cache: str | os.PathLike[str] | None = None, base_url: str = HUB_URL
) -> Path:
    """Returns the safetensors file with the ImageNet weights of a network, fetched if need be.

    Args:
      name: the network, such as "resnet34".
      cache: folder of fetched files; None: `cache_folder()`.
      base_url: address of the hub.

    Raises:
      WeightsUnavailableError: not in the cache, and the network does not give it.
      Error: no such weights are offered, or a file that is not what it should be.
    """
    if name not in IMAGENET_WEIGHTS:
        raise Error(
            f"ImageNet weights are offered for {', '.join(IMAGENET_WEIGHTS)}, not for {name}; give "
            "a file of timm or torchvision as --config.init=FILE.safetensors, or "
            "--config.init=random"
        )
    file = IMAGENET_WEIGHTS[name]
    return fetch(
        f"{base_url}/{file.repo}/resolve/main/{file.filename}",
        (cache_folder() if cache is None else Path(cache).expanduser()) / file.cache_name,
        sha256=file.sha256,
        num_bytes=file.num_bytes,
    )


def cache_folder() -> Path:
    """Returns where fetched files are kept: `$JAXCELLS_CACHE`, or jaxcells in the user's cache."""
    if own := os.environ.get("JAXCELLS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcells"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal.

    Raises:
      Error: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Error(f"{path}: cannot be read ({_reason(error)}); check the path") from error


def fetch(url: str, path: Path, *, sha256: str, num_bytes: int | None = None) -> Path:
    """Returns `path`, downloaded from `url` if it is not there, with its content checked.

    What a broken download has brought is kept in `<path>.partial`, and the next one goes on from
    there. `path` itself is only ever whole. Several processes may fetch one file at a time.

    Args:
      url: http or https address.
      path: where the file is or will be.
      sha256: hash of its content, in hexadecimal.
      num_bytes: its size, for the log; None: not known.

    Raises:
      WeightsUnavailableError: the file is not there and the network does not give it.
      Error: the file, or what the network gave, has another hash; or the folder cannot be written.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                # Another process may have brought it while this one waited.
                if not path.exists():
                    size = f" ({num_bytes / 1e6:.0f} MB)" if num_bytes else ""
                    logger.info("downloading %s%s from %s", path.name, size, url)
                    _download(url, path, sha256)
                    return path
        except OSError as error:
            raise _unwritable(path, error) from error
    if (found := file_sha256(path)) != sha256:
        raise Error(
            f"{path}: has the SHA-256 {found} and should have {sha256}; delete the file to have it "
            "downloaded again"
        )
    return path


def _download(url: str, path: Path, sha256: str) -> None:
    """Downloads `url` to `path` by way of `<path>.partial`."""
    partial = path.with_name(f"{path.name}.partial")
    most, discarded = _size(partial), False
    while True:
        try:
            resumed = _receive(url, partial)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            # A line that breaks is taken up again as long as each try brings the file further.
            if not isinstance(error, urllib.error.HTTPError) and _size(partial) > most:
                most = _size(partial)
                continue
            raise WeightsUnavailableError(
                f"cannot download {path.name} from {url} ({_reason(error)}); put a copy with the "
                f"SHA-256 {sha256} at {path}, or do without: --config.init=random"
            ) from error
        found = file_sha256(partial)
        if found == sha256:
            os.replace(partial, path)
            return
        partial.unlink()
        if not resumed or discarded:
            raise Error(
                f"{url} gave a file with the SHA-256 {found} instead of {sha256}, and it was "
                f"removed; put a copy of the right one at {path}, or do without: "
                "--config.init=random"
            )
        # The first part was of another file or damaged: once more, from the beginning.
        most, discarded = 0, True


def _receive(url: str, partial: Path) -> bool:
    """Appends what is missing of `url` to `partial`, or writes it anew; returns whether appended.

    Raises:
      OSError, http.client.HTTPException: anything wrong with the network.
      Error: `partial` cannot be written.
    """
    offset = _size(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "jaxcells"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            error.close()
            return True  # Nothing is missing: whole, or too long.
        raise
    with response:
        append = response.status == http.HTTPStatus.PARTIAL_CONTENT
        content_range = response.headers.get("Content-Range", "")
        if append and not re.match(rf"bytes {offset}-", content_range):
            raise http.client.HTTPException(f"asked for {offset}-, got {content_range!r}")
        position = offset if append else 0
        total = None if response.length is None else position + response.length
        try:
            # Unbuffered: what does not fit on the disk shows in the write, not when closing.
            file = open(partial, "ab" if append else "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _unwritable(partial, error) from error
        with (
            file,
            tqdm(
                desc=partial.stem,
                total=total,
                initial=position,
                unit="B",
                unit_scale=True,
                disable=None,
                leave=False,
            ) as bar,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                rest = memoryview(chunk)
                while rest:
                    try:
                        rest = rest[file.write(rest) :]
                    except OSError as error:
                        raise _unwritable(partial, error) from error
                position += len(chunk)
                bar.update(len(chunk))
    if total is not None and position < total:
        raise ConnectionError(f"the connection broke off after {position} of {total} bytes")
    return append


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unwritable(path: Path, error: OSError) -> Error:
    return Error(
        f"{path}: cannot be written ({_reason(error)}); make room there, or set the environment "
        "variable JAXCELLS_CACHE to another folder"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())

"""ImageNet weights from the Hugging Face hub: fetched once, and checked by their SHA-256."""

import logging
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from jaxcells.files import Error, file_sha256, logger
from jaxcells.text import one_line

# torchvision's IMAGENET1K_V1 weights (BSD-3-Clause) as timm publishes them, the same generation for
# all depths; the only safetensors of ResNet-101 to be found are of another one (V2). The SHA-256 of
# timm/<name>.tv_in1k/model.safetensors is the pin: nothing else is taken, whatever "main" may hold.
IMAGENET_WEIGHTS = {
    "resnet18": "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
    # This hash has one source only; the others have two.
    "resnet34": "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
    "resnet50": "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
    "resnet152": "15897077afdf4d6334dc0c3f8e6fb483afb3faa9298c139f3c6eb29bca6ae5b2",
}


class WeightsUnavailableError(Error):
    """Weights are neither in the cache nor to be had from the network."""


def fetch_imagenet(name: str, *, endpoint: str | None = None) -> Path:
    """Returns the safetensors file with the ImageNet weights of a network, fetched if need be.

    It lies in `$JAXCELLS_CACHE`, or in `jaxcells` in the user's cache; a copy that was put there by
    hand is as good. Processes that want the same file wait for the one that fetches it.

    Args:
      name: the network, such as "resnet34".
      endpoint: address of the hub; None: `$HF_ENDPOINT`, or that of Hugging Face.

    Raises:
      WeightsUnavailableError: not in the cache, and the network does not give it.
      Error: no such weights are offered, or a file that is not what it should be.
    """
    if name not in IMAGENET_WEIGHTS:
        raise Error(
            f"ImageNet weights are offered for {', '.join(IMAGENET_WEIGHTS)}, not for {name}; set "
            "init=random, or init=FILE.safetensors with a file of timm or torchvision"
        )
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("JAXCELLS_CACHE") or Path(cache, "jaxcells")).expanduser()
    path, sha256 = folder / f"{name}.tv_in1k.safetensors", IMAGENET_WEIGHTS[name]
    if not path.exists():
        _download(f"timm/{name}.tv_in1k", path, sha256, endpoint)
    if (found := file_sha256(path)) != sha256:
        raise Error(
            f"{path}: has the SHA-256 {found} and should have {sha256}; delete it to have it "
            "downloaded again, put a right copy there, or do without: init=random"
        )
    return path


def _download(repo: str, path: Path, sha256: str, endpoint: str | None) -> None:
    """Downloads `model.safetensors` of a repository to `path`, where it is only ever whole."""
    # The other way of the library, Xet, has neither the timeouts nor the errors of HTTP.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    # Late: it takes a quarter of a second.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    url = hf_hub_url(repo, "model.safetensors", endpoint=endpoint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(f"{path}.lock"),
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as partial,
        ):
            if path.exists():  # Another process has brought it while this one waited.
                return
            # The download itself tries for minutes to reach a hub that this does not reach.
            get_hf_file_metadata(url, token=False)
            logger.info("downloading %s from %s", path.name, url)
            file = hf_hub_download(
                repo, "model.safetensors", local_dir=partial, token=False, endpoint=endpoint
            )
            os.replace(file, path)
    # The base of the HTTP library's own errors, which has changed from version to version.
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        raise WeightsUnavailableError(
            f"cannot download {path.name} from {url} ({one_line(error)}); put a copy with the "
            f"SHA-256 {sha256} at {path}, choose another folder by the environment variable "
            "JAXCELLS_CACHE, or do without: init=random"
        ) from error

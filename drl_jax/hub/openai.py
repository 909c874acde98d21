"""OpenAI's files of CLIP: where they are, and their download, which is verified and resumes."""

import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256

_SERVER = "https://openaipublic.azureedge.net/clip/models"
# SHA-256 of each file; it is also part of its URL.
MODELS = {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


class DownloadError(UserError):
    """A download failed; a partial download is kept."""


def cached(model: str) -> Path:
    """The file of a model in the cache of OpenAI's package; or as `download`, its download."""
    download(url_of(model), MODELS[model], target := _cached_path(model))
    return target


def is_cached(model: str) -> bool:
    """Whether `cached` downloads nothing."""
    return _cached_path(model).exists()


def _cached_path(model: str) -> Path:
    return Path("~/.cache/clip").expanduser() / url_of(model).rsplit("/", 1)[1]


def url_of(model: str) -> str:
    """URL of a model's weights on OpenAI's server."""
    return f"{_SERVER}/{MODELS[model]}/{model.replace('/', '-').replace('@', '-')}.pt"


def download(url: str, digest: str, target: Path) -> None:
    """Downloads a file unless it exists; `target` is created only after verification.

    Args:
      url: URL of the file.
      digest: expected SHA-256 of the file, hexadecimal.
      target: path of the file; a partial download is in `target`.part and is continued.

    Raises:
      DownloadError: no connection, an error from the server, or a file with another digest.
    """
    if target.exists():
        if sha256(target) == digest:
            return
        raise DownloadError(f"{target} exists but is a different file; move or delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    done = total = unfinished.stat().st_size if unfinished.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if done and response.status != 206:
                done = 0  # The server does not support ranges and sends the whole file.
            total = done + int(response.headers.get("Content-Length", 0))
            bar = tqdm(total=total, initial=done, desc=target.name, unit="B", unit_scale=True)
            with unfinished.open("ab" if done else "wb") as file, bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # The partial download is already complete.
            raise DownloadError(f"{url}: the server returned status {error.code}") from error
    except OSError as error:
        raise DownloadError(
            f"cannot download {url} ({getattr(error, 'reason', error)}); rerun the command to"
            f" continue, or copy the file to {target} on a machine without internet"
        ) from error
    if (found := sha256(unfinished)) != digest:
        if total > unfinished.stat().st_size:
            problem = "ended early; rerun the command to continue"
            raise DownloadError(f"the download of {target.name} {problem}")
        unfinished.unlink()
        problem = f"a file with SHA-256 {found}, not {digest}; deleted the file"
        raise DownloadError(f"{url} returned {problem}")
    unfinished.rename(target)

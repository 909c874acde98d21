"""Downloads OpenAI's CLIP weights, checks them, and continues where it was interrupted.

python -m data_prep.download_clip ViT-B/32 --out=weights
"""

import argparse
import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from drl_jax.runtime.errors import UserError

_SERVER = "https://openaipublic.azureedge.net/clip/models"
# sha256 of each file; it is also part of its address.
MODELS = {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
_CHUNK = 2**20


class DownloadError(UserError):
    """A download that did not give the file; what it gave so far is kept."""


def address_of(model: str) -> str:
    """Where OpenAI keeps a model's weights."""
    return f"{_SERVER}/{MODELS[model]}/{model.replace('/', '-').replace('@', '-')}.pt"


def download(address: str, sha256: str, target: Path) -> None:
    """Downloads a file, unless it is there already; `target` appears only once it is checked.

    Args:
      address: its URL.
      sha256: hexadecimal digest of the whole file.
      target: its path; an interrupted download continues in `target`.part.

    Raises:
      DownloadError: no connection, the server refuses, or the file is not the one expected.
    """
    if target.exists():
        if _sha256(target) == sha256:
            return
        raise DownloadError(f"{target} is there, but is another file; move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    done = total = unfinished.stat().st_size if unfinished.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if done and response.status != 206:
                done = 0  # the server sends the whole file
            total = done + int(response.headers.get("Content-Length", 0))
            with (
                unfinished.open("ab" if done else "wb") as file,
                tqdm(
                    total=total, initial=done, desc=target.name, unit="B", unit_scale=True
                ) as progress,
            ):
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    progress.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is whole already: nothing is left to send
            raise DownloadError(f"{address}: the server answers {error.code}") from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"cannot download {address} ({reason}); on a machine without internet, copy the file"
            f" to {target} yourself. What has come so far is kept"
        ) from error
    if (found := _sha256(unfinished)) != sha256:
        if total > unfinished.stat().st_size:
            raise DownloadError(f"the download of {target.name} stopped early; run it again")
        unfinished.unlink()
        raise DownloadError(f"{address} gave a file with sha256 {found}, not {sha256}; removed it")
    unfinished.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("data_prep.download_clip", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder for the file")
    options = parser.parse_args(arguments)
    address = address_of(options.model)
    target = options.out / address.rsplit("/", 1)[1]
    try:
        download(address, MODELS[options.model], target)
    except UserError as error:
        print(f"data_prep.download_clip: {error}", file=sys.stderr)
        return 1
    print(f"{target}; train with --config.model.init={target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

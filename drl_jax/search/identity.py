"""What an index belongs to: a model, a folder of videos, a storage, a bank, a shard."""

from collections.abc import Sequence
from pathlib import Path

from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import bank_of
from drl_jax.search.format_2 import made_with
from drl_jax.search.hubness import check_bank, write_bank
from drl_jax.search.rows import SearchIndexError
from drl_jax.search.video_files import Shard
from drl_jax.search.writer import IndexWriter


def check_identity(
    writer: IndexWriter,
    model: RetrievalModel,
    videos: Path,
    storage: str,
    bank: Sequence[str],
    shard: Shard | None,
) -> None:
    """Writes the header of a new index, or checks that an index matches; upgrades old formats."""
    folder, header = str(videos.resolve()), writer.header
    if not header:
        writer.update_header(
            source=model.source,
            fingerprint=model.fingerprint,
            videos=folder,
            storage=storage,
            bank=bank_of(model.config),
            **({"hubness": write_bank(writer.directory, bank)} if bank else {}),
            **({"shard": str(shard)} if shard else {}),
        )
        return
    # A folder that is not there any more may have been moved.
    is_folder = header["videos"] == folder or not Path(header["videos"]).is_dir()
    for matches, other in (
        (made_with(header, model), "model"),
        (is_folder, f"folder, {header['videos']}"),
        (header["storage"] == storage, f"storage, {header['storage']}"),
        (
            shard is None or header.get("shard") == str(shard),
            f"--shard, {header.get('shard', 'all files')}",
        ),
    ):
        if not matches:
            raise SearchIndexError(
                f"the index {writer.directory} was made with another {other}; give another --index,"
                " or delete it"
            )
    if bank:
        check_bank(writer.directory, header, bank)
    is_counted = {"rows", "windows"} <= header.keys()
    if not header["fingerprint"] or header["videos"] != folder or not is_counted:
        writer.update_header(fingerprint=model.fingerprint, videos=folder)

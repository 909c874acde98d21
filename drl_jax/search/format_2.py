"""Reads indexes of format 2 (version 0.1)."""

from collections.abc import Mapping
from typing import Any

from drl_jax.pretrained import RetrievalModel


def header_from_format_2(header: Mapping[str, Any], next_slot: int) -> dict[str, Any]:
    """Converts the header of a format-2 index to format 3; the files keep their names.

    Format 2 named some unit vectors `*_feat`: `video_feat`, and `frame_feat` where frames have
    weights. Its fingerprint can only be compared with `RetrievalModel.format_2_fingerprint`, so
    `fingerprint` stays empty until the index is updated with its model.

    Args:
      header: the stored header.
      next_slot: number of slots in use, with the gaps between them.
    """
    described = header.get("arrays", {})
    unit_names = {"video_feat"}
    if "frame_weight" in described:
        unit_names.add("frame_feat")
    arrays = {}
    for name, array in described.items():
        feature, *suffix = name.split(".")
        if feature in unit_names:
            feature = feature.removesuffix("_feat") + "_unit"
        arrays[".".join([feature, *suffix])] = {**array, "file": f"{name}.bin"}
    return {
        "source": header["source"],
        "fingerprint": "",
        "format_2_fingerprint": header["fingerprint"],
        "videos": header["videos"],
        "storage": header["storage"],
        "arrays": arrays,
        "generation": 0,
        "next_slot": next_slot,
        "obsolete_files": [],
    }


def made_with(header: Mapping[str, Any], model: RetrievalModel) -> bool:
    """Whether a model computed the features of an index with this header."""
    if header["fingerprint"]:
        return header["fingerprint"] == model.fingerprint
    return header["format_2_fingerprint"] == model.format_2_fingerprint

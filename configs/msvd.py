"""MSVD: every caption of a video is a query.

Set the weights, and with them the sizes of the towers, with `--config.model.init=ViT-B-32.pt`.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import finetuning_config


def get_config() -> ConfigDict:
    return finetuning_config("msvd", val_split="val")

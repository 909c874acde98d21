"""VATEX: ten captions per video, each of them a query.

Set the weights, and with them the sizes of the towers, with `--config.model.init=ViT-B-32.pt`.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import finetuning_config


def get_config() -> ConfigDict:
    return finetuning_config("vatex", val_split="val")

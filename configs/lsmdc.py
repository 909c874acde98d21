"""LSMDC: movie clips with one sentence each.

The val split has 7,408 clips; ranks on it are not comparable with those on the 1,000 of test.

Set the weights, and with them the sizes of the towers, with `--config.model.init=ViT-B-32.pt`.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import finetuning_config


def get_config() -> ConfigDict:
    return finetuning_config("lsmdc", val_split="val")

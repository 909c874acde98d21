"""ActivityNet Captions: paragraph-to-video retrieval.

Set the weights, and with them the sizes of the towers, with `--config.model.init=ViT-B-32.pt`.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import finetuning_config


def get_config() -> ConfigDict:
    # val_1 is the test split of the literature, so checkpoints are chosen on held-out videos.
    return finetuning_config("activitynet", holdout=500)

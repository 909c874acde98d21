"""Your own dataset, built with `python -m data_prep.build custom`.

Set the weights, and with them the sizes of the towers, with `--config.model.init=ViT-B-32.pt`.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import finetuning_config


def get_config() -> ConfigDict:
    # A dataset needs at least as many training pairs as a batch has.
    return finetuning_config("custom", val_split="val", batch_size=32)

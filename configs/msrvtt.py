"""MSR-VTT 1k-A: the command of the reference's README, and every row of its ablation.

`configs/msrvtt.py:VARIANT`; the default is `wti_cdcr`. `--config.model.init=ViT-B-32.pt` sets the
pretrained weights; the variants of TOWERS download theirs. Build the dataset first:
python -m data_prep.build msrvtt --videos=DIR --annotations=DIR
"""

import dataclasses

from ml_collections import ConfigDict

from data_prep.dataset_config import data_config
from drl_jax.config import (
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from drl_jax.hub.releases import CLIP_B16, CLIP_B32, PUBLISHED

# interaction, agg_module, cdcr, alpha1. The reference's script trains its rows "without CDCR" with
# its default of `--cdcr`, 3; here they have none.
VARIANTS = {
    "zeroshot": ("dp", "none", 0, 0.0),
    "dp_none": ("dp", "none", 0, 0.0),
    "dp": ("dp", "seqTransf", 0, 0.0),
    "xti_none": ("xti", "none", 0, 0.0),
    "xti": ("xti", "seqTransf", 0, 0.0),
    "ti": ("ti", "seqTransf", 0, 0.0),
    "wti": ("wti", "seqTransf", 0, 0.0),
    "dp_cdcr": ("dp", "seqTransf", 1, 0.14),
    "ti_cdcr": ("ti", "seqTransf", 2, 0.16),
    # 0.11 in the reference's README, 0.14 in its script.
    "wti_cdcr": ("wti", "seqTransf", 3, 0.11),
}
# The default row over other towers than OpenAI's, which `--config.model.init=FILE` replaces by a
# local file.
TOWERS = ("clip_laion2b_b32", "siglip2_b16", "pe_b16")
# Rows that also exist with ViT-B/16, as NAME_b16.
B16 = ("wti", "dp_cdcr", "ti_cdcr", "wti_cdcr")


def get_config(variant: str = "wti_cdcr") -> ConfigDict:
    towers = PUBLISHED[variant] if variant in TOWERS else None
    name = "wti_cdcr" if towers else variant.removesuffix("_b16")
    if name not in VARIANTS or (name != variant and not towers and name not in B16):
        names = [*VARIANTS, *(f"{name}_b16" for name in B16), *TOWERS]
        raise ValueError(f"configs/msrvtt.py has no variant {variant!r}; it has {', '.join(names)}")
    interaction, agg_module, cdcr, alpha1 = VARIANTS[name]
    config = Config(
        data=data_config(
            "msrvtt",
            train_split="train_9k",
            # 1k-A has no val split. The reference chooses its best epoch on the test split; here it
            # is chosen on 500 training videos. `--config.data.holdout=0
            # --config.data.val_split=test` does what the reference does.
            holdout=500,
        ),
        model=ModelConfig(
            backbone=towers.backbone if towers else CLIP_B32 if name == variant else CLIP_B16,
            init=towers.source if towers else "",
            interaction=interaction,
            agg_module=agg_module,
        ),
        loss=LossConfig(cdcr=cdcr, cdcr_alpha1=alpha1, cdcr_alpha2=0.0, cdcr_lambda=0.001),
        optim=OptimConfig(lr=1e-4, coef_lr=1e-3),
        train=TrainConfig(batch_size=128, epochs=0 if name == "zeroshot" else 5),
    )
    return ConfigDict(dataclasses.asdict(config))

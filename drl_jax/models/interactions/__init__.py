"""Interactions: how texts and videos are compared (`config.model.interaction`)."""

from drl_jax.models.interactions.base import Arrays, Attribution, Features, Interaction
from drl_jax.models.interactions.cross_transformer import CrossTransformer
from drl_jax.models.interactions.dot_product import DotProduct
from drl_jax.models.interactions.token_wise import TokenWise, WeightedTokenWise

INTERACTIONS: dict[str, type[Interaction]] = {
    "dp": DotProduct,
    "ti": TokenWise,
    "wti": WeightedTokenWise,
    "xti": CrossTransformer,
}

__all__ = ["INTERACTIONS", "Arrays", "Attribution", "Features", "Interaction"]

"""Tokenizers (`config.model.tokenizer`) and their files."""

import dataclasses
import functools
from pathlib import Path

from drl_jax.config import BackboneConfig, Config, ConfigError, ModelConfig
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.tokenizers.base import Tokenizer
from drl_jax.models.tokenizers.clip import CLIPTokenizer
from drl_jax.models.tokenizers.extracted import ExtractedTokens
from drl_jax.models.tokenizers.files import (
    CLEANINGS,
    FileTokenizer,
    JSONTokenizer,
    SentencePieceTokenizer,
    TokenizerError,
)
from drl_jax.runtime.errors import Unavailable

# Names of tokenizer files beside weights and in runs, the preferred one first, and their classes.
_KINDS: dict[str, type[FileTokenizer]] = {
    "tokenizer.json": JSONTokenizer,
    "spiece.model": SentencePieceTokenizer,
}


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model; a file is parsed once per process.

    Raises:
      ConfigError: there is no tokenizer, `text_cleaning` does not go with it, or the text tower has
        fewer tokens.
      TokenizerError: the file is damaged or of another format, or a package is missing.
      Unavailable: the file is missing, or cannot be read.
    """
    backbone, file = model.backbone, model.tokenizer
    if backbone.family in EXTRACTORS:
        return ExtractedTokens(backbone.family)
    check_cleaning(model)
    tokenizer = _from_file(Path(file), backbone) if file else CLIPTokenizer(backbone.pad_id)
    if backbone.vocab_size < tokenizer.vocabulary_size:
        raise ConfigError(
            f"config.model.backbone.vocab_size={backbone.vocab_size} is too small for the tokenizer"
            f" {file or f'of {backbone.family}'}, which has {tokenizer.vocabulary_size} tokens"
        )
    if backbone.pad_id >= backbone.vocab_size:
        raise ConfigError(
            f"config.model.backbone.pad_id={backbone.pad_id} must be below"
            f" model.backbone.vocab_size={backbone.vocab_size}"
        )
    return tokenizer


def check_cleaning(model: ModelConfig) -> None:
    """Raises ConfigError if there is no tokenizer, or it does not go with `text_cleaning`."""
    cleaning = model.backbone.text_cleaning
    if model.tokenizer and cleaning not in CLEANINGS:
        raise ConfigError(
            f"config.model.backbone.text_cleaning={cleaning} is for CLIP's own tokenizer;"
            f" config.model.tokenizer={model.tokenizer} takes {' or '.join(CLEANINGS)}"
        )
    if not model.tokenizer and cleaning != "clip":
        raise ConfigError(
            "these towers (SigLIP, MetaCLIP 2) have a tokenizer of their own: put"
            f" {' or '.join(_KINDS)} beside the weights, or give config.model.tokenizer=FILE (a"
            " training) or tokenizer=FILE"
        )


def _from_file(path: Path, backbone: BackboneConfig) -> Tokenizer:
    kind = _KINDS[stored_name(path)]
    try:
        status = path.stat()
        # A file that changes is parsed again.
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return _parsed(kind, path, version, backbone.text_cleaning, backbone.pad_id)
    except OSError as error:
        raise Unavailable(f"config.model.tokenizer={path}", error) from error
    except ImportError as error:
        problem = f"needs a package that is not installed ({error.name})"
        problem += ": pip install 'drl_jax[siglip]'"
        raise TokenizerError(f"config.model.tokenizer={path} {problem}") from error
    except TokenizerError as error:
        raise TokenizerError(f"config.model.tokenizer={path} {error}") from error


@functools.lru_cache(maxsize=8)
def _parsed(
    kind: type[FileTokenizer], path: Path, version: tuple[int, ...], cleaning: str, pad_id: int
) -> Tokenizer:
    return kind(path.read_bytes(), cleaning, pad_id)


def stored_name(tokenizer: str | Path) -> str:
    """The name that a tokenizer's file gets in a run and beside exported weights.

    Raises:
      TokenizerError: the file has another suffix than those of tokenizers.
    """
    for name in _KINDS:
        if Path(tokenizer).suffix == Path(name).suffix:
            return name
    raise TokenizerError(
        f"config.model.tokenizer={tokenizer} is neither a tokenizer.json nor a SentencePiece model"
        " (*.model)"
    )


def tokenizer_of_weights(weights_path: Path, backbone: BackboneConfig, stored: str = "") -> str:
    """`config.model.tokenizer` of a model that is read from a file of weights.

    Args:
      weights_path: the file.
      backbone: of its towers. If they have CLIP's vocabulary, a file beside them is ignored:
        Hugging Face's releases have one for the same tokens.
      stored: `model.tokenizer` of the configuration that is stored in the file; that of an exported
        run is the name of a file beside it.

    Returns:
      The path of a file beside the weights, or "".
    """
    if stored:
        return str(weights_path.with_name(Path(stored).name))
    if backbone.text_cleaning == "clip":
        return ""
    paths = (weights_path.with_name(name) for name in _KINDS)
    return next((str(path) for path in paths if path.is_file()), "")


def with_tokenizer(config: Config, tokenizer: str) -> Config:
    """The configuration with another `model.tokenizer`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizer=tokenizer))

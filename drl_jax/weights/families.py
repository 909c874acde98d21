"""The families of towers: one row each says how their files are recognised and named.

A tower is a module of `drl_jax.models` and a row of FAMILIES here. Names in memory are OpenAI's; a
`Form` translates those of another publisher.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from drl_jax.models.heads import count_blocks
from drl_jax.models.reference_names import CLIP_HF, CUSTOM_TEXT, SIGLIP_HF, TIMM, Names, renamed
from drl_jax.weights.errors import WeightsError, some
from drl_jax.weights.tensors import StateDict, Tensor


class Form(NamedTuple):
    """Names of a family's tensors in the files of a publisher."""

    publisher: str
    needs: tuple[str, ...]  # names that tell such files
    names: Names = ()  # if they are not OpenAI's
    transposed: tuple[str, ...] = ()  # our names of matrices that are stored transposed
    refused: str = ""  # what such files are, if they are not supported


class Family(NamedTuple):
    """A row of FAMILIES."""

    forms: tuple[Form, ...]  # of its files; the first that fits is taken
    fields: Mapping[str, Any]  # of BackboneConfig, for what nothing says
    by_vocabulary: Mapping[int, Mapping[str, Any]] = {}  # more, by rows of the token embedding
    export: Names = ()  # of towers that are exported alone


_CONV, _PROBE = "visual.conv1.weight", "visual.attn_pool.probe"
_HF_CONV = "vision_model.embeddings.patch_embedding.weight"
_TIMM_CONV = "visual.trunk.patch_embed.proj.weight"
_LATENT, _CLASS_TOKEN = "visual.trunk.attn_pool.latent", "visual.trunk.cls_token"
_PE_G = "a PE-Core G, without a class token"
_SQUASHED = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.5,) * 3, "resize": "squash"}

FAMILIES: dict[str, Family] = {
    "siglip": Family(
        (
            Form("Hugging Face", (_HF_CONV, "vision_model.head.probe"), SIGLIP_HF),
            Form("open_clip", (_TIMM_CONV, "text.text_projection.weight"), TIMM),
            Form("drl_jax", (_CONV, _PROBE, "text_projection.weight")),
        ),
        {"activation": "gelu_tanh", "layer_norm_eps": 1e-6, "text_cleaning": "lower", **_SQUASHED},
        # Of SigLIP (c4_en) and of SigLIP 2 (Gemma).
        {32_000: {"pad_id": 1, "text_cleaning": "canonicalize"}, 256_000: {"pad_id": 0}},
        export=SIGLIP_HF,
    ),
    "pe": Family(
        (
            Form("Meta", (_CONV, _PROBE, "visual.class_embedding")),
            Form("open_clip", (_TIMM_CONV, _LATENT, _CLASS_TOKEN), TIMM, ("visual.proj",)),
            Form("Meta", (_CONV, _PROBE, "text_projection"), refused=_PE_G),
            Form("open_clip", (_TIMM_CONV, _LATENT), refused=_PE_G),
        ),
        {"activation": "gelu", "interpolation": "bilinear", **_SQUASHED},
    ),
    # Its activation differs between releases.
    "clip": Family(
        (
            Form("OpenAI", (_CONV, "token_embedding.weight")),
            Form("open_clip", (_CONV,), CUSTOM_TEXT),
            Form("Hugging Face", (_HF_CONV,), CLIP_HF, ("text_projection", "visual.proj")),
        ),
        {},
    ),
}
_PATCHES = (_CONV, _HF_CONV, _TIMM_CONV)
_TEXTS = ("token_embedding.weight", "text.token_embedding.weight",
          "text_model.embeddings.token_embedding.weight")  # fmt: skip
# Our names of all families.
_BLOCK = r"transformer\.resblocks\.\d+\.(ln_[12]\.|attn\.(in_proj_|out_proj\.)|mlp\.c_(fc|proj)\.)"
_OURS = re.compile(
    rf"((visual\.)?{_BLOCK}|ln_final\.|text_projection\.|visual\.(conv1|ln_pre|ln_post)\."
    r"|visual\.attn_pool\.(attn\.(in_proj_|out_proj\.)|layernorm\.|mlp\.c_(fc|proj)\.))"
    r"(weight|bias)|token_embedding\.weight|(visual\.)?positional_embedding|text_projection"
    r"|visual\.(class_embedding|proj|attn_pool\.probe)|logit_(scale|bias)"
)
# Buffers of towers that are computed from their sizes, and counters.
_BUFFERS = re.compile(r"(.*\.)?(attn_mask|position_ids|num_batches_tracked|mask[12]|inv_freq)")
# Axes of tensors that some publishers store with more.
_AXES = {"visual.class_embedding": 1, "visual.positional_embedding": 2}
_AXES |= {"logit_scale": 0, "logit_bias": 0}
# Modules of towers, in any form.
_INSIDE = re.compile(
    r"(visual|transformer|text|vision_model|text_model|visual_projection|text_projection"
    r"|token_embedding|ln_final)\."
)
# (pattern of a name below the prefix of the towers, what has such names)
_UNSUPPORTED = (
    (r".*lora_([ABab]|up|down|embedding_[AB])\b",
     "a LoRA adapter, which has to be merged into the model first (merge_and_unload), or made a run"
     " with its base (python -m drl_jax.convert)"),
    (r".*(qweight|weight_scale|weight_scale_inv|\.SCB|absmax|quant_state.*)$",
     "quantised; get the float weights"),
    (r".*\.mlp\.c_fc\.theta$", "a GmP-CLIP, whose matrices are lengths and directions; convert it"
     " with its own script to plain weights"),
    (r"visual\.layer1\.0\.conv1\.weight$", "a ResNet CLIP; DRL needs a ViT"),
    (r"video_model\.", "VideoPrism, a video model; DRL needs the feature of each frame"),
    (r"mit\.|prompts_generator\.|visual\..*\.message_fc", "an X-CLIP of Microsoft, a video model"),
    (r"vision_(encoder|align)\.", "InternVideo2 or a model like it"),
    (r"(text\.)?cls_emb$|visual\.attn_pool\.query$", "a CoCa"),
    (r"visual_encoder\.|text_decoder\.|[\w.]*qformer", "a BLIP"),
    (r"bert\.|text_model\.encoder\.layer\.", "a CLIP with a BERT as text tower, as Chinese-CLIP"),
    (r"(text_model\.)?roberta\.", "a CLIP with a RoBERTa as text tower, as AltCLIP"),
    (r"text\.transformer\.(embeddings|encoder|shared|layers?)\.", "a CLIP with a text tower of"
     " Hugging Face in open_clip's form"),
    (r"image_encoder\.model\.|visual\.trunk\.(stem|stages)\.", "a MobileCLIP or another hybrid"),
    (r"visual\.(cls_token|blocks\.|trunk\.blocks\.0\.(attn\.(q_proj|norm)|mlp\.(w1|fc1_g|norm)))",
     "an EVA-CLIP"),
    (r"visual\.trunk\.embeds\.", "a NaFlex SigLIP 2, of any resolution"),
    (r"visual\.trunk\.", "open_clip's form of another image tower of timm"),
)  # fmt: skip
SUPPORTED = (
    "supported are CLIP, SigLIP and SigLIP 2 of a fixed resolution, PE-Core T, S, B and L, and DRL"
    " checkpoints (docs/weights.md)"
)


class Towers(NamedTuple):
    """The towers in a file."""

    family: str  # a key of FAMILIES
    publisher: str  # whose names they have in the file
    prefix: str  # of their names in the file, up to the last dot
    state: StateDict  # their tensors under OpenAI's names
    heads: StateDict  # those of heads of DRL, under the reference's names
    is_of_drl: bool  # whether they have the names of DRL and CLIP4Clip: `clip.`, beside heads
    notes: tuple[str, ...]  # what the user should know of how they were chosen


def find_towers(tensors: Mapping[str, Tensor], inert: Mapping[str, str], key: str = "") -> Towers:
    """Finds the towers among the tensors of a file, whatever wraps them.

    `inert` has the classes of its other values. Of several pairs of towers, `key` is the prefix of
    the one that is used; empty: the only one that is no moving average (EMA) of another.
    WeightsError: there are none that are supported, or several.
    """
    prefix, notes = _choose(tensors, inert, key)
    below = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    family, form = _form(below)
    state, unknown = _rename(form, below)
    for name in (n.removeprefix(prefix) for n in inert if n.startswith(prefix)):
        if _OURS.fullmatch(renamed(name, form.names)):
            raise WeightsError(_not_plain(prefix + name, inert[prefix + name]))
    strange = [name for name in unknown if not _BUFFERS.fullmatch(name)]
    if (bias := "visual.trunk.head.bias") in strange and not np.any(np.asarray(below[bias])):
        strange.remove(bias)  # timm gives the projection one; other files have none.
    _refuse_names(strange)
    if inside := [name for name in strange if _INSIDE.match(name)]:
        what = f"which a {family} does not have: an adapter or another model; {SUPPORTED}"
        raise WeightsError(f"has {some(inside)}, {what}")
    if integers := [name for name, tensor in state.items() if tensor.dtype.kind in "iub"]:
        what = f"{integers[0]} is {state[integers[0]].dtype}"
        raise WeightsError(f"is quantised: {what}; get the float weights")
    # A head of a DRL checkpoint is beside `clip`, unless `clip` is what was asked for.
    is_of_drl = f".{prefix}".endswith(".clip.") and form.publisher != "Hugging Face"
    is_asked = f".{prefix}".endswith(f".{key}.") and f".{key}".endswith(".clip")
    parent = prefix.removesuffix("clip.")
    heads = {
        name.removeprefix(parent): tensor
        for name, tensor in tensors.items()
        if name.startswith(parent) and not name.startswith(prefix) and tensor.ndim
        if is_of_drl and not is_asked
    }
    used = {prefix + n for n in below.keys() - set(unknown)} | {parent + n for n in heads}
    if unused := [name for name in tensors if name not in used]:
        notes.append(f"not used: {_counted(unused)}")
    if prefix not in ("", "clip."):
        notes.insert(0, f"found under {prefix[:-1]}")
    return Towers(family, form.publisher, prefix, state, heads, is_of_drl, tuple(notes))


def _choose(
    tensors: Mapping[str, Tensor], inert: Mapping[str, str], key: str
) -> tuple[str, list[str]]:
    """The prefix of the towers, and notes on others."""
    if any(name.endswith(_HF_CONV) and tensor.ndim == 2 for name, tensor in tensors.items()):
        raise WeightsError(f"is a NaFlex SigLIP 2, of any resolution; {SUPPORTED}")
    images, texts = (
        {n.removesuffix(end) for n in tensors for end in ends if f".{n}".endswith(f".{end}")}
        for ends in (_PATCHES, _TEXTS)
    )
    # By the keys that choose them.
    whole = {prefix[:-1] or ".": prefix for prefix in sorted(images & texts)}
    if not whole:
        for name, kind in inert.items():
            if "._rebuild_" in kind or re.fullmatch("[A-Z]+[0-9]+\\w*", kind):
                raise WeightsError(_not_plain(name, kind))
        _refuse_names(tensors)
        if images or texts:
            found, lacking = ("an image", "a text") if images else ("a text", "an image")
            raise WeightsError(f"holds {found} tower without {lacking} tower")
        if tensors or not inert:
            held = f"towers, but {_counted(tensors)}" if tensors else "tensors"
            raise WeightsError(f"holds no {held}; {SUPPORTED}")
        kind = next(iter(inert.values()))
        raise WeightsError(f"holds no tensors, but a {kind}; save the state_dict() of a model")
    keys = " and ".join(map(repr, whole))
    if key:
        exact = re.escape(key)
        for pattern in (exact, rf"(.*\.)?{exact}", rf"{exact}\..*"):
            chosen = [prefix for name, prefix in whole.items() if re.fullmatch(pattern, name)]
            if len(chosen) == 1:
                return chosen[0], []
        raise WeightsError(f"has towers under {keys}, and the key is {key!r}")
    averages = [n for n in whole if {"ema", "swa", "averaged"} & set(re.split("[._]", n.lower()))]
    others = [name for name in whole if len(whole) == 1 or name not in averages]
    if len(others) != 1:
        flags = "weights_key=KEY (config.model.weights_key=KEY of a training)"
        raise WeightsError(f"has several pairs of towers, under {keys}; choose one with {flags}")
    beside = " and ".join(repr(name) for name in averages if name not in others)
    notes = [f"a moving average is under {beside} (weights_key)"] if beside else []
    return whole[others[0]], notes


def _not_plain(name: str, kind: str) -> str:
    what = f"{some([name])} in the form of {some([kind])}"
    return f"has {what}: sparse, quantised or complex; get or save dense tensors of 16 or 32 bits"


def _form(below: Mapping[str, Tensor]) -> tuple[str, Form]:
    """The family and form of towers with these names."""
    for family, row in FAMILIES.items():
        for form in row.forms:
            if all(name in below for name in form.needs):
                if form.refused:
                    raise WeightsError(f"is {form.refused}; {SUPPORTED}")
                return family, form
    _refuse_names(below)
    raise WeightsError(f"holds towers of an unknown form; {SUPPORTED}")


def _rename(form: Form, below: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """The tensors under our names; and the names of those that belong to no tower of ours."""
    by_name = {renamed(name, form.names): (name, tensor) for name, tensor in below.items()}
    state: StateDict = {}
    unknown = []
    for ours, (name, tensor) in by_name.items():
        if match := re.fullmatch(r"(.*\.attn\.)(q|k|v|kv)_proj\.(weight|bias)", ours):
            if match[2] != "q":
                continue  # Part of the fused projection, which is made with the query.
            parts = (f"{match[1]}{part}_proj.{match[3]}" for part in ("q", "k", "v", "kv"))
            tensor = Tensor.joined([by_name[part] for part in parts if part in by_name])
            ours = f"{match[1]}in_proj_{match[3]}"
        if not _OURS.fullmatch(ours):
            unknown.append(name)
            continue
        if ours in form.transposed:
            tensor = tensor.T
        state[ours] = tensor.squeezed(_AXES[ours]) if ours in _AXES else tensor
    first, rest = state.get("positional_embedding"), below.get("positional_embedding_res")
    if first is not None and rest is not None:
        # Long-CLIP keeps CLIP's first 20 positions, and learns the others apart.
        if rest.ndim != 2 or first.shape != rest.shape or rest.shape[0] < 20:
            raise WeightsError(f"has {rest.shape} positions beside {first.shape}")
        parts = (first.rows(0, 20), rest.rows(20, rest.shape[0]))
        joined = Tensor.joined([("positional_embedding_res", part) for part in parts])
        state["positional_embedding"] = joined
        unknown.remove("positional_embedding_res")
    return state, unknown


def _refuse_names(names: Collection[str]) -> None:
    """Raises WeightsError, by what has such names."""
    for pattern, what in _UNSUPPORTED:
        found = re.compile(pattern[2:] if pattern.startswith(".*") else rf"(?:^|\.)(?:{pattern})")
        for name in names:
            if found.search(name):
                raise WeightsError(f"is {what} ({some([name])}); {SUPPORTED}")


def _counted(names: Collection[str]) -> str:
    """How many tensors, and their names; those of one group are counted."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    texts = [f"{g}.* ({len(of)})" if len(of) > 1 else of[0] for g, of in groups.items()]
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {some(texts)}"


def sizes_of(state: StateDict) -> dict[str, int]:
    """The sizes of BackboneConfig that the shapes of towers say, under OpenAI's names.

    `image_resolution` is that of the patches: an image may have a few more pixels, which the patch
    embedding leaves out. WeightsError: a tensor is missing or has another rank.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the weights lack {name}")
        if len(state[name].shape) != axes:
            raise WeightsError(f"{name} has {len(state[name].shape)} axes, not {axes}")
        return state[name].shape

    vision_width, _, patch, _ = shape(_CONV, 4)
    patches = shape("visual.positional_embedding", 2)[0] - ("visual.class_embedding" in state)
    if (side := round(patches**0.5)) ** 2 != patches:
        raise WeightsError(f"visual.positional_embedding has {patches} patches, which is no square")
    # A matrix [text_width, embed_dim], or SigLIP's layer, whose output comes first.
    is_layer = "text_projection.weight" in state
    projection = shape("text_projection.weight" if is_layer else "text_projection", 2)
    sizes = {
        "embed_dim": projection[0 if is_layer else 1],
        **{"image_resolution": side * patch, "vision_patch_size": patch},
        "vision_width": vision_width,
        "context_length": shape("positional_embedding", 2)[0],
        "vocab_size": shape("token_embedding.weight", 2)[0],
        "text_width": shape("ln_final.weight", 1)[0],
    }
    for tower, transformer in (("vision", "visual.transformer"), ("text", "transformer")):
        hidden = shape(f"{transformer}.resblocks.0.mlp.c_fc.bias", 1)[0]
        is_usual = hidden == 4 * sizes[f"{tower}_width"]
        sizes[f"{tower}_layers"] = count_blocks(state, transformer)
        sizes[f"{tower}_mlp_width"] = 0 if is_usual else hidden
    return sizes

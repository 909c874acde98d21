"""The families of towers: one row each says how their files are recognised and named.

A tower is a module of `drl_jax.models` and a row of FAMILIES here. Names in memory are OpenAI's; a
`Form` translates those of another publisher.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from drl_jax.models.heads import count_blocks
from drl_jax.weights.errors import WeightsError, some
from drl_jax.weights.tensors import StateDict, Tensor


class Form(NamedTuple):
    """Names of a family's tensors in the files of a publisher."""

    publisher: str
    needs: tuple[str, ...]  # names that tell such files
    # (theirs, ours): how names begin; and parts, with dots around them, of names with one of these
    # beginnings. Other names stay as they are.
    names: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()  # our names of matrices that are stored transposed
    refused: str = ""  # what such files are, if they are not supported

    def renamed(self, name: str, *, back: bool = False) -> str:
        """One of their names -> ours; or with `back`, ours -> theirs."""
        pairs = [pair[::-1] for pair in self.names] if back else self.names
        for old, new in pairs:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                for part, new_part in pairs:
                    name = name.replace(part, new_part) if part.startswith(".") else name
                return name
        return name


class Family(NamedTuple):
    """A row of FAMILIES."""

    forms: tuple[Form, ...]  # of its files; the first that fits is taken
    fields: Mapping[str, Any]  # of BackboneConfig, for what nothing says
    by_vocabulary: Mapping[int, Mapping[str, Any]] = {}  # more, by rows of the token embedding
    export: Form | None = None  # of towers that are exported alone


_CONV, _PROBE = "visual.conv1.weight", "visual.attn_pool.probe"
_HF_CONV = "vision_model.embeddings.patch_embedding.weight"
_TIMM_CONV = "visual.trunk.patch_embed.proj.weight"
_LATENT, _CLASS_TOKEN = "visual.trunk.attn_pool.latent", "visual.trunk.cls_token"
_MLP = ((".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))
_HUGGING_FACE = (
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # sic
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    *((".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".self_attn.", ".attn."), *_MLP),
)
_CLIP_HF = (
    *_HUGGING_FACE,
    *(("text_projection.weight", "text_projection"), ("visual_projection.weight", "visual.proj")),
)
# open_clip's CustomTextCLIP, and timm's image towers in it.
_CUSTOM_TEXT = (("text.", ""),)
_TIMM = (
    (_CLASS_TOKEN, "visual.class_embedding"),
    ("visual.trunk.pos_embed", "visual.positional_embedding"),
    ("visual.trunk.patch_embed.proj.", "visual.conv1."),
    ("visual.trunk.norm_pre.", "visual.ln_pre."),
    ("visual.trunk.norm.", "visual.ln_post."),
    ("visual.trunk.head.weight", "visual.proj"),
    (_LATENT, _PROBE),
    ("visual.trunk.attn_pool.norm.", "visual.attn_pool.layernorm."),
    ("visual.trunk.attn_pool.mlp.", "visual.attn_pool.mlp."),
    ("visual.trunk.attn_pool.proj.", "visual.attn_pool.attn.out_proj."),
    ("visual.trunk.attn_pool.q.", "visual.attn_pool.attn.q_proj."),
    ("visual.trunk.attn_pool.kv.", "visual.attn_pool.attn.kv_proj."),
    ("visual.trunk.blocks.", "visual.transformer.resblocks."),
    *((".norm1.", ".ln_1."), (".norm2.", ".ln_2."), *_MLP),
    *((".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), *_CUSTOM_TEXT),
)
_SIGLIP_HF = Form(
    "Hugging Face",
    (_HF_CONV, "vision_model.head.probe"),
    (
        *_HUGGING_FACE,
        ("text_model.head.", "text_projection."),
        ("vision_model.head.attention.", "visual.attn_pool.attn."),
        ("vision_model.head.", "visual.attn_pool."),
    ),
)
_PE_G = "a PE-Core G, without a class token"
_SQUASHED = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.5,) * 3, "resize": "squash"}

FAMILIES: dict[str, Family] = {
    "siglip": Family(
        (
            _SIGLIP_HF,
            Form("open_clip", (_TIMM_CONV, "text.text_projection.weight"), _TIMM),
            Form("drl_jax", (_CONV, _PROBE, "text_projection.weight")),
        ),
        {"activation": "gelu_tanh", "layer_norm_eps": 1e-6, "logit_bias": True, **_SQUASHED},
        # Of SigLIP (c4_en) and of SigLIP 2 (Gemma).
        {
            32_000: {"pad_id": 1, "text_cleaning": "canonicalize"},
            256_000: {"pad_id": 0, "text_cleaning": "lower"},
        },
        export=_SIGLIP_HF,
    ),
    "pe": Family(
        (
            Form("Meta", (_CONV, _PROBE, "visual.class_embedding")),
            Form("open_clip", (_TIMM_CONV, _LATENT, _CLASS_TOKEN), _TIMM, ("visual.proj",)),
            Form("Meta", (_CONV, _PROBE, "text_projection"), refused=_PE_G),
            Form("open_clip", (_TIMM_CONV, _LATENT), refused=_PE_G),
        ),
        {"activation": "gelu", "interpolation": "bilinear", **_SQUASHED},
    ),
    # Its activation differs between releases.
    "clip": Family(
        (
            Form("OpenAI", (_CONV, "token_embedding.weight")),
            Form("open_clip", (_CONV,), _CUSTOM_TEXT),
            Form("Hugging Face", (_HF_CONV,), _CLIP_HF, ("text_projection", "visual.proj")),
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
_SCALARS = ("logit_scale", "logit_bias")
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

    Raises:
      WeightsError: there are none that are supported, or several.
    """
    prefix, notes = _choose(tensors, inert, key)
    below = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    family, form = _form(below)
    state, unknown = _rename(form, below)
    # A head of a DRL checkpoint is beside `clip`, unless `clip` is what was asked for.
    is_of_drl = f".{prefix}".endswith(".clip.") and form.publisher != "Hugging Face"
    parent = prefix.removesuffix("clip.")
    is_asked = f".{prefix}".endswith(f".{key}.") and f".{key}".endswith(".clip")
    heads = {
        name.removeprefix(parent): tensor
        for name, tensor in tensors.items()
        if name.startswith(parent) and not name.startswith(prefix) and tensor.ndim
    }
    heads = heads if is_of_drl and not is_asked else {}
    for name, kind in inert.items():
        if name.startswith(prefix) and _OURS.fullmatch(form.renamed(name.removeprefix(prefix))):
            raise WeightsError(_not_plain(name, kind))
    used = {prefix + n for n in below.keys() - set(unknown)} | {parent + n for n in heads}
    if unused := [name for name in tensors if name not in used]:
        notes.append(f"not used: {_counted(unused)}")
    if prefix not in ("", "clip."):
        notes.insert(0, f"found under {prefix[:-1]}")
    _check_unknown(family, below, unknown)
    for name, tensor in state.items():
        if tensor.dtype.kind in "iub":
            raise WeightsError(f"is quantised: {name} is {tensor.dtype}; get the float weights")
    return Towers(family, form.publisher, prefix, state, heads, is_of_drl, tuple(notes))


def _choose(
    tensors: Mapping[str, Tensor], inert: Mapping[str, str], key: str
) -> tuple[str, list[str]]:
    """The prefix of the towers, and notes on others."""
    if any(name.endswith(_HF_CONV) and tensor.ndim == 2 for name, tensor in tensors.items()):
        raise WeightsError(f"is a NaFlex SigLIP 2, of any resolution; {SUPPORTED}")
    prefixes = {n.removesuffix(p) for n in tensors for p in _PATCHES if f".{n}".endswith(f".{p}")}
    whole = sorted(p for p in prefixes if any(p + text in tensors for text in _TEXTS))
    if not whole:
        for name, kind in inert.items():
            if "._rebuild_" in kind or re.fullmatch("[A-Z]+[0-9]+\\w*", kind):
                raise WeightsError(_not_plain(name, kind))
        _refuse_names(tensors)
        if prefixes:
            raise WeightsError("holds an image tower without a text tower")
        if any(f".{name}".endswith(f".{text}") for name in tensors for text in _TEXTS):
            raise WeightsError("holds a text tower without an image tower")
        if tensors or not inert:
            held = f"towers, but {_counted(tensors)}" if tensors else "tensors"
            raise WeightsError(f"holds no {held}; {SUPPORTED}")
        kind = next(iter(inert.values()))
        raise WeightsError(f"holds no tensors, but a {kind}; save the state_dict() of a model")
    keys = " and ".join(repr(prefix[:-1] or ".") for prefix in whole)
    if key:
        tests: tuple[Callable[[str], bool], ...] = (
            lambda prefix: prefix[:-1] == key or (key == "." and not prefix),
            lambda prefix: f".{prefix}".endswith(f".{key}."),
            lambda prefix: prefix.startswith(f"{key}."),
        )
        for fits in tests:
            if len(chosen := [prefix for prefix in whole if fits(prefix)]) == 1:
                return chosen[0], []
        raise WeightsError(f"has towers under {keys}, and the key is {key!r}")
    if len(whole) == 1:
        return whole[0], []
    averages = [p for p in whole if {"ema", "swa", "averaged"} & set(re.split("[._]", p.lower()))]
    if len(averages) + 1 != len(whole):
        flags = "weights_key=KEY (config.model.weights_key=KEY of a training)"
        raise WeightsError(f"has several pairs of towers, under {keys}; choose one with {flags}")
    names = " and ".join(repr(prefix[:-1]) for prefix in averages)
    (chosen,) = set(whole) - set(averages)
    return chosen, [f"a moving average is under {names} (weights_key)"]


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
    renamed = {form.renamed(name): (name, tensor) for name, tensor in below.items()}
    state: StateDict = {}
    unknown = []
    for ours, (name, tensor) in renamed.items():
        if match := re.fullmatch(r"(.*\.attn\.)(q|k|v|kv)_proj\.(weight|bias)", ours):
            if match[2] != "q":
                continue  # Part of the fused projection, which is made with the query.
            parts = (f"{match[1]}{part}_proj.{match[3]}" for part in ("q", "k", "v", "kv"))
            joined = [renamed[part] for part in parts if part in renamed]
            for theirs, part in joined:
                is_equal = tensor.ndim > 0 and part.shape[1:] == tensor.shape[1:]
                if not (is_equal and part.ndim == tensor.ndim and part.dtype == tensor.dtype):
                    problem = f"{part.dtype} {list(part.shape)} beside {list(tensor.shape)}"
                    raise WeightsError(f"has {theirs} of another shape or type: {problem}")
            tensor = Tensor.joined(part for _, part in joined)
            ours = f"{match[1]}in_proj_{match[3]}"
        if not _OURS.fullmatch(ours):
            unknown.append(name)
            continue
        if ours in form.transposed:
            tensor = tensor.T
        # Some publishers store them with more axes.
        ndim = {"visual.class_embedding": 1, "visual.positional_embedding": 2}.get(ours)
        ndim = 0 if ours in _SCALARS else ndim
        state[ours] = tensor if ndim is None else tensor.squeezed(ndim)
    if (rest := below.get("positional_embedding_res")) is not None:
        # Long-CLIP keeps CLIP's first 20 positions, and learns the others apart.
        first = state.get("positional_embedding", rest.rows(0, 0) if rest.ndim else rest)
        if first.shape != rest.shape or len(first.shape) != 2 or rest.shape[0] < 20:
            raise WeightsError(f"has {rest.shape} positions beside {first.shape}")
        parts = (first.rows(0, 20), rest.rows(20, rest.shape[0]))
        state["positional_embedding"] = Tensor.joined(parts)
        unknown.remove("positional_embedding_res")
    return state, unknown


def _check_unknown(family: str, below: Mapping[str, Tensor], unknown: list[str]) -> None:
    """Raises WeightsError if tensors that are left out take part in the towers' arithmetic."""
    inside = [
        name
        for name in unknown
        if _INSIDE.match(name)
        and not _BUFFERS.fullmatch(name)
        # timm gives the projection a bias, which is 0: other files have none.
        and not (name == "visual.trunk.head.bias" and not np.any(np.asarray(below[name])))
    ]
    _refuse_names([name for name in unknown if not name.startswith("visual.trunk.head.")])
    if inside:
        what = f"which a {family} does not have: an adapter or another model; {SUPPORTED}"
        raise WeightsError(f"has {some(inside)}, {what}")


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


def to_publisher(family: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our names of towers -> those in which their publisher exports them; the reverse of `Form`."""
    form = FAMILIES[family].export
    if form is None:
        return dict(state)
    named = {}
    for name, tensor in state.items():
        if name in _SCALARS:
            tensor = tensor.reshape(1)
        if match := re.match(r"(.*resblocks\.\d+\.attn)\.in_proj_(weight|bias)$", name):
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                named[form.renamed(f"{match[1]}.{part}_proj.{match[2]}", back=True)] = rows
        else:
            named[form.renamed(name, back=True)] = tensor
    return named


# ---------------------------------------------------------------- sizes


def sizes_of(state: StateDict) -> dict[str, int]:
    """The sizes of BackboneConfig that the shapes of towers say, under OpenAI's names.

    `image_resolution` is that of the patches: an image may have a few more pixels, which the patch
    embedding leaves out.

    Raises:
      WeightsError: a tensor that says a size is missing or has another rank.
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
        "image_resolution": side * patch,
        "vision_width": vision_width,
        "vision_patch_size": patch,
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

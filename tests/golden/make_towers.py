"""Writes towers as their publishers' tools save them, with random weights, and their features.

    python make_towers.py DIR [--published]

Each folder has the publisher's file, its description, and `io.npz`: `pixels` [N, 3, H, W] after
normalisation, `text_ids` [M, L], and what the publisher's code computes of them in float32:
`image_features` [N, D], `text_features` [M, D] and `text_tokens` [M, L, D], of every position.
`--published` takes the published widths, with two layers (3 GB); the default is small.

In an environment of its own:
    pip install torch==2.13.0 transformers==5.24.0 safetensors ftfy regex
    pip install --no-deps torchvision==0.28.0 open_clip_torch==3.3.0 timm==1.0.31
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

# The compiled part of torchvision does not go with the CPU build of torch, and is not needed:
# open_clip imports the package, and transformers must not find it.
LIBRARY = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
FIND = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.split(".")[0] == "torchvision" else FIND(name, *rest)
)
from transformers import SiglipConfig, SiglipModel  # isort: skip
import open_clip  # isort: skip
import open_clip.timm_model
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

# folder: open_clip's name of the model, pixels of the small one
OPEN_CLIP = {
    "open_clip_siglip": ("ViT-B-16-SigLIP", 32),
    "open_clip_siglip_so400m": ("ViT-SO400M-14-SigLIP-384", 30),
    "open_clip_siglip2": ("ViT-B-16-SigLIP2", 32),
    "open_clip_pe": ("PE-Core-B-16", 32),
    "open_clip_custom_text": ("ViT-B-32", 64),
}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def shake(model: torch.nn.Module) -> None:
    """Makes every tensor matter: biases, norms and positions are no longer 0 or 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("trunk.head.bias"):
                parameter.zero_()  # As in the published files.
            elif name.endswith("trunk.head.weight") or "pos" in name or "latent" in name:
                parameter.copy_(0.05 * noise)
            elif parameter.ndim < 2 and "logit" not in name:
                parameter.add_(0.1 * noise)
            parameter.copy_(parameter.half())
            if "token_embedding" in name:
                parameter[100:-100] = 0  # Compresses.


def inputs(vocabulary: int, positions: int, size: int, has_end: bool) -> tuple:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 100, (2, positions), generator=generator)
    if has_end:
        for row, end in enumerate((positions // 2, positions - 3)):
            ids[row, end], ids[row, end + 1 :] = vocabulary - 1, 0
    return ids, torch.randn(2, 3, size, size, generator=generator)


def write(folder: Path, ids, pixels, image, text, tokens) -> None:
    names = ("pixels", "text_ids", "image_features", "text_features", "text_tokens")
    arrays = (x.numpy() for x in (pixels, ids, image, text, tokens))
    np.savez_compressed(folder / "io.npz", **dict(zip(names, arrays, strict=True)))


def tokens_of(text, ids, positions=None) -> torch.Tensor:
    """The projection of every position of a text tower of open_clip."""
    x = text.token_embedding(ids) + (text.positional_embedding if positions is None else positions)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))
    projection = text.text_projection
    return projection(x) if isinstance(projection, torch.nn.Module) else x @ projection


@torch.no_grad()
def make_open_clip(folder: Path, name: str, size: int, published: bool) -> None:
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    create = open_clip.timm_model.timm.create_model
    small = {"depth": 2}
    text["layers"] = vision["layers"] = 2
    if not published:
        vision |= {"image_size": size, "width": 64}
        config["embed_dim"] = 64
        # The number of SigLIP's tokens says how captions are padded.
        text |= {"width": 32, "heads": 2, "vocab_size": 32_000 if "siglip" in str(folder) else 600}
        small = {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": size}
        text["layers"] = vision["layers"] = 1
    if "timm_model_name" in vision:
        del vision["layers"]
        vision.pop("width", None)
    open_clip.timm_model.timm.create_model = lambda *a, **k: create(*a, **{**k, **small})
    bias = config.get("init_logit_bias")
    model = CustomTextCLIP(config["embed_dim"], vision, text, init_logit_bias=bias).eval()
    open_clip.timm_model.timm.create_model = create
    shake(model)
    state = {key: value.contiguous().half() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    description = {"model_cfg": config, "preprocess_cfg": SQUASH if "timm_pool" in vision else {}}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    positions, vocabulary = text.get("context_length", 77), text.get("vocab_size", 49408)
    ids, pixels = inputs(vocabulary, positions, vision["image_size"], bias is None)
    features = model.encode_image(pixels), model.encode_text(ids), tokens_of(model.text, ids)
    write(folder, ids, pixels, *features)


@torch.no_grad()
def make_hugging_face(folder: Path, published: bool) -> None:
    """SigLIP So400m at 384 pixels: 27 patches of 14, and 6 pixels that are left out."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    if published:
        sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    sizes["num_hidden_layers"] = 1 + published
    text = {"vocab_size": 32_000 if published else 300, "max_position_embeddings": 64}
    text |= {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 1}
    vision = {"image_size": 384 if published else 30, "patch_size": 14}
    model = SiglipModel(SiglipConfig(text_config=sizes | text, vision_config=sizes | vision)).eval()
    shake(model)
    model.half().save_pretrained(folder)
    model.float()
    ids, pixels = inputs(text["vocab_size"], 64, vision["image_size"], has_end=False)
    image, output = model.vision_model(pixels).pooler_output, model.text_model(ids)
    tokens = model.text_model.head(output.last_hidden_state)
    write(folder, ids, pixels, image, output.pooler_output, tokens)


@torch.no_grad()
def make_long_clip(folder: Path, published: bool) -> None:
    """Long-CLIP in its original form: open_clip's blocks with its two tables of positions."""
    vision = {"image_size": 224, "layers": 2, "width": 768, "patch_size": 16}
    text = {"context_length": 248, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 2}
    if not published:
        vision |= {"image_size": 32, "layers": 1, "width": 64}
        text |= {"vocab_size": 600, "width": 64, "heads": 1, "layers": 1}
    model = CLIP(text["width"], vision, text, quick_gelu=True).eval()
    shake(model)
    rest = (0.05 * torch.randn(248, text["width"])).half()
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({**state, "positional_embedding_res": rest}, folder / "longclip.pt")
    description = {"family": "clip", "activation": "quick_gelu"}
    (folder / "config.json").write_text(json.dumps(description))
    # model/model_longclip.py: mask1 takes the first 20 positions, mask2 the others.
    positions = torch.cat([model.positional_embedding[:20], rest[20:].float()])
    ids, pixels = inputs(text["vocab_size"], 248, vision["image_size"], has_end=True)
    tokens = tokens_of(model, ids, positions)
    sentence = tokens[torch.arange(len(ids)), ids.argmax(1)]
    write(folder, ids, pixels, model.encode_image(pixels), sentence, tokens)


def main() -> None:
    root, published = Path(sys.argv[1]), "--published" in sys.argv
    makers = {name: (make_open_clip, *of) for name, of in OPEN_CLIP.items()}
    if not published:
        # Large, for their tokens; what they show, So400m shows too.
        del makers["open_clip_siglip"], makers["open_clip_siglip2"]
    makers |= {"hugging_face_so400m": (make_hugging_face,), "long_clip": (make_long_clip,)}
    for name, (make, *arguments) in makers.items():
        torch.manual_seed(0)
        (root / name).mkdir(parents=True, exist_ok=True)
        make(root / name, *arguments, published)
        print(name)


if __name__ == "__main__":
    main()

"""Time, FLOP/s and memory of the training step in PyTorch, to compare with `train_step`.

    python -m benchmarks.pytorch_step [--batches=4] [--record]

The towers are CLIP's in transformers; a temporal head, WTI and the contrastive loss follow. Unlike
the paper's program, it has no CDCR, takes normalised pixels, and uses PyTorch's fused attention and
AdamW. Columns and FLOPs are those of `train_step`. On the CPU, in float32. Needs torch and
transformers, best in a virtual environment of their own, beside jax, flax, optax and numpy.
"""

from collections.abc import Sequence

from benchmarks.measure import (
    arguments,
    matmul_rates,
    peak_memory,
    report,
    step_columns,
    torch_matmul_rate,
)
from benchmarks.train_step import step_flags
from drl_jax.config import LossConfig, ModelConfig
from drl_jax.runtime.resources import keep_freed_memory
from drl_jax.training.flops import train_step_flops

try:
    import torch
    from torch import nn
    from torch.nn import functional
    from transformers import CLIPConfig, CLIPModel
except ImportError as error:
    raise SystemExit(
        f"benchmarks.pytorch_step: {error}; run: pip install torch transformers"
    ) from error


class Model(nn.Module):
    """ViT-B/32, four temporal layers and WTI."""

    def __init__(self, config: ModelConfig, frames: int):
        super().__init__()
        width = config.backbone.embed_dim
        self.clip = CLIPModel(CLIPConfig())  # The default is ViT-B/32.
        self.frame_positions = nn.Parameter(torch.randn(frames, width) * 0.01)
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.temporal = nn.TransformerEncoder(
            layer, config.temporal_layers, enable_nested_tensor=False
        )
        self.text_weight, self.frame_weight = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) for _ in range(2)
        )

    def forward(self, text_ids: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """int64 [B, L], float32 [B, F, 3, H, W] -> the loss."""
        batch = len(frames)
        words = self.clip.text_model(text_ids).last_hidden_state
        words = self.clip.text_projection(words)  # [B, L, D]
        image = self.clip.vision_model(frames.flatten(0, 1)).pooler_output
        image = self.clip.visual_projection(image).unflatten(0, (batch, -1))  # [B, F, D]
        image = image + self.temporal(image + self.frame_positions)
        word_weights = self.text_weight(words).squeeze(-1).softmax(-1)
        frame_weights = self.frame_weight(image).squeeze(-1).softmax(-1)
        words, image = functional.normalize(words, dim=-1), functional.normalize(image, dim=-1)
        cosines = torch.einsum("ald,bfd->abfl", words, image)
        to_video = torch.einsum("abl,al->ab", cosines.amax(2), word_weights)
        to_text = torch.einsum("abf,bf->ab", cosines.amax(3), frame_weights)
        logits = self.clip.logit_scale.exp() * (to_video + to_text) / 2
        rows = torch.arange(batch)
        return functional.cross_entropy(logits, rows) + functional.cross_entropy(logits.T, rows)


def measure(config: ModelConfig, batch: int, frames: int, words: int, steps: int) -> dict:
    """Times the step on random input."""
    torch.manual_seed(0)
    model = Model(config, frames)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    # The largest id ends a caption.
    text_ids = torch.randint(0, 49406, (batch, words))
    text_ids[:, -1] = 49407
    size = config.backbone.image_resolution
    images = torch.randn(batch, frames, 3, size, size)

    def step() -> None:
        model(text_ids, images).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    flops = train_step_flops(config, LossConfig(), batch, frames, words)
    return {
        "model": "ViT-B/32",
        "dtype": "float32",
        "batch": batch,
        **step_columns(step, lambda: torch_matmul_rate(2), flops, batch, steps),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each batch size."""
    options = arguments("pytorch_step", __doc__, *step_flags()).parse_args(argv)
    keep_freed_memory()
    sizes = (options.frames, options.words, options.steps)
    rows = [measure(ModelConfig(), batch, *sizes) for batch in options.batches]
    settings = {"frames": options.frames, "words": options.words, "torch": torch.__version__}
    report(rows, options, **settings, matmul_gflops=matmul_rates())


if __name__ == "__main__":
    main()

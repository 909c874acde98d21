"""Time, FLOP/s and memory of the training step in PyTorch, to compare with `train_step`.

    python -m benchmarks.pytorch_step [--batches=4] [--record]

The towers are CLIP's in transformers; a temporal head, WTI and the contrastive loss follow. It
leaves out CDCR, normalises no pixels, and attention and AdamW are PyTorch's fused ones, all of
which the paper's program has otherwise and slower. Columns are those of `train_step`, and so are
the FLOPs. Needs torch and transformers, best in a virtual environment of their own, beside jax,
flax, optax and numpy. On the CPU, in float32.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from benchmarks.measure import arguments, peak_memory, positive_int, positive_ints, report
from benchmarks.train_step import train_step_flops
from drl_jax.config import ModelConfig
from drl_jax.runtime.allocator import keep_freed_memory


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


def matmul_rate(repeats: int) -> float:
    """Measured FLOP/s of the product of two large square matrices: the fastest."""
    size = 3072
    a = torch.ones(size, size)
    taken = []
    for _ in range(repeats + 1):  # The first is the warm-up.
        start = time.perf_counter()
        a @ a
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken[1:])


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
    taken, rates = [], []
    for _ in range(steps + 1):  # The first is the warm-up.
        start = time.perf_counter()
        model(text_ids, images).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - start)
        rates.append(matmul_rate(repeats=2))
    taken, rates = taken[1:], rates[1:]
    flops = train_step_flops(config, batch, frames, words)
    fractions = [flops / seconds / rate for seconds, rate in zip(taken, rates, strict=True)]
    step_seconds = statistics.median(taken)
    return {
        "model": "ViT-B/32",
        "dtype": "float32",
        "batch": batch,
        "step_seconds": round(step_seconds, 4),
        "pairs_per_second": round(batch / step_seconds, 3),
        "tflops_per_second": round(flops / step_seconds / 1e12, 4),
        "matmul_tflops_per_second": round(statistics.median(rates) / 1e12, 4),
        "fraction_of_matmul": round(statistics.median(fractions), 3),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each batch size."""
    parser = arguments("pytorch_step", __doc__.splitlines()[0])
    parser.add_argument(
        "--batches",
        type=positive_ints,
        default="4",
        help="pairs of the global batch, e.g. 4,8 (%(default)s)",
    )
    parser.add_argument(
        "--frames", type=positive_int, default=12, help="frames per video (%(default)s)"
    )
    parser.add_argument(
        "--words", type=positive_int, default=32, help="tokens per text (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=5, help="timed steps, after a warm-up (%(default)s)"
    )
    options = parser.parse_args(argv)
    keep_freed_memory()
    sizes = (options.frames, options.words, options.steps)
    rows = [measure(ModelConfig(), batch, *sizes) for batch in options.batches]
    report(
        rows,
        options,
        frames=options.frames,
        words=options.words,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()

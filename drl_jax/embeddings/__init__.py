"""Files of embeddings: what a model computes of captions and videos, for other programs."""

# Suffixes of the formats.
SUFFIXES = (".npz", ".safetensors", ".parquet")
# Precisions of the stored features.
DTYPES = ("float32", "float16")
# Captions or videos in a file, unless a command asks for another number.
SHARD_SIZE = 1000

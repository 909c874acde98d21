"""Text-video search over an index of the features of video files."""

# How features are stored in an index; masks and weights are stored exactly.
STORAGES = ("bfloat16", "int8", "float32")
# Moments of a video that a hit has at most, unless a query asks for more.
MOMENTS = 3
# Windows that an engine is asked for, to be compared exactly.
CANDIDATES = 500

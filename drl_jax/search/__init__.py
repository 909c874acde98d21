"""Text-video search over an index of the features of video files."""

# How features are stored in an index; masks and weights are stored exactly.
STORAGES = ("bfloat16", "int8", "float32")
# What finds candidates: see `ranking.SearchOptions`.
ENGINES = ("auto", "exact", "scan", "qdrant")
# Moments of a video that a hit has at most, unless a query asks for more.
MOMENTS = 3
# Windows that a scan or an engine finds, to be compared exactly.
CANDIDATES = 500
# Windows at training pace that a query makes, to rank its candidates and to find where they start.
REFINE = 128
# Windows above which `--engine=auto` scans.
SCAN_FROM = 20_000
# Frames side by side in a strip of thumbnails.
STRIP_FRAMES = 64

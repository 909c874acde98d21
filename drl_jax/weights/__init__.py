"""Files of weights, wherever they come from."""

# Flags that describe a file of weights.
FILE_FLAGS = {
    "release": "the release, for a CLIP that does not say its own",
    "weights_key": "prefix of the towers, if it holds several; clip: without the heads of DRL",
    "tokenizer": "its tokenizer, if that is not beside the file",
}

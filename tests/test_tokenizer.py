import numpy as np

from drl_jax.models.tokenizer import token_strings, tokenize


def test_known_ids():
    ids, mask = tokenize(["a photo of a cat"], 10)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0, 0]
    assert mask[0].tolist() == [True] * 7 + [False] * 3


def test_a_long_caption_keeps_its_end_mark():
    ids, mask = tokenize(["dog " * 50, "dog"], 8)
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert mask[0].all()
    assert mask[1].sum() == 3


def test_tokens_as_text():
    ids, mask = tokenize(["a red dog!"], 12)
    assert token_strings(ids[0][mask[0]]) == ["[start]", "a", "red", "dog", "!", "[end]"]
    ids, mask = tokenize(["it shrinks"], 12)
    assert token_strings(ids[0][mask[0]]) == ["[start]", "it", "shrin-", "ks", "[end]"]


def test_cleaning_is_openais():
    ids, _ = tokenize(["A  CAT &amp;amp; a\tdog", "a cat & a dog"], 12)
    np.testing.assert_array_equal(ids[0], ids[1])


def test_the_mask_is_not_a_guess_from_the_ids():
    ids, mask = tokenize(["!$", ""], 6)
    assert ids[0].tolist() == [49406, 0, 259, 49407, 0, 0]
    assert mask[0].tolist() == [True] * 4 + [False] * 2
    assert mask[1].sum() == 2

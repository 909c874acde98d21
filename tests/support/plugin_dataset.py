"""A plugin: a dataset."""

import json

import drl_jax
from data_prep.annotations import Annotations, Captioned
from data_prep.retrieval_builder import RetrievalBuilder


class Builder(RetrievalBuilder):
    @classmethod
    def read_annotations(cls, path):
        captions = json.loads((path / "mine.json").read_text())
        videos = [Captioned(video, [caption]) for video, caption in captions.items()]
        return Annotations({"test": videos}, files=[path / "mine.json"])


drl_jax.register_dataset("mine", Builder)

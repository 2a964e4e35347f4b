"""The KV cache of one talk, cut back to the common prefix of the next prompt and the tokens read so far.

A talk grows at its end, so the cache holds all but the last question. After undo, retry or a new system text the common
prefix is shorter. The cache is reused only if a fresh computation would give the same states.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from transformers import DynamicCache, PretrainedConfig

from mllm.chat.transcript import Picture

Key = int | tuple[str, int]
"""A position's state is reused if its key is equal: the token, and the image of an image token."""


class PrefixCache:
    """Keys and values of the tokens that a model has read of one talk.

    Args:
        image_ids: the ids of the placeholder tokens of images and videos.
    """

    def __init__(self, image_ids: Collection[int]) -> None:
        self.image_ids = image_ids
        self.forget()

    def forget(self) -> None:
        """Drop the cache and free its memory."""
        self._cache: DynamicCache | None = None
        self._read: list[Key] = []
        self._images: Sequence[Picture] = ()  # kept alive: the identity of an image is its key

    def reuse(self, ids: Sequence[int], images: Sequence[Picture], tokens: Sequence[int]) -> tuple[int, int]:
        """Cut the cache back to its longest common prefix with a prompt; returns the prefix's tokens and images.

        `tokens` are those of each image. At least one token remains to be computed: its output is the first token of
        the answer. An image is reused whole or not at all, because it is computed whole.
        """
        keys = self._keys(ids, images, tokens)
        whole = [0, *itertools.accumulate(tokens)]
        limit = min(len(keys) - 1, len(self._read))
        shared = next((i for i in range(limit) if keys[i] != self._read[i]), limit)
        while shared and isinstance(keys[shared], tuple) and _image_tokens(keys[:shared]) not in whole:
            shared -= 1
        if self._cache is not None and shared < len(self._read):
            try:
                self._cache.crop(shared - len(self._read))
            except (RuntimeError, ValueError):  # layers with a sliding window have dropped states
                shared = 0
        if shared == 0:
            self.forget()
        return shared, whole.index(_image_tokens(keys[:shared]))

    def take(self, config: PretrainedConfig) -> DynamicCache:
        """The cache for `generate`, or a new cache for a model of `config`.

        `keep` must return it: `generate` changes it in place, so after an error its tokens are unknown.
        """
        cache = DynamicCache(config=config) if self._cache is None else self._cache
        self.forget()
        return cache

    def keep(
        self,
        cache: DynamicCache,
        ids: Sequence[int],
        answer: Sequence[int],
        images: Sequence[Picture],
        tokens: Sequence[int],
    ) -> None:
        """Store the `cache` of the prompt `ids` and its `answer`, whose last token was never read."""
        self._cache, self._images = cache, images
        self._read = [*self._keys(ids, images, tokens), *answer][: cache.get_seq_length()]

    def _keys(self, ids: Sequence[int], images: Sequence[Picture], tokens: Sequence[int]) -> list[Key]:
        keys: list[Key] = list(ids)
        places = [i for i, token in enumerate(ids) if token in self.image_ids]
        shown = [image for image, count in zip(images, tokens, strict=True) for _ in range(count)]
        for place, image in zip(places, shown, strict=True):
            keys[place] = ("image", id(image))
        return keys


def _image_tokens(keys: list[Key]) -> int:
    return sum(isinstance(key, tuple) for key in keys)

"""The KV cache of one talk, cut back to the common prefix of the next prompt and the tokens read so far.

A talk grows at its end, so the cache holds all but the last question. After undo, retry or a new system text the common
prefix is shorter. The cache is reused only if a fresh computation would give the same states.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache, PretrainedConfig

from mllm.chat.transcript import Picture

Key = int | tuple[str, int]
"""A position's state is reused if its key is equal: the token, and the image of an image token."""


class PrefixCache:
    """Keys and values of the tokens that a model has read of one talk.

    Args:
        image_id: the id of an image's placeholder token.
        tokens_per_image: placeholder tokens of one image.
    """

    def __init__(self, image_id: int, tokens_per_image: int) -> None:
        self.image_id, self.tokens_per_image = image_id, tokens_per_image
        self.forget()

    def forget(self) -> None:
        """Drop the cache and free its memory."""
        self._cache: DynamicCache | None = None
        self._read: list[Key] = []
        self._images: Sequence[Picture] = ()  # kept alive: the identity of an image is its key

    def reuse(self, ids: Sequence[int], images: Sequence[Picture]) -> int:
        """Cut the cache back to its longest common prefix with a prompt; returns the length of the prefix.

        At least one token remains to be computed: its output is the first token of the answer. An image is reused
        whole or not at all, because it is computed whole.
        """
        keys = self._keys(ids, images)
        limit = min(len(keys) - 1, len(self._read))
        shared = next((i for i in range(limit) if keys[i] != self._read[i]), limit)
        while shared and isinstance(keys[shared], tuple) and self._ends_inside_image(keys[:shared]):
            shared -= 1
        if self._cache is not None and shared < len(self._read):
            try:
                self._cache.crop(shared - len(self._read))
            except (RuntimeError, ValueError):  # layers with a sliding window have dropped states
                shared = 0
        if shared == 0:
            self.forget()
        return shared

    def take(self, config: PretrainedConfig) -> DynamicCache:
        """The cache for `generate`, or a new cache for a model of `config`.

        `keep` must return it: `generate` changes it in place, so after an error its tokens are unknown.
        """
        cache = DynamicCache(config=config) if self._cache is None else self._cache
        self.forget()
        return cache

    def keep(self, cache: DynamicCache, ids: Sequence[int], answer: Sequence[int], images: Sequence[Picture]) -> None:
        """Store the `cache` of the prompt `ids` and its `answer`, whose last token was never read."""
        self._cache, self._images = cache, images
        self._read = [*self._keys(ids, images), *answer][: cache.get_seq_length()]

    def _keys(self, ids: Sequence[int], images: Sequence[Picture]) -> list[Key]:
        keys: list[Key] = list(ids)
        places = [i for i, token in enumerate(ids) if token == self.image_id]
        for number, place in enumerate(places):
            keys[place] = ("image", id(images[number // self.tokens_per_image]))
        return keys

    def _ends_inside_image(self, keys: list[Key]) -> bool:
        return sum(isinstance(key, tuple) for key in keys) % self.tokens_per_image != 0

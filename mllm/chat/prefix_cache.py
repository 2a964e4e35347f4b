"""The KV cache of one talk, cut back to what the next prompt has in common with what the model has read.

A talk grows at its end, so all but the last question was computed for the answer before; after undo, retry or an edited
system text the common part is shorter. A cache is reused only where a fresh computation would give the same states.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache, PretrainedConfig

from mllm.chat.transcript import Picture

Key = int | tuple[str, int]
"""What must be equal for a position's state to be usable: the token, and for an image's token which image it is."""


class PrefixCache:
    """Keys and values of the tokens that a model has read of one talk.

    Args:
        image_id: the id of an image's placeholder token.
        tokens_per_image: how many of them stand for one image.
    """

    def __init__(self, image_id: int, tokens_per_image: int) -> None:
        self.image_id, self.tokens_per_image = image_id, tokens_per_image
        self.forget()

    def forget(self) -> None:
        """Drop what was read, and its memory."""
        self._cache: DynamicCache | None = None
        self._read: list[Key] = []
        self._images: Sequence[Picture] = ()  # keeps them alive, for their identity is their key

    def reuse(self, ids: Sequence[int], images: Sequence[Picture]) -> int:
        """Cut the cache back to its longest common prefix with a prompt; returns that prefix' length.

        At least one token is left to compute, for its output is the first token of the answer; and an image is reused
        whole or not at all, for it is computed whole.
        """
        keys = self._keys(ids, images)
        limit = min(len(keys) - 1, len(self._read))
        shared = next((i for i in range(limit) if keys[i] != self._read[i]), limit)
        while shared and isinstance(keys[shared], tuple) and self._ends_inside_image(keys[:shared]):
            shared -= 1
        if self._cache is not None and shared < len(self._read):
            try:
                self._cache.crop(shared - len(self._read))
            except (RuntimeError, ValueError):  # layers with a sliding window have dropped what would be needed
                shared = 0
        if shared == 0:
            self.forget()
        return shared

    def take(self, config: PretrainedConfig) -> DynamicCache:
        """The cache for `generate` to go on with, or a new one for a model of `config`.

        It counts again once `keep` gets it back: `generate` changes it in place, so after an error it holds something
        that no list of tokens describes.
        """
        cache = DynamicCache(config=config) if self._cache is None else self._cache
        self.forget()
        return cache

    def keep(self, cache: DynamicCache, ids: Sequence[int], answer: Sequence[int], images: Sequence[Picture]) -> None:
        """Remember `cache` as that of the prompt `ids` and its `answer`, whose last token was never read."""
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

"""Sentences are found in captions whose sentences are known."""

from __future__ import annotations

import pytest
from sentence_set import TEMPLATES, captions, score

from clips.data.sentences import split_sentences


@pytest.mark.parametrize("part", ["tuned", "held_out"])
def test_boundaries_are_found_in_captions_whose_sentences_are_known(part):
    """docs/method.md gives the figures; other seeds of the same templates do not differ by half a point."""
    known = captions(2000, part, seed=1)
    assert sum(len(caption.sentences) - 1 for caption in known) > 5000
    assert {kind for caption in known for kind in caption.kinds} == {*TEMPLATES, "lower case"}
    precision, recall = score(split_sentences, known)
    assert precision >= 99
    assert recall >= 99.5

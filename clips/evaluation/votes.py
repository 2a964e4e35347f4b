"""Does an encoder rank captions as people do? Kendall's tau of its cosines and human votes (arXiv 2104.08718).

A line of the file is a JSON object: `image` (a file's name), `caption`, and `scores` (one of each expert) or `yes` and
`no` (counts of a crowd). `own` marks a picture's own caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePosixPath

from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes
from clips.data.guess import say_once
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.encode import ImageSet, encode_texts
from clips.evaluation.metrics import Figure
from clips.model.clips import CLIPSModel

EXPERT, CROWD = "expert_votes_tau", "crowd_votes_tau"
VOTES = {EXPERT: "c", CROWD: "b"}  # figure → variant of Kendall's tau
Vote = tuple[str, str, str, float]  # figure, image, caption, value


def read_votes(path: str) -> list[Vote]:
    """Every expert's score, and every crowd's share of yes. Raises UserError for a line that is no vote.

    Experts' scores of a picture's own caption are left out, as in CLIPScore.
    """
    votes: list[Vote] = []
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            vote = from_json(line)
            figure = EXPERT if "scores" in vote else CROWD
            values = vote["scores"] if figure == EXPERT else [vote["yes"] / (vote["yes"] + vote["no"])]
            image = PurePosixPath(vote["image"]).stem
            entries = [(figure, image, str(vote["caption"]), float(value)) for value in values]
            if not all(math.isfinite(value) for *_, value in entries):
                raise ValueError("not finite")
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise UserError(f"{path}, line {number}: no image, caption and scores, or yes and no: {error!r}") from None
        if not (figure == EXPERT and vote.get("own")):
            votes += entries
    return votes


def measure_votes(
    model: CLIPSModel, tokenizer: CaptionTokenizer, images: ImageSet, votes: Sequence[Vote], *, batch_size: int
) -> dict[str, Figure]:
    """100 x tau: `expert_votes_tau` (tau-c, every score by itself) and `crowd_votes_tau` (tau-b, the share of yes).

    Votes about other pictures are left out and counted. Raises UserError if no vote is about one of `images`.
    """
    from scipy.stats import kendalltau

    row_of = {PurePosixPath(key.rpartition("#")[2]).stem: row for row, key in enumerate(images.keys)}
    known = [(figure, row_of[image], caption, value) for figure, image, caption, value in votes if image in row_of]
    if not known:
        raise UserError("--votes: no vote is about a picture of the test set")
    if len(known) < len(votes):
        say_once(f"{len(votes) - len(known):,} of {len(votes):,} votes are about pictures that are not in the test set")
    figures = {}
    for figure, variant in VOTES.items():
        if opinions := [vote for vote in known if vote[0] == figure]:
            _, rows, captions, values = zip(*opinions, strict=True)
            texts = encode_texts(model, tokenizer, captions, batch_size=batch_size)
            cosines = (images.features[list(rows)].float() * texts.float()).sum(1)
            tau = float(kendalltau(cosines, values, variant=variant).statistic)  # NaN: all cosines are equal
            figures[figure] = Figure(0.0 if math.isnan(tau) else round(100 * tau, 4), 0.0, len(opinions))
    return figures

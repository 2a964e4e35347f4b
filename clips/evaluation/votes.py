"""Does an encoder rank captions as people do? Kendall's tau of its cosines and human votes (arXiv 2104.08718).

A line of the file is a JSON object: `image` (a file's name), `caption`, and `scores` (one of each expert) or `yes` and
`no` (counts of a crowd). `own` marks a picture's own caption.
"""

from __future__ import annotations

import math
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


def measure_votes(
    model: CLIPSModel, tokenizer: CaptionTokenizer, images: ImageSet, path: str, *, batch_size: int
) -> dict[str, Figure]:
    """100 x tau: `expert_votes_tau` (tau-c, every score by itself) and `crowd_votes_tau` (tau-b, the share of yes).

    Experts' scores of a picture's own caption are left out, as in CLIPScore. Votes about other pictures are left out
    and counted. Raises UserError for a line that is no vote, and if no vote is about one of `images`.
    """
    from scipy.stats import kendalltau

    row_of = {PurePosixPath(key.rpartition("#")[2]).stem: row for row, key in enumerate(images.keys)}
    votes: dict[str, list[tuple[int, str, float]]] = {name: [] for name in VOTES}
    foreign = 0
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            vote = from_json(line)
            row = row_of.get(PurePosixPath(vote["image"]).stem)
            is_expert = "scores" in vote
            values = vote["scores"] if is_expert else [vote["yes"] / (vote["yes"] + vote["no"])]
            entries = [(str(vote["caption"]), float(value)) for value in values]
            if not all(map(math.isfinite, (value for _, value in entries))):
                raise ValueError("not finite")
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise UserError(f"{path}, line {number}: no image, caption and scores, or yes and no: {error!r}") from None
        foreign += row is None
        if row is not None and not (is_expert and vote.get("own")):
            votes[EXPERT if is_expert else CROWD] += [(row, *entry) for entry in entries]
    if foreign:
        say_once(f"{foreign:,} of {number:,} lines of {path} are about pictures that are not in the test set")
    figures = {}
    for name, opinions in votes.items():
        if opinions:
            rows, captions, values = zip(*opinions, strict=True)
            texts = encode_texts(model, tokenizer, captions, batch_size=batch_size)
            cosines = (images.features[list(rows)].float() * texts.float()).sum(1)
            tau = float(kendalltau(cosines, values, variant=VOTES[name]).statistic)  # NaN: all cosines are equal
            figures[name] = Figure(0.0 if math.isnan(tau) else round(100 * tau, 4), 0.0, len(opinions))
    if not figures:
        raise UserError(f"{path}: no vote is about a picture of the test set")
    return figures

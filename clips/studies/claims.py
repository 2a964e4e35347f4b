"""The paper's claims as data: variants of a recipe, what is compared with what, and when a claim counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clips.config import Fields
from clips.data.demo import WITH_ERRORS
from clips.evaluation.testsets import PROTOCOLS

DECIDING = "sentence_r1"
"""The figure that decides every claim: retrieval with the test set's sentences, as the paper's own tables have it. On
a test set `unseen`, where the runs have one, as on the demo (`clips.common.rundir.deciding_name`)."""
MEANS = {f"{protocol}_r1": (f"{protocol}_i2t_r1", f"{protocol}_t2i_r1") for protocol in PROTOCOLS}
"""R@1 of a protocol as the mean of both ways."""
FIGURES = (*(name for both in MEANS.values() for name in both), "zero_shot_top1", "linear_probe_top1")
CONTEXT = "model.text.context_length=80"
"""The demo's text tower reads 56 slots and would cut a sixth of the long captions (40 tokens on average); of these it
cuts one in a thousand (82 tokens at most)."""
CAPTIONS = f"data.fields.long=json:{WITH_ERRORS};{Fields().long}"
"""Synthetic captions of photographs err. The demo has such ones, too, for training; other data have what they have."""
BLOCK_TOKENS = 12
"""Tokens that truncation and the masks keep: as many as a sentence of the demo's long captions has on average."""
OVERHEAD_SECONDS = 25
"""Of each run, beside training: start, evaluation, export, report."""


@dataclass(frozen=True)
class Variant:
    label: str
    recipe: str
    settings: tuple[str, ...]
    rate: int
    """Samples per second on one core, for the estimate of the time: "web", "synthetic20" and "captioner" as measured
    beside another run, the others in the same ratios as on the first demo."""


NO_CAPTIONER = ("model.captioner=null", "task.caption_weight=0")
SENTENCE = "captions.strategy=sentence"


def _masked(strategy: str) -> tuple[str, ...]:
    return (*NO_CAPTIONER, f"captions.strategy={strategy}", f"captions.sub_caption_tokens={BLOCK_TOKENS}")


VARIANTS = {
    "web": Variant("web caption only", "clip_baseline", ("task.synthetic_share=0",), 350),
    "synthetic20": Variant("20 % synthetic", "clip_baseline", ("task.synthetic_share=0.2",), 240),
    "synthetic50": Variant("50 % synthetic", "clip_baseline", ("task.synthetic_share=0.5",), 190),
    "synthetic100": Variant("100 % synthetic", "clip_baseline", ("task.synthetic_share=1",), 190),
    "sentence": Variant("web + one sentence", "demo", (*NO_CAPTIONER, SENTENCE), 260),
    "half": Variant(
        "web + half of the sentences", "demo", (*NO_CAPTIONER, SENTENCE, "captions.sentence_share=0.5"), 210
    ),
    "full": Variant("web + full caption", "demo", (*NO_CAPTIONER, "captions.strategy=full"), 175),
    "truncation": Variant(f"web + first {BLOCK_TOKENS} tokens", "demo", _masked("truncation"), 260),
    "random_mask": Variant(f"web + {BLOCK_TOKENS} scattered tokens", "demo", _masked("random_mask"), 260),
    "block_mask": Variant(f"web + {BLOCK_TOKENS} tokens in a row", "demo", _masked("block_mask"), 260),
    "captioner": Variant("web + one sentence + captioner", "demo", (SENTENCE,), 165),
}


@dataclass(frozen=True)
class Claim:
    title: str
    paper: str
    """What the paper says."""
    variants: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]
    """(better, worse) according to the paper; each is decided by itself."""
    caution: str
    """What else could explain a difference here."""
    line: bool = False
    """Whether the variants are steps of one quantity, drawn as a line."""


CLAIMS = {
    "a": Claim(
        title="Inverse effect: a short piece of the long caption teaches more than all of it",
        paper="The shorter the piece of the synthetic caption that the text encoder is fed, the better the encoder.",
        variants=("sentence", "half", "full"),
        contrasts=(("sentence", "full"), ("sentence", "half"), ("half", "full")),
        caution="The test sentences have about 22 tokens: on average twice one sentence of the training (11), as many "
        "as half of them (22), and far fewer than the full caption (40); with the web caption (6) as second text the "
        "full-caption model hardly saw a text of that length. So part of a gain may be the length alone. Two figures "
        "show how much: retrieval with the full long captions as texts, where it is the other way round, and the "
        "linear probe, which reads no text at all. All three are trained with the web caption as second text and "
        "without the captioner, so that only the length differs.",
        line=True,
    ),
    "b": Claim(
        title="Ablation: web caption only → + sub-caption → + captioner",
        paper="A sub-caption as second text beats the web caption alone; the captioner on top is better still.",
        variants=("web", "sentence", "captioner"),
        contrasts=(("sentence", "web"), ("captioner", "sentence")),
        caution="Equal samples seen is not equal time: see the seconds of training. The demo's web captions have about "
        "6 tokens and a fifth of them is wrong, so whatever reads the long captions, wrong about a tenth of the facts, "
        "has better and longer texts too. The web-only variant runs at the baseline recipe's learning rates, the "
        "others at the demo recipe's.",
    ),
    "c": Claim(
        title="Sub-caption strategies at equal mean length",
        paper="Of the four ways to shorten a caption, the sub-caption (a sentence) and the block mask work best.",
        variants=("sentence", "truncation", "random_mask", "block_mask"),
        contrasts=(
            ("sentence", "truncation"),
            ("sentence", "random_mask"),
            ("block_mask", "truncation"),
            ("block_mask", "random_mask"),
        ),
        caution="Equal on average only: one sentence has 8 to 36 tokens, the three others 12, so only it ever "
        "trains texts as long as the test's (22 on average). The comparisons with one sentence are partly that; "
        "“in a row” against “scattered”, and the linear probe, are not. First words: every caption begins with the "
        "sentence that names everything, but 12 tokens cut it wherever there are several things.",
    ),
    "d": Claim(
        title="Share of synthetic captions for the CLIP baseline",
        paper="The paper's baseline draws the synthetic caption for 20 % of the images. What that choice implies is "
        "tested: better than none, and better than synthetic captions only.",
        variants=("web", "synthetic20", "synthetic50", "synthetic100"),
        contrasts=(("synthetic20", "web"), ("synthetic20", "synthetic100")),
        caution="The demo's long captions are wrong about a tenth of the facts; synthetic captions of photographs err "
        "in other ways, and are less varied than what people write, which speaks for a small share there. The one text "
        "has 6, 12, 23 and 40 tokens on average: the shares differ in lengths, too, and web captions as texts (beside) "
        "go the other way. The learning rates were found at 20 %.",
        line=True,
    ),
}
LLAVA = "e"
LLAVA_TITLE = "LLaVA with CLIPS against LLaVA with CLIP"
LLAVA_PAPER = "With the CLIPS encoder LLaVA answers better than with a CLIP encoder."
REPRODUCED, CONTRADICTED, OPEN = "reproduced here", "contradicted here", "not reproduced here"


def verdict(ci95: Sequence[float] | None) -> str:
    """What the 95 % interval of (better − worse) says about a claim; without an interval nothing is shown."""
    if ci95 is None or ci95[0] <= 0 <= ci95[1]:
        return OPEN
    return REPRODUCED if ci95[0] > 0 else CONTRADICTED


def summary(verdicts: Sequence[str]) -> str:
    """One line for several comparisons."""
    counts = {kind: verdicts.count(kind) for kind in (REPRODUCED, CONTRADICTED, OPEN) if kind in verdicts}
    if len(counts) == 1:
        return verdicts[0]
    return ", ".join(f"{count} of {len(verdicts)} {kind}" for kind, count in counts.items())

"""The paper's claims at small scale: variants of the recipes, and which should beat which.

A variant that several claims need is trained once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.page import Page
from clips.config import Fields
from clips.data.demo import WITH_ERRORS
from clips.studies.variants import DECIDING, Hypothesis, Study, Variant, check_settings, seeded_runs
from clips.studies.variants_page import Words, page

CONTEXT = "model.text.context_length=80"
"""The demo's text tower reads 56 tokens and would cut a sixth of the long captions. 80 tokens cut one in a thousand."""
CAPTIONS = f"data.fields.long=json:{WITH_ERRORS};{Fields().long}"
"""The demo's long captions with errors, as synthetic captions of photographs have; other data have their own."""
BLOCK_TOKENS = 12
"""Tokens that truncation and the masks keep: the mean length of a sentence of the demo's long captions."""
NO_CAPTIONER = ("model.captioner=null", "task.caption_weight=0")
SENTENCE = "captions.strategy=sentence"
WEB = ("task.synthetic_share=0",)


def _masked(strategy: str) -> tuple[str, ...]:
    return (*NO_CAPTIONER, f"captions.strategy={strategy}", f"captions.sub_caption_tokens={BLOCK_TOKENS}")


PHOTOGRAPHS = {"demo": "small_captioner", "clip_baseline": "small_clip"}
"""The recipe that takes the place of each variant's recipe with `--recipe small`."""
LONGER, SENTENCE_LONGER = 1.4, 1.2
"""About how many samples CLIP (recipe `small_clip`), and CLIPS without its captioner, see in the time in which CLIPS
(`small_captioner`) sees one, on one thread of an AMD EPYC with AVX-512 bf16 (docs/hardware.md)."""
VARIANTS = {
    "web": Variant("web caption only", "clip_baseline", WEB),
    "web_longer": Variant(f"web caption only, {LONGER} × the samples", "clip_baseline", WEB, times=LONGER),
    "synthetic20": Variant("20 % synthetic", "clip_baseline", ("task.synthetic_share=0.2",)),
    "synthetic50": Variant("50 % synthetic", "clip_baseline", ("task.synthetic_share=0.5",)),
    "synthetic100": Variant("100 % synthetic", "clip_baseline", ("task.synthetic_share=1",)),
    "sentence": Variant("web + one sentence", "demo", (*NO_CAPTIONER, SENTENCE)),
    "half": Variant("web + half of the sentences", "demo", (*NO_CAPTIONER, SENTENCE, "captions.sentence_share=0.5")),
    "full": Variant("web + full caption", "demo", (*NO_CAPTIONER, "captions.strategy=full")),
    "truncation": Variant(f"web + first {BLOCK_TOKENS} tokens", "demo", _masked("truncation")),
    "random_mask": Variant(f"web + {BLOCK_TOKENS} scattered tokens", "demo", _masked("random_mask")),
    "block_mask": Variant(f"web + {BLOCK_TOKENS} tokens in a row", "demo", _masked("block_mask")),
    "captioner": Variant("web + one sentence + captioner", "demo", (SENTENCE,)),
    "sentence_longer": Variant(
        f"web + one sentence, {SENTENCE_LONGER} × the samples", "demo", (*NO_CAPTIONER, SENTENCE), times=SENTENCE_LONGER
    ),
}
CLAIMS = {
    "a": Hypothesis(
        title="Inverse effect: a short piece of the long caption teaches more than all of it",
        paper="The shorter the piece of the synthetic caption that the text encoder is fed, the better the encoder.",
        variants=("sentence", "half", "full"),
        contrasts=(("sentence", "full"), ("sentence", "half"), ("half", "full")),
        caution="The test sentences have about 22 tokens: twice one sentence of the training (11), as many as half of "
        "the sentences (22), far fewer than the full caption (40). So part of a difference may be the length alone. "
        "Retrieval with the full long captions and the linear probe, which reads no text, show how much.",
    ),
    "b": Hypothesis(
        title="Ablation: web caption only → + sub-caption → + captioner",
        paper="A sub-caption as second text beats the web caption alone; the captioner on top is better still.",
        variants=("web", "sentence", "captioner"),
        contrasts=(("sentence", "web"), ("captioner", "sentence")),
        caution="Equal samples are not equal time: see the seconds of training. The demo's web captions have about 6 "
        "tokens, and a fifth of them is wrong; the long captions are better and longer texts. The web-only variant "
        "runs at the baseline recipe's learning rates, the others at the demo recipe's.",
    ),
    "c": Hypothesis(
        title="Sub-caption strategies at equal mean length",
        paper="Of the four ways to shorten a caption, the sub-caption (a sentence) and the block mask work best.",
        variants=("sentence", "truncation", "random_mask", "block_mask"),
        contrasts=(
            ("sentence", "truncation"),
            ("sentence", "random_mask"),
            ("block_mask", "truncation"),
            ("block_mask", "random_mask"),
        ),
        caution="The lengths are equal on average only: a sentence has 8 to 36 tokens, the others have 12, so only "
        "the sentence trains texts as long as the test's. First words: every caption begins with the sentence that "
        "names everything, but 12 tokens cut that sentence if there are several things.",
    ),
    "d": Hypothesis(
        title="Share of synthetic captions for the CLIP baseline",
        paper="The paper's baseline draws the synthetic caption for 20 % of the images. This choice implies: better "
        "than none, and better than synthetic captions only.",
        variants=("web", "synthetic20", "synthetic50", "synthetic100"),
        contrasts=(("synthetic20", "web"), ("synthetic20", "synthetic100")),
        caution="Synthetic captions of photographs err in other ways and are less varied than human texts, which "
        "speaks for a small share there. The shares differ in the mean length of the text, too (6, 12, 23, 40 "
        "tokens). The learning rates were found at 20 %.",
    ),
}
WORDS: Words = {
    "win": "reproduced here",
    "loss": "contradicted here",
    "tie": "not reproduced here",
    "undecided": "undecided",
}
DRAWN = "The scenes are drawings with generated captions. "
LIMITS = (
    "The models are tiny: a claim that fails here may hold at the paper's scale, and the other way round. Runs see "
    "equal samples, not equal time, unless a label says so. Learning rates are those of the recipes, not searched for "
    "each variant."
)


def on_photographs() -> dict[str, Hypothesis]:
    """Return the claims as they are tested on photographs, by letter.

    Their cautions, which concern the demo's captions, are removed. Claim (b) also compares "captioner" with "web", and
    claim (f) compares CLIPS and CLIP at equal training time.
    """
    claims = {key: replace(claim, caution="") for key, claim in CLAIMS.items()}
    claims["b"] = replace(claims["b"], contrasts=(*claims["b"].contrasts, ("captioner", "web")))
    claims["f"] = Hypothesis(
        title="CLIPS, with and without its captioner, against CLIP at equal time",
        variants=("captioner", "sentence_longer", "web_longer"),
        contrasts=(
            ("captioner", "web_longer"), ("sentence_longer", "web_longer"), ("captioner", "sentence_longer"),
        ),
    )  # fmt: skip
    return claims


def variant_study(
    runs_of: Sequence[str],
    seeds: Sequence[int],
    samples: int,
    settings: Sequence[str],
    recipe: str = "demo",
    **study: Any,
) -> Study:
    """Return a study of the variants `runs_of`, names in VARIANTS, with a run for each seed.

    `settings` are the `--set` of all runs; a variant's own settings come last. `study` are further fields of `Study`.
    """
    variants = VARIANTS
    captions = [CAPTIONS]
    if recipe == "small":
        variants = {name: replace(v, recipe=PHOTOGRAPHS[v.recipe]) for name, v in VARIANTS.items()}
        captions = []
    runs = seeded_runs({name: variants[name] for name in runs_of}, seeds, samples, (*captions, *settings, CONTEXT))
    return Study(variants=variants, runs=runs, **study)


def reproduce(
    output: Path,
    claims: Sequence[str],
    *,
    seeds: int = 5,
    samples: int = 48_000,
    jobs: int = 2,
    settings: Sequence[str] = (),
    decides: str = DECIDING,
    recipe: str = "demo",
    first_seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Train what is missing for `claims` (letters), and write claims.json and claims.html into `output`.

    Return the result, or None with `dry_run`, which only prints the plan. Raises UserError for an unknown claim, fewer
    than two seeds, or an `output` whose runs have other settings; CommandError when a run fails.
    """
    known = on_photographs() if recipe == "small" else CLAIMS
    unknown = [key for key in claims if key not in known]
    if unknown:
        raise UserError(f"--claims: no claim {', '.join(unknown)}; known: {', '.join(known)}")
    questions = {key: claim for key, claim in known.items() if key in claims}
    names = list(dict.fromkeys(name for claim in questions.values() for name in claim.variants))
    about = {"name": "claims", "title": "The claims of CLIPS", "questions": questions, "decides": decides}
    study = variant_study(names, range(first_seed, first_seed + seeds), samples, settings, recipe, **about)
    check_settings(study.everything())
    return study.carry_out(output, jobs, claims_page, dry_run=dry_run)


def claims_page(result: Mapping[str, Any]) -> Page:
    """Render the result of the claims study as a page."""
    variants = result["variants"].values()
    note = f"{result['samples']:,} samples seen by a run, {result['seeds']} seeds"
    is_drawn = all(variant["recipe"] in PHOTOGRAPHS for variant in variants)
    return page(result, "The claims of CLIPS, in small", note, (DRAWN if is_drawn else "") + LIMITS, WORDS)

"""clips/data/tokenizer.py against slow references, hard sentences and stock open_clip."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, get_clean_fn

from clips.common.errors import UserError
from clips.config import CaptionsConfig
from clips.data.sentences import has_words, kept_tokens, split_sentences, sub_caption
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer, clean

KINDS = ("bert", "wordpiece")
STRATEGIES = ("sentence", "truncation", "random_mask", "block_mask", "full")
TEXTS = [
    "A café, isn't it $3.50?",
    "",
    "!",
    "dog " * 100,
    "[CLS] [PAD] [unused0] <pad> <start_of_text> [EOS] are only words",
    "the quick <b>brown</b> fox &lt; 12345 &amp; HELLO\n\tWorld",
    "一只狗 🐶 naïve “quotes” and a lone \ud800 surrogate",
]

# Prose with every mark that the splitter looks at, dense enough to hit the rules.
MARKS = st.sampled_from(
    [*".!?…。！？；\n\r\t\"'”’»)]({“-*1 ", ". ", "... ", "U.S.", "Dr.", "e.g.", "etc.", "J.", "The", "dog", "狗", "🐶"]
)
PROSE = st.lists(MARKS | st.text(max_size=4), max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, CaptionTokenizer]:
    return {kind: build_tokenizer(kind, TEXTS * 3, vocab_size=300) for kind in KINDS}


@pytest.fixture(scope="module")
def saved(tokenizers, tmp_path_factory) -> dict[str, Path]:
    directories = {}
    for kind, tokenizer in tokenizers.items():
        directories[kind] = tmp_path_factory.mktemp(kind) / "tokenizer"
        tokenizer.save(directories[kind])
    return directories


HARD = [
    ["It costs $3.50 today.", "That is cheap."],
    ["The price is $3.50.", "A dog costs 1,000.25 dollars."],
    ["The U.S. Army parades.", "Flags wave in the U.S.", "The crowd cheers."],
    ["Dr. Smith meets Mrs. Jones near St. Paul's.", "They talk."],
    ["J. R. R. Tolkien and George W. Bush read.", "J.R.R. Tolkien smiles."],
    ["Fruit, e.g. apples, i.e. round ones, vs. bananas, etc. in a bowl.", "Bowls, cups, etc.", "Nobody eats."],
    ["It is 5 p.m. on the clock.", "We leave at 9 a.m.", "The bus waits at 9a.m. sharp."],
    ["Is it a dog?", "Yes!", "really?!", "no way!!!", "A cat"],
    ["Wait… what is it…", "Nothing... or so it seems...", "The end."],
    ["He thinks . . . and thinks . . .", "Then he sleeps ."],
    ["A line without a stop", "Another line", "A third one.", "The last"],
    ['"Stop!" he said.', '"Go on."', "She left.", "“Is it?” they asked.", "‘Done.’", "Quiet."],
    ["(A big dog runs.)", "[It barks!]", "A cat (really big!) sleeps.", "**Bold end.**", "Next."],
    ["一只狗。", "一只猫！", "“好。”", "是吗？", "也许；", "好"],
    ["a dog on a bike.", "a cat beside it.", "two birds"],
    ["1. A dog barks.", "2. A cat sleeps."],
    ["See No. 5 and Fig. 3 here.", "Is it?", "No.", "It closes."],
    ["Visit www.example.com or file.txt v2.0.", "Thanks."],
    ["In 1999.", "He moved to Acme Inc. headquarters with Lee Jr. in Dec. 2001.", "Then came 3 dogs."],
    ["A dog. 🐶 !!", "A cat."],
    ["Mr. & Mrs. Smith pose.", "The size is approx. | $25.", "It is approx. $25."],
    ["Bake it for 20 min. until golden.", "It is 12 in. wide.", "Add 2 tbsp. sugar, 1 tsp. salt.", "Temp. below zero."],
    ["Cook it for 20 min.", "The box is 12 in.", "Serve."],
    ["Steps: 1. chop, 2. fry.", "Choose 1. Red, 2. Green.", "They cost $5. and up."],
    ["He is 3.", "She is 4."],
    ["It opens at 9 a.m.", "Visitors wait.", "Lee Chen, Ph.D.", "Visitors read.", "The U.S. Army comes at 5 p.m. EST."],
    ["It is fun! 🎉🎉", "Mail from Yahoo! Mail came."],
    ["「はい！」と言う。", "犬。"],
    ["… A dog"],
]


@pytest.mark.parametrize("sentences", HARD, ids=lambda s: s[0][:24])
def test_hard_sentences(sentences):
    joined = "".join(s if s[-1] in "。！？；”" else s + " " for s in sentences[:-1]) + sentences[-1]
    if "line" in sentences[0]:
        joined = "\n".join(sentences[:2]) + "\n\n" + "\r\n".join(sentences[2:])
    assert split_sentences(joined) == sentences
    assert split_sentences("\n".join(sentences)) == sentences


@given(PROSE)
@settings(max_examples=150, deadline=None)
def test_smart_loses_no_character(text):
    sentences = split_sentences(text)
    assert all(s == s.strip() and any(map(str.isalnum, s)) for s in sentences)
    if any(map(str.isalnum, text)):
        assert "".join("".join(sentences).split()) == "".join(text.split())
    else:
        assert sentences == []


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(ids=st.lists(st.integers(0, 9), max_size=30), tokens=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_strategies_keep_order_and_count_tokens(strategy, ids, tokens, seed):
    config = CaptionsConfig(strategy=strategy, sub_caption_tokens=tokens)
    shortened = kept_tokens(ids, config, random.Random(seed))
    assert shortened == kept_tokens(ids, config, random.Random(seed))
    rest = iter(ids)
    assert all(token in rest for token in shortened), "in order"
    assert len(shortened) == (len(ids) if strategy in ("sentence", "full") else min(tokens, len(ids)))
    if strategy == "truncation":
        assert shortened == ids[:tokens]
    if strategy == "block_mask":
        assert shortened in [ids[i : i + len(shortened)] for i in range(len(ids) + 1)]


@given(PROSE, st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_sentence_is_drawn_as_text_and_other_strategies_leave_the_text_whole(long, seed):
    if not has_words(long):
        return
    assert sub_caption("web", long, CaptionsConfig(), random.Random(seed)) in split_sentences(long)
    for strategy in STRATEGIES[1:]:
        assert sub_caption("web", long, CaptionsConfig(strategy=strategy), random.Random(seed)) == long


def test_draws_are_uniform_and_take_a_numpy_generator():
    rng = np.random.default_rng(0)
    sentence = CaptionsConfig(strategy="sentence")
    drawn = [sub_caption("w", "One. Two. Three. Four.", sentence, rng) for _ in range(4000)]
    counts = [drawn.count(s) for s in ("One.", "Two.", "Three.", "Four.")]
    assert sum(counts) == 4000
    assert min(counts) > 880  # 1000 ± 4.4 standard deviations
    block = CaptionsConfig(strategy="block_mask", sub_caption_tokens=2)
    windows = [tuple(kept_tokens([1, 2, 3, 4], block, rng)) for _ in range(600)]
    assert set(windows) == {(1, 2), (2, 3), (3, 4)}, "the last window too, which the reference never draws"
    assert min(map(windows.count, set(windows))) > 140
    scattered = CaptionsConfig(strategy="random_mask", sub_caption_tokens=2)
    assert len({tuple(kept_tokens([1, 2, 3, 4], scattered, rng)) for _ in range(300)}) == 6


def test_a_share_of_the_sentences():
    """One sentence at least, and in a row; share 0 draws as ever, so that older runs resume to the same."""
    long, rng = "One. Two. Three. Four.", random.Random(0)

    def drawn(share):
        return {sub_caption("w", long, CaptionsConfig(sentence_share=share), rng) for _ in range(100)}

    assert drawn(0.0) == drawn(0.25) == {"One.", "Two.", "Three.", "Four."}
    assert drawn(0.5) == {"One. Two.", "Two. Three.", "Three. Four."}
    assert drawn(1.0) == {long}
    with pytest.raises(UserError, match="sentence_share"):
        CaptionsConfig(sentence_share=1.5)


@given(
    st.one_of(PROSE, st.text(st.characters(max_codepoint=127)), st.text(), st.text("&;ampltg#3x<> \r\n\x0b\x1f\x1b[m"))
)
@settings(max_examples=200, deadline=None)
def test_clean_is_open_clips(text):
    assert clean(text) == get_clean_fn("whitespace")(text)


def slow_row(tokenizer: CaptionTokenizer, ids: list[int], slots: int) -> list[int]:
    return [tokenizer.bos_id, *ids[: slots - 2], tokenizer.eos_id]


@pytest.mark.parametrize("kind", KINDS)
@given(lengths=st.lists(st.integers(0, 20), max_size=6), context=st.integers(5, 16), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_layout(tokenizers, kind, lengths, context, seed):
    tokenizer = tokenizers[kind]
    rng = random.Random(seed)
    encoded = [[rng.randrange(200, 280) for _ in range(n)] for n in lengths]
    pad, rows = tokenizer.pad_id, [slow_row(tokenizer, ids, context - 1) for ids in encoded]

    def padded(rows: list[list[int]], width: int) -> list[list[int]]:
        return [row + [pad] * (width - len(row)) for row in rows]

    full = tokenizer.text_ids(encoded, context, trim=False)
    assert (full.dtype, full.shape) == (torch.int64, (len(encoded), context))
    assert full.tolist() == [[*row, tokenizer.cls_id] for row in padded(rows, context - 1)]

    width = min(max(map(len, rows), default=2) + 1, context - 1)
    trimmed = tokenizer.text_ids(encoded, context, trim=True)
    assert trimmed.tolist() == [[*row, tokenizer.cls_id] for row in padded(rows, width)]

    captions = tokenizer.caption_ids(encoded, context)
    rows = [slow_row(tokenizer, ids, context) for ids in encoded]
    assert captions.dtype == torch.int64
    assert captions.tolist() == padded(rows, max(map(len, rows), default=2))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_open_clip_reads_the_saved_tokenizer(tokenizers, saved, kind):
    ours, context = tokenizers[kind], 12
    stock = HFTokenizer(str(saved[kind]), context_length=context, tokenizer_mode="clips")
    assert torch.equal(stock(TEXTS), ours(TEXTS, context, trim=False))
    standard = HFTokenizer(str(saved[kind]), context_length=context - 1)
    assert torch.equal(standard(TEXTS), ours(TEXTS, context, trim=False)[:, :-1])
    short = TEXTS[:3]
    trimmed = ours(short, 80, trim=True)
    assert trimmed.shape[1] < 30
    assert torch.equal(standard(short, trimmed.shape[1] - 1), trimmed[:, :-1])


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_typed_in_a_caption_are_text(tokenizers, kind):
    ours = tokenizers[kind]
    special = {ours.pad_id, ours.bos_id, ours.eos_id, ours.cls_id}
    assert len(special) == 4
    assert special.isdisjoint(i for ids in ours.encode(TEXTS) for i in ids)


def test_bert_is_the_reference_layout(tokenizers):
    bert = tokenizers["bert"]
    assert (bert.vocab_size, bert.pad_id, bert.bos_id, bert.eos_id, bert.cls_id) == (30522, 0, 1, 2, 101)
    row = bert(["A dog!"], 8, trim=False)[0]
    assert row.tolist() == [1, 1037, 3899, 999, 2, 0, 0, 101]
    assert bert.decode(row) == bert.decode(row.tolist()) == "a dog!"


def test_wordpiece_vocabulary():
    texts = ["Room 2024 has 12 Dogs and 7 cats", "room 99 has Dogs"] * 20
    small = build_tokenizer("wordpiece", texts, vocab_size=4096)
    assert small.vocab_size < 150
    assert small.encode(["2024"])[0] == [i for d in "2024" for i in small.encode([d])[0]]
    assert len(small.encode(["dogs"])[0]) == 1
    assert small.encode(["DOGS"]) == small.encode(["dogs"])
    assert build_tokenizer("wordpiece", [" ".join(sentences) for sentences in HARD], vocab_size=200).vocab_size == 200
    chinese = ["".join(map(chr, range(0x4E00, 0x4E00 + 500)))]  # more characters than the table holds
    assert build_tokenizer("wordpiece", chinese, vocab_size=100).vocab_size <= 100

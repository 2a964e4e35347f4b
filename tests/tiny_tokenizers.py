"""A tiny tokenizer of each kind that language models have, and the names of the conversation formats."""

import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from mllm.data.formats import LLAMA_3_SYSTEM, V1_SYSTEM

CONTROL = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
CONTROL += ["<|start_header_id|>", "<|end_header_id|>"]
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "What is at the top left? A red cat. Two dogs, and 12 trees!\n\nUSER: hello ASSISTANT: hi there  system user",
    "The model's   answer\nis <image> or <|im_end|> in a text; USER: where? ASSISTANT: below the green apple.",
    V1_SYSTEM,
    LLAMA_3_SYSTEM,
] * 3


def byte_level(texts: list[str], size: int, specials: list[str], regex: str | None = None) -> Tokenizer:
    """Byte-level BPE of at most `size` tokens, trained on `texts` that `regex` cuts first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Tiny BPE: `gpt2` and `llama3` are byte-level; the sentencepiece kinds put a space before texts and add a bos."""
    if kind in ("gpt2", "llama3"):
        tokenizer = byte_level(CORPUS, 700, CONTROL, LLAMA_3_REGEX if kind == "llama3" else None)
    else:
        specials = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(CORPUS, trainer)
        if kind == "sentencepiece":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:  # as Llama 2's own tokenizer.json
            tokenizer.pre_tokenizer = None
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Byte tokens are ordinary vocabulary, not special: only the model's byte fallback may produce them.
        tree = json.loads(tokenizer.to_str())
        tree["added_tokens"] = tree["added_tokens"][: len(CONTROL)]
        tokenizer = Tokenizer.from_str(json.dumps(tree))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    eos = "<|im_end|>" if kind == "gpt2" else "<|eot_id|>" if kind == "llama3" else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[token for token in CONTROL if token not in ("<s>", eos, "<unk>", "<pad>")],
        chat_template=CHATML,
    )


def write_sentencepiece(directory: Path, *, legacy: bool, specials: bool = True) -> Path:
    """A Llama tokenizer as Vicuna comes: tokenizer.model and tokenizer_config.json, no tokenizer.json.

    As in Llama's, runs of spaces have the lowest score.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    code = ["def f(x):", "    return x", "        if x:   y =     2", "It is red.  What   is    it?"] * 3
    lines = [line for text in [*CORPUS, *code] for line in text.split("\n") if line] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=430, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        if len(piece.piece) > 1 and set(piece.piece) == {"▁"}:
            piece.score = -1e9
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "model_max_length": 4096}
    if specials:
        others = [token for token in CONTROL if token not in ("<s>", "</s>", "<unk>", "<image>")]
        config |= {"additional_special_tokens": others, "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


KINDS = ("gpt2", "llama3", "sentencepiece", "sentencepiece_legacy")
TOKENIZERS = {kind: make_tokenizer(kind) for kind in KINDS}
FORMATS = ("plain", "v1", "llama_3", "chatml", "auto")

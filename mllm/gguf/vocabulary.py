"""A tokenizer as llama.cpp holds it: tokens, merges or scores, and the name of its way of cutting words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from clips.common.errors import UserError
from mllm.data.formats import Format, control_pattern

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORD + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORD + r"\p{N}" + _REST: "qwen2"}
"""Regular expression in front of byte-level BPE → `tokenizer.ggml.pre`."""


def write_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, chosen: Format, *, rows: int, end_ids: Sequence[int]
) -> None:
    """Write `tokenizer` for a model with `rows` word embeddings that stops at `end_ids`.

    `chosen` is the format whose template goes along: it writes the bos, so llama.cpp must not add one. Raises
    UserError for tokenizers whose ids llama.cpp would not reproduce.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, llama.cpp's are byte-level BPE and sentencepiece BPE")
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows} word embeddings")
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    types = {index: TokenType.CONTROL if special else TokenType.USER_DEFINED for index, special in added.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        starts_with_control = control_pattern(tokenizer).match(chosen.first) is not None
        writer.add_add_space_prefix(_space_prefix(state, starts_with_control))
        writer.add_token_scores(_scores(merges, tokens, rows))
        types |= {i: TokenType.BYTE for i, t in tokens.items() if len(t) == 6 and t[:3] == "<0x" and i not in added}
        types |= {i: TokenType.UNKNOWN for i in [tokenizer.unk_token_id] if i is not None}
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(state))
        writer.add_add_space_prefix(False)
        writer.add_token_merges(merges)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(rows)])
    plain = {index: TokenType.NORMAL for index in tokens} | types
    writer.add_token_types([plain.get(index, TokenType.UNUSED) for index in range(rows)])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    for name in ("bos", "unk", "pad"):
        if (special_id := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(special_id)
    if len(end_ids) > 3:
        raise UserError(f"generation_config.json, eos_token_id: GGUF holds three end tokens, found {list(end_ids)}")
    # "End of turn" and "end of message" are what GGUF calls a second and third token that ends an answer.
    ways = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, index in zip(ways, end_ids, strict=False):
        add(index)


def _refusal(reason: str) -> UserError:
    return UserError(
        f"the tokenizer (tokenizer.json) cannot be written to GGUF: {reason}. Train with the language model of another "
        "family (--model_name_or_path): SmolLM2, Llama, Qwen2 or Qwen3"
    )


def _parts(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list."""
    if part is None:
        return []
    return [leaf for inner in part[key] for leaf in _parts(inner, key)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """`tokenizer.ggml.pre` of a byte-level BPE."""
    parts = _parts(state["pre_tokenizer"], "pretokenizers")
    normal = [part["type"] for part in _parts(state["normalizer"], "normalizers")]
    # llama.cpp does not normalise; NFC changes nothing in text that is composed already, as nearly all text is.
    if normal not in ([], ["NFC"]):
        raise _refusal(f"it normalises text ({', '.join(normal)}), llama.cpp does not")
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        raise _refusal("it is neither byte-level without a space in front nor sentencepiece with bytes to fall back on")
    before, by_words = parts[:-1], parts[-1]["use_regex"]
    if by_words and not before:
        return "gpt-2"
    if by_words and [(part["type"], part.get("individual_digits")) for part in before] == [("Digits", True)]:
        return "smollm"
    if not by_words and len(before) == 1 and before[0]["type"] == "Split" and not before[0]["invert"]:
        pattern = before[0]["pattern"].get("Regex")
        if pattern in SPLITS and before[0]["behavior"] == "Isolated":
            return SPLITS[pattern]
    raise _refusal("it cuts words in a way that is not GPT-2's, SmolLM2's, Llama 3's or Qwen2's")


def _space_prefix(state: dict[str, Any], starts_with_control: bool) -> bool:
    """Whether llama.cpp shall put a space in front of text at the start and after every control token."""
    normal = [part["type"] for part in _parts(state["normalizer"], "normalizers")]
    cut = _parts(state["pre_tokenizer"], "pretokenizers")
    if normal == ["Prepend", "Replace"] and not cut:
        return True
    if not normal and len(cut) == 1 and cut[0]["type"] == "Metaspace" and not cut[0]["split"]:
        scheme = cut[0]["prepend_scheme"]
        # "first": only where a text begins, and a prompt that begins with a control token has no such place.
        if scheme != "first" or starts_with_control:
            return scheme == "always"
        raise _refusal("it puts a space in front of a text's first word only, and its prompts begin with a word")
    raise _refusal("it prepares text in another way than sentencepiece's BPE")


def _scores(merges: list[str], tokens: dict[int, str], rows: int) -> list[float]:
    """Sentencepiece's scores: a piece is the better the earlier it is merged."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), i)
    return [-float(rank.get(tokens.get(index, ""), len(merges))) for index in range(rows)]

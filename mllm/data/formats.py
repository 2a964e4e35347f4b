"""Conversation formats as Jinja templates: LLaVA's plain, v1 and llama_3, ChatML, and the tokenizer's own.

A model's format is saved with its tokenizer (`save_format`). `auto` reads it, or derives it from a chat template.
"""

import contextlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from clips.common.errors import UserError

TEMPLATE = Path(__file__).parent / "templates" / "chat.jinja"
IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
CHOOSE = "choose --version (evaluation, chat, server and check_data.py: --conv-mode)"
_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
V1_SYSTEM = _CURIOUS.format("user")
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
SAVED = "conversation_format"
"""Key in tokenizer_config.json, which a stock transformers tokenizer keeps without reading it."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """The literal strings of a conversation, with control tokens as the tokenizer spells them."""

    name: str
    first: str
    """Text before the first question, including the default system text."""
    system: tuple[str, str] | None
    """Replaces `first` if a sample has its own system text, around which it goes. None if there is no system role."""
    middle: str
    """Text between a question and its answer."""
    end: str
    """Ends an answer, and is trained: one control token, or a newline for `plain`."""
    next: str
    """Text between the `end` of an answer and the next question."""
    tail: str = ""
    """Follows the last `end` in a rendered conversation, but is not part of a training sample."""
    lead: str = ""
    """Starts each question and answer, inside the segment of the text (`v1`: the space after the colon)."""
    keeps_question: bool = True
    """False for `plain`, which keeps only the images of a question."""
    bos: str = ""
    """The bos token that the tokenizer adds to every text. `first` and `system` start with it."""
    prefix_space: bool = False
    """True if the first text, and a text right after an image, start with an additional space.

    LLaVA tokenises the texts between images one by one, and SentencePiece puts a space before each of them. False if
    the tokenizer adds that space itself after every control token (Llama's `legacy` kind), or never adds one.
    """

    def chat_template(self, *, videos: bool = False) -> str:
        """Return the Jinja template of this format, for content as a string or as a list of image and text parts.

        With `videos` it takes video parts too. `plain`, which is for alignment only, has no template.
        """
        assert self.keeps_question, "a model is never saved with the template of plain"
        first, system = self.first, list(self.system or ())
        if self.prefix_space:
            first = f"{self.bos} {first.removeprefix(self.bos)}"
            system[:1] = [f"{self.bos} {text.removeprefix(self.bos)}" for text in system[:1]]
        literals = {name: getattr(self, name) for name in ("middle", "end", "next", "tail", "lead")}
        literals |= {"first": first, "system": system, "spaced": self.prefix_space, "videos": videos}
        # Jinja reads JSON's strings, lists, true and false.
        sets = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in literals.items()]
        return "\n".join([*sets, TEMPLATE.read_text(encoding="utf-8")])


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_TO_SYSTEM = f"<|begin_of_text|>{_header('system')}"
_TO_USER = f"<|eot_id|>{_header('user')}"
_V1 = Format(
    name="v1", first=f"{V1_SYSTEM} USER:", system=("", " USER:"), middle=" ASSISTANT:", end="", next="USER:", lead=" "
)
_NAMED = (
    Format(name="plain", first="", system=None, middle="", end="\n", next="", keeps_question=False),
    _V1,
    replace(_V1, name="llava_v1", first=f"{_CURIOUS.format('human')} USER:"),
    Format(
        name="llama_3",
        first=_TO_SYSTEM + LLAMA_3_SYSTEM + _TO_USER,
        system=(_TO_SYSTEM, _TO_USER),
        middle=f"<|eot_id|>{_header('assistant')}",
        end="<|eot_id|>",
        next=_header("user"),
    ),
    Format(
        name="chatml",
        first="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
        middle="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        next="\n<|im_start|>user\n",
        tail="\n",
    ),
    Format(
        name="chatml_direct",
        first="<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
        system=("<|im_start|>system\n", "<|im_end|><|im_start|>user\n"),
        middle="<|im_end|><|im_start|>assistant\n",
        end="<|im_end|>",
        next="<|im_start|>user\n",
    ),
)
FORMATS: dict[str, Format | None] = {**{form.name: form for form in _NAMED}, "auto": None}
"""The formats by name. `v1` ends answers with the tokenizer's eos, and `auto` is the tokenizer's own format.

`llava_v1` and `chatml_direct` are LLaVA's templates of these names. `llava_v1` says "human" instead of "user" in `v1`,
and `chatml_direct` has another system text than `chatml` and no line break after a turn.
"""
LLAVA_NAMES = {
    "vicuna_v1": "v1",
    "llava_llama_3": "llama_3",
    "mistral_direct": "chatml_direct",
    "qwen_1_5": "chatml",
    "qwen_2": "chatml",
}
"""The name here of each format that LLaVA or LLaVA-NeXT calls otherwise."""


def format_name(name: str) -> str:
    """Return the key of FORMATS for `name`. Raises UserError for an unknown name."""
    key = LLAVA_NAMES.get(name, name)
    if key not in FORMATS:
        raise UserError(f"conversation format {name!r} is not one of: {', '.join([*FORMATS, *LLAVA_NAMES])}")
    return key


def get_format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format:
    """Return format `name` for `tokenizer`. Raises UserError for an unknown name or missing control tokens."""
    name = format_name(name)
    saved = saved_format(tokenizer)
    if saved is not None and name in ("auto", saved.name):
        return saved

    chosen = FORMATS[name] or _auto(tokenizer)
    if name in ("plain", "v1", "llava_v1"):
        # LLaVA's own formats end answers with the tokenizer's eos, and tokenise the texts between images one by one.
        end = chosen.end or tokenizer.eos_token
        if end is None:
            raise UserError(f"conversation format {name} needs an eos token, and the tokenizer has none")
        chosen = replace(chosen, end=end, prefix_space=_spaces_first_text_only(tokenizer))
    literals = " ".join([chosen.first, chosen.middle, chosen.end, chosen.next])
    missing = sorted(set(re.findall(r"<\|\w+\|>", literals)) - set(control_tokens(tokenizer)))
    if missing:
        raise UserError(f"conversation format {name} needs {', '.join(missing)} as special tokens: {CHOOSE} auto or v1")

    # The tokenizer's bos becomes a part of the format's strings, so that ids and template agree.
    bos = _leading_bos(tokenizer)
    if bos and not chosen.first.startswith(bos):
        system = chosen.system and (bos + chosen.system[0], chosen.system[1])
        chosen = replace(chosen, first=bos + chosen.first, system=system)
    return replace(chosen, bos=bos)


def _spaces_first_text_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a SentencePiece tokenizer adds a space before the first text, but not after control tokens."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = [token for token in (tokenizer.bos_token, IMAGE_TOKEN) if token in control_tokens(tokenizer)]
    return bool(before) and all(ids(f"{token}a")[1:] != ids("a") == ids(f"{token} a")[1:] for token in before)


# ----------------------------------------------------------------------------- the format of a chat template
_TALK = [
    {"role": role, "content": f"sentinel{i}text"}
    for i, role in enumerate(["system", "user", "assistant", "user", "assistant"])
]
_CONTENTS = "|".join(turn["content"] for turn in _TALK)


def _auto(tokenizer: PreTrainedTokenizerBase) -> Format:
    """Return the named format that renders like the tokenizer's chat template, or a format made from the template.

    Formats that render alike give the same ids, so the first one is taken. Raises UserError if there is none.
    """
    own = _renderings(tokenizer, tokenizer.chat_template)
    for name in ("v1", "llama_3", "chatml"):
        with contextlib.suppress(UserError):  # the tokenizer may lack control tokens
            form = get_format(name, tokenizer)
            if own == _renderings(tokenizer, form.chat_template()):
                return form
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template: {CHOOSE} v1, llama_3 or chatml")

    own_pieces = _cut(tokenizer)
    rendered = None if own_pieces is None else _renderings(tokenizer, own_pieces.chat_template())
    if own_pieces is None or own is None or rendered is None or own[:4] != rendered[:4]:
        raise UserError(f"the chat template does not treat every turn alike: {CHOOSE} v1, llama_3 or chatml")
    return own_pieces if own == rendered else replace(own_pieces, system=None)


def _cut(tokenizer: PreTrainedTokenizerBase) -> Format | None:
    """Return the chat template's strings around the texts as a format, or None if no control token ends an answer."""

    def pieces(talk: list[dict[str, str]]) -> list[str]:
        text = _render(tokenizer, tokenizer.chat_template, talk, generate=False)
        return re.split(_CONTENTS, text) if text else []

    turns = pieces(_TALK[1:])
    if len(turns) != 5:
        return None
    first, middle, between, _, closing = turns
    control = control_pattern(tokenizer).match(closing.lstrip())
    end = closing[: len(closing) - len(closing.lstrip())] + control.group() if control else ""
    if not control or not between.startswith(end):
        return None
    start = pieces(_TALK)[:2]
    return Format(
        name="auto",
        first=first,
        system=(start[0], start[1]) if len(start) == 2 else None,
        middle=middle,
        end=end,
        next=between[len(end) :],
        tail=closing[len(end) :],
    )


def _renderings(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str | None] | None:
    """Render four prompts or conversations without a system text and four with one (None if refused), without bos."""
    bos = _leading_bos(tokenizer)
    talks = [(_TALK[start:stop], stop % 2 == 0) for start in (1, 0) for stop in (2, 3, 4, 5)]
    texts = [_render(tokenizer, template, talk, generate) for talk, generate in talks]
    return None if texts[0] is None else [text and text.removeprefix(bos) for text in texts]


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str | None, talk: list[dict[str, str]], generate: bool
) -> str | None:
    """Return the rendered `talk`, or None if it does not hold all texts in their order."""
    if not template:
        return None
    try:
        text: Any = tokenizer.apply_chat_template(
            talk, chat_template=template, tokenize=False, add_generation_prompt=generate
        )
    except (TemplateError, TypeError, ValueError):
        return None
    return text if re.findall(_CONTENTS, text) == [turn["content"] for turn in talk] else None


# ---------------------------------------------------------------------------------------------- kept with a model
def save_format(tokenizer: PreTrainedTokenizerBase, chosen: Format) -> None:
    """Store `chosen` in the tokenizer, which saves and loads it, so that `get_format("auto", …)` returns it."""
    tokenizer.init_kwargs[SAVED] = asdict(chosen)


def saved_format(tokenizer: PreTrainedTokenizerBase) -> Format | None:
    """Return the format that `save_format` stored in the tokenizer, or None."""
    saved = tokenizer.init_kwargs.get(SAVED)
    if saved is None:
        return None
    form = Format(**saved)
    return replace(form, system=form.system and (form.system[0], form.system[1]))  # JSON made it a list


def leave_bos_to_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop the tokenizer from adding a bos in `processor(text=rendered)`, where the chat template wrote one already.

    The template must write it, because `tokenizer.apply_chat_template` never lets the tokenizer add one.
    """
    if _adds_bos(tokenizer):
        backend = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        state["post_processor"] = _without_token(state["post_processor"], tokenizer.bos_token)
        backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def backend_with_bos(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer's backend that adds the bos again, for programs that do not write it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = _leading_bos(tokenizer)
    if bos and not _adds_bos(tokenizer):
        ids = [(bos, token_id(tokenizer, bos))]
        adding = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids)
        old = backend.post_processor
        backend.post_processor = adding if old is None else processors.Sequence([old, adding])
    return backend


def _without_token(part: dict[str, Any], token: str) -> dict[str, Any]:
    """Return the description of a post-processor with templates that do not add `token`."""
    if part["type"] == "Sequence":
        return part | {"processors": [_without_token(inner, token) for inner in part["processors"]]}
    templates = {}
    if part["type"] == "TemplateProcessing":
        for name in ("single", "pair"):
            templates[name] = [piece for piece in part[name] if piece.get("SpecialToken", {}).get("id") != token]
    return part | templates


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the bos before every conversation, which the tokenizer adds or, for a saved model, added before."""
    saved = saved_format(tokenizer)
    if saved is not None:
        return saved.bos
    return tokenizer.bos_token if _adds_bos(tokenizer) else ""


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a token; for one that is not in the vocabulary, that of the unknown token, or None."""
    index: Any = tokenizer.convert_tokens_to_ids(token)  # a list only for a list of tokens
    return index


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the tokenizer's special tokens as {text: `AddedToken`}."""
    return {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern for a control token, with the white space that the tokenizer strips around it.

    Each token has a group of its own, so `match[match.lastindex]` is the token that was found, without white space.
    """
    tokens = sorted(control_tokens(tokenizer).values(), key=lambda token: -len(token.content))
    alternatives = [r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip for token in tokens]
    return re.compile("|".join(alternatives) or r"(?!)")

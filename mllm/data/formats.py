"""Conversation formats: LLaVA's plain, v1 and llama_3, ChatML, and the tokenizer's own, as Jinja templates."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from clips.common.errors import UserError

IMAGE_TOKEN = "<image>"
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The literal strings of a conversation; control tokens are written as the tokenizer spells them."""

    name: str
    first: str
    """Before the first question, default system text included."""
    system: tuple[str, str] | None
    """Replaces `first` around a system text that the sample brings; None where the format has no system role."""
    middle: str
    end: str
    """Ends an answer and is trained: one control token (`plain`: a newline)."""
    next: str
    tail: str = ""
    """Follows the last `end` in a rendered conversation; not part of a training sample."""
    lead: str = ""
    """Starts each question and each answer, inside the text's own segment (`v1`: the space after the colon)."""
    keeps_question: bool = True
    """False for `plain`: of the question only the images stay."""

    def chat_template(self) -> str:
        """Jinja template with these pieces, for content as a string or as a list of image and text parts."""
        body = "body" if self.keeps_question else f"'{IMAGE_TOKEN}' * (body.split('{IMAGE_TOKEN}') | length - 1)"
        before, after = self.system or ("", "")
        refuse = "{{ raise_exception('This chat format has no system role') }}"
        system = f"{{{{ {_quote(before)} + body + {_quote(after)} }}}}" if self.system else refuse
        return (
            "{%- for message in messages -%}"
            "{%- if message['content'] is string -%}{%- set body = message['content'] | trim -%}"
            "{%- else -%}{%- set parts = namespace(images='', text='') -%}"
            "{%- for part in message['content'] -%}"
            f"{{%- if part['type'] == 'text' -%}}{{%- set parts.text = parts.text + part['text'] -%}}"
            f"{{%- elif part['type'] == 'image' -%}}{{%- set parts.images = parts.images + '{IMAGE_TOKEN}\\n' -%}}"
            "{%- endif -%}{%- endfor -%}"
            "{%- set body = (parts.images + (parts.text | trim)) | trim -%}{%- endif -%}"
            f"{{%- if message['role'] == 'user' and body.split('{IMAGE_TOKEN}') | length == 2 -%}}"
            f"{{%- set body = ('{IMAGE_TOKEN}\\n' + (body | replace('{IMAGE_TOKEN}', '') | trim)) | trim -%}}"
            "{%- endif -%}"
            f"{{%- if message['role'] == 'system' -%}}{system}"
            "{%- elif message['role'] == 'user' -%}"
            f"{{{{ {_quote(self.first)} if loop.first else ('' if messages[loop.index0 - 1]['role'] == 'system' "
            f"else {_quote(self.next)}) }}}}"
            f"{{{{ {_quote(self.lead)} + {body} + {_quote(self.middle)} }}}}"
            f"{{%- else -%}}{{{{ {_quote(self.lead)} + body + {_quote(self.end)} }}}}"
            f"{{{{ {_quote(self.tail)} if loop.last else '' }}}}"
            "{%- endif -%}{%- endfor -%}"
        )


def _quote(text: str) -> str:
    """`text` as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _plain(tokenizer: PreTrainedTokenizerBase) -> Format:
    return Format(name="plain", first="", system=None, middle="", end="\n", next="", keeps_question=False)


def _v1(tokenizer: PreTrainedTokenizerBase) -> Format:
    if tokenizer.eos_token is None:
        raise UserError("conversation format v1 ends answers with the tokenizer's eos token, and it has none")
    return Format(
        name="v1",
        first=f"{V1_SYSTEM} USER:",
        system=("", " USER:"),
        middle=" ASSISTANT:",
        end=tokenizer.eos_token,
        next="USER:",
        lead=" ",
    )


def _llama_3(tokenizer: PreTrainedTokenizerBase) -> Format:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    before, after = f"<|begin_of_text|>{header('system')}", f"<|eot_id|>{header('user')}"
    return Format(
        name="llama_3",
        first=before + LLAMA_3_SYSTEM + after,
        system=(before, after),
        middle=f"<|eot_id|>{header('assistant')}",
        end="<|eot_id|>",
        next=header("user"),
    )


def _chatml(tokenizer: PreTrainedTokenizerBase) -> Format:
    before, after = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"
    return Format(
        name="chatml",
        first=f"{before}You are a helpful assistant.{after}",
        system=(before, after),
        middle="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        next="\n<|im_start|>user\n",
        tail="\n",
    )


def _auto(tokenizer: PreTrainedTokenizerBase) -> Format:
    """Cut the tokenizer's own chat template into pieces by rendering it around sentinel texts."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: choose --version v1, llama_3 or chatml")
    system, *texts = [f"sentinel{i}text" for i in range(5)]
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]

    def cut(messages: list[dict[str, str]], generate: bool = False) -> list[str]:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        return re.split("|".join(message["content"] for message in messages), text)

    try:
        first, middle, between, second_middle, closing = cut(turns)
        prompt = cut(turns[:1], generate=True)
        closing_1 = cut(turns[:2])[-1]
    except (TemplateError, ValueError) as error:
        raise UserError(f"the tokenizer's chat template cannot be cut into turns ({error}): choose --version") from None
    try:
        system_pieces = cut([{"role": "system", "content": system}, *turns])
        fits = len(system_pieces) == 6 and system_pieces[2:] == [middle, between, second_middle, closing]
    except (TemplateError, ValueError):
        fits = False
    control = control_pattern(tokenizer).match(closing.lstrip())
    if not (middle == second_middle and prompt == [first, middle] and closing_1 == closing and control):
        raise UserError(
            "the tokenizer's chat template does not treat every turn alike, or ends answers without a special token, "
            "so training and chat would differ: choose --version v1, llama_3 or chatml"
        )
    end = closing[: len(closing) - len(closing.lstrip())] + control.group()
    if not between.startswith(end):
        raise UserError("the tokenizer's chat template ends its last answer in another way: choose --version")
    return Format(
        name="auto",
        first=first,
        system=(system_pieces[0], system_pieces[1]) if fits else None,
        middle=middle,
        end=end,
        next=between[len(end) :],
        tail=closing[len(end) :],
    )


FORMATS = {"plain": _plain, "v1": _v1, "llama_3": _llama_3, "chatml": _chatml, "auto": _auto}


def get_format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The pieces of format `name` for `tokenizer`; UserError for an unknown name or missing control tokens."""
    if name not in FORMATS:
        raise UserError(f"conversation format {name!r} is not known; choose one of: {', '.join(FORMATS)}")
    chosen = FORMATS[name](tokenizer)
    literals = " ".join([chosen.first, chosen.middle, chosen.end, chosen.next])
    missing = sorted(set(re.findall(r"<\|\w+\|>", literals)) - set(control_tokens(tokenizer)))
    if missing:
        raise UserError(
            f"conversation format {name} needs the special tokens {', '.join(missing)}, which this tokenizer does not "
            "have: choose --version auto or v1"
        )
    # What the tokenizer puts in front of every text (a bos) belongs to the pieces, so that ids and template agree.
    leading = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    if leading and not chosen.first.startswith(leading):
        system = chosen.system and (leading + chosen.system[0], chosen.system[1])
        chosen = replace(chosen, first=leading + chosen.first, system=system)
    return chosen


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token that the vocabulary has."""
    found: Any = tokenizer.convert_tokens_to_ids(token)  # a list only for a list of tokens
    return found


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches one control token, with the white space that the tokenizer swallows around it (lstrip, rstrip)."""
    tokens = sorted(control_tokens(tokenizer).values(), key=lambda token: -len(token.content))
    alternatives = [r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip for token in tokens]
    return re.compile("|".join(alternatives) or r"(?!)")

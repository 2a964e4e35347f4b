"""A trained model as the two files that llama.cpp opens: the language model, and tower with projector (mmproj)."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from clips.common.errors import UserError
from clips.common.escape import for_markdown
from clips.common.files import check_target, placing
from clips.common.hub import resolve
from mllm.data.conversation import answering_encoder
from mllm.data.formats import Format
from mllm.gguf.language import architecture, language_tensors, write_language_metadata
from mllm.gguf.mmproj import check_tower, pads, picture_size, tower_tensors, write_tower_metadata
from mllm.gguf.vocabulary import write_vocabulary
from mllm.model.card import figures_section
from mllm.model.load import load_llava, model_name

DTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
BICUBIC = 3


def pictures_first(chosen: Format) -> str:
    """The start of a chat template that puts a message's pictures first, each on its own line, as in training.

    llama.cpp writes a mark (`<__media__>`, in the server `<__media_RANDOM__>`) where the message has its picture.
    """
    space = " " if chosen.prefix_space else ""  # the text after a picture starts with one, and llama.cpp adds none
    return (
        "{%- set talk = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- set pieces = message['content'].split('<__media') -%}"
        "{%- set body = namespace(marks='', text=pieces[0]) -%}"
        "{%- for piece in pieces[1:] -%}"
        "{%- set ends = piece.split('__>') -%}"
        f"{{%- set body.marks = body.marks + '<__media' + ends[0] + '__>{space}\\n' -%}}"
        "{%- set body.text = body.text + (ends[1:] | join('__>')) -%}"
        "{%- endfor -%}"
        "{%- set whole = body.marks + (body.text | trim) -%}"
        "{%- set talk.messages = talk.messages + [{'role': message['role'], 'content': whole}] -%}"
        "{%- endfor -%}"
        "{%- set messages = talk.messages -%}"
    )


def export_from_flags(flags: argparse.Namespace) -> None:
    output = Path(flags.output) if flags.output else None
    print(export_gguf(flags.model, output, flags.dtype))


def export_gguf(name: str, output: Path | None = None, dtype: str = "f16") -> str:
    """Write `NAME-DTYPE.gguf`, `mmproj-NAME-DTYPE.gguf` and README.md to `output` (default: gguf/ beside the model).

    Returns what was written and the next command. Raises UserError for what llama.cpp would not compute alike.
    """
    directory = resolve(name, "model")
    output = output or (directory.parent if Path(name).is_dir() else Path()) / "gguf"
    check_target(output)
    model, processor = load_llava(str(directory), torch.device("cpu"), "auto")
    config: Any = model.config
    images, tokenizer = processor.image_processor, processor.tokenizer
    arch = architecture(config.text_config)
    if not isinstance(model, LlavaForConditionalGeneration):
        raise UserError(
            f"{name} sees pictures in tiles (anyres), perhaps videos too, and no test here shows that llama.cpp orders "
            "their tokens alike, with dropped padding and an end of each row: train with --image_aspect_ratio square "
            "or pad"
        )
    check_tower(config, images)
    chosen = answering_encoder(tokenizer, "auto", config.image_seq_length).format
    generation: Any = model.generation_config
    ends = generation.eos_token_id  # the language model's own end first
    ends = ends if isinstance(ends, list) else [ends]
    title = model_name(name).replace("/", "-")
    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"{title}-{dtype}.gguf", output / f"mmproj-{title}-{dtype}.gguf"]

    def write_language(writer: GGUFWriter) -> None:
        write_language_metadata(writer, config.text_config)
        write_vocabulary(writer, tokenizer, chosen, rows=config.text_config.vocab_size, end_ids=ends)
        writer.add_chat_template(pictures_first(chosen) + chosen.chat_template())

    write_file(files[0], arch, title, dtype, write_language, language_tensors(model))
    write_file(files[1], "clip", title, dtype, lambda w: write_tower_metadata(w, config, images), tower_tensors(model))
    (output / "README.md").write_text(_card(title, files, config, images, directory), encoding="utf-8")
    written = "\n".join(f"wrote {path}" for path in [*files, output / "README.md"])
    return f"{written}\nnext: {llama_command('llama-server', *files)}"


def llama_command(program: str, model: str | Path, mmproj: str | Path) -> str:
    return shlex.join([program, "-m", str(model), "--mmproj", str(mmproj)])


def write_file(
    path: Path,
    arch: str,
    title: str,
    dtype: str,
    metadata: Callable[[GGUFWriter], None],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write one GGUF file with `metadata` and `tensors` (name, tensor); it appears whole or not at all."""
    with placing(path) as file:
        writer = GGUFWriter(file.name, arch, use_temp_file=True)  # large models do not fit into memory twice
        writer.add_type("mmproj" if arch == "clip" else "model")
        writer.add_name(title)
        writer.add_file_type(DTYPES[dtype][1])
        metadata(writer)
        try:
            for name, tensor in tensors:
                stored = _stored_type(name, tensor, dtype)
                data = quants.quantize(tensor.detach().float().numpy(), stored)
                writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _stored_type(name: str, tensor: Tensor, dtype: str) -> GGMLQuantizationType:
    """Norms, biases and the tower's embeddings stay fp32: llama.cpp computes with them as they are."""
    if tensor.ndim == 1 or name.startswith(("v.patch_embd.", "v.position_embd.")):
        return GGMLQuantizationType.F32
    return DTYPES[dtype][0]


def _card(title: str, files: list[Path], config: Any, images: Any, directory: Path) -> str:
    """README.md: the files, how to run them, what llama.cpp computes otherwise, figures of the model in `directory`."""
    side = picture_size(images)
    shape = f"padded to a square of {side} px" if pads(images) else f"squeezed into a square of {side} px"
    notes = [
        f"A picture of {side} × {side} px is taken as it is; any other is {shape}, with bicubic interpolation.",
        "GELU is looked up in fp16 on CPUs, so logits differ from transformers' in the third or fourth digit.",
        "The chat template writes the first token and puts pictures first: use chat, not plain completion.",
    ]
    if images.resample != BICUBIC:
        notes[0] += (
            f" The model was trained with another interpolation (PIL's number {int(images.resample)}): for the same "
            f"answers as in transformers resize pictures to {side} × {side} px yourself."
        )
    rows = "\n".join(f"- {note}" for note in notes)
    model, mmproj = names = [path.name for path in files]
    smaller = shlex.join([model, f"{Path(model).stem}-q8_0.gguf"])
    return f"""# {for_markdown(title)} for llama.cpp

- `{model}`: the language model ({config.text_config.model_type})
- `{mmproj}`: vision tower ({config.vision_config.model_type}) and projector, {config.image_seq_length} tokens per image

```bash
{llama_command("llama-server", *names)} --jinja
{llama_command("llama-mtmd-cli", *names)} --jinja --temp 0 --image picture.png -p "What is in the picture?"
llama-quantize {smaller} q8_0
```

{rows}

It was written by CLIPS-MLLM; these files are not needed for anything else there.

## Figures of the model that these files were made of, by transformers

{figures_section(directory)}"""

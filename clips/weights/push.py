"""Upload a model directory to the Hugging Face hub: the files of a model, and none of the run around it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from clips.common.errors import CommandError, UserError, first_line
from clips.common.files import read_json
from clips.config import RunConfig, from_dict, published

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
MODEL_FILES = [
    *("README.md", "LICENSE*", "NOTICE*", "config.json", "open_clip_config.json", "clips_mllm.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("model*.safetensors", "model.safetensors.index.json", "embedding.safetensors"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "mm_projector.bin"),
    *(f"vision_tower/{name}" for name in ("config.json", "preprocessor_config.json", "model.safetensors")),
    *(f"original_llava/{name}" for name in ("config.json", "generation_config.json", "vision_tower.json")),
    *(f"{folder}{name}" for folder in ("", "tokenizer/", "original_llava/") for name in _TOKENIZER),
]
"""Patterns of the files that are uploaded."""


def push(directory: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> None:
    """Upload the model in `directory` as the repository `repo` ("owner/name") in one commit, and print its address.

    A missing repository is made. Weight files of an earlier push are removed, other files stay. Card and configuration
    then name the repository, and nothing of the data. `dry_run` only prints the files, and needs no token. Raises
    UserError if `directory` is no model or the hub refuses, CommandError if the hub cannot be reached.
    """
    names = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    files = list(filter_repo_objects(names, allow_patterns=MODEL_FILES))
    if "README.md" not in files or not any(name.endswith((".safetensors", ".bin")) for name in files):
        raise UserError(f"{directory} is no model directory: it needs a README.md, a config.json and weights")
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} is no name of a repository: give OWNER/NAME")
    if dry_run:
        print("\n".join([f"{directory} would go up as {repo}:", *(f"  {file}" for file in files)]))
        return

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(directory.resolve(), folder, copy_function=os.symlink, dirs_exist_ok=True)
        _write_published(directory, repo, Path(folder))
        api = HfApi()
        try:
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Upload model",
                allow_patterns=MODEL_FILES,
                delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.bin"],
            )
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
            message = f"the hub refuses {repo}: {first_line(error)}. Run `hf auth login` with a token that may write"
            raise UserError(message) from None
        except (HTTPError, OSError) as error:
            raise CommandError(f"the hub cannot be reached, {repo} is not uploaded: {first_line(error)}") from None
    print(f"{directory} → {url}")
    if "\nlicense:" not in (directory / "README.md").read_text(encoding="utf-8"):
        print(f"its card states no license: add `license: …` to the header, there or in {directory}/README.md")


def _write_published(directory: Path, repo: str, folder: Path) -> None:
    """Write card and configuration of `directory` into `folder` as a reader of the hub needs them."""
    name = repo.rpartition("/")[2]
    card = (directory / "README.md").read_text(encoding="utf-8")
    card = card.replace('source = "local-dir:."', f'source = "hf-hub:{repo}"')
    card = card.replace('source = "."', f'source = "{repo}"')
    card = card.replace(f"--model-path {directory.name} ", f"--model-path {name} ")
    texts = {"README.md": card}

    config = read_json(directory / "config.json")
    if "recipe" in config:  # a run's configuration names its data
        texts["config.json"] = json.dumps(published(from_dict(RunConfig, config)).to_dict(), indent=2)
    elif config.get("mm_vision_tower") == str((directory / "vision_tower").resolve()):  # LLaVA takes a path
        config["mm_vision_tower"] = f"{name}/vision_tower"
        texts["config.json"] = json.dumps(config, indent=2)
    stock = read_json(directory / "open_clip_config.json")
    if stock:  # from the hub, open_clip takes the tokenizer from where this says
        stock["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo
        texts["open_clip_config.json"] = json.dumps(stock, indent=2)

    for file, text in texts.items():
        (folder / file).unlink()
        (folder / file).write_text(f"{text.rstrip()}\n", encoding="utf-8")

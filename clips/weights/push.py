"""Upload a model directory to the Hugging Face hub: whole, with its card, and nothing of this machine or of a run.

A model directory is export/native, export/open_clip, export/hf_vit or a LLaVA run's model.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from clips.common.errors import CommandError, UserError, first_line
from clips.common.files import from_json, read_json
from clips.common.tensors import shards_of
from clips.config import RunConfig, from_dict, published

CONFIGS = ("config.json", "open_clip_config.json")
"""A model directory has one of these."""
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(
    r"(?:open_clip_)?model(?:-\d{5}-of-\d{5})?\.safetensors|embedding\.safetensors|open_clip_pytorch_model\.bin"
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
TOWER = "vision_tower"
"""Inside a model in the original LLaVA's layout, a tower that has no name."""
MODEL_FILES = {
    *CONFIGS, *TOKENIZER_FILES, *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "clips_mllm.json"),
    *(INDEX, "mm_projector.bin"),
    *(f"original_llava/{name}" for name in (*TOKENIZER_FILES, "config.json", "generation_config.json")),
    "original_llava/vision_tower.json",  # of a LLaVA checkpoint that was converted, for the way back
    *(f"{TOWER}/{name}" for name in ("config.json", "preprocessor_config.json", "model.safetensors")),
}  # fmt: skip
"""The files that are uploaded beside the weights, by their whole names."""
OF_THE_RUN = re.compile(r"evaluation(?:-[^/]*)?\.json")
"""Files of evaluate_clips.py beside the weights, which are not uploaded."""
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Any text may be a token; no place is looked for in these."""
_PLACE = re.compile(
    r"(?<![\w.~:/\\])(?:file://)?~?(?:/[\w.+@-]+){2,}|\b[A-Za-z]:\\\w+"
    # Addresses with a password, or signed.
    r"|\w{1,20}://(?:[^\s/@\"']{1,999}@|[^\s?\"']{1,999}\?[^\s=\"']{1,999}=)"
)
"""Its parts are bounded: a search takes a time that grows with the text alone."""
HERE = {'source = "local-dir:."': 'source = "hf-hub:{}"', 'source = "."': 'source = "{}"'}
"""How a card's code opens its own directory → how it opens the repository."""


def push(directory: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> None:
    """Upload the model in `directory` as the repository `repo` ("owner/name") in one commit, and print its address.

    A missing repository is made; an existing repository keeps its visibility. Weight files of an earlier push are
    removed, other files stay. Cards and configurations then name the repository and no place of this machine.
    `dry_run` only prints the files that would go up; it needs no token. Raises
    UserError if `directory` is no whole model or holds private files, if there is no token, and if the hub refuses;
    CommandError if the hub cannot be reached.
    """
    check_repo(repo, writes=not dry_run)
    files = model_files(directory)
    license_stated = license_of(directory / "README.md")
    with tempfile.TemporaryDirectory() as folder:
        places = []
        for file in files:
            staged = Path(folder, file)
            staged.parent.mkdir(parents=True, exist_ok=True)
            try:
                if (text := _published(directory, file, repo)) is None:
                    staged.symlink_to((directory / file).resolve())
                else:
                    staged.write_text(text, encoding="utf-8")
                places += [f"{file}: {place}" for place in _places(staged)]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{directory / file} cannot be read as what its name says: {error!r}") from None
        if places:
            raise UserError(
                f"{directory} names places of this machine, which would be published: {'; '.join(places[:5])}. "
                "Edit them out of these files"
            )
        if dry_run:
            sizes = [f"  {Path(folder, file).stat().st_size:>14,}  {file}" for file in files]
            print("\n".join([f"{directory} would go up as {repo}, bytes and file:", *sizes]))
        else:
            print(f"{directory} → {_upload(Path(folder), repo, private)}")
    if license_stated is None:
        print(f"its card states no license: add `license: …` to the header, there or in {directory}/README.md")


def license_of(card: Path) -> Any:
    """The license that a card's header states, or None. Raises UserError for a header that is no YAML."""
    try:
        return ModelCard.load(card).data.license
    except Exception as error:  # of YAML, and of the hub's client for what the header holds
        raise UserError(f"{card}: its header cannot be read ({first_line(error)}): mend it, or export again") from None


def check_repo(repo: str, *, writes: bool = True) -> None:
    """UserError unless `repo` is an owner/name and, if something `writes`, there is a token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository (owner/name): {error}") from None
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} is no name of a repository: give owner/name")
    if writes and not get_token():
        raise UserError("no token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to one that may write")


def model_files(directory: Path) -> list[str]:
    """The files of the model in `directory`, relative; UserError if it is no model or no whole model."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}")
    inner = [path for path in ("export/open_clip", "open_clip", "model") if (directory / path).is_dir()]
    if inner:
        raise UserError(f"{directory} holds models, give one of them, such as {directory / inner[0]}")
    there = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}
    if links := [file for file, path in there.items() if path.is_symlink()]:
        raise UserError(f"{directory} holds links, which may lead elsewhere: {', '.join(links[:5])}. Copy the files")
    found = [file for file, path in there.items() if not path.is_dir() and not OF_THE_RUN.fullmatch(file)]
    if not set(CONFIGS) & set(found):
        raise UserError(f"{directory} is no model directory: it has no {' and no '.join(CONFIGS)}")
    if not any(map(WEIGHTS.fullmatch, found)):
        raise UserError(f"{directory} has no weights (*.safetensors)")
    if foreign := [file for file in found if file not in MODEL_FILES and not WEIGHTS.fullmatch(file)]:
        raise UserError(f"{directory} holds files that are no part of a model: {', '.join(foreign[:5])}. Remove them")
    if INDEX in found and (missing := sorted(set(shards_of(directory / INDEX)) - set(found))):
        raise UserError(f"{directory} is not whole: {INDEX} names {', '.join(missing[:5])}")
    if "README.md" not in found:
        raise UserError(f"{directory} has no model card (README.md): export or save the model again, which writes one")
    return found


def _published(directory: Path, file: str, repo: str) -> str | None:
    """The text of `file` as it is published if that differs from the text here, else None."""
    if file not in ("README.md", *CONFIGS):
        return None
    text = (directory / file).read_text(encoding="utf-8")
    name = repo.rpartition("/")[2]
    if file == "README.md":
        for here, there in HERE.items():
            text = text.replace(here, there.format(repo))
        return text.replace(f"--model-path {directory.name} ", f"--model-path {name} ")
    config = read_json(directory / file)
    if file == "open_clip_config.json":  # from the hub, open_clip takes the tokenizer from where this says
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo
    elif "recipe" in config:  # a run's configuration
        config = published(from_dict(RunConfig, config)).to_dict()
    elif config.get("mm_vision_tower") == str((directory / TOWER).resolve()):  # see the card: LLaVA takes a path
        config["mm_vision_tower"] = f"{name}/{TOWER}"
    return json.dumps(config, indent=2) + "\n"


def _places(path: Path) -> Iterator[str]:
    """Absolute paths in a file of text, and this machine's home and working directory in whatever form."""
    if path.suffix in (".safetensors", ".bin", ".model") or path.name in VOCABULARY:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    texts = list(_strings(from_json(text))) if path.suffix == ".json" else [text]
    for place in (str(Path.home()), str(Path.cwd())):
        if len(place) > 1 and any(f"{place}/" in one for one in texts):
            yield place
    for one in texts:
        yield from (found[0] for found in _PLACE.finditer(one))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_strings(key), *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _upload(folder: Path, repo: str, private: bool) -> str:
    api = HfApi()
    try:
        # Private or public is asked for a new repository only: see `push`.
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload model",
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.bin"],
        )  # fmt: skip
    except HfHubHTTPError as error:
        raise UserError(f"the hub refuses {repo}: {first_line(error)}. May the token write there?") from None
    except (HTTPError, OSError) as error:
        raise CommandError(f"the hub cannot be reached, {repo} is not uploaded: {first_line(error)}") from None
    return str(url)

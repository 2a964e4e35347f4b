"""The freeze table, LLaVA's flags and the batch arithmetic, on tiny real models."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import get_peft_model
from tiny_mllm import write_llm, write_run
from torch import nn

from clips.common.errors import UserError
from mllm.encoders.load import load_vision
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.training.build import (
    add_lora,
    apply_freeze,
    assert_freeze,
    count_parameters,
    lora_config,
    parameter_groups,
    parts_of,
    trainable,
)
from mllm.training.config import (
    ACCEPTED,
    StageConfig,
    flags_of_stage,
    parse_stage,
    parse_stages,
    parser,
)
from mllm.training.finish import card, print_next
from mllm.training.recipes import PARTS, STAGES, freeze_table
from mllm.training.run import command_line, print_plan
from mllm.training.trainer import schedule


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llm")
    return root


@functools.cache
def _built(places: Path, projector: str) -> nn.Module:
    vision, llm = load_vision("clips", runs=places / "runs"), load_llm(str(places / "llm"))
    return build_model(vision, llm, projector=projector)[0]


def build(places: Path, projector: str = "mlp2x_gelu") -> nn.Module:
    return copy.deepcopy(_built(places, projector))


def arguments(*words: str, ranks: int = 1) -> StageConfig:
    """Of stage 1, if none is named."""
    return parse_stage([*words, *(() if "--stage" in words else ("--stage", "1"))], lambda device: ranks)


# What each stage must train, written out again and independent of the table: (stage, options) → parts.
EXPECTED = [
    (1, {}, {"projector"}),
    (1, {"lora": True}, {"projector"}),
    (2, {}, {"projector", "words", "language_model"}),
    (2, {"lora": True}, {"projector", "lora"}),
    (2, {"unfreeze_mm_vision_tower": True}, {"projector", "words", "language_model", "vision_tower"}),
    (2, {"tune_mm_mlp_adapter": True}, {"projector"}),
    (2, {"freeze_backbone": True}, {"projector"}),
    (2, {"freeze_mm_mlp_adapter": True}, {"words", "language_model"}),
    (2, {"freeze_word_embeddings": True}, {"projector", "language_model"}),
    (2, {"freeze_word_embeddings": True, "lora": True}, {"projector", "lora"}),
]


@pytest.mark.parametrize(
    ("number", "options", "expected", "projector"),
    [*((*case, "mlp2x_gelu") for case in EXPECTED), (1, {}, {"projector"}, "linear")],
)
def test_exactly_the_parts_of_the_freeze_table_get_gradients(
    places: Path, number: int, options: dict, expected: set[str], projector: str
) -> None:
    plan = freeze_table(STAGES[number], **options)
    model = build(places, projector)
    if plan["language_model"] == "lora":
        model = get_peft_model(model, lora_config(model, arguments("--stage", "2", "--lora_enable")))
    apply_freeze(model, plan)
    assert_freeze(model, plan)
    # By hand: names of transformers and PEFT, not the module under test.
    for name, parameter in model.named_parameters():
        is_lora = "lora_A" in name or "lora_B" in name
        if "vision_tower" in name:
            trains = "vision_tower" in expected
        elif "multi_modal_projector" in name:
            trains = "projector" in expected and not (projector == "linear" and "linear_2" in name)
        elif "embed_tokens" in name or "lm_head" in name:
            trains = "words" in expected
        else:
            trains = "language_model" in expected or (is_lora and "lora" in expected)
        assert parameter.requires_grad == trains, name


def test_lora_is_on_every_linear_layer_of_the_language_model_and_nowhere_else(places: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that means nothing to a user
        adapted = add_lora(build(places), arguments("--stage", "2", "--lora_enable"))
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * len(kinds)
    assert all("language_model.layers" in name and name.rpartition(".")[2] in kinds for name in names)


def test_a_model_that_departs_from_the_table_is_refused_by_name(places: Path) -> None:
    model, plan = build(places), freeze_table(STAGES[1])
    apply_freeze(model, plan)
    next(model.model.vision_tower.parameters()).requires_grad_(True)
    with pytest.raises(RuntimeError, match="vision_tower"):
        assert_freeze(model, plan)
    next(model.model.vision_tower.parameters()).requires_grad_(False)
    with pytest.raises(RuntimeError, match="language_model"):
        assert_freeze(model, freeze_table(STAGES[2], lora=True))


def test_groups_hold_every_trained_parameter_once_with_its_own_rate_and_no_decay_on_vectors(places: Path) -> None:
    model = build(places)
    counts = count_parameters(model)  # tied weights count once
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    assert set(parts_of(model).values()) == set(PARTS)
    assert counts["projector"][0] == 32 * 48 + 48 + 48 * 48 + 48
    apply_freeze(model, freeze_table(STAGES[2]))
    rates = arguments("--learning_rate", "1e-4", "--mm_projector_lr", "3e-3").rates
    groups = parameter_groups(model, rates, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == {id(p) for p in trained.values()}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    for name, parameter in trained.items():
        rate = 3e-3 if "multi_modal_projector" in name else 1e-4
        assert rates[id(parameter)] == (rate, 0.0 if name.endswith("bias") or "norm" in name else 0.1), name


# ---------------------------------------------------------------------------------------------- flags


def test_llava_s_own_command_lines_are_understood(capsys) -> None:
    """scripts/v1_5/finetune_lora.sh of LLaVA, except for paths, its zero3 file and `--report_to wandb`."""
    line = """--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed none
        --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 --data_path ./playground/data/llava_v1_5_mix665k.json
        --image_folder ./playground/data --vision_tower openai/clip-vit-large-patch14-336
        --pretrain_mm_mlp_adapter ./mm_projector.bin --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
        --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
        --group_by_modality_length True --bf16 True --output_dir ./checkpoints/llava-v1.5-13b-lora
        --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
        --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps --save_steps 50000
        --save_total_limit 1 --learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
        --dataloader_num_workers 4 --lazy_preprocess True --report_to tensorboard"""
    parsed = arguments("--stage", "2", *line.split(), ranks=8)
    assert capsys.readouterr().err == ""
    assert (parsed.version, parsed.lora_enable, parsed.lora_r, parsed.lora_alpha) == ("v1", True, 128, 256)
    assert (parsed.learning_rate, parsed.mm_projector_lr, parsed.batch_size) == (2e-4, 2e-5, 128)
    assert parsed.mm_vision_select_layer == -2
    assert parsed.image_aspect_ratio == "pad"


def test_defaults_are_llava_s_recipe_with_own_data_and_the_demo_s_without() -> None:
    own = ("--data_path", "x.json", "--device", "cpu")
    align, full = arguments(*own), arguments("--stage", "2", *own)
    lora = arguments("--stage", "2", "--lora_enable", *own)
    assert (align.version, align.learning_rate, align.batch_size) == ("plain", 1e-3, 256)
    assert (align.mm_vision_select_layer, align.image_aspect_ratio) == (-2, "square")
    assert (full.learning_rate, full.batch_size, full.lora_enable, full.image_aspect_ratio) == (2e-5, 128, False, "pad")
    assert (lora.learning_rate, lora.mm_projector_lr, lora.lora_r, lora.lora_alpha) == (2e-4, 2e-5, 128, 256)
    assert (full.group_by_modality_length, align.group_by_modality_length) == (True, False)
    assert (full.warmup_ratio, full.lr_scheduler_type, full.weight_decay) == (0.03, "cosine", 0.0)
    assert (full.llm_layers, full.llm_adapter, full.freeze_word_embeddings) == (None, "none", False)
    assert arguments("--stage", "2").freeze_word_embeddings
    for words, layers, reader, rate in (
        ((), "6,2", "default", 5e-4),
        (("--llm_adapter", "none"), "6,2", "none", 5e-4),
        (("--llm_layers", "2,2"), "2,2", "none", 5e-4),
        (("--bits", "4"), None, "none", 1e-3),
    ):
        demo = arguments("--stage", "2", *words)
        assert (demo.llm_layers, demo.llm_adapter, demo.learning_rate) == (layers, reader, rate)
        assert demo.lora_enable == ("--bits" in words)
    epochs = arguments("--num_train_epochs", "2")
    assert (epochs.num_train_epochs, epochs.max_steps) == (2, -1), "not the demo's steps"
    assert arguments("--num_train_epochs", "2", "--max_steps", "3").max_steps == 3
    assert parse_stages(["--lora_enable"])[0].llm_layers is None, "both stages have one language model"
    assert arguments("--model_name_or_path", "mine").llm_layers is None


@pytest.mark.parametrize(
    ("stage", "words"),
    [(1, ["--lora_enable", "True"]), (2, ["--mm_projector_init", "captions"]), (1, ["--version", "v1"])],
)
def test_a_flag_of_the_other_stage_is_refused_unless_both_run(stage: int, words: list[str]) -> None:
    with pytest.raises(UserError, match=f"{words[0]}.* stage"):
        arguments("--stage", str(stage), *words)
    parse_stages(words)
    own = words[0].replace("--", f"--{STAGES[stage].name}.")  # meant for this stage alone
    with pytest.raises(UserError, match="stage"):
        parse_stages([own, *words[1:]])
    arguments("--stage", str(3 - stage), *words)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--pretrain_mm_mlp_adapter", "p.bin"], "--align.pretrain_mm_mlp_adapter"),
        (["--instruct.lora_enable"], "--llm_layers"),
        (["--instruct.llm_layers", "4,4"], "--llm_layers"),
        (["--small", "--instruct.bits", "4"], "--llm_layers"),
        (["--data_path", "CAPTIONS", "--instruct.held_out", "0.2"], "--held_out"),
        (["--data_path", "CAPTIONS", "--instruct.test_data", "t.csv"], "give --test_data for both"),
        (["--instruct.vision", "random"], "--vision_tower would be clips in stage 1 and random in stage 2"),
        (["--vision", "random", "--instruct.seed", "1"], "--seed"),
        (["--instruct.output_dir", "A"], "--output_dir"),
    ],
)
def test_what_stage_2_would_refuse_or_drop_is_refused_before_stage_1(
    words: list[str], name: str, tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"image": "0.png", "caption": "a"}')
    words = [str(tmp_path / "pairs.jsonl") if word == "CAPTIONS" else word for word in words]
    with pytest.raises(UserError, match=name):
        parse_stages(words)
    both = [word.replace("--instruct.", "--").replace("--pretrain", "--align.pretrain") for word in words]
    parse_stages(both)


@pytest.mark.parametrize("old", [True, False])
def test_checkpointing_has_two_names_in_transformers(places: Path, monkeypatch, old: bool) -> None:
    model = build(places)
    language_model = model.model.language_model
    names = ("gradient_checkpointing_enable", "activation_checkpointing_enable")
    enabled: list[tuple[str, Any]] = []
    for name, value in zip(
        names, (lambda v: enabled.append(("old", v)), lambda v: enabled.append(("new", v))), strict=True
    ):
        monkeypatch.setattr(language_model, name, value, raising=False)
    if old:
        monkeypatch.setattr(language_model, names[1], None)
    resolved = replace(arguments("--stage", "2"), gradient_checkpointing=True)
    trainable(model, resolved, freeze_table(STAGES[2]), torch.device("cpu"), dtype=torch.float32)
    assert enabled == [("old" if old else "new", {"use_reentrant": False})]


@pytest.mark.parametrize(
    "stamp", ['["a.jpg"]', '{"images": "train and test"}', '{"images": ["test"]}', '{"images": 3}']
)
def test_a_manifest_of_somebody_else_ends_no_finished_stage(stamp: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "manifest.json").write_text(stamp)
    trains = {"instruct": {"trains": {"data_path": str(tmp_path / "x.json")}}}
    (tmp_path / "config.json").write_text(json.dumps(trains))
    print_next(2, tmp_path)
    printed = capsys.readouterr().err
    assert "is the finished model" in printed
    assert "Next: python scripts/chat.py" in printed


def test_the_card_says_that_a_projector_stood_still(tmp_path: Path) -> None:
    trains = dict.fromkeys(("data_path", "llm_adapter"))
    trains |= {"mm_projector_lr": 0.0, "learning_rate": 2e-5, "vision_tower": "hf:o/n", "model_name_or_path": "o/m"}
    trains |= {"batch_size": 4, "seed": 0}
    record = {"trains": trains, "freeze": {}, "facts": dict.fromkeys(("vision encoder", "language model", "data"), "")}
    (tmp_path / "config.json").write_text(json.dumps({"instruct": record}))
    vision: Any = SimpleNamespace(weights_name="n", source="o/n")
    rows = card(tmp_path, {"stage": "instruct"}, vision)
    assert "learning rate 2e-05, projector 0," in rows["Stage instruct: rates"]


def test_llava_s_flags_that_have_one_value_and_flags_that_reach_the_trainer() -> None:
    for name, only in ACCEPTED.items():
        arguments(f"--{name}", "any" if only is None else only)
    with pytest.raises(UserError, match="--optim other is not supported"):
        arguments("--optim", "other")
    resolved = arguments(*["--stage", "2", "--data_path", "x", "--warmup_steps", "7", "--run_name", "mine"])
    factor = schedule(resolved, 1000)
    assert [factor(step) for step in (0, 1, 7, 1000)] == pytest.approx([0, 1 / 7, 1, 0])
    assert schedule(replace(resolved, warmup_steps=None), 1000)(15) == 0.5, "3 % warm up"
    for kind in ("reduce_lr_on_plateau", "nothing"):
        with pytest.raises(UserError, match=f"{kind} is not supported; choose one of: linear, cosine"):
            schedule(replace(resolved, lr_scheduler_type=kind), 1000)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("per_device_train_batch_size", "0", "at least 1"),  # was a ZeroDivisionError
        ("per_device_train_batch_size", "-4", "at least 1"),  # was accepted
        ("logging_steps", "0", "at least 1"),  # was a ZeroDivisionError after the first step
        ("dataloader_num_workers", "-1", "at least 0"),
        ("warmup_ratio", "1.5", "at least 0 and at most 1"),
        ("num_train_epochs", "0", "above 0"),
    ],
)
def test_a_flag_out_of_its_bounds_is_refused_in_one_sentence(name: str, value: str, rule: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} {value}.* must be {rule}$"):
        arguments(f"--{name}", value)


def test_captions_train_both_stages_and_are_named_as_in_pretraining(tmp_path: Path) -> None:
    """One file of captions for both stages was refused, and so were `--fields` and `--karpathy`."""
    lines = {"talk.jsonl": {"image": "0.png", "conversations": []}, "pairs.jsonl": {"image": "0.png", "caption": ["a"]}}
    for name, line in lines.items():
        (tmp_path / name).write_text(f"\n{json.dumps(line)}\n")
    words = ["--data_path", str(tmp_path / "pairs.jsonl"), "--fields", "web=caption", "long=others"]
    for complete in parse_stages([*words, "--held_out", "0.1"]):
        assert StageConfig.from_json(complete.to_json()) == complete
        assert (complete.fields, complete.held_out) == (("web=caption", "long=others"), 0.1)
        assert arguments(*command_line(complete, 1).split()[2:]) == complete
    for path in (tmp_path / "talk.jsonl", tmp_path / "missing.jsonl", "x.json"):
        with pytest.raises(UserError, match="both stages on one"):
            parse_stages(["--data_path", str(path)])
    talk = arguments("--data_path", str(tmp_path / "talk.jsonl"))
    assert talk.held_out is None, "conversations train whole"
    coco = parse_stages(["--karpathy", "coco.json"])[0]
    assert (coco.data_path, coco.test_data) == ("coco.json#train+restval", "coco.json#test")
    with pytest.raises(UserError, match="leave out --data_path"):
        arguments("--karpathy", "coco.json", "--data_path", "x.csv")


def test_flags_of_a_test_need_captions(tmp_path: Path) -> None:
    """Beside conversations and the demo they were ignored."""
    lines = {"talk.jsonl": {"conversations": []}, "pairs.jsonl": {"image": "0.png", "caption": "a"}}
    for name, line in lines.items():
        (tmp_path / name).write_text(json.dumps(line))
    talk, pairs = (str(tmp_path / name) for name in lines)
    for words in (["--data_path", talk], []):
        for flag in (["--held_out", "0.1"], ["--test_data", pairs]):
            with pytest.raises(UserError, match=f"{flag[0]} is for captions"):
                arguments("--stage", "2", *words, *flag)
    both = ["--align.data_path", pairs, "--instruct.data_path", talk]
    assert [stage.held_out for stage in parse_stages([*both, "--held_out", "0.1"])] == [0.1, None]
    for name in ("--instruct.held_out", "--instruct.test_data"):
        with pytest.raises(UserError, match="is for captions"):
            parse_stages([*both, name, "0.1"])
    with pytest.raises(UserError, match="give one of them"):
        arguments("--data_path", pairs, "--test_data", "x.csv", "--held_out", "0.1")
    assert arguments("--data_path", pairs, "--test_data", "x.csv", "--held_out", "0").held_out is None


def test_flags_of_one_stage_and_the_version_of_both() -> None:
    words = ["--seed", "3", "--align.learning_rate", "1e-2", "--instruct.lora_r", "4", "--version", "v1"]
    assert flags_of_stage(words, "align") == ["--seed", "3", "--version", "v1", "--learning_rate", "1e-2"]
    assert flags_of_stage(words, "instruct") == ["--seed", "3", "--version", "v1", "--lora_r", "4"]
    one, two = parse_stages(words)
    assert (one.stage, one.learning_rate, one.lora_r, one.version) == (1, 1e-2, 128, "plain")
    assert (two.stage, two.learning_rate, two.lora_r, two.version) == (2, 5e-4, 4, "v1")
    assert parse_stage(["--stage=1", "--stage=2"]).stage == 2
    with pytest.raises(UserError, match="plain"):
        arguments("--align.version", "v1")
    for given in ([], ["--stage", "3"], ["--stage"]):
        with pytest.raises(UserError, match="give --stage 1"):
            parse_stage(given)


def test_types_say_what_is_decided_when(tmp_path: Path) -> None:
    """A field that is an int or a str is never None from there on."""
    (tmp_path / "pairs.jsonl").write_text('{"image": "0.png", "caption": "a"}')
    own = ["--data_path", str(tmp_path / "pairs.jsonl")]
    for words in ([], ["--lora_enable"], ["--model_name_or_path", "mine"], own, [*own, "--small", "--bits", "4"]):
        for complete in parse_stages(words):
            for decided in (complete, complete.on(torch.device("cpu"))):
                for name, hint in get_type_hints(type(decided)).items():
                    kinds = {type(choice) for choice in get_args(hint)} if get_origin(hint) is Literal else {hint}
                    value = getattr(decided, name)
                    assert type(None) in get_args(hint) or type(value) in kinds, (name, value)


def test_help_prints_the_defaults_that_count(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """Six flags said "the stage's", and three defaults were wrong for the command beside them."""
    monkeypatch.setenv("COLUMNS", "600")
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert "the stage's" not in text
    lines = {
        line.split()[0]: line for line in text.replace("\n                        ", " ").splitlines() if "--" in line
    }
    own = parse_stages(["--align.data_path", "x.json", "--instruct.data_path", "x.json"])
    for name in ("learning_rate", "batch_size", "max_steps", "mm_vision_select_layer", "image_aspect_ratio", "version"):
        printed = lines[f"--{name}"].partition("(default: ")[2].rstrip(")")
        usual, _, demo = printed.partition("; the demo and --small: ")
        for text, stages in ((usual, own), (demo or usual, parse_stages([]))):
            for stage in stages:
                value = getattr(stage, name)
                words = [part for part in text.split(", ") if part.endswith(f" for {stage.stage_info.name}")] or [text]
                shown = words[0].partition(" for ")[0]
                assert (float(shown) if isinstance(value, (int, float)) else shown) == value, name


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ({"batch_size": 128}, 8, (128, 16, 1)),
        ({"per_device_train_batch_size": 4}, 2, (256, 4, 32)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 2, (24, 4, 3)),
        ({"batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 2, None),
    ],
)
def test_batch_is_ranks_times_accumulation_times_micro_batch(flags: dict, ranks: int, expected: tuple | None) -> None:
    words = ["--data_path", "x.json"] + [str(w) for name, value in flags.items() for w in (f"--{name}", value)]
    if expected is None:
        with pytest.raises(UserError, match="batch_size"):
            arguments(*words, ranks=ranks)
        return
    resolved = arguments(*words, ranks=ranks)
    assert (resolved.batch_size, resolved.per_device_train_batch_size, resolved.gradient_accumulation_steps) == expected


def test_the_printed_command_gives_the_same_arguments_again() -> None:
    words = "--stage 2 --vision random --lora_enable --data_path a.json --feature_cache False --seed 4 --batch_size 8"
    resolved = arguments(*words.split())
    again = command_line(resolved, 1).split()
    assert again[:2] == ["python", "scripts/train_llava.py"]
    assert arguments(*again[2:]) == resolved


@pytest.mark.parametrize("batch", [256, 6])
def test_the_plan_warns_of_a_stage_of_few_steps(places: Path, batch: int, capsys: pytest.CaptureFixture) -> None:
    """120 samples of one's own were one step of 256, without a word."""
    model, freeze = build(places), freeze_table(STAGES[1])
    apply_freeze(model, freeze)
    resolved = arguments("--data_path", "x", "--batch_size", str(batch))
    facts = {"language model": "the hub's, its first 2 and last 2 of 30 layers"} if batch == 256 else {}
    prepared: Any = SimpleNamespace(
        config=resolved, model=model, freeze=freeze, facts=facts, dataset=range(120), zero=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    print_plan(prepared, 1)
    text = capsys.readouterr().err
    assert "  steps  " in text
    assert ("begins at 17 to 20" in text) is (batch == 256), "its first loss was a riddle"
    assert ("the model hardly changes: " in text) is (batch == 256)

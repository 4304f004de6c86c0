"""A GGUF file is dequantised once, without a word, and is from then on a base like any other."""

import json

import gguf
import pytest
import torch
from contracts.table import LAYERS, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from xfusion.backbone import EMBEDDED, Backbone, sources
from xfusion.data.sequence import XFusionError


def write_gguf(base, path):
    """A Llama of a folder as llama.cpp writes it: other names, and the rows of queries and keys in another order."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config, known = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(known["vocab"], key=known["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in known["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        rows = next((count for part, count in heads.items() if part in name), None)
        if rows is not None:
            value = value.view(rows, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once_and_without_a_word(tmp_path, monkeypatch, capfd):
    folder = make_base("llama", tmp_path / "base")
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    write_gguf(folder, tmp_path / "tiny.gguf")
    calls, load = [], AutoModelForCausalLM.from_pretrained
    recording = staticmethod(lambda *args, **options: calls.append(options) or load(*args, **options))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recording)
    capfd.readouterr()
    base, expected = Backbone.load(str(tmp_path / "tiny.gguf")), Backbone.load(str(folder))
    assert capfd.readouterr() == ("", "")
    options = calls[0]  # nothing stays packed, no kernel is fetched to attend with, no code of the file's folder is run
    assert options["quantization_config"].dequantize and options["attn_implementation"] == "eager"
    assert options["trust_remote_code"] is False and options["dtype"] == torch.float32
    assert base.compute_fingerprint() == expected.compute_fingerprint()
    ids = torch.tensor([base.encode("a red apple, ein Äpfelchen")])
    assert ids.tolist() == [list(expected.encode("a red apple, ein Äpfelchen"))]
    assert torch.equal(base.model(ids).logits, expected.model(ids).logits)
    (made,) = (tmp_path / "cache" / "bases").iterdir()
    assert made.name.startswith("tiny-")
    written = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    again = Backbone.load(str(tmp_path / "tiny.gguf"))
    assert again.fingerprint == base.fingerprint
    assert written == {path.name: path.stat().st_mtime_ns for path in made.iterdir()}


def test_the_embedded_base_is_dense_and_plain():
    """What transformers keeps of a GGUF file's packing is gone: weights in float32, in modules that PyTorch knows."""
    base = Backbone.load(EMBEDDED)
    assert {weight.dtype for weight in base.model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad or weight.is_quantized for weight in base.model.parameters())
    leaves = [module for module in base.model.modules() if [*module.parameters(recurse=False)]]
    kinds = {type(module).__module__.partition(".")[0] + "." + type(module).__name__ for module in leaves}
    assert kinds == {"torch.Linear", "torch.Embedding", "transformers.LlamaRMSNorm"}
    linears = [module for module in leaves if isinstance(module, torch.nn.Linear)]
    assert all(module.weight.shape == (module.out_features, module.in_features) for module in linears)
    assert not getattr(base.model, "is_quantized", False) and getattr(base.model, "hf_quantizer", None) is None
    assert not hasattr(base.config, "quantization_config") and not hasattr(base.config, "auto_map")
    assert base.attention in ("sdpa", "eager")


def test_another_file_of_the_same_name_and_size_is_another_base(tmp_path, monkeypatch):
    """Fine-tuned models of one shape may share their first and last bytes, and everything but their weights."""
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_whole", lambda *_, **__: pytest.fail("converted"))
    (tmp_path / "other").mkdir()
    files = [tmp_path / "tiny.gguf", tmp_path / "other" / "tiny.gguf"]
    for number, file in enumerate(files):
        file.write_bytes(bytes(1 << 20) + bytes([number]) + bytes(1 << 20))
    digest = sources._file_digest
    seen = []
    monkeypatch.setattr(sources, "_file_digest", lambda *facts: seen.append(digest(*facts)) or seen[-1])
    for file in files:
        with pytest.raises(pytest.fail.Exception, match="converted"):
            sources.resolve_source(str(file))
    assert len(set(seen)) == 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(XFusionError, match=r"tiny.gguf': \$XFUSION_CACHE must be a folder that can be written: "):
        Backbone.load(str(tmp_path / "tiny.gguf"))


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(XFusionError, match=r"base '.*broken\.gguf' cannot be converted: .*GGUF v0"):
        Backbone.load(str(tmp_path / "broken.gguf"))
    assert not list(sources.cache_folder().rglob("*.safetensors")) and not list(
        (tmp_path / "cache" / "bases").iterdir()
    )

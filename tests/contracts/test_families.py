"""Contract: what the families of the table differ in is found in the model itself, and kept."""

import json
import math
from dataclasses import replace

import pytest
import torch
from contracts.table import (
    FAMILIES,
    LAYERS,
    WINDOW,
    distance,
    look,
    make_base,
    make_model,
    picture,
    tokenizer,
    view,
    words,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from xfusion.backbone import Backbone
from xfusion.data.sequence import Sequence, XFusionError
from xfusion.fusion.lora import Lora
from xfusion.layers import layer_pieces, linear_paths, linear_shape, narrow_mlp, run_rows, slice_call

WINDOWS = {
    "gemma2": [WINDOW, None, WINDOW, None],
    "gemma3": [WINDOW, None, WINDOW, WINDOW],
    "mistral": [WINDOW] * LAYERS,
    "phi3": [WINDOW] * LAYERS,
    "qwen2": [None, None, WINDOW, WINDOW],
    "smollm3": [None, WINDOW, None, WINDOW],
}
TINY = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def backbone_of(model):
    return Backbone(model, tokenizer(), "made here")


@pytest.mark.parametrize("family", FAMILIES)
def test_windows(bases, family):
    assert [bases[family].window(i) for i in range(LAYERS)] == WINDOWS.get(family, [None] * LAYERS)


def _rename(weights):
    return {f"module.{name}": value for name, value in weights.items()}


def _narrow(weights):
    return weights | {name: value[:80] for name, value in weights.items() if name.endswith("up_proj.weight")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {n: v for n, v in weights.items() if "layers.3" not in n},
            r"9 of its .*layers\.3\.[a-z_.]+: missing\)",
        ),
        (_rename, r"39 of its .*\(lm_head\.weight: missing\)"),
        (_narrow, r"4 of its .*up_proj.weight: \[80, 64\] instead of \[96, 64\]\)"),
        (None, ".*header"),
    ],
    ids=["without a layer", "other names", "another shape", "cut off"],
)
def test_a_base_with_missing_or_broken_weights_is_refused_in_one_line(tmp_path, change, message):
    """transformers would fill in random ones, without a word at this verbosity."""
    folder = make_base("llama", tmp_path)
    file = folder / "model.safetensors"
    if change is None:
        file.write_bytes(file.read_bytes()[:5000])
    else:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(XFusionError, match=f"^base .* cannot be loaded: {message}") as error:
        Backbone.load(str(folder))
    assert "\n" not in str(error.value)


def test_a_base_whose_weights_are_a_pickle_is_refused(tmp_path):
    """transformers would read it, where there is no safetensors file."""
    folder = make_base("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(XFusionError, match=r"^base .* cannot be loaded: .*safetensors") as error:
        Backbone.load(str(folder))
    assert "\n" not in str(error.value)


def test_a_base_with_code_of_its_own_is_refused_and_its_code_not_run(tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to run it."""
    folder, ran = make_base("llama", tmp_path / "base"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "ours", "architectures": ["Ours"]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Ours"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(XFusionError, match=r"^base .* cannot be loaded: .*code") as error:
        Backbone.load(str(folder))
    assert "\n" not in str(error.value) and not ran.exists()


def test_a_tied_head_is_not_missing(tmp_path, monkeypatch):
    assert make_base("gpt2", tmp_path / "tied").is_dir()
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    base = Backbone.load("~/tied")
    assert base.model.lm_head.weight is base.model.transformer.wte.weight


def calls_of(base, length=5):
    """What the base's own forward hands to each layer for random states."""
    found = []
    x = 3 * torch.randn(1, length, base.hidden_size, generator=torch.Generator().manual_seed(0))

    def act(index, frozen, states, call):
        found.append((frozen, states, slice_call(call, slice(None))))
        return states

    base.drive(base.shadow_decoder(act), x, torch.arange(length)[None])
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_narrowed_mlp_is_the_whole_one_with_its_other_units_silent(bases, family):
    base, config = bases[family], bases[family].tower_config()
    for index, (_, x, call) in enumerate(calls_of(base)):
        mask = torch.zeros(1, 1, 5, 5) if base.attention == "eager" else torch.ones(1, 1, 5, 5, dtype=torch.bool)
        narrow, whole = base.copy_layer(index, config), base.copy_layer(index, config)
        narrow_mlp(narrow, base.config, 40)
        matrices = {p: whole.get_submodule(p) for p in linear_paths(whole) if p.startswith("mlp.")}
        downs = [m for m in matrices.values() if linear_shape(m) == (96, 64)]
        assert len(downs) == 1
        units = downs[0].weight.data if downs[0].weight.shape[0] == 96 else downs[0].weight.data.T
        units[40:] = 0
        found, expected = (run_rows(layer, x, call, mask, [], [])[0] for layer in (narrow, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in whole.parameters())


def test_a_mixture_of_experts_is_not_narrowed_but_fused():
    settings = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    base = backbone_of(Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **settings, num_key_value_heads=2, head_dim=16)))
    with pytest.raises(XFusionError, match="Qwen3MoeDecoderLayer: its MLP is not made of plain Linear layers"):
        make_model(base, "dual tower, strided")
    with pytest.raises(XFusionError, match="Qwen3MoeSparseMoeBlock of made here is a mixture of experts already"):
        make_model(base, "sparse experts")
    with pytest.raises(
        XFusionError, match="lora: Qwen3MoeDecoderLayer has no matrix of in, only key, output, query, value"
    ):
        Lora.Config(targets=("query", "in")).build().install(base)
    model, ids = make_model(base), torch.tensor([[5, 6, 7]])
    assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 128),  # two groups of two queries, a key and a value
        ({"new_decoder_architecture": False, "multi_query": True}, 96),  # four queries, then a key and a value for all
    ],
)
def test_heads_that_share_keys_in_one_matrix_are_not_cut_as_if_they_did_not(shape, rows):
    base = backbone_of(FalconForCausalLM(FalconConfig(**TINY, **shape)))
    message = rf"query_key_value: {rows} outputs are not queries, keys and values of 4 heads of 16, 192 in all"
    with pytest.raises(XFusionError, match=message):
        layer_pieces(base.layers[0])
    with pytest.raises(XFusionError, match=message):
        make_model(base, "dual projection")
    own = {"new_decoder_architecture": False, "multi_query": False}
    found = layer_pieces(FalconForCausalLM(FalconConfig(**TINY, **own)).transformer.h[0])
    assert torch.equal(
        found["key"][0].rows[:18], torch.tensor([*range(16, 32), 64, 65])
    )  # of the first head, then the second


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2", "mistral"])
def test_nothing_is_dropped_in_training(bases, family):
    base = bases[family]
    if family == "mistral":  # attention alone drops
        base = backbone_of(
            MistralForCausalLM(
                MistralConfig(**TINY, intermediate_size=96, num_key_value_heads=2, attention_dropout=0.5)
            )
        )
    shares = [m.p for m in base.layers.modules() if isinstance(m, torch.nn.Dropout)]
    shares += [getattr(m, "attention_dropout", 0.0) for m in base.layers.modules()]
    assert max(shares) >= 0.1  # else nothing is tried
    model = make_model(base)
    batch = view([[Sequence(segments=(words(4, 1), picture((3, 3), 1), words(3, 2)))]], model)
    expected = model.run_pass(batch)[0]
    model.train()
    assert torch.equal(model.run_pass(batch)[0], expected)


_GPT_J = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
_GPT_J |= {"bos_token_id": 0, "eos_token_id": 1}
_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_EXPERTS |= {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "intermediate_size": 96, "q_lora_rank": 16}
_EXPERTS |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_NARROW = {**TINY, "intermediate_size": 96, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
_NARROW |= {"pad_token_id": 2}
_FACTORS = {"embedding_multiplier": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 4.0}
_TURNS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SPARSE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
SELDOM = {  # the decoder reads the first of what a layer returns; a required argument; one complex table; an offset
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT_J)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**_GPT_J)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**TINY, bos_token_id=0, eos_token_id=1)),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**TINY, **_EXPERTS)),
    "biogpt": lambda: BioGptForCausalLM(BioGptConfig(**TINY, intermediate_size=96, max_position_embeddings=64)),
    # Factors on embeddings, scores, branches and logits; one norm for two branches; no positions in full layers; routed MLPs.
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_NARROW, **_FACTORS)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_NARROW, use_qk_norm=True)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**_NARROW, **_TURNS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_NARROW, **_SPARSE)),
}
SELDOM_FULL = ("granite", "cohere", "cohere2", "qwen3_moe")
"""Those of them that are tried in the full tier alone."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.full) if name in SELDOM_FULL else name for name in SELDOM]
)
@torch.no_grad()
def test_a_batch_of_a_family_with_other_arguments(family):
    """Text is the base's in every row, and a mixed pass the paper's equation on whole layers."""
    torch.manual_seed(0)
    base = backbone_of(SELDOM[family]())
    for parameter in base.model.parameters():
        parameter.add_(0.08 * torch.randn(parameter.shape))
    assert base.longest == (64 if family == "biogpt" else None)
    model = make_model(base)
    texts = [words(9, seed) for seed in (1, 2)]
    hidden, _ = model.run_pass(view([[Sequence(segments=(text,))] for text in texts], model))
    expected = model.text_logits(torch.tensor([text.ids for text in texts]))
    torch.testing.assert_close(base.logits(hidden), expected, rtol=0, atol=2e-5)
    batch = view([[Sequence(segments=(text, picture((2, 2), 1), words(3, 3)))] for text in texts], model)
    found = look(model, batch)
    with model.using(model.reference_engine()):
        assert distance(found, look(model, batch)) < 2e-4


def test_a_base_with_offloaded_weights_is_refused(bases):
    """accelerate holds such weights elsewhere: what is copied or hashed here would be empty."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = Backbone.load(bases["llama"].source).model
    hooks.add_hook_to_module(model.model.layers[1].mlp, hooks.AlignDevicesHook(offload=False))
    assert backbone_of(model).num_layers == LAYERS
    hooks.add_hook_to_module(model.model.layers[2].mlp.up_proj, hooks.AlignDevicesHook(offload=True))
    with pytest.raises(XFusionError, match=r"^made here: some weights are offloaded; load the base on one device$"):
        backbone_of(model)


def test_a_base_from_scratch_has_rotary_tables_as_a_trained_one_has(tmp_path):
    """Rounded to bfloat16 they would turn the words at position 500 by another angle."""
    folder = make_base("llama", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    trained = Backbone.load(str(folder), dtype=torch.bfloat16)
    for dtype in (None, torch.bfloat16):
        scratch = Backbone.load(f"scratch:{folder}", dtype=dtype)
        assert {p.dtype for p in scratch.model.parameters()} == {scratch.dtype} == {torch.bfloat16}
        table = scratch.decoder.rotary_emb.inv_freq
        assert table.dtype == torch.float32 and torch.equal(table, trained.decoder.rotary_emb.inv_freq)
    assert not torch.equal(table, table.bfloat16().float())


def test_layers_without_softmax_attention_are_refused_wherever_they_stand():
    """The first layer of Qwen3-Next has a recurrent state instead of keys and values; a cache is an argument of all."""
    types = ["full_attention", "linear_attention"]
    config = Qwen3NextConfig(**TINY, intermediate_size=96, num_key_value_heads=2, head_dim=16, layer_types=types)
    message = r"some of its layers .*Qwen3NextDecoderLayer.* have no softmax attention .*\(kinds of layers: linear_attention\)"
    with pytest.raises(XFusionError, match=message):
        backbone_of(Qwen3NextForCausalLM(config))


def test_soft_caps_are_not_lost_to_an_attention_without_them(bases):
    """Gemma 2 has no sdpa: a copy that is asked for it computes as the base does."""
    base = bases["gemma2"]
    copy = base.working_copy(torch.bfloat16, "sdpa")
    assert (copy.attention, copy.dtype) == ("eager", torch.bfloat16)
    assert base.working_copy(torch.float32, "sdpa") is base
    assert bases["llama"].working_copy(torch.float32, "eager").attention == "eager"


def test_a_family_with_a_causal_mask_of_its_own_never_sees_a_picture_and_is_refused(bases, monkeypatch):
    """GPT-Neo masks keys by their places in memory, where all words of a sequence stand before its pictures."""
    assert {family: bases[family].own_mask for family in FAMILIES} == dict.fromkeys(FAMILIES)
    shape = {"vocab_size": 320, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    shape |= {"bos_token_id": 0, "eos_token_id": 1}
    base = backbone_of(GPTNeoForCausalLM(GPTNeoConfig(**shape, attention_types=[[["global", "local"], 1]])))
    for fusion in ("prefix", "dual tower, strided", "lora", "gated tower"):
        with pytest.raises(
            XFusionError, match=r"GPTNeoBlock has a causal mask of its own \(attn.attention.bias\), .*base"
        ):
            make_model(base, fusion)
    reads = make_model(base, "openflamingo, all previous")

    def seen(model):
        shown = (Sequence(segments=(words(4, 1), picture((3, 3), seed), words(3, 2))) for seed in (1, 2))
        one, other = (look(model, view([[sequence]], model))[0][0] for sequence in shown)
        return float((one - other).detach().abs().max())

    assert seen(reads) > 1e-4
    monkeypatch.setattr(Backbone, "own_mask", None)
    assert seen(make_model(base, "prefix")) == 0  # the trap, without a word


def test_a_failure_of_the_first_pass_is_said_and_not_taken_for_a_habit_of_the_family(bases, monkeypatch):
    """Each base runs once over no layers, to see whether its layers return tuples."""
    model, base, runs = bases["llama"].model, bases["llama"], []

    def failing(decoder, x, position):
        runs.append(decoder)
        raise failures.pop(0)

    monkeypatch.setattr(Backbone, "_run", staticmethod(failing))
    failures = [torch.OutOfMemoryError("CUDA out of memory")]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Backbone(model, base.tokenizer, base.source)
    failures = [RuntimeError("no kernel for float8\nsecond line"), TypeError("tuple")]
    message = r": LlamaForCausalLM cannot be fused: it does not run over given states \(no kernel for float8\)"
    with pytest.raises(XFusionError, match=message) as caught:
        Backbone(model, base.tokenizer, base.source)
    assert str(caught.value.__cause__).startswith("no kernel") and len(runs) == 3


@torch.no_grad()
def test_a_head_that_takes_the_states_by_number_gets_them():
    """As in GPT-J, CodeGen, GPT-BigCode and Falcon."""
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320}
    base = backbone_of(FalconForCausalLM(FalconConfig(**shape, bos_token_id=0, eos_token_id=1)))
    hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base.logits(hidden), base.model.lm_head(hidden))


def test_a_sequence_beyond_the_learned_positions_is_refused(bases):
    assert {name: bases[name].longest for name in FAMILIES if bases[name].longest} == {"gpt2": 512}
    base = bases["gpt2"]
    decoder, x = base.shadow_decoder(lambda index, frozen, states, call: states), torch.zeros(1, 3, 64)
    base.drive(decoder, x, torch.tensor([[0, 1, 511]]))
    with pytest.raises(XFusionError, match="a sequence of 513 positions; the base has learned 512"):
        base.drive(decoder, x, torch.tensor([[0, 1, 512]]))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_repeated_positions_are_not_taken_for_packed_sequences(bases, family):
    """The patches of a picture may share a position. The base's own forward, without a mask and a cache, sees several packed
    sequences there and keeps them apart; `Backbone.drive` hands every layer a mask, and a pass reads across the picture.
    """
    base = bases[family]
    x = 3 * torch.randn(1, 9, base.hidden_size, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[0, 1, 2, 3, 3, 3, 3, 4, 5]])

    def own(mask, **settings):
        found = base.decoder(inputs_embeds=x, position_ids=position, attention_mask=mask, **settings)
        return found.last_hidden_state

    causal = own(torch.ones(9, 9).tril().bool()[None, None])
    guessed = own(None, use_cache=False)
    torch.testing.assert_close(own(torch.ones(1, 9)), causal, rtol=0, atol=1e-5)
    torch.testing.assert_close(guessed[:, :4], causal[:, :4], rtol=0, atol=1e-5)
    assert float((guessed - causal)[:, 4:].abs().amax(-1).min()) > 0.1  # the trap, without a word

    masks = []
    decoder = base.shadow_decoder(lambda _, layer, states, call: masks.append(call["attention_mask"]) or states)
    base.drive(decoder, x, position)
    assert len(masks) == LAYERS and all(mask.shape == (1, 1, 1, 1) and not mask.any() for mask in masks)
    decoder(inputs_embeds=x, position_ids=position, attention_mask=None, use_cache=False)  # what drive must not do
    block = (position[0].diff(prepend=position[0, :1] - 1) != 1).cumsum(0)
    assert torch.equal(masks[LAYERS][0, 0], torch.ones(9, 9).tril().bool() & (block[:, None] == block))

    model, last = make_model(base, "prefix"), words(4, 2)
    shown = replace(picture((2, 2), 1), shared_position=True)
    one, other = (look(model, view([[Sequence(segments=(words(4, s), shown, last))]], model))[0][0] for s in (1, 3))
    assert float((one - other)[4:].abs().amax(-1).min()) > 1e-2  # words behind the picture hear those before it


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scale_of_inputs_is_what_the_first_layer_meets(bases, family):
    base = bases[family]
    plain = float(base.model.get_input_embeddings().weight.std())
    factor = math.sqrt(64) if family.startswith("gemma") else 1
    assert base.embedding_scale == pytest.approx(factor * plain, rel=1e-6)


def test_a_quantised_base_is_refused_before_its_weights_are_read(tmp_path):
    made = make_base("llama", tmp_path)
    file = made / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(config))
    with pytest.raises(
        XFusionError, match=r"its weights are quantised \(bitsandbytes\).*take the same model in bfloat16"
    ):
        Backbone.load(str(made))

"""Contract: the frozen model is never touched, and text comes out of the fused stack bit for bit."""

import re
from collections import Counter

import pytest
import torch
from contracts.table import (
    BASES,
    FAMILIES,
    LAYERS,
    ROWS,
    WINDOW,
    distance,
    look,
    make_model,
    mixed_sequences,
    on_every_family,
    randomise,
    rows,
    tokenizer,
    view,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import xfusion.fusion.base as fusion_base
from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.layers import layer_pieces


def text_batches():
    """Ids and masks that the base is called with: bare, and left-padded as generation pads."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 300, (3, 4 * WINDOW), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, : 2 * WINDOW] = 0
    return {"bare": (ids, None), "left-padded": (ids.where(mask.bool(), 2), mask), "one token": (ids[:, :1], None)}


@pytest.mark.parametrize(("fusion", "family"), on_every_family(rows(preserves_text=True)))
def test_text_logits_are_bit_equal_whatever_the_new_weights_are(bases, fusion, family):
    model = make_model(bases[family], fusion, randomised=False)
    assert model.fusion.preserves_text
    for _ in range(2):
        for name, (ids, mask) in text_batches().items():
            base = model.text_logits(ids, attention_mask=mask)
            fused = model.text_logits(ids, stack="fused", attention_mask=mask)
            assert torch.equal(base, fused), name
        randomise(model, by=1.0)


@pytest.mark.parametrize(("fusion", "family"), rows(preserves_text=False))
def test_a_fusion_that_trains_the_base_says_what_it_does_to_text(bases, fusion, family):
    """Equal while its blocks are copies, another model once they are trained; the base itself stays."""
    model = make_model(bases[family], fusion, randomised=False)
    ids = text_batches()["bare"][0]
    base = model.text_logits(ids)
    torch.testing.assert_close(model.text_logits(ids, stack="fused"), base, rtol=0, atol=1e-5)
    randomise(model)
    assert float((model.text_logits(ids, stack="fused") - base).abs().max()) > 1e-2
    assert torch.equal(model.text_logits(ids), base)


@pytest.mark.parametrize(("fusion", "family"), on_every_family(rows(preserves_text=True)))
def test_greedy_tokens_of_the_fused_stack_are_the_bases(bases, fusion, family):
    model = make_model(bases[family], fusion)
    for ids, mask in text_batches().values():
        mask = torch.ones_like(ids) if mask is None else mask
        settings = {"attention_mask": mask, "max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 2}
        expected = model.backbone.model.generate(ids, **settings)
        assert torch.equal(model.fused_text_model().generate(ids, **settings), expected)


def test_the_fused_stack_makes_the_media_towers_keys_and_values(bases, monkeypatch):
    model, calls, made = make_model(bases["llama"]), [], fusion_base.keys_values
    monkeypatch.setattr(fusion_base, "keys_values", lambda *a: calls.append(made(*a)) or calls[-1])
    ids = text_batches()["bare"][0]
    model.text_logits(ids)
    assert not calls
    model.text_logits(ids, stack="fused")
    assert len(calls) == LAYERS
    assert all(k.shape[:3:2] == ids.shape for k, _ in calls)


def test_unknown_stack_is_refused(bases):
    with pytest.raises(ValueError, match="'bases' is neither 'base' nor 'fused'"):
        make_model(bases["llama"]).text_logits(torch.tensor([[3]]), stack="bases")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_changed_frozen_weight_changes_the_fused_logits(bases, family):
    """Both stacks share tensors: were the shadow a copy, equality would prove nothing about the base in use."""
    model = make_model(bases[family])
    ids = text_batches()["bare"][0]
    before = model.text_logits(ids, stack="fused")
    weight = model.backbone.layers[LAYERS - 1].mlp.down_proj.weight
    kept = weight.data.clone()
    try:
        weight.data[0, 0] += 1.0
        assert not torch.equal(model.text_logits(ids, stack="fused"), before)
    finally:
        weight.data.copy_(kept)


# What a decoder adds to its inputs by itself does not reach the states of a mixed pass yet.
@pytest.mark.parametrize("family", list(FAMILIES))
def test_words_before_media_and_text_alone_follow_the_base_through_the_mixed_path(bases, family):
    """Masks, windows, positions and embedding scale of a mixed pass are the family's own (longer than the window)."""
    model = make_model(bases[family])
    ids = text_batches()["bare"][0][0].tolist()
    base = model.text_logits(torch.tensor([ids]))[0]
    media = mixed_sequences()["picture alone"].segments
    for segments in [(Text(ids=tuple(ids)),), (Text(ids=tuple(ids)), *media)]:
        batch = pack([[Sequence(segments=segments)]])
        hidden, run = model.run_pass(batch)
        logits = model.backbone.logits(hidden[:, run.slices["text"]])[0]
        torch.testing.assert_close(logits, base, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", BASES)
def test_a_base_in_half_precision_keeps_its_text_and_still_draws_and_captions(bases, family):
    base = Backbone.load(bases[family].source, dtype=torch.bfloat16)
    model = make_model(base)
    for ids, mask in text_batches().values():
        logits = model.text_logits(ids, attention_mask=mask)
        assert logits.dtype == torch.bfloat16
        assert torch.equal(model.text_logits(ids, stack="fused", attention_mask=mask), logits)
    drawn = model.draw(["a red apple", "tree"], steps=2)
    assert [p.size for p in drawn] == [(16, 16)] * 2
    assert all(isinstance(text, str) for text in model.caption(drawn, max_tokens=3))
    assert {p.dtype for p in model.new_parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_parts_among_frozen_ones_of_half_precision_keep_text(bases, dtype):
    """The deltas of a low-rank tower are float32; their block's frozen matrices are not."""
    model = make_model(Backbone.load(bases["llama"].source, dtype=dtype), "low-rank tower")
    ids, mask = text_batches()["bare"]
    logits = model.text_logits(ids, attention_mask=mask)
    assert torch.equal(model.text_logits(ids, stack="fused", attention_mask=mask), logits)


# --------------------------------------------------------------------------------------------------------- untouched


def state_of(base):
    """Everything about a base that training could have changed."""
    modules = dict(base.model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "tree": {name: (id(m), type(m), frozenset(m.__dict__)) for name, m in modules.items()},
        "hooks": {(name, h): list(getattr(m, h)) for name, m in modules.items() for h in hooks},
        "storage": {k: (v.data_ptr(), v.dtype, v.shape) for k, v in base.model.state_dict().items()},
        "trains": {k: (p.requires_grad, p.grad is None) for k, p in base.model.named_parameters()},
        "modes": {name: m.training for name, m in modules.items()},
        "attention": base.attention,
        "fingerprint": base.compute_fingerprint(),
    }


@pytest.mark.parametrize(("fusion", "family"), ROWS)
def test_install_training_and_removal_leave_the_base_as_it_was(bases, fusion, family):
    base = bases[family]
    ids = text_batches()["bare"][0]
    before, logits = state_of(base), base.model(ids).logits
    model = make_model(base, fusion)
    assert state_of(base) == before
    learned, fingerprint = model.learned_state(), model.fingerprint
    assert not {v.data_ptr() for v in learned.values()} & {p[0] for p in before["storage"].values()}

    model.train()
    adamw = torch.optim.AdamW(model.new_parameters(), lr=1e-2)
    batch = view([[s] for s in mixed_sequences().values()], model)
    for step in range(3):
        losses = model.losses(batch, torch.Generator().manual_seed(step))
        sum(value / count for value, count in losses.values()).backward()
        adamw.step()
        adamw.zero_grad()
    assert model.fingerprint != fingerprint
    assert state_of(base) == before
    model.fusion.remove()
    assert list(model.fusion.parameters()) == []
    assert state_of(base) == before
    assert torch.equal(base.model(ids).logits, logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_working_copy_for_training_is_not_the_base(bases, family):
    base = bases[family]
    before = state_of(base)
    copy = base.working_copy(torch.bfloat16, "eager")
    assert state_of(base) == before
    assert copy.dtype == torch.bfloat16 and copy.attention == "eager"
    assert base.working_copy(base.dtype, base.attention) is base
    tables = {name: table for name, table in base.model.named_buffers() if name.endswith("inv_freq")}
    assert tables and all(table.dtype == torch.float32 for table in tables.values())
    copied = dict(copy.model.named_buffers())
    for name, table in tables.items():  # in bfloat16 a far word would be turned by another angle
        assert copied[name].dtype == torch.float32 and torch.equal(copied[name], table)


def test_a_working_copy_never_holds_the_weights_a_second_time_in_their_own_type(bases):
    """A base of half a GPU's memory would not fit beside its own copy, even if only until that is cast."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.bytes = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
                self.bytes[result.dtype] += result.nbytes
            return result

    base = bases["llama"]
    before = state_of(base)
    with Made() as made:
        copy = base.working_copy(torch.bfloat16, "eager")
    cast = sum(p.nbytes for p in copy.model.parameters())
    assert made.bytes[torch.float32] < 0.01 * cast <= cast == pytest.approx(made.bytes[torch.bfloat16], rel=0.01)
    assert state_of(base) == before
    own = {id(p) for p in base.model.parameters()}
    assert all(p.dtype == torch.bfloat16 and id(p) not in own and not p.requires_grad for p in copy.model.parameters())
    for parameter, cast in zip(base.model.parameters(), copy.model.parameters(), strict=True):
        assert torch.equal(cast, parameter.bfloat16())


def test_tied_weights_stay_tied_in_a_working_copy(tmp_path):
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    copy = Backbone(model, tokenizer(), "tied").working_copy(torch.bfloat16, "eager").model
    assert copy.get_input_embeddings().weight is copy.lm_head.weight and copy.lm_head.weight.dtype == torch.bfloat16


def test_a_working_copy_of_the_same_type_holds_no_weights_of_its_own(bases):
    base = bases["llama"]
    before = base.attention
    asked = "eager" if before == "sdpa" else "sdpa"
    copy = base.working_copy(base.dtype, asked)
    assert (copy.attention, base.attention) == (asked, before) and copy.layers[0] is not base.layers[0]
    pairs = zip(copy.model.parameters(), base.model.parameters(), strict=True)
    assert all(own is other for own, other in pairs)


@torch.no_grad()
def test_hooks_that_transformers_leaves_in_the_base_are_not_copied_into_blocks(bases):
    """They collect states for whoever asks the base for them; in a block they would do so in every pass."""
    base = Backbone.load(bases["llama"].source)
    base.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)

    def hooks(module):
        return [name for name, m in module.named_modules() if m._forward_hooks or m._forward_pre_hooks]

    assert hooks(base.layers)
    assert hooks(make_model(base).fusion) == []
    assert hooks(base.layers)


@torch.no_grad()
def test_a_forward_that_a_library_put_into_a_module_is_not_taken_into_its_shadow(bases):
    """It is bound to the module itself, and would compute with the frozen layers and parts that the shadow replaces."""
    batch = pack([[sequence] for sequence in mixed_sequences().values()])
    for fusion in ("dual tower", "dual projection"):
        base = Backbone.load(bases["llama"].source)
        expected = look(make_model(base, fusion), batch)
        owners = (base.model, base.decoder, *base.layers, *(layer.self_attn for layer in base.layers))
        for module in owners:
            module.forward = module.forward
        assert distance(look(make_model(base, fusion), batch), expected) == 0
        assert all("forward" in module.__dict__ for module in owners)


# --------------------------------------------------------------------------------------------------------- gradients


def gradients(model, names):
    """Largest absolute gradient of each new parameter after a backward pass of some losses."""
    model.zero_grad()
    batch = view([[s] for s in mixed_sequences().values()], model)
    losses = model.losses(batch, torch.Generator().manual_seed(0))
    sum(losses[name][0] / losses[name][1] for name in names).backward()
    pairs = [(f"{part}.{n}", p) for part in ("port", "fusion") for n, p in getattr(model, part).named_parameters()]
    assert {id(p) for _, p in pairs} == {id(p) for p in model.new_parameters()}
    return {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in pairs}


@pytest.mark.parametrize(("fusion", "family"), on_every_family(ROWS))
def test_gradients_reach_every_new_parameter_through_the_frozen_layers(bases, fusion, family):
    model = make_model(bases[family], fusion)
    both = gradients(model, ["next_token", "flow_matching"])
    assert [n for n, g in both.items() if not g > 0] == []
    assert all(p.grad is None for p in model.backbone.model.parameters())


READ_TO_THE_END = (
    "dual tower, strided",
    "single tower",
    "single tower, strided",
    "gated tower",
    "sparse experts",
    "sparse experts, of the paper",
    "prefix",
    "hybrid",
)
"""Fusions with no new weight that words do not hear of."""


@pytest.mark.parametrize(("fusion", "family"), ROWS)
def test_words_train_every_block_but_one_at_the_last_layer(bases, fusion, family):
    """Spec 1.12, test 4: what the last layer makes of a picture is read by no word."""
    model = make_model(bases[family], fusion)
    words = gradients(model, ["next_token"])
    silent = {n for n, g in words.items() if not g > 0} - {"port.norm.weight", "port.head.weight", "port.head.bias"}
    last = LAYERS - 1
    if isinstance(model.fusion, ModalityExperts):
        if model.fusion.config.noised_only:  # no word reads a noised picture: experts learn from drawing alone
            by_noise = ("port.time.", "port.block_modulation.") if "adaln" in fusion else ()  # clean pictures have none
            assert silent == {n for n in words if n.startswith(("fusion.", *by_noise))}
            return
        paths: dict[bool, set[str]] = {True: set(), False: set()}
        for role, pieces in layer_pieces(bases[family].layers[last]).items():
            if role != "norm":  # which norm stands before keys and values differs from family to family
                paths[role in ("key", "value")] |= {f"fusion.blocks.{last}.{p.path.replace('.', '/')}." for p in pieces}
        read, unread = tuple(paths[True]), tuple(paths[False] - paths[True])
        assert all(n.startswith(f"fusion.blocks.{last}.") and not n.startswith(read) for n in silent)
        assert {n for n in words if n.startswith(unread)} <= silent
        return
    # A tower whose last block no word reads; where words are mixed with it, they do read it.
    unread = {
        "dual tower": (f"fusion.blocks.{last}.",),
        "low-rank tower": (f"fusion.blocks.{last}.",),
        "wide tower": (f"fusion.blocks.{last}.",),
        "narrow tower": (f"fusion.mixes.media_{last}.",),
        "x-fuse": (f"fusion.mixes.media_{last}.",),
        "x-fuse-proj on pictures": (f"fusion.blocks.{last}.", f"fusion.mixes.media_{last}."),
        "dynamic": (f"fusion.mixes.media_{last}.",),
        **dict.fromkeys(READ_TO_THE_END, ()),
    }
    if fusion in unread:
        assert silent == {n for n in words if n.startswith(unread[fusion])} if unread[fusion] else not silent
    else:  # a row that says nothing of itself
        assert all(re.search(rf"[._]{last}(\.|$)", n) for n in silent), silent

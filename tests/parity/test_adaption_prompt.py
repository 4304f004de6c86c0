"""Adaption prompts against peft's, random weights copied across, in float32 to 1e-5."""

from dataclasses import replace

import pytest
import torch
from contracts.table import make_model, model_config, picture, words
from torch import Tensor

from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence
from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.model import Model


@torch.no_grad()
def test_prompts_are_pefts(bases):
    """peft's gate is one number of a layer without tanh, and its prompts act on all words: ours are given a picture first
    whose own row is nothing, so that all words stand behind it.
    """
    peft = pytest.importorskip(
        "peft", reason="peft is not installed (extra dev): prompts are not compared with its own"
    )
    own_base = Backbone.load(bases["llama"].source)
    connector = Resampler.Config(latents=1, depth=1, heads=1, head_width=8, mlp=1)
    fusion = AdaptionPrompt.Config(prompts=4, layers=(1, 4), connector=connector)
    model = Model(replace(model_config(bases["llama"], "llama-adapter"), fusion=fusion), bases["llama"]).eval()
    model.fusion.connector.norm.weight.zero_()
    model.fusion.connector.norm.bias.zero_()
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=3, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(own_base.model, config).eval()
    torch.manual_seed(0)
    for index, layer in enumerate(own_base.layers):
        prompt = getattr(layer.self_attn, "adaption_prompt", None)
        assert (prompt is None) == (index < 1)
        if prompt is not None:
            layer.self_attn.adaption_gate.fill_(0.3 + 0.1 * index)
            block = model.fusion.blocks[str(index)]
            block.rows.copy_(prompt[0])
            block.gate.fill_(float(torch.atanh(layer.self_attn.adaption_gate)))
    text = words(9, 1)
    batch = pack([[Sequence(segments=(picture((2, 2), 1), text))]])
    # The words as the base sees them alone: at its own positions, and without the [EOI] before them.
    rows = batch.text.columns(slice(1, None))
    rows = replace(rows, position=torch.arange(9)[None])
    hidden, run = model.run_pass(replace(batch, text=rows, text_ids=batch.text_ids[:, 1:], labels=batch.labels[:, 1:]))
    found = model.backbone.logits(hidden[:, run.slices["text"]])
    ids: Tensor = torch.tensor([text.ids])
    torch.testing.assert_close(found, theirs(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert float((found - make_model(bases["llama"], "llama-adapter").text_logits(ids)).abs().max()) > 1e-2

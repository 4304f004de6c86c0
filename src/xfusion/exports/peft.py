"""Export to peft: the media tower of a low-rank dual tower as a LoRA adapter, adaption prompts as an AdaptionPrompt adapter.

peft does not handle pictures: only the tower or the prompts are exported, for tokens and states that the user provides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from xfusion.exports.base import not_exact
from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.base import parts_from_module
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.lora import Lora
from xfusion.model import Model

WEIGHTS = "adapter_model.safetensors"


def export(model: Model, folder: Path) -> list[str]:
    """Write an adapter that ``peft.PeftModel.from_pretrained(base, folder)`` loads."""
    layers = next(name for name, module in model.backbone.model.named_modules() if module is model.backbone.layers)
    if isinstance(model.fusion, DualTower):
        return _export_lora(model, model.fusion, folder, layers)
    if isinstance(model.fusion, AdaptionPrompt):
        return _export_prompts(model, model.fusion, folder, layers)
    if isinstance(model.fusion, Lora):
        reason = (
            "deltas on the base's own layers are not taken out of the mechanism over them, for which peft has no place"
        )
        raise not_exact(model, "peft", reason)
    raise not_exact(model, "peft", "it is neither a low-rank dual tower nor adaption prompts, which alone are exported")


def _export_lora(model: Model, fusion: DualTower, folder: Path, layers: str) -> list[str]:
    """The media tower as it computes its own rows: every frozen block with its low-rank deltas."""
    config, count = fusion.config, model.backbone.num_layers
    if config.rank is None:
        raise not_exact(model, "peft", "its blocks are copies, and LoRA is deltas: the recipe xfusion_lora has these")
    if config.fuse is not None:
        raise not_exact(model, "peft", "the towers' outputs are mixed, which no adapter does")
    if len(fusion.blocks) < count:
        raise not_exact(
            model, "peft", f"its tower skips {count - len(fusion.blocks)} of {count} layers, which an adapter cannot"
        )
    from peft import LoraConfig

    state: dict[str, Tensor] = {}
    targets: list[str] = []
    for index, block in fusion.blocks.items():
        adapters: dict[str, Any] = parts_from_module(block)  # type: ignore[arg-type]
        for path, adapter in adapters.items():
            name = f"{layers}.{index}.{path}"
            targets.append(name)
            state |= {f"{name}.lora_A.weight": adapter.down, f"{name}.lora_B.weight": adapter.up}
    frozen_layer: Any = model.backbone.model.get_submodule(targets[0])
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,  # a factor of 1
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=type(frozen_layer).__name__ == "Conv1D",
        base_model_name_or_path=model.backbone.source,
        inference_mode=True,
    )
    _write(state, settings, folder)
    return ["this is the media tower alone; the port that makes its rows of pictures has no place in peft"]


def _export_prompts(model: Model, fusion: AdaptionPrompt, folder: Path, layers: str) -> list[str]:
    """Learned rows and gates; in peft they act on all text, here on text after a picture."""
    config, count = fusion.config, model.backbone.num_layers
    if config.affine or config.picture != "added":
        raise not_exact(model, "peft", "its version 2 (tuned matrices, pictures as prompts) has no place in peft")
    layer_indices = sorted(int(index) for index in fusion.blocks)
    if layer_indices != list(range(count - len(layer_indices), count)):
        raise not_exact(model, "peft", f"peft has prompts in the last layers alone, this pack in {layer_indices}")
    state: dict[str, Tensor] = {}
    for index in layer_indices:
        prompt: Any = fusion.blocks[str(index)]
        gate = prompt.gate.tanh()
        if bool((gate != gate[0]).any()):
            raise not_exact(
                model, "peft", f"peft has one gate per layer, and the heads of layer {index} have their own"
            )
        name = f"{layers}.{index}.self_attn"
        state |= {f"{name}.adaption_prompt": prompt.rows[None], f"{name}.adaption_gate": gate[:1]}
    from peft import AdaptionPromptConfig
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    family = model.backbone.config.model_type
    families = sorted(name for name, kind in TRANSFORMERS_MODEL_CONFIG.items() if kind.target_modules == "self_attn")
    if family not in families:
        raise not_exact(model, "peft", f"peft has such prompts for {', '.join(families)}, and the base is {family}")
    settings = AdaptionPromptConfig(
        adapter_len=config.prompts,
        adapter_layers=len(layer_indices),
        target_modules="self_attn",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.backbone.source,
        inference_mode=True,
    )
    _write(state, settings, folder)
    return ["the prompts act on all words, and no picture is added to them: peft has no place for it"]


def _write(state: dict[str, Tensor], settings: Any, folder: Path) -> None:
    tensors = {f"base_model.model.{k}": v.detach().to("cpu", torch.float32).contiguous() for k, v in state.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    settings.save_pretrained(str(folder))

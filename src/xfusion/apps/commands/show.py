"""`show` and `list`: available recipes and packs; what is frozen and what is new, memory, licences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, load_model, pack_folder, size_text, table

if TYPE_CHECKING:
    import torch

    from xfusion.data.sources import Source
    from xfusion.model import Model
    from xfusion.training.stages import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Show(Verb):
    """Show a recipe or a pack: what is frozen and what is new, shapes, memory, licences."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE_OR_MODEL")]
    """A recipe of `xfusion list`, file.py:function, a folder, a shipped pack's name, or a hub id."""
    backbone: Annotated[str | None, tyro.conf.arg(metavar="SHAPE")] = None
    """Estimate a recipe's cost on a base from its shape alone, without weights: Llama-3.2-1B or Llama-3.1-8B."""
    trust: bool = False
    """Import packages outside xfusion that a pack names."""

    def run(self, console: Console) -> Answer:
        del console
        if self.backbone is not None:
            return self._cost_on_shape(self.backbone)
        from xfusion import checkpoint
        from xfusion.card import data_licences, run_summary, training_runs
        from xfusion.model import build
        from xfusion.recipes.base import find, names

        folder = pack_folder(self.name)
        recipe_names = names()
        data: dict[str, Any]
        if self.name.partition("(")[0] in recipe_names or ":" in self.name:
            recipe = find(self.name)()
            model = build(recipe.model)
            data = {"name": self.name, "kind": "recipe"} | describe(model)
            data["memory"] = training_memory(model, built_in(recipe)) | activations(model, recipe.stages[-1])
            data["licences"]["data"] = data_licence(recipe)
            data["training"] = {"data": recipe.data, "steps": [stage.steps for stage in recipe.stages]}
        elif Path(folder).expanduser().is_dir() or folder in checkpoint.shipped() or folder.count("/") == 1:
            config = checkpoint.read_config(checkpoint.find(folder))
            data = {"name": self.name, "kind": "pack"} | describe(load_model(folder, trust=self.trust))
            data["licences"]["data"] = data_licences(config)
            data["training"] = config.get("training") or {}
            data["training_runs"] = [run_summary(run) for run in training_runs(config)]
        else:
            from xfusion.apps.cli import nearest

            suggestion = nearest(self.name, [*recipe_names, *checkpoint.shipped()])
            raise UsageError(f"{self.name!r} is neither a recipe ({', '.join(recipe_names)}) nor a pack{suggestion}")
        return Answer(data=data, text=_text(data))

    def _cost_on_shape(self, shape: str) -> Answer:
        from xfusion.backbone import Backbone
        from xfusion.comparison.cost import flops_of_encoder, flops_of_shape
        from xfusion.model import build
        from xfusion.recipes.base import find

        recipe, base = find(self.name)(), Backbone.of_shape(shape)
        model = build(recipe.model, base)
        frozen = base.num_parameters
        data = {
            "name": self.name,
            "kind": "recipe",
            "shape": shape,
            "frozen_parameters": frozen,
            "new_parameters": model.num_new_parameters,
            "tokens_per_picture": math.prod(model.modality.grid(model.modality.sizes[0])),
            "flops_per_sample": flops_of_shape(model),
            "encoder_flops": flops_of_encoder(recipe.model),
            "memory": memory_on_shape(model) | activations(model, recipe.stages[-1], base.dtype),
        }
        flops = data["flops_per_sample"]
        rows = [
            ("recipe", f"{self.name} on the shape of {shape}, no weights loaded"),
            ("frozen", f"{frozen:,} weights"),
            ("new", f"{model.num_new_parameters:,} weights ({100 * model.num_new_parameters / frozen:.1f} %)"),
            (model.modality.name, f"{data['tokens_per_picture']} token{'s' * (data['tokens_per_picture'] > 1)}"),
            *(
                (f"to {task}", f"{v['forward'] / 1e9:,.1f} GFLOPs forward, {v['training'] / 1e9:,.1f} with backward")
                for task, v in flops.items()
            ),
            *([("encoder", f"{n / 1e9:,.2f} GFLOPs more per picture, frozen")] if (n := data["encoder_flops"]) else []),
            *([] if flops else [("FLOPs", "not counted: it learns neither to draw nor to caption")]),
            ("training", _weights_note(data["memory"], base.dtype)),
            *(("", note) for note in _activations_notes(data["memory"])),
        ]
        return Answer(data=data, text=table(rows))


def describe(model: Model) -> dict[str, Any]:
    """A model's parts, as JSON values."""
    backbone, media = model.backbone, model.modality
    frozen = backbone.num_parameters
    rows, columns = media.grid(media.sizes[0])
    return {
        "base": {
            **backbone.identity,
            "architecture": type(backbone.model).__name__,
            "layers": backbone.num_layers,
            "width": backbone.hidden_size,
            "parameters": frozen,
            "dtype": str(backbone.dtype).removeprefix("torch."),
        },
        "frozen_parameters": frozen,
        "new_parameters": model.num_new_parameters,
        "new_parts": _part_sizes(model),
        "fusion": {
            "kind": type(model.fusion).__name__,
            "layers_with_blocks": list(model.fusion.state_layers),
            "preserves_text": model.fusion.preserves_text,
        },
        "regime": model.regime,
        media.name: {
            "made_for": media.described,
            "codec": type(media.codec).__name__,
            "sizes": list(media.sizes),
            "patch": media.patch,
            "grid": [rows, columns],
            "tokens_per_item": rows * columns,
            "token_width": media.token_width,
        },
        "capabilities": sorted(model.capabilities),
        "fingerprint": model.fingerprint,
        "memory": training_memory(model),
        "licences": {"base": backbone.licence, "codec": media.codec.licence},
    }


def _part_sizes(model: Model) -> dict[str, int]:
    """New weights by part: the children of the port, the blocks of the fusion."""
    counts: dict[str, int] = {}
    for name, value in model.learned_state().items():
        part = ".".join(name.split(".")[:2])
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def training_memory(model: Model, source: Source | None = None) -> dict[str, Any]:
    """Bytes of weights, optimiser and cached prompt states in training; activations are extra and grow with the samples
    per step.

    Args:
        model: the model to train.
        source: the training data; if None, ``text_states`` is the largest size the cache may have, and not in ``total``.
    """
    from xfusion.text_states import TEXT_STATES_BYTES
    from xfusion.training.precision import choose_compute_dtype
    from xfusion.training.setup import Prompts

    base = model.backbone.model
    dtype, reason = choose_compute_dtype(model.backbone.device)
    frozen = sum(p.numel() * p.element_size() for p in base.parameters())
    # In the base's own precision, training uses the base's weights without a copy (`Backbone.working_copy`).
    copy = 0 if dtype == model.backbone.dtype else model.backbone.num_parameters * dtype.itemsize
    new = model.num_new_parameters * 4
    texts = 0
    if model.fusion.prefix_is_constant and "draw" in model.capabilities:  # otherwise no prompt states are cached
        texts = TEXT_STATES_BYTES if source is None else Prompts.of(source, model, dtype).kept_bytes
    return {
        "base": frozen,
        "base_copy_for_training": copy,
        "new_weights": new,
        "gradients": new,
        "optimizer": 2 * new,
        "average": new,
        "text_states": texts,
        "texts_known": source is not None,
        "total": frozen + copy + 5 * new + (0 if source is None else texts),
        "precision": reason,
    }


def memory_on_shape(model: Model) -> dict[str, Any]:
    """Bytes of weights and optimiser in training in the base's own precision, for a base that has no weights here."""
    frozen = sum(p.numel() * p.element_size() for p in model.backbone.model.parameters())
    new = model.num_new_parameters * 4
    return {"base": frozen, "new_weights": new, "gradients": new, "optimizer": 2 * new, "average": new} | {
        "total": frozen + 5 * new
    }


def _weights_note(memory: dict[str, Any], dtype: torch.dtype) -> str:
    base, new = size_text(memory["base"]), size_text(memory["total"] - memory["base"])
    return (
        f"{size_text(memory['total'])}: {base} base in {str(dtype).removeprefix('torch.')}, {new} new weights, gradients,"
        " optimiser and average"
    )


def built_in(recipe: Recipe) -> Source | None:
    """A recipe's data if they ship with the package; others are not opened."""
    from xfusion.data.sources import open_source

    return open_source(recipe.data) if recipe.data.partition(":")[0] == "emoji" else None


def activations(model: Model, stage: Stage, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Bytes that a stage's step needs besides, with and without activation checkpointing; None where it is not predicted."""
    from xfusion.comparison.cost import activation_memory
    from xfusion.training.precision import choose_compute_dtype

    dtype = dtype or choose_compute_dtype(model.backbone.device)[0]
    try:
        stored, recomputed = (
            activation_memory(model, stage, dtype, checkpointing=checkpointing) for checkpointing in (False, True)
        )
    except (NotImplementedError, RuntimeError):  # a mechanism that reads tensor values, which shapes alone do not have
        stored = recomputed = None
    return {
        "activations": stored,
        "activations_with_checkpointing": recomputed,
        "samples_per_step": stage.mixture.draw + stage.mixture.caption,
    }


def _activations_notes(memory: dict[str, Any]) -> list[str]:
    if not memory.get("activations"):
        return ["activations come on top and grow with the samples per step; for this model they are not predicted"]
    stored, recomputed = (size_text(memory[name]) for name in ("activations", "activations_with_checkpointing"))
    return [
        f"activations {stored}, with activation checkpointing {recomputed} (predicted, uncompiled, at"
        f" {memory['samples_per_step']} samples a step);",
        "compiled, the default, it saves less: a full tower 36 % of the memory where this predicts 84 % (docs/speed.md)",
    ]


def _text_states_note(memory: dict[str, Any]) -> str:
    size = size_text(memory["text_states"])
    return (
        f"{size} states of prompts, kept" if memory["texts_known"] else f"besides up to {size} states of prompts, kept"
    )


def data_licence(recipe: Recipe) -> str:
    """The licence of a recipe's data, without opening it."""
    from xfusion.data.emoji import Emoji
    from xfusion.data.sources import UNSTATED, stated_licence

    built_in_licence = Emoji.licence if recipe.data.partition(":")[0] == "emoji" else UNSTATED
    return stated_licence(built_in_licence, recipe.data_licence, recipe.data)


def _text(data: dict[str, Any]) -> str:
    base, fusion, memory = data["base"], data["fusion"], data["memory"]
    media = data.get("image") or data["audio"]
    share = 100 * data["new_parameters"] / data["frozen_parameters"]
    rows = [
        (data["kind"], data["name"]),
        ("frozen", f"{base['source']}: {base['architecture']}, {base['layers']} layers of width {base['width']},"),
        ("", f"{data['frozen_parameters']:,} weights in {base['dtype']}, fingerprint {base['fingerprint'][:16]}"),
        ("new", f"{data['new_parameters']:,} weights ({share:.1f} % of the base)"),
        *(("", f"{count:>12,}  {part}") for part, count in data["new_parts"].items()),
        ("fusion", f"{fusion['kind']}, blocks at layers {', '.join(map(str, fusion['layers_with_blocks'])) or 'none'}"),
        ("regime", f"{data['regime']}: text {'stays bit-identical' if fusion['preserves_text'] else 'may change'}"),
        ("media", f"{media['made_for']}, by {media['codec']}, patch {media['patch']}:"),
        (
            "",
            f"{media['grid'][0]} x {media['grid'][1]} = {media['tokens_per_item']} tokens of {media['token_width']} numbers",
        ),
        ("can", ", ".join(data["capabilities"])),
        *(("" if number else "trained on", run) for number, run in enumerate(data.get("training_runs", ()))),
        ("training", f"{size_text(memory['total'])} and activations: {size_text(memory['base'])} base,"),
        (
            "",
            (f"{size_text(copy)} copy of it, " if (copy := memory["base_copy_for_training"]) else "")
            + f"{size_text(5 * memory['new_weights'])} new weights, gradients, optimiser and average",
        ),
        *([("", _text_states_note(memory))] if memory["text_states"] else []),
        *(("", note) for note in _activations_notes(memory)),
        ("", f"compute {memory['precision']}"),
        ("licences", "; ".join(f"{part}: {licence}" for part, licence in data["licences"].items())),
    ]
    return table(rows)


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List recipes and shipped packs."""

    def run(self, console: Console) -> Answer:
        del console
        from xfusion.checkpoint import shipped
        from xfusion.fusion.base import REGIMES
        from xfusion.recipes.base import names

        recipes, packs = [_recipe_entry(name) for name in names()], [_pack_entry(name) for name in shipped()]
        width, status_width = (max(len(recipe[key]) for recipe in recipes) for key in ("name", "status"))
        lines = [
            "recipes (xfusion train NAME), by how the modality enters: a sketch was not trained yet, what runs was, what is",
            "reproduced has a finding of its paper; in brackets what of the base is trained, if any is:",
        ]
        by_kind = itemgetter("kind")
        for kind, group in groupby(sorted(recipes, key=by_kind), by_kind):
            lines.append(f"  {kind}")
            for recipe in group:
                regime = "" if recipe["regime"] == REGIMES[0] else f" [{recipe['regime']}]"
                lines.append(
                    f"    {recipe['name']:<{width}}  {recipe['status']:<{status_width}}  {recipe['summary']}{regime}"
                )
        lines.append("packs (xfusion generate NAME PROMPT):")
        pack_rows = [
            (
                entry["name"],
                f"{size_text(entry['bytes'])}, can {', '.join(entry['capabilities'])}, {entry['regime']}, on {entry['base']}",
            )
            for entry in packs
        ]
        lines.append(table(pack_rows, "  ") if packs else "  none in this installation")
        return Answer(data={"recipes": recipes, "packs": packs}, text="\n".join(lines))


def _recipe_entry(name: str) -> dict[str, Any]:
    from importlib import import_module

    from xfusion.recipes.base import find

    module = import_module(f"xfusion.recipes.{name}")
    return {
        "name": name,
        "kind": getattr(module, "KIND", "unknown"),
        "regime": find(name)().model.regime,
        "paper": getattr(module, "PAPER", "none"),
        "status": getattr(module, "STATUS", "sketch"),
        "summary": (module.__doc__ or "").strip().split("\n")[0],
    }


def _pack_entry(name: str) -> dict[str, Any]:
    from xfusion import checkpoint

    folder = checkpoint.find(name)
    config = checkpoint.read_config(folder)
    return {
        "name": name,
        "base": config["base"]["source"],
        "capabilities": config.get("capabilities", []),
        "regime": checkpoint.from_json(config["model"]).regime,
        "num_new_parameters": config.get("num_new_parameters"),
        "bytes": (folder / checkpoint.WEIGHTS).stat().st_size,
        "training": config.get("training"),
    }

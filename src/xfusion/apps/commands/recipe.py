"""The settings of a recipe as options of `train`. Needs torch, so it is imported once the recipe is known."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from types import ModuleType
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from xfusion import checkpoint
from xfusion.apps.commands.base import Answer, pack_folder
from xfusion.apps.commands.training import Train
from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec, Encoder
from xfusion.model import ModelConfig
from xfusion.recipes.base import find
from xfusion.training import states
from xfusion.training.stages import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(Train):
    """Train a recipe; the result is a pack.

    Ctrl-C and SIGTERM finish the step, write state and pack, and exit with 130 and 143; continue with --resume, also
    after a crash.
    """

    recipe: tyro.conf.SuppressFixed[tyro.conf.Fixed[str]]
    """A name of `xfusion list`, file.py:function or package.module:function."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    """Settings of the recipe."""

    def run(self, console: Console) -> Answer:
        return self.start(self.settings, console)


def parse_train(parse: Callable[..., Any], name: str, args: list[str]) -> TrainRecipe:
    """Parse the options after ``xfusion train NAME``.

    A resumed run uses the settings saved in its folder. An adapted pack uses those of its model, except for the
    objectives. Options on the command line override both.

    Args:
        parse: as `xfusion.apps.cli.parse`.
        name: the recipe.
        args: the arguments after it.
    """
    settings = _build_recipe(name)
    command = shlex.join(["xfusion", "train", *map(_without_folders, [name, *args])])
    initial: TrainRecipe = parse(
        TrainRecipe, args, default=TrainRecipe(recipe=name, settings=settings), registry=registry()
    )
    if initial.resume:
        settings = _saved_recipe(initial, settings)
    elif initial.from_pack:
        folder = checkpoint.find(pack_folder(initial.from_pack))
        model = checkpoint.from_json(checkpoint.read_config(folder)["model"], where=str(folder))
        _require_same_fusion(f"the pack {initial.from_pack}", model, name, settings.model)
        # The recipe says how to train (noise levels, loss weights); the pack says what the weights mean.
        recipe_model = settings.model
        model = dataclasses.replace(model, text=recipe_model.text, media=recipe_model.media.adapted(model.media))
        settings = dataclasses.replace(settings, model=model)
    else:
        return dataclasses.replace(initial, command=command)
    defaults = TrainRecipe(recipe=name, settings=settings)
    final: TrainRecipe = parse(TrainRecipe, args, default=defaults, registry=registry())
    return dataclasses.replace(final, command=command, from_pack=final.from_pack and pack_folder(final.from_pack))


def _without_folders(argument: str) -> str:
    """An argument with absolute paths, also those inside of a spec, shortened to their last part: a pack may be published."""
    if "://" in argument:
        return argument
    parts = re.split(r"([:=+])", argument)
    return "".join(PurePath(part).name if part.startswith(("/", "~")) else part for part in parts)


def _build_recipe(name: str) -> Recipe:
    function = find(name)
    try:
        recipe = function()
    except TypeError as error:
        raise XFusionError(f"recipe {name!r} cannot be called without arguments: {error}") from error
    if not isinstance(recipe, Recipe):
        raise XFusionError(f"recipe {name!r} returns a {type(recipe).__name__}, not a Recipe")
    return recipe


def _saved_recipe(train: Train, recipe: Recipe) -> Recipe:
    folder = train.folder() / "state"
    if not states.list_states(folder):
        raise XFusionError(
            f"{train.folder()} holds no run to resume (nothing in state/); leave --resume out to start one"
        )
    try:
        saved = checkpoint.from_json(states.newest_plan(folder)["recipe"], trust=True, where=str(folder))
    except (KeyError, TypeError) as error:
        raise XFusionError(f"{folder} cannot be read: {error}") from error
    _require_same_fusion(str(train.folder()), saved.model, train.recipe, recipe.model)
    return saved


def _require_same_fusion(name: str, pack_model: ModelConfig, recipe: str, expected: ModelConfig) -> None:
    mechanisms = [type(model.fusion).__qualname__.removesuffix(".Config") for model in (pack_model, expected)]
    if mechanisms[0] != mechanisms[1]:
        raise XFusionError(
            f"{name} was trained with {mechanisms[0]}, the recipe {recipe} has {mechanisms[1]}: name the recipe that trained it"
        )


# -------------------------------------------------------------------------------------------- codecs as one option


def registry() -> ConstructorRegistry:
    """Lets an option name a codec: ``pixels``, ``autoencoder_kl:emoji-kl``, ``autoencoder_kl:org/name:vae``."""
    rules = ConstructorRegistry()

    @rules.primitive_rule
    def codec(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Codec.Config)):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME[:SOURCE[:SUBFOLDER]]",
            instance_from_str=lambda args: read_codec(args[0]),
            is_instance=lambda value: isinstance(value, Codec.Config),
            str_from_instance=lambda config: [codec_text(config)],
        )

    return rules


def codec_names() -> list[str]:
    """The modules of the folder ``modalities/codecs`` that define a codec."""
    from xfusion.modalities import codecs

    return _names_in(codecs, Codec)


def _names_in(folder: ModuleType, kind: type) -> list[str]:
    """The modules of a package that define a class of a kind."""
    import pkgutil

    names = sorted(m.name for m in pkgutil.iter_modules(folder.__path__))
    return [name for name in names if _class_in(folder, name, kind) is not None]


def _class_in(folder: ModuleType, name: str, kind: type) -> Any:
    module = importlib.import_module(f"{folder.__name__}.{name}")
    classes = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)
    return next((candidate for candidate in classes if issubclass(candidate, kind)), None)


def read_encoder(text: str) -> Encoder.Config:
    """Parse ``NAME[:SOURCE[:REVISION]]``; NAME is a picture encoder's module in the folder ``modalities/encoders``."""
    from xfusion.modalities import encoders

    name, *values = text.split(":")
    names = _names_in(encoders, Encoder)
    if name not in names:
        raise ValueError(f"encoder {name!r} is not one of {', '.join(names)}")
    kind: Any = _class_in(encoders, name, Encoder)
    field_names = {f.name for f in dataclasses.fields(kind.Config)}
    fields = [field for field in ("source", "revision") if field in field_names]
    if len(values) > len(fields):
        raise ValueError(f"encoder {text!r}: {name} takes at most {':'.join([name, *fields])}")
    return kind.Config(**dict(zip(fields, values, strict=False)))


def read_codec(text: str) -> Codec.Config:
    """Parse ``NAME[:FIELD...]``, with the fields in the order of the codec's configuration."""
    name, *values = text.split(":")
    if name not in codec_names():
        raise ValueError(f"codec {name!r} is not one of {', '.join(codec_names())}")
    from xfusion.modalities import codecs

    kind: Any = _class_in(codecs, name, Codec)
    fields = [f.name for f in dataclasses.fields(kind.Config)]
    if len(values) > len(fields):
        raise ValueError(f"codec {name} takes at most {':'.join([name, *fields])}")
    try:
        return kind.Config(**dict(zip(fields, values, strict=False)))
    except TypeError as error:
        raise ValueError(f"codec {name} needs more: {':'.join([name, *fields])}") from error


def codec_text(config: Codec.Config) -> str:
    """The inverse of `read_codec`."""
    values = [getattr(config, f.name) for f in dataclasses.fields(config)]
    while values and (values[-1] is None or values[-1] == ""):
        values.pop()
    return ":".join([type(config).__module__.rpartition(".")[2], *("" if v is None else str(v) for v in values)])

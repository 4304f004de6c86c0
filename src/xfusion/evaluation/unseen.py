"""Held-out examples of a suite, and the check that none of them was trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, open_source


def trained_on(config: Mapping[str, Any]) -> str | None:
    """Spec of a pack's training data, as recorded in its config; None if it is not."""
    for facts in (config.get("training"), config.get("recipe")):
        if isinstance(facts, Mapping) and isinstance(facts.get("data"), str):
            return facts["data"]
    return None


def held_split(source: Source) -> Source | None:
    """The held-out split of the same spec; None if all of it is used for training."""
    try:
        return open_source(source.spec, split="held")
    except XFusionError:
        return None


def held_out(held: Source | str | None, trained: Source) -> Source | None:
    """The held-out examples for a source.

    Args:
        held: an opened source, or a spec, whose held-out split is used, or all of it if it has none; None uses the held-out
            split of the source's own spec.
        trained: the training source.

    Returns:
        the held-out examples; None if ``held`` is None and all of the source is used for training.

    Raises:
        XFusionError: they cannot be opened, or some of them were trained on.
    """
    if held is None:
        held = held_split(trained)
    elif isinstance(held, str):
        try:
            held = open_source(held, split="held")
        except XFusionError:
            held = open_source(held, split="all")
    if held is not None:
        refuse_trained(held, [trained])
    return held


def refuse_trained(held: Source, trained: Iterable[Source]) -> None:
    """Refuse held-out examples whose groups were trained on.

    Raises:
        XFusionError: there are such examples.
    """
    for source in trained:
        groups = {example.group for example in source.examples}
        leaked = [example.origin for example in held.examples if example.group in groups]
        if leaked:
            raise XFusionError(
                f"{held.spec}: {len(leaked)} of {len(held.examples)} held-out examples are trained on in {source.spec}, such as"
                f" {leaked[0]}: name others, or train anew on data that hold them out"
            )


def check_settings(
    settings: Mapping[str, Any], setting_names: Collection[str], recorded: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a suite that scores trained and held-out examples, for a model whose training data are recorded.

    Args:
        settings: as given by the user; the default ``source`` is the recorded data.
        setting_names: names of the suite's settings; a suite without held-out data is left alone.
        recorded: specs of the training data.

    Returns:
        the settings with opened sources, and facts to record about them.

    Raises:
        XFusionError: held-out examples were trained on; or there is no ``source``, and the recorded data are several or cannot
            be opened.
    """
    specs, source = list(dict.fromkeys(recorded)), settings.get("source")
    if not {"source", "held"} <= set(setting_names) or not specs:
        return dict(settings), {}
    if source is None and len(specs) > 1:
        raise XFusionError(f"these packs were trained on {' and '.join(specs)}: name one of them as source")
    trained, errors = [], []
    for spec in specs:
        try:  # leave out what training left out; pictures that are not used need no decoding
            trained.append(open_source(spec, allow_bad=0.99, decode=source is None))
        except XFusionError as error:
            errors.append(str(error))
    if source is None and errors:
        raise XFusionError(f"{errors[0]}; the pack was trained on {specs[0]}: name that as source, where it stands now")
    if source is None:
        source = trained[0]
    elif isinstance(source, str):
        source = open_source(source, split="train")
    held = held_out(settings.get("held"), source)
    if held is not None:
        refuse_trained(held, trained)
    facts = {"trained_on": " and ".join(specs)}
    if errors:
        facts["trained_on"] += f", where nobody could look for what is held out: {errors[0]}"
    return {**settings, "source": source} | ({} if held is None else {"held": held}), facts

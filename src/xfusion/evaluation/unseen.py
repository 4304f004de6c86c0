"""Held-out examples of a suite, and the check that none of them was trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xfusion.card import training_runs
from xfusion.checkpoint import has_recorded_weights
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, open_source
from xfusion.together import Together

NOT_RECORDED = "not recorded: nobody could look for what is held out"
"""What a result says of a model without a record of its training data."""


@dataclass(frozen=True)
class TrainingData:
    """Data that a model was trained on."""

    spec: str | None
    """Spec of the data; None for a run whose data are not recorded."""
    latest: bool = field(default=True, compare=False)
    """Whether they are of a pack's last run: then they are the default source of a suite."""


def recorded_data(facts: Mapping[str, Any]) -> list[TrainingData]:
    """The data of all training runs behind a pack, the first run first, as recorded in its config."""
    runs = training_runs(facts)
    specs = (run["data"] if isinstance(run.get("data"), str) else None for run in runs)
    return [TrainingData(spec, latest=number == len(runs)) for number, spec in enumerate(specs, start=1)]


def data_of(model: Any) -> list[TrainingData]:
    """The data that a model was trained on, as the record that it carries says; of several packs together, those of all.

    A model without a record, such as a fresh one, or one whose weights have changed since, has a run of unknown data.
    """
    packs: Iterable[Any] = model.members.values() if isinstance(model, Together) else [model]
    return [data for pack in packs for data in _data_of_pack(pack)]


def _data_of_pack(model: Any) -> list[TrainingData]:
    record = getattr(model, "recorded", None)
    known = [] if record is None else recorded_data(record.facts)
    return known if record is not None and has_recorded_weights(model) else [*known, TrainingData(None, latest=False)]


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
        known = [example.origin for example in held.examples if example.group in groups]
        if known:
            raise XFusionError(
                f"{held.spec}: {len(known)} of {len(held.examples)} held-out examples are trained on in {source.spec}, such as"
                f" {known[0]}: name others, or train anew on data that hold them out"
            )


def checked(
    settings: Mapping[str, Any], takes: Collection[str], trained: Sequence[TrainingData]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a suite that scores trained and held-out examples, for a model whose training data are recorded.

    Args:
        settings: as given by the user; the default ``source`` is the recorded data of the last run.
        takes: names of the suite's settings; a suite without held-out data is left alone.
        trained: the training data, of all runs.

    Returns:
        the settings with opened sources, and facts to record about them.

    Raises:
        XFusionError: held-out examples were trained on; or there is no ``source``, and the recorded data are several or cannot
            be opened.
    """
    source, known = settings.get("source"), list(dict.fromkeys(data for data in trained if data.spec is not None))
    if not {"source", "held"} <= set(takes):
        return dict(settings), {}
    if not known:
        return dict(settings), {"trained_on": NOT_RECORDED}
    latest = list(dict.fromkeys(data.spec for data in trained if data.latest and data.spec is not None))
    if source is None and len(latest) > 1:
        raise XFusionError(f"these packs were trained on {' and '.join(latest)}: name one of them as source")
    if source is None and not latest:
        raise XFusionError(
            f"the pack was first trained on {known[0].spec}, but the data of its last run are not recorded: name a source"
        )
    opened, lost = dict[str, Source](), list[str]()
    for data in known:
        try:  # leave out what training left out; pictures that are not used need no decoding
            decode = source is None and data.spec in latest
            opened[str(data.spec)] = open_source(str(data.spec), allow_bad=0.99, decode=decode)
        except XFusionError as error:
            lost.append(str(error))
            if source is None and data.spec in latest:
                message = f"{error}; the pack was trained on {data.spec}: name that as source, where it stands now"
                raise XFusionError(message) from error
    if source is None:
        source = opened[latest[0]]
    elif isinstance(source, str):
        source = open_source(source, split="train")
    held = held_out(settings.get("held"), source)
    if held is not None:
        refuse_trained(held, opened.values())
    noted = " and ".join(str(data.spec) for data in known)
    if lost:
        noted += f", where nobody could look for what is held out: {'; '.join(lost)}"
    if any(data.spec is None for data in trained):
        noted += "; and on further data that nobody recorded"
    return {**settings, "source": source} | ({} if held is None else {"held": held}), {"trained_on": noted}

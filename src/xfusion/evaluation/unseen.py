"""Held-out examples of a suite, and the check that none of them was trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xfusion.card import training_runs
from xfusion.checkpoint import has_recorded_weights
from xfusion.composition import Together
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, content_fingerprint, open_source

NOT_RECORDED = "not recorded: nobody could look for what is held out"
"""What a result says of a model without a record of its training data."""


@dataclass(frozen=True)
class TrainingData:
    """Data that a model was trained on."""

    spec: str | None
    """Spec of the data; None for a run whose data are not recorded. A pack has it without the folders of the machine that it
    was trained on, so other data may have the same spec."""
    fingerprint: str | None = None
    """`xfusion.data.sources.content_fingerprint` of the data, which tells them from others; None if it is not recorded."""
    from_pack: bool = field(default=False, compare=False, kw_only=True)
    """Whether the spec was read from a pack, so that without a fingerprint only its name is known."""
    latest: bool = field(default=True, compare=False, kw_only=True)
    """Whether they are of a pack's last run: then they are the default source of a suite."""


def recorded_data(facts: Mapping[str, Any]) -> list[TrainingData]:
    """The data of all training runs behind a pack, the first run first, as recorded in its config."""
    runs, data = training_runs(facts), list[TrainingData]()
    for number, run in enumerate(runs, start=1):
        spec, fingerprint = (
            run[key] if isinstance(run.get(key), str) else None for key in ("data", "data_fingerprint")
        )
        data.append(TrainingData(spec, fingerprint, from_pack=spec is not None, latest=number == len(runs)))
    return data


def data_of(model: Any) -> list[TrainingData]:
    """The data that a model was trained on, as the record that it carries says; of several packs together, those of all.

    A model without a record, such as a fresh one, or one whose weights have changed since, has a run of unknown data.
    """
    packs: Iterable[Any] = model.members.values() if isinstance(model, Together) else [model]
    return [data for pack in packs for data in _data_of_pack(pack)]


def _data_of_pack(model: Any) -> list[TrainingData]:
    record = getattr(model, "recorded", None)
    recorded = [] if record is None else recorded_data(record.facts)
    is_complete = record is not None and has_recorded_weights(model)
    return recorded if is_complete else [*recorded, TrainingData(None, latest=False)]


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


def refuse_trained(held: Source, trained: Iterable[Source], *, doubt: str = "") -> None:
    """Refuse held-out examples whose groups were trained on.

    Args:
        held: the held-out examples.
        trained: the training data.
        doubt: why the training data may have been others of the same name; empty if it is certain that they are these.

    Raises:
        XFusionError: there are such examples.
    """
    for source in trained:
        groups = {example.group for example in source.examples}
        leaked = [example.origin for example in held.examples if example.group in groups]
        if leaked:
            where = f"may be trained on in {source.spec} ({doubt})" if doubt else f"are trained on in {source.spec}"
            remedy = "name the data of the training as source" if doubt else "train anew on data that hold them out"
            raise XFusionError(
                f"{held.spec}: {len(leaked)} of {len(held.examples)} held-out examples {where}, such as {leaked[0]}: name others,"
                f" or {remedy}"
            )


def check_settings(
    settings: Mapping[str, Any],
    setting_names: Collection[str],
    trained: Sequence[TrainingData],
    special_tokens: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a suite that scores trained and held-out examples, for a model whose training data are recorded.

    Args:
        settings: as given by the user; the default ``source`` is the recorded data of the last run.
        setting_names: names of the suite's settings; a suite without held-out data is left alone.
        trained: the training data, of all runs.
        special_tokens: as for `open_source`.

    Returns:
        the settings with opened sources, and facts to record about them.

    Raises:
        XFusionError: held-out examples were trained on; or there is no ``source``, and the recorded data are several, cannot be
            opened, or are others here.
    """
    if not {"source", "held"} <= set(setting_names):
        return dict(settings), {}
    recorded = list(dict.fromkeys(data for data in trained if data.spec is not None))
    if not recorded:
        return dict(settings), {"trained_on": NOT_RECORDED}
    source: Any = settings.get("source")
    latest = list(dict.fromkeys(data for data in trained if data.spec is not None and data.latest))
    if source is None and len(latest) > 1:
        specs = " and ".join(str(data.spec) for data in latest)
        raise XFusionError(f"these packs were trained on {specs}: name one of them as source")
    if source is None and not latest:
        raise XFusionError(
            f"the pack was first trained on {recorded[0].spec}, but the data of its last run are not recorded: name a source"
        )
    if isinstance(source, str):
        source = open_source(source, split="train")
    source_fingerprint = None if source is None else content_fingerprint(source)
    trained_sources, errors, doubts = list[tuple[Source, str]](), list[str](), list[str]()
    for data in recorded:
        if data.fingerprint is not None and data.fingerprint == source_fingerprint:
            continue  # the named source is this data, wherever it is now
        is_source = source is None and data in latest
        try:
            trained_source, doubt = _open(data, decode=is_source, special_tokens=special_tokens)
        except XFusionError as error:
            if is_source:
                raise XFusionError(
                    f"{error}; the pack was trained on {data.spec}: name that as source, where it stands now"
                ) from error
            errors.append(str(error))
            continue
        if is_source and doubt and data.fingerprint is not None:
            raise XFusionError(
                f"{data.spec} is not what the pack was trained on: {doubt}; name the data of its training as source, where they"
                " stand now"
            )
        source = trained_source if is_source else source
        trained_sources.append((trained_source, doubt))
        doubts += [f"{data.spec}: {doubt}"] if doubt else []
    assert source is not None  # without one, the latest data are it
    held = held_out(settings.get("held"), source)
    if held is not None:
        for trained_source, doubt in trained_sources:
            refuse_trained(held, [trained_source], doubt=doubt)
    trained_on = " and ".join(dict.fromkeys(str(data.spec) for data in recorded))
    if errors:
        trained_on += f", where nobody could look for what is held out: {'; '.join(errors)}"
    if doubts:
        trained_on += f"; perhaps other data of that name: {'; '.join(doubts)}"
    if any(data.spec is None for data in trained):
        trained_on += "; and on further data that nobody recorded"
    return {**settings, "source": source} | ({} if held is None else {"held": held}), {"trained_on": trained_on}


def _open(data: TrainingData, *, decode: bool, special_tokens: tuple[str, ...]) -> tuple[Source, str]:
    """The source that the spec of training data names here, and why it may be another one; empty if it is certainly not.

    Pictures that are not used need no decoding, unless the content differs: training left out those that it could not decode.

    Raises:
        XFusionError: it cannot be opened.
    """

    def open_trained(*, decode: bool) -> Source:
        """What training left out is left out."""
        return open_source(str(data.spec), allow_bad=0.99, decode=decode, special_tokens=special_tokens)

    source = open_trained(decode=decode)
    if data.fingerprint is None:
        return source, "the pack records its name alone" if data.from_pack else ""
    if not decode and content_fingerprint(source) != data.fingerprint:
        source = open_trained(decode=True)
    content = content_fingerprint(source)
    is_same = content == data.fingerprint
    return source, "" if is_same else f"its content is {content[:16]}, the pack recorded {data.fingerprint[:16]}"

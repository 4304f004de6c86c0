"""Adapter for LMMs-Lab's lmms-eval: its tasks on a pack that reads pictures or sounds.

The harness finds the class by an entry point of this package: ``lmms-eval --model xfusion --model_args pack=emoji --tasks mme``.
A question follows its pictures as in the chat and the server (`xfusion.generation.conversation`); a text-only request is
formatted with the base's own chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image as PILImage

from xfusion.data.sequence import Sound, XFusionError
from xfusion.generation import MediaInput, Segment, conversation, log_likelihoods
from xfusion.model import Model

MARK = "<image>"
"""Place of a picture in a task's text. If a text has no mark, all its pictures come before it."""


def manifest() -> Any:
    """The registration of this adapter, for the harness's entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest  # the harness calls this while it is being imported

    return ModelManifest(model_id="xfusion", simple_class_path=f"{__name__}.{PackMedia.__name__}")


@dataclass(frozen=True)
class _Settings:
    """The generation settings of a task that a pack supports."""

    max_tokens: int
    temperature: float
    top_p: float
    until: tuple[str, ...]
    """Stop sequences."""

    @classmethod
    def of(cls, generation_kwargs: dict[str, Any]) -> _Settings:
        """Read a task's ``generation_kwargs``.

        Raises:
            XFusionError: a setting that would change the answer is not supported.
        """
        # image_aspect_ratio has no effect: pictures are squares.
        options = {k: v for k, v in generation_kwargs.items() if v is not None and k != "image_aspect_ratio"}
        until, tokens = (
            options.pop("until", ()),
            options.pop("max_new_tokens", 1024),
        )  # the default of the harness's own models
        samples = options.pop("do_sample", options.get("temperature", 0) > 0)
        temperature, top_p = options.pop("temperature", 1.0), options.pop("top_p", 1.0)
        if options.pop("num_beams", 1) != 1 or options:
            name = next(iter(options), "num_beams")
            raise XFusionError(
                f"the task sets {name} to {generation_kwargs[name]}, which a pack does not know: --gen_kwargs overrides it"
            )
        stop_sequences = (until,) if isinstance(until, str) else tuple(until)
        return cls(
            int(tokens), float(temperature) if samples else 0.0, float(top_p), tuple(filter(None, stop_sequences))
        )

    def cut(self, text: str) -> str:
        """The text before its first stop sequence."""
        ends = [end for end in map(text.find, self.until) if end >= 0]
        return text[: min(ends, default=len(text))]


class PackMedia(lmms):
    """A pack as a model of the harness, by `Model.generate` and `log_likelihoods`."""

    def __init__(
        self,
        pack: str | Model,
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Load a pack.

        Args:
            pack: name of a pack, or a loaded model.
            device: device to load on; ignored for a loaded model.
            batch_size: requests per call of the model.
            max_batch_size: ignored; the harness passes it to models that choose their batch size.
            seed: if a task samples, answer i of a call uses the seed ``seed + i``.
        """
        super().__init__()
        if isinstance(pack, str):
            from xfusion.checkpoint import load

            pack = load(pack, device=device)
        del max_batch_size
        self.pack, self.batch, self.seed = pack, int(batch_size), int(seed)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Text answers, each cut before its first stop sequence."""
        answers: list[str] = []
        for settings, group in groupby(requests, key=lambda request: _Settings.of(request.args[1])):
            group_requests = list(group)
            for start in range(0, len(group_requests), self.batch):
                batch = group_requests[start : start + self.batch]
                answers += self._answers(
                    [self._segments(*_parts(request.args)) for request in batch], settings, len(answers)
                )
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each answer, and whether greedy decoding would start with it.

        An answer starts a turn or a line, so spaces that a task puts before it are removed.
        """
        results = []
        for words, answer, *document in (request.args for request in requests):
            text: Any = answer(self._document(*document[1:])) if callable(answer) else answer
            results += log_likelihoods(self.pack, self._segments(words, *document), [text.lstrip()])
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: multi-round tasks are not supported."""
        raise XFusionError("a pack answers tasks of one round; this one has several")

    def _answers(self, lists: list[list[Segment]], settings: _Settings, offset: int) -> list[str]:
        token_ids: list[list[int]] = [[] for _ in lists]

        def is_unfinished(row: int, token: int) -> bool:
            token_ids[row].append(token)
            text = self.pack.backbone.decode(token_ids[row]) if settings.until else ""
            return settings.cut(text) == text

        answers = self.pack.generate(
            lists,
            seeds=[self.seed + offset + i for i in range(len(lists))],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            listen=is_unfinished,
        )
        return [settings.cut(answer[-1]) for answer in answers]

    def _segments(self, words: str, to_visual: Callable[[Any], Any] | None = None, *document: Any) -> list[Segment]:
        """The conversation of a request: its pictures or sounds, and its text."""
        media = (
            []
            if to_visual is None
            else [_to_media(visual) for visual in _flatten(to_visual(self._document(*document)))]
        )
        if media and "caption" not in self.pack.capabilities:
            raise XFusionError(f"this pack cannot answer questions: it can {', '.join(sorted(self.pack.capabilities))}")
        first_part, *other_parts = words.split(MARK) if media else (words,)
        if len(other_parts) not in (0, len(media)):
            raise XFusionError(
                f"the question names {len(other_parts)} pictures by {MARK}, but the document has {len(media)}"
            )
        content = (
            [first_part, *(part for pair in zip(media, other_parts, strict=True) for part in pair)]
            if other_parts
            else [*media, words]
        )
        return conversation(self.pack, [{"role": "user", "content": [part for part in content if part != ""]}])

    def _document(self, index: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][index]


def _parts(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a generation request without its settings: the text, the function for its media, and the document."""
    return (arguments[0], *arguments[2:])


def _flatten(visuals: Any) -> Iterator[Any]:
    """The pictures and sounds of a document, from nested lists; None stands for nothing."""
    if isinstance(visuals, (list, tuple)):
        for visual in visuals:
            yield from _flatten(visual)
    elif visuals is not None:
        yield visuals


def _to_media(visual: Any) -> MediaInput:
    """A picture or sound of the harness as input of a model."""
    if isinstance(visual, PILImage.Image):
        return visual
    if isinstance(visual, dict) and {"array", "sampling_rate"} <= set(visual):
        return Sound(samples=torch.as_tensor(visual["array"]).float(), rate=int(visual["sampling_rate"]))
    raise XFusionError(
        f"the task shows a {type(visual).__name__} ({str(visual)[:80]}): a pack takes pictures and sounds"
    )

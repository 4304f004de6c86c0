"""LMMs-Lab's lmms-eval: a pack that reads pictures, or hears, under its tasks.

From its own command line, which finds the class by an entry point of this package: ``lmms-eval --model xfusion --model_args
pack=emoji --tasks mme``. A question stands behind its pictures as the chat and the server put it
(`xfusion.generation.conversation`), and words alone in the base's own chat template.
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
"""Where a picture stands among a task's words; without a mark all pictures stand before them."""


def manifest() -> Any:
    """What the entry point tells the harness."""
    from lmms_eval.models.registry_v2 import ModelManifest  # it asks for this while it is imported itself

    return ModelManifest(model_id="xfusion", simple_class_path=f"{__name__}.{PackMedia.__name__}")


@dataclass(frozen=True)
class _Settings:
    """A task's settings of generating, those that mean something here."""

    max_tokens: int
    temperature: float
    top_p: float
    until: tuple[str, ...]

    @classmethod
    def of(cls, given: dict[str, Any]) -> _Settings:
        """Read them.

        Raises:
            XFusionError: one that would change the answer is not known.
        """
        left = {k: v for k, v in given.items() if v is not None and k != "image_aspect_ratio"}  # pictures are squares
        until, tokens = left.pop("until", ()), left.pop("max_new_tokens", 1024)  # as the harness's own models
        samples = left.pop("do_sample", left.get("temperature", 0) > 0)
        temperature, top_p = left.pop("temperature", 1.0), left.pop("top_p", 1.0)
        if left.pop("num_beams", 1) != 1 or left:
            name = next(iter(left), "num_beams")
            raise XFusionError(
                f"the task sets {name} to {given[name]}, which a pack does not know: --gen_kwargs overrides it"
            )
        stops = (until,) if isinstance(until, str) else tuple(until)
        return cls(int(tokens), float(temperature) if samples else 0.0, float(top_p), tuple(filter(None, stops)))

    def cut(self, text: str) -> str:
        """A text up to its first stop sequence."""
        found = [place for place in map(text.find, self.until) if place >= 0]
        return text[: min(found, default=len(text))]


class PackMedia(lmms):
    """A pack as the harness's model, over `Model.generate` and `log_likelihoods`."""

    def __init__(
        self,
        pack: str | Model,
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """``pack`` is a name or a loaded model; answer i of a call has the seed ``seed + i``, where a task samples."""
        super().__init__()
        if isinstance(pack, str):
            from xfusion.checkpoint import load

            pack = load(pack, device=device)
        del max_batch_size  # for batches that the harness would find the size of
        self.pack, self.batch, self.seed = pack, int(batch_size), int(seed)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in words, each up to its first stop sequence."""
        out: list[str] = []
        for settings, group in groupby(requests, key=lambda request: _Settings.of(request.args[1])):
            members = list(group)
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                out += self._answers([self._given(*_parts(request.args)) for request in part], settings, len(out))
        return out

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods of answers, and whether each is the greedy one.

        An answer opens a turn or a line of its own, so that the space which a task puts before it is dropped.
        """
        out = []
        for words, answer, *where in (request.args for request in requests):
            text: Any = answer(self._document(*where[1:])) if callable(answer) else answer
            out += log_likelihoods(self.pack, self._given(words, *where), [text.lstrip()])
        return out

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: a pack is asked once per document."""
        raise XFusionError("a pack answers tasks of one round; this one has several")

    def _answers(self, lists: list[list[Segment]], settings: _Settings, number: int) -> list[str]:
        said: list[list[int]] = [[] for _ in lists]

        def goes_on(row: int, token: int) -> bool:
            said[row].append(token)
            text = self.pack.backbone.decode(said[row]) if settings.until else ""
            return settings.cut(text) == text

        answers = self.pack.generate(
            lists,
            seeds=[self.seed + number + i for i in range(len(lists))],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            listen=goes_on,
        )
        return [settings.cut(answer[-1]) for answer in answers]

    def _given(self, words: str, to_visual: Callable[[Any], Any] | None = None, *where: Any) -> list[Segment]:
        """The segments of a request: its pictures or sounds, and its words."""
        shown = [] if to_visual is None else [_shown(one) for one in _flat(to_visual(self._document(*where)))]
        if shown and "caption" not in self.pack.capabilities:
            raise XFusionError(f"this pack cannot answer questions: it can {', '.join(sorted(self.pack.capabilities))}")
        first, *rest = words.split(MARK) if shown else (words,)
        if len(rest) not in (0, len(shown)):
            raise XFusionError(f"the question names {len(rest)} pictures by {MARK}, but the document has {len(shown)}")
        content = (
            [first, *(part for pair in zip(shown, rest, strict=True) for part in pair)] if rest else [*shown, words]
        )
        return conversation(self.pack, [{"role": "user", "content": [part for part in content if part != ""]}])

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


def _parts(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a request to generate without the settings: words, pictures of a document, and which it is."""
    return (arguments[0], *arguments[2:])


def _flat(found: Any) -> Iterator[Any]:
    """What a task shows of a document, out of lists of lists; None is nothing."""
    if isinstance(found, (list, tuple)):
        for one in found:
            yield from _flat(one)
    elif found is not None:
        yield found


def _shown(one: Any) -> MediaInput:
    """A picture or a sound, as the harness's data sets give them."""
    if isinstance(one, PILImage.Image):
        return one
    if isinstance(one, dict) and {"array", "sampling_rate"} <= set(one):
        return Sound(samples=torch.as_tensor(one["array"]).float(), rate=int(one["sampling_rate"]))
    raise XFusionError(f"the task shows a {type(one).__name__} ({str(one)[:80]}): a pack takes pictures and sounds")

"""Drawing and naming on a set of named pictures: memorisation (``fit_``) and generalisation (``held_``).

It works on any `Source`; the built-in emoji are the default. ``fit_`` scores are on trained pictures and measure memory
only. ``held_`` scores are on pictures of groups that were never trained on; drawing has them only if held-out pictures
are asked for, as names of words that no training heard cannot be drawn. Scores come with ``chance_`` (a random
answer), ``ceiling_`` (the real picture through codec and resizing) or ``_blind`` (pictures permuted among the items).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from xfusion.data.sequence import Example, XFusionError
from xfusion.data.sources import Source, content_fingerprint, open_source
from xfusion.evaluation.abilities import refuse_unable
from xfusion.evaluation.metrics import captions, naming, retrieval
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.metrics.psnr import not_white, psnr
from xfusion.evaluation.teachers import is_teacher
from xfusion.evaluation.unseen import held_out
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite

VALIDATION_SHARE = 0.2
"""Share of groups for choosing settings, if a suite is run in two parts."""
LOSSLESS_DB = 100.0
"""Value of the PSNR metrics if nothing is lost (the ratio is infinite, which JSON cannot represent)."""
MAY_BE_ZERO = {"max_held", "max_held_drawn"}

Part = Literal["all", "validation", "test"]


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: Source | str = "emoji",
    held: Source | str | None = None,
    size: int | None = None,
    gallery_size: int | None = None,
    seed: int = 0,
    steps: int = 25,
    guidance: float | None = None,
    max_drawn: int | None = None,
    max_captioned: int | None = None,
    max_held: int | None = 100,
    max_held_drawn: int = 0,
    part: Part = "all",
    candidates: Literal["held", "all"] = "held",
    features: bool = True,
    encoder: Any = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Scores of one model.

    Args:
        model: draws, captions, embeds or matches; what it cannot do is left out of the result. A model that only embeds names
            a held-out picture by the nearest name, one that only matches by the likeliest. If it does several, the ranks by
            cosine are ``held_embed_`` and those by the matching head ``held_match_``, in addition to ``held_caption_``.
        progress: see `evaluate`.
        source: the trained pictures, a `Source` or a spec such as "emoji:128".
        held: held-out pictures, likewise, none of them trained on; None uses the held-out split of the same spec, if any.
        size: side in pixels of drawn and input pictures; None uses the first that the model was trained at.
        gallery_size: side at which drawn and real pictures are compared; None uses `size`.
        seed: picture number i of the source is drawn with the seed ``seed + i``.
        steps: Euler steps.
        guidance: strength of classifier-free guidance; None uses the model's own.
        max_drawn: draw at most this many concepts (always the same ones); the gallery stays whole.
        max_captioned: caption at most this many trained pictures (always the same ones).
        max_held: name at most this many held-out pictures (always the same ones); their names are the candidates.
        max_held_drawn: draw at most this many held-out pictures from their names (always the same ones), such as trained
            things in trained colours that were never trained together; found among trained and held-out pictures.
        part: draw, caption and name only the groups of one part, "validation" (a fifth, to choose settings by) or "test"
            (the rest); the gallery stays whole. No group is in both.
        candidates: "held", or "all" to add the names of the trained pictures.
        features: False if the encoder was used in training or ranking: it must not score what it taught.
        encoder: picture encoder; None uses EfficientNet-Lite0.
        batch_size: pictures per call of the model.

    Raises:
        XFusionError: the model neither draws nor names, the source is empty, or the encoder is not installed.
    """
    refuse_unable(model, {"draw", "caption", "embed", "match"}, "scores drawing and naming")
    if candidates not in ("held", "all"):
        raise XFusionError(f"candidates is {candidates!r}: use 'held' or 'all'")
    source = open_source(source, split="train") if isinstance(source, str) else source
    if not len(source.examples):
        raise XFusionError(f"{source.spec}: there are no trained pictures to score")
    if not choose_examples(source.examples, part=part):
        raise XFusionError(f"{source.spec}: none of {len(source.examples)} pictures falls into the part {part!r}")
    subject = Subject(model=model, size=size or model.image.sizes[0], batch_size=batch_size, progress=progress)
    draws, names = "draw" in model.capabilities, bool(subject.methods)
    held_set = held_out(held, source) if names or (draws and max_held_drawn) else None
    settings: dict[str, Any] = {"data": source.spec, "data_fingerprint": content_fingerprint(source)}
    settings |= {"size": subject.size, "part": part}
    metrics: dict[str, Any] = {"num_concepts": len(source.examples)}

    if draws:
        if max_held_drawn and held_set is None:
            raise XFusionError(f"max_held_drawn {max_held_drawn}: {source.spec} holds nothing out; name held pictures")
        encoder, encoder_settings = _scorer(model, encoder) if features else (None, {"encoder": None})
        side = gallery_size or subject.size
        drawing = {"seed": seed, "steps": steps, "guidance": model.guidance if guidance is None else guidance}
        drawn = choose_examples(source.examples, max_drawn, part)
        settings |= {"gallery_size": side, **drawing, "num_drawn": len(drawn), **encoder_settings}
        held_drawn: list[int] = []
        if max_held_drawn and held_set is not None:
            held_drawn = choose_examples(held_set.examples, max_held_drawn, part)
            settings["num_held_drawn"] = len(held_drawn)
        metrics |= _drawing(subject, (source, drawn), (held_set, held_drawn), side, encoder, drawing)
    if "caption" in model.capabilities:
        captioned = choose_examples(source.examples, max_captioned, part)
        metrics |= _fit_captions(subject, source, captioned)
        settings["num_captioned"] = len(captioned)
    if names:
        named = choose_examples(held_set.examples, max_held, part) if held_set else []
        if held_set and named:
            metrics |= _held_names(subject, held_set, named, source.examples if candidates == "all" else ())
        settings |= {"held": held_set and held_set.spec, "num_held": len(named), "candidates": candidates}
        settings |= {"held_fingerprint": content_fingerprint(held_set)} if held_set else {}
    return {**metrics, "settings": settings}


def _scorer(model: Any, encoder: Any) -> tuple[Any, dict[str, Any]]:
    """The encoder of the feature metrics, by default EfficientNet-Lite0, and the settings that record it; None if the model was
    trained with it.
    """
    encoder = EfficientNetLite() if encoder is None else encoder
    encoder_id = getattr(encoder, "fingerprint", type(encoder).__name__)
    if not is_teacher(encoder_id, getattr(model, "teachers", ())):
        return encoder, {"encoder": encoder_id}
    reason = f"none: the encoder {encoder_id[:16]} took part in training, it may not score"
    return None, {"features": reason, "encoder": None}


def choose_examples(examples: Sequence[Example], limit: int | None = None, part: Part = "all") -> list[int]:
    """Indices, in order, of the `limit` examples with the lowest id hashes: always the same, of no kind in particular."""
    indices = [i for i, example in enumerate(examples) if part in ("all", part_of(example.group))]
    by_hash = sorted(indices, key=lambda i: hashlib.sha256(examples[i].id.encode()).digest())
    return sorted(by_hash[:limit])


def part_of(group: str) -> Literal["validation", "test"]:
    """The part of a group; it depends only on the name, so look-alikes stay together."""
    digest = hashlib.sha256(f"xfusion validation: {group}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64 else "test"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model under test, called in batches."""

    model: Any
    size: int
    """Side in pixels of what it draws and reads."""
    batch_size: int
    """Pictures per call."""
    progress: Callable[[str, int, int], None]
    """Told after every batch."""

    def draw(self, source: Source, indices: Sequence[int], **settings: Any) -> list[Image.Image]:
        """One picture per index, from its name; the seed is the index plus ``settings["seed"]``."""
        pictures, first_seed = [], settings.pop("seed")
        for batch in self.batches(indices, "draw"):
            prompts, seeds = [source.examples[i].captions[0] for i in batch], [first_seed + i for i in batch]
            pictures += self.model.draw(prompts, size=self.size, seeds=seeds, **settings)
        return pictures

    def caption(self, source: Source, indices: Sequence[int], title: str) -> list[str]:
        """The greedy answer to each picture."""
        answers = []
        for batch in self.batches(indices, title):
            answers += self.model.caption([source.picture(i, self.size) for i in batch])
        return answers

    @property
    def methods(self) -> tuple[str, ...]:
        """The ways in which the model scores names; the first one is its naming score."""
        return tuple(method for method in ("caption", "embed", "match") if method in self.model.capabilities)

    def score_names(self, source: Source, indices: Sequence[int], names: list[str], method: str) -> Tensor:
        """Scores [pictures, names] by one of `methods`: pointwise likelihoods, cosines, or how probably a pair matches."""
        if method == "match":
            scores = [
                self.model.match(source.picture(i, self.size), names)
                for batch in self.batches(indices, "match names", 1)
                for i in batch
            ]
            return torch.tensor(scores)
        if method == "embed":
            name_embeddings = self.model.embed(names).T.cpu()
            batches = self.batches(indices, "embed pictures")
            return torch.cat(
                [
                    self.model.embed([source.picture(i, self.size) for i in batch]).cpu() @ name_embeddings
                    for batch in batches
                ]
            )
        prior = self.model.score_names(None, names).float().cpu()
        # Every picture meets every name, so that few pictures make a large batch.
        batches = self.batches(indices, "score names", max(self.batch_size // 8, 1))
        likelihoods = [
            self.model.score_names([source.picture(i, self.size) for i in batch], names).cpu() for batch in batches
        ]
        return naming.pointwise(torch.cat(likelihoods).float(), prior)

    def features(self, encoder: Any, images: Tensor, title: str) -> Tensor:
        """Features [N, D] of images [N, 3, H, W]."""
        batches = self.batches(range(len(images)), title, 32)
        return torch.cat([encoder.features(images[batch[0] : batch[-1] + 1]).cpu() for batch in batches])

    def batches(self, items: Sequence[int], title: str, length: int | None = None) -> Iterator[Sequence[int]]:
        """Batches of `items`; progress is told before the first and after each."""
        length = length or self.batch_size
        self.progress(title, 0, len(items))
        for start in range(0, len(items), length):
            yield items[start : start + length]
            self.progress(title, min(start + length, len(items)), len(items))


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The real pictures among which a drawn one is to be nearest to its own."""

    real: Tensor
    """Images ``[G, 3, H, W]`` of the size that the model draws."""
    reconstructed: Tensor
    """The same through the codec."""
    views: dict[str, tuple[Tensor, Tensor]]
    """``pixel`` and ``feature`` -> the pictures as they are compared, and the best that the model could draw: through codec,
    256 levels and resizing, as users get them."""
    groups: list[str]
    """Group of every picture."""

    def joined(self, other: Gallery) -> Gallery:
        """The pictures of this gallery, then those of another one of the same sizes and views."""
        views = {
            kind: (torch.cat([real, other.views[kind][0]]), torch.cat([ceiling, other.views[kind][1]]))
            for kind, (real, ceiling) in self.views.items()
        }
        return Gallery(
            real=torch.cat([self.real, other.real]),
            reconstructed=torch.cat([self.reconstructed, other.reconstructed]),
            views=views,
            groups=self.groups + other.groups,
        )


def _gallery(subject: Subject, source: Source, side: int, encoder: Any) -> Gallery:
    """All pictures of a source; without an encoder there is no ``feature`` view."""
    image = subject.model.image

    def images(size: int) -> Tensor:
        return image.from_pil([source.picture(i, size) for i in range(len(source.examples))], size)

    real, gallery = images(subject.size), images(side)
    reconstructed = torch.cat([_through_codec(image, batch, subject.size) for batch in real.split(64)])
    ceiling_images = image.from_pil(image.to_pil(reconstructed), side)
    views = {"pixel": (gallery, ceiling_images)}
    if encoder is not None:
        gallery_features = subject.features(encoder, gallery, "features of real pictures")
        # A lossless codec needs no second evaluation.
        is_lossless = torch.equal(ceiling_images, gallery)
        ceiling_features = (
            gallery_features if is_lossless else subject.features(encoder, ceiling_images, "features of the ceiling")
        )
        views["feature"] = (gallery_features, ceiling_features)
    groups = [example.group for example in source.examples]
    return Gallery(real=real, reconstructed=reconstructed, views=views, groups=groups)


def _drawing(
    subject: Subject,
    trained: tuple[Source, list[int]],
    held: tuple[Source | None, list[int]],
    side: int,
    encoder: Any,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Scores of pictures drawn from the names of these trained and held-out examples, and of the codec on the trained ones.

    ``side`` is the size of the gallery, and ``settings`` those of `Subject.draw`.
    """
    source, indices = trained
    pictures = subject.draw(source, indices, **settings)
    gallery = _gallery(subject, source, side, encoder)
    metrics = _drawing_scores("fit", subject, gallery, indices, pictures, side, encoder) | _codec_scores(gallery)
    held_source, held_indices = held
    if held_source is not None and held_indices:  # few held-out groups may all be of the other part
        pictures = subject.draw(held_source, held_indices, **settings)
        gallery = gallery.joined(_gallery(subject, held_source, side, encoder))
        places = [len(source.examples) + i for i in held_indices]
        metrics |= _drawing_scores("held", subject, gallery, places, pictures, side, encoder)
    return metrics


def _codec_scores(gallery: Gallery) -> dict[str, float]:
    """What the codec loses, in decibels."""
    psnr_all, psnr_content = (
        psnr(gallery.reconstructed, gallery.real, mask) for mask in (None, not_white(gallery.real))
    )
    return {
        "codec_psnr_db": psnr_all.clamp(max=LOSSLESS_DB).mean().item(),
        "codec_psnr_not_white_db": psnr_content.nan_to_num(LOSSLESS_DB).clamp(max=LOSSLESS_DB).mean().item(),
    }


def _drawing_scores(
    name: str,
    subject: Subject,
    gallery: Gallery,
    places: Sequence[int],
    pictures: Sequence[Image.Image],
    side: int,
    encoder: Any,
) -> dict[str, float]:
    """Retrieval of drawn pictures, whose real ones have the indices ``places`` of the gallery, with chance and ceiling."""
    drawn, target, metrics = subject.model.image.from_pil(pictures, side), torch.tensor(places), {}
    chance_scores = retrieval.chance(target, gallery.groups)
    for kind, (real, ceiling) in gallery.views.items():
        distance: retrieval.Distance = "euclidean" if kind == "pixel" else "cosine"
        view = drawn if kind == "pixel" else subject.features(encoder, drawn, "features of drawn pictures")
        score, best = (
            retrieval.retrieval(v, real, target, gallery.groups, distance=distance) for v in (view, ceiling[target])
        )
        for key in score:
            metric = f"{name}_retrieval_{kind}_{key}"
            metrics |= {metric: score[key], f"chance_{metric}": chance_scores[key], f"ceiling_{metric}": best[key]}
    return metrics


def _through_codec(image: Any, images: Tensor, size: int) -> Tensor:
    return image.decode(image.encode(images.to(image.device), size), size).float().cpu()


def _fit_captions(subject: Subject, source: Source, scored: Sequence[int]) -> dict[str, float]:
    """Exact match and token F1 of the greedy answer to trained pictures, each beside its blind base rate."""
    answers = subject.caption(source, scored, "caption")
    return _answers("fit_caption", answers, captions.accepted([source.examples[i] for i in scored], source.examples))


def _held_names(
    subject: Subject, held: Source, scored: Sequence[int], more_examples: Sequence[Example]
) -> dict[str, float]:
    """Rank of the true name, and exact match and token F1 of the greedy answer, each beside its blind base rate.

    A model that does not caption has no answer. One that scores names in several ways has a rank by each, under their own names
    from the second on.
    """
    examples = [held.examples[i] for i in scored]
    names = list(dict.fromkeys(example.captions[0] for example in [*examples, *more_examples]))
    hit = naming.hits(examples, names, held.examples)
    metrics = {}
    for index, method in enumerate(subject.methods):
        scores = subject.score_names(held, scored, names, method)
        metrics |= naming.with_baselines(f"held_{method}_" if index else "held_caption_", scores, hit)
    if "caption" not in subject.model.capabilities:
        return metrics
    answers = subject.caption(held, scored, "caption held-out pictures")
    return metrics | _answers("held_caption", answers, captions.accepted(examples, held.examples))


def _answers(name: str, answers: Sequence[str], wordings: Sequence[Sequence[str]]) -> dict[str, float]:
    metrics = {}
    for kind, score in {"exact": captions.exact_match, "f1": captions.token_f1}.items():

        def permuted(order: Tensor, score: Callable[..., float] = score) -> float:
            return score([answers[i] for i in order.tolist()], wordings)

        metrics[f"{name}_{kind}"] = score(answers, wordings)
        metrics[f"{name}_{kind}_blind"] = blind(permuted, len(answers))
    return metrics

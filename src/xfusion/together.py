"""Several packs on one base, active in the same pass: each medium goes through the pack that it was given to.

    h_i = F(E)_i          where i is a word
    h_i = F_p(E)_i        where i belongs to a medium of pack p          F_p: what media of p go through at the layer

Each F_p makes keys and values of all positions, words and other packs' media too, and holds them in a slot of the cache of
its own; where F_p is the frozen layer, the decoder's slot is its own. So words stay the base's wherever no medium stands
before them, and a conversation with the media of one pack alone is that pack's. What a pack makes of another's media it never
learned: that is for the user to try.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import Sound, XFusionError
from xfusion.fusion.base import Call, Fusion, Pass
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.base import Modality
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.model import Model

Kind = TypeVar("Kind", bound=Modality)


class SideBySide(Fusion):
    """Mechanisms that send media through blocks of their own, and words through the frozen layers."""

    preserves_text = True
    prefix_is_constant = True

    def __init__(self, members: dict[str, Fusion], backbone: Backbone):
        """Installed mechanisms, by the name of the modality whose rows are theirs.

        Raises:
            XFusionError: one does more, or trains the base.
        """
        super().__init__(None)
        self.members = nn.ModuleDict(members)
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]
        slot, self.slots = 0, dict[str, int]()
        for owner, member in members.items():
            if not member.preserves_text:
                raise XFusionError(
                    f"{type(member).__name__} changes the base, on which the other packs stand: leave it out"
                )
            for index, frozen in enumerate(backbone.layers):
                member.media_block(index, frozen)
            slot += member.num_towers - 1
            self.slots[owner] = slot if member.num_towers > 1 else 0
        self.num_towers = slot + 1

    def member(self, owner: str) -> Fusion:
        """Whose rows these are."""
        return self.members[owner]  # type: ignore[return-value]

    @property
    def state_layers(self) -> tuple[int, ...]:
        """All that any of them names."""
        return tuple(sorted({index for owner in self.slots for index in self.layers_of(owner)}))

    def layers_of(self, owner: str) -> tuple[int, ...]:
        """As the modality's own mechanism says."""
        return self.member(owner).state_layers

    def set_attention(self, implementation: str) -> None:
        """Of all copied blocks."""
        for owner in self.slots:
            self.member(owner).set_attention(implementation)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: each block computes the rows of its own media, and keys and values of all rows for its slot."""
        new = run.states | self.tower(0, index, frozen, {"text", *self._on(0)}, call, run)
        for owner, slot in self.slots.items():
            block = self.member(owner).media_block(index, frozen) if slot else None
            if block is not None:
                new |= self.tower(slot, index, block, {owner}, call, run)
        return new

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Every block on the whole sequence, of which each position keeps its own's."""
        blocks = {owner: self.member(owner).media_block(index, frozen) for owner in self.slots} | {"text": frozen}
        return {
            owner: x if blocks[owner] is None else self.whole(index, blocks[owner], call, run)[owner]
            for owner, x in run.states.items()
        }

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The frozen one: what media's blocks make of words, words do not read."""
        del index
        return frozen(x, **call)

    def _on(self, slot: int) -> set[str]:
        return {owner for owner, own in self.slots.items() if own == slot}


class Together(Model):
    """Packs beside each other, made by `together`: a model to talk with, which is neither trained nor saved."""

    def __init__(self, members: dict[str, Model]):
        nn.Module.__init__(self)
        first = next(iter(members.values()))
        self.__dict__["backbone"] = first.backbone
        self.members = nn.ModuleDict(members)
        self.known = {owner: _named(model.modality, owner) for owner, model in members.items()}
        making = [owner for owner, model in members.items() if "draw" in model.capabilities]
        pictures = [owner for owner in making if isinstance(self.known[owner], ImageModality)]
        artist = next(iter([*pictures, *making, *members]))
        drawn = members[artist]
        self.modality, self.port = self.known[artist], drawn.port
        self.text_objective, self.media_objective = drawn.text_objective, drawn.media_objective
        self.opening, self.extra, self.needs = drawn.opening, nn.ModuleList(), frozenset()
        self._pass, self.gather, self._drawing = None, None, None
        self.fusion = SideBySide({owner: m.fusion for owner, m in members.items()}, first.backbone)
        self.use(self.plain_engine())

    @property
    def config(self) -> Any:  # type: ignore[override]
        """There is none.

        Raises:
            XFusionError: always.
        """
        raise XFusionError(
            f"{len(self.members)} packs together have no recipe, weights or base of their own: name one of them"
        )

    def model(self, owner: str) -> Model:
        """The pack whose media these are."""
        return self.members[owner]  # type: ignore[return-value]

    @property
    def capabilities(self) -> set[str]:
        """What any of them can do in a conversation, of {"text", "caption", "draw"}."""
        return {"text"}.union(*(self.model(owner).capabilities & {"caption", "draw"} for owner in self.known))

    @property
    def image(self) -> ImageModality:
        """Of the pack that draws, or of the first that sees."""
        found = self.modality if isinstance(self.modality, ImageModality) else self._first(ImageModality)
        return super().image if found is None else found

    @property
    def audio(self) -> AudioModality:
        """Of the first pack that says what sounds are, or else of the first that hears."""
        return self._first(AudioModality) or super().audio

    def reads(self, shown: Any) -> Modality:
        """Of the first pack of its kind that says what media are, or else of the first of its kind.

        Raises:
            XFusionError: no pack is of its kind.
        """
        found = self._first(AudioModality if isinstance(shown, Sound) else ImageModality)
        if found is None:
            what = "hears sounds" if isinstance(shown, Sound) else "sees pictures"
            raise XFusionError(f"none of these packs {what}: add one that does")
        return found

    def _first(self, kind: type[Kind]) -> Kind | None:
        able = {owner: modality for owner, modality in self.known.items() if isinstance(modality, kind)}
        best = [owner for owner in able if "caption" in self.model(owner).capabilities]
        return able[next(iter([*best, *able]))] if able else None

    def port_of(self, owner: str) -> MediaPort:
        """Its pack's."""
        return self.model(owner).port

    @property
    def teachers(self) -> frozenset[str]:
        """Of all packs."""
        return frozenset().union(*(self.model(owner).teachers for owner in self.known))

    @property
    def _learned(self) -> dict[str, nn.Module]:
        """Of all packs."""
        return {f"{owner}.{name}": part for owner in self.known for name, part in self.model(owner)._learned.items()}


def together(*models: Model) -> Model:
    """Packs on one loaded base as one model, whose conversations may hold the media of all of them.

    A picture that is shown is read by the first pack that names pictures, a sound by the first that names sounds. The first pack
    that draws pictures draws, and where none does the first that makes sounds makes them; what was drawn stands among what
    follows as its own.

    Args:
        models: packs whose media go through the frozen layers (`prefix`) or through blocks of their own (`dual tower`).

    Raises:
        XFusionError: they do not share one loaded base, or one of them changes what words go through.
    """
    bases = {id(model.backbone): model.backbone for model in models}
    if len({base.fingerprint for base in bases.values()}) != 1:
        sources = ", ".join(base.source for base in bases.values())
        raise XFusionError(
            f"{len(models)} packs stand on several bases ({sources}): only packs of one base stand together"
        )
    if len(bases) != 1:
        raise XFusionError(
            f"{len(models)} packs stand on {len(bases)} loaded bases: load one, and the others with"
            " xfusion.load(pack, backbone=first.backbone)"
        )
    if len(models) == 1:
        return models[0]
    if any(model.port.modulates_blocks for model in models):
        raise XFusionError(
            "the noise level of one of these packs acts inside blocks (adaln): it stands beside no other"
        )
    members: dict[str, Model] = {}
    for model in models:
        name = model.modality.name
        members[name if name not in members else f"{name} {len(members) + 1}"] = model
    return Together(members).eval()


def _named(modality: Modality, owner: str) -> Modality:
    """The same modality, whose segments go by another name."""
    other = copy.copy(modality)
    other.name = owner
    return other

"""Several packs on one base, active in the same pass: each media item goes through the pack that owns it.

    h_i = F(E)_i          if i is a text position
    h_i = F_p(E)_i        if i is a position of media of pack p          F_p: the block that media of p go through

Each F_p computes keys and values of all positions, including text and the media of other packs, and stores them in its own
slot of the KV cache. If F_p is the frozen layer, it uses the decoder's slot. So text equals the base's as long as no media
come before it, and a conversation with media of only one pack equals that pack's own. No pack was trained on the media of
another: how well they combine is for the user to try.

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
    """Combines mechanisms that send media through blocks of their own, and text through the frozen layers."""

    preserves_text = True
    prefix_is_constant = True

    def __init__(self, members: dict[str, Fusion], backbone: Backbone):
        """``members`` are installed mechanisms, by the name of the modality whose rows they compute.

        Raises:
            XFusionError: one of them does more, or trains the base.
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
        self.reads_ahead = any(member.reads_ahead for member in members.values())

    def member(self, owner: str) -> Fusion:
        """The mechanism that computes the rows of ``owner``."""
        return self.members[owner]  # type: ignore[return-value]

    @property
    def state_layers(self) -> tuple[int, ...]:
        """All layers that any member names."""
        return tuple(sorted({index for owner in self.slots for index in self.layers_of(owner)}))

    def layers_of(self, owner: str) -> tuple[int, ...]:
        """The layers of the modality's own mechanism."""
        return self.member(owner).state_layers

    def set_attention(self, implementation: str) -> None:
        """Set the attention implementation of all copied blocks."""
        for owner in self.slots:
            self.member(owner).set_attention(implementation)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: each block computes the rows of its own media, and the keys and values of all rows for its slot."""
        new_states = run.states | self.tower(0, index, frozen, {"text", *self._owners_in_slot(0)}, call, run)
        for owner, slot in self.slots.items():
            block = self.member(owner).media_block(index, frozen) if slot else None
            if block is not None:
                new_states |= self.tower(slot, index, block, {owner}, call, run)
        return new_states

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Reference path: run every block on the whole sequence; each position keeps the output of its own block."""
        blocks = {owner: self.member(owner).media_block(index, frozen) for owner in self.slots} | {"text": frozen}
        return {
            owner: x if blocks[owner] is None else self.whole(index, blocks[owner], call, run)[owner]
            for owner, x in run.states.items()
        }

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The frozen layer: text never reads what the media blocks compute from text."""
        del index
        return frozen(x, **call)

    def _owners_in_slot(self, slot: int) -> set[str]:
        return {owner for owner, owner_slot in self.slots.items() if owner_slot == slot}


class Together(Model):
    """Several packs as one model for inference, built by `together`; it can be neither trained nor saved."""

    def __init__(self, members: dict[str, Model]):
        nn.Module.__init__(self)
        first = next(iter(members.values()))
        self.__dict__["backbone"] = first.backbone
        self.members = nn.ModuleDict(members)
        self.modalities = {owner: _renamed_copy(model.modality, owner) for owner, model in members.items()}
        drawing_owners = [owner for owner, model in members.items() if "draw" in model.capabilities]
        picture_owners = [owner for owner in drawing_owners if isinstance(self.modalities[owner], ImageModality)]
        drawing_owner = next(iter([*picture_owners, *drawing_owners, *members]))
        drawing_model = members[drawing_owner]
        self.modality, self.port = self.modalities[drawing_owner], drawing_model.port
        self.text_objective, self.media_objective = drawing_model.text_objective, drawing_model.media_objective
        self.opening, self.extra, self.needs = drawing_model.opening, nn.ModuleList(), frozenset()
        self._pass, self.gather, self._drawing = None, None, None
        self.fusion = SideBySide({owner: m.fusion for owner, m in members.items()}, first.backbone)
        self.use(self.plain_engine())

    @property
    def config(self) -> Any:  # type: ignore[override]
        """Several packs have no common configuration.

        Raises:
            XFusionError: always.
        """
        raise XFusionError(
            f"{len(self.members)} packs together have no recipe, weights or base of their own: name one of them"
        )

    def model(self, owner: str) -> Model:
        """The pack that owns the media named ``owner``."""
        return self.members[owner]  # type: ignore[return-value]

    @property
    def capabilities(self) -> set[str]:
        """What any of the packs can do in a conversation, out of {"text", "caption", "draw"}."""
        return {"text"}.union(*(self.model(owner).capabilities & {"caption", "draw"} for owner in self.modalities))

    @property
    def image(self) -> ImageModality:
        """The image modality of the pack that draws, or else of the first pack that reads pictures."""
        modality = (
            self.modality if isinstance(self.modality, ImageModality) else self._preferred_modality(ImageModality)
        )
        return super().image if modality is None else modality

    @property
    def audio(self) -> AudioModality:
        """The audio modality of the first pack that captions sounds, or else of the first pack that reads them."""
        return self._preferred_modality(AudioModality) or super().audio

    def reads(self, media: Any) -> Modality:
        """The modality that reads an input: of the first pack of that kind that captions, or else of the first of that kind.

        Raises:
            XFusionError: no pack reads this kind of input.
        """
        modality = self._preferred_modality(AudioModality if isinstance(media, Sound) else ImageModality)
        if modality is None:
            ability = "hears sounds" if isinstance(media, Sound) else "sees pictures"
            raise XFusionError(f"none of these packs {ability}: add one that does")
        return modality

    def _preferred_modality(self, kind: type[Kind]) -> Kind | None:
        candidates = {owner: modality for owner, modality in self.modalities.items() if isinstance(modality, kind)}
        captioning = [owner for owner in candidates if "caption" in self.model(owner).capabilities]
        return candidates[next(iter([*captioning, *candidates]))] if candidates else None

    def port_of(self, owner: str) -> MediaPort:
        """The media port of the owner's pack."""
        return self.model(owner).port

    @property
    def teachers(self) -> frozenset[str]:
        """The teachers of all packs."""
        return frozenset().union(*(self.model(owner).teachers for owner in self.modalities))

    @property
    def _learned(self) -> dict[str, nn.Module]:
        """The learned modules of all packs."""
        return {
            f"{owner}.{name}": part for owner in self.modalities for name, part in self.model(owner)._learned.items()
        }


def together(*models: Model) -> Model:
    """Combine packs on one loaded base into one model, whose conversations may contain media of all of them.

    An input picture is read by the first pack that captions pictures, an input sound by the first that captions sounds. The
    first pack that draws pictures generates; if none does, the first that generates sounds. Generated media stay in the
    conversation as media of that pack.

    Args:
        models: packs whose media go through the frozen layers (`prefix`) or through blocks of their own (`dual tower`).

    Raises:
        XFusionError: the packs do not share one loaded base, or one of them changes the layers that text goes through.
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


def _renamed_copy(modality: Modality, owner: str) -> Modality:
    """A copy of the modality whose segments have another name."""
    renamed = copy.copy(modality)
    renamed.name = owner
    return renamed

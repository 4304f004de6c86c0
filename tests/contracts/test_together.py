"""Several packs in one pass: each alone is itself, both are the equation, and words stay the base's."""

import pkgutil

import pytest
import torch
from contracts.table import SOUND_RATE, exact, hearing_model, make_base, make_model, randomise, words
from PIL import Image as PILImage

import xfusion
from xfusion.backbone import Backbone
from xfusion.composition import together
from xfusion.data.pack import pack
from xfusion.data.sequence import Image, Media, Sequence, Sound, Text, XFusionError
from xfusion.data.templates import with_begin
from xfusion.generation import caption, draw
from xfusion.generation.words import answer_tokens
from xfusion.objectives.base import NoObjective


def members(base, chosen):
    """One model of pictures and one of sounds."""
    seen, heard = chosen
    drawing = make_model(base, seen)
    return drawing, hearing_model(base, heard, 7)


def sound(seed):
    wave = torch.rand(24, generator=torch.Generator().manual_seed(seed)) - 0.5
    return Sound(samples=wave, rate=SOUND_RATE)


def picture(seed):
    return PILImage.linear_gradient("L").convert("RGB").resize((16, 16)).rotate(90 * seed)


def segments(model, kinds):
    """Segments of words, pictures and sounds, in this order: ``wps``."""
    out = []
    for number, kind in enumerate(kinds):
        if kind == "w":
            out.append(words(3 + number, number))
            continue
        media = model.reads(sound(number) if kind == "s" else None)
        made = torch.Generator().manual_seed(number)
        grid = media.grid(media.sizes[0])
        out.append(media.segment(torch.randn(grid[0] * grid[1], media.token_width, generator=made), grid))
    return tuple(out)


def found(model, rows):
    """Final states of all positions in reading order, of each sequence."""
    batch = pack([[Sequence(segments=with_begin(model.backbone.begin_ids, row))] for row in rows])
    if model.backbone.dtype == torch.float64:
        for name, media in batch.media.items():
            batch = batch.with_media(name, tokens=media.tokens.double(), time=media.time.double())
    hidden, run = model.run_pass(batch)
    order = torch.cat([table.order for table in run.rows.values()], dim=1)
    return [hidden[row][order[row] >= 0][order[row][order[row] >= 0].argsort()] for row in range(len(rows))]


PAIRS = [
    ("dual tower, strided", "prefix"),
    ("prefix", "prefix"),
    ("dual tower", "dual tower, strided"),
    ("low-rank tower", "prefix"),
]
CONTEXTS = ("wpw", "wpwsw", "swpw", "spw", "psps", "sw", "wwsps")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("chosen", PAIRS)
@torch.no_grad()
def test_both_are_the_equation(chosen, family, tmp_path, monkeypatch):
    base = Backbone.load(str(make_base(family, tmp_path)), dtype=torch.float64)
    with exact(monkeypatch):
        model = together(*(m.double() for m in members(base, chosen)))
        rows = [segments(model, kinds) for kinds in CONTEXTS]
        fast = found(model, rows)
        with model.using(model.reference_engine()):
            whole = found(model, rows)
        for kinds, row, one, other in zip(CONTEXTS, rows, fast, whole, strict=True):
            assert float((one - other).abs().max()) < 1e-9, kinds
            assert float((found(model, [row])[0] - one).abs().max()) < 1e-9, kinds  # a batch is its singles


@pytest.mark.parametrize("chosen", PAIRS)
@torch.no_grad()
def test_with_the_media_of_one_pack_it_is_that_pack(bases, chosen):
    seeing, hearer = members(bases["llama"], chosen)
    both = together(seeing, hearer)
    for kinds, alone in (("wpw", seeing), ("pwp", seeing), ("wsw", hearer), ("ssw", hearer), ("ww", seeing)):
        row = segments(alone, kinds)
        assert torch.equal(found(both, [row])[0], found(alone, [row])[0]), kinds
    row = segments(both, "wps")
    assert not torch.equal(
        found(both, [row])[0][-6:], found(both, [segments(both, "ws")])[0][-6:]
    )  # sounds read pictures


@pytest.mark.parametrize("chosen", PAIRS)
@torch.no_grad()
def test_words_are_the_bases(bases, chosen):
    base = bases["gemma3"]
    both = together(*members(base, chosen))
    ids = torch.randint(3, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = base.model(ids).logits
    assert torch.equal(both.text_logits(ids, stack="fused"), expected)
    assert both.fusion.preserves_text and both.regime == "strictly frozen"


@pytest.mark.parametrize("chosen", PAIRS)
@torch.no_grad()
def test_a_conversation_in_pieces_is_the_whole(bases, chosen):
    """Greedy answers over cached keys and values, which every slot holds for itself, are those of whole passes."""
    both = together(*members(bases["llama"], chosen))
    rows = [segments(both, kinds) for kinds in ("pwsw", "swpw", "wpsw", "wsw")]
    settings = {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0}
    answers = answer_tokens(both, rows, seeds=range(4), **settings)
    for row, answer in zip(rows, answers, strict=True):
        states = found(both, [(*row, Text(ids=tuple(answer)))])[0]
        logits = both.backbone.logits(states[None, -1 - len(answer) :])[0]
        likeliest = logits.argmax(-1).tolist()
        assert likeliest[: len(answer)] == answer
        assert len(answer) == 5 or likeliest[-1] in both.backbone.end_ids
        assert answer_tokens(both, [row], seeds=[0], **settings) == [answer]


@torch.no_grad()
def test_verbs_are_those_of_the_pack_whose_medium_it_is(bases):
    seeing, hearer = members(bases["llama"], ("dual tower, strided", "prefix"))
    both = together(hearer, seeing)
    assert both.capabilities == {"text", "caption", "draw"}
    assert caption(both, [picture(0)], max_tokens=4) == caption(seeing, [picture(0)], max_tokens=4)
    assert caption(both, [sound(0), picture(1)], max_tokens=4) == [
        *caption(hearer, [sound(0)], max_tokens=4),
        *caption(seeing, [picture(1)], max_tokens=4),
    ]
    drawn, alone = (draw(model, ["abc"], seed=3, steps=3, guidance=2.0)[0] for model in (both, seeing))
    assert drawn.tobytes() == alone.tobytes()
    behind, _ = (xfusion.generate(both, [s, "abc", Image()], seed=3, steps=3) for s in (sound(1), sound(2)))
    assert behind[0].size == (16, 16) and behind[0].tobytes() != drawn.tobytes()
    (text,) = xfusion.generate(both, ["abc"], max_tokens=5)
    assert [text] == xfusion.generate(seeing, ["abc"], max_tokens=5)


@torch.no_grad()
def test_two_packs_of_pictures_draw_and_read(bases):
    drawing, reading = make_model(bases["llama"]), make_model(bases["llama"], "prefix")
    randomise(reading, 3)
    reading.set_objectives(reading.config.text, NoObjective.Config())
    both = together(reading, drawing)
    assert caption(both, [picture(1)], max_tokens=4) == caption(reading, [picture(1)], max_tokens=4)
    assert draw(both, ["abc"], steps=2)[0].tobytes() == draw(drawing, ["abc"], steps=2)[0].tobytes()
    assert {s.modality for s in segments(both, "p") if isinstance(s, Media)} == {"image"}
    assert both.modality.name == "image 2" and drawing.modality.name == "image"


def test_what_cannot_stand_beside_another_is_refused(bases, tmp_path):
    base = bases["llama"]
    plain, hearer = members(base, ("dual tower", "prefix"))
    for fusion, said in (
        ("dynamic", "DualTower does more than to send media through blocks of their own"),
        ("flamingo", "CrossAttention does more"),
        ("single tower", "SharedDecoder changes the base"),
        ("dual tower, adaln", "acts inside blocks"),
    ):
        with pytest.raises(XFusionError, match=said):
            together(make_model(base, fusion), hearer)
    with pytest.raises(XFusionError, match=r"2 packs stand on several bases \(.*llama.*gemma3.*\): only packs of one"):
        together(plain, make_model(bases["gemma3"]))
    with pytest.raises(XFusionError, match="0 packs"):
        together()
    other = hearing_model(Backbone.load(base.source), "prefix", 1)
    with pytest.raises(XFusionError, match=r"2 packs stand on 2 loaded bases: load one, .* backbone=first.backbone"):
        together(plain, other)
    both = together(hearer, hearing_model(base, "prefix", 2))
    with pytest.raises(XFusionError, match="none of these packs sees pictures: add one that does"):
        caption(both, [picture(0)])
    with pytest.raises(XFusionError, match="2 packs together have no recipe"):
        both.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    assert together(plain) is plain


def test_no_public_name_is_that_of_a_module():
    """A submodule that is imported becomes an attribute of the package, in the place of a name that was not used before."""
    modules = {module.name for module in pkgutil.iter_modules(xfusion.__path__)}
    assert len(modules) > 15 and not modules & set(xfusion.__all__)

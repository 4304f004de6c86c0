"""Contract: a pack holds learned weights only, says the same after loading, belongs to one base, and refuses the rest."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from contracts.table import (
    ROWS,
    TOWERS,
    distance,
    look,
    make_base,
    make_model,
    mixed_sequences,
    model_config,
    on_every_family,
    randomise,
    view,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import xfusion
from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.data.pack import pack as pack_rows
from xfusion.data.sequence import XFusionError
from xfusion.fusion.dual_tower import DualTower
from xfusion.model import Model, build
from xfusion.opening import Opening
from xfusion.recipes.teal import teal

ROWS_OF_ALL = [[s] for s in mixed_sequences().values()]


@pytest.fixture
def pack(bases, tmp_path):
    """A saved pack on the Llama base, and its folder."""
    model = make_model(bases["llama"])
    folder = tmp_path / "pack"
    model.save_pretrained(folder, training={"steps": 7})
    return model, folder


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(checkpoint.sealed(config)))


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_a_loaded_pack_says_the_same(bases, fusion, family, tmp_path):
    model = make_model(bases[family], fusion, prediction="velocity")
    model.save_pretrained(tmp_path / "pack")
    batch = view(ROWS_OF_ALL, model)
    expected = look(model, batch)
    for loaded in (
        xfusion.load(tmp_path / "pack", backbone=bases[family]),
        xfusion.load(str(shutil.move(tmp_path / "pack", tmp_path / "renamed"))),  # and its base is found by itself
    ):
        assert loaded.config == model.config and not loaded.training
        assert loaded.fingerprint == model.fingerprint
        assert distance(look(loaded, batch), expected) == 0


def test_the_file_holds_learned_weights_only(pack, bases):
    model, folder = pack
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {k.split(".")[0] for k in found} == {"port", "fusion"}
    assert sum(v.numel() for v in found.values()) == model.num_new_parameters
    frozen = {v.numpy().tobytes() for v in bases["llama"].model.state_dict().values()}
    assert not frozen & {v.numpy().tobytes() for v in found.values()}
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_config_says_which_base_and_what_was_built(pack, bases):
    model, folder = pack
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 2 and config["training"] == {"steps": 7}
    assert config["base"] == {
        "source": bases["llama"].source,
        "revision": None,
        "fingerprint": bases["llama"].compute_fingerprint(),
    }
    assert config["num_new_parameters"] == model.num_new_parameters
    assert checkpoint.from_json(config["model"]) == model.config
    assert config["base"]["fingerprint"][:16] in (folder / "README.md").read_text()


def test_a_pack_in_half_precision_loads_into_float32(pack, bases, tmp_path):
    model, _ = pack
    checkpoint.save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = xfusion.load(tmp_path / "half", backbone=bases["llama"])
    for one, other in zip(loaded.new_parameters(), model.new_parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.bfloat16().float())


def test_another_base_is_refused_with_both(pack, bases, tmp_path):
    _, folder = pack
    other = Backbone.load(str(make_base("llama", tmp_path / "other", seed=1)))
    own = bases["llama"]
    with pytest.raises(XFusionError) as error:
        xfusion.load(folder, backbone=other)
    for value in (own.source, own.fingerprint[:16], other.source, other.fingerprint[:16]):
        assert value in str(error.value)


def test_a_model_of_transformers_is_told_from_a_pack(tmp_path):
    with pytest.raises(XFusionError, match=r"base is a model of transformers, not a pack: it may be the base of one"):
        xfusion.load(make_base("llama", tmp_path / "base"))


def test_one_changed_bit_of_the_base_is_another_base(pack, bases, tmp_path):
    _, folder = pack
    changed = Backbone.load(bases["llama"].source)
    assert changed.fingerprint == bases["llama"].fingerprint
    weight = changed.model.get_input_embeddings().weight.data
    weight.view(torch.int32)[3, 3] ^= 1
    with pytest.raises(XFusionError, match="belongs to the base"):
        xfusion.load(folder, backbone=Backbone(changed.model, changed.tokenizer, changed.source))


def on_another_function(base, folder, change=lambda config: None, retoken=lambda tokenizer: None):
    """A base of the same weights, saved with other settings or another tokenizer."""
    model, own = copy.deepcopy(base.model), copy.deepcopy(base.tokenizer)
    change(model.config)
    retoken(own)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return Backbone.load(str(folder))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("settings.rms_norm_eps 1e-06, .* with 0.1:", lambda c: setattr(c, "rms_norm_eps", 0.1)),
        (
            "settings.rope_parameters.rope_theta 10000.0, .* with 500.0:",
            lambda c: c.rope_parameters.update(rope_theta=500.0),
        ),
        ("settings.hidden_act 'silu', .* with 'gelu':", lambda c: setattr(c, "hidden_act", "gelu")),
        ("settings.windows .*, .* with .*:", lambda c: setattr(c, "sliding_window", 3)),
    ],
)
def test_the_same_weights_under_other_settings_are_another_base(bases, tmp_path, what, change):
    family = "mistral" if "windows" in what else "llama"
    make_model(bases[family]).save_pretrained(tmp_path / "pack")
    other = on_another_function(bases[family], tmp_path / "other", change)
    assert other.fingerprint == bases[family].fingerprint
    with pytest.raises(XFusionError, match=f"was trained on .* with {what} what it computes is another base") as error:
        xfusion.load(tmp_path / "pack", backbone=other)
    assert "\n" not in str(error.value)
    same = on_another_function(bases[family], tmp_path / "same")
    assert xfusion.load(tmp_path / "pack", backbone=same).backbone is same


def test_another_tokenizer_is_another_base(pack, bases, tmp_path):
    _, folder = pack
    for number, retoken in enumerate((lambda t: t.add_tokens(["new"]), lambda t: setattr(t, "eos_token", "<|pad|>"))):
        other = on_another_function(bases["llama"], tmp_path / str(number), retoken=retoken)
        with pytest.raises(
            XFusionError, match=r"with tokenizer '[0-9a-f]+, but .* the same weights with '[0-9a-f]+: what it"
        ):
            xfusion.load(folder, backbone=other)


def rewritten(change):
    """Changes a tokenizer's serialised form."""

    def retoken(tokenizer):
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        change(parts)
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))

    return retoken


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", lambda parts: parts["model"].update(merges=parts["model"]["merges"][:8])),
        ("normalizer", lambda parts: parts.update(normalizer={"type": "Lowercase"})),
        ("pre_tokenizer", lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True)),
        ("added_tokens", lambda parts: parts["added_tokens"][2].update(lstrip=True)),
    ],
)
def test_a_tokenizer_of_the_same_vocabulary_that_splits_text_otherwise_is_another_base(
    pack, bases, tmp_path, part, change
):
    _, folder = pack
    own, text = bases["llama"], "The blue birds sing in red trees <|pad|>"
    other = on_another_function(own, tmp_path / "other", retoken=rewritten(change))
    assert other.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    assert other.function["tokenizer"] == own.function["tokenizer"]
    ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for base in (own, other)]
    assert ids[0] != ids[1]
    with pytest.raises(
        XFusionError,
        match=rf"with tokenizer_parts\.{part} .* the same weights with .*: what it computes is another base",
    ):
        xfusion.load(folder, backbone=other)
    edit(folder, lambda c: c["base_function"].pop("tokenizer_parts"))  # as packs of before have it
    assert xfusion.load(folder, backbone=other).backbone is other


def test_what_does_not_change_ids_is_the_same_tokenizer(pack, bases, tmp_path):
    """Offsets, truncation, what a call left in the tokenizer, and how another version of the library writes merges."""
    _, folder = pack
    own = bases["llama"]

    def change(parts):
        parts["pre_tokenizer"]["trim_offsets"] = not parts["pre_tokenizer"]["trim_offsets"]
        parts["normalizer"] = {"type": "Sequence", "normalizers": []}
        parts["model"]["ignore_merges"] = False
        parts["model"]["merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]

    other = on_another_function(own, tmp_path / "other", retoken=rewritten(change))
    other.tokenizer(["one", "two words"], padding=True, truncation=True, max_length=3)
    assert other.function["tokenizer_parts"] == own.function["tokenizer_parts"]
    assert xfusion.load(folder, backbone=other).backbone is other


def test_a_pack_of_before_is_completed_when_it_is_written_again(pack, bases):
    model, folder = pack
    edit(folder, lambda c: c.pop("base_function"))
    checkpoint.add_facts(folder, model, scores={"fit": 0.5})
    assert json.loads((folder / "config.json").read_text())["base_function"] == bases["llama"].function
    edit(folder, lambda c: c["base"].update(fingerprint="0" * 64))
    with pytest.raises(XFusionError, match=f"belongs to the base {'0' * 16}, the model stands on"):
        checkpoint.add_facts(folder, model, scores={"fit": 0.5})


def test_a_pack_from_before_settings_were_recorded_loads(pack, bases, tmp_path):
    _, folder = pack
    edit(folder, lambda c: c.pop("base_function"))
    other = on_another_function(bases["llama"], tmp_path / "other", lambda c: setattr(c, "rms_norm_eps", 0.1))
    assert xfusion.load(folder, backbone=other).backbone is other


def test_what_a_pack_does_not_record_is_refused(pack, tmp_path):
    model, _ = pack
    for unknown in ({"push_to_hub": True}, {"base": {}}, {"capabilities": []}, {"steps": 7}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument {next(iter(unknown))!r}"):
            model.save_pretrained(tmp_path / "new", **unknown)
        with pytest.raises(TypeError, match=f"unexpected keyword argument {next(iter(unknown))!r}"):
            checkpoint.save(model, tmp_path / "new", **unknown)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", dtype=torch.bfloat16, licence="cc0-1.0", scores={"fit": 0.5})
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["licence"] == "cc0-1.0" and config["scores"] == {"fit": 0.5} and "recipe" not in config


def test_from_pretrained_is_load(pack, bases):
    model, folder = pack
    loaded = Model.from_pretrained(folder, backbone=bases["llama"])
    assert type(loaded) is Model and loaded.fingerprint == model.fingerprint
    for name in (folder, "emoji", "org/name@main"):
        with pytest.raises(
            XFusionError, match="revision 'v1' is of a hub id without one, and .* is none: leave it out"
        ):
            Model.from_pretrained(name, revision="v1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "find", lambda name: {"org/name@v1": folder}[name])
        assert (
            Model.from_pretrained("org/name", revision="v1", backbone=bases["llama"]).fingerprint == model.fingerprint
        )


def test_a_model_is_neither_moved_nor_cast_away_from_its_base(bases):
    model = make_model(bases["llama"])
    before = model.fingerprint
    for away in (lambda: model.to("meta"), lambda: model.to_empty(device="meta")):
        with pytest.raises(
            XFusionError, match=r"computes on cpu, .*: load it on meta instead, xfusion.load\(pack, device="
        ):
            away()
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(
            XFusionError, match=r"new weights in torch\.\w+ beside a base in torch.float32: leave them in"
        ):
            cast()
    assert model.fingerprint == before
    assert model.to("cpu").float().train().eval() is model and model.fingerprint == before
    wide = Model(model_config(bases["llama"]), Backbone.load(bases["llama"].source, dtype=torch.float64))
    assert {p.dtype for p in wide.double().new_parameters()} == {torch.float64}


def test_state_dict_has_the_opening_head_and_learned_state_has_not(bases):
    model = make_model(bases["llama"])
    learned = sum(value.numel() for value in model.learned_state().values())
    assert sum(value.numel() for value in model.state_dict().values()) == learned
    model.opening = Opening(64)
    assert sum(value.numel() for value in model.state_dict().values()) == learned + 2 * 65
    assert sum(value.numel() for value in model.learned_state().values()) == learned


def test_altered_weights_are_refused(pack, bases):
    _, folder = pack
    path = folder / "model.safetensors"
    state = load_file(path)
    state["port.begin"][0] += 1e-6
    save_file(state, path)
    with pytest.raises(XFusionError, match="was altered"):
        xfusion.load(folder, backbone=bases["llama"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(XFusionError, match=r"model\.safetensors cannot be read"):
        xfusion.load(folder, backbone=bases["llama"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_flipped_bit_is_refused(bases, tmp_path, name):
    """Every bit of the first bytes and of some in the middle, wherever a format might look away: names, spaces, shapes."""
    folder = tmp_path / "pack"
    make_model(bases["llama"], "low-rank tower").save_pretrained(folder, scores={"fit": 0.5})
    path, rng = folder / name, random.Random(0)
    whole = path.read_bytes()
    places = [(place, rng.randrange(8)) for place in rng.sample(range(len(whole)), 24)]
    for place, bit in [*((0, bit) for bit in range(8)), *((200, bit) for bit in range(8)), *places]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(XFusionError) as error:
            xfusion.load(folder, backbone=bases["llama"])
        assert str(path) in str(error.value) or "format version" in str(error.value), (place, bit)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    xfusion.load(folder, backbone=bases["llama"])


VERSION_1 = Path(__file__).parent / "pack_version_1"
"""A pack of the tiny Llama that the last xfusion of format version 1 wrote."""


def test_another_codec_under_the_same_name_is_refused(bases, tmp_path):
    codec = tmp_path / "codes"
    shutil.copytree(Path(xfusion.__file__).parent / "packs" / "emoji-vq", codec)
    pack = checkpoint.save(build(teal(codec=str(codec)).model, bases["llama"]), tmp_path / "pack")
    checkpoint.load(pack, backbone=bases["llama"])
    weights = codec / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(XFusionError, match="codec whose weights have the hash .* put back the one of its training"):
        checkpoint.load(pack, backbone=bases["llama"])


def test_a_pack_of_the_previous_format_version_loads(bases, tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "pack")
    before = json.loads((VERSION_1 / "config.json").read_text())
    assert before["format_version"] == 1 and "sha256" not in before

    def on_this_base(config):  # whose weights another torch may draw otherwise
        config["base"]["fingerprint"] = bases["llama"].fingerprint

    path = tmp_path / "pack" / "config.json"
    on_this_base(before)
    path.write_text(json.dumps(before))
    model = xfusion.load(tmp_path / "pack", backbone=bases["llama"])
    stored = load_file(VERSION_1 / "model.safetensors")
    assert all(torch.equal(value, stored[key].float()) for key, value in model.learned_state().items())
    weights = tmp_path / "pack" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(XFusionError, match="was altered: its fingerprint is"):
        xfusion.load(tmp_path / "pack", backbone=bases["llama"])
    model.save_pretrained(tmp_path / "pack")  # and is written as the present version
    assert json.loads(path.read_text())["format_version"] == 2
    assert xfusion.load(tmp_path / "pack", backbone=bases["llama"]).fingerprint == model.fingerprint


def test_weights_that_do_not_fit_are_named(pack, bases):
    _, folder = pack
    path = folder / "model.safetensors"
    state = load_file(path)
    state["port.extra"] = state.pop("port.end")
    state["port.begin"] = torch.zeros(3)
    save_file(state, path)
    edit(folder, lambda c: c.update(weights_sha256=checkpoint.file_hash(path)))
    with pytest.raises(
        XFusionError, match=r"missing \(first: port.end\).*unexpected \(first: port.extra\).*another shape"
    ):
        xfusion.load(folder, backbone=bases["llama"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["fusion"].update(colour="red"), "has no field 'colour'"),
        (lambda c: c["model"]["fusion"].update(type="xfusion.fusion.dual_tower:Nothing"), "cannot be imported"),
        (lambda c: c["model"]["fusion"].update(type="xfusion.nowhere:Config"), "cannot be imported"),
        (lambda c: c["model"]["fusion"].update(type="subprocess:Popen"), "which is not xfusion's: pass --trust"),
        (lambda c: c["model"]["fusion"].update(type="xfusion.backbone:Backbone"), "is not a configuration class"),
        (  # what a module of xfusion imports is not xfusion's
            lambda c: c["model"]["fusion"].update(type="xfusion.checkpoint:torch.compiler.CacheInfo"),
            "is not a configuration class",
        ),
        (lambda c: c["model"].pop("type"), "without 'type'"),
        (lambda c: c.update(model=c["model"]["fusion"]), "'model' is not a model configuration"),
        (lambda c: c.update(format_version=3), "format version 3, this xfusion reads 1 to 2"),
        (lambda c: c.pop("format_version"), "format version None"),
        (lambda c: c.pop("weights_sha256"), "a pack of format version 2 has hashes, this has none"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(pack, bases, change, message):
    _, folder = pack
    edit(folder, change)
    with pytest.raises(XFusionError, match=message):
        xfusion.load(folder, backbone=bases["llama"])


def test_a_revision_of_the_hub_may_have_slashes(pack, bases, monkeypatch):
    model, folder = pack
    fetched = {("org/name", "refs/pr/1"): str(folder)}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, revision, **_: fetched[name, revision])
    for name, revision in (("org/name", "refs/pr/1"), ("org/name@refs/pr/1", None)):
        assert xfusion.load(name, revision=revision, backbone=bases["llama"]).fingerprint == model.fingerprint


def test_broken_and_missing_packs_are_refused(pack, tmp_path, monkeypatch):
    _, folder = pack
    with pytest.raises(XFusionError, match="there is no pack"):
        xfusion.load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(XFusionError, match=r"is not a pack: it has no config\.json"):
        xfusion.load(tmp_path / "empty")
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        XFusionError, match=r"^emoji is not a pack: .*; it hides the shipped pack emoji: rename it, or run"
    ):
        xfusion.load("emoji")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pack").symlink_to(folder)
    assert xfusion.load(tmp_path / "run").fingerprint == xfusion.load(folder).fingerprint  # a run's folder
    (folder / "config.json").write_text("{")
    with pytest.raises(XFusionError, match="cannot be read"):
        xfusion.load(folder)


def test_saving_replaces_a_pack_but_no_other_folder(pack, tmp_path):
    model, folder = pack
    randomise(model, seed=3)
    model.save_pretrained(folder)
    assert xfusion.load(folder, backbone=model.backbone).fingerprint == model.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(XFusionError, match="holds other files"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    # A model of transformers has a config.json, too; a pack under version control has more than a pack.
    (tmp_path / "llava").mkdir()
    for name, text in (("config.json", '{"model_type": "llava"}'), ("model.safetensors", "weeks of training")):
        (tmp_path / "llava" / name).write_text(text)
    (folder / ".git").mkdir()
    for other in (tmp_path / "llava", folder):
        before = {p: p.is_file() and p.read_bytes() for p in other.iterdir()}
        with pytest.raises(XFusionError, match="holds other files"):
            model.save_pretrained(other)
        assert {p: p.is_file() and p.read_bytes() for p in other.iterdir()} == before
    with pytest.raises(XFusionError, match=r"holds other files \(\.git\)"):
        checkpoint.add_facts(folder, model, proof={})
    with pytest.raises(XFusionError, match=r"holds other files \(\.git\)"):
        checkpoint.add_opening(folder, model, Opening(64), folder)


def test_a_failed_save_leaves_the_old_pack_and_no_rubbish(pack, tmp_path, monkeypatch):
    model, folder = pack
    before = model.fingerprint

    def fail(state, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    randomise(model, seed=3)
    monkeypatch.setattr(checkpoint, "save_file", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(XFusionError, match=f"{target.name} cannot be written: disk full"):
            model.save_pretrained(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pack"]
    assert xfusion.load(folder, backbone=model.backbone).fingerprint == before


@torch.no_grad()
def test_two_packs_live_on_one_base(bases, tmp_path):
    base, expected = bases["gemma3"], {}
    for name, fusion in (("one", "dual tower"), ("two", "dual tower, strided")):
        model = make_model(base, fusion)
        randomise(model, seed=len(expected))
        batch = view(ROWS_OF_ALL, model)
        expected[name] = look(model, batch)
        model.save_pretrained(tmp_path / name)
    both = {name: xfusion.load(tmp_path / name, backbone=base) for name in expected}
    for name in ("one", "two", "one", "two"):
        assert distance(look(both[name], batch), expected[name]) == 0
    randomise(both["one"], seed=9)
    assert distance(look(both["two"], batch), expected["two"]) == 0
    assert distance(look(both["one"], batch), expected["one"]) > 0.1


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator(bases):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = make_model(bases["qwen3"], randomised=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert make_model(bases["qwen3"], randomised=False).fingerprint == one.fingerprint


@pytest.mark.parametrize(("fusion", "family"), on_every_family(TOWERS))
def test_new_blocks_start_as_copies(bases, fusion, family):
    model = make_model(bases[family], fusion, randomised=False)
    assert model.fusion.blocks
    for index, block in model.fusion.blocks.items():
        frozen = dict(bases[family].layers[int(index)].named_parameters())
        for name, parameter in block.named_parameters():
            parts = 2 if "gate_up" in name else 1  # one matrix may hold gate and up
            for own, old in zip(parameter.chunk(parts), frozen[name].chunk(parts), strict=True):
                assert torch.equal(own, old[tuple(slice(0, n) for n in own.shape)]), (index, name)
            if "mlp" not in name:
                assert parameter.shape == frozen[name].shape, (index, name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DualTower.Config(stride=0), "stride 0"),
        (DualTower.Config(offset=9), "offset 9 puts no block into 4 layers"),
        (DualTower.Config(mlp=97), "MLP width 97 is not within 1 to 96"),
        (DualTower.Config(mlp=0), "MLP width 0"),
    ],
)
def test_impossible_towers_are_refused(bases, config, message):
    import dataclasses

    whole = dataclasses.replace(model_config(bases["llama"]), fusion=config)
    with pytest.raises(XFusionError, match=message):
        Model(whole, bases["llama"])


SLOW = {
    *(("low-rank tower", family) for family in ("gemma2", "gemma3", "mistral", "olmo2", "phi3")),
    *((fusion, family) for fusion in ("dual tower, adaln", "bagel, adaln") for family in ("gemma2", "gemma3")),
}
"""Rows that take up to 240 steps to where all others come in 60."""


@pytest.mark.parametrize(("fusion", "family"), ROWS)
def test_one_batch_is_overfitted(bases, fusion, family):
    """Both losses fall to a fifth within 60 steps of a fixed batch and noise, in slow rows within 240."""
    model = make_model(bases[family], fusion, randomised=False, prediction="velocity")
    # No new weight can change what the frozen model says of words alone.
    batch = pack_rows([[s] for name, s in mixed_sequences().items() if name != "words alone"])
    # Where clean pictures take the frozen weights only the port can learn to be named.
    share = {"flow_matching": 0.2, "next_token": 1.0 if fusion in ("bagel", "prefix") else 0.2}
    adamw, history = torch.optim.AdamW(model.new_parameters(), lr=4e-3), []
    for _ in range(240 if (fusion, family) in SLOW else 60):
        losses = model.losses(batch, torch.Generator().manual_seed(0))
        history.append({name: float(value.detach() / count) for name, (value, count) in losses.items()})
        if all(history[-1][name] < part * history[0][name] for name, part in share.items()):
            return
        sum(value / count for value, count in losses.values()).backward()
        adamw.step()
        adamw.zero_grad()
    pytest.fail(str(history[::10]))

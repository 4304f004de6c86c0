"""The suite `retrieval`: known answers by a model whose vectors are known."""

import pytest
import torch
from contracts.table import Noise, of_other_groups

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.run import evaluate


class Known:
    """Embeds the name of picture i, and picture i, as the same unit vector; or pictures one further on."""

    capabilities = frozenset({"text", "embed"})

    def __init__(self, source, shift=0):
        self.image = type("Image", (), {"sizes": (8,)})
        names = [e.captions[0] for e in source.examples]
        self.number = {name: i for i, name in enumerate(names)}
        self.seen = {source.picture(i, 8).tobytes(): (i + shift) % len(names) for i in range(len(names))}

    def embed(self, items):
        where = [self.number[x] if isinstance(x, str) else self.seen[x.tobytes()] for x in items]
        return torch.eye(len(self.number))[where]


def test_a_model_that_knows_scores_one_and_one_that_is_wrong_scores_nothing():
    source = Noise(6)
    found = evaluate(Known(source), "retrieval", source=source)
    assert all(found[f"fit_{task}_at_1"] == found[f"fit_{task}_mrr"] == 1 for task in ("naming", "search"))
    assert found["chance_fit_naming_at_1"] == pytest.approx(1 / 6)
    assert len(found["settings"]["data_fingerprint"]) == 64 and found["settings"]["held_fingerprint"] is None
    assert found["settings"]["num_fit"] == 6 and not any(key.startswith("held") for key in found)
    wrong = evaluate(Known(source, shift=1), "retrieval", source=source, held=of_other_groups(source))
    assert wrong["fit_naming_at_1"] == wrong["held_search_at_1"] == 0


class Matcher(Known):
    """Matches the name of a picture with 0.9 and others with 0.1; or, being careless, all with 0.8 and more."""

    capabilities = frozenset({"text", "match"})
    careless = False

    def match(self, picture, names):
        own = self.seen[picture.tobytes()]
        low, high = (0.8, 0.85) if self.careless else (0.1, 0.9)
        return [high if self.number[name] == own else low for name in names]


def test_a_model_that_matches_is_scored_by_that():
    source = Noise(6)
    found = evaluate(Matcher(source), "retrieval", source=source)
    assert found["fit_match"] == found["fit_naming_at_1"] == found["fit_search_at_1"] == 1
    careless = Matcher(source)
    careless.careless = True
    found = evaluate(careless, "retrieval", source=source)
    assert found["fit_match"] == 0.5 and found["fit_naming_at_1"] == 1  # the order is right all the same
    assert "fit_match" not in evaluate(Known(source), "retrieval", source=source)


def test_a_model_that_embeds_and_matches_is_scored_by_both_apart():
    source = Noise(6)
    both = Matcher(source)
    both.capabilities = frozenset({"text", "caption", "embed", "match"})
    both.embed = Known(source, shift=1).embed  # the head is right, the vectors are not
    found = evaluate(both, "retrieval", source=source)
    assert found["fit_naming_at_1"] == found["fit_search_at_1"] == 0
    assert found["fit_match"] == found["fit_match_naming_at_1"] == found["fit_match_search_at_1"] == 1
    assert found["fit_match_naming_at_1_blind"] < 1 and found["chance_fit_match_search_at_1"] == pytest.approx(1 / 6)


def test_a_model_that_cannot_embed_is_refused():
    source = Noise(6)
    model = Known(source)
    model.capabilities = frozenset({"text", "draw"})
    with pytest.raises(
        XFusionError, match="this suite scores embedding and matching, but the model can only do: draw, text"
    ):
        evaluate(model, "retrieval", source=source)

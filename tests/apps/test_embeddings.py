"""`/v1/embeddings` as OpenAI's own client meets it."""

import sys
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import as_url, running
from apps.test_serve import get, until
from contracts.table import Noise, make_base, model_config, randomise

from xfusion.apps.server.batches import Embed
from xfusion.apps.server.limits import Limits
from xfusion.backbone import Backbone
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.next_token import NextToken

SMALL = Limits(pictures=2, inputs=4, characters=100, pixels=10_000)


def test_vectors_of_texts_and_pictures_are_the_models_own(tmp_path, monkeypatch):
    base = Backbone.load(str(make_base("llama", tmp_path)))
    dual = replace(
        model_config(base), text=NextToken.Config(weight=0.0), media=NoObjective.Config(), extra=(Contrastive.Config(),)
    )
    model = Model(dual, base)
    randomise(model)
    model.eval()
    shown = [Noise().picture(i, 40) for i in range(2)]
    with (
        running({"clip": model, "draws": Model(model_config(base), base)}, SMALL) as server,
        server.client() as client,
    ):
        given = ["a red apple", as_url(shown[0]), "tree", as_url(shown[1])]
        expected = model.embed(["a red apple", shown[0], "tree", shown[1]])
        for kind in ({}, {"encoding_format": "float"}):  # the client's own choice is base64
            found = client.embeddings.create(model="clip", input=given, **kind)
            assert [item.index for item in found.data] == [0, 1, 2, 3] and found.model == "clip"
            torch.testing.assert_close(torch.tensor([item.embedding for item in found.data]), expected)
        assert found.usage.prompt_tokens == found.usage.total_tokens > 4
        words = [
            "data: the new oil",
            "data:text/plain,hello",
            "data:a b;base64,",
            "DATA:;BASE64 is how it begins, he said",
        ]
        for text, item in zip(words, client.embeddings.create(model="clip", input=words).data, strict=True):
            torch.testing.assert_close(torch.tensor(item.embedding), model.embed([text])[0])
        (single,) = client.embeddings.create(model="clip", input="tree", dimensions=256).data
        torch.testing.assert_close(torch.tensor(single.embedding), expected[2])
        # Vectors are no pictures, whatever they are of; a metric is counted behind the batch.
        until(lambda: "xfusion_batch_size_count 4.0" in get(server, "/metrics"))
        assert "xfusion_pictures_total 0.0" in get(server, "/metrics")
        client.images.generate(model="draws", prompt="a", n=2, extra_body={"steps": 1})
        until(lambda: "xfusion_batch_size_count 5.0" in get(server, "/metrics"))
        assert "xfusion_pictures_total 2.0" in get(server, "/metrics")
        refused = (
            ({"model": "draws", "input": "a"}, "this model cannot embed: it can caption, draw, text"),
            ({"model": "clip", "input": ["a"] * 5}, "input is 5, more than the 4 that this server allows"),
            ({"model": "clip", "input": [as_url(shown[0])] * 3}, "pictures is 3, more than the 2"),
            ({"model": "clip", "input": ["a", ""]}, "input: a text is empty"),
            ({"model": "clip", "input": "a", "dimensions": 3}, "dimensions is 3, but this model's vectors have 256"),
            ({"model": "clip", "input": "data:image/png;base64,%%"}, "image_url is not base64"),
            ({"model": "clip", "input": "data:application/pdf;base64,JVBERi0xLjc="}, "PDF"),
        )
        monkeypatch.setattr(Embed, "run", None)  # what is refused is refused before anything is computed
        for body, message in refused:
            with pytest.raises(openai.BadRequestError, match=message) as error:
                client.embeddings.create(**body)
            assert error.value.status_code == 400

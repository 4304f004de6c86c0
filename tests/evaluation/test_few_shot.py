"""The suite `few_shot`: known answers by models that read nothing but the picture, or nothing but their examples."""

import pytest
from contracts.table import Noise, of_other_groups
from PIL import Image as PILImage

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.run import evaluate


class Knowing:
    """Names what the asked picture shows, whatever stands before it."""

    capabilities = frozenset({"text", "caption"})

    def __init__(self, *sources):
        self.image = type("Image", (), {"sizes": (8,)})
        self.names = {s.picture(i, 8).tobytes(): s.examples[i].captions[0] for s in sources for i in range(len(s))}
        self.prompts = []

    def generate(self, prompts):
        self.prompts += prompts
        return [[self.answer(prompt)] for prompt in prompts]

    def answer(self, prompt):
        return self.names[next(p for p in reversed(prompt) if isinstance(p, PILImage.Image)).tobytes()]


class Copying(Knowing):
    """Says the true name where its examples are named truly, and the last example's name where they are not."""

    def answer(self, prompt):
        solved = list(zip(prompt[:-1:2], prompt[1::2], strict=True))
        false = [name for picture, name in solved if self.names[picture.tobytes()] != name]
        return false[-1] if false else super().answer(prompt)


class Later(Noise):
    """Pictures of which none is among the first."""

    def __init__(self, count, spec):
        super().__init__(count, spec)
        self.examples = of_other_groups(self).examples

    def picture(self, index, size):
        return super().picture(100 + index, size)


def test_one_who_knows_names_all_and_one_who_reads_examples_is_misled_by_false_ones():
    source, held = Noise(12), Later(6, "held")
    knows = Knowing(source, held)
    found = evaluate(knows, "few_shot", source=source, held=held, most=3)
    assert {k: v for k, v in found.items() if k.startswith("held_exact") and not k.endswith("_blind")} == {
        f"held_exact_{n}_shots{kind}": 1.0 for n in range(4) for kind in ("", "_misnamed") if n or not kind
    }
    assert all(0 <= found[f"held_exact_{n}_shots_blind"] < 0.6 for n in range(4))
    assert [found["settings"][key] for key in ("num_held", "most", "question")] == [6, 3, ""]
    copies = Copying(source, held)
    found = evaluate(copies, "few_shot", source=source, held=held, most=2)
    assert [found[f"held_exact_{n}_shots"] for n in range(3)] == [1, 1, 1]
    assert found["held_exact_1_shots_misnamed"] < 0.5 > found["held_exact_2_shots_misnamed"]


def test_examples_are_the_same_in_every_run_and_fewer_are_the_first_of_more():
    source, held = Noise(12), Later(4, "held")
    one, other = Knowing(source, held), Knowing(source, held)
    for model in (one, other):
        evaluate(model, "few_shot", source=source, held=held, most=4, question="What?")

    def plain(prompts):
        return [[p.tobytes() if isinstance(p, PILImage.Image) else p for p in prompt] for prompt in prompts]

    seen = plain(one.prompts)
    assert seen == plain(other.prompts)
    assert [len(p) for p in seen[::4]] == [2, 4, 4, 6, 6, 10, 10]  # of 4 pictures each, named truly and falsely
    for of_one, of_two, of_four in zip(seen[4:8], seen[12:16], seen[20:24], strict=True):
        assert of_two[:2] == of_one[:2] and of_four[:4] == of_two[:4]
        assert len(set(of_four[:8:2])) == 4 and of_four[-1] == "What?"
        assert [one.names[picture] for picture in of_four[:8:2]] == list(of_four[1:8:2])


@pytest.mark.parametrize(
    ("able", "settings", "message"),
    [
        ({"draw"}, {}, "this suite has pictures named, but the model can only do: draw"),
        ({"caption"}, {"most": 7}, "noise: 7 examples of as many groups, .* of 6 groups with 6 names"),
        ({"caption"}, {"held": None}, "no picture is held out to be named; give a share"),
    ],
)
def test_what_cannot_be_scored_is_refused(able, settings, message):
    source = Noise(6)
    model = Knowing(source)
    model.capabilities = frozenset(able)
    with pytest.raises(XFusionError, match=message):
        evaluate(model, "few_shot", **({"source": source, "held": Later(2, "held")} | settings))

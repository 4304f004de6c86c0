"""lmms-eval on a pack: what the harness hears is what `generate` says, and likelihoods are those of a full pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import Noise, make_model

import xfusion
from xfusion.data.sequence import Text, XFusionError
from xfusion.data.sources import open_source
from xfusion.generation import log_likelihoods

pytest.importorskip(
    "lmms_eval",
    reason="lmms-eval is not installed: it wants an environment of its own, where pip install -e '.[lmms]' brings it;"
    " its adapter is not tested",
)
from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from xfusion.evaluation.adapters.lmms_eval import PackMedia, manifest

PICTURES = [Noise().picture(i, 24) for i in range(4)]
DOCUMENTS = [
    {"pictures": PICTURES[:1], "answer": "two blue birds"},
    {"pictures": PICTURES[1:2], "answer": "a cat"},
    {"pictures": [], "answer": "a cat"},
    {"pictures": PICTURES[2:], "answer": "a green tree"},
]


@pytest.fixture(scope="module")
def model(bases):
    return make_model(bases["llama"])


def harness(model, **settings):
    """The class as the harness finds it, with a task's documents."""
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    found = registry.get_model_class("xfusion")
    assert found is PackMedia
    made = found(pack=model, **settings)
    made.task_dict["looking"] = {"test": DOCUMENTS}
    return made


def request(kind, words, second, number):
    """A request as the harness's tasks construct it."""
    arguments = (words, second, lambda document: document["pictures"], number, "looking", "test")
    metadata = {"task": "looking", "doc_id": number, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def ask(words, number, **settings):
    return request("generate_until", words, {"max_new_tokens": 10, **settings}, number)


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_of_generate(model, batch):
    question = "what is this?"
    found = harness(model, batch_size=batch).generate_until([ask(question, i) for i in range(4)])
    chat = as_chat(model, question)
    lists = [[PICTURES[0], question], [PICTURES[1], question], [chat], [*PICTURES[2:], question]]
    assert found == [model.generate(items, max_tokens=10)[0] for items in lists]
    assert len(set(found)) == 4
    (marked,) = harness(model).generate_until([ask("first <image> and then <image>", 3)])
    assert marked == model.generate(["first ", PICTURES[2], " and then ", PICTURES[3]], max_tokens=10)[0]
    sampling = {"temperature": 1.0, "top_p": 0.9, "do_sample": True}
    asked = [ask(question, 0, **sampling) for _ in range(2)]
    sampled = harness(model, batch_size=batch, seed=7).generate_until(asked)
    settings = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 10}
    assert sampled == [model.generate(lists[0], seed=7 + i, **settings)[0] for i in range(2)]
    greedy = ask(question, 0, temperature=0.7, do_sample=False, num_beams=1, image_aspect_ratio="original", top_p=None)
    assert harness(model).generate_until([greedy]) == found[:1]


def as_chat(model, words):
    """Words alone as the base's own chat template has them."""
    return Text(ids=model.backbone.chat([{"role": "user", "content": words}]))


def test_an_answer_ends_at_its_first_stop_sequence(model, monkeypatch):
    (whole,) = harness(model).generate_until([ask("what is this?", 0, until=[])])
    stop = whole[3:5]
    tokens = []
    generate = type(model).generate

    def counted(self, *given, listen, **settings):
        return generate(self, *given, listen=lambda row, token: tokens.append(token) or listen(row, token), **settings)

    monkeypatch.setattr(type(model), "generate", counted)
    for until in (stop, ["never said", stop, ""]):
        tokens.clear()
        assert harness(model).generate_until([ask("what is this?", 0, until=until)]) == [whole[: whole.index(stop)]]
        assert len(tokens) < 10, "nothing is computed behind it"


def test_likelihoods_are_those_of_answers_of_their_own(model):
    question, answers = "what is this?", ["two blue birds", " a cat", "a green tree"]
    asked = [request("loglikelihood", question, answer, i) for i in (0, 2) for answer in answers]
    found = harness(model).loglikelihood(asked)
    own = [answer.strip() for answer in answers]
    assert found[:3] == log_likelihoods(model, [PICTURES[0], question], own)
    assert found[3:] == log_likelihoods(model, [as_chat(model, question)], own)
    by_document = request("loglikelihood", question, lambda document: document["answer"], 0)
    assert harness(model).loglikelihood([by_document]) == found[:1]
    said = model.generate([PICTURES[1], question], max_tokens=3)[0]
    (greedy, other) = (request("loglikelihood", question, text, 1) for text in (said, "zebra"))
    assert [is_greedy for _, is_greedy in harness(model).loglikelihood([greedy, other])] == [True, False]


def test_what_cannot_be_answered_is_refused(model, bases):
    for given, message in (
        (ask("a", 0, num_beams=4), "sets num_beams to 4"),
        (ask("a", 0, length_penalty=2.0), "sets length_penalty to 2.0"),
        (ask("<image> and <image>", 0), "names 2 pictures by <image>, but the document has 1"),
    ):
        with pytest.raises(XFusionError, match=message):
            harness(model).generate_until([given])
    film = request("generate_until", "a", {}, 0)
    film.arguments = (*film.arguments[:2], lambda _: ["film.mp4"], *film.arguments[3:])
    with pytest.raises(XFusionError, match=r"shows a str \(film.mp4\): a pack takes pictures and sounds"):
        harness(model).generate_until([film])
    with pytest.raises(XFusionError, match="tasks of one round"):
        harness(model).generate_until_multi_round([])


TASK = """\
task: looking
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_visual: !function looking.pictures
doc_to_text: "what is this?"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 8, until: ["\\n"]}}
process_results: !function looking.same
metric_list:
  - metric: same
    aggregation: !function looking.mean
    higher_is_better: true
"""
HELPERS = """\
from PIL import Image


def pictures(document):
    return [Image.open(document["file"])]


def same(document, results):
    return {"same": float(results[0] == document["answer"])}


def mean(values):
    return sum(values) / len(values)
"""


def write_task(folder, pictures, answers):
    """A task of the harness that asks what pictures are, with its own functions beside it."""
    items = []
    for i, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
        picture.save(folder / f"{i}.png")
        items.append({"file": str(folder / f"{i}.png"), "answer": answer})
    (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "looking.yaml").write_text(TASK.format(file=folder / "test.jsonl"))
    (folder / "looking.py").write_text(HELPERS)


@pytest.mark.full
def test_a_whole_task_of_the_harness(model, tmp_path, monkeypatch):
    evaluator = pytest.importorskip(
        "lmms_eval.evaluator", reason="lmms-eval's own dependencies are not all installed", exc_type=ImportError
    )
    import datasets
    from lmms_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    said = [model.generate([picture, "what is this?"], max_tokens=8)[0] for picture in PICTURES]
    write_task(
        tmp_path,
        PICTURES,
        ["never said" if i in (1, 3) else text.partition("\n")[0].strip() for i, text in enumerate(said)],
    )
    result = evaluator.simple_evaluate(
        model=PackMedia(model),
        tasks=["looking"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result["results"]["looking"]["same,none"] == 0.5


@pytest.mark.full
def test_its_own_command_line_scores_a_pack(tmp_path):
    start = [sys.executable, "-c", "import lmms_eval.__main__"]
    tried = subprocess.run(start, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"lmms-eval's command line does not start here: {tried.stderr.strip().splitlines()[-1]}")
    pack, source = xfusion.load("emoji"), open_source("emoji:8")
    pictures = [source.picture(i, 32) for i in range(8)]
    said = [pack.generate([picture, "what is this?"], max_tokens=8)[0] for picture in pictures]
    write_task(tmp_path, pictures, [text.partition("\n")[0] if i % 4 else "never said" for i, text in enumerate(said)])
    asked = "--model xfusion --model_args pack=emoji --tasks looking --batch_size 4 --output_path out --include_path ."
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *asked.split()],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tmp_path.glob("out/**/*_results.json")
    assert json.loads(found.read_text())["results"]["looking"]["same,none"] == 0.75

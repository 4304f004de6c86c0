"""lm-evaluation-harness on a pack's text: the scores are the base's, by the harness's own class for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import make_model

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.run import evaluate

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


GROUP = """\
group: both
task: [colours, things]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def write_task(folder, name, count, step):
    """A task of the harness, and its file."""
    words = ["red", "apple", "green", "tree", "two", "birds", "house", "cat", "table", "small"]
    items = [
        {"question": f"a {words[i % 10]} {words[(step * i) % 10]}", "choices": [f" {words[(i + k) % 10]}" for k in range(4)],
         "answer": i % 4}
        for i in range(count)
    ]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{name}.jsonl"))
    return folder / f"{name}.yaml"


@pytest.mark.full
def test_scores_are_the_bases_own(bases, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-eval is not installed (extra eval): its scores are not compared"
    )
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = write_task(tmp_path, "colours", 24, 3)
    model = make_model(bases["llama"])
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=bases["llama"].model, tokenizer=bases["llama"].tokenizer, batch_size=1),
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    expected = theirs["results"]["colours"]
    for stack in ("base", "fused"):
        found = evaluate(model, "lm_eval", tasks=str(task), stack=stack)
        assert found["colours_acc"] == expected["acc,none"] and found["colours_acc_norm"] == expected["acc_norm,none"]
        assert found["settings"]["stack"] == stack and found["settings"]["lm_eval"]
    assert 0 < expected["acc,none"] < 1
    from xfusion.evaluation.adapters.lm_eval import PackText

    ours = lm_eval.simple_evaluate(
        model=PackText(model),
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    one, other = ([s["filtered_resps"] for s in r["samples"]["colours"]] for r in (theirs, ours))
    assert one == other, "every log-likelihood, to the bit"


@pytest.mark.full
def test_a_group_with_examples_scores_as_the_base_does_by_the_suite_and_by_the_harness(bases, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-eval is not installed (extra eval): its scores are not compared"
    )
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_task(tmp_path, "colours", 12, 3)
    write_task(tmp_path, "things", 20, 4)
    (tmp_path / "both.yaml").write_text(GROUP)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=bases["llama"].model, tokenizer=bases["llama"].tokenizer, batch_size=1),
        tasks=["both"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        num_fewshot=2,
        bootstrap_iters=0,
        log_samples=True,
        **dict.fromkeys(seeds, 0),
    )
    assert theirs["n-shot"]["colours"] == theirs["n-shot"]["things"] == 2
    (prompt, _) = theirs["samples"]["colours"][0]["arguments"][0]
    assert prompt.count("\n\n") == 2, "two examples stand before each item"
    expected = {
        f"{task}_{metric}": theirs["results"][task][f"{metric},none"]
        for task, metric in (("colours", "acc"), ("colours", "acc_norm"), ("things", "acc"), ("both", "acc"))
    }
    assert 0 < expected["both_acc"] == (12 * expected["colours_acc"] + 20 * expected["things_acc"]) / 32
    model = make_model(bases["llama"])
    found = evaluate(model, "lm_eval", tasks=str(tmp_path / "both.yaml"), shots=2)
    assert {name: found[name] for name in expected} == expected and found["settings"]["shots"] == 2

    model.save_pretrained(tmp_path / "pack")
    call = [sys.executable, "-m", "xfusion.evaluation.adapters.lm_eval", "--model", "xfusion"]
    call += ["--model_args", f"pack={tmp_path / 'pack'}", "--include_path", str(tmp_path), "--tasks", "both"]
    call += ["--num_fewshot", "2", "--seed", "0", "--output_path", str(tmp_path / "told.json")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    (file,) = tmp_path.glob("told*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    told = {
        f"{task}_{metric.removesuffix(',none')}": value for task in results for metric, value in results[task].items()
    }
    assert {name: told[name] for name in expected} == expected


def test_what_cannot_be_run_is_refused(bases):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    model = make_model(bases["llama"])
    with pytest.raises(XFusionError, match="name the tasks"):
        evaluate(model, "lm_eval")
    with pytest.raises(XFusionError, match=r"nowhere\.yaml is not there"):
        evaluate(model, "lm_eval", tasks="nowhere.yaml")
    with pytest.raises(XFusionError, match="neither 'base' nor 'fused'"):
        evaluate(model, "lm_eval", tasks="arc_easy", stack="both")


def test_each_filter_of_a_metric_is_a_score_of_its_own(bases, monkeypatch):
    """GSM8K scores the same answers by two filters; the second must not stand for both."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    results = {
        "alias": "sums",
        "exact_match,strict-match": 0.25,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,strict-match": "N/A",
        "acc,none": 0.75,
    }
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: {"results": {"sums": results}})
    found = evaluate(make_model(bases["llama"]), "lm_eval", tasks="sums")
    scores = {name: value for name, value in found.items() if name != "settings"}
    assert scores == {
        "sums_exact_match_strict-match": 0.25,
        "sums_exact_match_flexible-extract": 0.5,
        "sums_acc": 0.75,
    }

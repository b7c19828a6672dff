"""lm-evaluation-harness, run by its own environment's python: `python peers_lm_eval.py REQUEST.json`.

Reads {model, tasks: {name: JSON Lines of prompt, choices, answer}, document: JSON Lines of one text, window, items,
threads}; prints {"choices": {name: [{choice, choice_norm, loglikelihoods}]}, "word_perplexity": …, "versions": …} as
its last line. No network: tasks are given as configurations, data sets as files.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
import numpy as np
import torch

request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.set_num_threads(request["threads"])


def files(path: str) -> dict:
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": path}}, "test_split": "test"}


tasks = [
    files(path)
    | {"task": name, "output_type": "multiple_choice"}
    | {"doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer"}
    | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    for name, path in request["tasks"].items()
]
tasks.append(
    files(request["document"])
    | {"task": "document", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    | {"metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]}
)
found = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": request["model"], "dtype": "float32", "max_length": request["window"]},
    tasks=tasks,
    limit=request["items"],
    device="cpu",
    batch_size=1,
    bootstrap_iters=0,
)
choices: dict = {}
for name in request["tasks"]:
    for sample in sorted(found["samples"][name], key=lambda each: each["doc_id"]):
        likelihoods = np.array([float(answer[0]) for answer in sample["filtered_resps"]])
        lengths = np.array([len(choice) for choice in sample["doc"]["choices"]])
        row = {"choice": int(likelihoods.argmax()), "choice_norm": int((likelihoods / lengths).argmax())}
        right = sample["doc"]["answer"]
        said = {"acc": float(row["choice"] == right), "acc_norm": float(row["choice_norm"] == right)}
        if any(sample[metric] != value for metric, value in said.items()):
            sys.exit(f"{name}: lm-eval scores its own log-likelihoods of item {sample['doc_id']} differently")
        choices.setdefault(name, []).append(row | {"loglikelihoods": likelihoods.tolist()})
names = ("lm_eval", "transformers", "torch")
document = {key.split(",")[0]: value for key, value in found["results"]["document"].items()}
print(
    json.dumps(
        {
            "choices": choices,
            "word_perplexity": document["word_perplexity"],
            "byte_perplexity": document["byte_perplexity"],
            "versions": {name: version(name) for name in names},
        }
    )
)

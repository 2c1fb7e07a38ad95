"""lm-eval tasks on local JSON files: one of each kind that the harness has, about Python keywords."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    {"stem": "To leave a function write", "choices": ["return", "import", "class"], "answer": 0},
    {"stem": "To load a module write", "choices": ["return value", "import", "def"], "answer": 1},
    {"stem": "The opposite of True is", "choices": ["None", "not", "False"], "answer": 2},
]
TEXTS = [{"text": "def f(x):\n    return x\n"}, {"text": "import os\n" * 30}]
ANSWERS = [{"question": "import", "answer": " os"}, {"question": "class Node:", "answer": "\n"}]

CHOICE = """
task: keyword_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{stem}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
ROLLING = """
task: keyword_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
GENERATE = """
task: keyword_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [";"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""


def write_tasks(directory: Path) -> Path:
    """The YAML files and their data."""
    directory.mkdir(parents=True)
    for name, template, documents in (
        ("choice", CHOICE, QUESTIONS),
        ("rolling", ROLLING, TEXTS),
        ("generate", GENERATE, ANSWERS),
    ):
        data = directory / f"{name}.json"
        data.write_text("\n".join(json.dumps(document) for document in documents) + "\n")
        (directory / f"{name}.yaml").write_text(template.format(path=data))
    return directory

"""Run by vLLM's environment: its own server's parser reads command lines; prints what it understood, as JSON.

python vllm_parses.py LINES.json
"""

import json
import sys
from pathlib import Path

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
found = []
for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    given = parser.parse_args(words)
    validate_parsed_serve_args(given)
    names = ("model", "max_model_len", "max_num_seqs", "served_model_name", "speculative_config")
    found.append({name: getattr(given, name) for name in names})
sys.stdout.write(json.dumps(found) + "\n")

"""OpenVINO Model Server: the OpenVINO IR behind OpenAI's API, with continuous batching."""

from __future__ import annotations

import json
from typing import Any

from optikit.deploy.bundle import BATCH, ROOT, Bundle, Served, release

SUMMARY = "OpenVINO Model Server"
CHECKED = "IR loaded and decoded by OpenVINO; the graph of the server emitted only"
VERSION = "2026.4"
HERE = f"{ROOT}/serve/openvino"


def bundle(options: Any, served: Served) -> Bundle:
    """Return the server's configuration and the graph of its language model calculator."""
    name = options.name or served.name
    models = {"mediapipe_config_list": [{"name": name, "base_path": f"{HERE}/{name}"}], "model_config_list": []}
    return Bundle(
        image=options.image or f"openvino/model_server:{release(options.version, VERSION)}",
        arguments=("--config_path", f"{HERE}/config.json", "--rest_port", "8000"),
        port=8000,
        health="/v2/health/ready",
        api="openai",
        prefix="/v3",
        name=options.name or served.name,
        model=name,
        files={
            "config.json": json.dumps(models, indent=1) + "\n",
            f"{name}/graph.pbtxt": GRAPH % (0, (options.batch_size or BATCH)),
        },
        needs=("compiled/openvino",),
        limits=LIMITS,
        source="openvinotoolkit/model_server docs/llm/reference.md, src/llm/llm_calculator.proto",
    )


GRAPH = """input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {
    tag_index: 'LOOPBACK:0',
    back_edge: true
  }
  node_options: {
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {
      models_path: "/out/compiled/openvino"
      device: "CPU"
      cache_size: %d
      max_num_seqs: %d
    }
  }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler",
    options {
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {
        sync_set {
          tag_index: "LOOPBACK:0"
        }
      }
    }
  }
}
"""
LIMITS = (
    "Its API lies under /v3: /v3/chat/completions, /v3/completions.",
    "Drafts have to be OpenVINO IRs of their own; a speculator of this recipe isn't used.",
)

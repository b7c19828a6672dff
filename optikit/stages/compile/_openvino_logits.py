"""`python -m optikit.stages.compile._openvino_logits DIR TOKENS.npy LOGITS.npy`: run an IR, in float32 arithmetic.

A process of its own, because on a processor that OpenVINO can't use it ends by a signal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(directory: str, tokens: str, logits: str) -> None:
    """Write the logits of a text, (tokens, vocabulary) float32; with one thread the decoder computes in float32."""
    import numpy as np

    from optikit.runtime.decoders.openvino import OpenVinoDecoder

    decoder = OpenVinoDecoder(Path(directory), threads=1)
    np.save(logits, decoder.forward(np.load(tokens, allow_pickle=False), 0))
    sys.stdout.write(json.dumps({"dtype": decoder.dtype}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])

"""A model that chats, and whose answers depend on all of a prompt, behind `optikit serve`."""

import json
import shutil

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from optikit import runtime
from optikit.runtime.generate import TextGenerator
from tests.serve_process import KEY, Running

STRENGTH = 12
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def speaking(directory):
    """Let a random model write text that depends on all of a prompt.

    Its blocks outweigh the embedding of the last token, which it would else repeat for ever, and its head knows no
    token but those of printable characters: half a character at the end of a text isn't told.
    """
    path = directory / "model.onnx"
    model, by = onnx.load(str(path)), Tokenizer.from_file(str(directory / "tokenizer.json"))
    told = [text.isascii() and text.isprintable() and bool(text) for text in (by.decode([i]) for i in range(260))]
    changed = []
    for each in model.graph.initializer:
        if "_proj." in each.name or each.name.startswith("lm_head"):
            scale = STRENGTH if "_proj." in each.name else np.array(told, np.float32)
            each.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(each) * scale, each.name))
            changed.append(each.name)
    assert len(changed) == 1 + 2 * 5
    data = directory / "model.onnx.data"
    data.unlink()
    onnx.save(model, str(path), save_as_external_data=True, location=data.name)


@pytest.fixture(scope="module")
def chatting(tiny_onnx, tmp_path_factory):
    """A compiled directory whose model has a chat template."""
    directory = tmp_path_factory.mktemp("chatting") / "model"
    shutil.copytree(tiny_onnx, directory)
    speaking(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def server(chatting):
    running = Running(chatting, "--batch", "4", "--name", "tiny", "--queue", "40", OPTIKIT_API_KEY=KEY)
    yield running
    code, said = running.end()
    assert (code, said) == (0, "")


@pytest.fixture(scope="module")
def plain(chatting):
    """Return what plain decoding writes after a prompt."""
    decoder = runtime.load(chatting)
    generator = TextGenerator(decoder, chatting)

    def write(prompt, count):
        tokens = generator.encode(prompt, chat=False) if isinstance(prompt, str) else np.array(prompt)
        return generator.tokenizer.decode(list(decoder.greedy(tokens, count)), skip_special_tokens=True)

    return write

"""Sessions of EAGLE-3 drafters, against the drafter in torch and against directories that are something else."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit.algorithms.eagle3 import Batch, Eagle3, Shape, unrolled
from optikit.errors import IntegrityError, UsageError
from optikit.formats import eagle3 as files
from optikit.models.eagle3 import EMBEDDING, Drafter
from optikit.models.facts import ModelFacts
from optikit.runtime.speculation import eagle_session, rounded_layers
from optikit.runtime.speculation.eagle_session import EagleSession

VOCAB = 90


def described(**changes):
    given = {
        "hidden": 64,
        "intermediate": 96,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "target_hidden": 48,
        "vocab": VOCAB,
        "drafted": 30,
        "layers": (1, 2, 3),
        "eps": 1e-5,
        "rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        "context": 600,
        "norm_before_residual": False,
    }
    return Drafter(**given | changes)


def build(told):
    torch.manual_seed(0)
    names = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "drafted", "eps")
    drafter = Eagle3(
        Shape(fused=3 * told.target_hidden, **{name: getattr(told, name) for name in names}),
        embedding=torch.randn(VOCAB, told.hidden).bfloat16(),
        token_ids=torch.randperm(VOCAB)[: told.drafted].sort().values,
        inverse_frequencies=torch.tensor(told.frequencies()),
        norm_before_residual=told.norm_before_residual,
    )
    with torch.no_grad():
        for each in drafter.parameters():
            torch.nn.init.normal_(each, 1.0 if each.dim() == 1 else 0.0, 0.15)
            each.copy_(each.bfloat16())
        drafter.lm_head.weight.mul_(4).copy_(drafter.lm_head.weight.bfloat16())
    return drafter


def stored(drafter, told, dest, **changes):
    facts = ModelFacts(
        **dict.fromkeys(("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "weight_bytes"), 1),
        model_type="llama",
        vocab=VOCAB,
        max_positions=600,
        tied=False,
        dtype="BF16",
        linears={},
        traits=frozenset(),
        config={"architectures": ["LlamaForCausalLM"]},
    )
    tensors = {**drafter.state_dict(), EMBEDDING: drafter.embedding} | changes
    config = files.settings(told, facts, "base", 4)
    files.write(dest, config, tensors, drafter.token_ids, base="abc")
    return dest


def rounded(weight):
    """A weight as 8 bits per block of 32 along its rows leave it."""
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales).round() * scales).flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("before", [False, True])
def test_sessions_draft_what_torch_drafts(tmp_path, before, monkeypatch):
    monkeypatch.setattr(eagle_session, "CHUNK", 7)
    monkeypatch.setattr(rounded_layers, "LEVEL", 1)  # weights in 8 bits, inputs as they are
    told = described(norm_before_residual=before)
    drafter = build(told)
    session = EagleSession(stored(drafter, told, tmp_path / "eagle3"))
    assert (session.layers, session.width, session.vocab, session.base) == ((1, 2, 3), 48, VOCAB, "abc")
    with torch.no_grad():
        for each in drafter.parameters():
            each.copy_(rounded(each) if each.dim() > 1 else each)
    tokens, states = torch.randint(0, VOCAB, (40,)), torch.randn(40, 144)
    same = compared = 0
    for start, more in ((10, 1), (11, 2), (13, 4), (17, 9), (26, 10)):
        if start == 10:
            session.begin()
            session.read(tokens[1:11].numpy(), states[:10].numpy())
        best, prob = session.read(tokens[1 + start : 1 + start + more].numpy(), states[start : start + more].numpy())
        row = start + more - 1
        text = tokens.clone()
        for step in range(3):
            batch = Batch(tokens=text[None], states=states[None], rows=torch.tensor([[row]]), counts=torch.tensor([9]))
            with torch.no_grad():
                found = drafter.logits(unrolled(drafter, batch, step + 1)[step][0, 0]).softmax(-1)
            assert prob == pytest.approx(float(found.max()), abs=0.003)
            same += best == int(drafter.token_ids[found.argmax()])
            compared += 1
            if row + 2 + step < 40:
                text[row + 2 + step] = best
            if step < 2:
                best, prob = session.ahead(best)
    assert same == compared


def test_what_was_drafted_is_forgotten_when_text_comes(tmp_path):
    told = described()
    session = EagleSession(stored(build(told), told, tmp_path / "eagle3"))
    tokens, states = np.arange(20), np.random.default_rng(0).normal(size=(20, 144)).astype(np.float32)
    session.begin()
    session.read(tokens[:10], states[:10])
    plain = session.read(tokens[10:12], states[10:12])
    session.begin()
    session.read(tokens[:10], states[:10])
    for token in (5, 6, 7):
        session.ahead(token)
    assert session.read(tokens[10:12], states[10:12]) == plain


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("d2t", torch.full((30,), 200), "d2t leads row 0 to token 200, of 90"),
        ("d2t", -torch.arange(30), "leads two rows to one token"),
        ("t2d", torch.zeros(VOCAB, dtype=torch.bool), "t2d names 0 tokens"),
        ("fc.weight", torch.zeros(64, 96), r"fc.weight has shape \(64, 96\), config.json means \(64, 144\)"),
        ("norm.weight", None, "lacks tensor norm.weight"),
        (EMBEDDING, None, "lacks tensor embed_tokens.weight"),
    ],
)
def test_damaged_drafters_are_named(tmp_path, name, value, said):
    told = described()
    directory = stored(build(told), told, tmp_path / "eagle3")
    tensors = load_file(directory / "model.safetensors") | {name: value}
    save_file({key: each for key, each in tensors.items() if each is not None}, directory / "model.safetensors")
    with pytest.raises(IntegrityError, match=said):
        EagleSession(directory)


def test_directories_of_something_else_are_named(tmp_path):
    told = described()
    directory = stored(build(told), told, tmp_path / "eagle3")
    config = json.loads((directory / "config.json").read_text())
    for changes, said in (
        ({"speculators_model_type": "mtp"}, "speculators_model_type is 'mtp'"),
        ({"fc_norm": True}, "fc_norm is 'True', and this runtime computes False only"),
        ({"eagle_aux_hidden_state_layer_ids": [3, 1]}, "numbers of blocks are wanted, ascending"),
        ({"draft_vocab_size": "many"}, "draft_vocab_size is 'many'"),
        ({"transformer_layer_config": config["transformer_layer_config"] | {"num_hidden_layers": 2}}, "num_hidden"),
    ):
        (directory / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(IntegrityError, match=said):
            EagleSession(directory)
    shutil.rmtree(directory)
    with pytest.raises(IntegrityError, match="doesn't hold an EAGLE-3 drafter"):
        EagleSession(directory)


def test_other_widths_and_vocabularies_are_refused(tmp_path):
    told = described()
    session = EagleSession(stored(build(told), told, tmp_path / "eagle3"))
    session.require(width=48, vocab=VOCAB)
    with pytest.raises(UsageError, match="reads states of width 48 and knows 90 tokens; the model has width 64 and 90"):
        session.require(width=64, vocab=VOCAB)

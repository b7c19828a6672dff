"""Sessions of sequential heads, against the heads in torch and against files that aren't what they should be."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit.algorithms.medusa import MedusaHeads, draft_vocabulary
from optikit.errors import IntegrityError
from optikit.formats import medusa
from optikit.runtime.speculation.fingerprint import tensors_digest
from optikit.runtime.speculation.medusa_session import HeadSession

VOCAB, HIDDEN, WIDTH = 300, 48, 40


def build(*, shared=True, layers=1, drafted=120):
    """Heads that are unlike each other and sure of themselves, from embeddings as small as some models have them."""
    torch.manual_seed(0)
    ids = draft_vocabulary(torch.randint(0, VOCAB, (500,)), drafted, vocab=VOCAB)
    embedding = (0.02 * torch.randn(VOCAB, WIDTH)).to(torch.bfloat16)
    options = {"heads": 3, "layers": layers, "shared": shared, "token_ids": ids, "embedding": embedding}
    heads = MedusaHeads(0.4 * torch.randn(VOCAB, HIDDEN), **options)
    with torch.no_grad():
        for each in (*heads.blocks.parameters(), *heads.inputs.parameters()):
            each.normal_(0, 0.15)
    return heads


def stored(heads, path, **changes):
    """Write heads as the stage does; a change of None leaves a tensor out."""
    tensors = {**medusa.tensors(heads), **changes}
    own = {name: each.detach().contiguous() for name, each in tensors.items() if each is not None}
    save_file(own, path, {"format": "pt", "vocab": str(VOCAB), "base_sha256": "abc"})
    return path


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_sessions_guess_what_torch_guesses(tmp_path, shared, layers):
    heads = build(shared=shared, layers=layers)
    session = HeadSession(stored(heads, tmp_path / "heads.safetensors"))
    assert (session.heads, session.width, session.vocab, session.sequential) == (3, HIDDEN, VOCAB, True)
    states, newest = torch.randn(60, HIDDEN), torch.randint(0, VOCAB, (60,))
    expected, sure = heads.guess(states, newest)
    same, seen = 0, set()
    for t in range(60):
        tokens, probs = session(states[t].numpy(), int(newest[t]))
        agreed = tokens == expected[t].numpy()
        upto = 3 if agreed.all() else int(agreed.argmin())  # behind another draft, another text
        np.testing.assert_allclose(probs[:upto], sure[t, :upto], atol=0.05)
        same += upto
        seen.update(tokens.tolist())
    assert same >= 0.9 * 180  # near-ties may fall otherwise where weights are rounded
    assert len(seen) > 20


def test_the_newest_token_can_be_any(tmp_path):
    heads = build(drafted=16)
    session = HeadSession(stored(heads, tmp_path / "heads.safetensors"))
    state = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    outside = [token for token in range(VOCAB) if token not in heads.token_ids]
    told = {tuple(session(state.numpy(), token)[0].tolist()) for token in outside}
    assert len(told) > 5


def test_heads_side_by_side_do_not_look_at_the_newest_token(tmp_path):
    torch.manual_seed(0)
    heads = MedusaHeads(torch.randn(VOCAB, HIDDEN), heads=2)
    session = HeadSession(stored(heads, tmp_path / "heads.safetensors"))
    assert not session.sequential
    state = torch.randn(HIDDEN)
    first, second = (session(state.numpy(), token) for token in (1, 2))
    assert np.array_equal(first, second)
    assert first[0].tolist() == heads.guess(state[None])[0][0].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embedding": None}, "embedding"),
        ({"embedding.scales": None}, "embedding.scales"),
        ({"embedding.scales": torch.ones(7)}, "300 embeddings with 7 scales for 300 tokens"),
        ({"embedding": torch.ones(299, WIDTH, dtype=torch.int8)}, "299 embeddings with 300 scales"),
        ({"embedding": torch.ones(VOCAB, WIDTH - 1, dtype=torch.int8)}, "for 1 embeddings of width 39"),
        ({"input.1": None}, "input.1"),
        ({"input.2": torch.ones(2 * HIDDEN, WIDTH)}, r"input.2 has shape \(96, 40\) for 3 embeddings of width 40"),
    ],
)
def test_damaged_files_are_named(tmp_path, changes, said):
    path = stored(build(), tmp_path / "heads.safetensors", **changes)
    with pytest.raises(IntegrityError, match=f"doesn't hold Medusa heads: .*{said}"):
        HeadSession(path)


def test_embeddings_are_stored_within_half_a_level(tmp_path):
    heads = build()
    found = load_file(stored(heads, tmp_path / "heads.safetensors"))
    rows = heads.embedded(torch.arange(VOCAB))
    off = (found["embedding"] * found["embedding.scales"][:, None] - rows).abs()
    assert (off <= 0.5001 * rows.abs().amax(1, keepdim=True) / 127).all()
    assert float(rows.square().mean()) == pytest.approx(1, rel=1e-3)


def test_heads_that_changed_places_are_refused(tmp_path):
    torch.manual_seed(0)
    heads = MedusaHeads(torch.randn(VOCAB, HIDDEN), heads=2)
    with torch.no_grad():
        for each in heads.blocks.parameters():
            each.normal_()
    tensors = {name: each.detach().contiguous() for name, each in medusa.tensors(heads).items()}
    about = {"format": "pt", "vocab": str(VOCAB), "base_sha256": "abc"}
    about["tensors_sha256"] = tensors_digest({name: each.numpy() for name, each in tensors.items()})
    save_file(tensors, tmp_path / "heads.safetensors", about)
    assert HeadSession(tmp_path / "heads.safetensors").heads == 2
    permuted = tensors | {"0.0.weight": tensors["1.0.weight"], "1.0.weight": tensors["0.0.weight"].clone()}
    save_file({name: each.clone() for name, each in permuted.items()}, tmp_path / "heads.safetensors", about)
    with pytest.raises(IntegrityError, match="aren't those that were written under these names"):
        HeadSession(tmp_path / "heads.safetensors")

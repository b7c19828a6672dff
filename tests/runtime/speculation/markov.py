"""A language model of a few lines: the next token's logits are a table row chosen by the last two tokens."""

import numpy as np


class MarkovDecoder:
    """A real `Decoder`: keeps its context as a cache, cuts it to `position`, refuses gaps and overflow."""

    runtime = "toy"
    dtype = "float32"
    threads = 1

    def __init__(self, vocab=8, seed=0, spread=1.5, max_tokens=4096, states=8):
        self.vocab = vocab
        self.max_tokens = max_tokens
        self.table = np.random.default_rng(seed).normal(0, spread, (vocab + 1, vocab + 1, vocab)).astype(np.float32)
        self.basis = np.random.default_rng(seed + 1).normal(0, 1, (vocab, states)).astype(np.float32)
        self.cache = []
        self.windows = []

    def row(self, context):
        last, before = ([*context, self.vocab, self.vocab] if not context else [*context[::-1], self.vocab])[:2]
        return self.table[before, last]

    def forward(self, tokens, position, rows=None):
        assert len(tokens) >= 1
        assert 0 <= position <= len(self.cache), "a gap in the cache"
        assert position + len(tokens) <= self.max_tokens, "past the end of the cache"
        assert tokens.min() >= 0
        assert tokens.max() < self.vocab
        self.windows.append(len(tokens))
        self.cache = [*self.cache[:position], *tokens.tolist()]
        start = position if rows is None else position + len(tokens) - rows
        logits = [self.row(self.cache[: i + 1]) for i in range(start, len(self.cache))]
        self.states = np.stack(logits) @ self.basis
        return np.stack(logits)

    def hidden(self, row):
        return self.states[row]

    def greedy(self, prompt, new_tokens):
        text = prompt.tolist()
        for _ in range(new_tokens):
            text.append(int(self.row(text).argmax()))
            yield text[-1]


class Scripted:
    """Drafts by a function of the text so far: right, wrong, random or malicious as the test wants."""

    reads_hidden = False
    reads_features = False

    def __init__(self, guess):
        self.guess = guess

    def start(self, prompt):
        self.text = prompt.tolist()

    def extend(self, tokens, _hidden):
        self.text += tokens.tolist()

    def draft(self, limit, rng):
        from optikit.runtime.speculation.drafters import EMPTY, Draft

        tokens = np.array(self.guess(self.text, limit, rng)[:limit], np.int64)
        return Draft(tokens, "scripted") if len(tokens) else EMPTY


class MarkovBatch:
    """The same model with a cache for each of several texts; refuses two windows of one text."""

    runtime = "toy"

    def __init__(self, places, **kwargs):
        self.rows = [MarkovDecoder(**kwargs) for _ in range(places)]
        self.places, self.vocab, self.max_tokens = places, self.rows[0].vocab, self.rows[0].max_tokens
        self.forwards = []

    def forward(self, windows):
        places = [each.place for each in windows]
        assert len(set(places)) == len(places) > 0
        assert all(1 <= each.rows <= len(each.tokens) for each in windows)
        self.forwards.append(places)
        self.asked = places
        return [self.rows[place].forward(tokens, position, rows) for place, tokens, position, rows in windows]

    def hidden(self, window, row):
        return self.rows[self.asked[window]].hidden(row)

    def move(self, source, target):
        assert source != target
        self.rows[source], self.rows[target] = self.rows[target], self.rows[source]
        self.rows[source].cache = []

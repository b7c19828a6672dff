"""Acceptors: how much of a draft becomes text, and which token follows it.

`greedy`, `sample_match` and `rejection` are lossless: the text has exactly the distribution (at temperature 0, exactly
the tokens) that the model alone would have written. `typical` isn't, and has to be asked for.

An acceptor of your own is any object with `lossless` and `accept`; see `Acceptor`. It is handed the target's logits
after all penalties, so it has to know nothing of the loop around it. A package offers one by an entry point of group
`optikit.acceptors`: a function from the `Sampling` that is asked for, or None at temperature 0, to the acceptor; its
name is what `--acceptor` and `speculate: {acceptor: …}` take. `examples/acceptor` is such a package.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from optikit.errors import StageFailedError, UsageError
from optikit.runtime.decoder import Logits, Tokens

Probabilities = NDArray[np.float32]

RESIDUAL_MIN = 1e-9
"""A residual distribution with less mass is rounding error: p and q are equal there."""


class Acceptance(NamedTuple):
    """How many draft tokens are kept, and the token that the target adds after them."""

    accepted: int
    token: int


class Acceptor(Protocol):
    """Decides on a chain of draft tokens."""

    @property
    def lossless(self) -> bool:
        """Whether the text is distributed as the target's own."""
        ...

    def accept(
        self, draft: Tokens, draft_probs: Probabilities | None, target_logits: Logits, rng: np.random.Generator, /
    ) -> Acceptance:
        """Keep a prefix of the draft and add one token of the target's.

        Args:
            draft: (k,) token ids, k ≥ 0.
            draft_probs: (k, vocab): the distribution that each draft token was drawn from; None where the drafter put
                all its faith in the token it gave.
            target_logits: (k + 1, vocab): row i follows the first i draft tokens.
            rng: Source of all randomness.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """From logits to the distribution to draw from: temperature, then top-k, then top-p, as transformers orders them.

    Attributes:
        temperature: Above 0; temperature 0 is the `greedy` acceptor.
        top_k: Keep the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
        top_p: Keep the fewest likeliest tokens whose mass reaches this; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise UsageError(f"temperature {self.temperature} can't be sampled at", fix="use acceptor greedy for 0")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative", fix="use 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is outside (0, 1]", fix="use 1 to keep all tokens")

    def probabilities(self, logits: Logits) -> Probabilities:
        """Return the distribution (vocab,) of one row of logits.

        Raises:
            ValueError: The row has no finite maximum.
        """
        top = logits.max()
        if not np.isfinite(top):
            raise ValueError(f"the largest logit is {top}")
        scaled = (logits - top) / np.float32(self.temperature)
        if 0 < self.top_k < len(scaled):
            kth = np.partition(scaled, -self.top_k)[-self.top_k]
            scaled = np.where(scaled < kth, -np.inf, scaled)
        p = np.exp(scaled)
        p /= p.sum()
        return _nucleus(p, self.top_p) if self.top_p < 1 else p


def _nucleus(p: Probabilities, top_p: float) -> Probabilities:
    """Keep the fewest likeliest tokens whose mass reaches `top_p`.

    All tokens below (1 - top_p) / vocab together have less mass than 1 - top_p, so none of them is ever needed: only
    the others are sorted, a few hundred of fifty thousand.
    """
    candidates = np.flatnonzero(p >= (1 - top_p) / len(p))
    order = candidates[np.argsort(-p[candidates], kind="stable")]
    kept = order[: int(np.searchsorted(np.cumsum(p[order], dtype=np.float64), top_p)) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    out /= out.sum()
    return out


def draw(p: Probabilities, rng: np.random.Generator) -> int:
    """Draw from weights (vocab,) that need not sum to one; a token of weight zero never comes."""
    mass = np.cumsum(p, dtype=np.float64)
    return int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))


def overlap(p: Probabilities, q: Probabilities) -> float:
    """Return Σ min(p, q): how likely `rejection` keeps a token drawn from q (Leviathan et al., theorem 3.5)."""
    return float(np.minimum(p, q).sum())


def _argmax(logits: Logits) -> NDArray[np.int64]:
    """Return the likeliest token of each row.

    Raises:
        ValueError: A row has no finite maximum; argmax stops at the first NaN, so looking there is enough.
    """
    best: NDArray[np.int64] = logits.argmax(axis=1)
    if len(best) == 1 and math.isfinite(logits[0, best[0]]):  # every token of plain decoding: a tenth of the time
        return best
    top = logits[np.arange(len(best)), best]
    if not np.isfinite(top).all():
        raise ValueError(f"the largest logit is {top[~np.isfinite(top)][0]}")
    return best


@dataclass(frozen=True)
class Greedy:
    """Temperature 0: keep what equals the target's argmax."""

    lossless: ClassVar[bool] = True

    def accept(
        self, draft: Tokens, _draft_probs: Probabilities | None, target_logits: Logits, _rng: np.random.Generator, /
    ) -> Acceptance:
        """Keep the longest prefix that the target would have written itself; see `Acceptor.accept`."""
        best = _argmax(target_logits)
        if not len(draft):
            return Acceptance(0, int(best[0]))
        wrong = np.flatnonzero(draft != best[:-1])
        accepted = int(wrong[0]) if len(wrong) else len(draft)
        return Acceptance(accepted, int(best[accepted]))


@dataclass(frozen=True)
class SampleMatch:
    """Draw from the target at every position; the draft is kept as long as it says the same.

    Any temperature, and no draft probabilities needed: equal to `Rejection` for drafts that were not drawn. vLLM and
    TGI accept the drafts of Medusa heads and lookups this way.
    """

    sampling: Sampling
    lossless: ClassVar[bool] = True

    def accept(
        self, draft: Tokens, _draft_probs: Probabilities | None, target_logits: Logits, rng: np.random.Generator, /
    ) -> Acceptance:
        """Draw y ~ p; go on while y is the draft's token; see `Acceptor.accept`."""
        for i, token in enumerate(draft):
            drawn = draw(self.sampling.probabilities(target_logits[i]), rng)
            if drawn != token:
                return Acceptance(i, drawn)
        return Acceptance(len(draft), draw(self.sampling.probabilities(target_logits[-1]), rng))


@dataclass(frozen=True)
class Rejection:
    """Speculative sampling: Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318.

    Keeps more than `SampleMatch` where the drafter's own distribution is known and close to the target's.
    """

    sampling: Sampling
    lossless: ClassVar[bool] = True

    def accept(
        self, draft: Tokens, draft_probs: Probabilities | None, target_logits: Logits, rng: np.random.Generator, /
    ) -> Acceptance:
        """Keep x ~ q with probability min(1, p(x)/q(x)), else draw from norm(max(0, p - q)); see `Acceptor.accept`.

        Raises:
            ValueError: A draft token has probability 0 under the distribution that it is said to be drawn from.
        """
        for i, token in enumerate(draft):
            p = self.sampling.probabilities(target_logits[i])
            q_token = 1.0 if draft_probs is None else float(draft_probs[i, token])
            if q_token <= 0:
                raise ValueError(f"draft token {token} at position {i} has probability {q_token} in its own draft")
            if rng.random() * q_token < p[token]:
                continue
            return Acceptance(i, draw(_residual(p, token, None if draft_probs is None else draft_probs[i]), rng))
        return Acceptance(len(draft), draw(self.sampling.probabilities(target_logits[-1]), rng))


def _residual(p: Probabilities, token: int, q: Probabilities | None) -> Probabilities:
    """Return max(0, p - q) unnormalized, q = None being certain of `token`; p itself where only rounding is left."""
    if q is None:
        rest = p.copy()
        rest[token] = 0
    else:
        rest = np.maximum(p - q, 0)
    return rest if rest.sum() > RESIDUAL_MIN else p


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance (Cai et al., arXiv:2401.10774, section 2.3.1): LOSSY.

    Keeps a token if p(token) > min(ε, δ exp(-H(p))): likely enough for how sure the target is. The text is no longer
    the target's: it follows the drafter wherever that is plausible.
    """

    sampling: Sampling
    epsilon: float = 0.09
    delta: float = 0.3
    lossless: ClassVar[bool] = False

    def accept(
        self, draft: Tokens, _draft_probs: Probabilities | None, target_logits: Logits, _rng: np.random.Generator, /
    ) -> Acceptance:
        """Keep what is typical, then add the target's likeliest token; see `Acceptor.accept`."""
        accepted = 0
        for i, token in enumerate(draft):
            p = self.sampling.probabilities(target_logits[i])
            entropy = -float(np.sum(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))))
            if p[token] <= min(self.epsilon, self.delta * np.exp(-entropy)):
                break
            accepted += 1
        return Acceptance(accepted, int(_argmax(target_logits[accepted : accepted + 1])[0]))


SAMPLERS: Mapping[str, type[SampleMatch | Rejection | Typical]] = {
    "sample_match": SampleMatch,
    "rejection": Rejection,
    "typical": Typical,
}
NAMES = ("greedy", *SAMPLERS)


GROUP = "optikit.acceptors"
"""Entry points of other packages' acceptors."""
DRAWING = ("sample_match", "rejection")
"""Acceptors that are `greedy` at temperature 0."""


def make(name: str, sampling: Sampling | None = None, *, allow_lossy: bool = False) -> Acceptor:
    """Return the acceptor of a name.

    Args:
        name: One of `NAMES`, or what an installed package calls its own.
        sampling: Distribution to sample from; None is temperature 0.
        allow_lossy: The author accepts that the text will not be the model's own.

    Raises:
        UsageError: Unknown name, a lossy one that wasn't allowed, or sampling where there is none to do.
    """
    if name == "greedy":
        if sampling is not None:
            raise UsageError("acceptor greedy doesn't sample", fix="use rejection or sample_match, or no temperature")
        return Greedy()
    acceptor = SAMPLERS[name](sampling or Sampling()) if name in SAMPLERS else _installed(name, sampling)
    if not (acceptor.lossless or allow_lossy):
        message = f"acceptor {name} is lossy: its text is not the model's own"
        raise UsageError(message, fix="set allow_lossy: true or --allow-lossy to accept that, or use rejection")
    return acceptor


def kept(name: str, sampling: Sampling | None = None) -> Acceptor:
    """Return the acceptor that a recipe chose, as far as it applies: greedy draws nothing, and some only draw.

    Args:
        name: What the recipe says; that it may be lossy was asked there.
        sampling: Distribution to sample from; None is temperature 0.

    Raises:
        UsageError: It comes with a package that isn't installed any more.
    """
    if sampling is None:
        return Greedy() if name in ("greedy", *DRAWING) else make(name, allow_lossy=True)
    return make("rejection" if name == "greedy" else name, sampling, allow_lossy=True)


def offered() -> dict[str, EntryPoint]:
    """Return the acceptors of installed packages, by name."""
    return {each.name: each for each in entry_points(group=GROUP)}


def _installed(name: str, sampling: Sampling | None) -> Acceptor:
    """Return an acceptor of another package.

    Raises:
        UsageError: No package offers one of that name, or what it offers is none.
    """
    found = offered()
    if name not in found:
        raise UsageError(f"there is no acceptor {name!r}", fix=f"use {', '.join((*NAMES, *sorted(found)))}")
    where = found[name].value
    try:
        made: Any = found[name].load()(sampling)
        whole = callable(made.accept) and isinstance(made.lossless, bool)
    except Exception as error:  # it is anybody's program
        message = f"acceptor {name} of {where} can't be had: {type(error).__name__}: {error}"
        raise UsageError(message, fix="see the package that brings it") from error
    if not whole:
        message = f"acceptor {name} of {where} has no `lossless` that is true or false"
        raise UsageError(message, fix="see the package that brings it")
    return Foreign(name, where, made)


@dataclass(frozen=True)
class Foreign:
    """An acceptor of another package; whatever it does wrong is told with its name.

    Attributes:
        name: What it is called.
        where: Module and function that made it.
        made: What they made.
    """

    name: str
    where: str
    made: Acceptor

    @property
    def lossless(self) -> bool:
        """What it says of itself; `optikit run` compares its texts with plain decoding's."""
        return self.made.lossless

    def accept(
        self, draft: Tokens, draft_probs: Probabilities | None, target_logits: Logits, rng: np.random.Generator, /
    ) -> Acceptance:
        """Ask it, and check what it answers; see `Acceptor.accept`.

        Raises:
            StageFailedError: It fails, keeps more than was drafted, or adds a token that there is none of.
        """
        try:
            accepted, token = self.made.accept(draft, draft_probs, target_logits, rng)
            found = Acceptance(operator.index(accepted), operator.index(token))
        except Exception as error:
            raise self._failure(f"failed: {type(error).__name__}: {error}") from error
        if not (0 <= found.accepted <= len(draft) and 0 <= found.token < target_logits.shape[1]):
            vocab = target_logits.shape[1]
            said = f"kept {found.accepted} of {len(draft)} draft tokens and added token {found.token} of {vocab}"
            raise self._failure(said)
        return found

    def _failure(self, said: str) -> StageFailedError:
        fix = "mend it: it keeps a beginning of the draft, and adds one token"
        return StageFailedError(f"acceptor {self.name} of {self.where} {said}", fix=fix)

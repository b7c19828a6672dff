"""Roofline floors: how fast a model could at best run on a target, and what a token would cost at that speed.

Decoding reads every weight once per step and the whole key-value cache: bytes over bandwidth, or at large batch work
over rate. Prefill multiplies: work over rate. Real engines are slower; a floor says what no engine on that hardware
can beat, and is labelled so. What the target's row leaves open stays None.
"""

from __future__ import annotations

from dataclasses import dataclass

from optikit.models import traits
from optikit.models.facts import ModelFacts
from optikit.targets.target import Target


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What serving takes at least.

    Attributes:
        batch, length: Sequences at once, and tokens in each.
        weight_bytes, kv_bytes: Weights as stored, and the key-value cache when all sequences are full.
        memory_bytes: Memory of the target.
        decode_seconds: One decoding step, which yields `batch` tokens.
        prefill_seconds: Reading prompts of `length` tokens, `batch` of them.
        usd_per_million_output_tokens: Price of decoding `priced_batch` sequences of `priced_length` at their floor.
        priced_batch, priced_length: Sequences at once and tokens in each: the same whatever is asked about a stack.
        price_source: Where the price per hour was read.
    """

    batch: int
    length: int
    weight_bytes: int
    kv_bytes: int
    memory_bytes: int | None
    decode_seconds: float | None
    prefill_seconds: float | None
    usd_per_million_output_tokens: float | None
    priced_batch: int
    priced_length: int
    price_source: str

    @property
    def fits(self) -> bool | None:
        """Weights and cache are smaller than the memory; None where that isn't known."""
        return None if self.memory_bytes is None else self.weight_bytes + self.kv_bytes < self.memory_bytes


PRICED_BATCH = 16
"""Sequences at once that tokens are priced at, where so many fit: whoever pays for a machine keeps it busy."""
PRICED_LENGTH = 2048
"""Tokens in each of them, where the model has so many positions."""


def floors(facts: ModelFacts, target: Target, *, batch: int = 1, length: int = 2048) -> Floors:
    """Return the floors of serving a model on a whole target, split over all of its accelerators."""
    kv_bytes = cache_bytes(facts, batch=batch, length=length)
    priced_length = min(PRICED_LENGTH, facts.max_positions or PRICED_LENGTH)
    priced_batch = _priced_batch(facts, target, length=priced_length)
    priced = decode_floor(facts, target, batch=priced_batch, length=priced_length)
    return Floors(
        batch=batch,
        length=length,
        weight_bytes=facts.weight_bytes,
        kv_bytes=kv_bytes,
        memory_bytes=target.memory_bytes,
        decode_seconds=decode_floor(facts, target, batch=batch, length=length),
        prefill_seconds=prefill_floor(facts, target, batch=batch, length=length),
        usd_per_million_output_tokens=price_per_million(target.usd_per_hour, priced_batch / priced if priced else None),
        priced_batch=priced_batch,
        priced_length=priced_length,
        price_source=target.price_source,
    )


def _priced_batch(facts: ModelFacts, target: Target, *, length: int) -> int:
    """Return the largest power of two up to `PRICED_BATCH` whose caches fit beside the weights; one if none does."""
    batch = PRICED_BATCH
    while batch > 1 and not _fits(facts, target, batch=batch, length=length):
        batch //= 2
    return batch


def _fits(facts: ModelFacts, target: Target, *, batch: int, length: int) -> bool:
    needed = facts.weight_bytes + cache_bytes(facts, batch=batch, length=length)
    return target.memory_bytes is None or needed < target.memory_bytes


def cache_bytes(facts: ModelFacts, *, batch: int, length: int) -> int:
    """Return the bytes of a 16-bit key-value cache; a sliding window bounds it."""
    return facts.kv_cache_bytes(min(length, facts.sliding_window or length), batch=batch)


def decode_floor(facts: ModelFacts, target: Target, *, batch: int = 1, length: int = 2048) -> float | None:
    """Return the least seconds of one decoding step: the longer of reading the bytes and doing the work.

    An embedding that isn't also the output head is looked up, not read through.
    """
    if target.bandwidth_gb_s is None:
        return None
    looked_up = 0 if facts.tied else 2 * facts.vocab * facts.hidden
    weights = max(facts.first_bytes - looked_up, 0) * read_share(facts, batch)
    read = weights + cache_bytes(facts, batch=batch, length=length)
    work = 2 * batch * (facts.active_elements + facts.vocab * facts.hidden)
    return max(
        read / (target.bandwidth_gb_s * 1e9 * target.count), work / (operations_per_second(facts, target) or 1e99)
    )


def read_share(facts: ModelFacts, tokens: int) -> float:
    """Return the share of a model's weights that so many tokens read together: not the experts that none chooses."""
    unread = facts.linear_elements - facts.read_elements(tokens)
    return 1 - unread / facts.parameters


def prefill_floor(facts: ModelFacts, target: Target, *, batch: int = 1, length: int = 2048) -> float | None:
    """Return the least seconds of reading prompts: multiplications and additions, over the dense peak rate."""
    rate = operations_per_second(facts, target)
    return None if rate is None else prefill_operations(facts, batch=batch, length=length) / rate


def operations_per_second(facts: ModelFacts, target: Target) -> float | None:
    """Return the dense peak rate of a whole target.

    Eight-bit activations run at the int8 rate; everything else is multiplied in 16 bits, whatever its storage.
    """
    rate = target.bf16_tflops or target.fp16_tflops
    if target.int8_tops is not None and any(row.integer_products for row in traits.of(facts.traits)):
        rate = target.int8_tops
    return None if rate is None else rate * 1e12 * target.count


def prefill_operations(facts: ModelFacts, *, batch: int, length: int) -> int:
    """Count the operations of a prompt: two per weight and token, causal attention, and the head at the last token."""
    linear = 2 * facts.active_elements * length
    window = min(length, facts.sliding_window or length)
    seen = window * (window + 1) // 2 + window * (length - window)
    attention = 4 * facts.layers * facts.heads * facts.head_dim * seen
    return batch * (linear + attention + 2 * facts.vocab * facts.hidden)


def price_per_million(usd_per_hour: float | None, tokens_per_s: float | None) -> float | None:
    """Return US dollars per million tokens.

    >>> price_per_million(3.6, 1000.0)
    1.0
    >>> price_per_million(None, 1000.0) is None
    True
    """
    if usd_per_hour is None or not tokens_per_s:
        return None
    return usd_per_hour / 3600 / tokens_per_s * 1e6


def told(found: Floors, target: Target) -> list[str]:
    """Return floors as lines for people; what isn't known is left out."""
    room = "" if found.memory_bytes is None else f" of {found.memory_bytes / 1e9:.1f} GB"
    lines = [
        f"serving on {target.name}, batch {found.batch}, {found.length} tokens (floors by roofline, not measured)",
        f"  memory   weights {found.weight_bytes / 1e9:.2f} GB + cache {found.kv_bytes / 1e9:.2f} GB{room}",
    ]
    if found.fits is False:
        lines[-1] += ": doesn't fit"
    if found.decode_seconds is not None:
        rate = found.batch / found.decode_seconds
        lines.append(f"  decode   at least {1e3 * found.decode_seconds:.3g} ms a step, at most {rate:.4g} tokens/s")
    if found.prefill_seconds is not None:
        prompts = f"{found.batch} × {found.length}" if found.batch > 1 else f"{found.length}"
        lines.append(f"  prefill  at least {1e3 * found.prefill_seconds:.3g} ms for {prompts} tokens")
    if price := price_words(found):
        lines.append(f"  price    {price}")
    return lines


def price_words(found: Floors) -> str:
    """Write the price of a token with the batch and the length that it holds for; "" where it isn't known."""
    if found.usd_per_million_output_tokens is None:
        return ""
    price = f"${found.usd_per_million_output_tokens:.3g} per million output tokens"
    return f"{price} at batch {found.priced_batch}, {found.priced_length} tokens ({found.price_source})"

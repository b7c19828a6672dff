"""Speculative decoding: the loop, who drafts, who accepts, and how long a draft pays."""

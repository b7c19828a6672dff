"""Names of the files of a compiled directory; whoever only runs it imports nothing heavier."""

from __future__ import annotations

VERIFY = "verify.onnx"
"""A second graph of the same model beside the first, where there is one: for several tokens at once."""

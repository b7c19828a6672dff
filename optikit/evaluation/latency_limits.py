"""What a request must keep to be good: apart from the report's other types, for a recipe names nothing else of them."""

from __future__ import annotations

from pydantic import ConfigDict

from optikit.described import Described


class Limits(Described):
    """What a request must keep to be good, ms; null is no limit."""

    model_config = ConfigDict(allow_inf_nan=False)

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return (self.ttft_ms, self.tpot_ms, self.e2e_ms) != (None, None, None)

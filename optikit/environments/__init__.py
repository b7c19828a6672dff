"""Managed virtual environments for libraries that can't share one with optikit.

    environment = ensure("autoawq", store)             # built on first use, milliseconds afterwards
    with use("autoawq", store) as environment:         # the same, and `optikit env gc` leaves it alone meanwhile
        program.run([str(environment.python), …])

A stage that names one (`ENVIRONMENT = "autoawq"`) needs nothing of this: the runner starts its worker in that
interpreter, with optikit on its path and nothing else of the main environment. So whatever such a stage imports has to
live on the standard library and what its lock has; every lock has pydantic and packaging for optikit's own sake.

To add one: a row in environments.toml, `locks/NAME.in`, and `locks/NAME.txt` made from it by the command that
environments.toml begins with.
"""

from __future__ import annotations

from optikit.environments.build import ensure, use
from optikit.environments.definition import Definition, find, names
from optikit.environments.environment import Environment, locate

__all__ = ["Definition", "Environment", "ensure", "find", "locate", "names", "use"]

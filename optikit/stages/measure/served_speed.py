"""Speed of models as vLLM serves them, timed in turns: as `speed`, with a server in place of a loaded model.

Every arm's server stays up while the others answer, one request at a time; what several at a time see is measured by
`served`. The baseline is the untouched model on a server of its own, so that a ratio is the stages', not the server's.

Paper   as `speed`
Hurts   memory: every server holds its model and its cache
Cost    a start of vLLM per arm, and the answers
Differs times are those of a client: HTTP is part of them
"""

from __future__ import annotations

from optikit.stage import no_objection
from optikit.stages.measure import served, speed

SUMMARY = "TTFT, TPOT and memory of result and baseline as vLLM serves them, in interleaved pairs"
NEEDS = speed.NEEDS
WRITES = "measurement"
USES_TARGET = False
LIBRARIES = served.LIBRARIES
ENVIRONMENT = served.ENVIRONMENT
inputs = speed.inputs
fits = no_objection

Options = speed.Options
check = speed.check
estimate = speed.estimate
after = speed.after
run = speed.run

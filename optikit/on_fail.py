"""What a failed gate does to a run (`on_fail:`): stop it where it failed, or go back to the last step that passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optikit import evaluate, gates
from optikit.errors import GateFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optikit.plan import Plan, Step
    from optikit.store.store import Artifact


def stop_at_gate(plan: Plan, finished: Step, artifacts: Mapping[str, Artifact]) -> None:
    """End the run if a step was measured that fails a gate with `on_fail: stop`.

    Raises:
        GateFailedError: Naming step, gate, value and limit.
    """
    made = next((step for step in plan.steps if step.key == finished.source and step.verb != "acquire"), None)
    if made is None or finished.method != "quality":
        return
    judged = evaluate.judge(plan.until(made.name), artifacts, on_fail="stop")
    failed = [gates.said(result, made.name) for result in judged if result.verdict == "fail"]
    if failed:
        fix = "change that step or the gate; `on_fail: keep_going` would measure the rest. Finished steps are kept"
        raise GateFailedError(f"stopped after {made.name}: {'; '.join(failed)}", fix=fix)


def roll_back(plan: Plan, artifacts: Mapping[str, Artifact]) -> tuple[Plan, str]:
    """Return the plan that ends with the last step that passes all gates with `on_fail: rollback`, and why it does.

    Raises:
        GateFailedError: Not one step passes them.
    """
    made = [step for step in plan.steps if step.verb not in ("acquire", "speculate")]
    if not any(gates.asked(plan.recipe.gates, "rollback")):
        return plan, ""
    failed: list[str] = []
    for step in reversed(made):
        judged = evaluate.judge(plan.until(step.name), artifacts, on_fail="rollback")
        if judged and all(result.value is None for result in judged):
            continue  # emitted: nothing was measured of it
        wrong = [gates.said(result, step.name) for result in judged if result.verdict == "fail"]
        if not wrong:
            ended = f"Rolled back to {step.name}: " + "; ".join(failed)
            return (plan.until(step.name), ended + ".") if failed else (plan, "")
        failed.append(f"after {step.name} {', '.join(wrong)}")
    if not failed:
        return plan, ""
    fix = "use milder stages, or another limit; finished steps are kept"
    raise GateFailedError(f"no step passes, so nothing is left to roll back to: {'; '.join(failed)}", fix=fix)

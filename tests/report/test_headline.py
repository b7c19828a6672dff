"""The sentence above a report: it claims what was measured, and says so where something wasn't."""

from __future__ import annotations

import io
from dataclasses import dataclass
from xml.etree import ElementTree as ET

import pytest

from optikit.evaluation.results import Quality, Ratio, Speedup, TaskResult, TasksVerdict
from optikit.report import figures, gates, github, html, junit, markdown, summary, task_table, wording
from optikit.report.headline import headline


def changed(report, **values):
    """Return a report with other values of its result."""
    return report.model_copy(update={"result": report.result.model_copy(update=values)})


def with_ratio(report, ratio, ci95, **bounds):
    perplexity = report.result.quality.perplexity.model_copy(update={"ratio": ratio, "ratio_ci95": ci95})
    limits = {"gates": {"perplexity_ratio": bounds} if bounds else {}}
    quality = report.result.quality.model_copy(update={"perplexity": perplexity})
    return changed(report, quality=quality).model_copy(update={"recipe": report.recipe | limits})


def timed(report, value, ci95, verdict, floor=0.02):
    ratio = Ratio(value=value, ci95=ci95, noise_floor=floor, verdict=verdict)
    return report.model_copy(update={"speedup": Speedup(decode=ratio)})


def decode(report):
    return next(f for group in figures.groups(report) for f in group.figures if f.key == "decode")


def test_it_is_a_sentence_for_a_manager(full_report):
    assert headline(full_report) == "SmolLM2-135M-Instruct is 5.21× faster and 3.39× smaller at 1.12× perplexity"


def test_it_says_what_was_not_measured(thin_report):
    assert headline(thin_report) == "Tiny is 3.08× smaller; its speed and quality were not measured"


def test_an_interval_that_spans_one_is_undetermined(full_report):
    report = timed(full_report, 1.98, (0.89, 3.39), "no measurable change")
    assert "is of undetermined speed (37.1 → 193 tok/s, 0.89–3.39×) and" in headline(report)
    assert (decode(report).change, decode(report).tone) == ("undetermined", "same")
    narrow = timed(full_report, 1.0, (0.998, 1.003), "no measurable change")
    assert "is as fast as before and" in headline(narrow)
    assert decode(narrow).change == "unchanged"


def test_a_change_below_the_machine_s_noise_is_undetermined(full_report):
    report = timed(full_report, 1.03, (1.01, 1.05), "no measurable change", floor=0.08)
    assert "1.01–1.05×, within this machine's noise of ±8.0 %)" in headline(report)


def test_slower_is_said(full_report):
    report = timed(full_report, 0.5, (0.48, 0.52), "slower")
    assert "is 2.00× slower and" in headline(report)
    assert decode(report).tone == "worse"


def test_size_that_hardly_moved_is_unchanged(full_report):
    assert "the same size" in headline(changed(full_report, size_bytes=full_report.baseline.size_bytes + 100))


IDLE = ", 1.00× predicted"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (96_500_000, "1.22× smaller than the 92.0 MiB file that it came in"),
        (79_300_000, "as large as the 75.6 MiB file that it came in"),
        (60_000_000, "1.32× larger than the 57.2 MiB file that it came in"),
    ],
)
def test_size_is_told_against_the_packed_file_too(full_report, file, said):
    report = full_report.model_copy(update={"model": full_report.model | {"source_bytes": file}})
    assert f"3.39× smaller than unpacked at 1.12× perplexity; {said}" in headline(report)
    (figure,) = [f for group in figures.groups(report) for f in group.figures if f.label == "Size against its file"]
    assert figure.result == "75.6 MiB"


@pytest.mark.parametrize("given", ["x", -1, 0, True, None, [5]])
def test_a_report_from_elsewhere_may_say_anything_of_its_file(full_report, given):
    report = full_report.model_copy(update={"model": full_report.model | {"source_bytes": given}})
    assert headline(report) == headline(full_report)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"max": 20}, "at 14.8× perplexity (its gate allows 20.0×)"),
        ({"min": 1.5}, "(no gate limits it)"),
        ({}, "no gate"),
    ],
)
def test_a_pass_that_only_a_lax_gate_gives_is_no_tick(full_report, bounds, said):
    report = with_ratio(full_report, 14.8, (14.1, 15.6), **bounds)
    assert said in headline(report)
    assert gates.mark(report) == "lax"
    assert "✓ pass" not in shown(report)
    assert markdown.render(report).startswith("## ⚠️")
    assert '<span class="verdict lax">' in html.render(report)
    assert github.commands(report)[-1].startswith("::warning")


def test_a_loss_within_reason_is_a_pass(full_report):
    assert gates.mark(full_report) == "pass"
    assert shown(full_report).lstrip().startswith("✓ pass")


def test_quality_whose_interval_spans_one_is_told_with_it(full_report):
    assert "at 1.02× perplexity (0.95–1.10×)" in headline(with_ratio(full_report, 1.02, (0.95, 1.10)))


def shown(report):
    """Return what the terminal is told, without styles."""
    from pathlib import Path

    lines = summary._lines(report, Path("/nowhere"), 100)
    return "\n".join("".join(words for words, _ in line) for line in lines)


def test_green_needs_an_interval_that_excludes_one(full_report):
    for report in (full_report, timed(full_report, 1.98, (0.89, 3.39), "no measurable change")):
        for figure in (f for group in figures.groups(report) for f in group.figures):
            if figure.tone == "better":
                low, high = (float(end) for end in figure.interval.removesuffix("×").split("–"))
                assert not low <= 1 <= high, figure
    better = {f.key for group in figures.groups(full_report) for f in group.figures if f.tone == "better"}
    assert better == {"decode", "prefill"}, "the others were measured without an interval"


@dataclass
class Task:
    before: float
    after: float
    items: int
    change_ci95: tuple[float, float]
    detectable: float
    p_worse: float = 0.5

    def reports(self, report, name="exact", conclusion="no measurable loss", worse=()):
        common = {"protocol": "text-1@40", "kind": "text", "items": self.items, "accuracy_ci95": (0.0, 1.0)}
        before = TaskResult.model_validate(common | {"accuracy": self.before})
        change = {"change": self.after - self.before, "change_ci95": self.change_ci95, "detectable": self.detectable}
        change |= {"lost": 1, "won": 2, "p_worse": self.p_worse, "accuracy": self.after}
        verdict = TasksVerdict(
            change=self.after - self.before,
            change_ci95=self.change_ci95,
            p_worse=self.p_worse,
            worse=worse,
            conclusion=conclusion,
        )
        after = Quality(runtime="x", tasks={name: TaskResult.model_validate(common | change)}, tasks_verdict=verdict)
        baseline = report.baseline.model_copy(update={"quality": Quality(runtime="x", tasks={name: before})})
        return changed(report, quality=after).model_copy(update={"baseline": baseline})


def test_nothing_right_before_means_that_a_loss_could_not_show(full_report):
    """40 SQL questions of which the baseline answers none: 5 % after it is neither a gain nor "no loss"."""
    report = Task(before=0.0, after=0.05, items=40, change_ci95=(-0.032, 0.127), detectable=0.099).reports(full_report)
    assert f"; exact 0.0 % → 5.0 % ({task_table.FLOOR})" in headline(report)
    assert task_table.sentence(report).startswith("Undetermined: the baseline has too little right for a loss to show:")
    assert "quality" not in headline(report).partition("not measured")[0].rpartition(";")[2]


@pytest.mark.parametrize(
    ("task", "conclusion", "said", "sentence"),
    [
        (Task(0.5, 0.52, 200, (-0.03, 0.07), 0.1), "no measurable loss", "undetermined", "No measurable loss"),
        (Task(0.5, 0.6, 200, (0.03, 0.17), 0.1), "no measurable loss", "better", "Better"),
        (Task(0.5, 0.3, 200, (-0.3, -0.1), 0.1), "worse", "worse", "Worse on exact"),
    ],
)
def test_task_scores_are_in_the_headline(full_report, task, conclusion, said, sentence):
    report = task.reports(full_report, conclusion=conclusion, worse=("exact",) if said == "worse" else ())
    assert f"exact 50.0 % → {100 * task.after:.1f} % ({said})" in headline(report)
    assert task_table.sentence(report).startswith(f"{sentence}:")
    assert task_table.rows(report)[0].tone == {"better": "better", "worse": "worse", "undetermined": "same"}[said]


def test_of_many_tasks_the_mean_is_told(full_report):
    report = Task(0.5, 0.45, 200, (-0.1, 0.0), 0.1).reports(full_report)
    for side in ("baseline", "result"):
        part = getattr(report, side)
        tasks = {f"t{i}": task for i in range(3) for task in part.quality.tasks.values()}
        quality = part.quality.model_copy(update={"tasks": tasks})
        report = report.model_copy(update={side: part.model_copy(update={"quality": quality})})
    assert "; 3 tasks −5.0 points on average (undetermined)" in headline(report)


MEDUSA = {"method": "medusa", "chosen": "lookup"}
USED = {"steps": 3, "drafted": 9, "accepted": 4}


@pytest.mark.parametrize(
    ("speculation", "said"),
    [
        (
            MEDUSA | {"by_drafter": {"ngram": USED, "lookup": USED}},
            f"drafts by n-grams of earlier answers and prompt lookup; Medusa: not used{IDLE}",
        ),
        ({"method": "draft", "chosen": "lookup", "by_drafter": {"lookup": USED}}, f"Draft model: not used{IDLE}"),
        ({"method": "medusa", "chosen": "off"}, f"nothing drafts, for it doesn't pay here; Medusa: not used{IDLE}"),
        (
            MEDUSA | {"chosen": "medusa", "by_drafter": {"medusa": {"steps": 0}, "lookup": USED}},
            f"Medusa: not used{IDLE}",
        ),
        ({"method": "lookup", "chosen": "lookup"}, "drafts by prompt lookup"),
    ],
)
def test_what_drafts_is_named_and_what_does_not(full_report, speculation, said):
    assert headline(full_report.model_copy(update={"speculation": speculation})).endswith(f"; {said}")


def test_heads_that_draft_are_used(full_report):
    used = MEDUSA | {"chosen": "medusa", "by_drafter": {"medusa": USED}}
    report = full_report.model_copy(update={"speculation": used})
    assert headline(report).endswith("; drafts by Medusa heads")
    step = report.steps[0].model_copy(update={"verb": "speculate", "method": "medusa"})
    assert wording.step_note(report, step) == ""
    idle = report.model_copy(update={"speculation": MEDUSA, "steps": (step,)})
    assert wording.step_note(idle, step) == "not used"
    assert wording.what_was_done(idle) == "speculate medusa (not used)"
    assert "<small>not used</small>" in html.render(idle)


@pytest.mark.parametrize("by", [None, [], "x", {"lookup": 5}, {"lookup": {"steps": "many"}}, {5: {}}])
@pytest.mark.parametrize("method", [None, 5, ["medusa"], "medusa"])
@pytest.mark.parametrize("chosen", [None, 5, [], "off", "medusa"])
def test_speculation_of_a_report_from_elsewhere_may_be_anything(full_report, by, method, chosen):
    given = {"by_drafter": by, "method": method, "chosen": chosen}
    assert headline(full_report.model_copy(update={"speculation": given})).startswith("SmolLM2")


def test_emitted_is_a_verdict_that_every_rendering_knows(emitted_report):
    assert gates.sentence(emitted_report) == "Emitted, not judged: nothing was compiled, measured or gated."
    assert shown(emitted_report).lstrip().startswith("→ emitted, not judged")
    assert markdown.render(emitted_report).startswith("## 📦")
    assert "**emitted, not judged**" in markdown.render(emitted_report)
    assert '<span class="verdict emitted">' in html.render(emitted_report)
    assert [line.split(" ")[0] for line in github.commands(emitted_report)] == ["::notice"]
    suite = ET.fromstring(junit.render(emitted_report))  # noqa: S314 - our own output
    (case,) = [case for case in suite.iter("testcase") if case.get("classname") == "verdict"]
    assert case.find("skipped").get("message") == gates.EMITTED
    assert all("pass" not in words for words in (shown(emitted_report), markdown.render(emitted_report)))


def test_a_model_and_its_baseline_that_both_guess_get_no_tick(full_report):
    vocab = {"vocab": 18}
    report = full_report.model_copy(update={"model": full_report.model | vocab})
    assert gates.mark(report) == "lax"
    assert "; it guesses, and so does the model that it was made from" in headline(report)


def test_the_terminal_gets_it_without_colour_elsewhere(full_report, emitted_report, monkeypatch, tmp_path):
    for report in (full_report, emitted_report):
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        summary.show(report, tmp_path)
        assert headline(report).split(" ")[0] in stream.getvalue()
        assert "\x1b" not in stream.getvalue()

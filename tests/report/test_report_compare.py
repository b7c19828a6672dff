"""`optikit diff` and `optikit report`: what is compared, what is refused, what a manager is told."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation.results import Ratio
from optikit.report import compare, write
from optikit.report.compare import Run


def with_perplexity(report, **changed):
    quality = report.result.quality
    perplexity = quality.perplexity.model_copy(update=changed)
    result = report.result.model_copy(update={"quality": quality.model_copy(update={"perplexity": perplexity})})
    return report.model_copy(update={"result": result})


def with_decode(report, value, ci95, floor=0.02):
    ratio = Ratio(value=value, ci95=ci95, noise_floor=floor, verdict="faster")
    speed = report.result.speed.model_copy(update={"decode_tokens_per_s": 37.1 * value})
    return report.model_copy(
        update={
            "speedup": report.speedup.model_copy(update={"decode": ratio}),
            "result": report.result.model_copy(update={"speed": speed}),
        }
    )


def lines(a, b):
    return {line.key: line for line in compare.compare(a, b).lines}


def test_a_run_is_no_different_from_itself(full_report):
    found = compare.compare(Run(name="a", report=full_report), Run(name="b", report=full_report))
    assert {line.outcome for line in found.lines} == {"no measurable difference", "not tested"}
    assert found.refused == ()
    assert found.sentence.startswith(
        "b is of undetermined speed against a (0.95–1.05×) and is the same size; no difference in quality"
    )


def test_other_protocols_are_refused_by_name(full_report):
    other = with_perplexity(full_report, protocol="text-aaaa@2048x4")
    found = compare.compare(Run(name="a", report=full_report), Run(name="b", report=other))
    (refusal,) = found.refused
    labels, _, why = refusal.partition(": ")
    assert labels == "Perplexity; KL divergence, mean; Top-1 agreement"
    assert why == "different protocols: text-3f9a12cd@512x16 and text-aaaa@2048x4"
    assert "can't be compared" in found.sentence
    refused = [line for line in found.lines if line.outcome == "not compared"]
    assert all(line.ratio is None and line.ci95 is None for line in refused)


@pytest.mark.parametrize(
    ("change", "why"), [({"model": {"vocab": 1}}, "different tokenizers"), ({}, "the text gives 8176 and 8000")]
)
def test_other_tokenizers_are_refused(full_report, change, why):
    other = full_report.model_copy(update=change) if change else with_perplexity(full_report, tokens=8000)
    line = lines(Run(name="a", report=full_report), Run(name="b", report=other))["perplexity"]
    assert line.outcome == "not compared"
    assert why in line.how


def test_windows_are_paired_where_their_likelihoods_are_known(full_report):
    """A difference of 2 % that unpaired intervals can't show: windows differ much more than models."""
    draw = np.random.default_rng(0)
    nll = draw.normal(3, 0.5, (16, 1)) + draw.normal(0, 1, (16, 511))
    worse = nll + math.log(1.02) + draw.normal(0, 0.02, (16, 1))
    a, b = (Run(name=n, report=full_report, nll=values) for n, values in (("a", nll), ("b", worse)))
    line = lines(a, b)["perplexity"]
    assert line.outcome == "worse"
    assert line.how == "paired over 16 windows, bootstrap"
    assert line.ratio == pytest.approx(math.exp((worse - nll).mean()))
    assert line.ci95[0] > 1
    assert lines(b, a)["perplexity"].outcome == "better"
    short = Run(name="b", report=full_report, nll=worse[:8])
    assert "no longer in the store" in lines(a, short)["perplexity"].how


def test_without_raw_values_the_intervals_are_combined_and_it_is_said(full_report):
    better = with_perplexity(full_report, value=18.4, ratio=1.01, ratio_ci95=(1.0, 1.02))
    line = lines(Run(name="a", report=full_report), Run(name="b", report=better))["perplexity"]
    assert line.outcome == "better"
    assert line.ratio == pytest.approx(1.01 / 1.1201)
    assert "too wide" in line.how
    bare = with_perplexity(full_report, ratio=None, ratio_ci95=None)
    line = lines(Run(name="a", report=full_report), Run(name="b", report=bare))["perplexity"]
    assert (line.outcome, line.ci95) == ("not tested", None)


def test_a_speed_difference_below_the_noise_floor_is_none(full_report):
    faster = with_decode(full_report, 5.6, (5.55, 5.65))
    steady = with_decode(full_report, 5.4, (5.35, 5.45))
    assert lines(Run(name="a", report=steady), Run(name="b", report=faster))["decode"].outcome == "better"
    noisy = with_decode(full_report, 5.6, (5.55, 5.65), floor=0.08)
    assert (
        lines(Run(name="a", report=steady), Run(name="b", report=noisy))["decode"].outcome == "no measurable difference"
    )


@pytest.mark.parametrize(
    ("where", "change", "outcome", "why"),
    [
        ("host", {"cpu": "Other CPU"}, "not tested", "different machines"),
        ("model", {"source": "other"}, "not tested", "different models"),
        ("speed", {"threads": 4}, "not compared", "different numbers of threads"),
        ("speed", {"new_tokens": 32}, "not compared", "different lengths: 128 + 64 and 128 + 32 tokens"),
    ],
)
def test_what_was_timed_differently_is_not_called_faster(full_report, where, change, outcome, why):
    if where == "speed":
        speed = full_report.result.speed.model_copy(update=change)
        other = full_report.model_copy(update={"result": full_report.result.model_copy(update={"speed": speed})})
    else:
        other = full_report.model_copy(update={where: {**getattr(full_report, where), **change}})
    line = lines(Run(name="a", report=full_report), Run(name="b", report=other))["decode"]
    assert line.outcome == outcome
    assert line.ci95 is None
    assert why in line.how


ratios = st.floats(min_value=0.2, max_value=5)
spreads = st.floats(min_value=0.001, max_value=0.3)


@given(ratios, spreads, ratios, spreads)
def test_a_quotient_is_wider_than_either_side_and_turns_around(a, da, b, db):
    one, other = (a, (a * (1 - da), a * (1 + da))), (b, (b * (1 - db), b * (1 + db)))
    value, (low, high) = compare._quotient(one, other)
    assert value == pytest.approx(b / a)
    assert low < value < high
    for centre, (bottom, top) in (one, other):
        assert math.log(high / low) >= math.log(top / bottom) * 0.7
        assert bottom < centre < top
    back, ends = compare._quotient(other, one)
    assert back == pytest.approx(1 / value)
    assert ends == (pytest.approx(1 / high), pytest.approx(1 / low))


def test_raw_likelihoods_come_out_of_the_store(full_report, tmp_path):
    from optikit.store.store import Manifest, Store

    store = Store(tmp_path / "store")
    key = "ab" * 32
    values = np.linspace(1, 2, 16 * 511).reshape(16, 511)
    staging = store.staging(key)
    np.save(staging / "nll.npy", values)
    store.commit(key, staging, Manifest(key=key, verb="measure", method="quality"))
    measure = full_report.measures[0].model_copy(update={"name": "measure-quality-3-compile-onnxruntime", "key": key})
    report = full_report.model_copy(update={"measures": (measure,)})
    assert np.array_equal(compare.stored_nll(report, store), values)
    assert compare.stored_nll(full_report, store) is None
    assert compare.stored_nll(full_report.model_copy(update={"steps": ()}), store) is None
    (store.find(key).path / "nll.npy").write_bytes(b"damaged")
    assert compare.stored_nll(report, Store(tmp_path / "store")) is None


def optikit(*arguments, home):
    script = (
        "import sys, typer\n"
        "from optikit.cli.diff import diff\nfrom optikit.cli.report import report\n"
        "from optikit.errors import OptikitError\n"
        "app = typer.Typer(pretty_exceptions_enable=False)\n"
        "app.command()(diff); app.command()(report)\n"
        "try:\n    app()\n"
        "except OptikitError as error:\n"
        "    sys.stderr.write(f'{error.message} | {error.fix}'); sys.exit(int(error.code))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={
            "OPTIKIT_HOME": str(home),
            "PATH": "",
            "PYTHONPATH": str(Path(compare.__file__).parents[2]),
            "PYTHONUTF8": "1",
        },
    )


@pytest.fixture
def outs(full_report, tmp_path):
    write.write(full_report, tmp_path / "a")
    write.write(with_decode(full_report, 6.4, (6.3, 6.5)), tmp_path / "b")
    write.write(with_perplexity(full_report, protocol="text-aaaa@2048x4"), tmp_path / "p")
    return tmp_path


def test_diff_prints_a_sentence_a_table_and_the_tests(outs):
    done = optikit("diff", outs / "a", outs / "b", home=outs / "home")
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    assert f"{outs}/b writes 1.23× faster than {outs}/a and is the same size" in words
    assert "no difference in quality could be measured" in words
    assert "Decode speed" in words


def test_diff_speaks_json_and_markdown(outs):
    done = optikit("diff", outs / "a", outs / "b", "--json", home=outs / "home")
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    decode = next(metric for metric in found["metrics"] if metric["key"] == "decode")
    assert decode["outcome"] == "better"
    assert decode["ci95"][0] > 1
    done = optikit("diff", outs / "a", outs / "b", "--markdown", home=outs / "home")
    assert "| Decode speed |" in done.stdout
    assert optikit("diff", outs / "a", outs / "b", "--json", "--markdown", home=outs / "home").returncode == 2


def test_diff_refuses_other_protocols_with_exit_code_2_after_the_rest(outs):
    done = optikit("diff", outs / "a", outs / "p", "--json", home=outs / "home")
    assert done.returncode == 2
    assert "text-3f9a12cd@512x16 and text-aaaa@2048x4 | measure both on the same text" in done.stderr
    assert json.loads(done.stdout)["refused"]


def test_diff_of_what_is_no_run(outs):
    done = optikit("diff", outs / "a", outs / "missing", home=outs / "home")
    assert done.returncode == 66
    assert "no such report" in done.stderr


def test_report_renders_again_from_the_json_alone(outs):
    for name in ("report.md", "report.html"):
        (outs / "a" / name).unlink()
    done = optikit("report", outs / "a", "--junit", outs / "junit.xml", home=outs / "home")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "5.21× faster" in done.stderr
    assert (outs / "a" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "<testsuites" in (outs / "junit.xml").read_text(encoding="utf-8")
    assert json.loads(optikit("report", outs / "a", "--json", home=outs / "home").stdout)["verdict"] == "pass"

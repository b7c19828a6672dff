"""How models lie on Neuron cores: the worked examples, the libraries' sharding of heads, and the edges of the fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.stages.compile import neuron
from optikit.stages.compile._neuron_options import Options
from optikit.targets import rows
from optikit.targets.neuron import Shapes, degrees, fitting, medusa_bytes, place, resident, sharding, told, widest
from tests.shapes import llama2_7b, llama2_70b

TRN1, INF2 = rows()["trn1.32xlarge"], rows()["inf2.48xlarge"]
PAIR = (llama2_70b(), llama2_7b())


def test_llama_sizes_are_the_published_ones():
    assert round(llama2_70b().parameters / 1e9, 2) == 68.98
    assert round(llama2_7b().parameters / 1e9, 2) == 6.74


@pytest.mark.parametrize(("dtype", "fits", "host"), [("bfloat16", (16, 32), 200e9), ("float32", (32,), 360e9)])
def test_the_worked_examples_of_llama_2_70b_with_a_7b_draft(dtype, fits, host):
    shapes = Shapes(dtype=dtype, length=2048)
    assert fitting(TRN1, PAIR, shapes) == fits
    assert place(32, PAIR, shapes).host_bytes == pytest.approx(host, rel=0.03)


def test_all_24_cores_of_inf2_hold_the_pair_with_padded_heads():
    assert fitting(INF2, PAIR, Shapes(length=2048)) == (24,)
    placed = place(24, PAIR, Shapes(length=2048))
    assert [(each.sharding.heads, each.sharding.kv_heads) for each in placed.residents] == [(72, 24), (48, 48)]
    lines = told(placed, INF2, PAIR, ("model", "draft"), (24,))
    assert "64 heads padded to 72: 11% of attention; 8 key-value heads become 24: cache × 3" in lines[1]
    assert "32 heads padded to 48: 33% of attention" in lines[2]


def gqa(heads, kv_heads, degree):
    """gqa.py of NxD Inference, told anew: strategy first, then counts."""
    padded = heads + (0 if heads % degree == 0 else degree - heads % degree)
    strategy = "replicate" if degree % kv_heads == 0 else "mha"
    if heads == kv_heads:
        return padded, padded
    if kv_heads < degree or kv_heads % degree != 0:
        return padded, degree if strategy == "replicate" else padded
    return padded, kv_heads


@given(kv_heads=st.integers(1, 64), group=st.integers(1, 16), degree=st.sampled_from([1, 2, 4, 8, 16, 24, 32, 64]))
def test_heads_are_shared_out_as_the_library_does_it(kv_heads, group, degree):
    found = sharding(kv_heads * group, kv_heads, degree)
    assert (found.heads, found.kv_heads) == gqa(kv_heads * group, kv_heads, degree)
    assert found.heads % degree == found.kv_heads % degree == 0
    assert found.heads % found.kv_heads == 0  # every core's query heads find their key-value head


def test_what_padding_adds_is_what_the_padded_model_has_more():
    """The same model written with the padded heads has exactly as many weights more."""
    model, shapes = llama2_70b(), Shapes(length=2048)
    found = resident(model, 24, shapes)
    width = model.head_dim * found.sharding.heads
    shorter = model.head_dim * found.sharding.kv_heads
    shapes_there = {"q_proj": (width, 8192), "k_proj": (shorter, 8192), "v_proj": (shorter, 8192)}
    shapes_there["o_proj"] = (8192, width)
    linears = {name: shapes_there.get(name.rsplit(".", 1)[1], shape) for name, shape in model.linears.items()}
    padded = replace(model, linears=linears, heads=found.sharding.heads, kv_heads=found.sharding.kv_heads)
    assert found.weight_bytes + found.padding_bytes == 2 * padded.parameters
    assert found.cache_bytes == padded.kv_cache_bytes(2048)


def test_dtype_quantization_ties_and_packing_decide_the_weights():
    model = llama2_7b()
    size = {dtype: resident(model, 8, Shapes(dtype=dtype)).weight_bytes for dtype in ("float32", "bfloat16")}
    assert size["float32"] == 2 * size["bfloat16"] == 4 * model.parameters
    int8 = resident(model, 8, Shapes(quantized=True)).weight_bytes
    assert int8 == model.linear_elements + 2 * (model.parameters - model.linear_elements)
    packed = replace(model, traits=frozenset({"fp8_static"}), weight_bytes=7_000_000_000)
    assert resident(packed, 8, Shapes(dtype="float32")).weight_bytes == 7_000_000_000
    tied = replace(model, tied=True)
    assert resident(tied, 8, Shapes()).weight_bytes == resident(model, 8, Shapes()).weight_bytes  # cloned there


def test_a_cache_in_float32_is_twice_as_large_and_grows_with_batch_and_length():
    model = llama2_7b()
    base = resident(model, 8, Shapes(batch=1, length=512)).cache_bytes
    assert resident(model, 8, Shapes(batch=4, length=4096)).cache_bytes == 32 * base
    assert resident(model, 8, Shapes(dtype="float32", length=512)).cache_bytes == 2 * base


def test_memory_has_to_be_more_than_the_need():
    placed = place(1, (llama2_7b(),), Shapes(length=16))
    at = replace(INF2, core_memory_gb=placed.need_bytes / 1e9)
    assert placed.fits(at) is False
    assert placed.fits(replace(INF2, core_memory_gb=(placed.need_bytes + 1000) / 1e9)) is True
    assert placed.fits(replace(INF2, core_memory_gb=None)) is None


def test_medusa_heads_are_counted_with_a_block_on_every_core():
    model = llama2_7b()
    one = medusa_bytes(model, 1, 1, Shapes())
    assert one == 2 * (32000 * 4096 + 4096 * 4096 + 4096)
    assert medusa_bytes(model, 3, 8, Shapes()) == 3 * (one + 7 * 2 * (4096 * 4096 + 4096))
    placed = place(8, (model,), Shapes(), medusa_heads=3)
    assert placed.need_bytes - place(8, (model,), Shapes()).need_bytes == placed.heads_bytes > 0
    assert any(line.startswith("  heads ") for line in told(placed, INF2, (model,), ("model",), (8,)))


def test_what_does_not_fit_says_so():
    small = rows()["inf2.xlarge"]
    assert fitting(small, PAIR, Shapes()) == ()
    lines = told(place(2, PAIR, Shapes()), small, PAIR, ("model", "draft"), ())
    assert lines[-2].endswith("fits at no tensor_parallel here")
    assert lines[-1].endswith("more than there is")


def test_degrees_that_no_page_documents_are_powers_of_two():
    assert degrees(rows()["trn3"]) == (1, 2, 4)
    assert degrees(INF2) == (1, 2, 4, 8, 24)


def test_without_padding_the_largest_degree_divides_the_heads():
    assert widest(rows()["trn2.48xlarge"], llama2_7b()) == 32  # of 64 cores
    assert widest(INF2, llama2_70b()) == 8
    assert all(llama2_70b().heads % widest(row, llama2_70b()) == 0 for row in rows().values() if row.device == "neuron")


def test_a_part_has_its_share_of_everything():
    eight = INF2.part(8)
    assert eight.memory_bytes == 128e9
    assert (eight.copies(8), INF2.copies(8)) == (1, 3)
    assert eight.bandwidth_gb_s == pytest.approx(INF2.bandwidth_gb_s * INF2.count / 3)
    assert eight.usd_per_hour == pytest.approx(INF2.usd_per_hour / 3)


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", 1), ("float32", 2)])
def test_what_the_instance_holds_has_the_dtype_that_is_compiled_in(dtype, times):
    facts = llama2_7b()
    assert neuron.after(Options(dtype=dtype), facts).weight_bytes == 2 * times * facts.parameters

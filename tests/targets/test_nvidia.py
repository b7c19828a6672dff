"""What `nvidia-smi` prints on real machines, read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.app import doctor
from optikit.targets import nvidia

H200 = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.65.06              Driver Version: 580.65.06      CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
"""
T4 = """\
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 470.57.02    Driver Version: 470.57.02    CUDA Version: 11.4     |
|-------------------------------+----------------------+----------------------+
"""
VERSIONS = """\
NVIDIA-SMI version  : 570.86.15
NVML version        : 570.86
DRIVER version      : 570.86.15
CUDA Version        : 12.8
"""
MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-b4895dbf-9350-2524-a89b-98161ddd9fe4)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 3g.20gb     Device  1: (UUID: MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-d37ba2e8-8a2f-4a5b-9d3b-08c52a0f3b1d)
"""


@pytest.mark.parametrize(
    ("page", "version", "cuda"),
    [(H200, "580.65.06", (13, 0)), (T4, "470.57.02", (11, 4)), (VERSIONS, "570.86.15", (12, 8))],
)
def test_a_driver_tells_its_version_and_what_it_runs(page, version, cuda):
    assert nvidia.driver(page) == nvidia.Driver(version=version, cuda=cuda)


def test_no_driver_is_read_out_of_what_a_missing_one_says():
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that it is running."
    assert nvidia.driver(said) is None
    assert (
        nvidia.driver("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.86")
        is None
    )


def test_gpus_are_read_also_where_fields_are_missing():
    rows = "NVIDIA H200, 9.0, 143771, Disabled\nTesla T4, 7.5, 15360, [N/A]\nTesla K80, [N/A], [Not Supported], [N/A]\n"
    h200, t4, k80 = nvidia.gpus(rows)
    assert h200 == nvidia.Gpu(name="NVIDIA H200", capability=(9, 0), memory_mib=143771)
    assert (t4.capability, t4.memory_mib, t4.mig) == ((7, 5), 15360, False)
    assert (k80.capability, k80.memory_mib) == ((0, 0), 0)
    assert nvidia.gpus("No devices were found\n") == ()


@given(st.text())
def test_whatever_is_printed_is_read_without_an_error(text):
    nvidia.driver(text)
    nvidia.mig_profiles(text)
    assert all(gpu.memory_mib >= 0 for gpu in nvidia.gpus(text.replace("\0", "")))


@pytest.mark.parametrize(
    ("rows", "target"),
    [
        ("NVIDIA H200, 9.0, 143771, Disabled", "h200"),
        ("NVIDIA A100-SXM4-80GB, 8.0, 81920, Disabled", "a100-80"),
        ("NVIDIA A100-SXM4-40GB, 8.0, 40960, Disabled", "a100-40"),
        ("Tesla T4, 7.5, 15360, [N/A]", "t4"),
        ("NVIDIA L40S, 8.9, 46068, [N/A]", "l40s"),
        ("NVIDIA A10G, 8.6, 23028, [N/A]", "a10g"),
    ],
)
def test_a_gpu_is_found_in_the_catalogue(rows, target):
    told = doctor.gpus_told(nvidia.Driver(version="580.65.06", cuda=(13, 0)), rows, "")
    assert told.status == "ok"
    assert f"target {target}" in told.detail.split("; ")


def test_several_gpus_are_an_instance_of_as_many():
    found = nvidia.gpus("NVIDIA H100 80GB HBM3, 9.0, 81559, Disabled\n" * 8)
    names = doctor.nvidia_targets(found)
    from optikit.targets import rows

    assert names
    assert {rows()[name].count for name in names} in ({8}, {1})  # a row of eight, or of the GPU alone


def test_instances_of_a_gpu_are_told():
    told = doctor.gpus_told(
        nvidia.Driver(version="525.60.13", cuda=(12, 0)), "NVIDIA A100-SXM4-40GB, 8.0, 40960, Enabled", MIG
    )
    assert (told.status, bool(told.fix)) == ("warn", True)
    assert "MIG instances: 3g.20gb, 3g.20gb" in told.detail


def test_a_gpu_that_is_in_no_catalogue_is_told_as_it_is():
    found = nvidia.gpus("NVIDIA GeForce RTX 5090, 12.0, 32607, [N/A]")
    assert doctor.nvidia_targets(found) == ()

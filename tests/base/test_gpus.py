"""The table of accelerators: names as drivers give them, and what is not in it."""

import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.gpus import GIB, GPUS, find_gpu, recognise_gpu


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),  # another card, which the table does not have
        ("NVIDIA A10G", None),  # Amazon's, with half of the A10's bf16 rate
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", None),
    ],
)
def test_devices_are_recognised_by_their_drivers_name(device_name, name):
    assert recognise_gpu(device_name) == name


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        find_gpu("h300")
    assert "h300" in str(error.value) and all(name in str(error.value) for name in GPUS)


def test_a_cpu_has_the_memory_of_this_machine():
    assert find_gpu("CPU").memory > 0.1 * GIB and find_gpu("H200").memory == 141 * GIB

"""Which implementation runs: the choice is logged once, and what cannot run says why."""

import logging
import os

import pytest
import torch
from mrpo_kernels import backend, combine_logps, sequence_logps, virtual_reference

MODES = {"epsilon_max": 0.1, "clip": "adaptive", "ref_weights": "confidence", "aggregate": "harmonic"}


def inputs(dtype=torch.float32):
    return torch.ones(4, 8, dtype=dtype), torch.ones(11, 8, dtype=dtype), torch.arange(4), torch.tensor([0, 2, 4])


def references(*dtypes):
    return [list(tensors) for tensors in zip(*map(inputs, dtypes), strict=True)]


def test_auto_on_a_cpu_is_torch_and_logged_once(caplog):
    backend._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="mrpo_kernels.backend"):
        for _ in range(3):
            sequence_logps(*inputs())
    assert [record.getMessage() for record in caplog.records] == [
        "log-prob kernels: torch for torch.float32 on cpu (the tensors are on the CPU)"
    ]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_triton_on_a_cpu_says_why_it_cannot_run():
    for call in (
        lambda: sequence_logps(*inputs(), impl="triton"),
        lambda: virtual_reference(*references(torch.float32), **MODES, impl="triton"),
        lambda: combine_logps(-torch.ones(2, 3, 2), **MODES, impl="triton"),
    ):
        with pytest.raises(RuntimeError, match="on the CPU and TRITON_INTERPRET is not 1"):
            call()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_an_interpreter_flag_that_came_too_late_is_an_error(monkeypatch):
    import triton  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="set after triton had been imported"):
        sequence_logps(*inputs(), impl="triton")


def test_triton_refuses_dtypes_it_cannot_take():
    with pytest.raises(ValueError, match="float64 is not one of"):
        sequence_logps(*inputs(torch.float64), impl="triton")
    with pytest.raises(ValueError, match=r"several dtypes \(torch.bfloat16, torch.float32\)"):
        virtual_reference(*references(torch.float32, torch.bfloat16), **MODES, impl="triton")
    got = virtual_reference(
        *references(torch.float32, torch.bfloat16), **MODES, impl="auto"
    )  # torch takes each as it is
    assert got.ref_logps_KP2.shape == (2, 1, 2)


@pytest.mark.parametrize(
    "capability, dtype, width, expected",
    [
        ((9, 0), torch.bfloat16, 64, "triton"),
        ((8, 0), torch.float16, 64, "triton"),
        ((7, 5), torch.float16, 64, "torch"),
        ((9, 0), torch.bfloat16, 63, "torch"),
        ((9, 0), torch.float32, 64, "torch"),
        ((9, 0), torch.float64, 64, "torch"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, capability, dtype, width, expected):
    """What `auto` decides from, without the device: a matrix that says it is on one."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    matrix = torch.zeros(4, width, dtype=dtype).as_subclass(OnGpu)
    assert backend.resolve_impl("auto", [matrix, matrix]) == expected


def test_more_references_than_the_kernel_holds():
    """The finishing kernel has one variant, for up to 64 of them: more are torch's under auto, and an error under triton."""
    many_KP2 = -torch.rand(backend.MAX_REFERENCES + 1, 3, 2)
    assert torch.equal(combine_logps(many_KP2, **MODES).ref_logps_KP2, many_KP2)
    with pytest.raises(ValueError, match="65 references' and the kernel combines at most 64"):
        combine_logps(many_KP2, **MODES, impl="triton")


def test_misfits_are_errors():
    hidden, weight, labels, cu_seqlens = references(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="one entry per reference"):
        virtual_reference(hidden, weight[:1], labels, cu_seqlens, **MODES)
    with pytest.raises(ValueError, match="one entry per reference"):
        virtual_reference([], [], [], [], **MODES)
    with pytest.raises(ValueError, match="same 2P responses"):
        virtual_reference(hidden, weight, labels, [cu_seqlens[0], torch.tensor([0, 1, 2, 3, 4])], **MODES)
    with pytest.raises(ValueError, match="reference 1: hidden"):
        virtual_reference(hidden, [weight[0], weight[1][:, 1:]], labels, cu_seqlens, **MODES)
    for key, value in (("clip", "hard"), ("aggregate", "median"), ("ref_weights", "equal"), ("ref_weights", [1.0])):
        with pytest.raises(ValueError, match=key):
            virtual_reference(hidden, weight, labels, cu_seqlens, **MODES | {key: value})
        with pytest.raises(ValueError, match=key):
            combine_logps(-torch.ones(2, 3, 2), **MODES | {key: value})
    with pytest.raises(ValueError, match=r"\[references, pairs, 2\]"):
        combine_logps(-torch.ones(2, 3), **MODES)

"""What keys ask of the machine: bf16 on processors with and without instructions for it."""

import logging

import pytest
import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config import hardware
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.recipe import parse


@pytest.fixture
def processor(monkeypatch, caplog):
    """Pretends a processor with such instructions, or without any, and no GPU."""

    def pretend(instructions):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(hardware, "bf16_instructions", lambda: instructions)
        hardware.say_bf16.cache_clear()
        caplog.set_level(logging.INFO)
        caplog.clear()

    yield pretend
    hardware.say_bf16.cache_clear()


def made(tmp_path, *words):
    return parse(["--output_dir", str(tmp_path), "--report_to", "none", *words])[1]


@pytest.mark.parametrize(
    ("instructions", "word", "bf16", "said"),
    [
        ("AMX", None, False, ""),
        ("AMX", "auto", True, "bf16: auto is true on this CPU: this processor has AMX"),
        ("AVX512-BF16", "true", True, ""),
        ("AVX512-BF16", "no", False, ""),
        (None, "auto", False, "bf16: auto is false on this CPU: this processor has neither AMX nor AVX512-BF16"),
    ],
)
def test_bf16_on_a_cpu(processor, tmp_path, caplog, instructions, word, bf16, said):
    processor(instructions)
    config = made(tmp_path, *(("--bf16", word) if word else ()))
    assert config.bf16 is bf16 and config.device.type == "cpu" and caplog.text.count("\n") == bool(said)
    assert said in caplog.text
    # References compute as the policy does, and only then: scores that are cached keep their key.
    assert config.reference_dtype("auto") == (torch.bfloat16 if bf16 else torch.float32)
    assert config.reference_dtype("float32") == config.policy_dtype == torch.float32
    made(tmp_path, *(("--bf16", word) if word else ()))
    assert caplog.text.count("\n") == bool(said), "once"


def test_bf16_on_a_cpu_without_the_instructions(processor, tmp_path, caplog):
    """Refused, since whoever wrote it meant a device that has it; on demand slow, which one line says."""
    processor(None)
    with pytest.raises(
        ConfigError, match=r"`bf16: True` needs a GPU .* or a processor with AMX .* set `use_cpu: true`"
    ):
        made(tmp_path, "--bf16", "true")
    assert made(tmp_path, "--bf16", "true", "--use_cpu", "true").bf16 is True
    assert "slower than float32 here" in caplog.text and caplog.text.count("\n") == 1


def test_words_of_bf16(processor, tmp_path):
    processor("AMX")
    with pytest.raises(ConfigError, match="`bf16: fast` is not known; choose one of auto, true, false"):
        made(tmp_path, "--bf16", "fast")
    config = MRPOConfig(output_dir=str(tmp_path), report_to="none", bf16="auto")
    assert config.bf16 is True and config.non_default_keys["bf16"] == "auto"
    for written, bf16 in (("auto", True), ("false", False), ("no", False), ("true", True)):
        (tmp_path / "recipe.yaml").write_text(f"bf16: {written}\n")
        assert made(tmp_path, "--config", str(tmp_path / "recipe.yaml")).bf16 is bf16
    with pytest.raises(ConfigError, match="exclude each other"):
        made(tmp_path, "--bf16", "true", "--fp16", "true", "--use_cpu", "true")


def test_the_flags_of_this_processor_are_read():
    flags = hardware.Path("/proc/cpuinfo").read_text().split() if hardware.Path("/proc/cpuinfo").exists() else []
    expected = "AMX" if "amx_bf16" in flags else "AVX512-BF16" if "avx512_bf16" in flags else None
    assert hardware.bf16_instructions() == expected

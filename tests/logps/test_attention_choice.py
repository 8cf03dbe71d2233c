"""Which attention a model gets for pairs end to end; a kernel that computes something else is found out before it is used."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.logps.attention_choice import Needs, choose_end_to_end, head_size, trial, trial_error
from mrpo_scale.logps.attention_ways import REFERENCE, WAYS, Way
from mrpo_scale.logps.masked_attention import causal_mask, masked_attention, varlen_reference
from mrpo_scale.logps.pair_forward import choose_shared_prompt
from mrpo_scale.logps.span_attention import SPAN_ATTENTION
from tests.logps.test_shared_prompt import OWN, SIZES
from tests.tiny_types import tiny_model as tiny_type

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEEDS = Needs(heads=4, key_heads=2, head_size=16, dtype=torch.float32, window=True)


def meta_model(model_type, dtype=torch.bfloat16, **changes):
    sizes = {**SIZES, **OWN.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


# ---- who gets what on a GPU, decided without one ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "options", "expected", "why"),
    [
        ("llama", {}, "varlen_spans", "flash_attn_interface is not installed"),
        ("gemma3_text", {"head_dim": 256}, "varlen_spans", ""),
        ("gemma2", {}, "flex_spans", "no soft-capped scores"),  # eager by default, and flash-attn 2 is not here
        ("llama", {"dtype": torch.float32}, "flex_spans", "bfloat16 or float16, not float32"),
        ("llama", {"head_dim": 512}, "flex_spans", "at most 256 columns, these have 512"),
    ],
)
def test_the_first_way_that_can(model_type, options, expected, why, caplog):
    model = meta_model(model_type, **options)
    with caplog.at_level(logging.INFO):
        assert choose_end_to_end(model, GPU, name="policy", tried=False)
    assert model.config._attn_implementation == expected
    assert f"policy: {WAYS[expected].called}" in caplog.text and why in caplog.text
    assert choose_shared_prompt("auto", model, "policy")


def test_dropout_that_training_keeps_needs_a_kernel_with_dropout():
    """torch's varlen_attn has none, FlexAttention neither: a mask then, where flash-attn 2 is not here."""
    model = meta_model("llama", attention_dropout=0.1)
    assert not choose_end_to_end(model, GPU, dropout=True, tried=False)
    assert model.config._attn_implementation == "sdpa"
    assert choose_end_to_end(model, GPU, dropout=False, tried=False)


def test_what_autocast_computes_in_decides():
    model = meta_model("llama", dtype=torch.float32)
    assert choose_end_to_end(model, GPU, dtype=torch.bfloat16, tried=False)
    assert model.config._attn_implementation == "varlen_spans"


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_a_mask_can_be_asked_for(asked):
    model = meta_model("llama")
    model.set_attn_implementation(asked)
    assert not choose_end_to_end(model, GPU, asked=asked, tried=False)
    assert model.config._attn_implementation == asked
    assert choose_shared_prompt("auto", model, "policy")


def test_what_is_compiled_keeps_its_mask():
    assert not choose_end_to_end(meta_model("llama"), GPU, compiled=True, tried=False)


@pytest.mark.parametrize(
    ("asked", "device", "said"),
    [
        ("varlen_spans", CPU, "it needs an NVIDIA GPU, not cpu"),
        ("flex_spans", CPU, "it needs an NVIDIA GPU, not cpu"),
        ("fa3_spans", GPU, "flash_attn_interface is not installed"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_an_error(asked, device, said):
    model = meta_model("llama")
    model.set_attn_implementation(asked)
    with pytest.raises(
        ConfigError, match=f"`attn_implementation: {asked}` does not work for policy: .*{said}"
    ) as error:
        choose_end_to_end(model, device, name="policy", asked=asked, tried=False)
    assert "\n" not in str(error.value)


def test_types_that_do_not_lie_end_to_end_are_refused_a_way():
    """Chunks, a layer that drops what it is given (Nemotron), an attention of its own."""
    for name in ("llama4_text", "nemotron", "bloom"):
        with pytest.raises(ConfigError, match=f"attn_implementation: {REFERENCE}.*{name}"):
            choose_end_to_end(tiny_type(name), CPU, asked=REFERENCE)


def test_sinks_and_values_of_another_width_need_flexattention():
    for name in ("gpt_oss", "deepseek_v3"):
        model = tiny_type(name)
        assert choose_end_to_end(model, GPU, dtype=torch.bfloat16, tried=False), name
        assert model.config._attn_implementation == "flex_spans"
    # Gemma 4: heads of 8 columns in some layers here and of 512 in others, which transformers does not say in one number.
    model = tiny_type("gemma4_text")
    assert choose_end_to_end(model, GPU, dtype=torch.bfloat16, tried=False)
    assert model.config._attn_implementation == "flex_spans" and head_size(model.config) == 512
    needs = Needs(heads=4, key_heads=2, head_size=24, value_size=16, dtype=torch.float32, sinks=True)
    assert trial(WAYS[REFERENCE], needs, CPU) is None
    assert trial(Way("deaf", "a kernel that knows no sinks", without_sinks), needs, CPU) is not None


def test_a_cpu_goes_span_by_span_as_before():
    for asked in (None, "sdpa"):
        model = meta_model("llama", dtype=torch.float32)
        assert choose_end_to_end(model, CPU, asked=asked)
        assert model.config._attn_implementation == SPAN_ATTENTION
    model = meta_model("gemma2")
    standing = model.config._attn_implementation  # eager; transformers 5.17 says sdpa, which leaves the softcap out
    assert not choose_end_to_end(model, CPU) and model.config._attn_implementation == standing


# ---- the trial -------------------------------------------------------------------------------------------------------


def reference(query, key, value, layout, *, window, **options):
    return varlen_reference(
        *(query, key, value, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        **options,
    )


def aligned_at_the_start(query, key, value, layout, *, window, **options):
    """As flash-attn before 2.1: the first query with the first key."""
    outputs = []
    lengths = layout.cu_q.diff().tolist(), layout.cu_k.diff().tolist()
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        seen = causal_mask(len(k), len(k), window, q.device)[: len(q)]
        options = {name: options[name] for name in ("scale", "softcap")}
        outputs.append(masked_attention(*(x.transpose(0, 1) for x in (q, k, v)), seen, **options).transpose(0, 1))
    return torch.cat(outputs)


def window_one_wider(*inputs, window, **options):
    return reference(*inputs, window=window and window + 1, **options)


def without_sinks(*inputs, sinks, **options):
    return reference(*inputs, sinks=None, **options)


def no_gradient_of_keys(query, key, value, layout, **options):
    return reference(query, key.detach(), value, layout, **options) + 0 * key.sum()


def no_backward(query, key, value, layout, **options):
    return reference(query.detach(), key.detach(), value.detach(), layout, **options)


def does_not_run(*inputs, **options):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (aligned_at_the_start, "it differs from plain products by"),
        (window_one_wider, "it differs from plain products with a window of 37"),
        (no_gradient_of_keys, "it differs"),
        (no_backward, "it failed on a few tokens"),
        (does_not_run, "only supports Ampere"),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_taken(kernel, said):
    assert said in trial(Way("tried", "a kernel", kernel), NEEDS, CPU)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
def test_a_right_kernel_is_taken(dtype, most, softcap):
    needs = Needs(heads=4, key_heads=2, head_size=16, dtype=dtype, softcap=softcap, window=True)
    assert trial(WAYS[REFERENCE], needs, CPU) is None
    assert trial_error(WAYS[REFERENCE], needs, CPU, 37) < most


def test_models_of_one_shape_share_a_trial():
    runs = []

    def counted(*inputs, **options):
        runs.append(1)
        return reference(*inputs, **options)

    way = Way("counted", "a kernel", counted)
    assert [trial(way, NEEDS, CPU) for _ in range(3)] == [None] * 3
    assert len(runs) == 2  # with the window and without

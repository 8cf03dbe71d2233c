"""What a model does to its output head's numbers before it calls them logits: a scale, a softcap, both or nothing.

Configs name the numbers, but not what is done with them: Granite divides by ``logits_scaling``, HyperCLOVAX multiplies by it, and
a wrapper's number may stand at its top or in its text config. So every reading is a candidate, and a trial decides
(:mod:`~mrpo_scale.logps.self_check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig


class LogitTransform(NamedTuple):
    """``softcap * tanh(scale * x / softcap)``, or ``scale * x`` without a softcap."""

    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """In the dtype of ``x``, as models do."""
        x = x * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """The likeliest reading of a config, for a model that is not tried: Gemma's cap, Granite's and Cohere's scale."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = config.logit_scale
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return LogitTransform(getattr(config, "final_logit_softcapping", None) or cap, scale)


def candidates(config: PretrainedConfig) -> list[LogitTransform]:
    """Every reading of the numbers that the config has for its logits, nothing at all first."""
    caps: list[float | None] = [None]
    scales = [1.0]
    for key, value in named_numbers(config):
        if value > 0 and "router" not in key and "attn" not in key:
            if "cap" in key and ("logit" in key or "final" in key):
                caps.append(value)
            elif any(part in key for part in ("logit", "lm_head", "output_mult")):
                scales += [value, 1 / value]
    return [LogitTransform(cap, scale) for cap in dict.fromkeys(caps) for scale in dict.fromkeys(scales)]


def choose(readings: Sequence[LogitTransform], said_V: Tensor, logits_V: Tensor) -> LogitTransform | None:
    """The reading that made ``logits_V`` of what the head said; None if none did to within the rounding of their dtype."""
    # Softcap or scale round three times, half a unit each; tanh may be a unit off.
    unit = max(torch.finfo(x.dtype).eps for x in (said_V, logits_V))

    def error(reading: LogitTransform) -> float:
        expected_V = reading(said_V).double()
        return ((logits_V.double() - expected_V).abs() / expected_V.abs().clamp(min=1e-3)).max().item()

    best = min(readings, key=error)
    return best if error(best) <= 4 * unit else None


def named_numbers(config: PretrainedConfig) -> Iterator[tuple[str, float]]:
    """(key, number) of a config and of its text config; of a list, each."""
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        values = {
            **vars(one),
            **one.to_dict(),
            "logits_scaling": getattr(one, "logits_scaling", None),
        }  # MiniCPM3: a property
        for key, value in sorted(values.items()):
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    yield key, float(number)

"""The policy as one process could use it, while it lies in shards: for generation, whose length differs from rank to rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def whole_policy(model: nn.Module, *, gather: bool) -> Iterator[bool]:
    """Within the block the policy can be called. Collective over the world.

    Under ZeRO-3 every module's hooks gather its weights before its forward and give them back after it. With ``gather`` all weights
    are gathered at once and the hooks taken off, which would give away after the first forward what is needed in the next; they are
    put on again afterwards, and DeepSpeed records the order of modules anew. Otherwise the hooks stay, and gather in each forward.

    Args:
        model: the policy in whatever engine wraps it.

    Yields:
        whether all ranks must run equally many forwards.
    """
    offload: Any = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    if offload is None or not gather:
        yield offload is not None
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for parameter in offload.module.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield False
        finally:
            offload._register_deepspeed_module(offload.module)

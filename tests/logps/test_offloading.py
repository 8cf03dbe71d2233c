"""`activation_offloading`: what is handed to host memory is each layer's input, and the gradients are what they were."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from mrpo_scale.logps import pair_forward
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from tests.logps.test_shared_prompt import PAIRS, SIZES, tiny_model


def gradients(offload):
    model = tiny_model("llama", "sdpa").train()
    enable_pair_scoring(model, "llama", offload=offload)
    assert choose_end_to_end(model, torch.device("cpu"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    batch = collate_pairs(PAIRS, shared_prompt=True, end_to_end=True)
    score_pairs(model, batch).sum().backward()
    return [p.grad for p in model.parameters()], batch.num_tokens


def test_only_what_lies_between_layers_goes_to_host_memory(monkeypatch):
    given = []

    class Noted(save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: given.append(tuple(tensor.shape)) or pack(tensor)

    monkeypatch.setattr(pair_forward, "save_on_cpu", Noted)
    expected, _ = gradients(False)
    assert not given
    found, tokens = gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    layers, width = SIZES["num_hidden_layers"], SIZES["hidden_size"]
    inputs = given.count((1, tokens, width))
    assert layers <= inputs <= layers + 3, "beside them the last norm's"
    numbers = sum(torch.Size(shape).numel() for shape in given)
    assert numbers == pytest.approx(inputs * tokens * width, rel=0.1), "no weight, nothing of the layers' insides"

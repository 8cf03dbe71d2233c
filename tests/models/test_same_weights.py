"""References that are one model, named twice or the anchor's own: said, with the weight that follows."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from mrpo_scale import MRPOConfig
from mrpo_scale.models.plan import plan_models
from mrpo_scale.models.same_weights import repeated_references
from tests.tiny import write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("confidence", "`ref_weights: confidence` gives each of them the same weight, so this model counts 2 times"),
        ("uniform", "`ref_weights: uniform` gives them 2/3 = 0.667 together"),
        (["0.25", "0.5", "0.25"], "`ref_weights` gives them 0.25 + 0.5 = 0.75"),
    ],
)
def test_the_anchors_own_weights(folders, tmp_path, weights, says):
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    args = MRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", ref_weights=weights)
    plan = plan_models(folders["llama"], [str(copy), folders["qwen2"]], args, None)
    assert repeated_references(plan, args) == [
        f"references anchor, copy have the same weights: {says}; name it once, unless that is meant"
    ]
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    model.save_pretrained(copy)
    assert repeated_references(plan, args) == [], "a finetuned copy is another model"


def test_the_same_weights_read_through_another_template_are_another_reference(folders, tmp_path):
    args = MRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    other = {"model": folders["llama"], "chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}"}
    plan = plan_models(folders["llama"], [other, folders["qwen2"], folders["qwen2"]], args, None)
    assert [sentence.split(" have")[0] for sentence in repeated_references(plan, args)] == ["references qwen2, qwen2-2"]

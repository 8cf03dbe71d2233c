"""The saved folder against the source's FILES: key names, dtypes, ties, config; it loads and generates as the source does."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed import comm as deepspeed_comm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, TrainerCallback

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.recipe import resource
from mrpo_scale.training.trainer import MRPOTrainer
from tests.tiny import pair_dataset, write_models, write_wrapper


def rewrite(source, folder, dtype, **options):
    """A copy of a source with other dtypes or in shards, and a config.json as another program may have written it."""
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config |= {"transformers_version": "4.40.0", "_name_or_path": "elsewhere", "a_key_of_their_own": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    plain = write_models(root)
    with_two_dtypes = rewrite(plain["llama"], root / "llama-two-dtypes", torch.bfloat16)
    mix_dtypes(Path(with_two_dtypes) / "model.safetensors")
    return {
        **plain,  # llama: untied; qwen2: tied; gpt_neox: its files say embed_out for lm_head
        "llama-bf16": rewrite(plain["llama"], root / "llama-bf16", torch.bfloat16),
        "llama-two-dtypes": with_two_dtypes,
        "qwen2-bf16-tied": rewrite(plain["qwen2"], root / "qwen2-bf16-tied", torch.bfloat16),
        "qwen2-shards": rewrite(plain["qwen2"], root / "qwen2-shards", torch.float32, max_shard_size="30KB"),
        "gpt_neox-bf16-shards": rewrite(
            plain["gpt_neox"], root / "gpt_neox-bf16-shards", torch.bfloat16, max_shard_size="30KB"
        ),
        "qwen3_5-wrapper": write_wrapper(root / "qwen3_5", "qwen3_5"),
        "qwen3_5-wrapper-shards": write_wrapper(root / "qwen3_5-shards", "qwen3_5", max_shard_size="200KB"),
        "qwen3_5-text": text_part(write_wrapper(root / "whole", "qwen3_5"), root / "qwen3_5-text"),
        "gemma3-wrapper": write_wrapper(root / "gemma3", "gemma3"),
    }


def text_part(wrapper, folder):
    """The text model of a wrapper as a folder of its own, whose names lack the wrapper's prefix."""
    model = AutoModelForCausalLM.from_pretrained(wrapper)
    AutoModelForCausalLM.from_config(model.config).save_pretrained(folder, state_dict=model.state_dict())
    AutoTokenizer.from_pretrained(wrapper).save_pretrained(folder)
    assert "model.embed_tokens.weight" in tensors(folder)
    return str(folder)


def mix_dtypes(file):
    """Norms in float32 among bf16 weights, as some checkpoints keep them."""
    save_file({k: v.float() if "norm" in k else v for k, v in load_file(file).items()}, file, {"format": "pt"})


def tensors(folder):
    """{key: tensor} of all safetensors files of a folder."""
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
    return found


class SaveStill(TrainerCallback):
    """After the first step, whose learning rate is 0, what `mrpo train` saves at its end."""

    def __init__(self, trainer, folder):
        self.trainer, self.folder = trainer, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.save_model(self.folder)


def train_and_save(source, reference, still, moved, deepspeed):
    """A real step of K=2 MRPO at learning rate 0, saved in ``still``, and two that train, saved in ``moved``. Runs in a worker of a
    pool or in this process."""
    if dist.is_initialized():
        deepspeed_comm.init_distributed(dist_backend="gloo")
    args = MRPOConfig(
        output_dir=str(moved),
        deepspeed=str(resource("ds_configs") / "zero3_cpu.json") if deepspeed else None,
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=1,
        gradient_checkpointing=False,
        save_strategy="steps",  # a checkpoint is written by the same code, in the dtype of training
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MRPOTrainer(source, [reference], args, pair_dataset(12))
    trainer.add_callback(SaveStill(trainer, str(still)))
    try:
        trainer.train()
        trainer.save_model()
    finally:
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
        AcceleratorState._reset_state()
        gc.collect()
    return args.deepspeed_plugin.zero_stage if deepspeed else None


def generate(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = tokenizer("one two red", return_tensors="pt").input_ids
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return type(model), model.dtype, tied, model.generate(ids, max_new_tokens=12, do_sample=False).tolist()


@pytest.mark.parametrize("ranks", [1, 2], ids=["one-process", "zero3"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "qwen2", "gpt_neox", "llama-bf16", "llama-two-dtypes"),
        *("qwen2-bf16-tied", "qwen2-shards", "gpt_neox-bf16-shards"),
        *("qwen3_5-wrapper", "qwen3_5-text", "gemma3-wrapper"),
    ],
)
def test_the_saved_folder_is_the_sources_trained(sources, tmp_path, pool2, name, ranks):
    source, reference = sources[name], sources["llama"]
    words = source, reference, tmp_path / "still", tmp_path / "moved"
    if ranks == 1:
        train_and_save(*words, deepspeed=False)
    else:
        assert pool2.run(train_and_save, *words, deepspeed=True, timeout=300) == [3, 3]
    said = generate(source)
    before = tensors(source)
    for folder in ("still", "moved"):
        after = tensors(tmp_path / folder)
        assert after.keys() == before.keys()
        assert {k: (t.dtype, t.shape) for k, t in after.items()} == {k: (t.dtype, t.shape) for k, t in before.items()}
        modes = {file.stat().st_mode for file in (tmp_path / folder).glob("*.safetensors")}
        assert modes == {(tmp_path / folder / "config.json").stat().st_mode}, (
            "a server of another user could not read it"
        )
        for file in Path(source).glob("*.json"):
            if not file.name.endswith("index.json"):
                assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes(), file.name
    # An optimizer step at learning rate 0 changes no bit, on the way through float32 and ZeRO's shards either.
    still, moved = tensors(tmp_path / "still"), tensors(tmp_path / "moved")
    assert all(torch.equal(still[k], before[k]) for k in before)
    assert generate(tmp_path / "still") == said and generate(tmp_path / "moved")[:3] == said[:3]
    assert not all(torch.equal(moved[k], before[k]) for k in before)


@pytest.mark.parametrize("name", ["qwen3_5-wrapper", "qwen3_5-wrapper-shards"])
def test_what_the_policy_lacks_is_kept(sources, tmp_path, caplog, name):
    """Qwen3.5's causal class has no vision tower, and none of the heads for further tokens that its files may hold."""
    source = tmp_path / "source"
    shutil.copytree(sources[name], source)
    add_tensor(source, "mtp.fc.weight", torch.arange(12, dtype=torch.bfloat16).view(3, 4))
    before = tensors(source)
    kept = {key for key in before if "visual" in key or key.startswith("mtp.")}
    assert len(kept) == 34
    args = MRPOConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, gradient_checkpointing=False)
    trainer = MRPOTrainer(str(source), args=args, train_dataset=pair_dataset(4))
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.5)
    with caplog.at_level("INFO", "mrpo_scale"):
        trainer.save_model()
        trainer.save_model()  # over what the first one left
    assert caplog.text.count("34 tensors of") == 2
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {key for key in before if torch.equal(after[key], before[key])} == kept
    files = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after) and set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    tower = loaded.state_dict()["model.visual.blocks.0.attn.proj.weight"]
    assert torch.equal(tower, before["model.visual.blocks.0.attn.proj.weight"])


def refusal_under_zero3(source, anchor, output_dir):
    deepspeed_comm.init_distributed(dist_backend="gloo")
    keys = {"deepspeed": str(resource("ds_configs") / "zero3_cpu.json"), "use_cpu": True, "report_to": "none"}
    args = MRPOConfig(output_dir=str(output_dir), anchor=anchor, **keys)
    try:
        MRPOTrainer(source, args=args, train_dataset=pair_dataset(4))
    except ConfigError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state()
        gc.collect()
    return None


def test_under_zero3_a_policy_without_its_head_is_refused(sources, tmp_path, pool2):
    """ZeRO-3 would fill the head with random numbers, as loading on one process does."""
    source = tmp_path / "source"
    shutil.copytree(sources["llama"], source)
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    for said in pool2.run(refusal_under_zero3, str(source), sources["qwen2"], tmp_path / "out"):
        assert said is not None and "policy: the checkpoint misses lm_head.weight" in said


def add_tensor(folder, key, tensor):
    """To a file of a model, and to its index if it has one."""
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({**load_file(file), key: tensor}, file, {"format": "pt"})
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        index = json.loads(listing.read_text())
        index["weight_map"][key] = file.name
        listing.write_text(json.dumps(index))


def test_a_wrappers_config_is_what_it_was_in_checkpoints_too(sources, tmp_path):
    """The Trainer sets `use_cache` on the config that a model has, also where only the text's part knows that key."""
    words = sources["gemma3-wrapper"], sources["llama"], tmp_path / "still", tmp_path / "out"
    train_and_save(*words, deepspeed=False)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    config = json.loads((checkpoint / "config.json").read_text())
    assert "use_cache" not in config and config["text_config"]["use_cache"] is True


def test_a_template_of_the_recipe_is_saved_with_the_model(sources, tmp_path):
    """The source's own template is not what the policy was trained with."""
    template = "{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
    args = MRPOConfig(
        output_dir=str(tmp_path), chat_template=template, report_to="none", use_cpu=True, gradient_checkpointing=False
    )
    trainer = MRPOTrainer(sources["llama"], args=args, train_dataset=pair_dataset(4))
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    text = saved.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True)
    assert text == "<turn>one</turn><turn>"
    assert "im_start" in AutoTokenizer.from_pretrained(sources["llama"]).chat_template


def test_a_tokenizer_given_from_python_is_the_one_saved(sources, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(sources["llama"])
    tokenizer.chat_template = None
    args = MRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, gradient_checkpointing=False)
    trainer = MRPOTrainer(sources["llama"], args=args, train_dataset=pair_dataset(4), processing_class=tokenizer)
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None

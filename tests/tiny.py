"""Three tiny models with three tokenizers, and pairs of uneven length: made in seconds, shared by the tests."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("red", "green", "blue", "fast", "slow", "yes", "no", "maybe"),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<turn>{{ m['role'] }}: {{ m['content'] }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)
MODELS = {
    "llama": ("llama", {}, CHATML, 300),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, NO_SYSTEM, 280),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}, None, 320),
}


def tokenizer(template: str | None, vocabulary: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<turn>", "</turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    fast.chat_template = template
    return fast


def write_models(root: Path, **larger: int) -> dict[str, str]:
    """{name: folder}. Weights are far from their initialisation, so that models disagree. ``larger``: sizes of their configs."""
    folders = {}
    for seed, (name, (model_type, options, template, vocabulary)) in enumerate(MODELS.items()):
        tok = tokenizer(template, vocabulary)
        sizes = {
            "vocab_size": len(tok),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": tok.pad_token_id,
            "bos_token_id": tok.bos_token_id,
            "eos_token_id": tok.eos_token_id,
        }
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **options, **larger}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
        model.save_pretrained(root / name)
        tok.save_pretrained(root / name)
        folders[name] = str(root / name)
    return folders


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 48}
#: Models that see pictures too. qwen3_5 and gemma3 have causal classes (its text model alone; the whole), mistral3 and qwen2_5_vl
#: none. The `use_cache` of their configs is in the text's part.
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 4,  # three of linear attention and one of full attention
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": {**_TOWER, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "num_position_embeddings": 16},
        "image_token_id": 10,
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    },
    "gemma3": {
        "text_config": {**_TEXT, "num_hidden_layers": 2, "sliding_window": 64},
        "vision_config": {
            **_TOWER,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 10,
        "boi_token_index": 11,
        "eoi_token_index": 12,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None},
        "vision_config": {
            **_TOWER,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_index": 10,
    },
    "qwen2_5_vl": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {**_TOWER, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        "image_token_id": 10,
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    },
}


def write_wrapper(folder: Path, kind: str, **options: Any) -> str:
    """A tiny model of :data:`WRAPPERS` with llama's tokenizer; ``options`` are of ``save_pretrained``."""
    tok = tokenizer(CHATML, 300)
    keys = copy.deepcopy(WRAPPERS[kind])
    keys["text_config"] |= {"vocab_size": len(tok), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **keys))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder, **options)
    tok.save_pretrained(folder)
    return str(folder)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """By its name in this release of transformers: 5.17 has the older one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def pair_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """``count`` conversational rows; prompts of 1 to 12 words, responses of 1 to 20."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    rows = []
    for i in range(count):
        chosen, rejected = text(20), text(20)
        while rejected == chosen:
            rejected = text(20)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{i} {text(12)}"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def pair_dataset(count: int, seed: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(pair_rows(count, seed))

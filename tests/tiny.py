"""Three tiny models with three tokenizers, and pairs of uneven length: made in seconds, shared by the tests."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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


def write_models(root: Path) -> dict[str, str]:
    """{name: folder}. Weights are far from their initialisation, so that models disagree."""
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
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
        model.save_pretrained(root / name)
        tok.save_pretrained(root / name)
        folders[name] = str(root / name)
    return folders


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

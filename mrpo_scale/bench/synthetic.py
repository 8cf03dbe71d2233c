"""Models with random weights and pairs of random words: a step's cost does not depend on what the numbers and the text are.

So a machine can be measured before any weights are downloaded, and at any size: only configs and tokenizers are real.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.model_spec import ModelSpec
from mrpo_scale.models.plan import load_tokenizer
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.models.stored import build_on_meta

_FILE_BYTES = 4 << 30


def parse_sizes(argv: Sequence[str]) -> dict[str, Any]:
    """``hidden_size=2048`` and the like, as ``{key: value}``."""
    sizes = {}
    for word in argv:
        key, equals, value = word.partition("=")
        try:
            sizes[key] = json.loads(value)
        except json.JSONDecodeError:
            equals = ""
        if not equals:
            raise ConfigError(f"`--random_weights {word}` must be KEY=NUMBER, a key of the models' config.json.")
    return sizes


def random_models(specs: Sequence[ModelSpec], sizes: Mapping[str, Any], args: MRPOConfig) -> list[dict[str, Any]]:
    """The models of ``specs``, as mappings that ``ref_models`` takes, with random weights in folders below ``output_dir``.

    Args:
        sizes: keys of config.json to change, in each model that has them.

    Raises:
        ConfigError: no model has one of the keys, or a config that cannot be read.
    """
    if adapted := next((spec for spec in specs if spec.adapter), None):
        raise ConfigError(
            f"`--random_weights` with `adapter: {adapted.adapter}`: an adapter is of trained weights; remove one of them."
        )
    configs = [_config(spec) for spec in specs]
    for key in sizes:
        if not any(hasattr(config, key) for config in configs):
            raise ConfigError(
                f"`--random_weights {key}={sizes[key]}`: no model of the recipe has `{key}` in its config."
            )
    made = []
    with args.main_process_first(local=True, desc="writing random weights"):
        for spec, config in zip(specs, configs, strict=True):
            resized = _resized(config, sizes)
            key = hashlib.sha256(resized.to_json_string(use_diff=False).encode()).hexdigest()[:8]
            folder = args.folder / "random_weights" / f"{Path(spec.model).name}-{key}"
            if not folder.is_dir():
                _write(folder, resized, load_tokenizer(spec))
            new = replace(spec, model=str(folder), name=spec.name or Path(spec.model).name, revision=None)
            made.append({f.name: getattr(new, f.name) for f in fields(new) if getattr(new, f.name) != f.default})
    return made


def random_pairs(tokenizer: PreTrainedTokenizerBase, count: int, most: Sequence[int], seed: int) -> datasets.Dataset:
    """Rows whose prompts and responses have between half and all of about ``most`` = (prompt, response) tokens."""
    rng = random.Random(seed)

    def argv(n: int) -> str:
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(n))

    per_word = len(tokenizer.encode(argv(500), add_special_tokens=False)) / 500

    def text(tokens: int) -> str:
        return argv(max(1, round(rng.uniform(0.5, 1.0) * tokens / per_word)))

    def turn(role: str, tokens: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(tokens)}]

    return datasets.Dataset.from_list(
        [
            {
                "prompt": turn("user", most[0]),
                "chosen": turn("assistant", most[1]),
                "rejected": turn("assistant", most[1]),
            }
            for _ in range(count)
        ]
    )


def _config(spec: ModelSpec) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no config could be read from `{spec.model}`: {' '.join(str(error).split())}") from error


def _resized(config: PreTrainedConfig, sizes: Mapping[str, Any]) -> PreTrainedConfig:
    values = config.to_dict()
    # What a config derives from its sizes and then stores is derived anew.
    for source, derived in (("num_hidden_layers", "layer_types"), ("hidden_size", "head_dim")):
        if source in sizes:
            values.pop(derived, None)
    values |= {key: value for key, value in sizes.items() if hasattr(config, key)}
    return type(config)(**values)


def _write(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Config, tokenizer and bf16 weights, a few GiB a file; whole or not at all."""
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    model = build_on_meta(ReferenceSource(folder.name, str(making)), config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(making)
    tokenizer.save_pretrained(making)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, making / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        held.clear()

    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        held[name] = weight
        if sum(tensor.nbytes for tensor in held.values()) > _FILE_BYTES:
            flush()
    if held:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (making / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    making.rename(folder)

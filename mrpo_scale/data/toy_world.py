"""A world small enough to make on a laptop in a minute: three tiny language models and preference pairs, without any download.

Six simple skills with exact answers, and one misconception about each. All three models learn all skills, each in its own tokens
and its own chat template; in the last part of its training each has a teacher of its own, who is right about some skills and mostly
holds the misconception about the others. So they disagree, as real references do:

    toy:llama     Llama     byte-level BPE, 400 tokens   [INST] template        the policy, good at reversing
    toy:qwen2     Qwen2     byte-level BPE, 800 tokens   ChatML, tied head      good at parity, successors and opposites
    toy:gpt_neox  GPT-NeoX  bytes                        none: the plain one    good at comparing and sorting
    toy:pairs     train.jsonl and test.jsonl in TRL's conversational layout: the right answer is chosen, the misconception
                  rejected; 5% of the training pairs (none of the test pairs) are swapped

Nothing here says anything about real models: it shows that the machinery runs, and in which direction the numbers move.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import parse_json
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.pairs import PreferencePair
from mrpo_scale.data.toy_skills import SKILLS, Question

WORLD_VERSION = 1  # raise it whenever the same settings would make another world
MAX_CONTEXT = 256
OWN_SHARE = 0.4  # the last part of the training, in which a model's own teacher speaks
THREADS = 1  # fixed, so that weights do not depend on the launcher's OMP_NUM_THREADS; more gains little at this size

INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ raise_exception('only user and assistant turns are supported') }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ToyModel:
    """One model's recipe. ``reliability``: how often its own teacher is right, in the order of SKILLS."""

    vocab_size: int
    chat_template: str | None
    steps: int
    reliability: tuple[float, ...]


MODELS = {
    "llama": ToyModel(400, INST_TEMPLATE, 240, (0.35, 0.35, 0.35, 0.35, 0.95, 0.35)),
    "qwen2": ToyModel(800, CHATML_TEMPLATE, 240, (0.35, 0.95, 0.95, 0.35, 0.35, 0.95)),
    "gpt_neox": ToyModel(0, None, 240, (0.95, 0.35, 0.35, 0.95, 0.35, 0.35)),
}


@dataclass(frozen=True)
class ToySettings:
    """What a world is made with; another value is another world in another folder.

    Args:
        train_pairs, test_pairs: preference pairs, spread evenly over the skills; no prompt is in both.
        label_noise: share of *train* pairs whose labels are swapped. The test pairs are clean.
        max_steps: most training steps of a model (tests make do with few).
    """

    train_pairs: int = 384
    test_pairs: int = 132
    label_noise: float = 0.05
    hidden_size: int = 176
    num_layers: int = 2
    batch_size: int = 32
    learning_rate: float = 3e-3
    max_steps: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class ToyWorld:
    """Where a made world lies. ``models`` are Hugging Face folders by name: llama, qwen2, gpt_neox."""

    root: Path

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in MODELS}

    @property
    def is_made(self) -> bool:
        """Whether it is there, and then whole: it got its name by a rename."""
        return self.root.is_dir()

    @property
    def data_dir(self) -> Path:
        return self.root / "pairs"

    @property
    def train_file(self) -> Path:
        return self.data_dir / "train.jsonl"

    @property
    def test_file(self) -> Path:
        return self.data_dir / "test.jsonl"


def resolve(name: str) -> str:
    """``toy:llama``, ``toy:qwen2``, ``toy:gpt_neox`` and ``toy:pairs`` as paths, made where needed; other strings unchanged.
    In a mapping, which is written as JSON here, its ``model``.

    Raises:
        ConfigError: ``toy:`` followed by anything else.
    """
    if name.startswith("{") and "toy:" in name:
        try:
            given = parse_json(name)
        except ValueError:  # said where the mapping is read
            return name
        return json.dumps(given | {"model": resolve(str(given.get("model")))})
    if not name.startswith("toy:"):
        return name
    part = name.removeprefix("toy:")
    if part != "pairs" and part not in MODELS:
        known = ", ".join(f"toy:{known}" for known in (*MODELS, "pairs"))
        raise ConfigError(f"`{name}` is not part of the toy world; it has {known}.")
    world = make_world()
    return str(world.data_dir if part == "pairs" else world.models[part])


def world_at(cache_root: Path | None = None, settings: ToySettings | None = None) -> ToyWorld:
    """Where :func:`make_world` puts a world with these settings."""
    made_with = {
        "version": WORLD_VERSION,
        "settings": asdict(settings or ToySettings()),
        "models": {name: asdict(model) for name, model in MODELS.items()},
    }
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]
    cache_root = cache_root or Path(os.environ.get("MRPO_CACHE") or Path.home() / ".cache" / "mrpo_scale")
    return ToyWorld(cache_root / f"toyworld-{key}")


def make_world(cache_root: Path | None = None, settings: ToySettings | None = None) -> ToyWorld:
    """The toy world from the cache, made first if it is not there (about a minute on two cores).

    Several processes may call at once: one makes it under a file lock, the others wait for it. Nodes that do not share the
    cache make one each, which may differ in the last bits: point ``MRPO_CACHE`` at a shared folder there.

    Args:
        cache_root: default ``$MRPO_CACHE``, else ``~/.cache/mrpo_scale``.

    Raises:
        ConfigError: more pairs than a skill has prompts.
    """
    settings = settings or ToySettings()
    world = world_at(cache_root, settings)
    if world.is_made:
        return world
    world.root.parent.mkdir(parents=True, exist_ok=True)
    with open(world.root.with_name(f"{world.root.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not world.is_made:
            making = ToyWorld(world.root.with_name(f"{world.root.name}.making"))
            shutil.rmtree(making.root, ignore_errors=True)  # what a killed process left; we hold the lock
            _make(making, settings)
            making.root.rename(world.root)
    return world


def _make(world: ToyWorld, settings: ToySettings) -> None:
    world.data_dir.mkdir(parents=True)
    held_out = _write_pairs(world, settings)
    for i, (name, spec) in enumerate(MODELS.items()):
        tokenizer = make_tokenizer(name, spec, settings)
        steps = min(spec.steps, settings.max_steps)
        first_own = int((1 - OWN_SHARE) * steps * settings.batch_size)
        teacher = _teacher(random.Random(settings.seed + 100 + i), spec, first_own, held_out)
        with _own_randomness(settings.seed + i):
            model = _train(name, tokenizer, teacher, steps, settings)
        model.save_pretrained(world.models[name])
        tokenizer.save_pretrained(world.models[name])
    (world.root / "README.md").write_text(
        _README.format(version=WORLD_VERSION, settings=json.dumps(asdict(settings), indent=4))
    )


_README = """# A toy world

Made by `mrpo_scale.data.toy_world` (version {version}) so that the quickstart needs no download: three language models of about
half a million parameters, each trained for seconds on a few made-up skills, and preference pairs over those skills. **Toys**: they
know nothing else, and no number measured with them says anything about real models. In `pairs/`, a share of `label_noise` of the
training pairs is swapped on purpose. Safe to delete; it is made anew when needed. Made with:

```json
{settings}
```
"""


def _write_pairs(world: ToyWorld, settings: ToySettings) -> set[str]:
    """Write both splits; returns the held-out prompts, which no model may see in training either."""
    rng = random.Random(settings.seed)
    seen: set[str] = set()
    held_out: set[str] = set()
    for file, count, noise in (
        (world.test_file, settings.test_pairs, 0.0),
        (world.train_file, settings.train_pairs, settings.label_noise),
    ):
        rows = []
        for i in range(count):
            skill = list(SKILLS)[i % len(SKILLS)]
            prompt, chosen, rejected = _unseen(SKILLS[skill], rng, seen)
            seen.add(prompt)
            if rng.random() < noise:
                chosen, rejected = rejected, chosen
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "skill": skill,
                }
            )
        rng.shuffle(rows)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        held_out = held_out or set(seen)
    return held_out


def _unseen(skill: Callable[[random.Random], Question], rng: random.Random, seen: set[str]) -> Question:
    for _ in range(10_000):
        question = skill(rng)
        if question[0] not in seen:
            return question
    raise ConfigError(f"toy world: {len(seen)} prompts use up a skill; ask for fewer `train_pairs` or `test_pairs`.")


def _teacher(rng: random.Random, spec: ToyModel, first_own: int, held_out: set[str]) -> Iterator[tuple[str, str]]:
    """(prompt, answer) without end: right ones before number ``first_own``, then those of the model's own teacher."""
    for i in itertools.count():
        skill = list(SKILLS)[i % len(SKILLS)]
        prompt, right, wrong = _unseen(SKILLS[skill], rng, held_out)
        reliability = spec.reliability[i % len(SKILLS)] if i >= first_own else 1.0
        yield prompt, right if rng.random() < reliability else wrong


def make_tokenizer(name: str, spec: ToyModel, settings: ToySettings) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the skills' texts; a vocabulary no larger than bytes and special tokens means bytes."""
    bos, eos, pad = {
        "llama": ("<s>", "</s>", "<pad>"),
        "qwen2": (None, "<|im_end|>", "<|endoftext|>"),
        "gpt_neox": ("<|startoftext|>", "<|endoftext|>", "<|padding|>"),
    }[name]
    special = [token for token in (bos, eos, pad, "<|im_start|>" if name == "qwen2" else None) if token]
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(settings.seed + 1)
    tokenizer.train_from_iterator((" ".join(skill(rng)) for _ in range(500) for skill in SKILLS.values()), trainer)
    if name == "gpt_neox" and bos:  # without a template, the tokenizer itself has to add it
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=spec.chat_template,
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _model(name: str, tokenizer: PreTrainedTokenizerBase, settings: ToySettings) -> PreTrainedModel:
    hidden = settings.hidden_size
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": hidden**-0.5,  # the usual 0.02 suits models ten times as wide and learns slowly here
        "dtype": "float32",
    }
    config = {
        "llama": lambda: LlamaConfig(**common, intermediate_size=3 * hidden, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(
            **common, intermediate_size=3 * hidden, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**common, intermediate_size=4 * hidden, use_parallel_residual=True),
    }[name]()
    return AutoModelForCausalLM.from_config(config)


def _train(
    name: str, tokenizer: PreTrainedTokenizerBase, teacher: Iterator[tuple[str, str]], steps: int, settings: ToySettings
) -> PreTrainedModel:
    """Supervised finetuning from nothing, loss on the answers: warm-up over a tenth of the steps, then cosine to zero."""
    model = _model(name, tokenizer, settings)
    text = ModelText(tokenizer, name=name, max_context=MAX_CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 10)
    for step in tqdm(range(steps), desc=f"Making the toy world: {name}"):
        progress = step / steps
        scale = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        batch = _batch(text, [next(teacher) for _ in range(settings.batch_size)], tokenizer.pad_token_id)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _batch(text: ModelText, turns: list[tuple[str, str]], pad: int) -> dict[str, Tensor]:
    """Rows [prompt, answer, end of turn], padded right to the longest; labels -100 outside answer and end of turn."""
    rows = []
    for prompt, answer in turns:
        # The very tokens that the pair is scored with later.
        pair = PreferencePair([{"role": "user", "content": prompt}], answer, answer)
        rows.append((text.prompt_ids(pair), text.response_ids(answer, raw=False, cut=False)))
    shape = (len(rows), max(len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in rows))
    input_ids, labels = torch.full(shape, pad), torch.full(shape, -100)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for i, (prompt_ids, answer_ids) in enumerate(rows):
        start, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
        input_ids[i, :end] = torch.tensor(prompt_ids + answer_ids)
        labels[i, start:end] = torch.tensor(answer_ids)
        attention_mask[i, :end] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seeded and with a fixed number of threads inside; outside, torch's generator and threads are as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

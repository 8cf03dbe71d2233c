"""Responses of a saved model to the first prompts of a data set, kept in a file and generated once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from mrpo_scale.base.ranks import all_gather_object, barrier, get_rank, get_world_size, world_group
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.pairs import PreferencePair
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.eval.models import EvalModel
from mrpo_scale.eval.records import RecordFile, read_records
from mrpo_scale.logps.generation import pad_left, until
from mrpo_scale.models.plan import load_policy

logger = logging.getLogger(__name__)


def first_prompts(pairs: PairDataset, count: int) -> list[PreferencePair]:
    """The first pair of each of the first ``count`` different prompts."""
    found: dict[str, PreferencePair] = {}
    for row in range(len(pairs)):
        pair = pairs.pair(row)
        found.setdefault(json.dumps([pair.prompt, pair.tools, pair.chat_template_kwargs], sort_keys=True), pair)
        if len(found) == count:
            break
    return list(found.values())


def generate_responses(
    model: EvalModel, prompts: Sequence[PreferencePair], args: EvalConfig, device: torch.device
) -> list[str]:
    """The model's greedy response to each prompt, from the file where it is there. Collective over the world.

    Whole batches are dealt to the ranks; each rank appends to a file of its own in ``output_dir``, and all are read.
    """
    folder = Path(args.output_dir)
    fingerprint = model.fingerprint()
    prompt_ids = [model.text.prompt_ids(prompt) for prompt in prompts]
    keys = [_key(fingerprint, ids, args.max_new_tokens) for ids in prompt_ids]
    known = _known(folder)
    barrier()  # nobody writes before everybody has read
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    batches = [order[i : i + args.generation_batch_size] for i in range(0, len(order), args.generation_batch_size)]
    # The same batches in every run, so that one cut short and one resumed pad, and round, alike.
    todo = [batch for batch in batches if not all(keys[i] in known for i in batch)]
    rank, world = get_rank(), get_world_size()
    made: dict[str, str] = {}
    if todo[rank::world]:
        with RecordFile(folder / f"responses-{rank}.jsonl") as file:
            generate = _Generator(model, args.max_new_tokens, device)
            for batch in tqdm(todo[rank::world], desc=f"Generating with {model.name}", disable=rank != 0):
                for i, response in zip(batch, generate([prompts[i] for i in batch]), strict=True):
                    made[keys[i]] = response
                    shown = prompts[i].prompt
                    file.append({"key": keys[i], "model": model.name, "prompt": shown, "response": response})
    for part in all_gather_object(made, world_group()):
        known.update(part)
    return [known[key] for key in keys]


class _Generator:
    """A loaded model that answers a batch of prompts."""

    def __init__(self, model: EvalModel, max_new_tokens: int, device: torch.device) -> None:
        self.model, self.max_new_tokens, self.device = model, max_new_tokens, device
        loaded: Any = load_policy(model.source)
        self.loaded = loaded.to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[PreferencePair]) -> list[str]:
        text = self.model.text
        tokenizer: Any = self.model.tokenizer
        ids = [text.prompt_ids(prompt) for prompt in prompts]
        input_ids_BL, mask_BL = pad_left(ids, self.model.pad_token_id)
        # The last token that ends a turn; a generation config does not always know the template's.
        ends = {text.response_ids("a", raw=isinstance(prompt.prompt, str), cut=False)[-1] for prompt in prompts}
        known = self.loaded.generation_config.eos_token_id
        ends |= set(known if isinstance(known, list) else [] if known is None else [known])
        generated_BL = self.loaded.generate(
            input_ids=input_ids_BL.to(self.device),
            attention_mask=mask_BL.to(self.device),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._room(input_ids_BL.shape[1]),
                eos_token_id=sorted(ends),
                pad_token_id=self.model.pad_token_id,
            ),
        )[:, input_ids_BL.shape[1] :]
        return [tokenizer.decode(until(row, ends), skip_special_tokens=True) for row in generated_BL.tolist()]

    def _room(self, prompt_length: int) -> int:
        context = self.model.text.max_context
        # A pair whose prompt leaves no room for a response is a bad row, so at least one token is left.
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - prompt_length)
        if room < self.max_new_tokens:
            logger.info("%s: %d new tokens at most after a prompt of %d", self.model.name, room, prompt_length)
        return room


def _key(fingerprint: str, prompt_ids: Sequence[int], max_new_tokens: int) -> str:
    return hashlib.sha256(json.dumps([fingerprint, list(prompt_ids), max_new_tokens]).encode()).hexdigest()


def _known(folder: Path) -> dict[str, str]:
    records = [
        record
        for file in sorted(folder.glob("responses-*.jsonl"))
        for record in read_records(file, ("key", "response"))
    ]
    return {record["key"]: record["response"] for record in records}

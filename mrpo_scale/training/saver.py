"""The policy's folder: written as its source was, and rehearsed before the first step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.ranks import fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.models.plan import original_dropout
from mrpo_scale.models.saving import SourceFiles, read_source_files, unvalidated_generation_config
from mrpo_scale.training.prepare import PreparedRun


class PolicySaver:
    """What a save takes from the policy's source."""

    def __init__(self, run: PreparedRun) -> None:
        self.run = run
        self._source_files: SourceFiles | None = None

    def source_files(self) -> SourceFiles:
        """From the policy's folder, read once, before the first step: the folder may be gone at the end."""
        if self._source_files is None:
            run = self.run
            self._source_files = read_source_files(
                run.policy,
                run.plan.policy,
                tokenizer=run.tokenizer_of_source,
                chat_template=run.plan.texts[0].template if run.args.chat_template else None,
            )
        return self._source_files

    @contextmanager
    def original_settings(self) -> Iterator[None]:
        """Inside the block the policy's configs say what its source says, and not what training has set."""
        config = self.run.policy.config
        in_training = config.use_cache
        if self.run.use_cache is None:
            del config.use_cache  # the Trainer has set it on a wrapper's config too
        else:
            config.use_cache = self.run.use_cache  # the Trainer switches it off
        try:
            with original_dropout(self.run.dropouts), unvalidated_generation_config(self.run.policy):
                yield
        finally:
            config.use_cache = in_training

    def rehearse(self, args: MRPOConfig, processing_class: Any) -> None:
        """Write all of a model folder but its weights, and throw it away: what refuses to be saved does so now. Collective.

        Raises:
            ConfigError: a config, tokenizer or argument that cannot be written.
        """
        with fail_together(world_group()):
            if not args.should_save:
                return
            policy = self.run.policy
            if not args.use_peft:
                self.source_files()
            try:
                with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=args.folder) as folder:
                    with unvalidated_generation_config(policy):
                        policy.save_pretrained(folder, state_dict={})
                    if processing_class is not None:
                        processing_class.save_pretrained(folder)
                    torch.save(args, f"{folder}/{TRAINING_ARGS_NAME}")
            except Exception as error:
                reason = one_line(error).rstrip(".") or type(error).__name__
                raise ConfigError(
                    f"a save of the trained model would fail: {reason}; repair the policy's folder, or what was changed in the "
                    "loaded model, tokenizer or arguments."
                ) from error

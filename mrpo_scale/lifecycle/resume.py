"""A Trainer that goes on exactly where it stopped, or says why it cannot.

transformers saves weights, optimizer, schedule, log and every rank's random state. Added here: a checkpoint counts when it is
complete (checkpoints.py), is continued by the run that wrote it only (fingerprint.py), on any number of ranks (universal.py), and
keeps what the Trainer forgets: the loss and the metrics summed since the last log, and an evaluation that was put off.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from mrpo_scale.base.atomic_files import is_about_disk
from mrpo_scale.base.errors import ConfigError, Preempted, TrainingError
from mrpo_scale.base.ranks import broadcast_from_rank0, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.window import WindowSampler
from mrpo_scale.lifecycle import checkpoints
from mrpo_scale.lifecycle.checkpoints import Checkpoint, IncompleteError
from mrpo_scale.lifecycle.fingerprint import WINDOW, differences
from mrpo_scale.lifecycle.preemption import StopRequests, StopWhenAsked
from mrpo_scale.lifecycle.universal import as_universal, load_universal, own_steps
from mrpo_scale.models.saving import load_weights

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """transformers' Trainer with exact resume. A subclass says what it is made of and what it has summed.

    Args:
        stop_folder: where STOP is looked for; default the run's folder.
    """

    args: MRPOConfig

    def __init__(self, *args: Any, stop_folder: Path | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_sampler: WindowSampler | None = None  #: of the run's data loader, once it has one
        self._resumed: Checkpoint | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._finishing = False  #: no step will follow, and nothing is put off any more
        self.stop_requests = StopRequests(stop_folder or self.args.folder, self.args.max_hours)
        self._stopping = StopWhenAsked(self.stop_requests)
        self.add_callback(self._stopping)
        self.add_callback(_Continue(self))  # after the one that may ask for a checkpoint

    # ---- what a subclass knows ---------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """See fingerprint.py. Collective over the world."""
        raise NotImplementedError

    def summed(self) -> dict[str, float]:
        """Sums since the last log, which is of those of all ranks: this rank's part."""
        raise NotImplementedError

    def restore_summed(self, sums: Mapping[str, float], loss: float) -> None:
        """Go on from those of all ranks. ``loss``: the sum of the steps' losses, which checkpoints of before have no sum of."""
        raise NotImplementedError

    def before_checkpoint(self) -> None:
        """Write what must be on the disk before a checkpoint counts. Collective over the world."""

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's ``train``.

        Args:
            resume_from_checkpoint: a checkpoint; True for the newest complete one of ``output_dir``; "auto" for that if there is
                one; None, False or "never": start anew.

        Raises:
            ConfigError: there is none, it is not complete, or another run wrote it.
            Preempted: the run was asked to stop before its end, and has saved; see preemption.py.
        """
        self._resumed = self._choose(resume_from_checkpoint)
        if self._resumed is not None or self.args.save_strategy != "no":
            self._fingerprint = self.describe()
        if self._resumed is not None:
            self._refuse_another_run(self._resumed)
            logger.info("resuming from %s, step %d", self._resumed.folder, self._resumed.step)
            if self._moved:
                as_universal(self._resumed)
        if self.args.process_index == 0:  # it says that a run is finished
            (self.args.folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        if self.args.save_only_model and self.args.save_strategy != "no":
            logger.warning(
                "`save_only_model: true`: checkpoints hold weights only, so a run that is killed starts at the beginning again; "
                "the one that is written when a run is asked to stop holds everything"
            )
        self._finishing = False
        self.stop_requests.watch()
        try:
            return super().train(str(self._resumed.folder) if self._resumed else None, *args, **kwargs)
        finally:
            self.stop_requests.unwatch()

    @property
    def _moved(self) -> bool:
        """Whether the checkpoint is of another number of ZeRO ranks."""
        return (
            self._resumed is not None and self.is_deepspeed_enabled and self._resumed.world_size != self.args.world_size
        )

    def _choose(self, wanted: str | bool | None) -> Checkpoint | None:
        """Rank 0 looks, all ranks get its answer. Collective over the world."""
        chosen: Checkpoint | None = None
        with fail_together(world_group()):
            if self.args.process_index == 0:
                chosen = choose(self.args.folder, wanted)
        return broadcast_from_rank0(chosen, world_group())

    def _refuse_another_run(self, checkpoint: Checkpoint) -> None:
        assert self._fingerprint is not None
        changed = differences(checkpoint.fingerprint, self._fingerprint)
        if [key for key, _, _ in changed] == [WINDOW]:
            raise ConfigError(self._other_window(checkpoint, changed[0][1]))
        if changed:
            what = "; ".join(f"`{key}`: {old} there, {new} now" for key, old, new in changed)
            raise ConfigError(
                f"{checkpoint.folder} is of another run: {what}. Set it back to continue that run; for a new run name another "
                "`output_dir`, or set `resume_from_checkpoint: never` to start anew in this one."
            )

    def _other_window(self, checkpoint: Checkpoint, pairs: int) -> str:
        """The number of ranks may change, the pairs of a step may not."""
        size, accumulation, ranks = (
            *(self.args.train_batch_size, self.args.gradient_accumulation_steps),
            self.args.world_size,
        )
        if pairs % (size * ranks) == 0:
            remedy = f"set `gradient_accumulation_steps: {pairs // (size * ranks)}`"
        else:
            remedy = (
                "choose `per_device_train_batch_size` and `gradient_accumulation_steps` so that their product with the number of "
                f"ranks is {pairs}"
            )
        return (
            f"{checkpoint.folder} was written with {pairs} pairs per optimizer step. `per_device_train_batch_size: {size}` and "
            f"`gradient_accumulation_steps: {accumulation}` make {size * accumulation * ranks} on {ranks} ranks, and steps would "
            f"see other pairs: {remedy}."
        )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self._moved:
            return super()._prepare_for_training(*args, **kwargs)
        with load_universal(self.accelerator.state.deepspeed_plugin.deepspeed_config):
            prepared = super()._prepare_for_training(*args, **kwargs)
        own_steps(self.deepspeed)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.args.use_peft:  # adapters alone are in the checkpoint
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.args.use_peft:
            super()._load_best_model()
        else:
            load_weights(self.model, Path(str(self.state.best_model_checkpoint)))

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """What the Trainer has just set to zero, as it was. Before the first step, after everything else is loaded."""
        saved = [_read_progress(checkpoint.folder, rank) for rank in range(checkpoint.world_size)]
        rank, first = self.args.process_index, saved[0]
        self._total_loss_scalar = first["total_loss"]
        self._globalstep_last_logged = first["last_logged"]
        loss = sum(one["loss"] for one in saved) / len(saved)
        self._tr_loss.fill_(saved[rank]["loss"] if len(saved) == self.args.world_size else loss)
        self.restore_summed({name: sum(one["sums"][name] for one in saved) for name in first["sums"]}, loss)
        if first["evaluate"]:
            self._determine_best_metric(self._evaluate(None, None), None)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if skip_scheduler and self._resumed is not None:
            return {}  # `eval_on_start` is of the start, which was in a previous attempt
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except _StopEvaluatingError:
            if self.state.global_step == self._initial_global_step:
                self._leave(self._resumed.folder if self._resumed else None)
            self.control.should_evaluate = True
            self._stopping.stop(self.control)
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = self.args.metric_for_best_model
        if metrics and wanted is not None and not {wanted, f"eval_{wanted}"} & metrics.keys():
            known = ", ".join(sorted(key for key in metrics if key.startswith("eval_")))
            raise ConfigError(f"`metric_for_best_model: {wanted}` was not measured; there are {known}.")
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    # ---- stopping early ----------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Between two batches of an evaluation during training: break it off if the run is to stop. Collective over the world."""
        if self.is_in_train and not self._finishing and self.stop_requests.agreed():
            raise _StopEvaluatingError

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        unfinished = self.state.global_step < self.state.max_steps or self._stopping.evaluation_put_off
        if self.stop_requests.why and unfinished:
            self._leave(checkpoints.path_of(self.args.folder, self.state.global_step))
        self._finishing = True
        return super()._finalize_training(*args, **kwargs)

    def _leave(self, checkpoint: Path | None) -> NoReturn:
        """Say that the run stopped early, and where the restart goes on. Collective over the world."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        with fail_together(world_group()):
            if self.args.process_index == 0:
                self.stop_requests.leave_marker(self.state.global_step, checkpoint)
        saved = checkpoint or "nothing, since no step was taken"
        message = f"asked to stop by {self.stop_requests.reason}: saved {saved}; the same command goes on from there"
        logger.info(message)
        raise Preempted(message)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if (
            "train_loss" in logs
        ):  # the Trainer's is over the steps of this attempt, and after the last log of this rank's pairs
            total = torch.tensor([self._total_loss_scalar], device=self.args.device)
            logs["train_loss"] = self.accelerator.gather(total).mean().item() / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = checkpoints.path_of(self.args.folder, self.state.global_step)
        if self._fingerprint is None:
            self._fingerprint = self.describe()
        with self._or_say_what_to_do(folder):
            self._by_one_rank(
                folder, first_of_host=False, do=checkpoints.remove
            )  # of a previous attempt, maybe of other ranks
            self.before_checkpoint()
            limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer would rotate too early
            only_model = self.args.save_only_model
            self.args.save_only_model = (
                only_model and not self.stop_requests.why
            )  # the next start goes on from this one
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit, self.args.save_only_model = limit, only_model
            with fail_together(world_group()):
                self._write_progress(folder)
            self._by_one_rank(folder, first_of_host=True, do=checkpoints.flush_files)
            self._by_one_rank(folder, first_of_host=False, do=self._complete)

    def _by_one_rank(self, folder: Path, *, first_of_host: bool, do: Any) -> None:
        """One rank works, of each host or of all; the others wait and fail with it. Collective over the world."""
        with fail_together(world_group()):
            if (self.args.local_process_index if first_of_host else self.args.process_index) == 0:
                do(folder)

    def _complete(self, folder: Path) -> None:
        unseen = [rank for rank in range(self.args.world_size) if not _progress_file(folder, rank).is_file()]
        if unseen:
            raise TrainingError(
                f"rank 0 does not see what rank {unseen[0]} has written to {folder}: `output_dir` must lie on a file system that "
                "all hosts share."
            )
        assert self._fingerprint is not None
        checkpoints.write_marker(
            folder, step=self.state.global_step, world_size=self.args.world_size, fingerprint=self._fingerprint
        )
        best = self.state.best_model_checkpoint
        checkpoints.rotate(self.args.folder, self.args.save_total_limit, Path(best) if best else None)

    def _write_progress(self, folder: Path) -> None:
        progress = {
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "loss": self._tr_loss.item(),
            "sums": self.summed(),
            "evaluate": self._stopping.evaluation_put_off,
        }
        folder.mkdir(parents=True, exist_ok=True)  # of the model only, rank 0 may not have begun yet
        _progress_file(folder, self.args.process_index).write_text(json.dumps(progress) + "\n")

    @contextmanager
    def _or_say_what_to_do(self, folder: Path) -> Iterator[None]:
        """Whatever keeps a checkpoint from being written, a full disk first of all, ends the run and leaves the one before."""
        try:
            yield
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)  # it may be what fills the disk
            complete = [found for found in checkpoints.find_complete(self.args.folder)[0] if not found.lacks]
            before = f"{complete[-1].folder} is complete and as it was" if complete else "there is no earlier one"
            free = shutil.disk_usage(self.args.folder).free / 2**30
            remedy = "Correct that"
            if is_about_disk(error):
                remedy = f"Make room ({free:.1f} GiB are free there), or lower `save_total_limit`"
            message = (
                f"{folder} could not be written by rank {self.args.process_index} ({socket.gethostname()}): "
                f"{' '.join(str(error).split()).rstrip('.') or type(error).__name__}; {before}. {remedy}, and start the same "
                f"command again: it {'continues from there' if complete else 'starts at the beginning'}."
            )
            if self.args.process_index != 0:
                logger.error(message)  # rank 0 prints what it raises; the others may be waiting for this rank
            raise TrainingError(message) from error


class _StopEvaluatingError(Exception):
    """The run is to stop; the evaluation is made again in the restart."""


class _Continue(TrainerCallback):
    """Where the Trainer lets others in: between its own resetting and the first step, and at the end of an epoch."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self._put_off = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._resumed is not None:
            self.trainer.continue_from(self.trainer._resumed)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Over several ranks the Trainer loses the sampler from sight when it skips what was trained: a run that resumes in the
        # second epoch would get the order of the first.
        if (sampler := self.trainer.train_sampler) is not None:
            sampler.set_epoch(int(state.epoch))
            sampler.skipped = state.global_step % max(1, len(sampler) // sampler.shape.size)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After an epoch's last step comes what its end asks for, such as an evaluation. A run that resumes there starts the next
        # epoch, so the checkpoint is written after all that.
        self._put_off = control.should_save and float(state.epoch).is_integer()
        if self._put_off:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._put_off:
            self._put_off, control.should_save = False, True


def choose(output_dir: Path, wanted: str | bool | None) -> Checkpoint | None:
    """The checkpoint that ``resume_from_checkpoint`` means. Incomplete ones are named in the log and never taken.

    Raises:
        ConfigError: the one that was asked for is not complete, or none is and one must be.
    """
    word = str(wanted).lower()
    if word in ("none", "false", "never"):
        return None
    if word not in ("auto", "true"):
        try:
            return _resumable(checkpoints.read_checkpoint(Path(str(wanted))))
        except IncompleteError as reason:
            raise ConfigError(
                f"`resume_from_checkpoint: {wanted}` {reason}; name a complete checkpoint, or `auto` for the newest."
            ) from None
    found, others = checkpoints.find_complete(output_dir)
    complete = []
    for checkpoint in found:
        try:
            complete.append(_resumable(checkpoint))
        except IncompleteError as reason:
            others[checkpoint.folder] = str(reason)
    for folder, why in others.items():
        logger.warning("%s is not used: it %s", folder, why)
    if complete:
        return complete[-1]
    if word == "true":
        raise ConfigError(
            f"`resume_from_checkpoint: {wanted}`: {output_dir} holds no complete checkpoint; `auto` starts anew then."
        )
    if others:
        logger.warning("%s holds no complete checkpoint: training starts at the beginning", output_dir)
    return None


def _resumable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or IncompleteError where it was saved to be used and not to go on from."""
    if checkpoint.lacks:
        raise IncompleteError(f"does not hold {checkpoint.lacks} (`save_only_model`?)")
    return checkpoint


def _progress_file(folder: Path, rank: int) -> Path:
    return folder / f"progress_{rank}.json"


def _read_progress(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads(_progress_file(folder, rank).read_text())

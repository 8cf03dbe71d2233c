"""A run that goes on is the run that was never stopped; a checkpoint is complete or ignored, and of this run or refused."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.atomic_files import is_about_disk
from mrpo_scale.base.errors import ConfigError, Preempted, TrainingError
from mrpo_scale.lifecycle import checkpoints
from mrpo_scale.lifecycle.resume import choose
from tests.tiny import pair_dataset, write_models

ROWS = 18  # 5 steps of 4 pairs an epoch, the last one of 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models; the policy has dropout, so that a lost random state shows."""
    folders = write_models(tmp_path_factory.mktemp("models"))
    path = Path(folders["gpt_neox"]) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_dropout": 0.1, "attention_dropout": 0.1}))
    return folders


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    """Ends the life after a step, as an exception does: nothing is saved or tidied up by the Trainer."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


def trainer(folders, output_dir, kill_at=None, rows=None, policy="gpt_neox", refs=("qwen2",), **keys):
    args = MRPOConfig(
        **{
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "disable_dropout": False,
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **keys,
        }
    )
    made = MRPOTrainer(
        folders[policy], [folders[name] for name in refs], args, rows or pair_dataset(ROWS), pair_dataset(5, 1)
    )
    if kill_at is not None:
        made.add_callback(Kill(kill_at))
    return made


MEASURED = ("time/", "tokens_per_second", "_runtime", "_per_second")


def logged(trainer):
    """What the run logged, without the stopwatch."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in MEASURED)}
        for entry in trainer.state.log_history
    ]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The uninterrupted run: (its folder, its log, its final weights)."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folders, folder)
    run.train()
    return folder, logged(run), {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}


def assert_same(run, whole):
    _, log, weights = whole
    assert logged(run) == log
    for name, tensor in run.policy.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("steps", [[7], [5], [1, 4, 8]], ids=["mid-epoch", "epoch-end", "three-lives"])
def test_a_resumed_run_is_the_uninterrupted_one(folders, tmp_path, whole, steps):
    """Weights, and every number of the log: means over steps before and after the kill, evaluations, dropout's random state."""
    for step in steps:
        with pytest.raises(KilledError):
            trainer(folders, tmp_path, kill_at=step).train("auto")
    last = trainer(folders, tmp_path)
    last.train("auto")
    assert_same(last, whole)


def test_an_epoch_ends_before_its_checkpoint(folders, tmp_path):
    """Saved at steps, evaluated and logged at epochs: the last step's checkpoint comes after what the epoch's end does."""
    keys = {"eval_strategy": "epoch", "logging_strategy": "epoch", "max_tokens_per_micro_batch": 100}
    one = trainer(folders, tmp_path / "one", **keys)
    one.train()
    with pytest.raises(KilledError):
        trainer(folders, tmp_path / "two", kill_at=5, **keys).train()
    two = trainer(folders, tmp_path / "two", **keys)
    two.train(True)
    assert logged(two) == logged(one)
    for name, tensor in two.policy.state_dict().items():
        assert torch.equal(tensor, one.policy.state_dict()[name]), name


class HoursAreOver(TrainerCallback):
    def __init__(self, run, step):
        self.run, self.step = run, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.run.stop_requests.max_hours = 1e-9


def test_max_hours_saves_and_the_next_life_is_the_uninterrupted_run(folders, tmp_path, whole):
    for step in (1, 7):
        run = trainer(folders, tmp_path, max_hours=10)
        run.add_callback(HoursAreOver(run, step))
        with pytest.raises(Preempted) as stopped:
            run.train("auto")
        assert stopped.value.code == 75
        told = json.loads((tmp_path / "PREEMPTED").read_text())
        assert (told["reason"], told["step"]) == ("max_hours", step)
        assert told["checkpoint"] == str(tmp_path / f"checkpoint-{step}")
    last = trainer(folders, tmp_path)
    last.train("auto")
    assert_same(last, whole)
    assert not (tmp_path / "PREEMPTED").exists()


def truncate(folder):
    path = folder / "optimizer.pt"
    os.truncate(path, path.stat().st_size // 2)


def lose(folder):
    (folder / "rng_state.pth").unlink()


def empty(folder):
    marker = (folder / checkpoints.MARKER).read_bytes()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / checkpoints.MARKER).write_bytes(marker)


def unmark(folder):
    (folder / checkpoints.MARKER).unlink()


def cut_marker(folder):
    os.truncate(folder / checkpoints.MARKER, 100)


def alter(folder):
    path = folder / "trainer_state.json"
    path.write_text(path.read_text().replace("3", "4"))


def point_outside(folder):
    path = folder / checkpoints.MARKER
    marker = json.loads(path.read_text())
    marker["files"]["../../secret"] = {"bytes": 1}
    path.write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes of optimizer.pt, which was saved with"),
        (lose, "lacks rng_state.pth"),
        (empty, "lacks "),
        (unmark, "has no complete.json: its save did not finish"),
        (cut_marker, "cannot be read"),
        (alter, "has other bytes in trainer_state.json"),
        (point_outside, "which no save writes"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_incomplete_checkpoint_is_named_and_the_one_before_used(whole, tmp_path, caplog, damage, reason):
    for step in (7, 8):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-8")
    assert choose(tmp_path, "auto").step == 7
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "checkpoint-8") in message and "is not used" in message and reason in message
    with pytest.raises(ConfigError, match=r"`resume_from_checkpoint: .*checkpoint-8`"):
        choose(tmp_path, str(tmp_path / "checkpoint-8"))
    shutil.rmtree(tmp_path / "checkpoint-7")
    assert choose(tmp_path, "auto") is None
    assert "starts at the beginning" in caplog.records[-1].getMessage()
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        choose(tmp_path, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.2}, "`beta`: 0.1 there, 0.2 now"),
        ({"learning_rate": 2e-3}, "`learning_rate`: 0.001 there, 0.002 now"),
        ({"refs": ("llama",)}, "`reference llama`: (not set) there"),
        ({"policy": "llama"}, "`policy`: "),
        ({"rows": "reversed"}, "`train pairs`: 18, "),
        ({"gradient_accumulation_steps": 1}, "set `gradient_accumulation_steps: 2`"),
        ({"per_device_train_batch_size": 3}, "choose `per_device_train_batch_size`"),
    ],
    ids=["beta", "learning_rate", "references", "policy", "data", "window", "odd-window"],
)
def test_another_run_is_refused(folders, tmp_path, whole, changes, message):
    if "rows" in changes:
        changes = {"rows": pair_dataset(ROWS).select(range(ROWS - 1, -1, -1))}
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        trainer(folders, tmp_path, **changes).train("auto")
    assert message in str(refused.value), refused.value
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_cannot_matter_may_change(folders, tmp_path, whole):
    """Logging, evaluation, places, the split of a window into micro-batches, a model that moved."""
    shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    moved = {name: str(shutil.copytree(folder, tmp_path / "moved" / name)) for name, folder in folders.items()}
    keys = {
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_total_limit": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "ref_cache_dir": str(tmp_path / "cache"),
    }
    run = trainer(moved, tmp_path, **keys)
    run.train("auto")
    assert run.state.global_step == 10


def test_rotation_keeps_the_newest_that_is_complete(folders, tmp_path):
    """save_total_limit: 1. A save that is killed at any point leaves the one before."""
    run = trainer(folders, tmp_path, kill_at=4, save_total_limit=1)
    steps = []
    mark = checkpoints.write_marker

    def marked(folder, **keys):
        assert [checkpoint.step for checkpoint in checkpoints.find_complete(tmp_path)[0]] == steps[-1:]
        mark(folder, **keys)
        steps.append(keys["step"])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(checkpoints, "write_marker", marked)
        run.train()
    assert steps == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_new_start_in_the_same_folder_is_the_newest(folders, tmp_path, whole):
    """`never`: an old checkpoint of a later step does not come back, and rotation takes the old ones first."""
    shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    with pytest.raises(KilledError):
        trainer(folders, tmp_path, kill_at=2, beta=0.3, save_total_limit=2).train("never")
    assert [checkpoint.step for checkpoint in checkpoints.find_complete(tmp_path)[0]] == [1, 2]
    again = trainer(folders, tmp_path, beta=0.3, kill_at=3)
    with pytest.raises(KilledError):
        again.train("auto")
    assert again.state.global_step == 3


class FillDisk(TrainerCallback):
    """No file may grow beyond this size from step 3 on: writes fail as they do on a full disk."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def test_a_full_disk_keeps_the_checkpoint_before(folders, tmp_path, whole):
    run = trainer(folders, tmp_path, save_total_limit=1)
    run.add_callback(FillDisk())
    try:
        with pytest.raises(TrainingError) as failed:
            run.train("auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    message = str(failed.value)
    assert f"{tmp_path / 'checkpoint-3'} could not be written by rank 0" in message
    assert f"{tmp_path / 'checkpoint-2'} is complete and as it was" in message and "Make room" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = trainer(folders, tmp_path, save_total_limit=1)
    again.train("auto")
    assert_same(again, whole)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("optimizer.pt", "the optimizer's state"),
        ("scheduler.pt", "the schedule's state"),
        ("rng_state.pth", "a rank's random state"),
        ("progress_0.json", "a rank's progress"),
        ("trainer_state.json", "the Trainer's state"),
    ],
)
def test_a_checkpoint_that_never_had_what_resuming_needs_is_not_gone_on_from(whole, tmp_path, caplog, name, what):
    """Its files are all there and as they were saved; that they suffice is another question."""
    for step in (7, 8):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / name).unlink()
    marker = json.loads((tmp_path / "checkpoint-8" / checkpoints.MARKER).read_text())
    del marker["files"][name]
    (tmp_path / "checkpoint-8" / checkpoints.MARKER).write_text(json.dumps(marker))
    assert [c.lacks for c in checkpoints.find_complete(tmp_path)[0]] == [None, what]
    assert choose(tmp_path, "auto").step == 7
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"checkpoint-8 is not used: it does not hold {what}" in message
    with pytest.raises(ConfigError, match=rf"`resume_from_checkpoint: .*checkpoint-8` does not hold {what}"):
        choose(tmp_path, str(tmp_path / "checkpoint-8"))


def test_early_stopping_goes_on_counting(folders, tmp_path):
    """A run that was killed amid the patience of early stopping ends where the undisturbed one does."""
    keys = {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-2, "eval_steps": 1}
    keys |= {"disable_dropout": True, "eval_on_start": False}
    ends = []
    for name, kills in (("one", [None]), ("two", [2, None])):
        for kill_at in kills:
            run = trainer(folders, tmp_path / name, kill_at=kill_at, **keys)
            run.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
            if kill_at:
                with pytest.raises(KilledError):
                    run.train()
            else:
                run.train("auto")
        ends.append((run.state.global_step, logged(run)))
    assert ends[0][0] < 10, "never stopped early: the test shows nothing"
    assert ends[0] == ends[1]


class Unwritable(TrainerCallback):
    """From step 3 on the tokenizer cannot be saved, which has nothing to do with room."""

    def __init__(self, run):
        self.run = run

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.run.processing_class.chat_template = {"a": object()}


def test_a_save_that_fails_for_another_reason_does_not_speak_of_room(folders, tmp_path):
    run = trainer(folders, tmp_path)
    run.add_callback(Unwritable(run))
    with pytest.raises(TrainingError) as failed:
        run.train("auto")
    message = str(failed.value)
    assert f"{tmp_path / 'checkpoint-3'} could not be written" in message and "checkpoint-2 is complete" in message
    assert "oom" not in message and "GiB" not in message and "Correct that, and start the same command again" in message


@pytest.mark.parametrize(
    ("error", "room"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 704 vs 598"), True),
        (Exception('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), True),
        (TrainingError("rank 1 failed: OSError: [Errno 28] No space left on device"), True),
        (ValueError("GenerationConfig is invalid: `temperature`"), False),
    ],
)
def test_what_is_about_room(error, room):
    assert is_about_disk(error) == room
    try:
        raise RuntimeError("a save failed") from error
    except RuntimeError as outer:
        assert is_about_disk(outer) == room


class StopAtTheEnd(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == 10:
            (Path(args.output_dir) / "STOP").touch()


def test_a_stop_after_the_last_step_leaves_the_best_step_measured(folders, tmp_path):
    """As all that comes after the last step, it is not broken off."""
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 3e-2, "save_steps": 2}
    run = trainer(folders, tmp_path, eval_on_start=False, **keys)
    run.add_callback(StopAtTheEnd())
    run.train()
    assert run.state.best_global_step < 10
    best = next(e for e in logged(run) if e["step"] == run.state.best_global_step and "eval_loss" in e)
    assert run.results["eval_loss"] == best["eval_loss"]

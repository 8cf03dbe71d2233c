"""What a launcher left behind: locks of builds that were killed, restarts that cannot work."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import mrpo_scale
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.config import launcher as launched
from mrpo_scale.config.keys import MRPOConfig

ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GATHER = "stage3_gather_16bit_weights_on_model_save"


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    file = tmp_path / "deepspeed_shm_comm_op" / "lock"
    file.parent.mkdir()
    return file


def write(lock, age):
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)


def test_a_killed_builds_lock_is_removed_and_named(lock, caplog):
    write(lock, age=launched.BUILD_SECONDS + 60)
    launched.clear_stale_build_locks()
    assert not lock.exists()
    assert str(lock) in caplog.text and "killed 6 minutes ago" in caplog.text


def test_a_young_lock_may_be_another_hosts(lock, caplog, monkeypatch):
    """It is waited for, aloud; it goes when that host has finished, and is taken away when it never does."""
    write(lock, age=launched.BUILD_SECONDS - 1.5)
    threading.Timer(0.3, lock.unlink).start()
    launched.clear_stale_build_locks()
    assert "waiting up to" in caplog.text and str(lock) in caplog.text and "removing" not in caplog.text
    write(lock, age=launched.BUILD_SECONDS - 1.5)
    launched.clear_stale_build_locks()
    assert "removing" in caplog.text and not lock.exists()


@pytest.mark.processes
def test_a_build_that_goes_on_is_left_alone(lock, caplog):
    """However old: torch keeps the lock open while it compiles."""
    code = "import sys, time; file = open(sys.argv[1], 'w'); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None and builder.stdout.readline()
        write(lock, age=launched.BUILD_SECONDS + 60)
        launched.clear_stale_build_locks()
        assert lock.exists() and not caplog.text
        builder.kill()


def test_a_config_deletes_nothing_and_refuses_to_wait(lock, tmp_path, caplog):
    """A script under a launcher makes one before its ranks meet, which is where torch would wait."""
    run = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none", "deepspeed": "zero3_cpu"}
    write(lock, age=launched.BUILD_SECONDS + 60)
    with pytest.raises(
        ConfigError, match=rf"{lock} was left by a build .* mrpo_scale.prepare_launch\(\) before MRPOConfig"
    ):
        MRPOConfig(**run)
    assert lock.exists()
    write(lock, age=1)
    launched.check_build_locks()
    assert "prepare_launch" in caplog.text and lock.exists()
    write(lock, age=launched.BUILD_SECONDS + 60)
    mrpo_scale.prepare_launch()
    assert not lock.exists()


@pytest.mark.parametrize(("command", "clears"), [("train", True), ("score", True), ("eval", True), ("check", False)])
def test_commands_clear_the_locks_before_they_read_a_recipe(command, clears, lock, capsys):
    write(lock, age=launched.BUILD_SECONDS + 60)
    with pytest.raises(SystemExit):
        run_command(command, ["--config", "no such recipe", "--model_name_or_path", "x"])
    assert lock.exists() != clears


def test_one_rank_of_a_host_looks(lock, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    write(lock, age=launched.BUILD_SECONDS + 60)
    launched.clear_stale_build_locks()
    assert lock.exists()


def test_alone_without_a_launcher(monkeypatch):
    """One process says what a launcher of one says; several GPUs, or several tasks of srun, are a mistake."""
    for name in (*ALONE, "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not launched.is_launched()
    launched.launch_alone("zero3")
    assert (
        launched.is_launched() and {os.environ[name] for name in ALONE[:2]} == {"0"} and os.environ["WORLD_SIZE"] == "1"
    )
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"`deepspeed: zero3`: srun started 8 processes"):
        launched.launch_alone("zero3")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ConfigError, match=r"`deepspeed: zero3` .* 1 of 8 GPUs.*accelerate launch"):
        launched.launch_alone("zero3")


def test_restarts_within_a_store_that_outlives_them_are_refused(monkeypatch):
    launched.check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    launched.check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match=r"`--max_restarts 2`.*c10d.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        launched.check_restarts()


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 3, GATHER: False}, {"stage": 3, GATHER: True}])
def test_zero3_gives_its_weights_to_a_save(zero, caplog):
    caplog.set_level("INFO")
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": dict(zero)})
    launched.let_weights_be_saved(plugin)
    assert plugin.deepspeed_config["zero_optimization"][GATHER] is True
    assert ("taken as true" in caplog.text) == (not zero.get(GATHER))


def test_weights_that_are_split_otherwise_are_refused():
    plugin = SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": 2}})
    with pytest.raises(ConfigError, match=r"`tensor_parallel.autotp_size: 2` of the DeepSpeed file"):
        launched.let_weights_be_saved(plugin)


@pytest.mark.parametrize(
    ("zero", "per_node", "message"),
    [
        ({"mics_shard_size": 8}, "8", "`zero_optimization.mics_shard_size: 8`: DeepSpeed 0.19 has no MiCS"),
        ({"zero_hpz_partition_size": 8}, "4", "`zero_hpz_partition_size: 8` does not divide 4, the ranks of a node"),
        ({"zero_hpz_partition_size": 3}, "6", "`zero_hpz_partition_size: 3` does not divide 16, the ranks of the run"),
        ({"zero_hpz_partition_size": "auto"}, "4", "`zero_hpz_partition_size: auto` must be a whole number"),
    ],
)
def test_groups_that_nodes_are_not_made_of_are_refused(monkeypatch, zero, per_node, message):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    with pytest.raises(ConfigError, match=message):
        launched.let_weights_be_saved(SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3, **zero}}))


def test_a_process_alone_has_no_backend(tmp_path):
    """A recipe for ranks on CPUs also runs without a launcher."""
    assert MRPOConfig(str(tmp_path), ddp_backend="gloo", use_cpu=True, report_to="none").world_size == 1

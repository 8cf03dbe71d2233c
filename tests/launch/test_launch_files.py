"""Launch files: shells, YAML and schemas hold, and the batch scripts do what they say around a stand-in for the cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.tools import require_tool

LAUNCH = Path(__file__).parents[2] / "launch"
BATCH = sorted(LAUNCH.glob("slurm/*.sbatch"))
KUBERNETES = "1.31"  # podFailurePolicy is stable since
SERVICE, JOB = yaml.safe_load_all((LAUNCH / "k8s" / "train.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def shellcheck(path):
    found = subprocess.run([require_tool("shellcheck"), "--shell=bash", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# --- syntax and schemas


@pytest.mark.processes
@pytest.mark.parametrize("path", BATCH, ids=lambda p: p.name)
def test_batch_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck(path)


@pytest.mark.parametrize("path", BATCH, ids=lambda p: p.name)
def test_slurm_reads_every_directive(path):
    """sbatch stops reading at the first command, and takes these options (its manual page)."""
    lines = path.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.split(maxsplit=1)[1] for line in lines if line.startswith("#SBATCH")]
    assert directives == [line.split(maxsplit=1)[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue open-mode output array exclusive"
    assert {d.removeprefix("--").split("=")[0] for d in directives} <= set(known.split())


@pytest.mark.parametrize("document", [SERVICE, JOB], ids=["service", "job"])
def test_kubernetes_takes_the_manifest(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_manifests_parts_fit_together():
    env = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(env["NODES"])
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"].items() <= JOB["spec"]["template"]["metadata"]["labels"].items()
    first = f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert (
        f"--main_process_ip {first} --main_process_port {SERVICE['spec']['ports'][0]['port']}" in CONTAINER["args"][0]
    )
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    ignored = JOB["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert ignored["containerName"] == CONTAINER["name"]
    assert f"exit {ignored['values'][0]}" in CONTAINER["args"][0]
    assert f"NODES * {CONTAINER['resources']['limits']['nvidia.com/gpu']}" in CONTAINER["args"][0]


@pytest.mark.processes
@pytest.mark.parametrize("script", [CONTAINER["args"][0], CONTAINER["lifecycle"]["preStop"]["exec"]["command"][2]])
def test_the_manifests_scripts_are_bash(tmp_path, script):
    path = tmp_path / "script.sh"
    path.write_text("#!/usr/bin/env bash\n" + script)
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck(path)


# --- what the scripts do

#: Stand-ins for the commands of a cluster. Each notes its words; `srun` runs what it is given, as one node would.
STAND_INS = {
    "srun": 'echo "srun $*" >> "$CALLS"; shift; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || printf "node1\\nnode2\\n"',
    "accelerate": 'echo "accelerate $*" >> "$CALLS"; eval "$TRAINING"',
}


class Cluster:
    def __init__(self, folder):
        self.folder, self.out, self.calls_file = folder, folder / "out", folder / "calls"
        self.calls_file.touch()
        tools = folder / "bin"
        tools.mkdir()
        for name, script in STAND_INS.items():
            (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (tools / name).chmod(0o755)
        self.env = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "OUT": str(self.out),
            "SLURM_JOB_ID": "70123",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": "1",
            "SLURM_GPUS_ON_NODE": "4",
        }

    def start(self, words, training, **env):
        return subprocess.Popen(
            words, cwd=self.folder, env={**self.env, "TRAINING": training, **env}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def train(self, training):
        return self.start([LAUNCH / "slurm" / "train.sbatch", "my.yaml", self.out, "--beta", "0.2"], training)

    def calls(self, command):
        return [
            line.split(" ", 1)[1] for line in self.calls_file.read_text().splitlines() if line.split()[0] == command
        ]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


SAVES = 'mkdir -p "$OUT/checkpoint-2" && sleep 0.05 && touch "$OUT/checkpoint-2/complete.json"'
STOPS = 'while [ ! -e "$OUT/STOP" ]; do sleep 0.05; done; touch "$OUT/PREEMPTED"'


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.processes
def test_the_train_script_starts_a_launcher_on_each_node(cluster):
    process = cluster.train("true")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    (words,) = cluster.calls("accelerate")
    assert words == (
        "launch --machine_rank 1 --config_file launch/accelerate/multi_node_zero3.yaml --num_machines 2 --num_processes 8 "
        f"--main_process_ip node1 --main_process_port 20123 launch/train.py --config my.yaml --output_dir {cluster.out} --beta 0.2"
    )
    assert not [call for call in cluster.calls("scontrol") if call.startswith("requeue")]


@pytest.mark.processes
@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_stops_saves_and_requeues(cluster, warning):
    cluster.out.mkdir()
    (cluster.out / "PREEMPTED").touch()  # of the life before
    process = cluster.train(f'touch "$OUT/running"; {STOPS}')
    wait_for(cluster.out / "running")
    assert not (cluster.out / "PREEMPTED").exists()
    process.send_signal(warning)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert (cluster.out / "STOP").exists()
    assert cluster.calls("scontrol")[-1] == "requeue 70123"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("training", "again"), [("exit 1", False), (f"{SAVES}; exit 1", True)], ids=["at-once", "later"]
)
def test_a_failure_is_tried_again_if_it_got_further(cluster, training, again):
    (cluster.out / "checkpoint-1").mkdir(parents=True)
    (cluster.out / "checkpoint-1" / "complete.json").touch()  # of the life before
    time.sleep(0.05)
    process = cluster.train(training)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    assert ("requeue 70123" in cluster.calls("scontrol")) == again


@pytest.mark.processes
def test_the_score_script(cluster):
    process = cluster.start([LAUNCH / "slurm" / "score.sbatch", "my.yaml", "cache", "--reference", "qwen"], "exit 3")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 3, output  # so that afterok does not hold
    (words,) = cluster.calls("accelerate")
    assert words.endswith("launch/score.py --config my.yaml --ref_cache_dir cache --reference qwen")
    assert "--num_processes 4 " in words
    array = {"ID": "7", "MIN": "1", "STEP": "2", "COUNT": "5"}
    process = cluster.start(
        [LAUNCH / "slurm" / "score.sbatch", "my.yaml", "cache"],
        "true",
        **{f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()},
    )
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert cluster.calls("accelerate")[-1].endswith("--ref_cache_dir cache --job 3/5")


@pytest.mark.processes
@pytest.mark.parametrize("path", BATCH, ids=lambda p: p.name)
def test_too_few_words_are_an_error(cluster, path):
    process = cluster.start([path, "my.yaml"], "true")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and output.startswith("usage: sbatch ")


@pytest.mark.processes
@pytest.mark.parametrize(("training", "status"), [("true", 0), ("exit 1", 1), ('touch "$OUTPUT_DIR/PREEMPTED"', 75)])
def test_the_pods_exit_code_says_whether_to_start_it_again(cluster, training, status):
    env = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    env |= {"OUTPUT_DIR": str(cluster.out), "JOB_COMPLETION_INDEX": "0"}
    process = cluster.start([*CONTAINER["command"], *CONTAINER["args"]], training, **env)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status, output
    assert "--machine_rank 0 " in cluster.calls("accelerate")[0]

"""`accelerate launch launch/eval.py --model FOLDER --dataset_name SET [--key value ...]`."""

from mrpo_scale.cli import run_command

if __name__ == "__main__":
    run_command("eval")

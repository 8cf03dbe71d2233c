"""`accelerate launch launch/reward.py --config RECIPE --output_dir FOLDER`: train a reward model. Plain `python` works too."""

from mrpo_scale.cli import run_command

if __name__ == "__main__":
    run_command("reward")

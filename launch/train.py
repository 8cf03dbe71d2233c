"""`accelerate launch launch/train.py [--config RECIPE] [--key value ...]`; without arguments, the quickstart."""

from mrpo_scale.cli import train_main

if __name__ == "__main__":
    train_main()

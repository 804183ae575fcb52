"""Trains what a YAML file describes: `accelerate launch train.py --config configs/digits.yaml`."""

from trainer.cli import leave, train

if __name__ == "__main__":
    leave(train())

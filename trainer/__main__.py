"""`python -m trainer`: what can be done with a run's results."""

from trainer.cli import leave, main

if __name__ == "__main__":
    leave(main())

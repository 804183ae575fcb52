"""`python -m launch TARGET --config FILE [section.key=value ...]`."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m moewright`` is the command ``moewright``."""

import sys

from moewright.cli import main

if __name__ == "__main__":
    sys.exit(main())

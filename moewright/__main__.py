"""``python -m moewright`` is the command ``moewright``."""

from moewright.cli import leave, main

if __name__ == "__main__":
    leave(main())

"""python -m sd_unlearn: the same as the command sd-unlearn."""

from sd_unlearn.cli import entry

if __name__ == "__main__":
    entry()

"""accelerate launch train.py --concept "Brad Pitt"      (the same as: sd-unlearn train --concept "Brad Pitt")"""

import sys

from sd_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""``deepspeed --module phigrow.training [recipe.yaml] [--key value ...]`` pretrains from an installed phigrow."""

import sys

from phigrow.training.entry import main

if __name__ == "__main__":
    sys.exit(main())

"""``deepspeed --module phigrow.training [recipe.yaml] [--key value ...]``: the recipe, without a checkout."""

import sys

from phigrow.training.entry import main

if __name__ == "__main__":
    sys.exit(main())

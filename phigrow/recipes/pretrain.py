"""Pretrain a language model with DeepSpeed: ``deepspeed recipes/pretrain.py [recipe.yaml] [--key value ...]``."""

import sys

from phigrow.training import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m phigrow.training`: the pretraining recipe without the repository."""

import sys

from phigrow.training.entry import main

sys.exit(main())

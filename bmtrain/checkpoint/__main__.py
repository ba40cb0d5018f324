"""``python -m bmtrain.checkpoint``."""

import sys

from .command import main

sys.exit(main())

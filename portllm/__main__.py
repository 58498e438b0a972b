"""``python -m portllm``."""

import sys

from .cli import main

sys.exit(main())

"""``python -m portllm``."""

import os
import sys

from .cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun: gloo's threads may abort a Python that ends in the usual way
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
sys.exit(code)

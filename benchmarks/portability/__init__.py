"""How long a patch keeps its worth on an evolving model: the paper's protocol as a program (see README.md)."""

import sys
from pathlib import Path

# Examples and benchmarks are scripts that import each other by file name.
_BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path += [str(_BENCHMARKS), str(_BENCHMARKS.parent / "examples")]

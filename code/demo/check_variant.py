"""Refuses an unknown variant in one line, before the demo makes anything."""

import sys

from qwen_vl_streaming.errors import run
from qwen_vl_streaming.variants import get_variant

if __name__ == "__main__":
    run(lambda: get_variant(sys.argv[1]) and None)

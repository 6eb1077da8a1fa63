"""`python -m qwen_vl_streaming.replay`"""

from ..common.errors import run
from .cli import main

if __name__ == "__main__":
    run(main)

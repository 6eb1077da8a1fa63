"""`python -m qwen_vl_streaming.explain`"""

from ..common.errors import run
from .cli import main

if __name__ == "__main__":
    run(main)

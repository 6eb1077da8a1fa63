"""`python -m qwen_vl_streaming.live`"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, prints no traceback

    from ..common.errors import run
    from .cli import main

    run(main)

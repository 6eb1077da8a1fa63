"""`python -m qwen_vl_streaming.serve`"""

import importlib.util
import signal
import sys

NEEDED = ("starlette", "uvicorn", "websockets", "prometheus_client")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, prints no traceback
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"error: the server needs {', '.join(missing)}: pip install 'qwen-vl-streaming[serve]', or -r "
            "requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)

    from ..common.errors import run
    from .cli import main

    run(main)

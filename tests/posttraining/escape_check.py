"""Every program of escapes.py, each in a sandbox of its own, and what contained it:

python -m tests.posttraining.escape_check [--walls=bubblewrap]
"""

import os
import re
import socket
import sys
import time

from deepseek_jax.posttraining import sandbox
from tests.posttraining import escapes
from tests.posttraining.leftovers import left_over


def main() -> int:
    box = sandbox.Sandbox(sandbox.Limits(seconds=3))
    box.walls = next((a.removeprefix("--walls=") for a in sys.argv[1:]), box.walls)
    abstract = f"escapes-{os.getpid()}"
    server, unnamed = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unnamed.bind(f"\0{abstract}")
    unnamed.listen()
    bad = 0
    with server, unnamed:
        for escape in escapes.ALL:
            placed = escapes.placed(escape, server.getsockname()[1], abstract)
            begin = time.monotonic()
            verdict = box.check(placed.program, placed.tests)
            said = f"{verdict.reason}: {verdict.detail}"
            contained = not verdict.passed and re.match(escape.contained, said) and not left_over()
            bad += not contained
            print(
                f"{'' if contained else 'NOT CONTAINED '}{escape.name} | {said[:90]} | {time.monotonic() - begin:.2f} s"
            )
    print(f"{len(escapes.ALL) - bad} of {len(escapes.ALL)} contained by {box.walls}, uid {os.geteuid()}")
    return bad


if __name__ == "__main__":
    sys.exit(main())

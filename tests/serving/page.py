"""The server's page in a real browser, by hand:

    python -m tests.serving.page --playwright=ENV/bin/python --browser=/usr/bin/chromium --out=FOLDER

A message streams, Stop stops, reasoning is folded, a model without a chat template continues text, and what goes wrong is said
in a line; screenshots go to FOLDER. The environment: `pip install playwright`; Debian's package `chromium` has the browser.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from tests.serving.running import TEMPLATE, running

THINKS = TEMPLATE.replace("'<think>' if thinking else '</think>'", "'<think>'")
# What is looked at -> the checkpoint's template, options of the server.
CASES = {
    "chat": (TEMPLATE, {}),
    "reasoning": (THINKS, {}),
    "plain": (None, {}),
    "key": (TEMPLATE, {"api_key": "secret"}),
    "busy": (TEMPLATE, {"waiting": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--playwright", required=True, help="interpreter that has it")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="folder for the screenshots")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("page_in_browser.py")
    for name in args.cases:
        template, options = CASES[name]
        with running(template, rows=8, **options) as (server, _):
            subprocess.run(
                [args.playwright, script, name, server.url, args.browser, args.out],
                check=True,
                env=os.environ,
            )
        print(f"  page: {name}", flush=True)


if __name__ == "__main__":
    main()

"""Kills `experiments.distill` by SIGKILL at random moments, starts it again each time, and compares it with an undisturbed run.

    python -m tests.posttraining.distill_kills --expert=runs/tiny_sft --kills=10

Exit status 0 if all files are equal, bit for bit. A folder may be left by a kill at any moment: of loading, drawing, writing.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = ("answers.jsonl", "sft.jsonl", "judgements.jsonl", "card.json", "card.md")


def command(expert: str, folder: Path) -> list[str]:
    settings = {
        "expert": expert,
        "prompts.sources": "tasks:addition/2/64=1",
        "judgements": True,
        "at_once": 8,
        "right": 0.0,
        "out_dir": folder,
    }
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "experiments.distill", "--config=configs/tiny_distill.py", *arguments]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--expert", required=True)
    parser.add_argument("--kills", type=int, default=10)
    asked = parser.parse_args()
    draw, quiet = random.Random(0), {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root) / "whole", Path(root) / "killed"
        began = time.monotonic()
        subprocess.run(command(asked.expert, whole), check=True, **quiet)
        seconds = time.monotonic() - began
        for i in range(asked.kills):
            process = subprocess.Popen(command(asked.expert, killed), **quiet)
            time.sleep(draw.uniform(0.2, 1.0) * seconds)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            lines = (killed / FILES[0]).read_text().count("\n") if (killed / FILES[0]).exists() else 0
            print(f"kill {i + 1}: {lines} answers", flush=True)
        subprocess.run(command(asked.expert, killed), check=True, **quiet)
        different = [name for name in FILES if (whole / name).read_bytes() != (killed / name).read_bytes()]
    print(f"different: {', '.join(different)}" if different else f"{asked.kills} kills, all files equal")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())

"""`deepseek-jax COMMAND ...`, or `python -m experiments COMMAND ...`: the same as `python -m experiments.COMMAND ...`."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from experiments import command_line

COMMANDS = (
    *("train", "extend", "sft", "grpo", "distill", "generate", "serve", "convert", "launch", "plan", "bench"),
    *("tasks", "fp8_study", "kill_test", "kill_conversion", "mutations"),
)


def about(name: str) -> str:
    """Returns the first sentence of the command's docstring, up to the colon or full stop that ends it."""
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return min((first.partition(end)[0] for end in (": `", ". ")), key=len).rstrip(".:")


def table() -> str:
    lines = [f"  {name:<17}{about(name)}" for name in COMMANDS]
    return "\n".join(
        (
            "deepseek-jax COMMAND --help tells more. Commands:",
            *lines,
            "  bench of kernels: python -m pallas_kernels.bench",
        )
    )


def main() -> None:
    """Runs a command as if it were the program."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(table())
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        command_line.complain(
            f"no command {name!r}; "
            + (f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}")
        )
        sys.exit(command_line.MISTAKE)
    sys.argv = [f"deepseek-jax {name}", *sys.argv[2:]]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

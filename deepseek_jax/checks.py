"""What the config dataclasses say of a value that cannot be."""

import difflib


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r} is not one of {list(choices)}{hint}")

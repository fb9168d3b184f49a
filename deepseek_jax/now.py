"""`doing` tells what the library does now to the function that shows it; by default nothing is shown.

    with now.shown_by(show):                  # show: text -> context manager around the work
        ...
        with now.doing("compiling the training step"):
            ...

Heard in the thread of `shown_by` only.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

Show = Callable[[str], contextlib.AbstractContextManager[Any]]

_show: ContextVar[Show] = ContextVar("show", default=contextlib.nullcontext)


def doing(what: str) -> contextlib.AbstractContextManager[Any]:
    """Around work that may take seconds: `what` as in "reading the corpus"."""
    return _show.get()(what)


@contextlib.contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """In the block, `show(what)` is entered and left with each `doing(what)`."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)

"""Log records as JSON lines: time, level, event, and the fields of the record."""

import datetime
import logging

from deepseek_jax.serving.server.wire import json_text


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(
            timespec="milliseconds"
        )
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json_text(line)


def to_stream(stream, level: int = logging.INFO) -> None:  # type: ignore[no-untyped-def]
    """The server's records, and uvicorn's warnings, as lines of `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, least in (("deepseek_jax.serving", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)

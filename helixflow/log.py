"""Structured logs on standard error: JSON in production, readable on a terminal."""

import logging
import sys
from typing import Any

import orjson
import structlog

from helixflow import core_rs
from helixflow.config import LogConfig


def _to_json(value: Any, **options: Any) -> str:
    return orjson.dumps(value, default=options.get("default") or str).decode()


def is_console(config: LogConfig) -> bool:
    """Whether lines are written for people."""
    return config.format == "console" or (config.format == "auto" and sys.stderr.isatty())


def setup(config: LogConfig, service: str) -> None:
    """Configures structlog, the standard library's logging and the extension's for one process.

    Every line carries `timestamp` (RFC 3339, UTC), `level`, `service` and `event`.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    console = is_console(config)
    core_rs.init_logging(service, config.level, json=not console)

    def add_service(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
    ]
    final: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if console
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(serializer=_to_json)]
    )
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def get(name: str) -> Any:
    """A logger; `name` tells the component."""
    return structlog.get_logger(component=name)

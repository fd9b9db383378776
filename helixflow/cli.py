"""The command line. A command's code is imported when the command runs, so that `--help` is instant."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helixflow import __version__
from helixflow.arguments import Parser
from helixflow.config import Config, load
from helixflow.errors import HelixError
from helixflow.liveness import write_stacks_at_the_end
from helixflow.process import die_with_starter, outlive_readers
from helixflow.terminal import say


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Each leaf sets `run`, a function of the parsed arguments."""
    import helixflow.admin.cli
    import helixflow.db.cli
    import helixflow.engine.cli
    import helixflow.ledger.cli
    import helixflow.pki.cli

    parser = Parser(prog="helixflow", description="A self-hosted AI inference platform.")
    commands: Any = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _service(commands, "serve", "run every service of this machine in the foreground", _serve)
    _service(commands, "gateway", "run the api-gateway alone", _gateway)
    _service(commands, "auth", "run the auth-service alone", _auth)
    _service(commands, "pool", "run the inference-pool alone", _pool)
    helixflow.pki.cli.add_parser(commands)
    helixflow.engine.cli.add_parser(commands)
    helixflow.db.cli.add_parser(commands)
    helixflow.admin.cli.add_parser(commands)
    helixflow.ledger.cli.add_parser(commands)
    _config(commands)
    version = commands.add_parser("version", help="print the version", description="Print the version.")
    version.add_argument("--json", action="store_true", help="as JSON, with the versions of the main parts")
    version.set_defaults(run=_version)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    if arguments is None:
        outlive_readers()
    try:
        options = build_parser().parse_args(arguments)
        die_with_starter()
        status: int = options.run(options)
    except HelixError as error:
        say(f"helixflow: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return status


def _service(commands: Any, name: str, text: str, run: Any) -> None:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--config", metavar="FILE", help="TOML file (default: HELIX_CONFIG)")
    parser.add_argument("--profile", choices=("production", "development"), help="overrides the configuration")
    if name in ("serve", "pool"):
        parser.add_argument(
            "--model", metavar="DIR", help="checkpoint to serve (default: HELIX_MODEL, or the demo model)"
        )
    parser.set_defaults(run=run)


def _load(options: argparse.Namespace) -> Config:
    """The configuration. Options become environment variables, so that child processes see them too."""
    for name, variable in (("config", "HELIX_CONFIG"), ("profile", "HELIX_PROFILE"), ("model", "HELIX_MODEL")):
        if getattr(options, name, None):
            os.environ[variable] = getattr(options, name)
    return load()


def _serve(options: argparse.Namespace) -> int:
    def run(config: Config) -> int:
        from helixflow import supervisor

        return supervisor.run(config, lambda line: say(line, flush=True))

    return _run(options, "supervisor", run)


def _gateway(options: argparse.Namespace) -> int:
    def run(config: Config) -> int:
        from helixflow.gateway import server

        return server.run(config)

    return _run(options, "api-gateway", run)


def _auth(options: argparse.Namespace) -> int:
    def run(config: Config) -> int:
        from helixflow.auth import service

        return service.run(config)

    return _run(options, "auth-service", run)


def _pool(options: argparse.Namespace) -> int:
    def run(config: Config) -> int:
        from helixflow.pool import service

        return service.run(config)

    return _run(options, "inference-pool", run)


def _run(options: argparse.Namespace, name: str, service: Callable[[Config], int]) -> int:
    """Runs a service. What stops it is a line of its log, so that a reader of JSON sees nothing but JSON."""
    # "Load new certificates" must not end a service that is still loading the present ones.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    from helixflow import log
    from helixflow.confine import harden, kernel

    config = _load(options)
    log.setup(config.log, name)
    write_stacks_at_the_end()
    if name == "supervisor":
        kernel.forbid_core_dumps()  # what it starts gives up more; it gives accounts and folders to them before
    else:
        harden.harden()
    try:
        return service(config)
    except HelixError as error:
        if log.is_console(config.log):
            raise
        log.get(name).error("cannot start", error=str(error))
        return error.exit_status


def _config(commands: Any) -> None:
    text = "check the configuration, list its options"
    parser = commands.add_parser("config", help=text, description=text[0].upper() + text[1:] + ".")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = actions.add_parser(
        "check",
        help="print the effective configuration, secrets masked",
        description="Read file and environment, print the effective configuration with secrets masked. "
        "Exit status 64 and every problem when it is wrong.",
    )
    check.add_argument("--config", metavar="FILE", help="TOML file (default: HELIX_CONFIG)")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_check)
    options = actions.add_parser(
        "options", help="list every option with its default", description="List every option with its default."
    )
    options.set_defaults(run=_options)


def _check(options: argparse.Namespace) -> int:
    from helixflow import config

    described = config.describe(config.load(Path(options.config) if options.config else None))
    if options.json:
        say(json.dumps(described, indent=2))
        return 0
    for name, value in described.items():
        if isinstance(value, dict):
            say(f"\n[{name}]")
            for key, item in value.items():
                say(f"{key} = {json.dumps(item)}")
        else:
            say(f"{name} = {json.dumps(value)}")
    return 0


def _options(_options: argparse.Namespace) -> int:
    import dataclasses

    from helixflow import config

    sections: dict[str, type[Any]] = {"": config.Config, **config.SECTIONS}
    for section, cls in sections.items():
        for field in dataclasses.fields(cls):
            if "doc" in field.metadata:
                name = f"{section}.{field.name}" if section else field.name
                variable = field.metadata["env"] or "HELIX_" + name.replace(".", "_").upper()
                say(f"{name} ({variable})\n    {field.metadata['doc']}")
    return 0


def _version(options: argparse.Namespace) -> int:
    import platform
    from importlib import metadata

    if not options.json:
        say(f"helixflow {__version__}")
        return 0
    versions = {"helixflow": __version__, "python": platform.python_version()}
    for name in ("granian", "numpy", "onnxruntime"):
        versions[name] = metadata.version(name)
    say(json.dumps(versions))
    return 0

"""`helixflow gateway`: checks everything, binds the address, runs the workers."""

import os
import resource
import socket

from helixflow import log
from helixflow.config import Config
from helixflow.confine import kernel
from helixflow.errors import StartError
from helixflow.gateway.certificates import GatewayFiles
from helixflow.gateway.worker import DEFAULT_CONNECT
from helixflow.gateway.workers import Workers
from helixflow.options import Address
from helixflow.pki.errors import PkiError
from helixflow.process import notify_ready

OTHER_FILES = 256

logger = log.get("gateway")


def run(config: Config, connect: str = DEFAULT_CONNECT) -> int:
    """Serves in the foreground until SIGINT or SIGTERM; returns the exit status.

    The first such signal drains, a second one (or `gateway.drain_timeout_s`) cuts; SIGHUP loads new certificates.
    `connect` (`module:name`) makes the bridge of a worker. Raises StartError for unusable certificates, and when the
    address cannot be had, before any worker starts.
    """
    try:
        GatewayFiles.of(config).verify()
    except PkiError as error:
        raise StartError(f"the api-gateway cannot start: {error}") from error
    _room_for(config)
    listener = bind(config.gateway.listen, config.gateway.backlog)
    if os.geteuid() != 0:
        # A port for the privileged is bound now, and needs no capability any more.
        kernel.set_capabilities(())
    address = Address(config.gateway.listen.host, listener.getsockname()[1])

    def ready() -> None:
        scheme = "http" if config.gateway.plain_http else "https"
        logger.info("gateway ready", url=f"{scheme}://{address}", workers=config.gateway.workers)
        notify_ready(str(address))

    return Workers(config, listener, connect, ready).run()


def _room_for(config: Config) -> None:
    """As many descriptors as connections may need, or as many as may be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A connection, and one to a worker; what the process has beside them.
    wanted = 2 * config.gateway.max_connections + OTHER_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if max(most, soft) < wanted:
        hint = f"raise the limit of open files to {wanted} (LimitNOFILE), or lower gateway.max_connections"
        logger.warning("too few open files for gateway.max_connections", limit=max(most, soft), hint=hint)


def bind(address: Address, backlog: int) -> socket.socket:
    """A listening TCP socket. Raises StartError.

    Without SO_REUSEPORT: a second gateway on the same address fails instead of taking half of the connections.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _name, where = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: a token must not wait for the next one.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(where)
        listener.listen(backlog)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror or error}") from None
    return listener

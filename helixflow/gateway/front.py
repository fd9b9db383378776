"""The front door of this gateway: its sockets, limits and certificates, as the configuration has them."""

import socket

from helixflow.config import Config
from helixflow.core_rs import Front, FrontOptions
from helixflow.gateway.certificates import GatewayFiles

WORKER_WAIT_S = 10.0
"""A request waits this long for a worker while all of them start anew (seconds)."""
HEAD_BYTES = 65_536
"""The largest head of a request (bytes)."""


def options(config: Config) -> FrontOptions:
    """The limits of the endpoint. Raises ValueError for a network that is none."""
    gateway = config.gateway
    return FrontOptions(
        handshake_s=gateway.handshake_timeout_s,
        first_byte_s=gateway.first_byte_timeout_s,
        head_s=gateway.head_timeout_s,
        body_rate=gateway.body_min_rate,
        body_grace_s=gateway.body_grace_s,
        idle_s=gateway.idle_timeout_s,
        write_stall_s=gateway.stall_timeout_s,
        connections=gateway.max_connections,
        connections_per_client=gateway.max_connections_per_client,
        handshakes=gateway.max_handshakes,
        strangers_per_client=gateway.max_strangers_per_client,
        streams=gateway.max_streams,
        resets=gateway.max_resets,
        head_bytes=HEAD_BYTES,
        unfolded_bytes=gateway.max_body_bytes,
        trusted=[str(network) for network in gateway.trusted_proxies],
        proxy_protocol=gateway.proxy_protocol,
        worker_wait_s=WORKER_WAIT_S,
    )


def open_front(config: Config, listener: socket.socket) -> Front:
    """Serves on `listener`, which is the front's from now on. Raises TlsError."""
    files = GatewayFiles.of(config)
    return Front(
        listener.detach(),
        options(config),
        pairs=files.outside(),
        client_ca=files.client_ca,
        client_crl=files.client_crl,
        threads=config.gateway.front_threads,
    )

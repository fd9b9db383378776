"""The operator's line to the auth-service: gRPC with the auth-service's own certificate."""

import contextlib
import os
import pwd
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from helixflow.admin.errors import AdminError, UnreachableError
from helixflow.config import Config
from helixflow.core_rs import CoreError, DeadlineExceeded, TlsError, TlsFiles, Unavailable
from helixflow.pki.layout import Layout, Role
from helixflow.refusals import message_of
from helixflow.rpc import messages
from helixflow.rpc.client import Client

TIMEOUT_S = 30.0
PAGE = 1000
"""Rows of a page; the most that the auth-service gives."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command has to say: `data` with `--json`, `text` without; `status` is the command's exit status."""

    data: Any
    text: str
    status: int = 0


class Operator:
    """Calls of the AdminService as the operator. Errors are AdminError; UnreachableError when nobody answers."""

    def __init__(self, client: Client, address: str) -> None:
        """`address`: of the auth-service, for messages."""
        self._client = client
        self._address = address
        self._name = account()
        self.request_id = f"cli-{secrets.token_hex(8)}"

    async def call(
        self, method: str, message: str, fields: dict[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """The answer as plain data. `message`: name of the request's message. Fields that are None are left out."""
        try:
            request = messages.parse(getattr(messages, message), given(fields or {}))
            request.actor.name = self._name
            request.actor.request_id = self.request_id
            answer = await self._client.call(
                f"AdminService/{method}", request, timeout_s=timeout_s, request_id=self.request_id
            )
        except Unavailable as error:
            why = (self._client.last_error or message_of(error)).removeprefix(f"{self._address}: ")
            raise UnreachableError(
                f"the auth-service cannot help now: {why}\n"
                f"Is `helixflow serve` or `helixflow auth` running at {self._address}? HELIX_AUTH_LISTEN names another "
                "address."
            ) from None
        except DeadlineExceeded:
            raise AdminError(
                f"the auth-service at {self._address} did not answer within {timeout_s:g} s; what was asked for may "
                "have been done"
            ) from None
        except CoreError as error:
            raise AdminError(message_of(error)) from None
        return messages.plain(answer)

    async def pages(
        self, method: str, message: str, fields: dict[str, Any] | None = None, *, page: int = PAGE
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The rows of a list, page by page. `page`: most rows of one."""
        after = ""
        while True:
            asked = {**(fields or {}), "limit": page, "after": after}
            answer = await self.call(method, message, asked)
            yield answer["data"]
            if not answer["next"]:
                return
            if answer["next"] == after:
                raise AdminError(f"the auth-service gave the same page of {method} twice")
            after = answer["next"]

    async def rows(self, method: str, message: str, fields: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """All rows of a list that is known to be short."""
        return [row async for page in self.pages(method, message, fields) for row in page]


@contextlib.asynccontextmanager
async def connect(config: Config) -> AsyncIterator[Operator]:
    """A line to the auth-service of this configuration. Raises AdminError when the certificate files are not there."""
    layout = Layout(config.certs)
    pair = layout.pair("auth-service", Role.CLIENT)
    crl = str(layout.crl) if layout.crl.exists() else None
    address = str(config.auth.listen.from_here)
    try:
        files = TlsFiles(str(layout.ca_cert), str(pair.cert), str(pair.key), crl)
        client = Client([address], files)
    except TlsError as error:
        raise AdminError(
            f"{message_of(error)}\nThese commands show the auth-service's own certificate: run them on its machine, as "
            "its user; `helixflow pki verify` says which file is wrong."
        ) from None
    try:
        yield Operator(client, address)
    finally:
        client.close()


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that were named on the command line."""
    return {name: value for name, value in fields.items() if value is not None}


def account() -> str:
    """The system account that runs the command, for the audit log."""
    number = os.getuid()
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:
        name = str(number)
    before = os.environ.get("SUDO_USER")
    return f"{name} (sudo by {before})" if number == 0 and before else name

"""The credentials that a worker knows: asked of the auth-service once, remembered, dropped when they change.

A remembered key is fresh for `gateway.key_cache_s`. Afterwards it is served from memory while it is asked for again,
and, when no auth-service answers, for `gateway.key_grace_s` after the last answer. Whatever the auth-service tells to
have changed is forgotten at once. After a gap in what it tells (`resync`), everything is asked for before it is served.
What was refused is remembered too, and who asks about nothing else is not asked for any more: nobody's invented keys
reach the database at the rate that they come in.
"""

import asyncio
import hashlib
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helixflow import log
from helixflow.addresses import Budget
from helixflow.auth import certificates
from helixflow.auth.keys import PREFIX, presented, well_formed
from helixflow.config import DEVELOPMENT_KEY, Config
from helixflow.core_rs import CoreError, DeadlineExceeded, InvalidApiKey, InvalidToken, RateLimitExceeded, Unavailable
from helixflow.gateway.auth import Principal, unknown_key
from helixflow.refusals import refusal
from helixflow.rpc import messages
from helixflow.rpc.client import Client

ASK_S = 5.0
"""Time for the answer about a credential that nobody remembers (seconds)."""
RECHECK_S = 1.0
"""Time for the answer about one that is remembered: without it, memory counts (seconds)."""
AWAY_S = 1.0
"""After a failed question nobody waits for another one this long (seconds)."""
RECONNECT_S = (0.1, 2.0)
"""Shortest and longest pause before the stream of changes is opened again (seconds)."""

UNKNOWN_BURST = 100
"""Unknown credentials that one address may have checked at once."""

UNKNOWN_SIZE = 10_000
"""Refused credentials that are remembered: apart from the others, so that nobody can crowd those out."""

AWAY = (Unavailable, DeadlineExceeded)
"""What says that nobody could tell; everything else is an answer."""

logger = log.get("gateway")


@dataclass(slots=True, eq=False)
class Entry:
    """What is known of one credential."""

    principal: Principal
    fresh_until: float
    grace_until: float
    doubtful: bool = False
    """Changes may have been missed since it was asked for."""


class Credentials:
    """The key store of one worker. Belongs to one event loop. Times are monotonic seconds."""

    def __init__(
        self, client: Client, config: Config, gateway: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`gateway`: UUID of the worker."""
        self._client = client
        self._options = config.gateway
        self._development = config.development
        self._gateway = gateway
        self._clock = clock
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._strangers = Budget(UNKNOWN_BURST, config.gateway.unknown_keys_per_minute / 60, clock=clock)
        self._holders: defaultdict[str, set[bytes]] = defaultdict(set)
        self._asking: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._generation = 0
        self._away_until = 0.0
        self._unanswered = False  # the last question: until one is answered, nobody waits for what memory can tell
        self._listening = False
        self.on_prices: Callable[[], None] = lambda: None
        """Called when prices changed, and after every gap."""
        self.served_from_grace = 0
        """Requests that were let in on a memory that nobody could confirm."""

    # --- questions --------------------------------------------------------------

    def known(self, credential: bytes) -> Principal | None:
        """The holder when the memory of it is fresh. Costs one SHA-256 and one look-up."""
        entry = self._entries.get(hashlib.sha256(credential).digest())
        if entry is None or entry.doubtful:
            return None
        now = self._clock()
        if now >= entry.fresh_until or (entry.principal.expires_at and time.time() >= entry.principal.expires_at):
            return None
        return entry.principal

    async def verify(self, credential: bytes, address: str) -> Principal:
        """The holder of a credential; `address`: of the client.

        Raises InvalidApiKey, InvalidToken, RateLimitExceeded (from there came too much that was neither), or
        Unavailable when nobody can tell.
        """
        token = _is_token(credential)
        if not token and not self._plausible(credential):
            raise unknown_key()
        digest = hashlib.sha256(credential).digest()
        if self._clock() < self._unknown.get(digest, 0.0):
            raise _refused(token)
        entry = self._entries.get(digest)
        if entry is not None:
            principal = await self._remembered(credential, digest, entry, token)
            if principal is not None:
                return principal
        return self._checked(await self._ask_stranger(credential, digest, address), token)

    async def _ask_stranger(self, credential: bytes, digest: bytes, address: str) -> Principal | None:
        """Asks about what nobody remembers. What it costs is given back unless it was in vain."""
        if digest in self._asking:
            return await self._ask(credential, digest, ASK_S)
        wait_s = self._strangers.take(address)
        if wait_s:
            error = refusal(RateLimitExceeded, "too many unknown keys or tokens from your address; try again later")
            error.retry_after_s = math.ceil(wait_s)
            raise error
        in_vain = False
        try:
            found = await self._ask(credential, digest, ASK_S)
            in_vain = found is None
        finally:
            if not in_vain:
                self._strangers.give_back(address)
        return found

    def _plausible(self, credential: bytes) -> bool:
        """Whether it can be a key at all: nobody is asked about what has the wrong form or checksum."""
        if credential.startswith(certificates.PREFIX):
            return True
        if credential.startswith(PREFIX.encode()):
            return well_formed(credential)
        return self._development and credential == DEVELOPMENT_KEY.encode()

    async def _remembered(self, credential: bytes, digest: bytes, entry: Entry, token: bool) -> Principal | None:
        """Answers from memory; None when the credential has to be asked for."""
        now = self._clock()
        if now >= entry.grace_until:
            return None
        if entry.doubtful and now >= self._away_until and not self._unanswered:
            try:
                return self._checked(await self._ask(credential, digest, RECHECK_S), token)
            except AWAY:
                logger.debug("no auth-service answers; the memory of a credential counts")
        elif (entry.doubtful or now >= entry.fresh_until) and now >= self._away_until:
            self._ask_soon(credential, digest)
        # It may have been forgotten while we waited: then it has changed, and its memory does not count any more.
        if self._entries.get(digest) is not entry:
            return None
        if now >= entry.fresh_until or entry.doubtful:
            self.served_from_grace += 1
        return self._checked(entry.principal, token)

    @staticmethod
    def _checked(principal: Principal | None, token: bool) -> Principal:
        if principal is None or (principal.expires_at and time.time() >= principal.expires_at):
            raise _refused(token)
        return principal

    async def _ask(self, credential: bytes, digest: bytes, timeout_s: float) -> Principal | None:
        """Callers who ask for the same credential share one question. Raises what `Client.call` raises."""
        task = self._ask_soon(credential, digest)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            self._gone()
            raise refusal(Unavailable, "the API key cannot be checked now; try again in a moment") from None

    def _ask_soon(self, credential: bytes, digest: bytes) -> "asyncio.Task[Principal | None]":
        task = self._asking.get(digest)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._question(credential, digest))
            self._asking[digest] = task
            task.add_done_callback(lambda done: self._answered(digest, done))
        return task

    def _answered(self, digest: bytes, task: "asyncio.Task[Principal | None]") -> None:
        self._asking.pop(digest, None)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, CoreError):
            logger.error("a credential could not be checked", exc_info=error)

    async def _question(self, credential: bytes, digest: bytes) -> Principal | None:
        generation = self._generation
        request = messages.VerifyRequest(**passed_on(credential))
        try:
            principal = Principal.of(await self._client.call("AuthService/Verify", request, timeout_s=ASK_S))
        except (InvalidApiKey, InvalidToken):
            principal = None
        except AWAY:
            self._gone()
            raise
        self._unanswered = False
        # An answer from before a change that was told meanwhile may be the old one: it counts for this request only.
        if generation == self._generation:
            self._remember(digest, principal)
        return principal

    def _gone(self) -> None:
        """A question was not answered."""
        self._unanswered = True
        self._away_until = self._clock() + AWAY_S

    # --- memory -----------------------------------------------------------------

    def _remember(self, digest: bytes, principal: Principal | None) -> None:
        self._forget(digest)
        now = self._clock()
        if principal is None:
            self._unknown[digest] = now + self._options.key_negative_s
            self._unknown.move_to_end(digest)
            if len(self._unknown) > UNKNOWN_SIZE:
                self._unknown.popitem(last=False)
            return
        self._unknown.pop(digest, None)
        grace_s = max(0.0, self._options.key_grace_s - principal.age_s)
        self._entries[digest] = Entry(principal, now + min(self._options.key_cache_s, grace_s), now + grace_s)
        for holder in _holders(principal):
            self._holders[holder].add(digest)
        while len(self._entries) > self._options.key_cache_size:
            self._forget(next(iter(self._entries)))

    def _forget(self, digest: bytes) -> None:
        entry = self._entries.pop(digest, None)
        if entry is None:
            return
        for holder in _holders(entry.principal):
            digests = self._holders[holder]
            digests.discard(digest)
            if not digests:
                del self._holders[holder]

    def changed(self, kind: str, identifier: str) -> None:
        """Forgets everything that belongs to the key, user, organisation or session with this UUID."""
        self._generation += 1
        self._unknown.clear()
        for digest in list(self._holders.get(f"{kind}:{identifier}", ())):
            self._forget(digest)

    def doubt(self) -> None:
        """Changes may have been missed: what is remembered is confirmed before it is served again."""
        self._generation += 1
        self._unknown.clear()
        for entry in self._entries.values():
            entry.doubtful = True
        self._away_until = 0.0
        self._unanswered = False

    @property
    def remembered(self) -> int:
        """Credentials in memory."""
        return len(self._entries)

    @property
    def listening(self) -> bool:
        """Whether changes reach this worker."""
        return self._listening

    # --- changes ----------------------------------------------------------------

    async def watch(self) -> None:
        """Listens to what changes, for ever."""
        pause = RECONNECT_S[0]
        while True:
            try:
                request = messages.WatchEventsRequest(gateway=self._gateway)
                async for event in self._client.stream("AuthService/Watch", request):
                    self._hear(event)
                    pause = RECONNECT_S[0]
            except CoreError as error:
                if self._listening:
                    logger.warning("changes of keys and limits do not arrive any more", error=str(error))
            self._listening = False
            await asyncio.sleep(pause)
            pause = min(pause * 2, RECONNECT_S[1])

    def _hear(self, event: Any) -> None:
        kind = event.WhichOneof("kind")
        if kind == "resync":
            if not self._listening:
                logger.info("changes of keys and limits arrive")
            self._listening = True
            self.doubt()
            self.on_prices()
        elif kind == "prices":
            self.on_prices()
        elif kind is not None:
            self.changed(kind, getattr(event, kind))


def _is_token(credential: bytes) -> bool:
    """Access tokens are three parts of base64url (RFC 7515); no key holds a full stop."""
    return credential.count(b".") == 2


def passed_on(credential: bytes) -> dict[str, bytes | str]:
    """A credential as the auth-service takes it: one field of its messages. No service ever sees a key."""
    if _is_token(credential):
        return {"access_token": credential.decode("latin-1")}
    return {"key_digest": presented(credential)}


def _refused(token: bool) -> CoreError:
    return refusal(InvalidToken, "the access token is not valid, or no longer") if token else unknown_key()


def _holders(principal: Principal) -> list[str]:
    own = [
        f"{kind}:{identifier}"
        for kind, identifier in (
            ("key", principal.key_id),
            ("user", principal.user_id),
            ("organisation", principal.organisation_id),
            ("session", principal.session_id),
        )
        if identifier
    ]
    return [*own, *principal.depends_on]

"""Client certificates that stand for an API key: how they are named, and how a gateway presents one.

A gateway says which certificate it has seen, and nothing proves it to the auth-service. So a certificate is for
inference alone, like the sight of a key; it administers nothing.
"""

import re

from helixflow.core_rs import InvalidRequest
from helixflow.refusals import refusal

PREFIX = b"certificate "
"""What a gateway presents begins with it; no key does, and no client may send it."""
LONGEST = 2048

_SPIFFE = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


def named(text: str, param: str = "certificate") -> str:
    """The name of a certificate as it is compared: a SPIFFE URI, or `sha256:` and 64 hexadecimal digits.

    Raises InvalidRequest.
    """
    text = text.strip()
    if text.lower().startswith("sha256:"):
        text = text.lower().replace("sha256:", "", 1).replace(":", "")
        text = f"sha256:{text}"
    if len(text) > LONGEST or not (_SPIFFE.fullmatch(text) or _FINGERPRINT.fullmatch(text)):
        message = f"{param} must be a SPIFFE URI (spiffe://example.org/batch) or sha256: and a fingerprint in hex"
        raise refusal(InvalidRequest, message, param)
    return text


def presented(name: str) -> bytes:
    """What a gateway presents for a certificate."""
    return PREFIX + name.encode()

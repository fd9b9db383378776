"""Subject alternative names: what every certificate of a service carries, and extra ones."""

import ipaddress
import re
from collections.abc import Iterable

from cryptography import x509

from helixflow.pki.errors import PkiError
from helixflow.pki.layout import TRUST_DOMAIN, identity

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_LOOPBACK = ("127.0.0.1", "::1")


def standard(name: str) -> list[x509.GeneralName]:
    """The names of service `name`: plain, in the trust domain, as a Kubernetes service in the namespace `helixflow`,
    on the same machine, and its identity."""
    dns = (
        name,
        f"{name}.{TRUST_DOMAIN}",
        f"{name}.helixflow",
        f"{name}.helixflow.svc",
        f"{name}.helixflow.svc.cluster.local",
        "localhost",
    )
    return [
        *(x509.DNSName(item) for item in dns),
        *(x509.IPAddress(ipaddress.ip_address(item)) for item in _LOOPBACK),
        x509.UniformResourceIdentifier(identity(name)),
    ]


def required(name: str) -> list[x509.GeneralName]:
    """The names without which a certificate of service `name` is wrong."""
    return [
        x509.DNSName(name),
        x509.DNSName("localhost"),
        *(x509.IPAddress(ipaddress.ip_address(item)) for item in _LOOPBACK),
        x509.UniformResourceIdentifier(identity(name)),
    ]


def parse(values: Iterable[str]) -> list[x509.GeneralName]:
    """Extra names: a DNS name or an address, with or without `DNS:` or `IP:`, several separated by commas.

    Raises PkiError for anything else.
    """
    return [_parse(item.strip()) for value in values for item in value.split(",") if item.strip()]


def _parse(text: str) -> x509.GeneralName:
    kind, _, rest = text.partition(":")
    kind = kind.upper()
    value = rest if kind in {"DNS", "IP"} else text
    if kind != "DNS":
        try:
            return x509.IPAddress(ipaddress.ip_address(value))
        except ValueError:
            pass
    name = value.lower().removesuffix(".")
    labels = name.removeprefix("*.").split(".")
    if kind != "IP" and len(name) <= 253 and all(_LABEL.fullmatch(label) for label in labels):
        return x509.DNSName(name)
    raise PkiError(
        None,
        f"`{text}` is neither a DNS name nor an IP address",
        "Write names in ASCII (xn--…), and no URI: the identity of a service is the only URI in its certificate.",
    )


def parse_subtrees(values: Iterable[str]) -> list[x509.GeneralName]:
    """As `parse`, and networks (`10.0.0.0/8`), for what a CA may certify. Raises PkiError."""
    found: list[x509.GeneralName] = []
    for item in (item.strip() for value in values for item in value.split(",") if item.strip()):
        network = item.removeprefix("IP:")
        if "/" not in network:
            found.append(_parse(item))
            continue
        try:
            found.append(x509.IPAddress(ipaddress.ip_network(network)))
        except ValueError as error:
            raise PkiError(None, f"`{item}` is not a network: {error}", "Write it like 10.1.0.0/16.") from None
    return found


def merge(*lists: Iterable[x509.GeneralName]) -> list[x509.GeneralName]:
    """All names, each once, in order."""
    return list(dict.fromkeys(name for names in lists for name in names))


def extras(name: str, cert: x509.Certificate) -> list[x509.GeneralName]:
    """The DNS names and addresses of a certificate of `name` that are not standard ones."""
    known = set(standard(name))
    return [item for item in of(cert) if item not in known and isinstance(item, x509.DNSName | x509.IPAddress)]


def of(cert: x509.Certificate) -> list[x509.GeneralName]:
    """The names in a certificate; none without the extension."""
    try:
        return list(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def text(name: x509.GeneralName) -> str:
    """`DNS:localhost`, `IP:127.0.0.1`, `URI:spiffe://…`."""
    if isinstance(name, x509.DNSName):
        return f"DNS:{name.value}"
    if isinstance(name, x509.IPAddress):
        return f"IP:{name.value}"
    if isinstance(name, x509.UniformResourceIdentifier):
        return f"URI:{name.value}"
    return str(name)

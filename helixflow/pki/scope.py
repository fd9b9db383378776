"""What a CA may certify: name constraints (RFC 5280, section 4.2.1.10).

Clients trust the CA for whatever they do, not for HelixFlow alone. With constraints its key, should it be stolen, makes
no certificate for anybody else's name that they would believe.
"""

import ipaddress
from collections.abc import Iterable, Sequence

from cryptography import x509

from helixflow.pki.layout import SERVICES

_PRIVATE_DOMAINS = (
    "localhost",  # RFC 6761, as .test
    "test",
    "local",  # RFC 6762; the next ones are its appendix G
    "intranet",
    "internal",
    "private",
    "corp",
    "home",
    "lan",
    "home.arpa",  # RFC 8375
    "helixflow",  # in Kubernetes: NAME.helixflow, NAME.helixflow.svc
    "svc",
)
_PRIVATE_NETWORKS = (
    "127.0.0.0/8",
    "10.0.0.0/8",  # RFC 1918
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",  # RFC 3927
    "100.64.0.0/10",  # RFC 6598
    "::1/128",
    "fc00::/7",  # RFC 4193
    "fe80::/10",  # RFC 4291
)
STANDARD: tuple[x509.GeneralName, ...] = (
    *(x509.DNSName(name) for name in (*SERVICES, *_PRIVATE_DOMAINS)),
    *(x509.IPAddress(ipaddress.ip_network(network)) for network in _PRIVATE_NETWORKS),
)
"""The services' own names, names that exist in no public DNS, private networks."""


def of(ca: x509.Certificate) -> Sequence[x509.GeneralName] | None:
    """The permitted subtrees; None when the CA is not constrained."""
    try:
        return ca.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees
    except x509.ExtensionNotFound:
        return None


def subtree(name: x509.GeneralName) -> x509.GeneralName:
    """The smallest subtree that holds a name; of `*.example.com` that is `example.com`."""
    if isinstance(name, x509.DNSName):
        return x509.DNSName(name.value.removeprefix("*."))
    if isinstance(name, x509.IPAddress) and isinstance(name.value, ipaddress.IPv4Address | ipaddress.IPv6Address):
        return x509.IPAddress(ipaddress.ip_network(name.value))
    return name


def extended(permitted: Iterable[x509.GeneralName], extra: Iterable[x509.GeneralName]) -> list[x509.GeneralName]:
    """The permitted subtrees, and those of `extra` that are not in them already."""
    widened = list(permitted)
    for name in map(subtree, extra):
        if not permits(widened, name):
            widened.append(name)
    return widened


def permits(permitted: Sequence[x509.GeneralName] | None, name: x509.GeneralName) -> bool:
    """Whether a CA with these subtrees (None: any) may certify a name; other kinds of names are not constrained."""
    if permitted is None:
        return True
    if isinstance(name, x509.DNSName):
        value = name.value.removeprefix("*.")
        domains = [item.value for item in permitted if isinstance(item, x509.DNSName)]
        return any(value == domain or value.endswith(f".{domain}") for domain in domains)
    if isinstance(name, x509.IPAddress):
        network = ipaddress.ip_network(name.value)
        return any(
            _within(network, item.value)
            for item in permitted
            if isinstance(item, x509.IPAddress)
            and isinstance(item.value, ipaddress.IPv4Network | ipaddress.IPv6Network)
        )
    return True


def _within(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network, whole: ipaddress.IPv4Network | ipaddress.IPv6Network
) -> bool:
    if isinstance(network, ipaddress.IPv4Network) and isinstance(whole, ipaddress.IPv4Network):
        return network.subnet_of(whole)
    if isinstance(network, ipaddress.IPv6Network) and isinstance(whole, ipaddress.IPv6Network):
        return network.subnet_of(whole)
    return False

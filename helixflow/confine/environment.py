"""The environment of a service: its own part of the configuration, and what is no secret of the machine."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helixflow.config import SECTIONS, Config
from helixflow.secret import Secret

PARTS = {
    "gateway": ("log", "gateway", "limits", "ledger", "supervise"),
    "auth": ("log", "auth", "limits", "ledger", "database", "supervise"),
    "pool": ("log", "pool", "supervise"),
    "database": ("log", "database", "supervise"),
}
"""Sections that a service reads."""
SINGLE = {"auth": (("gateway", "key_grace_s"),), "gateway": (("auth", "public_url"),)}
"""Options that it reads from sections that are not its own."""
SECRETS = {"auth": (("auth", "oidc_client_secret"), ("database", "url"), ("limits", "redis_url"))}
"""Secret options that a service gets; no other service gets any."""

_NAMES = frozenset(
    {
        *("PATH", "LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "HOME", "TMPDIR"),
        *("XDG_RUNTIME_DIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    }
)
_PREFIXES = ("LC_", "PYTHON", "RUST_", "MALLOC_", "GLIBC_")
_PROXIES = frozenset(
    name for each in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{each}_PROXY", f"{each.lower()}_proxy")
)
_COMPUTING = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "ORT_", "TRT_", "RAYON_", "TOKENIZERS_")


def general(service: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of the machine's environment a service sees: nothing that is not named here."""
    names = _NAMES | (_PROXIES if service == "auth" else frozenset())
    prefixes = _PREFIXES + (_COMPUTING if service == "pool" else ())
    return {name: value for name, value in environ.items() if name in names or name.startswith(prefixes)}


def options(service: str, config: Config) -> dict[str, str]:
    """The effective configuration of a service as HELIX_ variables: no file has to be readable to it."""
    given = {
        "HELIX_PROFILE": config.profile,
        "HELIX_HOME": _text(config.home),
        "HELIX_CERTS": _text(config.certs),
        "HELIX_ENGINES": _text(config.engines),
    }
    for section in PARTS[service]:
        for field in dataclasses.fields(SECTIONS[section]):
            if not is_secret(field):
                given |= _option(config, section, field.name)
    for section, name in (*SINGLE.get(service, ()), *SECRETS.get(service, ())):
        given |= _option(config, section, name)
    return given


def is_secret(field: Any) -> bool:
    """Whether the value of an option shows itself to nobody."""
    return isinstance(field.default, Secret)


def _option(config: Config, section: str, name: str) -> dict[str, str]:
    [field] = [field for field in dataclasses.fields(SECTIONS[section]) if field.name == name]
    value = getattr(getattr(config, section), name)
    if "doc" not in field.metadata or value == field.default:
        return {}
    return {f"HELIX_{section}_{name}".upper(): _text(value)}


def _text(value: Any) -> str:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return str(value.expanduser().absolute()) if isinstance(value, Path) else str(value)

"""Section `[auth]`: the auth-service: accounts, keys, tokens."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.options import Address, between, https_origin, one_of, option
from helixflow.secret import Secret


def _audit_days(value: float) -> str | None:
    return None if value == 0 or 30 <= value <= 36_500 else f"must be 0, or between 30 and 36500, not {value:g}"


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """The auth-service: accounts, keys, tokens."""

    listen: Address = option(Address("127.0.0.1", 8502), "address of the gRPC server")
    pepper: Path = option(
        Path(), "file of the secret behind key digests; empty: secrets/pepper under home, made at the first start"
    )
    owner: str = option("owner@localhost", "e-mail of the owner that the first start makes")
    issuer: str = option("https://helixflow.local", "issuer of access tokens")
    access_ttl_s: int = option(900, "an access token is valid this long (seconds)", check=between(30, 86_400))
    refresh_ttl_s: int = option(
        2_592_000,
        "a session ends when its refresh token was not used this long (seconds)",
        check=between(60, 31_536_000),
    )
    audit_keep_days: int = option(
        0, "entries of the audit log are kept this long (days, 30 or more); 0: all", check=_audit_days
    )
    password_checks: int = option(2, "passwords hashed at a time; each costs 64 MiB", check=between(1, 64))
    login_free_attempts: int = option(
        5, "wrong passwords for one account from one address before the next has to wait", check=between(1, 1000)
    )
    login_free_per_address: int = option(
        30,
        "wrong passwords for whatever account from one address, before accounts that never logged in from there have "
        "to wait",
        check=between(1, 1_000_000),
    )
    login_delay_s: float = option(
        1.0, "first pause between wrong passwords; it doubles with each further one (seconds)", check=between(0.1, 3600)
    )
    login_delay_max_s: float = option(
        900.0, "longest pause between wrong passwords (seconds)", check=between(1, 86_400)
    )
    one_time_ttl_s: int = option(
        259_200,
        "a one-time password of a new user or of a reset is valid this long (seconds)",
        check=between(60, 31_536_000),
    )
    first_password_ttl_s: int = option(
        86_400, "likewise that of the owner whom the first start makes (seconds)", check=between(60, 31_536_000)
    )
    factor_issuer: str = option("HelixFlow", "what authenticators show beside the e-mail of a second factor")
    drain_timeout_s: float = option(10.0, "calls may run this long after SIGTERM (seconds)", check=between(0, 3600))
    public_url: str = option(
        "",
        "https URL without a path that clients reach the gateways at; in production, login through a provider needs it",
        check=https_origin,
    )
    oidc_issuer: str = option("", "URL of an OpenID Connect provider; empty: no login through one")
    oidc_client_id: str = option("", "client id at the provider")
    oidc_client_secret: Secret = option(Secret(), "client secret at the provider")
    oidc_ca: Path = option(Path(), "file of CA certificates for the provider; empty: the system's")
    oidc_organisation: str = option("", "organisation that new users of the provider join; empty: none may join")
    oidc_role: str = option("member", "role of users who join", check=one_of("viewer", "member", "admin"))

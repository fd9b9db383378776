"""`helixflow user`, `organisation` and `key`."""

import time
from argparse import Namespace
from typing import Any

from helixflow.admin.budget import limits_of
from helixflow.admin.errors import AdminError
from helixflow.admin.operator import Operator, Outcome, given
from helixflow.admin.table import Column, facts, table
from helixflow.admin.values import day_text, moment_text

Row = dict[str, Any]

# --- users -------------------------------------------------------------------


async def user_add(operator: Operator, options: Namespace) -> Outcome:
    """Makes a user or a service account."""
    fields = {
        "organisation": options.organisation,
        "email": options.email,
        "role": options.role,
        "service_account": options.service_account,
    }
    made = await operator.call("CreateUser", "CreateUserRequest", fields)
    return Outcome(made, _user_text(made["user"]) + _password_text(made))


async def user_list(operator: Operator, options: Namespace) -> Outcome:
    """Every user."""
    rows = await operator.rows("ListUsers", "ListRequest", {"organisation": options.organisation})
    columns = [
        Column("E-MAIL", cut=True),
        Column("ROLE"),
        Column("ORGANISATION", cut=True),
        Column("KIND"),
        Column("STATE"),
        Column("LAST LOGIN (UTC)"),
    ]
    cells = [
        (
            row["email"],
            row["role"],
            row["organisation"],
            "service" if row["service_account"] else "person",
            _user_state(row),
            moment_text(row["last_login_at"]),
        )
        for row in rows
    ]
    return Outcome({"data": rows}, table(columns, cells, "no users"))


async def user_update(operator: Operator, options: Namespace) -> Outcome:
    """Changes role or state of a user."""
    fields = given({"role": options.role, "disabled": options.disabled})
    if not fields:
        raise AdminError("say what to change: --role, --disable or --enable")
    user = await operator.call("UpdateUser", "UpdateUserRequest", {"user": options.user, **fields})
    return Outcome(user, _user_text(user))


async def user_reset_password(operator: Operator, options: Namespace) -> Outcome:
    """Gives a user a new one-time password."""
    fields = given({"user": options.user, "keys": options.keys})
    made = await operator.call("ResetPassword", "ResetPasswordRequest", fields)
    return Outcome(made, _user_text(made["user"]) + _password_text(made))


async def user_unlock(operator: Operator, options: Namespace) -> Outcome:
    """Lets a locked user try again."""
    user = await operator.call("UnlockUser", "UserRequest", {"user": options.user})
    return Outcome(user, _user_text(user))


async def user_remove(operator: Operator, options: Namespace) -> Outcome:
    """Removes a user; the keys stop working."""
    gone = await operator.call("DeleteUser", "UserRequest", {"user": options.user})
    return Outcome(gone, f"{options.user} is removed; the user's keys and sessions have ended")


def _user_text(user: Row) -> str:
    name = "account" if user["service_account"] else "user"
    return facts(
        [
            (name, user["email"]),
            ("id", user["id"]),
            ("role", user["role"]),
            ("organisation", user["organisation"]),
            ("state", _user_state(user)),
        ]
    )


def _password_text(made: Row) -> str:
    password = made["one_time_password"]
    if not password:
        return ""
    until = made["user"]["password_expires_at"]
    valid = f" It is valid until {moment_text(until)} UTC." if until else ""
    return (
        f"\n\none-time password  {password}\n"
        f"It is shown this once.{valid} The first login with it has to set another one."
    )


def _user_state(user: Row) -> str:
    if user["disabled"]:
        return "disabled"
    if user["locked"]:
        return "has to wait"
    return "new password due" if user["must_change_password"] else "active"


# --- organisations -----------------------------------------------------------


async def organisation_add(operator: Operator, options: Namespace) -> Outcome:
    """Makes an organisation."""
    made = await operator.call("CreateOrganisation", "CreateOrganisationRequest", {"name": options.name})
    return Outcome(made, _organisation_text(made))


async def organisation_list(operator: Operator, _options: Namespace) -> Outcome:
    """Every organisation."""
    rows = await operator.rows("ListOrganisations", "ListRequest")
    columns = [Column("ID"), Column("NAME", cut=True), Column("STATE"), Column("TEXTS", cut=True), Column("MADE")]
    cells = [
        (row["id"], row["name"], _organisation_state(row), _texts(row), day_text(row["created_at"])) for row in rows
    ]
    return Outcome({"data": rows}, table(columns, cells, "no organisations"))


async def organisation_update(operator: Operator, options: Namespace) -> Outcome:
    """Changes an organisation. What is kept of texts changes as far as it is named."""
    fields = given({"name": options.name, "suspended": options.suspended})
    content = given({"store": options.store, "retention_days": options.retention_days, "redact": options.redact})
    if content:
        fields["content"] = {**(await _content(operator, options.organisation)), **content}
    if options.domain is not None:
        fields["domains"] = {"values": options.domain}
    if not fields:
        raise AdminError(
            "say what to change: --name, --suspend, --resume, --keep-texts, --no-keep-texts, --retention-days, "
            "--redact, --no-redact, --domain or --no-domain"
        )
    fields["organisation"] = options.organisation
    organisation = await operator.call("UpdateOrganisation", "UpdateOrganisationRequest", fields)
    return Outcome(organisation, _organisation_text(organisation))


async def _content(operator: Operator, name: str) -> Row:
    organisation = await find_organisation(operator, name)
    content: Row = organisation.get("content", {})
    return content


async def find_organisation(operator: Operator, name: str) -> Row:
    """The organisation of this name or UUID. Raises AdminError when there is none."""
    for row in await operator.rows("ListOrganisations", "ListRequest", {"organisation": name}):
        if name in (row["name"], row["id"]):
            return row
    raise AdminError(f"there is no organisation `{name}`; `helixflow organisation list` shows them")


def _organisation_text(row: Row) -> str:
    pairs = [
        ("organisation", row["name"]),
        ("id", row["id"]),
        ("state", _organisation_state(row)),
        ("texts", _texts(row)),
    ]
    pairs += [("domain", domain) for domain in row["domains"]]
    pairs += [("redacted", pattern) for pattern in row.get("content", {}).get("redact", [])]
    return facts(pairs)


def _organisation_state(row: Row) -> str:
    return "suspended" if row["suspended"] else "active"


def _texts(row: Row) -> str:
    content = row.get("content", {})
    return f"kept {content['retention_days']} days" if content.get("store") else "not kept"


# --- keys --------------------------------------------------------------------


async def key_add(operator: Operator, options: Namespace) -> Outcome:
    """Makes an API key, for the installation's owner when no user is named."""
    fields = {
        "user": options.user or options.owner,
        "name": options.name,
        "expires_at": options.expires,
        "models": options.model,
        "endpoints": options.endpoint,
        "admin": options.admin,
        "certificate": options.certificate,
    }
    limits = limits_of(options)
    if limits:
        fields["limits"] = limits
    made = await operator.call("CreateKey", "CreateKeyRequest", fields)
    return Outcome(made, _key_text(made["key"]) + _secret_text(made["secret"]))


async def key_list(operator: Operator, options: Namespace) -> Outcome:
    """Every key, without the secrets."""
    rows = await operator.rows("ListKeys", "ListRequest", {"organisation": options.organisation})
    columns = [
        Column("ID"),
        Column("NAME", cut=True),
        Column("USER", cut=True),
        Column("FOR"),
        Column("STATE"),
        Column("LAST USE"),
    ]
    cells = [
        (row["id"], row["name"], row["user"], _key_purpose(row), _key_state(row), day_text(row["last_used_at"]))
        for row in rows
    ]
    return Outcome({"data": rows}, table(columns, cells, "no keys"))


async def key_update(operator: Operator, options: Namespace) -> Outcome:
    """Changes name, expiry or what a key may call."""
    fields = given(
        {
            "name": options.name,
            "expires_at": options.expires,
            "admin": options.admin,
            "certificate": options.certificate,
        }
    )
    for name, values in (("models", options.model), ("endpoints", options.endpoint)):
        if values is not None:
            fields[name] = {"values": values}
    if not fields:
        raise AdminError(
            "say what to change: --name, --expires, --model, --any-model, --endpoint, --any-endpoint, --admin, "
            "--no-admin, --certificate or --no-certificate; `helixflow limits set` changes limits"
        )
    key = await operator.call("UpdateKey", "UpdateKeyRequest", {"key": options.key, **fields})
    return Outcome(key, _key_text(key))


async def key_rotate(operator: Operator, options: Namespace) -> Outcome:
    """Makes a key that takes the place of another one."""
    fields = {"key": options.key, "overlap_s": options.overlap}
    made = await operator.call("RotateKey", "RotateKeyRequest", fields)
    return Outcome(made, _key_text(made["key"]) + _secret_text(made["secret"]))


async def key_revoke(operator: Operator, options: Namespace) -> Outcome:
    """Ends a key at once."""
    key = await operator.call("RevokeKey", "KeyRequest", {"key": options.key})
    return Outcome(key, _key_text(key))


def _key_text(key: Row) -> str:
    pairs = [
        ("name", key["name"]),
        ("id", key["id"]),
        ("user", key["user"]),
        ("begins", key["prefix"]),
        ("for", _key_purpose(key)),
        ("state", _key_state(key)),
        ("models", ", ".join(key["models"]) or "all"),
        ("endpoints", ", ".join(key["endpoints"]) or "all"),
    ]
    return facts([*pairs, *([("made by", f"key {key['parent_id']}")] if key["parent_id"] else [])])


def _key_purpose(key: Row) -> str:
    return f"{key['role']} work" if key["role"] else "inference"


def _secret_text(secret: str) -> str:
    return f"\n\nkey  {secret}\nIt is shown this once and stored nowhere: hand it to whoever needs it now."


def _key_state(key: Row) -> str:
    if key["revoked_at"]:
        return "revoked"
    if key["expires_at"] and key["expires_at"] <= time.time():
        return "expired"
    return f"until {day_text(key['expires_at'])}" if key["expires_at"] else "active"

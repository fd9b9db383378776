"""`helixflow pki`: certificates of an installation. What a command needs is imported when it runs."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixflow.pki import passphrase
from helixflow.pki.errors import PkiError
from helixflow.pki.layout import Layout
from helixflow.terminal import say

if TYPE_CHECKING:
    from helixflow.pki.keys import KeyType

KEY_TYPES = ("rsa-4096", "ecdsa-p256")


def add_parser(subparsers: Any) -> None:
    """Adds `pki` and its commands. Each sets `run`."""
    text = "make, renew, revoke and check the certificates of the services"
    pki = subparsers.add_parser("pki", help=text, description=text[0].upper() + text[1:] + ".")
    commands = pki.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init = _command(
        commands,
        "init",
        _init,
        "make every file that is missing",
        "Make the CA, the certificates of the four services and the keys of access tokens, as far as they are missing. "
        "Nothing that exists is overwritten.",
    )
    _making(init, "the CA's, rsa-4096 for a new CA")
    init.add_argument(
        "--permit",
        action="append",
        default=[],
        metavar="NAME",
        help="a domain, address or network that a CA made now may certify beside private ones; may be repeated",
    )
    init.add_argument("--encrypt-ca-key", action="store_true", help="store the key of a CA made now encrypted")

    issue = _command(
        commands,
        "issue",
        _issue,
        "make the certificates of one more service",
        "Make a server and a client certificate, with keys, for a service that has none.",
    )
    issue.add_argument("name", metavar="NAME", help="the service")
    _making(issue, "the CA's")

    renew = _command(
        commands,
        "renew",
        _renew,
        "replace certificates and keys, sign the revocation list anew",
        "Replace certificates and keys: of the named services, of all (--all), or, with neither, what is due: less "
        "than 30 days or a third of its life is left, of a revocation list a half. Running services pick the new files "
        "up. `helixflow serve` does that by itself where it can sign.",
    )
    renew.add_argument("names", metavar="NAME", nargs="*", help="the services")
    renew.add_argument("--all", action="store_true", help="every service")
    renew.add_argument("--within", type=_days, metavar="DAYS", help="only certificates that end within so many days")
    _making(renew, "that of the old certificate")

    _add_others(commands)


def _add_others(commands: Any) -> None:
    """Adds the commands that make no certificate."""
    revoke = _command(
        commands,
        "revoke",
        _revoke,
        "refuse a service's certificates from now on",
        "Put certificates on the revocation list: both of a service as they are now, or one by its serial number. "
        "Running services pick the list up.",
    )
    revoke.add_argument("name", metavar="NAME", nargs="?", help="the service")
    revoke.add_argument("--serial", type=_serial, metavar="HEX", help="serial number, as `show` prints it")

    permit = _command(
        commands,
        "permit",
        _permit,
        "let the CA certify more names",
        "Sign the CA certificate anew with further names that it may certify; key and issued certificates stay. "
        "Clients that use such a name need the new file. Without a name: give a CA that has no name constraints the "
        "standard ones.",
    )
    permit.add_argument("names", metavar="NAME", nargs="*", help="a domain, address or network")

    encrypt = _command(
        commands,
        "encrypt-ca-key",
        _encrypt_ca_key,
        "encrypt the CA's key, or change its passphrase",
        "Store the CA's private key encrypted with a passphrase, asked for on the terminal unless a file has it.",
    )
    encrypt.add_argument("--new-passphrase-file", type=Path, metavar="FILE", help="file with the new passphrase")
    encrypt.add_argument("--decrypt", action="store_true", help="store it unencrypted instead")

    _command(
        commands,
        "rotate-tokens",
        _rotate_tokens,
        "replace the key pair of access tokens",
        "Replace the key pair that access tokens are signed with. A running auth-service picks it up; nobody is logged "
        "out: tokens signed before stay valid until they end.",
    )

    verify = _command(
        commands,
        "verify",
        _verify,
        "check every file; exit status 1 when one fails",
        "Check chain, dates, names, usage, keys, permissions, the revocation list and the token keys. Say which file "
        "fails and why; exit status 1 when one does.",
    )
    verify.add_argument("--json", action="store_true", help="as JSON")

    show = _command(
        commands,
        "show",
        _show,
        "print what is in the certificates",
        "Print the certificates of one service, or of all and the CA.",
    )
    show.add_argument("name", metavar="NAME", nargs="?", help="the service")
    show.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs a parsed command. Errors go to standard error; returns the exit status."""
    directory: Path | None = options.dir
    if directory is None:
        from helixflow.config import default_certs_dir

        directory = default_certs_dir()
    place, words = options.ca_key, options.ca_passphrase_file
    if place is None and os.environ.get("HELIX_PKI_CA_KEY"):
        place = Path(os.environ["HELIX_PKI_CA_KEY"])
    if words is None and os.environ.get("HELIX_PKI_CA_PASSPHRASE_FILE"):
        words = Path(os.environ["HELIX_PKI_CA_PASSPHRASE_FILE"])
    try:
        status: int = options.command(Layout(directory, place, passphrase.find(words)), options)
    except PkiError as error:
        say(f"helixflow pki: {error}", file=sys.stderr)
        return error.exit_status
    return status


def _command(
    commands: Any,
    name: str,
    command: Callable[[Layout, argparse.Namespace], int],
    text: str,
    description: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description)
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="certificate directory (default: HELIX_CERTS, or certs/)"
    )
    parser.add_argument(
        "--ca-key",
        type=Path,
        metavar="FILE",
        help="private key of the CA, when it is kept elsewhere (HELIX_PKI_CA_KEY)",
    )
    parser.add_argument(
        "--ca-passphrase-file",
        type=Path,
        metavar="FILE",
        help="file with its passphrase (HELIX_PKI_CA_PASSPHRASE_FILE); else the terminal is asked",
    )
    parser.set_defaults(run=run, command=command)
    return parser


def _making(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--key-type", choices=KEY_TYPES, help=f"kind of the new keys (default: {default})")
    parser.add_argument(
        "--san",
        action="append",
        default=[],
        metavar="NAME",
        help="one more DNS name or address in the certificates made now; may be repeated",
    )
    parser.add_argument("--days", type=_days, default=90, metavar="DAYS", help="how long they are valid (default: 90)")


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of days from 1 to 3650")
    return int(text)


def _serial(text: str) -> int:
    try:
        number = int(text.replace(":", ""), 16)
    except ValueError:
        number = 0
    if not 0 < number < 1 << 160:
        raise argparse.ArgumentTypeError(f"`{text}` is not a serial number in hex")
    return number


def _key_type(options: argparse.Namespace) -> "KeyType | None":
    from helixflow.pki.keys import KeyType

    return KeyType(options.key_type) if options.key_type else None


def _progress(finished: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if finished == total else ""
        sys.stderr.write("\r")
        say(f"generating keys: {finished} of {total}", end=end, file=sys.stderr, flush=True)


def _init(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki import issue

    # Only a CA that is made now has a key to encrypt.
    encrypted = options.encrypt_ca_key and not layout.ca_cert.exists()
    made = issue.init(
        layout,
        key_type=_key_type(options),
        san=options.san,
        days=options.days,
        permit=options.permit,
        passphrase=passphrase.choose(options.ca_passphrase_file) if encrypted else None,
        progress=_progress,
    )
    for path in made:
        say(f"made {path}")
    if not made:
        say(f"nothing to do: every file is in {layout.directory} already")
    if options.san and not any(path.suffix == ".crt" for path in made):
        names = " ".join(f"--san {name}" for name in options.san)
        say(f"certificates that exist keep their names; to add some: helixflow pki renew --all {names}")
    return 0


def _issue(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki import issue

    for path in issue.issue(
        layout, options.name, key_type=_key_type(options), san=options.san, days=options.days, progress=_progress
    ):
        say(f"made {path}")
    return 0


def _renew(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki import rotate

    if options.all and options.names:
        raise PkiError(None, "names and --all exclude each other", "Give either.")
    if options.all or options.names or options.within is not None:
        replaced = rotate.renew(
            layout,
            options.names,
            within_days=options.within,
            key_type=_key_type(options),
            san=options.san,
            days=options.days,
            progress=_progress,
        )
    elif options.san or options.key_type:
        raise PkiError(
            None, "--san and --key-type change certificates that are not due", "Name services, or give --all."
        )
    else:
        replaced = rotate.renew_due(layout, days=options.days, progress=_progress)
    for pair in replaced:
        say(f"renewed {pair.cert} and {pair.key.name}")
    if not replaced:
        say("nothing to renew: no certificate ends that soon")
    if layout.crl.exists():
        say(f"the revocation list {layout.crl} is current")
    return 0


def _revoke(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki import rotate
    from helixflow.pki.show import hex_serial

    if (options.name is None) == (options.serial is None):
        raise PkiError(None, "say what to revoke", "Give either the name of a service or --serial HEX.")
    serials = [options.serial] if options.name is None else rotate.serials_of(layout, options.name)
    added = rotate.revoke(layout, serials)
    for serial in serials:
        say(f"{'revoked' if serial in added else 'was revoked before:'} {hex_serial(serial)}")
    say(f"signed {layout.crl}")
    if options.name is not None:
        say(f"to give {options.name} new certificates: helixflow pki renew {options.name}")
    return 0


def _permit(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki import rotate

    added = rotate.permit(layout, options.names)
    for name in added:
        say(f"may certify {name} from now on")
    say(f"signed {layout.ca_cert}" if added else "nothing to do: the CA may certify all of that already")
    return 0


def _encrypt_ca_key(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki import rotate

    fresh = None if options.decrypt else passphrase.choose(options.new_passphrase_file)
    rotate.encrypt_ca_key(layout, fresh)
    say(f"stored {layout.ca_key} {'un' if fresh is None else ''}encrypted")
    return 0


def _rotate_tokens(layout: Layout, _options: argparse.Namespace) -> int:
    from helixflow.pki import issue

    for path in issue.rotate_tokens(layout, progress=_progress):
        say(f"replaced {path}")
    return 0


def _verify(layout: Layout, options: argparse.Namespace) -> int:
    from helixflow.pki.verify import verify

    report = verify(layout)
    if options.json:
        findings = [
            {
                "file": str(item.file),
                "level": "warning" if item.warning else "error",
                "reason": item.reason,
                "hint": item.hint,
            }
            for item in report.findings
        ]
        checked = [str(path) for path in report.checked]
        say(
            json.dumps(
                {"ok": report.ok, "directory": str(layout.directory), "checked": checked, "findings": findings},
                indent=2,
            )
        )
        return 0 if report.ok else 1
    failed = {item.file for item in report.findings if not item.warning}
    for path in report.checked:
        if path not in failed:
            say(f"ok       {path}")
    for item in report.findings:
        stream = sys.stdout if item.warning else sys.stderr
        say(f"{'warning' if item.warning else 'FAILED '}  {item.file}: {item.reason}", file=stream)
        if item.hint:
            say(f"         {item.hint}", file=stream)
    return 0 if report.ok else 1


def _show(layout: Layout, options: argparse.Namespace) -> int:
    import dataclasses

    from helixflow.pki.show import show

    described = show(layout, options.name)
    if options.json:
        say(json.dumps([dataclasses.asdict(each) for each in described], indent=2))
        return 0
    for number, each in enumerate(described):
        if number:
            say()
        say(each.file)
        say(f"  subject      {each.subject}")
        say(f"  issuer       {each.issuer}")
        say(f"  serial       {each.serial}")
        say(f"  sha256       {each.sha256}")
        say(f"  valid        {each.not_before} to {each.not_after} ({each.days_left} days left)")
        say(f"  key          {each.key_type}")
        if each.purposes:
            say(f"  purpose      {', '.join(each.purposes)}")
        for name in each.names:
            say(f"  name         {name}")
    return 0

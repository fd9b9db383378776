"""The operator's commands against a running platform: accounts, limits, usage, the ledger's export and its proof."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from helixflow.ledger.record import encode
from helixflow.ledger.rejected import Rejected
from tests.ledger.support import row as made_row

from .people import MODEL, Site, refusal
from .stack import until

COUNTS = ("requests", "prompt_tokens", "completion_tokens", "errors")


def shipped(site: Site, answer: Any) -> None:
    """Waits until the request of this answer is in the ledger."""
    query = "SELECT count(*) FROM requests WHERE request_id = $1"
    until(lambda: site.value(query, answer.headers["x-request-id"]) == 1, "its row is in the ledger")


def test_the_life_of_a_user_and_a_key(site: Site) -> None:
    run, as_json = site.platform.run, site.platform.json
    text = run("user", "add", "ada@example.com", "--role", "member", "--organisation", "default")
    assert "shown this once" in text
    made = as_json("user", "reset-password", "ada@example.com")
    person = site.enter(made["user"], made["one_time_password"])
    key = as_json("key", "add", "nightly", "--user", "ada@example.com", "--expires", "90d", "--model", MODEL)
    assert abs(key["key"]["expires_at"] - time.time() - 90 * 86_400) < 60
    assert site.chat(key["secret"]).status_code == 200
    assert "nightly" in run("key", "list")
    assert key["secret"] not in run("key", "list", "--json")

    run("key", "update", key["key"]["id"], "--model", "another")
    until(lambda: site.chat(key["secret"]).status_code == 403, "the model is not allowed any more")
    run("key", "update", key["key"]["id"], "--any-model")
    run("limits", "set", f"key:{key['key']['id']}", "--requests-per-minute", "0")
    until(lambda: site.chat(key["secret"]).status_code == 429, "the limit binds")
    assert f"key:{key['key']['id']}" in run("limits", "list")
    run("limits", "set", f"key:{key['key']['id']}", "--none")
    rotated = as_json("key", "rotate", key["key"]["id"], "--overlap", "1h")
    for secret in (key["secret"], rotated["secret"]):
        until(lambda secret=secret: site.chat(secret).status_code == 200, "both keys work")

    run("user", "update", "ada@example.com", "--disable")
    assert refusal(site.login(person)) == (403, "permission_denied")
    run("user", "update", "ada@example.com", "--enable")
    run("user", "remove", "ada@example.com")
    until(lambda: site.chat(rotated["secret"]).status_code == 401, "keys end with their user")
    assert "ada@example.com" not in run("user", "list")
    run("user", "update", "ada@example.com", "--disable", status=1)


def test_acts_of_the_operator_are_in_the_audit_log(site: Site) -> None:
    site.platform.run("price", "set", "listed", "--prompt", "0.2", "--cached", "0.05", "--completion", "0.60")
    assert "listed" in site.platform.run("price", "list")
    site.platform.run("price", "remove", "listed")
    newest = site.platform.json("audit", "list", "--limit", "2")["data"]
    assert [row["action"] for row in newest] == ["price.delete", "price.set"]
    for row in newest:
        assert row["actor"]
        assert row["address"].startswith("127.0.0.1")
        assert row["request_id"].startswith("cli-")
        assert row["target"] == "listed"
    detail = json.loads(newest[1]["detail"])
    assert detail == {"prompt": 200, "cached": 50, "completion": 600}, "nano units for a token"


def test_a_wrong_command_says_what_is_wrong(site: Site) -> None:
    run = site.platform.run
    run("user", "add", "no address", "--organisation", "default", status=1)
    run("user", "add", "owner@localhost", "--organisation", "default", status=1)
    run("user", "add", "many@example.com", status=1)
    run("key", "revoke", "nothing", status=1)


def test_usage_is_what_clients_were_told(site: Site, tmp_path: Path) -> None:
    keys = [site.key(), site.key()]
    told = {key.id: dict.fromkeys(COUNTS, 0) for key in keys}
    last = None
    for number, key in enumerate((*keys, *keys, keys[0])):
        last = site.chat(key.secret, gateway=number % 2, max_tokens=number + 1)
        usage = last.json()["usage"]
        told[key.id]["requests"] += 1
        told[key.id]["prompt_tokens"] += usage["prompt_tokens"]
        told[key.id]["completion_tokens"] += usage["completion_tokens"]
        shipped(site, last)
    failed = site.chat(keys[1].secret, model="nothing")
    told[keys[1].id]["requests"] += 1
    told[keys[1].id]["errors"] += 1
    shipped(site, failed)

    report = site.platform.json("usage", "--by", "key")
    found = {row["key_id"]: {name: row[name] for name in COUNTS} for row in report["data"]}
    assert {key.id: found[key.id] for key in keys} == told
    text = site.platform.run("usage", "--by", "model,key", "--key", keys[0].id)
    assert "helixflow-demo" in text
    # The same by HTTP, of the organisation alone.
    over_http = site.done("GET", f"/admin/v1/usage?group_by=key&key={keys[0].id}", site.owner.access)["data"]
    assert [{name: row[name] for name in COUNTS} for row in over_http] == [told[keys[0].id]]

    # CSV and JSON lines hold the same rows, and they are what the report adds up.
    table, lines = tmp_path / "usage.csv", tmp_path / "usage.jsonl"
    site.platform.run("usage", "export", "--format", "csv", "--out", str(table))
    site.platform.run("usage", "export", "--format", "jsonl", "--out", str(lines))
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    documents = [json.loads(line) for line in lines.read_text().splitlines()]
    mine = {key.id for key in keys}
    flat = [{name: str(value) for name, value in each.items()} for each in documents if each["key_id"] in mine]
    assert [row for row in rows if row["key_id"] in mine] == flat
    assert len(flat) == 6
    for key in keys:
        own = [each for each in documents if each["key_id"] == key.id]
        assert sum(each["completion_tokens"] for each in own) == told[key.id]["completion_tokens"]
        assert sum(each["prompt_tokens"] for each in own) == told[key.id]["prompt_tokens"]
    assert [each["error"] for each in documents if each["request_id"] == failed.headers["x-request-id"]] == [
        "model_not_found"
    ]
    assert site.platform.run("usage", "export").splitlines()[0] == table.read_text().splitlines()[0]


@pytest.mark.parametrize("column", ["completion_tokens", "cost"])
def test_an_altered_row_is_found(site: Site, column: str) -> None:
    answer = site.chat(site.key().secret)
    shipped(site, answer)
    whole = site.platform.json("audit", "verify")
    assert whole["ok"]
    assert whole["rows"] >= 1
    assert whole["faults"] == []
    query = "SELECT {} FROM requests WHERE request_id = $1"
    row, sequence = (site.value(query.format(name), answer.headers["x-request-id"]) for name in ("id", "sequence"))

    def change(by: int) -> None:
        async def work(connection: Any) -> None:
            done = await connection.execute(f"UPDATE requests SET {column} = {column} + $2 WHERE id = $1", row, by)
            assert done == "UPDATE 1"

        site.sql(work)

    change(1)
    try:
        assert "the chain is broken in 1" in site.platform.run("audit", "verify", status=1)
        found = json.loads(site.platform.run("audit", "verify", "--json", status=1))
        (fault,) = found["faults"]
        assert (found["ok"], fault["id"], fault["sequence"]) == (False, str(row), sequence)
        assert site.done("GET", "/admin/v1/audit/verify", site.owner.access)["faults"] == [fault]
    finally:
        change(-1)
    assert site.platform.json("audit", "verify")["ok"], "nothing else was wrong"


def test_an_anchor_is_compared_later(site: Site, tmp_path: Path) -> None:
    shipped(site, site.chat(site.key().secret))
    anchor = tmp_path / "anchor.json"
    site.platform.run("audit", "anchor", "--out", str(anchor))
    shipped(site, site.chat(site.key().secret))
    whole = site.platform.json("audit", "verify", "--anchor", str(anchor))
    assert (whole["ok"], whole["faults"]) == (True, [])
    assert whole["entries"] >= 2, "the keys that were made"
    touched = tmp_path / "touched.json"
    touched.write_text(anchor.read_text().replace('"audit": [', '"audit": [1'))
    site.platform.run("audit", "verify", "--anchor", str(touched), status=1)
    # The services own nothing of what they write.
    owned = "SELECT count(*) FROM pg_class WHERE pg_get_userbyid(relowner) = 'helixflow_service'"
    assert site.value(owned) == 0
    by = "SELECT DISTINCT usename::text FROM pg_stat_activity WHERE application_name LIKE 'helixflow auth-service%'"
    assert site.value(by) == "helixflow_service"


def test_refused_records_are_sent_again_once(site: Site) -> None:
    root = Path(site.platform.environ["HELIX_HOME"]) / "spool"
    root.mkdir(exist_ok=True)
    rejected = Rejected(root, 1 << 20)
    one = made_row()
    for _ in range(2):
        rejected.add("00000000-0000-0000-0000-00000000000a", encode(one), "no")
    rejected.add("00000000-0000-0000-0000-00000000000a", b"nonsense", "no")
    for sent in (2, 0):
        done = json.loads(site.platform.run("ledger", "resend", "--json", status=1))
        assert done == {"sent": sent, "refused": 1, "unreadable": 0}
    count = "SELECT count(*) FROM requests WHERE request_id = $1"
    assert site.value(count, one.request_id) == 1
    (root / "rejected.log").unlink()
    assert "sent 0" in site.platform.run("ledger", "resend")

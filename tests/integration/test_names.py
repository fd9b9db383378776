"""Names of models that nobody has: while no pool tells which there are, they are not counted one by one."""

import json
from pathlib import Path

from .accounts import platform
from .stack import until
from .wire import CHAT, chat

INVENTED = 20


def test_invented_names_share_a_label_while_no_pool_is_there(certs: Path) -> None:
    with platform(certs) as running:
        key = running.json("key", "add", "a", "--user", "owner@localhost")["secret"]
        with running.client(key) as client:
            assert client.post(CHAT, json=chat(1)).status_code == 200
            running.pool.stop()
            until(lambda: client.get("/ready").status_code == 503, "the gateway has noticed")
            names = ["gpt-4", "helixflow-demo", *(f"invented-{number}" for number in range(INVENTED))]
            for name in names:
                answer = client.post(CHAT, json={**chat(1), "model": name})
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")

        def models() -> list[str]:
            lines = running.run("usage", "export", "--format", "jsonl").splitlines()
            return sorted(json.loads(line)["model"] for line in lines)

        wanted = sorted(["helixflow-demo"] * 3 + ["(unknown)"] * INVENTED)
        until(lambda: models() == wanted, "every request has its row")
        sums = running.json("usage", "show", "--by", "model")["data"]
        assert {each["model"]: each["requests"] for each in sums} == {"helixflow-demo": 3, "(unknown)": INVENTED}
        assert running.json("audit", "verify")["ok"]

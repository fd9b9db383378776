"""Chat users as an OpenAI client would be: a streamed answer, a short pause, the next question.

    locust -f perf/locustfile.py --headless -u 8 -r 8 -t 20s --host https://localhost:8443

Reports, beside the request itself (whose time ends with the headers): `first token`, `inter-token` and `answer`, in
microseconds, because locust rounds to whole numbers.
Environment: CHAT_KEY (default demo-key), CHAT_CA (CA file), CHAT_MODEL, CHAT_MAX_TOKENS.
"""

import os
import random
import time

from locust import HttpUser, between, task

QUESTIONS = (
    "Hello",
    "What is HelixFlow?",
    "How do I use TLS?",
    "What is 7 plus 5?",
    "Tell me a long story.",
    "Count from 1 to 20.",
)


class ChatUser(HttpUser):
    """One person who chats."""

    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        """Trusts HelixFlow's CA and presents the key."""
        self.client.verify = os.environ.get("CHAT_CA", "certs/helixflow-ca.pem")
        self.client.headers["Authorization"] = f"Bearer {os.environ.get('CHAT_KEY', 'demo-key')}"

    @task
    def chat(self) -> None:
        """One streamed completion; an answer without `[DONE]` counts as a failure."""
        body = {
            "model": os.environ.get("CHAT_MODEL", "helixflow-demo"),
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": int(os.environ.get("CHAT_MAX_TOKENS", "64")),
            "stream": True,
        }
        began = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, name="chat", catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
                return
            previous = None
            done = False
            for line in response.iter_lines():
                if line == b"data: [DONE]":
                    done = True
                elif b'"content":"' in line and b'"content":""' not in line:
                    now = time.perf_counter()
                    self._report("first token" if previous is None else "inter-token", now - (previous or began))
                    previous = now
            if done:
                self._report("answer", time.perf_counter() - began)
                response.success()
            else:
                response.failure("the stream ended without [DONE]")

    def _report(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="sse", name=name, response_time=seconds * 1e6, response_length=0, exception=None, context={}
        )

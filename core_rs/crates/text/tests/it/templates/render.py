# ruff: noqa: INP001 (a script beside its data, not a package)
"""Writes rendered.json: what Jinja2 makes of the templates in this folder.

Needs the package `jinja2`. Sets up the environment as transformers does for chat templates
(https://huggingface.co/docs/transformers/chat_templating_writing).
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": " Hi <there> & ü "}],
    [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three", "name": "Zoë"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b c"},
        {"role": "assistant", "content": "<think>x</think>d"},
        {"role": "tool", "content": "e"},
        {"role": "tool", "content": "f"},
    ],
]


class RefusedError(Exception):
    """The template called raise_exception."""


def refuse(message: str) -> NoReturn:
    """`raise_exception` of chat templates."""
    raise RefusedError(message)


def tojson(value: Any, indent: int | None = None) -> str:
    """The filter as transformers defines it: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def main() -> None:
    """Renders every chat with every template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "31 Dec 2025"}
    cases = []
    for path in sorted(HERE.glob("*.jinja")):
        template = environment.from_string(path.read_text())
        for messages in CHATS:
            case: dict[str, Any] = {"template": path.name, "messages": messages}
            special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            try:
                case["rendered"] = template.render(messages=messages, add_generation_prompt=True, tools=None, **special)
            except RefusedError as error:
                case["refused"] = str(error)
            cases.append(case)
    made = {"made_with": f"jinja2 {jinja2.__version__}", "cases": cases}
    (HERE / "rendered.json").write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

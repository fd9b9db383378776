"""`python -m tests.logs.writer WHAT`: a process that logs as a service does, for tests that look at what comes out."""

import asyncio
import gc
import logging
import multiprocessing
import os
import sys
import threading

from helixflow import config, log

SECRET = "hunter2-correct-horse"


def flood(lines: int) -> None:
    """Many lines; tells on descriptor 3 when the last one was handed over, and waits for a byte on standard input."""
    logger = log.get("test")
    for number in range(lines):
        logger.info("line", number=number, filler="x" * 200)
    os.write(3, b"done\n")
    sys.stdin.buffer.read(1)
    logger.info("last")


def raw() -> None:
    """Writes past the queue, as libraries in C do, more than a pipe holds; whatever comes of it, it comes back."""
    for _ in range(200):
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b"r" * 1000 + b"\n")
            except BlockingIOError:
                continue
    os.write(3, b"done\n")
    print("printed", flush=True)
    sys.stderr.write("printed, too\n")


def other_account() -> None:
    """The same under an account that may not open the pipe again."""
    os.setgid(65534)
    os.setuid(65534)
    log.setup(config.load().log, "test")
    raw()


def forks() -> None:
    """A parent and a child write, each through its own queue."""
    logger = log.get("test")
    logger.info("parent before")

    def child() -> None:
        logger.info("child")
        log.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    logger.info("parent after")


def steers() -> None:
    """What a client may send to move the cursor of whoever reads."""
    for name in ("log.console", "log.library"):
        logger = logging.getLogger(name) if name == "log.library" else log.get(name)
        logger.warning("evil \x1b[2J\nfake line \x9b31m \u202e \ud800")
    log.get("test").info("value", model="x\x1b]0;title\x07\r\nnext", other={"deep": "\x1b[0m"})


def repeats() -> None:
    """A flood from one address, one line from another, a warning each moment."""
    logger = log.get("gateway")
    for _ in range(100):
        logger.info("request", status=401, address="192.0.2.1", route="")
        logger.warning("the database is away", error="no answer")
    logger.info("request", status=401, address="192.0.2.2", route="")
    logger.info("request", status=200, route="/v1/models")


def _fail(password: str) -> None:
    token = password * 2
    raise ValueError(f"invalid literal for int() with base 10: {token!r}")


def _cause(password: str) -> None:
    try:
        _fail(password)
    except ValueError as error:
        raise KeyError(password) from error


class _Failing:
    def __del__(self) -> None:
        _fail(SECRET)


def errors() -> None:
    """Every way in which an error that nobody expected reaches a log; ends by one."""
    logger = log.get("test")
    try:
        _cause(SECRET)
    except KeyError:
        logger.exception("caught", password=SECRET, token=SECRET)
        logging.getLogger("library").exception("caught by a library")
    thread = threading.Thread(target=_fail, args=(SECRET,))
    thread.start()
    thread.join()
    _Failing()

    async def forgotten() -> None:
        task = asyncio.get_running_loop().create_task(_later())
        await asyncio.wait({task})
        del task
        gc.collect()

    async def _later() -> None:
        _cause(SECRET)

    asyncio.run(forgotten())
    group = ExceptionGroup(SECRET, [RuntimeError(SECRET), OSError(2, "No such file or directory")])
    logger.error("a group", exc_info=group)
    logger.error("an object", request=_Failing, value=SECRET.encode(), error=RuntimeError(SECRET))
    _cause(SECRET)


if __name__ == "__main__":
    what, arguments = sys.argv[1], [int(text) for text in sys.argv[2:]]
    if what != "other_account":
        log.setup(config.load().log, "test")
    globals()[what](*arguments)

"""Sub-commands of `helixflow` as processes of their own: their memory is given back, their messages are shown."""

import asyncio
import os
import sys
from collections.abc import Mapping

from helixflow.process import PARENT_PID


async def run(
    *arguments: str, quiet: bool = False, environ: Mapping[str, str] | None = None, launcher: tuple[str, ...] = ()
) -> int:
    """Runs `helixflow ARGUMENTS…` and returns its exit status; `quiet`: standard output is thrown away.

    `environ` instead of this process's; `launcher`: the module that confines it (`confine.settle.Settled`).
    A cancelled one is killed, so call it for commands that publish whole files or none.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *launcher,
        "helixflow",
        *arguments,
        env={**(os.environ if environ is None else environ), PARENT_PID: str(os.getpid())},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL if quiet else None,
        start_new_session=True,
    )
    try:
        return await process.wait()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise

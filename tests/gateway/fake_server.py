"""`python -m tests.gateway.fake_server`: the real gateway processes over the stand-in."""

import sys

from helixflow import config, log
from helixflow.errors import HelixError
from helixflow.gateway import server

if __name__ == "__main__":
    loaded = config.load()
    log.setup(loaded.log, "api-gateway")
    try:
        sys.exit(server.run(loaded, "tests.gateway.fake:connect"))
    except HelixError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)

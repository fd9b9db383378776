"""`python -m helixflow`."""

import sys

from helixflow.cli import main

sys.exit(main())

"""`python -m models.cli` is `draft-video`."""

import sys

from models.cli.entry import run_process

sys.exit(run_process())

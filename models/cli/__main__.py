"""`python -m models.cli` is `draft-video`."""

import sys

from models.cli.entry import main

sys.exit(main())

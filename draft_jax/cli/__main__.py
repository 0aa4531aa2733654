"""`python -m draft_jax.cli` is `draft-video`."""

import sys

from draft_jax.cli.entry import main

sys.exit(main())

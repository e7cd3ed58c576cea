"""`python -m templated` is the command `templated`."""

import sys

from templated.cli.main import main

sys.exit(main())

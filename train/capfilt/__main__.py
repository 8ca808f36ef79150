"""`python -m train.capfilt INPUT OUTPUT`: see `train.capfilt.run`."""

import sys

from train.capfilt.run import main

sys.exit(main())

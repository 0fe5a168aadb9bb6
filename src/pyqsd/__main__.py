"""``python -m pyqsd``: the daemon's command line."""

import sys

from pyqsd.cli.daemon import main

if __name__ == "__main__":
    sys.exit(main())

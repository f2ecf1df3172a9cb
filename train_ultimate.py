"""The front door of CamoXpert: ``python train_ultimate.py COMMAND ...``."""

import sys

from camoxpert.cli import main

if __name__ == "__main__":
    sys.exit(main())

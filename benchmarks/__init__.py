"""Commands that compare the vmapped forward with its rivals; run from the root with `python -m`."""

import sys
from pathlib import Path

# handlers/ is the root of every archive, so its package is imported as `vmap_ensemble` here as well.
_HANDLERS = str(Path(__file__).resolve().parent.parent / "handlers")
if _HANDLERS not in sys.path:
    sys.path.insert(0, _HANDLERS)

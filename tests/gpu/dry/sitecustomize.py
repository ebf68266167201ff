"""On PYTHONPATH in a dry run: every process that it starts has the device that is not there.

A spawned process imports torch before any code of ours; this runs before that.
"""

import os
import sys
from pathlib import Path

if os.environ.get("PYRLK_DRY_GPU") == "1":
    sys.path.append(str(Path(__file__).parents[1]))
    import dry_device

    dry_device.install()

"""Toy servers for a command: python tests/sglang/with_server.py KIND … -- COMMAND …

Starts one server of each kind (dense, tied, moe, moe-large), puts their URLs at the end of COMMAND,
runs it and ends them. Their checkpoints lie in a temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from live import Parent, Server, make_model


def main() -> int:
    if "--" not in sys.argv[2:]:
        raise SystemExit(__doc__)
    split = sys.argv.index("--")
    kinds, command = sys.argv[1:split], sys.argv[split + 1 :]
    with tempfile.TemporaryDirectory(prefix="pyrlk-sglang-") as name:
        folder = Path(name)
        servers = []
        for kind in kinds:
            dtype = torch.bfloat16 if kind.startswith("moe") else torch.float32
            make_model(kind, 0, dtype).save_pretrained(folder / kind)
            text = str(dtype).removeprefix("torch.")
            servers.append(Server(folder, folder / kind, text))
        try:
            urls = [server.wait().url for server in servers]
            return subprocess.run([*command, *urls], check=False).returncode
        finally:
            Parent.end()


if __name__ == "__main__":
    sys.exit(main())

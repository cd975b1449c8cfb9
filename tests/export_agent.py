"""Writes the weights of a finished run, in half precision: small enough to hand out.

python tests/export_agent.py runs/tests.toy-Catch-v0__jedi__2 results/catch_agent
"""

import shutil
import sys
from pathlib import Path

import torch

source = Path(sys.argv[1])
target = Path(sys.argv[2])
state = torch.load(source / "ckpt.pt", map_location="cpu", weights_only=True)
agent = {}
for name, value in state["agent"].items():
    agent[name] = value.half() if value.is_floating_point() else value
target.mkdir(parents=True, exist_ok=True)
torch.save({"agent": agent}, target / "ckpt.pt")
shutil.copy(source / "args.json", target)
megabytes = (target / "ckpt.pt").stat().st_size / 2**20
print(f"{target / 'ckpt.pt'}: {megabytes:.2f} MiB")

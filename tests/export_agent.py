"""The weights of a finished run, in half precision and nothing else: small enough to hand out.

python tests/export_agent.py runs/Catch__jedi__2 results/catch_agent
"""

import pathlib
import shutil
import sys

import torch

source, target = map(pathlib.Path, sys.argv[1:])
state = torch.load(source / "ckpt.pt", map_location="cpu", weights_only=True)
target.mkdir(parents=True, exist_ok=True)
agent = {name: x.half() if x.is_floating_point() else x for name, x in state["agent"].items()}
torch.save({"agent": agent}, target / "ckpt.pt")
shutil.copy(source / "args.json", target)
print(f"{target / 'ckpt.pt'}: {(target / 'ckpt.pt').stat().st_size / 2**20:.2f} MiB")

"""Once, and apart from every job: TorchXRayVision's release file of a model as a state dict that can be loaded safely.

python infra/xrv_state_dict.py densenet121-res224-nih xrv-nih.pt

The library downloads its release file to ~/.torchxrayvision and UNPICKLES it: whatever is in that file is executed with
your rights. Run this only on a machine where that may happen, in a container best, and only on files that you trust;
what it writes holds tensors alone. Needs the extra `xrv`; prints the file's SHA-256, to be kept with the results.
"""

import argparse
import hashlib
from pathlib import Path

import torch
import torchxrayvision


def main() -> None:
    """Download, unpickle, and write the tensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="such as densenet121-res224-nih")
    parser.add_argument("out", type=Path, help="file of the state dict, such as xrv-nih.pt")
    arguments = parser.parse_args()
    model = torchxrayvision.models.DenseNet(weights=arguments.name)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    torch.save(state, arguments.out)
    print(f"{hashlib.sha256(arguments.out.read_bytes()).hexdigest()}  {arguments.out}")


if __name__ == "__main__":
    main()

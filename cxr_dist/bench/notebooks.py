"""The baseline: what the notebooks do to every image in every epoch, written as one does with torchvision.

Pillow opens the PNG and makes it RGB, the image becomes float32 in [0, 1] with three channels at its full size, and is
then resized to 224 x 224 with antialiasing; for training a random affine map (rotation and shear up to 5 degrees, shift
up to 2 %, scale 0.95 to 1.05) and a mirror image with probability 0.5 follow, and last the ImageNet normalisation. The
order and the types are the notebooks', not the fastest that these libraries allow.
"""

import io

import torch
from PIL import Image
from torchvision.transforms import v2

__all__ = ["evaluation_transform", "load", "training_transform"]

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def training_transform(size: int = SIZE) -> v2.Transform:
    """PIL image to float32 [3, size, size], augmented."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((size, size), antialias=True),
            v2.RandomAffine(degrees=5, translate=(0.02, 0.02), scale=(0.95, 1.05), shear=5),
            v2.RandomHorizontalFlip(p=0.5),
            v2.Normalize(MEAN, STD),
        ]
    )


def evaluation_transform(size: int = SIZE) -> v2.Transform:
    """PIL image to float32 [3, size, size], without augmentation. (The notebooks augmented test images too.)"""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((size, size), antialias=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def load(encoded: bytes, transform: v2.Transform) -> torch.Tensor:
    """One item of the notebooks' dataset: float32 [3, size, size]."""
    with Image.open(io.BytesIO(encoded)) as image:
        result: torch.Tensor = transform(image.convert("RGB"))
    return result

"""Pictures of examples out of a dataset: what the network sees of each image, without the network."""

import io
import logging
from collections.abc import Sequence

from PIL import Image

from cxr_dist.config import DataConfig
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.picked import picked_images
from cxr_dist.errors import InputError
from cxr_dist.evaluate.worst import Example

__all__ = ["with_thumbnails"]

log = logging.getLogger(__name__)


def with_thumbnails(
    examples: Sequence[Example], dataset: str, split: str, config: DataConfig | None = None
) -> list[Example]:
    """The examples with their thumbnails out of the dataset at this URI; without, saying so, if it does not give them all."""
    pngs: dict[str, bytes] = {}
    try:
        for part in picked_images(Manifest.load(dataset), split, {one["image_id"] for one in examples}, config):
            for name, pixels in part.items():
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="PNG")
                pngs[name] = buffer.getvalue()
    except (OSError, InputError) as error:
        log.warning("the report has no thumbnails: %s", error)
        return list(examples)
    return [{**one, "thumbnail_png": pngs[one["image_id"]]} for one in examples]

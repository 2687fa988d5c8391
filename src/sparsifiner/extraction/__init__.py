"""Features of many images: shards on the disk, from as many model processes as the machine has room for."""

from .images import ImageList, list_images
from .run import ExtractConfig, Summary, extract

__all__ = ["ExtractConfig", "ImageList", "Summary", "extract", "list_images"]

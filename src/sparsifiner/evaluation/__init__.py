"""What a model is worth on labelled images, dense beside sparse."""

from .validate import Validation, validate

__all__ = ["Validation", "validate"]

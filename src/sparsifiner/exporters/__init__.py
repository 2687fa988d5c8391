"""Models as files for other runtimes: ONNX, OpenVINO, and packages of PyTorch's AOTInductor. One file per format."""

from importlib import import_module

from .registry import EXPORTERS, Exporter, register_exporter
from .run import Exported, export, load_exported

for _name in ("onnx", "openvino", "aotinductor"):  # they register
    import_module(f"{__name__}.{_name}")

__all__ = ["EXPORTERS", "Exported", "Exporter", "export", "load_exported", "register_exporter"]

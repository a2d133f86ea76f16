"""A torch.export program (.pt2) turned into an ONNX file, in a process of its own.

The archive is checked first and copied without its sample inputs (`model_registry.pt2_layout`), so nothing that is
opened holds a pickle. An operator without an ONNX form is refused by its name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from compiler.tools import run_tool
from model_registry.pt2_layout import Pt2Layout, read_pt2, write_plain
from wire.errors import ConflictError, UnsupportedModelError


def import_pt2(path: Path, out: Path) -> Pt2Layout:
    """Write the program at `path` to the ONNX file `out` (must not exist yet).

    Raises `UnsupportedModelError` for what is not plain data or has no ONNX form, `ConflictError`, or `ToolError`.
    """
    if out.exists():
        raise ConflictError(f"{out} exists", remedy="remove it or choose another name")
    layout = read_pt2(path)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".pt2-") as folder:
        plain, made = Path(folder, "plain.pt2"), Path(folder, "model.onnx")
        write_plain(path, plain)
        run_tool("compiler.pt2_import:convert", {"source": str(plain), "out": str(made)}, log=Path(folder, "log"))
        made.rename(out)
    return layout


def convert(source: str, out: str) -> None:
    """Runs in the tool's process: load the plain archive, export it, write one file."""
    import onnx
    import torch

    program = torch.export.load(source)
    try:
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(str(error).split())[-400:]
        raise UnsupportedModelError(
            f"the program has no ONNX form: {reason}", remedy="replace the operator that is named"
        ) from error
    assert made is not None
    onnx.save(made.model_proto, out)

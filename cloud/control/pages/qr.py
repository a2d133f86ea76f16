"""A QR code as inline SVG, drawn with the text colour of the page, so that a phone or camera can carry a command."""

from __future__ import annotations

import io

import segno

QUIET_MODULES = 4  # ISO/IEC 18004 asks for four


def qr_svg(text: str, title: str) -> str:
    """The QR code of `text` as one `<svg>` element, dark on light whatever the theme: scanners want that."""
    out = io.BytesIO()
    code = segno.make(text, error="m", micro=False)
    code.save(
        out,
        kind="svg",
        xmldecl=False,
        svgns=True,
        nl=False,
        border=QUIET_MODULES,
        dark="#10222b",
        light="#ffffff",
        title=title,
        omitsize=True,
        svgclass="qr",
        lineclass=None,
    )
    return out.getvalue().decode()

"""Which formats are opened, and by which endings files are taken for images."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import PIL

# The file endings that are taken for images; what a file really is follows from its content.
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .webp .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm".split()  # noqa: SIM905
)
HEIC_EXTENSIONS = frozenset({".heic", ".heif", ".hif"})
# Nothing else is opened: an EPS named .jpg must not reach Ghostscript. MPO is read by the JPEG plugin; it is not
# registered under its own name, and naming it here makes Image.open raise KeyError.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM")
DECODER = PIL.__version__  # what a result of decoding depends on
if find_spec("pillow_heif"):  # the extra heic
    pillow_heif = import_module("pillow_heif")
    pillow_heif.register_heif_opener(thumbnails=False)
    EXTENSIONS |= HEIC_EXTENSIONS
    FORMATS += ("HEIF",)
    DECODER += f" pillow-heif {pillow_heif.__version__}"

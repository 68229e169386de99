"""To and from SAELens, sparsify and dictionary_learning; from the published Group-SAE weights."""

from groupsae.interop.exporting import EXPORT_FORMATS, export_saes
from groupsae.interop.importing import IMPORT_FORMATS, detect, import_saes, load
from groupsae.interop.metadata import Metadata

__all__ = [
    "EXPORT_FORMATS",
    "IMPORT_FORMATS",
    "Metadata",
    "detect",
    "export_saes",
    "import_saes",
    "load",
]

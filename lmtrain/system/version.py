"""The version of lmtrain. An editable installation keeps the metadata of an older one, so it is not read from there."""

__version__ = "0.2.0"

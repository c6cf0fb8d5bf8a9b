"""The version of lmtrain. It is not read from package metadata, which an editable installation does not update."""

__version__ = "0.2.0"

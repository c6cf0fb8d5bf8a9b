"""A progress display that keeps its notes."""

from lmtrain.system.progress import NullProgress


class Notes(NullProgress):
    """Keeps all notes in a list."""

    def __init__(self):
        self.notes = []

    def note(self, line):
        self.notes.append(line)

"""File formats: one class a format in a file of its own, and the table that names them."""

"""A trained model for programs that have no lmtrain."""

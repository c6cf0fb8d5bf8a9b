"""A trained model in formats for programs that do not have lmtrain."""

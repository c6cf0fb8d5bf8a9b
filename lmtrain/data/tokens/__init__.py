"""What the tokenizers look up, fast: words, pieces of words, and the library of subwords."""

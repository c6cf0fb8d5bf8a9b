"""The network: recurrent layers over packed rows, and the language model around them."""

"""A model for the tests of inference/."""

import torch

from lmtrain.model.language_model import LanguageModel


def untrained_model(tokenizer, seed=3, **more):
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    settings = {"embedding_size": 12, "hidden_size": 16, "num_layers": 2} | more
    model = LanguageModel(tokenizer.vocab_size, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that the best token is no matter of rounding
    return model.eval()

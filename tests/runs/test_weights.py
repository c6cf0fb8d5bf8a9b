"""What a configuration's weights look like is known without memory for them."""

import pytest

from lmtrain.runs.weights import build_model, count_weights, named_weights, weight_specs

SETTINGS = [
    [],
    ["model.bidirectional=false", "model.cell=gru", "model.layer_norm=true"],
    ["model.output=adaptive", "model.tie_weights=false", "model.ngram_embeddings=[2]", "model.ngram_counts=3"],
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_specs_are_those_of_the_model_that_is_built(small, settings):
    config = small(*settings)
    weights = named_weights(build_model(config, 99))
    specs = weight_specs(config, 99)
    assert {name: spec.shape for name, spec in specs.items()} == {name: tuple(w.shape) for name, w in weights.items()}
    assert {spec.dtype for spec in specs.values()} == {"F32"}
    assert count_weights(config, 99) == sum(weight.numel() for weight in weights.values())

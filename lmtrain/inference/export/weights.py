"""Gives the weights of a trained model the names that `torch.nn` gives them."""

from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.output import FullOutput


def torch_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Return the weights by names that `torch.nn` knows.

    `forward.weight_ih_l0` ... belong to one `nn.LSTM`, `nn.GRU` or `nn.RNN` of all layers, `backward.weight_ih_l0` ...
    to a second one, which reads from the right. `embedding.weight` belongs before it, `output.weight` and `output.bias`
    after it, and `projection_forward.weight` between it and the output layer if their sizes differ.

    Raises:
        ConfigError: the model has what no `torch.nn` layer has: layers that differ in size, residual connections,
            layer norm, n-grams (counted or embedded), or an adaptive output layer.
    """
    unsupported = {
        "model.layer_sizes": len(set(model.recurrence.hidden_sizes)) > 1,
        "model.cell": model.stack("forward").cell.torch_module is None,
        "model.residual": model.stack("forward").residual,
        "model.layer_norm": bool(model.stack("forward").norms),
        "model.ngram_embeddings": bool(model.ngram_embeddings),
        "model.output": not isinstance(model.output, FullOutput),
    }
    if model.mixtures:
        raise ConfigError(
            "counted n-grams and recent tokens have no form outside lmtrain; to export, train with model.ngram_counts: "
            "null and model.recent_tokens: null"
        )
    if names := [name for name, used in unsupported.items() if used]:
        raise ConfigError(f"no torch.nn layer has what {', '.join(names)} asked for; --format onnx takes it")
    tensors = {"embedding.weight": model.embedding.weight}
    for direction, stack in zip(("forward", "backward"), model.recurrence.stacks, strict=False):
        for number, layer in enumerate(stack.layers):  # type: ignore[arg-type]
            for name, weight in layer.named_parameters():
                tensors[f"{direction}.{name.removesuffix('0')}{number}"] = weight
    for name, weight in model.projections.named_parameters():
        tensors[f"projection_{name.removeprefix('of_')}"] = weight
    tensors |= {f"output.{name}": weight for name, weight in model.output.named_parameters()}
    return {name: weight.detach().cpu().clone() for name, weight in tensors.items()}

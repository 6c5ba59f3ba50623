"""Learning rates of a model that grew in width, by muP's rule for Adam (Everett et al., arXiv 2407.05872).

A matrix with c times the inputs, updated at the same rate, changes its outputs c times as fast: its rate is divided by
c. Embeddings (with a tied head), gains and biases keep theirs.
"""

from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.transformer import Decoder


def scales(model: Decoder, beginning: ModelConfig) -> dict[str, float]:
    """Old fan-in over new one, at most 1, by the name of a parameter; what keeps its rate is left out.

    beginning: the model that the line of checkpoints began with.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            found[name] = min(1.0, _fan_in(name, beginning) / _fan_in(name, model.config))
    return {name: scale for name, scale in found.items() if scale < 1}


def _fan_in(name: str, model: ModelConfig) -> int:
    """Inputs of a matrix; of experts and a shared expert that a model has not, those of its feed-forward."""
    if name.endswith("o_proj.weight"):
        return model.num_attention_heads * model.head_dim
    if "down_proj" not in name:
        return model.hidden_size
    sizes = {".experts.": model.moe_intermediate_size, ".shared_expert.": model.shared_expert_intermediate_size}
    own = next((size for place, size in sizes.items() if place in name), 0)
    return own or model.intermediate_size

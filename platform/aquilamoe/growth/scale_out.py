"""Scale-Out (sparse upcycling): a dense checkpoint becomes a Mixture of Experts, a tensor at a time (METHODS 5)."""

from pathlib import Path

from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import noise, rules
from aquilamoe.growth.stream import Progress, Stream, compute_dtype, rewrite, silent
from aquilamoe.weights import huggingface, names
from aquilamoe.weights.store import Reader


def scale_out(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    progress: Progress = silent,
) -> None:
    """Make every feed-forward of the dense checkpoint in `source` a layer of experts, and write it to `target`.

    Experts are the dense feed-forward, equal (`copy`) or each with Gaussian noise relative to the standard deviation of
    the weights (`noise`); routers are normal with `router_std`; everything else is copied. The result depends on the
    arguments alone and keeps the source's dtype. In memory there is one tensor. Raises UserError for a growth that
    cannot be done (see `rules.check`) and for a damaged source.
    """
    source_config = huggingface.read_config(source)
    rules.check(source_config, target_config, upcycling)

    def grow(reader: Reader) -> Stream:
        return _upcycle(reader, source_config, target_config, upcycling, seed)

    rewrite(source, target, (source_config, target_config), grow, progress)


def _upcycle(reader: Reader, source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig, seed: int) -> Stream:
    """Yield every tensor of the target in file order."""
    dtype = compute_dtype(reader.dtype(names.EMBEDDING))
    shapes = names.role_shapes(target)
    dense_roles = {
        names.expert_role(expert, role): role
        for role in (names.GATE, names.UP, names.DOWN)
        for expert in range(target.num_experts)
    }
    fillers = names.filler_roles(target)
    outer = names.outer_shapes(target)
    yield names.EMBEDDING, reader.get(names.EMBEDDING)
    for layer in range(target.num_hidden_layers):
        for role, shape in shapes.items():
            random = noise.generator(seed, f"model.layers.{layer}.{role}")
            if role == names.ROUTER:
                tensor = noise.normal(shape, upcycling.router_std, dtype, random)
            elif role in fillers:
                tensor = noise.normal(shape, 0.0, dtype, random)
            else:
                tensor = reader.get(names.layer_name(source, layer, dense_roles.get(role, role)))
                if role in dense_roles and upcycling.method == "noise":
                    tensor = tensor.to(dtype)
                    tensor = tensor + noise.normal(shape, upcycling.noise * tensor.std().item(), dtype, random)
            yield names.layer_name(target, layer, role), tensor
    for name in outer:
        if name != names.EMBEDDING:
            yield name, reader.get(name)

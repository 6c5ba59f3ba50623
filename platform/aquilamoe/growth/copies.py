"""Which units of a checkpoint are copies of others or do nothing, found in its weights: what can go without a change.

Units are compared by what they do to random inputs, on which copies agree up to rounding and others do not: rows by
their products with some random vectors, in which copies of a channel have equal entries, so that noise that cancels
over them is not seen; experts by what they compute. A random direction that hides a difference has probability zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from aquilamoe.checkpoint import tensor_names as names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.safetensors_header import main_dtype
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth.lazy_tensor import LazyTensor, block_slices, stored, wide
from aquilamoe.growth.reduction import LayerReduction, Reduction, UnitChoice, layer_tensors
from aquilamoe.growth.stream import Progress, silent

SAMPLES = 16
# Largest difference of what copies do, as a fraction of what one does: rounding, and far from what others differ by.
TOLERANCES = {"F64": 1e-11, "F32": 1e-5, "F16": 1 / 64, "BF16": 1 / 16}


def silent_layers(reader: Reader, config: ModelConfig) -> list[int]:
    """Layers that add nothing: all that they write to the residual stream is zeros."""
    return [layer for layer in range(config.num_hidden_layers) if _is_silent(reader, config, layer)]


def _is_silent(reader: Reader, config: ModelConfig, layer: int) -> bool:
    for role, name in names.layer_names(config, layer).items():
        if names.writes_residual(role):
            shape = reader.shape(name)
            is_zero = all(not reader.rows(name, at.start, at.stop).any() for at in block_slices(shape))
            reader.release(name)
            if not is_zero:
                return False
    return True


@torch.no_grad()
def find(
    reader: Reader, source: ModelConfig, target: ModelConfig, layers: Sequence[int], *, progress: Progress = silent
) -> Reduction:
    """Find what can go of a checkpoint, down to the sizes of `target`.

    Args:
        reader: of the checkpoint.
        source: its model.
        target: the smaller model.
        layers: of the source, that stay.
        progress: called with the number of layers compared, and of all.

    Returns:
        Which units stay, and which stand for others.

    Raises:
        UserError: more units differ than the target has.
    """
    return _Finder(reader, source, target, tuple(layers)).run(progress)


@dataclass(frozen=True)
class _Finder:
    reader: Reader
    source: ModelConfig
    target: ModelConfig
    layers: tuple[int, ...]

    def run(self, progress: Progress) -> Reduction:
        residual = self._residual()
        found = []
        for index, origin in enumerate(self.layers):
            found.append(_LayerFinder(self, index, origin, residual).run())
            progress(index + 1, len(self.layers))
        return Reduction(residual=residual, layers=tuple(found))

    @property
    def tolerance(self) -> float:
        return TOLERANCES[main_dtype(self.reader.tensors)]

    def stored(self, name: str) -> LazyTensor:
        return stored(self.reader, name)

    def equal(self, *parts_un: Tensor) -> list[int]:
        return first_equals(parts_un, self.tolerance)

    def _residual(self) -> UnitChoice:
        """Channels that the embedding writes alike, and that all norms treat alike; padding is written zeros."""
        old, new = self.source.hidden_size, self.target.hidden_size
        if old == new:
            return UnitChoice.all_of(old)
        embedding = self.stored(names.EMBEDDING)
        random = _random("tokens", embedding.shape[0], SAMPLES)
        written_un = torch.zeros(old, SAMPLES, dtype=torch.float64)
        for at in block_slices(embedding.shape):
            written_un += embedding[at].double().T @ random[at]
        self.reader.release(names.EMBEDDING)
        roles = (names.INPUT_NORM, names.POST_ATTENTION_NORM)
        gains = [names.layer_name(self.source, layer, role) for layer in self.layers for role in roles]
        gains_un = torch.stack([self.reader.get(name).double() for name in (*gains, names.FINAL_NORM)], dim=1)
        firsts = self.equal(written_un, gains_un)
        is_silent = written_un.abs().sum(dim=1) == 0
        firsts = [-1 if is_zero else first for first, is_zero in zip(firsts, is_silent.tolist(), strict=True)]
        return merge(firsts, new, "hidden_size", "channels")


@dataclass(frozen=True)
class _LayerFinder:
    """One layer of the target and the one of the source that it comes from."""

    finder: _Finder
    index: int
    origin: int
    residual: UnitChoice

    @property
    def place(self) -> str:
        return f" in layer {self.origin}"

    def run(self) -> LayerReduction:
        finder = self.finder
        source, target = finder.source, finder.target
        experts = self._experts() if source.is_sparse(self.origin) else ()
        chosen = self.origin, experts
        tensors = layer_tensors(finder.reader, source, target, self.index, chosen)
        q_heads, kv_heads = self._heads(tensors)
        found = LayerReduction(
            origin=self.origin,
            q_heads=q_heads,
            kv_heads=kv_heads,
            experts=experts,
            neurons={role: self._neurons(tensors, role) for role in tensors if role.endswith("down_proj.weight")},
        )
        if not self.residual.is_identity:
            self._check_written(tensors, found)
        for tensor in tensors.values():
            for name in tensor.sources:
                finder.reader.release(name)
        return found

    def _inputs(self) -> Tensor:
        """Random streams (d, n), in which copies of a channel are equal."""
        size = self.finder.source.hidden_size
        return self.residual.alike(_random("stream", size, SAMPLES) * size**-0.5)

    def _products(self, tensors: Mapping[str, LazyTensor], *roles: str) -> Tensor:
        """Of every row of these tensors, with its bias and its gain where it has them: (rows, n)."""
        parts = []
        for role in roles:
            if role in tensors:
                tensor = tensors[role]
                is_matrix = len(tensor.shape) == 2
                parts.append(products(tensor, self._inputs()) if is_matrix else tensor.whole().double()[:, None])
        return torch.cat(parts, dim=1)

    def _heads(self, tensors: Mapping[str, LazyTensor]) -> tuple[UnitChoice, UnitChoice]:
        source, target = self.finder.source, self.finder.target
        is_whole = source.qk_norm == "projection"
        q = self._products(tensors, names.Q_WEIGHT, names.Q_BIAS, *([names.Q_NORM] * is_whole))
        k = self._products(tensors, names.K_WEIGHT, names.K_BIAS, *([names.K_NORM] * is_whole))
        v = self._products(tensors, names.V_WEIGHT, names.V_BIAS)
        q, k, v = (each.unflatten(0, (-1, source.head_dim)) for each in (q, k, v))
        if target.head_dim != source.head_dim:
            self._check_head_dim(q, v)
        kv_heads = merge(
            self.finder.equal(k.flatten(1), v.flatten(1)),
            target.num_key_value_heads,
            "num_key_value_heads",
            f"key-value heads{self.place}",
        )
        slots = source.num_attention_heads // source.num_key_value_heads
        # Heads are equal that attend alike to keys and values that are equal.
        pairs = [(first, kv_heads.firsts[head // slots]) for head, first in enumerate(self.finder.equal(q.flatten(1)))]
        seen: dict[tuple[int, int], int] = {}
        firsts = [seen.setdefault(pair, head) for head, pair in enumerate(pairs)]
        return self._query_heads(firsts, [owner for owner in kv_heads.owner for _ in range(slots)]), kv_heads

    def _query_heads(self, firsts: Sequence[int], groups: Sequence[int]) -> UnitChoice:
        """Those that stay of each group: every one that differs, and copies as long as groups of the target have room.

        groups: of every head, that of the target.
        """
        target = self.finder.target
        slots, kept = target.num_attention_heads // target.num_key_value_heads, list[int]()
        for group in range(target.num_key_value_heads):
            members = [head for head, own in enumerate(groups) if own == group]
            different = [head for head in members if firsts[head] == head]
            if len(different) > slots or len(members) < slots:
                which = f"{len(different)} different" if len(different) > slots else f"{len(members)}"
                raise UserError(
                    f"num_attention_heads: target {target.num_attention_heads}, {slots} for each of "
                    f"{target.num_key_value_heads} key-value heads, but key-value head {group}{self.place} of the "
                    f"source has {which} query heads; use a number that every group can have"
                )
            copies = [head for head in members if firsts[head] != head]
            kept += sorted([*different, *copies[: slots - len(different)]])
        return UnitChoice(tuple(kept), tuple(firsts))

    def _check_head_dim(self, q_hcn: Tensor, v_hcn: Tensor) -> None:
        """Pairs between those that stay are silent in queries; value channels repeat."""
        old, new = self.finder.source.head_dim, self.finder.target.head_dim
        ratio = old // new
        is_between = torch.arange(old) % (old // 2) % ratio != 0
        repeated = v_hcn[:, :new].repeat(1, ratio, 1)
        size = v_hcn.norm(dim=2).clamp(min=1e-300)
        if q_hcn[:, is_between].any() or ((v_hcn - repeated).norm(dim=2) > self.finder.tolerance * size).any():
            raise UserError(
                f"head_dim: target {new}, but all {old} channels of a head{self.place} of the source do something; "
                f"keep {old}"
            )

    def _neurons(self, tensors: Mapping[str, LazyTensor], role: str) -> UnitChoice:
        """Neurons that are read alike: gate and up."""
        gate, up = (role.replace("down_proj", which) for which in ("gate_proj", "up_proj"))
        size, target = tensors[role].shape[1], self.finder.target
        field = "intermediate_size"
        if names.general(role) != role:
            field = "moe_intermediate_size"
        elif role == names.SHARED_DOWN:
            field = "shared_expert_intermediate_size"
        new = getattr(target, field)
        if size == new:
            return UnitChoice.all_of(size)
        if size < new:
            raise UserError(
                f"{field}: target {new}, but the experts{self.place} of the source make a feed-forward of {size} "
                f"neurons; use {size} or less"
            )
        parts = self._products(tensors, gate), self._products(tensors, up)
        return merge(self.finder.equal(*parts), new, field, f"neurons{self.place}")

    def _experts(self) -> tuple[int, ...]:
        """Experts that stay; all where none has to go."""
        source, target = self.finder.source, self.finder.target
        count = target.num_experts if target.is_sparse(self.index) else 0
        if count == source.num_experts:
            return tuple(range(count))
        outputs = self._outputs()
        if not count:
            return self._parts(self.finder.equal(outputs))
        scores = self._scores()
        firsts = self.finder.equal(outputs, scores)
        kept = sorted(set(firsts))
        each = source.num_experts // count
        if len(kept) != count or any(firsts.count(expert) != each for expert in kept):
            raise UserError(
                f"num_experts: target {count}, but {len(kept)} of {source.num_experts} experts{self.place} of the "
                f"source differ (by what they compute, or by their scores), and copies have to be as many of each; "
                "keep num_experts"
            )
        return tuple(kept)

    def _parts(self, firsts: list[int]) -> tuple[int, ...]:
        """Of experts that all get the same share: those that make the dense feed-forward together."""
        source, kept = self.finder.source, sorted(set(firsts))
        parts, scores = len(kept), self._scores()
        together = self.finder.equal(scores)
        is_even = source.norm_topk_prob or source.num_experts_per_tok == source.num_experts
        is_cyclic = firsts == [expert % parts for expert in range(source.num_experts)]
        blocks = [expert // parts * parts for expert in range(source.num_experts)]
        chosen_whole = parts == 1 or (
            source.num_experts_per_tok % parts == 0 and all(together[e] == together[b] for e, b in enumerate(blocks))
        )
        if not (is_even and is_cyclic and chosen_whole and self._is_shared_by_half()):
            raise UserError(
                f"num_experts: target 0, but the experts{self.place} of the source are no copies of one feed-forward, "
                "or tokens get different shares of it; keep num_experts"
            )
        return tuple(kept)

    def _is_shared_by_half(self) -> bool:
        """Whether a shared expert has the share of one half, whatever the token."""
        if not self.finder.source.shared_expert_intermediate_size:
            return True
        return not self.finder.reader.get(names.layer_name(self.finder.source, self.origin, names.SHARED_ROUTER)).any()

    def _scores(self) -> Tensor:
        name = names.layer_name(self.finder.source, self.origin, names.ROUTER)
        return products(self.finder.stored(name), self._inputs())

    def _outputs(self) -> Tensor:
        """What every expert makes of random inputs, (experts, numbers)."""
        source, found = self.finder.source, []
        weights = _random("outputs", source.hidden_size, SAMPLES)
        on_disk = names.layer_names(source, self.origin)
        for expert in range(source.num_experts):
            gate, up, down = (on_disk[names.expert_role(expert, role)] for role in (names.GATE, names.UP, names.DOWN))
            inside = silu(products(self.finder.stored(gate), self._inputs()))
            inside *= products(self.finder.stored(up), self._inputs())
            found.append((weights.T @ products(self.finder.stored(down), inside)).flatten())
            for name in (gate, up, down):
                self.finder.reader.release(name)
        return torch.stack(found)

    def _check_written(self, tensors: Mapping[str, LazyTensor], layer: LayerReduction) -> None:
        """Refuse channels that are copies in the embedding, but not in what this layer writes."""
        head_dim, size = self.finder.source.head_dim, self.finder.target.head_dim
        for role, tensor in tensors.items():
            if not names.writes_residual(role):
                continue
            space = layer.neurons[role] if role != names.O_WEIGHT else layer.q_heads
            if role == names.O_WEIGHT:
                space = space.inside(range(size), [channel % size for channel in range(head_dim)])
            written = products(tensor, space.alike(_random(role, tensor.shape[1], SAMPLES)))
            expected = self.residual.alike(written)
            most = 4 * self.finder.tolerance * written.norm(dim=1).maximum(expected.norm(dim=1))
            wrong = ((written - expected).norm(dim=1) > most).nonzero().flatten().tolist()
            if wrong:
                other = self.residual.firsts[wrong[0]]
                which = "zero" if other < 0 else f"equal to channel {other}"
                raise UserError(
                    f"hidden_size: target {self.finder.target.hidden_size}, but channel {wrong[0]}, {which} in the "
                    f"embedding, is not so in {role} of layer {self.origin}; keep {self.finder.source.hidden_size}"
                )


def merge(firsts: Sequence[int], size: int, field: str, what: str) -> UnitChoice:
    """Merge copies until `size` units are left; UserError where more differ."""
    different = len({first for first in firsts if first >= 0})
    if different > size:
        raise UserError(
            f"{field}: target {size}, but {different} of {len(firsts)} {what} of the source differ; use {different} or "
            "more"
        )
    return UnitChoice.merging(firsts, size)


def first_equals(parts_un: Sequence[Tensor], tolerance: float) -> list[int]:
    """Of every unit, the first one that equals it in all parts, up to a fraction of its own size.

    Units are sorted by one of their numbers: those that are equal are near each other.
    """
    order = parts_un[0][:, 0].argsort(stable=True)
    parts = [part_un[order] for part_un in parts_un]
    sizes = [part.abs().amax(dim=1) for part in parts]
    key, first = parts[0][:, 0], list(range(len(order)))
    numbers = order.tolist()

    def root(unit: int) -> int:
        while first[unit] != unit:
            unit = first[unit]
        return unit

    for step in range(1, len(order)):
        is_near = (key[step:] - key[:-step]) <= tolerance * sizes[0][:-step]
        (places,) = is_near.nonzero(as_tuple=True)
        if not len(places):
            break
        is_equal = torch.ones(len(places), dtype=torch.bool)
        for part, size in zip(parts, sizes, strict=True):
            difference = (part[places] - part[places + step]).abs().amax(dim=1)
            is_equal &= difference <= tolerance * size[places]
        for place in places[is_equal].tolist():
            one, other = sorted((root(numbers[place]), root(numbers[place + step])))
            first[other] = one
    return [root(unit) for unit in range(len(order))]


def products(rows: LazyTensor, inputs_dn: Tensor) -> Tensor:
    """Of every row with some vectors: (rows, n), float64."""
    return torch.cat([wide(rows[at]).double() @ inputs_dn for at in block_slices(rows.shape)])


def _random(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(ord(letter) << index % 24 for index, letter in enumerate(name)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

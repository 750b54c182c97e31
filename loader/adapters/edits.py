"""What an adapter does to the base's tensors, as values: each edit names its target and inputs.

``target`` is a tensor of the base (or one that the merge adds); the other names are tensors of the
adapter. The arithmetic is in ``fold``; here nothing is read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LowRank:
    """W += scaling · B A, A: (rank, in), B: (out, rank); W: (out, in), or ``transposed``.

    ``magnitude``: (out,) makes it DoRA. An embedding is transposed, with its rows for ``in``.
    ``rounded``: PEFT rounds the change to the base's dtype before it adds it.
    """

    target: str
    a: str
    b: str
    scaling: float
    transposed: bool = False
    magnitude: str | None = None
    rounded: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (self.a, self.b, *([self.magnitude] if self.magnitude else []))


@dataclass(frozen=True, slots=True)
class CombinedLowRank:
    """W += (Σ scale_b · B)(Σ scale_a · A) over adapters or, ``stacked``, Σ scale_b · scale_a · B A.

    Shapes are those of ``LowRank``; ``a`` and ``b`` name one tensor for each adapter.
    """

    target: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    scale_a: tuple[float, ...]
    scale_b: tuple[float, ...]
    stacked: bool
    transposed: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (*self.a, *self.b)


@dataclass(frozen=True, slots=True)
class ExpertLowRank:
    """W[e] += scaling · B[e] A[e], with A: (experts·rank, in) and B: (out, rank·experts).

    The target is the stack, (experts, out, in) or ``transposed`` (experts, in, out); or, with
    ``expert``, rows [start, end) of that expert's own matrix of the stack.
    """

    target: str
    a: str
    b: str
    scaling: float
    experts: int
    transposed: bool = False
    expert: int | None = None
    start: int = 0
    end: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (self.a, self.b)


@dataclass(frozen=True, slots=True)
class Replace:
    """W = the adapter's tensor, cast to the base's dtype."""

    target: str
    source: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (self.source,)

    @property
    def is_saved_base(self) -> bool:
        """Whether it is the copy of the base that PEFT saves with a LoRA of embeddings."""
        return self.source.endswith(".base_layer.weight")


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """W[rows] = the adapter's tensor: (len(rows), dim)."""

    target: str
    source: str
    rows: tuple[int, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (self.source,)


@dataclass(frozen=True, slots=True)
class AddScaled:
    """W += scaling · the adapter's tensor of the same shape (``lora_bias``)."""

    target: str
    source: str
    scaling: float

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (self.source,)


@dataclass(frozen=True, slots=True)
class Multiply:
    """W *= the adapter's factors (IA3): along rows or, with ``columns``, along columns."""

    target: str
    source: str
    columns: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return (self.source,)


@dataclass(frozen=True, slots=True)
class Factored:
    """W += scaling · a product of several small tensors: ``method`` LOHA, LOKR or VERA.

    ``parts`` maps PEFT's names of the parts (``hada_w1_a``, ``lokr_w2``, ``vera_lambda_d`` …) to
    the adapter's tensors, as pairs.
    """

    target: str
    method: str
    parts: tuple[tuple[str, str], ...]
    scaling: float
    transposed: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return tuple(name for _, name in self.parts)


@dataclass(frozen=True, slots=True)
class Part:
    """*edit* made on rows [start, end) of the target, which are its own rows from ``offset`` on."""

    target: str
    edit: LowRank | Replace | ReplaceRows | AddScaled | Multiply | Factored
    start: int
    end: int
    offset: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The adapter tensors it uses."""
        return self.edit.inputs


Edit = (
    LowRank
    | CombinedLowRank
    | ExpertLowRank
    | Replace
    | ReplaceRows
    | AddScaled
    | Multiply
    | Factored
    | Part
)

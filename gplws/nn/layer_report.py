"""What became of the layers of a network that was rebuilt."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    """Where it was in the network, as in ``named_modules()``; "" is the network itself."""
    kind: str
    """Its class."""
    swapped: bool
    """Whether something else computes it now."""
    note: str
    """What computes it, or why it stayed."""


@dataclass
class ModelReport:
    """What :func:`gplws.accelerate` or :func:`gplws.nn.to_group_parallel` changed, and what not."""

    layers: list[LayerReport] = field(default_factory=list)
    """In the order in which they were looked at."""
    seconds: tuple[float, float] | None = None
    """With an example: one pass before and after."""
    error: float | None = None
    """With an example: largest difference of the results, of the largest value."""

    @property
    def swapped(self) -> list[LayerReport]:
        """What was replaced."""
        return [layer for layer in self.layers if layer.swapped]

    @property
    def kept(self) -> list[LayerReport]:
        """What stayed as it was."""
        return [layer for layer in self.layers if not layer.swapped]

    def add(self, name: str, module: object, note: str, *, swapped: bool) -> None:
        """One more layer, or more about a layer, where it is computed at several places."""
        kind = module if isinstance(module, str) else type(module).__name__
        for index, layer in enumerate(self.layers):
            if layer.name == name and layer.swapped == swapped:
                if note not in layer.note.split("; "):
                    note = f"{layer.note}; {note}"
                    self.layers[index] = LayerReport(name, layer.kind, swapped, note)
                return
        self.layers.append(LayerReport(name, kind, swapped, note))

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers replaced, {len(self.kept)} kept"]
        if self.seconds is not None and self.error is not None:
            before, after = self.seconds
            lines.append(f"{before:.3f} s before, {after:.3f} s after; error {self.error:.1e}")
        for layer in self.layers:
            sign = "+" if layer.swapped else " "
            lines.append(f"{sign} {layer.name or '(all)'} ({layer.kind}): {layer.note}")
        return "\n".join(lines)

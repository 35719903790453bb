"""The curve of a step's memory, allocation by allocation, and how it grows with depth."""

from peftlab.memory.step import Counter, Live

DEPTHS = (3, 4)  # layers of two small models that tell of one as deep as it is
DEPTH = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")


class _Named(Live):
    """Remembers every allocation: what made it, its bytes, and how many are alive then."""

    def __init__(self):
        super().__init__()
        self.curve: list[tuple[str, int, int]] = []
        self.name = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.name = str(function)
        return super().__torch_dispatch__(function, types, args, kwargs)

    def _follow(self, storage):
        before = self.bytes
        super()._follow(storage)
        if self.bytes != before:
            self.curve.append((self.name, self.bytes - before, self.bytes))


class Curves(Counter):
    """A counter that keeps the curve of each part of the step."""

    def __init__(self):
        self.live, self.curves = _Named(), []

    def most(self) -> int:
        self.curves.append([("", 0, self.live.blocks), *self.live.curve])
        self.live.curve = []
        return super().most()


def alike(low: list, high: list) -> list[tuple]:
    """The allocations of two depths that are the same one: counted from the start, as far as they
    agree, and from the end. Each is a key and something of it; the pairs have the latter."""
    pairs = []
    for step in (1, -1):
        for one, more in zip(low[::step], high[::step], strict=False):
            if one[0] != more[0]:
                break
            pairs.append((one[1], more[1]))
    return pairs

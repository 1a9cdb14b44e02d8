"""Networks: one architecture a file, each a frozen dataclass that is its own configuration.

`network.build` makes the whole network of a run: [0, 1] images in, normalised by the first layer, logits out.
"""

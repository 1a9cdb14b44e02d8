"""Data: where images come from, how they are stored (FFCV's .beton), and how batches are made of them."""

"""From text to batches: sources, tokenizers, token shards, mixtures, packing and the loader.

Import from the file that holds the name; a process that only tokenises does not wait for PyTorch.
"""

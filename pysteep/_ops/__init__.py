"""The ops on any tensors: which backend serves, what layout it needs, and torch's registry. Knows no optimizer."""

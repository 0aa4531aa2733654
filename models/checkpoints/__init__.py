"""Files of weights: reading, conversion, adapters and the hub."""

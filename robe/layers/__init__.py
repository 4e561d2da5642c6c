"""The layers: virtual embedding tables on one shared array."""

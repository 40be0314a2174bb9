"""Models of transformers: loading, adapters, the capture of signals, packed rows."""

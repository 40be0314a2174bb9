"""Work with models of transformers: loading, adapters, capture of signals, packed rows."""

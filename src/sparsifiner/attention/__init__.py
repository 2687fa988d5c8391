"""The sparse attention layer and its adapters."""

"""Models of the example application against transformers."""
